"""Marks found from a tokenizer. On every template that TRL ships, a prompt is edited where its conversation is.

The tokenizers are byte-level BPE, trained here, once with the family's special tokens and once without any, so that
headers are many tokens that merge with what stands beside them.
"""

import functools
import pathlib
import re
import warnings
from itertools import pairwise
from types import SimpleNamespace

import pytest
from conftest import DIMENSIONS
from peft import get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.chat_template_utils import (
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    supports_tool_calling,
)

from peft_reft import LoReftConfig, chat_marks
from peft_reft.integrations.trainer import FindMarksAndLogFirstRow
from peft_reft.positions.chat.template import find_marks
from peft_reft.positions.turns import answers_of

trl = pytest.importorskip("trl")
TEMPLATES = pathlib.Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
QUICK = ["gemma3", "gptoss", "llama3", "llava_next", "qwen2_5", "qwen3_training"]
# Their marks hold for chats without tools only.
WITHOUT_TOOLS = {
    (name, False): "without special tokens, the headers of a call and of a result begin with the same word"
    for name in NAMES
    if name.startswith("deepseek")
}
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as Llama 3 and Qwen
SPECIAL = re.compile(
    r"<\|[^<>|\s'\"]{1,40}\|>|<｜[^<>｜\s]{1,40}｜>|<\|\"\|>|<\|?(?:turn|tool_response|tool_call|channel)\|?>"
    r"|</?(?:think|tool_call|tool_response|start_of_turn|end_of_turn|end_of_utterance)>|\[/?INST\]"
)


@functools.lru_cache
def trained() -> str:
    """Train a byte-level BPE tokenizer with merges in headers and in newlines; return it as JSON."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [(TEMPLATES / f"{name}.jinja").read_text() for name in ("qwen3", "llama3", "phi3", "smolvlm")]
    tokenizer.train_from_iterator([*texts, "a\n\nb\n\n\nc"] * 3, trainer)
    return tokenizer.to_str()


def tokenizer_with(template: str | None, special: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(trained())
    tokenizer.add_special_tokens(["<s>", "</s>", *(sorted(set(SPECIAL.findall(template or ""))) if special else [])])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def tokenizer_named(name: str, special: bool = True) -> PreTrainedTokenizerFast:
    return tokenizer_with((TEMPLATES / f"{name}.jinja").read_text(), special)


# Conversations.

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def call(*cities, as_text=False):
    arguments = [f'{{"city": "{city}"}}' if as_text else {"city": city} for city in cities]
    calls = [
        {"id": f"call0000{i}", "type": "function", "function": {"name": "weather", "arguments": a}}
        for i, a in enumerate(arguments)
    ]
    return message("assistant", "", tool_calls=calls)


def result(content, i=0):
    return message("tool", content, name="weather", tool_call_id=f"call0000{i}")


def conversations():
    """Return (name, messages, options of the template) of each conversation."""
    ask, more = message("user", "Say 3 words, please"), message("user", " and\n\nonce more? ")
    yes, no = message("assistant", "Yes."), message("assistant", "\n\nNo: 17 times.\n")
    system = message("system", "Be brief!")
    tools = {"tools": [TOOL]}
    yield "turns", [ask, yes, more, no, ask, yes], {}
    yield "system", [system, ask, yes, more, no], {}
    yield "system in mid-chat", [ask, yes, system, more, no], {}
    yield "empty", [message("user", ""), message("assistant", ""), ask, yes], {}
    for thinking in (True, False):
        yield f"thinking {thinking}", [ask, yes, more, no], {"enable_thinking": thinking}
    thought = message("assistant", "Four.", reasoning_content="Two and two", thinking="Two and two")
    yield "reasoning", [ask, thought, more, thought], {}
    for as_text in (False, True):
        one, two = call("Oslo", as_text=as_text), call("Oslo", "Rome", as_text=as_text)
        yield "tool", [ask, one, result("12 degrees"), yes, more, one, result("13"), no], tools
        yield "tools in a row", [ask, one, result("12 degrees"), one, result("13"), yes], tools
        yield "parallel tools", [ask, two, result("12 degrees"), result("\n20", 1), yes], tools
    yield "a tool's result without a call", [ask, yes, result("12 degrees"), no], tools
    yield "a tool's result as a dict", [ask, call("Oslo"), result({"degrees": 12, "sky": "blue"}), yes], tools
    yield "a tool's result as a list", [ask, call("Oslo"), result(["blue", "grey"]), yes], tools


def rendered(tokenizer, messages, options, generation_prompt=False):
    """Return token ids, or None if the template does not take these messages."""
    for parts in (False, True):
        if parts:
            messages = [
                {**m, "content": [{"type": "text", "text": m["content"]}] if isinstance(m["content"], str) else []}
                for m in messages
            ]
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation_prompt, **options
            )
        except Exception:
            continue
        first = messages[-1]["content"]
        core = (first[0]["text"] if isinstance(first, list) and first and parts else str(first)).strip()
        if core in text or not isinstance(first, (str, list)):
            return tokenizer(text, add_special_tokens=False)["input_ids"]
    return None


SPECS = {
    "l2": {"l": 2},
    "f3+l2": {"f": 3, "l": 2},
    "p": {"p": True},
    "g2": {"g": 2},
    "all": {"p": True, "g": 10**6},
}


def edited(spans, length, spec):
    """Return the columns that a spec edits in a document with these answers."""
    out, previous = set(), 0
    for k, (start, end) in enumerate(spans):
        f, last = spec.get("f", 0), spec.get("l", 0)
        if k == 0 and start < f + last:
            f, last = min(f, start // 2), min(last, (start + 1) // 2)
        out |= set(range(f)) if k == 0 else set()
        out |= set(range(max(previous, start - last), start))
        out |= set(range(previous, start)) if spec.get("p") else set()
        out |= set(range(start, min(end, start + spec.get("g", 0))))
        previous = end
    return out | (set(range(previous, length)) if spec.get("p") else set())


def compare(tokenizer, found, tools=True):
    """Compare each turn's prompt with the conversation that begins with it; return how many were compared."""
    compared = 0
    for name, messages, options in conversations():
        whole = rendered(tokenizer, messages, options)
        if whole is None or ("tools" in options and not tools):
            continue
        spans = answers_of(whole, found.response_template, found.instruction_template)
        for i in range(1, len(messages)):
            if messages[i]["role"] != "assistant":
                continue
            prompt = rendered(tokenizer, messages[:i], options, generation_prompt=True)
            if prompt is None or whole[: len(prompt)] != prompt:
                continue
            given = len(prompt)
            asked = answers_of(prompt, found.response_template, found.instruction_template, given)
            for spec in SPECS.values():
                in_training = {column for column in edited(spans, len(whole), spec) if column < given}
                assert edited(asked, given, spec) == in_training, (name, i, spec)
            compared += 1
    return compared


def told_apart(tokenizer, found):
    """Return the text of a chat's answers, and the text of its prompts."""
    ask, answer = message("user", "Where is Oslo?"), message("assistant", "In Norway, as kilometre 17 knows.")
    ids = rendered(tokenizer, [ask, answer, ask, answer], {})
    spans = answers_of(ids, found.response_template, found.instruction_template)
    cuts = [0, *(column for span in spans for column in span), len(ids)]
    parts = [tokenizer.decode(ids[a:b]) for a, b in pairwise(cuts)]
    return parts[1::2], parts[::2]


def check(name, special):
    tokenizer = tokenizer_named(name, special)
    found = find_marks(tokenizer)
    assert found.problem is None
    assert found.without_tools == ((name, special) in WITHOUT_TOOLS)
    assert not found.without_system
    compared = compare(tokenizer, found, tools=not found.without_tools)
    # As plain text, a generation prompt's last token can merge with what follows: no conversation begins with it.
    assert compared >= 2 or not special
    answers, prompts = told_apart(tokenizer, found)
    assert len(answers) == 2
    assert all("kilometre 17" in text and "Where" not in text for text in answers)
    assert all("kilometre" not in text for text in prompts)
    return compare_rollout(tokenizer, found)


def compare_rollout(tokenizer, found):
    """Compare a rollout with a tool, as TRL's GRPO puts it together, and the forward that trains on it.

    Return whether TRL takes the template.
    """
    if not supports_tool_calling(tokenizer):
        return False
    try:
        template = None
        if not is_chat_template_prefix_preserving(tokenizer):
            template = get_training_chat_template(tokenizer)
        options = dict(tools=[TOOL], chat_template=template, add_generation_prompt=True, return_dict=False)
        prompt = tokenizer.apply_chat_template([message("user", "Say 3 words, please")], **options)
        trainer = SimpleNamespace(_is_vlm=False, processing_class=tokenizer, _tokenizer=tokenizer)
        trainer.chat_template, trainer.chat_template_kwargs = template, {}
        suffix = trl.GRPOTrainer._get_tool_suffix_ids(trainer, [{"role": "tool", "name": "weather", "content": "12"}])
    except (TypeError, ValueError):  # TRL's own, for templates in which a turn is no beginning of the next
        return False
    call, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("I call it", "It is 12."))
    second = [*prompt, *call, *suffix]
    for given, whole in ((prompt, [*prompt, *call]), (second, [*second, *answer])):
        marks = found.response_template, found.instruction_template
        assert answers_of(whole, *marks, given=len(given)) == answers_of(whole, *marks)
    return True


@pytest.mark.parametrize("name", QUICK)
def test_prompt_and_conversation_agree(name):
    assert check(name, special=True) == (name in ("gptoss", "qwen2_5", "qwen3_training"))


@pytest.mark.slow
@pytest.mark.parametrize("special", [True, False], ids=["special tokens", "plain text"])
@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_conversation_agree_for_every_template(name, special):
    check(name, special)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if f"{name}_training" in NAMES])
def test_marks_of_a_template_hold_for_its_training_form(name):
    """TRL swaps the template of a tokenizer whose marks are already known."""
    found = find_marks(tokenizer_named(name))
    training = tokenizer_named(name)
    training.chat_template = (TEMPLATES / f"{name}_training.jinja").read_text()
    assert compare(training, found) >= 2
    answers, _ = told_apart(training, found)
    assert len(answers) == 2 and all("kilometre 17" in text for text in answers)


# What is found.

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_headers_with_their_tail_and_without():
    tokenizer = tokenizer_with(CHATML)
    found = find_marks(tokenizer)
    decoded = [tokenizer.decode(header) for header in found.response_template]
    assert decoded == ["<|im_start|>assistant\n", "<|im_start|>assistant"]
    assert {tokenizer.decode(header) for header in found.instruction_template} == {
        "<|im_start|>user",
        "<|im_start|>system",
        "<|im_start|>tool",
    }


def test_a_block_of_thoughts_is_answer():
    thinking = CHATML.replace("assistant\n{%", "assistant\n<think>\n{%").replace(
        "\n{{ m.content", "\n{{ '<think>\n' if m.role == 'assistant' }}{{ m.content"
    )
    tokenizer = tokenizer_with(thinking)
    assert tokenizer.decode(find_marks(tokenizer).response_template[0]) == "<|im_start|>assistant\n"


def test_plain_words_are_taken_with_the_special_token_before_them():
    tokenizer = tokenizer_named("smolvlm")
    found = find_marks(tokenizer)
    assert [tokenizer.decode(header) for header in found.response_template] == ["<end_of_utterance>\nAssistant:"]


def test_a_processor_is_asked_for_its_tokenizer():
    class Processor:
        tokenizer = tokenizer_with(None)
        chat_template = CHATML

    assert find_marks(Processor()).response_template


def test_tools_that_are_not_told_apart_leave_the_rest():
    """A tool's result under the header of an answer."""
    template = CHATML.replace("{{ m.role }}", "{{ 'assistant' if m.role == 'tool' else m.role }}")
    found = find_marks(tokenizer_with(template))
    assert found.problem is None and found.without_tools and found.response_template


VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
    "{% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}\n"
    "{% elif m.role == 'system' %}{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""A system message has no header, so that in mid-chat it reads like the rest of the answer before it."""
TOOLS, SYSTEM = "the results of tools", "system messages in mid-chat"
LIMITED = {
    "none": (CHATML, []),
    "tools": (CHATML.replace("{{ m.role }}", "{{ 'assistant' if m.role == 'tool' else m.role }}"), [TOOLS]),
    "system": (VICUNA, [SYSTEM]),
    "both": (VICUNA.replace("m.role == 'system'", "m.role in ('system', 'tool')"), [TOOLS, SYSTEM]),
}


def test_a_system_message_that_is_not_told_in_mid_chat_leaves_the_rest():
    tokenizer = tokenizer_with(VICUNA)
    found = find_marks(tokenizer)
    assert found.problem is None and found.without_system and not found.without_tools
    answers, prompts = told_apart(tokenizer, found)
    assert len(answers) == 2 and all("kilometre 17" in text and "Where" not in text for text in answers)
    assert all("kilometre" not in text for text in prompts)
    # The flag is true: a system message in mid-chat is taken for answer.
    ask, answer = message("user", "Where is Oslo?"), message("assistant", "In Norway.")
    ids = rendered(tokenizer, [ask, answer, message("system", "Be brief!"), ask, answer], {})
    start, end = answers_of(ids, found.response_template, found.instruction_template)[0]
    assert "Be brief!" in tokenizer.decode(ids[start:end])


@pytest.mark.parametrize("name", LIMITED)
def test_a_warning_names_the_chats_that_are_not_told(name):
    """`chat_marks` and the callback of an unchanged Trainer both warn, each once."""
    template, untold = LIMITED[name]
    tokenizer = tokenizer_with(template)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **DIMENSIONS))
    model = get_peft_model(base, LoReftConfig(task_type="CAUSAL_LM", positions="l1", r=2))
    with warnings.catch_warnings(record=True) as by_hand:
        warnings.simplefilter("always")
        marks = chat_marks(tokenizer)
    with warnings.catch_warnings(record=True) as by_trainer:
        warnings.simplefilter("always")
        FindMarksAndLogFirstRow().on_init_end(None, None, None, model=model, processing_class=tokenizer)
    assert model.peft_config["default"].response_template == marks["response_template"]
    for caught in (by_hand, by_trainer):
        texts = [str(warning.message) for warning in caught]
        assert [f"do not tell {' and '.join(untold)} from answers" in text for text in texts] == [True] * bool(untold)


# What has no marks.


def test_a_tokenizer_without_a_template_has_no_marks():
    assert find_marks(tokenizer_with(None)) is None


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "nothing that tells an answer"),
        ("{% for m in messages %}<|x|>{{ m.content }}<|y|>{% endfor %}", "do not tell answers from prompts"),
        ("{% for m in messages %}", "does not render"),
        ("{{ raise_exception('no chats') }}", "no chats"),
        ("always the same", "does not render"),
        ("{{ messages[0].nothing.at.all }}", "does not render"),
    ],
)
def test_templates_without_marks_say_why(template, problem):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find_marks(tokenizer_with(template))
    assert problem in found.problem
    assert found.response_template == found.instruction_template == []


@pytest.mark.slow
def test_a_real_tokenizer():
    """SmolLM2's, which the examples write to `outputs/`."""
    folder = pathlib.Path(__file__).parents[1] / "outputs" / "SmolLM2-135M-Instruct"
    if not folder.exists():
        pytest.skip(f"{folder} is not there")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    found = find_marks(tokenizer)
    assert tokenizer.decode(found.response_template[0]) == "<|im_start|>assistant\n"
    assert compare(tokenizer, found) >= 2
