"""Paths in object stores, such as gs://bucket/run: read through a local copy, written whole.

Any URL works that fsspec knows: gs:// and s3:// with the packages of the extra "stores", memory:// and file:// without.
Models of the Hugging Face Hub, hf://OWNER/NAME, are read too, see `hub`, and not written.
What is no URL stays the local path that it is. Copies lie in $ALLMEM_CACHE/stores, or ~/.cache/allmem/stores, and may
be deleted when nothing runs.
"""

import contextlib
import datetime
import hashlib
import json
import logging
import os
import pathlib
import platform
import re
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import fsspec

from allmem_jax.storage import hub

AnyPath = str | os.PathLike[str]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(/?)")  # two letters at least: C:/ is a drive
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs"}


def is_url(path: AnyPath) -> bool:
    """Whether a path is a URL.

    Raises:
      ValueError: it was meant to be one and has a single slash, as pathlib leaves of a URL.
    """
    found = _SCHEME.match(os.fspath(path))
    if found is None:
        return False
    scheme, second = found.groups()
    if not second and scheme in fsspec.available_protocols():
        rest = os.fspath(path)[found.end() :]
        raise ValueError(
            f"{path} has one slash where a URL has two: give {scheme}://{rest} (as text: a Path drops one)"
        )
    return bool(second)


def join(path: AnyPath, name: str) -> AnyPath:
    """`name` below a folder: text below a URL, else a `pathlib.Path`."""
    return f"{_url(path)}/{name}" if is_url(path) else pathlib.Path(path, name)


def local(path: AnyPath, suffixes: tuple[str, ...] = ("",)) -> pathlib.Path:
    """What to read in place of a path: of a URL a whole local copy, as it is there now.

    Args:
      path: a file or a folder.
      suffixes: of a folder at a URL, copy only files whose names end so.

    Raises:
      FileNotFoundError: there is nothing at the URL.
      OSError: its store cannot be reached or read, or the copy cannot be kept.
      ValueError: no store is known by such a URL, or its package is missing.
    """
    if not is_url(path):
        return pathlib.Path(path)
    url = _url(path)
    if hub.is_model(url):
        return hub.local(url, suffixes)
    found = {name: info for name, info in _listing(url).items() if name == "." or name.endswith(suffixes)}
    if not found:
        raise FileNotFoundError(f"{url}: no such file or folder")
    version = hashlib.sha256(json.dumps([url, found], sort_keys=True, default=str).encode()).hexdigest()
    kept = cache() / version[:32]
    if not kept.is_dir():
        with scratch(_name(url)) as folder:
            get(url, found, folder)
            try:
                os.replace(folder.parent, kept)
            except OSError:
                if not kept.is_dir():  # else another process was first
                    raise
    return kept / _name(url)


def read(path: AnyPath) -> bytes:
    """The content of a file."""
    if not is_url(path):
        return pathlib.Path(path).read_bytes()
    with _opened(path, "read") as (system, root):
        return system.cat_file(root)


def write(url: AnyPath, content: bytes) -> None:
    """Writes an object, which is there whole or not at all."""
    with _opened(url, "written") as (system, root):
        system.pipe_file(root, content)


def names(path: AnyPath) -> list[str]:
    """Files below a folder, by their paths in it; "." where the path is itself a file, none where it is nothing."""
    if is_url(path):
        return sorted(_listing(path))
    folder = pathlib.Path(path)
    inside = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return ["."] if folder.is_file() else inside


def listed(path: AnyPath) -> dict[str, tuple[int, float]]:
    """Bytes and time of writing, in seconds since 1970, of each file below a folder; names are those of `names`."""
    if is_url(path):
        return {name: (info["size"], _written(info)) for name, info in _listing(path).items()}
    found = {}
    for name in names(path):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            stat = pathlib.Path(path, name).stat()
            found[name] = stat.st_size, stat.st_mtime
    return found


def taken(path: AnyPath) -> bool:
    """Whether there is a file at a path, or a folder that holds something."""
    if is_url(path):
        return bool(_listing(path))
    place = pathlib.Path(path)
    return place.exists() and (not place.is_dir() or any(place.iterdir()))


def get(url: AnyPath, wanted: Iterable[str], folder: pathlib.Path) -> None:
    """Copies files below a URL, as `names` gives them, into a folder; "." becomes the folder itself."""
    with _opened(url, "read") as (system, root):
        pairs = [(_at(root, name), folder / name) for name in wanted]
        for _, file in pairs:
            file.parent.mkdir(parents=True, exist_ok=True)
        system.get([there for there, _ in pairs], [str(here) for _, here in pairs], callback=_bar(url))
        short = [there for there, here in pairs if here.stat().st_size != system.size(there)]
    if short:
        raise OSError(f"{url}: {', '.join(short)} came incomplete, or changed meanwhile; give the same command again")


def put(folder: pathlib.Path, wanted: Iterable[str], url: AnyPath) -> None:
    """Copies files in a folder to below a URL, each of them whole."""
    with _opened(url, "written") as (system, root):
        pairs = [(str(folder / name), _at(root, name)) for name in wanted]
        system.put([here for here, _ in pairs], [there for _, there in pairs], callback=_bar(url))


def remove(path: AnyPath, wanted: Iterable[str]) -> None:
    """Removes files below a folder, in this order."""
    if not is_url(path):
        for name in wanted:
            pathlib.Path(path, name).unlink()
        return
    with _opened(path, "removed") as (system, root):
        for name in wanted:
            system.rm_file(_at(root, name))


def replace(folder: pathlib.Path, url: AnyPath, last: str) -> None:
    """Makes what is below a URL equal to a folder. The file `last` is there only while all the others are."""
    old, new = names(url), names(folder)
    remove(url, [name for name in old if name == last])
    put(folder, [name for name in new if name != last], url)
    remove(url, [name for name in old if name not in new])
    put(folder, [last], url)


@contextlib.contextmanager
def spooled(
    path: AnyPath, take: Iterable[str] | None = (), every: float | None = None
) -> Iterator[tuple[pathlib.Path, Callable[[], None]]]:
    """A folder for files that grow, which stores do not have, and a function that copies what is new to the URL.

    That is also done at the end. Of a local path it is the path itself, and the function does nothing.

    Args:
      path: the folder, which need not exist.
      take: files that are to be there from the start, where the URL has them; None means all.
      every: seconds after which it is done again and again; None leaves it to the caller.
    """
    if not is_url(path):
        yield pathlib.Path(path), lambda: None
        return
    with scratch(_name(path)) as folder:
        folder.mkdir()
        there = names(path)
        get(path, there if take is None else [name for name in take if name in there], folder)
        copied = _stamps(folder)

        def upload() -> None:
            for name, stamp in _stamps(folder).items():
                if copied.get(name) != stamp:
                    put(folder, [name], path)
                    copied[name] = stamp

        try:
            with contextlib.nullcontext() if every is None else _repeated(upload, every):
                yield folder, upload
        finally:
            upload()


@contextlib.contextmanager
def _repeated(work: Callable[[], None], every: float) -> Iterator[None]:
    """Does `work` again and again beside the block, with so many seconds between; what fails is tried the next time."""
    done = threading.Event()

    def keep_up() -> None:
        while not done.wait(every):
            with contextlib.suppress(OSError):
                work()

    beside = threading.Thread(target=keep_up, daemon=True)
    beside.start()
    try:
        yield
    finally:
        done.set()
        beside.join()


@contextlib.contextmanager
def scratch(name: str) -> Iterator[pathlib.Path]:
    """Where a file or folder of this name may be made; its parent is removed at the end, or where killed, next time."""
    cache().mkdir(parents=True, exist_ok=True)
    host = platform.node()
    for left in cache().glob(f".part-{host}-*"):
        if not alive(int(left.name.split("-")[-2])):
            shutil.rmtree(left, ignore_errors=True)
    parent = tempfile.mkdtemp(prefix=f".part-{host}-{os.getpid()}-", dir=cache())
    try:
        yield pathlib.Path(parent, name)
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def alive(process: int) -> bool:
    """Whether a process of this number runs here."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def check_writable(path: AnyPath, field: str = "out") -> None:
    """Raises a ValueError where a folder cannot be made or written to. Nothing is left there.

    Args:
      path: the folder, which need not exist.
      field: what the path is called.
    """
    try:
        if is_url(path):
            with _opened(path, "written") as (system, root):
                probe = f"{root}/.allmem-{uuid.uuid4().hex}"
                system.pipe_file(probe, b"x")
                system.rm_file(probe)
            return
        place = pathlib.Path(path).absolute()
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        reason = f"{place} cannot be written: {error.strerror}" if error.strerror else str(error)
        raise ValueError(f"{field}={str(path)!r}: {reason}. Give another, or mend that") from None


def local_only(path: AnyPath, field: str) -> pathlib.Path:
    """A path that must be local; ValueError where it is a URL, or a Path made of one."""
    found = _SCHEME.match(os.fspath(path))
    if found and (found[2] or found[1] in fsspec.available_protocols()):
        raise ValueError(f"{field}={str(path)!r} must be a local path: its files are mapped into memory, or grow")
    return pathlib.Path(path)


def home() -> pathlib.Path:
    """The folder of all that is kept for a user and can be had again."""
    return pathlib.Path(os.environ.get("ALLMEM_CACHE") or "~/.cache/allmem").expanduser()


def cache() -> pathlib.Path:
    """Where copies lie."""
    return home() / "stores"


def _url(path: AnyPath) -> str:
    return re.sub(r"(?<![:/])/+$", "", os.fspath(path))


def _name(url: AnyPath) -> str:
    return _url(url).rpartition("/")[2]


def _listing(url: AnyPath) -> dict[str, Any]:
    """What the store knows of each file below a URL; see `names`."""
    found: Any = {}
    with _opened(url, "read") as (system, root), contextlib.suppress(FileNotFoundError):
        system.invalidate_cache()
        found = system.find(root, detail=True)
    files = {pathlib.PurePosixPath(there[len(root) :].lstrip("/")): info for there, info in dict(found).items()}
    folders = {parent for file in files for parent in file.parents}  # some stores have empty objects in their place
    if climbing := [str(file) for file in files if ".." in file.parts]:
        raise ValueError(f"{url} has names that lead out of it: {', '.join(climbing)}")
    return {str(file): info for file, info in files.items() if file not in folders and info["type"] == "file"}


def _written(info: dict[str, Any]) -> float:
    """The time of writing, as kinds of stores call it: here and in gs://, in s3://, in memory://."""
    at = info.get("mtime") or info.get("LastModified") or info.get("created") or 0.0
    return at.timestamp() if isinstance(at, datetime.datetime) else float(at)


def _at(root: str, name: str) -> str:
    return root if name == "." else f"{root}/{name}"


def _stamps(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file in a folder that is not being written in one step (`files.write`)."""
    found = {}
    for name in names(folder):
        with contextlib.suppress(FileNotFoundError):  # took another's place meanwhile
            stat = (folder / name).stat()
            if not name.endswith(".partial"):
                found[name] = stat.st_size, stat.st_mtime_ns
    return found


@contextlib.contextmanager
def _opened(url: AnyPath, done: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL, and the path in it; what fails there is an error that names the URL."""
    url = _url(url)
    scheme, _, rest = url.partition("://")
    options = {"auto_mkdir": True} if scheme in ("file", "local") else {}
    if hub.is_model(url):
        raise ValueError(f"{url}: on the Hub only models are read by name, and they are written by `allmem push`")
    if scheme in ("http", "https"):
        raise ValueError(f"{url} is on the web, not in a store: download it and give the local path")
    if scheme not in fsspec.available_protocols():
        raise ValueError(f"{url}: {scheme}:// is no store that fsspec knows; gs:// and s3:// are")
    if not rest.strip("/"):
        raise ValueError(f"{url} names no bucket: give {scheme}://BUCKET/PATH")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it warns of is raised as well, or does no harm
    try:
        with _naming(url, "reached"):
            found = fsspec.url_to_fs(url, **options)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        fix = f"pip install {package}, or allmem-jax[stores]" if package else str(error)
        raise ValueError(f"{url}: the package for {scheme}:// is missing: {fix}") from None
    with _naming(url, done):
        yield found


@contextlib.contextmanager
def _naming(url: AnyPath, done: str) -> Iterator[None]:
    """Turns a failure of a store into an OSError of one line that names the URL."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # each kind of store raises its own
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{url} cannot be {done}: not found: {reason:.300}") from error
        raise OSError(f"{url} cannot be {done}: {reason:.300}") from error


def _bar(url: AnyPath) -> fsspec.callbacks.Callback:
    """A bar on a terminal while files are copied for longer than a moment."""
    return fsspec.callbacks.TqdmCallback(
        tqdm_kwargs=dict(desc=f"copying {_name(url)}", unit="file", delay=2, leave=False, disable=None)
    )
