"""Tokens that are stored outside the vocabulary, in every layout that transformers 4 and 5 write.

The expected ids are transformers 4.37.2's, with which the original reads texts; the installed one writes those of 5.
"""

import json
import shutil
import warnings

import pytest

from export.added_tokens import read_tokens
from export.tokenizers import language_tokenizer, save, text_tokenizer
from moma_rt.errors import CheckpointError, MomaWarning

LLAVA_FOLDER = "KunpengSong/MoMA_llava_7b"
BEGIN, END, SIZE = 613, 614, 615
MUG = [320, 615, 525, 320, 536]  # a <my-mug> on a beach
LETTERS = [283, 76, 344, 268, 76, 84, 326, 285]


def token(content, **options):
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True, "special": False}
    return {"content": content, **flags, **options}


def write(folder, **files):
    """Write JSON files, named by these short names."""
    names = {"config": "tokenizer_config.json", "map": "special_tokens_map.json"}
    names |= {"added": "added_tokens.json", "whole": "tokenizer.json"}
    for key, content in files.items():
        (folder / names[key]).write_text(json.dumps(content), encoding="utf-8")


def edit(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def ids(folder, text, size=None):
    """The ids between begin and end."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = text_tokenizer(folder, size)
    tokenizer.no_padding()
    found = tokenizer.encode(text).ids
    assert (found[0], found[-1]) == (BEGIN, END)
    return found[1:-1]


@pytest.fixture
def llava(hub, tmp_path):
    folder = tmp_path / "llava"
    folder.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(hub / LLAVA_FOLDER / name, folder)
    return folder


SPECIAL = {"613": token("<|startoftext|>", special=True), "614": token("<|endoftext|>", special=True)}


def _added(folder):
    write(folder, added={"<my-mug>": SIZE})


def _decoder(folder):
    edit(folder, "tokenizer_config.json", added_tokens_decoder={**SPECIAL, "615": token("<my-mug>")})


def _decoder_without_map(folder):
    (folder / "special_tokens_map.json").unlink()
    _decoder(folder)


def _listed_as_special_of_map(folder):
    edit(folder, "special_tokens_map.json", additional_special_tokens=["<my-mug>"])


def _listed_as_special_of_config(folder):
    edit(folder, "tokenizer_config.json", additional_special_tokens=["<my-mug>"])


def _extra_special_of_config(folder):
    edit(folder, "tokenizer_config.json", extra_special_tokens={"mug_token": "<my-mug>"})


def _whole_beside_the_vocabulary(folder):
    tokenizer = text_tokenizer(folder)
    whole = json.loads(tokenizer.to_str())
    write(folder, whole={**whole, "added_tokens": [*whole["added_tokens"], {"id": SIZE, **token("<my-mug>")}]})


def _whole_alone(folder):
    _whole_beside_the_vocabulary(folder)
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()


def _version_5(folder):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<my-mug>"])
    shutil.rmtree(folder)
    tokenizer.save_pretrained(folder)
    assert not (folder / "added_tokens.json").exists()


def _version_5_over_the_files_of_version_4(folder):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<my-mug>"]})
    tokenizer.save_pretrained(folder)


LAYOUTS = [
    _added,
    _decoder,
    _decoder_without_map,
    _listed_as_special_of_map,
    _listed_as_special_of_config,
    _extra_special_of_config,
    _whole_beside_the_vocabulary,
    _whole_alone,
    _version_5,
    _version_5_over_the_files_of_version_4,
]


@pytest.mark.parametrize("layout", LAYOUTS)
class TestEveryLayout:
    def test_an_added_token_is_one_id(self, clip_folder, layout):
        layout(clip_folder)
        assert ids(clip_folder, "a <my-mug> on a beach", SIZE + 1) == MUG
        assert ids(clip_folder, "a<my-mug>\u200b on A beach") == MUG
        assert ids(clip_folder, "<my-mug><my-mug>") == [SIZE, SIZE]

    def test_case_counts_and_parts_are_words(self, clip_folder, layout):
        layout(clip_folder)
        assert ids(clip_folder, "<MY-MUG>") == ids(clip_folder, "<my-mug") + [285] == LETTERS

    def test_the_saved_tokenizer_gives_the_same_ids(self, clip_folder, layout, tmp_path):
        from moma_rt.inputs.tokenizers import TextTokenizer

        layout(clip_folder)
        save(text_tokenizer(clip_folder), tmp_path / "text.json")
        tokenizer = TextTokenizer(tmp_path / "text.json")
        assert tokenizer.encode("a <my-mug> on a beach")[:7].tolist() == [BEGIN, *MUG, END]
        tokenizer.check_subject("<my-mug>")
        weights = tokenizer.subject_weights("<my-mug>", tokenizer.encode("photo of a <my-mug>. red <my-mug>"))
        assert weights.sum() == 2


class TestPrecedence:
    def test_the_decoder_goes_before_all_other_files(self, clip_folder):
        _decoder(clip_folder)
        write(clip_folder, added={"<other>": 616})
        edit(clip_folder, "special_tokens_map.json", pad_token="!")
        assert "<other>" not in text_tokenizer(clip_folder).get_vocab()
        assert text_tokenizer(clip_folder).padding["pad_id"] == END

    def test_tokenizer_json_goes_before_added_tokens_json(self, clip_folder):
        _whole_beside_the_vocabulary(clip_folder)
        write(clip_folder, added={"<a>": 615, "<b>": 616})
        found = text_tokenizer(clip_folder)
        assert [found.token_to_id(name) for name in ("<my-mug>", "<a>", "<b>")] == [615, None, 616]

    def test_the_map_goes_before_the_config(self, clip_folder):
        edit(clip_folder, "tokenizer_config.json", pad_token="!")
        assert text_tokenizer(clip_folder).padding["pad_id"] == END
        (clip_folder / "special_tokens_map.json").unlink()
        assert text_tokenizer(clip_folder).padding["pad_id"] == 0

    def test_the_pad_token_of_every_file(self, clip_folder):
        (clip_folder / "special_tokens_map.json").unlink()
        pad = {"0": token("!", special=True)}
        edit(clip_folder, "tokenizer_config.json", pad_token="!", added_tokens_decoder={**SPECIAL, **pad})
        assert text_tokenizer(clip_folder).padding == {
            **text_tokenizer(clip_folder).padding,
            "pad_id": 0,
            "pad_token": "!",
        }
        # As every special token, it is found in a text.
        assert ids(clip_folder, "a photo!") == [320, 556, 0]

    def test_a_pad_token_in_no_vocabulary_is_the_next_id(self, clip_folder):
        edit(clip_folder, "special_tokens_map.json", pad_token="[PAD]")
        assert text_tokenizer(clip_folder, SIZE + 1).padding["pad_id"] == SIZE

    def test_special_tokens_without_ids_come_after_those_with_ids(self, clip_folder):
        write(clip_folder, added={"<a>": 616, "<b>": 615})
        edit(clip_folder, "special_tokens_map.json", pad_token="[PAD]", additional_special_tokens=["<c>", "<a>"])
        found = text_tokenizer(clip_folder)
        assert [found.token_to_id(name) for name in ("<b>", "<a>", "[PAD]", "<c>")] == [615, 616, 617, 618]

    def test_the_longest_token_is_taken(self, clip_folder):
        write(clip_folder, added={"<my": 615, "<my-mug>": 616, "mug>": 617})
        assert ids(clip_folder, "a <my-mug> <my mug>") == [320, 616, 615, 617]

    def test_ids_may_have_gaps(self, clip_folder):
        write(clip_folder, added={"<my-mug>": 620})
        assert ids(clip_folder, "<my-mug>") == [620]

    def test_null_is_the_default(self, clip_folder):
        (clip_folder / "special_tokens_map.json").unlink()
        edit(clip_folder, "tokenizer_config.json", pad_token=None, additional_special_tokens=None)
        assert text_tokenizer(clip_folder).padding["pad_id"] == END


class TestRefused:
    @pytest.mark.parametrize(
        ("files", "reason"),
        [
            ({"added": ["<a>"]}, "added_tokens.json must hold a JSON object"),
            ({"added": {"<a>": "x"}}, "added_tokens.json: the id of '<a>' must be a whole number"),
            ({"added": {"<a>": -1}}, "added_tokens.json: the id of '<a>' must be a whole number"),
            ({"added": {"<a>": 5}}, r"added_tokens.json gives '<a>' the id 5, which is '&' already"),
            ({"added": {"photo</w>": 615}}, "added_tokens.json gives 'photo</w>' the id 615, the vocabulary"),
            ({"config": {"added_tokens_decoder": []}}, "added_tokens_decoder must be an object, not"),
            ({"config": {"added_tokens_decoder": {"615": 7}}}, "added_tokens_decoder must hold tokens, not 7"),
            ({"config": {"added_tokens_decoder": {"x": token("<a>")}}}, "the id of '<a>' must be a whole number"),
            ({"config": {"additional_special_tokens": 7}}, "additional_special_tokens must be a list of tokens, not 7"),
            ({"map": {"pad_token": 7}}, "special_tokens_map.json: pad_token must be a token, not 7"),
            ({"whole": {"added_tokens": [{"content": "<a>"}]}}, "tokenizer.json: the id of '<a>' must be"),
            ({"whole": {"added_tokens": 7}}, "tokenizer.json: added_tokens must be a list, not 7"),
        ],
    )
    def test_entries_that_are_no_tokens(self, clip_folder, files, reason):
        write(clip_folder, **files)
        with pytest.raises(CheckpointError, match=reason) as error:
            text_tokenizer(clip_folder)
        assert str(clip_folder) in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("name", ["tokenizer_config.json", "added_tokens.json", "tokenizer.json"])
    @pytest.mark.parametrize("content", [b'{"a": 1', b"\xff\xfe\x00", b"[1, 2]"])
    def test_corrupt_file(self, clip_folder, name, content):
        (clip_folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name) as error:
            text_tokenizer(clip_folder)
        assert "\n" not in str(error.value)


class TestEmbeddings:
    def test_as_many_as_tokens(self, clip_folder):
        assert ids(clip_folder, "a", SIZE) == [320]

    def test_a_text_encoder_with_an_embedding_that_no_token_has(self, clip_folder):
        with pytest.raises(CheckpointError, match="the text encoder has 616 embeddings, but its tokenizer .* has 615"):
            text_tokenizer(clip_folder, SIZE + 1)
        write(clip_folder, added={"<my-mug>": 620})
        with pytest.raises(CheckpointError, match="none has the id 615"):
            text_tokenizer(clip_folder, 621)

    def test_embeddings_up_to_a_multiple_of_64_are_padding(self, clip_folder):
        with pytest.warns(MomaWarning, match="640 embeddings, .* 615 tokens; the last 25 embeddings are taken for pad"):
            text_tokenizer(clip_folder, 640)
        with pytest.raises(CheckpointError, match="the text encoder has 704 embeddings"):
            text_tokenizer(clip_folder, 704)

    def test_a_text_encoder_without_the_added_token(self, clip_folder):
        _added(clip_folder)
        with pytest.raises(
            CheckpointError, match="added_tokens.json names '<my-mug>', whose id is 615, but .* has 615"
        ):
            text_tokenizer(clip_folder, SIZE)

    def test_a_text_encoder_of_another_vocabulary(self, clip_folder):
        with pytest.raises(CheckpointError, match="has ids up to 614, but the text encoder has 600 embeddings"):
            text_tokenizer(clip_folder, 600)

    def test_a_padded_language_model(self, llava):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            language_tokenizer(llava, 576)

    def test_a_language_model_without_the_added_token(self, llava):
        before = language_tokenizer(llava, 555).encode("in: a [PAD]").ids
        edit(llava, "special_tokens_map.json", pad_token="[PAD]")
        with pytest.warns(MomaWarning, match=r"special_tokens_map.json names '\[PAD\]' \(555\), but .* 555 embeddings"):
            tokenizer = language_tokenizer(llava, 555)
        assert tokenizer.encode("in: a [PAD]").ids == before
        assert language_tokenizer(llava, 556).encode("in: a [PAD]").ids[-1] == 555

    def test_a_language_model_of_another_vocabulary(self, llava):
        with pytest.raises(CheckpointError, match="has ids up to 554, but the language model has 500 embeddings"):
            language_tokenizer(llava, 500)


class TestLanguageModel:
    # The ids of "\n in: a ".
    IN = (1, 518, 13, 272, 533, 259, 518)

    @pytest.mark.parametrize("name", ["added", "decoder", "whole"])
    def test_added_tokens_of_every_file(self, llava, name):
        tokens = {"<pad>": 555, "<im_start>": 556}
        if name == "added":
            write(llava, added=tokens)
        elif name == "decoder":
            decoder = {str(index): token(content, normalized=False) for content, index in tokens.items()}
            edit(llava, "tokenizer_config.json", added_tokens_decoder=decoder)
        else:
            whole = json.loads(language_tokenizer(llava).to_str())
            entries = [{"id": index, **token(content)} for content, index in tokens.items()]
            write(llava, whole={**whole, "added_tokens": [*whole["added_tokens"], *entries]})
            (llava / "tokenizer.model").unlink()
        tokenizer = language_tokenizer(llava, 557)
        assert tokenizer.encode("\n in: a <pad> b").ids == [*self.IN, 555, 434]
        assert tokenizer.encode("\n <im_start>x").ids == [1, 518, 13, 518, 556, 123]

    def test_spaces_around_a_token(self, llava):
        pad = {"content": "<pad>", "lstrip": True, "rstrip": True, "normalized": False, "single_word": False}
        edit(llava, "special_tokens_map.json", pad_token=pad)
        write(llava, added={"<pad>": 555})
        assert language_tokenizer(llava).encode("\n in: a <pad> b").ids == [*self.IN[:-1], 555, 535]

    def test_the_older_rule_for_spaces(self, llava):
        write(llava, added={"<pad>": 555})
        for legacy in (True, None):
            edit(llava, "tokenizer_config.json", legacy=legacy)
            tokenizer = language_tokenizer(llava)
            assert tokenizer.encode("\n in: a <pad> b").ids == [*self.IN, 555, 518, 434]
            assert tokenizer.encode("\n a </s> b <s>c").ids == [1, 518, 13, 259, 518, 2, 518, 434, 518, 1, 269]
        edit(llava, "tokenizer_config.json", legacy=False)
        assert language_tokenizer(llava).encode("\n a </s> b <s>c").ids == [1, 518, 13, 259, 518, 2, 434, 518, 1, 529]

    def test_another_begin_token(self, llava):
        edit(llava, "special_tokens_map.json", bos_token="</s>")
        assert language_tokenizer(llava).encode("a").ids == [2, 259]
        edit(llava, "special_tokens_map.json", bos_token="<begin>")
        with (
            pytest.warns(MomaWarning, match="names '<begin>'"),
            pytest.raises(CheckpointError, match="no Llama tokenizer: .* has no <begin>"),
        ):
            language_tokenizer(llava, 555)

    @pytest.mark.parametrize(("key", "value"), [("add_bos_token", False), ("add_eos_token", True)])
    def test_other_tokens_around_a_text(self, llava, key, value):
        edit(llava, "tokenizer_config.json", **{key: value})
        with pytest.raises(CheckpointError, match=f"tokenizer_config.json has {key} {value}; only {not value} is"):
            language_tokenizer(llava)


def test_a_folder_without_these_files_has_no_tokens(tmp_path):
    found = read_tokens(tmp_path)
    assert (found.names, found.tokens) == ({}, ())
