"""Compiled programs on disk, so that the next start neither traces nor lowers them.

JAX's own cache of compilations looks a program up by its lowered text, and making that is most of a start. Here the key is
what the text is made from: our sources, the versions of all that takes part, JAX's options, the machine, the model and the
arguments. A second key has the text in place of the sources, so that an edit which changes no program costs no compilation.
What is missing, damaged or cannot be kept is compiled.

Whoever can write a program can run code here, so folders and files that others may write to are not read.
"""

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import pickle
import platform
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable

from jaxserve.config import compiler_flags
from jaxserve.executor.compiles import count_reads

_STARTED_S = time.time()  # our sources are read about now
_MOST_BYTES = 2 << 30  # of all programs; beyond that, those go whose last use is longest ago
_DIGEST_SIZE = hashlib.sha256().digest_size
_PACKAGE = Path(__file__).parents[1]
# Who makes the programs. The rest of the package (scheduler, server, ...) is above these, and they do not know it.
_MAKERS = ("executor", "models", "pallas_kernels", "sampling", "sharding", "memory")
_SOURCES = (".py", ".cc", ".h", ".json")
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "libtpu", "jax-triton", "triton")
_BOOKKEEPING = ("jax_compilation_cache_", "jax_persistent_cache_")  # options of JAX that change no program
_OTHERS_MAY_WRITE = 0o022
# What `serialize` raises for a program that lives in this process only: one that calls back into Python, for example.
_CANNOT_BE_KEPT = (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError, pickle.PicklingError)

_log = logging.getLogger(__name__)


class Program(NamedTuple):
    """A jitted function, and arguments like those that it will be called with (or their shapes)."""

    function: Any
    args: tuple[Any, ...]

    def lower(self) -> Any:
        """Trace and lower."""
        return self.function.lower(*self.args)


class ProgramStore:
    """Programs for some devices. Several threads and processes may use one folder at once."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], sources: str, devices: Sequence[Any]):
        """`folder` is ours alone. `sources` (a digest) and `facts` tell all that decides a program, but for its name and
        arguments."""
        self._folder, self._sources, self._devices = folder, sources, tuple(devices)
        self._facts = repr((sorted(facts.items()), [(d.id, d.device_kind) for d in devices]))
        self.loaded: list[Any] = []  # names of programs that were not compiled

    def get(self, name: Any, program: Program) -> Callable[..., Any]:
        """The compiled program: from disk if it was made by the same sources, or if others made the same text of it."""
        about = (self._facts, name, _describe(program.args))
        by_sources = self._path(about, self._sources)
        content = self._read(by_sources)
        if content is None:
            lowered = program.lower()
            text = _text(lowered)
            by_text = None if text is None else self._path(about, text)
            content = None if by_text is None else self._read(by_text)
            if content is None:
                return self._compile(lowered, filter(None, (by_text, by_sources)))
            self._write(by_sources, content)
        try:
            parts = pickle.loads(content)  # noqa: S301  our own file, as machine code in JAX's cache is
            loaded = serialize_executable.deserialize_and_load(*parts, execution_devices=self._devices)
        except Exception as error:  # noqa: BLE001  unpickling and the device's driver may raise anything
            _log.warning("a program is compiled again, because %s cannot be loaded: %s", by_sources, error)
            return self._compile(program.lower(), [by_sources])
        self.loaded.append(name)
        return loaded

    def trim(self) -> None:
        """Delete what was not used for longest, until the rest is small enough."""
        kept_bytes = 0
        for _, size, path in sorted(_files(self._folder.iterdir()), reverse=True):
            kept_bytes += size
            if kept_bytes > _MOST_BYTES:
                path.unlink(missing_ok=True)

    def _compile(self, lowered: Any, paths: Iterable[Path]) -> Callable[..., Any]:
        reads = count_reads()
        compiled = lowered.compile()
        if count_reads() > reads:  # on CPU what came from JAX's own cache would be written without its code
            return compiled
        try:
            content = pickle.dumps(serialize_executable.serialize(compiled))
        except _CANNOT_BE_KEPT as error:
            _log.debug("a program cannot be kept: %s", error)
        else:
            for path in paths:
                self._write(path, content)
        return compiled

    def _path(self, *key: Any) -> Path:
        return self._folder / hashlib.sha256(repr(key).encode()).hexdigest()[:40]

    def _read(self, path: Path) -> bytes | None:
        try:
            with path.open("rb") as file:
                is_ours, whole = _is_ours(os.fstat(file.fileno())), file.read()
            os.utime(path)  # it is in use
        except OSError:
            return None  # it is not there
        digest, content = whole[:_DIGEST_SIZE], whole[_DIGEST_SIZE:]
        if is_ours and hashlib.sha256(content).digest() == digest:
            return content
        reason = "it is damaged" if is_ours else "others may write to it"
        _log.warning("%s is not used, because %s", path, reason)
        return None

    def _write(self, path: Path, content: bytes) -> None:
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:  # for nobody else
                file.write(hashlib.sha256(content).digest() + content)
            os.replace(file.name, path)
        except OSError as error:
            _log.warning("a compiled program cannot be written: %s", error)


def open_store(folder: Path, facts: Mapping[str, Any], devices: Sequence[Any]) -> ProgramStore | None:
    """A store in `folder`, which is made if it is not there. None, and a line in the log, if it must not be used."""
    sources = _digest_of_sources(_PACKAGE)
    if sources is None or _is_patched():
        _log.info("compiled programs are not kept: this process runs something else than jaxserve's sources on disk")
        return None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_ours = _is_ours(folder.stat())
    except OSError as error:
        _log.warning("compiled programs are not kept: %s", error)
        return None
    if not is_ours:
        _log.warning("compiled programs are not kept in %s, because others may write there; chmod go-w helps", folder)
        return None
    return ProgramStore(folder, {**facts, **_surroundings()}, sources, devices)


@contextlib.contextmanager
def instead_of_jaxs_cache() -> Iterator[None]:
    """Let JAX's own cache take nothing of what is compiled meanwhile: what came from there, a store cannot keep."""
    option = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, option)
    jax.config.update(option, float("inf"))
    try:
        yield
    finally:
        jax.config.update(option, before)


def _is_ours(status: os.stat_result) -> bool:
    return os.name == "posix" and status.st_uid == os.getuid() and not status.st_mode & _OTHERS_MAY_WRITE


def _describe(args: tuple[Any, ...]) -> tuple[str, list[Any]]:
    """Structure, shapes, types and places of arrays."""
    leaves, structure = jax.tree.flatten(args)
    names = ("weak_type", "sharding", "committed")
    return str(structure), [(x.shape, str(x.dtype), *(str(getattr(x, name, None)) for name in names)) for x in leaves]


def _text(lowered: Any) -> str | None:
    """What decides a program, whoever made it. None if unused arguments have been dropped: which, the text does not say."""
    text = lowered.as_text()
    head = next(line for line in text.splitlines() if "func public @main(" in line)
    if head.count("%arg") != len(jax.tree.leaves(lowered.args_info)):
        return None
    return f"{lowered.out_tree} {text}"


def _surroundings() -> dict[str, Any]:
    """All but our own sources that every program depends on."""
    backend = jax.devices()[0].client
    options = sorted((name, value) for name, value in jax.config.values.items() if not name.startswith(_BOOKKEEPING))
    return {
        "python": platform.python_version(),
        "packages": [_version(name) for name in _PACKAGES],
        "backend": (backend.platform, backend.platform_version, jax.device_count(), jax.process_count()),
        "options": repr(options),
        "flags": compiler_flags(),
        "processor": _processor(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> tuple[Any, ...]:
    """What machine code may use: a home folder may be shared by unlike machines."""
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU ", "Features", "isa", "uarch")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux: no list of features, so a program stays on its machine
        lines, wanted = [platform.processor(), platform.node()], ("",)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return platform.machine(), cores, sorted({line for line in lines if line.startswith(wanted)})


def _digest_of_sources(package: Path) -> str | None:
    """Of what makes programs; None if a file is newer than this process, which may then run what is not there any more."""
    digest = hashlib.sha256()
    paths = [*package.glob("*"), *(path for name in _MAKERS for path in (package / name).resolve().rglob("*"))]
    for changed_s, size, path in sorted(_files(paths), key=lambda file: file[2]):
        if path.suffix in _SOURCES:
            if changed_s > _STARTED_S:
                return None
            digest.update(f"{path.parent.name}/{path.name} {size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _is_patched() -> bool:
    """Whether a script or a notebook has put functions of its own in the place of ours, which no digest would see."""
    ours = [module for name, module in list(sys.modules.items()) if name.startswith("jaxserve.")]
    values = (value for module in ours for value in list(vars(module).values()))
    return any(getattr(value, "__module__", None) == "__main__" for value in values)


def _files(paths: Iterable[Path]) -> Iterator[tuple[float, int, Path]]:
    """Last change (seconds), bytes and path of each file; those that disappear meanwhile are left out."""
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode):
            yield status.st_mtime, status.st_size, path
