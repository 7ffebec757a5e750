/* Single-producer single-consumer ring of messages: see ring.h. */
#include "table/ring.h"

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#include "table/memfd.h"

static const char MAGIC[8] = {'F', 'C', 'A', 'S', 'R', 'N', 'G', '1'};
#define VERSION     1u
#define DATA_AT     4096u
#define RECORD_HEAD 8u

typedef struct {
    char     magic[8];
    uint32_t version;
    uint32_t reserved0;
    uint64_t capacity;
    uint64_t total;
    uint64_t reserved1[12];
    _Atomic uint64_t tail;
    uint64_t reserved2[15];
    _Atomic uint64_t head;
} ring_header;

_Static_assert(offsetof(ring_header, capacity) == 16, "capacity");
_Static_assert(offsetof(ring_header, tail) == 128, "tail");
_Static_assert(offsetof(ring_header, head) == 256, "head");

static ring_header *header(const fcas_ring *r)
{
    return (ring_header *)(void *)r->base;
}

static int capacity_is_valid(uint64_t capacity)
{
    return capacity >= FCAS_RING_CAPACITY_MIN && capacity <= FCAS_RING_CAPACITY_MAX &&
           (capacity & (capacity - 1)) == 0;
}

static uint64_t record_size(uint64_t length)
{
    return RECORD_HEAD + ((length + 7) & ~UINT64_C(7));
}

fcas_status fcas_ring_create(int fd, uint64_t capacity)
{
    if (!capacity_is_valid(capacity))
        return FCAS_E_ARG;
    fcas_status st = fcas_memfd_size(fd, DATA_AT + capacity);
    if (st != FCAS_OK)
        return st;
    ring_header *h = mmap(NULL, DATA_AT, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (h == MAP_FAILED)
        return FCAS_E_SYS;
    memcpy(h->magic, MAGIC, sizeof(MAGIC));
    h->version = VERSION;
    h->capacity = capacity;
    h->total = DATA_AT + capacity;
    munmap(h, DATA_AT);
    return fcas_memfd_seal(fd, 0);
}

fcas_status fcas_ring_map(fcas_ring *r, int fd, int eventfd)
{
    memset(r, 0, sizeof(*r));
    uint8_t *base;
    size_t size;
    fcas_status st = fcas_memfd_map(fd, PROT_READ | PROT_WRITE, DATA_AT, &base, &size);
    if (st != FCAS_OK)
        return st;
    ring_header h;
    memcpy(&h, base, sizeof(h));
    uint64_t used = h.tail - h.head;
    if (memcmp(h.magic, MAGIC, sizeof(MAGIC)) != 0)
        st = FCAS_E_CORRUPT;
    else if (h.version != VERSION)
        st = FCAS_E_VERSION;
    else if (!capacity_is_valid(h.capacity) || h.total != DATA_AT + h.capacity || h.total != size ||
             used > h.capacity || h.tail % 8 != 0 || h.head % 8 != 0)
        st = FCAS_E_CORRUPT;
    if (st != FCAS_OK) {
        munmap(base, size);
        return st;
    }
    r->base = base;
    r->size = size;
    r->capacity = h.capacity;
    r->tail = h.tail;
    r->head = h.head;
    r->eventfd = eventfd;
    return FCAS_OK;
}

void fcas_ring_unmap(fcas_ring *r)
{
    if (r->base != NULL)
        munmap(r->base, r->size);
    memset(r, 0, sizeof(*r));
    r->eventfd = -1;
}

size_t fcas_ring_max_message(const fcas_ring *r)
{
    return (size_t)(r->capacity / 2);
}

static void copy_in(fcas_ring *r, uint64_t cursor, const void *from, size_t n)
{
    size_t at = (size_t)(cursor & (r->capacity - 1));
    size_t first = n < (size_t)r->capacity - at ? n : (size_t)r->capacity - at;
    memcpy(r->base + DATA_AT + at, from, first);
    if (n > first)
        memcpy(r->base + DATA_AT, (const uint8_t *)from + first, n - first);
}

static void copy_out(const fcas_ring *r, uint64_t cursor, void *to, size_t n)
{
    size_t at = (size_t)(cursor & (r->capacity - 1));
    size_t first = n < (size_t)r->capacity - at ? n : (size_t)r->capacity - at;
    memcpy(to, r->base + DATA_AT + at, first);
    if (n > first)
        memcpy((uint8_t *)to + first, r->base + DATA_AT, n - first);
}

fcas_status fcas_ring_push(fcas_ring *r, const uint8_t *message, size_t n)
{
    if (r->broken_out)
        return FCAS_E_CORRUPT;
    if (n > fcas_ring_max_message(r))
        return FCAS_E_ARG;
    /* Acquire: pairs with the consumer's release store of head, so what we overwrite was copied out. */
    uint64_t head = atomic_load_explicit(&header(r)->head, memory_order_acquire);
    if (head < r->head || head > r->tail || r->tail - head > r->capacity || head % 8 != 0) {
        r->broken_out = 1;
        return FCAS_E_CORRUPT;
    }
    r->head = head;
    uint64_t size = record_size(n);
    if (size > r->capacity - (r->tail - head))
        return FCAS_E_FULL;
    uint32_t lengths[2] = {(uint32_t)n, ~(uint32_t)n};
    copy_in(r, r->tail, lengths, sizeof(lengths));
    if (n > 0)
        copy_in(r, r->tail + RECORD_HEAD, message, n);
    r->tail += size;
    /* Release: pairs with the acquire load in next_length(). */
    atomic_store_explicit(&header(r)->tail, r->tail, memory_order_release);
    if (r->eventfd >= 0) {
        uint64_t one = 1;
        /* EAGAIN: the counter is at its maximum, so the consumer is signalled already. Any other failure means
         * that the consumer's end is gone, which its owner learns from its channel. */
        ssize_t written = write(r->eventfd, &one, sizeof(one));
        (void)written;
    }
    return FCAS_OK;
}

/* Length of the record at head, checked against everything it could break. */
static fcas_status next_length(fcas_ring *r, uint32_t *length)
{
    if (r->broken_in)
        return FCAS_E_CORRUPT;
    /* Acquire: pairs with the producer's release store, so the records below tail are whole. */
    uint64_t tail = atomic_load_explicit(&header(r)->tail, memory_order_acquire);
    uint64_t available = tail - r->head;
    uint32_t lengths[2];
    if (tail < r->tail || available > r->capacity || tail % 8 != 0)
        goto broken;
    r->tail = tail;
    if (available == 0)
        return FCAS_E_NOTFOUND;
    copy_out(r, r->head, lengths, sizeof(lengths));
    if (lengths[1] != ~lengths[0] || lengths[0] > fcas_ring_max_message(r) || record_size(lengths[0]) > available)
        goto broken;
    *length = lengths[0];
    return FCAS_OK;
broken:
    r->broken_in = 1;
    return FCAS_E_CORRUPT;
}

fcas_status fcas_ring_peek(fcas_ring *r, size_t *length)
{
    uint32_t n;
    fcas_status st = next_length(r, &n);
    if (st == FCAS_OK)
        *length = n;
    return st;
}

fcas_status fcas_ring_pop(fcas_ring *r, uint8_t *out, size_t out_size, size_t *length)
{
    uint32_t n;
    fcas_status st = next_length(r, &n);
    if (st != FCAS_OK)
        return st;
    if (n > out_size)
        return FCAS_E_ARG;
    if (n > 0)
        copy_out(r, r->head + RECORD_HEAD, out, n);
    *length = n;
    r->head += record_size(n);
    /* Release: pairs with the producer's acquire load of head. */
    atomic_store_explicit(&header(r)->head, r->head, memory_order_release);
    return FCAS_OK;
}

void fcas_ring_clear_event(fcas_ring *r)
{
    if (r->eventfd >= 0) {
        uint64_t count;
        ssize_t got = read(r->eventfd, &count, sizeof(count)); /* EAGAIN: nothing to clear */
        (void)got;
    }
}
