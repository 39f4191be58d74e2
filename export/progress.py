"""How a long job tells what it does."""

from collections.abc import Callable

# Told of each step of a long job: what is done, how many of how many.
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, of: int) -> None:
    """Says nothing."""
