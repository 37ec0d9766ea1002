/* y = x W^T + bias of bfloat16 rows, by AVX-512's dot products of bfloat16 pairs; order of sums and integers as linear.h says.
 *
 * An instruction takes two input features of 16 outputs. So panels are of pairs, [ceil(out / WIDTH)][ceil(in / 2)][WIDTH][2],
 * filled up with zeros, and the weight of a bfloat16 panel is never widened. Integers, being small, are bfloat16 without loss:
 *
 * INT8  one 64-byte vector is a pair of all the panel's outputs, in the order 0-3, 16-19, 4-7, 20-23 ...: unpacking what a
 *       table says of their bytes gives outputs 0-15 and 16-31.
 * INT4  [ceil(out / WIDTH)][ceil(in / 8)][WIDTH] words, whose lower half holds q + 8 of features 0, 2, 4, 6, from the lowest
 *       bits up, and whose upper half of 1, 3, 5, 7: shifted down, the halves of a word index a table.
 * FP8   as INT8, with a table of its own.
 * FP6   as linear.c says; shifted down, the halves of a word index a table.
 *
 * Few rows read the weight as it lies in memory. Of more rows, integers are made bfloat16 a block at a time, and x is laid out
 * as the tiles of rows read it.
 */
#include "linear.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VBMI__)

enum {
    FEW = 8, /* rows up to which the weight is read as it lies */
    TILE_ROWS = 12,
    TILES = STRIP / TILE_ROWS,
    PAIRS = WORD / 2, /* in a word of INT4; of FP6 twice as many */
};

typedef __m512i Bits;

INLINE Bits bits_load(const void *p) { return _mm512_loadu_si512(p); }

/* What makes integers and small floats bfloat16: the lower and upper bytes of 0 to 127 and of e4m3 without its sign; -8 to 7,
 * twice; e3m2. */
static uint8_t LOWER[128], UPPER[128], FP8_LOWER[128], FP8_UPPER[128];
static uint16_t NIBBLES[32], SIXES[64];

static uint16_t bfloat16_of(float number) {
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return (uint16_t)(bits >> 16);
}

/* The number of an exponent and a mantissa of so many bits. */
static float small_float(int bits, int mantissa_bits, int bias) {
    int exponent = bits >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
    if (exponent) mantissa += 1 << mantissa_bits;
    return ldexpf((float)mantissa, (exponent ? exponent : 1) - bias - mantissa_bits);
}

__attribute__((constructor)) static void make_tables(void) {
    for (int i = 0; i < 128; i++) {
        uint16_t integer = bfloat16_of((float)i), e4m3 = bfloat16_of(small_float(i, 3, 7));
        LOWER[i] = (uint8_t)integer, UPPER[i] = (uint8_t)(integer >> 8);
        FP8_LOWER[i] = (uint8_t)e4m3, FP8_UPPER[i] = (uint8_t)(e4m3 >> 8);
        NIBBLES[i % 32] = bfloat16_of((float)(i % 16 - 8));
        SIXES[i % 64] = bfloat16_of((i & 32 ? -1.0f : 1.0f) * small_float(i & 31, 2, 3));
    }
}

/* The bytes of a pair of a panel. */
INLINE int64_t pair_bytes(int dtype) {
    return dtype == INT4 ? WIDTH : dtype == FP6 ? WIDTH * 3 / 2 : dtype == BFLOAT16 ? WIDTH * 4 : WIDTH * 2;
}

/* Pairs that are read together. */
INLINE int step_of(int dtype) { return dtype == FP6 ? 2 * PAIRS : dtype == INT4 ? PAIRS : 1; }

INLINE const char *panel_of(const Linear *job, int64_t panel) {
    int64_t features = step_of(job->w_dtype) > 1 ? whole_words(job->in, job->w_dtype) : job->in;
    return (const char *)job->w + panel * (features / 2) * pair_bytes(job->w_dtype);
}

/* Number i of each half word that begins at w, in its lowest 6 bits. */
INLINE Bits sixes(const char *w, int i) {
    Bits bits = bits_load(w + i / 3 * 128);
    if (i == 2 || i == 5) {
        Bits upper = _mm512_srli_epi16(bits_load(w + 256), i == 2 ? 8 : 10);
        return _mm512_or_si512(_mm512_srli_epi16(bits, 12), _mm512_and_si512(upper, _mm512_set1_epi16(48)));
    }
    return i % 3 ? _mm512_srli_epi16(bits, 6) : bits;
}

/* Pair i of those that begin at w, as bfloat16. */
INLINE void pair_of(const char *w, int i, Bits pair[2], int dtype) {
    if (dtype == INT4) {
        Bits nibbles = bits_load(NIBBLES);
        pair[0] = _mm512_permutexvar_epi16(_mm512_srli_epi16(bits_load(w), 4 * i), nibbles);
        pair[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(bits_load(w + 64), 4 * i), nibbles);
    } else if (dtype == FP6) {
        Bits low = bits_load(SIXES), high = bits_load(SIXES + 32);
        pair[0] = _mm512_permutex2var_epi16(low, sixes(w, i), high);
        pair[1] = _mm512_permutex2var_epi16(low, sixes(w + 64, i), high);
    } else if (dtype == INT8 || dtype == FP8) {
        const uint8_t *lowers = dtype == INT8 ? LOWER : FP8_LOWER, *uppers = dtype == INT8 ? UPPER : FP8_UPPER;
        /* a table is looked up by the lowest 7 bits */
        Bits bytes = bits_load(w + i * 64), size = dtype == INT8 ? _mm512_abs_epi8(bytes) : bytes;
        Bits lower = _mm512_permutex2var_epi8(bits_load(lowers), size, bits_load(lowers + 64));
        Bits upper = _mm512_permutex2var_epi8(bits_load(uppers), size, bits_load(uppers + 64));
        upper = _mm512_or_si512(upper, _mm512_and_si512(bytes, _mm512_set1_epi8((char)0x80)));
        pair[0] = _mm512_unpacklo_epi8(lower, upper);
        pair[1] = _mm512_unpackhi_epi8(lower, upper);
    } else {
        pair[0] = bits_load(w + i * 128);
        pair[1] = bits_load(w + i * 128 + 64);
    }
}

/* `rows` rows times `pairs` pairs of a block: x[r * row_stride + k * pair_stride] is a pair of row r. `ahead` bytes on, the
 * weight is fetched, into the second cache: the first waits for too few lines at once. wide: where the pairs are written to as
 * bfloat16, or NULL. */
INLINE void tile(
    int rows, int64_t pairs, const int32_t *x, int64_t row_stride, int64_t pair_stride, const char *w, int64_t ahead,
    char *wide, float *total, const Fold *fold, int64_t row, int dtype, int scaled
) {
    const int step = step_of(dtype);
    vf sum[TILE_ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = vf_set1(0.0f);
    for (int64_t k = 0; k < pairs; k += step) {
        const char *here = w + k * pair_bytes(dtype);
#pragma GCC unroll 8
        for (int line = 0; line < step * pair_bytes(dtype) / 64; line++) __builtin_prefetch(here + ahead + line * 64, 0, 2);
#pragma GCC unroll 8
        for (int n = 0; n < step; n++) {
            if (step > 1 && k + n >= pairs) break;
            Bits pair[2];
            pair_of(here, n, pair, dtype);
            if (wide) {
                _mm512_store_si512(wide + (k + n) * 128, pair[0]);
                _mm512_store_si512(wide + (k + n) * 128 + 64, pair[1]);
            }
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                __m512bh value = (__m512bh)_mm512_set1_epi32(x[r * row_stride + (k + n) * pair_stride]);
#pragma GCC unroll 2
                for (int i = 0; i < 2; i++)
                    sum[r][i] = (vf)_mm512_dpbf16_ps((__m512)sum[r][i], (__m512bh)pair[i], value);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++)
            add_sum(total + r * WIDTH + i * VL, sum[r][i], fold, row + r, i * VL, scaled, 0);
}

/* Up to FEW rows times a panel as it lies. */
INLINE void few_rows(int rows, const Linear *job, int64_t panel, float *total, int dtype) {
    const char *w = panel_of(job, panel);
    for (Block block = {0}; next_block(job, &block);) {
        Fold fold = fold_of(job, panel, 0, &block);
        const int32_t *x = (const int32_t *)job->x + block.start / 2;
        const char *from = w + block.start / 2 * pair_bytes(dtype);
        int64_t pairs = block.depth / 2;
        tile(rows, pairs, x, job->in / 2, 1, from, AHEAD_BYTES, NULL, total, &fold, 0, dtype, dtype != BFLOAT16);
    }
}

static void few_rows_chunk(const void *argument, int64_t chunk) {
    const Linear *job = argument;
    float total[FEW * WIDTH] __attribute__((aligned(64)));
    for (int64_t panel = first_panel(job, chunk); panel < first_panel(job, chunk + 1); panel++) {
        switch (job->rows * 8 + job->w_dtype) {
#define FEW_OF(n, dtype) case n * 8 + dtype: few_rows(n, job, panel, total, dtype); break;
#define FEW_ROWS(n) FEW_OF(n, BFLOAT16) FEW_OF(n, INT8) FEW_OF(n, INT4) FEW_OF(n, FP8) FEW_OF(n, FP6)
            FEW_ROWS(1) FEW_ROWS(2) FEW_ROWS(3) FEW_ROWS(4) FEW_ROWS(5) FEW_ROWS(6) FEW_ROWS(7) FEW_ROWS(8)
        }
        finish(job, panel, 0, job->rows, total);
    }
}

/* The rows of a strip in tiles as equal as they get: a tile of few rows waits for its own sums. */
typedef struct {
    int64_t first, rows, count;
} Strip;

INLINE Strip strip_at(const Linear *job, int64_t index) {
    int64_t first = index * STRIP, rows = smaller(job->rows - first, STRIP);
    return (Strip){first, rows, (rows + TILE_ROWS - 1) / TILE_ROWS};
}

/* The first row of a tile, from the strip's. */
INLINE int64_t tile_start(const Strip *strip, int64_t index) { return index * strip->rows / strip->count; }

/* A tile of a strip, as it is laid out. */
static void strip_tile(
    int rows, int64_t pairs, const int32_t *x, const char *w, int64_t ahead, float *total, const Fold *fold, int64_t row,
    int scaled
) {
    switch (rows) {
#define TILE_OF(n) case n: tile(n, pairs, x, 1, n, w, ahead, NULL, total, fold, row, BFLOAT16, scaled); break;
        TILE_OF(1) TILE_OF(2) TILE_OF(3) TILE_OF(4) TILE_OF(5) TILE_OF(6)
        TILE_OF(7) TILE_OF(8) TILE_OF(9) TILE_OF(10) TILE_OF(11) TILE_OF(12)
    }
}

/* The same, which writes what it reads as bfloat16 to `wide`. */
static void widening_tile(
    int rows, int64_t pairs, const int32_t *x, const char *w, char *wide, float *total, const Fold *fold, int64_t row,
    int dtype
) {
    switch (rows * 8 + dtype) {
#define WIDEN_OF(n, dtype) \
    case n * 8 + dtype: tile(n, pairs, x, 1, n, w, AHEAD_BYTES, wide, total, fold, row, dtype, 1); break;
#define WIDEN(n) WIDEN_OF(n, INT8) WIDEN_OF(n, INT4) WIDEN_OF(n, FP8) WIDEN_OF(n, FP6)
        WIDEN(1) WIDEN(2) WIDEN(3) WIDEN(4) WIDEN(5) WIDEN(6)
        WIDEN(7) WIDEN(8) WIDEN(9) WIDEN(10) WIDEN(11) WIDEN(12)
    }
}

/* A block of a panel. Of bfloat16 the last tile fetches the next block, which follows in memory as the next panel does, and
 * finds its own in the cache; of fewer bits the first fetches it, and makes bfloat16 of this one for the others. */
INLINE void strip_block(
    const Linear *job, const Strip *strip, const Block *block, const char *w, char *wide, const Fold *fold, float *total
) {
    int64_t pairs = block->depth / 2;
    int scaled = job->w_dtype != BFLOAT16;
    for (int64_t i = 0; i < strip->count; i++) {
        int64_t ahead = scaled ? 0 : i == 0 ? AHEAD_BYTES : i == strip->count - 1 ? pairs * pair_bytes(BFLOAT16) : 0;
        int64_t row = tile_start(strip, i), rows = tile_start(strip, i + 1) - row;
        const int32_t *x = (const int32_t *)job->x + (strip->first + row) * (job->in / 2) + rows * (block->start / 2);
        float *to = total + row * WIDTH;
        if (scaled && i == 0) widening_tile((int)rows, pairs, x, w, wide, to, fold, row, job->w_dtype);
        else strip_tile((int)rows, pairs, x, scaled ? wide : w, ahead, to, fold, row, scaled);
    }
}

static void strip_panel(const Linear *job, int64_t index, int64_t panel) {
    Strip strip = strip_at(job, index);
    float total[STRIP * WIDTH] __attribute__((aligned(64)));
    char wide[BLOCK / 2 * 128] __attribute__((aligned(64)));
    const char *w = panel_of(job, panel);
    for (Block block = {0}; next_block(job, &block);) {
        const char *from = w + block.start / 2 * pair_bytes(job->w_dtype);
        Fold fold = fold_of(job, panel, strip.first, &block);
        strip_block(job, &strip, &block, from, wide, &fold, total);
    }
    finish(job, panel, strip.first, strip.rows, total);
}

/* One strip: some panels. More: one panel, of which all strips come after each other. */
static void strip_chunk(const void *argument, int64_t chunk) {
    const Linear *job = argument;
    int64_t strips = (job->rows + STRIP - 1) / STRIP;
    if (strips > 1) strip_panel(job, chunk % strips, chunk / strips);
    else
        for (int64_t panel = first_panel(job, chunk); panel < first_panel(job, chunk + 1); panel++) strip_panel(job, 0, panel);
}

static int64_t product_chunks(const Linear *job) {
    int64_t strips = (job->rows + STRIP - 1) / STRIP;
    return strips > 1 ? job->panels * strips : job->chunks;
}

static void product_chunk(const void *argument, int64_t chunk) {
    const Linear *job = argument;
    if (job->rows <= FEW) few_rows_chunk(job, chunk);
    else strip_chunk(job, chunk);
}

/* Pair k of row first + r goes to to[r * row_stride + k * pair_stride], `to` being where the first of them goes. */
INLINE void copy_pairs(const Linear *job, int64_t first, int64_t rows, int64_t row_stride, int64_t pair_stride) {
    int64_t groups = job->in - job->width < 2 ? 1 : job->groups, given = job->width / groups, group = job->in / groups;
    int32_t *to = (int32_t *)job->copy + first * (job->in / 2);
    const uint16_t *x[TILE_ROWS];
    for (int64_t r = 0; r < rows; r++) x[r] = (const uint16_t *)job->source + source_row(job, first + r) * job->width;
    for (int64_t g = 0; g < groups; g++, to += group / 2 * pair_stride) {
        for (int64_t k = 0; k < given / 2; k++)
            for (int64_t r = 0; r < rows; r++)
                memcpy(to + r * row_stride + k * pair_stride, x[r] + g * given + 2 * k, sizeof *to);
        for (int64_t k = given / 2; k < group / 2; k++)
            for (int64_t r = 0; r < rows; r++)
                to[r * row_stride + k * pair_stride] = 2 * k < given ? x[r][g * given + 2 * k] : 0; /* and 0 */
    }
}

static int64_t prepare_chunks(const Linear *job) {
    return job->rows <= FEW ? 1 : (job->rows + STRIP - 1) / STRIP * TILES;
}

/* What of x is computed before the products: its copy, pairs of rows or of tiles, and the sums of its blocks. */
static void prepare_chunk(const void *argument, int64_t chunk) {
    const Linear *job = argument;
    int64_t first = 0, rows = job->rows;
    if (rows > FEW) {
        Strip strip = strip_at(job, chunk / TILES);
        if (chunk % TILES >= strip.count) return;
        first = strip.first + tile_start(&strip, chunk % TILES);
        rows = strip.first + tile_start(&strip, chunk % TILES + 1) - first;
        if (rows == TILE_ROWS) copy_pairs(job, first, TILE_ROWS, 1, TILE_ROWS);
        else copy_pairs(job, first, rows, 1, rows);
    } else if (job->copy) {
        copy_pairs(job, 0, rows, job->in / 2, 1);
    }
    for (int64_t row = first; job->sums && row < first + rows; row++) {
        const uint16_t *x = (const uint16_t *)job->source + source_row(job, row) * job->width;
        sum_blocks(job, x, BFLOAT16, job->sums + row * job->blocks);
    }
}

static int64_t run(Linear *jobs, int64_t count, int64_t threads) {
    int copied = jobs->pairs != NULL, summed = jobs->offset != NULL;
    for (Linear *job = jobs; job < jobs + count; job++) {
        if (job->groups == 1) job->in = job->group = job->width + job->width % 2;
        copied |= job->rows > FEW || job->in != job->width;
    }
    if (make_room(jobs, count, copied ? sizeof(uint16_t) : 0, summed)) return -1;
    cut_panels(jobs, count, threads);
    if (copied || summed) run_jobs(preparing_threads(jobs, count, threads), jobs, count, prepare_chunks, prepare_chunk);
    run_jobs(threads, jobs, count, product_chunks, product_chunk);
    return 0;
}

/* Arguments as linear_of takes them; x is bfloat16, w of pairs. Returns 0, or -1 without memory. */
int64_t tandem_linear_pairs(const Arg *a) {
    Linear job = linear_of(a);
    return job.rows ? run(&job, 1, linear_threads(a)) : 0;
}

/* Arguments as experts_of takes them; x is bfloat16, w of pairs. Returns 0, or -1 without memory. */
int64_t tandem_grouped_linear_pairs(const Arg *a) {
    Linear jobs[MAX_JOBS];
    int64_t count = experts_of(a, jobs);
    return count ? run(jobs, count, linear_threads(a)) : 0;
}

#else

int64_t tandem_linear_pairs(const Arg *a) { return (void)a, -1; }

int64_t tandem_grouped_linear_pairs(const Arg *a) { return (void)a, -1; }

#endif
