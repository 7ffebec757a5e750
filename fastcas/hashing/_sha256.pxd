from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef extern from "common/status.h" nogil:
    ctypedef int fcas_status
    enum:
        FCAS_OK
        FCAS_KERNEL_UNKNOWN
        FCAS_KERNEL_NOT_BUILT


cdef extern from "common/cpu.h" nogil:
    uint32_t fcas_cpu_features()
    void fcas_cpu_mask(uint32_t allowed)


cdef extern from "sha256/sha256.h" nogil:
    ctypedef struct fcas_sha256_kernel:
        const char *name
        uint32_t cpu_needs
    ctypedef struct fcas_sha256:
        const fcas_sha256_kernel *kernel
        uint64_t length
        uint32_t n_buffered
    fcas_status fcas_sha256_select(const char *name, const fcas_sha256_kernel **out)
    const fcas_sha256_kernel *fcas_sha256_default()
    const fcas_sha256_kernel *fcas_sha256_default_for(uint32_t cpu)
    const fcas_sha256_kernel *fcas_sha256_kernel_at(size_t i)
    void fcas_sha256_init(fcas_sha256 *s, const fcas_sha256_kernel *kernel)
    fcas_status fcas_sha256_resume(fcas_sha256 *s, const fcas_sha256_kernel *kernel, const uint8_t *midstate,
                                   uint64_t length)
    void fcas_sha256_update(fcas_sha256 *s, const uint8_t *p, size_t n)
    fcas_status fcas_sha256_midstate(const fcas_sha256 *s, uint8_t *out)
    void fcas_sha256_final(fcas_sha256 *s, uint8_t *out)
    void fcas_sha256_update2(fcas_sha256 *a, fcas_sha256 *b, const uint8_t *p, size_t n)
    void fcas_sha256_many(const fcas_sha256_kernel *kernel, const uint8_t **messages, const size_t *lengths,
                          size_t n, uint8_t *digests)
    fcas_status fcas_sha256_self_test(const fcas_sha256_kernel *kernel)


cdef extern from "sha256/chunks.h" nogil:
    ctypedef struct fcas_chunks:
        size_t chunk_size
        size_t filled
    fcas_status fcas_chunks_init(fcas_chunks *c, const fcas_sha256_kernel *kernel, size_t chunk_size)
    fcas_status fcas_chunks_resume(fcas_chunks *c, const fcas_sha256_kernel *kernel, size_t chunk_size,
                                   const uint8_t *midstate, uint64_t length)
    size_t fcas_chunks_completed_by(const fcas_chunks *c, size_t n)
    size_t fcas_chunks_update(fcas_chunks *c, const uint8_t *p, size_t n, uint8_t *hashes, uint8_t *midstates)
    size_t fcas_chunks_finish(fcas_chunks *c, uint8_t *last_hash, uint8_t *content_hash)


cdef class Sha256:
    cdef fcas_sha256 _state
    cdef bint _busy
    cdef int _enter(self) except -1


cdef class ChunkHasher:
    cdef fcas_chunks _chunks
    cdef uint8_t *_hashes
    cdef uint8_t *_midstates
    cdef size_t _capacity
    cdef size_t _n_complete
    cdef uint64_t _size
    cdef bint _busy
    cdef bint _is_finished
    cdef int _enter(self) except -1
    cdef int _reserve(self, size_t n_chunks) except -1
