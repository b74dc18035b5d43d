"""Rollouts of TRL's trainers in vLLM. `make test-rollouts` runs this folder in an environment of its own."""

import pytest
from conftest import make_tokenizer

from peft_reft.integrations.trl import rollouts_in_vllm

from .trainers import ENGINE, save_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    tokenizer = make_tokenizer()
    # A quarter of the words end an answer, so answers are ragged.
    ends = [2, *range(len(tokenizer) - 16, len(tokenizer))]
    return save_model(tmp_path_factory.mktemp("model"), tokenizer, ends)


@pytest.fixture(autouse=True)
def _rollouts():
    rollouts_in_vllm(**ENGINE)
