"""What tests of reinforcement learning share: a tokenizer with tools, and a record of rollouts and their scores."""

from pathlib import Path

import torch
import trl
from conftest import DIMENSIONS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
ADDED += ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]


def qwen_like():
    """Make a tokenizer with one token a byte and the special tokens of Qwen's template, in the form that TRL knows."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        ["a"], trainers.BpeTrainer(special_tokens=ADDED, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    folder = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (folder / "qwen3.jinja").read_text(encoding="utf-8")
    return tokenizer


def qwen_base(tokenizer):
    """Make a tiny model for that tokenizer."""
    torch.manual_seed(0)
    sizes = dict(DIMENSIONS, num_hidden_layers=2, num_key_value_heads=2, vocab_size=len(tokenizer))
    return Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()


def lookup(key: str) -> str:
    """
    Looks a word up.

    Args:
        key: The word.

    Returns:
        What is known of it.
    """
    return {"x": "red", "y": "a long blue line"}[key]


CALLS = {"none": [], "one": ["x"], "two": ["y", "x"]}
"""What the model looks up, one after the other, by the user's word."""


def word_of(text):
    """Return the user's word in a conversation."""
    return next(word for word in CALLS if f"<|im_start|>user\n{word}" in text)


def edits_disabled(model):
    """Whether the adapters of a model are turned off, as for the reference."""
    return next(m for m in model.modules() if type(m).__name__ == "LoReftLayer").disable_adapters


class Recorded:
    """The rollouts of a trainer, compared with the log-probs that its forwards give to the same tokens.

    `calls` lists what the rollouts of the last step were given and wrote: (tokens of the prompt, tokens written,
    log-probs of these). `documents` lists its rows that were scored with the adapter, `reference` those that were
    scored without it, each with its log-probs. `compared` counts the comparisons of all steps.
    """

    def __init__(self, monkeypatch, trainer, processor_for=None, tolerance=1e-5):
        self.calls, self.documents, self.reference, self.compared = [], [], [], 0
        self.trainer, self.processor_for, self.tolerance = trainer, processor_for, tolerance
        self._new_step = True
        self._generate, self._score = trainer.model.generate, trainer._get_per_token_logps_and_entropies
        monkeypatch.setattr(trainer.model, "generate", self._spied_generate)
        monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", self._spied_score)
        if trainer.args.use_transformers_continuous_batching:
            self._generate_batch = trainer.model.generate_batch
            monkeypatch.setattr(trainer.model, "generate_batch", self._spied_generate_batch, raising=False)

    def _begin(self):
        if self._new_step:
            self.calls, self.documents, self.reference, self._new_step = [], [], [], False

    def _spied_generate(self, *args, **kwargs):
        self._begin()
        if self.processor_for is not None:
            kwargs |= self.processor_for(kwargs["input_ids"], kwargs["attention_mask"])
        out = self._generate(*args, return_dict_in_generate=True, output_logits=True, **kwargs)
        logps = torch.stack(out.logits, 1).log_softmax(-1)  # of what the model says, before any processor
        written = out.sequences[:, -logps.shape[1] :]
        logps = logps.gather(-1, written.unsqueeze(-1)).squeeze(-1)
        for ids, mask, tokens, row in zip(kwargs["input_ids"], kwargs["attention_mask"], written.tolist(), logps):
            ends = [n for n, token in enumerate(tokens) if token in self.trainer.eos_token_ids]
            length = ends[0] + 1 if ends else len(tokens)
            self.calls.append((ids[mask.bool()].tolist(), tokens[:length], row[:length]))
        return out.sequences

    def _spied_generate_batch(self, *args, **kwargs):
        self._begin()
        outputs = self._generate_batch(*args, **kwargs)
        for output in outputs.values():
            self.calls.append((list(output.prompt_ids), output.generated_tokens, torch.tensor(output.logprobs)))
        return outputs

    def calls_of(self, document):
        """Return the calls that wrote a row, in order."""
        found = {}
        for prompt, written, logps in self.calls:
            length = len(prompt)
            cut = document[length : length + len(written)]  # TRL may have cut the last one
            if len(document) > length and document[:length] == prompt and cut == written[: len(cut)]:
                found[length] = cut, logps[: len(cut)]
        return [(length, *found[length]) for length in sorted(found)]

    def _spied_score(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        result = self._score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        disabled, self._new_step = edits_disabled(model), True
        for ids, mask, row in zip(input_ids, attention_mask.bool(), result[0]):
            document, scored = ids[mask].tolist(), row[mask[-logits_to_keep:]].detach()  # of its last tokens
            (self.reference if disabled else self.documents).append((document, scored))
            if disabled or not len(scored):  # TRL masked the whole answer
                continue
            before = len(document) - len(scored)
            found = self.calls_of(document)
            assert found and found[0][0] == before, "a row that no rollout wrote"
            for length, written, logps in found:
                part = scored[length - before : length - before + len(written)]
                torch.testing.assert_close(part, logps, rtol=0, atol=self.tolerance)
                self.compared += 1
        return result

    def ends(self, document):
        """Return where the prompts of a row ended: the lengths of what its rollouts were given."""
        return [length for length, *_ in self.calls_of(document)]
