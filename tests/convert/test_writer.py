"""The writer against gguf-py's reader, for any tensors in any files."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from dots1_local.architecture import TensorSpec
from dots1_local.convert.output import lay_out
from dots1_local.convert.pipeline import verify_layout
from dots1_local.convert.writer import Journal
from dots1_local.errors import Dots1Error
from dots1_local.ggml import TYPES
from dots1_local.quant.plan import PlannedTensor

READABLE = [kind for kind in TYPES.values() if kind.name != "Q2_0"]  # gguf-py does not know it


@st.composite
def planned(draw: st.DrawFn) -> list[PlannedTensor]:
    """A few tensors of one to three dimensions in types that fit their rows."""
    tensors = []
    for index in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(READABLE))
        columns = kind.block * draw(st.integers(1, 3))
        shape = (*draw(st.lists(st.integers(1, 4), max_size=2)), columns)
        spec = TensorSpec(f"blk.{index}.weight", "dense", index, shape, (f"t{index}",), shape)
        tensors.append(PlannedTensor(spec, kind))
    return tensors


@given(
    planned(), st.none() | st.integers(100, 3000), st.text(min_size=1, max_size=40), st.randoms()
)
@settings(max_examples=60, deadline=None)
def test_readers_find_what_was_written(tensors, split, text, random) -> None:  # type: ignore[no-untyped-def]
    data = {t.spec.name: np.frombuffer(random.randbytes(t.nbytes), np.uint8) for t in tensors}
    with TemporaryDirectory() as folder:
        writer = GGUFWriter(None, "dots1")
        writer.add_string("some.key", text)
        output = lay_out(Path(folder) / "out.gguf", writer, tensors, split)
        with Journal(output, "") as journal:
            for slot in random.sample(output.slots, len(output.slots)):
                raw = data[slot.tensor.spec.name]
                half = len(raw) // 2
                second = journal.write(slot, raw[half:], half)
                pieces = [journal.write(slot, raw[:half], 0)] if half else []
                journal.finish(slot, [*pieces, second])
            verify_layout(output)
            journal.publish()
        assert sorted(Path(folder).iterdir()) == sorted(output.paths)
        readers = [GGUFReader(path) for path in output.paths]
        assert readers[0].fields["some.key"].contents() == text
        found = {t.name: t for reader in readers for t in reader.tensors}
        assert found.keys() == data.keys()
        for tensor in tensors:
            read = found[tensor.spec.name]
            assert read.tensor_type == tensor.kind.ggml
            assert tuple(reversed(read.shape.tolist())) == tensor.spec.shape
            assert read.data.tobytes() == data[tensor.spec.name].tobytes()


def test_two_writers_of_one_file_are_refused(tmp_path: Path) -> None:
    spec = TensorSpec("t.weight", "dense", 0, (2, 32), ("t",), (2, 32))
    tensors = [PlannedTensor(spec, TYPES["F32"])]
    output = lay_out(tmp_path / "out.gguf", GGUFWriter(None, "dots1"), tensors, None)
    with (
        Journal(output, ""),
        pytest.raises(Dots1Error, match="another conversion"),
        Journal(output, ""),
    ):
        pass


def test_names_of_files_need_not_be_utf8(tmp_path: Path) -> None:
    spec = TensorSpec("t.weight", "dense", 0, (2, 32), ("t",), (2, 32))
    output = lay_out(
        tmp_path / "caf\udce9.gguf",
        GGUFWriter(None, "dots1"),
        [PlannedTensor(spec, TYPES["F32"])],
        None,
    )
    with Journal(output, "another run"):
        pass
    with Journal(output, "") as journal:
        assert not journal.done
        journal.finish(output.slots[0], [journal.write(output.slots[0], np.zeros(256, "u1"), 0)])
    with Journal(output, "") as journal:
        assert journal.done == {"t.weight"}
        journal.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["caf\udce9.gguf"]
