"""Two ONNX graphs are the same where what their outputs depend on is the same."""

from __future__ import annotations

import numpy as np
import pytest

from lora2fx.errors import ExportError
from lora2fx.exporters.onnx_graph import op_counts, paired_constants

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

FLOAT = TensorProto.FLOAT
EYE = np.eye(3, dtype=np.float32)


def model(nodes, constants, outputs=("y",), inputs=("x",)):
    """An IR model of (op, inputs, output, attributes) nodes and named constants."""
    from onnxscript import ir

    made = [helper.make_node(op, ins, [out], name=f"n_{out}", **attributes) for op, ins, out, attributes in nodes]
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info(name, FLOAT, ["batch", 3]) for name in inputs],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))


def two_layers(first=EYE, second=2 * EYE, **changed):
    nodes = {
        "a": ("MatMul", ["x", "w1"], "a", {}),
        "b": ("LeakyRelu", ["a"], "b", {"alpha": 0.1}),
        "y": ("MatMul", ["b", "w2"], "y", {}),
    }
    return model(list((nodes | changed).values()), {"w1": first, "w2": second})


def test_the_constants_of_equal_graphs_are_paired_by_place():
    pairs = paired_constants(two_layers(), two_layers(first=5 * EYE))
    assert sorted((float(p.first.numpy()[0, 0]), float(p.second.numpy()[0, 0])) for p in pairs) == [(1, 5), (2, 2)]


def test_names_order_and_dead_nodes_do_not_count():
    other = model(
        [
            ("Relu", ["x"], "dead", {}),
            ("MatMul", ["x", "first"], "one", {}),
            ("LeakyRelu", ["one"], "two", {"alpha": 0.1}),
            ("MatMul", ["two", "last"], "y", {}),
        ],
        {"last": 2 * EYE, "first": EYE},
    )
    assert len(paired_constants(two_layers(), other)) == 2


def test_a_shared_constant_equals_two_equal_ones():
    apart = two_layers(second=EYE)
    shared = two_layers(second=EYE, y=("MatMul", ["b", "w1"], "y", {}))
    assert len(paired_constants(shared, apart)) == 2


def test_a_constant_node_equals_an_initializer():
    value = numpy_helper.from_array(EYE)
    made = model([("Constant", [], "w", {"value": value}), ("MatMul", ["x", "w"], "y", {})], {})
    assert len(paired_constants(made, model([("MatMul", ["x", "v"], "y", {})], {"v": EYE}))) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"b": ("Elu", ["a"], "b", {"alpha": 0.1})}, "operator is .*Elu"),
        ({"b": ("LeakyRelu", ["a"], "b", {"alpha": 0.2})}, "attribute alpha, value is"),
        ({"b": ("LeakyRelu", ["a"], "b", {})}, "attributes is"),
        ({"y": ("MatMul", ["w2", "b"], "y", {})}, "operator is"),
        ({"y": ("MatMul", ["b", "a"], "y", {})}, "operator is"),
        ({"a": ("MatMul", ["x", "x"], "a", {})}, "operator is .*an input"),
    ],
)
def test_a_difference_is_named(changed, message):
    with pytest.raises(ExportError, match=message):
        paired_constants(two_layers(), two_layers(**changed))


def test_shapes_and_dtypes_of_constants_count():
    with pytest.raises(ExportError, match="dtype and shape of a constant"):
        paired_constants(two_layers(), two_layers(second=np.ones((3, 4), np.float32)))


def test_inputs_are_compared_by_name():
    first = model([("Sub", ["x", "z"], "y", {})], {}, inputs=("x", "z"))
    second = model([("Sub", ["z", "x"], "y", {})], {}, inputs=("x", "z"))
    with pytest.raises(ExportError, match="input z here, x there"):
        paired_constants(first, second)
    with pytest.raises(ExportError, match="inputs is"):
        paired_constants(first, model([("Relu", ["x"], "y", {})], {}))


def branch(op: str):
    out = helper.make_tensor_value_info("inner", FLOAT, None)
    return helper.make_graph([helper.make_node(op, ["x"], ["inner"])], "branch", [], [out])


def test_subgraphs_are_compared():
    def conditional(op: str):
        yes = np.array(True)
        branches = {"then_branch": branch("Relu"), "else_branch": branch(op)}
        return model([("If", ["condition"], "y", branches)], {"condition": yes})

    assert len(paired_constants(conditional("Elu"), conditional("Elu"))) == 1
    with pytest.raises(ExportError, match=r"attribute else_branch.*operator is .*Relu"):
        paired_constants(conditional("Elu"), conditional("Relu"))
    assert op_counts(conditional("Elu")) == {"Elu": 1, "If": 1, "Relu": 1}


def test_operators_are_counted():
    assert op_counts(two_layers()) == {"LeakyRelu": 1, "MatMul": 2}
