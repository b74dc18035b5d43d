"""What a user sees of positions and edits."""

import sys
import types

import numpy as np
import pytest
import torch
from conftest import VOCAB, build, randomise
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from peft_reft import DataCollatorForLoReft, LoReftConfig, edit_norms, show_positions
from peft_reft.tools.norms import plot_edit_norms


def shown(capsys, *args):
    show_positions(*args)
    return capsys.readouterr().out


def test_a_prompt(capsys, tokenizer):
    out = shown(capsys, tokenizer, "a b c d e", LoReftConfig(positions="f1+l2"))
    assert out == "all layers: f1+l2, the first and the last 2 tokens of the prompt\n  [f1: a] b c[l2:  d| e]\n"


def test_layers_with_specs_of_their_own(capsys, tokenizer):
    out = shown(capsys, tokenizer, "a b c", LoReftConfig(positions={"0-3": "f1", "4-": "p"}))
    assert "layers 0-3: f1" in out and "[f1: a] b c" in out
    assert "layers 4-: p" in out and "[p: a| b| c]" in out
    assert shown(capsys, tokenizer, "a", LoReftConfig(layers=[2, 5])).startswith("layers [2, 5]: f7+l7")


def test_several_prompts_and_a_chat(capsys, tokenizer):
    config = LoReftConfig(positions="l1")
    assert shown(capsys, tokenizer, ["a b", "c"], config).endswith("  a[l1:  b]\n  [l1: c]\n")
    chat = [{"role": "user", "content": "a b"}]
    assert shown(capsys, tokenizer, chat, config).endswith("[l1:  assistant]\n")


def test_a_batch_is_read_as_the_model_reads_it(capsys, tokenizer):
    """Padding is left out, labels say where the answer begins, and given positions are used."""
    ids = torch.tensor([[0, 0, 9, 10, 11, 12], [9, 10, 11, 12, 13, 14]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids < 12, -100)}
    config = LoReftConfig(task_type="CAUSAL_LM", positions="l1+g")
    expected = "  a b[l1:  c][g:  d]\n  a b[l1:  c][g:  d| e| f]\n"
    assert shown(capsys, tokenizer, batch, config).endswith(expected)
    collated = DataCollatorForLoReft(lambda rows: rows, config)(batch)
    assert shown(capsys, tokenizer, collated, config).endswith(expected)
    batch["intervention_positions"] = torch.tensor([[2], [5]])
    assert "[f1: a] b c d\n  a b c d e[f1:  f]" in shown(capsys, tokenizer, batch, LoReftConfig(positions="f1"))


def test_colours_on_a_terminal(capsys, tokenizer, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[30;44ma\033[0m b" in shown(capsys, tokenizer, "a b", LoReftConfig(positions="f1"))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in shown(capsys, tokenizer, "a b", LoReftConfig(positions="f1"))


def test_html_in_a_notebook(capsys, tokenizer, monkeypatch):
    displayed = []
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    display = types.SimpleNamespace(HTML=str, display=displayed.append)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    assert shown(capsys, tokenizer, "a <s>", LoReftConfig(positions="l1")) == ""
    assert "&lt;s&gt;</span>" in displayed[0] and "<div>all layers: l1" in displayed[0]


def test_a_character_of_several_tokens_is_shown_whole(capsys):
    class Bytes:  # a tokenizer whose tokens are bytes
        def __call__(self, text):
            return {"input_ids": list(text.encode())}

        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    show_positions(Bytes(), "a🐱b", LoReftConfig(positions="f3+l2"))
    assert "[f3: a|·|·]·[l2: 🐱|b]" in capsys.readouterr().out


@pytest.mark.parametrize("given", [None, 5, []])
def test_what_cannot_be_shown(tokenizer, given):
    with pytest.raises(ValueError, match="batch_or_text"):
        show_positions(tokenizer, given, LoReftConfig())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("positions", "tie"), [("f1+l2", "layer"), ("f1+l2", "group"), ("p", "layer"), ("all", "group")]
)
def test_edit_norms(family, positions, tie):
    """Norms equal ‖Φ(h) − h‖ / ‖h‖ from the hidden states of an edited and a plain run."""
    layer = 1
    config = LoReftConfig(task_type="CAUSAL_LM", r=4, positions=positions, tie=tie, layers=[layer])
    model = get_peft_model(build(family), config).train()
    randomise(model)
    ids = torch.randint(3, VOCAB, (2, 6))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    norms = edit_norms(model, {"input_ids": ids, "attention_mask": mask})
    assert norms.shape == (1, 2, 6) and norms.dtype == np.float32
    assert model.training  # left as it was
    model.eval()
    states = []
    with torch.no_grad():
        blocks = model.get_base_model().base_model.get_submodule("h" if family == "gpt2" else "layers")
        handle = blocks[layer].register_forward_hook(
            lambda module, args, out: states.append((out[0] if isinstance(out, tuple) else out).clone())
        )
        model(input_ids=ids, attention_mask=mask)
        with model.disable_adapter():
            model(input_ids=ids, attention_mask=mask)
        handle.remove()
    expected = ((states[0] - states[1]).norm(dim=-1) / states[1].norm(dim=-1)).numpy()
    edited = {
        "f1+l2": [[0, 0, 1, 0, 1, 1], [1, 0, 0, 0, 1, 1]],
        "p": [[0, 0, 1, 1, 1, 1], [1] * 6],
        "all": [[0, 0, 1, 1, 1, 1], [1] * 6],
    }[positions]
    assert np.array_equal(~np.isnan(norms[0]), np.array(edited, dtype=bool))
    np.testing.assert_allclose(norms[0][np.array(edited) == 1], expected[np.array(edited) == 1], rtol=1e-3)


def test_edit_norms_of_layers_and_adapters():
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=2, positions="f1", layers=[0]))
    model.add_adapter("second", LoReftConfig(task_type="CAUSAL_LM", r=2, positions="l1", layers=[2]))
    randomise(model)
    given = {"input_ids": torch.randint(3, VOCAB, (1, 4))}
    norms = edit_norms(model, given)
    assert norms.shape == (2, 1, 4) and np.isnan(norms[1]).all() and (norms[0, 0, 0] > 0)
    model.base_model.set_adapter(["default", "second"])
    norms = edit_norms(model, given)
    assert (~np.isnan(norms)).tolist() == [[[True, False, False, False]], [[False, False, False, True]]]


def test_there_are_no_norms_if_nothing_is_edited():
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=2, positions="f1"))
    cache = model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="No layer edits a token of this batch"):
        edit_norms(model, {"input_ids": torch.tensor([[6]]), "past_key_values": cache})


def test_a_plot_shows_the_norms_and_the_tokens():
    import matplotlib

    matplotlib.use("Agg")
    norms = np.array([[[0.1, np.nan, 0.2]], [[0.3, np.nan, 0.4]]], dtype=np.float32)
    axes = plot_edit_norms(norms, tokens=["a", "b", "c"])
    assert axes.images[0].get_array().shape == (2, 3)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    axes.figure.savefig("/dev/null", format="png")
    assert plot_edit_norms(norms, axes=axes) is axes


def test_a_plot_shows_text_and_cuts_none_of_it():
    """Byte symbols of a vocabulary are shown as the text that they stand for; a dollar is no formula."""
    import matplotlib

    matplotlib.use("Agg")
    tokenizer = byte_tokenizer()
    norms = np.zeros((1, 1, 4), dtype=np.float32)
    words = ["The", " extraordinarilylongword", "\n", " $x$"]
    symbols = [symbol for word in words for symbol in tokenizer.tokenize(word)]
    assert symbols == ["The", "Ġextraordinarilylongword", "Ċ", "Ġ$x$"]
    for tokens in (symbols, tokenizer.convert_tokens_to_ids(symbols)):
        axes = plot_edit_norms(norms, tokens=tokens, tokenizer=tokenizer)
        labels = axes.get_xticklabels()
        assert [label.get_text() for label in labels] == ["The", " extraordinarilylongword", "⏎", " $x$"]
        figure = axes.figure
        figure.canvas.draw()
        for text in (*labels, axes.xaxis.label, axes.yaxis.label, axes.title):
            box = text.get_window_extent()
            assert 0 <= box.x0 <= box.x1 <= figure.bbox.x1 and 0 <= box.y0 <= box.y1 <= figure.bbox.y1


def byte_tokenizer():
    """A tokenizer whose vocabulary is in byte symbols, as GPT-2's is."""
    words = ["The", "Ġextraordinarilylongword", "Ċ", "Ġ$x$"]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="The"))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=backend)
