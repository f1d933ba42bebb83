"""Weights that meet one and the same activation, as query, key and value do: what may be computed together."""

from __future__ import annotations

from collections import defaultdict

from lora2fx.dataflow.recording import Recording
from lora2fx.dataflow.weights import Use, Weights

Groups = tuple[tuple[str, ...], ...]
"""Names of weights, in the order in which a forward reads them."""
_FLATTENING = ("aten.view", "aten._unsafe_view")


def shared_inputs(weights: Weights) -> Groups:
    """The weights that the forward always multiplies with one tensor, several together; each in one group at most."""
    met = defaultdict[int, list[str]](list)
    for _, use in sorted(weights.uses.items()):
        met[_given(weights, use)].append(use.name)
    runs = {tuple(names) for names in met.values()}
    return tuple(sorted(run for run in runs if len(run) > 1 and _is_alone(run, runs)))


def _is_alone(run: tuple[str, ...], runs: set[tuple[str, ...]]) -> bool:
    """Whether its weights are met once each, and in no other company."""
    return len(set(run)) == len(run) and all(other == run or set(other).isdisjoint(run) for other in runs)


def _given(weights: Weights, use: Use) -> int:
    """The activation as the layer was given it: a product of matrices reads what only it sees flattened."""
    recording: Recording = weights.recording
    op = recording.producer(use.data)
    own = op is not None and op.name in _FLATTENING and len(weights.flow.consumers[use.data]) == 1
    return op.inputs[0] if op is not None and own else use.data
