"""ms-swift on a tiny model and chats. `make test-swift` runs this folder in an environment of its own."""

import json

import pytest
import torch
import transformers
from conftest import CAUSAL, make_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def spelled(start, count):
    return " ".join(LETTERS[(start + n) % 26] for n in range(count))


def turn(n):
    """A question of 3 to 7 letters, and the two letters that follow."""
    count = 3 + n % 5
    return [
        {"role": "user", "content": spelled(n, count)},
        {"role": "assistant", "content": spelled(n + count, 2)},
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with a tiny model and its tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), make_tokenizer()
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**CAUSAL["qwen2"][2]))
    with torch.no_grad():  # a freshly initialised model of this size says the same token to every prompt
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """Chats of different lengths; every second has two turns."""
    rows = [{"messages": [*turn(n), *(turn(n + 3) if n % 2 else [])]} for n in range(16)]
    return write(tmp_path_factory.mktemp("data") / "chats.jsonl", rows)
