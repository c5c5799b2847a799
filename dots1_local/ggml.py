"""ggml's functions, by ctypes, from the libraries that llama-cpp-python ships.

Only `libggml-base` is opened: importing `llama_cpp` would also load and initialise the engine.
"""

import ctypes
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from dots1_local.errors import Dots1Error

__all__ = ["gpu_backends", "library", "library_folder"]

_NO_GPU = ("base", "blas", "cpu", "rpc")
_NAMES = {"darwin": "lib{}.dylib", "win32": "{}.dll"}


def library_folder() -> Path:
    """Where llama-cpp-python keeps its shared libraries."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise Dots1Error("llama-cpp-python is not installed; run pip install llama-cpp-python")
    return Path(spec.origin).parent / "lib"


def gpu_backends() -> tuple[str, ...]:
    """The backends beside CPU and RPC that this build has libraries of: ("cuda",)."""
    names = {
        path.name.partition("ggml-")[2].partition(".")[0] for path in library_folder().iterdir()
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

    Wheels hold libggml-base.so, .so.0 and .so.0.1.2 as copies, not links: opening another one than
    the loader does (the soname, .so.0) would put a second ggml into the process.
    """
    path = library_folder() / _NAMES.get(sys.platform, "lib{}.so").format(name)
    sonames = sorted(path.parent.glob(f"{path.name}.*"), key=lambda file: len(file.name))
    return sonames[0] if sonames else path


def _declare_base(lib: ctypes.CDLL) -> None:
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_validate_row_data.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t]
    lib.ggml_validate_row_data.restype = ctypes.c_bool
    lib.ggml_bf16_to_fp32_row.argtypes = [pointer, pointer, i64]
    lib.ggml_bf16_to_fp32_row.restype = None
    lib.ggml_fp16_to_fp32_row.argtypes = [pointer, pointer, i64]
    lib.ggml_fp16_to_fp32_row.restype = None
