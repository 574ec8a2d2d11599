"""What benchmarks share: figures, the machine, processes, measured memory and outputs."""
