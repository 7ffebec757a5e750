/* 32 bytes of up to four outputs in registers; a product is two 16-entry look-ups by PSHUFB. */
#include "gf256/kernels.h"

#if FCAS_GF256_HAVE_X86
#include <immintrin.h>

#include "common/cpu.h"

#define SSSE3  __attribute__((target("ssse3")))
#define INLINE static inline __attribute__((always_inline))

enum { STEP = 32, MAX_ROWS = 4 };

SSSE3 INLINE __m128i load(const uint8_t *p)
{
    return _mm_loadu_si128((const __m128i *)(const void *)p);
}

SSSE3 INLINE void store(uint8_t *p, __m128i v)
{
    _mm_storeu_si128((__m128i *)(void *)p, v);
}

/* STEP bytes at position i of n_rows outputs; n_rows is a constant at each call. */
SSSE3 INLINE void step(const fcas_gf256_plan *plan, size_t first, const uint8_t *const *in,
                       uint8_t *const *out, size_t i, const unsigned n_rows)
{
    const __m128i low = _mm_set1_epi8(15);
    __m128i sum[MAX_ROWS][2];

#pragma GCC unroll 4
    for (unsigned r = 0; r < n_rows; r++)
        sum[r][0] = sum[r][1] = _mm_setzero_si128();
    for (size_t c = 0; c < plan->n_in; c++) {
        __m128i x0 = load(in[c] + i), x1 = load(in[c] + i + 16);
        __m128i lo0 = _mm_and_si128(x0, low), hi0 = _mm_and_si128(_mm_srli_epi64(x0, 4), low);
        __m128i lo1 = _mm_and_si128(x1, low), hi1 = _mm_and_si128(_mm_srli_epi64(x1, 4), low);
#pragma GCC unroll 4
        for (unsigned r = 0; r < n_rows; r++) {
            const uint8_t *table = fcas_gf256_nibbles_at(plan, first + r, c);
            __m128i tlo = load(table), thi = load(table + 16);
            sum[r][0] = _mm_xor_si128(sum[r][0], _mm_shuffle_epi8(tlo, lo0));
            sum[r][1] = _mm_xor_si128(sum[r][1], _mm_shuffle_epi8(tlo, lo1));
            sum[r][0] = _mm_xor_si128(sum[r][0], _mm_shuffle_epi8(thi, hi0));
            sum[r][1] = _mm_xor_si128(sum[r][1], _mm_shuffle_epi8(thi, hi1));
        }
    }
#pragma GCC unroll 4
    for (unsigned r = 0; r < n_rows; r++) {
        store(out[first + r] + i, sum[r][0]);
        store(out[first + r] + i + 16, sum[r][1]);
    }
}

SSSE3 INLINE void span(const fcas_gf256_plan *plan, size_t first, const uint8_t *const *in,
                       uint8_t *const *out, size_t begin, size_t end, const unsigned n_rows)
{
    size_t i = begin;

    for (; end - i >= STEP; i += STEP)
        step(plan, first, in, out, i, n_rows);
    if (i < end) /* outputs are overwritten, never added to: the last step may go over bytes again */
        step(plan, first, in, out, end - STEP, n_rows);
}

SSSE3 static void rows(const fcas_gf256_plan *plan, size_t first, size_t n_rows,
                       const uint8_t *const *in, uint8_t *const *out, size_t begin, size_t end)
{
    if (end - begin < STEP) {
        fcas_gf256_generic.rows(plan, first, n_rows, in, out, begin, end);
        return;
    }
    switch (n_rows) {
    case 1: span(plan, first, in, out, begin, end, 1); break;
    case 2: span(plan, first, in, out, begin, end, 2); break;
    case 3: span(plan, first, in, out, begin, end, 3); break;
    default: span(plan, first, in, out, begin, end, MAX_ROWS); break;
    }
}

const fcas_gf256_kernel fcas_gf256_ssse3 = {"ssse3", FCAS_CPU_SSSE3, MAX_ROWS, rows};
#else
/* ISO C forbids an empty translation unit. */
typedef int fcas_gf256_ssse3_not_built;
#endif
