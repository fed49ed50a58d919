"""Errors that a user can mend: each says what was wrong, what was expected and what to do.

The command line turns any of them into one line on standard error and exit code 2; everything else is a bug and keeps
its traceback.
"""


class JaxmllmError(Exception):
    """Base of every error that jaxmllm raises on bad input."""


class ConfigError(JaxmllmError, ValueError):
    """A checkpoint's configuration holds something that is missing, contradictory or not supported."""


class CheckpointError(JaxmllmError, ValueError):
    """A checkpoint's tensors or files are missing, broken, misnamed or misshaped."""


class ProcessorError(JaxmllmError, ValueError):
    """Images and questions cannot be turned into model inputs."""


class InputError(JaxmllmError, ValueError):
    """Arrays, layers, positions or files given by the caller do not fit the model."""
