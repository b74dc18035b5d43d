"""Wrap a method of one model, and take the wrapper off again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


class Wrapped(partial):
    """A wrapped method of one model: not a bound method, which could not be pickled. Its arguments are the model, and
    what stood in the model's own dictionary before: None if nothing did, and the class's method counts."""

    __signature__: inspect.Signature


def wrap_method(model: nn.Module, name: str, wrapper: Callable[..., Any], more: tuple[str, ...] = ()) -> None:
    """Have `model.name(*args)` call `wrapper(model, inner, *args)`.

    The signature stays, which Trainer and `generate` read, with the arguments `more` beside it. It has no annotations,
    some of which cannot be pickled.
    """
    signature = inspect.signature(getattr(model, name))
    parameters = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    added = [inspect.Parameter(each, inspect.Parameter.KEYWORD_ONLY, default=None) for each in more]
    last = [each for each in parameters if each.kind is inspect.Parameter.VAR_KEYWORD]
    parameters = [each for each in parameters if each not in last] + added + last
    wrapped = Wrapped(wrapper, model, model.__dict__.get(name))
    wrapped.__signature__ = inspect.Signature(parameters)
    model.__dict__[name] = wrapped


def original_of(module: nn.Module, name: str, inner: Any) -> Callable[..., Any]:
    """The method that is wrapped: what stood there before, or that of the class of `module`, a replica perhaps."""
    return partial(getattr(type(module), name), module) if inner is None else inner
