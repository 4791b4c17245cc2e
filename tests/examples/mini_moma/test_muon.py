import pytest
import torch
from torch import nn

from examples.mini_moma.muon import Muon, orthogonal, suits


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
def test_singular_values_become_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    result = orthogonal(matrix)
    assert result.shape == shape
    values = torch.linalg.svdvals(result)
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.25
    # The directions stay.
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    middle = u.T @ result @ v.T
    assert float((middle - middle.diag().diag()).abs().max()) < 1e-4


def test_nothing_to_do_for_zeros():
    assert torch.equal(orthogonal(torch.zeros(16, 16)), torch.zeros(16, 16))


@pytest.mark.parametrize("layer", [nn.Linear(16, 24, bias=False), nn.Conv2d(16, 24, 3, padding=1, bias=False)])
def test_a_regression_converges(layer):
    generator = torch.Generator().manual_seed(0)
    shape = (64, 16) if isinstance(layer, nn.Linear) else (8, 16, 6, 6)
    inputs = torch.randn(shape, generator=generator)
    with torch.no_grad():
        nn.init.normal_(layer.weight, std=0.1, generator=generator)
        wanted = layer(inputs)
        layer.weight.zero_()
    optimizer, errors = Muon(layer.parameters(), lr=0.1), []
    for step in range(60):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 60)
        error = (layer(inputs) - wanted).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.01 * errors[0]


def test_an_update_is_as_large_as_adams():
    weight = nn.Parameter(torch.zeros(64, 32))
    weight.grad = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=0.1).step()
    # AdamW moves each number by about 0.2 of the rate in the long run.
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.1 * 0.2, rel=0.25)


def test_weights_decay_and_those_without_gradient_stay():
    moved, still = nn.Parameter(torch.ones(16, 16)), nn.Parameter(torch.ones(16, 16))
    moved.grad = torch.zeros(16, 16)
    Muon([moved, still], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(moved, torch.full((16, 16), 0.95))
    assert torch.equal(still, torch.ones(16, 16))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((16, 16), True),
        ((32, 4, 3, 3), True),
        ((16,), False),
        ((4, 64), False),
        ((64, 8), False),
        ((64, 1, 3, 3), False),
    ],
)
def test_suits_matrices_of_some_size(shape, expected):
    assert suits(nn.Parameter(torch.zeros(shape))) is expected
