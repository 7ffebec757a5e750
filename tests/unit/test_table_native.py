"""The C of csrc/table under sanitizers, by its stress harness."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.table_child import ROOT

FLAGS = "-std=c11 -D_GNU_SOURCE -O1 -g -pthread -Wall -Wextra -Wconversion -Wshadow -Wstrict-prototypes -Werror"


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_one_writer_and_eight_readers_are_clean(tmp_path: Path, sanitizer: str) -> None:
    compiler = shlex.split(os.environ.get("CC", "gcc"))
    assert shutil.which(compiler[0]), f"{compiler[0]} is needed to build the package, too"
    program = tmp_path / "table_stress"
    sources = [ROOT / "tests/native/table_stress.c", *sorted((ROOT / "csrc/table").glob("*.c"))]
    subprocess.run(
        [*compiler, *FLAGS.split(), f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}"]
        + [str(source) for source in sources]
        + ["-o", str(program)],
        check=True,
        timeout=100,
    )
    result = subprocess.run([str(program), "2000"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    words = result.stdout.split()
    figures = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    assert figures["tables"] > 1 and figures["messages"] > 0 and figures["claimed"] > 0
