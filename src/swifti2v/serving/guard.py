"""Checks before every request: the host it names, the site it comes from, its size."""

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swifti2v.serving.failures import ApiError

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "media-src 'self' blob:; connect-src 'self'; form-action 'self'; manifest-src 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
PROBES = ("/health", "/ready")
"""Paths that tell nothing of value, and that a cluster asks for by the address of the machine."""


class Guard:
    """Refuses requests that a foreign page sends, and bodies over the limit; adds security headers.

    A page of another site may make a browser send a request here, but not without naming its own
    origin, and a name of its own that it points at this machine (DNS rebinding) is in ``Host``.

    Args:
        app: What answers.
        hosts: Names by which the server may be called; ``*`` allows all.
        max_bytes: Of a body.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str], max_bytes: int) -> None:
        self._app = app
        self._hosts = {host.lower() for host in hosts}
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._judge(scope["method"], scope["path"], Headers(scope=scope))
        if refusal is not None:
            await refusal.to_response()(scope, receive, send_with_headers)
        else:
            await self._app(scope, self._counted(receive), send_with_headers)

    def _judge(self, method: str, path: str, headers: Headers) -> ApiError | None:
        """The reason to refuse a request, if there is one."""
        host = headers.get("host", "")
        is_known = "*" in self._hosts or _without_port(host) in self._hosts
        if not is_known and path not in PROBES:
            return ApiError(400, "invalid_host", "this server is not called by that name")
        origin = headers.get("origin")
        if origin is not None and _host_of(origin) != host.lower():
            return ApiError(403, "foreign_origin", "pages of other sites may not call this server")
        site = headers.get("sec-fetch-site", "none")
        if method not in SAFE_METHODS and site not in ("none", "same-origin"):
            return ApiError(403, "foreign_origin", "pages of other sites may not call this server")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._max_bytes:
            return self._too_large()
        return None

    def _counted(self, receive: Receive) -> Receive:
        """The body, as long as it keeps to the limit: a request need not say how long it is."""
        size = 0

        async def receive_some() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                raise self._too_large()
            return message

        return receive_some

    def _too_large(self) -> ApiError:
        limit = self._max_bytes // 1024**2
        return ApiError(413, "too_large", f"the request is over {limit} MB, the limit; send less")


def _without_port(host: str) -> str:
    """Name of a ``Host`` header."""
    name, _, port = host.lower().rpartition(":")
    return name if name and port.isdecimal() else host.lower()


def _host_of(origin: str) -> str:
    """Name and port of an ``Origin`` header; nothing for one that is no origin."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
