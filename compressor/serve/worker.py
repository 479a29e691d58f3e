"""The thread that owns the engine: commands in through a queue, deltas out through callbacks.

Everything that touches the engine runs in this thread, between two steps. Its loop leaves a
heartbeat, which is what `/health` looks at: a server whose loop hangs is not healthy, however well
its sockets answer.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from compressor.serve.engine import LLMEngine
from compressor.serve.sequence import Delta, SamplingParams

_IDLE_WAIT_S = 0.5
logger = logging.getLogger(__name__)
Sink = Callable[[Delta], None]


class Observer(Protocol):
    """Who wants to know about requests (metrics)."""

    def arrived(self, request_id: str, num_prompt_tokens: int) -> None: ...

    def produced(self, delta: Delta) -> None: ...


@dataclass(frozen=True, slots=True)
class Job:
    """One sequence to generate."""

    request_id: str
    prompt: Sequence[int]
    params: SamplingParams


class EngineThread:
    """Runs an engine until `stop`; every method may be called from any thread."""

    def __init__(self, engine: LLMEngine, observer: Observer | None = None) -> None:
        self.engine = engine
        self.observer = observer
        self._inbox: queue.SimpleQueue[Callable[[], list[Delta]] | None] = queue.SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._stopping = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the loop after the step under way, and give the model back."""
        self._stopping = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()
        self.engine.close()

    @property
    def num_unfinished(self) -> int:
        """Sequences submitted and not finished."""
        return len(self._sinks)

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the loop last turned; endless once the thread is gone."""
        return time.monotonic() - self._beat if self._thread.is_alive() else float("inf")

    def submit(self, job: Job, sink: Sink) -> None:
        """Queue a sequence; `sink` is called in the engine's thread with each of its deltas."""
        self._sinks[job.request_id] = sink
        if self.observer is not None:
            self.observer.arrived(job.request_id, len(job.prompt))
        self._inbox.put(lambda: self._add(job))

    def cancel(self, request_ids: Collection[str]) -> None:
        """Drop these sequences after the step under way; unknown ids are ignored."""
        self._inbox.put(lambda: self.engine.abort(request_ids))

    def cancel_all(self) -> None:
        self.cancel(list(self._sinks))

    def _add(self, job: Job) -> list[Delta]:
        try:
            self.engine.add_request(job.request_id, job.prompt, job.params)
        except Exception as error:
            return [Delta(job.request_id, finish_reason="error", error=str(error))]
        return []

    def _loop(self) -> None:
        while not self._stopping:
            self._beat = time.monotonic()
            self._deliver(self._commands())
            try:
                self._deliver(self.engine.step())
            except Exception:
                logger.exception("the engine's step failed; its requests are dropped")
                self.engine.consecutive_failures += 1
                self._deliver(self.engine.abort(list(self._sinks)))

    def _commands(self) -> list[Delta]:
        deltas: list[Delta] = []
        wait = not self.engine.has_work
        while True:
            try:
                command = self._inbox.get(block=wait, timeout=_IDLE_WAIT_S if wait else None)
            except queue.Empty:
                return deltas
            wait = False
            if command is not None:
                deltas += command()

    def _deliver(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            if self.observer is not None:
                self.observer.produced(delta)
            last = delta.finish_reason is not None
            sink = (
                self._sinks.pop(delta.request_id, None)
                if last
                else self._sinks.get(delta.request_id)
            )
            if sink is not None:
                sink(delta)
