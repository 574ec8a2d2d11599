# GPU image:   docker build -t moetune .
# Tried as a file, not built, where this was written: no GPU there. `moetune doctor` inside says what is missing.
# The compiler's CUDA is that of the locked torch, or nothing can be compiled against it.
FROM nvidia/cuda:13.0.3-devel-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PYTHONSAFEPATH=1
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev gcc g++ make git iproute2 openssh-client pdsh \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/moetune
ENV PATH=/opt/moetune/bin:$PATH

# torch first: it changes seldom, and its layer of gigabytes is kept
WORKDIR /src
COPY constraints.txt .
RUN pip install -c constraints.txt torch
# compiled against the torch just installed; without it torch's own kernel of variable lengths is used
RUN pip install -c constraints.txt setuptools wheel ninja packaging psutil \
 && pip install -c constraints.txt --no-build-isolation flash-attn \
 || echo "flash-attn was not built: attention=varlen is used"

COPY . .
RUN pip install -c constraints.txt . && pip check
WORKDIR /work
ENTRYPOINT ["moetune"]
CMD ["--help"]
