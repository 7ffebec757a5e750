/* cpuid tells what the processor can do, xgetbv what the system saves on a context switch; a vector
 * register that is not saved is silently clobbered, so both are asked. */
#include "common/cpu.h"

#include <stdatomic.h>

#if defined(__x86_64__)
#include <cpuid.h>

enum {
    XCR0_YMM = 0x06, /* xmm and ymm */
    XCR0_ZMM = 0xe6  /* and mask registers, upper halves of zmm0-15, zmm16-31 */
};

static uint64_t read_xcr0(void)
{
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return ((uint64_t)hi << 32) | lo;
}

static uint32_t probe(void)
{
    uint32_t a, b, c, d;
    uint32_t found = 0;
    uint64_t xcr0 = 0;

    if (!__get_cpuid(1, &a, &b, &c, &d))
        return 0;
    if (c & bit_SSSE3)
        found |= FCAS_CPU_SSSE3;
    if (c & bit_SSE4_1)
        found |= FCAS_CPU_SSE41;
    if (c & bit_OSXSAVE)
        xcr0 = read_xcr0();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return found;
    if (b & (1u << 29)) /* SHA */
        found |= FCAS_CPU_SHANI;
    if ((b & bit_AVX2) && (xcr0 & XCR0_YMM) == XCR0_YMM)
        found |= FCAS_CPU_AVX2;
    if (c & (1u << 8)) /* GFNI */
        found |= FCAS_CPU_GFNI;
    if ((b & bit_AVX512F) && (b & bit_AVX512BW) && (b & bit_AVX512VL)
        && (xcr0 & XCR0_ZMM) == XCR0_ZMM)
        found |= FCAS_CPU_AVX512;
    return found;
}
#else
static uint32_t probe(void)
{
    return 0;
}
#endif

enum { PROBED = 1 << 30 }; /* not an FCAS_CPU_* bit: tells "asked" from "nothing found" */

static _Atomic uint32_t features;
static _Atomic uint32_t allowed_bits = UINT32_MAX;

uint32_t fcas_cpu_features(void)
{
    /* Relaxed: threads that race here compute the same value, and nothing else is published. */
    uint32_t f = atomic_load_explicit(&features, memory_order_relaxed);
    if (f == 0) {
        f = probe() | PROBED;
        atomic_store_explicit(&features, f, memory_order_relaxed);
    }
    return f & ~(uint32_t)PROBED & atomic_load_explicit(&allowed_bits, memory_order_relaxed);
}

void fcas_cpu_mask(uint32_t allowed)
{
    atomic_store_explicit(&allowed_bits, allowed, memory_order_relaxed);
}
