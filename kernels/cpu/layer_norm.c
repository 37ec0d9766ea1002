/* y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias over the last dimension, optionally after
 * new_residual = x + residual. Both sums run in LANES lanes, so a row's bits depend only on the row. */
#include "simd.h"
#include "team.h"

typedef struct {
    const void *x, *residual, *weight, *bias;
    void *y, *residual_out;
    int64_t rows, width, strip;
    float eps;
    int dtype, weight_dtype, bias_dtype;
} Norm;

INLINE void row(const Norm *job, int64_t start, int dtype) {
    int64_t width = job->width;
    vf sums[LANES / VL], squares[LANES / VL];
    for (int i = 0; i < LANES / VL; i++) sums[i] = squares[i] = vf_set1(0.0f);
    for (int64_t i = 0; i < width; i += VL) {
        int64_t n = width - i < VL ? width - i : VL;
        vf value = vf_read(job->x, start + i, n, dtype);
        if (job->residual) {
            vf_write(job->residual_out, start + i, n, dtype, value + vf_read(job->residual, start + i, n, dtype));
            value = vf_read(job->residual_out, start + i, n, dtype); /* the norm sees what the stream carries on */
        }
        sums[i / VL % (LANES / VL)] += value;
    }
    const void *source = job->residual ? job->residual_out : job->x;
    float mean = sum_lanes((const float *)sums) / (float)width;
    for (int64_t i = 0; i < width; i += VL) {
        int64_t n = width - i < VL ? width - i : VL;
        vf difference = vf_read(source, start + i, n, dtype) - mean;
        for (int64_t lane = n; lane < VL; lane++) difference[lane] = 0.0f; /* beyond the row */
        squares[i / VL % (LANES / VL)] += difference * difference;
    }
    float inverse = 1.0f / sqrtf(sum_lanes((const float *)squares) / (float)width + job->eps);
    for (int64_t i = 0; i < width; i += VL) {
        int64_t n = width - i < VL ? width - i : VL;
        vf scaled = (vf_read(source, start + i, n, dtype) - mean) * inverse * vf_read(job->weight, i, n, job->weight_dtype);
        if (job->bias) scaled += vf_read(job->bias, i, n, job->bias_dtype);
        vf_write(job->y, start + i, n, dtype, scaled);
    }
}

static void strip_chunk(const void *argument, int64_t chunk) {
    const Norm *job = argument;
    int64_t end = (chunk + 1) * job->strip < job->rows ? (chunk + 1) * job->strip : job->rows;
    for (int64_t r = chunk * job->strip; r < end; r++) {
        if (job->dtype == BFLOAT16) row(job, r * job->width, BFLOAT16);
        else if (job->dtype == FLOAT16) row(job, r * job->width, FLOAT16);
        else row(job, r * job->width, FLOAT32);
    }
}

/* x, residual or NULL, weight, bias or NULL, y, new residual or NULL; rows, width; eps; dtypes of x, weight and bias; threads. */
int64_t tandem_layer_norm(const Arg *a) {
    Norm job = {
        a[0].p, a[1].p, a[2].p, a[3].p, a[4].p, a[5].p, a[6].i, a[7].i, strip_of(a[7].i), (float)a[8].d,
        (int)a[9].i, (int)a[10].i, (int)a[11].i,
    };
    team_run(a[12].i, (job.rows + job.strip - 1) / job.strip, strip_chunk, &job);
    return 0;
}
