/* SHA-256 of sixteen messages at once with AVX-512, whose rotations and functions of three inputs make a
 * round 17 instructions for sixteen lanes. Fewer messages than it takes to pay go through the SHA
 * extensions. */
#include "sha256/kernels.h"

#if FCAS_SHA256_HAVE_SIMD
#include <immintrin.h>

#include "common/cpu.h"

#define LANES  16
#define VEC    __m512i
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl")))

#define ADD(x, y)     _mm512_add_epi32(x, y)
#define XOR(x, y)     _mm512_xor_si512(x, y)
#define XOR3(x, y, z) _mm512_ternarylogic_epi32(x, y, z, 0x96)
#define SET1(word)    _mm512_set1_epi32((int)(word))
#define LOADV(p)      _mm512_loadu_si512((const void *)(p))
#define STOREV(p, v)  _mm512_storeu_si512((void *)(p), v)

#define ROR(x, n) _mm512_ror_epi32(x, n)
#define SMALL0(x) XOR3(ROR(x, 7), ROR(x, 18), _mm512_srli_epi32(x, 3))
#define SMALL1(x) XOR3(ROR(x, 17), ROR(x, 19), _mm512_srli_epi32(x, 10))
#define BIG0(x)   XOR3(ROR(x, 2), ROR(x, 13), ROR(x, 22))
#define BIG1(x)   XOR3(ROR(x, 6), ROR(x, 11), ROR(x, 25))
#define CH(e, f, g)          _mm512_ternarylogic_epi32(e, f, g, 0xca)
#define MAJ(a, b, c, ab, bc) _mm512_ternarylogic_epi32(a, b, c, 0xe8)

/* Sixteen rows of sixteen words become columns: words, then pairs within quarters, then the quarters. */
TARGET static inline __attribute__((always_inline)) void transpose(VEC w[16])
{
    VEC pairs[16], quads[16], halves[16];

    for (unsigned i = 0; i < 8; i++) {
        pairs[2 * i] = _mm512_unpacklo_epi32(w[2 * i], w[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(w[2 * i], w[2 * i + 1]);
    }
    for (unsigned i = 0; i < 4; i++) { /* quads[4i+j] has columns j, 4+j, 8+j, 12+j of rows 4i..4i+3 */
        quads[4 * i] = _mm512_unpacklo_epi64(pairs[4 * i], pairs[4 * i + 2]);
        quads[4 * i + 1] = _mm512_unpackhi_epi64(pairs[4 * i], pairs[4 * i + 2]);
        quads[4 * i + 2] = _mm512_unpacklo_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
        quads[4 * i + 3] = _mm512_unpackhi_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
    }
    for (unsigned j = 0; j < 4; j++) { /* columns j, 8+j and 4+j, 12+j of half of the rows */
        halves[j] = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0x88);
        halves[4 + j] = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0xdd);
        halves[8 + j] = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0x88);
        halves[12 + j] = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0xdd);
    }
    for (unsigned j = 0; j < 8; j++) {
        w[j] = _mm512_shuffle_i32x4(halves[j], halves[8 + j], 0x88);
        w[8 + j] = _mm512_shuffle_i32x4(halves[j], halves[8 + j], 0xdd);
    }
}

TARGET static inline __attribute__((always_inline)) void load_blocks(VEC w[16], const uint8_t *const p[LANES],
                                                                     size_t at)
{
    const VEC swap = _mm512_set4_epi32(0x0c0d0e0f, 0x08090a0b, 0x04050607, 0x00010203);

    for (unsigned l = 0; l < LANES; l++)
        w[l] = _mm512_shuffle_epi8(LOADV(p[l] + at), swap);
    transpose(w);
}

#include "sha256/lanes.h"

static void compress(uint32_t state[8], const uint8_t *blocks, size_t nblocks)
{
    fcas_sha256_shani_x2.compress(state, blocks, nblocks);
}

static void compress2(uint32_t state_a[8], const uint8_t *a, uint32_t state_b[8], const uint8_t *b,
                      size_t nblocks)
{
    fcas_sha256_shani_x2.compress2(state_a, a, state_b, b, nblocks);
}

/* A block in all lanes takes 812 cycles, in two streams of the SHA extensions 97 each, at a clock that AVX-512
 * does not hold down: from ten lanes on it pays (csrc/README.md). */
const fcas_sha256_kernel fcas_sha256_avx512_x16 = {
    "avx512_x16", FCAS_CPU_AVX512 | FCAS_CPU_SHANI | FCAS_CPU_SSE41 | FCAS_CPU_SSSE3, compress, compress2,
    LANES, 10, compress_lanes, NULL};
#else
/* ISO C forbids an empty translation unit. */
typedef int fcas_sha256_avx512_not_built;
#endif
