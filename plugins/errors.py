"""The root of all errors that a user can mend."""


class UserError(Exception):
    """A user's mistake, in one line: what was asked, what was found, what to do. The CLI prints it, with exit code 2.

    Every layer raises its own: ExportError, EngineError, Mismatch.
    """


class PluginError(UserError):
    """The plugin library cannot be built, found or loaded here."""


class CacheError(PluginError):
    """The cache folder cannot be had, or somebody else could have written files in it."""
