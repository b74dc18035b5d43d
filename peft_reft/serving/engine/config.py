"""The engine's config (`VllmConfig`) and its version.

What is read, called or replaced:

========================================================= ==================================================== =====
attribute                                                 used for                                             since
========================================================= ==================================================== =====
`vllm.__version__`                                        an engine of a version never seen checks itself      0.28
`vllm.forward_context.get_forward_context`                what the running step can name                       0.28
`ForwardContext.no_compile_layers`                        from a name in a compiled graph to our edits         0.28
`VllmConfig.additional_config`                            our options; part of the key of compiled graphs      0.28
`VllmConfig.model_config`                                 the parts of the config below                        0.28
`VllmConfig.parallel_config`                              the same                                             0.28
`VllmConfig.compilation_config`                           the same                                             0.28
`VllmConfig.scheduler_config`                             the same                                             0.28
`VllmConfig.cache_config`                                 the same                                             0.28
`VllmConfig.speculative_config`                           drafts that are not n-grams are refused              0.28
`SpeculativeConfig.method`                                the same                                             0.28
`SchedulerConfig.async_scheduling`                        such drafts are refused, too                         0.28
`VllmConfig.use_v2_model_runner`                          drafts in the second model runner are refused        0.28
`ModelConfig.hf_config`                                   transformers' config of the model                    0.28
`ModelConfig.enforce_eager`                               whether the model is compiled                        0.28
`ModelConfig.runner_type`                                 models that do not generate are refused              0.28
`ModelConfig.is_encoder_decoder`                          encoder-decoders are refused                         0.28
`ModelConfig.model`                                       the model's name, for messages                       0.28
`ParallelConfig.tensor_parallel_size`                     whether `enable_sp` below does anything              0.28
`ParallelConfig.prefill_context_parallel_size`            context parallelism is refused                       0.28
`ParallelConfig.decode_context_parallel_size`             the same                                             0.28
`ParallelConfig.use_sequence_parallel_moe`                refused: it divides the tokens among workers         0.28
`ParallelConfig.enable_dbo`                               dual-batch overlap is refused                        0.28
`CompilationConfig.pass_config`                           the setting below                                    0.28
`PassConfig.enable_sp`                                    refused, as above; 0.32 and later have none          0.28
`CacheConfig.kv_sharing_fast_prefill`                     layers that skip tokens of the prompt are refused    0.28
`CompilationConfig.cudagraph_mode`                        whether steps are captured as graphs                 0.28
`CompilationConfig.static_forward_context`                holds what compiled graphs name                      0.28
========================================================= ==================================================== =====
"""

from __future__ import annotations

import re
from typing import Any

OLDEST, NEWEST = (0, 28), (0, 32)
"""The tests have run with these versions of vLLM and with all between them."""

TESTED = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
"""The same, for messages."""


def version() -> str:
    """The installed version of vLLM."""
    import vllm

    found: str = vllm.__version__
    return found


def is_seen(version: str) -> bool:
    """Whether the tests have run with this version of vLLM, such as "0.32.0" or "0.33.1rc2.dev5+gabc"."""
    numbers = re.match(r"(\d+)\.(\d+)\.\d+(\+|$)", version)
    return numbers is not None and OLDEST <= (int(numbers[1]), int(numbers[2])) <= NEWEST


def additional_config(config: Any) -> object:
    """What the user passed as `additional_config`."""
    return config.additional_config


def add_to_graph_key(config: Any, name: str, value: object) -> None:
    """Make `value` part of the key that compiled graphs are kept by on disk."""
    config.additional_config = {**config.additional_config, name: value}


def transformers_config(config: Any) -> Any:
    """The model's config as transformers reads it."""
    return config.model_config.hf_config


def compiles(config: Any) -> bool:
    """Whether the engine compiles the model."""
    return not config.model_config.enforce_eager


def captures_graphs(config: Any) -> bool:
    """Whether the engine captures its steps as graphs."""
    mode: str = config.compilation_config.cudagraph_mode.name
    return mode != "NONE"


def named_in_graphs(config: Any) -> dict[str, Any]:
    """Objects that compiled graphs can name. What is added here, `find_named` finds while a step runs."""
    found: dict[str, Any] = config.compilation_config.static_forward_context
    return found


def find_named(name: str) -> Any:
    """The object that a compiled graph means by `name`, while a step runs."""
    from vllm.forward_context import get_forward_context

    return get_forward_context().no_compile_layers[name]


def check_engine(config: Any) -> None:
    """Raise ValueError if the engine does something that LoReFT does not support, or was not tested with."""
    parallel = config.parallel_config
    model = config.model_config
    context_sizes = {
        "prefill_context_parallel_size": parallel.prefill_context_parallel_size,
        "decode_context_parallel_size": parallel.decode_context_parallel_size,
    }
    for name, size in context_sizes.items():
        if size > 1:
            raise ValueError(f"{name}={size}: LoReFT was not tested with a context on several workers (allowed: 1).")
    # Two settings by which a block's output is a part of the step's tokens on each worker.
    if parallel.use_sequence_parallel_moe:
        raise ValueError(
            "enable_expert_parallel=True with tensor and data parallelism divides a step's tokens among workers, and "
            "LoReFT needs all of them (allowed: False, or one of the two)."
        )
    divides_tokens = getattr(config.compilation_config.pass_config, "enable_sp", False)
    if parallel.tensor_parallel_size > 1 and divides_tokens:
        raise ValueError(
            "compilation_config.pass_config.enable_sp=True divides a step's tokens among workers, and LoReFT needs "
            "all of them (allowed: False)."
        )
    if parallel.enable_dbo:
        raise ValueError("enable_dbo=True: LoReFT needs each step in one batch (allowed: False).")
    if config.cache_config.kv_sharing_fast_prefill:
        raise ValueError(
            "kv_sharing_fast_prefill=True: LoReFT needs a prompt's tokens in all layers (allowed: False)."
        )
    speculative = config.speculative_config
    if speculative is not None:
        if speculative.method != "ngram":
            raise ValueError(
                f"speculative_config has method={speculative.method!r}: LoReFT was tested with n-grams of the text as "
                "drafts (allowed: 'ngram')."
            )
        if config.use_v2_model_runner:
            raise ValueError(
                "speculative_config is set: LoReFT was not tested with drafts in vLLM's second model runner (allowed: "
                "VLLM_USE_V2_MODEL_RUNNER=0, or no drafts)."
            )
        if config.scheduler_config.async_scheduling:
            raise ValueError(
                "async_scheduling=True with speculative_config: the next step is prepared before drafts are verified, "
                "so an answer's tokens could not be counted (allowed: False)."
            )
    if model.is_encoder_decoder:
        raise ValueError(f"{model.model} is an encoder-decoder: LoReFT is served with decoder-only models.")
    if model.runner_type != "generate":
        raise ValueError(f"{model.model} is run as {model.runner_type!r}: LoReFT is served with models that generate.")
