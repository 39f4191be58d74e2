"""Runs the same feeds through PyTorch, ONNX Runtime and engines, and compares."""
