"""The engine's config (`VllmConfig`) and its version.

What is read, called or replaced:

========================================================= ==================================================== =====
attribute                                                 used for                                             since
========================================================= ==================================================== =====
`vllm.__version__`                                        untested versions are refused                        0.32
`vllm.forward_context.get_forward_context`                what the running step can name                       0.32
`ForwardContext.no_compile_layers`                        from a name in a compiled graph to our edits         0.32
`VllmConfig.additional_config`                            our options; part of the key of compiled graphs      0.32
`VllmConfig.model_config`                                 the parts of the config below                        0.32
`VllmConfig.parallel_config`                              the same                                             0.32
`VllmConfig.compilation_config`                           the same                                             0.32
`VllmConfig.cache_config`                                 the same                                             0.32
`VllmConfig.speculative_config`                           speculative decoding is refused                      0.32
`ModelConfig.hf_config`                                   transformers' config of the model                    0.32
`ModelConfig.enforce_eager`                               whether the model is compiled                        0.32
`ModelConfig.runner_type`                                 models that do not generate are refused              0.32
`ModelConfig.is_encoder_decoder`                          encoder-decoders are refused                         0.32
`ModelConfig.model`                                       the model's name, for messages                       0.32
`ParallelConfig.tensor_parallel_size`                     several workers are refused                          0.32
`ParallelConfig.pipeline_parallel_size`                   the same                                             0.32
`ParallelConfig.data_parallel_size`                       the same                                             0.32
`ParallelConfig.prefill_context_parallel_size`            prompts that are split among workers are refused     0.32
`ParallelConfig.enable_dbo`                               dual-batch overlap is refused                        0.32
`CacheConfig.kv_sharing_fast_prefill`                     layers that skip tokens of the prompt are refused    0.32
`CompilationConfig.cudagraph_mode`                        whether steps are captured as graphs                 0.32
`CompilationConfig.static_forward_context`                holds what compiled graphs name                      0.32
========================================================= ==================================================== =====
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

TESTED = ("0.32.0",)
"""Versions of vLLM that the tests have run with."""


def check_version() -> None:
    """Raise RuntimeError if this version of vLLM was not tested."""
    import vllm

    if vllm.__version__.split("+")[0] not in TESTED:
        raise RuntimeError(
            f"peft_reft {version('peft-reft')} serves LoReFT with vLLM {', '.join(TESTED)}, not {vllm.__version__}."
        )


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
    sizes = {
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "data_parallel_size": parallel.data_parallel_size,
    }
    for name, size in sizes.items():
        if size > 1:
            raise ValueError(f"{name}={size}: one worker serves LoReFT (allowed: 1).")
    if parallel.enable_dbo:
        raise ValueError("enable_dbo=True: LoReFT needs each step in one batch (allowed: False).")
    if parallel.prefill_context_parallel_size > 1:
        raise ValueError(
            f"prefill_context_parallel_size={parallel.prefill_context_parallel_size}: LoReFT needs a prompt's tokens "
            "on each worker (allowed: 1)."
        )
    if config.cache_config.kv_sharing_fast_prefill:
        raise ValueError(
            "kv_sharing_fast_prefill=True: LoReFT needs a prompt's tokens in all layers (allowed: False)."
        )
    if config.speculative_config is not None:
        raise ValueError("speculative_config is set: LoReFT does not support speculative decoding (allowed: None).")
    if model.is_encoder_decoder:
        raise ValueError(f"{model.model} is an encoder-decoder: LoReFT is served with decoder-only models.")
    if model.runner_type != "generate":
        raise ValueError(f"{model.model} is run as {model.runner_type!r}: LoReFT is served with models that generate.")
