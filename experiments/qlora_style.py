"""QLoRA-style training: a 4-bit base, TRL's SFTTrainer, LoReFT beside LoRA, peak memory printed.

    python experiments/qlora_style.py                                            # Llama-3.2-1B, a GPU
    python experiments/qlora_style.py --preset cpu --data FOLDER --model SMOLLM2_FOLDER

Each run is a process of its own, on the same rows. Both methods have three learning rates; the loss on half of the
held-out rows chooses one. `test` is the loss on the other half. FOLDER has ultrafeedback_1k/ultrafeedback_1k.json.
Without `--data` the set comes from the Hub. Memory is torch's peak on a GPU, and the process's on a CPU; there the
larger part is Python, torch and the base model while it is quantised. Results are kept in OUTPUT/results.json. An
interrupted run goes on from its last checkpoint.

SmolLM2-135M, 10 steps of 2 rows, one seed: LoReFT (138,360 parameters) 2.004, LoRA (2,442,240) 1.885; peaks of 1596 to
1974 MiB and of 1730 to 1920 over the three rates; 0.8 CPU minutes a run.
"""

import json
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from runs import Found, Results, Run, compare
from settings import Settings, read_arguments
from tables import comparison_figure, publish, show
from training import CHECKPOINTS, resume, trainable
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from peft_reft import LoReftConfig


@dataclass(kw_only=True)
class QLoraSettings(Settings):
    output: Path = Path("outputs/qlora_style")
    methods: list[str] = field(default_factory=lambda: ["loreft", "lora"])
    steps: int
    batch: int
    max_length: int
    learning_rates: list[float]
    seeds: list[int]
    held: int
    only: str = ""
    """JSON of one `Run`: train it alone, and print what it took."""


PRESETS = {
    "paper": QLoraSettings(
        model="meta-llama/Llama-3.2-1B-Instruct",
        steps=200,
        batch=8,
        max_length=768,
        learning_rates=[2e-4, 6e-4, 2e-3],
        seeds=[42, 43, 44],
        held=200,
    ),
    "cpu": QLoraSettings(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        steps=10,
        batch=2,
        max_length=128,
        learning_rates=[4e-4, 2e-3, 1e-2],
        seeds=[42],
        held=24,
    ),
}
CONFIGS = {
    "loreft": lambda: LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f5+l5"),
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


def train(run: Run, settings: QLoraSettings) -> Found:
    """Train with one method; its losses, parameters and peak memory."""
    compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    model = AutoModelForCausalLM.from_pretrained(settings.model, quantization_config=four_bit, dtype=compute)
    given = rows(settings.data)
    dev, test = range(settings.held // 2), range(settings.held // 2, settings.held)
    folder = settings.output / run.folder(settings.steps)
    training = SFTConfig(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        learning_rate=run.learning_rate,
        warmup_steps=0.1,
        max_length=settings.max_length,
        seed=run.seed,
        report_to="none",
        logging_steps=max(1, settings.steps // 5),
        bf16=torch.cuda.is_available(),
        **CHECKPOINTS,
    )
    trainer = SFTTrainer(
        model,
        args=training,
        train_dataset=given.select(range(settings.held, len(given))),
        eval_dataset={"dev": given.select(dev), "test": given.select(test)},
        processing_class=AutoTokenizer.from_pretrained(settings.model),
        peft_config=CONFIGS[run.method](),
    )
    resume(trainer)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    trainer.save_model(str(folder))
    losses = trainer.evaluate()
    return {
        "dev": losses["eval_dev_loss"],
        "test": losses["eval_test_loss"],
        "parameters": trainable(trainer.model),
        "peak MiB": peak,
    }


def main(argv: list[str] | None = None) -> None:
    settings = read_arguments(__doc__, PRESETS, argv)
    if settings.only:
        print("RESULT " + json.dumps(train(Run(**json.loads(settings.only)), settings)))
        return

    def measure(run: Run) -> Found:
        """Train in a new process, whose peak memory is that of this run alone."""
        given = argv if argv is not None else sys.argv[1:]
        command = [sys.executable, __file__, *given, "--only", json.dumps(asdict(run))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.rpartition("RESULT ")[2])

    names = ("steps", "batch", "max_length")
    results = Results(settings.output / "results.json", {name: getattr(settings, name) for name in names})
    table = compare(
        results,
        measure,
        methods=settings.methods,
        learning_rates=settings.learning_rates,
        seeds=settings.seeds,
        lower=True,
    )
    show(table, ["method", "parameters", "learning_rate", "test", "lowest", "highest", "peak MiB", "cpu_minutes"])
    publish("qlora_style", settings, comparison_figure(table, "loss on held-out rows"))


if __name__ == "__main__":
    main()
