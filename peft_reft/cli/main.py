"""The command line, `main`: it stands in the module `peft_reft_cli`, outside the package (that module says why)."""

from __future__ import annotations

from peft_reft_cli import main

__all__ = ["main"]
