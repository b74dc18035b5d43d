"""`LoReftConfig`: the fields, their checks, and how they are saved. Everything saved is a dataclass field."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from peft import PeftConfig, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .card import write_model_card
from .edits.families import ACTIVATIONS
from .edits.formulas import INTERVENTIONS
from .files import check_weights_file
from .positions.layers import check_layers, first_layer, resolve_layers
from .positions.marks import check_template
from .positions.spec import Layout, Positions, union

COMPONENTS = ("block", "attention", "mlp")
Tie = Literal["position", "group", "layer", "model"]
DEFAULT_R = 8


def _by_layer(mapping: dict[Any, Any], field: str, what: str) -> dict[str, Any]:
    """A mapping from layers, its keys checked and in order."""
    if not mapping:
        raise ValueError(f"{field}={{}}: a mapping from layers to {what} needs at least one entry.")
    for layers in mapping:
        if not isinstance(layers, str | int):
            raise ValueError(f"{field} has the key {layers!r}: expected layers such as '3', '-1' or '0-7'.")
        check_layers(layers, field)
    # JSON has strings for keys and sorts them. Slots of `intervention_positions` must not move by that.
    ordered = sorted(mapping.items(), key=lambda item: first_layer(item[0]))
    return {str(layers): value for layers, value in ordered}


def _resolve(mapping: dict[str, Any], n_layers: int, field: str) -> dict[int, Any]:
    """The value of each layer that `mapping` names, in order; ValueError if one has two."""
    values: dict[int, Any] = {}
    for layers, value in mapping.items():
        for layer in resolve_layers(layers, n_layers, field):
            if layer in values:
                what = "specs" if field == "positions" else "ranks"
                raise ValueError(f"{field}={mapping!r} gives layer {layer} two {what}.")
            values[layer] = value
    return dict(sorted(values.items()))


@dataclass
class LoReftConfig(PeftConfig):
    """Configuration of LoReFT (arXiv 2404.03592) and its family.

    The defaults are the paper's setting for commonsense reasoning, its best-tested one.

    Args:
        r: Rank of the edited subspace, 1 to the hidden size. A mapping from layers to ranks gives each layer its own:
            `{"0-11": 4, "12-": 8}`. The formulas `"red"` and `"bias"` have no rank; leave it as it is then.
        positions: Which tokens are edited, e.g. `"f7+l7"`: the first 7 and the last 7 of the prompt. Groups: `fN`,
            `lN` (first or last N prompt tokens), `lN~K` (N before the last K), `p` (the prompt), `gN`, `g` (generated
            tokens), `all`. A mapping from layers to specs gives each layer its own: `{"0-11": "f5", "12-": "l5"}`.
        layers: Which blocks: `"all"`, a list of ints (negative ones count from the end), or `"0-7;16;-1"`.
        component: Whose output is edited: `"block"` (the residual stream after the block), `"attention"` or `"mlp"`.
        intervention: The formula: `"loreft"`, `"noreft"`, `"direft"`, `"nodireft"`, `"consreft"`, `"lobireft"`,
            `"red"` (scaling and bias), `"bias"`, `"interchange"` (see `peft_reft.interchange`).
        act_fn: Activation f of the source, f(Wh + b), by transformers' name for it, such as `"relu"`; for `loreft`,
            `noreft`, `direft`, `nodireft`.
        gate: Whether the edit is multiplied by tanh(v·h + c), with v and c learned and 0 at the start.
        tie: The widest scope that shares one intervention: `"position"` (one for each position, the paper's untied
            formula), `"group"` (one for each group of the spec: the authors' code with `share_weights=False`),
            `"layer"` (the paper's tied), `"model"` (one for all layers).
        dropout: Probability of dropping each element of the edit, while training.
        init_weights: `True`: the model is unchanged at the start (not so, unless gated: `consreft`, which begins by
            zeroing its subspace, and `loreft` and `direft` with `act_fn`, which begin as in `"paper"`); `"paper"`: as
            the authors' code; `False`: random, for tests.
        response_template: Marks of the chat template: headers behind which an answer begins, such as
            `<|im_start|>assistant\\n`, each a list of token ids. With them, token ids alone say where prompts end.
            Trainers find them by the tokenizer; `peft_reft.chat_marks(tokenizer)` does, too. None: not known; `[]`:
            each document is one prompt and one answer.
        instruction_template: Headers at which an answer has ended, likewise: of user, tool, system.
        target_modules: Names of the modules to edit the output of, as for any PEFT method; instead of `layers` and
            `component`. With a mapping in `positions`, layers are then counted among the modules that match.
            `"all-linear"`: all linear maps but the output head.
        layers_to_transform: PEFT's name for `layers`, which takes its value. With `target_modules` as in `LoraConfig`:
            which layers' modules, by the number in their names.
        layers_pattern: Only with `target_modules` and `layers_to_transform`, as in `LoraConfig`: the name of the list
            that the layers are numbered in.
        exclude_modules: Names of modules to leave out.
        modules_to_save: Modules besides the interventions that are trained and saved, such as a classifier head.
        target_parameters: Not supported, must be left empty (PEFT and TRL read it).
        trainable_token_indices: Token embeddings to train besides the interventions, as in PEFT's `LoraConfig`.

    Raises:
        ValueError: a field has a value that no model could use; the message names the field and the value. What
            depends on the model (a layer or a rank out of range) raises when the adapter is added to it.

    Examples:
        >>> from peft_reft import LoReftConfig
        >>> config = LoReftConfig(task_type="CAUSAL_LM", r=4, positions="f5+l5", layers=[2, 5, -1])
        >>> config.peft_type.value
        'LOREFT'
    """

    r: int | dict[str, int] = field(
        default=DEFAULT_R, metadata={"help": "Rank of the edited subspace, or a mapping from layers to ranks."}
    )
    positions: str | dict[str, str] = field(
        default="f7+l7", metadata={"help": "Which tokens: a spec such as 'f7+l7', or a mapping from layers to specs."}
    )
    layers: str | int | list[int] = field(
        default="all", metadata={"help": "Which blocks: 'all', a list of ints, or ranges such as '0-7;16;-1'."}
    )
    component: Literal["block", "attention", "mlp"] = field(
        default="block", metadata={"help": "Whose output is edited: 'block', 'attention' or 'mlp'."}
    )
    intervention: str = field(default="loreft", metadata={"help": f"The formula, one of {', '.join(INTERVENTIONS)}."})
    act_fn: str | None = field(default=None, metadata={"help": "Activation of the source, such as 'relu'."})
    gate: bool = field(default=False, metadata={"help": "Whether a learned gate multiplies the edit."})
    tie: Tie = field(default="layer", metadata={"help": "The widest scope that shares one intervention."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the edit, while training."})
    init_weights: bool | Literal["paper"] = field(
        default=True, metadata={"help": "True (identity at the start), 'paper', or False (random, for tests)."}
    )
    response_template: list[list[int]] | None = field(
        default=None, metadata={"help": "Headers behind which an answer begins, as lists of token ids."}
    )
    instruction_template: list[list[int]] | None = field(
        default=None, metadata={"help": "Headers at which an answer has ended, as lists of token ids."}
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Module names or a regex, instead of `layers` and `component`."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "PEFT's name for `layers`; with `target_modules`, which layers' modules."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, for `layers_to_transform` and `target_modules`."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Module names or a regex of modules to leave out."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules besides the interventions to train and save."}
    )
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Not supported; leave empty."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token embeddings to train besides the interventions."}
    )

    has_answers: ClassVar[bool | None] = None
    """Whether rows of the model hold prompt and answer. Not saved: noted on the object when it is injected."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("LOREFT")
        for name in ("layers", "layers_to_transform"):
            if isinstance(value := getattr(self, name), tuple | set | frozenset | range):
                setattr(self, name, sorted(value))
        self._read_synonym()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                setattr(self, name, set(value))
        self._check_choice("component", COMPONENTS)
        self._check_choice("intervention", tuple(INTERVENTIONS))
        self._check_choice("tie", get_args(Tie))
        self._check_choice("init_weights", (True, False, "paper"))
        self._check_formula()
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: expected a number from 0 to below 1.")
        check_layers(self.layers, "layers")
        for name in ("response_template", "instruction_template"):
            setattr(self, name, check_template(getattr(self, name), name))
        self._check_r()
        self._check_positions()
        if self.target_parameters:
            raise ValueError(
                f"target_parameters={self.target_parameters!r} is not supported: LoReFT edits the outputs of modules, "
                "not parameters. Use `target_modules`, or `layers` and `component`."
            )
        if self.target_modules is not None and (self.layers != "all" or self.component != "block"):
            raise ValueError(
                f"target_modules={self.target_modules!r} names the modules itself; it cannot be combined with "
                f"layers={self.layers!r} and component={self.component!r}. Give one or the other."
            )

    def _read_synonym(self) -> None:
        """`layers_to_transform` names the blocks, or the layers of `target_modules`, which PEFT then matches."""
        chosen = self.layers_to_transform = None if self.layers_to_transform == [] else self.layers_to_transform
        if self.target_modules is None:
            if self.layers_pattern:
                raise ValueError(
                    f"layers_pattern={self.layers_pattern!r} needs target_modules: without them blocks are found by "
                    "rule, in whatever list they are. Leave it out, or name modules with `target_modules`."
                )
            if chosen is None:
                return
            check_layers(chosen, "layers_to_transform")
            if self.layers not in ("all", chosen, [chosen]) and [self.layers] != chosen:
                raise ValueError(
                    f"layers={self.layers!r} and layers_to_transform={chosen!r} name one thing and differ. Give one."
                )
            self.layers, self.layers_to_transform = chosen, None
        elif chosen is None:
            if self.layers_pattern:
                raise ValueError(
                    f"layers_pattern={self.layers_pattern!r} needs layers_to_transform, the layers' numbers."
                )
        elif isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform={chosen!r} cannot be combined with target_modules={self.target_modules!r}: a "
                "string is matched as it is. Give a list of names."
            )
        elif isinstance(chosen, str) or min([chosen] if isinstance(chosen, int) else chosen) < 0:
            raise ValueError(
                f"layers_to_transform={chosen!r}: with target_modules PEFT matches the numbers in modules' names. "
                "Expected an int, or a list of ints, from 0."
            )

    def _check_choice(self, name: str, allowed: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in allowed):
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}.")

    def _check_formula(self) -> None:
        formula = INTERVENTIONS[self.intervention]
        self._check_choice("gate", (True, False))
        self._check_choice("act_fn", (None, *ACTIVATIONS))
        if self.act_fn is not None and not formula.takes_act_fn:
            allowed = [name for name, each in INTERVENTIONS.items() if each.takes_act_fn]
            raise ValueError(
                f"act_fn={self.act_fn!r}: intervention={self.intervention!r} has no Wh + b for it to act on. "
                f"Allowed with it: {', '.join(map(repr, allowed))}."
            )
        if self.gate and self.intervention == "interchange":
            raise ValueError("gate=True: intervention='interchange' swaps hidden states and has no gate.")

    def _check_r(self) -> None:
        if isinstance(self.r, dict):
            self.r = _by_layer(self.r, "r", "ranks")
        for r in self.r.values() if isinstance(self.r, dict) else [self.r]:
            if type(r) is not int or r < 1:
                raise ValueError(f"r={self.r!r}: expected an int from 1 to the model's hidden size, or a mapping.")
        if not INTERVENTIONS[self.intervention].has_rank and self.r != DEFAULT_R:
            raise ValueError(f"r={self.r!r}: intervention={self.intervention!r} has no rank. Leave r out.")
        if self.tie == "model" and isinstance(self.r, dict) and len({*self.r.values()}) > 1:
            raise ValueError(f"r={self.r!r}: tie='model' shares one intervention, which has one rank.")

    def _check_positions(self) -> None:
        if isinstance(self.positions, dict):
            self.positions = _by_layer(self.positions, "positions", "specs")
        for spec in self.specs:
            if self.tie == "position" and not spec.counted:
                raise ValueError(
                    f"tie='position' needs a count for every group, but positions has the open-ended {str(spec)!r}. "
                    "Allowed with it: tie='group', 'layer' or 'model'."
                )
            if self.intervention == "interchange" and self.tie == "group" and not spec.counted:
                raise ValueError(
                    f"intervention='interchange' with tie='group' needs a count for every group, but positions has "
                    f"{str(spec)!r}. Allowed with it: tie='layer' or 'model'."
                )

    @property
    def specs(self) -> list[Positions]:
        """The distinct position specs, parsed, in the order of the layers."""
        texts = self.positions.values() if isinstance(self.positions, dict) else [self.positions]
        return list(dict.fromkeys(Positions.parse(text) for text in texts))

    @property
    def layout(self) -> Layout:
        """The groups of all specs, each once: how the slots of `intervention_positions` are laid out."""
        return union(self.specs)

    @property
    def edits_everything(self) -> bool:
        """Whether prompt and answer are edited alike in every layer, all of both."""
        alike = self.tie in ("layer", "model")
        return alike and all({"p", "g"} <= {g.kind for g in spec.groups if g.count is None} for spec in self.specs)

    def positions_by_layer(self, n_layers: int) -> dict[int, Positions]:
        """The spec of each layer to edit, in a model of `n_layers` blocks.

        Raises:
            ValueError: a layer is out of range, has two specs, or is chosen by `layers` but has none.
        """
        chosen = resolve_layers(self.layers, n_layers, "layers")
        if isinstance(self.positions, str):
            return dict.fromkeys(chosen, Positions.parse(self.positions))
        by_layer = {
            layer: Positions.parse(spec) for layer, spec in _resolve(self.positions, n_layers, "positions").items()
        }
        if self.layers == "all":
            return by_layer
        if missing := [layer for layer in chosen if layer not in by_layer]:
            raise ValueError(
                f"layers={self.layers!r} has {missing}, but positions={self.positions!r} has no spec there."
            )
        return {layer: by_layer[layer] for layer in chosen}

    def ranks(self, edited: Iterable[int], n_layers: int) -> dict[int, int | None]:
        """The rank of each of the layers `edited`, in a model of `n_layers` blocks; None without one.

        Raises:
            ValueError: a layer is out of range, has two ranks, or is edited but has none.
        """
        if isinstance(self.r, int):
            return dict.fromkeys(edited, self.r if INTERVENTIONS[self.intervention].has_rank else None)
        by_layer = _resolve(self.r, n_layers, "r")
        if missing := [layer for layer in edited if layer not in by_layer]:
            raise ValueError(f"r={self.r!r} has no rank for layers {missing}, which are edited.")
        return {layer: by_layer[layer] for layer in edited}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> LoReftConfig:
        """Load from a folder or the Hub.

        Raises:
            ValueError: the config, or the weights beside it, are damaged or cannot be used; names the file.
        """
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        path = os.path.join(folder, CONFIG_NAME)
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        except (ValueError, TypeError, KeyError) as error:  # of the JSON reader, of PEFT, or of a field
            if not os.path.isfile(path):
                raise
            raise ValueError(f"{path} cannot be used: {error}") from error
        check_weights_file(folder)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types: sets, in whose order chance has a part, become sorted lists."""
        return {name: sorted(v) if isinstance(v, set) else v for name, v in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save `adapter_config.json`; beside saved weights, also complete the model card (see `peft_reft.hub`)."""
        super().save_pretrained(save_directory, **kwargs)
        if os.path.isfile(os.path.join(save_directory, SAFETENSORS_WEIGHTS_NAME)):
            write_model_card(save_directory, self)
