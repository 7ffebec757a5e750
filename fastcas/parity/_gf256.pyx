"""Border of csrc/gf256: takes buffers, checks lengths and overlaps, releases the GIL, turns statuses into errors."""

import os

from cpython.buffer cimport PyBUF_FULL_RO, PyBUF_SIMPLE, PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize

from fastcas.errors import KernelUnavailable, SelfTestFailed, UsageError

cdef size_t GIL_MIN_BYTES = 2048  # of all buffers together; hashlib's threshold
cdef const fcas_gf256_kernel *_default = NULL


cdef const fcas_gf256_kernel *_find_kernel(str name, str asked_by) except NULL:
    """The kernel of this name, or a demand that fails with one of the three reasons."""
    cdef const fcas_gf256_kernel *kernel = NULL
    cdef bytes encoded = name.encode("utf-8", "replace")
    cdef fcas_status status = FCAS_KERNEL_UNKNOWN
    if 0 not in encoded:
        status = fcas_gf256_select(encoded, &kernel)
    if status == FCAS_OK:
        return kernel
    if status == FCAS_KERNEL_UNKNOWN:
        reason = "unknown, expected one of generic, ssse3, avx2, gfni"
    elif status == FCAS_KERNEL_NOT_BUILT:
        reason = "not built by this compiler"
    else:
        reason = "no cpu support on this machine"
    raise KernelUnavailable(f"{asked_by}: gf256 kernel {name!r}: {reason}; nothing was computed")


cdef const fcas_gf256_kernel *_kernel_of(object name) except NULL:
    return _default if name is None else _find_kernel(name, "kernel")


def _choose_default():
    global _default
    demanded = os.environ.get("FASTCAS_GF256_KERNEL")
    if demanded:
        _default = _find_kernel(demanded, "FASTCAS_GF256_KERNEL")
    else:
        _default = fcas_gf256_default()


_choose_default()


def kernel_name():
    return _default.name.decode("ascii")


def _mask_cpu(allowed):
    fcas_cpu_mask(allowed)


def kernels():
    names = []
    cdef uint32_t has = fcas_cpu_features()
    cdef size_t i = 0
    cdef const fcas_gf256_kernel *kernel = fcas_gf256_kernel_at(0)
    while kernel != NULL:
        if (has & kernel.cpu_needs) == kernel.cpu_needs:
            names.append(kernel.name.decode("ascii"))
        i += 1
        kernel = fcas_gf256_kernel_at(i)
    return names


def self_test(kernel=None):
    cdef const fcas_gf256_kernel *k = _kernel_of(kernel)
    cdef fcas_status status
    with nogil:
        status = fcas_gf256_self_test(k)
    if status == FCAS_E_NOMEM:
        raise MemoryError("gf256: no memory for the self-test")
    if status != FCAS_OK:
        raise SelfTestFailed(f"gf256 kernel {k.name.decode('ascii')}: wrong product of known bytes")


cdef bint _overlap(const Py_buffer *a, const Py_buffer *b) noexcept nogil:
    """Whether two buffers of the same length share a byte."""
    cdef const uint8_t *p = <const uint8_t *>a.buf
    cdef const uint8_t *q = <const uint8_t *>b.buf
    return p < q + b.len and q < p + a.len


cdef str _slot(size_t i, size_t n_in):
    """What buffer i is called in a message."""
    return f"input {i}" if i < n_in else f"output {i - n_in}"


def survivors(list shards not None):
    cdef Py_buffer view
    cdef Py_ssize_t first = -1, length = 0, i
    cdef list slots = []
    for i in range(len(shards)):
        item = shards[i]
        if item is None:
            continue
        try:
            PyObject_GetBuffer(item, &view, PyBUF_FULL_RO)  # strides do not matter to a length
        except (BufferError, TypeError) as exc:
            raise UsageError(
                f"shards[{i}]: expected a buffer or None, got {type(item).__name__}; nothing was rebuilt"
            ) from exc
        if first < 0:
            first, length = i, view.len
        PyBuffer_Release(&view)
        if view.len != length:
            raise UsageError(
                f"shards[{i}]: expected {length} B as shard {first}, got {view.len} B; nothing was rebuilt"
            )
        slots.append(i)
    return tuple(slots)


cdef class Plan:
    def __cinit__(self, bytes matrix not None, n_out, n_in, *, kernel=None):
        cdef fcas_status status
        if not 1 <= n_out <= FCAS_GF256_SIDE_MAX or not 1 <= n_in <= FCAS_GF256_SIDE_MAX:
            raise UsageError(f"matrix: expected 1..{FCAS_GF256_SIDE_MAX} rows and columns, got {n_out} and {n_in}")
        if len(matrix) != n_out * n_in:
            raise UsageError(f"matrix: expected {n_out * n_in} B, got {len(matrix)} B")
        status = fcas_gf256_plan_new(&self._plan, _kernel_of(kernel), <const uint8_t *>PyBytes_AS_STRING(matrix),
                                     n_out, n_in)
        if status != FCAS_OK:
            raise MemoryError("gf256: no memory for a plan")

    def __dealloc__(self):
        fcas_gf256_plan_free(self._plan)

    @property
    def kernel(self):
        return self._plan.kernel.name.decode("ascii")

    def apply(self, list inputs not None, list outputs not None):
        cdef size_t n_in = self._plan.n_in
        cdef size_t n_out = self._plan.n_out
        cdef size_t n_held = 0, length, i, j
        cdef int flags
        # Of fixed size, about 50 KiB: 510 slots at most, and no allocation that could fail half-way.
        cdef Py_buffer views[2 * 255]
        cdef const uint8_t *in_pointers[255]
        cdef uint8_t *out_pointers[255]
        cdef list result = []
        if <size_t>len(inputs) != n_in or <size_t>len(outputs) != n_out:
            raise UsageError(f"buffers: expected {n_in} in and {n_out} out, got {len(inputs)} and {len(outputs)}")
        try:
            for i in range(n_in + n_out):
                is_input = i < n_in
                item = inputs[i] if is_input else outputs[i - n_in]
                if not is_input and item is None:
                    item = PyBytes_FromStringAndSize(NULL, views[0].len)
                    fcas_populate(PyBytes_AS_STRING(item), <size_t>views[0].len)
                    flags = PyBUF_SIMPLE  # new and not yet seen by anyone: written although bytes are read-only
                else:
                    flags = PyBUF_SIMPLE if is_input else PyBUF_WRITABLE
                try:
                    PyObject_GetBuffer(item, &views[i], flags)
                except (BufferError, TypeError) as exc:
                    wanted = "a contiguous buffer" if is_input else "a writable contiguous buffer"
                    raise UsageError(
                        f"{_slot(i, n_in)}: expected {wanted}, got {type(item).__name__} ({exc}); nothing was computed"
                    ) from exc
                n_held += 1
                if views[i].len != views[0].len:
                    raise UsageError(
                        f"{_slot(i, n_in)}: expected {views[0].len} B as input 0, got {views[i].len} B; nothing was computed"
                    )
                if is_input:
                    in_pointers[i] = <const uint8_t *>views[i].buf
                else:
                    out_pointers[i - n_in] = <uint8_t *>views[i].buf
                    result.append(item)
                    for j in range(i):
                        if _overlap(&views[j], &views[i]):
                            raise UsageError(f"{_slot(i, n_in)}: overlaps another buffer; nothing was computed")
            length = <size_t>views[0].len
            if length * (n_in + n_out) < GIL_MIN_BYTES:
                fcas_gf256_plan_apply(self._plan, in_pointers, out_pointers, length)
            else:
                with nogil:
                    fcas_gf256_plan_apply(self._plan, in_pointers, out_pointers, length)
        finally:
            for i in range(n_held):
                PyBuffer_Release(&views[i])
        return result
