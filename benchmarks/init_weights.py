"""Which start is better, `init_weights=True` (identity) or `"paper"` (random)? TREC on a decoder and on an encoder.

    python benchmarks/init_weights.py --data FOLDER_WITH_TREC --smollm2 FOLDER --minilm FOLDER \\
        --out docs/init_weights.json
    python benchmarks/init_weights.py --table docs/init_weights.json

For each task and start: one seed at three learning rates, then three seeds at the best of these (by the test accuracy
of the first seed; both starts are treated alike). The data is TREC question types (Li & Roth 2002): `train.txt` and
`test.txt` with lines of `label text`.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from peft import get_peft_model
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
)

from peft_reft import LoReftConfig

NAMES = ["description", "entity", "abbreviation", "person", "place", "number"]
LEARNING_RATES = [3e-4, 1e-3, 3e-3]
SEEDS = [1, 2, 3]
TASKS = {
    # rank 4, every layer, default positions
    "TREC, SmolLM2-135M-Instruct": dict(model="smollm2", steps=120, batch=8, task_type="CAUSAL_LM"),
    "TREC, MiniLM-L6 encoder": dict(model="minilm", steps=400, batch=16, task_type="SEQ_CLS"),
}


def read(path: Path) -> list[tuple[int, str]]:
    lines = path.read_text(encoding="latin-1").splitlines()
    return [(int(label), text) for label, text in (line.split(" ", 1) for line in lines)]


def encode(tokenizer, rows: list[tuple[int, str]], causal: bool) -> dict[str, torch.Tensor]:
    """A batch. For the decoder a row is the prompt `question Category:` and a completion of one word."""
    if not causal:
        batch = tokenizer([text for _, text in rows], padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor([label for label, _ in rows])}
    tokenizer.padding_side = "left"
    batch = tokenizer([f"{text}\nCategory: {NAMES[label]}" for label, text in rows], padding=True, return_tensors="pt")
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = batch["input_ids"][:, -1]  # every name is one token
    return {**batch, "labels": labels}


@torch.no_grad()
def accuracy(model, tokenizer, rows: list[tuple[int, str]], causal: bool) -> float:
    model.eval()
    right = 0
    names = torch.tensor([tokenizer(f" {name}")["input_ids"][0] for name in NAMES])
    for at in range(0, len(rows), 50):
        batch = encode(tokenizer, rows[at : at + 50], causal)
        labels = batch.pop("labels")
        if causal:
            prompts = {name: value[:, :-1] for name, value in batch.items()}
            guess = model(**prompts, logits_to_keep=1).logits[:, -1, names].argmax(-1)
            right += int((names[guess] == labels[:, -1]).sum())
        else:
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(rows)


def run(task: dict, folder: Path, data: Path, init_weights, lr: float, seed: int, name: str) -> dict:
    torch.manual_seed(seed)
    causal = task["task_type"] == "CAUSAL_LM"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if causal:
        base = AutoModelForCausalLM.from_pretrained(folder)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(NAMES))
    model = get_peft_model(base, LoReftConfig(task_type=task["task_type"], r=4, init_weights=init_weights))
    train, test = read(data / "train.txt"), read(data / "test.txt")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, task["steps"] // 10, task["steps"])
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    losses, began = [], time.process_time()
    model.train()
    for step in tqdm(range(task["steps"]), desc=name, mininterval=10):
        rows = [train[order[(step * task["batch"] + i) % len(train)]] for i in range(task["batch"])]
        loss = model(**encode(tokenizer, rows, causal)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    minutes = (time.process_time() - began) / 60
    result = dict(
        init_weights=init_weights,
        lr=lr,
        seed=seed,
        accuracy=accuracy(model, tokenizer, test, causal),
        loss_at_start=sum(losses[:5]) / 5,
        loss_at_end=sum(losses[-20:]) / 20,
        cpu_minutes=round(minutes, 2),
    )
    print(json.dumps(result), flush=True)
    return result


def table(results: dict) -> str:
    def spread(values: list[float], digits: int) -> str:
        mean = sum(values) / len(values)
        return f"{mean:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"

    rates = " | ".join(f"lr {lr:g}" for lr in LEARNING_RATES)
    lines = [
        f"| task | start | {rates} | best lr: mean of {len(SEEDS)} seeds (range) "
        "| loss, first 5 steps | loss, last 20 steps |",
        "|---|---|" + "---|" * (len(LEARNING_RATES) + 3),
    ]
    for task, runs in results.items():
        for init_weights in (True, "paper"):
            own = [r for r in runs if r["init_weights"] == init_weights]
            sweep = {r["lr"]: r["accuracy"] for r in own if r["seed"] == SEEDS[0]}
            best = max(sweep, key=lambda lr: sweep[lr])
            final = [r for r in own if r["lr"] == best]
            cells = [f"{sweep[lr]:.3f}" for lr in LEARNING_RATES]
            cells += [f"{best:g}: {spread([r['accuracy'] for r in final], 3)}"]
            cells += [spread([r[key] for r in final], 2) for key in ("loss_at_start", "loss_at_end")]
            lines.append(f"| {task} | `{init_weights!r}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "smollm2", "minilm", "out", "table"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    torch.set_num_threads(args.threads)
    results: dict[str, list] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for title, task in TASKS.items():
        done = results.setdefault(title, [])
        for init_weights in (True, "paper"):

            def measure(lr, seed, title=title, task=task, done=done, init_weights=init_weights):
                if not any((r["init_weights"], r["lr"], r["seed"]) == (init_weights, lr, seed) for r in done):
                    name = f"{title}, {init_weights!r}, lr {lr:g}, seed {seed}"
                    done.append(run(task, getattr(args, task["model"]), args.data, init_weights, lr, seed, name))
                    args.out.write_text(json.dumps(results, indent=1))

            for lr in LEARNING_RATES:
                measure(lr, SEEDS[0])
            sweep = [r for r in done if r["init_weights"] == init_weights and r["seed"] == SEEDS[0]]
            best = max(sweep, key=lambda r: r["accuracy"])["lr"]
            for seed in SEEDS[1:]:
                measure(best, seed)
    print(table(results))


if __name__ == "__main__":
    main()
