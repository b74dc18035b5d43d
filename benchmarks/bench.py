"""What LoReFT costs over the frozen model, beside LoRA and IA3: `make bench` writes docs/performance.md and .json.

    python benchmarks/bench.py [--rounds 15] [--threads 1 2] [--only train decode] [--out docs/performance.json]

Random weights of SmolLM2-135M's shape (speed does not depend on the values), float32. Every method has the same
parameters in memory and is timed in turns with all others; a ratio is the median over rounds. *Floor*: forward, and
the backward of activations (no weight's gradient) down to the output of the lowest block, which no method can spare.
"""

import argparse
import inspect
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin make any contention look like cost
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from measure import SMOLLM2, Ratio, Saved, clock, interleave, share
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from peft_reft import LoReftConfig, runtime
from peft_reft.edits.apply import _AddEdits
from peft_reft.edits.formulas import INTERVENTIONS
from peft_reft.edits.rotation import _Orthonormalise
from peft_reft.tuner.layer import LoReftLayer

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


def build(sizes: dict[str, int]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def adapted(base: nn.Module, method: str) -> PeftModel:
    model = get_peft_model(share(base), METHODS[method]())
    with torch.no_grad():  # away from the identity, where a method might have nothing to do
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.endswith(".R"):
                parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def batch(rows: int, length: int, prompt: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 49152, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def floor(base: nn.Module) -> nn.Module:
    """`base` whose gradient begins at the output of the lowest block."""
    model = share(base)
    model.model.layers[0].register_forward_hook(lambda module, args, out: out.requires_grad_())
    return model


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A training step: forward, backward and AdamW."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5) if weights else None
    model.train()

    def run() -> None:
        model(**inputs).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


def train(base: nn.Module, rounds: int, checkpointing: bool = False) -> dict[str, Ratio]:
    inputs = batch(4, 128, 64)
    methods = ["LoRA r=8 (q, v)", "LoReFT r=4 f7+l7"] if checkpointing else METHODS
    models = {"floor": floor(base), **{name: adapted(base, name) for name in methods}}
    if checkpointing:
        for model in models.values():
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return interleave({name: step(model, inputs) for name, model in models.items()}, "floor", rounds)


def prefill(base: nn.Module, rounds: int) -> dict[str, Ratio]:
    inputs = batch(4, 64, 64)
    del inputs["labels"]

    def run(model: nn.Module) -> Callable[[], object]:
        model.eval()
        return torch.inference_mode()(lambda: model(**inputs, use_cache=True, logits_to_keep=1))

    models = {"base": share(base), **{name: adapted(base, name) for name in METHODS}}
    return interleave({name: run(model) for name, model in models.items()}, "base", rounds)


class Watch(StoppingCriteria):
    """The clock after the first token, which the prefill made, and after the last."""

    def __init__(self) -> None:
        self.readings: list[tuple[float, float]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.readings.append(clock())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def decode(base: nn.Module, rounds: int, new: int = 9) -> dict[str, Ratio]:
    """The steps of `generate` after the first token."""
    inputs = batch(4, 64, 64)
    del inputs["labels"]

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
    """Bytes that autograd keeps over the floor; and the goal, twice the gathered tokens."""
    inputs = batch(4, 128, 64)

    def count(model: nn.Module) -> int:
        model.train()
        model(**inputs).loss.backward()  # R is brought in form, caches are filled
        model.zero_grad()
        saved = Saved(model)
        with saved():
            loss = model(**inputs).loss
        loss.backward()
        return saved.bytes

    at_least = count(floor(base))
    goal = 2 * 4 * 14 * SMOLLM2["hidden_size"] * 4 * SMOLLM2["num_hidden_layers"]
    return {
        name: {"MiB over the floor": (count(adapted(base, name)) - at_least) / 2**20, "goal for f7+l7": goal / 2**20}
        for name in METHODS
    }


def on_disk(base: nn.Module) -> dict[str, dict[str, float]]:
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
    """R and its gradient for 32 layers, over the floor of a step of 1 x 512 tokens: one block of each, times 32."""
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

            def rotate(weights=weights, optimizer=optimizer, gradient=gradient) -> None:  # type: ignore[no-untyped-def]
                weights.rotation().backward(gradient)
                optimizer.step()  # so that R has something to be brought back from
                optimizer.zero_grad()

            runs[f"r={r}"] = rotate
        for name, ratio in interleave(runs, "floor", rounds).items():
            if name != "floor":
                found[f"d={d}, {name}"] = {"of the floor (CPU)": ratio.cpu, "ms a layer": ratio.milliseconds}
    return found


def many_adapters(base: nn.Module, rounds: int, count: int = 64) -> dict[str, Ratio]:
    """A batch of 64 rows, each with an adapter of its own, over the base; and all rows with one adapter."""
    inputs = batch(count, 64, 64)
    del inputs["labels"]
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
    """Operations that LoReFT adds to a step, a layer: how many, and their own microseconds."""
    inputs, layers = batch(4, 128, 64), SMOLLM2["num_hidden_layers"]
    found = []
    for model in (floor(base), adapted(base, "LoReFT r=4 f7+l7")):
        run = step(model, inputs)
        run()
        with torch.profiler.profile() as profiler:
            for _ in range(steps):
                run()
        found.append({e.key: (e.count, e.self_cpu_time_total) for e in profiler.key_averages()})
    without, ours = found
    ours = {name: value for name, value in ours.items() if "mm" not in name and "Profiler" not in name}
    rows = {
        name: {
            "calls": (count - without.get(name, (0, 0.0))[0]) / steps / layers,
            "us": (microseconds - without.get(name, (0, 0.0))[1]) / steps / layers,
        }
        for name, (count, microseconds) in ours.items()
    }
    added = {name: row for name, row in rows.items() if row["calls"] > 0}
    return dict(sorted(added.items(), key=lambda item: -item[1]["us"])[:12])


@contextmanager
def own_time() -> Iterator[Callable[[Callable[[], object], int], tuple[float, float]]]:
    """Gives `measure(run, times)`: median CPU seconds of a `run` in LoReFT's own code, and in all else; one thread.

    A difference of two long times has the scatter of both. This is a sum of short ones, and has hardly any; what it
    cannot see is what LoReFT does to the caches of others.
    """
    spent = [0.0]

    def timed(function: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[0] += time.thread_time() - began

        return run

    def measure(run: Callable[[], object], times: int) -> tuple[float, float]:
        run()
        found = []
        for _ in range(times):
            spent[0], began = 0.0, time.thread_time()
            run()
            found.append((spent[0], time.thread_time() - began - spent[0]))
        return statistics.median(own for own, _ in found), statistics.median(other for _, other in found)

    places = [
        (LoReftLayer, "forward"),
        (_AddEdits, "backward"),
        (_Orthonormalise, "backward"),
        (torch.optim.AdamW, "step"),
        (runtime, "_before_forward"),
        (runtime, "_after_forward"),
        (runtime, "_prepare_inputs"),
    ]
    originals = [inspect.getattr_static(owner, name) for owner, name in places]
    torch.set_num_threads(1)
    try:
        for (owner, name), original in zip(places, originals):
            function = timed(getattr(owner, name))
            setattr(owner, name, staticmethod(function) if isinstance(original, staticmethod) else function)
        yield measure
    finally:
        for (owner, name), original in zip(places, originals):
            setattr(owner, name, original)


def inside(base: nn.Module, steps: int = 10) -> dict[str, dict[str, float]]:
    """CPU time spent in LoReFT's own code, over that of all else in the same steps."""
    given = {"attention_mask": torch.ones(4, 64, dtype=torch.long), "input_ids": batch(4, 64, 64)["input_ids"]}
    found: dict[str, dict[str, float]] = {}
    with own_time() as measure:
        for method in METHODS:
            if not method.startswith("LoReFT"):
                continue
            model = adapted(base, method)
            evaluated = adapted(base, method).eval()
            runs: dict[str, Callable[[], object]] = {
                "training step": step(model, batch(4, 128, 64)),
                "prefill": torch.inference_mode()(lambda m=evaluated: m(**given, logits_to_keep=1)),
                "prefill and 8 steps of decoding": lambda m=evaluated: m.generate(**given, max_new_tokens=9),
            }
            found[method] = {}
            for name, run in runs.items():
                own, other = measure(run, steps)
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
    parser.add_argument("--only", nargs="+", default=[*TIMED, *UNTIMED, "injection", "orthogonalisation"])
    parser.add_argument("--out", type=Path, help="add the results to this JSON file")
    args = parser.parse_args()
    results: dict[str, object] = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, fp32"
    results["rounds"] = args.rounds
    base = build(SMOLLM2)
    for name in tqdm(args.only):
        if name in TIMED:
            for threads in args.threads:
                torch.set_num_threads(threads)
                ratios = TIMED[name](base, args.rounds)
                results[f"{name}, {threads} thread{'s' * (threads > 1)}"] = {k: vars(v) for k, v in ratios.items()}
        elif name in UNTIMED:
            results[name] = UNTIMED[name](base)
        else:
            torch.set_num_threads(1)
            results[name] = injection() if name == "injection" else orthogonalisation(args.rounds)
        tqdm.write(json.dumps({k: v for k, v in results.items() if k.startswith(name)}, indent=1))
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
