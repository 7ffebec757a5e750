/* LD_PRELOAD: sockets and sendfile that transfer little and are interrupted, as real kernels may.
 *
 * SHORT_IO="PER_MILLE_SHORT PER_MILLE_EINTR SEED": of the calls of sendfile, sendmsg and send on TCP sockets, so many
 * transfer between 1 and 700 bytes only, and so many fail with EINTR. What is said to be transferred is. recv is only
 * interrupted: a stream socket that gives less than was asked for is empty (epoll(7)), and the engine counts on that. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/types.h>

static unsigned per_mille_short, per_mille_eintr, seed;

__attribute__((constructor)) static void read_plan(void)
{
    const char *plan = getenv("SHORT_IO");
    if (plan && sscanf(plan, "%u %u %u", &per_mille_short, &per_mille_eintr, &seed) != 3)
        abort();
}

static unsigned next(unsigned below)
{
    seed = seed * 1103515245u + 12345u;
    return (seed >> 8) % below;
}

static int is_tcp(int fd)
{
    int       domain = 0, saved = errno;
    socklen_t n = sizeof domain;
    int       known = getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &n) == 0;
    errno = saved;
    return known && (domain == AF_INET || domain == AF_INET6);
}

/* How much may be transferred, or 0: fail with EINTR. */
static size_t allowed(int fd, size_t n)
{
    if (!is_tcp(fd) || n == 0)
        return n ? n : 1;
    if (next(1000) < per_mille_eintr) {
        errno = EINTR;
        return 0;
    }
    if (next(1000) >= per_mille_short)
        return n;
    size_t some = 1 + next(700);
    return some < n ? some : n;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t sendfile(int to, int from, off_t *at, size_t n)
{
    ssize_t (*real)(int, int, off_t *, size_t) = (ssize_t (*)(int, int, off_t *, size_t))dlsym(RTLD_NEXT, "sendfile");
    size_t some = allowed(to, n);
    return some ? real(to, from, at, some < n ? some : n) : -1;
}

ssize_t send(int fd, const void *bytes, size_t n, int flags)
{
    size_t some = allowed(fd, n);
    return some ? REAL(send)(fd, bytes, some < n ? some : n, flags) : -1;
}

ssize_t recv(int fd, void *bytes, size_t n, int flags)
{
    return allowed(fd, n) ? REAL(recv)(fd, bytes, n, flags) : -1;
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    size_t total = 0;
    for (size_t i = 0; i < message->msg_iovlen; i++)
        total += message->msg_iov[i].iov_len;
    size_t some = allowed(fd, total);
    if (some == 0)
        return -1;
    if (some >= total || message->msg_iovlen > 4)
        return REAL(sendmsg)(fd, message, flags);
    struct iovec  iov[4];
    struct msghdr part = *message;
    part.msg_iov = iov;
    part.msg_iovlen = 0;
    for (size_t i = 0; some > 0; i++) {
        iov[i] = message->msg_iov[i];
        iov[i].iov_len = iov[i].iov_len < some ? iov[i].iov_len : some;
        some -= iov[i].iov_len;
        part.msg_iovlen++;
    }
    return REAL(sendmsg)(fd, &part, flags);
}
