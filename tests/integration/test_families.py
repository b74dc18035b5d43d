"""Every family of models, one body: inject, train, save, load, disable, generate, unload."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from conftest import HIDDEN as D
from conftest import SIZES as ALL_SIZES
from conftest import VOCAB, randomise
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from peft_reft import LoReftConfig

R, LAYERS, NEW = 4, 2, 4
IMAGE = 60  # the token that stands for a piece of an image
SPEC = "f2+l2"

SIZES = dict(ALL_SIZES, num_hidden_layers=LAYERS, max_position_embeddings=64)
GQA = dict(num_key_value_heads=2)
HEAD = dict(GQA, head_dim=8)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
DEEPSEEK = dict(
    dict(n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=16),
    **dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8),
    first_k_dense_replace=1,  # a dense block, then one with experts
)
MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=4, mamba_expand=2)
T5 = dict(SIZES, d_ff=48, d_kv=8, num_decoder_layers=LAYERS, decoder_start_token_id=0)
BART = dict(SIZES, decoder_layers=LAYERS, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48)
MIXED = ("attention",)  # only some of the blocks have attention, the others a state-space model
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
LLAVA = dict(
    text_config=dict(SIZES, **GQA, model_type="llama"),
    vision_config=dict(VISION, model_type="clip_vision_model", image_size=4, patch_size=2),
    image_token_id=IMAGE,
)
QWEN_VISION = dict(patch_size=2, window_size=4, spatial_merge_size=1, temporal_patch_size=1, fullatt_block_indexes=[1])
QWEN_VL = dict(
    text_config=dict(SIZES, **GQA, rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2])),
    vision_config=dict(QWEN_VISION, depth=3, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=D),
    image_token_id=IMAGE,
    vision_start_token_id=61,
    vision_end_token_id=62,
    video_token_id=63,
)


@dataclass(frozen=True)
class Family:
    name: str
    """Of its classes: `<name>ForCausalLM` or `<name>ForSequenceClassification`, and `<name>Config`, unless given."""
    sizes: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    config: str = ""
    task: str = "CAUSAL_LM"
    without: tuple[str, ...] = ()
    """Components that its blocks do not have by a known name."""

    def build(self) -> PreTrainedModel:
        torch.manual_seed(0)
        head = "ForSequenceClassification" if self.task == "SEQ_CLS" else "ForCausalLM"
        config = getattr(transformers, self.config or f"{self.name}Config")(**self.sizes)
        model = getattr(transformers, self.model or f"{self.name}{head}")(config).eval()
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.pad_token_id = 0
            model.generation_config.eos_token_id = None
        return model


def text(name, model="", config="", without=(), **sizes):
    return Family(name, {**SIZES, **sizes}, model, config, without=without)


FAMILIES = [
    text("Llama", **GQA),
    text("Llama4", config="Llama4TextConfig", **HEAD, intermediate_size_mlp=48, num_local_experts=2),
    text("Qwen2", **GQA),
    text("Qwen2Moe", **GQA, **EXPERTS, shared_expert_intermediate_size=16),
    text("Qwen3", **HEAD),
    text("Qwen3Moe", **HEAD, **EXPERTS),
    text("Mistral", **GQA),
    text("Mixtral", **GQA, num_local_experts=4),
    text("Gemma2", **HEAD),
    text("Gemma3", config="Gemma3TextConfig", **HEAD),
    text("Phi3", **GQA),
    text("Olmo2", **GQA),
    text("GPT2", model="GPT2LMHeadModel"),
    text("GPTNeoX"),
    text("OPT", ffn_dim=48, word_embed_proj_dim=D),
    text("Falcon"),
    text("Bloom"),
    text("Mpt"),
    text("GPTJ", rotary_dim=4),
    text("Starcoder2", **GQA),
    text("Granite", **GQA),
    text("SmolLM3", **GQA),
    text("DeepseekV3", **DEEPSEEK),
    text("Jamba", **GQA, attn_layer_period=2, attn_layer_offset=1, num_experts=2, without=MIXED),
    text("FalconH1", **HEAD, **MAMBA2, mamba_d_ssm=64),
    text("Bamba", **GQA, **MAMBA2, attn_layer_indices=[1], without=MIXED),
    text("Mamba", without=("attention", "mlp")),  # its blocks have a `mixer`
    Family("Llava", LLAVA, model="LlavaForConditionalGeneration"),
    Family("Qwen2_5_VL", QWEN_VL, model="Qwen2_5_VLForConditionalGeneration"),
    Family("Bert", SIZES, task="SEQ_CLS"),
    Family("Roberta", SIZES, task="SEQ_CLS"),
    Family("DebertaV2", SIZES, task="SEQ_CLS"),
    Family("ModernBert", SIZES, task="SEQ_CLS"),
    Family("DistilBert", SIZES, task="SEQ_CLS"),
    # The halves of a T5 block stand in a list, without names.
    Family("T5", T5, "T5ForConditionalGeneration", task="SEQ_2_SEQ_LM", without=("attention", "mlp")),
    Family("Bart", BART, "BartForConditionalGeneration", task="SEQ_2_SEQ_LM"),
]


def prompts(family, lengths):
    """Return prompts of those lengths; those of a vision-language model begin with an image of four tokens."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, IMAGE, (length,), generator=generator) for length in lengths]
    if "vision_config" in family.sizes:
        for row in rows:
            row[:4] = IMAGE
    return rows


def inputs(family, rows, side="left", images=slice(None)):
    """A padded batch; `images`: which of the images of all rows go with it."""
    width = max(map(len, rows))
    sides = [(width - len(row), 0) if side == "left" else (0, width - len(row)) for row in rows]
    batch = {
        "input_ids": torch.stack([torch.nn.functional.pad(row, pad) for row, pad in zip(rows, sides)]),
        "attention_mask": torch.stack([torch.nn.functional.pad(torch.ones_like(r), p) for r, p in zip(rows, sides)]),
    }
    pixels = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(4))[images]
    if family.name == "Llava":
        batch["pixel_values"] = pixels
    elif family.name == "Qwen2_5_VL":  # its images come as rows of flattened patches
        batch["pixel_values"] = pixels.reshape(-1, 12)
        batch["image_grid_thw"] = torch.tensor([[1, 2, 2]] * len(pixels))
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    return batch


def supervised(family):
    """A batch to train on."""
    batch = inputs(family, prompts(family, [12, 12]), "right")
    if family.task == "SEQ_CLS":
        return {**batch, "labels": torch.tensor([0, 1])}
    if family.task == "SEQ_2_SEQ_LM":
        return {**batch, "labels": torch.randint(3, VOCAB, (2, 5))}
    labels = batch["input_ids"].clone()
    labels[:, :7] = -100
    return {**batch, "labels": labels}


@torch.no_grad()
def logits_of(model, family, **kwargs):
    return model.eval()(**inputs(family, prompts(family, [9, 6]), "right"), **decoder(family), **kwargs).logits


def decoder(family):
    return {"decoder_input_ids": torch.tensor([[0, 5, 6]] * 2)} if family.task == "SEQ_2_SEQ_LM" else {}


def adapted(family, base=None, **kwargs):
    config = LoReftConfig(**{"task_type": family.task, "r": R, "positions": SPEC, **kwargs})
    return get_peft_model(family.build() if base is None else base, config)


def traces(model):
    """Return what an adapter may leave on a model: names, hooks, attributes."""
    return {
        name: (*(len(h) for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)), sorted(vars(m)))
        for name, m in model.named_modules()
    }, list(model.state_dict())


def assert_trains(model, family, heads=1):
    """Assert that one step moves every parameter of the adapter and of a classifier's head, and nothing else.

    Each of `heads` has an edit of its own; together they have the hidden size D.
    """
    model.train()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = {name: p for name, p in trainable.items() if "loreft_weights" in name}
    assert sum(p.numel() for p in own.values()) == LAYERS * (2 * R * D + heads * R)
    assert all(".modules_to_save." in name for name in set(trainable) - set(own))
    assert bool(set(trainable) - set(own)) == (family.task == "SEQ_CLS")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    model(**supervised(family)).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trainable)
    optimizer.step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == set(trainable)


@torch.no_grad()
def assert_generates_what_it_would_predict(model, family):
    """The logits of every step of `generate` are those of one forward over prompt and completion alone.

    The prompts differ in length and are padded on the left, where none of these families (experts and state-space
    models among them) minds; an encoder's on the right, as BART counts its positions from the left edge.
    """
    has_encoder, rows = model.config.is_encoder_decoder, prompts(family, [9, 6])
    out = model.generate(
        **inputs(family, rows, "right" if has_encoder else "left"),
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    for row, (prompt, sequence) in enumerate(zip(rows, out.sequences)):
        if has_encoder:
            alone = {**inputs(family, [prompt]), "decoder_input_ids": sequence[None, :-1]}
            expected = model(**alone).logits[0]
        else:
            alone = inputs(family, [torch.cat([prompt, sequence[-NEW:]])], images=slice(row, row + 1))
            labels = alone["input_ids"].clone()
            labels[:, : len(prompt)] = -100
            expected = model(**alone, labels=labels).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.stack(out.logits, 1)[row], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.cell("Families", "{family.name}")
def test_family(family, tmp_path):
    base = family.build()
    expected, clean = logits_of(base, family), traces(base)
    generates = base.can_generate()
    if generates:
        assert_generates_what_it_would_predict(base, family)  # else no adapter could
    model = adapted(family, base)
    edited = [name for name, _ in base.named_modules() if name.endswith(".loreft")]
    assert len(edited) == LAYERS and not any("vision" in name for name in edited)
    assert not base.config.is_encoder_decoder or all("encoder." in name for name in edited)
    assert_trains(model, family)

    randomise(model)
    logits = logits_of(model, family)
    assert (logits - expected).abs().max() > 1e-3, "nothing was edited"
    columns = torch.tensor([[0, 1, 7, 8], [0, 1, 4, 5]])  # of prompts of 9 and 6 tokens, an image's among them
    assert torch.equal(logits_of(model, family, intervention_positions=columns), logits)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, family), expected)
    if generates:
        assert_generates_what_it_would_predict(model, family)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family.build(), tmp_path)
    assert torch.equal(logits_of(loaded, family), logits)

    unloaded = model.unload()
    assert unloaded is base
    assert traces(base) == clean
    if family.task != "SEQ_CLS":  # whose head was trained along
        assert torch.equal(logits_of(base, family), expected)


@pytest.mark.parametrize("component", ["attention", "mlp", "heads"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.cell("Families", "{family.name}")
def test_components(family, component, record_property):
    if ("attention" if component == "heads" else component) in family.without:
        record_property("refused", f"`component={component!r}`: not every block has such a module by a known name")
        base = family.build()
        clean = traces(base)
        with pytest.raises(
            ValueError, match=f"component='{component}': .* has no module of that kind by a known name"
        ):
            adapted(family, base, component=component)
        assert traces(base) == clean
    else:
        assert_trains(adapted(family, component=component), family, heads=4 if component == "heads" else 1)


def test_vision_blocks_as_many_as_text_blocks():
    """InternVL3-1B has 24 of both."""
    vision = dict(LLAVA["vision_config"], num_hidden_layers=LAYERS)
    family = Family("Llava", dict(LLAVA, vision_config=vision), "LlavaForConditionalGeneration")
    model = adapted(family).get_base_model()
    edited = [name for name, _ in model.named_modules() if name.endswith(".loreft")]
    assert edited == [f"model.language_model.layers.{layer}.loreft" for layer in range(LAYERS)]


@pytest.mark.cell("Families", "ViT (every patch is a prompt's token, `f1` is CLS)")
def test_images(tmp_path):
    def base():
        torch.manual_seed(0)
        sizes = dict(VISION, num_hidden_layers=LAYERS, image_size=4, patch_size=2)
        return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)).eval()

    @torch.no_grad()
    def first_block(model, **kwargs):
        return model(pixel_values=pixels, output_hidden_states=True, **kwargs).hidden_states[1]

    pixels = torch.randn(2, 3, 4, 4)
    model = get_peft_model(base(), LoReftConfig(r=R, positions="f1+l2", modules_to_save=["classifier"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    model.train()(pixel_values=pixels, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == set(trainable)

    randomise(model.eval())
    edited = first_block(model)
    plain = first_block(base())
    assert (edited != plain).any(-1).nonzero()[:, 1].tolist() == [0, 3, 4] * 2
    given = torch.tensor([[0, 3, 4]] * 2)
    assert torch.equal(first_block(model.get_base_model(), intervention_positions=given), edited)
    with model.disable_adapter():
        assert torch.equal(first_block(model), plain)
    model.save_pretrained(tmp_path)
    assert torch.equal(first_block(PeftModel.from_pretrained(base(), tmp_path)), edited)
    assert torch.equal(first_block(model.unload()), plain)


def test_a_model_whose_hidden_states_are_no_rows_of_tokens_says_so():
    class Convolution(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = torch.nn.Conv2d(3, 8, 1)
            self.config = transformers.PretrainedConfig(hidden_size=8)

        def forward(self, pixel_values):
            return self.block(pixel_values)

    model = get_peft_model(Convolution(), LoReftConfig(r=R, target_modules=["block"]))
    with pytest.raises(ValueError, match=r"neither `input_ids` nor `inputs_embeds`.*\(2, 8, 4, 4\)"):
        model(pixel_values=torch.randn(2, 3, 4, 4))


SEQ2SEQ = [f for f in FAMILIES if f.task == "SEQ_2_SEQ_LM"]
DECODER = {"T5": r"decoder\.block\.\d+", "Bart": r"model\.decoder\.layers\.\d+"}


@pytest.mark.parametrize("spec", ["f1", "l1+g2", "g", "all"])
@pytest.mark.parametrize("family", SEQ2SEQ, ids=lambda family: family.name)
@pytest.mark.cell("Families", "{family.name}: decoder, by `target_modules`")
def test_decoder_on_request(family, spec, tmp_path):
    """A decoder's prompt is what it starts with, and its answer is what it generates."""
    model = adapted(family, positions=spec, target_modules=DECODER[family.name])
    edited = [name for name, _ in model.get_base_model().named_modules() if name.endswith(".loreft")]
    assert len(edited) == LAYERS and all("decoder." in name for name in edited)
    assert_trains(model, family)
    randomise(model)
    batch = inputs(family, prompts(family, [9, 6]), "right")
    settings = dict(max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True)
    for cache in (True, False):
        out = model.eval().generate(**batch, **settings, use_cache=cache)
        labels = torch.cat([out.sequences[:, 1:-1], out.sequences[:, -1:]], 1)
        with torch.no_grad():
            forced = model(**batch, decoder_input_ids=out.sequences[:, :-1], labels=labels).logits
            with model.disable_adapter():
                plain = model(**batch, decoder_input_ids=out.sequences[:, :-1]).logits
        torch.testing.assert_close(torch.stack(out.logits, 1), forced, atol=2e-5, rtol=1e-4)
        assert (forced - plain).abs().max() > 1e-3
    beams = model.generate(**batch, **settings | dict(output_logits=False, output_scores=True), num_beams=2)
    assert beams.sequences.shape == (2, NEW + 1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family.build(), tmp_path)
    assert torch.equal(loaded.generate(**batch, **settings).sequences, out.sequences)


@pytest.mark.parametrize("family", SEQ2SEQ, ids=lambda family: family.name)
def test_decoder_edits_tokens_before_and_after_the_first_label(family):
    """The decoder's input is the start token, then the labels one column later. Padding behind them is not edited."""
    model = adapted(family, positions="l1+g", target_modules=DECODER[family.name]).eval()
    randomise(model)
    labels = torch.tensor([[5, 6, 7, 8], [5, 6, -100, -100]])
    block = model.get_base_model().get_submodule(edited_blocks(model)[0])
    seen = {}
    block.register_forward_hook(lambda m, a, out: seen.update(after=out[0] if isinstance(out, tuple) else out))
    batch = inputs(family, prompts(family, [9, 6]), "right")
    with torch.no_grad():
        model(**batch, labels=labels)
        after = seen["after"].clone()
        with model.disable_adapter():
            model(**batch, labels=labels)
    changed = (after != seen["after"]).any(-1)
    assert changed.tolist() == [[True] * 4, [True, True, True, False]]


def edited_blocks(model):
    return [n.removesuffix(".loreft") for n, _ in model.get_base_model().named_modules() if n.endswith(".loreft")]


def test_decoder_without_labels_is_refused_in_training():
    family = SEQ2SEQ[0]
    batch = inputs(family, prompts(family, [9, 6]), "right") | decoder(family)
    model = adapted(family, positions="l1", target_modules=DECODER[family.name]).train()
    with pytest.raises(ValueError, match="cannot tell where the prompts end"):
        model(**batch)
    adapted(family, positions="f1", target_modules=DECODER[family.name]).train()(**batch)


@pytest.mark.parametrize("family", SEQ2SEQ, ids=lambda family: family.name)
def test_explicit_positions_reach_the_encoder_in_generate(family):
    model = adapted(family).eval()
    randomise(model)
    columns = torch.tensor([[2, -1], [0, 3]])

    def logits(**kwargs):
        batch = inputs(family, prompts(family, [9, 6]), "right")
        out = model.generate(**batch, **kwargs, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
        return out.logits[0]

    start = torch.full((2, 1), model.config.decoder_start_token_id)
    batch = inputs(family, prompts(family, [9, 6]), "right")
    expected = model(**batch, decoder_input_ids=start, intervention_positions=columns).logits[:, 0]
    assert (logits() - expected).abs().max() > 1e-3
    torch.testing.assert_close(logits(intervention_positions=columns), expected, atol=2e-5, rtol=1e-4)
