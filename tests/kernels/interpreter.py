"""Runs kernels in Triton's interpreter: a process of its own, since Triton decides at its import whether it interprets.

Reads pickled (operator, tensors, heads, launch) from standard input and writes the outputs, or the error, to standard
output, until the input ends. Memory that a launch allocates is full of NaN before the kernel writes to it.
"""

import importlib
import os
import pickle
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle, interpreter_builder

CAPABILITY = 90


def widened(handle: TensorHandle) -> TensorHandle:
    """Convert bfloat16 to float32, since the interpreter's `dot` multiplies its bits as integers."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def load(operator: str):
    module = importlib.import_module(f"kernels.{operator}.triton_kernel")
    module.wrap_triton = lambda kernel: kernel
    if hasattr(module, "compute_capability"):
        module.compute_capability = lambda tensor: CAPABILITY
    return module


def main() -> None:
    dot = interpreter_builder.create_dot
    interpreter_builder.create_dot = lambda a, b, *rest: dot(widened(a), widened(b), *rest)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    np.seterr(all="ignore")
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    modules = {name: load(name) for name in ("injected_self_attention", "context_cross_attention")}
    while True:
        try:
            operator, tensors, heads, config = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = modules[operator].launch(tensors, heads, config)
        except Exception as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
