"""The rooms of the package: imports run down from room to room, and never in a circle."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import peft_reft

ROOT = Path(peft_reft.__file__).parent
# From the top floor down. A room imports from rooms below it alone; rooms of one floor know nothing of each other.
FLOORS = [
    {"__init__"},
    {"register", "cli"},
    {"integrations"},
    {"serving"},
    {"convert", "tools"},
    {"tuner"},
    {"config"},
    {"card"},
    {"files", "positions", "edits"},
    {"patching", "shapes", "exporting", "macs", "runtime_config"},
]
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}
# The upward arrows there are, each within a function and with a comment that says why.
UPWARD = {("card", "config")}
# `transformers.activations` is the table by which users name the function of a formula; it imports no model.
ALLOWED_LIBRARIES = {"transformers.activations", "torch", "jaxtyping", *sys.stdlib_module_names}


def modules():
    """Name of each module, such as "positions.spec", and its path."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts if parts[-1] != "__init__" or len(parts) == 1 else parts[:-1])
        yield name, path


MODULES = dict(modules())


def imports(name, path, everywhere):
    """Modules of the package that a module imports: anywhere in it, or when it is itself imported."""
    package = name.split(".") if path.name == "__init__.py" and name != "__init__" else name.split(".")[:-1]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if everywhere else running(tree.body):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                longer = ".".join([*base, alias.name])
                yield longer if longer in MODULES else ".".join(base) or "__init__"


def running(body):
    """The statements that run on import, but for those under `if TYPE_CHECKING`."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
            yield from running(node.body)


def room(name):
    return name.partition(".")[0]


def test_every_room_has_a_floor():
    assert {room(name) for name in MODULES} == set(FLOOR_OF)


def test_imports_run_down():
    upward = set()
    for name, path in MODULES.items():
        for target in imports(name, path, everywhere=True):
            here, there = room(name), room(target)
            if there != "__init__" and here != there and FLOOR_OF[there] <= FLOOR_OF[here]:
                upward.add((here, there))
    assert upward == UPWARD


def test_no_circles():
    graph = {name: set(imports(name, path, everywhere=False)) - {name} for name, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError that names the circle


def test_positions_and_edits_know_only_torch():
    """Neither PEFT, nor transformers, TRL, vLLM."""
    for name, path in MODULES.items():
        if room(name) not in ("positions", "edits"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            names = [each if each in ALLOWED_LIBRARIES else each.partition(".")[0] for each in names]
            foreign = {*names} - ALLOWED_LIBRARIES
            assert not foreign, f"{name} imports {foreign}"


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def test_longhand():
    """No walrus in a comprehension, no conditional expression within another, none as a statement."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            inside = {type(part) for part in ast.walk(node) if part is not node}
            assert not (isinstance(node, COMPREHENSIONS) and ast.NamedExpr in inside), f"{name}:{node.lineno}"
            assert not (isinstance(node, ast.IfExp) and ast.IfExp in inside), f"{name}:{node.lineno}"
            assert not (isinstance(node, ast.Expr) and isinstance(node.value, ast.IfExp)), f"{name}:{node.lineno}"
