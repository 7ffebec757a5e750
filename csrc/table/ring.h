/* A ring of messages in shared memory: one direction, one producer, one consumer, each in any process, in one
 * memfd (sealed SHRINK | GROW, both sides map it read-write) plus one eventfd that wakes the consumer.
 *
 * Layout of the memfd, little-endian:
 *
 *   offset  size  field
 *   0       8     magic "FCASRNG1"
 *   8       4     version, 1
 *   12      4     zero
 *   16      8     capacity: bytes of the data area, a power of two, 4 KiB..1 GiB
 *   24      8     total size of the memfd: 4096 + capacity
 *   128     8     tail: bytes ever produced (atomic; written by the producer only)
 *   256     8     head: bytes ever consumed (atomic; written by the consumer only)
 *   4096    ..    data: byte number c of the stream lies at 4096 + c % capacity
 *
 * A record: u32 length, u32 ~length, `length` bytes, zero to seven bytes up to the next multiple of 8. Records
 * wrap around the end of the data area; the eight bytes of a record's head never do.
 *
 * Publication protocol. The producer copies a record behind the tail, then stores tail with release order and
 * signals the eventfd; the consumer loads tail with acquire order, copies the record out, then stores head with
 * release order; the producer loads head with acquire order before it overwrites. The consumer clears the eventfd
 * before it loads tail, so a record whose signal it swallowed is one that it sees.
 *
 * Trust: the other side may be hostile, damaged or dead. Each side keeps its own cursor in private memory and
 * only writes it to the ring; the other's cursor is checked against it (distance at most capacity, multiple of 8,
 * never backwards); lengths are copied once, then checked. The first violation is FCAS_E_CORRUPT, and every call
 * after it too: a ring does not heal, its owner makes a new one. */
#ifndef FCAS_RING_H
#define FCAS_RING_H

#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

#define FCAS_RING_CAPACITY_MIN 4096u
#define FCAS_RING_CAPACITY_MAX (1u << 30)

/* One process's view. Not thread-safe: at most one thread pushes and at most one pops through one view. */
typedef struct {
    uint8_t *base;
    size_t   size;     /* bytes mapped */
    uint64_t capacity;
    uint64_t tail;     /* producer: the truth; consumer: what it last saw */
    uint64_t head;     /* consumer: the truth; producer: what it last saw */
    int      eventfd;  /* borrowed; -1: never signalled */
    int      broken_in;  /* set by the consumer side after FCAS_E_CORRUPT */
    int      broken_out; /* likewise by the producer side */
} fcas_ring;

/* Make an empty ring in fd (a fresh memfd): ftruncate, header, seal. FCAS_E_ARG for a capacity out of range. */
fcas_status fcas_ring_create(int fd, uint64_t capacity);
/* Map it. The memfd may be closed afterwards; eventfd stays open as long as the view. The cursors are taken from
 * the ring. FCAS_E_CORRUPT (also when fd can still shrink), FCAS_E_VERSION or FCAS_E_SYS. */
fcas_status fcas_ring_map(fcas_ring *r, int fd, int eventfd);
/* Unmap. Safe on a zeroed struct. */
void fcas_ring_unmap(fcas_ring *r);

/* Longest message that fits: capacity / 2. */
size_t fcas_ring_max_message(const fcas_ring *r);
/* Append one message of n >= 0 bytes and signal the eventfd. FCAS_E_FULL when there is no room at the moment
 * (nothing was written); FCAS_E_ARG when it is longer than fcas_ring_max_message. One system call. */
fcas_status fcas_ring_push(fcas_ring *r, const uint8_t *message, size_t n);
/* Length of the next message, or FCAS_E_NOTFOUND when the ring is empty. Nothing is consumed. */
fcas_status fcas_ring_peek(fcas_ring *r, size_t *length);
/* Copy the next message, whose length fcas_ring_peek() gave, into out (capacity out_size) and consume it.
 * FCAS_E_NOTFOUND when empty; FCAS_E_ARG when out is too small (nothing consumed). */
fcas_status fcas_ring_pop(fcas_ring *r, uint8_t *out, size_t out_size, size_t *length);
/* Clear the eventfd: call it before popping until empty. */
void fcas_ring_clear_event(fcas_ring *r);

#endif
