"""Exports that record a model by running it once, and would lose the edits: refused."""

from __future__ import annotations

import torch


def refuse_tracing() -> None:
    """Refuse TorchScript's tracer and both exporters to ONNX. `torch.export` and `torch.compile` keep the edits.

    The tracer (`torch.jit.trace`, `torch.onnx.export(dynamo=False)`) loses the autograd function that edits, and would
    record the base model. The other exporter to ONNX does not know the operators that find positions (`cummax`,
    `searchsorted`).

    Raises:
        RuntimeError: one of them is running; the message says which exports keep the edits.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # torch does not declare it
        what = "TorchScript's tracer (`torch.jit.trace`, `torch.onnx.export(dynamo=False)`)"
    elif _exports_to_onnx():
        what = "`torch.onnx.export`"
    else:
        return
    raise RuntimeError(
        f"{what} cannot record a model with LoReFT: its edits would be lost. Use `torch.export.export`, or merge the "
        "adapter where that is exact (`merge_and_unload`), or export the base alone (`unload`)."
    )


# The exporter tries Dynamo next. Without the decorator Dynamo takes the result for False.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it without types
def _exports_to_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()
