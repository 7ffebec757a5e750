/* What all kernels share: buffering, padding, lengths, two hashes in one pass, many messages. */
#include "sha256/sha256.h"

#include <string.h>

#include "common/bytes.h"
#include "sha256/kernels.h"

void fcas_sha256_init(fcas_sha256 *s, const fcas_sha256_kernel *kernel)
{
    s->kernel = kernel != NULL ? kernel : fcas_sha256_default();
    memcpy(s->state, fcas_sha256_iv, sizeof s->state);
    s->length = 0;
    s->n_buffered = 0;
}

fcas_status fcas_sha256_resume(fcas_sha256 *s, const fcas_sha256_kernel *kernel,
                               const uint8_t midstate[32], uint64_t length)
{
    if (length % FCAS_SHA256_BLOCK != 0)
        return FCAS_E_ARG;
    fcas_sha256_init(s, kernel);
    for (unsigned i = 0; i < 8; i++)
        s->state[i] = fcas_load_be32(midstate + 4 * i);
    s->length = length;
    return FCAS_OK;
}

/* Put up to n bytes behind those that wait; returns how many. */
static size_t fill(fcas_sha256 *s, const uint8_t *p, size_t n)
{
    size_t room = FCAS_SHA256_BLOCK - s->n_buffered;
    size_t take = n < room ? n : room;

    memcpy(s->buffer + s->n_buffered, p, take);
    s->n_buffered += (uint32_t)take;
    return take;
}

void fcas_sha256_update(fcas_sha256 *s, const uint8_t *p, size_t n)
{
    if (n == 0)
        return;
    s->length += n;
    if (s->n_buffered > 0) {
        size_t taken = fill(s, p, n);
        p += taken;
        n -= taken;
        if (s->n_buffered < FCAS_SHA256_BLOCK)
            return;
        s->kernel->compress(s->state, s->buffer, 1);
        s->n_buffered = 0;
    }
    size_t nblocks = n / FCAS_SHA256_BLOCK;
    if (nblocks > 0)
        s->kernel->compress(s->state, p, nblocks);
    fill(s, p + nblocks * FCAS_SHA256_BLOCK, n % FCAS_SHA256_BLOCK);
}

void fcas_sha256_update2(fcas_sha256 *a, fcas_sha256 *b, const uint8_t *p, size_t n)
{
    if (a->n_buffered != b->n_buffered || a->kernel != b->kernel) {
        fcas_sha256_update(a, p, n);
        fcas_sha256_update(b, p, n);
        return;
    }
    if (n == 0)
        return;
    a->length += n;
    b->length += n;
    if (a->n_buffered > 0) {
        size_t taken = fill(a, p, n);
        fill(b, p, n);
        p += taken;
        n -= taken;
        if (a->n_buffered < FCAS_SHA256_BLOCK)
            return;
        /* Bytes that waited may differ: the two hashes can have begun at different places. */
        a->kernel->compress2(a->state, a->buffer, b->state, b->buffer, 1);
        a->n_buffered = b->n_buffered = 0;
    }
    size_t nblocks = n / FCAS_SHA256_BLOCK;
    if (nblocks > 0)
        a->kernel->compress2(a->state, p, b->state, p, nblocks);
    p += nblocks * FCAS_SHA256_BLOCK;
    fill(a, p, n % FCAS_SHA256_BLOCK);
    fill(b, p, n % FCAS_SHA256_BLOCK);
}

static void store_words(uint8_t out[32], const uint32_t state[8])
{
    for (unsigned i = 0; i < 8; i++)
        fcas_store_be32(out + 4 * i, state[i]);
}

fcas_status fcas_sha256_midstate(const fcas_sha256 *s, uint8_t out[32])
{
    if (s->n_buffered != 0)
        return FCAS_E_ARG;
    store_words(out, s->state);
    return FCAS_OK;
}

/* Write the message's last block or two into tail: its last n < 64 bytes, 0x80, zeros and the length
 * in bits. Returns the number of blocks. */
static size_t pad(uint8_t tail[2 * FCAS_SHA256_BLOCK], const uint8_t *p, size_t n, uint64_t length)
{
    size_t nblocks = n + 9 <= FCAS_SHA256_BLOCK ? 1 : 2;

    if (n > 0)
        memcpy(tail, p, n);
    tail[n] = 0x80;
    memset(tail + n + 1, 0, nblocks * FCAS_SHA256_BLOCK - n - 1);
    fcas_store_be64(tail + nblocks * FCAS_SHA256_BLOCK - 8, length << 3);
    return nblocks;
}

void fcas_sha256_final(fcas_sha256 *s, uint8_t out[32])
{
    uint8_t tail[2 * FCAS_SHA256_BLOCK];
    size_t nblocks = pad(tail, s->buffer, s->n_buffered, s->length);

    s->kernel->compress(s->state, tail, nblocks);
    store_words(out, s->state);
}

/* One of the two streams of fcas_sha256_many: a message, first its whole blocks, then its tail. */
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

/* Make blocks available: the tail after the body, the next message after the tail. Returns 0 when
 * there is nothing left to do in this lane. */
static int refill(lane *l, queue *q)
{
    while (!l->is_idle && l->nblocks == 0) {
        if (l->in_tail) {
            store_words(q->digests + FCAS_SHA256_DIGEST * l->index, l->state);
            take_message(l, q);
        } else {
            l->nblocks = pad(l->tail, l->p, l->length % FCAS_SHA256_BLOCK, l->length);
            l->p = l->tail;
            l->in_tail = 1;
        }
    }
    return !l->is_idle;
}

static void advance(lane *l, size_t nblocks)
{
    if (nblocks == 0)
        return;
    l->p += nblocks * FCAS_SHA256_BLOCK;
    l->nblocks -= nblocks;
}

static void finish_alone(const fcas_sha256_kernel *kernel, lane *l, queue *q)
{
    while (refill(l, q)) {
        kernel->compress(l->state, l->p, l->nblocks);
        advance(l, l->nblocks);
    }
}

void fcas_sha256_many(const fcas_sha256_kernel *kernel, const uint8_t *const *messages,
                      const size_t *lengths, size_t n, uint8_t *digests)
{
    queue q = {messages, lengths, n, 0, digests};
    lane a, b;

    if (kernel == NULL)
        kernel = fcas_sha256_default();
    take_message(&a, &q);
    take_message(&b, &q);
    for (;;) {
        int more_a = refill(&a, &q), more_b = refill(&b, &q);
        if (!more_a || !more_b)
            break;
        size_t nblocks = a.nblocks < b.nblocks ? a.nblocks : b.nblocks;
        kernel->compress2(a.state, a.p, b.state, b.p, nblocks);
        advance(&a, nblocks);
        advance(&b, nblocks);
    }
    finish_alone(kernel, &a, &q);
    finish_alone(kernel, &b, &q);
}

/* FIPS 180-4's examples of one and of two blocks. */
static const struct {
    const char *text;
    uint8_t digest[FCAS_SHA256_DIGEST];
} known[] = {
    {"abc",
     {0xba, 0x78, 0x16, 0xbf, 0x8f, 0x01, 0xcf, 0xea, 0x41, 0x41, 0x40, 0xde,
      0x5d, 0xae, 0x22, 0x23, 0xb0, 0x03, 0x61, 0xa3, 0x96, 0x17, 0x7a, 0x9c,
      0xb4, 0x10, 0xff, 0x61, 0xf2, 0x00, 0x15, 0xad}},
    {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
     {0x24, 0x8d, 0x6a, 0x61, 0xd2, 0x06, 0x38, 0xb8, 0xe5, 0xc0, 0x26, 0x93,
      0x0c, 0x3e, 0x60, 0x39, 0xa3, 0x3c, 0xe4, 0x59, 0x64, 0xff, 0x21, 0x67,
      0xf6, 0xec, 0xed, 0xd4, 0x19, 0xdb, 0x06, 0xc1}},
};

enum { LONG_SIZE = 1000 };

/* Of the bytes 0, 7, 14, ... modulo 251. */
static const uint8_t long_digest[FCAS_SHA256_DIGEST] = {
    0x59, 0x42, 0x5e, 0x44, 0x12, 0xe2, 0x96, 0xfc, 0x74, 0x73, 0x66, 0x73,
    0xce, 0x06, 0x70, 0x27, 0xf3, 0x84, 0x20, 0x3f, 0x59, 0xc0, 0xd2, 0xc3,
    0xe6, 0xbe, 0x7b, 0x13, 0x34, 0x7b, 0x3f, 0xfc,
};

fcas_status fcas_sha256_self_test(const fcas_sha256_kernel *kernel)
{
    uint8_t message[LONG_SIZE], digests[3 * FCAS_SHA256_DIGEST];
    const uint8_t *texts[3] = {(const uint8_t *)known[0].text, message,
                               (const uint8_t *)known[1].text};
    const size_t lengths[3] = {strlen(known[0].text), LONG_SIZE, strlen(known[1].text)};
    fcas_sha256 a, b;

    for (unsigned i = 0; i < LONG_SIZE; i++)
        message[i] = (uint8_t)(7 * i % 251);

    fcas_sha256_many(kernel, texts, lengths, 3, digests); /* compress2 on different bytes */
    int bad = memcmp(digests, known[0].digest, FCAS_SHA256_DIGEST) != 0
              || memcmp(digests + FCAS_SHA256_DIGEST, long_digest, FCAS_SHA256_DIGEST) != 0
              || memcmp(digests + 2 * FCAS_SHA256_DIGEST, known[1].digest, FCAS_SHA256_DIGEST) != 0;

    fcas_sha256_init(&a, kernel);
    fcas_sha256_init(&b, kernel);
    fcas_sha256_update2(&a, &b, message, LONG_SIZE); /* compress2 on the same bytes */
    fcas_sha256_final(&a, digests);
    fcas_sha256_final(&b, digests + FCAS_SHA256_DIGEST);
    bad |= memcmp(digests, long_digest, FCAS_SHA256_DIGEST) != 0
           || memcmp(digests + FCAS_SHA256_DIGEST, long_digest, FCAS_SHA256_DIGEST) != 0;

    fcas_sha256_init(&a, kernel);
    fcas_sha256_update(&a, message, LONG_SIZE); /* compress */
    fcas_sha256_final(&a, digests);
    bad |= memcmp(digests, long_digest, FCAS_SHA256_DIGEST) != 0;
    return bad ? FCAS_E_CORRUPT : FCAS_OK;
}
