"""A run's network as a file for another engine: ONNX, run by onnxruntime."""
