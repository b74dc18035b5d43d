"""Versions of vLLM: those that the tests have run with, and what an engine of another one does before it serves."""

from dataclasses import replace

import numpy as np
import pytest

from peft_reft.serving.engine.config import NEWEST, OLDEST, is_seen, version
from peft_reft.serving.schedule import NONE
from serving.engines import ask, check, engine, prompt_of

NAMES = ["f7+l7", "all"]


def test_this_version_is_among_those_tested():
    assert is_seen(version())


def test_versions():
    (_, oldest), (_, newest) = OLDEST, NEWEST
    for seen in (f"0.{oldest}.0", f"0.{newest}.3", f"0.{newest}.0+cpu"):
        assert is_seen(seen)
    for unseen in (f"0.{oldest - 1}.9", f"0.{newest + 1}.0", f"0.{newest}.1rc2.dev5+gabc", "1.30.0", "dev"):
        assert not is_seen(unseen)


@pytest.fixture
def unseen(monkeypatch):
    """A vLLM that the tests have not seen."""
    monkeypatch.setattr("peft_reft.serving.core.is_seen", lambda version: False)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_engine_that_was_not_tested_checks_itself(llama, unseen, compiled):
    """It warns, finds nothing wrong, and serves as ever: nothing of the check stays."""
    with (
        pytest.warns(UserWarning, match="the engine checks itself"),
        engine(llama, NAMES, enforce_eager=not compiled, loreft={"max_adapters": 2}) as llm,
    ):
        requests = [(prompt_of(length, length), name) for name in (None, *NAMES) for length in (5, 40)]
        check(llama, requests, ask(llm, requests, 6), 6)
        worker = llm.llm_engine.model_executor.driver_worker.worker
        assert len(worker.loreft.places) == 2 and worker.loreft_check is None
        assert not worker.loreft.model._forward_pre_hooks
        assert not any("apply" in vars(edits) for edits in worker.loreft.edits.values())


# What another version might do: the step's numbers mean something else, or it is not prepared.
FAULTS = {
    "computed": lambda pieces: replace(pieces, computed=pieces.computed + pieces.count),
    "computed, answers": lambda pieces: replace(pieces, computed=pieces.computed + (pieces.computed >= pieces.given)),
    "rows": lambda pieces: replace(pieces, start=pieces.start + 1),
    "nothing": lambda pieces: replace(pieces, place=np.full_like(pieces.place, NONE)),
}


@pytest.mark.parametrize(
    "fault",
    ["computed, answers", *(pytest.param(each, marks=pytest.mark.slow) for each in ("computed", "rows", "nothing"))],
)
def test_an_engine_that_would_edit_wrongly_does_not_start(llama, unseen, monkeypatch, fault):
    from peft_reft.serving.server import Server

    prepare = Server.prepare
    monkeypatch.setattr(Server, "prepare", lambda server, pieces: prepare(server, FAULTS[fault](pieces)))
    with (
        pytest.warns(UserWarning, match="the engine checks itself"),
        pytest.raises(
            RuntimeError, match=r"it would edit wrongly: model.layers.0: .* Install a tested version of vLLM"
        ),
        engine(llama, NAMES),
    ):
        pass


@pytest.mark.slow
def test_an_engine_whose_cache_would_be_wrong_does_not_start(llama, unseen, monkeypatch):
    monkeypatch.setattr("peft_reft.serving.blocks.EditedMap.element", lambda edited, start, stop: None)
    with (
        pytest.warns(UserWarning, match="the engine checks itself"),
        pytest.raises(RuntimeError, match="cached blocks with edited tokens have the base model's keys"),
        engine(llama, NAMES),
    ):
        pass
