"""The invariant: what is edited in training on prompt + completion is what is edited when generating it."""

import pytest
import torch
from conftest import VOCAB, build, randomise
from peft import get_peft_model
from transformers import DynamicCache

from peft_reft import LoReftConfig, prompt_lengths
from peft_reft.tuner.forward import ATTRIBUTE, current, current_generation

LENGTHS = [11, 3, 14, 6]
NEW = 6
FAMILIES = ["llama", "gpt2", "gemma3"]
SPECS = ["f3+l2", "l1", "f1+l2~1", "p", "g2", "f2+g", "all", {"0": "f2", "1-": "l3"}, {"0-1": "p", "2": "g3"}]

pytestmark = pytest.mark.filterwarnings(
    # transformers, about options that a test combines on purpose
    "ignore:The attention mask and the pad token id were not set:UserWarning",
)


def prompts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 64, (length,), generator=generator) for length in lengths]


def left_padded(rows):
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.zeros(width - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    return {"input_ids": ids, "attention_mask": mask}


def adapted(family, spec, **kwargs):
    tie = "model" if isinstance(spec, dict) else "layer"
    config = LoReftConfig(task_type="CAUSAL_LM", r=4, positions=spec, tie=tie, **kwargs)
    model = get_peft_model(build(family), config).eval()
    randomise(model)
    return model


@torch.no_grad()
def teacher_forced(model, prompt, completion):
    """Return the logits of each completion token, from one forward over prompt + completion, alone in its batch."""
    ids = torch.cat([prompt, completion]).unsqueeze(0)
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    logits = model(input_ids=ids, labels=labels).logits[0]
    return logits[len(prompt) - 1 : -1]


def assert_same(model, out, rows, copies=1, width=None):
    """Assert that the logits of every step equal the teacher-forced ones, in every row."""
    width = max(map(len, rows)) if width is None else width
    step_logits = torch.stack(out.logits, 1)
    for row in range(len(rows) * copies):
        prompt = rows[row // copies]
        completion = out.sequences[row, width:]
        expected = teacher_forced(model, prompt, completion)
        torch.testing.assert_close(step_logits[row], expected, atol=2e-5, rtol=1e-4)


def run(model, inputs, **kwargs):
    return model.generate(
        **inputs, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True, pad_token_id=0, **kwargs
    )


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.cell("Generation", "left-padded batches")
def test_rows_of_mixed_lengths_equal_teacher_forcing(family, spec):
    model, rows = adapted(family, spec), prompts()
    out = run(model, left_padded(rows), do_sample=False)
    assert_same(model, out, rows)
    with model.disable_adapter():
        base = run(model, left_padded(rows), do_sample=False)
    assert (torch.stack(base.logits) - torch.stack(out.logits)).abs().max() > 1e-2, "nothing was edited"


@pytest.mark.parametrize(
    "tie, spec",
    [("group", "f3+l2"), ("group", "f2+g"), ("group", "f1+l2+g2"), ("position", "f3+l2"), ("position", "l2+g2")],
)
def test_untied_weights(tie, spec):
    """Each group, or each position, has its own edit, the same as in training, also for short prompts."""
    config = LoReftConfig(task_type="CAUSAL_LM", r=4, positions=spec, tie=tie)
    model = get_peft_model(build("llama"), config).eval()
    randomise(model)
    rows = prompts()
    assert_same(model, run(model, left_padded(rows), do_sample=False, prefill_chunk_size=5), rows)


@pytest.mark.parametrize("spec", ["f3+l2", "f2+g", "all"])
@pytest.mark.parametrize(
    "formula",
    [dict(intervention="red", r=8), dict(gate=True), dict(act_fn="tanh"), dict(r={"0": 1, "1-": 6})],
    ids=str,
)
def test_every_formula_equals_teacher_forcing(formula, spec):
    """An edit is the same in place without gradients, in a decoding step, and with gradients."""
    model = get_peft_model(
        build("llama"), LoReftConfig(task_type="CAUSAL_LM", **{"r": 4, "positions": spec, **formula})
    )
    randomise(model.eval())
    rows = prompts()
    assert_same(model, run(model, left_padded(rows), do_sample=False), rows)


@pytest.mark.parametrize("spec", ["f3+l2", "f2+g", "g2"])
@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 13},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.cell("Generation", "no cache, static cache, chunked prefill, `num_return_sequences`")
def test_ways_of_decoding(family, options, spec):
    model, rows = adapted(family, spec), prompts()
    out = run(model, left_padded(rows), **{"do_sample": False, **options})
    assert_same(model, out, rows, copies=options.get("num_return_sequences", 1))


@pytest.mark.parametrize("spec", ["f3+l2", "all", "g2"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.cell("Generation", "beams")
def test_beams_equal_teacher_forcing(family, spec):
    model, rows = adapted(family, spec), prompts()
    out = model.generate(
        **left_padded(rows),
        max_new_tokens=NEW,
        num_beams=3,
        num_return_sequences=2,
        length_penalty=0.0,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=0,
    )
    width = max(LENGTHS)
    for row, sequence in enumerate(out.sequences):
        completion = sequence[width:]
        logits = teacher_forced(model, rows[row // 2], completion)
        expected = logits.log_softmax(-1).gather(1, completion.unsqueeze(1)).sum()
        torch.testing.assert_close(out.sequences_scores[row], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", ["f3+l2", "g2", "all"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.cell("Generation", "assisted decoding")
def test_assisted_decoding_writes_what_greedy_decoding_writes(family, spec):
    """Speculative decoding checks several candidates in one forward and takes rejected ones back."""
    model, row = adapted(family, spec), prompts([11])
    inputs = left_padded(row)
    greedy = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
    draft = build(family, seed=7)  # another model, so that many candidates are rejected
    assisted = model.generate(**inputs, max_new_tokens=12, do_sample=False, assistant_model=draft, pad_token_id=0)
    assert assisted.tolist() == greedy.tolist()
    same = build(family)  # the base: other candidates are accepted
    assisted = model.generate(**inputs, max_new_tokens=12, do_sample=False, assistant_model=same, pad_token_id=0)
    assert assisted.tolist() == greedy.tolist()


@pytest.mark.parametrize("spec", ["f3+l2", "g2"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.cell("Generation", "prompt lookup")
def test_prompt_lookup_writes_what_greedy_decoding_writes(family, spec):
    model, row = adapted(family, spec), [prompts([6])[0].repeat(3)]  # repeats, so that there is something to look up
    inputs = left_padded(row)
    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=VOCAB)  # a token there is not
    greedy = model.generate(**inputs, **settings)
    lookup = model.generate(**inputs, **settings, prompt_lookup_num_tokens=3)
    assert lookup.tolist() == greedy.tolist()


@pytest.mark.parametrize("spec", ["f3+l2", "f2+g"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.cell("Generation", "`inputs_embeds`")
def test_embeddings_equal_token_ids(family, spec):
    model, rows = adapted(family, spec), prompts()
    inputs = left_padded(rows)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    out = run(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}, do_sample=False)
    assert_same(model, out, rows, width=0)


def test_no_mask_means_padding_is_inferred_as_transformers_does():
    model, rows = adapted("llama", "f3+l2"), prompts()
    inputs = left_padded(rows)
    model.generation_config.eos_token_id = 2
    with_mask = run(model, inputs, do_sample=False)
    without = run(model, {"input_ids": inputs["input_ids"]}, do_sample=False)
    assert torch.equal(torch.stack(with_mask.logits), torch.stack(without.logits))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_batch_mates_do_not_matter_in_training(family, spec, padding):
    model = adapted(family, spec)
    rows, answers = prompts(), prompts([4, 7, 1, 5])
    width = max(len(a) + len(b) for a, b in zip(rows, answers))
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for prompt, answer in zip(rows, answers):
        ids = torch.cat([prompt, answer])
        pad = width - len(ids)
        sides = (pad, 0) if padding == "left" else (0, pad)
        labels = torch.cat([torch.full_like(prompt, -100), answer])
        for name, values, value in (
            ("input_ids", ids, 0),
            ("labels", labels, -100),
            ("attention_mask", torch.ones_like(ids), 0),
        ):
            batch[name].append(torch.nn.functional.pad(values, sides, value=value))
    batch = {name: torch.stack(values) for name, values in batch.items()}
    position_ids = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(**batch, position_ids=position_ids).logits
    for row, (prompt, answer) in enumerate(zip(rows, answers)):
        supervised = batch["labels"][row] != -100
        before = supervised.roll(-1)  # the token before each supervised one predicts it
        expected = teacher_forced(model, prompt, answer)
        torch.testing.assert_close(logits[row][before], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("spec", ["f3+l2", "p", "g2", "all"])
@pytest.mark.cell("Generation", "packed rows, teacher-forced")
def test_packed_rows_have_a_prompt_for_each_document(spec):
    model = adapted("llama", spec)
    rows, answers = prompts(), prompts([4, 7, 1, 5])
    documents = [torch.cat(pair) for pair in zip(rows, answers)]
    labels = [torch.cat([torch.full_like(p, -100), a]) for p, a in zip(rows, answers)]
    position_ids = torch.cat([torch.arange(len(document)) for document in documents])
    with torch.no_grad():
        logits = model(
            input_ids=torch.cat(documents)[None],
            labels=torch.cat(labels)[None],
            position_ids=position_ids[None],
            use_cache=False,
        ).logits[0]
    start = 0
    for prompt, answer in zip(rows, answers):
        at = start + len(prompt) - 1
        torch.testing.assert_close(
            logits[at : at + len(answer)], teacher_forced(model, prompt, answer), atol=2e-5, rtol=1e-4
        )
        start += len(prompt) + len(answer)


def test_explicit_positions_in_generate_are_used_as_they_stand():
    model, rows = adapted("llama", "f3+l2"), prompts()
    inputs = left_padded(rows)
    width = inputs["input_ids"].shape[1]
    starts = width - inputs["attention_mask"].sum(1, keepdim=True)
    derived = torch.cat([starts + torch.arange(3), torch.full((4, 2), width - 2) + torch.arange(2)], 1)
    derived[1] = torch.tensor([width - 3, -1, -1, width - 2, width - 1])  # 3 tokens: f 1, l 2
    expected = run(model, inputs, do_sample=False)
    given = run(model, inputs, do_sample=False, intervention_positions=derived, prefill_chunk_size=5)
    torch.testing.assert_close(torch.stack(given.logits), torch.stack(expected.logits), atol=2e-5, rtol=1e-4)
    other = run(model, inputs, do_sample=False, intervention_positions=starts)
    assert (torch.stack(other.logits) - torch.stack(expected.logits)).abs().max() > 1e-2


@pytest.mark.cell("Generation", "a decoding loop of your own")
def test_decoding_a_token_at_a_time_by_hand():
    model, prompt = adapted("llama", "f3+l2"), prompts([9])[0]
    completion = prompts([4])[0]
    with torch.no_grad():
        out = model(input_ids=prompt[None], use_cache=True)
        logits = [out.logits[0, -1]]
        for token in completion[:-1]:
            out = model(input_ids=token[None, None], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0, -1])
    torch.testing.assert_close(torch.stack(logits), teacher_forced(model, prompt, completion), atol=2e-5, rtol=1e-4)


@pytest.mark.cell(
    "Generation",
    "a decoding loop of your own with `gN`",
    refused="a forward behind a cache does not say how long the prompt was",
)
def test_counted_generated_tokens_need_to_know_where_the_prompt_ended():
    """A cache knows what it holds. A new cache made of another's tensors does not."""
    model, prompt = adapted("llama", "g2"), prompts([9])[0]
    out = model(input_ids=prompt[None], use_cache=True)
    anew = DynamicCache([(layer.keys, layer.values) for layer in out.past_key_values.layers])
    with pytest.raises(ValueError, match="how long the prompt was"):
        model(input_ids=prompt[None, :1], past_key_values=anew)


def test_continuing_from_a_filled_cache():
    """A cache that was filled with part of a prompt, as if it were the whole, has edits too many."""
    model = adapted("llama", "l2")
    first, second = prompts([9, 5])
    whole = torch.cat([first, second])[None]
    with torch.no_grad():
        cache = model(input_ids=first[None], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="The cache holds edits that this prompt does not have"):
            run(model, {"input_ids": whole, "past_key_values": cache}, do_sample=False)
        with prompt_lengths([14]):
            cache = model(input_ids=first[None], use_cache=True).past_key_values
        logits = run(model, {"input_ids": whole, "past_key_values": cache}, do_sample=False).logits[0]
        expected = run(model, {"input_ids": whole}, do_sample=False).logits[0]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


def test_generate_leaves_nothing_behind():
    model, rows = adapted("llama", "f3+l2"), prompts()
    run(model, left_padded(rows), do_sample=False)
    attachment = model.get_base_model().__dict__[ATTRIBUTE]
    assert current(attachment) is None and current_generation(attachment) is None
    with pytest.raises(RuntimeError):
        model.generate(**left_padded(rows), stopping_criteria=[_Stop()], max_new_tokens=3, pad_token_id=0)
    assert current(attachment) is None and current_generation(attachment) is None


class _Stop:
    def __call__(self, *args, **kwargs):
        raise RuntimeError
