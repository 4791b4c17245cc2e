import itertools
import json
import random
import shutil
import unicodedata

import pytest
from tokenizers import Tokenizer

from export.tokenizers import (
    language_tokenizer,
    save,
    synthetic_language_tokenizer,
    synthetic_text_tokenizer,
    text_tokenizer,
)
from moma_rt.errors import CheckpointError
from tests.clip_reference import ClipReference, write_real_vocabulary

CLIP_FOLDER = "SG161222/Realistic_Vision_V4.0_noVAE/tokenizer"
LLAVA_FOLDER = "KunpengSong/MoMA_llava_7b"

ODD_TEXTS = [
    "",
    " ",
    "USER: ",
    "\n A photo of a car. Describe a new image of the same car in: A car. ASSISTANT: *",
    "photo of a teddy bear. A wooden sculpture of a teddy bear on the table.",
    "multiple   spaces    here",
    "trailing  ",
    "line\nbreak\r\nand\ttab",
    "été e\u0301 ÄÖÜ ß İ ﬁ",
    "日本の車",
    "🚗 🏖️ 👨‍👩‍👧",
    "\x00\x7f\u200b\u00a0\u3000",
    "½ ² 12 3.5",
    "It's we'LL don't 'S",
    "aaaaaaaaaaa .......... ----",
    "<0x41> ▁ a▁b",
]


def _random_texts(count):
    generator = random.Random(0)
    parts = ["a", "b", "e", "A", "US", "photo", "car", " ", "  ", "\n", ".", "é", "e\u0301", "日", "😀", "\x00", "▁"]
    parts += ["aaaa", "...", " o", "ho", "an", "'s", "12", "<0x41>"]
    return ["".join(generator.choices(parts, k=generator.randrange(12))) for _ in range(count)]


# Blocks that a prompt may hold something of, and the blocks that the original sets apart with what is next to them.
_BLOCKS = (
    *((0x20, 0x7F),) * 6,
    *((0x0, 0x20), (0x7F, 0x100), (0x100, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE00), (0x1100, 0x1200)),
    *((0x1E00, 0x2070), (0x2070, 0x2C00), (0x2E80, 0x3410), (0x4DB0, 0x4E40), (0x9FE0, 0xA010), (0xAC00, 0xAC80)),
    *((0xE000, 0xE010), (0xF8F0, 0xFB50), (0xFE00, 0xFE30), (0xFF00, 0x10000), (0x1D400, 0x1D800), (0x1F300, 0x1FB00)),
    *((0x20000, 0x20010), (0x2A6D0, 0x2A710), (0x2B730, 0x2B830), (0x2CEA0, 0x2CEB8), (0x2F800, 0x2FA20)),
    *((0x30000, 0x30010), (0xE0000, 0xE0200)),
)


def _is_assigned(code):
    """Whether this Python knows a character: the other libraries know more, and those not assigned are removed."""
    return not 0xD800 <= code < 0xE000 and unicodedata.category(chr(code)) != "Cn"


def _has_a_known_order(code):
    """Whether a character is no mark, or a usual one: `tokenizers` cannot order those of Unicode 10 and later."""
    return 0x300 <= code < 0x370 or not unicodedata.combining(chr(code))


def _random_unicode(count):
    generator = random.Random(1)
    parts = [
        "photo",
        "car",
        "'s",
        "'S",
        "'LL",
        "e\u0301",
        "ΟΔΟΣ",
        "İ",
        "ẞ",
        "日本",
        " ",
        "\n",
        "\u200b",
        "\u200d",
        "\ufe0f",
    ]
    codes = [[c for c in range(*block) if _is_assigned(c) and _has_a_known_order(c)] for block in _BLOCKS]

    def part():
        return generator.choice(parts) if generator.random() < 0.4 else chr(generator.choice(generator.choice(codes)))

    return ["".join(part() for _ in range(generator.randrange(14))) for _ in range(count)]


def _representatives():
    """All characters below U+3400, and of later runs of one category the first and the last."""
    codes = [code for code in range(0x110000) if _is_assigned(code)]
    edges = {code for code in codes if code < 0x3400 or code & 0xFFFE == 0xFFFE}
    for before, code in itertools.pairwise(codes):
        if code != before + 1 or unicodedata.category(chr(before)) != unicodedata.category(chr(code)):
            edges |= {before, code}
    return sorted(map(chr, edges))


@pytest.fixture
def llava_folder(hub, tmp_path):
    folder = tmp_path / "llava"
    folder.mkdir()
    shutil.copy(hub / LLAVA_FOLDER / "tokenizer.model", folder)
    return folder


def _train(folder, **options):
    """Train a small sentencepiece model, by default with Llama's settings."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    settings = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    words = ["photo of a red car", "the bear in the photo", "a   table,  a chair", "aaaa aa aaa aaaaaaaa"]
    folder.mkdir(exist_ok=True)
    with (folder / "tokenizer.model").open("wb") as stream:
        trainer.train(sentence_iterator=iter(words * 50), model_writer=stream, **{**settings, **options})
    return folder


@pytest.fixture(scope="module")
def real_clip(shared):
    """CLIP's real vocabulary."""
    return shared.build("clip-vocabulary", write_real_vocabulary)


@pytest.fixture(scope="module", params=["goldens", "real"])
def vocabulary(request, hub):
    """A folder with vocab.json and merges.txt."""
    return hub / CLIP_FOLDER if request.param == "goldens" else request.getfixturevalue("real_clip")


class TestTextTokenizer:
    def test_ids_are_those_of_the_original(self, vocabulary):
        ours, original = text_tokenizer(vocabulary), ClipReference(vocabulary)
        for text in [*ODD_TEXTS, "a <|endoftext|> b <|startoftext|>", *_random_texts(1000), *_random_unicode(3000)]:
            assert ours.encode(text).ids == original.encode(text), ascii(text)

    def test_every_character_is_cleaned_as_in_the_original(self, hub):
        ours, original = text_tokenizer(hub / CLIP_FOLDER), ClipReference(hub / CLIP_FOLDER)
        for character in _representatives():
            text = f"a{character}b {character} 1{character}!{character}'s"
            assert ours.encode(text).ids == original.encode(text), ascii(text)

    # By transformers 4.37.2, between begin and end.
    @pytest.mark.parametrize(
        ("text", "real", "small"),
        [
            ("photo of a car", [1125, 539, 320, 1615], [556, 534, 320, 561]),
            (
                "日本の車",
                [37156, 19277, 361, 4813, 362, 164, 119, 488],
                [162, 245, 354, 162, 250, 361, 159, 223, 362, 164, 119, 488],
            ),
            ("hello\u200bworld", [12887, 1002], [71, 68, 568, 78, 581, 81, 75, 323]),
            ("\x07bell", [3718], [65, 68, 75, 331]),
            ("\u202eRTL", [81, 8190], [81, 83, 331]),
            # What is removed joins a letter to its accent.
            ("a\u00adb e\u200d\u0301", [3937, 4166], [64, 321, 127, 358]),
            ("\ufffd\ue000\x0b\x85a\nb", [320, 321], [320, 321]),
            (
                "👩\u200d🚀 🏖\ufe0f",
                [18800, 13542, 1109, 28877],
                [172, 253, 239, 102, 172, 253, 248, 478, 172, 253, 237, 244, 171, 116, 493],
            ),
            # A compatibility ideograph, one of extension B, and wide and unbreakable spaces.
            (
                "\uf900\u3000\U00020000\u00a0か",
                [164, 109, 486, 172, 254, 222, 478, 4813, 489],
                [164, 109, 486, 172, 254, 222, 478, 159, 223, 489],
            ),
            *(
                (text, ids, ids)
                for text, ids in (
                    ("ΟΔΟΣ ΑΣΑ", [138, 123, 138, 112, 138, 123, 139, 480, 138, 109, 139, 225, 138, 365]),
                    ("'ſ \u0345x", [6, 129, 379, 343]),
                )
            ),
        ],
    )
    @pytest.mark.parametrize("source", ["goldens", "real"])
    def test_recorded_ids(self, request, hub, source, text, real, small):
        is_real = source == "real"
        folder = request.getfixturevalue("real_clip") if is_real else hub / CLIP_FOLDER
        assert text_tokenizer(folder).encode(text).ids[1:-1] == (real if is_real else small)

    def test_begin_and_end_of_the_real_vocabulary(self, real_clip):
        ids = text_tokenizer(real_clip, 49408).encode("photo of a car").ids
        assert ids == [49406, 1125, 539, 320, 1615, 49407]

    def test_plain_texts_are_read_as_by_newer_versions_of_transformers(self, hub):
        transformers = pytest.importorskip("transformers")
        theirs = transformers.CLIPTokenizerFast.from_pretrained(hub / CLIP_FOLDER)
        ours = text_tokenizer(hub / CLIP_FOLDER)
        plain = [text for text in [*ODD_TEXTS, *_random_texts(1000)] if text.isprintable() and "日" not in text]
        assert len(plain) > 500
        for text in [*plain, "a <|endoftext|> b <|startoftext|>", "line\nbreak\r\nand\ttab"]:
            assert ours.encode(text).ids == theirs(text)["input_ids"], repr(text)

    def test_a_fast_tokenizers_file_is_read_as_the_vocabulary_is(self, hub, tmp_path):
        transformers = pytest.importorskip("transformers")
        folder = hub / CLIP_FOLDER
        transformers.CLIPTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path)
        assert not (tmp_path / "vocab.json").exists()
        tokenizer, whole = text_tokenizer(tmp_path), text_tokenizer(folder)
        for text in [*ODD_TEXTS, *_random_unicode(300)]:
            assert tokenizer.encode(text).ids == whole.encode(text).ids, ascii(text)

    def test_padding_names_the_pad_token_and_nothing_is_cut(self, hub):
        tokenizer = text_tokenizer(hub / CLIP_FOLDER)
        assert tokenizer.padding["pad_id"] == tokenizer.token_to_id("<|endoftext|>")
        assert tokenizer.padding["length"] is None
        assert tokenizer.truncation is None
        assert len(tokenizer.encode("a " * 100).ids) == 102

    def test_pad_token_of_the_folder(self, clip_folder):
        (clip_folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
        tokenizer = text_tokenizer(clip_folder)
        assert (tokenizer.padding["pad_id"], tokenizer.padding["pad_token"]) == (0, "!")
        assert len(tokenizer.encode("").ids) == 2

    def test_a_folder_without_special_tokens_map(self, hub, clip_folder):
        (clip_folder / "special_tokens_map.json").unlink()
        assert text_tokenizer(clip_folder).to_str() == text_tokenizer(hub / CLIP_FOLDER).to_str()

    @pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
    def test_tokenizer_json_serves_when_the_others_are_missing(self, hub, clip_folder, missing):
        whole = text_tokenizer(hub / CLIP_FOLDER)
        save(whole, clip_folder / "tokenizer.json")
        (clip_folder / missing).unlink()
        assert text_tokenizer(clip_folder).to_str() == whole.to_str()

    @pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
    def test_missing_file(self, clip_folder, missing):
        (clip_folder / missing).unlink()
        with pytest.raises(CheckpointError, match=f"no tokenizer in {clip_folder}"):
            text_tokenizer(clip_folder)

    def test_missing_folder(self, tmp_path):
        with pytest.raises(CheckpointError, match="no tokenizer in"):
            text_tokenizer(tmp_path / "absent")

    @pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "special_tokens_map.json"])
    @pytest.mark.parametrize("content", [b'{"a": 1', b"\xff\xfe\x00", b"[1, 2]"])
    def test_corrupt_file(self, clip_folder, name, content):
        (clip_folder / name).write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            text_tokenizer(clip_folder)
        assert str(clip_folder) in str(error.value)
        assert "\n" not in str(error.value)

    def test_truncated_vocabulary(self, clip_folder):
        path = clip_folder / "vocab.json"
        vocabulary = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({k: v for k, v in vocabulary.items() if v < 600}), encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"no CLIP vocabulary: it has no <\|startoftext\|>"):
            text_tokenizer(clip_folder)

    def test_rules_of_another_vocabulary(self, clip_folder):
        (clip_folder / "merges.txt").write_text("#version: 0.2\nqq xx\n", encoding="utf-8")
        with pytest.raises(CheckpointError, match="merges.txt"):
            text_tokenizer(clip_folder)

    def test_another_kind_of_tokenizer_json(self, tmp_path):
        save(synthetic_language_tokenizer(), tmp_path / "tokenizer.json")
        with pytest.raises(CheckpointError, match="no CLIP tokenizer"):
            text_tokenizer(tmp_path)


class TestLanguageTokenizer:
    @pytest.mark.parametrize("source", ["goldens", "trained"])
    def test_ids_are_those_of_sentencepiece(self, hub, tmp_path, source):
        sentencepiece = pytest.importorskip("sentencepiece")
        folder = hub / LLAVA_FOLDER if source == "goldens" else _train(tmp_path / "trained")
        ours = language_tokenizer(folder)
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        for text in [*ODD_TEXTS, *_random_texts(2000)]:
            # Our texts never start with a space, where Llama's own tokenizers disagree.
            if not text.startswith((" ", "▁")):
                assert ours.encode(text).ids == [1, *theirs.encode(text)], repr(text)

    def test_ids_are_those_of_transformers(self, hub):
        transformers = pytest.importorskip("transformers")
        theirs = transformers.LlamaTokenizerFast.from_pretrained(hub / LLAVA_FOLDER, legacy=False)
        ours = language_tokenizer(hub / LLAVA_FOLDER)
        for text in [*ODD_TEXTS, *_random_texts(200), "a </s> b <s>c"]:
            assert ours.encode(text).ids == theirs(text)["input_ids"], repr(text)

    def test_ids_are_in_the_order_of_the_model_file(self, hub):
        sentencepiece = pytest.importorskip("sentencepiece")
        processor = sentencepiece.SentencePieceProcessor(model_file=str(hub / LLAVA_FOLDER / "tokenizer.model"))
        tokenizer = language_tokenizer(hub / LLAVA_FOLDER)
        assert tokenizer.get_vocab_size() == len(processor)
        for index in range(len(processor)):
            assert tokenizer.id_to_token(index) == processor.id_to_piece(index)

    def test_decoding_gives_the_text_back(self, hub):
        tokenizer = language_tokenizer(hub / LLAVA_FOLDER)
        for text in ["a car", "été 日本 🚗", "two  spaces\n"]:
            assert tokenizer.decode(tokenizer.encode(text).ids) == text

    def test_tokenizer_json_serves_when_there_is_no_model(self, hub, llava_folder):
        whole = language_tokenizer(hub / LLAVA_FOLDER)
        save(whole, llava_folder / "tokenizer.json")
        (llava_folder / "tokenizer.model").unlink()
        assert language_tokenizer(llava_folder).to_str() == whole.to_str()

    def test_missing(self, tmp_path):
        with pytest.raises(CheckpointError, match="neither tokenizer.model nor tokenizer.json"):
            language_tokenizer(tmp_path)

    @pytest.mark.parametrize("keep", [0, 1, 1000, -1])
    def test_truncated_model(self, llava_folder, keep):
        path = llava_folder / "tokenizer.model"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match="tokenizer.model") as error:
            language_tokenizer(llava_folder)
        assert "\n" not in str(error.value)

    def test_git_lfs_pointer_instead_of_the_model(self, llava_folder):
        (llava_folder / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
        with pytest.raises(CheckpointError, match="tokenizer.model"):
            language_tokenizer(llava_folder)

    @pytest.mark.parametrize(
        "options",
        [
            {"model_type": "unigram"},
            {"byte_fallback": False, "vocab_size": 60},
            {"normalization_rule_name": "nmt_nfkc"},
            {"add_dummy_prefix": False},
            {"remove_extra_whitespaces": True},
        ],
    )
    def test_sentencepiece_models_of_other_families(self, tmp_path, options):
        with pytest.raises(CheckpointError, match="no Llama tokenizer"):
            language_tokenizer(_train(tmp_path / "other", **options))

    def test_corrupt_tokenizer_json(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
            language_tokenizer(tmp_path)

    def test_another_kind_of_tokenizer_json(self, tmp_path):
        save(synthetic_text_tokenizer(), tmp_path / "tokenizer.json")
        with pytest.raises(CheckpointError, match="no Llama tokenizer"):
            language_tokenizer(tmp_path)


class TestSynthetic:
    def test_sizes(self):
        assert 550 <= synthetic_text_tokenizer().get_vocab_size() <= 700
        assert 400 <= synthetic_language_tokenizer().get_vocab_size() <= 550

    @pytest.mark.parametrize("make", [synthetic_text_tokenizer, synthetic_language_tokenizer])
    def test_ids_are_without_gaps(self, make):
        vocabulary = make().get_vocab()
        assert sorted(vocabulary.values()) == list(range(len(vocabulary)))

    @pytest.mark.parametrize("word", ["photo", "of", "a", "car", "teddy", "bear", "autumn", "beach"])
    def test_ordinary_words_are_one_token(self, word):
        assert len(synthetic_text_tokenizer().encode(word).ids) == 3
        assert len(synthetic_language_tokenizer().encode(word).ids) == 2

    def test_text_tokenizer_begins_ends_and_lowercases(self):
        tokenizer = synthetic_text_tokenizer()
        tokens = ["<|startoftext|>", "photo</w>", "of</w>", "a</w>", "car</w>", ".</w>", "<|endoftext|>"]
        assert tokenizer.encode("Photo of  a CAR.").tokens == tokens
        assert tokenizer.padding["pad_id"] == tokenizer.token_to_id("<|endoftext|>")

    def test_language_tokenizer_is_like_llama(self):
        tokenizer = synthetic_language_tokenizer()
        assert tokenizer.encode("USER: ").tokens == ["<s>", "▁USER", ":", "▁"]
        assert tokenizer.encode("\n A é").tokens == ["<s>", "▁", "<0x0A>", "▁A", "▁", "<0xC3>", "<0xA9>"]
        assert [tokenizer.token_to_id(token) for token in ("<unk>", "<s>", "</s>", "<0x00>")] == [0, 1, 2, 3]

    @pytest.mark.parametrize("text", ODD_TEXTS)
    def test_no_text_is_unknown(self, text):
        assert "<unk>" not in synthetic_language_tokenizer().encode(text).tokens
        assert "<|endoftext|>" not in synthetic_text_tokenizer().encode(text).tokens[:-1]

    @pytest.mark.parametrize("text", [text for text in ODD_TEXTS if not text.startswith(" ") and "▁" not in text])
    def test_language_tokens_spell_the_text(self, text):
        tokenizer = synthetic_language_tokenizer()
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


class TestSave:
    @pytest.mark.parametrize("make", [synthetic_text_tokenizer, synthetic_language_tokenizer])
    def test_is_deterministic_and_reads_back(self, tmp_path, make):
        paths = [tmp_path / "new" / f"{index}.json" for index in range(3)]
        for path in paths:
            save(make(), path)
        assert len({path.read_bytes() for path in paths}) == 1
        assert Tokenizer.from_file(str(paths[0])).to_str() == make().to_str()
        assert sorted(paths[0].parent.iterdir()) == paths

    def test_checkpoints_tokenizers_are_deterministic(self, hub):
        assert len({text_tokenizer(hub / CLIP_FOLDER).to_str() for _ in range(3)}) == 1
        assert len({language_tokenizer(hub / LLAVA_FOLDER).to_str() for _ in range(3)}) == 1
