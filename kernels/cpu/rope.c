/* Splits a fused qkv row into heads, optionally RMS-normalises each q and k head, rotates q and k by their position
 * (rotate-half), and writes k and v into the paged cache and q into its own buffer. */
#include "simd.h"

typedef struct {
    const void *weight; /* [head_dim] or NULL: no norm */
    int dtype;
    float eps;
} HeadNorm;

/* One head: x (head_dim elements at start) -> y. cos and sin are [rotary/2] float32; dimensions from rotary on pass through. */
INLINE void head(const void *x, int64_t start, void *y, int64_t y_start, int64_t head_dim, int64_t rotary,
                 const float *cosine, const float *sine, HeadNorm norm, int dtype) {
    float inverse = 1.0f;
    if (norm.weight) {
        v8 sums[2] = {{0}, {0}};
        for (int64_t i = 0; i < head_dim; i += 8) {
            v8 value = read8(x, start + i, 8, dtype);
            sums[(i / 8) & 1] += value * value;
        }
        inverse = 1.0f / sqrtf(sum_lanes((const float *)sums) / (float)head_dim + norm.eps);
    }
    int64_t half = rotary / 2;
    for (int64_t i = 0; i < half; i += 8) {
        int64_t n = half - i < 8 ? half - i : 8;
        v8 low = read8(x, start + i, n, dtype), high = read8(x, start + half + i, n, dtype);
        if (norm.weight) {
            low = low * inverse * read8(norm.weight, i, n, norm.dtype);
            high = high * inverse * read8(norm.weight, half + i, n, norm.dtype);
        }
        v8 c = read8(cosine, i, n, FLOAT32), s = read8(sine, i, n, FLOAT32);
        write8(y, y_start + i, n, dtype, low * c - high * s);
        write8(y, y_start + half + i, n, dtype, high * c + low * s);
    }
    for (int64_t i = rotary; i < head_dim; i += 8) {
        int64_t n = head_dim - i < 8 ? head_dim - i : 8;
        v8 value = read8(x, start + i, n, dtype);
        if (norm.weight) value = value * inverse * read8(norm.weight, i, n, norm.dtype);
        write8(y, y_start + i, n, dtype, value);
    }
}

INLINE void token(const void *qkv, const float *cos_sin, int64_t position, int64_t slot, int64_t t, void *q, void *k_cache,
                  void *v_cache, const int64_t k_strides[3], const int64_t v_strides[3], int64_t num_heads,
                  int64_t num_kv_heads, int64_t head_dim, int64_t rotary, int64_t block_tokens, HeadNorm q_norm,
                  HeadNorm k_norm, int dtype) {
    const float *cosine = cos_sin + position * rotary, *sine = cosine + rotary / 2;
    int64_t start = t * (num_heads + 2 * num_kv_heads) * head_dim;
    int64_t block = slot / block_tokens, offset = slot % block_tokens;
    for (int64_t h = 0; h < num_heads; h++, start += head_dim)
        head(qkv, start, q, (t * num_heads + h) * head_dim, head_dim, rotary, cosine, sine, q_norm, dtype);
    for (int64_t h = 0; h < num_kv_heads; h++, start += head_dim)
        head(qkv, start, k_cache, block * k_strides[0] + h * k_strides[1] + offset * k_strides[2], head_dim, rotary, cosine,
             sine, k_norm, dtype);
    for (int64_t h = 0; h < num_kv_heads; h++, start += head_dim)
        memcpy((void *)at(v_cache, block * v_strides[0] + h * v_strides[1] + offset * v_strides[2], dtype),
               at(qkv, start, dtype), (size_t)(head_dim * bytes_of(dtype)));
}

/* Returns 0, or 1 + the first token whose position or slot is out of range (nothing is written then). */
int64_t tandem_rope_and_cache(const void *qkv, const float *cos_sin, const int32_t *positions, const int64_t *slots, void *q,
                              void *k_cache, void *v_cache, int64_t k_block, int64_t k_head, int64_t k_token,
                              int64_t v_block, int64_t v_head, int64_t v_token, int64_t tokens, int64_t num_heads,
                              int64_t num_kv_heads, int64_t head_dim, int64_t rotary, int64_t max_positions,
                              int64_t num_blocks, int64_t block_tokens, const void *q_weight, const void *k_weight,
                              double eps, int64_t norm_dtype, int64_t dtype, int64_t threads) {
    for (int64_t t = 0; t < tokens; t++)
        if (positions[t] < 0 || positions[t] >= max_positions || slots[t] < 0 || slots[t] >= num_blocks * block_tokens)
            return t + 1;
    const int64_t k_strides[3] = {k_block, k_head, k_token}, v_strides[3] = {v_block, v_head, v_token};
    HeadNorm q_norm = {q_weight, (int)norm_dtype, (float)eps}, k_norm = {k_weight, (int)norm_dtype, (float)eps};
    int team = tokens * (num_heads + 2 * num_kv_heads) * head_dim < 65536 ? 1 : (int)threads;
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (int64_t t = 0; t < tokens; t++) {
        if (dtype == BFLOAT16)
            token(qkv, cos_sin, positions[t], slots[t], t, q, k_cache, v_cache, k_strides, v_strides, num_heads,
                  num_kv_heads, head_dim, rotary, block_tokens, q_norm, k_norm, BFLOAT16);
        else
            token(qkv, cos_sin, positions[t], slots[t], t, q, k_cache, v_cache, k_strides, v_strides, num_heads,
                  num_kv_heads, head_dim, rotary, block_tokens, q_norm, k_norm, FLOAT32);
    }
    return 0;
}
