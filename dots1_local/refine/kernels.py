"""kernels.cpp, compiled for this machine's processor when it is first used, and called by ctypes.

A compiler is where llama-cpp-python was built. To compile here, and not in a wheel, lets the
kernels use everything that the processor has. ctypes releases the GIL while a kernel runs.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import Dots1Error
from dots1_local.files.partial_file import disk_errors
from dots1_local.refine.blocks import BlockFormat, Blocks

__all__ = ["Kernels", "Panel"]

Floats = NDArray[np.float32]

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-std=c++17", "-O3", "-ffast-math", "-march=native", "-shared", "-fPIC")
_SIGNS = ("none", "free", "even")


@dataclass(frozen=True)
class Panel:
    """Columns of a matrix from `start` on, and the quadratic forms of their errors.

    `form` (width, width) is that part of H, or of the factor that carries errors on; `diagonal`
    (groups, vector, vector) is the form of each group of columns that share a code.
    """

    start: int
    form: Floats
    diagonal: Floats


class Kernels:
    """The kernels for one type.

    All arrays are C-contiguous F32, except that rows of the weights and their errors (rows,
    columns) may lie further apart. Both kernels change blocks and errors, as rows of the panel.
    """

    def __init__(self, form: BlockFormat) -> None:
        self._form, self._grid = form, np.ascontiguousarray(form.values.T)
        step = float(form.steps[1] - form.steps[0]) if len(form.steps) > 1 else 0.0
        self._format = _Format(
            form.block, form.sub, form.vector, len(form.values), len(form.steps), form.mins,
            _SIGNS.index(form.signs), form.shared_half, form.steps[0], step,
            form.values.ctypes.data, self._grid.ctypes.data,
        )  # fmt: skip

    def feed(
        self, panel: Panel, weights: Floats, errors: Floats, blocks: Blocks, targets: Floats
    ) -> None:
        """Round a panel with error feedback.

        `targets` (rows, width) are its weights plus what the errors of earlier panels carry on;
        they are overwritten.
        """
        self._call(_library().feed, panel, weights, errors, blocks, targets)

    def descend(
        self,
        panel: Panel,
        weights: Floats,
        errors: Floats,
        blocks: Blocks,
        gradients: Floats,
        coupling: Floats | None = None,
        moved: Floats | None = None,
    ) -> None:
        """Change every code, scale and min of a panel once where that lowers the error.

        `gradients` (rows, width) are these columns of E H; they are overwritten. With `coupling`
        (rows, rows), HO with each row divided by its diagonal element, they are those of HO E H
        divided by it, and `moved` (rows, width), 0 at first, receives the change of E H.
        """
        arrays = (coupling, moved)
        pointers = (None if array is None else array.ctypes.data for array in arrays)
        self._call(_library().descend, panel, weights, errors, blocks, gradients, *pointers)

    def _call(
        self,
        function: Callable[..., None],
        panel: Panel,
        weights: Floats,
        errors: Floats,
        blocks: Blocks,
        state: Floats,
        *pointers: int | None,
    ) -> None:
        columns = blocks.d.shape[1] * self._form.block
        tables = self._tables(panel.diagonal)
        rows = _Rows(
            len(weights), columns, weights.strides[0] // 4,
            *(array.ctypes.data for array in (weights, errors, blocks.d, blocks.dmin)),
            *(a.ctypes.data for a in (blocks.scales, blocks.mins, blocks.codes, blocks.signs)),
        )  # fmt: skip
        forms = (panel.form, panel.diagonal, tables)
        part = _Panel(panel.start, len(panel.form), *(array.ctypes.data for array in forms))
        function(
            ctypes.byref(self._format), ctypes.byref(rows), ctypes.byref(part), state.ctypes.data,
            *pointers,
        )  # fmt: skip

    def _tables(self, diagonal: Floats) -> Floats:
        """v' D v of every code's values v, (groups, patterns of signs, codes).

        A pattern of signs and its opposite have the same form, so half of them suffice. With
        scalars, the kernels need no table.
        """
        first, second, products = self._products
        if len(products) == 1:
            return np.empty(0, np.float32)
        signs = self._patterns[:, first] * self._patterns[:, second]
        forms = diagonal[:, None, first, second] * np.where(first == second, 1, 2) * signs
        flat = forms.astype(np.float32).reshape(-1, len(products)) @ products
        return flat.reshape(len(diagonal), len(signs), -1)

    @cached_property
    def _products(self) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
        """Pairs of columns of a group, and the products (pairs, codes) of their values."""
        first, second = np.triu_indices(self._form.vector)
        return first, second, self._grid[first] * self._grid[second]

    @cached_property
    def _patterns(self) -> Floats:
        """The signs (patterns, vector) of half of all patterns: bit i says that i is negative."""
        size = self._form.vector
        count = 1 << (size - 1) if self._form.signs != "none" else 1
        return (1 - 2 * (np.arange(count)[:, None] >> np.arange(size) & 1)).astype(np.float32)


class _Format(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("block", "sub", "vector", "codes", "levels", "mins")),
        *((name, ctypes.c_int32) for name in ("signs", "shared_half")),
        *((name, ctypes.c_float) for name in ("step0", "step1")),
        *((name, ctypes.c_void_p) for name in ("values", "grid")),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rows", "columns", "stride")),
        *((name, ctypes.c_void_p) for name in ("weights", "errors", "d", "dmin")),
        *((name, ctypes.c_void_p) for name in ("scales", "mins", "codes", "signs")),
    )


class _Panel(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("start", "width")),
        *((name, ctypes.c_void_p) for name in ("form", "diagonal", "tables")),
    )


@cache
def _library() -> ctypes.CDLL:
    path = _cache_folder() / f"kernels-{_digest()}.so"
    if not path.exists():
        _compile(path)
    library, pointer = ctypes.CDLL(str(path)), ctypes.c_void_p
    library.feed.argtypes = [pointer] * 4
    library.descend.argtypes = [pointer] * 6
    library.feed.restype = library.descend.restype = None
    return library


def _compile(path: Path) -> None:
    """Compile to `path`, which appears when it is complete.

    Raises:
        Dots1Error: there is no compiler, or it fails; or the cache is not writable.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            command = [_compiler(), *_FLAGS, "-o", str(built), str(_SOURCE)]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
            except FileNotFoundError:
                raise Dots1Error(
                    f"refinement compiles its kernels, and there is no compiler {command[0]!r}; "
                    "install g++ or clang++, or name one in CXX"
                ) from None
            except subprocess.CalledProcessError as error:
                reason = error.stderr.strip().partition("\n")[0]
                raise Dots1Error(f"{command[0]} cannot compile {_SOURCE.name}: {reason}") from None
            os.replace(built, path)


def _compiler() -> str:
    return os.environ.get("CXX") or "c++"


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dots1-local"


def _digest() -> str:
    """What the compiled kernels depend on: a shared home directory may serve several machines."""
    inputs = (_SOURCE.read_text(), _compiler(), _FLAGS, platform.machine(), _processor())
    return hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({x for x in lines if x.startswith(("flags", "Features", "model name"))}))
