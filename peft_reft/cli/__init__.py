"""The command `peft-reft`. One module does one job:

- `main`: the command line, exit codes; `python -m peft_reft.cli` runs it too.
- `train`, `generate`, `chat`, `inspect`, `show_positions`, `convert`, `export`: one command each. `main` imports a
  command's module only when that command runs, so `peft-reft --help` imports neither TRL nor datasets.
- `train_arguments`, `data`: the arguments of `train`, and the rows that it trains on.
- `load`, `ask`: reading an adapter, and asking it.
- `arguments`, `errors`: checks of arguments, and errors that fit on one line.
"""
