"""TRL's whole `GRPOTrainer` with tools: rollout and training edit the same tokens, calls and results in between."""

from pathlib import Path

import pytest
import torch
import trl
from conftest import DIMENSIONS, randomise
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from peft_reft import LoReftConfig

from .training import arguments

pytestmark = pytest.mark.filterwarnings(
    # TRL 1.16's default
    "ignore:`gradient_checkpointing(_disable|_enable)?` is deprecated:FutureWarning"
)

ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
ADDED += ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
CALL = '<tool_call>\n{"name": "lookup", "arguments": {"key": "%s"}}\n</tool_call><|im_end|>'


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


def lookup(key: str) -> str:
    """
    Looks a word up.

    Args:
        key: The word.

    Returns:
        What is known of it.
    """
    return {"x": "red", "y": "a long blue line"}[key]


class Write(LogitsProcessor):
    """Make rows write the tokens given for them; None: what the model writes."""

    def __init__(self, texts, width):
        self.texts, self.width = texts, width

    def __call__(self, input_ids, scores):
        step, scores = input_ids.shape[1] - self.width, scores.clone()
        for row, text in enumerate(self.texts):
            if text is not None and step < len(text):
                scores[row] = torch.full_like(scores[row], -torch.inf)
                scores[row, text[step]] = 0.0
        return scores


CALLS = {"none": [], "one": ["x"], "two": ["y", "x"]}
"""What the model looks up, one after the other, by the user's word."""


@pytest.mark.cell(
    "Trainers: preferences and reinforcement", "GRPO with tools: log-probs of rollout and training agree"
)
def test_rollouts_with_tools_edit_what_training_edits(tmp_path, monkeypatch):
    tokenizer = qwen_like()
    torch.manual_seed(0)
    sizes = dict(DIMENSIONS, num_hidden_layers=2, num_key_value_heads=2, vocab_size=len(tokenizer))
    base = Qwen2ForCausalLM(Qwen2Config(**sizes))
    prompts = [{"prompt": [{"role": "user", "content": word}]} for word in CALLS]
    args = arguments(
        GRPOConfig,
        tmp_path,
        max_steps=1,
        learning_rate=0.0,
        per_device_train_batch_size=6,
        num_generations=2,
        max_completion_length=400,
    )
    trainer = GRPOTrainer(
        base,
        reward_funcs=lambda completions, **kwargs: [float(n % 2) for n in range(len(completions))],
        args=args,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        peft_config=LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f1+l2"),
        tools=[lookup],
    )
    randomise(trainer.model)
    sampled, scored = {}, {}
    generate, score = trainer.model.generate, trainer._get_per_token_logps_and_entropies
    result = tokenizer.convert_tokens_to_ids("<tool_response>")

    def what_to_write(ids):
        """Return the next call of this conversation; after the last call, a word."""
        word = next(word for word in CALLS if f"<|im_start|>user\n{word}<" in tokenizer.decode(ids))
        done = int((ids == result).sum())
        text = CALL % CALLS[word][done] if done < len(CALLS[word]) else f"So {word}.<|im_end|>"
        return tokenizer(text)["input_ids"]

    def spied_generate(*args, **kwargs):
        prompts = [ids[mask.bool()] for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"])]
        texts, width = [what_to_write(ids) for ids in prompts], kwargs["input_ids"].shape[1]
        kwargs |= dict(return_dict_in_generate=True, output_logits=True)
        out = generate(*args, logits_processor=LogitsProcessorList([Write(texts, width)]), **kwargs)
        logps = torch.stack(out.logits, 1).log_softmax(-1)  # before the processor
        for prompt, text, row in zip(prompts, texts, logps):
            chosen = torch.tensor(text).unsqueeze(-1)
            sampled[(*prompt.tolist(), *text)] = len(prompt), row[: len(text)].gather(-1, chosen).squeeze(-1)
        return out.sequences

    def spied_score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        found = score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        for ids, mask, row in zip(input_ids, attention_mask.bool(), found[0]):
            document = tuple(ids[mask].tolist())
            scored[document] = row[mask[-logits_to_keep:]].detach()  # of its last tokens
        return found

    monkeypatch.setattr(trainer.model, "generate", spied_generate)
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", spied_score)
    trainer.train()
    assert len(scored) == len(CALLS) and len(sampled) == sum(len(calls) + 1 for calls in CALLS.values())
    for document, (start, logps) in sampled.items():
        (whole,) = [each for each in scored if each[: len(document)] == document]
        trained = scored[whole]
        first = start - (len(whole) - len(trained))
        torch.testing.assert_close(trained[first : first + len(logps)], logps, rtol=0, atol=1e-5)
    # The edits matter, and so do those before earlier answers: seen among hundreds of tokens, but small.
    document = max(sampled, key=len)
    (start, logps), ids = sampled[document], torch.tensor([document])
    assert trainer.model.peft_config["default"].response_template
    for elsewhere in ([-1], [0, start - 2, start - 1]):
        positions = torch.tensor([elsewhere])
        with torch.no_grad():
            logits = trainer.model.eval()(input_ids=ids, intervention_positions=positions).logits[0, start - 1 : -1]
        found = logits.log_softmax(-1).gather(-1, ids[0, start:, None]).squeeze(-1)
        assert (found - logps).abs().max() > 1e-4
