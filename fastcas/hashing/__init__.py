"""SHA-256 with states that can be read and set: chunk digests, content digests and midstates in one pass.
Beside it, where content-defined chunks end.

In: any contiguous buffers; FASTCAS_SHA256_KERNEL (a demand: it works or the import raises KernelUnavailable).
Out: digests and midstates as bytes of 32, never hex; places of cuts.
Owns: the choice of the kernel of this process (csrc/sha256); the cut rule is csrc/cdc's.
Never: reads files, knows manifests, or falls back silently to a slower kernel than the one demanded.
"""

from fastcas.hashing._cdc import Cutter
from fastcas.hashing._sha256 import (
    ChunkHasher,
    Sha256,
    chunk_pass,
    chunk_passes,
    digest_many,
    kernel_name,
    kernels,
    self_test,
    sha256,
)

__all__ = [
    "ChunkHasher",
    "Cutter",
    "Sha256",
    "chunk_pass",
    "chunk_passes",
    "digest_many",
    "kernel_name",
    "kernels",
    "self_test",
    "sha256",
]
