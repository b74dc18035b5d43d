"""The check of a chat template's marks on random chats. It knows nothing of the template."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..turns import answers_of
from .render import LEADS, THINKING, Chat, Ids, Renderer, Row, Writer


def fault_of(
    renderer: Renderer, response: Sequence[Ids], instruction: Sequence[Ids], tools: bool, rounds: int = 16
) -> str | None:
    """What the marks get wrong in random chats, in words; None if nothing.

    Two properties are checked. Contents of the assistant lie in answers, all others outside. The prompt that
    `generate` is given has the same answers as the conversation that begins with it, up to the prompt's end:

        conversation   user ...  [answer 0]  user ...  [answer 1]
        prompt         user ...  [answer 0]  user ...  []           the asked answer begins where the prompt ends

    Args:
        renderer: the chat template.
        response: headers behind which an answer begins, as token ids.
        instruction: headers at which an answer has ended, as token ids.
        tools: whether chats have tools.
        rounds: how many random chats.
    """
    rng = random.Random(1)
    writer = Writer(renderer, rng)
    of_assistant = of_others = 0  # contents that were checked
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
        answers = answers_of(row.ids, response, instruction)
        for content, start, end in row.places:
            first, behind = row.column(start), row.column(end)
            if first == behind:  # the content has no token of its own
                continue
            if content.role == "assistant":
                of_assistant += 1
                is_right = any(begin <= first and behind <= stop for begin, stop in answers)
            else:
                of_others += 1
                is_right = all(behind <= begin or stop <= first for begin, stop in answers)
            if not is_right:
                side = "outside of" if content.role == "assistant" else "in"
                text = row.text[max(0, start - 100) : end]
                return f"a content of the {content.role} would be {side} an answer: {text!r}"
        for prompt in _prompts(renderer, chat, row):
            length = len(prompt.ids)
            answers_up_to_prompt = [(begin, min(stop, length)) for begin, stop in answers if begin <= length]
            if answers_of(prompt.ids, response, instruction, length) != answers_up_to_prompt:
                return f"an answer would begin at another token if it is asked for: {prompt.text[-100:]!r}"
    if of_assistant == 0 or of_others == 0:
        return "the template renders no random chat"
    return None


def _prompts(renderer: Renderer, chat: Chat, row: Row) -> list[Row]:
    """The prompts that ask for the answers of a chat, one for each answer whose prompt begins the chat token by token.

    Args:
        renderer: the chat template.
        chat: a conversation.
        row: the rendered conversation.
    """
    prompts = []
    roles = [message["role"] for message in chat.messages]
    for index in range(1, len(roles)):
        begins_answer = roles[index] == "assistant" and roles[index - 1] != "assistant"
        if not begins_answer:
            continue
        prompt = renderer.row(chat.until(index - 1, generation_prompt=True))
        if prompt is not None and row.ids[: len(prompt.ids)] == prompt.ids:
            prompts.append(prompt)
    return prompts


def _script(renderer: Renderer, rng: random.Random, tools: bool) -> str:
    """The script of a random chat that the template should take."""
    script = "s" if renderer.system and rng.random() < 0.3 else ""
    for turn in range(rng.randrange(1, 4)):
        if turn and renderer.mid_system and rng.random() < 0.2:
            script += "s"
        if tools and rng.random() < 0.5:
            script += rng.choice(renderer.tool_scripts)
        else:
            script += rng.choice(["ua", "ur"] if renderer.reasoning else ["ua"])
    return script
