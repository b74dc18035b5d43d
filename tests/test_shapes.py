"""Annotations with shapes say what is true, at every call of the tests that run here and in `make test-shapes`."""

import ast
import importlib
import sys
import types
from pathlib import Path

import forked
import pytest
import torch
from jaxtyping import TypeCheckError, install_import_hook
from shape_checks import CHECKED, has_shape
from test_house import MODULES

from peft_reft import shapes

TESTS = Path(__file__).parent
# What runs with the checks here: edits, positions with and without marks, generation. `make test-shapes` runs all.
RUN = [
    "test_shapes.py::test_the_plugin_checks_every_module",
    "test_edit.py",
    "test_collator.py::test_slots",
    "test_collator.py::test_marks_need_no_labels[f2+l2]",
    "test_collator.py::test_marks_need_no_labels[p+g1]",
    "test_generate.py::test_every_formula_equals_teacher_forcing",
    "test_generate.py::test_ways_of_decoding",
    "test_subspaces.py::test_the_edit_is_the_sum_of_those_of_disjoint_subspaces",
    "test_subspaces.py::test_each_row_has_its_own_subspaces",
    "test_subspaces.py::test_the_collator_takes_them_from_the_examples",
]

MODULE_NAMES = [
    name
    for name in (f"peft_reft.{name}" for name in MODULES)
    if any(name == checked or name.startswith(f"{checked}.") for checked in CHECKED)
]


def annotations_of(tree):
    """The annotations in a module's source: of parameters, results, fields and variables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            yield node.returns
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            yield node.annotation


@pytest.mark.parametrize("name", MODULE_NAMES)
def test_every_annotation_with_a_shape_can_be_read(name):
    """jaxtyping passes over an annotation whose names the module lacks at run time, such as under TYPE_CHECKING."""
    module = importlib.import_module(name)
    for annotation in annotations_of(ast.parse(Path(module.__file__).read_text())):
        if any(isinstance(part, ast.Name) and part.id in shapes.__all__ for part in ast.walk(annotation)):
            source = ast.unparse(annotation)
            assert has_shape(eval(source, vars(module))), source


PLANTED = '''
from __future__ import annotations

from dataclasses import dataclass

from peft_reft.shapes import Bool, Float, Int
from torch import Tensor


def row_sums(ids: Int[Tensor, "batch seq"], valid: Bool[Tensor, "batch seq"] | None = None) -> Int[Tensor, "batch"]:
    return ids.sum(1)


def column_sums(ids: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch"]:
    """Its annotation is wrong."""
    return ids.sum(0)


def first(many: list[Float[Tensor, "n d"]], count: int) -> Float[Tensor, "n d"]:
    return many[0]


@dataclass
class Pair:
    one: Float[Tensor, "n d"]
    other: Float[Tensor, "n d"]
'''


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A module with annotations, imported as the plugin has the package imported."""
    (tmp_path / "planted_shapes.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)
    with install_import_hook(["planted_shapes"], "shape_checks.check"):
        yield importlib.import_module("planted_shapes")
    del sys.modules["planted_shapes"]


def test_a_wrong_shape_raises(planted):
    ids = torch.ones(2, 3, dtype=torch.int64)
    planted.row_sums(ids)
    planted.row_sums(ids, ids > 0)
    for wrong in ([ids[0]], [ids.float()], [ids, ids[:, 1:] > 0]):
        with pytest.raises(TypeCheckError, match=r"checking the parameters of planted_shapes.row_sums"):
            planted.row_sums(*wrong)
    with pytest.raises(TypeCheckError, match=r"checking the return value of planted_shapes.column_sums"):
        planted.column_sums(ids)


def test_a_wrong_shape_inside_a_list_or_a_dataclass_raises(planted):
    h = torch.ones(2, 3)
    planted.first([h], count="a type without a shape, which mypy checks")
    planted.Pair(h, h)
    with pytest.raises(TypeCheckError, match=r"planted_shapes.first"):
        planted.first([h[0]], count=1)
    with pytest.raises(TypeCheckError, match=r"planted_shapes.Pair"):
        planted.Pair(h, h.T)


def test_the_plugin_checks_every_module(request):
    if not request.config.pluginmanager.has_plugin("shape_checks"):
        pytest.skip("only with the plugin, see `test_shapes_hold_at_every_call`")
    for name in MODULE_NAMES:
        for each in vars(importlib.import_module(name)).values():
            if isinstance(each, types.FunctionType) and each.__module__ == name:
                assert hasattr(each, "__wrapped__"), f"{name}.{each.__name__}"


@pytest.mark.slow
def test_shapes_hold_at_every_call():
    # torch.compile cannot trace the checks. Other families have the same shapes.
    options = ["-n", "0", "-p", "shape_checks", "-k", "not compile and not graph and not gemma3 and not gpt2"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of a plugin that a library has imported
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    done = forked.run(code, *options, *RUN, cwd=TESTS)
    assert done.returncode == 0, done.stdout[-5000:]
