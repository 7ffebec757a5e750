"""Reed–Solomon parity over GF(2^8): m parity shards rebuild any m lost ones of k + m.

In: shards of equal length in any contiguous buffers; FASTCAS_GF256_KERNEL (a demand, as in hashing).
Out: shards; the generator matrix (fastcas/parity/matrix.py), which is part of the file format.
Owns: the choice of the kernel of this process (csrc/gf256) and a bounded cache of inverted matrices.
Never: checks shards against hashes, pads them, or knows chunks and stripes.
"""

from fastcas.parity._gf256 import kernel_name, kernels, self_test
from fastcas.parity.rs import ReedSolomon

__all__ = ["ReedSolomon", "kernel_name", "kernels", "self_test"]
