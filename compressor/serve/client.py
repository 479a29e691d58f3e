"""A small client over the standard library, for the benchmark and the smoke test."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from compressor.errors import ResourceError, UsageError


@dataclass(frozen=True, slots=True)
class Client:
    """One server's address; safe to share, each request has its own connection."""

    host: str
    port: int
    api_key: str | None = None
    timeout_s: float = 600.0

    @classmethod
    def from_url(cls, url: str, api_key: str | None = None) -> Client:
        """A client of `http://HOST[:PORT]`; UsageError for anything else."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise UsageError(f"{url!r} is not an address like http://127.0.0.1:8000", code="SV33")
        return cls(parts.hostname, parts.port or 80, api_key)

    def get(self, path: str) -> Any:
        """The JSON of a GET."""
        return self._json("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON of a POST; ResourceError for any status but 200."""
        return self._json("POST", path, body)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[tuple[float, dict[str, Any]]]:
        """(arrival in monotonic seconds, event) of each server-sent event."""
        connection = self._request("POST", path, {**body, "stream": True})
        try:
            response = _checked(connection.getresponse())
            for line in response:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    yield time.monotonic(), json.loads(line[6:])
        finally:
            connection.close()

    def _json(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        connection = self._request(method, path, body)
        try:
            return json.loads(_checked(connection.getresponse()).read())
        finally:
            connection.close()

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout_s)
        headers = {"content-type": "application/json"}
        if self.api_key:
            headers["authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, headers)
        except OSError as error:
            connection.close()
            place = f"{self.host}:{self.port}"
            raise ResourceError(f"no server answers at {place}: {error}", code="SV33") from None
        return connection


def _checked(response: http.client.HTTPResponse) -> http.client.HTTPResponse:
    if response.status != 200:
        text = response.read(500).decode(errors="replace")
        raise ResourceError(f"the server answers {response.status}: {text}", code="SV20")
    return response
