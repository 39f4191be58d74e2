"""The rungs that every machine has: the others need TensorRT, a compiled library or a GPU, and have their own tests."""

EVERYWHERE = ("transformers", "blocks", "onnxruntime")
OF_A_BLOCK = EVERYWHERE[-1:]
