"""TRL's whole `GRPOTrainer` with tools: rollout and training edit the same tokens, calls and results in between."""

import pytest
import torch
from conftest import randomise
from datasets import Dataset
from transformers import LogitsProcessor, LogitsProcessorList
from trl import GRPOConfig, GRPOTrainer

from peft_reft import LoReftConfig

from .rollouts import CALLS, Recorded, lookup, qwen_base, qwen_like, word_of
from .training import WARNINGS, arguments

pytestmark = WARNINGS

CALL = '<tool_call>\n{"name": "lookup", "arguments": {"key": "%s"}}\n</tool_call><|im_end|>'


class Write(LogitsProcessor):
    """Make rows write the tokens given for them."""

    def __init__(self, texts, width):
        self.texts, self.width = texts, width

    def __call__(self, input_ids, scores):
        step, scores = input_ids.shape[1] - self.width, scores.clone()
        for row, text in enumerate(self.texts):
            if step < len(text):
                scores[row] = torch.full_like(scores[row], -torch.inf)
                scores[row, text[step]] = 0.0
        return scores


@pytest.mark.cell(
    "Trainers: preferences and reinforcement", "GRPO with tools: log-probs of rollout and training agree"
)
def test_rollouts_with_tools_edit_what_training_edits(tmp_path, monkeypatch):
    tokenizer = qwen_like()
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
        qwen_base(tokenizer),
        reward_funcs=lambda completions, **kwargs: [float(n % 2) for n in range(len(completions))],
        args=args,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        peft_config=LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f1+l2"),
        tools=[lookup],
    )
    randomise(trainer.model)
    result = tokenizer.convert_tokens_to_ids("<tool_response>")

    def what_to_write(ids):
        """Return the next call of this conversation; after the last call, a word."""
        word = word_of(tokenizer.decode(ids))
        done = int((ids == result).sum())
        text = CALL % CALLS[word][done] if done < len(CALLS[word]) else f"So {word}.<|im_end|>"
        return tokenizer(text)["input_ids"]

    def processor_for(ids, mask):
        texts = [what_to_write(row[real]) for row, real in zip(ids, mask.bool())]
        return dict(logits_processor=LogitsProcessorList([Write(texts, ids.shape[1])]))

    recorded = Recorded(monkeypatch, trainer, processor_for)
    trainer.train()
    documents = {tuple(document) for document, _ in recorded.documents}
    calls = {(*prompt, *written): (len(prompt), logps) for prompt, written, logps in recorded.calls}
    assert len(documents) == len(CALLS) and len(calls) == sum(len(each) + 1 for each in CALLS.values())
    assert recorded.compared >= len(calls)
    # The edits matter, and so do those before earlier answers: seen among hundreds of tokens, but small.
    document = max(calls, key=len)
    (start, logps), ids = calls[document], torch.tensor([document])
    assert trainer.model.peft_config["default"].response_template
    for elsewhere in ([-1], [0, start - 2, start - 1]):
        positions = torch.tensor([elsewhere])
        with torch.no_grad():
            logits = trainer.model.eval()(input_ids=ids, intervention_positions=positions).logits[0, start - 1 : -1]
        found = logits.log_softmax(-1).gather(-1, ids[0, start:, None]).squeeze(-1)
        assert (found - logps).abs().max() > 1e-4
