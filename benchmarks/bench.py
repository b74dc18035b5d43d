"""What LoReFT costs over the frozen model, beside LoRA and IA3: `make bench` writes docs/performance.md and .json.

    python benchmarks/bench.py [--rounds 15] [--threads 1 2] [--only train decode] [--out docs/performance.json]

Random weights of SmolLM2-135M's shape (speed does not depend on the values), float32. All methods share the base's
parameters in memory and are timed in turns; a ratio is the median over rounds. The *floor* is what every method needs:
the forward, and the backward of activations (without gradients of weights) down to the output of the lowest block.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin make any contention look like cost
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from measure import Ratio, Saved, clock, interleave, share
from own import measure as measure_own
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList
from workload import SMOLLM2, batch, build, leave_identity, prompts, training_step

from peft_reft import LoReftConfig, LoReftRuntimeConfig
from peft_reft.edits.formulas import INTERVENTIONS

METHODS = {
    "LoRA r=8 (q, v)": lambda: LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]),
    "IA3": lambda: IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    "LoReFT r=4 f7+l7": lambda: LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f7+l7"),
    "LoReFT r=8 f7+l7": lambda: LoReftConfig(task_type="CAUSAL_LM", r=8, positions="f7+l7"),
    "LoReFT r=4 all": lambda: LoReftConfig(task_type="CAUSAL_LM", r=4, positions="all"),
}


def adapted(base: nn.Module, method: str) -> PeftModel:
    """A copy of `base` with an adapter of that method."""
    return leave_identity(get_peft_model(share(base), METHODS[method]()))


def floor(base: nn.Module) -> nn.Module:
    """`base` whose gradient begins at the output of the lowest block."""
    model = share(base)
    model.model.layers[0].register_forward_hook(lambda module, args, out: out.requires_grad_())
    return model


# Over the floor, or over the base, in turns.


def train(base: nn.Module, rounds: int, checkpointing: bool = False) -> dict[str, Ratio]:
    """A training step over the floor."""
    inputs = batch(4, 128, 64)
    methods = ["LoRA r=8 (q, v)", "LoReFT r=4 f7+l7"] if checkpointing else METHODS
    models = {"floor": floor(base), **{name: adapted(base, name) for name in methods}}
    if checkpointing:
        for model in models.values():
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    steps = {name: training_step(model, inputs) for name, model in models.items()}
    return interleave(steps, "floor", rounds)


UNTOUCHED = {  # tokens of prompt and answer, and how many tokens of the prompt all rows share
    "448 + 64": (448, 64, 0),
    "960 + 16": (960, 16, 0),
    "448 + 64, 384 shared and kept": (448, 64, 384),
    "64 + 64": (64, 64, 0),
}


def untouched(base: nn.Module, rounds: int, rows: int = 4) -> dict[str, dict[str, float | None]]:
    """A training step of `l7` that runs the untouched prompt without gradient; CPU time, one thread.

    Both with the model's own head and with TRL's fused head, each over the floor with that head.
    """
    from trl.trainer.utils import add_fused_lm_head  # here: `make bench-gpu` does without TRL

    torch.set_num_threads(1)
    found: dict[str, dict[str, float | None]] = {}
    for head in ("", ", TRL's fused head"):
        for title, (prompt, answer, shared) in UNTOUCHED.items():
            inputs: dict[str, Any] = batch(rows, prompt + answer, prompt)
            inputs["input_ids"][:, :shared] = inputs["input_ids"][0, :shared]
            models = {"floor": floor(base), "LoRA": adapted(base, "LoRA r=8 (q, v)")}
            for mode in ("off", "auto") if prompt == answer else ("auto",):
                runtime = LoReftRuntimeConfig(untouched_prompt=mode)
                config = LoReftConfig(task_type="CAUSAL_LM", r=4, positions="l7", runtime_config=runtime)
                models[mode] = leave_identity(get_peft_model(share(base), config))
            if head:
                inputs["fused_lm_head"] = True
                for model in models.values():
                    add_fused_lm_head(model.get_base_model() if isinstance(model, PeftModel) else model)
            steps = {name: training_step(model, inputs) for name, model in models.items()}
            ratios = interleave(steps, "floor", rounds)
            two_parts = ratios["auto"].cpu
            found[title + head] = {
                "over the floor": two_parts,
                "over LoRA r=8": two_parts / ratios["LoRA"].cpu,
                "over one part": two_parts / ratios["off"].cpu if "off" in ratios else None,
            }
    return found


def saved_of_untouched(base: nn.Module) -> dict[str, dict[str, float]]:
    """MiB that autograd keeps of a step of `l7`, in one part and in two."""
    found = {}
    for title, (prompt, answer, _) in UNTOUCHED.items():
        row = {}
        for name, mode in (("one part", "off"), ("two parts", "on")):
            runtime = LoReftRuntimeConfig(untouched_prompt=mode)
            config = LoReftConfig(task_type="CAUSAL_LM", r=4, positions="l7", runtime_config=runtime)
            model = leave_identity(get_peft_model(share(base), config)).train()
            saved = Saved(model)
            with saved():
                model(**batch(1, prompt + answer, prompt))
            row[name] = saved.bytes / 2**20
        found[title] = {**row, "share": row["two parts"] / row["one part"]}
    return found


def prefill(base: nn.Module, rounds: int) -> dict[str, Ratio]:
    """The forward of a batch of prompts, over the base."""
    inputs = prompts(4, 64)

    def run(model: nn.Module) -> Callable[[], object]:
        model.eval()
        return torch.inference_mode()(lambda: model(**inputs, use_cache=True, logits_to_keep=1))

    models = {"base": share(base), **{name: adapted(base, name) for name in METHODS}}
    return interleave({name: run(model) for name, model in models.items()}, "base", rounds)


class Watch(StoppingCriteria):
    """Reads the clock after each token. The first token belongs to the prefill."""

    def __init__(self) -> None:
        self.readings: list[tuple[float, float]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.readings.append(clock())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def decode(
    base: nn.Module, rounds: int, new: int = 9, inputs: dict[str, torch.Tensor] | None = None
) -> dict[str, Ratio]:
    """The steps of `generate` after the first token, over the base."""
    inputs = prompts(4, 64) if inputs is None else inputs

    def run(model: nn.Module) -> Callable[[], object]:
        def steps() -> tuple[tuple[float, float], tuple[float, float]]:
            watch = Watch()
            model.generate(
                **inputs, do_sample=False, max_new_tokens=new, stopping_criteria=StoppingCriteriaList([watch])
            )
            return watch.readings[0], watch.readings[-1]

        model.eval()
        return steps

    models = {"base": share(base), **{name: adapted(base, name) for name in METHODS}}
    return interleave({name: run(model) for name, model in models.items()}, "base", rounds)


def saved_for_backward(base: nn.Module) -> dict[str, dict[str, float]]:
    """MiB that autograd keeps over the floor, and the goal: twice the gathered tokens."""
    inputs = batch(4, 128, 64)

    def count(model: nn.Module) -> int:
        model.train()
        model(**inputs).loss.backward()  # R becomes orthonormal, caches are filled
        model.zero_grad()
        saved = Saved(model)
        with saved():
            loss = model(**inputs).loss
        loss.backward()
        return saved.bytes

    of_floor = count(floor(base))
    edited_tokens = 4 * (7 + 7)  # rows * positions
    bytes_of_edited = edited_tokens * SMOLLM2["hidden_size"] * 4 * SMOLLM2["num_hidden_layers"]
    found = {}
    for name in METHODS:
        more = count(adapted(base, name)) - of_floor
        found[name] = {"MiB over the floor": more / 2**20, "goal for f7+l7": 2 * bytes_of_edited / 2**20}
    return found


def on_disk(base: nn.Module) -> dict[str, dict[str, float]]:
    """Sizes of what `save_pretrained` writes."""
    found = {}
    for name in METHODS:
        model = adapted(base, name)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            weights = Path(folder) / "adapter_model.safetensors"
            with safe_open(weights, "pt") as file:
                tensors = len(file.keys())
            parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
            found[name] = {
                "parameters": parameters,
                "bytes of weights": weights.stat().st_size,
                "header bytes a tensor": (weights.stat().st_size - 4 * parameters) / tensors,
                "bytes of config": (Path(folder) / "adapter_config.json").stat().st_size,
            }
    return found


def injection() -> dict[str, float]:
    """Milliseconds to inject into 32 blocks of 4096 on the meta device, and to load into SmolLM2's shape."""
    sizes = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    found = {}
    for name in ("LoReFT r=4 f7+l7", "LoRA r=8 (q, v)"):
        with torch.device("meta"):
            large = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **sizes))
        began = time.perf_counter()
        get_peft_model(large, METHODS[name](), low_cpu_mem_usage=True)
        found[f"inject on the meta device, {name}"] = 1e3 * (time.perf_counter() - began)
        base = build(SMOLLM2)
        with tempfile.TemporaryDirectory() as folder:
            adapted(base, name).save_pretrained(folder)
            fresh = share(base)
            began = time.perf_counter()
            PeftModel.from_pretrained(fresh, folder)
            found[f"load into 30 blocks of 576, {name}"] = 1e3 * (time.perf_counter() - began)
    return found


def orthogonalisation(rounds: int) -> dict[str, dict[str, float]]:
    """R and its gradient for one layer, over the floor of a step of 1 x 512 tokens through one block."""
    found = {}
    for d, inner, heads in ((4096, 11008, 32), (8192, 28672, 64)):
        config = LlamaConfig(
            vocab_size=8, hidden_size=d, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=heads
        )
        block = LlamaForCausalLM(config).requires_grad_(False).model
        inputs = torch.randn(1, 512, d, requires_grad=True)

        def block_step(block: nn.Module = block, inputs: torch.Tensor = inputs) -> None:
            block(inputs_embeds=inputs).last_hidden_state.sum().backward()

        runs: dict[str, Callable[[], object]] = {"floor": block_step}
        for r in (4, 8, 16, 32):
            weights = INTERVENTIONS["loreft"](d, r, init_weights="paper").train()
            optimizer = torch.optim.SGD([weights.R], lr=1e-4)
            gradient = torch.randn(r, d)

            def rotate(weights: Any = weights, optimizer: Any = optimizer, gradient: torch.Tensor = gradient) -> None:
                weights.rotation().backward(gradient)
                optimizer.step()  # moves R, so that it is not orthonormal any more
                optimizer.zero_grad()

            runs[f"r={r}"] = rotate
        for name, ratio in interleave(runs, "floor", rounds).items():
            if name != "floor":
                found[f"d={d}, {name}"] = {"of the floor (CPU)": ratio.cpu, "ms a layer": ratio.milliseconds}
    return found


def many_adapters(base: nn.Module, rounds: int, count: int = 64) -> dict[str, Ratio]:
    """Prefill of 64 rows, over the base: each row with its own adapter, and all rows with one adapter."""
    inputs = prompts(count, 64)
    models = {}
    for name in ("LoReFT r=4 f7+l7", "LoRA r=8 (q, v)"):
        model = adapted(base, name)
        for n in range(1, count):
            model.add_adapter(f"a{n}", METHODS[name]())
        models[name] = model.eval()
    names = ["default", *(f"a{n}" for n in range(1, count))]
    plain = share(base).eval()

    def run(model: nn.Module, **kwargs: object) -> Callable[[], object]:
        return torch.inference_mode()(lambda: model(**inputs, logits_to_keep=1, **kwargs))

    runs = {"base": run(plain)}
    for name, model in models.items():
        runs[f"{name}: one for all rows"] = run(model)
        runs[f"{name}: one for each row"] = run(model, adapter_names=names)
    return interleave(runs, "base", (rounds + 1) // 2)


def profile(base: nn.Module, steps: int = 3) -> dict[str, dict[str, float]]:
    """Operations that LoReFT adds to a training step: how many in a layer, and their own microseconds."""
    inputs = batch(4, 128, 64)
    counted = []
    for model in (floor(base), adapted(base, "LoReFT r=4 f7+l7")):
        run = training_step(model, inputs)
        run()
        with torch.profiler.profile() as profiler:
            for _ in range(steps):
                run()
        counted.append({event.key: (event.count, event.self_cpu_time_total) for event in profiler.key_averages()})
    of_floor, of_loreft = counted
    times_layers = steps * SMOLLM2["num_hidden_layers"]
    added = {}
    for name, (calls, microseconds) in of_loreft.items():
        if "mm" in name or "Profiler" in name:  # the floor's matrix products scatter more than LoReFT adds
            continue
        calls_of_floor, microseconds_of_floor = of_floor.get(name, (0, 0.0))
        if calls > calls_of_floor:
            added[name] = {
                "calls": (calls - calls_of_floor) / times_layers,
                "us": (microseconds - microseconds_of_floor) / times_layers,
            }
    slowest_first = sorted(added.items(), key=lambda item: -item[1]["us"])
    return dict(slowest_first[:12])


def inside(base: nn.Module, times: int = 10) -> dict[str, dict[str, float]]:
    """CPU time in LoReFT's own code and the optimizer, over that of all else in the same calls; one thread."""
    torch.set_num_threads(1)
    inputs = prompts(4, 64)
    found: dict[str, dict[str, float]] = {}
    for method in METHODS:
        if not method.startswith("LoReFT"):
            continue
        trained = adapted(base, method)
        evaluated = adapted(base, method).eval()

        def prefill(model: nn.Module = evaluated) -> None:
            with torch.inference_mode():
                model(**inputs, logits_to_keep=1)

        def generate(model: nn.Module = evaluated) -> None:
            model.generate(**inputs, max_new_tokens=9)

        runs: dict[str, tuple[PeftModel, Callable[[], object]]] = {
            "training step": (trained, training_step(trained, batch(4, 128, 64))),
            "prefill": (evaluated, prefill),
            "prefill and 8 steps of decoding": (evaluated, generate),
        }
        found[method] = {}
        for name, (model, run) in runs.items():
            own, other = measure_own(model, run, times, with_optimizer=True)
            found[method][name] = own / other
    return found


TIMED = {
    "train": train,
    "checkpointing": lambda base, rounds: train(base, rounds, checkpointing=True),
    "prefill": prefill,
    "decode": decode,
    "adapters": many_adapters,
}
UNTIMED = {"inside": inside, "saved": saved_for_backward, "disk": on_disk, "profile": profile}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", default=[*TIMED, *UNTIMED, "untouched", "injection", "orthogonalisation"])
    parser.add_argument("--out", type=Path, help="add the results to this JSON file")
    args = parser.parse_args()
    results: dict[str, object] = {}
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text())
    results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, fp32"
    if args.only != ["untouched"]:
        results["rounds"] = args.rounds
    base = build(SMOLLM2)
    for name in tqdm(args.only):
        if name in TIMED:
            for threads in args.threads:
                torch.set_num_threads(threads)
                ratios = TIMED[name](base, args.rounds)
                title = f"{name}, {threads} {'thread' if threads == 1 else 'threads'}"
                results[title] = {method: vars(ratio) for method, ratio in ratios.items()}
        elif name in UNTIMED:
            results[name] = UNTIMED[name](base)
        elif name == "untouched":
            results[name] = untouched(base, args.rounds)
            results["saved of untouched"] = saved_of_untouched(base)
            results["rounds of untouched"] = args.rounds
        else:
            torch.set_num_threads(1)
            results[name] = injection() if name == "injection" else orthogonalisation(args.rounds)
        new = {title: result for title, result in results.items() if title.startswith(name)}
        tqdm.write(json.dumps(new, indent=1))
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
