"""Where traces and built libraries are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$LLMEXPORT_CACHE, else llmexport's own in the user's cache folder."""
    chosen = os.environ.get("LLMEXPORT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmexport"
