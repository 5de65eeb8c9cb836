"""Turns text into token files: documents in, one `.bin/.idx` pair per JSON key out, in the order they came.

Reading and writing happen in the calling process, decoding and tokenizing in workers that get about half a
megabyte of undecoded records at a time, so memory doesn't grow with the corpus.
"""

import multiprocessing
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from megatron.config.data import TokenizerConfig
from megatron.data.indexed import IndexedWriter, best_dtype
from megatron.data.text_files import BATCH_BYTES, BadRecord, Batch, Document, check_keys, read_batches
from megatron.errors import ConfigError, DataError, EELLMError, StorageError
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer

# sentences are sought in pieces of a text this long: the splitter's memory grows with what it is given
SPLITTER_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class EncodeSettings:
    """What makes tokens of a document; hashable, so that each worker builds its tokenizer once."""

    tokenizer: TokenizerConfig
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    split_sentences: bool = False
    keep_newlines: bool = False
    language: str = "english"


@dataclass(frozen=True)
class PreprocessSettings:
    """One run: `inputs` as `text_files.find_inputs` gives them; the rest as the flags of the same names;
    `batch_bytes` of input make a task for a worker."""

    inputs: tuple[Path, ...]
    output_prefix: str
    encode: EncodeSettings
    workers: int = 1
    partitions: int = 1
    keep_sequential_samples: bool = False
    strict: bool = False
    batch_bytes: int = BATCH_BYTES


@dataclass
class Encoded:
    """The documents of one batch.

    Per key: `tokens` [T] in the dataset's dtype, back to back; `lengths`, per document those of its
    sequences. A document without tokens has no sequences.
    """

    consumed: int
    documents: int = 0
    bad: list[BadRecord] = field(default_factory=list)
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    lengths: dict[str, list[list[int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """What a run did: totals over all keys, and the files it wrote."""

    documents: int
    tokens: int
    skipped: int
    files: list[str]


class Encoder:
    """Tokenizes documents as `settings` say."""

    def __init__(self, settings: EncodeSettings) -> None:
        """ConfigError where the tokenizer or the sentence splitter can't be had."""
        self.settings = settings
        self.tokenizer: Tokenizer = build_tokenizer(**vars(settings.tokenizer))
        self.dtype = best_dtype(self.tokenizer.vocab_size)
        self._eod = self.tokenizer.eod if settings.append_eod else None
        self._split: Callable[[str], list[str]] | None = None
        if settings.split_sentences:
            self._split = sentence_splitter(settings.language, settings.keep_newlines)

    def encode_batch(self, batch: Batch) -> Encoded:
        """Decode and tokenize; a record that is unreadable in one key is left out of all."""
        result = Encoded(batch.consumed)
        flat: dict[str, list[int]] = {key: [] for key in self.settings.keys}
        result.lengths = {key: [] for key in self.settings.keys}
        for document in batch.documents(self.settings.keys):
            sequences = document if isinstance(document, BadRecord) else self._encode(document)
            if isinstance(sequences, BadRecord):
                result.bad.append(sequences)
                continue
            result.documents += 1
            for key, parts in sequences.items():
                result.lengths[key].append([len(part) for part in parts])
                for part in parts:
                    flat[key] += part
        result.tokens = {key: np.array(ids, self.dtype) for key, ids in flat.items()}
        return result

    def _encode(self, document: Document) -> dict[str, list[list[int]]] | BadRecord:
        """Per key the non-empty sequences; the last one ends with the end-of-document token if wanted."""
        result = {}
        for key, text in document.texts.items():
            if isinstance(text, str):
                text = self._split(text) if self._split else [text]
            try:
                sequences = [ids for ids in self.tokenizer.tokenize_batch(text) if ids]
            except DataError as err:
                return BadRecord(document.where, f"{key!r}: {err}")
            if sequences and self._eod is not None:
                sequences[-1].append(self._eod)
            result[key] = sequences
        return result


def sentence_splitter(language: str, keep_newlines: bool) -> Callable[[str], list[str]]:
    """NLTK's Punkt for `language`; with `keep_newlines` the space after a sentence stays at its end.

    ConfigError naming what to install where the library or its data are missing.
    """
    try:
        from nltk.tokenize.punkt import PunktTokenizer
    except ImportError as err:
        raise ConfigError("--split-sentences needs the nltk library, 3.9 or later: pip install nltk") from err
    try:
        punkt = PunktTokenizer(language)
    except LookupError as err:
        raise ConfigError(
            f"--split-sentences: NLTK has no Punkt data for --lang {language} here; "
            "get them with: python -m nltk.downloader punkt_tab"
        ) from err
    except ValueError as err:
        raise ConfigError(f"--lang {language}: {err}") from err

    def split(text: str) -> list[str]:
        sentences = []
        for start in range(0, len(text), SPLITTER_CHARACTERS):
            piece = text[start : start + SPLITTER_CHARACTERS]
            spans = list(punkt.span_tokenize(piece))
            if keep_newlines:
                borders = [begin for begin, _ in spans[1:]]
                spans = list(zip([0, *borders], [*borders, len(piece)], strict=True))
            sentences += [piece[begin:end] for begin, end in spans]
        return sentences

    return split


def preprocess(settings: PreprocessSettings, on_batch: Callable[[Encoded], None]) -> Summary:
    """Tokenize `settings.inputs` into `{output_prefix}_{key}_{document|sentence}.{bin,idx}`.

    `on_batch` is called in order, after each batch was written. Files appear only when all are complete.
    With several partitions document i goes to partition i mod partitions and the partitions follow one
    another, as in Megatron-LM, unless `keep_sequential_samples`.

    Raises ConfigError, DataError (unreadable input; with `strict` the first unreadable record; nothing
    readable at all, or no token in it), StorageError.
    """
    encode = settings.encode
    _check(settings)
    encoder = Encoder(encode)
    level = "sentence" if encode.split_sentences else "document"
    prefixes = {key: f"{settings.output_prefix}_{key}_{level}" for key in encode.keys}
    documents = tokens = skipped = 0
    first_bad: BadRecord | None = None
    batches = read_batches(settings.inputs, encode.keys, settings.batch_bytes)
    with (
        closing(_encode_all(batches, encoder, settings.workers)) as results,
        _writers(prefixes, encoder.dtype, settings) as writers,
    ):
        for result in results:
            if result.bad and settings.strict:
                raise DataError(f"{result.bad[0]}; --strict stops at the first unreadable record")
            _write(result, writers, documents)
            documents += result.documents
            tokens += sum(ids.size for ids in result.tokens.values())
            skipped += len(result.bad)
            first_bad = first_bad or next(iter(result.bad), None)
            on_batch(result)
        if not documents:
            cause = f"{skipped} records, none readable, the first: {first_bad}" if skipped else "it is empty"
            raise DataError(f"--input {_named(settings.inputs)} holds no document ({cause}); nothing was written")
        if not tokens:
            raise DataError(
                f"--input {_named(settings.inputs)}: all documents are empty (read: {documents}, unreadable: "
                f"{skipped}); nothing was written"
            )
    files = [prefix + ending for prefix in prefixes.values() for ending in (".bin", ".idx")]
    return Summary(documents, tokens, skipped, files)


def _check(settings: PreprocessSettings) -> None:
    keys = settings.encode.keys
    if len(set(keys)) != len(keys):
        raise ConfigError(f"--json-keys names a key twice: {' '.join(keys)}")
    if settings.partitions < 1 or settings.workers < 1:
        raise ConfigError("--workers and --partitions must be at least 1")
    if settings.workers % settings.partitions:
        raise ConfigError(f"--workers ({settings.workers}) must be a multiple of --partitions ({settings.partitions})")
    if not settings.output_prefix:
        raise ConfigError("--output-prefix is empty: give a path without an ending")
    if Path(settings.output_prefix).is_dir():
        raise ConfigError(f"--output-prefix {settings.output_prefix} is a directory: add a name for the files in it")
    check_keys(settings.inputs, keys)


def _named(inputs: Sequence[Path]) -> str:
    return f"{inputs[0]} (and {len(inputs) - 1} more)" if len(inputs) > 1 else str(inputs[0])


@lru_cache(maxsize=1)
def _worker_encoder(settings: EncodeSettings) -> Encoder:
    """The encoder of a worker process, built at its first batch."""
    return Encoder(settings)


def _encode_in_worker(batch: Batch, settings: EncodeSettings) -> Encoded:
    return _worker_encoder(settings).encode_batch(batch)


def _encode_all(batches: Iterator[Batch], encoder: Encoder, workers: int) -> Generator[Encoded, None, None]:
    """Results in the order of `batches`; never more than a few batches a worker are under way."""
    if workers == 1:
        yield from map(encoder.encode_batch, batches)
        return
    # spawn: the same on every platform, and safe beside the threads of the tokenizer libraries
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is the parent's to handle
    )
    pending: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_encode_in_worker, batch, encoder.settings))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as err:
        raise EELLMError(
            "a worker process died (killed, or out of memory?); nothing was written. Try fewer --workers"
        ) from err
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _writers(
    prefixes: dict[str, str], dtype: np.dtype, settings: PreprocessSettings
) -> Iterator[dict[str, Sequence[IndexedWriter]]]:
    """Per key one writer, or one per partition whose files are merged when the block ends well."""
    with ExitStack() as stack:
        final = {key: stack.enter_context(IndexedWriter(prefix, dtype)) for key, prefix in prefixes.items()}
        if settings.partitions == 1 or settings.keep_sequential_samples:
            yield {key: [writer] for key, writer in final.items()}
            return
        try:
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix=".partitions-", dir=Path(settings.output_prefix).absolute().parent)
            )
        except OSError as err:
            raise StorageError(f"cannot write beside {settings.output_prefix}: {err.strerror}") from err
        names = {
            key: [f"{folder}/{number}_{part}" for part in range(settings.partitions)]
            for number, key in enumerate(final)
        }
        with ExitStack() as parts:
            yield {key: [parts.enter_context(IndexedWriter(name, dtype)) for name in names[key]] for key in final}
        for key, writer in final.items():
            for name in names[key]:
                writer.add_index(name)


def _write(result: Encoded, writers: dict[str, Sequence[IndexedWriter]], first: int) -> None:
    """Append the documents of `result`, the first of which is number `first` of the run."""
    for key, parts in writers.items():
        start = 0
        for number, lengths in enumerate(result.lengths[key], start=first):
            end = start + sum(lengths)
            parts[number % len(parts)].add_document(result.tokens[key][start:end], lengths)
            start = end
