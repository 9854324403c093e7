# A server in a container.
#   docker build -t jaxserve .                          CPU
#   docker build -t jaxserve:gpu --build-arg EXTRA=gpu . NVIDIA; run with --gpus all
#   docker build -t jaxserve:tpu --build-arg EXTRA=tpu . Cloud TPU
#   docker run -p 127.0.0.1:8000:8000 -e JAXSERVE_API_KEY=... -v jaxserve-cache:/cache jaxserve
FROM python:3.12-slim-bookworm

# The C++ compiler is for our own CPU kernels, which are compiled on first use; it may be left out for gpu and tpu.
RUN apt-get update \
    && apt-get install --no-install-recommends --yes g++ \
    && rm -rf /var/lib/apt/lists/*

ARG EXTRA=""
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY models models
COPY sharding sharding
COPY pallas_kernels pallas_kernels
COPY jaxserve jaxserve
RUN pip install --no-cache-dir ".[server${EXTRA:+,$EXTRA}]" && rm -rf /src/build

# Compiled programs, kernels, models from the hub and files of batches: keep it, and the next start is quick.
ENV JAXSERVE_CACHE=/cache/jaxserve HF_HOME=/cache/huggingface PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 10001 jaxserve && mkdir /cache && chown jaxserve /cache
VOLUME /cache
USER 10001
WORKDIR /home/jaxserve

EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["jaxserve"]
CMD ["serve", "tiny", "--host", "0.0.0.0"]
