"""The HTTP application: OpenAI's completions and chat, plus health, metrics and tokens.

    POST /v1/completions  /v1/chat/completions  /tokenize  /detokenize
    GET  /v1/models  /v1/models/NAME  /metrics  /tokenizer_info  /health  /livez  /readyz

A request goes: gate (limits.py) -> capacity -> body -> strict model -> tokens -> engine -> answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from compressor import __version__
from compressor.serve.answers import event, usage
from compressor.serve.engine import LLMEngine
from compressor.serve.generation import Generation
from compressor.serve.limits import Limits, error_response
from compressor.serve.options import ServeOptions
from compressor.serve.planning import Plan, chat_ids, plan_chat, plan_completion
from compressor.serve.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from compressor.serve.serving import Serving

_T = TypeVar("_T")
Asked = CompletionRequest | ChatRequest


def create_app(engine: LLMEngine, options: ServeOptions) -> FastAPI:
    """The application over an engine; start `app.state.serving.worker` before serving it.

    Raises UsageError when the engine has no tokenizer.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.serving = Serving.open(engine, options)
    app.add_middleware(Limits, options=options)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_bug)
    for path, (method, route) in ROUTES.items():
        app.add_api_route(path, route, methods=[method], response_model=None)
    return app


async def _answer_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _answer_http_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return error_response(ApiError(error.status_code, str(error.detail)))


async def _answer_bug(request: Request, _error: Exception) -> JSONResponse:
    message = f"internal error in request {_request_id(request)}"
    return error_response(ApiError(500, message, code="internal_error"))


def _serving(request: Request) -> Serving:
    serving: Serving = request.app.state.serving
    return serving


def _request_id(request: Request) -> str:
    return str(request.scope["state"]["request_id"])


async def completions(request: Request) -> Response:
    serving = _serving(request)
    serving.check_capacity()
    asked = CompletionRequest.read(await request.body())
    warnings = _accept(serving, asked)
    plan = await plan_completion(serving, _request_id(request), asked)
    return await _respond(request, asked, plan, warnings)


async def chat(request: Request) -> Response:
    serving = _serving(request)
    serving.check_capacity()
    asked = ChatRequest.read(await request.body())
    warnings = _accept(serving, asked)
    plan = await plan_chat(serving, _request_id(request), asked)
    return await _respond(request, asked, plan, warnings)


def _accept(serving: Serving, asked: Asked | TokenizeRequest | DetokenizeRequest) -> dict[str, str]:
    """Check the model's name and unknown fields; returns headers that warn of the latter."""
    serving.check_model(asked.model)
    names = [ascii(name[:60])[1:-1].replace('"', "'") for name in asked.unknown_fields()[:10]]
    if names and serving.options.strict_api:
        raise ApiError(400, f"unknown field {names[0]}", param=names[0], code="unknown_field")
    return {"warning": f'299 - "unknown fields ignored: {", ".join(names)}"'} if names else {}


async def _respond(request: Request, asked: Asked, plan: Plan, headers: dict[str, str]) -> Response:
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options: needs stream = true", param="stream_options")
    serving = _serving(request)
    if asked.stream:
        stream = _stream(serving, asked, plan)
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
    generation = Generation(serving.worker, plan.jobs)
    body = await _until_disconnect(request, _collect(generation, plan))
    if body is None:
        return Response(status_code=499)
    return JSONResponse(body, headers=headers)


async def _collect(generation: Generation, plan: Plan) -> dict[str, Any]:
    async for index, delta in generation.deltas():
        plan.choices[index].add(delta)
    return plan.writer.answer(plan.choices, plan.num_prompt_tokens)


async def _stream(serving: Serving, asked: Asked, plan: Plan) -> AsyncIterator[str]:
    writer, options = plan.writer, asked.stream_options
    generation = Generation(serving.worker, plan.jobs, buffer=serving.options.stream_buffer)
    started: set[int] = set()
    deltas = generation.deltas()
    try:
        async for index, delta in deltas:
            choice = plan.choices[index]
            if writer.kind == "chat" and index not in started:
                yield writer.role_chunk(choice)
            started.add(index)
            piece = choice.add(delta)
            if piece.text or piece.logprobs or piece.finish_reason:
                continuous = options is not None and options.continuous_usage_stats
                yield writer.chunk(choice, piece, _usage(plan) if continuous else None)
        if options is not None and options.include_usage:
            yield writer.usage_chunk(_usage(plan))
    except ApiError as error:
        yield event(error.body())
    finally:
        await deltas.aclose()  # type: ignore[attr-defined]
    yield "data: [DONE]\n\n"


def _usage(plan: Plan) -> dict[str, Any]:
    return usage(plan.choices, plan.num_prompt_tokens)


async def _until_disconnect(request: Request, work: Coroutine[Any, Any, _T]) -> _T | None:
    """The work's result; None, and the work cancelled, when the client goes away first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model_card(_serving(request))]})


async def model(request: Request, name: str) -> Response:
    _serving(request).check_model(name)
    return JSONResponse(_model_card(_serving(request)))


def _model_card(serving: Serving) -> dict[str, Any]:
    return {
        "id": serving.model_name,
        "object": "model",
        "created": serving.created,
        "owned_by": "compressor",
        "max_model_len": serving.engine.max_model_len,
    }


async def tokenize(request: Request) -> Response:
    serving = _serving(request)
    asked = TokenizeRequest.read(await request.body())
    headers = _accept(serving, asked)
    if (asked.prompt is None) == (asked.messages is None):
        raise ApiError(400, "exactly one of prompt and messages is needed", param="prompt")
    if asked.prompt is None:
        ids = await chat_ids(serving, asked)
    else:
        special = asked.add_special_tokens
        ids = await serving.texts.encode(asked.prompt, add_special_tokens=special)
    names = [serving.texts.name(i) for i in ids] if asked.return_token_strs else None
    limit = serving.engine.max_model_len
    body = {"tokens": ids, "count": len(ids), "max_model_len": limit, "token_strs": names}
    return JSONResponse(body, headers=headers)


async def detokenize(request: Request) -> Response:
    serving = _serving(request)
    asked = DetokenizeRequest.read(await request.body())
    headers = _accept(serving, asked)
    return JSONResponse({"prompt": serving.texts.decode(asked.tokens)}, headers=headers)


async def tokenizer_info(request: Request) -> Response:
    tokenizer = _serving(request).texts.tokenizer
    names = ("bos_token", "eos_token", "pad_token", "chat_template")
    return JSONResponse({name: getattr(tokenizer, name, None) for name in names})


async def metrics(request: Request) -> Response:
    text = _serving(request).metrics.render()
    return Response(text, media_type="text/plain; version=1.0.0; charset=utf-8")


async def health(request: Request) -> Response:
    """200 while the engine's loop turns."""
    serving = _serving(request)
    reason = serving.unhealthy_because
    age = serving.worker.heartbeat_age_s
    body = {
        "status": reason or "ok",
        "heartbeat_age_s": round(age, 3) if age != float("inf") else None,
        "version": __version__,
    }
    return JSONResponse(body, status_code=503 if reason else 200)


async def ready(request: Request) -> Response:
    """200 while new work is welcome."""
    reason = _serving(request).unready_because
    return JSONResponse({"status": reason or "ready"}, status_code=503 if reason else 200)


ROUTES: dict[str, tuple[str, Any]] = {
    "/v1/completions": ("POST", completions),
    "/v1/chat/completions": ("POST", chat),
    "/v1/models": ("GET", models),
    "/v1/models/{name:path}": ("GET", model),
    "/tokenize": ("POST", tokenize),
    "/detokenize": ("POST", detokenize),
    "/tokenizer_info": ("GET", tokenizer_info),
    "/metrics": ("GET", metrics),
    "/health": ("GET", health),
    "/livez": ("GET", health),
    "/readyz": ("GET", ready),
}
