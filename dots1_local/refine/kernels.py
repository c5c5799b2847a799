"""The kernels in cpp/, compiled for this machine's processor when first used, called by ctypes.

A compiler is where llama-cpp-python was built. To compile here, and not in a wheel, lets the
kernels use everything that the processor has. ctypes releases the GIL while a kernel runs.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dots1_local.errors import Dots1Error
from dots1_local.files.partial_file import disk_errors, open_partial
from dots1_local.files.user_folder import user_folder
from dots1_local.refine.blocks import BlockFormat, Blocks

__all__ = ["Kernels", "Panel", "build_id"]

Floats = NDArray[np.float32]

_PATIENCE = 120  # seconds to wait for another process that compiles
_SOURCES = Path(__file__).parent / "cpp"
_FLAGS = ("-std=c++17", "-O3", "-ffast-math", "-march=native", "-shared", "-fPIC")
_SIGNS = ("none", "free", "even")


@dataclass(frozen=True)
class Panel:
    """Columns of a matrix from `start` on, and the quadratic forms of their errors.

    `form` (width, width) is that part of H, or of the factor that carries errors on; None without
    cross terms. `diagonal` (groups, vector, vector) is the form of each group of columns that share
    a code, and `tables` (groups, patterns of signs, codes) that of every code's values.
    """

    start: int
    form: Floats | None
    diagonal: Floats
    tables: Floats

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + self.diagonal.shape[0] * self.diagonal.shape[1])


class Kernels:
    """The kernels for one type.

    Blocks are whole rows; weights and errors (rows, width) are a panel's columns. All arrays are
    C-contiguous, except that rows of weights and errors may lie further apart, both as far. The
    kernels change blocks and errors.
    """

    def __init__(self, form: BlockFormat) -> None:
        self._form, self._grid = form, np.ascontiguousarray(form.values.T)
        step = float(form.steps[1] - form.steps[0]) if len(form.steps) > 1 else 0.0
        self._format = _Format(
            form.block, form.sub, form.vector, len(form.values), len(form.steps), form.mins,
            _SIGNS.index(form.signs), form.shared_half, form.steps[0], step,
            form.values.ctypes.data, self._grid.ctypes.data,
        )  # fmt: skip

    def panel(self, start: int, form: Floats, diagonal: Floats) -> Panel:
        """A panel for this type."""
        form, diagonal = np.ascontiguousarray(form), np.ascontiguousarray(diagonal)
        return Panel(start, form, diagonal, self._tables(diagonal, True))

    def diagonal_panel(self, start: int, importance: Floats) -> Panel:
        """A panel whose columns are weighed by `importance` (width,), without cross terms."""
        size = self._form.vector
        groups = importance.reshape(-1, size)[:, :, None] * np.eye(size, dtype=np.float32)
        tables = self._tables(groups, False)
        return Panel(start, None, np.ascontiguousarray(groups), tables)

    def begin(self, panel: Panel, weights: Floats, blocks: Blocks) -> None:
        """Choose the scales of a panel to begin with; its form is diagonal.

        Types with mins, and those whose codebook has the signs in it, are not supported.
        """
        self._call(_library().begin, panel, weights, weights, blocks)

    def feed(
        self, panel: Panel, weights: Floats, errors: Floats, blocks: Blocks, targets: Floats
    ) -> None:
        """Round a panel with error feedback.

        `targets` (rows, width) are its weights plus what the errors of earlier panels carry on;
        they are overwritten.
        """
        self._call(_library().feed, panel, weights, errors, blocks, targets.ctypes.data)

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
        state = map(_address, (gradients, coupling, moved))
        self._call(_library().descend, panel, weights, errors, blocks, *state)

    def _call(
        self,
        function: Callable[..., None],
        panel: Panel,
        weights: Floats,
        errors: Floats,
        blocks: Blocks,
        *pointers: int | None,
    ) -> None:
        stored = blocks.d.shape[1] * self._form.block
        rows = _Rows(
            len(weights), stored, weights.strides[0] // 4,
            *(array.ctypes.data for array in (weights, errors, blocks.d, blocks.dmin)),
            *(a.ctypes.data for a in (blocks.scales, blocks.mins, blocks.codes, blocks.signs)),
        )  # fmt: skip
        columns, patterns = panel.columns, panel.tables.shape[1]
        part = _Panel(
            columns.start, columns.stop - columns.start, patterns,
            *map(_address, (panel.form, panel.diagonal, panel.tables)),
        )  # fmt: skip
        structures = (self._format, rows, part)
        function(*map(ctypes.byref, structures), *pointers)

    def _tables(self, diagonal: Floats, signed: bool) -> Floats:
        """v' D v of every code's values v, (groups, patterns of signs, codes).

        A pattern of signs and its opposite have the same form, so half of them suffice; one does
        unless `signed`. With scalars, the kernels need no table.
        """
        first, second, products = self._products
        if len(products) == 1:
            return np.empty((0, 1, 0), np.float32)
        patterns = self._patterns if signed else self._patterns[:1]
        signs = patterns[:, first] * patterns[:, second]
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


def _address(array: Floats | None) -> int | None:
    return None if array is None else array.ctypes.data


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
        *((name, ctypes.c_int32) for name in ("start", "width", "patterns")),
        *((name, ctypes.c_void_p) for name in ("form", "diagonal", "tables")),
    )


@cache
def _library() -> ctypes.CDLL:
    path = user_folder("cache") / f"kernels-{build_id()}.so"
    if not path.exists():
        _compile(path)
    library, pointer = ctypes.CDLL(str(path)), ctypes.c_void_p
    library.begin.argtypes = [pointer] * 3
    library.feed.argtypes = [pointer] * 4
    library.descend.argtypes = [pointer] * 6
    library.begin.restype = library.feed.restype = library.descend.restype = None
    return library


def _compile(path: Path) -> None:
    """Compile to `path`, which appears when it is complete.

    The compiler works in PATH.build, where the next run removes what a killed one left.

    Raises:
        Dots1Error: there is no compiler, or it fails; or the cache is not writable.
    """
    folder = path.with_name(f"{path.name}.build")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_partial(path, wait=_PATIENCE) as file:
            if path.exists():  # another process has compiled it meanwhile
                file.write(path.read_bytes())
                return
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                _run_compiler(folder / path.name, file.fileno())
                file.write((folder / path.name).read_bytes())
            finally:
                shutil.rmtree(folder, ignore_errors=True)


def _run_compiler(built: Path, lock: int) -> None:
    """Run it; it holds the `lock`, too, so that one that outlives its parent is waited for."""
    command = [_compiler(), *_FLAGS, "-o", str(built), str(_SOURCES / "kernels.cpp")]
    environment = os.environ | {"TMPDIR": str(built.parent)}
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment, pass_fds=[lock]
        )
    except FileNotFoundError:
        raise Dots1Error(
            f"refinement compiles its kernels, and there is no compiler {command[0]!r}; "
            "install g++ or clang++, or name one in CXX"
        ) from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().partition("\n")[0]
        raise Dots1Error(f"{command[0]} cannot compile the kernels: {reason}") from None


def _compiler() -> str:
    return os.environ.get("CXX") or "c++"


@cache
def build_id() -> str:
    """Identify the compiled kernels: a home directory may serve machines of several kinds."""
    sources = [path.read_text() for path in sorted(_SOURCES.iterdir())]
    inputs = (sources, _compiler(), _FLAGS, platform.machine(), _processor())
    return hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({x for x in lines if x.startswith(("flags", "Features", "model name"))}))
