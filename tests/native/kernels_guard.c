/* Every kernel with its buffers against unreadable pages: a byte read or written outside ends the process.
 * Prints "ok" and the kernels tried. Exit 1 with a line on the first wrong result. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cdc/cdc.h"
#include "common/cpu.h"
#include "gf256/gf256.h"
#include "sha256/chunks.h"
#include "sha256/sha256.h"

#define CHECK(what)                                                          \
    do {                                                                     \
        if (!(what)) {                                                       \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what);       \
            exit(1);                                                         \
        }                                                                    \
    } while (0)

enum { ROOM = 4096, N_MESSAGES = 43, N_IN = 6, N_OUT = 9 };

/* ROOM usable bytes between two unreadable pages. */
static uint8_t *guarded(void)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    CHECK(page == ROOM);
    uint8_t *p = mmap(NULL, 3 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(p != MAP_FAILED);
    CHECK(mprotect(p + page, page, PROT_READ | PROT_WRITE) == 0);
    return p + page;
}

static void fill(uint8_t *p, size_t n, unsigned seed)
{
    for (size_t i = 0; i < n; i++)
        p[i] = (uint8_t)((seed = seed * 1103515245u + 12345u) >> 16);
}

static void digest(const fcas_sha256_kernel *k, const uint8_t *p, size_t n, uint8_t out[32])
{
    fcas_sha256 s;
    fcas_sha256_init(&s, k);
    fcas_sha256_update(&s, p, n);
    fcas_sha256_final(&s, out);
}

/* Each size once at the very end of the page and once at its very beginning. */
static void sha256_within_bounds(const fcas_sha256_kernel *k, const fcas_sha256_kernel *truth)
{
    uint8_t *a = guarded(), *b = guarded(), *result = guarded(), copy[ROOM];

    fill(copy, ROOM, 1);
    for (size_t n = 0; n <= 400; n++) {
        for (int at_end = 0; at_end < 2; at_end++) {
            uint8_t *pa = at_end ? a + ROOM - n : a, *pb = at_end ? b + ROOM - n : b;
            uint8_t *out = at_end ? result + ROOM - 32 * N_MESSAGES : result;
            uint8_t want_a[32], want_b[32];
            const uint8_t *messages[N_MESSAGES];
            size_t lengths[N_MESSAGES];
            fcas_sha256 s, t;

            memcpy(pa, copy, n);
            memcpy(pb, copy + 1, n);
            digest(truth, copy, n, want_a);
            digest(truth, copy + 1, n / 2, want_b);

            digest(k, pa, n, out);
            CHECK(memcmp(out, want_a, 32) == 0);
            /* Each count up to more than any kernel has lanes, and many more. */
            for (size_t i = 0; i < N_MESSAGES; i++) {
                messages[i] = i % 3 == 1 ? pb : pa;
                lengths[i] = i % 3 == 1 ? n / 2 : n;
            }
            size_t count = n % 29 == 0 ? N_MESSAGES : n % 29;
            fcas_sha256_many(k, messages, lengths, count, out);
            for (size_t i = 0; i < count; i++)
                CHECK(memcmp(out + 32 * i, i % 3 == 1 ? want_b : want_a, 32) == 0);

            /* Two hashes in step, and two that are not: b has a byte more waiting. */
            fcas_sha256_init(&s, k);
            fcas_sha256_init(&t, k);
            fcas_sha256_update2(&s, &t, pa, n / 3);
            fcas_sha256_update2(&s, &t, pa + n / 3, n - n / 3);
            fcas_sha256_update(&t, pb, n > 0);
            fcas_sha256_update2(&t, &s, pa, n);
            fcas_sha256_final(&t, out + 32);
            fcas_sha256_final(&s, out);

            fcas_sha256_init(&s, truth);
            fcas_sha256_init(&t, truth);
            fcas_sha256_update(&s, pa, n);
            fcas_sha256_update(&s, pa, n);
            fcas_sha256_update(&t, pa, n);
            fcas_sha256_update(&t, pb, n > 0);
            fcas_sha256_update(&t, pa, n);
            fcas_sha256_final(&s, want_a);
            fcas_sha256_final(&t, want_b);
            CHECK(memcmp(out, want_a, 32) == 0 && memcmp(out + 32, want_b, 32) == 0);
        }
    }
}

/* Content cut whole and in pieces, each at the very end of its page and at its beginning: the same cuts. */
static void cuts_within_bounds(void)
{
    enum { SIZE = 40 * ROOM };
    static uint8_t content[SIZE];
    static size_t whole[SIZE / 64], pieces[SIZE / 64];
    uint8_t *page = guarded();
    fcas_cdc c;
    bool is_cut;

    fill(content, SIZE, 3);
    CHECK(fcas_cdc_init(&c, 1024) == FCAS_OK);
    size_t n_whole = 0, at = 0;
    while (at < SIZE) {
        at += fcas_cdc_next(&c, content + at, SIZE - at, &is_cut);
        if (is_cut)
            whole[n_whole++] = at;
    }
    CHECK(n_whole > SIZE / 4096);
    for (size_t step = 1; step <= ROOM; step = step * 3 / 2 + 1) {
        CHECK(fcas_cdc_init(&c, 1024) == FCAS_OK);
        size_t n_pieces = 0;
        for (at = 0; at < SIZE;) {
            size_t n = SIZE - at < step ? SIZE - at : step;
            uint8_t *p = at / step % 2 ? page : page + ROOM - n;
            memcpy(p, content + at, n);
            for (size_t done = 0; done < n;) {
                done += fcas_cdc_next(&c, p + done, n - done, &is_cut);
                if (is_cut)
                    pieces[n_pieces++] = at + done;
            }
            at += n;
        }
        CHECK(n_pieces == n_whole && memcmp(pieces, whole, n_whole * sizeof *whole) == 0);
    }
}

/* Lanes and the streams beside them read up to the very end of what they were given, and from its beginning. */
static void beside_within_bounds(const fcas_sha256_kernel *k, const fcas_sha256_kernel *truth)
{
    enum { LANES = 2 * FCAS_SHA256_PACE, N_DATA = LANES + 2 };
    uint8_t *data[N_DATA];
    uint32_t got[N_DATA][8], want[N_DATA][8], (*states[LANES])[8];
    const uint8_t *blocks[LANES];

    CHECK(k->n_lanes == LANES);
    for (unsigned i = 0; i < N_DATA; i++) {
        data[i] = guarded();
        fill(data[i], ROOM, 20 + i);
    }
    for (size_t n = 0; n <= ROOM / 64 / LANES; n++) {
        for (unsigned way = 0; way < 4; way++) {
            const int is_alone = way & 1, at_end = way & 2;
            const size_t n_fast = is_alone ? LANES * n : FCAS_SHA256_PACE * n;
            const uint8_t *fast[2];
            for (unsigned i = 0; i < N_DATA; i++) {
                const size_t size = 64 * (i < LANES ? n : n_fast);
                const uint8_t *p = at_end ? data[i] + ROOM - size : data[i];
                for (unsigned j = 0; j < 8; j++)
                    got[i][j] = want[i][j] = 0x9e3779b9u * (8 * i + j + 1);
                if (i < LANES) {
                    blocks[i] = p;
                    states[i] = &got[i];
                } else {
                    fast[i - LANES] = p;
                }
                if (i < N_DATA - 1 || !is_alone)
                    truth->compress(want[i], p, size / 64);
            }
            k->compress_beside(states, blocks, n, got[LANES], fast[0], is_alone ? NULL : got[LANES + 1],
                               is_alone ? NULL : fast[1]);
            CHECK(memcmp(got, want, sizeof got) == 0);
        }
    }
}

/* Hashes and midstates end exactly where the next page begins. */
static void chunks_within_bounds(const fcas_sha256_kernel *k, size_t size, size_t n_max)
{
    uint8_t *data = guarded(), *hashes = guarded(), *midstates = guarded(), last[32], whole[32], want[32];

    fill(data, ROOM, 2);
    for (size_t n = n_max % 13; n <= n_max; n += 13) {
        for (size_t step = 1; step <= n_max + 1; step += n_max / 8) {
            fcas_chunks c;
            size_t n_done = 0, n_full = n / size;
            uint8_t *h = hashes + ROOM - 32 * n_full, *m = midstates + ROOM - 32 * n_full;
            const uint8_t *p = data + ROOM - n;

            CHECK(fcas_chunks_init(&c, k, size) == FCAS_OK);
            for (size_t at = 0; at < n; at += step) {
                size_t take = n - at < step ? n - at : step;
                size_t expected = fcas_chunks_completed_by(&c, take);
                CHECK(fcas_chunks_update(&c, p + at, take, h + 32 * n_done, m + 32 * n_done) == expected);
                n_done += expected;
            }
            CHECK(n_done == n_full);
            CHECK(fcas_chunks_finish(&c, last, whole) == (n % size != 0));
            digest(k, p, n, want);
            CHECK(memcmp(whole, want, 32) == 0);
            for (size_t i = 0; i < n_full; i++) {
                digest(k, p + size * i, size, want);
                CHECK(memcmp(h + 32 * i, want, 32) == 0);
            }
            if (n_full > 0) { /* the midstate before what is left leads to the same end */
                CHECK(fcas_chunks_resume(&c, k, size, m + 32 * (n_full - 1), size * n_full) == FCAS_OK);
                CHECK(fcas_chunks_update(&c, p + size * n_full, n % size, NULL, NULL) == 0);
                (void)fcas_chunks_finish(&c, last, want);
                CHECK(memcmp(want, whole, 32) == 0);
            }
        }
    }
}

/* The same of two files: every number of chunks, the second file's behind the first's. */
static void two_files_within_bounds(const fcas_sha256_kernel *k, size_t size, size_t n_max)
{
    uint8_t *data = guarded(), *hashes = guarded(), *midstates = guarded(), last[32], whole[32], want[32];

    fill(data, ROOM, 3);
    for (size_t n = 0; n <= n_max; n++) {
        fcas_chunks a, b;
        fcas_chunks *const both[2] = {&a, &b};
        const uint8_t *const p[2] = {data + ROOM - 2 * n * size, data + ROOM - n * size};
        uint8_t *const h[2] = {hashes + ROOM - 64 * n, hashes + ROOM - 32 * n};
        uint8_t *const m[2] = {midstates + ROOM - 64 * n, midstates + ROOM - 32 * n};

        CHECK(fcas_chunks_init(&a, k, size) == FCAS_OK && fcas_chunks_init(&b, k, size) == FCAS_OK);
        fcas_chunks_update_two(both, p, n, h, m);
        for (size_t j = 0; j < 2; j++) {
            fcas_sha256 content;
            fcas_sha256_init(&content, k);
            for (size_t i = 0; i < n; i++) {
                digest(k, p[j] + size * i, size, want);
                CHECK(memcmp(h[j] + 32 * i, want, 32) == 0);
                fcas_sha256_update(&content, p[j] + size * i, size);
                CHECK(fcas_sha256_midstate(&content, want) == FCAS_OK && memcmp(m[j] + 32 * i, want, 32) == 0);
            }
            CHECK(fcas_chunks_finish(both[j], last, whole) == 0);
            digest(k, p[j], size * n, want);
            CHECK(memcmp(whole, want, 32) == 0);
        }
    }
}

static void chunk_sizes_are_checked(void)
{
    fcas_chunks c;
    uint8_t midstate[32] = {0};

    CHECK(fcas_chunks_init(&c, NULL, 0) == FCAS_E_ARG && fcas_chunks_init(&c, NULL, 100) == FCAS_E_ARG);
    CHECK(fcas_chunks_resume(&c, NULL, 100, midstate, 0) == FCAS_E_ARG);
    CHECK(fcas_chunks_resume(&c, NULL, 128, midstate, 192) == FCAS_E_ARG);
    CHECK(fcas_chunks_init(&c, NULL, 64) == FCAS_OK);
    CHECK(fcas_chunks_completed_by(&c, SIZE_MAX) == SIZE_MAX / 64);
}

/* How many blocks went through each function of a kernel with four lanes that pay only when all are busy. */
static size_t n_alone, n_paired, n_wide, n_beside;

static void count_one(uint32_t state[8], const uint8_t *blocks, size_t nblocks)
{
    n_alone += nblocks;
    fcas_sha256_kernel_at(0)->compress(state, blocks, nblocks);
}

static void count_two(uint32_t state_a[8], const uint8_t *a, uint32_t state_b[8], const uint8_t *b, size_t nblocks)
{
    n_paired += 2 * nblocks;
    fcas_sha256_kernel_at(0)->compress2(state_a, a, state_b, b, nblocks);
}

static void count_four(uint32_t (*const states[])[8], const uint8_t *const blocks[], size_t nblocks)
{
    n_wide += 4 * nblocks;
    for (size_t i = 0; i < 4; i++)
        fcas_sha256_kernel_at(0)->compress(*states[i], blocks[i], nblocks);
}

/* The blocks of idle lanes count too: the slower ones are always eight. */
static void count_beside(uint32_t (*const states[])[8], const uint8_t *const blocks[], size_t nblocks,
                         uint32_t state_a[8], const uint8_t *a, uint32_t state_b[8], const uint8_t *b)
{
    n_wide += 2 * FCAS_SHA256_PACE * nblocks;
    n_beside += 2 * FCAS_SHA256_PACE * nblocks;
    for (size_t i = 0; i < 2 * FCAS_SHA256_PACE; i++)
        fcas_sha256_kernel_at(0)->compress(*states[i], blocks[i], nblocks);
    fcas_sha256_kernel_at(0)->compress2(state_a, a, state_b, b, FCAS_SHA256_PACE * nblocks);
}

/* n messages of which number i has (i * step) % 1000 blocks fewer than 2000; each ends in one block more. */
static size_t hash_counted(const fcas_sha256_kernel *kernel, size_t n, size_t step)
{
    static uint8_t data[2000 * 64], digests[64 * 32];
    const uint8_t *messages[64];
    size_t lengths[64], n_blocks = 0;

    for (size_t i = 0; i < n; i++) {
        messages[i] = data;
        lengths[i] = 64 * (2000 - i * step % 1000);
        n_blocks += lengths[i] / 64 + 1;
    }
    n_alone = n_paired = n_wide = n_beside = 0;
    fcas_sha256_many(kernel, messages, lengths, n, digests);
    return n_blocks;
}

static void lanes_are_kept_busy(void)
{
    static const fcas_sha256_kernel counting = {"counting", 0, count_one, count_two, 4, 4, count_four, NULL};
    size_t n_blocks = hash_counted(&counting, 64, 337);
    CHECK(n_wide > n_blocks * 9 / 10);
    CHECK(n_alone + n_paired + n_wide == n_blocks); /* no idle lane where all are needed to pay */
    CHECK(hash_counted(&counting, 4, 0) == n_wide);
    /* Three equal ones take turns in two streams: the last of them is not hashed alone from its start. */
    n_blocks = hash_counted(&counting, 3, 0);
    CHECK(n_alone + n_paired == n_blocks && n_wide == 0 && n_alone <= 65);
    (void)hash_counted(&counting, 1, 0);
    CHECK(n_alone == 2001);
}

static void streams_beside_lanes_are_kept_busy(void)
{
    static const fcas_sha256_kernel counting = {"counting", 0, count_one, count_two, 2 * FCAS_SHA256_PACE, 6, NULL,
                                                count_beside};
    /* Sixteen equal ones end together: eight in the lanes while two streams do four each. */
    size_t n_blocks = hash_counted(&counting, 16, 0);
    CHECK(n_wide + n_beside < n_blocks + 64 && n_alone + n_paired < 64);
    /* Ten take turns at the faster pace, so that no lane is idle until nearly all is done. */
    n_blocks = hash_counted(&counting, 10, 0);
    CHECK(n_wide + n_beside < n_blocks + n_blocks / 20 && n_alone + n_paired < n_blocks / 20);
    /* Of any lengths, most blocks go through lanes that are of use. */
    n_blocks = hash_counted(&counting, 64, 337);
    CHECK(n_wide + n_beside < n_blocks + n_blocks / 10 && n_alone + n_paired < n_blocks / 10);
    /* Too few for lanes. */
    n_blocks = hash_counted(&counting, 5, 0);
    CHECK(n_wide == 0 && n_alone + n_paired == n_blocks);
}

/* Each size at either end of the page, inputs and outputs apart; an even and an odd number of columns. */
static void gf256_within_bounds(const fcas_gf256_kernel *k)
{
    static uint8_t *in[N_IN], *out[N_OUT], products[N_OUT * N_IN][256];
    uint8_t matrix[N_OUT * N_IN];

    fill(matrix, sizeof matrix, 3);
    matrix[1] = 0;
    matrix[2] = 1;
    for (size_t i = 0; i < sizeof matrix; i++)
        for (unsigned x = 0; x < 256; x++)
            products[i][x] = fcas_gf256_mul(matrix[i], (uint8_t)x);
    for (unsigned c = 0; c < N_IN; c++) {
        in[c] = guarded();
        fill(in[c], ROOM, 10 + c);
    }
    for (unsigned r = 0; r < N_OUT; r++)
        out[r] = guarded();
    for (size_t shape = 2; shape < 2 * N_OUT + 2; shape++) {
        size_t n_out = shape / 2, n_in = N_IN - shape % 2;
        fcas_gf256_plan *plan;
        CHECK(fcas_gf256_plan_new(&plan, k, matrix, n_out, n_in) == FCAS_OK);
        for (size_t n = 0; n <= 400; n += n < 260 ? 1 : 7) {
            for (unsigned ends = 0; ends < 4; ends++) {
                const uint8_t *pin[N_IN];
                uint8_t *pout[N_OUT];
                for (size_t c = 0; c < n_in; c++)
                    pin[c] = ends & 1 ? in[c] + ROOM - n : in[c];
                for (size_t r = 0; r < n_out; r++)
                    pout[r] = ends & 2 ? out[r] + ROOM - n : out[r];
                fcas_gf256_plan_apply(plan, pin, pout, n);
                for (size_t r = 0; r < n_out; r++) {
                    for (size_t i = 0; i < n; i++) {
                        uint8_t want = 0;
                        for (size_t c = 0; c < n_in; c++)
                            want ^= products[n_in * r + c][pin[c][i]];
                        CHECK(pout[r][i] == want);
                    }
                }
            }
        }
        fcas_gf256_plan_free(plan);
    }
    fcas_gf256_plan_free(NULL);
}

static void selection_has_three_reasons(void)
{
    const fcas_sha256_kernel *sha = NULL;
    const fcas_gf256_kernel *gf = NULL;

    CHECK(fcas_sha256_select("sha1", &sha) == FCAS_KERNEL_UNKNOWN && sha == NULL);
    CHECK(fcas_gf256_select("", &gf) == FCAS_KERNEL_UNKNOWN && gf == NULL);
    fcas_cpu_mask(0);
    CHECK(fcas_cpu_features() == 0);
    fcas_status without = fcas_sha256_select("shani", &sha);
    CHECK(without == FCAS_KERNEL_NO_CPU || without == FCAS_KERNEL_NOT_BUILT);
    without = fcas_gf256_select("avx2", &gf);
    CHECK(without == FCAS_KERNEL_NO_CPU || without == FCAS_KERNEL_NOT_BUILT);
    CHECK(fcas_sha256_select("generic", &sha) == FCAS_OK && fcas_gf256_select("generic", &gf) == FCAS_OK);
    /* The first choice of this process, made under the mask: it needs nothing. */
    CHECK(fcas_sha256_default_for(0) == sha);
    CHECK(fcas_sha256_default()->cpu_needs == 0 && fcas_gf256_default()->cpu_needs == 0);
    fcas_cpu_mask(UINT32_MAX);
}

int main(void)
{
    const fcas_sha256_kernel *truth = fcas_sha256_kernel_at(0);
    fcas_gf256_plan *plan = NULL;
    uint8_t one = 1;

    selection_has_three_reasons();
    CHECK(fcas_gf256_plan_new(&plan, NULL, &one, 0, 1) == FCAS_E_ARG && plan == NULL);
    CHECK(fcas_gf256_plan_new(&plan, NULL, &one, 1, 256) == FCAS_E_ARG && plan == NULL);
    printf("ok");
    lanes_are_kept_busy();
    streams_beside_lanes_are_kept_busy();
    chunk_sizes_are_checked();
    cuts_within_bounds();
    for (size_t i = 0; fcas_sha256_kernel_at(i) != NULL; i++) {
        const fcas_sha256_kernel *k = fcas_sha256_kernel_at(i);
        const fcas_sha256_kernel *found;
        if (fcas_sha256_select(k->name, &found) != FCAS_OK)
            continue;
        CHECK(found == k && fcas_sha256_self_test(k) == FCAS_OK);
        sha256_within_bounds(k, truth);
        chunks_within_bounds(k, 128, 1000);
        chunks_within_bounds(k, 448, ROOM);
        chunks_within_bounds(k, 512, ROOM);
        two_files_within_bounds(k, 192, 6);
        two_files_within_bounds(k, 256, 8);
        if (k->compress_beside != NULL)
            beside_within_bounds(k, truth);
        printf(" %s", k->name);
    }
    for (size_t i = 0; fcas_gf256_kernel_at(i) != NULL; i++) {
        const fcas_gf256_kernel *k = fcas_gf256_kernel_at(i);
        const fcas_gf256_kernel *found;
        if (fcas_gf256_select(k->name, &found) != FCAS_OK)
            continue;
        CHECK(found == k && fcas_gf256_self_test(k) == FCAS_OK);
        gf256_within_bounds(k);
        printf(" %s", k->name);
    }
    printf("\n");
    return 0;
}
