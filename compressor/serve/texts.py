"""Between texts and token ids, away from the event loop: encoding, chat templates, token names.

One thread encodes (tokenizers are not all safe to share), another renders templates with a limit
on the time the caller waits. A text that is too long for the model whatever its tokens are is
refused before it is encoded.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from compressor.serve.protocol import ApiError

_TEMPLATE_TIMEOUT_S = 2.0
_RESERVED = {"conversation", "messages", "tools", "documents", "chat_template", "tokenize",
             "add_generation_prompt", "continue_final_message", "return_dict"}  # fmt: skip


class Texts:
    """The tokenizer behind the API.

    Args:
        tokenizer: of transformers.
        max_tokens: the model's longest context.
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self._encoder = ThreadPoolExecutor(1, "encode")
        self._renderer = ThreadPoolExecutor(2, "render")
        longest = max((len(token) for token in tokenizer.get_vocab()), default=1)
        self._max_characters = max_tokens * max(longest, 1)
        self._names: dict[int, str] = {}

    def close(self) -> None:
        self._encoder.shutdown(wait=False, cancel_futures=True)
        self._renderer.shutdown(wait=False, cancel_futures=True)

    @property
    def has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; ApiError 400 when it cannot fit the model."""
        if len(text) > self._max_characters:
            raise ApiError(400, "the prompt is longer than the model's context", param="prompt")
        loop = asyncio.get_running_loop()
        ids: list[int] = await loop.run_in_executor(
            self._encoder,
            lambda: self.tokenizer.encode(text, add_special_tokens=add_special_tokens),
        )
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of these ids, special tokens shown."""
        if any(not 0 <= i < len(self.tokenizer) for i in ids):
            raise ApiError(400, f"token ids must be in [0, {len(self.tokenizer)})", param="tokens")
        text: str = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def name(self, token: int) -> str:
        """The text of one token."""
        if token not in self._names:
            known = token < len(self.tokenizer)
            self._names[token] = self.tokenizer.decode([token]) if known else f"<{token}>"
        return self._names[token]

    async def render(
        self, messages: list[dict[str, Any]], *, generation_prompt: bool, extra: dict[str, Any]
    ) -> str:
        """The chat template applied; ApiError 400 when there is none or it fails."""
        if not self.has_template:
            raise ApiError(
                400,
                "this model has no chat template; use /v1/completions, or save a "
                "chat_template.jinja with the model",
                code="no_chat_template",
            )
        if reserved := _RESERVED & set(extra):
            name = sorted(reserved)[0]
            raise ApiError(400, f"chat_template_kwargs: {name} cannot be set here", param=name)
        plain = [plain_message(m, index) for index, m in enumerate(messages)]
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(
            self._renderer,
            lambda: self.tokenizer.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=generation_prompt, **extra
            ),
        )
        try:
            text: str = await asyncio.wait_for(work, _TEMPLATE_TIMEOUT_S)
        except TimeoutError:
            raise ApiError(400, "the chat template takes too long", param="messages") from None
        except Exception as error:  # whatever a template raises is about these messages
            message = f"the chat template refuses these messages: {error}"
            raise ApiError(400, message, param="messages") from None
        return text


def plain_message(message: dict[str, Any], index: int) -> dict[str, Any]:
    """The message with its text parts joined; ApiError 400 for images and other parts."""
    place = f"messages.{index}"
    if not isinstance(message.get("role"), str):
        raise ApiError(400, f"{place}.role: must be a string", param=f"{place}.role")
    content = message.get("content")
    if content is None and message["role"] == "assistant":
        return message
    if isinstance(content, str):
        return message
    if not isinstance(content, list):
        raise ApiError(400, f"{place}.content: must be a text", param=f"{place}.content")
    parts = [p if isinstance(p, dict) and p.get("type") == "text" else {} for p in content]
    texts = [p.get("text") for p in parts]
    if not all(isinstance(t, str) for t in texts):
        raise ApiError(
            400, f"{place}.content: only parts of type text are supported", param=f"{place}.content"
        )
    return {**message, "content": "\n".join(str(t) for t in texts)}
