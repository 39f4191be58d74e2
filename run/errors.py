"""The error that a user who runs an export can mend."""

from llmexport.plugins.errors import UserError


class RunError(UserError):
    """An export that generates nothing, a prompt that it does not take, or files beside it that do not say how."""
