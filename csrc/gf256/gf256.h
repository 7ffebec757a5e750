/* Products of a matrix over GF(2^8) with rows of bytes: the arithmetic of Reed-Solomon parity.
 *
 * The field is GF(2)[x] / (x^8 + x^4 + x^3 + x^2 + 1), 0x11d; bit i of a byte is the coefficient of x^i;
 * addition is exclusive or. Which matrix is used is the binding's business (fastcas/parity/matrix.py).
 *
 * Kernel choice: fcas_gf256_default() picks the fastest that this CPU supports, once per process;
 * FASTCAS_GF256_KERNEL in the environment is read by the binding and is a demand: it works or fails with
 * FCAS_KERNEL_UNKNOWN, FCAS_KERNEL_NOT_BUILT or FCAS_KERNEL_NO_CPU. `generic` is the truth. */
#ifndef FCAS_GF256_H
#define FCAS_GF256_H

#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

#define FCAS_GF256_SIDE_MAX 255u /* rows or columns of a matrix */

typedef struct fcas_gf256_plan fcas_gf256_plan;

typedef struct {
    const char *name;      /* what FASTCAS_GF256_KERNEL accepts: "generic", "ssse3", "avx2", "gfni" */
    uint32_t    cpu_needs; /* FCAS_CPU_* bits (common/cpu.h), all required */
    uint32_t    max_rows;  /* outputs that are computed together, in registers */
    /* Rows first .. first + n_rows - 1 of the plan's matrix, 1 <= n_rows <= max_rows, for the bytes
     * begin .. end - 1 of every buffer. Same result on every kernel (tests/kernels/test_gf256.py). */
    void (*rows)(const fcas_gf256_plan *plan, size_t first, size_t n_rows, const uint8_t *const *in,
                 uint8_t *const *out, size_t begin, size_t end);
} fcas_gf256_kernel;

/* A matrix bound to a kernel and to its tables. Constant after creation: any number of threads may apply
 * it at once. */
struct fcas_gf256_plan {
    const fcas_gf256_kernel *kernel;
    size_t n_out;          /* rows, 1..255 */
    size_t n_in;           /* columns, 1..255 */
    const uint8_t *nibbles; /* uint8[n_out][n_in][32]: c * 0..15, then c * 16 * 0..15; 64-byte aligned */
    const uint64_t *affine; /* uint64[(n_in + 1) / 2][n_out][2], pairs of columns (the last may lack its second):
                             * multiplication by c as an 8x8 bit matrix, GF2P8AFFINEQB's layout: byte 7 - i
                             * selects the bits of the input that add up to bit i */
};

/* Look a kernel up by name. FCAS_OK and *out, or one of the three FCAS_KERNEL_* reasons. */
fcas_status fcas_gf256_select(const char *name, const fcas_gf256_kernel **out);
/* The fastest kernel that this CPU supports (csrc/README.md has the measurements). Never fails. */
const fcas_gf256_kernel *fcas_gf256_default(void);
/* Kernel number i of all that were built, whether or not the CPU supports them; NULL past the end. */
const fcas_gf256_kernel *fcas_gf256_kernel_at(size_t i);

/* a * b, bit by bit: the definition. */
uint8_t fcas_gf256_mul(uint8_t a, uint8_t b);

/* Bind a matrix.
 *
 * kernel   NULL: the default one
 * matrix   uint8[n_out][n_in], row-major, copied into tables
 * n_out, n_in  1..255
 *
 * FCAS_OK and *out, FCAS_E_ARG, or FCAS_E_NOMEM. One allocation of about 40 * n_out * n_in bytes. */
fcas_status fcas_gf256_plan_new(fcas_gf256_plan **out, const fcas_gf256_kernel *kernel,
                                const uint8_t *matrix, size_t n_out, size_t n_in);
/* plan may be NULL. */
void fcas_gf256_plan_free(fcas_gf256_plan *plan);

/* out[r][i] = sum over c of matrix[r][c] * in[c][i], for i in [0, n): out is overwritten.
 *
 * in       n_in buffers of n bytes each, any alignment
 * out      n_out buffers of n bytes each, any alignment, overlapping neither each other nor any input
 * n        bytes, may be 0 (the pointers may then be NULL); tails are handled here
 *
 * Never allocates, never fails. */
void fcas_gf256_plan_apply(const fcas_gf256_plan *plan, const uint8_t *const *in, uint8_t *const *out,
                           size_t n);

/* FCAS_OK if the kernel agrees with fcas_gf256_mul() on all 65,536 products and on every length up to
 * 300 bytes, and gives the known parity of fixed shards for every code with k + m < 16; else FCAS_E_CORRUPT
 * (or FCAS_E_NOMEM). A few milliseconds. */
fcas_status fcas_gf256_self_test(const fcas_gf256_kernel *kernel);

#endif
