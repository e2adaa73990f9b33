"""Lease: the right to work on something, held by one process at a time and lost when that process dies.

A lease is a small file made exclusively. Its owner moves a counter in it from a thread. Whoever wants the
lease and finds it taken watches the counter: if it has not moved for `ttl` seconds of the watcher's own
monotonic clock, the owner is gone, and the watcher takes over. No two clocks are ever compared and no file
time is read, so a clock that jumps changes nothing. An owner on this machine whose process no longer exists
is replaced at once.

Whoever removes a lease's file holds a lock on that very file meanwhile and has checked it under the lock, so
that of several who see a stale lease one replaces it, and none touches the new one. The owner writes its
counter through the file it has open: an owner that was only asleep writes into a file that has left, never
over its successor's.

Pitfall: a process that is stopped for longer than `ttl` (a suspended laptop) may lose its lease while it
believes to hold it. `held` says whether it still does; results are written once and by fingerprint, so that
work done twice is no harm.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path

from torchstone.storage.atomic import naming

_BYTES = 512  # content is padded, so that a heartbeat changes bytes in place

_seen: dict[Path, tuple[bytes, float]] = {}
"""What this process last saw in a lease of others, and when it first saw it, in its monotonic seconds."""


class Lease:
    """A lease on a path.

    Args:
        path: the lease's file; its folder must exist.
        ttl: seconds without a heartbeat after which others take over.
    """

    def __init__(self, path: str | Path, ttl: float = 30.0) -> None:
        self.path = Path(path)
        self.ttl = ttl
        self.owner = f"{_machine()}:{os.getpid()}:{secrets.token_hex(8)}"
        self._count = 0
        self._descriptor: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> bool:
        """Try to take the lease, without waiting for it; True if this object now holds it."""
        if self._descriptor is not None:
            raise AssertionError("acquire() on a lease that is held; release it first")
        if not self._create() and not self._take_over():
            return False
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, daemon=True, name=f"lease {self.path.name}")
        self._thread.start()
        return True

    @property
    def held(self) -> bool:
        """True if the file at the path is still the one that this object made."""
        return self._descriptor is not None and _is_file(self.path, self._descriptor)

    def release(self) -> None:
        """Give the lease back; nothing happens to it if another has taken it over."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._descriptor is not None:
            if _lock(self._descriptor, wait=True) and self.held:
                self.path.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    def _create(self) -> bool:
        """Make the lease's file; False if there is one."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        self._descriptor = descriptor
        try:
            with naming(self.path):
                self._write()
        except OSError:
            self.release()
            raise
        return True

    def _write(self) -> None:
        assert self._descriptor is not None
        content = json.dumps({"owner": self.owner, "count": self._count})
        os.pwrite(self._descriptor, content.ljust(_BYTES - 1).encode() + b"\n", 0)

    def _beat(self) -> None:
        while not self._stop.wait(self.ttl / 4) and self.held:
            self._count += 1
            with contextlib.suppress(OSError):  # a full disk may cost the lease, not the work
                self._write()

    def _take_over(self) -> bool:
        """Replace a stale lease by ours; False if it lives or another was faster."""
        stale = self._stale_content()
        if stale is None:
            return False
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return self._create()
        try:
            # only who has the file locked may remove it: what is checked here stays true until it is gone
            locked = _lock(descriptor, wait=False)
            if not locked or not _is_file(self.path, descriptor) or os.pread(descriptor, _BYTES, 0) != stale:
                return False
            self.path.unlink()
            _seen.pop(self.path, None)
            return self._create()
        finally:
            os.close(descriptor)

    def _stale_content(self) -> bytes | None:
        """The lease's content if its owner is gone, else None."""
        try:
            content = self.path.read_bytes()[:_BYTES]
        except FileNotFoundError:
            return None
        if _dead(content):
            return content
        known, since = _seen.get(self.path, (None, 0.0))
        now = time.monotonic()
        if content != known:
            _seen[self.path] = (content, now)
            return None
        return content if now - since >= self.ttl else None


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Lock an open file against others who take over or release; False if one is at it and we do not wait."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _is_file(path: Path, descriptor: int) -> bool:
    try:
        there, ours = os.stat(path), os.fstat(descriptor)
    except OSError:
        return False
    return os.path.samestat(there, ours)


def _machine() -> str:
    """This host and its process numbering: containers may share a host's name and not its processes."""
    try:
        numbering = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbering = ""
    return f"{socket.gethostname()}/{numbering}".replace(":", "")


def _dead(content: bytes) -> bool:
    """True if the owner was a process of this machine that no longer exists."""
    try:
        owner = json.loads(content)["owner"]
        machine, pid, _ = owner.split(":")
        if machine != _machine():
            return False
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return False
    return False
