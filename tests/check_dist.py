"""`make dist`: install wheel and sdist into clean environments, without and with each extra, and use what comes.

python tests/check_dist.py dist [--extras trl bnb viz]
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
USE = """
import peft_reft, torch, tempfile
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
base = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
model = get_peft_model(base, peft_reft.LoReftConfig(task_type="CAUSAL_LM", r=2, positions="f1+l1"))
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    PeftModel.from_pretrained(model.unload(), folder)(input_ids=torch.arange(6)[None])
"""


def run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], cwd="/", capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def check(distribution: Path, extra: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", folder)
        python = Path(folder) / "bin" / "python"
        wanted = f"{distribution}[{extra}]" if extra else str(distribution)
        run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wanted)
        run(python, "-W", "error::SyntaxWarning:peft_reft", "-c", USE)
        run(python, "-c", "import peft_reft; assert peft_reft.__file__.startswith(__import__('sys').prefix)")
        run(Path(folder) / "bin" / "peft-reft", "--help")
        if extra == "trl":
            assert "--positions" in run(Path(folder) / "bin" / "peft-reft", "train", "--help")
        if extra == "viz":
            run(python, "-c", "from peft_reft.tools.norms import plot_edit_norms; import matplotlib")
    print(f"{distribution.name}[{extra}]: installs and works", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--extras", nargs="*", default=["trl", "bnb", "viz"])
    args = parser.parse_args()
    (wheel,), (sdist,) = args.folder.glob("*.whl"), args.folder.glob("*.tar.gz")
    check(sdist.resolve(), "")
    for extra in ["", *args.extras]:
        check(wheel.resolve(), extra)


if __name__ == "__main__":
    main()
