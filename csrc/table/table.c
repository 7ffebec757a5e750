/* The slots of the chunk table: see table.h for the layout and the publication protocol. */
#include "table/table.h"

#include <errno.h>
#include <string.h>

#include "table/layout.h"
#include "table/memfd.h"
#include "table/siphash.h"

static const char MAGIC[8] = {'F', 'C', 'A', 'S', 'T', 'B', 'L', '1'};
#define VERSION   2u
#define NO_SLOT   UINT64_MAX
#define PROBE_LINES 3u /* of 64 B that are fetched ahead: 2 is slower, 4 no faster (bench/table.py) */
#define LOOKAHEAD 16u /* lookups whose cache misses overlap; 8 is slower, 32 no faster (bench/table.py) */

uint64_t fcas_table_bytes(uint64_t n_slots, uint64_t n_blobs, uint64_t heap_size)
{
    if (n_slots < FCAS_TABLE_SLOTS_MIN || n_slots > FCAS_TABLE_SLOTS_MAX || n_blobs < 1 ||
        n_blobs > FCAS_TABLE_BLOBS_MAX || heap_size > FCAS_TABLE_HEAP_MAX)
        return 0;
    /* At most 2^38 + 2^34 + 2^40: no overflow. */
    return FCAS_TABLE_SLOTS_AT + n_slots * FCAS_TABLE_SLOT_SIZE + n_blobs * sizeof(fcas_blob) + heap_size;
}

static void set_view(fcas_table *t, uint8_t *base, size_t size, const fcas_table_header *h, int writable)
{
    t->base = base;
    t->size = size;
    t->n_slots = h->n_slots;
    t->n_blobs = h->n_blobs;
    t->slots = base + h->slots_at;
    t->blobs = base + h->blobs_at;
    t->heap = base + h->heap_at;
    t->heap_size = h->heap_size;
    t->secret[0] = h->secret[0];
    t->secret[1] = h->secret[1];
    t->writable = writable;
}

fcas_status fcas_table_map(fcas_table *t, int fd)
{
    memset(t, 0, sizeof(*t));
    uint8_t *base;
    size_t size;
    fcas_status st = fcas_memfd_map(fd, PROT_READ, FCAS_TABLE_SLOTS_AT, &base, &size);
    if (st != FCAS_OK)
        return st;
    fcas_table_header h; /* a private copy: what is checked is what is used */
    memcpy(&h, base, sizeof(h));
    if (memcmp(h.magic, MAGIC, sizeof(MAGIC)) != 0) {
        st = FCAS_E_CORRUPT;
    } else if (h.version != VERSION) {
        st = FCAS_E_VERSION;
    } else {
        uint64_t total = fcas_table_bytes(h.n_slots, h.n_blobs, h.heap_size);
        if (total == 0 || total != h.total || total != size || h.slot_size != FCAS_TABLE_SLOT_SIZE ||
            h.slots_at != FCAS_TABLE_SLOTS_AT || h.blobs_at != h.slots_at + h.n_slots * FCAS_TABLE_SLOT_SIZE ||
            h.heap_at != h.blobs_at + h.n_blobs * sizeof(fcas_blob))
            st = FCAS_E_CORRUPT;
    }
    if (st != FCAS_OK) {
        munmap(base, size);
        return st;
    }
    set_view(t, base, size, &h, 0);
    return FCAS_OK;
}

void fcas_table_unmap(fcas_table *t)
{
    if (t->base != NULL)
        munmap(t->base, t->size);
    memset(t, 0, sizeof(*t));
}

fcas_status fcas_table_create(fcas_table *t, int fd, uint64_t n_slots, uint64_t n_blobs, uint64_t heap_size,
                              const uint8_t secret[16])
{
    memset(t, 0, sizeof(*t));
    uint64_t total = fcas_table_bytes(n_slots, n_blobs, heap_size);
    if (total == 0 || total > SIZE_MAX)
        return FCAS_E_ARG;
    fcas_status st = fcas_memfd_size(fd, total);
    if (st != FCAS_OK)
        return st;
    void *p = mmap(NULL, (size_t)total, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED)
        return FCAS_E_SYS;
    fcas_table_header *h = p;
    memcpy(h->magic, MAGIC, sizeof(MAGIC));
    h->version = VERSION;
    h->slot_size = FCAS_TABLE_SLOT_SIZE;
    h->n_slots = n_slots;
    h->slots_at = FCAS_TABLE_SLOTS_AT;
    h->n_blobs = n_blobs;
    h->blobs_at = FCAS_TABLE_SLOTS_AT + n_slots * FCAS_TABLE_SLOT_SIZE;
    h->heap_at = h->blobs_at + n_blobs * sizeof(fcas_blob);
    h->heap_size = heap_size;
    memcpy(h->secret, secret, 16);
    h->total = total;
    st = fcas_memfd_seal(fd, 1);
    if (st != FCAS_OK) {
        int saved = errno;
        munmap(p, (size_t)total);
        errno = saved;
        return st;
    }
    set_view(t, p, (size_t)total, h, 1);
    return FCAS_OK;
}

/* ---- lookup ---- */

static inline uint64_t after(const fcas_table *t, uint64_t at)
{
    return at + 1 == t->n_slots ? 0 : at + 1;
}

/* The slot number of the live entry (type, key) on the probe path that begins at slot `at`, or NO_SLOT; its word
 * goes to *word. At most n_slots steps, whatever the bytes are. If `free_slot` is given, it gets the number of the
 * empty slot that ended the search (NO_SLOT when there is none). hot */
static inline uint64_t probe(const fcas_table *t, uint64_t at, uint32_t type, const uint8_t key[32], uint32_t *word,
                             uint64_t *free_slot)
{
    fcas_table_slot *slots = fcas_table_slots(t);
    for (uint64_t step = 0; step < t->n_slots; step++, at = after(t, at)) {
        /* Acquire: pairs with the release store in fill_slot(), so the body of a live slot is whole. */
        uint32_t w = atomic_load_explicit(&slots[at].word, memory_order_acquire);
        if (fcas_word_state(w) == FCAS_SLOT_EMPTY) {
            if (free_slot != NULL)
                *free_slot = at;
            return NO_SLOT;
        }
        if (fcas_word_state(w) == FCAS_SLOT_LIVE && fcas_word_type(w) == type &&
            memcmp(slots[at].key, key, 32) == 0) {
            *word = w;
            return at;
        }
    }
    if (free_slot != NULL)
        *free_slot = NO_SLOT;
    return NO_SLOT;
}

static inline uint64_t home_of(const fcas_table *t, const uint8_t key[32])
{
    return (uint64_t)((unsigned __int128)fcas_siphash32(t->secret, key) * t->n_slots >> 64);
}

static inline fcas_status read_place(const fcas_table *t, uint64_t at, uint32_t word, fcas_place *out)
{
    if (fcas_word_length(word) > FCAS_TABLE_LENGTH_MAX)
        return FCAS_E_NOTFOUND; /* a damaged word */
    const fcas_table_slot *slot = &fcas_table_slots(t)[at];
    out->offset = slot->place;
    out->blob = slot->blob;
    out->length = fcas_word_length(word);
    return FCAS_OK;
}

fcas_status fcas_table_lookup(const fcas_table *t, fcas_entry_type type, const uint8_t key[32], fcas_place *out)
{
    uint32_t word;
    uint64_t at = probe(t, home_of(t, key), (uint32_t)type, key, &word, NULL);
    return at == NO_SLOT ? FCAS_E_NOTFOUND : read_place(t, at, word, out);
}

fcas_status fcas_table_lookup_file(const fcas_table *t, const uint8_t file_hash[32], uint8_t manifest_hash[32],
                                   fcas_place *manifest)
{
    uint32_t word;
    uint64_t at = probe(t, home_of(t, file_hash), FCAS_ENTRY_FILE, file_hash, &word, NULL);
    if (at == NO_SLOT)
        return FCAS_E_NOTFOUND;
    fcas_table_slot *slots = fcas_table_slots(t);
    uint64_t target = slots[at].place;
    if (target >= t->n_slots)
        return FCAS_E_NOTFOUND; /* a damaged slot */
    word = atomic_load_explicit(&slots[target].word, memory_order_acquire);
    if (fcas_word_type(word) != FCAS_ENTRY_MANIFEST)
        return FCAS_E_NOTFOUND;
    memcpy(manifest_hash, slots[target].key, 32);
    if (fcas_word_state(word) == FCAS_SLOT_LIVE)
        return read_place(t, target, word, manifest);
    /* Its manifest was moved or removed; a tombstone keeps its key, so that the file finds the new entry. */
    return fcas_table_lookup(t, FCAS_ENTRY_MANIFEST, manifest_hash, manifest);
}

size_t fcas_table_lookup_many(const fcas_table *t, fcas_entry_type type, const uint8_t *keys, size_t n,
                              fcas_place *out, uint8_t *found)
{
    fcas_table_slot *slots = fcas_table_slots(t);
    uint64_t home[LOOKAHEAD];
    size_t n_found = 0;
    for (size_t from = 0; from < n; from += LOOKAHEAD) {
        size_t batch = n - from < LOOKAHEAD ? n - from : LOOKAHEAD;
        for (size_t i = 0; i < batch; i++) {
            home[i] = home_of(t, keys + 32 * (from + i));
            /* The first two to four slots of a probe; later ones the processor fetches ahead by itself. */
            for (unsigned line = 0; line < PROBE_LINES; line++)
                __builtin_prefetch((const uint8_t *)&slots[home[i]] + 64 * line, 0, 1);
        }
        for (size_t i = 0; i < batch; i++) {
            uint32_t word;
            uint64_t at = probe(t, home[i], (uint32_t)type, keys + 32 * (from + i), &word, NULL);
            int hit = at != NO_SLOT && read_place(t, at, word, &out[from + i]) == FCAS_OK;
            found[from + i] = (uint8_t)hit;
            n_found += (size_t)hit;
        }
    }
    return n_found;
}

uint64_t fcas_table_epoch(const fcas_table *t)
{
    return atomic_load_explicit(&fcas_table_head(t)->epoch, memory_order_acquire);
}

/* ---- the writer ---- */

static int is_full(const fcas_table *t)
{
    uint64_t used = atomic_load_explicit(&fcas_table_head(t)->n_live, memory_order_relaxed) +
                    atomic_load_explicit(&fcas_table_head(t)->n_tombstones, memory_order_relaxed);
    return used >= t->n_slots / 8 * 7;
}

static void fill_slot(fcas_table *t, uint64_t at, const uint8_t key[32], uint64_t place, uint32_t blob, uint32_t word)
{
    fcas_table_slot *slot = &fcas_table_slots(t)[at];
    memcpy(slot->key, key, 32);
    slot->place = place;
    slot->blob = blob;
    /* Release: pairs with the acquire load in probe(). */
    atomic_store_explicit(&slot->word, word, memory_order_release);
    atomic_fetch_add_explicit(&fcas_table_head(t)->n_live, 1, memory_order_relaxed);
}

static void bury_slot(fcas_table *t, uint64_t at, uint32_t word)
{
    uint32_t tombstone = fcas_slot_word(FCAS_SLOT_TOMBSTONE, fcas_word_type(word), fcas_word_length(word));
    atomic_store_explicit(&fcas_table_slots(t)[at].word, tombstone, memory_order_release);
    atomic_fetch_add_explicit(&fcas_table_head(t)->n_tombstones, 1, memory_order_relaxed);
    atomic_fetch_sub_explicit(&fcas_table_head(t)->n_live, 1, memory_order_relaxed);
}

/* Insert or replace: the new slot becomes visible before the old one goes, so a reader finds one of them. */
static fcas_status put(fcas_table *t, uint32_t type, const uint8_t key[32], uint64_t place, uint32_t blob,
                       uint32_t length)
{
    if (!t->writable || length > FCAS_TABLE_LENGTH_MAX)
        return FCAS_E_ARG;
    uint32_t old_word = 0;
    uint64_t free_slot = NO_SLOT;
    uint64_t home = home_of(t, key);
    uint64_t old = probe(t, home, type, key, &old_word, &free_slot);
    if (old != NO_SLOT) {
        const fcas_table_slot *slot = &fcas_table_slots(t)[old];
        if (slot->place == place && slot->blob == blob && fcas_word_length(old_word) == length)
            return FCAS_OK;
        uint64_t at = after(t, old);
        for (uint64_t step = 1; step < t->n_slots && free_slot == NO_SLOT; step++, at = after(t, at))
            if (fcas_word_state(atomic_load_explicit(&fcas_table_slots(t)[at].word, memory_order_relaxed)) ==
                FCAS_SLOT_EMPTY)
                free_slot = at;
    }
    if (free_slot == NO_SLOT || is_full(t))
        return FCAS_E_FULL;
    fill_slot(t, free_slot, key, place, blob, fcas_slot_word(FCAS_SLOT_LIVE, type, length));
    if (old != NO_SLOT)
        bury_slot(t, old, old_word);
    return FCAS_OK;
}

fcas_status fcas_table_put(fcas_table *t, fcas_entry_type type, const uint8_t key[32], fcas_place place)
{
    if (type != FCAS_ENTRY_CHUNK && type != FCAS_ENTRY_MANIFEST)
        return FCAS_E_ARG;
    return put(t, (uint32_t)type, key, place.offset, place.blob, place.length);
}

fcas_status fcas_table_put_file(fcas_table *t, const uint8_t file_hash[32], const uint8_t manifest_hash[32])
{
    uint32_t word;
    uint64_t target = probe(t, home_of(t, manifest_hash), FCAS_ENTRY_MANIFEST, manifest_hash, &word, NULL);
    if (target == NO_SLOT)
        return FCAS_E_NOTFOUND;
    return put(t, FCAS_ENTRY_FILE, file_hash, target, 0, 0);
}

fcas_status fcas_table_remove(fcas_table *t, fcas_entry_type type, const uint8_t key[32])
{
    if (!t->writable)
        return FCAS_E_ARG;
    uint32_t word;
    uint64_t at = probe(t, home_of(t, key), (uint32_t)type, key, &word, NULL);
    if (at == NO_SLOT)
        return FCAS_E_NOTFOUND;
    bury_slot(t, at, word);
    return FCAS_OK;
}

uint64_t fcas_table_advance(fcas_table *t)
{
    if (!t->writable)
        return fcas_table_epoch(t);
    return atomic_fetch_add_explicit(&fcas_table_head(t)->epoch, 1, memory_order_release) + 1;
}

static fcas_status copy_slots(fcas_table *dst, const fcas_table *src, int files)
{
    const fcas_table_slot *slots = fcas_table_slots(src);
    for (uint64_t i = 0; i < src->n_slots; i++) {
        uint32_t word = atomic_load_explicit(&slots[i].word, memory_order_acquire);
        if (fcas_word_state(word) != FCAS_SLOT_LIVE || (fcas_word_type(word) == FCAS_ENTRY_FILE) != files)
            continue;
        fcas_status st;
        if (files) {
            uint8_t manifest_hash[32];
            fcas_place manifest;
            if (fcas_table_lookup_file(src, slots[i].key, manifest_hash, &manifest) != FCAS_OK)
                continue; /* its manifest is gone: nobody can find it in src either */
            st = fcas_table_put_file(dst, slots[i].key, manifest_hash);
        } else {
            st = put(dst, fcas_word_type(word), slots[i].key, slots[i].place, slots[i].blob, fcas_word_length(word));
        }
        if (st != FCAS_OK)
            return st;
    }
    return FCAS_OK;
}

fcas_status fcas_table_copy_except(fcas_table *dst, const fcas_table *src, uint32_t blob)
{
    if (!dst->writable)
        return FCAS_E_ARG;
    fcas_status st = fcas_table_copy_blobs(dst, src, blob);
    if (st == FCAS_OK)
        st = copy_slots(dst, src, 0);
    if (st == FCAS_OK)
        st = copy_slots(dst, src, 1);
    if (st == FCAS_OK)
        atomic_store_explicit(&fcas_table_head(dst)->epoch, fcas_table_epoch(src), memory_order_release);
    return st;
}

fcas_status fcas_table_copy(fcas_table *dst, const fcas_table *src)
{
    return fcas_table_copy_except(dst, src, UINT32_MAX);
}
