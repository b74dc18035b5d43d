"""Caches in a user's own loop and from turn to turn: the logits equal those of one forward over the document."""

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from conftest import build, randomise
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, StaticCache

import peft_reft
from peft_reft import LoReftConfig

USER, TOOL, ASSISTANT = [60, 61], [60, 63], [60, 62]
MARKS = dict(response_template=[ASSISTANT], instruction_template=[USER, TOOL])
SPECS = ["f2+l2", "f3", "l1", "l3~1", "p", "g", "g2", "f2+l2+g3", "p+g2", "all"]
ATOL = 2e-5

#            0   1         6   7                      12              16            19  20
CHAT = [
    1,
    *USER,
    5,
    6,
    7,
    *ASSISTANT,
    8,
    9,
    10,
    11,
    *USER,
    12,
    13,
    *ASSISTANT,
    14,
    15,
    16,
    *TOOL,
    17,
    *ASSISTANT,
    18,
    19,
]
ENDS = [(8, 12), (18, 21), (26, 28)]  # its answers


def adapted(spec, family="llama", tie="layer", **fields):
    config = LoReftConfig(task_type="CAUSAL_LM", r=4, positions=spec, tie=tie, **fields)
    model = get_peft_model(build(family), config)
    randomise(model)
    return model.eval()


def lora():
    model = get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.eval()


def log_probs(logits):
    return logits.float().log_softmax(-1)


@torch.no_grad()
def at_once(model, ids, **given):
    """Return log-probabilities (batch, seq, vocabulary) of one forward, which every other way must equal."""
    return log_probs(model(input_ids=torch.as_tensor(ids), use_cache=False, **given).logits)


def with_prompt_of(length, ids):
    """Return labels that say how long the prompt is, the same in all rows."""
    return dict(labels=torch.tensor(ids).masked_fill(torch.arange(len(ids[0])) < length, -100))


@torch.no_grad()
def in_pieces(model, ids, cuts, cache=None, mask=None):
    """Feed `ids` (batch, seq) cut at those columns. Return the log-probabilities of all columns, and the cache."""
    ids, found = torch.as_tensor(ids), []
    bounds = [0, *cuts, ids.shape[1]]
    for start, stop in pairwise(bounds):
        given = {} if mask is None else {"attention_mask": mask[:, :stop]}
        output = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, **given)
        cache = output.past_key_values
        found.append(log_probs(output.logits))
    return torch.cat(found, 1), cache


def empty_cache(kind, model, rows=1):
    config = model.get_base_model().config
    if kind == "none":
        return None
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=48)


def said(caught):
    return [str(warning.message) for warning in caught if "LoReFT" in str(warning.message)]


def close(found, expected):
    assert found.shape == expected.shape
    difference = (found - expected).abs().max().item()
    assert difference < ATOL, difference


# A prompt, then a token at a time


@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_loop_of_ones_own(kind, spec):
    """One forward takes the prompt, with an empty cache of any class; others take the answer. There are no marks."""
    model, ids = adapted(spec), [[3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 18, 19, 20, 21, 22]]
    expected = at_once(model, ids, **with_prompt_of(6, ids))
    found, _ = in_pieces(model, ids, [6, 7, 8, 9], empty_cache(kind, model))
    close(found, expected)
    with model.disable_adapter():
        assert (at_once(model, ids) - expected).abs().max() > 0.01, "the edits are there to be compared"


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("spec", SPECS)
def test_with_padding_on_the_left(kind, spec):
    model = adapted(spec)
    ids = [[0, 0, 0, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 18, 19, 20, 21, 22]]
    mask = (torch.tensor(ids) != 0).long()
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)
    labels = with_prompt_of(6, ids)
    expected = at_once(model, ids, attention_mask=mask, position_ids=position_ids, **labels)
    found, cache = [], empty_cache(kind, model)
    with torch.no_grad():
        for start, stop in [(0, 6), (6, 7), (7, 8), (8, 10)] if spec in ("f3", "all") else [(0, 6), (6, 7), (7, 8)]:
            output = model(
                input_ids=torch.tensor(ids)[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=position_ids[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            found.append(log_probs(output.logits))
    real = mask[:, : sum(piece.shape[1] for piece in found)] > 0
    close(torch.cat(found, 1)[real], expected[:, : real.shape[1]][real])


@pytest.mark.parametrize("spec", ["g2", "f2+l2+g3", "p+g1"])
def test_generated_tokens_are_counted_in_a_loop_of_ones_own(spec):
    """Edits stop after N tokens, as `gN` says and `generate` does; what follows is the base's."""
    model, prompt = adapted(spec), torch.tensor([[3, 4, 5, 6, 7, 8]])
    written = model.generate(
        prompt, max_new_tokens=7, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    found, _ = in_pieces(model, written.sequences, range(6, 13))
    close(found[:, 5:-1], log_probs(torch.stack(written.logits, 1)))


@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
@pytest.mark.parametrize("cuts", [[6], [2], [5, 8]])
def test_lora_needs_no_care(kind, cuts):
    """The control: LoRA passes what this file asks of LoReFT."""
    model = lora()
    found, _ = in_pieces(model, [CHAT], cuts, empty_cache(kind, model))
    close(found, at_once(model, [CHAT]))


# In pieces, with the marks of the chat template


def splits(spec):
    """Return columns at which a chat may be cut: not inside a header, nor among the last tokens of a prompt."""
    suffix = {"f2+l2": 2, "l1": 1, "l3~1": 4, "f2+l2+g3": 2}.get(spec, 0)
    inside = {first + 1 for first in range(len(CHAT)) if CHAT[first : first + 2] in (USER, TOOL, ASSISTANT)}
    among = {column for start, _ in ENDS for column in range(start - suffix + 1, start)}
    return [column for column in range(1, len(CHAT)) if column not in inside | among]


@pytest.mark.parametrize("kind", ["none", "static"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_chat_cut_anywhere(kind, spec):
    model = adapted(spec, **MARKS)
    expected, free = at_once(model, [CHAT]), splits(spec)
    behind = [column for column in free if column >= ENDS[0][0]]  # a piece without any header is a plain forward
    ways = [[column] for column in behind] + [behind[::3], behind[1::4], behind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cuts in ways:
            found, _ = in_pieces(model, [CHAT], cuts, empty_cache(kind, model))
            close(found, expected)


@pytest.mark.parametrize("spec", SPECS)
def test_a_first_piece_without_a_header(spec):
    """It is taken for a prompt, and a warning says so. If a later piece proves that wrong, that piece is refused."""
    model = adapted(spec, **MARKS)
    expected = at_once(model, [CHAT])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found, _ = in_pieces(model, [CHAT], [4, 8, 12])
        except ValueError as error:
            assert "The cache holds edits" in str(error)
            assert "l" in spec and spec != "all"
        else:
            assert "l" not in spec or spec == "all"
            close(found, expected)
    assert bool(said(caught)) == (spec not in ("all", "f3"))


@pytest.mark.parametrize("marks", [{}, MARKS], ids=["no marks", "marks"])
def test_all_of_it_is_edited_however_it_is_cut(marks):
    """`all` need not know which of the tokens are prompt."""
    model = adapted("all", **marks)
    expected = at_once(model, [CHAT])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cuts in ([4], [1, 2, 3, 4], range(1, len(CHAT)), [13, 14, 17]):
            close(in_pieces(model, [CHAT], cuts)[0], expected)


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "mistral"])
@pytest.mark.parametrize("spec", ["f2+l2", "p", "g2", "all"])
def test_caches_of_other_families_equal_one_forward(family, spec):
    model = adapted(spec, family, **MARKS)
    found, _ = in_pieces(model, [CHAT], [8, 9, 10, 12, 18, 21, 26])
    close(found, at_once(model, [CHAT]))


@pytest.mark.parametrize("tie", ["group", "model"])
@pytest.mark.parametrize("spec", ["f2+l2", "p+g", "f2+l2+g3"])
def test_other_ties_in_pieces_equal_one_forward(tie, spec):
    model = adapted(spec, tie=tie, **MARKS)
    found, _ = in_pieces(model, [CHAT], [8, 9, 12, 18, 26])
    close(found, at_once(model, [CHAT]))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "l3~1"])
def test_rows_of_several_chats(spec):
    """Each row has its own turns, padding on the left, and an answer where the other has its prompt."""
    short = [1, *USER, 5, *ASSISTANT, 8, 9, *USER, 12, 13, 14, 15, 16, *ASSISTANT, 17, 18, 20, 21]
    rows = torch.tensor([CHAT, [0] * (len(CHAT) - len(short)) + short])
    mask = (rows != 0).long()
    model = adapted(spec, **MARKS)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found, cache = [], None
    with torch.no_grad():
        expected = log_probs(model(input_ids=rows, attention_mask=mask, position_ids=positions).logits)
        for start, stop in [(0, 14), (14, 15), (15, 20), (20, 26), (26, 27), (27, 28)]:
            output = model(
                input_ids=rows[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            found.append(log_probs(output.logits))
            cache = output.past_key_values
    close(torch.cat(found, 1)[mask > 0], expected[mask > 0])


# From turn to turn


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("spec", SPECS)
def test_the_next_turn_with_the_cache_of_the_last(kind, spec):
    """`generate`, the user's next message behind what it wrote, `generate` again: one forward over all of it."""
    model = adapted(spec, **MARKS)
    ids, cache, logits = torch.tensor([CHAT[:8]]), empty_cache(kind, model), []
    for new in ([*USER, 12, 13, *ASSISTANT], [*TOOL, 17, *ASSISTANT, 18], []):
        out = model.generate(
            ids,
            past_key_values=cache,
            max_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        cache = out.past_key_values
        logits.append((ids.shape[1], log_probs(torch.stack(out.logits, 1))))
        ids = torch.cat([out.sequences, torch.tensor([new], dtype=torch.long)], 1)
    expected = at_once(model, ids)
    for start, found in logits:
        close(found, expected[:, start - 1 : start + 2])


@pytest.mark.parametrize("spec", SPECS)
def test_a_loop_of_ones_own_behind_generate(spec):
    model = adapted(spec, **MARKS)
    out = model.generate(torch.tensor([CHAT[:8]]), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([out.sequences, torch.tensor([[*USER, 12, 13, *ASSISTANT, 14, 15]])], 1)
    held = out.past_key_values.get_seq_length()
    with torch.no_grad():
        found = model(input_ids=ids[:, held:], past_key_values=out.past_key_values, use_cache=True).logits
    close(log_probs(found), at_once(model, ids)[:, held:])


@pytest.mark.parametrize("spec", SPECS)
def test_generate_behind_a_loop_of_ones_own(spec):
    model = adapted(spec, **MARKS)
    _, cache = in_pieces(model, [CHAT[:12]], [8, 9])
    ids = torch.tensor([CHAT[:18]])
    given = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
    kept = model.generate(ids, past_key_values=cache, **given)
    close(log_probs(torch.stack(kept.logits)), log_probs(torch.stack(model.generate(ids, **given).logits)))


@pytest.mark.parametrize("kept", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("spec", ["f2+l2", "l3~1", "p", "g2", "all"])
def test_a_prompt_in_chunks(spec, masked, kept):
    """`prefill_chunk_size` cuts a prompt, at a document's beginning or behind a history that a cache holds."""
    model, ids = adapted(spec, **MARKS), torch.tensor([CHAT[:18]])
    options = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
    expected = model.generate(ids, **options)
    given = {"attention_mask": torch.ones_like(ids)} if masked else {}
    for size in (1, 4, 6):
        cache = in_pieces(model, [CHAT[:12]], [8])[1] if kept else None
        out = model.generate(ids, past_key_values=cache, prefill_chunk_size=size, **given, **options)
        close(log_probs(torch.stack(out.logits)), log_probs(torch.stack(expected.logits)))


@pytest.mark.parametrize("spec", SPECS)
def test_prompt_lookup_then_the_next_turn(spec):
    """Prompt lookup crops its cache when candidates are refused."""
    model = adapted(spec, **MARKS)
    options = dict(max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)
    first = model.generate(torch.tensor([[*CHAT[:8]]]), prompt_lookup_num_tokens=2, **options)
    ids = torch.cat([first.sequences, torch.tensor([[*USER, 20, *ASSISTANT]])], 1)
    kept = model.generate(ids, past_key_values=first.past_key_values, **options)
    close(log_probs(torch.stack(kept.logits)), log_probs(torch.stack(model.generate(ids, **options).logits)))


@pytest.mark.parametrize("spec", SPECS)
def test_a_row_that_ended_early(spec):
    """The next turn masks what `generate` wrote behind a row's end. The row equals itself generated alone."""
    model = adapted(spec, **MARKS)
    rows = torch.tensor([CHAT[:8], [*CHAT[:3], 25, *CHAT[4:8]]])
    options = dict(max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    first = model.generate(rows, **options)
    new = torch.tensor([[*USER, 20, *ASSISTANT]] * 2)
    ids = torch.cat([first.sequences, new], 1)
    mask = torch.ones_like(ids)
    mask[1, 10:12] = 0
    kept = model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **options)
    for number in range(2):
        alone = model.generate(ids[number : number + 1, mask[number] > 0], **options)
        close(log_probs(torch.stack(kept.logits))[:, number], log_probs(torch.stack(alone.logits))[:, 0])


@pytest.mark.parametrize("spec", SPECS)
def test_beams_behind_a_cache(spec):
    """A cache holds the history for two beams."""
    model, ids = adapted(spec, **MARKS), torch.tensor([CHAT[:18]])
    options = dict(max_new_tokens=3, num_beams=2, do_sample=False, return_dict_in_generate=True, output_logits=True)
    _, cache = in_pieces(model, [CHAT[:12]], [8])
    cache.batch_repeat_interleave(2)
    kept = model.generate(ids, past_key_values=cache, **options)
    close(log_probs(torch.stack(kept.logits)), log_probs(torch.stack(model.generate(ids, **options).logits)))


@pytest.mark.parametrize("spec", SPECS)
def test_training_behind_a_kept_history(spec):
    """Labels come with a new turn; a cache holds its history."""
    model, ids = adapted(spec, **MARKS), torch.tensor([CHAT[:21]])
    expected = at_once(model, ids)
    _, cache = in_pieces(model, [CHAT[:12]], [8])
    labels = ids[:, 12:].masked_fill(torch.arange(9) < 6, -100)
    out = model.train()(input_ids=ids[:, 12:], labels=labels, past_key_values=cache, use_cache=True)
    close(log_probs(out.logits.detach()), expected[:, 12:])


def test_a_static_cache_that_is_emptied_and_used_again():
    model = adapted("f2+l2+g3", **MARKS)
    cache = empty_cache("static", model)
    in_pieces(model, [CHAT[:12]], [8], cache)
    cache.reset()
    ids = [[1, *USER, 30, 31, *ASSISTANT, 33, 34, *USER, 5, *ASSISTANT]]
    close(in_pieces(model, ids, [7, 8, 9], cache)[0], at_once(model, ids))


def test_without_marks_the_next_turn_is_refused_if_the_cache_does_not_fit():
    """The suffix that the first call edited is history for the second."""
    given = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    for spec in ("f2+l2", "l1", "p", "g", "g2"):
        model = adapted(spec)
        first = model.generate(torch.tensor([[3, 4, 5, 6, 7, 8]]), **given)
        more = torch.cat([first.sequences, torch.tensor([[9, 10, 11]])], 1)
        with pytest.raises(
            ValueError, match=rf"cache holds.*positions='{spec}'.*`response_template`".replace("+", r"\+")
        ):
            model.generate(more, past_key_values=first.past_key_values, **given)
    for spec in ("f2", "all"):  # these do.
        model = adapted(spec)
        first = model.generate(torch.tensor([[3, 4, 5, 6, 7, 8]]), **given)
        more = torch.cat([first.sequences, torch.tensor([[9, 10, 11]])], 1)
        kept = model.generate(more, past_key_values=first.past_key_values, output_logits=True, **given)
        again = model.generate(more, output_logits=True, **given)
        close(log_probs(torch.stack(kept.logits)), log_probs(torch.stack(again.logits)))


# Caches that others have filled


@pytest.mark.parametrize("way", ["forward", "generate"])
@pytest.mark.parametrize("spec", ["f2+l2", "p", "f1", "all"])
def test_a_cache_that_the_base_filled(way, spec):
    model, prompt = adapted(spec), torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])
    with torch.no_grad(), model.disable_adapter():
        cache = model(input_ids=prompt[:, :5], use_cache=True).past_key_values
    with torch.no_grad(), pytest.raises(ValueError, match=r"The cache holds no edits where .*without one"):
        if way == "forward":
            model(input_ids=prompt[:, 5:], past_key_values=cache, use_cache=True)
        else:
            model.generate(prompt, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("spec", ["l2", "l1~1", "g", "g2"])
def test_what_is_not_edited_is_the_bases(spec):
    """A cache of the base is right up to the first edited token."""
    model, prompt = adapted(spec), torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])
    with torch.no_grad(), model.disable_adapter():
        cache = model(input_ids=prompt[:, :5], use_cache=True).past_key_values
    given = dict(max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    kept = model.generate(prompt, past_key_values=copy.deepcopy(cache), **given)
    close(log_probs(torch.stack(kept.logits)), log_probs(torch.stack(model.generate(prompt, **given).logits)))
    with torch.no_grad():
        behind = model(input_ids=prompt[:, 5:], past_key_values=cache, use_cache=True).logits
    close(log_probs(behind)[:, -1], at_once(model, prompt)[:, -1])


@pytest.mark.parametrize("way", ["forward", "generate"])
def test_a_cache_that_another_adapter_filled(way):
    model, prompt = adapted("f2+l2", **MARKS), torch.tensor([CHAT])
    model.add_adapter("other", LoReftConfig(task_type="CAUSAL_LM", r=2, positions="f2+l2", **MARKS))
    randomise(model, seed=3)
    _, cache = in_pieces(model, [CHAT[:12]], [])
    model.set_adapter("other")
    both = r"The cache holds .*another adapter.* edits of 'default' \(f2\+l2\) at .* needs those of 'other' at tokens"
    with torch.no_grad(), pytest.raises(ValueError, match=both):
        if way == "forward":
            model(input_ids=prompt[:, 12:18], past_key_values=cache, use_cache=True)
        else:
            model.generate(prompt[:, :18], past_key_values=cache, max_new_tokens=2)


def test_the_base_behind_a_cache_that_an_adapter_filled():
    model, prompt = adapted("f2+l2", **MARKS), torch.tensor([CHAT])
    _, cache = in_pieces(model, [CHAT[:12]], [])
    with torch.no_grad(), model.disable_adapter(), pytest.raises(ValueError, match="The cache holds edits"):
        model(input_ids=prompt[:, 12:18], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("now", ["base", "one of two"])
def test_generate_behind_edits_of_an_adapter_that_is_not_active(now):
    model, prompt = adapted("f2+l2", **MARKS), torch.tensor([CHAT[:18]])
    model.add_adapter("other", LoReftConfig(task_type="CAUSAL_LM", r=2, positions="l1+g", **MARKS))
    randomise(model, seed=3)
    model.base_model.set_adapter(["default", "other"])
    _, cache = in_pieces(model, [CHAT[:12]], [8])
    if now == "base":
        with model.disable_adapter(), pytest.raises(ValueError, match="The cache holds edits"):
            model.generate(prompt, past_key_values=cache, max_new_tokens=2)
    else:
        model.set_adapter("default")
        with pytest.raises(ValueError, match="The cache holds edits"):
            model.generate(prompt, past_key_values=cache, max_new_tokens=2)


def two_adapters():
    model = adapted("f2+l2", **MARKS)
    model.add_adapter("other", LoReftConfig(task_type="CAUSAL_LM", r=2, positions="l2+g2", **MARKS))
    randomise(model, seed=3)
    return model


@pytest.mark.parametrize("names", [["default", "other"], ["default", "__base__"], ["other", "other"]], ids=str)
def test_each_row_has_an_adapter_of_its_own(names):
    """From turn to turn, in `generate` and by hand."""
    model, rows = two_adapters(), torch.tensor([CHAT[:18]] * 2)
    options = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)
    first = model.generate(rows[:, :8], adapter_names=names, **options)
    ids = torch.cat([first.sequences, rows[:, 12:]], 1)
    kept = model.generate(ids, adapter_names=names, past_key_values=first.past_key_values, **options)
    again = model.generate(ids, adapter_names=names, **options)
    close(log_probs(torch.stack(kept.logits)), log_probs(torch.stack(again.logits)))
    with torch.no_grad():
        cache = model(input_ids=rows[:, :12], adapter_names=names, use_cache=True).past_key_values
        found = model(input_ids=rows[:, 12:], adapter_names=names, past_key_values=cache, use_cache=True).logits
    close(log_probs(found), at_once(model, rows, adapter_names=names)[:, 12:])


@pytest.mark.parametrize("way", ["forward", "generate"])
@pytest.mark.parametrize(
    ("before", "now"),
    [
        (["default", "other"], ["other", "default"]),
        (["default", "__base__"], ["default", "default"]),
        (["default", "__base__"], None),
        (["__base__", "__base__"], ["__base__", "default"]),
    ],
    ids=str,
)
def test_rows_of_other_adapters_than_the_cache_holds(before, now, way):
    model, rows = two_adapters(), torch.tensor([CHAT[:18]] * 2)
    named = {} if now is None else {"adapter_names": now}
    with torch.no_grad():
        cache = model(input_ids=rows[:, :12], adapter_names=before, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="The cache holds"):
            if way == "forward":
                model(input_ids=rows[:, 12:], past_key_values=cache, **named)
            else:
                model.generate(rows, past_key_values=cache, max_new_tokens=2, **named)


def test_a_cache_from_beam_search():
    """Beam search reorders the rows of a cache while it fills it."""
    model = adapted("f2+l2", **MARKS)
    out = model.generate(
        torch.tensor([CHAT[:8]]), max_new_tokens=4, num_beams=3, num_return_sequences=3, return_dict_in_generate=True
    )
    rows = torch.cat([out.sequences, torch.tensor([[*USER, 12, *ASSISTANT]] * 3)], 1)
    with pytest.raises(ValueError, match="beam search"):
        model.generate(rows, past_key_values=copy.deepcopy(out.past_key_values), max_new_tokens=2)
    held = out.past_key_values.get_seq_length()
    with torch.no_grad(), pytest.raises(ValueError, match="beam search"):
        model(input_ids=rows[:, held:], past_key_values=out.past_key_values, use_cache=True)


def test_generate_is_given_other_tokens_than_the_cache_holds():
    model = adapted("f2+l2", **MARKS)
    _, cache = in_pieces(model, [CHAT[:12]], [8])
    other = [1, *USER, 5, 6, 9, *CHAT[6:18]]
    with pytest.raises(ValueError, match="holds other tokens than its input begins with"):
        model.generate(torch.tensor([other]), past_key_values=cache, max_new_tokens=2)


# Caches that are copied, cropped, repeated


@pytest.mark.parametrize("spec", SPECS)
def test_a_copy_of_a_cache_knows_what_the_cache_knew(spec):
    """One history, two ways to go on, and the history again."""
    model = adapted(spec, **MARKS)
    _, cache = in_pieces(model, [CHAT[:12]], [8])
    for new in ([*USER, 20, *ASSISTANT, 21], [*TOOL, 22, 23, 24, *ASSISTANT, 25, 26], CHAT[12:]):
        ids = torch.tensor([CHAT[:12] + new])
        with torch.no_grad():
            found = model(input_ids=ids[:, 12:], past_key_values=copy.deepcopy(cache), use_cache=True).logits
        close(log_probs(found), at_once(model, ids)[:, 12:])


@pytest.mark.parametrize("length", [21, 18, 12, 10, 8])
@pytest.mark.parametrize("spec", SPECS)
def test_a_cropped_cache(length, spec):
    """A turn is taken back, or an answer is tried again from its middle."""
    model = adapted(spec, **MARKS)
    _, cache = in_pieces(model, [CHAT], [8, 18])
    cache.crop(length - len(CHAT))
    ids = torch.tensor([[*CHAT[:length], 20, *USER, 22, 23, 24, *ASSISTANT, 25]])
    with torch.no_grad():
        found = model(input_ids=ids[:, length:], past_key_values=cache, use_cache=True).logits
    close(log_probs(found), at_once(model, ids)[:, length:])


@pytest.mark.parametrize("spec", ["f2+l2", "l1", "g", "p"])
def test_a_cropped_cache_in_generate(spec):
    model = adapted(spec, **MARKS)
    given = dict(max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    cache = model.generate(torch.tensor([CHAT[:18]]), **given).past_key_values
    cache.crop(12 - cache.get_seq_length())
    ids = torch.tensor([[*CHAT[:12], *USER, 24, 25, 26, *ASSISTANT]])
    kept = model.generate(ids, past_key_values=cache, **given)
    close(log_probs(torch.stack(kept.logits)), log_probs(torch.stack(model.generate(ids, **given).logits)))


def test_a_cache_cropped_among_the_last_tokens_of_a_prompt():
    """It holds an edit that the new prompt does not have."""
    model = adapted("l4", **MARKS)
    _, cache = in_pieces(model, [CHAT[:8]], [])
    cache.crop(-2)  # tokens 4 and 5 are edited
    ids = torch.tensor([[*CHAT[:6], 20, 21, 22, 23, *ASSISTANT]])
    with torch.no_grad(), pytest.raises(ValueError, match="The cache holds edits that this"):
        model(input_ids=ids[:, 6:], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("spec", SPECS)
def test_a_cache_repeated_for_several_continuations(spec):
    """As in scoring choices: one history, encoded once, its rows then repeated."""
    model = adapted(spec, **MARKS)
    _, cache = in_pieces(model, [CHAT[:18]], [8])
    cache.batch_repeat_interleave(3)
    rows = torch.tensor([[*CHAT[:18], a, b, 5] for a, b in ((14, 15), (20, 21), (22, 23))])
    with torch.no_grad():
        found = model(input_ids=rows[:, 18:], past_key_values=cache, use_cache=True).logits
    close(log_probs(found), at_once(model, rows)[:, 18:])


@pytest.mark.parametrize("spec", ["f2+l2", "p"])
def test_rows_that_were_moved_by_hand(spec):
    """The result is right, or the cache is refused. `gN` is an exception that the docs name: its counts stay."""
    one, other = [1, *USER, 5, *ASSISTANT, 8, 9, 8], [1, *USER, 5, 6, 7, *ASSISTANT, 8]
    model, new = adapted(spec, **MARKS), torch.tensor([[7, *USER, 3, *ASSISTANT]] * 2)
    _, cache = in_pieces(model, [one, other], [])
    cache.reorder_cache(torch.tensor([1, 0]))
    try:
        with torch.no_grad():
            found = model(input_ids=new, past_key_values=cache, use_cache=True).logits
    except ValueError as error:
        assert "moved" in str(error)
    else:
        close(log_probs(found), at_once(model, torch.cat([torch.tensor([other, one]), new], 1))[:, 9:])


# Headers and prompts that are completed too late


@pytest.mark.parametrize("cut", [6, 7])
def test_a_header_completed_late_is_told(cut):
    """`l2` names token 6, but only token 7 completes the header, when token 6 has been computed without an edit."""
    model = adapted("l3", **MARKS)
    first, rest = torch.tensor([CHAT[:cut]]), torch.tensor([CHAT[cut:9]])
    tail = CHAT[:3]  # an answer before, so that the first piece is not a prompt by itself
    history = torch.tensor([[*tail, 4, *ASSISTANT, 9, 10]])
    with torch.no_grad():
        cache = model(input_ids=history, use_cache=True).past_key_values
        cache = model(input_ids=first, past_key_values=cache, use_cache=True).past_key_values
        with pytest.warns(UserWarning, match="header behind which an answer begins was completed after"):
            model(input_ids=rest, past_key_values=cache, use_cache=True)


def test_a_header_completed_in_time_is_not_worth_a_word():
    model = adapted("l1", **MARKS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _ = in_pieces(model, [CHAT], [12, 17, 18])  # the last token of the header is the one that `l1` names
    close(found, at_once(model, [CHAT]))


@pytest.mark.parametrize("spec", ["p", "g"])
def test_a_users_header_that_comes_in_two_is_refused(spec):
    """The header's first token was taken for a token of the answer."""
    model = adapted(spec, **MARKS)
    with pytest.raises(ValueError, match="The cache holds"):
        in_pieces(model, [CHAT], [8, 13])


# Without marks


@pytest.mark.parametrize("spec", ["f2+l2", "l1", "p", "g", "g2"])
def test_a_second_piece_without_marks_is_warned_of_or_refused(spec):
    """Nothing says whether it is prompt or answer, nor whether the first piece was the whole prompt."""
    model = adapted(spec)
    ids = [[3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found, _ = in_pieces(model, ids, [6])
        except ValueError as error:
            assert spec in str(error) and "The cache holds edits" in str(error)
            return
    assert any("takes every row of this forward for a prompt" in words for words in said(caught))
    close(found, at_once(model, ids))  # it is taken for the prompt's second part


@pytest.mark.parametrize("spec", ["f2", "all"])
def test_a_second_piece_that_needs_no_prompts_end(spec):
    model, ids = adapted(spec), [[3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _ = in_pieces(model, ids, [6, 8])
    close(found, at_once(model, ids))


@pytest.mark.parametrize("cuts", [[6], [7, 8, 9], [6, 8]])
@pytest.mark.parametrize("spec", SPECS)
def test_prompt_lengths_behind_a_cache(cuts, spec):
    """They count from the document's beginning: its prompt has seven tokens."""
    model, ids = adapted(spec), [[3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24]]
    if cuts[0] == 6 and "l" in spec and spec != "all":
        cuts = [7, *cuts[1:]]  # the prompt's last tokens in one piece
    with warnings.catch_warnings(), peft_reft.prompt_lengths([7, 7]):
        warnings.simplefilter("error")
        expected = at_once(model, ids)
        found, _ = in_pieces(model, ids, cuts)
    close(found, expected)
    close(expected, at_once(model, ids, **with_prompt_of(7, ids)))


@pytest.mark.parametrize("spec", ["f2+l2", "l2"])
def test_prompt_lengths_of_a_prompt_in_pieces(spec):
    """The first piece ends before the prompt does, so none of its tokens is one of the prompt's last."""
    model, ids = adapted(spec), [[3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]]
    with peft_reft.prompt_lengths([9]):
        found, _ = in_pieces(model, ids, [5, 9])
        close(found, at_once(model, ids))


def test_a_cache_is_not_tied_to_the_model():
    """A cache carries what is remembered, so a second conversation knows nothing of the first."""
    model = adapted("f2+l2+g3", **MARKS)
    other = [2, *USER, 30, 31, *ASSISTANT, 32, 33, *USER, 34, *ASSISTANT, 35, 36]
    expected = at_once(model, [CHAT]), at_once(model, [other])
    one, two, found = None, None, ([], [])
    with torch.no_grad():
        for start, stop in [(0, 8), (8, 10), (10, 12), (12, 18)]:
            out = model(input_ids=torch.tensor([CHAT[start:stop]]), past_key_values=one, use_cache=True)
            one = out.past_key_values
            found[0].append(log_probs(out.logits))
            begin, end = {0: (0, 7), 8: (7, 8), 10: (8, 9), 12: (9, 16)}[start]
            out = model(input_ids=torch.tensor([other[begin:end]]), past_key_values=two, use_cache=True)
            two = out.past_key_values
            found[1].append(log_probs(out.logits))
    close(torch.cat(found[0], 1), expected[0][:, :18])
    close(torch.cat(found[1], 1), expected[1][:, :16])


def test_several_tokens_behind_an_answer_without_marks_are_told():
    """They may be a second prompt or the answer's next tokens, and nothing says which."""
    model = adapted("l2")
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([CHAT[:6]]), use_cache=True).past_key_values
        model(input_ids=torch.tensor([[9]]), past_key_values=cache)
        with pytest.warns(UserWarning, match="for more of the answer that began at token 6"):
            model(input_ids=torch.tensor([[3, 4, 5]]), past_key_values=cache)


def test_a_cache_of_another_prompt_length_is_refused_with_both_places():
    """Without marks the beginning was taken for a prompt of its own, whose last tokens were edited."""
    model, prompt = adapted("l2"), torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]])
    cache = model.generate(prompt[:, :5], max_new_tokens=1, return_dict_in_generate=True).past_key_values
    with pytest.raises(ValueError, match=r"'default' \(l2\) at tokens 3, 4\. .*'default' at none of its tokens"):
        model.generate(prompt, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("spec", ["l2", "l1+g"])
def test_many_answers_are_scored_behind_one_prompt(spec):
    """A cache that the base filled with the document, then the prompt once, then each answer in a row of its own."""
    model = adapted(spec)
    prompt, answers = (
        torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]]),
        torch.tensor([[11, 12, 13], [14, 15, 16], [17, 18, 19]]),
    )
    with torch.no_grad(), model.disable_adapter():
        cache = model(input_ids=prompt[:, :5], use_cache=True).past_key_values
    with torch.no_grad(), peft_reft.prompt_lengths([8]):
        behind = model(input_ids=prompt[:, 5:], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(3)
    with torch.no_grad(), peft_reft.prompt_lengths([8] * 3):
        scored = model(input_ids=answers, past_key_values=cache, use_cache=True).logits
    whole = torch.cat([prompt.expand(3, -1), answers], 1)
    labels = whole.clone()
    labels[:, :8] = -100
    with torch.no_grad():
        expected = model(input_ids=whole, labels=labels).logits
    close(log_probs(scored), log_probs(expected[:, 8:]))
    close(log_probs(behind.logits)[:, -1], log_probs(expected[:1, 7]))
