"""The root of all errors that a user can mend."""


class UserError(Exception):
    """What was asked, what was found, what to do, in one line. The CLI prints it and exits with code 2.

    Every layer raises its own: ExportError, EngineError, Mismatch.
    """


class PluginError(UserError):
    """The plugin library cannot be built, found or loaded here."""


class CacheError(PluginError):
    """The cache folder cannot be had, or somebody else could have written what lies in it."""
