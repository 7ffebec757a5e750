#include "receiver/job.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/bytes.h"

/* Slice that is hashed between two reads, so that its bytes are still in the cache. */
#define SLICE (128u * 1024u)

/* Where each chunk begins, and the end. */
static fcas_status starts_of(const fcas_rx_layout *layout, uint64_t **out)
{
    uint64_t *starts = malloc(((size_t)layout->n_chunks + 1) * sizeof *starts);
    uint64_t  at = 0;
    if (starts == NULL) {
        return FCAS_E_NOMEM;
    }
    for (uint32_t i = 0; i < layout->n_chunks; i++) {
        const uint32_t length = fcas_load_le32(layout->lengths + 4 * (size_t)i);
        starts[i] = at;
        if (length == 0 || length > layout->chunk_size) {
            free(starts);
            return FCAS_E_ARG;
        }
        at += length; /* 2^32 chunks of 2^32 bytes at most */
    }
    starts[layout->n_chunks] = at;
    if (at != layout->size) {
        free(starts);
        return FCAS_E_ARG;
    }
    *out = starts;
    return FCAS_OK;
}

fcas_status fcas_rx_job_new(const fcas_rx_layout *layout, int fd, int direct_fd, int parity_fd, fcas_rx_job **out)
{
    const size_t n_hashes = 32 * (size_t)layout->n_chunks;
    const size_t n_mid = layout->n_chunks == 0 || layout->lengths != NULL ? 0 : n_hashes - 32;
    const size_t n_parity = 32 * (size_t)layout->n_parity;
    fcas_rx_job *job = calloc(1, sizeof *job);
    if (job == NULL) {
        return FCAS_E_NOMEM;
    }
    job->fd = job->direct_fd = job->parity_fd = -1;
    if (layout->lengths != NULL) {
        const fcas_status status = starts_of(layout, &job->starts);
        if (status != FCAS_OK) {
            free(job);
            return status;
        }
    }
    job->arrays = malloc(n_hashes + n_mid + n_parity + 1);
    if (job->arrays == NULL) {
        free(job->starts);
        free(job);
        return FCAS_E_NOMEM;
    }
    atomic_init(&job->users, 1);
    job->layout = *layout;
    if (n_hashes != 0) {
        memcpy(job->arrays, layout->hashes, n_hashes);
    }
    if (n_mid != 0) {
        memcpy(job->arrays + n_hashes, layout->midstates, n_mid);
    }
    if (n_parity != 0) {
        memcpy(job->arrays + n_hashes + n_mid, layout->parity_hashes, n_parity);
    }
    job->layout.lengths = NULL; /* the caller's; starts say it */
    job->layout.hashes = job->arrays;
    job->layout.midstates = job->arrays + n_hashes;
    job->layout.parity_hashes = job->arrays + n_hashes + n_mid;
    job->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (job->fd >= 0 && direct_fd >= 0) {
        job->direct_fd = fcntl(direct_fd, F_DUPFD_CLOEXEC, 3);
    }
    if (job->fd >= 0 && parity_fd >= 0) {
        job->parity_fd = fcntl(parity_fd, F_DUPFD_CLOEXEC, 3);
    }
    if (job->fd < 0 || (direct_fd >= 0 && job->direct_fd < 0) || (parity_fd >= 0 && job->parity_fd < 0)) {
        const int saved = errno;
        fcas_rx_job_release(job);
        errno = saved;
        return FCAS_E_SYS;
    }
    *out = job;
    return FCAS_OK;
}

void fcas_rx_job_hold(fcas_rx_job *job)
{
    atomic_fetch_add_explicit(&job->users, 1, memory_order_relaxed);
}

void fcas_rx_job_release(fcas_rx_job *job)
{
    if (job == NULL || atomic_fetch_sub_explicit(&job->users, 1, memory_order_acq_rel) != 1) {
        return;
    }
    if (job->fd >= 0) {
        close(job->fd);
    }
    if (job->direct_fd >= 0) {
        close(job->direct_fd);
    }
    if (job->parity_fd >= 0) {
        close(job->parity_fd);
    }
    free(job->starts);
    free(job->arrays);
    free(job);
}

uint32_t fcas_rx_job_length(const fcas_rx_job *job, uint32_t index)
{
    const fcas_rx_layout *layout = &job->layout;
    if (index >= layout->n_chunks) {
        const uint32_t j = index - layout->n_chunks;
        if (j >= layout->n_parity || layout->m == 0) {
            return 0;
        }
        index = j / layout->m * layout->k; /* a stripe is as long as its first data chunk */
    }
    if (job->starts != NULL) {
        return (uint32_t)(job->starts[index + 1] - job->starts[index]);
    }
    if (index + 1 < layout->n_chunks) {
        return layout->chunk_size;
    }
    return (uint32_t)(layout->size - (uint64_t)index * layout->chunk_size);
}

void fcas_rx_check_begin(fcas_rx_check *check, const fcas_rx_job *job, uint32_t index)
{
    const fcas_rx_layout *layout = &job->layout;
    fcas_sha256_init(&check->own, layout->kernel);
    /* With a single chunk both hashes are the same number: the chunk's own is enough. */
    check->has_own = true;
    check->has_link = layout->check_links && job->starts == NULL && index < layout->n_chunks && layout->n_chunks > 1;
    if (!check->has_link) {
        return;
    }
    check->has_own = !layout->links_alone;
    if (index == 0) {
        fcas_sha256_init(&check->chain, layout->kernel);
    } else {
        (void)fcas_sha256_resume(&check->chain, layout->kernel, layout->midstates + 32 * (size_t)(index - 1),
                                 (uint64_t)index * layout->chunk_size);
    }
}

void fcas_rx_check_feed(fcas_rx_check *check, const uint8_t *p, size_t n)
{
    if (check->has_link && check->has_own) {
        fcas_sha256_update2(&check->own, &check->chain, p, n);
    } else {
        fcas_sha256_update(check->has_link ? &check->chain : &check->own, p, n);
    }
}

void fcas_rx_check_feed_many(fcas_rx_check *checks, const uint8_t *const *p, const size_t *lengths, size_t n)
{
    fcas_sha256 *states[2 * FCAS_RX_TOGETHER];
    const uint8_t *data[2 * FCAS_RX_TOGETHER];
    size_t n_bytes[2 * FCAS_RX_TOGETHER];
    size_t n_states = 0;

    for (size_t i = 0; i < n; i++) {
        if (checks[i].has_own) {
            states[n_states] = &checks[i].own;
            data[n_states] = p[i];
            n_bytes[n_states++] = lengths[i];
        }
        if (checks[i].has_link) {
            states[n_states] = &checks[i].chain;
            data[n_states] = p[i];
            n_bytes[n_states++] = lengths[i];
        }
    }
    fcas_sha256_update_many(states, data, n_bytes, n_states);
}

/* Whether the chain has come to the value that the layout lists after this chunk. Ends it. */
static bool link_holds(fcas_rx_check *check, const fcas_rx_layout *layout, uint32_t index)
{
    uint8_t after[32];
    if (index + 1 == layout->n_chunks) {
        fcas_sha256_final(&check->chain, after);
        return memcmp(after, layout->file_hash, 32) == 0;
    }
    return fcas_sha256_midstate(&check->chain, after) == FCAS_OK &&
           memcmp(after, layout->midstates + 32 * (size_t)index, 32) == 0;
}

const uint8_t *fcas_rx_job_hash(const fcas_rx_job *job, uint32_t index)
{
    const fcas_rx_layout *layout = &job->layout;
    return index < layout->n_chunks ? layout->hashes + 32 * (size_t)index
                                    : layout->parity_hashes + 32 * (size_t)(index - layout->n_chunks);
}

unsigned fcas_rx_check_end(fcas_rx_check *check, const fcas_rx_job *job, uint32_t index, const uint8_t *p,
                           uint8_t digest[32])
{
    const fcas_rx_layout *layout = &job->layout;
    const bool is_data = index < layout->n_chunks;
    const uint8_t *want = fcas_rx_job_hash(job, index);
    unsigned flags = check->has_link ? FCAS_RX_HAS_LINK : 0;

    if (check->has_link && link_holds(check, layout, index)) {
        flags |= FCAS_RX_LINK_OK;
        if (!check->has_own) {
            return flags | FCAS_RX_LINK_ALONE;
        }
    }
    if (!check->has_own) { /* who is to blame, the manifest or whoever sent it? */
        fcas_sha256_update(&check->own, p, fcas_rx_job_length(job, index));
    }
    fcas_sha256_final(&check->own, digest);
    if (memcmp(digest, want, 32) == 0) {
        flags |= FCAS_RX_HASH_OK;
    }
    if (is_data && layout->n_chunks == 1) { /* both hashes are the same number */
        flags |= FCAS_RX_HAS_LINK | (memcmp(digest, layout->file_hash, 32) == 0 ? FCAS_RX_LINK_OK : 0);
    }
    return flags;
}

int fcas_rx_job_write(const fcas_rx_job *job, uint32_t index, const uint8_t *p)
{
    const fcas_rx_layout *layout = &job->layout;
    const bool is_data = index < layout->n_chunks;
    const uint32_t place = is_data ? index : index - layout->n_chunks;
    const int fd = is_data ? job->fd : job->parity_fd;
    size_t left = fcas_rx_job_length(job, index);
    off_t offset = is_data && job->starts != NULL ? (off_t)job->starts[place] : (off_t)place * (off_t)layout->chunk_size;
    while (left > 0) {
        const ssize_t n = pwrite(fd, p, left, offset);
        if (n < 0) {
            if (errno == EINTR) {
                continue;
            }
            return errno;
        }
        if (n == 0) {
            return EIO;
        }
        p += n;
        offset += n;
        left -= (size_t)n;
    }
    return 0;
}

int fcas_rx_job_take(const fcas_rx_job *job, uint32_t index, int fd, uint64_t offset, bool write, uint8_t *buffer,
                     unsigned *flags)
{
    const uint32_t length = fcas_rx_job_length(job, index);
    fcas_rx_check check;
    uint8_t digest[32];

    *flags = 0;
    fcas_rx_check_begin(&check, job, index);
    for (uint32_t at = 0; at < length;) {
        const size_t want = length - at < SLICE ? length - at : SLICE;
        const ssize_t n = pread(fd, buffer + at, want, (off_t)(offset + at));
        if (n < 0) {
            if (errno == EINTR) {
                continue;
            }
            return errno;
        }
        if (n == 0) {
            return 0;
        }
        fcas_rx_check_feed(&check, buffer + at, (size_t)n);
        at += (uint32_t)n;
    }
    *flags = fcas_rx_check_end(&check, job, index, buffer, digest);
    if (write && fcas_rx_may_write(*flags)) {
        return fcas_rx_job_write(job, index, buffer);
    }
    return 0;
}
