/* What the files of the receiver share. */
#ifndef FCAS_RECEIVER_INTERNAL_H
#define FCAS_RECEIVER_INTERNAL_H

#include <linux/aio_abi.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/uio.h>
#include <time.h>

#include "receiver/receiver.h"

/* --- chunk buffers: at most `max` bytes, one is always granted ---
 * They lie in slabs of a huge page, where the limit allows: the kernel pins one page for a direct write, not 64. */
typedef struct fcas_rx_slab fcas_rx_slab;

typedef struct fcas_rx_buffer {
    struct fcas_rx_buffer *next;
    fcas_rx_slab *slab;
    uint8_t *bytes;
} fcas_rx_buffer;

struct fcas_rx_slab {
    fcas_rx_slab *next;
    uint8_t *bytes;
    size_t capacity;  /* of each buffer */
    size_t n, n_free; /* buffers */
    fcas_rx_buffer buffers[];
};

typedef struct {
    pthread_mutex_t lock;
    fcas_rx_slab *slabs;
    fcas_rx_buffer *free_list;
    size_t total; /* bytes, free and in use */
    size_t max;
} fcas_rx_pool;

void fcas_rx_pool_init(fcas_rx_pool *pool, size_t max);
void fcas_rx_pool_destroy(fcas_rx_pool *pool);
/* A buffer of at least `size` bytes. NULL with *no_memory = false: none is free now, ask again. */
fcas_rx_buffer *fcas_rx_pool_get(fcas_rx_pool *pool, size_t size, bool *no_memory);
void fcas_rx_pool_put(fcas_rx_pool *pool, fcas_rx_buffer *buffer);

/* --- chunks that are complete: checked several at once, written, reported --- */

/* Chunks that are being written per thread: more only wait in the disk's own queue, in memory that was cleared for
 * them. A whole batch of chunks has room. */
#define FCAS_RX_WRITING_MAX 40u
_Static_assert(FCAS_RX_WRITING_MAX >= FCAS_RX_TOGETHER, "a batch is prepared before it is submitted");

/* One write of chunks that follow each other in the file. */
typedef struct fcas_rx_write {
    struct iocb io;
    size_t n; /* chunks */
    struct iovec pieces[FCAS_RX_TOGETHER];
    fcas_rx_request *requests[FCAS_RX_TOGETHER];
    fcas_rx_buffer *buffers[FCAS_RX_TOGETHER];
    bool is_submitted;
    struct fcas_rx_write *next_free;
} fcas_rx_write;

typedef struct {
    fcas_rx *rx;
    fcas_rx_request *requests[FCAS_RX_TOGETHER]; /* whole, not checked yet */
    fcas_rx_buffer *buffers[FCAS_RX_TOGETHER];
    size_t n_whole;
    uint64_t whole_since_us; /* the oldest of them */
    uint64_t last_us, gap_us; /* when the last chunk was whole, and how long after the one before */
    bool has_aio;
    aio_context_t aio;
    int written_fd; /* eventfd: writes are done */
    size_t n_writing; /* chunks */
    fcas_rx_write *free_writes;
    fcas_rx_write writes[FCAS_RX_WRITING_MAX];
    fcas_rx_request *ended_first, *ended_last; /* the caller has not been told of them yet */
    size_t n_ended;
    uint64_t ended_since_us; /* the oldest of them */
    _Atomic uint64_t hash_ns, write_ns; /* spent; written by the thread only */
} fcas_rx_settler;

/* Without asynchronous I/O in this kernel (or none left of it) chunks are written through the page cache.
 * FCAS_E_SYS: no eventfd. */
fcas_status fcas_rx_settler_init(fcas_rx_settler *s, fcas_rx *rx);
/* Wait for the writes under way; what was not checked ends as CANCELLED. */
void fcas_rx_settler_destroy(fcas_rx_settler *s);
/* A chunk is whole: take its request (off its connection) and its buffer. Checks all if there are many by now. */
void fcas_rx_settler_add(fcas_rx_settler *s, fcas_rx_request *request, fcas_rx_buffer *buffer);
/* Check what is whole, write what is right. */
void fcas_rx_settle(fcas_rx_settler *s);
/* written_fd is readable: take the writes that are done. */
void fcas_rx_settler_written(fcas_rx_settler *s);
/* Tell the caller of all chunks that have ended. */
void fcas_rx_settler_tell(fcas_rx_settler *s);

/* --- threads --- */
typedef struct {
    fcas_rx *rx;
    fcas_rx_settler settler;
    pthread_t thread;
    int epoll_fd;
    int wake_fd;
    pthread_mutex_t lock;
    fcas_rx_request *inbox_first, *inbox_last; /* queued requests, under lock */
    fcas_rx_conn *opening;                     /* under lock, linked by next */
    fcas_rx_conn *closing;                     /* under lock, linked by next_closing */
    bool stop;                                 /* under lock */
    fcas_rx_conn *conns;                       /* this thread's only */
    bool someone_waits;                        /* a connection waits for a buffer */
    size_t n_asked;                            /* requests on its connections */
    _Atomic uint64_t receive_ns;               /* written by this thread only */
} fcas_rx_thread;

/* Monotonic nanoseconds. */
static inline uint64_t fcas_rx_clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Monotonic microseconds. */
static inline uint64_t fcas_rx_clock_us(void)
{
    return fcas_rx_clock_ns() / 1000u;
}

/* Count the time since `from_ns` in a thread's counter. Cost: one clock, no locked instruction. */
static inline void fcas_rx_spent(_Atomic uint64_t *counter, uint64_t from_ns)
{
    const uint64_t before = atomic_load_explicit(counter, memory_order_relaxed);
    atomic_store_explicit(counter, before + fcas_rx_clock_ns() - from_ns, memory_order_relaxed);
}

struct fcas_rx {
    fcas_rx_config config;
    fcas_rx_pool pool;
    uint32_t n_started;
    uint32_t next_thread;
    int event_fd;
    pthread_mutex_t lock;                  /* of the two below */
    fcas_rx_request *done_first, *done_last;
    fcas_rx_thread threads[];
};

enum conn_state { CONN_CLOSED, CONN_DIALLING, CONN_OPEN };
enum body_kind { BODY_NONE, BODY_CHUNK, BODY_MEMORY, BODY_DISCARD };

#define OUT_MAX 8192u

struct fcas_rx_conn {
    fcas_rx_thread *owner;
    fcas_rx_conn *next, *prev;       /* owner's list; set by the owner */
    fcas_rx_conn *next_closing;
    struct sockaddr_storage address;
    socklen_t n_address;
    char *host, *fields;

    int fd;
    enum conn_state state;
    bool watching_write;
    bool waits_for_buffer;           /* out of the epoll set until there is one */
    bool asked_twice;                /* the oldest request has had its second chance */
    bool close_after;
    uint64_t deadline_us;            /* 0: none */
    uint64_t dial_us, connect_us;

    fcas_rx_request *first, *last;   /* outstanding, oldest first; sent ones before unsent ones */
    size_t n_out, at_out;
    uint32_t n_head;                 /* bytes in head[] */
    enum body_kind body;
    uint64_t n_body, at_body;
    fcas_rx_buffer *buffer;          /* BODY_CHUNK */
    fcas_sha256 hash;                /* BODY_MEMORY with a hash */
    fcas_rx_response response;
    _Atomic uint64_t n_received;
    char out[OUT_MAX];
    uint8_t head[FCAS_RX_HEAD_MAX];
};

static inline const fcas_rx_config *fcas_rx_conn_config(const fcas_rx_conn *c)
{
    return &c->owner->rx->config;
}

void *fcas_rx_thread_main(void *argument);

/* --- conn.c: for the connection's thread only --- */

/* Add the socket to the thread's epoll set, or change what it waits for: EPOLL_CTL_ADD, EPOLL_CTL_MOD. */
void fcas_rx_conn_watch(fcas_rx_conn *c, int op, bool writing);
/* Begin to connect; what fails ends as in fcas_rx_conn_broken. */
void fcas_rx_conn_dial(fcas_rx_conn *c);
/* The socket is connected. */
void fcas_rx_conn_opened(fcas_rx_conn *c);
/* Close the socket; the requests stay, to be sent again. */
void fcas_rx_conn_close_socket(fcas_rx_conn *c);
/* The connection is broken. The oldest request is to blame, unless it may be asked again; the others are LOST. */
void fcas_rx_conn_broken(fcas_rx_conn *c, int outcome, int sys_errno);
/* The same because of an answer that is against the rules. There is an oldest request. */
void fcas_rx_conn_refuse(fcas_rx_conn *c, int refusal);
/* Send requests until the socket takes no more. */
void fcas_rx_conn_send(fcas_rx_conn *c);
/* Give the oldest request its time for the first byte. */
void fcas_rx_conn_arm_first_byte(fcas_rx_conn *c);
/* Take the oldest request off the connection: its answer is complete, or there will be none. */
fcas_rx_request *fcas_rx_conn_take_oldest(fcas_rx_conn *c);
/* Take the oldest request off the connection and report it. */
void fcas_rx_conn_finish(fcas_rx_conn *c, int outcome);
/* Forget the body that was being received. */
void fcas_rx_conn_drop_body(fcas_rx_conn *c);

/* --- answer.c: likewise --- */

/* The socket is readable: read on, up to a turn's bytes. */
void fcas_rx_conn_read(fcas_rx_conn *c);
/* A chunk buffer, or false: the connection rests, out of the epoll set, until there is one. */
bool fcas_rx_conn_have_buffer(fcas_rx_conn *c);
/* Work on what lies in head[]: whole heads, and bodies that came with them. False: nothing more to do here. */
bool fcas_rx_conn_digest_head(fcas_rx_conn *c);

void fcas_rx_conn_free(fcas_rx_conn *conn);
/* Hand finished requests, linked from first to last, to the caller's queue. */
void fcas_rx_deliver(fcas_rx *rx, fcas_rx_request *first, fcas_rx_request *last);

#endif
