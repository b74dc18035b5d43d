"""The command `peft-reft`: thin calls into the package."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

DESCRIPTION = """\
LoReFT (representation finetuning, arXiv 2404.03592) as a PEFT method.

  peft-reft train --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset_name mine.jsonl --r 4
  peft-reft generate outputs/loreft "Who are you?"
  peft-reft inspect outputs/loreft
  peft-reft convert --from pyreft THEIRS OURS --positions f7+l7
"""
EPILOG = """\
An ADAPTER is a folder that `save_pretrained` or `train` wrote, or the name of one on the Hub. Exit codes: 0 done,
1 it could not be done (the reason is on standard error), 2 wrong arguments, 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code; what went wrong is said in a line, with `--traceback` in full."""
    args, rest = _parser().parse_known_args(argv)
    if rest and args.command != "train":
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(args.run(rest if args.command == "train" else args) or 0)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if args.traceback:
            raise
        print(f"peft-reft: {_one_line(error)}", file=sys.stderr)
        return 1


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextmanager
def _loading(source: str, file: str = "") -> Iterator[None]:
    """Turn what a loader raises, which is nearly anything if a file is damaged, into a ValueError that names the file.

    Args:
        source: folder, or name on the Hub.
        file: the file in it that is loaded, if it is one. An error that names the source itself is left as it is.
    """
    try:
        yield
    except Exception as error:
        said = _one_line(error)
        if not isinstance(error, ValueError | OSError | ImportError):  # not made to be read
            said = f"{type(error).__name__}: {said[:400]}"
        elif source in said:
            raise ValueError(said) from error
        where = os.path.join(source, file) if file else source
        raise ValueError(f"{where} cannot be loaded: {said}") from error


def _parser() -> argparse.ArgumentParser:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("peft-reft", description=DESCRIPTION, epilog=EPILOG, formatter_class=text)
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, about: str, **kwargs: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=about, **kwargs)
        made.set_defaults(run=run)
        return made

    command(
        "train",
        _train,
        "Finetune a causal LM with TRL's SFTTrainer (`train --help` has all it takes).",
        add_help=False,
    )

    for name, run, about in (
        ("generate", _generate, "Answer prompts with an adapter."),
        ("chat", _chat, "Talk with an adapter, line by line; an empty line or Ctrl-D ends it."),
    ):
        made = command(name, run, about)
        made.add_argument("adapter", metavar="ADAPTER")
        if name == "generate":
            made.add_argument("prompt", nargs="+", metavar="PROMPT")
            form = made.add_mutually_exclusive_group()
            form.add_argument(
                "--raw",
                dest="chat_template",
                action="store_false",
                default=None,
                help="prompts as they are, without a chat template; default: as the adapter's training data",
            )
            form.add_argument(
                "--chat-template", action="store_true", default=None, help="prompts as a user's messages"
            )
            made.add_argument("--compare", action="store_true", help="answer without the adapter, too")
        else:
            made.add_argument(
                "--chat-template",
                action="store_true",
                help="even if the adapter was trained on prompts without a chat template",
            )
        made.add_argument("--base", help="base model, if not the one that the adapter names")
        made.add_argument("--max-new-tokens", type=int, default=128)
        made.add_argument("--temperature", type=float, default=0.0, help="0, the default: greedy")
        made.add_argument("--device", default=None, help="cpu, cuda ...; default: a GPU if there is one")

    made = command("inspect", _inspect, "What an adapter is: formula, rank, layers, positions, size, norms.")
    made.add_argument("adapter", metavar="ADAPTER")
    made.add_argument("--json", action="store_true", help="as JSON")

    made = command("show-positions", _show_positions, "Print texts with the tokens marked that a spec edits.")
    made.add_argument("text", nargs="+", metavar="TEXT")
    made.add_argument("--tokenizer", required=True, help="folder or Hub name of a tokenizer or model")
    made.add_argument("--positions", default="f7+l7", help="a spec, or JSON with a spec for each range of layers")
    made.add_argument("--chat", action="store_true", help="as a user's message, in the chat template")

    made = command("convert", _convert, "Convert an adapter from, or to, the format of another library.")
    made.add_argument("source", metavar="SRC", help="a folder, or a name on the Hub")
    made.add_argument("destination", metavar="DST", help="a folder that is new or empty")
    way = made.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="origin", choices=["pyreft", "adapters"])
    way.add_argument("--to", dest="goal", choices=["pyreft", "easysteer"])
    made.add_argument(
        "--positions", help="from pyreft, whose folders do not say it: f7+l7 ... (l7~1: all but the last)"
    )
    made.add_argument("--act-fn", help="from pyreft, whose folders do not say it: relu ...")
    made.add_argument(
        "--intervention", help="from adapters, where it is not LoReFT: noreft or nodireft (their DiReFT)"
    )
    made.add_argument("--base", help="base model (its config alone is read): names of blocks, and for the card")
    made.add_argument("--task-type", default="CAUSAL_LM", help="CAUSAL_LM (default), SEQ_CLS ...")

    made = command("export", _export, "Write base and adapter as one model, where the edit folds into the weights.")
    made.add_argument("adapter", metavar="ADAPTER")
    made.add_argument("destination", metavar="DST", help="a folder that is new or empty")
    made.add_argument("--base", help="base model, if not the one that the adapter names")
    return parser


def _train(rest: list[str]) -> int:
    try:
        from . import train
    except ImportError as error:
        raise ImportError(f'`train` needs TRL: pip install "peft-reft[trl]" ({error})') from error
    return train.main(rest)


def _config(adapter: str) -> Any:
    from peft.utils import CONFIG_NAME

    from ..config import LoReftConfig

    with _loading(adapter, CONFIG_NAME):
        return LoReftConfig.from_pretrained(adapter)


def _read(adapter: str) -> Any:
    """Config and tensors, without a model around them."""
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    from ..convert import Adapter

    if os.path.isdir(adapter):
        _config(adapter)  # so that an error names the file
    with _loading(adapter, SAFETENSORS_WEIGHTS_NAME):
        read = Adapter.load(adapter)
    if not read.weights:
        raise ValueError(f"{os.path.join(adapter, SAFETENSORS_WEIGHTS_NAME)} has no tensors of LoReFT.")
    return read


def _model_and_tokenizer(args: Any) -> tuple[Any, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .paths import check_path

    check_path(args.adapter)
    config = _config(args.adapter)
    task = getattr(config.task_type, "value", config.task_type)
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(f"{args.adapter} has task_type={task!r}. This command takes causal language models only.")
    if os.path.isdir(args.adapter) and not any(name.startswith("adapter_model.") for name in os.listdir(args.adapter)):
        raise ValueError(f"{args.adapter} has no weights: no file adapter_model.safetensors.")
    base = args.base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"{args.adapter} names no base model: give --base.")
    check_path(base)
    tokenizer = None
    if not os.path.isdir(args.adapter) or os.path.isfile(os.path.join(args.adapter, "tokenizer_config.json")):
        try:
            with _loading(args.adapter, "tokenizer_config.json"):
                tokenizer = AutoTokenizer.from_pretrained(args.adapter)
        except ValueError:
            if os.path.isdir(args.adapter):
                raise
    if tokenizer is None:  # saved without one
        with _loading(base, "tokenizer_config.json"):
            tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = getattr(args, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
    with _loading(base, "config.json"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").to(device)
    with _loading(args.adapter):
        return PeftModel.from_pretrained(model, args.adapter).eval(), tokenizer


def _trained_on_chats(model: Any) -> bool | None:
    """Whether the adapter's training data was in a chat template; None if its config does not say."""
    marks = getattr(model.peft_config["default"], "response_template", None)
    return None if marks is None else bool(marks)


def _assume(adapter: str, form: str) -> None:
    print(
        f"{adapter} does not say whether its training data was in a chat template. Assumed: {form}.", file=sys.stderr
    )


def _asks_in_chat_template(args: Any, model: Any, tokenizer: Any) -> bool:
    """Whether prompts go through the chat template: as told, else as in training, else if there is one."""
    asked: bool | None = args.chat_template
    if asked is None:
        asked = _trained_on_chats(model)
    if asked is None:
        asked = bool(tokenizer.chat_template)
        _assume(args.adapter, "it was (else --raw)" if asked else "it was not, for the tokenizer has none")
    if asked and not tokenizer.chat_template:
        raise ValueError(f"The tokenizer of {args.adapter} has no chat template. Give --raw to ask without one.")
    return asked


def _answer(model: Any, tokenizer: Any, inputs: Any, args: Any, **kwargs: Any) -> list[str]:
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    inputs = inputs.to(model.device)
    if not inputs["attention_mask"].any(-1).all():
        raise ValueError("A prompt is empty: there is nothing to answer.")
    out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, **sampling, **kwargs)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _generate(args: Any) -> None:
    model, tokenizer = _model_and_tokenizer(args)
    if _asks_in_chat_template(args, model, tokenizer):
        inputs = tokenizer.apply_chat_template(
            [[{"role": "user", "content": prompt}] for prompt in args.prompt],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer(args.prompt, padding=True, return_tensors="pt")
    answers = {"": _answer(model, tokenizer, inputs, args)}
    if args.compare:
        with model.disable_adapter():
            answers["without: "] = _answer(model, tokenizer, inputs, args)
    for n, prompt in enumerate(args.prompt):
        if len(args.prompt) > 1:
            print(f"> {prompt}")
        for label, given in answers.items():
            print(f"{label}{given[n].strip()}")


def _chat(args: Any) -> None:
    from transformers import TextStreamer

    model, tokenizer = _model_and_tokenizer(args)
    if not tokenizer.chat_template:
        raise ValueError(f"The tokenizer of {args.adapter} has no chat template. Use `peft-reft generate`.")
    trained = _trained_on_chats(model)
    if trained is False and not args.chat_template:
        raise ValueError(
            f"{args.adapter} was trained on prompts without a chat template, which a conversation needs. Use "
            "`peft-reft generate`, or give --chat-template to talk with it nonetheless."
        )
    if trained is None and not args.chat_template:
        _assume(args.adapter, "it was")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    turns: list[dict[str, str]] = []
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            said = ""
        if not said:
            return
        turns.append({"role": "user", "content": said})
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )  # the whole conversation each time: a cache would keep the edits of earlier turns
        (answer,) = _answer(model, tokenizer, inputs, args, streamer=streamer)
        turns.append({"role": "assistant", "content": answer})


def _inspect(args: Any) -> None:
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    from ..card import describe, how_to_ask

    adapter = _read(args.adapter)
    with _loading(args.adapter, SAFETENSORS_WEIGHTS_NAME):
        rows = [_row(module, parameters) for module, parameters in adapter.weights.items()]
    others = sum(tensor.numel() for tensor in adapter.others.values())
    total = sum(row["parameters"] for row in rows)
    if args.json:
        config = {key: value for key, value in adapter.config.to_dict().items() if value is not None}
        print(json.dumps({"config": config, "parameters": total, "modules_to_save": others, "layers": rows}, indent=2))
        return
    trained = f", and {others:,} of {adapter.config.modules_to_save}" if others else ""
    print(f"{describe(adapter.config)}{how_to_ask(adapter.config)}")
    print(f"Base model: {adapter.config.base_model_name_or_path or 'not said'}")
    print(f"Parameters: {total:,}{trained}\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells)]
    for line in [columns, *cells]:
        print("  ".join(f"{cell:<{w}}" if n == 0 else f"{cell:>{w}}" for n, (cell, w) in enumerate(zip(line, widths))))


def _row(module: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """What `inspect` says of one edited module."""
    import torch

    row: dict[str, Any] = {"module": module, "parameters": sum(t.numel() for t in parameters.values())}
    if "R" in parameters:
        r = parameters["R"].float()
        row["orthogonality error"] = float((r @ r.mT - torch.eye(r.shape[-2])).abs().max())
    if "R" in parameters and "W" in parameters:
        row["|W - R|"] = float((parameters["W"].float() - parameters["R"].float()).norm())
    return row | {f"|{name}|": float(t.float().norm()) for name, t in parameters.items() if name != "R"}


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _spec(text: str) -> Any:
    """A spec of positions, or JSON with one for each range of layers."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"--positions {text} is no JSON: {error}.") from None


def _show_positions(args: Any) -> None:
    from transformers import AutoTokenizer

    from ..config import LoReftConfig
    from ..tools.show import show_positions
    from .paths import check_path

    spec = _spec(args.positions)
    check_path(args.tokenizer)
    with _loading(args.tokenizer, "tokenizer_config.json"):
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    for text in args.text:
        given = [{"role": "user", "content": text}] if args.chat else text
        show_positions(tokenizer, given, LoReftConfig(positions=spec))


def _convert(args: Any) -> None:
    from ..card import describe
    from ..convert import from_adapters, from_pyreft, to_easysteer, to_pyreft

    if args.origin == "pyreft":
        if not args.positions:
            raise ValueError("--positions is missing: pyreft does not save which tokens an adapter was trained on.")
        spec = _spec(args.positions)
        with _loading(args.source):
            adapter = from_pyreft(args.source, spec, args.act_fn, base=args.base, task_type=args.task_type)
    elif args.origin == "adapters":
        with _loading(args.source):
            adapter = from_adapters(args.source, args.intervention, args.base, args.task_type)
    else:
        adapter = _read(args.source)
        write = to_pyreft if args.goal == "pyreft" else to_easysteer
        write(adapter, args.destination, args.base)
        print(f"Wrote {args.destination}. The format does not hold the positions: {adapter.config.positions!r}.")
        if args.goal == "pyreft" and adapter.config.act_fn:
            print(f"Nor the activation: act_fn={adapter.config.act_fn!r}.")
        return
    adapter.save(args.destination)
    print(f"Wrote {args.destination}. {describe(adapter.config)}")
    if args.origin == "pyreft" and args.base is None:
        print(f"Blocks are taken to be named as in {next(iter(adapter.weights))}; for another family give --base.")


def _export(args: Any) -> None:
    import torch

    from ..convert.ours import new_folder

    model, tokenizer = _model_and_tokenizer(args)
    merged = model.merge_and_unload(safe_merge=True)
    head = merged.get_output_embeddings()
    if head is not None and head.weight is not merged.get_input_embeddings().weight:
        merged.config.get_text_config().tie_word_embeddings = False  # one of them was trained, or edited
    with torch.device("meta"):
        loaded_again = type(merged)(merged.config)
    lost = sorted(set(merged.state_dict()) - set(loaded_again.state_dict()))
    if lost:
        raise ValueError(
            f"A saved {type(merged).__name__} would lose {lost[0]}, which the base model has not and needs now. Keep "
            "the adapter beside the model."
        )
    new_folder(args.destination)
    merged.save_pretrained(args.destination)
    tokenizer.save_pretrained(args.destination)
    print(
        f"Wrote {args.destination}, {sum(os.path.getsize(e) for e in os.scandir(args.destination)) / 2**20:.0f} MiB."
    )
