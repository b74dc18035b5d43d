"""The paper's experiments in experiments/, each for a few steps on tiny models and made-up data."""

import json
from pathlib import Path

import forked
import pytest
import torch
from conftest import LAYERS, build
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
SENTENCES = ["a b c d", "e f g", "h i j k l", "m n", "o p q r", "s t u"]


def recipe(name, *arguments, succeeds=True, preset="cpu"):
    done = forked.run(ROOT / "experiments" / f"{name}.py", "--preset", preset, *arguments)
    assert (done.returncode == 0) is succeeds, done.stderr[-3000:]
    return done.stdout if succeeds else done.stderr


@pytest.fixture
def model(tmp_path, tokenizer):
    build("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def encoder(tmp_path, tokenizer):
    build("bert").base_model.save_pretrained(tmp_path / "encoder")  # without a head, which has the tasks' labels
    tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    for name in ("trec", "cola", "alice", "ultrafeedback_1k"):
        (folder / name).mkdir(parents=True)
    lines = [f"{n % 2} {text}" for n, text in enumerate(SENTENCES * 4)]
    for part in ("train", "test"):
        (folder / "trec" / f"{part}.txt").write_text("\n".join(lines))
    table = "\n".join(f"src\t{line[0]}\t\t{line[2:]}" for line in lines)
    for part in ("in_domain_train", "in_domain_dev", "out_of_domain_dev"):
        (folder / "cola" / f"{part}.tsv").write_text(table)
    (folder / "alice" / "alice29.txt").write_text("Alice was beginning " + "a b c d e f g h " * 40)
    rows = [json.dumps({"instruction": text, "input": "", "output": "1 2 3"}) for text in SENTENCES * 2]
    (folder / "ultrafeedback_1k" / "ultrafeedback_1k.json").write_text("\n".join(rows))
    return folder


@pytest.mark.slow
def test_glue(encoder, data, tmp_path):
    arguments = ["--data", data, "--model", encoder, "--output", tmp_path / "out", "--steps", 2, "--batch", 4]
    arguments += ["--learning-rates", "1e-3", "3e-3", "--seeds", 1, 2, "--r", 2]
    out = recipe("glue", *arguments)
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith(("| cola", "| trec"))]
    assert [(row[0].strip("| "), row[1]) for row in rows] == [
        (task, method) for task in ("cola", "trec") for method in ("loreft", "lora", "head")
    ]
    parameters = {row[1]: int(row[2]) for row in rows}
    assert parameters["head"] == 0 < parameters["loreft"]
    runs = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(runs) == 2 * 3 * 3  # two rates with the first seed, and the second seed at the better one
    before = (tmp_path / "out" / "results.json").read_text()
    again = recipe("glue", *arguments)
    assert again.strip() == out[out.index("| task") :].strip(), "what is there is not run again"
    assert (tmp_path / "out" / "results.json").read_text() == before
    assert "cola and trec" in recipe("glue", *arguments, "--tasks", "sst2", succeeds=False)


@pytest.mark.slow
def test_memorisation(model, data, tmp_path):
    arguments = ["--data", data, "--model", model, "--output", tmp_path / "out", "--steps", 60, "--lengths", 1, 2]
    recipe("memorisation", *arguments, "--layers", 1, 2, "--texts", "Alice", "random", "--learning-rate", 0.3)
    runs = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {(run["text"], run["layer"], run["length"]) for run in runs} == {
        (text, layer, length) for text in ("Alice", "random") for layer in (1, 2) for length in (1, 2)
    }
    assert all(run["parameters"] == 65 for run in runs)  # 2 r d + r
    assert any(run["recited"] == 1 for run in runs if run["length"] == 1), "one token can be learned"
    assert (tmp_path / "out" / "memorisation.png").stat().st_size > 5000


@pytest.mark.slow
def test_qlora_style(data, tmp_path, tokenizer):
    # Without gradients bitsandbytes' CPU kernel wants widths that its blocks of 64 divide.
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=64)
    model = tmp_path / "model"
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    arguments = ["--data", data, "--model", model, "--output", tmp_path / "out", "--steps", 2, "--held", 4]
    out = recipe("qlora_style", *arguments, "--learning-rates", "1e-3")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["method"] for row in rows] == ["loreft", "lora"] and "| loreft |" in out
    assert rows[0]["parameters"] == 3 * (2 * 4 * 64 + 4)
    assert all(row["peak MiB"] > 100 for row in rows)
    assert (tmp_path / "out" / "qlora_style.png").is_file()


def test_preference(model, data, tmp_path):
    recipe("preference", "--data", data, "--model", model, "--output", tmp_path / "out", "--steps", 4)
    curve = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [point["step"] for point in curve] == [1, 2, 3, 4]
    assert curve[0]["margin"] == 0, "the adapter starts as the reference"
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "preference.png").is_file()


@pytest.mark.slow
def test_grpo(model, tmp_path):
    """The smoke preset. LoReFT sends its adapter, LoRA every weight of the base."""
    arguments = ["--preset", "smoke", "--model", model, "--output", tmp_path / "out", "--docs", tmp_path / "docs"]
    out = recipe("grpo", *arguments)
    runs = json.loads((tmp_path / "docs" / "results" / "grpo.json").read_text())
    loreft = ["loreft", "loreft, decoding too", "loreft, bias everywhere"]
    assert [run["method"] for run in runs] == ["base", *loreft, "lora, r=1", "lora, r=8"]
    assert all(len(run["rewards"]) == 2 for run in runs[1:]), "one reward for each step"
    weights = sum(p.numel() for p in build("llama").parameters())
    for run in runs[1:]:
        assert run["adapter_bytes"] > 4 * run["parameters"]
        assert run["sent_bytes"] == (run["adapter_bytes"] if run["method"] in loreft else 4 * weights)
    assert recipe("grpo", *arguments).strip() == out[out.index("| method") :].strip(), "what is there is not run again"
    assert (tmp_path / "docs" / "figures" / "grpo.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "text, expected", [(" 12\n", 1), ("12 is", 1), ("\n12", 1), (" 123", 0), (" 1", 0), (" It is 12", 0), ("", 0)]
)
def test_grpo_reward(text, expected, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import grpo

    assert grpo.reward([text], answer=["12"]) == [expected]


@pytest.mark.slow
def test_sweep(encoder, data, tmp_path):
    arguments = ["--data", data, "--model", encoder, "--output", tmp_path / "out", "--steps", 1, "--batch", 4]
    out = recipe("sweep", *arguments, "--tasks", "trec", "--learning-rates", "1e-3", "3e-3", "--seeds", 1)
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["field"] for row in table] == [
        *("positions", "layers", "r", "tie", "dropout", "learning_rate"),
        *("default", "found"),
    ]
    for row in table[:-2]:
        assert row["dev"][row["values"].index(row["chosen"])] == max(row["dev"])
        assert table[-1]["chosen"][row["field"]] == row["chosen"]
    assert f"{table[-1]['test'][0]:.3f}" in out and (tmp_path / "out" / "sweep_trec.png").is_file()


@pytest.mark.slow
def test_sweep_over_a_language_model(model, data, tmp_path):
    arguments = ["--data", data, "--model", model, "--output", tmp_path / "out", "--steps", 1, "--held", 4]
    recipe("sweep", "--recipe", "commonsense", *arguments, "--learning-rates", "1e-3", "--seeds", 1)
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert all(row["dev"][row["values"].index(row["chosen"])] == min(row["dev"]) for row in table[:-2])


@pytest.mark.slow
def test_arithmetic(model, data, tmp_path):
    (data / "gsm8k").mkdir()
    row = {"question": "a b c d e f g", "answer": "h i 1\n#### 1"}
    for part in ("train", "test"):
        (data / "gsm8k" / f"{part}.jsonl").write_text("\n".join(json.dumps(row) for _ in range(24)))
    arguments = ["--data", data, "--model", model, "--output", tmp_path / "out", "--steps", 2, "--rows", 4]
    arguments += ["--learning-rates", "1e-3", "1", "--new-tokens", 4, "--held", 4]
    out = recipe("arithmetic", *arguments)
    methods = ["base", "loreft", "loreft, decoding too", "loreft, shared by layers", "lora"]
    assert all(f"| {method} |" in out for method in methods)
    runs = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(runs) == 1 + 4 * 2
    parameters = {run["method"]: run["parameters"] for run in runs}
    assert parameters["loreft"] == 3 * parameters["loreft, shared by layers"]
    answers = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert [run["method"] for run in answers] == methods, "answers are generated with one rate each"
    for run in answers:
        mine = [each for each in runs if each["method"] == run["method"]]
        assert run["learning_rate"] == min(mine, key=lambda each: each["dev"])["learning_rate"]
    assert (tmp_path / "out" / "arithmetic.png").is_file()
    assert not list((tmp_path / "out").glob("*/checkpoint-*")), "done runs leave none"


@pytest.mark.slow
def test_every_method_on_word_sums(model, tmp_path):
    """Each method trains, is saved, reloaded and answers; the joint one with both of its adapters."""
    from safetensors.torch import load_file

    arguments = ["--model", model, "--output", tmp_path / "out", "--steps", 2, "--rows", 4, "--held", 4]
    methods = ["loreft, post-block", "loreft, brep", "loreft, bias everywhere", "loreft, heads", "loreft, heads, bias"]
    methods += ["loreft, heads, red", "lora, r=1", "dora", "joint"]
    arguments += ["--learning-rates", "1e-2", "--new-tokens", 3, "--methods", *methods]
    recipe("arithmetic", *arguments, preset="words")
    runs = {run["method"]: run for run in json.loads((tmp_path / "out" / "results.json").read_text())}
    assert [*runs] == ["base", *methods]
    assert all(run["test"] != runs["base"]["test"] for name, run in runs.items() if name != "base")
    sizes = {name: run["parameters"] for name, run in runs.items()}
    assert sizes["joint"] == sizes["loreft, post-block"] + sizes["lora, r=1"]
    assert sizes["loreft, heads, red"] == 2 * sizes["loreft, heads, bias"]
    (folder,) = (tmp_path / "out" / "adapters").glob("*joint*")
    for weights in (folder, folder / "lora_beside"):
        tensors = load_file(weights / "adapter_model.safetensors")
        assert any(name.endswith((".W2", "lora_B.weight")) and tensor.any() for name, tensor in tensors.items())


def test_methods(monkeypatch):
    """All of them can be made; post-block steering and the joint method start as the base, with W_up at 0."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import joint
    from methods import METHODS
    from training import adapt

    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = build("llama")(input_ids=ids).logits
    for name, fields in METHODS.items():
        loreft, lora = fields.get("loreft", fields), fields.get("lora", fields)
        model = adapt(build("llama"), name, "CAUSAL_LM", loreft=loreft, lora=lora).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-6, rtol=1e-5)
        kinds = {part for key, p in model.named_parameters() if p.requires_grad for part in key.split(".")}
        assert ("loreft_weights" in kinds) is name.startswith(("loreft", "joint"))
        assert ("lora_A" in kinds) is name.startswith(("lora", "dora", "joint"))
        if name.startswith(("loreft, post-block", "joint")) and "linear" not in name:
            for key, parameter in model.named_parameters():
                if "loreft_weights" in key:
                    assert parameter.any() != key.endswith("W2"), "W_up is 0, all else is not"
    assert joint.is_joint(model) and joint.overlap(model) == 0


def test_overlap(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import joint

    loreft = dict(r=1, intervention="nodireft", positions="all")
    model = joint.joint_model(build("llama"), "CAUSAL_LM", loreft, dict(r=1, target_modules=["q_proj", "down_proj"]))
    one, other = torch.eye(32)[:1], torch.eye(32)[1:2]
    for direction, expected in ((one, 1.0), (-2 * one, 1.0), (one + other, 0.5), (other, 0.0)):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("W2"):
                    parameter.copy_(one)
                elif "down_proj.lora_B" in name:
                    parameter.copy_(direction.T)
        assert joint.overlap(model).item() == pytest.approx(expected, abs=1e-6)
    joint.overlap(model).backward()
    apart = joint.joint_model(build("llama"), "CAUSAL_LM", loreft, dict(r=1, target_modules=["q_proj"]))
    assert joint.overlap(apart) == 0, "LoRA writes nothing into the residual stream by itself"


def test_word_sums(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import arithmetic
    import word_sums

    train, test = word_sums.rows(2000, seed=0), word_sums.rows(500, seed=0, test=True)
    assert train[:50] == word_sums.rows(50, seed=0) != word_sums.rows(50, seed=1)
    for row in train + test:
        assert arithmetic.number(row["completion"]) == row["answer"]
        first, second = row["completion"].partition("\n")[0].split(", ")
        for step in (first, second):
            left, right = step.split(" = ")
            assert eval(left) == int(right) >= 0
        assert first.split(" = ")[1] == second.split()[0] and second.endswith(f" {row['answer']}")
        assert not any(letter.isdigit() for letter in row["prompt"])

    def numbers(row):
        words = row["prompt"].replace(".", "").split()
        return tuple(word_sums.WORDS.index(word) for word in words if word in word_sums.WORDS)

    assert {numbers(row) for row in train}.isdisjoint({numbers(row) for row in test})


def test_commonsense(model, tmp_path):
    """All eight sets of a clone of LLM-Adapters are read, answered and scored."""
    clone = tmp_path / "clone"
    (clone / "ft-training_set").mkdir(parents=True)
    rows = [{"instruction": text, "input": "", "output": "a b", "answer": "answer1"} for text in SENTENCES * 4]
    (clone / "ft-training_set" / "commonsense_170k.json").write_text(json.dumps(rows))
    sets = ["boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa"]
    for name in sets:
        (clone / "dataset" / name).mkdir(parents=True)
        (clone / "dataset" / name / "test.json").write_text(json.dumps(rows))
    arguments = ["--data", clone, "--model", model, "--output", tmp_path / "out", "--steps", 2, "--rows", 3]
    recipe("commonsense", *arguments, "--learning-rates", "1e-3", "--new-tokens", 2, "--held", 4)
    runs = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert [run["method"] for run in runs] == ["base", "loreft", "lora"]
    assert all([*run["scores"]] == sets for run in runs)


@pytest.mark.slow
def test_commonsense_without_a_clone(model, data, tmp_path):
    """TREC and CoLA in the same format."""
    arguments = ["--data", data, "--model", model, "--output", tmp_path / "out", "--steps", 2, "--rows", 3]
    arguments += ["--learning-rates", "1e-3", "--new-tokens", 2, "--held", 4, "--docs", tmp_path / "docs"]
    assert "| trec | cola |" in recipe("commonsense", *arguments)
    assert (tmp_path / "docs" / "figures" / "commonsense.png").is_file()
    assert (tmp_path / "docs" / "results" / "commonsense.json").is_file()


def test_training_goes_on_from_the_last_checkpoint(model, tmp_path, monkeypatch):
    """A run that is interrupted and started again ends with the weights of one that was not."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import training as shared
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, PreTrainedTokenizerFast, TrainerCallback

    from peft_reft import LoReftConfig

    collate = DataCollatorForSeq2Seq(PreTrainedTokenizerFast.from_pretrained(model))
    rows = [{"input_ids": [3, 4, 5, n], "labels": [-100, -100, 5, n]} for n in range(6, 22)]

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    def train(folder, callback):
        torch.manual_seed(0)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoReftConfig(task_type="CAUSAL_LM"))
        trainer = shared.Trainer
        monkeypatch.setattr(shared, "Trainer", lambda *given, **named: trainer(*given, **named, callbacks=[callback]))
        try:
            shared.train(adapted, rows, collate, tmp_path / folder, seed=1, learning_rate=1e-2, batch=2, steps=4)
        finally:
            monkeypatch.setattr(shared, "Trainer", trainer)
        return [p.detach() for p in adapted.parameters() if p.requires_grad]

    whole = train("whole", Count())
    with pytest.raises(KeyboardInterrupt):
        train("parts", Interrupt())
    steps.clear()
    resumed = train("parts", Count())
    assert steps == [3, 4]
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("so 3 + 4 = 7.\nThe answer is 7", "7"),
        ("$1,234.50", "1234.5"),
        ("-3 or 4.0", "4"),
        ("The answer is B", "B"),
        ("no", None),
    ],
)
def test_numbers(text, expected, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import arithmetic

    assert arithmetic.number(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("the correct answer is answer3", "answer3"),
        ("Ending1.", "ending1"),
        ("the correct answer is true", "true"),
        ("untrue", None),
    ],
)
def test_choices(text, expected, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import commonsense

    assert commonsense.choice(text) == expected


def test_instruct(model, data, tmp_path):
    arguments = ["--data", data, "--model", model, "--output", tmp_path / "out", "--steps", 2, "--new-tokens", 3]
    out = recipe("instruct", *arguments, "--questions", 2, "--held", 4)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [{*answer} for answer in results["answers"]] == [{"instruction", "before", "after"}] * 2
    assert results["loss"].keys() == {"before", "after"}
    answers = json.loads((tmp_path / "out" / "alpaca_eval.json").read_text())
    assert [{*answer} for answer in answers] == [{"instruction", "output", "generator"}] * 2
    assert "before:" in out and "after:" in out


def test_overhead(model, tmp_path):
    arguments = ["--model", model, "--output", tmp_path / "out", "--rounds", 2, "--new-tokens", 2, "--layers", 1, 3]
    recipe("overhead", *arguments, "--prompt-tokens", 8, "--positions", 1, 4, "--ranks", 1, 2)
    runs = {run["what"]: run for run in json.loads((tmp_path / "out" / "results.json").read_text())}
    assert [*runs["positions"]["more"]] == ["LoReFT 1", "LoReFT 4"]
    assert [*runs["rank"]["more"]] == ["LoReFT 1", "LoRA 1", "LoReFT 2", "LoRA 2"]
    assert [*runs["layers"]["more"]] == ["LoReFT 1", "LoRA 1", "LoReFT 3", "LoRA 3"]
    assert (tmp_path / "out" / "overhead.png").is_file()


def test_composition(model, tmp_path):
    (tmp_path / "german").mkdir()
    (tmp_path / "ultrafeedback_1k").mkdir()
    for language in ("en", "de"):
        (tmp_path / "german" / f"train.{language}").write_text("a b c d e\nf g h i j\n" * 4, encoding="utf-8")
    line = json.dumps({"instruction": "a b", "input": "", "output": "c d"})
    (tmp_path / "ultrafeedback_1k" / "ultrafeedback_1k.json").write_text(f"{line}\n" * 8, encoding="utf-8")
    command = ["--data", tmp_path, "--model", model, "--steps", 2]
    out = recipe("composition", *command, "--output", tmp_path / "out")
    assert all(f"\n{name}: " in out for name in ("neither", "German", "instructions", "both"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["both"]["answers"]) == 3
    assert (tmp_path / "out" / "composition.png").is_file()


def test_widths(tmp_path):
    """Whatever the hidden size and rank, the fitted rate moves the model as far in a step, within a factor of two."""
    arguments = ["--output", tmp_path / "out", "--widths", 64, 256, "--ranks", 1, 8, "--layers", 8, "--steps", 1]
    recipe("widths", *arguments)
    steps = {"adamw": [], "fitted": []}
    for run in json.loads((tmp_path / "out" / "results.json").read_text()):
        steps[run["way"]].append(run["step"])
    assert max(steps["fitted"]) < 2 * min(steps["fitted"]) and max(steps["adamw"]) > 4 * min(steps["adamw"])


def test_gains(model, data, tmp_path):
    """A gain for each block of each model, on tokens of the vocabulary and on a text."""
    out = recipe("gains", "--data", data, "--model", model, "--gemma", model, "--output", tmp_path / "out")
    (run,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(run["vocabulary"]) == len(run["text"]) == LAYERS
    assert all(0.5 < gain < 2 for gain in run["vocabulary"] + run["text"]), "norms of random weights do nothing"
    assert f"| {model.name} | {LAYERS} |" in out


@pytest.mark.slow
def test_rates(model, encoder, data, tmp_path):
    """Every setting, way and rate is measured; the page says which settings hold."""
    arguments = ["--data", data, "--model", model, "--minilm", encoder, "--output", tmp_path / "out"]
    arguments += ["--docs", tmp_path / "docs", "--learning-rates", "1e-3", "1e-2", "--seeds", 1, 2]
    for only, ways in [("MiniLM, r=8, 80", 3), ("MiniLM, r=1,", 2)]:
        recipe("rates", *arguments, "--only", only)
        lines = (tmp_path / "docs" / "one_rate.md").read_text().splitlines()
        rows = [line for line in lines if line.startswith("| MiniLM")]
        assert len(rows) == ways and all(" yes " in row or " no " in row for row in rows)
    runs = json.loads((tmp_path / "docs" / "results" / "rates.json").read_text())
    assert {run["way"] for run in runs} == {"loreft fitted", "loreft adamw", "lora"}
    assert {(run["learning_rate"], run["seed"]) for run in runs} >= {(1e-3, 1), (1e-3, 2), (1e-2, 1)}


def test_an_exact_answer_is_what_greedy_decoding_writes(model, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    from prompts import TextTask
    from tasks import DecoderTask, TaskSettings

    task = TextTask("sums", [], batch=1, steps=1, max_length=9, exact=True)
    worth = DecoderTask(TaskSettings(model=str(model), output=model), task, {})
    base = build("llama").eval()
    rows = []
    for prompt, wrong in [([3, 4, 5], 0), ([6, 7], 0), ([8, 9, 10, 11], 1), ([12, 13, 3], 1)]:
        answer = base.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False, eos_token_id=None)[0]
        answer = answer[len(prompt) :].tolist()
        answer[1] += wrong
        rows.append({"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + answer})
    assert worth.score(base, rows[:3])["accuracy"] == pytest.approx(2 / 3)
    assert worth.score(base, rows[2:])["accuracy"] == 0


def test_texts_are_classified_by_an_encoder(tokenizer, tmp_path, monkeypatch):
    """Rows get their class as label; the score is that of the head; LoRA goes into the five maps of a block."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    from methods import METHODS
    from prompts import TextTask
    from tasks import EncoderTask, TaskSettings
    from training import trainable
    from transformers import MPNetConfig, MPNetModel

    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    MPNetModel(MPNetConfig(**sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = [(text, " yes" if n % 3 else " no") for n, text in enumerate(SENTENCES)]
    task = TextTask("t", rows, batch=2, steps=3, max_length=9, choices=[" yes", " no"], model="MPNet")
    settings = TaskSettings(model="", mpnet=str(tmp_path), output=tmp_path / "out", dev=2, test=3, eval_batch=2)
    worth = EncoderTask(settings, task, METHODS)
    assert [row["labels"] for row in worth.dev + worth.test + worth.rows] == [1, 0, 0, 1, 0, 0]
    assert worth.facts()["majority"] == pytest.approx(2 / 3)
    model = worth.base().eval()
    with torch.no_grad():
        model.classifier.out_proj.weight.zero_()
        model.classifier.out_proj.bias.copy_(torch.tensor([1.0, 0.0]))
    found = worth.score(model, worth.test)
    assert found["accuracy"] == pytest.approx(2 / 3), "always yes"
    low, high = (torch.tensor([a, 1 - a]).log_softmax(0)[0].item() for a in (0.0, 1.0))
    assert found["loss"] == pytest.approx(-(2 * high + low) / 3, rel=1e-5)
    assert trainable(worth.adapted(worth.base(), "lora, r=1")) == 2 * (3 * (32 + 32) + 2 * (32 + 64))
    assert trainable(worth.adapted(worth.base(), "loreft")) == 2 * (2 * 8 * 32 + 8)
    scored = worth.measure(dict(method="loreft", learning_rate=1e-3, seed=1, steps=worth.steps))
    assert scored["accuracy_error"] >= 0 and worth.memory("lora")["mib"] > 0


def searched(results, best, runs=99, **settings):
    """A row of `trials.search` for a method that is best at the rate `best`, with time for so many runs."""
    from trials import search

    measured = []

    def measure(run):
        measured.append((run["learning_rate"], run["seed"]))
        results.ends = 0 if len(measured) >= runs else results.ends
        dev = abs(run["learning_rate"] - best)
        return {"dev": dev, "loss": 1.0, "loss_error": 0.5, "parameters": 3, "minutes": 1.0}

    return search(results, measure, task="t", method="loreft", steps=9, **settings), measured


def test_a_search_that_ran_out_of_time_has_the_seeds_that_are_there(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    from runs import OutOfTime, Results

    settings = dict(best=2.0, learning_rates=[1.0, 2.0, 3.0], seeds=[5, 6, 7])
    for runs, seeds in [(4, 1), (5, 2), (6, 3)]:
        row, _ = searched(Results(tmp_path / f"{runs}.json", {}), runs=runs, **settings)
        assert (row["seeds"], row["runs"], row["learning_rate"], row["loss_error"]) == (seeds, runs, 2.0, 0.5)
    with pytest.raises(OutOfTime):
        searched(Results(tmp_path / "3.json", {}), runs=3, **settings)


def test_a_search_goes_on_where_the_best_rate_is_the_last(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    from runs import Results

    begun = dict(learning_rates=[3e-4, 1e-3, 3e-3], seeds=[5])
    for best, more in [(1e-3, []), (3e-2, [1e-2, 3e-2, 1e-1]), (4e-3, [1e-2]), (1e-4, [1e-4, 3e-5])]:
        row, measured = searched(Results(tmp_path / f"{best}.json", {}), best, **begun)
        assert [rate for rate, _ in measured] == [3e-4, 1e-3, 3e-3, *more, row["learning_rate"]]
        assert row["learning_rate"] == {4e-3: 3e-3}.get(best, best)


def test_the_page_says_who_is_level_with_lora(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    from methods import METHODS, SUFFIXES
    from worth import beside_lora, own_parts
    from worth_page import overview, verdict

    common = dict(task="gsm8k", learning_rate=1e-3, seeds=3, runs=6, search_minutes=9.0, minutes=1.0, loss_error=0.1)
    rows = {"base": (0, 2.0), "lora": (1000, 1.0), "loreft": (200, 1.09), "far": (100, 1.5), "near": (50, 1.2)}
    table = [dict(method=method, parameters=n, loss=loss, **common) for method, (n, loss) in rows.items()]
    shown = beside_lora(table)
    assert [row["within"] for row in shown] == ["", "", "yes", "no", "no"]
    assert [row["share"] for row in shown] == ["", "", "1/5", "1/10", "1/20"]
    assert "behind LoRA: `loreft`." in verdict(shown)
    assert "of 2 small ones is `near`, with loss 1.200 ± 0.100; LoRA has 1.000 ± 0.100" in verdict(shown)
    better = [{**row, "accuracy": -row["loss"], "accuracy_error": 0.3} for row in table]
    assert [row["within"] for row in beside_lora(better)] == ["", "", "yes", "no", "yes"], "accuracy is compared"
    own = [list(own_parts(METHODS.get(name)).values()) for name in ("base", "lora", "loreft", "loreft, decoding too")]
    assert own == [["base"] * 2, ["own"] * 2, ["own", "base"], ["own"] * 2]
    assert [*own_parts(SUFFIXES["loreft, l7+g"]).values()] == ["base", "own"]
    both = beside_lora([*table, *({**row, "task": "trec"} for row in better[:3])])
    head, _, *lines = overview(both).splitlines()
    assert head == "| method | share | trec: accuracy | gsm8k: loss |"
    assert lines == [
        "| base |  | -2.000 | 2.000 |",
        "| lora |  | -1.000 | 1.000 |",
        "| loreft | 1/5 | **-1.090** | **1.090** |",
    ]
    assert verdict(beside_lora(table[:2])) == verdict(beside_lora(table[2:])) == ""


@pytest.mark.slow
def test_worth(model, data, tmp_path):
    """Rates are tried in short, seeds come at the best alone, errors stand beside the scores."""
    arguments = ["--data", data, "--model", model, "--output", tmp_path / "out"]
    arguments += ["--tasks", "ultrafeedback", "cola", "sums", "--dev", 3, "--test", 4]
    arguments += ["--share", 0.05, "--methods", "base", "loreft, l7", "lora, r=1"]
    arguments += ["--learning-rates", "1e-3", "3e-3", "1e-2", "--seeds", 1, 2]
    assert "±" not in recipe("worth", *arguments, "--minutes", 0), "nothing is there, and no time to train"
    out = recipe("worth", *arguments, "--docs", tmp_path / "docs")
    runs = json.loads((tmp_path / "out" / "results.json").read_text())
    trained = [run for run in runs if "steps" in run]
    of_one = [run for run in trained if (run["task"], run["method"]) == ("ultrafeedback", "loreft, l7")]
    *short, one, other = of_one
    assert len(short) >= 3 and {run["steps"] for run in short} == {1} and one["steps"] == other["steps"] == 3
    assert {run["seed"] for run in short} == {one["seed"]} == {1} and other["seed"] == 2
    best = min(short, key=lambda run: run["dev"])["learning_rate"]
    assert one["learning_rate"] == other["learning_rate"] == best
    assert all(run["loss_error"] > 0 for run in trained if run["steps"] in (0, 3))
    rows = [line for line in out.splitlines() if line.startswith(("| ultrafeedback", "| cola", "| sums"))]
    assert len(rows) == 9 and all(" ± " in row for row in rows)
    page = (tmp_path / "docs" / "worth.md").read_text()
    kept = {run["method"]: run["mib"] for run in runs if run["task"] == "sums" and "mib" in run}
    assert 0 < kept["loreft, l7"] < kept["lora, r=1"], "what stands before l7 needs no backward"
    assert page.count(" ± ") == sum(row.count(" ± ") for row in rows) and "## cola" in page
    assert recipe("worth", *arguments).splitlines()[-11:] == out.splitlines()[-11:], "what is there is not run again"
