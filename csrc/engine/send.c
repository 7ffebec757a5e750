/* The send path: memory and mapped bytes in one sendmsg, or the header with MSG_MORE and then sendfile. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "engine/internal.h"

/* The header (and a small body) outlives this turn: out of the engine's scratch into memory of its own. */
static int keep_memory(fcas_conn *c)
{
    if (!c->mem_borrowed || c->mem_at == c->mem_len)
        return 0;
    uint32_t left = c->mem_len - c->mem_at;
    uint8_t *own = malloc(left);
    if (!own)
        return -1;
    memcpy(own, c->mem + c->mem_at, left);
    c->mem = own;
    c->mem_at = 0;
    c->mem_len = left;
    c->mem_borrowed = 0;
    return 0;
}

static void drop_extent(fcas_engine *e, fcas_conn *c)
{
    fcas_epoch_leave(e, c);
    fcas_cache_put(e, c->blob);
    c->blob = NULL;
}

/* What is left of mem; it waits in the kernel for a body that follows, at most 200 ms. */
static ssize_t write_memory(fcas_conn *c)
{
    ssize_t n = send(c->fd, c->mem + c->mem_at, c->mem_len - c->mem_at, MSG_NOSIGNAL | (c->body_left ? MSG_MORE : 0));
    if (n > 0)
        c->mem_at += (uint32_t)n;
    return n;
}

/* Under an upload limit: n bytes were written, `body` of them from the grant; the others were not asked for before. */
static void spend(fcas_engine *e, fcas_conn *c, uint64_t n, uint64_t body)
{
    c->grant -= (uint32_t)body;
    if (n > body)
        fcas_bucket_charge(e->config.bucket, n - body, e->now_ns);
}

/* One system call's worth of progress: bytes written, or -1 with errno. */
static ssize_t write_some(fcas_conn *c, uint64_t turn)
{
    size_t mem_left = c->mem_len - c->mem_at;
    if (c->use_sendfile || !c->body_left) {
        if (mem_left)
            return write_memory(c);
        off_t   at = (off_t)c->body_at;
        size_t  want = (size_t)(c->body_left < turn ? c->body_left : turn);
        ssize_t n = sendfile(c->fd, c->blob->fd, &at, want);
        if (n == 0) {
            errno = EFAULT; /* the file ends here: as if its page had vanished */
            return -1;
        }
        if (n > 0) {
            c->body_at += (uint64_t)n;
            c->body_left -= (uint64_t)n;
        }
        return n;
    }
    const uint8_t *map = fcas_cache_map(c->blob);
    if (!map) {
        c->use_sendfile = 1; /* no address space: sendfile needs none */
        return write_some(c, turn);
    }
    size_t        want = (size_t)(c->body_left < turn ? c->body_left : turn);
    struct iovec  iov[2];
    struct msghdr message = {.msg_iov = iov};
    if (mem_left)
        iov[message.msg_iovlen++] = (struct iovec){c->mem + c->mem_at, mem_left};
    iov[message.msg_iovlen++] = (struct iovec){(void *)(uintptr_t)(map + (c->body_at - c->blob->map_at)), want};
    ssize_t n = sendmsg(c->fd, &message, MSG_NOSIGNAL);
    if (n > 0) {
        size_t head = (size_t)n < mem_left ? (size_t)n : mem_left;
        c->mem_at += (uint32_t)head;
        c->body_at += (uint64_t)n - head;
        c->body_left -= (uint64_t)n - head;
    }
    return n;
}

fcas_send_result fcas_send(fcas_engine *e, fcas_conn *c, uint64_t *turn)
{
    for (;;) {
        if (c->mem_at == c->mem_len && c->body_left == 0) {
            if (c->blob)
                drop_extent(e, c);
            if (!c->run || c->run->left == 0)
                return SEND_DONE;
            if (fcas_run_next(e, c) != 0)
                return SEND_FAILED;
        }
        if (*turn == 0)
            return keep_memory(c) == 0 ? SEND_YIELD : SEND_FAILED;
        uint64_t body_before = c->body_left;
        ssize_t  n;
        if (e->config.bucket) {
            if (body_before && !c->grant && c->mem_at == c->mem_len) {
                fcas_limit_wait(e, c);
                return SEND_LIMITED;
            }
            n = body_before && !c->grant ? write_memory(c) : write_some(c, c->grant < *turn ? c->grant : *turn);
            if (n > 0)
                spend(e, c, (uint64_t)n, body_before - c->body_left);
        } else {
            n = write_some(c, *turn);
        }
        if (n > 0) {
            c->sent += (uint64_t)n;
            fcas_engine_count(e, FCAS_CTR_BYTES_SENT, body_before - c->body_left);
            *turn -= (uint64_t)n < *turn ? (uint64_t)n : *turn;
            continue;
        }
        if (errno == EINTR)
            continue;
        if (errno == EAGAIN)
            return keep_memory(c) == 0 ? SEND_BLOCKED : SEND_FAILED;
        if (errno == ETIMEDOUT) /* the kernel's TCP_USER_TIMEOUT saw the stall first */
            fcas_engine_count(e, FCAS_CTR_EVICT_STALL, 1);
        if (c->blob && (errno == EFAULT || errno == EIO)) {
            int cause = errno;
            if (fcas_cache_check(e, c->blob, c->body_at + c->body_left))
                fcas_cache_withdraw(e, c->blob, cause == EIO ? FCAS_BLOB_UNREADABLE : FCAS_BLOB_SHORT);
        }
        return SEND_FAILED;
    }
}
