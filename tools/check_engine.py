"""Exit with 1 unless the installed llama.cpp has the RPC backend.

python tools/check_engine.py
"""

import sys

import llama_cpp

if not llama_cpp.llama_supports_rpc():
    sys.exit("llama-cpp-python was built without RPC")
