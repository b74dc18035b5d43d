"""The marks of a chat template: the headers at which answers begin and end, found from a tokenizer.

A chat template is a program that does not list its headers. This module reads them off chats that the template renders
(`render`): the text between a content of the user and one of the assistant is the end of the user's message and the
header of an answer. Random chats then check the marks (`check`). Marks that fail are not set. Headers are token
sequences, because a header's last newline can merge with the text behind it.

This module does not know PEFT, transformers or TRL. A tokenizer is an object with `apply_chat_template`,
`chat_template`, `get_added_vocab`, and a call that returns `input_ids`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

from .check import fault_of
from .render import LEADS, THINKING, Chat, Content, Ids, NoMarks, Renderer, Row, Writer, find

_THOUGHTS = re.compile(r"[<\[◁][^<>\[\]◁▷\s]{0,12}think", re.IGNORECASE)
"""Where a block of thoughts begins. The block belongs to the answer, even if a template always writes it: other forms
of the template (TRL's for training, the one for history) omit it, and one header must fit all forms."""


@dataclass(frozen=True)
class Found:
    """The marks of a chat template, or why there are none.

    Example:
        >>> found = find_marks(tokenizer)  # doctest: +SKIP
        >>> [tokenizer.decode(header) for header in found.response_template]  # doctest: +SKIP
        ['<|im_start|>assistant\\n', '<|im_start|>assistant']
    """

    response_template: list[list[int]]
    """Headers behind which an answer begins, as token ids. If a header's tail can merge with the text behind it, the
    list has the header with its tail and without."""
    instruction_template: list[list[int]]
    """Headers at which an answer has ended (of the user, of tools, of the system in mid-chat), as token ids."""
    problem: str | None = None
    """None if the marks pass the check. Otherwise the reason why there are none; both templates are then empty."""
    without_tools: bool = False
    """The template takes chats with tools. The marks fail in these, and pass in all others."""
    without_system: bool = False
    """The template takes system messages in mid-chat. The marks fail in chats with these, and pass in all others."""


def find_marks(tokenizer: Any) -> Found | None:
    """Find the marks of a tokenizer's chat template, and check them on random chats.

    This function neither warns nor raises, whatever the template does. If a chat makes the template raise, the
    template does not take that chat.

    Args:
        tokenizer: a tokenizer of transformers, or a processor that has one.

    Returns:
        None if there is no chat template.
    """
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    outer_template = getattr(tokenizer, "chat_template", None)
    inner_template = getattr(inner, "chat_template", None)
    if not outer_template and not inner_template:
        return None
    template = None  # the inner tokenizer's own
    if isinstance(outer_template, str) and outer_template != inner_template:
        template = outer_template
    try:
        return _find_marks(Renderer(inner, template))
    except NoMarks as reason:
        return Found([], [], problem=str(reason))


def _find_marks(renderer: Renderer) -> Found:
    """The first marks that pass the check.

    Some templates write tools' results or system messages in mid-chat under the header of an answer, or (Vicuna's)
    under none. So marks are sought for all chats first, then for those without system messages in mid-chat, without
    tools, and without both.

    Raises:
        NoMarks: none pass.
    """
    renderer.probe()
    takes_tools = bool(renderer.tool_scripts)
    takes_mid_system = renderer.mid_system
    fault: str | None = None
    response: list[Ids] = []
    instruction: list[Ids] = []
    for tools, mid_system in product((True, False), (True, False)):
        if (tools and not takes_tools) or (mid_system and not takes_mid_system):
            continue
        renderer.mid_system = mid_system
        for response, instruction in _candidates(renderer, tools):
            if not response or not instruction:
                continue
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
    """The end of a message and the header. `text[start:]` is the header."""
    start: int
    token: int
    """The header's first token; if the header is closing, its last."""
    asked: bool
    """The gap ends with a generation prompt."""
    closing: bool
    """The header is also the end of the message before it ("[/INST]")."""


def _candidates(renderer: Renderer, tools: bool) -> list[tuple[list[Ids], list[Ids]]]:
    """The response templates and the instruction templates that chats of this template show, best first.

    The first pair has only the headers with which generation prompts end. A template may begin an answer with none of
    them (DeepSeek's begins a second call so). The second pair has every header of an answer.

    Args:
        renderer: the chat template.
        tools: whether chats have tools.
    """
    writer = Writer(renderer, random.Random(0))
    chats = list(_chats_to_read(renderer, writer, tools))
    gaps = [gap for chat in chats for gap in _gaps(renderer, chat)]
    rows = _rows_with_headers(renderer, writer, chats, tools)
    instruction: list[Ids] = []
    for role in ("user", "system", "tool"):
        headers = _headers(renderer, [gap for gap in gaps if gap.role == role])
        # Only where such a header begins counts, so its tail can be left out.
        instruction += _tokens([header.rstrip() for header in headers], rows)
    pairs: list[tuple[list[Ids], list[Ids]]] = []
    for asked in (True, False):
        headers = _headers(renderer, [gap for gap in gaps if gap.role is None], asked)
        with_and_without_tail = [form for header in headers for form in (header, header.rstrip())]
        response = _tokens(with_and_without_tail, rows)
        pair = (_needed(response, _ends_with), _needed(instruction, _contains))
        if pair not in pairs:
            pairs.append(pair)
    return pairs


def _rows_with_headers(renderer: Renderer, writer: Writer, chats: Sequence[Chat], tools: bool) -> list[Row]:
    """Rendered chats that show which tokens a header can have. They depend on the characters beside the header."""
    script = "uaua"
    if renderer.mid_system:
        script += "sua"
    if tools:
        script += renderer.tool_scripts[0]
    rows = [renderer.row(chat) for chat in chats[:8]]
    rows += [renderer.row(writer.chat(script, leads=[lead])) for lead in LEADS]
    rows += [renderer.row(writer.chat("uauaua", leads=[""], empty=0.5)) for _ in range(4)]
    return [row for row in rows if row is not None]


def _chats_to_read(renderer: Renderer, writer: Writer, tools: bool) -> Iterator[Chat]:
    """Chats in which every header occurs between contents that begin and end with a letter or a digit."""
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
    if not tools:
        return
    for number, script in enumerate(renderer.tool_scripts):
        # One script is enough to read the headers of every form of result.
        results = renderer.results if number == 0 else renderer.results[:1]
        for result in results:
            for _ in range(3):
                chat = writer.chat(script, result=result)
                yield chat
            yield chat.until(len(chat.messages) - 2, generation_prompt=True)


def _gaps(renderer: Renderer, chat: Chat) -> Iterator[_Gap]:
    """The gaps of a rendered chat, and the one behind its last content if it ends with a generation prompt."""
    row = renderer.row(chat)
    if row is None:
        return
    for left, right in pairwise(row.places):
        role = right.content.role
        if (left.content.role == "assistant") == (role == "assistant"):
            continue
        gap = _gap(
            renderer,
            chat,
            row,
            left.content,
            first=left.end,
            last=right.start,
            role=None if role == "assistant" else role,
            asked=False,
        )
        if gap is not None:
            yield gap
    if not chat.options.get("add_generation_prompt") or not row.places:
        return
    left = row.places[-1]
    if left.content.role != "assistant":
        gap = _gap(renderer, chat, row, left.content, first=left.end, last=len(row.text), role=None, asked=True)
        if gap is not None:
            yield gap


def _gap(
    renderer: Renderer,
    chat: Chat,
    row: Row,
    left: Content,
    *,
    first: int,
    last: int,
    role: str | None,
    asked: bool,
) -> _Gap | None:
    r"""The gap `row.text[first:last]`, which begins just behind the content `left`; None if its header has no token.

    A header opens the next message:

        Hi.<|im_end|>\n<|im_start|>assistant\nYes     the header is text[start:end]
           |           |                      |
           first       start                  end, last

    If nothing but a space stands behind the end of the message before it, that end is the header, and it is "closing":

        [INST] Hi. [/INST] Yes                        the header is text[:end_of_message]
                  |       ||
                  first   |last
                          end_of_message
    """
    text = row.text[first:last]
    end_of_message = _end_of_message(renderer, chat, left, text)
    behind = text[end_of_message:]
    start = end_of_message + len(behind) - len(behind.lstrip())
    end = len(text)
    if role is None:
        thoughts = _THOUGHTS.search(text, start)
        if thoughts is not None:
            end = thoughts.start()
    closing = start >= end
    if closing:
        start, end = 0, end_of_message
    first_column, column_behind = row.column(first + start), row.column(first + end)
    if first_column >= column_behind:
        return None
    token = row.ids[column_behind - 1 if closing else first_column]
    return _Gap(role, text[:end], start, token, asked, closing)


def _end_of_message(renderer: Renderer, chat: Chat, left: Content, gap: str) -> int:
    r"""How many characters of `gap` end the message of `left`: those that also end a chat up to that message.

    The count is the length of the common beginning of two texts, here 11:

        behind `left` in the chat          <|im_end|>\n<|im_start|>user\n
        behind `left` in a chat up to it   <|im_end|>\n
    """
    generation_prompts = (False, True) if left.role == "assistant" else (False,)
    for generation_prompt in generation_prompts:
        text = renderer.text(chat.until(left.message, generation_prompt))
        span = None if text is None else find(left, text)
        if text is None or span is None:
            continue
        end_of_chat = text[span[1] :]
        common = len(_common_start([gap, end_of_chat]))
        if common < len(end_of_chat) or generation_prompt:
            # The last message ends in another way ("<|return|>"), or a header follows it. The common characters may
            # then reach into the next header; they are cut at the added token with which that header begins.
            common = max((start for start in renderer.added_tokens(gap) if start <= common), default=0)
        if common:
            return common
    return 0


def _headers(renderer: Renderer, gaps: Sequence[_Gap], asked: bool = False) -> list[str]:
    """The headers in `gaps`. Gaps that begin alike have one header: their common beginning.

        <|start|>assistant<|channel|>final
        <|start|>assistant to=multiply
        <|start|>assistant                      the header

    Gaps with closing headers ("[/INST]") that end alike have one header: their common end.

    Args:
        renderer: the chat template.
        gaps: the gaps before contents of one role.
        asked: take only headers with which a generation prompt ends.
    """
    groups: dict[Any, list[_Gap]] = {}
    for gap in gaps:
        first_word = re.match(r"\W*\w*", gap.text[gap.start :])
        key: Any = gap.token
        if not gap.closing and gap.token not in renderer.added and first_word is not None:
            key = first_word.group()
        groups.setdefault((gap.closing, key), []).append(gap)
    headers = []
    for (closing, _), group in groups.items():
        if asked and not any(gap.asked for gap in group):
            continue
        if closing:
            header = _common_start([gap.text[::-1] for gap in group])[::-1]
            last_added_token = max(renderer.added_tokens(header), default=0)
            headers.append(header[last_added_token:])
            continue
        header = _common_start([gap.text[gap.start :] for gap in group])
        if renderer.added_tokens(header):
            headers.append(header)
            continue
        # A content may contain plain words ("User:"), so the header includes the added token that stands before them.
        for gap in group:
            before = [start for start in renderer.added_tokens(gap.text) if start < gap.start]
            start = max(before, default=gap.start)
            headers.append(gap.text[start : gap.start] + header)
    return [header for header in dict.fromkeys(headers) if header.strip()]


def _tokens(headers: Sequence[str], rows: Sequence[Row]) -> list[Ids]:
    """The token sequences that the headers have in `rows`. A header can have several: its neighbours decide."""
    found = []
    for header in headers:
        for row in rows:
            for match in re.finditer(re.escape(header), row.text):
                ids = row.ids[row.column(match.start()) : row.column(match.end())]
                if ids:
                    found.append(tuple(ids))
    return [list(ids) for ids in dict.fromkeys(found)]


def _needed(headers: Sequence[Ids], makes_superfluous: Callable[[Ids, Ids], bool]) -> list[Ids]:
    """The headers, longest first, without those that a shorter one makes superfluous.

    Args:
        headers: token ids.
        makes_superfluous: takes a header and a shorter one.
    """
    needed: list[Ids] = []
    for header in sorted(headers, key=len):
        if not any(makes_superfluous(header, shorter) for shorter in needed):
            needed.append(header)
    return needed[::-1]


def _ends_with(ids: Ids, shorter: Ids) -> bool:
    return ids[-len(shorter) :] == shorter


def _contains(ids: Ids, shorter: Ids) -> bool:
    return any(ids[start : start + len(shorter)] == shorter for start in range(len(ids)))


def _common_start(texts: Sequence[str]) -> str:
    """The longest common beginning of the texts."""
    first, last = min(texts), max(texts)  # the two that differ earliest
    length = 0
    while length < min(len(first), len(last)) and first[length] == last[length]:
        length += 1
    return first[:length]
