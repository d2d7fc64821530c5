# Image for GPUs, with mamba-ssm and causal-conv1d compiled for them.
#   docker build --file infra/images/gpu.Dockerfile --tag registry.example.com/meteor-gpu:0.1.0 .
# ARCHITECTURES: 8.0 is A100, 9.0 H100 and H200, 10.0 B200. Each takes minutes of compilation.
ARG BASE=nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04
# hadolint ignore=DL3006
FROM ${BASE} AS kernels

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG ARCHITECTURES="8.0;9.0"
ARG TORCH=2.13.0
ENV TORCH_CUDA_ARCH_LIST=${ARCHITECTURES} MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE MAX_JOBS=8
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv g++ ninja-build git \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH}
# The packages are compiled against the torch that will load them; a wheel for another torch crashes at import.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "torch==${TORCH}" "setuptools>=77" wheel packaging ninja \
    && pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels \
        "causal-conv1d>=1.5" "mamba-ssm>=2.3"

# hadolint ignore=DL3006
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The compiler stays in the image, because DeepSpeed and Triton compile for the GPU at run time. KubeRay's probes use wget.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv g++ ninja-build wget ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    # Ubuntu's image already has a user with this id.
    && userdel --remove ubuntu \
    && useradd --create-home --uid 1000 --shell /bin/bash ray \
    && python3 -m venv /opt/venv \
    && chown -R ray:ray /opt/venv
ENV PATH=/opt/venv/bin:${PATH}

WORKDIR /opt/meteor
ARG TORCH=2.13.0
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY --from=kernels /wheels /wheels
RUN mkdir meteor pipelines jobs && touch meteor/__init__.py pipelines/__init__.py jobs/__init__.py \
    && pip install --no-cache-dir --constraint constraints.txt "torch==${TORCH}" . /wheels/*.whl \
    && pip uninstall --yes llava-meteor
COPY meteor meteor
COPY pipelines pipelines
COPY jobs jobs
RUN pip install --no-cache-dir --no-deps . && chown -R ray:ray /opt/meteor /opt/venv

USER 1000
ENV MLFLOW_DISABLE_TELEMETRY=true HF_HUB_OFFLINE=1 METEOR_LOG_FORMAT=json
CMD ["bash"]
