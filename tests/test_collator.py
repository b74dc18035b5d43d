"""`DataCollatorForLoReft`: the positions that the model would derive, around any collator."""

import copy
import pickle

import pytest
import torch
from conftest import VOCAB, build, randomise
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import BatchEncoding, DataCollatorForSeq2Seq, PreTrainedTokenizerFast
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from peft_reft import DataCollatorForLoReft, LoReftConfig

N = -1  # an empty slot

USER, ASSISTANT = [60, 61], [60, 62]  # headers, which no word begins with
MARKS = dict(response_template=[ASSISTANT], instruction_template=[USER])


def stack(rows):
    """Collate rows of one length: a plain function."""
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def ids(length, seed=0):
    return torch.randint(3, USER[0], (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def row(prompt, completion, seed=0):
    """Make an example with that many prompt and completion tokens."""
    tokens = ids(prompt + completion, seed)
    return {"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:]}


def turns(*lengths, seed=0):
    """Make a chat: tokens of the user, the assistant, the user, and so on. Only the assistant's are supervised."""
    tokens = ids(sum(lengths), seed)
    supervised = [which % 2 for which, length in enumerate(lengths) for _ in range(length)]
    return {"input_ids": tokens, "labels": [t if s else -100 for t, s in zip(tokens, supervised)]}


def chat(*lengths, seed=0):
    """As `turns`, with headers: each user's message begins with the user's header and ends with the assistant's."""
    rows = turns(*lengths, seed=seed)
    for which, length in enumerate(lengths[::2]):
        assert length >= len(USER + ASSISTANT)
        begin = sum(lengths[: 2 * which])
        rows["input_ids"][begin : begin + 2] = USER
        rows["input_ids"][begin + length - 2 : begin + length] = ASSISTANT
    return rows


def padded(rows, side="right"):
    """A batch of rows of different lengths."""
    width = max(len(r["input_ids"]) for r in rows)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for r in rows:
        pad = width - len(r["input_ids"])
        for name, values, fill in [
            ("input_ids", r["input_ids"], 0),
            ("attention_mask", [1] * len(r["input_ids"]), 0),
            ("labels", r["labels"], -100),
        ]:
            batch[name].append([fill] * pad + values if side == "left" else values + [fill] * pad)
    return {name: torch.tensor(values) for name, values in batch.items()}


def packed(*rows):
    """Pack `rows`, each a list of documents. Position ids restart with each document, and there is no mask."""
    batch = {
        "input_ids": [[t for doc in docs for t in doc["input_ids"]] for docs in rows],
        "labels": [[t for doc in docs for t in doc["labels"]] for docs in rows],
        "position_ids": [[n for doc in docs for n in range(len(doc["input_ids"]))] for docs in rows],
    }
    return {name: torch.tensor(values) for name, values in batch.items()}


PAIRS = [row(9, 3, 1), row(3, 4, 2), row(1, 5, 3), row(6, 2, 4)]
CHATS = [chat(7, 2, 5, 2, 4, 3, seed=5), chat(6, 3, 6, 1, seed=6), chat(4, 3, seed=7)]

BATCHES = {
    "right": padded(PAIRS),
    "left": padded(PAIRS, "left"),
    "left with position ids": {
        **padded(PAIRS, "left"),
        "position_ids": (padded(PAIRS, "left")["attention_mask"].cumsum(1) - 1).clamp_min(0),
    },
    "no mask": stack([row(4, 3, 8), row(2, 5, 9)]),
    "packed": packed([row(4, 2, 1), row(2, 2, 2), row(7, 2, 3)]),
    "packed, two rows": packed([row(4, 2, 1), row(2, 2, 2)], [row(2, 1, 3), row(2, 1, 4), row(3, 1, 5)]),
    "packed chats": packed(CHATS),
    "chats, right": padded(CHATS),
    "chats, left": padded(CHATS, "left"),
    "one row without an answer": padded([*PAIRS, turns(4, seed=9)]),
}
COUNTED = ["f2+l2", "l3", "g2", "f1+l2+g3", {"0-1": "f2", "2-": "l3"}]
SPECS = [*COUNTED, "p", "all", "f2+g", "p+g1", {"0": "f2+l2", "1-": "all"}]


def adapted(config, seed=1):
    model = get_peft_model(build("llama"), config)
    randomise(model, seed=seed)
    return model


def collate(config, batch):
    """Return what the collator makes of a copy of a batch."""
    return DataCollatorForLoReft(lambda rows: dict(batch), config)([])


# The positions of the collator are those of the model


# Open-ended groups have no number of positions, so nothing to hold one intervention each.
TIES = [(spec, tie) for tie in ("layer", "group", "model") for spec in SPECS] + [(s, "position") for s in COUNTED]


@pytest.mark.parametrize(("positions", "tie"), TIES, ids=str)
@pytest.mark.parametrize("marks", [{}, MARKS], ids=["labels", "marks"])
def test_the_model_derives_the_very_same(positions, tie, marks):
    config = LoReftConfig(task_type="CAUSAL_LM", r=4, positions=positions, tie=tie, **marks)
    model = adapted(config).train()
    for name, batch in BATCHES.items():
        if "chats" in name and not (marks or (positions == "all" and tie != "group")):
            with pytest.raises(ValueError, match=r"several supervised spans.*`response_template`"):
                collate(config, batch)
            with pytest.raises(ValueError, match=r"several supervised spans.*`response_template`"):
                model(**batch)
            continue
        with_positions = collate(config, batch)
        assert with_positions["intervention_positions"].dtype == torch.long
        assert all(torch.equal(with_positions[key], batch[key]) for key in batch)
        derived, explicit = model(**batch), model(**with_positions)
        assert torch.equal(derived.loss, explicit.loss) and torch.equal(derived.logits, explicit.logits), name
        with torch.no_grad(), model.disable_adapter():
            assert (model(**batch).logits - derived.logits).abs().max() > 1e-2, name  # edits are there to be compared


@pytest.mark.parametrize("positions", ["f2+l2", "all", {"0-1": "f2", "2-": "l3"}], ids=str)
def test_and_the_gradients_are_the_same(positions):
    config = LoReftConfig(task_type="CAUSAL_LM", r=4, positions=positions, **MARKS)
    for name in ("left", "packed", "chats, right"):
        gradients = []
        for batch in (BATCHES[name], collate(config, BATCHES[name])):
            model = adapted(config).train()
            model(**batch).loss.backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


@pytest.mark.parametrize("positions", SPECS, ids=str)
def test_without_labels_the_whole_row_is_the_prompt(positions):
    config = LoReftConfig(task_type="CAUSAL_LM", r=4, positions=positions)
    model = adapted(config).eval()
    for name in ("right", "left", "left with position ids", "no mask", "packed, two rows"):
        batch = {key: value for key, value in BATCHES[name].items() if key != "labels"}
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, model(**collate(config, batch)).logits), name


@pytest.mark.parametrize("positions", SPECS, ids=str)
def test_marks_need_no_labels(positions):
    """The headers say which tokens are edited, whichever tokens are trained on."""
    config = LoReftConfig(task_type="CAUSAL_LM", r=4, positions=positions, **MARKS)
    model = adapted(config).eval()
    for name in ("packed chats", "chats, right", "chats, left"):
        labelled = BATCHES[name]
        wanted = collate(config, labelled)["intervention_positions"]
        real = labelled.get("attention_mask", torch.ones_like(labelled["input_ids"])) > 0
        only_last = labelled["labels"].masked_fill(torch.arange(real.shape[1]) < 20, -100)
        for labels in (None, labelled["input_ids"].masked_fill(~real, -100), only_last):
            batch = {key: value for key, value in labelled.items() if key != "labels"}
            batch |= {} if labels is None else {"labels": labels}
            assert torch.equal(collate(config, batch)["intervention_positions"], wanted), name
            with torch.no_grad():
                assert torch.equal(model(**batch).logits, model(**collate(config, batch)).logits), name


def test_the_task_may_be_unset():
    config = LoReftConfig(r=4, positions="f2+l2")
    model = adapted(config).train()
    batch = collate(config, BATCHES["right"])
    assert torch.equal(batch["intervention_positions"], expected("f2+l2", "right"))
    assert torch.equal(model(**BATCHES["right"]).loss, model(**batch).loss)


def test_what_the_collator_says_goes():
    """Positions in the batch are used as they stand, not derived again."""
    config = LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2")
    model = adapted(config).train()
    batch = collate(config, BATCHES["right"])
    right = model(**batch).loss
    for elsewhere in (batch["intervention_positions"] + 1, torch.full_like(batch["intervention_positions"], N)):
        assert (model(**{**batch, "intervention_positions": elsewhere}).loss - right).abs() > 1e-4


# ... and which these are, by hand


TABLE = {
    # prompts of 9, 3, 1 and 6 tokens in rows of 12
    ("f2+l2", "right"): [[0, 1, 7, 8], [0, N, 1, 2], [N, N, N, 0], [0, 1, 4, 5]],
    ("f2+l2", "left"): [[0, 1, 7, 8], [5, N, 6, 7], [N, N, N, 6], [4, 5, 8, 9]],
    ("l3", "left"): [[6, 7, 8], [5, 6, 7], [N, N, 6], [7, 8, 9]],
    ("g2", "right"): [[9, 10], [3, 4], [1, 2], [6, 7]],
    # documents of 4 + 2, 2 + 2 and 7 + 2 tokens
    ("f2+l2", "packed"): [[0, 1, 2, 3, 6, N, N, 7, 10, 11, 15, 16]],
    ("l3", "packed"): [[1, 2, 3, N, N, 7, 14, 15, 16]],
    ("g2", "packed"): [[4, 5, 8, 9, 17, 18]],
    # the second row has documents of 2 + 1, 2 + 1 and 3 + 1, the first has two documents alone
    ("f2+l2", "packed, two rows"): [
        [0, 1, 2, 3, 6, N, N, 7, N, N, N, N],
        [0, N, N, 1, 3, N, N, 4, 6, N, 7, 8],
    ],
    # user 7, assistant 2, user 5, assistant 2, user 4, assistant 3 | 6, 3, 6, 1 | 4, 3
    ("f2+l2", "chats, right"): [
        [0, 1, 5, 6, N, N, 12, 13, N, N, 18, 19],
        [0, 1, 4, 5, N, N, 13, 14, N, N, N, N],
        [0, 1, 2, 3, N, N, N, N, N, N, N, N],
    ],
    # A first prompt of L < 6 has its last L / 2 edited, rounded up.
    # `l6` before the second answer would reach into the first: it stays within its own prompt, all of which it edits
    ("l6", "chats, right"): [
        [1, 2, 3, 4, 5, 6, N, 9, 10, 11, 12, 13, N, N, 16, 17, 18, 19],
        [0, 1, 2, 3, 4, 5, 9, 10, 11, 12, 13, 14, N, N, N, N, N, N],
        [N, N, N, N, 2, 3, N, N, N, N, N, N, N, N, N, N, N, N],
    ],
    # `g2` begins again with each answer
    ("g2", "chats, right"): [[7, 8, 14, 15, 20, 21], [6, 7, 15, N, N, N], [4, 5, N, N, N, N]],
    ("f2+g", "no mask"): [[0, 1, N, N, N, N, 4, 5, 6], [0, 1, N, N, 2, 3, 4, 5, 6]],
    ("all", "no mask"): [
        [0, 1, 2, 3, N, N, N, N, N, N, N, 4, 5, 6],
        [0, 1, N, N, N, N, N, N, N, 2, 3, 4, 5, 6],
    ],
}


def expected(positions, batch):
    return torch.tensor(TABLE[positions, batch])


@pytest.mark.parametrize(("positions", "batch"), TABLE, ids=str)
def test_slots(positions, batch):
    config = LoReftConfig(task_type="CAUSAL_LM", positions=positions, **MARKS)
    assert torch.equal(collate(config, BATCHES[batch])["intervention_positions"], expected(positions, batch))


def test_slots_of_a_mapping_hold_the_groups_of_all_layers():
    config = LoReftConfig(task_type="CAUSAL_LM", positions={"0-1": "f2", "2-": "l3"})
    batch = padded([row(9, 3), row(6, 1)])
    assert collate(config, batch)["intervention_positions"].tolist() == [[0, 1, 6, 7, 8], [0, 1, 3, 4, 5]]


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS"])
def test_labels_of_classifiers_say_nothing_of_prompts(task_type):
    config = LoReftConfig(task_type=task_type, positions="f1+l2")
    batch = BATCHES["left"]
    if task_type == "SEQ_CLS":
        batch = {**batch, "labels": torch.tensor([0, 1, 2, 1])}
    assert collate(config, batch)["intervention_positions"].tolist() == [
        [0, 10, 11],
        [5, 10, 11],
        [6, 10, 11],
        [4, 10, 11],
    ]


# What it wraps


@pytest.fixture
def tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"t{n}": n for n in range(3, VOCAB)}}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


F2L2 = LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f2+l2")


def test_a_plain_function():
    batch = DataCollatorForLoReft(stack, F2L2)([row(4, 3, 8), row(2, 5, 9)])
    assert batch["intervention_positions"].tolist() == [[0, 1, 2, 3], [0, N, N, 1]]
    assert {name: value.tolist() for name, value in batch.items() if name != "intervention_positions"} == {
        name: value.tolist() for name, value in stack([row(4, 3, 8), row(2, 5, 9)]).items()
    }


@pytest.mark.parametrize("side", ["right", "left"])
def test_seq2seq_collator(tokenizer, side):
    tokenizer.padding_side = side
    batch = DataCollatorForLoReft(DataCollatorForSeq2Seq(tokenizer), F2L2)(copy.deepcopy(PAIRS))
    assert isinstance(batch, BatchEncoding) and torch.equal(batch["labels"], BATCHES[side]["labels"])
    assert torch.equal(batch["intervention_positions"], expected("f2+l2", side))
    model = adapted(F2L2).train()
    assert torch.equal(model(**batch).loss, model(**BATCHES[side]).loss)


@pytest.mark.parametrize("multiple", [None, 16])
def test_trls_collator(multiple):
    collator = DataCollatorForLoReft(DataCollatorForLanguageModeling(0, pad_to_multiple_of=multiple), F2L2)
    batch = collator(PAIRS)
    assert batch["input_ids"].shape == (4, multiple or 12)
    assert torch.equal(batch["intervention_positions"], expected("f2+l2", "right"))


@pytest.mark.parametrize("multiple", [None, 16])
def test_trls_collator_without_padding(multiple):
    """Padding is no position, although only position ids of 0 without labels show it here."""
    documents = [row(4, 2, 1), row(2, 2, 2), row(7, 2, 3)]
    base = DataCollatorForLanguageModeling(0, padding_free=True, pad_to_multiple_of=multiple)
    batch = DataCollatorForLoReft(base, F2L2)(documents)
    assert batch["input_ids"].shape == (1, 32 if multiple else 19) and "attention_mask" not in batch
    edited = batch["intervention_positions"][batch["intervention_positions"] >= 0]
    assert edited.tolist() == [0, 1, 2, 3, 6, 7, 10, 11, 15, 16]
    plain = {name: value for name, value in batch.items() if name != "intervention_positions"}
    model = adapted(F2L2).train()
    assert torch.equal(model(**plain).loss, model(**batch).loss)


def test_trls_collator_of_packed_rows():
    """Rows of several documents each, whose lengths TRL notes in `seq_lengths`."""
    rows = [
        {**turns(4, 2, 2, 2, seed=1), "seq_lengths": [6, 4]},  # documents of one answer each
        {**turns(2, 1, 2, 1, 3, 1, seed=2), "seq_lengths": [3, 3, 4]},
    ]
    batch = DataCollatorForLoReft(DataCollatorForLanguageModeling(0, padding_free=True), F2L2)(rows)
    slots = [0, 1, 2, 3, 6, N, N, 7, 10, N, N, 11, 13, N, N, 14, 16, N, 17, 18]
    assert batch["intervention_positions"].tolist() == [slots]


def test_a_completion_mask_marks_answers_as_labels_do():
    """TRL's collators for preference data give a mask of the completions instead of labels."""
    batch = {"input_ids": torch.ones(1, 7, dtype=torch.long), "completion_mask": torch.tensor([[0, 0, 0, 0, 1, 1, 1]])}
    collator = DataCollatorForLoReft(lambda rows: dict(batch), F2L2)
    assert collator([])["intervention_positions"].tolist() == [[0, 1, 2, 3]]


def test_arguments_beside_the_rows_are_handed_on():
    def collator(rows, return_tensors=None):
        assert return_tensors == "pt"
        return stack(rows)

    assert "intervention_positions" in DataCollatorForLoReft(collator, F2L2)([row(4, 3)], return_tensors="pt")


def test_other_attributes_are_those_of_the_wrapped_collator(tokenizer):
    base = DataCollatorForLanguageModeling(pad_token_id=7, padding_free=True)
    collator = DataCollatorForLoReft(base, F2L2)
    assert collator.pad_token_id == 7 and collator.padding_free is True and collator.torch_call == base.torch_call
    assert collator.base_collator is base and collator.config is F2L2
    assert DataCollatorForLoReft(DataCollatorForSeq2Seq(tokenizer), F2L2).tokenizer is tokenizer
    assert not hasattr(collator, "no_such_option")


def test_options_set_on_it_reach_the_wrapped_collator():
    """As when a trainer writes `data_collator.return_position_ids = True`."""
    collator = DataCollatorForLoReft(DataCollatorForLanguageModeling(pad_token_id=0), F2L2)
    collator.return_position_ids = True
    assert collator.base_collator.return_position_ids is True
    assert "position_ids" in collator(PAIRS)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_and_copied(protocol):
    """`DataLoader` workers pickle their collator where processes are spawned."""
    collator = DataCollatorForLoReft(DataCollatorForLanguageModeling(pad_token_id=0), F2L2)
    for other in (pickle.loads(pickle.dumps(collator, protocol)), copy.deepcopy(collator), copy.copy(collator)):
        assert other.config == F2L2 and other.base_collator == collator.base_collator
        assert torch.equal(other(PAIRS)["intervention_positions"], expected("f2+l2", "right"))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_in_the_workers_of_a_data_loader(method):
    collator = DataCollatorForLoReft(DataCollatorForLanguageModeling(pad_token_id=0), F2L2)
    loader = DataLoader(PAIRS, 2, collate_fn=collator, num_workers=1, multiprocessing_context=method)
    found = [batch["intervention_positions"].tolist() for batch in loader]
    assert found == [TABLE["f2+l2", "right"][:2], TABLE["f2+l2", "right"][2:]]


# What it refuses


def test_rows_without_prompts():
    data = padded([row(0, 5), row(0, 7)])
    for positions in ("f2+l2", "p", {"0": "f2", "1-": "l3"}):
        with pytest.raises(ValueError, match="nothing would train") as error:
            collate(LoReftConfig(task_type="CAUSAL_LM", positions=positions), data)
        assert "completion_only_loss=True" in str(error.value)
    assert (collate(LoReftConfig(task_type="CAUSAL_LM", positions="all"), data)["intervention_positions"] >= 0).any()


def test_one_row_without_a_prompt_among_others():
    batch = collate(F2L2, padded([row(5, 2), row(0, 7)]))
    assert batch["intervention_positions"].tolist() == [[0, 1, 3, 4], [N, N, N, N]]


def test_rows_that_start_inside_a_document():
    whole = packed([row(4, 2, 1), row(7, 2, 3)])
    cut = {name: value[:, 2:] for name, value in whole.items()}  # position ids from 2 on
    inside = padded([turns(0, 3, 4, 2)])  # the end of an answer, then a turn of another
    later = padded([row(5, 2), turns(0, 3, 4, 2)], "left")
    for batch in (cut, inside, later):
        with pytest.raises(ValueError, match=r"middle of a document.*packing_strategy='bfd'"):
            collate(F2L2, batch)
        with pytest.raises(ValueError, match=r"middle of a document.*packing_strategy='bfd'"):
            adapted(F2L2).train()(**batch)
    assert "intervention_positions" in collate(F2L2, whole)


def test_chats_that_start_inside_a_document():
    """The headers that are left say where answers begin, but not where the document began."""
    cut = {
        name: value[:, 8:] for name, value in packed([CHATS[0]], [CHATS[0]]).items()
    }  # an answer's last token first
    for positions in ("f2+l2", "p", "g1"):
        with pytest.raises(ValueError, match="middle of a document"):
            collate(LoReftConfig(task_type="CAUSAL_LM", positions=positions, **MARKS), cut)
    config = LoReftConfig(task_type="CAUSAL_LM", positions="l2", **MARKS)
    assert collate(config, cut)["intervention_positions"].tolist() == [[4, 5, 10, 11]] * 2


@pytest.mark.parametrize(("positions", "slots"), [("f2", [[0, 1]]), ("all", None)])
def test_several_answers_without_marks_where_no_later_prompt_matters(positions, slots):
    batch = padded(CHATS[:1])
    config = LoReftConfig(task_type="CAUSAL_LM", positions=positions)
    found = collate(config, batch)["intervention_positions"]
    assert found.tolist() == slots if slots else sorted(found[found >= 0].tolist()) == list(range(23))


def test_a_batch_without_any_label_trains_nothing_and_is_let_through():
    """Truncation may leave such a batch. TRL's loss is zero then, and the next batch trains."""
    batch = padded([turns(5), turns(4)])
    assert collate(F2L2, batch)["intervention_positions"].tolist() == [[0, 1, 3, 4], [0, 1, 2, 3]]
