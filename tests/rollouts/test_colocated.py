"""`vllm_mode="colocate"`: rollouts come from the policy as it is, to the last digit that the engine allows."""

from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from integration.test_tools import CALL, CALLS, lookup, qwen_like
from integration.training import WARNINGS
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation
from vllm import LLM

import peft_reft.integrations.trl
from peft_reft import LoReftConfig
from peft_reft.integrations.trl import colocated, rollouts_in_vllm
from peft_reft.integrations.trl.turns import Histories

from .trainers import (
    CHATS,
    ENGINE,
    LONG,
    PLAIN,
    Watch,
    alternating,
    check_updates,
    make,
    save_model,
    shut_down,
    writer,
)

pytestmark = WARNINGS

SPECS = {
    "f7+l7": dict(positions="f7+l7", r=4),
    "l7+g": dict(positions="l7+g", r=4),
    "all": dict(positions="all", r=4),
    "bias": dict(positions="f2+l2", intervention="bias"),
}
CLOSE = 1e-5
"""How far log-probabilities of rollout and trainer may be apart; both compute in 32 bits."""


def config(spec, **more):
    return LoReftConfig(task_type="CAUSAL_LM", **{**SPECS[spec], **more})


@pytest.mark.parametrize("which", ["GRPO", pytest.param("RLOO", marks=pytest.mark.slow)])
@pytest.mark.cell("Rollouts in vLLM", "{which} × vLLM, colocated: after each update")
def test_each_rollout_comes_from_the_policy(which, folder, tokenizer, tmp_path, monkeypatch):
    """After each of three updates log-probabilities agree; those of the base and of the last policy are far off."""
    settings = dict(max_steps=3, learning_rate=0.05)
    with make(which, folder, tokenizer, config("f7+l7"), PLAIN, tmp_path, **settings) as trainer:
        check_updates(trainer, colocated.Colocated, CLOSE, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.cell(
    "Rollouts in vLLM",
    "GRPO × vLLM, colocated: chats of several turns, {spec}",
)
def test_chats(spec, folder, tokenizer, tmp_path, monkeypatch):
    settings = dict(max_steps=2, learning_rate=0.05)
    with make("GRPO", folder, tokenizer, config(spec), CHATS, tmp_path, **settings) as trainer:
        watch = Watch(trainer, monkeypatch)
        trainer.train()
        assert trainer.model.peft_config["default"].response_template  # marks were found, and sent
    assert len(watch.different) >= 2 * 4
    assert max(watch.different) < CLOSE
    for differences in (watch.from_base, watch.from_last):
        assert min(differences) > 10 * CLOSE and max(differences) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("marks", [True, False], ids=["marks", "no marks"])
@pytest.mark.parametrize("spec", ["f7+l7", "l7+g"])
@pytest.mark.cell("Rollouts in vLLM", "GRPO × vLLM, colocated: tools, {spec}, marks: {marks}")
def test_tools(spec, marks, tmp_path, monkeypatch):
    """Calls and results stand between answers. Without marks all of it is an answer, as in training."""
    tokenizer = qwen_like()
    folder = save_model(tmp_path / "model", tokenizer, [tokenizer.eos_token_id], max_position_embeddings=2048)
    result = tokenizer.convert_tokens_to_ids("<tool_response>")

    def what_to_write(ids):
        """Return the next call of this conversation; after the last call, a word."""
        word = next(word for word in CALLS if f"<|im_start|>user\n{word}<" in tokenizer.decode(ids))
        done = list(ids).count(result)
        text = CALL % CALLS[word][done] if done < len(CALLS[word]) else f"So {word}.<|im_end|>"
        return tokenizer(text)["input_ids"]

    rollouts_in_vllm(**ENGINE, logprobs_mode="raw_logprobs", logits_processors=[writer(what_to_write)])
    rows = [{"prompt": [{"role": "user", "content": word}]} for word in CALLS]
    given = {} if marks else dict(response_template=[], instruction_template=[])
    settings = dict(max_steps=1, learning_rate=0.0, per_device_train_batch_size=6, max_completion_length=400)
    peft_config = config(spec, **given)
    with make("GRPO", folder, tokenizer, peft_config, rows, tmp_path, tools=[lookup], **settings) as trainer:
        watch = Watch(trainer, monkeypatch)
        trainer.train()
        assert bool(trainer.model.peft_config["default"].response_template) == marks
        # Each answer between results is compared, in both rows of a prompt.
        assert len(watch.different) == 2 * sum(len(calls) + 1 for calls in CALLS.values())
        assert max(watch.different) < CLOSE
        assert min(watch.from_base) > 10 * CLOSE
        if not marks:  # what would be if each call's prompt were taken for a prompt
            monkeypatch.setattr(Histories, "prompt_lengths", lambda self, prompts: [None] * len(prompts))
            watch.different.clear()
            trainer.train()
            assert max(watch.different) > 1e-3


@pytest.mark.slow
def test_the_prefix_cache_outlives_updates(folder, tokenizer, tmp_path):
    """Blocks without edits stay; those that an earlier policy has edited are not found again."""
    rows = [{"prompt": LONG}, {"prompt": f"z {LONG}"}]
    ids = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    cached = {}
    settings = dict(max_steps=3, learning_rate=0.05, per_device_train_batch_size=4)
    for spec in ("f2+l2", "l7"):
        peft_config = LoReftConfig(task_type="CAUSAL_LM", r=4, positions=spec)
        with make("GRPO", folder, tokenizer, peft_config, rows, tmp_path, **settings) as trainer:
            trainer.train()
            trainer.vllm_generation.sync_weights()
            prompts = [{"prompt_token_ids": each} for each in ids]
            outputs = trainer.vllm_generation.llm.generate(prompts, use_tqdm=False)
            cached[spec] = [output.num_cached_tokens for output in outputs]
    assert [len(each) for each in ids] == [80, 81]
    assert cached == {"f2+l2": [0, 0], "l7": [64, 64]}


@pytest.mark.slow
def test_other_methods_go_the_way_of_trl(folder, tokenizer, tmp_path, monkeypatch):
    """LoRA is merged and all weights are sent, although `rollouts_in_vllm` was called."""
    sent = []
    iterate = vllm_generation.VLLMGeneration._iter_named_params

    def spied(generation):
        for name, parameter in iterate(generation):
            sent.append(name)
            yield name, parameter

    monkeypatch.setattr(vllm_generation.VLLMGeneration, "_iter_named_params", spied)
    monkeypatch.setattr(vllm_generation, "LLM", partial(LLM, **ENGINE))
    peft_config = LoraConfig(task_type="CAUSAL_LM", r=4)
    with make("GRPO", folder, tokenizer, peft_config, PLAIN, tmp_path, edits=False, max_steps=1) as trainer:
        llm = trainer.vllm_generation.llm
        assert type(llm) is LLM
        assert not llm.llm_engine.vllm_config.additional_config
        trainer.train()
    assert "model.embed_tokens.weight" in sent


@pytest.mark.slow
def test_the_engine_sleeps_at_level_1(folder, tokenizer, tmp_path, monkeypatch):
    """Level 2 would lose the base's weights. A CPU cannot free memory, but the engine's core sleeps and wakes."""
    with make("GRPO", folder, tokenizer, config("f7+l7"), PLAIN, tmp_path, max_steps=3, learning_rate=0.05) as trainer:
        generation = trainer.vllm_generation
        executor = generation.llm.llm_engine.model_executor
        levels, sleep = [], executor.sleep

        def spied(level):
            levels.append(level)
            sleep(level)

        monkeypatch.setattr(executor, "sleep", spied)
        watch = Watch(trainer, monkeypatch)
        generation.llm.sleep(level=2)  # what TRL does at the end of `_init_vllm`, if the engine has sleep mode
        generation.enable_sleep_mode = generation._llm_weights_sleeping = True
        trainer.train()
        assert executor.is_sleeping
    assert levels == [1] * 4
    assert max(watch.different) < CLOSE and min(watch.from_last) > 1e-2


@pytest.mark.slow
def test_what_a_user_says_counts(folder, tokenizer, tmp_path):
    """Requests keep the arguments that a user gives, and a user may generate with the trainer's engine."""
    extra = {"extra_args": {"loreft_scale": 0.0}, "temperature": 0.0}
    with make("GRPO", folder, tokenizer, config("f7+l7"), PLAIN, tmp_path, generation_kwargs=extra) as trainer:
        generation = trainer.vllm_generation
        generation.sync_weights()
        ids = tokenizer(LONG)["input_ids"]
        _, [without], _, _ = generation.generate([ids], None, 1)
        with trainer.model.disable_adapter(), torch.no_grad():
            logits = trainer.model(torch.tensor([ids])).logits[0, -1]
        assert without[0] == logits.argmax().item()
        generation.generation_kwargs = {"temperature": 0.0}
        _, [edited], _, _ = generation.generate([ids], None, 1)
        params = generation.llm.get_default_sampling_params()
        params.temperature, params.max_tokens = 0.0, 6
        prompt = {"prompt_token_ids": ids}
        assert generation.llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids == edited
        assert generation.llm.generate(prompt, [params], use_tqdm=False)[0].outputs[0].token_ids == edited
        output = generation.llm.chat([{"role": "user", "content": LONG}], params, use_tqdm=False)[0]
        with torch.no_grad():
            logits = trainer.model.eval()(torch.tensor([output.prompt_token_ids])).logits[0, -1]
        assert output.outputs[0].token_ids[0] == logits.argmax().item()
        with pytest.raises(ValueError, match="beam search"):
            generation.llm.beam_search([prompt], params)


@pytest.mark.slow
def test_the_page(folder, tmp_path, monkeypatch):
    """The block of docs/trainers.md runs as it stands there, but for the engine's arguments."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peft_reft.integrations.trl, "rollouts_in_vllm", partial(rollouts_in_vllm, **ENGINE))
    trainers = []

    class Trainer(GRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    page = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text(encoding="utf-8")
    block = page.partition("### Rollouts in vLLM")[2].partition("```py\n")[2].partition("```")[0]
    small = dict(bf16=False, use_cpu=True, report_to="none", max_completion_length=4)
    names = dict(
        GRPOConfig=partial(GRPOConfig, **small),
        GRPOTrainer=Trainer,
        model_id=folder,
        reward=alternating,
        prompts=Dataset.from_list(PLAIN * 2),
        config=config("f7+l7"),
    )
    try:
        exec(block, names)
        assert trainers[0].state.global_step == 2
    finally:
        shut_down(trainers[0])


def test_a_trainer_that_cannot_be_served_is_refused(folder, tokenizer, tmp_path):
    """When the trainer is made, before an engine starts."""
    peft_config = config("f7+l7", modules_to_save=["lm_head"])
    with (
        pytest.raises(ValueError, match=r"use_vllm=True: the adapter has modules_to_save=\['lm_head'\]"),
        make("GRPO", folder, tokenizer, peft_config, PLAIN, tmp_path),
    ):
        pass
