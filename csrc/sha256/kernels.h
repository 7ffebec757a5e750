/* Private to csrc/sha256: the kernels that exist and which of them this compiler can build. */
#ifndef FCAS_SHA256_KERNELS_H
#define FCAS_SHA256_KERNELS_H

#include "sha256/sha256.h"

/* -DFCAS_NO_SHA256_SIMD leaves them out, as a compiler for another architecture does. */
#if defined(__x86_64__) && !defined(FCAS_NO_SHA256_SIMD)
#define FCAS_SHA256_HAVE_SIMD 1
#else
#define FCAS_SHA256_HAVE_SIMD 0
#endif

extern const uint32_t fcas_sha256_k[64]; /* FIPS 180-4 section 4.2.2; aligned to 64 bytes */
extern const uint32_t fcas_sha256_iv[8]; /* FIPS 180-4 section 5.3.3 */

extern const fcas_sha256_kernel fcas_sha256_generic;
#if FCAS_SHA256_HAVE_SIMD
extern const fcas_sha256_kernel fcas_sha256_avx2_x8;
extern const fcas_sha256_kernel fcas_sha256_avx512_x16;
extern const fcas_sha256_kernel fcas_sha256_shani;
extern const fcas_sha256_kernel fcas_sha256_shani_x2;
extern const fcas_sha256_kernel fcas_sha256_shani_x10;
#endif

/* The chaining value as bytes: a digest, or a midstate. */
void fcas_sha256_store_words(uint8_t out[32], const uint32_t state[8]);
/* Write a message's last block or two into tail: its last n < 64 bytes, 0x80, zeros and its length in bits.
 * Returns the number of blocks. */
size_t fcas_sha256_pad(uint8_t tail[2 * FCAS_SHA256_BLOCK], const uint8_t *p, size_t n, uint64_t length);

#endif
