"""The entry point that vLLM calls in every one of its processes."""

from __future__ import annotations


def register() -> None:
    """Put LoReFT into vLLM: entry point of the group `vllm.general_plugins`. Calling it again is harmless.

    The methods that are wrapped here call the original if `additional_config` has no "loreft".
    """
    from . import core, finding, frontend, models, worker
    from .engine.core import extend_core
    from .engine.front import extend_engines, extend_front_end
    from .engine.openai import extend_command_line
    from .engine.worker import extend_worker

    extend_worker(
        load_model=worker.load_model,
        methods={
            "loreft_add": worker.add,
            "loreft_keep": worker.keep_only,
            "loreft_at_start": worker.at_start,
            "loreft_begin_check": worker.begin_check,
            "loreft_end_check": worker.end_check,
        },
    )
    extend_core(
        start=core.start,
        init=core.init,
        run_loop=core.run_loop,
        preprocess=core.preprocess,
        add_request=core.add_request,
        block_keys=core.block_keys,
        methods={"loreft_add": core.add, "loreft_remove": core.remove, "loreft_list": core.known},
    )
    extend_front_end(init=models.start, process_inputs=frontend.process_inputs)
    extend_engines(
        generate=finding.generate,
        add_request=finding.add_request,
        add_lora=finding.add_lora,
        add_lora_async=finding.add_lora_async,
    )
    extend_command_line(from_cli_args=models.from_cli_args)
