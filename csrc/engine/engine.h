/* The serve engine: one worker's connections on one listener, in an epoll instance of its own (edge-triggered).
 *
 * The owner registers fcas_engine_fd() with its event loop, calls fcas_engine_run() when that is readable, and
 * fcas_engine_tick() about four times a second. Chunks, manifests, files and /health are answered here from the chunk
 * table and the blobs. Targets below /swarm/ are parked: the owner takes them with fcas_engine_take_parked() and
 * answers with fcas_engine_respond() or fcas_engine_respond_chunk(), at once or later.
 *
 * One thread at a time. No Python. SIGPIPE must be ignored by the process (sendfile has no flag for it). Time is
 * CLOCK_MONOTONIC in ns, given by the caller. Nothing here blocks but page faults and disk reads of blobs. */
#ifndef FCAS_ENGINE_H
#define FCAS_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#include "common/status.h"
#include "table/bucket.h"
#include "table/counters.h"
#include "table/table.h"

typedef struct fcas_engine fcas_engine;

typedef enum { FCAS_SEND_AUTO = 0, FCAS_SEND_SENDFILE = 1, FCAS_SEND_COPY = 2 } fcas_send_path;

/* Addresses that begin with these bits; IPv4 as ::ffff:a.b.c.d, so that bits counts 96 more. */
typedef struct {
    uint8_t  ip[16];
    uint32_t bits; /* 0..128 */
} fcas_prefix;

typedef struct {
    int      listener;         /* listening TCP socket; made non-blocking; stays the caller's */
    int      send_path;        /* fcas_send_path */
    uint32_t copy_max;         /* auto: longest body copied from the mapping, bytes; longer: sendfile */
    uint32_t max_connections;  /* 1..1,000,000; more are answered 503 and closed */
    uint32_t max_cached;       /* blob windows kept open and mapped while nobody uses them; >= 1 */
    uint32_t max_parked;       /* parked requests at once; more get 503 */
    int64_t  header_ns;        /* absolute: accept, or first byte of a request, to its end */
    int64_t  idle_ns;          /* keep-alive */
    int64_t  stall_ns;         /* sending without progress */
    int64_t  rate_window_ns;   /* minimum rate is averaged over this */
    uint32_t min_rate;         /* bytes per second, 0 = none */
    fcas_bucket *bucket;       /* upload limit, shared with other engines; NULL = none; stays the caller's */
    uint32_t slots;            /* chunks sent at once to peers (requests with Fastcas-Peer), 0..64, 0 = no slots, no busy */
    uint32_t max_per_source;   /* connections of one IPv4 address or IPv6 /64, 0 = any number; more: 503, closed */
    const fcas_prefix *own;    /* n_own prefixes that, like loopback, may have any number; stays the caller's */
    uint32_t n_own;
    int64_t  accept_pause_ns;  /* after EMFILE */
    fcas_counter_slot *counters; /* NULL = none */
} fcas_engine_config;

/* What fcas_engine_run and fcas_engine_tick return: what the owner should look at. */
enum {
    FCAS_ENGINE_PARKED  = 1u << 0, /* fcas_engine_take_parked has something */
    FCAS_ENGINE_EVENTS  = 1u << 1, /* fcas_engine_take_event has something */
    FCAS_ENGINE_DRAINED = 1u << 2  /* draining, and no connection is left */
};

/* A request that the owner answers. */
typedef struct fcas_parked {
    struct fcas_parked *next;
    uint64_t handle;    /* for respond; never reused */
    uint8_t  is_head;
    uint8_t  ip[16];    /* source, IPv4 as ::ffff:a.b.c.d */
    uint16_t port;      /* source */
    uint16_t path_len;  /* the path begins at bytes */
    uint16_t query_len; /* follows the path */
    uint16_t peer_len;  /* Fastcas-Peer, follows the query */
    uint8_t  bytes[];
} fcas_parked;

typedef enum {
    FCAS_EVENT_WITHDRAW = 1, /* blob, reason: its extents cannot be served any more */
    FCAS_EVENT_SENT,         /* handle of a respond_chunk with notify; ok = the last byte was written */
    FCAS_EVENT_GONE          /* handle: a parked connection died */
} fcas_event_kind;

typedef enum {
    FCAS_BLOB_GONE = 1,  /* it cannot be opened, or is no regular file */
    FCAS_BLOB_CHANGED,   /* another device, inode, or for linked blobs size or mtime */
    FCAS_BLOB_SHORT,     /* shorter than an extent */
    FCAS_BLOB_UNREADABLE /* a read failed */
} fcas_withdraw_reason;

typedef struct {
    uint32_t kind;   /* fcas_event_kind */
    uint32_t blob;
    uint32_t reason; /* fcas_withdraw_reason */
    uint32_t ok;
    uint64_t handle;
} fcas_event;

typedef struct {
    uint32_t connections;
    uint32_t sending;
    uint32_t parked;
    uint32_t cached;      /* blob windows open */
    uint32_t inputs;      /* pooled request buffers in use */
    uint32_t in_flight;   /* extents counted for the epoch */
    uint64_t table_number;
    uint64_t conn_size;   /* bytes per connection */
} fcas_engine_stats;

/* Make an engine: FCAS_E_ARG, FCAS_E_NOMEM or FCAS_E_SYS; *out only on FCAS_OK. It accepts once it has a table. */
fcas_status fcas_engine_create(fcas_engine **out, const fcas_engine_config *config, int64_t now_ns);
/* Close all connections, blobs and the table. Safe on NULL. */
void fcas_engine_destroy(fcas_engine *e);
/* The epoll fd to watch for reading. */
int fcas_engine_fd(const fcas_engine *e);

/* Serve what is ready, at most about max_events events; never waits. Returns FCAS_ENGINE_* bits. Cost: one system call
 * when nothing is ready; per request two (recv, sendmsg) and its share of an epoll_wait. hot */
unsigned fcas_engine_run(fcas_engine *e, unsigned max_events, int64_t now_ns);
/* Deadlines, accept resumption, epoch, heartbeat, counters. Returns FCAS_ENGINE_* bits. */
unsigned fcas_engine_tick(fcas_engine *e, int64_t now_ns);

/* Answer from the table in fd (the fd stays the caller's) from now on. `number` goes to FCAS_CTR_EPOCH_TABLE.
 * With the first table the engine begins to accept: a replacement that has none yet must not answer 404 for what its
 * predecessor had. On failure the table in use stays. No response holds the old map, so it is unmapped at once; extents in flight keep
 * their blobs, and FCAS_CTR_EPOCH_SAFE is 0 until those from the old table are done. */
fcas_status fcas_engine_set_table(fcas_engine *e, int fd, uint64_t number);
/* Stop accepting; end each connection with its next response, or when it has been idle for a second. */
void fcas_engine_drain(fcas_engine *e);

/* The oldest parked request not yet taken, or NULL; the caller frees it with free(). */
fcas_parked *fcas_engine_take_parked(fcas_engine *e);
/* The oldest event: 1, or 0 when there is none. */
int fcas_engine_take_event(fcas_engine *e, fcas_event *out);

/* Answer a parked request. fields: complete header lines, each with CRLF, or empty; Content-Length and Connection are
 * added. FCAS_E_NOTFOUND for a handle that is answered already or whose connection is gone. Copies what it keeps. */
fcas_status fcas_engine_respond(fcas_engine *e, uint64_t handle, int status, const uint8_t *fields, size_t fields_len,
                                const uint8_t *body, size_t body_len);
/* Answer it with a chunk of the table. FCAS_E_NOTFOUND: stale handle; FCAS_E_CORRUPT: the chunk cannot be served (the
 * request stays parked). With notify, an FCAS_EVENT_SENT follows exactly once. */
fcas_status fcas_engine_respond_chunk(fcas_engine *e, uint64_t handle, const uint8_t hash[32], const uint8_t *fields,
                                      size_t fields_len, int notify);

/* The manifest of a complete file. */
fcas_status fcas_engine_lookup_file(fcas_engine *e, const uint8_t file_hash[32], uint8_t manifest_hash[32]);
/* Read n bytes at `offset` of a manifest; FCAS_E_NOTFOUND, FCAS_E_ARG (outside it), FCAS_E_CORRUPT. */
fcas_status fcas_engine_read_manifest(fcas_engine *e, const uint8_t manifest_hash[32], uint64_t offset, uint8_t *out,
                                      size_t n);
/* Its length in bytes, or FCAS_E_NOTFOUND. */
fcas_status fcas_engine_manifest_length(fcas_engine *e, const uint8_t manifest_hash[32], uint64_t *length);
/* Which of n chunks are here: found[i] = 1 or 0. Returns how many. */
size_t fcas_engine_have(fcas_engine *e, const uint8_t *keys, size_t n, uint8_t *found);

void fcas_engine_statistics(const fcas_engine *e, fcas_engine_stats *out);

#endif
