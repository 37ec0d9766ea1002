/* y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, optionally after new_residual = x + residual.
 * The sum of squares runs in LANES lanes, so a row's bits depend only on the row. */
#include "simd.h"

INLINE void row(const void *x, const void *residual, const void *weight, void *y, void *residual_out, int64_t start,
                int64_t width, float eps, int dtype, int weight_dtype) {
    v8 sums[2] = {{0}, {0}};
    for (int64_t i = 0; i < width; i += 8) {
        int64_t n = width - i < 8 ? width - i : 8;
        v8 value = read8(x, start + i, n, dtype);
        if (residual) {
            value += read8(residual, start + i, n, dtype);
            if (dtype == BFLOAT16) value = bf16_widen(bf16_round(value)); /* the norm sees what the stream carries on */
            write8(residual_out, start + i, n, dtype, value);
        }
        sums[(i / 8) & 1] += value * value;
    }
    float inverse = 1.0f / sqrtf(sum_lanes((const float *)sums) / (float)width + eps);
    const void *source = residual ? residual_out : x;
    for (int64_t i = 0; i < width; i += 8) {
        int64_t n = width - i < 8 ? width - i : 8;
        v8 scaled = read8(source, start + i, n, dtype) * inverse * read8(weight, i, n, weight_dtype);
        write8(y, start + i, n, dtype, scaled);
    }
}

int64_t tandem_rms_norm(const void *x, const void *residual, const void *weight, void *y, void *residual_out, int64_t rows,
                     int64_t width, double eps, int64_t dtype, int64_t weight_dtype, int64_t threads) {
    int team = rows * width < 65536 ? 1 : (int)threads;
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (int64_t r = 0; r < rows; r++) {
        if (dtype == BFLOAT16)
            row(x, residual, weight, y, residual_out, r * width, width, (float)eps, BFLOAT16, (int)weight_dtype);
        else
            row(x, residual, weight, y, residual_out, r * width, width, (float)eps, FLOAT32, (int)weight_dtype);
    }
    return 0;
}
