"""Build the extensions; everything else about the package stands in pyproject.toml.

Switches (environment):
  FASTCAS_DEBUG=1                        -O0 -g, assertions, bounds checks and line tracing in the bindings
  FASTCAS_SANITIZE=address,undefined     (or thread) sanitizers in every extension
  FASTCAS_ANNOTATE=1                     Cython's annotated HTML beside each .pyx
"""

import os
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("FASTCAS_DEBUG") == "1"
SANITIZE = os.environ.get("FASTCAS_SANITIZE", "")
ANNOTATE = os.environ.get("FASTCAS_ANNOTATE") == "1"

CFLAGS = ["-std=c11", "-D_GNU_SOURCE", "-fvisibility=hidden", "-pthread", "-Icsrc"]
CFLAGS += ["-O0", "-g", "-UNDEBUG", "-DFCAS_DEBUG=1"] if DEBUG else ["-O3", "-DNDEBUG"]
LDFLAGS = ["-pthread"]
if SANITIZE:
    CFLAGS += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g"]
    LDFLAGS += [f"-fsanitize={SANITIZE}"]

DIRECTIVES = {"language_level": 3, "embedsignature": False}
MACROS = []
if DEBUG:
    DIRECTIVES |= {"boundscheck": True, "wraparound": True, "initializedcheck": True, "linetrace": True}
    MACROS = [("CYTHON_TRACE_NOGIL", "1")]


def ext(module: str, sources: list[str]) -> Extension:
    """One extension: its .pyx and the C files (globs below csrc/) that it is linked with."""
    pyx = module.replace(".", "/") + ".pyx"
    c_files = [path for pattern in sources for path in sorted(glob(f"csrc/{pattern}"))]
    headers = sorted(glob("csrc/**/*.h", recursive=True))
    return Extension(
        module,
        [pyx, *c_files],
        depends=headers,
        define_macros=MACROS,
        extra_compile_args=CFLAGS,
        extra_link_args=LDFLAGS,
    )


EXTENSIONS = [
    ext("fastcas.hashing._sha256", ["common/*.c", "sha256/*.c"]),
    ext("fastcas.hashing._cdc", ["cdc/*.c"]),
    ext("fastcas.parity._gf256", ["common/*.c", "gf256/*.c"]),
    ext("fastcas.store._files", ["ingest/files.c"]),
    ext("fastcas.store._pass", ["common/*.c", "sha256/*.c", "ingest/pass.c"]),
    ext("fastcas.table._table", ["table/table.c", "table/blobs.c"]),
    ext(
        "fastcas.table._shared",
        ["table/ring.c", "table/havelog.c", "table/given.c", "table/bucket.c", "table/counters.c"],
    ),
    ext("fastcas.serve._engine", ["http/*.c", "engine/*.c", "table/*.c"]),
    ext("fastcas.fetch._receiver", ["common/*.c", "sha256/*.c", "receiver/*.c"]),
]

if __name__ == "__main__":
    setup(ext_modules=cythonize(EXTENSIONS, compiler_directives=DIRECTIVES, annotate=ANNOTATE, build_dir="build"))
