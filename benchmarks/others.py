"""`pyreft` and `adapters` on the workload of bench.py, each in an environment of its own: `make bench-others`.

    python benchmarks/others.py pyreft [--rounds 15] [--threads 1 2] [--out docs/performance.json]
    python benchmarks/others.py adapters ...

They pin old versions of transformers, so only the ratio to the floor of their own process can be compared. LoReFT of
rank 4 at f7+l7 on all 30 blocks of SmolLM2-135M's shape, fp32; a training step of 4 x 128 and a prefill of 4 x 64.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from measure import Ratio, interleave, share
from transformers import LlamaConfig, LlamaForCausalLM
from workload import SMOLLM2, batch


def adapted_by_pyreft(base, prompt: int, rows: int):
    import pyreft
    from pyreft.dataset import get_intervention_locations

    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": 4,
            "intervention": pyreft.LoreftIntervention(embed_dim=576, low_rank_dimension=4, dtype=torch.float32),
        }
        for layer in range(30)
    ]
    model = pyreft.get_reft_model(share(base), pyreft.ReftConfig(representations=representations))
    each = get_intervention_locations(
        last_position=prompt, positions="f7+l7", num_interventions=30, share_weights=True, pad_mode="last"
    )
    locations = torch.tensor([each] * rows).permute(1, 0, 2).tolist()  # intervention, row, position
    weights = [p for i in model.interventions.values() for p in i.parameters()]

    def forward(**inputs):
        labels = inputs.pop("labels", None)
        return model(inputs, unit_locations={"sources->base": (None, locations)}, labels=labels)[1]

    return forward, weights


def adapted_by_adapters(base, prompt: int, rows: int):
    import adapters

    model = share(base)
    adapters.init(model)
    config = adapters.LoReftConfig(r=4, prefix_positions=7, suffix_positions=7, tied_weights=True, dropout=0.0)
    model.add_adapter("mine", config=config)
    model.train_adapter("mine")
    model.set_active_adapters("mine")
    return model, [p for n, p in model.named_parameters() if "reft" in n]


def output_requires_grad(module, args, output):
    """A forward hook of a block: the gradient begins at its output. In older versions that is a tuple."""
    hidden = output[0] if isinstance(output, tuple) else output
    hidden.requires_grad_()


def measure(adapted, base, rounds: int) -> dict[str, Ratio]:
    training = batch(4, 128, 64)
    prefill = {name: training[name][:, :64] for name in ("input_ids", "attention_mask")}
    floor = share(base)
    floor.model.layers[0].register_forward_hook(output_requires_grad)
    forward, weights = adapted(base, 64, 4)
    optimizer = torch.optim.AdamW(weights, lr=1e-5)

    def step():
        forward(**training).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    plain = share(base)
    runs = {"floor": lambda: floor(**training).loss.backward(), "training step": step}
    trained = interleave(runs, "floor", rounds)
    with torch.no_grad():
        filled = interleave({"base": lambda: plain(**prefill), "prefill": lambda: forward(**prefill)}, "base", rounds)
    return {"training step": trained["training step"], "prefill": filled["prefill"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=["pyreft", "adapters"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, help="add the results to this JSON file")
    args = parser.parse_args()
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SMOLLM2)).eval().requires_grad_(False)
    adapted = {"pyreft": adapted_by_pyreft, "adapters": adapted_by_adapters}[args.library]
    results = {}
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text())
    for threads in args.threads:
        torch.set_num_threads(threads)
        found = {name: vars(ratio) for name, ratio in measure(adapted, base, args.rounds).items()}
        others = results.setdefault(f"others, {threads} {'thread' if threads == 1 else 'threads'}", {})
        others |= {f"{args.library}: {name}": ratio for name, ratio in found.items()}
        print(json.dumps(found, indent=1))
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
