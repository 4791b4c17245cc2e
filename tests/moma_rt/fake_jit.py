"""TensorRT-RTX's runtime cache and configuration, for `fake_gpu`."""

import enum


class RuntimeCache:
    """`IRuntimeCache`: a line for each set of shapes that was compiled for."""

    HEADER = "compiled by 11.4.0 for this device"

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.compiled = 0

    def compile(self, shapes: str) -> None:
        if shapes not in self.lines:
            self.lines.append(shapes)
            self.compiled += 1

    def serialize(self) -> bytes:
        return "\n".join([self.HEADER, *self.lines]).encode()

    def deserialize(self, blob: bytes) -> bool:
        header, *lines = bytes(blob).decode(errors="replace").split("\n")
        if header != self.HEADER:
            return False
        self.lines = lines
        return True


class RuntimeConfig:
    """`IRuntimeConfig`."""

    dynamic_shapes_kernel_specialization_strategy: enum.Enum

    def set_execution_context_allocation_strategy(self, strategy: enum.Enum) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True

    def get_runtime_cache(self) -> RuntimeCache:
        return self.cache
