"""The engine in the trainer's own process (`vllm_mode="colocate"`): requests have the policy.

TRL makes it by `LLM(...)`, with fixed arguments. While it does so, `LLM` means a subclass, which adds the arguments
that the plugin needs. The subclass also names the adapter in each request. So nobody who generates with the trainer's
engine gets the base model's answers by mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from tempfile import TemporaryDirectory
from typing import Any

from ...patching import replaced
from ...serving import AdapterFiles, add_adapter
from ...serving.options import KEY, PROMPT_LENGTH
from .policy import Policy
from .turns import Histories

NAME = "policy"
"""What the engine calls the adapter."""

_MIXED = {"bf16": "bfloat16", "fp16": "float16"}


class Colocated:
    """The way of the adapter to an engine in this process."""

    def __init__(self, generation: Any) -> None:
        self.generation = generation

    def send(self, files: AdapterFiles) -> None:
        """Replace the adapter in the engine. Cached blocks that the earlier one has edited are not found again."""
        generation = self.generation
        if generation.enable_sleep_mode:
            from trl.generation.vllm_generation import empty_cache

            empty_cache()  # as TRL does
            generation.llm.wake_up(tags=["weights"])
            generation._llm_weights_sleeping = False
        add_adapter(generation.llm, NAME, files, replace=True)


def start(inner: Callable[[Any], None], generation: Any, policy: Policy, arguments: Mapping[str, Any]) -> Colocated:
    """Make the engine.

    Args:
        inner: TRL's `VLLMGeneration._init_vllm`.
        generation: its instance.
        policy: the adapter that is trained.
        arguments: for vLLM's `LLM`; they replace TRL's.
    """
    from trl.generation import vllm_generation

    # The engine reads the adapter when it starts: its rank, which modules it edits, and whether it edits answers.
    with TemporaryDirectory(prefix="loreft-") as folder:
        policy.files(generation).write(folder)
        make = partial(_make, policy=policy, folder=folder, dtype=dtype_of(generation), more=arguments)
        with replaced(vllm_generation, "LLM", make):
            inner(generation)
    return Colocated(generation)


def dtype_of(generation: Any) -> str:
    """The dtype in which the trainer computes. By default vLLM makes 16 bits of a checkpoint's 32."""
    mixed = _MIXED.get(generation.accelerator.mixed_precision)
    return mixed or str(generation.model.get_base_model().dtype).removeprefix("torch.")


def _make(policy: Policy, folder: str, dtype: str, more: Mapping[str, Any], **trl: Any) -> Any:
    """Make the engine that TRL asks for with the arguments `trl`."""
    if trl.get("quantization") is None:
        trl["dtype"] = dtype
    additional = dict(more.get("additional_config", {}))
    additional[KEY] = {"adapters": {NAME: folder}, "max_adapters": 1, **additional.get(KEY, {})}
    return engine_class()(policy, **{**trl, **more, "additional_config": additional})


@cache
def engine_class() -> Any:
    """The subclass of vLLM's `LLM`."""
    from vllm import LLM

    class RolloutEngine(LLM):
        """An engine whose requests have the policy, unless they name another adapter."""

        def __init__(self, policy: Policy, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.policy = policy
            self.histories = Histories()

        def generate(self, prompts: Any, sampling_params: Any = None, **more: Any) -> Any:
            """See `LLM.generate`."""
            ids = _token_ids(prompts)
            lengths: list[int | None] = [None] * len(ids)
            follows = bool(ids) and not self.policy.config.response_template
            if follows:
                lengths = self.histories.prompt_lengths(ids)
            params = self._with_policy(sampling_params, lengths)
            outputs = super().generate(prompts, params, **more)
            if follows:
                for prompt, length, output in zip(ids, lengths, outputs):
                    for answer in output.outputs:
                        self.histories.note(prompt, answer.token_ids, length)
            return outputs

        def chat(self, messages: Any, sampling_params: Any = None, *more: Any, **named: Any) -> Any:
            """See `LLM.chat`."""
            return super().chat(messages, self._with_policy(sampling_params, []), *more, **named)

        def _with_policy(self, sampling_params: Any, lengths: Sequence[int | None]) -> Any:
            if sampling_params is None:
                sampling_params = self.get_default_sampling_params()
            if isinstance(sampling_params, Sequence):
                each = zip(sampling_params, lengths or [None] * len(sampling_params))
                return [with_policy(params, length) for params, length in each]
            if any(length is not None for length in lengths):
                return [with_policy(sampling_params, length) for length in lengths]
            return with_policy(sampling_params)

        def beam_search(self, *args: Any, **kwargs: Any) -> Any:
            """Refuse it: its steps do not carry the adapter."""
            raise ValueError(
                "beam search cannot be combined with a LoReFT adapter, and this engine's requests have one."
            )

        def sleep(self, level: int = 1, *args: Any, **kwargs: Any) -> Any:
            """See `LLM.sleep`. Level 2 would throw the base model's weights away, and nobody sends them again."""
            return super().sleep(1 if level == 2 else level, *args, **kwargs)

    return RolloutEngine


def with_policy(params: Any, prompt_length: int | None = None) -> Any:
    """A copy of sampling parameters that names the policy."""
    extra = {KEY: NAME, **(params.extra_args or {})}
    if prompt_length is not None:
        extra.setdefault(PROMPT_LENGTH, prompt_length)
    params = params.clone()
    params.extra_args = extra
    return params


def _token_ids(prompts: Any) -> list[Sequence[int]]:
    """The token ids of the prompts; empty unless all prompts are given as token ids."""
    if not isinstance(prompts, Sequence):
        return []
    found: list[Sequence[int]] = []
    for prompt in prompts:
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
        if ids is None:
            return []
        found.append(ids)
    return found
