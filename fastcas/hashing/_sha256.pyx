"""Border of csrc/sha256: takes buffers, owns memory, releases the GIL, turns statuses into errors."""

import os

from cpython.buffer cimport PyBUF_SIMPLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc

from fastcas.errors import KernelUnavailable, SelfTestFailed, UsageError
from fastcas.limits import CHUNK_SIZE_MAX, CHUNKS_MAX

cdef size_t GIL_MIN_BYTES = 2048  # below this, releasing the GIL costs more than hashing (hashlib's threshold)
cdef size_t BLOCK = 64
cdef size_t DIGEST = 32
cdef uint64_t LENGTH_MAX = (<uint64_t>1 << 61) - 1  # bytes: the padding holds the length in bits in 64 bits
cdef const fcas_sha256_kernel *_default = NULL


cdef const fcas_sha256_kernel *_find_kernel(str name, str asked_by) except NULL:
    """The kernel of this name, or a demand that fails with one of the three reasons."""
    cdef const fcas_sha256_kernel *kernel = NULL
    cdef bytes encoded = name.encode("utf-8", "replace")
    cdef fcas_status status = FCAS_KERNEL_UNKNOWN
    if 0 not in encoded:
        status = fcas_sha256_select(encoded, &kernel)
    if status == FCAS_OK:
        return kernel
    if status == FCAS_KERNEL_UNKNOWN:
        reason = "unknown, expected one of generic, avx2_x8, shani, avx512_x16, shani_x2, shani_x10"
    elif status == FCAS_KERNEL_NOT_BUILT:
        reason = "not built by this compiler"
    else:
        reason = "no cpu support on this machine"
    raise KernelUnavailable(f"{asked_by}: sha256 kernel {name!r}: {reason}; nothing was hashed")


cdef const fcas_sha256_kernel *_kernel_of(object name) except NULL:
    return _default if name is None else _find_kernel(name, "kernel")


def _choose_default():
    global _default
    demanded = os.environ.get("FASTCAS_SHA256_KERNEL")
    if demanded:
        _default = _find_kernel(demanded, "FASTCAS_SHA256_KERNEL")
    else:
        _default = fcas_sha256_default()


_choose_default()


def kernel_name():
    return _default.name.decode("ascii")


def _mask_cpu(allowed):
    fcas_cpu_mask(allowed)


def _default_for(cpu):
    return fcas_sha256_default_for(cpu).name.decode("ascii")


def kernels():
    names = []
    cdef uint32_t has = fcas_cpu_features()
    cdef size_t i = 0
    cdef const fcas_sha256_kernel *kernel = fcas_sha256_kernel_at(0)
    while kernel != NULL:
        if (has & kernel.cpu_needs) == kernel.cpu_needs:
            names.append(kernel.name.decode("ascii"))
        i += 1
        kernel = fcas_sha256_kernel_at(i)
    return names


def self_test(kernel=None):
    cdef const fcas_sha256_kernel *k = _kernel_of(kernel)
    if fcas_sha256_self_test(k) != FCAS_OK:
        raise SelfTestFailed(f"sha256 kernel {k.name.decode('ascii')}: wrong digest of a known message")


def sha256(data, *, kernel=None):
    cdef fcas_sha256 state
    cdef Py_buffer view
    fcas_sha256_init(&state, _kernel_of(kernel))
    digest = PyBytes_FromStringAndSize(NULL, DIGEST)
    cdef uint8_t *out = <uint8_t *>PyBytes_AS_STRING(digest)
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if <size_t>view.len < GIL_MIN_BYTES:
            fcas_sha256_update(&state, <const uint8_t *>view.buf, <size_t>view.len)
            fcas_sha256_final(&state, out)
        else:
            with nogil:
                fcas_sha256_update(&state, <const uint8_t *>view.buf, <size_t>view.len)
                fcas_sha256_final(&state, out)
    finally:
        PyBuffer_Release(&view)
    return digest


cdef list _digests(list items, Py_buffer *views, const uint8_t **messages, size_t *lengths, uint8_t *digests,
                   const fcas_sha256_kernel *kernel):
    cdef size_t n = <size_t>len(items)
    cdef size_t n_held = 0, i, place
    cdef size_t total = 0
    cdef bint differ = False
    cdef list order = list(range(n)), result
    try:
        for i in range(n):
            PyObject_GetBuffer(items[i], &views[i], PyBUF_SIMPLE)
            n_held += 1
            differ |= views[i].len != views[0].len
            total += <size_t>views[i].len
        # Longest first: one that is taken up last would run on with the other lanes idle (48 buffers from 512 B to
        # 1 MiB, avx2_x8: 1.73 instead of 0.57 GB/s; bench/micro_sha256.py).
        if differ:
            order.sort(key=[views[i].len for i in range(n)].__getitem__, reverse=True)
        for place in range(n):
            i = order[place]
            messages[place] = <const uint8_t *>views[i].buf
            lengths[place] = <size_t>views[i].len
        if total < GIL_MIN_BYTES:
            fcas_sha256_many(kernel, messages, lengths, n, digests)
        else:
            with nogil:
                fcas_sha256_many(kernel, messages, lengths, n, digests)
    finally:
        for i in range(n_held):
            PyBuffer_Release(&views[i])
    result = [None] * n
    for place in range(n):
        result[order[place]] = digests[DIGEST * place:DIGEST * place + DIGEST]
    return result


def digest_many(buffers, *, kernel=None):
    cdef const fcas_sha256_kernel *k = _kernel_of(kernel)
    cdef list items = list(buffers)
    cdef size_t n = <size_t>len(items)
    if n == 0:
        return []
    # No overflow: a list of n items has n pointers in memory, and each of these is at most 11 of them.
    cdef Py_buffer *views = <Py_buffer *>PyMem_Malloc(n * sizeof(Py_buffer))
    cdef const uint8_t **messages = <const uint8_t **>PyMem_Malloc(n * sizeof(uint8_t *))
    cdef size_t *lengths = <size_t *>PyMem_Malloc(n * sizeof(size_t))
    cdef uint8_t *digests = <uint8_t *>PyMem_Malloc(n * DIGEST)
    try:
        if views == NULL or messages == NULL or lengths == NULL or digests == NULL:
            raise MemoryError(f"sha256: no memory for {n} digests")
        return _digests(items, views, messages, lengths, digests, k)
    finally:
        PyMem_Free(views)
        PyMem_Free(<void *>messages)
        PyMem_Free(lengths)
        PyMem_Free(digests)


def chunk_pass(data, bytes chain not None, *, kernel=None):
    cdef fcas_sha256 chunk, content
    cdef Py_buffer view
    cdef const fcas_sha256_kernel *k = _kernel_of(kernel)
    if len(chain) != 32:
        raise UsageError(f"chain: expected 32 B, got {len(chain)} B")
    fcas_sha256_init(&chunk, k)
    fcas_sha256_resume(&content, k, <const uint8_t *>PyBytes_AS_STRING(chain), 0)
    digest = PyBytes_FromStringAndSize(NULL, DIGEST)
    after = PyBytes_FromStringAndSize(NULL, DIGEST)
    cdef uint8_t *digest_out = <uint8_t *>PyBytes_AS_STRING(digest)
    cdef uint8_t *after_out = <uint8_t *>PyBytes_AS_STRING(after)
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if <size_t>view.len % BLOCK != 0:
            raise UsageError(f"data: expected a multiple of 64 B, got {view.len} B; nothing was hashed")
        with nogil:
            fcas_sha256_update2(&chunk, &content, <const uint8_t *>view.buf, <size_t>view.len)
            fcas_sha256_final(&chunk, digest_out)
            fcas_sha256_midstate(&content, after_out)
    finally:
        PyBuffer_Release(&view)
    return digest, after


def chunk_passes(data, chunk_size, bytes chain not None, *, kernel=None):
    cdef fcas_chunks chunks
    cdef Py_buffer view
    cdef const fcas_sha256_kernel *k = _kernel_of(kernel)
    if not BLOCK <= chunk_size <= CHUNK_SIZE_MAX or chunk_size % BLOCK:
        raise UsageError(f"chunk size: expected a multiple of 64 from 64 B to 16 MiB, got {chunk_size} B")
    if len(chain) != 32:
        raise UsageError(f"chain: expected 32 B, got {len(chain)} B")
    fcas_chunks_resume(&chunks, k, chunk_size, <const uint8_t *>PyBytes_AS_STRING(chain), 0)
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if <size_t>view.len % chunks.chunk_size != 0:
            raise UsageError(f"data: expected a multiple of {chunk_size} B, got {view.len} B; nothing was hashed")
        hashes = PyBytes_FromStringAndSize(NULL, <size_t>view.len // chunks.chunk_size * DIGEST)
        midstates = PyBytes_FromStringAndSize(NULL, <size_t>view.len // chunks.chunk_size * DIGEST)
        _pass_over(&chunks, &view, <uint8_t *>PyBytes_AS_STRING(hashes), <uint8_t *>PyBytes_AS_STRING(midstates))
    finally:
        PyBuffer_Release(&view)
    return hashes, midstates


cdef void _pass_over(fcas_chunks *chunks, Py_buffer *view, uint8_t *hashes, uint8_t *midstates) noexcept:
    with nogil:
        fcas_chunks_update(chunks, <const uint8_t *>view.buf, <size_t>view.len, hashes, midstates)


cdef class Sha256:
    def __cinit__(self, bytes midstate=None, length=0, *, kernel=None):
        cdef const fcas_sha256_kernel *k = _kernel_of(kernel)
        if midstate is None:
            if length != 0:
                raise UsageError(f"length: expected 0 without a midstate, got {length}")
            fcas_sha256_init(&self._state, k)
            return
        if len(midstate) != 32:
            raise UsageError(f"midstate: expected 32 B, got {len(midstate)} B")
        if not 0 <= length <= LENGTH_MAX or length % BLOCK:
            raise UsageError(f"length: expected a multiple of 64 from 0 to 2^61, got {length}")
        fcas_sha256_resume(&self._state, k, <const uint8_t *>PyBytes_AS_STRING(midstate), length)

    cdef int _enter(self) except -1:
        if self._busy:
            raise UsageError("sha256 state: in use by another thread; its hash is unaffected")
        return 0

    @property
    def length(self):
        return self._state.length

    @property
    def kernel(self):
        return self._state.kernel.name.decode("ascii")

    def update(self, data):
        cdef Py_buffer view
        self._enter()
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            if <uint64_t>view.len > LENGTH_MAX - self._state.length:
                raise UsageError("sha256 state: a message may have 2^61-1 B at most; nothing was fed")
            if <size_t>view.len < GIL_MIN_BYTES:
                fcas_sha256_update(&self._state, <const uint8_t *>view.buf, <size_t>view.len)
            else:
                self._busy = True
                with nogil:
                    fcas_sha256_update(&self._state, <const uint8_t *>view.buf, <size_t>view.len)
                self._busy = False
        finally:
            PyBuffer_Release(&view)
        return self

    def digest(self):
        self._enter()
        cdef fcas_sha256 last = self._state
        cdef uint8_t out[32]
        fcas_sha256_final(&last, out)
        return out[:32]

    def midstate(self):
        self._enter()
        cdef uint8_t out[32]
        if fcas_sha256_midstate(&self._state, out) != FCAS_OK:
            raise UsageError(f"midstate: expected a multiple of 64 B fed, got {self._state.length} B")
        return out[:32]

    def copy(self):
        self._enter()
        cdef Sha256 twin = Sha256.__new__(Sha256)
        twin._state = self._state
        return twin


cdef class ChunkHasher:
    def __cinit__(self, chunk_size, *, kernel=None):
        if not BLOCK <= chunk_size <= CHUNK_SIZE_MAX or chunk_size % BLOCK:
            raise UsageError(f"chunk size: expected a multiple of 64 from 64 B to 16 MiB, got {chunk_size} B")
        fcas_chunks_init(&self._chunks, _kernel_of(kernel), chunk_size)

    def __dealloc__(self):
        PyMem_Free(self._hashes)
        PyMem_Free(self._midstates)

    cdef int _enter(self) except -1:
        if self._busy:
            raise UsageError("chunk hasher: in use by another thread; its hashes are unaffected")
        if self._is_finished:
            raise UsageError("chunk hasher: already finished; create another one for another file")
        return 0

    cdef int _reserve(self, size_t n_chunks) except -1:
        """Make room for n_chunks more, bounded by CHUNKS_MAX; doubles, so that all growing costs O(n)."""
        cdef size_t needed, capacity
        cdef uint8_t *grown
        if n_chunks > <size_t>CHUNKS_MAX - self._n_complete:
            raise UsageError(
                f"chunk size: {self._chunks.chunk_size} B cuts the file into more than {CHUNKS_MAX} chunks; "
                "nothing of this buffer was hashed"
            )
        needed = self._n_complete + n_chunks
        if needed <= self._capacity:
            return 0
        capacity = min(max(needed, 2 * self._capacity, <size_t>64), <size_t>CHUNKS_MAX)
        grown = <uint8_t *>PyMem_Realloc(self._hashes, capacity * DIGEST)
        if grown == NULL:
            raise MemoryError("chunk hasher: no memory for hashes")
        self._hashes = grown
        grown = <uint8_t *>PyMem_Realloc(self._midstates, capacity * DIGEST)
        if grown == NULL:
            raise MemoryError("chunk hasher: no memory for midstates")
        self._midstates = grown
        self._capacity = capacity
        return 0

    @property
    def chunk_size(self):
        return self._chunks.chunk_size

    @property
    def size(self):
        return self._size

    @property
    def n_chunks(self):
        return self._n_complete + (self._chunks.filled > 0)

    def update(self, data):
        cdef Py_buffer view
        cdef size_t length, n_touched, n_new
        self._enter()
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            length = <size_t>view.len
            n_touched = fcas_chunks_completed_by(&self._chunks, length)
            # A chunk that is begun counts, and has its place, before finish() writes its digest. No overflow:
            # filled < 2^24, and what is in memory is shorter than 2^63.
            n_touched += (self._chunks.filled + length) % self._chunks.chunk_size > 0
            self._reserve(n_touched)
            self._busy = True
            with nogil:
                n_new = fcas_chunks_update(&self._chunks, <const uint8_t *>view.buf, length,
                                           self._hashes + DIGEST * self._n_complete,
                                           self._midstates + DIGEST * self._n_complete)
            self._busy = False
            self._n_complete += n_new
            self._size += length
        finally:
            PyBuffer_Release(&view)
        return self

    def finish(self):
        cdef uint8_t content_hash[32]
        cdef size_t n, n_midstates
        self._enter()
        n = self._n_complete + fcas_chunks_finish(
            &self._chunks, self._hashes + DIGEST * self._n_complete, content_hash)
        self._is_finished = True
        n_midstates = n - 1 if n > 0 else 0
        hashes = PyBytes_FromStringAndSize(<char *>self._hashes, DIGEST * n)
        midstates = PyBytes_FromStringAndSize(<char *>self._midstates, DIGEST * n_midstates)
        return hashes, midstates, content_hash[:32], self._size
