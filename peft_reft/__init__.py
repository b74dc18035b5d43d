"""LoReFT (arXiv 2404.03592) as a PEFT method. Importing this package registers it with PEFT."""

from .register import add_peft_type, register

add_peft_type()  # before the modules below, whose classes name the type

from .config import LoReftConfig  # noqa: E402
from .edits.intervention import Intervention  # noqa: E402
from .positions.spec import Positions  # noqa: E402
from .runtime_config import LoReftRuntimeConfig  # noqa: E402
from .tools.chat import chat_marks, prompt_lengths  # noqa: E402
from .tools.collator import DataCollatorForLoReft  # noqa: E402
from .tools.hotswap import hotswap_adapter  # noqa: E402
from .tools.interchange import interchange, interchange_accuracy  # noqa: E402
from .tools.norms import edit_norms  # noqa: E402
from .tools.optimizer import create_loreft_optimizer  # noqa: E402
from .tools.show import show_positions  # noqa: E402
from .tuner.model import LoReftModel  # noqa: E402

register()

__version__ = "0.1.0"

__all__ = [
    "DataCollatorForLoReft",
    "Intervention",
    "LoReftConfig",
    "LoReftModel",
    "LoReftRuntimeConfig",
    "Positions",
    "chat_marks",
    "create_loreft_optimizer",
    "edit_norms",
    "hotswap_adapter",
    "interchange",
    "interchange_accuracy",
    "prompt_lengths",
    "show_positions",
]
