/* Internal to csrc/table: the chunk table's bytes as C structs (offsets and protocol: table.h). */
#ifndef FCAS_TABLE_LAYOUT_H
#define FCAS_TABLE_LAYOUT_H

#include <assert.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "table/table.h"

#define FCAS_TABLE_SLOTS_AT   4096u
#define FCAS_TABLE_SLOTS_MIN  64u
#define FCAS_TABLE_SLOTS_MAX  (UINT64_C(1) << 32)
#define FCAS_TABLE_BLOBS_MAX  (UINT64_C(1) << 28)
#define FCAS_TABLE_HEAP_MAX   (UINT64_C(1) << 40)
#define FCAS_TABLE_LENGTH_MAX (16u << 20)

typedef struct {
    char     magic[8];
    uint32_t version;
    uint32_t slot_size;
    uint64_t n_slots;
    uint64_t slots_at;
    uint64_t n_blobs;
    uint64_t blobs_at;
    uint64_t heap_at;
    uint64_t heap_size;
    uint64_t secret[2];
    uint64_t total;
    uint64_t reserved[5];
    _Atomic uint64_t epoch;
    _Atomic uint64_t n_live;
    _Atomic uint64_t n_tombstones;
    _Atomic uint64_t heap_used;
} fcas_table_header;

typedef struct {
    uint8_t  key[32];
    uint64_t place;
    uint32_t blob;
    _Atomic uint32_t word;
} fcas_table_slot;

_Static_assert(offsetof(fcas_table_header, n_slots) == 16, "n_slots");
_Static_assert(offsetof(fcas_table_header, heap_size) == 56, "heap_size");
_Static_assert(offsetof(fcas_table_header, secret) == 64, "secret");
_Static_assert(offsetof(fcas_table_header, total) == 80, "total");
_Static_assert(offsetof(fcas_table_header, epoch) == 128, "epoch");
_Static_assert(offsetof(fcas_table_header, heap_used) == 152, "heap_used");
_Static_assert(sizeof(fcas_table_slot) == FCAS_TABLE_SLOT_SIZE, "slot size");
_Static_assert(offsetof(fcas_table_slot, word) == 44, "slot word");
_Static_assert(sizeof(fcas_blob) == 64 && offsetof(fcas_blob, flags) == 44, "blob entry");

enum { FCAS_SLOT_EMPTY = 0, FCAS_SLOT_LIVE = 1, FCAS_SLOT_TOMBSTONE = 2 };

static inline uint32_t fcas_slot_word(uint32_t state, uint32_t type, uint32_t length)
{
    return state | type << 2 | length << 5;
}
static inline uint32_t fcas_word_state(uint32_t word)
{
    return word & 3u;
}
static inline uint32_t fcas_word_type(uint32_t word)
{
    return word >> 2 & 7u;
}
static inline uint32_t fcas_word_length(uint32_t word)
{
    return word >> 5;
}

static inline fcas_table_header *fcas_table_head(const fcas_table *t)
{
    return (fcas_table_header *)(void *)t->base;
}
static inline fcas_table_slot *fcas_table_slots(const fcas_table *t)
{
    return (fcas_table_slot *)(void *)t->slots;
}
static inline fcas_blob *fcas_table_blobs(const fcas_table *t)
{
    return (fcas_blob *)(void *)t->blobs;
}

/* blobs.c, for fcas_table_copy: all live blobs of src but `except` (UINT32_MAX: none). */
fcas_status fcas_table_copy_blobs(fcas_table *dst, const fcas_table *src, uint32_t except);

#endif
