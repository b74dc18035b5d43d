"""Folders that `pyreft` saves, and the logits it computes with them, for tests/test_convert.py.

In an environment of its own, which this package is not part of:

    pip install torch transformers==4.45.1 pyvene==0.1.8 && pip install --no-deps pyreft==0.1.0
    python tests/parity/make_pyreft.py
"""

import shutil
from pathlib import Path

import pyreft
import torch
from pyreft.dataset import get_intervention_locations
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaForCausalLM

HERE = Path(__file__).parent
NUMBERS = load_file(HERE / "end_to_end.safetensors")
PROMPTS = [8, 6, 5]
CASES = {
    "loreft_relu": dict(kind="Loreft", act_fn="relu"),
    "loreft_ranks": dict(kind="Loreft", ranks={0: 2, 2: 5}),
    "loreft_mlp": dict(kind="Loreft", component="mlp_output"),
    "loreft_attention_untied": dict(kind="Loreft", component="attention_output", tied=False),
    "loreft_by_path": dict(kind="Loreft", component="model.layers[{}].output"),
    "loreft_by_path_inside": dict(kind="Loreft", component="model.layers[{}].mlp.down_proj.output"),
    "noreft": dict(kind="Noreft", add_bias=False),
    "noreft_untied_bias": dict(kind="Noreft", add_bias=True, tied=False),
    "noreft_relu_bias": dict(kind="Noreft", add_bias=True, act_fn="relu"),
    "nodireft_bias": dict(kind="Nodireft", add_bias=True),
    "nodireft_untied_relu": dict(kind="Nodireft", add_bias=False, act_fn="relu", tied=False),
    "consreft": dict(kind="Consreft"),
    "consreft_untied": dict(kind="Consreft", tied=False),
    "lobireft": dict(kind="Lobireft"),
    "lobireft_untied": dict(kind="Lobireft", tied=False),
    "direft_untied_relu": dict(kind="Direft", tied=False, act_fn="relu"),
    "classifier": dict(kind="Loreft", head=True),
}


def build(kind, component="block_output", tied=True, ranks=None, head=False, **kwargs):
    torch.manual_seed(0)
    if head:
        config = AutoConfig.from_pretrained(HERE / "llama", num_labels=3, pad_token_id=0)
        model = AutoModelForSequenceClassification.from_config(config)
        trunk = LlamaForCausalLM.from_pretrained(HERE / "llama").model.state_dict()
        model.model.load_state_dict(trunk)
    else:
        model = LlamaForCausalLM.from_pretrained(HERE / "llama")
    places = [
        {
            "layer": layer,
            "component": component.format(layer),
            "low_rank_dimension": rank,
            "intervention": getattr(pyreft, f"{kind}Intervention")(
                embed_dim=32,
                low_rank_dimension=rank,
                dtype=torch.float32,
                **kwargs,
            ),
        }
        for _ in range(1 if tied else 2)
        for layer, rank in (ranks or {0: 4, 2: 4}).items()
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=places), disable_model_grads=not head)
    if head:
        model.score.requires_grad_()
    with torch.no_grad():  # away from the start, where half of what is stored is 1 or 0
        for intervention in reft.interventions.values():
            for name, parameter in intervention.named_parameters():
                parameter.add_(
                    torch.randn_like(parameter).tril(-1) if "original" in name else 0.3 * torch.randn_like(parameter)
                )
    reft.eval()
    return reft, len(places)


def locations(number, tied):
    each = [
        get_intervention_locations(
            last_position=length, positions="f2+l2", num_interventions=number, share_weights=tied, pad_mode="last"
        )
        for length in PROMPTS
    ]
    return torch.tensor(each).permute(1, 0, 2).tolist()


logits = {}
for name, case in CASES.items():
    reft, number = build(**case)
    where = locations(number, case.get("tied", True))
    with torch.no_grad():
        _, out = reft(
            {"input_ids": NUMBERS["input_ids"], "attention_mask": NUMBERS["attention_mask"]},
            unit_locations={"sources->base": (None, where)},
        )
    logits[name] = out.logits.contiguous()
    folder = HERE / "pyreft" / name
    shutil.rmtree(folder, ignore_errors=True)
    reft.save(str(folder), include_model=case.get("head", False))
save_file(logits, HERE / "pyreft" / "logits.safetensors")
