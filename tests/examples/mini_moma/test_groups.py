import numpy as np
import pytest

from examples.mini_moma import groups as module
from examples.mini_moma.backgrounds import CONTEXTS, STUDIO
from examples.mini_moma.groups import BackgroundPool, chunk_folders, compose_group, read_chunk, write_chunk
from moma_rt.errors import InputError


@pytest.fixture
def pool():
    """Every place has a gray of its own."""
    grays = np.arange(13, dtype=np.uint8)[:, None, None, None, None] * 10
    return BackgroundPool(np.broadcast_to(grays, (13, 2, 128, 128, 3)))


def composed(icons, pool, seed):
    return compose_group(icons[0], "other thing", np.random.default_rng(seed), pool)


def test_the_pool_draws_by_context(pool):
    rng = np.random.default_rng(0)
    for index, context in enumerate((*CONTEXTS, STUDIO)):
        assert (pool(context, rng) == 10 * index).all()


def test_a_group_is_drawn_from_a_seed(icons, pool):
    first, again, other = (composed(icons, pool, seed) for seed in (0, 0, 1))
    assert first.prompts == again.prompts != other.prompts
    assert np.array_equal(first.photo.picture_hwc, again.photo.picture_hwc)
    assert len(first.targets) == len(first.prompts) == len(first.strengths) == 4


def test_prompts_say_what_the_pictures_show(icons, pool):
    made = [composed(icons, pool, seed) for seed in range(40)]
    of_texture = 0
    for group in made:
        for scene, prompt, strength in zip(group.targets, group.prompts, group.strengths, strict=True):
            corner = int(scene.picture_hwc[0, 0, 0])
            contexts = [
                context for context, phrases in CONTEXTS.items() if prompt.endswith(tuple(f" {p}." for p in phrases))
            ]
            if strength == 0.4:
                assert (corner, contexts) == (120, [])
                of_texture += 1
            else:
                assert strength == 1.0
                assert corner == 10 * list(CONTEXTS).index(contexts[0])
            assert group.name in prompt
    assert 0.1 < of_texture / 160 < 0.3
    assert 0 < sum(group.name == "other thing" for group in made) < 12
    plain = [int(group.photo.picture_hwc[0, 0, 0]) == 120 for group in made]
    assert 0.35 < np.mean(plain) < 0.85


def test_a_chunk_is_read_as_it_was_written(icons, pool, tmp_path):
    made = [composed(icons, pool, seed) for seed in range(2)]
    write_chunk(tmp_path / "groups" / "train-000", made)
    (folder,) = chunk_folders(tmp_path, "train")
    chunk = read_chunk(folder)
    for index, group in enumerate(made):
        assert np.array_equal(chunk.photos_nhwc[index], group.photo.picture_hwc)
        assert np.array_equal(chunk.masks_nhw[index], group.photo.mask_hw)
        for k, scene in enumerate(group.targets):
            assert np.array_equal(chunk.targets_nkhwc[index, k], scene.picture_hwc)
            share = scene.mask_hw[32:40, 64:72].mean()
            assert abs(chunk.coverage_nkhw[index, k, 4, 8] / 255 - share) < 0.003
        assert chunk.names[index] == group.name
        assert tuple(chunk.prompts[index]) == group.prompts
        assert tuple(chunk.strengths[index]) == group.strengths
    assert chunk.masks_nhw.dtype == bool
    assert chunk.coverage_nkhw.shape == (2, 4, 16, 16)


def test_chunks_are_listed_by_split_in_order(tmp_path):
    for name in ("train-001", "train-000", "heldout-000"):
        (tmp_path / "groups" / name).mkdir(parents=True)
    assert [folder.name for folder in chunk_folders(tmp_path, "train")] == ["train-000", "train-001"]
    assert [folder.name for folder in chunk_folders(tmp_path, "heldout")] == ["heldout-000"]
    assert chunk_folders(tmp_path / "none", "train") == []


def test_a_chunk_is_replaced_as_a_whole_or_stays(icons, pool, tmp_path, monkeypatch):
    folder = tmp_path / "groups" / "train-000"
    write_chunk(folder, [composed(icons, pool, 0)])
    (folder / "latents.safetensors").write_bytes(b"of other pictures")
    before = (folder / "photos.npy").read_bytes()
    save, written = np.save, []

    def fail(path, array):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        save(path, array)

    monkeypatch.setattr(module.np, "save", fail)
    with pytest.raises(InputError, match=rf"cannot write {folder}: No space left on device"):
        write_chunk(folder, [composed(icons, pool, 1)])
    assert len(written) == 2
    assert [path.name for path in folder.parent.iterdir()] == ["train-000"]
    assert (folder / "photos.npy").read_bytes() == before
    monkeypatch.setattr(module.np, "save", save)
    write_chunk(folder, [composed(icons, pool, 1)])
    assert (folder / "photos.npy").read_bytes() != before
    assert [path.name for path in folder.parent.iterdir()] == ["train-000"]
    assert not (folder / "latents.safetensors").exists()
