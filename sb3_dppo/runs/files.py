"""Files that are never half written."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# Of the folder of a shared model.
WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "README.md"


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """
    Write a file under another name in the same folder, which is made if need be, and rename it when it is complete and on the
    disk: whatever happens, also at an OSError, the path holds the new file or what was there before.
    """
    given = Path(path)
    # A link stays one.
    path = given.resolve()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Both: "folder/../file" is at its place only where the folder exists.
        for folder in (given.parent, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # Some file systems can't, and the file is there.
            _sync_folder(path.parent)
    except OSError as error:
        reason = f"{error.strerror or error}: it was not saved, and what was there before is unchanged"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    # So that the new name, too, survives a loss of power.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
