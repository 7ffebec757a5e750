/* The shared token bucket: see bucket.h. */
#include "table/bucket.h"

#include <stdatomic.h>
#include <string.h>

#include "table/memfd.h"

#define BUCKET_SIZE   4096u
#define VERSION       1u
#define SECOND_NS     INT64_C(1000000000)
#define BURST_NS      (SECOND_NS / 20)
#define SLICES_PER_S  50u
#define SLICE_MIN     1024u
#define SLICE_MAX     65536u

static const char MAGIC[8] = {'F', 'C', 'A', 'S', 'B', 'K', 'T', '1'};

typedef struct {
    char     magic[8];
    uint32_t version;
    uint32_t reserved;
    uint64_t rate;
    int64_t  burst_ns;
    uint64_t padding[4];
    _Atomic int64_t paid;
} bucket_header;

_Static_assert(offsetof(bucket_header, paid) == 64, "paid");

static uint32_t slice_of(uint64_t rate)
{
    uint64_t slice = rate / SLICES_PER_S;
    return slice < SLICE_MIN ? SLICE_MIN : slice > SLICE_MAX ? SLICE_MAX : (uint32_t)slice;
}

/* Time that n bytes take: n <= 2^32 keeps the product below 2^62. */
static int64_t cost_up(uint64_t rate, uint64_t n)
{
    return (int64_t)((n * (uint64_t)SECOND_NS + rate - 1) / rate);
}

static int64_t burst_of(uint64_t rate)
{
    int64_t slices = 2 * cost_up(rate, slice_of(rate));
    return slices > BURST_NS ? slices : BURST_NS;
}

fcas_status fcas_bucket_create(int fd, uint64_t rate)
{
    if (rate < 1 || rate > FCAS_BUCKET_RATE_MAX)
        return FCAS_E_ARG;
    fcas_status st = fcas_memfd_size(fd, BUCKET_SIZE);
    if (st != FCAS_OK)
        return st;
    bucket_header *h = mmap(NULL, BUCKET_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (h == MAP_FAILED)
        return FCAS_E_SYS;
    memcpy(h->magic, MAGIC, sizeof MAGIC);
    h->version = VERSION;
    h->rate = rate;
    h->burst_ns = burst_of(rate);
    munmap(h, BUCKET_SIZE);
    return fcas_memfd_seal(fd, 0);
}

fcas_status fcas_bucket_map(fcas_bucket *b, int fd)
{
    uint8_t *base;
    size_t   size;
    memset(b, 0, sizeof *b);
    fcas_status st = fcas_memfd_map(fd, PROT_READ | PROT_WRITE, BUCKET_SIZE, &base, &size);
    if (st != FCAS_OK)
        return st;
    bucket_header h;
    memcpy(&h, base, sizeof h);
    if (memcmp(h.magic, MAGIC, sizeof MAGIC) != 0)
        st = FCAS_E_CORRUPT;
    else if (h.version != VERSION)
        st = FCAS_E_VERSION;
    else if (h.rate < 1 || h.rate > FCAS_BUCKET_RATE_MAX || h.burst_ns != burst_of(h.rate))
        st = FCAS_E_CORRUPT;
    if (st != FCAS_OK) {
        munmap(base, size);
        return st;
    }
    *b = (fcas_bucket){.base = base, .size = size, .rate = h.rate, .burst_ns = h.burst_ns, .slice = slice_of(h.rate)};
    return FCAS_OK;
}

void fcas_bucket_unmap(fcas_bucket *b)
{
    if (b->base)
        munmap(b->base, b->size);
    memset(b, 0, sizeof *b);
}

static _Atomic int64_t *paid_of(fcas_bucket *b)
{
    return &((bucket_header *)b->base)->paid;
}

int64_t fcas_bucket_take(fcas_bucket *b, uint64_t n, int64_t now_ns)
{
    _Atomic int64_t *paid = paid_of(b);
    int64_t          cost = cost_up(b->rate, n), seen = atomic_load_explicit(paid, memory_order_relaxed), after;
    do {
        after = (seen < now_ns - b->burst_ns ? now_ns - b->burst_ns : seen) + cost;
        if (after > now_ns)
            return after - now_ns;
    } while (!atomic_compare_exchange_weak_explicit(paid, &seen, after, memory_order_relaxed, memory_order_relaxed));
    return 0;
}

void fcas_bucket_charge(fcas_bucket *b, uint64_t n, int64_t now_ns)
{
    _Atomic int64_t *paid = paid_of(b);
    int64_t          cost = cost_up(b->rate, n < FCAS_BUCKET_BYTES_MAX ? n : FCAS_BUCKET_BYTES_MAX);
    int64_t          seen = atomic_load_explicit(paid, memory_order_relaxed), after;
    do {
        after = (seen < now_ns - b->burst_ns ? now_ns - b->burst_ns : seen) + cost;
        if (after > now_ns + SECOND_NS)
            after = now_ns + SECOND_NS;
        if (after < seen)
            return; /* full of debt already */
    } while (!atomic_compare_exchange_weak_explicit(paid, &seen, after, memory_order_relaxed, memory_order_relaxed));
}

void fcas_bucket_refund(fcas_bucket *b, uint64_t n)
{
    int64_t gain = (int64_t)(n * (uint64_t)SECOND_NS / b->rate);
    atomic_fetch_sub_explicit(paid_of(b), gain, memory_order_relaxed);
}
