/* The HTTP client of the fetch path: threads with an epoll loop each, pipelined GETs, checked chunks.
 *
 * A caller opens connections (each belongs to one thread), queues requests on them and takes results from one
 * queue whose eventfd says that something is there. A chunk's body is hashed while it arrives and written to
 * its place only after its own hash has proved right; small bodies come back in memory.
 *
 * Requests on one connection are answered in order. A connection dials when a request needs it, and dials again
 * after it was closed; when it breaks before the first byte of an answer, everything outstanding is asked once
 * more at once (GETs are idempotent), then the oldest request fails with the reason and the others are LOST.
 *
 * All functions may be called from any one thread at a time; none of them blocks on the network. */
#ifndef FCAS_RECEIVER_RECEIVER_H
#define FCAS_RECEIVER_RECEIVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

#include "common/status.h"
#include "receiver/job.h"
#include "receiver/response.h"

typedef struct fcas_rx fcas_rx;
typedef struct fcas_rx_conn fcas_rx_conn;

typedef struct {
    uint32_t n_threads;     /* 1..64 */
    size_t   memory_max;    /* bytes of chunk buffers, all connections together; one buffer is always granted */
    uint32_t connect_ms;    /* deadlines, each > 0 */
    uint32_t first_byte_ms; /* from the moment a request is the oldest one on its connection and was sent */
    uint32_t stall_ms;      /* without a byte of the body; also for the whole head after its first byte */
    const fcas_sha256_kernel *kernel; /* for bodies into memory; NULL: the default one */
} fcas_rx_config;

/* How a request ended. The numbers are shown to Python. */
enum fcas_rx_outcome {
    FCAS_RX_OK = 0,
    FCAS_RX_NOTHING,         /* 204 */
    FCAS_RX_BUSY,            /* 503; the connection stays open */
    FCAS_RX_NOT_FOUND,       /* 404 */
    FCAS_RX_STATUS,          /* another status, in http_status */
    FCAS_RX_CORRUPT,         /* the bytes do not hash to the name; nothing was written */
    FCAS_RX_REFUSED,         /* the response broke the protocol; `refusal` says how */
    FCAS_RX_UNREACHABLE,     /* connect failed with sys_errno */
    FCAS_RX_CONNECT_TIMEOUT,
    FCAS_RX_FIRST_TIMEOUT,   /* no answer */
    FCAS_RX_STALLED,         /* the body stopped */
    FCAS_RX_RESET,           /* closed or reset (sys_errno, 0 = closed) before the first byte, twice */
    FCAS_RX_TRUNCATED,       /* closed or reset within the answer */
    FCAS_RX_WRITE_FAILED,    /* the destination refused: sys_errno; the chunk itself was right */
    FCAS_RX_NO_MEMORY,
    FCAS_RX_LOST,            /* not begun, because an older request broke the connection */
    FCAS_RX_CANCELLED        /* the connection was closed by us */
};

enum { FCAS_RX_ANY_INDEX = 0xffffffffu };

typedef struct fcas_rx_request {
    struct fcas_rx_request *next;
    fcas_rx_conn *conn;
    /* asked */
    uint64_t id;           /* the caller's, comes back */
    bool     chosen;       /* by the peer: a NEXT */
    fcas_rx_job *job;      /* NULL: into memory */
    uint32_t index;        /* of the chunk; FCAS_RX_ANY_INDEX until the answer to a NEXT names it */
    bool     has_hash;     /* memory: `hash` is what the body must hash to */
    uint8_t  hash[32];
    uint64_t max_length;   /* memory */
    uint32_t first_byte_ms;/* 0: the default */
    /* answered */
    int      outcome;      /* enum fcas_rx_outcome */
    int      refusal;      /* enum fcas_rx_refusal */
    int      sys_errno;
    uint16_t http_status;
    unsigned flags;        /* FCAS_RX_HASH_OK ... of a chunk */
    uint64_t length;       /* bytes of body that arrived */
    uint64_t service_us;   /* from being the oldest request, sent, to its last byte */
    uint64_t connect_us;   /* how long the connection's last dial took: a round trip */
    uint8_t *body;         /* memory, `length` bytes, freed with the request */
    uint8_t  digest[32];   /* what a corrupt body hashed to */
    /* internal */
    bool     sent;
    uint64_t since_us;
    size_t   n_target;
    char     target[];
} fcas_rx_request;

/* Start the threads. FCAS_E_ARG, FCAS_E_NOMEM, FCAS_E_SYS. */
fcas_status fcas_rx_new(const fcas_rx_config *config, fcas_rx **out);
/* Stop and join the threads (at once: nothing is waited for), close every socket, free everything. */
void fcas_rx_free(fcas_rx *rx);
/* Readable when results are waiting. Owned by the receiver. */
int fcas_rx_eventfd(const fcas_rx *rx);

/* A connection to an address, dialled on its first request. `host` (Host: header) and `fields` (further header
 * lines, each with its CRLF, may be empty) are copied; both must be free of what the caller did not check.
 * NULL: no memory. */
fcas_rx_conn *fcas_rx_open(fcas_rx *rx, const struct sockaddr *address, socklen_t n_address, const char *host,
                           const char *fields);
/* Close it and forget it: outstanding requests end as CANCELLED. conn must not be used afterwards. */
void fcas_rx_close(fcas_rx_conn *conn);
/* Bytes of successful answers' bodies received on it so far (any thread may ask). */
uint64_t fcas_rx_conn_bytes(const fcas_rx_conn *conn);

/* Allocate a request; target is copied (at most 1,000 bytes, else NULL). Fill in the rest, then submit. */
fcas_rx_request *fcas_rx_request_new(const char *target, size_t n_target);
/* The same for a chunk of a job's file, asked for by its hash. index: of a chunk that the file has. */
fcas_rx_request *fcas_rx_request_chunk(fcas_rx_job *job, uint32_t index);
/* Queue one or more requests, linked by ->next, in their order; they belong to the receiver until they come back from
 * fcas_rx_take. Holds their jobs. Wakes the connection's thread once at most. */
void fcas_rx_submit(fcas_rx_conn *conn, fcas_rx_request *requests);
/* All finished requests, oldest first, linked by ->next; clears the eventfd. Each is to be given to
 * fcas_rx_request_free. */
fcas_rx_request *fcas_rx_take(fcas_rx *rx);
void fcas_rx_request_free(fcas_rx_request *request);

/* Bytes of chunk buffers that exist at the moment. */
size_t fcas_rx_memory(fcas_rx *rx);

/* What a thread has spent its time on since it started, nanoseconds of wall-clock time. The rest it waited. */
typedef struct {
    uint64_t receive_ns; /* copying from sockets */
    uint64_t hash_ns;
    uint64_t write_ns;   /* into part files */
} fcas_rx_times;
/* Those of thread `number` (any thread may ask). False: there is no such thread. */
bool fcas_rx_thread_times(const fcas_rx *rx, uint32_t number, fcas_rx_times *out);

#endif
