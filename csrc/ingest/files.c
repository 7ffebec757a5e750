#include "ingest/files.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static int64_t mtime_of(const struct stat *info)
{
    return (int64_t)info->st_mtim.tv_sec * 1000000000 + info->st_mtim.tv_nsec;
}

static int is_expected(const fcas_small_file *file, const struct stat *info)
{
    if ((uint64_t)info->st_size != file->size)
        return 0;
    return !file->is_known ||
           (info->st_dev == file->device && info->st_ino == file->inode && mtime_of(info) == file->mtime_ns);
}

static int is_same(const struct stat *a, const struct stat *b)
{
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino && a->st_size == b->st_size && mtime_of(a) == mtime_of(b);
}

/* Fill out with size bytes; 0, an errno, or FCAS_FILE_CHANGED_WHILE if the file ends before. */
static int read_whole(int fd, uint8_t *out, uint64_t size)
{
    uint64_t done = 0;

    while (done < size) {
        ssize_t n = pread(fd, out + done, (size_t)(size - done), (off_t)done);
        if (n == 0)
            return FCAS_FILE_CHANGED_WHILE;
        if (n < 0 && errno != EINTR)
            return errno;
        if (n > 0)
            done += (uint64_t)n;
    }
    return FCAS_FILE_OK;
}

static int read_open(int fd, const fcas_small_file *file, uint8_t *out, uint64_t *got)
{
    struct stat before, after;
    int why;

    if (fstat(fd, &before) != 0)
        return errno;
    *got = (uint64_t)before.st_size;
    if (!S_ISREG(before.st_mode))
        return FCAS_FILE_IRREGULAR;
    if (!is_expected(file, &before))
        return FCAS_FILE_CHANGED_BEFORE;
    why = read_whole(fd, out, file->size);
    if (why > 0)
        return why;
    if (fstat(fd, &after) != 0)
        return errno;
    *got = (uint64_t)after.st_size;
    return why == FCAS_FILE_OK && is_same(&before, &after) ? FCAS_FILE_OK : FCAS_FILE_CHANGED_WHILE;
}

size_t fcas_read_files(int dir_fd, const fcas_small_file *files, size_t n, uint8_t *out, int *why, uint64_t *got)
{
    for (size_t i = 0; i < n; i++) {
        int fd;

        *got = 0;
        do {
            fd = openat(dir_fd, files[i].name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
        } while (fd < 0 && errno == EINTR);
        *why = fd < 0 ? errno : read_open(fd, &files[i], out, got);
        if (fd >= 0)
            close(fd);
        if (*why != FCAS_FILE_OK)
            return i;
        out += files[i].size;
    }
    *why = FCAS_FILE_OK;
    return n;
}
