"""torch.compile without graph breaks: the forward alone, and the whole model with our hooks inside."""

import pytest
import torch
from conftest import VOCAB, build, randomise
from peft import get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend

from peft_reft import LoReftConfig

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the compiler's own


def batch(seed, seq=12):
    ids = torch.randint(3, VOCAB, (2, seq), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :7], labels[1, :5] = -100, -100
    return {"input_ids": ids, "labels": labels}


def adapted(**kwargs):
    config = LoReftConfig(**{"task_type": "CAUSAL_LM", "r": 4, "positions": "f2+l2", **kwargs})
    model = get_peft_model(build("llama"), config)
    randomise(model)
    return model


def losses_and_gradients(model, call):
    model.train()
    out = []
    for seed in range(3):
        model.zero_grad()
        loss = call(batch(seed))
        loss.backward()
        out.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    return out


@pytest.mark.parametrize("fields", [dict(), dict(tie="group"), dict(component="heads")], ids=str)
@pytest.mark.parametrize("what", ["forward", "model", "model, positions given", "each block"])
@pytest.mark.cell("torch.compile", "training, fullgraph: {what}")
def test_training_without_graph_breaks_or_recompilation(what, fields):
    torch._dynamo.reset()
    plain = adapted(**fields)
    expected = losses_and_gradients(plain, lambda inputs: plain(**inputs).loss)
    model = adapted(**fields)
    base = model.get_base_model()
    compiled = CompileCounterWithBackend("aot_eager")
    if what == "forward":
        base.forward = torch.compile(base.forward, backend=compiled, fullgraph=True)
        call = base
    elif what == "each block":
        for block in base.model.layers:
            block.compile(backend=compiled, fullgraph=True)
        call = base
    else:
        call = torch.compile(base, backend=compiled, fullgraph=True)

    def run(inputs):
        if what.endswith("given"):
            ends = (inputs["labels"] == -100).sum(1, keepdim=True)
            inputs["intervention_positions"] = torch.cat([torch.tensor([[0, 1]] * 2), ends - 2, ends - 1], 1)
        loss = call(**inputs).loss
        frames.append(compiled.frame_count)
        return loss

    frames = []
    for (loss, gradients), (want, wanted) in zip(losses_and_gradients(model, run), expected):
        torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
        for mine, theirs in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    # Later batches trace nothing. (The batch is read in a graph of its own, before that of the model; of blocks the
    # first computes what the others look up.)
    assert frames == frames[:1] * 3
    assert what == "each block" or frames[0] == (2 if what.startswith("model") else 1)


@pytest.mark.cell(
    "torch.compile",
    "chats of several turns without our collator",
    refused="the number of prompts in a row would be a shape that depends on data",
)
def test_several_answers_a_row_are_refused_where_their_number_cannot_be_known():
    torch._dynamo.reset()
    model = adapted().train()
    inputs = batch(0)
    inputs["labels"][0, 9] = -100
    compiled = torch.compile(model.get_base_model(), backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="DataCollatorForLoReft"):
        compiled(**inputs)


@pytest.mark.cell("torch.compile", "generation with a static cache, fullgraph")
def test_generation_with_a_static_cache():
    torch._dynamo.reset()
    model = adapted().eval()
    ids = batch(0)["input_ids"]
    mask = torch.ones_like(ids)
    settings = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    expected = model.generate(input_ids=ids, attention_mask=mask, **settings)
    base = model.get_base_model()
    base.forward = torch.compile(base.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **settings), expected)
