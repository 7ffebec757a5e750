/* Messages of any lengths, or runs of blocks under states, over the streams of a kernel: one that ends takes the next. */
#include <string.h>

#include "sha256/kernels.h"

/* One message in work: first its whole blocks, then its tail. */
typedef struct {
    uint32_t state[8];
    const uint8_t *p;
    size_t nblocks; /* left of the present part */
    size_t length;
    size_t index;   /* of the message */
    int in_tail;
    int is_idle;
    uint8_t tail[2 * FCAS_SHA256_BLOCK];
} lane;

typedef struct {
    const uint8_t *const *messages;
    const size_t *lengths;
    size_t n, next;
    uint8_t *digests;
    fcas_sha256 *const *states; /* instead of digests: whole blocks are fed to these, and nothing is padded */
} queue;

static void take_message(lane *l, queue *q)
{
    l->is_idle = q->next == q->n;
    if (l->is_idle)
        return;
    l->index = q->next++;
    l->length = q->lengths[l->index];
    l->p = q->messages[l->index];
    l->nblocks = l->length / FCAS_SHA256_BLOCK;
    l->in_tail = 0;
    memcpy(l->state, q->states != NULL ? q->states[l->index]->state : fcas_sha256_iv, sizeof l->state);
}

/* Make blocks available: the tail after the body, the next message after the tail. */
static void refill(lane *l, queue *q)
{
    while (!l->is_idle && l->nblocks == 0) {
        if (q->states != NULL) {
            memcpy(q->states[l->index]->state, l->state, sizeof l->state);
            take_message(l, q);
        } else if (l->in_tail) {
            fcas_sha256_store_words(q->digests + FCAS_SHA256_DIGEST * l->index, l->state);
            take_message(l, q);
        } else {
            l->nblocks = fcas_sha256_pad(l->tail, l->p, l->length % FCAS_SHA256_BLOCK, l->length);
            l->p = l->tail;
            l->in_tail = 1;
        }
    }
}

static void advance(lane *l, size_t nblocks)
{
    l->p += nblocks * FCAS_SHA256_BLOCK;
    l->nblocks -= nblocks;
}

/* All lanes by as many blocks as the shortest has; idle ones run along over another's bytes. */
static void step_wide(const fcas_sha256_kernel *kernel, lane lanes[], const lane *busy)
{
    uint32_t scratch[FCAS_SHA256_LANES_MAX][8] = {{0}};
    uint32_t(*states[FCAS_SHA256_LANES_MAX])[8];
    const uint8_t *blocks[FCAS_SHA256_LANES_MAX];
    size_t nblocks = busy->nblocks;

    for (size_t i = 0; i < kernel->n_lanes; i++)
        if (!lanes[i].is_idle && lanes[i].nblocks < nblocks)
            nblocks = lanes[i].nblocks;
    for (size_t i = 0; i < kernel->n_lanes; i++) {
        states[i] = lanes[i].is_idle ? &scratch[i] : &lanes[i].state;
        blocks[i] = lanes[i].is_idle ? busy->p : lanes[i].p;
    }
    kernel->compress_lanes(states, blocks, nblocks);
    for (size_t i = 0; i < kernel->n_lanes; i++)
        if (!lanes[i].is_idle)
            advance(&lanes[i], nblocks);
}

/* The two that have most left, and how much the third has; b is NULL if there is but one. */
typedef struct {
    lane *a, *b;
    size_t third;
} longest;

static longest find_longest(lane lanes[], size_t n)
{
    longest found = {NULL, NULL, 0};

    for (size_t i = 0; i < n; i++) {
        lane *l = &lanes[i];
        if (l->is_idle)
            continue;
        if (found.a == NULL || l->nblocks > found.a->nblocks) {
            found.third = found.b != NULL ? found.b->nblocks : 0;
            found.b = found.a;
            found.a = l;
        } else if (found.b == NULL || l->nblocks > found.b->nblocks) {
            found.third = found.b != NULL ? found.b->nblocks : 0;
            found.b = l;
        } else if (l->nblocks > found.third) {
            found.third = l->nblocks;
        }
    }
    return found;
}

/* A call's least number of blocks, if there are so many: its own cost vanishes, and equal messages still take
 * turns. */
enum { LEAST = 64 };

/* The two that have most left, until the third is as long: so that no long one is left over to run alone. */
static void step_longest_two(const fcas_sha256_kernel *kernel, lane lanes[], size_t n)
{
    const longest two = find_longest(lanes, n);

    if (two.b == NULL) {
        kernel->compress(two.a->state, two.a->p, two.a->nblocks);
        advance(two.a, two.a->nblocks);
        return;
    }
    size_t nblocks = two.b->nblocks - two.third;
    if (nblocks < LEAST)
        nblocks = LEAST;
    if (nblocks > two.b->nblocks)
        nblocks = two.b->nblocks;
    kernel->compress2(two.a->state, two.a->p, two.b->state, two.b->p, nblocks);
    advance(two.a, nblocks);
    advance(two.b, nblocks);
}

/* Each two neighbours by as many blocks as the shorter has; of an odd number the last waits for the next step. */
static void step_pairs(const fcas_sha256_kernel *kernel, lane lanes[], size_t n)
{
    lane *waiting = NULL;

    for (size_t i = 0; i < n; i++) {
        lane *l = &lanes[i];
        if (l->is_idle)
            continue;
        if (waiting == NULL) {
            waiting = l;
            continue;
        }
        size_t nblocks = l->nblocks < waiting->nblocks ? l->nblocks : waiting->nblocks;
        kernel->compress2(waiting->state, waiting->p, l->state, l->p, nblocks);
        advance(waiting, nblocks);
        advance(l, nblocks);
        waiting = NULL;
    }
}

/* The two that have most left run beside the others, at FCAS_SHA256_PACE times their pace: until one ends, or,
 * if none waits to follow it, until the third is as long. */
static void step_beside(const fcas_sha256_kernel *kernel, lane lanes[], size_t n, int is_last_of_queue)
{
    uint32_t scratch[FCAS_SHA256_LANES_MAX][8] = {{0}};
    uint32_t(*states[FCAS_SHA256_LANES_MAX])[8];
    const uint8_t *blocks[FCAS_SHA256_LANES_MAX];
    const longest two = find_longest(lanes, n);
    size_t nblocks = two.b->nblocks / FCAS_SHA256_PACE, n_used = 0;

    if (is_last_of_queue) {
        size_t until_level = (two.b->nblocks - two.third) / (FCAS_SHA256_PACE - 1);
        if (until_level < LEAST)
            until_level = LEAST;
        if (nblocks > until_level)
            nblocks = until_level;
    }
    for (size_t i = 0; i < n; i++) {
        lane *l = &lanes[i];
        if (l->is_idle || l == two.a || l == two.b)
            continue;
        states[n_used] = &l->state;
        blocks[n_used++] = l->p;
        if (l->nblocks < nblocks)
            nblocks = l->nblocks;
    }
    if (nblocks == 0) { /* all are short */
        step_pairs(kernel, lanes, n);
        return;
    }
    for (; n_used < kernel->n_lanes; n_used++) {
        states[n_used] = &scratch[n_used];
        blocks[n_used] = two.b->p;
    }
    kernel->compress_beside(states, blocks, nblocks, two.a->state, two.a->p, two.b->state, two.b->p);
    for (size_t i = 0; i < n; i++)
        if (!lanes[i].is_idle)
            advance(&lanes[i], &lanes[i] == two.a || &lanes[i] == two.b ? FCAS_SHA256_PACE * nblocks : nblocks);
}

static size_t n_streams(const fcas_sha256_kernel *kernel)
{
    return kernel->compress_lanes != NULL ? kernel->n_lanes : kernel->n_lanes + 2;
}

static void run(const fcas_sha256_kernel *kernel, queue *q)
{
    lane lanes[FCAS_SHA256_LANES_MAX];
    const size_t n_lanes = n_streams(kernel);

    for (size_t i = 0; i < n_lanes; i++)
        take_message(&lanes[i], q);
    for (;;) {
        size_t n_busy = 0;
        const lane *busy = NULL;

        for (size_t i = 0; i < n_lanes; i++) {
            refill(&lanes[i], q);
            if (!lanes[i].is_idle) {
                busy = &lanes[i];
                n_busy++;
            }
        }
        if (n_busy == 0)
            return;
        if (kernel->n_lanes == 0 || n_busy < kernel->n_lanes_min)
            step_longest_two(kernel, lanes, n_lanes);
        else if (kernel->compress_lanes != NULL)
            step_wide(kernel, lanes, busy);
        else
            step_beside(kernel, lanes, n_lanes, q->next == q->n);
    }
}

void fcas_sha256_many(const fcas_sha256_kernel *kernel, const uint8_t *const *messages,
                      const size_t *lengths, size_t n, uint8_t *digests)
{
    queue q = {messages, lengths, n, 0, digests, NULL};

    run(kernel != NULL ? kernel : fcas_sha256_default(), &q);
}

void fcas_sha256_update_many(fcas_sha256 *const *states, const uint8_t *const *data, const size_t *lengths, size_t n)
{
    queue q = {data, lengths, n, 0, NULL, states};

    if (n == 0)
        return;
    run(states[0]->kernel, &q);
    for (size_t i = 0; i < n; i++) {
        const size_t whole = lengths[i] / FCAS_SHA256_BLOCK * FCAS_SHA256_BLOCK;
        states[i]->length += whole;
        fcas_sha256_update(states[i], data[i] + whole, lengths[i] - whole);
    }
}
