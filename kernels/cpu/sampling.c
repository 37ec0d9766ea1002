/* The next token of each row: greedy, or drawn from what top-k, top-p and min-p leave.
 *
 * A drawn row's probabilities are e = exp(logit / temperature - the highest) and its weights the integers floor(e * scale):
 * their sums are exact, so that no order of addition, and no instruction set, changes a cut or a draw. */
#include "simd.h"
#include "team.h"

enum { BLOCK = 1024 }; /* weights summed at once, to find a token's block before the token */

typedef struct {
    double temperature, top_k, top_p, min_p;
} How;

/* The highest of n, a multiple of VL; NaN if one is. */
static float highest_of(const float *x, int64_t n) {
    vf high = vf_set1(-INFINITY);
    vi is_nan = {0};
    for (int64_t i = 0; i < n; i += VL) {
        vf v = vf_load(x + i);
        high = vf_max(high, v);
        is_nan |= v != v;
    }
    for (int i = 0; i < VL; i++)
        if (is_nan[i]) return NAN;
    return vf_highest(high);
}

enum { NO_DISTRIBUTION = -1, NO_MEMORY = -2 };

/* The first of the highest. */
static int64_t greedy(const float *x, int64_t n) {
    int64_t whole = n / VL * VL, i = 0;
    float high = highest_of(x, whole);
    for (i = whole; i < n; i++) high = x[i] > high || x[i] != x[i] ? x[i] : high;
    if (!isfinite(high)) return NO_DISTRIBUTION;
    vf wanted = vf_set1(high);
    for (i = 0; i < whole; i += VL) {
        vi found = vf_load(x + i) == wanted;
        int64_t any[VL / 2];
        memcpy(any, &found, sizeof any);
        for (int j = 1; j < VL / 2; j++) any[0] |= any[j];
        if (any[0]) break;
    }
    while (x[i] != high) i++;
    return i;
}

INLINE int64_t weight(float e, double scale) { return (int64_t)((double)e * scale); }

static int64_t sum_weights(const float *e, int64_t n, double scale) {
    int64_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += weight(e[i], scale);
    return sum;
}

/* As an integer of the same order; both zeros are one. */
INLINE uint32_t key_of(float x) {
    uint32_t bits;
    x += 0.0f;
    memcpy(&bits, &x, sizeof bits);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

INLINE float of_key(uint32_t key) {
    uint32_t bits = key >> 31 ? key & 0x7fffffffu : ~key;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The value down to which the highest add up to `needed`, and what those above it add up to. Each counts its weight, or 1
 * with scale 0. By the upper bits of keys first, then among those with the same ones. */
static float cut(const float *x, int64_t n, double scale, int64_t needed, int64_t *above) {
    static const int shifts[] = {32, 21, 10, 0};
    uint32_t prefix = 0;
    int64_t over = 0;
    for (int level = 1; level < 4; level++) {
        int64_t sums[2048] = {0};
        int shift = shifts[level], bits = shifts[level - 1] - shift;
        uint32_t mask = (1u << bits) - 1;
        for (int64_t i = 0; i < n; i++) {
            uint32_t key = key_of(x[i]);
            if ((uint64_t)key >> shifts[level - 1] == prefix) sums[key >> shift & mask] += scale != 0 ? weight(x[i], scale) : 1;
        }
        uint32_t bin = mask;
        while (bin && over + sums[bin] < needed) over += sums[bin--];
        prefix = prefix << bits | bin;
    }
    *above = over;
    return of_key(prefix);
}

/* Copies those x whose e is high enough, for a few likely bounds, that they hold the cut; returns how many. */
static int64_t candidates(const float *x, const float *e, int64_t n, double scale, int64_t needed, float *found) {
    static const float bounds[] = {0x1p-3f, 0x1p-6f, 0x1p-10f, 0x1p-16f, -1};
    float bound = 0;
    for (int64_t b = 0, sum = 0; sum < needed && b < 5; b++) {
        bound = bounds[b], sum = 0;
        if (scale != 0)
            for (int64_t i = 0; i < n; i++) sum += e[i] >= bound ? weight(e[i], scale) : 0;
        else
            for (int64_t i = 0; i < n; i++) sum += e[i] >= bound;
    }
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) found[count] = x[i], count += e[i] >= bound;
    return count;
}

/* found: n + 1 floats to work in. */
static void keep_top_k(float *e, const float *score, int64_t n, int64_t k, float *found) {
    int64_t above;
    float limit = cut(found, candidates(score, e, n, 0, k, found), 0, k, &above);
    for (int64_t i = 0; i < n; i++) e[i] = score[i] < limit ? 0 : e[i];
}

static void keep_top_p(float *e, int64_t n, double p, double scale, float *found) {
    int64_t total = sum_weights(e, n, scale), above;
    int64_t needed = total - (int64_t)((1 - p) * (double)total);
    if (needed < 1) needed = 1;
    float limit = cut(found, candidates(e, e, n, scale, needed, found), scale, needed, &above);
    int64_t wanted = (needed - above + weight(limit, scale) - 1) / weight(limit, scale), ties = 0;
    for (int64_t i = 0; i < n; i++) e[i] = e[i] < limit ? 0 : e[i], ties += e[i] == limit;
    for (int64_t i = n - 1; ties > wanted; i--)
        if (e[i] == limit) e[i] = 0, ties--;
}

/* The token that owns the point `uniform` of the row's weights, which are not all zero. */
static int64_t pick(const float *e, int64_t n, double uniform, double scale) {
    int64_t total = sum_weights(e, n, scale), first = 0, sum;
    int64_t left = (int64_t)(uniform * (double)total);
    while (left >= (sum = sum_weights(e + first, n - first < BLOCK ? n - first : BLOCK, scale))) left -= sum, first += BLOCK;
    while (left >= (sum = weight(e[first], scale))) left -= sum, first++;
    return first;
}

static int64_t drawn(const float *logits, int64_t n, How how, double uniform, double scale, float *kept) {
    int64_t padded = (n + 15) / 16 * 16;
    float *score = scratch(SCRATCH_SAMPLING, (size_t)(padded * 3 + 1) * sizeof(float));
    float *e = score + padded, *found = e + padded;
    if (!score) return NO_MEMORY;
    memcpy(score, logits, (size_t)n * sizeof(float));
    for (int64_t i = n; i < padded; i++) score[i] = -INFINITY;
    vf temperature = vf_set1((float)how.temperature);
    for (int64_t i = 0; i < padded; i += VL) vf_store(score + i, vf_load(score + i) / temperature);
    float high = highest_of(score, padded);
    if (!isfinite(high)) return NO_DISTRIBUTION;
    for (int64_t i = 0; i < padded; i += VL) vf_store(e + i, vf_exp(vf_load(score + i) - vf_set1(high)));
    if (how.top_k > 0 && how.top_k < (double)n) keep_top_k(e, score, padded, (int64_t)how.top_k, found);
    if (how.top_p < 1) keep_top_p(e, padded, how.top_p, scale, found);
    if (how.min_p > 0)
        for (int64_t i = 0; i < padded; i++) e[i] = e[i] < (float)how.min_p ? 0 : e[i];
    if (kept) memcpy(kept, e, (size_t)n * sizeof(float));
    return pick(e, padded, uniform, scale);
}

typedef struct {
    const float *logits;
    int64_t stride, vocab;
    const How *how;
    const double *uniform;
    double scale;
    int64_t *tokens;
    float *kept;
} Sampling;

static void one_row(const void *argument, int64_t row) {
    const Sampling *job = argument;
    const float *logits = job->logits + row * job->stride;
    float *kept = job->kept ? job->kept + row * job->vocab : NULL;
    How how = job->how[row];
    job->tokens[row] = how.temperature == 0 ? greedy(logits, job->vocab)
                                            : drawn(logits, job->vocab, how, job->uniform[row], job->scale, kept);
}

/* logits, its stride; rows, vocab; how, uniforms, scale; tokens, kept (or NULL); threads. Returns 1 without memory. */
int64_t tandem_sample(const Arg *a) {
    Sampling job = {a[0].p, a[1].i, a[3].i, a[4].p, a[5].p, a[6].d, a[7].p, a[8].p};
    team_run(a[9].i, a[2].i, one_row, &job);
    for (int64_t i = 0; i < a[2].i; i++)
        if (job.tokens[i] == NO_MEMORY) return 1;
    return 0;
}

/* Philox4x32-10: a number of 53 bits in [0, 1) for each seed, index and position; count; out. */
int64_t tandem_uniforms(const Arg *a) {
    const uint64_t *seeds = a[0].p;
    const int64_t *indices = a[1].p, *positions = a[2].p;
    double *out = a[4].p;
    for (int64_t i = 0; i < a[3].i; i++) {
        uint32_t word[4] = {(uint32_t)positions[i], (uint32_t)indices[i], 0, 0};
        uint32_t key[2] = {(uint32_t)seeds[i], (uint32_t)(seeds[i] >> 32)};
        for (int round = 0; round < 10; round++) {
            uint64_t first = (uint64_t)word[0] * 0xD2511F53u, second = (uint64_t)word[2] * 0xCD9E8D57u;
            word[0] = (uint32_t)(second >> 32) ^ word[1] ^ key[0], word[1] = (uint32_t)second;
            word[2] = (uint32_t)(first >> 32) ^ word[3] ^ key[1], word[3] = (uint32_t)first;
            key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
        }
        out[i] = (double)(((uint64_t)(word[0] >> 5) << 26) + (word[1] >> 6)) * 0x1p-53;
    }
    return 0;
}
