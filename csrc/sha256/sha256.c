/* What all kernels share: buffering, padding, lengths, two hashes in one pass. */
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

void fcas_sha256_store_words(uint8_t out[32], const uint32_t state[8])
{
    for (unsigned i = 0; i < 8; i++)
        fcas_store_be32(out + 4 * i, state[i]);
}

fcas_status fcas_sha256_midstate(const fcas_sha256 *s, uint8_t out[32])
{
    if (s->n_buffered != 0)
        return FCAS_E_ARG;
    fcas_sha256_store_words(out, s->state);
    return FCAS_OK;
}

size_t fcas_sha256_pad(uint8_t tail[2 * FCAS_SHA256_BLOCK], const uint8_t *p, size_t n, uint64_t length)
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
    size_t nblocks = fcas_sha256_pad(tail, s->buffer, s->n_buffered, s->length);

    s->kernel->compress(s->state, tail, nblocks);
    fcas_sha256_store_words(out, s->state);
}
