# For a cluster: merges, verifies and loops on CPUs. docker build -t imm . && docker run -v /models:/models imm imm-merge ...
FROM python:3.13-slim
COPY . /src
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu' -c /src/constraints.txt \
 && pip install --no-cache-dir -c /src/constraints.txt /src && rm -r /src
# Compiled loops are kept here; any user of the container may write them.
ENV XDG_CACHE_HOME=/tmp/cache
WORKDIR /models
