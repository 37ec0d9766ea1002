/* y = x W^T + bias, for any number of rows, in float32; order of sums and integers as linear.h says.
 *
 * Few rows read the weight as it lies in memory, more rows widen a block of it once and keep it in the cache: the operations
 * of a row are the same ones.
 *
 * The weight is packed in panels: [ceil(out / WIDTH)][in][WIDTH], filled up with zeros. INT4 panels are words of 8 input
 * features, [ceil(out / WIDTH)][ceil(in / 8)][WIDTH], the first feature in the lowest 4 bits.
 *
 * Of INT4 the bits are q + 8, so its sum of x q is fma(sum of x, -8, sum of x (q + 8)). They are multiplied where they stand
 * in their word, as 16^i (q + 8) by x / 16^i.
 *
 * FP8 panels are as those of INT8. FP6 panels, of this file and of linear_pairs.c, are [ceil(out / WIDTH)][ceil(in / 16)][3]
 * [WIDTH] words, whose lower half has the bits of features 0, 2, 4 ... 14 and whose upper half of 1, 3, 5 ... 15. Of a half's
 * eight numbers of 6 bits the first word has, from the lowest bit up, those of 0, 1 and four bits of 2; the second 3, 4 and four
 * bits of 5; the third 6, 7 and the upper two bits of 2 and of 5.
 */
#include "kv_format.h"
#include "linear.h"

enum {
    FEW = 9,                       /* rows up to which the weight is read as it lies, */
    AT_ONCE = 3,                   /* for so many rows at a time */
    TILE_ROWS = VL == 16 ? 12 : 6, /* rows and columns of y held in registers */
    TILE = 2 * VL,
    MIDDLE = 8, /* the bits of INT4 that stand for 0 */
};

/* What comes after is not read before: the compiler would keep it in registers that the sums of a block need. */
#define NOT_BEFORE __asm__ volatile("" ::: "memory")

/* Where the bits of an input feature stand in a word; the last ones are shifted down. */
static const uint32_t MASKS[WORD - 1][16] __attribute__((aligned(64))) = {
#define MASK(i) {[0 ... 15] = 15u << 4 * i}
    MASK(0), MASK(1), MASK(2), MASK(3), MASK(4), MASK(5), MASK(6),
};
static const float UNITS[WORD] = {1.0f, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1.0f};

/* Where input feature k of a panel begins; of INT4 and FP6 the first of a word. */
INLINE const void *feature(const void *w, int64_t k, int dtype) {
    if (dtype == INT4) return (const char *)w + k * (WIDTH / 2);
    if (dtype == FP6) return (const char *)w + k * (WIDTH * 3 / 4);
    if (dtype == INT8 || dtype == FP8) return (const char *)w + k * WIDTH;
    return at(w, k * WIDTH, dtype);
}

/* Input features that are read together. */
INLINE int step_of(int dtype) { return dtype == FP6 ? 2 * WORD : dtype == INT4 ? WORD : 2; }

INLINE const void *panel_of(const Linear *job, int64_t panel) {
    int64_t depth = step_of(job->w_dtype) > 2 ? whole_words(job->in, job->w_dtype) : job->in;
    return feature(job->w, panel * depth, job->w_dtype);
}

INLINE vf weights(const void *w, int64_t element, int dtype) {
    if (dtype == INT8) return vf_widen8((const int8_t *)w + element);
    if (dtype == FP8) return e4m3_widen(read_bytes((const char *)w + element));
    return vf_load_as(at(w, element, dtype), dtype);
}

/* Input feature i of words as float32, 1 / UNITS[i] times as large and more by 8 times that. */
INLINE vf nibbles(const void *words, int i, const uint32_t (*masks)[16]) {
    vi bits = vi_load(words);
    return __builtin_convertvector(i < WORD - 1 ? bits & vi_load(masks[i]) : (vi)((vu)bits >> 28), vf);
}

/* e3m2 in the low 6 bits of each lane -> float32, as kv_format.h widens e4m3. */
INLINE vf e3m2_widen(vu codes) {
    const uint32_t least = 0x3e800000u; /* 2^-2 */
    vu magnitude = (codes & 31u) << 21, tiny = (vu)(magnitude < (1u << 23));
    vf value = (vf)(magnitude + (124u << 23) + (tiny & (1u << 23))) - (vf)(tiny & least);
    return (vf)((vu)value | ((codes & 32u) << 26));
}

/* Input feature i of words of FP6. */
INLINE vf sixes(const char *words, int i) {
    const int row = WIDTH * 4, number = i / 2, half = i % 2 * 16, place = number % 3 * 6;
    vu bits = (vu)vi_load(words + number / 3 * row) >> (half + place);
    if (number == 2 || number == 5) {
        vu upper = (vu)vi_load(words + 2 * row) >> (half + (number == 2 ? 8 : 10));
        bits = (bits & 15u) | (upper & 48u);
    }
    return e3m2_widen(bits);
}

/* VL outputs from the i-th VL of them, of input feature n of those that begin at `here`. */
INLINE vf weights_of(const Linear *job, const char *here, int i, int n, int dtype) {
    if (dtype == INT4) return nibbles(here + i * (int64_t)sizeof(vi), n, job->masks);
    if (dtype == FP6) return sixes(here + i * (int64_t)sizeof(vi), n);
    return weights(feature(here, n, dtype), i * VL, dtype);
}

/* Input feature n from `here`, weight by x of up to AT_ONCE rows. */
INLINE void add_feature(
    int rows, vf sum[AT_ONCE][VECTORS], const Linear *job, const float *x, const char *here, int n, int dtype
) {
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; i++) {
        vf weight = weights_of(job, here, i, n, dtype);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) sum[r][i] = vf_fma(vf_set1(x[r * job->in + n]), weight, sum[r][i]);
    }
}

/* Up to AT_ONCE rows from `row` times a block. */
INLINE void few_rows_block(
    int rows, const Linear *job, int64_t panel, int64_t row, const Block *block, float *total, int dtype
) {
    int64_t depth = block->depth;
    const float *x = (const float *)job->x + row * job->in + block->start;
    const char *w = feature(panel_of(job, panel), block->start, dtype);
    const int step = step_of(dtype);
    vf sum[AT_ONCE][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; i++) sum[r][i] = vf_set1(0.0f);
    int64_t k = 0;
    for (; k + step <= depth; k += step) {
        const char *here = feature(w, k, dtype);
        /* The next panel follows in memory, so what is fetched ahead is always wanted. */
        __builtin_prefetch(here + AHEAD_BYTES * (dtype == FLOAT32 ? 2 : 1));
        __builtin_prefetch(here + AHEAD_BYTES * (dtype == FLOAT32 ? 2 : 1) + 64);
        for (int line = 2; dtype == FP6 && line < 6; line++) __builtin_prefetch(here + AHEAD_BYTES + line * 64);
        if (dtype == INT4) NOT_BEFORE; /* the masks */
#pragma GCC unroll 16
        for (int n = 0; n < step; n++) add_feature(rows, sum, job, x + k, here, n ^ 1, dtype);
    }
#pragma GCC unroll 16
    for (int n = 0; n < step; n++)
        if (k + (n ^ 1) < depth) add_feature(rows, sum, job, x + k, feature(w, k, dtype), n ^ 1, dtype);
    NOT_BEFORE; /* scales and offsets */
    Fold fold = fold_of(job, panel, row, block);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; i++) {
            float *to = total + r * WIDTH + i * VL;
            add_sum(to, sum[r][i], &fold, r, i * VL, is_scaled(dtype), dtype == INT4 ? MIDDLE : 0);
        }
}

/* Up to AT_ONCE rows from `row` times one panel; total[r * WIDTH ...]. */
INLINE void few_rows(int rows, const Linear *job, int64_t panel, int64_t row, float *total, int dtype) {
    for (Block block = {0}; next_block(job, &block);) few_rows_block(rows, job, panel, row, &block, total, dtype);
}

/* `rows` rows times TILE columns of a block of `depth` input features. w has WIDTH columns. */
INLINE void tile(
    int rows, int64_t depth, const float *x, int64_t in, const float *w, float *total, const Fold *fold, int64_t row,
    int64_t column, int dtype
) {
    vf sum[TILE_ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = vf_set1(0.0f);
    for (int64_t k = 0; k < depth; k += 2)
#pragma GCC unroll 2
        for (int n = k + 1 < depth; n >= 0; n--) {
            const float *here = w + (k + n) * WIDTH;
            vf low = vf_load(here), high = vf_load(here + VL);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                vf value = vf_set1(x[r * in + k + n]);
                sum[r][0] = vf_fma(value, low, sum[r][0]);
                sum[r][1] = vf_fma(value, high, sum[r][1]);
            }
        }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            float *to = total + r * WIDTH + i * VL;
            add_sum(to, sum[r][i], fold, row + r, column + i * VL, is_scaled(dtype), dtype == INT4 ? MIDDLE : 0);
        }
}

/* All the rows in tiles as equal as they get: a tile of few rows waits for its own sums. */
static void tiles(
    int64_t rows, int64_t depth, const float *x, int64_t in, const float *w, float *total, const Fold *fold, int dtype
) {
    int64_t count = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t column = 0; column < WIDTH; column += TILE)
        for (int64_t i = 0; i < count; i++) {
            int64_t first = i * rows / count, n = (i + 1) * rows / count - first;
            const float *from = x + first * in, *w_from = w + column;
            float *to = total + first * WIDTH + column;
            switch (n) {
#define TILE_OF(n) case n: tile(n, depth, from, in, w_from, to, fold, first, column, dtype); break;
                TILE_OF(1) TILE_OF(2) TILE_OF(3) TILE_OF(4) TILE_OF(5) TILE_OF(6)
#if VL == 16
                TILE_OF(7) TILE_OF(8) TILE_OF(9) TILE_OF(10) TILE_OF(11) TILE_OF(12)
#endif
            }
        }
}

/* A panel in groups of rows; after the first group it lies in the cache. */
INLINE void few_rows_panel(const Linear *job, int64_t panel, float *total, int dtype) {
    int64_t count = (job->rows + AT_ONCE - 1) / AT_ONCE;
    for (int64_t i = 0; i < count; i++) {
        int64_t first = i * job->rows / count, n = (i + 1) * job->rows / count - first;
        float *to = total + first * WIDTH;
        if (n == 1) few_rows(1, job, panel, first, to, dtype);
        else if (n == 2) few_rows(2, job, panel, first, to, dtype);
        else few_rows(3, job, panel, first, to, dtype);
    }
}

static void few_rows_chunk(const void *argument, int64_t chunk) {
    const Linear *job = argument;
    float total[FEW * WIDTH] __attribute__((aligned(64)));
    for (int64_t panel = first_panel(job, chunk); panel < first_panel(job, chunk + 1); panel++) {
        if (job->w_dtype == BFLOAT16) few_rows_panel(job, panel, total, BFLOAT16);
        else if (job->w_dtype == FLOAT16) few_rows_panel(job, panel, total, FLOAT16);
        else if (job->w_dtype == INT8) few_rows_panel(job, panel, total, INT8);
        else if (job->w_dtype == INT4) few_rows_panel(job, panel, total, INT4);
        else if (job->w_dtype == FP8) few_rows_panel(job, panel, total, FP8);
        else if (job->w_dtype == FP6) few_rows_panel(job, panel, total, FP6);
        else few_rows_panel(job, panel, total, FLOAT32);
        finish(job, panel, 0, job->rows, total);
    }
}

/* `depth` input features of a panel as float32: `wide`, or where they lie if they are. */
static const float *widened(const void *w, int64_t depth, float *wide, int dtype) {
    if (dtype == FLOAT32) return w;
    if (dtype == INT4)
        for (int64_t k = 0; k < depth; k += WORD)
            for (int64_t i = 0; i < WIDTH; i += VL) {
                const char *words = (const char *)feature(w, k, INT4) + i * 4;
#pragma GCC unroll 8
                for (int n = 0; n < WORD; n++)
                    if (k + n < depth) vf_store(wide + (k + n) * WIDTH + i, nibbles(words, n, MASKS));
            }
    else if (dtype == FP6)
        for (int64_t k = 0; k < depth; k += 2 * WORD)
            for (int64_t i = 0; i < WIDTH; i += VL) {
                const char *words = (const char *)feature(w, k, FP6) + i * 4;
#pragma GCC unroll 16
                for (int n = 0; n < 2 * WORD; n++)
                    if (k + n < depth) vf_store(wide + (k + n) * WIDTH + i, sixes(words, n));
            }
    else if (dtype == FP8)
        for (int64_t i = 0; i < depth * WIDTH; i += VL) vf_store(wide + i, weights(w, i, FP8));
    else if (dtype == INT8)
        for (int64_t i = 0; i < depth * WIDTH; i += VL) vf_store(wide + i, weights(w, i, INT8));
    else if (dtype == FLOAT16)
        for (int64_t i = 0; i < depth * WIDTH; i += VL) vf_store(wide + i, weights(w, i, FLOAT16));
    else
        for (int64_t i = 0; i < depth * WIDTH; i += VL) vf_store(wide + i, weights(w, i, BFLOAT16));
    return wide;
}

/* A strip of rows times one panel; all strips of a panel come after each other. */
static void strip_chunk(const void *argument, int64_t chunk) {
    const Linear *job = argument;
    int64_t strips = (job->rows + STRIP - 1) / STRIP, panel = chunk / strips, first = chunk % strips * STRIP;
    int64_t rows = smaller(job->rows - first, STRIP);
    float total[STRIP * WIDTH] __attribute__((aligned(64))), wide[BLOCK * WIDTH] __attribute__((aligned(64)));
    const void *w = panel_of(job, panel);
    for (Block block = {0}; next_block(job, &block);) {
        const float *floats = widened(feature(w, block.start, job->w_dtype), block.depth, wide, job->w_dtype);
        Fold fold = fold_of(job, panel, first, &block);
        const float *x = (const float *)job->x + first * job->in + block.start;
        tiles(rows, block.depth, x, job->in, floats, total, &fold, job->w_dtype);
    }
    finish(job, panel, first, rows, total);
}

static int64_t product_chunks(const Linear *job) {
    return job->rows <= FEW ? job->chunks : job->panels * ((job->rows + STRIP - 1) / STRIP);
}

static void product_chunk(const void *argument, int64_t chunk) {
    const Linear *job = argument;
    if (job->rows <= FEW) few_rows_chunk(job, chunk);
    else strip_chunk(job, chunk);
}

static int64_t prepare_chunks(const Linear *job) { return (job->rows + strip_of(job->in) - 1) / strip_of(job->in); }

/* A row as float32, each group filled up with zeros. */
INLINE void copy_row(const Linear *job, const void *x, float *copy, v8 units) {
    int64_t groups = job->in == job->width ? 1 : job->groups, given = job->width / groups, group = job->in / groups;
    for (int64_t g = 0; g < groups; g++)
        for (int64_t k = 0; k < group; k += 8) {
            v8 eight = k < given ? read8(x, g * given + k, smaller(given - k, 8), job->x_dtype) : v8_set1(0.0f);
            write8(copy, g * group + k, smaller(group - k, 8), FLOAT32, eight * units);
        }
}

/* What of x is computed before the products: its float32 copy and the sums of its blocks. */
static void prepare_chunk(const void *argument, int64_t chunk) {
    const Linear *job = argument;
    int64_t strip = strip_of(job->in), end = smaller(job->rows, (chunk + 1) * strip);
    v8 units = job->w_dtype == INT4 ? v8_load(UNITS) : v8_set1(1.0f);
    for (int64_t row = chunk * strip; row < end; row++) {
        const void *x = at(job->source, source_row(job, row) * job->width, job->x_dtype);
        if (job->sums) sum_blocks(job, x, job->x_dtype, job->sums + row * job->blocks);
        if (job->copy) copy_row(job, x, (float *)job->copy + row * job->in, units);
    }
}

static int64_t run(Linear *jobs, int64_t count, int64_t threads) {
    int copied = jobs->x_dtype != FLOAT32 || jobs->w_dtype == INT4 || jobs->pairs || jobs->in != jobs->width;
    int summed = jobs->offset || jobs->w_dtype == INT4;
    if (make_room(jobs, count, copied ? sizeof(float) : 0, summed)) return -1;
    for (int64_t i = 0; i < count; i++) jobs[i].masks = MASKS;
    cut_panels(jobs, count, threads);
    if (copied || summed) run_jobs(preparing_threads(jobs, count, threads), jobs, count, prepare_chunks, prepare_chunk);
    run_jobs(threads, jobs, count, product_chunks, product_chunk);
    return 0;
}

/* Arguments as linear_of takes them. Returns 0, or -1 without memory. */
int64_t tandem_linear(const Arg *a) {
    Linear job = linear_of(a);
    return job.rows ? run(&job, 1, linear_threads(a)) : 0;
}

/* Arguments as experts_of takes them. Returns 0, or -1 without memory. */
int64_t tandem_grouped_linear(const Arg *a) {
    Linear jobs[MAX_JOBS];
    int64_t count = experts_of(a, jobs);
    return count ? run(jobs, count, linear_threads(a)) : 0;
}
