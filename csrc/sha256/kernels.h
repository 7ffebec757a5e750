/* Private to csrc/sha256: the kernels that exist and which of them this compiler can build. */
#ifndef FCAS_SHA256_KERNELS_H
#define FCAS_SHA256_KERNELS_H

#include "sha256/sha256.h"

/* -DFCAS_NO_SHANI leaves them out, as a compiler for another architecture does. */
#if defined(__x86_64__) && !defined(FCAS_NO_SHANI)
#define FCAS_SHA256_HAVE_SHANI 1
#else
#define FCAS_SHA256_HAVE_SHANI 0
#endif

extern const uint32_t fcas_sha256_k[64]; /* FIPS 180-4 section 4.2.2; aligned to 64 bytes */
extern const uint32_t fcas_sha256_iv[8]; /* FIPS 180-4 section 5.3.3 */

extern const fcas_sha256_kernel fcas_sha256_generic;
#if FCAS_SHA256_HAVE_SHANI
extern const fcas_sha256_kernel fcas_sha256_shani;
extern const fcas_sha256_kernel fcas_sha256_shani_x2;
#endif

#endif
