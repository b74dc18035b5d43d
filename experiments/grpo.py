"""Reinforcement learning: GRPO on sums of two digits. Python checks the answers; no solution is shown.

    python experiments/grpo.py --preset cpu --model SMOLLM2_FOLDER
    python experiments/grpo.py --preset smoke --model SMOLLM2_FOLDER    # two steps of each method

The trainer is TRL's `GRPOTrainer`, unchanged. An answer is worth 1 if it begins with the right number, else 0. The
model starts low because it answers in sentences. Each method has three learning rates. The mean reward of the last
steps of training chooses one, with which every seed is run. `test` is the mean reward of answers to sums that are not
trained on, sampled as in training; `error` is its standard error over seeds. `sent_bytes` is what one synchronisation
with a vLLM engine sends. Results are kept in OUTPUT/results.json, and a run that is there is not run again.

SmolLM2-135M, 12 steps of 4 sums with 4 answers each, seed 42: the base 0.163, LoReFT 0.975, while decoding too 0.725,
a bias everywhere 0.838, LoRA of rank 1 0.950, of rank 8 0.938; about 1.6 CPU minutes a run.
"""

import math
import random
import re
import statistics
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from runs import Found, Results, Run, compare
from settings import Settings, read_arguments
from tables import publish, pyplot, show
from torch import nn
from training import trainable
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import GRPOConfig, GRPOTrainer

from peft_reft import LoReftConfig

LOREFT: dict[str, dict[str, Any]] = {
    "loreft": dict(r=8, positions="f7+l7"),
    "loreft, decoding too": dict(r=8, positions="l7+g"),
    "loreft, bias everywhere": dict(intervention="bias", positions="all"),
}
"""Fields of `LoReftConfig`."""
LORA: dict[str, dict[str, Any]] = {
    "lora, r=1": dict(r=1, lora_alpha=2, target_modules="all-linear"),
    "lora, r=8": dict(r=8, lora_alpha=16, target_modules="all-linear"),
}
"""Fields of `LoraConfig`."""
LAST = 5
"""Steps whose mean reward chooses the learning rate, and that a point of the figure is the mean of."""


@dataclass(kw_only=True)
class GrpoSettings(Settings):
    output: Path = Path("outputs/grpo")
    methods: list[str]
    learning_rates: list[float]
    seeds: list[int]
    steps: int
    prompts: int
    """Sums in a step."""
    generations: int
    """Answers to each sum: a group, whose rewards are compared."""
    new_tokens: int
    """Tokens of an answer, at most."""
    held: int
    """Sums that are not trained on, of 100."""


CPU = GrpoSettings(
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    methods=[*LOREFT, *LORA],
    learning_rates=[3e-4, 1e-3, 3e-3],
    seeds=[42, 43, 44],
    steps=12,
    prompts=4,
    generations=4,
    new_tokens=4,
    held=20,
)
PRESETS = {
    "cpu": CPU,
    "smoke": replace(CPU, learning_rates=[1e-3], seeds=[42], steps=2, prompts=2, held=4),
}


def sums() -> list[dict[str, str]]:
    """All sums of two digits in an order that is the same for all runs: prompts and answers."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    random.Random(0).shuffle(pairs)
    return [{"prompt": f"Question: What is {a} + {b}?\nAnswer:", "answer": str(a + b)} for a, b in pairs]


def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 for a completion that begins with the right number, else 0."""
    return [float(re.findall(r"^\s*(\d+)", text) == [wanted]) for text, wanted in zip(completions, answer)]


def trainer_of(settings: GrpoSettings, run: Run) -> GRPOTrainer:
    """TRL's trainer, with the adapter of the run's method."""
    config: PeftConfig
    if run.method in LOREFT:
        config = LoReftConfig(task_type="CAUSAL_LM", **LOREFT[run.method])
    else:
        config = LoraConfig(task_type="CAUSAL_LM", **LORA[run.method])
    set_seed(run.seed)  # the adapter's weights start from it
    arguments = GRPOConfig(
        output_dir=str(settings.output / run.folder(settings.steps)),
        seed=run.seed,
        learning_rate=run.learning_rate,
        lr_scheduler_type="constant",
        max_steps=settings.steps,
        per_device_train_batch_size=settings.prompts * settings.generations,
        num_generations=settings.generations,
        max_completion_length=settings.new_tokens,
        gradient_checkpointing=False,  # the rows are short
        model_init_kwargs={"dtype": "float32"},
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    rows = Dataset.from_list(sums()[settings.held :])
    return GRPOTrainer(settings.model, reward_funcs=reward, args=arguments, train_dataset=rows, peft_config=config)


@torch.no_grad()
def score(model: Any, tokenizer: Any, settings: GrpoSettings) -> float:
    """The mean reward of answers to the held-out sums, sampled as in training."""
    rows = [row for row in sums()[: settings.held] for _ in range(settings.generations)]
    model.eval()
    inputs = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True, padding_side="left")
    inputs.pop("token_type_ids", None)
    out = model.generate(
        **inputs.to(model.device), max_new_tokens=settings.new_tokens, do_sample=True, temperature=1.0, top_k=0
    )
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return statistics.mean(reward(texts, [row["answer"] for row in rows]))


def adapter_bytes(model: PeftModel) -> int:
    """Bytes of the adapter as a safetensors file."""
    return len(safetensors.torch.save(get_peft_model_state_dict(model)))


def sent_bytes(model: PeftModel) -> int:
    """Bytes of a synchronisation: LoReFT's adapter. For LoRA TRL merges and sends every parameter of the base."""
    if isinstance(model.peft_config["default"], LoReftConfig):
        return adapter_bytes(model)
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if model.prefix not in name)


def measure(settings: GrpoSettings, run: Run) -> Found:
    """Train one adapter: its rewards by step, and on held-out sums. "base" is the model as it is."""
    if run.method == "base":
        base: nn.Module = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
        set_seed(run.seed)
        found = score(base, AutoTokenizer.from_pretrained(settings.model), settings)
        return {"dev": found, "test": found, "parameters": 0}
    trainer = trainer_of(settings, run)
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    set_seed(run.seed)
    return {
        "dev": statistics.mean(rewards[-LAST:]),
        "test": score(trainer.model, trainer.processing_class, settings),
        "rewards": rewards,
        "parameters": trainable(trainer.model),
        "adapter_bytes": adapter_bytes(trainer.model),
        "sent_bytes": sent_bytes(trainer.model),
    }


def runs_of(results: Results, row: dict[str, Any], seeds: list[int]) -> list[dict[str, Any]]:
    """The runs that a row of the table is the mean of."""
    found = []
    for seed in seeds:
        wanted = Run(method=row["method"], learning_rate=row["learning_rate"], seed=seed).settings() | results.common
        found += [run for run in results.runs if all(run.get(name) == value for name, value in wanted.items())]
    return found


def smooth(rewards: list[float]) -> list[float]:
    """For each step the mean of it and those before it, `LAST` at most."""
    return [statistics.mean(rewards[max(0, n - LAST) : n]) for n in range(1, len(rewards) + 1)]


def figure(table: list[dict[str, Any]], curves: list[list[list[float]]]) -> Any:
    """Draw the reward by step (mean over seeds; band: lowest to highest) and the reward on held-out sums."""
    drawn, (left, right) = pyplot().subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for y, (row, of_seeds) in enumerate(zip(table, curves, strict=True)):
        right.errorbar(row["test"], y, xerr=row["error"], fmt="o", color=f"C{y}", capsize=4)
        if not of_seeds:  # the base
            left.axhline(row["test"], color=f"C{y}", ls=":", label=row["method"])
            continue
        steps = range(1, len(of_seeds[0]) + 1)
        by_step = [*zip(*of_seeds, strict=True)]
        left.plot(steps, [statistics.mean(step) for step in by_step], color=f"C{y}", label=row["method"])
        left.fill_between(steps, [*map(min, by_step)], [*map(max, by_step)], color=f"C{y}", alpha=0.12, lw=0)
    left.set(xlabel="step", ylabel=f"reward, mean of {LAST} steps", ylim=(0, 1))
    left.legend(fontsize=8, framealpha=0.6)
    right.set(xlabel="reward on held-out sums", xlim=(0, 1), ylim=(len(table) - 0.5, -0.5))
    right.set_yticks(range(len(table)), [f"{row['method']}\n{row['parameters']:,}" for row in table])
    right.grid(axis="x", alpha=0.3)
    return drawn


def main(argv: list[str] | None = None) -> None:
    settings = read_arguments(__doc__, PRESETS, argv)
    torch.set_num_threads(1)
    names = ("steps", "prompts", "generations", "new_tokens", "held")
    results = Results(settings.output / "results.json", {name: getattr(settings, name) for name in names})
    run = partial(measure, settings)
    table = compare(results, run, methods=["base"], learning_rates=[0.0], seeds=settings.seeds)
    table += compare(
        results, run, methods=settings.methods, learning_rates=settings.learning_rates, seeds=settings.seeds
    )
    curves = []
    for row in table:
        found = runs_of(results, row, settings.seeds)
        curves.append([smooth(run["rewards"]) for run in found if "rewards" in run])
        scores = [run["test"] for run in found]
        row["error"] = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
        row["sent_bytes"] = found[0].get("sent_bytes", 0)
    show(table, ["method", "parameters", "learning_rate", "test", "error", "sent_bytes", "cpu_minutes"])
    publish("grpo", settings, figure(table, curves))


if __name__ == "__main__":
    main()
