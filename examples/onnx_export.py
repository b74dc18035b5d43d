"""Export a base model with its adapter to ONNX, and write an answer with ONNX Runtime.

    python examples/onnx_export.py outputs/quickstart/adapter outputs/model.onnx "What is the capital of Italy?"

It needs `pip install onnxscript onnxruntime`. The positions are an input of the exported model: they are those of the
prompt, however many tokens of the answer stand behind it. The adapter must edit prompts alone (no `g` in `positions`).
"""

import sys

import numpy
import onnxruntime
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

import peft_reft

if len(sys.argv) != 4:
    raise SystemExit(__doc__)
adapter, path, question = sys.argv[1:]
NEW_TOKENS = 16

model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(adapter)
ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)["input_ids"]
collator = peft_reft.DataCollatorForLoReft(torch.utils.data.default_collate, model.active_peft_config)
with peft_reft.prompt_lengths([ids.shape[1]]):  # the whole row is a prompt
    positions = collator([{"input_ids": ids[0]}])["intervention_positions"]

inputs = {"input_ids": ids, "intervention_positions": positions}
batch, length = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
shapes = {"input_ids": {0: batch, 1: length}, "intervention_positions": {0: batch}, "use_cache": None}
program = torch.onnx.export(
    model.get_base_model(), (), kwargs={**inputs, "use_cache": False}, dynamic_shapes=shapes, output_names=["logits"]
)
program.save(path)

session = onnxruntime.InferenceSession(path)
tokens = ids.numpy()
for _ in range(NEW_TOKENS):
    (logits,) = session.run(["logits"], {"input_ids": tokens, "intervention_positions": positions.numpy()})
    tokens = numpy.concatenate([tokens, logits[:, -1:].argmax(-1)], 1)
print("ONNX Runtime:", tokenizer.decode(tokens[0, ids.shape[1] :]))

written = model.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
print("generate:    ", tokenizer.decode(written[0, ids.shape[1] :]))
