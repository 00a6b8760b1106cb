"""Text to memory-mapped token shards, once.

    cache_dir/<key>/
      train-00000.bin …  valid-00000.bin …   little-endian token ids: uint16 if the vocabulary fits, else uint32
      tokenizer.json
      manifest.json      written last: what the others must be, by size and SHA-256

The key is a hash of the documents and the settings: other text, another vocabulary or another share of validation
text is another folder. Every document ends with the end token; documents keep the order of the source.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import tokenizers
from filelock import FileLock
from numpy.typing import NDArray

from mezzo._version import __version__
from mezzo.data.corpus import Document, ReadStats, documents
from mezzo.data.tokenizer import Tokenizer
from mezzo.data.tokens import Tokens
from mezzo.errors import ConfigError, DataError

Progress = Callable[[str, float], None]  # (what is being done, share done in 0 … 1)

LAYOUT = 1  # raised when the same text would give other files
SHARD_TOKENS = 1 << 28
HASHED_ON_OPEN = 1 << 30  # bytes; prepare() checks the SHA-256 of cached shards up to here: about a second
TRAINING_BYTES = 200_000_000  # the tokenizer learns from this much of the training text, chosen by hash
_ENCODE_BYTES = 4_000_000  # text handed to all cores at a time
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Corpus:
    """Tokenised text on disk, ready for training.

    folder     where it lies
    manifest   what it was made of: sha256, source, splits.train.tokens, splits.valid.bytes, invalid_utf8, …
    tokenizer  what made the tokens
    train      Tokens of the training documents
    valid      Tokens of the validation documents, which are whole and never trained on
    """

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: Tokens
    valid: Tokens

    @property
    def sha256(self) -> str:
        """Hash of the documents' text, in order: which text this is, whatever the tokenizer."""
        return str(self.manifest["sha256"])

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False) -> Corpus:
        """Open a prepared folder.

        folder   cache_dir/<key>, as prepare() made it
        verify   read every file and compare its SHA-256; sizes are always compared
        raises   DataError naming the file that is missing, cut short or changed
        """
        folder = Path(folder)
        path = folder / _MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            files = {name: (int(f["bytes"]), str(f["sha256"])) for name, f in manifest["files"].items()}
            dtype = np.dtype(manifest["dtype"])
            counts = {split: int(manifest["splits"][split]["tokens"]) for split in ("train", "valid")}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: missing or damaged ({error!r}); prepare the text again") from error
        for name, (size, digest) in files.items():
            _check_file(folder / name, size, digest if verify else None)
        splits = {}
        for split in ("train", "valid"):
            names = sorted(name for name in files if name.startswith(f"{split}-"))
            tokens = Tokens([np.memmap(folder / name, dtype=dtype, mode="r") for name in names])
            if len(tokens) != counts[split]:
                raise DataError(f"{path}: {split} has {len(tokens):,} tokens, the manifest says {counts[split]:,}")
            splits[split] = tokens
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        return cls(folder, manifest, tokenizer, splits["train"], splits["valid"])


def prepare(
    source: str | Path,
    cache_dir: str | Path,
    *,
    vocab_size: int,
    tokenizer_path: str | Path | None = None,
    valid_fraction: float = 0.05,
    text_key: str = "text",
    progress: Progress | None = None,
) -> Corpus:
    """Make token shards of `source`, or open those made before.

    The text is read again each time, to know whether it changed; where that takes too long, keep the folder and use
    Corpus.open. Cached shards are checked, up to 1 GiB by SHA-256 and beyond by size; damaged ones are made anew.
    Several processes may call this at once: one works, the others wait.

    source          "stdlib", a file, a folder or a glob; see mezzo.data.corpus
    cache_dir       folder for all prepared texts; made if missing
    vocab_size      of the tokenizer trained on the training documents (it comes out smaller for very little text)
    tokenizer_path  a tokenizer.json to use instead; vocab_size then does not matter
    valid_fraction  share of the documents held out, chosen by a hash of their text, at least one of them
    text_key        the key of the text in JSON lines
    progress        called with (what is being done, share done)
    returns         Corpus
    raises          DataError if there is no text, or only one document, or the disk is full;
                    ConfigError if valid_fraction or vocab_size cannot be
    """
    if not 0 < valid_fraction < 1:
        raise ConfigError(
            f"valid_fraction {valid_fraction} is not a share; give a number between 0 and 1, such as 0.05"
        )
    report = progress or (lambda stage, share: None)
    report("reading text", 0.0)
    given = Tokenizer.load(tokenizer_path) if tokenizer_path is not None else None
    text = _scan(source, text_key)
    is_valid = _choose_valid(text, valid_fraction, str(source))
    report("reading text", 1.0)

    settings = {
        "layout": LAYOUT,
        "valid_fraction": valid_fraction,
        "tokenizer": hashlib.sha256(given.to_json().encode()).hexdigest() if given else f"byte-level BPE {vocab_size}",
    }
    key = hashlib.sha256(f"{text.sha256} {json.dumps(settings, sort_keys=True)}".encode()).hexdigest()[:16]
    cache, folder = Path(cache_dir), Path(cache_dir) / key
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{key}.lock"):
            if folder.exists():
                try:
                    return Corpus.open(folder, verify=_size(folder) <= HASHED_ON_OPEN)
                except DataError as error:
                    report(f"making the shards again: {error}", 0.0)
            for left_over in cache.glob(f".tmp-{key}-*"):  # of a process that was killed: the lock is ours
                shutil.rmtree(left_over, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{key}-", dir=cache))
            try:
                _write(temporary, source, text_key, text, is_valid, given or vocab_size, settings, report)
                if folder.exists():
                    shutil.rmtree(folder)
                temporary.rename(folder)
                _sync_folder(cache)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            return Corpus.open(folder)
    except OSError as error:
        room = (
            f"about {text.stats.bytes:,} bytes are needed there; make room, or " if error.errno == errno.ENOSPC else ""
        )
        raise DataError(
            f"{cache}: cannot write token shards ({error.strerror or error}); {room}choose another folder"
        ) from error


@dataclass
class _Scan:
    """What one reading of the source found: enough to know it again, and to choose the splits."""

    stats: ReadStats = field(default_factory=ReadStats)
    hashes: list[int] = field(default_factory=list)  # 64 bits of each document
    sizes: list[int] = field(default_factory=list)  # bytes of each document
    sha256: str = ""


def _scan(source: str | Path, text_key: str) -> _Scan:
    scan, whole = _Scan(), hashlib.sha256()
    for document in documents(source, text_key, stats=scan.stats):
        raw = document.text.encode()
        whole.update(len(raw).to_bytes(8, "little") + raw)
        scan.hashes.append(int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little"))
        scan.sizes.append(len(raw))
    scan.sha256 = whole.hexdigest()
    return scan


def _choose_valid(text: _Scan, fraction: float, source: str) -> NDArray[np.bool_]:
    """Which documents are validation text: those whose hash is small, but neither none nor all."""
    if len(text.hashes) < 2:
        raise DataError(
            f"{source}: the text is a single document, but training and validation need one each; give more text: "
            "several files, several JSON lines, or one plain-text file of 2,000 characters or more"
        )
    hashes = np.array(text.hashes, dtype=np.uint64)
    chosen: NDArray[np.bool_] = hashes < np.uint64(int(fraction * 2**64))
    if not chosen.any():
        chosen[hashes.argmin()] = True
    elif chosen.all():
        chosen[hashes.argmax()] = False
    return chosen


def _write(
    folder: Path,
    source: str | Path,
    text_key: str,
    text: _Scan,
    is_valid: NDArray[np.bool_],
    tokenizer: Tokenizer | int,
    settings: dict[str, Any],
    report: Progress,
) -> None:
    """All files of a corpus, the manifest last."""

    def read() -> Iterator[tuple[Document, bool]]:
        """The documents again, with their split; the text must not have changed since it was scanned."""
        stats = ReadStats()
        try:
            for i, document in enumerate(documents(source, text_key, stats=stats)):
                yield document, bool(is_valid[i])
        except IndexError:
            stats.documents = -1
        if (stats.documents, stats.bytes) != (text.stats.documents, text.stats.bytes):
            raise DataError(f"{source}: the text changed while it was read; try again when nothing writes to it")

    if isinstance(tokenizer, int):
        report("training the tokenizer", 0.0)
        sizes = np.array(text.sizes)
        share = min(1.0, TRAINING_BYTES / max(1, int(sizes[~is_valid].sum())))
        learn = np.array(text.hashes, dtype=np.uint64) % np.uint64(1 << 32) < np.uint64(int(share * 2**32))
        tokenizer = Tokenizer.train(
            (d.text for i, (d, valid) in enumerate(read()) if learn[i] and not valid), tokenizer
        )
        report("training the tokenizer", 1.0)
    _write_text(folder / "tokenizer.json", tokenizer.to_json())

    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    writers = {split: _ShardWriter(folder, split, dtype) for split in ("train", "valid")}
    total, done = text.stats.bytes, 0
    report("encoding", 0.0)
    for part in _parts(read()):
        encoded = tokenizer.encode_batch([document.text for document, _ in part])
        for (document, valid), ids in zip(part, encoded, strict=True):
            writers["valid" if valid else "train"].add(np.append(ids, np.uint32(tokenizer.eot)))
            done += len(document.text.encode())
        report("encoding", done / total)
    splits = {split: writer.close() for split, writer in writers.items()}
    for split, mask in (("train", ~is_valid), ("valid", is_valid)):
        splits[split] |= {"documents": int(mask.sum()), "bytes": int(np.array(text.sizes)[mask].sum())}

    files = [folder / "tokenizer.json", *sorted(folder.glob("*.bin"))]
    manifest = {
        "source": str(source),
        "sha256": text.sha256,
        "settings": settings,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.str,
        "splits": splits,
        "documents": text.stats.documents,
        "duplicates": text.stats.duplicates,
        "invalid_utf8": text.stats.invalid_utf8,
        "skipped": text.stats.skipped,
        "files": {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files},
        "versions": {"mezzo": __version__, "tokenizers": tokenizers.__version__, "python": platform.python_version()},
    }
    _write_text(folder / _MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False))
    _sync_folder(folder)
    report("encoding", 1.0)


def _parts(read: Iterator[tuple[Document, bool]]) -> Iterator[list[tuple[Document, bool]]]:
    """Documents in parts large enough to keep all cores busy."""
    part, size = [], 0
    for item in read:
        part.append(item)
        size += len(item[0].text)
        if size >= _ENCODE_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


class _ShardWriter:
    """Writes one split, a new file every SHARD_TOKENS tokens."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any]) -> None:
        self._folder, self._split, self._dtype = folder, split, dtype
        self._file: IO[bytes] | None = None
        self._in_file = self._files = self._tokens = 0

    def add(self, ids: NDArray[np.uint32]) -> None:
        self._tokens += len(ids)
        while len(ids):
            if self._file is None:
                self._file = open(self._folder / f"{self._split}-{self._files:05d}.bin", "wb")  # noqa: SIM115
                self._files, self._in_file = self._files + 1, 0
            now, ids = np.split(ids, [SHARD_TOKENS - self._in_file])
            self._file.write(now.astype(self._dtype).tobytes())
            self._in_file += len(now)
            if self._in_file == SHARD_TOKENS:
                self._end_file()

    def close(self) -> dict[str, int]:
        self._end_file()
        return {"tokens": self._tokens}

    def _end_file(self) -> None:
        if self._file is not None:
            _sync(self._file)
            self._file.close()
            self._file = None


def _check_file(path: Path, size: int, digest: str | None) -> None:
    remedy = "prepare the text again"
    if not path.is_file():
        raise DataError(f"{path}: missing; {remedy}")
    if path.stat().st_size != size:
        raise DataError(f"{path}: {path.stat().st_size:,} bytes, the manifest says {size:,}; {remedy}")
    if digest is not None and _sha256(path) != digest:
        raise DataError(f"{path}: its contents changed (SHA-256 is not the manifest's); {remedy}")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        _sync(file)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
