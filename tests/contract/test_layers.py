"""Imports point down (architecture §10); and importing the package is cheap."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastcas"

WORDS = {"errors", "ids", "limits", "config", "metadata"}
BELOW: dict[str, set[str]] = {"hashing": WORDS, "parity": WORDS, "table": WORDS}
BELOW["store"] = WORDS | {"hashing", "parity", "table"}
BELOW["peers"] = BELOW["store"] | {"store"}
for room in ("serve", "fetch", "dht"):
    BELOW[room] = BELOW["peers"] | {"peers"}
BELOW["node"] = BELOW["fetch"] | {"serve", "fetch", "dht"}
BELOW["cli"] = BELOW["node"] | {"node"}
WORDS_BELOW = {
    "errors": set[str](),
    "limits": {"errors"},
    "ids": {"errors", "limits"},
    "config": {"errors", "ids", "limits"},
    "metadata": {"errors", "ids", "limits"},
}
SOURCES = sorted(path for suffix in ("py", "pyx", "pyi", "pxd") for path in PACKAGE.rglob(f"*.{suffix}"))
CIMPORT = re.compile(r"^\s*(?:from\s+(fastcas[\w.]*)\s+c?import\s+(.+)|c?import\s+(fastcas[\w.]*))", re.MULTILINE)


def room_of(path: Path) -> str:
    """Return a file's room, or a top-level module's own name."""
    return path.relative_to(PACKAGE).parts[0].split(".")[0]


def python_imports(path: Path) -> Iterator[str]:
    """Yield dotted names below fastcas that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def cython_imports(path: Path) -> Iterator[str]:
    for module, names, plain in CIMPORT.findall(path.read_text()):
        if plain:
            yield plain
        else:
            yield from (f"{module}.{name.strip()}" for name in names.strip("() \\").split(","))


def imported_rooms(path: Path) -> set[str]:
    names = python_imports(path) if path.suffix in (".py", ".pyi") else cython_imports(path)
    return {name.split(".")[1] for name in names if name.startswith("fastcas.") and name != "fastcas.__version__"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    if room == "__main__":
        allowed = {"cli"}
    elif room == "__init__":
        return  # the public names, from everywhere
    else:
        allowed = (BELOW | WORDS_BELOW)[room] | {room}
    above = imported_rooms(path) - allowed
    assert not above, f"{path.relative_to(ROOT)} imports {sorted(above)}, which are not below {room}"


def test_every_room_says_what_goes_in_and_out() -> None:
    for room in BELOW:
        text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
        for word in ("In:", "Out:", "Owns:", "Never:"):
            assert f"\n{word} " in text, f"{room}/__init__.py has no line {word}"


def loaded_by(statement: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\nimport sys\nprint(*sorted(sys.modules))"], capture_output=True, text=True,
        check=True, cwd=ROOT,
    )  # fmt: skip
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = loaded_by("import fastcas")
    assert not loaded & {"numpy", "cryptography", "msgpack", "asyncio", "uvloop", "click", "rich", "kademlia"}
    assert {name for name in loaded if name.startswith("fastcas")} == {"fastcas"}


@pytest.mark.parametrize("module", ["fastcas.node.supervisor", "fastcas.serve.worker"])
def test_long_lived_processes_do_not_load_what_they_do_not_use(module: str) -> None:
    assert not loaded_by(f"import {module}") & {"numpy", "cryptography", "kademlia", "click", "rich"}


def test_store_is_a_package_and_a_call() -> None:
    loaded_by("import fastcas\nfrom fastcas.store import Store\nassert fastcas.store.Store is Store")
    loaded_by("import fastcas\nassert callable(fastcas.store)")
    loaded_by("from fastcas import store\nassert callable(store)")
