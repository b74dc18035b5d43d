"""What is timed: a model, a batch, a training step. Nothing here imports `peft_reft`."""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


def build(sizes: Mapping[str, int], device: str = "cpu", dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A frozen model with random weights, made on its device in its type. Speed does not depend on the values."""
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**sizes)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(usual)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def batch(rows: int, length: int, prompt: int, vocab_size: int = SMOLLM2["vocab_size"]) -> dict[str, torch.Tensor]:
    """`rows` prompts of `prompt` tokens, each with an answer; all three tensors have the shape (rows, length)."""
    ids = torch.randint(3, vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def batch_of(base: nn.Module, rows: int, length: int, prompt: int) -> dict[str, torch.Tensor]:
    """`batch` with the vocabulary of a model, on its device."""
    inputs = batch(rows, length, prompt, base.config.vocab_size)
    return {name: tensor.to(base.device) for name, tensor in inputs.items()}


def prompts(rows: int, length: int, vocab_size: int = SMOLLM2["vocab_size"]) -> dict[str, torch.Tensor]:
    """`rows` prompts of `length` tokens, without labels."""
    inputs = batch(rows, length, length, vocab_size)
    del inputs["labels"]
    return inputs


def leave_identity(model: nn.Module) -> nn.Module:
    """Move the trainable weights off their start, at which a method might have nothing to do. R stays orthonormal."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.endswith(".R"):
                parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def training_step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A training step: forward, backward and AdamW."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5) if weights else None
    model.train()

    def run() -> None:
        model(**inputs).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run
