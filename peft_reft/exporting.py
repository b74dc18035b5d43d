"""Whether a model is being exported to ONNX, which knows fewer operations than torch."""

from __future__ import annotations

import torch


# The exporter tries Dynamo if its first way fails. Without the decorator Dynamo takes the result for False.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it without types
def exports_to_onnx() -> bool:
    """Return whether an exporter to ONNX records the model. Its graph holds no assertions and no decompositions."""
    return torch.onnx.is_in_onnx_export()
