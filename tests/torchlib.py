"""PyTorch's exporter reads its library of ONNX functions anew for each network, a second each; here once a process."""

import functools


def read_once(*, now: bool = False) -> None:
    """Read it at the first export of this process only, or now.

    The exporter only iterates over what was read, so tests cannot disturb each other. A PyTorch that keeps the library
    elsewhere is left as it is: slower.
    """
    try:
        from torch.onnx._internal._lazy_import import onnxscript_apis

        read = onnxscript_apis.get_torchlib_ops
    except (ImportError, AttributeError):
        return
    if not hasattr(read, "cache_info"):
        onnxscript_apis.get_torchlib_ops = functools.cache(read)
    if now:
        onnxscript_apis.get_torchlib_ops()
