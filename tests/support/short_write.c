/* LD_PRELOAD: a disk that takes little at a time and is interrupted: pwrite, pwritev and pread move between 1 and 5,000
 * bytes, and every seventh call fails with EINTR. What is said to be moved is. SHORT_WRITE_LOG: a file that gets a byte
 * per shortened write, so that a test can see that there were any. SHORT_WRITE_READS=0: reads are whole. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static _Atomic unsigned calls;
static int log_fd = -1, reads_are_whole;

__attribute__((constructor)) static void open_log(void)
{
    const char *path = getenv("SHORT_WRITE_LOG"), *reads = getenv("SHORT_WRITE_READS");
    reads_are_whole = reads && *reads == '0';
    if (path)
        log_fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
}

/* How much may be moved, 0: fail with EINTR. */
static size_t allowed(size_t n)
{
    unsigned i = atomic_fetch_add(&calls, 1) + 1;
    if (i % 7 == 0) {
        errno = EINTR;
        return 0;
    }
    size_t some = 1 + (i * 2654435761u >> 8) % 5000;
    return some < n ? some : n;
}

static ssize_t short_pwrite(int fd, const void *p, size_t n, off_t at)
{
    ssize_t (*real)(int, const void *, size_t, off_t) =
        (ssize_t (*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite64");
    size_t some = n ? allowed(n) : 0;
    if (n == 0)
        return real(fd, p, n, at);
    if (some == 0)
        return -1;
    if (some < n && log_fd >= 0)
        (void)!write(log_fd, "s", 1);
    return real(fd, p, some, at);
}

ssize_t pwrite(int fd, const void *p, size_t n, off_t at)
{
    return short_pwrite(fd, p, n, at);
}

ssize_t pwrite64(int fd, const void *p, size_t n, off_t at)
{
    return short_pwrite(fd, p, n, at);
}

static ssize_t short_pread(int fd, void *p, size_t n, off_t at)
{
    ssize_t (*real)(int, void *, size_t, off_t) = (ssize_t (*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread64");
    size_t some = n ? allowed(n) : 0;
    if (n == 0 || reads_are_whole)
        return real(fd, p, n, at);
    return some ? real(fd, p, some, at) : -1;
}

/* The first vector only, and of that as much as pwrite takes. */
ssize_t pwritev(int fd, const struct iovec *v, int n, off_t at)
{
    return n > 0 ? short_pwrite(fd, v[0].iov_base, v[0].iov_len, at) : 0;
}

ssize_t pwritev64(int fd, const struct iovec *v, int n, off_t at)
{
    return pwritev(fd, v, n, at);
}

ssize_t pwritev2(int fd, const struct iovec *v, int n, off_t at, int flags)
{
    (void)flags;
    return pwritev(fd, v, n, at);
}

ssize_t pwritev64v2(int fd, const struct iovec *v, int n, off_t at, int flags)
{
    (void)flags;
    return pwritev(fd, v, n, at);
}

ssize_t pread(int fd, void *p, size_t n, off_t at)
{
    return short_pread(fd, p, n, at);
}

ssize_t pread64(int fd, void *p, size_t n, off_t at)
{
    return short_pread(fd, p, n, at);
}
