"""Writes docs/support.md, which says what works with what, from the results of the tests with the mark `cell`.

`pytest --support-table -m cell` runs these tests and keeps their results in docs/support.json. Some tests need
packages that exclude each other, so several environments add their rows (`make support-table`). A test whose cell
cannot work asserts the error, and gives the reason in the mark (`refused=...`) or by `record_property("refused",
...)`. If the base model itself cannot do a part of a cell, the test names that part by `record_property("except",
...)`.
"""

import contextlib
import json
import platform
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from integration.causal_families import NOT_BUILT

DOCS = Path(__file__).parents[1] / "docs"
TABLE, RESULTS = DOCS / "support.md", DOCS / "support.json"
PACKAGES = [
    *("torch", "transformers", "peft", "trl", "accelerate"),
    *("bitsandbytes", "torchao", "optimum-quanto", "gptqmodel", "deepspeed"),
]

SECTIONS = {
    "Trainers: SFT": "TRL's `SFTTrainer`.",
    "Trainers: preferences and reinforcement": "TRL's other trainers.",
    "Trainers: axolotl": "axolotl 0.21 (`axolotl train`), with the plugin of docs/axolotl.md.",
    "Trainers: transformers": "transformers' own `Trainer` and `Seq2SeqTrainer`.",
    "Gradient checkpointing": "Gradients equal those without checkpointing.",
    "Families": (
        "For each family and for block, attention, mlp and heads the test injects an adapter, trains a step (every "
        "adapter parameter moves, and nothing else), saves, and reloads bit-equal. It disables the adapter exactly, "
        "compares `generate` with the forward of training, and unloads without a trace."
    ),
    "Causal language models": (
        "Every family of transformers' `AutoModelForCausalLM`, by its `model_type`. The logits of `generate` (padded "
        "rows, a single row, without a cache) and of a loop of your own (with an empty cache at the start, or none) "
        "equal those of one forward with labels, for `f3+l2`, `g2` and `all`. *But for* names what the base model "
        "itself does not do."
    ),
    "Causal language models: each attention head by itself": 'The same with `component="heads"`, for `f3+l2+g2`.',
    "Quantised bases": "",
    "Dtypes": "",
    "torch.compile": "",
    "Training in two parts": "Losses, metrics and weights equal those of the ordinary path.",
    "Device layouts": "",
    "Beside LoRA": "",
    "Generation": "Logits of every step equal those of one forward over prompt and completion.",
    "Serving with vLLM": "Tokens and log-probabilities equal those of `PeftModel.generate`. It has its own versions.",
    "Rollouts in vLLM": (
        "TRL's trainers with `use_vllm=True` and vLLM 0.31. Log-probabilities of rollout and training agree, and each "
        "rollout comes from the newest policy."
    ),
    "Trainers: ms-swift": "ms-swift 4.6, with PEFT 0.20. Each batch names the tokens that `generate` edits.",
}

ELSEWHERE = ("Serving with vLLM", "Rollouts in vLLM", "Trainers: ms-swift", "Trainers: axolotl")
"""The sections of the folders that run in environments of their own."""

UNTRIED = {
    ("Quantised bases", "AWQ"): (
        "`autoawq` 0.2.9 is no longer maintained and needs Triton kernels of a GPU. LoReFT reads no weight of a base."
    ),
    ("Device layouts", "several GPUs, `device_map` over them"): (
        "the machine that runs these tests has no GPU. A test asserts that positions move to the device of each "
        "block's output."
    ),
}

UNTRIED |= {("Causal language models", name): reason for name, reason in NOT_BUILT.items()}

CELLS = pytest.StashKey[set]()


def pytest_addoption(parser):
    parser.addoption("--support-table", action="store_true", help="add the results of tests marked `cell` to docs/")


def cells_of(item):
    params = item.callspec.params if hasattr(item, "callspec") else {}
    for mark in item.iter_markers("cell"):
        section, name = mark.args
        yield section, name.format(**params), mark.kwargs.get("refused")


@pytest.hookimpl(tryfirst=True)  # before tests are deselected
def pytest_collection_modifyitems(config, items):
    config.stash[CELLS] = set()
    for item in items:
        for section, name, refused in cells_of(item):
            assert section in SECTIONS, f"{item.nodeid}: unknown section {section!r}"
            config.stash[CELLS].add((section, name))
            item.user_properties.append(("cell", (section, name)))
            if refused:
                item.user_properties.append(("refused", refused))


def pytest_configure(config):
    if config.getoption("support_table") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Writer())


class Writer:
    def __init__(self):
        self.reports = defaultdict(list)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed or report.skipped:
            for key, value in report.user_properties:
                if key == "cell":
                    self.reports[tuple(value)].append(report)

    def pytest_sessionfinish(self):
        known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"versions": {}, "rows": []}
        rows = {(row["section"], row["name"]): row for row in known["rows"]}
        for (section, name), reports in self.reports.items():
            if not any(report.skipped for report in reports):  # else another environment is to say
                row = dict(section=section, name=name, verdict=verdict(reports), tests=len(reports))
                rows[section, name] = row
        versions = known["versions"]
        if any(section not in ELSEWHERE for section, _ in self.reports):
            versions |= installed() | {"Python": platform.python_version()}
        results = {"versions": versions, "rows": [rows[key] for key in sorted(rows)]}
        DOCS.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        TABLE.write_text(render(results), encoding="utf-8")


def verdict(reports):
    if any(report.failed for report in reports):
        return "**FAILS**"
    reasons = [[value for key, value in report.user_properties if key == "refused"] for report in reports]
    refused = list(dict.fromkeys(reason for found in reasons for reason in found))
    if not refused:
        missing = [value for report in reports for key, value in report.user_properties if key == "except"]
        return f"works, but for {'; '.join(dict.fromkeys(missing))}" if missing else "works"
    return ("" if all(reasons) else "works, but: ") + "error by design: " + "; ".join(refused)


def installed():
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def render(results):
    versions = ", ".join(f"{name} {number}" for name, number in sorted(results["versions"].items()))
    lines = [
        "# What works with what",
        "",
        "This page says which trainers, model families, quantisations and device layouts were tried with LoReFT, and",
        "how that went. `make support-table` writes it from the results of the tests with the mark `cell`; do not",
        "edit it. *Error by design* means: a test asserts the error, and the error says what to do.",
        "",
        f"Run on a CPU, on tiny models with random weights, with {versions}.",
    ]
    for section, about in SECTIONS.items():
        found = [row for row in results["rows"] if row["section"] == section]
        rows = [f"| {row['name']} | {row['verdict']} | {row['tests']} |" for row in found]
        rows += [f"| {name} | untried: {why} | 0 |" for (of, name), why in UNTRIED.items() if of == section]
        if rows:
            lines += ["", f"## {section}", ""] + ([about, ""] if about else [])
            lines += ["| | verdict | tests |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"
