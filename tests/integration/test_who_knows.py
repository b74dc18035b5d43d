"""Who knows where the prompt ends: each row of docs/prompts.md is a test.

"Works" means that the tokens edited are those that `generate` edits in the same document, turn by turn. Data are such
that a test tells the answers by itself: prompts are letters, completions digits, chats have ChatML headers.
"""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import importlib
import re
import warnings
from pathlib import Path

import pytest
import torch
from conftest import SPECIAL, WORDS, build, randomise
from datasets import Dataset
from peft import get_peft_model
from transformers import DynamicCache

from peft_reft import DataCollatorForLoReft, LoReftConfig, LoReftRuntimeConfig, chat_marks, prompt_lengths

from .conftest import PAIRS
from .spy import Documents, expected_offsets
from .training import WARNINGS, arguments

pytestmark = WARNINGS

PAGE = Path(__file__).parents[2] / "docs" / "prompts.md"
TOKENS = SPECIAL + WORDS
HEADER = [TOKENS.index("<|im_start|>"), TOKENS.index("assistant")]
DIGITS = {TOKENS.index(digit) for digit in "0123456789"}

CASES = {}
ELSEWHERE = {
    "plain text, no chat template": "integration/test_sft.py::test_language_modelling_data_is_refused",
    "GRPO with tools, environments, `rollout_func`": (
        "integration/test_tools.py::test_rollouts_with_tools_edit_what_training_edits",
        "integration/test_rl.py::test_turns",
        "integration/test_rl.py::test_a_rollout_function_of_several_turns",
        "integration/test_rl.py::test_turns_that_training_cannot_see_are_refused",
    ),
    "reward models, classifiers, embeddings, token classification": (
        "integration/test_preference.py::test_reward",
        "integration/test_trainer_seq_cls.py::test_only_the_first_token_is_edited",
        "integration/test_trainer_tasks.py::test_labels_of_token_classification_end_no_prompt",
        "integration/test_trainer_tasks.py::test_feature_extraction",
    ),
    "encoder-decoder models": "integration/test_trainer_tasks.py::test_seq2seq_edits_the_prompt_in_the_encoder",
    "padding, beams, static caches, chunked prefill, assistants, prompt lookup": (
        "test_generate.py::test_rows_of_mixed_lengths_equal_teacher_forcing",
        "test_generate.py::test_ways_of_decoding",
        "test_generate.py::test_beams_equal_teacher_forcing",
        "test_generate.py::test_assisted_decoding_writes_what_greedy_decoding_writes",
        "test_generate.py::test_prompt_lookup_writes_what_greedy_decoding_writes",
    ),
    "vLLM: chats turn by turn, prefix cache, chunks that cut anywhere": (
        "serving/test_turns.py::test_a_chat_turn_by_turn",
        "serving/test_turns.py::test_chunks_that_cut_anywhere",
    ),
}
"""Rows whose tests stand in other files."""


def case(name, *, supported=False):
    """Make a function the test of that row of the table; if `supported`, it is one of docs/support.md, too."""

    def add(function):
        assert name not in CASES, name
        section = "Trainers: preferences and reinforcement"
        marks = [pytest.mark.cell(section, f"{name} (docs/prompts.md)")] if supported else []
        CASES[name] = pytest.param(function, id=name, marks=marks)
        return function

    return add


def config(positions="f2+l2", **kwargs):
    whole_rows = LoReftRuntimeConfig(untouched_prompt="off")  # what the spy reads
    return LoReftConfig(task_type="CAUSAL_LM", r=4, positions=positions, runtime_config=whole_rows, **kwargs)


def messages(*pairs):
    return [m for p, c in pairs for m in ({"role": "user", "content": p}, {"role": "assistant", "content": c})]


def question(text):
    return [{"role": "user", "content": text}]


class World:
    """A tokenizer, data in every form, trainers whose adapters edit enough to see, and what they edit."""

    def __init__(self, tokenizer, folder, monkeypatch, record_property):
        self.tokenizer, self.folder, self.monkeypatch = tokenizer, folder, monkeypatch
        self.record_property = record_property
        self.documents = Documents(monkeypatch)
        self.known_prompts = None
        """Prompts that rollouts were given, where tokens do not say which part of a document they are."""

    def trainer(self, name, data, module="trl", positions="f2+l2", base=None, given=None, **settings):
        defaults = dict(max_steps=1, per_device_train_batch_size=4, learning_rate=0.0)
        found = importlib.import_module(module)
        args = arguments(getattr(found, f"{name}Config"), self.folder, **{**defaults, **settings})
        trainer = getattr(found, f"{name}Trainer")(
            model=build("llama") if base is None else base,
            args=args,
            train_dataset=Dataset.from_list(data),
            processing_class=self.tokenizer,
            peft_config=config(positions),
            **(given or {}),
        )
        randomise(trainer.model)
        self.documents.watch(trainer.model)
        return trainer

    def adapted(self, positions="f2+l2", family="llama", watch=False, **kwargs):
        model = get_peft_model(build(family), config(positions, **kwargs)).eval()
        randomise(model)
        if watch:
            self.documents.watch(model)
        return model

    def starts(self, document):
        """Return where a document's answers begin, told from its tokens."""
        behind = [n + 2 for n in range(len(document) - 1) if list(document[n : n + 2]) == HEADER]
        if self.known_prompts is not None:
            return [max(len(p) for p in self.known_prompts if document[: len(p)] == p)]
        return behind or [next(n for n, token in enumerate(document) if token in DIGITS)]

    def edits_of_generate(self, model, prompt):
        self.documents.rest.clear()
        ids = torch.tensor([prompt])
        model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, pad_token_id=0)
        ((_, edited),) = self.documents.rest
        return edited

    def assert_as_generate(self, model, documents=None):
        """Assert that training edited what `generate` edits, at each turn."""
        documents = set(self.documents.train if documents is None else documents)
        assert documents
        for document, edited in documents:
            starts = self.starts(document)
            for start in starts:
                of_generate = self.edits_of_generate(model, document[:start])
                assert of_generate == {at for at in edited if at < start}, (document, edited)
            assert all(at < starts[-1] for at in edited)
            if len(starts) == 1:
                assert edited == expected_offsets(starts[0])
        assert len({self.starts(document)[0] for document, _ in documents}) > 1, "prompts of one length"

    def refuses_text(self, reason):
        """Have the support table say so."""
        self.record_property("except", f"plain text, which raises: {reason}")

    def ids(self, chat, **kwargs):
        return self.tokenizer.apply_chat_template(chat, return_dict=False, **kwargs)


def as_text():
    return [{"prompt": p, "completion": f" {c}"} for p, c in PAIRS]


def as_chats():
    """Return chats of one to three turns."""
    return [{"messages": messages(*(PAIRS[(n + 3 * k) % 8] for k in range(n % 3 + 1)))} for n in range(8)]


def as_pairs_of_messages():
    return [{"prompt": messages(pair)[:1], "completion": messages(pair)[1:]} for pair in PAIRS]


# Training: SFT


@case("`prompt` and `completion`")
def _(world):
    for data in (as_text(), as_pairs_of_messages()):
        trainer = world.trainer("SFT", data)
        trainer.train()
        world.assert_as_generate(trainer.model)
        world.documents.train.clear()


@case("`messages`, `assistant_only_loss=True`")
def _(world):
    trainer = world.trainer("SFT", as_chats(), assistant_only_loss=True, max_steps=2)
    trainer.train()
    assert len(world.documents.train) == 8
    world.assert_as_generate(trainer.model)


@case("`messages`, every token trained on")
def _(world):
    for collate in (False, True):
        trainer = world.trainer("SFT", as_chats(), max_steps=2)
        if collate:
            trainer.data_collator = DataCollatorForLoReft(trainer.data_collator, trainer.model.peft_config["default"])
        assert (next(iter(trainer.get_train_dataloader()))["labels"][:, 0] != -100).all()
        trainer.train()
        assert len(world.documents.train) == 8
        world.assert_as_generate(trainer.model)
        world.documents.train.clear()


@case("labels of several spans, in your own loop")
def _(world):
    chat = world.ids(messages(*PAIRS[:2]))
    starts = world.starts(chat)
    labels = [-100] * len(chat)
    for start in starts:
        labels[start : start + 3] = chat[start : start + 3]
    batch = {"input_ids": torch.tensor([chat]), "labels": torch.tensor([labels])}
    with pytest.raises(ValueError, match=r"several supervised spans.*chat_marks"):
        world.adapted().train()(**batch)
    marked = world.adapted(**chat_marks(world.tokenizer), watch=True)
    marked.train()(**batch)
    ((_, edited),) = world.documents.train
    assert all(world.edits_of_generate(marked, chat[:n]) == {at for at in edited if at < n} for n in starts)


@case('`packing_strategy="bfd"`, `padding_free=True`')
def _(world):
    for data, more in ((as_text(), {}), (as_chats(), dict(assistant_only_loss=True)), (as_chats(), {})):
        packed = dict(packing=True, packing_strategy="bfd", max_length=64)
        for settings in (packed, dict(padding_free=True, max_length=None)):
            trainer = world.trainer("SFT", data, per_device_train_batch_size=8, **settings, **more)
            trainer.train()
            assert len(world.documents.train) == 8
            world.assert_as_generate(trainer.model)
            world.documents.train.clear()


@case('`packing_strategy="bfd_split"`, `"wrapped"`, `truncation_mode="keep_end"`')
def _(world):
    """A suffix is right in whatever part of a chat, what counts from its beginning is not. Text: see test_sft.py."""
    for positions in ("f2+l2", "p", "l1+g2"):
        for strategy in ("wrapped", "bfd_split"):
            packed = dict(packing=True, packing_strategy=strategy, max_length=20)
            with pytest.raises(ValueError, match=r"in the middle of a document.*packing_strategy='bfd'"):
                world.trainer("SFT", as_chats(), positions=positions, **packed).train()
    for settings in (
        dict(packing=True, packing_strategy="wrapped", max_length=20),
        dict(truncation_mode="keep_end", max_length=14),
    ):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The `'keep_end'` truncation mode is deprecated")
            trainer = world.trainer("SFT", as_chats(), positions="l2", **settings)
            trainer.train()
        for document, edited in set(world.documents.train):
            assert edited == {at for start in world.starts(document) for at in (start - 2, start - 1)}
        assert any(document[0] != HEADER[0] for document, _ in world.documents.train), "no row was cut"
        world.documents.train.clear()
    for data, length in ((as_chats(), 20), (as_text(), 7)):
        split = dict(packing=True, packing_strategy="bfd_split", max_length=length, max_steps=2)
        with pytest.raises(ValueError, match="in the middle of a document"):
            world.trainer("SFT", data, positions="l2", **split).train()
    wrapped = dict(packing=True, packing_strategy="wrapped", max_length=7)
    with pytest.raises(ValueError, match="several supervised spans"):
        world.trainer("SFT", as_text(), positions="l2", **wrapped).train()


def squared(outputs, labels, num_items_in_batch=None):
    return outputs.logits.square().mean()


@case("label smoothing, `compute_loss_func`")
def _(world):
    for more in (dict(label_smoothing_factor=0.1), dict(given=dict(compute_loss_func=squared))):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`(label_smoothing_factor|compute_loss_func)` is deprecated")
            chats = world.trainer("SFT", as_chats(), assistant_only_loss=True, **more)
            chats.train()
            world.assert_as_generate(chats.model)
            text = world.trainer("SFT", as_text(), **more)
            with pytest.raises(ValueError, match=r"cannot tell where the prompts end.*DataCollatorForLoReft"):
                text.train()
            world.documents.train.clear()
            text.data_collator = DataCollatorForLoReft(text.data_collator, text.model.peft_config["default"])
            text.train()
            world.assert_as_generate(text.model)
        world.documents.train.clear()


@case("positions that need no prompt's end (`all`)")
def _(world):
    """Every real token is edited, whatever the labels say, also in packed and cut rows."""
    for settings in (
        dict(label_smoothing_factor=0.1),
        dict(packing=True, packing_strategy="wrapped", max_length=16),
        dict(packing=True, packing_strategy="bfd_split", max_length=8),
    ):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`label_smoothing_factor` is deprecated")
            trainer = world.trainer("SFT", as_text(), positions="all", **settings)
            trainer.train()
        assert world.documents.train
        assert all(edited == set(range(len(document))) for document, edited in world.documents.train)
        world.documents.train.clear()


# Training: preferences and reinforcement


def preferences(chat, **more):
    answers = [c for _, c in PAIRS]
    rows = []
    for n, (prompt, completion) in enumerate(PAIRS):
        row = dict(prompt=prompt, chosen=f" {completion}", rejected=f" {answers[(n + 1) % 8]}", **more)
        if chat:
            row |= dict(prompt=question(prompt))
            row |= {name: [{"role": "assistant", "content": row[name].strip()}] for name in ("chosen", "rejected")}
        rows.append(row)
    return rows


@case("DPO, KTO")
def _(world):
    for chat in (False, True):
        judged = [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": n % 2 == 0}
            for n, row in enumerate(preferences(chat))
        ]
        for name, data in (("DPO", preferences(chat)), ("KTO", judged)):
            trainer = world.trainer(name, data)
            trainer.train()
            world.assert_as_generate(trainer.model)
            world.documents.train.clear()


def rollouts(world, name, chat, module="trl", more=(), **settings):
    """Train on rollouts, whose prompts are known; compare what rollout and training edited."""
    prompts = [p if not chat else question(p) for p, _ in PAIRS]
    data = [dict(prompt=prompt, **dict(more)) for prompt in prompts]
    trainer = world.trainer(name, data, module=module, **settings)
    trainer.train()
    rows = [world.tokenizer(p)["input_ids"] if not chat else world.ids(p, add_generation_prompt=True) for p in prompts]
    world.known_prompts = {tuple(row) for row in rows}
    return trainer


SHORT = dict(max_completion_length=4)


def alternating(completions, **kwargs):
    return [float(n % 2) for n in range(len(completions))]


@case("GRPO, RLOO")
def _(world):
    for chat in (False, True):
        for name in ("GRPO", "RLOO"):
            trainer = rollouts(world, name, chat, given=dict(reward_funcs=alternating), **SHORT, num_generations=2)
            world.assert_as_generate(trainer.model)
            world.documents.train.clear()


def preference_trainers(world, name, chat, positions="f2+l2"):
    module = f"trl.experimental.{name.lower()}"
    more = dict(max_length=64) if name != "TPO" else {}
    data = preferences(chat)
    if name == "TPO":
        data = [{**row, "reference": row["chosen"]} for row in data]
    return world.trainer(name, data, module=module, positions=positions, **more)


@case("ORPO, CPO", supported=True)
def _(world):
    for name in ("ORPO", "CPO"):
        trainer = preference_trainers(world, name, chat=True)
        trainer.train()
        world.assert_as_generate(trainer.model)
        world.documents.train.clear()
        with pytest.raises(ValueError, match=r"cannot tell where the prompts end.*response_template"):
            preference_trainers(world, name, chat=False).train()


@case("TPO", supported=True)
def _(world):
    trainer = preference_trainers(world, "TPO", chat=True)
    trainer.train()
    world.assert_as_generate(trainer.model)
    world.documents.train.clear()
    world.refuses_text("its forward gets no labels; it needs `DataCollatorForLoReft`")
    text = preference_trainers(world, "TPO", chat=False)
    with pytest.raises(ValueError, match=r"cannot tell where the prompts end.*DataCollatorForLoReft"):
        text.train()
    text.data_collator = DataCollatorForLoReft(text.data_collator, text.model.peft_config["default"])
    text.train()
    world.assert_as_generate(text.model)


@case("online DPO", supported=True)
def _(world):
    settings = dict(module="trl.experimental.online_dpo", max_new_tokens=4, given=dict(reward_funcs=alternating))
    trainer = rollouts(world, "OnlineDPO", chat=True, **settings)
    world.assert_as_generate(trainer.model)
    world.refuses_text("its forward gets no labels")
    with pytest.raises(ValueError, match="cannot tell where the prompts end"):
        rollouts(world, "OnlineDPO", chat=False, **settings)


@case("distillation (`DistillationTrainer`)", supported=True)
def _(world):
    for chat in (False, True):
        trainer = rollouts(world, "Distillation", chat, given=dict(teacher_model=build("llama", seed=1)), **SHORT)
        world.assert_as_generate(trainer.model)
        world.documents.train.clear()


class Teacher:
    """Stands in for TRL's client of a server with a teacher, whose best token is always 5."""

    def __init__(self, base_url, connection_timeout):
        pass

    def get_sequence_logprobs(self, sequences, prompt_lengths, top_logprobs, temperature):
        lengths = [len(sequence) - prompt for sequence, prompt in zip(sequences, prompt_lengths)]
        names = {"actual_logprobs": -2.0, "logprobs": -1.0, "logprob_token_ids": 5}
        return {name: [[[value]] * length for length in lengths] for name, value in names.items()}


@case("distillation from a server (`ServerDistillationTrainer`)", supported=True)
def _(world):
    from trl.generation import vllm_client

    world.monkeypatch.setattr(vllm_client, "VLLMClient", Teacher)
    settings = dict(module="trl.experimental.server_distillation", teacher_model_server_url="http://none", **SHORT)
    trainer = rollouts(world, "ServerDistillation", chat=True, **settings)
    world.assert_as_generate(trainer.model)
    world.refuses_text("its forward gets no labels")
    with pytest.raises(ValueError, match="cannot tell where the prompts end"):
        rollouts(world, "ServerDistillation", chat=False, **settings)


@case("GKD, GOLD, IW-OPD", supported=True)
def _(world):
    data = [{"messages": messages(pair)} for pair in PAIRS]
    world.tokenizer.save_pretrained(world.folder)
    # GOLD notes byte offsets for a loss that is not used here, and asks for a tokenizer of that kind.
    world.monkeypatch.setattr("trl.experimental.utils.is_byte_level_tokenizer", lambda backend: True)
    for name, module, lmbdas in (
        ("GKD", "gkd", (0.0, 1.0)),
        ("GOLD", "gold", (0.0, 1.0)),
        ("IWOPD", "iw_opd", (1.0,)),
    ):
        for lmbda in lmbdas:  # on data, on rollouts
            world.known_prompts = {tuple(world.ids(row["messages"][:1], add_generation_prompt=True)) for row in data}
            given = dict(teacher_model=build("llama", seed=1))
            given["teacher_model"].config._name_or_path = str(world.folder)  # where its tokenizer is looked for
            more = dict(max_length=64, max_completion_length=4) if name != "GKD" else dict(max_new_tokens=4)
            trainer = world.trainer(name, data, f"trl.experimental.{module}", given=given, lmbda=lmbda, **more)
            trainer.train()
            world.assert_as_generate(trainer.model)
            world.documents.train.clear()


@case("SDPO, SDFT", supported=True)
def _(world):
    for chat in (False, True):
        # TRL has its default teacher, a moving average, for LoRA alone.
        settings = dict(num_generations=2, teacher_model_kind="live", **SHORT)
        rewards = dict(reward_funcs=alternating)
        trainer = rollouts(world, "SDPO", chat, "trl.experimental.sdpo", given=rewards, **settings)
        world.assert_as_generate(trainer.model)
        world.documents.train.clear()
        context = dict(privileged_context="s t u")
        trainer = rollouts(world, "SDFT", chat, "trl.experimental.sdft", context, distillation_topk=8, **settings)
        world.assert_as_generate(trainer.model)
        world.documents.train.clear()


# Evaluation and scoring


@case("`Trainer.evaluate`, `Trainer.predict`, `compute_metrics`")
def _(world):
    for data, more in ((as_text(), {}), (as_chats(), dict(assistant_only_loss=True))):
        for metrics in (None, lambda prediction: {}):
            evaluated = Dataset.from_list(data)
            trainer = world.trainer("SFT", data, given=dict(eval_dataset=evaluated, compute_metrics=metrics), **more)
            for evaluate in (trainer.evaluate, lambda trainer=trainer: trainer.predict(trainer.eval_dataset)):
                world.documents.rest.clear()
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "`return_outputs=True`")
                    evaluate()
                assert len(world.documents.rest) == 8
                world.assert_as_generate(trainer.model, world.documents.rest)


@case("evaluation under label smoothing")
def _(world):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`label_smoothing_factor` is deprecated")
        chats, text = (
            world.trainer(
                "SFT", data, label_smoothing_factor=0.1, given=dict(eval_dataset=Dataset.from_list(data)), **more
            )
            for data, more in ((as_chats(), dict(assistant_only_loss=True)), (as_text(), {}))
        )
    chats.evaluate()
    world.assert_as_generate(chats.model, world.documents.rest)
    with pytest.warns(UserWarning, match="takes every row of this forward for a prompt"):
        text.evaluate()
    text.data_collator = DataCollatorForLoReft(text.data_collator, text.model.peft_config["default"])
    world.documents.rest.clear()
    text.evaluate()
    world.assert_as_generate(text.model, world.documents.rest)


@torch.no_grad()
def forward(model, ids, **kwargs):
    """Return the logits (seq, vocabulary) of one row."""
    return model(input_ids=torch.tensor([ids]), **kwargs).logits[0]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def assert_far(actual, expected):
    assert (actual - expected).abs().max() > 1e-2


def ask(model, prompt, new=5, **kwargs):
    """Return the tokens that `generate` writes behind `prompt`, and their logits (new, vocabulary)."""
    ids = torch.tensor([prompt])
    options = dict(max_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options, **kwargs)
    return out.sequences[0, len(prompt) :].tolist(), torch.stack(out.logits, 1)[0]


class Asked:
    """A model, a prompt (of a chat or of plain text), what `generate` wrote behind it, and the logits of that."""

    def __init__(self, world, chat, positions="f2+l2"):
        marks = chat_marks(world.tokenizer) if chat else {}
        self.model = world.adapted(positions, **marks)
        text = "a b c d e f"
        self.prompt = (
            world.ids(question(text), add_generation_prompt=True) if chat else world.tokenizer(text)["input_ids"]
        )
        self.answer, self.logits = ask(self.model, self.prompt)
        self.row = self.prompt + self.answer
        self.answered = slice(len(self.prompt) - 1, -1)
        with self.model.disable_adapter():
            assert_far(forward(self.model, self.row)[self.answered], self.logits)


PLAIN = "takes every row of this forward for a prompt"


@case("scoring a choice: prompt and answer in one row, no labels (lm-eval)")
def _(world):
    chat, text = Asked(world, chat=True), Asked(world, chat=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(forward(chat.model, chat.row)[chat.answered], chat.logits)
        padded = forward(chat.model, chat.row + [0] * 3)  # on the right, without a mask, as lm-eval does
        assert_close(padded[len(chat.prompt) - 1 : -4], chat.logits)
    with pytest.warns(UserWarning, match=PLAIN):
        wrong = forward(text.model, text.row)[text.answered]
    assert_far(wrong, text.logits)
    with prompt_lengths([len(text.prompt)]), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(forward(text.model, text.row)[text.answered], text.logits)


@case("perplexity, `labels=input_ids`")
def _(world):
    chat, text = Asked(world, chat=True), Asked(world, chat=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = torch.tensor([chat.row])
        assert_close(forward(chat.model, chat.row, labels=labels)[chat.answered], chat.logits)
    labels = torch.tensor([text.row])
    with pytest.warns(UserWarning, match="edits no token of this batch"):
        forward(text.model, text.row, labels=labels)
    with prompt_lengths([len(text.prompt)]), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(forward(text.model, text.row, labels=labels)[text.answered], text.logits)


# Generation


def next_turn(world, text):
    return [TOKENS.index("<|im_end|>"), *world.ids(question(text), add_generation_prompt=True)]


def turns(world, model, keep, first=(), **kwargs):
    """Talk for some turns; return the document, and each answer's first column and logits."""
    document, spans = [], []
    cache = DynamicCache(config=model.config) if keep else None
    for n, text in enumerate(("a b c d", "e f", "g h i j k")):
        document += next_turn(world, text)[0 if n else 1 :]
        document += first if n == 1 else []
        answer, logits = ask(model, document, **({"past_key_values": cache} if keep else {}), **kwargs)
        spans.append((len(document), logits))
        document += answer
    return document, spans


def assert_one_forward_agrees(model, document, spans):
    whole = forward(model, document)
    for start, logits in spans:
        assert_close(whole[start - 1 : start - 1 + len(logits)], logits)
    with model.disable_adapter():
        assert_far(forward(model, document), whole)


@case("next turn, history encoded again or its cache kept")
def _(world):
    for positions in ("f2+l2", "p", "l1+g2", "all"):
        model = world.adapted(positions, **chat_marks(world.tokenizer))
        document, spans = turns(world, model, keep=False)
        assert_one_forward_agrees(model, document, spans)
        again, kept = turns(world, model, keep=True)
        assert again == document
        for (_, one), (_, other) in zip(kept, spans, strict=True):
            assert_close(one, other)
    text = world.adapted()
    with pytest.raises(ValueError, match=r"cache holds edits that this prompt does not have.*response_template"):
        turns(world, text, keep=True)


@case("an answer begun by the user (words put in the assistant's mouth)")
def _(world):
    words = world.tokenizer("1 2 3")["input_ids"]
    for positions in ("f2+l2", "l1+g2"):
        model = world.adapted(positions, **chat_marks(world.tokenizer))
        for keep in (False, True):
            assert_one_forward_agrees(model, *turns(world, model, keep, first=words))


@case("`guidance_scale`")
def _(world):
    """The forwards of the negative prompt have edits of its own."""
    for chat, negative in ((False, world.tokenizer("x y z")["input_ids"]), (True, next_turn(world, "x y z")[1:])):
        asked = Asked(world, chat)
        options = dict(guidance_scale=1.5, negative_prompt_ids=torch.tensor([negative]))
        answer, _ = ask(asked.model, asked.prompt, **options)
        for n in range(len(answer)):
            with prompt_lengths([len(asked.prompt)]):
                towards = forward(asked.model, asked.prompt + answer[:n])[-1].log_softmax(-1)
            with prompt_lengths([len(negative)]):
                away = forward(asked.model, negative + answer[:n])[-1].log_softmax(-1)
            assert int((away + 1.5 * (towards - away)).argmax()) == answer[n]


# Loops of one's own


@torch.no_grad()
def fed(model, pieces, intervention_positions=()):
    """Return the logits (seq, vocabulary) of pieces that are fed to one cache, one after the other."""
    cache = DynamicCache(config=model.config)
    given = [{"intervention_positions": at} for at in intervention_positions] + [{}] * len(pieces)
    options = dict(past_key_values=cache, use_cache=True)
    return torch.cat([forward(model, piece, **options, **more) for piece, more in zip(pieces, given)])


def singly(tokens):
    return [[token] for token in tokens]


@case("a prompt in one forward, then token by token")
def _(world):
    for positions in ("f2+l2", "p", "l1+g2", "all"):
        for chat in (False, True):
            asked = Asked(world, chat, positions)
            pieces = [asked.prompt, *singly(asked.answer)]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = fed(asked.model, pieces)
            assert_close(found[asked.answered], asked.logits)
            assert [PLAIN in str(each.message) for each in caught] == ([] if chat or positions == "all" else [True])


@case("a prompt in pieces")
def _(world):
    model = world.adapted(**chat_marks(world.tokenizer))
    document, spans = turns(world, model, keep=False)
    (first, _), (second, logits) = spans[:2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pieces = [document[: first + 2], document[first + 2 : second - 3], document[second - 3 : second + 4]]
        assert_close(fed(model, pieces)[second - 1 : second + 4], logits)
    for asked in (Asked(world, chat=True), Asked(world, chat=False)):
        pieces = [asked.prompt[:3], asked.prompt[3:], *singly(asked.answer)]  # no header in the first
        with (
            pytest.warns(UserWarning, match=PLAIN),
            pytest.raises(ValueError, match="cache holds edits that this document does not have"),
        ):
            fed(asked.model, pieces)
        with prompt_lengths([len(asked.prompt)]), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_close(fed(asked.model, pieces)[asked.answered], asked.logits)
        last = len(asked.prompt) - 3
        positions = [[[0, 1, -1, -1]], [[-1, -1, last - 2, last - 1]]]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = fed(asked.model, pieces, intervention_positions=[torch.tensor(at) for at in positions])
        assert_close(found[asked.answered], asked.logits)


@case("the next turn in your own loop")
def _(world):
    model = world.adapted(**chat_marks(world.tokenizer))
    document, spans = turns(world, model, keep=False)
    pieces = [document[: spans[0][0]]]
    for n, (start, logits) in enumerate(spans):
        pieces += singly(document[start : start + len(logits)])
        stop = spans[n + 1][0] if n + 1 < len(spans) else start
        pieces += [document[start + len(logits) : stop]] if stop > start else []
    found = fed(model, pieces)
    for start, logits in spans:
        assert_close(found[start - 1 : start - 1 + len(logits)], logits)


@case("`generate_batch` (continuous batching)")
def _(world):
    from .test_continuous_batching import check, run

    for marks in (chat_marks(world.tokenizer), {}):
        model = world.adapted(**marks)
        document, spans = turns(world, model, keep=False)
        prompts = [document[: spans[0][0]], document[: spans[1][0]]]
        check(model, prompts, run(model, prompts))


@pytest.fixture
def world(tokenizer, tmp_path, monkeypatch, record_property):
    return World(tokenizer, tmp_path, monkeypatch, record_property)


@pytest.mark.parametrize("row", CASES.values())
def test_row(row, world):
    row(world)


def test_the_page_has_the_rows_that_are_tested():
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [line[2:].partition(" | ")[0] for line in lines if not line.startswith("| case |")]
    assert len(rows) == len(set(rows))
    assert set(rows) == CASES.keys() | ELSEWHERE.keys() and not CASES.keys() & ELSEWHERE.keys()


@pytest.mark.parametrize("row", ELSEWHERE)
def test_rows_that_are_tested_elsewhere(row):
    named = ELSEWHERE[row]
    for name in [named] if isinstance(named, str) else named:
        path, _, function = name.partition("::")
        source = (Path(__file__).parents[1] / path).read_text(encoding="utf-8")
        assert re.search(rf"^def {function}\(", source, re.MULTILINE), name
