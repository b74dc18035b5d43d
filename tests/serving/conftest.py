"""vLLM compared with transformers. `make test-vllm` runs this folder in an environment of its own."""

import pytest
from conftest import make_tokenizer

from serving.engines import ADAPTERS, fields, make


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    served = make("llama", str(tmp_path_factory.mktemp("llama")))
    for seed, name in enumerate(ADAPTERS):
        served.add(name, seed=seed, **fields(name))
    return served


@pytest.fixture(scope="session")
def small_tokenizer():
    return make_tokenizer()
