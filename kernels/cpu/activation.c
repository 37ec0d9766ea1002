/* y = f(gate) * up, with gate and up the two halves of each row. Both functions are gate * sigmoid(z):
 * silu has z = gate; gelu_tanh has z = 2 sqrt(2/pi) (gate + 0.044715 gate^3), because (1 + tanh(u)) / 2 = sigmoid(2u). */
#include "simd.h"
#include "team.h"

enum { SILU = 0, GELU_TANH = 1 };

INLINE vf sigmoid(vf z) { return 1.0f / (1.0f + vf_exp(-z)); }

INLINE void row(const void *gate_up, void *y, int64_t r, int64_t width, int dtype, int function) {
    for (int64_t i = 0; i < width; i += VL) {
        int64_t n = width - i < VL ? width - i : VL;
        vf gate = vf_read(gate_up, r * 2 * width + i, n, dtype);
        vf up = vf_read(gate_up, r * 2 * width + width + i, n, dtype);
        vf z = gate;
        if (function == GELU_TANH) z = 1.5957691216057308f * (gate + 0.044715f * (gate * gate * gate));
        vf_write(y, r * width + i, n, dtype, gate * sigmoid(z) * up);
    }
}

typedef struct {
    const void *gate_up;
    void *y;
    int64_t rows, width, strip;
    int dtype, function;
} Activation;

static void strip_chunk(const void *argument, int64_t chunk) {
    const Activation *job = argument;
    int64_t end = (chunk + 1) * job->strip < job->rows ? (chunk + 1) * job->strip : job->rows;
    for (int64_t r = chunk * job->strip; r < end; r++) {
        if (job->dtype == BFLOAT16 && job->function == SILU) row(job->gate_up, job->y, r, job->width, BFLOAT16, SILU);
        else if (job->dtype == BFLOAT16) row(job->gate_up, job->y, r, job->width, BFLOAT16, GELU_TANH);
        else if (job->function == SILU) row(job->gate_up, job->y, r, job->width, FLOAT32, SILU);
        else row(job->gate_up, job->y, r, job->width, FLOAT32, GELU_TANH);
    }
}

/* gate_up, y; rows, width; dtype, function; threads. */
int64_t tandem_gated_activation(const Arg *a) {
    Activation job = {a[0].p, a[1].p, a[2].i, a[3].i, strip_of(a[3].i), (int)a[4].i, (int)a[5].i};
    team_run(a[6].i, (job.rows + job.strip - 1) / job.strip, strip_chunk, &job);
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
