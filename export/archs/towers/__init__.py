"""The vision towers that multimodal checkpoints have beside the text model."""
