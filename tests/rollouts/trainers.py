"""TRL's trainers on tiny models, with rollouts in a real engine of vLLM on the CPU (`make test-rollouts`)."""

import gc
from contextlib import contextmanager

import torch
import transformers
from conftest import randomise
from datasets import Dataset
from integration.training import arguments, assert_all_moved
from serving.engines import FAMILIES
from transformers import GenerationConfig
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

TRAINERS = {"GRPO": (GRPOTrainer, GRPOConfig), "RLOO": (RLOOTrainer, RLOOConfig)}
ENGINE = dict(enforce_eager=True, block_size=32, disable_log_stats=True)
"""For tests: no compilation, and blocks so short that prompts fill some."""

LONG = " ".join("abcdefghijklmnopqrstuvwxyz"[n % 26] for n in range(0, 240, 3))
WORDS = ["a b c d e f", "j u", LONG, "k l m n o p q r s"]
"""Prompts of 6, 2, 80 and 9 tokens: ragged, one shorter than specs ask for, one of more than two blocks."""
PLAIN = [{"prompt": text} for text in WORDS]
ASKED = [[{"role": "user", "content": text}] for text in WORDS]
HISTORY = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "1 2 3"}]
CHATS = [{"prompt": [*(HISTORY if n % 2 else []), *asked]} for n, asked in enumerate(ASKED)]
"""Every second one has an answered turn before."""


def save_model(folder, tokenizer, ends, family="qwen2", **more):
    """Save a tiny random model with its tokenizer.

    Args:
        folder: where.
        tokenizer: its tokenizer.
        ends: the tokens that end an answer.
        family: of the model.
        more: sizes of the model.
    """
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**sizes, "vocab_size": len(tokenizer), **more})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():  # a freshly initialised model of this size says the same token to every prompt
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def writer(what_to_write):
    """A logits processor of vLLM that makes each request write the tokens which a function gives for its prompt."""

    class Write(AdapterLogitsProcessor):
        def is_argmax_invariant(self):
            return False

        def new_req_logits_processor(self, params):
            return write

    def write(prompt_ids, output_ids, logits):
        token = what_to_write(prompt_ids)[len(output_ids)]
        logits.fill_(-torch.inf)
        logits[token] = 0.0
        return logits

    return Write


def alternating(completions, **kwargs):
    """Reward every second answer, so that each group has a better and a worse one."""
    return [float(n % 2) for n in range(len(completions))]


@contextmanager
def make(which, folder, tokenizer, peft_config, rows, tmp_path, model=None, edits=True, **settings):
    """A trainer with its engine, whose adapter begins with large random edits. A process can have one at a time."""
    trainer_class, config_class = TRAINERS[which]
    more = {name: settings.pop(name) for name in ("tools", "rollout_func") if name in settings}
    usual = dict(use_vllm=True, vllm_mode="colocate", num_generations=2, max_completion_length=6, beta=0.1)
    args = arguments(config_class, tmp_path, **{**usual, **settings})
    trainer = trainer_class(
        folder if model is None else model,
        reward_funcs=alternating,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
        **more,
    )
    if edits:
        randomise(trainer.model)
    try:
        yield trainer
    finally:
        shut_down(trainer)


def shut_down(trainer):
    """End the engine of a trainer, if it is in this process."""
    if trainer.args.vllm_mode == "colocate":
        trainer.vllm_generation.llm.llm_engine.engine_core.shutdown()
    del trainer.vllm_generation
    gc.collect()


class Watch:
    """Compares, at each step, the log-probabilities of the rollout with those that the trainer computes.

    All are lists with one number for each scored answer: the largest difference of a token.
    """

    def __init__(self, trainer, monkeypatch):
        self.trainer = trainer
        self.different, self.from_base, self.from_last = [], [], []
        self.lengths = set()
        self.sampled = {}
        self.last, self.now = None, None
        generation, score = trainer.vllm_generation, trainer._get_per_token_logps_and_entropies
        generation.logprobs = 0  # RLOO asks for none
        generate = generation.generate

        def spied_generate(prompts, images, num_generations, profiler=None):
            _, completion_ids, logps, ids = found = generate(prompts, images, num_generations, profiler)
            if not self._goes_on(prompts):
                self.sampled.clear()
                self.last, self.now = self.now, self._weights()
            for prompt, answer, row, chosen in zip(prompts, completion_ids, logps, ids):
                assert [each[0] for each in chosen] == list(answer)
                self.sampled[(*prompt, *answer)] = len(prompt), torch.tensor([each[0] for each in row])
            return found

        def spied_score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
            result = score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
            if not torch.is_grad_enabled():
                again = (model, input_ids, attention_mask, logits_to_keep, *args)
                layer = next(m for m in trainer.model.modules() if type(m).__name__ == "LoReftLayer")
                if layer.disable_adapters:
                    self.from_base += self._compare(input_ids, attention_mask, result[0])
                else:
                    self.different += self._compare(input_ids, attention_mask, result[0])
                    if self.last is not None:
                        self._set(self.last)
                        before = score(*again, **kwargs)[0]
                        self._set(self.now)
                        self.from_last += self._compare(input_ids, attention_mask, before)
            return result

        monkeypatch.setattr(generation, "generate", spied_generate)
        monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", spied_score)

    def _goes_on(self, prompts):
        """Whether these prompts go on with what was generated before."""
        sizes = {len(document) for document in self.sampled}
        return all(any(tuple(prompt[:size]) in self.sampled for size in sizes) for prompt in prompts)

    def _weights(self):
        return {name: p.detach().clone() for name, p in self.trainer.model.named_parameters() if "loreft" in name}

    @torch.no_grad()
    def _set(self, weights):
        for name, parameter in self.trainer.model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])

    def _compare(self, input_ids, attention_mask, scored):
        """The largest difference in each answer that was sampled."""
        found = []
        for ids, mask, row in zip(input_ids, attention_mask.bool(), scored):
            document = tuple(ids[mask].tolist())
            first = len(ids) - row.shape[0]  # the column of the first scored token
            columns = mask.nonzero().squeeze(-1).tolist()
            for sampled, (start, logps) in self.sampled.items():
                if document[: len(sampled)] == sampled:
                    places = [columns[n] - first for n in range(start, start + len(logps))]
                    found.append((row[places] - logps).abs().max().item())
                    self.lengths.add(len(logps))
        return found


def check_updates(trainer, way, close, monkeypatch):
    """After each of three updates log-probabilities agree; those of the base and of the last policy are far off.

    Args:
        trainer: with `max_steps=3`.
        way: the class that sends its adapter.
        close: how far log-probabilities of rollout and training may differ.
        monkeypatch: pytest's.
    """
    watch = Watch(trainer, monkeypatch)
    assert_all_moved(trainer.model, trainer.train)
    assert len(watch.different) >= 3 * 4 and len(watch.lengths) > 1  # ragged answers, too
    assert max(watch.different) < close
    assert min(watch.from_base) > 1e-2
    assert len(watch.from_last) >= 2 * 4 and min(watch.from_last) > 1e-2
    # Without the sending all this would fail: now the engine has the policy of the step before.
    monkeypatch.setattr(way, "send", lambda *args: None)
    watch.different.clear()
    trainer.train()
    assert max(watch.different) > 1e-2
