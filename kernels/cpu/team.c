#define _GNU_SOURCE
#include "team.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define relax() __builtin_ia32_pause()
#else
#define relax() ((void)0)
#endif

enum {
    MAX_HELPERS = 255,
    HELPER_SPINS = 2000, /* some 50 us: the pause between two ops of a step is far shorter, that between two steps longer */
    LEADER_SPINS = 2000,
};

/* `turn` is the number of the job in its upper half and its chunks not yet taken in the lower. A helper takes one only of
 * the job whose number it has read, or the exchange fails; from then on the job cannot end, so what describes it is read
 * only then. */
static struct {
    _Atomic uint64_t turn;
    _Atomic int64_t done;
    _Atomic int asleep;
    _Atomic uint32_t bell;   /* what helpers sleep on: another value for each job */
    _Atomic int64_t helpers; /* how many may join */
    Chunk run;
    const void *job;
    int64_t chunks;
} team __attribute__((aligned(128)));

static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER;
static int64_t started;

/* Whether each process computes that shares these cores, on a page that all of them map; see shared/cores.py. */
static struct {
    const _Atomic int32_t *_Atomic computing;
    int64_t slots, cores;
} shares;

/* The threads that this process has its part of the cores for. */
static int64_t allowed(void) {
    const _Atomic int32_t *computing = shares.computing;
    int64_t count = 0;
    if (!computing) return INT64_MAX;
    for (int64_t i = 0; i < shares.slots; i++) count += atomic_load_explicit(&computing[i], memory_order_relaxed) != 0;
    if (count < 2) return INT64_MAX;
    return shares.cores > count ? shares.cores / count : 1;
}

/* An eventfd that this thread is to ring; -1 = none. */
static __thread int bell = -1;

static void ring(void) {
    if (bell >= 0) eventfd_write(bell, 1);
    bell = -1;
}

/* index: of the thread, 0 is the one that called. */
static void work(uint64_t number, int64_t index) {
    uint64_t turn = team.turn;
    while (turn >> 32 == number && (uint32_t)turn && (index == 0 || index < allowed()))
        if (atomic_compare_exchange_strong(&team.turn, &turn, turn - 1)) {
            team.run(team.job, team.chunks - (int64_t)(uint32_t)turn);
            team.done++;
            turn = team.turn;
        }
}

static void *help(void *argument) {
    int64_t index = (int64_t)(intptr_t)argument;
    uint64_t last = 0;
    for (int spins = 0;;) {
        uint32_t bell = team.bell;
        uint64_t number = team.turn >> 32;
        if (number != last && index <= team.helpers) {
            work(last = number, index);
            spins = 0;
        } else if (++spins < HELPER_SPINS) {
            relax();
        } else {
            team.asleep++;
            syscall(SYS_futex, &team.bell, FUTEX_WAIT_PRIVATE, bell, NULL, NULL, 0);
            team.asleep--;
            spins = 0;
        }
    }
    return NULL;
}

static void forget(void) {
    /* A fork leaves the helpers behind. */
    started = 0;
    pthread_mutex_init(&busy, NULL);
}

static void start(int64_t helpers) {
    static int registered;
    if (!registered) registered = !pthread_atfork(NULL, NULL, forget);
    for (; started < helpers; started++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, help, (void *)(intptr_t)(started + 1))) return;
        pthread_detach(thread);
    }
}

void team_run(int64_t threads, int64_t chunks, Chunk run, const void *job) {
    ring();
    int64_t helpers = (threads < chunks ? threads : chunks) - 1;
    if (helpers > MAX_HELPERS) helpers = MAX_HELPERS;
    if (helpers > 0) {
        int64_t others = allowed() - 1;
        if (helpers > others) helpers = others;
    }
    if (helpers < 1 || pthread_mutex_trylock(&busy)) {
        for (int64_t i = 0; i < chunks; i++) run(job, i);
        return;
    }
    if (started < helpers) start(helpers);
    team.run = run;
    team.job = job;
    team.chunks = chunks;
    team.done = 0;
    team.helpers = helpers;
    uint64_t number = (uint32_t)((team.turn >> 32) + 1);
    team.turn = number << 32 | (uint64_t)chunks;
    team.bell++;
    if (team.asleep) syscall(SYS_futex, &team.bell, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    work(number, 0);
    for (int spins = 0; team.done < chunks; spins++) {
        if (spins < LEADER_SPINS) relax();
        else sched_yield();
    }
    pthread_mutex_unlock(&busy);
}

void *scratch(int slot, size_t bytes) {
    static __thread struct {
        void *memory;
        size_t bytes;
    } slots[SCRATCH_SLOTS];
    if (slots[slot].bytes < bytes) {
        free(slots[slot].memory);
        bytes = (bytes + 4095) / 4096 * 4096;
        slots[slot].memory = aligned_alloc(64, bytes);
        slots[slot].bytes = slots[slot].memory ? bytes : 0;
    }
    return slots[slot].memory;
}

/* int32 for each process that shares the cores, their number; the number of cores. */
int64_t tandem_share_cores(const Arg *a) {
    shares.slots = a[1].i, shares.cores = a[2].i;
    shares.computing = a[0].p;
    return 0;
}

/* How many threads an op may use now. */
int64_t tandem_allowed_threads(const Arg *a) { return (void)a, allowed(); }

/* Has an eventfd rung by this thread's next op that is worth several threads, or now with -1: one that was not yet rung is
 * rung at once. Whoever is woken by a thread that holds Python's lock takes it away, and one that computes does not hold it. */
int64_t tandem_ring_later(const Arg *a) {
    ring();
    bell = (int)a[0].i;
    return 0;
}

/* What the ops were compiled for: 3 AVX-512 BF16, 2 AVX-512, 1 AVX2, 0 none of them. */
int64_t tandem_instruction_set(const Arg *a) {
    (void)a;
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VBMI__)
    return 3;
#elif defined(__AVX512F__)
    return 2;
#elif defined(__AVX2__) && defined(__FMA__)
    return 1;
#else
    return 0;
#endif
}

typedef struct {
    int64_t (*op)(const Arg *);
    const Arg *arguments;
} Call;

/* Calls ops in order: arguments are a list of Calls and their number. Returns 0, or 1 + the index of the call that failed. */
int64_t tandem_replay(const Arg *a) {
    const Call *calls = a[0].p;
    for (int64_t i = 0; i < a[1].i; i++)
        if (calls[i].op(calls[i].arguments)) return i + 1;
    return 0;
}
