/* Internal to csrc/table: sizing, sealing and mapping of memfds. */
#ifndef FCAS_TABLE_MEMFD_H
#define FCAS_TABLE_MEMFD_H

#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include "common/status.h"

/* Values of the kernel interface; older libc headers lack the last one. */
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

/* Size a fresh memfd; what is there must be empty, so that all bytes read as zero. */
static inline fcas_status fcas_memfd_size(int fd, uint64_t size)
{
    struct stat st;
    if (fstat(fd, &st) != 0)
        return FCAS_E_SYS;
    if (st.st_size != 0 || size > (uint64_t)INT64_MAX || size > SIZE_MAX)
        return FCAS_E_ARG;
    return ftruncate(fd, (off_t)size) == 0 ? FCAS_OK : FCAS_E_SYS;
}

/* Nobody can resize it from now on; with only_we_write nobody can write or map it writable either, except
 * through mappings that exist. The set of seals is closed. */
static inline fcas_status fcas_memfd_seal(int fd, int only_we_write)
{
    int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL | (only_we_write ? F_SEAL_FUTURE_WRITE : 0);
    return fcntl(fd, F_ADD_SEALS, seals) == 0 ? FCAS_OK : FCAS_E_SYS;
}

/* Map all of fd, which must be sealed against shrinking (else a reader could be killed by SIGBUS) and at least
 * min_size bytes long. */
static inline fcas_status fcas_memfd_map(int fd, int prot, size_t min_size, uint8_t **base, size_t *size)
{
    struct stat st;
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || fstat(fd, &st) != 0)
        return FCAS_E_SYS;
    if (!(seals & F_SEAL_SHRINK) || st.st_size < 0 || (uint64_t)st.st_size < min_size ||
        (uint64_t)st.st_size > SIZE_MAX)
        return FCAS_E_CORRUPT;
    void *p = mmap(NULL, (size_t)st.st_size, prot, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED)
        return FCAS_E_SYS;
    *base = p;
    *size = (size_t)st.st_size;
    return FCAS_OK;
}

#endif
