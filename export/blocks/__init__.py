"""Torch modules that read a spec; the meaning of every block."""
