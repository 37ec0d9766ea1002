/* RMSNorm or LayerNorm of heads in place: of num_heads parts of `width` columns of each row, from column `first` on. Sums run
 * in LANES lanes as in rms_norm.c and layer_norm.c, so a head's bits depend on it alone and are theirs. */
#include "simd.h"
#include "team.h"

enum { RMS = 0, LAYER = 1 };

typedef struct {
    void *x;
    const void *weight, *bias; /* bias: or NULL */
    int64_t rows, total, first, num_heads, width, strip;
    int64_t step; /* from a head's weight and bias to the next one's: width, or 0 where heads share them */
    float eps;
    int kind, dtype, weight_dtype, bias_dtype;
} Norm;

INLINE void head(const Norm *job, int64_t start, int64_t own, int dtype, int kind) {
    int64_t width = job->width;
    float mean = 0.0f;
    if (kind == LAYER) {
        vf sums[LANES / VL];
        for (int i = 0; i < LANES / VL; i++) sums[i] = vf_set1(0.0f);
        for (int64_t i = 0; i < width; i += VL)
            sums[i / VL % (LANES / VL)] += vf_read(job->x, start + i, width - i < VL ? width - i : VL, dtype);
        mean = sum_lanes((const float *)sums) / (float)width;
    }
    vf squares[LANES / VL];
    for (int i = 0; i < LANES / VL; i++) squares[i] = vf_set1(0.0f);
    for (int64_t i = 0; i < width; i += VL) {
        int64_t n = width - i < VL ? width - i : VL;
        vf value = vf_read(job->x, start + i, n, dtype);
        if (kind == LAYER) {
            value -= mean;
            for (int64_t lane = n; lane < VL; lane++) value[lane] = 0.0f; /* beyond the head */
        }
        squares[i / VL % (LANES / VL)] += value * value;
    }
    float inverse = 1.0f / sqrtf(sum_lanes((const float *)squares) / (float)width + job->eps);
    for (int64_t i = 0; i < width; i += VL) {
        int64_t n = width - i < VL ? width - i : VL;
        vf value = vf_read(job->x, start + i, n, dtype);
        if (kind == LAYER) value -= mean;
        value = value * inverse * vf_read(job->weight, own + i, n, job->weight_dtype);
        if (job->bias) value += vf_read(job->bias, own + i, n, job->bias_dtype);
        vf_write(job->x, start + i, n, dtype, value);
    }
}

INLINE void row(const Norm *job, int64_t r, int dtype, int kind) {
    int64_t start = r * job->total + job->first;
    for (int64_t h = 0; h < job->num_heads; h++) head(job, start + h * job->width, h * job->step, dtype, kind);
}

INLINE void row_by_kind(const Norm *job, int64_t r, int dtype) {
    if (job->kind == RMS) row(job, r, dtype, RMS);
    else row(job, r, dtype, LAYER);
}

static void strip_chunk(const void *argument, int64_t chunk) {
    const Norm *job = argument;
    int64_t end = (chunk + 1) * job->strip < job->rows ? (chunk + 1) * job->strip : job->rows;
    for (int64_t r = chunk * job->strip; r < end; r++) {
        if (job->dtype == BFLOAT16) row_by_kind(job, r, BFLOAT16);
        else if (job->dtype == FLOAT16) row_by_kind(job, r, FLOAT16);
        else row_by_kind(job, r, FLOAT32);
    }
}

/* x, weight, bias or NULL; rows, total, first, num_heads, width; whether each head has its own weight and bias; eps; kind; dtypes
 * of x, weight and bias; threads. */
int64_t tandem_head_norm(const Arg *a) {
    Norm job = {
        a[0].p, a[1].p, a[2].p, a[3].i, a[4].i, a[5].i, a[6].i, a[7].i, strip_of(a[6].i * a[7].i), a[8].i ? a[7].i : 0,
        (float)a[9].d, (int)a[10].i, (int)a[11].i, (int)a[12].i, (int)a[13].i,
    };
    team_run(a[14].i, (job.rows + job.strip - 1) / job.strip, strip_chunk, &job);
    return 0;
}
