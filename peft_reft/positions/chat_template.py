"""The marks of a chat template: the headers at which answers begin and end, found from a tokenizer.

A chat template is a program, so its headers are not written down anywhere. They are read off chats that it renders:
what stands between a content of the user and one of the assistant is the end of the user's message and the header of
an answer. Then the marks are checked on random chats, without knowing the template, and nothing is set where the check
fails. All headers are token sequences, because a header's last newline can merge with what follows it.

Nothing here knows PEFT, transformers or TRL: a tokenizer is an object with `apply_chat_template`, `chat_template`,
`get_added_vocab` and a call that gives `input_ids`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from typing import Any

from .turns import answers_of

Ids = list[int]

_THOUGHTS = re.compile(r"[<\[◁][^<>\[\]◁▷\s]{0,12}think", re.IGNORECASE)
"""Where a block of thoughts begins. It is answer, also where a template always writes it: another form of the template
(TRL's for training, the one for history) leaves it out, and the same header must hold for both."""

_TOOL = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "Computes a number.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
_THINKING: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False}, {"enable_thinking": True})
# What a content begins and ends with. A letter leaves a header's tail alone; the others may merge with it.
_LEADS = ("", " ", "\n", "\n\n", " \n", "\t", "7", "(", "é", "“", "日本", "-", "#")
_TRAILS = ("", ".", "!", " ", "\n", "\n\n", "7", "é", "🙂", ")")
_PHRASES = (
    "the user asks the assistant",
    "Users and tools of a system",
    "Assistant, model, user",
    "ja",
    "many words, and a number such as 12; " * 3 + "no more",
)


@dataclass(frozen=True)
class Found:
    """The marks of a chat template, or why there are none.

    Example:
        >>> found = find_marks(tokenizer)  # doctest: +SKIP
        >>> [tokenizer.decode(header) for header in found.response_template]  # doctest: +SKIP
        ['<|im_start|>assistant\\n', '<|im_start|>assistant']
    """

    response_template: list[list[int]]
    """Headers behind which an answer begins, as token ids; with its tail and without, where the tail can merge with
    what follows."""
    instruction_template: list[list[int]]
    """Headers at which an answer has ended (of the user, of tools, of the system in mid-chat), as token ids."""
    problem: str | None = None
    """None: the marks are checked and right. Else why nothing is set; both templates are then empty."""
    without_tools: bool = False
    """The marks are right, but for chats with tools, which this template takes."""


def find_marks(tokenizer: Any) -> Found | None:
    """Find the marks of a tokenizer's chat template, and check them on random chats.

    It neither warns nor raises, whatever the template does: what a template refuses is a chat that it does not take.

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
        return _find(_Renderer(inner, template))
    except _NoMarks as reason:
        return Found([], [], problem=str(reason))


class _NoMarks(Exception):
    """Nothing can be set; the text says why."""


def _find(renderer: _Renderer) -> Found:
    renderer.probe()
    fault, takes_tools, takes_mid_system = None, bool(renderer.tool_scripts), renderer.mid_system
    # Also without system messages in mid-chat, which some templates write under the header of an answer.
    for tools, mid_system in product((True, False), (True, False)):
        if tools > takes_tools or mid_system > takes_mid_system:
            continue
        renderer.mid_system = mid_system
        for response, instruction in _marks(renderer, tools):
            if response and instruction:
                fault = _fault(renderer, response, instruction, tools)
                if fault is None:
                    return Found(response, instruction, without_tools=takes_tools and not tools)
    if fault is None:
        what = "an answer from the message before it" if not response else "a message from the answer before it"
        raise _NoMarks(
            f"the chat template writes nothing that tells {what}, so that the tokens do not say where prompts end."
        )
    raise _NoMarks(
        "the headers found in the chat template do not tell answers from prompts in every chat that it renders. "
        f"Behind {renderer.show(response)} an answer would begin, at {renderer.show(instruction)} "
        f"it would end; {fault}."
    )


# Chats.


@dataclass(frozen=True)
class _Said:
    """A content of a chat."""

    role: str
    message: int
    """Which message says it."""
    text: str
    core: str
    """What is left of it in the row if the template strips or escapes it: a word that occurs once."""


@dataclass
class _Chat:
    messages: list[dict[str, Any]] = field(default_factory=list)
    said: list[_Said] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    """Of the template: tools, thinking, generation prompt."""

    def until(self, message: int, generation_prompt: bool) -> _Chat:
        """The chat up to a message, that one included."""
        said = [said for said in self.said if said.message <= message]
        options = {**self.options, "add_generation_prompt": generation_prompt}
        return replace(self, messages=self.messages[: message + 1], said=said, options=options)


class _Writer:
    """Writes chats from scripts, a letter for each message.

    s: system, u: user, a: assistant, r: assistant with its reasoning, c: a tool call, d: two tool calls, t: a result.
    """

    def __init__(self, renderer: _Renderer, rng: random.Random) -> None:
        self.renderer, self.rng, self.count = renderer, rng, 0

    def chat(
        self, script: str, *, leads: Sequence[str] = (), empty: float = 0.1, result: str = "text", **options: Any
    ) -> _Chat:
        """A chat with random contents.

        Args:
            leads: what contents may begin with; they then end with anything. Without, they begin and end with a letter
                or a digit, and none is empty.
            empty: how often a content is empty.
            result: what a tool's result is, one of `_Renderer.results`.
            options: of the template.
        """
        if set(script) & set("cdt"):
            options["tools"] = [_TOOL]
        chat = _Chat(options=options)
        calls: list[str] = []
        for letter in script:
            if letter in "cd":
                values = [self._number() for _ in range(1 if letter == "c" else 2)]
                calls = [self.rng.choice(["multiply", "pow"]) for _ in values]
                chat.messages.append(self.renderer.call(calls, values))
                chat.said += [_Said("assistant", len(chat.messages) - 1, value, value) for value in values]
                continue
            role = {"s": "system", "u": "user", "t": "tool"}.get(letter, "assistant")
            text, core = self._content(leads, empty)
            at = len(chat.messages)
            if role == "tool":
                value: Any = {
                    "text": text,
                    "dict": {"value": text},
                    "list": [text],
                    "number": {"value": int(core[2:] or 0)},
                    "parts": _parts(text),
                }[result]
                name = calls.pop(0) if calls else "multiply"
                message = {"role": role, "content": value, "name": name, "tool_call_id": _call_id(name)}
                if result == "text":
                    message["content"] = self.renderer.content(text)
            else:
                message = {"role": role, "content": self.renderer.content(text)}
            if letter == "r":
                thought, core_of_thought = self._content()
                message["reasoning_content"] = message["thinking"] = thought
                chat.said.append(_Said(role, at, thought, core_of_thought))
            chat.messages.append(message)
            if core and role == "tool" and result == "number":
                text = core = core[2:]
            if core:
                chat.said.append(_Said(role, at, text, core))
        return chat

    def _number(self) -> str:
        self.count += 1
        return str(730_000 + self.count)

    def _content(self, leads: Sequence[str] = (), empty: float = 0.0) -> tuple[str, str]:
        if leads and self.rng.random() < empty:
            return "", ""
        core = f"kw{self._number()}"
        phrase = self.rng.choice(_PHRASES)
        text = self.rng.choice([core, f"{phrase} {core}", f"{core} {phrase}", f"{phrase}\n{core}\n\n{phrase}"])
        if leads:
            text = self.rng.choice(leads) + text + self.rng.choice(_TRAILS)
        return text, core


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _call_id(name: str) -> str:
    return f"call{name:_<5.5}"  # nine letters and digits, as Mistral's templates demand


class _Renderer:
    """A chat template with its tokenizer: text and token ids of chats, and what it takes."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self.tokenizer = tokenizer
        self.template = {} if template is None else {"chat_template": template}
        self.as_parts = self.arguments_as_text = self.system = False
        self.mid_system = self.reasoning = False
        self.tool_scripts: list[str] = []
        self.results: list[str] = []
        self.error: Exception | None = None
        self.added: dict[int, str] = {}
        """The tokenizer's added tokens."""
        self.used: set[str] = set()
        """Those of them that stand in a chat; some tokenizers have thousands that never do."""
        self.encoded: dict[str, Ids] = {}
        self.in_pieces = True
        """Whether texts can be encoded in pieces, one from each added token to the next, which is much quicker."""

    def probe(self) -> None:
        """See what the template takes."""
        self.added = {token: name for name, token in self.tokenizer.get_added_vocab().items() if name}
        writer = _Writer(self, random.Random(0))
        if not self._takes(writer.chat("ua")):
            self.as_parts = True  # of a vision model
            if not self._takes(writer.chat("ua")):
                raise _NoMarks(
                    "the chat template does not render a message of the user and an answer"
                    + (f" ({type(self.error).__name__}: {self.error})." if self.error else ".")
                )
        self.system = self._takes(writer.chat("sua"))
        self.mid_system = self._takes(writer.chat("uasua"))
        self.reasoning = self._takes(writer.chat("ur"))
        for self.arguments_as_text in (False, True):
            if self._takes(writer.chat("ucta")):
                self.tool_scripts = [s for s in ("ucta", "udtta", "uctcta", "uctaucta") if self._takes(writer.chat(s))]
                break
        else:  # some templates leave calls out, and keep results
            self.tool_scripts = [s for s in ("uata", "uatta", "uatauata") if self._takes(writer.chat(s))]
        for kind in ("text", "dict", "number", "list", "parts") if self.tool_scripts else ():
            if self._takes(writer.chat(self.tool_scripts[0], result=kind)):
                self.results.append(kind)

    def _takes(self, chat: _Chat) -> bool:
        """Whether every content stands in the text, in the order of the chat."""
        row = self.row(chat)
        return row is not None and [said for said, _, _ in row.places] == chat.said

    def content(self, text: str) -> Any:
        return _parts(text) if self.as_parts and text else text

    def call(self, names: Sequence[str], values: Sequence[str]) -> dict[str, Any]:
        calls = []
        for name, value in zip(names, values):
            arguments: Any = f'{{"a": {value}}}' if self.arguments_as_text else {"a": int(value)}
            function = {"name": name, "arguments": arguments}
            calls.append({"id": _call_id(name), "type": "function", "function": function})
        return {"role": "assistant", "content": self.content(""), "tool_calls": calls}

    def text(self, chat: _Chat) -> str | None:
        """None if the template does not take the chat."""
        try:
            text = self.tokenizer.apply_chat_template(
                chat.messages, tokenize=False, **{**self.template, "add_generation_prompt": False, **chat.options}
            )
        except Exception as error:  # a template raises what it likes
            self.error = error
            return None
        return text if isinstance(text, str) else None

    def row(self, chat: _Chat) -> _Row | None:
        text = self.text(chat)
        return None if text is None else _Row(self, text, chat.said)

    def ids(self, text: str) -> Ids:
        if text not in self.encoded:
            out = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
            self.encoded[text] = list(out)
        return self.encoded[text]

    def ids_of_part(self, text: str) -> Ids:
        """The token ids of a part of a rendered chat."""
        if not self.in_pieces:
            return self.ids(text)
        cuts = [0, *self.added_tokens(text), len(text)]
        return [token for a, b in pairwise(cuts) for token in self.ids(text[a:b])]

    def added_tokens(self, text: str) -> list[int]:
        """The characters of `text` at which an added token begins."""
        if not self.used:
            return []
        names = "|".join(map(re.escape, sorted(self.used, key=len, reverse=True)))
        return [match.start() for match in re.finditer(names, text)]

    def show(self, headers: Sequence[Ids]) -> str:
        return " or ".join(repr(self.tokenizer.decode(header)) for header in headers)


class _Row:
    """A rendered chat: its text, its token ids, where its contents stand in the text."""

    def __init__(self, renderer: _Renderer, text: str, said: Sequence[_Said]) -> None:
        self.renderer, self.text, self.ids = renderer, text, renderer.ids(text)
        renderer.used |= {renderer.added[token] for token in set(self.ids) & renderer.added.keys()}
        renderer.in_pieces = renderer.in_pieces and renderer.ids_of_part(text) == self.ids
        found = [(one, *place) for one in said if (place := _place(text, one)) is not None]
        self.places = sorted(found, key=lambda place: place[1])
        """(content, first character, character just behind), in the order of the text; what is left out is not in."""

    def column(self, character: int) -> int:
        """How many tokens lie before `character`; one that reaches across it does not."""
        if character == len(self.text):
            return len(self.ids)
        # What a text's last token is can depend on what follows: on a letter, or on nothing (an added token).
        letter = "x" if self.text[character] != "x" else "y"
        forms = [self.text[:character], self.text[:character] + letter]
        found = 0
        for form in forms:
            ids = self.renderer.ids_of_part(form)
            common = len(ids)
            while self.ids[:common] != ids[:common]:  # they differ in the last few tokens, if at all
                common -= 1
            found = max(found, common)
            if common == len(ids):
                break
        return found


def _place(text: str, said: _Said) -> tuple[int, int] | None:
    for form in (said.text.strip(), said.core):  # a template may strip it, and a header end as it begins
        at = text.find(form)
        if at >= 0:
            return at, at + len(form)
    return None


# From gaps between contents to headers.


@dataclass(frozen=True)
class _Gap:
    """What stands between two contents, one of the assistant and one of somebody else."""

    role: str | None
    """Whose header it is; None: the assistant's."""
    text: str
    """The header, and what stands before it: `text[start:]` is the header."""
    start: int
    token: int
    """The header's first token; the last one of a closing header."""
    asked: bool
    """It ends in a generation prompt."""
    closing: bool
    """The header is itself the end of the message before it ("[/INST]")."""


def _marks(renderer: _Renderer, tools: bool) -> list[tuple[list[Ids], list[Ids]]]:
    """The response templates and the instruction templates that chats of this template show, to be tried in turn.

    First with the headers that generation prompts end with. A template may also begin an answer without any of them
    (DeepSeek's does so with a call, if there was one before): then with what it writes there.
    """
    writer = _Writer(renderer, random.Random(0))
    chats = list(_chats_to_read(renderer, writer, tools))
    gaps = [gap for chat in chats for gap in _gaps(renderer, chat)]
    # Contents that begin and end with anything, to see which tokens a header has beside them.
    script = "uaua" + "sua" * renderer.mid_system + "".join(renderer.tool_scripts[:1] if tools else [])
    rows = [renderer.row(chat) for chat in chats[:8]]
    rows += [renderer.row(writer.chat(script, leads=[lead])) for lead in _LEADS]
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


def _chats_to_read(renderer: _Renderer, writer: _Writer, tools: bool) -> Iterator[_Chat]:
    for thinking in _THINKING:
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


def _gaps(renderer: _Renderer, chat: _Chat) -> Iterator[_Gap]:
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
    renderer: _Renderer,
    chat: _Chat,
    row: _Row,
    left: _Said,
    first: int,
    last: int,
    role: str | None,
    *,
    asked: bool,
) -> Iterator[_Gap]:
    """The gap between characters `first`, behind the content `left`, and `last`; none if nothing stands there."""
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


def _end_of_message(renderer: _Renderer, chat: _Chat, left: _Said, gap: str) -> int:
    """How many characters of `gap` end the message that says `left`: what stands there also if it is the last."""
    for generation_prompt in (False, True) if left.role == "assistant" else (False,):
        text = renderer.text(chat.until(left.message, generation_prompt))
        place = _place(text, left) if text is not None else None
        if text is None or place is None:
            continue
        alone = text[place[1] :]
        common = len(_common_start([gap, alone]))
        if common < len(alone) or generation_prompt:
            # The last message ends in another way ("<|return|>"), or a header follows. A header that begins with an
            # added token is told from the message's end by that token.
            common = max((at for at in renderer.added_tokens(gap) if at <= common), default=0)
        if common:
            return common
    return 0


def _headers(renderer: _Renderer, gaps: Sequence[_Gap], asked: bool = False) -> list[str]:
    """The headers in `gaps`: what those have in common that begin alike (end alike, if closing).

    Args:
        asked: only headers that a generation prompt ends with.
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
        # Plain words ("User:"), which a content may contain: with the added token that stands before them.
        for gap in group:
            start = max((at for at in renderer.added_tokens(gap.text) if at < gap.start), default=gap.start)
            out.append(gap.text[start : gap.start] + header)
    return [header for header in dict.fromkeys(out) if header.strip()]


def _tokens(headers: Sequence[str], rows: Sequence[_Row]) -> list[Ids]:
    """The token sequences that stand for the headers in `rows`, which depend on what is beside them."""
    out = []
    for header in headers:
        for row in rows:
            for match in re.finditer(re.escape(header), row.text):
                out.append(row.ids[row.column(match.start()) : row.column(match.end())])
    return [list(ids) for ids in dict.fromkeys(map(tuple, out)) if ids]


def _needed(headers: Sequence[Ids], makes_superfluous: Callable[[Ids, Ids], bool]) -> list[Ids]:
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


# The check.


def _fault(
    renderer: _Renderer, response: Sequence[Ids], instruction: Sequence[Ids], tools: bool, rounds: int = 16
) -> str | None:
    """What the marks get wrong in random chats, in words; None if nothing.

    Contents of the assistant lie in answers and all others outside. The prompt that `generate` is given has the
    answers of the conversation that begins with it.
    """
    rng = random.Random(1)
    writer = _Writer(renderer, rng)
    seen = {True: 0, False: 0}
    for _ in range(rounds):
        chat = writer.chat(
            _script(renderer, rng, tools),
            leads=_LEADS if rng.random() < 0.7 else (),
            result=rng.choice(renderer.results) if tools else "text",
            **rng.choice(_THINKING),
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


def _script(renderer: _Renderer, rng: random.Random, tools: bool) -> str:
    script = "s" if renderer.system and rng.random() < 0.3 else ""
    for turn in range(rng.randrange(1, 4)):
        if turn and renderer.mid_system and rng.random() < 0.2:
            script += "s"
        if tools and rng.random() < 0.5:
            script += rng.choice(renderer.tool_scripts)
        else:
            script += rng.choice(["ua", "ur"] if renderer.reasoning else ["ua"])
    return script
