"""`vllm_mode="server"`: the adapter goes to a real server of vLLM over HTTP, and rollouts come from it."""

import gc
import json
import shlex
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
import torch
from conftest import randomise
from integration.training import WARNINGS
from peft import LoraConfig, get_peft_model
from serving.servers import server
from transformers import AutoModelForCausalLM

import peft_reft
from peft_reft import LoReftConfig
from peft_reft.integrations.trl import server as way
from peft_reft.integrations.trl.policy import Policy

from .trainers import CHATS, PLAIN, WORDS, Watch, check_updates, make

pytestmark = WARNINGS
CLOSE = 1e-4
"""How far log-probabilities of rollout and trainer may be apart; both compute in 32 bits."""


NO_MARKS = dict(response_template=[], instruction_template=[])
"""For prompts that are no chats: a random model may write a header of the chat template, which then ends a prompt."""


def config(positions, **more):
    return LoReftConfig(task_type="CAUSAL_LM", **{"r": 4, "positions": positions, **NO_MARKS, **more})


def policy_of(folder, peft_config):
    return Policy.of(get_peft_model(AutoModelForCausalLM.from_pretrained(folder), peft_config))


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    """A server that was started by the command which an error gives."""
    command = shlex.split(way.start_command(policy_of(folder, config("f7+l7")), folder, "float32"))
    variables = dict(word.split("=") for word in command[:2])
    assert command[2:5] == ["vllm", "serve", folder]
    arguments = [*command[5:], "--enable-scale-out", "--enable-prompt-tokens-details"]
    log = tmp_path_factory.mktemp("log") / "server.log"
    with server(folder, log, arguments, key=None, **variables) as running:
        yield running


def at(address, **more):
    return dict(vllm_mode="server", vllm_server_base_url=address, **more)


def listed(address):
    """The adapters in the server. Trainers that are gone are collected before, and with them their adapters."""
    gc.collect()
    return [each["id"] for each in requests.get(f"{address}/v1/loreft_adapters").json()["data"]]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["GRPO", "RLOO"])
@pytest.mark.cell("Rollouts in vLLM", "{which} with a vLLM server: rollouts come from the policy")
def test_each_rollout_comes_from_the_policy(which, address, folder, tokenizer, tmp_path, monkeypatch):
    """After each of three updates the log-probabilities agree; those of base and last policy are far off."""
    settings = at(address, max_steps=3, learning_rate=0.05)
    with make(which, folder, tokenizer, config("f7+l7"), PLAIN, tmp_path, **settings) as trainer:
        check_updates(trainer, way.Served, CLOSE, monkeypatch)


@pytest.mark.slow
@pytest.mark.cell("Rollouts in vLLM", "GRPO with a vLLM server: log-probs agree in chats of several turns")
def test_chats(address, folder, tokenizer, tmp_path, monkeypatch):
    peft_config = config("f2+l2+g", response_template=None, instruction_template=None)
    settings = at(address, max_steps=2, learning_rate=0.05, generation_kwargs={"seed": 1})
    with make("GRPO", folder, tokenizer, peft_config, CHATS, tmp_path, **settings) as trainer:
        watch = Watch(trainer, monkeypatch)
        trainer.train()
        assert trainer.model.peft_config["default"].response_template  # marks were found, and sent
    assert len(watch.different) >= 2 * 4
    assert max(watch.different) < CLOSE
    assert min(watch.from_base) > 1e-3 and min(watch.from_last) > 1e-3


@pytest.mark.slow
def test_two_trainers_on_one_server(address, folder, tokenizer, tmp_path, monkeypatch):
    """Each has an adapter of its own there, also while the other trains; when they are gone, so are the adapters."""
    assert listed(address) == []
    settings = at(address, max_steps=1, learning_rate=0.05)
    with (
        make("GRPO", folder, tokenizer, config("f7+l7"), PLAIN, tmp_path / "a", **settings) as one,
        make("GRPO", folder, tokenizer, config("f2+l1"), PLAIN, tmp_path / "b", **settings) as two,
    ):
        randomise(two.model, seed=5)
        assert len(listed(address)) == 2
        with monkeypatch.context() as patched:
            watches = [Watch(trainer, patched) for trainer in (one, two)]
            for trainer in (one, two, one):
                trainer._last_loaded_step = -1  # else TRL sends nothing before the first rollout of a second training
                trainer.train()
            for watch in watches:
                assert watch.different and max(watch.different) < CLOSE
                assert min(watch.from_base) > 1e-2
            del watches, watch
    del one, two, trainer
    assert listed(address) == []


@pytest.mark.slow
def test_what_goes_on_behind_a_result(address, folder, tokenizer, tmp_path):
    """Without marks all behind the first prompt is an answer, as in training. Prompts differ in where that is."""
    with make("GRPO", folder, tokenizer, config("f2+l2+g3"), PLAIN, tmp_path, **at(address)) as trainer:
        generation = trainer.vllm_generation
        generation.sync_weights()
        prompts = [tokenizer(text)["input_ids"] for text in WORDS]
        _, answers, _, _ = generation.generate(prompts, None, 1)
        result = tokenizer("x y z")["input_ids"]
        longer = [[*prompt, *answer, *result] for prompt, answer in zip(prompts, answers)]
        _, answers, logps, _ = generation.generate(longer, None, 1)
        model = trainer.model.eval()

        def scored(document, length):
            with torch.no_grad(), peft_reft.prompt_lengths([length]):
                return model(torch.tensor([document])).logits[0].log_softmax(-1)

        off = []
        for prompt, before, answer, row in zip(prompts, longer, answers, logps, strict=True):
            found = torch.tensor([each[0] for each in row])
            places, chosen = range(len(before) - 1, len(before) + len(answer) - 1), torch.tensor(answer)
            for length, far in ((len(prompt), False), (len(before), True)):
                logits = scored([*before, *answer], length)[list(places)]
                difference = (logits[range(len(answer)), chosen] - found).abs().max().item()
                assert far or difference < CLOSE
                off += [difference] * far
        assert max(off) > 1e-3  # what would be if each prompt's end were taken for the prompt's


@pytest.mark.slow
def test_every_route_of_the_client_has_the_policy(address, folder, tokenizer, tmp_path):
    """Also that for prompts with images, chats, and what a user asks for."""
    extra = {"vllm_xargs": {"loreft_scale": 0.0}}
    settings = at(address, generation_kwargs={"temperature": 0.0, **extra})
    with make("GRPO", folder, tokenizer, config("f7+l7"), PLAIN, tmp_path, **settings) as trainer:
        trainer.vllm_generation.sync_weights()
        client = trainer.vllm_generation.vllm_client
        greedy = dict(temperature=0.0, max_tokens=4)

        def best(ids):
            with torch.no_grad():
                return trainer.model.eval()(torch.tensor([ids])).logits[0, -1].argmax().item()

        found = set()
        for ids in (tokenizer(text)["input_ids"] for text in WORDS):
            edited = best(ids)
            with trainer.model.disable_adapter():
                plain = best(ids)
            assert client.generate([ids], **greedy)["completion_ids"][0][0] == edited
            assert client.generate([ids], features=[None], **greedy)["completion_ids"][0][0] == edited
            assert client.generate([ids], generation_kwargs=extra, **greedy)["completion_ids"][0][0] == plain
            _, [[first, *_]], _, _ = trainer.vllm_generation.generate([ids], None, 1)
            assert first == plain
            found.add(edited == plain)
        assert False in found
        chat = client.chat([[{"role": "user", "content": WORDS[2]}]], **greedy)
        assert chat["completion_ids"][0][0] == best(chat["prompt_ids"][0])


@pytest.mark.slow
def test_blocks_without_edits_outlive_updates(address, folder, tokenizer, tmp_path):
    """Nothing drops the prefix cache: what an earlier policy has edited is not found, the base's blocks are."""
    ids, cached = tokenizer(WORDS[2])["input_ids"], {}
    for positions in ("f2+l2", "l7"):
        settings = at(address, max_steps=1, learning_rate=0.05)
        with make("GRPO", folder, tokenizer, config(positions), PLAIN, tmp_path, **settings) as trainer:
            trainer.train()
            trainer.vllm_generation.sync_weights()
            body = {"model": trainer.vllm_generation.vllm_client.model, "prompt": ids, "max_tokens": 1}
            usage = requests.post(f"{address}/v1/completions", json=body).json()["usage"]
            cached[positions] = (usage["prompt_tokens_details"] or {}).get("cached_tokens")
    assert len(ids) == 80 and cached == {"f2+l2": 0, "l7": 64}


@pytest.mark.slow
def test_an_adapter_that_the_server_cannot_hold(address, folder, tokenizer, tmp_path):
    """It is refused when the trainer is made, with the command for a server that can."""
    with (
        pytest.raises(RuntimeError, match=r"(?s)needs max_rank=16, and .*config '{.loreft.: {.max_rank.: 16,"),
        make("GRPO", folder, tokenizer, config("f7+l7", r=16), PLAIN, tmp_path, **at(address)),
    ):
        pass
    assert listed(address) == []


@pytest.fixture
def bare(request):
    """Stands for a server that takes no adapters: what it answers to one."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.say(200, {"data": [{"id": "a/model"}], "vllm_config": {"weight_transfer_config": None}})

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.say(*request.param)

        def say(self, status, body):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize(
    "bare, message",
    [
        ((404, {"detail": "Not Found"}), "has no route that takes LoReFT adapters"),
        ((400, {"error": {"message": "This engine serves no LoReFT adapters."}}), "serves no LoReFT adapters"),
    ],
    indirect=["bare"],
)
def test_a_server_without_the_plugin(bare, message, folder, tokenizer, tmp_path):
    """The error says how to start one that has it."""
    with (
        pytest.raises(RuntimeError, match=message) as error,
        make("GRPO", folder, tokenizer, config("l2+g", r=3, tie="group"), PLAIN, tmp_path, **at(bare)),
    ):
        pass
    options = '{"loreft": {"max_rank": 3, "max_positions": 2, "edit_answers": true}}'
    assert str(error.value).endswith(
        "\nVLLM_PLUGINS=loreft VLLM_SERVER_DEV_MODE=1 vllm serve a/model --dtype float32 "
        f"--logprobs-mode processed_logprobs --additional-config '{options}'"
    )


@pytest.mark.parametrize("bare", [(200, {})], indirect=True)
def test_other_methods_go_the_way_of_trl(bare, folder, tokenizer, tmp_path):
    """LoRA's trainer wants the server's group of processes, as it does without this package."""
    peft_config = LoraConfig(task_type="CAUSAL_LM", r=4)
    with (
        pytest.raises(RuntimeError, match="has no weight-transfer engine"),
        make("GRPO", folder, tokenizer, peft_config, PLAIN, tmp_path, edits=False, **at(bare)),
    ):
        pass


def test_requests_by_where_their_prompts_end():
    """One request for all prompts of one length; answers come back in order, `n` for each prompt."""
    asked = []

    def ask(prompts, features, generation_kwargs):
        asked.append((prompts, generation_kwargs.get("vllm_xargs")))
        pairs = [(prompt, number) for prompt in prompts for number in range(2)]
        return {"prompt_ids": prompts, "completion_ids": [[*prompt, n] for prompt, n in pairs], "logprobs": None}

    prompts = [[5], [6, 6], [7], [8]]
    kwargs = {"vllm_xargs": {"loreft_scale": 2}}
    found = way._in_groups(ask, prompts, None, [1, 2, 1, 3], 2, kwargs)
    assert found["prompt_ids"] == prompts and found["logprobs"] is None
    assert found["completion_ids"] == [[*prompt, n] for prompt in prompts for n in range(2)]
    assert sorted(asked, key=lambda each: each[0]) == [
        ([[5], [7]], {"loreft_prompt_length": 1, "loreft_scale": 2}),
        ([[6, 6]], {"loreft_prompt_length": 2, "loreft_scale": 2}),
        ([[8]], {"loreft_prompt_length": 3, "loreft_scale": 2}),
    ]
    asked.clear()
    assert way._in_groups(ask, prompts, None, [None] * 4, 2, kwargs)["completion_ids"] == found["completion_ids"]
    assert asked == [(prompts, {"loreft_scale": 2})]
