/* Deadlines: one FIFO list per class. All connections of a list have the same delay, so the oldest is the head. */
#include "engine/internal.h"

#include <linux/sockios.h>
#include <sys/ioctl.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define IDLE_SLACK_NS 100000000ll
#define DRAIN_IDLE_NS 1000000000ll /* while draining, nobody is waited for longer */
#define STALL_CHECKS  15 /* a send check comes every stall_ns / STALL_CHECKS, which is how late a stall is seen at most */

static void unlink_timer(fcas_engine *e, fcas_conn *c)
{
    fcas_timer_list *list = &e->timers[c->timer];
    if (c->prev)
        c->prev->next = c->next;
    else
        list->head = c->next;
    if (c->next)
        c->next->prev = c->prev;
    else
        list->tail = c->prev;
}

void fcas_timer_set(fcas_engine *e, fcas_conn *c, fcas_timer t)
{
    if (t == TIMER_IDLE && c->timer == TIMER_IDLE && e->now_ns - c->timer_ns < IDLE_SLACK_NS)
        return;
    if (c->timer != TIMER_NONE)
        unlink_timer(e, c);
    c->timer = (uint8_t)t;
    c->timer_ns = e->now_ns;
    if (t == TIMER_NONE)
        return;
    fcas_timer_list *list = &e->timers[t];
    c->next = NULL;
    c->prev = list->tail;
    if (list->tail)
        list->tail->next = c;
    else
        list->head = c;
    list->tail = c;
}

/* What the peer has acknowledged so far: a full socket buffer that drains slowly is progress, too. */
static uint64_t acknowledged(const fcas_conn *c)
{
    int queued = 0;
    if (ioctl(c->fd, SIOCOUTQ, &queued) != 0 || queued < 0 || (uint64_t)queued > c->sent)
        return c->sent;
    return c->sent - (uint64_t)queued;
}

void fcas_timer_watch_send(fcas_engine *e, fcas_conn *c)
{
    if (c->timer == TIMER_SEND)
        return;
    c->acked = c->window_acked = acknowledged(c);
    c->progress_ns = c->window_ns = e->now_ns;
    fcas_timer_set(e, c, TIMER_SEND);
}

static void check_send(fcas_engine *e, fcas_conn *c)
{
    uint64_t acked = acknowledged(c);
    int      too_slow = 0;
    if (c->limited) { /* it waits for us: the time since the last check does not count against it */
        c->window_ns += e->now_ns - c->timer_ns;
        c->progress_ns = e->now_ns;
    } else if (acked > c->acked) {
        c->progress_ns = e->now_ns;
    }
    c->acked = acked;
    if (e->now_ns - c->window_ns >= e->config.rate_window_ns) {
        double window_s = (double)(e->now_ns - c->window_ns) * 1e-9;
        too_slow = (double)(acked - c->window_acked) < window_s * e->config.min_rate;
        c->window_ns = e->now_ns;
        c->window_acked = acked;
    }
    if (too_slow || e->now_ns - c->progress_ns >= e->config.stall_ns) {
        fcas_engine_count(e, too_slow ? FCAS_CTR_EVICT_SLOW : FCAS_CTR_EVICT_STALL, 1);
        fcas_conn_close(e, c, 1);
    } else {
        fcas_timer_set(e, c, TIMER_SEND);
    }
}

int fcas_wake_after(fcas_engine *e, int64_t ns)
{
    struct itimerspec once = {.it_value = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000}};
    if (e->wake_ns && e->wake_ns <= e->now_ns + ns)
        return 1;
    if (timerfd_settime(e->wake, 0, &once, NULL) != 0)
        return 0;
    e->wake_ns = e->now_ns + ns;
    return 1;
}

void fcas_wake_fired(fcas_engine *e)
{
    uint64_t count;
    ssize_t  n = read(e->wake, &count, sizeof count);
    (void)n;
    e->wake_ns = 0;
    e->limit_sleeps = 0;
}

void fcas_timers_expire(fcas_engine *e)
{
    for (int t = 0; t < TIMER_COUNT; t++) {
        fcas_timer_list *list = &e->timers[t];
        int64_t          after = list->after_ns;
        if (t == TIMER_SEND)
            after /= STALL_CHECKS;
        else if (t != TIMER_LINGER && e->draining && after > DRAIN_IDLE_NS)
            after = DRAIN_IDLE_NS;
        while (list->head && e->now_ns - list->head->timer_ns >= after) {
            fcas_conn *c = list->head;
            switch (t) {
            case TIMER_SEND:
                check_send(e, c);
                break;
            case TIMER_HEADER:
                fcas_engine_count(e, FCAS_CTR_EVICT_HEADER, 1);
                fcas_conn_close(e, c, 0);
                break;
            case TIMER_IDLE:
                fcas_engine_count(e, FCAS_CTR_EVICT_IDLE, e->draining ? 0 : 1);
                fcas_conn_close(e, c, 0);
                break;
            default:
                fcas_conn_close(e, c, 0);
                break;
            }
        }
    }
}
