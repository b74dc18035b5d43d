"""Continuous batching of transformers (`generate_batch`): each step holds pieces of several requests.

The forward of a step does not say where prompts end. The manager that transformers makes for a run knows all requests,
so it is noted when it is made. Blocks of its cache are shared between requests of equal tokens; a block with edited
tokens gets a key of its own, so that no request reads a block that was edited otherwise.
"""

from __future__ import annotations

import copy
import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..patching import original_of, wrap
from ..positions.batch import POSITIONS, SUBSPACES
from ..positions.pieces import Piece, Pieces
from ..positions.sources import CONTINUOUS_BATCHING
from .forward import ATTRIBUTE, Attachment, LayerPlan
from .layer import LoReftLayer


def generate_batch(model: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
    """The wrapped `generate_batch`, which drops arguments that it does not know.

    Raises:
        ValueError: one of these is LoReFT's.
    """
    for name in (POSITIONS, SUBSPACES, "adapter_names"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}={kwargs[name]!r}: `generate_batch` has no such argument (allowed: None).")
    outputs = original_of(model, "generate_batch", inner)(*args, **kwargs)
    attachment: Attachment | None = model.__dict__.get(ATTRIBUTE)
    if attachment is not None and attachment.rollouts is not None:
        written = [output for output in outputs.values() if output.generated_tokens]
        attachment.rollouts.note(
            (plan.wanted for plan in _active_plans(attachment)),
            [output.prompt_ids for output in written],
            [output.generated_tokens[0] for output in written],
        )
    return outputs


def init_batching(
    model: Any,
    inner: Any,
    generation_config: Any = None,
    continuous_batching_config: Any = None,
    workload_hints: Any = None,
) -> Any:
    """The wrapped `init_continuous_batching`, which makes the manager of a run.

    Raises:
        ValueError: steps would run as graphs or compiled, without the hooks of LoReFT.
    """
    original = original_of(model, "init_continuous_batching", inner)
    attachment: Attachment | None = model.__dict__.get(ATTRIBUTE)
    if attachment is None:
        return original(generation_config, continuous_batching_config, workload_hints)
    manager = original(
        generation_config, _without_graphs(model, generation_config, continuous_batching_config), workload_hints
    )
    chosen = manager.continuous_batching_config
    for name in ("varlen_compile_config", "decode_compile_config"):
        if getattr(chosen, name) is not None:
            raise ValueError(
                f"{name}={getattr(chosen, name)!r}: a compiled step does not know which of its tokens LoReFT edits "
                "(allowed: None; `compile_config` of the generation config and `default_compile_level` set it, too)."
            )
    living = [each for each in attachment.managers if each() is not None]
    if all(each() is not manager for each in living):  # a persistent manager is given again
        living.append(weakref.ref(manager))
        _Shares(model, manager)
    attachment.managers = living
    return manager


def _without_graphs(model: Any, generation_config: Any, config: Any) -> Any:
    """The config of a run without CUDA graphs, which replay a step without asking what it edits."""
    from transformers import ContinuousBatchingConfig

    if config is None:  # transformers looks there, too
        config = getattr(generation_config or model.generation_config, "continuous_batching_config", None)
    if not isinstance(config, ContinuousBatchingConfig):
        config = ContinuousBatchingConfig()
    if config.use_cuda_graph is None:
        config = copy.copy(config)
        config.use_cuda_graph = False
    wanted = config.use_cuda_graph
    if any(wanted) if isinstance(wanted, tuple) else wanted:
        raise ValueError(
            f"use_cuda_graph={wanted!r}: a graph does not know which of a step's tokens LoReFT edits (allowed: False)."
        )
    return config


def pieces_of_step(attachment: Attachment, given: dict[str, Any]) -> Pieces:
    """The position source of a step of continuous batching.

    Args:
        attachment: of the model.
        given: the inputs of the forward, by name.

    Raises:
        ValueError: no manager of the model has the cache of this forward.
    """
    tokens: Tensor = given["input_ids"]  # (1, seq)
    for each in attachment.managers:
        manager = each()
        processor = None if manager is None else manager.batch_processor
        if processor is None or processor.cache is not given.get("cache"):
            continue
        step = processor.inputs_and_outputs
        if hasattr(step, "io_pairs"):  # two steps are in work; this one has just been prepared
            step = step.io_pairs[step.current_pair].host_io
        pieces = []
        for request in step.requests_in_batch:
            count = request.query_length
            computed = request.state.position_offset - count  # transformers has moved the offset on already
            pieces.append(Piece(given_ids(request.state), computed, count))
        return Pieces(pieces, (1, tokens.shape[1]), tokens.device)
    raise ValueError(CONTINUOUS_BATCHING)


class _Shares:
    """How the blocks of a run's cache are shared: if the same weights edit the same of their tokens.

    It holds its model and manager weakly, because both would hold it.
    """

    def __init__(self, model: Any, manager: Any) -> None:
        self._model = weakref.ref(model)
        self._manager = weakref.ref(manager)
        self._weights: str | None = None
        wrap(manager, "_create_batch_processor", self._create)
        wrap(manager, "pause", self._pause)

    def _create(self, inner: Callable[..., Any]) -> Any:
        """Begin a run, whose cache is empty (`_create_batch_processor`)."""
        from transformers.generation.continuous_batching.cache_allocators import cache_allocator

        self._weights = None
        processor = inner()
        wrap(cache_allocator, "compute_block_hash", hash_block)
        wrap(processor.cache, "search_prefix_match", self._search)
        return processor

    @contextmanager
    def _pause(self, inner: Callable[..., Any]) -> Iterator[None]:
        """Let another thread change the weights (`pause`)."""
        with inner():
            try:
                yield
            finally:
                self._weights = None

    def _search(self, inner: Callable[..., int], request_id: str, ids: list[int]) -> int:
        """Look for the beginning of a new request in the cache. From now on its tokens note what is edited of them."""
        manager, model = self._manager(), self._model()
        if manager is None or model is None or ATTRIBUTE not in model.__dict__:
            return inner(request_id, ids)
        attachment: Attachment = model.__dict__[ATTRIBUTE]
        plans = _active_plans(attachment)
        state = manager.batch_processor.scheduler.waiting_requests.get(request_id)
        if state is None or not plans:
            return inner(request_id, ids)
        if self._weights is None:
            self._weights = _digest(attachment)
        edits = EditsOfBlocks(self._weights, plans, given_ids(state))
        state.initial_tokens = EditedTokens(state.initial_tokens, edits)
        state.remaining_prefill_tokens = EditedTokens(state.remaining_prefill_tokens, edits)
        return inner(request_id, state.remaining_prefill_tokens)


def given_ids(state: Any) -> list[int]:
    """The token ids that a request was given. A request that is computed anew begins with what it had generated."""
    length = state._true_initial_tokens or len(state.initial_tokens)
    return list(state.initial_tokens[:length])


def _active(attachment: Attachment) -> Iterator[tuple[LoReftLayer, str]]:
    """Each layer that edits, with each adapter that is active there."""
    for layer in attachment.layers:
        if isinstance(layer, LoReftLayer) and not layer.disable_adapters and not layer.merged:
            yield from ((layer, name) for name in layer.active_adapters if name in layer.plans)


def _active_plans(attachment: Attachment) -> list[LayerPlan]:
    """What the active adapters do in layers, each way of it once."""
    return list(dict.fromkeys(layer.plans[name] for layer, name in _active(attachment)))


def _digest(attachment: Attachment) -> str:
    """A digest of the active adapters' weights and scales."""
    digest = hashlib.sha256()
    for layer, name in _active(attachment):
        digest.update(f"{name} {layer.scaling[name]!r}".encode())
        for tensor in layer.weights(name).state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class EditsOfBlocks:
    """Which tokens of one request are edited.

    Args:
        weights: a digest of what edits them.
        plans: what they do in layers.
        ids: token ids that the request was given.
    """

    def __init__(self, weights: str, plans: Sequence[LayerPlan], ids: list[int]) -> None:
        self.weights = weights
        self.plans = plans
        self.ids = ids
        self._of_prompt = self._edited(len(ids))

    def element(self, start: int, stop: int) -> bytes | None:
        """What is edited in the tokens `start` to `stop`, as a digest; None if nothing is."""
        edited = self._of_prompt if stop <= len(self.ids) else self._edited(stop)
        inside = [(number, which, index - start) for number, which, index in edited if start <= index < stop]
        if not inside:
            return None
        return hashlib.sha256(f"{self.weights} {inside}".encode()).digest()

    def _edited(self, stop: int) -> list[tuple[int, int, int]]:
        """Each edit of the tokens up to `stop`: the number of its plan, of its set of weights, the token's index."""
        whole = Pieces([Piece(self.ids, computed=0, count=stop)], (1, stop), torch.device("cpu"))
        found: list[tuple[int, int, int]] = []
        for number, plan in enumerate(self.plans):
            slots = whole.slots(plan.wanted)
            if slots is None:
                continue
            of_group = dict(zip(plan.wanted.layout, plan.wanted.layout.columns(slots, stop)))
            before = 0  # sets of weights of the groups before
            for group in plan.groups:
                for slot, column in enumerate(of_group[group][0].tolist()):
                    # Slots of several answers stand one after the other.
                    which = before + slot % (group.count or 1) if plan.sharing == "position" else before
                    if column >= 0:
                        found.append((number, which, column))
                if plan.sharing != "all":
                    before += (group.count or 1) if plan.sharing == "position" else 1
        return sorted(found)


class EditedTokens(list[int]):
    """Token ids of a request that note what is edited of them, and where in the request they begin.

    transformers cuts a request's ids into blocks and hashes each (`compute_block_hash`).
    """

    def __init__(self, ids: Iterable[int], edits: EditsOfBlocks, start: int = 0) -> None:
        super().__init__(ids)
        self.edits = edits
        self.start = start

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        if not isinstance(key, slice):
            return found
        first, _, step = key.indices(len(self))
        assert step == 1
        return EditedTokens(found, self.edits, self.start + first)

    def __add__(self, other: list[int]) -> EditedTokens:  # type: ignore[override]  # ids are added alone
        return EditedTokens(super().__add__(other), self.edits, self.start)

    def __deepcopy__(self, memo: dict[int, Any]) -> EditedTokens:
        return EditedTokens(self, self.edits, self.start)  # of a fork of the request


def hash_block(inner: Callable[..., int], parent: int | None, tokens: list[int]) -> int:
    """Hash a block; one with edited tokens has another hash than the base model's (`compute_block_hash`)."""
    found = inner(parent, tokens)
    if not isinstance(tokens, EditedTokens):
        return found
    element = tokens.edits.element(tokens.start, tokens.start + len(tokens))
    if element is None:
        return found
    digest = hashlib.blake2b(found.to_bytes(8, "little") + element, digest_size=8).digest()
    return int.from_bytes(digest, "little")
