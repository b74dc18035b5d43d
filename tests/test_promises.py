"""A new position group is one class: written here, it is trained, generated, shown, described and served."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import build, randomise
from peft import PeftModel, get_peft_model

from peft_reft import DataCollatorForLoReft, LoReftConfig, Positions, show_positions
from peft_reft.card import describe
from peft_reft.positions.groups import GROUPS, Group, Span, Turn, smaller
from peft_reft.serving.schedule import NONE, ServedPlan

USER, ASSISTANT = [60, 61], [60, 62]
PROMPT = 9
ATOL = 1e-5


@dataclass(frozen=True)
class Middle(Group):
    """``midN``: the N tokens in the middle of each prompt."""

    letter = "mid"
    pattern = "mid(?P<count>[0-9]+)"
    grammar = "midN (N tokens in the middle of the prompt)"
    colour = ("45", "#e0b0ff")
    waits_for_end = True

    def span(self, turn: Turn) -> Span:
        start = turn.begin + (turn.answer - turn.begin - self.count) // 2
        start = start + (turn.begin - start) * (start < turn.begin)
        return Span(start, start, smaller(start + self.count, turn.answer))

    @property
    def phrase(self) -> str:
        return f"the middle {self.count}"


@pytest.fixture(autouse=True)
def _known():
    GROUPS.append(Middle)
    yield
    GROUPS.remove(Middle)


def adapted(spec="mid3", **fields):
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=4, positions=spec, **fields))
    randomise(model)
    return model.eval()


def middle(length, count=3):
    start = max(0, (length - count) // 2)
    return list(range(start, min(start + count, length)))


def row(prompt=PROMPT, answer=4):
    ids = torch.arange(3, 3 + prompt + answer).unsqueeze(0)
    labels = ids.clone()
    labels[:, :prompt] = -100
    return ids, labels


@pytest.mark.parametrize("prompt", [1, 2, 3, 8, 9])
def test_it_is_collated_and_scheduled_alike(prompt):
    """The positions of training are those of a server, whatever the prompt's length."""
    ids, labels = row(prompt)
    config = LoReftConfig(task_type="CAUSAL_LM", positions="mid3")
    slots = DataCollatorForLoReft(lambda batch: dict(batch), config)({"input_ids": ids, "labels": labels})
    columns = slots["intervention_positions"]
    assert columns[columns >= 0].tolist() == middle(prompt)
    plan = ServedPlan(Positions.parse("mid3").groups, "all")
    sets = plan.sets_in([(prompt, prompt)], 0, ids.shape[1])
    assert np.flatnonzero(sets != NONE).tolist() == middle(prompt)
    assert not plan.edits_answers


def test_it_trains():
    model = adapted().train()
    ids, labels = row()
    model(input_ids=ids, labels=labels).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.items() if ".layers.0." in name)


def test_it_generates_what_it_was_trained_for():
    """Greedy decoding is that of whole forwards with labels."""
    model = adapted()
    ids, _ = row(answer=0)
    out = model.generate(
        input_ids=ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    labels = out.sequences.clone()
    labels[:, :PROMPT] = -100
    with torch.no_grad():
        whole = model(input_ids=out.sequences, labels=labels).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, PROMPT - 1 : -1], atol=ATOL, rtol=0)
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=out.sequences).logits
    assert (base - whole).abs().max() > 100 * ATOL


def test_every_turn_of_a_chat_has_its_own():
    model = adapted(response_template=[ASSISTANT], instruction_template=[USER])
    first = [*USER, 5, 6, 7, *ASSISTANT]
    second = [*USER, 8, 9, *ASSISTANT]
    ids = torch.tensor([[*first, 10, 11, *second]])
    with torch.no_grad():
        by_marks = model(input_ids=ids).logits
        indices = middle(len(first)) + [len(first) + 2 + index for index in middle(len(second))]
        given = model(input_ids=ids, intervention_positions=torch.tensor([indices])).logits
    torch.testing.assert_close(by_marks, given, atol=ATOL, rtol=0)


def test_it_is_shown_and_described(capsys):
    class Characters:
        def __call__(self, text):
            return {"input_ids": [ord(character) for character in text]}

        def decode(self, ids):
            return "".join(map(chr, ids))

    config = LoReftConfig(positions="mid3")
    show_positions(Characters(), "abcdefghi", config)
    assert "abc[mid3: d|e|f]ghi" in capsys.readouterr().out
    assert "Edited tokens: the middle 3 tokens of the prompt" in describe(config)


def test_it_is_saved_and_loaded(tmp_path):
    model = adapted()
    ids, labels = row()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    with torch.no_grad():
        ours, theirs = (each(input_ids=ids, labels=labels).logits for each in (model, again))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


@pytest.mark.parametrize("spec", ["p+mid3", "mid3+p", "f2+mid3", "mid3+mid4"])
def test_what_could_take_the_same_token_is_refused(spec):
    with pytest.raises(ValueError, match="a token is edited once"):
        Positions.parse(spec)


def test_it_goes_beside_generated_tokens():
    assert (
        Positions.parse("mid3+g2").describe() == "the middle 3 tokens of the prompt and the first 2 generated tokens"
    )


def test_a_term_that_no_class_knows_is_refused():
    with pytest.raises(ValueError, match=r"'middle3' is not a group. Allowed: .*midN"):
        Positions.parse("middle3")
