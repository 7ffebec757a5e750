/* The upload limit: one token bucket for all bodies of this engine. Who finds it empty waits in the ready list, which a
 * timer runs every 10 ms meanwhile; headers and answers from memory are not limited. */
#include <sys/timerfd.h>
#include <unistd.h>

#include "engine/internal.h"

#define REFILL_NS    10000000
#define BURST_S      0.05
#define BURST_AT_LEAST 65536.0

fcas_status fcas_limit_init(fcas_engine *e)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = FCAS_LIMIT_TAG};
    e->refill = -1;
    if (!e->config.max_upload)
        return FCAS_OK;
    e->upload_at_ns = e->now_ns;
    e->refill = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    return e->refill >= 0 && epoll_ctl(e->epfd, EPOLL_CTL_ADD, e->refill, &event) == 0 ? FCAS_OK : FCAS_E_SYS;
}

void fcas_limit_destroy(fcas_engine *e)
{
    if (e->refill >= 0)
        close(e->refill);
}

uint64_t fcas_limit_allowance(fcas_engine *e)
{
    if (!e->config.max_upload)
        return UINT64_MAX;
    double rate = (double)e->config.max_upload;
    double burst = rate * BURST_S > BURST_AT_LEAST ? rate * BURST_S : BURST_AT_LEAST;
    e->upload_tokens += rate * (double)(e->now_ns - e->upload_at_ns) * 1e-9;
    e->upload_at_ns = e->now_ns;
    if (e->upload_tokens > burst)
        e->upload_tokens = burst;
    return e->upload_tokens < 1.0 ? 0 : (uint64_t)e->upload_tokens;
}

void fcas_limit_spend(fcas_engine *e, uint64_t n)
{
    if (e->config.max_upload)
        e->upload_tokens -= (double)n;
}

void fcas_limit_wait(fcas_engine *e)
{
    struct itimerspec once = {.it_value = {.tv_nsec = REFILL_NS}};
    if (!e->limited && timerfd_settime(e->refill, 0, &once, NULL) == 0)
        e->limited = 1;
}

void fcas_limit_refilled(fcas_engine *e)
{
    uint64_t count;
    if (read(e->refill, &count, sizeof count) == (ssize_t)sizeof count)
        e->limited = 0;
}
