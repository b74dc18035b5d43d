"""Half precision: of the base, of the adapter, and by autocast."""

import pytest
import torch
from conftest import build, randomise
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_reft import LoReftConfig

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def loreft():
    return LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2")


def batch():
    ids = torch.randint(3, 64, (2, 10))
    labels = ids.clone()
    labels[:, :8] = -100
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)


def error_of(rotation):
    rotation = rotation.detach().double()
    return (rotation @ rotation.mT - torch.eye(len(rotation))).abs().max().item()


def orthogonality_error(model):
    return max(error_of(p) for name, p in model.named_parameters() if name.endswith(".R"))


@pytest.mark.cell("Dtypes", "base in {base}, autocast_adapter_dtype={autocast}")
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("base", DTYPES, ids=str)
def test_dtype_of_base_and_adapter(base, autocast, tmp_path):
    model = get_peft_model(build("llama").to(base), loreft(), autocast_adapter_dtype=autocast)
    # As with LoRA: without autocasting the adapter has the type of the base, which FSDP wants; with it, fp32.
    adapter = {p.dtype for name, p in model.named_parameters() if "loreft_" in name}
    assert adapter == {torch.float32 if autocast else base}
    randomise(model)
    data = batch()
    weights = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, eps=1e-6)
    losses = []
    for _ in range(8):
        loss = model.train()(**data).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(not torch.equal(p, old) for p, old in zip(weights, before))
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama").to(base), tmp_path, autocast_adapter_dtype=autocast)
    logits, reloaded = model.eval()(**data).logits, again(**data).logits
    assert logits.dtype == base
    if autocast:
        assert torch.equal(logits, reloaded) and orthogonality_error(again) < 1e-5
    else:  # R is orthonormal in the file, and rounded once more to the base's type
        torch.testing.assert_close(logits, reloaded, atol=ROUNDING[base], rtol=0)
    # Whatever they are stored in, weights compute in fp32 and are saved so that the rows of R are orthonormal.
    saved = load_file(tmp_path / "adapter_model.safetensors")
    rotations = [tensor for name, tensor in saved.items() if name.endswith(".R")]
    assert rotations and all(tensor.dtype == torch.float32 for tensor in rotations)
    assert max(map(error_of, rotations)) < 1e-5


@pytest.mark.cell("Dtypes", "autocast to {dtype}, base and adapter in fp32")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """The edit is computed in fp32 under autocast: only what the base rounds differs."""
    model = get_peft_model(build("llama"), loreft())
    randomise(model)
    data = batch()
    exact = model(**data).loss
    exact.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        loss = model(**data).loss
        layer = model.base_model.model.model.layers[0].loreft.loreft_weights["default"]
        assert layer.edit(torch.randn(3, 32, dtype=dtype)).dtype == torch.float32
    loss.backward()
    assert loss != exact  # autocast did something
    torch.testing.assert_close(loss, exact, atol=ROUNDING[dtype], rtol=0)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.dtype == torch.float32
            error = (p.grad - gradients[name]).norm() / gradients[name].norm()
            assert error < 5 * ROUNDING[dtype], name
