/* Chunks that are whole: hashed several at once, written to their places, reported.
 *
 * Their bytes lie in buffers, so that the streams of a SHA-256 kernel run side by side. Where the job has a descriptor
 * for it, whole chunks go to the disk past the page cache and asynchronously, neighbours in one write: no copy, nothing
 * is evicted from the cache, and the fsync at the end has nothing left to do. Everything else is an ordinary pwrite. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "receiver/internal.h"

/* Lengths and offsets of direct I/O are multiples of a disk's sector; no sector is larger. */
#define SECTOR 4096u

fcas_status fcas_rx_settler_init(fcas_rx_settler *s, fcas_rx *rx)
{
    memset(s, 0, sizeof *s);
    s->rx = rx;
    s->written_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (s->written_fd < 0) {
        return FCAS_E_SYS;
    }
    s->has_aio = syscall(SYS_io_setup, FCAS_RX_WRITING_MAX, &s->aio) == 0;
    for (size_t i = 0; i < FCAS_RX_WRITING_MAX; i++) {
        s->writes[i].next_free = s->free_writes;
        s->free_writes = &s->writes[i];
    }
    return FCAS_OK;
}

static void end(fcas_rx_settler *s, fcas_rx_request *r, int outcome)
{
    r->outcome = outcome;
    r->next = NULL;
    if (s->n_ended++ == 0) {
        s->ended_since_us = fcas_rx_clock_us();
        s->ended_first = r;
    } else {
        s->ended_last->next = r;
    }
    s->ended_last = r;
}

void fcas_rx_settler_tell(fcas_rx_settler *s)
{
    if (s->n_ended > 0) {
        fcas_rx_deliver(s->rx, s->ended_first, s->ended_last);
        s->n_ended = 0;
    }
}

static void report(fcas_rx_settler *s, fcas_rx_request *r, fcas_rx_buffer *buffer, int outcome)
{
    fcas_rx_pool_put(&s->rx->pool, buffer);
    end(s, r, outcome);
}

static void write_now(fcas_rx_settler *s, fcas_rx_request *r, fcas_rx_buffer *buffer)
{
    const uint64_t from_ns = fcas_rx_clock_ns();
    r->sys_errno = fcas_rx_job_write(r->job, r->index, buffer->bytes);
    fcas_rx_spent(&s->write_ns, from_ns);
    report(s, r, buffer, r->sys_errno != 0 ? FCAS_RX_WRITE_FAILED : FCAS_RX_OK);
}

static void write_all_now(fcas_rx_settler *s, const fcas_rx_write *w)
{
    for (size_t i = 0; i < w->n; i++) {
        write_now(s, w->requests[i], w->buffers[i]);
    }
}

static void release(fcas_rx_settler *s, fcas_rx_write *w)
{
    w->is_submitted = false;
    w->n = 0;
    w->next_free = s->free_writes;
    s->free_writes = w;
}

/* The kernel does not say any more what became of the writes. Giving its context up waits for all of them; then
 * ordinary writes have the last word. If that fails, too, the disk may still read the buffers: they are not used again,
 * and the chunks end as WRITE_FAILED. */
static void give_up(fcas_rx_settler *s, int error)
{
    const bool is_over = syscall(SYS_io_destroy, s->aio) == 0;
    s->has_aio = false;
    for (size_t i = 0; i < FCAS_RX_WRITING_MAX && s->n_writing > 0; i++) {
        fcas_rx_write *w = &s->writes[i];
        if (!w->is_submitted) {
            continue;
        }
        s->n_writing -= w->n;
        if (is_over) {
            write_all_now(s, w);
        }
        for (size_t j = 0; !is_over && j < w->n; j++) {
            w->requests[j]->sys_errno = error;
            end(s, w->requests[j], FCAS_RX_WRITE_FAILED);
        }
        release(s, w);
    }
}

/* Report writes that are done; wait until there is one if `wait`. After an error there are none left. */
static void reap(fcas_rx_settler *s, bool wait)
{
    struct io_event events[FCAS_RX_WRITING_MAX];
    struct timespec none = {0, 0};
    long n;
    do {
        n = syscall(SYS_io_getevents, s->aio, wait ? 1L : 0L, (long)FCAS_RX_WRITING_MAX, events, wait ? NULL : &none);
    } while (n < 0 && errno == EINTR);
    if (n < 0 || (n == 0 && wait)) {
        give_up(s, n < 0 ? errno : EIO);
        return;
    }
    for (long i = 0; i < n; i++) {
        fcas_rx_write *w = (fcas_rx_write *)(uintptr_t)events[i].data;
        int64_t n_bytes = 0;
        for (size_t j = 0; j < w->n; j++) {
            n_bytes += (int64_t)w->requests[j]->length;
        }
        s->n_writing -= w->n;
        if (events[i].res != n_bytes) {
            write_all_now(s, w); /* a short write, or an error: ordinary writes have the last word */
        } else {
            for (size_t j = 0; j < w->n; j++) {
                report(s, w->requests[j], w->buffers[j], FCAS_RX_OK);
            }
        }
        release(s, w);
    }
}

void fcas_rx_settler_written(fcas_rx_settler *s)
{
    uint64_t count;
    (void)!read(s->written_fd, &count, sizeof count);
    if (s->n_writing > 0) {
        reap(s, false);
    }
}

static bool goes_direct(const fcas_rx_settler *s, const fcas_rx_request *r)
{
    return s->has_aio && r->job->direct_fd >= 0 && r->job->starts == NULL && r->index < r->job->layout.n_chunks &&
           r->length % SECTOR == 0;
}

static bool follows(const fcas_rx_write *w, const fcas_rx_request *r)
{
    const fcas_rx_request *before = w->requests[w->n - 1];
    return before->job == r->job && before->index + 1 == r->index;
}

static fcas_rx_write *begin_write(fcas_rx_settler *s, const fcas_rx_request *r)
{
    fcas_rx_write *w = s->free_writes;
    s->free_writes = w->next_free;
    memset(&w->io, 0, sizeof w->io);
    w->io.aio_data = (uint64_t)(uintptr_t)w;
    w->io.aio_lio_opcode = IOCB_CMD_PWRITEV;
    w->io.aio_fildes = (uint32_t)r->job->direct_fd;
    w->io.aio_buf = (uint64_t)(uintptr_t)w->pieces;
    w->io.aio_offset = (int64_t)((uint64_t)r->index * r->job->layout.chunk_size);
    w->io.aio_flags = IOCB_FLAG_RESFD;
    w->io.aio_resfd = (uint32_t)s->written_fd;
    return w;
}

/* Prepare the writes of n <= FCAS_RX_TOGETHER right chunks of this batch; returns how many there are. */
static long prepare(fcas_rx_settler *s, size_t *which, size_t n, struct iocb **ios)
{
    for (size_t i = 1; i < n; i++) { /* by place in the file: nearly sorted, and few */
        const size_t at = which[i];
        size_t j = i;
        for (; j > 0 && s->requests[which[j - 1]]->index > s->requests[at]->index; j--) {
            which[j] = which[j - 1];
        }
        which[j] = at;
    }
    const uint64_t from_ns = fcas_rx_clock_ns();
    while (s->n_writing > 0 && s->n_writing + n > FCAS_RX_WRITING_MAX) {
        reap(s, true);
    }
    fcas_rx_spent(&s->write_ns, from_ns);
    long n_writes = 0;
    fcas_rx_write *w = NULL;
    for (size_t i = 0; i < n; i++) {
        fcas_rx_request *r = s->requests[which[i]];
        if (w == NULL || !follows(w, r)) {
            w = begin_write(s, r);
            ios[n_writes++] = &w->io;
        }
        w->requests[w->n] = r;
        w->buffers[w->n] = s->buffers[which[i]];
        w->pieces[w->n] = (struct iovec){.iov_base = s->buffers[which[i]]->bytes, .iov_len = (size_t)r->length};
        w->io.aio_nbytes = ++w->n;
    }
    return n_writes;
}

static void submit(fcas_rx_settler *s, struct iocb **ios, long n)
{
    const uint64_t from_ns = fcas_rx_clock_ns();
    long done = 0;
    while (done < n) {
        const long taken = syscall(SYS_io_submit, s->aio, n - done, ios + done);
        if (taken <= 0) {
            break;
        }
        for (const long until = done + taken; done < until; done++) {
            fcas_rx_write *w = (fcas_rx_write *)(uintptr_t)ios[done]->aio_data;
            w->is_submitted = true;
            s->n_writing += w->n;
        }
    }
    fcas_rx_spent(&s->write_ns, from_ns);
    for (; done < n; done++) { /* refused: an ordinary write has the last word */
        fcas_rx_write *w = (fcas_rx_write *)(uintptr_t)ios[done]->aio_data;
        write_all_now(s, w);
        release(s, w);
    }
}

void fcas_rx_settle(fcas_rx_settler *s)
{
    fcas_rx_check checks[FCAS_RX_TOGETHER];
    const uint8_t *bytes[FCAS_RX_TOGETHER];
    size_t lengths[FCAS_RX_TOGETHER];
    struct iocb *ios[FCAS_RX_TOGETHER];
    size_t direct[FCAS_RX_TOGETHER];
    const size_t n = s->n_whole;
    size_t n_direct = 0;

    if (n == 0) {
        return;
    }
    s->n_whole = 0;
    for (size_t i = 0; i < n; i++) {
        const fcas_rx_request *r = s->requests[i];
        fcas_rx_check_begin(&checks[i], r->job, r->index);
        bytes[i] = s->buffers[i]->bytes;
        lengths[i] = (size_t)r->length;
    }
    const uint64_t from_ns = fcas_rx_clock_ns();
    fcas_rx_check_feed_many(checks, bytes, lengths, n);
    fcas_rx_spent(&s->hash_ns, from_ns);
    for (size_t i = 0; i < n; i++) {
        fcas_rx_request *r = s->requests[i];
        r->flags = fcas_rx_check_end(&checks[i], r->job, r->index, s->buffers[i]->bytes, r->digest);
        if (!fcas_rx_may_write(r->flags)) {
            report(s, r, s->buffers[i], FCAS_RX_CORRUPT);
        } else if (goes_direct(s, r)) {
            direct[n_direct++] = i;
        } else {
            write_now(s, r, s->buffers[i]);
        }
    }
    if (n_direct > 0) {
        submit(s, ios, prepare(s, direct, n_direct, ios));
    }
    s->last_us = fcas_rx_clock_us(); /* the time spent here says nothing about how chunks follow each other */
}

void fcas_rx_settler_add(fcas_rx_settler *s, fcas_rx_request *request, fcas_rx_buffer *buffer)
{
    const uint64_t now = fcas_rx_clock_us();
    if (s->n_whole == 0) {
        s->whole_since_us = now;
    }
    s->gap_us = now - s->last_us;
    s->last_us = now;
    s->requests[s->n_whole] = request;
    s->buffers[s->n_whole++] = buffer;
    if (s->n_whole == FCAS_RX_TOGETHER) {
        fcas_rx_settle(s);
    }
}

void fcas_rx_settler_destroy(fcas_rx_settler *s)
{
    while (s->n_writing > 0) { /* each turn ends one at least */
        reap(s, true);
    }
    if (s->has_aio) {
        (void)syscall(SYS_io_destroy, s->aio);
    }
    for (size_t i = 0; i < s->n_whole; i++) {
        report(s, s->requests[i], s->buffers[i], FCAS_RX_CANCELLED);
    }
    s->n_whole = 0;
    fcas_rx_settler_tell(s);
    if (s->written_fd >= 0) {
        close(s->written_fd);
    }
}
