"""What was trained again, kept in a folder, so that a killed evaluation goes on where it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assay.errors import StoreError
from assay.rows import Folder

__all__ = ["Cache"]


class Cache:
    """Measurements of retrained models by name.

    Args:
        place: the folder; None keeps nothing.
        settings: of the retrainings, as JSON takes them; a folder of others is refused.

    Raises:
        StoreError: the folder belongs to other data or settings, or cannot be written.

    Example:
        >>> cache = Cache(None, {})
        >>> cache.write("first", torch.ones(2))
        >>> cache.read("first") is None
        True
    """

    def __init__(self, place: str | Path | None, settings: Mapping[str, Any]) -> None:
        self._folder = None if place is None else Folder(place)
        self.agree("settings", settings)

    def agree(self, name: str, settings: Mapping[str, Any]) -> None:
        """Keep settings under a name, or compare them with those that are kept.

        Raises:
            StoreError: they are others, or cannot be written.
        """
        if self._folder is None:
            return
        found = self._folder.read_json(f"{name}.json")
        if found is None:
            self._folder.write_json(f"{name}.json", dict(settings))
        elif found != settings:
            other = [
                key
                for key in dict.fromkeys([*settings, *found])
                if key not in found or key not in settings or found[key] != settings[key]
            ]
            raise StoreError(
                f"{self._folder.place} caches retrainings of other data or settings ({', '.join(other)}): name another "
                "cache="
            )

    def read(self, name: str) -> Tensor | None:
        """What was kept under the name."""
        found = None if self._folder is None else self._folder.read_json(f"losses/{name}.json")
        return None if found is None else torch.tensor(found["losses"], dtype=torch.float64)

    def write(self, name: str, found: Tensor) -> None:
        """Keep it."""
        if self._folder is not None:
            self._folder.write_json(f"losses/{name}.json", {"losses": found.tolist()})
