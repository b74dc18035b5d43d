"""An export that records a model by running it once, and would lose the edits: refused."""

from __future__ import annotations

import torch


def refuse_tracing() -> None:
    """Refuse TorchScript's tracer (`torch.jit.trace`, `torch.onnx.export(dynamo=False)`).

    The tracer loses the autograd function that edits, and would record the base model. `torch.export`, the exporter to
    ONNX that builds on it, and `torch.compile` keep the edits.

    Raises:
        RuntimeError: the tracer runs; the message says which exports keep the edits.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # torch does not declare it
        raise RuntimeError(
            "TorchScript's tracer (`torch.jit.trace`, `torch.onnx.export(dynamo=False)`) cannot record a model with "
            "LoReFT: its edits would be lost. Use `torch.export.export` or `torch.onnx.export(dynamo=True)`, or merge "
            "the adapter where that is exact (`merge_and_unload`), or export the base alone (`unload`)."
        )
