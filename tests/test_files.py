"""Files are written whole, and what cannot be written is recognised without touching anything."""

import errno
import os
import tempfile

import pytest

from jaxformer.errors import UserError
from jaxformer.files import check_writable, write_text


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
