"""LoReFT in PEFT's method comparison on MetaMathQA: write the experiment, run PEFT's own script on it.

    git clone https://github.com/huggingface/peft
    python examples/metamathqa.py --peft peft --r 8        # a GPU; PEFT's default model is Llama-3.2-3B
    python examples/metamathqa.py --peft peft --r 8 --only-write

PEFT's script supervises the question as well as the answer, so no prompt can be told from the labels, and every token
is edited (`positions="all"`).
"""

import argparse
import json
import os
import runpy
import sys
from pathlib import Path

from peft_reft import LoReftConfig


def write_experiment(folder: Path, r: int, layers: str, learning_rate: float) -> Path:
    """`experiments/loreft/NAME` with adapter_config.json and training_params.json, as PEFT's README asks for."""
    experiment = folder / "experiments" / "loreft" / f"llama-3.2-3B-rank{r}-all"
    experiment.mkdir(parents=True, exist_ok=True)
    LoReftConfig(task_type="CAUSAL_LM", r=r, positions="all", layers=layers).save_pretrained(str(experiment))
    parameters = {"optimizer_kwargs": {"lr": learning_rate}}
    (experiment / "training_params.json").write_text(json.dumps(parameters, indent=2) + "\n")
    return experiment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft", type=Path, required=True, help="a clone of PEFT")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--layers", default="all")
    parser.add_argument("--learning-rate", type=float, default=9e-4, help="the paper's for arithmetic")
    parser.add_argument("--only-write", action="store_true", help="do not run it")
    args = parser.parse_args()
    folder = args.peft / "method_comparison" / "MetaMathQA"
    if not (folder / "run.py").is_file():
        raise SystemExit(f"{folder} has no run.py: give a clone of https://github.com/huggingface/peft")
    experiment = write_experiment(folder, args.r, args.layers, args.learning_rate)
    print(f"Wrote {experiment}")
    if not args.only_write:
        os.chdir(folder)
        sys.path.insert(0, ".")
        sys.argv = ["run.py", "-v", str(experiment.relative_to(folder))]
        runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main()
