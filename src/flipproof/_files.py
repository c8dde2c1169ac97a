"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from flipproof.errors import ConfigError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`; what was written there takes its place at the end.

    The folder is made if needed. If anything is raised, the old file stays and the temporary one is removed.

    Args:
        path: of the file to write.

    Raises:
        ConfigError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(f"{folder}/runs/page.html") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     [file.name for file in Path(folder, "runs").iterdir()]
        ['page.html']
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ConfigError(f"a file to write takes a path, got {path!r}")
    target = Path(os.path.realpath(path))  # what a link points to
    if target.exists() and not target.is_file():
        raise ConfigError(f"cannot write {path}: it is no file")
    temporary = target.with_name(f".{os.getpid()}.{target.name}")  # the ending stays: ".csv.gz" is compressed by it
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        with suppress(OSError):  # it was renamed, or never written
            temporary.unlink()
