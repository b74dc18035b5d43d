"""`LoReftConfig`: its defaults, the values it refuses and its messages, saving, and layers."""

import dataclasses
import json

import pytest
from conftest import build
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, PeftType, TaskType, get_peft_model

from peft_reft import LoReftConfig, Positions
from peft_reft.positions.layers import check_layers, resolve_layers

# Fields.


def readable(value):
    """Name a test. Sets are sorted, because the workers of pytest-xdist must collect the same tests."""
    return json.dumps(value, default=lambda v: sorted(v) if isinstance(v, set | frozenset) else str(v), skipkeys=True)


@pytest.mark.parametrize(
    "name, default",
    [
        ("r", 8),
        ("positions", "f7+l7"),
        ("layers", "all"),
        ("component", "block"),
        ("intervention", "loreft"),
        ("tie", "layer"),
        ("dropout", 0.0),
        ("target_modules", None),
        ("exclude_modules", None),
        ("modules_to_save", None),
        ("target_parameters", None),
        ("trainable_token_indices", None),
        ("response_template", None),
        ("instruction_template", None),
    ],
)
def test_defaults(name, default):
    """The paper's commonsense setting (design, 3)."""
    assert getattr(LoReftConfig(), name) == default


def test_every_own_field_is_in_the_design_and_has_help():
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    own = {field.name: field for field in dataclasses.fields(LoReftConfig) if field.name not in inherited}
    assert own.keys() == {
        *("r", "positions", "layers", "component", "intervention", "tie", "dropout", "init_weights", "act_fn", "gate"),
        *("target_modules", "exclude_modules", "modules_to_save", "trainable_token_indices"),
        *("response_template", "instruction_template"),
        *("layers_to_transform", "layers_pattern", "runtime_config"),
    }
    assert all(field.metadata["help"] for field in own.values())
    assert LoReftConfig().init_weights is own["init_weights"].default
    assert own["init_weights"].default in (True, False, "paper")


def test_peft_type_is_the_enum_member():
    """transformers calls `.peft_type.value.lower()`."""
    assert LoReftConfig().peft_type is PeftType.LOREFT
    assert LoReftConfig(peft_type="LORA").peft_type is PeftType.LOREFT


@pytest.mark.parametrize("layers", [(2, 0), range(0, 4, 2), {0, 2}])
def test_layers_become_a_list(layers):
    config = LoReftConfig(layers=layers)
    assert isinstance(config.layers, list)
    assert sorted(config.layers) == [0, 2]


# What is refused: the message has the field, the value and what is allowed.


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("r", 0, "from 1"),
        ("r", -3, "from 1"),
        ("r", 2.0, "int"),
        ("r", "8", "int"),
        ("r", True, "int"),
        ("r", None, "int"),
        ("component", "residual", "'block', 'attention', 'mlp'"),
        ("component", None, "'block', 'attention', 'mlp'"),
        ("intervention", "LoReFT", "'loreft', 'noreft', 'direft', 'nodireft', 'consreft', 'lobireft'"),
        ("intervention", ["loreft"], "'loreft', 'noreft'"),
        ("intervention", "RED", "'red', 'bias'"),
        ("r", {}, "at least one entry"),
        ("r", {"0-3": 0}, "from 1"),
        ("r", {"0-3": 4, "4-": 2.0}, "int"),
        ("r", {"four": 4}, "'0-7'"),
        ("act_fn", "Relu", "'relu'"),
        ("act_fn", "prelu", "'relu'"),
        ("gate", 1, "True, False"),
        ("gate", None, "True, False"),
        ("tie", "none", "'position', 'group', 'layer', 'model'"),
        ("tie", True, "'position', 'group', 'layer', 'model'"),
        ("dropout", 1.0, "from 0 to below 1"),
        ("dropout", -0.1, "from 0 to below 1"),
        ("dropout", float("nan"), "from 0 to below 1"),
        ("dropout", True, "from 0 to below 1"),
        ("dropout", "0.1", "from 0 to below 1"),
        ("init_weights", "Paper", "True, False, 'paper'"),
        ("init_weights", 1, "True, False, 'paper'"),
        ("init_weights", None, "True, False, 'paper'"),
        ("layers", "", "'0-7'"),
        ("layers", "first", "'0-7'"),
        ("layers", "0,3", "'0-7'"),
        ("layers", "0;;3", "'0-7'"),
        ("layers", "0:3", "'0-7'"),
        ("layers", "all;3", "'0-7'"),
        ("layers", "1.5", "'0-7'"),
        ("layers", [], "non-empty list of ints"),
        ("layers", [0, 1.0], "list of ints"),
        ("layers", ["0"], "list of ints"),
        ("layers", [True], "list of ints"),
        ("layers", True, "list of ints"),
        ("layers", None, "list of ints"),
        ("layers", 1.5, "list of ints"),
        ("positions", "f7-l7", "fN (first N tokens of the prompt), lN "),
        ("positions", "f0", "1 or more"),
        ("instruction_template", [[1, 2]], "response_template=None names no header behind which one begins"),
        ("positions", "", "fN (first N tokens of the prompt), lN "),
        ("positions", None, "fN (first N tokens of the prompt), lN "),
        ("positions", 7, "fN (first N tokens of the prompt), lN "),
        ("positions", ["f7", "l7"], "fN (first N tokens of the prompt), lN "),
        ("positions", {}, "at least one entry"),
        ("target_parameters", ["lm_head.weight"], "target_modules"),
    ],
)
def test_bad_values(name, value, allowed):
    with pytest.raises(ValueError) as error:
        LoReftConfig(**{name: value})
    message = str(error.value)
    assert name in message and allowed in message
    assert repr(value) in message or any(repr(key) in message for key in value)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(intervention="red", r=4), r"r=4: intervention='red' has no rank"),
        (dict(intervention="bias", r={"0-": 4}), r"intervention='bias' has no rank"),
        (
            dict(intervention="consreft", act_fn="relu"),
            r"act_fn='relu'.*'consreft'.*'loreft', 'noreft', 'direft', 'nodi",
        ),
        (dict(intervention="red", act_fn="relu"), r"act_fn='relu'.*'red'"),
        (dict(intervention="interchange", gate=True), r"gate=True.*'interchange'"),
        (dict(intervention="interchange", tie="group", positions="p"), r"'interchange' with tie='group'.*'p'"),
        (dict(r={"0": 4, "1-": 8}, tie="model"), r"r=\{'0': 4, '1-': 8\}: tie='model' shares one"),
    ],
    ids=readable,
)
def test_fields_that_contradict_each_other(fields, words):
    with pytest.raises(ValueError, match=words):
        LoReftConfig(**fields)


@pytest.mark.parametrize(
    "positions, wrong, allowed",
    [
        ({"0-3": "f5", "4-": "x5"}, "'x5'", "fN (first N tokens of the prompt), lN "),
        ({"0-3": "f5", "4-": 5}, "5", "fN (first N tokens of the prompt), lN "),
        ({"0-3": "f5", "four": "l5"}, "'four'", "'0-7'"),
        ({"0-3": "f5", 1.5: "l5"}, "1.5", "'0-7'"),
        ({"0-3": "f5", None: "l5"}, "None", "'0-7'"),
    ],
)
def test_bad_mappings(positions, wrong, allowed):
    with pytest.raises(ValueError) as error:
        LoReftConfig(positions=positions)
    assert "positions" in str(error.value) and wrong in str(error.value) and allowed in str(error.value)


@pytest.mark.parametrize("positions", ["all", "p", "f2+g", {"0": "f2", "1-": "p+g3"}])
def test_one_intervention_a_position_needs_counts(positions):
    with pytest.raises(ValueError, match="tie='position'") as error:
        LoReftConfig(tie="position", positions=positions)
    assert "'group', 'layer' or 'model'" in str(error.value)
    LoReftConfig(tie="group", positions=positions)


@pytest.mark.parametrize(
    "other", [{"layers": [0, 1]}, {"component": "mlp"}, {"layers": "0-", "component": "attention"}]
)
def test_target_modules_say_it_all(other):
    with pytest.raises(ValueError) as error:
        LoReftConfig(target_modules=["model.layers.0"], **other)
    assert "model.layers.0" in str(error.value) and "target_modules" in str(error.value)
    for name, value in other.items():
        assert f"{name}={value!r}" in str(error.value)


def test_unknown_task_types_are_peft_s_to_refuse():
    with pytest.raises(ValueError, match="'CHAT'"):
        LoReftConfig(task_type="CHAT")


# Saving.

CONFIGS = [
    {},
    {"task_type": "CAUSAL_LM", "r": 3, "positions": "f2+l3+g", "layers": [0, -1], "component": "mlp"},
    {"r": {"0-3": 2, "4-": 16}, "act_fn": "relu", "gate": True},
    {"intervention": "red", "gate": True},
    {"layers": 5},
    {"layers": range(2, 8, 3)},
    {"layers": {7, 1}},
    {"layers": "0-7;16;-1", "intervention": "nodireft", "tie": "position", "dropout": 0.25, "init_weights": "paper"},
    {"init_weights": False, "tie": "model", "positions": "all"},
    {"positions": {"0-11": "f5", "12-": "l5"}, "tie": "group"},
    {"target_modules": ["layers.1", "layers.0"], "exclude_modules": ["layers.0.mlp", "layers.1.mlp"]},
    {"target_modules": {"layers.1", "layers.0"}},
    {"target_modules": ("layers.1",), "exclude_modules": ".*mlp"},
    {"target_modules": r".*layers\.[0-3]"},
    {"modules_to_save": ["classifier", "score"], "task_type": TaskType.SEQ_CLS},
    {"target_modules": ["mlp"], "layers_to_transform": [2, 0], "layers_pattern": "layers"},
    {"layers_to_transform": [0, -1]},
    {"trainable_token_indices": [3, 1], "base_model_name_or_path": "some/model", "revision": "main"},
    {"trainable_token_indices": {"embed_tokens": [3, 1]}, "inference_mode": True},
    {"response_template": [[4, 8], [4]], "instruction_template": [[4, 7]]},
    {"response_template": []},
]


@pytest.mark.parametrize("loader", [LoReftConfig, PeftConfig])
@pytest.mark.parametrize("fields", CONFIGS, ids=readable)
def test_round_trip(fields, loader, tmp_path):
    config = LoReftConfig(**fields)
    config.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(str(tmp_path))
    assert type(loaded) is LoReftConfig
    assert loaded == config


def test_the_cases_above_cover_every_field():
    inherited = {"peft_type", "auto_mapping", "peft_version"}  # PEFT's own affair
    names = {field.name for field in dataclasses.fields(LoReftConfig)} - inherited
    assert names - {"runtime_config"} == {name for fields in CONFIGS for name in fields}


def test_target_parameters_is_no_field_but_may_be_given(tmp_path):
    """PEFT and TRL read it, files of older versions have it, and PEFT's table takes the field for a capability."""
    config = LoReftConfig(target_parameters=None)
    assert config.target_parameters is None and "target_parameters" not in config.to_dict()
    assert dataclasses.replace(config, r=2) == LoReftConfig(r=2)
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"target_parameters": None}))
    assert PeftConfig.from_pretrained(tmp_path) == config
    path.write_text(json.dumps(written | {"target_parameters": ["experts.down_proj"]}))
    with pytest.raises(ValueError, match=r"target_parameters=\['experts.down_proj'\] is not supported"):
        PeftConfig.from_pretrained(tmp_path)


def test_what_is_saved_is_the_same_every_time(tmp_path):
    """Sets are saved sorted, because their own order depends on the hash seed."""
    names = [f"layers.{i}" for i in range(20)]
    LoReftConfig(target_modules=set(names), exclude_modules=set(names)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == saved["exclude_modules"] == sorted(names)
    assert saved["peft_type"] == "LOREFT"


def test_a_saved_mapping_keeps_the_order_of_its_specs(tmp_path):
    """The order decides how the slots of `intervention_positions` are laid out."""
    config = LoReftConfig(positions={"8-": "f5", "0-7": "l3"})
    config.save_pretrained(tmp_path)
    assert LoReftConfig.from_pretrained(str(tmp_path)).layout == config.layout


@pytest.mark.parametrize("positions", [{0: "f5", 1: "l5"}, {0: "f5", "1-": "l5"}], ids=readable)
def test_a_mapping_by_ints_means_the_same_after_loading(positions, tmp_path):
    config = LoReftConfig(positions=positions)
    config.save_pretrained(tmp_path)
    loaded = LoReftConfig.from_pretrained(str(tmp_path))
    assert loaded.positions_by_layer(2) == config.positions_by_layer(2)


@pytest.mark.parametrize(
    "fields", [{"positions": {(0, 1): "f5"}}, {"layers": frozenset({0, 1})}, {"layers": {0: "f5"}}], ids=readable
)
def test_what_is_accepted_can_be_saved_and_loaded(fields, tmp_path):
    """A value of another type than the field's is refused at once, or survives saving and loading."""
    try:
        config = LoReftConfig(**fields)
    except ValueError:
        return
    config.save_pretrained(tmp_path)
    assert LoReftConfig.from_pretrained(str(tmp_path)).positions_by_layer(2) == config.positions_by_layer(2)


@pytest.mark.parametrize("loader", [LoReftConfig, PeftConfig])
def test_fields_of_a_newer_version_are_dropped_with_a_warning(loader, tmp_path):
    LoReftConfig(r=3).save_pretrained(tmp_path)
    filename = tmp_path / "adapter_config.json"
    filename.write_text(json.dumps({**json.loads(filename.read_text()), "router": "sigmoid"}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['router'\] for class LoReftConfig"):
        loaded = loader.from_pretrained(str(tmp_path))
    assert loaded == LoReftConfig(r=3) and not hasattr(loaded, "router")


def test_a_value_of_a_newer_version_is_refused(tmp_path):
    """Without it another formula would run than the one that was trained."""
    LoReftConfig().save_pretrained(tmp_path)
    filename = tmp_path / "adapter_config.json"
    filename.write_text(json.dumps({**json.loads(filename.read_text()), "intervention": "gatedreft"}))
    with pytest.raises(ValueError, match="intervention='gatedreft'"):
        LoReftConfig.from_pretrained(str(tmp_path))


# Positions by layer.

F5, L5 = Positions.parse("f5"), Positions.parse("l5")


@pytest.mark.parametrize(
    "layers, positions, expected",
    [
        ("all", "f5", {0: F5, 1: F5, 2: F5, 3: F5}),
        ([-1, 1], "f5", {1: F5, 3: F5}),
        ("all", {"0-1": "f5", "2-": "l5"}, {0: F5, 1: F5, 2: L5, 3: L5}),
        ("all", {"-1": "l5", "1": "f5"}, {1: F5, 3: L5}),
        ("all", {"all": "f5"}, {0: F5, 1: F5, 2: F5, 3: F5}),
        ("0;3", {"0-2": "f5", "3": "l5"}, {0: F5, 3: L5}),
        (2, {"0;2": "f5"}, {2: F5}),
    ],
)
def test_positions_by_layer(layers, positions, expected):
    by_layer = LoReftConfig(layers=layers, positions=positions).positions_by_layer(4)
    assert by_layer == expected
    assert list(by_layer) == sorted(by_layer)


def test_positions_by_layer_out_of_range():
    for fields in ({"layers": [4]}, {"layers": "0--5"}, {"positions": {"0-4": "f5"}}):
        ((name, _),) = fields.items()
        with pytest.raises(ValueError, match=rf"^{name}=.* the model has 4 layers: allowed are 0 to 3, or -4 to -1"):
            LoReftConfig(**fields).positions_by_layer(4)


@pytest.mark.parametrize("positions", [{"0-2": "f5", "2-": "l5"}, {"3": "f5", "-1": "l5"}, {"0": "f5", "0-0": "f5"}])
def test_a_layer_has_one_spec(positions):
    with pytest.raises(ValueError, match=r"gives layer [023] two specs") as error:
        LoReftConfig(positions=positions).positions_by_layer(4)
    assert str(positions) in str(error.value)


def test_a_chosen_layer_needs_a_spec():
    config = LoReftConfig(layers="1-3", positions={"0": "f5", "2": "l5"})
    with pytest.raises(ValueError, match=r"layers='1-3' has \[1, 3\]"):
        config.positions_by_layer(4)


def test_layout_has_the_groups_of_every_spec_once():
    config = LoReftConfig(positions={"0": "f5", "1": "l5+g", "2": "f5+l2", "3": "l5+g"})
    assert [str(spec) for spec in config.specs] == ["f5", "l5+g", "f5+l2"]
    assert [str(group) for group in config.layout] == ["f5", "l5", "g", "f5", "l2"]  # f5 beside an l2 is another f5


@pytest.mark.parametrize(
    "positions, specs",
    [
        ({"8-": "f5", "0-7": "l3"}, ["l3", "f5"]),
        ({"10": "f5", "9": "l3"}, ["l3", "f5"]),  # as numbers, not as strings
        ({"-1": "f5", "3": "p", "all": "l3"}, ["l3", "p", "f5"]),
    ],
)
def test_specs_stand_in_the_order_of_their_layers(positions, specs):
    """The order of the mapping's keys, which JSON sorts, must not move slots of `intervention_positions`."""
    for items in (positions.items(), reversed(positions.items())):
        assert [str(spec) for spec in LoReftConfig(positions=dict(items)).specs] == specs


# Layer ranges.


def naive_layers(parts, n_layers):
    """Return the layers of `parts`, or None if one is out of range or empty. A part is (first, last or None)."""
    names = list(range(n_layers))
    chosen = set()
    for first, last in parts:
        try:
            a, b = names[first], names[-1 if last is None else last]  # Python's own way of counting from the end
        except IndexError:
            return None
        if a > b:
            return None
        for layer in names:
            if a <= layer <= b:
                chosen.add(layer)
    return sorted(chosen)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.tuples(st.integers(-8, 8), st.sampled_from(["one", "range", "open"]), st.integers(-8, 8)), min_size=1),
    st.integers(1, 8),
)
def test_ranges_agree_with_the_oracle(drawn, n_layers):
    texts, parts = [], []
    for first, kind, last in drawn[:4]:
        texts.append({"one": f"{first}", "range": f"{first}-{last}", "open": f" {first}- "}[kind])
        parts.append((first, {"one": first, "range": last, "open": None}[kind]))
    spec, expected = ";".join(texts), naive_layers(parts, n_layers)
    check_layers(spec, "layers")
    if expected is None:
        with pytest.raises(ValueError, match=r"^layers='") as error:
            resolve_layers(spec, n_layers, "layers")
        assert repr(spec) in str(error.value) and f"{n_layers} layers" in str(error.value)
    else:
        assert resolve_layers(spec, n_layers, "layers") == expected


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(-8, 8), min_size=1), st.integers(1, 8))
def test_lists_agree_with_the_oracle(indices, n_layers):
    expected = naive_layers([(index, index) for index in indices], n_layers)
    if expected is None:
        with pytest.raises(ValueError, match=r"^layers="):
            resolve_layers(indices, n_layers, "layers")
    else:
        assert resolve_layers(indices, n_layers, "layers") == expected


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("0-2;-1", [0, 1, 2, 5]),
        ("4-", [4, 5]),
        ("-2-", [4, 5]),
        ("-3--2", [3, 4]),
        ("1--2", [1, 2, 3, 4]),
        ("3;3;2-4", [2, 3, 4]),
        (-1, [5]),
        ([5, 0, -1], [0, 5]),
    ],
)
def test_ranges_by_eye(spec, expected):
    assert resolve_layers(spec, 6, "layers") == expected


# PEFT's name for `layers`.


@pytest.mark.parametrize("value", [0, [0, 2], (2, 0), {1}, range(2), [-1]])
def test_layers_to_transform_is_layers(value):
    config = LoReftConfig(layers_to_transform=value)
    assert config == LoReftConfig(layers=value)
    assert LoReftConfig(layers=value, layers_to_transform=value) == config


def test_layers_to_transform_may_be_empty_as_in_peft():
    assert LoReftConfig(layers_to_transform=[]) == LoReftConfig()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(layers=[0], layers_to_transform=[1]), r"layers=\[0\] and layers_to_transform=\[1\] name one thing"),
        (dict(layers="0-3", layers_to_transform=[1]), r"layers='0-3' and layers_to_transform=\[1\]"),
        (dict(layers_to_transform=["a"]), r"layers_to_transform=\['a'\]"),
        (dict(layers_to_transform=1.5), r"layers_to_transform=1\.5"),
        (dict(layers_pattern="layers"), "layers_pattern='layers' needs target_modules"),
        (dict(layers_to_transform=[0], layers_pattern="h"), "layers_pattern='h' needs target_modules"),
        (dict(target_modules=["mlp"], layers_pattern="layers"), "layers_pattern='layers' needs layers_to_transform"),
        (dict(target_modules=".*mlp", layers_to_transform=[0]), r"target_modules='\.\*mlp'.*Give a list of names"),
        (dict(target_modules="all-linear", layers_to_transform=[0]), "target_modules='all-linear'"),
        (dict(target_modules=["mlp"], layers_to_transform=[-1]), r"layers_to_transform=\[-1\].*from 0"),
        (dict(target_modules=["mlp"], layers_to_transform="0-2"), r"layers_to_transform='0-2'.*from 0"),
        (dict(target_modules=["mlp"], layers=[0], layers_to_transform=[0]), "cannot be combined with"),
    ],
    ids=readable,
)
def test_layers_to_transform_that_says_nothing_clear(fields, words):
    with pytest.raises(ValueError, match=words):
        LoReftConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        (dict(layers_to_transform=[0, -1]), ["model.layers.0", "model.layers.2"]),
        (dict(layers_to_transform=1, component="mlp"), ["model.layers.1.mlp"]),
        (
            dict(target_modules=["mlp", "q_proj"], layers_to_transform=[2]),
            ["model.layers.2.mlp", "model.layers.2.self_attn.q_proj"],
        ),
        (
            dict(target_modules=["mlp"], layers_to_transform=[1, 2], layers_pattern="layers"),
            ["model.layers.1.mlp", "model.layers.2.mlp"],
        ),
    ],
    ids=readable,
)
def test_what_layers_to_transform_edits(fields, names, tmp_path):
    model = get_peft_model(build("llama"), LoReftConfig(task_type="CAUSAL_LM", r=2, **fields))
    assert sorted(model.targeted_module_names) == names
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert sorted(again.targeted_module_names) == names
