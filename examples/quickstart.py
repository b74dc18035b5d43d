"""Teach a chat model to answer in emoji, from ten examples: the demo of the paper's authors, with TRL's SFTTrainer.

    make quickstart
    python examples/quickstart.py --model HuggingFaceTB/SmolLM2-135M-Instruct
    python examples/quickstart.py --model MODEL --train-file my.jsonl --ask "a question" "another one"

Each line of the file is JSON with `prompt` and `completion`, both strings.
"""
# ruff: noqa: E402 (imports take a while: the first line is printed before, and loggers are set)

import argparse
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

ASK = ["What is the capital of Italy?", "How do I make a pizza?", "What do dogs like?", "Tell me about the ocean."]
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or folder")
parser.add_argument("--train-file", type=Path, default=Path(__file__).with_name("emoji.jsonl"))
parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
parser.add_argument("--ask", nargs="+", default=ASK, help="questions that are not in the training data")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--loreft", type=json.loads, default={}, metavar="JSON", help="more fields of LoReftConfig")
args = parser.parse_args()
print(f"Teaching {args.model} to answer like {args.train_file.name}: about 4 minutes on two CPU cores.", flush=True)

for name in ("torchao", "torch.utils._pytree"):  # torchao misses its GPU kernels, torch dislikes a call of torchao's
    logging.getLogger(name).setLevel(logging.ERROR)

import datasets
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from peft_reft import LoReftConfig

# transformers 5.23 renamed both; PEFT 0.21 reads the one, and older versions of transformers know only the other.
warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
transformers.utils.logging.disable_progress_bar()  # this script says where it is
datasets.disable_progress_bars()


def ask(model):
    chats = [[{"role": "user", "content": question}] for question in args.ask]
    rendering = dict(add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True)
    inputs = tokenizer.apply_chat_template(chats, **rendering).to(model.device)
    tokens = model.eval().generate(**inputs, max_new_tokens=24, do_sample=False)
    texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


class Progress(TrainerCallback):
    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            print(f"    step {state.global_step} of {state.max_steps}, loss {float(logs['loss']):.3f}", flush=True)


print("1/5 Asking the model before it is trained", flush=True)
tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(args.model)
before = ask(model)
rows = [json.loads(line) for line in args.train_file.read_text(encoding="utf-8").splitlines() if line.strip()]
for row in rows:
    row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    row["completion"] = [{"role": "assistant", "content": row["completion"]}]
print(f"2/5 Training on {len(rows)} examples for {args.steps} steps", flush=True)
config = LoReftConfig(**{"task_type": "CAUSAL_LM", "r": 4, **args.loreft})
usual = dict(max_steps=args.steps, learning_rate=4e-3, warmup_steps=args.steps // 10, bf16=torch.cuda.is_available())
quiet = dict(logging_steps=max(1, args.steps // 6), disable_tqdm=True, report_to="none", dataloader_pin_memory=False)
batch = dict(per_device_train_batch_size=10, gradient_checkpointing=False, save_strategy="no")  # it fits in memory
settings = SFTConfig(str(args.output / "checkpoints"), **usual, **quiet, **batch)
data = datasets.Dataset.from_list(rows)
trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, peft_config=config)
trainer.add_callback(Progress())
trainer.remove_callback(PrinterCallback)
trainer.model.print_trainable_parameters()
trainer.train()
print("3/5 Asking the trained model", flush=True)
trainer.model.config.use_cache = True
after = ask(trainer.model)
adapter = args.output / "adapter"
trainer.save_model(str(adapter))
size = (adapter / "adapter_model.safetensors").stat().st_size / 1024
print(f"4/5 Saved to {adapter}: {size:.0f} KiB of weights", flush=True)
print("5/5 Loading the adapter in a new process (examples/ask.py)", flush=True)
command = [sys.executable, str(Path(__file__).with_name("ask.py")), str(adapter), *args.ask]
reloaded = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
if reloaded != after:
    raise SystemExit(f"The reloaded adapter gives OTHER ANSWERS: {reloaded}")
print("    It gives the same answers.")

for question, old, new in zip(args.ask, before, after):
    print(f"\n{question}\n    before   {old}\n    after    {new}")
