"""The routes."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp

from fedgraft.serve.gate import Gate
from fedgraft.serve.keys import Ring
from fedgraft.serve.protocol import ChatRequest, CompletionRequest, Shape
from fedgraft.serve.refusal import Refusal
from fedgraft.serve.service import Hearing, Service

router = APIRouter()
PAGE = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
"""Path -> media type of the page's files."""
FORM = re.compile(r"^str$|[\[(]")
"""Names of the forms of a field within the place of an error."""
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"


def make_app(service: Service, ring: Ring | None) -> ASGIApp:
    """The application, its gate included."""
    app = FastAPI(title="fedgraft", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service, app.state.ring = service, ring
    app.include_router(router)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _misunderstood)
    app.add_exception_handler(HTTPException, _not_served)
    app.add_exception_handler(Exception, _broken)

    def count(status: int) -> None:
        service.metrics.add("requests_total", model="none", status=str(status))

    return Gate(app, ring, frozenset(service.models), service.limits.body_bytes, count)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The models that the asker may use."""
    service = _service(request)
    return {"object": "list", "data": [_card(service, name) for name in service.models if name in request.state.allowed]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    """One model."""
    _service(request).check(name, request.state.allowed)
    return _card(_service(request), name)


@router.post("/v1/chat/completions")
async def chat(wanted: ChatRequest, request: Request) -> Response:
    """The answer to the last message of a chat."""
    return await _answered(wanted, request)


@router.post("/v1/completions")
async def completions(wanted: CompletionRequest, request: Request) -> Response:
    """Texts continued."""
    return await _answered(wanted, request)


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while requests are taken."""
    well = _service(request).scheduler.alive
    return JSONResponse({"status": "ok" if well else "stopping"}, 200 if well else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Counters for Prometheus."""
    return PlainTextResponse(_service(request).metrics.text(), media_type="text/plain; version=0.0.4")


@router.get("/{name}")
async def page(name: str) -> Response:
    """The page to chat and compare, which comes without anything of a model."""
    if name not in PAGE:
        raise HTTPException(404)
    content = (resources.files("fedgraft") / "assets" / "serve" / (name or "page.html")).read_bytes()
    headers = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "cache-control": "no-cache"}
    return Response(content, media_type=PAGE[name], headers=headers)


@router.get("/")
async def first_page() -> Response:
    """The page."""
    return await page("")


async def _answered(wanted: ChatRequest | CompletionRequest, request: Request) -> Response:
    service, shape = _service(request), Shape(model=wanted.model, chat=isinstance(wanted, ChatRequest))
    service.check(wanted.model, request.state.allowed)
    request.state.model = wanted.model
    hearing = service.submit(await service.wishes(wanted), bool(wanted.stream))
    if wanted.stream:
        _count(request, 200)
        return StreamingResponse(
            _stream(hearing, shape, wanted.counts), media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )
    async for _ in hearing.told(request.is_disconnected):
        pass
    _count(request, 200)
    if any(answer.reason is None for answer in hearing.answers):
        return Response(status_code=499)  # nobody is there to read it
    return JSONResponse(shape.whole(hearing.answers))


async def _stream(hearing: Hearing, shape: Shape, counts: bool) -> AsyncIterator[str]:
    if shape.chat:
        yield _event(shape.opening())
    try:
        async for index, told in hearing.told():
            if told.text:
                yield _event(shape.piece(index, told.text))
            if told.answer is not None:
                yield _event(shape.piece(index, "", told.answer.reason))
    except Refusal as refusal:
        yield _event(refusal.body)
        return
    if counts:
        yield _event(shape.closing(hearing.answers))
    yield "data: [DONE]\n\n"


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


def _card(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.created, "owned_by": "fedgraft"}


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _count(request: Request, status: int) -> None:
    model = getattr(request.state, "model", "none")
    _service(request).metrics.add("requests_total", model=model, status=str(status))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    _count(request, error.status)
    return JSONResponse(error.body, error.status, error.headers)


async def _misunderstood(request: Request, error: Exception) -> Response:
    """Something that is wrong with a body, by its field."""
    assert isinstance(error, RequestValidationError)
    deepest = max(error.errors(), key=lambda one: len(one["loc"]))  # of the forms that a field may have, the one that was meant
    broken = deepest["type"] == "json_invalid"
    place = "" if broken else ".".join(str(part) for part in deepest["loc"][1:] if not FORM.search(str(part)))
    told = "The body is no JSON" if broken else f"{place}: {deepest['msg']}" if place else str(deepest["msg"])
    return await _refused(request, Refusal(400, told.replace("Value error, ", ""), "invalid_body", place or None))


async def _not_served(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = {404: f"There is nothing at {request.url.path}.", 405: f"{request.url.path} does not take {request.method}."}
    code = {404: "not_found", 405: "not_allowed", 413: "too_large"}.get(error.status_code)
    return await _refused(request, Refusal(error.status_code, told.get(error.status_code, str(error.detail)), code))


async def _broken(request: Request, error: Exception) -> Response:
    """A bug, which uvicorn logs."""
    return await _refused(request, Refusal(500, "The server failed; its log says how.", "failed"))
