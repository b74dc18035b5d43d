"""Does one learning rate hold? Encoders and decoders, ranks 1 to 32, short and long training.

    python experiments/rates.py --data FOLDER --minilm FOLDER --model SMOLLM2_FOLDER

The task is TREC, questions of six types: an encoder gets a new head, a decoder writes a word behind the question. One
setting has sums told in words instead, which a decoder works out in a line. Each adapter is trained with AdamW alone
("adamw") and with the rates of `create_loreft_optimizer` ("fitted"), beside LoRA. Every setting is trained with every
rate and one seed; then with three seeds at the best rate and at RECOMMENDED. A setting holds if the score at
RECOMMENDED is within one standard error of the best: that of the difference over seeds, and of the score over the test
questions. Results are kept in OUTPUT/results.json, and a run that is there is not run again.
"""

import math
import statistics
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import gains
import glue
import widths
from glue import GlueTask
from methods import METHODS
from prompts import read
from runs import Found, OutOfTime, Results, Run
from settings import Settings, read_arguments
from tables import markdown, publish, show
from tasks import DecoderTask, TaskSettings

RECOMMENDED = 1e-3


@dataclass(kw_only=True)
class RatesSettings(Settings):
    output: Path = Path("outputs/rates")
    data: str = "."
    minilm: str = "sentence-transformers/all-MiniLM-L6-v2"
    mpnet: str = "sentence-transformers/all-mpnet-base-v2"
    gemma: str = "google/gemma-3-270m"
    learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3, 1e-2])
    seeds: list[int] = field(default_factory=lambda: [42, 43, 44])
    only: str = ""
    """Settings whose names have this word; all by default."""
    minutes: float = math.inf
    """After so long no run begins. A setting that is not done is not shown."""


PRESETS = {"cpu": RatesSettings(model="HuggingFaceTB/SmolLM2-135M-Instruct")}


WAYS = ("loreft fitted", "loreft adamw", "lora")
ONE_RATE, BY_THE_RULE = WAYS[:2], WAYS[:1]
ENCODERS = ("MiniLM", "MPNet")
OTHERS = ("MiniLM", "MPNet", "Gemma")
"""Models whose folders have a setting of their own; `model` is SmolLM2's."""


@dataclass(frozen=True)
class Setting:
    """Some rows of the table."""

    model: Literal["MiniLM", "MPNet", "SmolLM2", "Gemma"]
    r: int
    steps: int
    ways: tuple[str, ...]
    sums: bool = False
    """Whether the task is sums in words; else it is TREC."""

    @property
    def name(self) -> str:
        return f"{self.model}, r={self.r}, {self.steps} steps" + (" of sums" if self.sums else "")


SETTINGS = [
    Setting("MiniLM", 1, 80, ONE_RATE),
    Setting("MiniLM", 8, 80, WAYS),
    Setting("MiniLM", 32, 80, ONE_RATE),
    Setting("MiniLM", 8, 400, BY_THE_RULE),
    Setting("MPNet", 8, 80, WAYS),
    Setting("SmolLM2", 8, 80, BY_THE_RULE),  # which gives it 0.98 times the rate: both ways are one
    Setting("SmolLM2", 1, 80, ONE_RATE),
    Setting("SmolLM2", 32, 80, ONE_RATE),
    Setting("SmolLM2", 8, 240, BY_THE_RULE),
    Setting("SmolLM2", 8, 60, BY_THE_RULE, sums=True),
    Setting("Gemma", 8, 80, BY_THE_RULE),
]


PAGE = """# One learning rate

`create_loreft_optimizer(model, lr=1e-3)` gives each parameter a rate of its own, by a rule ([API](api.md)). This page
shows why, and how far it holds.

## The rule

Adam moves each number by about its rate in a step. W has d numbers for each of r coordinates, so ‖Wh‖ grows with
sqrt(r · d), and the edits of n layers add up. The rule divides the rate by n and by sqrt(r · d).

The head of a classifier is new and begins at small random numbers. With one rate for all it learns too late, under
LoRA as under LoReFT. The rule gives it ten times the rate.

Most decoders read a hidden state h through a norm, which gives out w ∘ h / |h| with weights w. If h is nearly all in
a few dimensions and w is small there, an edit, which lies in all dimensions, counts for more behind the norm than
before it. In Gemma 3 it does, in SmolLM2 it does not. One forward on 32 tokens, spread over the vocabulary, measures
this gain at each block; text gives nearly the same. If a gain is more than 2, the rule divides the rate by half of it.

{gains}

## Measured

TREC, six types of questions: 500 test questions for an encoder, 300 held-out ones for a decoder; "of sums", two-step
sums told in words, 398 held-out ones, right if greedy decoding writes the whole answer. "fitted" has the rule, "adamw"
one rate for all. Columns of rates have one seed. "holds" says whether the mean of {seeds} seeds at 1e-3 is within one
standard error of the mean at the best rate.

{table}

Gemma 3 is the one model here whose gains count, so "half of a gain" is fitted to it, and its seeds lie far apart.
[What it is worth](worth.md#trec-gemma) has another training of it, beside LoRA.

## Stable at other widths

Llama of random weights, one batch, 20 steps at 1e-3. "step" is |h' − h| / |h| of the last hidden state after the first
step. With one rate for all, the largest step is eleven times the smallest; with the rule, twice. No training went up
("highest loss", of the first).

A fitted step falls with n, because the edits of random layers add up as sqrt(n). That trained layers add up as n is
shown by the table above alone: one rate holds for 6 layers and for 30.

{widths}

Commands:

    python experiments/widths.py --docs docs
    python experiments/gains.py --data FOLDER --model SMOLLM2_FOLDER \\
        --gemma GEMMA_FOLDER --docs docs
    python experiments/rates.py --data FOLDER --minilm MINILM_FOLDER \\
        --mpnet MPNET_FOLDER --model SMOLLM2_FOLDER \\
        --gemma GEMMA_FOLDER --docs docs

The runs are in [results/rates.json](results/rates.json), [results/widths.json](results/widths.json) and
[results/gains.json](results/gains.json).
"""


def measure(settings: RatesSettings, setting: Setting, way: str, rate: float, seed: int) -> Found:
    """Train one model and score it: `test`, the accuracy."""
    folders = {"SmolLM2": settings.model, **{name: getattr(settings, name.lower()) for name in OTHERS}}
    model, loreft = folders[setting.model], dict(r=setting.r, positions="f7+l7")
    output = settings.output / setting.name / way  # its checkpoints are no other run's
    if setting.model in ENCODERS:
        of_task = dict(model=model, data=settings.data, output=output, steps=setting.steps)
        task = GlueTask(replace(glue.PRESETS["cpu"], **of_task), "trec")
        task.fitted = way == "loreft fitted"
        found = task.measure(Run(method=way.split()[0], learning_rate=rate, seed=seed, loreft=loreft))
        score = (found["dev"] * len(task.dev) + found["test"] * len(task.test)) / (len(task.dev) + len(task.test))
        return {"test": score, "rows": len(task.dev) + len(task.test), "parameters": found["parameters"]}
    rows, data = 398 if setting.sums else 300, Path(settings.data)
    scored = DecoderTask(
        TaskSettings(model=model, output=output, dev=2, test=rows, eval_batch=25),
        replace(read("sums" if setting.sums else "trec, no examples", data), steps=setting.steps),
        {"loreft fitted": loreft, "loreft adamw": loreft, "lora": METHODS["lora"]},
    )
    found = scored.measure(dict(method=way, learning_rate=rate, seed=seed, steps=setting.steps))
    return {"test": found["accuracy"], "rows": rows, "parameters": found["parameters"]}


def row_of(settings: RatesSettings, results: Results, setting: Setting, way: str) -> dict[str, Any]:
    """A row of the table: every rate's score, the best rate, and whether RECOMMENDED holds."""

    def run(rate: float, seed: int) -> dict[str, Any]:
        fields = dict(setting=setting.name, way=way, learning_rate=rate, seed=seed)
        return results.once(fields, lambda: measure(settings, setting, way, rate, seed))

    swept = [run(rate, settings.seeds[0]) for rate in settings.learning_rates]
    best = max(swept, key=lambda found: found["test"])["learning_rate"]
    of_best = [run(best, seed)["test"] for seed in settings.seeds]
    recommended = [run(RECOMMENDED, seed)["test"] for seed in settings.seeds]
    p, rows = statistics.mean(of_best), swept[0]["rows"]
    differences = [ours - theirs for ours, theirs in zip(recommended, of_best)]
    error = math.sqrt(p * (1 - p) / rows + statistics.variance(differences) / len(differences))
    return {
        "setting": setting.name,
        "way": way,
        "parameters": swept[0]["parameters"],
        **{f"{found['learning_rate']:g}": found["test"] for found in swept},
        "best rate": f"{best:g}",
        "at best": p,
        "at recommended": statistics.mean(recommended),
        "its seeds": f"{min(recommended):.3f} to {max(recommended):.3f}",
        "error": error,
        "holds": "yes" if statistics.mean(differences) >= -error else "no",
        "seeds": len(settings.seeds),
        "cpu_minutes": sum(
            each["cpu_minutes"] for each in results.runs if each["setting"] == setting.name and each["way"] == way
        ),
    }


def page(table: list[dict[str, Any]], settings: RatesSettings, docs: Path) -> str:
    """The page of the documentation, with what `widths.py` and `gains.py` have put beside it."""
    beside = {}
    for experiment in (widths, gains):
        rows = experiment.side_by_side(Results(docs / "results" / f"{experiment.__name__}.json", {}).runs)
        beside[experiment.__name__] = markdown(rows, [*rows[0]]) if rows else ""
    return PAGE.format(seeds=len(settings.seeds), table=markdown(table, [*table[0]]), **beside)


def main(argv: list[str] | None = None) -> None:
    settings = read_arguments(__doc__, PRESETS, argv)
    results = Results(settings.output / "results.json", {}, settings.minutes)
    table = []
    for setting in SETTINGS:
        for way in setting.ways:
            if settings.only in setting.name:
                with suppress(OutOfTime):
                    table.append(row_of(settings, results, setting, way))
                    print(table[-1], flush=True)
    show(table, [*table[0]])
    publish("rates", settings)
    if settings.docs:
        (settings.docs / "one_rate.md").write_text(page(table, settings, settings.docs), encoding="utf-8")


if __name__ == "__main__":
    main()
