"""Flat intervals of named tensors, saved by many ranks and read back by any number of others.

torch.distributed.checkpoint does the work; two planners teach it our `Interval`. Each tensor is stored flattened, so a
checkpoint knows nothing of ZeRO stages or world sizes. Its index file is a pickle: it is read with an allow-list,
because a checkpoint may come from anywhere.
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
    """This process's part [start, start + len(values)) of a flattened tensor of `total` elements."""

    values: Tensor  # 1-D; read into in place
    start: int
    total: int

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.start]), torch.Size([self.values.numel()]))


def copy_to_cpu(intervals: dict[str, Interval]) -> dict[str, Interval]:
    """The same on the host, in memory of their own: what is written while training goes on."""
    return {name: Interval(i.values.detach().to("cpu", copy=True), i.start, i.total) for name, i in intervals.items()}


def whole_interval(tensor: Tensor) -> Interval:
    flat = tensor.view(-1)
    return Interval(flat, 0, flat.numel())


def save(folder: Path, intervals: dict[str, Interval]) -> None:
    """All ranks together write their intervals; an interval that several ranks hold is written once."""
    group = collectives.control_group() if collectives.world_size() > 1 else None
    with _without_single_process_warning():
        dcp.save(intervals, checkpoint_id=folder, planner=_SavePlanner(), process_group=group, no_dist=group is None)


def load(folder: Path, intervals: dict[str, Interval], single_process: bool = False) -> None:
    """Fill the intervals in place, whatever intervals the checkpoint was written in.

    Args:
        single_process: this process reads by itself, also when it is one of many.

    Raises:
        UserError: damaged, or a tensor is not in it.
        RestartCanHelp: the storage does not answer.
    """
    no_dist = single_process or collectives.world_size() == 1
    group = None if no_dist else collectives.control_group()
    try:
        with _without_single_process_warning():
            dcp.load(
                intervals,
                storage_reader=_SafeReader(folder),
                planner=_LoadPlanner(),
                process_group=group,
                no_dist=no_dist,
            )
    except CheckpointException as error:  # no Exception: it would pass every handler above as a traceback
        failures = [failure[0] for failure in error.failures.values()]
        if any(is_machine_fault(failure) for failure in failures):
            raise RestartCanHelp(f"{folder}: could not be read: {error_text(error)}") from error
        raise UserError(f"{folder}: could not be read: {error_text(error)}") from error


def error_text(error: BaseException) -> str:
    """What went wrong on the disk, in one line; several ranks' errors arrive in one exception."""
    if isinstance(error, CheckpointException):
        return "; ".join(sorted({error_text(failure[0]) for failure in error.failures.values()}))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "inline_container.cc" in str(error) and "unexpected pos" in str(error):
        return "No space left on device (torch: unexpected pos)"  # how torch's archive writer says it
    return (str(error).splitlines() or [type(error).__name__])[0]


def checksums(folder: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file that this rank wrote, by file name."""
    mine = [*folder.glob(f"__{rank}_*"), *([folder / INDEX_FILE] if rank == 0 else [])]
    return {path.name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)} for path in mine}


def file_problems(path: Path, recorded: dict[str, Any]) -> list[str]:
    """Return why a file is not the one that `checksums` recorded; empty when it is.

    Raises:
        OSError: the file cannot be read.
    """
    if found := size_problems(path, recorded):
        return found
    return [] if files.sha256(path) == recorded["sha256"] else [f"{path.name} has changed since it was written"]


def size_problems(path: Path, recorded: dict[str, Any]) -> list[str]:
    """Return why a file is missing or has another size than `checksums` recorded; reads nothing."""
    if not path.is_file():
        return [f"{path.name} is missing" if not path.exists() else f"{path.name} is not a file"]
    size = path.stat().st_size
    return [] if size == recorded["bytes"] else [f"{path.name} has {size} bytes of {recorded['bytes']}"]


def tensor_sizes(folder: Path) -> dict[str, int]:
    """Elements of every tensor in a checkpoint.

    Raises:
        UserError: the index is missing or damaged.
    """
    metadata = _SafeReader(folder).read_metadata()
    return {k: m.size.numel() for k, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}


@contextmanager
def _without_single_process_warning() -> Iterator[None]:
    """One process is a case like any other here, not something to warn about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


class _SavePlanner(DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(name, interval) for name, interval in self.state_dict.items()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.state_dict[write_item.index.fqn].values.detach()


def _write_item(name: str, interval: Interval) -> WriteItem:
    properties = TensorProperties(dtype=interval.values.dtype)
    data = TensorWriteData(interval.chunk, properties, torch.Size([interval.total]))
    return WriteItem(MetadataIndex(name, interval.chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata
        items: list[ReadItem] = []
        for name, interval in self.state_dict.items():
            items += create_read_items_for_chunk_list(name, stored[name], [interval.chunk])  # type: ignore[arg-type]
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].values


class _SafeReader(dcp.FileSystemReader):
    """Reads the index with an unpickler that knows only the index's own classes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / INDEX_FILE
        try:
            metadata = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
        except FileNotFoundError:
            raise UserError(f"{path.parent}: not a complete checkpoint: {INDEX_FILE} is missing") from None
        except OSError as error:
            if is_machine_fault(error):
                raise
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        except Exception as error:  # damaged pickles raise almost anything
            raise UserError(f"{path}: damaged or not a checkpoint index: {error}") from None
        if not isinstance(metadata, Metadata):
            raise UserError(f"{path}: not a checkpoint index")
        return metadata


class _IndexUnpickler(pickle.Unpickler):
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
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if "." not in name and (module in self._MODULES and name[:1] in "_ABCDEFGHIJKLMNOPQRSTUVWXYZ"):
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        elif is_dtype or (module, name) in self._NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint of ours contains")
