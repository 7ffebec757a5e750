/* The receiver as its caller sees it: life, connections, requests on their way in and out. */
#include "receiver/receiver.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "receiver/internal.h"

#define TARGET_MAX 1000u

/* --- life --- */

static fcas_status start_thread(fcas_rx *rx, fcas_rx_thread *t)
{
    memset(t, 0, sizeof *t);
    t->rx = rx;
    t->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    t->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data = {.ptr = NULL}};
    struct epoll_event written = {.events = EPOLLIN, .data = {.ptr = &t->settler}};
    if (fcas_rx_settler_init(&t->settler, rx) != FCAS_OK || t->wake_fd < 0 || t->epoll_fd < 0 ||
        epoll_ctl(t->epoll_fd, EPOLL_CTL_ADD, t->wake_fd, &event) != 0 ||
        epoll_ctl(t->epoll_fd, EPOLL_CTL_ADD, t->settler.written_fd, &written) != 0) {
        goto failed;
    }
    pthread_mutex_init(&t->lock, NULL);
    errno = pthread_create(&t->thread, NULL, fcas_rx_thread_main, t);
    if (errno == 0) {
        return FCAS_OK;
    }
    pthread_mutex_destroy(&t->lock);
failed:;
    const int saved = errno;
    fcas_rx_settler_destroy(&t->settler);
    if (t->wake_fd >= 0) {
        close(t->wake_fd);
    }
    if (t->epoll_fd >= 0) {
        close(t->epoll_fd);
    }
    errno = saved;
    return FCAS_E_SYS;
}

fcas_status fcas_rx_new(const fcas_rx_config *config, fcas_rx **out)
{
    if (config->n_threads < 1 || config->n_threads > 64 || config->connect_ms == 0 || config->first_byte_ms == 0 ||
        config->stall_ms == 0) {
        return FCAS_E_ARG;
    }
    fcas_rx *rx = calloc(1, sizeof *rx + config->n_threads * sizeof rx->threads[0]);
    if (rx == NULL) {
        return FCAS_E_NOMEM;
    }
    rx->config = *config;
    fcas_rx_pool_init(&rx->pool, config->memory_max);
    pthread_mutex_init(&rx->lock, NULL);
    rx->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    fcas_status status = rx->event_fd < 0 ? FCAS_E_SYS : FCAS_OK;
    for (uint32_t i = 0; i < config->n_threads && status == FCAS_OK; i++) {
        status = start_thread(rx, &rx->threads[i]);
        rx->n_started += status == FCAS_OK;
    }
    if (status != FCAS_OK) {
        const int saved = errno;
        fcas_rx_free(rx);
        errno = saved;
        return status;
    }
    *out = rx;
    return FCAS_OK;
}

static void wake(const fcas_rx_thread *t)
{
    const uint64_t one = 1;
    (void)!write(t->wake_fd, &one, sizeof one);
}

void fcas_rx_free(fcas_rx *rx)
{
    if (rx == NULL) {
        return;
    }
    for (uint32_t i = 0; i < rx->n_started; i++) {
        pthread_mutex_lock(&rx->threads[i].lock);
        rx->threads[i].stop = true;
        pthread_mutex_unlock(&rx->threads[i].lock);
        wake(&rx->threads[i]);
    }
    for (uint32_t i = 0; i < rx->n_started; i++) {
        pthread_join(rx->threads[i].thread, NULL);
        pthread_mutex_destroy(&rx->threads[i].lock);
        close(rx->threads[i].wake_fd);
        close(rx->threads[i].epoll_fd);
    }
    for (fcas_rx_request *r = rx->done_first; r != NULL;) {
        fcas_rx_request *next = r->next;
        fcas_rx_request_free(r);
        r = next;
    }
    if (rx->event_fd >= 0) {
        close(rx->event_fd);
    }
    pthread_mutex_destroy(&rx->lock);
    fcas_rx_pool_destroy(&rx->pool);
    free(rx);
}

int fcas_rx_eventfd(const fcas_rx *rx)
{
    return rx->event_fd;
}

size_t fcas_rx_memory(fcas_rx *rx)
{
    pthread_mutex_lock(&rx->pool.lock);
    const size_t total = rx->pool.total;
    pthread_mutex_unlock(&rx->pool.lock);
    return total;
}

bool fcas_rx_thread_times(const fcas_rx *rx, uint32_t number, fcas_rx_times *out)
{
    if (number >= rx->n_started) {
        return false;
    }
    const fcas_rx_thread *t = &rx->threads[number];
    out->receive_ns = atomic_load_explicit(&t->receive_ns, memory_order_relaxed);
    out->hash_ns = atomic_load_explicit(&t->settler.hash_ns, memory_order_relaxed);
    out->write_ns = atomic_load_explicit(&t->settler.write_ns, memory_order_relaxed);
    return true;
}

/* --- connections and requests, the caller's side --- */

void fcas_rx_conn_free(fcas_rx_conn *conn)
{
    free(conn->host);
    free(conn->fields);
    free(conn);
}

fcas_rx_conn *fcas_rx_open(fcas_rx *rx, const struct sockaddr *address, socklen_t n_address, const char *host,
                           const char *fields)
{
    if (n_address > sizeof(struct sockaddr_storage)) {
        return NULL;
    }
    fcas_rx_conn *conn = calloc(1, sizeof *conn);
    if (conn == NULL) {
        return NULL;
    }
    conn->host = strdup(host);
    conn->fields = strdup(fields);
    if (conn->host == NULL || conn->fields == NULL ||
        strlen(host) + strlen(fields) + TARGET_MAX + 64 > OUT_MAX) {
        fcas_rx_conn_free(conn);
        return NULL;
    }
    memcpy(&conn->address, address, n_address);
    conn->n_address = n_address;
    conn->fd = -1;
    conn->state = CONN_CLOSED;
    atomic_init(&conn->n_received, 0);
    fcas_rx_thread *t = conn->owner = &rx->threads[rx->next_thread++ % rx->config.n_threads];
    pthread_mutex_lock(&t->lock);
    conn->next = t->opening; /* listed by its thread when it next looks, at the latest when it stops */
    t->opening = conn;
    pthread_mutex_unlock(&t->lock);
    return conn;
}

void fcas_rx_close(fcas_rx_conn *conn)
{
    fcas_rx_thread *t = conn->owner;
    pthread_mutex_lock(&t->lock);
    conn->next_closing = t->closing;
    t->closing = conn;
    pthread_mutex_unlock(&t->lock);
    wake(t);
}

uint64_t fcas_rx_conn_bytes(const fcas_rx_conn *conn)
{
    return atomic_load_explicit(&conn->n_received, memory_order_relaxed);
}

fcas_rx_request *fcas_rx_request_new(const char *target, size_t n_target)
{
    if (n_target > TARGET_MAX) {
        return NULL;
    }
    fcas_rx_request *r = calloc(1, sizeof *r + n_target + 1);
    if (r == NULL) {
        return NULL;
    }
    memcpy(r->target, target, n_target);
    r->n_target = n_target;
    return r;
}

fcas_rx_request *fcas_rx_request_chunk(fcas_rx_job *job, uint32_t index)
{
    static const char digits[] = "0123456789abcdef";
    static const char path[] = "/chunks/";
    char target[sizeof path - 1 + 64];
    const uint8_t *hash = fcas_rx_job_hash(job, index);
    memcpy(target, path, sizeof path - 1);
    for (size_t i = 0; i < 32; i++) {
        target[sizeof path - 1 + 2 * i] = digits[hash[i] >> 4];
        target[sizeof path + 2 * i] = digits[hash[i] & 15];
    }
    fcas_rx_request *r = fcas_rx_request_new(target, sizeof target);
    if (r != NULL) {
        r->job = job;
        r->index = index;
    }
    return r;
}

void fcas_rx_submit(fcas_rx_conn *conn, fcas_rx_request *requests)
{
    fcas_rx_thread *t = conn->owner;
    fcas_rx_request *last = requests;
    for (fcas_rx_request *r = requests; r != NULL; r = r->next) {
        r->conn = conn;
        if (r->job != NULL) {
            fcas_rx_job_hold(r->job);
        }
        last = r;
    }
    pthread_mutex_lock(&t->lock);
    const bool was_empty = t->inbox_first == NULL;
    if (was_empty) {
        t->inbox_first = requests;
    } else {
        t->inbox_last->next = requests;
    }
    t->inbox_last = last;
    pthread_mutex_unlock(&t->lock);
    if (was_empty) {
        wake(t);
    }
}

void fcas_rx_deliver(fcas_rx *rx, fcas_rx_request *first, fcas_rx_request *last)
{
    last->next = NULL;
    pthread_mutex_lock(&rx->lock);
    const bool was_empty = rx->done_first == NULL;
    if (was_empty) {
        rx->done_first = first;
    } else {
        rx->done_last->next = first;
    }
    rx->done_last = last;
    pthread_mutex_unlock(&rx->lock);
    if (was_empty) {
        const uint64_t one = 1;
        (void)!write(rx->event_fd, &one, sizeof one);
    }
}

fcas_rx_request *fcas_rx_take(fcas_rx *rx)
{
    uint64_t count;
    (void)!read(rx->event_fd, &count, sizeof count);
    pthread_mutex_lock(&rx->lock);
    fcas_rx_request *all = rx->done_first;
    rx->done_first = rx->done_last = NULL;
    pthread_mutex_unlock(&rx->lock);
    return all;
}

void fcas_rx_request_free(fcas_rx_request *request)
{
    fcas_rx_job_release(request->job);
    free(request->body);
    free(request);
}
