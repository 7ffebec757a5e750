/* Which kernel: by name, or the preferred one that this CPU supports. */
#include <stdatomic.h>
#include <string.h>

#include "common/cpu.h"
#include "sha256/kernels.h"

/* Every name that FASTCAS_SHA256_KERNEL accepts, built or not; the last that a CPU supports is its default.
 * avx512_x16 is faster than shani_x10 over many messages, but slows what its core does next (csrc/README.md):
 * it is used where it is asked for. */
static const struct {
    const char *name;
    const fcas_sha256_kernel *kernel; /* NULL: not built */
} kernels[] = {
    {"generic", &fcas_sha256_generic},
#if FCAS_SHA256_HAVE_SIMD
    {"avx2_x8", &fcas_sha256_avx2_x8},
    {"shani", &fcas_sha256_shani},
    {"avx512_x16", &fcas_sha256_avx512_x16},
    {"shani_x2", &fcas_sha256_shani_x2},
    {"shani_x10", &fcas_sha256_shani_x10},
#else
    {"avx2_x8", NULL},
    {"shani", NULL},
    {"avx512_x16", NULL},
    {"shani_x2", NULL},
    {"shani_x10", NULL},
#endif
};

enum { N_KERNELS = sizeof kernels / sizeof kernels[0] };

static int cpu_can(const fcas_sha256_kernel *kernel, uint32_t cpu)
{
    return (cpu & kernel->cpu_needs) == kernel->cpu_needs;
}

fcas_status fcas_sha256_select(const char *name, const fcas_sha256_kernel **out)
{
    for (size_t i = 0; i < N_KERNELS; i++) {
        if (strcmp(kernels[i].name, name) != 0)
            continue;
        if (kernels[i].kernel == NULL)
            return FCAS_KERNEL_NOT_BUILT;
        if (!cpu_can(kernels[i].kernel, fcas_cpu_features()))
            return FCAS_KERNEL_NO_CPU;
        *out = kernels[i].kernel;
        return FCAS_OK;
    }
    return FCAS_KERNEL_UNKNOWN;
}

const fcas_sha256_kernel *fcas_sha256_default_for(uint32_t cpu)
{
    const fcas_sha256_kernel *best = &fcas_sha256_generic;

    for (size_t i = 0; i < N_KERNELS; i++)
        if (kernels[i].kernel != NULL && cpu_can(kernels[i].kernel, cpu))
            best = kernels[i].kernel;
    return best;
}

const fcas_sha256_kernel *fcas_sha256_default(void)
{
    static _Atomic(const fcas_sha256_kernel *) chosen;
    /* Relaxed: racing threads choose the same kernel, and what it points to is constant. */
    const fcas_sha256_kernel *best = atomic_load_explicit(&chosen, memory_order_relaxed);

    if (best == NULL) {
        best = fcas_sha256_default_for(fcas_cpu_features());
        atomic_store_explicit(&chosen, best, memory_order_relaxed);
    }
    return best;
}

const fcas_sha256_kernel *fcas_sha256_kernel_at(size_t i)
{
    for (size_t j = 0; j < N_KERNELS; j++)
        if (kernels[j].kernel != NULL && i-- == 0)
            return kernels[j].kernel;
    return NULL;
}
