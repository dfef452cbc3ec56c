# A small image that runs bundles for ONNX Runtime: neither PyTorch nor a compiler is in it.
#
#   docker build -t pyrexport .
#   docker run --rm --user "$(id -u)" -v "$PWD:/data" pyrexport sample shapes.pyrx --prompt "a red circle moving left" -o clip.mp4
#
# `scripts/check_image.py` runs its steps without a Docker daemon.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS wheel
ARG WHEELS=/wheels
WORKDIR /source
COPY . .
RUN python -m pip install -q -c constraints.txt build setuptools
RUN python -m build --wheel --no-isolation --outdir "$WHEELS" . && cp constraints.txt "$WHEELS"

FROM python:${PYTHON}-slim
ARG WHEELS=/wheels
COPY --from=wheel ${WHEELS} ${WHEELS}
RUN python -m pip install -q --no-cache-dir -c "$WHEELS/constraints.txt" "$(echo "$WHEELS"/*.whl)[video,hub]"
# Any user may run it: caches lie where everyone may write.
ENV HOME=/tmp
USER 1000
WORKDIR /data
ENTRYPOINT ["pyrexport"]
