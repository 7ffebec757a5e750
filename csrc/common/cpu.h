/* What this CPU and its operating system support: cpuid and xgetbv, asked once. */
#ifndef FCAS_COMMON_CPU_H
#define FCAS_COMMON_CPU_H

#include <stdint.h>

enum {
    FCAS_CPU_SSSE3  = 1u << 0,
    FCAS_CPU_SSE41  = 1u << 1,
    FCAS_CPU_SHANI  = 1u << 2,
    FCAS_CPU_AVX2   = 1u << 3, /* and the system saves ymm registers */
    FCAS_CPU_GFNI   = 1u << 4,
    FCAS_CPU_AVX512 = 1u << 5  /* F + BW + VL, and the system saves zmm and mask registers */
};

/* The supported FCAS_CPU_* bits, less those masked by fcas_cpu_mask(). */
uint32_t fcas_cpu_features(void);
/* Tests only: pretend that the CPU has at most these bits; UINT32_MAX restores the truth. */
void fcas_cpu_mask(uint32_t allowed);

#endif
