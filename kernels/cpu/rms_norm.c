/* y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, optionally after new_residual = x + residual.
 * The sum of squares runs in LANES lanes, so a row's bits depend only on the row. */
#include "simd.h"
#include "team.h"

INLINE void row(const void *x, const void *residual, const void *weight, void *y, void *residual_out, int64_t start,
                int64_t width, float eps, int dtype, int weight_dtype) {
    vf sums[LANES / VL];
    for (int i = 0; i < LANES / VL; i++) sums[i] = vf_set1(0.0f);
    for (int64_t i = 0; i < width; i += VL) {
        int64_t n = width - i < VL ? width - i : VL;
        vf value = vf_read(x, start + i, n, dtype);
        if (residual) {
            vf_write(residual_out, start + i, n, dtype, value + vf_read(residual, start + i, n, dtype));
            value = vf_read(residual_out, start + i, n, dtype); /* the norm sees what the stream carries on */
        }
        sums[i / VL % (LANES / VL)] += value * value;
    }
    float inverse = 1.0f / sqrtf(sum_lanes((const float *)sums) / (float)width + eps);
    const void *source = residual ? residual_out : x;
    for (int64_t i = 0; i < width; i += VL) {
        int64_t n = width - i < VL ? width - i : VL;
        vf scaled = vf_read(source, start + i, n, dtype) * inverse * vf_read(weight, i, n, weight_dtype);
        vf_write(y, start + i, n, dtype, scaled);
    }
}

typedef struct {
    const void *x, *residual, *weight;
    void *y, *residual_out;
    int64_t rows, width, strip;
    float eps;
    int dtype, weight_dtype;
} Norm;

static void strip_chunk(const void *argument, int64_t chunk) {
    const Norm *job = argument;
    int64_t end = (chunk + 1) * job->strip < job->rows ? (chunk + 1) * job->strip : job->rows, width = job->width;
    for (int64_t r = chunk * job->strip; r < end; r++) {
        if (job->dtype == BFLOAT16)
            row(job->x, job->residual, job->weight, job->y, job->residual_out, r * width, width, job->eps, BFLOAT16, job->weight_dtype);
        else
            row(job->x, job->residual, job->weight, job->y, job->residual_out, r * width, width, job->eps, FLOAT32, job->weight_dtype);
    }
}

/* x, residual or NULL, weight, y, new residual or NULL; rows, width; eps; dtypes of x and weight; threads. */
int64_t tandem_rms_norm(const Arg *a) {
    Norm job = {a[0].p, a[1].p, a[2].p, a[3].p, a[4].p, a[5].i, a[6].i, strip_of(a[6].i), (float)a[7].d, (int)a[8].i, (int)a[9].i};
    team_run(a[10].i, (job.rows + job.strip - 1) / job.strip, strip_chunk, &job);
    return 0;
}
