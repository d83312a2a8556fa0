"""What is asked of the operating system before JAX starts."""

import os
import platform
import sys

_TUNABLES = "GLIBC_TUNABLES"


def use_huge_pages() -> None:
    """Restarts this program once, in the same process, with its memory in huge pages.

    A training step on the CPU takes and returns more than a gigabyte of memory, which costs the
    kernel time in pages of 4 KiB (docs/benchmarks.md). Where the C library is not glibc, or its
    settings are the user's own, nothing happens.
    """
    if platform.libc_ver()[0] == "glibc" and _TUNABLES not in os.environ:
        os.environ[_TUNABLES] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
