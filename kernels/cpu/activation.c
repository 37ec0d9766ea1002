/* y = f(gate) * up, with gate and up the two halves of each row. Both functions are gate * sigmoid(z):
 * silu has z = gate; gelu_tanh has z = 2 sqrt(2/pi) (gate + 0.044715 gate^3), because (1 + tanh(u)) / 2 = sigmoid(2u). */
#include "simd.h"

enum { SILU = 0, GELU_TANH = 1 };

INLINE v8 sigmoid(v8 z) {
#if VL == 16
    vf wide = {0};
    memcpy(&wide, &z, sizeof z);
    wide = vf_exp(-wide);
    v8 e;
    memcpy(&e, &wide, sizeof e);
#else
    v8 e = (v8)vf_exp((vf)-z);
#endif
    return 1.0f / (1.0f + e);
}

INLINE void row(const void *gate_up, void *y, int64_t r, int64_t width, int dtype, int function) {
    for (int64_t i = 0; i < width; i += 8) {
        int64_t n = width - i < 8 ? width - i : 8;
        v8 gate = read8(gate_up, r * 2 * width + i, n, dtype);
        v8 up = read8(gate_up, r * 2 * width + width + i, n, dtype);
        v8 z = gate;
        if (function == GELU_TANH) z = 1.5957691216057308f * (gate + 0.044715f * (gate * gate * gate));
        write8(y, r * width + i, n, dtype, gate * sigmoid(z) * up);
    }
}

int64_t tandem_gated_activation(const void *gate_up, void *y, int64_t rows, int64_t width, int64_t dtype, int64_t function,
                             int64_t threads) {
    int team = rows * width < 32768 ? 1 : (int)threads;
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (int64_t r = 0; r < rows; r++) {
        if (dtype == BFLOAT16 && function == SILU) row(gate_up, y, r, width, BFLOAT16, SILU);
        else if (dtype == BFLOAT16) row(gate_up, y, r, width, BFLOAT16, GELU_TANH);
        else if (function == SILU) row(gate_up, y, r, width, FLOAT32, SILU);
        else row(gate_up, y, r, width, FLOAT32, GELU_TANH);
    }
    return 0;
}

/* The exponential alone, for the test of its accuracy. */
int64_t tandem_exp(const float *x, float *y, int64_t count) {
    for (int64_t i = 0; i < count; i += VL) {
        vf value = {0};
        size_t bytes = (size_t)(count - i < VL ? count - i : VL) * sizeof(float);
        memcpy(&value, x + i, bytes);
        value = vf_exp(value);
        memcpy(y + i, &value, bytes);
    }
    return 0;
}
