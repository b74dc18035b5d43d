"""Two API servers in front of one engine, with LoRA adapters of vLLM beside ours."""

import json
import os
import re
from functools import partial

import pytest
from peft import LoraConfig, get_peft_model

from peft_reft.serving import AdapterFiles
from serving.engines import make, prompt_of
from serving.servers import at_once, call, send, sent, server

pytestmark = pytest.mark.slow
PROMPT = prompt_of(9, 1)
TIMES = 12
"""Calls, each on a connection of its own. The kernel gives each to one of the two servers."""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model = make("llama", str(tmp_path_factory.mktemp("servers")))
    model.add("emoji", positions="f3+l3")
    targets = ["q_proj", "v_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, init_lora_weights=False, target_modules=targets)
    lora = get_peft_model(model.load(), config)
    model.adapters["lora"] = os.path.join(os.path.dirname(model.folder), "lora")
    lora.save_pretrained(model.adapters["lora"])
    return model


@pytest.fixture(scope="module")
def address(served, small_tokenizer, tmp_path_factory):
    small_tokenizer.save_pretrained(served.folder)
    source = tmp_path_factory.mktemp("source")
    os.symlink(served.add("first use", positions="l3", seed=4), source / "first-use")
    arguments = ["--api-server-count", "2", "--enable-lora", "--max-lora-rank", "8"]
    arguments += ["--lora-modules", *(f"{name}={served.adapters[name]}" for name in ("emoji", "lora"))]
    arguments += ["--additional-config", json.dumps({"loreft": {"resolve_from": str(source), "max_adapters": 4}})]
    log = tmp_path_factory.mktemp("log") / "server.log"
    with server(served.folder, log, arguments) as running:
        yield running


def complete(address, model, **more):
    """Status, and the answer's tokens or its error."""
    body = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    status, said = call(address, "/v1/completions", model=model, **body, **more)
    said = json.loads(said)
    return status, said["choices"][0]["token_ids"] if status == 200 else said["error"]["message"]


def by_all(served, address, model, adapter, **more):
    """All servers answer with the adapter."""
    for status, tokens in at_once([partial(complete, address, model, **more)] * TIMES):
        assert (status, tokens) == (200, served.expected(PROMPT, adapter, 6)[0])


def models(address):
    """What each of the servers lists."""
    return {
        tuple(sorted(each["id"] for each in json.loads(call(address, "/v1/models")[1])["data"])) for _ in range(TIMES)
    }


def test_lora_beside_loreft(served, address):
    assert models(address) == {("emoji", "lora", "tiny")}
    assert len({*(tuple(served.expected(PROMPT, adapter, 6)[0]) for adapter in (None, "emoji", "lora"))}) == 3
    for model, adapter in (("tiny", None), ("emoji", "emoji"), ("lora", "lora")):
        by_all(served, address, model, adapter)


def test_what_one_server_does_all_know(served, address):
    served.add("late", positions="l2", seed=9)
    served.add("later", positions="l2+g", seed=10)
    for adapter, inplace in (("late", False), ("later", True)):
        body = {"loreft_name": "late", "loreft_path": served.adapters[adapter], "load_inplace": inplace}
        assert call(address, "/v1/load_loreft_adapter", **body)[0] == 200
        assert models(address) == {("emoji", "late", "lora", "tiny")}
        by_all(served, address, "late", adapter)
        by_all(served, address, "tiny", adapter, vllm_xargs={"loreft": "late"})
    for adapter in ("late", "later"):  # sent as bytes to one of them
        form = sent(AdapterFiles.read(served.adapters[adapter]), "late", load_inplace="true")
        assert send(address, "/v1/loreft_adapters", **form)[0] == 200
        assert models(address) == {("emoji", "late", "lora", "tiny")}
        by_all(served, address, "late", adapter)
    status, said = call(address, "/v1/load_loreft_adapter", loreft_name="lora", loreft_path=served.adapters["late"])
    assert status == 400 and "There is a LoRA adapter 'lora' already" in said
    assert call(address, "/v1/unload_loreft_adapter", loreft_name="late")[0] == 200
    asked = [partial(complete, address, "late"), partial(complete, address, "tiny", vllm_xargs={"loreft": "late"})]
    for status, said in at_once(asked * TIMES):
        assert status in (400, 404) and ("no adapter of that name" in said or "does not exist" in said)
    assert models(address) == {("emoji", "lora", "tiny")}


def test_first_use(served, address):
    by_all(served, address, "first-use", "first use")
    assert models(address) == {("emoji", "first-use", "lora", "tiny")}


def test_metrics_add_up(served, address):
    def counted():
        page = call(address, "/metrics")[1]
        found = re.findall(r'^vllm:loreft_requests_total{adapter="emoji",model_name="tiny"} (.*)$', page, re.MULTILINE)
        return [float(number) for number in found]

    (before,) = counted()
    by_all(served, address, "emoji", "emoji")
    assert counted() == [before + TIMES]
