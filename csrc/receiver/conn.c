/* One connection: its socket, its requests on their way out, and its end. Answers are read in answer.c. */
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "receiver/internal.h"

/* --- the socket --- */

void fcas_rx_conn_watch(fcas_rx_conn *c, int op, bool writing)
{
    struct epoll_event event = {.events = EPOLLIN | (writing ? (uint32_t)EPOLLOUT : 0u), .data = {.ptr = c}};
    c->watching_write = writing;
    (void)epoll_ctl(c->owner->epoll_fd, op, c->fd, &event);
}

void fcas_rx_conn_drop_body(fcas_rx_conn *c)
{
    fcas_rx_pool_put(&c->owner->rx->pool, c->buffer);
    c->buffer = NULL;
    c->body = BODY_NONE;
    c->n_body = c->at_body = 0;
    c->waits_for_buffer = false;
}

void fcas_rx_conn_close_socket(fcas_rx_conn *c)
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
    fcas_rx_conn_drop_body(c);
    for (fcas_rx_request *r = c->first; r != NULL; r = r->next) {
        r->sent = false;
        free(r->body);
        r->body = NULL;
    }
}

/* Take the oldest request off the connection: its answer is complete, or there will be none. */
fcas_rx_request *fcas_rx_conn_take_oldest(fcas_rx_conn *c)
{
    fcas_rx_request *r = c->first;
    c->first = r->next;
    if (c->first == NULL) {
        c->last = NULL;
    }
    c->owner->n_asked--;
    const uint64_t now = fcas_rx_clock_us();
    r->service_us = r->since_us != 0 ? now - r->since_us : 0;
    r->connect_us = c->connect_us;
    if (c->first != NULL && c->first->sent) {
        c->first->since_us = now;
    }
    return r;
}

/* Take the oldest request off the connection and report it. */
void fcas_rx_conn_finish(fcas_rx_conn *c, int outcome)
{
    fcas_rx_request *r = fcas_rx_conn_take_oldest(c);
    if (outcome != FCAS_RX_OK) {
        free(r->body);
        r->body = NULL;
    }
    r->outcome = outcome;
    fcas_rx_deliver(c->owner->rx, r, r);
}

/* The connection is broken. The oldest request is to blame, unless it may be asked again. */
void fcas_rx_conn_broken(fcas_rx_conn *c, int outcome, int sys_errno)
{
    const bool unanswered = outcome == FCAS_RX_RESET;
    fcas_rx_conn_close_socket(c);
    if (c->first == NULL) {
        return;
    }
    if (unanswered && !c->asked_twice) {
        c->asked_twice = true;
        fcas_rx_conn_dial(c);
        return;
    }
    c->asked_twice = false;
    c->first->sys_errno = sys_errno;
    fcas_rx_conn_finish(c, outcome);
    while (c->first != NULL) {
        c->first->since_us = 0;
        fcas_rx_conn_finish(c, FCAS_RX_LOST);
    }
}

void fcas_rx_conn_refuse(fcas_rx_conn *c, int refusal)
{
    c->first->refusal = refusal;
    fcas_rx_conn_broken(c, FCAS_RX_REFUSED, 0);
}

void fcas_rx_conn_opened(fcas_rx_conn *c)
{
    c->state = CONN_OPEN;
    c->connect_us = fcas_rx_clock_us() - c->dial_us;
    c->deadline_us = 0;
}

void fcas_rx_conn_dial(fcas_rx_conn *c)
{
    const int one = 1;
    c->fd = socket(c->address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) {
        fcas_rx_conn_broken(c, FCAS_RX_UNREACHABLE, errno);
        return;
    }
    (void)setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    c->dial_us = fcas_rx_clock_us();
    c->state = CONN_DIALLING;
    if (connect(c->fd, (const struct sockaddr *)&c->address, c->n_address) != 0 && errno != EINPROGRESS) {
        fcas_rx_conn_broken(c, FCAS_RX_UNREACHABLE, errno);
        return;
    }
    c->deadline_us = c->dial_us + (uint64_t)fcas_rx_conn_config(c)->connect_ms * 1000u;
    fcas_rx_conn_watch(c, EPOLL_CTL_ADD, true);
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
        r->since_us = fcas_rx_clock_us();
    }
}

void fcas_rx_conn_arm_first_byte(fcas_rx_conn *c)
{
    const uint32_t own = c->first->first_byte_ms;
    c->deadline_us = fcas_rx_clock_us() + (uint64_t)(own != 0 ? own : fcas_rx_conn_config(c)->first_byte_ms) * 1000u;
}

void fcas_rx_conn_send(fcas_rx_conn *c)
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
            fcas_rx_conn_broken(c, c->body == BODY_NONE && c->n_head == 0 ? FCAS_RX_RESET : FCAS_RX_TRUNCATED, errno);
            return;
        }
        c->at_out += (size_t)n;
        sent_any = true;
    }
    if (c->state != CONN_OPEN) {
        return;
    }
    if (sent_any && c->deadline_us == 0 && c->first != NULL && !c->waits_for_buffer) {
        fcas_rx_conn_arm_first_byte(c);
    }
    const bool pending = c->at_out != c->n_out;
    if (pending != c->watching_write && !c->waits_for_buffer) {
        fcas_rx_conn_watch(c, EPOLL_CTL_MOD, pending);
    }
}
