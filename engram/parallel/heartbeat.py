"""Who of a job's processes is lost: torch says that a collective failed or took too long, not whose fault that is.

Each process tells the others, in the store in which they met, that it lives and at which step; a thread does so about
once a second, beside training. Of processes on the same machine the kernel tells at once when they end.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

_LEFT = "left"


class Peer(NamedTuple):
    """A process of the job; `handle` is the kernel's for one on this machine."""

    rank: int
    host: str
    pid: int
    handle: int | None

    @property
    def has_ended(self) -> bool:
        """Whether the kernel knows that it ended, however it did."""
        return self.handle is not None and bool(_ended([self.handle], 0.0))

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


class Heartbeat:
    """Tells the others that this process lives, and finds out who does not. Every process of a job makes one.

    Args:
        rank, n: of this process, and how many there are.
        store: that the process group was made with. Its keeper counts as rank 0.
        silence_s: seconds after which a process that says nothing is lost.
        step: the step that this process is at.
        lost: called, in a thread, with a sentence on who is lost.
    """

    def __init__(
        self,
        rank: int,
        n: int,
        store: dist.Store,
        silence_s: float,
        step: Callable[[], int],
        lost: Callable[[str], None],
    ) -> None:
        self.rank, self._silence_s, self._step, self._tell = rank, silence_s, step, lost
        self._seconds = min(max(1.0, n / 64), silence_s / 4)  # each reads what all say: with many, more rarely
        self._store = dist.PrefixStore("heartbeat", store.clone())  # type: ignore[attr-defined] # a connection that may hang
        self._store.set(f"who-{rank}", json.dumps([*_machine(), os.getpid()]))
        others = [r for r in range(n) if r != rank]
        whos = self._store.multi_get([f"who-{r}" for r in others])  # which waits for them
        self._peers = [_peer(r, *json.loads(who)) for r, who in zip(others, whos, strict=True)]
        now = time.monotonic()
        self._said = dict.fromkeys(others, ("", now))
        self._answered = now  # the store, a question of this time
        self._hurry, self._left, self._over = threading.Event(), threading.Event(), threading.Event()
        self._store.set_timeout(timedelta(seconds=2 * self._seconds))
        # Two threads: the one that talks waits for good where the store's keeper hangs.
        self._talking = threading.Thread(target=self._talk, name="heartbeat", daemon=True)
        self._talking.start()
        threading.Thread(target=self._watch, name="heartbeat-watch", daemon=True).start()

    def leave(self, patience_s: float) -> None:
        """Say that this process ends by its own will, before it does. Rank 0, with whom the store may end, waits for
        the others to say the same, so long at most."""
        self._left.set()
        self._refresh()
        until = time.monotonic() + patience_s
        while self.rank == 0 and time.monotonic() < until:
            if all(self._said[peer.rank][0] == _LEFT or peer.has_ended for peer in self._peers):
                break
            time.sleep(self._seconds / 20)
        # Not left to the interpreter's end: it aborts the process if a thread is in torch's store then.
        self._over.set()
        self._hurry.set()
        self._talking.join(2 * self._seconds)

    def explain(self) -> str:
        """Why a collective may have failed, in one sentence: who is lost, or where all are. Takes a few seconds."""
        until = time.monotonic() + 5 * self._seconds
        while time.monotonic() < until:
            if found := self._lost(3 * self._seconds):
                return found
            time.sleep(self._seconds / 10)
        gone = [f"{peer} has left{self._at(peer)}" for peer in self._peers if self._said[peer.rank][0] == _LEFT]
        if gone:
            return f"{', '.join(gone)}; it may have said why"
        steps = ", ".join(f"{peer}{self._at(peer)}" for peer in self._peers)
        return f"all processes live, but a collective failed here, rank {self.rank} at step {self._step()}; {steps}"

    def kill_lost(self) -> None:
        """Kill those on this machine that say nothing: else one that was only stopped might go on some day."""
        for peer in self._peers:
            if peer.handle is not None and self._is_silent(peer, 3 * self._seconds):
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(peer.handle, signal.SIGKILL)

    def _talk(self) -> None:
        """Tell and listen, until it is over."""
        beats = 0
        while not self._over.is_set():
            began, beats = time.monotonic(), beats + 1
            with suppress(RuntimeError):  # the store does not answer: `_answered` tells
                self._store.set(str(self.rank), _LEFT if self._left.is_set() else f"{beats} {self._step()}")
                told = self._store.multi_get([str(peer.rank) for peer in self._peers])
                for peer, said in zip(self._peers, told, strict=True):
                    if said.decode() != self._said[peer.rank][0]:
                        self._said[peer.rank] = said.decode(), time.monotonic()
                self._answered = began
            self._hurry.wait(self._seconds / 20 if self._left.is_set() else self._seconds)
            self._hurry.clear()

    def _refresh(self) -> None:
        """Tell and listen now; waits a moment for the store to answer."""
        asked = time.monotonic()
        self._hurry.set()
        while self._answered < asked and time.monotonic() < asked + self._seconds:
            time.sleep(self._seconds / 100)

    def _watch(self) -> None:
        """Call `lost` when somebody is."""
        handles = [peer.handle for peer in self._peers if peer.handle is not None]
        while not self._left.is_set():
            ended = _ended(handles, self._seconds)
            handles = [handle for handle in handles if handle not in ended]
            found = self._lost(self._silence_s)
            if found and not self._left.is_set():
                self._tell(found)

    def _lost(self, silence_s: float) -> str:
        """Who has ended without leaving, or said nothing for so long; empty if nobody."""
        ended = [peer for peer in self._peers if peer.has_ended and self._said[peer.rank][0] != _LEFT]
        if ended:
            self._refresh()  # it may have said that it leaves
        found = []
        for peer in self._peers:
            said, when = self._said[peer.rank]
            if peer in ended and said != _LEFT:
                found.append(f"{peer} has died{self._at(peer)}")
            elif self._is_silent(peer, silence_s):
                found.append(f"{peer} has not been heard of for {time.monotonic() - when:.0f} s{self._at(peer)}")
        return ", ".join(found)

    def _is_silent(self, peer: Peer, seconds: float) -> bool:
        said, when = self._said[peer.rank]
        now = time.monotonic()
        # Where the store does not answer nobody is heard, but it is the one who keeps it that is lost.
        heard = now - self._answered < 3 * self._seconds
        return said != _LEFT and now - when > seconds and (heard or peer.rank == 0)

    def _at(self, peer: Peer) -> str:
        _, _, step = self._said[peer.rank][0].partition(" ")
        return f", last at step {step}" if step else ""


def _machine() -> tuple[str, str]:
    """The host's name, and in which of its name spaces process ids are counted (containers may share a name)."""
    space = "/proc/self/ns/pid"
    return socket.gethostname(), os.readlink(space) if os.path.exists(space) else ""


def _peer(rank: int, host: str, space: str, pid: int) -> Peer:
    handle = None
    if (host, space) == _machine() and hasattr(os, "pidfd_open"):  # on Linux
        with suppress(OSError):  # it may have ended by now: then nothing more will be heard of it
            handle = os.pidfd_open(pid)
    return Peer(rank, host, pid, handle)


def _ended(handles: list[int], seconds: float) -> list[int]:
    """Those whose process has ended, as soon as one has, or after so long."""
    poll = select.poll()
    for handle in handles:
        poll.register(handle, select.POLLIN)
    return [handle for handle, _ in poll.poll(seconds * 1000)]
