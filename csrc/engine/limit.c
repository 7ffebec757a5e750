/* The upload limit: bodies go out in slices that are taken from the bucket which all workers share. Who has a slice to
 * send waits in its source's queue, and the sources with somebody waiting stand in a ring: each turn is one slice of the
 * next source's next connection. When the bucket is empty, a timer ends the wait. Headers and answers from memory
 * never wait; what they take is charged. */
#include "engine/internal.h"

#define WAIT_NS_MIN 2000000 /* the burst covers more, so that sleeping longer than a slice takes loses nothing */
#define TURNS       64      /* before sockets are looked at again */

static void enter_ring(fcas_engine *e, fcas_source *s)
{
    s->ring_next = NULL;
    s->ring_prev = e->ring_tail;
    if (e->ring_tail)
        e->ring_tail->ring_next = s;
    else
        e->ring_head = s;
    e->ring_tail = s;
}

static void leave_ring(fcas_engine *e, fcas_source *s)
{
    if (s->ring_prev)
        s->ring_prev->ring_next = s->ring_next;
    else
        e->ring_head = s->ring_next;
    if (s->ring_next)
        s->ring_next->ring_prev = s->ring_prev;
    else
        e->ring_tail = s->ring_prev;
}

void fcas_limit_wait(fcas_engine *e, fcas_conn *c)
{
    fcas_source *s = c->source;
    if (c->limited)
        return;
    fcas_engine_count(e, FCAS_CTR_LIMIT_WAITS, 1);
    c->limited = 1;
    c->wait_next = NULL;
    c->wait_prev = s->wait_tail;
    if (s->wait_tail) {
        s->wait_tail->wait_next = c;
    } else {
        s->wait_head = c;
        enter_ring(e, s);
    }
    s->wait_tail = c;
}

void fcas_limit_leave(fcas_engine *e, fcas_conn *c)
{
    fcas_source *s = c->source;
    if (!c->limited)
        return;
    c->limited = 0;
    if (c->wait_prev)
        c->wait_prev->wait_next = c->wait_next;
    else
        s->wait_head = c->wait_next;
    if (c->wait_next)
        c->wait_next->wait_prev = c->wait_prev;
    else
        s->wait_tail = c->wait_prev;
    if (!s->wait_head)
        leave_ring(e, s);
}

void fcas_limit_run(fcas_engine *e)
{
    fcas_bucket *bucket = e->config.bucket;
    for (int i = 0; i < TURNS && e->ring_head && !e->limit_sleeps; i++) {
        fcas_source *s = e->ring_head;
        fcas_conn   *c = s->wait_head;
        uint64_t     want = c->body_left < bucket->slice ? c->body_left : bucket->slice;
        int64_t      wait_ns = fcas_bucket_take(bucket, want, e->now_ns);
        if (wait_ns > 0) {
            e->limit_sleeps = fcas_wake_after(e, wait_ns > WAIT_NS_MIN ? wait_ns : WAIT_NS_MIN);
            return;
        }
        fcas_limit_leave(e, c);
        if (s->wait_head) { /* the others first */
            leave_ring(e, s);
            enter_ring(e, s);
        }
        c->grant = (uint32_t)want;
        fcas_conn_run(e, c);
        fcas_bucket_refund(bucket, c->grant); /* also when the connection is gone: its slot is not used again yet */
        c->grant = 0;
    }
}
