"""Huge pages for the memory of a step on CPU."""

import os
import sys


def restart_with_huge_pages() -> None:
    """Start this process again with an allocator that asks for huge pages, if there is such a one.

    In every step XLA takes hundreds of megabytes from glibc's malloc and gives them back, and the
    kernel maps them anew, by default 4 KiB at a time. With huge pages the steps of Multi30k are 1.2
    times as fast. An environment that has `GLIBC_TUNABLES` already, empty or not, is left alone.
    """
    if sys.platform == "linux" and sys.executable and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # madvise(MADV_HUGEPAGE)
        try:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        except OSError:  # who runs this need not be allowed to start Python
            del os.environ["GLIBC_TUNABLES"]
