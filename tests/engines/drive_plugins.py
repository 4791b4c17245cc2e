"""Call the plugins as TensorRT does to build a layer, in a separate process, through its `tensorrt.plugin`.

python drive_plugins.py < {"kernels": a bundle's folder, "capability": 80, "dtype": "float16", "layers": [layer]}
-> last line: a list with the plugin's answers for each layer, or {"error": message}

A layer is {"operator", "attributes": {name: number}, "inputs": [shape of numbers and names], "sizes": [{name: size}]}.
TensorRT's native part is replaced where it would compute: dimensions are functions of the named sizes, and the registry
is a dictionary. The plugins, their creators and the checks of their signatures are TensorRT's.
"""

import json
import operator
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorrt as trt

from engines.plugins import ATTRIBUTES_SINCE, NAMESPACE, read_kernels, registered
from moma_rt.backends.libraries import version_tuple
from moma_rt.bundle.manifest import Bundle

Sizes = dict[str, int]


class Dimension:
    """A dimension, as a function of the named sizes."""

    def __init__(self, at: Callable[[Sizes], int]) -> None:
        self.at = at


class Builder:
    """Builds expressions of dimensions, from these operations only."""

    OPERATIONS = {  # noqa: RUF012
        "SUM": operator.add,
        "PROD": operator.mul,
        "FLOOR_DIV": operator.floordiv,
        "CEIL_DIV": lambda a, b: -(-a // b),
    }

    def constant(self, value: int) -> Dimension:
        return Dimension(lambda _: value)

    def operation(self, kind: Any, first: Dimension, second: Dimension) -> Dimension:
        compute = self.OPERATIONS[kind.name]
        return Dimension(lambda sizes: compute(first.at(sizes), second.at(sizes)))

    def of(self, size: int | str) -> Dimension:
        return self.constant(size) if isinstance(size, int) else Dimension(lambda sizes: sizes[size])


class Registry(dict):
    """TensorRT's registry: creators by name and namespace."""

    def register_creator(self, creator: Any, namespace: str) -> bool:
        assert (creator.name, namespace) not in self
        self[creator.name, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        assert version == "1"
        return self.get((name, namespace))

    def deregister_creator(self, creator: Any) -> bool:
        return self.pop((creator.name, NAMESPACE)) is creator


class Arguments(list):
    """The kernel's extra arguments; assigning `nbSymExprs` sets their number, as in TensorRT."""

    def __setattr__(self, name: str, value: int) -> None:
        assert name == "nbSymExprs"
        self.extend([None] * value)


REGISTRY = Registry()
trt.get_plugin_registry = lambda: REGISTRY
trt.IDimensionExpr = Dimension
trt.DimsExprs = lambda length: [None] * length
trt.ISymExpr = type("ISymExpr", (), {})


def tensor(shape: list[int | str], dtype: Any) -> Any:
    found = trt.DynamicPluginTensorDesc()
    found.desc.dims = [size if isinstance(size, int) else -1 for size in shape]
    found.desc.type, found.desc.format = dtype, trt.TensorFormat.LINEAR
    return found


def create(layer: dict[str, Any]) -> Any:
    """Create a layer's plugin as the parser does: an attribute is one int64 or float32 number."""
    dtypes = {int: np.int64, float: np.float32}
    # Older releases convert an array of one element to a number, which a newer NumPy refuses.
    shape = 1 if version_tuple(trt.__version__) >= ATTRIBUTES_SINCE else ()
    attributes = {name: np.full(shape, value, dtypes[type(value)]) for name, value in layer["attributes"].items()}
    fields = [SimpleNamespace(name=name, data=data) for name, data in attributes.items()]
    creator = REGISTRY.get_creator(layer["operator"], "1", NAMESPACE)
    request = trt.QuickPluginCreationRequest.PREFER_AOT
    return creator.create_plugin(layer["operator"], NAMESPACE, fields, trt.TensorRTPhase.BUILD, request)


def answers_for(layer: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Return the plugin's answers for a layer, asked for in TensorRT's order."""
    builder, inputs, plugin = Builder(), layer["inputs"], create(layer)
    dtypes = plugin.get_output_data_types([dtype] * len(inputs), [len(shape) for shape in inputs])
    outputs = plugin.get_output_shapes([[builder.of(size) for size in shape] for shape in inputs], [], builder)
    # TensorRT also gives the constant dimensions of outputs, which the plugins do not read.
    in_out = [tensor(shape, dtype) for shape in inputs] + [tensor(["?"] * len(shape), dtype) for shape in outputs]
    combinations = plugin.get_supported_format_combinations(in_out, len(inputs))
    plugin.configure_plugin(in_out[: len(inputs)], in_out[len(inputs) :])
    tactics = plugin.get_valid_tactics() or [0]
    plugin.set_tactic(tactics[0])
    launch, arguments = SimpleNamespace(), Arguments()
    plugin.get_launch_params(None, in_out, len(inputs), launch, arguments, builder)
    descriptions = [t.desc for t in in_out]
    name, code = plugin.get_kernel(descriptions[: len(inputs)], descriptions[len(inputs) :])
    return {
        "outputs": plugin.get_num_outputs(),
        "dtypes": [dtype.name for dtype in dtypes],
        "combinations": [[c.type.name, c.format.name] for c in combinations],
        "tactics": tactics,
        "kernel": [name, code.decode()],
        "at": [
            {
                "shapes": [[size.at(sizes) for size in shape] for shape in outputs],
                "launch": {name: expression.expr.at(sizes) for name, expression in vars(launch).items()},
                "arguments": [[a.type.name, a.dtype.name, a.expr.at(sizes)] for a in arguments],
            }
            for sizes in layer["sizes"]
        ],
    }


def main() -> None:
    request = json.load(sys.stdin)
    bundle, answers = Bundle.open(request["kernels"]), []
    (entry,) = (entry for entry in bundle.manifest.kernels if entry.capability == request["capability"])
    kernels = read_kernels(bundle, entry, request["dtype"])
    # Twice: a process may build several bundles, each with its own kernels.
    with registered(kernels):
        assert len(REGISTRY) == 2
    assert not REGISTRY
    with registered(kernels):
        for layer in request["layers"]:
            try:
                answers.append(answers_for(layer, getattr(trt.DataType, layer["dtype"])))
            except Exception as error:
                answers.append({"error": str(error)})
    assert not REGISTRY
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
