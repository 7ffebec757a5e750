#include "ingest/pass.h"

#include <errno.h>
#include <sys/types.h>
#include <unistd.h>

#include "sha256/chunks.h"

void fcas_tally_add(fcas_tally *tally, uint64_t n_bytes)
{
    atomic_fetch_add_explicit(&tally->n_bytes, n_bytes, memory_order_relaxed);
}

uint64_t fcas_tally_bytes(const fcas_tally *tally)
{
    return atomic_load_explicit(&tally->n_bytes, memory_order_relaxed);
}

void fcas_tally_stop(fcas_tally *tally)
{
    atomic_store_explicit(&tally->is_over, 1, memory_order_relaxed);
}

/* One file on its way. */
typedef struct {
    fcas_file_pass *file;
    fcas_chunks chunks;
    size_t n_hashed;
} pass;

static uint64_t left(const pass *p)
{
    return p->file->size - p->file->got;
}

static int read_next(pass *p, uint8_t *out, size_t size, fcas_tally *tally)
{
    if (atomic_load_explicit(&tally->is_over, memory_order_relaxed))
        return FCAS_FILE_STOPPED;
    while (size > 0) {
        ssize_t n = pread(p->file->fd, out, size, (off_t)p->file->got);
        if (n == 0)
            return FCAS_FILE_CHANGED_WHILE;
        if (n < 0 && errno != EINTR)
            return errno;
        if (n > 0) {
            p->file->got += (uint64_t)n;
            out += n;
            size -= (size_t)n;
        }
    }
    return FCAS_FILE_OK;
}

/* All chunks that both files have whole, as many at a time as half the buffer holds. */
static int pass_two(pass passes[2], uint8_t *buffer, size_t room, fcas_tally *tally, size_t *failed)
{
    const size_t chunk_size = passes[0].chunks.chunk_size, width = room / 2 / chunk_size;
    const uint8_t *const from[2] = {buffer, buffer + width * chunk_size};
    fcas_chunks *const chunks[2] = {&passes[0].chunks, &passes[1].chunks};

    for (;;) {
        const uint64_t both = (left(&passes[0]) < left(&passes[1]) ? left(&passes[0]) : left(&passes[1])) / chunk_size;
        const size_t n = both < width ? (size_t)both : width;
        uint8_t *hashes[2], *midstates[2];

        if (n == 0)
            return FCAS_FILE_OK;
        for (size_t i = 0; i < 2; i++) {
            int why = read_next(&passes[i], buffer + i * width * chunk_size, n * chunk_size, tally);
            if (why != FCAS_FILE_OK) {
                *failed = i;
                return why;
            }
            hashes[i] = passes[i].file->hashes + FCAS_SHA256_DIGEST * passes[i].n_hashed;
            midstates[i] = passes[i].file->midstates + FCAS_SHA256_DIGEST * passes[i].n_hashed;
            passes[i].n_hashed += n;
        }
        fcas_chunks_update_two(chunks, from, n, hashes, midstates);
        fcas_tally_add(tally, 2 * n * chunk_size);
    }
}

/* What is left of one. */
static int pass_one(pass *p, uint8_t *buffer, size_t room, fcas_tally *tally)
{
    const size_t step = room / p->chunks.chunk_size * p->chunks.chunk_size;

    while (left(p) > 0) {
        const size_t n = left(p) < step ? (size_t)left(p) : step;
        int why = read_next(p, buffer, n, tally);

        if (why != FCAS_FILE_OK)
            return why;
        p->n_hashed += fcas_chunks_update(&p->chunks, buffer, n,
                                          p->file->hashes + FCAS_SHA256_DIGEST * p->n_hashed,
                                          p->file->midstates + FCAS_SHA256_DIGEST * p->n_hashed);
        fcas_tally_add(tally, n);
    }
    (void)fcas_chunks_finish(&p->chunks, p->file->hashes + FCAS_SHA256_DIGEST * p->n_hashed, p->file->content);
    return FCAS_FILE_OK;
}

int fcas_pass_files(fcas_file_pass *files, size_t n, const fcas_sha256_kernel *kernel, size_t chunk_size,
                    uint8_t *buffer, size_t room, fcas_tally *tally, size_t *failed)
{
    pass passes[2];
    int why = FCAS_FILE_OK;

    for (size_t i = 0; i < n; i++) {
        passes[i].file = &files[i];
        passes[i].n_hashed = 0;
        files[i].got = 0;
        if (fcas_chunks_init(&passes[i].chunks, kernel, chunk_size) != FCAS_OK) {
            *failed = i;
            return EINVAL;
        }
    }
    if (n == 2)
        why = pass_two(passes, buffer, room, tally, failed);
    for (size_t i = 0; i < n && why == FCAS_FILE_OK; i++) {
        *failed = i;
        why = pass_one(&passes[i], buffer, room, tally);
    }
    return why;
}
