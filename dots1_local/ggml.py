"""ggml: its table of tensor types, and its functions by ctypes.

Ids and block sizes are ggml's (`enum ggml_type`); tests compare them with gguf-py's table and with
the installed engine. Functions come from the libraries that llama-cpp-python ships. Only
`libggml-base` is opened: importing `llama_cpp` would also load and initialise the engine.
"""

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dots1_local.errors import Dots1Error, UsageError

if TYPE_CHECKING:  # numpy takes 100 ms, which verbs like `dots1 inspect` do without
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["KV_TYPES", "TYPES", "QuantType", "gpu_backends", "library", "quant_type", "to_float32"]


# Types that llama.cpp can keep a KV cache in.
KV_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")

_NO_GPU = ("base", "blas", "cpu", "rpc")
_NAMES = {"darwin": "lib{}.dylib", "win32": "{}.dll"}


def _library_folder() -> Path:
    """The folder of llama-cpp-python's shared libraries."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise Dots1Error("llama-cpp-python is not installed; run pip install llama-cpp-python")
    return Path(spec.origin).parent / "lib"


def gpu_backends() -> tuple[str, ...]:
    """The GPU backends whose libraries this build has, such as ("cuda",)."""
    names = {
        path.name.partition("ggml-")[2].partition(".")[0] for path in _library_folder().iterdir()
    }
    return tuple(sorted(name for name in names if name and not name.startswith(_NO_GPU)))


@cache
def library(name: str = "ggml-base") -> ctypes.CDLL:
    """Open a ggml library once; its functions release the GIL while they run."""
    path = _shared_object(name)
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise Dots1Error(
            f"cannot open {path}: {error}; reinstall llama-cpp-python with its shared libraries"
        ) from error
    if name == "ggml-base":
        _declare_base(lib)
    return lib


def _shared_object(name: str) -> Path:
    """The copy of a library that libllama itself is linked to.

    Wheels hold libggml-base.so, .so.0 and .so.0.1.2 as copies, not links. The loader opens the
    soname (.so.0); opening another copy would put a second ggml into the process.
    """
    path = _library_folder() / _NAMES.get(sys.platform, "lib{}.so").format(name)
    sonames = sorted(path.parent.glob(f"{path.name}.*"), key=lambda file: len(file.name))
    return sonames[0] if sonames else path


def _declare_base(lib: ctypes.CDLL) -> None:
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_bf16_to_fp32_row.argtypes = [pointer, pointer, i64]
    lib.ggml_bf16_to_fp32_row.restype = None
    lib.ggml_fp16_to_fp32_row.argtypes = [pointer, pointer, i64]
    lib.ggml_fp16_to_fp32_row.restype = None


@dataclass(frozen=True)
class QuantType:
    """A tensor type of ggml: `block` weights are stored in `bytes` bytes.

    Measured mixes consider only a `candidate`. The other types lose more than a candidate of their
    size (docs/convert.md has the figures); they are read, and written if a person asks for them.
    """

    name: str
    ggml: int
    block: int
    bytes: int
    needs_importance: bool = False
    candidate: bool = True

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return self.bytes * 8 / self.block

    def fits(self, columns: int) -> bool:
        """Whether a row of `columns` weights is a whole number of blocks."""
        return columns % self.block == 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of `columns` weights."""
        if not self.fits(columns):
            raise UsageError(
                f"{self.name} stores rows in blocks of {self.block} weights, and {columns} is not "
                f"a multiple of {self.block}"
            )
        return columns // self.block * self.bytes


TYPES: dict[str, QuantType] = {
    entry.name: entry
    for entry in (
        QuantType("F32", 0, 1, 4),
        QuantType("F16", 1, 1, 2),
        QuantType("BF16", 30, 1, 2),
        QuantType("Q8_0", 8, 32, 34),
        QuantType("Q6_K", 14, 256, 210),
        QuantType("Q5_K", 13, 256, 176),
        QuantType("Q5_1", 7, 32, 24),
        QuantType("Q5_0", 6, 32, 22),
        QuantType("Q4_K", 12, 256, 144),
        QuantType("Q4_1", 3, 32, 20),
        QuantType("Q4_0", 2, 32, 18),
        QuantType("IQ4_NL", 20, 32, 18),
        QuantType("IQ4_XS", 23, 256, 136),
        QuantType("NVFP4", 40, 64, 36, candidate=False),
        QuantType("MXFP4", 39, 32, 17),
        QuantType("Q3_K", 11, 256, 110),
        QuantType("IQ3_S", 21, 256, 110),
        QuantType("IQ3_XXS", 18, 256, 98),
        QuantType("Q2_K", 10, 256, 84),
        QuantType("IQ2_S", 22, 256, 82),
        QuantType("Q2_0", 42, 64, 18, candidate=False),
        QuantType("IQ2_XS", 17, 256, 74, needs_importance=True),
        QuantType("IQ2_XXS", 16, 256, 66, needs_importance=True),
        QuantType("TQ2_0", 35, 256, 66, candidate=False),
        QuantType("IQ1_M", 29, 256, 56),
        QuantType("TQ1_0", 34, 256, 54, candidate=False),
        QuantType("IQ1_S", 19, 256, 50, needs_importance=True),
        QuantType("Q1_0", 41, 128, 18, candidate=False),
    )
}


def quant_type(name: str) -> QuantType:
    """The type called `name`, in upper or lower case.

    Raises:
        UsageError: there is no such type; the message lists all types.
    """
    try:
        return TYPES[name.upper()]
    except KeyError:
        raise UsageError(f"there is no type {name!r}; the types are {', '.join(TYPES)}") from None


def to_float32(raw: "NDArray[np.uint8]", dtype: str, out: "NDArray[np.float32]") -> None:
    """Convert safetensors bytes of `dtype` (F32, F16, BF16 or F8_E4M3) to float32 in `out`."""
    if dtype == "F32":
        out.reshape(-1).view("u1")[:] = raw
    elif dtype == "F8_E4M3":
        out.reshape(-1)[:] = _e4m3()[raw]
    else:
        name = "ggml_bf16_to_fp32_row" if dtype == "BF16" else "ggml_fp16_to_fp32_row"
        getattr(library(), name)(raw.ctypes.data, out.ctypes.data, out.size)


@cache
def _e4m3() -> "NDArray[np.float32]":
    """The 256 numbers of float8_e4m3fn: 4 bits of exponent with bias 7, 3 of mantissa, no infinity
    (OCP 8-bit Floating Point Specification, 2023)."""
    import numpy as np

    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    size[codes & 127 == 127] = np.nan
    return np.where(codes < 128, size, -size).astype(np.float32)
