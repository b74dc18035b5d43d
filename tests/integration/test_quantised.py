"""Base models in 4 and 8 bits: an adapter trains, is saved, and loads onto the quantised and the full base."""

import pytest
import torch
from conftest import VOCAB, WIDER, randomise
from peft import PeftModel, get_model_status, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    QuantoConfig,
    TorchAoConfig,
)
from trl import SFTConfig, SFTTrainer

from peft_reft import LoReftConfig, LoReftRuntimeConfig

from .training import arguments, losses

pytest.importorskip("bitsandbytes")
pytest.importorskip("optimum.quanto")
Int8WeightOnlyConfig = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig
quantize_ = pytest.importorskip("torchao").quantize_
TorchAOBaseTensor = pytest.importorskip("torchao.utils").TorchAOBaseTensor

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]

LAYERS, R, NEW = WIDER["num_hidden_layers"], 4, 4


def nf4():
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def fp4():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32)


QUANTISED = {
    "bitsandbytes nf4, double quantisation": nf4,
    "bitsandbytes fp4": fp4,
    "bitsandbytes int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "quanto int8": lambda: QuantoConfig(weights="int8"),
}
CONFIG = LoReftConfig(task_type="CAUSAL_LM", r=R, positions="f2+l2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, **WIDER, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder := tmp_path_factory.mktemp("base"))
    return folder


def prepare(model):
    return prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})


def load(folder, kind):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QUANTISED[kind]())
    model.generation_config.eos_token_id = None
    for module in model.modules():
        # On processors with AVX512-BF16 bitsandbytes repacks weights in the first forward in eval mode, through which
        # it cannot go back: nothing can be trained after an evaluation then, whatever the method.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


PROMPTS = [[3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15]]
WIDTH = max(map(len, PROMPTS))


def left_padded():
    ids = torch.tensor([[0] * (WIDTH - len(prompt)) + prompt for prompt in PROMPTS])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def supervised(completions):
    inputs = left_padded()
    ids = torch.cat([inputs["input_ids"], completions], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(completions)], 1)
    labels = ids.clone()
    labels[:, :WIDTH] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


BATCH = supervised(torch.arange(20, 20 + 2 * NEW).view(2, NEW))


@torch.no_grad()
def logits_of(model):
    return model.eval()(**BATCH).logits[:, WIDTH:]


@pytest.mark.cell("Training in two parts", "{kind}")
@pytest.mark.parametrize("kind", QUANTISED)
def test_training_in_two_parts(folder, kind):
    """The trial at the first step leaves the base as it was: it trains on."""
    found = {}
    for mode in ("off", "on"):
        runtime = LoReftRuntimeConfig(untouched_prompt=mode)
        config = LoReftConfig(task_type="CAUSAL_LM", r=R, positions="l2", runtime_config=runtime)
        torch.manual_seed(0)
        model = get_peft_model(prepare(load(folder, kind)), config).train()
        randomise(model)
        losses_of = []
        for _ in range(2):
            model.zero_grad()
            loss = model(**BATCH).loss
            loss.backward()
            losses_of.append(loss.item())
        found[mode] = losses_of, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    # int8 rounds activations by row, so a difference of rounding can become one of a step.
    close = dict(rtol=2e-2, atol=2e-3) if "int8" in kind else dict(rtol=1e-3, atol=1e-5)
    assert found["on"][0] == pytest.approx(found["off"][0], rel=close["rtol"])
    for name, grad in found["off"][1].items():
        torch.testing.assert_close(found["on"][1][name], grad, **close, msg=name)


@pytest.mark.cell("Quantised bases", "{kind}")
@pytest.mark.parametrize("kind", QUANTISED)
def test_life_of_an_adapter(kind, folder, tmp_path):
    base = load(folder, kind)
    names = set(dict(base.named_modules()))
    expected = logits_of(base)
    model = get_peft_model(prepare(base), CONFIG)

    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 3 * LAYERS and all(p.dtype == torch.float32 for p in trainable.values())
    before = {name: p.detach().clone() for name, p in trainable.items()}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    model.train()
    for _ in range(2):
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, before[name]) for name, p in trainable.items())

    with model.disable_adapter():
        assert torch.equal(logits_of(model), expected)  # nothing of the base moved
    randomise(model)
    logits = logits_of(model)
    assert (logits - expected).abs().max() > 1e-2

    with torch.no_grad():
        answer = model.generate(**left_padded(), max_new_tokens=NEW, do_sample=False, pad_token_id=0)[:, WIDTH:]
        forced = model(**supervised(answer)).logits[:, WIDTH - 1 : -1]
    assert torch.equal(forced.argmax(-1), answer)

    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert len(weights) == 3 * LAYERS
    for name, tensor in weights.items():
        if name.endswith(".R"):
            torch.testing.assert_close(tensor @ tensor.mT, torch.eye(R), atol=1e-5, rtol=0)
    again = PeftModel.from_pretrained(prepare(load(folder, kind)), tmp_path)
    assert torch.equal(logits_of(again), logits)
    full = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    assert (logits_of(full) - logits).abs().max() < 0.5 * (logits - expected).abs().max()

    unloaded = model.unload()
    assert set(dict(unloaded.named_modules())) == names
    assert torch.equal(logits_of(unloaded), expected)


MERGES = [kind for kind in QUANTISED if "quanto" not in kind]
BACKENDS = {"nf4": "bnb 4bit", "fp4": "bnb 4bit", "bitsandbytes int8": "bnb 8bit", "torchao": "torchao"}


def numbers(tensor):
    """torchao's tensors cannot be compared; what they stand for can."""
    return tensor.dequantize() if isinstance(tensor, TorchAOBaseTensor) else tensor


@pytest.mark.cell("Quantised bases", "{kind}: merging")
@pytest.mark.parametrize("kind", MERGES)
@pytest.mark.filterwarnings("ignore:3 linear maps without a bias got one by merging")
@pytest.mark.filterwarnings("ignore:2 linear maps without a bias got one by merging")
@pytest.mark.parametrize("fields", [dict(component="mlp"), dict(target_modules=["o_proj"], intervention="red", r=8)])
def test_merging_is_exact_to_the_rounding_of_the_quantised_weights(kind, fields, folder):
    """And what is unmerged is what it was, to the bit."""
    base = load(folder, kind)
    quantised = logits_of(base)
    rounding = (quantised - logits_of(AutoModelForCausalLM.from_pretrained(folder))).abs().max()
    model = get_peft_model(base, LoReftConfig(task_type="CAUSAL_LM", positions="all", **{"r": R, **fields}))
    assert get_model_status(model).quantization_backend == next(name for key, name in BACKENDS.items() if key in kind)
    randomise(model)
    edited = logits_of(model)
    state = {name: numbers(tensor).clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(ValueError, match=r"the weights are quantised \((bnb|torchao)"):
        model.merge_adapter()  # TRL does so, and sends the weights to vLLM
    for _ in range(2):
        model.merge_adapter(new_parameters=True)
        assert (logits_of(model) - edited).abs().max() < 2 * rounding < (edited - quantised).abs().max()
        model.unmerge_adapter()
        assert torch.equal(logits_of(model), edited)
    after = {name: numbers(tensor) for name, tensor in base.state_dict().items()}
    assert after.keys() == state.keys() and all(torch.equal(after[name], tensor) for name, tensor in state.items())
    merged = model.merge_and_unload()
    assert (logits_of(merged) - edited).abs().max() < 2 * rounding
    assert type(merged.model.layers[0].mlp.down_proj) is type(base.model.layers[0].mlp.up_proj)


def test_merging_that_would_read_wrong_weights_is_refused(folder):
    model = get_peft_model(load(folder, "quanto int8"), LoReftConfig(positions="all", component="mlp", r=R))
    with pytest.raises(ValueError, match=r"ends with QLinear: .*quantised by bitsandbytes or torchao, but not"):
        model.merge_adapter(new_parameters=True)
    base = load(folder, "bitsandbytes fp4")
    base.model.layers[0].mlp.down_proj.weight.quant_state.packing_format_for_cpu = True
    model = get_peft_model(base, LoReftConfig(positions="all", component="mlp", r=R))
    with pytest.raises(ValueError, match=r"has repacked the weights of .* Set `support_avx512bf16_for_cpu = False`"):
        model.merge_adapter(new_parameters=True)
    by_hand = AutoModelForCausalLM.from_pretrained(folder)
    quantize_(by_hand, Int8WeightOnlyConfig())
    before = logits_of(by_hand)
    model = get_peft_model(by_hand, LoReftConfig(positions="all", component="mlp", r=R))
    with pytest.raises(ValueError, match="torchao has quantised the weights without transformers"):
        model.merge_adapter(new_parameters=True)
    assert torch.equal(logits_of(model.unload()), before)


def train(folder, data, tokenizer, out, kind=None, adapter=None):
    base = AutoModelForCausalLM.from_pretrained(folder) if kind is None else load(folder, kind)
    base = base if kind is None else prepare(base)
    trainer = SFTTrainer(
        base,
        args=arguments(SFTConfig, out, max_steps=30, lr_scheduler_type="constant"),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=CONFIG,
    )
    if adapter is not None:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(adapter)
    trainer.train()
    return trainer


@pytest.mark.cell("Quantised bases", "QLoRA-style: `SFTTrainer` on nf4, adapter cast to bf16 by TRL")
def test_sft_on_four_bits_learns_as_in_fp32(folder, pairs, tokenizer, tmp_path):
    """TRL casts the adapter to bf16 in place: R stays orthonormal, and the losses follow those in fp32."""
    full = losses(train(folder, pairs, tokenizer, tmp_path))
    kind = "bitsandbytes nf4, double quantisation"
    in_fp32 = losses(train(folder, pairs, tokenizer, tmp_path, kind, torch.float32))
    trainer = train(folder, pairs, tokenizer, tmp_path, kind)
    in_bf16 = losses(trainer)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}
    print("loss on the fp32 base; on nf4, adapter in fp32; in bf16")  # shown by `pytest -s`
    print(*(f"{a:.3f} {b:.3f} {c:.3f}" for a, b, c in zip(full, in_fp32, in_bf16)), sep="\n")

    learnt = full[0] - full[-1]
    assert learnt > 0.1 * full[0]
    assert max(abs(a - b) for a, b in zip(in_bf16, in_fp32)) < 0.05 * learnt
    assert in_bf16[0] - in_bf16[-1] > 0.8 * learnt

    trainer.save_model(str(tmp_path / "saved"))
    for name, tensor in load_file(tmp_path / "saved" / "adapter_model.safetensors").items():
        if name.endswith(".R"):
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor @ tensor.mT, torch.eye(R), atol=1e-5, rtol=0)
    trained = logits_of(trainer.model)
    on_four = PeftModel.from_pretrained(prepare(load(folder, kind)), tmp_path / "saved")
    torch.testing.assert_close(logits_of(on_four), trained, atol=1e-4, rtol=1e-4)
    on_full = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "saved")
    assert (logits_of(on_full) - trained).abs().max() < 0.2
