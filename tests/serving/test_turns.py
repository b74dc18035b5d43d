"""The turns of a chat are edited as transformers edits them. The prefix cache is read if the edits are the same."""

import random

import pytest

from peft_reft.positions.turns import answers_of
from serving.engines import answer, ask, check, engine, make, note_preempted, prompt_of, quick_alone, steps

USER, TOOL, ASSISTANT = [90, 92], [90, 93], [90, 91, 95]
MARKS = {"response_template": [ASSISTANT], "instruction_template": [USER, TOOL]}
SPECS = {
    "f7+l7": dict(positions="f7+l7"),
    "l": dict(positions="l4"),
    "l~, by group": dict(positions="f2+l3~2", tie="group"),
    "by position": dict(positions="f2+l3+g2", tie="position"),
    "p": dict(positions="p"),
    "g": dict(positions="g"),
    "p+g by group": dict(positions="p+g", tie="group"),
    "all": dict(positions="all"),
    "f": dict(positions="f5"),
}
TURNS = 3
BLOCK = 32


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    served = make("llama", str(tmp_path_factory.mktemp("turns")))
    for name, fields in SPECS.items():
        served.add(name, **fields, **MARKS)
        served.add(f"{name}, no marks", **fields)
    return served


@pytest.fixture(scope="module")
def llm(chats):
    with engine(chats, block_size=BLOCK, max_model_len=512) as running:
        yield running


def words(length, seed):
    return [token % 80 + 3 for token in prompt_of(length, seed)]


NO_MARKS = [f"{name}, no marks" for name in SPECS]
QUICK = [*SPECS, "f7+l7, no marks", "all, no marks"]


@pytest.mark.parametrize("name", quick_alone(QUICK, [*SPECS, *NO_MARKS]))
def test_a_chat_turn_by_turn(chats, llm, name):
    """Each turn is sent with its history, most of which is cached. The last one has a tool's result."""
    marked = not name.endswith("no marks")
    ids, cached = words(33, 100 + [*SPECS, *NO_MARKS].index(name)), []  # adapters share blocks without edits
    for turn in range(TURNS):
        ids = ids + (TOOL if turn == TURNS - 1 else USER) + words(9 + turn, turn) + [94] + ASSISTANT
        output = ask(llm, [(ids, name)], 20)[0]
        check(chats, [(ids, name)], [output], 20)
        cached.append(output.num_cached_tokens)
        before = len(ids)
        ids = ids + answer(output.outputs[0])[0]
        # If this fails, the model said a header by chance, and the next turn counts it (docs/serving.md).
        assert answers_of(ids, [ASSISTANT], [USER, TOOL])[-1] == (before, len(ids))
    # Without marks the end of the last turn's prompt was edited otherwise, so blocks from there on are not found.
    assert cached[0] == 0 and min(cached[1:]) > 0
    if marked:
        assert cached[-1] >= (before - 20) // BLOCK * BLOCK - BLOCK


@pytest.mark.parametrize("name", ["f7+l7", "by position", "p+g by group"])
def test_words_put_in_the_assistants_mouth(chats, llm, name):
    history = words(20, 5) + USER + words(6, 6) + ASSISTANT
    requests = [(history + words(n, 7), name) for n in (0, 1, 30, 50)]
    check(chats, requests, ask(llm, requests, 6), 6)
    for request in requests:
        check(chats, [request], ask(llm, [request], 6), 6)


def chain(chats, llm, seed, number, at_once=1, start=40, tokens=5):
    """Requests that go on from each other, or branch off, each with another adapter or none, all in one cache.

    Returns how many of their tokens were found in the cache.
    """
    draw = random.Random(seed)
    names = [None, *SPECS, *NO_MARKS]
    texts, cached, requests = [words(start, 200 + seed)], 0, []
    for n in range(number):
        text = draw.choice(texts[-3:])
        if draw.random() < 0.3:
            text = text[: draw.randrange(start // 2, len(text))]
        if draw.random() < 0.6:
            text = text + draw.choice([USER, TOOL]) + words(draw.randrange(1, 12), n) + [94] + ASSISTANT
        requests.append((text, draw.choice(names)))
        if len(requests) == at_once:
            outputs = steps(llm, requests, tokens)
            check(chats, requests, outputs, tokens)
            cached += sum(output.num_cached_tokens for output in outputs)
            texts += [text + answer(output.outputs[0])[0] for (text, _), output in zip(requests, outputs)]
            texts = [text for text in texts if len(text) < 300]
            requests = []
    return cached


@pytest.mark.parametrize("seed", quick_alone([0], [0, 1, 2]))
def test_chains_of_requests_under_mixed_adapters(chats, llm, seed):
    assert chain(chats, llm, seed, 24) > 0


@pytest.mark.slow
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("budget", [24, 512])
@pytest.mark.parametrize("roomy", [False, True], ids=["preempted", "roomy"])
def test_chains_in_other_engines(chats, block, budget, roomy):
    """Blocks of other sizes, prompts cut into chunks, requests preempted and computed again, several at once."""
    settings = dict(
        block_size=block,
        max_num_batched_tokens=budget,
        max_num_seqs=8,
        max_model_len=384,
        num_gpu_blocks_override=(4000 if roomy else 600) // block,
    )
    with engine(chats, **settings) as llm:
        preempted = note_preempted(llm)
        cached = sum(chain(chats, llm, seed, 12, at_once=4, start=150, tokens=40) for seed in (block, block + 1))
        assert cached if roomy else preempted, "this tests nothing"


@pytest.mark.parametrize("budget", quick_alone([16], [16, 40]))
def test_chunks_that_cut_anywhere(chats, budget):
    prompt = words(20, 8)
    for turn in range(3):
        prompt = prompt + USER + words(5, turn) + ASSISTANT + words(17, 10 + turn)
    requests = [(prompt + USER + words(n, 20) + ASSISTANT, name) for n, name in enumerate(SPECS)]
    with engine(chats, named=[*SPECS], max_num_batched_tokens=budget, max_num_seqs=8, block_size=BLOCK) as llm:
        check(chats, requests, ask(llm, requests, 6), 6)
