"""The GPU kit: `make gpu-kit` packs it for a bare CUDA machine, where `bash benchmarks/gpu/run.sh` measures."""
