"""Who asks: what a key allows, how a secret becomes a caller, and whether anybody is asked for a key at all.

A secret is 256 random bits, so one fast keyed hash keeps it as safe as a slow one would: there is nothing to guess. The
hash is keyed with a random salt of its file: equal secrets look different in two files, and nobody outside can choose
a digest, so the time that a look-up by digest takes says nothing about any key. Where keys are kept is `state.keyfile`.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from headrace.core.types import HeadraceError
from headrace.gateway.errors import Refused
from headrace.gateway.limits import Limits

PREFIX = "hr-"  # so that people and scanners know one when they see it
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")  # of keys and tenants
PRIORITIES = range(-49, 50)  # of keys: those of batches, 100 lower, stay behind all of them
LEAST_SECRET_CHARS, MOST_SECRET_CHARS = 16, 512
ASKED = "This server asks for an API key: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
_CHALLENGE = ((b"www-authenticate", b"Bearer"),)


class BadKey(HeadraceError):
    """A key cannot be made, found or read; the message says why."""


@dataclass(frozen=True, slots=True)
class Key:
    """Everything about a key but its secret."""

    id: str  # names it in logs and in accounts; no secret
    name: str  # for people; one key that is not revoked has it
    tenant: str  # whose files, batches, responses and cached prompts it sees, and whose share of the machine it uses
    digest: bytes = field(repr=False)  # of the secret
    admin: bool = False
    models: tuple[str, ...] = ()  # that it may use; empty: all
    limits: Limits = Limits()
    priority: int = 0  # added to what its requests ask for, which is at most 0
    weight: float = 1.0  # of its tenant, where the ordering shares fairly
    created_s: int = 0  # wall clock, as all times of keys
    expires_s: int | None = None
    revoked_s: int | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request. `tenant` and `admin` come from the key and from nowhere else."""

    tenant: str = ""
    admin: bool = False
    key: Key | None = None  # None: nobody was asked, or nobody answered

    def may_use(self, model: str) -> bool:
        return self.key is None or not self.key.models or model in self.key.models

    def check_model(self, model: str) -> None:
        """Raises Refused."""
        if not self.may_use(model):
            message = f"This API key may not use the model {model!r}; GET /v1/models lists those it may."
            raise Refused(403, message, code="model_not_allowed", param="model")

    def priority(self, asked: int) -> int:
        """A key's own priority is the most its requests have; without keys it is as they ask."""
        return asked if self.key is None else min(asked, 0) + self.key.priority


ANYBODY = Caller(admin=True)  # where no keys are asked for
NOBODY = Caller()  # on public pages, without a key


@dataclass(frozen=True, slots=True)
class Keyring:
    """All keys at one moment."""

    salt: bytes = b""
    by_digest: Mapping[bytes, Key] = field(default_factory=dict)

    @classmethod
    def of(cls, salt: bytes, keys: Iterable[Key]) -> Keyring:
        return cls(salt, {key.digest: key for key in keys})

    def find(self, secret: str) -> Key | None:
        wanted = digest(secret, self.salt)
        key = self.by_digest.get(wanted)
        same = hmac.compare_digest(wanted, bytes(len(wanted)) if key is None else key.digest)
        return key if same else None


def new_secret() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def digest(secret: str, salt: bytes) -> bytes:
    return blake2b(secret.encode(), key=salt, digest_size=32, person=b"headrace-key").digest()


def ring_of(secret: str | None) -> Keyring:
    """The one key of an environment variable, an admin's, hashed at once. Raises BadKey."""
    if not secret:
        return Keyring()
    if not (LEAST_SECRET_CHARS <= len(secret) <= MOST_SECRET_CHARS and re.fullmatch(r"[!-~]+", secret)):
        raise BadKey(
            f"HEADRACE_API_KEY is not {LEAST_SECRET_CHARS} to {MOST_SECRET_CHARS} visible ASCII characters; make a key "
            "with `headrace keys add NAME --admin`, or take more of them at random."
        )
    salt = secrets.token_bytes(32)
    return Keyring.of(salt, [Key("env", "HEADRACE_API_KEY", "", digest(secret, salt), admin=True)])


class Guard:
    """Asks every request for a key, if keys there are: owns the memory that there were some, so that a file that goes
    away opens nothing."""

    def __init__(
        self,
        read: Callable[[], Keyring] = Keyring,
        own: Keyring = Keyring(),
        wall_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`read` gives the keys of this moment; `own` are those of the process."""
        self._read = read
        self._own = own
        self._wall_s = wall_s
        self._asks = False

    @property
    def asks(self) -> bool:
        self._rings()
        return self._asks

    def caller(self, headers: Sequence[tuple[bytes, bytes]]) -> Caller | None:
        """Who sends these headers; None if they have no key and need one. Raises Refused for a key that is none."""
        rings = self._rings()
        if not self._asks:
            return ANYBODY
        secret = presented(headers)
        if secret is None:
            return None
        found = [ring.find(secret) for ring in rings]
        return self._valid(next((key for key in found if key is not None), None))

    def by_id(self, key_id: str) -> Caller:
        """Who made something earlier. Raises Refused if the key does not hold any more."""
        keys = (key for ring in self._rings() for key in ring.by_digest.values() if key.id == key_id)
        return self._valid(next(keys, None))

    def _rings(self) -> tuple[Keyring, Keyring]:
        rings = self._own, self._read()
        self._asks = self._asks or any(ring.by_digest for ring in rings)
        return rings

    def _valid(self, key: Key | None) -> Caller:
        if key is None:
            raise no_key("This API key is not known here.")
        if key.revoked_s is not None:
            raise no_key("This API key was revoked.")
        if key.expires_s is not None and key.expires_s <= self._wall_s():
            raise no_key("This API key has expired.")
        return Caller(key.tenant, key.admin, key)


def no_key(message: str) -> Refused:
    return Refused(401, message, code="invalid_api_key", more=_CHALLENGE)


def presented(headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """The one secret in a request's headers. Raises Refused for what two readers might understand differently."""
    given = {value for name, value in headers if name == b"x-api-key"}
    bearers = [value for name, value in headers if name == b"authorization"]
    if len(bearers) > 1:
        raise no_key("Send one Authorization header.")
    for value in bearers:
        scheme, _, bearer = value.partition(b" ")
        if scheme.lower() != b"bearer":
            raise no_key("Send the key as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'.")
        given.add(bearer.strip(b" "))
    if len(given) > 1:
        raise no_key("Send one API key.")
    if not given:
        return None
    secret = given.pop()
    if len(secret) > MOST_SECRET_CHARS or not re.fullmatch(rb"[!-~]+", secret):
        raise no_key("What was sent as an API key is none.")
    return secret.decode("ascii")


def caller_of(scope: Mapping[str, Any]) -> Caller:
    """Who sent the request of this ASGI scope, as the door found out."""
    caller = scope["state"]["caller"]
    assert isinstance(caller, Caller)
    return caller
