"""Measures what LoReFT adapters cost in vLLM, beside the base model and vLLM's own LoRA: `make bench-vllm`.

    python benchmarks/serving.py --page docs/serving.md --out docs/serving.json
    python benchmarks/serving.py --groups "prefix cache" --layers 2 --rounds 1

Each engine has a process of its own. All engines of a group start first. Then they run the same requests in turns, one
engine at a time, round by round, so a slow moment of the machine hits all alike. The model has the shape of
SmolLM2-135M with random weights, fp32. Each engine is compared with the base of its group. There are four groups:
compiled, as vLLM does by default; not compiled, as vLLM runs LoRA on a CPU; with vLLM's prefix cache; and with up to
512 adapters and rows. `serving_engine.py` has the groups and what they run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from serving_engine import GROUPS, LOADS, engine_of, prepare, serve
from serving_tables import Rounds, tables
from tqdm import tqdm
from workload import SMOLLM2

VLLM = dict(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
    OMP_WAIT_POLICY="PASSIVE",
)


class Engine:
    """A process with one engine. It runs a load when `run` asks for it."""

    def __init__(self, group: str, kind: str, count: int, folder: Path) -> None:
        serving = ["--serve", group, kind, str(count), "--folder", str(folder)]
        command = [sys.executable, "-W", "ignore", __file__, *serving]
        env = {**os.environ, **VLLM}
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                found: dict[str, float] = json.loads(line.removeprefix("RESULT "))
                return found
        raise SystemExit(f"An engine ended with status {self.process.wait()}.")

    def run(self, load: str, turn: int, active: int) -> dict[str, float]:
        assert self.process.stdin is not None
        asked = {"load": load, "turn": turn, "active": active}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        return self.answer()


def measure(group: str, ways: dict[str, dict[str, Any]], rounds: int, folder: Path) -> dict[str, Rounds]:
    """Maps load -> way -> what each round took."""
    engines: dict[tuple[str, int], Engine] = {}
    try:
        for key in tqdm(list(dict.fromkeys(engine_of(way) for way in ways.values())), desc=f"{group}: starting"):
            engines[key] = Engine(group, *key, folder)
            engines[key].answer()
        results: dict[str, Rounds] = {}
        for turn in tqdm(range(rounds), desc=f"{group}: rounds"):
            for load in GROUPS[group]["loads"]:
                names = [way for way in ways if way in LOADS[load].get("ways", ways)]
                of_load = results.setdefault(load, {way: [] for way in names})
                for way in names[turn % len(names) :] + names[: turn % len(names)]:
                    key = engine_of(ways[way])
                    of_load[way].append(engines[key].run(load, turn, ways[way].get("active", key[1])))
    finally:
        for engine in engines.values():
            engine.process.kill()
            engine.process.wait()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, help="default: " + ", ".join(f"{g} {GROUPS[g]['rounds']}" for g in GROUPS)
    )
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--ways", nargs="+", help="a subset of a group's, 'base' among them")
    parser.add_argument("--layers", type=int, default=SMOLLM2["num_hidden_layers"])
    parser.add_argument("--out", type=Path, help="JSON of all rounds; groups that it has and that are not run stay")
    parser.add_argument("--page", type=Path, help="Markdown page whose part between the two marks becomes the tables")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        group, kind, count = args.serve
        serve(group, kind, int(count), args.folder)
        return
    results = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    chosen = {}
    for group in args.groups:
        of_group = GROUPS[group]["ways"]
        chosen[group] = {way: of_group[way] for way in of_group if not args.ways or way in args.ways}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.layers, [engine_of(way) for ways in chosen.values() for way in ways.values()])
        for group, ways in chosen.items():
            results[group] = measure(group, ways, args.rounds or GROUPS[group]["rounds"], Path(folder))
            if args.out:
                args.out.write_text(json.dumps(results, indent=1) + "\n")
    text = tables(results)
    print(text)
    if args.page:
        before, mark, rest = args.page.read_text(encoding="utf-8").partition("<!-- bench-vllm -->\n")
        _, end, after = rest.partition("<!-- end -->")
        args.page.write_text(f"{before}{mark}\n{text}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
