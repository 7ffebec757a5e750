/* What the engine's files share. Nobody outside csrc/engine includes this. */
#ifndef FCAS_ENGINE_INTERNAL_H
#define FCAS_ENGINE_INTERNAL_H

#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/types.h>

#include "engine/engine.h"
#include "http/parser.h"
#include "table/siphash.h"

#define FCAS_INPUT_SIZE   FCAS_HTTP_HEAD_MAX /* one receive: all unread input that a connection may hold */
#define FCAS_SCRATCH_SIZE 4096u              /* the longest header that we write */
#define FCAS_WINDOW_SHIFT 25                 /* windows begin every 32 MiB and are 64 MiB long, so that every */
#define FCAS_WINDOW_SIZE  (64ull << 20)      /* extent (<= 16 MiB) lies whole in the window of its offset */
#define FCAS_TURN_BYTES   (2u << 20)         /* sent by one connection before the others have their turn */
#define FCAS_TURN_REQUESTS 32u               /* answered for one connection, likewise */
#define FCAS_HASHES_AHEAD 64u                /* chunk hashes read from a manifest at once */
#define FCAS_EVENTS_MAX   512u
#define FCAS_WAKE_TAG     (UINT64_MAX - 2)   /* epoll tag of the timer */
#define FCAS_BATCH        256
#define FCAS_SLOTS_MAX    64u
#define FCAS_SLOT_QUEUED  1
/* What a socket takes beyond what its peer's window lets go, bytes. Without it a peer that reads nothing is handed up to
 * 4 MiB: filling and freeing the queues of 1,000 such peers takes a second of CPU, in which nobody else is served. Whoever
 * has taken FCAS_PROVEN_BYTES may have more at once: it saves a quarter of the CPU of 1 MiB responses (docs/DECISIONS.md). */
#define FCAS_UNSENT_NEW    (256u << 10)
#define FCAS_UNSENT_PROVEN (2u << 20)
#define FCAS_PROVEN_BYTES  (4u << 20)
#define FCAS_UNWRITABLE_NS 50000000ll /* so long without room in its socket at least, and a connection is slow */

typedef struct fcas_conn fcas_conn;

/* An open blob with a window of it mapped. Key: blob number and window. */
typedef struct fcas_cached {
    struct fcas_cached *chain;        /* hash bucket */
    struct fcas_cached *newer, *older; /* LRU, only while refs == 0 */
    uint64_t key;
    uint64_t device, inode;
    uint64_t size;       /* at registration */
    int64_t  mtime_ns;
    uint32_t flags;      /* FCAS_BLOB_* */
    uint32_t blob;
    uint32_t refs;
    int      fd;
    uint64_t stat_size;  /* at the last check */
    int64_t  checked_ns;
    uint8_t *map;        /* FCAS_WINDOW_SIZE bytes; NULL until it is needed */
    uint64_t map_at;     /* file offset of map */
    int      dead;       /* withdrawn or replaced: out of the table, freed with the last reference */
} fcas_cached;

/* Where connections come from. */
typedef struct fcas_source {
    struct fcas_source *chain;        /* hash bucket */
    struct fcas_source *ring_prev, *ring_next; /* the ring, only while somebody waits for the upload limit */
    fcas_conn *wait_head, *wait_tail; /* who waits, by wait_next */
    uint8_t    key[16];
    uint32_t   n_conns;
    int        listed;                /* in the hash table: several connections may share it */
} fcas_source;

/* The rest of a /files response after its current extent. */
typedef struct {
    fcas_cached *manifest;
    uint64_t hashes_at;  /* file offset of the chunk hashes in the manifest's blob */
    uint64_t lengths_at; /* of the chunks' lengths; 0: all have chunk_size but the last */
    uint64_t left;       /* bytes of the response that no extent covers yet */
    uint64_t size;       /* of the file */
    uint32_t chunk_size; /* with lengths: the longest */
    uint32_t n_chunks;
    uint32_t next;       /* chunk number */
    uint32_t skip;       /* bytes of chunk `next` before the range */
    uint32_t first_hash; /* chunk number of hashes[0] */
    uint32_t n_hashes;
    uint8_t  hashes[FCAS_HASHES_AHEAD * 32];
    uint8_t  lengths[FCAS_HASHES_AHEAD * 4];
} fcas_run;

typedef enum { CONN_FREE = 0, CONN_READING, CONN_QUEUED, CONN_SENDING, CONN_PARKED, CONN_LINGERING } fcas_conn_state;
typedef enum { TIMER_HEADER = 0, TIMER_IDLE, TIMER_SEND, TIMER_LINGER, TIMER_COUNT, TIMER_NONE = TIMER_COUNT } fcas_timer;

struct fcas_conn {
    /* timer list */
    fcas_conn *prev, *next;
    int64_t    timer_ns;    /* when the timer was started */
    /* identity; these and ready_next survive reuse of the slot */
    fcas_conn *ready_next;
    uint32_t   index;
    uint32_t   birth;       /* counts uses of the slot: stale epoll events do not match */
    uint32_t   park_serial; /* counts parked requests of the slot: stale handles do not match */
    uint8_t    in_ready;
    /* from here on zeroed at accept */
    uint8_t    state;       /* fcas_conn_state */
    uint8_t    timer;       /* fcas_timer */
    uint8_t    readable;    /* the socket may have input */
    uint8_t    rdhup;       /* the peer sent its end: read on until 0 */
    uint8_t    eof;
    uint8_t    close_after; /* this response is the last one */
    uint8_t    is_head;
    uint8_t    local;       /* a loopback peer */
    uint8_t    use_sendfile;
    uint8_t    notify;
    uint8_t    bucket;      /* epoch bucket + 1, 0 = no extent in flight */
    uint8_t    mem_borrowed; /* mem is the engine's scratch */
    uint8_t    served;      /* at least one response was finished */
    uint8_t    proven;      /* FCAS_UNSENT_PROVEN holds for it */
    uint16_t   in_len;
    uint16_t   port;
    int        fd;
    uint8_t    ip[16];
    uint8_t   *in;          /* pooled, FCAS_INPUT_SIZE; NULL while no request is unfinished */
    fcas_http_request req;
    fcas_source *source;     /* NULL where nothing depends on it */
    fcas_conn *wait_prev, *wait_next; /* whom it waits with, for a slot or for the upload limit */
    /* upload slot (slots.c) */
    uint8_t    is_peer;      /* it has named a peer */
    uint8_t    slot;         /* its place among the holders + 1, 0 = none */
    uint8_t    draining;     /* its place among those that hold no slot, but bytes in the kernel, + 1, 0 = none */
    uint32_t   asked;        /* bytes of the chunk it asked for */
    uint32_t   queued_bytes; /* what of that counts in the queue */
    uint8_t    slow;         /* in this turn fcas_slot_unwritable() held once */
    float      took;         /* bytes per second in its last turn if it was slow then, else 0 */
    int64_t    turn_ns;      /* when it got its slot */
    uint64_t   turn_sent;    /* `sent` then */
    uint32_t   cap;          /* bytes per second that the kernel may send for it, 0 = as many as it likes */
    int64_t    blocked_ns;   /* since when it cannot be written to, 0 = it can */
    uint8_t    limited;      /* waits for the upload limit */
    uint32_t   grant;        /* body bytes taken from the bucket for this turn */
    /* response: first mem, then the extent, then the run's extents */
    uint8_t   *mem;
    uint32_t   mem_at, mem_len;
    fcas_cached *blob;
    uint64_t   body_at;     /* file offset */
    uint64_t   body_left;   /* of this extent */
    fcas_run  *run;
    uint64_t   notify_handle;
    /* progress of the peer */
    uint64_t   sent;        /* bytes written to the socket, all responses */
    uint64_t   acked;       /* at the last send check */
    int64_t    progress_ns; /* of the last send check that saw any */
    uint64_t   window_acked; /* when the window of the minimum rate began */
    int64_t    window_ns;
};
_Static_assert(sizeof(fcas_conn) <= 512, "a connection is to stay small");

typedef struct {
    fcas_conn *head, *tail;
    int64_t    after_ns;
} fcas_timer_list;

struct fcas_engine {
    fcas_engine_config config;
    int      epfd;
    int      kick;          /* eventfd, level-triggered: readable while the ready list waits for the next run */
    int      spare;         /* fd given up to accept and refuse when there are no more */
    int      listening;     /* the listener is in the epoll instance */
    int      draining;
    int      kicked;
    char     congestion[32]; /* the system's congestion control, for peers elsewhere; empty = leave it alone */
    socklen_t congestion_len;
    int64_t  now_ns;
    int64_t  accept_at_ns;  /* paused until then */
    int64_t  date_s;
    char     date[40];      /* "Date: ...\r\n" */
    size_t   date_len;
    /* the timer (timers.c) */
    int      wake;          /* timerfd */
    int64_t  wake_ns;       /* when it fires, 0 = not armed */
    /* sources (source.c) and the upload limit (limit.c) */
    uint64_t source_secret[2];
    fcas_source **sources;  /* hash table */
    uint32_t n_source_buckets; /* power of two, or 0 */
    uint32_t n_sources;
    fcas_source *ring_head, *ring_tail; /* those with somebody waiting */
    /* upload slots (slots.c) */
    fcas_conn *holders[FCAS_SLOTS_MAX];
    uint32_t n_holders;
    fcas_conn *drains[FCAS_SLOTS_MAX]; /* whose last turn is over, with bytes of it in the kernel perhaps */
    uint32_t n_drains;
    uint32_t next_bytes;    /* length of the last chunk given through NEXT */
    fcas_conn *queue_head, *queue_tail;
    uint64_t queue_bytes;   /* as they count */
    double   uplink;        /* bytes per second, 0 = not known */
    int64_t  window_ns;     /* when the window begins or began */
    uint64_t window_bytes;  /* bytes sent at that time, 0 = it has not begun */
    int64_t  probe_ns;      /* from then on a request is let in however busy */
    int64_t  published_ns;
    int      rising;        /* the last window showed a rate well above what was known */
    int64_t  capped_ns;     /* when the holders' caps were set last */
    uint64_t bytes_sent;    /* body bytes before those in delta */
    int      limit_sleeps;  /* the bucket was empty: until the timer fires */
    /* table and epochs (epoch.c) */
    fcas_table table;
    int      has_table;
    uint64_t table_number;
    uint64_t label[2];
    uint32_t count[2];
    int      current;
    uint64_t safe;
    uint64_t swept_epoch;
    /* connections */
    fcas_conn **slabs;
    uint32_t n_slabs;
    fcas_conn *free_conns;  /* by next */
    uint32_t n_conns;
    uint32_t n_sending;
    fcas_conn *ready_head, *ready_tail;
    fcas_timer_list timers[TIMER_COUNT];
    /* buffers */
    uint8_t *input;         /* shared receive buffer */
    uint8_t *scratch;
    void    *free_inputs;   /* pooled input buffers, chained by their first bytes */
    uint32_t n_free_inputs;
    uint32_t n_inputs;
    /* blob cache */
    fcas_cached **buckets;
    uint32_t n_buckets;     /* power of two */
    uint32_t n_cached;
    uint32_t n_idle;        /* in the LRU list */
    fcas_cached *newest, *oldest;
    struct { uint32_t blob; int64_t until_ns; } reported[64];
    /* for the owner */
    fcas_parked *parked_head, *parked_tail;
    uint32_t n_parked;
    fcas_event *events;     /* ring of FCAS_EVENTS_MAX */
    uint32_t events_at, n_events;
    uint64_t delta[FCAS_CTR_COUNT];
    struct epoll_event batch[FCAS_BATCH];
};

static inline void fcas_engine_count(fcas_engine *e, fcas_counter c, uint64_t n) { e->delta[c] += n; }

/* ---- timers.c ---- */
/* Start timer t of c now (TIMER_NONE: none). A restart within 100 ms of the last start is a no-op where that only
 * makes the deadline earlier by as much (TIMER_IDLE). */
void fcas_timer_set(fcas_engine *e, fcas_conn *c, fcas_timer t);
/* Start the progress checks of a response that did not go out at once. */
void fcas_timer_watch_send(fcas_engine *e, fcas_conn *c);
/* Close or check every connection whose time is up. */
void fcas_timers_expire(fcas_engine *e);
/* Make the epoll fd readable after `ns`, or earlier if an earlier wake-up is on its way. 1, or 0: it cannot. */
int fcas_wake_after(fcas_engine *e, int64_t ns);
/* The timer fired, or it is past its time. */
void fcas_wake_fired(fcas_engine *e);

/* ---- epoch.c ---- */
void fcas_epoch_enter(fcas_engine *e, fcas_conn *c);
void fcas_epoch_leave(fcas_engine *e, fcas_conn *c);
/* Look at the table's epoch and publish EPOCH_SAFE. */
void fcas_epoch_refresh(fcas_engine *e);
/* After the table changed: everything in flight counts as epoch 0. */
void fcas_epoch_restart(fcas_engine *e);

/* ---- cache.c ---- */
fcas_status fcas_cache_init(fcas_engine *e);
void fcas_cache_destroy(fcas_engine *e);
/* The open blob for a place, checked (identity, length) and referenced; NULL when it cannot be served (a withdrawal
 * was reported if the blob is at fault). *busy = 1 if only file descriptors are lacking. */
fcas_cached *fcas_cache_get(fcas_engine *e, fcas_place place, int *busy);
void fcas_cache_put(fcas_engine *e, fcas_cached *b);
/* Check identity and size against the open file; 0 = withdrawn. */
int fcas_cache_check(fcas_engine *e, fcas_cached *b, uint64_t end);
/* Map the window. NULL if that fails. */
const uint8_t *fcas_cache_map(fcas_cached *b);
/* Report the blob once a second and take it out of the cache. */
void fcas_cache_withdraw(fcas_engine *e, fcas_cached *b, fcas_withdraw_reason reason);
/* Close blobs that the table does not list any more. */
void fcas_cache_sweep(fcas_engine *e);

/* ---- source.c ---- */
/* Count c's source; -1: it has too many connections, or there is no memory. */
int fcas_source_enter(fcas_engine *e, fcas_conn *c);
void fcas_source_leave(fcas_engine *e, fcas_conn *c);
/* Whether an address lies in an own prefix. */
int fcas_source_is_exempt(const fcas_engine *e, const uint8_t ip[16]);

/* ---- limit.c: only with a bucket ---- */
/* c has a body and no grant: have it wait for its turn. */
void fcas_limit_wait(fcas_engine *e, fcas_conn *c);
/* c waits no longer. */
void fcas_limit_leave(fcas_engine *e, fcas_conn *c);
/* Turns for those who wait, as far as the bucket goes. */
void fcas_limit_run(fcas_engine *e);

/* ---- slots.c ---- */
/* A request for a chunk of `bytes` bytes that names a peer. 0: c has a slot, or needs none; FCAS_SLOT_QUEUED: c is QUEUED
 * and its request stays unread; 503: busy (only with may_refuse). */
int fcas_slot_admit(fcas_engine *e, fcas_conn *c, uint32_t bytes, int may_refuse);
/* c's response is over; the next in the queue gets its slot. */
void fcas_slot_release(fcas_engine *e, fcas_conn *c);
/* c is about to be closed. */
void fcas_slot_leave(fcas_engine *e, fcas_conn *c);
/* Whether c could not be written to for longer than its share of the uplink explains. */
int fcas_slot_unwritable(const fcas_engine *e, const fcas_conn *c);
/* While somebody holds a slot: measure the uplink, take slots from those who cannot be written to. */
void fcas_slots_run(fcas_engine *e);
/* The gauges. */
void fcas_slots_publish(fcas_engine *e, fcas_counter_slot *slot);

/* ---- send.c ---- */
typedef enum { SEND_DONE = 0, SEND_BLOCKED, SEND_YIELD, SEND_LIMITED, SEND_FAILED } fcas_send_result;
/* Send on; at most *turn bytes. */
fcas_send_result fcas_send(fcas_engine *e, fcas_conn *c, uint64_t *turn);

/* ---- files.c ---- */
/* A run over bytes [first, last] of a file, its first extent in c; the status of the error otherwise. */
int fcas_run_start(fcas_engine *e, fcas_conn *c, const fcas_run *shape, uint64_t first, uint64_t last);
/* The next extent of c's run into c. 0, or -1: it cannot be served. */
int fcas_run_next(fcas_engine *e, fcas_conn *c);
/* Read a manifest's header: fills shape (manifest referenced, size, chunk_size, n_chunks, hashes_at, lengths_at).
 * 0 or a status. */
int fcas_run_open(fcas_engine *e, const uint8_t file_hash[32], fcas_run *shape);

/* ---- route.c ---- */
/* Answer the complete request in c->req, whose bytes begin at buf: leaves c SENDING or PARKED; or QUEUED, then the
 * request is not consumed. */
void fcas_route(fcas_engine *e, fcas_conn *c, const uint8_t *buf);
/* Answer with an error of one line; `last` closes afterwards. */
void fcas_route_error(fcas_engine *e, fcas_conn *c, int status, int last);
/* Set c's extent to length bytes of place from `skip` on. 0, 404 or 503. */
int fcas_route_extent(fcas_engine *e, fcas_conn *c, fcas_place place, uint64_t skip, uint64_t length);

/* ---- conn.c ---- */
fcas_conn *fcas_conn_new(fcas_engine *e, int fd);
fcas_conn *fcas_conn_at(const fcas_engine *e, uint32_t index);
/* Go on with a connection: send, parse, receive until it blocks. */
void fcas_conn_run(fcas_engine *e, fcas_conn *c);
/* Close at once; with reset, the peer gets RST and the kernel forgets unsent data. */
void fcas_conn_close(fcas_engine *e, fcas_conn *c, int reset);
void fcas_conn_free_input(fcas_engine *e, fcas_conn *c);
void fcas_conn_make_ready(fcas_engine *e, fcas_conn *c);
/* Bookkeeping of a response that begins: c becomes SENDING. */
void fcas_conn_begin(fcas_engine *e, fcas_conn *c, int status);

/* ---- engine.c ---- */
void fcas_engine_event(fcas_engine *e, fcas_event event);
/* Outside of a run: make the epoll fd readable if there is something to go on with, or for the owner to take. */
void fcas_engine_kick(fcas_engine *e);

#endif
