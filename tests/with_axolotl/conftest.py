"""axolotl with `adapter: loreft`. `make test-axolotl` runs this folder in an environment of its own."""

import os

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import gc
import json
import re
from pathlib import Path

import pytest
import yaml
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets, load_preference_datasets
from axolotl.train import setup_model_and_trainer, train
from axolotl.utils.data import rl, sft
from conftest import build, make_tokenizer
from transformers.trainer_utils import set_seed

gc.freeze()  # axolotl collects garbage three times for each model; what was imported until here stays anyway
ROOT = Path(__file__).parents[2]
CHATS = [
    [("a b c", "1 2"), ("d e f g", "3")],
    [("h i", "4 5 6")],
    [("j k l m n o", "7 8"), ("p q", "9"), ("r s t", "1 1")],
    [("u v w x y z", "2 2")],
    [("a c e g i k m", "3 3 3"), ("b d f", "4")],
    [("l m n", "5 6")],
    [("o p q r s", "7 7 8 8")],
    [("t u", "9 9"), ("v w x", "0")],
]
PAIRS = [("a b c", "1 2"), ("d e f g h", "3"), ("i j", "4 5"), ("k l m n", "6"), ("o p q r s", "7 8"), ("t u v", "9")]


def page():
    """The YAML of docs/axolotl.md."""
    text = (ROOT / "docs" / "axolotl.md").read_text(encoding="utf-8")
    return yaml.safe_load(re.search(r"```yaml\n(base_model.*?)```", text, re.DOTALL)[1])


def as_messages(turns):
    return [
        message
        for prompt, answer in turns
        for message in ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    ]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


class World:
    """A folder with a tiny model and data, and axolotl runs in it: the page's YAML with changes."""

    def __init__(self, folder):
        self.folder = folder
        self.model = str(folder / "model")
        build("llama").save_pretrained(self.model)
        self.tokenizer = make_tokenizer()
        self.tokenizer.save_pretrained(self.model)
        self.chats = {
            "path": write(folder / "chats.jsonl", [{"messages": as_messages(turns)} for turns in CHATS]),
            "ds_type": "json",
            "type": "chat_template",
        }
        pairs = [{"instruction": prompt, "input": "", "output": answer} for prompt, answer in PAIRS]
        self.pairs = {"path": write(folder / "pairs.jsonl", pairs), "ds_type": "json", "type": "alpaca"}

    def settings(self, **changes):
        """Settings for a short training on a CPU."""
        settings = page()
        settings.update(
            base_model=self.model,
            datasets=[self.chats],
            dataset_prepared_path=str(self.folder / "prepared"),
            output_dir=str(self.folder / "out"),
            sequence_len=48,  # two or three chats
            micro_batch_size=1,
            max_steps=2,
            bf16=False,
            learning_rate=0.01,
            seed=0,
            logging_steps=1,
            dataset_num_proc=1,
            dataloader_num_workers=0,
            dataloader_prefetch_factor=None,
            eot_tokens=["<|im_end|>"],
        )
        settings.update(changes)
        return {name: value for name, value in settings.items() if value is not None}

    def config_file(self, **changes):
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.settings(**changes)), encoding="utf-8")
        return str(path)

    def load(self, **changes):
        """What axolotl makes of the YAML."""
        return load_cfg(self.config_file(**changes))

    def data(self, cfg):
        return load_preference_datasets(cfg=cfg) if cfg.rl else load_datasets(cfg=cfg)

    def train(self, **changes):
        """Train as `axolotl train` does; return the model and the trainer."""
        set_seed(0)
        cfg = self.load(**changes)
        model, _, trainer = train(cfg=cfg, dataset_meta=self.data(cfg))
        return model, trainer

    def trainer(self, **changes):
        """The trainer that `axolotl train` would run."""
        cfg = self.load(**changes)
        return setup_model_and_trainer(cfg, self.data(cfg))[0]


@pytest.fixture
def world(tmp_path, monkeypatch):
    # A process of its own would save a few rows for a next run, which no test has.
    for module in (sft, rl):
        monkeypatch.setattr(module, "save_preprocessed_dataset", lambda *args: None)
    return World(tmp_path)
