/* y = x W^T + bias of int8 weights and of rows that become int8 too, as kv_format.h quantizes a row. Sums of integers have no
 * order: the bits are the same ones for any number of rows and on every instruction set, and those of kernels/cuda/linear.py.
 *
 *     y = sum of x_q w_q * scale of the output * scale of the row + bias
 *
 * The weight is packed [ceil(out / WIDTH)][ceil(in / WORD) * WORD / 4][WIDTH][4], bytes of q + 128, filled up with anything: an
 * instruction of AVX-512 VNNI multiplies four unsigned bytes of 16 outputs by four signed ones. So 128 times the sum of x_q is
 * taken from each sum. What overflows on the way is no matter, as the sum itself fits into 32 bits.
 */
#include "kv_format.h"
#include "linear.h"

enum {
    TILE_ROWS = VL == 16 ? 12 : 3, /* that are computed at once */
    FOUR = 4,                      /* bytes that are multiplied together */
};

/* Of a row, in Linear.sums. */
typedef struct {
    float scale;
    int32_t sum;
} Row;

INLINE vu add_products(vu sum, vu weights, int32_t x) {
#if defined(__AVX512VNNI__)
    return (vu)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(x));
#else
#pragma GCC unroll 4
    for (int i = 0; i < FOUR; i++) sum += ((weights >> 8 * i) & 255u) * (uint32_t)(int8_t)(x >> 8 * i);
    return sum;
#endif
}

/* `rows` rows from `row` times a panel. `ahead` bytes on, the weight is fetched into the second cache. */
INLINE void tile(int rows, const Linear *job, int64_t panel, int64_t row, int64_t ahead, float *total) {
    int64_t fours = job->in / FOUR;
    const char *w = (const char *)job->w + panel * job->in * WIDTH;
    const int32_t *x = (const int32_t *)job->x + row * fours;
    vu sum[TILE_ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++) sum[r][i] = (vu){0};
    for (int64_t k = 0; k < fours; k++) {
        const char *here = w + k * WIDTH * FOUR;
        __builtin_prefetch(here + ahead, 0, 2);
        __builtin_prefetch(here + ahead + 64, 0, 2);
        vu weights[VECTORS];
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++) weights[i] = (vu)vi_load(here + i * (int64_t)sizeof(vu));
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int i = 0; i < VECTORS; i++) sum[r][i] = add_products(sum[r][i], weights[i], x[r * fours + k]);
    }
    const float *scale = job->scale + panel * WIDTH;
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        const Row *of = (const Row *)job->sums + row + r;
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++) {
            vi exact = (vi)(sum[r][i] - 128u * (uint32_t)of->sum);
            vf_store(total + r * WIDTH + i * VL, __builtin_convertvector(exact, vf) * vf_load(scale + i * VL) * of->scale);
        }
    }
}

/* A strip of rows times a panel, in tiles as equal as they get; the first fetches what follows in memory. */
static void strip_panel(const Linear *job, int64_t first, int64_t panel) {
    float total[TILE_ROWS * WIDTH] __attribute__((aligned(64)));
    int64_t strip = smaller(job->rows - first, STRIP), count = (strip + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t i = 0; i < count; i++) {
        int64_t row = first + i * strip / count, rows = first + (i + 1) * strip / count - row;
        switch (rows) {
#define TILE_OF(n) case n: tile(n, job, panel, row, i ? 0 : AHEAD_BYTES, total); break;
            TILE_OF(1) TILE_OF(2) TILE_OF(3)
#if VL == 16
            TILE_OF(4) TILE_OF(5) TILE_OF(6) TILE_OF(7) TILE_OF(8) TILE_OF(9) TILE_OF(10) TILE_OF(11) TILE_OF(12)
#endif
        }
        finish(job, panel, row, rows, total);
    }
}

static int64_t strips_of(const Linear *job) { return (job->rows + STRIP - 1) / STRIP; }

static int64_t product_chunks(const Linear *job) {
    return strips_of(job) > 1 ? job->panels * strips_of(job) : job->chunks;
}

/* One strip: some panels. More: one panel, of which all strips come after each other. */
static void product_chunk(const void *argument, int64_t chunk) {
    const Linear *job = argument;
    int64_t strips = strips_of(job);
    if (strips > 1) strip_panel(job, chunk % strips * STRIP, chunk / strips);
    else
        for (int64_t panel = first_panel(job, chunk); panel < first_panel(job, chunk + 1); panel++) strip_panel(job, 0, panel);
}

static int64_t prepare_chunks(const Linear *job) { return (job->rows + strip_of(job->in) - 1) / strip_of(job->in); }

static void prepare_chunk(const void *argument, int64_t chunk) {
    const Linear *job = argument;
    int64_t strip = strip_of(job->in), end = smaller(job->rows, (chunk + 1) * strip);
    for (int64_t row = chunk * strip; row < end; row++) {
        const void *x = at(job->source, source_row(job, row) * job->width, job->x_dtype);
        int8_t *copy = (int8_t *)job->copy + row * job->in;
        memset(copy + job->width, 0, (size_t)(job->in - job->width));
        Row of = {quantize_row(x, job->width, job->x_dtype, (char *)copy, INT8), 0};
        for (int64_t k = 0; k < job->width; k++) of.sum += copy[k];
        memcpy((Row *)job->sums + row, &of, sizeof of);
    }
}

static int64_t run(Linear *jobs, int64_t count, int64_t threads) {
    for (Linear *job = jobs; job < jobs + count; job++) {
        job->in = job->group = whole_words(job->width, INT8);
        job->blocks = sizeof(Row) / sizeof(float);
    }
    if (make_room(jobs, count, sizeof(int8_t), 1)) return -1;
    cut_panels(jobs, count, threads);
    run_jobs(preparing_threads(jobs, count, threads), jobs, count, prepare_chunks, prepare_chunk);
    run_jobs(threads, jobs, count, product_chunks, product_chunk);
    return 0;
}

/* Arguments as linear_of takes them; w is int8 of fours, with a scale for each output. Returns 0, or -1 without memory. */
int64_t tandem_linear_integers(const Arg *a) {
    Linear job = linear_of(a);
    return job.rows ? run(&job, 1, linear_threads(a)) : 0;
}

/* Arguments as experts_of takes them, w as above. Returns 0, or -1 without memory. */
int64_t tandem_grouped_linear_integers(const Arg *a) {
    Linear jobs[MAX_JOBS];
    int64_t count = experts_of(a, jobs);
    return count ? run(jobs, count, linear_threads(a)) : 0;
}
