/* 64 bytes of up to four outputs in registers; a product is two 16-entry look-ups by VPSHUFB.
 *
 * Eight sums, four nibble vectors, two tables and the mask take 15 of the 16 registers; a fifth output
 * would spill. Tables are broadcast by the load itself (VBROADCASTI128), so 32 bytes per coefficient are
 * enough and 255 columns of four rows stay in the first-level cache. */
#include "gf256/kernels.h"

#if FCAS_GF256_HAVE_X86
#include <immintrin.h>

#include "common/cpu.h"

#define AVX2   __attribute__((target("avx2")))
#define INLINE static inline __attribute__((always_inline))

enum {
    STEP = 64,
    MAX_ROWS = 4,
    AHEAD = 768 /* see gfni.c; may lie past the end, which a prefetch does not mind */
};

AVX2 INLINE __m256i load(const uint8_t *p)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}

AVX2 INLINE __m256i load_twice(const uint8_t *p)
{
    return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)(const void *)p));
}

AVX2 INLINE void store(uint8_t *p, __m256i v)
{
    _mm256_storeu_si256((__m256i *)(void *)p, v);
}

/* STEP bytes at position i of n_rows outputs; n_rows is a constant at each call. */
AVX2 INLINE void step(const fcas_gf256_plan *plan, size_t first, const uint8_t *const *in,
                      uint8_t *const *out, size_t i, const unsigned n_rows)
{
    const __m256i low = _mm256_set1_epi8(15);
    __m256i sum[MAX_ROWS][2];

#pragma GCC unroll 4
    for (unsigned r = 0; r < n_rows; r++)
        sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (size_t c = 0; c < plan->n_in; c++) {
        __m256i x0 = load(in[c] + i), x1 = load(in[c] + i + 32);
        _mm_prefetch((const char *)((uintptr_t)in[c] + i + AHEAD), _MM_HINT_T0);
        __m256i lo0 = _mm256_and_si256(x0, low), hi0 = _mm256_and_si256(_mm256_srli_epi64(x0, 4), low);
        __m256i lo1 = _mm256_and_si256(x1, low), hi1 = _mm256_and_si256(_mm256_srli_epi64(x1, 4), low);
#pragma GCC unroll 4
        for (unsigned r = 0; r < n_rows; r++) {
            const uint8_t *table = fcas_gf256_nibbles_at(plan, first + r, c);
            __m256i tlo = load_twice(table), thi = load_twice(table + 16);
            sum[r][0] = _mm256_xor_si256(sum[r][0], _mm256_shuffle_epi8(tlo, lo0));
            sum[r][1] = _mm256_xor_si256(sum[r][1], _mm256_shuffle_epi8(tlo, lo1));
            sum[r][0] = _mm256_xor_si256(sum[r][0], _mm256_shuffle_epi8(thi, hi0));
            sum[r][1] = _mm256_xor_si256(sum[r][1], _mm256_shuffle_epi8(thi, hi1));
        }
    }
#pragma GCC unroll 4
    for (unsigned r = 0; r < n_rows; r++) {
        store(out[first + r] + i, sum[r][0]);
        store(out[first + r] + i + 32, sum[r][1]);
    }
}

AVX2 INLINE void span(const fcas_gf256_plan *plan, size_t first, const uint8_t *const *in,
                      uint8_t *const *out, size_t begin, size_t end, const unsigned n_rows)
{
    size_t i = begin;

    for (; end - i >= STEP; i += STEP)
        step(plan, first, in, out, i, n_rows);
    if (i < end) /* outputs are overwritten, never added to: the last step may go over bytes again */
        step(plan, first, in, out, end - STEP, n_rows);
}

AVX2 static void rows(const fcas_gf256_plan *plan, size_t first, size_t n_rows,
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

const fcas_gf256_kernel fcas_gf256_avx2 = {"avx2", FCAS_CPU_AVX2, MAX_ROWS, rows};
#else
/* ISO C forbids an empty translation unit. */
typedef int fcas_gf256_avx2_not_built;
#endif
