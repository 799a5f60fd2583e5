"""What the benchmarks beside this folder share."""
