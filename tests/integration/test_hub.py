"""Sharing adapters, with the real client of `huggingface_hub` and a Hub on loopback; nothing in the client is mocked.

A client reads `HF_ENDPOINT` when it is imported: what it does is a script in a process of its own.
"""

import os
import re
import subprocess
import sys
import textwrap

import pytest

from .hub_server import TOKEN, Hub

PREAMBLE = """
    import peft_reft, torch
    from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    def base():
        torch.manual_seed(0)
        sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    def adapted(seed=1, **kwargs):
        fields = dict(task_type="CAUSAL_LM", r=2, positions="f2+l1", init_weights=False)
        model = base()
        torch.manual_seed(seed)
        return get_peft_model(model, peft_reft.LoReftConfig(**{**fields, **kwargs})).eval()
    ids = torch.arange(8).unsqueeze(0)
    def same(one, other):
        with torch.no_grad():
            return torch.equal(one(ids).logits, other(ids).logits)
    def tokenizer():
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast
        words = {word: n for n, word in enumerate(["<pad>", "<s>", "</s>", "a", "b", "c", "d", "e"])}
        words |= {f"w{n}": n for n in range(len(words), 32)}  # every token that the model may write has a text
        words = Tokenizer(models.WordLevel(words, unk_token="a"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(
            tokenizer_object=words,
            pad_token="<pad>",
            eos_token="</s>",
            model_input_names=["input_ids", "attention_mask"],
        )
"""


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


@pytest.fixture
def client(hub, tmp_path):
    """Return a function that runs a script with a token and a cache of its own."""

    def run(script, token=TOKEN, preamble=PREAMBLE):
        code = textwrap.dedent(preamble) + textwrap.dedent(script)
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / f"home-{bool(token)}"), "HF_HUB_DISABLE_XET": "1"}
        env |= {"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def assert_our_card(card, name, knows_base=True):
    front, text = card.split("---\n", 2)[1:]
    assert "- loreft" in front and "- peft" in front and "library_name: peft" in front
    assert text.strip().startswith("> Install `peft-reft` first: `pip install peft-reft`.")
    assert "import peft_reft" in text and f'adapter = "{name}"\n' in text
    assert ("put its Hub name" in text) is not knows_base
    assert "the first 2 and the last token of the prompt" in text and "parameters" in text
    assert text.count("## How to use it") == 1


def in_turn(*codes):
    """One script that runs each code with names of its own, so that one process imports the libraries once."""
    return "".join(f"exec({textwrap.dedent(code)!r}, {{}})\nprint('<end>')\n" for code in codes)


def code_of(card):
    """The Python code of a card."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


def test_push_load_revisions_and_private(hub, client):
    ours = client(
        """
        base().push_to_hub("someone/base"); tokenizer().push_to_hub("someone/base")
        one, two = adapted(1), adapted(2)
        for model in one, two:
            model.peft_config["default"].base_model_name_or_path = "someone/base"
        print(one.push_to_hub("someone/shared"))
        one.push_to_hub("without-owner")
        from huggingface_hub import create_branch
        create_branch("someone/shared", branch="v2")
        two.push_to_hub("someone/shared", revision="v2")
        assert not same(one, two)
        assert same(PeftModel.from_pretrained(base(), "someone/shared").eval(), one)
        assert same(PeftModel.from_pretrained(base(), "someone/shared", revision="v2").eval(), two)
        assert same(AutoPeftModelForCausalLM.from_pretrained("someone/shared").eval(), one)
        model = base()
        model.load_adapter("someone/shared")
        assert same(model.eval(), one)
        one.push_to_hub("someone/hidden", private=True)
        assert same(PeftModel.from_pretrained(base(), "someone/hidden").eval(), one)
        for model in one, two:
            print(model(ids).logits.double().sum().item())
        """
    )
    files = hub.files("someone/shared")
    assert {*files} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert hub.files("someone/shared", "v2")["adapter_model.safetensors"] != files["adapter_model.safetensors"]
    assert_our_card(files["README.md"].decode(), "someone/shared")
    assert_our_card(hub.files("someone/shared", "v2")["README.md"].decode(), "someone/shared")
    assert_our_card(hub.files("someone/without-owner")["README.md"].decode(), "someone/without-owner")
    assert "base_model: someone/base" in files["README.md"].decode()
    assert str(os.getcwd()) not in b"".join(files.values()).decode("latin1")
    assert ("PUT", "/lfs/" + next(iter(hub.blobs))) in hub.requests  # weights went the way of large files

    # Somebody else runs the code of the cards (that of a branch loads the branch), sees what is public, and is told
    # what is not there.
    check = """
        import torch
        print(model(torch.arange(8).unsqueeze(0)).logits.double().sum().item())
    """
    load = """
        import sys, traceback
        try:
            PeftModel.from_pretrained(base(), {}); print("loaded")
        except Exception:
            traceback.print_exc(file=sys.stdout)
    """
    codes = {branch: code_of(hub.files("someone/shared", branch)["README.md"].decode()) for branch in ("main", "v2")}
    assert ['revision="v2"' in code for code in codes.values()] == [False, True]
    wanted = ['"someone/shared"', '"someone/hidden"', '"someone/shared", revision="v3"']
    script = in_turn(
        *(code + textwrap.dedent(check) for code in codes.values()),
        *(textwrap.dedent(PREAMBLE) + textwrap.dedent(load.format(each)) for each in wanted),
    )
    *printed, public, hidden, missing = client(script, token=None, preamble="").split("<end>\n")[:-1]
    for said, expected in zip(printed, ours.splitlines()[-2:], strict=True):
        assert said.splitlines()[-1] == expected and len(said.splitlines()) > 1
    assert public.splitlines()[-1] == "loaded"
    assert "Traceback" in hidden and "someone/hidden" in hidden
    assert "Traceback" in missing and "v3" in missing


@pytest.mark.slow
def test_a_trainer_pushes_the_same_card(hub, client):
    """The trainers of TRL and transformers write a card of their own over the one that saving wrote."""
    pytest.importorskip("trl")
    client(
        """
        import datasets
        from transformers import Trainer, TrainingArguments
        from trl import SFTConfig, SFTTrainer
        base().push_to_hub("someone/base")
        rows = datasets.Dataset.from_list([{"prompt": "a b c", "completion": " d e"}] * 4)
        common = dict(max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, save_steps=1)
        trainer = SFTTrainer(
            "someone/base",
            args=SFTConfig(output_dir="by-trl", bf16=False, hub_model_id="someone/by-trl", **common),
            train_dataset=rows,
            processing_class=tokenizer(),
            peft_config=peft_reft.LoReftConfig(task_type="CAUSAL_LM", r=2, positions="f2+l1"),
        )
        trainer.train()
        trainer.push_to_hub(dataset_name="mine")
        assert same(PeftModel.from_pretrained(base(), "someone/by-trl").eval(), trainer.model.eval())
        tokens = rows.map(lambda row: {"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]})
        model = adapted()
        plain = Trainer(
            model,
            TrainingArguments(output_dir="plain", push_to_hub=True, hub_strategy="every_save", **common),
            train_dataset=tokens,
        )
        plain.train()
        plain.push_to_hub()
        """
    )
    card = hub.files("someone/by-trl")["README.md"].decode()
    assert_our_card(card, "someone/by-trl")
    assert "trained using [TRL]" in card and "[someone/base](https://huggingface.co/someone/base)" in card
    assert client(code_of(card), token=None, preamble="").strip()  # an answer
    assert_our_card(hub.files("someone/plain")["README.md"].decode(), "someone/plain", knows_base=False)


@pytest.mark.slow
def test_each_adapter_of_a_model_has_its_folder_and_its_card(hub, client):
    client(
        """
        base().push_to_hub("someone/base"); tokenizer().push_to_hub("someone/base")
        model = adapted()
        model.add_adapter("second", peft_reft.LoReftConfig(task_type="CAUSAL_LM", r=2, positions="l1"))
        for config in model.peft_config.values():
            config.base_model_name_or_path = "someone/base"
        model.push_to_hub("someone/both")
        """
    )
    files = hub.files("someone/both")
    assert "subfolder" not in code_of(files["README.md"].decode())
    code = code_of(files["second/README.md"].decode())
    assert 'from_pretrained(model, adapter, subfolder="second")' in code
    assert client(code, token=None, preamble="").strip()
