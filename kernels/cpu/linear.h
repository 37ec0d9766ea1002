/* What the linears share: the job, the blocks that sums are made of, and how a sum becomes part of the total.
 *
 * An output is summed in one order, whatever rows are beside it: BLOCKs of input features from zero; the blocks added in
 * order; then the bias. Within a block by fused multiply-adds, pair of features by pair, the second of a pair first: the order
 * of AVX-512's dot product of bfloat16 pairs, whose bits are these (measured; but denormals, which it takes for 0).
 *
 * Integers, or small floats, q stand for w = scale * q + offset, of a scale and perhaps an offset for each group of input
 * features and output, packed [ceil(out / WIDTH)][groups][WIDTH]. A block then ends with its group at the latest, and is added as
 *
 *     total = fma(sum over the block of x q, scale, total)
 *     total = fma(sum over the block of x, offset, total)
 *
 * The sum of x is made once for each row, in LANES lanes. A group that is no whole number of words is filled up with features
 * whose x is 0, which changes no sum.
 *
 * A mixture of experts is a job for each expert that has rows: the ops compute a list of jobs, most often of one.
 */
#ifndef TANDEM_LINEAR_H
#define TANDEM_LINEAR_H

#include "simd.h"
#include "team.h"

enum {
    WIDTH = 32, /* output features of a panel */
    VECTORS = WIDTH / VL,
    BLOCK = 256,        /* input features summed from zero, at most */
    STRIP = 240,        /* rows of a chunk, where there are more than a few */
    WORD = 8,           /* input features of a word; of FP6 twice as many */
    AHEAD_BYTES = 6144, /* how far ahead of its use a weight is fetched */
    MAX_JOBS = 256,     /* of an op: its experts */
};

typedef struct {
    const void *source; /* x as the op was given it: rows of `width` features, */
    const void *x;      /* and as it is multiplied: `copy`, or if that is NULL the source itself */
    void *copy;
    float *sums; /* of x: [rows][blocks], or NULL */
    const void *w;
    const float *scale, *offset; /* [panels][groups][WIDTH], or NULL */
    const void *bias;
    void *y;
    const int32_t *pairs; /* where the rows go in y, and pair / choices comes from in source; NULL = in order */
    int64_t choices;
    const float *factors; /* of the rows of y, before they are rounded, or NULL */
    int64_t rows, width, in, out, panels; /* width, given: as source has them; in, group: filled up */
    int64_t given, group, groups, blocks; /* input features of a group, twice; groups and blocks of a row */
    int64_t chunks; /* of panels, with few rows */
    int x_dtype, w_dtype, bias_dtype, y_dtype;
    const uint32_t (*masks)[16]; /* of INT4 words, as if they were not known */
} Linear;

/* Input features that are summed from zero. */
typedef struct {
    int64_t start, depth, group, index;
} Block;

/* How the sums of a block become part of the total. Pointers are to the first of the rows and columns meant. */
typedef struct {
    const float *scale, *offset, *sums;
    int64_t blocks;
    int first;
} Fold;

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int is_scaled(int dtype) { return dtype == INT8 || dtype == INT4 || dtype == FP8 || dtype == FP6; }

/* Input features of whole words. */
INLINE int64_t whole_words(int64_t features, int dtype) {
    int64_t word = dtype == FP6 ? 2 * WORD : WORD;
    return (features + word - 1) / word * word;
}

/* Of the ops' arguments: x, w, scale or NULL, offset or NULL, bias or NULL, y; rows, in, out, input features of a group
 * (without a scale: in); dtypes of x, w, bias and y; threads. */
INLINE Linear linear_of(const Arg *a) {
    Linear job = {
        .source = a[0].p, .w = a[1].p, .scale = a[2].p, .offset = a[3].p, .bias = a[4].p, .y = a[5].p,
        .rows = a[6].i, .width = a[7].i, .out = a[8].i, .given = a[9].i,
        .x_dtype = (int)a[10].i, .w_dtype = (int)a[11].i, .bias_dtype = (int)a[12].i, .y_dtype = (int)a[13].i,
    };
    job.panels = (job.out + WIDTH - 1) / WIDTH;
    job.groups = job.width / job.given;
    job.group = job.groups == 1 ? job.given : whole_words(job.given, job.w_dtype);
    job.in = job.groups * job.group;
    job.blocks = job.groups * ((job.group + BLOCK - 1) / BLOCK);
    return job;
}

INLINE int64_t linear_threads(const Arg *a) { return a[6].i * a[7].i * a[8].i < 65536 ? 1 : a[14].i; }

/* The jobs of a mixture of experts, and how many there are. After linear_of's arguments, whose rows are those of y and whose
 * weight and bias are of all experts: the pairs of experts, how many each has and where they begin; experts; rows of y for each of x;
 * what rows of y are multiplied by, or NULL; bytes of an expert's weight. */
INLINE int64_t experts_of(const Arg *a, Linear *jobs) {
    const int32_t *pairs = a[15].p, *counts = a[16].p, *starts = a[17].p;
    int64_t count = 0;
    for (int64_t expert = 0; expert < a[18].i; expert++) {
        if (!counts[expert]) continue;
        Linear *job = &jobs[count++];
        *job = linear_of(a);
        int64_t scales = expert * job->panels * job->groups * WIDTH;
        job->w = (const char *)job->w + expert * a[21].i;
        if (job->scale) job->scale += scales;
        if (job->offset) job->offset += scales;
        if (job->bias) job->bias = at(job->bias, expert * job->out, job->bias_dtype);
        job->rows = counts[expert], job->pairs = pairs + starts[expert], job->choices = a[19].i, job->factors = a[20].p;
    }
    return count;
}

INLINE int64_t source_row(const Linear *job, int64_t row) { return job->pairs ? job->pairs[row] / job->choices : row; }

/* Memory for what is made of x: a copy whose features are of `size` bytes, 0 = none, and sums. The jobs are of one kind.
 * Returns 0, or -1 without memory. */
INLINE int make_room(Linear *jobs, int64_t count, size_t size, int with_sums) {
    size_t rows = 0;
    for (int64_t i = 0; i < count; i++) rows += (size_t)jobs[i].rows;
    char *copy = size ? scratch(SCRATCH_LINEAR, rows * (size_t)jobs->in * size) : NULL;
    float *sums = with_sums ? scratch(SCRATCH_SUMS, rows * (size_t)jobs->blocks * sizeof *sums) : NULL;
    if ((size && !copy) || (with_sums && !sums)) return -1;
    for (Linear *job = jobs; job < jobs + count; job++) {
        job->x = job->copy = copy, job->sums = sums;
        if (!copy) job->x = job->source;
        else copy += (size_t)(job->rows * job->in) * size;
        if (sums) sums += job->rows * job->blocks;
    }
    return 0;
}

/* For what is made of x before the products: a helper is not woken for less than it can do meanwhile. */
INLINE int64_t preparing_threads(const Linear *jobs, int64_t count, int64_t threads) {
    int64_t features = 0;
    for (int64_t i = 0; i < count; i++) features += jobs[i].rows * jobs[i].in;
    return smaller(threads, 1 + features / 16384);
}

/* Panels of a chunk follow each other in memory, and what is fetched ahead of one is the next: measured, a step of one row
 * takes 0.6 to 0.9 of what it does with a chunk for each panel. A few chunks for each thread let the faster one do more. */
INLINE void cut_panels(Linear *jobs, int64_t count, int64_t threads) {
    int64_t each = 3 * threads / count;
    for (int64_t i = 0; i < count; i++) jobs[i].chunks = smaller(jobs[i].panels, each > 3 ? each : 3);
}

INLINE int64_t first_panel(const Linear *job, int64_t chunk) { return chunk * job->panels / job->chunks; }

typedef struct {
    const Linear *jobs;
    const int64_t *ends; /* of the jobs' chunks */
    Chunk run;
} Jobs;

static void chunk_of_jobs(const void *argument, int64_t chunk) {
    const Jobs *all = argument;
    int64_t job = 0;
    while (chunk >= all->ends[job]) job++;
    all->run(&all->jobs[job], job ? chunk - all->ends[job - 1] : chunk);
}

/* Runs the chunks of every job, of which it has as many as `chunks` says. */
INLINE void run_jobs(int64_t threads, const Linear *jobs, int64_t count, int64_t (*chunks)(const Linear *), Chunk run) {
    if (count == 1) {
        team_run(threads, chunks(jobs), run, jobs);
        return;
    }
    int64_t ends[MAX_JOBS], end = 0;
    for (int64_t i = 0; i < count; i++) ends[i] = end += chunks(&jobs[i]);
    Jobs all = {jobs, ends, run};
    team_run(threads, end, chunk_of_jobs, &all);
}

/* Moves to the block after this one, from {0} to the first. 0 behind the last. */
INLINE int next_block(const Linear *job, Block *block) {
    block->index += block->depth > 0;
    block->start += block->depth;
    block->group += block->depth > 0 && block->start == (block->group + 1) * job->group;
    block->depth = smaller(BLOCK, (block->group + 1) * job->group - block->start);
    return block->start < job->in;
}

INLINE Fold fold_of(const Linear *job, int64_t panel, int64_t row, const Block *block) {
    int64_t element = (panel * job->groups + block->group) * WIDTH;
    return (Fold){
        job->scale ? job->scale + element : NULL,
        job->offset ? job->offset + element : NULL,
        job->sums ? job->sums + row * job->blocks + block->index : NULL,
        job->blocks,
        block->start == 0,
    };
}

/* Adds the sum of row r and the columns from `column` to their total. middle: what the integers are too large by. */
INLINE void add_sum(float *total, vf sum, const Fold *fold, int64_t r, int64_t column, int scaled, float middle) {
    if (!scaled) {
        vf_store(total, fold->first ? sum : vf_load(total) + sum);
        return;
    }
    vf scale = vf_load(fold->scale + column), of_x = vf_set1(fold->sums ? fold->sums[r * fold->blocks] : 0.0f);
    if (middle) sum = vf_fma(of_x, vf_set1(-middle), sum);
    vf value = fold->first ? sum * scale : vf_fma(sum, scale, vf_load(total));
    if (fold->offset) value = vf_fma(of_x, vf_load(fold->offset + column), value);
    vf_store(total, value);
}

/* Totals of rows from `first_row` and a panel to y. */
INLINE void finish(const Linear *job, int64_t panel, int64_t first_row, int64_t rows, const float *total) {
    int64_t first = panel * WIDTH, count = smaller(job->out - first, WIDTH);
    for (int64_t r = 0; r < rows; r++) {
        int64_t row = job->pairs ? job->pairs[first_row + r] : first_row + r;
        for (int64_t i = 0; i < count; i += 8) {
            int64_t n = smaller(count - i, 8);
            v8 sum = v8_load(total + r * WIDTH + i);
            if (job->bias) sum += read8(job->bias, first + i, n, job->bias_dtype);
            if (job->factors) sum *= job->factors[row];
            write8(job->y, row * job->out + first + i, n, job->y_dtype, sum);
        }
    }
}

/* The sums of a row's blocks. x: the row, as it was given. */
INLINE void sum_blocks(const Linear *job, const void *x, int x_dtype, float *sums) {
    Linear given = *job;
    given.in = job->width, given.group = job->given;
    for (Block block = {0}; next_block(&given, &block);) {
        float lanes[LANES] = {0};
        for (int64_t k = 0; k < block.depth; k += 8) {
            float *lane = lanes + k % LANES;
            v8_store(lane, v8_load(lane) + read8(x, block.start + k, smaller(block.depth - k, 8), x_dtype));
        }
        sums[block.index] = sum_lanes(lanes);
    }
}

#endif
