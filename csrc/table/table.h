/* The chunk table: a map in shared memory from hashes to places on disk. One writer (the agent), any number
 * of lock-free readers (workers), in one memfd that the writer maps read-write and then seals
 * SHRINK | GROW | FUTURE_WRITE.
 *
 * Layout of the memfd, little-endian:
 *
 *   offset  size  field
 *   0       8     magic "FCASTBL1"
 *   8       4     version, 2
 *   12      4     slot size in bytes, 48
 *   16      8     n_slots
 *   24      8     slots_at: byte offset of the slot array (4096)
 *   32      8     n_blobs: capacity of the blob directory
 *   40      8     blobs_at: byte offset of the blob directory
 *   48      8     heap_at: byte offset of the path heap
 *   56      8     heap_size in bytes
 *   64      16    secret: key of the slot hash (SipHash-2-4 over all 32 bytes: nobody outside can aim collisions); a
 *                 probe begins at slot hash * n_slots / 2^64 and goes on by one, from the last slot to the first
 *   80      8     total size of the memfd
 *   128     8     epoch       (atomic; advanced by the writer after tombstones, see counters.h)
 *   136     8     n_live      (atomic, statistics)
 *   144     8     n_tombstones(atomic, statistics)
 *   152     8     heap_used   (atomic)
 *
 * A slot, 48 bytes:
 *
 *   0       32    key
 *   32      8     place: chunk, manifest: offset in the blob; file: slot number of its manifest's entry
 *   40      4     blob number (file: 0)
 *   44      4     word, atomic: bits 0-1 state (0 empty, 1 live, 2 tombstone), bits 2-4 type
 *                 (1 chunk, 2 manifest, 3 file), bits 5-31 length in bytes (<= 16 MiB; file: 0)
 *
 * A blob directory entry, 64 bytes: see fcas_blob.
 *
 * Publication protocol. The writer fills key, place and blob of an empty slot, then stores the word with
 * memory_order_release; a reader loads the word with memory_order_acquire before it reads the body, so a live
 * word implies a whole body. A body never changes after that and a slot is never reused within one memfd:
 * deletion stores the tombstone word (release), a later insertion of the same key takes a new slot. A probe ends
 * at the first empty slot. Growth, or too many tombstones, make a new memfd (fcas_table_copy); readers move over
 * when they are handed it.
 *
 * Trust: readers check every number that they use against the mapping's size, so a damaged table can make a
 * lookup miss or name a wrong place, never read outside the mapping. What is at the place is checked by whoever
 * serves it (identity and length of the blob) and in the end by the client's SHA-256. */
#ifndef FCAS_TABLE_H
#define FCAS_TABLE_H

#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

#define FCAS_TABLE_SLOT_SIZE 48u
#define FCAS_PATH_MAX_BYTES  4096u

typedef enum { FCAS_ENTRY_CHUNK = 1, FCAS_ENTRY_MANIFEST = 2, FCAS_ENTRY_FILE = 3 } fcas_entry_type;

enum {
    FCAS_BLOB_LIVE    = 1u << 0,
    FCAS_BLOB_LINKED  = 1u << 1, /* the user's own file: size and mtime_ns must match, too */
    FCAS_BLOB_GROWING = 1u << 2  /* a part file: only device and inode must match */
};

/* One blob directory entry as it lies in shared memory. flags is written last (release). An owned blob may be
 * punched (mtime changes), so only device, inode and "size not smaller" are compared for it. */
typedef struct {
    uint64_t device;
    uint64_t inode;
    uint64_t size;     /* bytes at registration */
    int64_t  mtime_ns;
    uint64_t path_at;  /* byte offset in the path heap */
    uint32_t path_len; /* bytes, no terminating NUL; 1..FCAS_PATH_MAX_BYTES */
    uint32_t flags;    /* atomic; FCAS_BLOB_*; 0 = unused or withdrawn */
    uint64_t reserved[2];
} fcas_blob;

/* Where something lies. */
typedef struct {
    uint64_t offset;
    uint32_t length;
    uint32_t blob;
} fcas_place;

/* One process's view of a table. */
typedef struct {
    uint8_t *base;
    size_t   size;     /* bytes mapped */
    uint64_t n_slots;
    uint64_t n_blobs;
    uint8_t *slots;
    uint8_t *blobs;
    uint8_t *heap;
    uint64_t heap_size;
    uint64_t secret[2];
    int      writable;
} fcas_table;

/* ---- both sides ---- */

/* Map the table in fd read-only. FCAS_E_CORRUPT, FCAS_E_VERSION or FCAS_E_SYS; *t is usable only on FCAS_OK.
 * The fd may be closed afterwards. */
fcas_status fcas_table_map(fcas_table *t, int fd);
/* Unmap. Safe on a zeroed struct. */
void fcas_table_unmap(fcas_table *t);

/* Find key as the given type. FCAS_OK and *out (chunk, manifest), or FCAS_E_NOTFOUND. At 3/4 full it reads 2.5 slots
 * that lie together for a key that is there, 8.5 for one that is not. hot */
fcas_status fcas_table_lookup(const fcas_table *t, fcas_entry_type type, const uint8_t key[32], fcas_place *out);
/* A file's manifest: its hash and its place. hot */
fcas_status fcas_table_lookup_file(const fcas_table *t, const uint8_t file_hash[32], uint8_t manifest_hash[32],
                                   fcas_place *manifest);
/* n lookups with prefetch; found[i] = 1 or 0; keys n*32 bytes. Returns how many were found. */
size_t fcas_table_lookup_many(const fcas_table *t, fcas_entry_type type, const uint8_t *keys, size_t n,
                              fcas_place *out, uint8_t *found);
/* Copy of blob entry `number` and its path, NUL-terminated, into path. FCAS_E_NOTFOUND if it is not live. */
fcas_status fcas_table_blob(const fcas_table *t, uint32_t number, fcas_blob *out, char path[FCAS_PATH_MAX_BYTES + 1]);
/* The current epoch (acquire). */
uint64_t fcas_table_epoch(const fcas_table *t);

/* ---- the writer ---- */

/* Bytes that a table of this shape needs, or 0 if a number is out of range (n_slots 64..2^32; n_blobs
 * 1..2^28; heap_size <= 2^40). Checked for overflow. */
uint64_t fcas_table_bytes(uint64_t n_slots, uint64_t n_blobs, uint64_t heap_size);
/* Make an empty table in fd (a fresh memfd): ftruncate, map read-write, write the header, seal. */
fcas_status fcas_table_create(fcas_table *t, int fd, uint64_t n_slots, uint64_t n_blobs, uint64_t heap_size,
                              const uint8_t secret[16]);
/* Insert, or replace if the key is there with another place (new slot first, then the old one's tombstone).
 * FCAS_E_FULL when more than 7/8 of the slots are used or tombstones; FCAS_E_ARG for a length over 16 MiB. */
fcas_status fcas_table_put(fcas_table *t, fcas_entry_type type, const uint8_t key[32], fcas_place place);
/* file -> manifest; the manifest's entry must be there (FCAS_E_NOTFOUND). When that entry is replaced later
 * (fcas_table_put of the same key), the files that point to it follow: a tombstone keeps its key. */
fcas_status fcas_table_put_file(fcas_table *t, const uint8_t file_hash[32], const uint8_t manifest_hash[32]);
/* Tombstone. FCAS_E_NOTFOUND if it is not there. */
fcas_status fcas_table_remove(fcas_table *t, fcas_entry_type type, const uint8_t key[32]);
/* Set blob entry `number` (must be unused in this memfd, else FCAS_E_ARG); FCAS_E_FULL if the directory or heap is. */
fcas_status fcas_table_put_blob(fcas_table *t, uint32_t number, const fcas_blob *blob, const char *path, size_t path_len);
/* Withdraw a blob: readers that look it up from now on miss. Its extents' entries stay until removed. */
fcas_status fcas_table_remove_blob(fcas_table *t, uint32_t number);
/* Advance the epoch by one (release) and return the new value: everything tombstoned before is unreachable for
 * lookups that start in that epoch. */
uint64_t fcas_table_advance(fcas_table *t);
/* Copy all live entries and blobs of src into dst (empty, large enough). Keeps the epoch. */
fcas_status fcas_table_copy(fcas_table *dst, const fcas_table *src);
/* The same without one blob's directory entry, whose number can then be put again. */
fcas_status fcas_table_copy_except(fcas_table *dst, const fcas_table *src, uint32_t blob);
/* One more than the highest live blob number; *path_bytes = heap bytes of all live paths. One pass. */
uint64_t fcas_table_blob_usage(const fcas_table *t, uint64_t *path_bytes);

#endif
