"""Where the prompt of a request ends that goes on behind the result of a tool.

TRL's trainers send prompt, answer and result as the next prompt. Their own forward has the first prompt as prompt, and
all behind it as answer, if the adapter has no marks of a chat template. (With marks both read the same marks.)
"""

from __future__ import annotations

from collections.abc import Sequence

Tokens = tuple[int, ...]


class Histories:
    """What was generated lately, and with which prompt it began."""

    def __init__(self) -> None:
        self.begun: dict[Tokens, int] = {}
        """From a prompt with its answer to the length of the prompt with which the conversation began."""

    def prompt_lengths(self, prompts: Sequence[Sequence[int]]) -> list[int | None]:
        """For each prompt of a call, the length of the prompt with which its conversation began.

        Returns:
            None for each unless all prompts go on with an earlier conversation: TRL never mixes them, and a new
            prompt that begins as an earlier conversation by chance is no part of that.
        """
        sizes = sorted({len(tokens) for tokens in self.begun}, reverse=True)
        found = [self._begun_with(tuple(prompt), sizes) for prompt in prompts]
        if None in found:
            self.begun.clear()
            return [None] * len(prompts)
        return found

    def _begun_with(self, prompt: Tokens, sizes: Sequence[int]) -> int | None:
        for size in sizes:
            if size < len(prompt) and prompt[:size] in self.begun:
                return self.begun[prompt[:size]]
        return None

    def note(self, prompt: Sequence[int], answer: Sequence[int], prompt_length: int | None) -> None:
        """Note what was generated.

        Args:
            prompt: of the request.
            answer: what was generated.
            prompt_length: what `prompt_lengths` said of it.
        """
        self.begun[(*prompt, *answer)] = len(prompt) if prompt_length is None else prompt_length
