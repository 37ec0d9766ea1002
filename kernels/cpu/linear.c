/* y = x W^T + bias, for any number of rows, in float32.
 *
 * An output is summed in one order, whatever rows are beside it: BLOCKs of input features from zero, by fused multiply-adds
 * in order of the feature; the blocks added in order; then the bias. Few rows read the weight as it lies in memory, more
 * rows widen a block of it once and keep it in the cache: the operations of a row are the same ones.
 *
 * The weight is packed in panels: [ceil(out / WIDTH)][in][WIDTH], filled up with zeros. INT4 panels are words of 8 input
 * features, [ceil(out / WIDTH)][ceil(in / 8)][WIDTH], the first feature in the lowest 4 bits.
 *
 * Integers q stand for w = scale * q + offset, of a scale and perhaps an offset for each group of input features and output,
 * packed [ceil(out / WIDTH)][groups][WIDTH]. A block then ends with its group at the latest, and is added as
 *
 *     total = fma(sum over the block of x q, scale, total)
 *     total = fma(sum over the block of x, offset, total)
 *
 * Of INT4 the bits are q + 8, so its sum of x q is fma(sum of x, -8, sum of x (q + 8)). They are multiplied where they stand
 * in their word, as 16^i (q + 8) by x / 16^i. The sum of x is made once for each row, in LANES lanes.
 */
#include "simd.h"
#include "team.h"

enum { INT8 = 2, INT4 = 3 }; /* dtypes of weights alone, beside FLOAT32 and BFLOAT16 */

enum {
    WIDTH = 32,                   /* output features of a panel */
    BLOCK = 256,                  /* input features summed from zero, at most */
    FEW = 9,                      /* rows up to which the weight is read as it lies, */
    AT_ONCE = 3,                  /* for so many rows at a time */
    TILE_ROWS = VL == 16 ? 12 : 6, /* rows and columns of y held in registers */
    TILE = 2 * VL,
    STRIP = 240, /* rows of a chunk */
    VECTORS = WIDTH / VL,
    WORD = 8,           /* input features of a word of INT4 */
    MIDDLE = 8,         /* the bits of INT4 that stand for 0 */
    AHEAD_BYTES = 2048, /* how far ahead of its use a weight is fetched */
};

/* What comes after is not read before: the compiler would keep it in registers that the sums of a block need. */
#define NOT_BEFORE __asm__ volatile("" ::: "memory")

/* Where the bits of an input feature stand in a word; the last ones are shifted down. */
static const uint32_t MASKS[WORD - 1][16] __attribute__((aligned(64))) = {
#define MASK(i) {[0 ... 15] = 15u << 4 * i}
    MASK(0), MASK(1), MASK(2), MASK(3), MASK(4), MASK(5), MASK(6),
};
static const float UNITS[WORD] = {1.0f, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1.0f};

typedef struct {
    const float *x; /* [rows][in], of INT4 in units of the bits that multiply it */
    const void *w;
    const float *scale, *offset; /* [panels][groups][WIDTH], or NULL */
    const float *sums;           /* of x: [rows][blocks], or NULL without offset and INT4 */
    const void *bias;
    void *y;
    int64_t rows, in, out, panels;
    int64_t group, groups, blocks; /* input features of a group; groups and blocks of a row */
    int w_dtype, bias_dtype, y_dtype;
    const uint32_t (*masks)[16]; /* MASKS, as if they were not known */
} Linear;

/* Input features that are summed from zero. */
typedef struct {
    int64_t start, depth, group, index;
} Block;

/* How the sums of a block become part of the total. Pointers are to the first of the rows and columns meant. */
typedef struct {
    const float *scale, *offset, *sums;
    int64_t blocks;
    int first, dtype;
} Fold;

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Where input feature k of a panel begins; of INT4 the first of a word. */
INLINE const void *feature(const void *w, int64_t k, int dtype) {
    if (dtype == INT4) return (const char *)w + k * (WIDTH / 2);
    if (dtype == INT8) return (const char *)w + k * WIDTH;
    return at(w, k * WIDTH, dtype);
}

INLINE const void *panel_of(const Linear *job, int64_t panel) {
    int64_t depth = job->w_dtype == INT4 ? (job->in + WORD - 1) / WORD * WORD : job->in;
    return feature(job->w, panel * depth, job->w_dtype);
}

INLINE vf weights(const void *w, int64_t element, int dtype) {
    if (dtype == INT8) return vf_widen8((const int8_t *)w + element);
    return dtype == BFLOAT16 ? vf_widen((const uint16_t *)w + element) : vf_load((const float *)w + element);
}

/* Moves to the block after this one, from {0} to the first. 0 behind the last. */
INLINE int next_block(const Linear *job, Block *block) {
    block->index += block->depth > 0;
    block->start += block->depth;
    block->group += block->depth > 0 && block->start == (block->group + 1) * job->group;
    block->depth = smaller(BLOCK, (block->group + 1) * job->group - block->start);
    return block->start < job->in;
}

/* Input feature i of words as float32, 1 / UNITS[i] times as large and more by 8 times that. */
INLINE vf nibbles(const void *words, int i, const uint32_t (*masks)[16]) {
    vi bits = vi_load(words);
    return __builtin_convertvector(i < WORD - 1 ? bits & vi_load(masks[i]) : (vi)((vu)bits >> 28), vf);
}

INLINE Fold fold_of(const Linear *job, int64_t panel, int64_t row, const Block *block) {
    int64_t element = (panel * job->groups + block->group) * WIDTH;
    return (Fold){
        job->scale ? job->scale + element : NULL,
        job->offset ? job->offset + element : NULL,
        job->sums ? job->sums + row * job->blocks + block->index : NULL,
        job->blocks,
        block->start == 0,
        job->w_dtype,
    };
}

/* Adds the sum of row r and the columns from `column` to their total. */
INLINE void add_sum(float *total, vf sum, const Fold *fold, int64_t r, int64_t column, int dtype) {
    if (dtype == FLOAT32 || dtype == BFLOAT16) {
        vf_store(total, fold->first ? sum : vf_load(total) + sum);
        return;
    }
    vf scale = vf_load(fold->scale + column), of_x = vf_set1(fold->sums ? fold->sums[r * fold->blocks] : 0.0f);
    if (dtype == INT4) sum = vf_fma(of_x, vf_set1(-MIDDLE), sum);
    vf value = fold->first ? sum * scale : vf_fma(sum, scale, vf_load(total));
    if (fold->offset) value = vf_fma(of_x, vf_load(fold->offset + column), value);
    vf_store(total, value);
}

/* Up to AT_ONCE rows from `row` times a block. */
INLINE void few_rows_block(
    int rows, const Linear *job, int64_t panel, int64_t row, const Block *block, float *total, int dtype
) {
    int64_t in = job->in, depth = block->depth;
    const float *x = job->x + row * in + block->start;
    const char *w = feature(panel_of(job, panel), block->start, dtype);
    vf sum[AT_ONCE][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; i++) sum[r][i] = vf_set1(0.0f);
    const int step = dtype == INT4 ? WORD : 1;
    for (int64_t k = 0; k < depth; k += step) {
        const char *here = feature(w, k, dtype);
        /* The next panel follows in memory, so what is fetched ahead is always wanted. */
        __builtin_prefetch(here + AHEAD_BYTES * (dtype == FLOAT32 ? 2 : 1));
        if (dtype == INT4) {
            __builtin_prefetch(here + AHEAD_BYTES + 64);
            NOT_BEFORE; /* the masks */
        }
#pragma GCC unroll 8
        for (int n = 0; n < step; n++) {
            if (dtype == INT4 && k + n >= depth) break;
#pragma GCC unroll 8
            for (int i = 0; i < VECTORS; i++) {
                const char *words = here + i * (int64_t)sizeof(vi);
                vf weight = dtype == INT4 ? nibbles(words, n, job->masks) : weights(here, i * VL, dtype);
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) sum[r][i] = vf_fma(vf_set1(x[r * in + k + n]), weight, sum[r][i]);
            }
        }
    }
    NOT_BEFORE; /* scales and offsets */
    Fold fold = fold_of(job, panel, row, block);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < VECTORS; i++) add_sum(total + r * WIDTH + i * VL, sum[r][i], &fold, r, i * VL, dtype);
}

/* Up to AT_ONCE rows from `row` times one panel; total[r * WIDTH ...]. */
INLINE void few_rows(int rows, const Linear *job, int64_t panel, int64_t row, float *total, int dtype) {
    for (Block block = {0}; next_block(job, &block);) few_rows_block(rows, job, panel, row, &block, total, dtype);
}

/* `rows` rows times TILE columns of a block of `depth` input features. w has WIDTH columns. */
INLINE void tile(
    int rows, int64_t depth, const float *x, int64_t in, const float *w, float *total, const Fold *fold, int64_t row,
    int64_t column
) {
    vf sum[TILE_ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = vf_set1(0.0f);
    for (int64_t k = 0; k < depth; k++) {
        vf low = vf_load(w + k * WIDTH), high = vf_load(w + k * WIDTH + VL);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            vf value = vf_set1(x[r * in + k]);
            sum[r][0] = vf_fma(value, low, sum[r][0]);
            sum[r][1] = vf_fma(value, high, sum[r][1]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++)
            add_sum(total + r * WIDTH + i * VL, sum[r][i], fold, row + r, column + i * VL, fold->dtype);
}

/* All the rows in tiles as equal as they get: a tile of few rows waits for its own sums. */
static void tiles(
    int64_t rows, int64_t depth, const float *x, int64_t in, const float *w, float *total, const Fold *fold
) {
    int64_t count = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t column = 0; column < WIDTH; column += TILE)
        for (int64_t i = 0; i < count; i++) {
            int64_t first = i * rows / count, n = (i + 1) * rows / count - first;
            const float *from = x + first * in, *w_from = w + column;
            float *to = total + first * WIDTH + column;
            switch (n) {
#define TILE_OF(n) case n: tile(n, depth, from, in, w_from, to, fold, first, column); break;
                TILE_OF(1) TILE_OF(2) TILE_OF(3) TILE_OF(4) TILE_OF(5) TILE_OF(6)
#if VL == 16
                TILE_OF(7) TILE_OF(8) TILE_OF(9) TILE_OF(10) TILE_OF(11) TILE_OF(12)
#endif
            }
        }
}

static void finish(const Linear *job, int64_t panel, int64_t first_row, int64_t rows, const float *total) {
    int64_t first = panel * WIDTH, count = smaller(job->out - first, WIDTH);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < count; i += 8) {
            int64_t n = smaller(count - i, 8);
            v8 sum = v8_load(total + r * WIDTH + i);
            if (job->bias) sum += read8(job->bias, first + i, n, job->bias_dtype);
            write8(job->y, (first_row + r) * job->out + first + i, n, job->y_dtype, sum);
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

static void few_rows_chunk(const void *argument, int64_t panel) {
    const Linear *job = argument;
    float total[FEW * WIDTH] __attribute__((aligned(64)));
    if (job->w_dtype == BFLOAT16) few_rows_panel(job, panel, total, BFLOAT16);
    else if (job->w_dtype == INT8) few_rows_panel(job, panel, total, INT8);
    else if (job->w_dtype == INT4) few_rows_panel(job, panel, total, INT4);
    else few_rows_panel(job, panel, total, FLOAT32);
    finish(job, panel, 0, job->rows, total);
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
    else if (dtype == INT8)
        for (int64_t i = 0; i < depth * WIDTH; i += VL) vf_store(wide + i, weights(w, i, INT8));
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
        tiles(rows, block.depth, job->x + first * job->in + block.start, job->in, floats, total, &fold);
    }
    finish(job, panel, first, rows, total);
}

/* What of x is computed before the products: its float32 copy, the sums of its blocks, each or NULL. */
typedef struct {
    const Linear *linear;
    const void *x;
    float *copy, *sums;
    int64_t rows_of_chunk;
    int x_dtype;
} Prepare;

static void prepare_row(const Prepare *job, int64_t row) {
    const Linear *linear = job->linear;
    int64_t first = row * linear->in;
    v8 units = linear->w_dtype == INT4 ? v8_load(UNITS) : v8_set1(1.0f);
    for (Block block = {0}; next_block(linear, &block);) {
        float lanes[LANES] = {0};
        for (int64_t k = 0; k < block.depth; k += 8) {
            int64_t element = first + block.start + k, n = smaller(block.depth - k, 8);
            v8 x = read8(job->x, element, n, job->x_dtype);
            float *lane = lanes + k % LANES;
            if (job->sums) v8_store(lane, v8_load(lane) + x);
            if (job->copy) write8(job->copy, element, n, FLOAT32, x * units);
        }
        if (job->sums) job->sums[row * linear->blocks + block.index] = sum_lanes(lanes);
    }
}

static void prepare_chunk(const void *argument, int64_t chunk) {
    const Prepare *job = argument;
    int64_t end = smaller(job->linear->rows, (chunk + 1) * job->rows_of_chunk);
    for (int64_t row = chunk * job->rows_of_chunk; row < end; row++) prepare_row(job, row);
}

/* x, w, scale or NULL, offset or NULL, bias or NULL, y; rows, in, out, input features of a group (without a scale: in);
 * dtypes of x, w, bias and y; threads. Returns 0, or -1 without memory. */
int64_t tandem_linear(const Arg *a) {
    Linear job = {
        .x = a[0].p, .w = a[1].p, .scale = a[2].p, .offset = a[3].p, .bias = a[4].p, .y = a[5].p,
        .rows = a[6].i, .in = a[7].i, .out = a[8].i, .group = a[9].i,
        .masks = MASKS, .w_dtype = (int)a[11].i, .bias_dtype = (int)a[12].i, .y_dtype = (int)a[13].i,
    };
    job.panels = (job.out + WIDTH - 1) / WIDTH;
    job.groups = job.in / job.group;
    job.blocks = job.groups * ((job.group + BLOCK - 1) / BLOCK);
    int64_t threads = job.rows * job.in * job.out < 65536 ? 1 : a[14].i;
    Prepare prepare = {.linear = &job, .x = a[0].p, .rows_of_chunk = strip_of(job.in), .x_dtype = (int)a[10].i};
    if (prepare.x_dtype != FLOAT32 || job.w_dtype == INT4) {
        job.x = prepare.copy = scratch(SCRATCH_LINEAR, (size_t)(job.rows * job.in) * sizeof(float));
        if (!prepare.copy) return -1;
    }
    if (job.offset || job.w_dtype == INT4) {
        job.sums = prepare.sums = scratch(SCRATCH_SUMS, (size_t)(job.rows * job.blocks) * sizeof(float));
        if (!prepare.sums) return -1;
    }
    if (prepare.copy || prepare.sums)
        team_run(threads, (job.rows + prepare.rows_of_chunk - 1) / prepare.rows_of_chunk, prepare_chunk, &prepare);
    if (job.rows <= FEW) team_run(threads, job.panels, few_rows_chunk, &job);
    else team_run(threads, job.panels * ((job.rows + STRIP - 1) / STRIP), strip_chunk, &job);
    return 0;
}
