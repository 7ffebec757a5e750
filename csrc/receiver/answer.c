/* The answers on one connection: heads are parsed, bodies go where they belong. Whole chunks go on to settle.c. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "receiver/internal.h"

/* Bytes received at a time at most. */
#define SLICE (1024u * 1024u)
/* A head is read in pieces of this size, so that little of the body has to be moved out of head[]. */
#define HEAD_READ 1024u
/* A connection yields to the others after this many bytes. */
#define TURN (1024u * 1024u)
/* The body of an answer that is no success is read and dropped up to here; above, the connection is closed. */
#define DISCARD_MAX (64u * 1024u)

static void extend_stall(fcas_rx_conn *c)
{
    c->deadline_us = fcas_rx_clock_us() + (uint64_t)fcas_rx_conn_config(c)->stall_ms * 1000u;
}

/* The oldest request has had its whole answer and was taken off: go on with the next. */
static void go_on(fcas_rx_conn *c)
{
    const bool closing = c->close_after;
    c->asked_twice = false;
    c->deadline_us = 0;
    if (closing) {
        fcas_rx_conn_close_socket(c);
        if (c->first != NULL) {
            fcas_rx_conn_dial(c);
        }
    } else if (c->first != NULL && c->first->sent) {
        fcas_rx_conn_arm_first_byte(c);
    }
}

/* The oldest request has its whole answer. */
static void answered(fcas_rx_conn *c, int outcome)
{
    fcas_rx_conn_drop_body(c);
    fcas_rx_conn_finish(c, outcome);
    go_on(c);
}

/* A chunk is whole: whether it is right does not matter to its connection, which goes on. */
static void chunk_complete(fcas_rx_conn *c)
{
    fcas_rx_buffer *buffer = c->buffer;
    c->buffer = NULL;
    fcas_rx_conn_drop_body(c);
    fcas_rx_settler_add(&c->owner->settler, fcas_rx_conn_take_oldest(c), buffer);
    go_on(c);
}

static void memory_complete(fcas_rx_conn *c)
{
    fcas_rx_request *r = c->first;
    if (r->has_hash) {
        fcas_sha256_final(&c->hash, r->digest);
        if (memcmp(r->digest, r->hash, 32) != 0) {
            answered(c, FCAS_RX_CORRUPT);
            return;
        }
    }
    answered(c, FCAS_RX_OK);
}

static int outcome_of_status(uint16_t status)
{
    switch (status) {
    case 204:
        return FCAS_RX_NOTHING;
    case 404:
        return FCAS_RX_NOT_FOUND;
    case 503:
        return FCAS_RX_BUSY;
    default:
        return FCAS_RX_STATUS;
    }
}

static void body_complete(fcas_rx_conn *c)
{
    switch (c->body) {
    case BODY_CHUNK:
        chunk_complete(c);
        break;
    case BODY_MEMORY:
        memory_complete(c);
        break;
    default:
        answered(c, outcome_of_status(c->first->http_status));
    }
}

/* A successful answer's body is about to come: decide where it goes. False: the connection was broken. */
static bool expect_body(fcas_rx_conn *c)
{
    fcas_rx_request *r = c->first;
    const fcas_rx_response *response = &c->response;
    if (r->job == NULL) {
        if (response->length > r->max_length) {
            fcas_rx_conn_refuse(c, FCAS_RX_REFUSE_OTHER_LENGTH);
            return false;
        }
        r->body = malloc((size_t)response->length + 1);
        if (r->body == NULL) {
            fcas_rx_conn_broken(c, FCAS_RX_NO_MEMORY, ENOMEM);
            return false;
        }
        fcas_sha256_init(&c->hash, fcas_rx_conn_config(c)->kernel);
        c->body = BODY_MEMORY;
        return true;
    }
    if (r->index == FCAS_RX_ANY_INDEX) {
        if (!response->has_chunk || response->chunk >= FCAS_RX_ANY_INDEX ||
            fcas_rx_job_length(r->job, (uint32_t)response->chunk) == 0) {
            fcas_rx_conn_refuse(c, FCAS_RX_REFUSE_CHUNK_NUMBER);
            return false;
        }
        r->index = (uint32_t)response->chunk;
    }
    if (response->length != fcas_rx_job_length(r->job, r->index) ||
        (r->index >= r->job->layout.n_chunks && r->job->parity_fd < 0)) {
        fcas_rx_conn_refuse(c, FCAS_RX_REFUSE_OTHER_LENGTH);
        return false;
    }
    c->body = BODY_CHUNK;
    return true;
}

/* A chunk buffer, or false: the connection rests, out of the epoll set, until there is one. */
bool fcas_rx_conn_have_buffer(fcas_rx_conn *c)
{
    bool no_memory;
    if (c->body != BODY_CHUNK || c->buffer != NULL) {
        return true;
    }
    c->buffer = fcas_rx_pool_get(&c->owner->rx->pool, c->first->job->layout.chunk_size, &no_memory);
    if (c->buffer != NULL) {
        if (c->waits_for_buffer) {
            c->waits_for_buffer = false;
            fcas_rx_conn_watch(c, EPOLL_CTL_ADD, c->at_out != c->n_out);
            extend_stall(c);
        }
        return true;
    }
    if (no_memory) {
        fcas_rx_conn_broken(c, FCAS_RX_NO_MEMORY, ENOMEM);
    } else if (!c->waits_for_buffer) {
        c->waits_for_buffer = true;
        c->deadline_us = 0;
        (void)epoll_ctl(c->owner->epoll_fd, EPOLL_CTL_DEL, c->fd, NULL);
    }
    c->owner->someone_waits = c->owner->someone_waits || c->waits_for_buffer;
    return false;
}

static uint8_t *body_at(fcas_rx_conn *c)
{
    switch (c->body) {
    case BODY_CHUNK:
        return c->buffer->bytes + c->at_body;
    case BODY_MEMORY:
        return c->first->body + c->at_body;
    default:
        return c->head + FCAS_RX_HEAD_MAX / 2; /* dropped bytes; the lower half may hold the next head */
    }
}

/* n bytes of the body lie at body_at(). */
static void body_arrived(fcas_rx_conn *c, size_t n)
{
    if (c->body == BODY_MEMORY && c->first->has_hash) {
        fcas_sha256_update(&c->hash, body_at(c), n);
    }
    if (c->body != BODY_DISCARD) {
        atomic_fetch_add_explicit(&c->n_received, (uint64_t)n, memory_order_relaxed);
    }
    c->at_body += n;
    c->first->length = c->at_body;
    extend_stall(c);
    if (c->at_body == c->n_body) {
        body_complete(c);
    }
}

/* Work on what lies in head[]: whole heads, and bodies that came with them. False: nothing more to do here. */
bool fcas_rx_conn_digest_head(fcas_rx_conn *c)
{
    while (c->n_head > 0 && c->state == CONN_OPEN) {
        if (c->first == NULL || !c->first->sent) {
            if (c->first != NULL) {
                fcas_rx_conn_refuse(c, FCAS_RX_REFUSE_UNASKED);
            } else {
                fcas_rx_conn_close_socket(c);
            }
            return false;
        }
        if (c->body == BODY_NONE) {
            const int r = fcas_rx_parse_response(c->head, c->n_head, &c->response);
            if (r < 0) {
                fcas_rx_conn_refuse(c, -r);
                return false;
            }
            if (r == 0) {
                return true;
            }
            c->n_head -= (uint32_t)c->response.n_head;
            memmove(c->head, c->head + c->response.n_head, c->n_head);
            c->close_after = c->response.close;
            c->first->http_status = c->response.status;
            c->n_body = c->response.length;
            c->at_body = 0;
            if (c->response.status == 200) {
                if (!expect_body(c)) {
                    return false;
                }
            } else if (c->n_body > DISCARD_MAX) {
                fcas_rx_conn_refuse(c, FCAS_RX_REFUSE_OTHER_LENGTH);
                return false;
            } else {
                c->body = BODY_DISCARD;
            }
            extend_stall(c);
            if (c->n_body == 0) {
                body_complete(c);
                continue;
            }
        }
        if (!fcas_rx_conn_have_buffer(c)) {
            return false;
        }
        const size_t left = (size_t)(c->n_body - c->at_body);
        const size_t n = left < c->n_head ? left : c->n_head;
        if (c->body != BODY_DISCARD) {
            memcpy(body_at(c), c->head, n);
        }
        c->n_head -= (uint32_t)n;
        memmove(c->head, c->head + n, c->n_head);
        if (n > 0) {
            body_arrived(c, n);
        }
    }
    return c->state == CONN_OPEN;
}

void fcas_rx_conn_read(fcas_rx_conn *c)
{
    size_t turn = 0;
    while (c->state == CONN_OPEN && !c->waits_for_buffer && turn < TURN) {
        const bool in_body = c->body != BODY_NONE;
        if (in_body && !fcas_rx_conn_have_buffer(c)) {
            return;
        }
        uint8_t *to = c->head + c->n_head;
        size_t want = FCAS_RX_HEAD_MAX - c->n_head < HEAD_READ ? FCAS_RX_HEAD_MAX - c->n_head : HEAD_READ;
        if (in_body) {
            const uint64_t left = c->n_body - c->at_body;
            const size_t most = c->body == BODY_DISCARD ? FCAS_RX_HEAD_MAX / 2 : SLICE;
            to = body_at(c);
            want = left < most ? (size_t)left : most;
        }
        const uint64_t from_ns = fcas_rx_clock_ns();
        const ssize_t n = recv(c->fd, to, want, 0);
        fcas_rx_spent(&c->owner->receive_ns, from_ns);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0 && errno == EAGAIN) {
            return;
        }
        if (n <= 0) {
            const bool begun = in_body || c->n_head > 0;
            fcas_rx_conn_broken(c, begun ? FCAS_RX_TRUNCATED : FCAS_RX_RESET, n < 0 ? errno : 0);
            return;
        }
        turn += (size_t)n;
        if (in_body) {
            body_arrived(c, (size_t)n);
            continue;
        }
        if (c->n_head == 0) {
            extend_stall(c); /* for the whole head: not again until it is complete */
        }
        c->n_head += (uint32_t)n;
        if (!fcas_rx_conn_digest_head(c)) {
            return;
        }
    }
}
