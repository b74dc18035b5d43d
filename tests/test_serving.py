"""The parts of `peft_reft.serving` that need no vLLM: options, schedule, tables, reading adapters."""

import asyncio
import importlib.util
import json
import shutil
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
import torch
from conftest import build, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from peft_reft import LoReftConfig
from peft_reft.edits.formulas import INTERVENTIONS
from peft_reft.positions.groups import Group
from peft_reft.positions.index import make_index
from peft_reft.positions.resolve import find_answers, resolve
from peft_reft.positions.spec import Positions
from peft_reft.serving import add_adapter_async, core, list_adapters, remove_adapter_async
from peft_reft.serving.adapters import Reader, read_adapter
from peft_reft.serving.blocks import map_of
from peft_reft.serving.chosen import Choice, Facts
from peft_reft.serving.core import block_keys
from peft_reft.serving.engine.runners import Step
from peft_reft.serving.models import from_cli_args
from peft_reft.serving.offered import Offered
from peft_reft.serving.options import CHOICE, Options, check_request
from peft_reft.serving.schedule import NONE, Pieces, Plans, ServedPlan, Turns, edited, group_by_weights, turns_of
from peft_reft.serving.server import Server
from peft_reft.serving.sources import AdapterFiles, fingerprint, from_message, read_facts, to_message
from peft_reft.serving.tables import LINEAR, Table, formula_key
from peft_reft.serving.turns import Reading
from peft_reft.serving.worker import Batch
from peft_reft.tuner.architectures import skeleton

SPECS = ["f7+l7", "f3", "l1", "l3~2", "p", "g", "g2", "all", "f2+l2+g3", "f1+g", "l2+g2", "f4+l2~3"]


@pytest.mark.parametrize("by", ["all", "group", "position"])
@given(spec=st.sampled_from(SPECS), prompt=st.integers(1, 24), answer=st.integers(0, 8))
@settings(deadline=None)
def test_the_same_tokens_as_in_training(by, spec, prompt, answer):
    """`sets_in` finds for each token what `resolve` and `make_index` find for the whole row."""
    groups = Positions.parse(spec).groups
    if by == "position" and any(group.count is None for group in groups):
        by = "group"
    plan = ServedPlan(groups, by)
    n = prompt + answer
    labels = torch.full((1, n), -100)
    labels[:, prompt:] = 1
    slots = resolve(groups, find_answers(torch.ones(1, n, dtype=torch.bool), labels))
    index = make_index(slots, n, groups, groups, by)
    wanted = np.full(n, NONE)
    if index.mask is not None:
        masks = index.mask.reshape(-1, n)
        for number, mask in enumerate(masks):
            wanted[mask.numpy()] = number
    else:
        rows, valid = index.rows.reshape(-1, index.rows.shape[-1]), index.valid.reshape(-1, index.rows.shape[-1])
        for number, (at, is_valid) in enumerate(zip(rows, valid)):
            wanted[at[is_valid > 0].numpy()] = number
    found = plan.sets_in([(prompt, n)], 0, n)
    assert found.tolist() == wanted.tolist()
    assert wanted.max(initial=NONE) < plan.sets
    assert plan.edits_answers or (wanted[prompt:] == NONE).all()


@given(st.data())
@settings(deadline=None)
def test_pieces_add_up_to_the_whole(data):
    """The same weights edit each token, however requests are cut into steps and mixed with others."""
    specs = data.draw(st.lists(st.sampled_from(SPECS), min_size=1, max_size=3))
    distinct = [ServedPlan(Positions.parse(spec).groups, "group") for spec in specs]
    plans = Plans(distinct, np.array([NONE, *range(len(specs))]))  # the adapter at place 0 does nothing
    prompts = data.draw(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 6)), min_size=1, max_size=4))
    places = [data.draw(st.integers(0, len(specs))) for _ in prompts]
    lengths = [prompt + answer for prompt, answer in prompts]
    done, found = [0] * len(prompts), {}
    while done != lengths:
        counts = [data.draw(st.integers(0 if sum(lengths) - sum(done) > 1 else 1, 7)) for _ in prompts]
        counts = [min(count, length - before) for count, length, before in zip(counts, lengths, done)]
        if not any(counts):
            continue
        start = np.cumsum([0, *counts])[:-1]
        values = (start, counts, done, [prompt for prompt, _ in prompts], places)
        answers = Turns.of([turns_of([(prompt, prompt)]) for prompt, _ in prompts])
        step = Pieces(*(np.array(v, dtype=np.int64) for v in values), np.ones(len(places)), answers)
        turns = step.by_turn(np.ones(len(places), dtype=bool))
        rows, sets, piece = edited(turns, plans, 4)
        assert len({*rows.tolist()}) == len(rows), "a token is edited once"
        for row, number, place in zip(rows, sets, turns.place[piece]):
            request = int(np.searchsorted(start, row, side="right")) - 1
            while not counts[request]:
                request -= 1
            assert place == places[request]
            found[request, done[request] + row - start[request]] = number
        done = [before + count for before, count in zip(done, counts)]
    for request, ((prompt, _), place) in enumerate(zip(prompts, places)):
        n = lengths[request]
        whole = np.full(n, NONE)
        if place > 0:
            whole = distinct[place - 1].sets_in([(prompt, prompt)], 0, n)
        wanted = {(request, i): s + 4 * place for i, s in enumerate(whole) if s != NONE}
        assert {key: value for key, value in found.items() if key[0] == request} == wanted


# Chats: a user's header is 90 92, a tool's 90 93, the assistant's 90 91 95, or 90 91 where the tail has merged.
RESPONSE, INSTRUCTION = [[90, 91, 95], [90, 91]], [[90, 92], [90, 93]]


def header_at(ids, n, templates):
    """The length of the longest header of `templates` that begins at index n, 0 if there is none."""
    return max((len(t) for t in templates if ids[n : n + len(t)] == t), default=0)


def whose(ids, given):
    """For each token of a chat the number of its turn, and whether that turn's answer has begun.

    The first `given` tokens were given, the others were generated.
    """
    turn, answering, behind_header, found = 0, False, set(), []
    for n in range(len(ids)):
        if length := header_at(ids, n, RESPONSE):
            behind_header.add(n + length)
        if n < given and header_at(ids, n, INSTRUCTION):
            if answering or n in behind_header:  # the second case is an empty answer
                turn, answering = turn + 1, False
        elif n in behind_header or n == given:
            answering = True
        found.append((turn, answering))
    return found


def sets_of_chat(groups, by, ids, given):
    """The set of weights that edits each token, -1 for none: the rule of docs/positions.md, turn by turn."""
    sets, turns = [NONE] * len(ids), whose(ids, given)
    for turn in range(turns[-1][0] + 1 if turns else 0):
        prompt = [n for n, (of, answering) in enumerate(turns) if of == turn and not answering]
        answer = [n for n, (of, answering) in enumerate(turns) if of == turn and answering]
        before = 0
        for number, group in enumerate(groups):
            kept = prompt[: len(prompt) - group.ends.skip] if len(prompt) > group.ends.skip else []
            p, s = group.ends.prefix, group.ends.suffix
            if turn == 0 and len(kept) < p + s:
                p, s = min(p, len(kept) // 2), min(s, (len(kept) + 1) // 2)
            if group.letter == "p":
                slots = {n: n for n in prompt}
            elif group.letter == "f":
                slots = {n: n for n in kept[:p]} if turn == 0 else {}
            elif group.letter == "l":
                slots = {n: group.ends.suffix - 1 - back for back, n in enumerate(reversed(kept)) if back < s}
            else:
                slots = {n: k for k, n in enumerate(answer) if group.count is None or k < group.count}
            for n, slot in slots.items():
                sets[n] = {"all": 0, "group": number, "position": before + slot}[by]
            before += group.count or 0
    return sets


@st.composite
def chats(draw):
    """The token ids of a chat, and how many of them were given: up to the end of a header, or up to anywhere."""
    words = st.lists(st.integers(0, 8), max_size=5)
    ids, ends = draw(words), []
    for _ in range(draw(st.integers(0, 4))):
        for _ in range(draw(st.integers(1, 2))):
            ids += draw(st.sampled_from(INSTRUCTION)) + draw(words) + [94]
        for _ in range(draw(st.integers(1, 2))):
            ids += draw(st.sampled_from(RESPONSE))
            ends.append(len(ids))
            ids += draw(words)
    ids += [1]
    given = draw(st.sampled_from(ends)) if ends and draw(st.booleans()) else draw(st.integers(1, len(ids)))
    return ids, given


def reading(spec, by, marks=True):
    fields = dict(response_template=RESPONSE, instruction_template=INSTRUCTION) if marks else {}
    return Reading.of(LoReftConfig(positions=spec, tie="layer" if by == "all" else by, **fields))


def one_piece(count, computed, given, spans):
    """A step with one request."""
    return Pieces(*(np.array([value]) for value in (0, count, computed, given, 0, 1.0)), Turns.of([turns_of(spans)]))


def edited_in(step, plan):
    """From the rows of a step with one request to the sets of weights that edit them."""
    rows, sets, _ = edited(step.by_turn(np.ones(1, dtype=bool)), Plans([plan], np.zeros(1, dtype=int)), 8)
    assert len({*rows.tolist()}) == len(rows), "a token is edited once"
    return dict(zip(rows.tolist(), sets.tolist()))


def cut(data, plan, of_request, ids, given):
    """The set of weights of each token, found in steps of random size."""
    found, done = [], 0
    while done < len(ids):
        # A step that generates has one token, because the next ones do not exist yet.
        most = given - done if done < given else 1
        count = data.draw(st.integers(1, most))
        by_row = edited_in(one_piece(count, done, given, of_request), plan)
        found += [by_row.get(n, NONE) for n in range(count)]
        done += count
    return found


def splits_a_header(ids, given):
    headers = [(n, header_at(ids, n, templates)) for n in range(given) for templates in (RESPONSE, INSTRUCTION)]
    return any(n < given < n + length for n, length in headers)


@given(data=st.data(), chat=chats(), by=st.sampled_from(["all", "group", "position"]), spec=st.sampled_from(SPECS))
@settings(deadline=None, max_examples=300)
def test_every_turn_of_a_chat_is_edited_by_the_rule(data, chat, by, spec):
    (ids, given), groups = chat, Positions.parse(spec).groups
    if by == "position" and any(group.count is None for group in groups):
        by = "group"
    hypothesis.assume(not splits_a_header(ids, given))
    of_request = reading(spec, by).answers(ids[:given], given)
    assert cut(data, ServedPlan(groups, by), of_request, ids, given) == sets_of_chat(groups, by, ids, given)


def chosen(spec, by, marks=True, name="adapter", **more):
    return Choice(Facts(name, [spec], by, reading(spec, by, marks)), **more)


def elements(choice, ids, given, block):
    """The extra element of each whole block of a request that was given `given` of these tokens."""
    edited_map = map_of(choice, ids[:given], given)
    return [edited_map.element(start, start + block) for start in range(0, len(ids) - block + 1, block)]


def sets_of_block(groups, by, ids, given, marks, start, stop):
    """By the plain rule: the set of weights of each token of a block."""
    if marks:
        return sets_of_chat(groups, by, ids, given)[start:stop]
    by_row = edited_in(one_piece(len(ids), 0, given, [(given, given)]), ServedPlan(groups, by))
    return [by_row.get(n, NONE) for n in range(start, stop)]


@given(
    chat=chats(),
    marks=st.booleans(),
    by=st.sampled_from(["all", "group"]),
    spec=st.sampled_from(SPECS),
    block=st.integers(1, 6),
    more=st.data(),
)
@settings(deadline=None, max_examples=300)
def test_blocks_share_a_key_if_and_only_if_their_edits_are_the_same(chat, marks, by, spec, block, more):
    """Two requests with the same tokens, of which one was given more: a block's element says what is edited in it."""
    (ids, _), groups = chat, Positions.parse(spec).groups
    both = []
    for _ in range(2):
        given = more.draw(st.integers(1, len(ids)))
        hypothesis.assume(not (marks and splits_a_header(ids, given)))
        of_blocks = [
            sets_of_block(groups, by, ids, given, marks, start, start + block)
            for start in range(0, len(ids) - block + 1, block)
        ]
        both.append(list(zip(of_blocks, elements(chosen(spec, by, marks), ids, given, block))))
    for (sets, element), (other_sets, other_element) in zip(*both):
        assert (element is None) == (set(sets) == {NONE})  # a block without edits has the base's key
        assert (element == other_element) == (sets == other_sets)


def test_adapters_share_the_blocks_before_their_first_edit_and_no_others():
    ids = [*range(3, 43)]
    one, other = (elements(chosen("l4", "all", marks=False, name=name), ids, 40, 8) for name in ("a", "b"))
    assert one[:4] == other[:4] == [None] * 4
    assert None not in (one[4], other[4]) and one[4] != other[4]
    assert None not in elements(chosen("f2+l4", "all", marks=False), ids, 40, 8)[:1]


def test_layers_with_specs_of_their_own_make_one_element():
    facts = Facts("a", ["f2", "l2"], "all", reading("f2", "all", marks=False))
    ids = [*range(3, 19)]
    first, second = elements(Choice(facts), ids, 16, 8)
    assert first != second and None not in (first, second)
    assert elements(Choice(replace(facts, specs=["f2"])), ids, 16, 8)[1] is None


def test_generated_tokens_are_in_the_keys():
    """An answer is edited under `g`, and the same tokens given back as a prompt are not."""
    ids = [*range(3, 23)]
    said = elements(chosen("g", "all", marks=False), ids, 10, 5)
    given_back = elements(chosen("g", "all", marks=False), ids, 20, 5)
    assert said[:2] == [None, None] and None not in said[2:]
    assert given_back == [None] * 4


def test_the_core_adds_one_element_to_a_blocks_key():
    request = SimpleNamespace(
        sampling_params=SimpleNamespace(extra_args={CHOICE: json.loads(json.dumps(asdict(chosen("l4", "all"))))}),
        prompt_token_ids=[*range(3, 19)],
        prompt_embeds=None,
    )

    def inner(request, start, stop, number):
        return ((("cache_salt", "mine"),) if start == 0 else None), number + 1

    assert block_keys(inner, request, 0, 8, 0) == ((("cache_salt", "mine"),), 1)
    keys, number = block_keys(inner, request, 8, 16, 1)
    assert number == 2 and [name for name, _ in keys] == ["loreft"]
    request.sampling_params = None  # of a pooling model
    assert block_keys(inner, request, 8, 16, 1) == (None, 2)


def test_marks_come_with_the_adapter(llama, empty, tmp_path):
    path = adapter_for(llama, tmp_path, positions="f2+l2", tie="group")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    plain = read_adapter(path, empty)
    assert plain.facts.reading == Reading(response=[], instruction=[])
    marked = {**config, "response_template": RESPONSE, "instruction_template": INSTRUCTION}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(marked))
    facts = read_adapter(path, empty).facts
    assert facts.reading == reading("f2+l2", "group") and facts.fingerprint == fingerprint(path)
    assert facts == read_facts(path) == Facts.read(json.loads(json.dumps(asdict(facts))))


def test_a_group_that_does_not_say_its_span_cannot_be_made():
    """So no group can be scheduled as another one."""

    class Middle(Group):
        letter = "m"

    with pytest.raises(TypeError, match="abstract"):
        Middle(3)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_adapter_edits_its_own_tokens_alone(llama, empty, tmp_path, broken):
    """Sets with different numbers of tokens leave entries of the grid empty. Those must not reach token 0."""
    good = adapter_for(llama, tmp_path, "good", positions="f1+l2")
    loreft, model = server(llama, empty, adapters={"good": good})
    adapter = read_adapter(good, empty)
    factors = {name: each.map(lambda t: torch.full_like(t, broken)) for name, each in adapter.factors.items()}
    loreft.add("broken", replace(adapter, factors=factors, facts=replace(adapter.facts, fingerprint="broken")))
    ours, theirs = loreft.places[fingerprint(good)], loreft.places["broken"]
    h, block = torch.randn(13, 32), model.model.layers[1]
    loreft.prepare(pieces((4, 0, 4, NONE), (6, 0, 6, ours)))
    wanted = block(h[:10].clone())
    for requests in ([(4, 0, 4, NONE), (6, 0, 6, ours), (1, 0, 1, theirs), (2, 0, 9, ours)],):
        loreft.prepare(pieces(*requests))
        found = block(h.clone())
        torch.testing.assert_close(found[:10], wanted)
        assert found[11:].isfinite().all() and not found[10].isfinite().any()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60))
def test_group_by_weights_wastes_at_most_half(sets):
    work = group_by_weights(np.arange(len(sets)) + 3, np.array(sets), scale=np.arange(len(sets)) + 2.0)
    valid = work.valid[..., 0]
    lines = zip(work.sets, work.rows, valid)
    by_row = {int(row): int(number) for number, rows, is_valid in lines for row in rows[is_valid]}
    assert by_row == {n + 3: number for n, number in enumerate(sets)}
    assert {*(work.rows - 1 - work.scale[..., 0])[valid]} == {0}
    assert valid.sum() == len(sets) and work.rows.size <= 2 * len(sets) + len({*sets})


def adapter_for(model, tmp_path, name="adapter", config=LoReftConfig, scale=0.5, **fields):
    adapted = get_peft_model(model, config(task_type="CAUSAL_LM", **fields))
    randomise(adapted, scale)
    adapted.save_pretrained(tmp_path / name)
    adapted.unload()
    return str(tmp_path / name)


@pytest.fixture
def llama():
    return build("llama")


@pytest.fixture
def empty(llama):
    llama.config.architectures = [type(llama).__name__]  # as a saved config has it
    return skeleton(llama.config)


class Blocks(torch.nn.Module):
    """Stands for a model of vLLM: it has modules of the same names, and the tests choose their outputs."""

    def __init__(self, llama):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in llama.model.layers)


def server(llama, empty, graph_tokens=0, compiles=False, **options):
    model = Blocks(llama)
    return Server(model, empty, Options(**options), {}, torch.device("cpu"), compiles, graph_tokens), model


def pieces(*requests, scale=1.0):
    """The pieces of a step, from (count, computed, given, place) of each request."""
    count, computed, given, place = (np.array(values, dtype=np.int64) for values in zip(*requests))
    start, scales = np.cumsum(count) - count, np.full(len(count), scale)
    return Pieces(start, count, computed, given, place, scales, Turns.of([turns_of([(n, n)]) for n in given.tolist()]))


@pytest.mark.parametrize("formula", [name for name in INTERVENTIONS if name != "interchange"])
@pytest.mark.parametrize("tie", ["layer", "group", "position", "model"])
def test_read_adapter(llama, empty, tmp_path, formula, tie):
    path = adapter_for(llama, tmp_path, intervention=formula, tie=tie, positions="f2+l1")
    adapter = read_adapter(path, empty)
    assert [*adapter.plans] == [f"model.layers.{n}" for n in range(3)]
    assert adapter.sets == {"layer": 1, "group": 2, "position": 3, "model": 1}[tie]
    assert adapter.rank == (8 if INTERVENTIONS[formula].has_rank else 0)
    assert next(empty.parameters()).is_meta and not any("loreft" in name for name, _ in empty.named_modules())


@pytest.mark.parametrize("formula", [name for name in INTERVENTIONS if name != "interchange"])
@pytest.mark.parametrize("tie", ["layer", "position", "model"])
def test_adapters_of_one_config_are_read_into_one_model(llama, empty, tmp_path, formula, tie, monkeypatch):
    """What is read is what a reader of its own reads, also after a file that does not fit."""
    fields = dict(intervention=formula, tie=tie, positions="f2+l1")
    paths = [adapter_for(llama, tmp_path, name, scale=scale, **fields) for name, scale in (("a", 0.5), ("b", 0.7))]
    wanted = [read_adapter(path, empty) for path in paths]
    reader = Reader(empty)
    first = reader.read(paths[0])
    broken = tmp_path / "broken"
    shutil.copytree(paths[1], broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    gone = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, broken / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="Missing"):
        reader.read(str(broken))
    save_file({**tensors, gone: tensors[gone] * torch.inf}, broken / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="infinite or not a number"):
        reader.read(str(broken))
    monkeypatch.setattr("peft_reft.serving.adapters.PeftModel.from_pretrained", None)
    second = reader.read(paths[1])
    for own, other in zip((first, second), wanted):
        assert own.facts == other.facts and own.plans == other.plans and [*own.factors] == [*other.factors]
        for name, factors in own.factors.items():
            assert all(map(torch.equal, factors.tensors(), other.factors[name].tensors()))


def test_models_that_adapters_are_read_into_do_not_pile_up(llama, empty, tmp_path):
    reader = Reader(empty)
    for n in range(1, 12):
        assert reader.read(adapter_for(llama, tmp_path, str(n), positions=f"f{n}", r=1)).rank == 1
    assert len(reader.made) == 8


def test_files_that_are_sent_are_read_as_their_folder(llama, empty, tmp_path, monkeypatch):
    """Equal in fingerprint, specs and weights; the model is made once, and no file is left behind."""
    paths = [adapter_for(llama, tmp_path, str(n), positions="f2+l1", scale=0.1 * n) for n in (1, 2)]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    reader = Reader(empty)
    for path in paths:
        from_folder, sent = read_adapter(path, empty), reader.read(from_message(to_message(AdapterFiles.read(path))))
        assert sent.facts == from_folder.facts and sent.plans == from_folder.plans
        for name, factors in sent.factors.items():
            assert all(map(torch.equal, factors.tensors(), from_folder.factors[name].tensors()))
        assert not [*(tmp_path / "temporary").iterdir()]
    assert len(reader.made) == 1


class Cost(TorchDispatchMode):
    """Notes the operations of torch that run, and the shapes of what they return."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.operations.append((str(function), found.shape if isinstance(found, torch.Tensor) else None))
        return found


def calls_in(function, *args):
    """How many functions run, of Python and of C: stands for time, and does not depend on the machine."""
    events = []
    sys.setprofile(lambda frame, event, arg: events.append(event))
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return sum(event in ("call", "c_call") for event in events)


@pytest.mark.parametrize("spec", ["f7+l7", "all"])
def test_a_step_costs_what_it_edits_not_what_is_loaded(llama, empty, tmp_path, spec):
    """8 adapters that requests use, alone and among 512: the same calls, and operations on tensors of equal sizes."""
    adapter = read_adapter(adapter_for(llama, tmp_path, positions=spec, r=4), empty)
    costs = {}
    for loaded, active, prompt in ((8, 8, 40), (512, 8, 40), (512, 64, 40), (512, 8, 80)):
        loreft, model = server(llama, empty, max_adapters=512)
        for n in range(loaded):
            loreft.add(f"a{n}", replace(adapter, facts=replace(adapter.facts, fingerprint=f"{n}")))
        # Half of the requests decode, the others are new.
        kinds = [(prompt, 0, prompt), (1, 50, 40)]
        step = pieces(*((*kinds[n % 2], loreft.places[f"{n // 2 % active}"]) for n in range(128)))
        loreft.prepare(step)  # the first step of a plan numbers its groups
        calls = calls_in(loreft.prepare, step)
        with Cost() as cost:
            model.model.layers[0](torch.zeros(int(step.count.sum()), 32))
        gathered = [shape.numel() for name, shape in cost.operations if "index_select" in name]
        costs[loaded, active, prompt] = calls, sum(gathered), cost.operations
    assert costs[512, 8, 40] == costs[8, 8, 40]
    calls, gathered, _ = costs[512, 8, 40]
    assert {each[0] for each in costs.values()} == {calls}  # no call for each adapter, request or token
    assert costs[512, 64, 40][1] > gathered  # the weights of more adapters
    assert (costs[512, 8, 80][1] == gathered) is (
        spec == "f7+l7"
    )  # the same number of edited tokens, or twice as many


def test_memory_is_as_documented(llama, empty, tmp_path):
    path = adapter_for(llama, tmp_path, positions="f2+l2", tie="group", r=8)
    loreft, _ = server(llama, empty, max_adapters=20, adapters={"a": path})
    for edits in loreft.edits.values():
        found = sum(tensor.nbytes for stack in edits.table.stacks.values() for tensor in stack.tensors())
        assert found == ((20 + 1) * 2 + 1) * (2 * 8 * 32 + 8) * 4
    # 512 adapters on SmolLM2-135M, as docs/serving.md says.
    table = Table(576, 8, 512 + 1, torch.device("meta"))
    table.reserve(LINEAR)
    assert round(30 * sum(tensor.nbytes for tensor in table.stacks[LINEAR].tensors()) / 2**20) == 543


def test_a_batch_looks_at_its_requests_when_they_change(llama, empty, tmp_path):
    paths = {name: adapter_for(llama, tmp_path, name, scale=scale) for name, scale in (("a", 0.5), ("b", 0.7))}
    loreft, _ = server(llama, empty, adapters=paths)
    looked = []

    class Request:
        prompt_embeds = None
        prompt_token_ids = (3, 4, 5)

        def __init__(self, name):
            args = {CHOICE: asdict(Choice(loreft.at_start[name]))} if name else None
            self.params = SimpleNamespace(extra_args=args)

        @property
        def sampling_params(self):
            looked.append(self)
            return self.params

        def __eq__(self, other):
            raise AssertionError("requests are compared by identity")

    one, two, base = Request("a"), Request("b"), Request(None)
    batch = Batch(loreft)
    for computed, requests in ((0, [one, base]), (3, [one, base]), (4, [two, one, base]), (5, [base, one]), (6, [])):
        n = len(requests)
        step = Step(requests, np.arange(n + 1), np.full(n, computed), np.full(n, 3))
        found = batch.pieces(step)
        places = [
            loreft.places[fingerprint(paths["a" if each is one else "b"])] for each in requests if each is not base
        ]
        assert found.place[found.place != NONE].tolist() == places and len(found.place) == n
        assert found.turns.request.tolist() == [k for k, each in enumerate(requests) if each is not base]
        assert found.computed.tolist() == [computed] * n
    assert [*map(id, looked)] == [*map(id, (one, base, two))]


def test_a_step_edits_by_the_formula(llama, empty, tmp_path):
    """Two adapters of different ranks and formulas edit what the formulas say, written out here."""
    paths = {
        "a": adapter_for(llama, tmp_path, "a", r=2, positions="f2+l1"),
        "b": adapter_for(llama, tmp_path, "b", positions="all", intervention="red"),
    }
    loreft, model = server(llama, empty, adapters=paths)
    h, residual = torch.randn(9, 32), torch.randn(9, 32)
    of_a, of_b = (loreft.places[fingerprint(paths[name])] for name in "ab")
    loreft.prepare(pieces((6, 0, 6, of_a), (1, 4, 3, of_b), (2, 0, 5, NONE)))
    found, _ = model.model.layers[1]((h.clone(), residual))
    a, b = (read_adapter(paths[name], empty).factors["model.layers.1"] for name in "ab")
    wanted, full = h.clone(), h + residual
    for token in (0, 1, 5):
        wanted[token] += (a.coordinates.weight @ full[token] + a.coordinates.bias) @ a.basis
    wanted[6] += b.scale * full[6] + b.shift
    torch.testing.assert_close(found, wanted)
    assert torch.equal(found[[2, 3, 4, 7, 8]], h[[2, 3, 4, 7, 8]])
    loreft.prepare(pieces((1, 6, 6, of_a)))  # a decode step edits nothing
    assert all(not edits.work for edits in loreft.edits.values())


def test_heads_are_edited_in_the_input_of_the_projection(llama, empty, tmp_path):
    """Head by head, written out here. A worker that has some of the heads refuses, and so does a clash."""
    heads = adapter_for(llama, tmp_path, "heads", r=2, positions="l1", component="heads")
    outputs = adapter_for(llama, tmp_path, "outputs", r=2, positions="l1", target_modules=["o_proj"])
    model = Blocks(llama)
    for block in model.model.layers:
        block.self_attn = torch.nn.Module()
        block.self_attn.o_proj = torch.nn.Linear(32, 32)
    options = Options(adapters={"a": heads}, max_adapters=2, max_rank=8)
    loreft = Server(model, empty, options, {}, torch.device("cpu"), compiles=False, graph_tokens=0)
    loreft.prepare(pieces((3, 0, 3, loreft.places[fingerprint(heads)]), (2, 0, 2, NONE)))
    projection = model.model.layers[1].self_attn.o_proj
    h = torch.randn(5, 32)
    tensors = load_file(f"{heads}/adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.o_proj.loreft.loreft_weights"
    R, W, b = (tensors[f"{key}.{name}"] for name in "RWb")  # (heads, r, size), ..., (heads, r)
    wanted = h.clone()
    for head in range(4):
        mine = slice(8 * head, 8 * head + 8)
        wanted[2, mine] += R[head].T @ (W[head] @ h[2, mine] + b[head] - R[head] @ h[2, mine])
    torch.testing.assert_close(projection(h.clone()), wanted @ projection.weight.T + projection.bias)
    with pytest.raises(ValueError, match=r"edits the output of model\.layers\.0\.\S+, whose input another"):
        loreft.add("b", read_adapter(outputs, empty))
    for block in model.model.layers:
        block.self_attn.o_proj = torch.nn.Linear(16, 32)
        block.self_attn.o_proj.input_size_per_partition = 16
    with pytest.raises(ValueError, match=r"this worker has 16 of 32 dimensions \(allowed: tensor_parallel_size=1"):
        Server(model, empty, options, {}, torch.device("cpu"), compiles=False, graph_tokens=0)


def test_captured_graphs_read_the_buffers(llama, empty, tmp_path, monkeypatch):
    """Operations that were captured in one step edit the tokens of another step, or no tokens."""
    monkeypatch.setattr("peft_reft.serving.edits.is_capturing", lambda hidden: True)
    paths = {
        "a": adapter_for(llama, tmp_path, "a", positions="f1+g"),
        "b": adapter_for(llama, tmp_path, "b", r=2, positions="l2"),
    }
    loreft, _ = server(llama, empty, graph_tokens=16, adapters=paths)
    edits = loreft.edits["model.layers.0"]
    residual = torch.randn(8, 32)

    def run(hidden):
        hidden = hidden.clone()
        edits.apply(hidden, residual)
        return hidden

    loreft.prepare(pieces((8, 0, 8, NONE)))
    graph = make_fx(run)(torch.randn(8, 32))
    h = torch.randn(8, 32)
    for requests in (
        [(5, 0, 5, 0), (1, 9, 3, 0), (2, 3, 5, 1)],
        [(8, 0, 8, NONE)],
        [(1, 7, 7, 0), (7, 0, 7, 1)],
        [(8, 0, 8, 1)],
    ):
        loreft.prepare(pieces(*requests))
        wanted = h.clone()
        for key, work in edits.work:
            edits.table.edit(key, work, wanted, residual)
        torch.testing.assert_close(graph(h), wanted)
        assert torch.equal(wanted, h) == (requests == [(8, 0, 8, NONE)])


def test_graphs_hold_no_edits_of_prompts(llama, empty, tmp_path, monkeypatch):
    """With adapters that edit prompts, a captured graph has no operation of ours, and steps that edit avoid graphs."""
    monkeypatch.setattr("peft_reft.serving.edits.is_capturing", lambda hidden: True)
    path = adapter_for(llama, tmp_path, positions="f2+l1")
    answers = adapter_for(llama, tmp_path, "answers", positions="f2+g1")

    def operations(edits):
        def run(hidden, residual):
            edits.apply(hidden, residual)
            return hidden

        graph = make_fx(run)(torch.randn(8, 32), torch.randn(8, 32)).graph
        return [node for node in graph.nodes if node.op == "call_function"]

    loreft, _ = server(llama, empty, graph_tokens=16, adapters={"a": path})
    assert all(operations(edits) == [] for edits in loreft.edits.values())
    edited = [[(4, 0, 9, 0)], [(1, 8, 9, 0)], [(1, 12, 9, 0), (3, 6, 9, 0)], [(1, 1, 9, 0), (5, 0, 5, NONE)]]
    for requests in edited:
        assert loreft.prepare(pieces(*requests))
    plain = [[(1, 9, 9, 0)], [(8, 0, 8, NONE)], [(3, 3, 9, 0)], [(1, 20, 9, 0), (1, 3, 9, NONE)]]
    for requests in plain:
        assert not loreft.prepare(pieces(*requests))
    with pytest.raises(ValueError, match='"edit_answers": true'):
        loreft.add("answers", read_adapter(answers, empty))
    with pytest.raises(ValueError, match='"edit_answers": true'):
        server(llama, empty, graph_tokens=16, adapters={"b": answers}, edit_answers=False)

    for named, option in (({"a": path}, True), ({"b": answers}, None)):
        loreft, _ = server(llama, empty, graph_tokens=16, adapters=named, edit_answers=option)
        loreft.add("answers", read_adapter(answers, empty))
        assert all(operations(edits) for edits in loreft.edits.values())
        assert not any(loreft.prepare(pieces(*requests)) for requests in edited + plain)
    loreft, _ = server(llama, empty, adapters={"a": path})  # no graphs are captured
    loreft.add("answers", read_adapter(answers, empty))
    assert not any(loreft.prepare(pieces(*requests)) for requests in edited + plain)


def test_places_are_used_again(llama, empty, tmp_path):
    big = adapter_for(llama, tmp_path, "big", r=8, positions="f2+l2", tie="position")
    small = adapter_for(llama, tmp_path, "small", r=2, positions="f1")
    loreft, model = server(llama, empty, max_adapters=1, max_positions=4)
    loreft.add("big", read_adapter(big, empty))
    loreft.keep([])
    loreft.add("small", read_adapter(small, empty))
    alone, other = server(llama, empty, adapters={"small": small})
    h = torch.randn(4, 32)
    for each in (loreft, alone):
        each.prepare(pieces((4, 0, 4, 0)))
    assert torch.equal(model.model.layers[0](h.clone()), other.model.layers[0](h.clone()))


def test_a_stage_of_a_pipeline_edits_its_own_blocks(llama, empty, tmp_path):
    """What is in another stage's blocks is skipped; what is in its own and vLLM does not have is refused."""
    everywhere = adapter_for(llama, tmp_path, "everywhere", positions="f2", r=2)
    first = adapter_for(llama, tmp_path, "first", target_modules=["model.layers.0.mlp"], positions="l1", r=2)
    third = adapter_for(llama, tmp_path, "third", target_modules=["model.layers.2.mlp"], positions="l1", r=2)
    whole, one = server(llama, empty, adapters={"a": everywhere})
    model = Blocks(llama)
    options = Options(adapters={"a": everywhere, "b": first})
    stage = Server(model, empty, options, {}, torch.device("cpu"), False, 0, elsewhere={"model.layers.0"})
    assert {*stage.edits} == {"model.layers.1", "model.layers.2"}
    with pytest.raises(ValueError, match=r"edits model.layers.2.mlp, and vLLM.s Blocks has no module of that name"):
        stage.add("c", read_adapter(third, empty))
    step = [(5, 0, 5, 0), (3, 0, 3, stage.places[fingerprint(first)])]
    h = torch.randn(8, 32)
    stage.prepare(pieces(*step))
    whole.prepare(pieces(step[0], (3, 0, 3, NONE)))
    assert torch.equal(model.model.layers[0](h.clone()), h)
    for n in (1, 2):
        found = model.model.layers[n](h.clone())
        assert torch.equal(found, one.model.layers[n](h.clone())) and not torch.equal(found, h)


def test_what_does_not_fit_changes_nothing(llama, empty, tmp_path):
    plain = adapter_for(llama, tmp_path, "plain", r=2, positions="f1")
    limits = dict(max_adapters=2, max_rank=4, edit_answers=True)
    loreft, _ = server(llama, empty, adapters={"plain": plain}, compiles=True, graph_tokens=4, **limits)
    cases = {
        "max_rank=8": dict(r=8, positions="f1"),
        "max_positions=2": dict(r=2, positions="f1+l1", tie="group"),
        "no new hooks": dict(r=2, positions="f1", component="mlp"),
        "captured graphs": dict(r=2, positions="f1", gate=True),
    }
    layers = torch.nn.ModuleList(torch.nn.Sequential() for _ in range(3))
    for n, layer in enumerate(layers):
        layer.add_module("mlp", torch.nn.Identity())
        loreft.modules.add(f"model.layers.{n}.mlp")
    before = {name: edits.table.stacks[LINEAR].basis.clone() for name, edits in loreft.edits.items()}
    for message, fields in cases.items():
        adapter = read_adapter(adapter_for(llama, tmp_path, message, **fields), empty)
        with pytest.raises(ValueError, match=message):
            loreft.add("new", adapter)
    good = read_adapter(plain, empty)
    for name in ("second", "third"):
        loreft.add(name, replace(good, facts=replace(good.facts, fingerprint=name)))
    loreft.add("the same as the first", good)  # takes no place
    with pytest.raises(ValueError, match="'fourth' finds no place: requests still use"):
        loreft.add("fourth", replace(good, facts=replace(good.facts, fingerprint="fourth")))
    loreft.keep([good.facts.fingerprint])
    assert [*loreft.places] == [good.facts.fingerprint] and {*loreft.edits} == {f"model.layers.{n}" for n in range(3)}
    for name, edits in loreft.edits.items():
        assert torch.equal(edits.table.stacks[LINEAR].basis[0], before[name][0])


def test_what_cannot_be_served(llama, empty, tmp_path):
    lora = adapter_for(llama, tmp_path, "lora", LoraConfig, target_modules=["q_proj"])
    head = adapter_for(llama, tmp_path, "head", modules_to_save=["lm_head"])
    swap = adapter_for(llama, tmp_path, "swap", intervention="interchange", positions="l1")
    wide = adapter_for(build("phi"), tmp_path, "wide", target_modules=["model.final_layernorm"])
    missing = tmp_path / "missing"
    missing.mkdir()
    good = adapter_for(llama, tmp_path, "good", positions="f1")
    cut = tmp_path / "cut"
    shutil.copytree(good, cut)
    weights = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    other = tmp_path / "other"
    shutil.copytree(good, other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    for path, message in (
        (lora, "not of LoReFT"),
        (head, "modules_to_save"),
        (swap, "interchange"),
        (wide, "(?i)target_modules|final_layernorm"),
        (str(missing), "has no adapter_config.json"),
        (str(tmp_path / "nowhere"), "no folder"),
        (str(cut), "damaged or cut short"),
        (str(other), "does not fit LlamaForCausalLM"),
    ):
        with pytest.raises(ValueError, match=message):
            read_adapter(path, empty)
    assert fingerprint(good) != fingerprint(str(other))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"adaptors": {}}, "'adaptors'; allowed are adapters, max_adapters"),
        ("emoji", "'emoji'; allowed"),
        ({"adapters": ["a"]}, "loreft.adapters=\\['a'\\]"),
        ({"adapters": {"a": 3}}, "loreft.adapters\\['a'\\]=3"),
        ({"adapters": {"a\n": "x"}}, "an adapter's name is a string of 1 to 200 printable characters"),
        ({"resolve_from": "/nowhere"}, "loreft.resolve_from='/nowhere': expected a folder that exists"),
        ({"resolve_from": ["hub"]}, "loreft.resolve_from=\\['hub'\\]"),
        ({"max_rank": 0}, "loreft.max_rank=0"),
        ({"max_adapters": True}, "loreft.max_adapters=True"),
        ({"edit_answers": 1}, "loreft.edit_answers=1: expected true or false"),
        ({"adapters": {"a": "x", "b": "y"}, "max_adapters": 1}, "loreft.max_adapters=1, but 2 are named"),
    ],
)
def test_options(given, message):
    assert Options.read({"other": 1}) is None and Options.read(None) is None
    with pytest.raises(ValueError, match=message):
        Options.read({"loreft": given})


def test_every_formula_fits_its_table():
    for name, formula in INTERVENTIONS.items():
        if name != "interchange":
            factors = formula(d=16, r=2 if formula.has_rank else None, init_weights=False).eval().current_factors()
            table = Table(16, 4, 3, torch.device("cpu"))
            table.write(1, factors)
            h = torch.randn(5, 16)
            wanted = h + factors.edit(h)
            found = h.clone()
            one = torch.ones(5, 1)
            table.edit_all(formula_key(factors), torch.ones(5, dtype=torch.long), one, found, None)
            torch.testing.assert_close(found, wanted)
            table.edit_all(formula_key(factors), torch.full((5,), 3), one, found, None)
            torch.testing.assert_close(found, wanted)  # the set that edits nothing


@pytest.mark.parametrize("captured", [False, True])
def test_a_request_scales_its_edits(llama, empty, tmp_path, captured, monkeypatch):
    monkeypatch.setattr("peft_reft.serving.edits.is_capturing", lambda hidden: captured)
    path = adapter_for(llama, tmp_path, positions="f2", tie="group")
    loreft, model = server(llama, empty, graph_tokens=8 * captured, adapters={"a": path}, edit_answers=True)
    h = torch.randn(4, 32)
    outputs = {}
    for scale in (1.0, 0.25, -2.0, 0.0, 1.0):
        loreft.prepare(pieces((4, 0, 4, 0), scale=scale))
        outputs[scale] = model.model.layers[0](h.clone())
    assert not torch.allclose(outputs[1.0][:2], h[:2]) and torch.equal(outputs[0.0], h)
    for scale, found in outputs.items():
        torch.testing.assert_close(found, h + scale * (outputs[1.0] - h))


def test_scale_and_prompt_length_are_in_the_keys():
    ids = [*range(3, 23)]
    plain, scaled = (elements(chosen("l4", "all", marks=False, **more), ids, 20, 5) for more in ({}, {"scale": 0.5}))
    assert plain[:3] == scaled[:3] == [None] * 3 and None not in (plain[3], scaled[3]) and plain[3] != scaled[3]
    scored = elements(chosen("l4", "all", marks=False, prompt_length=10), ids, 20, 5)
    assert scored[1] is not None and scored[0] is scored[2] is scored[3] is None
    asked = elements(chosen("l4", "all", marks=False), ids[:10], 10, 5)
    assert scored[:2] == asked


@pytest.mark.parametrize(
    ("args", "key"),
    [
        ({}, None),
        ({"loreft": "a", "loreft_scale": 2, "loreft_prompt_length": 5, "other": object()}, None),
        ({"loreft": "a", "loreft_scale": True}, "loreft_scale"),
        ({"loreft": "a", "loreft_scale": "1"}, "loreft_scale"),
        ({"loreft": "a", "loreft_scale": float("nan")}, "loreft_scale"),
        ({"loreft": "a", "loreft_prompt_length": 0}, "loreft_prompt_length"),
        ({"loreft": "a", "loreft_prompt_length": 3.0}, "loreft_prompt_length"),
        ({"loreft_scale": 2}, "loreft_scale"),
        ({"loreft_prompt_length": 2}, "loreft_prompt_length"),
        ({"loreft": "a", "loreft_strength": 2}, "loreft_strength"),
        ({"loreft": "a", "loreft_choice": {}}, "loreft_choice"),
    ],
)
def test_what_a_request_may_say(args, key):
    wrong = check_request(args)
    assert (wrong and wrong[0]) == key


class Engine:
    """Stands for an engine's core with two workers, in which `places` hold what is loaded."""

    def __init__(self, most=2):
        self.workers, self.requests, self.failed, self.folders = [set(), set()], {}, [], {}
        self.scheduler, self.model_executor = SimpleNamespace(requests=self.requests), self
        self.loreft = core.Adapters(most, {}, {})

    def collective_rpc(self, method, args):
        return [getattr(self, method)(worker, number, *args) for number, worker in enumerate(self.workers)]

    def loreft_add(self, worker, number, name, path):
        fingerprint = self.folders.get(path, [path, path])[number]
        if fingerprint == "bad":
            return {"error": f"{path} is bad"}
        worker.add(fingerprint)
        return asdict(Facts(fingerprint, ["l1"], "all", Reading([], [])))

    def loreft_keep(self, worker, number, fingerprints):
        worker &= {*fingerprints}

    def _send_error_outputs_to_client(self, requests, client):
        self.failed += requests

    def request(self, id, name):
        return SimpleNamespace(
            request_id=id, client_index=0, sampling_params=SimpleNamespace(extra_args={"loreft": name})
        )

    def read(self, request):
        core.preprocess(lambda engine, request: None, self, request)

    def take(self, request):
        core.add_request(lambda engine, request: self.requests.update({request.request_id: request}), self, request)

    def chosen(self, request):
        return request.sampling_params.extra_args["loreft_choice"]["facts"]["fingerprint"]


def test_weights_stay_until_no_request_uses_them():
    engine = Engine()
    assert core.add(engine, "a", "v1", replace=False)["fingerprint"] == "v1"
    running, coming = engine.request("1", "a"), engine.request("2", "a")
    engine.read(running)
    engine.take(running)
    engine.read(coming)  # and another thread replaces the adapter before the scheduler has the request
    core.add(engine, "a", "v2", replace=True)
    assert engine.workers == [{"v1", "v2"}] * 2
    engine.take(coming)
    later = engine.request("3", "a")
    engine.read(later)
    engine.take(later)
    assert [engine.chosen(each) for each in (running, coming, later)] == ["v1", "v1", "v2"]
    del engine.requests["1"], engine.requests["2"]
    assert core.remove(engine, "a") is None
    assert engine.workers == [{"v2"}] * 2 and engine.failed == []
    late = engine.request("4", "a")
    engine.read(late)
    engine.take(late)
    assert engine.failed == ["4"] and "4" not in engine.requests
    engine.requests.clear()
    core.add(engine, "b", "v1", replace=True)
    assert engine.workers == [{"v1"}] * 2 and [*core.known(engine)] == ["b"]
    assert "no adapter 'a'. There are: b" in core.remove(engine, "a")


def test_an_adapter_that_not_all_workers_can_load_is_in_none():
    engine = Engine()
    core.add(engine, "a", "v1", replace=False)
    engine.folders = {"half": ["new", "bad"], "changed": ["one", "other"]}
    assert core.add(engine, "b", "half", replace=False) == {"error": "half is bad"}
    assert "changed while it was read" in core.add(engine, "b", "changed", replace=False)["error"]
    assert "'a' already" in core.add(engine, "a", "v2", replace=False)["error"]
    core.add(engine, "b", "v1", replace=False)  # the same weights under another name
    assert "2 adapters already" in core.add(engine, "c", "v3", replace=False)["error"]
    assert "1 to 200 printable characters" in core.add(engine, "a" * 201, "v3", replace=True)["error"]
    assert engine.workers == [{"v1"}] * 2 and [*core.known(engine)] == ["a", "b"]


def test_who_gives_up_waiting_finds_the_adapter_later():
    """A client that goes away while an adapter is loaded or dropped does not leave front end and core at odds."""
    names = set()

    class Core:
        async def call_utility_async(self, method, name, *args):
            await asyncio.sleep(0.2)
            (names.add if method == "loreft_add" else names.discard)(name)
            return asdict(Facts("f", ["l1"], "all", Reading([], []))) if method == "loreft_add" else None

    engine = SimpleNamespace(engine_core=Core(), input_processor=SimpleNamespace(loreft=Offered(Options(), {}, {})))

    async def give_up(call):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(call, 0.05)

    async def run():
        await give_up(add_adapter_async(engine, "a", "folder"))
        assert list_adapters(engine) == []
        await asyncio.sleep(0.4)
        assert list_adapters(engine) == ["a"] and names == {"a"}
        await give_up(remove_adapter_async(engine, "a"))
        assert list_adapters(engine) == []

    asyncio.run(run())


def test_where_an_adapter_is_loaded_from_on_its_first_use(tmp_path):
    for name in ("a", "a.b-c_1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    folder = Offered(Options(resolve_from=str(tmp_path)), {}, {})
    assert [folder.resolve(name) for name in ("a", "a.b-c_1")] == [str(tmp_path / "a"), str(tmp_path / "a.b-c_1")]
    for name in (
        "b",
        "empty",
        "",
        ".",
        "..",
        "a/",
        "/a",
        "./a",
        f"../{tmp_path.name}/a",
        str(tmp_path / "a"),
        "a\0",
        "a\n",
    ):
        assert folder.resolve(name) is None, name
    hub = Offered(Options(resolve_from="hub"), {}, {})
    assert hub.resolve("owner/a.b-c_1") == "owner/a.b-c_1"
    for name in ("a", "../a", "owner/..", "owner/a/b", "/a", "owner/", "./a", "owner/a\n", "https://a/b", ["owner/a"]):
        assert hub.resolve(name) is None, name
    assert Offered(Options(), {}, {}).resolve("a") is None


def test_which_adapter_makes_room():
    offered = Offered(Options(), {}, {})
    facts = Facts("f", ["l1"], "all", Reading([], []))
    for name in ("named", "old", "new", "running"):
        offered.note(name, facts, name)
    for name in ("old", "new", "running"):
        offered.loaded_on_use(name)
    for name in ("old", "new", "old", "named"):
        offered.used(name)
    assert offered.least_recently_used({"running": 2}) == "new"
    offered.forget(["new"])
    assert offered.least_recently_used({"running": 2}) == "old"
    offered.note("old", facts, "elsewhere")  # loaded by name since
    assert offered.least_recently_used({"running": 2}) is None
    assert offered.least_recently_used({}) == "running"


def test_lora_modules_on_the_command_line(tmp_path):
    for name, peft_type in (("emoji", "LOREFT"), ("sql", "LORA")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type}))

    def args(config, *names, base=None):
        modules = [SimpleNamespace(name=name, path=str(tmp_path / name), base_model_name=base) for name in names]
        return SimpleNamespace(lora_modules=modules or None, additional_config=config)

    def read(given):
        return from_cli_args(
            lambda args: (args.additional_config, [each.name for each in args.lora_modules or []]), given
        )

    path = str(tmp_path / "emoji")
    assert read(args({})) == ({}, [])
    assert read(args({}, "sql", "nowhere")) == ({}, ["sql", "nowhere"])
    assert read(args({}, "sql", "emoji")) == ({"loreft": {"adapters": {"emoji": path}}}, ["sql"])
    config = {"loreft": {"max_rank": 4, "adapters": {"mine": "x", "emoji": path}}, "other": 1}
    assert read(args(config, "emoji")) == (config, [])
    with pytest.raises(ValueError, match=r"--lora-modules emoji=.*: loreft.adapters has 'emoji' from elsewhere"):
        read(args({"loreft": {"adapters": {"emoji": "elsewhere"}}}, "emoji"))
    with pytest.raises(ValueError, match=r"--lora-modules emoji: base_model_name='tiny'"):
        read(args({}, "emoji", base="tiny"))


def test_serving_needs_no_vllm_until_vllm_calls_it():
    assert importlib.util.find_spec("vllm") is None, "this suite shows that it goes without"
    import peft_reft.serving

    assert callable(peft_reft.serving.register)
