"""What the routes of one server share, and whether it takes more work."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from compressor.errors import UsageError
from compressor.serve.engine import LLMEngine
from compressor.serve.metrics import Metrics
from compressor.serve.options import ServeOptions
from compressor.serve.protocol import ApiError
from compressor.serve.texts import Texts
from compressor.serve.worker import EngineThread

_MAX_FAILURES = 3


@dataclass(slots=True)
class Serving:
    """One engine behind HTTP."""

    worker: EngineThread
    metrics: Metrics
    texts: Texts
    options: ServeOptions
    model_name: str
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False

    @classmethod
    def open(cls, engine: LLMEngine, options: ServeOptions) -> Serving:
        """State around an engine; UsageError when it has no tokenizer."""
        if engine.tokenizer is None:
            raise UsageError("the server needs a tokenizer", code="SV33")
        name = options.served_model_name or "model"
        metrics = Metrics(engine, name)
        texts = Texts(engine.tokenizer, engine.max_model_len)
        return cls(EngineThread(engine, metrics), metrics, texts, options, name)

    @property
    def engine(self) -> LLMEngine:
        return self.worker.engine

    @property
    def unready_because(self) -> str:
        """Why new work should go elsewhere; "" when it should not."""
        if self.draining:
            return "draining"
        if self.engine.consecutive_failures >= _MAX_FAILURES:
            return f"{self.engine.consecutive_failures} steps failed in a row"
        return self.unhealthy_because

    @property
    def unhealthy_because(self) -> str:
        """Why the process should be restarted; "" when it should not."""
        age = self.worker.heartbeat_age_s
        if age > self.options.stall_timeout_s:
            return f"the engine's loop has not turned for {age:.0f} s"
        return ""

    def check_model(self, name: str | None) -> None:
        """ApiError 404 for a model this server does not have."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def check_capacity(self, count: int = 1) -> None:
        """Refuse work while draining (503), above the queue's limit (429), or for ever (400)."""
        if self.draining:
            self.metrics.rejected.labels("draining").inc()
            headers = {"retry-after": "5", "connection": "close"}
            raise ApiError(503, "the server is shutting down", headers=headers)
        room = self.options.max_num_seqs + self.options.max_queue
        if count > room:
            raise ApiError(400, f"{count} sequences asked for, this server holds {room}")
        if self.worker.num_unfinished + count > room:
            self.metrics.rejected.labels("queue_full").inc()
            headers = {"retry-after": "1"}
            raise ApiError(429, "the queue is full, try again", code="queue_full", headers=headers)
