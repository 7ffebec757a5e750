/* Messages of any lengths over the lanes of a kernel: a lane whose message ends takes the next one. */
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
    memcpy(l->state, fcas_sha256_iv, sizeof l->state);
}

/* Make blocks available: the tail after the body, the next message after the tail. */
static void refill(lane *l, queue *q)
{
    while (!l->is_idle && l->nblocks == 0) {
        if (l->in_tail) {
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

/* The two that have most left, until the third is as long: so that no long one is left over to run alone. */
static void step_longest_two(const fcas_sha256_kernel *kernel, lane lanes[], size_t n)
{
    enum { LEAST = 64 }; /* blocks: a call's own cost vanishes, and equal messages still take turns */
    lane *a = NULL, *b = NULL;
    size_t third = 0;

    for (size_t i = 0; i < n; i++) {
        lane *l = &lanes[i];
        if (l->is_idle)
            continue;
        if (a == NULL || l->nblocks > a->nblocks) {
            third = b != NULL ? b->nblocks : 0;
            b = a;
            a = l;
        } else if (b == NULL || l->nblocks > b->nblocks) {
            third = b != NULL ? b->nblocks : 0;
            b = l;
        } else if (l->nblocks > third) {
            third = l->nblocks;
        }
    }
    if (b == NULL) {
        kernel->compress(a->state, a->p, a->nblocks);
        advance(a, a->nblocks);
        return;
    }
    size_t nblocks = b->nblocks - third;
    if (nblocks < LEAST)
        nblocks = LEAST;
    if (nblocks > b->nblocks)
        nblocks = b->nblocks;
    kernel->compress2(a->state, a->p, b->state, b->p, nblocks);
    advance(a, nblocks);
    advance(b, nblocks);
}

void fcas_sha256_many(const fcas_sha256_kernel *kernel, const uint8_t *const *messages,
                      const size_t *lengths, size_t n, uint8_t *digests)
{
    queue q = {messages, lengths, n, 0, digests};
    lane lanes[FCAS_SHA256_LANES_MAX];

    if (kernel == NULL)
        kernel = fcas_sha256_default();
    size_t n_lanes = kernel->compress_lanes != NULL ? kernel->n_lanes : 2;

    for (size_t i = 0; i < n_lanes; i++)
        take_message(&lanes[i], &q);
    for (;;) {
        size_t n_busy = 0;
        const lane *busy = NULL;

        for (size_t i = 0; i < n_lanes; i++) {
            refill(&lanes[i], &q);
            if (!lanes[i].is_idle) {
                busy = &lanes[i];
                n_busy++;
            }
        }
        if (n_busy == 0)
            return;
        if (kernel->compress_lanes != NULL && n_busy >= kernel->n_lanes_min)
            step_wide(kernel, lanes, busy);
        else
            step_longest_two(kernel, lanes, n_lanes);
    }
}
