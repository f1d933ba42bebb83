"""Dynamic dimensions are found by trying, and every size that is checked keeps the inputs valid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora2fx.errors import ExportError
from lora2fx.exporters.shapes import Shapes, cases, find_axes, given_axes, named_inputs, resize
from lora2fx.inputs import Inputs


def ids(batch: int, sequence: int) -> Tensor:
    return torch.arange(batch * sequence).reshape(batch, sequence) % 50


def any_size(tensors) -> bool:
    """A model that needs one batch and one sequence size throughout."""
    return len({value.shape[:2] for value in tensors.values()}) == 1


def test_ids_masks_and_embeddings_share_batch_and_sequence():
    tensors = {"input_ids": ids(2, 7), "attention_mask": torch.ones(2, 7), "inputs_embeds": torch.randn(2, 7, 4)}
    found = find_axes(tensors, any_size)
    both = {0: "batch", 1: "sequence"}
    assert found.axes == dict.fromkeys(tensors, both)
    assert (found.traced, found.larger) == ({"batch": 2, "sequence": 7}, {"batch": 5, "sequence": 10})


def test_a_decoder_has_its_own_sequence_even_at_the_same_size():
    found = find_axes({"input_ids": ids(2, 7), "decoder_input_ids": ids(2, 7)}, lambda tensors: True)
    assert found.axes["decoder_input_ids"] == {0: "batch", 1: "decoder_sequence"}
    assert found.traced == {"batch": 2, "sequence": 7, "decoder_sequence": 8}


def test_other_sizes_are_other_symbols():
    found = find_axes({"x": torch.randn(2, 7, 3), "context": torch.randn(2, 9, 3)}, lambda tensors: True)
    assert found.axes == {"x": {0: "batch", 1: "sequence"}, "context": {0: "batch", 1: "context_sequence"}}


def test_images_and_features_vary_in_their_batch_only():
    found = find_axes({"pixels": torch.randn(2, 3, 8, 8), "features": torch.randn(2, 6)}, lambda tensors: True)
    assert found.axes == {"pixels": {0: "batch"}, "features": {0: "batch"}}


def test_what_the_model_fixes_is_fixed():
    found = find_axes({"mel": torch.randn(2, 5, 9)}, lambda tensors: tensors["mel"].shape[1] == 5)
    assert found.axes == {"mel": {0: "batch"}}
    assert find_axes({"mel": torch.randn(2, 5, 9)}, lambda tensors: False) == Shapes({}, {}, {})


def test_sequence_first_inputs_follow_by_size():
    tensors = {"source": torch.randn(7, 2, 4), "padding": torch.zeros(2, 7, dtype=torch.bool)}
    found = find_axes(tensors, lambda t: t["source"].shape[:2] == t["padding"].shape[::-1])
    assert found.axes == {"source": {0: "batch", 1: "sequence"}, "padding": {1: "batch", 0: "sequence"}}


def test_a_square_mask_follows_its_sequence():
    tensors = {"input_ids": ids(2, 7), "mask": torch.zeros(2, 1, 7, 7)}
    found = find_axes(tensors, lambda t: t["mask"].shape[2:] == (t["input_ids"].shape[1],) * 2)
    assert found.axes["mask"] == {0: "batch", 2: "sequence", 3: "sequence"}


def test_a_model_at_its_longest_is_traced_shorter():
    found = find_axes({"input_ids": ids(2, 16)}, lambda t: t["input_ids"].shape[1] <= 16)
    assert (found.traced["sequence"], found.larger["sequence"]) == (8, 16)


def test_a_batch_of_one_is_traced_larger_with_distinct_rows():
    tensors = {"input_ids": ids(1, 7)}
    found = find_axes(tensors, lambda t: True)
    assert found.traced == {"batch": 2, "sequence": 7}
    rows = resize(tensors, found.axes, {"batch": 4, "sequence": 7})["input_ids"]
    assert len({tuple(row.tolist()) for row in rows}) == 4
    assert set(rows.flatten().tolist()) <= set(tensors["input_ids"].flatten().tolist())


def test_traced_sizes_are_distinct():
    found = find_axes({"input_ids": ids(5, 5)}, lambda t: True)
    assert found.traced == {"batch": 5, "sequence": 6}


def test_masks_are_repeated_not_shifted():
    mask = torch.tensor([[1, 1, 0]])
    assert resize({"m": mask}, {"m": {0: "batch"}}, {"batch": 3})["m"].tolist() == [[1, 1, 0]] * 3


def test_cases_cover_one_larger_and_padded():
    tensors = {"input_ids": ids(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    found = {case.name: case.tensors for case in cases(tensors, find_axes(tensors, any_size))}
    assert list(found) == ["traced", "batch 1", "larger batch", "sequence 1", "larger sequence", "padded"]
    sizes = {name: tuple(case["input_ids"].shape) for name, case in found.items()}
    assert sizes == {
        "traced": (2, 7),
        "batch 1": (1, 7),
        "larger batch": (5, 7),
        "sequence 1": (2, 1),
        "larger sequence": (2, 10),
        "padded": (2, 7),
    }
    assert found["padded"]["attention_mask"].tolist() == [[1] * 7, [1, 1, 1, 1, 0, 0, 0]]
    assert tensors["attention_mask"].all()


def test_key_padding_masks_are_padded_with_true():
    tensors = {"src": torch.randn(2, 4, 3), "src_key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)}
    padded = cases(tensors, find_axes(tensors, lambda t: True))[-1]
    assert padded.name == "padded"
    assert padded.tensors["src_key_padding_mask"].tolist() == [[False] * 4, [False, False, True, True]]


def test_given_axes_are_kept_and_checked():
    tensors = {"x": torch.randn(2, 3, 8, 8)}
    found = given_axes(tensors, {"x": {0: "n", 3: "width"}}, lambda t: True)
    assert found.axes == {"x": {0: "n", 3: "width"}}
    assert found.traced == {"n": 2, "width": 8}
    with pytest.raises(ExportError, match=r"dimension 1 of 'y'. The tensor inputs are x \(2, 3, 8, 8\)"):
        given_axes(tensors, {"y": {1: "n"}}, lambda t: True)
    with pytest.raises(ExportError, match="dimension 4 of 'x'"):
        given_axes(tensors, {"x": {4: "n"}}, lambda t: True)
    with pytest.raises(ExportError, match="asks for 'width' to vary"):
        given_axes(tensors, {"x": {3: "width"}}, lambda t: t["x"].shape[3] == 8)


def test_symbols_can_be_fixed_again():
    shapes = Shapes({"x": {0: "batch", 1: "sequence"}, "y": {1: "sequence"}}, {"batch": 2, "sequence": 7}, {})
    assert shapes.without({"sequence"}).axes == {"x": {0: "batch"}}
    assert shapes.without({"sequence"}).traced == {"batch": 2}


class Forward(nn.Module):
    def forward(self, x: Tensor, scale: float = 1.0, cache: object = None, **extra: Tensor) -> Tensor:
        return x * scale


def test_inputs_are_named_by_the_signature():
    x, y = torch.ones(2, 3), torch.zeros(2)
    tensors, constants = named_inputs(Forward(), Inputs((x, 2.0), {"mask": y}))
    assert list(tensors) == ["x", "mask"]
    assert constants == {"scale": 2.0}


def test_inputs_that_no_graph_can_take_are_refused():
    with pytest.raises(ExportError, match=r"example_inputs\['cache'\] is a list"):
        named_inputs(Forward(), Inputs((torch.ones(2),), {"cache": [torch.ones(2)]}))

    class Positional(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return tensors[0]

    with pytest.raises(ExportError, match="takes 'tensors' by position only"):
        named_inputs(Positional(), Inputs((torch.ones(2),)))
