# The image of the job: one container run = one trial.
#
#   docker build --tag qlora-sweep-job .
#   docker run --gpus all --env-file job.env --volume /data:/data qlora-sweep-job
#
# On a machine without a GPU, a much smaller image:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu --tag qlora-sweep-job .
#
# For a node with CUDA 13's driver (580 or newer):
#   docker build --build-arg VARIANT=cu130 --tag qlora-sweep-job:cu130 .
#
# There is no `# syntax=` line: BuildKit's built-in front end is enough, so nothing is pulled but
# the base image. docs/container.md says what was built and run, and on what.

# The CUDA of base and torch: cu126 or cu130. CUDA 12.6 by default, because CUDA 13 needs driver 580
# and cloud images with a T4 still ship older ones. Both have code for a T4 (sm_75).
ARG VARIANT=cu126

# The only images that come from outside; only the one that is asked for is pulled. `base` has no
# CUDA libraries beyond the runtime stub: torch's wheels bring their own. What it does bring is
# NVIDIA_REQUIRE_CUDA, which makes a node whose driver is too old refuse the container. The tags are
# pinned; their digests are not yet.
FROM nvidia/cuda:12.6.3-base-ubuntu24.04 AS cu126
LABEL org.opencontainers.image.base.name="docker.io/nvidia/cuda:12.6.3-base-ubuntu24.04"
FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS cu130
LABEL org.opencontainers.image.base.name="docker.io/nvidia/cuda:13.0.1-base-ubuntu24.04"

# hadolint ignore=DL3006
FROM ${VARIANT} AS base
# python3 without pip and venv, which only the build needs. ca-certificates: wandb's core is a Go
# program and trusts only the system's certificates, unlike boto3 and the Hugging Face hub.
# Ubuntu deletes superseded versions: a pinned one stops building.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*


# Only the list of dependencies, so that any other change of pyproject.toml (ruff's settings, say)
# leaves the expensive stage below in the cache: it depends on this file's content alone.
FROM base AS requirements
COPY pyproject.toml /
RUN python3 -c 'import pathlib, tomllib; p = tomllib.loads(pathlib.Path("/pyproject.toml").read_text())["project"]; print("\n".join(p["dependencies"] + p["optional-dependencies"]["gcs"] + p["optional-dependencies"]["azure"]))' > /requirements.txt


# The packages, before any source: a change of the code rebuilds and pushes only small layers.
FROM base AS dependencies
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
# Two environments: pip lives in the one that stays behind, so the image cannot install anything.
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/venv
WORKDIR /build
COPY constraints.txt ./
COPY --from=requirements /requirements.txt ./
# Which build of torch: by default the variant's, which matches the base.
ARG VARIANT
ARG TORCH_INDEX=https://download.pytorch.org/whl/${VARIANT}
# torch alone and from its own index: the constraint torch==2.13.0 accepts 2.13.0+cu126, and PyPI's
# build for another CUDA cannot slip in. --no-deps because that index does not hold the pinned
# versions of torch's dependencies. The cache mount keeps pip's downloads out of every layer.
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/pip/bin/pip --python /opt/venv/bin/python install --disable-pip-version-check \
        --only-binary :all: --no-deps --constraint constraints.txt \
        --index-url "$TORCH_INDEX" torch
# All the rest, exactly as tested. --only-binary: no setup.py runs and no compiler is needed. The
# extra index is there for the CUDA libraries that torch pins; `pip check` proves that they fit.
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/pip/bin/pip --python /opt/venv/bin/python install --disable-pip-version-check \
        --only-binary :all: --constraint constraints.txt --requirement requirements.txt \
        --extra-index-url "$TORCH_INDEX" \
    && /opt/pip/bin/pip --python /opt/venv/bin/python check
# After that check, off with what the wheels carry for other accelerators, for compiling, and to test
# themselves (0.15 GB in folders named tests, which nothing imports). bitsandbytes keeps its CPU
# library and the one for this torch's CUDA, which it finds by version. Triton (0.7 GB) builds each
# kernel's launcher with a C compiler and there is none here; torch 2.13 uses it of its own accord
# for some products where it is installed, and would fail.
# libcusolverMg (several GPUs) and libnvrtc.alt, 0.2 GB, are named by no other library in here.
RUN site=$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
    && cuda=$(sed -nE "s/^cuda.* = '([0-9]+)\.([0-9]+).*'/\1\2/p" "$site/torch/version.py") \
    && find "$site/bitsandbytes" -name 'libbitsandbytes_*.so' ! -name libbitsandbytes_cpu.so \
        ! -name "libbitsandbytes_cuda${cuda:-none}.so" -delete \
    && test -e "$site/bitsandbytes/libbitsandbytes_${cuda:+cuda}${cuda:-cpu}.so" \
    && rm -rf "$site/torch/include" "$site/torch/share/cmake" "$site/torch/test" \
        "$site/triton" "$site"/triton-*.dist-info \
    && find "$site/torch/bin" ! -type d ! -name torch_shm_manager -delete \
    && find "$site" \( -name 'libcusolverMg.so*' -o -name 'libnvrtc.alt.so*' \) -delete \
    && find "$site" -mindepth 2 -type d -name tests -prune -exec rm -rf {} +


# The source with its bytecode: the root file system is read-only later, so Python could not keep
# any. unchecked-hash, because file times change between checkouts.
FROM base AS source
COPY LICENSE /app/
COPY job /app/job
RUN python3 -m compileall -q --invalidation-mode unchecked-hash /app


FROM base AS final
# The one folder that has to be writable; everything else works on a read-only root. Mode 1777, so
# that any numeric user works (`docker run --user`, OpenShift's random ones). No VOLUME: it would
# leave an anonymous volume behind after every run.
RUN mkdir --mode=1777 /work
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=source /app /app
# Python: no .pyc into a read-only folder; lines appear at once in `kubectl logs`; the job is found
# wherever it is started, and no file in the current folder can stand in for one of its modules.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPATH=/app \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1
# Every row of samples has another length, and blocks of fixed size would leave gaps between them:
# PyTorch's own advice for memory that cannot be had in one piece. Its effect was not measured.
ENV PYTORCH_ALLOC_CONF=expandable_segments:True
# Every cache and temporary file under /work. USER: no passwd entry belongs to the numeric user, and
# getpass.getuser(), which torch and wandb call, would fail without it.
ENV HF_HOME=/work/huggingface \
    HOME=/work \
    JOB_WORK_DIR=/work \
    TMPDIR=/work \
    TORCHINDUCTOR_CACHE_DIR=/work/torchinductor \
    USER=job \
    WANDB_ARTIFACT_DIR=/work/wandb/artifacts \
    WANDB_CACHE_DIR=/work/wandb/cache \
    WANDB_CONFIG_DIR=/work/wandb/config \
    WANDB_DATA_DIR=/work/wandb/data \
    WANDB_DIR=/work \
    XDG_CACHE_HOME=/work/cache
WORKDIR /work
# Numeric, because Kubernetes' runAsNonRoot cannot judge a name.
USER 10001:10001
# A trial is judged by its exit code, and a hang is found by the job itself (exit 74). A check from
# outside would import Python every few seconds beside the training, and Kubernetes ignores it.
HEALTHCHECK NONE
# Exec form: the job is process 1 and gets SIGTERM itself; a shell in between would swallow it.
# `env` becomes Python: a SIGTERM of Python's first 20 ms, when it has no handler and the kernel would
# drop it, is kept until the job unblocks it.
# No CMD: without a verb the job runs one trial; `docker run IMAGE status` reads as it should.
ENTRYPOINT ["/usr/bin/env", "--block-signal=TERM", "/opt/venv/bin/python", "-m", "job"]
# Last, because they change with every commit and cost no layer.
ARG VERSION=0
ARG REVISION=unknown
# What `job --version` says; not JOB_*, which would be an unknown setting.
ENV IMAGE_REVISION=$REVISION
LABEL org.opencontainers.image.title="qlora-sweep-job" \
      org.opencontainers.image.description="One run = one trial of a QLoRA sweep on a 15 GB T4" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
