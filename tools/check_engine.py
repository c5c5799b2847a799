"""Exit with 1 unless the installed llama.cpp has the RPC backend, and end with SIGILL unless its
kernels run on this processor.

python tools/check_engine.py

A wheel from pip's cache may have been compiled for another processor.
"""

import sys

import llama_cpp
import numpy as np

from dots1_local.devices.backends import device
from dots1_local.devices.bench_graph import BenchDevice, BenchGraph
from dots1_local.engine.log import capture
from dots1_local.ggml import quant_type

_F32 = 0
_COLUMNS, _ROWS = 256, 64


def main() -> None:
    """Check the installed llama.cpp."""
    if not llama_cpp.llama_supports_rpc():
        sys.exit("llama-cpp-python was built without RPC")
    for memory in (None, *device("CPU").extra_buffer_types):
        with capture(), BenchDevice("CPU", 1 << 20, memory=memory) as cpu:
            for name in ("F16", "Q8_0", "Q4_0", "Q4_K"):
                for tokens in (1, _ROWS):
                    _multiply(cpu, quant_type(name).ggml, tokens)


def _multiply(cpu: BenchDevice, kind: int, tokens: int) -> None:
    with BenchGraph(cpu) as graph:
        weights = graph.weights(kind, _COLUMNS, _ROWS)
        graph.mul_mat(weights, graph.tensor(_F32, _COLUMNS, tokens))
        if graph.place():
            graph.tile(weights, np.zeros(1024, np.uint8))
            graph.once()


if __name__ == "__main__":
    main()
