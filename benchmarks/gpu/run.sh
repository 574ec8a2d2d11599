#!/usr/bin/env bash
# bash benchmarks/gpu/run.sh [minutes]: every part of the GPU kit on all visible GPUs; without CUDA, toy sizes on the CPU.
# If the tree has a folder gpu-kit (`make gpu-kit`), its packages take precedence over the machine's own. They are
# unzipped and put on PYTHONPATH, which needs no network, no pip, no venv and no writable home.
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
