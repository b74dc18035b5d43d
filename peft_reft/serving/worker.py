"""In the worker: hooks in the served model, what each step edits, and adapters that come and go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..architectures import find_targets, skeleton
from .adapters import ServedAdapter, read_adapter
from .options import KEY, Options, check_name
from .plugin import check_version
from .schedule import NONE, Pieces, Plan, arrange, edited, same_plans
from .tables import DeviceWork, Kind, Table, kind_of, to_device

_ATTRIBUTE = "loreft_edits"


class Edits:
    """The edits of one module: a table of weights, and what of it the running step uses.

    Kept where vLLM keeps its attention layers (`static_forward_context`): a compiled graph names it by a string.
    """

    def __init__(self, name: str, table: Table) -> None:
        self.name = f"peft_reft.{name}"
        self.table = table
        self.work: list[tuple[Kind, DeviceWork]] = []
        """Empty in a step that edits nothing here. Modules with the same plans share the list."""

    def apply(self, hidden: Tensor, residual: Tensor | None) -> None:
        for kind, work in self.work:
            self.table.edit(kind, work, hidden, residual)


def _edit_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook. vLLM's blocks return hidden states and the residual to be added to them, or their sum.

    The hidden states are a new tensor that nobody else has yet, so they are edited in place.
    """
    hidden, residual = output if isinstance(output, tuple) else (output, None)
    edits: Edits = getattr(module, _ATTRIBUTE)
    if torch.compiler.is_compiling():
        torch.ops.peft_reft.edit(hidden, residual, edits.name)
    elif edits.work:
        edits.apply(hidden, residual)


def _edit(hidden: Tensor, residual: Tensor | None, name: str) -> None:
    from vllm.forward_context import get_forward_context

    edits: Edits = get_forward_context().no_compile_layers[name]
    edits.apply(hidden, residual)


def _edit_fake(hidden: Tensor, residual: Tensor | None, name: str) -> None:
    """For tracing: nothing but `hidden` changes."""


_library = torch.library.Library("peft_reft", "FRAGMENT")
if not hasattr(torch.ops.peft_reft, "edit"):
    _library.define("edit(Tensor(a!) hidden, Tensor? residual, str name) -> ()")
    _library.impl("edit", _edit, "CompositeExplicitAutograd")
    _library._register_fake("edit", _edit_fake)


class Server:
    """The adapters of one worker.

    Args:
        vllm_config: of the engine.
        runner: the worker's model runner, its model loaded.
    """

    def __init__(self, vllm_config: Any, runner: Any, options: Options) -> None:
        self.model: nn.Module = runner.get_model()
        self.hf_config = vllm_config.model_config.hf_config
        self.static = vllm_config.compilation_config.static_forward_context
        self.device = torch.device(runner.device)
        self.compiles = not vllm_config.model_config.enforce_eager
        named = {name: read_adapter(source, self.hf_config) for name, source in options.adapters.items()}
        self.max_adapters = options.max_adapters or max(8, len(named))
        self.max_rank = options.max_rank or max(8, *(a.rank for a in named.values()), 0)
        self.max_sets = options.max_positions or max(1, *(a.sets for a in named.values()), 1)
        self.slots: dict[str, int] = {}
        self.plans: list[dict[str, Plan]] = [{} for _ in range(self.max_adapters)]
        self.kinds: list[Kind | None] = [None] * self.max_adapters
        self.edits_answers = np.zeros(self.max_adapters + 1, dtype=bool)  # the last is that of slot -1: no adapter
        self.edits: dict[str, Edits] = {}
        self.groups: list[tuple[tuple[Plan | None, ...], list[tuple[Kind, DeviceWork]]]] = []
        blocks = find_targets(skeleton(self.hf_config), "block")
        self.d = blocks[0].d
        for target in blocks:  # also those that no adapter edits yet: a compiled model takes no hooks later
            self._hook(target.name)
        self.open = False
        for name, adapter in named.items():
            self.add(name, adapter)
        self.open = True

    def _hook(self, name: str) -> None:
        try:
            module = self.model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(
                f"vLLM's {type(self.model).__name__} has no module {name!r}, whose output is to be edited."
            ) from error
        table = Table(self.d, self.max_rank, self.max_adapters * self.max_sets, self.device)
        edits = self.edits[name] = Edits(name, table)
        self.static[edits.name] = edits
        setattr(module, _ATTRIBUTE, edits)
        module.register_forward_hook(_edit_output)

    def add(self, name: str, adapter: ServedAdapter) -> None:
        """Give an adapter a slot. Raises ValueError, with nothing changed, if there is no room for it."""
        check_name(name)
        if name in self.slots:
            raise ValueError(f"There is an adapter {name!r} already. Remove it first, or give another name.")
        if len(self.slots) == self.max_adapters:
            raise ValueError(f"There are {self.max_adapters} adapters already (max_adapters). Remove one first.")
        for limit, value in (("max_rank", adapter.rank), ("max_positions", adapter.sets)):
            allowed = self.max_rank if limit == "max_rank" else self.max_sets
            if value > allowed:
                raise ValueError(f"{name!r} needs {limit}={value}, and the engine has {limit}={allowed}.")
        new = [module for module in adapter.plans if module not in self.edits]
        if new and self.compiles and self.open:
            raise ValueError(
                f"{name!r} edits {new[0]}, which a compiled model cannot take on any more. Name an adapter that edits "
                "it when the engine starts, or start it with enforce_eager."
            )
        for module in new:
            self._hook(module)
        slot = min({*range(self.max_adapters)} - {*self.slots.values()})
        for module, factors in adapter.factors.items():
            self.edits[module].table.write(slot * self.max_sets, factors)
        self.slots[name] = slot
        self._set(slot, adapter.plans, kind_of(next(iter(adapter.factors.values()))))

    def remove(self, name: str) -> None:
        """Free an adapter's slot. No request may be using it."""
        self._set(self.slots.pop(name), {}, None)

    def _set(self, slot: int, plans: dict[str, Plan], kind: Kind | None) -> None:
        self.plans[slot] = plans
        self.kinds[slot] = kind
        self.edits_answers[slot] = any(plan.edits_answers for plan in plans.values())
        self.groups = []
        for key, modules in same_plans(self.edits, self.plans).items():
            work: list[tuple[Kind, DeviceWork]] = []
            self.groups.append((key, work))
            for module in modules:
                self.edits[module].work = work

    def prepare(self, pieces: Pieces) -> None:
        """Note what the coming step edits.

        Args:
            pieces: all requests of the step.
        """
        self.clear()
        some = (pieces.slot != NONE) & ((pieces.computed < pieces.prompt) | self.edits_answers[pieces.slot])
        if not some.any():
            return
        pieces = pieces[some]
        for plans, shared in self.groups:
            rows, sets, slots = edited(pieces, plans, self.max_sets)
            kinds = {self.kinds[slot] for slot in np.unique(slots)}
            for kind in kinds:
                if kind is not None:
                    of_kind = np.isin(slots, [slot for slot, each in enumerate(self.kinds) if each == kind])
                    shared.append((kind, to_device(arrange(rows[of_kind], sets[of_kind]), self.device)))

    def clear(self) -> None:
        for _, shared in self.groups:
            shared.clear()


def load_model(inner: Callable[..., None], worker: Any, *args: Any, **kwargs: Any) -> None:
    """`Worker.load_model`, and LoReFT's hooks in what it loaded."""
    inner(worker, *args, **kwargs)
    options = Options.read(worker.vllm_config.additional_config)
    if options is not None:
        check_version()
        check_engine(worker.vllm_config)
        _install(worker, options)


def _install(worker: Any, options: Options) -> None:
    runner = worker.model_runner
    server = worker.loreft = Server(worker.vllm_config, runner, options)
    # Compiled graphs are kept on disk by a hash that has this in it: one without these hooks must not be taken.
    worker.vllm_config.additional_config[KEY]["edited_modules"] = sorted(server.edits)
    forward = runner._model_forward

    def edited_forward(*args: Any, **kwargs: Any) -> Any:
        server.prepare(_pieces(runner, server.slots))
        try:
            return forward(*args, **kwargs)
        finally:
            server.clear()  # warm-up and dummy runs call the model without passing here

    runner._model_forward = edited_forward


def _pieces(runner: Any, slots: dict[str, int]) -> Pieces:
    """The requests of the step that a model runner is about to run."""
    batch, n = runner.input_batch, runner.input_batch.num_reqs
    chosen = [_slot(runner.requests[request].sampling_params, slots) for request in batch.req_ids[:n]]
    starts = runner.query_start_loc.np[: n + 1].astype(np.int64)
    computed, prompt = (
        values[:n].astype(np.int64) for values in (batch.num_computed_tokens_cpu, batch.num_prompt_tokens)
    )
    return Pieces(starts[:-1], np.diff(starts), computed, prompt, np.array(chosen, dtype=np.int64))


def _slot(params: Any, slots: dict[str, int]) -> int:
    name = None if params is None or params.extra_args is None else params.extra_args.get(KEY)
    return NONE if name is None else slots[name]


def check_engine(vllm_config: Any) -> None:
    """Raise ValueError if the engine has something that LoReFT does not go together with, or was not tested with."""
    parallel = vllm_config.parallel_config
    ranks = {name: getattr(parallel, f"{name}_parallel_size") for name in ("tensor", "pipeline", "data")}
    for name, size in ranks.items():
        if size > 1:
            raise ValueError(f"{name}_parallel_size={size}: LoReFT is served by one worker (allowed: 1).")
    if vllm_config.speculative_config is not None:
        raise ValueError("speculative_config: LoReFT is not served with speculative decoding; leave it out.")
    if vllm_config.model_config.runner_type != "generate":
        raise ValueError(f"runner={vllm_config.model_config.runner_type!r}: LoReFT serves 'generate' alone.")
    if vllm_config.model_config.is_encoder_decoder:
        raise ValueError("LoReFT serves decoders; this model is an encoder-decoder.")
    if parallel.enable_dbo:
        raise ValueError("enable_dbo=True: LoReFT needs each step in one batch; leave it out.")
    if vllm_config.use_v2_model_runner:
        raise ValueError("LoReFT needs vLLM's first model runner: set VLLM_USE_V2_MODEL_RUNNER=0.")


def add(worker: Any, name: str, source: str) -> dict[str, str]:
    """For `collective_rpc("loreft_add", args=(name, source))`: load an adapter.

    Returns:
        Its `fingerprint`, or what is wrong as `error`: an exception here would count as the worker's failure.
    """
    try:
        server: Server = worker.loreft
        adapter = read_adapter(source, server.hf_config)
        server.add(name, adapter)
    except Exception as error:
        return {"error": str(error)}
    return {"fingerprint": adapter.fingerprint}


def remove(worker: Any, name: str) -> None:
    """For `collective_rpc("loreft_remove", args=(name,))`: drop an adapter that no request uses."""
    worker.loreft.remove(name)
