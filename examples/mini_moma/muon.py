"""The Muon optimizer for matrices and convolutions.

`torch.optim.Muon` takes two-dimensional parameters only, and most of a UNet's are convolutions.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Newton-Schulz iteration: Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 4
# Makes an update as large as AdamW's: Liu et al., "Muon is scalable for LLM training", 2025.
_UPDATE_SCALE = 0.2


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonal updates; a convolution is a matrix of its output channels.

    Args:
        lr: learning rate, comparable with AdamW's.
        momentum: of the gradient's running mean, with Nesterov's look-ahead.
        weight_decay: decoupled, as AdamW's.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters that have a gradient; processes that average gradients share the work."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            directions = [self._direction(p, group["momentum"]) for p in parameters]
            for parameter, update in zip(parameters, _orthogonal_updates(directions), strict=True):
                longest = max(parameter.shape[0], parameter[0].numel())
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * _UPDATE_SCALE * longest**0.5)

    def _direction(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        assert parameter.grad is not None
        mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
        mean.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(mean, momentum)


def _orthogonal_updates(directions: list[Tensor]) -> list[Tensor]:
    """Make every direction orthogonal; with several processes, each does a part, and all get the same result."""
    is_shared = dist.is_initialized() and dist.get_world_size() > 1
    rank, count = (dist.get_rank(), dist.get_world_size()) if is_shared else (0, 1)
    order = sorted(range(len(directions)), key=lambda index: directions[index].numel())
    mine = set(order[rank::count])
    updates = [
        orthogonal(direction.flatten(1)).flatten() if index in mine else torch.zeros(direction.numel())
        for index, direction in enumerate(directions)
    ]
    flat = torch.cat(updates)
    if is_shared:
        dist.all_reduce(flat)
    parts = flat.split([direction.numel() for direction in directions])
    return [part.view(direction.shape) for part, direction in zip(parts, directions, strict=True)]


def orthogonal(matrix: Tensor) -> Tensor:
    """Approximate the nearest matrix whose singular values are all 1; they end between about 0.7 and 1.2."""
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if is_tall else x
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


def suits(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a matrix large enough for orthogonal updates to make sense."""
    return parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) >= 16
