"""The errors a user can meet, all under one root.

::

    SwiftI2VError
    ├── InputError            an input of the user that cannot be used
    │   ├── ShapeError        a size or a frame count that does not fit
    │   ├── MediaError        an image or a clip that cannot be read or written
    │   └── PromptError       a prompt the text encoder cannot take
    ├── ConfigError           an unknown key, a value out of range, an unknown preset
    ├── LoadingError          a checkpoint or LoRA that does not match the model
    ├── StorageError          a checkpoint that cannot be written
    ├── OutOfMemoryError      a training step that does not fit into the device's memory
    ├── NumericalError        a model produced NaN or infinity
    └── CancelledError        the caller asked to stop
"""


class SwiftI2VError(Exception):
    """Root of all errors raised on purpose; the command line prints it as one line."""


class InputError(SwiftI2VError):
    """An input of the user that cannot be used."""


class ShapeError(InputError):
    """A size or a frame count that does not fit."""


class MediaError(InputError):
    """An image or a clip that cannot be read or written."""


class PromptError(InputError):
    """A prompt the text encoder cannot take."""


class ConfigError(SwiftI2VError):
    """An unknown key, a value out of range or an unknown preset."""


class LoadingError(SwiftI2VError):
    """A checkpoint or a LoRA that does not match the model it is meant for."""


class StorageError(SwiftI2VError):
    """A checkpoint that cannot be written, for lack of space or of permission."""


class OutOfMemoryError(SwiftI2VError):
    """A training step does not fit into the device's memory."""


class NumericalError(SwiftI2VError):
    """A model produced NaN or infinity; finished parts are kept."""


class CancelledError(SwiftI2VError):
    """The caller asked to stop between two model calls."""
