# ELO in a container.
#
#   docker build -t elo .                            # PyTorch for CPUs
#   docker build -t elo --build-arg TORCH=cu130 .    # PyTorch for CUDA 13.0; needs the NVIDIA container toolkit to run
#
#   docker run --rm -v "$PWD:/work" elo run config.yaml
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" elo run config.yaml
#
# The user in the container is number 1000; pass --build-arg USER_ID=$(id -u) where yours is another.
FROM python:3.11-slim

ARG TORCH=cpu
ARG USER_ID=1000

WORKDIR /opt/elo
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --extra-index-url "https://download.pytorch.org/whl/${TORCH}" \
        --constraint requirements.lock ".[adamw8bit]" \
    && useradd --create-home --uid "${USER_ID}" elo \
    && mkdir /work \
    && chown elo /work

USER ${USER_ID}
WORKDIR /work
ENTRYPOINT ["elo"]
CMD ["--help"]
