"""The error that a user of the exporter can mend."""

from llmexport.plugins.errors import UserError


class ExportError(UserError):
    """A checkpoint, config, output or option that cannot be exported as it is."""


class EngineError(UserError):
    """An export or a profile that no engine can be built of here; what TensorRT said, if it was asked."""
