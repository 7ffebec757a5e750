"""SHA-256 with states that can be read and set: chunk digests, content digests and midstates in one pass.

In: any contiguous buffers; FASTCAS_SHA256_KERNEL (a demand: it works or the import raises KernelUnavailable).
Out: digests and midstates as bytes of 32; never hex.
Owns: the choice of the kernel of this process (csrc/sha256).
Never: reads files, knows manifests, or falls back silently to a slower kernel than the one demanded.
"""

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
    "Sha256",
    "chunk_pass",
    "chunk_passes",
    "digest_many",
    "kernel_name",
    "kernels",
    "self_test",
    "sha256",
]
