"""From a checkpoint to ONNX and on to an engine."""
