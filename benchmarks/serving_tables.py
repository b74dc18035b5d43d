"""The tables of `benchmarks/serving.py`, as Markdown. Each ratio is over the base's in the same round."""

import statistics
from collections.abc import Callable, Iterable

from serving_engine import GROUPS, LOADS

Rounds = dict[str, list[dict[str, float]]]
"""From a way of serving to what each round took."""


def tables(results: dict[str, dict[str, Rounds]]) -> str:
    """All tables of the groups that were measured."""
    lines = []
    for load in dict.fromkeys(load for group in ("compiled", "not compiled") for load in GROUPS[group]["loads"]):
        lines += throughput(load, {group: found[load] for group, found in results.items() if load in found})
    if "prefix cache" in results:
        lines += prefix_cache(results["prefix cache"])
    if "scale" in results:
        for load in GROUPS["scale"]["loads"]:
            lines += scale(load, results["scale"][load])
    return "\n".join(lines)


def over_base(runs: Rounds, way: str, ratio: Callable[[dict[str, float], dict[str, float]], float]) -> str:
    """Median and extremes of `ratio(own, base)` over the rounds."""
    found = [ratio(own, base) for own, base in zip(runs[way], runs["base"])]
    return f"{statistics.median(found):.3f} ({min(found):.3f}–{max(found):.3f})"


def middle(rounds: Iterable[dict[str, float]], what: str) -> float:
    return statistics.median(found[what] for found in rounds)


def first_token(own: dict[str, float], base: dict[str, float]) -> float:
    return own["first"] / base["first"]


def title(load: str, what: str) -> list[str]:
    return [f"**{load.capitalize()}**: {what.format(**LOADS[load])}.", ""]


def throughput(load: str, of_groups: dict[str, Rounds]) -> list[str]:
    if not of_groups:
        return []
    lines = title(load, "{requests} requests at once, prompts of {prompt} tokens, {new} new ones")
    lines += ["| | throughput over the base's | time to first token over the base's | tokens/s | first token, s |"]
    lines += ["|---|---|---|---|---|"]
    for group, runs in of_groups.items():
        for way, found in runs.items():
            speed = over_base(runs, way, lambda own, base: base["seconds"] / own["seconds"])
            rate = statistics.median(each["tokens"] / each["seconds"] for each in found)
            first = middle(found, "first")
            lines.append(
                f"| {group}: {way} | {speed} | {over_base(runs, way, first_token)} | {rate:.0f} | {first:.2f} |"
            )
    return [*lines, ""]


def prefix_cache(loads: dict[str, Rounds]) -> list[str]:
    lines = ["**Prefix cache**: requests one after the other.", ""]
    lines += ["| | from the cache | time to first token over the base's | first token, ms |", "|---|---|---|---|"]
    for load, runs in loads.items():
        for way, found in runs.items():
            if load == "chat":
                cells = (
                    f"computes {middle(found, 'computed'):.0f} tokens a turn, of which {middle(found, 'new'):.0f} new"
                )
            elif load == "document":
                cells = f"{middle(found, 'found'):.1%} of the prompt"
            else:
                cells = f"{middle(found, 'found'):.0%} of the document's whole blocks"
            first = 1e3 * middle(found, "first")
            lines.append(f"| {load}: {way} | {cells} | {over_base(runs, way, first_token)} | {first:.0f} |")
    return [*lines, ""]


def scale(load: str, runs: Rounds) -> list[str]:
    lines = title(load, "{requests} requests at once, prompts of {prompt} tokens, {new} new ones")
    lines += ["| | time over the base's | a decode step, ms | preparing steps | tables, MiB | peak memory, MiB |"]
    lines += ["|---|---|---|---|---|---|"]
    for way, found in runs.items():
        ratio = over_base(runs, way, lambda own, base: own["seconds"] / base["seconds"])
        decode, preparing = 1e3 * middle(found, "decode"), middle(found, "preparing")
        memory = [middle(found, what) / 2**20 for what in ("tables", "peak")]
        share = "–" if way == "base" else f"{preparing:.2%}"
        cells = f"{decode:.0f} | {share} | {memory[0]:.0f} | {memory[1]:.0f}"
        lines.append(f"| {way} | {ratio} | {cells} |")
    return [*lines, ""]
