"""Exports that would lose the edits are refused in words; `torch.export` records them (test_deploying.py has more)."""

import pytest
import torch
from conftest import VOCAB, build
from peft import get_peft_model

from peft_reft import LoReftConfig

IDS = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(8))


def adapted():
    config = LoReftConfig(task_type="SEQ_CLS", r=2, positions="f2+l2", init_weights=False)
    return get_peft_model(build("bert"), config).eval()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_and_the_exporter_that_uses_it(tmp_path):
    for model in (adapted(), adapted().get_base_model()):
        with pytest.raises(RuntimeError, match=r"TorchScript's tracer .* cannot record a model with LoReFT.*unload"):
            torch.onnx.export(model, (IDS,), str(tmp_path / "model.onnx"), dynamo=False)
        with pytest.raises(RuntimeError, match="TorchScript's tracer"):
            torch.jit.trace(model, (IDS,), strict=False)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_torch_export_is_right(strict):
    model = adapted().get_base_model()
    mask = torch.ones_like(IDS)
    program = torch.export.export(model, (IDS, mask), strict=strict)
    torch.testing.assert_close(program.module()(IDS, mask).logits, model(IDS, attention_mask=mask).logits)
