"""`LoReftConfig`: the fields, their checks, and how they are saved. All that is saved is a dataclass field."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field
from typing import Any, ClassVar, Literal, get_args

from peft import PeftConfig, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .card import write_model_card
from .edits.families import ACTIVATIONS
from .edits.formulas import INTERVENTIONS
from .files import check_weights_file
from .positions.index import Sharing
from .positions.layers import check_layers, first_layer, resolve_layers
from .positions.layout import Layout
from .positions.marks import check_template
from .positions.spec import Positions, union
from .runtime_config import LoReftRuntimeConfig

COMPONENTS = ("block", "attention", "mlp", "heads")
Tie = Literal["position", "group", "layer", "model"]
DEFAULT_R = 8


def _by_layer(mapping: dict[Any, Any], field: str, what: str) -> dict[str, Any]:
    """Return a mapping from layers with its keys checked, as strings, in the order of the layers."""
    if not mapping:
        raise ValueError(f"{field}={{}}: a mapping from layers to {what} needs at least one entry.")
    for layers in mapping:
        if not isinstance(layers, str | int):
            raise ValueError(f"{field} has the key {layers!r}: expected layers such as '3', '-1' or '0-7'.")
        check_layers(layers, field)
    # JSON sorts the keys as strings. The order must not depend on it: slots of `intervention_positions` would move.
    ordered = sorted(mapping.items(), key=lambda item: first_layer(item[0]))
    return {str(layers): value for layers, value in ordered}


def _resolve(mapping: dict[str, Any], n_layers: int, field: str) -> dict[int, Any]:
    """Return the value of each layer that `mapping` names, in order. Raises ValueError if a layer has two."""
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
    """Configuration of LoReFT (https://arxiv.org/abs/2404.03592) and its family.

    LoReFT edits hidden states. `positions` says at which tokens, `layers` and `component` behind which modules,
    `intervention` by which formula, `tie` which edits share weights. The defaults are the paper's setting for
    commonsense reasoning.

    Args:
        r: Rank of the edited subspace, from 1 to the hidden size. A mapping from layers to ranks gives each layer its
            own: `{"0-11": 4, "12-": 8}`. The formulas `"red"` and `"bias"` have no rank; leave `r` out with them.
        positions: Which tokens are edited: one or more groups, joined by `+`. The groups are

            - `fN`: the first N tokens of the prompt;
            - `lN`: the last N tokens of the prompt; `lN~K`: the N before the last K;
            - `p`: the whole prompt;
            - `gN`: the first N generated tokens; `g`: all generated tokens;
            - `all`: prompt and generated tokens, `p+g`.

            `"f7+l7"` is the first 7 and the last 7 tokens of the prompt. In a chat, `fN` is taken once, at its
            beginning, `lN` before every answer, and `gN` in every answer. If a prompt of L tokens is too short for its
            `fN` and `lN`, they are cut to at most ⌊L/2⌋ and ⌈L/2⌉ tokens, so that they never meet. A mapping from
            layers to specs gives each layer its own: `{"0-11": "f5", "12-": "l5"}`.
        layers: Which blocks of the model: `"all"`; a list of ints, of which negative ones count from the end; or
            ranges such as `"0-7;16;-1"`.
        component: What of a block is edited: `"block"`, the residual stream behind the block; `"attention"`, the
            output of its attention; `"mlp"`, the output of its MLP; or `"heads"`, the outputs of its attention's
            heads, each by itself, before the attention's output projection mixes them. The input of that projection
            is one hidden state of size H·d for H heads of size d, and h in the formula is a head's slice of it. So
            every head has an edit of its own, of rank r, and r is at most d. `"bias"` is then the offset that LoFiT
            (arXiv 2406.01563) adds, for all heads of the layers; `"red"` is JoLA's (arXiv 2502.01179) without its
            gates. Neither's choice of heads is here.
        intervention: The formula of an edit: `"loreft"`, `"noreft"`, `"direft"`, `"nodireft"`, `"consreft"`,
            `"lobireft"`, `"red"` (scales and shifts), `"bias"`, or `"interchange"` (see `peft_reft.interchange`).
        act_fn: The activation f on the projected value, f(Wh + b), by transformers' name for it, such as `"relu"`.
            None: no activation. Only `"loreft"`, `"noreft"`, `"direft"` and `"nodireft"` have an f.
        gate: Whether tanh(v·h + c) multiplies the edit. v and c are learned and 0 at the start. Not with
            `"interchange"` and `component="heads"`.
        tie: What shares the weights of one edit, from narrow to wide: `"position"`, nothing (each position has its own
            edit: the paper's untied formula; every group needs a count then); `"group"`, all positions of one group
            (the authors' code with `share_weights=False`); `"layer"`, all positions of one layer (the paper's tied
            formula); `"model"`, all positions of all layers.
        dropout: Probability, from 0 to below 1, of dropping each element of the edit in training.
        init_weights: How weights start. `True`: the edit is 0, so the model is unchanged. There are exceptions without
            `gate`: `"consreft"` begins by setting its subspace to 0, and `"loreft"` and `"direft"` with `act_fn` begin
            as with `"paper"`. `"paper"`: as in the authors' code. `False`: random, for tests.
        response_template: Marks of the chat template: the headers behind which an answer begins, such as
            `<|im_start|>assistant\\n`, each a list of token ids. With them, token ids alone say where prompts end.
            Trainers find them from the tokenizer, as `peft_reft.chat_marks(tokenizer)` does. None: not known. `[]`:
            each document is one prompt and one answer.
        instruction_template: The headers at which an answer has ended, in the same form: those of user, tool and
            system. Without `response_template` it has no effect.
        target_modules: Names of the modules whose output is edited, or a regex that matches them, as for any PEFT
            method; `"all-linear"`: all linear maps but the output head. Instead of `layers` and `component`. A mapping
            in `positions` or `r` then counts layers among the modules that match.
        layers_to_transform: Without `target_modules`: PEFT's name for `layers`, which takes its value. With
            `target_modules`, as in `LoraConfig`: the layers whose modules are edited, by the number in their names.
        layers_pattern: As in `LoraConfig`, the name of the list that numbers the layers. Only with `target_modules`
            and `layers_to_transform`.
        exclude_modules: Names of modules that are not edited, or a regex that matches them.
        modules_to_save: Modules that are trained and saved besides the edits, such as a classifier head.
        target_parameters: Not supported; leave it empty. It is no field, since PEFT takes such a field for a sign that
            parameters can be targeted. But it may be given and read: PEFT and TRL read it, and older files have it.
        trainable_token_indices: Token embeddings that are trained besides the edits, as in `LoraConfig`.
        runtime_config: How the adapter is run on this machine; not saved. See `LoReftRuntimeConfig`.

    Raises:
        ValueError: a field has a value that no model could use, or that another field excludes. The message names the
            field, the value and what is allowed. What depends on the model (a layer or a rank out of range) raises
            when the adapter is added to the model.

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
    component: Literal["block", "attention", "mlp", "heads"] = field(
        default="block", metadata={"help": "Whose output is edited: 'block', 'attention', 'mlp'; or each of 'heads'."}
    )
    intervention: str = field(default="loreft", metadata={"help": f"The formula, one of {', '.join(INTERVENTIONS)}."})
    act_fn: str | None = field(default=None, metadata={"help": "Activation of Wh + b, such as 'relu'."})
    gate: bool = field(default=False, metadata={"help": "Whether a learned gate multiplies the edit."})
    tie: Tie = field(default="layer", metadata={"help": "What shares the weights of one edit."})
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
        default=None, metadata={"help": "Modules to train and save besides the edits."}
    )
    target_parameters: InitVar = None  # type: ignore[type-arg]  # Python 3.10 finds no hints of a class with more
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token embeddings to train besides the edits."}
    )
    runtime_config: LoReftRuntimeConfig = field(
        default_factory=LoReftRuntimeConfig, metadata={"help": "How the adapter is run on this machine; not saved."}
    )

    has_answers: ClassVar[bool | None] = None
    """Whether rows of the model hold prompt and answer. Not saved: the tuner notes it when it adds the adapter."""
    chosen_modules: ClassVar[set[str] | None] = None
    """Names of the modules to edit. Not saved: the tuner notes them when it adds the adapter."""

    def __post_init__(self, target_parameters: list[str] | None) -> None:
        super().__post_init__()
        self.peft_type = PeftType("LOREFT")
        for name in ("layers", "layers_to_transform"):
            value = getattr(self, name)
            if isinstance(value, tuple | set | frozenset | range):
                setattr(self, name, sorted(value))
        self._read_layers_to_transform()
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
        if self.instruction_template and not self.response_template:
            raise ValueError(
                f"instruction_template={self.instruction_template!r} says where answers end, but "
                f"response_template={self.response_template!r} names no header behind which one begins. Give both, or "
                "neither; `peft_reft.chat_marks(tokenizer)` finds both."
            )
        self._check_r()
        self._check_positions()
        self._check_targets(target_parameters)
        if not isinstance(self.runtime_config, LoReftRuntimeConfig):
            raise ValueError(f"runtime_config={self.runtime_config!r}: expected a LoReftRuntimeConfig.")

    def _read_layers_to_transform(self) -> None:
        """Move `layers_to_transform` to `layers`; with `target_modules`, leave it for PEFT to match."""
        if self.layers_to_transform == []:
            self.layers_to_transform = None
        if self.target_modules is not None:
            self._check_layers_of_target_modules()
            return
        if self.layers_pattern:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} needs target_modules: without them blocks are found by "
                "rule, in whatever list they are. Leave it out, or name modules with `target_modules`."
            )
        chosen = self.layers_to_transform
        if chosen is None:
            return
        check_layers(chosen, "layers_to_transform")
        is_same = self.layers == chosen or self.layers == [chosen] or [self.layers] == chosen
        if self.layers != "all" and not is_same:
            raise ValueError(
                f"layers={self.layers!r} and layers_to_transform={chosen!r} name one thing and differ. Give one."
            )
        self.layers = chosen
        self.layers_to_transform = None

    def _check_layers_of_target_modules(self) -> None:
        chosen = self.layers_to_transform
        if chosen is None:
            if self.layers_pattern:
                raise ValueError(
                    f"layers_pattern={self.layers_pattern!r} needs layers_to_transform, the layers' numbers."
                )
            return
        if isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform={chosen!r} cannot be combined with target_modules={self.target_modules!r}: a "
                "string is matched as it is. Give a list of names."
            )
        if isinstance(chosen, str) or min([chosen] if isinstance(chosen, int) else chosen) < 0:
            raise ValueError(
                f"layers_to_transform={chosen!r}: with target_modules PEFT matches the numbers in modules' names. "
                "Expected an int, or a list of ints, from 0."
            )

    def _check_targets(self, target_parameters: list[str] | None) -> None:
        if target_parameters:
            raise ValueError(
                f"target_parameters={target_parameters!r} is not supported: LoReFT edits the outputs of modules, "
                "not parameters. Use `target_modules`, or `layers` and `component`."
            )
        if self.target_modules is not None and (self.layers != "all" or self.component != "block"):
            raise ValueError(
                f"target_modules={self.target_modules!r} names the modules itself; it cannot be combined with "
                f"layers={self.layers!r} and component={self.component!r}. Give one or the other."
            )

    def _check_choice(self, name: str, allowed: tuple[Any, ...]) -> None:
        """Check that a field has one of the values `allowed`: strings by value, others by identity (1 is not True)."""
        value = getattr(self, name)
        for choice in allowed:
            if value is choice or (isinstance(choice, str) and value == choice):
                return
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
        if self.gate and self.component == "heads":
            raise ValueError("gate=True: component='heads' has no gate (allowed with a gate: the other components).")

    def _check_r(self) -> None:
        if isinstance(self.r, dict):
            self.r = _by_layer(self.r, "r", "ranks")
        ranks = list(self.r.values()) if isinstance(self.r, dict) else [self.r]
        for r in ranks:
            if type(r) is not int or r < 1:
                raise ValueError(f"r={self.r!r}: expected an int from 1 to the model's hidden size, or a mapping.")
        if not INTERVENTIONS[self.intervention].has_rank and self.r != DEFAULT_R:
            raise ValueError(f"r={self.r!r}: intervention={self.intervention!r} has no rank. Leave r out.")
        if self.tie == "model" and len(set(ranks)) > 1:
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
        """The distinct specs of `positions`, parsed, in the order of the layers."""
        texts = self.positions.values() if isinstance(self.positions, dict) else [self.positions]
        return list(dict.fromkeys(Positions.parse(text) for text in texts))

    @property
    def layout(self) -> Layout:
        """The groups of all specs, each once: the order of the slots in `intervention_positions`."""
        return union(self.specs)

    @property
    def sharing(self) -> Sharing:
        """Which positions of one layer share weights. `tie="model"` shares them among layers besides."""
        return self.tie if self.tie in ("group", "position") else "all"

    @property
    def edits_everything(self) -> bool:
        """Whether every layer edits all tokens of prompt and answer, and with the same weights."""
        return self.sharing == "all" and all(spec.groups.edits_every_token for spec in self.specs)

    def positions_by_layer(self, n_layers: int) -> dict[int, Positions]:
        """Return the spec of each layer to edit, in a model of `n_layers` blocks.

        Raises:
            ValueError: a layer is out of range, has two specs, or is chosen by `layers` but has no spec.
        """
        chosen = resolve_layers(self.layers, n_layers, "layers")
        if isinstance(self.positions, str):
            return dict.fromkeys(chosen, Positions.parse(self.positions))
        specs = _resolve(self.positions, n_layers, "positions")
        by_layer = {layer: Positions.parse(spec) for layer, spec in specs.items()}
        if self.layers == "all":
            return by_layer
        missing = [layer for layer in chosen if layer not in by_layer]
        if missing:
            raise ValueError(
                f"layers={self.layers!r} has {missing}, but positions={self.positions!r} has no spec there."
            )
        return {layer: by_layer[layer] for layer in chosen}

    def ranks(self, edited: Iterable[int], n_layers: int) -> dict[int, int | None]:
        """Return the rank of each layer in `edited`, in a model of `n_layers` blocks; None if the formula has no rank.

        Raises:
            ValueError: a layer is out of range, has two ranks, or is edited but has no rank.
        """
        if isinstance(self.r, int):
            return dict.fromkeys(edited, self.r if INTERVENTIONS[self.intervention].has_rank else None)
        edited = list(edited)
        by_layer = _resolve(self.r, n_layers, "r")
        missing = [layer for layer in edited if layer not in by_layer]
        if missing:
            raise ValueError(f"r={self.r!r} has no rank for layers {missing}, which are edited.")
        return {layer: by_layer[layer] for layer in edited}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> LoReftConfig:
        """Load the config from a folder or the Hub.

        Raises:
            ValueError: the config, or the weights beside it, are damaged or cannot be used; it names the file.
        """
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        path = os.path.join(folder, CONFIG_NAME)
        try:
            config: LoReftConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        except (ValueError, TypeError, KeyError) as error:  # of the JSON reader, of PEFT, or of a field
            if not os.path.isfile(path):
                raise
            raise ValueError(f"{path} cannot be used: {error}") from error
        check_weights_file(folder)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types, without `runtime_config`, as LoRA does.

        Sets become sorted lists: the order of a set varies between runs.
        """
        as_json = {}
        for name, value in super().to_dict().items():
            if name == "runtime_config":
                continue
            as_json[name] = sorted(value) if isinstance(value, set) else value
        return as_json

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save `adapter_config.json`. If weights are saved beside it, complete the model card, too (see `card`)."""
        super().save_pretrained(save_directory, **kwargs)
        if os.path.isfile(os.path.join(save_directory, SAFETENSORS_WEIGHTS_NAME)):
            write_model_card(save_directory, self)
