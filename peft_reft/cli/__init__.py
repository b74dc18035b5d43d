"""The command `peft-reft`. One module does one job:

- `main`: the command line, which stands in `peft_reft_cli`; `python -m peft_reft.cli` runs it too.
- `train`, which has `dpo`, `kto`, `reward`, `grpo`, `rloo` and `distillation` too; `generate`, `evaluate`, `chat`,
  `inspect`, `show_positions`, `convert`, `export`: the commands. The command line imports a command's module only when
  that command runs.
- `methods`, `rewards`: which trainer of TRL each command that trains runs; what gives rewards.
- `train_arguments`, `train_help`: the arguments of these commands, and their help.
- `rows`, `data`: the rows of a file; those that `train` trains on and evaluates on.
- `load`, `ask`: reading an adapter, and asking it.
- `arguments`, `errors`: checks of arguments, and errors that fit on one line.
"""
