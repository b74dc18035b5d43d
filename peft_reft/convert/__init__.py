"""Adapters of other libraries, read and written.

Each function converts one folder or file. It computes nothing but what the formats differ in, so logits before and
after are equal to rounding. Nothing is unpickled without `weights_only=True`.

Example, also as `peft-reft convert --from pyreft SRC DST --positions f2+l2`:

    >>> from peft_reft.convert import from_pyreft
    >>> adapter = from_pyreft("tests/parity/pyreft/loreft_tied", positions="f2+l2")
    >>> adapter.config.layers, adapter.config.r, adapter.config.tie
    ([0, 1, 2], 4, 'layer')
    >>> adapter.weights["model.layers.0"]["W"].shape
    torch.Size([4, 32])
"""

from .adapters import from_adapters
from .axbench import from_axbench
from .control_vector import from_control_vector, to_control_vector
from .easysteer import to_easysteer
from .ours import Adapter
from .pyreft_read import from_pyreft
from .pyreft_write import to_pyreft

__all__ = [
    "Adapter",
    "from_adapters",
    "from_axbench",
    "from_control_vector",
    "from_pyreft",
    "to_control_vector",
    "to_easysteer",
    "to_pyreft",
]
