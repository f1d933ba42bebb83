"""Where tokens come in, go out and are routed: embeddings, the language-model head, routers, convolutions."""

from __future__ import annotations

from collections.abc import Iterator

from lora2fx.dataflow.claims import Claim
from lora2fx.dataflow.columns import column_dim
from lora2fx.dataflow.contractions import is_convolution, is_embedding
from lora2fx.dataflow.dims import trace
from lora2fx.dataflow.graph import Dataflow, Ops
from lora2fx.dataflow.ops import is_product, is_selecting, is_softmax
from lora2fx.dataflow.recording import INPUT, Op, Recording
from lora2fx.dataflow.weights import Use, Weights


def _from_input(flow: Dataflow, value: int) -> bool:
    """Whether indices are an input of the model, as they came or moved about."""
    return any(
        op is not None and op.name == INPUT for at in flow.behind([value]) for op in (flow.recording.producer(at),)
    )


def _vocabulary(flow: Dataflow, weights: Weights) -> int:
    """The rows of the largest table that an input of the model is looked up in, 0 where there is none."""
    tables = [use for use in weights.uses.values() if is_embedding(use.contraction.op) and _from_input(flow, use.data)]
    return max((flow.recording.values[use.parameter].shape[0] for use in tables), default=0)


def ending_claims(flow: Dataflow, weights: Weights) -> Iterator[Claim]:
    """Embeddings, convolutions, language-model heads and routers."""
    vocabulary, choices = _vocabulary(flow, weights), _choices(flow)
    for use in weights.uses.values():
        op = use.contraction.op
        if use.layout is None:
            continue
        if is_embedding(op):
            yield Claim(use, "embedding", op.name)
        elif is_convolution(op):
            yield Claim(use, "conv", op.name)
        elif _is_head(flow, weights, use, vocabulary):
            yield Claim(use, "lm_head", f"{vocabulary} scores, one for each row of the embedding; nothing follows")
        elif _is_router(flow, weights, use, choices):
            yield Claim(use, "router", "its largest columns weigh other weights' results")


def _width(recording: Recording, use: Use) -> int:
    return recording.values[use.output].shape[column_dim(recording, use)]


def _is_head(flow: Dataflow, weights: Weights, use: Use, vocabulary: int) -> bool:
    follows = weights.contractions.keys() & flow.sinks(use.output)
    return vocabulary > 1 and not follows and _width(flow.recording, use) == vocabulary


def _through_choices(flow: Dataflow, value: int) -> Ops:
    """The sources of a value, beyond every softmax and every choice of the largest."""
    found, ahead, seen = set[int](), set(flow.sources(value)), set[int]()
    while ahead:
        op = flow.recording.ops[ahead.pop()]
        if op.index in seen:
            continue
        seen.add(op.index)
        found.add(op.index)
        if is_softmax(op) or is_selecting(op):
            ahead |= flow.sources(op.inputs[0])
    return frozenset(found)


def _choices(flow: Dataflow) -> list[tuple[Op, Ops]]:
    """Every choice of the largest, with the sources of what is chosen from."""
    selecting = filter(is_selecting, flow.recording.ops)
    return [(op, _through_choices(flow, op.inputs[0])) for op in selecting]


def _chosen(flow: Dataflow, use: Use, choices: list[tuple[Op, Ops]]) -> bool:
    """Whether the largest of the use's columns are chosen somewhere."""
    return any(use.index in sources and _along_columns(flow, use, op) for op, sources in choices)


def _along_columns(flow: Dataflow, use: Use, op: Op) -> bool:
    value, rank = op.inputs[0], len(flow.recording.values[op.inputs[0]].shape)
    given = op.args[2 if op.name == "aten.topk" else 1] if len(op.args) > (2 if op.name == "aten.topk" else 1) else -1
    if not isinstance(given, int):
        return False
    dims, column = [given % rank], column_dim(flow.recording, use) % len(flow.recording.values[use.output].shape)
    for softmax in (flow.recording.ops[index] for index in flow.sources(value)):
        if is_softmax(softmax):
            dims, value = list(trace(flow, value, dims, softmax.outputs[0])), softmax.inputs[0]
    return column in trace(flow, value, dims, use.output)


def _is_router(flow: Dataflow, weights: Weights, use: Use, choices: list[tuple[Op, Ops]]) -> bool:
    if not _chosen(flow, use, choices):
        return False
    for op in flow.recording.ops:
        if not is_product(op) or len(op.inputs) != 2:
            continue
        for chosen, other in (op.inputs, op.inputs[::-1]):
            scaled = flow.sources(other) & weights.uses.keys()
            if scaled and use.index in _through_choices(flow, chosen) and use.index not in scaled:
                return True
    return False
