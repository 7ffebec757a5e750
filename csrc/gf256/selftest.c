/* The start-up check of a kernel: against the definition of the field, and against answers worked out
 * elsewhere. */
#include <string.h>

#include "gf256/kernels.h"

enum {
    TEST_COLUMNS = 3,
    TEST_ROWS = 9, /* more than any kernel's group */
    TEST_SIZE = 300,
    CODE_SHARDS = 15, /* codes up to this k + m are tried ... */
    CODE_SIZE = 150   /* ... with shards of so many bytes: whole vectors and a tail in every kernel */
};

static uint8_t test_byte(unsigned shard, unsigned i)
{
    return (uint8_t)(41 * i + 97 * shard + (i >> 3));
}

/* Every product: out[i] = c * i, for each c. */
static int products_are_right(const fcas_gf256_kernel *kernel, fcas_status *status)
{
    uint8_t in[256], result[256];
    const uint8_t *ins[1] = {in};
    uint8_t *outs[1] = {result};

    for (unsigned i = 0; i < 256; i++)
        in[i] = (uint8_t)i;
    for (unsigned c = 0; c < 256; c++) {
        const uint8_t coefficient = (uint8_t)c;
        fcas_gf256_plan *plan;
        *status = fcas_gf256_plan_new(&plan, kernel, &coefficient, 1, 1);
        if (*status != FCAS_OK)
            return 0;
        fcas_gf256_plan_apply(plan, ins, outs, sizeof in);
        fcas_gf256_plan_free(plan);
        for (unsigned i = 0; i < 256; i++)
            if (result[i] != fcas_gf256_mul(coefficient, (uint8_t)i))
                return 0;
    }
    return 1;
}

/* Groups and tails: nine rows of three columns, every length, nothing written past the end. */
static int lengths_are_right(const fcas_gf256_plan *plan, const uint8_t *matrix)
{
    static const uint8_t untouched = 0x5a;
    uint8_t in[TEST_COLUMNS][TEST_SIZE], right[TEST_ROWS][TEST_SIZE], result[TEST_ROWS][TEST_SIZE + 1];
    const uint8_t *ins[TEST_COLUMNS];
    uint8_t *outs[TEST_ROWS];

    for (unsigned c = 0; c < TEST_COLUMNS; c++) {
        ins[c] = in[c];
        for (unsigned i = 0; i < TEST_SIZE; i++)
            in[c][i] = test_byte(c, i);
    }
    for (unsigned r = 0; r < TEST_ROWS; r++) {
        outs[r] = result[r];
        for (unsigned i = 0; i < TEST_SIZE; i++) {
            right[r][i] = 0;
            for (unsigned c = 0; c < TEST_COLUMNS; c++)
                right[r][i] ^= fcas_gf256_mul(matrix[TEST_COLUMNS * r + c], in[c][i]);
        }
    }
    for (size_t n = 0; n <= TEST_SIZE; n++) {
        memset(result, untouched, sizeof result);
        fcas_gf256_plan_apply(plan, ins, outs, n);
        for (unsigned r = 0; r < TEST_ROWS; r++)
            if (memcmp(result[r], right[r], n) != 0 || result[r][n] != untouched)
                return 0;
    }
    return 1;
}

/* FNV-1a (64 bits) of every parity byte of every code, k from 1, within k m from 1, then shard by shard: worked
 * out by the test's own arithmetic from the definition in fastcas/parity/matrix.py (tests/kernels/test_gf256.py). */
static const uint64_t known_answer = UINT64_C(0x899db2a6bf63fac5);

static uint8_t inverse_of(uint8_t a)
{
    uint8_t power = 1;

    for (unsigned i = 0; i < 254; i++) /* a^255 is 1 */
        power = fcas_gf256_mul(power, a);
    return power;
}

/* Parity of fixed shards for every code with k + m <= CODE_SHARDS. */
static int codes_are_right(const fcas_gf256_kernel *kernel, fcas_status *status)
{
    uint8_t in[CODE_SHARDS][CODE_SIZE], result[CODE_SHARDS][CODE_SIZE], inverses[16] = {0};
    const uint8_t *ins[CODE_SHARDS];
    uint8_t *outs[CODE_SHARDS];
    uint64_t hash = UINT64_C(0xcbf29ce484222325);

    for (unsigned a = 1; a < 16; a++)
        inverses[a] = inverse_of((uint8_t)a);
    for (unsigned s = 0; s < CODE_SHARDS; s++) {
        ins[s] = in[s];
        outs[s] = result[s];
        for (unsigned i = 0; i < CODE_SIZE; i++)
            in[s][i] = test_byte(s, i);
    }
    for (unsigned k = 1; k < CODE_SHARDS; k++) {
        for (unsigned m = 1; k + m <= CODE_SHARDS; m++) {
            uint8_t matrix[CODE_SHARDS * CODE_SHARDS];
            fcas_gf256_plan *plan;
            for (unsigned r = 0; r < m; r++)
                for (unsigned c = 0; c < k; c++)
                    matrix[k * r + c] = inverses[(k + r) ^ c];
            *status = fcas_gf256_plan_new(&plan, kernel, matrix, m, k);
            if (*status != FCAS_OK)
                return 0;
            fcas_gf256_plan_apply(plan, ins, outs, CODE_SIZE);
            fcas_gf256_plan_free(plan);
            for (unsigned r = 0; r < m; r++)
                for (unsigned i = 0; i < CODE_SIZE; i++)
                    hash = (hash ^ result[r][i]) * UINT64_C(0x100000001b3);
        }
    }
    return hash == known_answer;
}

fcas_status fcas_gf256_self_test(const fcas_gf256_kernel *kernel)
{
    uint8_t matrix[TEST_ROWS * TEST_COLUMNS];
    fcas_gf256_plan *plan;
    fcas_status status;

    if (!products_are_right(kernel, &status) || !codes_are_right(kernel, &status))
        return status != FCAS_OK ? status : FCAS_E_CORRUPT;
    for (unsigned k = 0; k < sizeof matrix; k++)
        matrix[k] = (uint8_t)(89 * k + 1);
    status = fcas_gf256_plan_new(&plan, kernel, matrix, TEST_ROWS, TEST_COLUMNS);
    if (status != FCAS_OK)
        return status;
    int is_right = lengths_are_right(plan, matrix);
    fcas_gf256_plan_free(plan);
    return is_right ? FCAS_OK : FCAS_E_CORRUPT;
}
