"""Cutting out, softening and training the scorers; the trained ones are as accurate as their card says."""

import json

import numpy as np
import pytest
import torch

from benchmarks.quality.scorers import training
from benchmarks.quality.scorers.accuracy import accuracy, intersection_over_union
from benchmarks.quality.scorers.command import main
from benchmarks.quality.scorers.cutouts import CUTOUT_SIDE, cutout
from benchmarks.quality.scorers.networks import Embedder, Reader
from benchmarks.quality.scorers.samples import render, render_all
from benchmarks.quality.scorers.scorer import CARD, EMBEDDER, FOLDER, GROUNDS, MATERIALS, READER, Scorers
from benchmarks.quality.scorers.softening import Softener, hue_turned
from benchmarks.quality.scorers.training import Plan, embedder_onnx, reader_onnx, train_embedder, train_reader
from moma_rt.errors import InputError


@pytest.fixture(scope="module")
def scorers():
    return Scorers()


@pytest.fixture(scope="module")
def trained(subjects):
    """Two steps of training: what matters is that it runs, and gives networks that are exported as they are."""
    samples = render(subjects[:5], np.random.default_rng(0))
    plan = Plan(reader_steps=2, embedder_steps=2)
    reader = train_reader(samples, plan)
    return samples, reader, train_embedder(samples, reader, plan)


def disc(center: tuple[int, int], radius: int, side: int = 128) -> np.ndarray:
    y, x = np.mgrid[:side, :side]
    return (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2


def test_a_cutout_does_not_depend_on_place_size_or_ground():
    cut = []
    for center, radius, ground in (((64, 64), 40, 0), ((40, 90), 20, 200), ((20, 10), 16, 90)):
        mask = disc(center, radius)
        picture = np.where(mask[..., None], (200, 30, 30), ground).astype(np.uint8)
        cut.append(cutout(picture, mask).astype(int))
    assert cut[0].shape == (CUTOUT_SIDE, CUTOUT_SIDE, 3)
    assert np.abs(cut[0] - cut[1]).mean() < 4
    assert tuple(cut[0][32, 32]) == (200, 30, 30)
    assert (cut[0][0, 0] == 255).all()
    assert 0.3 < (cut[0][..., 1] < 100).mean() < 0.6, "it fills the window"
    # The third touches the picture's edge: what is not there is white.
    assert (cut[2][0] == 255).all()


def test_stray_pixels_hardly_move_a_cutout_and_an_empty_mask_is_white():
    mask, picture = disc((64, 64), 30), np.full((128, 128, 3), 50, np.uint8)
    stray = mask.copy()
    stray[2:4, 2:4] = True
    assert np.abs(cutout(picture, mask).astype(int) - cutout(picture, stray)).mean() < 10
    np.testing.assert_array_equal(
        cutout(picture, mask.astype(np.float32)), cutout(picture, np.where(mask, 1.0, 0).astype(np.float32))
    )
    assert (cutout(picture, np.zeros((128, 128), bool)) == 255).all()


def test_samples_say_what_they_show(subjects):
    samples = render(subjects[:4], np.random.default_rng(1))
    assert samples.pictures_nkhwc.shape == (4, 4, 128, 128, 3)
    assert (samples.materials_nk[:, 0] == MATERIALS.index("none")).all()
    assert (samples.grounds_nk[:, 0] < 12).all()
    everything = render_all(subjects[:2], np.random.default_rng(1))
    assert [GROUNDS[index] for index in everything.grounds_nk[1]] == [*GROUNDS[:12], *["studio"] * 4]
    assert [MATERIALS[index] for index in everything.materials_nk[1]] == [*["none"] * 12, *MATERIALS[:4]]
    assert everything.masks_nkhw.any((2, 3)).all()


def test_softening_stays_in_range_and_bends_masks_along():
    rng = np.random.default_rng(0)
    mask = torch.from_numpy(np.stack([disc((64, 50), 25)] * 8)).float()
    pictures = mask[:, None].expand(-1, 3, -1, -1) * 200 + 20
    changes = []
    for seed in range(6):
        soft, bent = Softener(seed)(pictures, mask)
        assert soft.shape == pictures.shape
        assert (soft.min() >= 0, soft.max() <= 255) == (True, True)
        assert torch.equal(soft, soft.round())
        assert bent is not None
        shown = (soft.mean(1) > 120).numpy()
        assert intersection_over_union(shown, (bent >= 0.5).numpy()).min() > 0.85
        changes.append(float((soft - pictures).abs().mean()))
    assert max(changes) > 5
    again, _ = Softener(3)(pictures)
    other, _ = Softener(3)(pictures)
    assert torch.equal(again, other)
    assert rng is not None


def test_turning_hues_keeps_white_and_gray_and_comes_round():
    pictures = torch.tensor([255.0, 128, 200, 255, 128, 40, 255, 128, 90]).reshape(1, 3, 1, 3)
    third = torch.tensor([2 * np.pi / 3])
    once = hue_turned(pictures, third)
    torch.testing.assert_close(once[..., :2], pictures[..., :2], atol=0.01, rtol=0)
    assert (once[..., 2] - pictures[..., 2]).abs().min() > 40
    torch.testing.assert_close(hue_turned(hue_turned(once, third), third), pictures, atol=0.1, rtol=0)


def test_trained_networks_are_exported_as_they_are(trained, tmp_path):
    samples, reader, embedder = trained
    (tmp_path / READER).write_bytes(reader_onnx(reader))
    (tmp_path / EMBEDDER).write_bytes(embedder_onnx(embedder))
    (tmp_path / CARD).write_text("{}")
    # PyTorch notes for each node the lines it came from, with the paths of this machine.
    assert all(
        b".py" not in (folder / name).read_bytes() for folder in (tmp_path, FOLDER) for name in (READER, EMBEDDER)
    )
    scorers = Scorers(tmp_path)
    pictures = samples.pictures_nkhwc[0]
    reading = scorers.read(pictures)
    with torch.no_grad():
        grounds, materials, masks = reader(torch.from_numpy(pictures))
        expected = embedder(torch.from_numpy(samples.photos_nhwc))
    assert reading.grounds == tuple(GROUNDS[index] for index in grounds.argmax(1))
    assert reading.materials == tuple(MATERIALS[index] for index in materials.argmax(1))
    coarse = reading.masks_nhw.reshape(4, 32, 4, 32, 4).mean((2, 4))
    assert np.abs(coarse - torch.sigmoid(masks).numpy()).mean() < 0.02
    found = scorers.embed(samples.photos_nhwc)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-2)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-4)


def test_training_lowers_the_losses(subjects, monkeypatch):
    """Sixteen steps on six subjects; the last losses are lower than the first ones."""
    torch.set_num_threads(1)
    samples = render(subjects[:6], np.random.default_rng(0))
    losses = []
    minimize = training._Step.minimize
    monkeypatch.setattr(
        training._Step, "minimize", lambda self, loss: (losses.append(loss.item()), minimize(self, loss))
    )
    reader = train_reader(samples, Plan(reader_steps=16))
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    losses.clear()
    train_embedder(samples, reader, Plan(embedder_steps=16))
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_the_scorers_are_as_accurate_as_their_card_says(scorers, subjects):
    card = scorers.card["accuracy"]
    for of in (card["renders"], card["softened_renders"]):
        assert of["context"] >= 0.98
        assert of["material"] >= 0.93
        assert of["retrieval"] >= 0.93
        assert of["retrieval_gray"] >= 0.8
        assert of["retrieval_recoloured"] >= 0.9
    assert card["renders"]["mask_iou"] >= 0.8
    found = accuracy(scorers, render_all(subjects[:8], np.random.default_rng(5)))
    assert found["context"] >= card["renders"]["context"] - 0.05
    assert found["mask_iou"] >= card["renders"]["mask_iou"] - 0.06


def test_the_documentation_has_the_cards_numbers(scorers, repository):
    text = (repository / "docs" / "quality.md").read_text(encoding="utf-8")
    card = scorers.card["accuracy"]
    for name, value in card["renders"].items():
        numbers = [value, *([card["softened_renders"][name]] if name in card["softened_renders"] else [])]
        assert f"| {' | '.join(f'{number:.3f}' for number in numbers)} |" in text, name


def test_the_scorers_are_small():
    assert sum((FOLDER / name).stat().st_size for name in (READER, EMBEDDER)) < 1.5e6
    assert sum(p.numel() for network in (Reader(), Embedder()) for p in network.parameters()) < 700_000


def test_a_folder_without_scorers_says_how_to_make_them(tmp_path):
    with pytest.raises(InputError, match=r"has no reader.onnx, embedder.onnx, scorers.json; train: python -m"):
        Scorers(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reader-steps", "0"], "--reader-steps 0: at least 1 is needed"),
        (["--data", "nowhere"], "nowhere has no icons.npz; first run: python -m examples.mini_moma data"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"benchmarks.quality.scorers: error: {message}\n"
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_networks_and_their_card(subjects, tmp_path, monkeypatch, capsys):
    torch.set_num_threads(1)
    monkeypatch.setattr("examples.mini_moma.icons.load_icons", lambda _: subjects[:3])
    monkeypatch.setattr("examples.mini_moma.icons.heldout_names", lambda: frozenset({subjects[2].name}))
    monkeypatch.setattr("benchmarks.quality.subjects.load_subjects", lambda: subjects[:2])
    steps = ["--reader-steps", "1", "--embedder-steps", "1"]
    assert main([*steps, "--out", str(tmp_path), "--data", "anywhere"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {READER, EMBEDDER, CARD}
    card = json.loads((tmp_path / CARD).read_text())
    assert card["trained_on"] == {"icons": 2, "pictures": 16, "seed": 0}
    assert card["accuracy"]["subjects"] == 2
    assert "MB, in" in capsys.readouterr().out
