"""The error that a user of the exporter can mend."""


class ExportError(Exception):
    """A mistake in what was asked for or found: one line that says what to do. The CLI exits with code 2."""
