import numpy as np
import torch

from examples.mini_moma import context
from examples.mini_moma.context import ContextTask, SubjectReader
from tests.examples.mini_moma.test_joint import unused


def test_every_parameter_that_is_used_gets_a_gradient(drawn_data, monkeypatch):
    monkeypatch.setattr(context, "_PHOTOS", 2)
    torch.manual_seed(0)
    task = ContextTask(drawn_data)
    error, shown = task.loss(np.random.default_rng(0), 0.0)
    error.backward()
    assert shown["mse"] == error.item() > 0
    assert list(shown) == ["mse", "r2"]
    without = {name for name, parameter in task.module.named_parameters() if parameter.grad is None}
    assert without
    assert without == {name for name, _ in task.module.named_parameters() if unused(name)}
    assert not any(task.uses_muon(name, parameter) for name, parameter in task.module.named_parameters())


def test_what_is_to_be_read_are_cells_and_the_mean_color_of_the_subject(drawn_data):
    task = ContextTask(drawn_data)
    batch = task.samples.batch([(0, 0), (0, 1)])
    white, colors = 2.0, torch.tensor([[0.5, 1.0, -1.0], [-1.5, 0.0, 1.5]])
    pixels = torch.full((2, 3, 112, 112), white)
    # The second is half as tall.
    pixels[0, :, :56], pixels[1, :, :28] = colors[0, :, None, None], colors[1, :, None, None]
    batch.pixels_pchw.copy_(pixels)
    wanted = []
    for color, rows in zip(colors, (4, 2), strict=True):
        cells = torch.full((3, 8, 8), white)
        cells[:, :rows] = color[:, None, None]
        wanted.append(torch.cat([cells.flatten(), 2 * (color - white)]))
    embedding = torch.zeros(8, 1024)
    embedding[:4, 0], embedding[4:, 1] = 1, 1
    reader = SubjectReader()
    with torch.no_grad():
        reader.read.bias.zero_()
        reader.read.weight.zero_()
        blind, explains_nothing = reader.error(embedding, batch)
        reader.read.weight[:, 0], reader.read.weight[:, 1] = wanted[0], wanted[1]
        error, explained = reader.error(embedding, batch)
    assert error < 1e-9 < blind
    assert explains_nothing <= 0 < 0.9999 < explained
