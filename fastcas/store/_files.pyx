"""Border of csrc/ingest: takes names and a buffer, releases the GIL, returns how far it came."""

from cpython.buffer cimport PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint64_t

from fastcas.errors import UsageError

cdef extern from "ingest/files.h" nogil:
    ctypedef struct fcas_small_file:
        const char *name
        uint64_t size
        uint64_t device
        uint64_t inode
        int64_t mtime_ns
        int is_known
    int FCAS_FILE_IRREGULAR
    int FCAS_FILE_CHANGED_BEFORE
    int FCAS_FILE_CHANGED_WHILE
    size_t fcas_read_files(int dir_fd, const fcas_small_file *files, size_t n, uint8_t *out, int *why, uint64_t *got)

IRREGULAR = FCAS_FILE_IRREGULAR
CHANGED_BEFORE = FCAS_FILE_CHANGED_BEFORE
CHANGED_WHILE = FCAS_FILE_CHANGED_WHILE


def read_files(int dir_fd, list names not None, list sizes not None, list identities not None, out):
    cdef size_t n = <size_t>len(names)
    cdef size_t i, n_read
    cdef uint64_t total = 0, got = 0
    cdef int why = 0
    cdef bytes name
    cdef Py_buffer view
    if <size_t>len(sizes) != n or <size_t>len(identities) != n:
        raise UsageError(f"files: {n} names, {len(sizes)} sizes, {len(identities)} identities; nothing was read")
    cdef fcas_small_file *files = <fcas_small_file *>PyMem_Malloc((n + 1) * sizeof(fcas_small_file))
    if files == NULL:
        raise MemoryError(f"files: no memory for {n} of them")
    try:
        for i in range(n):
            name = names[i]
            if 0 in name:
                raise UsageError("files: a name with a NUL; nothing was read")
            files[i].name = name
            files[i].size = sizes[i]
            identity = identities[i]
            files[i].is_known = identity is not None
            if identity is not None:
                files[i].device = identity.device
                files[i].inode = identity.inode
                files[i].mtime_ns = identity.mtime_ns
            if files[i].size > (<uint64_t>1 << 40) or total > (<uint64_t>1 << 40):
                raise UsageError(f"files: {sizes[i]} B are no small file; nothing was read")
            total += files[i].size
        PyObject_GetBuffer(out, &view, PyBUF_WRITABLE)
        try:
            if total > <uint64_t>view.len:
                raise UsageError(f"files: {total} B do not fit a buffer of {view.len} B; nothing was read")
            with nogil:
                n_read = fcas_read_files(dir_fd, files, n, <uint8_t *>view.buf, &why, &got)
        finally:
            PyBuffer_Release(&view)
    finally:
        PyMem_Free(files)
    return n_read, why, got
