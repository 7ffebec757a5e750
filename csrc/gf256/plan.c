/* What all kernels share: tables, and the order in which outputs and blocks are visited. */
#include <stdlib.h>

#include "gf256/kernels.h"

enum {
    ALIGNMENT = 64,
    BLOCK_TOTAL = 256 << 10, /* bytes of all inputs that stay in the second-level cache between groups */
    BLOCK_MIN = 4 << 10
};

static uint64_t affine_of(uint8_t c)
{
    uint64_t matrix = 0;

    for (unsigned b = 0; b < 8; b++) {
        unsigned column = fcas_gf256_mul(c, (uint8_t)(1u << b));
        for (unsigned i = 0; i < 8; i++)
            if (column >> i & 1)
                matrix |= (uint64_t)1 << (8 * (7 - i) + b);
    }
    return matrix;
}

fcas_status fcas_gf256_plan_new(fcas_gf256_plan **out, const fcas_gf256_kernel *kernel,
                                const uint8_t *matrix, size_t n_out, size_t n_in)
{
    if (n_out < 1 || n_out > FCAS_GF256_SIDE_MAX || n_in < 1 || n_in > FCAS_GF256_SIDE_MAX)
        return FCAS_E_ARG;
    /* No overflow: at most 255 * 255 coefficients. Header first, then both tables, one block. */
    size_t n = n_out * n_in;
    size_t header = (sizeof(fcas_gf256_plan) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    size_t n_affine = (n_in + n_in % 2) * n_out;
    size_t size = header + n * FCAS_GF256_NIBBLES + n_affine * sizeof(uint64_t);
    uint8_t *memory = aligned_alloc(ALIGNMENT, (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    if (memory == NULL)
        return FCAS_E_NOMEM;

    uint8_t *nibbles = memory + header;
    uint64_t *affine = (uint64_t *)(void *)(nibbles + n * FCAS_GF256_NIBBLES);
    for (size_t k = 0; k < n; k++) {
        for (unsigned x = 0; x < 16; x++) {
            nibbles[FCAS_GF256_NIBBLES * k + x] = fcas_gf256_mul(matrix[k], (uint8_t)x);
            nibbles[FCAS_GF256_NIBBLES * k + 16 + x] = fcas_gf256_mul(matrix[k], (uint8_t)(x << 4));
        }
    }
    for (size_t c = 0; c < n_in + n_in % 2; c++)
        for (size_t r = 0; r < n_out; r++)
            affine[2 * (c / 2 * n_out + r) + c % 2] = c < n_in ? affine_of(matrix[n_in * r + c]) : 0;
    fcas_gf256_plan *plan = (fcas_gf256_plan *)(void *)memory;
    plan->kernel = kernel != NULL ? kernel : fcas_gf256_default();
    plan->n_out = n_out;
    plan->n_in = n_in;
    plan->nibbles = nibbles;
    plan->affine = affine;
    *out = plan;
    return FCAS_OK;
}

void fcas_gf256_plan_free(fcas_gf256_plan *plan)
{
    free(plan);
}

void fcas_gf256_plan_apply(const fcas_gf256_plan *plan, const uint8_t *const *in, uint8_t *const *out,
                           size_t n)
{
    /* As even as possible: a group of one or two outputs costs nearly as many loads as a full one. */
    size_t n_groups = (plan->n_out + plan->kernel->max_rows - 1) / plan->kernel->max_rows;
    size_t group = (plan->n_out + n_groups - 1) / n_groups;
    size_t block = n; /* one group reads each input once: nothing to keep in a cache */

    if (n_groups > 1) {
        block = BLOCK_TOTAL / plan->n_in / ALIGNMENT * ALIGNMENT;
        if (block < BLOCK_MIN)
            block = BLOCK_MIN;
    }
    for (size_t begin = 0; begin < n;) {
        size_t end = n - begin > block ? begin + block : n;
        for (size_t first = 0; first < plan->n_out; first += group) {
            size_t n_rows = plan->n_out - first < group ? plan->n_out - first : group;
            plan->kernel->rows(plan, first, n_rows, in, out, begin, end);
        }
        begin = end;
    }
}
