"""The gate before any parsing (ASGI middleware): key, size and pace of the body, request ids."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from compressor.serve.options import ServeOptions
from compressor.serve.protocol import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/livez", "/readyz"})
MAX_HEADERS = 200
MAX_HEADER_BYTES = 64 * 1024
_BODIES_HELD = 32  # full-size bodies in memory at once
_CLOSE = {"connection": "close"}
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class Limits:
    """Wraps an application; every refusal is an OpenAI-shaped error.

    Attributes:
        app: what comes behind the gate.
        options: key, cap and timeout.
    """

    def __init__(self, app: App, options: ServeOptions) -> None:
        self.app = app
        self.options = options
        self._bytes_held = 0
        self._key_digest = hashlib.sha256(b"Bearer " + (options.api_key or "").encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            _check_headers(scope)
            self._check_key(scope)
            self._check_length(scope)
        except ApiError as error:
            return await error_response(error)(scope, receive, send_with_id)
        body = _Body(receive, self)
        try:
            await self.app(scope, body.receive, send_with_id)
        finally:
            self._bytes_held -= body.size

    def _check_key(self, scope: Scope) -> None:
        if self.options.api_key is None or scope["path"] in OPEN_PATHS:
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        digest = hashlib.sha256(given[0] if len(given) == 1 else b"").digest()
        if not hmac.compare_digest(digest, self._key_digest):
            raise ApiError(
                401,
                "a valid API key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def _check_length(self, scope: Scope) -> None:
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        if any(not v.isdigit() or int(v[:20]) > self.options.max_body_bytes for v in lengths):
            raise self._too_large()

    def _too_large(self) -> ApiError:
        cap = self.options.max_body_bytes
        return ApiError(413, f"the body is larger than {cap} bytes", headers=_CLOSE)

    def hold(self, size: int, total: int) -> None:
        """Count `size` more bytes of a body of `total` so far; ApiError 413 or 429 at the caps."""
        self._bytes_held += size
        if total > self.options.max_body_bytes:
            raise self._too_large()
        if self._bytes_held > _BODIES_HELD * self.options.max_body_bytes:
            headers = _CLOSE | {"retry-after": "1"}
            raise ApiError(429, "too many large requests, try again", headers=headers)


class _Body:
    """`receive` of one request, which counts its bytes and the time they take."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive = receive
        self._limits = limits
        self._deadline = asyncio.get_running_loop().time() + limits.options.body_timeout_s
        self._complete = False
        self.size = 0

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", headers=_CLOSE) from None
        size = len(message.get("body", b""))
        self.size += size
        self._complete = not message.get("more_body", False)
        self._limits.hold(size, self.size)
        return message


def _check_headers(scope: Scope) -> None:
    size = sum(len(name) + len(value) for name, value in scope["headers"])
    if len(scope["headers"]) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        raise ApiError(431, "too many or too large headers", headers={"connection": "close"})


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value.decode("ascii"))
    return uuid.uuid4().hex


def error_response(error: ApiError) -> JSONResponse:
    """The error as a response."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)
