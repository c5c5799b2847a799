#!/usr/bin/env bash
# Placements on a Vulkan device that is only software (Mesa's lavapipe): no GPU is needed.
#
#   benchmarks/vulkan_offload.sh [OUT] [option of vulkan_offload.py]...
#
# This makes build/vulkan_offload: Mesa's driver, Vulkan's headers and the shader compiler, unpacked
# from Debian's packages, and an environment with llama-cpp-python built for Vulkan. Nothing is
# installed elsewhere, and what is there already is kept. Then it runs benchmarks/vulkan_offload.py
# with a folder for results (build/vulkan_offload/results).
#
# It needs Debian 12 or 13 with apt, CMake, a C++ compiler, Python 3.11 or newer, and a network. The
# build takes 10 minutes on one core (JOBS=N for more cores). The first run compiles shaders for some
# minutes more, which later runs find in build/vulkan_offload/shaders.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$root/build/vulkan_offload
debian=$folder/debian
libraries=$debian/usr/lib/$(uname -m)-linux-gnu
python=${PYTHON:-python3}
headers_suite=trixie # Debian 12 has no headers that are new enough, and headers fit every system

fail() {
    echo "vulkan_offload: $*" >&2
    exit 1
}

unpack_debian() { # the driver of this system's suite, or of its backports if they have a newer one
    local suite apt=$folder/apt mirror
    # shellcheck disable=SC1091
    suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    [[ $suite == bookworm || $suite == trixie ]] || fail "this is neither Debian 12 nor Debian 13"
    mirror=$(apt-get indextargets --format '$(SITE) $(RELEASE)' "Created-By: Packages" |
        sed -n "s/ $suite\$//p" | head -n 1)
    [[ -n $mirror ]] || fail "apt has no mirror for $suite; run apt-get update"
    rm -rf "$apt" "$debian.partial"
    mkdir -p "$apt"/{lists/partial,archives/partial,none} "$debian.partial"
    printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' \
        "$mirror" "$suite" "$mirror" "$suite-backports" "$mirror" "$headers_suite" |
        sort -u >"$apt/sources.list"
    printf 'Package: *\nPin: release n=%s\nPin-Priority: %s\n\n' "$suite-backports" 600 \
        "$headers_suite" "$([[ $suite == "$headers_suite" ]] && echo 500 || echo -1)" >"$apt/preferences"
    cat >"$apt/apt.conf" <<END
Dir::State::lists "$apt/lists";
Dir::Cache "$apt";
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "$apt/none";
Dir::Etc::preferences "$apt/preferences";
Dir::Etc::preferencesparts "$apt/none";
APT::Sandbox::User "root";
END
    export APT_CONFIG=$apt/apt.conf
    apt-get --quiet update
    apt-get --quiet --yes --no-install-recommends --reinstall --download-only install \
        mesa-vulkan-drivers libvulkan1 glslc
    (cd "$apt/archives" && apt-get --quiet download \
        "libvulkan-dev/$headers_suite" "spirv-headers/$headers_suite")
    unset APT_CONFIG
    local package
    for package in "$apt"/archives/*.deb; do
        dpkg-deb -x "$package" "$debian.partial"
    done
    # The headers come with a link to a library of their own version.
    ln -sf libvulkan.so.1 "$debian.partial/usr/lib/$(uname -m)-linux-gnu/libvulkan.so"
    rm -rf "$apt" "$debian"
    mv "$debian.partial" "$debian"
}

build_engine() { # into an environment of its own
    local version
    version=$(sed -n 's/^llama_cpp_python==//p' "$root/constraints.txt")
    export PIP_CONSTRAINT=$root/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
    [[ -x $folder/venv/bin/python ]] || "$python" -m venv "$folder/venv"
    if [[ ! -d $folder/engine-$version ]]; then
        rm -rf "$folder/sources"
        "$folder/venv/bin/pip" download --quiet --no-deps --no-binary llama-cpp-python \
            --dest "$folder/sources" "llama-cpp-python==$version"
        tar -xzf "$folder"/sources/*.tar.gz -C "$folder/sources"
        mv "$folder"/sources/llama_cpp_python-*/ "$folder/engine-$version"
    fi
    # The build folder is kept, so that a build that was interrupted goes on.
    CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-1} CMAKE_ARGS="-DGGML_VULKAN=on -DGGML_RPC=on \
-DLLAVA_BUILD=off -DCMAKE_PREFIX_PATH=$debian/usr" "$folder/venv/bin/pip" install --quiet \
        -C build-dir="$folder/cmake" "$folder/engine-$version"
    "$folder/venv/bin/pip" install --quiet --editable "$root"
    touch "$folder/venv/.built-$version"
}

for tool in apt-get dpkg-deb cmake c++; do
    command -v "$tool" >/dev/null || fail "there is no $tool"
done
mkdir -p "$folder"
[[ -d $debian ]] || unpack_debian
export LD_LIBRARY_PATH=$libraries PATH=$debian/usr/bin:$PATH
[[ -e $folder/venv/.built-$(sed -n 's/^llama_cpp_python==//p' "$root/constraints.txt") ]] || build_engine
# Without these, the driver takes 2 to 15 minutes to compile some kernels, not one.
export GGML_VK_DISABLE_F16=1 LP_NATIVE_VECTOR_WIDTH=128
# Only this driver: a real GPU's would be taken instead.
VK_ICD_FILENAMES=$(echo "$debian"/usr/share/vulkan/icd.d/lvp_icd*.json)
export VK_ICD_FILENAMES MESA_SHADER_CACHE_DIR=$folder/shaders GGML_VK_VISIBLE_DEVICES=0
cd "$root"
PYTHONPATH=$root exec "$folder/venv/bin/python" -m benchmarks.vulkan_offload "$@"
