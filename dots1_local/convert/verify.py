"""Does a finished file say what was decided? Its header is read back and compared."""

from collections.abc import Iterator

from dots1_local.convert.writer import Output
from dots1_local.errors import Dots1Error
from dots1_local.gguf_header import GGUFTensor, read_header

__all__ = ["verify_layout"]


def verify_layout(output: Output) -> None:
    """Compare name, type, shape, place and size of every tensor with what was laid out.

    Raises:
        Dots1Error: they differ; something else wrote to the file.
    """
    for index, (partial, size) in enumerate(zip(output.partials, output.sizes, strict=True)):
        _, found = read_header(partial)
        intact = partial.stat().st_size == size
        if not intact or found != tuple(_expected(output, index)):
            raise Dots1Error(
                f"{partial} does not hold what was written; delete it and convert again"
            )


def _expected(output: Output, file: int) -> Iterator[GGUFTensor]:
    for slot in output.slots:
        if slot.file == file:
            spec, kind = slot.tensor.spec, slot.tensor.kind.name
            partial, nbytes = output.partials[file], slot.tensor.nbytes
            yield GGUFTensor(spec.name, kind, spec.shape, partial, slot.offset, nbytes)
