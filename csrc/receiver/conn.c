/* One thread's loop and its connections: dial, send requests, read answers. What is whole goes to settle.c. */
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "receiver/internal.h"

/* Bytes received at a time at most. */
#define SLICE (1024u * 1024u)
/* A head is read in pieces of this size, so that little of the body has to be moved out of head[]. */
#define HEAD_READ 1024u
/* A connection yields to the others after this many bytes. */
#define TURN (1024u * 1024u)
/* The body of an answer that is no success is read and dropped up to here; above, the connection is closed. */
#define DISCARD_MAX (64u * 1024u)
#define TICK_MS 100
#define WAIT_MS 5

static uint64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

static const fcas_rx_config *config_of(const fcas_rx_conn *c)
{
    return &c->owner->rx->config;
}

/* --- the socket --- */

static void watch(fcas_rx_conn *c, int op, bool writing)
{
    struct epoll_event event = {.events = EPOLLIN | (writing ? (uint32_t)EPOLLOUT : 0u), .data = {.ptr = c}};
    c->watching_write = writing;
    (void)epoll_ctl(c->owner->epoll_fd, op, c->fd, &event);
}

static void drop_body(fcas_rx_conn *c)
{
    fcas_rx_pool_put(&c->owner->rx->pool, c->buffer);
    c->buffer = NULL;
    c->body = BODY_NONE;
    c->n_body = c->at_body = 0;
    c->waits_for_buffer = false;
}

static void close_socket(fcas_rx_conn *c)
{
    if (c->fd >= 0) {
        close(c->fd);
    }
    c->fd = -1;
    c->state = CONN_CLOSED;
    c->deadline_us = 0;
    c->n_out = c->at_out = 0;
    c->n_head = 0;
    c->close_after = false;
    drop_body(c);
    for (fcas_rx_request *r = c->first; r != NULL; r = r->next) {
        r->sent = false;
        free(r->body);
        r->body = NULL;
    }
}

/* Take the oldest request off the connection: its answer is complete, or there will be none. */
static fcas_rx_request *take_oldest(fcas_rx_conn *c)
{
    fcas_rx_request *r = c->first;
    c->first = r->next;
    if (c->first == NULL) {
        c->last = NULL;
    }
    const uint64_t now = now_us();
    r->service_us = r->since_us != 0 ? now - r->since_us : 0;
    r->connect_us = c->connect_us;
    if (c->first != NULL && c->first->sent) {
        c->first->since_us = now;
    }
    return r;
}

/* Take the oldest request off the connection and report it. */
static void finish(fcas_rx_conn *c, int outcome)
{
    fcas_rx_request *r = take_oldest(c);
    if (outcome != FCAS_RX_OK) {
        free(r->body);
        r->body = NULL;
    }
    fcas_rx_deliver(c->owner->rx, r, outcome);
}

static void dial(fcas_rx_conn *c);

/* The connection is broken. The oldest request is to blame, unless it may be asked again. */
static void broken(fcas_rx_conn *c, int outcome, int sys_errno)
{
    const bool unanswered = outcome == FCAS_RX_RESET;
    close_socket(c);
    if (c->first == NULL) {
        return;
    }
    if (unanswered && !c->asked_twice) {
        c->asked_twice = true;
        dial(c);
        return;
    }
    c->asked_twice = false;
    c->first->sys_errno = sys_errno;
    finish(c, outcome);
    while (c->first != NULL) {
        c->first->since_us = 0;
        finish(c, FCAS_RX_LOST);
    }
}

static void refuse(fcas_rx_conn *c, int refusal)
{
    c->first->refusal = refusal;
    broken(c, FCAS_RX_REFUSED, 0);
}

static void opened(fcas_rx_conn *c)
{
    c->state = CONN_OPEN;
    c->connect_us = now_us() - c->dial_us;
    c->deadline_us = 0;
}

static void dial(fcas_rx_conn *c)
{
    const int one = 1;
    c->fd = socket(c->address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) {
        broken(c, FCAS_RX_UNREACHABLE, errno);
        return;
    }
    (void)setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    c->dial_us = now_us();
    c->state = CONN_DIALLING;
    if (connect(c->fd, (const struct sockaddr *)&c->address, c->n_address) != 0 && errno != EINPROGRESS) {
        broken(c, FCAS_RX_UNREACHABLE, errno);
        return;
    }
    c->deadline_us = c->dial_us + (uint64_t)config_of(c)->connect_ms * 1000u;
    watch(c, EPOLL_CTL_ADD, true);
}

/* --- sending --- */

/* Render as many unsent requests as fit into out[]. */
static void render(fcas_rx_conn *c)
{
    fcas_rx_request *r = c->first;
    if (c->at_out == c->n_out) {
        c->at_out = c->n_out = 0;
    }
    while (r != NULL && r->sent) {
        r = r->next;
    }
    for (; r != NULL; r = r->next) {
        const size_t room = OUT_MAX - c->n_out;
        const int n = snprintf(c->out + c->n_out, room, "GET %s HTTP/1.1\r\nHost: %s\r\n%s\r\n", r->target, c->host,
                               c->fields);
        if (n < 0 || (size_t)n >= room) {
            return;
        }
        c->n_out += (size_t)n;
        r->sent = true;
        r->since_us = now_us();
    }
}

static void arm_first_byte(fcas_rx_conn *c)
{
    const uint32_t own = c->first->first_byte_ms;
    c->deadline_us = now_us() + (uint64_t)(own != 0 ? own : config_of(c)->first_byte_ms) * 1000u;
}

static void send_requests(fcas_rx_conn *c)
{
    bool sent_any = false;
    while (c->state == CONN_OPEN && !c->close_after) {
        render(c);
        if (c->at_out == c->n_out) {
            break;
        }
        const ssize_t n = send(c->fd, c->out + c->at_out, c->n_out - c->at_out, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EINTR) {
                continue;
            }
            if (errno == EAGAIN) {
                break;
            }
            broken(c, c->body == BODY_NONE && c->n_head == 0 ? FCAS_RX_RESET : FCAS_RX_TRUNCATED, errno);
            return;
        }
        c->at_out += (size_t)n;
        sent_any = true;
    }
    if (c->state != CONN_OPEN) {
        return;
    }
    if (sent_any && c->deadline_us == 0 && c->first != NULL && !c->waits_for_buffer) {
        arm_first_byte(c);
    }
    const bool pending = c->at_out != c->n_out;
    if (pending != c->watching_write && !c->waits_for_buffer) {
        watch(c, EPOLL_CTL_MOD, pending);
    }
}

/* --- answers --- */

static void extend_stall(fcas_rx_conn *c)
{
    c->deadline_us = now_us() + (uint64_t)config_of(c)->stall_ms * 1000u;
}

/* The oldest request has had its whole answer and was taken off: go on with the next. */
static void go_on(fcas_rx_conn *c)
{
    const bool closing = c->close_after;
    c->asked_twice = false;
    c->deadline_us = 0;
    if (closing) {
        close_socket(c);
        if (c->first != NULL) {
            dial(c);
        }
    } else if (c->first != NULL && c->first->sent) {
        arm_first_byte(c);
    }
}

/* The oldest request has its whole answer. */
static void answered(fcas_rx_conn *c, int outcome)
{
    drop_body(c);
    finish(c, outcome);
    go_on(c);
}

/* A chunk is whole: whether it is right does not matter to its connection, which goes on. */
static void chunk_complete(fcas_rx_conn *c)
{
    fcas_rx_buffer *buffer = c->buffer;
    c->buffer = NULL;
    drop_body(c);
    fcas_rx_settler_add(&c->owner->settler, take_oldest(c), buffer);
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
            refuse(c, FCAS_RX_REFUSE_OTHER_LENGTH);
            return false;
        }
        r->body = malloc((size_t)response->length + 1);
        if (r->body == NULL) {
            broken(c, FCAS_RX_NO_MEMORY, ENOMEM);
            return false;
        }
        fcas_sha256_init(&c->hash, config_of(c)->kernel);
        c->body = BODY_MEMORY;
        return true;
    }
    if (r->index == FCAS_RX_ANY_INDEX) {
        if (!response->has_chunk || response->chunk >= FCAS_RX_ANY_INDEX ||
            fcas_rx_job_length(r->job, (uint32_t)response->chunk) == 0) {
            refuse(c, FCAS_RX_REFUSE_CHUNK_NUMBER);
            return false;
        }
        r->index = (uint32_t)response->chunk;
    }
    if (response->length != fcas_rx_job_length(r->job, r->index) ||
        (r->index >= r->job->layout.n_chunks && r->job->parity_fd < 0)) {
        refuse(c, FCAS_RX_REFUSE_OTHER_LENGTH);
        return false;
    }
    c->body = BODY_CHUNK;
    return true;
}

/* A chunk buffer, or false: the connection rests, out of the epoll set, until there is one. */
static bool have_buffer(fcas_rx_conn *c)
{
    bool no_memory;
    if (c->body != BODY_CHUNK || c->buffer != NULL) {
        return true;
    }
    c->buffer = fcas_rx_pool_get(&c->owner->rx->pool, c->first->job->layout.chunk_size, &no_memory);
    if (c->buffer != NULL) {
        if (c->waits_for_buffer) {
            c->waits_for_buffer = false;
            watch(c, EPOLL_CTL_ADD, c->at_out != c->n_out);
            extend_stall(c);
        }
        return true;
    }
    if (no_memory) {
        broken(c, FCAS_RX_NO_MEMORY, ENOMEM);
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
static bool digest_head(fcas_rx_conn *c)
{
    while (c->n_head > 0 && c->state == CONN_OPEN) {
        if (c->first == NULL || !c->first->sent) {
            if (c->first != NULL) {
                refuse(c, FCAS_RX_REFUSE_UNASKED);
            } else {
                close_socket(c);
            }
            return false;
        }
        if (c->body == BODY_NONE) {
            const int r = fcas_rx_parse_response(c->head, c->n_head, &c->response);
            if (r < 0) {
                refuse(c, -r);
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
                refuse(c, FCAS_RX_REFUSE_OTHER_LENGTH);
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
        if (!have_buffer(c)) {
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

static void read_answers(fcas_rx_conn *c)
{
    size_t turn = 0;
    while (c->state == CONN_OPEN && !c->waits_for_buffer && turn < TURN) {
        const bool in_body = c->body != BODY_NONE;
        if (in_body && !have_buffer(c)) {
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
            broken(c, begun ? FCAS_RX_TRUNCATED : FCAS_RX_RESET, n < 0 ? errno : 0);
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
        if (!digest_head(c)) {
            return;
        }
    }
}

/* --- the loop --- */

static void writable(fcas_rx_conn *c)
{
    if (c->state == CONN_DIALLING) {
        int error = 0;
        socklen_t n = sizeof error;
        (void)getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &n);
        if (error != 0) {
            broken(c, FCAS_RX_UNREACHABLE, error);
            return;
        }
        opened(c);
    }
    send_requests(c);
}

static void on_event(fcas_rx_conn *c, uint32_t events)
{
    if (c->state == CONN_DIALLING ? (events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) != 0 : (events & EPOLLOUT) != 0) {
        writable(c);
    }
    if (c->state == CONN_OPEN && (events & (EPOLLIN | EPOLLERR | EPOLLHUP)) != 0) {
        read_answers(c);
        if (c->state == CONN_OPEN && c->first != NULL) {
            send_requests(c);
        }
    }
}

static void list(fcas_rx_thread *t, fcas_rx_conn *c)
{
    c->prev = NULL;
    c->next = t->conns;
    if (t->conns != NULL) {
        t->conns->prev = c;
    }
    t->conns = c;
}

static void unlist(fcas_rx_thread *t, fcas_rx_conn *c)
{
    if (c->prev != NULL) {
        c->prev->next = c->next;
    } else {
        t->conns = c->next;
    }
    if (c->next != NULL) {
        c->next->prev = c->prev;
    }
}

static void enqueue(fcas_rx_request *r)
{
    fcas_rx_conn *c = r->conn;
    r->next = NULL;
    if (c->first == NULL) {
        c->first = r;
    } else {
        c->last->next = r;
    }
    c->last = r;
}

static void cancel_all(fcas_rx_conn *c)
{
    close_socket(c);
    while (c->first != NULL) {
        finish(c, FCAS_RX_CANCELLED);
    }
}

/* What the caller's thread left for this one. False: stop. */
static bool take_orders(fcas_rx_thread *t)
{
    uint64_t count;
    (void)!read(t->wake_fd, &count, sizeof count);
    pthread_mutex_lock(&t->lock);
    fcas_rx_request *inbox = t->inbox_first;
    fcas_rx_conn *opening = t->opening;
    fcas_rx_conn *closing = t->closing;
    t->inbox_first = t->inbox_last = NULL;
    t->opening = t->closing = NULL;
    const bool stop = t->stop;
    pthread_mutex_unlock(&t->lock);
    while (opening != NULL) {
        fcas_rx_conn *c = opening;
        opening = c->next;
        list(t, c);
    }
    for (fcas_rx_request *r = inbox; r != NULL;) {
        fcas_rx_request *next = r->next;
        enqueue(r);
        r = next;
    }
    while (closing != NULL) {
        fcas_rx_conn *c = closing;
        closing = c->next_closing;
        cancel_all(c);
        unlist(t, c);
        fcas_rx_conn_free(c);
    }
    return !stop;
}

/* Dial and send for connections that have unsent requests. */
static void serve_orders(fcas_rx_thread *t)
{
    for (fcas_rx_conn *c = t->conns; c != NULL; c = c->next) {
        if (c->first == NULL || c->last->sent) {
            continue;
        }
        if (c->state == CONN_CLOSED) {
            dial(c);
        } else if (c->state == CONN_OPEN) {
            send_requests(c);
        }
    }
}

static void check_deadlines(fcas_rx_thread *t)
{
    const uint64_t now = now_us();
    for (fcas_rx_conn *c = t->conns; c != NULL; c = c->next) {
        if (c->deadline_us == 0 || now < c->deadline_us) {
            continue;
        }
        if (c->first == NULL) {
            c->deadline_us = 0;
        } else if (c->state == CONN_DIALLING) {
            broken(c, FCAS_RX_CONNECT_TIMEOUT, ETIMEDOUT);
        } else {
            const bool begun = c->body != BODY_NONE || c->n_head > 0;
            broken(c, begun ? FCAS_RX_STALLED : FCAS_RX_FIRST_TIMEOUT, 0);
        }
    }
}

static void serve_waiting(fcas_rx_thread *t)
{
    t->someone_waits = false;
    for (fcas_rx_conn *c = t->conns; c != NULL; c = c->next) {
        if (c->waits_for_buffer && have_buffer(c) && digest_head(c)) {
            read_answers(c);
        }
    }
}

void *fcas_rx_thread_main(void *argument)
{
    fcas_rx_thread *t = argument;
    struct epoll_event events[64];
    uint64_t next_tick = now_us() + TICK_MS * 1000u;
    bool running = true;
    while (running) {
        const int timeout_ms = t->settler.n_whole > 0 ? 0 : t->someone_waits ? WAIT_MS : TICK_MS;
        const int n = epoll_wait(t->epoll_fd, events, 64, timeout_ms);
        bool ordered = false;
        if (n <= 0) {
            fcas_rx_settle(&t->settler); /* nothing more has arrived that could be checked beside it */
        }
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr == NULL) {
                ordered = true; /* afterwards: a closed connection may have an event in this batch */
            } else if (events[i].data.ptr == &t->settler) {
                fcas_rx_settler_written(&t->settler);
            } else {
                on_event(events[i].data.ptr, events[i].events);
            }
        }
        if (ordered) {
            running = take_orders(t);
            serve_orders(t);
        }
        if (t->someone_waits) {
            serve_waiting(t);
        }
        if (now_us() >= next_tick) {
            check_deadlines(t);
            next_tick = now_us() + TICK_MS * 1000u;
        }
    }
    while (t->conns != NULL) {
        fcas_rx_conn *c = t->conns;
        cancel_all(c);
        unlist(t, c);
        fcas_rx_conn_free(c);
    }
    return NULL;
}
