"""Runs diffusers' UNet as a CUDA graph."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moma_rt.errors import InputError

_WARM_UPS = 3


@dataclass(frozen=True, eq=False)
class _Captured:
    """A graph, and the tensors that it reads and writes."""

    graph: Any
    inputs: tuple[Tensor, ...]
    output: Tensor


class CapturedUnet:
    """Replaces a UNet in calls: the first call with inputs of some shapes captures a graph, later ones replay it.

    Each call overwrites the tensor that the previous one returned. Takes no attention arguments, which a graph cannot
    receive.

    Raises:
        InputError: there is no CUDA GPU.
    """

    def __init__(self, unet: nn.Module) -> None:
        if not torch.cuda.is_available():
            raise InputError("a CUDA graph of the UNet needs a CUDA GPU")
        self._unet = unet
        self._captured: dict[tuple[torch.Size, ...], _Captured] = {}

    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor,
        *,
        encoder_hidden_states: Tensor,
        cross_attention_kwargs: None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Return the predicted noise in a tuple, as the UNet does with `return_dict=False`."""
        given = (latents, timestep, encoder_hidden_states)
        shapes = tuple(tensor.shape for tensor in given)
        if shapes not in self._captured:
            self._captured[shapes] = self._capture(given)
        captured = self._captured[shapes]
        for own, tensor in zip(captured.inputs, given, strict=True):
            own.copy_(tensor)
        captured.graph.replay()
        return (captured.output,)

    def _capture(self, given: tuple[Tensor, ...]) -> _Captured:
        inputs = tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in given)
        latents, timestep, text = inputs

        def run() -> Tensor:
            output: Tensor = self._unet(latents, timestep, encoder_hidden_states=text, return_dict=False)[0]
            return output

        stream: Any = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            output = run()
        return _Captured(graph, inputs, output)
