/* SHA-256 of eight messages at once with AVX2, for CPUs without the SHA extensions. One message alone has
 * nothing to fill the lanes with: it goes through `generic`. */
#include "sha256/kernels.h"

#if FCAS_SHA256_HAVE_SIMD
/* The rounds below are written in the order that suits sixteen registers. GCC would move the schedule's terms to
 * where they are used and regroup the sums, which spills more: 6 % slower (csrc/README.md). */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-ter", "no-tree-reassoc")
#endif
#include <immintrin.h>

#include "common/cpu.h"

#define LANES  8
#define VEC    __m256i
#define TARGET __attribute__((target("avx2")))

#define ADD(x, y)    _mm256_add_epi32(x, y)
#define XOR(x, y)    _mm256_xor_si256(x, y)
#define XOR3(x, y, z) XOR(XOR(x, y), z)
#define SET1(word)   _mm256_set1_epi32((int)(word))
#define LOADV(p)     _mm256_loadu_si256((const __m256i *)(const void *)(p))
#define STOREV(p, v) _mm256_storeu_si256((__m256i *)(void *)(p), v)

#define SHR(x, n) _mm256_srli_epi32(x, n)
#define SHL(x, n) _mm256_slli_epi32(x, n)
/* A rotation is two shifts whose results share no bit, so all are joined by the exclusive or that follows. */
#define ROR(x, n) XOR(SHR(x, n), SHL(x, 32 - (n)))
#define SMALL0(x) XOR3(ROR(x, 7), ROR(x, 18), SHR(x, 3))
#define SMALL1(x) XOR3(ROR(x, 17), ROR(x, 19), SHR(x, 10))
#define BIG0(x)   XOR3(ROR(x, 2), ROR(x, 13), ROR(x, 22))
#define BIG1(x)   XOR3(ROR(x, 6), ROR(x, 11), ROR(x, 25))
#define CH(e, f, g)           XOR(g, _mm256_and_si256(e, XOR(f, g)))
#define MAJ(a, b, c, ab, bc)  XOR(b, _mm256_and_si256(ab, bc))

/* Eight rows of eight words become columns. */
TARGET static inline __attribute__((always_inline)) void transpose(VEC w[8])
{
    VEC pairs[8], quads[8];

    for (unsigned i = 0; i < 4; i++) {
        pairs[2 * i] = _mm256_unpacklo_epi32(w[2 * i], w[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_epi32(w[2 * i], w[2 * i + 1]);
    }
    for (unsigned i = 0; i < 2; i++) { /* columns 0 and 4, 1 and 5, 2 and 6, 3 and 7 of four rows */
        quads[4 * i] = _mm256_unpacklo_epi64(pairs[4 * i], pairs[4 * i + 2]);
        quads[4 * i + 1] = _mm256_unpackhi_epi64(pairs[4 * i], pairs[4 * i + 2]);
        quads[4 * i + 2] = _mm256_unpacklo_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
        quads[4 * i + 3] = _mm256_unpackhi_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
    }
    for (unsigned i = 0; i < 4; i++) {
        w[i] = _mm256_permute2x128_si256(quads[i], quads[4 + i], 0x20);
        w[4 + i] = _mm256_permute2x128_si256(quads[i], quads[4 + i], 0x31);
    }
}

TARGET static inline __attribute__((always_inline)) void load_blocks(VEC w[16], const uint8_t *const p[LANES],
                                                                     size_t at)
{
    const VEC swap = _mm256_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203, 0x0c0d0e0f08090a0b,
                                       0x0405060700010203);

    for (unsigned half = 0; half < 2; half++) {
        VEC *rows = w + 8 * half;
        for (unsigned l = 0; l < LANES; l++)
            rows[l] = _mm256_shuffle_epi8(LOADV(p[l] + at + 32 * half), swap);
        transpose(rows);
    }
}

#include "sha256/lanes.h"

static void compress(uint32_t state[8], const uint8_t *blocks, size_t nblocks)
{
    fcas_sha256_generic.compress(state, blocks, nblocks);
}

static void compress2(uint32_t state_a[8], const uint8_t *a, uint32_t state_b[8], const uint8_t *b,
                      size_t nblocks)
{
    fcas_sha256_generic.compress2(state_a, a, state_b, b, nblocks);
}

const fcas_sha256_kernel fcas_sha256_avx2_x8 = {"avx2_x8", FCAS_CPU_AVX2, compress, compress2, LANES, 2,
                                                compress_lanes, NULL};
#else
/* ISO C forbids an empty translation unit. */
typedef int fcas_sha256_avx2_not_built;
#endif
