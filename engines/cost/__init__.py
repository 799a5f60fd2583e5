"""What a model costs: parameters, operations, memory, and the devices that pay it."""
