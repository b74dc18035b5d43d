"""The factors that layers compute with, computed together for all layers and kept."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from ..edits.factors import Factors
from ..edits.intervention import Intervention, factors_of


@runtime_checkable
class HoldsWeights(Protocol):
    """A layer, as far as the cache has to know it."""

    def weights_of(self, adapter_names: Sequence[str] | None) -> Iterator[Intervention]:
        """The interventions that edit in a forward with these `adapter_names`; None: those of the active adapters."""


class FactorsCache:
    """Factors of the layers of one model: for one forward, or for all steps of one call of `generate`.

    One decomposition of many stacked matrices costs hardly more than one of a single R. So the first layer that asks
    has the factors of all layers computed.

    A part of a model may run without gradients first, and again with them. So there are two sets of factors: those
    that autograd follows to the parameters, and those that it does not.

    Args:
        layers: of the model; a list that grows and shrinks with it.
    """

    def __init__(self, layers: Sequence[HoldsWeights]) -> None:
        self._layers = layers
        self._trained: dict[int, Factors] = {}
        """Factors that autograd follows, by the id of the intervention."""
        self._fixed: dict[int, Factors] = {}
        """Factors that it does not follow, likewise."""

    def known(self, weights: Intervention, trains: bool) -> Factors | None:
        """The factors of `weights`, if they have been computed.

        Args:
            weights: of the layer that asks.
            trains: `weights.trains`.
        """
        return (self._trained if trains else self._fixed).get(id(weights))

    def compute(self, weights: Intervention, trains: bool, adapter_names: Sequence[str] | None) -> Factors:
        """The factors of `weights`; those of all interventions like it are computed with them and kept.

        Args:
            weights: of the layer that asks.
            trains: `weights.trains`.
            adapter_names: names given to the forward, one for each row, or None.
        """
        alike: dict[Hashable, dict[int, Intervention]] = {}
        for layer in self._layers:
            for each in layer.weights_of(adapter_names):
                alike.setdefault(each.signature, {})[id(each)] = each  # by id: with tie="model" layers share one
        for group in alike.values():
            if id(weights) in group:
                kept = self._trained if trains else self._fixed
                kept.update(zip(group, factors_of(list(group.values()))))
                return kept[id(weights)]
        return weights.current_factors()
