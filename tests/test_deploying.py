"""docs/deploying.md: plain weights, `torch.export`, ONNX, the container. Its code blocks run in test_examples.py."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import GQA, VOCAB, build, make_tokenizer, randomise
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_reft import LoReftConfig
from peft_reft.cli.main import main

ROOT = Path(__file__).parent.parent
ANY = torch.export.Dim.DYNAMIC


# -- Plain weights


def saved_adapter(tmp_path, name, component):
    """A model of the family with an adapter whose edit folds into weights; both are saved."""
    torch.manual_seed(0)
    more = {"head_dim": 8} if name in ("Qwen3", "Gemma3Text", "Helium") else {}
    config = getattr(transformers, f"{name}Config")(**GQA, **more)
    base = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fields = dict(task_type="CAUSAL_LM", r=4, positions="all", component=component, layers="0;-1", init_weights=False)
    model = get_peft_model(base, LoReftConfig(**fields)).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    return model


@pytest.mark.parametrize(
    "name, component, switch",
    [
        ("Llama", "mlp", "mlp_bias"),
        ("Llama", "attention", "attention_bias"),
        ("Granite", "mlp", "mlp_bias"),
        ("SmolLM3", "mlp", "mlp_bias"),
        ("Helium", "mlp", "mlp_bias"),
        ("Qwen3", "attention", "attention_bias"),
        ("Gemma", "attention", "attention_bias"),
        ("Gemma3Text", "attention", "attention_bias"),
        ("Olmo2", "attention", "attention_bias"),
        ("Cohere", "attention", "attention_bias"),
    ],
)
def test_export_keeps_the_bias_where_a_config_can_say_so(name, component, switch, tmp_path, capsys):
    model = saved_adapter(tmp_path, name, component)
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "whole")]) == 0
    assert f"{switch}=true" in capsys.readouterr().out
    assert json.loads((tmp_path / "whole" / "config.json").read_text())[switch] is True
    whole, report = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(report.values()), report
    biases = {n: p for n, p in whole.named_parameters() if n.endswith("bias")}
    edited = [n for n, p in biases.items() if p.any()]
    assert len(edited) == 2 and len(biases) > 2, "the others of their kind are 0"
    ids = torch.arange(3, 13).unsqueeze(0)
    with torch.no_grad():
        expected, base = model(ids).logits, model.get_base_model()
        torch.testing.assert_close(whole.eval()(ids).logits, expected, atol=1e-4, rtol=1e-4)
        with model.disable_adapter():
            assert not torch.allclose(base(ids).logits, expected, atol=1e-2)


@pytest.mark.parametrize(
    "name, component",
    [("Mistral", "mlp"), ("Mistral", "attention"), ("Qwen2", "attention"), ("Qwen3", "mlp"), ("Helium", "attention")],
)
def test_export_refuses_where_no_config_can_say_so(name, component, tmp_path, capsys):
    saved_adapter(tmp_path, name, component)
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "whole")]) == 1
    error = capsys.readouterr().err
    assert re.search(r"would lose model\.layers\.0\.(mlp|self_attn)\.(down|o)_proj\.bias", error), error
    assert not (tmp_path / "whole").exists()


# -- torch.export and ONNX


def adapted(name="llama", **fields):
    fields = {"task_type": "CAUSAL_LM" if name == "llama" else "SEQ_CLS", "r": 4, "positions": "f2+l2", **fields}
    model = get_peft_model(build(name), LoReftConfig(**fields)).eval()
    randomise(model)
    return model


def batch(rows, length, padding="right", seed=0):
    """Rows of `length` columns; the first row has two columns of padding."""
    ids = torch.randint(10, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, slice(length - 2, None) if padding == "right" else slice(0, 2)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def with_positions(inputs, width=4):
    """Positions other than those of the whole row."""
    rows, length = inputs["input_ids"].shape
    return {**inputs, "intervention_positions": torch.tensor([[0, 1, length - 4, length - 3]] * rows)}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


CHATS = {"response_template": [[4, 8]], "instruction_template": [[4, 7]]}
EXPORTS = {
    "classifier": ("bert", {}, False),
    "classifier, whole prompt": ("bert", {"positions": "p"}, False),
    "classifier, a set of weights for each slot": ("bert", {"tie": "position"}, False),
    "writer, all": ("llama", {"positions": "all"}, False),
    "writer, prompts alone": ("llama", {}, False),
    "writer, positions given": ("llama", {}, True),
    "writer, chats, positions given": ("llama", CHATS, True),
    "writer, other formula": ("llama", {"intervention": "direft", "act_fn": "silu", "gate": True}, True),
}
SIZES = [(3, 9), (1, 6), (2, 17)]


def case(what, padding="right"):
    """Model, inputs of a given size, and what may change of their sizes."""
    name, fields, given = EXPORTS[what]

    def inputs(rows, length):
        made = batch(rows, length, padding, seed=length)
        if name == "llama":
            made["use_cache"] = False
        return with_positions(made) if given else made

    shapes = {"input_ids": {0: ANY, 1: ANY}, "attention_mask": {0: ANY, 1: ANY}}
    if name == "llama":
        shapes["use_cache"] = None
    if given:
        shapes["intervention_positions"] = {0: ANY}
    return adapted(name, **fields), inputs, shapes


def assert_same(got, inputs, model):
    """The same logits, and not those of the base model; rows of a language model are compared without padding."""
    expected = logits(model, inputs)
    counts = inputs["attention_mask"].bool() if expected.ndim == 3 else slice(None)
    torch.testing.assert_close(got[counts], expected[counts], atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        base = logits(model, {k: v for k, v in inputs.items() if k != "intervention_positions"})
    assert not torch.allclose(base[counts], expected[counts], atol=1e-2)


QUIET = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


QUICK = ["writer, positions given"]


@QUIET
@pytest.mark.parametrize(
    "what", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in EXPORTS]
)
def test_torch_export(what):
    model, inputs, shapes = case(what)
    with torch.no_grad():
        program = torch.export.export(model.get_base_model(), (), inputs(3, 9), dynamic_shapes=shapes)
    for size in SIZES:
        assert_same(logits(program.module(), inputs(*size)), inputs(*size), model)


@QUIET
@pytest.mark.slow
def test_an_exported_program_runs_without_this_package(tmp_path):
    model, inputs, shapes = case("writer, positions given")
    with torch.no_grad():
        program = torch.export.export(model.get_base_model(), (), inputs(3, 9), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    given = inputs(2, 12)
    torch.save(given, tmp_path / "inputs.pt")
    code = (
        "import sys, torch, transformers.modeling_outputs\n"
        "program = torch.export.load('model.pt2').module()\n"
        "torch.save(program(**torch.load('inputs.pt')).logits, 'logits.pt')\n"
        "assert not {'peft_reft', 'peft'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(torch.load(tmp_path / "logits.pt"), given, model)


@QUIET
def test_an_exported_program_refuses_several_answers_a_row():
    model = adapted(**CHATS)
    once = {"input_ids": torch.tensor([[4, 7, 20, 4, 8, 21, 22, 23, 24, 25]]), "use_cache": False}
    twice = {"input_ids": torch.tensor([[4, 7, 20, 4, 8, 21, 4, 7, 4, 8]]), "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(model.get_base_model(), (), once).module()
    torch.testing.assert_close(logits(program, once), logits(model, once), atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match="several answers"):
        program(**twice)


def onnx_session(tmp_path, model, inputs, shapes):
    """A function from inputs to logits that runs the exported file."""
    pytest.importorskip("onnxscript", reason="the exporter to ONNX needs onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs the exported file")
    with torch.no_grad():
        program = torch.onnx.export(
            model.get_base_model(),
            (),
            kwargs=inputs,
            dynamic_shapes=shapes,
            output_names=["logits"],
            verbose=False,
        )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = {each.name for each in session.get_inputs()}

    def run(given):
        assert names == {name for name, value in given.items() if isinstance(value, torch.Tensor)}
        return torch.from_numpy(session.run(["logits"], {name: given[name].numpy() for name in names})[0])

    return run


@QUIET
@pytest.mark.slow
@pytest.mark.parametrize("what", EXPORTS)
def test_onnx(what, tmp_path):
    model, inputs, shapes = case(what)
    run = onnx_session(tmp_path, model, inputs(3, 9), shapes)
    for size in SIZES:
        assert_same(run(inputs(*size)), inputs(*size), model)


@QUIET
@pytest.mark.slow
def test_onnx_with_padding_on_the_left(tmp_path):
    model, inputs, shapes = case("writer, prompts alone", "left")
    run = onnx_session(tmp_path, model, inputs(3, 9), shapes)
    for size in SIZES:
        assert_same(run(inputs(*size)), inputs(*size), model)


@QUIET
@pytest.mark.parametrize("wrong", ["chats", "labels"])
def test_onnx_refuses_what_its_graph_could_not_check(wrong):
    pytest.importorskip("onnxscript", reason="the exporter to ONNX needs onnxscript")
    model = adapted(**(CHATS if wrong == "chats" else {}))
    inputs = {"input_ids": batch(2, 9)["input_ids"], "use_cache": False}
    if wrong == "labels":
        inputs["labels"] = inputs["input_ids"]
    with pytest.raises(Exception, match=r"torch\.onnx\.export.*`intervention_positions`"):
        torch.onnx.export(model.get_base_model(), (), kwargs=inputs, verbose=False)


# -- The container


def test_the_dockerfile_installs_what_pyproject_names():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    lines = (ROOT / "examples" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = settings["project"]
    named = {re.match(r"[\w-]+", each)[0] for each in project["dependencies"]}
    installs = [line.split()[2:] for line in lines if line.startswith("RUN pip ")]
    assert installs, "there is a line that installs"
    for words in installs:
        assert words[0] == "install"
        without_options = re.sub(r"--no-cache-dir|(-c|--index-url) \S+", "", " ".join(words[1:])).split()
        for package in without_options:
            extra = re.fullmatch(r'"\.\[(\w+)\]"', package)
            assert package in named or extra[1] in project["optional-dependencies"], package
    assert not any("trl" in line.lower() for line in lines if line.startswith("RUN"))
    copied = [source for line in lines if line.startswith("COPY") for source in line.split()[1:-1]]
    assert [source for source in copied if not (ROOT / source).exists()] == []
    # Hatch builds a wheel without a file that is missing, and says nothing.
    assert set(settings["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]) <= set(copied)
    assert len([line for line in lines if not line.startswith("#")]) <= 10
