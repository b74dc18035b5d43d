"""Answer 16 requests that arrive at once: in one batch by row, in a thread each, and one after another.

    python benchmarks/batches.py outputs/SmolLM2-135M-Instruct [--rounds 5] [--tokens 24]

Four adapters (r=4, f7+l7), prompts of 16 to 46 tokens. Prints the time of each way over that of the batch: the median
over rounds, with quartiles (`measure.interleave`), in wall and in CPU time.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import torch
from measure import interleave
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_reft import LoReftConfig

REQUESTS = 16
NAMES = ["one", "two", "three", "four"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a name on the Hub")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24, help="tokens of each answer")
    args = parser.parse_args()

    config = LoReftConfig(task_type="CAUSAL_LM", r=4, init_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), config, NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    model.eval()
    names = [NAMES[number % len(NAMES)] for number in range(REQUESTS)]
    prompts = [torch.randint(1000, 9000, (16 + 2 * number,)).tolist() for number in range(REQUESTS)]
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = dict(min_new_tokens=args.tokens, max_new_tokens=args.tokens, do_sample=False)

    def batch() -> None:
        model.generate(ids, attention_mask=mask, adapter_names=names, **options)

    def one(number: int) -> None:
        row = torch.tensor([prompts[number]])
        model.generate(row, attention_mask=torch.ones_like(row), adapter_names=[names[number]], **options)

    def threads() -> None:
        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(one, range(REQUESTS)))

    def one_after_another() -> None:
        for number in range(REQUESTS):
            one(number)

    runs = {"one batch": batch, "a thread each": threads, "one after another": one_after_another}
    for name, ratio in interleave(runs, reference="one batch", rounds=args.rounds).items():
        wall, cpu = ratio.wall_quartiles, ratio.cpu_quartiles
        print(
            f"{name:18} wall {ratio.wall:.2f} ({wall[0]:.2f} to {wall[1]:.2f})  "
            f"CPU {ratio.cpu:.2f} ({cpu[0]:.2f} to {cpu[1]:.2f})  {ratio.milliseconds / 1e3:.1f} s"
        )


if __name__ == "__main__":
    main()
