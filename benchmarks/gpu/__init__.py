"""The GPU kit: `make gpu-kit` collects what a bare CUDA machine lacks, `bash benchmarks/gpu/run.sh` measures there."""
