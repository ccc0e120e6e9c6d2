"""The user's own folders on this machine: what may be lost (the cache), and what they decided (the state)."""

import logging
import os
import secrets
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger("vlmdeploy")


def cache_folder() -> Path | None:
    """The user's cache of vlmdeploy; None for a user without a home."""
    return _folder("XDG_CACHE_HOME", ".cache")


def state_folder() -> Path | None:
    """What the user decided about bundles, kept until they delete it; None for a user without a home."""
    return _folder("XDG_STATE_HOME", ".local/state")


def _folder(variable: str, below_home: str) -> Path | None:
    given = os.environ.get(variable)
    if given and Path(given).is_absolute():  # the standard says to ignore others
        return Path(given) / "vlmdeploy"
    try:
        home = Path.home()
    except RuntimeError:  # no HOME and no entry in the password database, as in some containers
        return None
    return home / below_home / "vlmdeploy" if home.is_absolute() else None


def keep(path: Path | None, content: bytes, otherwise: str) -> None:
    """Write a file of a user's folder atomically. On failure warn with the consequence, `otherwise`."""
    try:
        put(path, content)
    except OSError as error:
        logger.warning("%s: %s", error, otherwise)


def put(path: Path | None, content: bytes) -> None:
    """Write a file of a user's folder atomically. Raises OSError, whose text says what and why."""
    if path is None:
        raise OSError("this user has no home folder; XDG_CACHE_HOME and XDG_STATE_HOME name others")
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise OSError(f"{path}: cannot be written ({error.strerror})") from error
