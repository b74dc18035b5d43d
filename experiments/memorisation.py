"""Memorisation: how many tokens can one edit of one token hold? (paper, appendix on memorisation)

    python experiments/memorisation.py                                        # LLaMA-7B, a GPU
    python experiments/memorisation.py --preset cpu --data FOLDER --model SMOLLM2_FOLDER

One rank-1 edit at one layer, at the last token of the prompt `ALIC#ID1->`, is trained until the model recites the
first n tokens of Alice in Wonderland, of the same tokens shuffled, or of random tokens. The score is the share of the
n tokens before the first mistake, generating greedily. FOLDER has alice/alice29.txt. Results are kept in
OUTPUT/results.json. The figure is OUTPUT/memorisation.png (extra `viz`).

SmolLM2-135M recites 64 tokens of Alice whole, 64 of shuffled Alice and 32 random ones, best at layers 10 and 18 of 30
(19 CPU minutes; docs/recipes.md has the heat map).
"""

import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from runs import Found, Results
from settings import Settings, read_arguments
from tables import publish, pyplot
from torch.optim import AdamW
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup, set_seed

from peft_reft import LoReftConfig

PROMPTS = {"Alice": "ALIC#ID1->", "Alice, shuffled": "SHUF#ID1->", "random": "RAND#ID1->"}


@dataclass(kw_only=True)
class MemorisationSettings(Settings):
    data: str = "."
    output: Path = Path("outputs/memorisation")
    texts: list[str] = field(default_factory=lambda: [*PROMPTS])
    layers: list[int]
    lengths: list[int]
    intervention: str
    steps: int
    learning_rate: float
    seed: int


PRESETS = {
    "paper": MemorisationSettings(
        model="huggyllama/llama-7b",
        layers=[0, 5, 10, 15, 20, 25, 31],
        lengths=[16, 32, 64, 128, 256, 512, 1024, 2048],
        intervention="consreft",
        steps=1000,
        learning_rate=4e-3,
        seed=42,
    ),
    "cpu": MemorisationSettings(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        layers=[2, 10, 18, 26],
        lengths=[8, 16, 32, 64],
        intervention="loreft",
        steps=120,
        learning_rate=4e-2,
        seed=42,
    ),
}


def tokens_of(text: str, length: int, tokenizer: Any, folder: Path, seed: int) -> list[int]:
    if text == "random":
        return random.Random(seed).choices(range(10, tokenizer.vocab_size), k=length)
    alice = (folder / "alice" / "alice29.txt").read_text(encoding="utf-8", errors="replace")
    start = alice.index("Alice was beginning")
    tokens = tokenizer(alice[start : start + 12 * length], add_special_tokens=False)["input_ids"][:length]
    if text == "Alice, shuffled":
        random.Random(seed).shuffle(tokens)
    return tokens


def recited(model: Any, prompt: torch.Tensor, answer: list[int]) -> float:
    """Share of the answer's tokens before the first that is wrong."""
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=len(answer),
        min_new_tokens=len(answer),
        do_sample=False,
    )
    right = [a == b for a, b in zip(out[0, prompt.shape[1] :].tolist(), answer)]
    return [*right, False].index(False) / len(answer)


def train(model: Any, prompt: torch.Tensor, answer: list[int], *, steps: int, learning_rate: float) -> int:
    """Train until greedy decoding gives the answer, for `steps` steps at most. Returns the number of steps."""
    ids = torch.cat([prompt, torch.tensor([answer], device=prompt.device)], 1)
    labels = ids.clone()
    labels[:, : prompt.shape[1]] = -100
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    for step in range(steps):
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        # Each token is the likeliest after those before it: greedy decoding will say the same.
        if out.logits[0, prompt.shape[1] - 1 : -1].argmax(-1).tolist() == answer:
            return step
        out.loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return steps


def figure(runs: list[dict[str, Any]], settings: MemorisationSettings) -> Any:
    share = {(run["text"], run["layer"], run["length"]): run["recited"] for run in runs}
    drawn, axes = pyplot().subplots(
        1,
        len(settings.texts),
        figsize=(3.2 * len(settings.texts), 3),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for text, axis in zip(settings.texts, axes[0]):
        grid = [[share[text, layer, n] for n in settings.lengths] for layer in settings.layers]
        axis.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                colour = "w" if value < 0.6 else "k"
                axis.text(x, y, f"{value:.0%}", ha="center", va="center", color=colour, fontsize=8)
        axis.set(title=text, xlabel="tokens")
        axis.set_xticks(range(len(settings.lengths)), settings.lengths)
        axis.set_yticks(range(len(settings.layers)), settings.layers)
    axes[0][0].set_ylabel("layer")
    return drawn


def memorise(base: Any, tokenizer: Any, settings: MemorisationSettings, text: str, layer: int, length: int) -> Found:
    """Train the edit of one layer to recite `length` tokens of a text."""
    set_seed(settings.seed)
    answer = tokens_of(text, length, tokenizer, Path(settings.data), settings.seed)
    prompt = torch.tensor([tokenizer(PROMPTS[text])["input_ids"]], device=base.device)  # (1, prompt)
    config = LoReftConfig(
        task_type="CAUSAL_LM", r=1, positions="l1", layers=[layer], intervention=settings.intervention
    )
    model = get_peft_model(base, config)
    steps = train(model, prompt, answer, steps=settings.steps, learning_rate=settings.learning_rate)
    share = recited(model.eval(), prompt, answer)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.unload()
    return {"recited": share, "steps_taken": steps, "parameters": parameters}


def main(argv: list[str] | None = None) -> None:
    settings = read_arguments(__doc__, PRESETS, argv)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    base = AutoModelForCausalLM.from_pretrained(settings.model)
    base = base.to("cuda" if torch.cuda.is_available() else "cpu")
    names = ("intervention", "steps", "learning_rate", "seed")
    results = Results(settings.output / "results.json", {name: getattr(settings, name) for name in names})
    cells = [(text, layer, n) for text in settings.texts for layer in settings.layers for n in settings.lengths]
    runs = []
    for text, layer, length in tqdm(cells):
        cell = {"text": text, "layer": layer, "length": length}
        measure = partial(memorise, base, tokenizer, settings, text=text, layer=layer, length=length)
        runs.append(results.once(cell, measure))
    publish("memorisation", settings, figure(runs, settings))
    for text in settings.texts:
        whole = [run["length"] for run in runs if run["text"] == text and run["recited"] == 1]
        print(f"{text}: the longest that some layer recites whole: {max(whole, default=0)} tokens")


if __name__ == "__main__":
    main()
