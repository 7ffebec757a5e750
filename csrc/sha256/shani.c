/* SHA-256 with the SHA extensions, one stream or two interleaved.
 *
 * sha256rnds2 does two rounds, and each depends on the one before: one stream leaves the unit idle
 * half of the time. A second, independent stream fills the gaps; three and four spill registers and
 * are slower. Where both streams read the same bytes (a chunk's digest and the content's chaining
 * value), the message schedule is computed once.
 *
 * Order matters: words are made sixteen rounds before they are used, between a stream's two sha256rnds2,
 * so that the round unit never waits for one (two streams: 11 % more than with words made just in time;
 * csrc/README.md). */
#include "sha256/kernels.h"

#if FCAS_SHA256_HAVE_SIMD
#include <immintrin.h>

#include "common/cpu.h"

#define SHANI  __attribute__((target("sha,sse4.1,ssse3")))
#define INLINE static inline __attribute__((always_inline))
#define NEEDS  (FCAS_CPU_SHANI | FCAS_CPU_SSE41 | FCAS_CPU_SSSE3)

/* The instructions want the variables as two vectors, high word first: A B E F and C D G H. */
typedef struct {
    __m128i abef, cdgh;
} vars;

SHANI INLINE vars load_state(const uint32_t state[8])
{
    __m128i dcba = _mm_loadu_si128((const __m128i *)(const void *)state);
    __m128i hgfe = _mm_loadu_si128((const __m128i *)(const void *)(state + 4));
    __m128i cdab = _mm_shuffle_epi32(dcba, 0xb1);
    __m128i efgh = _mm_shuffle_epi32(hgfe, 0x1b);
    vars v = {_mm_alignr_epi8(cdab, efgh, 8), _mm_blend_epi16(efgh, cdab, 0xf0)};
    return v;
}

SHANI INLINE void store_state(uint32_t state[8], vars v)
{
    __m128i feba = _mm_shuffle_epi32(v.abef, 0x1b);
    __m128i dchg = _mm_shuffle_epi32(v.cdgh, 0xb1);
    _mm_storeu_si128((__m128i *)(void *)state, _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128((__m128i *)(void *)(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}

SHANI INLINE __m128i load_words(const uint8_t *p)
{
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(const void *)p), swap);
}

/* Two rounds of the lower half of kw = K[t..t+3] + W[t..t+3], and two of its upper half. */
SHANI INLINE void rounds_low(vars *v, __m128i kw)
{
    v->cdgh = _mm_sha256rnds2_epu32(v->cdgh, v->abef, kw);
}

SHANI INLINE void rounds_high(vars *v, __m128i kw)
{
    v->abef = _mm_sha256rnds2_epu32(v->abef, v->cdgh, _mm_shuffle_epi32(kw, 0x0e));
}

SHANI INLINE void load_block(__m128i w[4], const uint8_t *block)
{
    for (unsigned q = 0; q < 4; q++)
        w[q] = load_words(block + 16 * q);
}

/* W[4q..4q+3], just used, make room for W[4q+16..4q+19] where there are such. */
SHANI INLINE void replace_words(__m128i w[4], unsigned q)
{
    __m128i w0 = w[q & 3], w1 = w[(q + 1) & 3], w2 = w[(q + 2) & 3], w3 = w[(q + 3) & 3];

    if (q < 12)
        w[q & 3] = _mm_sha256msg2_epu32(
            _mm_add_epi32(_mm_sha256msg1_epu32(w0, w1), _mm_alignr_epi8(w3, w2, 4)), w3);
}

SHANI INLINE __m128i k4(unsigned t)
{
    return _mm_load_si128((const __m128i *)(const void *)(fcas_sha256_k + t));
}

SHANI INLINE vars add(vars x, vars y)
{
    vars v = {_mm_add_epi32(x.abef, y.abef), _mm_add_epi32(x.cdgh, y.cdgh)};
    return v;
}

SHANI static void compress(uint32_t state[8], const uint8_t *blocks, size_t nblocks)
{
    vars v = load_state(state);

    for (; nblocks > 0; nblocks--, blocks += FCAS_SHA256_BLOCK) {
        const vars before = v;
        __m128i w[4];

        load_block(w, blocks);
#pragma GCC unroll 16
        for (unsigned q = 0; q < 16; q++) {
            __m128i kw = _mm_add_epi32(w[q & 3], k4(4 * q));
            rounds_low(&v, kw);
            replace_words(w, q);
            rounds_high(&v, kw);
        }
        v = add(v, before);
    }
    store_state(state, v);
}

SHANI static void compress2_same(uint32_t state_a[8], uint32_t state_b[8], const uint8_t *blocks,
                                 size_t nblocks)
{
    vars va = load_state(state_a), vb = load_state(state_b);

    for (; nblocks > 0; nblocks--, blocks += FCAS_SHA256_BLOCK) {
        const vars before_a = va, before_b = vb;
        __m128i w[4];

        load_block(w, blocks);
#pragma GCC unroll 16
        for (unsigned q = 0; q < 16; q++) {
            __m128i kw = _mm_add_epi32(w[q & 3], k4(4 * q));
            rounds_low(&va, kw);
            rounds_low(&vb, kw);
            replace_words(w, q);
            rounds_high(&va, kw);
            rounds_high(&vb, kw);
        }
        va = add(va, before_a);
        vb = add(vb, before_b);
    }
    store_state(state_a, va);
    store_state(state_b, vb);
}

SHANI static void compress2_interleaved(uint32_t state_a[8], const uint8_t *a, uint32_t state_b[8],
                                        const uint8_t *b, size_t nblocks)
{
    if (a == b) {
        compress2_same(state_a, state_b, a, nblocks);
        return;
    }
    vars va = load_state(state_a), vb = load_state(state_b);

    for (; nblocks > 0; nblocks--, a += FCAS_SHA256_BLOCK, b += FCAS_SHA256_BLOCK) {
        const vars before_a = va, before_b = vb;
        __m128i wa[4], wb[4];

        load_block(wa, a);
        load_block(wb, b);
#pragma GCC unroll 16
        for (unsigned q = 0; q < 16; q++) {
            __m128i kwa = _mm_add_epi32(wa[q & 3], k4(4 * q));
            __m128i kwb = _mm_add_epi32(wb[q & 3], k4(4 * q));
            rounds_low(&va, kwa);
            rounds_low(&vb, kwb);
            replace_words(wa, q);
            rounds_high(&va, kwa);
            replace_words(wb, q);
            rounds_high(&vb, kwb);
        }
        va = add(va, before_a);
        vb = add(vb, before_b);
    }
    store_state(state_a, va);
    store_state(state_b, vb);
}

static void compress2_in_turn(uint32_t state_a[8], const uint8_t *a, uint32_t state_b[8],
                              const uint8_t *b, size_t nblocks)
{
    compress(state_a, a, nblocks);
    compress(state_b, b, nblocks);
}

const fcas_sha256_kernel fcas_sha256_shani = {"shani", NEEDS, compress, compress2_in_turn, 0, 0, NULL,
                                              NULL};
const fcas_sha256_kernel fcas_sha256_shani_x2 = {"shani_x2", NEEDS, compress, compress2_interleaved, 0,
                                                 0, NULL, NULL};
#else
/* ISO C forbids an empty translation unit. */
typedef int fcas_sha256_shani_not_built;
#endif
