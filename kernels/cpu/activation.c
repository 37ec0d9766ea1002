/* y = f(gate) * up, with gate and up the two halves of each row, and y = f(x + bias). silu, quick_gelu and gelu_tanh are all
 * g * sigmoid(z): silu has z = g; quick_gelu has z = 1.702 g; gelu_tanh has z = 2 sqrt(2/pi) (g + 0.044715 g^3), because
 * (1 + tanh(u)) / 2 = sigmoid(2u). gelu is g * Phi(g), Phi being the normal distribution function. */
#include "simd.h"
#include "team.h"

enum { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3, QUICK_GELU = 4 };

/* g * Phi(g) = max(g, 0) - |g| * Phi(-|g|), which leaves a negative g its digits as g / 2 * (1 + erf(g / sqrt(2))) would not.
 * Phi(-|g|) = e^(-g^2 / 2) t P(t), t = 1 / (1 + 0.4 |g|): Hastings' form (Abramowitz and Stegun 26.2.17) with a P of degree 9,
 * fitted by least squares, reweighted until the largest relative error is least: 1.6e-8 for |g| up to 14. */
INLINE vf gelu(vf g) {
    static const float P[] = {
        0.0320987329f, -0.176180496f, 0.380798089f, -0.371989903f, 0.117760186f,
        -0.0258983448f, 0.0910063595f, 0.133209851f, 0.159619233f, 0.1595763f,
    };
    vf size = (vf)((vi)g & 0x7fffffff), t = 1.0f / vf_fma(size, vf_set1(0.4f), vf_set1(1.0f)), p = vf_set1(P[0]);
#pragma GCC unroll 9
    for (int i = 1; i < 10; i++) p = vf_fma(p, t, vf_set1(P[i]));
    return vf_choose(g < vf_set1(0.0f), vf_set1(0.0f), g) - size * (vf_exp(-0.5f * g * g) * t * p);
}

INLINE vf activated(vf g, int function) {
    if (function == RELU) return vf_choose(g < vf_set1(0.0f), vf_set1(0.0f), g);
    if (function == GELU) return gelu(g);
    if (function == GELU_TANH) return g * vf_sigmoid(1.5957691216057308f * (g + 0.044715f * (g * g * g)));
    if (function == QUICK_GELU) return g * vf_sigmoid(1.702f * g);
    return g * vf_sigmoid(g);
}

typedef struct {
    const void *x, *bias; /* x is gate_up where gated */
    void *y;
    int64_t rows, width, strip;
    int dtype, bias_dtype, function, gated;
} Activation;

INLINE void row(const Activation *job, int64_t r, int dtype, int function) {
    int64_t width = job->width;
    for (int64_t i = 0; i < width; i += VL) {
        int64_t n = width - i < VL ? width - i : VL;
        if (job->gated) {
            vf gate = vf_read(job->x, r * 2 * width + i, n, dtype);
            vf up = vf_read(job->x, r * 2 * width + width + i, n, dtype);
            vf_write(job->y, r * width + i, n, dtype, activated(gate, function) * up);
        } else {
            vf value = vf_read(job->x, r * width + i, n, dtype);
            if (job->bias) value += vf_read(job->bias, i, n, job->bias_dtype);
            vf_write(job->y, r * width + i, n, dtype, activated(value, function));
        }
    }
}

INLINE void row_by_function(const Activation *job, int64_t r, int dtype) {
    if (job->function == SILU) row(job, r, dtype, SILU);
    else if (job->function == GELU_TANH) row(job, r, dtype, GELU_TANH);
    else if (job->function == GELU) row(job, r, dtype, GELU);
    else if (job->function == QUICK_GELU) row(job, r, dtype, QUICK_GELU);
    else row(job, r, dtype, RELU);
}

static void strip_chunk(const void *argument, int64_t chunk) {
    const Activation *job = argument;
    int64_t end = (chunk + 1) * job->strip < job->rows ? (chunk + 1) * job->strip : job->rows;
    for (int64_t r = chunk * job->strip; r < end; r++) {
        if (job->dtype == BFLOAT16) row_by_function(job, r, BFLOAT16);
        else if (job->dtype == FLOAT16) row_by_function(job, r, FLOAT16);
        else row_by_function(job, r, FLOAT32);
    }
}

/* gate_up, y; rows, width; dtype, function; threads. */
int64_t tandem_gated_activation(const Arg *a) {
    Activation job = {a[0].p, NULL, a[1].p, a[2].i, a[3].i, strip_of(a[3].i), (int)a[4].i, 0, (int)a[5].i, 1};
    team_run(a[6].i, (job.rows + job.strip - 1) / job.strip, strip_chunk, &job);
    return 0;
}

/* x, bias or NULL, y; rows, width; dtype, the bias's, function; threads. */
int64_t tandem_activation(const Arg *a) {
    Activation job = {a[0].p, a[1].p, a[2].p, a[3].i, a[4].i, strip_of(a[4].i), (int)a[5].i, (int)a[6].i, (int)a[7].i, 0};
    team_run(a[8].i, (job.rows + job.strip - 1) / job.strip, strip_chunk, &job);
    return 0;
}

/* The exponential alone, for the test of its accuracy: x, y; count. */
int64_t tandem_exp(const Arg *a) {
    const float *x = a[0].p;
    float *y = a[1].p;
    for (int64_t i = 0; i < a[2].i; i += VL) {
        vf value = {0};
        size_t bytes = (size_t)(a[2].i - i < VL ? a[2].i - i : VL) * sizeof(float);
        memcpy(&value, x + i, bytes);
        value = vf_exp(value);
        memcpy(y + i, &value, bytes);
    }
    return 0;
}
