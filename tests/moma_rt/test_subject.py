"""Subject files."""

import dataclasses
import errno
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from moma_rt.errors import InputError, MomaWarning, SubjectError
from moma_rt.subject import Subject


@pytest.fixture
def path(subject, tmp_path):
    subject.save(tmp_path / "car.subject")
    return tmp_path / "car.subject"


def rewrite(path, change_metadata=lambda data: None, change_tensors=lambda tensors: None):
    tensors = load_file(path)
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    data = json.loads(header["__metadata__"]["moma_subject"])
    data = change_metadata(data) or data
    change_tensors(tensors)
    save_file(tensors, path, metadata={"moma_subject": data if isinstance(data, str) else json.dumps(data)})


LAYER = "down_blocks.0.attentions.0"
BAD_NAMES = [
    "",
    " ",
    "car ",
    "teddy\nbear",
    "car\x1b[31m",
    "car\x00",
    "<image>",
    "\ud83d",
    "a " * 79 + "a",
    7,
    None,
    ["car"],
]
BAD_TENSORS = [
    ("photo", np.zeros((0, 4, 3), np.uint8)),
    ("photo", np.zeros((4, 0, 3), np.uint8)),
    ("photo", np.zeros((4, 4, 4), np.uint8)),
    ("photo", np.zeros((4, 4, 3), bool)),
    ("photo", np.zeros((4, 4, 3), np.float32)),
    ("mask", np.zeros((0, 0), bool)),
    ("mask", np.zeros((4, 4, 3), bool)),
    (f"reference_k.{LAYER}", np.full((3, 4), np.nan, np.float32)),
    (f"reference_v.{LAYER}", np.full((3, 4), np.inf, np.float32)),
    (f"reference_v.{LAYER}", np.ones((3, 4), np.float64)),
    (f"reference_v.{LAYER}", np.ones((1, 3, 4), np.float32)),
    ("object_mask.8", np.full(3, np.nan, np.float32)),
    ("object_mask.8", np.ones(3, np.int32)),
    ("object_mask.fi\nne", np.ones(3, np.float32)),
    ("object_mask.fi\nne", np.ones(3, np.int32)),
    ("prefix_ids", np.ones(3, np.int64)),
    ("prefix_kv", np.full((2, 2, 1, 3, 3), np.nan, np.float32)),
    ("prefix_kv", np.ones((2, 2, 1, 3, 3), np.float64)),
    ("prefix_kv", np.ones((2, 3), np.float32)),
]


def test_a_loaded_subject_is_the_saved_one(subject, path):
    loaded = Subject.load(path)
    assert loaded.identity == subject.identity
    assert (loaded.name, loaded.origin) == (subject.name, subject.origin)
    assert loaded.token_counts() == subject.token_counts()
    for name, tensor in subject.inputs().items():
        np.testing.assert_array_equal(loaded.inputs()[name], tensor)
        assert loaded.inputs()[name].dtype == tensor.dtype
    np.testing.assert_array_equal(loaded.photo, subject.photo)
    np.testing.assert_array_equal(loaded.mask, subject.mask)
    np.testing.assert_array_equal(loaded.prefix.ids, subject.prefix.ids)
    np.testing.assert_array_equal(loaded.prefix.kv, subject.prefix.kv)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_loaded_subject_makes_the_same_picture(runtime, subject, path):
    images = [runtime.generate(s, "A car.", steps=2).images[0] for s in (subject, Subject.load(path))]
    np.testing.assert_array_equal(np.asarray(images[0]), np.asarray(images[1]))


def test_a_subject_without_prefix_is_kept_without(subject, path):
    bare = dataclasses.replace(subject, prefix=None, origin=dataclasses.replace(subject.origin, language=None))
    bare.save(path)
    assert Subject.load(path).prefix is None
    assert Subject.load(path).identity == bare.identity != subject.identity


def test_arrays_that_are_not_contiguous_are_saved_as_they_read(subject, path):
    turned = dataclasses.replace(subject, photo=subject.photo[:, ::-1], mask=subject.mask.T)
    turned.save(path)
    np.testing.assert_array_equal(Subject.load(path).photo, turned.photo)
    np.testing.assert_array_equal(Subject.load(path).mask, turned.mask)


def test_identity_covers_everything_a_picture_depends_on(subject):
    def changed(arrays):
        return {name: array + 1 for name, array in arrays.items()}

    variants = [
        subject,
        dataclasses.replace(subject, name="cat"),
        dataclasses.replace(subject, reference_k=changed(subject.reference_k)),
        dataclasses.replace(subject, reference_v=changed(subject.reference_v)),
        dataclasses.replace(subject, object_mask=changed(subject.object_mask)),
        dataclasses.replace(subject, photo=255 - subject.photo),
        dataclasses.replace(subject, mask=~subject.mask),
        dataclasses.replace(subject, prefix=None),
        dataclasses.replace(subject, prefix=dataclasses.replace(subject.prefix, ids=subject.prefix.ids + 1)),
        dataclasses.replace(subject, prefix=dataclasses.replace(subject.prefix, kv=subject.prefix.kv * 2)),
        dataclasses.replace(subject, origin=dataclasses.replace(subject.origin, language="0")),
    ]
    assert len({s.identity for s in variants}) == len(variants)
    assert dataclasses.replace(subject, seconds={"vae_encoder": 1.0}).identity == subject.identity


def test_a_missing_file(tmp_path):
    with pytest.raises(SubjectError, match="no such subject file"):
        Subject.load(tmp_path / "none.subject")
    with pytest.raises(SubjectError, match="no such subject file"):
        Subject.load(tmp_path)
    with pytest.raises(SubjectError, match="cannot be read: .*too long"):
        Subject.load(tmp_path / ("x" * 300))


@pytest.mark.parametrize("path", [None, 7, b"car.subject", ["car.subject"]])
def test_a_path_of_another_type(path):
    with pytest.raises(InputError, match="path must be the path of a subject file, not"):
        Subject.load(path)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F99"])
def test_a_dtype_that_numpy_lacks(path, dtype):
    path.write_bytes(path.read_bytes().replace(b'"dtype":"U8"', f'"dtype":"{dtype}"'.encode(), 1))
    with pytest.raises(SubjectError, match="subject file") as caught:
        Subject.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file(path, size):
    content = path.read_bytes()
    path.write_bytes(content[:size])
    with pytest.raises(SubjectError, match="not a subject file, or was truncated or altered: ") as caught:
        Subject.load(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_something_else(tmp_path):
    (tmp_path / "a.subject").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 100)
    with pytest.raises(SubjectError, match="not a subject file"):
        Subject.load(tmp_path / "a.subject")
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "b.subject")
    with pytest.raises(SubjectError, match="without 'moma_subject' metadata"):
        Subject.load(tmp_path / "b.subject")


def test_a_newer_format(path):
    rewrite(path, lambda data: data.update(format_version=3))
    with pytest.raises(
        SubjectError, match="subject format 3, or was altered; this moma-rt reads formats up to 2: upgrade it"
    ):
        Subject.load(path)


@pytest.mark.parametrize(
    ("change_metadata", "change_tensors"),
    [
        (lambda data: data.pop("name"), lambda tensors: None),
        (lambda data: data.update(format_version="new"), lambda tensors: None),
        (lambda data: None, lambda tensors: tensors.pop("photo")),
        (lambda data: None, lambda tensors: tensors.pop("prefix_ids")),
        (lambda data: None, lambda tensors: tensors.update({"object_mask.fine": np.ones(1, np.float32)})),
        (lambda data: None, lambda tensors: tensors.update({"object_mask.8": np.array(1, np.float32)})),
        (lambda data: None, lambda tensors: tensors.update({"prefix_ids": np.ones((1, 2), np.int32)})),
        (lambda data: None, lambda tensors: tensors.update({"photo": np.ones((2, 2), np.uint8)})),
        (lambda data: None, lambda tensors: tensors.update({"mask": np.ones((2, 2), np.float32)})),
        (lambda data: '{"format_version": 1e999}', lambda tensors: None),
        (lambda data: "[" * 100_000, lambda tensors: None),
        (lambda data: "[]", lambda tensors: None),
        (lambda data: data.update(format_version=True), lambda tensors: None),
        (lambda data: data.update(format_version=0), lambda tensors: None),
        (lambda data: data.update(format_version="1\n2"), lambda tensors: None),
        *((lambda data, name=name: data.update(name=name), lambda tensors: None) for name in BAD_NAMES),
        (lambda data: data.update(base="a\nb"), lambda tensors: None),
        (lambda data: data.update(fingerprint="\n" * 64), lambda tensors: None),
        (lambda data: data.update(fingerprint=None), lambda tensors: None),
        (lambda data: data.update(language=7), lambda tensors: None),
        *(
            (lambda data: None, lambda tensors, name=name, tensor=tensor: tensors.update({name: tensor}))
            for name, tensor in BAD_TENSORS
        ),
    ],
)
def test_a_malformed_file(path, change_metadata, change_tensors):
    rewrite(path, change_metadata, change_tensors)
    with pytest.raises(SubjectError, match="malformed subject file") as caught:
        Subject.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["header", "tensors"])
def test_an_altered_file_is_noticed(subject, path, where):
    """Whichever bit is flipped: the file is refused and said to be altered, or its content is the same."""
    content, chance = path.read_bytes(), random.Random(0)
    begin = 8 + int.from_bytes(content[:8], "little")
    places = range(begin) if where == "header" else range(begin, len(content))
    for place in chance.sample(places, 400):
        altered = bytearray(content)
        altered[place] ^= 1 << chance.randrange(8)
        path.write_bytes(altered)
        outcome = "altered"
        try:
            outcome = Subject.load(path).identity
        except SubjectError as error:
            outcome = outcome if outcome in str(error) else str(error)
        assert outcome in ("altered", subject.identity), place


def test_a_file_without_its_hash(path):
    rewrite(path, lambda data: data.pop("sha256") and None)
    with pytest.raises(SubjectError, match="malformed subject file, or was altered: KeyError: 'sha256'"):
        Subject.load(path)


@pytest.mark.parametrize("hash", [None, 7, "", "0" * 64])
def test_a_file_with_another_hash(path, hash):
    rewrite(path, lambda data: data.update(sha256=hash))
    with pytest.raises(SubjectError, match="was altered: its content has another SHA-256 than it names") as caught:
        Subject.load(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_the_first_format_is_read_with_a_warning(subject, path):
    def as_before(data):
        del data["sha256"]
        data["format_version"] = 1

    rewrite(path, as_before)
    with pytest.warns(MomaWarning, match="subject format 1, without a hash.*enroll its photo again") as caught:
        loaded = Subject.load(path)
    assert len(caught) == 1
    assert loaded.identity == subject.identity


def test_a_subject_that_was_changed_since_its_identity_was_computed_can_be_read(subject, path):
    subject.identity  # noqa: B018
    subject.photo[:] = 7
    subject.save(path)
    assert (Subject.load(path).photo == 7).all()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_file_that_cannot_be_read(path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SubjectError, match=f"{path} cannot be read: {os.strerror(code)}"):
        Subject.load(path)


def test_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SubjectError, match="no such subject file"):
        Subject.load(tmp_path / "pipe")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(subject, path, monkeypatch, code):
    before = path.read_bytes()

    def fail(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")

    monkeypatch.setattr("moma_rt.subject.save_file", fail)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        subject.save(path)
    assert (caught.value.errno, caught.value.filename) == (code, str(path))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_real_write_that_fails(subject, tmp_path):
    """A limit on the size of files stands for a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            subject.save(tmp_path / "car.subject")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.filename == str(tmp_path / "car.subject")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_another_kind_to_write(subject, path, monkeypatch):
    def fail(tensors, filename, metadata):
        raise SafetensorError("Error while serializing: something else")

    monkeypatch.setattr("moma_rt.subject.save_file", fail)
    with pytest.raises(SubjectError, match=f"{path} cannot be written: Error while serializing: something else"):
        subject.save(path)


def test_a_failing_save_leaves_the_former_file(subject, path, monkeypatch):
    before = path.read_bytes()

    def fail(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moma_rt.subject.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        subject.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_keys_and_values_of_half_precision(subject, path):
    """An fp16 bundle's subject stays in fp16 in its file, and differs from the one in fp32."""
    halves = {layer: k.astype(np.float16) for layer, k in subject.reference_k.items()}
    half = dataclasses.replace(subject, reference_k=halves)
    half.save(path)
    loaded = Subject.load(path)
    assert all(k.dtype == np.float16 for k in loaded.reference_k.values())
    assert loaded.identity == half.identity != subject.identity
