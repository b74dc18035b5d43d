"""Trainings by axolotl: what is edited, saved, resumed, merged, and asked."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LAYERS
from integration.spy import Documents
from peft import AutoPeftModelForCausalLM, PeftModelForCausalLM
from safetensors.torch import load_file

from peft_reft import chat_marks

from .conftest import CHATS, PAIRS, ROOT, as_messages

pytestmark = pytest.mark.filterwarnings("ignore")
SECTION = "Trainers: axolotl"
WHOLE_ROWS = {"untouched_prompt": "off"}


def weights(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def expected(documents):
    """For each document, a list of turns of token ids (prompt with its headers, answer): the tokens of `f2+l2`."""
    edits = set()
    for turns in documents:
        ids, edited = [], set()
        for number, (prompt, answer) in enumerate(turns):
            begin, ids = len(ids), [*ids, *prompt]
            first, last = (2 if number == 0 else 0), 2
            if number == 0 and len(prompt) < first + last:
                first, last = len(prompt) // 2, (len(prompt) + 1) // 2
            edited |= set(range(begin, begin + first)) | set(range(len(ids) - last, len(ids)))
            ids += answer
        edits.add((tuple(ids), frozenset(edited)))
    return edits


def chats(tokenizer):
    for turns in CHATS:
        document = []
        for prompt, answer in turns:
            prompt = f"<|im_start|>user {prompt}<|im_end|><|im_start|>assistant"
            ids = (
                tokenizer.encode(prompt, add_special_tokens=False),
                tokenizer.encode(f" {answer}<|im_end|>", add_special_tokens=False),
            )
            document.append(ids)
        yield document


def watched(trainer, monkeypatch):
    """The documents of the trainer's forwards, with the tokens that are edited."""
    documents = Documents(monkeypatch)
    documents.watch(trainer.model)
    trainer.train()
    return {(document, edited) for document, edited in documents.train if set(document) != {0}}  # 0: padding


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("on_inputs", [False, True], ids=["answers", "train_on_inputs"])
def test_chats(world, packed, on_inputs, monkeypatch):
    trainer = world.trainer(
        sample_packing=packed,
        train_on_inputs=on_inputs,
        loreft=dict(positions="f2+l2", runtime_config=WHOLE_ROWS),
        micro_batch_size=1 if packed else 2,
        max_steps=8,
    )
    rows = trainer.get_train_dataloader()
    assert max((row["position_ids"] == 0).sum() for row in rows) > 1 if packed else True
    found = watched(trainer, monkeypatch)
    assert found <= expected(chats(world.tokenizer)) and len(found) >= len(CHATS) - 1


def test_plain_text_by_labels(world, monkeypatch):
    """No row has a header: the labels say where prompts end, the config says that there are none."""
    trainer = world.trainer(
        datasets=[world.pairs],
        loreft=dict(positions="f2+l2", runtime_config=WHOLE_ROWS),
        sample_packing=False,
        sequence_len=128,
        max_steps=6,
    )
    found = watched(trainer, monkeypatch)
    edited = {document: edits for document, edits in found if edits}
    assert len(edited) == len(PAIRS)
    answers = {tuple(world.tokenizer.encode(f"{answer} </s>", add_special_tokens=False)) for _, answer in PAIRS}
    for document, edits in edited.items():
        length = max(edits) + 1
        assert document[length:] in answers
        assert edits == {0, 1, length - 2, length - 1}
    assert trainer.model.peft_config["default"].response_template == []


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_plain_text_without_a_prompt_is_refused(world, packed):
    with pytest.raises(ValueError, match="so nothing would train"):
        world.trainer(datasets=[world.pairs], train_on_inputs=True, sample_packing=packed, sequence_len=128).train()


def test_marks_of_a_datasets_own_template(world, monkeypatch):
    """The tokenizer has another template, or none; the marks are those of the dataset's."""
    tokenizer = world.tokenizer
    marks = chat_marks(tokenizer)
    dataset = {**world.chats, "chat_template": "jinja", "chat_template_jinja": tokenizer.chat_template}
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ' ' + message['content'] }}{% endfor %}"
    )
    tokenizer.save_pretrained(world.model)
    trainer = world.trainer(datasets=[dataset], loreft=dict(positions="f2+l2", runtime_config=WHOLE_ROWS), max_steps=8)
    config = trainer.model.peft_config["default"]
    assert {name: getattr(config, name) for name in marks} == marks
    found = watched(trainer, monkeypatch)
    assert found <= expected(chats(tokenizer)) and len(found) >= len(CHATS) - 1


@pytest.mark.cell(SECTION, "sample packing, saved and loaded by PEFT")
def test_training_is_saved_and_loads(world):
    """The adapter in `output_dir` gives the logits of the model that axolotl trained."""
    model, trainer = world.train(max_steps=6)
    assert losses(trainer)[-1] < losses(trainer)[0]
    folder = world.folder / "out"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["positions"], config["task_type"]) == (4, "f7+l7", "CAUSAL_LM")
    assert config["response_template"] == chat_marks(world.tokenizer)["response_template"]
    assert len(weights(folder)) == 3 * LAYERS
    assert "import peft_reft" in (folder / "README.md").read_text()
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([world.tokenizer.encode("a b c d e f g")])
    with torch.no_grad():
        own, others = model.eval()(input_ids=ids), loaded(input_ids=ids)
    assert torch.equal(own.logits, others.logits)
    with loaded.disable_adapter(), torch.no_grad():
        assert not torch.equal(loaded(input_ids=ids).logits, others.logits)


@pytest.mark.cell(SECTION, "resuming from a checkpoint")
def test_resuming(world):
    """Four steps at once give the weights of two steps and two more from the checkpoint."""
    world.train(max_steps=4, output_dir=str(world.folder / "whole"), save_steps=2)
    _, trainer = world.train(
        max_steps=4, resume_from_checkpoint=str(world.folder / "whole" / "checkpoint-2"), save_steps=2
    )
    assert len(losses(trainer)) == 4 and trainer.state.global_step == 4
    whole, parts = weights(world.folder / "whole"), weights(world.folder / "out")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.cell(SECTION, "gradient checkpointing")
def test_gradient_checkpointing(world):
    world.train(gradient_checkpointing=False, output_dir=str(world.folder / "plain"))
    world.train(gradient_checkpointing=True)
    for name, value in weights(world.folder / "plain").items():
        torch.testing.assert_close(value, weights(world.folder / "out")[name])


def test_training_goes_on_from_an_adapter(world):
    world.train()
    first = str(world.folder / "out")
    before = weights(first)
    model, _ = world.train(lora_model_dir=first, loreft=None, max_steps=1, output_dir=str(world.folder / "on"))
    after = weights(world.folder / "on")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    assert model.peft_config["default"].r == 4
    with pytest.raises(ValueError, match=r"loreft\.r=2, but the adapter in lora_model_dir=.* has 4"):
        world.trainer(lora_model_dir=first, loreft=dict(r=2))


def test_merging(world):
    """Edits of a linear map that need no bias merge, or the reason is given; the default way of axolotl is refused."""
    from axolotl.cli.merge_lora import do_cli

    world.train()
    with pytest.raises(ValueError, match="merge_method=None cannot be combined with adapter='loreft'"):
        do_cli(str(world.config_file()))
    with pytest.raises(ValueError, match="merge-lora: a block's output is edited"):
        do_cli(str(world.config_file(merge_method="legacy")))
    assert not (world.folder / "out" / "merged").exists()


def test_inference(world, monkeypatch, capsys):
    from axolotl.cli.inference import do_cli

    world.train()
    with pytest.raises(ValueError, match="inference: give the trained adapter"):
        do_cli(str(world.config_file()))
    seen = []
    generate = PeftModelForCausalLM.generate

    def noted(model, **more):
        seen.append(model)
        return generate(model, **more)

    monkeypatch.setattr(PeftModelForCausalLM, "generate", noted)
    monkeypatch.setattr(sys, "argv", ["axolotl"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("a b c"))
    do_cli(str(world.config_file()), lora_model_dir=str(world.folder / "out"))
    assert "a b c" in capsys.readouterr().out
    trained = weights(world.folder / "out")
    own = {name.replace(".default", ""): value for name, value in seen[0].state_dict().items() if "loreft" in name}
    assert all(torch.equal(own[name], trained[name]) for name in trained)


@pytest.mark.parametrize("settings", [dict(rl="dpo"), dict(rl="simpo", simpo_gamma=0.5)], ids=["dpo", "simpo"])
@pytest.mark.cell(SECTION, "`rl: {settings[rl]}`, chats")
def test_preferences(world, settings, monkeypatch):
    """The trainer edits what `generate` edits, in the chosen and in the rejected answers, and the adapter is saved."""
    answers = [as_messages(turns)[-1] for turns in CHATS]
    rejected = {"role": "assistant", "content": "0 0"}
    rows = [
        {"messages": as_messages(turns)[:-1], "chosen": answer, "rejected": rejected}
        for turns, answer in zip(CHATS, answers)
    ]
    path = world.folder / "preferences.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    dataset = {"path": str(path), "ds_type": "json", "type": "chat_template.default"}
    _, trainer = world.train(datasets=[dataset], sample_packing=None, rl_beta=0.1, max_steps=3, **settings)
    assert len(losses(trainer)) == 3
    saved = weights(world.folder / "out")
    assert len(saved) == 3 * LAYERS
    assert all(value.any() for name, value in saved.items() if name.endswith(".b"))
    config = json.loads((world.folder / "out" / "adapter_config.json").read_text())
    assert config["response_template"] == chat_marks(world.tokenizer)["response_template"]
    AutoPeftModelForCausalLM.from_pretrained(world.folder / "out")


@pytest.mark.slow
def test_the_command(world):
    """`axolotl train`, as a shell runs it, of the page's YAML."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "axolotl.cli.main", "train", world.config_file(), "--launcher", "python"]
    subprocess.run(command, env=environment, check=True, cwd=world.folder)
    assert weights(world.folder / "out")
