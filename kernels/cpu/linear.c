/* y = x W^T + bias for a few rows of bfloat16, the weight read once and as bfloat16: half the bytes of a float32 copy.
 *
 * The sums are oneDNN's float32 ones to the bit, so that a row may be computed here or there: products are added with fused
 * multiply-adds in order of the input feature, in BLOCKs of features whose sums are added in order, then the bias.
 * kernels/linear.py compares the two for every weight, and uses this one only where they agree.
 */
#include "simd.h"

enum {
    WIDTH = 32,   /* output features side by side in the packed weight */
    BLOCK = 1024, /* input features summed from zero */
    ROWS = 2,     /* rows held in registers together */
    VECTORS = WIDTH / 8,
};

#if defined(__AVX2__) && defined(__FMA__)
INLINE v8 v8_fma(v8 a, v8 b, v8 c) { return (v8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
INLINE v8 v8_fma(v8 a, v8 b, v8 c) {
    for (int i = 0; i < 8; i++) c[i] = fmaf(a[i], b[i], c[i]);
    return c;
}
#endif

INLINE float widen_one(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* `rows` rows of x [rows, in] times one panel w [in][WIDTH]; `count` of its columns exist. */
INLINE void panel(int rows, const uint16_t *x, const uint16_t *w, const float *bias, uint16_t *y, int64_t in, int64_t out,
                  int64_t count) {
    v8 total[ROWS][VECTORS] = {{{0}}};
    for (int64_t start = 0; start < in; start += BLOCK) {
        int64_t end = start + BLOCK < in ? start + BLOCK : in;
        v8 part[ROWS][VECTORS] = {{{0}}};
        for (int64_t k = start; k < end; k++) {
            v8 weight[VECTORS];
            for (int i = 0; i < VECTORS; i++) {
                u8x16 half;
                memcpy(&half, w + k * WIDTH + 8 * i, sizeof half);
                weight[i] = bf16_widen(half);
            }
            for (int r = 0; r < rows; r++) {
                v8 value = v8_set1(widen_one(x[r * in + k]));
                for (int i = 0; i < VECTORS; i++) part[r][i] = v8_fma(value, weight[i], part[r][i]);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < VECTORS; i++) total[r][i] = start ? total[r][i] + part[r][i] : part[r][i];
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < VECTORS && 8 * i < count; i++) {
            int64_t n = count - 8 * i < 8 ? count - 8 * i : 8;
            v8 sum = bias ? total[r][i] + read8(bias, 8 * i, n, FLOAT32) : total[r][i];
            write8(y, r * out + 8 * i, n, BFLOAT16, sum);
        }
}

/* x [rows, in], w [ceil(out / WIDTH)][in][WIDTH] and y [rows, out] bfloat16; bias [out] float32 or NULL. */
int64_t tandem_linear_rows(const uint16_t *x, const uint16_t *w, const float *bias, uint16_t *y, int64_t rows, int64_t in,
                           int64_t out, int64_t threads) {
    int64_t panels = (out + WIDTH - 1) / WIDTH;
    int team = in * out < 65536 ? 1 : (int)threads;
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (int64_t p = 0; p < panels; p++) {
        int64_t first = p * WIDTH, count = out - first < WIDTH ? out - first : WIDTH;
        const uint16_t *weight = w + p * in * WIDTH;
        const float *offset = bias ? bias + first : NULL;
        int64_t r = 0;
        for (; r + 2 <= rows; r += 2) panel(2, x + r * in, weight, offset, y + r * out + first, in, out, count);
        if (r < rows) panel(1, x + r * in, weight, offset, y + r * out + first, in, out, count);
    }
    return 0;
}
