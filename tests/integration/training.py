"""What the tests of trainers share: settings of a short training, and what it changed."""

from dataclasses import fields

import pytest
import torch
from conftest import LAYERS

# What PEFT and transformers warn of in trainings on preferences and rollouts.
WARNINGS = [
    # PEFT looks for a name in "loreft_", finds TRL's "ref" there by chance, and warns; keys are matched by structure.
    pytest.mark.filterwarnings("ignore:Adapter name 'ref' should not be contained in the prefix:UserWarning"),
    # transformers 5.23 has another name for it; TRL 1.16 sets it by default.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_disable` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]
CHECKPOINTING = pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])


def arguments(config_class, folder, **settings):
    """A trainer's arguments: two steps on a CPU, logged and not saved, unless `settings` say otherwise."""
    common = dict(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        max_steps=2,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
    )
    settings = {**common, **settings}
    if "activation_checkpointing" not in {field.name for field in fields(config_class)}:  # transformers before 5.23
        settings = {name.replace("activation_", "gradient_"): value for name, value in settings.items()}
    return config_class(**settings)


def checkpoints(args):
    """Whether training recomputes activations."""
    return getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing


def logs(trainer, key):
    """What the trainer logged under that name, step by step."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def losses(trainer):
    return logs(trainer, "loss")


def trainable(model):
    """Copies of the trainable parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def moved(model, train):
    """Names of the trainable parameters that `train` changes. It changes no frozen one."""
    before = trainable(model)
    frozen = {name: p.clone() for name, p in model.named_parameters() if name not in before}
    train()
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    return {name for name, p in trainable(model).items() if not torch.equal(p, before[name])}


def assert_all_moved(model, train, edits=3 * LAYERS, others=0):
    """`train` changes every trainable tensor, so many of the adapter's edits and so many others, and nothing else."""
    before = trainable(model)
    assert sum("loreft_weights" in name for name in before) == edits
    assert len(before) == edits + others
    assert moved(model, train) == set(before)
