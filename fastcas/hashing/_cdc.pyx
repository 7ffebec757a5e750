"""Border of csrc/cdc: takes buffers, releases the GIL, returns places."""

from cpython.buffer cimport PyBUF_SIMPLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from fastcas.errors import UsageError

cdef extern from "<stdbool.h>" nogil:
    ctypedef bint cbool "bool"

cdef extern from "common/status.h" nogil:
    int FCAS_OK

cdef extern from "cdc/cdc.h" nogil:
    ctypedef struct fcas_cdc:
        uint32_t min
        uint32_t normal
        uint32_t max
        uint32_t length
    int fcas_cdc_init(fcas_cdc *c, uint32_t average)
    size_t fcas_cdc_next(fcas_cdc *c, const uint8_t *p, size_t n, cbool *is_cut)


cdef class Cutter:
    cdef fcas_cdc _state
    cdef bint _busy

    def __cinit__(self, average):
        if not 0 <= average <= 0xFFFFFFFF or fcas_cdc_init(&self._state, <uint32_t>average) != FCAS_OK:
            raise UsageError(f"average chunk size: expected a power of two from 256 B to 4 MiB, got {average} B")

    @property
    def shortest(self):
        return self._state.min

    @property
    def longest(self):
        return self._state.max

    @property
    def pending(self):
        return self._state.length

    def feed(self, data):
        cdef Py_buffer view
        cdef size_t at = 0, n
        cdef const uint8_t *p
        cdef cbool is_cut
        cdef list cuts = []
        if self._busy:
            raise UsageError("cutter: in use by another thread; its cuts are unaffected")
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        self._busy = True
        try:
            p, n = <const uint8_t *>view.buf, <size_t>view.len
            while at < n:
                with nogil:
                    at += fcas_cdc_next(&self._state, p + at, n - at, &is_cut)
                if is_cut:
                    cuts.append(at)
        finally:
            self._busy = False
            PyBuffer_Release(&view)
        return cuts
