"""Interchange interventions and distributed alignment search (DAS), with the same layers and hooks as all adapters.

``DII(b, s, R) = b + Rᵀ(Rs − Rb)`` (arXiv 2404.03592, eq. 1; arXiv 2303.02536). b is a hidden state of the run on one
input, the base run; s is the one of the run on another input, the source run. The part of b in the subspace of R is
set to what it is in s. If the output then is the one that a causal model gives after the same exchange of a variable,
the subspace holds that variable. DAS learns R by gradient.

The intervention is an adapter (`LoReftConfig(intervention="interchange", ...)`), trained, saved and loaded like any
other. Without a source run it does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..edits.formulas import Interchange
from ..positions.resolve import IGNORED
from ..positions.sources import check_subspaces
from ..tuner.exchange import SourceRun
from ..tuner.forward import ATTRIBUTE, Attachment
from ..tuner.layer import LoReftLayer


@contextmanager
def interchange(model: nn.Module, source: Mapping[str, Any], subspaces: Any = None) -> Iterator[None]:
    """Run `model` on `source`. Inside the context its forwards, and `generate`, take their subspace from that run.

    Nested contexts can take different subspaces from different source runs. The source run itself has no interchanges
    and no gradients.

    Args:
        model: with an active adapter of `intervention="interchange"`.
        source: inputs of the source run, a row for each row of the base run. Positions are found in them as in any
            forward, by the adapter's spec or `intervention_positions`. The k-th slot of the source run goes to the
            k-th slot of the base run, so both must have equally many.
        subspaces: which rows of R are exchanged. Ints hold for all rows of the batch; a list of lists, or a tensor
            (batch, n) with −1 for none, gives those of each row. None: those given to the forward, or all.

    Raises:
        ValueError: no interchange intervention is active; or, in a forward, source run and base run do not have
            equally many positions.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from peft_reft import LoReftConfig, interchange
        >>> sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).eval()
        >>> config = LoReftConfig(intervention="interchange", r=32, layers=[1], positions="l1", task_type="CAUSAL_LM")
        >>> model = get_peft_model(base, config).eval()
        >>> one, other = (dict(input_ids=torch.randint(100, (1, 6))) for _ in range(2))
        >>> with interchange(model, source=other):
        ...     logits = model(**one).logits[0, -1]
        >>> torch.allclose(logits, model(**other).logits[0, -1], atol=1e-5)  # r = 32 exchanges all of the last layer
        True
    """
    attachments = _attachments(model)
    layers = [module for module in model.modules() if isinstance(module, LoReftLayer)]
    if not any(isinstance(weights, Interchange) for layer in layers for weights in layer.weights_of(None)):
        raise ValueError("The model has no active adapter with intervention='interchange'.")
    runs = [SourceRun(check_subspaces(subspaces)) for _ in attachments]
    for attachment, run in zip(attachments, runs):
        attachment.source_runs.append(run)
    try:
        with torch.no_grad():
            model(**source)
        for run in runs:
            run.collecting = False
        yield
    finally:
        for attachment, run in zip(attachments, runs):
            attachment.source_runs.remove(run)


def _attachments(model: nn.Module) -> list[Attachment]:
    """Return the attachment of the model; of an encoder-decoder also the one of its decoder."""
    for module in model.modules():
        if ATTRIBUTE in module.__dict__:
            found: Attachment = module.__dict__[ATTRIBUTE]
            return [found] if found.decoder is None else [found, found.decoder]
    raise ValueError(f"{type(model).__name__} has no LoReFT adapter.")


def interchange_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Compute the share of rows that have the counterfactual output.

    Args:
        logits: (batch, classes) of a classifier, or (batch, seq, vocabulary) of a causal language model.
        labels: int64, the counterfactual answer of the causal model: (batch,) classes; or (batch, seq) tokens with
            −100 for no label, as in training, so that the logits of a token are compared with the label of the next.

    Returns:
        From 0 to 1. A row with several labels counts if all of them are right. A row without labels is left out.

    Examples:
        >>> import torch
        >>> from peft_reft import interchange_accuracy
        >>> interchange_accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
        0.5
    """
    predicted = logits.argmax(-1)  # (batch,) or (batch, seq)
    if labels.ndim == 1:
        return (predicted == labels).float().mean().item()
    labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # (batch, seq): of the next token
    right = (predicted == labels) | (labels == IGNORED)  # (batch, seq)
    has_labels = (labels != IGNORED).any(1)  # (batch,)
    return right.all(1)[has_labels].float().mean().item()
