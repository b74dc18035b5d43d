"""A plugin of pytest that checks annotations with shapes at every call: `PYTHONPATH=tests pytest -p shape_checks`.

`make test-shapes` runs the tests with it. It checks shapes and dtypes of tensors. Other types are mypy's to check, and
a test may hand over a stand-in for them.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook

CHECKED = ["peft_reft.positions", "peft_reft.edits", "peft_reft.tuner.forward", "peft_reft.tuner.layer"]
"""The packages and modules whose annotations are checked."""


def pytest_configure(config):
    if "peft_reft" in sys.modules:
        raise RuntimeError("peft_reft is imported already, so that the import hook cannot see it.")
    install_import_hook(CHECKED, "shape_checks.check")


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have beartype check the annotations that hold a shape; jaxtyping hands over each function with them resolved."""
    for name, annotation in function.__annotations__.items():
        if not has_shape(annotation):
            function.__annotations__[name] = Any
    return beartype(function)


def has_shape(annotation: Any) -> bool:
    """Whether an annotation is one of `peft_reft.shapes`, or holds one, as `list[Int[Tensor, "n"]] | None` does."""
    return any(inspect.isclass(part) and issubclass(part, AbstractArray) for part in parts_of(annotation))


def parts_of(annotation: Any) -> Iterator[Any]:
    """An annotation, and all that stands within its brackets."""
    yield annotation
    for argument in get_args(annotation):
        yield from parts_of(argument)
