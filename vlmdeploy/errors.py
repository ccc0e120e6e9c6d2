"""Every error that vlmdeploy raises on purpose. A message says what was found where, what was expected and what to do
next; the command line prints it as one line and exits with status 1."""


class VlmdeployError(Exception):
    """Base of all errors below; any other exception that escapes is a bug.

    is_reported_elsewhere: of several processes that fail together, another one prints it.
    """

    is_reported_elsewhere = False


class ConfigError(VlmdeployError):
    """A config file or an option with a missing, mistyped or invalid value."""


class WeightsError(VlmdeployError):
    """A checkpoint whose tensors are missing, unknown, truncated, of the wrong shape or not finite."""


class DataError(VlmdeployError):
    """A data set or a picture that cannot be read."""


class TrainingError(VlmdeployError):
    """A training run that cannot start, continue or be resumed."""


class CalibrationError(VlmdeployError):
    """Unusable calibration data: too few tokens of an expert, too long samples, activations that are not finite."""


class QuantizationError(VlmdeployError):
    """Weights that cannot be quantized as requested."""


class ExportError(VlmdeployError):
    """A bundle that cannot be written."""


class ParityError(VlmdeployError):
    """Two implementations disagree; names the first tensor that differs."""


class BundleError(VlmdeployError):
    """A bundle that is incomplete, altered, of another format version or for another target."""


class PromptError(VlmdeployError):
    """Messages, ids or images that the model cannot take."""


class BackendError(VlmdeployError):
    """An inference engine that is missing, installed twice, or failed."""
