/* The connection machine: READING -> (QUEUED -> READING)? -> (SENDING | PARKED -> SENDING) -> READING ... -> LINGERING
 * -> free. */
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "engine/internal.h"

#define SLAB_CONNS      64u
#define POOLED_INPUTS   256u
#define LINGER_READS    16

/* ---- slots ---- */

fcas_conn *fcas_conn_at(const fcas_engine *e, uint32_t index)
{
    return index / SLAB_CONNS < e->n_slabs ? &e->slabs[index / SLAB_CONNS][index % SLAB_CONNS] : NULL;
}

static int add_slab(fcas_engine *e)
{
    fcas_conn **slabs = realloc(e->slabs, (e->n_slabs + 1) * sizeof *slabs);
    if (!slabs)
        return -1;
    e->slabs = slabs;
    fcas_conn *slab = calloc(SLAB_CONNS, sizeof *slab);
    if (!slab)
        return -1;
    for (uint32_t i = SLAB_CONNS; i-- > 0;) {
        slab[i].index = e->n_slabs * SLAB_CONNS + i;
        slab[i].next = e->free_conns;
        e->free_conns = &slab[i];
    }
    e->slabs[e->n_slabs++] = slab;
    return 0;
}

fcas_conn *fcas_conn_new(fcas_engine *e, int fd)
{
    if (!e->free_conns && add_slab(e) != 0)
        return NULL;
    fcas_conn *c = e->free_conns;
    e->free_conns = c->next;
    memset(&c->state, 0, sizeof *c - offsetof(fcas_conn, state));
    c->birth++;
    c->fd = fd;
    c->state = CONN_READING;
    c->timer = TIMER_NONE;
    e->n_conns++;
    return c;
}

/* ---- input buffers ---- */

static uint8_t *new_input(fcas_engine *e)
{
    uint8_t *buffer = e->free_inputs;
    if (buffer) {
        memcpy(&e->free_inputs, buffer, sizeof e->free_inputs);
        e->n_free_inputs--;
    } else if (!(buffer = malloc(FCAS_INPUT_SIZE))) {
        return NULL;
    }
    e->n_inputs++;
    return buffer;
}

void fcas_conn_free_input(fcas_engine *e, fcas_conn *c)
{
    if (!c->in)
        return;
    if (e->n_free_inputs < POOLED_INPUTS) {
        memcpy(c->in, &e->free_inputs, sizeof e->free_inputs);
        e->free_inputs = c->in;
        e->n_free_inputs++;
    } else {
        free(c->in);
    }
    c->in = NULL;
    c->in_len = 0;
    e->n_inputs--;
}

/* ---- responses ---- */

static fcas_counter counter_of(int status)
{
    if (status < 300)
        return FCAS_CTR_STATUS_2XX;
    switch (status) {
    case 304: return FCAS_CTR_STATUS_304;
    case 404: return FCAS_CTR_STATUS_404;
    case 416: return FCAS_CTR_STATUS_416;
    case 503: return FCAS_CTR_STATUS_503;
    default:  return FCAS_CTR_STATUS_400;
    }
}

void fcas_conn_begin(fcas_engine *e, fcas_conn *c, int status)
{
    fcas_engine_count(e, FCAS_CTR_REQUESTS, 1);
    fcas_engine_count(e, counter_of(status), 1);
    c->state = CONN_SENDING;
    e->n_sending++;
}

/* Let go of everything that a response holds; ok = it was sent whole. */
static void end_response(fcas_engine *e, fcas_conn *c, int ok)
{
    if (!c->mem_borrowed)
        free(c->mem);
    c->mem = NULL;
    c->mem_at = c->mem_len = 0;
    c->mem_borrowed = 0;
    if (c->blob) {
        fcas_epoch_leave(e, c);
        fcas_cache_put(e, c->blob);
        c->blob = NULL;
        c->body_left = 0;
    }
    if (c->run) {
        fcas_cache_put(e, c->run->manifest);
        free(c->run);
        c->run = NULL;
    }
    if (c->notify) {
        c->notify = 0;
        fcas_engine_event(e, (fcas_event){.kind = FCAS_EVENT_SENT, .handle = c->notify_handle, .ok = (uint32_t)ok});
    }
    c->use_sendfile = 0;
    e->n_sending--;
    if (c->slot)
        fcas_slot_release(e, c);
}

void fcas_conn_close(fcas_engine *e, fcas_conn *c, int reset)
{
    if (c->state == CONN_SENDING) {
        end_response(e, c, 0);
    } else if (c->state == CONN_PARKED) {
        e->n_parked--;
        fcas_engine_event(e, (fcas_event){.kind = FCAS_EVENT_GONE,
                                          .handle = (uint64_t)c->park_serial << 32 | c->index});
    }
    fcas_timer_set(e, c, TIMER_NONE);
    fcas_conn_free_input(e, c);
    fcas_slot_leave(e, c);
    fcas_limit_leave(e, c);
    fcas_source_leave(e, c);
    if (reset) {
        struct linger now = {.l_onoff = 1, .l_linger = 0};
        setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    }
    close(c->fd);
    c->fd = -1;
    c->state = CONN_FREE;
    c->next = e->free_conns;
    e->free_conns = c;
    e->n_conns--;
}

void fcas_conn_make_ready(fcas_engine *e, fcas_conn *c)
{
    if (c->in_ready)
        return;
    c->in_ready = 1;
    c->ready_next = NULL;
    if (e->ready_tail)
        e->ready_tail->ready_next = c;
    else
        e->ready_head = c;
    e->ready_tail = c;
}

/* Closing with input unread makes the kernel send RST, which can destroy the response on its way: send our end,
 * then read the rest away until the peer's end comes or the linger timer fires. */
static void linger(fcas_engine *e, fcas_conn *c)
{
    fcas_conn_free_input(e, c);
    if (c->eof) {
        fcas_conn_close(e, c, 0);
        return;
    }
    if (c->state != CONN_LINGERING) {
        c->state = CONN_LINGERING;
        fcas_timer_set(e, c, TIMER_LINGER);
        if (shutdown(c->fd, SHUT_WR) != 0) {
            fcas_conn_close(e, c, 0);
            return;
        }
    }
    for (int i = 0; i < LINGER_READS; i++) {
        ssize_t n = recv(c->fd, e->input, FCAS_INPUT_SIZE, 0);
        if (n > 0 || (n < 0 && errno == EINTR))
            continue;
        if (n < 0 && errno == EAGAIN)
            return;
        break;
    }
    fcas_conn_close(e, c, 0); /* its end, an error, or more than anybody has a reason to send */
}

/* ---- the machine ---- */

/* What conn_run holds of the input: bytes [at, end) of buf are unread. */
typedef struct {
    uint8_t *buf;
    size_t   at, end;
} input;

/* Keep unread bytes for later; -1 without memory. */
static int save_input(fcas_engine *e, fcas_conn *c, const input *in)
{
    size_t left = in->end - in->at;
    if (left == 0) {
        fcas_conn_free_input(e, c);
        return 0;
    }
    if (!c->in && !(c->in = new_input(e)))
        return -1;
    memmove(c->in, in->buf + in->at, left);
    c->in_len = (uint16_t)left;
    return 0;
}

/* Receive once. 1 = there is more input, 0 = not now, -1 = the connection is over. */
static int receive(fcas_conn *c, input *in)
{
    if (!c->readable)
        return 0;
    if (in->at) {
        memmove(in->buf, in->buf + in->at, in->end - in->at);
        in->end -= in->at;
        in->at = 0;
    }
    size_t  room = FCAS_INPUT_SIZE - in->end;
    ssize_t n;
    do
        n = recv(c->fd, in->buf + in->end, room, 0);
    while (n < 0 && errno == EINTR);
    if (n < 0 && errno == EAGAIN) {
        c->readable = 0;
        return 0;
    }
    if (n <= 0) {
        c->eof = n == 0;
        return -1;
    }
    /* A short read empties the socket; the next edge tells when there is more. After the peer's end no edge comes. */
    if ((size_t)n < room && !c->rdhup)
        c->readable = 0;
    in->end += (size_t)n;
    return 1;
}

/* c has read what it was sent so far, all but what a new connection may have in its queue: it gets more at once. Peers
 * elsewhere keep the little that upload slots allow them (slots.c). */
static void prove(fcas_conn *c)
{
    unsigned most = FCAS_UNSENT_PROVEN;
    c->proven = 1;
    if (!c->is_peer || c->local)
        setsockopt(c->fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &most, sizeof most);
}

/* SENDING: 1 = the response is done and another request may follow, 0 = blocked, -1 = c is closed or lingers. */
static int send_on(fcas_engine *e, fcas_conn *c, uint64_t *turn)
{
    uint64_t         before = c->sent;
    fcas_send_result result = fcas_send(e, c, turn);
    if (!c->proven && c->sent >= FCAS_PROVEN_BYTES)
        prove(c);
    if (c->slot && c->sent != before && fcas_slot_unwritable(e, c))
        c->slow = 1;
    if (result != SEND_BLOCKED)
        c->blocked_ns = 0;
    else if (c->sent != before || !c->blocked_ns)
        c->blocked_ns = e->now_ns;
    switch (result) {
    case SEND_DONE:
        end_response(e, c, 1);
        if (c->close_after) {
            linger(e, c);
            return -1;
        }
        c->served = 1;
        c->state = CONN_READING;
        fcas_http_init(&c->req);
        return 1;
    case SEND_BLOCKED:
    case SEND_LIMITED:
        fcas_timer_watch_send(e, c);
        return 0;
    case SEND_YIELD:
        fcas_timer_watch_send(e, c);
        fcas_conn_make_ready(e, c);
        return 0;
    default:
        fcas_conn_close(e, c, 0);
        return -1;
    }
}

void fcas_conn_run(fcas_engine *e, fcas_conn *c)
{
    if (c->state == CONN_LINGERING) {
        linger(e, c);
        return;
    }
    input    in = {c->in ? c->in : e->input, 0, c->in_len};
    uint64_t turn = FCAS_TURN_BYTES;
    unsigned requests = FCAS_TURN_REQUESTS;
    int      completed = 0;
    while (c->state == CONN_SENDING || c->state == CONN_READING) {
        if (c->state == CONN_SENDING) {
            int sent = send_on(e, c, &turn);
            if (sent < 0)
                return;
            if (sent == 0)
                break;
            continue;
        }
        int result = in.end > in.at ? fcas_http_parse(&c->req, in.buf + in.at, in.end - in.at) : FCAS_HTTP_MORE;
        if (result == FCAS_HTTP_DONE) {
            if (requests-- == 0) { /* parsed again when it is this connection's turn */
                fcas_http_init(&c->req);
                fcas_conn_make_ready(e, c);
                break;
            }
            fcas_route(e, c, in.buf + in.at);
            if (c->state == CONN_QUEUED)
                break;
            in.at += c->req.length;
            completed = 1;
        } else if (result != FCAS_HTTP_MORE) {
            c->is_head = c->req.method == FCAS_HTTP_HEAD;
            in.at = in.end;
            fcas_route_error(e, c, result, 1);
        } else {
            int more = receive(c, &in);
            if (more < 0) {
                fcas_conn_close(e, c, 0);
                return;
            }
            if (more == 0)
                break;
        }
    }
    if (save_input(e, c, &in) != 0) {
        fcas_conn_close(e, c, 0);
        return;
    }
    if (c->state == CONN_READING) {
        fcas_timer wanted = c->in || !c->served ? TIMER_HEADER : TIMER_IDLE;
        if (completed || c->timer != wanted) /* a header's deadline is absolute: bytes do not move it */
            fcas_timer_set(e, c, wanted);
    }
}
