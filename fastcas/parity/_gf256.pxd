from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t


cdef extern from "common/status.h" nogil:
    ctypedef int fcas_status
    enum:
        FCAS_OK
        FCAS_E_NOMEM
        FCAS_KERNEL_UNKNOWN
        FCAS_KERNEL_NOT_BUILT


cdef extern from "common/cpu.h" nogil:
    uint32_t fcas_cpu_features()
    void fcas_cpu_mask(uint32_t allowed)


cdef extern from "common/populate.h" nogil:
    void fcas_populate(void *at, size_t n)


cdef extern from "gf256/gf256.h" nogil:
    enum:
        FCAS_GF256_SIDE_MAX
    ctypedef struct fcas_gf256_kernel:
        const char *name
        uint32_t cpu_needs
    ctypedef struct fcas_gf256_plan:
        const fcas_gf256_kernel *kernel
        size_t n_out
        size_t n_in
    fcas_status fcas_gf256_select(const char *name, const fcas_gf256_kernel **out)
    const fcas_gf256_kernel *fcas_gf256_default()
    const fcas_gf256_kernel *fcas_gf256_kernel_at(size_t i)
    fcas_status fcas_gf256_plan_new(fcas_gf256_plan **out, const fcas_gf256_kernel *kernel, const uint8_t *matrix,
                                    size_t n_out, size_t n_in)
    void fcas_gf256_plan_free(fcas_gf256_plan *plan)
    void fcas_gf256_plan_apply(const fcas_gf256_plan *plan, const uint8_t **inputs, uint8_t **out, size_t n)
    fcas_status fcas_gf256_self_test(const fcas_gf256_kernel *kernel)


cdef class Plan:
    cdef fcas_gf256_plan *_plan
