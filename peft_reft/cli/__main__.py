"""`python -m peft_reft.cli`: for launchers that start a module, such as `accelerate launch -m`."""

from __future__ import annotations

import sys

from peft_reft_cli import main

if __name__ == "__main__":
    sys.exit(main())
