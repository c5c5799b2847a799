#!/usr/bin/env bash
# Build the container image without an image registry, use it as a person would, and print a table.
#
#   benchmarks/container.sh [WORK]
#
# WORK (build/container) keeps the base, which debootstrap makes of Debian's packages. It needs root,
# and Debian's packages buildah, curl, debootstrap, podman and runc. With BASE=IMAGE, that image is
# the base. The memory limit is podman's --memory; where podman cannot set it, a control group
# (version 1) made by hand; the table says which.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mkdir -p "${1:-$root/build/container}" && cd "${1:-$root/build/container}" && pwd)
image=localhost/dots1
name=dots1-check
limit=$((1 << 30)) # bytes: less than the machine has, and enough to measure and to serve the example
export STORAGE_DRIVER=${STORAGE_DRIVER:-overlay} BUILDAH_ISOLATION=chroot
models=$work/models cache=$work/cache

row() { printf '| %s | %s |\n' "$1" "$2"; }

fail() {
    echo "container: $*" >&2
    exit 1
}

base() { # an image of Debian bookworm as small as its "slim" image
    local folder=$work/base container mounted
    if [[ ! -e $folder/etc/os-release ]]; then
        rm -rf "$folder"
        debootstrap --variant=minbase bookworm "$folder"
        rm -rf "$folder"/var/cache/apt/* "$folder"/var/lib/apt/lists/* \
            "$folder"/usr/share/{doc,info,locale,man}/*
        # What this machine trusts, for a network that reads what it passes on.
        cp -r /usr/local/share/ca-certificates "$folder/usr/local/share/"
    fi
    container=$(buildah from scratch)
    mounted=$(buildah mount "$container")
    cp -a "$folder/." "$mounted/"
    buildah umount "$container" >/dev/null
    buildah commit --quiet --rm "$container" localhost/dots1-base >/dev/null
}

build() {
    if [[ -z ${BASE:-} ]]; then base >&2; fi
    # The OCI format has no HEALTHCHECK.
    buildah bud --format docker --layers --network host \
        --build-arg "BASE=${BASE:-localhost/dots1-base}" --tag "$image" "$root" >"$work/build.log" 2>&1 ||
        fail "the build failed; see $work/build.log"
}

box() { # podman run, as hardened as compose.yaml
    podman --runtime runc --cgroup-manager cgroupfs run --network host --health-interval disable \
        --ulimit nofile=1024:1024 --ulimit nproc=4096:4096 --read-only --tmpfs /tmp --cap-drop all \
        --security-opt no-new-privileges --volume "$models:/models" --volume "$cache:/cache" "$@"
}

seconds() { # COMMAND...: how long it takes
    local start=$EPOCHREALTIME
    "$@" >&2
    awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }'
}

start() { # until /health answers 200
    box --detach --name "$name" "$@"
    local tries
    for ((tries = 0; tries < 600; tries++)); do
        if curl --silent --fail --output "$work/health.json" http://127.0.0.1:8000/health; then return; fi
        sleep 0.1
    done
    podman logs "$name" >&2
    fail "the server did not become ready in 60 s"
}

ask() { # TOKENS
    curl --silent --show-error --fail http://127.0.0.1:8000/v1/chat/completions \
        --header "Content-Type: application/json" --data \
        '{"model": "dots1", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": '"$1"'}'
}

stop() { # prints the exit code
    podman stop --time 20 "$name" >/dev/null
    podman inspect --format '{{.State.ExitCode}}' "$name"
}

check() {
    local uid seen
    rm -rf "$models" "$cache"
    install -d -m 1777 "$models" "$cache"
    podman rm --force --ignore "$name" >/dev/null
    row image "$(podman image inspect --format '{{.Size}}' "$image" | numfmt --to=si --suffix=B)"
    row "of it the base" "$(podman image inspect --format '{{.Size}}' "${BASE:-localhost/dots1-base}" |
        numfmt --to=si --suffix=B)"
    row "convert the example" "$(seconds box --rm --volume "$root/examples/dots1-tiny:/example:ro" \
        "$image" convert /example -o /models/dots.gguf --type DQ4) s"
    row "start until /health is 200" "$(seconds start "$image" serve /models/dots.gguf \
        --prompt-cache /cache/prompts) s"
    uid=$(podman exec "$name" python3 -c 'import os; print(os.getuid())')
    [[ $uid == 1000 ]] || fail "the server runs as user $uid"
    row "user" "$uid"
    if podman exec "$name" python3 -c 'open("/opt/dots1/x", "w")' 2>/dev/null; then
        fail "the root file system is writable"
    fi
    row "root file system" "read-only"
    podman healthcheck run "$name" >&2 || fail "the health check failed"
    row "podman healthcheck run" "passes"
    ask 16 >"$work/answer.json"
    seen=$(python3 -c 'import json, sys; print(json.load(sys.stdin)["usage"]["completion_tokens"])' \
        <"$work/answer.json")
    row "tokens of the answer to curl" "$seen"
    row "stop" "$(seconds stop) s, exit code $(podman inspect --format '{{.State.ExitCode}}' "$name")"
    podman rm "$name" >/dev/null
    row "second start, with the caches" "$(seconds start "$image" serve /models/dots.gguf \
        --prompt-cache /cache/prompts) s"
    podman logs "$name" 2>&1 | grep -q 'of earlier prompts' || fail "the prompt cache is not there"
    row "files kept in /cache" "$(find "$cache" -type f | wc -l)"
    (ask 100000 >/dev/null 2>&1 || true) &
    sleep 0.5
    row "stop in mid-answer" "$(seconds stop) s, exit code $(podman inspect --format '{{.State.ExitCode}}' "$name")"
    podman rm "$name" >/dev/null
    memory
}

memory() { # the RAM that `dots1 hardware` sees, and serving within it
    local seen how="podman --memory" limited=(--memory "$limit")
    local group=/sys/fs/cgroup/memory/dots1-check
    if ! box --rm "${limited[@]}" "$image" --version >"$work/memory.log" 2>&1; then
        how="a control group made by hand" limited=(--cgroups disabled)
        mkdir -p "$group"
        echo "$limit" >"$group/memory.limit_in_bytes"
        echo "$BASHPID" >"$group/cgroup.procs"
    fi
    box --rm "${limited[@]}" "$image" hardware --json >"$work/hardware.json"
    seen=$(python3 -c 'import json, sys; print(json.load(sys.stdin)["cpu"]["total"])' <"$work/hardware.json")
    [[ $seen == "$limit" ]] || fail "the RAM is taken to be $seen bytes under a limit of $limit"
    row "RAM as planned with, under a limit of $limit bytes ($how)" "$seen"
    start "${limited[@]}" "$image" serve /models/dots.gguf >&2
    ask 16 >/dev/null
    row "served under this limit" "yes"
    stop >&2
    podman rm "$name" >/dev/null
}

build
echo "| | |"
echo "| --- | --- |"
check
