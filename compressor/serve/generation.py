"""From the engine's thread to the event loop: the sequences of one HTTP request as one stream.

Leaving the `async for` in any way (answer complete, client gone, task cancelled) cancels what still
runs, so blocks are free after at most one more step. A reader who does not read gets cut off at
`buffer` unread pieces; nobody else waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial

from compressor.serve.protocol import ApiError
from compressor.serve.sequence import Delta
from compressor.serve.worker import EngineThread, Job

_CUT = {
    "abort": ApiError(503, "the server ended this request", code="aborted"),
    "slow": ApiError(503, "the client does not read its stream", code="slow_reader"),
}


class Generation:
    """Runs jobs and yields (index of the job, delta) until all have ended."""

    def __init__(self, worker: EngineThread, jobs: list[Job], *, buffer: int | None = None) -> None:
        self._worker = worker
        self._jobs = jobs
        self._buffer = buffer
        self._open = {job.request_id for job in jobs}
        self._queue: asyncio.Queue[tuple[int, Delta | ApiError]] = asyncio.Queue()

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        loop = asyncio.get_running_loop()
        try:
            for index, job in enumerate(self._jobs):
                self._worker.submit(job, partial(self._receive, loop, index))
            while self._open:
                index, delta = await self._queue.get()
                if isinstance(delta, ApiError):
                    raise delta
                if delta.finish_reason is not None:
                    self._open.discard(delta.request_id)
                    self._raise_failure(delta)
                yield index, delta
        finally:
            if self._open:
                self._worker.cancel(self._open)

    def _receive(self, loop: asyncio.AbstractEventLoop, index: int, delta: Delta) -> None:
        """Called in the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens any more
            loop.call_soon_threadsafe(self._put, index, delta)

    def _put(self, index: int, delta: Delta) -> None:
        if self._buffer is not None and self._queue.qsize() >= self._buffer:
            self._worker.cancel(self._open)
            self._queue = asyncio.Queue()
            self._buffer = None
            self._queue.put_nowait((index, _CUT["slow"]))
        else:
            self._queue.put_nowait((index, delta))

    def _raise_failure(self, delta: Delta) -> None:
        if delta.finish_reason == "error":
            message = f"request {delta.request_id} failed: {delta.error}"
            raise ApiError(500, message, code="generation_failed")
        if delta.finish_reason == "abort":
            raise _CUT["abort"]
