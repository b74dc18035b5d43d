"""Train an adapter on chats, with TRL's SFTTrainer.

    python examples/sft_chat.py outputs/SmolLM2-135M-Instruct chats.jsonl outputs/chats

Each line of the file is a chat, with as many turns as you like:

    {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small model."}]}

The last chat of the file is not trained on: its first question is asked before and after.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peft_reft import LoReftConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="Hub id or folder of a chat model")
parser.add_argument("data", help="JSON lines with `messages`")
parser.add_argument("output", help="folder for the adapter")
parser.add_argument("--steps", type=int, default=-1, help="stop after so many steps; all 3 epochs if not given")
args = parser.parse_args()

data = load_dataset("json", data_files=args.data, split="train")
question = data[-1]["messages"][:1]
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model)


def answer(model):
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.eval().generate(**inputs.to(model.device), max_new_tokens=32, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


before = answer(model)
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=data.select(range(len(data) - 1)),
    # The first 7 tokens of the chat and the last 7 before each answer are edited. The Trainer finds the headers of the
    # chat template, which say where answers begin, and they are saved with the adapter.
    peft_config=LoReftConfig(task_type="CAUSAL_LM"),
    args=SFTConfig(
        output_dir=args.output,
        learning_rate=1e-3,  # higher than for LoRA
        num_train_epochs=3,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        save_strategy="no",
        bf16=torch.cuda.is_available(),
        report_to="none",
    ),
)
trainer.train()
trainer.save_model(args.output)

trainer.model.config.use_cache = True
print(f"\n{question[0]['content']}\nbefore: {before}\nafter:  {answer(trainer.model)}")
print(f"\nThe adapter is in {args.output}. To ask it: python examples/ask.py {args.output} QUESTION")
