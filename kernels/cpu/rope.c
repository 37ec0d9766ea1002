/* Splits a fused qkv row into heads, optionally RMS-normalises each q and k head, rotates q and k by their position
 * (rotate-half, or neighbours), and writes k and v into the paged cache and q into its own buffer. A quantized cache gets what
 * a plain one would have got, quantized. */
#include "kv_format.h"
#include "team.h"

typedef int32_t i32x8 __attribute__((vector_size(32)));

typedef struct {
    const void *weight; /* [head_dim] or NULL: no norm */
    int dtype;
    float eps;
} HeadNorm;

/* The n (1 to 8) pairs from i on of the rotated dimensions, which begin at base[start]: (i, half + i), or (2i, 2i + 1) where
 * interleaved. And back. */
INLINE void read_pairs(
    const void *base, int64_t start, int64_t i, int64_t n, int64_t half, int dtype, int interleaved, v8 *low, v8 *high
) {
    if (interleaved) {
        v8 first = read8(base, start + 2 * i, n < 4 ? 2 * n : 8, dtype), second = {0};
        if (n > 4) second = read8(base, start + 2 * i + 8, 2 * n - 8, dtype);
        *low = __builtin_shuffle(first, second, (i32x8){0, 2, 4, 6, 8, 10, 12, 14});
        *high = __builtin_shuffle(first, second, (i32x8){1, 3, 5, 7, 9, 11, 13, 15});
    } else {
        *low = read8(base, start + i, n, dtype);
        *high = read8(base, start + half + i, n, dtype);
    }
}

INLINE void write_pairs(
    void *base, int64_t start, int64_t i, int64_t n, int64_t half, int dtype, int interleaved, v8 low, v8 high
) {
    if (interleaved) {
        write8(base, start + 2 * i, n < 4 ? 2 * n : 8, dtype, __builtin_shuffle(low, high, (i32x8){0, 8, 1, 9, 2, 10, 3, 11}));
        if (n > 4)
            write8(base, start + 2 * i + 8, 2 * n - 8, dtype, __builtin_shuffle(low, high, (i32x8){4, 12, 5, 13, 6, 14, 7, 15}));
    } else {
        write8(base, start + i, n, dtype, low);
        write8(base, start + half + i, n, dtype, high);
    }
}

/* One head: x (head_dim elements at start) -> y. cos and sin are [rotary/2] float32; dimensions from rotary on pass through. */
INLINE void head(const void *x, int64_t start, void *y, int64_t y_start, int64_t head_dim, int64_t rotary,
                 const float *cosine, const float *sine, HeadNorm norm, int dtype, int interleaved) {
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
        v8 low, high;
        read_pairs(x, start, i, n, half, dtype, interleaved, &low, &high);
        if (norm.weight) {
            v8 low_weight, high_weight;
            read_pairs(norm.weight, 0, i, n, half, norm.dtype, interleaved, &low_weight, &high_weight);
            low = low * inverse * low_weight;
            high = high * inverse * high_weight;
        }
        v8 c = read8(cosine, i, n, FLOAT32), s = read8(sine, i, n, FLOAT32);
        write_pairs(y, y_start, i, n, half, dtype, interleaved, low * c - high * s, high * c + low * s);
    }
    for (int64_t i = rotary; i < head_dim; i += 8) {
        int64_t n = head_dim - i < 8 ? head_dim - i : 8;
        v8 value = read8(x, start + i, n, dtype);
        if (norm.weight) value = value * inverse * read8(norm.weight, i, n, norm.dtype);
        write8(y, y_start + i, n, dtype, value);
    }
}

typedef struct {
    const void *qkv;
    const float *cos_sin;
    const int32_t *positions;
    const int64_t *slots;
    void *q, *k_cache, *v_cache;
    int64_t k_strides[3], v_strides[3]; /* of blocks, heads, tokens */
    int64_t tokens, num_heads, num_kv_heads, head_dim, rotary, block_tokens, strip;
    HeadNorm q_norm, k_norm;
    int dtype, interleaved;
    int kept; /* what the cache's elements are: dtype, INT8 or FP8 */
    float *k_scales, *v_scales;
    int64_t k_scale_strides[3], v_scale_strides[3]; /* as k_strides */
} Rope;

INLINE void write_row(const Rope *job, const void *row, int dtype, void *cache, int64_t element, float *scale) {
    char *elements = (char *)cache + element;
    *scale = job->kept == INT8 ? quantize_row(row, job->head_dim, dtype, elements, INT8)
                               : quantize_row(row, job->head_dim, dtype, elements, FP8);
}

INLINE void token(const Rope *job, int64_t t, int dtype, int interleaved, int quantizes) {
    int64_t head_dim = job->head_dim, rotary = job->rotary;
    const float *cosine = job->cos_sin + job->positions[t] * rotary, *sine = cosine + rotary / 2;
    int64_t start = t * (job->num_heads + 2 * job->num_kv_heads) * head_dim;
    int64_t block = job->slots[t] / job->block_tokens, offset = job->slots[t] % job->block_tokens;
    for (int64_t h = 0; h < job->num_heads; h++, start += head_dim)
        head(job->qkv, start, job->q, (t * job->num_heads + h) * head_dim, head_dim, rotary, cosine, sine, job->q_norm, dtype,
             interleaved);
    const int64_t *k = job->k_strides, *v = job->v_strides;
    if (quantizes) {
        const int64_t *ks = job->k_scale_strides, *vs = job->v_scale_strides;
        float row[head_dim]; /* room for any dtype */
        for (int64_t h = 0; h < job->num_kv_heads; h++, start += head_dim) {
            head(job->qkv, start, row, 0, head_dim, rotary, cosine, sine, job->k_norm, dtype, interleaved);
            write_row(job, row, dtype, job->k_cache, block * k[0] + h * k[1] + offset * k[2],
                      job->k_scales + block * ks[0] + h * ks[1] + offset * ks[2]);
        }
        for (int64_t h = 0; h < job->num_kv_heads; h++, start += head_dim)
            write_row(job, at(job->qkv, start, dtype), dtype, job->v_cache, block * v[0] + h * v[1] + offset * v[2],
                      job->v_scales + block * vs[0] + h * vs[1] + offset * vs[2]);
        return;
    }
    for (int64_t h = 0; h < job->num_kv_heads; h++, start += head_dim)
        head(job->qkv, start, job->k_cache, block * k[0] + h * k[1] + offset * k[2], head_dim, rotary, cosine, sine, job->k_norm, dtype,
             interleaved);
    for (int64_t h = 0; h < job->num_kv_heads; h++, start += head_dim)
        memcpy((void *)at(job->v_cache, block * v[0] + h * v[1] + offset * v[2], dtype), at(job->qkv, start, dtype),
               (size_t)(head_dim * bytes_of(dtype)));
}

INLINE void token_by_form(const Rope *job, int64_t t, int dtype) {
    if (quantized(job->kept)) token(job, t, dtype, 0, 1);
    else token(job, t, dtype, 0, 0);
}

static void strip_chunk(const void *argument, int64_t chunk) {
    const Rope *job = argument;
    int64_t end = (chunk + 1) * job->strip < job->tokens ? (chunk + 1) * job->strip : job->tokens;
    for (int64_t t = chunk * job->strip; t < end; t++) {
        if (job->interleaved) token(job, t, job->dtype, 1, quantized(job->kept));
        else if (job->dtype == BFLOAT16) token_by_form(job, t, BFLOAT16);
        else if (job->dtype == FLOAT16) token_by_form(job, t, FLOAT16);
        else token_by_form(job, t, FLOAT32);
    }
}

/* qkv, cos_sin, positions, slots, q, k_cache, v_cache; strides of both caches; tokens, num_heads, num_kv_heads, head_dim,
 * rotary, max_positions, num_blocks, block_tokens; q_norm and k_norm or NULL; eps; dtypes of the norms and the rest;
 * interleaved; threads; what the cache's elements are kept as; scales of keys and values or NULL, and their strides. Returns 0, or 1 + the first token whose position or slot is out of range (nothing is written then). */
int64_t tandem_rope_and_cache(const Arg *a) {
    const int32_t *positions = a[2].p;
    const int64_t *slots = a[3].p;
    int64_t tokens = a[13].i, max_positions = a[18].i, num_slots = a[19].i * a[20].i;
    for (int64_t t = 0; t < tokens; t++)
        if (positions[t] < 0 || positions[t] >= max_positions || slots[t] < 0 || slots[t] >= num_slots) return t + 1;
    float eps = (float)a[23].d;
    Rope job = {
        a[0].p, a[1].p, positions, slots, a[4].p, a[5].p, a[6].p, {a[7].i, a[8].i, a[9].i}, {a[10].i, a[11].i, a[12].i},
        tokens, a[14].i, a[15].i, a[16].i, a[17].i, a[20].i, strip_of((a[14].i + 2 * a[15].i) * a[16].i),
        {a[21].p, (int)a[24].i, eps}, {a[22].p, (int)a[24].i, eps}, (int)a[25].i, (int)a[26].i,
        (int)a[28].i, a[29].p, a[30].p, {a[31].i, a[32].i, a[33].i}, {a[34].i, a[35].i, a[36].i},
    };
    team_run(a[27].i, (tokens + job.strip - 1) / job.strip, strip_chunk, &job);
    return 0;
}
