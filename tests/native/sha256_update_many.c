/* fcas_sha256_update_many against single updates: every kernel, random numbers of states, lengths (many of them equal, as
 * chunks are, and none at all among them), begun anew or from a midstate, over bytes of their own or shared.
 *
 * Prints "ok" and a line "KERNEL CASES" for each that this CPU has. Exit 1 on the first difference, which is named.
 * Usage: sha256_update_many SEED */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/cpu.h"
#include "sha256/sha256.h"

enum { N_MAX = 40, BYTES = 1 << 17, CASES = 400 };

static uint8_t bytes[BYTES];
static unsigned seed;

static size_t below(size_t n)
{
    return (size_t)rand_r(&seed) % n;
}

static size_t some_length(size_t usual)
{
    switch (below(6)) {
    case 0:
        return below(200);
    case 1:
        return 64 * below(40);
    case 2:
        return below(20000);
    default:
        return usual;
    }
}

static void begin(fcas_sha256 *s, const fcas_sha256_kernel *kernel)
{
    fcas_sha256_init(s, kernel);
    if (below(2)) { /* as a chunk within its file */
        uint8_t midstate[32];
        memcpy(midstate, bytes + below(BYTES - 32), sizeof midstate);
        if (fcas_sha256_resume(s, kernel, midstate, 64 * (uint64_t)below(1u << 30)) != FCAS_OK) {
            exit(2);
        }
    } else if (below(2)) {
        fcas_sha256_update(s, bytes, 64 * below(20));
    }
}

static int run(const fcas_sha256_kernel *kernel)
{
    static fcas_sha256 many[N_MAX], single[N_MAX];
    fcas_sha256 *states[N_MAX];
    const uint8_t *data[N_MAX];
    size_t lengths[N_MAX];

    for (int number = 0; number < CASES; number++) {
        const size_t n = below(N_MAX + 1), usual = 64 * (1 + below(300));
        for (size_t i = 0; i < n; i++) {
            begin(&many[i], kernel);
            single[i] = many[i];
            states[i] = &many[i];
            lengths[i] = some_length(usual);
            data[i] = i > 0 && below(3) == 0 ? data[i - 1] : bytes + below(BYTES - 20000);
        }
        fcas_sha256_update_many(states, data, lengths, n);
        for (size_t i = 0; i < n; i++) {
            uint8_t got[32], want[32], after_got[32], after_want[32];
            fcas_sha256_update(&single[i], data[i], lengths[i]);
            const fcas_status a = fcas_sha256_midstate(&many[i], got), b = fcas_sha256_midstate(&single[i], want);
            const int differs = a != b || (a == FCAS_OK && memcmp(got, want, 32) != 0);
            fcas_sha256_final(&many[i], after_got);
            fcas_sha256_final(&single[i], after_want);
            if (differs || memcmp(after_got, after_want, 32) != 0) {
                fprintf(stderr, "%s: case %d: state %zu of %zu, %zu B\n", kernel->name, number, i, n, lengths[i]);
                return 1;
            }
        }
    }
    printf("%s %d\n", kernel->name, CASES);
    return 0;
}

int main(int argc, char **argv)
{
    const uint32_t cpu = fcas_cpu_features();
    seed = argc > 1 ? (unsigned)atoi(argv[1]) : 1;
    for (size_t i = 0; i < BYTES; i++) {
        bytes[i] = (uint8_t)rand_r(&seed);
    }
    for (size_t i = 0; fcas_sha256_kernel_at(i) != NULL; i++) {
        const fcas_sha256_kernel *kernel = fcas_sha256_kernel_at(i);
        if ((cpu & kernel->cpu_needs) == kernel->cpu_needs && run(kernel) != 0) {
            return 1;
        }
    }
    puts("ok");
    return 0;
}
