"""examples/server.py: many clients at once get what `generate` gives each of them alone, from shared batches."""

import importlib.util
import json
import re
import shlex
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import forked
import pytest
import torch
import uvicorn
from conftest import VOCAB, randomise
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from peft_reft import LoReftConfig

ROOT = Path(__file__).parent.parent
CLIENTS = 16
NAMES = ["emoji", "mine", "all", "__base__"]
USER = [{"role": "system", "content": "a b"}, {"role": "user", "content": "c d e f g"}]
PROMPTS = {"a b": 3, "c d e f g h i j k l m": 8, "x": 5}  # prompt → max_new_tokens
CHAT = 6
END = "word55"
IGNORED = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


@pytest.fixture
def folders(model_id, tokenizer, tmp_path):
    """The folders of three adapters of one model, by name. Each of the model's tokens has a word."""
    tokenizer.add_tokens([f"word{number}" for number in range(len(tokenizer), VOCAB)])
    tokenizer.save_pretrained(model_id)
    configs = {
        "emoji": LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2"),
        "mine": LoReftConfig(task_type="CAUSAL_LM", r=2, positions="p", layers=[0], intervention="direft"),
        "all": LoReftConfig(task_type="CAUSAL_LM", r=3, positions="all"),
    }
    for seed, (name, config) in enumerate(configs.items()):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_id), config)
        randomise(model, seed=seed)
        model.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in configs}


@pytest.fixture
def module(folders, monkeypatch):
    """The example, imported as uvicorn imports it."""
    monkeypatch.setenv("ADAPTERS", " ".join(f"{name}={folder}" for name, folder in folders.items()))
    spec = importlib.util.spec_from_file_location("server", ROOT / "examples" / "server.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def port(module):
    """The port at which the example listens."""
    server = uvicorn.Server(uvicorn.Config(module.app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def post(port, body):
    """Return the status and the text of the reply."""
    connection = HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    status, text = reply.status, reply.read().decode()
    connection.close()
    return status, text


def alone(model, tokenizer, prompt, max_new_tokens):
    """Return the greedy answer of `model` to one prompt."""
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    ids = inputs["input_ids"]
    row = model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(row, skip_special_tokens=True)


def bodies():
    """Return the body of each client's request: each prompt for each adapter and for the base."""
    prompts = [*PROMPTS.items(), (USER, CHAT)]
    return [dict(adapter=name, prompt=prompt, max_new_tokens=limit) for prompt, limit in prompts for name in NAMES]


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize("rows", [16, 4])
@pytest.mark.parametrize("ends", [False, True], ids=["by length", "some by an end token"])
def test_sixteen_clients_at_once(folders, model_id, tokenizer, request, monkeypatch, rows, ends):
    if ends:  # make a frequent word the end of an answer
        GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids(END), pad_token_id=0).save_pretrained(model_id)
    models = {name: AutoPeftModelForCausalLM.from_pretrained(folder).eval() for name, folder in folders.items()}
    models["__base__"] = AutoModelForCausalLM.from_pretrained(model_id).eval()
    assert models["__base__"].dtype == torch.float32
    requests = bodies()
    assert len(requests) == CLIENTS
    expected = [alone(models[each["adapter"]], tokenizer, each["prompt"], each["max_new_tokens"]) for each in requests]
    for first in range(0, CLIENTS, len(NAMES)):
        assert len({*expected[first : first + len(NAMES)]}) == len(NAMES), "the names of one prompt can be told apart"
    assert any(END in text.split()[:-1] for text in expected) is not ends

    module, port = request.getfixturevalue("module"), request.getfixturevalue("port")
    monkeypatch.setattr(module, "ROWS", rows)
    generate, calls = module.model.generate, []

    def counted(*args, adapter_names, **kwargs):
        calls.append(adapter_names)
        deadline = time.monotonic() + 60
        while len(calls) == 1 and len(adapter_names) + len(module.waiting) < CLIENTS and time.monotonic() < deadline:
            time.sleep(0.001)  # the first batch takes as long as others need to arrive, as with a large model
        return generate(*args, adapter_names=adapter_names, **kwargs)

    monkeypatch.setattr(module.model, "generate", counted)
    with ThreadPoolExecutor(CLIENTS) as pool:
        replies = list(pool.map(lambda body: post(port, body), requests))
    assert [json.loads(text) for _, text in replies] == [{"text": text} for text in expected]
    assert sum(map(len, calls)) == CLIENTS
    assert max(map(len, calls)) <= rows
    assert len(calls) <= 1 + CLIENTS // rows < CLIENTS
    assert any("__base__" in names and len({*names}) > 1 for names in calls), "the base shares a batch with adapters"
    assert not module.waiting


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize(
    ("wrong", "status", "message"),
    [
        (dict(adapter="nobody"), 404, "adapter='nobody': unknown. There are: emoji, mine, all, __base__."),
        (dict(prompt="a " * 769), 400, "prompt: it has 769 tokens; 1 to 768 are allowed (PROMPT)."),
        (dict(prompt=""), 400, "prompt: it has 0 tokens; 1 to 768 are allowed (PROMPT)."),
        (dict(prompt=[]), 400, "prompt: Cannot apply chat template to an empty conversation."),
        (dict(max_new_tokens=0), 422, "greater than or equal to 1"),
        (dict(max_new_tokens=257), 422, "less than or equal to 256"),
        (dict(prompt=[1, 2]), 422, "valid dictionary"),
    ],
)
def test_what_is_refused(module, port, wrong, status, message):
    """A refused request names its field and what is allowed; it reaches no batch."""
    right = dict(adapter="emoji", prompt="a b", max_new_tokens=2)
    found, text = post(port, {**right, **wrong})
    assert found == status
    assert message in text
    assert post(port, right)[0] == 200


@pytest.mark.filterwarnings(IGNORED)
def test_a_request_must_name_its_adapter(port):
    """A misspelt field does not get the base model's answer."""
    status, text = post(port, dict(adaptor="emoji", prompt="a b", max_new_tokens=2))
    assert status == 422
    assert '"adapter"' in text


@pytest.mark.filterwarnings(IGNORED)
def test_an_adapter_that_is_loaded_while_the_server_runs(module, port, folders):
    """The way that the page names."""
    body = dict(bodies()[0], adapter="late")
    assert post(port, body)[0] == 404
    module.model.load_adapter(folders["emoji"], "late")
    module.ADAPTERS["late"] = folders["emoji"]
    assert post(port, body) == post(port, dict(body, adapter="emoji"))


@pytest.mark.filterwarnings(IGNORED)
def test_a_failure_is_that_batchs_alone(module, port, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(module.model, "generate", fails)
        assert post(port, bodies()[0])[0] == 500
    assert post(port, bodies()[0])[0] == 200


def test_the_commands_of_the_page(folders):
    """The page's server starts, and answers the page's curl line. What the page says about its length holds."""
    page = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    assert "fewer than 60 lines" in page
    assert len((ROOT / "examples" / "server.py").read_text(encoding="utf-8").splitlines()) < 60
    command = re.search(r"^ADAPTERS=.*? \\\n +(.*uvicorn .*)$", page, re.MULTILINE)[1]
    words = shlex.split(command)
    assert words[0] == ".venv/bin/uvicorn"
    curl = shlex.split(re.search(r"^curl .*?'$", page, re.MULTILINE | re.DOTALL)[0])
    assert curl[curl.index("-H") + 1] == "Content-Type: application/json"
    address = next(word for word in curl if word.startswith("localhost:8000/"))
    assert address == "localhost:8000/generate"
    server = forked.start(
        "import runpy; runpy.run_module('uvicorn', run_name='__main__')",
        *words[1:],
        *("--port", "0"),
        ADAPTERS=" ".join(f"{name}={folder}" for name, folder in folders.items()),
    )
    try:
        server.wait_for("Press CTRL+C")  # the line's end
        found = re.search(r"Uvicorn running on http://127.0.0.1:(\d+)", server.stderr)
        assert found, server.stderr
        status, text = post(int(found[1]), json.loads(curl[curl.index("-d") + 1]))
        assert status == 200, text
        assert json.loads(text)["text"]
    finally:
        server.process.terminate()
        server.wait(timeout=60)
