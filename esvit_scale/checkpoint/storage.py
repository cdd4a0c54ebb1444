"""Writing and reading the tensors of a checkpoint, with any number of ranks when writing and any other when reading.

torch.distributed.checkpoint does the work; two planners make it write and read our `Interval`s. Each tensor is stored
flattened, so that a checkpoint does not depend on ZeRO stage or world size. Its index file is a pickle, which is read
with an allow-list of classes, because a checkpoint may come from an untrusted source.
"""

import io
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from esvit_scale import files
from esvit_scale.errors import RestartCanHelp, UserError, is_machine_fault
from esvit_scale.parallel import collectives

INDEX_FILE = ".metadata"


@dataclass(frozen=True)
class Interval:
    """The part of a tensor that this process holds: elements [start, start + len(values)) of `total` when flattened."""

    values: Tensor  # 1-D; `load` writes into it
    start: int
    total: int

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Return the interval's offset and size in the form that torch.distributed.checkpoint uses."""
        return ChunkStorageMetadata(torch.Size([self.start]), torch.Size([self.values.numel()]))


def copy_to_cpu(intervals: dict[str, Interval]) -> dict[str, Interval]:
    """Return copies of the intervals in host memory, which can be written while training changes the originals."""
    return {name: Interval(i.values.detach().to("cpu", copy=True), i.start, i.total) for name, i in intervals.items()}


def whole_interval(tensor: Tensor) -> Interval:
    """Return an interval that covers a whole contiguous tensor and is a view of it."""
    flat = tensor.view(-1)
    return Interval(flat, 0, flat.numel())


def save(folder: Path, intervals: dict[str, Interval]) -> None:
    """Write the intervals of all ranks to `folder`; an interval that several ranks hold is written once.

    All ranks call it.
    """
    group = collectives.control_group() if collectives.world_size() > 1 else None
    with _without_warnings():
        dcp.save(intervals, checkpoint_id=folder, planner=_SavePlanner(), process_group=group, no_dist=group is None)


def load(folder: Path, intervals: dict[str, Interval], single_process: bool = False) -> None:
    """Read the values of the intervals from the checkpoint in `folder`, in place.

    The intervals may divide the tensors differently than they were divided when written.

    Args:
        single_process: True if this process reads alone, although it may be one of several ranks.

    Raises:
        UserError: the checkpoint is damaged, or lacks a tensor.
        RestartCanHelp: the storage failed.
    """
    no_dist = single_process or collectives.world_size() == 1
    group = None if no_dist else collectives.control_group()
    try:
        with _without_warnings():
            dcp.load(
                intervals,
                storage_reader=_SafeReader(folder),
                planner=_LoadPlanner(),
                process_group=group,
                no_dist=no_dist,
            )
    except CheckpointException as error:  # a BaseException, which `except Exception` does not catch
        failures = [failure[0] for failure in error.failures.values()]
        if any(is_machine_fault(failure) for failure in failures):
            raise RestartCanHelp(f"{folder}: could not be read: {error_text(error)}") from error
        raise UserError(f"{folder}: could not be read: {error_text(error)}") from error


def error_text(error: BaseException) -> str:
    """Return a one-line message for an error of writing or reading.

    A CheckpointException of torch holds the errors of several ranks; their messages are joined.
    """
    if isinstance(error, CheckpointException):
        return "; ".join(sorted({error_text(failure[0]) for failure in error.failures.values()}))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "inline_container.cc" in str(error) and "unexpected pos" in str(error):
        return "No space left on device (torch: unexpected pos)"  # how torch's archive writer reports a full disk
    return (str(error).splitlines() or [type(error).__name__])[0]


def checksums(folder: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Return {"bytes": size, "sha256": checksum} for every file that rank `rank` wrote, by file name."""
    mine = [*folder.glob(f"__{rank}_*"), *([folder / INDEX_FILE] if rank == 0 else [])]
    return {path.name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)} for path in mine}


def file_problems(path: Path, recorded: dict[str, Any]) -> list[str]:
    """Return how a file's size or SHA-256 differs from its entry in `checksums`; empty if the file is unchanged.

    Raises:
        OSError: the file cannot be read.
    """
    if found := size_problems(path, recorded):
        return found
    return [] if files.sha256(path) == recorded["sha256"] else [f"{path.name} has changed since it was written"]


def size_problems(path: Path, recorded: dict[str, Any]) -> list[str]:
    """Return a message if a file is missing or its size differs from its entry in `checksums`, without reading it."""
    if not path.is_file():
        return [f"{path.name} is missing" if not path.exists() else f"{path.name} is not a file"]
    size = path.stat().st_size
    return [] if size == recorded["bytes"] else [f"{path.name} has {size} bytes of {recorded['bytes']}"]


def tensor_sizes(folder: Path) -> dict[str, int]:
    """Return the number of elements of every tensor in a checkpoint, by the tensor's name.

    Raises:
        UserError: the index is missing or damaged.
    """
    metadata = _SafeReader(folder).read_metadata()
    return {k: m.size.numel() for k, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence what torch says of a save or load by a single process, which is normal here, and of its own old code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated", category=UserWarning)  # torch 2.7
        yield


class _SavePlanner(DefaultSavePlanner):
    """A save planner for torch.distributed.checkpoint that writes `Interval`s."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """Return the plan of what this rank writes: its `Interval`s in place of the tensors and objects of DefaultSavePlanner."""
        self.plan = SavePlan([_write_item(name, interval) for name, interval in self.state_dict.items()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the values to write for an item, which DefaultSavePlanner looks for in a plain state dict."""
        return self.state_dict[write_item.index.fqn].values.detach()


def _write_item(name: str, interval: Interval) -> WriteItem:
    properties = TensorProperties(dtype=interval.values.dtype)
    data = TensorWriteData(interval.chunk, properties, torch.Size([interval.total]))
    return WriteItem(MetadataIndex(name, interval.chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class _LoadPlanner(DefaultLoadPlanner):
    """A load planner for torch.distributed.checkpoint that reads into `Interval`s."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Keep the arguments as they are; DefaultLoadPlanner would flatten the state dict."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """Return the plan of what this rank reads: the stored pieces that cover its `Interval`s, at any world size."""
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata
        items: list[ReadItem] = []
        for name, interval in self.state_dict.items():
            items += create_read_items_for_chunk_list(name, stored[name], [interval.chunk])  # type: ignore[arg-type]
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the tensor that an item is read into, which DefaultLoadPlanner looks for in a plain state dict."""
        return self.state_dict[index.fqn].values


class _SafeReader(dcp.FileSystemReader):
    """A storage reader for torch.distributed.checkpoint that unpickles the index with an allow-list of classes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index; FileSystemReader would unpickle any class. A missing or damaged index is a UserError."""
        path = Path(self.path) / INDEX_FILE
        try:
            metadata = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
        except FileNotFoundError:
            raise UserError(f"{path.parent}: not a complete checkpoint: {INDEX_FILE} is missing") from None
        except OSError as error:
            if is_machine_fault(error):
                raise
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        except Exception as error:  # a damaged pickle can raise almost any exception
            raise UserError(f"{path}: damaged or not a checkpoint index: {error}") from None
        if not isinstance(metadata, Metadata):
            raise UserError(f"{path}: damaged: it is not a checkpoint index")
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    """An unpickler that refuses every class and function outside the allow-list."""

    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _NAMES = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
            ("collections", "OrderedDict"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        """Return a class of the allow-list; Unpickler would import any. Others raise UnpicklingError."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if "." not in name and (module in self._MODULES and name[:1] in "_ABCDEFGHIJKLMNOPQRSTUVWXYZ"):
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        elif is_dtype or (module, name) in self._NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint of esvit-scale contains")
