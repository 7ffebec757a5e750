"""The .pyi of each compiled module names what the module has, with the same arguments."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = Path(__file__).parents[2] / "fastcas"
STUBS = sorted(PACKAGE.rglob("*.pyi"))


def is_private(name: str) -> bool:
    return name.startswith("_")


def stub_names(tree: ast.Module) -> dict[str, ast.stmt]:
    """Return the public classes and functions of a stub."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name: node for node in tree.body if isinstance(node, kinds) and not is_private(node.name)}


def module_names(module: ModuleType) -> set[str]:
    """Return the public classes and functions that a module defines itself."""
    return {
        name
        for name, value in vars(module).items()
        if not is_private(name)
        and (inspect.isclass(value) or inspect.isbuiltin(value) or inspect.isroutine(value))
        and getattr(value, "__module__", None) == module.__name__
    }


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = node.args
    return [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg not in ("self", "cls")]


def check_arguments(owner: str, node: ast.FunctionDef | ast.AsyncFunctionDef, value: object) -> None:
    try:
        real = list(inspect.signature(value).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return  # a slot of the type itself, which has no signature at run time
    stub = arguments(node)
    assert [name for name in real if name not in ("self", "cls", "args", "kwargs")] == stub or "args" in real, (
        f"{owner}{node.name}: stub {stub}, module {real}"
    )


@pytest.mark.parametrize("path", STUBS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_stub_and_module_agree(path: Path) -> None:
    module = importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
    tree = ast.parse(path.read_text())
    stub = stub_names(tree)
    assert module_names(module) <= set(stub)
    assert [name for name in stub if not hasattr(module, name)] == []
    for name, node in stub.items():
        value = getattr(module, name)
        if isinstance(node, ast.ClassDef):
            check_class(name, node, value)
        elif isinstance(node, ast.FunctionDef):
            check_arguments("", node, value)


def check_class(name: str, node: ast.ClassDef, value: type) -> None:
    for member in node.body:
        if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
            assert hasattr(value, member.name), f"{name}.{member.name} is in the stub only"
            if not is_private(member.name):
                is_property = any(isinstance(d, ast.Name) and d.id == "property" for d in member.decorator_list)
                if not is_property:
                    check_arguments(f"{name}.", member, getattr(value, member.name))
        elif isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
            assert hasattr(value, member.target.id), f"{name}.{member.target.id} is in the stub only"
    stated = {m.name for m in node.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef)}
    stated |= {m.target.id for m in node.body if isinstance(m, ast.AnnAssign) and isinstance(m.target, ast.Name)}
    real = {key for key in vars(value) if not is_private(key)}
    if not node.bases:
        assert real <= stated, f"{name}: {sorted(real - stated)} missing in the stub"


@pytest.mark.parametrize("path", STUBS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_names_are_documented_in_the_stub(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for name, node in stub_names(tree).items():
        assert isinstance(node, ast.ClassDef | ast.FunctionDef)
        members = [m for m in node.body if isinstance(m, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []
        has_text = ast.get_docstring(node) or any(m.name == "__init__" and ast.get_docstring(m) for m in members)
        assert has_text, f"{path.name}: {name} has no docstring"
