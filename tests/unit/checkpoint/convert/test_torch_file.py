"""Files as torch.save writes them, a tensor at a time: torch reads them as its own, failing ones end in an error."""

import argparse
import errno
import gc
import hashlib
import io
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from megatron import faults
from megatron.checkpoint.convert.base import TensorSpec
from megatron.checkpoint.convert.torch_file import TorchFile
from megatron.errors import StorageError

TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64)
TENSORS = {f"{number}.weight": torch.arange(12).view(3, 4).to(dtype) for number, dtype in enumerate(TYPES)}
TENSORS |= {"none": torch.empty(0, 5), "number": torch.tensor(3.5), "row": torch.arange(5.0)}


def content(tensors: dict[str, object]) -> dict[str, object]:
    args = argparse.Namespace(dtype=torch.bfloat16, sizes=[1, 2], word="a", nothing=None)
    return {"args": args, "version": 3.0, "model": {"a": OrderedDict(tensors), "b": {}}, "last": tensors["row"]}


def specs() -> dict[str, object]:
    return content({name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()})


def write(path: Path) -> dict:
    file = TorchFile(path, specs())
    for tensor in (*TENSORS.values(), TENSORS["row"]):
        file.write(tensor)
    return file.close()


def test_torch_reads_what_it_would_have_written(tmp_path):
    described = write(tmp_path / "ours.pt")
    torch.save(content(TENSORS), tmp_path / "theirs.pt")
    ours, theirs = (torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in ("ours", "theirs"))
    assert (ours["args"], ours["version"], list(ours)) == (theirs["args"], 3.0, list(theirs))
    assert ours["model"]["a"].keys() == theirs["model"]["a"].keys()
    for name, tensor in theirs["model"]["a"].items():
        found = ours["model"]["a"][name]
        assert (found.dtype, found.shape, found.requires_grad) == (tensor.dtype, tensor.shape, False)
        assert torch.equal(found, tensor)
    raw = (tmp_path / "ours.pt").read_bytes()
    assert described == {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw)}
    assert zipfile.ZipFile(io.BytesIO(raw)).testzip() is None


def test_a_view_takes_no_more_room_than_it_shows(tmp_path):
    file = TorchFile(tmp_path / "a.pt", {"part": TensorSpec((5,), torch.float32)})
    file.write(torch.arange(1_000_000.0)[7:12])
    assert file.close()["size"] < 10_000
    assert torch.load(tmp_path / "a.pt")["part"].tolist() == [7, 8, 9, 10, 11]


def test_a_file_without_all_its_tensors_is_no_file(tmp_path):
    file = TorchFile(tmp_path / "a.pt", specs())
    with pytest.raises(AssertionError, match="tensors are missing: data/0"):
        file.close()
    file.abandon()


@pytest.mark.parametrize("action", ["enospc", "erofs"])
def test_any_write_may_fail(tmp_path, action):
    """Also those that torch makes when it is done, or when it forgets a file: then an error would end the process."""
    with faults.armed() as passed:
        write(tmp_path / "count.pt")
    writes = passed.count("legacy.write")
    assert writes > 30
    for number in (0, *range(1, writes + 1, 7), writes):
        words = f"legacy.write@{number}:{action}" if number else f"legacy.open:{action}"
        with faults.armed(words), pytest.raises(StorageError, match=f"cannot write .*a.pt: .*{errno_text(action)}"):
            write(tmp_path / "a.pt")
        gc.collect()


def errno_text(action: str) -> str:
    return {"enospc": f"Errno {errno.ENOSPC}", "erofs": f"Errno {errno.EROFS}"}[action]


def test_a_file_that_is_given_up_is_closed(tmp_path):
    file = TorchFile(tmp_path / "a.pt", specs())
    file.write(TENSORS["0.weight"])
    file.abandon()
    file.abandon()
    del file
    gc.collect()
