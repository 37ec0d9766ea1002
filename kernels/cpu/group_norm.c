/* y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias over a group of channels and all their positions, which lie
 * side by side; then y * sigmoid(y) if asked. A group is summed in blocks, each in SUMS lanes, and the blocks in order, so its
 * bits depend only on it. */
#include "simd.h"
#include "team.h"

enum {
    BLOCK = 4096,  /* elements: many of them would lose digits in one sum */
    SUMS = 4 * LANES, /* lanes enough that no addition waits for the one before */
};

typedef struct {
    const void *x, *weight, *bias;
    void *y;
    int64_t count, groups, channels, positions, strip; /* groups of all images, of an image; channels of a group */
    float eps;
    int silu, dtype, weight_dtype, bias_dtype;
} Norm;

/* The sum of n elements, or of their squared differences from a mean. */
INLINE float sum_of(const void *x, int64_t start, int64_t n, float mean, int squares, int dtype) {
    float total = 0.0f;
    for (int64_t block = 0; block < n; block += BLOCK) {
        int64_t end = n - block < BLOCK ? n - block : BLOCK, i = 0;
        vf sums[SUMS / VL];
        for (int s = 0; s < SUMS / VL; s++) sums[s] = vf_set1(0.0f);
        for (; i + SUMS <= end; i += SUMS)
#pragma GCC unroll 8
            for (int s = 0; s < SUMS / VL; s++) {
                vf value = vf_read(x, start + block + i + s * VL, VL, dtype) - mean;
                sums[s] += squares ? value * value : value;
            }
        for (int s = 0; i < end; s++, i += VL) {
            int64_t rest = end - i < VL ? end - i : VL;
            vf value = vf_read(x, start + block + i, rest, dtype) - mean;
            for (int64_t lane = rest; lane < VL; lane++) value[lane] = 0.0f; /* beyond the group */
            sums[s] += squares ? value * value : value;
        }
        float lanes[SUMS];
        memcpy(lanes, sums, sizeof lanes);
        total += (sum_lanes(lanes) + sum_lanes(lanes + LANES)) + (sum_lanes(lanes + 2 * LANES) + sum_lanes(lanes + 3 * LANES));
    }
    return total;
}

INLINE void group(const Norm *job, int64_t g, int dtype, int silu) {
    int64_t n = job->channels * job->positions, start = g * n, first = g % job->groups * job->channels;
    float mean = sum_of(job->x, start, n, 0.0f, 0, dtype) / (float)n;
    float inverse = 1.0f / sqrtf(sum_of(job->x, start, n, mean, 1, dtype) / (float)n + job->eps);
    for (int64_t c = 0; c < job->channels; c++, start += job->positions) {
        float weight = inverse * read8(job->weight, first + c, 1, job->weight_dtype)[0];
        float bias = read8(job->bias, first + c, 1, job->bias_dtype)[0];
        for (int64_t i = 0; i < job->positions; i += VL) {
            int64_t rest = job->positions - i < VL ? job->positions - i : VL;
            vf value = (vf_read(job->x, start + i, rest, dtype) - mean) * weight + bias;
            vf_write(job->y, start + i, rest, dtype, silu ? value * vf_sigmoid(value) : value);
        }
    }
}

INLINE void group_by_silu(const Norm *job, int64_t g, int dtype) {
    if (job->silu) group(job, g, dtype, 1);
    else group(job, g, dtype, 0);
}

static void strip_chunk(const void *argument, int64_t chunk) {
    const Norm *job = argument;
    int64_t end = (chunk + 1) * job->strip < job->count ? (chunk + 1) * job->strip : job->count;
    for (int64_t g = chunk * job->strip; g < end; g++) {
        if (job->dtype == BFLOAT16) group_by_silu(job, g, BFLOAT16);
        else if (job->dtype == FLOAT16) group_by_silu(job, g, FLOAT16);
        else group_by_silu(job, g, FLOAT32);
    }
}

/* x, weight, bias, y; batch, groups, channels of a group, positions; eps; whether SiLU follows; dtypes of x, weight and bias;
 * threads. */
int64_t tandem_group_norm(const Arg *a) {
    Norm job = {
        a[0].p, a[1].p, a[2].p, a[3].p, a[4].i * a[5].i, a[5].i, a[6].i, a[7].i, strip_of(a[6].i * a[7].i), (float)a[8].d,
        (int)a[9].i, (int)a[10].i, (int)a[11].i, (int)a[12].i,
    };
    team_run(a[13].i, (job.count + job.strip - 1) / job.strip, strip_chunk, &job);
    return 0;
}
