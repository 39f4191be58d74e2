"""Runs an export: text from a prompt (`generate`), and how long that takes (`bench`)."""
