/* A token bucket that all workers of a node share: what they send together keeps to one rate. One memfd of 4096 bytes
 * (sealed SHRINK | GROW), mapped read-write by every worker. All operations are lock-free: a worker that is killed
 * anywhere in them blocks nobody and loses at most what it had taken.
 *
 * Layout, little-endian:
 *
 *   offset  size  field
 *   0       8     magic "FCASBKT1"
 *   8       4     version, 1
 *   16      8     rate, bytes per second, 1..FCAS_BUCKET_RATE_MAX
 *   24      8     burst, ns: what may be saved up while nobody sends
 *   64      8     paid, atomic: CLOCK_MONOTONIC in ns up to which the rate is used up
 *
 * `paid` is the whole state. Taking n bytes moves it forward by n / rate (compare-and-swap), from now - burst at the
 * earliest; a taking that would move it past now fails. What was taken and not sent is given back by moving it back.
 * Each taking rounds up to a whole ns and each refund down, so the rate is never exceeded, and undershot by less than
 * 1 ns per operation.
 *
 * Trust: whoever has it mapped can stop everybody else's uploads for as long as it lives, not more. */
#ifndef FCAS_BUCKET_H
#define FCAS_BUCKET_H

#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

#define FCAS_BUCKET_RATE_MAX (UINT64_C(1) << 40)
#define FCAS_BUCKET_BYTES_MAX (UINT64_C(1) << 32) /* longest single operation */

typedef struct {
    void    *base;
    size_t   size;
    uint64_t rate;
    int64_t  burst_ns;
    uint32_t slice; /* a good size of one taking: 20 ms of the rate, 1 KiB..64 KiB */
} fcas_bucket;

/* Make a bucket of `rate` bytes per second in fd (a fresh memfd), seal SHRINK | GROW. FCAS_E_ARG: rate out of range.
 * The burst is 50 ms of the rate, and at least two slices. */
fcas_status fcas_bucket_create(int fd, uint64_t rate);
/* Map it. FCAS_E_CORRUPT (also when fd can still shrink), FCAS_E_VERSION, FCAS_E_SYS. The fd may be closed then. */
fcas_status fcas_bucket_map(fcas_bucket *b, int fd);
/* Unmap. Safe on a zeroed struct. */
void fcas_bucket_unmap(fcas_bucket *b);

/* Take n bytes (0..slice), all or none: 0, or how long in ns until they are there if nobody else takes any. hot */
int64_t fcas_bucket_take(fcas_bucket *b, uint64_t n, int64_t now_ns);
/* Take n bytes that are sent in any case; later takings wait for it, at most a second. */
void fcas_bucket_charge(fcas_bucket *b, uint64_t n, int64_t now_ns);
/* n of the bytes taken were not sent. */
void fcas_bucket_refund(fcas_bucket *b, uint64_t n);

#endif
