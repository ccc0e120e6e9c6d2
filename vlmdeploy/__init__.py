"""vlmdeploy puts a vision-language model of the CogVLM kind on a 16 GB GPU or a Jetson.

`open` gives the torch-free runtime session of a bundle, `ImageLimits` how large its pictures may be; `load_model` the
PyTorch reference of a checkpoint. All are imported on first use, so that none pays for the others.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["ImageLimits", "__version__", "load_model", "open"]

if TYPE_CHECKING:
    from vlmdeploy.model.load import load_model
    from vlmdeploy.runtime.image_limits import ImageLimits
    from vlmdeploy.runtime.session import open_bundle as open

_LAZY = {
    "open": ("vlmdeploy.runtime.session", "open_bundle"),
    "ImageLimits": ("vlmdeploy.runtime.image_limits", "ImageLimits"),
    "load_model": ("vlmdeploy.model.load", "load_model"),
}


def __getattr__(name: str) -> Any:
    """Public names by lazy import."""
    if name not in _LAZY:
        raise AttributeError(f"module 'vlmdeploy' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)
