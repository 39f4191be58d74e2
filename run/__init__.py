"""Runs an export: text from a prompt (`generate`), and how long that takes (`bench`)."""

MOST_TOKENS = 256  # that `generate` adds to a prompt, if nobody says how many
