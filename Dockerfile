# One image for every role; the command names it: `docker run IMAGE gateway`, as compose.yaml does.
#
#   docker build -t tandem:cuda .
#   docker build -t tandem:cpu --build-arg EXTRA= --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .

FROM python:3.12-slim-bookworm AS builder
# where torch comes from: empty = pip's own index, whose build for Linux is the one for CUDA
ARG TORCH_INDEX=
# an extra of pyproject.toml, or none
ARG EXTRA=cuda
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /app
# torch for CUDA names the one triton that it goes with, which need not be the one that constraints.txt pins
COPY constraints.txt ./
RUN sed -i '/^triton==/d' constraints.txt \
    && python -m venv .venv \
    && if [ -n "$TORCH_INDEX" ]; then \
        .venv/bin/python -m pip install --no-deps --index-url "$TORCH_INDEX" \
            "torch==$(sed -n 's/^torch==//p' constraints.txt)"; \
    fi
COPY pyproject.toml ./
COPY tools/setup tools/
COPY protos protos
RUN tools/setup "$EXTRA"

FROM python:3.12-slim-bookworm
# gcc stays: the CPU ops are compiled at first use, for the very CPU that runs them, and Triton compiles its launchers.
# A new volume takes its owner from the folder that it is mounted over.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 tandem \
    && useradd --uid 1000 --gid 1000 --home-dir /cache --no-create-home --shell /usr/sbin/nologin tandem \
    && install --directory --owner tandem --group tandem --mode 0755 /cache \
    && install --directory --owner tandem --group tandem --mode 0700 /run/tandem
WORKDIR /app
COPY --from=builder /app/.venv .venv
COPY . .
RUN .venv/bin/python -m compileall -q cli gateway prefill_worker decode_worker shared kernels benchmarks protos
# models, compiled ops and Triton's kernels; the rest of the image is never written to
ENV HOME=/cache XDG_CACHE_HOME=/cache
USER 1000:1000
STOPSIGNAL SIGTERM
ENTRYPOINT ["./tandem"]
CMD ["--help"]
