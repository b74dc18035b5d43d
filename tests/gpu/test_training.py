"""A training step on a card is that of the CPU, to the rounding of its number type."""

import importlib.util
import inspect
import itertools

import pytest
import torch
from conftest import VOCAB, WIDER, build, randomise
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch.nn import functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from peft_reft import LoReftRuntimeConfig

from .conftest import PROMPTS, adapted, assert_close, batch, collated, config, step

ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
SETTINGS = {
    "f2+l2": {},
    "all": {"positions": "all"},
    "red": {"intervention": "red"},
    "a gate, an activation": {"gate": True, "act_fn": "relu", "intervention": "noreft"},
    "tied": {"tie": "model"},
    "the untouched prompt": {"positions": "l2", "runtime_config": LoReftRuntimeConfig(untouched_prompt="on")},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_step(name, device):
    in_one_part = {field: value for field, value in SETTINGS[name].items() if field != "runtime_config"}
    expected = step(adapted(**in_one_part), batch())
    model = adapted(**SETTINGS[name]).to(device)
    for _ in range(2):  # the second finds what the first kept
        assert_close(step(model, batch(device=device)), expected, ROUNDING[torch.float32])


def orthogonality_error(model):
    rotations = [p.detach().double().cpu() for name, p in model.named_parameters() if name.endswith(".R")]
    return max((r @ r.mT - torch.eye(len(r))).abs().max().item() for r in rotations)


@pytest.mark.parametrize("autocast_adapter", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, autocast_adapter, device, tmp_path):
    rows = batch(device=device)
    model = adapted(build("llama").to(dtype), autocast_adapter).to(device)
    loss = step(adapted(), batch())["loss"]
    assert abs(step(model, rows)["loss"] - loss) < ROUNDING[dtype] * loss
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, eps=1e-6)
    losses = []
    for _ in range(8):
        losses.append(model.train()(**rows).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    base = build("llama").to(device, dtype)
    again = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=autocast_adapter)
    logits = model.eval()(**rows).logits
    if autocast_adapter:
        assert torch.equal(again(**rows).logits, logits) and orthogonality_error(again) < 1e-5
    else:
        torch.testing.assert_close(again(**rows).logits, logits, atol=ROUNDING[dtype], rtol=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    rows = batch(device=device)
    exact = step(adapted(), batch())
    model = adapted().to(device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16, init_scale=128.0)
    with torch.autocast(device.type, dtype):
        loss = model.train()(**rows).loss
        layer = model.base_model.model.model.layers[0].loreft.loreft_weights["default"]
        assert layer.edit(torch.randn(3, 32, dtype=dtype, device=device)).dtype == torch.float32
    scaler.scale(loss).backward()
    assert abs(loss.item() - exact["loss"].item()) < ROUNDING[dtype] * exact["loss"].item()
    for name, p in model.named_parameters():
        if p.requires_grad:
            error = (p.grad.cpu() / scaler.get_scale() - exact[name]).norm() / exact[name].norm()
            assert p.grad.dtype == torch.float32 and error < 3 * ROUNDING[dtype], name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, device):
    model = adapted().to(device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_close(step(model, batch(device=device)), step(adapted(), batch()), ROUNDING[torch.float32])


# Packing: one row holds all documents, and attention keeps them apart.


def varlen(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **kwargs):
    """FlashAttention of rows of several lengths, as torch has it. (1, heads, tokens, d) each."""
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    if query.device.type == "cpu":
        bounds = cu_seq_lens_q.tolist()
        pieces = []
        for first, last in itertools.pairwise(bounds):
            parts = [each[:, :, first:last] for each in (query, key, value)]
            pieces.append(F.scaled_dot_product_attention(*parts, is_causal=True, scale=scaling))
        return torch.cat(pieces, 2).transpose(1, 2), None
    from torch.nn.attention.varlen import varlen_attn

    causal = {"window_size": (-1, 0)} if "window_size" in inspect.signature(varlen_attn).parameters else {}
    causal = causal or {"is_causal": True}
    flat = [each[0].transpose(0, 1).contiguous() for each in (query, key, value)]  # (tokens, heads, d)
    lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    return varlen_attn(*flat, *lengths, scale=scaling, **causal).unsqueeze(0), None


AttentionInterface.register("varlen", varlen)
AttentionMaskInterface.register("varlen", flash_attention_mask)
FLASH = pytest.param(
    "flash_attention_2",
    marks=pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed"),
)


@pytest.mark.parametrize("ours", [True, False], ids=["the collator's positions", "from the batch"])
@pytest.mark.parametrize("attention", ["sdpa", "varlen", FLASH])
def test_packed_rows(attention, ours, device):
    dtype = torch.float32 if attention == "sdpa" or device.type == "cpu" else torch.bfloat16
    rows = batch()
    lengths = [len(row) for row in rows["input_ids"]]
    expected = step(adapted(), rows)
    packed = {name: rows[name].reshape(1, -1) for name in ("input_ids", "labels")}
    packed["position_ids"] = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    # The first label of a document would be predicted by the last token of the one before; it belongs to a prompt.
    assert all(length > 0 for length in PROMPTS) and (packed["labels"][packed["position_ids"] == 0] == -100).all()
    packed = collated(packed) if ours else packed
    packed = {name: tensor.to(device) for name, tensor in packed.items()} | {"use_cache": False}
    if attention != "sdpa":
        bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
        packed |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        packed |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    base = build("llama").to(dtype)
    base.set_attn_implementation(attention)
    found = step(adapted(base).to(device), packed)
    if dtype == torch.float32:
        assert_close(found, expected, ROUNDING[dtype])
    else:
        assert abs(found["loss"] - expected["loss"]) < ROUNDING[dtype] * expected["loss"]


# Bases in 4 and 8 bits


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
def test_quantised_base(bits, device, tmp_path):
    compute = torch.float32 if device.type == "cpu" else torch.bfloat16
    four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **WIDER, pad_token_id=0)).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(**four) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True),
        device_map={"": device},
    )
    base.generation_config.eos_token_id = None
    for module in base.modules():  # see docs/quantised.md
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    rows = batch(device=device)
    with torch.no_grad():
        before = base.eval()(**rows).logits
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(base, config())
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(model.train()(**rows).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(**rows).logits, before, atol=1e-2, rtol=1e-2)
    randomise(model)
    prompt = {name: rows[name][:, : min(PROMPTS)] for name in ("input_ids", "attention_mask")}
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    labels = answer.clone()
    labels[:, : min(PROMPTS)] = -100
    with torch.no_grad():
        forced = model(input_ids=answer, attention_mask=torch.ones_like(answer), labels=labels).logits
    assert torch.equal(forced[:, min(PROMPTS) - 1 : -1].argmax(-1), answer[:, min(PROMPTS) :])
