"""The check of a chat template's marks on random chats, which needs no knowledge of the template."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..turns import answers_of
from .render import LEADS, THINKING, Ids, Renderer, Writer


def fault_of(
    renderer: Renderer, response: Sequence[Ids], instruction: Sequence[Ids], tools: bool, rounds: int = 16
) -> str | None:
    """What the marks get wrong in random chats, in words; None if nothing.

    Two properties are checked. Contents of the assistant lie in answers, all others outside. The prompt that
    `generate` is given has the same answers as the conversation that begins with it, up to the prompt's end:

        conversation   user ...  [answer 0]  user ...  [answer 1]
        prompt         user ...  [answer 0]  user ...  []           the asked answer begins where the prompt ends

    Args:
        tools: whether chats have tools.
        rounds: how many random chats.
    """
    rng = random.Random(1)
    writer = Writer(renderer, rng)
    seen = {True: 0, False: 0}
    for _ in range(rounds):
        chat = writer.chat(
            _script(renderer, rng, tools),
            leads=LEADS if rng.random() < 0.7 else (),
            result=rng.choice(renderer.results) if tools else "text",
            **rng.choice(THINKING),
        )
        row = renderer.row(chat)
        if row is None:
            continue
        spans = answers_of(row.ids, response, instruction)
        for said, first, behind in row.places:
            start, end = row.column(first), row.column(behind)
            if start == end:
                continue
            seen[said.role == "assistant"] += 1
            inside = any(a <= start and end <= b for a, b in spans)
            outside = all(end <= a or b <= start for a, b in spans)
            if not (inside if said.role == "assistant" else outside):
                return f"a content of the {said.role} is not told: {row.text[max(0, first - 100) : behind]!r}"
        for i, message in enumerate(chat.messages):
            if i and message["role"] == "assistant" and chat.messages[i - 1]["role"] != "assistant":
                prompt = renderer.row(chat.until(i - 1, generation_prompt=True))
                if prompt is not None and row.ids[: len(prompt.ids)] == prompt.ids:
                    given = len(prompt.ids)
                    asked = answers_of(prompt.ids, response, instruction, given)
                    if [(a, min(b, given)) for a, b in spans if a <= given] != asked:
                        return f"an answer begins elsewhere if it is asked for: {prompt.text[-100:]!r}"
    return None if min(seen.values()) else "it renders no random chat"


def _script(renderer: Renderer, rng: random.Random, tools: bool) -> str:
    script = "s" if renderer.system and rng.random() < 0.3 else ""
    for turn in range(rng.randrange(1, 4)):
        if turn and renderer.mid_system and rng.random() < 0.2:
            script += "s"
        if tools and rng.random() < 0.5:
            script += rng.choice(renderer.tool_scripts)
        else:
            script += rng.choice(["ua", "ur"] if renderer.reasoning else ["ua"])
    return script
