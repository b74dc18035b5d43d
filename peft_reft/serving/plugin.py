"""vLLM's entry points. vLLM calls `register` in every one of its processes; nothing of it is imported before."""

from __future__ import annotations

from ..patching import add_method, wrap

TESTED = ("0.32.0",)
"""Versions of vLLM that the tests have run with."""


def register() -> None:
    """Put LoReFT into vLLM: entry point of the group `vllm.general_plugins`. Calling it again is harmless.

    Wrapped are a worker's `load_model`, the core's `add_request` and the front end's `InputProcessor`; they do what
    they did where `additional_config` has no "loreft".
    """
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.gpu_worker import Worker

    from . import core, frontend, worker

    wrap(Worker, "load_model", worker.load_model)
    wrap(InputProcessor, "__init__", frontend.init)
    wrap(InputProcessor, "process_inputs", frontend.process_inputs)
    add_method(Worker, "loreft_add", worker.add)
    add_method(Worker, "loreft_remove", worker.remove)
    wrap(EngineCore, "add_request", core.add_request)
    add_method(EngineCore, "loreft_add", core.add)
    add_method(EngineCore, "loreft_remove", core.remove)


def check_version() -> None:
    """Raise RuntimeError with a version of vLLM that this was not tested with."""
    from importlib.metadata import version

    import vllm

    if vllm.__version__.split("+")[0] not in TESTED:
        raise RuntimeError(
            f"peft_reft {version('peft-reft')} serves LoReFT with vLLM {', '.join(TESTED)}, not {vllm.__version__}."
        )
