/* The progress checks of a response, on a clock of our own: when a connection that takes nothing is closed. */
#include <errno.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "engine/internal.h"

#define SECOND 1000000000ll
#define TICK   (SECOND / 4)
#define START  (1000 * SECOND)

#define CHECK(what)                                                                                                    \
    do {                                                                                                               \
        if (!(what)) {                                                                                                 \
            fprintf(stderr, "line %d: not true: %s (errno %d)\n", __LINE__, #what, errno);                             \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static int        listener;
static fcas_engine *e;
static fcas_counter_slot *counters;

static void open_engine(int64_t stall_ns, uint32_t min_rate)
{
    fcas_engine_config config = {.listener = listener, .max_connections = 10, .max_cached = 1, .max_parked = 1,
                                 .header_ns = 10 * SECOND, .idle_ns = 60 * SECOND, .stall_ns = stall_ns,
                                 .rate_window_ns = 60 * SECOND, .min_rate = min_rate, .counters = counters};
    memset(counters, 0, sizeof *counters);
    CHECK(fcas_engine_create(&e, &config, START) == FCAS_OK);
}

/* A connection whose socket is full, as after a send that would block; the other end is *client. */
static fcas_conn *full_connection(int *client)
{
    struct sockaddr_in address;
    socklen_t          length = sizeof address;
    static const char  BYTES[65536];
    *client = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(*client >= 0 && getsockname(listener, (struct sockaddr *)&address, &length) == 0);
    CHECK(connect(*client, (struct sockaddr *)&address, length) == 0);
    struct timespec pause = {.tv_nsec = 1000000};
    int             fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) < 0)
        nanosleep(&pause, NULL);
    fcas_conn *c = fcas_conn_new(e, fd);
    CHECK(c);
    /* until nothing goes in although the other end's kernel had the time to take what it can */
    int outq = 0, before = -1;
    for (int same = 0; same < 20;) {
        ssize_t n;
        while ((n = send(fd, BYTES, sizeof BYTES, MSG_NOSIGNAL)) > 0)
            c->sent += (uint64_t)n;
        CHECK(ioctl(fd, SIOCOUTQ, &outq) == 0);
        same = outq == before ? same + 1 : 0;
        before = outq;
        nanosleep(&pause, NULL);
    }
    CHECK(outq > 0);
    c->state = CONN_SENDING;
    e->n_sending++;
    fcas_timer_watch_send(e, c);
    return c;
}

/* Let time pass up to `until`; returns when c was closed, or 0. */
static int64_t pass(const fcas_conn *c, int64_t until)
{
    while (e->now_ns < until) {
        fcas_engine_tick(e, e->now_ns + TICK);
        if (c->state == CONN_FREE)
            return e->now_ns;
    }
    return 0;
}

static uint64_t count(fcas_counter which)
{
    return atomic_load(&counters->v[which]);
}

static void stall(void)
{
    int client;
    open_engine(30 * SECOND, 0);
    fcas_conn *c = full_connection(&client);
    int64_t    closed = pass(c, START + 100 * SECOND);
    CHECK(closed >= START + 30 * SECOND && closed <= START + 32 * SECOND + TICK);
    CHECK(count(FCAS_CTR_EVICT_STALL) == 1 && count(FCAS_CTR_EVICT_SLOW) == 0);
    close(client);
    fcas_engine_destroy(e);
}

static void progress_starts_it_anew(void)
{
    static char     sink[1 << 20];
    struct timespec pause = {.tv_nsec = 1000000};
    int             client, before = 0, now = 0;
    open_engine(30 * SECOND, 0);
    fcas_conn *c = full_connection(&client);
    CHECK(pass(c, START + 20 * SECOND) == 0);
    CHECK(ioctl(c->fd, SIOCOUTQ, &before) == 0);
    do { /* until something was acknowledged */
        CHECK(recv(client, sink, sizeof sink, MSG_DONTWAIT) > 0 || errno == EAGAIN);
        nanosleep(&pause, NULL);
        CHECK(ioctl(c->fd, SIOCOUTQ, &now) == 0);
    } while (now == before);
    int64_t closed = pass(c, START + 200 * SECOND);
    CHECK(closed >= START + 50 * SECOND && closed <= START + 54 * SECOND + TICK);
    close(client);
    fcas_engine_destroy(e);
}

static void waiting_for_us_is_no_stall(void)
{
    int client;
    open_engine(30 * SECOND, 1024);
    fcas_conn *c = full_connection(&client);
    c->limited = 1; /* it waits for its turn under the upload limit */
    CHECK(pass(c, START + 300 * SECOND) == 0);
    c->limited = 0;
    int64_t since = e->now_ns, closed = pass(c, START + 600 * SECOND);
    CHECK(closed >= since + 28 * SECOND && closed <= since + 32 * SECOND + TICK);
    close(client);
    fcas_engine_destroy(e);
}

static void minimum_rate(void)
{
    int client;
    open_engine(1000 * SECOND, 1024);
    fcas_conn *c = full_connection(&client);
    int64_t    closed = pass(c, START + 200 * SECOND), check = 1000 * SECOND / 15;
    CHECK(closed >= START + 60 * SECOND && closed <= START + check + TICK);
    CHECK(count(FCAS_CTR_EVICT_SLOW) == 1 && count(FCAS_CTR_EVICT_STALL) == 0);
    close(client);
    fcas_engine_destroy(e);
}

int main(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    signal(SIGPIPE, SIG_IGN);
    counters = aligned_alloc(64, sizeof *counters);
    listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    CHECK(counters && listener >= 0 && bind(listener, (struct sockaddr *)&address, sizeof address) == 0);
    CHECK(listen(listener, 16) == 0);
    stall();
    progress_starts_it_anew();
    waiting_for_us_is_no_stall();
    minimum_rate();
    close(listener);
    free(counters);
    return 0;
}
