/* Upload slots: requests for chunks that name a peer (Fastcas-Peer) are answered so many at a time; the others wait in
 * one queue, first come, first served. A request for a named chunk is refused ("busy") when more bytes wait than the uplink
 * sends in WAIT_S; NEXT waits like the others and is never refused. Requests without the field take no part in this.
 *
 * A waiting request stays unread in its connection's buffer and is parsed again when its turn comes, so that what it
 * asks for is looked up then. A slot is held from there to the end of the response. Whoever cannot be written to for
 * longer than its share of the uplink explains (unwritable_ns) while others wait gives its slot up and goes on without.
 *
 * Bytes of a connection that could not be written to for so long count for at most WAIT_S of what it took, now and in
 * its next turn: a slow receiver makes nobody busy. Those of a connection that waits for us count in full. However busy,
 * one request a PROBE_NS is let in: were the uplink taken for slower than it is, nobody would find out. The uplink's rate
 * is measured over windows in which a slot was in use all the time, and falls slowly when there are none that reach it;
 * what is written in the first FILL_NS after a pause says how much the kernel holds, not how fast it sends, and does not
 * count. It begins with the upload limit's rate; without a limit, GUESS_BPS is taken for it towards other hosts until it is
 * known, and this one's own programs are not refused. What a finished response has left in the kernel waits like the rest.
 *
 * Towards other hosts the kernel sends for each holder a little more than an equal share of the measured uplink at most
 * (set_cap): no flow can fill the queue before the uplink, in which everybody's acknowledgements and our own requests wait.
 */
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "engine/internal.h"

#define WAIT_S         0.085
#define WINDOW_NS      200000000ll
#define FILL_NS        200000000ll
#define UPLINK_KEPT    0.95  /* per window: a rate that was too high is halved in 3 s */
#define GUESS_BPS      12500000.0
#define UNBLOCK_NS_MAX 1000000000ll /* nobody keeps a slot longer than that without taking anything */
#define DRAIN_S        0.02 /* less than the uplink sends in this time is not worth counting */
#define DRAIN_NS_MAX   1000000000ll /* who takes longer is not here any more, or reads slowly */
#define PROBE_NS       1000000000ll
#define PROBE_NS_MAX   30000000000ll
#define PUBLISH_NS     20000000ll
#define CAP_NS         50000000ll
#define CAP_SHARES     1.2 /* a holder may send so many equal shares of the uplink, */
#define CAP_RISING     1.5 /* and so many after a window that showed RISES times the rate that was known */
#define RISES          1.05
#define CAPPED_BPS_MAX 125e6 /* a faster uplink's queue is short, and pacing costs CPU there */
#define UNSENT_MAX     65536 /* what the kernel may hold unsent for a peer elsewhere: waiting is to be seen by us */

/* ---- what waits ---- */

/* So long without room in its socket, and a connection is slow: twice what the kernel needs to send the half of
 * UNSENT_MAX after which it asks for more, if all have equal shares of the uplink. */
static int64_t unwritable_ns(const fcas_engine *e)
{
    double rate = e->uplink > 0 ? e->uplink : GUESS_BPS;
    double ns = UNSENT_MAX * 1e9 * (double)e->n_holders / rate;
    return ns < FCAS_UNWRITABLE_NS ? FCAS_UNWRITABLE_NS : ns > UNBLOCK_NS_MAX ? UNBLOCK_NS_MAX : (int64_t)ns;
}

/* Bytes per second in the turn that c has now; never 0. */
static float taking(const fcas_engine *e, const fcas_conn *c)
{
    return (float)((double)(c->sent - c->turn_sent + 1) * 1e9 / (double)(e->now_ns - c->turn_ns + 1));
}

/* A thin uplink makes everybody wait, one who reads slowly waits alone: c has had less than half of an equal share, too. */
int fcas_slot_unwritable(const fcas_engine *e, const fcas_conn *c)
{
    double rate = e->uplink > 0 ? e->uplink : GUESS_BPS;
    return c->blocked_ns && e->now_ns - c->blocked_ns >= unwritable_ns(e) &&
           2.0 * (double)taking(e, c) * (double)e->n_holders < rate;
}

static uint64_t counted(uint64_t bytes, float took)
{
    double most = took * WAIT_S;
    return took > 0 && most < (double)bytes ? (uint64_t)most : bytes;
}

/* Bytes of c that the kernel has: a thin uplink's queue is there, not here. */
static uint32_t in_kernel(const fcas_conn *c)
{
    int n = 0;
    return !c->local && ioctl(c->fd, SIOCOUTQ, &n) == 0 && n > 0 ? (uint32_t)n : 0;
}

static void end_drain(fcas_engine *e, fcas_conn *c)
{
    if (!c->draining)
        return;
    fcas_conn *last = e->drains[--e->n_drains];
    e->drains[c->draining - 1] = last;
    last->draining = c->draining;
    c->draining = 0;
}

/* What c wrote in the turn that is over goes on waiting for the uplink until the kernel has sent it: 100 KB on a thin
 * one, a tenth of a second of it. */
static void begin_drain(fcas_engine *e, fcas_conn *c)
{
    double rate = e->uplink > 0 ? e->uplink : GUESS_BPS;
    if (c->draining || e->n_drains == FCAS_SLOTS_MAX || (double)in_kernel(c) < DRAIN_S * rate)
        return;
    c->turn_ns = e->now_ns;
    e->drains[e->n_drains++] = c;
    c->draining = (uint8_t)e->n_drains;
}

static uint64_t draining_bytes(fcas_engine *e)
{
    uint64_t sum = 0;
    for (uint32_t i = e->n_drains; i-- > 0;) {
        uint32_t left = in_kernel(e->drains[i]);
        if (left && e->now_ns - e->drains[i]->turn_ns < DRAIN_NS_MAX)
            sum += counted(left, e->drains[i]->took);
        else
            end_drain(e, e->drains[i]);
    }
    return sum;
}

static uint64_t waiting_bytes(fcas_engine *e)
{
    uint64_t sum = e->queue_bytes + draining_bytes(e);
    for (uint32_t i = 0; i < e->n_holders; i++) {
        const fcas_conn *c = e->holders[i];
        uint64_t         left = c->state == CONN_SENDING ? c->body_left + (c->mem_len - c->mem_at) : c->asked;
        left += in_kernel(c);
        sum += counted(left, fcas_slot_unwritable(e, c) ? taking(e, c) : c->took);
    }
    return sum;
}

/* Whether more waits than the uplink sends in WAIT_S. */
static int is_busy(fcas_engine *e, int local)
{
    double rate = e->uplink > 0 || local ? e->uplink : GUESS_BPS;
    return rate > 0 && (e->n_holders || e->n_drains) && (double)waiting_bytes(e) > WAIT_S * rate;
}

/* At least as long as the uplink needs for two such requests: letting them in must not lengthen the queue. */
static int64_t probe_after_ns(const fcas_engine *e, uint32_t bytes)
{
    double ns = e->uplink > 0 ? 2e9 * bytes / e->uplink : 0;
    return ns < PROBE_NS ? PROBE_NS : ns > PROBE_NS_MAX ? PROBE_NS_MAX : (int64_t)ns;
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
    c->queued_bytes = (uint32_t)counted(c->asked, c->took);
    e->queue_bytes += c->queued_bytes;
    c->state = CONN_QUEUED;
    fcas_timer_set(e, c, TIMER_NONE);
    fcas_engine_count(e, FCAS_CTR_PEER_QUEUED, 1);
}

/* ---- caps ---- */

/* The kernel's model of a path may be wrong by orders of magnitude (BBR took 28 Gbit/s for the bottleneck of 100 Mbit/s
 * whose bucket was full when it looked): a flow with such a model has all its chunk in the queue before the uplink, and
 * the others starve behind it for seconds (docs/DECISIONS.md 41). A little more than equal shares are allowed, so that
 * the rate that is measured can rise, and half as much again once it does: a rate too low doubles in a second. */
static void set_cap(const fcas_engine *e, fcas_conn *c)
{
    int    is_capped = e->uplink > 0 && e->uplink <= CAPPED_BPS_MAX && !e->config.bucket && !c->local;
    double rate = (e->rising ? CAP_RISING : CAP_SHARES) * e->uplink / (double)(e->n_holders + e->n_drains);
    double near = is_capped ? rate / 16 : 1;
    if (!is_capped)
        rate = 0;
    if (rate - c->cap < near && c->cap - rate < near)
        return;
    uint32_t cap = is_capped ? (uint32_t)rate : UINT32_MAX;
    if (setsockopt(c->fd, SOL_SOCKET, SO_MAX_PACING_RATE, &cap, sizeof cap) == 0)
        c->cap = (uint32_t)rate;
}

/* ---- slots ---- */

static void hold(fcas_engine *e, fcas_conn *c)
{
    end_drain(e, c);
    if (e->n_holders == 0) {
        e->window_ns = e->now_ns + FILL_NS;
        e->window_bytes = 0;
    }
    e->holders[e->n_holders++] = c;
    c->slot = (uint8_t)e->n_holders;
    c->turn_ns = e->now_ns;
    c->turn_sent = c->sent;
    c->blocked_ns = 0;
    c->slow = 0;
    set_cap(e, c);
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
    c->took = c->slow || fcas_slot_unwritable(e, c) ? taking(e, c) : 0;
    fcas_conn *last = e->holders[--e->n_holders];
    e->holders[c->slot - 1] = last;
    last->slot = c->slot;
    c->slot = 0;
    begin_drain(e, c);
    start_next(e);
    if (!e->n_holders && e->config.counters)
        fcas_slots_publish(e, e->config.counters);
}

void fcas_slot_leave(fcas_engine *e, fcas_conn *c)
{
    if (c->state == CONN_QUEUED)
        leave_queue(e, c);
    else
        fcas_slot_release(e, c);
    end_drain(e, c);
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
    if (may_refuse && is_busy(e, c->local) && e->now_ns < e->probe_ns) {
        fcas_engine_count(e, FCAS_CTR_PEER_BUSY, 1);
        return 503;
    }
    e->probe_ns = e->now_ns + probe_after_ns(e, bytes);
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
    uint64_t sent = e->bytes_sent + e->delta[FCAS_CTR_BYTES_SENT];
    if (!e->window_bytes && e->now_ns >= e->window_ns) { /* the window begins */
        e->window_ns = e->now_ns;
        e->window_bytes = sent;
    }
    if (e->now_ns - e->window_ns < WINDOW_NS)
        return;
    double   rate = (double)(sent - e->window_bytes) * 1e9 / (double)(e->now_ns - e->window_ns);
    e->rising = rate > RISES * e->uplink;
    e->uplink = rate > e->uplink * UPLINK_KEPT ? rate : e->uplink * UPLINK_KEPT;
    if (e->config.bucket && e->uplink > (double)e->config.bucket->rate)
        e->uplink = (double)e->config.bucket->rate;
    e->window_ns = e->now_ns;
    e->window_bytes = sent;
}

void fcas_slots_run(fcas_engine *e)
{
    int64_t first_ns = 0;
    measure(e);
    if (e->now_ns - e->capped_ns >= CAP_NS) {
        e->capped_ns = e->now_ns;
        for (uint32_t i = 0; i < e->n_holders; i++)
            set_cap(e, e->holders[i]);
    }
    if (e->config.counters && e->now_ns - e->published_ns >= PUBLISH_NS)
        fcas_slots_publish(e, e->config.counters);
    if (!e->queue_head)
        return;
    for (uint32_t i = e->n_holders; i-- > 0;) {
        fcas_conn *c = e->holders[i];
        if (!c->blocked_ns)
            continue;
        if (fcas_slot_unwritable(e, c)) {
            fcas_engine_count(e, FCAS_CTR_SLOT_LOST, 1);
            fcas_slot_release(e, c);
        } else if (!first_ns || c->blocked_ns < first_ns) {
            first_ns = c->blocked_ns;
        }
    }
    if (first_ns && e->queue_head) {
        int64_t after_ns = first_ns + unwritable_ns(e) - e->now_ns;
        fcas_wake_after(e, after_ns > FCAS_UNWRITABLE_NS ? after_ns : FCAS_UNWRITABLE_NS);
    }
}

void fcas_slots_publish(fcas_engine *e, fcas_counter_slot *slot)
{
    e->published_ns = e->now_ns;
    fcas_gauge(slot, FCAS_CTR_QUEUE_BYTES, e->n_holders || e->n_drains ? waiting_bytes(e) : 0);
    fcas_gauge(slot, FCAS_CTR_UPLINK_RATE, (uint64_t)e->uplink);
}
