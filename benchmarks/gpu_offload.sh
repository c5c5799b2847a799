#!/usr/bin/env bash
# Predicted and real memory and speed of placements on a CUDA machine without a network.
#
#   benchmarks/gpu_offload.sh pack
#   benchmarks/gpu_offload.sh run OUT [--minutes 10] [--device worker] [option of gpu_offload.py]...
#
# `pack` needs a network, and makes build/gpu_offload.tar (60 MB): this program, llama.cpp's sources
# and Python packages. Unpacked anywhere on the CUDA machine, `run` there builds llama.cpp for its
# GPU (kept for a next run), and measures with benchmarks/gpu_offload.py until the minutes are over.
# What is finished lies in OUT at any time.
#
# It needs a C++ compiler, CMake, the CUDA toolkit with cuBLAS, and Python 3.11, 3.12 or 3.13.
# `--device worker` takes a worker of llama.cpp's RPC backend for the GPU, and needs no CUDA.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$root/build/gpu_offload
engine=$folder/engine
python=${PYTHON:-python3}
packages=(diskcache filelock gguf jinja2 msgspec numpy typing-extensions)
pythons=(3.11 3.12 3.13)
most_bytes=$((64 << 20))

fail() {
    echo "gpu_offload: $*" >&2
    exit 1
}

pinned() { # the version of a package that constraints.txt has
    sed -n "s/^$1==//p" "$root/constraints.txt"
}

pack() {
    local size
    work=$(mktemp -d) # not local: the trap outlives this function
    trap 'rm -rf "$work"' EXIT
    rm -rf "$folder" "$folder.tar"
    mkdir -p "$folder"
    pack_sources "$work"
    pack_wheels
    tar -C "$root" --exclude __pycache__ -cf "$folder.tar" constraints.txt benchmarks dots1_local \
        tools tests/__init__.py tests/workers.py build/gpu_offload
    size=$(wc -c <"$folder.tar")
    ((size <= most_bytes)) || fail "$size bytes are more than the $most_bytes that may travel"
    echo "$folder.tar: $((size >> 20)) MiB" >&2
}

pack_sources() { # WORK: the binding, and of llama.cpp what its libraries for CPU, CUDA and RPC need
    "$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$1" \
        "llama-cpp-python==$(pinned llama_cpp_python)"
    tar -xzf "$1"/llama_cpp_python-*.tar.gz -C "$1"
    local tree
    tree=$(echo "$1"/llama_cpp_python-*/)
    rm -rf "$tree/llama_cpp/server"
    (
        cd "$tree"
        local backends=()
        for backend in vendor/llama.cpp/ggml/src/*/; do
            case $(basename "$backend") in
                ggml-cpu | ggml-cuda | ggml-rpc) ;;
                *) backends+=("--exclude=${backend%/}") ;;
            esac
        done
        tar -cJf "$folder/sources.tar.xz" "${backends[@]}" PKG-INFO llama_cpp \
            vendor/llama.cpp/{CMakeLists.txt,LICENSE,cmake,ggml,include,src,vendor}
    )
}

pack_wheels() { # for Linux and each Python that is likely there
    local version platforms=(--platform "linux_$(uname -m)")
    for version in 2_28 2_27 2_17 2014 2_12 2010 2_5 1; do
        platforms+=(--platform "manylinux${version/#2_/_2_}_$(uname -m)")
    done
    for version in "${pythons[@]}"; do
        "$python" -m pip download --quiet --only-binary :all: --constraint "$root/constraints.txt" \
            --python-version "$version" "${platforms[@]}" --dest "$folder/wheels" "${packages[@]}"
    done
}

run() {
    (($#)) || fail "run needs a folder for the results"
    [[ $1 != -* ]] || fail "run needs a folder for the results before its options"
    local out=$1 minutes=10 device=gpu rest=()
    shift
    while (($#)); do
        case $1 in
            --minutes) minutes=${2:?} && shift 2 ;;
            --device) device=${2:?} && shift 2 ;;
            *) rest+=("$1") && shift ;;
        esac
    done
    deadline=$((SECONDS + minutes * 60))
    mkdir -p "$out"
    out=$(cd "$out" && pwd)
    : >"$out/steps.txt"
    step "$out" unpack 60
    step "$out" build $((deadline - SECONDS - 60)) "$device"
    local left=$((deadline - SECONDS))
    local status=0
    step "$out" measure "$left" "$out" --device "$device" --seconds $((left - 10)) \
        ${rest[@]+"${rest[@]}"} || status=$?
    if [[ -e $out/table.md ]]; then cat "$out/table.md"; fi
    return "$status"
}

step() { # OUT NAME SECONDS ARGUMENT...: one of the functions below, its output and time kept
    local out=$1 name=$2 bound=$3 start=$SECONDS status=0
    shift 3
    ((bound > 0)) || fail "no time is left for the step $name"
    echo "gpu_offload: $name (at most $bound s)" >&2
    timeout --kill-after 10 "$bound" "${BASH:-bash}" "$root/benchmarks/gpu_offload.sh" "step-$name" \
        "$@" >"$out/$name.log" 2>&1 &
    child=$!
    trap 'kill "$child"' INT TERM # a Ctrl-C does not reach what timeout started
    wait "$child" || status=$?
    trap - INT TERM
    echo "$name: $((SECONDS - start)) s, exit code $status" | tee -a "$out/steps.txt" >&2
    if ((status)); then tail -n 20 "$out/$name.log" >&2; fi
    return "$status"
}

unpack() {
    [[ -d $engine ]] || {
        mkdir -p "$engine.partial"
        tar -xJf "$folder/sources.tar.xz" -C "$engine.partial"
        mv "$engine.partial" "$engine"
    }
    local site abi version wheel
    site=$(site_folder)
    abi=${site##*-}
    [[ -d $site ]] || {
        [[ -n $(find "$folder/wheels" -name "*-$abi-$abi-*") ]] ||
            fail "$python is ${abi/#cp3/Python 3.}, and packed is for ${pythons[*]}; set PYTHON to one"
        rm -rf "$site.partial"
        for wheel in "$folder"/wheels/*-{py3-none-any,"$abi-$abi-"*}.whl; do
            "$python" -m zipfile -e "$wheel" "$site.partial"
        done
        version=$(sed -n 's/^Version: //p' "$engine/PKG-INFO")
        mkdir "$site.partial/llama_cpp_python-$version.dist-info"
        cp "$engine/PKG-INFO" "$site.partial/llama_cpp_python-$version.dist-info/METADATA"
        mv "$site.partial" "$site"
    }
}

site_folder() { # of packages for this Python; they need nothing but to be unpacked
    "$python" -c 'import sys; print(sys.argv[1] + "/site-cp%d%d" % sys.version_info[:2])' "$folder"
}

build() { # DEVICE: the libraries, into a build folder that the binding takes for its own
    local options=(
        -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_RPC=ON -DGGML_NATIVE=ON
        -DGGML_CCACHE=OFF -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF
        -DLLAMA_OPENSSL=OFF -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON
    )
    local rpath="\$ORIGIN" target=$folder/libraries-$1
    if [[ $1 == gpu ]]; then
        cuda_options
        options+=("${cuda[@]}")
        rpath+=";$cuda_rpath"
    fi
    if command -v ninja >/dev/null; then options+=(-G Ninja); fi
    cmake -S "$engine/vendor/llama.cpp" -B "$target" "${options[@]}" "-DCMAKE_INSTALL_RPATH=$rpath"
    cmake --build "$target" --target llama --parallel "${JOBS:-$(nproc)}"
    ln -sfn "$target/bin" "$engine/llama_cpp/lib"
}

cuda_options() { # sets `cuda` and `cuda_rpath`: how to compile for the GPU that is there
    PATH=$PATH:/usr/local/cuda/bin
    command -v nvcc >/dev/null || fail "there is no nvcc; install the CUDA toolkit"
    local toolkit capability cublas cublas_lt driver
    toolkit=$(nvcc --dryrun -c nothing.cu 2>&1 | sed -n 's/^#\$ TOP=//p')
    capability=${CUDA_ARCHITECTURE:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader |
        sort -u | tr -d . | paste -sd ';')}
    cublas=$(shared_library libcublas "$toolkit")
    cublas_lt=$(shared_library libcublasLt "$toolkit")
    driver=$(shared_library libcuda "$toolkit")
    # The toolkit of a Python environment has its parts in folders that CMake does not look at.
    local include
    for include in "$toolkit/include" "$(dirname "$cublas")"/{..,../..,../../..}/include; do
        if [[ -e $include/cublas_v2.h ]]; then
            export CPATH=$include${CPATH:+:$CPATH}
            break
        fi
    done
    cuda_rpath="$(dirname "$cublas");$(dirname "$(shared_library libcudart "$toolkit")")"
    cuda=(
        -DGGML_CUDA=ON -DGGML_CUDA_NCCL=OFF "-DCMAKE_CUDA_ARCHITECTURES=$capability"
        "-DCUDA_cublas_LIBRARY=$cublas" "-DCUDA_cublasLt_LIBRARY=$cublas_lt"
        "-DCUDA_cuda_driver_LIBRARY=$driver"
    )
}

shared_library() { # NAME TOOLKIT: its path, wherever this machine has it
    local file directory
    while read -r directory; do
        for file in "$directory/$1.so" "$directory/$1.so".[0-9]*; do
            if [[ -e $file ]]; then
                echo "$file"
                return
            fi
        done
    done < <(library_folders "$2")
    fail "there is no $1 on this machine; install the CUDA toolkit with cuBLAS, and the driver"
}

library_folders() { # TOOLKIT
    printf '%s\n' "$1/lib64" "$1/lib" "$1"/targets/*/lib
    ldconfig -p 2>/dev/null | sed -n 's/^.*=> \(.*\)\/libcu[^/]*$/\1/p' | sort -u
    printf '%s\n' "${LD_LIBRARY_PATH:-}" | tr : '\n'
    printf '%s\n' /usr/local/nvidia/lib64 /usr/lib/wsl/lib
    "$python" -c 'import site, sys
for each in {*site.getsitepackages(), *sys.path}: print(each)' | while read -r directory; do
        printf '%s\n' "$directory"/nvidia/*/lib
    done
    printf '%s\n' "$1/lib64/stubs" "$1"/targets/*/lib/stubs
}

measure() {
    cd "$root"
    export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} # llama.cpp by itself would take them all
    PYTHONPATH=$engine:$(site_folder):$root PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
        exec "$python" -m benchmarks.gpu_offload "$@"
}

case ${1:-} in
    pack) pack ;;
    run) run "${@:2}" ;;
    step-unpack | step-build | step-measure) "${1#step-}" "${@:2}" ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2 && exit 2 ;;
esac
