"""Border of csrc/ingest/pass.h: takes descriptors and a buffer, releases the GIL, returns hashes."""

from cpython.buffer cimport PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t

from fastcas.errors import UsageError
from fastcas.hashing import kernel_name
from fastcas.limits import CHUNK_SIZE_MAX, CHUNKS_MAX

cdef extern from "sha256/sha256.h" nogil:
    ctypedef struct fcas_sha256_kernel:
        pass
    int fcas_sha256_select(const char *, const fcas_sha256_kernel **)

cdef extern from "ingest/pass.h" nogil:
    int FCAS_FILE_OK
    int FCAS_FILE_CHANGED_WHILE
    int FCAS_FILE_STOPPED
    ctypedef struct fcas_tally:
        pass
    ctypedef struct fcas_file_pass:
        int fd
        uint64_t size
        uint8_t *hashes
        uint8_t *midstates
        uint8_t content[32]
        uint64_t got
    int fcas_pass_files(fcas_file_pass *files, size_t n, const fcas_sha256_kernel *kernel, size_t chunk_size,
                        uint8_t *buffer, size_t room, fcas_tally *tally, size_t *failed)
    void fcas_tally_add(fcas_tally *tally, uint64_t n_bytes)
    uint64_t fcas_tally_bytes(const fcas_tally *tally)
    void fcas_tally_stop(fcas_tally *tally)

CHANGED_WHILE = FCAS_FILE_CHANGED_WHILE
STOPPED = FCAS_FILE_STOPPED

cdef size_t DIGEST = 32
cdef size_t BLOCK = 64


cdef const fcas_sha256_kernel *_kernel_of(str name) except NULL:
    cdef const fcas_sha256_kernel *kernel = NULL
    if fcas_sha256_select(name.encode(), &kernel) != 0:
        raise UsageError(f"SHA-256 kernel {name}: not on this machine; nothing was read")
    return kernel


cdef class Tally:
    cdef fcas_tally _tally

    @property
    def n_bytes(self):
        return fcas_tally_bytes(&self._tally)

    def add(self, uint64_t n_bytes):
        fcas_tally_add(&self._tally, n_bytes)

    def stop(self):
        fcas_tally_stop(&self._tally)


def pass_files(list fds not None, list sizes not None, size_t chunk_size, buffer, Tally tally not None, *, kernel=None):
    cdef fcas_file_pass files[2]
    cdef Py_buffer view
    cdef size_t n = <size_t>len(fds), i, failed = 0
    cdef const fcas_sha256_kernel *k = _kernel_of(kernel if kernel is not None else kernel_name())
    cdef int why
    if not 1 <= n <= 2 or <size_t>len(sizes) != n:
        raise UsageError(f"files: expected one or two, each with its size, got {n} and {len(sizes)} sizes")
    if not BLOCK <= chunk_size <= CHUNK_SIZE_MAX or chunk_size % BLOCK:
        raise UsageError(f"chunk size: expected a multiple of 64 from 64 B to 16 MiB, got {chunk_size} B")
    hashes, midstates = [], []
    for i in range(n):
        if not 1 <= sizes[i] <= CHUNKS_MAX * chunk_size:
            raise UsageError(f"file of {sizes[i]} B: expected 1 to {CHUNKS_MAX} chunks of {chunk_size} B")
        files[i].fd = fds[i]
        files[i].size = sizes[i]
        hashes.append(PyBytes_FromStringAndSize(NULL, <Py_ssize_t>(-(-sizes[i] // chunk_size) * DIGEST)))
        midstates.append(PyBytes_FromStringAndSize(NULL, <Py_ssize_t>(sizes[i] // chunk_size * DIGEST)))
        files[i].hashes = <uint8_t *>PyBytes_AS_STRING(hashes[i])
        files[i].midstates = <uint8_t *>PyBytes_AS_STRING(midstates[i])
    PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
    try:
        if <size_t>view.len // n < chunk_size:
            raise UsageError(f"buffer of {view.len} B: expected room for {n} chunks of {chunk_size} B; nothing was read")
        with nogil:
            why = fcas_pass_files(files, n, k, chunk_size, <uint8_t *>view.buf, <size_t>view.len, &tally._tally,
                                  &failed)
    finally:
        PyBuffer_Release(&view)
    if why != FCAS_FILE_OK:
        return [], why, failed, files[failed].got
    return [(hashes[i], midstates[i], files[i].content[:32]) for i in range(n)], 0, n, 0
