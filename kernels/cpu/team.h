/* The threads of an op, and how an op is called.
 *
 * Every op is `int64_t op(const Arg *arguments)`: one shape of function, so that a list of calls can be written down once and
 * replayed (tandem_replay). It returns 0, or a number that says what was wrong, before it has written anything.
 *
 * An op that is worth several threads cuts its work into chunks and gives them to `team_run`. The calling thread always
 * works; helpers join while they are awake and take the next chunk from a counter. So a helper whose core another process
 * has taken holds up nobody unless it has begun a chunk, and which thread computes a chunk changes no bit of it. While other
 * processes compute that share the cores (shared/cores.py), helpers beyond this one's part of them stop after their chunk.
 */
#ifndef TANDEM_TEAM_H
#define TANDEM_TEAM_H

#include <stddef.h>
#include <stdint.h>

typedef union {
    int64_t i;
    double d;
    void *p;
} Arg;

typedef void (*Chunk)(const void *job, int64_t chunk);

/* Calls run(job, 0) to run(job, chunks - 1), on up to `threads` threads, and returns when all are done. */
void team_run(int64_t threads, int64_t chunks, Chunk run, const void *job);

/* How many rows of `width` elements make a chunk of an op that takes each element once. */
static inline int64_t strip_of(int64_t width) { return width < 16384 ? 16384 / width : 1; }

/* `bytes` of memory aligned to 64, the calling thread's own until it asks for slot again; NULL without memory. */
enum { SCRATCH_LINEAR, SCRATCH_SUMS, SCRATCH_ATTENTION, SCRATCH_PARTIALS, SCRATCH_SAMPLING, SCRATCH_SLOTS };
void *scratch(int slot, size_t bytes);

#endif
