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
from typing import Any, NamedTuple

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
# What a content may begin and end with. A letter does not merge with a header's tail into one token; the others can.
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
    """The template has no marks that can be set. The message says why."""


@dataclass(frozen=True)
class Content:
    """A content of a chat: what a role says in a message, its thoughts, or the argument of a tool call."""

    role: str
    message: int
    """Index of the message."""
    text: str
    core: str
    """A word of the text that occurs once in the chat. It stays if the template strips or escapes the text."""


@dataclass
class Chat:
    messages: list[dict[str, Any]] = field(default_factory=list)
    contents: list[Content] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the template: tools, thinking, generation prompt."""

    def until(self, message: int, generation_prompt: bool) -> Chat:
        """The chat up to and including the message of that index."""
        return replace(
            self,
            messages=self.messages[: message + 1],
            contents=[content for content in self.contents if content.message <= message],
            options={**self.options, "add_generation_prompt": generation_prompt},
        )


class Writer:
    """Writes chats from scripts, a symbol for each message.

    s: system, u: user, a: assistant, r: assistant with its reasoning, c: a tool call, d: two tool calls, t: a result.
    """

    def __init__(self, renderer: Renderer, rng: random.Random) -> None:
        self.renderer = renderer
        self.rng = rng
        self.count = 0

    def chat(
        self, script: str, *, leads: Sequence[str] = (), empty: float = 0.1, result: str = "text", **options: Any
    ) -> Chat:
        """A chat with random contents.

        Args:
            script: a symbol for each message.
            leads: what contents may begin with; they then end with anything. Without `leads` every content begins and
                ends with a letter or a digit, and none is empty.
            empty: the share of contents that are empty.
            result: the form of a tool's result, one of `Renderer.results`.
            options: options of the template.
        """
        if set(script) & set("cdt"):
            options["tools"] = [_TOOL]
        chat = Chat(options=options)
        called: list[str] = []  # tools that were called and have not answered
        for symbol in script:
            index = len(chat.messages)
            if symbol in "cd":
                values = [self._number() for _ in range(1 if symbol == "c" else 2)]
                called = [self.rng.choice(["multiply", "pow"]) for _ in values]
                chat.messages.append(self.renderer.call(called, values))
                chat.contents += [Content("assistant", index, text=value, core=value) for value in values]
                continue
            text, core = self._content(leads, empty)
            if symbol == "t":
                role = "tool"
                name = called.pop(0) if called else "multiply"
                message = self._result(name, text, core, result)
                if result == "number":
                    core = core[2:]  # without "kw"
                    text = core
            else:
                role = {"s": "system", "u": "user"}.get(symbol, "assistant")
                message = {"role": role, "content": self.renderer.content(text)}
            if symbol == "r":
                thoughts, core_of_thoughts = self._content()
                message["reasoning_content"] = thoughts
                message["thinking"] = thoughts
                chat.contents.append(Content(role, index, thoughts, core_of_thoughts))
            chat.messages.append(message)
            if core:
                chat.contents.append(Content(role, index, text, core))
        return chat

    def _result(self, name: str, text: str, core: str, form: str) -> dict[str, Any]:
        """The message with a tool's result.

        Args:
            name: of the tool.
            text: the result.
            core: its core, "kw" and a number; "" if the result is empty.
            form: one of `Renderer.results`.
        """
        content: Any
        if form == "dict":
            content = {"value": text}
        elif form == "list":
            content = [text]
        elif form == "number":
            content = {"value": int(core[2:] or 0)}
        elif form == "parts":
            content = _parts(text)
        else:
            content = self.renderer.content(text)
        return {"role": "tool", "content": content, "name": name, "tool_call_id": _call_id(name)}

    def _number(self) -> str:
        self.count += 1
        return str(730_000 + self.count)

    def _content(self, leads: Sequence[str] = (), empty: float = 0.0) -> tuple[str, str]:
        """A text and its core; both "" if the content is empty."""
        if leads and self.rng.random() < empty:
            return "", ""
        core = f"kw{self._number()}"
        phrase = self.rng.choice(_PHRASES)
        text = self.rng.choice([core, f"{phrase} {core}", f"{core} {phrase}", f"{phrase}\n{core}\n\n{phrase}"])
        if leads:
            text = self.rng.choice(leads) + text + self.rng.choice(_TRAILS)
        return text, core


def _parts(text: str) -> list[dict[str, str]]:
    """A content in the form that templates of vision models take."""
    return [{"type": "text", "text": text}]


def _call_id(name: str) -> str:
    return f"call{name:_<5.5}"  # Mistral's templates demand nine letters and digits


class Renderer:
    """A chat template with its tokenizer: the text and token ids of chats, and which chats the template takes."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self.tokenizer = tokenizer
        self.template = {} if template is None else {"chat_template": template}
        # What the template takes; `probe` finds it out.
        self.as_parts = False
        """Contents are lists of parts, not texts."""
        self.arguments_as_text = False
        """The arguments of a tool call are JSON text, not a dict."""
        self.system = False
        """A system message at the beginning."""
        self.mid_system = False
        """A system message in mid-chat."""
        self.reasoning = False
        """The assistant's reasoning as a field of its message."""
        self.tool_scripts: list[str] = []
        """Scripts of chats with tools."""
        self.results: list[str] = []
        """Forms of a tool's result: "text", "dict", "number", "list", "parts"."""
        self.error: Exception | None = None
        """What the template raised last."""
        # What rendering and tokenizing needs.
        self.added: dict[int, str] = {}
        """The tokenizer's added tokens."""
        self.used: set[str] = set()
        """The added tokens that chats contain. Some tokenizers have thousands of others."""
        self.encoded: dict[str, Ids] = {}
        """Token ids of texts: a cache."""
        self.in_pieces = True
        """Whether a text has the tokens of its pieces, from one added token to the next. Cached pieces are quicker."""

    def probe(self) -> None:
        """Find out which roles, tools and forms of content the template takes.

        Raises:
            NoMarks: it does not even render a message of the user and an answer.
        """
        self.added = {token: name for name, token in self.tokenizer.get_added_vocab().items() if name}
        writer = Writer(self, random.Random(0))
        if not self._takes(writer.chat("ua")):
            self.as_parts = True  # a vision model's
            if not self._takes(writer.chat("ua")):
                reason = f" ({type(self.error).__name__}: {self.error})" if self.error else ""
                raise NoMarks(f"the chat template does not render a message of the user and an answer{reason}.")
        self.system = self._takes(writer.chat("sua"))
        self.mid_system = self._takes(writer.chat("uasua"))
        self.reasoning = self._takes(writer.chat("ur"))
        self.tool_scripts = self._probe_tools(writer)
        if self.tool_scripts:
            for form in ("text", "dict", "number", "list", "parts"):
                if self._takes(writer.chat(self.tool_scripts[0], result=form)):
                    self.results.append(form)

    def _probe_tools(self, writer: Writer) -> list[str]:
        """The scripts with tools that the template takes; sets `arguments_as_text`."""
        for as_text in (False, True):
            self.arguments_as_text = as_text
            if self._takes(writer.chat("ucta")):
                scripts = ["ucta", "udtta", "uctcta", "uctaucta"]
                break
        else:
            scripts = ["uata", "uatta", "uatauata"]  # some templates omit calls and keep results
        return [script for script in scripts if self._takes(writer.chat(script))]

    def _takes(self, chat: Chat) -> bool:
        """Whether the text has every content, in the order of the chat."""
        row = self.row(chat)
        return row is not None and [place.content for place in row.places] == chat.contents

    def content(self, text: str) -> Any:
        """A content in the form that the template takes."""
        return _parts(text) if self.as_parts and text else text

    def call(self, names: Sequence[str], values: Sequence[str]) -> dict[str, Any]:
        """The message that calls the tools `names`, each with one of the `values`."""
        calls = []
        for name, value in zip(names, values):
            arguments: Any = f'{{"a": {value}}}' if self.arguments_as_text else {"a": int(value)}
            function = {"name": name, "arguments": arguments}
            calls.append({"id": _call_id(name), "type": "function", "function": function})
        return {"role": "assistant", "content": self.content(""), "tool_calls": calls}

    def text(self, chat: Chat) -> str | None:
        """The rendered chat; None if the template does not take it."""
        options = {**self.template, "add_generation_prompt": False, **chat.options}
        try:
            text = self.tokenizer.apply_chat_template(chat.messages, tokenize=False, **options)
        except Exception as error:  # a template can raise anything
            self.error = error
            return None
        return text if isinstance(text, str) else None

    def row(self, chat: Chat) -> Row | None:
        """The rendered chat with its tokens; None if the template does not take it."""
        text = self.text(chat)
        return None if text is None else Row(self, text, chat.contents)

    def ids(self, text: str) -> Ids:
        """The token ids of a text."""
        if text not in self.encoded:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
            self.encoded[text] = list(ids)
        return self.encoded[text]

    def ids_of_part(self, text: str) -> Ids:
        """The token ids of a part of a rendered chat."""
        if not self.in_pieces:
            return self.ids(text)
        ids: Ids = []
        for start, end in pairwise([0, *self.added_tokens(text), len(text)]):
            ids += self.ids(text[start:end])
        return ids

    def added_tokens(self, text: str) -> list[int]:
        """The indices in `text` at which an added token begins."""
        if not self.used:
            return []
        longest_first = sorted(self.used, key=len, reverse=True)
        names = "|".join(re.escape(name) for name in longest_first)
        return [match.start() for match in re.finditer(names, text)]

    def show(self, headers: Sequence[Ids]) -> str:
        """Headers as text, for a message."""
        return " or ".join(repr(self.tokenizer.decode(header)) for header in headers)


class Place(NamedTuple):
    """Where a content stands: `text[start:end]`."""

    content: Content
    start: int
    end: int


class Row:
    """A rendered chat: its text, its token ids, and the places of its contents in the text."""

    def __init__(self, renderer: Renderer, text: str, contents: Sequence[Content]) -> None:
        self.renderer = renderer
        self.text = text
        self.ids = renderer.ids(text)
        for token in set(self.ids) & renderer.added.keys():
            renderer.used.add(renderer.added[token])
        renderer.in_pieces = renderer.in_pieces and renderer.ids_of_part(text) == self.ids
        places = []
        for content in contents:
            span = find(content, text)
            if span is not None:
                places.append(Place(content, *span))
        self.places = sorted(places, key=lambda place: place.start)
        """In the order of the text. Contents that the template omits have no place."""

    def column(self, character: int) -> int:
        r"""How many tokens end at or before `character`. A token that reaches across it does not count.

        In "User:\n\nYes" the two newlines are one token, which reaches across character 6:

            character   0      4   5    6    7     10
            token       |User  |:  |\n   \n |Yes  |
            column      0      1   2    2    3     4
        """
        if character == len(self.text):
            return len(self.ids)
        # The last token of a text can depend on the text behind it, so it is encoded alone and before another letter.
        other = "x" if self.text[character] != "x" else "y"
        forms = [self.text[:character], self.text[:character] + other]
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


def find(content: Content, text: str) -> tuple[int, int] | None:
    """Start and end of a content in `text`, as a slice; None if the template omits the content."""
    # A template may strip the content, and a header may end with the whitespace with which the content begins.
    for form in (content.text.strip(), content.core):
        start = text.find(form)
        if start >= 0:
            return start, start + len(form)
    return None
