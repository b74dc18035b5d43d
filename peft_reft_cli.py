"""The command line of `peft-reft`: its arguments, its exit codes, and how errors are shown.

This module stands outside the package. `import peft_reft` registers LoReFT with PEFT, so it imports PEFT and torch.
That takes seconds, and `peft-reft --help` and wrong arguments need neither. A command's module is imported when the
command runs. `benchmarks/import_time.py` measures it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

DESCRIPTION = """\
LoReFT (representation finetuning, arXiv 2404.03592) as a PEFT method.

  peft-reft train --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset_name mine.jsonl --r 4
  peft-reft suggest HuggingFaceTB/SmolLM2-135M-Instruct mine.jsonl
  peft-reft sweep HuggingFaceTB/SmolLM2-135M-Instruct mine.jsonl --budget 60
  peft-reft generate outputs/loreft "Who are you?"
  peft-reft evaluate outputs/loreft --file held_out.jsonl
  peft-reft inspect outputs/loreft
  peft-reft convert --from pyreft THEIRS OURS --positions f7+l7
  peft-reft dpo --model_name_or_path outputs/SmolLM2 --dataset_name pairs.jsonl
  peft-reft exec lm_eval --model hf --model_args pretrained=BASE,peft=outputs/loreft --tasks gsm8k
"""
EPILOG = """\
An ADAPTER is a folder that `save_pretrained` or `train` wrote, or the name of one on the Hub. Exit codes: 0 done,
1 it could not be done (the reason is on standard error), 2 wrong arguments, 130 interrupted, 141 the reader of the
output has gone (`| head`).
"""

TRAINING = {
    "train": "Finetune a causal LM with LoReFT on answers, by TRL's SFTTrainer.",
    "dpo": "Finetune a causal LM with LoReFT on preferences, by TRL's DPOTrainer.",
    "kto": "Finetune a causal LM with LoReFT on answers judged good or bad, by TRL's KTOTrainer.",
    "reward": "Train a reward model with LoReFT on preferences, by TRL's RewardTrainer.",
    "grpo": "Finetune a causal LM with LoReFT by rewards for its own answers, by TRL's GRPOTrainer.",
    "rloo": "Finetune a causal LM with LoReFT by rewards for its own answers, by TRL's RLOOTrainer.",
    "distillation": "Finetune a causal LM with LoReFT to answer as a teacher does, by TRL's DistillationTrainer.",
}
"""The commands that train. Their arguments are those of TRL's scripts, which `train_arguments` reads from TRL."""


_TRAINS = ("suggest", "sweep")
"""Commands that take the arguments of `train` behind their own."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words of the command line; default: those that the process was started with.

    Returns:
        The exit code (see `EPILOG`). The reason for a failure goes to standard error in one line; with `--traceback`
        the error itself is raised.
    """
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if "prompt" in args and not any(word.startswith("-") for word in unknown):
        args.prompt += unknown  # argparse takes prompts only if they stand before the options
        unknown = []
    if args.command == "swift-plugin":
        print(os.path.join(os.path.dirname(__file__), "peft_reft", "integrations", "swift", "loreft_plugin.py"))
        return 0
    if args.command == "exec":
        return _exec(unknown, parser)
    if unknown and args.command not in (*TRAINING, *_TRAINS):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        if args.command in TRAINING:
            return _train(args.command, unknown)
        if args.command in _TRAINS:
            _with_trl(args.command, args.command).run(args, unknown)
            sys.stdout.flush()
            return 0
        import_module(f"peft_reft.cli.{args.module}").run(args)
        sys.stdout.flush()  # a reader that has gone is noticed here, and not after `main`
        return 0
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `peft-reft inspect ADAPTER | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return 141
    except (ValueError, OSError, ImportError) as error:
        if args.traceback:
            raise
        message = " ".join(str(error).split())  # on one line
        print(f"peft-reft: {message}", file=sys.stderr)
        return 1


def _train(command: str, arguments: list[str]) -> int:
    code: int = _with_trl(command, "train").main(command, arguments)
    return code


def _with_trl(command: str, module: str) -> Any:
    """A module of a command that needs TRL."""
    try:
        return import_module(f"peft_reft.cli.{module}")
    except ImportError as error:
        raise ImportError(f'`{command}` needs TRL: pip install "peft-reft[trl]" ({error})') from error


def _exec(words: list[str], parser: argparse.ArgumentParser) -> int:
    """Run another program. Its errors are its own, with their traceback."""
    from peft_reft.cli import execute

    try:
        execute.check(words)
    except ValueError as error:
        parser.error(str(error))
    execute.run(words)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. Those that train have parsers of their own (`train_arguments`), which need TRL."""
    parser = argparse.ArgumentParser(
        "peft-reft",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, description in TRAINING.items():
        _add_command(commands, name, description, add_help=False)
    _add_suggest(commands)
    _add_sweep(commands)
    _add_generate(commands)
    _add_evaluate(commands)
    _add_chat(commands)
    _add_inspect(commands)
    _add_show_positions(commands)
    _add_convert(commands)
    _add_export(commands)
    _add_command(
        commands,
        "exec",
        "Run a console script, `-m MODULE` or a Python file with its arguments, with LoReFT registered.",
        add_help=False,
    )
    _add_command(commands, "swift-plugin", "Print the path of the file for ms-swift's --external_plugins.")
    return parser


def _add_command(commands: Any, name: str, description: str, **kwargs: Any) -> argparse.ArgumentParser:
    """Add a command; the module of that name has its `run`."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=description, description=description, **kwargs)
    parser.set_defaults(module=name.replace("-", "_"))
    return parser


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path_or_name", metavar="ADAPTER")


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", help="base model, if not the one that the adapter names")


def _add_destination(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("destination", metavar="DST", help="a folder that is new or empty")


def _add_generation(parser: argparse.ArgumentParser) -> None:
    """The arguments that `generate` and `chat` share."""
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default: greedy")
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=None, help="cpu, cuda ...; default: a GPU if there is one")


def _add_form(parser: argparse.ArgumentParser) -> None:
    """The arguments that say in which form prompts are sent."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--raw",
        dest="chat_template",
        action="store_false",
        default=None,
        help="prompts as they are, without a chat template; default: as the adapter's training data",
    )
    form.add_argument("--chat-template", action="store_true", default=None, help="prompts as a user's messages")


def _add_columns(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which columns a file has."""
    parser.add_argument(
        "--prompt-column",
        "--prompt_column",
        nargs="+",
        metavar="NAME",
        help="the column of prompts, if it is not `prompt`; several are joined by an empty line",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="rows that are computed together; default: 8")


def _add_model_and_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the base model: a folder, or a name on the Hub")
    parser.add_argument("data", metavar="DATA", help="the rows: a file, a folder, or a name on the Hub")


def _add_suggest(commands: Any) -> None:
    parser = _add_command(
        commands,
        "suggest",
        "A config for a model and rows, why, and what it costs. Takes the arguments of `train` behind its own.",
        allow_abbrev=False,
    )
    _add_model_and_data(parser)
    parser.add_argument("--task", help="what is trained, if the rows do not say it: a line of docs/choosing.md")
    parser.add_argument("--json", action="store_true", help="as JSON")


def _add_sweep(commands: Any) -> None:
    parser = _add_command(
        commands,
        "sweep",
        "Try settings within a budget, and say which is best. Takes the arguments of `train` behind its own.",
        allow_abbrev=False,
    )
    _add_model_and_data(parser)
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="stop after so many minutes")
    parser.add_argument("--runs", type=int, metavar="N", help="train at most so many adapters")
    parser.add_argument("--held-out", "--held_out", type=int, metavar="ROWS", help="rows that decide; default: 200")
    parser.add_argument("--json", action="store_true", help="print the best as JSON")


def _add_generate(commands: Any) -> None:
    parser = _add_command(commands, "generate", "Answer prompts, or a file of prompts, with an adapter.")
    _add_adapter(parser)
    parser.add_argument("prompt", nargs="*", metavar="PROMPT")
    parser.add_argument("--file", help="rows with prompts: JSON lines, JSON, CSV, TSV, Parquet")
    parser.add_argument("--output", help="JSON lines: the rows of --file with `generated`; default: standard output")
    _add_columns(parser)
    _add_form(parser)
    parser.add_argument("--compare", action="store_true", help="answer without the adapter, too")
    _add_base(parser)
    _add_generation(parser)


def _add_evaluate(commands: Any) -> None:
    parser = _add_command(commands, "evaluate", "Loss and exact match of an adapter on rows with known answers.")
    _add_adapter(parser)
    parser.add_argument("--file", required=True, help="rows to evaluate on: JSON lines, JSON, CSV, TSV, Parquet")
    _add_columns(parser)
    parser.add_argument(
        "--completion-column",
        "--completion_column",
        metavar="NAME",
        help="the column of answers, if it is not `completion`",
    )
    _add_form(parser)
    parser.add_argument("--compare", action="store_true", help="evaluate without the adapter, too")
    parser.add_argument("--json", action="store_true", help="as JSON")
    _add_base(parser)
    _add_device(parser)


def _add_chat(commands: Any) -> None:
    parser = _add_command(commands, "chat", "Talk with an adapter, line by line; an empty line or Ctrl-D ends it.")
    _add_adapter(parser)
    parser.add_argument(
        "--chat-template",
        action="store_true",
        help="even if the adapter was trained on prompts without a chat template",
    )
    _add_base(parser)
    _add_generation(parser)


def _add_inspect(commands: Any) -> None:
    parser = _add_command(commands, "inspect", "What an adapter is: formula, rank, layers, positions, size, norms.")
    _add_adapter(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")


def _add_show_positions(commands: Any) -> None:
    parser = _add_command(commands, "show-positions", "Print texts with the tokens marked that a spec edits.")
    parser.add_argument("text", nargs="+", metavar="TEXT")
    parser.add_argument("--tokenizer", required=True, help="folder or Hub name of a tokenizer or model")
    parser.add_argument("--positions", default="f7+l7", help="a spec, or JSON with a spec for each range of layers")
    parser.add_argument("--chat", action="store_true", help="as a user's message, in the chat template")


def _add_convert(commands: Any) -> None:
    parser = _add_command(commands, "convert", "Convert an adapter from, or to, the format of another library.")
    parser.add_argument(
        "path_or_name", metavar="SRC", help="a folder, or a name on the Hub; from gguf and axbench a file"
    )
    parser.add_argument("destination", metavar="DST", help="a folder that is new or empty; to gguf a new file")
    formats = parser.add_mutually_exclusive_group(required=True)
    formats.add_argument("--from", dest="from_format", choices=["pyreft", "adapters", "gguf", "axbench"])
    formats.add_argument("--to", dest="to_format", choices=["pyreft", "easysteer", "gguf"])
    parser.add_argument(
        "--positions", help="from pyreft, whose folders do not say it: f7+l7 ... (l7~1: all but the last)"
    )
    parser.add_argument("--act-fn", help="from pyreft, whose folders do not say it: relu ...")
    parser.add_argument("--intervention", help="from adapters, if it is not LoReFT: noreft or nodireft (their DiReFT)")
    parser.add_argument("--concept", type=int, help="from axbench: the row of the dictionary")
    parser.add_argument("--layer", type=int, help="from axbench, whose files do not say it: the block, from 0")
    parser.add_argument("--strength", type=float, help="from axbench: factor times the concept's largest activation")
    parser.add_argument("--base", help="base model (only its config is read): names of blocks, and for the card")
    parser.add_argument("--task-type", default="CAUSAL_LM", help="CAUSAL_LM (default), SEQ_CLS ...")


def _add_export(commands: Any) -> None:
    parser = _add_command(
        commands, "export", "Write base and adapter as one model, if the edit folds into the weights."
    )
    _add_adapter(parser)
    _add_destination(parser)
    _add_base(parser)


if __name__ == "__main__":
    sys.exit(main())
