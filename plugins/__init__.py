"""One op, one folder: its meaning and its kernel."""
