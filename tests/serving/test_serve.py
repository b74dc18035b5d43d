"""vLLM's server on loopback, and the real OpenAI client."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from functools import partial

import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from peft_reft.serving import AdapterFiles
from peft_reft.serving.endpoints import Endpoints
from serving.engines import make, prompt_of
from serving.servers import KEY, at_once, call, form_of, send, sent, server

PROMPTS = [prompt_of(9, n) for n in range(4)]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model = make("llama", str(tmp_path_factory.mktemp("serve")))
    model.add("emoji", positions="f3+l3")
    model.add("answers", positions="f2+g", seed=2)
    return model


@pytest.fixture(scope="module")
def address(served, small_tokenizer, tmp_path_factory):
    """A server with one adapter from the command line, one from its config, and a folder of others."""
    small_tokenizer.save_pretrained(served.folder)
    source = tmp_path_factory.mktemp("source")
    os.symlink(served.add("first use", positions="l3", seed=4), source / "first-use")
    os.symlink(served.add("second use", positions="f1", seed=5), source / "second-use")
    config = {"loreft": {"adapters": {"answers": served.adapters["answers"]}, "resolve_from": str(source)}}
    config["loreft"]["max_adapters"] = 3
    arguments = ["--additional-config", json.dumps(config), "--lora-modules", f"emoji={served.adapters['emoji']}"]
    log = tmp_path_factory.mktemp("log") / "server.log"
    with server(served.folder, log, arguments, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as running:
        yield running


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)


def post(address, path, key=KEY, **body):
    """Status and JSON of a call."""
    status, said = call(address, path, key, **body)
    return status, json.loads(said)


def complete(client, prompt, adapter, tokens=6, model="tiny", **fields):
    extra = {"ignore_eos": True, "return_token_ids": True}
    if adapter is not None:
        extra["vllm_xargs"] = {"loreft": adapter}
    return client.completions.create(
        model=model, prompt=prompt, max_tokens=tokens, temperature=0, logprobs=0, extra_body=extra, **fields
    )


def check(served, completion, prompt, adapter, tokens=6):
    choice, wanted = completion.choices[0], served.expected(prompt, adapter, tokens)
    assert choice.token_ids == wanted[0]
    assert choice.logprobs.token_logprobs == pytest.approx(wanted[1], abs=2e-4)


@pytest.mark.parametrize("adapter", [None, "emoji", "answers"])
def test_completions(served, client, adapter):
    for prompt in PROMPTS:
        check(served, complete(client, prompt, adapter), prompt, adapter)


def test_requests_at_once(served, client):
    asked = [(prompt, adapter) for prompt in PROMPTS for adapter in (None, "emoji", "answers", "nobody")]

    def run(prompt, adapter):
        try:
            return complete(client, prompt, adapter, tokens=20)
        except openai.BadRequestError as error:
            return error

    for (prompt, adapter), answer in zip(asked, at_once([partial(run, *each) for each in asked])):
        if adapter == "nobody":
            assert "loreft='nobody': there is no adapter of that name. There are: answers, emoji" in str(answer)
        else:
            check(served, answer, prompt, adapter, 20)


def test_streaming(served, client):
    parts = list(complete(client, PROMPTS[0], "emoji", stream=True))
    tokens = [token for part in parts for choice in part.choices for token in choice.token_ids]
    assert tokens == served.expected(PROMPTS[0], "emoji", 6)[0]


def test_chat(served, client, small_tokenizer):
    messages = [{"role": "user", "content": "a b c d e f g"}]
    prompt = small_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    answer = client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=6,
        temperature=0,
        extra_body={"vllm_xargs": {"loreft": "answers"}, "ignore_eos": True, "return_token_ids": True},
    )
    assert answer.choices[0].token_ids == served.expected(prompt, "answers", 6)[0]


def models(client):
    return {each.id: each for each in client.models.list().data}


def test_each_adapter_is_a_model(served, client):
    listed = models(client)
    assert set(listed) == {"tiny", "answers", "emoji"}
    assert (listed["emoji"].parent, listed["emoji"].root) == ("tiny", served.adapters["emoji"])
    assert listed["tiny"].parent is None


@pytest.mark.parametrize("adapter", ["emoji", "answers"])
def test_the_model_chooses_in_completions(served, client, adapter):
    answer = complete(client, PROMPTS[0], None, model=adapter)
    check(served, answer, PROMPTS[0], adapter)
    assert answer.model == adapter
    parts = list(complete(client, PROMPTS[0], None, model=adapter, stream=True))
    assert {part.model for part in parts} == {adapter}
    tokens = [token for part in parts for choice in part.choices for token in choice.token_ids]
    assert tokens == served.expected(PROMPTS[0], adapter, 6)[0]


def test_the_model_chooses_in_chats(served, client, address, small_tokenizer):
    """In all routes that take a chat; and a chat of parts, whose type is an adapter's name, is the base's."""
    served.add("text", positions="f3", seed=8)
    load = {"lora_name": "text", "lora_path": served.adapters["text"]}
    assert call(address, "/v1/load_lora_adapter", **load)[0] == 200
    parts = [{"role": "user", "content": [{"type": "text", "text": "a b c d e f g"}]}]
    plain = [{"role": "user", "content": "a b c d e f g"}]
    prompt = small_tokenizer.apply_chat_template(plain, add_generation_prompt=True)["input_ids"]
    for messages, model, adapter in ((plain, "emoji", "emoji"), (parts, "tiny", None), (parts, "text", "text")):
        answer = client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=6,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        assert answer.model == model
        assert answer.choices[0].token_ids == served.expected(prompt, adapter, 6)[0]
    assert call(address, "/v1/unload_lora_adapter", lora_name="text")[0] == 200
    base, emoji = (small_tokenizer.decode(served.expected(prompt, adapter, 6)[0]) for adapter in (None, "emoji"))
    assert base.split()[:2] != emoji.split()[:2]
    response = client.responses.create(model="emoji", input="a b c d e f g", temperature=0, max_output_tokens=6)
    assert response.model == "emoji" and emoji.split()[:2] == response.output_text.split()[:2]
    messages = {"max_tokens": 6, "temperature": 0, "messages": plain}
    status, said = post(address, "/v1/messages", model="emoji", **messages)
    assert status == 200 and said["model"] == "emoji" and emoji.split()[:2] == said["content"][0]["text"].split()[:2]
    assert post(address, "/tokenize", model="emoji", prompt="a b")[1]["count"] == 2


def test_names_that_say_different_things(served, client):
    check(served, complete(client, PROMPTS[1], "emoji", model="emoji"), PROMPTS[1], "emoji")
    with pytest.raises(openai.BadRequestError, match="loreft='answers': the request names 'emoji' as its model"):
        complete(client, PROMPTS[1], "answers", model="emoji")
    with pytest.raises(openai.NotFoundError, match="`nobody` does not exist"):
        complete(client, PROMPTS[1], None, model="nobody")


@pytest.mark.parametrize(
    "name",
    [3, True, 0.5, ["emoji"], "", "e" * 100_000, "emoji\n", "\0", "../emoji", "{emoji}", "émoji", "/", "emoji "],
)
def test_odd_names_fail_their_request_alone(served, client, name):
    with pytest.raises(openai.BadRequestError, match=r"there is no adapter of that name. There are: ") as error:
        complete(client, PROMPTS[1], name)
    assert len(str(error.value)) < 1000
    if isinstance(name, str) and name:
        with pytest.raises(openai.NotFoundError):
            complete(client, PROMPTS[1], None, model=name)
    check(served, complete(client, PROMPTS[1], "emoji"), PROMPTS[1], "emoji")


@pytest.mark.parametrize("xargs", [{"loreft": None}, {"loreft": {"name": "emoji"}}, "emoji", ["emoji"], 7])
def test_xargs_of_a_wrong_type(client, xargs):
    with pytest.raises(openai.BadRequestError, match="vllm_xargs"):
        client.completions.create(model="tiny", prompt="a", extra_body={"vllm_xargs": xargs})


def ours(address, name, path=None, **more):
    """Load an adapter (or drop it) by our routes."""
    if path is None:
        return call(address, "/v1/unload_loreft_adapter", loreft_name=name)
    return call(address, "/v1/load_loreft_adapter", loreft_name=name, loreft_path=path, **more)


def theirs(address, name, path=None, **more):
    """The same by vLLM's routes for LoRA."""
    if path is None:
        return call(address, "/v1/unload_lora_adapter", lora_name=name)
    return call(address, "/v1/load_lora_adapter", lora_name=name, lora_path=path, **more)


@pytest.mark.parametrize("route", [ours, theirs])
def test_load_replace_and_unload(served, client, address, route):
    served.add("late", positions="l2", seed=9)
    served.add("later", positions="l2+g", seed=10)
    assert route(address, "late", served.adapters["late"])[0] == 200
    check(served, complete(client, PROMPTS[1], "late"), PROMPTS[1], "late")
    assert [each["id"] for each in post(address, "/v1/loreft_adapters")[1]["data"]] == ["answers", "emoji", "late"]
    assert set(models(client)) == {"tiny", "answers", "emoji", "late"}
    for name, path, message in (
        ("late", served.adapters["late"], "already"),
        ("more", served.adapters["late"], "3 adapters already"),
        ("tiny", served.adapters["late"], "base model"),
        ("m" * 300, served.adapters["late"], "1 to 200 printable characters"),
    ):
        status, said = route(address, name, path)
        assert status == 400 and message in json.loads(said)["error"]["message"]

    long = {}
    at_work = threading.Thread(target=lambda: long.update(a=complete(client, PROMPTS[2], "late", tokens=200)))
    at_work.start()
    time.sleep(0.3)
    assert route(address, "late", served.adapters["later"], load_inplace=True)[0] == 200
    check(served, complete(client, PROMPTS[2], None, model="late"), PROMPTS[2], "later")
    assert models(client)["late"].root == served.adapters["later"]
    assert route(address, "late")[0] == 200
    at_work.join()
    check(served, long["a"], PROMPTS[2], "late", 200)  # the running request has kept its weights to its end
    with pytest.raises(openai.BadRequestError, match="there is no adapter of that name"):
        complete(client, PROMPTS[1], "late")
    with pytest.raises(openai.NotFoundError):
        complete(client, PROMPTS[1], None, model="late")
    assert set(models(client)) == {"tiny", "answers", "emoji"}
    status, said = route(address, "more", "/nowhere")
    assert status == 400 and "/nowhere is no folder" in json.loads(said)["error"]["message"]
    status, said = route(address, "late")
    assert status in (400, 404) and "late" in json.loads(said)["error"]["message"]
    check(served, complete(client, PROMPTS[1], "emoji"), PROMPTS[1], "emoji")


def test_first_use(served, client, address):
    """Several first requests at once load an adapter once; another one takes its place when it is not used."""
    for name, adapter in (("first-use", "first use"), ("second-use", "second use"), ("first-use", "first use")):
        by_model = [partial(complete, client, prompt, None, model=name) for prompt in PROMPTS]
        by_name = [partial(complete, client, prompt, name) for prompt in PROMPTS]
        for answer, prompt in zip(at_once(by_model + by_name), PROMPTS * 2):
            check(served, answer, prompt, adapter)
        assert set(models(client)) == {"tiny", "answers", "emoji", name}
    assert ours(address, "first-use")[0] == 200


def counted(address):
    """From each adapter's name to the number of its requests in vLLM's metrics."""
    rows = re.findall(
        r'^vllm:loreft_requests_total{adapter="(.*)",model_name="tiny"} (.*)$',
        call(address, "/metrics")[1],
        re.MULTILINE,
    )
    return {name: float(number) for name, number in rows}


def test_metrics(client, address):
    before = counted(address)
    for _ in range(3):
        complete(client, PROMPTS[0], "emoji")
    client.completions.create(model="answers", prompt=PROMPTS[0], max_tokens=2, n=2)
    complete(client, PROMPTS[0], None)
    with pytest.raises(openai.BadRequestError):
        complete(client, PROMPTS[0], "nobody")
    after = counted(address)
    grown = {name: after[name] - before[name] for name in before}
    assert {name: number for name, number in grown.items() if number} == {"emoji": 3, "answers": 1}
    assert "nobody" not in after


def test_beams_are_refused_with_an_adapter(client):
    def ask(model="tiny", **xargs):
        return client.completions.create(
            model=model, prompt=PROMPTS[0], max_tokens=3, n=2, extra_body={"use_beam_search": True, **xargs}
        )

    assert len(ask().choices) == 2
    for chosen in ({"vllm_xargs": {"loreft": "emoji"}}, {"model": "emoji"}):
        with pytest.raises(openai.BadRequestError, match="loreft='emoji': beam search cannot be combined"):
            ask(**chosen)


@pytest.mark.slow
def test_an_engine_in_another_process(served, tmp_path):
    """`LLM` as users have it: its engine runs in a process of its own."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "from vllm import LLM, SamplingParams\n"
        "from peft_reft.serving import add_adapter, remove_adapter\n"
        "if __name__ == '__main__':\n"
        "    model, adapters, prompt = json.loads(sys.argv[1])\n"
        "    usual = dict(dtype='float32', enforce_eager=True, max_model_len=128)\n"
        "    llm = LLM(model, additional_config={'loreft': {}}, **usual)\n"
        "    found = {}\n"
        "    for name, folder in adapters.items():\n"
        "        add_adapter(llm, name, folder)\n"
        "        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, extra_args={'loreft': name})\n"
        "        found[name] = list(llm.generate([{'prompt_token_ids': prompt}], params)[0].outputs[0].token_ids)\n"
        "        remove_adapter(llm, name)\n"
        "    try:\n"
        "        add_adapter(llm, 'bad', model)\n"
        "    except ValueError as error:\n"
        "        found['bad'] = str(error)\n"
        "    print('FOUND ' + json.dumps(found))\n"
    )
    adapters = {name: served.adapters[name] for name in ("emoji", "answers")}
    command = [sys.executable, str(script), json.dumps([served.folder, adapters, PROMPTS[0]])]
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.partition("FOUND ")[2].splitlines()[0])
    assert "has no adapter_config.json" in found.pop("bad")
    assert found == {name: served.expected(PROMPTS[0], name, 6)[0] for name in adapters}


def test_routes_want_the_key(address):
    assert post(address, "/v1/loreft_adapters", key="another")[0] == 401
    assert send(address, "/v1/loreft_adapters", key="another", name="x")[0] == 401


def test_an_adapter_is_sent(served, client, address):
    """There need be no disk that both sides see. Each one that comes replaces the one before."""
    files = [AdapterFiles.read(served.add(f"sent {n}", positions="f3+g", seed=60 + n)) for n in range(3)]
    for n, each in enumerate(files):
        status, said = send(address, "/v1/loreft_adapters", **sent(each, "sent", load_inplace="true"))
        assert status == 200, said
        check(served, complete(client, PROMPTS[0], "sent"), PROMPTS[0], f"sent {n}")
        check(served, complete(client, PROMPTS[1], None, model="sent"), PROMPTS[1], f"sent {n}")
    assert models(client)["sent"].root == "sent at run time"
    for wrong, message in (
        (sent(files[0], "sent"), "There is an adapter 'sent' already"),
        (sent(files[0], name=""), "an adapter's name is a string"),
        (sent(files[0], name="tiny"), "the name of the base model"),
        (sent(files[0], "sent", load_inplace="yes"), "load_inplace='yes': expected true or false"),
        (sent(files[0], "sent", replace="true"), "There is no field replace"),
        ({"name": "sent", "load_inplace": "true"}, "config is missing, or no file"),
        ({"config": ("c", files[0].config)}, "name is missing, or no text"),
        (sent(files[0], "sent", load_inplace="true", weights=("w", files[0].weights[:-5])), "damaged or cut short"),
        (sent(files[0], "sent", load_inplace="true", config=("c", b"{")), "adapter_config.json cannot be used"),
    ):
        status, said = send(address, "/v1/loreft_adapters", **wrong)
        assert status == 400 and message in json.loads(said)["error"]["message"], said
        check(served, complete(client, PROMPTS[0], "sent"), PROMPTS[0], "sent 2")
    status, said = post(address, "/v1/loreft_adapters", name="sent")  # JSON
    assert status == 400 and "name is missing" in said["error"]["message"]
    assert call(address, "/v1/unload_loreft_adapter", loreft_name="sent")[0] == 200


def test_a_body_that_is_too_large_or_no_form(monkeypatch):
    monkeypatch.setattr("peft_reft.serving.endpoints.MOST_BYTES", 100_000)
    app = FastAPI()
    Endpoints().attach_router(app)
    body, headers = form_of(**sent(AdapterFiles(b"{}", b"x" * 200_000), "x"))
    for wrong, message in (
        (body, "allowed: 100000 bytes"),
        (b"no form", "The body cannot be read: Invalid multipart data"),
    ):
        answer = TestClient(app).post("/v1/loreft_adapters", content=wrong, headers=headers)
        assert answer.status_code == 400 and message in answer.json()["error"]["message"]
