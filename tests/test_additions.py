"""What CONTRIBUTING.md promises: a new formula is one class, and a new family of models at most a name.

Both are added here, as a contributor would add them, and live an adapter's whole life. A new position group:
test_promises.py.
"""

import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, LAYERS, VOCAB, build, randomise
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from peft_reft import LoReftConfig
from peft_reft.config import DEFAULT_R
from peft_reft.edits.factors import Affine, ElementwiseFactors, LowRankFactors
from peft_reft.edits.families import Elementwise
from peft_reft.edits.formulas import INTERVENTIONS
from peft_reft.edits.intervention import Intervention
from peft_reft.serving.adapters import read_adapter
from peft_reft.serving.tables import Table
from peft_reft.tuner import architectures

ROOT = Path(__file__).parent.parent
IDS = torch.randint(3, VOCAB, (4, 10), generator=torch.Generator().manual_seed(5))
LABELS = IDS.masked_fill(torch.arange(10) < 6, -100)  # prompts of 6 tokens
EDITED = [0, 1, 4, 5]
"""The columns that f2+l2 edits."""


# A formula: one class, and its name in the table


class ScaleReFT(Intervention):
    """Rᵀ(s ⊙ Rh + b): scales and shifts the coordinates of a subspace. Parameters: r·d + 2r."""

    parameter_shapes = {"R": "rd", "s": "r", "b": "r"}

    def factors(self, parameters):
        R, s, b = parameters["R"], parameters["s"], parameters["b"]
        return LowRankFactors(R, Affine(s.unsqueeze(-1) * R, b))

    def reset_parameters(self, init_weights):
        self._random_rotation("R")
        for parameter in (self.s, self.b):
            if init_weights is False:
                parameter.normal_()
            else:
                parameter.zero_()


@pytest.fixture
def formula(monkeypatch):
    monkeypatch.setitem(INTERVENTIONS, "scalereft", ScaleReFT)
    return "scalereft"


def adapted(base=None, **kwargs):
    fields = {"task_type": "CAUSAL_LM", "r": 4, "positions": "f2+l2", **kwargs}
    return get_peft_model(build("llama") if base is None else base, LoReftConfig(**fields))


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def written_out(h, R, s, b, v=None, c=None):
    """The formula in plain algebra, on h (n, d)."""
    edit = torch.stack([R.T @ (s * (R @ row) + b) for row in h])
    return edit if v is None else torch.tanh(h @ v + c).unsqueeze(-1) * edit


def train(model, steps=20):
    """The loss before each step."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=IDS, labels=LABELS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("gate", [False, True], ids=["", "gated"])
def test_a_new_formula_edits_as_it_is_written(formula, gate):
    model = adapted(intervention=formula, gate=gate, layers=[0], init_weights=False).eval()
    seen = []
    block = model.get_base_model().model.layers[0]
    with torch.no_grad():
        hook = block.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
        model(input_ids=IDS, labels=LABELS)
        with model.disable_adapter():
            model(input_ids=IDS, labels=LABELS)
        hook.remove()
        edited, plain = seen
        weights = dict(block.loreft.loreft_weights["default"].named_parameters())
        for row in range(len(IDS)):
            wanted = plain[row].clone()
            wanted[EDITED] += written_out(plain[row, EDITED], **weights)
            torch.testing.assert_close(edited[row], wanted)


@pytest.mark.parametrize("tie", ["layer", "group", "position", "model"])
def test_a_new_formula_trains_is_saved_and_loaded(formula, tie, tmp_path):
    base = logits_of(build("llama"))
    model = adapted(intervention=formula, tie=tie)
    assert torch.equal(logits_of(model), base)  # it starts as the identity
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05  # such a formula learns slowly
    trained = logits_of(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name in [name for name in saved if name.endswith(".R")]:
        torch.testing.assert_close(saved[name] @ saved[name].mT, torch.eye(4).expand(*saved[name].shape[:-2], 4, 4))
    assert torch.equal(logits_of(PeftModel.from_pretrained(build("llama"), tmp_path)), trained)
    assert "scalereft" in (tmp_path / "README.md").read_text()
    assert torch.equal(logits_of(model.unload()), base)


def test_a_new_formula_runs_under_a_trainer_and_generates(formula, tmp_path):
    model = adapted(intervention=formula)
    rows = [{"input_ids": row, "labels": labels} for row, labels in zip(IDS, LABELS)]
    arguments = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    Trainer(model, arguments, train_dataset=rows).train()
    assert len(before) == 3 * LAYERS
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)

    randomise(model)
    prompt = IDS[:, :6]
    written = model.eval().generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        logits = model(input_ids=written, labels=written.masked_fill(torch.arange(10) < 6, -100)).logits
    assert torch.equal(logits[:, 5:-1].argmax(-1), written[:, 6:])


def test_a_new_formula_is_merged(formula):
    model = adapted(build("gpt2"), intervention=formula, positions="all", component="mlp", init_weights=False)
    edited = logits_of(model)
    assert (edited - logits_of(build("gpt2"))).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(model.merge_and_unload()), edited, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", [False, True], ids=["", "gated"])
def test_a_new_formula_is_served(formula, gate, tmp_path):
    """Read into a server's table of weights, it edits as it is written."""
    adapted(intervention=formula, gate=gate, init_weights=False).save_pretrained(tmp_path)
    config = build("llama").config
    config.architectures = ["LlamaForCausalLM"]  # as a saved config has it
    adapter = read_adapter(str(tmp_path), architectures.skeleton(config))
    assert adapter.rank == 4 and len(adapter.factors) == LAYERS
    weights = PeftModel.from_pretrained(build("llama"), tmp_path).get_base_model().model.layers[1].loreft
    weights = dict(weights.loreft_weights["default"].named_parameters())
    table = Table(HIDDEN, 8, 3, torch.device("cpu"))  # of adapters up to rank 8
    table.write(1, adapter.factors["model.layers.1"])
    (key,) = table.stacks
    h = torch.randn(5, HIDDEN)
    found = h.clone()
    with torch.no_grad():
        table.edit_all(key, torch.ones(5, dtype=torch.int64), torch.ones(5, 1), found, None)
        torch.testing.assert_close(found, h + written_out(h, **weights))


# An elementwise formula that only scales


class Scale(Elementwise):
    """h ⊙ s − h: scales. Parameters: d."""

    parameter_shapes = {"s": "d"}

    def factors(self, parameters):
        return ElementwiseFactors(scale=parameters["s"] - 1, shift=None)


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.setitem(INTERVENTIONS, "scale", Scale)
    return dict(intervention="scale", r=DEFAULT_R)


@pytest.mark.parametrize("tie", ["layer", "group", "position", "model"])
@pytest.mark.parametrize("gate", [False, True], ids=["", "gated"])
def test_a_pure_scaling_trains_is_saved_and_loaded(scaling, tie, gate, tmp_path):
    base = logits_of(build("llama"))
    model = adapted(**scaling, tie=tie, gate=gate)
    assert torch.equal(logits_of(model), base)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.02  # few numbers learn slowly
    trained = logits_of(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(build("llama"), tmp_path)), trained)
    assert torch.equal(logits_of(model.unload()), base)


def test_a_pure_scaling_is_merged_without_a_bias(scaling):
    """Llama's linear maps have no bias, and get none."""
    model = adapted(**scaling, positions="all", component="mlp")
    randomise(model)
    edited = logits_of(model)
    assert (edited - logits_of(build("llama"))).abs().max() > 1e-2
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), edited, rtol=1e-4, atol=1e-4)
    assert not [name for name, _ in merged.named_parameters() if name.endswith("bias")]


def test_pure_scalings_add_up(scaling):
    model = adapted(**scaling, init_weights=False)
    model.add_adapter("other", LoReftConfig(task_type="CAUSAL_LM", positions="f2+l2", init_weights=False, **scaling))
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum", combination_type="linear")
    for layer in range(LAYERS):
        weights = model.get_base_model().model.layers[layer].loreft.loreft_weights
        expected = 1 + 0.5 * (weights["default"].s - 1) - 2 * (weights["other"].s - 1)
        torch.testing.assert_close(weights["sum"].s, expected)
        assert not weights["sum"].b.any()


def test_a_pure_scaling_is_served(scaling, tmp_path):
    adapted(**scaling, init_weights=False).save_pretrained(tmp_path)
    config = build("llama").config
    config.architectures = ["LlamaForCausalLM"]  # as a saved config has it
    adapter = read_adapter(str(tmp_path), architectures.skeleton(config))
    table = Table(HIDDEN, 8, 3, torch.device("cpu"))
    factors = adapter.factors["model.layers.1"]
    table.write(1, factors)
    (key,) = table.stacks
    h = torch.randn(5, HIDDEN)
    found = h.clone()
    table.edit_all(key, torch.ones(5, dtype=torch.int64), torch.ones(5, 1), found, None)
    torch.testing.assert_close(found, h + h * factors.scale)


def test_an_elementwise_edit_of_nothing_is_refused():
    with pytest.raises(ValueError, match="needs a scale, a shift, or both"):
        ElementwiseFactors(scale=None, shift=None)


# A family of models: no more than the names of its parts


class NewConfig(PretrainedConfig):
    """Its hidden size is called `width`."""

    model_type = "a_new_family"

    def __init__(self, vocab_size=VOCAB, width=HIDDEN, num_hidden_layers=LAYERS, **kwargs):
        self.vocab_size, self.width, self.num_hidden_layers = vocab_size, width, num_hidden_layers
        super().__init__(pad_token_id=0, bos_token_id=1, eos_token_id=2, **kwargs)


class Mixer(nn.Module):
    """In the place of attention: the mean of what stands before a token."""

    def __init__(self, width):
        super().__init__()
        self.project = nn.Linear(width, width)

    def forward(self, hidden, mask):
        total = (hidden * mask).cumsum(1)
        return self.project(total / mask.cumsum(1).clamp_min(1))


class NewBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mixer = Mixer(width)
        self.inner = nn.Linear(width, width)

    def forward(self, hidden, mask):
        hidden = hidden + self.mixer(hidden, mask)
        return hidden + torch.tanh(self.inner(hidden))


class NewForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NewConfig
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.tower = nn.ModuleList(NewBlock(config.width) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.tokens(input_ids)
        for block in self.tower:
            hidden = block(hidden, mask.unsqueeze(-1).float())
        logits = self.head(hidden)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def new_model():
    torch.manual_seed(0)
    model = NewForCausalLM(NewConfig()).eval()
    for parameter in model.parameters():  # transformers' start is too small for edits to be seen
        nn.init.normal_(parameter, std=1 / math.sqrt(HIDDEN))
    return model


@pytest.fixture
def size_name(monkeypatch):
    """The name by which the family's config knows its hidden size."""
    monkeypatch.setattr(architectures, "_SIZE_NAMES", (*architectures._SIZE_NAMES, "width"))


def test_an_unknown_name_of_the_hidden_size_raises():
    with pytest.raises(ValueError, match="hidden size of NewForCausalLM is unknown"):
        adapted(new_model())


def test_a_new_family_needs_no_more_than_a_name(size_name, tmp_path):
    base = logits_of(new_model())
    model = adapted(new_model(), component="block")
    assert model.targeted_module_names == [f"tower.{n}" for n in range(LAYERS)]
    assert torch.equal(logits_of(model), base)
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    trained = logits_of(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(new_model(), tmp_path)
    assert torch.equal(logits_of(loaded), trained)
    assert torch.equal(logits_of(model.unload()), base)


def test_a_new_family_edits_prompts_alone_and_alike_in_training_and_generation(size_name):
    model = adapted(new_model(), layers=[0], init_weights=False).eval()
    seen = []
    model.get_base_model().tower[0].register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    prompt = IDS[:, :6]
    with torch.no_grad():
        written = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, use_cache=False
        )
        model(input_ids=written, labels=written.masked_fill(torch.arange(written.shape[1]) < 6, -100))
        with model.disable_adapter():
            model(input_ids=written)
    *generated, trained, plain = seen
    changed = (trained != plain).any(-1)  # (batch, seq)
    assert changed.any(0).nonzero().flatten().tolist() == EDITED
    assert len(generated) == written.shape[1] - 6
    for hidden in generated:
        torch.testing.assert_close(hidden, trained[:, : hidden.shape[1]])


def test_a_new_family_may_name_its_components(size_name, monkeypatch):
    with pytest.raises(ValueError, match="It has: mixer, inner"):
        adapted(new_model(), component="attention")
    names = {**architectures.COMPONENT_NAMES}
    names["attention"] = (*names["attention"], "mixer")
    monkeypatch.setattr(architectures, "COMPONENT_NAMES", names)
    model = adapted(new_model(), component="attention")
    assert model.targeted_module_names == [f"tower.{n}.mixer" for n in range(LAYERS)]
    losses = train(model)
    assert losses[-1] < losses[0]


# What the page says beside


def test_no_file_is_unpickled_without_weights_only():
    for path in (ROOT / "peft_reft").rglob("*.py"):
        source = path.read_text()
        assert not re.search(r"^\s*(import|from) (pickle|dill|joblib|cloudpickle)\b", source, re.MULTILINE), path
        for call in re.findall(r"torch\.load\((.*)\)", source):
            assert "weights_only=True" in call, f"{path}: torch.load({call})"


def test_every_command_that_the_page_names_exists():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"\bmake ([\w-]+)", page))
    assert targets
    for target in targets:
        subprocess.run(["make", "--dry-run", "--always-make", target], cwd=ROOT, check=True, capture_output=True)
