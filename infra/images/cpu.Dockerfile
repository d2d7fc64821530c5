# Image for CPUs: the demo, encoding on CPUs, the head of a cluster, MLflow's server.
#   docker build --file infra/images/cpu.Dockerfile --tag registry.example.com/meteor-cpu:0.1.0 .
# For repeatable builds give the base by digest: --build-arg BASE=python:3.11-slim-bookworm@sha256:...
ARG BASE=python:3.11-slim-bookworm
# hadolint ignore=DL3006
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# DeepSpeed compiles its communication op with g++ and ninja; KubeRay's probes use wget.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ ninja-build wget ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 --shell /bin/bash ray

WORKDIR /opt/meteor
# Dependencies are installed first, so that they stay in the layer cache when only the code changes.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir meteor pipelines jobs && touch meteor/__init__.py pipelines/__init__.py jobs/__init__.py \
    && pip install --no-cache-dir --constraint constraints.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu . "psycopg2-binary>=2.9" \
    && pip uninstall --yes llava-meteor
COPY meteor meteor
COPY pipelines pipelines
COPY jobs jobs
RUN pip install --no-cache-dir --no-deps . && chown -R ray:ray /opt/meteor

USER 1000
# DeepSpeed's communication op is compiled here once, instead of in every pod.
RUN python -m pipelines.warm_up
ENV MLFLOW_DISABLE_TELEMETRY=true HF_HUB_OFFLINE=1 METEOR_LOG_FORMAT=json
CMD ["bash"]
