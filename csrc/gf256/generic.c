/* The truth: one output and one byte at a time, in portable C. */
#include "gf256/kernels.h"

uint8_t fcas_gf256_mul(uint8_t a, uint8_t b)
{
    unsigned product = 0, shifted = a;

    for (unsigned bit = 0; bit < 8; bit++) {
        if (b >> bit & 1)
            product ^= shifted;
        shifted <<= 1;
        if (shifted & 0x100)
            shifted ^= 0x11d;
    }
    return (uint8_t)product;
}

static void rows(const fcas_gf256_plan *plan, size_t first, size_t n_rows, const uint8_t *const *in,
                 uint8_t *const *out, size_t begin, size_t end)
{
    for (size_t r = first; r < first + n_rows; r++) {
        for (size_t i = begin; i < end; i++) {
            unsigned sum = 0;
            for (size_t c = 0; c < plan->n_in; c++) {
                const uint8_t *table = fcas_gf256_nibbles_at(plan, r, c);
                sum ^= (unsigned)table[in[c][i] & 15] ^ table[16 + (in[c][i] >> 4)];
            }
            out[r][i] = (uint8_t)sum;
        }
    }
}

const fcas_gf256_kernel fcas_gf256_generic = {"generic", 0, 1, rows};
