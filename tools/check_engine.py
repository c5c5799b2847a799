"""Exit with 1 unless the installed llama.cpp has the RPC backend and runs on this processor.

python tools/check_engine.py

A wheel from pip's cache may have been compiled for another processor, on which a product of
matrices then ends this program with SIGILL.
"""

import sys

import llama_cpp

from dots1_local.devices.bench_graph import BenchDevice, BenchGraph

_F32, _F16, _Q8_0, _Q4_K = 0, 1, 8, 12  # of enum ggml_type
_COLUMNS, _ROWS = 256, 64

if not llama_cpp.llama_supports_rpc():
    sys.exit("llama-cpp-python was built without RPC")
with BenchDevice("CPU", 1 << 20) as cpu, BenchGraph(cpu) as graph:
    for kind in (_F16, _Q8_0, _Q4_K):
        for tokens in (1, _ROWS):
            weights = graph.weights(kind, _COLUMNS, _ROWS)
            graph.mul_mat(weights, graph.tensor(_F32, _COLUMNS, tokens))
    graph.place()
    graph.once()
