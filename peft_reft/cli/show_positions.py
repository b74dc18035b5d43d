"""`peft-reft show-positions`: print texts with the tokens marked that a spec edits."""

from __future__ import annotations

from argparse import Namespace

from transformers import AutoTokenizer

from ..config import LoReftConfig
from ..tools.show import show_positions
from .arguments import check_path, parse_positions
from .errors import loading


def run(args: Namespace) -> None:
    positions = parse_positions(args.positions)
    check_path(args.tokenizer)
    with loading(args.tokenizer, "tokenizer_config.json"):
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    for text in args.text:
        document = [{"role": "user", "content": text}] if args.chat else text
        show_positions(tokenizer, document, LoReftConfig(positions=positions))
