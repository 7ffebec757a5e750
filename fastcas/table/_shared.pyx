"""Ring, HaveLog, GivenBoard, Bucket and Counters: the border of csrc/table/{ring,havelog,given,bucket,counters}.h.

Owns the mappings and duplicates of descriptors. Turns statuses into errors; holds no protocol of its own.
"""

import os

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, qsort
from libc.string cimport memcmp, memcpy
from posix.unistd cimport close as close_fd

from fastcas.errors import LocalProtocolError, TableFull, UsageError
from fastcas.table import memfd as _memfd


cdef extern from "common/status.h" nogil:
    enum:
        FCAS_OK
        FCAS_E_NOMEM
        FCAS_E_ARG
        FCAS_E_FULL
        FCAS_E_NOTFOUND
        FCAS_E_CORRUPT
        FCAS_E_SYS
        FCAS_E_VERSION


cdef extern from "table/ring.h" nogil:
    ctypedef struct fcas_ring:
        pass
    int fcas_ring_create(int fd, uint64_t capacity)
    int fcas_ring_map(fcas_ring *r, int fd, int eventfd)
    void fcas_ring_unmap(fcas_ring *r)
    size_t fcas_ring_max_message(const fcas_ring *r)
    int fcas_ring_push(fcas_ring *r, const uint8_t *message, size_t n)
    int fcas_ring_peek(fcas_ring *r, size_t *length)
    int fcas_ring_pop(fcas_ring *r, uint8_t *out, size_t out_size, size_t *length)
    void fcas_ring_clear_event(fcas_ring *r)


cdef extern from "table/havelog.h" nogil:
    ctypedef struct fcas_havelog:
        uint32_t n_total
        uint8_t *bits
    int fcas_havelog_create(fcas_havelog *h, int fd, const uint8_t *file_hash, const uint8_t *manifest_hash,
                            uint32_t n_total)
    int fcas_havelog_map(fcas_havelog *h, int fd)
    void fcas_havelog_unmap(fcas_havelog *h)
    const uint8_t *fcas_havelog_file_hash(const fcas_havelog *h)
    const uint8_t *fcas_havelog_manifest_hash(const fcas_havelog *h)
    int fcas_havelog_append(fcas_havelog *h, uint32_t i)
    uint32_t fcas_havelog_generation(const fcas_havelog *h)
    uint32_t fcas_havelog_since(const fcas_havelog *h, uint32_t start, uint32_t *out, uint32_t max)
    uint32_t fcas_havelog_refresh(fcas_havelog *h)


cdef extern from "table/given.h" nogil:
    ctypedef struct fcas_given:
        pass
    int fcas_given_create(int fd, uint32_t n_slots, uint64_t bits_size, const uint8_t *secret)
    int fcas_given_map(fcas_given *b, int fd)
    void fcas_given_unmap(fcas_given *b)
    int fcas_given_claim(fcas_given *b, const uint8_t *manifest_hash, uint32_t n, uint32_t i)
    int fcas_given_claim_from(fcas_given *b, const uint8_t *manifest_hash, uint32_t n, uint32_t start, uint64_t pick,
                              uint32_t *out)
    void fcas_given_clear(fcas_given *b, const uint8_t *manifest_hash, uint32_t i)
    int fcas_given_is_given(const fcas_given *b, const uint8_t *manifest_hash, uint32_t i)


cdef extern from "table/bucket.h" nogil:
    ctypedef struct fcas_bucket:
        uint64_t rate
        uint32_t slice
    int fcas_bucket_create(int fd, uint64_t rate)
    int fcas_bucket_map(fcas_bucket *b, int fd)
    void fcas_bucket_unmap(fcas_bucket *b)
    int64_t fcas_bucket_take(fcas_bucket *b, uint64_t n, int64_t now_ns)
    void fcas_bucket_charge(fcas_bucket *b, uint64_t n, int64_t now_ns)
    void fcas_bucket_refund(fcas_bucket *b, uint64_t n)


cdef extern from *:
    """
    #include "table/counters.h"
    static uint64_t counter_get(fcas_counter_slot *s, int i)
    {
        return atomic_load_explicit(&s->v[i], memory_order_acquire);
    }
    """
    ctypedef struct fcas_counter_slot:
        pass
    ctypedef enum fcas_counter:
        FCAS_CTR_COUNT
    int fcas_counters_create(int fd, uint32_t n_slots)
    int fcas_counters_map(int fd, fcas_counter_slot **slots, uint32_t *n_slots)
    void fcas_counters_unmap(fcas_counter_slot *slots, uint32_t n_slots)
    void fcas_count(fcas_counter_slot *s, fcas_counter c, uint64_t n)
    void fcas_gauge(fcas_counter_slot *s, fcas_counter c, uint64_t n)
    uint64_t counter_get(fcas_counter_slot *s, int i)


cdef int check(int status, str subject) except -1:
    if status == FCAS_OK:
        return 0
    cdef int saved = errno
    if status == FCAS_E_SYS:
        raise OSError(saved, f"{subject}: {os.strerror(saved)}")
    if status == FCAS_E_NOMEM:
        raise MemoryError(f"{subject}: no memory")
    if status == FCAS_E_ARG:
        raise UsageError(f"{subject}: argument out of range")
    if status == FCAS_E_FULL:
        raise TableFull(f"{subject}: full, nothing changed")
    if status == FCAS_E_VERSION:
        raise LocalProtocolError(f"{subject}: format version unknown, not used")
    raise LocalProtocolError(f"{subject}: contents contradict the format, not used any further")


cdef const uint8_t *hash_of(const uint8_t[::1] value, str name) except NULL:
    if value.shape[0] != 32:
        raise UsageError(f"{name}: expected 32 bytes, got {value.shape[0]}")
    return &value[0]


@cython.final
cdef class Ring:
    """One direction of messages between two processes; see _shared.pyi."""

    cdef fcas_ring _ring
    cdef bint _open
    cdef readonly int memfd
    cdef readonly int eventfd

    def __cinit__(self):
        self.memfd = self.eventfd = -1

    def __dealloc__(self):
        self._release()

    @staticmethod
    def create(uint64_t capacity=1 << 20):
        fd = _memfd.create("fastcas-ring")
        try:
            check(fcas_ring_create(fd, capacity), "ring")
            event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            try:
                return Ring.attach(fd, event)
            finally:
                os.close(event)
        finally:
            os.close(fd)

    @staticmethod
    def attach(int memfd, int eventfd):
        cdef Ring ring = Ring.__new__(Ring)
        ring.memfd = os.dup(memfd)
        ring.eventfd = os.dup(eventfd)
        os.set_blocking(ring.eventfd, False)
        check(fcas_ring_map(&ring._ring, ring.memfd, ring.eventfd), "ring")
        ring._open = True
        return ring

    @property
    def max_message(self):
        self._check_open()
        return fcas_ring_max_message(&self._ring)

    def push(self, const uint8_t[::1] message not None):
        self._check_open()
        cdef size_t n = <size_t>message.shape[0]
        cdef int status = fcas_ring_push(&self._ring, &message[0] if n > 0 else NULL, n)
        if status == FCAS_E_FULL:
            return False
        if status == FCAS_E_ARG:
            raise UsageError(f"ring: message of {n} B exceeds {self.max_message} B; it was not sent")
        check(status, "ring")
        return True

    def pop(self):
        self._check_open()
        return self._next()

    def drain(self):
        self._check_open()
        fcas_ring_clear_event(&self._ring)
        messages = []
        # A producer that never stops must not keep us here: at most what one full ring holds.
        cdef size_t budget = 2 * fcas_ring_max_message(&self._ring)
        cdef size_t taken = 0
        while taken < budget:
            message = self._next()
            if message is None:
                return messages
            messages.append(message)
            taken += 8 + ((<size_t>len(message) + 7) & ~<size_t>7)
        os.eventfd_write(self.eventfd, 1)  # there may be more: come again
        return messages

    cdef object _next(self):
        cdef size_t n = 0, got = 0
        cdef int status = fcas_ring_peek(&self._ring, &n)
        if status == FCAS_E_NOTFOUND:
            return None
        check(status, "ring")
        message = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>n)
        status = fcas_ring_pop(&self._ring, <uint8_t *>PyBytes_AS_STRING(message), n, &got)
        if status == FCAS_E_ARG or (status == FCAS_OK and got != n):
            status = FCAS_E_CORRUPT  # the length changed between two looks
        check(status, "ring")
        return message

    cdef int _check_open(self) except -1:
        if not self._open:
            raise UsageError("ring: closed")
        return 0

    cdef void _release(self) noexcept:
        if self._open:
            self._open = False
            fcas_ring_unmap(&self._ring)
        if self.memfd >= 0:
            close_fd(self.memfd)
        if self.eventfd >= 0:
            close_fd(self.eventfd)
        self.memfd = self.eventfd = -1

    def close(self):
        self._release()


@cython.final
cdef class HaveLog:
    """Which chunks of one partial file are here; see _shared.pyi."""

    cdef fcas_havelog _log
    cdef bint _open
    cdef readonly int fd

    def __cinit__(self):
        self.fd = -1

    def __dealloc__(self):
        self._release()

    @staticmethod
    def create(const uint8_t[::1] file_hash not None, const uint8_t[::1] manifest_hash not None, uint32_t n_total):
        cdef const uint8_t *file_key = hash_of(file_hash, "file_hash")
        cdef const uint8_t *manifest_key = hash_of(manifest_hash, "manifest_hash")
        cdef HaveLog log = HaveLog.__new__(HaveLog)
        log.fd = _memfd.create("fastcas-have")
        check(fcas_havelog_create(&log._log, log.fd, file_key, manifest_key, n_total), "have log")
        log._open = True
        return log

    @staticmethod
    def attach(int fd):
        cdef HaveLog log = HaveLog.__new__(HaveLog)
        log.fd = os.dup(fd)
        check(fcas_havelog_map(&log._log, log.fd), "have log")
        log._open = True
        return log

    @property
    def file_hash(self):
        self._check_open()
        return PyBytes_FromStringAndSize(<const char *>fcas_havelog_file_hash(&self._log), 32)

    @property
    def manifest_hash(self):
        self._check_open()
        return PyBytes_FromStringAndSize(<const char *>fcas_havelog_manifest_hash(&self._log), 32)

    @property
    def n_total(self):
        self._check_open()
        return self._log.n_total

    @property
    def generation(self):
        self._check_open()
        return fcas_havelog_generation(&self._log)

    def append(self, uint32_t i):
        self._check_open()
        if fcas_havelog_append(&self._log, i) != FCAS_OK:
            raise UsageError(f"have log: chunk {i} of {self._log.n_total}, or opened for reading; nothing appended")

    def since(self, uint64_t g):
        self._check_open()
        cdef uint32_t generation = fcas_havelog_generation(&self._log)
        cdef uint32_t start = 0 if g > generation else <uint32_t>g
        cdef uint32_t n = generation - start
        cdef uint32_t k
        if n == 0:
            return []
        cdef uint32_t *numbers = <uint32_t *>malloc(n * sizeof(uint32_t))
        if numbers == NULL:
            raise MemoryError("have log: no memory")
        try:
            n = fcas_havelog_since(&self._log, start, numbers, n)
            return [numbers[k] for k in range(n)]
        finally:
            free(numbers)

    def bitfield(self):
        self._check_open()
        fcas_havelog_refresh(&self._log)
        return PyBytes_FromStringAndSize(<const char *>self._log.bits, (<Py_ssize_t>self._log.n_total + 7) // 8)

    cdef int _check_open(self) except -1:
        if not self._open:
            raise UsageError("have log: closed")
        return 0

    cdef void _release(self) noexcept:
        if self._open:
            self._open = False
            fcas_havelog_unmap(&self._log)
        if self.fd >= 0:
            close_fd(self.fd)
        self.fd = -1

    def close(self):
        self._release()


@cython.final
cdef class GivenBoard:
    """What was given through NEXT, shared by all workers of a node; see _shared.pyi."""

    cdef fcas_given _board
    cdef bint _open
    cdef readonly int fd

    def __cinit__(self):
        self.fd = -1

    def __dealloc__(self):
        self._release()

    @staticmethod
    def create(uint32_t slots=256, uint64_t bits_bytes=4 << 20):
        cdef bytes secret = os.urandom(16)
        fd = _memfd.create("fastcas-given")
        try:
            check(fcas_given_create(fd, slots, bits_bytes, <const uint8_t *>PyBytes_AS_STRING(secret)), "given board")
            return GivenBoard.attach(fd)
        finally:
            os.close(fd)

    @staticmethod
    def attach(int fd):
        cdef GivenBoard board = GivenBoard.__new__(GivenBoard)
        board.fd = os.dup(fd)
        check(fcas_given_map(&board._board, board.fd), "given board")
        board._open = True
        return board

    def claim(self, const uint8_t[::1] manifest_hash not None, uint32_t n, uint32_t i):
        self._check_open()
        cdef int status = fcas_given_claim(&self._board, hash_of(manifest_hash, "manifest_hash"), n, i)
        if status == FCAS_E_NOTFOUND or status == FCAS_E_FULL:
            return False
        check(status, f"given board: chunk {i} of {n}")
        return True

    def claim_from(self, const uint8_t[::1] manifest_hash not None, uint32_t n, uint32_t start, uint64_t pick):
        self._check_open()
        cdef uint32_t chosen = 0
        cdef int status = fcas_given_claim_from(
            &self._board, hash_of(manifest_hash, "manifest_hash"), n, start, pick, &chosen
        )
        if status == FCAS_E_NOTFOUND or status == FCAS_E_FULL:
            return None
        check(status, f"given board: chunks from {start} of {n}")
        return chosen

    def clear(self, const uint8_t[::1] manifest_hash not None, uint32_t i):
        self._check_open()
        fcas_given_clear(&self._board, hash_of(manifest_hash, "manifest_hash"), i)

    def is_given(self, const uint8_t[::1] manifest_hash not None, uint32_t i):
        self._check_open()
        return fcas_given_is_given(&self._board, hash_of(manifest_hash, "manifest_hash"), i) != 0

    cdef int _check_open(self) except -1:
        if not self._open:
            raise UsageError("given board: closed")
        return 0

    cdef void _release(self) noexcept:
        if self._open:
            self._open = False
            fcas_given_unmap(&self._board)
        if self.fd >= 0:
            close_fd(self.fd)
        self.fd = -1

    def close(self):
        self._release()


@cython.final
cdef class Bucket:
    """The upload limit that all workers share; see _shared.pyi."""

    cdef fcas_bucket _bucket
    cdef bint _open
    cdef readonly int fd

    def __cinit__(self):
        self.fd = -1

    def __dealloc__(self):
        self._release()

    @staticmethod
    def create(uint64_t rate_Bps):
        fd = _memfd.create("fastcas-bucket")
        try:
            check(fcas_bucket_create(fd, rate_Bps), f"upload limit: {rate_Bps} B/s")
            return Bucket.attach(fd)
        finally:
            os.close(fd)

    @staticmethod
    def attach(int fd):
        cdef Bucket bucket = Bucket.__new__(Bucket)
        bucket.fd = os.dup(fd)
        check(fcas_bucket_map(&bucket._bucket, bucket.fd), "upload limit")
        bucket._open = True
        return bucket

    @property
    def rate_Bps(self):
        return self._bucket.rate

    @property
    def slice_bytes(self):
        return self._bucket.slice

    def take(self, uint64_t n, int64_t now_ns):
        self._check_open()
        if n > self._bucket.slice:
            raise UsageError(f"upload limit: expected at most {self._bucket.slice} B at once, got {n}")
        return fcas_bucket_take(&self._bucket, n, now_ns)

    def charge(self, uint32_t n, int64_t now_ns):
        self._check_open()
        fcas_bucket_charge(&self._bucket, n, now_ns)

    def refund(self, uint32_t n):
        self._check_open()
        fcas_bucket_refund(&self._bucket, n)

    cdef int _check_open(self) except -1:
        if not self._open:
            raise UsageError("upload limit: closed")
        return 0

    cdef void _release(self) noexcept:
        if self._open:
            self._open = False
            fcas_bucket_unmap(&self._bucket)
        if self.fd >= 0:
            close_fd(self.fd)
        self.fd = -1

    def close(self):
        self._release()


# The order of fcas_counter in csrc/table/counters.h.
NAMES = (
    "heartbeat_ns",
    "epoch_safe",
    "epoch_table",
    "accepted",
    "active",
    "requests",
    "bytes_sent",
    "status_2xx",
    "status_304",
    "status_400",
    "status_404",
    "status_416",
    "status_503",
    "evict_header",
    "evict_stall",
    "evict_idle",
    "evict_cap",
    "shortfall",
    "accept_emfile",
    "next_given",
    "evict_slow",
    "evict_source",
    "limit_waits",
    "peer_queued",
    "peer_busy",
    "slot_lost",
    "queue_bytes",
    "uplink_rate",
    "next_lost",
)
cdef dict _INDEX = {name: i for i, name in enumerate(NAMES)}
if len(NAMES) != <int>FCAS_CTR_COUNT:
    raise AssertionError("counters.h and NAMES differ")


@cython.final
cdef class Counters:
    """Counters of all processes of a node; see _shared.pyi."""

    cdef fcas_counter_slot *_slots
    cdef readonly uint32_t n_slots
    cdef readonly int fd
    NAMES = NAMES

    def __cinit__(self):
        self.fd = -1

    def __dealloc__(self):
        self._release()

    @staticmethod
    def create(uint32_t n_slots):
        fd = _memfd.create("fastcas-counters")
        try:
            check(fcas_counters_create(fd, n_slots), "counters")
            return Counters.attach(fd)
        finally:
            os.close(fd)

    @staticmethod
    def attach(int fd):
        cdef Counters counters = Counters.__new__(Counters)
        counters.fd = os.dup(fd)
        check(fcas_counters_map(counters.fd, &counters._slots, &counters.n_slots), "counters")
        return counters

    cdef fcas_counter_slot *_slot(self, uint32_t slot) except NULL:
        if self._slots == NULL:
            raise UsageError("counters: closed")
        if slot >= self.n_slots:
            raise UsageError(f"counters: slot {slot} of {self.n_slots}")
        return &self._slots[slot]

    def get(self, uint32_t slot, str name not None):
        cdef fcas_counter_slot *s = self._slot(slot)
        return counter_get(s, index_of(name))

    def add(self, uint32_t slot, str name not None, uint64_t n=1):
        cdef fcas_counter_slot *s = self._slot(slot)
        fcas_count(s, <fcas_counter>index_of(name), n)

    def set(self, uint32_t slot, str name not None, uint64_t value):
        cdef fcas_counter_slot *s = self._slot(slot)
        fcas_gauge(s, <fcas_counter>index_of(name), value)

    def clear(self, uint32_t slot):
        cdef fcas_counter_slot *s = self._slot(slot)
        cdef int i
        for i in range(<int>FCAS_CTR_COUNT):
            fcas_gauge(s, <fcas_counter>i, 0)

    def snapshot(self, uint32_t slot):
        cdef fcas_counter_slot *s = self._slot(slot)
        return {name: counter_get(s, i) for i, name in enumerate(NAMES)}

    cdef void _release(self) noexcept:
        if self._slots != NULL:
            fcas_counters_unmap(self._slots, self.n_slots)
            self._slots = NULL
        if self.fd >= 0:
            close_fd(self.fd)
        self.fd = -1

    def close(self):
        self._release()


cdef int index_of(str name) except -1:
    index = _INDEX.get(name)
    if index is None:
        raise UsageError(f"counters: no counter is named {name!r}")
    return index


cdef int compare_keys(const void *a, const void *b) noexcept nogil:
    return memcmp(a, b, 32)


def sort_keys(uint8_t[::1] keys not None):
    """Sort keys (n * 32 bytes) in place, drop repeated ones; return how many are left at the front."""
    cdef size_t n = <size_t>keys.shape[0] // 32
    cdef size_t i, kept = 1
    cdef uint8_t *p
    if keys.shape[0] % 32 != 0:
        raise UsageError(f"keys: expected a multiple of 32 bytes, got {keys.shape[0]}")
    if n == 0:
        return 0
    p = &keys[0]
    with nogil:
        qsort(p, n, 32, compare_keys)
        for i in range(1, n):
            if memcmp(p + 32 * i, p + 32 * (kept - 1), 32) != 0:
                if i != kept:
                    memcpy(p + 32 * kept, p + 32 * i, 32)
                kept += 1
    return kept
