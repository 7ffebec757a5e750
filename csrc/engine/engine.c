/* The engine as a whole: creation, the epoll loop, accepting, ticks, tables, draining. */
#include "engine/engine.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "engine/internal.h"

#define ACCEPT_BATCH   64
#define LISTENER_TAG   UINT64_MAX
#define KICK_TAG       (UINT64_MAX - 1)
#define LINGER_NS      2000000000ll
#define CLIENT_EVENTS  (EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET)

/* ---- accepting ---- */

static int listen_on(fcas_engine *e)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = LISTENER_TAG};
    if (e->listening || e->draining || !e->has_table)
        return 0;
    if (epoll_ctl(e->epfd, EPOLL_CTL_ADD, e->config.listener, &event) != 0)
        return -1;
    e->listening = 1;
    return 0;
}

static void listen_off(fcas_engine *e)
{
    if (e->listening)
        epoll_ctl(e->epfd, EPOLL_CTL_DEL, e->config.listener, NULL);
    e->listening = 0;
}

/* Remember where the peer is, as an IPv6 address. */
static void set_source(fcas_conn *c, const struct sockaddr_storage *from)
{
    static const uint8_t MAPPED[12] = {[10] = 0xff, [11] = 0xff}, LOCAL6[16] = {[15] = 1};
    if (from->ss_family == AF_INET6) {
        const struct sockaddr_in6 *a = (const struct sockaddr_in6 *)(const void *)from;
        memcpy(c->ip, &a->sin6_addr, 16);
        c->port = ntohs(a->sin6_port);
    } else {
        const struct sockaddr_in *a = (const struct sockaddr_in *)(const void *)from;
        memcpy(c->ip, MAPPED, 12);
        memcpy(c->ip + 12, &a->sin_addr, 4);
        c->port = ntohs(a->sin_port);
    }
    c->local = (memcmp(c->ip, MAPPED, 12) == 0 && c->ip[12] == 127) || memcmp(c->ip, LOCAL6, 16) == 0;
}

static void pause_accept(fcas_engine *e)
{
    e->accept_at_ns = e->now_ns + e->config.accept_pause_ns;
    listen_off(e);
}

/* No descriptors left: give up the spare one to take a connection off the queue and drop it, so that its client
 * knows, and leave the listener alone for a while. */
static void accept_without_fds(fcas_engine *e)
{
    fcas_engine_count(e, FCAS_CTR_ACCEPT_EMFILE, 1);
    if (e->spare >= 0) {
        close(e->spare);
        int fd = accept4(e->config.listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd >= 0)
            close(fd);
        e->spare = open("/dev/null", O_RDONLY | O_CLOEXEC);
    }
    pause_accept(e);
}

/* One answer to a connection that will be closed; what it has sent is read away, so that closing does not destroy it. */
static void refuse(fcas_engine *e, int fd)
{
    static const char FULL[] = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n"
                               "Retry-After: 1\r\nConnection: close\r\n\r\nbusy\n";
    if (send(fd, FULL, sizeof FULL - 1, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0)
        shutdown(fd, SHUT_WR);
    ssize_t n = recv(fd, e->input, FCAS_INPUT_SIZE, MSG_DONTWAIT);
    (void)n;
}

static void accept_some(fcas_engine *e)
{
    for (int i = 0; i < ACCEPT_BATCH; i++) {
        struct sockaddr_storage from;
        socklen_t               from_len = sizeof from;
        int fd = accept4(e->config.listener, (struct sockaddr *)&from, &from_len, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)
                accept_without_fds(e);
            else if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED && errno != EPROTO)
                pause_accept(e);
            if (errno == EINTR || errno == ECONNABORTED || errno == EPROTO)
                continue;
            return;
        }
        fcas_conn *c = e->n_conns < e->config.max_connections ? fcas_conn_new(e, fd) : NULL;
        if (!c) {
            fcas_engine_count(e, FCAS_CTR_EVICT_CAP, 1);
            refuse(e, fd);
            close(fd);
            continue;
        }
        set_source(c, &from);
        if (fcas_source_enter(e, c) != 0) {
            fcas_engine_count(e, FCAS_CTR_EVICT_SOURCE, 1);
            refuse(e, fd);
            fcas_conn_close(e, c, 0);
            continue;
        }
        if (!c->local && e->congestion_len)
            setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, e->congestion, e->congestion_len);
        struct epoll_event event = {.events = CLIENT_EVENTS, .data.u64 = (uint64_t)c->birth << 32 | c->index};
        fcas_timer_set(e, c, TIMER_HEADER);
        fcas_engine_count(e, FCAS_CTR_ACCEPTED, 1);
        if (epoll_ctl(e->epfd, EPOLL_CTL_ADD, fd, &event) != 0)
            fcas_conn_close(e, c, 0);
    }
}

/* ---- the loop ---- */

static void client_event(fcas_engine *e, uint64_t tag, uint32_t events)
{
    fcas_conn *c = fcas_conn_at(e, (uint32_t)tag);
    if (!c || c->birth != tag >> 32 || c->state == CONN_FREE)
        return; /* closed earlier in this batch */
    if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        c->readable = 1;
    if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        c->rdhup = 1;
    if (c->state == CONN_PARKED || c->state == CONN_QUEUED) {
        if (c->rdhup)
            fcas_conn_close(e, c, 0);
    } else {
        fcas_conn_run(e, c);
    }
}

/* One turn for each connection that was ready when it began. */
static void run_ready(fcas_engine *e)
{
    fcas_conn *last = e->ready_tail;
    for (fcas_conn *c = e->ready_head; c;) {
        e->ready_head = c->ready_next;
        if (!e->ready_head)
            e->ready_tail = NULL;
        c->in_ready = 0;
        int was_last = c == last;
        if (c->state != CONN_FREE && c->state != CONN_PARKED && c->state != CONN_QUEUED)
            fcas_conn_run(e, c);
        c = was_last ? NULL : e->ready_head;
    }
}

/* Whether the next run has something to do even if no socket has. */
static int has_work(const fcas_engine *e)
{
    return e->ready_head || (e->ring_head && !e->limit_sleeps);
}

/* The kick keeps the epoll fd readable while somebody waits for a turn. */
static void set_kick(fcas_engine *e, int wanted)
{
    uint64_t value = 1;
    ssize_t  done;
    if (wanted == e->kicked)
        return;
    done = wanted ? write(e->kick, &value, sizeof value) : read(e->kick, &value, sizeof value);
    if (done == sizeof value)
        e->kicked = wanted;
}

void fcas_engine_kick(fcas_engine *e)
{
    if (has_work(e) || e->parked_head || e->n_events)
        set_kick(e, 1);
}

static void flush_counters(fcas_engine *e)
{
    fcas_counter_slot *slot = e->config.counters;
    e->bytes_sent += e->delta[FCAS_CTR_BYTES_SENT];
    if (!slot) {
        memset(e->delta, 0, sizeof e->delta);
        return;
    }
    for (int i = 0; i < FCAS_CTR_COUNT; i++) {
        if (e->delta[i]) {
            fcas_count(slot, (fcas_counter)i, e->delta[i]);
            e->delta[i] = 0;
        }
    }
    fcas_gauge(slot, FCAS_CTR_ACTIVE, e->n_conns);
    fcas_gauge(slot, FCAS_CTR_HEARTBEAT_NS, (uint64_t)e->now_ns);
}

static unsigned finish_turn(fcas_engine *e)
{
    if (e->n_holders)
        fcas_slots_run(e);
    set_kick(e, has_work(e));
    fcas_epoch_refresh(e);
    flush_counters(e);
    return (e->parked_head ? FCAS_ENGINE_PARKED : 0u) | (e->n_events ? FCAS_ENGINE_EVENTS : 0u) |
           (e->draining && e->n_conns == 0 ? FCAS_ENGINE_DRAINED : 0u);
}

unsigned fcas_engine_run(fcas_engine *e, unsigned max_events, int64_t now_ns)
{
    e->now_ns = now_ns;
    fcas_epoch_refresh(e);
    unsigned done = 0;
    int      n;
    do {
        run_ready(e);
        n = epoll_wait(e->epfd, e->batch, FCAS_BATCH, 0);
        for (int i = 0; i < n; i++) {
            uint64_t tag = e->batch[i].data.u64;
            if (tag == LISTENER_TAG)
                accept_some(e);
            else if (tag == FCAS_WAKE_TAG)
                fcas_wake_fired(e);
            else if (tag != KICK_TAG)
                client_event(e, tag, e->batch[i].events);
        }
        if (e->ring_head)
            fcas_limit_run(e);
        done += n > 0 ? (unsigned)n : 0;
    } while (n > 0 && done < max_events && !e->parked_head);
    return finish_turn(e);
}

static void set_date(fcas_engine *e)
{
    struct timespec now;
    struct tm       parts;
    clock_gettime(CLOCK_REALTIME_COARSE, &now);
    if (now.tv_sec == e->date_s && e->date_len)
        return;
    e->date_s = now.tv_sec;
    if (gmtime_r(&now.tv_sec, &parts)) /* in the C locale, which Python leaves LC_TIME in */
        e->date_len = strftime(e->date, sizeof e->date, "Date: %a, %d %b %Y %H:%M:%S GMT\r\n", &parts);
}

unsigned fcas_engine_tick(fcas_engine *e, int64_t now_ns)
{
    e->now_ns = now_ns;
    set_date(e);
    fcas_timers_expire(e);
    if (e->wake_ns && now_ns >= e->wake_ns)
        fcas_wake_fired(e);
    fcas_epoch_refresh(e);
    if (e->has_table && e->swept_epoch != fcas_table_epoch(&e->table)) {
        e->swept_epoch = fcas_table_epoch(&e->table);
        fcas_cache_sweep(e);
    }
    if (e->config.counters)
        fcas_slots_publish(e, e->config.counters);
    if (e->spare < 0)
        e->spare = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (!e->listening && !e->draining && now_ns >= e->accept_at_ns && listen_on(e) != 0)
        pause_accept(e);
    return finish_turn(e);
}

/* ---- table, drain, the owner's queues ---- */

fcas_status fcas_engine_set_table(fcas_engine *e, int fd, uint64_t number)
{
    fcas_table  table;
    fcas_status status = fcas_table_map(&table, fd);
    if (status != FCAS_OK)
        return status;
    if (e->has_table)
        fcas_table_unmap(&e->table);
    e->table = table;
    e->has_table = 1;
    e->table_number = number;
    e->swept_epoch = 0;
    memset(e->reported, 0, sizeof e->reported);
    fcas_epoch_restart(e);
    if (listen_on(e) != 0)
        pause_accept(e);
    return FCAS_OK;
}

void fcas_engine_drain(fcas_engine *e)
{
    e->draining = 1;
    listen_off(e);
}

fcas_parked *fcas_engine_take_parked(fcas_engine *e)
{
    fcas_parked *p = e->parked_head;
    if (p) {
        e->parked_head = p->next;
        if (!p->next)
            e->parked_tail = NULL;
        p->next = NULL;
    }
    return p;
}

void fcas_engine_event(fcas_engine *e, fcas_event event)
{
    if (e->n_events == FCAS_EVENTS_MAX) {
        /* An owner that takes none for so long gets the newest ones: a lost withdrawal is reported again. */
        e->events_at = (e->events_at + 1) % FCAS_EVENTS_MAX;
        e->n_events--;
    }
    e->events[(e->events_at + e->n_events++) % FCAS_EVENTS_MAX] = event;
}

int fcas_engine_take_event(fcas_engine *e, fcas_event *out)
{
    if (e->n_events == 0)
        return 0;
    *out = e->events[e->events_at];
    e->events_at = (e->events_at + 1) % FCAS_EVENTS_MAX;
    e->n_events--;
    return 1;
}

/* ---- questions of the owner ---- */

fcas_status fcas_engine_lookup_file(fcas_engine *e, const uint8_t file_hash[32], uint8_t manifest_hash[32])
{
    fcas_place place;
    return e->has_table ? fcas_table_lookup_file(&e->table, file_hash, manifest_hash, &place) : FCAS_E_NOTFOUND;
}

fcas_status fcas_engine_manifest_length(fcas_engine *e, const uint8_t manifest_hash[32], uint64_t *length)
{
    fcas_place place;
    if (!e->has_table || fcas_table_lookup(&e->table, FCAS_ENTRY_MANIFEST, manifest_hash, &place) != FCAS_OK)
        return FCAS_E_NOTFOUND;
    *length = place.length;
    return FCAS_OK;
}

fcas_status fcas_engine_read_manifest(fcas_engine *e, const uint8_t manifest_hash[32], uint64_t offset, uint8_t *out,
                                      size_t n)
{
    fcas_place place;
    int        busy;
    if (!e->has_table || fcas_table_lookup(&e->table, FCAS_ENTRY_MANIFEST, manifest_hash, &place) != FCAS_OK)
        return FCAS_E_NOTFOUND;
    if (offset > place.length || n > place.length - offset)
        return FCAS_E_ARG;
    fcas_cached *b = fcas_cache_get(e, place, &busy);
    if (!b)
        return FCAS_E_NOTFOUND;
    ssize_t got = pread(b->fd, out, n, (off_t)(place.offset + offset));
    if (got != (ssize_t)n)
        fcas_cache_withdraw(e, b, FCAS_BLOB_UNREADABLE);
    fcas_cache_put(e, b);
    return got == (ssize_t)n ? FCAS_OK : FCAS_E_CORRUPT;
}

size_t fcas_engine_have(fcas_engine *e, const uint8_t *keys, size_t n, uint8_t *found)
{
    fcas_place places[256];
    size_t     total = 0;
    if (!e->has_table) {
        memset(found, 0, n);
        return 0;
    }
    for (size_t i = 0; i < n; i += 256) {
        size_t part = n - i < 256 ? n - i : 256;
        total += fcas_table_lookup_many(&e->table, FCAS_ENTRY_CHUNK, keys + 32 * i, part, places, found + i);
    }
    return total;
}

void fcas_engine_statistics(const fcas_engine *e, fcas_engine_stats *out)
{
    *out = (fcas_engine_stats){.connections = e->n_conns,
                               .sending = e->n_sending,
                               .parked = e->n_parked,
                               .cached = e->n_cached,
                               .inputs = e->n_inputs,
                               .in_flight = e->count[0] + e->count[1],
                               .table_number = e->table_number,
                               .conn_size = sizeof(fcas_conn)};
}

/* ---- creation ---- */

int fcas_engine_fd(const fcas_engine *e)
{
    return e->epfd;
}

/* Loopback peers get an unpaced congestion control: where the system's default is BBR, its pacing timers cost two thirds
 * of the CPU of a 1 MiB response, on a path that has nothing to pace (bench/serve.py). Once a connection is paced it
 * stays so; therefore the listener, which connections inherit from, has "reno", and accept_some gives the others the
 * system's default back. That is read from the system: the listener may have been another worker's before. */
static void set_congestion_control(fcas_engine *e)
{
    static const char UNPACED[] = "reno";
    int     fd = open("/proc/sys/net/ipv4/tcp_congestion_control", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, e->congestion, sizeof e->congestion);
    if (fd >= 0)
        close(fd);
    while (n > 0 && e->congestion[n - 1] == '\n')
        n--;
    if (n <= 0 || (size_t)n >= sizeof e->congestion || setsockopt(e->config.listener, IPPROTO_TCP, TCP_CONGESTION,
                                                                   UNPACED, sizeof UNPACED - 1) != 0)
        return;
    e->congestion_len = (socklen_t)n;
}

static fcas_status open_engine(fcas_engine *e)
{
    e->input = malloc(FCAS_INPUT_SIZE);
    e->scratch = malloc(FCAS_SCRATCH_SIZE);
    e->events = calloc(FCAS_EVENTS_MAX, sizeof *e->events);
    if (!e->input || !e->scratch || !e->events || fcas_cache_init(e) != FCAS_OK)
        return FCAS_E_NOMEM;
    e->epfd = epoll_create1(EPOLL_CLOEXEC);
    e->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    e->wake = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    e->spare = open("/dev/null", O_RDONLY | O_CLOEXEC);
    int flags = fcntl(e->config.listener, F_GETFL);
    if (e->epfd < 0 || e->kick < 0 || e->wake < 0 || e->spare < 0 || flags < 0 ||
        fcntl(e->config.listener, F_SETFL, flags | O_NONBLOCK) != 0)
        return FCAS_E_SYS;
    /* accepted sockets inherit all three */
    int          one = 1;
    unsigned int timeout_ms = (unsigned)(e->config.stall_ns / 1000000), unsent = FCAS_UNSENT_NEW;
    setsockopt(e->config.listener, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(e->config.listener, IPPROTO_TCP, TCP_USER_TIMEOUT, &timeout_ms, sizeof timeout_ms);
    setsockopt(e->config.listener, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent, sizeof unsent);
    set_congestion_control(e);
    if (getrandom(e->source_secret, sizeof e->source_secret, 0) != (ssize_t)sizeof e->source_secret)
        return FCAS_E_SYS;
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = KICK_TAG};
    struct epoll_event wake = {.events = EPOLLIN, .data.u64 = FCAS_WAKE_TAG};
    if (epoll_ctl(e->epfd, EPOLL_CTL_ADD, e->kick, &event) != 0 ||
        epoll_ctl(e->epfd, EPOLL_CTL_ADD, e->wake, &wake) != 0)
        return FCAS_E_SYS;
    return FCAS_OK;
}

fcas_status fcas_engine_create(fcas_engine **out, const fcas_engine_config *config, int64_t now_ns)
{
    if (config->max_connections < 1 || config->max_connections > 1000000 || config->max_cached < 1 ||
        config->send_path < FCAS_SEND_AUTO || config->send_path > FCAS_SEND_COPY || config->header_ns <= 0 ||
        config->idle_ns <= 0 || config->stall_ns <= 0 || config->rate_window_ns <= 0 || config->accept_pause_ns < 0 ||
        config->slots > FCAS_SLOTS_MAX)
        return FCAS_E_ARG;
    fcas_engine *e = calloc(1, sizeof *e);
    if (!e)
        return FCAS_E_NOMEM;
    e->config = *config;
    e->epfd = e->kick = e->wake = e->spare = -1;
    e->now_ns = now_ns;
    e->uplink = config->bucket ? (double)config->bucket->rate : 0;
    e->timers[TIMER_HEADER].after_ns = config->header_ns;
    e->timers[TIMER_IDLE].after_ns = config->idle_ns;
    e->timers[TIMER_SEND].after_ns = config->stall_ns;
    e->timers[TIMER_LINGER].after_ns = LINGER_NS;
    set_date(e);
    fcas_status status = open_engine(e);
    if (status != FCAS_OK) {
        int saved = errno;
        fcas_engine_destroy(e);
        errno = saved;
        return status;
    }
    *out = e;
    return FCAS_OK;
}

void fcas_engine_destroy(fcas_engine *e)
{
    if (!e)
        return;
    for (uint32_t i = 0; i < e->n_slabs * 64u; i++) {
        fcas_conn *c = fcas_conn_at(e, i);
        if (c->state != CONN_FREE)
            fcas_conn_close(e, c, 0);
    }
    for (uint32_t i = 0; i < e->n_slabs; i++)
        free(e->slabs[i]);
    free(e->slabs);
    for (fcas_parked *p; (p = fcas_engine_take_parked(e));)
        free(p);
    for (uint8_t *buffer = e->free_inputs, *next; buffer; buffer = next) {
        memcpy(&next, buffer, sizeof next);
        free(buffer);
    }
    fcas_cache_destroy(e);
    if (e->has_table)
        fcas_table_unmap(&e->table);
    listen_off(e);
    if (e->epfd >= 0)
        close(e->epfd);
    if (e->kick >= 0)
        close(e->kick);
    if (e->spare >= 0)
        close(e->spare);
    if (e->wake >= 0)
        close(e->wake);
    free(e->sources);
    free(e->input);
    free(e->scratch);
    free(e->events);
    free(e);
}
