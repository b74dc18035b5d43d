"""A pytest plugin, loaded with PEFT's own tests: LoReFT beside LoRA, models from `stand_ins.py`, known differences."""

from __future__ import annotations

import importlib.machinery
import re
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import beside
from differences import DIFFERENCES
from peft.utils import save_and_load
from stand_ins import STAND_INS

from peft_reft import LoReftConfig

# Downloads into a folder of its own.
ONLINE = {"test_from_pretrained_cache_dir"}


def pytest_configure(config: pytest.Config) -> None:
    _without_diffusers()
    sys.path.insert(0, str(config.rootpath))
    from tests import testing_utils

    # Both go online: for each model's first use, and to see whether a base model is on the Hub when it is saved.
    testing_utils.hub_online_once = _offline
    save_and_load.check_file_exists_on_hf_hub = lambda repo, *args, **kwargs: repo in STAND_INS


def _without_diffusers() -> None:
    """PEFT's tests import diffusers, for pipelines that none of the chosen tests uses."""
    stub: Any = types.ModuleType("diffusers")
    stub.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
    stub.__version__ = "0.0.0"
    stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"] = stub


@contextmanager
def _offline(model_id: str) -> Iterator[None]:
    yield


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Reduce each list of methods to LoRA, and put LoReFT beside it."""
    marks = metafunc.definition.own_markers
    for place, mark in enumerate(marks):
        if mark.name != "parametrize":
            continue
        names, rows = mark.args
        single = isinstance(names, str) and "," not in names
        rows = [getattr(row, "values", row) if not isinstance(row, dict) else row for row in rows]
        rows = [row if isinstance(row, tuple | list) and not single else (row,) for row in rows]
        chosen: dict[str, tuple[Any, ...]] = {}
        for row in rows:
            for label, new in beside(tuple(row)):
                chosen.setdefault(label, new)
        if chosen:
            params = [pytest.param(*row, id=label) for label, row in chosen.items()]
            kept = {name: value for name, value in mark.kwargs.items() if name != "ids"}
            marks[place] = pytest.mark.parametrize(names, params, **kept).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = [item for item in items if re.search("LoRA|LoReFT", item.name) and item.originalname not in ONLINE]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def _is_ours(item: pytest.Item) -> bool:
    values = item.callspec.params.values()  # type: ignore[attr-defined]
    return any(value is LoReftConfig or isinstance(value, LoReftConfig) for value in values)


# Networks of PEFT's tests that read (batch, d).
FLAT = ("MLP", "MLP2", "MLP_2x_same_shape", "MLP_LayerNorm", "ModelMha")


def _one_token_a_row(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """LoReFT edits tokens of hidden states (batch, seq, d): each row of such a network becomes a sequence of one."""
    return lambda self, X: forward(self, X.unsqueeze(1)).squeeze(1)


def _without_padding(prepare: Callable[..., dict[str, torch.Tensor]]) -> Callable[..., dict[str, torch.Tensor]]:
    """A merged edit falls on padding, an unmerged one does not, and the tests compare the logits there."""
    return lambda self: {k: torch.ones_like(v) if k == "attention_mask" else v for k, v in prepare(self).items()}


@pytest.fixture(autouse=True)
def allow_for_loreft(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not _is_ours(request.node):
        return
    for name in FLAT:
        if network := getattr(request.module, name, None):
            monkeypatch.setattr(network, "forward", _one_token_a_row(network.forward))
    if hasattr(request.cls, "prepare_inputs_for_testing"):
        prepare = request.cls.prepare_inputs_for_testing
        monkeypatch.setattr(request.cls, "prepare_inputs_for_testing", _without_padding(prepare))
    # What PEFT skips for every method but a few (rows with different adapters, Conv1D), LoReFT must do as LoRA does.
    from tests import testing_common

    monkeypatch.setattr(testing_common, "LoraConfig", LoReftConfig)
    # Meant for one method, but it names modules to every method's config.
    monkeypatch.setattr(request.module, "check_beft_config", lambda *args: None, raising=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail if a listed difference does not appear as it is listed."""
    listed = [entry for entry in DIFFERENCES if _is_ours(item) and re.search(entry.tests, item.nodeid)]
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        for entry in listed:
            if re.search(entry.message, f"{type(error).__name__}: {error}"):
                pytest.xfail(entry.reason)
        raise
    if listed:
        pytest.fail(f"It passes, but differences.py says that it cannot: {listed[0].reason}")
