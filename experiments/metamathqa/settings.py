"""Write LoReFT's settings for PEFT's comparison of methods on MetaMathQA, as PEFT asks for them: a folder for each.

    python experiments/metamathqa/settings.py --tokenizer meta-llama/Llama-3.2-3B

What it wrote stands beside this file, in `loreft/`. README.md says how to run it. Another base model (`model_id` in a
`training_params.json`) needs settings of its own, because they hold token ids of its tokenizer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from peft_reft import LoReftConfig

TEMPLATE = "Question: {query} Think step by step.\nAnswer:"
"""`query_template` of PEFT's `default_training_params.json`. PEFT's script puts the answer right behind it."""

HEADER = " Think step by step.\nAnswer"
"""The end of every prompt, without its colon: `:The` is one token of Llama 3, so the colon may belong to the answer.

PEFT's script trains on the question as on the answer. So labels do not say where an answer begins; this header does.
"""

PAPER = 9e-4
"""The paper's learning rate for arithmetic (appendix D)."""

SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "rank8-f7l7": (dict(r=8, positions="f7+l7"), PAPER),
    "rank8-all": (dict(r=8, positions="all"), PAPER),
    "rank8-all-lobireft": (dict(intervention="lobireft", r=8, positions="all"), PAPER),
    "all-bias": (dict(intervention="bias", positions="all"), 5e-3),
}
"""Name of each experiment, the fields of its config, its learning rate. None of the rates was tuned."""


def header_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of the header.

    Raises:
        ValueError: in some row the header has other ids, so it would not be found.
    """
    ids: list[int] = tokenizer(HEADER, add_special_tokens=False)["input_ids"]
    for query in ("What is 2 + 3?", "Solve $x^2 = 9$.", "Let's add 1 and 2\n"):
        for answer in ("", "The sum is 5.", "2 + 3 = 5", "\\boxed{5}", "$x = 3$", "\nFirst", " We"):
            row = tokenizer(TEMPLATE.format(query=query) + answer)["input_ids"]
            found = sum(row[at : at + len(ids)] == ids for at in range(len(row)))
            if found != 1:
                raise ValueError(
                    f"{HEADER!r} is {ids}, which stands {found} times in {tokenizer.decode(row)!r}: {row}"
                )
    return ids


def write(folder: Path, name: str, header: list[int]) -> Path:
    """Write `adapter_config.json` and `training_params.json` of an experiment; return its folder."""
    fields, learning_rate = SETTINGS[name]
    config = LoReftConfig(task_type="CAUSAL_LM", **fields)
    if config.positions != "all":
        config.response_template = [header]
    experiment = folder / "loreft" / f"llama-3.2-3B-{name}"
    config.save_pretrained(str(experiment))
    # PEFT's default, 0.1, pulls W and b to 0, where an edit of LoReFT is not 0.
    parameters = {"optimizer_kwargs": {"lr": learning_rate, "weight_decay": 0.0}}
    (experiment / "training_params.json").write_text(json.dumps(parameters, indent=2) + "\n")
    return experiment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a Hub id or a folder")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the folder `loreft` is written")
    args = parser.parse_args()
    header = header_of(AutoTokenizer.from_pretrained(args.tokenizer))
    for name in SETTINGS:
        print(write(args.to, name, header))


if __name__ == "__main__":
    main()
