/* One writer and eight readers on one chunk table, for a thread sanitizer: lookups, replacements, removals, blobs,
 * and moves to new tables, all at once; beside it one ring, one have log, one given board and counter slots: each
 * reader counts in its own and all sum over them.
 *
 * All threads work through the same mappings: a sanitizer knows memory by its address, and would not see that two
 * mappings of one memfd are the same bytes. What is private to a process (cursors, bits) is private to a thread.
 *
 * usage: table_stress MILLISECONDS. Exit 0, or 1 with a line that says what was wrong. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "table/counters.h"
#include "table/given.h"
#include "table/havelog.h"
#include "table/ring.h"
#include "table/table.h"

enum { N_KEYS = 2000, N_READERS = 8, N_TABLES = 512, N_GIVEN = 5000, N_HAVE = 200000 };

#define DIE(...)                                                                                                       \
    do {                                                                                                               \
        fprintf(stderr, __VA_ARGS__);                                                                                  \
        fputc('\n', stderr);                                                                                           \
        exit(1);                                                                                                       \
    } while (0)

static uint8_t keys[N_KEYS][32];
static _Atomic int stop;
/* Tables in the order in which they were made; `current` of them are complete. None is unmapped before the end. */
static fcas_table tables[N_TABLES];
static _Atomic int current;
static fcas_ring ring_view;
static fcas_havelog have_view;
static fcas_given given;
static fcas_counter_slot *slots; /* one per reader */
static _Atomic uint32_t latest_blob; /* relaxed: it must not order what the table has to order by itself */
static _Atomic uint64_t n_pushed, n_popped, n_claimed, n_lookups;

static uint64_t now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000 + (uint64_t)ts.tv_nsec / 1000000;
}

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static int new_memfd(const char *name)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        DIE("memfd_create failed");
    return fd;
}

/* Every place that is ever put for key k satisfies this, so that a reader can tell a torn one. */
static fcas_place place_for(uint32_t k, uint32_t version)
{
    return (fcas_place){.offset = (uint64_t)k << 32 | version, .length = version & 0xffff, .blob = k ^ version};
}

static fcas_table *make_table(int number)
{
    uint8_t secret[16] = {(uint8_t)number};
    int fd = new_memfd("stress-table");
    if (fcas_table_create(&tables[number], fd, 4096, 1024, 65536, secret) != FCAS_OK)
        DIE("cannot create table %d", number);
    close(fd);
    return &tables[number];
}

static void *write_table(void *unused)
{
    (void)unused;
    uint64_t rng = 88172645463325252ull;
    int number = 0;
    fcas_table *table = make_table(0);
    /* Key 0 is there from the first table on and only ever replaced: readers must always find it. */
    if (fcas_table_put(table, FCAS_ENTRY_CHUNK, keys[0], place_for(0, 1)) != FCAS_OK)
        DIE("first put failed");
    atomic_store(&current, 1);
    for (uint32_t version = 2; !atomic_load(&stop); version++) {
        uint32_t k = version % 8 == 0 ? 0 : (uint32_t)(next_random(&rng) % N_KEYS);
        fcas_status st;
        if (k != 0 && version % 3 == 0) {
            st = fcas_table_remove(table, FCAS_ENTRY_CHUNK, keys[k]);
            if (st == FCAS_E_NOTFOUND)
                st = FCAS_OK;
        } else {
            st = fcas_table_put(table, FCAS_ENTRY_CHUNK, keys[k], place_for(k, version));
        }
        if (st == FCAS_OK && version % 16 == 0) {
            uint32_t number_of_blob = version / 16 % 1024;
            char path[32];
            int n = snprintf(path, sizeof(path), "blob/%u", version);
            fcas_blob blob = {.device = version, .inode = version, .size = version};
            atomic_store_explicit(&latest_blob, number_of_blob, memory_order_relaxed);
            st = fcas_table_put_blob(table, number_of_blob, &blob, path, (size_t)n);
            if (st == FCAS_E_ARG) { /* used before in this table */
                fcas_table_remove_blob(table, number_of_blob);
                st = FCAS_OK;
            }
        }
        if (version % 100 == 0)
            fcas_table_advance(table);
        if (st == FCAS_E_FULL && number + 1 < N_TABLES) {
            fcas_table *next = make_table(++number);
            if (fcas_table_copy(next, table) != FCAS_OK)
                DIE("copy to table %d failed", number);
            table = next;
            atomic_store(&current, number + 1);
        } else if (st != FCAS_OK && st != FCAS_E_FULL) {
            DIE("write failed: %d", st);
        }
    }
    return NULL;
}

static void check_place(uint32_t k, const fcas_place *p)
{
    uint32_t version = (uint32_t)p->offset;
    fcas_place want = place_for(k, version);
    if (p->offset != want.offset || p->length != want.length || p->blob != want.blob)
        DIE("key %u: torn place %llu %u %u", k, (unsigned long long)p->offset, p->length, p->blob);
}

/* Count one round in our slot, and check that no slot goes back and that what is announced last is counted. */
static void count_round(uint32_t own, uint64_t round, uint64_t seen[N_READERS])
{
    fcas_count(&slots[own], FCAS_CTR_REQUESTS, 1);
    fcas_count(&slots[own], FCAS_CTR_BYTES_SENT, 65);
    fcas_gauge(&slots[own], FCAS_CTR_EPOCH_SAFE, round);
    for (uint32_t i = 0; i < N_READERS; i++) {
        uint64_t announced = atomic_load_explicit(&slots[i].v[FCAS_CTR_EPOCH_SAFE], memory_order_acquire);
        uint64_t requests = atomic_load_explicit(&slots[i].v[FCAS_CTR_REQUESTS], memory_order_relaxed);
        if (requests < announced || requests < seen[i])
            DIE("slot %u: %llu requests after %llu", i, (unsigned long long)requests, (unsigned long long)announced);
        seen[i] = requests;
    }
}

static void *read_table(void *seed)
{
    uint64_t round = 0, requests_seen[N_READERS] = {0};
    uint64_t rng = 1 + (uint64_t)(uintptr_t)seed * 2654435761u;
    fcas_havelog have = have_view;
    uint8_t bits[(N_HAVE + 7) / 8] = {0};
    have.bits = bits;
    have.applied = 0;
    have.writable = 0;
    uint32_t seen = 0;
    while (!atomic_load(&stop)) {
        int newest = atomic_load(&current);
        if (newest == 0)
            continue;
        const fcas_table *table = &tables[newest - 1];
        fcas_place place;
        if (fcas_table_lookup(table, FCAS_ENTRY_CHUNK, keys[0], &place) != FCAS_OK)
            DIE("key 0 missed in table %d", newest);
        check_place(0, &place);
        uint32_t first = (uint32_t)(next_random(&rng) % (N_KEYS - 64));
        fcas_place places[64];
        uint8_t found[64];
        fcas_table_lookup_many(table, FCAS_ENTRY_CHUNK, keys[first], 64, places, found);
        for (uint32_t i = 0; i < 64; i++)
            if (found[i])
                check_place(first + i, &places[i]);
        fcas_blob blob;
        char path[FCAS_PATH_MAX_BYTES + 1];
        if (fcas_table_blob(table, atomic_load_explicit(&latest_blob, memory_order_relaxed), &blob, path) == FCAS_OK &&
            (strtoull(path + 5, NULL, 10) != blob.inode || blob.device != blob.inode))
            DIE("torn blob %s", path);
        uint32_t chunk;
        if (fcas_given_claim_from(&given, keys[1], N_GIVEN, 0, next_random(&rng), &chunk) == FCAS_OK)
            atomic_fetch_add(&n_claimed, 1);
        uint32_t generation = fcas_havelog_generation(&have);
        if (generation < seen)
            DIE("have log went back from %u to %u", seen, generation);
        if (generation > seen) {
            uint32_t last;
            if (fcas_havelog_since(&have, generation - 1, &last, 1) != 1 || last != generation - 1)
                DIE("have log entry %u is wrong", generation - 1);
            if (fcas_havelog_refresh(&have) < generation)
                DIE("have log bits are behind");
        }
        seen = generation;
        atomic_fetch_add(&n_lookups, 65);
        count_round((uint32_t)(uintptr_t)seed - 1, ++round, requests_seen);
    }
    return NULL;
}

static void *produce(void *unused)
{
    (void)unused;
    fcas_ring ring = ring_view;
    fcas_havelog have = have_view; /* the only view that appends; have_view itself stays as it is */
    uint8_t message[1000];
    uint64_t pushed = 0;
    while (!atomic_load(&stop)) {
        size_t n = (size_t)(pushed * 7 % sizeof(message));
        memset(message, (int)(pushed & 0xff), n);
        fcas_status st = fcas_ring_push(&ring, message, n);
        if (st == FCAS_OK)
            pushed++;
        else if (st != FCAS_E_FULL)
            DIE("push failed: %d", st);
        if (pushed < N_HAVE)
            fcas_havelog_append(&have, (uint32_t)pushed);
    }
    atomic_store(&n_pushed, pushed);
    return NULL;
}

static void *consume(void *unused)
{
    (void)unused;
    fcas_ring ring = ring_view;
    uint8_t message[1000];
    uint64_t popped = 0;
    while (!atomic_load(&stop)) {
        size_t n;
        fcas_ring_clear_event(&ring);
        fcas_status st = fcas_ring_pop(&ring, message, sizeof(message), &n);
        if (st == FCAS_E_NOTFOUND)
            continue;
        if (st != FCAS_OK)
            DIE("pop failed: %d", st);
        if (n != popped * 7 % sizeof(message))
            DIE("message %llu has %zu B", (unsigned long long)popped, n);
        for (size_t i = 0; i < n; i++)
            if (message[i] != (uint8_t)popped)
                DIE("message %llu is torn", (unsigned long long)popped);
        popped++;
    }
    atomic_store(&n_popped, popped);
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc != 2)
        DIE("usage: table_stress MILLISECONDS");
    uint64_t end = now_ms() + strtoull(argv[1], NULL, 10);
    uint64_t rng = 42;
    for (uint32_t k = 0; k < N_KEYS; k++)
        for (int i = 0; i < 32; i++)
            keys[k][i] = (uint8_t)next_random(&rng);
    uint8_t secret[16] = {1};
    int ring_fd = new_memfd("stress-ring");
    int given_fd = new_memfd("stress-given");
    int have_fd = new_memfd("stress-have");
    int counters_fd = new_memfd("stress-counters");
    uint32_t n_slots = 0;
    int ring_event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (ring_event < 0 || fcas_ring_create(ring_fd, 65536) != FCAS_OK ||
        fcas_ring_map(&ring_view, ring_fd, ring_event) != FCAS_OK ||
        fcas_given_create(given_fd, 16, 4096, secret) != FCAS_OK || fcas_given_map(&given, given_fd) != FCAS_OK ||
        fcas_havelog_create(&have_view, have_fd, keys[0], keys[1], N_HAVE) != FCAS_OK ||
        fcas_counters_create(counters_fd, N_READERS) != FCAS_OK ||
        fcas_counters_map(counters_fd, &slots, &n_slots) != FCAS_OK || n_slots != N_READERS)
        DIE("set-up failed");
    fcas_havelog_append(&have_view, 0);
    pthread_t threads[N_READERS + 3];
    int n = 0;
    pthread_create(&threads[n++], NULL, write_table, NULL);
    pthread_create(&threads[n++], NULL, produce, NULL);
    pthread_create(&threads[n++], NULL, consume, NULL);
    for (uintptr_t i = 0; i < N_READERS; i++)
        pthread_create(&threads[n++], NULL, read_table, (void *)(i + 1));
    while (now_ms() < end)
        usleep(10000);
    atomic_store(&stop, 1);
    while (n > 0)
        pthread_join(threads[--n], NULL);
    uint64_t claimed = atomic_load(&n_claimed);
    if (claimed > N_GIVEN || atomic_load(&n_popped) > atomic_load(&n_pushed))
        DIE("claimed %llu of %d", (unsigned long long)claimed, N_GIVEN);
    uint64_t counted = 0;
    for (uint32_t i = 0; i < N_READERS; i++)
        counted += atomic_load(&slots[i].v[FCAS_CTR_BYTES_SENT]);
    if (counted != atomic_load(&n_lookups))
        DIE("counted %llu of %llu", (unsigned long long)counted, (unsigned long long)atomic_load(&n_lookups));
    fcas_counters_unmap(slots, n_slots);
    for (int i = 0; i < N_TABLES; i++)
        fcas_table_unmap(&tables[i]);
    fcas_ring_unmap(&ring_view);
    fcas_given_unmap(&given);
    fcas_havelog_unmap(&have_view);
    printf("tables %d lookups %llu messages %llu claimed %llu\n", atomic_load(&current),
           (unsigned long long)atomic_load(&n_lookups), (unsigned long long)atomic_load(&n_popped),
           (unsigned long long)claimed);
    return 0;
}
