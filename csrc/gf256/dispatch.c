/* Which kernel: by name, or the fastest that this CPU supports. */
#include <stdatomic.h>
#include <string.h>

#include "common/cpu.h"
#include "gf256/kernels.h"

/* Every name that FASTCAS_GF256_KERNEL accepts, built or not; from the slowest to the fastest. */
static const struct {
    const char *name;
    const fcas_gf256_kernel *kernel; /* NULL: not built */
} kernels[] = {
    {"generic", &fcas_gf256_generic},
#if FCAS_GF256_HAVE_X86
    {"ssse3", &fcas_gf256_ssse3},
    {"avx2", &fcas_gf256_avx2},
    {"gfni", &fcas_gf256_gfni},
#else
    {"ssse3", NULL},
    {"avx2", NULL},
    {"gfni", NULL},
#endif
};

enum { N_KERNELS = sizeof kernels / sizeof kernels[0] };

static int cpu_can(const fcas_gf256_kernel *kernel)
{
    return (fcas_cpu_features() & kernel->cpu_needs) == kernel->cpu_needs;
}

fcas_status fcas_gf256_select(const char *name, const fcas_gf256_kernel **out)
{
    for (size_t i = 0; i < N_KERNELS; i++) {
        if (strcmp(kernels[i].name, name) != 0)
            continue;
        if (kernels[i].kernel == NULL)
            return FCAS_KERNEL_NOT_BUILT;
        if (!cpu_can(kernels[i].kernel))
            return FCAS_KERNEL_NO_CPU;
        *out = kernels[i].kernel;
        return FCAS_OK;
    }
    return FCAS_KERNEL_UNKNOWN;
}

const fcas_gf256_kernel *fcas_gf256_default(void)
{
    static _Atomic(const fcas_gf256_kernel *) chosen;
    /* Relaxed: racing threads choose the same kernel, and what it points to is constant. */
    const fcas_gf256_kernel *best = atomic_load_explicit(&chosen, memory_order_relaxed);

    if (best == NULL) {
        best = &fcas_gf256_generic;
        for (size_t i = 0; i < N_KERNELS; i++)
            if (kernels[i].kernel != NULL && cpu_can(kernels[i].kernel))
                best = kernels[i].kernel;
        atomic_store_explicit(&chosen, best, memory_order_relaxed);
    }
    return best;
}

const fcas_gf256_kernel *fcas_gf256_kernel_at(size_t i)
{
    for (size_t j = 0; j < N_KERNELS; j++)
        if (kernels[j].kernel != NULL && i-- == 0)
            return kernels[j].kernel;
    return NULL;
}
