import copy
import json
from pathlib import Path

import pytest
import torch

from examples.mini_moma.checkpoint import write_checkpoint
from export.checkpoints import ROLES, CheckpointRequest, load_checkpoint
from export.geometry import geometry_of
from export.tokenizers import language_tokenizer, text_tokenizer
from moma_rt.errors import CheckpointError
from tests.examples.mini_moma import standin


@pytest.fixture(scope="module")
def tokens(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return standin.tokenizer_folders(hub, tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def trained(tokens):
    return standin.weights(*tokens)


@pytest.fixture(scope="module")
def written(tokens, trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "mini"
    write_checkpoint(folder, trained, *tokens)
    return folder


def test_the_projects_own_loader_reads_back_what_was_written(written, trained, tokens):
    checkpoint = load_checkpoint(CheckpointRequest("mini", weights=str(written)))
    assert checkpoint.base == "mini"
    assert checkpoint.image_size == 128
    assert [component.role for component in checkpoint.components] == list(ROLES)
    loaded = {component.role: component.load() for component in checkpoint.components}
    for role in ("unet", "vae"):
        assert {n: t.half() for n, t in trained[role].items()}.keys() == loaded[role].keys()
        assert all(torch.equal(trained[role][name].half(), tensor) for name, tensor in loaded[role].items())
    for role, prefix in (("text_encoder", "text_model."), ("vision", "vision_model."), ("language", "model.")):
        bare = {name.removeprefix(prefix): tensor for name, tensor in loaded[role].items()}
        given = {name.removeprefix(prefix): tensor.half() for name, tensor in trained[role].items()}
        assert bare.keys() == given.keys()
        assert all(torch.equal(given[name], tensor) for name, tensor in bare.items())
    assert text_tokenizer(checkpoint.text_tokenizer).to_str() == text_tokenizer(tokens[0]).to_str()
    assert language_tokenizer(checkpoint.language_tokenizer).to_str() == language_tokenizer(tokens[1]).to_str()


def test_adapters_have_the_originals_order_of_layers(written, trained):
    stored = torch.load(written / "attn_adapters_projectors.th", weights_only=True)
    assert list(stored) == ["projectors", "self_cross_attentions", "llm_mapping"]
    attentions = stored["self_cross_attentions"]
    assert {name.split(".")[0] for name in attentions} == {str(number) for number in range(32)}
    assert {name.split(".")[0] for name in attentions if "scale" in name} == {str(n) for n in range(0, 32, 2)}
    adapters = load_checkpoint(CheckpointRequest("mini", weights=str(written))).adapters.load()
    for number, path in (
        (0, "down_blocks.0.attentions.0"),
        (12, "up_blocks.1.attentions.0"),
        (30, "mid_block.attentions.0"),
    ):
        name = f"attention.{path}.transformer_blocks.0.attn1.to_k_ip.weight"
        assert torch.equal(adapters[name], attentions[f"{number}.to_k_ip.weight"])


def test_all_weights_are_in_half_precision_and_small(written):
    assert sum(path.stat().st_size for path in written.rglob("*") if path.is_file()) < 13_500_000
    checkpoint = load_checkpoint(CheckpointRequest("mini", weights=str(written)))
    assert {tensor.dtype for c in checkpoint.components for tensor in c.load().values()} == {torch.float16}


def test_the_libraries_read_it_too(written):
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(written / "base")
    assert (pipeline.vae_scale_factor, pipeline.unet.config.sample_size) == (8, 16)
    assert pipeline.scheduler.config.steps_offset == 1
    assert pipeline.tokenizer.model_max_length >= 77


def test_geometry_is_the_presets(written):
    random = geometry_of(load_checkpoint(CheckpointRequest("mini", weights="random")))
    stored = geometry_of(load_checkpoint(CheckpointRequest("mini", weights=str(written))))
    assert stored.self_attention == random.self_attention
    assert (stored.image_size, stored.language.image_tokens) == (128, 64)


@pytest.mark.parametrize(
    ("role", "value", "said"),
    [
        ("vae", 70_000.0, "beyond half precision's 65,504"),
        ("unet", float("nan"), "NaN"),
        ("language", float("inf"), "inf"),
    ],
)
def test_values_that_cannot_be_stored_leave_nothing(trained, tokens, tmp_path, role, value, said):
    weights = {**trained, role: dict(trained[role])}
    name = next(iter(weights[role]))
    weights[role][name] = torch.full_like(weights[role][name], value)
    with pytest.raises(CheckpointError, match=said) as caught:
        write_checkpoint(tmp_path / "mini", weights, *tokens)
    assert name in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_adapters_beyond_half_precision(trained, tokens, tmp_path):
    weights = {**trained, "adapters": copy.deepcopy(trained["adapters"])}
    weights["adapters"]["projectors"]["proj.bias"][0] = 1e6
    with pytest.raises(CheckpointError, match="projectors has proj.bias of up to 1e"):
        write_checkpoint(tmp_path / "mini", weights, *tokens)


def test_parts_that_do_not_fit_leave_the_old_folder_as_it_was(trained, tokens, tmp_path):
    write_checkpoint(tmp_path / "mini", trained, *tokens)
    (tmp_path / "mini" / "LICENSE.txt").write_text("of the icons")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "mini").rglob("*")}
    wrong = {**trained, "unet": {**trained["unet"], "conv_in.bias": torch.zeros(5)}}
    with pytest.raises(CheckpointError, match=r"conv_in.bias is \[5\]"):
        write_checkpoint(tmp_path / "mini", wrong, *tokens)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "mini").rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["mini"]
    write_checkpoint(tmp_path / "mini", standin.weights(*tokens, seed=1), *tokens)
    assert (tmp_path / "mini" / "LICENSE.txt").read_text() == "of the icons"
    assert [path.name for path in tmp_path.iterdir()] == ["mini"]
    changed = load_checkpoint(CheckpointRequest("mini", weights=str(tmp_path / "mini"), roles=frozenset({"unet"})))
    assert not torch.equal(changed.unet.load()["conv_in.weight"], trained["unet"]["conv_in.weight"].half())


def test_a_role_that_is_missing(tokens, tmp_path):
    with pytest.raises(CheckpointError, match="lacks vae, text_encoder, language, vision, adapters; it has unet"):
        write_checkpoint(tmp_path / "mini", {"unet": {}}, *tokens)


def test_vocabularies_come_from_the_tokenizers(written, tokens):
    for config, tokenizer in (
        ("base/text_encoder/config.json", text_tokenizer(tokens[0])),
        ("mllm/config.json", language_tokenizer(tokens[1])),
    ):
        assert json.loads((written / config).read_text())["vocab_size"] == tokenizer.get_vocab_size()
