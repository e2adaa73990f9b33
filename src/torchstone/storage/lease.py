"""Lease: the right to work on something, held by one process at a time and lost when that process dies.

A lease is a small file made exclusively. Its owner rewrites a counter in it from a thread. Whoever wants the lease and
finds it taken watches the counter: if it has not moved for `ttl` seconds of the watcher's own monotonic clock, the owner is
gone, and the watcher takes over. No two clocks are ever compared, so a clock that jumps changes nothing.

An owner on this machine whose process no longer exists is taken over at once.

Pitfall: a process that is stopped for longer than `ttl` (a suspended laptop) may lose its lease while it believes to hold
it. `held` says whether it still does; results are written once and by fingerprint, so that a double effort is no harm.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path

_seen: dict[Path, tuple[str, float]] = {}


class Lease:
    """A lease on a path.

    Args:
        path: the lease's file; its folder must exist.
        ttl: seconds without a heartbeat after which others take over.
    """

    def __init__(self, path: str | Path, ttl: float = 30.0) -> None:
        self.path = Path(path)
        self.ttl = ttl
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(8)}"
        self._count = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> bool:
        """Try to take the lease, without waiting; True if this object now holds it."""
        if not self._create() and not (self._stale() and self._take_over()):
            return False
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, daemon=True, name=f"lease {self.path.name}")
        self._thread.start()
        return True

    @property
    def held(self) -> bool:
        """True if the file still names this owner."""
        return self._read()[0] == self.owner

    def release(self) -> None:
        """Give the lease back; nothing happens if another has taken it over."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self.held:
            self.path.unlink(missing_ok=True)

    def _content(self) -> bytes:
        return json.dumps({"owner": self.owner, "count": self._count}).encode()

    def _create(self) -> bool:
        """Make the lease's file with its content in one step; False if it exists."""
        draft = self._draft()
        try:
            os.link(draft, self.path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def _draft(self) -> Path:
        draft = self.path.with_name(f"{self.path.name}.{secrets.token_hex(6)}")
        draft.write_bytes(self._content())
        return draft

    def _read(self) -> tuple[str, str]:
        """Owner and whole content; empty if there is no lease or it cannot be read."""
        try:
            text = self.path.read_text()
            return str(json.loads(text)["owner"]), text
        except (OSError, ValueError, KeyError, TypeError):
            return "", ""

    def _stale(self) -> bool:
        """True if the owner is a dead process of this machine, or the content has not changed for `ttl` seconds."""
        owner, text = self._read()
        if self._dead(owner):
            return True
        known, since = _seen.get(self.path, (None, 0.0))
        now = time.monotonic()
        if text != known:
            _seen[self.path] = (text, now)
            return False
        return now - since >= self.ttl

    def _dead(self, owner: str) -> bool:
        host, _, rest = owner.partition(":")
        pid = rest.partition(":")[0]
        if host != socket.gethostname() or not pid.isdigit():
            return False
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False

    def _take_over(self) -> bool:
        """Remove the stale file and make ours. Of several who try, the rename lets one remove it, the link one make it."""
        owner, text = self._read()
        grave = self.path.with_name(f"{self.path.name}.stale-{secrets.token_hex(6)}")
        try:
            os.rename(self.path, grave)
        except FileNotFoundError:
            return self._create()
        if grave.read_text() != text:  # a living owner came between: put it back unless a third has made one
            try:
                os.link(grave, self.path)
            except FileExistsError:
                pass
            grave.unlink()
            return False
        grave.unlink()
        _seen.pop(self.path, None)
        return self._create()

    def _beat(self) -> None:
        while not self._stop.wait(self.ttl / 4):
            if not self.held:
                return
            self._count += 1
            os.replace(self._draft(), self.path)
