"""The root of all errors that a user can mend."""


class UserError(Exception):
    """What was asked, what was found, what to do, in one line. The CLI prints it and exits with code 2.

    Every layer raises its own: ExportError, EngineError, Mismatch.
    """
