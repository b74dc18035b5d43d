"""Continuous batching of transformers gives each request what `generate` gives it alone."""

import gc

import pytest
import torch
from conftest import build, greedy_answer, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators.cache_allocator import compute_block_hash
from transformers.generation.continuous_batching.requests import RequestState

from peft_reft import LoReftConfig
from peft_reft.positions.spec import Positions
from peft_reft.positions.wanted import Wanted
from peft_reft.serving.schedule import ServedPlan
from peft_reft.tuner.forward import LayerPlan
from peft_reft.tuner.paged import EditedTokens, EditsOfBlocks, hash_block

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

NEW = 6
SPECS = ["f3+l2", "l1", "l3~2", "p", "g", "g2", "all", "f2+l2+g3"]
USER, ASSISTANT = [50, 51], [50, 52]
MARKS = {"response_template": [ASSISTANT], "instruction_template": [USER]}


def adapted(spec, family="llama", **fields):
    config = LoReftConfig(task_type="CAUSAL_LM", **{"r": 4, "positions": spec, **fields})
    model = get_peft_model(build(family), config).eval()
    randomise(model)
    return model


def words(length, seed):
    return torch.randint(3, 48, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def requests():
    """Prompts of many lengths; some of them begin alike."""
    rows = [words(length, length) for length in (5, 9, 30, 3, 17)]
    return [*rows, [*rows[2][:20], 7, 8, 9], rows[2], rows[4] + words(6, 1)]


def generation(**more):
    return GenerationConfig(**{"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, **more})


def small(**more):
    """Few blocks of four tokens, and steps of sixteen, so that prompts are cut."""
    sizes = dict(page_size=4, num_blocks=200, max_batch_tokens=16, return_logprobs=True)
    return ContinuousBatchingConfig(**{**sizes, **more})


def check(model, prompts, outputs, tokens=NEW):
    assert len(outputs) == len(prompts)
    for prompt, output in zip(prompts, outputs):
        wanted = greedy_answer(model, prompt, tokens)
        assert output.error is None and output.prompt_ids == prompt
        assert output.generated_tokens == wanted[0]
        assert output.logprobs == pytest.approx(wanted[1], abs=2e-4)


def run(model, prompts, config=None, **more):
    return [*model.generate_batch(prompts, generation(**more), continuous_batching_config=config or small()).values()]


@pytest.mark.cell("Device layouts", "Continuous batching (`generate_batch`, `init_continuous_batching`)")
@pytest.mark.parametrize(
    "spec", [spec if spec in ("f3+l2", "g2", "all") else pytest.param(spec, marks=pytest.mark.slow) for spec in SPECS]
)
def test_each_request_is_answered_as_alone(spec):
    model = adapted(spec)
    check(model, requests(), run(model, requests()))


@pytest.mark.parametrize(
    "family", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "qwen2"))]
)
def test_families(family):
    model = adapted("f2+l2+g", family)
    check(model, requests(), run(model, requests()))


@pytest.mark.parametrize(
    "fields",
    [
        dict(tie="position", positions="f3+l2"),
        dict(positions={"0": "f5", "1-": "l2+g1"}),
        pytest.param(dict(tie="group", positions="p+g2"), marks=pytest.mark.slow),
        pytest.param(dict(intervention="red", r=8, positions="f2+l1"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_weights_of_their_own(fields):
    model = adapted(fields["positions"], **{name: value for name, value in fields.items() if name != "positions"})
    check(model, requests(), run(model, requests()))


@pytest.mark.parametrize("spec", ["f3+l2", *(pytest.param(spec, marks=pytest.mark.slow) for spec in ("l1+g2", "p+g"))])
def test_turns_of_a_chat(spec):
    """Marks say where the answers in a request are. A turn shares the blocks of the turn before."""
    model = adapted(spec, **MARKS)
    first = USER + words(9, 1) + ASSISTANT
    second = first + words(8, 2) + USER + words(7, 3) + ASSISTANT
    prompts = [first, second, second + words(5, 4)]
    check(model, prompts, run(model, prompts))


def test_requests_that_are_computed_anew(monkeypatch):
    """Too few blocks: requests lose theirs and begin again, with what they generated behind their prompt."""
    anew, begin_again = [], RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState, "create_equivalent_initial_request", lambda state: anew.append(state) or begin_again(state)
    )
    model = adapted("f3+l2+g3")
    prompts = [words(12, n) for n in range(6)]
    sizes = small(num_blocks=24, max_batch_tokens=32, cpu_offload_space=0)
    check(model, prompts, run(model, prompts, sizes, max_new_tokens=24), 24)
    assert any(state.generated_tokens for state in anew), "no request was computed anew, so this tests nothing"


def test_several_answers_to_a_prompt():
    """Requests that are forked when their prompt has been read. `top_k=1` samples the likeliest token."""
    model = adapted("f3+l2+g2")
    prompts = [words(9, 1), words(14, 2)]
    outputs = run(model, prompts, num_return_sequences=3, do_sample=True, top_k=1)
    wanted = [greedy_answer(model, prompt, NEW)[0] for prompt in prompts for _ in range(3)]
    assert [output.generated_tokens for output in outputs] == wanted


@pytest.fixture
def matches(monkeypatch):
    """How many tokens of each request are found in the cache."""
    found, search = [], PagedAttentionCache.search_prefix_match

    def note(cache, request_id, ids):
        found.append(search(cache, request_id, ids))
        return found[-1]

    monkeypatch.setattr(PagedAttentionCache, "search_prefix_match", note)
    return found


@pytest.mark.parametrize(
    ("spec", "shared"),
    [
        ("l2", 36),
        ("f40+l40", 20),
        *(pytest.param(spec, 36, marks=pytest.mark.slow) for spec in ("g", "f3+l2", "p")),
    ],
)
def test_blocks_are_shared_up_to_the_first_edit_that_differs(matches, spec, shared):
    """Two questions to one document, one after the other in one run; then the first one to the base.

    Blocks have four tokens, the document 38, the questions 47 and 52 with it. `f40+l40` halves them, so the first 23
    and 26 tokens are edited as beginnings.
    """
    model = adapted(spec, tie="group")
    document = words(38, 1)
    prompts = [document + words(9, 2), document + words(14, 3)]
    with model.continuous_batching_context_manager(
        generation(), continuous_batching_config=small(max_batch_tokens=64)
    ) as manager:
        outputs = [ask(manager, prompt) for prompt in prompts]
        check(model, prompts, outputs)
        with model.disable_adapter():
            base = ask(manager, prompts[0])
            check(model, prompts[:1], [base])
    assert matches[0] == 0 and matches[1] == shared
    assert matches[2] == (0 if spec[0] in "fp" else 44)  # the base finds what was not edited


def ask(manager, prompt):
    name = manager.add_request(prompt, max_new_tokens=NEW)
    while True:
        result = manager.get_result(request_id=name, timeout=5)
        if result is not None:
            return result


@pytest.mark.parametrize("how", ["between runs", "in a pause"])
def test_changed_weights_do_not_read_old_blocks(how):
    """As in reinforcement learning: the same prompts, after each step of the optimiser."""
    model, prompts = adapted("f4+l2"), [words(30, 1), words(22, 2)]
    if how == "between runs":
        for seed in (1, 2):
            randomise(model, seed=seed)
            outputs = model.generate_batch(
                prompts, generation(), continuous_batching_config=small(), persistent_manager=True
            )
            check(model, prompts, outputs.values())
        model.destroy_cached_continuous_batching_manager()
        return
    with model.continuous_batching_context_manager(generation(), continuous_batching_config=small()) as manager:
        check(model, prompts, [ask(manager, prompt) for prompt in prompts])
        with manager.pause():
            randomise(model, seed=2)
        check(model, prompts, [ask(manager, prompt) for prompt in prompts])


@given(
    ids=st.lists(st.integers(0, 9), min_size=2, max_size=30),
    spec=st.sampled_from(SPECS),
    sharing=st.sampled_from(["all", "group", "position"]),
    block=st.integers(1, 6),
    lengths=st.data(),
)
@settings(deadline=None, max_examples=200)
def test_blocks_have_one_hash_if_and_only_if_their_edits_are_the_same(ids, spec, sharing, block, lengths):
    """Two requests of the same tokens, of which one was given more. Serving says by itself what is edited."""
    groups = Positions.parse(spec).groups
    if sharing == "position" and any(group.count is None for group in groups):
        sharing = "group"
    wanted = Wanted(groups, None)
    both = []
    for _ in range(2):
        length = lengths.draw(st.integers(1, len(ids)))
        edits = EditsOfBlocks("weights", [LayerPlan(wanted, groups, sharing, dropout=0.0)], ids[:length])
        tokens, hashes, plain = EditedTokens(ids, edits), [], []
        served = ServedPlan(groups, sharing)
        for start in range(0, len(ids) - block + 1, block):
            hashes.append(hash_block(compute_block_hash, None, tokens[start : start + block]))
            plain.append(served.sets_in([(length, length)], start, start + block).tolist())
        both.append(list(zip(plain, hashes)))
        for number, (sets, value) in enumerate(both[-1]):
            untouched = compute_block_hash(None, ids[number * block : (number + 1) * block])
            assert (value == untouched) == (set(sets) == {-1})
    for (sets, value), (other_sets, other_value) in zip(*both):
        assert (value == other_value) == (sets == other_sets)


def test_other_adapters_and_none():
    model = adapted("f3+l2")
    model.add_adapter("other", LoReftConfig(task_type="CAUSAL_LM", r=2, positions="l4+g"))
    randomise(model, seed=5)
    prompts = requests()[:4]
    answers = []
    for name in ("other", "default"):
        model.set_adapter(name)
        answers.append(run(model, prompts))
        check(model, prompts, answers[-1])
    with model.disable_adapter():
        answers.append(run(model, prompts))
        check(model, prompts, answers[-1])
    assert len({str([output.generated_tokens for output in outputs]) for outputs in answers}) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(use_cuda_graph=True), "use_cuda_graph=True: a graph does not know"),
        (dict(use_cuda_graph=(False, True)), r"use_cuda_graph=\(False, True\)"),
        (dict(varlen_compile_config=CompileConfig()), "varlen_compile_config=.*allowed: None"),
        (dict(default_compile_level=1), "varlen_compile_config=.*default_compile_level"),
    ],
)
def test_steps_that_would_skip_the_hooks_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        run(adapted("l1"), [[5, 6, 7]], small(**settings))


@pytest.mark.parametrize("name", ["adapter_names", "intervention_positions", "subspaces"])
def test_arguments_that_it_would_drop_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=.*`generate_batch` has no such argument"):
        adapted("l1").generate_batch([[5, 6, 7]], generation(), **{name: ["default"]})


def test_a_step_of_a_run_that_began_before_the_adapter_is_refused():
    """Nobody noted its manager, so nothing says where prompts end."""
    base = build("llama")
    manager = base.init_continuous_batching(generation(), small())
    model = get_peft_model(base, LoReftConfig(task_type="CAUSAL_LM", positions="l1"))
    manager.start()
    try:
        result = ask(manager, [5, 6, 7])
    finally:
        manager.stop(block=True)
    assert "LoReFT knows it in `generate_batch`" in result.error
    assert model is not None


def test_nothing_keeps_a_manager_alive():
    model = adapted("l1")
    run(model, [[5, 6, 7]])
    gc.collect()
    assert all(each() is None for each in model.get_base_model().peft_reft_attachment.managers)


def test_without_the_adapter_it_is_transformers_own():
    model = adapted("f3+l2")
    base = model.unload()
    assert "generate_batch" not in vars(base) and "init_continuous_batching" not in vars(base)
    outputs = run(base, [[5, 6, 7]])
    assert outputs[0].generated_tokens == run(build("llama"), [[5, 6, 7]])[0].generated_tokens
