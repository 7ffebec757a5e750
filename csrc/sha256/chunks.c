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
 * after the other, each chunk's own goes through an equal part of its chunk, so that all end together. Two contents
 * share the lanes. */
enum { LANES = 2 * FCAS_SHA256_PACE };

static int can_go_side_by_side(const fcas_chunks *c, size_t n_contents)
{
    return c->chunk.kernel->compress_beside != NULL && c->filled == 0
           && c->chunk_size % (LANES / n_contents * FCAS_SHA256_BLOCK) == 0;
}

/* LANES / n_contents chunks of each of one or two contents. */
static void update_side_by_side(fcas_chunks *const c[], size_t n_contents, const uint8_t *const p[],
                                uint8_t *const hashes[], uint8_t *const midstates[])
{
    const fcas_sha256_kernel *kernel = c[0]->chunk.kernel;
    const size_t chunk_size = c[0]->chunk_size, width = LANES / n_contents, part = chunk_size / width;
    const int is_alone = n_contents == 1;
    uint8_t tail[2 * FCAS_SHA256_BLOCK];
    uint32_t own[LANES][8];
    uint32_t(*states[LANES])[8];
    const uint8_t *blocks[LANES];

    for (size_t i = 0; i < LANES; i++) {
        memcpy(own[i], fcas_sha256_iv, sizeof own[i]);
        states[i] = &own[i];
        blocks[i] = p[i / width] + i % width * chunk_size;
    }
    for (size_t i = 0; i < width; i++) {
        kernel->compress_beside(states, blocks, part / FCAS_SHA256_BLOCK, c[0]->content.state, p[0] + i * chunk_size,
                                is_alone ? NULL : c[1]->content.state, is_alone ? NULL : p[1] + i * chunk_size);
        for (size_t j = 0; j < n_contents; j++)
            fcas_sha256_store_words(midstates[j] + FCAS_SHA256_DIGEST * i, c[j]->content.state);
        for (size_t j = 0; j < LANES; j++)
            blocks[j] += part;
    }
    for (size_t j = 0; j < n_contents; j++)
        c[j]->content.length += width * chunk_size;
    (void)fcas_sha256_pad(tail, NULL, 0, chunk_size); /* the same one block for all */
    for (size_t i = 0; i < LANES; i += 2)
        kernel->compress2(own[i], tail, own[i + 1], tail, 1);
    for (size_t i = 0; i < LANES; i++)
        fcas_sha256_store_words(hashes[i / width] + FCAS_SHA256_DIGEST * (i % width), own[i]);
}

void fcas_chunks_update_two(fcas_chunks *const c[2], const uint8_t *const p[2], size_t n_chunks,
                            uint8_t *const hashes[2], uint8_t *const midstates[2])
{
    const size_t width = LANES / 2, size = c[0]->chunk_size;
    size_t i = 0;

    if (c[0]->chunk.kernel == c[1]->chunk.kernel && size == c[1]->chunk_size && c[1]->filled == 0
        && can_go_side_by_side(c[0], 2))
        for (; n_chunks - i >= width; i += width) {
            const uint8_t *const from[2] = {p[0] + i * size, p[1] + i * size};
            uint8_t *const h[2] = {hashes[0] + FCAS_SHA256_DIGEST * i, hashes[1] + FCAS_SHA256_DIGEST * i};
            uint8_t *const m[2] = {midstates[0] + FCAS_SHA256_DIGEST * i, midstates[1] + FCAS_SHA256_DIGEST * i};
            update_side_by_side(c, 2, from, h, m);
        }
    for (size_t j = 0; j < 2; j++) {
        const size_t own = c[j]->chunk_size;
        (void)fcas_chunks_update(c[j], p[j] + i * own, (n_chunks - i) * own, hashes[j] + FCAS_SHA256_DIGEST * i,
                                 midstates[j] + FCAS_SHA256_DIGEST * i);
    }
}

size_t fcas_chunks_update(fcas_chunks *c, const uint8_t *p, size_t n, uint8_t *hashes, uint8_t *midstates)
{
    size_t n_completed = 0;

    while (n > 0) {
        if (n / c->chunk_size >= LANES && can_go_side_by_side(c, 1)) {
            uint8_t *const h = hashes + FCAS_SHA256_DIGEST * n_completed;
            uint8_t *const m = midstates + FCAS_SHA256_DIGEST * n_completed;
            update_side_by_side(&c, 1, &p, &h, &m);
            p += LANES * c->chunk_size;
            n -= LANES * c->chunk_size;
            n_completed += LANES;
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
