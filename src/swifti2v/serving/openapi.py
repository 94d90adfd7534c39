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
"""What some paths answer with instead of JSON."""
ERRORS = {
    "400": "The request cannot be made.",
    "401": "The API key is missing or unknown.",
    "403": "The request comes from another site.",
    "404": "There is no such thing, or it is not there yet.",
    "413": "The request is too large.",
    "415": "The body is neither JSON nor a form.",
    "422": "The video failed or was cancelled, or the idempotency key belongs to another request.",
    "429": "The queue is full; see Retry-After.",
    "503": "The worker does not run, or the queue is full.",
    "504": "The video is not finished yet.",
}
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
    for kind in FILES.get(path, ()):
        plain = {"schema": {"type": "string", "format": "binary"}}
        if kind == FILES[path][0]:
            responses["200"]["content"] = {}
        responses["200"]["content"][kind] = plain
    if path in ("/v1/videos/{id}/content", "/v1/videos/{id}/stream"):
        responses["206"] = {**responses["200"], "description": "A part of the file."}
        responses["416"] = {"description": "There is no such part of the file."}
    for status, text in ERRORS.items():
        is_health = path in ("/health", "/ready")
        if status == "503" and not is_health:
            continue
        model = "Health" if is_health and status == "503" else "ErrorBody"
        content = {"application/json": {"schema": _ref(model)}}
        responses[status] = {"description": text, "content": content}
    if path in ("/health", "/ready"):
        responses["200"]["content"] = {"application/json": {"schema": _ref("Health")}}


def _ref(model: str) -> dict[str, str]:
    return {"$ref": REF.format(model=model)}
