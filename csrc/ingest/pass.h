/* One pass over one or two open files, from their first byte to their last: reads into the caller's buffer and hashes
 * what it has read, the chunks' and the content's hashes at once (sha256/chunks.h), two files side by side.
 *
 * A buffer that a core's own cache holds is faster than a larger one. Allocates nothing; may run in any number of
 * threads, each with its own files and buffer, on one tally. */
#ifndef FCAS_INGEST_PASS_H
#define FCAS_INGEST_PASS_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "ingest/files.h"
#include "sha256/sha256.h"

/* What the threads of one job share: how far they are, and whether they shall stop. */
typedef struct {
    _Atomic uint64_t n_bytes;
    atomic_int is_over;
} fcas_tally;

typedef struct {
    int fd;              /* read by position; its own position stays */
    uint64_t size;       /* > 0, bytes that it must have */
    uint8_t *hashes;     /* out: 32 bytes per chunk, a shorter last one included */
    uint8_t *midstates;  /* out: 32 bytes per whole chunk: the content's chaining value after it */
    uint8_t content[32]; /* out: the digest of all */
    uint64_t got;        /* out: bytes read, of a file that was read in vain too */
} fcas_file_pass;

/* FCAS_FILE_OK and all outputs, or why number *failed of them could not be read: a positive errno,
 * FCAS_FILE_CHANGED_WHILE if it ends before its size, or FCAS_FILE_STOPPED once tally->is_over is set, which is looked at
 * before each read. n is 1 or 2, chunk_size a positive multiple of 64, and room >= n * chunk_size bytes; so much of it as
 * is whole chunks is used. */
int fcas_pass_files(fcas_file_pass *files, size_t n, const fcas_sha256_kernel *kernel, size_t chunk_size,
                    uint8_t *buffer, size_t room, fcas_tally *tally, size_t *failed);

void fcas_tally_add(fcas_tally *tally, uint64_t n_bytes);
uint64_t fcas_tally_bytes(const fcas_tally *tally);
void fcas_tally_stop(fcas_tally *tally);

#endif
