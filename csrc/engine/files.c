/* /files: a run of extents driven by the file's manifest. The manifest is read with pread, never through a mapping:
 * a manifest that shrinks must not kill the worker. Its format stands in fastcas/metadata.py. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/bytes.h"
#include "engine/internal.h"

#define MANIFEST_HEADER 64u

static int read_all(int fd, uint8_t *out, size_t n, uint64_t at)
{
    while (n) {
        ssize_t r = pread(fd, out, n, (off_t)at);
        if (r <= 0)
            return -1;
        out += r;
        at += (uint64_t)r;
        n -= (size_t)r;
    }
    return 0;
}

int fcas_run_open(fcas_engine *e, const uint8_t file_hash[32], fcas_run *shape)
{
    uint8_t    hash[32], header[MANIFEST_HEADER];
    fcas_place place;
    int        busy;
    if (!e->has_table || fcas_table_lookup_file(&e->table, file_hash, hash, &place) != FCAS_OK ||
        place.length < MANIFEST_HEADER)
        return 404;
    fcas_cached *m = fcas_cache_get(e, place, &busy);
    if (!m)
        return busy ? 503 : 404;
    if (read_all(m->fd, header, sizeof header, place.offset) != 0) {
        fcas_cache_withdraw(e, m, FCAS_BLOB_UNREADABLE);
        fcas_cache_put(e, m);
        return 404;
    }
    uint32_t chunk_size = fcas_load_le32(header + 12), n = fcas_load_le32(header + 24);
    uint64_t size = fcas_load_le64(header + 16);
    int      is_cdc = header[9] == 1;
    /* n chunks of a power of two >= 16 KiB each, or n with lengths; no product can overflow within these bounds */
    int ok = memcmp(header, "FCASMAN1", 8) == 0 && header[8] == 1 && header[9] <= 1 && memcmp(header + 32, file_hash, 32) == 0 &&
             chunk_size >= (16u << 10) && chunk_size <= (16u << 20) && (chunk_size & (chunk_size - 1)) == 0 &&
             size <= (1ull << 50) && (is_cdc || n == (size + chunk_size - 1) / chunk_size) &&
             MANIFEST_HEADER + (is_cdc ? 36ull : 32ull) * n <= place.length;
    if (!ok) {
        fcas_cache_put(e, m);
        return 404;
    }
    shape->manifest = m;
    shape->hashes_at = place.offset + MANIFEST_HEADER;
    shape->lengths_at = is_cdc ? shape->hashes_at + 32ull * n : 0;
    shape->size = size;
    shape->chunk_size = chunk_size;
    shape->n_chunks = n;
    return 0;
}

/* The next chunk of the run as an extent of c. 0, 404, 503. */
static int next_extent(fcas_engine *e, fcas_conn *c, fcas_run *run)
{
    if (run->next >= run->n_chunks)
        return 404;
    if (run->next - run->first_hash >= run->n_hashes) {
        uint32_t n = run->n_chunks - run->next;
        n = n < FCAS_HASHES_AHEAD ? n : FCAS_HASHES_AHEAD;
        if (read_all(run->manifest->fd, run->hashes, 32u * n, run->hashes_at + 32ull * run->next) != 0 ||
            (run->lengths_at != 0 &&
             read_all(run->manifest->fd, run->lengths, 4u * n, run->lengths_at + 4ull * run->next) != 0)) {
            fcas_cache_withdraw(e, run->manifest, FCAS_BLOB_UNREADABLE);
            return 404;
        }
        run->first_hash = run->next;
        run->n_hashes = n;
    }
    uint64_t   start = (uint64_t)run->next * run->chunk_size;
    uint64_t   length = run->size - start < run->chunk_size ? run->size - start : run->chunk_size;
    fcas_place place;
    if (run->lengths_at != 0)
        length = fcas_load_le32(run->lengths + 4u * (run->next - run->first_hash));
    if (length <= run->skip)
        return 404;
    if (!e->has_table || fcas_table_lookup(&e->table, FCAS_ENTRY_CHUNK, run->hashes + 32u * (run->next - run->first_hash),
                                           &place) != FCAS_OK || place.length != length)
        return 404;
    uint64_t take = length - run->skip < run->left ? length - run->skip : run->left;
    int      status = fcas_route_extent(e, c, place, run->skip, take);
    if (status == 0) {
        run->left -= take;
        run->next++;
        run->skip = 0;
    }
    return status;
}

/* Where the run's first byte lies: its chunk and how far into it. Chunks with lengths are counted off; n is at most
 * 200,000, so that is 800 KB of the manifest. 0, or 404: they do not reach that far. */
static int find_chunk(fcas_engine *e, fcas_run *run, uint64_t first)
{
    uint8_t  lengths[1024 * 4];
    uint64_t begin = 0;
    if (run->lengths_at == 0) {
        run->next = (uint32_t)(first / run->chunk_size);
        run->skip = (uint32_t)(first % run->chunk_size);
        return 0;
    }
    for (uint32_t at = 0; at < run->n_chunks;) {
        uint32_t n = run->n_chunks - at < 1024 ? run->n_chunks - at : 1024;
        if (read_all(run->manifest->fd, lengths, 4u * n, run->lengths_at + 4ull * at) != 0) {
            fcas_cache_withdraw(e, run->manifest, FCAS_BLOB_UNREADABLE);
            return 404;
        }
        for (uint32_t i = 0; i < n; i++, at++) {
            uint32_t length = fcas_load_le32(lengths + 4u * i);
            if (first - begin < length) {
                run->next = at;
                run->skip = (uint32_t)(first - begin);
                return 0;
            }
            begin += length;
        }
    }
    return 404;
}

int fcas_run_start(fcas_engine *e, fcas_conn *c, const fcas_run *shape, uint64_t first, uint64_t last)
{
    fcas_run *run = malloc(sizeof *run);
    if (!run)
        return 503;
    run->manifest = shape->manifest;
    run->hashes_at = shape->hashes_at;
    run->size = shape->size;
    run->chunk_size = shape->chunk_size;
    run->n_chunks = shape->n_chunks;
    run->left = last - first + 1;
    run->lengths_at = shape->lengths_at;
    run->first_hash = 0;
    run->n_hashes = 0;
    int status = find_chunk(e, run, first);
    if (status == 0)
        status = next_extent(e, c, run);
    if (status != 0) {
        free(run);
        return status;
    }
    c->run = run;
    return 0;
}

int fcas_run_next(fcas_engine *e, fcas_conn *c)
{
    return next_extent(e, c, c->run) == 0 ? 0 : -1;
}
