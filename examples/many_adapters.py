"""Answer with several adapters at once: one model, one batch, an adapter for each row.

    python examples/many_adapters.py "What do cats eat?" outputs/quickstart/adapter outputs/chats

All adapters belong to one base model, which the first one names. The base itself answers too. (Behind a web
server: docs/server.md and docs/serving.md.)
"""

import argparse
from pathlib import Path

from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_reft  # noqa: F401 (it makes the method known to PEFT)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("question")
parser.add_argument("adapters", nargs="+", type=Path, help="folders of adapters")
parser.add_argument("--tokens", type=int, default=24, help="tokens of an answer, at most")
args = parser.parse_args()

names = [f"adapter{number}" for number in range(1, len(args.adapters) + 1)]
base = PeftConfig.from_pretrained(str(args.adapters[0])).base_model_name_or_path
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(args.adapters[0]), names[0])
for name, folder in zip(names[1:], args.adapters[1:]):
    model.load_adapter(str(folder), name)
tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")

rows = ["__base__", *names]  # "__base__" is PEFT's name for a row without an adapter
chats = [[{"role": "user", "content": args.question}] for _ in rows]
inputs = tokenizer.apply_chat_template(
    chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
)
tokens = model.eval().generate(**inputs, adapter_names=rows, max_new_tokens=args.tokens, do_sample=False)
answers = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

for name, answer in zip(["the base", *map(str, args.adapters)], answers):
    print(f"{name}: {' '.join(answer.split())}")
