"""Engine: the border of csrc/engine/engine.h.

Owns the engine and the mapping of the counters. Turns statuses into errors and queues into tuples; decides nothing.
"""

import ipaddress
import os
import socket
from collections import namedtuple

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from fastcas import limits
from fastcas.errors import LocalProtocolError, UsageError


cdef extern from "common/status.h" nogil:
    enum:
        FCAS_OK
        FCAS_E_NOMEM
        FCAS_E_ARG
        FCAS_E_NOTFOUND
        FCAS_E_CORRUPT
        FCAS_E_SYS


cdef extern from "table/counters.h" nogil:
    ctypedef struct fcas_counter_slot:
        pass
    int fcas_counters_map(int fd, fcas_counter_slot **slots, uint32_t *n_slots)
    void fcas_counters_unmap(fcas_counter_slot *slots, uint32_t n_slots)


cdef extern from "table/bucket.h" nogil:
    ctypedef struct fcas_bucket:
        void *base
    int fcas_bucket_map(fcas_bucket *b, int fd)
    void fcas_bucket_unmap(fcas_bucket *b)


cdef extern from "engine/engine.h" nogil:
    enum:
        FCAS_ENGINE_PARKED
        FCAS_ENGINE_EVENTS
        FCAS_ENGINE_DRAINED
        FCAS_EVENT_WITHDRAW
        FCAS_EVENT_SENT
        FCAS_EVENT_GONE
    ctypedef struct fcas_engine:
        pass
    ctypedef struct fcas_prefix:
        uint8_t ip[16]
        uint32_t bits
    ctypedef struct fcas_engine_config:
        int listener
        int send_path
        uint32_t copy_max
        uint32_t max_connections
        uint32_t max_cached
        uint32_t max_parked
        int64_t header_ns
        int64_t idle_ns
        int64_t stall_ns
        int64_t rate_window_ns
        uint32_t min_rate
        fcas_bucket *bucket
        uint32_t slots
        uint32_t max_per_source
        const fcas_prefix *own
        uint32_t n_own
        int64_t accept_pause_ns
        fcas_counter_slot *counters
    ctypedef struct fcas_parked:
        uint64_t handle
        uint8_t is_head
        uint8_t ip[16]
        uint16_t port
        uint16_t path_len
        uint16_t query_len
        uint16_t peer_len
        uint8_t bytes[1]
    ctypedef struct fcas_event:
        uint32_t kind
        uint32_t blob
        uint32_t reason
        uint32_t ok
        uint64_t handle
    ctypedef struct fcas_engine_stats:
        uint32_t connections
        uint32_t sending
        uint32_t parked
        uint32_t cached
        uint32_t inputs
        uint32_t in_flight
        uint64_t table_number
        uint64_t conn_size
    int fcas_engine_create(fcas_engine **out, const fcas_engine_config *config, int64_t now_ns)
    void fcas_engine_destroy(fcas_engine *e)
    int fcas_engine_fd(const fcas_engine *e)
    unsigned fcas_engine_run(fcas_engine *e, unsigned max_events, int64_t now_ns)
    unsigned fcas_engine_tick(fcas_engine *e, int64_t now_ns)
    int fcas_engine_set_table(fcas_engine *e, int fd, uint64_t number)
    void fcas_engine_drain(fcas_engine *e)
    fcas_parked *fcas_engine_take_parked(fcas_engine *e)
    int fcas_engine_take_event(fcas_engine *e, fcas_event *out)
    int fcas_engine_respond(fcas_engine *e, uint64_t handle, int status, const uint8_t *fields, size_t fields_len,
                            const uint8_t *body, size_t body_len)
    int fcas_engine_respond_chunk(fcas_engine *e, uint64_t handle, const uint8_t *hash, const uint8_t *fields,
                                  size_t fields_len, int notify)
    int fcas_engine_lookup_file(fcas_engine *e, const uint8_t *file_hash, uint8_t *manifest_hash)
    int fcas_engine_read_manifest(fcas_engine *e, const uint8_t *manifest_hash, uint64_t offset, uint8_t *out, size_t n)
    int fcas_engine_manifest_length(fcas_engine *e, const uint8_t *manifest_hash, uint64_t *length)
    size_t fcas_engine_have(fcas_engine *e, const uint8_t *keys, size_t n, uint8_t *found)
    void fcas_engine_statistics(const fcas_engine *e, fcas_engine_stats *out)


SEND_PATHS = ("auto", "sendfile", "copy")
WITHDRAW_REASONS = ("", "gone", "changed", "short", "unreadable")
PARKED, EVENTS, DRAINED = FCAS_ENGINE_PARKED, FCAS_ENGINE_EVENTS, FCAS_ENGINE_DRAINED

Parked = namedtuple("Parked", "handle is_head ip port path query peer")
Withdrawn = namedtuple("Withdrawn", "blob reason")
Sent = namedtuple("Sent", "handle ok")
Gone = namedtuple("Gone", "handle")

OWN_PREFIXES_MAX = 16
cdef bytes _MAPPED = b"\0" * 10 + b"\xff\xff"


cdef int64_t now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec * 1000000000LL + t.tv_nsec


cdef const uint8_t *hash_of(bytes value, str what) except NULL:
    if len(value) != 32:
        raise UsageError(f"{what}: expected 32 bytes, got {len(value)}")
    return <const uint8_t *>PyBytes_AS_STRING(value)


cdef str address(bytes ip):
    if ip.startswith(_MAPPED):
        return socket.inet_ntop(socket.AF_INET, ip[12:])
    return socket.inet_ntop(socket.AF_INET6, ip)


@cython.final
cdef class Engine:
    """One worker's connections; see _engine.pyi."""

    cdef fcas_engine *_e
    cdef fcas_counter_slot *_slots
    cdef uint32_t _n_slots
    cdef fcas_bucket _bucket
    cdef fcas_prefix[16] _own
    cdef unsigned _max_events
    cdef object _on_flags

    def __init__(
        self,
        int listener_fd,
        on_flags,
        *,
        int counters_fd=-1,
        uint32_t counter_slot=0,
        str send_path="auto",
        uint32_t copy_max=limits.SEND_COPY_MAX,
        uint32_t max_connections=limits.CONNECTIONS_PER_WORKER,
        uint32_t max_cached=limits.BLOBS_OPEN_MAX,
        uint32_t max_parked=limits.PARKED_MAX,
        double header_s=limits.HEADER_DEADLINE_S,
        double idle_s=limits.IDLE_S,
        double stall_s=limits.STALL_S,
        uint32_t min_rate_Bps=limits.MIN_RATE_BPS,
        int bucket_fd=-1,
        uint32_t upload_slots=0,
        uint32_t max_per_source=0,
        own_prefixes=(),
        double min_rate_window_s=limits.MIN_RATE_WINDOW_S,
        double accept_pause_s=limits.ACCEPT_PAUSE_S,
        unsigned max_events=limits.EVENTS_PER_RUN,
    ):
        cdef fcas_engine_config config
        cdef int status
        if self._e is not NULL:
            raise UsageError("engine: open already")
        if send_path not in SEND_PATHS:
            raise UsageError(f"send path: expected one of {', '.join(SEND_PATHS)}, got {send_path!r}")
        memset(&config, 0, sizeof(config))
        if counters_fd >= 0:
            if self._slots is NULL and fcas_counters_map(counters_fd, &self._slots, &self._n_slots) != FCAS_OK:
                raise LocalProtocolError("counters: the descriptor is not a counters memfd, not used")
            if counter_slot >= self._n_slots:
                raise UsageError(f"counter slot: {counter_slot} of {self._n_slots}")
            config.counters = slot_at(self._slots, counter_slot)
        self._on_flags = on_flags
        self._max_events = max_events
        config.listener = listener_fd
        config.send_path = SEND_PATHS.index(send_path)
        config.copy_max = copy_max
        config.max_connections = max_connections
        config.max_cached = max_cached
        config.max_parked = max_parked
        config.header_ns = <int64_t>(header_s * 1e9)
        config.idle_ns = <int64_t>(idle_s * 1e9)
        config.stall_ns = <int64_t>(stall_s * 1e9)
        config.rate_window_ns = <int64_t>(min_rate_window_s * 1e9)
        config.min_rate = min_rate_Bps
        config.slots = upload_slots
        config.max_per_source = max_per_source
        config.own = self._own
        config.n_own = self._take_prefixes(own_prefixes)
        if bucket_fd >= 0:
            if self._bucket.base is NULL and fcas_bucket_map(&self._bucket, bucket_fd) != FCAS_OK:
                raise LocalProtocolError("upload limit: the descriptor is not a bucket, not used")
            config.bucket = &self._bucket
        config.accept_pause_ns = <int64_t>(accept_pause_s * 1e9)
        status = fcas_engine_create(&self._e, &config, now())
        if status == FCAS_E_SYS:
            raise OSError(errno, f"engine: {os.strerror(errno)}")
        if status == FCAS_E_NOMEM:
            raise MemoryError("engine: no memory")
        if status != FCAS_OK:
            raise UsageError("engine: a limit is out of its range")

    cdef uint32_t _take_prefixes(self, prefixes) except? 0xffffffff:
        cdef uint32_t i = 0
        cdef int j
        for text in prefixes:
            if i == OWN_PREFIXES_MAX:
                raise UsageError(f"own prefixes: expected at most {OWN_PREFIXES_MAX}")
            try:
                net = ipaddress.ip_network(text)
            except ValueError as exc:
                raise UsageError(f"own prefix: {exc}") from None
            packed = _MAPPED + net.network_address.packed if net.version == 4 else net.network_address.packed
            for j in range(16):
                self._own[i].ip[j] = packed[j]
            self._own[i].bits = net.prefixlen + (96 if net.version == 4 else 0)
            i += 1
        return i

    def __dealloc__(self):
        self._release()

    cdef void _release(self) noexcept:
        fcas_engine_destroy(self._e)
        self._e = NULL
        fcas_bucket_unmap(&self._bucket)
        if self._slots is not NULL:
            fcas_counters_unmap(self._slots, self._n_slots)
            self._slots = NULL

    cdef fcas_engine *_open(self) except NULL:
        if self._e is NULL:
            raise UsageError("engine: closed")
        return self._e

    def close(self):
        self._release()
        self._on_flags = None

    def fileno(self):
        return fcas_engine_fd(self._open())

    def run(self):  # hot
        cdef fcas_engine *e = self._open()
        cdef unsigned flags
        with nogil:
            flags = fcas_engine_run(e, self._max_events, now())
        if flags:
            self._on_flags(flags)

    def tick(self):
        cdef fcas_engine *e = self._open()
        cdef unsigned flags
        with nogil:
            flags = fcas_engine_tick(e, now())
        if flags:
            self._on_flags(flags)

    def set_table(self, int fd, uint64_t number):
        cdef int status = fcas_engine_set_table(self._open(), fd, number)
        if status == FCAS_E_SYS:
            raise OSError(errno, f"chunk table: {os.strerror(errno)}")
        if status != FCAS_OK:
            raise LocalProtocolError("chunk table: the descriptor is not a chunk table of this version, not used")

    def drain(self):
        fcas_engine_drain(self._open())

    def take_parked(self):
        cdef fcas_engine *e = self._open()
        cdef fcas_parked *p
        cdef const char *text
        cdef list out = []
        while True:
            p = fcas_engine_take_parked(e)
            if p is NULL:
                return out
            text = <const char *>p.bytes
            try:
                out.append(
                    Parked(
                        p.handle,
                        bool(p.is_head),
                        address(PyBytes_FromStringAndSize(<const char *>p.ip, 16)),
                        p.port,
                        PyBytes_FromStringAndSize(text, p.path_len),
                        PyBytes_FromStringAndSize(text + p.path_len, p.query_len),
                        PyBytes_FromStringAndSize(text + p.path_len + p.query_len, p.peer_len),
                    )
                )
            finally:
                free(p)

    def take_events(self):
        cdef fcas_engine *e = self._open()
        cdef fcas_event event
        cdef list out = []
        while fcas_engine_take_event(e, &event):
            if event.kind == FCAS_EVENT_WITHDRAW:
                out.append(Withdrawn(event.blob, WITHDRAW_REASONS[event.reason]))
            elif event.kind == FCAS_EVENT_SENT:
                out.append(Sent(event.handle, bool(event.ok)))
            else:
                out.append(Gone(event.handle))
        return out

    def respond(self, uint64_t handle, int status, bytes fields=b"", bytes body=b""):
        cdef int result = fcas_engine_respond(
            self._open(), handle, status, <const uint8_t *>PyBytes_AS_STRING(fields), <size_t>len(fields),
            <const uint8_t *>PyBytes_AS_STRING(body), <size_t>len(body)
        )
        if result == FCAS_E_NOMEM:
            raise MemoryError(f"response: no memory for {len(body)} B")
        if result == FCAS_E_ARG:
            raise UsageError(f"response: {len(fields)} B of fields or {len(body)} B of body are too many")
        return result == FCAS_OK

    def respond_chunk(self, uint64_t handle, bytes chunk_hash not None, bytes fields=b"", *, bint notify=False):
        cdef int result = fcas_engine_respond_chunk(
            self._open(), handle, hash_of(chunk_hash, "chunk_hash"), <const uint8_t *>PyBytes_AS_STRING(fields),
            <size_t>len(fields), notify
        )
        if result == FCAS_E_NOTFOUND:
            return None
        if result == FCAS_E_ARG:
            raise UsageError(f"response: {len(fields)} B of fields are too many")
        return result == FCAS_OK

    def lookup_file(self, bytes file_hash not None):
        cdef uint8_t manifest_hash[32]
        if fcas_engine_lookup_file(self._open(), hash_of(file_hash, "file_hash"), manifest_hash) != FCAS_OK:
            return None
        return PyBytes_FromStringAndSize(<char *>manifest_hash, 32)

    def manifest_length(self, bytes manifest_hash not None):
        cdef uint64_t length = 0
        if fcas_engine_manifest_length(self._open(), hash_of(manifest_hash, "manifest_hash"), &length) != FCAS_OK:
            return None
        return length

    def read_manifest(self, bytes manifest_hash not None, uint64_t offset, uint32_t length):
        cdef fcas_engine *e = self._open()
        cdef const uint8_t *key = hash_of(manifest_hash, "manifest_hash")
        cdef int status
        if length > limits.MANIFEST_SIZE_MAX:
            raise UsageError(f"manifest: {length} B are more than any manifest has")
        cdef bytes out = PyBytes_FromStringAndSize(NULL, length)
        cdef uint8_t *to = <uint8_t *>PyBytes_AS_STRING(out)
        with nogil:
            status = fcas_engine_read_manifest(e, key, offset, to, length)
        return out if status == FCAS_OK else None

    def have(self, bytes keys not None):
        cdef size_t n = <size_t>len(keys) // 32
        cdef fcas_engine *e = self._open()
        if len(keys) % 32 != 0:
            raise UsageError(f"keys: expected a multiple of 32 bytes, got {len(keys)}")
        cdef bytes found = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>n)
        cdef const uint8_t *p = <const uint8_t *>PyBytes_AS_STRING(keys)
        cdef uint8_t *to = <uint8_t *>PyBytes_AS_STRING(found)
        with nogil:
            fcas_engine_have(e, p, n, to)
        return found

    def statistics(self):
        cdef fcas_engine_stats stats
        fcas_engine_statistics(self._open(), &stats)
        return {
            "connections": stats.connections,
            "sending": stats.sending,
            "parked": stats.parked,
            "cached": stats.cached,
            "inputs": stats.inputs,
            "in_flight": stats.in_flight,
            "table_number": stats.table_number,
            "conn_size": stats.conn_size,
        }


cdef inline fcas_counter_slot *slot_at(fcas_counter_slot *slots, uint32_t i) noexcept nogil:
    return slots + i
