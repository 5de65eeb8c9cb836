"""The only place that opens pickles: readers that know the few names they need and run nothing else.

Callables of a file are never looked up: every name it mentions is either one of torch's own tensor builders or is
replaced by an inert class that merely keeps what it is given. Anything else is refused before it is loaded.
"""

import io
import itertools
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron.checkpoint.pickle_scan import names_in
from megatron.errors import CheckpointError
from megatron.files import read_small

# What a damaged or hostile file can raise inside the restricted readers.
_MALFORMED = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)

_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_STORAGE = re.compile(r"torch\.(cuda\.)?[A-Z][A-Za-z0-9]*Storage")
_MOST_PARTS = 1000  # of one tensor
_LARGEST_INDEX = 64 << 20  # bytes
_ENUM = re.compile(r"megatron\.([a-z_]+\.)*enums\.[A-Z]\w*")
_TORCH_NAMES = {
    "_codecs.encode",  # how pickle protocol 2 writes bytes
    "collections.OrderedDict",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch.Size",
    "torch.device",
    *_DTYPES,
}
_TENSOR_NAMES = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch.storage.UntypedStorage",
    *_DTYPES,
}


class Namespace:
    """Stands in for argparse's: attributes, no behaviour. Read it with `vars()`."""


class EnumMember:
    """Stands in for a member of an enumeration that only the writer's code knows; `value` is its value."""

    def __init__(self, value: Any):
        self.value = value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.value!r})"


class NamedMember:
    """Stands in for `getattr(an enumeration, name)`, as some releases of Python 3.11 write members."""

    def __init__(self, enumeration: Any, name: Any):
        if not (isinstance(enumeration, type) and issubclass(enumeration, EnumMember)):
            raise CheckpointError("refused: it asks for builtins.getattr of what is no enumeration; nothing was run")
        self.enumeration, self.name = enumeration.__name__, name

    def __repr__(self) -> str:
        return f"{self.enumeration}.{self.name}"


class NumpyType:
    """Stands in for a numpy dtype; numbers only."""

    def __init__(self, code: str, *_: Any):
        if not re.fullmatch(r"[<>=|]?[biufc?]\d{0,2}", str(code)):
            raise CheckpointError(f"numpy arrays of type {code!r} are not read: they can hold objects")

    def __setstate__(self, state: Any) -> None:
        pass


class NumpyValue:
    """Stands in for a numpy array or scalar. Kept opaque: only the writer's random state holds any."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_STAND_INS = {
    "argparse.Namespace": Namespace,
    "builtins.getattr": NamedMember,
    "__builtin__.getattr": NamedMember,  # its name in pickle protocol 2
    "numpy.dtype": NumpyType,
    "numpy.ndarray": NumpyValue,
    "numpy.core.multiarray._reconstruct": NumpyValue,
    "numpy.core.multiarray.scalar": NumpyValue,
    "numpy._core.multiarray._reconstruct": NumpyValue,
    "numpy._core.multiarray.scalar": NumpyValue,
}


def read_legacy(path: Path, data: bool = True) -> dict[str, Any]:
    """Read a file that `torch.save` wrote for Megatron-LM or EE-LLM; tensors are mapped from the file, on the CPU.

    Namespaces, enumerations and numpy values come back as the inert classes above. Without `data` tensors are fake
    ones, for `read_span` to read a part at a time; files older than torch 1.6 have theirs all the same.

    Raises:
        CheckpointError: the file is missing, damaged, or mentions a name that such files don't need.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise CheckpointError("it is no ordinary file")
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
            names = _zip_names(file) if zipped else _plain_names(file)
        allowed = [(_stand_in(name, path), _today(name)) for name in names if name not in _TORCH_NAMES]
        lazily = zipped and not data
        with (
            _only_these_globals([pair for pair in allowed if pair[0] is not None]),
            FakeTensorMode() if lazily else nullcontext(),
        ):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped and data)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except _MALFORMED as error:
        raise CheckpointError(f"{path} is damaged or not written by torch.save: {brief(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not the dictionary of a checkpoint")
    return content


def read_span(path: Path, part: Tensor) -> Tensor:
    """The numbers of a tensor that `read_legacy` took from `path` without data, or of some of its first dimension.

    Raises:
        CheckpointError: the file is shorter than that, or the tensor isn't laid out row by row.
    """
    if not isinstance(part, FakeTensor):
        return part
    whole = torch.empty(part.shape, dtype=part.dtype)
    try:
        with path.open("rb") as file:
            read_into(whole, file, part)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return whole


def read_into(target: Tensor, file: Any, part: Tensor) -> None:
    """Fill a contiguous tensor with what the fake tensor `part` stands for in a file. Errors as of `read_span`."""
    if not part.is_contiguous():
        raise CheckpointError(f"a tensor of shape {list(part.shape)} is not laid out row by row")
    file.seek(part.untyped_storage()._checkpoint_offset + part.storage_offset() * part.dtype.itemsize)
    content = memoryview(target.view(-1).view(torch.uint8).numpy()) if target.numel() else memoryview(b"")
    if content.nbytes and file.readinto(content) != content.nbytes:
        raise CheckpointError("it ends within a tensor")


def tensor_in(file: Any) -> Tensor:
    """The one tensor that a file, or a part of one, holds: a fake one, for `read_into`. Errors as of `check_tensor`."""
    check_tensor(file)
    file.seek(0)
    try:
        with FakeTensorMode():
            found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, *_MALFORMED) as error:
        raise CheckpointError(f"damaged or not written by torch.save: {brief(error)}") from error
    if not isinstance(found, FakeTensor):
        raise CheckpointError("it holds no tensor")
    return found


def _today(name: str) -> str:
    """A global's name as torch looks it up: protocol 2 writes that of Python 2."""
    return name.replace("__builtin__.", "builtins.")


def _stand_in(name: str, path: Path) -> type | None:
    """The inert class for `name`; None where torch itself replaces it."""
    if name in _STAND_INS:
        return _STAND_INS[name]
    if _ENUM.fullmatch(name):
        return type(name.rsplit(".", 1)[1], (EnumMember,), {})
    if _STORAGE.fullmatch(name):
        return None
    raise CheckpointError(f"refused: it asks for {name}, which no checkpoint needs; nothing was run")


@contextmanager
def _only_these_globals(allowed: list[Any]) -> Iterator[None]:
    """Let torch's restricted unpickler know exactly `allowed` beyond its own names, whatever others registered."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def check_tensor(file: Any) -> None:
    """Refuse what is anything but one tensor as torch.save writes it, before torch reads it.

    Raises:
        CheckpointError: it is damaged, would take more memory than its size, or mentions a name that no tensor needs.
    """
    try:
        foreign = sorted(name for name in _zip_names(file) - _TENSOR_NAMES if not _STORAGE.fullmatch(name))
    except (OSError, *_MALFORMED) as error:
        raise CheckpointError(f"damaged or not written by torch.save: {brief(error)}") from error
    if foreign:
        raise CheckpointError(f"refused: it asks for {foreign[0]}, which no tensor needs; nothing was run")


def _zip_names(file: Any) -> set[str]:
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > size:
            raise CheckpointError("refused: its entries overlap or are larger than the file")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise CheckpointError("refused: it has compressed entries, which torch.save never writes")
        pickles = [member for member in members if member.filename.endswith("data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"refused: it has {len(pickles)} pickles where torch.save writes one")
        if pickles[0].file_size > _LARGEST_INDEX:
            raise CheckpointError("refused: its pickle is larger than any list of tensors")
        return names_in(io.BytesIO(archive.read(pickles[0])), pickles[0].file_size)


def _plain_names(file: BinaryIO) -> set[str]:
    """Of torch's format before 1.6: magic number, protocol, system, content and storage keys are five pickles."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return set().union(*(names_in(file, size) for _ in range(5)))


def brief(error: BaseException) -> str:
    """The first line of what went wrong; torch appends advice that would not be safe to follow."""
    text = str(error).strip()
    reason = text.rsplit("WeightsUnpickler error:", 1)[-1].strip().splitlines()
    return f"{type(error).__name__}: {reason[0][:200]}" if reason else type(error).__name__


# --- the index file of torch.distributed.checkpoint -------------------------------------------------------------

_DCP = "torch.distributed.checkpoint"
_DCP_RECORDS = {
    f"{_DCP}.metadata.{name}"
    for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties")
} | {
    f"{_DCP}.metadata.ChunkStorageMetadata",
    f"{_DCP}.metadata.MetadataIndex",
    f"{_DCP}.metadata._MEM_FORMAT_ENCODING",
    f"{_DCP}.filesystem._StorageInfo",
    "torch.serialization._get_layout",
    "builtins.getattr",  # how some releases of Python 3.11 write a memory format; never called here
}
_SHARD = re.compile(r"__\d+_\d+\.distcp")


class _Record:
    """Stands in for a dataclass: keeps the arguments and the state it is given."""

    def __init__(self, *args: Any):
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the names in a `.metadata` file that holds tensors only; its records are inert and made afresh."""

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.records = {name: type(name.rsplit(".", 1)[1], (_Record,), {}) for name in _DCP_RECORDS}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self.records:
            return self.records[full]
        if full in _DTYPES:
            return _DTYPES[full]
        if full == "torch.Size":
            return tuple
        raise CheckpointError(f"refused: it asks for {full}, which no index needs; nothing was run")


def read_dcp_metadata(path: Path) -> Metadata:
    """Read the `.metadata` of torch.distributed.checkpoint, as written for tensors alone.

    Raises:
        CheckpointError: the file is missing, damaged, mentions a foreign name, lists entries that are not tensors,
            or places a tensor in a file outside its directory.
    """
    try:
        content = read_small(path, _LARGEST_INDEX)
        names_in(io.BytesIO(content), len(content))
        return _to_metadata(_MetadataUnpickler(io.BytesIO(content)).load())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except _MALFORMED as error:
        raise CheckpointError(f"{path} is damaged: {brief(error)}") from error


def _to_metadata(record: Any) -> Metadata:
    """Build torch's own metadata from inert records, taking only what is of the expected type."""
    fields = _state(record, "Metadata")
    tensors = {_text(name): _to_tensor(name, entry) for name, entry in fields["state_dict_metadata"].items()}
    storage = dict(_to_place(index, info) for index, info in fields["storage_data"].items())
    for name, tensor in tensors.items():
        for number, chunk in enumerate(tensor.chunks):
            if MetadataIndex(name, chunk.offsets, number) not in storage:
                raise CheckpointError(f"it does not say where {name} lies")
    return Metadata(state_dict_metadata=tensors, storage_data=storage, version=fields.get("version"))


def _to_tensor(name: str, record: Any) -> TensorStorageMetadata:
    if type(record).__name__ != "TensorStorageMetadata":
        raise CheckpointError(f"refused: {name!r} is not a tensor, and checkpoints hold nothing else")
    fields = _state(record, "TensorStorageMetadata")
    dtype = _state(fields["properties"], "TensorProperties")[0]
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{name} has no number type")
    states = [_state(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    chunks = [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in states]
    size = _size(fields["size"])
    if not _fill(chunks, size):  # else a part would stay what the memory held
        raise CheckpointError(f"refused: the parts of {name} do not make up the whole")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _fill(chunks: Sequence[ChunkStorageMetadata], size: torch.Size) -> bool:
    """Whether the parts lie in a tensor of this size, beside each other, and leave nothing out."""
    if len(chunks) > _MOST_PARTS or sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        return False
    spans = [tuple(zip(chunk.offsets, chunk.sizes, strict=True)) for chunk in chunks]
    inside = all(
        len(span) == len(size) and all(start + length <= most for (start, length), most in zip(span, size, strict=True))
        for span in spans
    )
    return inside and all(
        any(a + n <= b or b + m <= a for (a, n), (b, m) in zip(one, other, strict=True))
        for one, other in itertools.combinations(spans, 2)
    )


def _to_place(index: Any, info: Any) -> tuple[MetadataIndex, _StorageInfo]:
    key, place = _state(index, "MetadataIndex"), _state(info, "_StorageInfo")
    file = _text(place["relative_path"])
    if not _SHARD.fullmatch(file) or place.get("transform_descriptors"):
        raise CheckpointError(f"refused: a tensor is placed in {file!r}")
    offset, number = key.get("offset"), key.get("index")
    where = MetadataIndex(_text(key["fqn"]), None if offset is None else _size(offset), number)
    return where, _StorageInfo(file, *_size((place["offset"], place["length"])))


def _state(record: Any, kind: str) -> Any:
    if type(record).__name__ != kind or not isinstance(record, _Record) or record.state is None:
        raise CheckpointError(f"it holds {type(record).__name__} where {kind} belongs")
    return record.state


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise CheckpointError(f"it holds {type(value).__name__} where a name belongs")
    return value


def _size(values: Any) -> torch.Size:
    if not all(type(value) is int and value >= 0 for value in values):
        raise CheckpointError("it holds a size that is not made of natural numbers")
    return torch.Size(values)
