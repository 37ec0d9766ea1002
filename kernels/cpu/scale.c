/* y = clamp(cap * tanh(factor * x), -clip, clip), element by element. */
#include "simd.h"
#include "team.h"

enum { PART = 16384 }; /* elements of a chunk: a row of logits is worth several threads */

typedef struct {
    const void *x;
    void *y;
    int64_t count;
    float factor, cap, clip; /* no cap or no clip: 0 */
    int dtype;
} Scale;

INLINE void part(const Scale *job, int64_t begin, int64_t end, int dtype, int caps, int clips) {
    const vf cap = vf_set1(job->cap), clip = vf_set1(job->clip);
    for (int64_t i = begin; i < end; i += VL) {
        int64_t n = end - i < VL ? end - i : VL;
        vf value = vf_read(job->x, i, n, dtype) * job->factor;
        if (caps) value = cap * vf_tanh(value);
        if (clips) value = vf_choose(value > clip, clip, vf_choose(value < -clip, -clip, value));
        vf_write(job->y, i, n, dtype, value);
    }
}

INLINE void part_by_bounds(const Scale *job, int64_t begin, int64_t end, int dtype) {
    if (job->cap > 0 && job->clip > 0) part(job, begin, end, dtype, 1, 1);
    else if (job->cap > 0) part(job, begin, end, dtype, 1, 0);
    else if (job->clip > 0) part(job, begin, end, dtype, 0, 1);
    else part(job, begin, end, dtype, 0, 0);
}

static void part_chunk(const void *argument, int64_t chunk) {
    const Scale *job = argument;
    int64_t begin = chunk * PART, end = begin + PART < job->count ? begin + PART : job->count;
    if (job->dtype == BFLOAT16) part_by_bounds(job, begin, end, BFLOAT16);
    else if (job->dtype == FLOAT16) part_by_bounds(job, begin, end, FLOAT16);
    else part_by_bounds(job, begin, end, FLOAT32);
}

/* x, y; elements; factor, divided by the cap where there is one; cap or 0, clip or 0; dtype; threads. */
int64_t tandem_scale(const Arg *a) {
    Scale job = {a[0].p, a[1].p, a[2].i, (float)a[3].d, (float)a[4].d, (float)a[5].d, (int)a[6].i};
    team_run(a[7].i, (job.count + PART - 1) / PART, part_chunk, &job);
    return 0;
}
