# Untested: no Docker was at hand where this was written.
#
#   docker build -t perceiver-ar .                                  # CPU
#   docker build -t perceiver-ar --build-arg ACCELERATOR=cuda12 .   # run with --gpus=all
#   docker build -t perceiver-ar --build-arg ACCELERATOR=tpu .      # run with --privileged --net=host
#   docker run --rm -v "$PWD:/work" perceiver-ar train --config=text_cpu --workdir=run --config.data.source=own.txt
#
# `serve` listens on 127.0.0.1 only: --net=host makes it reachable from this machine.
FROM python:3.12-slim
ARG ACCELERATOR=
WORKDIR /source
COPY setup.py setup.cfg pyproject.toml README.md LICENSE ./
COPY perceiver_ar_jax perceiver_ar_jax
COPY configs configs
RUN pip install --no-cache-dir ".[hub,serve,gcs${ACCELERATOR:+,$ACCELERATOR}]"
WORKDIR /work
ENTRYPOINT ["perceiver-ar"]
