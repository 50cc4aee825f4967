# CPU:  docker build --tag efficientnet .
# GPU:  docker build --tag efficientnet-gpu --build-arg EXTRAS=gpu .      (the host needs NVIDIA's driver and container toolkit)
#
# docker run --rm -it --user "$(id -u):$(id -g)" --volume "$PWD:/work" [--gpus all] efficientnet train --config lite0_folder data.path=IMAGES
#
# The current folder is /work in the container: data, runs and mlflow.db stay on the host, under your user.
FROM python:3.11-slim

ARG EXTRAS=""
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY configs configs
COPY pipeline pipeline
RUN pip install --no-cache-dir --constraint constraints.txt ".${EXTRAS:+[$EXTRAS]}" && rm -r /src/*

# Any user may run it: caches and settings go where everyone can write.
ENV HOME=/tmp XDG_CACHE_HOME=/tmp/cache MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /work
ENTRYPOINT ["efficientnet"]
CMD ["--help"]
