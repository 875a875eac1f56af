"""Processes that compute, in milliseconds instead of seconds: one process imports all that they need and does nothing
else, and each of them is a fork of it, which shares that memory for as long as nobody writes to it.

    server ---- starts ----> nursery: import ........ | fork, fork ... |   ends when the server does
       '---- our end, KV memory ---> fork -> Child: Look, Load, Step ...   a child of the server: it hears how it ended

Needs a system that hands orphans to an ancestor of one's choice, which is Linux; elsewhere each process starts anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from headrace.core.types import HeadraceError

_ADOPT = 36  # PR_SET_CHILD_SUBREAPER, linux/prctl.h
_PID = struct.Struct("<I")
_BORN_S = 120.0  # importing from a slow disk takes long


class Adopted:
    """A process that somebody else has started for us, as far as `subprocess.Popen` is needed."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._status: int | None = None
        self._handle = os.pidfd_open(pid)
        self._lock = threading.Lock()

    def kill(self) -> None:
        with self._lock:
            if self._status is None:
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, negative for a signal. Raises subprocess.TimeoutExpired."""
        with self._lock:
            if self._status is None:
                if not select.select([self._handle], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(["nursery"], timeout or 0.0)
                self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
                os.close(self._handle)
        return self._status


class Nursery:
    """Started when the first process is asked for, and again if it has ended. Any thread may ask."""

    def __init__(self, command: tuple[str, ...]) -> None:
        """`command` calls `nurse`; the number of a socket is appended."""
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._end: socket.socket | None = None
        self._lock = threading.Lock()

    def child(self, theirs: socket.socket, kv_fd: int | None) -> Adopted:
        """A process that has these two. Raises HeadraceError."""
        with self._lock:
            for _ in range(2):  # it may have ended since the last time
                with contextlib.suppress(OSError):
                    return self._born([theirs.fileno()] + ([] if kv_fd is None else [kv_fd]))
                self._stop()
        raise HeadraceError("the process that starts those that compute ended; the lines above may say why")

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _born(self, fds: list[int]) -> Adopted:
        if self._end is None:
            self._start()
        assert self._end is not None
        socket.send_fds(self._end, [b"+"], fds)
        answer = self._end.recv(_PID.size, socket.MSG_WAITALL)
        if len(answer) < _PID.size:
            raise ConnectionResetError
        return Adopted(_PID.unpack(answer)[0])

    def _start(self) -> None:
        ctypes.CDLL(None).prctl(_ADOPT, 1, 0, 0, 0)
        self._end, theirs = socket.socketpair()
        self._end.settimeout(_BORN_S)
        with theirs:
            self._process = subprocess.Popen(
                [*self._command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,
            )

    def _stop(self) -> None:
        if self._end is not None:
            self._end.close()
            self._end = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def possible() -> bool:
    return sys.platform == "linux" and hasattr(os, "pidfd_open")


def nurse(end: socket.socket, work: Callable[[socket.socket, int | None], int]) -> int:
    """Fork for one parent until it goes; each fork does the `work` with its socket and its memory for KV, and returns
    with its status. Nobody may have started a thread."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # a collection would write to every object, and then nothing would be shared
    with contextlib.suppress(OSError):
        while True:
            said, fds, _, _ = socket.recv_fds(end, 1, 2)
            if not said:
                break
            end.sendall(_PID.pack(_fork(end, fds, work)))
            for fd in fds:
                os.close(fd)
    return 0


def _fork(end: socket.socket, fds: list[int], work: Callable[[socket.socket, int | None], int]) -> int:
    """The number of a process whose parent is gone when this returns, so that it belongs to ours."""
    read, write = os.pipe()
    middle = os.fork()
    if not middle:
        pid = os.fork()
        if pid:
            os.write(write, _PID.pack(pid))
            os._exit(0)
        os.close(read)
        os.close(write)
        end.close()
        _work(fds, work)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        pid = _PID.unpack(pipe.read(_PID.size))[0]
    os.waitpid(middle, 0)
    return int(pid)


def _work(fds: list[int], work: Callable[[socket.socket, int | None], int]) -> NoReturn:
    """In the fork, which ends here."""
    status = 1
    try:
        os.setpgid(0, 0)
        status = work(socket.socket(fileno=fds[0]), fds[1] if len(fds) > 1 else None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
