"""Graph in, graph out: stitching and fusion passes. Never imports torch."""
