"""Every error that vlmdeploy raises on purpose. A message says what was found where, what was expected and what to do
next, in one line of printable characters; the command line prints it and exits with status 1."""

import re

LONGEST_MESSAGE = 1000  # characters
_LINE_BREAKS = re.compile(r"\s*[\n\r\t\v\f]\s*")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def one_line(text: str) -> str:
    """Text from outside, safe to print: line breaks become spaces, control characters (also those that change the
    direction of writing) escapes; the middle of a long one is cut out."""
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[: LONGEST_MESSAGE * 2 // 3]} [...] {text[-LONGEST_MESSAGE // 4 :]}"
    return escaped(_LINE_BREAKS.sub(" ", text.strip()))


def escaped(text: str, kept: str = "") -> str:
    """Text with its control characters as escapes, apart from those in `kept`."""
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in kept else _escape(found[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def shown(value: object, most: int = 80) -> str:
    """A value from outside in a message: its `repr`, cut to a number of characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write whole numbers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= most else f"{text[:most]}..."


class VlmdeployError(Exception):
    """Base of all errors below; any other exception that escapes is a bug.

    is_reported_elsewhere: of several processes that fail together, another one prints it.
    """

    is_reported_elsewhere = False

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


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
