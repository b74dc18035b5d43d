"""The command `peft-reft`. One module does one job:

- `main`: the command line, which stands in `peft_reft_cli`; `python -m peft_reft.cli` runs it too.
- `train`, `generate`, `evaluate`, `chat`, `inspect`, `show_positions`, `convert`, `export`: one command each. The
  command line imports a command's module only when that command runs.
- `train_arguments`, `train_help`: the arguments of `train`, and its help.
- `rows`, `data`: the rows of a file; those that `train` trains on and evaluates on.
- `load`, `ask`: reading an adapter, and asking it.
- `arguments`, `errors`: checks of arguments, and errors that fit on one line.
"""
