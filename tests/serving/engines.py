"""Engines of vLLM on tiny random models, and the answers of transformers to the same requests (`make test-vllm`)."""

import os

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # run the engine in this process, so that tests can look into it
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
)

import gc
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from conftest import greedy_answer, randomise
from peft import PeftModel, get_peft_model
from safetensors.torch import load, save

from peft_reft import LoReftConfig
from peft_reft.serving import AdapterFiles

SECOND_RUNNER = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
"""Whether vLLM's second model runner runs (`make test-vllm RUNNER=2`)."""

VOCAB = 96
_SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=2,  # of size 32, the smallest for which vLLM has a kernel on a CPU
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GQA = dict(_SIZES, num_key_value_heads=1)
FAMILIES = {
    "llama": ("Llama", _GQA),
    "qwen2": ("Qwen2", _GQA),
    "qwen3": ("Qwen3", dict(_GQA, head_dim=32)),
    "mistral": ("Mistral", dict(_GQA, sliding_window=None)),
    "gemma": ("Gemma", dict(_GQA, head_dim=32)),
    "gemma2": ("Gemma2", dict(_GQA, head_dim=32, query_pre_attn_scalar=32, sliding_window=512)),
    "gemma3": ("Gemma3", dict(_GQA, head_dim=32, query_pre_attn_scalar=32, sliding_window=512)),
    "gpt2": ("GPT2", dict(vocab_size=VOCAB, n_embd=64, n_layer=3, n_head=2, n_positions=512, bos_token_id=1)),
    "opt": ("OPT", dict(_SIZES, ffn_dim=96, word_embed_proj_dim=64)),
    "gpt_neox": ("GPTNeoX", _SIZES),
    "phi": ("Phi", _SIZES),
}
_CAUSAL = {"GPT2": "GPT2LMHeadModel"}
_CONFIG = {"Gemma3": "Gemma3TextConfig"}


@dataclass
class Served:
    """A tiny model on disk, adapters for it, and what transformers generates with them."""

    family: str
    folder: str
    adapters: dict[str, str] = field(default_factory=dict)
    models: dict[str, torch.nn.Module] = field(default_factory=dict)
    known: dict[tuple, tuple[list[int], list[float]]] = field(default_factory=dict)

    def load(self) -> torch.nn.Module:
        name = _CAUSAL.get(FAMILIES[self.family][0], f"{FAMILIES[self.family][0]}ForCausalLM")
        model = getattr(transformers, name).from_pretrained(self.folder, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None  # each test says how many tokens it wants
        model.generation_config.pad_token_id = 0
        return model

    def add(self, name: str, scale: float = 0.5, seed: int = 1, **fields: object) -> str:
        """Make and save an adapter with large random edits."""
        model = get_peft_model(self.load(), LoReftConfig(task_type="CAUSAL_LM", **{"r": 4, **fields}))
        randomise(model, scale, seed)
        folder = os.path.join(os.path.dirname(self.folder), f"{self.family}-{name}")
        model.save_pretrained(folder)
        self.adapters[name] = folder
        self.models.pop(name, None)
        self.known = {key: answer for key, answer in self.known.items() if key[1] != name}
        return folder

    def expected(self, prompt: list[int], adapter: str | None, tokens: int) -> tuple[list[int], list[float]]:
        """Greedy tokens and their log-probabilities from `PeftModel.generate`, for one request alone."""
        key = (tuple(prompt), adapter, tokens)
        if key not in self.known:
            self.known[key] = self._generate(prompt, adapter, tokens)
        return self.known[key]

    def _generate(self, prompt: list[int], adapter: str | None, tokens: int) -> tuple[list[int], list[float]]:
        key = adapter or ""
        if key not in self.models:
            base = self.load()
            self.models[key] = PeftModel.from_pretrained(base, self.adapters[adapter]).eval() if adapter else base
        return greedy_answer(self.models[key], prompt, tokens)


# Every formula, group, union, value of `tie` and component; a spec or rank for each layer.
ADAPTERS = {
    "f7+l7": dict(positions="f7+l7", r=8),
    "f": dict(positions="f3"),
    "l": dict(positions="l1", r=1),
    "l~": dict(positions="l3~2"),
    "p": dict(positions="p"),
    "g": dict(positions="g"),
    "gN": dict(positions="g2"),
    "all": dict(positions="all"),
    "f+l+g": dict(positions="f2+l2+g3", tie="group"),
    "p+g by group": dict(positions="p+g", tie="group"),
    "by position": dict(positions="f3+l4", tie="position"),
    "by position, answers": dict(positions="l2+g2", tie="position"),
    "one for all layers": dict(positions="f2+l2", tie="model"),
    "per layer": dict(positions={"0": "f5", "1-": "l5+g1"}),
    "ranks": dict(positions="f2+l2", r={"0": 2, "1-": 8}),
    "some layers": dict(positions="l4", layers=[0, 2]),
    "attention": dict(positions="f2+l2", component="attention"),
    "mlp": dict(positions="all", component="mlp"),
    "heads": dict(positions="f2+l2+g1", component="heads", r=2),
    "heads, bias": dict(positions="all", component="heads", intervention="bias"),
    "by name": dict(positions="l3", target_modules=["model.layers.1"]),
    "noreft": dict(intervention="noreft", positions="f2+l2"),
    "direft": dict(intervention="direft", positions="f2+l2"),
    "nodireft": dict(intervention="nodireft", positions="f2+l2+g"),
    "consreft": dict(intervention="consreft", positions="f2+l2"),
    "lobireft": dict(intervention="lobireft", positions="f2+l2"),
    "red": dict(intervention="red", positions="p+g2"),
    "bias": dict(intervention="bias", positions="f2+l2", tie="group"),
    "relu": dict(act_fn="relu", positions="f2+l2"),
    "noreft, gelu": dict(intervention="noreft", act_fn="gelu", positions="l3", tie="position"),
    "gated": dict(gate=True, positions="f2+l2+g1"),
}


def fields(name):
    chosen = dict(ADAPTERS[name])
    return chosen if chosen.get("intervention") not in ("red", "bias") else {**chosen, "r": 8}


def make(family: str, folder: str) -> Served:
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, _CONFIG.get(name, f"{name}Config"))(**sizes)
    model = getattr(transformers, _CAUSAL.get(name, f"{name}ForCausalLM"))(config)
    with torch.no_grad():  # a freshly initialised model of this size says the same token to every prompt
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    path = os.path.join(folder, family)
    model.save_pretrained(path)
    return Served(family, path)


def padded(folder: str, padding: int) -> AdapterFiles:
    """The files of an adapter with so many characters in the metadata of its weights."""
    files = AdapterFiles.read(folder)
    return AdapterFiles(files.config, save(load(files.weights), {"format": "pt", "padding": "x" * padding}))


def quick_alone(quick, cases):
    """Parameters of a test of which `quick` alone are not marked slow."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@contextmanager
def engine(served: Served, named: list[str] | None = None, loreft: dict | None = None, **settings: object):
    """An `LLM` that serves the adapters `named` (None: all). A process can have only one at a time."""
    from vllm import LLM

    adapters = {name: path for name, path in served.adapters.items() if named is None or name in named}
    usual = dict(
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        block_size=32,
        seed=0,
        disable_log_stats=True,
        generation_config="vllm",
        additional_config={"loreft": {"adapters": adapters, **(loreft or {})}},
    )
    llm = LLM(served.folder, **{**usual, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def params(adapter: str | None, tokens: int, **fields: object):
    from vllm import SamplingParams

    chosen = {"extra_args": {"loreft": adapter}} if adapter else {}
    usual = dict(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False)
    return SamplingParams(**{**usual, **chosen, **fields})


def answer(completion) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities of a completion by vLLM."""
    tokens = list(completion.token_ids)
    return tokens, [step[token].logprob for step, token in zip(completion.logprobs, tokens)]


def check(served: Served, requests: list[tuple[list[int], str | None]], outputs, tokens: int) -> None:
    """Every request's tokens and log-probabilities are those of transformers."""
    for (prompt, adapter), output in zip(requests, outputs):
        found, wanted = answer(output.outputs[0]), served.expected(prompt, adapter, tokens)
        assert found[0] == wanted[0], (adapter, len(prompt))
        assert found[1] == pytest.approx(wanted[1], abs=2e-4), (adapter, len(prompt))


def ask(llm, requests: list[tuple[list[int], str | None]], tokens: int):
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    return llm.generate(prompts, [params(adapter, tokens) for _, adapter in requests], use_tqdm=False)


def steps(llm, arrivals, tokens):
    """Requests that arrive while others run: one before each step of the engine."""
    core = llm.llm_engine
    done, waiting = {}, list(enumerate(arrivals))
    while waiting or core.has_unfinished_requests():
        if waiting:
            n, (prompt, adapter) = waiting.pop(0)
            core.add_request(str(n), {"prompt_token_ids": prompt}, params(adapter, tokens))
        done |= {int(output.request_id): output for output in core.step() if output.finished}
    return [done[n] for n in range(len(arrivals))]


def note_preempted(llm) -> list[object]:
    """A list to which each request is added that is preempted from now on."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted, preempt = [], scheduler._preempt_request

    def note_and_preempt(request, *args, **kwargs):
        preempted.append(request)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = note_and_preempt
    return preempted
