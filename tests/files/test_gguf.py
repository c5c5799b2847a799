import random
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dots1_local.architecture import inventory
from dots1_local.errors import GGUFError
from dots1_local.files.gguf import GGUFFile, role_of
from tests.helpers import CONFIG, TEMPLATE, TOKENS, write_random_gguf

NAMES = st.text(st.characters(codec="utf-8", categories=["L", "N"]), min_size=1, max_size=20)
SCALARS = (
    st.tuples(st.just("add_uint8"), st.integers(0, 2**8 - 1))
    | st.tuples(st.just("add_int16"), st.integers(-(2**15), 2**15 - 1))
    | st.tuples(st.just("add_int32"), st.integers(-(2**31), 2**31 - 1))
    | st.tuples(st.just("add_uint64"), st.integers(0, 2**64 - 1))
    | st.tuples(st.just("add_float32"), st.floats(width=32, allow_nan=False))
    | st.tuples(st.just("add_float64"), st.floats(allow_nan=False))
    | st.tuples(st.just("add_bool"), st.booleans())
    | st.tuples(st.just("add_string"), st.text(st.characters(codec="utf-8"), min_size=1))
)
ARRAYS = (
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1)
    | st.lists(st.text(st.characters(codec="utf-8")), min_size=1)
    | st.lists(st.booleans(), min_size=1)
).map(lambda items: ("add_array", items))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf")


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    write_random_gguf(tmp_path / "model.gguf", shard_tensors=12)
    return sorted(tmp_path.iterdir())


def refusal(path: Path) -> str:
    """The one sentence with which opening the file fails."""
    with pytest.raises(GGUFError) as error:
        GGUFFile.open(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def write(path: Path, *parts: bytes | int) -> Path:
    """A file of bytes and 64-bit integers, after the magic and version 3."""
    body = b"".join(p if isinstance(p, bytes) else struct.pack("<Q", p) for p in parts)
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + body)
    return path


def name(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor(text: bytes, columns: int, kind: int, offset: int) -> bytes:
    return name(text) + struct.pack("<IQIQ", 1, columns, kind, offset)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.dictionaries(NAMES, SCALARS | ARRAYS, max_size=8))
def test_reads_the_keys_that_gguf_py_writes(tmp_path: Path, keys: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(tmp_path / "keys.gguf", "dots1")
    for key, (method, value) in keys.items():
        getattr(writer, method)(f"test.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = GGUFFile.open(tmp_path / "keys.gguf").keys
    assert found == {"general.architecture": "dots1"} | {
        f"test.{key}": value for key, (_, value) in keys.items()
    }


def test_finds_the_tensors_that_gguf_py_finds(pristine: Path) -> None:
    reader = gguf.GGUFReader(pristine)
    assert [
        (t.name, t.type, t.shape, t.offset, t.nbytes, t.elements)
        for t in GGUFFile.open(pristine).tensors
    ] == [
        (
            t.name,
            t.tensor_type.name,
            tuple(reversed(t.shape.tolist())),
            t.data_offset,
            t.n_bytes,
            t.n_elements,
        )
        for t in reader.tensors
    ]


def test_knows_every_type_of_gguf_py_and_its_size(tmp_path: Path) -> None:
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        if kind.name in ("Q8_1", "Q8_K"):  # of activations; no file holds them
            continue
        path = write(tmp_path / "type.gguf", 1, 0, tensor(b"x", block, kind, 0), bytes(512))
        (found,) = GGUFFile.open(path).tensors
        assert (found.type, found.nbytes) == (kind.name, size)


def test_reads_long_arrays(pristine: Path) -> None:
    keys = GGUFFile.open(pristine).keys
    assert keys["tokenizer.ggml.tokens"] == TOKENS
    assert keys["tokenizer.chat_template"] == TEMPLATE


def test_keys_and_tensors_are_kept_as_they_lie_in_the_file(pristine: Path) -> None:
    (header,) = GGUFFile.open(pristine).headers
    keys = b"".join(map(header.keys.raw, header.keys))
    start = pristine.read_bytes()[: header.data_start]
    assert start[24:] == (keys + header.raw_tensors).ljust(len(start) - 24, b"\0")
    fields = gguf.GGUFReader(pristine).fields
    assert {key: header.keys.kind(key) for key in header.keys} == {
        key: field.types[0] for key, field in fields.items() if not key.startswith("GGUF.")
    }


def test_any_shard_opens_the_whole_model(split: list[Path], pristine: Path) -> None:
    whole = GGUFFile.open(pristine)
    for shard in split:
        model = GGUFFile.open(shard)
        assert model.files == tuple(split)
        assert [t.name for t in model.tensors] == [t.name for t in whole.tensors]
        assert model.keys["tokenizer.ggml.tokens"] == TOKENS
        assert model.nbytes == sum(path.stat().st_size for path in split)


def test_names_the_missing_shard(split: list[Path]) -> None:
    split[2].unlink()
    assert split[2].name in refusal(split[0])


@pytest.mark.parametrize("name", ["joined.gguf", None])
def test_refuses_shards_that_were_joined(
    split: list[Path], tmp_path: Path, name: str | None
) -> None:
    joined = tmp_path / name if name else split[0]
    joined.write_bytes(b"".join(shard.read_bytes() for shard in split))
    said = refusal(joined)
    assert str(joined) in said
    assert "one after another" in said


def test_refuses_a_shard_under_a_foreign_name(split: list[Path], tmp_path: Path) -> None:
    assert "NAME-00001-of-00004.gguf" in refusal(split[0].rename(tmp_path / "renamed.gguf"))


def test_refuses_shards_in_the_wrong_places(split: list[Path]) -> None:
    shutil.copy(split[1], split[2])
    assert "is not shard 3 of 4" in refusal(split[0])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "not a GGUF"),
        (b"GGUF", "truncated"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "garbled"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "garbled"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + name(b"key") + b"\xff\0\0\0", "type 255"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + name(b"key\x1b[2J") + bytes(8), "garbled"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "garbled"),
        # An array of 2**24 strings, the first of them 2**63 bytes long.
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + name(b"key")
            + struct.pack("<IIQQ", 9, 8, 2**24, 2**63),
            "truncated",
        ),
    ],
)  # fmt: skip
def test_refuses_garbage(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    assert sentence in refusal(tmp_path / "x.gguf")


def test_refuses_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)
    assert "no such file" in refusal(tmp_path / "nothing.gguf")


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ([tensor(b"a", 8, 0, 0), tensor(b"b", 8, 0, 0)], "overlapping"),
        ([tensor(b"a", 16, 0, 0), tensor(b"b", 8, 0, 32)], "overlapping"),
        ([tensor(b"a", 8, 0, 0), tensor(b"a", 8, 0, 32)], "same name"),
        ([tensor(b"a", 8, 0, 2**40)], "truncated"),
        ([tensor(b"a", 2**62, 0, 0)], "truncated"),
        ([tensor(b"a", 8, 0, 4)], "unaligned"),
        ([tensor(b"a", 8, 12, 0)], "blocks"),
        ([name(b"a") + struct.pack("<IIQ", 0, 12, 0)], "rows of 1 weights"),
        ([tensor(b"a", 8, 999, 0)], "type 999"),
    ],
)
def test_refuses_impossible_tensors(tmp_path: Path, tensors: list[bytes], sentence: str) -> None:
    path = write(tmp_path / "x.gguf", len(tensors), 0, *tensors, bytes(256))
    assert sentence in refusal(path)


def test_a_tensor_without_dimensions_has_one_weight(tmp_path: Path) -> None:
    without = name(b"a") + struct.pack("<IIQ", 0, 0, 0)
    [found] = GGUFFile.open(write(tmp_path / "x.gguf", 1, 0, without, bytes(256))).tensors
    assert (found.shape, found.nbytes) == ((1,), 4)


def test_refuses_a_file_cut_anywhere(pristine: Path, tmp_path: Path) -> None:
    content = pristine.read_bytes()
    lengths = [*random.Random(0).sample(range(len(content) - 32), 200), len(content) - 32]
    for length in lengths:
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        refusal(tmp_path / "cut.gguf")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_survives_any_changed_bytes(pristine: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(pristine.read_bytes())
    header = min(t.offset for t in GGUFFile.open(pristine).tensors)
    for place in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    (tmp_path / "changed.gguf").write_bytes(content)
    try:
        keys = GGUFFile.open(tmp_path / "changed.gguf").keys
        assert dict(keys) is not None  # decoding arrays must not fail either
    except GGUFError:
        pass


def test_roles_are_those_of_the_inventory() -> None:
    for spec in inventory(CONFIG):
        assert role_of(spec.name) == spec.role
    assert role_of("blk.0.ssm_conv1d.weight") is None
    assert role_of("blk.0.ffn_down_exps.weight.in_sum2") is None


def test_reads_a_full_vocabulary_lazily(tmp_path: Path) -> None:
    tokens = [f"token{index}" for index in range(152_064)]
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "dots1")
    writer.add_token_list(tokens)
    writer.add_token_types(np.ones(len(tokens), int).tolist())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    keys = GGUFFile.open(tmp_path / "big.gguf").keys
    assert keys["tokenizer.ggml.tokens"] == tokens
    assert keys["tokenizer.ggml.token_type"] == [1] * len(tokens)


POINTER = (  # as git-lfs/docs/spec.md shows it
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 4786012345\n"
)


def test_a_pointer_of_git_lfs_is_called_one(split: list[Path], tmp_path: Path) -> None:
    for path in (tmp_path / "whole.gguf", split[2]):
        path.write_text(POINTER)
        said = refusal(path if path.name == "whole.gguf" else split[0])
        assert str(path) in said
        assert "Git LFS pointer" in said
        assert "4.8 GB" in said
