/* Open blobs: a bounded LRU of (blob, window) with the file descriptor, the mapping and the identity that the table
 * promised. The mapping is only ever read by the kernel (sendmsg), so that a file that shrinks is EFAULT, not SIGBUS. */
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/internal.h"

#define CHECK_NS  100000000ll  /* an idle blob's identity is at most this old when a response starts */
#define REPORT_NS 1000000000ll /* the same blob is reported at most this often */

fcas_status fcas_cache_init(fcas_engine *e)
{
    e->n_buckets = 64;
    while (e->n_buckets < e->config.max_cached && e->n_buckets < (1u << 20))
        e->n_buckets *= 2;
    e->buckets = calloc(e->n_buckets, sizeof *e->buckets);
    return e->buckets ? FCAS_OK : FCAS_E_NOMEM;
}

static fcas_cached **bucket_of(fcas_engine *e, uint64_t key)
{
    return &e->buckets[(key * 0x9e3779b97f4a7c15ull) >> 40 & (e->n_buckets - 1)];
}

static void lru_remove(fcas_engine *e, fcas_cached *b)
{
    if (b->newer)
        b->newer->older = b->older;
    else
        e->newest = b->older;
    if (b->older)
        b->older->newer = b->newer;
    else
        e->oldest = b->newer;
    e->n_idle--;
}

static void lru_add(fcas_engine *e, fcas_cached *b)
{
    b->newer = NULL;
    b->older = e->newest;
    if (e->newest)
        e->newest->newer = b;
    else
        e->oldest = b;
    e->newest = b;
    e->n_idle++;
}

static void unhash(fcas_engine *e, fcas_cached *b)
{
    fcas_cached **at = bucket_of(e, b->key);
    while (*at != b)
        at = &(*at)->chain;
    *at = b->chain;
    b->dead = 1;
}

static void destroy(fcas_engine *e, fcas_cached *b)
{
    if (b->map)
        munmap(b->map, FCAS_WINDOW_SIZE);
    close(b->fd);
    free(b);
    e->n_cached--;
}

/* Take an entry out: closed now, or with its last reference. */
static void retire(fcas_engine *e, fcas_cached *b)
{
    if (b->dead)
        return;
    unhash(e, b);
    if (b->refs == 0) {
        lru_remove(e, b);
        destroy(e, b);
    }
}

void fcas_cache_destroy(fcas_engine *e)
{
    for (uint32_t i = 0; e->buckets && i < e->n_buckets; i++)
        while (e->buckets[i])
            retire(e, e->buckets[i]);
    free(e->buckets);
    e->buckets = NULL;
}

/* The live directory entry of a blob, read in place: its body never changes once flags are set (acquire pairs with
 * the release in fcas_table_put_blob). NULL = none. */
static const fcas_blob *listed(const fcas_engine *e, uint32_t number)
{
    if (!e->has_table || number >= e->table.n_blobs)
        return NULL;
    const fcas_blob *entry = (const fcas_blob *)(const void *)(e->table.blobs + (size_t)number * sizeof(fcas_blob));
    uint32_t         flags = atomic_load_explicit((const _Atomic uint32_t *)&entry->flags, memory_order_acquire);
    return flags & FCAS_BLOB_LIVE ? entry : NULL;
}

static int still_listed(const fcas_engine *e, const fcas_cached *b)
{
    /* Whole: the same number can come back in a new table as a finished or edited file of the same inode. */
    const fcas_blob *entry = listed(e, b->blob);
    return entry && entry->device == b->device && entry->inode == b->inode && entry->size == b->size &&
           entry->mtime_ns == b->mtime_ns && entry->flags == b->flags;
}

static void report(fcas_engine *e, uint32_t blob, fcas_withdraw_reason reason)
{
    size_t slot = blob % (sizeof e->reported / sizeof e->reported[0]);
    if (e->reported[slot].blob == blob && e->now_ns < e->reported[slot].until_ns)
        return;
    e->reported[slot].blob = blob;
    e->reported[slot].until_ns = e->now_ns + REPORT_NS;
    fcas_engine_count(e, FCAS_CTR_SHORTFALL, 1);
    fcas_engine_event(e, (fcas_event){.kind = FCAS_EVENT_WITHDRAW, .blob = blob, .reason = reason});
}

void fcas_cache_withdraw(fcas_engine *e, fcas_cached *b, fcas_withdraw_reason reason)
{
    report(e, b->blob, reason);
    if (b->refs == 0)
        retire(e, b);
    else if (!b->dead)
        unhash(e, b);
}

/* fstat against what was registered; 0 or the reason. */
static int identity(fcas_cached *b)
{
    struct stat st;
    if (fstat(b->fd, &st) != 0)
        return FCAS_BLOB_UNREADABLE;
    if (!S_ISREG(st.st_mode))
        return FCAS_BLOB_GONE;
    b->stat_size = (uint64_t)st.st_size;
    if ((uint64_t)st.st_dev != b->device || (uint64_t)st.st_ino != b->inode)
        return FCAS_BLOB_CHANGED;
    if (b->flags & FCAS_BLOB_GROWING)
        return 0;
    if (b->flags & FCAS_BLOB_LINKED) {
        int64_t mtime_ns = (int64_t)st.st_mtim.tv_sec * 1000000000ll + st.st_mtim.tv_nsec;
        return b->stat_size != b->size || mtime_ns != b->mtime_ns ? FCAS_BLOB_CHANGED : 0;
    }
    return b->stat_size < b->size ? FCAS_BLOB_SHORT : 0;
}

int fcas_cache_check(fcas_engine *e, fcas_cached *b, uint64_t end)
{
    b->checked_ns = e->now_ns;
    int reason = identity(b);
    if (!reason && end > b->stat_size)
        reason = FCAS_BLOB_SHORT;
    if (reason)
        fcas_cache_withdraw(e, b, (fcas_withdraw_reason)reason);
    return reason == 0;
}

static int open_blob(fcas_engine *e, uint32_t number, fcas_blob *entry, int *busy)
{
    char path[FCAS_PATH_MAX_BYTES + 1];
    if (fcas_table_blob(&e->table, number, entry, path) != FCAS_OK)
        return -1;
    for (int attempt = 0;; attempt++) {
        int fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
        if (fd >= 0)
            return fd;
        if (errno == EINTR)
            continue;
        if (errno == EMFILE || errno == ENFILE || errno == ENOMEM) {
            if (attempt == 0 && e->oldest) {
                while (e->oldest)
                    retire(e, e->oldest);
                continue;
            }
            *busy = 1;
        } else {
            report(e, number, errno == ENOENT || errno == ELOOP || errno == ENOTDIR ? FCAS_BLOB_GONE : FCAS_BLOB_UNREADABLE);
        }
        return -1;
    }
}

static fcas_cached *load(fcas_engine *e, fcas_place place, uint64_t key, int *busy)
{
    fcas_blob entry;
    int       fd = open_blob(e, place.blob, &entry, busy);
    if (fd < 0)
        return NULL;
    fcas_cached *b = calloc(1, sizeof *b);
    if (!b) {
        close(fd);
        *busy = 1;
        return NULL;
    }
    b->key = key;
    b->blob = place.blob;
    b->device = entry.device;
    b->inode = entry.inode;
    b->size = entry.size;
    b->mtime_ns = entry.mtime_ns;
    b->flags = entry.flags;
    b->fd = fd;
    b->map_at = place.offset >> FCAS_WINDOW_SHIFT << FCAS_WINDOW_SHIFT;
    b->checked_ns = e->now_ns;
    int reason = identity(b);
    if (reason) {
        report(e, b->blob, (fcas_withdraw_reason)reason);
        close(fd);
        free(b);
        return NULL;
    }
    fcas_cached **at = bucket_of(e, key);
    b->chain = *at;
    *at = b;
    e->n_cached++;
    while (e->n_idle && e->n_cached > e->config.max_cached)
        retire(e, e->oldest);
    lru_add(e, b);
    return b;
}

fcas_cached *fcas_cache_get(fcas_engine *e, fcas_place place, int *busy)
{
    *busy = 0;
    if (place.offset > INT64_MAX - FCAS_WINDOW_SIZE || place.length > FCAS_WINDOW_SIZE / 4)
        return NULL;
    uint64_t     window = place.offset >> FCAS_WINDOW_SHIFT; /* < 2^38: no two keys meet below 2^26 blobs */
    uint64_t     key = window << 26 ^ place.blob;
    fcas_cached *b = *bucket_of(e, key);
    while (b && (b->blob != place.blob || b->map_at >> FCAS_WINDOW_SHIFT != window))
        b = b->chain;
    if (b && !still_listed(e, b)) {
        retire(e, b);
        b = NULL;
    }
    if (!b && !(b = load(e, place, key, busy)))
        return NULL;
    uint64_t end = place.offset + place.length;
    if ((e->now_ns - b->checked_ns >= CHECK_NS || end > b->stat_size) && !fcas_cache_check(e, b, end))
        return NULL;
    if (b->refs++ == 0)
        lru_remove(e, b);
    return b;
}

void fcas_cache_put(fcas_engine *e, fcas_cached *b)
{
    if (--b->refs)
        return;
    if (b->dead) {
        destroy(e, b);
        return;
    }
    lru_add(e, b);
    while (e->n_idle && e->n_cached > e->config.max_cached)
        retire(e, e->oldest);
}

const uint8_t *fcas_cache_map(fcas_cached *b)
{
    if (!b->map) {
        /* Always the whole window: beyond the file is EFAULT, beyond the mapping would be somebody else's memory. */
        void *map = mmap(NULL, FCAS_WINDOW_SIZE, PROT_READ, MAP_SHARED, b->fd, (off_t)b->map_at);
        if (map == MAP_FAILED)
            return NULL;
        b->map = map;
    }
    return b->map;
}

void fcas_cache_sweep(fcas_engine *e)
{
    for (fcas_cached *b = e->oldest, *newer; b; b = newer) {
        newer = b->newer;
        if (!still_listed(e, b))
            retire(e, b);
    }
}
