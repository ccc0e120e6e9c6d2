"""Every error that vlmdeploy raises on purpose. A message says what was being done, on what, what was found,
what was expected and what to do next; the command line prints it as one line and exits with status 1."""


class VlmdeployError(Exception):
    """Base of all errors below; anything else that escapes is a bug of ours.

    is_told_elsewhere: of several processes that fail together another one tells it.
    """

    is_told_elsewhere = False


class ConfigError(VlmdeployError):
    """A config file or an option that cannot be used: a key is missing, has the wrong type or a senseless value."""


class WeightsError(VlmdeployError):
    """A checkpoint whose tensors are missing, unknown, truncated, of the wrong shape or not finite."""


class DataError(VlmdeployError):
    """A data set or a picture that cannot be read."""


class TrainingError(VlmdeployError):
    """A training run that cannot start, continue or be resumed."""


class CalibrationError(VlmdeployError):
    """Calibration data that cannot calibrate: too few tokens of an expert, too long samples, activations not finite."""


class QuantizationError(VlmdeployError):
    """Weights that cannot be quantized as asked."""


class ExportError(VlmdeployError):
    """A bundle that cannot be written."""


class ParityError(VlmdeployError):
    """Two implementations that should agree do not; names the first tensor that differs."""


class BundleError(VlmdeployError):
    """A bundle that is incomplete, altered, of another format version or for another target."""


class PromptError(VlmdeployError):
    """Messages, ids or images that the model in the bundle cannot take."""


class BackendError(VlmdeployError):
    """An inference engine that is missing, doubled, or failed."""
