"""Builds rounding.cpp and measure.cpp with the machine's own compiler and keeps the library in the user's cache folder.

$CXX or g++, clang++, c++ ──► helper-HASH.so      HASH: sources, compiler, flags and processor

The library speaks a plain C ABI, so neither torch's headers nor a build system is needed. It takes some seconds, once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock

from mezzo.hardware import processor

FOLDER = Path(__file__).parent
SOURCE, MEASURE, HEADER = FOLDER / "rounding.cpp", FOLDER / "measure.cpp", FOLDER / "common.h"
# Nothing here changes a result: traps and errno are not looked at, and each operation stays one operation.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fPIC", "-shared")
NATIVE = (("-march=native",), ("-mcpu=native",), ())  # the first that the compiler takes
TIMEOUT = 300  # seconds for one run of the compiler


class BuildError(Exception):
    """Why there is no helper, in a few words."""


@dataclass(frozen=True)
class Compiler:
    """command  what to call; label  its name and version, "g++ 12.2.0"; version  the whole line that it prints"""

    command: tuple[str, ...]
    label: str
    version: str


def find_compiler() -> Compiler:
    """The C++ compiler: $CXX, else the first of g++, clang++ and c++ on the path.

    raises    BuildError if there is none that runs
    """
    if os.name == "nt":
        raise BuildError("not made for Windows")
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        path = shutil.which(chosen[0])
        if path is None:
            raise BuildError(f"CXX names {chosen[0]!r}, which is not there")
        command = (path, *chosen[1:])
    else:
        path = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
        if path is None:
            raise BuildError("no C++ compiler (set CXX)")
        command = (path,)
    printed = _run([*command, "--version"])
    if printed.returncode or not printed.stdout.strip():
        raise BuildError(f"{' '.join(command)} does not run")
    version = printed.stdout.strip().splitlines()[0]
    number = re.search(r"version (\d[\w.]*)", version) or re.search(r"(\d+\.\d+[\d.]*)\s*$", version)
    name = "clang++" if "clang" in version else Path(path).name
    return Compiler(command, f"{name} {number[1]}" if number else name, version)


def library(compiler: Compiler, check: Callable[[ctypes.CDLL], str | None]) -> ctypes.CDLL:
    """The helper's library, from the cache or built now; another process that builds is waited for.

    check     says what is wrong with a library that was built just now, or None; only a sound one is kept
    raises    BuildError if it cannot be built, does not load or is wrong
    """
    sources = [path.read_bytes() for path in (SOURCE, MEASURE, HEADER)]
    parts = [*sources, *(text.encode() for text in (compiler.version, *compiler.command, *FLAGS, *_machine()))]
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = Path(platformdirs.user_cache_dir("mezzo"))
    path = folder / f"helper-{name}.so"
    if path.exists():
        try:
            return _load(path)
        except BuildError:
            path.unlink(missing_ok=True)  # torn, or of another system that shares the folder: built anew
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"helper-{name}.lock"):
            if path.exists():
                return _load(path)
            part = folder / f"helper-{name}.{os.getpid()}.so"
            try:
                _compile(compiler, part)
                built = _load(part)
                wrong = check(built)
                if wrong is not None:
                    raise BuildError(f"what {compiler.label} built gives other bits than mezzo.formats: {wrong}")
                part.replace(path)
                return built
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise BuildError(f"the cache folder {folder} cannot be written ({error.strerror or error})") from error


def _compile(compiler: Compiler, to: Path) -> None:
    sources = (f"-I{HEADER.parent}", str(SOURCE), str(MEASURE))
    for native in NATIVE:
        done = _run([*compiler.command, *FLAGS, *native, "-pthread", "-o", str(to), *sources])
        if done.returncode == 0:
            return
    said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
    raise BuildError(f"{compiler.label} failed: {said or f'exit status {done.returncode}'}")


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the library does not load: {error}") from error


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=TIMEOUT
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} does not run ({error})") from error


def _machine() -> tuple[str, ...]:
    """What -march=native depends on. A virtual machine may hide features of a processor of the same name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.system(), platform.machine(), processor(), features
