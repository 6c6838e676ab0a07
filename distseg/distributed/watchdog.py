"""Ranks stop together: at the same step when one is asked to, and within seconds when one has gone."""

import logging
import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from distseg.distributed.ranks import ShardSpec

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
GRACE = 5.0
"""Seconds that a rank has to end by itself once another has gone; it may be held in a collective of a GPU."""
_FAREWELL = -1
"""Sent on leaving: this, or rank · 256 + exit code of the rank that failed."""
_FOREVER = timedelta(days=365)


class Watchdog:
    """Watches the other ranks, and turns SIGTERM and SIGUSR1 into a request to stop, from its making to `close`.

    Rank 0 holds a gloo connection to every other rank, on which nothing is sent until one leaves. The kernel closes it
    when a process dies, however it dies; rank 0 says which in one line and tells the others, and all of them end. The
    backend that trains may not notice: NCCL waits for a dead rank until its time-out.
    """

    def __init__(self, shard: ShardSpec) -> None:
        """Every rank makes one at the same point; needs the process group."""
        self._shard = shard
        self._asked = False
        self._launcher_gone = _launcher_watch()
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self.exit_code = 1
        """Of the rank that failed, once `other_rank_ended`; 1 where it could not say."""
        self._watchers: list[threading.Thread] = []
        for number in SIGNALS:
            signal.signal(number, self._ask)
        if shard.world_size > 1:
            # Two groups, because the watchers' receives are open for as long as the run.
            self._agreement = dist.new_group(backend="gloo")
            self._watch = dist.new_group(backend="gloo", timeout=_FOREVER)
            peers = range(1, shard.world_size) if shard.rank == 0 else [0]
            for peer in peers:
                self._watchers.append(threading.Thread(target=self._attend, args=(peer,), daemon=True))
                self._watchers[-1].start()

    def stop_agreed(self) -> bool:
        """Whether to stop now; every rank calls it once a step, and all get the same answer at the same step.

        A signal to one rank, or the end of its launcher, stops all. The answer is a step old, so that no rank waits for
        the others here, and it travels between hosts, so that no GPU is waited for either.
        """
        asked = self._asked or self._launcher_gone()
        if self._shard.world_size == 1:
            return asked
        agreed = False
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            agreed = bool(flag)
        flag = torch.tensor(int(asked), dtype=torch.int32)
        self._pending = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._agreement, async_op=True), flag
        return agreed

    def other_rank_ended(self) -> bool:
        """Whether another rank's end explains an exception here. Waits a little: the exception may come first."""
        return self._shard.world_size > 1 and self._ended.wait(2.0)

    def close(self, exit_code: int) -> None:
        """Stop watching. With 0, wait until every rank has got here; else tell the others to end with this code."""
        failed = exit_code != 0
        if self._pending is not None and not failed:
            self._pending[0].wait()
        if self._shard.world_size == 1 or self._ended.is_set():
            return
        for peer in range(1, self._shard.world_size) if self._shard.rank == 0 else [0]:
            self._tell(peer, 256 * self._shard.rank + exit_code if failed else _FAREWELL)
        if not failed:
            for watcher in self._watchers:
                watcher.join()

    def _ask(self, *_: object) -> None:
        self._asked = True

    def _attend(self, peer: int) -> None:
        word = torch.zeros(1, dtype=torch.int64)
        try:
            dist.recv(word, src=peer, group=self._watch)
        except RuntimeError:
            self._end(peer, 1, gone=True)
            return
        if word.item() != _FAREWELL:
            self._end(*divmod(int(word), 256), gone=False)

    def _end(self, culprit: int, exit_code: int, gone: bool) -> None:
        with self._lock:
            if self._ended.is_set():
                return
            self.exit_code = exit_code
            self._ended.set()
        if self._shard.rank == 0:
            for peer in range(1, self._shard.world_size):
                if peer != culprit:
                    self._tell(peer, 256 * culprit + exit_code)
        if gone and self._shard.rank == (0 if culprit else 1):
            logger.error("rank %d has gone: killed, or its machine is lost; the run ends", culprit)
        # Time for the main thread to fail by itself and to leave the tracker in order.
        threading.Event().wait(GRACE)
        os._exit(exit_code)

    def _tell(self, peer: int, word: int) -> None:
        try:
            dist.send(torch.tensor([word]), dst=peer, group=self._watch)
        except RuntimeError:
            return  # it has gone, too


def _launcher_watch() -> Callable[[], bool]:
    """A question to be asked at every step: has the launcher that waits for our exit code gone?

    `deepspeed` is two processes, of which a signal to the one that the shell knows reaches neither the other nor the
    ranks: they would train on, unseen.
    """
    launcher = os.getppid()
    try:
        ours = b"deepspeed.launcher.launch" in Path(f"/proc/{launcher}/cmdline").read_bytes()
    except OSError:
        ours = False
    if not ours:
        return lambda: False
    runner = _parent_of(launcher)
    return lambda: os.getppid() != launcher or _parent_of(launcher) != runner


def _parent_of(process: int) -> int | None:
    try:
        # The name, in parentheses, may hold anything; after it come the state and the parent.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
