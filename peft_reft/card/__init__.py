"""The model card: what to install, an example that runs, the adapter's tags, its settings in words, its size.

- `words`: the settings and the size.
- `names`: what the card calls the adapter and its base model.
- `example`: Python code that loads the adapter and asks it.
- `page`: our parts, put into a card that PEFT, TRL, transformers or a person wrote.
- `saving`: the moments at which a card is saved.
"""

from .page import write_model_card
from .saving import complete_all_cards, complete_cards_of_trainers
from .words import describe, how_to_ask

__all__ = ["complete_all_cards", "complete_cards_of_trainers", "describe", "how_to_ask", "write_model_card"]
