"""ONNX Runtime: any machine's CPU, and CUDA with onnxruntime-gpu."""
