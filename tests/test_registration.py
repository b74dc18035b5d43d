"""`import peft_reft` makes PEFT know the method, however often and in whatever order. Runs without TRL."""

import copy
import functools
import importlib
import json
import pickle
import re
import subprocess
import sys

import pytest
from peft import PeftConfig, PeftType, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_reft
from peft_reft import LoReftConfig, LoReftModel


def test_the_member_is_a_member_like_any_other():
    member = PeftType.LOREFT
    assert member is PeftType("LOREFT") is PeftType["LOREFT"] is PeftType.__members__["LOREFT"]
    assert list(PeftType).count(member) == 1 and list(PeftType)[-1] is member
    assert member == "LOREFT" and member.value == "LOREFT" and member.name == "LOREFT"
    assert str(member) == str(PeftType.LORA).replace("LORA", "LOREFT")
    assert repr(member) == repr(PeftType.LORA).replace("LORA", "LOREFT")
    assert json.dumps({"peft_type": member}) == '{"peft_type": "LOREFT"}'
    assert hash(member) == hash("LOREFT") and {member: 1}[PeftType("LOREFT")] == 1
    assert copy.deepcopy(member) is member and copy.copy(member) is member
    assert isinstance(member, PeftType) and len(PeftType) == len(set(PeftType))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_type_and_a_config_survive_pickling(protocol):
    assert pickle.loads(pickle.dumps(PeftType.LOREFT, protocol)) is PeftType.LOREFT
    config = LoReftConfig(r=3, positions={"0": "f1", "1-": "l2"}, target_modules=None)
    assert pickle.loads(pickle.dumps(config, protocol)) == config


def test_peft_finds_the_classes():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LOREFT] is LoReftConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LOREFT] is LoReftModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LOREFT] == "loreft_"
    assert get_peft_config({"peft_type": "LOREFT", "r": 2}) == LoReftConfig(r=2)


def test_importing_again_and_reloading():
    before = len(PeftType)
    importlib.reload(peft_reft)
    importlib.reload(sys.modules["peft_reft.register"]).add_peft_type()
    assert len(PeftType) == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LOREFT] is peft_reft.LoReftConfig


def test_a_saved_config_is_found_by_pefts_own_loader(tmp_path):
    config = LoReftConfig(task_type="CAUSAL_LM", r=5, positions="f1+l3")
    config.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is LoReftConfig and loaded == config


def test_public_names():
    assert sorted(peft_reft.__all__) == [
        "DataCollatorForLoReft",
        "Intervention",
        "LoReftConfig",
        "LoReftModel",
        "LoReftRuntimeConfig",
        "Positions",
        "chat_marks",
        "create_loreft_optimizer",
        "edit_norms",
        "hotswap_adapter",
        "interchange",
        "interchange_accuracy",
        "prompt_lengths",
        "show_positions",
    ]
    assert all(hasattr(peft_reft, name) for name in peft_reft.__all__)


@functools.cache
def import_in_a_new_process():
    """What a new process prints that imports this package, without jaxtyping: whether each trainer came along."""
    # Warnings are errors for what this package runs; peft is imported before, and what it says is its own.
    code = (
        "import sys; sys.modules['jaxtyping'] = None; import peft, warnings; warnings.simplefilter('error');"
        "import peft_reft, peft_reft.edits.apply, peft_reft.integrations.trainer_checks;"
        "names = ['trl', 'matplotlib', 'datasets', 'transformers.trainer'];"
        "print([name for name in names if name in sys.modules])"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_import_needs_no_trainer_and_no_jaxtyping():
    done = import_in_a_new_process()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_import_is_silent():
    # peft's own: torchao's, and on some processors bitsandbytes'.
    own = re.compile(r"Failed to load (.*torchao|CPU gemm_4bit_forward).*|W\d+ .*torch/utils/_pytree.py.*")
    assert [line for line in import_in_a_new_process().stderr.splitlines() if not own.match(line)] == []
