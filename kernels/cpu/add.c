/* y = x + residual. */
#include "simd.h"
#include "team.h"

typedef struct {
    const void *x, *residual;
    void *y;
    int64_t rows, width, strip;
    int dtype;
} Add;

INLINE void elements(const Add *job, int64_t first, int64_t end, int dtype) {
    for (int64_t i = first; i < end; i += VL) {
        int64_t n = end - i < VL ? end - i : VL;
        vf_write(job->y, i, n, dtype, vf_read(job->x, i, n, dtype) + vf_read(job->residual, i, n, dtype));
    }
}

static void strip_chunk(const void *argument, int64_t chunk) {
    const Add *job = argument;
    int64_t end = (chunk + 1) * job->strip < job->rows ? (chunk + 1) * job->strip : job->rows;
    int64_t first = chunk * job->strip * job->width;
    if (job->dtype == BFLOAT16) elements(job, first, end * job->width, BFLOAT16);
    else if (job->dtype == FLOAT16) elements(job, first, end * job->width, FLOAT16);
    else elements(job, first, end * job->width, FLOAT32);
}

/* x, residual, y; rows, width; dtype; threads. */
int64_t tandem_add(const Arg *a) {
    Add job = {a[0].p, a[1].p, a[2].p, a[3].i, a[4].i, strip_of(a[4].i), (int)a[5].i};
    team_run(a[6].i, (job.rows + job.strip - 1) / job.strip, strip_chunk, &job);
    return 0;
}
