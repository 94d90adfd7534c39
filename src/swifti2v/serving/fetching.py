"""Fetch a photo by its URL, from hosts that the operator allows, never from a private network."""

import http.client
import ipaddress
import socket
import ssl
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from swifti2v.errors import InputError

MAX_REDIRECTS = 3
TIMEOUT_SECONDS = 15.0
REDIRECTS = (301, 302, 303, 307, 308)


class _Target(NamedTuple):
    """A URL whose host is allowed, and the address that was looked at."""

    scheme: str
    host: str
    port: int
    path: str
    address: str


def fetch(url: str, allowed: Sequence[str], max_bytes: int) -> bytes:
    """Get a URL's content.

    The address is resolved once, looked at, and connected to as it is, so that a second answer of
    the name server cannot lead elsewhere. Each redirect is judged in the same way.

    Args:
        url: http or https.
        allowed: Hosts that may be named.
        max_bytes: Of the content.

    Raises:
        InputError: The host is not allowed, its address is of a private network, or it does not
            give the content.
    """
    for _ in range(MAX_REDIRECTS + 1):
        target = _judge(url, allowed)
        try:
            with closing(_connect(target)) as connection:
                connection.request("GET", target.path, headers={"Accept": "image/*, video/*"})
                response = connection.getresponse()
                if response.status in REDIRECTS:
                    url = urljoin(url, response.getheader("location") or "")
                    continue
                if response.status != http.client.OK:
                    raise InputError(f"{target.host} answers with {response.status}")
                content = response.read(max_bytes + 1)
        except (OSError, http.client.HTTPException) as error:
            raise InputError(f"{target.host} cannot be reached ({type(error).__name__})") from None
        if len(content) > max_bytes:
            raise InputError(f"the file at {target.host} is over {max_bytes // 1024**2} MB")
        return content
    raise InputError(f"the URL is redirected more than {MAX_REDIRECTS} times")


def _judge(url: str, allowed: Sequence[str]) -> _Target:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InputError("the URL cannot be read") from None
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or parts.username is not None:
        raise InputError("the URL must be http or https, without a user name")
    if host not in allowed:
        raise InputError(f"URLs of {host or 'no host'} are not allowed here; upload the file")
    port = port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise InputError(f"{host} has no address") from None
    addresses = [str(item[4][0]) for item in found]
    if not all(is_public(address) for address in addresses):
        raise InputError(f"{host} is in a private network; upload the file")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return _Target(parts.scheme, host, port, path, addresses[0])


def is_public(address: str) -> bool:
    """Whether an address is of the internet; one that hides another inside it is judged by that."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if inner is not None:
            return is_public(str(inner))
        if found in ipaddress.ip_network("64:ff9b::/96"):
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
    return found.is_global and not found.is_multicast


def _connect(target: _Target) -> http.client.HTTPConnection:
    connection: http.client.HTTPConnection
    address = (target.address, target.port)
    if target.scheme == "https":
        connection = http.client.HTTPSConnection(target.host, target.port)
        plain = socket.create_connection(address, TIMEOUT_SECONDS)
        context = ssl.create_default_context()
        connection.sock = context.wrap_socket(plain, server_hostname=target.host)
    else:
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.sock = socket.create_connection(address, TIMEOUT_SECONDS)
    return connection
