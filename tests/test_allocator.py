"""`python -m train` restarts itself once, for huge pages; free memory goes back to the kernel."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from train.allocator import restart_with_huge_pages, return_free_memory

ROOT = Path(__file__).parent.parent


class Restarted(Exception):
    pass


def test_restarts_once_with_the_same_command(monkeypatch):
    def exec_(path, arguments):
        raise Restarted(path, *arguments)

    monkeypatch.setattr(os, "execv", exec_)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "train", "fit", "tiny"])
    monkeypatch.setenv("GLIBC_TUNABLES", "as it was, is put back in the end")
    monkeypatch.delenv("GLIBC_TUNABLES")
    with pytest.raises(Restarted) as restarted:
        restart_with_huge_pages()
    python = sys.executable
    assert restarted.value.args == (python, python, "-X", "dev", "-m", "train", "fit", "tiny")
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    restart_with_huge_pages()


def test_goes_on_where_it_cannot_start_itself_again(monkeypatch):
    def forbidden(path, arguments):
        raise PermissionError(path)

    monkeypatch.setattr(os, "execv", forbidden)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    restart_with_huge_pages()
    monkeypatch.setattr(sys, "executable", "")
    restart_with_huge_pages()
    assert "GLIBC_TUNABLES" not in os.environ


@pytest.mark.parametrize(("platform", "tunables"), [("linux", ""), ("darwin", None)])
def test_leaves_others_alone(monkeypatch, platform, tunables):
    monkeypatch.setattr(sys, "platform", platform)
    if tunables is None:
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    else:
        monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    before = dict(os.environ)
    restart_with_huge_pages()
    assert dict(os.environ) == before


def test_the_command_line_after_the_restart():
    environment = {name: x for name, x in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-m", "train", "fit", "no-such"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "no-such" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_memory_between_what_is_in_use_is_given_back():
    def in_use():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    blocks = [ctypes.create_string_buffer(b"x" * 65_000) for _ in range(2000)]
    last, full = blocks[-1], in_use()
    del blocks
    return_free_memory()
    assert in_use() < full - 100e6
    assert last.value.startswith(b"x")


def test_other_allocators_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    return_free_memory()
