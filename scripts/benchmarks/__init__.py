"""What the benchmarks in the folder above share."""
