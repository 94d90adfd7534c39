"""The parts of the OpenAPI description that FastAPI cannot derive."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from swifti2v.serving.failures import ErrorBody
from swifti2v.serving.schemas import Health, VideoForm, VideoRequest

BODIES = ("/v1/videos", "/v1/videos/estimate", "/v1/videos/sync")
"""Paths whose POST takes a request for a video."""
FILES = {
    "/v1/videos/{id}/content": ("video/mp4", "image/jpeg", "image/png"),
    "/v1/videos/{id}/stream": ("video/mp4",),
    "/v1/videos/{id}/events": ("text/event-stream",),
    "/v1/videos/sync": ("video/mp4",),
    "/metrics": ("text/plain",),
}
"""Media types of paths that do not answer with JSON."""
RANGES = ("/v1/videos/{id}/content", "/v1/videos/{id}/stream")
HEALTH = ("/health", "/ready")
ERRORS = {
    "400": "The request cannot be made.",
    "401": "The API key is missing or unknown.",
    "403": "The request comes from another site.",
    "404": "There is no such thing, or it is not there yet.",
    "413": "The request is too large.",
    "415": "The body is neither JSON nor a form.",
    "422": "The video failed or was cancelled, or the idempotency key belongs to another request.",
    "429": "The queue is full; see Retry-After.",
    "504": "The video is not finished yet.",
}
EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["progress", "preview", "done"]},
        "data": {"type": "string", "description": "JSON."},
        "id": {"type": "string", "description": "Number of the preview, from 1."},
    },
}
"""One Server-Sent Event."""
BINARY = {"type": "string", "format": "binary"}
REF = "#/components/schemas/{model}"


def describe(app: FastAPI) -> None:
    """Let an app's description name the bodies, files and errors of every route."""

    def make() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(
                get_openapi(
                    title=app.title,
                    version=app.version,
                    description=app.description,
                    routes=app.routes,
                )
            )
        return app.openapi_schema

    app.openapi = make  # type: ignore[method-assign] # FastAPI's documented way


def _complete(document: dict[str, Any]) -> dict[str, Any]:
    schemas = document["components"]["schemas"]
    for model in (ErrorBody, Health, VideoRequest, VideoForm):
        schema = model.model_json_schema(ref_template=REF, mode="validation")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            _complete_operation(path, method, operation)
    return document


def _complete_operation(path: str, method: str, operation: dict[str, Any]) -> None:
    if method == "post" and path in BODIES:
        content = {
            "application/json": {"schema": _ref("VideoRequest")},
            "multipart/form-data": {"schema": _ref("VideoForm")},
        }
        operation["requestBody"] = {"required": True, "content": content}
    responses = operation["responses"]
    if path in HEALTH:
        health = {"application/json": {"schema": _ref("Health")}}
        responses["200"]["content"] = health
        responses["503"] = {"description": "It is not.", "content": health}
    if path in FILES:
        schemas = {kind: EVENT if kind == "text/event-stream" else BINARY for kind in FILES[path]}
        responses["200"]["content"] = {kind: {"schema": own} for kind, own in schemas.items()}
    if path in RANGES:
        responses["206"] = {**responses["200"], "description": "A part of the file."}
        responses["416"] = {"description": "There is no such part of the file."}
    error = {"application/json": {"schema": _ref("ErrorBody")}}
    for status, text in ERRORS.items():
        responses[status] = {"description": text, "content": error}


def _ref(model: str) -> dict[str, str]:
    return {"$ref": REF.format(model=model)}
