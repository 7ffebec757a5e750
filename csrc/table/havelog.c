/* Append-only log of the chunks of one partial file: see havelog.h. */
#include "table/havelog.h"

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "table/memfd.h"

static const char MAGIC[8] = {'F', 'C', 'A', 'S', 'H', 'A', 'V', '1'};
#define VERSION    1u
#define ENTRIES_AT 4096u

typedef struct {
    char     magic[8];
    uint32_t version;
    uint32_t n_total;
    uint64_t total;
    uint64_t entries_at;
    uint8_t  file_hash[32];
    uint8_t  manifest_hash[32];
    uint64_t reserved[4];
    _Atomic uint64_t generation;
} log_header;

_Static_assert(offsetof(log_header, file_hash) == 32, "file_hash");
_Static_assert(offsetof(log_header, manifest_hash) == 64, "manifest_hash");
_Static_assert(offsetof(log_header, generation) == 128, "generation");

static log_header *header(const fcas_havelog *h)
{
    return (log_header *)(void *)h->base;
}

static uint32_t *entries(const fcas_havelog *h)
{
    return (uint32_t *)(void *)(h->base + ENTRIES_AT);
}

static uint64_t log_bytes(uint32_t n_total)
{
    return ENTRIES_AT + (uint64_t)n_total * sizeof(uint32_t);
}

static uint8_t bit_mask(uint32_t i)
{
    return (uint8_t)(0x80u >> (i % 8));
}

fcas_status fcas_havelog_create(fcas_havelog *h, int fd, const uint8_t file_hash[32], const uint8_t manifest_hash[32],
                                uint32_t n_total)
{
    memset(h, 0, sizeof(*h));
    if (n_total < 1 || n_total > FCAS_HAVELOG_TOTAL_MAX)
        return FCAS_E_ARG;
    size_t size = (size_t)log_bytes(n_total);
    fcas_status st = fcas_memfd_size(fd, size);
    if (st != FCAS_OK)
        return st;
    uint8_t *bits = calloc((n_total + 7) / 8, 1);
    if (bits == NULL)
        return FCAS_E_NOMEM;
    uint8_t *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) {
        free(bits);
        return FCAS_E_SYS;
    }
    log_header *head = (log_header *)(void *)base;
    memcpy(head->magic, MAGIC, sizeof(MAGIC));
    head->version = VERSION;
    head->n_total = n_total;
    head->total = size;
    head->entries_at = ENTRIES_AT;
    memcpy(head->file_hash, file_hash, 32);
    memcpy(head->manifest_hash, manifest_hash, 32);
    st = fcas_memfd_seal(fd, 1);
    if (st != FCAS_OK) {
        int saved = errno;
        munmap(base, size);
        free(bits);
        errno = saved;
        return st;
    }
    h->base = base;
    h->size = size;
    h->n_total = n_total;
    h->bits = bits;
    h->writable = 1;
    return FCAS_OK;
}

fcas_status fcas_havelog_map(fcas_havelog *h, int fd)
{
    memset(h, 0, sizeof(*h));
    uint8_t *base;
    size_t size;
    fcas_status st = fcas_memfd_map(fd, PROT_READ, ENTRIES_AT, &base, &size);
    if (st != FCAS_OK)
        return st;
    log_header head; /* a private copy: what is checked is what is used */
    memcpy(&head, base, sizeof(head));
    if (memcmp(head.magic, MAGIC, sizeof(MAGIC)) != 0)
        st = FCAS_E_CORRUPT;
    else if (head.version != VERSION)
        st = FCAS_E_VERSION;
    else if (head.n_total < 1 || head.n_total > FCAS_HAVELOG_TOTAL_MAX || head.entries_at != ENTRIES_AT ||
             head.total != log_bytes(head.n_total) || head.total != size)
        st = FCAS_E_CORRUPT;
    uint8_t *bits = NULL;
    if (st == FCAS_OK && (bits = calloc((head.n_total + 7) / 8, 1)) == NULL)
        st = FCAS_E_NOMEM;
    if (st != FCAS_OK) {
        munmap(base, size);
        return st;
    }
    h->base = base;
    h->size = size;
    h->n_total = head.n_total;
    h->bits = bits;
    return FCAS_OK;
}

void fcas_havelog_unmap(fcas_havelog *h)
{
    if (h->base != NULL)
        munmap(h->base, h->size);
    free(h->bits);
    memset(h, 0, sizeof(*h));
}

const uint8_t *fcas_havelog_file_hash(const fcas_havelog *h)
{
    return header(h)->file_hash;
}

const uint8_t *fcas_havelog_manifest_hash(const fcas_havelog *h)
{
    return header(h)->manifest_hash;
}

uint32_t fcas_havelog_generation(const fcas_havelog *h)
{
    /* Acquire: pairs with the release store in fcas_havelog_append(). */
    uint64_t generation = atomic_load_explicit(&header(h)->generation, memory_order_acquire);
    return generation < h->n_total ? (uint32_t)generation : h->n_total;
}

uint32_t fcas_havelog_since(const fcas_havelog *h, uint32_t from, uint32_t *out, uint32_t max)
{
    uint32_t generation = fcas_havelog_generation(h);
    uint32_t n = 0;
    for (uint32_t g = from; g < generation && n < max; g++) {
        uint32_t i = entries(h)[g];
        if (i < h->n_total)
            out[n++] = i;
    }
    return n;
}

uint32_t fcas_havelog_refresh(fcas_havelog *h)
{
    uint32_t generation = fcas_havelog_generation(h);
    for (; h->applied < generation; h->applied++) {
        uint32_t i = entries(h)[h->applied];
        if (i < h->n_total)
            h->bits[i / 8] |= bit_mask(i);
    }
    return h->applied;
}

fcas_status fcas_havelog_append(fcas_havelog *h, uint32_t i)
{
    if (!h->writable || i >= h->n_total)
        return FCAS_E_ARG;
    uint32_t generation = fcas_havelog_refresh(h);
    if (h->bits[i / 8] & bit_mask(i))
        return FCAS_OK;
    /* Each chunk at most once, so generation < n_total here. */
    entries(h)[generation] = i;
    /* Release: pairs with the acquire load in fcas_havelog_generation(). */
    atomic_store_explicit(&header(h)->generation, (uint64_t)generation + 1, memory_order_release);
    fcas_havelog_refresh(h);
    return FCAS_OK;
}
