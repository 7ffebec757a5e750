/* Our GF(2^8) kernels against ISA-L's ec_encode_data: same process, same buffers, same matrix.
 *
 *     isal_bench ROUNDS K M LOST SHARD_BYTES [K M LOST SHARD_BYTES ...]
 *
 * LOST = 0: m parity shards from k data shards; LOST > 0: the first LOST data shards from the next k. Tables and
 * inverses are made beforehand on both sides. Every contender runs once per round, in turn, repeated until a turn
 * lasts about TURN_NS; output buffers are shared and warm. Prints what ISA-L dispatched to, then one line
 * per contender: "K M LOST SHARD NAME MEDIAN_NS" (CPU time of one call). Exit 1 with a line on stderr when the
 * two sides' bytes differ. Needs AVX2. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <isa-l/erasure_code.h>

#include "common/cpu.h"
#include "gf256/gf256.h"

typedef void isal_encode(int len, int k, int rows, unsigned char *tables, unsigned char **in,
                         unsigned char **out);
extern isal_encode ec_encode_data_avx512; /* exported by libisal.so.2, but not declared */

#define TURN_NS 400000.0

enum { SIDE_MAX = 255, N_OURS_MAX = 8, N_RUNS_MAX = N_OURS_MAX + 2, WARM_ROUNDS = 5 };

typedef struct {
    const char *name;
    isal_encode *isal;           /* or NULL: */
    const fcas_gf256_plan *plan;
    double *ns; /* of one call, per round */
    unsigned repeats;
} contender;

typedef struct {
    int k, n_out, size;
    uint8_t *matrix, *tables;
    uint8_t *in[SIDE_MAX], *out[SIDE_MAX];
} task;

static void fail(const char *what)
{
    fprintf(stderr, "isal_bench: %s\n", what);
    exit(1);
}

static void *get(size_t n)
{
    void *p = NULL;
    if (posix_memalign(&p, 64, n > 0 ? n : 1) != 0)
        fail("no memory");
    return p;
}

static double now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* What ec_encode_data jumps to once it has been called, through its own and the linker's stubs:
 * endbr64 (not in all), jmp *slot(%rip). */
static const char *dispatched(void)
{
    const uint8_t *code = (const uint8_t *)(uintptr_t)ec_encode_data;

    for (int hops = 0; hops < 4; hops++) {
        int32_t distance;
        uintptr_t at = (uintptr_t)code;
        if (at == (uintptr_t)ec_encode_data_avx512)
            return "avx512";
        if (at == (uintptr_t)ec_encode_data_avx2)
            return "avx2";
        if (at == (uintptr_t)ec_encode_data_avx)
            return "avx";
        if (at == (uintptr_t)ec_encode_data_sse)
            return "sse";
        if (memcmp(code, "\xf3\x0f\x1e\xfa", 4) == 0)
            code += 4;
        if (memcmp(code, "\xff\x25", 2) != 0)
            break;
        memcpy(&distance, code + 2, sizeof distance);
        memcpy(&code, code + 6 + distance, sizeof code);
    }
    return "unknown";
}

static double turn(const contender *c, const task *t)
{
    double start = now_ns();
    for (unsigned i = 0; i < c->repeats; i++) {
        if (c->isal != NULL)
            c->isal(t->size, t->k, t->n_out, t->tables, (unsigned char **)t->in, (unsigned char **)t->out);
        else
            fcas_gf256_plan_apply(c->plan, (const uint8_t *const *)t->in, t->out, (size_t)t->size);
    }
    return (now_ns() - start) / c->repeats;
}

/* The rows that are computed, and (for a decode) shards in which the first `lost` are to be found again. */
static void prepare(task *t, int k, int m, int lost, int size)
{
    int total = k + m;
    uint8_t *generator = get((size_t)(total * k)), *square = get((size_t)(k * k)), *inverse = get((size_t)(k * k));

    t->k = k;
    t->n_out = lost > 0 ? lost : m;
    t->size = size;
    t->matrix = get((size_t)(t->n_out * k));
    t->tables = get(32u * (size_t)(t->n_out * k));
    gf_gen_cauchy1_matrix(generator, total, k);
    if (lost > 0) {
        memcpy(square, generator + lost * k, (size_t)(k * k));
        if (gf_invert_matrix(square, inverse, k) != 0)
            fail("singular");
        memcpy(t->matrix, inverse, (size_t)(lost * k));
    } else {
        memcpy(t->matrix, generator + k * k, (size_t)(m * k));
    }
    ec_init_tables(k, t->n_out, t->matrix, t->tables);
    for (int i = 0; i < k; i++) {
        t->in[i] = get((size_t)size);
        for (int j = 0; j < size; j++)
            t->in[i][j] = (uint8_t)(rand() >> 7);
    }
    for (int i = 0; i < t->n_out; i++) {
        t->out[i] = get((size_t)size);
        memset(t->out[i], 0, (size_t)size);
    }
    free(generator);
    free(square);
    free(inverse);
}

static void release(task *t)
{
    for (int i = 0; i < t->k; i++)
        free(t->in[i]);
    for (int i = 0; i < t->n_out; i++)
        free(t->out[i]);
    free(t->matrix);
    free(t->tables);
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void bench(int rounds, int k, int m, int lost, int size)
{
    static task t;
    contender runs[N_RUNS_MAX];
    fcas_gf256_plan *plans[N_OURS_MAX];
    int n_runs = 0, n_plans = 0;

    prepare(&t, k, m, lost, size);
    runs[n_runs++] = (contender){.name = "isal", .isal = ec_encode_data};
    runs[n_runs++] = (contender){.name = "isal_avx2", .isal = ec_encode_data_avx2};
    for (size_t i = 1; fcas_gf256_kernel_at(i) != NULL && n_plans < N_OURS_MAX; i++) {
        const fcas_gf256_kernel *kernel = fcas_gf256_kernel_at(i);
        if ((fcas_cpu_features() & kernel->cpu_needs) != kernel->cpu_needs)
            continue;
        if (fcas_gf256_plan_new(&plans[n_plans], kernel, t.matrix, (size_t)t.n_out, (size_t)k) != FCAS_OK)
            fail("no plan");
        runs[n_runs++] = (contender){.name = kernel->name, .plan = plans[n_plans++]};
    }
    uint8_t *first = get((size_t)size * (size_t)t.n_out);
    for (int c = 0; c < n_runs; c++) {
        runs[c].ns = get((size_t)rounds * sizeof(double));
        runs[c].repeats = 1;
        for (int i = 0; i < t.n_out; i++)
            memset(t.out[i], 0x5a, (size_t)size);
        turn(&runs[c], &t);
        for (int i = 0; i < t.n_out; i++) {
            if (c == 0)
                memcpy(first + (size_t)i * (size_t)size, t.out[i], (size_t)size);
            else if (memcmp(first + (size_t)i * (size_t)size, t.out[i], (size_t)size) != 0)
                fail("the outputs differ from ISA-L's");
        }
        double ns = turn(&runs[c], &t);
        runs[c].repeats = ns < TURN_NS ? (unsigned)(TURN_NS / (ns + 1)) + 1 : 1;
        turn(&runs[c], &t);
    }
    for (int round = -WARM_ROUNDS; round < rounds; round++) {
        for (int c = 0; c < n_runs; c++) {
            double ns = turn(&runs[c], &t);
            if (round >= 0)
                runs[c].ns[round] = ns;
        }
    }
    for (int c = 0; c < n_runs; c++) {
        qsort(runs[c].ns, (size_t)rounds, sizeof(double), ascending);
        printf("%d %d %d %d %s %.0f\n", k, m, lost, size, runs[c].name, runs[c].ns[rounds / 2]);
        free(runs[c].ns);
    }
    for (int i = 0; i < n_plans; i++)
        fcas_gf256_plan_free(plans[i]);
    free(first);
    release(&t);
}

int main(int argc, char **argv)
{
    int rounds = argc > 1 ? atoi(argv[1]) : 0;

    if (rounds < 1 || argc < 6 || (argc - 2) % 4 != 0) {
        fprintf(stderr, "usage: isal_bench ROUNDS K M LOST SHARD_BYTES [K M LOST SHARD_BYTES ...]\n");
        return 2;
    }
    for (int i = 2; i < argc; i += 4) {
        int k = atoi(argv[i]), m = atoi(argv[i + 1]), lost = atoi(argv[i + 2]), size = atoi(argv[i + 3]);
        if (k < 1 || m < 1 || k + m > SIDE_MAX || lost < 0 || lost > m || lost > k || size < 64)
            fail("a code or a shard is out of range");
        bench(rounds, k, m, lost, size);
        if (i == 2)
            printf("isal %s\n", dispatched());
    }
    return 0;
}
