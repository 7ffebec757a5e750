/* LD_PRELOAD: a slow disk. SLOW_DISK="WRITE_US FSYNC_US": microseconds that each pwrite of 4 KiB or more, and each fsync,
 * takes longer. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>
#include <time.h>

static long write_us, fsync_us;

__attribute__((constructor)) static void read_plan(void)
{
    const char *plan = getenv("SLOW_DISK");
    if (plan && sscanf(plan, "%ld %ld", &write_us, &fsync_us) != 2)
        abort();
}

static void wait_us(long us)
{
    struct timespec left = {us / 1000000, us % 1000000 * 1000};
    while (us > 0 && nanosleep(&left, &left) != 0)
        ;
}

static ssize_t slow_pwrite(int fd, const void *p, size_t n, off_t at)
{
    ssize_t (*real)(int, const void *, size_t, off_t) =
        (ssize_t (*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite64");
    if (n >= 4096)
        wait_us(write_us);
    return real(fd, p, n, at);
}

ssize_t pwrite(int fd, const void *p, size_t n, off_t at)
{
    return slow_pwrite(fd, p, n, at);
}

ssize_t pwrite64(int fd, const void *p, size_t n, off_t at)
{
    return slow_pwrite(fd, p, n, at);
}

int fsync(int fd)
{
    wait_us(fsync_us);
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
