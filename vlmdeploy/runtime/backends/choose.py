"""Which backend runs a bundle: decided by the bundle's target, never by what is installed."""

from pathlib import Path

from vlmdeploy.errors import BackendError
from vlmdeploy.manifest import Manifest
from vlmdeploy.runtime.backends.door import Backend
from vlmdeploy.runtime.backends.ort import PROVIDERS, OrtBackend
from vlmdeploy.runtime.backends.trt import TrtBackend


def open_backend(
    folder: Path,
    manifest: Manifest,
    provider: str | None = None,
    threads: int | None = None,
    residency: str = "all",
) -> Backend:
    """The backend of a bundle. provider: the bundle's own (default), or "cpu" to run the graphs of a TensorRT bundle in
    ONNX Runtime. Raises BackendError if the backend is missing or cannot use this provider."""
    if provider is not None and provider not in PROVIDERS:
        raise BackendError(f'provider is "{provider}", expected one of {", ".join(PROVIDERS)}')
    if manifest.dialect == "trt":
        if provider == "cuda":
            raise BackendError(
                f"{folder}: made for {manifest.target}, its engines run on the GPU without --provider; --provider cpu "
                "runs its graphs in ONNX Runtime"
            )
        if provider is None:
            return TrtBackend(folder, manifest, residency)
        return OrtBackend(folder, manifest, threads, residency, provider)
    if provider not in (None, manifest.provider):
        raise BackendError(
            f"{folder}: exported for provider {manifest.provider}, asked for {provider}: export again with "
            f"--provider {provider}"
        )
    return OrtBackend(folder, manifest, threads, residency, manifest.provider)
