/* Which chunks of one partial file are here: an append-only log of chunk numbers in shared memory. One writer
 * (the agent, while it downloads), any number of lock-free readers (workers that answer /swarm), in one memfd
 * that the writer maps read-write and then seals SHRINK | GROW | FUTURE_WRITE.
 *
 * Layout of the memfd, little-endian:
 *
 *   offset  size  field
 *   0       8     magic "FCASHAV1"
 *   8       4     version, 1
 *   12      4     n_total: chunks of the manifest, data then parity; 1..FCAS_HAVELOG_TOTAL_MAX
 *   16      8     total size of the memfd
 *   24      8     entries_at: byte offset of the log (4096)
 *   32      32    file_hash
 *   64      32    manifest_hash
 *   128     8     generation: entries in the log (atomic)
 *   4096    ..    n_total entries: u32 chunk number, each at most once
 *
 * Publication protocol. The writer stores entry g, then stores generation g + 1 with release order; a reader
 * loads generation with acquire order and reads only entries below it. Entries never change and never go away: a
 * chunk that is lost again ends the log, and its owner makes a new one.
 *
 * Trust: readers clip generation to n_total and ignore entries >= n_total. */
#ifndef FCAS_HAVELOG_H
#define FCAS_HAVELOG_H

#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

#define FCAS_HAVELOG_TOTAL_MAX (1u << 24)

/* One process's view. Not thread-safe. */
typedef struct {
    uint8_t *base;
    size_t   size;    /* bytes mapped */
    uint32_t n_total;
    uint32_t applied; /* log entries that are in bits */
    uint8_t *bits;    /* (n_total + 7) / 8 bytes, private; bit i = byte i / 8, mask 0x80 >> (i % 8) */
    int      writable;
} fcas_havelog;

/* Make an empty log in fd (a fresh memfd): ftruncate, map read-write, header, seal. */
fcas_status fcas_havelog_create(fcas_havelog *h, int fd, const uint8_t file_hash[32], const uint8_t manifest_hash[32],
                                uint32_t n_total);
/* Map a log read-only. FCAS_E_CORRUPT (also when fd can still shrink), FCAS_E_VERSION, FCAS_E_NOMEM, FCAS_E_SYS.
 * The fd may be closed afterwards. */
fcas_status fcas_havelog_map(fcas_havelog *h, int fd);
/* Unmap and free. Safe on a zeroed struct. */
void fcas_havelog_unmap(fcas_havelog *h);

/* The 32 bytes in the mapping; valid until unmap. */
const uint8_t *fcas_havelog_file_hash(const fcas_havelog *h);
const uint8_t *fcas_havelog_manifest_hash(const fcas_havelog *h);

/* Writer: chunk i is here. A chunk that is in the log already changes nothing. FCAS_E_ARG for i >= n_total. */
fcas_status fcas_havelog_append(fcas_havelog *h, uint32_t i);
/* Entries in the log (acquire). */
uint32_t fcas_havelog_generation(const fcas_havelog *h);
/* Copy at most max entries from number `from` on into out; returns how many. None when `from` is at or past the
 * generation. */
uint32_t fcas_havelog_since(const fcas_havelog *h, uint32_t from, uint32_t *out, uint32_t max);
/* Bring h->bits up to date and return the generation that it shows. Cost: one step per new entry. */
uint32_t fcas_havelog_refresh(fcas_havelog *h);

#endif
