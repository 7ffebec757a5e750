/* SHA-256 of ten messages at once: eight in the lanes of 256-bit vectors, and beside them two with the SHA
 * extensions, at four times the lanes' pace; or one at eight times, for a chain that cannot be cut.
 *
 * SHA256RNDS2 starts every third cycle and leaves two of three vector ports, and all of the third one's
 * other slots, to somebody else (csrc/README.md). The lanes take them.
 *
 * It is assembly because the registers are part of the design: after a write to the upper half of ymm0 to
 * ymm15, each change between such code and the SHA extensions, which have no VEX form, costs some 400 cycles.
 * So the lanes live in ymm16 to ymm31, which have no such history, and the SHA extensions in xmm0 to xmm15.
 * The parts need not be mixed finely: the CPU reorders over about a round of the lanes with its share. What is
 * first in the text goes first, which the chain of SHA256RNDS2 needs more. */
#include "sha256/kernels.h"

#if FCAS_SHA256_HAVE_SIMD
#include <stddef.h>
#include <string.h>

#include "common/cpu.h"

enum { LANES = 2 * FCAS_SHA256_PACE };

/* All that the assembly reads and writes but the messages. Offsets below are checked against it. */
typedef struct {
    const uint8_t *blocks[LANES];
    uint32_t fast_kw[2][8];     /* K + W of four rounds; half of each is unused */
    uint32_t fast_before[2][8];
    uint32_t w[16][LANES];
    uint32_t state[8][LANES];
    uint8_t swap[32];           /* VPSHUFB: bytes of a word in reverse */
    uint32_t fast_state[2][8];  /* in the order F E B A H G D C */
} __attribute__((aligned(64))) work;

/* Bytes from %rdi, the work. A displacement of a few vectors is one byte long. */
#define KW_A      "64"
#define KW_B      "96"
#define BEFORE_A  "128"
#define BEFORE_B  "160"
#define W(i)      "192+32*((" i ")&15)(%%rdi)"
#define STATE(i)  "704+32*" #i "(%%rdi)"
#define SWAP      "960(%%rdi)"
#define FAST(i)   "992+16*" #i "(%%rdi)"
_Static_assert(LANES == 8, "one ymm register of words");
_Static_assert(offsetof(work, blocks) == 0 && offsetof(work, fast_kw) == 64 && offsetof(work, fast_before) == 128
                   && offsetof(work, w) == 192 && offsetof(work, state) == 704 && offsetof(work, swap) == 960
                   && offsetof(work, fast_state) == 992,
               "the assembly's offsets");

#define I(text) text "\n\t"

/* --- The lanes: a..h in ymm16..ymm23, W[t-2] and W[t-1] in ymm30 and ymm31, the rest for passing values. --- */

/* 16 bytes of each message become words 4q..4q+3 of all. %rsi: bytes done of each. */
#define LOAD_ROW(q, j, lane, other)                                                                       \
    I("movq 8*" #lane "(%%rdi), %%r8")                                                                    \
    I("movq 8*" #other "(%%rdi), %%r9")                                                                   \
    I("vmovdqu32 16*" #q "(%%r8,%%rsi), %%xmm" #j)                                                        \
    I("vinserti32x4 $1, 16*" #q "(%%r9,%%rsi), %%ymm" #j ", %%ymm" #j)                                    \
    I("vpshufb " SWAP ", %%ymm" #j ", %%ymm" #j)
#define LOAD_WORDS(q)                                                                                     \
    LOAD_ROW(q, 24, 0, 4)                                                                                 \
    LOAD_ROW(q, 25, 1, 5)                                                                                 \
    LOAD_ROW(q, 26, 2, 6)                                                                                 \
    LOAD_ROW(q, 27, 3, 7)                                                                                 \
    I("vpunpckldq %%ymm25, %%ymm24, %%ymm28")                                                             \
    I("vpunpckhdq %%ymm25, %%ymm24, %%ymm29")                                                             \
    I("vpunpckldq %%ymm27, %%ymm26, %%ymm30")                                                             \
    I("vpunpckhdq %%ymm27, %%ymm26, %%ymm31")                                                             \
    I("vpunpcklqdq %%ymm30, %%ymm28, %%ymm24")                                                            \
    I("vpunpckhqdq %%ymm30, %%ymm28, %%ymm25")                                                            \
    I("vpunpcklqdq %%ymm31, %%ymm29, %%ymm30")                                                            \
    I("vpunpckhqdq %%ymm31, %%ymm29, %%ymm31")                                                            \
    I("vmovdqa32 %%ymm24, " W("4*" #q))                                                                   \
    I("vmovdqa32 %%ymm25, " W("4*" #q "+1"))                                                              \
    I("vmovdqa32 %%ymm30, " W("4*" #q "+2"))                                                              \
    I("vmovdqa32 %%ymm31, " W("4*" #q "+3"))

/* W[t] over W[t-16]. w2: the register of W[t-2], which takes W[t]. */
#define NEXT_WORD(i, w2)                                                                                  \
    I("vmovdqa32 " W(#i "+1") ", %%ymm26")                                                                \
    I("vmovdqa32 " W(#i) ", %%ymm24")                                                                     \
    I("vprord $17, %%ymm" #w2 ", %%ymm27")                                                                \
    I("vprord $19, %%ymm" #w2 ", %%ymm28")                                                                \
    I("vpsrld $10, %%ymm" #w2 ", %%ymm29")                                                                \
    I("vprord $7, %%ymm26, %%ymm25")                                                                      \
    I("vpaddd " W(#i "+9") ", %%ymm24, %%ymm24")                                                          \
    I("vpternlogd $0x96, %%ymm29, %%ymm28, %%ymm27")                                                      \
    I("vprord $18, %%ymm26, %%ymm28")                                                                     \
    I("vpsrld $3, %%ymm26, %%ymm26")                                                                      \
    I("vpternlogd $0x96, %%ymm26, %%ymm28, %%ymm25")                                                      \
    I("vpaddd %%ymm27, %%ymm24, %%ymm24")                                                                 \
    I("vpaddd %%ymm25, %%ymm24, %%ymm" #w2)                                                               \
    I("vmovdqa32 %%ymm" #w2 ", " W(#i))

/* The round of W[t] in a register. %rdx: K of these sixteen rounds. */
#define ROUND(i, word, a, b, c, d, e, f, g, h)                                                            \
    I("vpaddd 4*" #i "(%%rdx)%{1to8%}, %%ymm" #word ", %%ymm24")                                          \
    I("vprord $6, %%ymm" #e ", %%ymm25")                                                                  \
    I("vprord $11, %%ymm" #e ", %%ymm26")                                                                 \
    I("vprord $25, %%ymm" #e ", %%ymm27")                                                                 \
    I("vmovdqa32 %%ymm" #e ", %%ymm28")                                                                   \
    I("vpaddd %%ymm24, %%ymm" #h ", %%ymm" #h)                                                            \
    I("vpternlogd $0xca, %%ymm" #g ", %%ymm" #f ", %%ymm28") /* Ch */                                     \
    I("vpternlogd $0x96, %%ymm27, %%ymm26, %%ymm25")                                                      \
    I("vpaddd %%ymm28, %%ymm" #h ", %%ymm" #h)                                                            \
    I("vprord $2, %%ymm" #a ", %%ymm26")                                                                  \
    I("vprord $13, %%ymm" #a ", %%ymm27")                                                                 \
    I("vprord $22, %%ymm" #a ", %%ymm28")                                                                 \
    I("vpaddd %%ymm25, %%ymm" #h ", %%ymm" #h)                                                            \
    I("vmovdqa32 %%ymm" #a ", %%ymm29")                                                                   \
    I("vpternlogd $0xe8, %%ymm" #c ", %%ymm" #b ", %%ymm29") /* Maj */                                    \
    I("vpternlogd $0x96, %%ymm28, %%ymm27, %%ymm26")                                                      \
    I("vpaddd %%ymm" #h ", %%ymm" #d ", %%ymm" #d)                                                        \
    I("vpaddd %%ymm26, %%ymm29, %%ymm29")                                                                 \
    I("vpaddd %%ymm29, %%ymm" #h ", %%ymm" #h)

/* --- Beside them: A B E F, C D G H and sixteen words in six registers per message, K + W in xmm0. --- */

/* Four rounds, with the next block's words before the first and this block's sum after the last. The upper
 * half of K + W comes back through memory, where a shuffle would take a port from the lanes. %rcx: K + 128. */
#define QUAD(q, from, kw, before, ab, cd, w0, w1, w2, w3)                                                 \
    I(".if " #q " == 0")                                                                                  \
    I("vmovdqa %%xmm" #ab ", " before "(%%rdi)")                                                          \
    I("vmovdqa %%xmm" #cd ", 16+" before "(%%rdi)")                                                       \
    I("vmovdqu (" from "), %%xmm" #w0)                                                                    \
    I("vmovdqu 16(" from "), %%xmm" #w1)                                                                  \
    I("vmovdqu 32(" from "), %%xmm" #w2)                                                                  \
    I("vmovdqu 48(" from "), %%xmm" #w3)                                                                  \
    I("addq $64, " from)                                                                                  \
    I("vpshufb %%xmm13, %%xmm" #w0 ", %%xmm" #w0)                                                         \
    I("vpshufb %%xmm13, %%xmm" #w1 ", %%xmm" #w1)                                                         \
    I("vpshufb %%xmm13, %%xmm" #w2 ", %%xmm" #w2)                                                         \
    I("vpshufb %%xmm13, %%xmm" #w3 ", %%xmm" #w3)                                                         \
    I(".endif")                                                                                           \
    I("vpaddd 16*" #q "-128(%%rcx), %%xmm" #w0 ", %%xmm0")                                                \
    I("vmovdqa %%xmm0, " kw "(%%rdi)")                                                                    \
    I("sha256rnds2 %%xmm" #ab ", %%xmm" #cd)                                                              \
    I(".if " #q " < 12")                                                                                  \
    I("sha256msg1 %%xmm" #w1 ", %%xmm" #w0)                                                               \
    I("vpalignr $4, %%xmm" #w2 ", %%xmm" #w3 ", %%xmm15")                                                 \
    I("vpaddd %%xmm15, %%xmm" #w0 ", %%xmm" #w0)                                                          \
    I("sha256msg2 %%xmm" #w3 ", %%xmm" #w0)                                                               \
    I(".endif")                                                                                           \
    I("vmovq 8+" kw "(%%rdi), %%xmm0")                                                                    \
    I("sha256rnds2 %%xmm" #cd ", %%xmm" #ab)                                                              \
    I(".if " #q " == 15")                                                                                 \
    I("vpaddd " before "(%%rdi), %%xmm" #ab ", %%xmm" #ab)                                                \
    I("vpaddd 16+" before "(%%rdi), %%xmm" #cd ", %%xmm" #cd)                                             \
    I(".endif")

/* The digit is q modulo 4: which of the registers holds words 4q..4q+3. */
#define A_0(q) QUAD(q, "%%r10", KW_A, BEFORE_A, 1, 2, 3, 4, 5, 6)
#define A_1(q) QUAD(q, "%%r10", KW_A, BEFORE_A, 1, 2, 4, 5, 6, 3)
#define A_2(q) QUAD(q, "%%r10", KW_A, BEFORE_A, 1, 2, 5, 6, 3, 4)
#define A_3(q) QUAD(q, "%%r10", KW_A, BEFORE_A, 1, 2, 6, 3, 4, 5)
#define B_0(q) QUAD(q, "%%r11", KW_B, BEFORE_B, 7, 8, 9, 10, 11, 12)
#define B_1(q) QUAD(q, "%%r11", KW_B, BEFORE_B, 7, 8, 10, 11, 12, 9)
#define B_2(q) QUAD(q, "%%r11", KW_B, BEFORE_B, 7, 8, 11, 12, 9, 10)
#define B_3(q) QUAD(q, "%%r11", KW_B, BEFORE_B, 7, 8, 12, 9, 10, 11)

/* --- Sixteen rounds of the lanes, and with each four rounds of two messages or eight of one. --- */

#define TWO(i, r, q, s, q1, s1) A_##r(i) B_##r(i)
#define ONE(i, r, q, s, q1, s1) A_##s(q) A_##s1(q1)

#define FIRST(i, w2, a, b, c, d, e, f, g, h)                                                              \
    I("vmovdqa32 " W(#i) ", %%ymm24")                                                                     \
    ROUND(i, 24, a, b, c, d, e, f, g, h)
#define LATER(i, w2, a, b, c, d, e, f, g, h)                                                              \
    NEXT_WORD(i, w2)                                                                                      \
    ROUND(i, w2, a, b, c, d, e, f, g, h)

#define SIXTEEN_ROUNDS(FAST, STEP, LOAD)                                                                  \
    FAST(0, 0, 0, 0, 1, 1) LOAD(0) STEP(0, 30, 16, 17, 18, 19, 20, 21, 22, 23)                            \
    FAST(1, 1, 2, 2, 3, 3) STEP(1, 31, 23, 16, 17, 18, 19, 20, 21, 22)                                    \
    FAST(2, 2, 4, 0, 5, 1) STEP(2, 30, 22, 23, 16, 17, 18, 19, 20, 21)                                    \
    FAST(3, 3, 6, 2, 7, 3) STEP(3, 31, 21, 22, 23, 16, 17, 18, 19, 20)                                    \
    FAST(4, 0, 8, 0, 9, 1) LOAD(1) STEP(4, 30, 20, 21, 22, 23, 16, 17, 18, 19)                            \
    FAST(5, 1, 10, 2, 11, 3) STEP(5, 31, 19, 20, 21, 22, 23, 16, 17, 18)                                  \
    FAST(6, 2, 12, 0, 13, 1) STEP(6, 30, 18, 19, 20, 21, 22, 23, 16, 17)                                  \
    FAST(7, 3, 14, 2, 15, 3) STEP(7, 31, 17, 18, 19, 20, 21, 22, 23, 16)                                  \
    FAST(8, 0, 0, 0, 1, 1) LOAD(2) STEP(8, 30, 16, 17, 18, 19, 20, 21, 22, 23)                            \
    FAST(9, 1, 2, 2, 3, 3) STEP(9, 31, 23, 16, 17, 18, 19, 20, 21, 22)                                    \
    FAST(10, 2, 4, 0, 5, 1) STEP(10, 30, 22, 23, 16, 17, 18, 19, 20, 21)                                  \
    FAST(11, 3, 6, 2, 7, 3) STEP(11, 31, 21, 22, 23, 16, 17, 18, 19, 20)                                  \
    FAST(12, 0, 8, 0, 9, 1) LOAD(3) STEP(12, 30, 20, 21, 22, 23, 16, 17, 18, 19)                          \
    FAST(13, 1, 10, 2, 11, 3) STEP(13, 31, 19, 20, 21, 22, 23, 16, 17, 18)                                \
    FAST(14, 2, 12, 0, 13, 1) STEP(14, 30, 18, 19, 20, 21, 22, 23, 16, 17)                                \
    FAST(15, 3, 14, 2, 15, 3) STEP(15, 31, 17, 18, 19, 20, 21, 22, 23, 16)

#define NO_LOAD(q)
#define ADD_STATE(i, y)                                                                                   \
    I("vpaddd " STATE(i) ", %%ymm" #y ", %%ymm" #y)                                                       \
    I("vmovdqa32 %%ymm" #y ", " STATE(i))
#define LOAD_STATE(i, y) I("vmovdqa32 " STATE(i) ", %%ymm" #y)
#define EACH_VARIABLE(DO)                                                                                 \
    DO(0, 16) DO(1, 17) DO(2, 18) DO(3, 19) DO(4, 20) DO(5, 21) DO(6, 22) DO(7, 23)

/* n >= 1 blocks of each lane. VZEROUPPER: a caller's upper halves would cost 400 cycles per instruction. */
#define DEFINE_RUN(name, FAST_STEP)                                                                       \
    __attribute__((target("avx512f,avx512bw,avx512vl,sha"), noinline)) static void name(                  \
        work *s, const uint8_t *a, const uint8_t *b, size_t n)                                            \
    {                                                                                                     \
        register const uint8_t *from_a __asm__("r10") = a;                                                \
        register const uint8_t *from_b __asm__("r11") = b;                                                \
        __asm__ volatile(                                                                                 \
            I("vzeroupper")                                                                               \
            I("xorl %%esi, %%esi")                                                                        \
            I("vmovdqa " SWAP ", %%xmm13")                                                                \
            I("vmovdqa " FAST(0) ", %%xmm1")                                                              \
            I("vmovdqa " FAST(1) ", %%xmm2")                                                              \
            I("vmovdqa " FAST(2) ", %%xmm7")                                                              \
            I("vmovdqa " FAST(3) ", %%xmm8")                                                              \
            EACH_VARIABLE(LOAD_STATE)                                                                     \
            I(".p2align 5")                                                                               \
            "1:\n\t"                                                                                      \
            I("leaq -128(%%rcx), %%rdx")                                                                  \
            SIXTEEN_ROUNDS(FAST_STEP, FIRST, LOAD_WORDS)                                                  \
            I("movl $3, %%r9d")                                                                           \
            I(".p2align 5")                                                                               \
            "2:\n\t"                                                                                      \
            I("addq $64, %%rdx")                                                                          \
            SIXTEEN_ROUNDS(FAST_STEP, LATER, NO_LOAD)                                                     \
            I("decl %%r9d")                                                                               \
            I("jnz 2b")                                                                                   \
            EACH_VARIABLE(ADD_STATE)                                                                      \
            I("addq $64, %%rsi")                                                                          \
            I("decq %%rax")                                                                               \
            I("jnz 1b")                                                                                   \
            I("vmovdqa %%xmm1, " FAST(0))                                                                 \
            I("vmovdqa %%xmm2, " FAST(1))                                                                 \
            I("vmovdqa %%xmm7, " FAST(2))                                                                 \
            I("vmovdqa %%xmm8, " FAST(3))                                                                 \
            : "+a"(n), "+r"(from_a), "+r"(from_b)                                                         \
            : "D"(s), "c"(fcas_sha256_k + 32)                                                             \
            : "rdx", "rsi", "r8", "r9", "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5",   \
              "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15",       \
              "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25",   \
              "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31");                                      \
    }

DEFINE_RUN(run_beside_two, TWO)
DEFINE_RUN(run_beside_one, ONE)

static const unsigned fast_order[8] = {5, 4, 1, 0, 7, 6, 3, 2}; /* F E B A H G D C */

static void compress_beside(uint32_t (*const states[])[8], const uint8_t *const blocks[], size_t nblocks,
                            uint32_t state_a[8], const uint8_t *a, uint32_t state_b[8], const uint8_t *b)
{
    work s;

    if (nblocks == 0)
        return;
    for (unsigned l = 0; l < LANES; l++) {
        s.blocks[l] = blocks[l];
        for (unsigned i = 0; i < 8; i++)
            s.state[i][l] = (*states[l])[i];
    }
    for (unsigned i = 0; i < sizeof s.swap; i++)
        s.swap[i] = (uint8_t)((i & 12) + 3 - (i & 3));
    memset(s.fast_state, 0, sizeof s.fast_state);
    for (unsigned i = 0; i < 8; i++) {
        s.fast_state[0][i] = state_a[fast_order[i]];
        if (state_b != NULL)
            s.fast_state[1][i] = state_b[fast_order[i]];
    }
    if (state_b != NULL)
        run_beside_two(&s, a, b, nblocks);
    else
        run_beside_one(&s, a, NULL, nblocks);
    for (unsigned l = 0; l < LANES; l++)
        for (unsigned i = 0; i < 8; i++)
            (*states[l])[i] = s.state[i][l];
    for (unsigned i = 0; i < 8; i++) {
        state_a[fast_order[i]] = s.fast_state[0][i];
        if (state_b != NULL)
            state_b[fast_order[i]] = s.fast_state[1][i];
    }
}

static void compress(uint32_t state[8], const uint8_t *blocks, size_t nblocks)
{
    fcas_sha256_shani_x2.compress(state, blocks, nblocks);
}

static void compress2(uint32_t state_a[8], const uint8_t *a, uint32_t state_b[8], const uint8_t *b,
                      size_t nblocks)
{
    fcas_sha256_shani_x2.compress2(state_a, a, state_b, b, nblocks);
}

/* Sixteen blocks take 1,120 cycles, in two streams of the SHA extensions 97 each: with six messages at least
 * twelve of them are of use. */
const fcas_sha256_kernel fcas_sha256_shani_x10 = {
    "shani_x10", FCAS_CPU_AVX512 | FCAS_CPU_SHANI | FCAS_CPU_SSE41 | FCAS_CPU_SSSE3, compress, compress2,
    LANES, 6, NULL, compress_beside};
#else
/* ISO C forbids an empty translation unit. */
typedef int fcas_sha256_shani_x10_not_built;
#endif
