"""Liger's kernels with LoReFT. `make test-extras` has them, and runs them on a CPU, in Triton's interpreter.

Its fused loss replaces the model's `forward` by one that calls the backbone and multiplies by `lm_head.weight`. Its
kernels for layers replace the `forward` of modules; those of RMSNorm and SwiGLU do not run in the interpreter, so
torch stands in for their arithmetic.
"""

import os

import pytest
import torch
from conftest import build, randomise
from datasets import Dataset
from integration.conftest import PAIRS
from integration.training import WARNINGS, arguments, losses, trainable
from peft import get_peft_model
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.models.llama import modeling_llama
from trl import SFTConfig, SFTTrainer

from peft_reft import LoReftConfig, LoReftRuntimeConfig

pytestmark = WARNINGS

FUSED_LOSS = dict(fused_linear_cross_entropy=True, rope=False, rms_norm=False, swiglu=False)


@pytest.fixture(autouse=True)
def _liger_leaves_no_trace(monkeypatch):
    """It replaces names in the module of the model, for all models to come."""
    pytest.importorskip("liger_kernel")
    assert os.environ.get("TRITON_INTERPRET") == "1", "a CPU runs these kernels in Triton's interpreter alone"
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))


@pytest.fixture
def _torch_for_layers(monkeypatch, _liger_leaves_no_trace):
    from liger_kernel.transformers import rms_norm, swiglu

    class Norm:
        @staticmethod
        def apply(hidden, weight, eps, *_):
            return weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)

    monkeypatch.setattr(rms_norm, "LigerRMSNormFunction", Norm)
    monkeypatch.setattr(swiglu, "_swiglu_dispatch", lambda gate, up: F.silu(gate) * up)


def rows():
    """Ragged rows of a prompt and an answer, as token ids."""
    for prompt, answer in ((8, 3), (5, 2), (2, 4), (9, 1)):
        ids = list(range(9, 9 + prompt + answer))
        yield {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


def collate(batch):
    width = max(len(row["input_ids"]) for row in batch)

    def padded(name, value):
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in batch])  # (batch, seq)

    ids = padded("input_ids", 0)
    return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": (ids != 0).long()}


def assert_equal(with_liger, without):
    assert with_liger[0] == pytest.approx(without[0], rel=1e-5)
    assert with_liger[1].keys() == without[1].keys()
    for name, tensor in without[1].items():
        torch.testing.assert_close(with_liger[1][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "positions, cut, settings",
    [
        ("f2+l2", "off", {}),
        ("l2", "on", {}),
        ("all", "off", {}),
        ("f2+l2", "off", dict(response_template=[[13]])),  # marks: an answer begins behind each 13
    ],
    ids=["labels", "two parts", "all", "marks"],
)
@pytest.mark.cell("Trainers: transformers", "`use_liger_kernel=True`: its fused loss")
def test_the_fused_loss(positions, cut, settings, tmp_path):
    """It gets no logits from the model, and the positions all the same; an evaluation does without it."""
    data, results = list(rows()), []
    for liger in (False, True):
        runtime = LoReftRuntimeConfig(untouched_prompt=cut)
        config = LoReftConfig(task_type="CAUSAL_LM", r=4, positions=positions, runtime_config=runtime, **settings)
        model = get_peft_model(build("llama"), config)
        randomise(model)
        args = arguments(TrainingArguments, tmp_path, use_liger_kernel=liger, liger_kernel_config=FUSED_LOSS)
        args.remove_unused_columns = False
        trainer = Trainer(model, args, train_dataset=data, eval_dataset=data, data_collator=collate)
        trainer.train()
        assert ("lce_forward" in str(model.get_base_model().forward)) is liger
        found = [*losses(trainer), trainer.evaluate()["eval_loss"]]
        results.append((found, trainable(model)))
    assert_equal(results[1], results[0])


@pytest.mark.filterwarnings("ignore:`use_liger_kernel=True` is deprecated:FutureWarning")
@pytest.mark.usefixtures("_torch_for_layers")
@pytest.mark.parametrize("component", ["block", "mlp", "attention"])
@pytest.mark.cell("Trainers: SFT", "`use_liger_kernel=True`: its kernels for layers (RMSNorm, SwiGLU by torch)")
def test_kernels_of_layers(component, tokenizer, tmp_path):
    data, results = Dataset.from_list([{"prompt": p, "completion": f" {c}"} for p, c in PAIRS]), []
    for liger in (False, True):
        config = LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2", component=component)
        args = arguments(SFTConfig, tmp_path, use_liger_kernel=liger)
        trainer = SFTTrainer(build("llama"), args, train_dataset=data, processing_class=tokenizer, peft_config=config)
        randomise(trainer.model)
        trainer.train()
        layer = trainer.model.get_base_model().model.layers[0]
        assert ("Liger" in str(layer.mlp.forward)) is ("Liger" in str(layer.input_layernorm.forward)) is liger
        results.append((losses(trainer), trainable(trainer.model)))
    assert_equal(results[1], results[0])


def test_an_edited_head_is_refused(tmp_path):
    """The fused loss would never compute the edit."""
    config = LoReftConfig(task_type="CAUSAL_LM", r=4, positions="l2", target_modules=["lm_head", "model.layers.0"])
    model = get_peft_model(build("llama"), config)
    args = arguments(TrainingArguments, tmp_path, use_liger_kernel=True, liger_kernel_config=FUSED_LOSS)
    args.remove_unused_columns = False
    trainer = Trainer(model, args, train_dataset=list(rows()), data_collator=collate)
    with pytest.raises(ValueError, match=r"'lm_head'.*Liger.*fused_linear_cross_entropy"):
        trainer.train()
