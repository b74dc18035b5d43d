"""Tables and figures of the experiments."""

import shutil
from typing import Any

from settings import Settings


def markdown(table: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows as a Markdown table."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in table:
        cells = [
            f"{row[c]:.3f}" if isinstance(row[c], float) and c != "learning_rate" else str(row[c]) for c in columns
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def show(table: list[dict[str, Any]], columns: list[str]) -> None:
    """Print rows as a Markdown table."""
    print(f"\n{markdown(table, columns)}")


def pyplot() -> Any:
    """Return matplotlib.pyplot (extra `viz`), set to draw into files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def comparison_figure(table: list[dict[str, Any]], score: str) -> Any:
    """Draw a row for each task: `dev` by learning rate on the left, `test` with its extremes by method on the right.

    Args:
        table: rows of `runs.compare`; a row's own `score` names the score of its task.
        score: the name of the score of the other rows.
    """
    tasks = list(dict.fromkeys(row.get("task", "") for row in table))
    size = (9, 2.7 * len(tasks))
    drawn, axes = pyplot().subplots(len(tasks), 2, figsize=size, squeeze=False, layout="constrained")
    for task, (left, right) in zip(tasks, axes):
        rows = [row for row in table if row.get("task", "") == task]
        score = rows[0].get("score", score)
        for y, row in enumerate(rows):
            rates, dev = [float(rate) for rate in row["rates"]], list(row["rates"].values())
            if len(rates) == 1:  # nothing to sweep
                left.axhline(dev[0], color=f"C{y}", ls=":", label=row["method"])
            else:
                left.plot(rates, dev, "o-", color=f"C{y}", label=row["method"])
            reach = [[row["test"] - row["lowest"]], [row["highest"] - row["test"]]]
            right.errorbar(row["test"], y, xerr=reach, fmt="o", color=f"C{y}", capsize=4)
        left.set(xscale="log", xlabel="learning rate", ylabel=f"{task} dev\n{score}".strip())
        left.set_xticks(rates, [f"{rate:g}" for rate in rates])
        left.minorticks_off()
        left.legend(fontsize=8, framealpha=0.6)
        right.set(xlabel=f"{task} test: {score}, seeds: {rows[-1]['seeds']}".strip(), ylim=(len(rows) - 0.5, -0.5))
        right.set_yticks(range(len(rows)), [f"{row['method']}\n{row['parameters']:,}" for row in rows])
        right.grid(axis="x", alpha=0.3)
    return drawn


def publish(name: str, settings: Settings, drawn: Any = None) -> None:
    """Save a figure beside the results. With `settings.docs` both are copied there too."""
    if drawn:
        drawn.savefig(settings.output / f"{name}.png", dpi=100)
    if settings.docs:
        figures, results = settings.docs / "figures", settings.docs / "results"
        figures.mkdir(parents=True, exist_ok=True)
        results.mkdir(parents=True, exist_ok=True)
        shutil.copy(settings.output / "results.json", results / f"{name}.json")
        if drawn:
            shutil.copy(settings.output / f"{name}.png", figures / f"{name}.png")
