#include "sha256/chunks.h"

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

size_t fcas_chunks_completed_by(const fcas_chunks *c, size_t n)
{
    size_t missing = c->chunk_size - c->filled; /* compared, not added: n may be close to SIZE_MAX */
    return n < missing ? 0 : 1 + (n - missing) / c->chunk_size;
}

size_t fcas_chunks_update(fcas_chunks *c, const uint8_t *p, size_t n, uint8_t *hashes, uint8_t *midstates)
{
    size_t n_completed = 0;

    while (n > 0) {
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
