/* Which experts a token goes to, the pairs of each expert, and the sum of what experts answered. Their linears are jobs of
 * linear.c and linear_pairs.c. A token's bits depend on that token alone. */
#include "simd.h"
#include "team.h"

enum { MAX_EXPERTS = 256 };

INLINE float exponential(float x) { return vf_exp(vf_set1(x))[0]; }

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* A NaN is above all; equals, and NaNs, are above none. */
INLINE int above(float a, float b) { return a > b || (a != a && b == b); }

typedef struct {
    const void *logits;
    float *weights;
    int32_t *experts;
    int64_t tokens, num_experts, choices, strip;
    int dtype, of_sigmoid, renormalize;
} Gating;

/* The sum of e^(logit - highest) over a token's experts; beyond them, up to LANES, logits are -INFINITY. */
static float sum_of_exponentials(const float *logits, int64_t count, float highest) {
    vf sums[LANES / VL];
    for (int i = 0; i < LANES / VL; i++) sums[i] = vf_set1(0.0f);
    for (int64_t i = 0; i < count; i += VL) {
        /* what is added below -87 is 0, and that goes for the padding */
        sums[i / VL % (LANES / VL)] += vf_exp(vf_load(logits + i) - vf_set1(highest));
    }
    return sum_lanes((const float *)sums);
}

static void gate(const Gating *job, int64_t token) {
    float logits[MAX_EXPERTS], *weights = job->weights + token * job->choices, sum = 0;
    int32_t *experts = job->experts + token * job->choices;
    int64_t count = job->num_experts;
    for (int64_t i = 0; i < (count + LANES - 1) / LANES * LANES; i += 8) {
        v8 eight = v8_set1(-INFINITY);
        if (i < count) {
            int64_t n = count - i < 8 ? count - i : 8;
            v8 read = read8(job->logits, token * count + i, n, job->dtype);
            memcpy(&eight, &read, (size_t)n * sizeof(float));
        }
        v8_store(logits + i, eight);
    }
    char taken[MAX_EXPERTS] = {0};
    for (int64_t choice = 0; choice < job->choices; choice++) {
        int64_t best = 0;
        while (taken[best]) best++;
        for (int64_t i = best + 1; i < count; i++)
            if (!taken[i] && above(logits[i], logits[best])) best = i;
        taken[best] = 1;
        experts[choice] = (int32_t)best;
    }
    float highest = logits[experts[0]];
    for (int64_t choice = 0; choice < job->choices; choice++) {
        float logit = logits[experts[choice]];
        weights[choice] = job->of_sigmoid ? sigmoid(logit) : exponential(logit - highest);
        sum += weights[choice];
    }
    if (!job->renormalize) sum = job->of_sigmoid ? 1.0f : sum_of_exponentials(logits, count, highest);
    for (int64_t choice = 0; choice < job->choices; choice++) weights[choice] /= sum;
}

static void gating_chunk(const void *argument, int64_t chunk) {
    const Gating *job = argument;
    int64_t end = (chunk + 1) * job->strip < job->tokens ? (chunk + 1) * job->strip : job->tokens;
    for (int64_t token = chunk * job->strip; token < end; token++) gate(job, token);
}

/* logits, weights, experts; tokens, num_experts, choices; dtype of logits, whether scores are sigmoids, whether weights are
 * divided by their sum; threads. */
int64_t tandem_top_k_gating(const Arg *a) {
    Gating job = {
        a[0].p, a[1].p, a[2].p, a[3].i, a[4].i, a[5].i, strip_of(8 * a[4].i), (int)a[6].i, (int)a[7].i, (int)a[8].i,
    };
    team_run(a[9].i, (job.tokens + job.strip - 1) / job.strip, gating_chunk, &job);
    return 0;
}

/* experts of the pairs; sorted pairs, experts of blocks, counts, offsets, all to be written; pairs, rows, experts, rows of a
 * block, the number of the first expert. */
int64_t tandem_route(const Arg *a) {
    const int32_t *experts = a[0].p;
    int32_t *sorted = a[1].p, *of_block = a[2].p, *counts = a[3].p, *offsets = a[4].p;
    int64_t pairs = a[5].i, rows = a[6].i, num_experts = a[7].i, block_rows = a[8].i, next[MAX_EXPERTS];
    uint32_t first = (uint32_t)a[9].i;
    for (int64_t expert = 0; expert < num_experts; expert++) counts[expert] = 0;
    for (int64_t pair = 0; pair < pairs; pair++)
        if ((uint32_t)experts[pair] - first < num_experts) counts[(uint32_t)experts[pair] - first]++;
    for (int64_t row = 0; row < rows; row++) sorted[row] = -1;
    int64_t block = 0;
    for (int64_t expert = 0; expert < num_experts; expert++) {
        next[expert] = block * block_rows;
        offsets[expert] = (int32_t)next[expert];
        int64_t end = block + (counts[expert] + block_rows - 1) / block_rows;
        while (block < end) of_block[block++] = (int32_t)expert;
    }
    offsets[num_experts] = (int32_t)(block * block_rows);
    while (block < rows / block_rows) of_block[block++] = -1;
    for (int64_t pair = 0; pair < pairs; pair++)
        if ((uint32_t)experts[pair] - first < num_experts) sorted[next[(uint32_t)experts[pair] - first]++] = (int32_t)pair;
    return 0;
}

typedef struct {
    const void *y, *shared, *shared_gate; /* the last two perhaps NULL */
    void *out;
    int64_t tokens, width, choices, strip, gates; /* logits of a gate: 1, or 2 */
    int y_dtype, shared_dtype, gate_dtype, out_dtype;
} Combine;

static void combine_token(const Combine *job, int64_t token) {
    float own = 1.0f, gate = 1.0f;
    if (job->shared_gate) {
        v8 logits = read8(job->shared_gate, token * job->gates, job->gates, job->gate_dtype);
        gate = sigmoid(job->gates == 2 ? logits[1] - logits[0] : logits[0]);
        if (job->gates == 2) own = sigmoid(logits[0] - logits[1]);
    }
    for (int64_t i = 0; i < job->width; i += VL) {
        int64_t n = job->width - i < VL ? job->width - i : VL, first = token * job->choices * job->width + i;
        vf sum = vf_read(job->y, first, n, job->y_dtype);
        for (int64_t choice = 1; choice < job->choices; choice++)
            sum += vf_read(job->y, first + choice * job->width, n, job->y_dtype);
        if (job->gates == 2) sum *= own;
        if (job->shared) sum += gate * vf_read(job->shared, token * job->width + i, n, job->shared_dtype);
        vf_write(job->out, token * job->width + i, n, job->out_dtype, sum);
    }
}

static void combine_chunk(const void *argument, int64_t chunk) {
    const Combine *job = argument;
    int64_t end = (chunk + 1) * job->strip < job->tokens ? (chunk + 1) * job->strip : job->tokens;
    for (int64_t token = chunk * job->strip; token < end; token++) combine_token(job, token);
}

/* y, shared or NULL, the logits of its gate or NULL, out; tokens, width, choices; dtypes of y, shared, gate and out; threads;
 * logits of a gate: 1, or 2 whose softmax weighs the sum and shared. */
int64_t tandem_combine(const Arg *a) {
    Combine job = {
        a[0].p, a[1].p, a[2].p, a[3].p, a[4].i, a[5].i, a[6].i, strip_of(a[5].i * a[6].i), a[12].i,
        (int)a[7].i, (int)a[8].i, (int)a[9].i, (int)a[10].i,
    };
    team_run(a[11].i, (job.tokens + job.strip - 1) / job.strip, combine_chunk, &job);
    return 0;
}
