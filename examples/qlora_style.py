"""QLoRA-style training: a 4-bit base, TRL's SFTTrainer, LoReFT beside LoRA, peak memory printed.

    python examples/qlora_style.py                                            # Llama-3.2-1B, a GPU
    python examples/qlora_style.py --preset cpu --data FOLDER --model SMOLLM2_FOLDER

Each method trains in a process of its own, on the same rows. FOLDER has ultrafeedback_1k/ultrafeedback_1k.json;
without `--data` the set comes from the Hub. Memory is torch's peak on a GPU, the process's on a CPU; of the latter the
larger part is Python, torch and the base model while it is quantised.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from recipe import arguments, show, trainable
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from peft_reft import LoreftConfig

PRESETS: dict[str, dict[str, Any]] = {
    "paper": dict(
        model="meta-llama/Llama-3.2-1B-Instruct",
        data=None,
        methods=["loreft", "lora"],
        steps=200,
        batch=8,
        max_length=768,
        learning_rates=[9e-4, 2e-4],
        only="",
    ),
    "cpu": dict(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        data=None,
        methods=["loreft", "lora"],
        steps=10,
        batch=2,
        max_length=128,
        learning_rates=[2e-3, 4e-4],
        only="",
    ),
}
CONFIGS = {
    "loreft": lambda: LoreftConfig(task_type="CAUSAL_LM", r=4, positions="f5+l5"),
    "lora": lambda: LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"),
}


def rows(data: str | None) -> Dataset:
    if data is None:
        return load_dataset("openbmb/UltraFeedback", split="train").map(
            lambda row: {"prompt": row["instruction"], "completion": row["completions"][0]["response"]},
            remove_columns=["instruction", "completions"],
        )
    lines = (Path(data) / "ultrafeedback_1k" / "ultrafeedback_1k.json").read_text(encoding="utf-8").splitlines()
    given = [json.loads(line) for line in lines]
    return Dataset.from_list([{"prompt": f"{row['instruction']}\n", "completion": row["output"]} for row in given])


def one(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train with one method; what it took."""
    compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=four_bit, dtype=compute)
    settings = SFTConfig(
        output_dir=str(args.output / method),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=dict(zip(args.methods, args.learning_rates))[method],
        max_length=args.max_length,
        save_strategy="no",
        report_to="none",
        logging_steps=max(1, args.steps // 5),
        bf16=torch.cuda.is_available(),
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trainer = SFTTrainer(
        model, args=settings, train_dataset=rows(args.data), processing_class=tokenizer, peft_config=CONFIGS[method]()
    )
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    trainer.save_model(str(args.output / method))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {
        "method": method,
        "parameters": trainable(trainer.model),
        "first loss": losses[0],
        "last loss": losses[-1],
        "seconds": seconds,
        "peak MiB": peak,
    }


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, PRESETS, argv)
    if args.only:
        print("RESULT " + json.dumps(one(args.only, args)))
        return
    table = []
    for method in args.methods:
        command = [sys.executable, __file__, *(argv if argv is not None else sys.argv[1:]), "--only", method]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        table.append(json.loads(done.stdout.rpartition("RESULT ")[2]))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(table, indent=1) + "\n")
    show(table, list(table[0]))


if __name__ == "__main__":
    main()
