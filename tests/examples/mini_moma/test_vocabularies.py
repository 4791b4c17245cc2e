import json

import numpy as np
import pytest

from examples.mini_moma.backgrounds import CONTEXTS
from examples.mini_moma.scenes import TEXTURES
from examples.mini_moma.vocabularies import train_tokenizers
from export.tokenizers import language_tokenizer, save, text_tokenizer
from moma_rt.inputs.tokenizers import LanguageTokenizer, TextTokenizer, text_prompt

ANY = ["a photo", "naïve café", "手机 照片", "🫖🧸 on a beach", "Ω≈ç√∫", "\u0000\u007f", "ß", "123 4567", "don't"]


@pytest.fixture(scope="module")
def text(drawn_data):
    return text_tokenizer(drawn_data / "tokenizers" / "text")


@pytest.fixture(scope="module")
def language(drawn_data):
    return language_tokenizer(drawn_data / "tokenizers" / "language")


def test_sizes(text, language):
    # 512 symbols of bytes, up to 640 merges, two control tokens.
    assert 514 < text.get_vocab_size() <= 512 + 640 + 2
    assert language.get_vocab_size() == 720


@pytest.mark.parametrize("given", ANY)
def test_every_text_can_be_encoded(text, language, given):
    unknown = language.token_to_id("<unk>")
    begin, *inner, end = text.encode(given).ids
    assert begin == text.token_to_id("<|startoftext|>")
    assert end == text.token_to_id("<|endoftext|>")
    # Unknown is the end token.
    assert end not in inner
    assert bool(inner) == given.isprintable()
    ids = language.encode(given).ids
    assert unknown not in ids
    assert language.decode(ids).strip() == given.strip()


def test_every_byte_is_a_token(text, language):
    vocabulary = text.get_vocab()
    single = [token for token in vocabulary if len(token) == 1]
    assert len(single) == 256
    assert all(f"{token}</w>" in vocabulary for token in single)
    assert all(f"<0x{byte:02X}>" in language.get_vocab() for byte in range(256))


def test_words_of_prompts_are_few_tokens(text, language):
    phrases = [phrase for table in (CONTEXTS, TEXTURES) for names in table.values() for phrase in names]
    for phrase in phrases:
        assert len(text.encode(phrase).ids) - 2 <= len(phrase.split()) + 2
    assert len(language.encode("A photo of a teapot. Describe a new image of the same teapot in:").ids) < 30


@pytest.fixture(scope="module")
def runtime(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("runtime") / "text.json"
    save(text, path)
    return TextTokenizer(path)


@pytest.mark.parametrize(("name", "words"), [("teapot", 1), ("red ball", 2), ("手机", 1), ("cat 🐈", 2)])
def test_subject_weights_hit(runtime, name, words):
    runtime.check_subject(name)
    ids = runtime.encode(text_prompt(name, f"A {name} on a beach."))
    weights = runtime.subject_weights(name, ids)
    # Once in the prefix and once in the prompt.
    assert weights.sum() >= 2 * words
    assert set(np.unique(weights)) == {0, 1}
    assert len(set(ids[weights == 1].tolist())) == words


def test_the_runtime_takes_the_language_tokenizer(language, tmp_path):
    save(language, tmp_path / "language.json")
    ids = LanguageTokenizer(tmp_path / "language.json").encode("teapot", "A teapot 🫖 in 雪.", 720, 64)
    assert ids[0] == language.token_to_id("<s>")
    assert np.count_nonzero(ids >= 720) == 64
    assert language.decode(ids[ids < 720].tolist()).endswith("A teapot 🫖 in 雪.. ASSISTANT: *")


def test_training_is_repeatable_and_done_once(tmp_path):
    names = ["wooden table", "snow man", "car", "guitar", "dragon", "horse", "red ball", "green cone"]
    for folder in ("first", "second"):
        train_tokenizers(tmp_path / folder, names)
    files = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.*")]
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "first").rglob("*.*")}
    train_tokenizers(tmp_path / "first", ["something", "else"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "first").rglob("*.*")} == before
    # The last file says that all are there.
    (tmp_path / "first" / "language" / "tokenizer_config.json").unlink()
    train_tokenizers(tmp_path / "first", names)
    assert json.loads((tmp_path / "first" / "language" / "tokenizer_config.json").read_text())["add_bos_token"]
