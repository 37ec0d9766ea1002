/* y[i] = scale * table[token_ids[i]] + position_table[positions[i] + offset] + type_table[token_types[i]], the last two parts
 * where there are such tables. Of the table alone, at scale 1, rows are copied. */
#include "simd.h"
#include "team.h"

typedef struct {
    const void *table;
    const int64_t *token_ids;
    const void *position_table; /* or NULL, as positions */
    const int32_t *positions;
    const void *type_table; /* or NULL, as token_types */
    const int64_t *token_types;
    void *y;
    int64_t rows, width, offset, strip;
    float scale;
    int dtype, copies;
} Embedding;

INLINE void row(const Embedding *job, int64_t r, int dtype) {
    int64_t width = job->width, token = job->token_ids[r] * width;
    int64_t position = job->position_table ? (job->positions[r] + job->offset) * width : 0;
    int64_t type = job->type_table ? job->token_types[r] * width : 0;
    for (int64_t i = 0; i < width; i += VL) {
        int64_t n = width - i < VL ? width - i : VL;
        vf value = vf_read(job->table, token + i, n, dtype) * job->scale;
        if (job->position_table) value += vf_read(job->position_table, position + i, n, dtype);
        if (job->type_table) value += vf_read(job->type_table, type + i, n, dtype);
        vf_write(job->y, r * width + i, n, dtype, value);
    }
}

static void strip_chunk(const void *argument, int64_t chunk) {
    const Embedding *job = argument;
    int64_t end = (chunk + 1) * job->strip < job->rows ? (chunk + 1) * job->strip : job->rows;
    for (int64_t r = chunk * job->strip; r < end; r++) {
        if (job->copies)
            memcpy((void *)at(job->y, r * job->width, job->dtype), at(job->table, job->token_ids[r] * job->width, job->dtype),
                   (size_t)(job->width * bytes_of(job->dtype)));
        else if (job->dtype == BFLOAT16) row(job, r, BFLOAT16);
        else if (job->dtype == FLOAT16) row(job, r, FLOAT16);
        else row(job, r, FLOAT32);
    }
}

/* table, token_ids, position_table or NULL, positions, type_table or NULL, token_types, y; rows, width; rows of the table, of the
 * position_table and of the type_table; offset; scale; dtype; threads. Returns 0, or 1 + the first row whose token_id is out of
 * range, else 1 + rows + that of the positions, else 1 + 2 * rows + that of the token_types (nothing is written then). */
int64_t tandem_embed(const Arg *a) {
    Embedding job = {
        a[0].p, a[1].p, a[2].p, a[3].p, a[4].p, a[5].p, a[6].p, a[7].i, a[8].i, a[12].i, strip_of(a[8].i), (float)a[13].d,
        (int)a[14].i, 0,
    };
    for (int64_t r = 0; r < job.rows; r++)
        if (job.token_ids[r] < 0 || job.token_ids[r] >= a[9].i) return 1 + r;
    for (int64_t r = 0; job.position_table && r < job.rows; r++) {
        int64_t position = job.positions[r] + job.offset;
        if (position < 0 || position >= a[10].i) return 1 + job.rows + r;
    }
    for (int64_t r = 0; job.type_table && r < job.rows; r++)
        if (job.token_types[r] < 0 || job.token_types[r] >= a[11].i) return 1 + 2 * job.rows + r;
    job.copies = job.scale == 1.0f && !job.position_table && !job.type_table;
    team_run(a[15].i, (job.rows + job.strip - 1) / job.strip, strip_chunk, &job);
    return 0;
}
