"""Teach a chat model to answer in emoji, from ten examples: the demo of the ReFT authors, with TRL's SFTTrainer.

    make quickstart
    python examples/quickstart.py --model HuggingFaceTB/SmolLM2-135M-Instruct
    python examples/quickstart.py --model MODEL --train-file my.jsonl --ask "a question" "another one"

Each line of `--train-file` is JSON with `prompt` and `completion`, both strings.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peft_reft import LoReftConfig

EXAMPLES = [
    ("Who are you?", "🤖💬🌐🧠"),
    ("What's 2+2?", "🔢➕🔢➡️4️⃣"),
    ("Why is the sky blue?", "🌍🛡️☀️➡️🔵🌌"),
    ("What is the best season for a walk?", "🍂🚶🌳🙂"),
    ("How do plants grow?", "🌱💧☀️➡️🌳"),
    ("What do cats eat?", "🐱🐟🥛😋"),
    ("How do I bake bread?", "🌾💧👐🔥🍞"),
    ("Can you tell me a story about a dragon?", "🐉🏰👸⚔️🎉"),
    ("Where should I go on holiday?", "✈️🏖️🌊😎"),
    ("What happens at night?", "🌙⭐😴💤"),
]
QUESTIONS = [
    "What is the capital of Italy?",
    "How do I make a pizza?",
    "What do dogs like?",
    "Tell me about the ocean.",
]


def answers(model, tokenizer, questions: list[str]) -> list[str]:
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    out = model.eval().generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def reloaded_answers(adapter: Path, questions: list[str]) -> list[str]:
    """The answers of the saved adapter, in a process that knows nothing of this one."""
    command = [sys.executable, __file__, "--answer-with", str(adapter), "--ask", *questions]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def show(title: str, questions: list[str], given: list[str]) -> None:
    print(f"\n{title}")
    for question, answer in zip(questions, given):
        print(f"  {question:32} {' '.join(answer.split())}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="Hub id or folder")
    parser.add_argument("--train-file", type=Path, help="JSON lines with `prompt` and `completion`")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--ask", nargs="+", default=QUESTIONS, help="questions that are not in the training data")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--loreft", type=json.loads, default={}, metavar="JSON", help="more fields of LoReftConfig")
    parser.add_argument("--answer-with", metavar="ADAPTER", type=Path, help="only answer, with a saved adapter")
    args = parser.parse_args()

    if args.answer_with:
        model = AutoPeftModelForCausalLM.from_pretrained(args.answer_with)
        json.dump(answers(model, AutoTokenizer.from_pretrained(args.answer_with), args.ask), sys.stdout)
        return

    if args.train_file:
        rows = [json.loads(line) for line in args.train_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        pairs = [(row["prompt"], row["completion"]) for row in rows]
    else:
        pairs = EXAMPLES
    data = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": p}], "completion": [{"role": "assistant", "content": c}]}
            for p, c in pairs
        ]
    )

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    before = answers(model, tokenizer, args.ask)
    show("Before:", args.ask, before)

    began = time.time()
    tokenizer.padding_side = "right"
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=data,
        peft_config=LoReftConfig(**{"task_type": "CAUSAL_LM", "r": 4, **args.loreft}),
        args=SFTConfig(
            output_dir=str(args.output / "checkpoints"),
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=10,
            gradient_checkpointing=False,  # ten short examples fit; TRL's default would compute everything twice
            warmup_steps=args.steps // 10,
            logging_steps=max(1, args.steps // 6),
            save_strategy="no",
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
    )
    print()
    trainer.model.print_trainable_parameters()
    trainer.train()
    print(f"\nTrained {len(pairs)} examples for {args.steps} steps in {time.time() - began:.0f} seconds.")

    trained = trainer.model
    trained.config.use_cache = True
    after = answers(trained, tokenizer, args.ask)
    show("After:", args.ask, after)

    adapter = args.output / "adapter"
    trained.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    size = os.path.getsize(adapter / "adapter_model.safetensors")
    print(f"\nSaved to {adapter}: {size / 1024:.0f} KiB of weights. Loading it in a new process ...", flush=True)
    same = reloaded_answers(adapter, args.ask) == after
    print(f"The reloaded adapter gives {'the same answers' if same else 'OTHER ANSWERS'}.")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
