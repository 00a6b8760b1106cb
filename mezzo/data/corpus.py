"""Where text comes from: the standard library, files, folders and globs, as a stream of documents.

A document is what is never divided between training and validation text.

    source                        one document is
    "stdlib"                      one Python file
    a .jsonl or .ndjson file      one line's text
    one plain-text file           a piece of it: cut at blank lines, see split_text
    several plain-text files      one file; a file over 1 MiB is cut as a single one is

Any of them may be gzipped (.gz). Text is UTF-8; a byte-order mark is dropped.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, NamedTuple, cast

from mezzo.errors import DataError

STDLIB_MINIMUM = 2_000_000  # bytes; below this the library has been stripped, and a model learns nothing from it
BLOCK = 1 << 20  # bytes read at a time; the first block decides whether a file is text
PIECE = 16_384  # characters in a piece of a file that is cut
_SMALLEST_PIECE = 1_024
_JSON_LINES = (".jsonl", ".ndjson")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BLANK_LINES = re.compile(r"\n(?:[ \t\r\u3000]*\n)+")  # U+3000 is the ideographic space
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Document(NamedTuple):
    name: str  # file, file#piece or file:line
    text: str


@dataclass
class ReadStats:
    """What was met while reading; filled as documents() goes."""

    files: int = 0
    documents: int = 0
    bytes: int = 0  # of the documents' UTF-8
    duplicates: int = 0  # documents left out because the same text came before
    empty: int = 0  # files, lines or pieces without text
    invalid_utf8: int = 0  # sequences replaced by U+FFFD
    skipped: list[str] = field(default_factory=list)  # "file: reason", only in a folder


class _NotTextError(Exception):
    """This file is not UTF-8 text; the reason is its message."""


def documents(source: str | Path, text_key: str = "text", *, stats: ReadStats | None = None) -> Iterator[Document]:
    """Read every document of `source` once, in an order that does not depend on the machine.

    A text that came before is left out, so none can be in both splits. In a folder, hidden files are not read, and
    files that are not text are skipped and listed in stats; a file that was named, or matched by a glob, must be text.

    source    "stdlib", or the path of a file or folder, or a glob ("./stdlib" is a path)
    text_key  the key of the text in a JSON line
    stats     filled while reading
    returns   iterator of Document(name, text), text never blank
    raises    DataError if there is no text, a file is binary or damaged, or a JSON line is not an object with the key
    """
    stats = ReadStats() if stats is None else stats
    seen: set[bytes] = set()
    for document in _read(source, text_key, stats):
        if not document.text.strip():
            stats.empty += 1
            continue
        raw = document.text.encode()
        digest = hashlib.blake2b(raw, digest_size=16).digest()
        if digest in seen:
            stats.duplicates += 1
            continue
        seen.add(digest)
        stats.documents += 1
        stats.bytes += len(raw)
        yield document
    if not stats.documents:
        skipped = "".join(f"\n  skipped {line}" for line in stats.skipped[:5])
        raise DataError(
            f"{source}: no text found ({stats.files} files read, {stats.empty} empty files or lines, "
            f"{len(stats.skipped)} files skipped); name a file with UTF-8 text in it{skipped}"
        )


def split_text(blocks: Iterator[str], *, size: int | None = None) -> Iterator[str]:
    """Cut a long text into pieces, without losing a character.

    A piece ends at the first blank line (or end) after `size` characters; if none comes within another `size`, at the
    last line end there, and if there is none either, after 2 × size characters.

    blocks    the text, in parts of any length
    size      characters; default: a 32nd of the text, but 1,024 at least and 16,384 at most
    returns   iterator of pieces; joined, they are the text
    """
    if size is None:
        first, second = next(blocks, ""), next(blocks, "")
        size = PIECE if second else min(PIECE, max(_SMALLEST_PIECE, len(first) // 32))
        blocks = chain((first + second,), blocks)
    buffer, start = "", 0
    for block in blocks:
        buffer, start = buffer[start:] + block, 0
        while len(buffer) - start > 2 * size:  # the whole window is here, so the cut does not depend on the blocks
            end = _cut(buffer, start, size)
            yield buffer[start:end]
            start = end
    while len(buffer) - start > size:
        end = _cut(buffer, start, size)
        yield buffer[start:end]
        start = end
    if start < len(buffer):
        yield buffer[start:]


def _cut(text: str, start: int, size: int) -> int:
    """Where the piece that begins at start ends."""
    blank = _BLANK_LINES.search(text, start + size, start + 2 * size)
    if blank:
        return blank.end()
    line = text.rfind("\n", start, start + 2 * size)
    return line + 1 if line >= start + size // 2 else min(start + 2 * size, len(text))


def _read(source: str | Path, text_key: str, stats: ReadStats) -> Iterator[Document]:
    stdlib = source == "stdlib"
    files, scanned = _find_stdlib() if stdlib else _find(str(source))
    plain = sum(not _is_json_lines(path) for _, path in files)
    for name, path in files:
        stats.files += 1
        try:
            if _is_json_lines(path):
                yield from _read_json_lines(name, path, text_key, stats)
            elif stdlib:
                yield Document(name, "".join(_text_blocks(path, stats)))
            else:
                yield from _read_plain(name, path, stats, alone=plain == 1)
        except _NotTextError as reason:
            if not scanned:
                raise DataError(f"{path}: {reason}") from None
            stats.skipped.append(f"{name}: {reason}")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: damaged gzip file ({error}); fetch or compress it again") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _find(source: str) -> tuple[list[tuple[str, Path]], bool]:
    """The files of a source as (name, path), sorted by name; and whether a folder was scanned for them."""
    path = Path(source).expanduser()
    if path.is_file():
        return [(path.name, path)], False
    if path.is_dir():
        found = []
        for folder, folders, names in os.walk(path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [Path(folder, name) for name in names if not name.startswith(".")]
        files = [(file.relative_to(path).as_posix(), file) for file in found if file.is_file()]
        if not files:
            raise DataError(f"{source}: the folder holds no files; put text (.txt, .jsonl, either with .gz) into it")
        return sorted(files), True
    if glob.has_magic(source):
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        files = [(match.as_posix(), match) for match in matches if match.is_file()]
        if not files:
            raise DataError(f"{source}: the pattern matches no file; quote it in the shell, ** enters folders")
        return sorted(files), False
    raise DataError(f'{source}: no such file or folder; data is a file, a folder, a glob or "stdlib"')


def _is_json_lines(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(_JSON_LINES)


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


def _find_stdlib() -> tuple[list[tuple[str, Path]], bool]:
    """The library's own sources: no tests, no installed packages, none of the files that record this machine."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY and not name.startswith("config-")]
        found += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    size = sum(file.stat().st_size for file in found)
    if size < STDLIB_MINIMUM:
        raise DataError(
            f"stdlib: only {size:,} bytes of Python sources below {root}, at least {STDLIB_MINIMUM:,} are needed; this "
            "Python comes without its library's sources: use another build of Python, or give text of your own"
        )
    return sorted((file.relative_to(root).as_posix(), file) for file in found), True


def _read_plain(name: str, path: Path, stats: ReadStats, *, alone: bool) -> Iterator[Document]:
    blocks = _text_blocks(path, stats)
    first, second = next(blocks, ""), next(blocks, "")
    if not first:
        stats.empty += 1
    elif alone or second:
        for i, piece in enumerate(split_text(chain((first, second), blocks))):
            yield Document(f"{name}#{i}", piece)
    else:
        yield Document(name, first)


def _read_json_lines(name: str, path: Path, text_key: str, stats: ReadStats) -> Iterator[Document]:
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            line = _decode(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw, stats).strip()
            if not line:
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON ({error}); each line must be one JSON object") from None
            text = record.get(text_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                has = (
                    f"its keys are {sorted(record)}" if isinstance(record, dict) else f"it is a {type(record).__name__}"
                )
                raise DataError(
                    f"{path}:{number}: no text under {text_key!r}, {has}; each line must be an object with that key "
                    "and a string under it; data.text_key chooses another key"
                )
            yield Document(f"{name}:{number}", _without_surrogates(text, stats))


def _text_blocks(path: Path, stats: ReadStats) -> Iterator[str]:
    """A file's text in parts that end at line ends; _NotTextError before the first part if it is not text."""
    with _open(path) as file:
        first = True
        while raw := file.read(BLOCK):
            raw += file.readline()  # a line feed is never part of a longer UTF-8 sequence, so each part decodes alone
            if first:
                raw = _check_text(raw)
            elif b"\0" in raw:
                raise DataError(f"{path}: binary, a NUL byte stands near byte {file.tell():,}; give text only")
            yield _decode(raw, stats)
            first = False


def _check_text(raw: bytes) -> bytes:
    """The first bytes of a file without the byte-order mark."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise _NotTextError("UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
    if b"\0" in raw:
        raise _NotTextError("binary (it holds NUL bytes); give plain text or JSON lines, gzipped or not")
    text = raw.decode("utf-8", "replace")
    wrong = text.count(REPLACEMENT) - raw.count(REPLACEMENT.encode())
    if wrong > 100 and wrong > 0.2 * len(text):  # Latin-1 text in a European language stays well below
        raise _NotTextError(
            f"not UTF-8 ({wrong:,} invalid sequences in {len(text):,} characters); if it is text in another encoding, "
            "convert it, for example: iconv -f GB18030 -t UTF-8"
        )
    return raw.removeprefix(codecs.BOM_UTF8)


def _decode(raw: bytes, stats: ReadStats) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("utf-8", "replace")
        stats.invalid_utf8 += text.count(REPLACEMENT) - raw.count(REPLACEMENT.encode())
        return text


def _without_surrogates(text: str, stats: ReadStats) -> str:
    """JSON can name half of a surrogate pair ("\\ud800"), which no UTF-8 can hold."""
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    stats.invalid_utf8 += clean.count(REPLACEMENT) - text.count(REPLACEMENT)
    return clean
