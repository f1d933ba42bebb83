"""What each weight does, by dataflow alone: a site for every matrix that meets an activation, with its role."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from lora2fx.dataflow.attention import AttentionRoles
from lora2fx.dataflow.claims import Claim
from lora2fx.dataflow.columns import Columns, ranges
from lora2fx.dataflow.cores import softmax_dim
from lora2fx.dataflow.covering import parameter_columns
from lora2fx.dataflow.endings import ending_claims
from lora2fx.dataflow.feedforward import FeedForwardRoles
from lora2fx.dataflow.graph import Dataflow
from lora2fx.dataflow.ops import is_softmax
from lora2fx.dataflow.recording import INPUT, Recording
from lora2fx.dataflow.sharing import Groups, shared_inputs
from lora2fx.dataflow.weights import Use, Weights
from lora2fx.errors import InputsError
from lora2fx.site import Site


@dataclass(frozen=True)
class Analysis:
    """The sites of a model, and for each other weight of two or more dimensions the reason why it is none.

    `tied` holds all names of each parameter that has several, by its first. A tied weight's site has the name under
    which the module that multiplies by it holds it. `shared` are weights that meet one activation.
    """

    sites: tuple[Site, ...]
    rest: dict[str, str]
    tied: dict[str, tuple[str, ...]]
    shared: Groups = ()


@dataclass(frozen=True)
class _Part:
    """Columns of a weight (all of a whole weight's) with what one use makes of them."""

    role: str
    evidence: str
    columns: Columns


def _claims(recording: Recording, flow: Dataflow, weights: Weights) -> dict[int, list[Claim]]:
    """Claims by the use they are about. A convolution is one only where no attention claims it."""
    claims = defaultdict[int, list[Claim]](list)
    for claim in (*AttentionRoles(flow, weights).claims(), *FeedForwardRoles(flow, weights).claims()):
        claims[claim.use.index].append(claim)
    for claim in ending_claims(flow, weights):
        if not claims[claim.use.index]:
            claims[claim.use.index].append(claim)
    return claims


def _parts(recording: Recording, use: Use, claims: Iterable[Claim]) -> Iterator[_Part]:
    """What a use makes of the weight's columns; those that nothing claims stay unknown."""
    whole = parameter_columns(recording, use)
    left = set(range(len(whole)))
    for claim in claims:
        columns = frozenset(range(len(whole))) if claim.columns is None else claim.columns
        left -= columns
        yield _Part(claim.role, claim.evidence, frozenset(whole[column] for column in columns))
    if left:
        evidence = f"{use.contraction.op.name}: no attention, feed-forward or head"
        yield _Part("unknown", evidence, frozenset(whole[column] for column in left))


def _merged(parts: Iterable[_Part]) -> list[_Part]:
    """Parts of one role joined; where roles share columns, one unknown part with the reason."""
    roles = dict[str, list[_Part]]()
    for part in parts:
        roles.setdefault(part.role, []).append(part)
    joined = [_joined(role, group) for role, group in roles.items()]
    clash = {id(part) for part in joined for other in joined if part is not other and part.columns & other.columns}
    clashing = [part for part in joined if id(part) in clash]
    if not clashing:
        return joined
    said = "; ".join(f"{part.role} ({part.evidence})" for part in clashing)
    unknown = [part for part in joined if id(part) not in clash and part.role == "unknown"]
    columns = frozenset[int]().union(*(part.columns for part in (*clashing, *unknown)))
    kept = [part for part in joined if id(part) not in clash and part.role != "unknown"]
    return [*kept, _Part("unknown", f"used in several roles: {said}", columns)]


def _joined(role: str, parts: list[_Part]) -> _Part:
    evidence = list(dict.fromkeys(part.evidence for part in parts))
    more = f" and {len(evidence) - 1} more" if len(evidence) > 1 else ""
    return _Part(role, evidence[0] + more, frozenset[int]().union(*(part.columns for part in parts)))


def _sites(recording: Recording, name: str, uses: list[Use], claims: dict[int, list[Claim]], note: str) -> list[Site]:
    owner, _, parameter = name.rpartition(".")
    shape = recording.values[uses[0].parameter].shape
    layouts = list(dict.fromkeys(use.layout for use in uses))
    assert layouts[0] is not None
    site = Site(name, owner, parameter, shape, layouts[0])
    if len(layouts) > 1:
        several = ", ".join(f"{use.contraction.op.name} {use.layout}" for use in uses)
        return [_with(site, _Part("unknown", f"used in several layouts: {several}", frozenset()), None, note)]
    parts = _merged(part for use in uses for part in _parts(recording, use, claims.get(use.index, ())))
    parts.sort(key=lambda part: min(part.columns, default=0))
    whole = len(parts) == 1 and len(parts[0].columns) == site.weight_out_features
    return [_with(site, part, None if whole else ranges(part.columns), note) for part in parts]


def _with(site: Site, part: _Part, columns: tuple[tuple[int, int], ...] | None, note: str) -> Site:
    evidence = part.evidence + note
    return Site(site.weight, site.owner, site.parameter, site.shape, site.layout, part.role, evidence, columns)


def _refuse_single(recording: Recording) -> None:
    """Raise where a softmax over one position comes from an example input of one position."""
    softmaxes = (op for op in recording.ops if is_softmax(op) and recording.values[op.inputs[0]].shape)
    if all(recording.values[op.inputs[0]].shape[softmax_dim(recording, op)] > 1 for op in softmaxes):
        return
    shapes = (recording.values[value].shape for op in recording.ops if op.name == INPUT for value in op.outputs)
    for shape in shapes:
        if len(shape) in (2, 3) and shape[1] == 1:
            raise InputsError(
                f"An example input of shape {shape} holds a single position, so that an attention's queries and keys"
                " look the same: pass example_inputs with a sequence of at least 2, better 8."
            )


def _reason(weights: Weights, value: int | None, undecided: dict[int, str]) -> str:
    if value is None or value not in weights.flow.consumers:
        return "never reached by the recorded forward: pass example_inputs= that take the path you train"
    if value in undecided:
        return undecided[value]
    return f"no matmul multiplies by it, only {', '.join(weights.readers(value))} reads it"


def find_sites(model: nn.Module, recording: Recording) -> Analysis:
    """Sites with roles from the dataflow of one recorded forward, in the order of `model.named_parameters()`.

    A fused weight has a site for each role, with its `columns`. What no rule claims is `unknown`, as is a weight with
    several roles. Raises `InputsError` where an attention saw a single position, which hides its keys.
    """
    _refuse_single(recording)
    flow = Dataflow(recording)
    weights = Weights(flow)
    claims = _claims(recording, flow, weights)
    uses, undecided = defaultdict[str, list[Use]](list), dict[int, str]()
    for use in weights.uses.values():
        if use.layout is None:
            undecided[use.parameter] = use.reason
        else:
            uses[use.name].append(use)
    sites, rest = list[Site](), dict[str, str]()
    values = {name: value for value, name in recording.parameters.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = next((first for first, names in recording.tied.items() if name in names), name)
        others = [other for other in recording.tied.get(first, ()) if other != name]
        if name in uses:
            note = f"; tied to {', '.join(others)}" if others else ""
            sites += _sites(recording, name, uses[name], claims, note)
        elif parameter.dim() >= 2 and not any(other in uses for other in others) and name == first:
            rest[name] = _reason(weights, values.get(name), undecided)
    return Analysis(tuple(sites), rest, recording.tied, shared_inputs(weights))
