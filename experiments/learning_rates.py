"""Learning rate, number of steps and size of the adapter: which of them go together.

    python experiments/learning_rates.py --data FOLDER --model MINILM_FOLDER

Two adapters, the default and the smallest that the paper uses for classifiers, are trained on TREC (six classes) with
each rate, for each number of steps. The rate decays linearly to 0, as Trainers do by default. FOLDER has trec/*.txt.
The table has the accuracy on half of the test questions. Results are kept in OUTPUT/results.json, and a run that is
there is not run again.

120 steps: the default 0.688 at 1e-3 and 0.844 at 1e-2; r=1, f1 0.192 and 0.880 (one seed, 4 CPU minutes).
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import glue
from runs import Results, Run
from settings import Settings, read_arguments
from tables import publish, show

ADAPTERS: dict[str, dict[str, Any]] = {
    "the default": {"r": 8, "positions": "f7+l7"},
    "r=1, f1": {"r": 1, "positions": "f1"},
}
"""Fields of `LoReftConfig`."""


@dataclass(kw_only=True)
class RatesSettings(Settings):
    output: Path = Path("outputs/learning_rates")
    learning_rates: list[float]
    steps: list[int]
    """Numbers of steps. Each is a training of its own."""
    seed: int


PRESETS = {
    "cpu": RatesSettings(
        model="sentence-transformers/all-MiniLM-L6-v2",
        learning_rates=[1e-3, 1e-2],
        steps=[120],
        seed=42,
    ),
}


def main(argv: list[str] | None = None) -> None:
    settings = read_arguments(__doc__, PRESETS, argv)
    results = Results(settings.output / "results.json", {})
    table = []
    for steps in settings.steps:
        # As `glue.py --preset cpu` trains and scores, but for the adapter, the rate and the number of steps.
        of_task = dict(model=settings.model, data=settings.data, output=settings.output, steps=steps)
        task = glue.GlueTask(replace(glue.PRESETS["cpu"], **of_task), "trec")
        for adapter, loreft in ADAPTERS.items():
            for rate in settings.learning_rates:
                run = Run(method="loreft", learning_rate=rate, seed=settings.seed, loreft=loreft)
                found = results.once({**run.settings(), "steps": steps}, partial(task.measure, run))
                table.append({"adapter": adapter, **found})
    show(table, ["adapter", "parameters", "steps", "learning_rate", "test", "cpu_minutes"])
    publish("learning_rates", settings)


if __name__ == "__main__":
    main()
