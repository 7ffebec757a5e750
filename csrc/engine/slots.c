/* Upload slots: requests for chunks that name a peer (Fastcas-Peer) are answered so many at a time; the others wait in one
 * queue, first come, first served. A request for a named chunk is refused ("busy") when more bytes wait than the uplink
 * sends in WAIT_S; NEXT waits like the others and is never refused. Requests without the field take no part in this.
 *
 * A waiting request stays unread in its connection's buffer and is parsed again when its turn comes, so that what it asks
 * for is looked up then. A slot is held from there to the end of the response. Whoever cannot be written to for
 * UNWRITABLE_NS while others wait gives its slot up and goes on without.
 *
 * Bytes of a connection count for at most WAIT_S of what it lately took, so that a slow receiver makes nobody busy. The
 * uplink's rate is measured over windows in which a slot was in use all the time, and falls slowly when there are none
 * that reach it; until it is known, nobody is refused. */
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include "engine/internal.h"

#define WAIT_S         0.1
#define UNWRITABLE_NS  50000000ll
#define WINDOW_NS      200000000ll
#define UPLINK_KEPT    0.98  /* per window */
#define TOOK_KEPT      0.75  /* per response */
#define TOOK_NS_MIN    1000000ll /* shorter ones went to the socket buffer at once */
#define UNSENT_MAX     65536 /* what the kernel may hold unsent for a peer elsewhere: waiting is to be seen by us */

/* ---- what waits ---- */

static uint64_t counted(const fcas_conn *c, uint64_t bytes)
{
    double most = c->took * WAIT_S;
    return c->took > 0 && most < (double)bytes ? (uint64_t)most : bytes;
}

static uint64_t waiting_bytes(const fcas_engine *e)
{
    uint64_t sum = e->queue_bytes;
    for (uint32_t i = 0; i < e->n_holders; i++) {
        const fcas_conn *c = e->holders[i];
        sum += counted(c, c->state == CONN_SENDING ? c->body_left + (c->mem_len - c->mem_at) : c->asked);
    }
    return sum;
}

static void leave_queue(fcas_engine *e, fcas_conn *c)
{
    if (c->wait_prev)
        c->wait_prev->wait_next = c->wait_next;
    else
        e->queue_head = c->wait_next;
    if (c->wait_next)
        c->wait_next->wait_prev = c->wait_prev;
    else
        e->queue_tail = c->wait_prev;
    e->queue_bytes -= c->queued_bytes;
}

static void enter_queue(fcas_engine *e, fcas_conn *c)
{
    c->wait_next = NULL;
    c->wait_prev = e->queue_tail;
    if (e->queue_tail)
        e->queue_tail->wait_next = c;
    else
        e->queue_head = c;
    e->queue_tail = c;
    c->queued_bytes = (uint32_t)counted(c, c->asked);
    e->queue_bytes += c->queued_bytes;
    c->state = CONN_QUEUED;
    fcas_timer_set(e, c, TIMER_NONE);
    fcas_engine_count(e, FCAS_CTR_PEER_QUEUED, 1);
}

/* ---- slots ---- */

static void hold(fcas_engine *e, fcas_conn *c)
{
    if (e->n_holders == 0) {
        e->window_ns = e->now_ns;
        e->window_bytes = e->bytes_sent + e->delta[FCAS_CTR_BYTES_SENT];
    }
    e->holders[e->n_holders++] = c;
    c->slot = (uint8_t)e->n_holders;
    c->turn_ns = e->now_ns;
    c->turn_sent = c->sent;
    c->blocked_ns = 0;
}

static void start_next(fcas_engine *e)
{
    while (e->queue_head && e->n_holders < e->config.slots) {
        fcas_conn *c = e->queue_head;
        leave_queue(e, c);
        hold(e, c);
        c->state = CONN_READING;
        fcas_http_init(&c->req);
        fcas_conn_make_ready(e, c);
    }
}

void fcas_slot_release(fcas_engine *e, fcas_conn *c)
{
    if (!c->slot)
        return;
    uint64_t bytes = c->sent - c->turn_sent;
    int64_t  ns = e->now_ns - c->turn_ns;
    if (bytes) {
        float rate = (float)((double)bytes * 1e9 / (double)(ns > TOOK_NS_MIN ? ns : TOOK_NS_MIN));
        float kept = c->took * (float)TOOK_KEPT;
        c->took = rate > kept ? rate : kept;
    }
    fcas_conn *last = e->holders[--e->n_holders];
    e->holders[c->slot - 1] = last;
    last->slot = c->slot;
    c->slot = 0;
    start_next(e);
}

void fcas_slot_leave(fcas_engine *e, fcas_conn *c)
{
    if (c->state == CONN_QUEUED)
        leave_queue(e, c);
    else
        fcas_slot_release(e, c);
}

int fcas_slot_admit(fcas_engine *e, fcas_conn *c, uint32_t bytes, int may_refuse)
{
    if (!e->config.slots || c->slot)
        return 0;
    if (!c->is_peer && !c->local) {
        int most = UNSENT_MAX;
        setsockopt(c->fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &most, sizeof most);
    }
    c->is_peer = 1;
    if (may_refuse && e->uplink > 0 && e->n_holders && (double)waiting_bytes(e) > WAIT_S * e->uplink) {
        fcas_engine_count(e, FCAS_CTR_PEER_BUSY, 1);
        return 503;
    }
    c->asked = bytes;
    if (e->queue_head || e->n_holders >= e->config.slots) {
        enter_queue(e, c);
        return FCAS_SLOT_QUEUED;
    }
    hold(e, c);
    return 0;
}

/* ---- the clock ---- */

static void measure(fcas_engine *e)
{
    if (e->now_ns - e->window_ns < WINDOW_NS)
        return;
    uint64_t sent = e->bytes_sent + e->delta[FCAS_CTR_BYTES_SENT];
    double   rate = (double)(sent - e->window_bytes) * 1e9 / (double)(e->now_ns - e->window_ns);
    e->uplink = rate > e->uplink * UPLINK_KEPT ? rate : e->uplink * UPLINK_KEPT;
    e->window_ns = e->now_ns;
    e->window_bytes = sent;
}

void fcas_slots_run(fcas_engine *e)
{
    int64_t first_ns = 0;
    measure(e);
    if (!e->queue_head)
        return;
    for (uint32_t i = e->n_holders; i-- > 0;) {
        fcas_conn *c = e->holders[i];
        if (!c->blocked_ns)
            continue;
        if (e->now_ns - c->blocked_ns >= UNWRITABLE_NS) {
            fcas_engine_count(e, FCAS_CTR_SLOT_LOST, 1);
            fcas_slot_release(e, c);
        } else if (!first_ns || c->blocked_ns < first_ns) {
            first_ns = c->blocked_ns;
        }
    }
    if (first_ns && e->queue_head)
        fcas_wake_after(e, first_ns + UNWRITABLE_NS - e->now_ns);
}

void fcas_slots_publish(fcas_engine *e, fcas_counter_slot *slot)
{
    fcas_gauge(slot, FCAS_CTR_QUEUE_BYTES, e->n_holders ? waiting_bytes(e) : 0);
    fcas_gauge(slot, FCAS_CTR_UPLINK_RATE, (uint64_t)e->uplink);
}
