"""The methods that experiments compare on reasoning, where LoReFT trails LoRA in the paper, each under a name.

What a name begins with says which fields follow: "loreft", of `LoReftConfig`; "lora" and "dora", of `LoraConfig`;
"joint", of both, {"loreft": ..., "lora": ...}. On SmolLM2-135M "lora" (rank 8) has 1,658,880 parameters.
"""

from typing import Any

PAPER: dict[str, Any] = dict(r=8, positions="f7+l7")
MAPS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
"""The linear maps that LLM-Adapters and the paper put LoRA into."""
STEERING: dict[str, Any] = dict(r=4, intervention="nodireft", act_fn="silu", positions="all")

METHODS: dict[str, dict[str, Any]] = {
    "loreft": PAPER,
    "loreft, decoding too": {**PAPER, "positions": "f7+l7+g"},
    # The paper's formula at every token, with a twelfth of LoRA's parameters.
    "loreft, everywhere": dict(r=4, positions="all"),
    "loreft, shared by layers": {**PAPER, "tie": "model"},
    # arXiv 2603.00425, post-block steering: W2ᵀ silu(W1 h + b) behind every block, at every token. `init_weights=True`
    # starts W2, its W_up, at 0 and W1 as `nn.Linear` does.
    "loreft, post-block": STEERING,
    # The same without the nonlinearity: W2ᵀ (W1 h + b), which starts with W1 at 0 instead.
    "loreft, post-block, linear": {**STEERING, "act_fn": None},
    # arXiv 2511.10707, BREP: scale and shift the prompt and the first tokens of the answer. Its limit on the shift's
    # size and its training on the beginnings of answers are not here.
    "loreft, brep": dict(intervention="red", positions="p+g64"),
    "loreft, bias everywhere": dict(intervention="bias", positions="all"),
    # Each attention head's output by itself: an edit of rank 1; arXiv 2406.01563, LoFiT's offset; arXiv 2502.01179,
    # JoLA's scale and offset. Neither's choice of heads is here.
    "loreft, heads": dict(r=1, component="heads", positions="all"),
    "loreft, heads, bias": dict(intervention="bias", component="heads", positions="all"),
    "loreft, heads, red": dict(intervention="red", component="heads", positions="all"),
    "lora": dict(r=8, lora_alpha=16, target_modules=MAPS),
    "lora, r=1": dict(r=1, lora_alpha=2, target_modules=MAPS),
    # LoRA with less than a tenth of the parameters that "lora" has.
    "lora, r=1, three maps": dict(r=1, lora_alpha=2, target_modules=["v_proj", "up_proj", "down_proj"]),
    "dora": dict(r=8, lora_alpha=16, target_modules=MAPS, use_dora=True),
    # arXiv 2603.00425, joint: steering and LoRA in one training, kept apart in the residual stream (`joint.py`).
    "joint": {"loreft": STEERING, "lora": dict(r=1, lora_alpha=2, target_modules=MAPS)},
    # The same with less than a tenth of the parameters that "lora" has.
    "joint, r=1, two maps": {
        "loreft": {**STEERING, "r": 1},
        "lora": dict(r=1, lora_alpha=2, target_modules=["up_proj", "down_proj"]),
    },
}

SUFFIXES: dict[str, dict[str, Any]] = {
    "loreft, l7": {**PAPER, "positions": "l7"},
    "loreft, l14": {**PAPER, "positions": "l14"},
    "loreft, l7+g": {**PAPER, "positions": "l7+g"},
}
"""Edits that leave the beginning of a prompt to the base: half the training, and one prefix cache for all."""
