/* SHA-256 (FIPS 180-4) with states that can be read and set at block boundaries.
 *
 * A kernel compresses whole 64-byte blocks; everything above (buffering, padding, lengths) is shared.
 * The chaining value ("midstate") is the eight 32-bit words H0..H7, serialised big-endian in 32 bytes:
 * the midstate after the last block of a padded message is its digest.
 *
 * Kernel choice: fcas_sha256_default() picks the preferred one that this CPU supports, once per process;
 * FASTCAS_SHA256_KERNEL in the environment is read by the binding and is a demand: it works or fails
 * with FCAS_KERNEL_UNKNOWN, FCAS_KERNEL_NOT_BUILT or FCAS_KERNEL_NO_CPU. `generic` is the truth. */
#ifndef FCAS_SHA256_H
#define FCAS_SHA256_H

#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

#define FCAS_SHA256_BLOCK  64u
#define FCAS_SHA256_DIGEST 32u
#define FCAS_SHA256_LANES_MAX 16u
#define FCAS_SHA256_PACE   4u

typedef struct {
    const char *name;      /* what FASTCAS_SHA256_KERNEL accepts: "generic", "shani_x2", ... */
    uint32_t    cpu_needs; /* FCAS_CPU_* bits (common/cpu.h), all required */
    /* state is advanced over nblocks * 64 bytes of any alignment; nblocks may be 0. */
    void (*compress)(uint32_t state[8], const uint8_t *blocks, size_t nblocks);
    /* Two independent streams of the same length; a == b (the same bytes under two states) is allowed.
     * Kernels without interleaving run one after the other. */
    void (*compress2)(uint32_t state_a[8], const uint8_t *a, uint32_t state_b[8], const uint8_t *b, size_t nblocks);
    /* A kernel may have lanes for more messages, and then one of the two functions below; 0 and NULL if not.
     * From n_lanes_min >= 1 messages on, of up to FCAS_SHA256_LANES_MAX at a time, it is faster than compress2 in
     * turn. Streams may share bytes, states may not. */
    size_t n_lanes, n_lanes_min;
    /* n_lanes independent streams of the same length. */
    void (*compress_lanes)(uint32_t (*const states[])[8], const uint8_t *const blocks[], size_t nblocks);
    /* The same of 2 * FCAS_SHA256_PACE lanes, and beside them two faster ones: nblocks of each lane, FCAS_SHA256_PACE times as many of a and
     * of b; or, if state_b is NULL, twice that of a alone. */
    void (*compress_beside)(uint32_t (*const states[])[8], const uint8_t *const blocks[], size_t nblocks,
                            uint32_t state_a[8], const uint8_t *a, uint32_t state_b[8], const uint8_t *b);
} fcas_sha256_kernel;

typedef struct {
    const fcas_sha256_kernel *kernel;
    uint32_t state[8];
    uint64_t length;      /* bytes fed since the initial value of SHA-256, even if the state was set midway */
    uint32_t n_buffered;  /* bytes waiting in buffer, 0..63 */
    uint8_t  buffer[64];
} fcas_sha256;

/* Look a kernel up by name. FCAS_OK and *out, or one of the three FCAS_KERNEL_* reasons. */
fcas_status fcas_sha256_select(const char *name, const fcas_sha256_kernel **out);
/* The preferred kernel that this CPU supports (csrc/README.md has the measurements). Never fails. */
const fcas_sha256_kernel *fcas_sha256_default(void);
/* The one that a CPU with just these FCAS_CPU_* bits gets. */
const fcas_sha256_kernel *fcas_sha256_default_for(uint32_t cpu);
/* Kernel number i of all that were built, whether or not the CPU supports them; NULL past the end. */
const fcas_sha256_kernel *fcas_sha256_kernel_at(size_t i);

/* Start a message. kernel may be NULL: the default one. */
void fcas_sha256_init(fcas_sha256 *s, const fcas_sha256_kernel *kernel);
/* Continue a message from a midstate. length is the number of bytes already compressed: a multiple of 64,
 * else FCAS_E_ARG and *s is unchanged. */
fcas_status fcas_sha256_resume(fcas_sha256 *s, const fcas_sha256_kernel *kernel, const uint8_t midstate[32],
                               uint64_t length);
/* Feed n >= 0 bytes of any alignment. Never allocates, never fails. */
void fcas_sha256_update(fcas_sha256 *s, const uint8_t *p, size_t n);
/* The midstate at the present position, which must be a multiple of 64 (else FCAS_E_ARG). */
fcas_status fcas_sha256_midstate(const fcas_sha256 *s, uint8_t out[32]);
/* Finish: padding and length. *s must be initialised again before further use. */
void fcas_sha256_final(fcas_sha256 *s, uint8_t out[32]);

/* The same bytes into two hashes in one pass (a chunk's own digest and the content's chain): while both have
 * the same number of buffered bytes and the same kernel, the kernel's compress2 does both at once; otherwise
 * they are fed one after the other. Results equal two calls of fcas_sha256_update. */
void fcas_sha256_update2(fcas_sha256 *a, fcas_sha256 *b, const uint8_t *p, size_t n);

/* digests[32*i] = SHA-256 of the lengths[i] bytes at messages[i], i in [0, n), taken up in this order. As many
 * messages at a time as the kernel has streams; one whose message ends takes the next. When fewer are left than
 * lanes pay for, the longest two go through compress2 by turns. No allocation. */
void fcas_sha256_many(const fcas_sha256_kernel *kernel, const uint8_t *const *messages, const size_t *lengths,
                      size_t n, uint8_t *digests);

/* As n calls of fcas_sha256_update(states[i], data[i], lengths[i]), as many at a time as the kernel has streams. All
 * states have the same kernel and no buffered bytes (their lengths are multiples of 64), and are distinct; they may
 * share data. */
void fcas_sha256_update_many(fcas_sha256 *const *states, const uint8_t *const *data, const size_t *lengths, size_t n);

/* FCAS_OK if the kernel gives the digests of FIPS 180-4's examples and of a 1,000-byte message, through each
 * of its functions and in each of its lanes, else FCAS_E_CORRUPT. Under 1 ms. */
fcas_status fcas_sha256_self_test(const fcas_sha256_kernel *kernel);

#endif
