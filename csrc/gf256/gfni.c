/* 128 bytes of up to eight outputs in registers; a product is one GF2P8AFFINEQB with the coefficient's bit
 * matrix. (GF2P8MULB is of no use: its field is AES's, 0x11b.) Tails by masked loads and stores. */
#include "gf256/kernels.h"

#if FCAS_GF256_HAVE_X86
#include <immintrin.h>

#include "common/cpu.h"

#define GFNI   __attribute__((target("gfni,avx512f,avx512bw,avx512vl")))
#define INLINE static inline __attribute__((always_inline))

enum {
    WIDTH = 64,
    MAX_ROWS = 8,
    /* Many inputs at the same offset within their pages compete for one set of the first-level cache, and
     * the hardware's prefetches lose: asking this far ahead doubles 16+4 at 1 MiB. May lie past the end. */
    AHEAD = 768
};

/* A hint that cannot fault, by number and not by pointer because p + AHEAD may not be within the buffer. */
GFNI INLINE void prefetch(const uint8_t *p)
{
    _mm_prefetch((const char *)((uintptr_t)p + AHEAD), _MM_HINT_T0);
    _mm_prefetch((const char *)((uintptr_t)p + AHEAD + WIDTH), _MM_HINT_T0);
}

/* The product of one vector and one coefficient. */
GFNI INLINE __m512i product(__m512i x, const uint64_t *affine)
{
    return _mm512_gf2p8affine_epi64_epi8(x, _mm512_set1_epi64((long long)*affine), 0);
}

/* Two vectors at position i of n_rows outputs; n_rows is a constant at each call. Columns go in pairs: one
 * VPTERNLOGQ adds two products to a sum, which saves a quarter of the vector operations (8 to 14 % of the
 * time in the second-level cache). */
GFNI INLINE void step(const fcas_gf256_plan *plan, size_t first, const uint8_t *const *in,
                      uint8_t *const *out, size_t i, const unsigned n_rows)
{
    enum { XOR3 = 0x96 };
    const size_t n_in = plan->n_in;
    const uint64_t *pair = plan->affine + 2 * first; /* coefficients of columns c and c + 1, row by row */
    __m512i sum[MAX_ROWS][2];
    size_t c = 0;

#pragma GCC unroll 8
    for (unsigned r = 0; r < n_rows; r++)
        sum[r][0] = sum[r][1] = _mm512_setzero_si512();
    for (; c + 2 <= n_in; c += 2, pair += 2 * plan->n_out) {
        const uint8_t *x = in[c] + i, *y = in[c + 1] + i;
        __m512i x0 = _mm512_loadu_si512(x), x1 = _mm512_loadu_si512(x + WIDTH);
        __m512i y0 = _mm512_loadu_si512(y), y1 = _mm512_loadu_si512(y + WIDTH);
        prefetch(x);
        prefetch(y);
#pragma GCC unroll 8
        for (unsigned r = 0; r < n_rows; r++) {
            sum[r][0] = _mm512_ternarylogic_epi64(sum[r][0], product(x0, pair + 2 * r),
                                                  product(y0, pair + 2 * r + 1), XOR3);
            sum[r][1] = _mm512_ternarylogic_epi64(sum[r][1], product(x1, pair + 2 * r),
                                                  product(y1, pair + 2 * r + 1), XOR3);
        }
    }
    if (c < n_in) {
        const uint8_t *x = in[c] + i;
        __m512i x0 = _mm512_loadu_si512(x), x1 = _mm512_loadu_si512(x + WIDTH);
        prefetch(x);
#pragma GCC unroll 8
        for (unsigned r = 0; r < n_rows; r++) {
            sum[r][0] = _mm512_xor_si512(sum[r][0], product(x0, pair + 2 * r));
            sum[r][1] = _mm512_xor_si512(sum[r][1], product(x1, pair + 2 * r));
        }
    }
#pragma GCC unroll 8
    for (unsigned r = 0; r < n_rows; r++) {
        _mm512_storeu_si512(out[first + r] + i, sum[r][0]);
        _mm512_storeu_si512(out[first + r] + i + WIDTH, sum[r][1]);
    }
}

/* One vector under a mask: a masked-out byte is neither read nor written. */
GFNI INLINE void tail(const fcas_gf256_plan *plan, size_t first, const uint8_t *const *in,
                      uint8_t *const *out, size_t i, __mmask64 m, const unsigned n_rows)
{
    const uint64_t *affine = plan->affine + 2 * first;
    __m512i sum[MAX_ROWS];

#pragma GCC unroll 8
    for (unsigned r = 0; r < n_rows; r++)
        sum[r] = _mm512_setzero_si512();
    for (size_t c = 0; c < plan->n_in; c++) {
        __m512i x = _mm512_maskz_loadu_epi8(m, in[c] + i);
#pragma GCC unroll 8
        for (unsigned r = 0; r < n_rows; r++)
            sum[r] = _mm512_xor_si512(sum[r], product(x, affine + 2 * r));
        affine += c % 2 ? 2 * plan->n_out - 1 : 1;
    }
#pragma GCC unroll 8
    for (unsigned r = 0; r < n_rows; r++)
        _mm512_mask_storeu_epi8(out[first + r] + i, m, sum[r]);
}

GFNI INLINE void span(const fcas_gf256_plan *plan, size_t first, const uint8_t *const *in,
                      uint8_t *const *out, size_t begin, size_t end, const unsigned n_rows)
{
    size_t i = begin;

    for (; end - i >= 2 * WIDTH; i += 2 * WIDTH)
        step(plan, first, in, out, i, n_rows);
    for (; i < end; i += WIDTH) {
        size_t left = end - i;
        __mmask64 m = left >= WIDTH ? ~(__mmask64)0 : ((__mmask64)1 << left) - 1;
        tail(plan, first, in, out, i, m, n_rows);
        if (left <= WIDTH)
            break;
    }
}

GFNI static void rows(const fcas_gf256_plan *plan, size_t first, size_t n_rows,
                      const uint8_t *const *in, uint8_t *const *out, size_t begin, size_t end)
{
    switch (n_rows) {
    case 1: span(plan, first, in, out, begin, end, 1); break;
    case 2: span(plan, first, in, out, begin, end, 2); break;
    case 3: span(plan, first, in, out, begin, end, 3); break;
    case 4: span(plan, first, in, out, begin, end, 4); break;
    case 5: span(plan, first, in, out, begin, end, 5); break;
    case 6: span(plan, first, in, out, begin, end, 6); break;
    case 7: span(plan, first, in, out, begin, end, 7); break;
    default: span(plan, first, in, out, begin, end, MAX_ROWS); break;
    }
}

const fcas_gf256_kernel fcas_gf256_gfni = {"gfni", FCAS_CPU_GFNI | FCAS_CPU_AVX512, MAX_ROWS, rows};
#else
/* ISO C forbids an empty translation unit. */
typedef int fcas_gf256_gfni_not_built;
#endif
