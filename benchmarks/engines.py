"""Inference engines as peers of the forward pass, on a ResNet-18 of our weights in ONNX."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def onnx_resnet18(state: Mapping[str, np.ndarray], images: tuple[int, ...]) -> Any:
    """Return the ONNX model of ResNet-18 in eval mode with a state dict's weights.

    `images` is the shape (N, 3, H, W) of the input named "images"; the output is "logits".
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []

    def add(kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        output = output or f"{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def conv_norm(x: str, conv: str, norm: str, stride: int) -> str:
        size = state[f"{conv}.weight"].shape[2]
        pads = [size // 2] * 4
        x = add("Conv", x, f"{conv}.weight", strides=[stride, stride], pads=pads)
        names = [f"{norm}.{key}" for key in ("weight", "bias", "running_mean", "running_var")]
        return add("BatchNormalization", x, *names)

    def block(x: str, name: str, stride: int) -> str:
        y = add("Relu", conv_norm(x, f"{name}.conv1", f"{name}.bn1", stride))
        y = conv_norm(y, f"{name}.conv2", f"{name}.bn2", 1)
        if f"{name}.downsample.0.weight" in state:
            x = conv_norm(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
        return add("Relu", add("Add", y, x))

    x = add("Relu", conv_norm("images", "conv1", "bn1", 2))
    x = add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for stage in range(1, 5):
        x = block(x, f"layer{stage}.0", 1 if stage == 1 else 2)
        x = block(x, f"layer{stage}.1", 1)
    x = add("Flatten", add("GlobalAveragePool", x))
    add("Gemm", x, "fc.weight", "fc.bias", output="logits", transB=1)
    weights = [
        numpy_helper.from_array(np.ascontiguousarray(array), name)
        for name, array in state.items()
        if array.dtype == np.float32
    ]
    describe = helper.make_tensor_value_info
    given = describe("images", TensorProto.FLOAT, images)
    logits = describe("logits", TensorProto.FLOAT, (images[0], len(state["fc.bias"])))
    graph = helper.make_graph(nodes, "resnet18", [given], [logits], weights)
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, ir_version=8, opset_imports=[opset])


def forward_runs(
    state: Mapping[str, np.ndarray], images: np.ndarray
) -> dict[str, Callable[[], np.ndarray]]:
    """Return the forward pass of ResNet-18 by each engine that is installed, float32, all cores."""
    if importlib.util.find_spec("onnx") is None:
        return {}
    model = onnx_resnet18(state, images.shape).SerializeToString()
    engines = {"ONNX Runtime": ("onnxruntime", _onnxruntime), "OpenVINO": ("openvino", _openvino)}
    return {
        name: make(model, images)
        for name, (package, make) in engines.items()
        if importlib.util.find_spec(package) is not None
    }


def _onnxruntime(model: bytes, images: np.ndarray) -> Callable[[], np.ndarray]:
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count() or 1
    session: Any = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"images": images})[0]


def _openvino(model: bytes, images: np.ndarray) -> Callable[[], np.ndarray]:
    import openvino  # pyright: ignore[reportMissingImports]

    core = openvino.Core()
    # Where the processor multiplies bfloat16, it would be taken for float32 by default.
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": os.cpu_count() or 1,
    }
    compiled = core.compile_model(core.read_model(model), "CPU", options)
    request = compiled.create_infer_request()

    def run() -> np.ndarray:
        result = request.infer({"images": images}, share_inputs=True)[0]
        return np.array(result)  # that one lies in the request's memory; the others' are new

    return run
