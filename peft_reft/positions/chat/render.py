r"""Chats with made-up contents: written from scripts, rendered by a chat template, their contents found in the text.

    Chat, script "ua"                   user                                       assistant
    Row.text          <|im_start|>user\nkw730001<|im_end|>\n<|im_start|>assistant\nkw730002<|im_end|>\n
    Row.places                          ~~~~~~~~                                   ~~~~~~~~

Every content has a word that occurs once in the chat, so its place in the text is known whatever the template writes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

Ids = list[int]

_TOOL = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "Computes a number.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
THINKING: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False}, {"enable_thinking": True})
# What a content begins and ends with. A letter does not merge with a header's tail; the others can.
LEADS = ("", " ", "\n", "\n\n", " \n", "\t", "7", "(", "é", "“", "日本", "-", "#")
_TRAILS = ("", ".", "!", " ", "\n", "\n\n", "7", "é", "🙂", ")")
_PHRASES = (
    "the user asks the assistant",
    "Users and tools of a system",
    "Assistant, model, user",
    "ja",
    "many words, and a number such as 12; " * 3 + "no more",
)


class NoMarks(Exception):
    """A template has no marks that can be set; the text says why."""


@dataclass(frozen=True)
class Said:
    """A content of a chat."""

    role: str
    message: int
    """Which message says it."""
    text: str
    core: str
    """A word of the text that occurs once in the chat, and stays if the template strips or escapes the text."""


@dataclass
class Chat:
    messages: list[dict[str, Any]] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the template: tools, thinking, generation prompt."""

    def until(self, message: int, generation_prompt: bool) -> Chat:
        """The chat up to a message, that one included."""
        said = [said for said in self.said if said.message <= message]
        options = {**self.options, "add_generation_prompt": generation_prompt}
        return replace(self, messages=self.messages[: message + 1], said=said, options=options)


class Writer:
    """Writes chats from scripts, a letter for each message.

    s: system, u: user, a: assistant, r: assistant with its reasoning, c: a tool call, d: two tool calls, t: a result.
    """

    def __init__(self, renderer: Renderer, rng: random.Random) -> None:
        self.renderer, self.rng, self.count = renderer, rng, 0

    def chat(
        self, script: str, *, leads: Sequence[str] = (), empty: float = 0.1, result: str = "text", **options: Any
    ) -> Chat:
        """A chat with random contents.

        Args:
            leads: what contents may begin with; they then end with anything. Without `leads` every content begins and
                ends with a letter or a digit, and none is empty.
            empty: the share of contents that are empty.
            result: the form of a tool's result, one of `Renderer.results`.
            options: options of the template.
        """
        if set(script) & set("cdt"):
            options["tools"] = [_TOOL]
        chat = Chat(options=options)
        calls: list[str] = []
        for letter in script:
            if letter in "cd":
                values = [self._number() for _ in range(1 if letter == "c" else 2)]
                calls = [self.rng.choice(["multiply", "pow"]) for _ in values]
                chat.messages.append(self.renderer.call(calls, values))
                chat.said += [Said("assistant", len(chat.messages) - 1, value, value) for value in values]
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
                chat.said.append(Said(role, at, thought, core_of_thought))
            chat.messages.append(message)
            if core and role == "tool" and result == "number":
                text = core = core[2:]
            if core:
                chat.said.append(Said(role, at, text, core))
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


class Renderer:
    """A chat template with its tokenizer: the text and token ids of chats, and which chats the template takes."""

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
        """Added tokens that some chat contains; some tokenizers have thousands that none does."""
        self.encoded: dict[str, Ids] = {}
        self.in_pieces = True
        """Whether a text encodes as its pieces do, from one added token to the next. Cached pieces are quicker."""

    def probe(self) -> None:
        """Find out which roles, tools and forms of content the template takes.

        Raises:
            NoMarks: it does not even render a message of the user and an answer.
        """
        self.added = {token: name for name, token in self.tokenizer.get_added_vocab().items() if name}
        writer = Writer(self, random.Random(0))
        if not self._takes(writer.chat("ua")):
            self.as_parts = True  # of a vision model
            if not self._takes(writer.chat("ua")):
                raise NoMarks(
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
        else:  # some templates omit calls and keep results
            self.tool_scripts = [s for s in ("uata", "uatta", "uatauata") if self._takes(writer.chat(s))]
        for kind in ("text", "dict", "number", "list", "parts") if self.tool_scripts else ():
            if self._takes(writer.chat(self.tool_scripts[0], result=kind)):
                self.results.append(kind)

    def _takes(self, chat: Chat) -> bool:
        """Whether the text has every content, in the order of the chat."""
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

    def text(self, chat: Chat) -> str | None:
        """The rendered chat; None if the template does not take it."""
        try:
            text = self.tokenizer.apply_chat_template(
                chat.messages, tokenize=False, **{**self.template, "add_generation_prompt": False, **chat.options}
            )
        except Exception as error:  # a template raises what it likes
            self.error = error
            return None
        return text if isinstance(text, str) else None

    def row(self, chat: Chat) -> Row | None:
        text = self.text(chat)
        return None if text is None else Row(self, text, chat.said)

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
        """The indices in `text` at which an added token begins."""
        if not self.used:
            return []
        names = "|".join(map(re.escape, sorted(self.used, key=len, reverse=True)))
        return [match.start() for match in re.finditer(names, text)]

    def show(self, headers: Sequence[Ids]) -> str:
        return " or ".join(repr(self.tokenizer.decode(header)) for header in headers)


class Row:
    """A rendered chat: its text, its token ids, where its contents stand in the text."""

    def __init__(self, renderer: Renderer, text: str, said: Sequence[Said]) -> None:
        self.renderer, self.text, self.ids = renderer, text, renderer.ids(text)
        renderer.used |= {renderer.added[token] for token in set(self.ids) & renderer.added.keys()}
        renderer.in_pieces = renderer.in_pieces and renderer.ids_of_part(text) == self.ids
        found = [(one, *place) for one in said if (place := place_of(text, one)) is not None]
        self.places = sorted(found, key=lambda place: place[1])
        """(content, first character, character just behind), in the order of the text; omitted contents are not in."""

    def column(self, character: int) -> int:
        r"""How many tokens end at or before `character`; a token that reaches across it does not count.

        In "User:\n\nYes" the two newlines are one token, which reaches across character 6:

            character   0      4   5    6    7     10
            token       |User  |:  |\n   \n |Yes  |
            column      0      1   2    2    3     4
        """
        if character == len(self.text):
            return len(self.ids)
        # The last token of a text can depend on what follows it, so the text is encoded alone and before a letter.
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


def place_of(text: str, said: Said) -> tuple[int, int] | None:
    """The first character of a content in `text`, and the one just behind it; None if the template omits it."""
    # Stripped, because a template may strip it, and a header may end with the whitespace that begins it.
    for form in (said.text.strip(), said.core):
        at = text.find(form)
        if at >= 0:
            return at, at + len(form)
    return None
