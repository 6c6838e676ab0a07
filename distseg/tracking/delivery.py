"""Calls to a server that may be slow, dead or hostile, off the thread that trains."""

import threading
from collections.abc import Callable
from queue import SimpleQueue

LONGEST_PAUSE = 60.0
"""Seconds between two tries of a call, at most; the first pause is one second, and each is twice the one before."""
QUEUE = 256
"""Calls that may wait. They hold arrays and paths, so their number is bounded."""


class Delivery:
    """Makes calls one after the other in a thread of its own.

    `failed(error)` is called in that thread for each call that raises; if it returns True, no more calls are made. A
    call that hangs holds up the ones behind it and nothing else: `close` waits for a given time and no longer.
    """

    def __init__(self, failed: Callable[[Exception], bool]) -> None:
        self._failed = failed
        self._calls: SimpleQueue[tuple[Callable[[], None], bool] | None] = SimpleQueue()
        self._closing = threading.Event()
        self._complete = False
        # A daemon: a call that never returns must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="distseg-tracking", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], None], until_it_succeeds: bool = False) -> bool:
        """Have `call` made, after those before it. False where it will not be: too many wait, or no more are made."""
        if self._calls.qsize() >= QUEUE or not self._thread.is_alive():
            return False
        self._calls.put((call, until_it_succeeds))
        return True

    def close(self, last: Callable[[], None], seconds: float) -> bool:
        """Make `last` the last call, and wait for all of them, at most `seconds`. Whether all that waited were made.

        A call that was to be tried until it succeeds is tried once from now on; if it fails, the rest is left undone.
        """
        self._calls.put((last, True))
        self._calls.put(None)
        self._closing.set()
        self._thread.join(max(0.0, seconds))
        return self._complete

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            if not self._make(*item):
                return
        self._complete = True

    def _make(self, call: Callable[[], None], until_it_succeeds: bool) -> bool:
        """False where no more calls are to be made."""
        pause = 1.0
        while True:
            closing = self._closing.is_set()
            try:
                call()
                return True
            except Exception as error:
                if self._failed(error):
                    return False
            if not until_it_succeeds:
                return True
            if closing:
                return False
            self._closing.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
