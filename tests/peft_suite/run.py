"""`make test-peft`: PEFT's own tests with LoReFT in their matrix. Arguments go to pytest."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

from stand_ins import make_stand_ins

HERE = Path(__file__).parent
OUTPUTS = HERE.parent.parent / "outputs"
# Those with a list of methods that LoRA is in.
TESTS = [
    "config",
    "custom_models",
    "decoder_models",
    "encoder_decoder_models",
    "feature_extraction_models",
    "low_level_api",
    "other",
    "seq_classifier",
    "token_classification_qa",
    "trainable_tokens",
]


def fetch_peft() -> Path:
    """Fetch PEFT's source distribution, of the installed version, from PyPI: wheels have no tests."""
    name = f"peft-{version('peft')}"
    if not (OUTPUTS / name).exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--no-build-isolation", "-d", OUTPUTS, name.replace("-", "==")], check=True)
        with tarfile.open(OUTPUTS / f"{name}.tar.gz") as archive:
            archive.extractall(OUTPUTS, filter="data")
    (OUTPUTS / name / "tests" / "__init__.py").touch()  # left out of the distribution; its tests import each other
    return OUTPUTS / name


def main() -> int:
    peft, hub = fetch_peft(), OUTPUTS / "peft-suite-hub"
    make_stand_ins(hub)
    offline = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_CACHE": str(hub),
        "TOKENIZERS_PARALLELISM": "false",
    }
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    arguments = sys.argv[1:]
    if not any(argument.startswith("tests/") for argument in arguments):
        arguments += [f"tests/test_{name}.py" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-c", HERE / "pytest.ini", "--rootdir", peft]
    return subprocess.run([*command, *arguments], cwd=peft, env=os.environ | offline | {"PYTHONPATH": path}).returncode


if __name__ == "__main__":
    sys.exit(main())
