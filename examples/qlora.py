"""Train an adapter on a base model in 4 bits, as QLoRA does (extra `bnb`; works on a CPU too).

    python examples/qlora.py outputs/SmolLM2-135M-Instruct examples/emoji.jsonl outputs/four-bit

Each line of the file has a prompt and a completion, both strings.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from peft_reft import LoReftConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="Hub id or folder")
parser.add_argument("data", help="JSON lines with `prompt` and `completion`")
parser.add_argument("output", help="folder for the adapter")
parser.add_argument("--steps", type=int, default=-1, help="stop after so many steps; all 3 epochs if not given")
args = parser.parse_args()

dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
four_bit = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=dtype,
)
model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=four_bit, dtype=dtype)
print(f"The base takes {model.get_memory_footprint() / 2**20:.1f} MiB.")

# Nothing else differs from a base that is not quantised: the weights stay as they are, and hidden states are edited.
trainer = SFTTrainer(
    model=model,
    processing_class=AutoTokenizer.from_pretrained(args.model),
    train_dataset=load_dataset("json", data_files=args.data, split="train"),
    peft_config=LoReftConfig(task_type="CAUSAL_LM"),
    args=SFTConfig(
        output_dir=args.output,
        learning_rate=1e-3,
        num_train_epochs=3,
        max_steps=args.steps,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        bf16=torch.cuda.is_available(),
        report_to="none",
    ),
)
trainer.model.print_trainable_parameters()
trainer.train()
trainer.save_model(args.output)
print(f"The adapter is in {args.output}. It loads onto the base in 4 bits, and onto the full one.")
