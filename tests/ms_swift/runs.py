"""Runs of ms-swift in this process, and which tokens of its batches are to be edited."""

import contextlib
import io

import torch
from swift.pipelines.train.rlhf import SwiftRLHF
from swift.pipelines.train.sft import SwiftSft

from peft_reft_cli import main as peft_reft_command


def plugin():
    """What `$(peft-reft swift-plugin)` puts into a command."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert peft_reft_command(["swift-plugin"]) == 0
    return printed.getvalue().strip()


def arguments(model, data, out, **settings):
    """A command line: four steps on a CPU that are logged and saved, unless `settings` say otherwise."""
    settings = {
        "model": model,
        "model_type": "qwen2",
        "template": "chatml",
        "torch_dtype": "float32",
        "external_plugins": plugin(),
        "tuner_type": "loreft",
        "reft_args": '{"r": 4, "positions": "f2+l2"}',
        "dataset": data,
        "split_dataset_ratio": 0,
        "output_dir": str(out),
        "add_version": "false",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "check_model": "false",
        "use_hf": "true",
        "load_from_cache_file": "false",
        "dataloader_num_workers": 0,
        **settings,
    }
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


class Spy:
    """A pipeline that notes its trainer, the weights at its start, and what its model is given."""

    def train(self, trainer):
        self.trainer, self.batches = trainer, []
        self.before = weights(self)

        def note(model, args, kwargs):
            if model.training:
                self.batches.append(kwargs)

        trainer.model.register_forward_pre_hook(note, with_kwargs=True)
        return super().train(trainer)


class Sft(Spy, SwiftSft):
    """`swift sft`."""


class Rlhf(Spy, SwiftRLHF):
    """`swift rlhf`."""


def train(words, pipeline=Sft):
    """Run a command; return the pipeline. Every tensor of the adapter has moved."""
    run = pipeline(words)
    run.main()
    assert run.before
    assert not any(torch.equal(tensor, run.before[name]) for name, tensor in weights(run).items())
    return run


def losses(run):
    return [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]


def weights(run):
    return {name: p.detach().clone() for name, p in run.trainer.model.named_parameters() if "loreft" in name}


def to_edit(ids, header):
    """The columns that `f2+l2` edits in one chat: its first two, and the two before each answer, by its headers."""
    ends = [end for end in range(len(header), len(ids) + 1) if ids[end - len(header) : end] == header]
    return {0, 1, *(end - k for end in ends for k in (1, 2))}


def edited(batch):
    """The columns that a batch names, a set for each row."""
    return [{column for column in row if column >= 0} for row in batch["intervention_positions"].tolist()]
