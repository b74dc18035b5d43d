"""Measures what LoReFT adapters cost in vLLM, beside the base model and vLLM's own LoRA: `make bench-vllm`.

    python benchmarks/serving.py --page docs/serving.md --out docs/serving.json

Each way of serving has an engine in its own process. All engines start first. Then they run the same requests in
turns, one engine at a time, round by round, so a slow moment of the machine hits all alike. The model has the shape of
SmolLM2-135M with random weights, fp32. All requests come at once; each names the next adapter. One group of engines is
compiled, as vLLM does by default. The other is not compiled, as vLLM runs LoRA on a CPU. Each engine is compared with
the base of its group.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from workload import SMOLLM2

LOADS = {
    "decode-heavy": dict(requests=64, prompt=16, new=32),
    "prefill-heavy": dict(requests=64, prompt=96, new=2),
}
COUNTS = (1, 8, 64)
_LOREFT = {f"LoReFT f7+l7, {n}": dict(loreft="f7+l7", adapters=n) for n in COUNTS}
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "compiled": {"base": {}, **_LOREFT, "LoReFT all, 64": dict(loreft="all", adapters=64)},
    "not compiled": {"base": {}, **_LOREFT, **{f"LoRA q, v, {n}": dict(lora=True, adapters=n) for n in COUNTS}},
}
VLLM = dict(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1"
)


def prepare(folder: Path, layers: int) -> None:
    """Write a model's config and one adapter of each spec and method. Engines load an adapter under many names."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from peft_reft import LoReftConfig

    config = LlamaConfig(**{**SMOLLM2, "num_hidden_layers": layers, "max_position_embeddings": 1024})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder / "model")
    torch.manual_seed(0)
    for name, peft in {
        "f7+l7": LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f7+l7", init_weights="paper"),
        "all": LoReftConfig(task_type="CAUSAL_LM", r=4, positions="all", init_weights="paper"),
        "lora": LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]),
    }.items():
        get_peft_model(LlamaForCausalLM(config), peft).save_pretrained(folder / name)


class Engine:
    """A process with one engine. It runs a load when `run` asks for it."""

    def __init__(self, group: str, way: str, folder: Path) -> None:
        command = [sys.executable, "-W", "ignore", __file__, "--serve", group, way, "--folder", str(folder)]
        env = {**os.environ, **VLLM, "VLLM_LOGGING_LEVEL": "ERROR", "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise SystemExit(f"An engine ended with status {self.process.wait()}.")

    def run(self, load: str) -> dict[str, float]:
        assert self.process.stdin is not None
        print(load, file=self.process.stdin, flush=True)
        return self.answer()


def serve(group: str, way: str, folder: Path) -> None:
    """Runs the loads named on standard input, in an engine's process."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    settings = GROUPS[group][way]
    n = settings.get("adapters", 0)
    more: dict[str, Any] = {}
    if spec := settings.get("loreft"):
        more = {"additional_config": {"loreft": {"adapters": {f"a{k}": str(folder / spec) for k in range(n)}}}}
    elif settings.get("lora"):
        more = dict(enable_lora=True, max_loras=n, max_lora_rank=8, max_cpu_loras=n)
    llm = LLM(
        str(folder / "model"),
        load_format="dummy",
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_seqs=64,
        enable_prefix_caching=False,
        max_num_batched_tokens=1024,
        enforce_eager=group == "not compiled",
        **more,
    )
    engine = llm.llm_engine
    generator = torch.Generator().manual_seed(0)

    def run(requests: int, prompt: int, new: int) -> dict[str, float]:
        prompts = torch.randint(10, 40000, (requests, prompt), generator=generator).tolist()
        began = time.perf_counter()
        for k, ids in enumerate(prompts):
            chosen = {"extra_args": {"loreft": f"a{k % n}"}} if spec else {}
            params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, **chosen)
            lora = LoRARequest(f"a{k % n}", k % n + 1, str(folder / "lora")) if settings.get("lora") else None
            engine.add_request(str(k), {"prompt_token_ids": ids}, params, lora_request=lora)
        first: dict[str, float] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                first.setdefault(output.request_id, time.perf_counter() - began)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "first": statistics.mean(first.values()), "tokens": requests * new}

    run(n or 8, 24, 3)  # loads every LoRA, compiles what is left to compile
    print("RESULT {}", flush=True)
    for line in sys.stdin:
        print("RESULT " + json.dumps(run(**LOADS[line.strip()])), flush=True)


Rounds = dict[str, list[dict[str, float]]]


def table(results: dict[str, dict[str, Rounds]]) -> str:
    """Writes a Markdown table: throughput and time to first token, each over the base's in the same round."""
    lines = []
    for load, settings in LOADS.items():
        what = "{requests} requests at once, prompts of {prompt} tokens, {new} new ones".format(**settings)
        lines += [f"**{load.capitalize()}**: {what}.", ""]
        lines += ["| | throughput over the base's | time to first token over the base's | tokens/s | first token, s |"]
        lines += ["|---|---|---|---|---|"]
        for group, of_load in results.items():
            runs = of_load[load]
            for way, found in runs.items():
                ratios = [base["seconds"] / own["seconds"] for base, own in zip(runs["base"], found)]
                firsts = [own["first"] / base["first"] for base, own in zip(runs["base"], found)]
                speed = statistics.median(own["tokens"] / own["seconds"] for own in found)
                first = statistics.median(own["first"] for own in found)
                cells = [f"{statistics.median(r):.3f} ({min(r):.3f}–{max(r):.3f})" for r in (ratios, firsts)]
                lines.append(f"| {group}: {way} | {' | '.join(cells)} | {speed:.0f} | {first:.2f} |")
        lines.append("")
    return "\n".join(lines)


def measure(group: str, ways: list[str], rounds: int, folder: Path) -> dict[str, Rounds]:
    """Maps load -> way -> what each round took."""
    engines = {}
    for way in tqdm(ways, desc=f"{group}: starting engines"):
        engines[way] = Engine(group, way, folder)
        engines[way].answer()
    results: dict[str, Rounds] = {load: {way: [] for way in ways} for load in LOADS}
    for turn in tqdm(range(rounds), desc=f"{group}: rounds"):
        for load in LOADS:
            for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
                results[load][way].append(engines[way].run(load))
    for engine in engines.values():
        engine.process.kill()
        engine.process.wait()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--ways", nargs="+", help="a subset of a group's, 'base' among them")
    parser.add_argument("--layers", type=int, default=SMOLLM2["num_hidden_layers"])
    parser.add_argument("--out", type=Path, help="JSON of all rounds; groups that it has and that are not run stay")
    parser.add_argument("--page", type=Path, help="Markdown page whose part between the two marks becomes the table")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve, args.folder)
        return
    results = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.layers)
        for group in args.groups:
            ways = [way for way in GROUPS[group] if not args.ways or way in args.ways]
            results[group] = measure(group, ways, args.rounds, Path(folder))
            if args.out:
                args.out.write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    print(text)
    if args.page:
        before, mark, rest = args.page.read_text(encoding="utf-8").partition("<!-- bench-vllm -->\n")
        _, end, after = rest.partition("<!-- end -->")
        args.page.write_text(f"{before}{mark}\n{text}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
