"""LoReFT (arXiv 2404.03592) as a PEFT method. Importing this package registers it with PEFT."""

from .register import add_peft_type, register

add_peft_type()  # before the modules below, whose classes name the type

from .chat import chat_marks, prompt_lengths  # noqa: E402
from .collator import DataCollatorForLoreft  # noqa: E402
from .config import LoreftConfig  # noqa: E402
from .edits.intervention import Intervention  # noqa: E402
from .hotswap import hotswap_adapter  # noqa: E402
from .interchange import interchange, interchange_accuracy  # noqa: E402
from .looking import edit_norms, show_positions  # noqa: E402
from .model import LoreftModel  # noqa: E402
from .positions.spec import Positions  # noqa: E402

register()

__version__ = "0.1.0"

__all__ = [
    "DataCollatorForLoreft",
    "Intervention",
    "LoreftConfig",
    "LoreftModel",
    "Positions",
    "chat_marks",
    "edit_norms",
    "hotswap_adapter",
    "interchange",
    "interchange_accuracy",
    "prompt_lengths",
    "show_positions",
]
