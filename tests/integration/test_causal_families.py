"""Every causal language model of transformers: right in `generate` and in a loop of one's own, or refused.

Right means: the logits of every step are those of one forward over prompt and answer, whose labels leave the prompt
out. The names of families are those of transformers' `AutoModelForCausalLM`, so that a new one is tried by itself.
"""

import copy
import inspect
from pathlib import Path

import pytest
import torch
from conftest import randomise
from peft import get_peft_model
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    FSMTConfig,
    FSMTForConditionalGeneration,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from peft_reft import LoReftConfig, LoReftRuntimeConfig

from .causal_families import NAMES, NOT_BUILT, SPECIAL, build

SPECS = ("f3+l2", "g2", "all")
NEW = 4
CACHES = ("past_key_values", "cache_params", "state")
ANSWERS = torch.tensor([[5, 17, 33, 8], [9, 11, 12, 40]])

QUICK = ("bloom", "gemma3_text", "gpt2", "jamba", "llama", "mamba", "minimax", "openai-gpt", "rwkv")
"""Families that are tried by default; the others are slow together."""

BATCH, ROW, NO_CACHE = "`generate`, padded on the left", "`generate`", "`generate(use_cache=False)`"
EMPTY, MADE = "a loop that begins with an empty cache", "a loop that begins without a cache"

CLOSE = 1e-3
"""How close logits must be, in their standard deviations. What an edit changes is above 20 times that."""

FROM_THE_LEFT = {BATCH: "positions count from the left edge, padding included"}
OVER_PADDING = {BATCH: "the state runs over padding"}
OWN_STATE = {EMPTY: "its state is made by the first forward"}
WITHOUT = {EMPTY: "it has no cache", MADE: "it has no cache"}
BASE_DIFFERS = {
    **dict.fromkeys(["bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart"], FROM_THE_LEFT),
    **dict.fromkeys(["mvp", "pegasus", "plbart", "trocr", "whisper"], FROM_THE_LEFT),
    "bamba": dict.fromkeys([EMPTY, MADE], "without `position_ids` it counts positions wrongly behind its cache"),
    "minimax": {EMPTY: "it takes a cache of its own class alone"} | OVER_PADDING,
    "openai-gpt": WITHOUT,
    "recurrent_gemma": dict.fromkeys([EMPTY, MADE], "it keeps its state in its blocks and returns no cache"),
    "rwkv": OVER_PADDING | OWN_STATE,
    "xlstm": OVER_PADDING | OWN_STATE,
}
"""Of each family, what the base model itself does not do, or not with the logits of one forward, and why."""

STREAMS = "its blocks return {} hidden states of each token"
REFUSED = {
    "blt": "its blocks read patches of several bytes",
    "cpmant": "it puts prompt tokens of its own before the text",
    "deepseek_v4": STREAMS.format(4),
    "gemma3n_text": STREAMS.format(4),
    "git": "it puts the image before the text",
    "hrm_text": "no list of modules has as many entries as the config has layers",
    "hy_v4": STREAMS.format(4),
    "prophetnet": "its blocks return several hidden states of each token",
    "qwen4_exp": STREAMS.format(4),
    "qwen4_exp_text": STREAMS.format(4),
    "reformer": "its blocks are reversible",
    "xlm": "more than one list of modules could be the blocks",
    "xlnet": r"its hidden states are of shape \(seq, batch, d\)",
}
"""Of each family, a part of the error at injection."""

NO_MODULE = "no module of that kind by a known name"
NO_PROJECTION = "no output projection by a known name"
NO_HEADS = {
    **{name: reason for name, reason in REFUSED.items() if not reason.startswith("its blocks return 4")},
    **dict.fromkeys(["bamba", "ctrl", "dbrx", "falcon_mamba", "granitemoehybrid", "jamba"], NO_MODULE),
    **dict.fromkeys(["lfm2_moe", "lfm3", "mamba", "mamba2", "nemotron_h", "olmo_hybrid"], NO_MODULE),
    **dict.fromkeys(["qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"], NO_MODULE),
    **dict.fromkeys(["qwen4_exp", "qwen4_exp_text", "xlstm", "zamba", "zamba2"], NO_MODULE),
    **dict.fromkeys(["deepseek_v4", "jetmoe", "longcat_flash", "recurrent_gemma", "rwkv"], NO_PROJECTION),
    "moshi": "a head's share of the input is not known",
}
"""The same with `component="heads"`."""


IN_ONE_PART = {
    "axk2",
    "bailing_hybrid",
    "bamba",
    "bart",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "camembert",
    "data2vec-text",
    "deepseek_v32",
    "dots3_note",
    "dots3_note_text",
    "falcon_h1",
    "falcon_mamba",
    "glm_moe_dsa",
    "granitemoehybrid",
    "inkling2_text",
    "inkling_text",
    "jamba",
    "kimi_linear",
    "lfm2_moe",
    "lfm3",
    "mamba",
    "mamba2",
    "marian",
    "mbart",
    "minimax",
    "moshi",
    "mvp",
    "nemotron_h",
    "olmo_hybrid",
    "openai-gpt",
    "pegasus",
    "plbart",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
    "recurrent_gemma",
    "roberta",
    "roberta-prelayernorm",
    "rwkv",
    "trocr",
    "whisper",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
    "zamba",
    "zamba2",
    "zaya",
}
"""Families that cannot be trained in two parts: their states are no keys and values, or their positions count from the
padding, or they return more than logits."""
NOT_TRAINED = {"xlstm": "its own backward raises"}


def test_the_tables_name_families_of_transformers():
    tables = {*NOT_BUILT, *SPECIAL, *BASE_DIFFERS, *REFUSED, *QUICK, *IN_ONE_PART, *NOT_TRAINED}
    assert tables <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


class NoCache(Exception):
    """The model returned no cache."""


def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 60, (length,), generator=generator) for length in (9, 6)]


def base_of(model) -> PreTrainedModel:
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def takes(model, name):
    return name in inspect.signature(type(base_of(model)).forward).parameters


@torch.no_grad()
def teacher_forced(model, prompt, answer, **kwargs):
    """Return the logits of the answer's tokens, from one forward over prompt and answer."""
    ids = torch.cat([prompt, answer])[None]
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    return model(input_ids=ids, labels=labels, **kwargs).logits[0, len(prompt) - 1 : -1]


def of_generate(model, prompt, answer):
    """Teacher-force with the positions and mask that `generate` gives; RoBERTa would find other positions."""
    length = len(prompt) + len(answer)
    given = {"attention_mask": torch.ones(1, length, dtype=torch.long), "position_ids": torch.arange(length)[None]}
    return teacher_forced(model, prompt, answer, **{name: each for name, each in given.items() if takes(model, name)})


def generated(model, rows, **kwargs):
    """Return each row's logits, from `generate` and from one forward."""
    width = max(map(len, rows))
    sides = [(width - len(row), 0) for row in rows]
    output = model.generate(
        input_ids=torch.stack([F.pad(row, side) for row, side in zip(rows, sides)]),
        attention_mask=torch.stack([F.pad(torch.ones_like(r), side) for r, side in zip(rows, sides)]),
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    for row, logits, sequence in zip(rows, torch.stack(output.logits, 1), output.sequences):
        yield logits, of_generate(model, row, sequence[-NEW:])


def looped(model, empty):
    """Return each row's logits, from a user's own loop and from one forward."""
    name = next((name for name in CACHES if takes(model, name)), None)
    if name is None:
        raise NoCache
    for prompt, answer in zip(prompts(), ANSWERS):
        given = {name: DynamicCache(config=base_of(model).config)} if empty else {}
        yield run(model, prompt, answer, **given)[0], teacher_forced(model, prompt, answer)


@torch.no_grad()
def run(model, prompt, answer, **given):
    """Feed the prompt, then one token at a time. Return the logits, and the cache with its name."""
    logits = []
    for piece in [prompt, *answer[:-1, None]] if len(prompt) else answer[:, None]:
        output = model(input_ids=piece[None], use_cache=True, **given)
        given = {name: cache for name in CACHES if (cache := getattr(output, name, None)) is not None}
        if not given:
            raise NoCache
        logits.append(output.logits[0, -1])
    return torch.stack(logits), given


WAYS = {
    BATCH: lambda model: generated(model, prompts()),
    ROW: lambda model: (pair for row in prompts() for pair in generated(model, [row])),
    NO_CACHE: lambda model: (pair for row in prompts() for pair in generated(model, [row], use_cache=False)),
    EMPTY: lambda model: looped(model, True),
    MADE: lambda model: looped(model, False),
}


def difference(model, way):
    """Return the largest difference of two logits, in standard deviations."""
    return max(float((got - expected).abs().max() / expected.std()) for got, expected in WAYS[way](model))


def is_right(model, way):
    try:
        return difference(model, way) < CLOSE
    except (AttributeError, NoCache, StopIteration, TypeError, ValueError):  # as transformers' classes fail
        return False


def adapted(base, spec, **fields):
    model = get_peft_model(base, LoReftConfig(task_type="CAUSAL_LM", r=4, positions=spec, **fields))
    randomise(model)
    return model.eval()


@pytest.mark.filterwarnings("ignore")  # of transformers', when models are built
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name) for name in NAMES]
)
@pytest.mark.cell("Causal language models", "{name}")
def test_family(name, record_property):
    base = build(name)
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]) as raised:
            adapted(base, "f3+l2")
        record_property("refused", str(raised.value))
        return
    differs = BASE_DIFFERS.get(name, {})
    for way, reason in differs.items():
        record_property("except", f"{way}: {reason}")
        assert not is_right(base, way), f"{way} is right now, and need not be listed"
    ways = [way for way in WAYS if way not in differs]
    wrong = [way for way in ways if not is_right(base, way)]
    assert not wrong, f"the base model differs in {wrong}"
    plain = teacher_forced(base, prompts()[0], ANSWERS[0])
    for spec in SPECS:
        model = adapted(base, spec)
        edit = (teacher_forced(model, prompts()[0], ANSWERS[0]) - plain).abs().max() / plain.std()
        assert edit > 20 * CLOSE, "an edit too small to see"
        wrong = {way: found for way in ways if not (found := difference(model, way)) < CLOSE}
        assert not wrong, f"positions={spec!r}: {wrong}"
        assert model.unload() is base


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "llama" else pytest.mark.slow) for name in NAMES]
)
@pytest.mark.cell("Causal language models: each attention head by itself", "{name}")
def test_heads(name, record_property):
    base = build(name)
    if name in NO_HEADS:
        with pytest.raises(ValueError, match=NO_HEADS[name]) as raised:
            adapted(base, "f3+l2", component="heads")
        record_property("refused", str(raised.value))
        return
    ways = [way for way in WAYS if way not in BASE_DIFFERS.get(name, {})]
    plain = teacher_forced(base, prompts()[0], ANSWERS[0])
    model = adapted(base, "f3+l2+g2", component="heads")
    edit = (teacher_forced(model, prompts()[0], ANSWERS[0]) - plain).abs().max() / plain.std()
    assert edit > 20 * CLOSE, "an edit too small to see"
    wrong = {way: found for way in ways if not (found := difference(model, way)) < CLOSE}
    assert not wrong, wrong
    assert model.unload() is base


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("component", ["attention", "mlp"])
@pytest.mark.parametrize("name", ["deepseek_v4", "gemma3n_text"])
def test_inside_blocks_that_return_several_hidden_states(name, component):
    base = build(name)
    edited = {"attention": "self_attn", "mlp": "mlp"}[component]
    with pytest.raises(
        ValueError, match=r"layers\.0 of .* 4 hidden states of each token \(.*=4 in the model's config"
    ):
        get_peft_model(base, LoReftConfig(r=4, target_modules=["layers.0"]))
    model = get_peft_model(base, LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f3+l2", component=component))
    assert {name.split(".")[-2] for name, _ in model.named_modules() if name.endswith(".loreft")} == {edited}
    plain = teacher_forced(model, prompts()[0], ANSWERS[0])
    randomise(model)
    assert (teacher_forced(model.eval(), prompts()[0], ANSWERS[0]) - plain).abs().max() > 20 * CLOSE * plain.std()
    assert all(is_right(model, way) for way in WAYS)


def test_hidden_states_with_the_tokens_first():
    """FSMT's edits would fall on other rows' tokens. Named modules are refused as well."""
    sizes = dict(langs=["en", "de"], src_vocab_size=64, tgt_vocab_size=64, d_model=32)
    layers = dict(encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16)
    base = FSMTForConditionalGeneration(FSMTConfig(**sizes, **layers))
    with pytest.raises(ValueError, match=r"its hidden states are of shape \(seq, batch, d\)"):
        get_peft_model(base, LoReftConfig(r=4, target_modules=["layers.0"]))


@torch.no_grad()
def test_a_token_that_generate_puts_behind_the_row():
    """XLM puts a mask token behind the row, which the attention mask does not cover."""
    base, prompt = build("xlm"), prompts()[0]
    modules = ["transformer.ffns.0", "transformer.ffns.1"]
    model = get_peft_model(base, LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f3+l2", target_modules=modules))
    randomise(model)
    output = model.eval().generate(
        input_ids=prompt[None], max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    for step, logits in enumerate(output.logits):
        row = F.pad(output.sequences[:, : len(prompt) + step], (0, 1), value=base.config.mask_token_id)
        columns = torch.tensor([[0, 1, 2, len(prompt) - 2, len(prompt) - 1]])
        given = dict(langs=torch.full_like(row, base.config.lang_id), intervention_positions=columns)
        assert_close(logits[0], model(input_ids=row, **given).logits[0, -1])


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, atol=CLOSE * float(expected.std()), rtol=0)


def model_and_prompt(name, spec):
    return adapted(build(name), spec), prompts()[0]


@torch.no_grad()
def after_the_prompt(model, prompt, answer, cache, **given):
    """Fill a cache with the prompt. Return the logits of a loop behind it, and those of one forward."""
    first = model(**(given or {"input_ids": prompt[None]}), past_key_values=cache, use_cache=True)
    rest = run(model, prompt[:0], answer[:-1], past_key_values=cache)[0]
    return torch.cat([first.logits[0, -1:], rest]), teacher_forced(model, prompt, answer)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["llama", "mamba", "minimax", "rwkv"])
def test_answers_that_share_a_copied_cache(name, spec):
    model, prompt = model_and_prompt(name, spec)
    _, cache = run(model, prompt, ANSWERS[0, :1])
    for answer in ANSWERS:
        logits, _ = run(model, prompt[:0], answer, **copy.deepcopy(cache))
        assert_close(logits[:-1], teacher_forced(model, prompt, answer)[1:])


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_a_loop_goes_on_from_the_cache_of_generate(name, spec):
    model, prompt = model_and_prompt(name, spec)
    output = model.generate(input_ids=prompt[None], max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    answer = torch.cat([output.sequences[0, len(prompt) :], ANSWERS[0]])
    key = next(key for key in CACHES if takes(model, key))
    logits, _ = run(model, prompt[:0], answer[NEW - 1 :], **{key: output.past_key_values})
    assert_close(logits[:-1], teacher_forced(model, prompt, answer)[NEW:])


@pytest.mark.parametrize("spec", SPECS)
def test_other_caches_and_beginnings(spec):
    model, prompt = model_and_prompt("llama", spec)
    config, answer = base_of(model).config, ANSWERS[0]
    assert_close(*after_the_prompt(model, prompt, answer, StaticCache(config=config, max_cache_len=32)))
    embeds = base_of(model).get_input_embeddings()(prompt[None])
    assert_close(*after_the_prompt(model, prompt, answer, DynamicCache(config=config), inputs_embeds=embeds))

    cache = DynamicCache(config=config)
    after_the_prompt(model, prompt, answer, cache)
    cache.crop(1 - NEW)  # back to the prompt
    logits, _ = run(model, prompt[:0], ANSWERS[1], past_key_values=cache)
    assert_close(logits[:-1], teacher_forced(model, prompt, ANSWERS[1])[1:])


@pytest.mark.parametrize("spec, of_prompt, of_answer", [("f3+l2", [0, 1, 2, 7, 8], None), ("g2", None, 2)])
@torch.no_grad()
def test_a_quantised_cache(spec, of_prompt, of_answer):
    """Its keys are rounded, so its logits are compared with those for given positions."""
    model, prompt = model_and_prompt("llama", spec)

    def loop(given):
        config = base_of(model).config
        sizes = dict(nbits=4, axis_key=0, axis_value=0, q_group_size=16, residual_length=4)
        cache, logits = QuantizedCache("quanto", config, **sizes), []
        for step, piece in enumerate([prompt, *ANSWERS[0, :, None]]):
            columns = [[-1] * (5 if of_prompt else 2)]
            if step == 0 and of_prompt:
                columns = [of_prompt]
            elif of_answer and 0 < step <= of_answer:
                columns[0][step - 1] = 0
            positions = {"intervention_positions": torch.tensor(columns)} if given else {}
            logits.append(model(input_ids=piece[None], past_key_values=cache, **positions).logits[0, -1])
        return torch.stack(logits)

    assert_close(loop(given=False), loop(given=True))


@pytest.mark.parametrize("name", ["mamba", "rwkv"])
def test_guidance_without_a_cache_that_transformers_hands_on(name):
    model, prompt = model_and_prompt(name, "g2")
    negative = dict(negative_prompt_ids=ANSWERS[:1], negative_prompt_attention_mask=torch.ones_like(ANSWERS[:1]))
    settings = dict(guidance_scale=1.5, max_new_tokens=NEW, do_sample=False, **negative)
    with pytest.raises(ValueError, match="Pass use_cache=False"):
        model.generate(input_ids=prompt[None], **settings)
    output = model.generate(
        input_ids=prompt[None],
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    answer = output.sequences[0, len(prompt) :]
    wanted, unwanted = (teacher_forced(model, each, answer).log_softmax(-1) for each in (prompt, ANSWERS[0]))
    assert_close(torch.stack(output.scores, 1)[0], 1.5 * (wanted - unwanted) + unwanted)


TRAINED = [name for name in NAMES if name not in {*NOT_BUILT, *REFUSED, *NOT_TRAINED}]


def test_the_page_says_how_many_can_be_trained_in_two_parts():
    page = (Path(__file__).parents[2] / "docs" / "untouched.md").read_text(encoding="utf-8")
    text = " ".join(page.split())
    passed = len(TRAINED) - len(IN_ONE_PART)
    assert f"Of {len(TRAINED)} families of `AutoModelForCausalLM`, built tiny, {passed} pass the trial" in text


def rows_to_train(side):
    ids = torch.randint(3, 60, (3, 30), generator=torch.Generator().manual_seed(0))
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row, (prompt, stop) in enumerate([(20, 28), (12, 23), (16, 30)]):
        labels[row, :prompt] = labels[row, stop:] = -100
        mask[row, stop:] = 0
    made = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if side == "left":
        for row, stop in enumerate([28, 23, 30]):
            for tensor in made.values():
                tensor[row] = tensor[row].roll(30 - stop)
    return made


def without_dropout(model):
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def train_in(mode, name, inputs):
    """The loss, and the gradients, of one step."""
    runtime = LoReftRuntimeConfig(untouched_prompt=mode)
    config = LoReftConfig(task_type="CAUSAL_LM", r=4, positions="l3", runtime_config=runtime)
    torch.manual_seed(0)
    model = get_peft_model(without_dropout(build(name)), config).train()
    randomise(model)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TRAINED]
)
def test_training_in_two_parts(name):
    """Either both parts give the loss and the gradients of one, or the trial refuses."""
    for side in ("right", "left"):
        inputs = rows_to_train(side)
        if name in IN_ONE_PART:
            with pytest.raises(ValueError, match=r"cannot go on from keys and values \(.+\)"):
                train_in("on", name, inputs)
            continue
        loss, gradients = train_in("on", name, inputs)
        expected_loss, expected = train_in("off", name, inputs)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-5)
        assert gradients.keys() == expected.keys() and gradients
        for key, gradient in expected.items():
            torch.testing.assert_close(
                gradients[key], gradient, rtol=1e-2, atol=2e-3 * float(gradient.abs().max()), msg=key
            )
