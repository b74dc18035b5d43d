"""Annotations with dtypes and shapes: `Int[Tensor, "batch seq"]` is a tensor of ints, two-dimensional.

They are jaxtyping's. The tests check them at every call (`tests/test_shapes.py`); without jaxtyping, which no user
needs, an annotation says the same to a reader and nothing to Python.
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
            """Stands for jaxtyping's annotations."""

            def __class_getitem__(cls, item: Any) -> Any:
                return item[0]

        Bool = Float = Int = Shaped

__all__ = ["Bool", "Float", "Int", "Shaped"]
