"""Bombs and traps: what takes all memory, never ends, or meets code that expects something else."""

import io
import json
import pickle
import struct
from argparse import Namespace
from collections.abc import Callable, Mapping
from hashlib import sha256

import numpy as np
import torch

from megatron.checkpoint import manifest
from megatron.data.indexed import HEADER, MAGIC
from tests.unit.checkpoint.pickles import (
    ARCHIVES,
    DEEP,
    P2,
    PICKLE_BOMBS,
    Trap,
    archive,
    before_1_6,
    doubled,
    npy,
    saved,
    word,
)  # fmt: skip


def arguments(value: bytes) -> bytes:
    """A checkpoint of Megatron whose arguments hold a value, given as opcodes."""
    spaces = b"cargparse\nNamespace\n)\x81}" + word("x") + value + b"sb"
    return archive(P2 + b"}(" + word("args") + spaces + word("model") + b"}u.")


def doubled_dictionaries(levels: int = 60) -> bytes:
    steps = b"".join(b"K\x01}(X\x01\0\0\0ah%cX\x01\0\0\0bh%cuq%c" % (i, i, i + 1) for i in range(levels))
    return b"}(K\x00}q\x00" + steps + b"u"


def legacy(**changes: object) -> Trap:
    return lambda good: saved(torch.load(io.BytesIO(good), weights_only=False) | changes)


def spread(*shape: int) -> torch.Tensor:
    """A tensor of any size over a single number."""
    return torch.zeros(1).expand(*shape)


LEGACY_TRAPS = {
    "arguments that double": lambda good: arguments(doubled()),
    "arguments that hold themselves": lambda good: arguments(b"]q\x00h\x00a"),
    "arguments nested deeply": lambda good: arguments(b"]" * 50_000 + b"a" * 49_999),
    "arguments that are the rest": lambda good: archive(P2 + b"}q\x00(" + word("args") + b"h\x00u."),
    "arguments as a huge tensor": legacy(args=Namespace(x=spread(1 << 40))),
    "a model that holds itself": lambda good: archive(
        P2 + b"}(" + word("args") + b"}" + word("model") + b"}q\x00" + word("a") + b"h\x00su."
    ),
    "a model that doubles": lambda good: archive(
        P2 + b"}(" + word("args") + b"}" + word("model") + doubled_dictionaries() + b"u."
    ),
    "an iteration of 400 digits": legacy(iteration=10**400),
    "a version of 400 digits": legacy(checkpoint_version=10**400),
    "as many ranks": legacy(args=Namespace(tensor_model_parallel_size=10**400)),
    "as many layers": legacy(args=Namespace(num_layers=10**400)),
}


def tampered(change: Callable) -> Trap:
    """An index in which something was changed."""

    def trap(good: bytes) -> bytes:
        metadata = pickle.loads(good)
        change(metadata)
        return pickle.dumps(metadata)

    return trap


def resized(*shape: int) -> Trap:
    def change(metadata: object) -> None:
        entry = metadata.state_dict_metadata["model/a"]
        entry.size = entry.chunks[0].sizes = shape

    return tampered(change)


def placed(**where: object) -> Trap:
    return tampered(lambda metadata: [vars(place).update(where) for place in metadata.storage_data.values()])


INDEX_TRAPS = {
    "a tensor of 4 TB": resized(10**12),
    "a tensor of 2^66 bytes": resized(2**62, 4),
    "a size beyond 64 bits": resized(2**70),
    "a tensor of which a part is stored": tampered(
        lambda metadata: setattr(metadata.state_dict_metadata["model/a"].chunks[0], "sizes", torch.Size((1, 2)))
    ),
    "a tensor of which nothing is stored": tampered(
        lambda metadata: setattr(metadata.state_dict_metadata["model/a"], "chunks", [])
    ),
    "a file of 2^63 bytes": placed(length=2**63),
    "a place at 2^63 - 1": placed(offset=2**63 - 1),
    "another file": placed(relative_path="../facts.json"),
    "a file from the root on": placed(relative_path="/etc/passwd"),
}


def facts(**changes: object) -> Trap:
    return lambda good: json.dumps(json.loads(good) | changes).encode()


def own_file(name: str) -> Trap:
    """Facts that name a file as one of the tokenizer's."""
    return lambda good: facts(tokenizer_sha256={name: sha256(b"").hexdigest()})(good)


JSON_BOMBS = {
    "nested deeply": lambda good: b"[" * DEEP,
    "mappings nested deeply": lambda good: b'{"a":' * DEEP,
    "a number of 5000 digits": lambda good: b'{"format": %b}' % (b"9" * 5000),
    "a list": lambda good: b"[1]",
    "null": lambda good: b"null",
    "no text": lambda good: b"\xff\xfe\x00",
    "nothing": lambda good: b"",
}
FACTS_TRAPS = {
    "an iteration of 400 digits": facts(iteration=10**400),
    **{f"tokenizer file {name[:20]!a}": own_file(name) for name in (
        "../facts.json", "/etc/passwd", "..", ".", "", "a" * 5000, "a\0b", "\ud800", "a/b", "vocab.json/",
    )},
}  # fmt: skip


def sized(text: bytes) -> Trap:
    """A manifest whose first size is `text`."""
    return lambda good: good.replace(b'"size": ', b'"size": %b, "was": ' % text, 1)


def renamed(name: str) -> Trap:
    """A manifest, whole in itself, that lists another file."""

    def trap(good: bytes) -> bytes:
        entries = json.loads(good)["files"]
        return manifest._encode({name: entries.pop("facts.json"), **entries})

    return trap


MANIFEST_TRAPS = {
    "a size without end": sized(b"1e999"),
    "a size that is none": sized(b"NaN"),
    "a size of 4000 digits": sized(b"9" * 4000),
    "a negative size": sized(b"-1"),
    **{
        f"lists {name!a}": renamed(name)
        for name in ("../facts.json", "/etc/passwd", "", ".", "tensors", "a\0", "\ud800")
    },
}


def yaml(text: str) -> Trap:
    return lambda good: text.encode()


def laughs(last: str) -> str:
    """A YAML list in which each item holds the one before twice."""
    items = ", ".join(f"&a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 50))
    return f"x: [&a0 [1, 1], {items}]\n{last}: *a49\n"


YAML_TRAPS = {
    "python/object/apply": yaml('num_layers: !!python/object/apply:os.system ["touch mark"]'),
    "python/object/new": yaml('!!python/object/new:os.system ["touch mark"]'),
    "python/name": yaml("num_layers: !!python/name:os.system"),
    "python/module": yaml("num_layers: !!python/module:os"),
    "python/tuple": yaml("num_layers: !!python/tuple [1]"),
    "lists that double": yaml(laughs("num_layers")),
    "lists that double, unknown": yaml(laughs("unknown")),
    "lists that double, of a blend": yaml(laughs("data_path")),
    "mappings merged twice each": yaml(
        "x:\n- &a0 {a: 1}\n" + "".join(f"- &a{i}\n  <<: [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 50))
    ),
    "a list in itself": yaml("num_layers: &a [*a]"),
    "nested deeply": yaml("[" * DEEP),
    "no truth": yaml("num_layers: !!bool maybe"),
    "no number": yaml('num_layers: !!int ""'),
    "no fraction": yaml('lr: !!float ""'),
    "no date": yaml("num_layers: !!timestamp today"),
    "a key that is a list": yaml("? [1]\n: 2"),
    "a number of 10^5 digits": yaml("num_layers: 0x" + "f" * 100_000),
}


def array(header: str, version: int = 1) -> Trap:
    """An .npy file of a header of one's own."""
    size = "<H" if version == 1 else "<I"
    return lambda good: (
        b"\x93NUMPY%c\0" % version + struct.pack(size, len(header) + 1) + header.encode() + b"\n" + good[128:]
    )


def shaped(shape: str, descr: str = "'<i4'") -> Trap:
    return array(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}")


def stored(content: object) -> Trap:
    return lambda good: npy(np.asarray(content))


NPY_TRAPS = {
    "objects": lambda good: npy(np.array([{}, None], dtype=object)),
    "objects in fields": shaped("(1,)", "[('a', 'O')]"),
    "an expression": array("__import__('os').system('touch mark')"),
    "brackets nested deeply": array("(" * 5000),
    "signs nested deeply": array("-" * 9000 + "1"),
    "an open bracket": array("{'descr': '<i4', 'shape': (3,"),
    "an odd indent": array("  1\n 2"),
    "a key that is a mapping": array("{{}: 1}"),
    "a shape of 2^64": shaped("(4611686018427387904, 4)"),
    "a shape beyond": shaped("(1" + "0" * 30 + ",)"),
    "a negative shape": shaped("(-4,)"),
    "no shape": shaped("()"),
    "a true shape": shaped("(True,)"),
    "no type": shaped("(1,)", "('<i4',)"),
    "a header of 4 GB": lambda good: b"\x93NUMPY\x02\0\xff\xff\xff\xff",
    "a zip": lambda good: archive(b"N."),
    "half a zip": lambda good: b"PK\x03\x04",
    "a single number": stored(np.int32(3)),
    "a cube": stored(np.zeros((1, 1, 1), np.int32)),
    "fractions": stored(np.full((60, 2), np.nan)),
    "nothing": lambda good: b"",
}


def index_file(lengths: list[int], pointers: list[int], documents: list[int], **header: int) -> Trap:
    head = {"code": 8, "sequences": len(lengths), "borders": len(documents)} | header
    packed = HEADER.pack(MAGIC, 1, head["code"], head["sequences"], head["borders"])
    arrays = (np.array(lengths, "<i4"), np.array(pointers, "<i8"), np.array(documents, "<i8"))
    return lambda good: packed + b"".join(each.tobytes() for each in arrays)


IDX_TRAPS = {
    "2^64 sequences": index_file([5], [0], [0, 1], sequences=2**64 - 1),
    "2^64 borders": index_file([5], [0], [0, 1], borders=2**64 - 1),
    "a negative length": index_file([5, -5], [0, 10], [0, 1, 2]),
    "a length beyond the file": index_file([5, 2**31 - 1], [0, 10], [0, 1, 2]),
    "a pointer before the file": index_file([5, 5], [0, -10], [0, 1, 2]),
    "a pointer beyond the file": index_file([5, 5], [0, 2**62], [0, 1, 2]),
    "borders that run back": index_file([5, 5], [0, 10], [0, 2, 1, 2]),
    "no numbers": index_file([5], [0], [0, 1], code=7),
    "an unknown type": index_file([5], [0], [0, 1], code=200),
}


def changed(**changes: object) -> Trap:
    return lambda good: json.dumps(json.loads(good) | changes).encode()


def normalizer(kind: str, **values: object) -> Trap:
    return changed(normalizer={"type": kind, **values})


VOCAB_TRAPS = {
    "an id of 2^40": changed(zz=2**40),
    "an id of 400 digits": changed(zz=10**400),
    "half a character": changed(**{"\ud800": 7}),
    "a negative id": changed(zz=-1),
    "a true id": changed(zz=True),
}
TOKENIZER_TRAPS = {
    "a table of nothing": normalizer("Precompiled", precompiled_charsmap="AAAA"),
    "a table that points outside": normalizer("Precompiled", precompiled_charsmap="BAAAAP////9/"),
    "a prefix longer than a word": lambda good: changed(
        model={**json.loads(good)["model"], "continuing_subword_prefix": "x" * 100}
    )(good),
    "a template without its token": changed(
        post_processor={"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
                        "pair": [], "special_tokens": {}},
    ),
    "no word for the unknown": changed(model={"type": "WordLevel", "unk_token": "?", "vocab": {}}),
    "normalizers nested deeply": lambda good: good.rstrip()[:-1] + b', "normalizer": ' + (
        b'{"type": "Sequence", "normalizers": [' * DEEP
    ),
}  # fmt: skip
EVIL = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
SETTINGS_TRAPS = {
    "code beside it": changed(tokenizer_class="Evil", auto_map=EVIL),
    "code elsewhere": changed(tokenizer_class="Evil", auto_map={"AutoTokenizer": "somebody/evil--evil.Evil"}),
    "a class that is a number": changed(tokenizer_class=5),
    "a class that is itself": changed(tokenizer_class="AutoTokenizer"),
}


def bombs(wrap: Callable[[bytes], bytes]) -> dict[str, Trap]:
    return {name: lambda good, body=body: wrap(body) for name, body in PICKLE_BOMBS.items()}


def some_json(*names: str) -> dict[str, Trap]:
    return {name: JSON_BOMBS[name] for name in names}


TRAPS: dict[str, Mapping[str, Trap]] = {
    "megatron": bombs(archive) | LEGACY_TRAPS | ARCHIVES,
    "megatron, before torch 1.6": bombs(before_1_6),
    "index": bombs(bytes) | INDEX_TRAPS,
    "tensors": bombs(archive) | ARCHIVES | {"a tensor over one number": lambda good: saved(spread(1 << 40))},
    "facts": JSON_BOMBS | FACTS_TRAPS,
    "manifest": JSON_BOMBS | MANIFEST_TRAPS,
    "tracker": {
        "digits without end": lambda good: b"1" * (5 << 20),
        "no number": lambda good: b"-1",
        "Arabic digits": lambda good: "٣".encode(),
    },
    "own tokenizer": JSON_BOMBS,
    "config.yaml": YAML_TRAPS,
    "config.json": {name: bomb for name, bomb in JSON_BOMBS.items() if name != "null"},  # that is an empty one
    "vocab.json": JSON_BOMBS | VOCAB_TRAPS,
    "tokenizer.json": JSON_BOMBS | TOKENIZER_TRAPS,
    "its settings": some_json("nested deeply", "no text", "nothing")
    | {"half a character": changed(eos_token="\ud800"), "an odd token": changed(eos_token=[1])},
    "directory": JSON_BOMBS,
    "directory, settings": some_json("nested deeply", "null", "a list", "no text", "nothing") | SETTINGS_TRAPS,
    "sentencepiece": {
        "nothing": lambda good: b"",
        "half of it": lambda good: good[: len(good) // 2],
        "lengths without end": lambda good: b"\x0a\xff\xff\xff\xff\x07" * 1000,
    },
    ".idx": IDX_TRAPS,
    "sample index": NPY_TRAPS,
    "document index": {name: NPY_TRAPS[name] for name in ("objects", "an expression", "no shape", "half a zip")},
    "shuffle index": {name: NPY_TRAPS[name] for name in ("objects", "an expression", "no shape", "half a zip")},
    "index description": {"no text": lambda good: b"\xff\xfe", "another": lambda good: good + b" "},
}
