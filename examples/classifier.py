"""Train a classifier of texts: an encoder, an adapter, and a new head.

    python examples/classifier.py sentence-transformers/all-MiniLM-L6-v2 texts.jsonl outputs/classifier

Each line of the file is a text with its class, a number from 0 up:

    {"text": "How far is the moon?", "label": 1}

A fifth of the rows is held out for the accuracy.
"""

import argparse

import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from peft_reft import LoReftConfig, create_loreft_optimizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="Hub id or folder of an encoder")
parser.add_argument("data", help="JSON lines with `text` and `label`")
parser.add_argument("output", help="folder for the adapter and the head")
parser.add_argument("--steps", type=int, default=-1, help="stop after so many steps; all 10 epochs if not given")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
data = load_dataset("json", data_files=args.data, split="train")
classes = max(data["label"]) + 1
data = data.map(lambda row: tokenizer(row["text"], truncation=True), remove_columns="text")
data = data.train_test_split(0.2, seed=0)


def new_model():
    return AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=classes)


# A classifier's whole text is the prompt: its first 7 and its last 7 tokens are edited.
# With task_type="SEQ_CLS" PEFT trains and saves the head as well.
model = get_peft_model(new_model(), LoReftConfig(task_type="SEQ_CLS"))
model.print_trainable_parameters()
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.output,
        num_train_epochs=10,
        max_steps=args.steps,
        per_device_train_batch_size=16,
        save_strategy="no",
        bf16=torch.cuda.is_available(),
        report_to="none",
    ),
    train_dataset=data["train"],
    eval_dataset=data["test"],
    data_collator=DataCollatorWithPadding(tokenizer),
    optimizers=(create_loreft_optimizer(model, lr=1e-3), None),  # the new head has a rate of its own
    compute_metrics=lambda given: {"accuracy": (given.predictions.argmax(-1) == given.label_ids).mean().item()},
)
trainer.train()
print(f"accuracy on {len(data['test'])} held-out texts: {trainer.evaluate()['eval_accuracy']:.3f}")
model.save_pretrained(args.output)
tokenizer.save_pretrained(args.output)

loaded = PeftModel.from_pretrained(new_model(), args.output).eval()
text = tokenizer.decode(data["test"][0]["input_ids"], skip_special_tokens=True)
with torch.no_grad():
    logits = loaded(**tokenizer(text, return_tensors="pt")).logits  # (1, classes)
print(f"The adapter was loaded from {args.output}. It gives class {logits.argmax().item()} to: {text}")
