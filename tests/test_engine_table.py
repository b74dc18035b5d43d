"""`serving/engine` alone touches vLLM, and the tables of its modules list all that they touch. Needs no vLLM."""

import ast
import re

import pytest
from test_house import MODULES

SERVING = {name: ast.parse(path.read_text()) for name, path in MODULES.items() if name.startswith("serving")}
ENGINE = "serving.engine."
# Attributes of Python's and NumPy's own values that the modules of the engine read.
PLAIN = {"astype", "get", "items", "join", "name", "split", "values"}
# Attributes of the same name as vLLM's that other modules read of something else: a tensor, `engine.Step`, `Server`,
# our route.
NAMESAKES = {"device", "load_inplace", "model", "requests"}
# Functions whose second argument names an attribute.
BY_NAME = {"getattr", "setattr", "hasattr", "wrap", "add_method"}
OURS = {"keep", "kept", "add_method", "call_core", "call_core_async", "call_workers"}


def imported(tree):
    """The names that imports bind in a module."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {alias.asname or alias.name.partition(".")[0] for node in imports for alias in node.names}


def second_arguments(tree, functions):
    """The strings that are passed to `functions` as second argument."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
            name = node.args[1]
            if isinstance(name, ast.Constant):
                yield name.value


def attributes(tree):
    """The attributes that a module reads, calls or replaces, but for those of `self` and of what it imports."""
    skipped = imported(tree) - {"vllm"} | {"self"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of_skipped = isinstance(node.value, ast.Name) and node.value.id in skipped
            if not of_skipped:
                yield node.attr
    yield from second_arguments(tree, BY_NAME)


def from_vllm(tree):
    """What a module imports from vLLM."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "vllm")
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.partition(".")[0] == "vllm":
            yield from (alias.name for alias in node.names)


def rows(tree):
    """The last part of each name in a module's table of vLLM's attributes, and in that of those that are added."""
    theirs, _, added = ast.get_docstring(tree).partition("What is added to vLLM's objects:")
    names = [re.findall(r"^`[\w.]*?(\w+)` ", table, re.MULTILINE) for table in (theirs, added)]
    return set(names[0]), set(names[1])


def check(trees):
    """Fail unless each module of the engine touches what its tables list, and the others nothing of vLLM."""
    engine = {name: tree for name, tree in trees.items() if name.startswith(ENGINE)}
    others = {name: tree for name, tree in trees.items() if name not in engine}
    added = set().union(*(rows(tree)[1] for tree in engine.values()))
    for name, tree in engine.items():
        theirs, own = rows(tree)
        touched = {*attributes(tree), *from_vllm(tree)} - PLAIN - {"vllm"}
        assert touched - theirs - own == set(), f"{name} touches these, and its tables do not list them"
        assert theirs - touched == set(), f"the table of {name} lists these, and it does not touch them"
    ours = {name for tree in trees.values() for name in second_arguments(tree, OURS)}
    assert ours - added == set(), "these are added to vLLM's objects, and no table lists them"
    strings = {node.value for tree in trees.values() for node in ast.walk(tree) if is_string(node)}
    assert added - strings == set(), "a table lists these, and nothing adds them"
    listed = added.union(*(rows(tree)[0] for tree in engine.values()))
    for name, tree in others.items():
        assert {*from_vllm(tree)} == set(), f"{name} imports vLLM: only the modules of the engine may"
        assert {*attributes(tree)} & listed - NAMESAKES == set(), f"{name} touches vLLM's attributes"


def is_string(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_the_tables_are_complete():
    check(SERVING)


@pytest.mark.parametrize(
    ("module", "planted", "message"),
    [
        ("engine.worker", "def planted(runner): return runner.lora_config", "do not list them"),
        ("engine.worker", "def planted(runner): return getattr(runner, 'lora_config')", "do not list them"),
        ("engine.core", "from vllm.v1.core.sched.scheduler import Scheduler", "do not list them"),
        ("worker", "def planted(worker): return worker.model_runner", "touches vLLM's attributes"),
        ("worker", "def planted(worker): return getattr(worker, 'model_runner')", "touches vLLM's attributes"),
        ("worker", "def planted(worker): keep(worker, 'loreft_planted', 1)", "no table lists them"),
        ("core", "def planted():\n    import vllm.envs", "imports vLLM"),
        ("core", "def planted():\n    from vllm import LLM", "imports vLLM"),
    ],
)
def test_what_is_planted_is_found(module, planted, message):
    name = f"serving.{module}"
    planted = ast.Module([*SERVING[name].body, *ast.parse(planted).body], type_ignores=[])
    with pytest.raises(AssertionError, match=message):
        check({**SERVING, name: planted})


def test_a_row_too_many_is_found():
    name = "serving.engine.worker"
    row = "`Worker.vllm_config` "
    docstring = ast.get_docstring(SERVING[name]).replace(row, f"`Worker.gone` \n{row}")
    changed = ast.Module([ast.Expr(ast.Constant(docstring)), *SERVING[name].body[1:]], type_ignores=[])
    with pytest.raises(AssertionError, match="does not touch them"):
        check({**SERVING, name: changed})
