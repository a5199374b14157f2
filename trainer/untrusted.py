"""Reading DCP checkpoints without running what is in them: an allow-list for `.metadata`, else `weights_only`."""

import enum
import io
import pickle
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

DCP = "torch.distributed.checkpoint"
ALLOWED = {
    "pathlib.PosixPath", "torch.Size", "torch.serialization._get_layout", f"{DCP}.filesystem._StorageInfo",
    *(f"{DCP}.metadata.{name}" for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
}  # fmt: skip


class Unpickler(pickle.Unpickler):
    """Knows the classes that DCP's metadata consists of, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):  # so 3.11.2 and its like pickle the member of an Enum
            return member
        raise pickle.UnpicklingError(f"{module}.{name} is nothing that checkpoint metadata may hold")


def member(kind: Any, name: str) -> enum.Enum:
    if isinstance(kind, enum.EnumType):
        return kind[name]
    raise pickle.UnpicklingError(f"{name} of {kind} is nothing that checkpoint metadata may hold")


class Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = Unpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Check what is no tensor (numbers and the like) before torch's own method unpickles it."""
        checked = torch.load(value, weights_only=True)
        clean = io.BytesIO()
        torch.save(checked, clean)
        clean.seek(0)
        super().load_bytes(read_item, clean)
