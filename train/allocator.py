"""How a process on a CPU gets its memory, and gives it back: with glibc's malloc."""

import ctypes
import os
import sys
from contextlib import suppress


def restart_with_huge_pages() -> None:
    """Restart this process with an allocator that asks for huge pages, where there is one.

    In every step XLA allocates and frees hundreds of megabytes with glibc's malloc, and the kernel
    maps them anew, by default 4 KiB at a time. With huge pages the steps of Multi30k are 1.2
    times as fast. An environment that has `GLIBC_TUNABLES` already, empty or not, is left alone.
    """
    if sys.platform == "linux" and sys.executable and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # madvise(MADV_HUGEPAGE)
        try:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        except OSError:  # the user may not be allowed to execute the interpreter
            del os.environ["GLIBC_TUNABLES"]


def return_free_memory() -> None:
    """Give free memory back to the kernel, also from between what is in use; only with glibc.

    Compiling and the first step leave holes that later steps do not fill. Without these, a step of
    `base` in bfloat16 has a peak a quarter lower, now and later.
    """
    with suppress(OSError, AttributeError):  # no such library or function
        ctypes.CDLL(None).malloc_trim(0)
