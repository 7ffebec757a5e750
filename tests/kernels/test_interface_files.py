"""The .pyi files say what the compiled modules have: the same names, the same argument lists."""

import ast
import inspect
from pathlib import Path

import pytest

from fastcas.hashing import _sha256
from fastcas.parity import _gf256

MODULES = [_sha256, _gf256]
FOLDER = Path(__file__).parents[2]


def arguments(node: ast.FunctionDef) -> list[str]:
    return [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_interface_file_names_and_arguments_match_the_module(module):
    tree = ast.parse((FOLDER / (module.__name__.replace(".", "/") + ".pyi")).read_text())
    declared = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }
    assert public <= set(declared)
    for name, node in declared.items():
        actual = getattr(module, name)
        if isinstance(node, ast.FunctionDef):
            assert list(inspect.signature(actual).parameters) == arguments(node), name
            continue
        methods = {child.name: child for child in node.body if isinstance(child, ast.FunctionDef)}
        there = {attribute for attribute in vars(actual) if not attribute.startswith("_")}
        assert there == set(methods) - {"__init__"}, name
        for method, child in methods.items():
            if method != "__init__" and not child.decorator_list:
                assert list(inspect.signature(getattr(actual, method)).parameters) == arguments(child), method
