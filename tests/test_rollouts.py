"""What is sent for TRL's rollouts in vLLM, and what is refused. The engine itself is in tests/rollouts."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import build, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_reft import LoReftConfig
from peft_reft.integrations.first_forwards import attachment_of
from peft_reft.integrations.trl.policy import Policy
from peft_reft.integrations.trl.turns import Histories
from peft_reft.positions.rollouts import Rollouts


def alone():
    """What a `VLLMGeneration` says of a training in one process."""
    from trl.distributed import DistributedBackend

    state = SimpleNamespace(deepspeed_plugin=None)
    accelerator = SimpleNamespace(state=state, device=torch.device("cpu"))
    return SimpleNamespace(_dist=DistributedBackend(accelerator), accelerator=accelerator)


def adapted(**fields):
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", **fields))
    randomise(model)
    return model


@pytest.mark.parametrize(
    "fields",
    [
        dict(positions="f7+l7", response_template=[[4, 8]], instruction_template=[[4, 7]]),
        dict(tie="model"),
        dict(tie="position", positions="f2+l2"),
        dict(positions={"0": "f5", "1-": "l5+g1"}, r={"0": 2, "1-": 8}),
        dict(intervention="bias", positions="f2+l2"),
        dict(gate=True, act_fn="relu", intervention="noreft"),
    ],
    ids=lambda fields: ",".join(fields),
)
def test_the_files_are_those_of_save_pretrained(fields, tmp_path):
    model = adapted(**fields)
    model.save_pretrained(tmp_path)
    files = Policy.of(model).files(alone())
    assert files.weights == (tmp_path / "adapter_model.safetensors").read_bytes()
    assert files.config == (tmp_path / "adapter_config.json").read_bytes()
    assert not model.peft_config["default"].inference_mode
    PeftModel.from_pretrained(build("llama"), tmp_path)


@pytest.mark.filterwarnings("ignore:Adapter name 'ref' should not be contained in the prefix:UserWarning")
def test_the_files_are_those_of_the_active_adapter(tmp_path):
    """TRL keeps a copy under another name as its reference."""
    model = adapted(positions="f2+l2")
    model.add_adapter("ref", LoReftConfig(task_type="CAUSAL_LM", r=2, positions="l1"))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert Policy.of(model).files(alone()).weights == (tmp_path / "adapter_model.safetensors").read_bytes()


def test_models_without_loreft_are_left_to_trl():
    assert Policy.of(build("llama")) is None
    assert Policy.of(get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM", r=4))) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\]"),
        (dict(trainable_token_indices=[3]), r"trainable_token_indices=\[3\]"),
        (dict(intervention="interchange"), "intervention='interchange'"),
    ],
    ids=["modules_to_save", "trainable_token_indices", "interchange"],
)
def test_adapters_that_an_engine_cannot_serve_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"use_vllm=True.*{message}"):
        Policy.of(adapted(**fields))


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
def test_a_base_that_lora_has_changed_is_refused():
    base = get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM", r=4)).base_model.model
    model = get_peft_model(base, LoReftConfig(task_type="CAUSAL_LM", r=4), adapter_name="second")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj belongs to another method of PEFT"):
        Policy.of(model)


@pytest.mark.parametrize("size", ["5GB", "50KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_that_was_changed_in_memory_is_refused(size, dtype, tmp_path):
    """The engine loads it from disk."""
    build("llama").save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors").exists() == (size == "5GB")
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    base.lm_head.float()  # as some trainers do
    policy = Policy.of(get_peft_model(base, LoReftConfig(task_type="CAUSAL_LM")))
    with torch.no_grad():
        base.model.layers[1].self_attn.v_proj.weight.add_(0.01)
    message = rf"the engine loads the base model from {tmp_path}, where model\.layers\.1\.self_attn\.v_proj\.weight"
    with pytest.raises(ValueError, match=message):
        policy.check()


def test_an_adapter_without_a_peft_model_is_refused():
    model = build("llama")
    model.add_adapter(LoReftConfig(task_type="CAUSAL_LM", r=4))
    with pytest.raises(ValueError, match=r"the model \(LlamaForCausalLM\) has LoReFT, but"):
        Policy.of(model)


def test_two_active_adapters_are_refused():
    model = adapted(positions="f2")
    model.add_adapter("second", LoReftConfig(task_type="CAUSAL_LM", r=2, positions="l1"))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="the adapters default, second are active"):
        Policy.of(model)


@pytest.mark.parametrize(
    ("positions", "header", "refused"),
    [("l1", [4, 8], False), ("l1", [7, 7], True), ("all", [7, 7], False)],
    ids=["header", "no header", "no end needed"],
)
def test_a_prompt_of_a_rollout_that_training_cannot_see_is_refused(positions, header, refused):
    """The second prompt of a rollout ends with `header`."""
    model = adapted(positions=positions, response_template=[[4, 8]], instruction_template=[[4, 7]]).train()
    attachment_of(model).rollouts = Rollouts()
    policy = Policy.of(model)
    first = [4, 7, 11, 12, 4, 8]
    second = [*first, 21, 22, 4, 7, 13, *header]
    policy.note_rollout([first, second], [[21, 22], [23]])
    row = torch.tensor([[*second, 23]])
    with pytest.raises(ValueError, match="cannot see that a prompt ended there") if refused else nullcontext():
        model(row, labels=row)


def test_plain_text_behind_which_the_model_writes_a_header_is_refused():
    """Then the headers count, and not the labels. Another answer to the same prompt is trained on."""
    model = adapted(positions="l1", response_template=[[4, 8]], instruction_template=[[4, 7]]).train()
    attachment_of(model).rollouts = Rollouts()
    prompt = [11, 12, 13]
    Policy.of(model).note_rollout([prompt, prompt], [[21, 22, 23], [21, 4, 8]])
    for answer, refused in (([21, 22, 23], False), ([21, 4, 8], True)):
        row, labels = torch.tensor([[*prompt, *answer]]), torch.tensor([[-100] * len(prompt) + answer])
        with pytest.raises(ValueError, match=r"response_template=\[\]") if refused else nullcontext():
            model(row, labels=labels)


class TestHistories:
    def test_a_tool_loop(self):
        """Two conversations; one goes on twice, the other once."""
        histories = Histories()
        assert histories.prompt_lengths([[1, 2], [3]]) == [None, None]
        histories.note([1, 2], [9], None)
        histories.note([3], [8, 8], None)
        assert histories.prompt_lengths([[1, 2, 9, 5], [3, 8, 8, 6, 6]]) == [2, 1]
        histories.note([1, 2, 9, 5], [7], 2)
        histories.note([3, 8, 8, 6, 6], [7, 7], 1)
        assert histories.prompt_lengths([[3, 8, 8, 6, 6, 7, 7, 4]]) == [1]

    def test_new_prompts_forget_what_was(self):
        histories = Histories()
        histories.note([1, 2], [9], None)
        assert histories.prompt_lengths([[1, 2, 9, 5], [3]]) == [None, None]  # by chance, the other one is new
        assert histories.prompt_lengths([[1, 2, 9, 5]]) == [None]

    def test_the_same_prompt_again_is_new(self):
        histories = Histories()
        histories.note([1, 2], [9], None)
        assert histories.prompt_lengths([[1, 2, 9]]) == [None]
