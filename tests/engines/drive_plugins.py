"""Take the plugins through what TensorRT calls to build a layer, in a process of its own, with its `tensorrt.plugin`.

python drive_plugins.py < {"kernels": a bundle's folder, "capability": 80, "dtype": "float16", "layers": [layer]}
-> last line: a list as long, of what TensorRT is told of each layer, or {"error": what it is told instead}

A layer is {"operator", "attributes": {name: number}, "inputs": [shape of numbers and names], "sizes": [{name: size}]}.
TensorRT's native part is replaced where it would compute: dimensions here are functions of the sizes behind the names,
and the registry is a dictionary. The plugins, their creators and the checks of their signatures are TensorRT's.
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
    """A dimension, as a function of the sizes behind the names."""

    def __init__(self, at: Callable[[Sizes], int]) -> None:
        self.at = at


class Builder:
    """What makes expressions of dimensions; only with these operations."""

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
    """The kernel's further arguments, as TensorRT has them set."""

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
    """As the parser does: an attribute is one number of 64 or of 32 bits."""
    dtypes = {int: np.int64, float: np.float32}
    # What the older releases do with one number in an array only an older NumPy would do.
    shape = 1 if version_tuple(trt.__version__) >= ATTRIBUTES_SINCE else ()
    attributes = {name: np.full(shape, value, dtypes[type(value)]) for name, value in layer["attributes"].items()}
    fields = [SimpleNamespace(name=name, data=data) for name, data in attributes.items()]
    creator = REGISTRY.get_creator(layer["operator"], "1", NAMESPACE)
    request = trt.QuickPluginCreationRequest.PREFER_AOT
    return creator.create_plugin(layer["operator"], NAMESPACE, fields, trt.TensorRTPhase.BUILD, request)


def told(layer: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """What TensorRT learns of a layer, in the order in which it asks."""
    builder, inputs, plugin = Builder(), layer["inputs"], create(layer)
    dtypes = plugin.get_output_data_types([dtype] * len(inputs), [len(shape) for shape in inputs])
    outputs = plugin.get_output_shapes([[builder.of(size) for size in shape] for shape in inputs], [], builder)
    # TensorRT knows a constant dimension of an output as well; the plugins ask for none.
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
    # Twice: a process may build several bundles, of which each has its own kernels.
    with registered(kernels):
        assert len(REGISTRY) == 2
    assert not REGISTRY
    with registered(kernels):
        for layer in request["layers"]:
            try:
                answers.append(told(layer, getattr(trt.DataType, layer["dtype"])))
            except Exception as error:
                answers.append({"error": str(error)})
    assert not REGISTRY
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
