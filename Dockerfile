# docker build -t sb3-dppo .                                                     a CPU
# docker build -t sb3-dppo --build-arg BASE=nvidia/cuda:12.6.3-runtime-ubuntu24.04 .   a GPU of NVIDIA
ARG BASE=ubuntu:24.04
FROM ${BASE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git libegl1 libgl1 libosmesa6 python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV MUJOCO_GL=egl PATH=/venv/bin:$PATH
WORKDIR /sb3-dppo
COPY . .
RUN python3 -m venv /venv && pip install --no-cache-dir .
CMD ["python", "-m", "rl_zoo3.train", "--algo", "dppo", "--env", "Pendulum-v1"]
