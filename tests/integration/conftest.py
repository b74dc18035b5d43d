"""Tiny data sets, built in code: no network."""

import gc

import datasets
import pytest

datasets.disable_progress_bars()


@pytest.fixture(scope="package", autouse=True)
def _imports_are_no_garbage():
    """Keep imported objects out of the garbage collection in each `train`, the most of a tiny training's time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def spy(monkeypatch):
    """Return a `Spy`, which records the edited tokens after `watch(model)`."""
    from .spy import Spy  # here: shape_checks.py must come before the package is imported

    return Spy(monkeypatch)


# (prompt, completion): long and short ones, and a prompt of two tokens, fewer than f2+l2 asks for.
PAIRS = [
    ("a b c d e f", "1 2 3"),
    ("g h i", "4 5"),
    ("j u", "6 7 8 9"),
    ("k l m n o p q r s", "0"),
    ("t u v w", "1 3 5"),
    ("x y", "2 4"),
    ("a c e g i k m", "6 8 0"),
    ("b d f h j", "7"),
]


@pytest.fixture
def pairs():
    """Prompt-completion, plain text; 8 rows."""
    return datasets.Dataset.from_list([{"prompt": p, "completion": f" {c}"} for p, c in PAIRS])


@pytest.fixture
def chat_pairs():
    """Prompt-completion, conversational; 8 rows."""
    return datasets.Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": p}], "completion": [{"role": "assistant", "content": c}]}
            for p, c in PAIRS
        ]
    )


@pytest.fixture
def chats():
    """Conversations of two and three turns; 8 rows."""

    def turns(*pairs):
        return [m for p, c in pairs for m in ({"role": "user", "content": p}, {"role": "assistant", "content": c})]

    rows = [turns(PAIRS[n], PAIRS[(n + 3) % 8], *([PAIRS[(n + 5) % 8]] if n % 2 else [])) for n in range(8)]
    return datasets.Dataset.from_list([{"messages": row} for row in rows])


@pytest.fixture
def texts():
    """Language modelling: a column `text`; 8 rows."""
    return datasets.Dataset.from_list([{"text": f"{p} {c}"} for p, c in PAIRS])
