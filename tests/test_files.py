"""Files are written whole, and what cannot be written is recognised without touching anything."""

import errno
import os
import tempfile
from pathlib import Path

import jax
import pytest

from jaxformer.errors import UserError, machine_errors
from jaxformer.files import check_writable, lines_of, write_text


def test_a_file_is_written_into_a_folder_that_is_made(tmp_path):
    path = tmp_path / "a" / "b.txt"
    check_writable(path)
    assert not path.parent.exists()
    for text in ("once\n", "다시\n"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert [file.name for file in path.parent.iterdir()] == ["b.txt"]


def test_what_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    for path, why in (
        (tmp_path / "folder", "Is a directory"),
        (tmp_path / "file" / "a" / "b.txt", f"{tmp_path}/file is not a directory"),
    ):
        with pytest.raises(UserError, match=f"cannot write {path}: {why}; choose another place"):
            check_writable(path)
        with pytest.raises(UserError, match=f"cannot write {path}: .*; give a new one"):
            write_text(path, "new", advice="give a new one")
    monkeypatch.setattr(os, "access", lambda *_: False)  # as for users other than root
    with pytest.raises(UserError, match="Permission denied"):
        check_writable(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old"
    monkeypatch.undo()

    def no_room(dir):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", no_room)
    with pytest.raises(UserError, match="new: No space left on device; choose another place"):
        check_writable(tmp_path / "folder" / "new")
    assert {file.name for file in tmp_path.rglob("*")} == {"file", "folder"}


def test_lines_that_cannot_be_read_and_what_the_machine_lacks(tmp_path, monkeypatch):
    unreadable = os.fdopen(os.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY), "rb", 0)
    with unreadable, pytest.raises(UserError, match="cannot read x: Bad file descriptor; give"):
        list(lines_of(unreadable, "x"))
    with pytest.raises(AssertionError, match="our own"), machine_errors(""):
        raise AssertionError("our own")
    with pytest.raises(FileNotFoundError), machine_errors(""):
        raise FileNotFoundError

    def no_device():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", no_device)
    with pytest.raises(UserError, match="no device with JAX_PLATFORMS="), machine_errors(""):
        jax.devices()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="directory has been deleted"), machine_errors(""):
        Path("x").absolute()
