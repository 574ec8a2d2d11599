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

# the locked set first: it changes seldom, and its layer is kept
COPY requirements-gpu.txt /src/requirements-gpu.txt
RUN pip install --requirement /src/requirements-gpu.txt
# compiled against the torch just installed; without it torch's own kernel of variable lengths is used
RUN pip install wheel && pip install --no-build-isolation "flash-attn>=2.8" || echo "flash-attn was not built: attention=varlen is used"

COPY . /src
RUN pip install --no-deps /src && pip check
WORKDIR /work
ENTRYPOINT ["moetune"]
CMD ["--help"]
