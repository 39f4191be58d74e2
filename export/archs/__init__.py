"""One architecture, one data file; the file name is what `--arch` takes."""
