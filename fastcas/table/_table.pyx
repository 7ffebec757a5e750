"""ChunkTable and TableReader: the border of csrc/table/table.h.

Owns the mapping and, on the writer's side, the memfd. Lookups of one key keep the GIL (they take less time than
releasing it); batches release it.
"""

import os

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from posix.unistd cimport close as close_fd

from fastcas.errors import LocalProtocolError, TableFull, UsageError
from fastcas.table import memfd as _memfd
from fastcas.table.entries import BlobEntry


cdef extern from "common/status.h" nogil:
    enum:
        FCAS_OK
        FCAS_E_ARG
        FCAS_E_FULL
        FCAS_E_NOTFOUND
        FCAS_E_SYS
        FCAS_E_VERSION


cdef extern from *:
    """
    #include "table/layout.h"
    static uint64_t table_n_live(const fcas_table *t)
    {
        return atomic_load_explicit(&fcas_table_head(t)->n_live, memory_order_relaxed);
    }
    static uint64_t table_n_tombstones(const fcas_table *t)
    {
        return atomic_load_explicit(&fcas_table_head(t)->n_tombstones, memory_order_relaxed);
    }
    static int table_blob_was_used(const fcas_table *t, uint32_t number)
    {
        return number < t->n_blobs && fcas_table_blobs(t)[number].path_len != 0;
    }
    static uint64_t table_heap_used(const fcas_table *t)
    {
        return atomic_load_explicit(&fcas_table_head(t)->heap_used, memory_order_relaxed);
    }
    """
    enum:
        FCAS_PATH_MAX_BYTES
        FCAS_BLOB_LINKED
        FCAS_BLOB_GROWING
    ctypedef enum fcas_entry_type:
        FCAS_ENTRY_CHUNK
        FCAS_ENTRY_MANIFEST
        FCAS_ENTRY_FILE
    ctypedef struct fcas_blob:
        uint64_t device
        uint64_t inode
        uint64_t size
        int64_t mtime_ns
        uint32_t path_len
        uint32_t flags
    ctypedef struct fcas_place:
        uint64_t offset
        uint32_t length
        uint32_t blob
    ctypedef struct fcas_table:
        uint64_t n_slots
        uint64_t n_blobs
        uint64_t heap_size
    int fcas_table_map(fcas_table *t, int fd) nogil
    void fcas_table_unmap(fcas_table *t) nogil
    int fcas_table_lookup(const fcas_table *t, fcas_entry_type type, const uint8_t *key, fcas_place *out) nogil
    int fcas_table_lookup_file(const fcas_table *t, const uint8_t *file_hash, uint8_t *manifest_hash,
                               fcas_place *manifest) nogil
    size_t fcas_table_lookup_many(const fcas_table *t, fcas_entry_type type, const uint8_t *keys, size_t n,
                                  fcas_place *out, uint8_t *found) nogil
    int fcas_table_blob(const fcas_table *t, uint32_t number, fcas_blob *out, char *path) nogil
    uint64_t fcas_table_epoch(const fcas_table *t) nogil
    int fcas_table_create(fcas_table *t, int fd, uint64_t n_slots, uint64_t n_blobs, uint64_t heap_size,
                          const uint8_t *secret) nogil
    int fcas_table_put(fcas_table *t, fcas_entry_type type, const uint8_t *key, fcas_place place) nogil
    int fcas_table_put_file(fcas_table *t, const uint8_t *file_hash, const uint8_t *manifest_hash) nogil
    int fcas_table_remove(fcas_table *t, fcas_entry_type type, const uint8_t *key) nogil
    int fcas_table_put_blob(fcas_table *t, uint32_t number, const fcas_blob *blob, const char *path,
                            size_t path_len) nogil
    int fcas_table_remove_blob(fcas_table *t, uint32_t number) nogil
    uint64_t fcas_table_advance(fcas_table *t) nogil
    int fcas_table_copy_except(fcas_table *dst, const fcas_table *src, uint32_t blob) nogil
    uint64_t fcas_table_blob_usage(const fcas_table *t, uint64_t *path_bytes) nogil
    uint64_t table_n_live(const fcas_table *t) nogil
    uint64_t table_n_tombstones(const fcas_table *t) nogil
    uint64_t table_heap_used(const fcas_table *t) nogil
    int table_blob_was_used(const fcas_table *t, uint32_t number) nogil


cdef enum:
    BATCH = 1024  # keys per call of lookup_many below: results fit in 25 KiB of stack and L1


cdef int check(int status) except -1:
    if status == FCAS_OK:
        return 0
    cdef int saved = errno
    if status == FCAS_E_SYS:
        raise OSError(saved, f"chunk table: {os.strerror(saved)}")
    if status == FCAS_E_ARG:
        raise UsageError("chunk table: argument out of range, nothing changed")
    if status == FCAS_E_FULL:
        raise TableFull("chunk table: full, the entry was not added")
    if status == FCAS_E_VERSION:
        raise LocalProtocolError("chunk table: format version unknown, not used")
    raise LocalProtocolError("chunk table: contents contradict the format, not used")


cdef const uint8_t *key_of(const uint8_t[::1] key) except NULL:
    if key.shape[0] != 32:
        raise UsageError(f"key: expected 32 bytes, got {key.shape[0]}")
    return &key[0]


cdef class _View:
    """What the writer's and a reader's view have in common."""

    cdef fcas_table _table
    cdef bint _open
    cdef int _busy  # batches that run without the GIL; changed with the GIL only
    cdef readonly int fd

    def __cinit__(self):
        self.fd = -1

    def __dealloc__(self):
        self._release()

    cdef int _check_open(self) except -1:
        if not self._open:
            raise UsageError("chunk table: closed")
        return 0

    cdef void _release(self) noexcept:
        if self._open:
            self._open = False
            fcas_table_unmap(&self._table)
        if self.fd >= 0:
            close_fd(self.fd)
        self.fd = -1

    def close(self):
        if self._busy:
            raise UsageError("chunk table: a batch is running in another thread, not closed")
        self._release()

    @property
    def n_slots(self):
        self._check_open()
        return self._table.n_slots

    @property
    def n_blobs(self):
        self._check_open()
        return self._table.n_blobs

    @property
    def heap_size(self):
        self._check_open()
        return self._table.heap_size

    @property
    def n_live(self):
        self._check_open()
        return table_n_live(&self._table)

    @property
    def n_tombstones(self):
        self._check_open()
        return table_n_tombstones(&self._table)

    @property
    def epoch(self):
        self._check_open()
        return fcas_table_epoch(&self._table)

    cdef object _lookup(self, fcas_entry_type kind, const uint8_t[::1] key):  # hot
        self._check_open()
        cdef fcas_place place
        if fcas_table_lookup(&self._table, kind, key_of(key), &place) != FCAS_OK:
            return None
        return place.blob, place.offset, place.length

    def lookup_chunk(self, const uint8_t[::1] key not None):
        return self._lookup(FCAS_ENTRY_CHUNK, key)

    def lookup_manifest(self, const uint8_t[::1] key not None):
        return self._lookup(FCAS_ENTRY_MANIFEST, key)

    def lookup_file(self, const uint8_t[::1] key not None):
        self._check_open()
        cdef fcas_place place
        cdef uint8_t manifest_hash[32]
        if fcas_table_lookup_file(&self._table, key_of(key), manifest_hash, &place) != FCAS_OK:
            return None
        return PyBytes_FromStringAndSize(<char *>manifest_hash, 32), (place.blob, place.offset, place.length)

    @cython.boundscheck(False)  # n keys of 32 bytes each lie in keys: n = len // 32, checked below
    def lookup_many(self, const uint8_t[::1] keys not None):  # hot
        self._check_open()
        cdef size_t n = <size_t>keys.shape[0] // 32
        cdef size_t at = 0, batch, found = 0
        cdef fcas_place places[BATCH]
        cdef uint8_t flags[BATCH]
        if keys.shape[0] % 32 != 0:
            raise UsageError(f"keys: expected a multiple of 32 bytes, got {keys.shape[0]}")
        if n == 0:
            return 0
        self._busy += 1
        try:
            with nogil:
                while at < n:
                    batch = n - at if n - at < BATCH else BATCH
                    found += fcas_table_lookup_many(
                        &self._table, FCAS_ENTRY_CHUNK, &keys[32 * at], batch, places, flags
                    )
                    at += batch
        finally:
            self._busy -= 1
        return found

    def blob(self, uint32_t number):
        self._check_open()
        cdef fcas_blob entry
        cdef char path[FCAS_PATH_MAX_BYTES + 1]
        if fcas_table_blob(&self._table, number, &entry, path) != FCAS_OK:
            return None
        return BlobEntry(
            number,
            PyBytes_FromStringAndSize(path, entry.path_len),
            entry.device,
            entry.inode,
            entry.size,
            entry.mtime_ns,
            (entry.flags & FCAS_BLOB_LINKED) != 0,
            (entry.flags & FCAS_BLOB_GROWING) != 0,
        )


@cython.final
cdef class TableReader(_View):
    """A read-only view of a chunk table; see _table.pyi."""

    def __init__(self, int fd):
        if self._open:
            raise UsageError("chunk table: open already")
        self.fd = os.dup(fd)
        check(fcas_table_map(&self._table, self.fd))
        self._open = True


@cython.final
cdef class ChunkTable(_View):
    """The writer of one chunk table of fixed size; see _table.pyi."""

    def __init__(self, uint64_t n_slots=1024, uint64_t n_blobs=256, uint64_t heap_size=65536, *, bytes secret=None):
        if self._open:
            raise UsageError("chunk table: open already")
        if secret is None:
            secret = os.urandom(16)
        if len(secret) != 16:
            raise UsageError(f"secret: expected 16 bytes, got {len(secret)}")
        self.fd = _memfd.create("fastcas-table")
        check(
            fcas_table_create(
                &self._table, self.fd, n_slots, n_blobs, heap_size, <const uint8_t *>PyBytes_AS_STRING(secret)
            )
        )
        self._open = True

    @property
    def heap_used(self):
        self._check_open()
        return table_heap_used(&self._table)

    cdef int _check_writable(self) except -1:
        self._check_open()
        if self._busy:
            raise UsageError("chunk table: a batch is running in another thread, nothing changed")
        return 0

    cdef int _put(self, fcas_entry_type kind, const uint8_t[::1] key, uint32_t blob, uint64_t offset,
                  uint32_t length) except -1:
        self._check_writable()
        cdef fcas_place place
        place.blob, place.offset, place.length = blob, offset, length
        return check(fcas_table_put(&self._table, kind, key_of(key), place))

    def put_chunk(self, const uint8_t[::1] key not None, uint32_t blob, uint64_t offset, uint32_t length):
        self._put(FCAS_ENTRY_CHUNK, key, blob, offset, length)

    def put_manifest(self, const uint8_t[::1] key not None, uint32_t blob, uint64_t offset, uint32_t length):
        self._put(FCAS_ENTRY_MANIFEST, key, blob, offset, length)

    @cython.boundscheck(False)  # the three lengths are compared below
    def put_chunks(self, const uint8_t[::1] keys not None, uint32_t blob, const uint64_t[::1] offsets not None,
                   const uint32_t[::1] lengths not None):
        self._check_writable()
        cdef Py_ssize_t i, n = offsets.shape[0]
        cdef fcas_place place
        cdef int status = FCAS_OK
        if keys.shape[0] != 32 * n or lengths.shape[0] != n:
            raise UsageError(
                f"put_chunks: {keys.shape[0]} B of keys, {n} offsets and {lengths.shape[0]} lengths do not match"
            )
        place.blob = blob
        self._busy += 1
        try:
            with nogil:
                for i in range(n):
                    place.offset = offsets[i]
                    place.length = lengths[i]
                    status = fcas_table_put(&self._table, FCAS_ENTRY_CHUNK, &keys[32 * i], place)
                    if status != FCAS_OK:
                        break
        finally:
            self._busy -= 1
        check(status)

    def put_file(self, const uint8_t[::1] file_hash not None, const uint8_t[::1] manifest_hash not None):
        self._check_writable()
        cdef int status = fcas_table_put_file(&self._table, key_of(file_hash), key_of(manifest_hash))
        if status == FCAS_E_NOTFOUND:
            raise UsageError("manifest_hash: not in the chunk table, the file was not added")
        check(status)

    cdef bint _remove(self, fcas_entry_type kind, const uint8_t[::1] key) except -1:
        self._check_writable()
        return fcas_table_remove(&self._table, kind, key_of(key)) == FCAS_OK

    def remove_chunk(self, const uint8_t[::1] key not None):
        return self._remove(FCAS_ENTRY_CHUNK, key)

    def remove_manifest(self, const uint8_t[::1] key not None):
        return self._remove(FCAS_ENTRY_MANIFEST, key)

    def remove_file(self, const uint8_t[::1] key not None):
        return self._remove(FCAS_ENTRY_FILE, key)

    def put_blob(self, uint32_t number, bytes path not None, *, uint64_t device, uint64_t inode, uint64_t size,
                 int64_t mtime_ns, bint linked=False, bint growing=False):
        self._check_writable()
        cdef fcas_blob entry
        entry.device, entry.inode, entry.size, entry.mtime_ns = device, inode, size, mtime_ns
        entry.flags = (FCAS_BLOB_LINKED if linked else 0) | (FCAS_BLOB_GROWING if growing else 0)
        check(fcas_table_put_blob(&self._table, number, &entry, PyBytes_AS_STRING(path), len(path)))

    def remove_blob(self, uint32_t number):
        self._check_writable()
        return fcas_table_remove_blob(&self._table, number) == FCAS_OK

    def blob_was_used(self, uint32_t number):
        self._check_open()
        return table_blob_was_used(&self._table, number) != 0

    def blob_usage(self):
        self._check_open()
        cdef uint64_t path_bytes = 0
        cdef uint64_t end = fcas_table_blob_usage(&self._table, &path_bytes)
        return end, path_bytes

    def advance(self):
        self._check_writable()
        return fcas_table_advance(&self._table)

    def copy_from(self, _View other not None, *, without_blob=None):
        self._check_writable()
        other._check_open()
        cdef uint32_t except_blob = 0xffffffff if without_blob is None else without_blob
        cdef int status
        if other is self:
            raise UsageError("copy_from: a table cannot be copied from itself")
        self._busy += 1
        other._busy += 1
        try:
            with nogil:
                status = fcas_table_copy_except(&self._table, &other._table, except_blob)
        finally:
            self._busy -= 1
            other._busy -= 1
        check(status)
