"""`swift sft`, resume, `swift infer`, `swift export`, as far as they concern LoReFT."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from swift.pipelines import export_main, infer_main
from transformers import AutoModelForCausalLM

from peft_reft import LoReftConfig
from peft_reft.integrations.swift import config_of

from .conftest import turn, write
from .runs import Rlhf, arguments, edited, losses, plugin, to_edit, train, weights

PAGE = Path(__file__).parents[2] / "docs" / "other_tools.md"
SETTINGS = {
    "right padding": {},
    "left padding": {"padding_side": "left"},
    "one row a batch": {"per_device_train_batch_size": 1},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "loss_scale last_round": {"loss_scale": "last_round"},
    "weights of tokens (channels, DFT)": {"enable_dft_loss": "true", "enable_channel_loss": "true"},
    "jinja": {"template_backend": "jinja"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, folder, chats):
    """A run of six steps, with checkpoints after each second."""
    run = train(arguments(folder, chats, tmp_path_factory.mktemp("run"), max_steps=6))
    check_positions(run)
    assert losses(run)[-1] < losses(run)[0]
    return run


def check_positions(run):
    """Every batch names the columns that `generate` edits."""
    tokenizer = run.template.tokenizer
    header = tokenizer.encode("<|im_start|>assistant", add_special_tokens=False)
    several = 0
    for batch in run.batches:
        rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist())
        for (ids, mask), columns in zip(rows, edited(batch), strict=True):
            start, length = mask.index(1), sum(mask)
            expected = to_edit(ids[start : start + length], header)
            assert columns == {start + column for column in expected}
            several += len(expected) > 4
    assert several, "no batch had a chat of two turns"


@pytest.mark.cell("Trainers: ms-swift", "sft: {name}")
@pytest.mark.parametrize("name", SETTINGS)
def test_positions(tmp_path, folder, chats, name):
    run = train(arguments(folder, chats, tmp_path, **SETTINGS[name]))
    check_positions(run)


def test_a_template_without_the_tokenizers_headers(tmp_path, folder, chats):
    """Chats of one answer have their labels; chats of several raise."""
    one = write(tmp_path / "one.jsonl", [{"messages": turn(n)} for n in range(8)])
    run = train(arguments(folder, one, tmp_path / "one", template="default"))
    assert all(len(columns) == 4 for batch in run.batches for columns in edited(batch))
    with pytest.raises(ValueError, match="response_template"):
        train(arguments(folder, chats, tmp_path / "several", template="default"))


@pytest.mark.cell("Trainers: ms-swift", "sft: packing and padding_free, the batches (training needs flash attention)")
@pytest.mark.parametrize("packs", [False, True], ids=["padding_free", "packing"])
def test_packed_batches(trained, packs):
    template, collator = trained.template, trained.trainer.data_collator
    rows = [template.encode({"messages": [*turn(n), *turn(n + 1)]}, return_length=True) for n in range(3)]
    for row in rows:
        row["length"] = len(row["input_ids"])
    header = template.tokenizer.encode("<|im_start|>assistant", add_special_tokens=False)
    expected, start = set(), 0
    for row in rows:
        expected |= {start + column for column in to_edit(row["input_ids"], header)}
        start += row["length"]
    template.padding_free, template.packing = True, packs
    try:
        batch = collator([rows] if packs else rows)
    finally:
        template.padding_free = template.packing = False
    assert batch["input_ids"].shape == (1, start)
    assert edited(batch) == [expected]


@pytest.mark.cell("Trainers: ms-swift", "sft: gradient checkpointing, which is ms-swift's default")
def test_checkpointing_changes_nothing(tmp_path, trained, folder, chats):
    plain = train(arguments(folder, chats, tmp_path, max_steps=6, gradient_checkpointing="false"))
    torch.testing.assert_close(losses(plain), losses(trained), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights(plain), weights(trained), rtol=1e-4, atol=1e-5)


@pytest.mark.cell("Trainers: ms-swift", "sft: --resume_from_checkpoint")
def test_resume(tmp_path, trained, folder, chats):
    checkpoint = f"{trained.trainer.args.output_dir}/checkpoint-4"
    run = train(arguments(folder, chats, tmp_path, max_steps=6, resume_from_checkpoint=checkpoint))
    check_positions(run)
    torch.testing.assert_close(weights(run), weights(trained), rtol=1e-4, atol=1e-5)


@pytest.mark.cell("Trainers: ms-swift", "infer")
def test_infer(trained, folder, chats):
    """Answers are those of PEFT's `generate`, padded and alone, and not those of the base."""
    checkpoint = f"{trained.trainer.args.output_dir}/checkpoint-6"
    asked = ["--val_dataset", chats, "--max_new_tokens", "4", "--temperature", "0", "--stream", "false"]
    found = infer_main(["--adapters", checkpoint, *asked, "--max_batch_size", "3", "--load_data_args", "false"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), checkpoint).eval()
    config = model.peft_config["default"]
    assert config.positions == "f2+l2" and config.response_template
    template = trained.template
    template.set_mode("transformers")
    answers, of_base = [], []
    for row in Path(chats).read_text().splitlines():
        messages = json.loads(row)["messages"][:-1]
        ids = torch.tensor([template.encode({"messages": messages})["input_ids"]])
        settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        answers.append(
            template.decode_generate_ids(model.generate(input_ids=ids, **settings)[0, ids.shape[1] :].tolist())
        )
        with model.disable_adapter():
            of_base.append(model.generate(input_ids=ids, **settings)[0, ids.shape[1] :].tolist())
    template.set_mode("train")
    assert [each["response"] for each in found] == answers
    assert len(set(answers)) > 1
    assert answers != [template.decode_generate_ids(ids) for ids in of_base]


@pytest.mark.cell("Trainers: ms-swift", "export --merge_lora", refused="`peft-reft export` merges what can be merged")
def test_export_refuses_to_merge(tmp_path, trained):
    words = ["--adapters", f"{trained.trainer.args.output_dir}/checkpoint-6", "--merge_lora", "true"]
    with pytest.raises(ValueError, match=r"ms-swift cannot merge LoReFT .* `peft-reft export ADAPTER DST`"):
        export_main([*words, "--output_dir", str(tmp_path / "merged")])
    assert not (tmp_path / "merged").exists()


@pytest.mark.cell("Trainers: ms-swift", "sft: --task_type seq_cls")
def test_classifier(tmp_path, folder):
    rows = [{"messages": turn(n)[:1], "label": n % 2} for n in range(16)]
    data = write(tmp_path / "labels.jsonl", rows)
    run = train(arguments(folder, data, tmp_path / "out", task_type="seq_cls", num_labels=2))
    assert run.trainer.model.peft_config["default"].task_type == "SEQ_CLS"
    assert "intervention_positions" not in run.batches[0]  # the whole row is the prompt


@pytest.mark.cell("Trainers: ms-swift", "rlhf --rlhf_type dpo")
def test_dpo(tmp_path, folder):
    rows = [{"messages": [*turn(n + 3), *turn(n)], "rejected_response": "0 1 2"} for n in range(16)]
    data = write(tmp_path / "pairs.jsonl", rows)
    run = train(arguments(folder, data, tmp_path / "out", rlhf_type="dpo"), Rlhf)
    check_positions(run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 16}, "--lora_rank 16 has no effect on --tuner_type loreft"),
        ({"reft_layers": 1}, r"--reft_layers \[1\] has no effect"),
        ({"reft_args": '{"rank": 4}'}, "expected a JSON object with fields of LoReftConfig .*positions"),
        ({"reft_args": "r=4"}, "expected a JSON object"),
        ({"reft_args": '{"positions": "x2"}'}, "x2"),
    ],
)
def test_wrong_arguments(tmp_path, folder, chats, settings, message):
    with pytest.raises(ValueError, match=message):
        train(arguments(folder, chats, tmp_path, **settings))


def test_other_tasks_are_refused(trained, monkeypatch):
    monkeypatch.setattr(trained.args, "task_type", "embedding")
    with pytest.raises(ValueError, match="--task_type embedding: --tuner_type loreft supports causal_lm, seq_cls"):
        config_of(trained.args)


def test_truncation_of_beginnings_warns(tmp_path, folder, chats):
    with pytest.warns(UserWarning, match="--truncation_strategy left cuts the beginning .* f2 of positions='f2.l2'"):
        train(arguments(folder, chats, tmp_path, truncation_strategy="left", max_length=200, max_steps=1))


def test_other_trainers_are_refused(tmp_path, folder, chats):
    with pytest.raises(ValueError, match="which tokens ms-swift's KTOTrainer gives the model"):
        data = write(tmp_path / "kto.jsonl", [{"messages": turn(n), "label": n % 2 == 0} for n in range(8)])
        train(arguments(folder, data, tmp_path / "out", rlhf_type="kto"), Rlhf)


def test_the_folder_of_the_plugin_hides_no_module():
    """ms-swift puts the folder first on `sys.path`."""
    names = {path.stem for path in Path(plugin()).parent.iterdir()} - {"__init__", "__pycache__"}
    assert names == {"loreft_plugin"}


def test_the_page(tmp_path, folder, chats):
    """The page's commands, with a tiny model, in a shell."""
    (block,) = re.findall(r"```text\n(swift sft .*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    sft, infer = block.replace("\\\n", " ").strip().splitlines()
    bin_folder = Path(sys.executable).parent
    tiny = "--model_type qwen2 --template chatml --torch_dtype float32 --max_steps 2 --check_model false --use_hf true"
    sft = sft.replace("MODEL", folder).replace("mine.jsonl", chats)
    infer = infer.replace("mine.jsonl", chats).replace("checkpoint-1000", "checkpoint-2")
    for command in (f"{sft} {tiny}", f"{infer} --max_new_tokens 4"):
        line = f'PATH="{bin_folder}:$PATH"; {command}'
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{shlex.split(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    saved = tmp_path / "outputs" / "swift" / "checkpoint-2"
    config = LoReftConfig.from_pretrained(str(saved))
    assert (config.r, config.positions) == (4, "f7+l7")
    assert list(saved.glob("infer_result/*.jsonl")), "`swift infer` wrote no answers"
