"""`compress serve DIR`: load, check, listen, drain.

Everything that can be wrong is found before the socket listens: options, a busy port, the folder,
the model. SIGTERM and SIGINT drain: `/readyz` and new requests answer 503 at once, running ones may
end within `drain_timeout_s`, then they are cut, and the process ends with status 0. A second signal
cuts at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from compressor.errors import ResourceError, UnsupportedError
from compressor.serve.api import create_app
from compressor.serve.engine import LLMEngine
from compressor.serve.limits import MAX_HEADER_BYTES
from compressor.serve.options import ServeOptions
from compressor.serve.serving import Serving

_HEADER_TIMEOUT_S = 10.0
logger = logging.getLogger(__name__)


def serve(
    path: Path, options: ServeOptions, *, on_ready: Callable[[int], object] | None = None
) -> None:
    """Load the folder and answer requests until a signal ends it.

    Args:
        path: a model or an artifact.
        options: see there.
        on_ready: called with the port once requests are taken.

    Raises UsageError, CheckpointError, ResourceError or UnsupportedError before listening.
    """
    listener = bind(options.host, options.port)
    try:
        named = options.served_model_name or Path(path).resolve().name
        options = dataclasses.replace(options, served_model_name=named)
        serve_engine(open_engine(Path(path), options), options, listener, on_ready=on_ready)
    finally:
        listener.close()


def open_engine(path: Path, options: ServeOptions) -> LLMEngine:
    """An engine over the folder's model, packed linears in place."""
    from compressor.modeling.load import load_model
    from compressor.serve import kv_format
    from compressor.serve.integrity import check_digests

    notes = [check_digests(path)] if options.verify else []
    loaded = load_model(
        path,
        device=device_of(options),
        dtype=dtype_of(options),
        cpu_activations=options.cpu_activations,
    )
    if loaded.tokenizer is None:
        raise UnsupportedError(f"{path} has no tokenizer", code="SV33")
    options = kv_format.resolve(options, loaded.checkpoint.config)
    notes += kv_format.notes(options, loaded.checkpoint.tensors)
    engine = LLMEngine(loaded.model, loaded.tokenizer, options)
    for note in [*notes, *loaded.notes, *engine.notes]:
        logger.info("%s", note)
    return engine


def device_of(options: ServeOptions) -> str:
    """The device's name; "auto" is the first GPU, else the CPU."""
    import torch

    if options.device != "auto":
        return options.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_of(options: ServeOptions) -> Any:
    """The torch dtype; "auto" is None, the loader's choice."""
    import torch

    return None if options.dtype == "auto" else getattr(torch, options.dtype)


def serve_engine(
    engine: LLMEngine,
    options: ServeOptions,
    listener: socket.socket,
    *,
    on_ready: Callable[[int], object] | None = None,
) -> None:
    """Answer requests on a bound socket until a signal ends it."""
    app = create_app(engine, options)
    serving: Serving = app.state.serving
    serving.worker.start()
    try:
        DrainingServer(server_config(app), serving, on_ready).run(sockets=[listener])
    finally:
        serving.worker.stop()
        serving.texts.close()


@contextlib.contextmanager
def background_server(engine: LLMEngine, options: ServeOptions) -> Iterator[int]:
    """A server in a thread of this process, for checks; yields its port."""
    app = create_app(engine, options)
    serving: Serving = app.state.serving
    serving.worker.start()
    listener = bind("127.0.0.1", 0)
    server = DrainingServer(server_config(app), serving)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        yield int(listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
        serving.worker.stop()
        serving.texts.close()


def bind(host: str, port: int) -> socket.socket:
    """A socket on this address, not listening yet; ResourceError (SV33) when it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ResourceError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            code="SV33",
            why="another program may use the port, or the address is not this machine's.",
            fix="choose another --port (0 takes a free one).",
        ) from None
    return listener


def server_config(app: Any) -> uvicorn.Config:
    """Uvicorn's settings: one process, h11, bounded headers, quiet."""
    return uvicorn.Config(
        app,
        http=TimedH11Protocol,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
    )


class DrainingServer(uvicorn.Server):
    """Uvicorn with a shutdown that lets running requests end."""

    def __init__(
        self,
        config: uvicorn.Config,
        serving: Serving,
        on_ready: Callable[[int], object] | None = None,
    ) -> None:
        super().__init__(config)
        self._serving = serving
        self._on_ready = on_ready
        self._deadline: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_ready is not None and self.started and sockets:
            self._on_ready(int(sockets[0].getsockname()[1]))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: stop."""
        now = time.monotonic()
        first = self._deadline is None
        self._deadline = now + self._serving.options.drain_timeout_s if first else now
        self._serving.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self._deadline is not None:
            late = time.monotonic() >= self._deadline
            if late:
                self._serving.worker.cancel_all()
                await asyncio.sleep(0.2)
            if late or not self._serving.worker.num_unfinished:
                self.should_exit = True
        return bool(await super().on_tick(counter))


class TimedH11Protocol(H11Protocol):
    """h11 with a limit on the time a client may take to send its headers."""

    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def _watch_headers(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_watching()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(_HEADER_TIMEOUT_S, self._close_if_idle)

    def _close_if_idle(self) -> None:
        self._header_timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()

    def _stop_watching(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
