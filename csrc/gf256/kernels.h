/* Private to csrc/gf256: the kernels that exist and which of them this compiler can build. */
#ifndef FCAS_GF256_KERNELS_H
#define FCAS_GF256_KERNELS_H

#include "gf256/gf256.h"

/* -DFCAS_NO_GF256_SIMD leaves them out, as a compiler for another architecture does. */
#if defined(__x86_64__) && !defined(FCAS_NO_GF256_SIMD)
#define FCAS_GF256_HAVE_X86 1
#else
#define FCAS_GF256_HAVE_X86 0
#endif

extern const fcas_gf256_kernel fcas_gf256_generic;
#if FCAS_GF256_HAVE_X86
extern const fcas_gf256_kernel fcas_gf256_ssse3;
extern const fcas_gf256_kernel fcas_gf256_avx2;
extern const fcas_gf256_kernel fcas_gf256_gfni;
#endif

#define FCAS_GF256_NIBBLES 32u /* bytes of nibble tables per coefficient */

/* The tables of one coefficient. */
static inline const uint8_t *fcas_gf256_nibbles_at(const fcas_gf256_plan *plan, size_t row, size_t column)
{
    return plan->nibbles + FCAS_GF256_NIBBLES * (row * plan->n_in + column);
}

#endif
