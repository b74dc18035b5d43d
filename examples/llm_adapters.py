"""The format of LLM-Adapters (arXiv 2304.01933) that the paper trains and evaluates on; what two recipes share.

A clone of https://github.com/AGI-Edgerunners/LLM-Adapters has ft-training_set/NAME.json and dataset/NAME/test.json,
lists of `instruction`, `input`, `output` and `answer`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from recipe import train, trainable
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from peft_reft import LoreftConfig

Example = dict[str, str]  # prompt, completion, answer


def read(folder: Path, training: str | None = None, test: str | None = None) -> list[Example]:
    """Rows of a training set or a test set of the clone in `folder`."""
    path = (
        folder / "ft-training_set" / f"{training}.json" if training else folder / "dataset" / str(test) / "test.json"
    )
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [{"prompt": row["instruction"], "completion": row["output"], "answer": str(row["answer"])} for row in rows]


def encode(tokenizer: Any, rows: list[Example], template: str, max_length: int) -> list[dict[str, list[int]]]:
    """Tokens of prompt and completion; the prompt's have no label. Too long ones lose the end of the completion."""
    found = []
    for row in rows:
        prompt = tokenizer(template.format(row["prompt"]))["input_ids"]
        rest = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(prompt) < max_length:
            ids = (prompt + rest)[:max_length]
            found.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    return found


@torch.no_grad()
def accuracy(
    model: Any,
    tokenizer: Any,
    rows: list[Example],
    template: str,
    extract: Callable[[str], str | None],
    batch: int,
    **generation: Any,
) -> float:
    """Share of rows of whose generated text `extract` finds the answer."""
    tokenizer.padding_side = "left"
    right = 0
    for start in tqdm(range(0, len(rows), batch), desc="answering", leave=False):
        part = rows[start : start + batch]
        inputs = tokenizer([template.format(row["prompt"]) for row in part], return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        out = model.generate(**inputs.to(model.device), **generation)
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(extract(text) == row["answer"] for text, row in zip(texts, part))
    tokenizer.padding_side = "right"
    return right / len(rows)


def runner(
    args: Any,
    methods: dict[str, dict[str, Any]],
    rows: list[Example],
    tests: dict[str, list[Example]],
    template: str,
    extract: Callable[[str], str | None],
) -> Callable[..., dict[str, Any]]:
    """What trains a model with one method and scores it on every test set; `dev` is the loss on held-out rows."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    collate = DataCollatorForSeq2Seq(tokenizer)
    held = max(8, min(300, len(rows) // 20))
    encoded = encode(tokenizer, rows[held:], template, args.max_length)
    dev = encode(tokenizer, rows[:held], template, args.max_length)

    @torch.no_grad()
    def loss(model: Any) -> float:
        losses = []
        for start in range(0, len(dev), args.batch):
            batch = collate(dev[start : start + args.batch])
            losses.append(model(**{k: v.to(model.device) for k, v in batch.items()}).loss.item())
        return sum(losses) / len(losses)

    def run(method: str, learning_rate: float, seed: int) -> dict[str, Any]:
        base = AutoModelForCausalLM.from_pretrained(args.model)
        fields = methods[method]
        config = (LoraConfig if method.startswith("lora") else LoreftConfig)(task_type="CAUSAL_LM", **fields)
        model = get_peft_model(base.to("cuda" if torch.cuda.is_available() else "cpu"), config)
        settings = dict(max_steps=args.steps, num_train_epochs=args.epochs, per_device_train_batch_size=args.batch)
        train(model, encoded, collate, args.output, seed, learning_rate=learning_rate, **settings)
        scores = {
            name: accuracy(
                model,
                tokenizer,
                test,
                template,
                extract,
                args.eval_batch,
                max_new_tokens=args.new_tokens,
                do_sample=False,
            )
            for name, test in tests.items()
        }
        mean = sum(scores.values()) / len(scores)
        return {"dev": -loss(model), "test": mean, "scores": scores, "parameters": trainable(model)}

    return run
