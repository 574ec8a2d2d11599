#!/usr/bin/env bash
# bash benchmarks/gpu/run.sh [minutes]: every part of the GPU kit on all visible GPUs; without CUDA, toy sizes on the CPU.
# Packages of the folder gpu-kit (`make gpu-kit`), where it lies beside the tree, come before the machine's own. They are
# unzipped and put on PYTHONPATH: no network, no pip, no venv, nothing below a home that may be read-only.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python="${PYTHON:-python3}"
mkdir "$work/home"
export HOME="$work/home" PYTHONPATH="$root" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
unset HF_HOME TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR TORCH_EXTENSIONS_DIR XDG_CACHE_HOME
if [ -d "$root/gpu-kit" ]; then
  "$python" "$root/benchmarks/gpu/unpack.py" "$root/gpu-kit" "$work/packages"
  export PYTHONPATH="$root:$work/packages"
fi
cd "$root"
"$python" -m benchmarks.gpu "$@"
