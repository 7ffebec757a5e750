/* Reads many small files of one folder, whole and one after the other, without an allocation.
 *
 * Each is opened by its last component, never through a link and never waiting for a FIFO's writer, and must be the
 * same before and after it was read. The caller owns the folder's descriptor and all memory. */
#ifndef FCAS_INGEST_FILES_H
#define FCAS_INGEST_FILES_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    const char *name; /* one component, NUL-terminated */
    uint64_t size;    /* bytes that it must have */
    uint64_t device;  /* these three only if is_known */
    uint64_t inode;
    int64_t mtime_ns;
    int is_known;
} fcas_small_file;

/* Why a file was not read; positive: the errno of its open or read. */
enum {
    FCAS_FILE_OK = 0,
    FCAS_FILE_IRREGULAR = -1,      /* no regular file */
    FCAS_FILE_CHANGED_BEFORE = -2, /* not what the caller says */
    FCAS_FILE_CHANGED_WHILE = -3,  /* shortened, extended or written to while it was read */
    FCAS_FILE_STOPPED = -4         /* the caller wants no more */
};

/* Read n files back to back into out, which has room for the sum of their sizes. Returns how many were read: n, or
 * the number of the first that could not be, with the reason in *why and the size that it has now in *got. */
size_t fcas_read_files(int dir_fd, const fcas_small_file *files, size_t n, uint8_t *out, int *why, uint64_t *got);

#endif
