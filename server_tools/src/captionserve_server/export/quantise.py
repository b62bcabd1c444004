"""Smaller, faster graphs: weights in 8 or 4 bits.

8 bits: symmetric weights with a scale for each output column, activations quantised as they come,
whole numbers multiplied. Weights use 7 of the 8 bits: AVX2 without VNNI adds two products of an
unsigned and a signed byte in 16 bits, which full bytes overflow.

A caption must not depend on what else is in the batch, and ONNX Runtime's dynamic quantisation
takes one range over all of it. So the encoder goes through its images one by one, each with ranges
of its own, and the decoder's graphs have a range for each row (docs/adr/0016).

4 bits: symmetric weights with a scale for each block of a column (MatMulNBits), where reading the
weights is what takes the time: the decoder. The encoder multiplies far more than it reads and keeps
its feed-forward layers, two thirds of it, at 8 bits.

The embedding of tokens reads the output head's weights, of which a graph keeps one quantised copy,
a row for each token. ONNX Runtime turns it into the columns of a product when it loads the graph;
a token's numbers together take a tenth of the time to look up.
What was measured to choose all this is in docs/adr/0012.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from captionserve_server.export.precision import Precision

BLOCK_SIZE = 128
"""Rows of a column that share one scale of 4-bit weights."""
_INT8_ACTIVATIONS = 4
"""MatMulNBits' accuracy level that multiplies whole numbers."""
_CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""
_LARGEST_WEIGHT = 64
"""Twice this times 255 fits into 16 bits."""
_SMALLEST = 1e-30
"""Stands for the largest value of a row or a column of zeros."""
_GELU_LEAST = 0.1701
"""No value of GELU, computed with tanh, is further below 0."""
_ATTENTION = re.compile(r"\.attention\.")
_SCOPES = "pkg.torch.onnx.name_scopes"


def quantise_encoder(source: Path, target: Path, precision: Precision) -> None:
    """Write the encoder's graph in a precision; the source has it in fp32."""
    model = onnx.load(str(source))
    if precision is Precision.INT4:
        chosen = [node.name for node in _products(model.graph) if _is_of_attention(node)]
        model = _in_4_bits(model, chosen)
    onnx.save(_image_by_image(_in_8_bits(model)), str(target))


def quantise_prefill(source: Path, target: Path, precision: Precision) -> None:
    """Write the prefill graph in a precision; the source has it in fp32.

    In 8 bits it takes one range over all images of a run, so a run has one image.
    """
    model = onnx.load(str(source))
    quantised = _all_in_4_bits(model) if precision is Precision.INT4 else _in_8_bits(model)
    onnx.save(quantised, str(target))


def quantise_step(source: Path, target: Path, precision: Precision) -> None:
    """Write the step graph in a precision; the source has it in fp32."""
    model = onnx.load(str(source))
    shared = _heads_as_products(model.graph)
    if precision is Precision.INT4:
        model = _all_in_4_bits(model)
    else:
        _in_8_bits_by_rows(model)
    for table, columns in shared.items():
        _share_embedding(model.graph, table, columns)
    onnx.save(model, str(target))


def _heads_as_products(graph: GraphProto) -> dict[str, str]:
    """Multiply with columns [E, V] where the graph multiplies with rows [V, E].

    Returns:
        name of the rows to that of the columns where an embedding reads the rows as well.
    """
    weights = {initializer.name: initializer for initializer in graph.initializer}
    shared: dict[str, str] = {}
    for node in graph.node:
        transposed = any(entry.name == "transB" and entry.i for entry in node.attribute)
        if node.op_type != "Gemm" or not transposed:
            continue
        hidden, table = node.input
        columns = f"{table}_columns"
        values = numpy_helper.to_array(weights[table]).T
        graph.initializer.append(numpy_helper.from_array(values, columns))
        node.CopyFrom(helper.make_node("MatMul", [hidden, columns], node.output, name=node.name))
        if any(table in other.input for other in graph.node):
            shared[table] = columns
        else:
            graph.initializer.remove(weights[table])
    return shared


def _products(graph: GraphProto) -> Iterator[NodeProto]:
    """The matrix products with weights."""
    weights = {initializer.name for initializer in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            yield node


def _is_of_attention(node: NodeProto) -> bool:
    scopes = {entry.key: entry.value for entry in node.metadata_props}
    return bool(_ATTENTION.search(scopes.get(_SCOPES, "")))


def _in_8_bits(model: ModelProto) -> ModelProto:
    """All products with weights that are left in fp32; one range for each left matrix."""
    with tempfile.TemporaryDirectory(prefix="captionserve-quantise-") as folder:
        target = Path(folder) / "quantised.onnx"
        quantize_dynamic(
            model,
            str(target),
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=[node.name for node in _products(model.graph)],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
        return onnx.load(str(target))


@dataclasses.dataclass(frozen=True)
class _RowRange:
    """How the values of a row become bytes.

    Attributes:
        zero: the byte for 0.
        least: what the row's largest value is taken for where it is smaller.
        signed: whether a value may be as far below 0 as above it.
    """

    zero: int
    least: float
    signed: bool

    @property
    def steps(self) -> int:
        """The bytes above `zero`, the last of which stands for the row's largest value."""
        return 255 - self.zero


_ANY_ROW = _RowRange(zero=128, least=_SMALLEST, signed=True)
# Almost a bit more for what is above 0. From this largest value on, all of GELU's are in the range.
_ROW_OF_GELU = _RowRange(zero=32, least=_GELU_LEAST * (255 - 32) / 32, signed=False)


def _in_8_bits_by_rows(model: ModelProto) -> None:
    """All products with weights; a range for each row of a left matrix."""
    graph = model.graph
    weights = {initializer.name: initializer for initializer in graph.initializer}
    products = {node.name for node in _products(graph)}
    givers = {name: node for node in graph.node for name in node.output}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.name not in products:
            nodes.append(node)
            continue
        rows, columns = node.input
        graph.initializer.extend(_columns_of_8_bits(weights[columns]))
        graph.initializer.remove(weights[columns])
        row_range = _ROW_OF_GELU if _is_of_gelu(rows, givers) else _ANY_ROW
        product = _product_of_8_bits(rows, columns, node, row_range)
        nodes.extend(product.node)
        graph.initializer.extend(product.initializer)
    del graph.node[:]
    graph.node.extend(nodes)
    model.opset_import.append(helper.make_opsetid(_CONTRIB, 1))


def _is_of_gelu(rows: str, givers: Mapping[str, NodeProto]) -> bool:
    """Whether this is x / 2 * (1 + tanh(...)), GELU as GPT-2 has it."""
    product = givers.get(rows)
    if product is None or product.op_type != "Mul":
        return False
    factors = [givers[name] for name in product.input if name in givers]
    terms = [name for factor in factors if factor.op_type == "Add" for name in factor.input]
    return any(givers[name].op_type == "Tanh" for name in terms if name in givers)


def _columns_of_8_bits(weights: TensorProto) -> tuple[TensorProto, TensorProto]:
    """int8 [in, out] and their scales [out], of float32 [in, out]."""
    values = numpy_helper.to_array(weights)
    scales = np.maximum(np.abs(values).max(axis=0), _SMALLEST) / _LARGEST_WEIGHT
    whole = np.rint(values / scales).astype(np.int8)
    return (
        numpy_helper.from_array(whole, f"{weights.name}_quantized"),
        numpy_helper.from_array(scales.astype(np.float32), f"{weights.name}_scale"),
    )


def _product_of_8_bits(rows: str, columns: str, product: NodeProto, row_range: _RowRange) -> _Nodes:
    """[R, in] times what `columns` became, with a scale for each row.

    A row over its largest value lies within 1, for which one scale does; ONNX Runtime's product has
    no other. The result is multiplied by that value.
    """
    nodes = _Nodes(f"{product.name}_by_rows")
    scale = nodes.constant(np.array(1 / row_range.steps, np.float32))
    zero = nodes.constant(np.array(row_range.zero, np.uint8))
    sizes = nodes.add("Abs", rows) if row_range.signed else rows
    found = nodes.add("ReduceMax", sizes, nodes.constant(np.array([-1])))
    largest = nodes.add("Clip", found, nodes.constant(np.array(row_range.least, np.float32)))
    whole = nodes.add("QuantizeLinear", nodes.add("Div", rows, largest), scale, zero)
    inputs = (whole, f"{columns}_quantized", scale, f"{columns}_scale", zero)
    nodes.add("Mul", nodes.add("MatMulIntegerToFloat", *inputs, domain=_CONTRIB), largest)
    nodes.give(product.output[0])
    return nodes


def _image_by_image(model: ModelProto) -> ModelProto:
    """A graph that runs another one for each image of a batch by itself.

    Args:
        model: of one input and one output, both of which have the images first.
    """
    inner = model.graph
    (batch_in,), (batch_out,) = inner.input, inner.output
    # A name of the graph around must not be given again inside.
    _rename(inner, {batch_in.name: "batch_of_one", batch_out.name: "states_of_one"})
    before, after = _Nodes("image_begin"), _Nodes("image_end")
    before.add("Unsqueeze", "image", before.constant(np.array([0])))
    before.give("batch_of_one")
    after.add("Squeeze", "states_of_one", after.constant(np.array([0])))
    after.give("image_states")
    body = helper.make_graph(
        [*before.node, *inner.node, *after.node],
        "image_by_image",
        [_of_one(batch_in, "image")],
        [_of_one(batch_out, "image_states")],
        [*before.initializer, *inner.initializer, *after.initializer],
    )
    ends = [batch_in.name], [batch_out.name]
    loop = helper.make_node("Scan", *ends, name="images", body=body, num_scan_inputs=1)
    looped = ModelProto()
    looped.CopyFrom(model)
    looped.graph.CopyFrom(helper.make_graph([loop], inner.name, [batch_in], [batch_out]))
    return looped


def _of_one(batch: ValueInfoProto, name: str) -> ValueInfoProto:
    """What one element along the first dimension of a batch is."""
    one = ValueInfoProto()
    one.CopyFrom(batch)
    one.name = name
    del one.type.tensor_type.shape.dim[0]
    return one


def _rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Give inputs and outputs of a graph's nodes other names."""
    for node in graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [names.get(name, name) for name in tensors]


def _all_in_4_bits(model: ModelProto) -> ModelProto:
    """All products with weights."""
    return _in_4_bits(model, [node.name for node in _products(model.graph)])


def _in_4_bits(model: ModelProto, chosen: Collection[str]) -> ModelProto:
    """The products of these names."""
    others = [node.name for node in _products(model.graph) if node.name not in chosen]
    quantizer = MatMulNBitsQuantizer(
        model,
        block_size=BLOCK_SIZE,
        is_symmetric=True,
        accuracy_level=_INT8_ACTIVATIONS,
        nodes_to_exclude=others,
    )
    quantizer.process()
    quantised: ModelProto = quantizer.model.model
    return quantised


def _share_embedding(graph: GraphProto, table: str, columns: str) -> None:
    """Let the embedding read the head's quantised weights; the fp32 ones go.

    Args:
        graph: quantised; the head multiplies with what `columns` became.
        table: fp32 [V, E], which the embedding reads.
        columns: the head's weights [E, V] before they were quantised.
    """
    weights = {initializer.name: initializer for initializer in graph.initializer}
    index, gather = next(
        (index, node)
        for index, node in enumerate(graph.node)
        if node.op_type == "Gather" and node.input[0] == table
    )
    if f"{columns}_quantized" in weights:
        rows = _rows_of_8_bits(weights[f"{columns}_quantized"], columns, gather)
        graph.initializer.remove(weights[f"{columns}_quantized"])
    else:
        rows = _rows_of_4_bits(columns, gather, width=weights[table].dims[1])
    graph.node.remove(gather)
    for offset, replacement in enumerate(rows.node):
        graph.node.insert(index + offset, replacement)
    graph.initializer.extend(rows.initializer)
    graph.initializer.remove(weights[table])


@dataclasses.dataclass
class _Nodes:
    """Part of a graph under construction; every name in it begins with `prefix`."""

    prefix: str
    node: list[NodeProto] = dataclasses.field(default_factory=list)
    initializer: list[TensorProto] = dataclasses.field(default_factory=list)

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """One operator; the name of what it gives."""
        name = f"{self.prefix}_{len(self.node)}"
        self.node.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def constant(self, values: NDArray[Any]) -> str:
        """The name of a constant."""
        name = f"{self.prefix}_constant_{len(self.initializer)}"
        self.initializer.append(numpy_helper.from_array(values, name))
        return name

    def give(self, name: str) -> None:
        """Let the last operator give its result that name."""
        self.node[-1].output[0] = name


def _rows_of_8_bits(quantised: TensorProto, columns: str, gather: NodeProto) -> _Nodes:
    """Rows [R, E] of int8 [V, E], times their scales [V]; the product gets its transpose."""
    tokens, nodes = gather.input[1], _Nodes(f"{columns}_rows")
    last = nodes.constant(np.array([-1]))
    table = nodes.constant(numpy_helper.to_array(quantised).T)
    nodes.add("Transpose", table, perm=[1, 0])
    nodes.give(quantised.name)
    numbers = nodes.add("Cast", nodes.add("Gather", table, tokens, axis=0), to=TensorProto.FLOAT)
    scales = nodes.add("Gather", f"{columns}_scale", tokens, axis=0)
    nodes.add("Mul", numbers, nodes.add("Unsqueeze", scales, last))
    nodes.give(gather.output[0])
    return nodes


def _rows_of_4_bits(columns: str, gather: NodeProto, width: int) -> _Nodes:
    """Rows [R, E] of uint8 [V, blocks, BLOCK_SIZE / 2], times their scales.

    A byte has two values, the first in its lower half; 8 stands for 0.
    """
    tokens, nodes = gather.input[1], _Nodes(f"{columns}_rows")
    last = nodes.constant(np.array([-1]))
    packed = nodes.add("Gather", f"{columns}_Q4", tokens, axis=0)
    lower = nodes.add("BitwiseAnd", packed, nodes.constant(np.array(15, np.uint8)))
    upper = nodes.add("BitShift", packed, nodes.constant(np.array(4, np.uint8)), direction="RIGHT")
    halves = [nodes.add("Unsqueeze", half, last) for half in (lower, upper)]
    pairs = nodes.add("Concat", *halves, axis=-1)
    blocks = nodes.add("Reshape", pairs, nodes.constant(np.array([0, 0, BLOCK_SIZE])))
    numbers = nodes.add("Cast", blocks, to=TensorProto.FLOAT)
    centred = nodes.add("Sub", numbers, nodes.constant(np.array(8, np.float32)))
    scales = nodes.add("Gather", f"{columns}_scales", tokens, axis=0)
    scaled = nodes.add("Mul", centred, nodes.add("Unsqueeze", scales, last))
    rows = nodes.add("Reshape", scaled, nodes.constant(np.array([0, -1])))
    bounds = (nodes.constant(np.array([bound])) for bound in (0, width, 1))
    nodes.add("Slice", rows, *bounds)
    nodes.give(gather.output[0])
    return nodes
