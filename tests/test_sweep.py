"""`peft-reft sweep`: the search, its table, and its budget."""

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
from test_cli import rows_file

pytest.importorskip("trl")
from datasets import disable_progress_bars

from peft_reft import LoReftConfig
from peft_reft.cli import sweep
from peft_reft.cli.arguments import set_by
from peft_reft.cli.search import Found, candidates, is_better, rungs, search, standard_error
from peft_reft.cli.train_arguments import parse
from peft_reft_cli import main

pytestmark = pytest.mark.filterwarnings("ignore")
START = {"positions": "f7+l7", "layers": "all", "r": 8, "tie": "layer", "learning_rate": 1e-3}


def found(loss, rows=50):
    """A run of that mean loss: rows of one to three tokens, each near it, as in every other such run."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 4, rows)
    return Found((tokens * (loss + 0.1 * rng.standard_normal(rows))).tolist(), tokens.tolist())


def test_the_standard_error_is_that_of_drawing_rows_again():
    rng = np.random.default_rng(1)
    one = found(2.0, rows=200)
    sums, tokens = np.array(one.sums), np.array(one.tokens)
    drawn = rng.integers(0, 200, (4000, 200))
    again = sums[drawn].sum(1) / tokens[drawn].sum(1)
    assert one.error == pytest.approx(again.std(), rel=0.1)
    assert math.isinf(standard_error([1.0], [1]))


def test_which_run_is_better():
    assert is_better(found(1.9), found(2.0)) and not is_better(found(2.0), found(1.9))
    rng = np.random.default_rng(2)
    same = found(2.0)
    other = Found([each + rng.normal(0, 0.5) for each in same.sums], same.tokens)
    assert not (is_better(other, same) and is_better(same, other))
    near = Found([each - 1e-3 + (0.05 if number % 2 else -0.05) for number, each in enumerate(same.sums)], same.tokens)
    assert near.loss < same.loss and not is_better(near, same)  # within the noise
    broken = Found([math.nan] * 50, same.tokens)
    assert is_better(same, broken) and not is_better(broken, same) and math.isinf(broken.loss)


def test_what_is_tried():
    tries = candidates(START, set(), layers=12, width=8)
    assert [*tries] == ["positions", "layers", "r", "tie", "learning_rate"]  # the authors' order
    assert tries["positions"] == ["l1", "f1+l1", "f3+l3", "l7", "p"]
    assert tries["layers"] == ["0-3", "4-", "3;6;9"] and tries["r"] == [1, 4]
    assert tries["learning_rate"] == [3.3e-4, 3e-3]
    assert [*candidates(START, {"r", "layers"}, 12, 8)] == ["positions", "tie", "learning_rate"]
    assert candidates({**START, "positions": "all"}, set(), 12, 8)["positions"] == []
    assert candidates(START, set(), layers=1, width=8)["layers"] == []
    assert rungs(300) == [33, 100, 300] and rungs(20) == [10, 20] and rungs(5) == [5]


class Measured:
    """Stands for training: the loss is a sum over fields; it counts what it was asked for."""

    def __init__(self, better, most=math.inf):
        self.better, self.most, self.asked = better, most, []

    def __call__(self, fields, steps):
        if len(self.asked) >= self.most:
            return None
        self.asked.append((fields, steps))
        loss = 3 - math.log(steps) / 10
        return found(loss - sum(gain for name, (value, gain) in self.better.items() if fields[name] == value))


def test_the_search_takes_what_is_better_field_by_field():
    measure = Measured({"positions": ("l7", 0.1), "r": (4, 0.2), "learning_rate": (3e-3, 0.3)})
    outcome = search(measure, START, candidates(START, set(), 12, 64), [33, 100, 300])
    assert outcome.best == {**START, "positions": "l7", "r": 4, "learning_rate": 3e-3}
    assert outcome.steps == 300 and outcome.left == [] and outcome.found.loss < outcome.start.loss
    numbers = {steps: [each for each in measure.asked if each[1] == steps] for steps in (33, 100, 300)}
    assert [len(each) for each in numbers.values()] == [15, 6, 3]
    assert numbers[300][0][0] == START  # it is compared at the end
    assert all(fields["tie"] != "group" for fields, _ in measure.asked)  # l7 is one group


def test_the_start_stays_if_nothing_is_better():
    outcome = search(Measured({}), START, candidates(START, set(), 12, 64), [33, 300])
    assert outcome.best == START and outcome.steps == 300


@pytest.mark.parametrize("most", [0, 1, 3, 14, 15, 17, 20])
def test_a_budget_that_ends(most):
    """The best of what there is, and the names of what was not tried."""
    measure = Measured({"positions": ("l1", 0.1)}, most)
    outcome = search(measure, START, candidates(START, set(), 12, 64), [33, 100, 300])
    assert (outcome.found is None) == (most == 0)
    assert outcome.best["positions"] == ("l1" if most > 1 else "f7+l7")
    assert outcome.steps == (33 if most < 17 else 100)
    if most == 3:
        assert outcome.left[:4] == ["positions=f3+l3", "positions=l7", "positions=p", "layers=0-3"]
    assert any("with 300 steps" in each for each in outcome.left)


ROWS = [{"prompt": f"{'abcdefgh'[n % 8]} b {n % 7} c d", "completion": f" {n % 5} e"} for n in range(40)]


def swept(folder, model_id, *words):
    disable_progress_bars()
    given = ["--max_steps", "12", "--use_cpu", "true", "--bf16", "false", "--output_dir", str(folder / "sweep")]
    return main(["sweep", model_id, str(folder / "rows.jsonl"), *given, *words])


@pytest.fixture
def trained(monkeypatch):
    """The words of each training."""
    seen = []
    train = sweep.Trials._train

    def noted(self, fields, steps):
        seen.append((fields, steps))
        return train(self, fields, steps)

    monkeypatch.setattr(sweep.Trials, "_train", noted)
    return seen


def test_sweep(model_id, tmp_path, trained, capsys):
    """Within three runs; a second call goes on, and trains nothing twice; the command trains so."""
    rows_file(tmp_path, ROWS)
    assert swept(tmp_path, model_id, "--runs", "2", "--held-out", "6") == 0
    said = capsys.readouterr()
    assert [steps for _, steps in trained] == [10, 10] and said.err.count("10 steps  loss") == 2
    assert "Not tried, for the budget ended: positions=f1+l1; positions=f3+l3" in said.out
    path = tmp_path / "sweep" / "sweep.json"
    table = json.loads(path.read_text())
    assert len(table["runs"]) == 2 and len(table["tokens"]) == 6
    for run in table["runs"]:
        assert run["loss"] == pytest.approx(sum(run["losses"]) / sum(table["tokens"]), abs=1e-3)
    words = shlex.split(said.out.splitlines()[-1])
    assert words[:2] == ["peft-reft", "train"] and "--output_dir" not in words
    _, args, _, _, config = parse("train", words[2:])
    assert args.max_steps == 12 and config.positions == table["best"]["fields"]["positions"]
    assert LoReftConfig.from_pretrained(str(tmp_path / "sweep" / "best")).positions == config.positions
    assert swept(tmp_path, model_id, "--runs", "1", "--held-out", "6") == 0
    assert len(trained) == 3 and trained[2][0]["positions"] == "f1+l1"
    assert len(json.loads(path.read_text())["runs"]) == 3
    capsys.readouterr()
    assert swept(tmp_path, model_id, "--runs", "1", "--held-out", "6", "--per_device_train_batch_size", "2") == 1
    assert "Give another --output_dir" in capsys.readouterr().err
    assert len(trained) == 3


@pytest.mark.slow
def test_a_run_of_the_sweep_is_a_run_of_train(model_id, tmp_path, capsys):
    """The same words give the same weights, and `evaluate` the same loss."""
    rows_file(tmp_path, ROWS)
    held = tmp_path / "held"
    held.mkdir()
    test_file = rows_file(held, ROWS[:7])
    assert swept(tmp_path, model_id, "--runs", "1", "--test_file", test_file, "--json") == 0
    best = json.loads(capsys.readouterr().out)
    assert best["held_out_rows"] == 7
    (run,) = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]
    words = [*shlex.split(best["command"])[2:], "--max_steps", "10", "--warmup_steps", "1"]
    assert main(["train", *words, "--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "out"), "--file", test_file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(run["loss"], abs=2e-3)


@pytest.mark.slow
def test_minutes_end(model_id, tmp_path, trained, capsys, monkeypatch):
    """A run that takes too long is stopped, and is no run; the next is not begun."""
    rows_file(tmp_path, ROWS)
    assert swept(tmp_path, model_id, "--runs", "1") == 0
    real = sweep.Trials._train

    def late(self, fields, steps):
        self.budget.deadline = 0.0  # it is over when the training begins
        return real(self, fields, steps)

    monkeypatch.setattr(sweep.Trials, "_train", late)
    assert swept(tmp_path, model_id, "--budget", "60") == 0
    assert len(trained) == 2 and len(json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]) == 1
    assert "Not tried, for the budget ended: positions=l1; positions=f1+l1" in capsys.readouterr().out


def test_time_is_reckoned_before_a_run_begins(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(sweep.time, "monotonic", lambda: now[0])
    budget = sweep.Budget(minutes=2, runs=None)
    assert budget.has(119) and not budget.has(121)
    now[0] = 100.0
    assert budget.has(19) and not budget.has(21)
    assert not sweep.Budget(minutes=None, runs=0).has(0)


def test_the_table_of_other_rows_is_refused(tmp_path):
    table = sweep.Table.open(tmp_path / "sweep.json", {"steps": [10]})
    table.add(START, 10, Found([1.0, math.nan], [2, 1]), {})
    again = sweep.Table.open(tmp_path / "sweep.json", {"steps": [10]})
    assert math.isinf(again.find(START, 10).loss) and again.find(START, 20) is None
    with pytest.raises(ValueError, match="rows have changed"):
        again.add(START, 20, Found([1.0, 1.0], [2, 2]), {})
    with pytest.raises(ValueError, match=r"has runs with steps=\[10\], and now it is \[20\]"):
        sweep.Table.open(tmp_path / "sweep.json", {"steps": [20]})


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "Give a budget: --budget MINUTES, or --runs N"),
        (["--runs", "0"], "--runs 0: expected more than 0"),
        (["--runs", "1", "--nonsense", "1"], "Unknown arguments: --nonsense 1"),
        (["--runs", "1", "--dataset_streaming", "true"], "streamed"),
        (["--runs", "1", "--test_split_size", "3"], "Give --held-out ROWS"),
    ],
)
def test_sweep_refuses(words, said, model_id, tmp_path, capsys):
    rows_file(tmp_path, ROWS)
    assert swept(tmp_path, model_id, *words) == 1
    assert said in capsys.readouterr().err


def test_fields_that_are_set_are_not_searched(tmp_path):
    (tmp_path / "settings.yaml").write_text("r: 4\nlearning_rate: 0.01\n")
    words = ["--positions", "l7", "--layers=0", "--config", str(tmp_path / "settings.yaml"), "--max-steps", "3"]
    assert set_by(words) == {"positions", "layers", "config", "r", "learning_rate", "max_steps"}
    assert Path(words[4]).is_file()
    assert set_by([f"--config={words[4]}"]) == {"config", "r", "learning_rate"}
    assert sweep._without(["--a", "1", "2", "--b=3", "--c-d", "4"], {"a", "c_d"}) == ["--b=3"]
