"""Payloads that run code where pickles are simply loaded, and bombs: files for test_safe.py and hostile/."""

import argparse
import copy
import functools
import io
import os
import pickle
import runpy
import struct
import subprocess
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch


class Reduce:
    """Pickles as a call of `function(*args)`, with a state if one is given."""

    def __init__(self, function: Callable, args: tuple, state: object = None):
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple:
        return self.parts


def python(mark: Path) -> str:
    return f"open({str(mark)!r}, 'w').close()"


def saved(content: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def beside(mark: Path, content: bytes) -> str:
    """A hostile file next to where the mark would be, for a payload that makes its victim read it."""
    path = mark.with_name("more")
    path.write_bytes(content)
    return str(path)


def call_system(mark: Path) -> Reduce:
    return Reduce(os.system, (f"touch {mark}",))


def objects(mark: Path) -> np.ndarray:
    return np.array([call_system(mark), None], dtype=object)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


PAYLOADS: dict[str, Callable[[Path], object]] = {
    "os.system": call_system,
    "subprocess.Popen": lambda mark: Reduce(subprocess.Popen, (["touch", str(mark)],)),
    "eval": lambda mark: Reduce(eval, (python(mark),)),
    "exec": lambda mark: Reduce(exec, (python(mark),)),
    "open": lambda mark: Reduce(open, (str(mark), "w")),
    "import": lambda mark: Reduce(__import__, ("this",)),
    "partial": lambda mark: Reduce(functools.partial(os.system, f"touch {mark}"), ()),
    "runpy": lambda mark: Reduce(runpy.run_path, (beside(mark, python(mark).encode()),)),
    "pathlib": lambda mark: Reduce(Path.touch, (mark,)),
    "load_from_bytes": lambda mark: Reduce(torch.storage._load_from_bytes, (saved({"x": call_system(mark)}),)),
    "torch.load": lambda mark: Reduce(
        functools.partial(torch.load, weights_only=False), (beside(mark, saved(call_system(mark))),)
    ),
    "numpy objects": objects,
    "numpy.load": lambda mark: Reduce(
        functools.partial(np.load, allow_pickle=True), (beside(mark, npy(objects(mark))),)
    ),
    "state of a namespace": lambda mark: Reduce(argparse.Namespace, (), {"x": call_system(mark)}),
}
# The same by hand, for what no pickler writes. %s is a command.
BODIES = {
    "getattr chain": b"c__builtin__\ngetattr\n(c__builtin__\n__import__\n(Vos\ntRVsystem\ntR(V%s\ntR.",
    "INST": b"(V%s\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nV%s\no.",
    "__setstate__ by BUILD": b"\x80\x02cargparse\nNamespace\n)\x81}V__setstate__\ncos\nsystem\nsbV%s\nb.",
    "name from the memo": b"\x80\x04Vos\nq\x00Vsystem\nq\x01h\x00h\x01\x93V%s\n\x85R.",
    "persistent id": b"\x80\x02(Vstorage\ncos\nsystem\nV%s\n\x85RtQ.",
    "key of a dictionary": b"\x80\x02}cos\nsystem\nV%s\n\x85RNs.",
    "behind the end": b"\x80\x02N.cos\nsystem\nV%s\n\x85R.",
}


def pickled(name: str, mark: Path) -> bytes:
    """A payload as a pickle."""
    if name in PAYLOADS:
        return pickle.dumps(PAYLOADS[name](mark), protocol=2)
    return BODIES[name] % f"touch {mark}".encode()


def archive(body: bytes, more: Mapping[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file as torch.save writes it, around a pickle of one's own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in {"data.pkl": body, "version": b"3\n", "byteorder": b"little", **(more or {})}.items():
            file.writestr(f"x/{name}", content)
    return buffer.getvalue()


def before_1_6(body: bytes) -> bytes:
    """The same as torch wrote it before 1.6: pickles one after the other."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = [pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, system)]
    return b"".join([*head, body, pickle.dumps([], protocol=2)])


# --- bombs: what takes all memory, all stack or for ever --------------------------------------------------------

Trap = Callable[[bytes], bytes]
"""From the good content of a file to a bad one."""

P2, DEEP = b"\x80\x02", 200_000  # some 150,000 levels of tuples are more than a stack of 8 MB can hash


def word(text: str) -> bytes:
    """The opcode that pushes a string."""
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def doubled() -> bytes:
    """A list of pairs, each of the one before it: 2^60 values for who follows the references. The last is memo 60."""
    return b"](K\x01q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60)) + b"e"


PICKLE_BOMBS = {
    "a key nested deeply": P2 + b"})" + b"\x85" * DEEP + b"Ns.",
    "a key that doubles": P2 + b"}(" + word("k") + doubled() + b"h\x3cNu.",
    "lists nested deeply": P2 + b"]" * 50_000 + b"a" * 49_999 + b".",
    "a string of a terabyte, so it says": P2 + b"\x8e" + struct.pack("<Q", 1 << 40) + b".",
    "a memo of 2^31": P2 + b"Nr\xff\xff\xff\x7f.",
    "pops an empty stack": P2 + b"0.",
    "refers to what is not there": P2 + b"h\x05.",
    "many empty dictionaries": P2 + b"](" + b"}" * 100_000 + b"e.",
}


def floats(*counts: int) -> bytes:
    """The pickle of a list of float tensors, each in a storage of its own."""
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((%bctorch\nFloatStorage\n%b%bJ%btQK\x00J%b\x85K\x01\x85\x89%b)RtR"
    parts = [
        tensor
        % (word("storage"), word(str(i)), word("cpu"), *[struct.pack("<i", n)] * 2, b"ccollections\nOrderedDict\n")
        for i, n in enumerate(counts)
    ]
    return P2 + b"](" + b"".join(parts) + b"e."


@functools.cache
def compressed() -> bytes:
    """300 MB of zeros in 300 kB."""
    return archive(floats(75 << 20), {"data/0": bytes(300 << 20)}, zipfile.ZIP_DEFLATED)


def overlapping() -> bytes:
    """100 entries that are one and the same 3 MB of the file."""
    buffer = io.BytesIO(archive(floats(*[3 << 18] * 100), {"data/0": bytes(3 << 20)}))
    with zipfile.ZipFile(buffer, "a") as file:
        first = file.getinfo("x/data/0")
        for i in range(1, 100):
            again = copy.copy(first)
            again.filename = f"x/data/{i}"
            file.filelist.append(again)
        file.writestr("x/end", b"")  # else the list is not written anew
    return buffer.getvalue()


def scripted() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), buffer)
    return buffer.getvalue()


ARCHIVES: dict[str, Trap] = {
    "compressed zeros": lambda good: compressed(),
    "entries that overlap": lambda good: overlapping(),
    "two pickles": lambda good: archive(pickle.dumps({}), {"more/data.pkl": pickle.dumps({})}),
    "no pickle": lambda good: archive(b"").replace(b"data.pkl", b"data.abc"),
    "a hostile archive behind": lambda good: good + archive(BODIES["INST"] % b"false"),
    "a hostile archive before": lambda good: archive(BODIES["INST"] % b"false") + good,
    "a TorchScript module": lambda good: scripted(),
    "cut in half": lambda good: good[: len(good) // 2],
}
