"""Annotations with dtype and shape: `Int[Tensor, "batch seq"]` is a tensor of integers with two dimensions.

They come from jaxtyping. The tests check them at every call (`tests/test_shapes.py`). Users do not need jaxtyping:
without it an annotation tells a reader the same, and Python sees a plain `Tensor`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped
else:
    try:
        from jaxtyping import Bool, Float, Int, Shaped
    except ImportError:

        class Shaped:
            """Stands in for jaxtyping's annotations: `Shaped[Tensor, "batch seq"]` is `Tensor`."""

            def __class_getitem__(cls, item: Any) -> Any:
                return item[0]

        Bool = Float = Int = Shaped

__all__ = ["Bool", "Float", "Int", "Shaped"]
