/* The team of threads that runs graphs.
 *
 * Threads claim chunks of the running operation from one number, and whoever does the last chunk
 * lets the next operation begin:
 *
 *     claims   | graph's number | operation | chunks left |
 *
 * So nobody waits for a thread that the system has put aside, unless that thread holds a chunk. A
 * thread without work looks for some for a while, and then sleeps: its core may be wanted.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "native.h"

#define MOST_WORKERS 255
#define CHUNK_BITS 24
#define OPERATION_BITS 16
#define LOOKS 4000 /* for work, some 20 ns each, before a thread sleeps */

#if defined(__x86_64__)
#define PAUSE __builtin_ia32_pause()
#else
#define PAUSE atomic_signal_fence(memory_order_seq_cst)
#endif

static struct {
    _Alignas(64) _Atomic uint64_t claims;
    _Alignas(64) _Atomic int64_t done; /* chunks of the running operation */
    _Alignas(64) _Atomic uint32_t news; /* counts what sleepers wait for */
    _Atomic int sleepers;
    _Atomic int wanted; /* workers that may claim */
    const Operation *operations;
    int64_t count;
    uint64_t graph;
    int workers;
    pthread_mutex_t in_use;
} team = {.in_use = PTHREAD_MUTEX_INITIALIZER};

static inline int64_t chunks_left(uint64_t claims)
{
    return claims & ((1u << CHUNK_BITS) - 1);
}

static void wake_sleepers(void)
{
    atomic_fetch_add(&team.news, 1);
    if (atomic_load(&team.sleepers) > 0)
        syscall(SYS_futex, &team.news, FUTEX_WAKE_PRIVATE, MOST_WORKERS + 1, NULL, NULL, 0);
}

/* Let an operation begin; the one behind the last has no chunks. Operations without are passed. */
static void begin(int64_t at)
{
    while (at < team.count && team.operations[at].chunks == 0)
        at++;
    const uint64_t chunks = at < team.count ? team.operations[at].chunks : 0;
    atomic_store_explicit(&team.done, 0, memory_order_relaxed);
    atomic_store(&team.claims,
                 team.graph << (OPERATION_BITS + CHUNK_BITS) | (uint64_t)at << CHUNK_BITS | chunks);
    wake_sleepers();
}

static inline int64_t operation_of(uint64_t claims)
{
    return (claims >> CHUNK_BITS) & ((1u << OPERATION_BITS) - 1);
}

/* Do a chunk of the running operation, given what the claims were; whether it was to be had. */
static bool work(uint64_t claims)
{
    if (chunks_left(claims) == 0)
        return false;
    if (!atomic_compare_exchange_strong(&team.claims, &claims, claims - 1))
        return true; /* others were faster; there may be more */
    /* From here on the graph cannot end before this chunk is done. */
    const int64_t at = operation_of(claims);
    const Operation *operation = team.operations + at;
    const int64_t chunks = operation->chunks;
    operation->run(operation->data, chunks - chunks_left(claims));
    if (atomic_fetch_add(&team.done, 1) + 1 == chunks)
        begin(at + 1);
    return true;
}

/* Wait until the claims are no longer what they were. */
static void wait_for_news(uint64_t claims)
{
    for (int look = 0; look < LOOKS; look++) {
        if (atomic_load_explicit(&team.claims, memory_order_relaxed) != claims)
            return;
        PAUSE;
    }
    atomic_fetch_add(&team.sleepers, 1);
    const uint32_t news = atomic_load(&team.news);
    if (atomic_load(&team.claims) == claims)
        syscall(SYS_futex, &team.news, FUTEX_WAIT_PRIVATE, news, NULL, NULL, 0);
    atomic_fetch_sub(&team.sleepers, 1);
}

static void *serve(void *number)
{
    const int mine = (int)(intptr_t)number;
    for (;;) {
        const uint64_t claims = atomic_load(&team.claims);
        if (mine >= atomic_load(&team.wanted) || !work(claims))
            wait_for_news(claims);
    }
    return NULL;
}

/* Threads do not survive a fork; nor does the lock of a graph that another thread was running. */
static void forget_workers(void)
{
    team.workers = 0;
    atomic_store(&team.sleepers, 0);
    atomic_store(&team.claims, 0);
    pthread_mutex_init(&team.in_use, NULL);
}

static void hire(int64_t workers)
{
    static bool prepared;
    if (!prepared)
        prepared = pthread_atfork(NULL, NULL, forget_workers) == 0;
    sigset_t all, kept;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &kept); /* signals are for Python's threads */
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 8 << 20); /* operations keep their work on the stack */
    while (team.workers < workers && team.workers < MOST_WORKERS) {
        pthread_t thread;
        if (pthread_create(&thread, &attributes, serve, (void *)(intptr_t)team.workers) != 0)
            break; /* fewer then */
        team.workers++;
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &kept, NULL);
}

static void run_alone(const Graph *graph)
{
    const Operation *operations = graph->operations;
    for (int64_t at = 0; at < graph->count; at++)
        for (int64_t chunk = 0; chunk < operations[at].chunks; chunk++)
            operations[at].run(operations[at].data, chunk);
}

static void run_together(const Graph *graph)
{
    team.operations = graph->operations;
    team.count = graph->count;
    team.graph++;
    begin(0);
    for (;;) {
        const uint64_t claims = atomic_load(&team.claims);
        if (operation_of(claims) >= graph->count)
            break;
        if (!work(claims))
            wait_for_news(claims);
    }
}

static bool fits(const Graph *graph)
{
    if (graph->count >= 1 << OPERATION_BITS)
        return false;
    for (int64_t at = 0; at < graph->count; at++)
        if (graph->operations[at].chunks < 0 || graph->operations[at].chunks >= 1 << CHUNK_BITS)
            return false;
    return true;
}

int run_graphs(const Graph *graphs, int64_t count, int64_t threads)
{
    for (int64_t graph = 0; graph < count; graph++)
        if (!fits(graphs + graph))
            return -1;
    /* Another thread's graph has the team: two teams would only take turns. */
    const bool together = threads > 1 && pthread_mutex_trylock(&team.in_use) == 0;
    if (together) {
        if (team.workers < threads - 1)
            hire(threads - 1);
        atomic_store(&team.wanted, (int)threads - 1);
    }
    for (int64_t graph = 0; graph < count; graph++)
        if (together)
            run_together(graphs + graph);
        else
            run_alone(graphs + graph);
    if (together)
        pthread_mutex_unlock(&team.in_use);
    return 0;
}
