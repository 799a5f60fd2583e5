"""TensorRT and TensorRT-RTX: plans are built, loaded, refitted and run."""
