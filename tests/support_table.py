"""docs/support.md: what works with what, written from the results of the tests that carry the mark `cell`.

`pytest -m cell --support-table docs/support.md` runs them and writes it. A test whose cell cannot work, and which
asserts the error that says so, gives the reason: in the mark (`refused=...`), or by `record_property("refused", ...)`.
"""

import platform
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

TABLE = Path(__file__).parents[1] / "docs" / "support.md"

SECTIONS = {
    "Trainers: SFT": "TRL's `SFTTrainer`.",
    "Trainers: preferences and reinforcement": "TRL's other trainers.",
    "Trainers: transformers": "transformers' own `Trainer` and `Seq2SeqTrainer`.",
    "Gradient checkpointing": "Gradients equal those without.",
    "Families": (
        "Each: inject, train a step (every adapter parameter moves, nothing else), save, reload bit-equal, disable "
        "exact, `generate` equal to the forward of training, unload without a trace; block, attention, mlp."
    ),
    "Quantised bases": "",
    "Dtypes": "",
    "torch.compile": "",
    "Device layouts": "",
    "Beside LoRA": "",
    "Generation": "Logits of every step equal those of one forward over prompt and completion.",
}

UNTRIED = [
    (
        "Quantised bases",
        "GPTQ, AWQ",
        "`gptqmodel` 7.7 refuses to build without CUDA and `autoawq` 0.2.9 needs Triton kernels of a GPU; neither "
        "installs on the machine these tests run on. LoReFT reads no weight of the base: nothing is known against it.",
    ),
]

CELLS = pytest.StashKey[set]()


def pytest_addoption(parser):
    parser.addoption("--support-table", type=Path, help="write the table of results of tests marked `cell` to a file")


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
        config.pluginmanager.register(Writer(config.getoption("support_table")))


class Writer:
    def __init__(self, path):
        self.path = path
        self.reports = defaultdict(list)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed or report.skipped:
            for key, value in report.user_properties:
                if key == "cell":
                    self.reports[tuple(value)].append(report)

    def pytest_sessionfinish(self):
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(render(self.reports), encoding="utf-8")


def verdict(reports):
    if any(report.failed for report in reports):
        return "**FAILS**"
    if any(report.skipped for report in reports):
        return "not run here (a package is missing)"
    reasons = [[value for key, value in report.user_properties if key == "refused"] for report in reports]
    refused = list(dict.fromkeys(reason for found in reasons for reason in found))
    if not refused:
        return "works"
    return ("" if all(reasons) else "works, but: ") + "error by design: " + "; ".join(refused)


def render(reports):
    names = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "torchao", "optimum-quanto")
    lines = [
        "# What works with what",
        "",
        "Written by `make support-table` from the results of the tests that carry the mark `cell`; do not edit.",
        f"Python {platform.python_version()}, " + ", ".join(f"{name} {installed(name)}" for name in names) + "; CPU.",
        "Tiny models with random weights. *Error by design* means: a test asserts the error, which says what to do.",
    ]
    for section, about in SECTIONS.items():
        rows = [(name, found) for (of, name), found in reports.items() if of == section]
        untried = [(name, why) for of, name, why in UNTRIED if of == section]
        if not rows and not untried:
            continue
        lines += ["", f"## {section}", ""] + ([about, ""] if about else [])
        lines += ["| | verdict | tests |", "|---|---|---|"]
        lines += [f"| {name} | {verdict(found)} | {len(found)} |" for name, found in sorted(rows)]
        lines += [f"| {name} | untried: {why} | 0 |" for name, why in untried]
    return "\n".join(lines) + "\n"


def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def rows_of_table():
    """(section, name) of every row of the committed table but the untried ones."""
    section = ""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| ") and not line.startswith(("| |", "|---")) and "| untried: " not in line:
            yield section, line[2:].partition(" | ")[0]
