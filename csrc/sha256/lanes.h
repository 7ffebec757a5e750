/* Private to csrc/sha256: FIPS 180-4 section 6.2 over one message per lane of a vector. The words of all
 * lanes stand side by side, so every operation is an ordinary one and nothing crosses lanes.
 *
 * A file per instruction set defines, before it includes this one:
 *   LANES, VEC, TARGET          how many, their type, the target attribute
 *   ADD(x,y), XOR3(x,y,z)       sums, and exclusive ors of three
 *   SMALL0..BIG1(x)             the functions of section 4.1.2
 *   CH(e,f,g)
 *   MAJ(a,b,c,ab,bc)            ab = a^b and bc = b^c: bc is the round before's ab, where it is of use
 *   XOR(x,y), SET1(word), LOADV(p), STOREV(p,v)
 *   load_blocks(VEC w[16], const uint8_t *const p[LANES], size_t at) */
#include "sha256/kernels.h"

#define LANES_ROUND(a, b, c, d, e, f, g, h, kw)                             \
    do {                                                                    \
        VEC t1 = ADD(ADD(ADD(h, kw), CH(e, f, g)), BIG1(e));                \
        VEC ab = XOR(a, b);                                                 \
        d = ADD(d, t1);                                                     \
        h = ADD(ADD(t1, MAJ(a, b, c, ab, bc)), BIG0(a));                    \
        bc = ab;                                                            \
    } while (0)

/* Round t + i, after which w[i] makes room for W[t+16+i] unless these are the last sixteen. */
#define LANES_STEP(i, a, b, c, d, e, f, g, h)                               \
    do {                                                                    \
        LANES_ROUND(a, b, c, d, e, f, g, h, ADD(w[i], SET1(k[i])));         \
        if (!is_last)                                                       \
            w[i] = ADD(ADD(w[i], w[((i) + 9) & 15]),                        \
                       ADD(SMALL0(w[((i) + 1) & 15]), SMALL1(w[((i) + 14) & 15]))); \
    } while (0)

TARGET static inline __attribute__((always_inline)) void sixteen_rounds(VEC s[8], VEC w[16],
                                                                        const uint32_t k[16], int is_last)
{
    VEC a = s[0], b = s[1], c = s[2], d = s[3], e = s[4], f = s[5], g = s[6], h = s[7];
    VEC bc = XOR(b, c);

    LANES_STEP(0, a, b, c, d, e, f, g, h);
    LANES_STEP(1, h, a, b, c, d, e, f, g);
    LANES_STEP(2, g, h, a, b, c, d, e, f);
    LANES_STEP(3, f, g, h, a, b, c, d, e);
    LANES_STEP(4, e, f, g, h, a, b, c, d);
    LANES_STEP(5, d, e, f, g, h, a, b, c);
    LANES_STEP(6, c, d, e, f, g, h, a, b);
    LANES_STEP(7, b, c, d, e, f, g, h, a);
    LANES_STEP(8, a, b, c, d, e, f, g, h);
    LANES_STEP(9, h, a, b, c, d, e, f, g);
    LANES_STEP(10, g, h, a, b, c, d, e, f);
    LANES_STEP(11, f, g, h, a, b, c, d, e);
    LANES_STEP(12, e, f, g, h, a, b, c, d);
    LANES_STEP(13, d, e, f, g, h, a, b, c);
    LANES_STEP(14, c, d, e, f, g, h, a, b);
    LANES_STEP(15, b, c, d, e, f, g, h, a);
    (void)bc; /* of no use where MAJ is one instruction */
    s[0] = a, s[1] = b, s[2] = c, s[3] = d, s[4] = e, s[5] = f, s[6] = g, s[7] = h;
}

TARGET static void compress_lanes(uint32_t (*const states[])[8], const uint8_t *const blocks[], size_t nblocks)
{
    uint32_t words[8][LANES];
    VEC s[8], before[8], w[16];

    for (unsigned l = 0; l < LANES; l++)
        for (unsigned i = 0; i < 8; i++)
            words[i][l] = (*states[l])[i];
    for (unsigned i = 0; i < 8; i++)
        s[i] = LOADV(words[i]);
    for (size_t at = 0; at < nblocks * FCAS_SHA256_BLOCK; at += FCAS_SHA256_BLOCK) {
        for (unsigned i = 0; i < 8; i++)
            before[i] = s[i];
        load_blocks(w, blocks, at);
        for (unsigned t = 0; t < 48; t += 16)
            sixteen_rounds(s, w, fcas_sha256_k + t, 0);
        sixteen_rounds(s, w, fcas_sha256_k + 48, 1);
        for (unsigned i = 0; i < 8; i++)
            s[i] = ADD(s[i], before[i]);
    }
    for (unsigned i = 0; i < 8; i++)
        STOREV(words[i], s[i]);
    for (unsigned l = 0; l < LANES; l++)
        for (unsigned i = 0; i < 8; i++)
            (*states[l])[i] = words[i][l];
}
