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

/* A hint that cannot fault, by number and not by pointer because p + i may not be within the buffer. */
GFNI INLINE void prefetch(const uint8_t *p, size_t i)
{
    _mm_prefetch((const char *)((uintptr_t)p + i), _MM_HINT_T0);
}

/* Up to two vectors at position i of n_rows outputs, the only one under mask m; n_vectors and n_rows are
 * constants at each call. A masked-out byte is neither read nor written. */
GFNI INLINE void step(const fcas_gf256_plan *plan, size_t first, const uint8_t *const *in,
                      uint8_t *const *out, size_t i, __mmask64 m, const unsigned n_vectors,
                      const unsigned n_rows)
{
    __m512i sum[MAX_ROWS][2];

#pragma GCC unroll 8
    for (unsigned r = 0; r < n_rows; r++)
        sum[r][0] = sum[r][1] = _mm512_setzero_si512();
    for (size_t c = 0; c < plan->n_in; c++) {
        __m512i x0, x1;
        if (n_vectors == 2) {
            x0 = _mm512_loadu_si512(in[c] + i);
            x1 = _mm512_loadu_si512(in[c] + i + WIDTH);
            prefetch(in[c], i + AHEAD);
            prefetch(in[c], i + AHEAD + WIDTH);
        } else {
            x0 = _mm512_maskz_loadu_epi8(m, in[c] + i);
        }
#pragma GCC unroll 8
        for (unsigned r = 0; r < n_rows; r++) {
            __m512i a = _mm512_set1_epi64((long long)plan->affine[(first + r) * plan->n_in + c]);
            sum[r][0] = _mm512_xor_si512(sum[r][0], _mm512_gf2p8affine_epi64_epi8(x0, a, 0));
            if (n_vectors == 2)
                sum[r][1] = _mm512_xor_si512(sum[r][1], _mm512_gf2p8affine_epi64_epi8(x1, a, 0));
        }
    }
#pragma GCC unroll 8
    for (unsigned r = 0; r < n_rows; r++) {
        uint8_t *p = out[first + r] + i;
        if (n_vectors == 2) {
            _mm512_storeu_si512(p, sum[r][0]);
            _mm512_storeu_si512(p + WIDTH, sum[r][1]);
        } else {
            _mm512_mask_storeu_epi8(p, m, sum[r][0]);
        }
    }
}

GFNI INLINE void span(const fcas_gf256_plan *plan, size_t first, const uint8_t *const *in,
                      uint8_t *const *out, size_t begin, size_t end, const unsigned n_rows)
{
    size_t i = begin;

    for (; end - i >= 2 * WIDTH; i += 2 * WIDTH)
        step(plan, first, in, out, i, 0, 2, n_rows);
    for (; i < end; i += WIDTH) {
        size_t left = end - i;
        __mmask64 m = left >= WIDTH ? ~(__mmask64)0 : ((__mmask64)1 << left) - 1;
        step(plan, first, in, out, i, m, 1, n_rows);
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
