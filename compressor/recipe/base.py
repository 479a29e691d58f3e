"""What every part of a recipe shares: strictness, immutability and a memory of its place."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, PrivateAttr

from compressor.errors import Where


class Part(BaseModel):
    """A strict, frozen piece of a recipe that can say which file and line each key came from."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True
    )

    _file: str = PrivateAttr(default="")
    _prefix: str = PrivateAttr(default="")
    _lines: dict[str, int] = PrivateAttr(default_factory=dict)

    def where(self, key: str = "") -> Where:
        """File, line and full key of `key` (dotted, relative to this part), for an error message.

        A key that the file does not set points at the nearest part around it that the file has.
        """
        path = ".".join(p for p in (self._prefix, key) if p)
        return Where(file=self._file, line=self._nearest_line(path), key=path)

    def _nearest_line(self, path: str) -> int | None:
        while path:
            if path in self._lines:
                return self._lines[path]
            path = path.rpartition(".")[0]
        return None

    def attach(self, file: str, lines: dict[str, int], prefix: str = "") -> None:
        """Tell this part and everything below it where it stands in the file."""
        self._file, self._prefix, self._lines = file, prefix, lines
        for name in type(self).model_fields:
            value = getattr(self, name)
            items = enumerate(value) if isinstance(value, list) else [("", value)]
            for index, item in items:
                if isinstance(item, Part):
                    parts = [str(p) for p in (prefix, name, index) if p != ""]
                    item.attach(file, lines, ".".join(parts))
