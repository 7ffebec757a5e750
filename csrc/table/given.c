/* The board of chunks given through NEXT: see given.h. */
#include "table/given.h"

#include <assert.h>
#include <stdatomic.h>
#include <string.h>

#include "table/memfd.h"
#include "table/siphash.h"

static const char MAGIC[8] = {'F', 'C', 'A', 'S', 'G', 'I', 'V', '1'};
#define VERSION       1u
#define DIRECTORY_AT  4096u
#define SLOTS_MAX     65536u
#define BITS_SIZE_MAX (UINT64_C(1) << 30)
#define EMPTYING      (UINT64_C(1) << 63) /* of turn */

typedef struct {
    char     magic[8];
    uint32_t version;
    uint32_t n_slots;
    uint64_t bits_size;
    uint64_t total;
    uint64_t secret[2];
    uint64_t reserved[10];
    _Atomic uint64_t used[2];
    _Atomic uint64_t turn;
} board_header;

typedef struct {
    _Atomic uint64_t tag;
    _Atomic uint64_t region;
} board_entry;

_Static_assert(offsetof(board_header, secret) == 32, "secret");
_Static_assert(offsetof(board_header, used) == 128, "used");
_Static_assert(offsetof(board_header, turn) == 144, "turn");
_Static_assert(sizeof(board_entry) == 16, "entry");

/* A file's bits, checked against the arena. */
typedef struct {
    _Atomic uint64_t *words;
    uint32_t n;
} bit_set;

static board_header *header(const fcas_given *b)
{
    return (board_header *)(void *)b->base;
}

static board_entry *directory(const fcas_given *b, unsigned half)
{
    return (board_entry *)(void *)(b->base + DIRECTORY_AT) + (size_t)half * b->n_slots;
}

static _Atomic uint64_t *arena(const fcas_given *b, unsigned half)
{
    return (_Atomic uint64_t *)(void *)directory(b, 2) + half * b->n_words;
}

static uint64_t load_turn(const fcas_given *b)
{
    /* Acquire: pairs with the release store in change_halves(), so the new half is seen empty. */
    return atomic_load_explicit(&header(b)->turn, memory_order_acquire);
}

static unsigned half_in_use(uint64_t turn)
{
    return (unsigned)(turn & 1);
}

static uint64_t board_bytes(uint64_t n_slots, uint64_t bits_size)
{
    return DIRECTORY_AT + 2 * (n_slots * sizeof(board_entry) + bits_size);
}

static int shape_is_valid(uint32_t n_slots, uint64_t bits_size)
{
    return n_slots >= 1 && n_slots <= SLOTS_MAX && (n_slots & (n_slots - 1)) == 0 && bits_size >= 64 &&
           bits_size <= BITS_SIZE_MAX && bits_size % 8 == 0;
}

fcas_status fcas_given_create(int fd, uint32_t n_slots, uint64_t bits_size, const uint8_t secret[16])
{
    if (!shape_is_valid(n_slots, bits_size))
        return FCAS_E_ARG;
    fcas_status st = fcas_memfd_size(fd, board_bytes(n_slots, bits_size));
    if (st != FCAS_OK)
        return st;
    board_header *h = mmap(NULL, DIRECTORY_AT, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (h == MAP_FAILED)
        return FCAS_E_SYS;
    memcpy(h->magic, MAGIC, sizeof(MAGIC));
    h->version = VERSION;
    h->n_slots = n_slots;
    h->bits_size = bits_size;
    h->total = board_bytes(n_slots, bits_size);
    memcpy(h->secret, secret, 16);
    munmap(h, DIRECTORY_AT);
    return fcas_memfd_seal(fd, 0);
}

fcas_status fcas_given_map(fcas_given *b, int fd)
{
    memset(b, 0, sizeof(*b));
    uint8_t *base;
    size_t size;
    fcas_status st = fcas_memfd_map(fd, PROT_READ | PROT_WRITE, DIRECTORY_AT, &base, &size);
    if (st != FCAS_OK)
        return st;
    board_header h; /* a private copy: what is checked is what is used */
    memcpy(&h, base, sizeof(h));
    if (memcmp(h.magic, MAGIC, sizeof(MAGIC)) != 0)
        st = FCAS_E_CORRUPT;
    else if (h.version != VERSION)
        st = FCAS_E_VERSION;
    else if (!shape_is_valid(h.n_slots, h.bits_size) || h.total != board_bytes(h.n_slots, h.bits_size) ||
             h.total != size)
        st = FCAS_E_CORRUPT;
    if (st != FCAS_OK) {
        munmap(base, size);
        return st;
    }
    b->base = base;
    b->size = size;
    b->n_slots = h.n_slots;
    b->n_words = h.bits_size / 8;
    b->secret[0] = h.secret[0];
    b->secret[1] = h.secret[1];
    return FCAS_OK;
}

void fcas_given_unmap(fcas_given *b)
{
    if (b->base != NULL)
        munmap(b->base, b->size);
    memset(b, 0, sizeof(*b));
}

static uint64_t tag_of(const fcas_given *b, const uint8_t manifest_hash[32])
{
    uint64_t tag = fcas_siphash32(b->secret, manifest_hash);
    return tag != 0 ? tag : 1;
}

static fcas_status check_region(const fcas_given *b, unsigned half, uint64_t region, bit_set *out)
{
    uint32_t n = (uint32_t)region;
    uint64_t first = region >> 32;
    uint64_t words = ((uint64_t)n + 63) / 64;
    if (n < 1 || n > FCAS_GIVEN_CHUNKS_MAX || first > b->n_words || words > b->n_words - first)
        return FCAS_E_FULL; /* a damaged entry is as good as none */
    out->words = arena(b, half) + first;
    out->n = n;
    return FCAS_OK;
}

/* The set of a file that is on the board, or FCAS_E_NOTFOUND. */
static fcas_status find(const fcas_given *b, const uint8_t manifest_hash[32], bit_set *out)
{
    uint64_t tag = tag_of(b, manifest_hash);
    unsigned half = half_in_use(load_turn(b));
    for (uint32_t step = 0; step < b->n_slots; step++) {
        board_entry *entry = &directory(b, half)[(tag + step) & (b->n_slots - 1)];
        uint64_t there = atomic_load_explicit(&entry->tag, memory_order_acquire);
        if (there == 0)
            return FCAS_E_NOTFOUND;
        if (there == tag) {
            uint64_t region = atomic_load_explicit(&entry->region, memory_order_acquire);
            return region == 0 ? FCAS_E_NOTFOUND : check_region(b, half, region, out);
        }
    }
    return FCAS_E_NOTFOUND;
}

/* Cut words from the arena; UINT64_MAX when it is full. */
static uint64_t cut(fcas_given *b, unsigned half, uint64_t words)
{
    _Atomic uint64_t *used = &header(b)->used[half];
    uint64_t first = atomic_load_explicit(used, memory_order_relaxed);
    do {
        if (first > b->n_words || words > b->n_words - first)
            return UINT64_MAX;
    } while (!atomic_compare_exchange_weak_explicit(used, &first, first + words, memory_order_relaxed,
                                                    memory_order_relaxed));
    return first;
}

/* The set of a file in one half, made if there is none. FCAS_E_FULL when there is no room. */
static fcas_status find_or_make_in(fcas_given *b, unsigned half, uint64_t tag, uint32_t n, bit_set *out)
{
    for (uint32_t step = 0; step < b->n_slots; step++) {
        board_entry *entry = &directory(b, half)[(tag + step) & (b->n_slots - 1)];
        uint64_t there = atomic_load_explicit(&entry->tag, memory_order_acquire);
        /* On failure `there` is the tag that somebody else put there: ours or another file's. */
        if (there == 0 && atomic_compare_exchange_strong_explicit(&entry->tag, &there, tag, memory_order_acq_rel,
                                                                  memory_order_acquire))
            there = tag;
        if (there != tag)
            continue;
        uint64_t region = atomic_load_explicit(&entry->region, memory_order_acquire);
        if (region == 0) {
            uint64_t first = cut(b, half, ((uint64_t)n + 63) / 64);
            if (first == UINT64_MAX)
                return FCAS_E_FULL;
            uint64_t ours = first << 32 | n;
            if (atomic_compare_exchange_strong_explicit(&entry->region, &region, ours, memory_order_acq_rel,
                                                        memory_order_acquire))
                region = ours;
        }
        return check_region(b, half, region, out);
    }
    return FCAS_E_FULL;
}

/* The half that was in use in `turn` is full: empty the other one and use that. Whoever loses the race leaves it to
 * the winner. */
static void change_halves(fcas_given *b, uint64_t turn)
{
    if (turn & EMPTYING || !atomic_compare_exchange_strong_explicit(&header(b)->turn, &turn, turn | EMPTYING,
                                                                    memory_order_acq_rel, memory_order_relaxed))
        return;
    unsigned other = 1 - half_in_use(turn);
    for (uint32_t i = 0; i < b->n_slots; i++) {
        atomic_store_explicit(&directory(b, other)[i].tag, 0, memory_order_relaxed);
        atomic_store_explicit(&directory(b, other)[i].region, 0, memory_order_relaxed);
    }
    uint64_t used = atomic_load_explicit(&header(b)->used[other], memory_order_relaxed);
    for (uint64_t i = 0; i < used && i < b->n_words; i++)
        atomic_store_explicit(&arena(b, other)[i], 0, memory_order_relaxed);
    atomic_store_explicit(&header(b)->used[other], 0, memory_order_relaxed);
    /* Release: pairs with the acquire load in load_turn(). */
    atomic_store_explicit(&header(b)->turn, (turn + 1) & ~EMPTYING, memory_order_release);
}

/* The set of a file, made if there is none. */
static fcas_status find_or_make(fcas_given *b, const uint8_t manifest_hash[32], uint32_t n, bit_set *out)
{
    if (n < 1 || n > FCAS_GIVEN_CHUNKS_MAX)
        return FCAS_E_ARG;
    if (((uint64_t)n + 63) / 64 > b->n_words)
        return FCAS_E_FULL; /* would not fit an empty half either */
    uint64_t tag = tag_of(b, manifest_hash);
    uint64_t turn = load_turn(b);
    fcas_status st = find_or_make_in(b, half_in_use(turn), tag, n, out);
    if (st == FCAS_E_FULL) {
        change_halves(b, turn);
        uint64_t next = load_turn(b);
        if (half_in_use(next) != half_in_use(turn))
            st = find_or_make_in(b, half_in_use(next), tag, n, out);
    }
    return st == FCAS_OK && out->n != n ? FCAS_E_FULL : st;
}

/* Set one bit; FCAS_E_NOTFOUND when it was set before. */
static fcas_status set_bit(const bit_set *set, uint32_t i)
{
    uint64_t bit = UINT64_C(1) << (i % 64);
    uint64_t before = atomic_fetch_or_explicit(&set->words[i / 64], bit, memory_order_acq_rel);
    return before & bit ? FCAS_E_NOTFOUND : FCAS_OK;
}

fcas_status fcas_given_claim(fcas_given *b, const uint8_t manifest_hash[32], uint32_t n, uint32_t i)
{
    if (i >= n)
        return FCAS_E_ARG;
    bit_set set;
    fcas_status st = find_or_make(b, manifest_hash, n, &set);
    return st == FCAS_OK ? set_bit(&set, i) : st;
}

/* The free chunks of word w that lie in [start, n), as bits. */
static uint64_t free_bits(const bit_set *set, uint32_t w, uint32_t start)
{
    uint64_t free_mask = ~atomic_load_explicit(&set->words[w], memory_order_relaxed);
    if (w == start / 64)
        free_mask &= UINT64_MAX << (start % 64);
    if (w == (set->n - 1) / 64 && set->n % 64 != 0)
        free_mask &= UINT64_MAX >> (64 - set->n % 64);
    return free_mask;
}

fcas_status fcas_given_claim_from(fcas_given *b, const uint8_t manifest_hash[32], uint32_t n, uint32_t start,
                                  uint64_t pick, uint32_t *out)
{
    if (start >= n)
        return FCAS_E_ARG;
    bit_set set;
    fcas_status st = find_or_make(b, manifest_hash, n, &set);
    if (st != FCAS_OK)
        return st;
    /* Another process may take the chosen chunk first; then choose again among what is left. Each lost round is a
     * chunk that somebody else got, so n rounds are enough unless chunks are cleared all the time. */
    for (uint32_t round = 0; round < n; round++) {
        uint64_t left = 0;
        for (uint32_t w = start / 64; w <= (n - 1) / 64; w++)
            left += (uint64_t)__builtin_popcountll(free_bits(&set, w, start));
        if (left == 0)
            return FCAS_E_NOTFOUND;
        uint64_t k = pick % left;
        for (uint32_t w = start / 64; w <= (n - 1) / 64; w++) {
            uint64_t bits = free_bits(&set, w, start);
            uint64_t here = (uint64_t)__builtin_popcountll(bits);
            if (k >= here) {
                k -= here;
                continue;
            }
            for (; k > 0; k--)
                bits &= bits - 1;
            uint32_t i = w * 64 + (uint32_t)__builtin_ctzll(bits);
            if (set_bit(&set, i) == FCAS_OK) {
                *out = i;
                return FCAS_OK;
            }
            break;
        }
    }
    return FCAS_E_NOTFOUND;
}

void fcas_given_clear(fcas_given *b, const uint8_t manifest_hash[32], uint32_t i)
{
    bit_set set;
    if (find(b, manifest_hash, &set) == FCAS_OK && i < set.n)
        atomic_fetch_and_explicit(&set.words[i / 64], ~(UINT64_C(1) << (i % 64)), memory_order_acq_rel);
}

int fcas_given_is_given(const fcas_given *b, const uint8_t manifest_hash[32], uint32_t i)
{
    bit_set set;
    if (find(b, manifest_hash, &set) != FCAS_OK || i >= set.n)
        return 0;
    return (int)(atomic_load_explicit(&set.words[i / 64], memory_order_acquire) >> (i % 64) & 1u);
}
