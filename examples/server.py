"""Serve adapters of one model over HTTP, in batches with an adapter for each row. Its page is docs/server.md.

ADAPTERS="emoji=outputs/quickstart/adapter mine=outputs/mine" uvicorn --app-dir examples server:app
"""

import asyncio
import os

from fastapi import Body, FastAPI, HTTPException
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

import peft_reft  # noqa: F401 (it makes the method known to PEFT)

ADAPTERS = dict(each.split("=") for each in os.environ["ADAPTERS"].split())
ROWS, SECONDS = 16, 0.005  # a batch takes so many requests, and waits so long for them
PROMPT, ANSWER = 768, 256  # tokens, at most; the model's context must hold both

(name, folder), *others = ADAPTERS.items()
model = AutoPeftModelForCausalLM.from_pretrained(folder, adapter_name=name, device_map="auto").eval()
for other, folder in others:
    model.load_adapter(folder, other)
tokenizer = AutoTokenizer.from_pretrained(model.peft_config[name].base_model_name_or_path, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
app, waiting, turn = FastAPI(), [], asyncio.Lock()


async def answer_batch():
    batch, waiting[:ROWS] = waiting[:ROWS], []
    names, prompts, limits, answers = zip(*batch)
    try:
        inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
        options = dict(adapter_names=list(names), max_new_tokens=max(limits), do_sample=False)
        rows = await asyncio.to_thread(model.generate, **inputs, **options)
        for row, limit, answer in zip(rows[:, inputs["input_ids"].shape[1] :], limits, answers):
            answer.set_result(tokenizer.decode(row[:limit], skip_special_tokens=True))
    except Exception as error:  # it is that of this batch alone
        for answer in answers:
            answer.set_exception(error)


@app.post("/generate")
async def ask(adapter: str = Body(), prompt: str | list[dict] = Body(), max_new_tokens: int = Body(ge=1, le=ANSWER)):
    if adapter not in [*ADAPTERS, "__base__"]:
        raise HTTPException(404, f"adapter={adapter!r}: unknown. There are: {', '.join(ADAPTERS)}, __base__.")
    chat = dict(add_generation_prompt=True, return_dict=False)
    try:
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.apply_chat_template(prompt, **chat)
    except Exception as error:  # no message, or one without a role: the chat template refuses it
        raise HTTPException(400, f"prompt: {error}") from error
    if not 1 <= len(ids) <= PROMPT:
        raise HTTPException(400, f"prompt: it has {len(ids)} tokens; 1 to {PROMPT} are allowed (PROMPT).")
    answer = asyncio.get_running_loop().create_future()
    waiting.append((adapter, ids, max_new_tokens, answer))
    async with turn:  # one batch at a time; meanwhile others wait together for the next
        while not answer.done():
            await asyncio.sleep(SECONDS)
            await answer_batch()
    return {"text": await answer}
