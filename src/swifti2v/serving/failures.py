"""Errors of the API in OpenAI's shape."""

import logging
import sqlite3

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from swifti2v.serving.data_dir import find_storage_fault

logger = logging.getLogger("swifti2v.serving")

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""``error.type`` by status; ``invalid_request_error`` below 500 otherwise."""
CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
"""``error.code`` of errors that the framework raises."""


class ErrorDetail(BaseModel):
    """The error itself."""

    message: str
    type: str
    param: str | None = None
    code: str


class ErrorBody(BaseModel):
    """Body of every answer from 400 up."""

    error: ErrorDetail


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: Of HTTP.
        code: For programs.
        message: For people.
        param: Field that is meant.
        headers: Of the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers

    def to_response(self) -> JSONResponse:
        """The answer."""
        kind = TYPES.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        detail = ErrorDetail(message=str(self), type=kind, param=self.param, code=self.code)
        body = ErrorBody(error=detail).model_dump()
        return JSONResponse(body, self.status, self.headers)


def from_validation(error: ValidationError | RequestValidationError) -> ApiError:
    """Name the first field that is wrong, and the reason."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = place[0] if place else None
    text = "there is no such field" if first["type"] == "extra_forbidden" else first["msg"]
    text = text.removeprefix("Value error, ")
    return ApiError(400, "invalid_field", f"{param}: {text}" if param else text, param=param)


def add_handlers(app: FastAPI) -> None:
    """Give every error of an app OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def answer_api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.to_response()

    @app.exception_handler(RequestValidationError)
    async def answer_validation(_: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error).to_response()

    @app.exception_handler(HTTPException)
    async def answer_http(_: Request, error: HTTPException) -> JSONResponse:
        code = CODES.get(error.status_code, "invalid_request")
        headers = dict(error.headers) if error.headers else None
        return ApiError(error.status_code, code, str(error.detail), headers=headers).to_response()

    @app.exception_handler(ClientDisconnect)
    async def answer_nobody(_: Request, __: ClientDisconnect) -> JSONResponse:
        return ApiError(400, "client_disconnected", "the request ended midway").to_response()

    @app.exception_handler(OSError)
    @app.exception_handler(sqlite3.OperationalError)
    async def answer_full_disk(
        _: Request, error: OSError | sqlite3.OperationalError
    ) -> JSONResponse:
        reason = find_storage_fault(error)
        if reason is None:
            raise error
        logger.warning("nothing can be stored: %s", reason)
        text = f"the server cannot store anything ({reason}); nothing was accepted"
        return ApiError(507, "storage_failed", text).to_response()

    @app.exception_handler(Exception)
    async def answer_fault(_: Request, __: Exception) -> JSONResponse:
        return ApiError(500, "internal_error", "the server failed; its log says why").to_response()
