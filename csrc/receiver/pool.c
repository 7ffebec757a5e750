/* Chunk buffers for all threads of a receiver, under one limit. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "receiver/internal.h"

/* A huge page of the common size, which its alignment must be, too. */
#define SLAB ((size_t)2 << 20)
#define PAGE ((size_t)4096)

void fcas_rx_pool_init(fcas_rx_pool *pool, size_t max)
{
    memset(pool, 0, sizeof *pool);
    pthread_mutex_init(&pool->lock, NULL);
    pool->max = max;
}

static void free_slab(fcas_rx_slab *slab)
{
    free(slab->bytes);
    free(slab);
}

void fcas_rx_pool_destroy(fcas_rx_pool *pool)
{
    while (pool->slabs != NULL) {
        fcas_rx_slab *slab = pool->slabs;
        pool->slabs = slab->next;
        free_slab(slab);
    }
    pthread_mutex_destroy(&pool->lock);
}

/* Give back the slabs of which nothing is in use. */
static void free_unused(fcas_rx_pool *pool)
{
    for (fcas_rx_buffer **at = &pool->free_list; *at != NULL;) {
        if ((*at)->slab->n_free == (*at)->slab->n) {
            *at = (*at)->next;
        } else {
            at = &(*at)->next;
        }
    }
    for (fcas_rx_slab **at = &pool->slabs; *at != NULL;) {
        fcas_rx_slab *slab = *at;
        if (slab->n_free == slab->n) {
            *at = slab->next;
            pool->total -= slab->n * slab->capacity;
            free_slab(slab);
        } else {
            at = &slab->next;
        }
    }
}

/* Add a slab of buffers of `size` bytes: as many as fit, one where the limit allows no more. False: no memory. */
static bool add_slab(fcas_rx_pool *pool, size_t size)
{
    const bool is_whole = size <= SLAB && pool->total + SLAB <= pool->max;
    const size_t n = is_whole ? SLAB / size : 1;
    fcas_rx_slab *slab = calloc(1, sizeof *slab + n * sizeof slab->buffers[0]);
    if (slab == NULL) {
        return false;
    }
    const size_t n_bytes = is_whole ? SLAB : size;
    if (posix_memalign((void **)&slab->bytes, n_bytes >= SLAB ? SLAB : PAGE, n_bytes) != 0) {
        free(slab);
        return false;
    }
    if (n_bytes >= SLAB) {
        (void)madvise(slab->bytes, n_bytes, MADV_HUGEPAGE); /* a hint: without them it is slower, not wrong */
    }
    slab->capacity = size;
    slab->n = slab->n_free = n;
    slab->next = pool->slabs;
    pool->slabs = slab;
    pool->total += n * size;
    for (size_t i = n; i-- > 0;) {
        slab->buffers[i].slab = slab;
        slab->buffers[i].bytes = slab->bytes + i * size;
        slab->buffers[i].next = pool->free_list;
        pool->free_list = &slab->buffers[i];
    }
    return true;
}

/* Take a free buffer, or NULL. */
static fcas_rx_buffer *take_free(fcas_rx_pool *pool, size_t size)
{
    for (fcas_rx_buffer **at = &pool->free_list; *at != NULL; at = &(*at)->next) {
        fcas_rx_buffer *found = *at;
        if (found->slab->capacity >= size) {
            *at = found->next;
            found->slab->n_free--;
            return found;
        }
    }
    return NULL;
}

fcas_rx_buffer *fcas_rx_pool_get(fcas_rx_pool *pool, size_t size, bool *no_memory)
{
    *no_memory = false;
    size = (size + PAGE - 1) / PAGE * PAGE; /* so that any may be written directly */
    pthread_mutex_lock(&pool->lock);
    fcas_rx_buffer *found = take_free(pool, size);
    if (found == NULL && pool->total > 0 && pool->total + size > pool->max) {
        free_unused(pool);
    }
    if (found == NULL && (pool->total == 0 || pool->total + size <= pool->max)) {
        *no_memory = !add_slab(pool, size);
        found = take_free(pool, size);
    }
    pthread_mutex_unlock(&pool->lock);
    return found;
}

void fcas_rx_pool_put(fcas_rx_pool *pool, fcas_rx_buffer *buffer)
{
    if (buffer == NULL) {
        return;
    }
    pthread_mutex_lock(&pool->lock);
    buffer->next = pool->free_list;
    pool->free_list = buffer;
    buffer->slab->n_free++;
    pthread_mutex_unlock(&pool->lock);
}
