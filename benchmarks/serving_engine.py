"""What `benchmarks/serving.py` measures: the ways of serving, the loads, and the process of one engine that runs them.

A *group* of engines runs the same *loads*; each *way* of serving has an engine of the group. Ways that differ only in
how many adapters are *active*, which means that requests name them, share an engine.
"""

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from workload import SMOLLM2

COUNTS = (1, 8, 64)
_LOREFT = {f"LoReFT f7+l7, {n}": dict(loreft="f7+l7", adapters=n) for n in COUNTS}
_BATCHES = dict(max_model_len=512, max_num_seqs=64, max_num_batched_tokens=1024, enable_prefix_caching=False)
_ROWS = dict(_BATCHES, max_model_len=1280, max_num_seqs=512, max_num_batched_tokens=2048, enforce_eager=True)
_CACHED = dict(_ROWS, max_num_seqs=8, enable_prefix_caching=True)

GROUPS: dict[str, dict[str, Any]] = {
    "compiled": dict(
        loads=("decode-heavy", "prefill-heavy"),
        engine=_BATCHES,
        ways={"base": {}, **_LOREFT, "LoReFT all, 64": dict(loreft="all", adapters=64)},
        rounds=4,
    ),
    "not compiled": dict(
        loads=("decode-heavy", "prefill-heavy"),
        engine=dict(_BATCHES, enforce_eager=True),
        ways={"base": {}, **_LOREFT, **{f"LoRA q, v, {n}": dict(lora=True, adapters=n) for n in COUNTS}},
        rounds=2,
    ),
    "prefix cache": dict(
        loads=("document", "two questions", "chat"),
        engine=dict(_CACHED, block_size=32),
        ways={
            "base": {},
            "LoReFT l7, 8": dict(loreft="l7", adapters=8),
            "LoReFT f7+l7, 8": dict(loreft="f7+l7", adapters=8),
            "LoReFT f7+l7 with marks, 1": dict(loreft="marked", adapters=1),
        },
        rounds=3,
    ),
    "scale": dict(
        loads=("512 rows", "long prompts"),
        engine=dict(_ROWS, block_size=32),
        ways={
            "base": {},
            "f7+l7, 8 of 8": dict(loreft="f7+l7", adapters=8),
            "f7+l7, 8 of 512": dict(loreft="f7+l7", adapters=512, active=8),
            "f7+l7, 512 of 512": dict(loreft="f7+l7", adapters=512),
            "all, 8 of 512": dict(loreft="all", adapters=512, active=8),
            "all, 512 of 512": dict(loreft="all", adapters=512),
        },
        rounds=2,
    ),
}
LOADS: dict[str, dict[str, Any]] = {
    "decode-heavy": dict(kind="batch", requests=64, prompt=16, new=32),
    "prefill-heavy": dict(kind="batch", requests=64, prompt=96, new=2),
    "document": dict(kind="document", documents=3, length=1040, question=24, ways=("base", "LoReFT l7, 8")),
    "two questions": dict(kind="questions", length=1040, ways=("base", "LoReFT f7+l7, 8")),
    "chat": dict(kind="chat", turns=10, message=40, new=20, ways=("base", "LoReFT f7+l7 with marks, 1")),
    "512 rows": dict(kind="batch", requests=512, prompt=16, new=6),
    "long prompts": dict(
        kind="batch",
        requests=8,
        prompt=1024,
        new=2,
        ways=("base", "f7+l7, 8 of 8", "f7+l7, 8 of 512", "all, 8 of 512"),
    ),
}
USER, ASSISTANT = [11, 12, 13], [11, 14, 13]
"""The headers of the chat's messages."""
_SPECS = {"f7+l7": {}, "l7": {}, "all": {}, "marked": dict(instruction_template=[USER], response_template=[ASSISTANT])}


def engine_of(settings: dict[str, Any]) -> tuple[str, int]:
    """What the engine of a way has: its kind of adapters, and how many."""
    kind = "lora" if settings.get("lora") else settings.get("loreft", "base")
    return kind, settings.get("adapters", 0)


def prepare(folder: Path, layers: int, engines: Iterable[tuple[str, int]]) -> None:
    """Write a model's config, and as many adapters of each kind as an engine loads. Each has weights of its own."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from peft_reft import LoReftConfig

    config = LlamaConfig(**{**SMOLLM2, "num_hidden_layers": layers, "max_position_embeddings": 2048})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder / "model")
    torch.manual_seed(0)
    most: dict[str, int] = {}
    for kind, count in engines:
        most[kind] = max(count, most.get(kind, 0))
    for kind, count in most.items():
        if kind == "base":
            continue
        peft: Any = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
        if kind != "lora":
            positions = "f7+l7" if kind == "marked" else kind
            fields = dict(r=4, positions=positions, init_weights="paper", **_SPECS[kind])
            peft = LoReftConfig(task_type="CAUSAL_LM", **fields)
        get_peft_model(LlamaForCausalLM(config), peft).save_pretrained(folder / kind)
        tensors = load_file(folder / kind / "adapter_model.safetensors")
        for k in range(count):
            own = folder / f"{kind}-{k}"
            own.mkdir()
            os.link(folder / kind / "adapter_config.json", own / "adapter_config.json")
            changed = {name: tensor + 1e-3 * k if name.endswith(".b") else tensor for name, tensor in tensors.items()}
            save_file(changed, own / "adapter_model.safetensors", metadata={"format": "pt"})


class Timed:
    """Sums up the seconds spent in functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, owner: object, name: str) -> None:
        """Time a function that stands in a module or a class."""
        function: Callable[..., Any] = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        setattr(owner, name, run)


class Server:
    """An engine of vLLM in this process, and its adapters."""

    def __init__(self, group: str, kind: str, count: int, folder: Path) -> None:
        from vllm import LLM

        self.kind, self.count, self.folder = kind, count, folder
        self.preparing = Timed()
        more: dict[str, Any] = {}
        if kind == "lora":
            more = dict(enable_lora=True, max_loras=count, max_lora_rank=8, max_cpu_loras=count)
        elif kind != "base":
            from peft_reft.serving import server, worker

            self.preparing.watch(worker.Batch, "pieces")
            self.preparing.watch(server.Server, "prepare")
            more = {"additional_config": {"loreft": {"adapters": {f"a{k}": self.path(k) for k in range(count)}}}}
        settings = {**GROUPS[group]["engine"], **more}
        model = str(folder / "model")
        self.llm = LLM(model, load_format="dummy", dtype="float32", skip_tokenizer_init=True, **settings)
        self.engine = self.llm.llm_engine
        self.block = self.engine.vllm_config.cache_config.block_size
        self.asked = 0
        self.active = count

    def path(self, k: int) -> str:
        return str(self.folder / f"{self.kind}-{k}")

    def send(self, ids: Sequence[int], new: int, k: int | None) -> str:
        """Add a request to the engine, under the adapter of number `k`, and return its id."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        chosen: dict[str, Any] = {}
        lora = None
        if k is not None and self.count:
            k %= self.active
            if self.kind == "lora":
                lora = LoRARequest(f"a{k}", k + 1, self.path(k))
            else:
                chosen = {"extra_args": {"loreft": f"a{k}"}}
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, **chosen)
        self.asked += 1
        self.engine.add_request(str(self.asked), {"prompt_token_ids": [*ids]}, params, lora_request=lora)
        return str(self.asked)

    def ask(self, ids: Sequence[int], new: int, k: int | None) -> tuple[float, int, list[int]]:
        """One request alone: seconds to its first token, how many tokens came from the cache, its answer."""
        began = time.perf_counter()
        self.send(ids, new, k)
        arrived: list[tuple[float, Any]] = []
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            arrived += [(time.perf_counter() - began, output) for output in outputs]
        last = arrived[-1][1]
        return arrived[0][0], last.num_cached_tokens, list(last.outputs[0].token_ids)

    # The loads. `draw(n)` makes n random tokens, the same in all engines.

    def batch(self, draw: Callable[[int], list[int]], requests: int, prompt: int, new: int) -> dict[str, float]:
        """Requests that come all at once; each names the next adapter."""
        prompts = [draw(prompt) for _ in range(requests)]
        began, prepared = time.perf_counter(), self.preparing.seconds
        for k, ids in enumerate(prompts):
            self.send(ids, new, k)
        first: dict[str, float] = {}
        steps, decodes = [], []
        while self.engine.has_unfinished_requests():
            all_decode = len(first) == requests
            before = time.perf_counter()
            for output in self.engine.step():
                first.setdefault(output.request_id, time.perf_counter() - began)
            steps.append(time.perf_counter() - before)
            if all_decode:
                decodes.append(steps[-1])
        return {
            "seconds": time.perf_counter() - began,
            "first": statistics.mean(first.values()),
            "tokens": requests * new,
            "decode": statistics.median(decodes),
            "preparing": (self.preparing.seconds - prepared) / sum(steps),
            "tables": self.bytes_of_tables(),
            "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }

    def document(
        self, draw: Callable[[int], list[int]], documents: int, length: int, question: int
    ) -> dict[str, float]:
        """Nine requests about a document, one after the other: the base's, and those of eight adapters."""
        firsts, found = [], []
        for _ in range(documents):
            document = draw(length)
            for k in (None, *range(8)):
                first, cached, _ = self.ask([*document, *draw(question)], 2, k)
                if k is not None:
                    firsts.append(first)
                    found.append(cached / (length + question))
        return {"first": statistics.median(firsts), "found": statistics.mean(found)}

    def questions(self, draw: Callable[[int], list[int]], length: int) -> dict[str, float]:
        """Two questions to one document: which share of the document's whole blocks the second finds."""
        document = draw(length)
        self.ask([*document, *draw(10)], 2, 0)
        first, cached, _ = self.ask([*document, *draw(21)], 2, 0)
        return {"first": first, "found": cached / (length // self.block * self.block)}

    def chat(self, draw: Callable[[int], list[int]], turns: int, message: int, new: int) -> dict[str, float]:
        """The turns of one chat, one after the other: how many tokens they compute, and how many are new."""
        history: list[int] = []
        known = computed = needed = 0
        firsts = []
        for turn in range(turns):
            prompt = [*history, *USER, *draw(message), *ASSISTANT]
            first, cached, answer = self.ask(prompt, new, 0)
            if turn > 0:
                firsts.append(first)
                computed += len(prompt) - cached
                needed += len(prompt) - known
            history = [*prompt, *answer]
            known = len(history) - 1  # the answer's last token has not been an input yet
        return {"first": statistics.mean(firsts), "computed": computed / (turns - 1), "new": needed / (turns - 1)}

    def bytes_of_tables(self) -> int:
        """Memory of the weights of all adapters that this engine could hold."""
        if self.kind in ("base", "lora"):
            return 0
        loreft = self.engine.model_executor.driver_worker.worker.loreft
        tables = [edits.table for edits in loreft.edits.values()]
        stacks = [stack for table in tables for stack in table.stacks.values()]
        return sum(tensor.numel() * tensor.element_size() for stack in stacks for tensor in stack.tensors())


def serve(group: str, kind: str, count: int, folder: Path) -> None:
    """Run the loads that standard input asks for, in an engine's process."""
    import torch

    server = Server(group, kind, count, folder)
    kinds = {"batch": server.batch, "document": server.document, "questions": server.questions, "chat": server.chat}
    # Load every LoRA, and compile what is left to compile.
    server.batch(lambda n: [*range(10, 10 + n)], requests=min(count or 8, 64), prompt=24, new=3)
    print("RESULT {}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        server.active = asked["active"]
        generator = torch.Generator().manual_seed(asked["turn"])
        load = {key: value for key, value in LOADS[asked["load"]].items() if key not in ("kind", "ways")}

        def draw(n: int, generator: torch.Generator = generator) -> list[int]:
            found: list[int] = torch.randint(100, 40000, (n,), generator=generator).tolist()
            return found

        found = kinds[LOADS[asked["load"]]["kind"]](draw, **load)
        print("RESULT " + json.dumps(found), flush=True)
