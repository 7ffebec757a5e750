/* Counters in shared memory: one cache-line-aligned slot per process, written by its owner only, read by
 * anybody who wants sums. memfd layout: header of 4096 bytes (0: magic "FCASCTR1", 8: u32 version 1,
 * 12: u32 n_slots), then n_slots slots of FCAS_CTR_SLOT_SIZE bytes: FCAS_CTR_MAX u64, atomic, relaxed.
 *
 * Epochs. FCAS_CTR_EPOCH_SAFE of a worker is the largest table epoch E such that no response in flight in that
 * worker started from a lookup before E. The agent reclaims what it tombstoned before fcas_table_advance()
 * returned E once every live worker's EPOCH_SAFE is >= E (and its EPOCH_TABLE is the table's current number). */
#ifndef FCAS_COUNTERS_H
#define FCAS_COUNTERS_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

#define FCAS_CTR_MAX       64u
#define FCAS_CTR_SLOT_SIZE 512u

typedef enum {
    FCAS_CTR_HEARTBEAT_NS = 0, /* CLOCK_MONOTONIC of the last loop turn */
    FCAS_CTR_EPOCH_SAFE,       /* see above */
    FCAS_CTR_EPOCH_TABLE,      /* number of the table memfd in use (handed over with it), 0 = none */
    FCAS_CTR_ACCEPTED,         /* connections accepted */
    FCAS_CTR_ACTIVE,           /* connections open now */
    FCAS_CTR_REQUESTS,         /* requests answered */
    FCAS_CTR_BYTES_SENT,       /* body bytes written to sockets */
    FCAS_CTR_STATUS_2XX,
    FCAS_CTR_STATUS_304,
    FCAS_CTR_STATUS_400,       /* every 4xx for syntax */
    FCAS_CTR_STATUS_404,
    FCAS_CTR_STATUS_416,
    FCAS_CTR_STATUS_503,
    FCAS_CTR_EVICT_HEADER,     /* closed: header deadline */
    FCAS_CTR_EVICT_STALL,      /* closed: no progress */
    FCAS_CTR_EVICT_IDLE,       /* closed: keep-alive idle */
    FCAS_CTR_EVICT_CAP,        /* closed at accept: worker full */
    FCAS_CTR_SHORTFALL,        /* blob shorter than its extent, or its identity changed */
    FCAS_CTR_ACCEPT_EMFILE,    /* accept failed for want of a file descriptor */
    FCAS_CTR_NEXT_GIVEN,       /* chunks handed out through NEXT */
    FCAS_CTR_EVICT_SLOW,       /* closed: below the minimum rate */
    FCAS_CTR_EVICT_SOURCE,     /* closed at accept: its source has too many connections */
    FCAS_CTR_LIMIT_WAITS,      /* slices that waited for the upload limit */
    FCAS_CTR_PEER_QUEUED,      /* requests of peers that waited for an upload slot */
    FCAS_CTR_PEER_BUSY,        /* requests of peers answered "busy" */
    FCAS_CTR_SLOT_LOST,        /* upload slots given up by connections that could not be written to */
    FCAS_CTR_QUEUE_BYTES,      /* gauge: bytes of peers' requests not sent yet, as the busy rule counts them */
    FCAS_CTR_UPLINK_RATE,      /* gauge: measured uplink rate in bytes per second, 0 = not known yet */
    FCAS_CTR_NEXT_LOST,        /* marks of NEXT taken back because their taker is gone */
    FCAS_CTR_COUNT
} fcas_counter;

typedef struct { _Atomic uint64_t v[FCAS_CTR_MAX]; } fcas_counter_slot;
_Static_assert(sizeof(fcas_counter_slot) == FCAS_CTR_SLOT_SIZE, "counter slot size");

/* Make n_slots zeroed slots in fd (a fresh memfd), seal SHRINK | GROW. */
fcas_status fcas_counters_create(int fd, uint32_t n_slots);
/* Map them read-write; *slots points to n_slots slots. Unmap with fcas_counters_unmap. */
fcas_status fcas_counters_map(int fd, fcas_counter_slot **slots, uint32_t *n_slots);
void fcas_counters_unmap(fcas_counter_slot *slots, uint32_t n_slots);

static inline void fcas_count(fcas_counter_slot *s, fcas_counter c, uint64_t n)
{
    atomic_fetch_add_explicit(&s->v[c], n, memory_order_relaxed);
}
static inline void fcas_gauge(fcas_counter_slot *s, fcas_counter c, uint64_t n)
{
    atomic_store_explicit(&s->v[c], n, memory_order_release);
}

#endif
