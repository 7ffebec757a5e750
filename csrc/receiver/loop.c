/* One thread's loop: what the caller ordered, what its connections and its writes have ready, deadlines. */
#include <errno.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "receiver/internal.h"

#define TICK_MS 100
#define WAIT_MS 5
/* Chunks that are whole wait so long at most for others that can be checked beside them, */
#define GATHER_US 8000u
/* and only where they follow each other as fast as this: otherwise whoever waits for them gains more by having them. */
#define QUICK_US 1000u
/* While others are being written, chunks that have ended wait so long at most before the caller is told of them all at
 * once. */
#define TELL_MS 4

static void writable(fcas_rx_conn *c)
{
    if (c->state == CONN_DIALLING) {
        int error = 0;
        socklen_t n = sizeof error;
        (void)getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &n);
        if (error != 0) {
            fcas_rx_conn_broken(c, FCAS_RX_UNREACHABLE, error);
            return;
        }
        fcas_rx_conn_opened(c);
    }
    fcas_rx_conn_send(c);
}

static void on_event(fcas_rx_conn *c, uint32_t events)
{
    if (c->state == CONN_DIALLING ? (events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) != 0 : (events & EPOLLOUT) != 0) {
        writable(c);
    }
    if (c->state == CONN_OPEN && (events & (EPOLLIN | EPOLLERR | EPOLLHUP)) != 0) {
        fcas_rx_conn_read(c);
        if (c->state == CONN_OPEN && c->first != NULL) {
            fcas_rx_conn_send(c);
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
    c->owner->n_asked++;
}

static void cancel_all(fcas_rx_conn *c)
{
    fcas_rx_conn_close_socket(c);
    while (c->first != NULL) {
        fcas_rx_conn_finish(c, FCAS_RX_CANCELLED);
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
            fcas_rx_conn_dial(c);
        } else if (c->state == CONN_OPEN) {
            fcas_rx_conn_send(c);
        }
    }
}

static void check_deadlines(fcas_rx_thread *t)
{
    const uint64_t now = fcas_rx_clock_us();
    for (fcas_rx_conn *c = t->conns; c != NULL; c = c->next) {
        if (c->deadline_us == 0 || now < c->deadline_us) {
            continue;
        }
        if (c->first == NULL) {
            c->deadline_us = 0;
        } else if (c->state == CONN_DIALLING) {
            fcas_rx_conn_broken(c, FCAS_RX_CONNECT_TIMEOUT, ETIMEDOUT);
        } else {
            const bool begun = c->body != BODY_NONE || c->n_head > 0;
            fcas_rx_conn_broken(c, begun ? FCAS_RX_STALLED : FCAS_RX_FIRST_TIMEOUT, 0);
        }
    }
}

static void serve_waiting(fcas_rx_thread *t)
{
    t->someone_waits = false;
    for (fcas_rx_conn *c = t->conns; c != NULL; c = c->next) {
        if (c->waits_for_buffer && fcas_rx_conn_have_buffer(c) && fcas_rx_conn_digest_head(c)) {
            fcas_rx_conn_read(c);
        }
    }
}

/* Whether the caller need not be told yet of the chunks that have ended: it would only be told of others soon. */
static bool may_keep(const fcas_rx_thread *t)
{
    const fcas_rx_settler *s = &t->settler;
    return s->n_writing > 0 && s->n_ended < FCAS_RX_TOGETHER && t->n_asked > 0 &&
           fcas_rx_clock_us() - s->ended_since_us < TELL_MS * 1000u;
}

/* How long to wait for events. Whole chunks wait while more than them are still to come: many are checked at once, and
 * the connections have enough to send meanwhile. Not where they hold the buffers that others wait for. */
static int patience_ms(const fcas_rx_thread *t)
{
    const fcas_rx_settler *s = &t->settler;
    if (s->n_whole > 0) {
        const bool more = t->n_asked > s->n_whole && s->gap_us < QUICK_US && !t->someone_waits;
        return more && fcas_rx_clock_us() - s->whole_since_us < GATHER_US ? 1 : 0;
    }
    if (s->n_ended > 0) {
        return TELL_MS;
    }
    return t->someone_waits ? WAIT_MS : TICK_MS;
}

void *fcas_rx_thread_main(void *argument)
{
    fcas_rx_thread *t = argument;
    struct epoll_event events[64];
    uint64_t next_tick = fcas_rx_clock_us() + TICK_MS * 1000u;
    bool running = true;
    while (running) {
        if (!may_keep(t)) {
            fcas_rx_settler_tell(&t->settler);
        }
        const int wait_ms = patience_ms(t);
        const int n = epoll_wait(t->epoll_fd, events, 64, wait_ms);
        bool ordered = false;
        if (n <= 0 && wait_ms == 0) {
            fcas_rx_settle(&t->settler);
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
        if (fcas_rx_clock_us() >= next_tick) {
            check_deadlines(t);
            next_tick = fcas_rx_clock_us() + TICK_MS * 1000u;
        }
    }
    while (t->conns != NULL) {
        fcas_rx_conn *c = t->conns;
        cancel_all(c);
        unlist(t, c);
        fcas_rx_conn_free(c);
    }
    fcas_rx_settler_destroy(&t->settler);
    return NULL;
}
