"""Load a saved adapter and ask it: one line for each answer.

    python examples/ask.py outputs/quickstart/adapter "What do cats eat?" "Who are you?"

Without `import peft_reft` PEFT does not know the method.
"""
# ruff: noqa: E402 (loggers are set before the libraries that log while they are imported)

import logging
import sys
import warnings

if len(sys.argv) < 3:
    raise SystemExit(__doc__)

for name in ("torchao", "torch.utils._pytree"):  # torchao misses its GPU kernels, torch dislikes a call of torchao's
    logging.getLogger(name).setLevel(logging.ERROR)

import transformers
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

import peft_reft  # noqa: F401

# PEFT 0.21 reads an attribute that transformers 5.23 has renamed.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
transformers.utils.logging.disable_progress_bar()

adapter, *questions = sys.argv[1:]
model = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
tokenizer = AutoTokenizer.from_pretrained(adapter, padding_side="left")
chats = [[{"role": "user", "content": question}] for question in questions]
inputs = tokenizer.apply_chat_template(
    chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
).to(model.device)
tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
for text in tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True):
    print(" ".join(text.split()))
