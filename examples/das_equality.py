"""Distributed alignment search on hierarchical equality (arXiv 2303.02536): does a network compute what we think?

    python examples/das_equality.py

Four objects a, b, c, d; the answer is whether (a = b) equals (c = d). A network of three layers learns it. The causal
model of the task has two variables, a = b and c = d. DAS looks for each of them in half of a hidden layer: it learns
R so that putting these coordinates of one input into the run on another gives the answer that the causal model gives
when that variable is exchanged. The accuracy of these answers is printed for the trained network and, for comparison,
for a random one of the same size, where there is nothing to find:

    The network answers 100.0% of new inputs right.
    trained   layer 0: 99.7%  layer 1: 54.8%  layer 2: 51.0%
    random    layer 0: 50.3%  layer 1: 50.7%  layer 2: 50.2%

The variables are there in the first layer; the later ones hold the answer, not what it was made of.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn
from tqdm import tqdm

from peft_reft import LoReftConfig, interchange, interchange_accuracy

SIZE = 4
"""Numbers that make up an object."""


class Block(nn.Sequential):
    """A layer; `out_features` tells LoReFT how large its output is."""

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__(nn.Linear(size_in, size_out), nn.ReLU())
        self.out_features = size_out


class Network(nn.Sequential):
    """(batch, 1, 4 * SIZE), a single token, to logits (batch, 1, 2)."""

    def __init__(self, hidden: int) -> None:
        super().__init__(Block(4 * SIZE, hidden), Block(hidden, hidden), Block(hidden, hidden), nn.Linear(hidden, 2))


def draw(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs (count, 1, 4 * SIZE), and the variables a = b and c = d, each (count,)."""
    pairs, variables = [], []
    for _ in range(2):
        equal = torch.rand(count) < 0.5
        one, other = torch.rand(2, count, SIZE) * 2 - 1
        pairs += [one, torch.where(equal.unsqueeze(-1), one, other)]
        variables.append(equal)
    return torch.cat(pairs, -1).unsqueeze(1), variables[0], variables[1]


def train_network(hidden: int, steps: int) -> tuple[Network, float]:
    network = Network(hidden)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc="network"):
        inputs, left, right = draw(1024)
        nn.functional.cross_entropy(network(inputs).squeeze(1), (left == right).long()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    inputs, left, right = draw(10_000)
    return network, (network(inputs).squeeze(1).argmax(-1) == (left == right)).float().mean().item()


def counterfactuals(count: int, r: int):
    """Base, source, which rows of R are exchanged, and the causal model's answer after the exchange."""
    base, left, right = draw(count)
    source, other_left, other_right = draw(count)
    exchanges_left = torch.rand(count) < 0.5
    answer = torch.where(exchanges_left, other_left, left) == torch.where(exchanges_left, right, other_right)
    rows = torch.where(exchanges_left.unsqueeze(-1), torch.arange(r // 2), torch.arange(r // 2, r))
    return base, source, rows, answer.long()


def align(network: nn.Module, layer: int, r: int, steps: int) -> float:
    """Train R on the output of `layer` by gradient; interchange accuracy on new inputs."""
    config = LoReftConfig(intervention="interchange", r=r, positions="f1", target_modules=str(layer))
    model = get_peft_model(network, config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in tqdm(range(steps), desc=f"R at layer {layer}", leave=False):
        base, source, rows, answer = counterfactuals(1024, r)
        with interchange(model, {"input": source}, subspaces=rows):
            logits = model(base).squeeze(1)
        nn.functional.cross_entropy(logits, answer).backward()
        optimizer.step()
        optimizer.zero_grad()
    base, source, rows, answer = counterfactuals(10_000, r)
    with torch.no_grad(), interchange(model, {"input": source}, subspaces=rows):
        accuracy = interchange_accuracy(model(base).squeeze(1), answer)
    model.unload()
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4000, help="to train the network")
    parser.add_argument("--align-steps", type=int, default=800, help="to train R")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("outputs/das_equality"))
    args = parser.parse_args()
    torch.manual_seed(0)
    network, accuracy = train_network(args.hidden, args.steps)
    print(f"The network answers {accuracy:.1%} of new inputs right.")
    results: dict[str, object] = {"accuracy of the network": accuracy}
    for name, which in {"trained": network, "random": Network(args.hidden)}.items():
        which.requires_grad_(False)
        found = {layer: align(which, layer, args.hidden, args.align_steps) for layer in args.layers}
        results[f"interchange accuracy, {name}"] = found
        print(f"{name:8}" + "".join(f"  layer {layer}: {value:.1%}" for layer, value in found.items()))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
