import ast
import json
import warnings

import numpy as np
import pytest
from tokenizers import Tokenizer

from export import tokenizers as export_tokenizers
from moma_rt.errors import BundleError, InputError, MomaWarning
from moma_rt.inputs.tokenizers import (
    MAX_SEQUENCE,
    LanguageTokenizer,
    TextTokenizer,
    check_prompt,
    check_subject_name,
    common_prefix_length,
    text_prompt,
)

CLIP_FOLDER = "SG161222/Realistic_Vision_V4.0_noVAE/tokenizer"
LLAVA_FOLDER = "KunpengSong/MoMA_llava_7b"
IMAGE_TOKENS = 576

PROMPTS = [
    "A car in autumn with falling leaves.",
    "",
    " ",
    "  two leading spaces",
    ".",
    "...and more",
    ": a colon",
    ":) a smile",
    ", comma",
    "'quoted'",
    "-dash",
    "\nnewline",
    "\ttab",
    "a\n\nb",
    "été à la plage",
    "e\u0301 decomposed",
    "日本の車",
    "🚗 on 🏖️",
    "\u200bzero width",
    "\x00",
    "▁",
    "<0x41>",
    "</s> and <s>",
    "in: in: in:",
    "UPPER CASE",
    "x" * 300,
]


@pytest.fixture(scope="module")
def text_path(hub, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizers") / "text.json"
    export_tokenizers.save(export_tokenizers.text_tokenizer(hub / CLIP_FOLDER), path)
    return path


@pytest.fixture(scope="module")
def language_path(hub, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizers") / "language.json"
    export_tokenizers.save(export_tokenizers.language_tokenizer(hub / LLAVA_FOLDER), path)
    return path


@pytest.fixture(scope="module")
def subject_cases(goldens):
    return json.loads((goldens / "subject_idx_cases.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def text(text_path):
    return TextTokenizer(text_path)


@pytest.fixture(scope="module", params=["goldens", "synthetic"])
def language(request, language_path, tmp_path_factory):
    """A tokenizer and its vocabulary size."""
    path = language_path
    if request.param == "synthetic":
        path = tmp_path_factory.mktemp("tokenizers") / "synthetic.json"
        export_tokenizers.save(export_tokenizers.synthetic_language_tokenizer(), path)
    return LanguageTokenizer(path), Tokenizer.from_file(str(path)).get_vocab_size()


class TestTextTokenizer:
    @pytest.mark.filterwarnings("ignore::moma_rt.errors.MomaWarning")
    def test_ids_and_subject_positions_are_the_originals(self, text, subject_cases):
        accepted = {case: expected for case, expected in subject_cases.items() if isinstance(expected, dict)}
        assert len(accepted) == 11
        for case, expected in accepted.items():
            subject, prompt = case.split(" | ", 1)
            text.check_subject(subject)
            ids = text.encode(text_prompt(subject, prompt))
            weights = text.subject_weights(subject, ids)
            assert ids.dtype == np.int32
            assert weights.dtype == np.float32
            assert ids.tolist() == expected["ids"], case
            assert np.flatnonzero(weights).tolist() == expected["idx"][0], case
            assert set(weights.tolist()) == {0.0, 1.0}

    def test_names_that_crash_the_original_are_refused(self, text, subject_cases):
        # The goldens name these cases by the repr of the subject.
        refused = [ast.literal_eval(case) for case, expected in subject_cases.items() if isinstance(expected, str)]
        assert sorted(refused) == ["", "car ", "teddy  bear"]
        for name in refused:
            with pytest.raises(InputError, match="subject name"):
                text.check_subject(name)
            with pytest.raises(InputError, match="subject name"):
                text.subject_weights(name, text.encode(text_prompt(name, "")))

    @pytest.mark.parametrize("case", ["context", "texture"])
    def test_subject_positions_of_the_recorded_runs(self, text, goldens, case):
        meta = json.loads((goldens / case / "meta.json").read_text(encoding="utf-8"))
        ids = text.encode(text_prompt(meta["subject"], meta["prompt"]))
        positions = np.flatnonzero(text.subject_weights(meta["subject"], ids)).tolist()
        assert positions == meta["subject_idxs"][0]

    def test_empty_text_is_begin_end_and_padding(self, text):
        ids = text.encode("")
        assert ids.shape == (77,)
        assert ids[0] != ids[1]
        assert (ids[2:] == ids[1]).all()

    def test_pad_token_may_differ_from_the_end_token(self, text_path, tmp_path):
        tokenizer = Tokenizer.from_file(str(text_path))
        tokenizer.enable_padding(pad_id=0, pad_token="!")
        export_tokenizers.save(tokenizer, tmp_path / "text.json")
        ids = TextTokenizer(tmp_path / "text.json").encode("a car")
        assert ids[3] != 0
        assert (ids[4:] == 0).all()

    def test_other_length(self, text_path):
        assert TextTokenizer(text_path, length=9).encode("a car").shape == (9,)

    def test_a_text_of_exactly_77_tokens_is_not_cut(self, text):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ids = text.encode("a " * 75)
        assert len(set(ids[1:76].tolist())) == 1
        assert ids[76] == text.encode("")[1]

    @pytest.mark.parametrize(
        ("prompt", "cut"),
        [
            ("a " * 75 + "car", "'car'"),
            ("a " * 75 + "\u00c9  A\nfoo", "'\u00c9  A\\nfoo'"),
            # Four tokens, of which one fits: a character is named whole.
            ("a " * 74 + "\U0001f697 a", "'\U0001f697 a'"),
            ("a " * 70 + "1234567890", "'67890'"),
            ("'" + "a " * 74 + "it's", '"it\'s"'),
            # What the tokenizer removes from a text still counts as part of it.
            ("\u202e\x07" + "a\u200b " * 75 + "c\u00adar\u200b A", "'c\\xadar\\u200b A'"),
            ("\u200d" * 9 + "a " * 73 + "e\u0301\u200b日\u200b本", "'\u65e5\\u200b\u672c'"),
            ("a " * 71 + "日<|endoftext|>\u200bΟΔΟΣ 車", "'ΟΔΟΣ 車'"),
        ],
    )
    def test_the_warning_names_what_was_cut(self, text, prompt, cut):
        with pytest.warns(MomaWarning, match="CLIP tokens and 77 fit; cut: ") as record:
            text.encode(prompt)
        assert str(record[0].message).split("cut: ")[1] == cut

    def test_the_warning_is_one_short_line(self, text):
        with pytest.warns(MomaWarning) as record:
            text.encode("line\n" * 5000)
        message = str(record[0].message)
        assert "\n" not in message
        assert len(message) < 1000

    def test_a_cut_text_ends_with_the_end_token(self, text):
        with pytest.warns(MomaWarning, match="cut"):
            ids = text.encode("a " * 200)
        assert ids[76] == text.encode("")[1]

    def test_surrogates_are_refused(self, text):
        with pytest.raises(InputError, match="not valid Unicode at character 2"):
            text.encode("a \udc80")


class TestSubjectName:
    @pytest.mark.parametrize("name", ["car", "teddy bear", "Car", "red-hat", "car.", "Äpfel 3", "日本", "'s", "a"])
    def test_accepted(self, text, name):
        text.check_subject(name)
        ids = text.encode(text_prompt(name, "on a beach"))
        assert text.subject_weights(name, ids).any()

    @pytest.mark.parametrize("name", ["", " ", "\n", "\u3000", " \t "])
    def test_empty(self, name):
        with pytest.raises(InputError, match="subject name is empty"):
            check_subject_name(name)

    @pytest.mark.parametrize(
        "name",
        ["car ", " car", "teddy  bear", "teddy\nbear", "teddy\tbear", "teddy\u00a0bear", "teddy\u3000bear", "car\n"],
    )
    def test_white_space_other_than_one_space_between_words(self, name):
        with pytest.raises(InputError, match="one space between them") as error:
            check_subject_name(name)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("name", ["car\x00", "\x1b[31mcar", "car\x7f", "c\x80ar"])
    def test_control_characters(self, name):
        with pytest.raises(InputError, match="must not contain control characters") as error:
            check_subject_name(name)
        assert str(error.value).isprintable()

    @pytest.mark.parametrize("name", ["👩\u200d🚀", "voiture été", "自動車"])
    def test_every_script_and_joined_emoji(self, name):
        check_subject_name(name)

    @pytest.mark.parametrize("name", [None, 7, b"car", ["car"]])
    def test_not_a_text(self, name):
        with pytest.raises(InputError, match="subject name must be a text, not"):
            check_subject_name(name)

    def test_80_words(self):
        with pytest.raises(InputError, match="subject name has 80 words, at most 71 fit"):
            check_subject_name(" ".join(["car"] * 80))

    def test_the_longest_name_that_fits(self, text):
        # begin, photo, of, a, 71 words, full stop, end
        text.check_subject(" ".join(["car"] * 71))

    @pytest.mark.parametrize("name", ["supercalifragilistic " * 8 + "car", "x" * 100, "x" * 100_000])
    def test_few_words_of_many_tokens(self, text, name):
        check_subject_name(name)
        with pytest.raises(InputError, match="subject name is too long: .* CLIP tokens, 77 fit") as error:
            text.check_subject(name)
        assert len(str(error.value)) < 1000

    @pytest.mark.parametrize("name", ["<|endoftext|>", "car <|startoftext|>"])
    def test_control_tokens(self, text, name):
        with pytest.raises(InputError, match="control token"):
            text.check_subject(name)

    def test_placeholder(self):
        with pytest.raises(InputError, match="subject name must not contain <image>"):
            check_subject_name("car <image>")

    def test_surrogates(self):
        with pytest.raises(InputError, match="subject name is not valid Unicode"):
            check_subject_name("car\udc80")

    def test_a_name_whose_only_token_joins_the_full_stop(self, text):
        with pytest.raises(InputError, match=r"no word that CLIP finds in 'photo of a !\.'"):
            text.check_subject("!")

    def test_a_name_that_the_prompt_does_not_hold(self, text):
        with pytest.raises(InputError, match="no token of the subject name 'car' occurs"):
            text.subject_weights("car", text.encode("a bear"))


class TestPrompt:
    @pytest.mark.parametrize("prompt", [p for p in PROMPTS if p])
    def test_accepted(self, prompt):
        check_prompt(prompt)

    def test_empty_is_fine(self):
        check_prompt("")

    def test_placeholder(self):
        with pytest.raises(InputError, match="prompt must not contain <image>"):
            check_prompt("a car <image> on a beach")

    @pytest.mark.parametrize("prompt", [None, 7, b"A car.", ["A car."]])
    def test_not_a_text(self, prompt):
        with pytest.raises(InputError, match="^prompt must be a text, not"):
            check_prompt(prompt)

    def test_negative_prompt_is_called_so(self):
        with pytest.raises(InputError, match="^negative prompt must not contain <image>"):
            check_prompt("<image>", "negative prompt")

    def test_surrogates(self):
        with pytest.raises(InputError, match="prompt is not valid Unicode at character 1"):
            check_prompt("a\ud800")


class TestLanguageTokenizer:
    @pytest.mark.parametrize("case", ["context", "texture"])
    def test_ids_are_the_originals(self, goldens, language_path, case):
        meta = json.loads((goldens / case / "meta.json").read_text(encoding="utf-8"))
        with np.load(goldens / case / "mllm.npz") as recorded:
            expected = recorded["input_ids"][0].tolist()
        vocabulary = 555
        image = expected.index(-200)
        expected[image : image + 1] = range(vocabulary, vocabulary + IMAGE_TOKENS)
        ids = LanguageTokenizer(language_path).encode(meta["subject"], meta["prompt"], vocabulary, IMAGE_TOKENS)
        assert ids.dtype == np.int32
        assert ids.tolist() == expected

    @pytest.mark.parametrize("prompt", PROMPTS)
    @pytest.mark.parametrize("subject", ["car", "teddy bear"])
    def test_the_prefix_and_the_rest_make_the_whole_sequence(self, language, subject, prompt):
        tokenizer, vocabulary = language
        whole = tokenizer.encode(subject, prompt, vocabulary, IMAGE_TOKENS)
        prefix = tokenizer.prefix(subject, vocabulary, IMAGE_TOKENS)
        shared = common_prefix_length(prefix, whole)
        np.testing.assert_array_equal(np.concatenate([prefix[:shared], whole[shared:]]), whole)
        # The photo's tokens must be among those that are not run again, and something must be left to run.
        assert shared < len(whole)
        assert whole[shared:].max() < vocabulary
        assert shared >= len(prefix) - 4

    def test_each_image_token_occurs_once(self, language):
        tokenizer, vocabulary = language
        ids = tokenizer.encode("car", "A car.", vocabulary, IMAGE_TOKENS)
        assert ids[ids >= vocabulary].tolist() == list(range(vocabulary, vocabulary + IMAGE_TOKENS))

    def test_one_begin_token(self, language):
        tokenizer, vocabulary = language
        ids = tokenizer.encode("car", "A car.", vocabulary, IMAGE_TOKENS)
        assert ids[0] == 1
        assert not (ids[1:] == 1).any()

    def test_the_part_after_the_photo_begins_with_a_space_and_a_newline(self, language_path):
        ids = LanguageTokenizer(language_path).encode("car", "A car.", 555, 4)
        tokens = Tokenizer.from_file(str(language_path))
        assert [tokens.id_to_token(i) for i in ids[8:10].tolist()] == ["▁", "<0x0A>"]

    def test_an_empty_prompt_still_asks(self, language):
        tokenizer, vocabulary = language
        prefix = tokenizer.prefix("car", vocabulary, IMAGE_TOKENS)
        assert len(tokenizer.encode("car", "", vocabulary, IMAGE_TOKENS)) > len(prefix)

    def test_placeholder(self, language):
        with pytest.raises(InputError, match="prompt must not contain <image>"):
            language[0].encode("car", "a <image>", language[1], IMAGE_TOKENS)

    def test_subject_name_is_checked(self, language):
        with pytest.raises(InputError, match="subject name is empty"):
            language[0].prefix("", language[1], IMAGE_TOKENS)

    def test_a_prompt_longer_than_the_longest_sequence(self, language):
        with pytest.raises(InputError, match=f"prompt is too long: [0-9]+ tokens with the photo, {MAX_SEQUENCE} fit"):
            language[0].encode("car", "a b " * 3000, language[1], IMAGE_TOKENS)


class TestCommonPrefix:
    @pytest.mark.parametrize(
        ("cached", "full", "length"),
        [
            ([], [1], 0),
            ([1], [2, 3], 0),
            ([1, 2], [1, 2, 3], 2),
            ([1, 2, 9], [1, 2, 3, 9], 2),
            ([1, 9, 3], [1, 2, 3], 1),
            ([1], [1], 0),
            ([1, 2], [1, 2], 1),
            ([1, 2, 3], [1, 2], 1),
        ],
    )
    def test_length_leaves_a_token_to_run(self, cached, full, length):
        assert common_prefix_length(np.array(cached, np.int32), np.array(full, np.int32)) == length


class TestFiles:
    @pytest.mark.parametrize("kind", [TextTokenizer, LanguageTokenizer])
    @pytest.mark.parametrize("content", [None, b"", b"{}", b"{", b"\xff\xfe", b"[1]"])
    def test_missing_or_corrupt(self, tmp_path, kind, content):
        path = tmp_path / "tokenizer.json"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(BundleError, match="tokenizer") as error:
            kind(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)

    def test_the_other_kind_of_tokenizer_is_refused(self, text_path, language_path):
        with pytest.raises(BundleError, match="not a Llama tokenizer"):
            LanguageTokenizer(text_path)
        with pytest.raises(BundleError, match="not a CLIP tokenizer"):
            TextTokenizer(language_path)
