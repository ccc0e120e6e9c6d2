"""Which backend runs a bundle: decided by the bundle's target, never by what is installed."""

from vlmdeploy.errors import BackendError
from vlmdeploy.runtime.backends.door import Backend
from vlmdeploy.runtime.backends.ort import PROVIDERS, OrtBackend
from vlmdeploy.runtime.backends.trt import TrtBackend
from vlmdeploy.runtime.integrity import BundleFiles
from vlmdeploy.runtime.trust import require_trust


def open_backend(
    files: BundleFiles,
    provider: str | None = None,
    threads: int | None = None,
    residency: str = "all",
    trust: bool = False,
) -> Backend:
    """The backend of a bundle. provider: the bundle's own (default), or "cpu" to run the graphs of a TensorRT bundle in
    ONNX Runtime. trust: see `open_bundle`. Raises BackendError if the backend is missing or cannot use this provider,
    BundleError if it would load native code that is not trusted."""
    folder, manifest = files.folder, files.manifest
    if provider is not None and provider not in PROVIDERS:
        raise BackendError(f'provider is "{provider}", expected one of {", ".join(PROVIDERS)}')
    if manifest.dialect == "trt":
        if provider == "cuda":
            raise BackendError(
                f"{folder}: made for {manifest.target}, its engines run on the GPU without --provider; --provider cpu "
                "runs its graphs in ONNX Runtime"
            )
        if provider is None:
            if manifest.engines and not trust:
                require_trust(files)
            return TrtBackend(files, residency)
        return OrtBackend(files, threads, residency, provider)
    if provider not in (None, manifest.provider):
        raise BackendError(
            f"{folder}: exported for provider {manifest.provider}, asked for {provider}: export again with "
            f"--provider {provider}"
        )
    return OrtBackend(files, threads, residency, manifest.provider)
