# The typed border of csrc/receiver: owns the objects, releases the GIL, turns statuses into errors.
# What each name does stands in _receiver.pyi.

import ipaddress
import os
import re

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from fastcas.errors import UsageError
from fastcas.hashing import kernel_name

cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    struct sockaddr:
        pass
    struct sockaddr_storage:
        unsigned short ss_family
    int AF_INET
    int AF_INET6

cdef extern from "<netinet/in.h>" nogil:
    struct in_addr:
        uint32_t s_addr
    struct sockaddr_in:
        unsigned short sin_family
        uint16_t sin_port
        in_addr sin_addr
    struct in6_addr:
        uint8_t s6_addr[16]
    struct sockaddr_in6:
        unsigned short sin6_family
        uint16_t sin6_port
        in6_addr sin6_addr
    uint16_t htons(uint16_t)

cdef extern from "<stdio.h>" nogil:
    int renameat2(int, const char *, int, const char *, unsigned int)

cdef extern from "<fcntl.h>" nogil:
    int AT_FDCWD

cdef extern from "common/status.h" nogil:
    int FCAS_OK
    int FCAS_E_NOMEM
    int FCAS_E_SYS

cdef extern from "sha256/sha256.h" nogil:
    ctypedef struct fcas_sha256_kernel:
        pass
    int fcas_sha256_select(const char *, const fcas_sha256_kernel **)

cdef extern from "receiver/job.h" nogil:
    ctypedef struct fcas_rx_layout:
        uint64_t size
        uint32_t chunk_size
        uint32_t n_chunks
        uint32_t n_parity
        uint32_t k
        uint32_t m
        const uint8_t *hashes
        const uint8_t *midstates
        const uint8_t *lengths
        const uint8_t *parity_hashes
        uint8_t file_hash[32]
        bint check_links
        bint links_alone
        const fcas_sha256_kernel *kernel
    ctypedef struct fcas_rx_job:
        pass
    int fcas_rx_job_new(const fcas_rx_layout *, int, int, int, fcas_rx_job **)
    void fcas_rx_job_release(fcas_rx_job *)
    uint32_t fcas_rx_job_length(const fcas_rx_job *, uint32_t)
    int fcas_rx_job_take(const fcas_rx_job *, uint32_t, int, uint64_t, bint, uint8_t *, unsigned *)

cdef extern from "receiver/receiver.h" nogil:
    ctypedef struct fcas_rx:
        pass
    ctypedef struct fcas_rx_conn:
        pass
    ctypedef struct fcas_rx_config:
        uint32_t n_threads
        size_t memory_max
        uint32_t connect_ms
        uint32_t first_byte_ms
        uint32_t stall_ms
        const fcas_sha256_kernel *kernel
    ctypedef struct fcas_rx_request:
        fcas_rx_request *next
        uint64_t id
        bint chosen
        fcas_rx_job *job
        uint32_t index
        bint has_hash
        uint8_t hash[32]
        uint64_t max_length
        uint32_t first_byte_ms
        int outcome
        int refusal
        int sys_errno
        uint16_t http_status
        unsigned flags
        uint64_t length
        uint64_t service_us
        uint64_t connect_us
        uint8_t *body
        uint8_t digest[32]
    uint32_t FCAS_RX_ANY_INDEX
    int FCAS_RX_OK
    int FCAS_RX_CORRUPT
    int fcas_rx_new(const fcas_rx_config *, fcas_rx **)
    void fcas_rx_free(fcas_rx *)
    int fcas_rx_eventfd(const fcas_rx *)
    fcas_rx_conn *fcas_rx_open(fcas_rx *, const sockaddr *, socklen_t, const char *, const char *)
    void fcas_rx_close(fcas_rx_conn *)
    uint64_t fcas_rx_conn_bytes(const fcas_rx_conn *)
    fcas_rx_request *fcas_rx_request_new(const char *, size_t)
    fcas_rx_request *fcas_rx_request_chunk(fcas_rx_job *, uint32_t)
    void fcas_rx_submit(fcas_rx_conn *, fcas_rx_request *)
    fcas_rx_request *fcas_rx_take(fcas_rx *)
    void fcas_rx_request_free(fcas_rx_request *)
    size_t fcas_rx_memory(fcas_rx *)
    ctypedef struct fcas_rx_times:
        uint64_t receive_ns
        uint64_t hash_ns
        uint64_t write_ns
    bint fcas_rx_thread_times(const fcas_rx *, uint32_t, fcas_rx_times *)

_TARGET = re.compile(rb"/[A-Za-z0-9/?&=._~%-]{0,999}")
_NODE_ID = re.compile(r"[0-9a-f]{1,64}", re.ASCII)


cdef const fcas_sha256_kernel *_kernel = NULL
# fastcas.hashing has read FASTCAS_SHA256_KERNEL and refused what does not work.
if fcas_sha256_select(kernel_name().encode(), &_kernel) != FCAS_OK:
    raise ImportError(f"SHA-256 kernel {kernel_name()}: not in this extension")


cdef int _check(int status, str what) except -1:
    if status == FCAS_E_NOMEM:
        raise MemoryError(what)
    if status == FCAS_E_SYS:
        raise OSError(errno, os.strerror(errno), what)
    if status != FCAS_OK:
        raise ValueError(what)
    return 0


@cython.final
cdef class Job:
    cdef fcas_rx_job *_job
    cdef uint32_t _chunk_size

    def __cinit__(self, manifest, int fd, int parity_fd=-1, *, int direct_fd=-1, bint check_links=True,
                  bint links_alone=False):
        cdef fcas_rx_layout layout
        cdef bytes hashes = manifest.hashes
        cdef bytes midstates = manifest.midstates
        cdef bytes parity_hashes = manifest.parity_hashes
        cdef bytes lengths = manifest.lengths
        cdef bytes file_hash = manifest.file_hash
        memset(&layout, 0, sizeof(layout))
        layout.size = manifest.size
        layout.chunk_size = manifest.chunk_size
        layout.n_chunks = manifest.n_chunks
        layout.n_parity = manifest.n_parity
        layout.kernel = _kernel
        layout.check_links = check_links
        layout.links_alone = links_alone
        layout.k = manifest.k
        layout.m = manifest.m
        # Manifest's constructor holds these lengths; they are checked again because C trusts them.
        if (
            len(hashes) != 32 * layout.n_chunks
            or len(midstates) != (0 if lengths else 32 * max(<int>layout.n_chunks - 1, 0))
            or (lengths and len(lengths) != 4 * layout.n_chunks)
            or len(parity_hashes) != 32 * layout.n_parity
            or len(file_hash) != 32
            or layout.n_chunks == 0
            or layout.chunk_size % 64
        ):
            raise ValueError("manifest: the arrays do not fit the numbers")
        layout.hashes = hashes
        layout.midstates = midstates
        if lengths:
            layout.lengths = lengths
        layout.parity_hashes = parity_hashes
        memcpy(layout.file_hash, <const uint8_t *>file_hash, 32)
        _check(fcas_rx_job_new(&layout, fd, direct_fd, parity_fd, &self._job), "job")
        self._chunk_size = layout.chunk_size

    def __dealloc__(self):
        fcas_rx_job_release(self._job)

    def take(self, index, int fd, offset, bint write):
        cdef uint32_t i = index
        cdef uint64_t at = offset
        cdef unsigned flags = 0
        cdef int error
        cdef uint8_t *buffer
        if fcas_rx_job_length(self._job, i) == 0:
            raise IndexError(f"chunk {i}: the file has no such chunk")
        buffer = <uint8_t *>malloc(self._chunk_size)
        if buffer == NULL:
            raise MemoryError("chunk buffer")
        with nogil:
            error = fcas_rx_job_take(self._job, i, fd, at, write, buffer, &flags)
        free(buffer)
        if error:
            raise OSError(error, os.strerror(error))
        return flags


@cython.final
@cython.freelist(64)
cdef class Answer:
    cdef readonly int outcome
    cdef readonly bint chosen
    cdef readonly uint32_t chunk
    cdef readonly unsigned flags
    cdef readonly uint64_t length
    cdef readonly uint64_t service_us
    cdef readonly uint64_t connect_us
    cdef readonly int detail
    cdef readonly bytes body


@cython.final
cdef class Receiver:
    cdef fcas_rx *_rx

    def __cinit__(self, int n_threads, size_t memory_max, double connect_s, double first_byte_s, double stall_s):
        cdef fcas_rx_config config
        config.n_threads = n_threads
        config.memory_max = memory_max
        config.connect_ms = <uint32_t>(connect_s * 1000)
        config.first_byte_ms = <uint32_t>(first_byte_s * 1000)
        config.stall_ms = <uint32_t>(stall_s * 1000)
        config.kernel = _kernel
        _check(fcas_rx_new(&config, &self._rx), "receiver")

    def __dealloc__(self):
        self.close()

    cpdef close(self):
        cdef fcas_rx *rx = self._rx
        self._rx = NULL
        if rx != NULL:
            with nogil:
                fcas_rx_free(rx)

    def fileno(self):
        if self._rx == NULL:
            raise ValueError("receiver is closed")
        return fcas_rx_eventfd(self._rx)

    @property
    def buffer_bytes(self):
        return fcas_rx_memory(self._rx) if self._rx != NULL else 0

    def times(self):
        cdef fcas_rx_times spent
        cdef uint32_t number = 0
        cdef list out = []
        while self._rx != NULL and fcas_rx_thread_times(self._rx, number, &spent):
            out.append((spent.receive_ns / 1e9, spent.hash_ns / 1e9, spent.write_ns / 1e9))
            number += 1
        return out

    def open(self, str ip, int port, node_id=None):
        return Connection(self, ip, port, node_id)

    def drain(self):
        cdef fcas_rx_request *r
        cdef fcas_rx_request *following
        cdef Answer answer
        cdef list same = None
        cdef uint64_t number = 0
        cdef dict out = {}
        if self._rx == NULL:
            return out
        r = fcas_rx_take(self._rx)
        while r != NULL:
            following = r.next
            answer = Answer.__new__(Answer)
            answer.outcome = r.outcome
            answer.chosen = r.chosen
            answer.chunk = r.index
            answer.flags = r.flags
            answer.length = r.length
            answer.service_us = r.service_us
            answer.connect_us = r.connect_us
            answer.detail = r.refusal if r.refusal else r.sys_errno if r.sys_errno else r.http_status
            if r.body != NULL and r.outcome == FCAS_RX_OK:
                answer.body = PyBytes_FromStringAndSize(<char *>r.body, <Py_ssize_t>r.length)
            elif r.outcome == FCAS_RX_CORRUPT:
                answer.body = PyBytes_FromStringAndSize(<char *>r.digest, 32)
            if same is None or r.id != number:
                number = r.id
                same = out.setdefault(number, [])
            same.append(answer)
            fcas_rx_request_free(r)
            r = following
        return out


cdef void _free_unsubmitted(fcas_rx_request *r) noexcept:
    cdef fcas_rx_request *following
    while r != NULL:
        following = r.next
        r.job = NULL  # only fcas_rx_submit takes a hold on it
        fcas_rx_request_free(r)
        r = following


@cython.final
@cython.no_gc_clear
cdef class Connection:
    cdef Receiver _receiver
    cdef fcas_rx_conn *_conn

    def __cinit__(self, Receiver receiver not None, str ip, int port, node_id):
        cdef sockaddr_storage address
        cdef sockaddr_in *v4 = <sockaddr_in *>&address
        cdef sockaddr_in6 *v6 = <sockaddr_in6 *>&address
        cdef bytes packed, host, fields
        cdef socklen_t size
        self._receiver = receiver
        if receiver._rx == NULL:
            raise ValueError("receiver is closed")
        if not 1 <= port <= 65535:
            raise UsageError(f"port: expected 1..65535, got {port}")
        if node_id is not None and not _NODE_ID.fullmatch(node_id):
            raise UsageError("node id: expected lower-case hex digits")
        parsed = ipaddress.ip_address(ip)
        packed = parsed.packed
        memset(&address, 0, sizeof(address))
        if parsed.version == 4:
            v4.sin_family = <unsigned short>AF_INET
            v4.sin_port = htons(<uint16_t>port)
            memcpy(&v4.sin_addr, <const uint8_t *>packed, 4)
            size = sizeof(sockaddr_in)
            host = f"{parsed}:{port}".encode()
        else:
            v6.sin6_family = <unsigned short>AF_INET6
            v6.sin6_port = htons(<uint16_t>port)
            memcpy(&v6.sin6_addr, <const uint8_t *>packed, 16)
            size = sizeof(sockaddr_in6)
            host = f"[{ipaddress.IPv6Address(packed)}]:{port}".encode()
        fields = b"" if node_id is None else f"Fastcas-Peer: {node_id}\r\n".encode()
        self._conn = fcas_rx_open(receiver._rx, <const sockaddr *>&address, size, host, fields)
        if self._conn == NULL:
            raise MemoryError("connection")

    def __dealloc__(self):
        self.close()

    cpdef close(self):
        if self._conn != NULL and self._receiver._rx != NULL:
            fcas_rx_close(self._conn)
        self._conn = NULL

    @property
    def n_received(self):
        if self._conn == NULL or self._receiver._rx == NULL:
            return 0
        return fcas_rx_conn_bytes(self._conn)

    cdef int _submit(self, fcas_rx_request *request) except -1:
        if request == NULL:
            raise MemoryError("request")
        if self._conn == NULL or self._receiver._rx == NULL:
            _free_unsubmitted(request)
            raise ValueError("connection is closed")
        fcas_rx_submit(self._conn, request)
        return 0

    def get_chunks(self, uint64_t listener, Job job not None, list chunks not None):
        cdef fcas_rx_request *first = NULL
        cdef fcas_rx_request *last = NULL
        cdef fcas_rx_request *r
        cdef uint32_t index
        try:
            for index in chunks:
                if fcas_rx_job_length(job._job, index) == 0:
                    raise IndexError(f"chunk {index}: the file has no such chunk")
                r = fcas_rx_request_chunk(job._job, index)
                if r == NULL:
                    raise MemoryError("request")
                r.id = listener
                if first == NULL:
                    first = r
                else:
                    last.next = r
                last = r
        except BaseException:
            _free_unsubmitted(first)
            raise
        if first != NULL:
            self._submit(first)

    def get_next(self, uint64_t listener, Job job not None, bytes target not None, double first_byte_s):
        cdef fcas_rx_request *r
        if not _TARGET.fullmatch(target):
            raise ValueError("target: not a plain path and query")
        r = fcas_rx_request_new(target, len(target))
        if r != NULL:
            r.id = listener
            r.chosen = True
            r.job = job._job
            r.index = FCAS_RX_ANY_INDEX
            r.first_byte_ms = <uint32_t>(first_byte_s * 1000)
        self._submit(r)

    def get(self, uint64_t listener, bytes target not None, uint64_t max_length, expected_hash=None,
            double first_byte_s=0.0):
        cdef fcas_rx_request *r
        cdef bytes wanted = b"" if expected_hash is None else expected_hash
        if not _TARGET.fullmatch(target):
            raise ValueError("target: not a plain path and query")
        if expected_hash is not None and len(wanted) != 32:
            raise ValueError("expected_hash: expected 32 bytes")
        r = fcas_rx_request_new(target, len(target))
        if r != NULL:
            r.id = listener
            r.max_length = max_length
            r.first_byte_ms = <uint32_t>(first_byte_s * 1000)
            if expected_hash is not None:
                r.has_hash = True
                memcpy(r.hash, <const uint8_t *>wanted, 32)
        self._submit(r)


def rename_noreplace(source, target):
    cdef bytes source_b = os.fsencode(source)
    cdef bytes target_b = os.fsencode(target)
    if renameat2(AT_FDCWD, source_b, AT_FDCWD, target_b, 1) != 0:
        raise OSError(errno, os.strerror(errno), source, None, target)
