"""The parts of `gpu_check.py`: each measures and checks one thing, in a process of its own."""
