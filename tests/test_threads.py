"""One model, several threads: each computes what it computes alone, and a failure leaves nothing behind."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import build, make_tokenizer, randomise
from peft import get_peft_model
from transformers import LogitsProcessor, TextIteratorStreamer

from peft_reft import LoReftConfig

USER, ASSISTANT = [60, 61], [60, 62]
MARKS = dict(response_template=[ASSISTANT], instruction_template=[USER])
THREADS = 8
ATOL = 1e-5


@pytest.fixture(autouse=True)
def _threads_take_turns_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def adapted(spec="f2+l2+g3", **fields):
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=4, positions=spec, **fields))
    randomise(model)
    return model.eval()


def prompt(number, rows=1):
    """Make a prompt of a length of its own."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(6, 40, (rows, 4 + 3 * number), generator=generator)


def together(*jobs):
    """Start the functions at once, each in a thread of its own; return their results."""
    barrier = threading.Barrier(len(jobs))

    def run(job):
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(run, job) for job in jobs]]


def written(model, ids, **options):
    """Return the logits (rows, tokens, vocabulary) of a greedy answer."""
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    out = model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)
    return torch.stack(out.logits, 1)


def alike(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, atol=ATOL, rtol=0)


@pytest.mark.parametrize("spec", ["f2+l2", "f2+l2+g3", "all"])
def test_streams_at_once(spec):
    """As a web server does, run `generate` in a thread for each request and read its words as they come."""
    model, tokenizer = adapted(spec, **MARKS), make_tokenizer()
    prompts = [prompt(number) for number in range(THREADS)]
    expected = [written(model, ids) for ids in prompts]
    with model.disable_adapter():
        assert all((written(model, ids) - logits).abs().max() > 0.01 for ids, logits in zip(prompts, expected))
    for _ in range(2):
        streamers = [TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30) for _ in prompts]
        with ThreadPoolExecutor(THREADS) as pool:
            answers = [
                pool.submit(written, model, ids, streamer=streamer) for ids, streamer in zip(prompts, streamers)
            ]
            texts = ["".join(streamer) for streamer in streamers]
        alike([answer.result() for answer in answers], expected)
        assert texts == [tokenizer.decode(logits.argmax(-1)[0]) for logits in expected]


def test_ways_of_decoding_at_once():
    model = adapted()
    ways = [
        dict(),
        dict(num_beams=3),
        dict(use_cache=False),
        dict(num_return_sequences=2, num_beams=2),
        dict(prompt_lookup_num_tokens=2),
        dict(cache_implementation="static"),
    ]
    jobs = [lambda n=n, way=way: written(model, prompt(n), **way) for n, way in enumerate(ways)]
    alike(together(*jobs), [job() for job in jobs])


def test_each_thread_has_its_own_adapters_by_row():
    model = adapted("f2+l2")
    for name, spec in (("second", "p"), ("third", "l1+g")):
        model.add_adapter(name, LoReftConfig(task_type="CAUSAL_LM", r=2, positions=spec))
    randomise(model)
    names = [
        ["default", "second"],
        ["second", "default"],
        ["third", "__base__"],
        ["__base__", "third"],
        ["default", "default"],
        None,
    ]
    jobs = [
        lambda n=n, of_rows=of_rows: written(
            model, prompt(n, rows=2), **({} if of_rows is None else {"adapter_names": of_rows})
        )
        for n, of_rows in enumerate(names)
    ]
    alone = [job() for job in jobs]
    for number, of_rows in enumerate(names):
        for row, name in enumerate(of_rows or []):
            if name == "__base__":
                with model.disable_adapter():
                    alike([alone[number][row]], [written(model, prompt(number, rows=2))[row]])
    for _ in range(2):
        alike(together(*jobs), alone)


def loss_and_gradients(model, number):
    ids = prompt(number, rows=2)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < 3, -100)
    loss = model(input_ids=ids, labels=labels).loss
    parameters = [each for each in model.parameters() if each.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def test_forwards_with_labels_beside_generate():
    """Evaluation, gradients, plain forwards and `generate` run at once and see nothing of each other."""
    model = adapted("f2+l2+g3")
    base = model.get_base_model()

    def plain(n):
        with torch.no_grad():
            return [model(input_ids=prompt(n, rows=2)).logits]

    def backbone(n):
        with torch.no_grad():
            return [base.model(input_ids=prompt(n, rows=2)).last_hidden_state]

    jobs = [
        lambda: loss_and_gradients(model, 1),
        lambda: loss_and_gradients(model, 2),
        lambda: [written(model, prompt(3))],
        lambda: [written(model, prompt(4))],
        lambda: plain(5),
        lambda: backbone(5),
        lambda: loss_and_gradients(model, 3),
        lambda: [written(model, prompt(2))],
    ]
    alone = [job() for job in jobs]
    for _ in range(3):
        for found, expected in zip(together(*jobs), alone):
            alike(found, expected)


def test_training_forwards_at_once():
    """Threads of a parameter server do so: training mode, each with its own labels."""
    model = adapted("f2+l2").train()
    jobs = [lambda n=n: loss_and_gradients(model, n) for n in range(1, 7)]
    alone = [job() for job in jobs]
    for found, expected in zip(together(*jobs), alone):
        alike(found, expected)


def test_two_models_in_one_thread():
    """A model runs inside a forward of another, as a judge in a logits processor does."""
    model, judge = adapted(), adapted("all")

    class Judge(LogitsProcessor):
        def __call__(self, input_ids, scores):
            judged.append(written(judge, prompt(2), max_new_tokens=2))
            return scores

    judged = []
    expected, verdict = written(model, prompt(3)), written(judge, prompt(2), max_new_tokens=2)
    alike([written(model, prompt(3), logits_processor=[Judge()])], [expected])
    alike(judged, [verdict] * 6)


def test_one_model_inside_itself():
    """`generate` and a forward with labels run between two steps of `generate`."""
    model, inner, losses = adapted(), [], []

    class Again(LogitsProcessor):
        def __call__(self, input_ids, scores):
            inner.append(written(model, prompt(2), max_new_tokens=2))
            losses.extend(loss_and_gradients(model, number)[0] for number in (1, 3))
            return scores

    expected, expected_inner = written(model, prompt(3)), written(model, prompt(2), max_new_tokens=2)
    expected_losses = [loss_and_gradients(model, number)[0] for number in (1, 3)]
    with torch.enable_grad():
        Again.__call__ = torch.enable_grad()(Again.__call__)
        alike([written(model, prompt(3), logits_processor=[Again()])], [expected])
    alike(inner, [expected_inner] * 6)
    alike(losses, expected_losses * 6)


# What fails


class Fails:
    """A hook that raises at its `nth` call of this thread, once."""

    def __init__(self, error, nth=1):
        self.error, self.nth, self.thread, self.calls = error, nth, threading.get_ident(), 0

    def __call__(self, module, args, output):
        if threading.get_ident() == self.thread:
            self.calls += 1
            if self.calls == self.nth:
                raise self.error


@pytest.mark.parametrize("place", ["first block", "last block", "head", "part"])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_forward_that_fails_leaves_nothing_behind(error, place):
    model = adapted()
    base = model.get_base_model()
    module = {
        "first block": base.model.layers[0],
        "last block": base.model.layers[2],
        "head": base.lm_head,
        "part": base.model.norm,
    }[place]
    ids, other = prompt(3, rows=2), prompt(3, rows=2).flip(1)

    def call_model(ids):
        return model(input_ids=ids, labels=ids.masked_fill(torch.arange(ids.shape[1]) < 5, -100)).logits

    ways = [
        call_model,
        lambda ids: model(input_ids=ids).logits,
        lambda ids: base.forward(input_ids=ids).logits,
        lambda ids: base.model(input_ids=ids).last_hidden_state,
        lambda ids: written(model, ids),
    ]
    with torch.no_grad():
        expected = [way(other) for way in ways]
        for failing in ways:
            if place == "head" and failing is ways[3]:
                continue  # the backbone has no head
            for way, right in zip(ways, expected):
                handle = module.register_forward_hook(Fails(error))
                with pytest.raises(type(error)):
                    failing(ids)
                handle.remove()
                alike([way(other)], [right])


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_part_by_itself_after_a_failure_is_outside_of_any_forward(error):
    """A forward that is over gives a block no positions."""
    model = adapted()
    base = model.get_base_model()
    handle = base.model.layers[2].register_forward_hook(Fails(error))
    with pytest.raises(type(error)):
        model(input_ids=prompt(3))
    handle.remove()
    layer = base.model.layers[0]
    hidden = torch.randn(1, prompt(3).shape[1], 32)
    with pytest.raises(RuntimeError, match="outside a forward of its model"):
        layer.loreft(hidden)


def test_a_failure_in_one_thread_is_that_threads_alone():
    model = adapted()
    expected = [written(model, prompt(n)) for n in range(1, 6)]

    def fails():
        handle = model.get_base_model().model.layers[1].register_forward_hook(Fails(RuntimeError("mine"), nth=3))
        try:
            with pytest.raises(RuntimeError, match="mine"):
                written(model, prompt(2))
        finally:
            handle.remove()
        return written(model, prompt(2))

    found = together(fails, *(lambda n=n: written(model, prompt(n)) for n in range(1, 6)))
    alike(found, [expected[1], *expected])


def test_nothing_is_left_on_the_model():
    model = adapted()
    written(model, prompt(1))  # PEFT itself leaves a method on its tuner, whatever the method is
    modules = list(model.modules())
    before = [set(vars(module)) for module in modules]
    together(*(lambda n=n: written(model, prompt(n)) for n in range(4)), lambda: loss_and_gradients(model, 2))
    for module, names in zip(modules, before):
        assert set(vars(module)) == names, type(module)


# Backward elsewhere

_RENAMED = "ignore:`gradient_checkpointing_:FutureWarning"  # transformers 5.23's new name for it


@pytest.mark.filterwarnings(_RENAMED)
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "not reentrant", "reentrant"])
@pytest.mark.parametrize("spec", ["f2+l2", "l1+g", "all"])
def test_backward_in_another_thread(spec, reentrant):
    """Recomputation asks for positions when no forward runs. Two forwards come before either backward."""
    expected = []
    for number in (1, 2):
        model = adapted(spec).train()
        expected.append(loss_and_gradients(model, number)[1:])
    model = adapted(spec).train()
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    losses = []
    for number in (1, 2):
        ids = prompt(number, rows=2)
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < 3, -100)
        losses.append(model(input_ids=ids, labels=labels).loss)
    found = []

    def backward(loss):
        model.zero_grad()
        loss.backward()
        found.append([each.grad.clone() for each in model.parameters() if each.requires_grad])

    for loss in losses:
        thread = threading.Thread(target=backward, args=(loss,))
        thread.start()
        thread.join()
    for one, right in zip(found, expected, strict=True):
        alike(one, right)


@pytest.mark.filterwarnings(_RENAMED)
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_backward_beside_forwards_of_other_threads(reentrant):
    """This thread recomputes while others generate and run forwards of their own."""
    model = adapted("f2+l2").train()
    right = loss_and_gradients(model, 3)[1:]
    answers = [model.eval() and written(model, prompt(n)) for n in (1, 2)]
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ids = prompt(3, rows=2)
    loss = model(input_ids=ids, labels=ids.masked_fill(torch.arange(ids.shape[1]) < 3, -100)).loss
    model.eval()

    def backward():
        loss.backward()
        return [each.grad for each in model.parameters() if each.requires_grad]

    found = together(backward, lambda: written(model, prompt(1)), lambda: written(model, prompt(2)))
    alike(found[1:], answers)
    alike(found[0], right)
