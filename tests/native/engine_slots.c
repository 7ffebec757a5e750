/* Upload slots on a clock of our own: whom a thin uplink makes wait and who reads slowly, what waits in the kernel, and
 * what each may send. The sockets are pairs, whose SIOCOUTQ is what the other end has not read. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "engine/internal.h"

#define SECOND 1000000000ll
#define STEP   (SECOND / 100)
#define THIN   1250000.0 /* bytes per second: 10 Mbit/s */
#define CHUNK  (256u << 10)
#define N      4

#define CHECK(what)                                                                                                    \
    do {                                                                                                               \
        if (!(what)) {                                                                                                 \
            fprintf(stderr, "line %d: not true: %s (errno %d)\n", __LINE__, #what, errno);                             \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static fcas_engine engine;
static fcas_conn   conns[N + 1];
static int         others[N + 1];

static void begin(void)
{
    memset(&engine, 0, sizeof engine);
    memset(conns, 0, sizeof conns);
    engine.config.slots = N;
    engine.uplink = THIN;
    engine.now_ns = 1000 * SECOND;
    engine.wake = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    for (int i = 0; i <= N; i++) {
        int pair[2];
        CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair) == 0);
        conns[i].fd = pair[0];
        others[i] = pair[1];
    }
}

static void end(void)
{
    for (int i = 0; i <= N; i++) {
        close(conns[i].fd);
        close(others[i]);
    }
    close(engine.wake);
}

/* The connection asks for a chunk and has a slot, its socket takes nothing yet. */
static void start(fcas_conn *c)
{
    CHECK(fcas_slot_admit(&engine, c, CHUNK, 0) == 0 && c->slot);
    c->state = CONN_SENDING;
    c->body_left = CHUNK;
    c->blocked_ns = engine.now_ns;
}

static void take(fcas_conn *c, uint64_t bytes)
{
    c->sent += bytes;
    c->body_left -= bytes;
    c->blocked_ns = engine.now_ns;
}

/* All have equal shares of a thin uplink; the kernel asks for more whenever it has sent `lump` of what it holds, of
 * which it has `held` at first. Nobody is slow, nobody loses the slot that others wait for. */
static void thin_uplink(uint32_t lump, uint32_t held)
{
    begin();
    int64_t every = (int64_t)(lump * 1e9 * N / THIN), started = engine.now_ns;
    for (int i = 0; i < N; i++) {
        start(&conns[i]);
        take(&conns[i], held);
    }
    CHECK(fcas_slot_admit(&engine, &conns[N], CHUNK, 0) == FCAS_SLOT_QUEUED);
    uint32_t lumps = 0;
    while (conns[0].body_left > lump) {
        engine.now_ns += STEP;
        if (engine.now_ns - started >= (int64_t)(lumps + 1) * every) {
            lumps++;
            for (int i = 0; i < N; i++)
                take(&conns[i], lump);
        }
        engine.window_ns = engine.now_ns; /* the rate is known */
        for (int i = 0; i < N; i++)
            CHECK(!fcas_slot_unwritable(&engine, &conns[i]));
        fcas_slots_run(&engine);
    }
    CHECK(engine.n_holders == N && engine.delta[FCAS_CTR_SLOT_LOST] == 0);
    fcas_slot_release(&engine, &conns[0]);
    CHECK(conns[0].took == 0); /* its next request counts in full */
    end();
}

/* One of them reads next to nothing: it loses its slot to the one that waits, and its bytes hardly count from then on. */
static void slow_reader(void)
{
    begin();
    for (int i = 0; i < N; i++)
        start(&conns[i]);
    CHECK(fcas_slot_admit(&engine, &conns[N], CHUNK, 0) == FCAS_SLOT_QUEUED);
    for (int step = 0; step < 50 && engine.delta[FCAS_CTR_SLOT_LOST] == 0; step++) {
        engine.now_ns += STEP;
        engine.window_ns = engine.now_ns;
        for (int i = 1; i < N; i++)
            take(&conns[i], (uint64_t)(THIN / 100 / (N - 1)));
        fcas_slots_run(&engine);
    }
    CHECK(engine.delta[FCAS_CTR_SLOT_LOST] == 1 && !conns[0].slot && conns[N].slot);
    CHECK(conns[0].took > 0 && (double)conns[0].took < THIN / N / 2);
    end();
}

/* What a turn leaves in the kernel waits on: others are refused until it is gone. */
static void kernel_holds(void)
{
    static char bytes[CHUNK];
    begin();
    start(&conns[0]);
    ssize_t n = write(conns[0].fd, bytes, sizeof bytes);
    CHECK(n > (ssize_t)(THIN / 10));
    take(&conns[0], CHUNK);
    conns[0].blocked_ns = 0;
    conns[0].state = CONN_READING;
    fcas_slot_release(&engine, &conns[0]);
    CHECK(engine.n_holders == 0 && engine.n_drains == 1);
    CHECK(fcas_slot_admit(&engine, &conns[1], CHUNK, 1) == 503);
    engine.probe_ns = INT64_MAX;
    engine.now_ns += 9 * SECOND / 10;
    CHECK(fcas_slot_admit(&engine, &conns[1], CHUNK, 1) == 503);
    while (read(others[0], bytes, sizeof bytes) > 0) {
    }
    CHECK(fcas_slot_admit(&engine, &conns[1], CHUNK, 1) == 0 && engine.n_drains == 0);
    fcas_slot_leave(&engine, &conns[1]);
    start(&conns[0]); /* one that vanished keeps nobody waiting for more than a second */
    CHECK(write(conns[0].fd, bytes, sizeof bytes) > (ssize_t)(THIN / 10));
    fcas_slot_release(&engine, &conns[0]);
    engine.probe_ns = INT64_MAX;
    CHECK(fcas_slot_admit(&engine, &conns[1], CHUNK, 1) == 503);
    engine.now_ns += SECOND;
    CHECK(fcas_slot_admit(&engine, &conns[1], CHUNK, 1) == 0);
    fcas_slot_leave(&engine, &conns[1]);
    CHECK(write(conns[2].fd, bytes, sizeof bytes) > (ssize_t)(THIN / 10));
    CHECK(fcas_slot_admit(&engine, &conns[2], CHUNK, 0) == 0);
    fcas_slot_leave(&engine, &conns[2]); /* closed with bytes in the kernel: nothing stays behind */
    CHECK(engine.n_holders == 0 && engine.n_drains == 0);
    end();
}

static double cap(const fcas_conn *c)
{
    unsigned  rate = 0;
    socklen_t length = sizeof rate;
    CHECK(getsockopt(c->fd, SOL_SOCKET, SO_MAX_PACING_RATE, &rate, &length) == 0);
    return rate;
}

/* Each may send a little more than its share of the uplink; towards this host, and while nothing is known, all it likes. */
static void caps(void)
{
    begin();
    start(&conns[0]);
    CHECK(cap(&conns[0]) > THIN && cap(&conns[0]) < 1.3 * THIN);
    start(&conns[1]);
    CHECK(cap(&conns[1]) > THIN / 2 && cap(&conns[1]) < 1.3 * THIN / 2);
    engine.now_ns += SECOND;
    engine.window_ns = engine.now_ns;
    fcas_slots_run(&engine);
    CHECK(cap(&conns[0]) > THIN / 2 && cap(&conns[0]) < 1.3 * THIN / 2);
    engine.uplink = 10 * THIN;
    engine.now_ns += SECOND;
    engine.window_ns = engine.now_ns;
    fcas_slots_run(&engine);
    CHECK(cap(&conns[0]) > 10 * THIN / 2);
    engine.uplink = 1000 * THIN; /* fast enough to need none: the caps are taken off */
    engine.now_ns += SECOND;
    engine.window_ns = engine.now_ns;
    fcas_slots_run(&engine);
    CHECK(cap(&conns[0]) > 4e9 && cap(&conns[1]) > 4e9);
    engine.uplink = THIN;
    conns[2].local = 1;
    start(&conns[2]);
    CHECK(cap(&conns[2]) > 4e9);
    end();
    begin();
    engine.uplink = 0;
    start(&conns[0]);
    CHECK(cap(&conns[0]) > 4e9);
    end();
}

/* The uplink is ten times as fast as was thought: with everybody at its cap, that is known after two seconds. */
static void recovers(void)
{
    begin();
    engine.delta[FCAS_CTR_BYTES_SENT] = 1;
    for (int i = 0; i < N; i++) {
        start(&conns[i]);
        conns[i].body_left = UINT64_MAX / 2;
    }
    for (int64_t until = engine.now_ns + 2 * SECOND; engine.now_ns < until;) {
        engine.now_ns += STEP;
        for (int i = 0; i < N; i++) {
            double rate = cap(&conns[i]) < 10 * THIN / N ? cap(&conns[i]) : 10 * THIN / N;
            take(&conns[i], (uint64_t)(rate / 100));
            engine.delta[FCAS_CTR_BYTES_SENT] += (uint64_t)(rate / 100);
        }
        fcas_slots_run(&engine);
    }
    CHECK(engine.uplink > 9 * THIN && engine.uplink < 11 * THIN);
    end();
}

int main(void)
{
    thin_uplink(32768, 0);
    thin_uplink(100000, 100000);
    slow_reader();
    kernel_holds();
    caps();
    recovers();
    return 0;
}
