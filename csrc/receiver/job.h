/* One file being fetched: where its chunks go and what they must hash to.
 *
 * A job owns copies of the manifest's arrays and duplicates of the descriptors, and counts its users, so that
 * a request in flight never outlives what it refers to. Everything but the count is immutable. */
#ifndef FCAS_RECEIVER_JOB_H
#define FCAS_RECEIVER_JOB_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"
#include "sha256/sha256.h"

typedef struct {
    uint64_t size;       /* bytes of content */
    uint32_t chunk_size; /* a power of two, a multiple of 64; with lengths: the longest chunk */
    uint32_t n_chunks;   /* data chunks = ceil(size / chunk_size), > 0; with lengths: as many as they are */
    uint32_t n_parity;
    uint32_t k, m;       /* stripe shape, 0 without parity */
    const uint8_t *hashes;        /* 32 * n_chunks */
    const uint8_t *midstates;     /* 32 * (n_chunks - 1); none with lengths */
    const uint8_t *lengths;       /* NULL: chunks of one size. Else 4 * n_chunks: each one's bytes, little-endian */
    const uint8_t *parity_hashes; /* 32 * n_parity */
    uint8_t file_hash[32];
    bool check_links;    /* of data chunks; without, their own hashes alone count */
    bool links_alone;    /* where a link is checked and holds, the own hash is not computed: half of the work, for
                          * who serves nothing by it */
    const fcas_sha256_kernel *kernel; /* NULL: the default one */
} fcas_rx_layout;

typedef struct {
    fcas_rx_layout layout; /* its pointers lead into `arrays` */
    uint8_t *arrays;
    uint64_t *starts;      /* with lengths: where each chunk begins, and the end; else NULL */
    int fd;                /* the part file: data chunk i lies where it does in the content */
    int direct_fd;         /* the part file again, O_DIRECT: whole chunks are written past the page cache; -1: none */
    int parity_fd;         /* parity chunk j lies at j * chunk_size; -1: parity is not fetched */
    atomic_int users;
} fcas_rx_job;

/* So many chunks are checked, written and told together at most: a multiple of what the preferred SHA-256 kernel takes
 * side by side (shani_x10: 10), and large against what each turn costs (docs/DECISIONS.md, 34). */
#define FCAS_RX_TOGETHER 40u

/* What a check of a chunk's bytes found. */
enum {
    FCAS_RX_HASH_OK = 1, /* the bytes' SHA-256 is the listed one */
    FCAS_RX_LINK_OK = 2, /* from the chaining value before it they lead to the one after it */
    FCAS_RX_HAS_LINK = 4, /* the link was checked at all: not of parity, of chunks with lengths, or if the layout
                           * does without */
    FCAS_RX_LINK_ALONE = 8 /* the link holds, and the own hash was not computed */
};

/* Copy the layout and duplicate the descriptors (direct_fd and parity_fd may be -1). FCAS_E_NOMEM, FCAS_E_SYS with
 * errno; FCAS_E_ARG: a length is 0 or over chunk_size, or they do not add up to size. */
fcas_status fcas_rx_job_new(const fcas_rx_layout *layout, int fd, int direct_fd, int parity_fd, fcas_rx_job **out);
void fcas_rx_job_hold(fcas_rx_job *job);
/* The last release frees it. */
void fcas_rx_job_release(fcas_rx_job *job);

/* Bytes of chunk `index` (data first, then parity); 0 when the file has no such chunk. */
uint32_t fcas_rx_job_length(const fcas_rx_job *job, uint32_t index);
/* What its bytes hash to, 32 bytes. index: of a chunk that the file has. */
const uint8_t *fcas_rx_job_hash(const fcas_rx_job *job, uint32_t index);

/* An incremental check: begin, feed the chunk's bytes in order (or all of several chunks at once), end. */
typedef struct {
    fcas_sha256 own;
    fcas_sha256 chain;
    bool has_link, has_own;
} fcas_rx_check;
void fcas_rx_check_begin(fcas_rx_check *check, const fcas_rx_job *job, uint32_t index);
void fcas_rx_check_feed(fcas_rx_check *check, const uint8_t *p, size_t n);
/* The whole bytes of n <= FCAS_RX_TOGETHER chunks into checks of one kernel that have just begun. */
void fcas_rx_check_feed_many(fcas_rx_check *checks, const uint8_t *const *p, const size_t *lengths, size_t n);
/* FCAS_RX_* bits; digest gets what the bytes really hash to, unless the link alone said that they are right. p: the
 * chunk's bytes once more, which a broken link asks for. */
unsigned fcas_rx_check_end(fcas_rx_check *check, const fcas_rx_job *job, uint32_t index, const uint8_t *p,
                           uint8_t digest[32]);
/* Whether a chunk with these bits may be written to its place. */
static inline bool fcas_rx_may_write(unsigned flags)
{
    return (flags & (FCAS_RX_HASH_OK | FCAS_RX_LINK_ALONE)) != 0;
}

/* Write a checked chunk to its place. 0 or an errno value; short writes and EINTR are continued. */
int fcas_rx_job_write(const fcas_rx_job *job, uint32_t index, const uint8_t *p);

/* Read chunk `index` from fd at offset into buffer (chunk_size bytes), check it, and, if `write` and its hash
 * or its link alone is right, write it to its place in the job. *flags gets FCAS_RX_* bits (0 when the file ends early).
 * 0 or an errno value of the read or the write. Blocks. */
int fcas_rx_job_take(const fcas_rx_job *job, uint32_t index, int fd, uint64_t offset, bool write, uint8_t *buffer,
                     unsigned *flags);

#endif
