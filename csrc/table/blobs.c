/* The blob directory and the path heap of the chunk table: see table.h. */
#include <string.h>

#include "table/layout.h"
#include "table/table.h"

fcas_status fcas_table_blob(const fcas_table *t, uint32_t number, fcas_blob *out, char path[FCAS_PATH_MAX_BYTES + 1])
{
    if (number >= t->n_blobs)
        return FCAS_E_NOTFOUND;
    const fcas_blob *entry = &fcas_table_blobs(t)[number];
    /* Acquire: pairs with the release store in fcas_table_put_blob(), so entry and path are whole. */
    uint32_t flags = __atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE);
    if (!(flags & FCAS_BLOB_LIVE))
        return FCAS_E_NOTFOUND;
    out->device = entry->device;
    out->inode = entry->inode;
    out->size = entry->size;
    out->mtime_ns = entry->mtime_ns;
    out->path_at = entry->path_at;
    out->path_len = entry->path_len;
    out->flags = flags;
    out->reserved[0] = out->reserved[1] = 0;
    /* Checked on the private copy: the entry may be damaged. */
    if (out->path_len < 1 || out->path_len > FCAS_PATH_MAX_BYTES || out->path_at > t->heap_size ||
        out->path_len > t->heap_size - out->path_at)
        return FCAS_E_NOTFOUND;
    memcpy(path, t->heap + out->path_at, out->path_len);
    path[out->path_len] = '\0';
    return memchr(path, '\0', out->path_len) == NULL ? FCAS_OK : FCAS_E_NOTFOUND;
}

fcas_status fcas_table_put_blob(fcas_table *t, uint32_t number, const fcas_blob *blob, const char *path, size_t path_len)
{
    if (!t->writable || path_len < 1 || path_len > FCAS_PATH_MAX_BYTES || memchr(path, '\0', path_len) != NULL)
        return FCAS_E_ARG;
    if (number >= t->n_blobs)
        return FCAS_E_FULL;
    fcas_blob *entry = &fcas_table_blobs(t)[number];
    if (entry->path_len != 0)
        return FCAS_E_ARG; /* in use, or withdrawn: a reader may still look at it */
    fcas_table_header *h = fcas_table_head(t);
    uint64_t at = atomic_load_explicit(&h->heap_used, memory_order_relaxed);
    if (at > t->heap_size || path_len > t->heap_size - at)
        return FCAS_E_FULL;
    memcpy(t->heap + at, path, path_len);
    atomic_store_explicit(&h->heap_used, at + path_len, memory_order_relaxed);
    entry->device = blob->device;
    entry->inode = blob->inode;
    entry->size = blob->size;
    entry->mtime_ns = blob->mtime_ns;
    entry->path_at = at;
    entry->path_len = (uint32_t)path_len;
    uint32_t flags = FCAS_BLOB_LIVE | (blob->flags & (FCAS_BLOB_LINKED | FCAS_BLOB_GROWING));
    /* Release: pairs with the acquire load in fcas_table_blob(). */
    __atomic_store_n(&entry->flags, flags, __ATOMIC_RELEASE);
    return FCAS_OK;
}

fcas_status fcas_table_remove_blob(fcas_table *t, uint32_t number)
{
    if (!t->writable)
        return FCAS_E_ARG;
    if (number >= t->n_blobs)
        return FCAS_E_NOTFOUND;
    fcas_blob *entry = &fcas_table_blobs(t)[number];
    if (!(__atomic_load_n(&entry->flags, __ATOMIC_RELAXED) & FCAS_BLOB_LIVE))
        return FCAS_E_NOTFOUND;
    __atomic_store_n(&entry->flags, 0, __ATOMIC_RELEASE);
    return FCAS_OK;
}

uint64_t fcas_table_blob_usage(const fcas_table *t, uint64_t *path_bytes)
{
    uint64_t end = 0, bytes = 0;
    for (uint64_t i = 0; i < t->n_blobs; i++) {
        const fcas_blob *entry = &fcas_table_blobs(t)[i];
        if (!(__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) & FCAS_BLOB_LIVE))
            continue;
        end = i + 1;
        bytes += entry->path_len;
    }
    *path_bytes = bytes;
    return end;
}

fcas_status fcas_table_copy_blobs(fcas_table *dst, const fcas_table *src, uint32_t except)
{
    uint64_t n = src->n_blobs;
    for (uint64_t i = 0; i < n; i++) {
        fcas_blob blob;
        char path[FCAS_PATH_MAX_BYTES + 1];
        if (i == except || fcas_table_blob(src, (uint32_t)i, &blob, path) != FCAS_OK)
            continue;
        fcas_status st = fcas_table_put_blob(dst, (uint32_t)i, &blob, path, blob.path_len);
        if (st != FCAS_OK)
            return st;
    }
    return FCAS_OK;
}
