"""Converts an inference graph to an OpenVINO or ONNX model in memory; each library is imported when it is needed."""

from __future__ import annotations

import numpy as np

from paddle_medcls.core.openvino_setup import import_openvino
from paddle_medcls.deployment.graph import Graph, Operation

OPSET = 17
"""Of ONNX."""


def to_openvino(graph: Graph):
    """The graph as an `openvino.Model`, any batch size."""
    openvino = import_openvino()

    ops = openvino.opset13
    image = ops.parameter([-1, *graph.input_shape], np.dtype(graph.input_type), name="image")
    image.output(0).get_tensor().set_names({"image"})
    values = [image.output(0)]
    for operation in graph.operations:
        inputs = [values[k] for k in operation.inputs]
        values.append(_openvino_node(ops, operation, inputs).output(0))
    results = []
    for name, (number, _) in graph.outputs.items():
        values[number].get_tensor().set_names({name})
        results.append(ops.result(values[number], name=f"{name}/result"))
    return openvino.Model(results, [image], "network")


def _openvino_node(ops, operation: Operation, inputs: list):
    kind, numbers = operation.kind, list(operation.numbers)
    # The model keeps a reference to an array that it shares, which must be one that may be written.
    arrays = [ops.constant(array, shared_memory=array.flags.writeable) for array in operation.arrays]
    x = inputs[0]
    if kind == "convolution":
        stride, padding = numbers
        node = ops.convolution(x, arrays[0], [stride] * 2, [padding] * 2, [padding] * 2, [1, 1])
        return ops.add(node, ops.constant(operation.arrays[1].reshape(1, -1, 1, 1)))
    if kind == "max_pool":
        kernel, stride, padding = numbers
        return ops.max_pool(x, [stride] * 2, [1, 1], [padding] * 2, [padding] * 2, [kernel] * 2)
    if kind == "linear":
        return ops.add(ops.matmul(x, arrays[0], False, False), arrays[1])
    if kind == "pool_to":
        return ops.matmul(ops.matmul(arrays[0], x, False, False), arrays[1], False, False)
    if kind in ("relu", "sigmoid", "log", "sqrt"):
        return getattr(ops, kind)(x)
    if kind in ("add", "subtract", "multiply", "divide"):
        return getattr(ops, kind)(x, arrays[0] if arrays else inputs[1])
    if kind == "take":
        return ops.gather(x, arrays[0], ops.constant(np.array(numbers[0])))
    return {
        "softmax": lambda: ops.softmax(x, 1),
        "mean": lambda: ops.reduce_mean(x, ops.constant(np.array(numbers)), False),
        "reshape": lambda: ops.reshape(x, ops.constant(np.array(numbers)), False),
        "transpose": lambda: ops.transpose(x, ops.constant(np.array(numbers))),
        "concat": lambda: ops.concat(inputs, numbers[0]),
        "cast": lambda: ops.convert(x, "f32"),
    }[kind]()


def to_onnx(graph: Graph):
    """The graph as an `onnx.ModelProto`, any batch size."""
    import onnx
    from onnx import helper, numpy_helper

    names = ["image", *(f"v{number}" for number in range(1, len(graph.operations) + 1))]
    for name, (number, _) in graph.outputs.items():
        names[number] = name
    nodes, constants = [], []
    for number, operation in enumerate(graph.operations, start=1):
        arrays = list(operation.arrays)
        if operation.kind == "reshape":
            arrays.append(np.array(operation.numbers))
        constant_names = [f"{names[number]}.{k}" for k in range(len(arrays))]
        constants += [numpy_helper.from_array(array, name) for array, name in zip(arrays, constant_names)]
        nodes += _onnx_nodes(helper, operation, [names[k] for k in operation.inputs], constant_names, names[number])
    kinds = {"float32": onnx.TensorProto.FLOAT, "uint8": onnx.TensorProto.UINT8}
    image = helper.make_tensor_value_info("image", kinds[graph.input_type], ["batch", *graph.input_shape])
    outputs = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", columns])
        for name, (_, columns) in graph.outputs.items()
    ]
    onnx_graph = helper.make_graph(nodes, "network", [image], outputs, constants)
    model = helper.make_model(onnx_graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="paddle_medcls")
    model.ir_version = 8  # that of opset 17: newer ones are refused by older runtimes
    return model


def _onnx_nodes(helper, operation: Operation, inputs: list[str], constant_names: list[str], output: str) -> list:
    kind, numbers = operation.kind, list(operation.numbers)
    if kind == "pool_to":
        product = f"{output}.rows"
        first = helper.make_node("MatMul", [constant_names[0], *inputs], [product])
        return [first, helper.make_node("MatMul", [product, constant_names[1]], [output])]
    name = {"subtract": "Sub", "divide": "Div", "linear": "Gemm", "take": "Gather", "convolution": "Conv"}.get(kind)
    name = name or {"max_pool": "MaxPool", "mean": "ReduceMean", "multiply": "Mul"}.get(kind, kind.capitalize())
    fields: dict = {}
    if kind == "convolution":
        fields = {"strides": [numbers[0]] * 2, "pads": [numbers[1]] * 4}
    elif kind == "max_pool":
        fields = {"kernel_shape": [numbers[0]] * 2, "strides": [numbers[1]] * 2, "pads": [numbers[2]] * 4}
    elif kind == "mean":
        fields = {"axes": numbers, "keepdims": 0}
    elif kind in ("take", "concat", "softmax"):
        fields = {"axis": numbers[0] if numbers else 1}
    elif kind == "transpose":
        fields = {"perm": numbers}
    elif kind == "cast":
        fields = {"to": 1}  # float32
    return [helper.make_node(name, [*inputs, *constant_names], [output], **fields)]
