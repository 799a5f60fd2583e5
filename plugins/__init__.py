"""The scoring operator: definition, float64 reference, portable ONNX function.

`errors` also lives here, in the package that every other one may import.
"""
