# dots1 in a container: `docker build -t dots1 .`, then as docs/containers.md says.
#
# BACKEND is cpu, cuda or vulkan. BUILD_BASE and BASE are Debian or Ubuntu with Python 3.11 or newer,
# of one release. CPU_FLAGS choose the processor: without GGML_NATIVE, llama.cpp needs AVX2, FMA and
# F16C on x86 (Haswell, Zen); with -DGGML_NATIVE=ON the image fits the machine that builds it.

ARG BASE=debian:bookworm-slim
ARG BUILD_BASE=$BASE

FROM $BUILD_BASE AS build
ARG BACKEND=cpu
ARG CPU_FLAGS=-DGGML_NATIVE=OFF
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_CERT=/etc/ssl/certs/ca-certificates.crt
RUN case $BACKEND in \
        cpu | cuda) set -- ;; \
        vulkan) set -- libvulkan-dev glslc spirv-headers ;; \
        *) echo "BACKEND is $BACKEND, and must be cpu, cuda or vulkan" >&2; exit 2 ;; \
    esac; \
    apt-get update && apt-get install -y --no-install-recommends \
        ca-certificates g++ python3-dev python3-venv "$@"
WORKDIR /src
COPY constraints.txt .
ENV PIP_CONSTRAINT=/src/constraints.txt
# The engine is compiled before the program is copied: a changed program compiles nothing anew.
# Wheels hold each library three times; links to one of them take a third of the space.
RUN python3 -m venv /opt/dots1 && \
    case $BACKEND in cpu) flag= ;; cuda) flag=-DGGML_CUDA=ON ;; vulkan) flag=-DGGML_VULKAN=ON ;; esac && \
    CMAKE_ARGS="$flag $CPU_FLAGS -DGGML_RPC=ON -DLLAVA_BUILD=OFF" \
        /opt/dots1/bin/pip install --no-binary llama-cpp-python llama-cpp-python && \
    cd /opt/dots1/lib/python3*/site-packages/llama_cpp/lib && \
    for file in lib*.so.*.*.*; do \
        name=${file%%.so.*}.so; version=${file#"$name".}; \
        ln -sf "$file" "$name.${version%%.*}" && ln -sf "$file" "$name"; \
    done
COPY pyproject.toml README.md LICENSE ./
COPY dots1_local dots1_local
RUN /opt/dots1/bin/pip install '.[hub,serve]' && \
    /opt/dots1/bin/pip uninstall --yes setuptools pip

FROM $BASE
ARG BACKEND=cpu
RUN if [ "$BACKEND" = vulkan ]; then set -- libvulkan1 mesa-vulkan-drivers; else set --; fi; \
    apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates libgomp1 python3 tini "$@" && \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* && \
    install -d -m 1777 /models /cache
COPY --from=build /opt/dots1 /opt/dots1
# What dots1 keeps goes to /cache: measured speeds, files of the hub, a worker's weights.
ENV PATH=/opt/dots1/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    HOME=/cache XDG_CACHE_HOME=/cache XDG_STATE_HOME=/cache/state HF_HOME=/cache/huggingface \
    DOTS1_HOST=0.0.0.0
VOLUME /models /cache
WORKDIR /models
USER 1000:1000
EXPOSE 8000
# A model that is being loaded answers 503; a large one takes minutes.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 CMD ["python3", "-S", "-c", \
    "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
# As process 1, a verb without a handler of its own would ignore SIGTERM; tini passes it on.
ENTRYPOINT ["tini", "--", "dots1"]
CMD ["--help"]
