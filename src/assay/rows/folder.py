"""A folder of one key-value store: of this machine, of an object storage, or of memory, with the same code."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from assay.errors import NewerFormatError, StoreError, UnreadableError
from assay.store.files import one_line, write_error
from assay.store.lock import WriteLock

__all__ = ["Folder"]

T = TypeVar("T")
_WITHHELD = (
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "UNKNOWN",
)
"""What TensorStore says first where a file was not handed over: of its content that says nothing."""


def tensorstore() -> Any:
    """The library, asked for only when rows are stored.

    Raises:
        StoreError: it is not installed.
    """
    try:
        import tensorstore
    except ImportError as error:
        raise StoreError("rows of gradients are stored by tensorstore: pip install 'assay[store]'") from error
    return tensorstore


class Folder:
    """Files that appear whole or not at all, and arrays with checksums.

    Args:
        place: a folder of this machine, an address that TensorStore knows ("s3://…", "gs://…"), or None for memory.

    Example:
        >>> folder = Folder(None)
        >>> folder.write("a.json", b"{}")
        >>> folder.read("a.json"), folder.read("b.json")
        (b'{}', None)
    """

    def __init__(self, place: str | Path | None) -> None:
        ts = tensorstore()
        self.place = "memory" if place is None else str(place).rstrip("/")
        if place is None:
            spec: Any = {"driver": "memory"}
        elif "://" in str(place):
            spec = f"{self.place}/"
        else:
            spec = {"driver": "file", "path": f"{Path(place).expanduser().absolute()}/"}
        self._context = _context(ts)
        with self._errors("open", ""):
            self._store = ts.KvStore.open(spec, context=self._context).result()

    def lock(self) -> WriteLock | None:
        """Keep other processes from writing here; None where that cannot be: object storages, memory.

        Raises:
            StoreError: another process does, or the folder cannot be made.
        """
        if "://" in self.place or self.place == "memory" or self.place.startswith("memory/"):
            return None
        path = Path(self.place).expanduser()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(path, error) from error
        return WriteLock(path)

    def below(self, name: str) -> Folder:
        """A folder in this one."""
        inner = object.__new__(Folder)
        inner.place, inner._context, inner._store = (
            f"{self.place}/{name}",
            self._context,
            self._store / f"{name}/",
        )
        return inner

    def read(self, name: str) -> bytes | None:
        """A file's content; None if there is none."""
        with self._errors("read", name):
            found = self._store.read(name).result()
        return None if found.state == "missing" else bytes(found.value)

    def write(self, name: str, data: bytes) -> None:
        """Replace a file as a whole, synced to the disk.

        Raises:
            StoreError: the disk refused.
        """
        with self._errors("write", name):
            self._store.write(name, data).result()

    def names(self) -> list[str]:
        """All files below, sorted."""
        with self._errors("list", ""):
            return sorted(key.decode() for key in self._store.list().result())

    def delete(self, name: str) -> None:
        """Remove a file if it is there."""
        with self._errors("delete", name):
            self._store.write(name, None).result()

    def write_json(self, name: str, fields: Mapping[str, Any]) -> None:
        """Replace a JSON file, a checksum of its fields among them."""
        text = json.dumps({**fields, "crc32": _checksum(fields)}, indent=1)
        self.write(name, text.encode() + b"\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The fields of a JSON file; None if there is none.

        Raises:
            StoreError: it is damaged.
        """
        data = self.read(name)
        if data is None:
            return None
        try:
            fields = json.loads(data)
            crc = fields.pop("crc32")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise self.damaged(name, "no valid JSON with a checksum") from error
        if crc != _checksum(fields):
            raise self.damaged(name, "its content does not match its checksum")
        return dict(fields)

    def write_header(self, name: str, kind: str, version: int, fields: Mapping[str, Any]) -> None:
        """Replace the JSON file that says what the folder holds."""
        self.write_json(name, {"format": kind, "version": version, **fields})

    def read_header(self, name: str, kind: str, version: int) -> dict[str, Any] | None:
        """The fields of the JSON file that says what the folder holds; None if there is none.

        Raises:
            StoreError: it is damaged, or says that the folder holds another kind of thing.
            NewerFormatError: it was written by a newer version of assay.
        """
        fields = self.read_json(name)
        if fields is None:
            return None
        if fields.pop("format", None) != kind:
            raise self.damaged(name, f"no format {kind!r}")
        found = fields.pop("version", None)
        if type(found) is not int or found < 1:
            raise self.damaged(name, "no version")
        if found > version:
            raise NewerFormatError(self.place, found, version)
        return fields

    def parsed(self, name: str, kind: type[T], fields: Mapping[str, Any]) -> T:
        """The fields of a JSON file as a dataclass, every one of its own type.

        Raises:
            StoreError: a field is missing or of another type; it is named.
        """
        import pydantic

        try:
            return pydantic.TypeAdapter(kind).validate_json(json.dumps(fields), strict=True)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise self.damaged(name, f"bad field {where}: {first['msg']}") from error

    def create_array(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str,
        shard: Sequence[int],
        chunk: Sequence[int],
        afresh: bool = True,
    ) -> Any:
        """An empty Zarr v3 array: shards of chunks, CRC-32C on each chunk and on each shard's index.

        One that is there is replaced, or opened if not `afresh`.
        """
        plain = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        sharding = {"chunk_shape": list(chunk), "codecs": plain, "index_codecs": plain}
        metadata = {
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard)}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }
        with self._errors("write", name):
            how = {"create": True, "delete_existing": True} if afresh else {"create": True, "open": True}
            spec = {**self._array(name), "metadata": metadata, **how}
            return tensorstore().open(spec, context=self._context).result()

    def open_array(self, name: str) -> Any:
        """An array that is there.

        Raises:
            StoreError: it is missing or damaged.
        """
        with self._errors("read", name):
            return tensorstore().open(self._array(name), context=self._context).result()

    def write_array(self, name: str, array: npt.NDArray[Any]) -> None:
        """Store a whole small array."""
        shape = [max(size, 1) for size in array.shape]
        stored = self.create_array(name, array.shape, array.dtype.name, shape, shape)
        with self._errors("write", name):
            stored.write(np.ascontiguousarray(array)).result()

    def read_array(self, name: str) -> npt.NDArray[Any]:
        """Read a whole small array, against its checksum."""
        stored = self.open_array(name)
        with self._errors("read", name):
            return np.asarray(stored.read().result())

    def _array(self, name: str) -> dict[str, Any]:
        return {
            "driver": "zarr3",
            "kvstore": (self._store / f"{name}/").spec().to_json(),
            "fill_missing_data_reads": False,  # a lost shard is an error, not zeros
            "store_data_equal_to_fill_value": True,
        }

    def damaged(self, name: str, reason: str) -> StoreError:
        """One line for a file that cannot be trusted."""
        return StoreError(
            f"{self.place}/{name} is damaged ({reason}): put a copy of it back, or build it again"
        )

    @contextmanager
    def _errors(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, NotImplementedError) as error:
            raise self.refused(verb, name, error) from error

    def refused(self, verb: str, name: str, error: Exception) -> StoreError:
        """One line for what TensorStore says."""
        said = one_line(error).split(" [tensorstore_spec=")[0]
        where = f"{self.place}/{name}".rstrip("/")
        if said.startswith(("DATA_LOSS", "NOT_FOUND")) and verb == "read":
            return StoreError(f"{where} is damaged ({said}): put a copy of it back, or build it again")
        if said.startswith(_WITHHELD) and verb == "read":
            return UnreadableError(
                f"{where} could not be read ({said}): check its rights and that disk or address"
            )
        return StoreError(f"cannot {verb} {where} ({said}): check that disk or address")


def _context(ts: Any) -> Any:
    """Files of this machine are mapped into memory to be read, where TensorStore can: a copy less."""
    try:
        return ts.Context({"file_io_mode": {"mode": "memmap"}})
    except ValueError:  # an older version
        return ts.Context()


def _checksum(fields: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(fields).encode()):08x}"
