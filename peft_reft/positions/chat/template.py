"""The marks of a chat template: the headers at which answers begin and end, found from a tokenizer.

A chat template is a program that does not list its headers. This module reads them off chats that the template renders
(`render`): the text between a content of the user and one of the assistant is the end of the user's message and the
header of an answer. Random chats then check the marks (`chat_check`); marks that fail are not set. Headers are token
sequences, because a header's last newline can merge with what follows it.

Nothing here knows PEFT, transformers or TRL: a tokenizer is an object with `apply_chat_template`, `chat_template`,
`get_added_vocab` and a call that gives `input_ids`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

from .check import fault_of
from .render import LEADS, THINKING, Chat, Ids, NoMarks, Renderer, Row, Said, Writer, place_of

_THOUGHTS = re.compile(r"[<\[◁][^<>\[\]◁▷\s]{0,12}think", re.IGNORECASE)
"""Where a block of thoughts begins. The block belongs to the answer, even if a template always writes it: another form
of the template (TRL's for training, the one for history) omits it, and one header must fit both forms."""


@dataclass(frozen=True)
class Found:
    """The marks of a chat template, or why there are none.

    Example:
        >>> found = find_marks(tokenizer)  # doctest: +SKIP
        >>> [tokenizer.decode(header) for header in found.response_template]  # doctest: +SKIP
        ['<|im_start|>assistant\\n', '<|im_start|>assistant']
    """

    response_template: list[list[int]]
    """Headers behind which an answer begins, as token ids. If a header's tail can merge with what follows, the list
    has the header with its tail and without."""
    instruction_template: list[list[int]]
    """Headers at which an answer has ended (of the user, of tools, of the system in mid-chat), as token ids."""
    problem: str | None = None
    """None if the marks pass the check. Else the reason why there are none; both templates are then empty."""
    without_tools: bool = False
    """The marks fail in chats with tools, which this template takes, and pass in all others."""
    without_system: bool = False
    """The marks fail in chats with a system message in mid-chat, which this template takes, and pass in all others."""


def find_marks(tokenizer: Any) -> Found | None:
    """Find the marks of a tokenizer's chat template, and check them on random chats.

    It neither warns nor raises, whatever the template does. A chat that makes the template raise is one that the
    template does not take.

    Args:
        tokenizer: a tokenizer of transformers, or a processor that has one.

    Returns:
        None if there is no chat template.
    """
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    own, of_inner = getattr(tokenizer, "chat_template", None), getattr(inner, "chat_template", None)
    if not own and not of_inner:
        return None
    template = own if own != of_inner and isinstance(own, str) else None
    try:
        return _find(Renderer(inner, template))
    except NoMarks as reason:
        return Found([], [], problem=str(reason))


def _find(renderer: Renderer) -> Found:
    renderer.probe()
    fault, takes_tools, takes_mid_system = None, bool(renderer.tool_scripts), renderer.mid_system
    # Tools and system messages in mid-chat are left out in turn if the marks fail with them: some templates write them
    # under the header of an answer, or (Vicuna's) under none.
    for tools, mid_system in product((True, False), (True, False)):
        if tools > takes_tools or mid_system > takes_mid_system:
            continue
        renderer.mid_system = mid_system
        for response, instruction in _marks(renderer, tools):
            if response and instruction:
                fault = fault_of(renderer, response, instruction, tools)
                if fault is None:
                    return Found(
                        response,
                        instruction,
                        without_tools=takes_tools and not tools,
                        without_system=takes_mid_system and not mid_system,
                    )
    if fault is None:
        what = "an answer from the message before it" if not response else "a message from the answer before it"
        raise NoMarks(
            f"the chat template writes nothing that tells {what}, so that the tokens do not say where prompts end."
        )
    raise NoMarks(
        "the headers found in the chat template do not tell answers from prompts in every chat that it renders. "
        f"Behind {renderer.show(response)} an answer would begin, at {renderer.show(instruction)} "
        f"it would end; {fault}."
    )


# From gaps between contents to headers.


@dataclass(frozen=True)
class _Gap:
    """The text between two contents, one of the assistant and one of another role."""

    role: str | None
    """Whose header it is; None: the assistant's."""
    text: str
    """The end of a message and the header: `text[start:]` is the header."""
    start: int
    token: int
    """The header's first token; the last one of a closing header."""
    asked: bool
    """The gap ends with a generation prompt."""
    closing: bool
    """The header is itself the end of the message before it ("[/INST]")."""


def _marks(renderer: Renderer, tools: bool) -> list[tuple[list[Ids], list[Ids]]]:
    """The response templates and the instruction templates that chats of this template show, to be tried in turn.

    The first pair has only the headers that generation prompts end with. A template may begin an answer without any of
    them (DeepSeek's writes a second call so); the second pair has every header of an answer.
    """
    writer = Writer(renderer, random.Random(0))
    chats = list(_chats_to_read(renderer, writer, tools))
    gaps = [gap for chat in chats for gap in _gaps(renderer, chat)]
    # These contents begin and end with anything, because the tokens of a header depend on what stands beside it.
    script = "uaua" + "sua" * renderer.mid_system + "".join(renderer.tool_scripts[:1] if tools else [])
    rows = [renderer.row(chat) for chat in chats[:8]]
    rows += [renderer.row(writer.chat(script, leads=[lead])) for lead in LEADS]
    rows += [renderer.row(writer.chat("uauaua", leads=[""], empty=0.5)) for _ in range(4)]
    some = [row for row in rows if row is not None]
    instruction: list[Ids] = []
    for role in ("user", "system", "tool"):
        headers = _headers(renderer, [gap for gap in gaps if gap.role == role])
        instruction += _tokens([header.rstrip() for header in headers], some)  # only where it begins counts
    out: list[tuple[list[Ids], list[Ids]]] = []
    for asked in (True, False):
        headers = _headers(renderer, [gap for gap in gaps if gap.role is None], asked)
        response = _tokens([form for header in headers for form in (header, header.rstrip())], some)
        marks = _needed(response, _ends), _needed(instruction, _contains)
        if marks not in out:
            out.append(marks)
    return out


def _chats_to_read(renderer: Renderer, writer: Writer, tools: bool) -> Iterator[Chat]:
    for thinking in THINKING:
        yield writer.chat("uauaua", **thinking)
        for script in ("u", "uau"):
            yield writer.chat(script, add_generation_prompt=True, **thinking)
        if renderer.reasoning:
            yield writer.chat("urur", **thinking)
    if renderer.system:
        yield writer.chat("suaua")
    if renderer.mid_system:
        yield writer.chat("uasuasua")
    for i, script in enumerate(renderer.tool_scripts if tools else ()):
        for result in renderer.results if i == 0 else renderer.results[:1]:
            for _ in range(3):
                chat = writer.chat(script, result=result)
                yield chat
            yield chat.until(len(chat.messages) - 2, generation_prompt=True)


def _gaps(renderer: Renderer, chat: Chat) -> Iterator[_Gap]:
    row = renderer.row(chat)
    if row is None:
        return
    for (left, _, first), (right, last, _) in pairwise(row.places):
        if (left.role == "assistant") != (right.role == "assistant"):
            role = None if right.role == "assistant" else right.role
            yield from _gap(renderer, chat, row, left, first, last, role, asked=False)
    if chat.options.get("add_generation_prompt") and row.places and row.places[-1][0].role != "assistant":
        left, _, first = row.places[-1]
        yield from _gap(renderer, chat, row, left, first, len(row.text), None, asked=True)


def _gap(
    renderer: Renderer,
    chat: Chat,
    row: Row,
    left: Said,
    first: int,
    last: int,
    role: str | None,
    *,
    asked: bool,
) -> Iterator[_Gap]:
    r"""The gap between the characters `first` (just behind the content `left`) and `last`; none without a token.

    A header opens the next message:

        Hi.<|im_end|>\n<|im_start|>assistant\nYes     the header is text[start:end]
           |           |                      |
           first       start                  end, last

    Or, with nothing but a space behind the end of the message before it, that end is the header, which is "closing":

        [INST] Hi. [/INST] Yes                        the header is text[:end_of_message]
                  |       ||
                  first   |last
                          end_of_message
    """
    text = row.text[first:last]
    end_of_message = _end_of_message(renderer, chat, left, text)
    start = end_of_message + len(text[end_of_message:]) - len(text[end_of_message:].lstrip())
    thoughts = _THOUGHTS.search(text, start) if role is None else None
    end = thoughts.start() if thoughts else len(text)
    closing = start >= end
    if closing:
        start, end = 0, end_of_message
    columns = row.column(first + start), row.column(first + end)
    if columns[0] < columns[1]:
        yield _Gap(role, text[:end], start, row.ids[columns[1] - 1 if closing else columns[0]], asked, closing)


def _end_of_message(renderer: Renderer, chat: Chat, left: Said, gap: str) -> int:
    r"""How many characters of `gap` end the message that says `left`: those that also end a chat up to that message.

    The count is the length of what both texts begin with, here 11:

        behind `left` in the chat          <|im_end|>\n<|im_start|>user\n
        behind `left` in a chat up to it   <|im_end|>\n
    """
    for generation_prompt in (False, True) if left.role == "assistant" else (False,):
        text = renderer.text(chat.until(left.message, generation_prompt))
        place = place_of(text, left) if text is not None else None
        if text is None or place is None:
            continue
        alone = text[place[1] :]
        common = len(_common_start([gap, alone]))
        if common < len(alone) or generation_prompt:
            # The last message ends in another way ("<|return|>"), or a header follows it. The common characters may
            # then reach into the next header; they are cut at the added token with which that header begins.
            common = max((at for at in renderer.added_tokens(gap) if at <= common), default=0)
        if common:
            return common
    return 0


def _headers(renderer: Renderer, gaps: Sequence[_Gap], asked: bool = False) -> list[str]:
    """The headers in `gaps`. Gaps that begin alike share one: what they have in common from their beginning.

        <|start|>assistant<|channel|>final
        <|start|>assistant to=multiply
        <|start|>assistant                      the header

    Closing headers ("[/INST]") end alike, and share what they have in common up to their end.

    Args:
        asked: take only groups in which a generation prompt ends with the header.
    """
    groups: dict[Any, list[_Gap]] = {}
    for gap in gaps:
        word = re.match(r"\W*\w*", gap.text[gap.start :])
        key = gap.token if gap.closing or gap.token in renderer.added or word is None else word.group()
        groups.setdefault((gap.closing, key), []).append(gap)
    out = []
    for (closing, _), group in groups.items():
        if asked and not any(gap.asked for gap in group):
            continue
        if closing:
            header = _common_start([gap.text[::-1] for gap in group])[::-1]
            out.append(header[max(renderer.added_tokens(header), default=0) :])
            continue
        header = _common_start([gap.text[gap.start :] for gap in group])
        if renderer.added_tokens(header):
            out.append(header)
            continue
        # A content may contain plain words ("User:"), so the header includes the added token that stands before them.
        for gap in group:
            start = max((at for at in renderer.added_tokens(gap.text) if at < gap.start), default=gap.start)
            out.append(gap.text[start : gap.start] + header)
    return [header for header in dict.fromkeys(out) if header.strip()]


def _tokens(headers: Sequence[str], rows: Sequence[Row]) -> list[Ids]:
    """The token sequences that the headers have in `rows`; they differ by what stands beside a header."""
    out = []
    for header in headers:
        for row in rows:
            for match in re.finditer(re.escape(header), row.text):
                out.append(row.ids[row.column(match.start()) : row.column(match.end())])
    return [list(ids) for ids in dict.fromkeys(map(tuple, out)) if ids]


def _needed(headers: Sequence[Ids], makes_superfluous: Callable[[Ids, Ids], bool]) -> list[Ids]:
    """The headers, longest first, without those that a shorter one makes superfluous."""
    kept: list[Ids] = []
    for header in sorted(headers, key=len):
        if not any(makes_superfluous(header, other) for other in kept):
            kept.append(header)
    return kept[::-1]


def _ends(ids: Ids, with_: Ids) -> bool:
    return ids[-len(with_) :] == with_


def _contains(ids: Ids, other: Ids) -> bool:
    return any(ids[i : i + len(other)] == other for i in range(len(ids)))


def _common_start(rows: Sequence[Any]) -> Any:
    """The longest common beginning of lists or strings."""
    first, last = min(rows), max(rows)
    n = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return first[:n]
