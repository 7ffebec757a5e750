#include "sha256/chunks.h"

#include <string.h>

#include "sha256/kernels.h"

fcas_status fcas_chunks_init(fcas_chunks *c, const fcas_sha256_kernel *kernel, size_t chunk_size)
{
    if (chunk_size == 0 || chunk_size % FCAS_SHA256_BLOCK != 0)
        return FCAS_E_ARG;
    fcas_sha256_init(&c->chunk, kernel);
    fcas_sha256_init(&c->content, kernel);
    c->chunk_size = chunk_size;
    c->filled = 0;
    return FCAS_OK;
}

fcas_status fcas_chunks_resume(fcas_chunks *c, const fcas_sha256_kernel *kernel, size_t chunk_size,
                               const uint8_t midstate[32], uint64_t length)
{
    fcas_chunks begun;

    if (fcas_chunks_init(&begun, kernel, chunk_size) != FCAS_OK || length % chunk_size != 0)
        return FCAS_E_ARG;
    (void)fcas_sha256_resume(&begun.content, kernel, midstate, length);
    *c = begun;
    return FCAS_OK;
}

size_t fcas_chunks_completed_by(const fcas_chunks *c, size_t n)
{
    size_t missing = c->chunk_size - c->filled; /* compared, not added: n may be close to SIZE_MAX */
    return n < missing ? 0 : 1 + (n - missing) / c->chunk_size;
}

/* Whole chunks at once where the kernel has lanes beside a chain: while the content's goes through all of them one
 * after the other, each chunk's own goes through an equal part of its chunk, so that all end together. */
enum { SIDE_BY_SIDE = 2 * FCAS_SHA256_PACE };

static int can_go_side_by_side(const fcas_chunks *c, size_t n)
{
    return c->chunk.kernel->compress_beside != NULL && c->filled == 0 && n / c->chunk_size >= SIDE_BY_SIDE
           && c->chunk_size % (SIDE_BY_SIDE * FCAS_SHA256_BLOCK) == 0;
}

static void update_side_by_side(fcas_chunks *c, const uint8_t *p, uint8_t *hashes, uint8_t *midstates)
{
    const fcas_sha256_kernel *kernel = c->chunk.kernel;
    const size_t part = c->chunk_size / SIDE_BY_SIDE;
    uint8_t tail[2 * FCAS_SHA256_BLOCK];
    uint32_t own[SIDE_BY_SIDE][8];
    uint32_t(*states[SIDE_BY_SIDE])[8];
    const uint8_t *blocks[SIDE_BY_SIDE];

    for (size_t i = 0; i < SIDE_BY_SIDE; i++) {
        memcpy(own[i], fcas_sha256_iv, sizeof own[i]);
        states[i] = &own[i];
        blocks[i] = p + i * c->chunk_size;
    }
    for (size_t i = 0; i < SIDE_BY_SIDE; i++) {
        kernel->compress_beside(states, blocks, part / FCAS_SHA256_BLOCK, c->content.state, p + i * c->chunk_size,
                                NULL, NULL);
        fcas_sha256_store_words(midstates + FCAS_SHA256_DIGEST * i, c->content.state);
        for (size_t j = 0; j < SIDE_BY_SIDE; j++)
            blocks[j] += part;
    }
    c->content.length += SIDE_BY_SIDE * c->chunk_size;
    (void)fcas_sha256_pad(tail, NULL, 0, c->chunk_size); /* the same one block for all */
    for (size_t i = 0; i < SIDE_BY_SIDE; i += 2)
        kernel->compress2(own[i], tail, own[i + 1], tail, 1);
    for (size_t i = 0; i < SIDE_BY_SIDE; i++)
        fcas_sha256_store_words(hashes + FCAS_SHA256_DIGEST * i, own[i]);
}

size_t fcas_chunks_update(fcas_chunks *c, const uint8_t *p, size_t n, uint8_t *hashes, uint8_t *midstates)
{
    size_t n_completed = 0;

    while (n > 0) {
        if (can_go_side_by_side(c, n)) {
            update_side_by_side(c, p, hashes + FCAS_SHA256_DIGEST * n_completed,
                                midstates + FCAS_SHA256_DIGEST * n_completed);
            p += SIDE_BY_SIDE * c->chunk_size;
            n -= SIDE_BY_SIDE * c->chunk_size;
            n_completed += SIDE_BY_SIDE;
            continue;
        }
        size_t missing = c->chunk_size - c->filled;
        size_t take = n < missing ? n : missing;

        fcas_sha256_update2(&c->chunk, &c->content, p, take);
        c->filled += take;
        p += take;
        n -= take;
        if (c->filled < c->chunk_size)
            break;
        (void)fcas_sha256_midstate(&c->content, midstates + FCAS_SHA256_DIGEST * n_completed);
        fcas_sha256_final(&c->chunk, hashes + FCAS_SHA256_DIGEST * n_completed);
        fcas_sha256_init(&c->chunk, c->chunk.kernel);
        c->filled = 0;
        n_completed++;
    }
    return n_completed;
}

size_t fcas_chunks_finish(fcas_chunks *c, uint8_t last_hash[32], uint8_t content_hash[32])
{
    size_t n_last = c->filled > 0;

    if (n_last)
        fcas_sha256_final(&c->chunk, last_hash);
    fcas_sha256_final(&c->content, content_hash);
    return n_last;
}
