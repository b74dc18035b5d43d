"""`adapter_names` and what PEFT trains beside LoReFT: each row gets the heads and trained tokens of its adapter."""

import sys
import threading

import pytest
import torch
from conftest import DIMENSIONS, VOCAB, build
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from peft_reft import LoReftConfig
from peft_reft.tuner.mixed_batches import hand_adapter_names

IDS = torch.randint(3, VOCAB, (4, 7), generator=torch.Generator().manual_seed(3))
TOKENS = dict(trainable_token_indices=IDS.unique()[:12].tolist())
NAMES = ["one", "__base__", "two", "one"]


def classifier(name="llama"):
    if name != "llama":
        return build(name)
    sizes = dict(DIMENSIONS, num_hidden_layers=2)
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=VOCAB, pad_token_id=0, num_labels=3, **sizes)).eval()


def tied():
    config = build("llama").config
    config.tie_word_embeddings = True
    return type(build("llama"))(config).eval()


def two_adapters(base, second=None, **fields):
    fields = dict(r=2, positions="f2+l2", init_weights=False, **fields)
    model = get_peft_model(base, LoReftConfig(**fields), adapter_name="one")
    model.add_adapter("two", LoReftConfig(**{**fields, **(second or {})}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save." in name or "trainable_tokens_delta" in name:
                parameter.copy_(torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def one_by_one(model, names=NAMES):
    """Return the logits of each row, from a forward with its adapter alone."""
    found = []
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                found.append(model(input_ids=IDS[row : row + 1]).logits)
        else:
            model.set_adapter(name)
            found.append(model(input_ids=IDS[row : row + 1]).logits)
    model.set_adapter("one")
    return torch.cat(found)


@torch.no_grad()
def mixed(model, names=NAMES):
    return model(input_ids=IDS[: len(names)], adapter_names=names).logits


@pytest.mark.parametrize("active", ["one", "two"])
@pytest.mark.parametrize(
    ("base", "fields"),
    [
        (classifier, dict(task_type="SEQ_CLS")),
        (lambda: classifier("bert"), dict(task_type="SEQ_CLS")),
        (lambda: build("llama"), dict(task_type="CAUSAL_LM", **TOKENS)),
        (lambda: build("gemma3"), dict(task_type="CAUSAL_LM", **TOKENS)),  # tied, and scales its embeddings
        (tied, dict(task_type="CAUSAL_LM", **TOKENS)),
        (lambda: build("llama"), dict(task_type="CAUSAL_LM", modules_to_save=["lm_head"])),
    ],
    ids=["head", "bert", "tokens", "gemma3", "tied", "lm_head"],
)
def test_each_row_has_its_own(base, fields, active):
    model = two_adapters(base(), **fields)
    expected = one_by_one(model)
    assert not torch.allclose(expected[0], expected[3])
    model.set_adapter(active)
    torch.testing.assert_close(mixed(model), expected, atol=1e-5, rtol=1e-4)
    assert not any(module._forward_pre_hooks for module in model.modules() if "Wrapper" in type(module).__name__)


def test_an_adapter_that_trains_no_head_has_the_base_s():
    model = two_adapters(
        build("llama"), task_type="CAUSAL_LM", modules_to_save=["lm_head"], second=dict(modules_to_save=None)
    )
    torch.testing.assert_close(mixed(model), one_by_one(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [dict(num_beams=3), dict(num_beams=2, num_return_sequences=2)], ids=str)
def test_rows_that_generate_repeats(settings):
    model = two_adapters(build("llama"), task_type="CAUSAL_LM", **TOKENS)
    settings |= dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    mask = torch.ones_like(IDS)
    answers = model.generate(input_ids=IDS, attention_mask=mask, adapter_names=NAMES, **settings)
    each = settings.get("num_return_sequences", 1)
    for row, name in enumerate(NAMES):
        given = dict(input_ids=IDS[row : row + 1], attention_mask=mask[row : row + 1])
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(**given, **settings)
        else:
            model.set_adapter(name)
            alone = model.generate(**given, **settings)
        assert torch.equal(answers[row * each : (row + 1) * each], alone)


def test_a_head_that_peft_cannot_split_is_refused():
    model = two_adapters(classifier("roberta"), task_type="SEQ_CLS")
    with pytest.raises(TypeError, match="Mixed batching is only supported for"):
        mixed(model)


def test_names_that_do_not_fit_the_rows():
    model = two_adapters(classifier(), task_type="SEQ_CLS")
    for names in (["one"] * 3, []):
        with pytest.raises(ValueError, match=rf"Length of `adapter_names` should be .* got {len(names)} and"):
            model(input_ids=IDS, adapter_names=names)
    with pytest.raises(ValueError, match="nobody"):
        model(input_ids=IDS, adapter_names=["nobody"] * 4)


def test_nothing_is_left_after_an_error():
    model = two_adapters(classifier(), task_type="SEQ_CLS")
    expected = one_by_one(model)
    with pytest.raises(ValueError, match="adapter_names"):
        mixed(model, ["one"] * 3 + ["nobody"])
    model.set_adapter("one")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS[:1]).logits, expected[:1], atol=1e-5, rtol=1e-4)


def test_names_count_in_their_own_thread():
    """At the same time other threads hand other names, or none, to the same heads."""
    head = classifier()
    model = two_adapters(head, task_type="SEQ_CLS").get_base_model().score
    hidden = torch.randn(2, 32)
    orders = [["one", "two"], ["two", "one"], ["__base__", "two"], None]

    @torch.no_grad()
    def answer(names):
        if names is None:
            return model(hidden)
        with hand_adapter_names(head, names):
            return model(hidden)

    expected = [answer(names) for names in orders]
    wrong, switch = [], sys.getswitchinterval()

    def ask(names, right):
        for _ in range(300):
            try:
                same = torch.equal(answer(names), right)
            except Exception as error:  # a thread's error is lost otherwise
                wrong.append(error)
                return
            if not same:
                wrong.append(names)

    threads = [threading.Thread(target=ask, args=pair) for pair in zip(orders * 2, expected * 2)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert wrong == []
