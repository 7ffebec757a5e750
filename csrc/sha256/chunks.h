/* One pass over a file: the digest of each chunk, the content's chaining value after it, and the digest
 * of the whole.
 *
 * Each byte goes into two hashes at once (fcas_sha256_update2): the present chunk's, which starts anew at
 * each chunk, and the content's. Chunk sizes are multiples of 64, so both always stand at the same place in
 * a block. Eight whole chunks or more in one update, of a multiple of 512 bytes each, go side by side where the
 * kernel can do that, and so do four of each of two files. The caller owns all memory and asks
 * fcas_chunks_completed_by() how much an update will write. */
#ifndef FCAS_CHUNKS_H
#define FCAS_CHUNKS_H

#include "sha256/sha256.h"

typedef struct {
    fcas_sha256 chunk;
    fcas_sha256 content;
    size_t chunk_size; /* a multiple of 64, > 0 */
    size_t filled;     /* bytes in the present chunk, 0..chunk_size-1 */
} fcas_chunks;

/* Begin a file. kernel may be NULL: the default one. FCAS_E_ARG (and *c unchanged) unless chunk_size is a
 * positive multiple of 64. */
fcas_status fcas_chunks_init(fcas_chunks *c, const fcas_sha256_kernel *kernel, size_t chunk_size);

/* Continue one after its first length bytes, a multiple of chunk_size, of which midstate is the content's chaining
 * value; else FCAS_E_ARG (and *c unchanged). */
fcas_status fcas_chunks_resume(fcas_chunks *c, const fcas_sha256_kernel *kernel, size_t chunk_size,
                               const uint8_t midstate[32], uint64_t length);

/* How many chunks the next n bytes complete. */
size_t fcas_chunks_completed_by(const fcas_chunks *c, size_t n);

/* Feed n >= 0 bytes of any alignment. For each chunk that they complete, 32 bytes of its digest go to
 * hashes and 32 bytes of the content's chaining value after it to midstates. Returns the number of chunks
 * completed, fcas_chunks_completed_by(c, n). Never allocates, never fails. */
size_t fcas_chunks_update(fcas_chunks *c, const uint8_t *p, size_t n, uint8_t *hashes, uint8_t *midstates);

/* Feed the next n_chunks whole chunks of two files, both of which stand at the begin of a chunk; else nothing is
 * promised. The same as fcas_chunks_update of each; four or more chunks, of a multiple of 256 bytes each, go side by
 * side if chunk size and kernel are the same. */
void fcas_chunks_update_two(fcas_chunks *const c[2], const uint8_t *const p[2], size_t n_chunks,
                            uint8_t *const hashes[2], uint8_t *const midstates[2]);

/* End the file: its digest goes to content_hash and, when a last chunk is begun but not full, that one's to
 * last_hash. Returns the number of such chunks, 0 or 1. *c must be initialised again before further use. */
size_t fcas_chunks_finish(fcas_chunks *c, uint8_t last_hash[32], uint8_t content_hash[32]);

#endif
