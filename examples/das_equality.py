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

import torch
from peft import get_peft_model
from torch import nn

from peft_reft import LoReftConfig, interchange, interchange_accuracy

SIZE, HIDDEN = 4, 16  # numbers that make up an object; width of a layer, which is also the number of rows of R
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=4000, help="to train the network")
parser.add_argument("--align-steps", type=int, default=800, help="to train R")
parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2])
args = parser.parse_args()
torch.manual_seed(0)


class Block(nn.Sequential):
    def __init__(self, size_in):
        super().__init__(nn.Linear(size_in, HIDDEN), nn.ReLU())
        self.out_features = HIDDEN  # by this name LoReFT finds how large the output is


def new_network():
    """(count, 1, 4 * SIZE), a single token, to logits (count, 1, 2)."""
    return nn.Sequential(Block(4 * SIZE), Block(HIDDEN), Block(HIDDEN), nn.Linear(HIDDEN, 2))


def draw(count):
    """Inputs (count, 1, 4 * SIZE), and the variables a = b and c = d, each (count,)."""
    pairs, variables = [], []
    for _ in range(2):
        equal = torch.rand(count) < 0.5
        one, other = torch.rand(2, count, SIZE) * 2 - 1
        pairs += [one, torch.where(equal.unsqueeze(-1), one, other)]
        variables.append(equal)
    return torch.cat(pairs, -1).unsqueeze(1), variables[0], variables[1]


def counterfactuals(count):
    """Base, source, which rows of R are exchanged, and the causal model's answer after the exchange."""
    base, left, right = draw(count)
    source, other_left, other_right = draw(count)
    exchanges_left = torch.rand(count) < 0.5
    answer = torch.where(exchanges_left, other_left, left) == torch.where(exchanges_left, right, other_right)
    halves = torch.arange(HIDDEN).view(2, -1)
    return base, source, torch.where(exchanges_left.unsqueeze(-1), halves[0], halves[1]), answer.long()


network = new_network()
optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=args.steps)
for _ in range(args.steps):
    inputs, left, right = draw(1024)
    nn.functional.cross_entropy(network(inputs).squeeze(1), (left == right).long()).backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
inputs, left, right = draw(10_000)
accuracy = (network(inputs).squeeze(1).argmax(-1) == (left == right)).float().mean().item()
print(f"The network answers {accuracy:.1%} of new inputs right.", flush=True)

for name, which in {"trained": network, "random": new_network()}.items():
    line = f"{name:8}"
    for layer in args.layers:
        config = LoReftConfig(intervention="interchange", r=HIDDEN, positions="f1", target_modules=str(layer))
        model = get_peft_model(which.requires_grad_(False), config)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        for _ in range(args.align_steps):
            base, source, rows, answer = counterfactuals(1024)
            with interchange(model, {"input": source}, subspaces=rows):
                logits = model(base).squeeze(1)  # (1024, 2)
            nn.functional.cross_entropy(logits, answer).backward()
            optimizer.step()
            optimizer.zero_grad()
        base, source, rows, answer = counterfactuals(10_000)
        with torch.no_grad(), interchange(model, {"input": source}, subspaces=rows):
            line += f"  layer {layer}: {interchange_accuracy(model(base).squeeze(1), answer):.1%}"
        model.unload()
    print(line, flush=True)
