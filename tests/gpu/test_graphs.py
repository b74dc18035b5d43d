"""torch.compile: one graph without breaks, which a card replays as CUDA graphs. On a CPU the graph alone is tested."""

import pytest
import torch
from torch._dynamo.utils import counters

from .conftest import adapted, assert_close, batch, collated, step

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own


def how(device):
    """Arguments of `torch.compile`."""
    return {"mode": "reduce-overhead"} if device.type == "cuda" else {"backend": "aot_eager"}


# Few cases, because a card's compiler takes about a minute for each.


@pytest.mark.parametrize(
    "positions, ours", [("f2+l2", True), ("l2+g", False)], ids=["f2+l2, the collator's positions", "l2+g"]
)
def test_training(positions, ours, device):
    counters.clear()
    plain, model = adapted(positions=positions), adapted(positions=positions).to(device)
    compiled = torch.compile(model.get_base_model(), fullgraph=True, **how(device))
    graphs = []
    for seed in range(4):
        rows = collated(batch(seed), positions=positions) if ours else batch(seed)
        expected = step(plain, rows)
        torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad()
        loss = compiled.train()(**{name: tensor.to(device) for name, tensor in rows.items()}).loss
        loss.backward()
        found = {name: p.grad.clone().cpu() for name, p in model.named_parameters() if p.requires_grad}
        assert_close({"loss": loss.detach().cpu(), **found}, expected, 1e-3)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == graphs[:1] * 4, "later batches trace nothing"
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_generation_with_a_static_cache(device):
    """On a card transformers compiles the decode steps of a static cache by itself, with CUDA graphs."""
    counters.clear()
    model = adapted(positions="f2+l2+g").to(device).eval()
    prompt = {name: batch(device=device)[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**prompt, **settings)
    if device.type == "cpu":
        base = model.get_base_model()
        base.forward = torch.compile(base.forward, fullgraph=True, **how(device))
    for _ in range(2):
        assert torch.equal(model.generate(**prompt, **settings, cache_implementation="static"), expected)
    assert counters["stats"]["unique_graphs"] > 0
    assert counters["inductor"]["cudagraph_skips"] == 0
