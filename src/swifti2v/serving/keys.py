"""API keys: made here, shown once, and kept as hashes."""

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swifti2v.errors import InputError
from swifti2v.storage import only_user, whole_file

PREFIX = "sk-swifti2v-"
LOCAL = "local"
"""Owner of the jobs of a server without keys."""


class Keys:
    """The keys of a server, by the name of who holds them.

    A key is 256 random bits, so a plain SHA-256 of it tells nothing.

    Args:
        path: JSON file of names and hashes; need not be there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hashes = self._read()

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def add(self, name: str) -> str:
        """Make a key and keep its hash.

        Raises:
            InputError: There is one of that name, or the name is of other characters.
        """
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
            raise InputError(f"key name {name!r} has other characters than letters, digits and ._-")
        with self._changing():
            if name in self._hashes or name == LOCAL:
                raise InputError(f"there is a key of the name {name!r} already; revoke it first")
            key = PREFIX + secrets.token_urlsafe(32)
            self._hashes[name] = _hash(key)
        return key

    def revoke(self, name: str) -> None:
        """Forget a key.

        Raises:
            InputError: The name is unknown.
        """
        with self._changing():
            if self._hashes.pop(name, None) is None:
                known = ", ".join(self._hashes) or "none"
                raise InputError(f"there is no key of the name {name!r}; known: {known}")

    def find(self, key: str) -> str | None:
        """Name of the key's holder; takes as long for a wrong key as for a right one."""
        given, found = _hash(key), None
        for name, known in self._hashes.items():
            if hmac.compare_digest(given, known):
                found = name
        return found

    def _read(self) -> dict[str, str]:
        is_there = self._path.is_file()
        return dict(json.loads(self._path.read_text(encoding="utf-8"))) if is_there else {}

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Change the keys that are in the file by now, and write them for the server's user alone."""
        refusal = f"{self._path} is being changed by another program; try again"
        with only_user(self._path.with_suffix(".lock"), refusal):
            self._hashes = self._read()
            yield
            with whole_file(self._path) as unfinished:
                unfinished.touch(mode=0o600)
                unfinished.write_text(json.dumps(self._hashes, indent=2), encoding="utf-8")


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()
