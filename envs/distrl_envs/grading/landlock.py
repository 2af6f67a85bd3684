"""Landlock, by which a Linux process gives up files without any right: standard library only.

Used where there are no namespaces. A process that has shut itself in can neither open what it was
not granted nor trace, and on recent systems not even signal, a process outside.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Sequence

CREATE, ADD_RULE, RESTRICT = 444, 445, 446
"""System calls, the same on every architecture."""
ASK_VERSION = 1
PATH_BENEATH = 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
ALL_FILE_RIGHTS = ((1, (1 << 13) - 1), (2, 1 << 13), (3, TRUNCATE), (5, 1 << 15))
"""Rights over files with the version that brought them."""
TCP, TCP_SINCE = 3, 4
OUTSIDERS, OUTSIDERS_SINCE = 3, 6
"""Abstract sockets and signals of processes outside."""

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def version() -> int:
    """What the system offers, 0 where it has none."""
    return max(0, libc.syscall(CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(ASK_VERSION)))


def ruleset(readable: Sequence[str], writable: Sequence[str], devices: Sequence[str]) -> int:
    """A descriptor of rules: what may be read and run, what may be changed, what is a device.

    Raises:
        OSError: If the system refuses.
    """
    offered = version()
    rights = sum(bits for since, bits in ALL_FILE_RIGHTS if offered >= since)
    attributes = struct.pack("=Q", rights)
    if offered >= TCP_SINCE:
        attributes += struct.pack("=Q", TCP)
    if offered >= OUTSIDERS_SINCE:
        attributes += struct.pack("=Q", OUTSIDERS)
    rules = libc.syscall(CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    if rules < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    for path in readable:
        _grant(rules, path, EXECUTE | READ_FILE | READ_DIR)
    for path in writable:
        _grant(rules, path, rights)
    for path in devices:
        _grant(rules, path, READ_FILE | WRITE_FILE)
    return rules


def restrict(rules: int) -> None:
    """Shuts this process and all it starts in, for good; it must have given up new privileges.

    Raises:
        OSError: If the system refuses.
    """
    if libc.syscall(RESTRICT, ctypes.c_int(rules), ctypes.c_uint(0)) != 0:
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(rules)


def _grant(rules: int, path: str, rights: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_PATH)
        if not os.path.isdir(path):
            rights &= EXECUTE | READ_FILE | WRITE_FILE | TRUNCATE
        try:
            rule = struct.pack("=Qi", rights, descriptor)
            flags = ctypes.c_uint(0)
            libc.syscall(ADD_RULE, ctypes.c_int(rules), ctypes.c_int(PATH_BENEATH), rule, flags)
        finally:
            os.close(descriptor)
