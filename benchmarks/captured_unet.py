"""diffusers' UNet in a CUDA graph."""

from typing import Any

import torch
from torch import Tensor, nn

from moma_rt.errors import InputError

_WARM_UPS = 3


class CapturedUnet:
    """Called as the UNet is, always with inputs of the same shapes: captured by the first call, replayed by each.

    What a call returns is overwritten by the next one. Without attention arguments, which a graph could not be given.

    Raises:
        InputError: there is no CUDA GPU.
    """

    def __init__(self, unet: nn.Module) -> None:
        if not torch.cuda.is_available():
            raise InputError("a CUDA graph of the UNet needs a CUDA GPU")
        self._unet = unet
        self._graph: Any = None
        self._inputs: tuple[Tensor, ...] = ()
        self._output: Tensor | None = None

    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor,
        *,
        encoder_hidden_states: Tensor,
        cross_attention_kwargs: None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """The noise that the UNet predicts, in a tuple, as it returns it with `return_dict=False`."""
        given = (latents, timestep, encoder_hidden_states)
        if self._graph is None:
            self._inputs = tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in given)
            self._capture()
        for own, tensor in zip(self._inputs, given, strict=True):
            own.copy_(tensor)
        self._graph.replay()
        assert self._output is not None
        return (self._output,)

    def _run(self) -> Tensor:
        latents, timestep, text = self._inputs
        output: Tensor = self._unet(latents, timestep, encoder_hidden_states=text, return_dict=False)[0]
        return output

    def _capture(self) -> None:
        stream: Any = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._output = self._run()
