"""Train an adapter on preferences, with TRL's DPOTrainer.

    python examples/dpo.py outputs/SmolLM2-135M-Instruct pairs.jsonl outputs/dpo

Each line of the file has a prompt, the answer that is preferred, and another one:

    {"prompt": "Name a fruit.", "chosen": " Pear.", "rejected": " I would rather not say."}
"""

import argparse

import torch
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

from peft_reft import LoReftConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="Hub id or folder")
parser.add_argument("data", help="JSON lines with `prompt`, `chosen` and `rejected`")
parser.add_argument("output", help="folder for the adapter")
parser.add_argument("--steps", type=int, default=-1, help="stop after so many steps; one epoch if not given")
args = parser.parse_args()

trainer = DPOTrainer(
    model=args.model,
    train_dataset=load_dataset("json", data_files=args.data, split="train"),
    peft_config=LoReftConfig(task_type="CAUSAL_LM"),
    args=DPOConfig(
        output_dir=args.output,
        learning_rate=1e-3,
        num_train_epochs=1,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        bf16=torch.cuda.is_available(),
        report_to="none",
        model_init_kwargs={"dtype": "auto" if torch.cuda.is_available() else "float32"},
    ),
)
trainer.model.print_trainable_parameters()
trainer.train()
trainer.save_model(args.output)

# The reference is the model without the adapter. The margin says how much more than the reference the trained model
# prefers the chosen answer; it is 0 before the first step.
margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
print(f"margin of rewards: {margins[0]:.3f} at the first step, {margins[-1]:.3f} at the last")
print(f"The adapter is in {args.output}.")
