/* The truth: FIPS 180-4 section 6.2 in portable C, against which every other kernel is tested. */
#include "common/bytes.h"
#include "sha256/kernels.h"

_Alignas(64) const uint32_t fcas_sha256_k[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

const uint32_t fcas_sha256_iv[8] = {
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
};

static inline uint32_t rotr(uint32_t x, unsigned n)
{
    return (x >> n) | (x << (32 - n));
}

static inline uint32_t big0(uint32_t x) { return rotr(x, 2) ^ rotr(x, 13) ^ rotr(x, 22); }
static inline uint32_t big1(uint32_t x) { return rotr(x, 6) ^ rotr(x, 11) ^ rotr(x, 25); }
static inline uint32_t small0(uint32_t x) { return rotr(x, 7) ^ rotr(x, 18) ^ (x >> 3); }
static inline uint32_t small1(uint32_t x) { return rotr(x, 17) ^ rotr(x, 19) ^ (x >> 10); }

/* One round with the eight variables renamed instead of moved; kw = K[t] + W[t]. */
#define ROUND(a, b, c, d, e, f, g, h, kw)                                   \
    do {                                                                    \
        uint32_t t1 = (h) + big1(e) + (((e) & ((f) ^ (g))) ^ (g)) + (kw);   \
        (d) += t1;                                                          \
        (h) = t1 + big0(a) + (((a) & (b)) | ((c) & ((a) | (b))));           \
    } while (0)

static void compress(uint32_t state[8], const uint8_t *blocks, size_t nblocks)
{
    const uint32_t *k = fcas_sha256_k;
    uint32_t w[16];

    for (; nblocks > 0; nblocks--, blocks += FCAS_SHA256_BLOCK) {
        uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        uint32_t e = state[4], f = state[5], g = state[6], h = state[7];

        for (unsigned t = 0; t < 16; t++)
            w[t] = fcas_load_be32(blocks + 4 * t);
        for (unsigned t = 0;; t += 16) {
            for (unsigned i = 0; i < 16; i += 8) {
                ROUND(a, b, c, d, e, f, g, h, k[t + i] + w[i]);
                ROUND(h, a, b, c, d, e, f, g, k[t + i + 1] + w[i + 1]);
                ROUND(g, h, a, b, c, d, e, f, k[t + i + 2] + w[i + 2]);
                ROUND(f, g, h, a, b, c, d, e, k[t + i + 3] + w[i + 3]);
                ROUND(e, f, g, h, a, b, c, d, k[t + i + 4] + w[i + 4]);
                ROUND(d, e, f, g, h, a, b, c, k[t + i + 5] + w[i + 5]);
                ROUND(c, d, e, f, g, h, a, b, k[t + i + 6] + w[i + 6]);
                ROUND(b, c, d, e, f, g, h, a, k[t + i + 7] + w[i + 7]);
            }
            if (t == 48)
                break;
            for (unsigned i = 0; i < 16; i++) /* W[t+16+i] over W[t+i] */
                w[i] += small1(w[(i + 14) & 15]) + w[(i + 9) & 15] + small0(w[(i + 1) & 15]);
        }
        state[0] += a;
        state[1] += b;
        state[2] += c;
        state[3] += d;
        state[4] += e;
        state[5] += f;
        state[6] += g;
        state[7] += h;
    }
}

static void compress2(uint32_t state_a[8], const uint8_t *a, uint32_t state_b[8], const uint8_t *b,
                      size_t nblocks)
{
    compress(state_a, a, nblocks);
    compress(state_b, b, nblocks);
}

const fcas_sha256_kernel fcas_sha256_generic = {"generic", 0, compress, compress2, 0, 0, NULL, NULL};
