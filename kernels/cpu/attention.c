/* Paged attention over a block table: ragged prefill, prefill after a cached prefix, and decode are one algorithm.
 *
 * A row is one (token, head). Its keys are cut at absolute positions into SPLITs of TILEs, whatever call it is part of:
 *   per tile    s = q k^T * scale;  m' = max(m, max s);  p = e^(s - m');  l = l e^(m - m') + sum p;  o = o e^(m - m') + p v
 *   per split   an own (m, l, o), merged into the row's total in order of position
 *   at the end  o / l
 * Lanes run over keys for q k^T and over dimensions for p v, and the sums over dimensions and over keys go in order, so the
 * operations of a row are the same ones however many rows share a tile in registers and however many threads run.
 *
 * On a CPU with AVX-512 BF16 both products of bfloat16 caches are dot products of pairs, of dimensions and of keys, as in
 * linear_pairs.c. Weights p are then rounded to bfloat16, in the sum l too, and a key that a row does not see weighs 0.
 *
 * Elements of a quantized cache are multiplied as they are; the scale of a key is a factor of its score, that of a value of
 * its weight, though not in the sum l.
 *
 * Scores that are bent, by a cap or by slopes, are so between both steps of a tile, in a pass of their own: others do not
 * pay for it.
 */
#include "kv_format.h"
#include "team.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

enum {
    TILE = 64,    /* keys packed at a time; positions [TILE * i, TILE * i + TILE) */
    SPLIT = 512,  /* keys per partial result: what threads may share out within one row */
    ROWS = 48,    /* rows that share one packed tile */
    GROUP = 6,    /* rows held in registers together */
    VECTORS = TILE / VL,
    STRIP_WORK = 400000, /* multiply-adds that a thread takes at a time at least, where there are enough */
    MAX_HEAD_DIM = 512, /* a thread's tiles lie on its stack */
};

typedef struct {
    const void *q, *k_cache, *v_cache;
    void *out;
    const int32_t *cu_seqlens, *context_lens, *block_tables;
    int64_t table_stride, k_block, k_head, k_token, v_block, v_head, v_token;
    int64_t num_heads, num_kv_heads, head_dim, block_tokens, window; /* window 0: unlimited */
    float scale, cap;    /* cap 0: none */
    const float *slopes; /* of heads, or NULL */
    int causal;          /* or each row sees all keys of its sequence */
    int dtype, kept; /* what the cache's elements are: dtype, INT8 or FP8 */
    const float *k_scales, *v_scales;
    int64_t k_scale_strides[3], v_scale_strides[3]; /* of blocks, heads, tokens */
} Call;

/* What one thread takes at a time: tokens x heads that share one kv head of one sequence, for each of some kv heads. Of a kv
 * head, row r is token r / num_heads. */
typedef struct {
    int32_t sequence, kv_head, num_kv_heads, first_head, num_heads, first_token, num_tokens;
    int64_t first_position; /* absolute position of first_token */
    int64_t begin, end;     /* keys that any of its rows sees; all of the sequence's where not causal */
    int64_t first_partial;
} Item;

typedef struct {
    float *o, *m, *l; /* [rows, padded_dim], [rows], [rows] */
} State;

typedef struct {
    const char *k[TILE], *v[TILE];
} Rows; /* where the keys and values of a tile lie */

/* The tile that comes next: where its keys and values of the item's first kv head lie, and what of it is fetched. */
typedef struct {
    Rows rows;
    int64_t first, last;                 /* keys within the tile */
    int64_t heads, k_stride, v_stride;   /* bytes from one kv head to the next */
    int64_t row_bytes, step;
    int many; /* rows share a tile: it is in the second cache already, or worth the wait */
} Next;

typedef struct {
    float *q;      /* groups of [head_dim][rows of the group], scaled; or of pairs, and not scaled */
    float *keys;   /* [head_dim][TILE]; or pairs: [head_dim / 2][TILE] */
    float *values; /* [TILE][padded_dim], unused where the cache can be read in place; or pairs: [TILE / 2][padded_dim] */
    float *scores; /* [ROWS][TILE] */
    int32_t *weights; /* of pairs: [ROWS][TILE / 2] */
    State total, part;
    Rows rows;         /* of this tile */
    float *k_scales, *v_scales; /* [TILE], of a quantized cache */
    Next *next;
    const Item *after; /* what this thread takes next, or NULL */
} Scratch;

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t padded(int64_t dim) { return (dim + VL - 1) / VL * VL; }
INLINE int64_t rows_of(const Item *item) { return (int64_t)item->num_tokens * item->num_heads; }
INLINE int64_t row_end(const Call *call, const Item *item, int64_t r) {
    return call->causal ? item->first_position + r / item->num_heads + 1 : item->end;
}
INLINE int64_t row_begin(const Call *call, const Item *item, int64_t r) {
    return call->window ? larger(0, row_end(call, item, r) - call->window) : 0;
}

static inline float exp_one(float x) { return vf_exp(vf_set1(x))[0]; }

/* scores[r][VL * first ...] for `rows` rows and `vectors` vectors of keys; the sum over dimensions goes in order. */
INLINE void score_block(int rows, int vectors, int64_t head_dim, const float *q, const float *keys, float *scores) {
    vf acc[GROUP][8];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < vectors; i++) acc[r][i] = vf_set1(0.0f);
    for (int64_t d = 0; d < head_dim; d++) {
        vf key[8];
#pragma GCC unroll 8
        for (int i = 0; i < vectors; i++) key[i] = vf_load(keys + d * TILE + i * VL);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            vf value = vf_set1(q[d * rows + r]);
#pragma GCC unroll 8
            for (int i = 0; i < vectors; i++) acc[r][i] = vf_fma(value, key[i], acc[r][i]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < vectors; i++) vf_store(scores + r * TILE + i * VL, acc[r][i]);
}

/* o[r] += sum over keys j in [begin, end), in order, of p[r][j] * v[j], for `vectors` vectors of dimensions. */
INLINE void value_block(int rows, int vectors, int64_t begin, int64_t end, const float *p, const char *const *v_rows,
                        int64_t column, float *o, int64_t o_stride) {
    vf acc[GROUP][8];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < vectors; i++) acc[r][i] = vf_load(o + r * o_stride + column + i * VL);
    for (int64_t j = begin; j < end; j++) {
        const float *v = (const float *)v_rows[j] + column;
        vf value[8];
#pragma GCC unroll 8
        for (int i = 0; i < vectors; i++) value[i] = vf_load(v + i * VL);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            vf weight = vf_set1(p[r * TILE + j]);
#pragma GCC unroll 8
            for (int i = 0; i < vectors; i++) acc[r][i] = vf_fma(weight, value[i], acc[r][i]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < vectors; i++) vf_store(o + r * o_stride + column + i * VL, acc[r][i]);
}

/* How many vectors stay in registers beside `rows` rows: 16 registers with 8 lanes, 32 with 16. */
INLINE int widest(int rows) { return rows == 1 ? 8 : rows <= 3 || VL == 16 ? 4 : 2; }

INLINE void score_rows(int rows, int64_t first, int64_t last, int64_t head_dim, const float *q, const float *keys, float *scores) {
    int64_t i = first;
    if (widest(rows) >= 8)
        for (; i + 8 <= last; i += 8) score_block(rows, 8, head_dim, q, keys + i * VL, scores + i * VL);
    if (widest(rows) >= 4)
        for (; i + 4 <= last; i += 4) score_block(rows, 4, head_dim, q, keys + i * VL, scores + i * VL);
    for (; i + 2 <= last; i += 2) score_block(rows, 2, head_dim, q, keys + i * VL, scores + i * VL);
    for (; i < last; i++) score_block(rows, 1, head_dim, q, keys + i * VL, scores + i * VL);
}

INLINE void value_rows(int rows, int64_t begin, int64_t end, const float *p, const char *const *v_rows, int64_t padded_dim, float *o) {
    int64_t i = 0, last = padded_dim / VL;
    if (begin >= end) return;
    if (widest(rows) >= 8)
        for (; i + 8 <= last; i += 8) value_block(rows, 8, begin, end, p, v_rows, i * VL, o, padded_dim);
    if (widest(rows) >= 4)
        for (; i + 4 <= last; i += 4) value_block(rows, 4, begin, end, p, v_rows, i * VL, o, padded_dim);
    for (; i + 2 <= last; i += 2) value_block(rows, 2, begin, end, p, v_rows, i * VL, o, padded_dim);
    for (; i < last; i++) value_block(rows, 1, begin, end, p, v_rows, i * VL, o, padded_dim);
}

static void scores_of(int rows, int64_t first, int64_t last, int64_t head_dim, const float *q, const float *keys, float *scores) {
    switch (rows) {
    case 1: score_rows(1, first, last, head_dim, q, keys, scores); break;
    case 2: score_rows(2, first, last, head_dim, q, keys, scores); break;
    case 3: score_rows(3, first, last, head_dim, q, keys, scores); break;
    case 4: score_rows(4, first, last, head_dim, q, keys, scores); break;
    case 5: score_rows(5, first, last, head_dim, q, keys, scores); break;
    default: score_rows(6, first, last, head_dim, q, keys, scores);
    }
}

static void values_of(int rows, int64_t begin, int64_t end, const float *p, const char *const *v_rows, int64_t padded_dim, float *o) {
    switch (rows) {
    case 1: value_rows(1, begin, end, p, v_rows, padded_dim, o); break;
    case 2: value_rows(2, begin, end, p, v_rows, padded_dim, o); break;
    case 3: value_rows(3, begin, end, p, v_rows, padded_dim, o); break;
    case 4: value_rows(4, begin, end, p, v_rows, padded_dim, o); break;
    case 5: value_rows(5, begin, end, p, v_rows, padded_dim, o); break;
    default: value_rows(6, begin, end, p, v_rows, padded_dim, o);
    }
}

/* Where the keys and values of positions [tile + begin, tile + end) of a kv head lie. */
static void locate(const Call *call, const Item *item, int64_t kv_head, int64_t tile, int64_t begin, int64_t end, Rows *rows) {
    const int32_t *table = call->block_tables + item->sequence * call->table_stride;
    int64_t bytes = element_bytes(call->kept), entry = (tile + begin) / call->block_tokens;
    if (call->block_tokens == 1) { /* rows of an activation */
        const char *k = (const char *)call->k_cache + bytes * kv_head * call->k_head;
        const char *v = (const char *)call->v_cache + bytes * kv_head * call->v_head;
        for (int64_t j = begin; j < end; j++) {
            rows->k[j] = k + bytes * call->k_block * table[tile + j];
            rows->v[j] = v + bytes * call->v_block * table[tile + j];
        }
        return;
    }
    for (int64_t j = begin; j < end; entry++) {
        int64_t offset = tile + j - entry * call->block_tokens;
        int64_t stop = smaller(end, j + call->block_tokens - offset), block = table[entry];
        const char *k = (const char *)call->k_cache +
                        bytes * (block * call->k_block + kv_head * call->k_head + offset * call->k_token);
        const char *v = (const char *)call->v_cache +
                        bytes * (block * call->v_block + kv_head * call->v_head + offset * call->v_token);
        for (; j < stop; j++, k += bytes * call->k_token, v += bytes * call->v_token) {
            rows->k[j] = k;
            rows->v[j] = v;
        }
    }
}

/* Their scales. */
static void read_scales(const Call *call, const Item *item, int64_t kv_head, int64_t tile, int64_t begin, int64_t end, Scratch *own) {
    const int32_t *table = call->block_tables + item->sequence * call->table_stride;
    const int64_t *k = call->k_scale_strides, *v = call->v_scale_strides;
    for (int64_t j = begin, entry = (tile + begin) / call->block_tokens; j < end; entry++) {
        int64_t offset = tile + j - entry * call->block_tokens;
        int64_t stop = smaller(end, j + call->block_tokens - offset), block = table[entry];
        const float *key = call->k_scales + block * k[0] + kv_head * k[1] + offset * k[2];
        const float *value = call->v_scales + block * v[0] + kv_head * v[1] + offset * v[2];
        for (; j < stop; j++, key += k[2], value += v[2]) {
            own->k_scales[j] = *key;
            own->v_scales[j] = *value;
        }
    }
}

/* Fetches those of the item's kv heads: of a block and head they lie in a line or two. */
static void fetch_scales(const Call *call, const Item *item, int64_t tile, int64_t begin, int64_t end) {
    const int32_t *table = call->block_tables + item->sequence * call->table_stride;
    const int64_t *k = call->k_scale_strides, *v = call->v_scale_strides;
    for (int64_t entry = (tile + begin) / call->block_tokens; entry * call->block_tokens < tile + end; entry++) {
        int64_t offset = larger(tile + begin - entry * call->block_tokens, 0), block = table[entry];
        for (int64_t h = item->kv_head; h < item->kv_head + item->num_kv_heads; h++) {
            __builtin_prefetch(call->k_scales + block * k[0] + h * k[1] + offset * k[2]);
            __builtin_prefetch(call->v_scales + block * v[0] + h * v[1] + offset * v[2]);
        }
    }
}

static void locate_next(const Call *call, const Item *item, int64_t tile, int64_t first, int64_t last, Next *next) {
    int64_t bytes = element_bytes(call->kept);
    locate(call, item, item->kv_head, tile, first, last, &next->rows);
    if (quantized(call->kept)) fetch_scales(call, item, tile, first, last);
    next->many = rows_of(item) > GROUP;
    next->first = first, next->last = last, next->heads = item->num_kv_heads, next->step = first / 8 * next->heads;
    next->k_stride = bytes * call->k_head, next->v_stride = bytes * call->v_head, next->row_bytes = bytes * call->head_dim;
}

/* Fetches the next up to 8 keys and values of one kv head into the second cache: blocks lie anywhere in memory, so the
 * processor cannot foresee them, and the first cache waits for too few lines at once. All kv heads of a few tokens come one
 * after another, as they lie in a block: memory is quicker where it is read in one place. */
INLINE void fetch(Next *next) {
    int64_t first = next->step / next->heads * 8, head = next->step % next->heads;
    for (int64_t i = larger(first, next->first); i < smaller(first + 8, next->last); i++)
        for (int64_t byte = 0; byte < next->row_bytes; byte += 64) {
            const char *k = next->rows.k[i] + head * next->k_stride + byte, *v = next->rows.v[i] + head * next->v_stride + byte;
            if (next->many) __builtin_prefetch(k, 0, 3), __builtin_prefetch(v, 0, 3);
            else __builtin_prefetch(k, 0, 2), __builtin_prefetch(v, 0, 2);
        }
    next->step++;
}

INLINE v8 interleave(v8 a, v8 b, int step, int high) {
    /* Swaps the off-diagonal step x step squares of two rows of an 8 x 8 matrix. */
    typedef int32_t index __attribute__((vector_size(32)));
    if (step == 1)
        return high ? __builtin_shuffle(a, b, (index){1, 9, 3, 11, 5, 13, 7, 15}) : __builtin_shuffle(a, b, (index){0, 8, 2, 10, 4, 12, 6, 14});
    if (step == 2)
        return high ? __builtin_shuffle(a, b, (index){2, 3, 10, 11, 6, 7, 14, 15}) : __builtin_shuffle(a, b, (index){0, 1, 8, 9, 4, 5, 12, 13});
    return high ? __builtin_shuffle(a, b, (index){4, 5, 6, 7, 12, 13, 14, 15}) : __builtin_shuffle(a, b, (index){0, 1, 2, 3, 8, 9, 10, 11});
}

INLINE void transpose8(v8 m[8]) {
#pragma GCC unroll 3
    for (int step = 1; step < 8; step *= 2)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            if (!(i & step)) {
                v8 low = interleave(m[i], m[i + step], step, 0), high = interleave(m[i], m[i + step], step, 1);
                m[i] = low;
                m[i + step] = high;
            }
}

/* keys[d][j] = k of position tile + j, for j in [begin, end) filled up to groups of 8 with zeros. Two bfloat16 of neighbouring
 * dimensions are transposed as one 32-bit word. Meanwhile some of the next tile is fetched. */
INLINE void pack_keys(float *packed, Rows *rows, int64_t begin, int64_t end, Next *next, int64_t head_dim, int dtype) {
    static const float zeros[MAX_HEAD_DIM];
    const char **k_rows = rows->k;
    int64_t first = begin / 8 * 8, last = (end + 7) / 8 * 8;
    for (int64_t j = first; j < begin; j++) k_rows[j] = (const char *)zeros;
    for (int64_t j = end; j < last; j++) k_rows[j] = (const char *)zeros;
    for (int64_t j = first; j < last; j += 8) {
        fetch(next);
        float *keys = packed + j;
        int64_t d = 0;
        v8 block[8];
        for (; dtype == BFLOAT16 && d + 16 <= head_dim; d += 16) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) block[i] = v8_load((const float *)(k_rows[j + i] + d * 2));
            transpose8(block);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                v8_store(keys + (d + 2 * i) * TILE, (v8)((u8x32)block[i] << 16));
                v8_store(keys + (d + 2 * i + 1) * TILE, (v8)((u8x32)block[i] & 0xffff0000u));
            }
        }
        for (; d < head_dim; d += 8) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) block[i] = read8(k_rows[j + i], d, 8, dtype);
            transpose8(block);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) v8_store(keys + (d + i) * TILE, block[i]);
        }
    }
}

/* The same of a quantized cache. */
INLINE void pack_key_bytes(float *packed, Rows *rows, int64_t begin, int64_t end, Next *next, int64_t head_dim, int kept) {
    static const char zeros[MAX_HEAD_DIM];
    const char **k_rows = rows->k;
    int64_t first = begin / 8 * 8, last = (end + 7) / 8 * 8;
    for (int64_t j = first; j < begin; j++) k_rows[j] = zeros;
    for (int64_t j = end; j < last; j++) k_rows[j] = zeros;
    for (int64_t j = first; j < last; j += 8) {
        fetch(next);
        for (int64_t d = 0; d < head_dim; d += VL) {
            float wide[8][VL] __attribute__((aligned(64)));
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) vf_store(wide[i], widen_elements(k_rows[j + i] + d, head_dim - d, kept));
            for (int64_t part = 0; part < smaller(VL, head_dim - d); part += 8) {
                v8 block[8];
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) block[i] = v8_load(wide[i] + part);
                transpose8(block);
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) v8_store(packed + (d + part + i) * TILE + j, block[i]);
            }
        }
    }
}

INLINE void pack_value_bytes(float *packed, Rows *rows, int64_t begin, int64_t end, int64_t head_dim, int kept) {
    for (int64_t j = begin; j < end; j++) {
        float *row = packed + j * padded(head_dim);
        for (int64_t d = 0; d < head_dim; d += VL) vf_store(row + d, widen_elements(rows->v[j] + d, head_dim - d, kept));
        rows->v[j] = (const char *)row;
    }
}

/* values[j][:head_dim] = v of position tile + j as float32; rows->v then points here. */
INLINE void pack_values(float *packed, Rows *rows, int64_t begin, int64_t end, int64_t head_dim, int dtype) {
    for (int64_t j = begin; j < end; j++) {
        float *row = packed + j * padded(head_dim);
        for (int64_t d = 0; d < head_dim; d += 8) v8_store(row + d, read8(rows->v[j], d, 8, dtype));
        rows->v[j] = (const char *)row;
    }
}

/* One row's scores of keys [begin, end) of the tile -> weights; updates m, l and scales o. */
static void softmax_row(float *scores, int64_t begin, int64_t end, float *m, float *l, float *o, int64_t padded_dim) {
    for (int64_t j = 0; j < begin; j++) scores[j] = -INFINITY;
    for (int64_t j = end; j < TILE; j++) scores[j] = -INFINITY;
    vf top = vf_load(scores);
    for (int i = 1; i < VECTORS; i++) top = vf_max(vf_load(scores + i * VL), top);
    float highest = *m;
    for (int i = 0; i < VL; i++) highest = top[i] > highest ? top[i] : highest;
    float lanes[LANES] = {0};
    vf shift = vf_set1(highest);
    vf sums[LANES / VL];
    for (int i = 0; i < LANES / VL; i++) sums[i] = vf_set1(0.0f);
    for (int i = 0; i < VECTORS; i++) {
        vf weight = vf_exp(vf_load(scores + i * VL) - shift);
        vf_store(scores + i * VL, weight);
        sums[i % (LANES / VL)] += weight;
    }
    memcpy(lanes, sums, sizeof lanes);
    if (highest != *m) {
        float fade = exp_one(*m - highest);
        *l *= fade;
        for (int64_t d = 0; d < padded_dim; d += VL) vf_store(o + d, vf_load(o + d) * fade);
        *m = highest;
    }
    *l += sum_lanes(lanes);
}

/* scores[r][VL * first ...] *= scales, of some vectors of keys. */
static void multiply_rows(int rows, int64_t first, int64_t last, const float *scales, float *scores) {
    for (int r = 0; r < rows; r++)
        for (int64_t i = first; i < last; i++)
            vf_store(scores + r * TILE + i * VL, vf_load(scores + r * TILE + i * VL) * vf_load(scales + i * VL));
}

INLINE int bends(const Call *call) { return call->cap > 0.0f || call->slopes; }

/* Caps the scores of rows g .. g + rows of a kv head, of some vectors of keys, and then takes slope * (position - key) off
 * each. slopes: of the kv head's heads, or NULL. */
static void bend_rows(const Call *call, const Item *item, const float *slopes, int64_t g, int rows, int64_t tile, int64_t first,
                      int64_t last, float *scores) {
    float ordinals[VL];
    for (int i = 0; i < VL; i++) ordinals[i] = (float)i;
    for (int r = 0; r < rows; r++) {
        float slope = slopes ? slopes[(g + r) % item->num_heads] : 0.0f;
        int64_t position = item->first_position + (g + r) / item->num_heads;
        for (int64_t i = first; i < last; i++) {
            vf score = vf_load(scores + r * TILE + i * VL);
            if (call->cap > 0.0f) score = call->cap * vf_tanh(score / call->cap);
            if (slopes) score = vf_fma(vf_set1(slope), vf_load(ordinals) + (float)(tile + i * VL - position), score);
            vf_store(scores + r * TILE + i * VL, score);
        }
    }
}

#if HAS_PAIRS

INLINE vf dot_pairs(vf sum, __m512i pairs, int32_t value) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(value));
}

/* sums[r * stride + VL * i] += sum over pairs k in [begin, end), in order, of factors[r * row_stride + k * pair_stride] and
 * panel[k * width + VL * i]; or = that sum. */
INLINE void pair_block(int rows, int vectors, int64_t begin, int64_t end, const int32_t *factors, int64_t row_stride,
                       int64_t pair_stride, const float *panel, int64_t width, float *sums, int64_t stride, int adds) {
    vf acc[GROUP][4];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) acc[r][i] = adds ? vf_load(sums + r * stride + i * VL) : vf_set1(0.0f);
    for (int64_t k = begin; k < end; k++) {
        __m512i pair[4];
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) pair[i] = _mm512_loadu_si512(panel + k * width + i * VL);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            int32_t factor = factors[r * row_stride + k * pair_stride];
#pragma GCC unroll 4
            for (int i = 0; i < vectors; i++) acc[r][i] = dot_pairs(acc[r][i], pair[i], factor);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) vf_store(sums + r * stride + i * VL, acc[r][i]);
}

INLINE void pair_rows(int rows, int64_t vectors, int64_t begin, int64_t end, const int32_t *factors, int64_t row_stride,
                      int64_t pair_stride, const float *panel, int64_t width, float *sums, int64_t stride, int adds) {
    int64_t i = 0;
    if (begin >= end) return;
    for (; i + 4 <= vectors; i += 4)
        pair_block(rows, 4, begin, end, factors, row_stride, pair_stride, panel + i * VL, width, sums + i * VL, stride, adds);
    for (; i < vectors; i++)
        pair_block(rows, 1, begin, end, factors, row_stride, pair_stride, panel + i * VL, width, sums + i * VL, stride, adds);
}

/* scores of `vectors` vectors of keys. */
static void pair_scores(int rows, int64_t vectors, int64_t head_dim, const int32_t *q, const float *keys, float *scores) {
    switch (rows) {
#define SCORES_OF(n) case n: pair_rows(n, vectors, 0, head_dim / 2, q, 1, n, keys, TILE, scores, TILE, 0); break;
        SCORES_OF(1) SCORES_OF(2) SCORES_OF(3) SCORES_OF(4) SCORES_OF(5) SCORES_OF(6)
    }
}

/* scores[r] *= scale and the scales of keys, of `vectors` vectors of keys. */
static void scale_rows(int rows, int64_t vectors, float scale, const float *k_scales, float *scores) {
    for (int r = 0; r < rows; r++)
        for (int64_t i = 0; i < vectors; i++)
            vf_store(scores + r * TILE + i * VL, vf_load(scores + r * TILE + i * VL) * (scale * vf_load(k_scales + i * VL)));
}

/* o[r] += the weights of pairs of keys in [begin, end) times their values. */
static void pair_values(int rows, int64_t begin, int64_t end, const int32_t *weights, const float *values, int64_t padded_dim,
                        float *o) {
    switch (rows) {
#define VALUES_OF(n) \
    case n: pair_rows(n, padded_dim / VL, begin, end, weights, TILE / 2, 1, values, padded_dim, o, padded_dim, 1); break;
        VALUES_OF(1) VALUES_OF(2) VALUES_OF(3) VALUES_OF(4) VALUES_OF(5) VALUES_OF(6)
    }
}

/* keys[d / 2][j] = dimensions d and d + 1 of position tile + j, for j in [begin, end) filled up to groups of 8 with zeros. */
static void pack_key_pairs(float *packed, Rows *rows, int64_t begin, int64_t end, Next *next, int64_t head_dim) {
    static const char zeros[MAX_HEAD_DIM * 2];
    const char **k_rows = rows->k;
    int64_t first = begin / 8 * 8, last = (end + 7) / 8 * 8;
    for (int64_t j = first; j < begin; j++) k_rows[j] = zeros;
    for (int64_t j = end; j < last; j++) k_rows[j] = zeros;
    for (int64_t j = first; j < last; j += 8) {
        fetch(next);
        int64_t pair = 0;
        v8 block[8];
        for (; pair + 8 <= head_dim / 2; pair += 8) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) block[i] = v8_load((const float *)k_rows[j + i] + pair);
            transpose8(block);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) v8_store(packed + (pair + i) * TILE + j, block[i]);
        }
        if (pair == head_dim / 2) continue;
        for (int i = 0; i < 8; i++) block[i] = read8(k_rows[j + i], pair, 4, FLOAT32); /* the last 4 */
        transpose8(block);
        for (int i = 0; i < 4; i++) v8_store(packed + (pair + i) * TILE + j, block[i]);
    }
}

/* values[j / 2][:head_dim] = the pair of positions tile + j and tile + j + 1, zeros for those outside [begin, end). */
static void pack_value_pairs(float *packed, const Rows *rows, int64_t begin, int64_t end, int64_t head_dim) {
    static const char zeros[MAX_HEAD_DIM * 2];
    int64_t padded_dim = padded(head_dim);
    for (int64_t j = begin / 2 * 2; j < end; j += 2) {
        const char *even = j >= begin ? rows->v[j] : zeros, *odd = j + 1 < end ? rows->v[j + 1] : zeros;
        int64_t d = 0;
        for (; d + 32 <= head_dim; d += 32) {
            __m512i first = _mm512_loadu_si512(even + d * 2), second = _mm512_loadu_si512(odd + d * 2);
            __m512i low = _mm512_unpacklo_epi16(first, second), high = _mm512_unpackhi_epi16(first, second);
            float *to = packed + j / 2 * padded_dim + d;
            _mm512_storeu_si512(to, _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high));
            _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high));
        }
        for (; d < head_dim; d += 8) {
            __m128i low = _mm_loadu_si128((const __m128i *)(even + d * 2)), high = _mm_loadu_si128((const __m128i *)(odd + d * 2));
            __m128i *to = (__m128i *)(packed + j / 2 * padded_dim + d);
            _mm_storeu_si128(to, _mm_unpacklo_epi16(low, high));
            _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(low, high));
        }
    }
}

/* n elements of a quantized row, 16 at most, as bfloat16, which each of them is exactly; zeros beyond n. */
INLINE __m256i pair_elements(const char *p, int64_t n, int kept) {
    if (kept == INT8) return _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)widen_elements(p, n, kept), 16));
    /* numbers below 2^-6 have no exponent: these 8 are looked up */
    const __m256i tiny = _mm256_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60, 0, 0, 0, 0, 0, 0, 0, 0);
    char last[16] = {0};
    if (n < 16) p = memcpy(last, p, (size_t)n);
    __m256i codes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
    __m256i magnitude = _mm256_and_si256(codes, _mm256_set1_epi16(0x7f)), sign = _mm256_and_si256(codes, _mm256_set1_epi16(0x80));
    __m256i value = _mm256_add_epi16(_mm256_slli_epi16(magnitude, 4), _mm256_set1_epi16(120 << 7));
    __mmask16 is_tiny = _mm256_cmplt_epu16_mask(magnitude, _mm256_set1_epi16(8));
    return _mm256_or_si256(_mm256_mask_permutexvar_epi16(value, is_tiny, magnitude, tiny), _mm256_slli_epi16(sign, 8));
}

/* The same of a quantized cache. */
INLINE void pack_key_pair_bytes(float *packed, Rows *rows, int64_t begin, int64_t end, Next *next, int64_t head_dim, int kept) {
    static const char zeros[MAX_HEAD_DIM];
    const char **k_rows = rows->k;
    int64_t first = begin / 8 * 8, last = (end + 7) / 8 * 8;
    for (int64_t j = first; j < begin; j++) k_rows[j] = zeros;
    for (int64_t j = end; j < last; j++) k_rows[j] = zeros;
    for (int64_t j = first; j < last; j += 8) {
        fetch(next);
        for (int64_t d = 0; d < head_dim; d += 16) {
            v8 block[8];
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) block[i] = (v8)pair_elements(k_rows[j + i] + d, head_dim - d, kept);
            transpose8(block);
            float *to = packed + d / 2 * TILE + j;
            for (int i = 0; i < smaller(8, (head_dim - d) / 2); i++) v8_store(to + i * TILE, block[i]);
        }
    }
}

INLINE void pack_value_pair_bytes(float *packed, const Rows *rows, int64_t begin, int64_t end, int64_t head_dim, int kept) {
    static const char zeros[MAX_HEAD_DIM];
    for (int64_t j = begin / 2 * 2; j < end; j += 2) {
        const char *even = j >= begin ? rows->v[j] : zeros, *odd = j + 1 < end ? rows->v[j + 1] : zeros;
        for (int64_t d = 0; d < head_dim; d += 16) {
            __m512i low = _mm512_cvtepu16_epi32(pair_elements(even + d, head_dim - d, kept));
            __m512i high = _mm512_cvtepu16_epi32(pair_elements(odd + d, head_dim - d, kept));
            _mm512_storeu_si512(packed + j / 2 * padded(head_dim) + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

/* One row's products with keys [begin, end) of the tile -> weights; updates m, l and scales o. k_scales and v_scales: of the
 * tile, where it is scaled. */
INLINE void softmax_pairs(float *scores, float scale, const float *k_scales, const float *v_scales, int64_t begin, int64_t end,
                          int32_t *weights, float *m, float *l, float *o, int64_t padded_dim, int scaled) {
    vf top = vf_set1(*m), score[VECTORS], sum = vf_set1(0.0f);
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; i++) {
        __mmask16 seen = (__mmask16)((~0ull << begin & ~0ull >> (TILE - end)) >> i * VL);
        vf factor = vf_set1(scale);
        if (scaled) factor *= vf_load(k_scales + i * VL);
        score[i] = (vf)_mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), seen, (__m512)vf_load(scores + i * VL), (__m512)factor);
        top = vf_max(score[i], top);
    }
    float highest = vf_highest(top);
    vf shift = vf_set1(highest);
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; i++) {
        vf weight = vf_exp(score[i] - shift);
        if (scaled) {
            __mmask16 seen = (__mmask16)((~0ull << begin & ~0ull >> (TILE - end)) >> i * VL);
            sum += weight;
            weight = (vf)_mm512_maskz_mul_ps(seen, (__m512)weight, (__m512)vf_load(v_scales + i * VL));
        }
        __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)weight);
        _mm256_storeu_si256((__m256i *)weights + i, rounded);
        if (!scaled) sum += (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
    }
    if (highest != *m) {
        float fade = exp_one(*m - highest);
        *l *= fade;
        for (int64_t d = 0; d < padded_dim; d += VL) vf_store(o + d, vf_load(o + d) * fade);
        *m = highest;
    }
    *l += sum_lanes((const float *)&sum);
}

/* What `attend_tile` does on a CPU with AVX-512 BF16. q and slopes: of this kv head. */
INLINE void attend_pairs(const Call *call, const Item *item, int64_t tile, int64_t first, int64_t last, Scratch *own,
                         const int32_t *q, const float *slopes, State state, int kept) {
    static const float ones[TILE] = {[0 ... TILE - 1] = 1.0f};
    int64_t rows = rows_of(item), head_dim = call->head_dim, padded_dim = padded(head_dim), vectors = (last + VL - 1) / VL;
    float scale = bends(call) ? 1.0f : call->scale; /* what is bent has been scaled before */
    const float *k_scales = bends(call) ? ones : own->k_scales;
    if (quantized(kept)) {
        pack_key_pair_bytes(own->keys, &own->rows, first, last, own->next, head_dim, kept);
        pack_value_pair_bytes(own->values, &own->rows, first, last, head_dim, kept);
    } else {
        pack_key_pairs(own->keys, &own->rows, first, last, own->next, head_dim);
        pack_value_pairs(own->values, &own->rows, first, last, head_dim);
    }
    for (int64_t g = 0; g < rows; g += GROUP) {
        int n = (int)smaller(GROUP, rows - g);
        float *scores = own->scores + g * TILE, *o = state.o + g * padded_dim;
        int32_t *weights = own->weights + g * (TILE / 2);
        int64_t from[GROUP], to[GROUP], common_from = 0, common_to = TILE / 2, any = 0; /* pairs */
        for (int r = 0; r < n; r++) {
            int64_t row_from = larger(row_begin(call, item, g + r) - tile, first), row_to = smaller(row_end(call, item, g + r) - tile, last);
            from[r] = row_from / 2;
            to[r] = row_from < row_to ? (row_to + 1) / 2 : from[r];
            any |= from[r] < to[r];
            common_from = larger(common_from, from[r]);
            common_to = smaller(common_to, to[r]);
        }
        if (!any) continue;
        pair_scores(n, vectors, head_dim, q + g * (head_dim / 2), own->keys, scores);
        if (bends(call)) {
            scale_rows(n, vectors, call->scale, quantized(kept) ? own->k_scales : ones, scores);
            bend_rows(call, item, slopes, g, n, tile, 0, vectors, scores);
        }
        for (int r = 0; r < n; r++)
            if (from[r] < to[r])
                softmax_pairs(scores + r * TILE, scale, k_scales, own->v_scales,
                              larger(row_begin(call, item, g + r) - tile, first), smaller(row_end(call, item, g + r) - tile, last),
                              weights + r * (TILE / 2), &state.m[g + r], &state.l[g + r], o + r * padded_dim, padded_dim,
                              quantized(kept));
        int shared = common_from < common_to;
        for (int r = 0; r < n; r++)
            pair_values(1, from[r], shared ? common_from : to[r], weights + r * (TILE / 2), own->values, padded_dim, o + r * padded_dim);
        if (!shared) continue;
        pair_values(n, common_from, common_to, weights, own->values, padded_dim, o);
        for (int r = 0; r < n; r++)
            pair_values(1, common_to, to[r], weights + r * (TILE / 2), own->values, padded_dim, o + r * padded_dim);
    }
}

#endif

/* What the keys [first, last) of a tile, found in own->rows, do to the rows of one kv head. q and slopes: of this kv head. */
static void attend_tile(const Call *call, const Item *item, int64_t tile, int64_t first, int64_t last, Scratch *own, const float *q,
                        const float *slopes, State state) {
    int64_t rows = rows_of(item), head_dim = call->head_dim, padded_dim = padded(head_dim);
    int scaled = quantized(call->kept);
    if (call->kept == INT8) {
        pack_key_bytes(own->keys, &own->rows, first, last, own->next, head_dim, INT8);
        pack_value_bytes(own->values, &own->rows, first, last, head_dim, INT8);
    } else if (call->kept == FP8) {
        pack_key_bytes(own->keys, &own->rows, first, last, own->next, head_dim, FP8);
        pack_value_bytes(own->values, &own->rows, first, last, head_dim, FP8);
    } else if (call->dtype == BFLOAT16) {
        pack_keys(own->keys, &own->rows, first, last, own->next, head_dim, BFLOAT16);
        pack_values(own->values, &own->rows, first, last, head_dim, BFLOAT16);
    } else if (call->dtype == FLOAT16) {
        pack_keys(own->keys, &own->rows, first, last, own->next, head_dim, FLOAT16);
        pack_values(own->values, &own->rows, first, last, head_dim, FLOAT16);
    } else {
        pack_keys(own->keys, &own->rows, first, last, own->next, head_dim, FLOAT32);
        if (padded_dim != head_dim) pack_values(own->values, &own->rows, first, last, head_dim, FLOAT32);
    }
    for (int64_t g = 0; g < rows; g += GROUP) {
        int n = (int)smaller(GROUP, rows - g);
        float *scores = own->scores + g * TILE, *o = state.o + g * padded_dim;
        int64_t from[GROUP], to[GROUP], common_from = 0, common_to = TILE, any = 0;
        for (int r = 0; r < n; r++) {
            from[r] = larger(row_begin(call, item, g + r) - tile, first);
            to[r] = smaller(row_end(call, item, g + r) - tile, last);
            any |= from[r] < to[r];
            common_from = larger(common_from, from[r]);
            common_to = smaller(common_to, to[r]);
        }
        if (!any) continue;
        scores_of(n, first / VL, (last + VL - 1) / VL, head_dim, q + g * head_dim, own->keys, scores);
        if (scaled) multiply_rows(n, first / VL, (last + VL - 1) / VL, own->k_scales, scores);
        if (bends(call)) bend_rows(call, item, slopes, g, n, tile, first / VL, (last + VL - 1) / VL, scores);
        for (int r = 0; r < n; r++)
            if (from[r] < to[r])
                softmax_row(scores + r * TILE, from[r], to[r], &state.m[g + r], &state.l[g + r], o + r * padded_dim, padded_dim);
        if (scaled) multiply_rows(n, first / VL, (last + VL - 1) / VL, own->v_scales, scores);
        /* A row takes exactly its own keys, in order: alone before and after the range that the whole group shares. */
        int shared = common_from < common_to;
        for (int r = 0; r < n; r++)
            values_of(1, from[r], shared ? common_from : to[r], scores + r * TILE, own->rows.v, padded_dim, o + r * padded_dim);
        if (!shared) continue;
        values_of(n, common_from, common_to, scores, own->rows.v, padded_dim, o);
        for (int r = 0; r < n; r++)
            values_of(1, common_to, to[r], scores + r * TILE, own->rows.v, padded_dim, o + r * padded_dim);
    }
}

INLINE State rows_from(State state, int64_t row, int64_t padded_dim) {
    return (State){state.o + row * padded_dim, state.m + row, state.l + row};
}

/* The (m, l, o) of each row over its keys within [begin, end), which lies within one split. */
static void attend(const Call *call, const Item *item, int64_t begin, int64_t end, Scratch *own, State state) {
    int64_t rows = rows_of(item), all = rows * item->num_kv_heads, head_dim = call->head_dim, padded_dim = padded(head_dim);
    memset(state.o, 0, (size_t)(all * padded_dim) * sizeof(float));
    memset(state.l, 0, (size_t)all * sizeof(float));
    for (int64_t r = 0; r < all; r++) state.m[r] = -INFINITY;
    for (int64_t tile = begin / TILE * TILE; tile < end; tile += TILE) {
        int64_t first = larger(begin - tile, 0), last = smaller(end - tile, TILE), after = tile + TILE;
        Next next = {.heads = 1};
        if (after < end) {
            locate_next(call, item, after, 0, smaller(end - after, TILE), &next);
        } else if (end == item->end && own->after) {
            after = own->after->begin / TILE * TILE;
            locate_next(call, own->after, after, own->after->begin - after, smaller(own->after->end - after, TILE), &next);
        }
        own->next = &next;
        for (int64_t h = 0; h < item->num_kv_heads; h++) {
            State part = rows_from(state, h * rows, padded_dim);
            const float *slopes = call->slopes ? call->slopes + item->first_head + h * (call->num_heads / call->num_kv_heads) : NULL;
            locate(call, item, item->kv_head + h, tile, first, last, &own->rows);
            if (quantized(call->kept)) read_scales(call, item, item->kv_head + h, tile, first, last, own);
#if HAS_PAIRS
            if (call->dtype == BFLOAT16) {
                const int32_t *q = (const int32_t *)own->q + h * rows * (head_dim / 2);
                if (call->kept == INT8) attend_pairs(call, item, tile, first, last, own, q, slopes, part, INT8);
                else if (call->kept == FP8) attend_pairs(call, item, tile, first, last, own, q, slopes, part, FP8);
                else attend_pairs(call, item, tile, first, last, own, q, slopes, part, BFLOAT16);
                continue;
            }
#endif
            attend_tile(call, item, tile, first, last, own, own->q + h * rows * head_dim, slopes, part);
        }
        while (next.step < (next.last + 7) / 8 * next.heads) fetch(&next);
    }
}

/* total = total and part, for the rows that see keys of the split [begin, end); the first such split is taken as it is. */
static void merge(const Call *call, const Item *item, int64_t begin, int64_t end, State total, State part) {
    int64_t padded_dim = padded(call->head_dim);
    for (int64_t r = 0; r < rows_of(item) * item->num_kv_heads; r++) {
        int64_t within = r % rows_of(item), from = row_begin(call, item, within);
        float *o = total.o + r * padded_dim;
        const float *other = part.o + r * padded_dim;
        if (larger(from, begin) >= smaller(row_end(call, item, within), end)) continue;
        if (from >= begin) {
            total.m[r] = part.m[r];
            total.l[r] = part.l[r];
            memcpy(o, other, (size_t)padded_dim * sizeof(float));
            continue;
        }
        float highest = total.m[r] > part.m[r] ? total.m[r] : part.m[r];
        float ours = exp_one(total.m[r] - highest), theirs = exp_one(part.m[r] - highest);
        total.m[r] = highest;
        total.l[r] = total.l[r] * ours + part.l[r] * theirs;
        for (int64_t d = 0; d < padded_dim; d += VL)
            vf_store(o + d, vf_fma(vf_load(other + d), vf_set1(theirs), vf_load(o + d) * ours));
    }
}

INLINE int64_t row_element(const Call *call, const Item *item, int64_t r) {
    int64_t group = call->num_heads / call->num_kv_heads, h = r / rows_of(item);
    r %= rows_of(item);
    int64_t token = call->cu_seqlens[item->sequence] + item->first_token + r / item->num_heads;
    return (token * call->num_heads + item->first_head + h * group + r % item->num_heads) * call->head_dim;
}

static void load_queries(const Call *call, const Item *item, float *q) {
    int64_t rows = rows_of(item);
    for (int64_t r = 0; r < rows * item->num_kv_heads; r++) {
        int64_t g = r / rows * rows + r % rows / GROUP * GROUP, n = smaller(GROUP, (r / rows + 1) * rows - g);
        int64_t element = row_element(call, item, r);
        if (HAS_PAIRS && call->dtype == BFLOAT16) {
            const char *row = at(call->q, element, BFLOAT16);
            for (int64_t k = 0; k < call->head_dim / 2; k++)
                memcpy(q + g * (call->head_dim / 2) + k * n + (r - g), row + k * 4, 4);
            continue;
        }
        for (int64_t d = 0; d < call->head_dim; d += 8) {
            v8 value = read8(call->q, element + d, 8, call->dtype) * call->scale;
            for (int i = 0; i < 8; i++) q[g * call->head_dim + (d + i) * n + (r - g)] = value[i];
        }
    }
}

static void store(const Call *call, const Item *item, State total) {
    for (int64_t r = 0; r < rows_of(item) * item->num_kv_heads; r++) {
        int64_t element = row_element(call, item, r);
        float sum = total.l[r] == 0.0f ? 1.0f : total.l[r]; /* 0: of no keys at all */
        for (int64_t d = 0; d < call->head_dim; d += 8)
            write8(call->out, element + d, 8, call->dtype, v8_load(total.o + r * padded(call->head_dim) + d) / sum);
    }
}

INLINE int64_t num_splits(const Item *item) { return (item->end - 1) / SPLIT - item->begin / SPLIT + 1; }

INLINE void attend_split(const Call *call, const Item *item, int64_t split, Scratch *own, State state) {
    int64_t begin = larger(item->begin, split * SPLIT), end = smaller(item->end, (split + 1) * SPLIT);
    attend(call, item, begin, end, own, state);
}

static void whole_item(const Call *call, const Item *item, Scratch *own) {
    load_queries(call, item, own->q);
    int64_t first = item->begin / SPLIT;
    for (int64_t split = first; split < first + num_splits(item); split++) {
        attend_split(call, item, split, own, split == first ? own->total : own->part);
        if (split > first) merge(call, item, split * SPLIT, (split + 1) * SPLIT, own->total, own->part);
    }
    store(call, item, own->total);
}

/* Partial results in one buffer of num_partials states of ROWS rows. */
static State partial_state(float *partials, int64_t index, int64_t padded_dim) {
    float *base = partials + index * ROWS * (padded_dim + 2);
    return (State){base, base + ROWS * padded_dim, base + ROWS * padded_dim + ROWS};
}

static void one_split(const Call *call, const Item *items, int64_t num_items, int64_t index, float *partials, Scratch *own) {
    int64_t i = num_items - 1;
    while (items[i].first_partial > index) i--;
    const Item *item = &items[i];
    load_queries(call, item, own->q);
    int64_t split = item->begin / SPLIT + index - item->first_partial;
    attend_split(call, item, split, own, partial_state(partials, index, padded(call->head_dim)));
}

static void merge_item(const Call *call, const Item *item, float *partials) {
    int64_t padded_dim = padded(call->head_dim), first = item->begin / SPLIT;
    State total = partial_state(partials, item->first_partial, padded_dim);
    for (int64_t i = 1; i < num_splits(item); i++)
        merge(call, item, (first + i) * SPLIT, (first + i + 1) * SPLIT, total, partial_state(partials, item->first_partial + i, padded_dim));
    store(call, item, total);
}

/* Fills items (or only counts them when items is NULL); longest contexts of a sequence last. A token that comes alone takes
 * all kv heads with it where `whole`: they lie side by side in each block. */
static int64_t list_items(const Call *call, int64_t num_seqs, int whole, Item *items) {
    int64_t group = call->num_heads / call->num_kv_heads, heads = smaller(group, ROWS), tokens = larger(1, ROWS / heads), count = 0;
    for (int64_t s = 0; s < num_seqs; s++) {
        int64_t length = call->cu_seqlens[s + 1] - call->cu_seqlens[s], cached = call->context_lens[s] - length;
        int64_t together = whole && length == 1 ? larger(1, ROWS / group) : 1;
        for (int64_t t = 0; t < length; t += tokens)
            for (int64_t h = 0; h < call->num_kv_heads; h += together)
                for (int64_t first = 0; first < group; first += heads, count++) {
                    if (!items) continue;
                    Item item = {(int32_t)s, (int32_t)h, (int32_t)smaller(together, call->num_kv_heads - h), (int32_t)(h * group + first),
                                 (int32_t)smaller(heads, group - first), (int32_t)t, (int32_t)smaller(tokens, length - t), cached + t,
                                 0, 0, 0};
                    item.begin = row_begin(call, &item, 0);
                    item.end = call->causal ? cached + t + item.num_tokens : call->context_lens[s];
                    items[count] = item;
                }
    }
    return count;
}

typedef struct {
    const Call *call;
    const Item *items;
    int64_t num_items;
    float *partials; /* NULL: strips of whole items are shared out, and not their splits */
    int64_t strip;
} Share;

static void share_chunk(const void *argument, int64_t chunk) {
    const Share *share = argument;
    const Call *call = share->call;
    int64_t head_dim = call->head_dim, padded_dim = padded(head_dim);
    float queries[ROWS * head_dim] __attribute__((aligned(64))), keys[TILE * head_dim] __attribute__((aligned(64)));
    float values[TILE * padded_dim] __attribute__((aligned(64))), scores[ROWS * TILE] __attribute__((aligned(64)));
    float outputs[2][ROWS * padded_dim] __attribute__((aligned(64))), maxima[2][ROWS], sums[2][ROWS];
    int32_t weights[ROWS * TILE / 2] __attribute__((aligned(64)));
    float k_scales[TILE] = {0}, v_scales[TILE] = {0};
    Scratch own = {queries, keys, values, scores, weights, {outputs[0], maxima[0], sums[0]}, {outputs[1], maxima[1], sums[1]}, {{0}, {0}},
                   k_scales, v_scales, NULL, NULL};
    /* Lanes beyond the last key and dimension are computed and dropped; zeros keep them free of denormals. */
    memset(keys, 0, sizeof keys);
    if (padded_dim != head_dim) memset(values, 0, sizeof values);
    if (share->partials) {
        one_split(call, share->items, share->num_items, chunk, share->partials, &own);
        return;
    }
    int64_t index = share->num_items - 1 - chunk * share->strip, stop = larger(index - share->strip, -1);
    for (; index > stop; index--) {
        own.after = index - 1 > stop ? &share->items[index - 1] : NULL;
        whole_item(call, &share->items[index], &own);
    }
}

/* The hyperbolic tangent alone, for the test of its accuracy: x, y; count, a multiple of 16. */
int64_t tandem_tanh(const Arg *a) {
    const float *x = a[0].p;
    float *y = a[1].p;
    for (int64_t i = 0; i < a[2].i; i += VL) vf_store(y + i, vf_tanh(vf_load(x + i)));
    return 0;
}

/* q, k_cache, v_cache, out, cu_seqlens, context_lens, block_tables; num_tokens, num_seqs, max_blocks, table_stride,
 * num_blocks, block_tokens; strides of both caches; num_heads, num_kv_heads, head_dim, window; scale, cap or 0, slopes or NULL,
 * causal; dtype, threads; what the caches' elements are kept as; scales of keys and values or NULL, and their strides.
 * Returns 0, -1 without memory, or 1 + the first sequence whose lengths or block table are out of range, num_seqs + 1 for the
 * ends of cu_seqlens (nothing is written then). */
int64_t tandem_paged_attention(const Arg *a) {
    const int32_t *cu_seqlens = a[4].p, *context_lens = a[5].p, *block_tables = a[6].p;
    int64_t num_tokens = a[7].i, num_seqs = a[8].i, max_blocks = a[9].i, table_stride = a[10].i, num_blocks = a[11].i;
    int64_t block_tokens = a[12].i, window = a[22].i, threads = a[28].i;
    const Call call = {
        a[0].p, a[1].p, a[2].p, a[3].p, cu_seqlens, context_lens, block_tables, table_stride, a[13].i, a[14].i, a[15].i, a[16].i,
        a[17].i, a[18].i, a[19].i, a[20].i, a[21].i, block_tokens, window, (float)a[23].d, (float)a[24].d, a[25].p,
        (int)a[26].i, (int)a[27].i, (int)a[29].i, a[30].p, a[31].p, {a[32].i, a[33].i, a[34].i}, {a[35].i, a[36].i, a[37].i},
    };
    int64_t work = 0;
    if (cu_seqlens[0] != 0 || cu_seqlens[num_seqs] != num_tokens) return num_seqs + 1;
    for (int64_t s = 0; s < num_seqs; s++) {
        int64_t length = cu_seqlens[s + 1] - cu_seqlens[s], context = context_lens[s];
        if (length < 0 || context < (call.causal ? length : 0) || context > max_blocks * block_tokens) return s + 1;
        if (length == 0) continue;
        int64_t oldest = window ? larger(0, context - length + 1 - window) : 0;
        for (int64_t i = oldest / block_tokens; i * block_tokens < context; i++) {
            int32_t block = block_tables[s * table_stride + i];
            if (block < 0 || block >= num_blocks) return s + 1;
        }
        work += length * (context - oldest) * call.num_heads * call.head_dim;
    }
    if (work < 200000) threads = 1;
    int whole = num_seqs >= 4 * threads;
    int64_t num_items = list_items(&call, num_seqs, whole, NULL), num_partials = 0;
    if (num_items == 0) return 0;
    Item *items = scratch(SCRATCH_ATTENTION, (size_t)num_items * sizeof(Item));
    if (!items) return -1;
    list_items(&call, num_seqs, whole, items);
    for (int64_t i = 0; i < num_items; i++) {
        items[i].first_partial = num_partials;
        num_partials += num_splits(&items[i]);
    }
    Share share = {&call, items, num_items, NULL, 1};
    /* With few items and long contexts the splits are what threads share out; the arithmetic is the same. */
    if (threads > 1 && num_items < 4 * threads && num_partials > num_items) {
        share.partials = scratch(SCRATCH_PARTIALS, (size_t)(num_partials * ROWS * (padded(call.head_dim) + 2)) * sizeof(float));
        if (!share.partials) return -1;
        team_run(threads, num_partials, share_chunk, &share);
        for (int64_t i = 0; i < num_items; i++) merge_item(&call, &items[i], share.partials);
    } else {
        /* items of a decode step are small: a thread takes several, and fetches the next one's keys */
        share.strip = larger(1, smaller(num_items / (4 * threads), STRIP_WORK * num_items / larger(1, work)));
        team_run(threads, (num_items + share.strip - 1) / share.strip, share_chunk, &share);
    }
    return 0;
}
