"""Bodies of requests: JSON or a form to the fields of a video and its uploads."""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile

from swifti2v.serving.failures import ApiError, from_validation
from swifti2v.serving.schemas import Reference, VideoRequest

FILES = ("input_reference", "motion_reference")
MAX_FIELDS = 200
_NESTED = re.compile(r"(\w+)\[(\w*)\]")
_DATA_URL = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Body:
    """Fields and files that a client sent."""

    video: VideoRequest
    uploads: dict[str, bytes]
    """Content by field, of files and data URLs."""
    urls: dict[str, str]
    """http(s) URLs by field, still to be fetched."""


async def read_body(request: Request, max_bytes: int) -> Body:
    """Read a request for a video.

    Raises:
        ApiError: It is neither JSON nor a form, or a field is unknown or cannot be read.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    uploads: dict[str, bytes] = {}
    if kind == "application/json":
        fields = _parse_json(await request.body())
    elif kind == "multipart/form-data":
        fields, uploads = await _read_form(request, max_bytes)
    else:
        raise ApiError(
            415, "unsupported_media_type", "send application/json or multipart/form-data"
        )
    try:
        video = VideoRequest.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error) from None
    urls = {}
    for name in FILES:
        reference: Reference | None = getattr(video, name)
        if name not in uploads and reference is not None:
            url = _find_url(name, reference)
            if url.startswith(("http://", "https://")):
                urls[name] = url
            else:
                uploads[name] = _decode_data_url(name, url)
    return Body(video=video, uploads=uploads, urls=urls)


def _parse_json(content: bytes) -> dict[str, Any]:
    try:
        fields = from_json(content)  # refuses what json takes: deep nesting, half a surrogate pair
    except ValueError as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "invalid_json", "the body is not a JSON object")
    return fields


async def _read_form(request: Request, max_bytes: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    fields: dict[str, Any] = {}
    uploads: dict[str, bytes] = {}
    async with request.form(
        max_files=len(FILES), max_fields=MAX_FIELDS, max_part_size=max_bytes
    ) as form:
        for key, value in form.multi_items():
            if isinstance(value, UploadFile):
                if key not in FILES:
                    raise ApiError(400, "invalid_field", f"{key}: it is no file", param=key)
                if key in uploads:
                    raise _given_twice(key)
                uploads[key] = await value.read()
            else:
                _add_text(fields, key, value)
    for key in fields.keys() & uploads.keys():
        raise _given_twice(key)
    return fields, uploads


def _given_twice(name: str) -> ApiError:
    return ApiError(400, "invalid_field", f"{name}: it is given twice", param=name)


def _add_text(fields: dict[str, Any], key: str, value: str) -> None:
    """Take a text of a form, whose key may be ``a``, ``a[b]`` or, for lists, ``a[]`` or ``a[0]``."""
    nested = _NESTED.fullmatch(key)
    name, inner = (nested[1], nested[2]) if nested else (key, None)
    if name == "loras" and not value.startswith("["):
        texts = fields.setdefault(name, [])
        if not isinstance(texts, list):
            raise _given_twice(name)
        texts.append(value)
    elif inner and not inner.isdecimal():
        parts = fields.setdefault(name, {})
        if not isinstance(parts, dict) or inner in parts:
            raise _given_twice(name)
        parts[inner] = value
    elif name in fields:
        raise _given_twice(name)
    else:
        fields[name] = value


def _find_url(name: str, reference: Reference) -> str:
    if reference.file_id is not None:
        raise ApiError(
            400, "invalid_field", f"{name}: there is no file store; send the file", param=name
        )
    if reference.image_url and reference.video_url:
        raise _given_twice(name)
    url = reference.image_url or reference.video_url
    if not url:
        raise ApiError(400, "invalid_field", f"{name}: image_url is missing", param=name)
    return url


def _decode_data_url(name: str, url: str) -> bytes:
    found = _DATA_URL.match(url)
    if found is None:
        raise ApiError(
            400,
            "invalid_field",
            f"{name}: send a file, or a URL that begins with data:image/jpeg;base64,",
            param=name,
        )
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "invalid_field", f"{name}: it is not base64", param=name) from None
