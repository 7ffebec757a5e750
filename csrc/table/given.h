/* The "given and not lost" sets behind NEXT: for each file that a node seeds, one bit per chunk, set when the chunk
 * was handed out. One memfd per node (sealed SHRINK | GROW), mapped read-write by every worker, so that all
 * workers act as one seed. All operations are lock-free: a worker that is killed anywhere in them blocks nobody.
 *
 * Layout of the memfd, little-endian:
 *
 *   offset  size  field
 *   0       8     magic "FCASGIV1"
 *   8       4     version, 1
 *   12      4     n_slots: capacity of a directory, a power of two, 1..65536
 *   16      8     bits_size: bytes of a bit arena, a multiple of 8, 64..1 GiB
 *   24      8     total size of the memfd
 *   32      16    secret: key of the SipHash-2-4 that turns a manifest hash into a directory tag
 *   128     16    used: words (of 64 bits) handed out from the arena of each half (atomic)
 *   144     8     turn: bits 0-62 how often the halves changed places, bit 63 set while somebody empties the
 *                 other one (atomic); the half in use is turn % 2
 *   4096    ..    directory of half 0, of half 1: n_slots entries of 16 bytes each
 *   ..      ..    bit arena of half 0, of half 1: u64 words; chunk i = word i / 64, bit i % 64
 *
 * A directory entry, 16 bytes:
 *
 *   0       8     tag, atomic: SipHash of the manifest hash, never 0; 0 = free
 *   8       8     region, atomic: bits 0-31 number of chunks, bits 32-63 first word in the arena; 0 = none yet
 *
 * Publication protocol. A file's entry is the first one on its probe path whose tag is its own; a free entry is
 * taken by compare-and-swap of the tag, then a region is cut from the arena and offered by compare-and-swap of the
 * region (release; readers load with acquire): whoever finds the tag without a region offers one, so nobody waits
 * for a process that died in between. A loser's region is lost. Bits are claimed by atomic or, cleared by atomic
 * and. Entries are never freed one by one: when the half in use has no room for another file, whoever finds that
 * empties the other half and makes it the one in use (turn, release); what was given of the files before is
 * forgotten, so a chunk may be given twice. If that process dies meanwhile, the halves stay as they are and further
 * files have no set. A process that was stopped through a whole turn may leave a wrong bit or region behind, at
 * worst hiding chunks from NEXT: the board is a hint about what to send first, never about what may be asked for.
 *
 * Trust: a region is checked against the arena at every use. */
#ifndef FCAS_GIVEN_H
#define FCAS_GIVEN_H

#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

#define FCAS_GIVEN_CHUNKS_MAX (1u << 24)

typedef struct {
    uint8_t *base;
    size_t   size;    /* bytes mapped */
    uint32_t n_slots;
    uint64_t n_words; /* of one arena */
    uint64_t secret[2];
} fcas_given;

/* Make an empty board in fd (a fresh memfd), seal SHRINK | GROW. FCAS_E_ARG for numbers out of range. */
fcas_status fcas_given_create(int fd, uint32_t n_slots, uint64_t bits_size, const uint8_t secret[16]);
/* Map it read-write. FCAS_E_CORRUPT (also when fd can still shrink), FCAS_E_VERSION, FCAS_E_SYS. The fd may be
 * closed afterwards. */
fcas_status fcas_given_map(fcas_given *b, int fd);
/* Unmap. Safe on a zeroed struct. */
void fcas_given_unmap(fcas_given *b);

/* n: chunks of the manifest, 1..FCAS_GIVEN_CHUNKS_MAX, the same in every call for one manifest. Safe from any
 * thread and process at once. */

/* Mark chunk i as given. FCAS_OK: we were first; FCAS_E_NOTFOUND: it was given before; FCAS_E_FULL: no room for
 * this file, or another n is on the board for it; FCAS_E_ARG: i >= n or n out of range. */
fcas_status fcas_given_claim(fcas_given *b, const uint8_t manifest_hash[32], uint32_t n, uint32_t i);
/* Claim the (pick % m)-th of the m chunks in [start, n) that were never given. Results as above, FCAS_E_NOTFOUND:
 * none is left. Cost: n / 64 steps. */
fcas_status fcas_given_claim_from(fcas_given *b, const uint8_t manifest_hash[32], uint32_t n, uint32_t start,
                                  uint64_t pick, uint32_t *out);
/* Chunk i did not arrive after all: it may be given again. */
void fcas_given_clear(fcas_given *b, const uint8_t manifest_hash[32], uint32_t i);
/* 1 if chunk i was given, else 0. */
int fcas_given_is_given(const fcas_given *b, const uint8_t manifest_hash[32], uint32_t i);

#endif
