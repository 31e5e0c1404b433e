"""A small team's API gateway for language and image models, in one Flask module.
It hands out keys with credits and limits, and relays OpenAI-style requests.

    pip install -r requirements.txt && python proxy.py     # http://127.0.0.1:8000
    pip install -r requirements.txt && pytest              # the tests
    python proxy.py keys add alice --credits 5             # prints a new key once
    python proxy.py --help                                 # all commands

One request:

    client -- POST -> authenticate - 401      bearer -> SHA-256 -> key, account
                      read body    - 400 413  bounded; a large one is counted first
                      model        - 404      keys.json
                      rate         - 429      Flask-Limiter, one storage for all workers
                      admit        - 402 429  lease and hold are one row
                      send         - 503 4xx  dialect -> upstream, or the next upstream
                      relay                   bytes as they come; usage read on the way
    client <- last byte -- settle             the charge is on disk before it leaves

Sections, each needing only what stands above it: Constants, Errors, Configuration,
Ledger, Limits, Wire, Calls and prices, Upstreams, Relay, Pages, Application, Command
line. Operators edit keys.json; the program alone writes proxy.db. See README.md.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import fcntl
import gc
import hashlib
import hmac
import html
import itertools
import json
import math
import mmap
import os
import random
import re
import secrets
import select
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import sys
import tempfile
import threading
import time
import traceback
from array import array
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import certifi
import click
import gunicorn.util
from flask import Flask, Response, g, request
from flask_limiter import Limiter
from gunicorn.app.base import BaseApplication
from gunicorn.http.errors import ParseException
from gunicorn.workers.gthread import ThreadWorker
from limits import RateLimitItem, parse_many
from limits.storage import MovingWindowSupport, Storage
from limits.util import WindowStats
from werkzeug.exceptions import HTTPException

# Constants ---------------------------------------------------------------------------

MICRO = 10**6  # micro-credits in a credit: all money is an integer of these
PICO = 10**6  # pico-credits in a micro-credit: the unit of a price per token

MAX_BODY = 10 << 20  # bytes of a request: a few inlined photographs
MAX_ANSWER = 16 << 20  # bytes of a JSON answer: it is held whole to read its usage
MAX_EVENT = 1 << 20  # bytes of one event of a stream
RECEIVE = 16 << 10  # bytes of one read: a TLS record, the rest would not wake a poll
MAX_HEAD = 64 << 10  # bytes of an upstream's head or trailers
MAX_CHUNK_LINE = 4096  # bytes of a chunk's size and extensions
MAX_INFORMATIONAL = 20  # 1xx answers before the final one
MAX_TOKENS = 10**7  # no context window is larger: a report above it is not believed
MAX_CHOICES = 128  # OpenAI's own bound on `n`
MAX_HOLD = 2**62  # micro-credits: SQLite's integers have 63 bits
MAX_RATE = 10_000  # requests of one window: it is read and written whole
DEFAULT_MAX_OUTPUT = 4096  # tokens, for a priced model that names no `max_output`
BYTES_PER_TOKEN = 4  # of an estimate: English needs 3-4 bytes, Chinese 4-5

CONNECT_TIMEOUT = 5.0  # seconds for TCP and TLS, each
ANSWER_TIMEOUT = 600.0  # seconds to a whole JSON answer; the OpenAI SDKs wait as long
STREAM_TIMEOUT = 1800.0  # seconds that a stream may live
STALL_TIMEOUT = 120.0  # seconds without a `data:` line
UPSTREAM_IDLE = 4.0  # seconds; uvicorn closes idle connections after 5
LOCK_POLL = 0.0002  # seconds between two looks at the lock between processes
LEDGER_TIMEOUT = 5.0  # seconds that a write waits for other writers
SETTLE_PATIENCE = 10.0  # seconds that an answer's end waits for a ledger in trouble
UPKEEP_INTERVAL = 0.25  # seconds between two looks at logs, keys.json and slots
WATCH_INTERVAL = 0.25  # seconds between two looks at the deadlines
COMMENT_INTERVAL = 10.0  # seconds between the comments of a stream that waits
JIMENG_FIRST_POLL, JIMENG_POLL = 2.0, 2.5  # seconds before the first poll, the others
PROBE_TIMEOUT = 15.0  # seconds for a provider to say whether it knows the key
JIMENG_TIMEOUT = 120.0  # seconds from submit to image
CHECKPOINT_BYTES = 4 << 20  # of the write-ahead log; SQLite's own default
MAX_WORKERS = 512  # worker slots: bytes 1 to 512 of the lock file
GRACE = 30  # seconds from SIGTERM to the end of the last stream
GRACE_MARGIN = 3.0  # seconds before that in which streams are ended and settled
CLIENT_TIMEOUT = 30  # seconds that one read from or write to a client may take
ACCEPT_PAUSE = 0.00005  # seconds before an accept, for each connection up to 20
KEEP_THREAD = 0.01  # seconds that a thread waits for its connection's next request
SPARE_THREADS = 16  # per worker, kept for answers that relay nothing

STREAM_HEADERS = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}
ACCOUNT_ITEMS = tuple(parse_many("300/minute"))  # of all routes that relay nothing
DAY = 86400  # seconds
MAX_KEYS = 100  # of one account in a day: each new key has new limits
ONE_ACCOUNT = "/v1/accounts/<account>"
BUSY_STATUS = {429, 503, 529}  # an upstream that has generated nothing, and may later
REFUSED_STATUS = {401, 402, 403}  # it refuses the operator, who alone can mend it
CLIENT_STATUS = {400, 404, 413, 422}  # the client's own mistakes: passed on
BEARER = re.compile(r"[\x21-\x2b\x2d-\x7e]{4,200}")  # no comma: two headers are joined
LIBC = ctypes.CDLL(None)
DIALECTS: dict[str, type] = {}  # scheme before the "+" -> class; each enters itself

# Errors ------------------------------------------------------------------------------


class ProxyError(Exception):
    """A refusal or failure that knows its status, type, code and headers."""

    status, type, code = 500, "api_error", "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.param, self.headers = message, param, headers or {}
        self.code = code or self.code
        self.reason = self.code  # for the log; some know more

    def envelope(self) -> bytes:
        """The body that OpenAI's SDKs read, as UTF-8 JSON."""
        error = {"message": self.message, "type": self.type}
        error |= {"param": self.param, "code": self.code}
        text = json.dumps({"error": error}, ensure_ascii=False)
        return text.encode("utf-8", "replace")


class BadRequest(ProxyError):
    status, type, code = 400, "invalid_request_error", "invalid_request"


class Unauthorized(ProxyError):
    status, type, code = 401, "authentication_error", "unauthorized"

    def __init__(self) -> None:
        super().__init__(
            "Missing or invalid API key. Send it as 'Authorization: Bearer sk-...'.",
            headers={"WWW-Authenticate": "Bearer"},
        )


class InsufficientCredits(ProxyError):
    status, type, code = 402, "insufficient_quota", "insufficient_credits"


class NotFound(ProxyError):
    status, type, code = 404, "invalid_request_error", "not_found"


class TooLarge(ProxyError):
    status, type, code = 413, "invalid_request_error", "request_too_large"


class UnsupportedMediaType(ProxyError):
    status, type, code = 415, "invalid_request_error", "unsupported_media_type"


class RateLimited(ProxyError):
    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"

    def __init__(self, message: str, wait: float):
        seconds = max(1, min(60, int(wait) + (wait % 1 > 0)))
        super().__init__(message, headers={"Retry-After": str(seconds)})


class Unavailable(ProxyError):
    """503; `wait` is when a repeat may help (seconds), None if it cannot."""

    status, code = 503, "provider_unavailable"

    def __init__(self, message: str, wait: int | None = None):
        retry = (
            {"x-should-retry": "false"} if wait is None else {"Retry-After": str(wait)}
        )
        super().__init__(message, headers=retry)


class Overloaded(Unavailable):
    code = "overloaded"


class LedgerUnavailable(Unavailable):
    code = "ledger_unavailable"

    def __init__(self, reason: str):
        super().__init__("The ledger cannot be written at the moment.", wait=5)
        self.reason = reason


class UpstreamFailed(Unavailable):
    """An upstream in trouble; `clean` if it cannot have generated anything,
    `transient` if a question that changes nothing may be asked again."""

    def __init__(
        self,
        reason: str,
        wait: int | None = None,
        clean: bool = False,
        transient: bool = False,
    ):
        super().__init__("The upstream AI provider is temporarily unavailable.", wait)
        self.reason, self.clean, self.transient = reason, clean, transient


class Refused(BadRequest):
    """An upstream's 400, 404, 413 or 422: the client's own mistake, passed on."""

    def __init__(self, status: int, message: str, code: str | None, param: str | None):
        super().__init__(message, code=code, param=param)
        self.status = status


class Ended(Exception):
    """The relay was ended from outside: client, timeout or drain."""

    def failure(self) -> UpstreamFailed:
        """What a client that is still there is told."""
        failure = UpstreamFailed(str(self))
        if str(self) == "drain":
            failure.message = "This server is being restarted: the answer is cut off."
        return failure


class ConfigError(Exception):
    """keys.json is refused; the message names the path or the line."""


HTTP_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    414: "request_too_large",
    415: "unsupported_media_type",
    431: "request_too_large",
}


def from_status(status: int, message: str) -> ProxyError:
    """What Werkzeug or gunicorn refuses by a mere status, as one of ours."""
    ours = ProxyError(message)
    ours.status = status
    if status < 500:
        ours.type = BadRequest.type
        ours.code = HTTP_CODES.get(status, BadRequest.code)
    return ours


def from_http(error: HTTPException) -> ProxyError:
    """Werkzeug's own refusals (404, 405, ...) as one of ours."""
    ours = from_status(error.code or 500, f"{error.name}.")
    if allowed := getattr(error, "valid_methods", None):
        ours.headers["Allow"] = ", ".join(sorted(allowed))
    return ours


# Configuration -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Limits:
    """What one key may do: `rate` as Flask-Limiter writes it, and requests at once."""

    rate: str
    items: tuple[RateLimitItem, ...]
    concurrent: int


@dataclass(frozen=True, slots=True)
class Price:
    """Pico-credits per token of each class, per image and per request."""

    input: int = 0
    cached: int = 0
    output: int = 0
    image: int = 0
    request: int = 0


@dataclass(frozen=True, slots=True)
class Account:
    """Who pays; `credits` are the micro-credits granted by keys.json."""

    id: str
    limits: Limits
    credits: int = 0
    models: frozenset[str] | None = None
    admin: bool = False

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models


@dataclass(frozen=True, slots=True)
class Key:
    """One bearer, known by its SHA-256; `source` is the file that declares it."""

    id: str
    name: str
    account: str
    hash: str
    hint: str
    admin: bool = False
    source: str = "keys.json"


class Keys(Mapping[str, Key]):
    """The keys of keys.json by their ids; each is made anew when it is asked for.

    A worker copies every page on which it counts a reference: ten thousand Key objects
    took 3 MiB in each process under load, their packed form takes 1.
    """

    def __init__(self, accounts: Mapping[str, Account]):
        self._accounts = accounts
        self._packed: dict[str, bytes] = {}

    def add(self, key: Key) -> None:
        names = "\0".join((key.account, key.name, key.hint))
        self._packed[key.id] = bytes.fromhex(key.hash) + names.encode()

    def __getitem__(self, id: str) -> Key:
        packed = self._packed[id]
        account, name, hint = packed[32:].decode().split("\0")
        admin = self._accounts[account].admin
        return Key(id, name, account, packed[:32].hex(), hint, admin)

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


@dataclass(frozen=True, slots=True)
class UpstreamConfig:
    """Where a provider is reached; `missing` names its unset variables."""

    name: str
    dialect: str
    secure: bool
    host: str
    port: int
    path: str
    key: str = field(default="", repr=False)
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Model:
    """A name that clients ask for, and where it is answered, in order."""

    id: str
    routes: tuple[tuple[UpstreamConfig, str], ...]
    price: Price
    about: str = ""
    defaults: dict[str, Any] = field(default_factory=dict)
    max_output: int = DEFAULT_MAX_OUTPUT

    @property
    def missing(self) -> list[str]:
        """The unset variables without which none of its upstreams can be asked."""
        unset = [upstream.missing for upstream, _ in self.routes]
        return list(dict.fromkeys(itertools.chain(*unset))) if all(unset) else []


@dataclass(frozen=True, slots=True)
class Config:
    """keys.json, checked. `demo` is the text of a key that reaches only `echo`."""

    limits: Limits
    accounts: dict[str, Account]
    keys: Keys
    models: dict[str, Model]
    loaded: int
    demo: tuple[str, str] | None = None

    def account(self, id: str) -> Account:
        """The declared account, or one made at run time with the common limits."""
        return self.accounts.get(id) or Account(id, self.limits)

    def granted(self, id: str) -> int | None:
        """Micro-credits that the file grants; None for accounts it does not know."""
        return self.accounts[id].credits if id in self.accounts else None

    def missing(self) -> dict[str, list[str]]:
        """Unset environment variable -> the models that answer 503 without it."""
        out: dict[str, list[str]] = {}
        for model in self.models.values():
            for name in model.missing:
                out.setdefault(name, []).append(model.id)
        return out


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def key_id(hash: str) -> str:
    """The public name of a key: a part of its hash tells nothing of a random key."""
    return f"key_{hash[:16]}"


def key_hint(text: str) -> str:
    return f"{text[:4]}…{text[-4:]}" if len(text) >= 16 else f"{text[:3]}…"


def printable_name(value: Any, path: str, longest: int = 100) -> str:
    """A name that people and terminals can be shown, or ConfigError."""
    if not isinstance(value, str) or not 1 <= len(value) <= longest:
        raise ConfigError(f"{path}: must be a text of 1 to {longest} characters")
    if not value.isprintable() or value != value.strip():
        raise ConfigError(f"{path}: must hold printable characters only")
    return value


def account_name(value: Any, path: str) -> str:
    """A name that can stand in the path of a URL, too."""
    if "/" in printable_name(value, path) or value in (".", ".."):
        raise ConfigError(f"{path}: must hold no '/'")
    return value


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def fields(value: Any, path: str, known: str, needed: str = "") -> dict[str, Any]:
    """An object whose members are all known and whose needed ones are there."""
    if not isinstance(value, dict):
        raise ConfigError(f"{path or 'keys.json'}: must be an object")
    for name in value:
        if name not in known.split() + needed.split():
            raise ConfigError(f"{join(path, name)}: unknown field")
    for name in needed.split():
        if name not in value:
            raise ConfigError(f"{join(path, name)}: is required")
    return value


def whole(value: Any, path: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{path}: must be a whole number from {low} to {high}")
    return value


def to_micro(value: Any, path: str) -> int:
    """Micro-credits of an amount of credits; ConfigError beyond six decimals."""
    if type(value) is bool or not isinstance(value, (int, float, Decimal)):
        raise ConfigError(f"{path}: must be a number")
    amount = Decimal(str(value))
    if not amount.is_finite() or not 0 <= amount <= 10**9:
        raise ConfigError(f"{path}: must be a number from 0 to 1000000000")
    micro = amount * MICRO
    if micro != micro.to_integral_value():
        raise ConfigError(f"{path}: has more than six decimals")
    return int(micro)


def typed_amount(text: str, path: str) -> int:
    """Micro-credits of an amount typed on the command line."""
    try:
        return to_micro(Decimal(text), path)
    except InvalidOperation:
        raise ConfigError(f"{path}: must be a number") from None


def to_credits(micro: int) -> int | float:
    """Micro-credits as the number of credits that JSON and people are shown."""
    return micro // MICRO if micro % MICRO == 0 else micro / MICRO


def parse_limits(value: Any, path: str, common: Limits | None = None) -> Limits:
    """Limits of this object; what it leaves out is `common` (60/minute, 10)."""
    value = fields(value, path, "rate concurrent")
    rate = value.get("rate", common.rate if common else "60/minute")
    concurrent = value.get("concurrent", common.concurrent if common else 10)
    try:
        items = tuple(parse_many(rate))
    except (ValueError, TypeError):
        raise ConfigError(f"{path}.rate: must read like '60/minute'") from None
    for item in items:
        whole(item.amount, f"{path}.rate", 1, MAX_RATE)
        whole(item.get_expiry(), f"{path}.rate (seconds)", 1, 366 * DAY)
    return Limits(rate, items, whole(concurrent, f"{path}.concurrent", 1, 100_000))


def parse_price(value: Any, path: str) -> Price:
    """A price: micro-credits per million tokens are pico-credits per token."""
    value = fields(value, path, "input cached output image request")
    if not value:
        raise ConfigError(f"{path}: names no price (0 is one)")
    parts = {}
    for name, amount in value.items():
        micro = to_micro(amount, f"{path}.{name}")
        parts[name] = micro * (PICO if name in ("image", "request") else 1)
    parts.setdefault("cached", parts.get("input", 0))
    return Price(**parts)


def from_environment(text: str) -> tuple[str, tuple[str, ...]]:
    """`text` with every $NAME replaced, and the names that are not set."""
    missing = []

    def value(match: re.Match) -> str:
        found = os.environ.get(match[1], "")
        if not found:
            missing.append(match[1])
        return found

    return re.sub(r"\$([A-Za-z_][A-Za-z0-9_]*)", value, text), tuple(missing)


def text_of(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{path}: must be a text")
    return value


def parse_upstream(name: str, value: Any, path: str) -> UpstreamConfig:
    value = fields(value, path, "key", needed="url")
    try:
        url = urlsplit(value["url"])
        host, port = url.hostname or "", url.port
    except (ValueError, TypeError, AttributeError):
        raise ConfigError(f"{path}.url: must be a URL") from None
    dialect, _, scheme = str(url.scheme).rpartition("+")
    if url.scheme == "echo":
        dialect, scheme = "echo", "http"
    if dialect not in DIALECTS or scheme not in ("http", "https"):
        raise ConfigError(
            f"{path}.url: must begin with https:// or a dialect"
            f" ({', '.join(f'{name}+https://' for name in DIALECTS if name)})"
        )
    if dialect != "echo" and not host:
        raise ConfigError(f"{path}.url: names no host")
    if not re.fullmatch(r"[\w.:-]*", host, re.ASCII):
        raise ConfigError(f"{path}.url: the host must be ASCII")
    if not re.fullmatch(r"[!-~]*", url.path):
        raise ConfigError(f"{path}.url: the path must be printable ASCII")
    if url.username or url.query or url.fragment:
        raise ConfigError(f"{path}.url: takes no user, query or fragment")
    key, missing = from_environment(text_of(value.get("key", ""), f"{path}.key"))
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{path}.key: must be printable ASCII")
    secure = scheme == "https"
    port = port or (443 if secure else 80)
    base = url.path.rstrip("/")
    return UpstreamConfig(name, dialect, secure, host, port, base, key, missing)


def plain(value: Any, path: str) -> Any:
    """JSON with floats for decimals, as it will be forwarded."""
    try:
        floats = json.loads(json.dumps(value, default=float))
        return json.loads(json.dumps(floats, allow_nan=False))
    except ValueError:
        raise ConfigError(f"{path}: a number is too large") from None


def parse_model(
    id: str, value: Any, path: str, upstreams: dict[str, UpstreamConfig]
) -> Model:
    value = fields(value, path, "about defaults max_output", needed="upstream price")
    names = value["upstream"]
    names = names if isinstance(names, list) and names else [names]
    routes = []
    for text in names:
        upstream, slash, upstream_id = text_of(text, f"{path}.upstream").partition("/")
        if not slash or not upstream_id:
            raise ConfigError(f"{path}.upstream: must read like 'name/id'")
        if upstream not in upstreams:
            raise ConfigError(f"{path}.upstream: no upstream is named '{upstream}'")
        routes.append((upstreams[upstream], upstream_id))
    defaults = value.get("defaults", {})
    if not isinstance(defaults, dict) or {"model", "n", "best_of"} & {*defaults}:
        raise ConfigError(f"{path}.defaults: must be an object without 'model' or 'n'")
    longest = value.get("max_output", DEFAULT_MAX_OUTPUT)
    return Model(
        printable_name(id, path, 200),
        tuple(routes),
        parse_price(value["price"], f"{path}.price"),
        text_of(value.get("about", ""), f"{path}.about"),
        plain(defaults, f"{path}.defaults"),
        whole(longest, f"{path}.max_output", 1, MAX_TOKENS),
    )


def parse_account(
    id: str, value: Any, path: str, limits: Limits, models: dict[str, Model]
) -> tuple[Account, dict[str, str]]:
    """The account, and its keys: name -> the key or sha256:<hex>."""
    value = fields(value, path, "credits keys models limits admin")
    allowed = value.get("models")
    if allowed is not None:
        if not isinstance(allowed, list):
            raise ConfigError(f"{path}.models: must be a list")
        for name in allowed:
            if not isinstance(name, str) or name not in models:
                raise ConfigError(f"{path}.models: no model is named {name!r}")
        allowed = frozenset(allowed)
    if type(value.get("admin", False)) is not bool:
        raise ConfigError(f"{path}.admin: must be true or false")
    account = Account(
        account_name(id, path),
        parse_limits(value.get("limits", {}), f"{path}.limits", limits),
        to_micro(value.get("credits", 0), f"{path}.credits"),
        allowed,
        value.get("admin", False),
    )
    keys = value.get("keys", {})
    if not isinstance(keys, dict):
        raise ConfigError(f"{path}.keys: must be an object")
    return account, keys


def parse_key(account: Account, name: str, value: Any, path: str) -> Key:
    """A declared key; only its hash and a hint are kept."""
    printable_name(name, path)
    if text_of(value, path).startswith("sha256:"):
        hash, hint = value[7:].lower(), "sha256"
        if not re.fullmatch("[0-9a-f]{64}", hash):
            raise ConfigError(f"{path}: sha256: takes 64 hexadecimal digits")
    elif BEARER.fullmatch(value):
        hash, hint = sha256(value), key_hint(value)
    else:
        raise ConfigError(f"{path}: must be 4 to 200 characters without blanks")
    return Key(key_id(hash), name, account.id, hash, hint, account.admin)


def demo_key(
    account: Account, text: str, models: dict[str, Model]
) -> tuple[str, str] | None:
    """(key, model) if this key is public by design: it reaches nothing but echo."""
    if not account.models or account.admin or text.startswith("sha256:"):
        return None
    for name in account.models:
        if any(upstream.dialect != "echo" for upstream, _ in models[name].routes):
            return None
    return text, sorted(account.models)[0]


def parse_config(document: Any) -> Config:
    """The whole of keys.json; raises ConfigError with the path of what is wrong."""
    known = "limits accounts upstreams models"
    document = fields(document, "", known)
    for section in known.split():
        if not isinstance(document.get(section, {}), dict):
            raise ConfigError(f"{section}: must be an object")
    limits = parse_limits(document.get("limits", {}), "limits")
    upstreams = {
        name: parse_upstream(name, value, f"upstreams.{name}")
        for name, value in document.get("upstreams", {}).items()
    }
    models = {
        name: parse_model(name, value, f"models.{name}", upstreams)
        for name, value in document.get("models", {}).items()
    }
    accounts: dict[str, Account] = {}
    keys = Keys(accounts)
    demo = None
    for id, value in document.get("accounts", {}).items():
        path = f"accounts.{id}"
        account, texts = parse_account(id, value, path, limits, models)
        accounts[id] = account
        for name, text in texts.items():
            key = parse_key(account, name, text, f"{path}.keys.{name}")
            if key.id in keys:
                raise ConfigError(f"{path}.keys.{name}: is declared twice")
            keys.add(key)
            demo = demo or demo_key(account, text, models)
    return Config(limits, accounts, keys, models, int(time.time()), demo)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a member that stands twice is refused, not dropped."""
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a member stands twice in one object")
    return out


class ConfigFile:
    """keys.json on disk: the last good version, read again when it changes."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._seen = self._stat()
        self.current = self._read()

    def refresh(self) -> str | None:
        """Reads a changed file; returns what was wrong with it, once."""
        seen = self._stat()
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            self.current = self._read()
        except ConfigError as error:
            return str(error)
        return None

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _read(self) -> Config:
        try:
            text = self.path.read_bytes().decode()
            document = json.loads(text, parse_float=Decimal, object_pairs_hook=unique)
        except OSError as error:
            reason = error.strerror or "cannot be read"
            raise ConfigError(f"{self.path.name}: {reason}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{self.path.name}: is not UTF-8") from None
        except json.JSONDecodeError as error:
            reason = f"line {error.lineno}: {error.msg}"
            raise ConfigError(f"{self.path.name}: {reason}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self.path.name}: {error}") from None
        return parse_config(document)


# Ledger ------------------------------------------------------------------------------

BUCKETS = (5, 25, 100, 250, 500, 1000, 2500, 5000, 15_000, 60_000, 300_000)  # ms
IDENTITY = ("user_version", "application_id")  # random numbers in the file's header
OPEN, SETTLED, RELEASED = 0, 1, 2  # a request's row: a hold resolves at most once

SCHEMA = """
CREATE TABLE meta(name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE accounts(
    id TEXT PRIMARY KEY, made INTEGER NOT NULL, created INTEGER NOT NULL,
    granted INTEGER NOT NULL DEFAULT 0, spent INTEGER NOT NULL DEFAULT 0,
    held INTEGER NOT NULL DEFAULT 0, lost INTEGER NOT NULL DEFAULT 0,
    CHECK (granted >= 0 AND spent >= 0 AND held >= 0 AND lost >= 0)
) STRICT, WITHOUT ROWID;
CREATE TABLE grants(
    id INTEGER PRIMARY KEY, account TEXT NOT NULL, amount INTEGER NOT NULL,
    note TEXT NOT NULL, created INTEGER NOT NULL
) STRICT;
CREATE TABLE keys(
    id TEXT PRIMARY KEY, account TEXT NOT NULL, name TEXT NOT NULL, hint TEXT NOT NULL,
    hash TEXT, admin INTEGER NOT NULL, created INTEGER, used INTEGER, revoked INTEGER
) STRICT, WITHOUT ROWID;
CREATE INDEX keys_account ON keys(account);
CREATE TABLE requests(
    account TEXT NOT NULL, id TEXT NOT NULL, key TEXT NOT NULL, model TEXT NOT NULL,
    path TEXT NOT NULL, stream INTEGER NOT NULL, slot INTEGER NOT NULL,
    state INTEGER NOT NULL, hold INTEGER NOT NULL, cost INTEGER NOT NULL DEFAULT 0,
    lost INTEGER NOT NULL DEFAULT 0, input INTEGER NOT NULL DEFAULT 0,
    cached INTEGER NOT NULL DEFAULT 0, output INTEGER NOT NULL DEFAULT 0,
    images INTEGER NOT NULL DEFAULT 0, estimated INTEGER NOT NULL DEFAULT 0,
    status INTEGER NOT NULL DEFAULT 0, created INTEGER NOT NULL,
    ttfb INTEGER, duration INTEGER, PRIMARY KEY (account, id)
) STRICT, WITHOUT ROWID;
CREATE INDEX requests_open ON requests(key) WHERE state = 0;
CREATE TABLE usage(
    account TEXT NOT NULL, day INTEGER NOT NULL, model TEXT NOT NULL,
    requests INTEGER NOT NULL, input INTEGER NOT NULL, cached INTEGER NOT NULL,
    output INTEGER NOT NULL, images INTEGER NOT NULL, cost INTEGER NOT NULL,
    PRIMARY KEY (account, day, model)
) STRICT, WITHOUT ROWID;
CREATE TABLE tallies(
    model TEXT NOT NULL, kind TEXT NOT NULL, place INTEGER NOT NULL,
    requests INTEGER NOT NULL, total INTEGER NOT NULL, PRIMARY KEY (model, kind, place)
) STRICT, WITHOUT ROWID;
CREATE TABLE windows(key TEXT PRIMARY KEY, hits BLOB NOT NULL) STRICT, WITHOUT ROWID;

-- The sums follow the rows, whoever writes them: they cannot diverge.
CREATE TRIGGER opened AFTER INSERT ON requests BEGIN
    INSERT INTO accounts(id, made, created, held)
        VALUES (NEW.account, 0, NEW.created / 1000, NEW.hold)
        ON CONFLICT DO UPDATE SET held = held + excluded.held;
    UPDATE keys SET used = NEW.created / 1000
        WHERE id = NEW.key AND coalesce(used, 0) < NEW.created / 1000 - 60;
END;
CREATE TRIGGER resolved AFTER UPDATE OF state ON requests WHEN OLD.state = 0 BEGIN
    UPDATE accounts SET held = held - OLD.hold, spent = spent + NEW.cost,
        lost = lost + NEW.lost WHERE id = NEW.account;
    INSERT INTO tallies SELECT * FROM (VALUES (NEW.model, 'status', NEW.status, 1, 0),
        (NEW.model, 'ttfb', @place(NEW.ttfb), 1, NEW.ttfb),
        (NEW.model, 'duration', @place(NEW.duration), 1, NEW.duration))
        WHERE column5 IS NOT NULL ON CONFLICT DO UPDATE
        SET requests = requests + excluded.requests, total = total + excluded.total;
    INSERT INTO usage SELECT NEW.account, NEW.created / 86400000, NEW.model, 1,
        NEW.input, NEW.cached, NEW.output, NEW.images, NEW.cost WHERE NEW.state = 1
        ON CONFLICT DO UPDATE SET requests = requests + 1,
        input = input + excluded.input, cached = cached + excluded.cached,
        output = output + excluded.output, images = images + excluded.images,
        cost = cost + excluded.cost;
END;
"""


def ceil_micro(pico: int) -> int:
    return -(-pico // PICO)


@dataclass(frozen=True, slots=True)
class Quote:
    """The most a request can cost: `fixed` pico-credits and `token` of them for each
    of at most `tokens` output tokens of each of its `choices`."""

    fixed: int
    token: int
    tokens: int
    choices: int = 1

    def hold(self, tokens: int) -> int:
        """Micro-credits that cover `tokens` output tokens a choice."""
        return ceil_micro(self.fixed + self.token * tokens * self.choices)

    def affordable(self, available: int) -> int:
        """Output tokens a choice that `available` micro-credits pay for; -1: none."""
        left = available * PICO - self.fixed
        if left < 0:
            return -1
        if not self.token * self.tokens:
            return self.tokens
        return min(self.tokens, left // (self.token * self.choices)) or -1


@dataclass(frozen=True, slots=True)
class Lease:
    """A committed hold: the open row of a request, and what it may use."""

    id: str
    account: str
    key: str
    declared: int
    hold: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Charge:
    """How a request ended: its cost in micro-credits and what the row records."""

    status: int
    cost: int = 0
    input: int = 0
    cached: int = 0
    output: int = 0
    images: int = 0
    estimated: bool = False
    ttfb: int | None = None
    duration: int | None = None


def schema() -> str:
    """SCHEMA with the place of a duration in BUCKETS as an expression."""
    steps = "".join(f" WHEN \\1 <= {bound} THEN {i}" for i, bound in enumerate(BUCKETS))
    case = rf"CASE{steps} ELSE {len(BUCKETS)} END"
    return re.sub(r"@place\((.*?)\)", case, SCHEMA)


def new_request_id() -> str:
    """Unique, and sorted by time so that the ledger grows at its end."""
    return f"req_{time.time_ns() // 10**6:011x}{random.getrandbits(52):013x}"


FLOCK = struct.Struct("hhqqi")


class FileLock:
    """Byte locks of one file, between processes; the kernel drops a dead one's.

    Byte 0 is the writer's, 1 to MAX_WORKERS are the workers' slots, the one after them
    is the speaker's. The file's first page is memory that all processes share: the
    ledger's mark and, behind it, a version that changes whenever keys do.
    """

    def __init__(self, path: str):
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if os.fstat(self._fd).st_size < mmap.PAGESIZE:
            os.ftruncate(self._fd, mmap.PAGESIZE)
        self._shared = mmap.mmap(self._fd, mmap.PAGESIZE)

    def take(self, byte: int) -> bool:
        return self._set(fcntl.F_WRLCK, byte)

    def drop(self, byte: int) -> None:
        self._set(fcntl.F_UNLCK, byte)

    def mark(self) -> bytes:
        """What was written into the file: the id of the ledger made beside it."""
        return self._shared[:64].rstrip(b"\0")

    def write_mark(self, mark: bytes) -> None:
        # Not through the map: a page that a full disk has no block for is a SIGBUS.
        os.pwrite(self._fd, mark.ljust(64, b"\0"), 0)
        os.fsync(self._fd)

    def version(self) -> bytes:
        """Of the keys: another one after any of them has changed."""
        return self._shared[64:80]

    def change_version(self) -> None:
        self._shared[64:80] = secrets.token_bytes(16)

    def close(self) -> None:
        self._shared.close()
        os.close(self._fd)

    def _set(self, kind: int, byte: int) -> bool:
        # Linux's locks of an open file: POSIX ones vanish as soon as the process
        # closes any other descriptor of the file (fcntl(2)), as `check` would.
        try:
            lock = FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, lock)
        except OSError:
            return False
        return True


class Turn:
    """What one thread wants done, and the error that it ended with."""

    __slots__ = ("error", "done", "lock")

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.done, self.lock = False, threading.Lock()
        self.lock.acquire()

    def check(self) -> None:
        """Raises the error; keeps it no longer, its traceback would keep the turn."""
        if self.error is not None:
            try:
                raise self.error
            finally:
                self.error = None


class Group:
    """Work that whichever thread comes first does for all that wait for it.

    Each of the others is woken by itself. Were one lock handed from thread to thread,
    each would wait for the interpreter once for every thread before it: of 32 clients
    of busy workers the last waited 115 ms for a commit, so it is 39.
    """

    def __init__(self, work: Callable[[list], None]):
        self._work, self._lock = work, threading.Lock()
        self._waiting: list[Turn] = []
        self._busy = False

    def do(self, turn: Turn) -> None:
        """Returns when the work was called with this turn, or raises its error."""
        with self._lock:
            turns, busy, self._busy = [turn], self._busy, True
            if busy:
                self._waiting.append(turn)
        if busy:
            turn.lock.acquire()
            if not turn.done:  # the next one to work
                with self._lock:
                    turns, self._waiting = self._waiting, []
        if not turn.done:
            try:
                self._work(turns)
            except BaseException as error:  # nobody's may look done
                for each in turns:
                    each.error = error
            self._end(turns)
        turn.check()

    def _end(self, turns: list[Turn]) -> None:
        """Has the next one work, and wakes those whose work is done."""
        with self._lock:
            self._busy = bool(self._waiting)
            if self._busy:
                self._waiting[0].lock.release()
        for turn in turns:
            turn.done = True
            turn.lock.release()


class Job(Turn):
    """One operation of a transaction, and its outcome."""

    __slots__ = ("operation", "single", "result", "number")

    def __init__(self, operation: Callable[[sqlite3.Connection], Any], single: bool):
        super().__init__()
        self.operation, self.single = operation, single
        self.result = None
        self.number = 0  # of the commit that holds it

    def run(self, db: sqlite3.Connection) -> None:
        """Runs it; a refusal is its outcome, what it wrote before stays."""
        self.error = None
        try:
            self.result = self.operation(db)
        except ProxyError as error:
            self.error = error


HOLD = """
INSERT INTO requests(account, id, key, model, path, stream, slot, state, created, hold)
SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, 0, ?8, ?10 WHERE
    (SELECT count(*) FROM requests WHERE key = ?3 AND state = 0) < ?9
    AND coalesce((SELECT granted - spent - held FROM accounts WHERE id = ?1), 0) >= ?11
"""


def affordable(db: sqlite3.Connection, key: Key, account: Account, quote: Quote) -> int:
    """The output tokens a choice that can be paid for; raises why none can."""
    left, running = db.execute(
        "SELECT (SELECT granted - spent - held FROM accounts WHERE id = ?),"
        " (SELECT count(*) FROM requests WHERE key = ? AND state = 0)",
        (account.id, key.id),
    ).fetchone()
    most = account.limits.concurrent
    if running >= most:
        raise RateLimited(f"Too many requests at once: {most} per key.", 1)
    tokens = quote.affordable((left or 0) + account.credits)
    if tokens < 0:
        raise InsufficientCredits("The account has no credits left for this.")
    return tokens


class Ledger:
    """Credits, leases, keys and windows in one SQLite file, for all workers.

    Threads hand their operation to whichever of them holds the writer; it commits
    all that wait in one transaction. A lock between processes around each makes
    waiting short and excludes SQLite's WAL-reset race (before 3.51.3). Commits need
    no fsync under that lock: the ones that must be durable share one after it.
    Raises LedgerUnavailable for every trouble with the file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self.slot = 0
        self._lock = FileLock(self.path + "-lock")
        self._writes, self._flushes = Group(self._commit), Group(self._flush)
        self._writer, self._reader = threading.Lock(), threading.Lock()
        self._syncer = threading.Lock()
        self._leader = 0  # the thread that is running operations
        self._db: sqlite3.Connection | None = None
        self._read_db: sqlite3.Connection | None = None
        self._wal = -1
        self._commits = self._synced = 0
        self._keys: set[str] = set()  # ids that have a row
        self._ring: dict[str, tuple] | None = None
        self._ring_version = b""
        self._unsettled: deque[tuple[Lease, Charge]] = deque()
        self._distrusted = False  # a failed fsync may have lost what it says is clean
        self._create()
        self._inode = self._stat()

    # The file

    def _create(self) -> None:
        """Makes the file where there was none, never again where there was one."""
        with self._exclusive():
            mark = self._lock.mark()
            if os.path.exists(self.path):
                if not mark:
                    self._adopt()
                return self._verify()
            if mark:
                raise LedgerUnavailable(
                    f"{self.path} is gone; restore it, or delete {self.path}-lock"
                    " as well to start a new ledger"
                )
            # Under another name first: half a ledger would be refused for ever.
            new = self.path + "-new"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new)
            os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            try:
                db = self._connect(new)
                db.execute("PRAGMA journal_mode = WAL")
                for name in IDENTITY:
                    db.execute(f"PRAGMA {name} = {secrets.randbelow(2**31)}")
                made = "INSERT INTO meta VALUES ('boot', '');"
                db.executescript(f"BEGIN; {schema()} {made} COMMIT;")
                db.close()  # and so into the file: no log is left
                os.rename(new, self.path)
            except sqlite3.Error:
                raise LedgerUnavailable(f"{self.path} cannot be made") from None
            self._lock.write_mark(self._identity())

    def _adopt(self) -> None:
        """Takes a ledger that was put where none was, or whose maker died."""
        try:
            with contextlib.closing(self._connect()) as db:
                db.execute("SELECT 1 FROM meta").fetchall()
        except sqlite3.Error as error:
            raise LedgerUnavailable(f"{self.path} is no ledger: {error}") from None
        self._lock.write_mark(self._identity())

    def _identity(self) -> bytes:
        """The ids in the file's header, without the log that another ledger may have
        left in this place.

        Read by SQLite, never by open(): closing any other descriptor of the file drops
        this process's locks on it (fcntl(2)), and the next program that closes the
        ledger would take itself for the last and delete the log under the workers.
        """
        try:
            with contextlib.closing(self._sqlite(self.path, "immutable=1")) as db:
                ids = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in IDENTITY]
        except sqlite3.Error:
            return b"no ledger"
        return "{:08x}{:08x}".format(*ids).encode()

    @staticmethod
    def _sqlite(path: str, mode: str, **options: Any) -> sqlite3.Connection:
        quoted = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        return sqlite3.connect(f"file:{quoted}?{mode}", uri=True, **options)

    def _verify(self) -> None:
        if self._identity() != self._lock.mark():
            raise LedgerUnavailable(f"{self.path} is another ledger, or none")

    def _stat(self) -> tuple[int, int]:
        found = os.stat(self.path)
        return found.st_dev, found.st_ino

    def _in_place(self) -> None:
        """The file must be the one that was opened: to SQLite, a log beside another
        file is that file's own."""
        if self._stat() != self._inode:
            raise LedgerUnavailable(f"{self.path} was replaced")

    def _connect(self, path: str | None = None) -> sqlite3.Connection:
        """A connection to the file that is there; it is never made by opening."""
        db = self._sqlite(
            path or self.path,
            "mode=rw",
            timeout=LEDGER_TIMEOUT - 1,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=64,
        )
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA wal_autocheckpoint = 0")
        db.execute("PRAGMA cache_size = -512")  # KiB; emptied by other workers' writes
        return db

    def _open(self) -> sqlite3.Connection:
        """The writer's connection."""
        self._in_place()
        if self._db is None:
            self._verify()
            db = self._connect()
            db.execute("SELECT 1 FROM meta").fetchall()  # makes the log
            self._wal = os.open(self.path + "-wal", os.O_RDONLY | os.O_CLOEXEC)
            self._db = db
        return self._db

    def _close_writer(self) -> None:
        if self._db is not None:
            self._db.close()
            with self._syncer:
                os.close(self._wal)
                self._db, self._wal = None, -1

    def _acquire(self) -> None:
        """The lock between processes, polled for: it is held for a millisecond."""
        if self._lock.take(0):
            return
        deadline = time.monotonic() + LEDGER_TIMEOUT
        while not self._lock.take(0):
            if time.monotonic() > deadline:
                raise LedgerUnavailable("the lock is held by another process")
            time.sleep(LOCK_POLL)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        self._acquire()
        try:
            yield
        finally:
            self._lock.drop(0)

    # Reading and writing

    def write(
        self,
        operation: Callable[[sqlite3.Connection], Any],
        durable: bool = False,
        single: bool = False,
    ) -> Any:
        """Runs `operation` in a committed transaction and returns its result.

        `durable` returns only when the commit would survive a loss of power.
        Inside an operation it runs another one in the same transaction.
        `single`: it is one statement, which needs no BEGIN and COMMIT when it is
        alone (an upsert costs 6.4 µs of CPU then, 9.9 with them and a look before).
        """
        if self._leader == threading.get_ident():
            return operation(self._db)
        job = Job(operation, single)
        self._writes.do(job)
        if durable:
            self._sync(job.number)
        return job.result

    def _commit(self, jobs: list[Job]) -> None:
        with self._writer:
            self._commit_together(jobs)

    def _commit_together(self, jobs: list[Job]) -> None:
        """Commits the jobs together; if one breaks the rules, each alone."""
        try:
            self._acquire()
            try:
                db, self._leader = self._open(), threading.get_ident()
                self._transact(db, jobs)
            finally:
                self._leader = 0
                self._lock.drop(0)
        except sqlite3.IntegrityError:
            if len(jobs) > 1:
                for job in jobs:
                    self._commit_together([job])
                return
            jobs[0].error = LedgerUnavailable("a rule of the ledger was broken")
        except LedgerUnavailable as error:
            self._fail(jobs, error)
        except Exception as error:  # whatever it is, no job may look written
            self._fail(jobs, LedgerUnavailable(type(error).__name__ + f": {error}"))
        self._commits += 1
        for job in jobs:
            job.number = self._commits

    def _fail(self, jobs: list[Job], error: LedgerUnavailable) -> None:
        """The trouble of the file is every job's; the connection starts anew."""
        self._close_writer()
        for job in jobs:
            job.error = error

    @staticmethod
    def _transact(db: sqlite3.Connection, jobs: list[Job]) -> None:
        if len(jobs) == 1 and jobs[0].single:
            return jobs[0].run(db)
        db.execute("BEGIN IMMEDIATE")
        try:
            for job in jobs:
                job.run(db)
            db.execute("COMMIT")
        except BaseException:
            # After FULL or IOERR SQLite has rolled back by itself.
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def _sync(self, number: int) -> None:
        """Returns when the commit of this number is on the disk."""
        if self._synced < number or self._distrusted:
            self._flushes.do(Turn())

    def _flush(self, turns: list[Turn]) -> None:
        """Flushes the log once for all commits that are waiting for it."""
        reached = self._commits
        try:
            with self._syncer:
                os.fdatasync(self._wal)
        except OSError:
            self._distrusted = True
        if not self._distrusted:
            self._synced = reached
            return
        # After a failed fsync the kernel takes the lost pages for clean: only what is
        # written anew, into the file itself, is sure to be on the disk.
        with self._writer:
            reached = self._commits
            try:
                self._checkpoint("FULL")
                self._synced, self._distrusted = reached, False
            except (sqlite3.Error, OSError, LedgerUnavailable) as error:
                reason = f"checkpoint: {type(error).__name__}"
                for turn in turns:
                    turn.error = LedgerUnavailable(reason)

    def _checkpoint(self, mode: str) -> None:
        """Moves the log into the file while nobody writes; FULL: all of it."""
        with self._exclusive():
            sql = f"PRAGMA wal_checkpoint({mode})"
            ((busy, _, _),) = self._open().execute(sql).fetchall()
        if busy and mode == "FULL":
            raise LedgerUnavailable("a reader is in the way of the checkpoint")

    def read(self, sql: str, *values: Any) -> list[tuple]:
        """All rows of one short query."""
        try:
            with self._reader:
                self._in_place()
                if self._read_db is None:
                    self._verify()
                    self._read_db = self._connect()
                return self._read_db.execute(sql, values).fetchall()
        except (sqlite3.Error, OSError) as error:
            self._read_db = None
            raise LedgerUnavailable(f"{type(error).__name__}: {error}") from None

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own on one state of the ledger, for long queries."""
        try:
            self._in_place()
            self._verify()
            with contextlib.closing(self._connect()) as db:
                db.execute("BEGIN")
                yield db
        except (sqlite3.Error, OSError) as error:
            raise LedgerUnavailable(f"{type(error).__name__}: {error}") from None

    # Workers

    def claim(self) -> None:
        """Takes a free worker slot and clears what its former owner left."""
        for slot in range(1, MAX_WORKERS + 1):
            if self._lock.take(slot):
                self.slot = slot
                break
        else:
            raise LedgerUnavailable("no free worker slot")
        self._clear(slot)
        self.write(self._same_boot)

    @staticmethod
    def _same_boot(db: sqlite3.Connection) -> None:
        """Windows are in monotonic time, which means nothing after a reboot."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return
        sql = "UPDATE meta SET value = ? WHERE name = 'boot' AND value != ?"
        if db.execute(sql, (boot, boot)).rowcount:
            db.execute("DELETE FROM windows")

    def speaks(self) -> bool:
        """Whether it is this worker that tells what concerns all of them."""
        return self._lock.take(MAX_WORKERS + 1)

    def sweep(self) -> None:
        """Releases the holds of workers that have died."""
        for (slot,) in self.read("SELECT DISTINCT slot FROM requests WHERE state = 0"):
            if slot != self.slot and self._lock.take(slot):
                try:
                    self._clear(slot)
                finally:
                    self._lock.drop(slot)

    def _clear(self, slot: int) -> None:
        def operation(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE requests SET state = 2 WHERE state = 0 AND slot = ?", (slot,)
            )

        self.write(operation)

    def tally(self, counts: Mapping[int, int]) -> None:
        """Adds requests that were refused, by status; they have no model."""
        if counts:
            self.write(
                lambda db: db.executemany(
                    "INSERT INTO tallies VALUES ('', 'status', ?, ?, 0) ON CONFLICT"
                    " DO UPDATE SET requests = requests + excluded.requests",
                    counts.items(),
                )
            )

    # Holds

    def admit(
        self,
        request_id: str,
        key: Key,
        account: Account,
        quote: Quote,
        model: str,
        path: str,
        stream: bool,
        count: Callable[[], None] = lambda: None,
    ) -> Lease:
        """Commits a hold, or raises RateLimited or InsufficientCredits.

        `count` is called first, in the same transaction: what it writes is committed
        even where the hold is refused, and it may refuse as well.
        """
        row = (account.id, request_id, key.id, model, path, stream, self.slot)
        row += (int(time.time() * 1000), account.limits.concurrent)

        def lease(db: sqlite3.Connection, tokens: int) -> Lease | None:
            hold, declared = quote.hold(tokens), account.credits
            if hold > MAX_HOLD:
                return None
            if not db.execute(HOLD, (*row, hold, hold - declared)).rowcount:
                return None
            return Lease(request_id, account.id, key.name, declared, hold, tokens)

        def operation(db: sqlite3.Connection) -> Lease:
            count()
            if key.id not in self._keys:
                db.execute(
                    "INSERT INTO keys(id, account, name, hint, admin)"
                    " VALUES (?, ?, ?, ?, 0) ON CONFLICT DO NOTHING",
                    (key.id, account.id, key.name, key.hint),
                )
            whole = lease(db, quote.tokens)
            return whole or lease(db, affordable(db, key, account, quote))

        held = self.write(operation)
        self._keys.add(key.id)
        return held

    def settle(self, lease: Lease, charge: Charge) -> None:
        """Turns a hold into its charge, once; durable when it returns.

        A cost above the hold is charged as far as the account can pay.
        """

        def operation(db: sqlite3.Connection) -> None:
            cost = charge.cost
            if cost > lease.hold:
                (left,) = db.execute(
                    "SELECT granted - spent - held FROM accounts WHERE id = ?",
                    (lease.account,),
                ).fetchone()
                cost = min(cost, lease.hold + max(0, left + lease.declared))
            self._resolve(db, lease, SETTLED, cost, charge)

        self.write(operation, durable=True, single=charge.cost <= lease.hold)

    def release(self, lease: Lease, charge: Charge) -> None:
        """Gives a hold back: nothing is charged. Needs no fsync, a lost release is
        made again by whoever clears this worker's slot."""
        self.write(
            lambda db: self._resolve(db, lease, RELEASED, 0, charge), single=True
        )

    @staticmethod
    def _resolve(
        db: sqlite3.Connection, lease: Lease, state: int, cost: int, charge: Charge
    ) -> None:
        """The one place where a hold ends; one that has ended is left alone."""
        db.execute(
            "UPDATE requests SET state = ?, cost = ?, lost = ?, input = ?, cached = ?,"
            " output = ?, images = ?, estimated = ?, status = ?, ttfb = ?, duration = ?"
            " WHERE account = ? AND id = ? AND state = 0",
            (state, cost, max(0, charge.cost - cost), charge.input, charge.cached)
            + (charge.output, charge.images, charge.estimated, charge.status)
            + (charge.ttfb, charge.duration, lease.account, lease.id),
        )

    def resolve_later(self, lease: Lease, charge: Charge) -> None:
        """Keeps a hold's end that could not be written, for `retry`."""
        self._unsettled.append((lease, charge))

    def retry(self) -> None:
        """Writes the ends that failed before; raises at the first that fails again."""
        while self._unsettled:
            lease, charge = self._unsettled[0]
            self.resolve(lease, charge)
            self._unsettled.popleft()

    def resolve(self, lease: Lease, charge: Charge) -> None:
        """Settles a charge, or releases where there is none."""
        free = not (charge.cost or charge.input or charge.output or charge.images)
        (self.release if free and charge.status != 200 else self.settle)(lease, charge)

    # Accounts and keys

    def find_key(self, hash: str) -> tuple | None:
        """(account, name, hint, admin, revoked, hash, made) of the key with this hash;
        `made`: for an account made at run time, not for a former one of that name.

        All keys made here or revoked are kept in memory; a version that is shared
        with all processes tells when to read them again.
        """
        version = self._lock.version()
        if self._ring is None or version != self._ring_version:
            rows = self.read(
                "SELECT k.id, k.account, k.name, k.hint, k.admin, k.revoked, k.hash,"
                " a.made AND k.created >= a.made"
                " FROM keys k LEFT JOIN accounts a ON a.id = k.account"
                " WHERE k.hash IS NOT NULL OR k.revoked IS NOT NULL"
            )
            self._ring = {id: row for id, *row in rows}
            self._ring_version = version
        return self._ring.get(key_id(hash))

    def forget_keys(self) -> None:
        """Has them read again: whoever changed one may have died before saying so."""
        self._ring = None

    def _write_keys(self, operation: Callable[[sqlite3.Connection], Any]) -> Any:
        try:
            return self.write(operation, durable=True)
        finally:
            self._lock.change_version()

    def make_account(self, id: str) -> bool:
        """Makes the account at run time; False if there is one already."""

        def operation(db: sqlite3.Connection) -> bool:
            row = db.execute("SELECT made FROM accounts WHERE id = ?", (id,)).fetchone()
            if row and row[0]:
                return False
            db.execute(
                "INSERT INTO accounts(id, made, created) VALUES (?1, ?2, ?2)"
                " ON CONFLICT DO UPDATE SET made = excluded.made",
                (id, int(time.time())),
            )
            return True

        return self._write_keys(operation)

    def make_key(self, account: str, name: str, admin: bool = False) -> tuple[str, Key]:
        """(the new key's text, the key); the text is kept nowhere."""
        text = "sk-" + secrets.token_urlsafe(32)
        hash = sha256(text)
        hint = key_hint(text)
        key = Key(key_id(hash), name, account, hash, hint, admin, "proxy.db")
        row = (key.id, account, name, hint, hash, admin, int(time.time()))
        self._write_keys(
            lambda db: db.execute(
                "INSERT INTO keys(id, account, name, hint, hash, admin, created)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            )
        )
        return text, key

    def revoke(self, key: Key) -> None:
        """Revokes a key of either file, for ever."""
        now = int(time.time())
        self._write_keys(
            lambda db: db.execute(
                "INSERT INTO keys(id, account, name, hint, admin, revoked)"
                " VALUES (?, ?, ?, ?, 0, ?) ON CONFLICT DO UPDATE"
                " SET revoked = coalesce(revoked, excluded.revoked)",
                (key.id, key.account, key.name, key.hint, now),
            )
        )

    def grant(self, account: str, amount: int, note: str) -> None:
        """Adds micro-credits to an account's own."""

        def operation(db: sqlite3.Connection) -> None:
            now = int(time.time())
            db.execute(
                "INSERT INTO grants(account, amount, note, created)"
                " VALUES (?, ?, ?, ?)",
                (account, amount, note, now),
            )
            db.execute(
                "INSERT INTO accounts(id, made, created, granted) VALUES (?, 0, ?, ?)"
                " ON CONFLICT DO UPDATE SET granted = granted + excluded.granted",
                (account, now, amount),
            )

        self.write(operation, durable=True)

    def made(self, id: str) -> bool | None:
        """Whether the account was made at run time; None if it has no row."""
        rows = self.read("SELECT made FROM accounts WHERE id = ?", id)
        return bool(rows[0][0]) if rows else None

    # Proof and upkeep

    def check(self, declared: Callable[[str], int | None]) -> list[str]:
        """Re-sums everything in one read transaction; what does not add up.

        `declared`: the credits that keys.json grants an account; None for one that
        it does not know (any more), whose grants are not known then.
        """
        with self.snapshot() as db:
            pages = db.execute("PRAGMA quick_check")
            wrong = [text for (text,) in pages if text != "ok"]
            rows = db.execute(
                "SELECT a.id, made, granted, spent, held, a.lost, coalesce(g.s, 0),"
                " coalesce(r.cost, 0), coalesce(r.hold, 0), coalesce(r.lost, 0),"
                " coalesce(u.cost, 0)"
                " FROM accounts a LEFT JOIN (SELECT account, sum(amount) s FROM grants"
                " GROUP BY account) g ON g.account = a.id"
                " LEFT JOIN (SELECT account, sum(lost) lost,"
                " sum(CASE WHEN state = 1 THEN cost ELSE 0 END) cost,"
                " sum(CASE WHEN state = 0 THEN hold ELSE 0 END) hold"
                " FROM requests GROUP BY account) r ON r.account = a.id"
                " LEFT JOIN (SELECT account, sum(cost) cost FROM usage"
                " GROUP BY account) u ON u.account = a.id"
            ).fetchall()
            orphans = db.execute(
                "SELECT count(*) FROM (SELECT account FROM requests UNION ALL"
                " SELECT account FROM grants UNION ALL SELECT account FROM usage)"
                " WHERE account NOT IN (SELECT id FROM accounts)"
            ).fetchone()[0]
        if orphans:
            wrong.append(f"{orphans} rows belong to no account")
        for id, made, granted, spent, held, lost, *sums in rows:
            kept = {"granted": granted, "spent": spent, "held": held}
            kept |= {"lost": lost, "usage": spent}
            for (name, amount), total in zip(kept.items(), sums):
                if amount != total:
                    wrong.append(f"{id}: {name} is {amount}, its rows sum to {total}")
            own = declared(id)
            own = 0 if own is None and made else own
            if own is not None and granted + own - spent - held < 0:
                wrong.append(f"{id}: spent and held exceed what was granted")
        return wrong

    def checkpoint(self) -> None:
        """Moves a long write-ahead log into the file, while nobody writes."""
        try:
            if os.stat(self.path + "-wal").st_size < CHECKPOINT_BYTES:
                return
        except OSError:
            return
        # What is on disk already need not be flushed while the others wait.
        self._sync(self._commits + 1)
        with self._writer, contextlib.suppress(sqlite3.Error, OSError):
            self._checkpoint("PASSIVE")

    def close(self) -> None:
        """Gives the slot back; what is left open there is the next owner's to clear."""
        with self._writer, self._reader:
            self._close_writer()
            if self._read_db is not None:
                self._read_db.close()
                self._read_db = None
            self._lock.close()


# Limits ------------------------------------------------------------------------------

MOMENT = 8  # bytes
WINDOW = "SELECT hits FROM windows WHERE key = ?"


def monotonic_micro() -> int:
    return int(time.monotonic() * 10**6)


def moment(micro: int) -> bytes:
    return max(0, micro).to_bytes(MOMENT, "big")


class LedgerStorage(Storage, MovingWindowSupport):
    """Flask-Limiter's moving windows in the ledger: exact over all workers.

    A window is one row: the moments of its last `limit` hits, oldest first, each as
    eight bytes of monotonic microseconds, most significant first, so that SQL compares
    them. Whether one more fits is decided and written by one statement.
    """

    STORAGE_SCHEME = ["sqlite"]

    def __init__(self, uri: str | None = None, *, ledger: Ledger, **options: Any):
        super().__init__(uri, **options)
        self._ledger = ledger
        self._last = threading.local()

    @property
    def base_exceptions(self) -> tuple[type[Exception], ...]:
        return (LedgerUnavailable,)

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Adds `amount` hits unless `limit` of them are younger than `expiry` s."""
        if amount > limit:
            return False
        oldest = -MOMENT * (limit - amount + 1)

        def operation(db: sqlite3.Connection) -> tuple[bool, bytes, int]:
            now = monotonic_micro()
            since = moment(now - expiry * 10**6)
            rows = db.execute(
                "INSERT INTO windows VALUES (?1, ?2) ON CONFLICT DO UPDATE"
                " SET hits = substr(CAST(hits || excluded.hits AS BLOB), ?3)"
                " WHERE length(hits) < -?4 OR substr(hits, ?4, ?5) <= ?6"
                " RETURNING hits",
                (key, moment(now) * amount, -MOMENT * limit, oldest, MOMENT, since),
            ).fetchall()
            fits = bool(rows)
            rows = rows or db.execute(WINDOW, (key,)).fetchall()
            return fits, rows[0][0], now

        fits, hits, now = self._ledger.write(operation, single=True)
        self._last.window = key, *self._stats(hits, now, expiry)
        return fits

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """(monotonic start, hits) of the window; this thread's last one as it was."""
        last, start, count = getattr(self._last, "window", (None, 0.0, 0))
        if last == key:
            self._last.window = None, 0.0, 0
            return start, count
        rows = self._ledger.read(WINDOW, key)
        return self._stats(rows[0][0] if rows else b"", monotonic_micro(), expiry)

    @staticmethod
    def _stats(hits: bytes, now: int, expiry: int) -> tuple[float, int]:
        moments = array("Q", hits)
        if sys.byteorder == "little":
            moments.byteswap()
        old = bisect_right(moments, now - expiry * 10**6)
        start = moments[old] if old < len(moments) else now
        return start / 10**6, len(moments) - old

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        raise NotImplementedError("only moving windows are exact")

    get = get_expiry = incr

    def check(self) -> bool:
        return True

    def reset(self) -> int | None:
        return self._ledger.write(lambda db: db.execute("DELETE FROM windows").rowcount)

    def clear(self, key: str) -> None:
        sql = "DELETE FROM windows WHERE key = ?"
        self._ledger.write(lambda db: db.execute(sql, (key,)))


# Wire --------------------------------------------------------------------------------

STREAM_TYPE = "text/event-stream"
STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [^\r\n]*)?")
FRAMING = (b"transfer-encoding", b"content-length")
EVENT_END = re.compile(rb"(?:\r\n|\n|\r(?!\n)){2}")
LINE_END = re.compile(rb"\r\n|\n|\r")
# Possessive: a way back for each character would take 130 bytes of memory for it.
MODEL_NAME = re.compile(rb'(?<!\\)"model"\s*:\s*"((?:[^"\\]++|\\.)*+)"')
TEXT = re.compile(
    rb'"(?:content|reasoning_content|reasoning|text|arguments|delta|refusal|transcript'
    rb'|thinking|partial_json)"\s*:\s*"((?:[^"\\]++|\\.)*+)"'
)
DELTA = re.compile(rb'"delta"\s*:\s*"((?:[^"\\]++|\\.)*+)"')
DONE_PATHS = ("chat/completions", "completions")  # whose choices have a finish
LAST_EVENTS = ["response.completed", "response.incomplete", "response.failed"]
LAST_EVENTS += ["message_stop"]  # of /v1/messages
KEEP, DROP, LAST, FAIL = "keep", "drop", "last", "fail"  # what becomes of an event
DONE = b"data: [DONE]\n\n"


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError("a number is too large")
    return number


STRICT_JSON = json.JSONDecoder(
    parse_constant=refuse_constant, parse_float=finite, object_pairs_hook=unique
)
COMPACT_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def parse_json(data: bytes) -> dict[str, Any]:
    """A strict JSON object, or BadRequest: UTF-8 only, no NaN, nothing twice."""
    try:
        document = STRICT_JSON.decode(data.decode())
    except UnicodeDecodeError:
        raise BadRequest("The body is not UTF-8.") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise BadRequest(
            f"The body is no valid JSON: {error.msg} at {place}."
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise BadRequest(f"The body is no valid JSON: {reason}.") from None
    if not isinstance(document, dict):
        raise BadRequest("The body must be a JSON object.")
    return document


def to_json(document: Any) -> bytes:
    """Compact UTF-8; BadRequest for half of a surrogate pair, which has no UTF-8."""
    try:
        return COMPACT_JSON.encode(document).encode()
    except UnicodeEncodeError:
        raise BadRequest("The body holds half of a surrogate pair.") from None
    except RecursionError:  # read a few levels deeper than it can be written
        raise BadRequest("The body is no valid JSON: nested too deeply.") from None


def read_body(environ: dict[str, Any], limit: int = MAX_BODY) -> bytes:
    """The whole body of a request, bounded and as long as was announced."""
    kind = environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMediaType("Send 'Content-Type: application/json'.")
    announced = environ.get("CONTENT_LENGTH") or None
    if announced and (not announced.isdigit() or int(announced) > limit):
        raise TooLarge(f"The body may have at most {limit} bytes.")
    try:
        data = environ["wsgi.input"].read(int(announced or limit + 1))
    except Exception:
        # The server's parser names its errors itself (PEP 3333 names none).
        raise BadRequest("The body could not be read.") from None
    if len(data) > limit:
        raise TooLarge(f"The body may have at most {limit} bytes.")
    if announced and len(data) != int(announced):
        raise BadRequest("The body is shorter than its Content-Length.")
    return data


def has_small_body(environ: dict[str, Any]) -> bool:
    """Whether reading the body costs no more than refusing the request."""
    announced = environ.get("CONTENT_LENGTH") or ""
    return announced.isdigit() and len(announced) < 5


def message_text(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "\n".join(text for text in texts if isinstance(text, str))


def last_user_text(body: dict[str, Any]) -> str:
    """The text of the last user message, its text parts joined."""
    for message in reversed(body.get("messages", [])):
        if message.get("role") == "user":
            return message_text(message)
    return ""


def sse(document: Any) -> bytes:
    return b"data: " + to_json(document) + b"\n\n"


def event_data(event: bytes) -> bytes:
    """The joined `data` of one event (WHATWG HTML §9.2.6); empty for comments."""
    lines = [line for line in LINE_END.split(event) if line.startswith(b"data:")]
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines)


def json_object(data: bytes) -> dict[str, Any]:
    """The JSON object that an upstream sent, or an empty one for anything else."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def event_document(event: bytes) -> dict[str, Any]:
    """The JSON object that an event carries, or an empty one."""
    return json_object(event_data(event))


def has_value(block: bytes, name: bytes) -> bool:
    """Whether a member of this name is not null; quotes in a text are escaped."""
    count = block.count(name)
    nulls = block.count(name + b":null") if count else 0
    return count > nulls and count > nulls + block.count(name + b": null")


def is_notable(block: bytes) -> bool:
    """Whether an event of this block must be looked at; others pass by the block.

    By counting: regular expressions were 7% of the CPU of a stream.
    """
    return (
        b"[DONE]" in block
        or has_value(block, b'"usage"')
        or has_value(block, b'"finish_reason"')
        or b'"error"' in block
        or b'.completed"' in block
        or b'.incomplete"' in block
        or b'.failed"' in block
        or b'"message_stop"' in block
    )


class EventBuffer:
    """Cuts a stream of bytes into blocks of whole events, whatever its pieces."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []  # of the event that is not complete yet
        self._size, self._tail = 0, b""

    def feed(self, data: bytes) -> bytes:
        """All events, and lone comment lines, that are complete now.

        Raises UpstreamFailed when one grows over MAX_EVENT bytes.
        """
        if not self._pieces and data.endswith(b"\n\n"):
            return data
        if self._pieces:
            # Joining is put off until an event may end here: it would cost the square
            # of an event that comes in many pieces.
            end = LINE_END if self._pieces[0].startswith(b":") else EVENT_END
            if not end.search(self._tail + data):
                return self._keep(data)
            data = b"".join([*self._pieces, data])
        end = data.rfind(b"\n\n") + 2
        end = 0 if end == 1 else end
        if end != len(data):
            for match in EVENT_END.finditer(data, end):
                end = match.end()
            end = self._comments(data, end)
        self._pieces, self._size, self._tail = [], 0, b""
        if end != len(data):
            self._keep(data[end:])
        return data[:end]

    def _keep(self, data: bytes) -> bytes:
        self._pieces.append(data)
        self._tail = (self._tail + data)[-3:]
        self._size += len(data)
        if self._size > MAX_EVENT:
            raise UpstreamFailed("an event over 1 MB")
        return b""

    @staticmethod
    def _comments(data: bytes, end: int) -> int:
        """The end of the comment lines at `end`: they wait for nothing."""
        while data[end : end + 1] == b":":
            line_end = LINE_END.search(data, end)
            if not line_end:
                break
            end = line_end.end()
        return end

    def flush(self) -> bytes:
        """The last event where only its blank line is missing, else nothing."""
        rest = b"".join(self._pieces).rstrip(b"\r\n")
        self._pieces = []
        if event_data(rest) == b"[DONE]" or event_document(rest):
            return rest + b"\n\n"
        return b""


def split_events(block: bytes) -> Iterator[bytes]:
    """The events of a block, each with its blank line."""
    start = 0
    for match in EVENT_END.finditer(block):
        yield block[start : match.end()]
        start = match.end()
    if start < len(block):
        yield block[start:]


# Calls and prices --------------------------------------------------------------------

# What is billed without an answer that tells, or above the model's price.
UNSUPPORTED = {"background": True, "service_tier": "priority"}
EXPONENT = re.compile(rb"\d[eE]")
PATH = re.compile(r"[a-z0-9_]+(?:[-/][a-z0-9_]+)*")
CAPS = {"max_tokens", "max_completion_tokens", "max_output_tokens"}
CAPS |= {"n_predict", "num_predict", "max_new_tokens"}  # local servers' own names
CAP_OF_PATH = {"completions": "max_tokens", "responses": "max_output_tokens"}
NO_OUTPUT = {"embeddings", "moderations", "rerank"}
# Of a body, what the model reads besides its messages.
TEXT_MEMBERS = "prompt input instructions tools functions query documents".split()


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer used: tokens by class (`cached` is a part of `input`), images."""

    input: int = 0
    cached: int = 0
    output: int = 0
    images: int = 0
    estimated: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """One request as the client made it; `size` is its body's UTF-8 bytes."""

    path: str
    body: dict[str, Any]
    model: str
    stream: bool
    wants_usage: bool
    size: int

    @property
    def prompts(self) -> int:
        """How many prompts it holds: a list of token numbers is one, others a batch."""
        prompt = self.body.get("prompt")
        if self.path == "chat/completions" or not isinstance(prompt, list):
            return 1
        if not self.path.endswith("completions") or not prompt:
            return 1
        return 1 if isinstance(prompt[0], int) else len(prompt)

    @property
    def answers(self) -> int:
        """How many choices come back."""
        return self.prompts * (self.body.get("n") or 1)

    @property
    def choices(self) -> int:
        """How many choices are generated at the most."""
        return max(self.answers, self.prompts * (self.body.get("best_of") or 1))

    def text_size(self) -> int:
        """UTF-8 bytes of the text that the model is given."""
        messages = self.body.get("messages")
        messages = messages if isinstance(messages, list) else []
        told = [each for each in messages if isinstance(each, dict)]
        texts = [message_text(each) for each in told]
        rest = [each.get("tool_calls") for each in told]
        rest += [self.body.get(name) for name in TEXT_MEMBERS]
        size = sum(len(text.encode("utf-8", "replace")) for text in texts)
        return size + sum(len(to_json(each)) for each in rest if each)

    def tokens(self, default: int) -> int:
        """The most output tokens of one choice."""
        if self.path in NO_OUTPUT:
            return 0
        caps = [self.body[name] or 0 for name in CAPS & self.body.keys()]
        return max(caps, default=0) or default


def natural(body: dict[str, Any], name: str, highest: int) -> None:
    """`name` may be missing, null or a whole number from 1 to `highest`."""
    value = body.get(name)
    if value is not None and (type(value) is not int or not 1 <= value <= highest):
        raise BadRequest(
            f"'{name}' must be a whole number from 1 to {highest}.", param=name
        )


def parse_call(path: str, data: bytes) -> Call:
    """A request's body, checked as far as money and routing depend on it."""
    if not PATH.fullmatch(path):
        raise NotFound("There is no such path.")
    body = parse_json(data)
    model, stream = body.get("model"), body.get("stream")
    if not isinstance(model, str) or not 1 <= len(model) <= 200:
        raise BadRequest("'model' must be the name of a model.", param="model")
    if stream is not None and type(stream) is not bool:
        raise BadRequest("'stream' must be true or false.", param="stream")
    for name in CAPS & body.keys():
        natural(body, name, 2**31 - 1)
    for name in ("n", "best_of"):
        natural(body, name, MAX_CHOICES)
    for name, value in UNSUPPORTED.items():
        if body.get(name) == value:
            told = f"'{name}' may not be {json.dumps(value)} here."
            raise BadRequest(told, param=name)
    if stream and "images/" in path:
        raise BadRequest("Images are not streamed here.", param="stream")
    if path == "chat/completions":
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadRequest("'messages' must be a list of messages.", param="messages")
        if not all(isinstance(message, dict) for message in messages):
            raise BadRequest("Each of 'messages' must be an object.", param="messages")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise BadRequest("'stream_options' must be an object.", param="stream_options")
    wants_usage = bool((options or {}).get("include_usage"))
    if b"\\ud" in data or b"\\uD" in data:
        to_json(body)  # BadRequest for half of a surrogate pair
    # A float may be longer as we write it: 1e15 is 1000000000000000.0.
    size = len(to_json(body)) if EXPONENT.search(data) else 0
    return Call(path, body, model, bool(stream), wants_usage, max(size, len(data)))


def quote(call: Call, model: Model) -> Quote:
    """The worst case: a token has at least one byte, and no answer is cached."""
    price = model.price
    fixed = call.size * max(price.input, price.cached) + price.request
    fixed += price.image * (call.body.get("n") or 1)
    return Quote(fixed, price.output, call.tokens(model.max_output), call.choices)


def cost(usage: Usage, price: Price) -> int:
    """Micro-credits, rounded up once."""
    pico = (usage.input - usage.cached) * price.input + usage.cached * price.cached
    pico += usage.output * price.output + usage.images * price.image
    return ceil_micro(pico + price.request)


def estimate(call: Call, relayed: int) -> Usage:
    """The usage of an answer that was not reported; `relayed` bytes of its text."""
    input = -(-call.text_size() // BYTES_PER_TOKEN)
    return Usage(input, 0, -(-relayed // BYTES_PER_TOKEN), estimated=True)


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_TOKENS


def first(report: dict[str, Any], name: str, other: str) -> Any:
    value = report.get(name)
    return report.get(other) if value is None else value


def read_usage(document: dict[str, Any], generates: bool = True) -> Usage | None:
    """The usage that an answer or event reports; None if none is to be believed.

    Both of OpenAI's namings, and DeepSeek's cache hits (top level of `usage`). What
    `total_tokens` has above their sum is output: Gemini and xAI count the thinking
    only there. Where nothing is generated the total alone is the input.
    """
    report = document.get("usage")
    for name in ("response", "message"):
        if report is None and isinstance(document.get(name), dict):
            report = document[name].get("usage")
    if not isinstance(report, dict):
        return None
    input = first(report, "prompt_tokens", "input_tokens")
    output = first(report, "completion_tokens", "output_tokens")
    total = report.get("total_tokens")
    if not generates and input is None:
        input = total
    if input is None and output is None:
        return None
    details = report.get("prompt_tokens_details") or report.get("input_tokens_details")
    cached = report.get("prompt_cache_hit_tokens")
    if isinstance(details, dict) and cached is None:
        cached = details.get("cached_tokens")
    if is_count(input) and is_count(output) and is_count(total):
        output = max(output, total - input)
    counts = [0 if count is None else count for count in (input, cached, output)]
    if not all(map(is_count, counts)):
        return None
    return Usage(counts[0], min(counts[0], counts[1]), counts[2])


def larger(one: Usage, other: Usage) -> Usage:
    """Of each count the larger: reports of a stream grow, or tell their parts."""
    input, output = max(one.input, other.input), max(one.output, other.output)
    return Usage(input, max(one.cached, other.cached), output)


def count_images(document: dict[str, Any]) -> int:
    """Images that an /images/generations answer delivers."""
    data = document.get("data")
    entries = data if isinstance(data, list) else []
    return sum(
        isinstance(entry, dict) and bool(entry.get("url") or entry.get("b64_json"))
        for entry in entries
    )


# Upstreams ---------------------------------------------------------------------------


class Watch:
    """What may end a relay from outside; ending it wakes whoever waits upstream."""

    def __init__(self, client: socket.socket | None = None, chunked: bool = False):
        self.client, self.number = client, client.fileno() if client else -1
        # Whether chunks may be written to the client around the server.
        self.chunked = chunked and type(client) is socket.socket
        self.reason: str | None = None
        now = time.monotonic()
        self.deadline, self.heard, self.stall = now + ANSWER_TIMEOUT, now, math.inf
        self._upstream: socket.socket | None = None
        self._lock = threading.Lock()
        self._sleeper: threading.Event | None = None

    def attach(self, upstream: socket.socket) -> None:
        """From now on `upstream` is shut down when the relay is ended."""
        with self._lock:
            self._upstream = upstream
        self.check()

    def detach(self) -> None:
        with self._lock:
            self._upstream = None

    def streams(self) -> None:
        """The answer is a stream: it may live longer, but must not fall silent."""
        now = time.monotonic()
        self.deadline, self.heard, self.stall = now + STREAM_TIMEOUT, now, STALL_TIMEOUT

    def end(self, reason: str) -> None:
        """Ends the relay, once; the first reason stands."""
        with self._lock:
            if self.reason:
                return
            self.reason = reason
            if self._sleeper is not None:
                self._sleeper.set()
            if self._upstream is not None:
                # Not SSLSocket's own: it would drop the TLS state under the reader.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self._upstream, socket.SHUT_RDWR)

    def hang_up(self) -> None:
        """Ends the write to a client that does not read."""
        with contextlib.suppress(OSError, AttributeError):
            self.client.shutdown(socket.SHUT_RDWR)

    def check(self) -> None:
        if self.reason:
            raise Ended(self.reason)

    def sleep(self, seconds: float) -> None:
        """Waits, or raises Ended."""
        with self._lock:
            self._sleeper = self._sleeper or threading.Event()
        self.check()
        self._sleeper.wait(seconds)
        self.check()

    def overdue(self, now: float) -> bool:
        return now > self.deadline or now - self.heard > self.stall


class Carried(Turn):
    """A stream that the watcher relays by calling its step."""

    __slots__ = ("step",)

    def __init__(self, step: Callable[[], bool]):
        super().__init__()
        self.step = step

    def ends(self) -> bool:
        """One step; whether it is the last."""
        try:
            return self.step()
        except BaseException as error:  # the relay raises it
            self.error = error
            return True


class Watcher:
    """The one thread of a worker that waits for sockets: it ends relays whose client
    left or whose time is up, and carries the plain middle of streams.

    A client's end shows as end of file on its socket; a half-close looks the same,
    and counts as leaving (as nginx has it).
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._known: dict[int, Watch | Carried] = {}  # by file descriptor
        self._watches: set[Watch] = set()
        self._lock = threading.Lock()
        self._drain: float | None = None
        self._closed = False
        threading.Thread(target=self._run, name="watcher", daemon=True).start()

    @property
    def idle(self) -> bool:
        return not self._watches

    @property
    def draining(self) -> bool:
        return self._drain is not None

    def add(self, watch: Watch, capacity: float = math.inf) -> bool:
        """Watches it, unless that makes more than `capacity` at once."""
        with self._lock:
            if self.draining or len(self._watches) >= capacity:
                return False
            self._watches.add(watch)
        if watch.client is not None:
            try:
                self._register(watch.number, watch, select.EPOLLRDHUP)
            except (OSError, ValueError):
                watch.client, watch.chunked = None, False
        return True

    def remove(self, watch: Watch) -> None:
        self._watches.discard(watch)
        self._forget(watch.number, watch)

    def _register(self, number: int, who: Watch | Carried, events: int) -> None:
        with self._lock:
            self._epoll.register(number, events)
            self._known[number] = who

    def _forget(self, number: int, who: Watch | Carried) -> None:
        """Late it may be: by now the number may be another connection's."""
        with self._lock:
            if self._known.get(number) is who:
                del self._known[number]
                with contextlib.suppress(OSError, ValueError):
                    self._epoll.unregister(number)

    def carry(self, sock: socket.socket, step: Callable[[], bool]) -> None:
        """Returns when `step`, called in the watcher's thread whenever the socket is
        readable, has returned True; raises what it raises.

        Threads of their own would wait for the interpreter at every chunk: of 500
        streams on one core the first byte took 2.3 s (p99), with one thread 0.05.
        """
        if step():
            return
        turn = Carried(step)
        self._register(sock.fileno(), turn, select.EPOLLIN)
        turn.lock.acquire()
        turn.check()

    def drain(self, seconds: float) -> None:
        """Ends what still runs after `seconds`; a later call does not put it off."""
        self._drain = min(self._drain or math.inf, time.monotonic() + seconds)

    def close(self) -> None:
        """Ends what still runs, and the thread after it."""
        self._closed = True

    def _run(self) -> None:
        looked = 0.0
        while self._known or not self._closed:
            try:
                for number, _ in self._epoll.poll(WATCH_INTERVAL):
                    who = self._known.get(number)
                    if isinstance(who, Watch):
                        self._look(who)
                    elif who is not None and who.ends():
                        self._forget(number, who)
                        who.lock.release()
                who = None  # or it would be kept until the next event
                now = time.monotonic()
                if now - looked > WATCH_INTERVAL / 2:
                    self._deadlines(now)
                    looked = now
            except Exception:
                # A socket or the set changed under our hands: look again. Whatever
                # it was, without this thread no stream would go on.
                continue

    def _look(self, watch: Watch) -> None:
        """A client has left, unless the event was another's on the same number."""
        poll = select.poll()
        try:
            poll.register(watch.client, select.POLLRDHUP)
            gone = bool(poll.poll(0))
        except (OSError, ValueError):
            gone = True
        if gone:
            if watch in self._watches:
                watch.end("client")
            self._forget(watch.number, watch)

    def _deadlines(self, now: float) -> None:
        drain = now if self._closed else self._drain or math.inf
        for watch in list(self._watches):
            if now >= drain:
                watch.end("drain")
            elif watch.overdue(now):
                watch.end("timeout")
            if now > drain + 1:
                watch.hang_up()


class Answer:
    """An upstream's answer: its status, its kind, and its body in pieces.

    `images` counts what a dialect has delivered; None if the body tells.
    """

    def __init__(
        self, pieces: Iterable[bytes], stream: bool, images: int | None = None
    ):
        self.stream, self.images = stream, images
        self.pieces = iter(pieces)

    def read(self) -> bytes:
        """The next bytes as they come; empty at the end.

        Raises UpstreamFailed when the body is cut, Ended when the relay is.
        """
        return next(self.pieces, b"")

    def read_all(self, limit: int = MAX_ANSWER) -> bytes:
        """The whole body, or UpstreamFailed if it is longer than `limit` bytes."""
        pieces, size = [], 0
        while data := self.read():
            pieces.append(data)
            size += len(data)
            if size > limit:
                raise UpstreamFailed(f"an answer over {limit} bytes")
        return b"".join(pieces)

    def close(self) -> None:
        """Gives up what is not read; called once, by whoever got the answer."""
        if isinstance(self.pieces, Generator):  # it may hold what holds this
            self.pieces.close()


class Reply:
    """One answer read off a socket (RFC 9112), every part of it bounded.

    Ours and not http.client's: what is left over in the buffer must be known (an
    answer that nobody asked for would be the next request's), a chunk's size that
    trickles must not block unseen; and http.client was 15% of a request's CPU.
    Raises ValueError for what is no HTTP/1.1 and OSError.
    """

    def __init__(self, sock: socket.socket, early: bytes = b""):
        self._sock, self._buffer = sock, early
        # Bytes to come of the body, or of the chunk; None: to the connection's end.
        self._left: int | None = 0
        self._chunked = self.ended = False
        for _ in range(MAX_INFORMATIONAL):
            self._read_head()
            if self.status >= 200:
                return self._frame()
            if self.status == 101:
                break
        raise ValueError("no final answer")

    def _receive(self) -> bool:
        """Waits for more of the answer; False at the end of the connection."""
        data = self._sock.recv(RECEIVE)
        self._buffer = self._buffer + data if self._buffer else data
        return bool(data)

    def _read_head(self) -> None:
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > MAX_HEAD or not self._receive():
                raise ValueError("no head")
        lines = self._buffer[:end].split(b"\r\n")
        self._buffer = self._buffer[end + 4 :]
        match = STATUS_LINE.fullmatch(lines[0])
        if not match:
            raise ValueError("no status line")
        self.status, self._old = int(match[2]), match[1] == b"0"
        self.headers: dict[bytes, bytes] = {}
        for line in lines[1:]:
            name, colon, value = line.partition(b":")
            if not colon or name != name.strip():
                raise ValueError("no header")
            name, value = name.lower(), value.strip()
            if self.headers.setdefault(name, value) != value and name in FRAMING:
                raise ValueError("two ways to frame the body")

    def _frame(self) -> None:
        """How the body ends (RFC 9112 §6.3)."""
        coding, length = map(self.headers.get, FRAMING)
        if coding is not None:
            if coding.lower() != b"chunked" or length is not None:
                raise ValueError("an unknown transfer coding")
            self._chunked = True
        elif self.status in (204, 304):
            self.ended = True
        elif length is None:
            self._left = None
        elif not (length.isdigit() and len(length) < 16):
            raise ValueError("no content length")
        else:
            self._left = int(length)
            self.ended = not self._left

    def header(self, name: bytes) -> str:
        return self.headers.get(name, b"").decode("latin-1")

    @property
    def reusable(self) -> bool:
        """Whether the connection may carry another request."""
        close = b"close" in self.headers.get(b"connection", b"").lower()
        whole = self.ended and not self._buffer and self._left is not None
        return whole and not close and not self._old

    def read(self) -> bytes:
        """The body's next bytes as they come; empty at its end."""
        while not self.ended:
            if self._chunked:
                data = self._take_chunks()
            elif self._left is None:
                data, self._buffer = self._buffer, b""
            else:
                left = self._left
                data, self._buffer = self._buffer[:left], self._buffer[left:]
                self._left -= len(data)
                self.ended = not self._left
            if data:
                return data
            if not self.ended and not self._receive():
                if self._left is not None:
                    raise ValueError("the body was cut")
                self.ended = True
        return b""

    def _take_chunks(self) -> bytes:
        """The data of all chunks that are in the buffer (RFC 9112 §7.1).

        `_left` counts what is to come of a chunk and its CRLF; 0 before a size.
        """
        buffer, at, out = self._buffer, 0, []
        while True:
            if self._left > 2:
                piece = buffer[at : at + self._left - 2]
                if not piece:
                    break
                out.append(piece)
                at += len(piece)
                self._left -= len(piece)
            elif self._left:
                if len(buffer) - at < 2:
                    break
                if buffer[at : at + 2] != b"\r\n":
                    raise ValueError("no end of a chunk")
                at, self._left = at + 2, 0
            else:
                end = buffer.find(b"\r\n", at)
                if end < 0:
                    if len(buffer) - at > MAX_CHUNK_LINE:
                        raise ValueError("no chunk size")
                    break
                size = self._chunk_size(buffer[at:end])
                if not size:
                    at = self._skip_trailers(at, end)
                    break
                at, self._left = end + 2, size + 2
        self._buffer = buffer[at:]
        return b"".join(out)

    @staticmethod
    def _chunk_size(line: bytes) -> int:
        digits = line.partition(b";")[0].rstrip(b" \t") if b";" in line else line
        # isalnum: int() takes signs, blanks and underscores too.
        if not digits.isalnum() or len(digits) > 15:
            raise ValueError("no chunk size")
        try:
            return int(digits, 16)
        except ValueError:
            raise ValueError("no chunk size") from None

    def _skip_trailers(self, at: int, end: int) -> int:
        """Where the body's trailers end, or `at` until all of them are here."""
        last = self._buffer.find(b"\r\n\r\n", end)
        if last < 0:
            if len(self._buffer) - end > MAX_HEAD:
                raise ValueError("trailers without an end")
            return at
        self.ended = True
        return last + 4


class HttpAnswer(Answer):
    """An answer on a connection, which goes back to its pool when read to the end."""

    def __init__(self, reply: Reply, connection: Connection):
        self.kind = reply.header(b"content-type").partition(";")[0].strip().lower()
        super().__init__((), self.kind == STREAM_TYPE)
        self.status, self.retry_after = reply.status, reply.header(b"retry-after")
        self._reply, self._connection = reply, connection

    def read(self) -> bytes:
        try:
            data = self._reply.read()
        except (BlockingIOError, ssl.SSLWantReadError):
            raise
        except (OSError, ValueError) as error:
            raise self._connection.failure(error) from None
        if not data:
            self._connection.watch.check()
        return data

    @property
    def ended(self) -> bool:
        """Whether the body's end was read, with its last bytes maybe."""
        return self._reply.ended

    def unblocked(self) -> socket.socket:
        """The socket, for a poll; from now on `read` raises where it would wait."""
        self._connection.sock.settimeout(0)
        return self._connection.sock

    def close(self) -> None:
        if not self._reply.ended and not self._connection.watch.reason:
            # After [DONE] only the last chunk, which is empty, is left to read.
            with contextlib.suppress(ProxyError, Ended):
                self._connection.hurry()
                self.read()
        self._connection.release(self._reply.reusable)


def is_quiet(sock: socket.socket, seconds: float = 0) -> bool:
    """Whether a connection says nothing, not even its end, for `seconds`."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return not poll.poll(seconds * 1000)


class Connection:
    """One request's use of a connection to an upstream."""

    def __init__(self, pool: Pool, watch: Watch):
        self.pool, self.watch = pool, watch
        self._sent = False
        self._early = b""  # of the answer
        self.sock: socket.socket | None = None

    def post(self, path: str, body: bytes, headers: dict[str, str]) -> HttpAnswer:
        """Sends a POST and waits for the answer's head; the answer owns this then."""
        self.send("POST", path, body, headers)
        return self.answer()

    def send(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> None:
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        head = f"{method} {path} HTTP/1.1\r\nHost: {self.pool.host}\r\n"
        head += f"Content-Length: {len(body)}\r\n{lines}\r\n"
        try:
            self.sock = self.pool.take()
            self.watch.attach(self.sock)
            self.sock.sendall(head.encode("latin-1") + body)
            self._sent = True
        except (BrokenPipeError, ConnectionResetError) as error:
            # Who refuses a long body by its head may answer and close at once.
            if self.sock is None or is_quiet(self.sock):
                self._give_up(error)
        except BaseException as error:
            self._give_up(error)

    def ready(self, seconds: float) -> bool:
        """Whether something of the answer is here; waits for it up to `seconds`.

        A TLS connection may be readable for its session tickets alone.
        """
        self.watch.check()
        if is_quiet(self.sock, seconds):
            return False
        self.sock.settimeout(0)
        try:
            self._early = self.sock.recv(RECEIVE)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError:
            pass  # it is told when the answer is read
        finally:
            self.sock.settimeout(None)
        return True

    def answer(self) -> HttpAnswer:
        """Waits for the answer's head; the answer owns this then."""
        try:
            return HttpAnswer(Reply(self.sock, self._early), self)
        except BaseException as error:
            self._give_up(error)

    def _give_up(self, error: BaseException) -> NoReturn:
        """Whatever fails closes the connection."""
        self.release(reuse=False)
        if isinstance(error, OSError | ValueError):
            raise self.failure(error) from None
        raise error

    def release(self, reuse: bool) -> None:
        """Gives the connection back, or closes it; once."""
        self.watch.detach()
        sock, self.sock = self.sock, None
        if sock is None:
            return
        if reuse and not self.watch.reason:
            self.pool.give(sock)
        else:
            sock.close()

    def hurry(self) -> None:
        """Whatever is not here by now is not waited for any more."""
        self.sock.settimeout(0.02)

    def failure(self, error: Exception) -> UpstreamFailed:
        """The one place where the network's exceptions become ours; raises Ended if
        they only tell that the relay was ended."""
        self.watch.check()
        # An OSError's text may hold what the upstream sent: only the kind is kept.
        reason = str(error) if type(error) is ValueError else type(error).__name__
        if self._sent:
            return UpstreamFailed(reason, transient=True)
        return UpstreamFailed(reason, wait=2, clean=True, transient=True)


class Pool:
    """Idle connections to one upstream, the youngest first.

    Sockets, not requests' sessions: a client that leaves must be able to end the wait
    for the answer's head, for which the socket is needed before there is an answer.
    """

    _tls: ssl.SSLContext | None = None

    def __init__(self, upstream: UpstreamConfig):
        self._upstream = upstream
        self._idle: deque[tuple[socket.socket, float]] = deque()
        host = f"[{upstream.host}]" if ":" in upstream.host else upstream.host
        default = 443 if upstream.secure else 80
        self.host = host if upstream.port == default else f"{host}:{upstream.port}"

    def take(self) -> socket.socket:
        """A connected socket; raises OSError."""
        while True:
            try:
                sock, since = self._idle.pop()
            except IndexError:
                return self._connect()
            if time.monotonic() - since < UPSTREAM_IDLE and is_quiet(sock):
                return sock
            sock.close()

    def give(self, sock: socket.socket) -> None:
        if sock.gettimeout() is not None:
            sock.settimeout(None)
        self._idle.append((sock, time.monotonic()))

    def tidy(self) -> None:
        """Closes what has been idle for too long; another thread may take the last."""
        with contextlib.suppress(IndexError):
            while time.monotonic() - self._idle[0][1] > UPSTREAM_IDLE:
                self._idle.popleft()[0].close()

    def close(self) -> None:
        while self._idle:
            self._idle.pop()[0].close()

    def _connect(self) -> socket.socket:
        place = self._upstream.host, self._upstream.port
        sock = socket.create_connection(place, CONNECT_TIMEOUT)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._upstream.secure:
                context = self._context()
                sock = context.wrap_socket(sock, server_hostname=place[0])
            # From here on the watch bounds every wait: it shuts the socket down.
            sock.settimeout(None)
        except BaseException:
            sock.close()
            raise
        return sock

    @classmethod
    def _context(cls) -> ssl.SSLContext:
        if cls._tls is None:
            context = ssl.create_default_context()
            context.load_verify_locations(certifi.where())
            cls._tls = context
        return cls._tls


class Dialect:
    """How one kind of upstream is asked. A subclass levels what differs.

    `scheme` is what stands before the "+" of the upstream's URL.
    """

    scheme: str

    def __init_subclass__(cls) -> None:
        if "scheme" in vars(cls):
            DIALECTS[cls.scheme] = cls

    def __init__(self, upstream: UpstreamConfig):
        self.upstream, self.pool = upstream, Pool(upstream)

    def check(self, call: Call) -> None:
        """Raises BadRequest or NotFound for what this dialect cannot do, and
        UpstreamFailed where it lacks its key."""
        if missing := self.upstream.missing:
            failure = UpstreamFailed(f"{', '.join(missing)} is not set", clean=True)
            failure.message = "The provider of this model is not configured."
            raise failure

    def send(self, call: Call, body: dict[str, Any], watch: Watch) -> Answer:
        """Sends `body` (the upstream's model id, defaults and cap written into it)
        and returns a successful answer; raises Refused, UpstreamFailed or Ended."""
        raise NotImplementedError

    def probe(self, watch: Watch) -> str:
        """Empty if the credentials are accepted, else why not; spends nothing."""
        return ""

    def cap_name(self, path: str, body: dict[str, Any]) -> str | None:
        """The member that bounds the output here, whatever else `body` holds."""
        return CAP_OF_PATH.get(path.rpartition("/")[2])


def retry_seconds(text: str) -> int:
    """Whole seconds, 1 to 60, out of an upstream's Retry-After; 2 if it names none."""
    return max(1, min(60, int(text))) if text.isdecimal() and len(text) < 6 else 2


def scrub(text: Any, key: str) -> str | None:
    """A bounded text without the operator's key or its end; None if it is no text.

    The end of a short key ("ollama") may be a part of common words.
    """
    if not isinstance(text, str):
        return None
    for secret in key.split(":"):
        for part in (secret, secret[-4:] if len(secret) >= 16 else ""):
            text = text.replace(part, "***") if len(part) >= 4 else text
    return text[:2000].encode("utf-8", "replace").decode()


def refusal(status: int, data: bytes, key: str) -> Refused:
    """The client's own mistake as the upstream tells it: OpenAI's form, an error
    that is a text (vLLM), FastAPI's `detail`. The operator's key is cut out."""
    document = json_object(data)
    error = document.get("error") or document.get("detail") or document
    message = error.get("message") if isinstance(error, dict) else error
    if not isinstance(message, str):
        message = to_json(message).decode() if message else "The provider refused this."
    told = error if isinstance(error, dict) else {}
    texts = (message, told.get("code"), told.get("param"))
    return Refused(status, *(scrub(text, key) for text in texts))


class OpenAI(Dialect):
    """`https://`: the OpenAI API as it is."""

    scheme = ""

    def __init__(self, upstream: UpstreamConfig):
        super().__init__(upstream)
        self._headers = {
            "Accept": "application/json, text/event-stream",
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "proxy.py",
        }
        if upstream.key:
            self._headers["Authorization"] = f"Bearer {upstream.key}"

    def send(self, call: Call, body: dict[str, Any], watch: Watch) -> Answer:
        if call.stream and call.path in DONE_PATHS:
            options = body.get("stream_options") or {}
            body["stream_options"] = options | {"include_usage": True}
        return self.post(call.path, body, watch)

    def cap_name(self, path: str, body: dict[str, Any]) -> str | None:
        # OpenAI's reasoning models refuse `max_tokens`, and OpenAI both at once; most
        # other servers know no other name.
        theirs = self.upstream.host.endswith(("openai.com", ".azure.com"))
        chat = path.endswith("chat/completions")
        if theirs and chat and not body.get("max_tokens"):
            return "max_completion_tokens"
        return super().cap_name(path, body)

    def post(self, path: str, body: dict[str, Any], watch: Watch) -> HttpAnswer:
        """Posts JSON; an answer that is no success is raised as what it means."""
        return self.finish(self.start(path, body, watch))

    def start(self, path: str, body: dict[str, Any], watch: Watch) -> Connection:
        connection = Connection(self.pool, watch)
        connection.send("POST", self.url_path(path), to_json(body), self._headers)
        return connection

    def url_path(self, path: str) -> str:
        return f"{self.upstream.path}/{path}"

    def finish(self, connection: Connection) -> HttpAnswer:
        answer = connection.answer()
        if answer.status == 200 and answer.kind in ("application/json", STREAM_TYPE):
            return answer
        try:
            raise self.failure(answer)
        finally:
            answer.close()

    def get(self, path: str, watch: Watch) -> str:
        """Empty if a GET of `path` is answered with 200, else what came instead."""
        connection = Connection(self.pool, watch)
        try:
            connection.send("GET", path, b"", self._headers)
            answer = connection.answer()
        except UpstreamFailed as error:
            return error.reason
        answer.close()
        return "" if answer.status == 200 else f"status {answer.status}"

    def probe(self, watch: Watch) -> str:
        return self.get(self.url_path("models"), watch)

    def failure(self, answer: HttpAnswer) -> ProxyError:
        """What an answer that is no success means, by its status."""
        status = answer.status
        reason = f"status {status}"
        if status in CLIENT_STATUS:
            return refusal(status, answer.read_all(1 << 20), self.upstream.key)
        if status in BUSY_STATUS:
            return UpstreamFailed(reason, retry_seconds(answer.retry_after), clean=True)
        if status in REFUSED_STATUS:
            return UpstreamFailed(reason, clean=True)
        if status >= 500:
            return UpstreamFailed(reason, wait=2)
        return UpstreamFailed(f"{reason}, {answer.kind or 'no content type'}")


def as_system(message: dict[str, Any]) -> dict[str, Any]:
    """DeepSeek refuses the role `developer`."""
    if message.get("role") == "developer":
        return message | {"role": "system"}
    return message


class DeepSeek(OpenAI):
    """`deepseek+https://`: OpenAI's API with DeepSeek's differences levelled."""

    scheme = "deepseek"

    def send(self, call: Call, body: dict[str, Any], watch: Watch) -> Answer:
        # max_completion_tokens is silently ignored there, and would bound nothing.
        if longest := body.pop("max_completion_tokens", None):
            body["max_tokens"] = min(longest, body.get("max_tokens") or longest)
        if call.path == "chat/completions":
            body["messages"] = [as_system(message) for message in body["messages"]]
        return super().send(call, body, watch)

    def url_path(self, path: str) -> str:
        """Fill-in-the-middle is reached under /beta only."""
        if path == "completions":
            return self.upstream.path.removesuffix("/v1") + "/beta/completions"
        return super().url_path(path)

    def probe(self, watch: Watch) -> str:
        return self.get(self.upstream.path.removesuffix("/v1") + "/user/balance", watch)


NO_TOKENS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


def image_url(entry: Any) -> str | None:
    """The URL of one image; `data:` for one that came as base64."""
    entry = entry if isinstance(entry, dict) else {}
    if isinstance(entry.get("url"), str):
        return entry["url"]
    if isinstance(entry.get("b64_json"), str):
        return f"data:image/png;base64,{entry['b64_json']}"
    return None


class ImageDialect(Dialect):
    """Image models, asked through chat completions or /images/generations."""

    def check(self, call: Call) -> None:
        super().check(call)
        if call.path not in ("chat/completions", "images/generations"):
            raise NotFound("Image models answer chat completions and generations only.")
        if call.path == "chat/completions" and call.choices > 1:
            raise BadRequest("Only one image a request: 'n' must be 1.", param="n")
        if not self.prompt(call).strip():
            raise BadRequest("There is no text to make an image of.", param="messages")

    @staticmethod
    def prompt(call: Call) -> str:
        """The prompt; through chat, the text of the last user message."""
        if call.path == "chat/completions":
            return last_user_text(call.body)
        prompt = call.body.get("prompt")
        return prompt if isinstance(prompt, str) else ""

    def make(
        self, call: Call, body: dict[str, Any], watch: Watch
    ) -> Iterator[list[dict] | None]:
        """Asks for images, once; None while there is to wait, then OpenAI's entries.

        What fails before the first item can be told with a status.
        """
        raise NotImplementedError

    def send(self, call: Call, body: dict[str, Any], watch: Watch) -> Answer:
        steps = self.make(call, body, watch)
        images = next(steps)
        if call.stream:
            answer = Answer((), True, images=0)
            steps = itertools.chain([images], steps)
            answer.pieces = self._events(answer, call.model, steps)
            return answer
        while images is None:
            images = next(steps)
        if call.path == "chat/completions":
            images = images[:1]  # one was asked for; some servers make four
            document = self._completion(call.model, image_url(images[0]))
        else:
            document = {"created": int(time.time()), "data": images}
        return Answer([to_json(document)], False, images=len(images))

    @staticmethod
    def _head(model: str, kind: str) -> dict[str, Any]:
        id, now = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        return {"id": id, "object": kind, "created": now, "model": model}

    def _completion(self, model: str, url: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": url}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        head = self._head(model, "chat.completion")
        return head | {"choices": [choice], "usage": NO_TOKENS}

    def _events(
        self, answer: Answer, model: str, steps: Iterator[list[dict] | None]
    ) -> Iterator[bytes]:
        """Comments while waiting, then the image's URL as one chunk."""
        head = self._head(model, "chat.completion.chunk")
        spoken = time.monotonic()
        for images in steps:
            if images:
                break
            if time.monotonic() - spoken >= COMMENT_INTERVAL:
                spoken = time.monotonic()
                yield b": the image is being made\n"
        answer.images = 1
        whole = {"role": "assistant", "content": image_url(images[0])}
        for delta, finish in ((whole, None), ({}, "stop")):
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            yield sse(head | {"choices": [choice]})
        yield sse(head | {"choices": [], "usage": NO_TOKENS})
        yield DONE


def moderated() -> Refused:
    message = "The provider's moderation refused this content."
    return Refused(400, message, "content_policy_violation", None)


def policy_refusal(code: Any) -> Refused | None:
    """The 400 of content that the vendor's moderation refuses."""
    if isinstance(code, str) and code.endswith("SensitiveContentDetected"):
        return moderated()
    return None


def image_failure(document: dict[str, Any]) -> ProxyError:
    """Why a 200 without an image has none: its own error, or its first entry's."""
    data = document.get("data")
    for holder in [document, *(data if isinstance(data, list) else [])]:
        error = holder.get("error") if isinstance(holder, dict) else None
        if isinstance(error, dict):
            return policy_refusal(error.get("code")) or UpstreamFailed("an image error")
    return UpstreamFailed("no image in the answer")


class Images(ImageDialect):
    """`images+https://`: any server with an OpenAI-style /images/generations."""

    scheme = "images"
    members = (
        "n size seed watermark quality style background user"
        " guidance_scale image response_format output_format"
    ).split()

    def __init__(self, upstream: UpstreamConfig):
        super().__init__(upstream)
        self._api = OpenAI(upstream)
        self.pool = self._api.pool

    def make(
        self, call: Call, body: dict[str, Any], watch: Watch
    ) -> Iterator[list[dict] | None]:
        asked = {
            name: body[name] for name in self.members if body.get(name) is not None
        }
        if call.path == "chat/completions":
            asked.pop("response_format", None)
        asked |= {"model": body["model"], "prompt": self.prompt(call)}
        if "seedream" in body["model"]:
            self._level(asked)
        connection = self._api.start("images/generations", asked, watch)
        try:
            while not connection.ready(COMMENT_INTERVAL):
                yield None
            document = self._delivered(connection)
        finally:
            connection.release(reuse=False)  # once: a delivered answer has done it
        yield [entry for entry in document["data"] if image_url(entry)]

    @staticmethod
    def _level(asked: dict[str, Any]) -> None:
        """Seedream makes one image a call, 4.5 and 5.0 none below 3,686,400 pixels."""
        if asked.pop("n", 1) > 1:
            raise BadRequest("This model makes one image a request.", param="n")
        asked.setdefault("watermark", False)
        size = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(asked.get("size", "")))
        late = re.search(r"seedream-(4-5|[5-9])", asked["model"])
        if size and late and int(size[1]) * int(size[2]) < 3_686_400:
            del asked["size"]

    def _delivered(self, connection: Connection) -> dict[str, Any]:
        """The answer, with at least one image in it."""
        try:
            answer = self._api.finish(connection)
        except Refused as refused:
            raise policy_refusal(refused.code) or refused from None
        try:
            document = json_object(answer.read_all())
        finally:
            answer.close()
        if count_images(document):
            return document
        raise image_failure(document)

    def probe(self, watch: Watch) -> str:
        return self._api.probe(watch)


def volcengine_signature(
    access: str, secret: str, host: str, query: str, body: bytes, now: time.struct_time
) -> dict[str, str]:
    """The headers of a signed POST to / (Volcengine's HMAC-SHA256, cv, cn-north-1).

    `query` is sorted and percent-encoded; `secret` is used as it is, not decoded.
    """
    date = time.strftime("%Y%m%dT%H%M%SZ", now)
    digest = hashlib.sha256(body).hexdigest()
    signed = {"content-type": "application/json", "host": host}
    signed |= {"x-content-sha256": digest, "x-date": date}
    names = ";".join(signed)
    lines = "".join(f"{name}:{value}\n" for name, value in signed.items())
    canonical = f"POST\n/\n{query}\n{lines}\n{names}\n{digest}"
    scope = f"{date[:8]}/cn-north-1/cv/request"
    text = f"HMAC-SHA256\n{date}\n{scope}\n{sha256(canonical)}"
    key = secret.encode()
    for part in [*scope.split("/"), text]:
        key = hmac.digest(key, part.encode(), "sha256")
    return {
        "Content-Type": "application/json",
        "X-Date": date,
        "X-Content-Sha256": digest,
        "Authorization": f"HMAC-SHA256 Credential={access}/{scope}, "
        f"SignedHeaders={names}, Signature={key.hex()}",
    }


class JiMeng(ImageDialect):
    """`jimeng+https://`: Volcengine's signed submit-and-poll; key "access:secret"."""

    scheme = "jimeng"
    moderation = (50411, 50412, 50413, 50511, 50512, 50518, 50519)
    busy = (50429, 50430)

    def check(self, call: Call) -> None:
        super().check(call)
        if (call.body.get("n") or 1) > 1:
            raise BadRequest("This model makes one image a request.", param="n")
        if len(self.prompt(call)) > 800:
            raise BadRequest("The prompt may have at most 800 characters.")
        if call.body.get("response_format") == "b64_json":
            raise BadRequest("Only URLs are answered.", param="response_format")

    def make(
        self, call: Call, body: dict[str, Any], watch: Watch
    ) -> Iterator[list[dict] | None]:
        # Without force_single one call can make, and bill, fifteen images.
        task = {"req_key": body["model"], "prompt": self.prompt(call)}
        task |= {"force_single": True} | self._options(body)
        data = self._call("CVSync2AsyncSubmitTask", task, watch)
        id = data.get("task_id")
        if not isinstance(id, str) or not re.fullmatch(r"[\w-]{1,64}", id):
            raise UpstreamFailed("no task id")
        deadline = time.monotonic() + JIMENG_TIMEOUT
        pause = JIMENG_FIRST_POLL
        while time.monotonic() < deadline:
            yield None
            watch.sleep(pause)
            pause = JIMENG_POLL
            if images := self._poll(body["model"], id, watch):
                yield images
                return
            watch.heard = time.monotonic()
        raise UpstreamFailed(f"task {id} was not done in time")

    @staticmethod
    def _options(body: dict[str, Any]) -> dict[str, Any]:
        """What the vendor takes besides the prompt; OpenAI's size as width, height."""
        names = ("width", "height", "scale", "seed", "image_urls")
        options = {name: body[name] for name in names if body.get(name) is not None}
        size = body.get("size")
        if size not in (None, "auto"):
            match = re.fullmatch(r"(\d{2,4})x(\d{2,4})", str(size))
            if not match:
                raise BadRequest("'size' must read like 1024x1024.", param="size")
            options |= {"width": int(match[1]), "height": int(match[2])}
        return options

    def _poll(self, model: str, id: str, watch: Watch) -> list[dict] | None:
        """The task's image, None while it is being made.

        The submitted task may still be billed: whatever fails now must not be
        repeated by the client.
        """
        query = {"req_key": model, "task_id": id, "req_json": '{"return_url":true}'}
        try:
            data = self._call("CVSync2AsyncGetResult", query, watch)
        except UpstreamFailed as error:
            if error.transient:
                return None
            raise UpstreamFailed(f"task {id}: {error.reason}") from None
        if data.get("status") in ("in_queue", "generating"):
            return None
        urls = data.get("image_urls")
        if data.get("status") != "done" or not isinstance(urls, list):
            status = data.get("status")
            known = status if status in ("not_found", "expired", "done") else "unknown"
            raise UpstreamFailed(f"task {id}: {known}")
        urls = [url for url in urls if isinstance(url, str) and url]
        if not urls:
            raise UpstreamFailed(f"task {id}: no image")
        return [{"url": urls[0]}]

    def _call(self, action: str, document: dict[str, Any], watch: Watch) -> dict:
        """`data` of a successful call; raises Refused or UpstreamFailed."""
        body = to_json(document)
        access, _, secret = self.upstream.key.partition(":")
        query = f"Action={action}&Version=2022-08-31"
        headers = volcengine_signature(
            access, secret, self.pool.host, query, body, time.gmtime()
        )
        connection = Connection(self.pool, watch)
        answer = connection.post(f"{self.upstream.path}/?{query}", body, headers)
        try:
            reply = json_object(answer.read_all(1 << 20))
        finally:
            answer.close()
        data = reply.get("data")
        if reply.get("code") == 10000 and isinstance(data, dict):
            return data
        raise self._failure(answer.status, reply)

    def _failure(self, status: int, reply: dict[str, Any]) -> ProxyError:
        """What an error of either layer means: the business code, or the gateway's."""
        code = reply.get("code")
        if code in self.moderation:
            return moderated()
        if code in self.busy or (status == 429 and code is None):
            return UpstreamFailed(f"code {code}", wait=2, clean=True, transient=True)
        if code is None or code == 50400:
            refused = 400 <= status < 500
            wait = 2 if status >= 500 else None
            return UpstreamFailed(f"status {status}", wait, refused, not refused)
        known = code if type(code) is int else "unknown"
        return UpstreamFailed(f"code {known}", wait=2)

    def probe(self, watch: Watch) -> str:
        """Polls a made-up task: what comes back tells whether the keys are known."""
        query = {"req_key": "jimeng_t2i_v40", "task_id": "0"}
        try:
            self._call("CVSync2AsyncGetResult", query, watch)
        except Refused:
            pass
        except UpstreamFailed as error:
            # A business error was answered by the service, behind the signature.
            if not error.reason.startswith("code "):
                return error.reason
        return ""


class Echo(Dialect):
    """`echo:`: answers with the last user message; words count as tokens."""

    scheme = "echo"

    def check(self, call: Call) -> None:
        if call.path != "chat/completions":
            raise NotFound("The echo model answers /v1/chat/completions only.")
        if call.size * call.choices > MAX_ANSWER:
            raise BadRequest("The answers would be too long.", param="n")

    def send(self, call: Call, body: dict[str, Any], watch: Watch) -> Answer:
        limit = min((body[name] for name in CAPS if body.get(name)), default=None)
        # Behind the last word the blanks would be searched from each of them on.
        words = re.findall(r"\s*\S+", last_user_text(body).rstrip())
        finish = "length" if limit is not None and len(words) > limit else "stop"
        words, choices = words[:limit], body.get("n") or 1
        asked = sum(len(message_text(each).split()) for each in body["messages"])
        usage = {"prompt_tokens": asked, "completion_tokens": len(words) * choices}
        usage["total_tokens"] = sum(usage.values())
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time())}
        head["model"] = body["model"]
        if call.stream:
            return Answer(self._events(head, words, choices, finish, usage), True)
        message = {"role": "assistant", "content": "".join(words)}
        picks = [
            {"index": index, "message": message, "finish_reason": finish}
            for index in range(choices)
        ]
        head |= {"object": "chat.completion", "choices": picks, "usage": usage}
        return Answer([to_json(head)], False)

    @staticmethod
    def _events(
        head: dict[str, Any],
        words: list[str],
        choices: int,
        finish: str,
        usage: dict[str, int],
    ) -> Iterator[bytes]:
        head = head | {"object": "chat.completion.chunk"}

        def chunk(index: int, delta: dict[str, str], end: str | None) -> bytes:
            choice = {"index": index, "delta": delta, "finish_reason": end}
            return sse(head | {"choices": [choice]})

        for index in range(choices):
            yield chunk(index, {"role": "assistant", "content": ""}, None)
            for word in words:
                yield chunk(index, {"content": word}, None)
            yield chunk(index, {}, finish)
        yield sse(head | {"choices": [], "usage": usage})
        yield DONE


class Upstreams:
    """The dialects in use, each with its connections; kept while keys.json changes."""

    def __init__(self) -> None:
        self._dialects: dict[UpstreamConfig, Dialect] = {}

    def dialect(self, upstream: UpstreamConfig) -> Dialect:
        found = self._dialects.get(upstream)
        if found is None:
            found = DIALECTS[upstream.dialect](upstream)
            found = self._dialects.setdefault(upstream, found)
        return found

    def tidy(self) -> None:
        for dialect in list(self._dialects.values()):
            dialect.pool.tidy()

    def close(self) -> None:
        for dialect in self._dialects.values():
            dialect.pool.close()


# Relay -------------------------------------------------------------------------------


def finished_index(choice: Any) -> int | None:
    """The index of a choice that has its finish, else None."""
    if not isinstance(choice, dict) or not choice.get("finish_reason"):
        return None
    return choice["index"] if type(choice.get("index")) is int else 0


class Relay:
    """One admitted request: forwards, meters and settles. Outlives the view.

    An iterable with an idempotent `close()`: a generator's `finally` never runs on a
    response that is closed before its first item.
    """

    def __init__(
        self, services: Services, call: Call, model: Model, lease: Lease, watch: Watch
    ):
        self.call, self.model, self.lease, self.watch = call, model, lease, watch
        self._services = services
        self._answer: Answer | None = None
        self._started = time.monotonic()
        self._ttfb: int | None = None
        self._usage: Usage | None = None  # as the upstream reported it
        self._relayed = 0  # bytes of the answer's text
        self._finishes: set[Any] = set()  # indices of choices that have their finish
        self._status = 200  # of a stream that comes to its end
        self._ended = self._closed = False
        self.charge: Charge | None = None  # how it ended, once the ledger was told
        self._names: tuple[bytes, bytes] | None = None
        self._buffer: EventBuffer | None = None
        self._block: bytes | None = b""
        self._rest = b""  # of a chunk that the client has not taken yet
        self._shape = (b"",) * 4  # what surrounds the text of a block, theirs and ours

    def respond(self) -> Response:
        """The response; whatever fails before its first byte is raised."""
        try:
            self._answer = self._send()
            if self._answer.stream:
                self.watch.streams()
                kind = f"{STREAM_TYPE}; charset=utf-8"
                return Response(self, 200, STREAM_HEADERS, None, kind, True)
            body = self._whole()
        except Ended as ended:
            self._abandon(499 if str(ended) == "client" else 503)
            raise ended.failure() from None
        except ProxyError as error:
            self._abandon(error.status)
            raise
        except BaseException:
            self._abandon(500)
            raise
        self.close()
        return Response(body, 200, None, None, "application/json")

    def _send(self) -> Answer:
        """Asks the upstreams in turn while nothing can have been generated."""
        failed = refused = lacking = None  # what was asked tells more than what was not
        for upstream, upstream_id in self.model.routes:
            dialect = self._services.upstreams.dialect(upstream)
            try:
                dialect.check(self.call)
            except UpstreamFailed as error:
                lacking = lacking or error
                self._note_failure(upstream, error)
                continue
            except ProxyError as error:
                refused = refused or error
                continue
            try:
                body = self._body(dialect, upstream_id)
                return dialect.send(self.call, body, self.watch)
            except UpstreamFailed as error:
                failed = error
                self._note_failure(upstream, error)
                if not error.clean:
                    break
        raise failed or refused or lacking

    def _note_failure(self, upstream: UpstreamConfig, error: UpstreamFailed) -> None:
        note = {"upstream": upstream.name, "reason": error.reason}
        self._services.log.note("upstream", **note)

    def _body(self, dialect: Dialect, upstream_id: str) -> dict[str, Any]:
        """The body for one upstream: its model id, the defaults, the cap."""
        body = {**self.model.defaults, **self.call.body, "model": upstream_id}
        if not self.model.price.output or self.call.path in NO_OUTPUT:
            return body
        named = CAPS & self.model.defaults.keys()  # the operator knows better
        own = min(named, default=None) or dialect.cap_name(self.call.path, body)
        caps = {name for name in CAPS & body.keys() if body[name]}
        for name in caps | ({own} if own else set()):
            body[name] = min(body.get(name) or self.lease.tokens, self.lease.tokens)
        return body

    # JSON

    def _whole(self) -> bytes:
        """The whole JSON answer, settled."""
        data = self._answer.read_all()
        try:
            document = json.loads(data.decode())
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict) or document.get("error"):
            raise UpstreamFailed("no JSON object, or an error inside a 200")
        self._heard()
        usage = read_usage(document, self.call.path not in NO_OUTPUT)
        images = self._answer.images
        images = count_images(document) if images is None else images
        if usage is None:
            text = sum(map(len, TEXT.findall(data)))
            priced = self.model.price.image or not self.model.price.output
            usage = Usage() if priced and images else estimate(self.call, text)
        self._usage = replace(usage, images=images) if images else usage
        self._settle_patiently()
        same = document.get("model") == self.model.id
        return data if same else self._rename_in(data, document)

    # Streams

    def __iter__(self) -> Iterator[bytes]:
        yield b""  # the headers leave before the first event
        try:
            yield from self._blocks()
        except Ended as ended:
            if str(ended) != "client":
                yield self._break(ended.failure())
        except ProxyError as error:
            yield self._break(error)

    def _blocks(self) -> Iterator[bytes]:
        """Blocks of whole events as they come; the charge is written before the end."""
        self._buffer = EventBuffer()
        sock = self._answer.unblocked() if self._carried() else None
        while (block := self._next(sock)) is not None:
            if is_notable(block):
                yield from self._pass(block)
                if self._ended:
                    return
            elif block:
                yield self._plain(block)
        self.watch.check()
        yield from self._pass(self._buffer.flush())
        if not self._ended:
            if not self._finished:
                raise UpstreamFailed("the stream ended without a finish")
            self._settle_patiently()
            yield DONE

    def _carried(self) -> bool:
        """Whether the watcher may write to the client, around the server."""
        return self.watch.chunked and isinstance(self._answer, HttpAnswer)

    def _next(self, sock: socket.socket | None) -> bytes | None:
        """The next block that this thread has to pass on; None at the end."""
        if sock is None:
            data = self._answer.read()
            return self._buffer.feed(data) if data else None
        self._services.watcher.carry(sock, self._step)
        if self._rest:
            self.watch.client.sendall(self._rest)
            self._rest = b""
        return self._block

    def _step(self) -> bool:
        """Relays a plain block that has come to a client that takes it; all else
        (True) is for the relay's own thread."""
        try:
            data = self._answer.read()
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        self._block = block = self._buffer.feed(data) if data else None
        if block is None:
            return True
        out = self._by_shape(block)
        if out is None:
            if is_notable(block):
                return True
            out = self._plain(block)
        self._block = b""
        if out:
            chunk = b"%x\r\n%b\r\n" % (len(out), out)
            try:
                sent = self.watch.client.send(chunk, socket.MSG_DONTWAIT)
            except BlockingIOError:
                sent = 0
            self._rest = chunk[sent:]
        # At its end the socket will not be readable again.
        return bool(self._rest) or self._answer.ended

    def _plain(self, block: bytes) -> bytes:
        """The block as the client gets it, metered."""
        texts = self._meter(block)
        out = self._rename(block)
        if len(texts) == 1 and b"data:" in block:
            start, end = texts[0]
            head, tail = new = block[:start], block[end:]
            if out != block:
                new = [part.replace(*self._names) for part in new]
            if out == new[0] + block[start:end] + new[1]:
                self._shape = head, tail, *new
        return out

    def _by_shape(self, block: bytes) -> bytes | None:
        """The same for a block that differs from an earlier one only in the plain
        characters of its text: it need not be searched (6 µs a step instead of 11)."""
        head, tail, new_head, new_tail = self._shape
        if not head or not block.startswith(head) or not block.endswith(tail):
            return None
        text = block[len(head) : len(block) - len(tail)]
        if len(head) + len(text) + len(tail) != len(block):
            return None  # head and tail overlap
        if b'"' in text or b"\\" in text or b"\n" in text or b"\r" in text:
            return None
        self._heard()
        self._relayed += len(text)
        return new_head + text + new_tail

    def _pass(self, block: bytes) -> Iterator[bytes]:
        """What the client gets of a block that holds something of note."""
        kept, fate = [], KEEP
        for event in split_events(block):
            fate = self._fate(event)
            if fate in (KEEP, LAST):
                kept.append(event)
            if fate in (LAST, FAIL):
                break
        last = [kept.pop()] if fate == LAST else []
        if kept:
            yield self._rename(b"".join(kept))
        if last:
            self._ended = True
            self._settle_patiently()
            yield self._rename(last[0])
        if fate == FAIL:
            raise UpstreamFailed("an error inside the stream")

    def _fate(self, event: bytes) -> str:
        """Meters one event and says what becomes of it."""
        self._meter(event)
        if not is_notable(event):
            return KEEP
        if event_data(event).strip() == b"[DONE]":
            needs_finish = self.call.path in DONE_PATHS
            return FAIL if needs_finish and not self._finishes else LAST
        document = event_document(event)
        if document.get("error"):
            return FAIL
        if usage := read_usage(document):
            self._usage = larger(usage, self._usage or usage)
        if document.get("type") in LAST_EVENTS:
            if document["type"] == "response.failed":
                self._status = 503
            return LAST
        choices = document.get("choices")
        if isinstance(choices, list):
            self._finishes |= {*map(finished_index, choices)} - {None}
            if not choices and "usage" in document and not self.call.wants_usage:
                return DROP
        return KEEP

    def _meter(self, block: bytes) -> list[tuple[int, int]]:
        """Counts the text that is relayed, and notes that the upstream is alive; the
        places of the texts."""
        if b"data:" not in block:
            return []
        self._heard()
        # The events of /v1/responses tell each text again when it is done.
        pattern = DELTA if self.call.path == "responses" else TEXT
        texts = [match.span(1) for match in pattern.finditer(block)]
        self._relayed += sum(end - start for start, end in texts)
        return texts

    def _heard(self) -> None:
        self.watch.heard = now = time.monotonic()
        if self._ttfb is None:
            self._ttfb = int((now - self._started) * 1000)

    def _break(self, error: ProxyError) -> bytes:
        """The error event that ends a stream which could not end well."""
        self._services.log.note("stream", request=self.lease.id, reason=error.reason)
        self._resolve_now_or_later(503)
        return b"data: " + error.envelope() + b"\n\n"

    def _rename(self, block: bytes) -> bytes:
        """The block with the client's name of the model where the upstream's stood."""
        if self._names:
            old, new = self._names
            if block.count(b'"model"') == block.count(old):
                return block if old == new else block.replace(old, new)
        if b'"model"' not in block:
            return block
        events = split_events(block)
        return b"".join(
            self._rename_in(event, event_document(event)) for event in events
        )

    def _rename_in(self, data: bytes, document: dict[str, Any]) -> bytes:
        """The same for one event or answer, by its member; learns how it is written."""
        response = document.get("response")
        holder = response if isinstance(response, dict) else document
        for match in MODEL_NAME.finditer(data) if document else ():
            if json.loads(b'"' + match[1] + b'"') == holder.get("model"):
                old, start = match[0], match.start(1) - match.start() - 1
                new = old[:start] + to_json(self.model.id)
                self._names = old, new
                return data.replace(old, new)
        return data

    # The end

    @property
    def _finished(self) -> bool:
        """Whether each choice of the stream has its finish."""
        return len(self._finishes) >= self.call.answers

    def _charge(self, status: int) -> Charge:
        amount, usage = 0, Usage()
        whole = status == 200 or self._ended or self._finished
        if self._relayed or whole and (self._usage or status == 200):
            usage = self._used(whole)
            amount = cost(usage, self.model.price)
        if usage.estimated:
            amount = min(amount, self.lease.hold)
        return Charge(
            status,
            amount,
            usage.input,
            usage.cached,
            usage.output,
            usage.images,
            usage.estimated,
            self._ttfb,
            int((time.monotonic() - self._started) * 1000),
        )

    def _used(self, whole: bool) -> Usage:
        """What was reported, or an estimate; of a cut answer the report tells only
        what had been made by then."""
        images = self._answer.images
        if images is not None:
            return replace(self._usage or Usage(), images=images)
        if whole and self._usage:
            return self._usage
        guess = estimate(self.call, self._relayed)
        if self._usage and self._usage.output >= guess.output:
            return self._usage
        known = self._usage or guess
        return replace(known, output=guess.output, estimated=True)

    def _resolve(self, status: int) -> None:
        """Writes how the request ended into the ledger; raises LedgerUnavailable."""
        charge = self._charge(status)
        self._services.ledger.resolve(self.lease, charge)
        self.charge = charge

    def _settle_patiently(self) -> None:
        """The charge, before the last byte; a ledger in trouble is waited for."""
        deadline = time.monotonic() + SETTLE_PATIENCE
        while True:
            try:
                return self._resolve(self._status)
            except LedgerUnavailable as error:
                if time.monotonic() > deadline:
                    # The answer was made: a repeat would be billed again.
                    error.headers = {"x-should-retry": "false"}
                    raise
            self.watch.sleep(0.25)

    def _resolve_now_or_later(self, status: int) -> None:
        """Never raises: what cannot be written now is kept and written later."""
        if self.charge is not None:
            return
        try:
            self._resolve(status)
        except LedgerUnavailable as error:
            self.charge = self._charge(status)
            self._services.ledger.resolve_later(self.lease, self.charge)
            self._services.log.note(
                "ledger", request=self.lease.id, reason=error.reason
            )

    def _abandon(self, status: int) -> None:
        """Ends a request whose answer never began: free."""
        self._usage = None
        self._resolve_now_or_later(status)
        self.close()

    def close(self) -> None:
        """Ends everything that is still open; what was relayed is charged."""
        if self._closed:
            return
        self._closed = True
        self._services.watcher.remove(self.watch)
        if self._answer is not None:
            self._answer.close()
        self._resolve_now_or_later(499)
        self._services.log.request(self)


# Pages -------------------------------------------------------------------------------

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self';"
    " style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}

DOCS_HTML = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>API documentation</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/assets/pages.css">
<script src="/assets/docs.js" defer></script>
</head>
<body>
<a class="skip" href="#main">Skip to the text</a>
<header class="top">
<strong>AI API</strong>
<nav aria-label="Pages">
<a href="/" aria-current="page">Documentation</a> &nbsp; <a href="/dashboard">Dashboard</a>
</nav>
</header>
<main id="main" class="docs">
<nav class="toc" aria-label="Contents"><ol>
<li><a href="#start">Start</a></li><li><a href="#authentication">Authentication</a></li>
<li><a href="#chat">Chat completions</a></li><li><a href="#streaming">Streaming</a></li>
<li><a href="#models">Models</a></li>
<li><a href="#images">Image generation</a></li>
<li><a href="#python">Python</a></li><li><a href="#javascript">JavaScript</a></li>
<li><a href="#curl">cURL</a></li><li><a href="#receipts">Receipts</a></li>
<li><a href="#charges">What is charged</a></li><li><a href="#errors">Error codes</a></li>
<li><a href="#limits">Rate limits</a></li>
</ol></nav>
<div>
<section id="start" class="card">
<h1>API documentation</h1>
<p>One API for chat, reasoning, code and images. It speaks the OpenAI API: code written for OpenAI
works here once the base URL and the key are changed.</p>
<figure class="example"><figcaption>Base URL</figcaption>
<pre id="base-url" data-copy="base URL">@BASE_URL@</pre></figure>
<p>The examples on this page run as they stand once their key is yours. @KEY_NOTE@</p></section>
<section id="authentication" class="card"><h2>Authentication</h2>
<p>Every request carries an API key in the <code>Authorization</code> header. The first key of your
account comes from whoever runs this server; with it you get more from the
<a href="/dashboard">API Keys dashboard</a>, each shown once. Keep them secret: never put one in a
web page, an app or a repository. A key that got out can be revoked there and stops working at
once.</p>
<figure class="example"><figcaption>Header</figcaption><pre id="auth-header"
data-copy="header">Authorization: Bearer @EXAMPLE_KEY@</pre></figure></section>
<section id="chat" class="card"><h2>Chat completions</h2>
<p class="endpoint"><b>POST</b>/v1/chat/completions</p>
<p>Takes a conversation and answers with its next message. The body is JSON, at least a
<code>model</code> and <code>messages</code>; other fields of OpenAI's format are passed to the
model. Without <code>max_tokens</code> this server's limit for the model holds; where the credits
left cannot pay for so much, the answer is cut to what they can pay.</p>
<figure class="example"><figcaption>Request body</figcaption>
<pre id="chat-request" data-copy="request body">{
  "model": "@EXAMPLE_MODEL@",
  "messages": [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Hello! What can you do?"}
  ],
  "max_tokens": 1024,
  "temperature": 0.7,
  "stream": false
}</pre></figure>
<figure class="example"><figcaption>Response</figcaption>
<pre id="chat-response" data-copy="response">{
  "id": "chatcmpl-abc123",
  "object": "chat.completion",
  "created": 1740000000,
  "model": "@EXAMPLE_MODEL@",
  "choices": [
    {
      "index": 0,
      "message": {"role": "assistant", "content": "I can help you with many things..."},
      "finish_reason": "stop"
    }
  ],
  "usage": {"prompt_tokens": 25, "completion_tokens": 142, "total_tokens": 167}
}</pre></figure>
<p>A reasoning model puts its chain of thought into <code>reasoning_content</code>, beside
<code>content</code>. Any other <code>POST /v1/…</code> of the OpenAI API whose JSON body names a
<code>model</code> (completions, embeddings, responses) goes to the same path of that model's
provider, if the provider has it.</p></section>
<section id="streaming" class="card"><h2>Streaming</h2>
<p>With <code>"stream": true</code> the answer comes as server-sent events while it is being
written: lines of <code>data: </code> with a <code>chat.completion.chunk</code> each, and
<code>data: [DONE]</code> after the last. Add <code>"stream_options": {"include_usage": true}</code>
for a chunk with the usage before the end. Lines that start with a colon are comments. If
something fails on the way, the last event is <code>data: {"error": {…}}</code> and no
<code>[DONE]</code> follows: an answer without <code>[DONE]</code> is not complete.</p>
<figure class="example"><figcaption>cURL</figcaption>
<pre id="stream-curl" data-run="sh" data-copy="streaming with cURL">
curl -N @BASE_URL@/chat/completions \
  -H "Authorization: Bearer @EXAMPLE_KEY@" \
  -H "Content-Type: application/json" \
  -d '{
    "model": "@EXAMPLE_MODEL@",
    "messages": [{"role": "user", "content": "Count to five"}],
    "stream": true
  }'</pre></figure>
<figure class="example"><figcaption>Python, OpenAI SDK</figcaption>
<pre id="stream-python" data-run="python" data-copy="streaming with Python">
from openai import OpenAI

client = OpenAI(api_key="@EXAMPLE_KEY@", base_url="@BASE_URL@")

stream = client.chat.completions.create(
    model="@EXAMPLE_MODEL@",
    messages=[{"role": "user", "content": "Write a haiku about rain"}],
    stream=True,
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()</pre></figure></section>
<section id="models" class="card"><h2>Models</h2>
<p>Prices are in credits, for a million tokens, an image or a request. <code>GET /v1/models</code> lists
those that your key may use.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Models"><table id="model-table" class="codes">
<thead><tr><th scope="col">Model</th><th scope="col">About</th><th scope="col">Price</th></tr>
</thead><tbody>
@MODEL_ROWS@
</tbody></table></div></section>
<section id="images" class="card"><h2>Image generation</h2>
<p class="endpoint"><b>POST</b>/v1/chat/completions</p>
<p>JiMeng paints through the same call: name the image model (<code>@REAL_IMAGE_MODEL@</code>) and
describe the picture in the last user message. It takes some seconds. The answer's
<code>content</code> is the address of the image and nothing else; download it soon, such links
last about a day. @IMAGE_NOTE@</p>
<figure class="example"><figcaption>cURL</figcaption>
<pre id="image-curl" data-run="sh" data-copy="image with cURL">
curl @BASE_URL@/chat/completions \
  -H "Authorization: Bearer @EXAMPLE_KEY@" \
  -H "Content-Type: application/json" \
  -d '{
    "model": "@IMAGE_MODEL@",
    "messages": [
      {"role": "user", "content": "A futuristic city at sunset, cinematic lighting"}
    ]
  }'</pre></figure>
<figure class="example"><figcaption>Response, the part that matters</figcaption>
<pre id="image-response" data-copy="image response">
{
  "choices": [
    {"message": {"role": "assistant", "content": "https://cdn.example.com/gen/image-xyz.png"}}
  ]
}</pre></figure></section>
<section id="python" class="card"><h2>Python</h2>
<figure class="example"><figcaption>With requests (<code>pip install requests</code>)</figcaption>
<pre id="python-requests" data-run="python" data-copy="Python with requests">
import requests

API_KEY = "@EXAMPLE_KEY@"
BASE_URL = "@BASE_URL@"

response = requests.post(
    f"{BASE_URL}/chat/completions",
    headers={"Authorization": f"Bearer {API_KEY}"},
    json={
        "model": "@EXAMPLE_MODEL@",
        "messages": [{"role": "user", "content": "Explain quantum computing simply"}],
    },
    timeout=600,
)
response.raise_for_status()
print(response.json()["choices"][0]["message"]["content"])</pre></figure>
<figure class="example"><figcaption>OpenAI SDK (<code>pip install openai</code>)</figcaption>
<pre id="python-openai" data-run="python" data-copy="OpenAI SDK">
from openai import OpenAI

client = OpenAI(
    api_key="@EXAMPLE_KEY@",
    base_url="@BASE_URL@",
)
completion = client.chat.completions.create(
    model="@REASONING_MODEL@",
    messages=[{"role": "user", "content": "Solve: 2x + 5 = 13"}],
)
print(completion.choices[0].message.content)</pre></figure></section>
<section id="javascript" class="card"><h2>JavaScript</h2>
<p>For a server, where the key stays secret: save it as <code>chat.mjs</code> and run
<code>node chat.mjs</code> (Node 18 or newer, nothing to install).</p>
<figure class="example"><figcaption>With fetch</figcaption>
<pre id="javascript-fetch" data-run="node" data-copy="JavaScript">
const API_KEY = "@EXAMPLE_KEY@";
const BASE_URL = "@BASE_URL@";

const response = await fetch(`${BASE_URL}/chat/completions`, {
  method: "POST",
  headers: {
    "Authorization": `Bearer ${API_KEY}`,
    "Content-Type": "application/json",
  },
  body: JSON.stringify({
    model: "@EXAMPLE_MODEL@",
    messages: [{ role: "user", content: "What is the capital of France?" }],
  }),
});
const data = await response.json();
if (!response.ok) throw new Error(data.error.message);
console.log(data.choices[0].message.content);</pre></figure></section>
<section id="curl" class="card"><h2>cURL</h2>
<figure class="example"><figcaption>A chat completion</figcaption>
<pre id="curl-chat" data-run="sh" data-copy="cURL">
curl @BASE_URL@/chat/completions \
  -H "Authorization: Bearer @EXAMPLE_KEY@" \
  -H "Content-Type: application/json" \
  -d '{
    "model": "@EXAMPLE_MODEL@",
    "messages": [
      {"role": "user", "content": "Hello!"}
    ]
  }'</pre></figure></section>
<section id="receipts" class="card"><h2>Receipts</h2>
<p>Every answer has an <code>x-request-id</code> header. For a request that was let in,
<code>GET /v1/account/requests/{id}</code> tells what became of it: status, tokens by class, cost
and times; <code>status</code> 499 says that you left, 503 that the answer failed or was cut.
<code>GET /v1/account/requests</code> lists them, newest first (<code>limit</code> up to 200,
<code>after</code> the last id you have, <code>since</code> and <code>until</code> in unix seconds);
<code>GET /v1/account/usage?days=30</code> sums them by day (UTC) and model;
<code>GET /v1/account</code> has your credits, limits and keys. The
<a href="/dashboard">dashboard</a> shows the same. These calls are free.</p>
<figure class="example"><figcaption>Python: a request and its receipt</figcaption>
<pre id="receipt-python" data-run="python" data-copy="receipt with Python">
import requests

BASE_URL = "@BASE_URL@"
headers = {"Authorization": "Bearer @EXAMPLE_KEY@"}

response = requests.post(f"{BASE_URL}/chat/completions", headers=headers, json={
    "model": "@EXAMPLE_MODEL@",
    "messages": [{"role": "user", "content": "Hello!"}],
})
request_id = response.headers["x-request-id"]
receipt = requests.get(f"{BASE_URL}/account/requests/{request_id}", headers=headers)
print(receipt.json())</pre></figure>
<figure class="example"><figcaption>cURL: credits left</figcaption>
<pre id="account-curl" data-run="sh" data-copy="credits with cURL">
curl @BASE_URL@/account \
  -H "Authorization: Bearer @EXAMPLE_KEY@"</pre></figure></section>
<section id="charges" class="card"><h2>What is charged</h2>
<ul>
<li>The tokens that the provider reports for the request, at the prices above. Cached input has its
own, lower price where the model has one.</li>
<li>Before a request is sent, the most that it can cost is held from your credits. What is not used
comes back when it ends, and an account never goes below zero.</li>
<li>Images cost their price for each image delivered.</li>
<li>Refusals, errors of a provider and refusals by its moderation are free.</li>
<li>If you leave in the middle of a stream, the provider is stopped at once and you pay for an
estimate of what had been relayed to you, nothing if nothing had been. The same goes for a stream
that broke off. Such receipts are marked <code>estimated</code>.</li>
</ul></section>
<section id="errors" class="card"><h2>Error codes</h2>
<p>Every error is JSON with this one shape; tell them apart by <code>code</code>.</p>
<figure class="example"><figcaption>Error</figcaption><pre id="error-body" data-copy="error">
{"error": {"message": "…", "type": "…", "param": null, "code": "rate_limit_exceeded"}}</pre></figure>
<div class="scroll" tabindex="0" role="region" aria-label="Error codes">
<table id="error-table" class="codes">
<thead><tr><th scope="col">HTTP status</th><th scope="col">Error code</th>
<th scope="col">Description</th></tr></thead>
<tbody>
<tr><td>400</td><td><code>invalid_request</code></td><td>The body is not valid JSON, or a field is
missing or of the wrong type. What the provider finds wrong with a request comes with the
provider's message, as 400, 404, 413 or 422.</td></tr>
<tr><td>400</td><td><code>content_policy_violation</code></td><td>The provider's moderation refused
the prompt or the picture. Free.</td></tr>
<tr><td>401</td><td><code>unauthorized</code></td><td>Missing or invalid API key; a revoked one
too.</td></tr>
<tr><td>402</td><td><code>insufficient_credits</code></td><td>The account has too few credits
left for this request.</td></tr>
<tr><td>404</td><td><code>model_not_found</code></td><td>There is no such model, or your account may
not use it.</td></tr>
<tr><td>404</td><td><code>not_found</code></td><td>There is nothing at this address.</td></tr>
<tr><td>405</td><td><code>method_not_allowed</code></td><td>The address exists, but not for this
method: a GET where a POST belongs, say.</td></tr>
<tr><td>413</td><td><code>request_too_large</code></td><td>The body is larger than this server
takes.</td></tr>
<tr><td>415</td><td><code>unsupported_media_type</code></td><td>The body must be sent as
<code>Content-Type: application/json</code>.</td></tr>
<tr><td>429</td><td><code>rate_limit_exceeded</code></td><td>Too many requests, a minute or at once:
see <a href="#limits">rate limits</a>.</td></tr>
<tr><td>500</td><td><code>internal_error</code></td><td>Something went wrong in this server. Tell
its operator the <code>x-request-id</code>.</td></tr>
<tr><td>503</td><td><code>provider_unavailable</code></td><td>The AI provider behind the model is
down, failing or not set up here, or this server was restarted in the middle of the answer. <code>x-should-retry: false</code> means that a repeat cannot
help or could cost twice; otherwise try again after <code>Retry-After</code>.</td></tr>
<tr><td>503</td><td><code>overloaded</code></td><td>This server has no room for another
request right now. Nothing was sent on; try again after <code>Retry-After</code>.</td></tr>
<tr><td>503</td><td><code>ledger_unavailable</code></td><td>This server cannot write its
accounts, so it serves nothing until it can.</td></tr>
</tbody></table></div></section>
<section id="limits" class="card"><h2>Rate limits</h2>
<div class="scroll"><table id="limit-table">
<tbody>
<tr><th scope="row">Requests (per API key)</th><td>@RATE@</td></tr>
<tr><th scope="row">Concurrent requests</th><td>@CONCURRENT@</td></tr>
</tbody></table></div>
<p>Above a limit the answer is 429, and its <code>Retry-After</code> header says how many seconds to
wait (1 to 60). The window slides: a request counts for as long as the window lasts, then its place
is free again. A stream is one concurrent request until it ends. Answers to a key carry
<code>x-ratelimit-limit-requests</code>, <code>x-ratelimit-remaining-requests</code> and
<code>x-ratelimit-reset-requests</code>. The OpenAI SDKs wait and repeat by themselves.
A refused request counts as well, unless its key is wrong. Account calls and
<code>/v1/models</code> are counted apart (300 a minute) and take nothing from these limits.</p>
<p class="soft">Accounts may have limits of their own; the dashboard shows yours. Is this server up?
<a href="/healthz">@ROOT_URL@/healthz</a></p></section>
</div>
</main>
</body>
</html>
"""

DEMO_NOTE = (
    "They show the public key <code>@EXAMPLE_KEY@</code>, which reaches only the built-in"
    " model <code>@EXAMPLE_MODEL@</code>: it answers with your own words. With a key of"
    ' your own account, use any of the <a href="#models">models</a>.'
)
OWN_KEY_NOTE = (
    "<code>@EXAMPLE_KEY@</code> stands for it, and <code>@EXAMPLE_MODEL@</code> for any"
    ' of the <a href="#models">models</a>.'
)
DEMO_IMAGE_NOTE = (
    "(The example names <code>@EXAMPLE_MODEL@</code>, which only gives its own words back:"
    " put in <code>@REAL_IMAGE_MODEL@</code> with a key of your own.)"
)
ABOUT_IMAGES = r'<section id="images".*?</section>\n|<li><a href="#images">.*?</li>\n'

DASHBOARD_HTML = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>API Keys dashboard</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/assets/pages.css">
<script src="/assets/docs.js" defer></script>
<script src="/assets/dashboard.js" defer></script>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header class="top">
<strong>AI API</strong>
<nav aria-label="Pages">
<a href="/">Documentation</a> &nbsp; <a href="/dashboard" aria-current="page">Dashboard</a>
</nav>
</header>
<main id="main">
<p id="notice" class="card" role="status" hidden></p>
<noscript><p class="card">The dashboard needs JavaScript.</p></noscript>

<section id="sign-in" class="card" hidden>
<h1>API Keys dashboard</h1>
<p>Sign in with an API key of your account. It stays in this browser tab until you sign out or close
the tab.</p>
<form id="sign-in-form" class="row">
<label>API key <input id="key-input" type="password" autocomplete="off" spellcheck="false" required
placeholder="sk-…"></label>
<button class="main">Sign in</button>
<output></output>
</form>
</section>

<div id="board" hidden>
<div class="head">
<h1 id="title" tabindex="-1">Account <bdi id="account-id"></bdi></h1>
<button type="button" id="back" hidden>Back to my account</button>
<button type="button" id="sign-out">Sign out</button>
</div>
<div class="grid">
<section class="card"><h2>Credits left</h2>
<p class="big" id="available">–</p>
<p class="soft" id="pace"></p>
<dl class="pairs"><dt>Granted</dt><dd id="granted"></dd><dt>Spent</dt><dd id="spent"></dd>
<dt>Held by running requests</dt><dd id="held"></dd></dl>
<form id="grant-form" class="row" hidden>
<label>Grant credits <input id="grant-credits" type="number" step="any" required></label>
<label>Note <input id="grant-note" maxlength="200"></label>
<button>Grant</button><output></output>
</form>
</section>

<section class="card"><h2>Limits, live</h2>
<p id="live-none" class="soft" hidden>Limits count per key and show for the key signed in.</p>
<div id="live">
<label for="rate-meter">Requests, limit <b id="rate-limit"></b></label>
<meter id="rate-meter" min="0"></meter><p id="rate-text"></p>
<label for="now-meter">Requests in progress, at most <b id="now-limit"></b></label>
<meter id="now-meter" min="0"></meter><p id="now-text"></p>
</div>
</section>

<section class="card wide">
<div class="head"><h2>Spending</h2>
<label>Period <select id="days"><option value="7">7 days</option>
<option value="30" selected>30 days</option><option value="90">90 days</option></select></label>
</div>
<p id="spending-text"></p>
<div id="picture">
<svg id="chart" class="chart" role="img" aria-labelledby="spending-text" viewBox="0 0 100 100"
preserveAspectRatio="none"></svg>
<p class="ends soft" aria-hidden="true"><span id="chart-from"></span><span id="chart-to"></span></p>
</div>
<table id="models" class="stack" role="table"><caption>Spending by model</caption>
<thead><tr><th>Model</th><th class="num">Requests</th><th class="num">Input tokens</th>
<th class="num">of these cached</th><th class="num">Output tokens</th><th class="num">Images</th>
<th class="num">Credits</th></tr></thead><tbody></tbody></table>
<details><summary>By day, as a table</summary>
<table id="day-table"><thead><tr><th>Day (UTC)</th><th class="num">Requests</th>
<th class="num">Credits</th></tr></thead><tbody></tbody></table></details>
</section>

<section class="card wide"><h2>API keys</h2>
<form id="key-form" class="row">
<label>Name of the new key <input id="key-name" required maxlength="300" autocomplete="off"></label>
<label class="tick" id="key-admin-label" hidden><input id="key-admin" type="checkbox"> admin</label>
<button class="main">Make key</button><output></output>
</form>
<table id="keys" class="stack" role="table"><caption>API keys</caption>
<thead><tr><th>Name</th><th>Key</th><th>Created</th><th>Last used</th><th>Kept in</th>
<th>Revoke</th></tr></thead><tbody></tbody></table>
</section>

<section class="card wide"><h2>Playground</h2>
<p class="soft">Sends one message with the key you signed in with: it counts and costs like any
other request.</p>
<form id="play-form" class="row">
<label>Model <select id="play-model"></select></label>
<label class="long">Message
<textarea id="play-message" rows="2" required dir="auto"></textarea></label>
<button class="main">Send</button>
<button type="button" id="play-stop" disabled>Stop</button><output></output>
</form>
<div id="play-thoughts" class="answer soft" dir="auto" hidden></div>
<div id="play-answer" class="answer" dir="auto" role="region" aria-label="Answer"></div>
</section>

<section class="card wide" id="admin" hidden><h2>All accounts</h2>
<form id="account-form" class="row">
<label>Name of the new account <input id="account-name" required autocomplete="off"></label>
<label>Credits <input id="account-credits" type="number" step="any" min="0" value="0"></label>
<button class="main">Make account</button><output></output>
</form>
<table id="accounts" class="stack" role="table"><caption>All accounts</caption>
<thead><tr><th>Account</th><th class="num">Granted</th><th class="num">Spent</th>
<th class="num">Held</th><th class="num">Left</th><th class="num">Keys</th></tr></thead>
<tbody></tbody></table>
<p class="actions"><span class="soft">Open an account to grant it credits or make it a key.</span>
<button type="button" id="accounts-more" hidden>More</button></p>
</section>

<section class="card wide">
<div class="head"><h2>Recent requests</h2>
<form id="period" class="row"><label>From <input type="date" id="since"></label>
<label>To <input type="date" id="until"></label><button>Show</button><output></output></form>
</div>
<table id="requests" class="stack" role="table"><caption>Recent requests</caption>
<thead><tr><th>Time</th><th>Status</th><th>Model</th><th>Key</th><th class="num">Tokens in</th>
<th class="num">Tokens out</th><th class="num">Credits</th><th class="num">Duration</th></tr>
</thead><tbody></tbody></table>
<p class="actions"><span class="soft" id="requests-count" role="status"></span>
<button type="button" id="requests-more" hidden>More</button></p>
</section>
</div>
</div>

<dialog id="made" aria-labelledby="made-title"><form method="dialog">
<h2 id="made-title">New key <bdi id="made-name"></bdi></h2>
<p>Copy it now: it is not shown again.</p>
<code id="made-key" class="secret" data-copy="new key"></code>
<p class="actions"><button class="main">Done</button></p>
</form></dialog>
<dialog id="ask" aria-labelledby="ask-title"><form method="dialog">
<h2 id="ask-title">Revoke this key?</h2><p id="ask-text"></p>
<p class="actions"><button value="no">Keep it</button>
<button value="yes" class="danger">Revoke</button></p>
</form></dialog>
<dialog id="receipt" aria-labelledby="receipt-title"><form method="dialog">
<h2 id="receipt-title">Receipt</h2><dl class="pairs" id="receipt-fields"></dl>
<p class="actions"><button class="main">Close</button></p>
</form></dialog>
</main>
</body>
</html>
"""

PAGES_CSS = r""":root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --code: #f0f2f5; --line: #d5dae1; --text: #1a2029;
  --soft: #56606e; --accent: #0b62c4; --on: #fff; --good: #14703a; --warn: #8a5200; --bad: #b3261e;
  --mono: ui-monospace, "SFMono-Regular", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #11151b; --card: #1a2029; --code: #0c1015; --line: #343d4a; --text: #e6eaf0;
    --soft: #a0abba; --accent: #76b1ff; --on: #07182e; --good: #6fd598;
    --warn: #f0b95c; --bad: #ff9a92;
  }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
a { color: var(--accent); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
h1 { margin: 0 0 .5rem; font-size: 1.75rem; line-height: 1.2; }
h2 { margin: 0 0 .75rem; font-size: 1.25rem; line-height: 1.3; }
h3 { margin: 1.25rem 0 .4rem; font-size: 1rem; }
p { margin: 0 0 .75rem; }
small, .soft { color: var(--soft); font-size: .875rem; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.skip { position: absolute; left: -99rem; padding: .5rem 1rem; background: var(--card); }
.skip:focus { left: 0; }

/* Frame */
.top {
  display: flex; flex-wrap: wrap; align-items: center;
  gap: .25rem 1.25rem; padding: .6rem 1.25rem; background: var(--card);
  border-bottom: 1px solid var(--line);
}
.top strong { margin-right: auto; }
.top a { text-decoration: none; }
.top a[aria-current] { color: var(--text); font-weight: 600; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
main > *, .grid > * { min-width: 0; }
.card {
  margin: 0 0 1.25rem; padding: 1.1rem 1.25rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem;
}
.card > :last-child { margin-bottom: 0; }
.grid { display: grid; gap: 1.25rem; margin-bottom: 1.25rem; }
.grid > .card { margin: 0; }
.head {
  display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1rem; margin-bottom: .75rem;
}
.head h1, .head h2 { margin: 0 auto 0 0; min-width: 0; overflow-wrap: anywhere; }
h1:focus { outline: none; }
#notice { position: sticky; top: .5rem; z-index: 1; border-left: .3rem solid var(--accent); }

/* Documentation: contents beside the text where there is room */
.toc { margin-bottom: 1rem; }
.toc ol { margin: 0; padding: 0; list-style: none; columns: 2; font-size: .9rem; }
.toc a { display: block; padding: .15rem 0; text-decoration: none; }
.endpoint { font-family: var(--mono); font-size: .95rem; overflow-wrap: anywhere; }
.endpoint b { margin-right: .5rem; color: var(--good); }
@media (min-width: 60rem) {
  p > code, li > code, td > code { white-space: nowrap; }
  .docs { display: grid; grid-template-columns: 12rem minmax(0, 1fr); gap: 2rem; }
  .toc { position: sticky; top: 1.5rem; align-self: start; }
  .toc ol { columns: 1; }
  .grid { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .grid > .wide { grid-column: 1 / -1; }
}

/* Code */
code, pre, .mono { font-family: var(--mono); font-size: .875em; }
:not(pre) > code { padding: .1em .3em; background: var(--code); border-radius: .25em; }
code, .name { overflow-wrap: anywhere; }
.example { position: relative; margin: 0 0 1rem; }
.example figcaption { margin-bottom: .25rem; color: var(--soft); font-size: .875rem; }
pre {
  margin: 0; padding: .8rem 1rem; overflow-x: auto; background: var(--code);
  border: 1px solid var(--line); border-radius: .4rem; line-height: 1.5; tab-size: 4;
}
.copy { padding: .1rem .6rem; font-size: .8rem; background: var(--card); }
.example .copy { position: absolute; right: 0; top: 0; }

/* Tables; on a phone a .stack table shows each row as a small card */
.scroll { overflow-x: auto; }
table { width: 100%; margin-bottom: .75rem; border-collapse: collapse; font-size: .9rem; }
th, td { padding: .4rem .6rem; text-align: start; vertical-align: top; }
th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
tr + tr > * { border-top: 1px solid var(--line); }
tbody th { border-bottom: 0; }
th.num, td.num { text-align: right; font-variant-numeric: tabular-nums; }
td.none { padding: 1.25rem .6rem; color: var(--soft); text-align: center; }
td:nth-child(2) > code, .codes td:first-child { white-space: nowrap; }
td .name {
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden;
  min-width: 6ch; max-width: 34ch; text-align: left;
}
td time { white-space: nowrap; }
.tag {
  display: inline-block; padding: 0 .45rem; border: 1px solid currentColor; border-radius: 1rem;
  font-size: .78rem; white-space: nowrap;
}
@media (max-width: 45rem) {
  main { padding: 1rem .75rem 4rem; }
  .card { padding: .9rem; }
  .docs td, .docs th { padding: .4rem .3rem; }
  .stack, .stack tbody { display: block; }
  .stack thead { position: absolute; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .stack tr { display: grid; grid-template-columns: repeat(3, 1fr); gap: .4rem .75rem;
    padding: .7rem 0; }
  .stack tr + tr { border-top: 1px solid var(--line); }
  .stack td {
    min-width: 0; padding: 0; border: 0 !important; text-align: start !important;
    overflow-wrap: anywhere;
  }
  .stack td[data-label]::before {
    content: attr(data-label); display: block; color: var(--soft); font-size: .75rem;
  }
  .stack time { white-space: normal; }
  .stack td:only-child, .stack:not(#requests) td:first-child { grid-column: 1 / -1; }
  .codes thead { position: absolute; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .codes tbody tr { display: grid; grid-template-columns: max-content 1fr; padding: .4rem 0; }
  .codes tr + tr { border-top: 1px solid var(--line); }
  .codes tr > * { border: 0 !important; }
  .codes tr > :last-child { grid-column: 1 / -1; }
}

/* Controls */
button, input, select, textarea { font: inherit; color: inherit; }
button {
  padding: .35rem .9rem; background: transparent; border: 1px solid var(--line);
  border-radius: .4rem; cursor: pointer;
}
button:hover { border-color: var(--accent); }
button.main { background: var(--accent); border-color: var(--accent); color: var(--on); }
button.danger { border-color: var(--bad); color: var(--bad); }
button.link {
  padding: 0; border: 0; color: var(--accent); text-align: start; text-decoration: underline;
  vertical-align: top;
}
button:disabled { opacity: .55; cursor: default; }
input:not([type=checkbox]), select, textarea {
  display: block; width: 100%; padding: .35rem .6rem; background: var(--page);
  border: 1px solid var(--soft); border-radius: .4rem;
}
label { display: block; min-width: 0; font-size: .875rem; color: var(--soft); }
form.row { display: flex; flex-wrap: wrap; align-items: end; gap: .6rem .75rem; margin: .75rem 0; }
.head form.row { margin: 0; }
form.row label { flex: 1 1 9rem; }
form.row label.long { flex: 4 1 16rem; }
form.row label.tick { flex: 0 0 auto; padding-bottom: .5rem; }
form.row output { flex-basis: 100%; margin: 0; overflow-wrap: anywhere; }
output:empty { position: absolute; }
dialog {
  width: min(36rem, calc(100vw - 2rem)); padding: 1.25rem; color: var(--text);
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
}
dialog::backdrop { background: rgb(0 0 0 / .5); }
dialog p, dialog h2 { overflow-wrap: anywhere; }
.actions {
  display: flex; flex-wrap: wrap; align-items: center; justify-content: flex-end; gap: .6rem;
  margin: 1rem 0 0;
}
.secret { display: block; margin: .5rem 0; padding: .7rem !important; user-select: all; }

/* Dashboard */
.big { margin: 0; font-size: 1.75rem; font-weight: 650; line-height: 1.2; overflow-wrap: anywhere; }
.pairs { display: grid; grid-template-columns: auto 1fr; gap: .2rem 1rem; margin: .5rem 0 0; }
.pairs dt { color: var(--soft); }
.pairs dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
meter { display: block; width: 100%; height: 1.1rem; }
.chart { display: block; width: 100%; height: 11rem; border-bottom: 1px solid var(--line); }
.chart .bar { fill: var(--accent); }
.chart .hit { fill: transparent; }
.chart g:hover .hit { fill: var(--code); }
.ends { display: flex; justify-content: space-between; margin: .2rem 0 .6rem; }
.answer { margin-top: .75rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.answer img { max-width: 100%; }
details > summary { cursor: pointer; color: var(--soft); }
"""

DOCS_JS = r"""'use strict';
// Puts a Copy button after everything marked data-copy. The clipboard API exists only on
// https and localhost; elsewhere the text is selected and copied the old way.
async function copyText(node) {
  getSelection().selectAllChildren(node);
  if (navigator.clipboard) await navigator.clipboard.writeText(node.textContent);
  else if (!document.execCommand('copy')) throw new Error('refused');
  getSelection().removeAllRanges();
}

for (const node of document.querySelectorAll('[data-copy]')) {
  const button = document.createElement('button');
  const say = (text) => {
    button.textContent = text;
    button.setAttribute('aria-label', `${text}: ${node.dataset.copy}`);
  };
  button.type = 'button';
  button.className = 'copy';
  button.setAttribute('aria-live', 'polite');
  button.addEventListener('click', () => {
    copyText(node).then(() => say('Copied'), () => say('Press Ctrl+C'));
    setTimeout(say, 2500, 'Copy');
  });
  say('Copy');
  node.after(button);
}
"""

DASHBOARD_JS = r"""'use strict';
// The dashboard: signs in with an API key that only this tab's sessionStorage keeps, and shows
// what /v1/account and, to admins, /v1/accounts answer. Whatever comes from the API becomes
// text nodes and nothing else.

const STORE = 'api-key';
const POLL_MS = 5000; // live figures, only while the tab is to be seen
const PAGE = 50; // requests a page
const DAY_S = 86400;

// The key signed in, its account (me), the account on show and its path (view), the request rows
// on show; null when signed out. Answers for a session or a view that has gone are dropped.
let session = null;

class Gone extends Error {}

function apiError(status, body, retryAfter) {
  const message = body && body.error && body.error.message;
  return Object.assign(new Error(message || `The server answered with status ${status}.`),
    { status, retryAfter });
}

// ---- Small parts -----------------------------------------------------------------------

const $ = (id) => document.getElementById(id);
const show = (id, visible) => { $(id).hidden = !visible; };
const text = (id, value) => { $(id).textContent = value; };

function el(tag, props, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}

const name = (value) => el('bdi', { className: 'name', title: value }, value);

const decimals = new Intl.NumberFormat('en', { maximumFractionDigits: 6 });
const number = (value) => decimals.format(value || 0);

const clock = new Intl.DateTimeFormat('en', {
  month: 'short', day: 'numeric', hour: '2-digit', minute: '2-digit', second: '2-digit',
  hourCycle: 'h23',
});
const calendar = new Intl.DateTimeFormat('en', { dateStyle: 'medium' });

function moment(seconds, format) {
  if (seconds == null) return '–';
  const date = new Date(seconds * 1000);
  const iso = date.toISOString();
  return el('time', { dateTime: iso, title: iso }, format.format(date));
}

function duration(ms) {
  if (ms == null) return '–';
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

// One row of a table; labels repeat the headings where a phone shows rows as cards.
function row(table, cells) {
  const heads = table.tHead.rows[0].cells;
  return el('tr', { role: 'row' }, ...cells.map((cell, i) => {
    const td = el('td', { className: heads[i].className, role: 'cell' }, cell);
    td.dataset.label = heads[i].textContent;
    return td;
  }));
}

function fill(table, rows, none) {
  const empty = el('td', { className: 'none', colSpan: table.tHead.rows[0].cells.length }, none);
  table.tBodies[0].replaceChildren(...(rows.length ? rows : [el('tr', {}, empty)]));
}

function notice(message, bad) {
  text('notice', message);
  $('notice').classList.toggle('bad', Boolean(bad));
  show('notice', message);
}

// Runs work for a form or a button: busy meanwhile, its message or its error beside it.
async function busy(form, work) {
  const button = form.querySelector('button:not([type])');
  const output = form.querySelector('output');
  button.disabled = true;
  output.textContent = '';
  output.className = '';
  try {
    output.textContent = (await work()) || '';
  } catch (error) {
    if (error instanceof Gone) return;
    output.className = 'bad';
    output.textContent = error.message;
  } finally {
    button.disabled = false;
  }
}

function onSubmit(id, work) {
  $(id).addEventListener('submit', (event) => {
    event.preventDefault();
    busy($(id), work);
  });
}

// ---- API -------------------------------------------------------------------------------

async function send(path, options = {}) {
  const mine = session;
  const headers = { Authorization: `Bearer ${mine.key}` };
  if (options.body) headers['Content-Type'] = 'application/json';
  let response;
  try {
    response = await fetch(`/v1/${path}`, { ...options, headers, cache: 'no-store' });
  } catch (error) {
    if (session !== mine) throw new Gone();
    if (error.name === 'AbortError') throw error;
    throw new Error('The server cannot be reached.');
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  if (session !== mine) throw new Gone();
  if (response.status === 401 && mine.me) {
    signOut('You were signed out: this key is not valid any more.');
    throw new Gone();
  }
  throw apiError(response.status, body, response.headers.get('Retry-After'));
}

async function call(path, method, body) {
  const mine = session;
  const response = await send(path, { method, body: body && JSON.stringify(body) });
  const answer = await response.json();
  if (session !== mine) throw new Gone();
  return answer;
}

// The same for the account on show: one's own, or any for an admin.
async function ask(path, method, body) {
  const { view } = session;
  const answer = await call(view + path, method, body);
  if (session.view !== view) throw new Gone();
  return answer;
}

const accountPath = (id) => `accounts/${encodeURIComponent(id)}`;

function query(fields) {
  const set = Object.entries(fields).filter(([, value]) => value != null && value !== '');
  return `?${new URLSearchParams(set)}`;
}

// ---- Sign-in ---------------------------------------------------------------------------

async function signIn(key) {
  if (!/^[!-~]+$/.test(key)) throw new Error('This is not an API key: it has spaces or accents.');
  session = { key };
  try {
    session.me = await call('account');
  } catch (error) {
    session = null;
    if (error.status !== 401) throw error;
    sessionStorage.removeItem(STORE);
    throw new Error('Wrong key: it is unknown or was revoked. Check it and try again.');
  }
  const { admin, models } = session.me;
  sessionStorage.setItem(STORE, key);
  $('sign-in-form').reset();
  notice('');
  show('sign-in', false);
  show('board', true);
  for (const id of ['admin', 'grant-form', 'key-admin-label']) show(id, admin);
  $('play-model').replaceChildren(...models.map(({ id }) => el('option', { value: id }, id)));
  await open('account', session.me);
}

function signOut(message) {
  clearTimeout(session.timer);
  if (playing) playing.abort();
  session = null;
  sessionStorage.removeItem(STORE);
  for (const dialog of document.querySelectorAll('dialog')) dialog.close();
  for (const table of document.querySelectorAll('tbody')) table.replaceChildren();
  for (const form of document.forms) form.reset();
  for (const node of document.querySelectorAll('output, .answer')) node.textContent = '';
  show('board', false);
  show('sign-in', true);
  notice(message || '');
  $('key-input').focus();
}

// A background load: its failure is told at the top, a dropped answer not at all.
function guard(promise) {
  return promise.catch((error) => {
    if (!(error instanceof Gone)) notice(error.message, true);
  });
}

// ---- Account on show -------------------------------------------------------------------

async function open(view, known) {
  const account = known || await call(view);
  Object.assign(session, { view, account: null, rows: new Map(), period: {} });
  for (const id of ['requests', 'models', 'day-table']) $(id).tBodies[0].replaceChildren();
  for (const id of ['period', 'grant-form', 'key-form']) {
    $(id).reset();
    $(id).querySelector('output').textContent = '';
  }
  showAccount(account);
  $('title').focus();
  schedule();
  if (session.me.admin) guard(loadAccounts());
  await Promise.all([guard(loadUsage()), guard(loadRequests(true))]);
}

function showAccount(account) {
  const { credits, limits, live, keys } = account;
  const before = session.account || {};
  session.account = account;
  text('account-id', account.id);
  show('back', session.view !== 'account');
  for (const part of ['available', 'granted', 'spent', 'held']) text(part, number(credits[part]));
  show('live', live);
  show('live-none', !live);
  if (live) {
    const { requests_limit: most, requests_remaining: left, concurrent } = live;
    meter('rate', most - left, most, limits.rate, `${most - left} used, ${left} left`);
    meter('now', concurrent, limits.concurrent, limits.concurrent, `${concurrent} now`);
  }
  // Not redrawn for a mere last_used while the focus is in it: polling takes no one's focus.
  const same = (part) => JSON.stringify((before.keys || []).map(part)) ===
    JSON.stringify(keys.map(part));
  const focused = $('keys').contains(document.activeElement);
  if (!before.keys || !same((key) => (focused ? [key.id, key.revoked] : key))) showKeys(keys);
}

function meter(id, value, max, limit, words) {
  Object.assign($(`${id}-meter`), { max, value, low: max * 0.7, high: max * 0.9, optimum: 0 });
  text(`${id}-limit`, limit);
  text(`${id}-text`, words);
}

function schedule(delay = POLL_MS) {
  clearTimeout(session.timer);
  if (document.hidden) return;
  session.timer = setTimeout(poll, delay);
}

async function poll() {
  let delay = POLL_MS;
  try {
    const figures = () => JSON.stringify([session.account.credits, session.account.live]);
    const before = figures();
    showAccount(await ask(''));
    if (figures() !== before) await Promise.all([loadRequests(true), loadUsage()]);
    if (session.failed) notice('');
    session.failed = false;
  } catch (error) {
    if (error instanceof Gone || !session) return;
    session.failed = true;
    notice(error.message, true);
    delay = Math.max(delay, 1000 * (error.retryAfter || 0));
  }
  schedule(delay);
}

// ---- Spending --------------------------------------------------------------------------

const COUNTS = ['requests', 'input_tokens', 'cached_tokens', 'output_tokens', 'images', 'credits'];
const dayName = (seconds) => new Date(seconds * 1000).toISOString().slice(0, 10);

// Rows of usage with one value of a field, summed: a Map of {key, requests, credits, …}.
function sums(rows, field) {
  const groups = new Map();
  for (const usage of rows) {
    const sum = groups.get(usage[field]) || { key: usage[field] };
    groups.set(sum.key, sum);
    for (const count of COUNTS) sum[count] = (sum[count] || 0) + (usage[count] || 0);
  }
  return groups;
}

async function loadUsage() {
  const days = Number($('days').value);
  const { data } = await ask(`/usage${query({ days })}`);
  if (days !== Number($('days').value)) return;
  const byDay = sums(data, 'day');
  const today = Math.max(Date.now(), ...[...byDay.keys()].map(Date.parse)) / 1000;
  const series = Array.from({ length: days }, (_, i) => {
    const key = dayName(today - (days - 1 - i) * DAY_S);
    return byDay.get(key) || { key, requests: 0, credits: 0 };
  });
  showPace(series);
  showChart(series);
  const models = [...sums(data, 'model').values()].sort((a, b) => b.credits - a.credits);
  const table = $('models');
  fill(table, models.map((sum) => row(table,
    [name(sum.key), ...COUNTS.map((count) => number(sum[count]))])), 'Nothing was used.');
  const used = series.filter((day) => day.requests).reverse();
  fill($('day-table'), used.map((day) => row($('day-table'),
    [day.key, number(day.requests), number(day.credits)])), 'No requests.');
}

// The pace is the last seven days', or the days since the first request if they are fewer.
function showPace(series) {
  const { credits } = session.account;
  const week = series.slice(-7);
  const spent = week.reduce((sum, day) => sum + day.credits, 0);
  if (!spent) return text('pace', 'Nothing was spent in the last 7 days.');
  const older = credits.spent - spent > 1e-6;
  const days = older ? 7 : 7 - week.findIndex((day) => day.requests);
  const left = Math.floor((credits.available / spent) * days);
  const lasts = left < 1 ? 'less than a day' : left > 3650 ? 'more than ten years'
    : `about ${left} ${left === 1 ? 'day' : 'days'}`;
  text('pace', `Lasts ${lasts} at the pace of ${days > 1 ? `the last ${days} days` : 'today'}: ` +
    `${number((spent / days).toPrecision(3))} credits a day.`);
}

function showChart(series) {
  const peak = series.reduce((top, day) => (day.credits > top.credits ? day : top));
  const total = series.reduce((sum, day) => sum + day.credits, 0);
  text('spending-text', total ? `${number(total)} credits in ${series.length} days; most on ` +
    `${peak.key}: ${number(peak.credits)}.` : `No spending in ${series.length} days.`);
  show('picture', total);
  text('chart-from', series[0].key);
  text('chart-to', series[series.length - 1].key);
  const step = 100 / series.length;
  $('chart').replaceChildren(...series.map((day, i) => {
    const height = day.credits ? Math.max(1, (day.credits / peak.credits) * 98) : 0;
    const title = svg('title', {});
    title.textContent = `${day.key}: ${number(day.credits)} credits`;
    const group = svg('g', {});
    group.append(title, svg('rect', { class: 'hit', x: i * step, width: step, height: 100 }),
      svg('rect', { class: 'bar', x: (i + 0.12) * step, width: step * 0.76, height,
        y: 100 - height }));
    return group;
  }));
}

function svg(tag, attributes) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

// ---- Requests --------------------------------------------------------------------------

// The newest page (fresh) merged into the rows on show, or the page after the last of them.
async function loadRequests(fresh) {
  const { rows, period } = session;
  const body = $('requests').tBodies[0];
  const after = fresh ? null : body.lastElementChild.dataset.id;
  const page = await ask(`/requests${query({ limit: PAGE, after, ...period })}`);
  if (session.period !== period) return;
  if (fresh && !page.data.some((request) => rows.has(request.id))) {
    rows.clear();
    body.replaceChildren();
  }
  if (!fresh || !rows.size) show('requests-more', page.has_more);
  for (const request of fresh ? page.data.reverse() : page.data) {
    const old = rows.get(request.id);
    const tr = requestRow(request);
    if (old && old.isEqualNode(tr)) continue;
    if (old) old.replaceWith(tr);
    else if (fresh) body.prepend(tr);
    else body.append(tr);
    rows.set(request.id, tr);
  }
  const bounded = period.since || period.until;
  const none = bounded ? 'No requests in this period.' : 'No requests yet.';
  if (!rows.size) fill($('requests'), [], none);
  text('requests-count', rows.size ? `${number(rows.size)} shown` : '');
}

// Whole days of the browser's time zone, both included.
function setPeriod() {
  const at = (id, days) => $(id).value
    && Date.parse(`${$(id).value}T00:00:00`) / 1000 + days * DAY_S;
  session.period = { since: at('since', 0), until: at('until', 1) };
  session.rows.clear();
  return loadRequests(true);
}

function requestRow(request) {
  const detail = el('button', { type: 'button', className: 'link' },
    moment(request.created, clock));
  detail.addEventListener('click', () => showReceipt(request));
  const tr = row($('requests'), [
    detail, status(request), name(request.model || '–'), name(request.key || '–'),
    number(request.input_tokens), number(request.output_tokens),
    (request.estimated ? '≈ ' : '') + number(request.credits), duration(request.duration_ms)]);
  tr.dataset.id = request.id;
  return tr;
}

function status({ state, status: code }) {
  if (state === 'open') return el('span', { className: 'tag soft' }, 'running');
  const kind = code < 400 ? 'good' : code < 500 ? 'warn' : 'bad';
  return el('span', { className: `tag ${kind}` }, String(code || state));
}

function showReceipt(request) {
  $('receipt-fields').replaceChildren(...Object.entries(request).flatMap(([field, value]) => [
    el('dt', {}, field.replaceAll('_', ' ')),
    el('dd', {}, el('bdi', {}, field === 'created' ? new Date(value * 1000).toISOString()
      : value === null ? '–' : typeof value === 'number' ? number(value) : String(value)))]));
  $('receipt').showModal();
}

// ---- Keys ------------------------------------------------------------------------------

function showKeys(keys) {
  const own = session.me.key && session.me.key.id;
  fill($('keys'), keys.map((key) => {
    const label = el('span', {}, name(key.name));
    if (key.id === own) label.append(' ', el('span', { className: 'tag good' }, 'signed in'));
    if (key.admin) label.append(' ', el('span', { className: 'tag warn' }, 'admin'));
    const revoke = el('button', { type: 'button', className: 'danger' }, 'Revoke');
    revoke.setAttribute('aria-label', `Revoke ${key.name}`);
    revoke.addEventListener('click', () => guard(revokeKey(key, key.id === own)));
    return row($('keys'), [
      label, el('code', {}, key.hint || '–'), moment(key.created, calendar),
      moment(key.last_used, clock), key.source,
      key.revoked ? el('span', { className: 'soft' }, 'revoked') : revoke]);
  }), 'This account has no keys.');
}

async function revokeKey(key, own) {
  const dialog = $('ask');
  $('ask-text').replaceChildren(el('bdi', {}, key.name), ' ', el('code', {}, key.hint || ''),
    ' stops working at once, for good.', own ? ' You are signed in with it.' : '');
  dialog.returnValue = '';
  dialog.showModal();
  await new Promise((closed) => { dialog.addEventListener('close', closed, { once: true }); });
  if (dialog.returnValue !== 'yes' || !session) return;
  await ask(`/keys/${encodeURIComponent(key.id)}`, 'DELETE');
  if (own) return signOut('You were signed out: you revoked the key you were using.');
  showAccount(await ask(''));
}

async function makeKey() {
  const body = { name: $('key-name').value.trim() };
  if ($('key-admin').checked) body.admin = true;
  const made = await ask('/keys', 'POST', body);
  $('key-form').reset();
  text('made-name', made.name);
  text('made-key', made.key);
  $('made').showModal();
  guard(ask('').then(showAccount));
}

// ---- Admin -----------------------------------------------------------------------------

async function loadAccounts(after) {
  const page = await call(`accounts${query({ limit: 25, after })}`);
  const table = $('accounts');
  const rows = page.data.map((account) => {
    const button = el('button', { type: 'button', className: 'link' }, name(account.id));
    button.addEventListener('click', () => guard(open(accountPath(account.id))));
    const label = el('span', {}, button);
    if (account.admin) label.append(' ', el('span', { className: 'tag warn' }, 'admin'));
    const { granted, spent, held, available } = account.credits;
    return row(table, [label, ...[granted, spent, held, available, account.keys].map(number)]);
  });
  if (after) table.tBodies[0].append(...rows);
  else fill(table, rows, 'There are no accounts.');
  show('accounts-more', page.has_more);
  const last = page.data[page.data.length - 1];
  $('accounts-more').onclick = () => guard(loadAccounts(last.id));
}

async function makeAccount() {
  const id = $('account-name').value.trim();
  await call('accounts', 'POST', { id, credits: Number($('account-credits').value) });
  $('account-form').reset();
  await open(accountPath(id));
}

async function grant() {
  const { id } = session.account;
  const credits = Number($('grant-credits').value);
  await call(`${accountPath(id)}/grants`, 'POST', { credits, note: $('grant-note').value });
  $('grant-form').reset();
  guard(loadAccounts());
  showAccount(await ask(''));
  return `Granted ${number(credits)}.`;
}

// ---- Playground ------------------------------------------------------------------------

let playing = null;

async function play() {
  const mine = session;
  const message = { role: 'user', content: $('play-message').value };
  const body = { model: $('play-model').value, stream: true, messages: [message] };
  const started = performance.now();
  playing = new AbortController();
  text('play-answer', '');
  text('play-thoughts', '');
  show('play-thoughts', false);
  $('play-stop').disabled = false;
  try {
    const response = await send('chat/completions',
      { method: 'POST', body: JSON.stringify(body), signal: playing.signal });
    await readStream(response.body);
    showPicture();
    const took = duration(performance.now() - started);
    const receipt = await call(`account/requests/${response.headers.get('x-request-id')}`);
    return `Done in ${took}: ${number(receipt.input_tokens)} tokens in, ` +
      `${number(receipt.output_tokens)} out, ${number(receipt.credits)} credits.`;
  } catch (error) {
    if (session !== mine) throw new Gone();
    if (error.name === 'AbortError') return 'Stopped.';
    throw error;
  } finally {
    playing = null;
    $('play-stop').disabled = true;
    if (session === mine) schedule(0);
  }
}

// Server-sent events: one JSON object a data line; an error object or a missing [DONE] means
// that the answer is not whole.
async function readStream(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error('The answer broke off.');
    const lines = (rest + value).split('\n');
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith('data:')) continue;
      const data = line.slice(5).trim();
      if (data === '[DONE]') return;
      const event = JSON.parse(data);
      if (event.error) throw apiError(200, event);
      const delta = (event.choices && event.choices[0] && event.choices[0].delta) || {};
      $('play-thoughts').append(delta.reasoning_content || delta.reasoning || '');
      show('play-thoughts', $('play-thoughts').textContent);
      $('play-answer').append(delta.content || '');
    }
  }
}

// An answer that is nothing but an address (an image model's) becomes a link to it.
function showPicture() {
  const href = $('play-answer').textContent.trim();
  if (!/^https:[/][/][^ ]+$/.test(href)) return;
  const link = el('a', { href, target: '_blank', rel: 'noreferrer noopener' }, href);
  $('play-answer').replaceChildren(link);
}

// ---- Wiring ----------------------------------------------------------------------------

onSubmit('sign-in-form', () => signIn($('key-input').value.trim()));
onSubmit('key-form', makeKey);
onSubmit('account-form', makeAccount);
onSubmit('grant-form', grant);
onSubmit('play-form', play);
onSubmit('period', setPeriod);
$('requests-more').addEventListener('click', () => guard(loadRequests(false)));
$('days').addEventListener('change', () => guard(loadUsage()));
$('back').addEventListener('click', () => guard(open('account')));
$('play-stop').addEventListener('click', () => playing && playing.abort());
$('sign-out').addEventListener('click', () => signOut());
$('made').addEventListener('close', () => text('made-key', ''));
document.addEventListener('visibilitychange', () => {
  if (session && session.account) schedule(0);
});

const stored = sessionStorage.getItem(STORE);
show('sign-in', true);
$('key-input').focus();
if (stored) busy($('sign-in-form'), () => signIn(stored));
"""

ASSETS = {
    "pages.css": (PAGES_CSS, "text/css"),
    "docs.js": (DOCS_JS, "text/javascript"),
    "dashboard.js": (DASHBOARD_JS, "text/javascript"),
}

# Application -------------------------------------------------------------------------


def stamp(now: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))


PLAIN_WORD = re.compile(r"[\w.:/+@%-]+")


def logfmt(value: Any) -> str:
    """A value of a log line; quoted unless it is one plain word."""
    text = "" if value is None else str(value)
    return text if PLAIN_WORD.fullmatch(text) else json.dumps(text)


class RequestLog:
    """Lines of logfmt for standard error, written by the upkeep thread.

    A log that is full or closed must not stop a request, so lines are dropped
    rather than waited for.
    """

    def __init__(self) -> None:
        self._lines: deque[str | tuple] = deque(maxlen=10_000)

    def note(self, event: str, **fields: Any) -> None:
        parts = [f"{name}={logfmt(value)}" for name, value in fields.items()]
        self._lines.append(
            f"time={stamp(time.time())} event={event} {' '.join(parts)}\n"
        )

    def request(self, relay: Relay) -> None:
        """The one line of a request; written out later, by the upkeep thread."""
        self._lines.append((time.time(), relay.lease, relay.model.id, relay.charge))

    def unrelayed(self, here: Any, rule: Any, status: int) -> None:
        """The line of a request that was not let in, or that relays nothing; the
        path itself may hold anything."""
        key = here.get("key")
        self.note(
            "request",
            request=here.get("request_id"),
            account=key and key.account,
            key=key and key.name,
            route=rule,
            status=status,
        )

    @staticmethod
    def _line(now: float, lease: Lease, model: str, charge: Charge) -> str:
        ttfb = "" if charge.ttfb is None else charge.ttfb
        return (
            f"time={stamp(now)} event=request request={lease.id}"
            f" account={logfmt(lease.account)} key={logfmt(lease.key)}"
            f" model={logfmt(model)} status={charge.status} input={charge.input}"
            f" cached={charge.cached} output={charge.output} images={charge.images}"
            f" cost={charge.cost / MICRO:.6f} estimated={int(charge.estimated)}"
            f" ttfb_ms={ttfb} duration_ms={charge.duration}\n"
        )

    def flush(self) -> None:
        while self._lines:
            lines = [self._lines.popleft() for _ in range(min(100, len(self._lines)))]
            text = "".join(x if isinstance(x, str) else self._line(*x) for x in lines)
            with contextlib.suppress(OSError):
                os.write(2, text.encode("utf-8", "replace"))


def trim_memory() -> None:
    """Gives the kernel back what is free: 5 MiB of two workers after a load. During
    one it would be asked for again at once, at 6% of a request's CPU."""
    with contextlib.suppress(AttributeError):  # glibc alone has it
        LIBC.malloc_trim(0)


@dataclass(slots=True)
class Services:
    """Everything that one application owns. `capacity` bounds its relays at once."""

    config_file: ConfigFile
    ledger: Ledger
    upstreams: Upstreams
    watcher: Watcher
    log: RequestLog
    limiter: Limiter
    capacity: float
    refused: Counter[int] = field(default_factory=Counter)
    pid: int = field(default_factory=os.getpid)
    closed: threading.Event = field(default_factory=threading.Event)
    tidying: threading.Lock = field(default_factory=threading.Lock)

    @property
    def config(self) -> Config:
        return self.config_file.current

    def upkeep(self) -> None:
        """The thread that does what no request should wait for."""
        while not self.closed.wait(UPKEEP_INTERVAL):
            try:
                self.tidy()
            except Exception as error:  # nothing may end this thread
                self.log.note("upkeep", reason=type(error).__name__)

    def reload(self) -> None:
        wrong = self.config_file.refresh()
        if wrong and self.ledger.speaks():
            self.log.note("config", reason=f"{wrong}; the last good one is kept")

    def tidy(self) -> None:
        with self.tidying:  # the end of the process does it as well
            self._tidy()

    def _tidy(self) -> None:
        self.reload()
        self.ledger.forget_keys()
        self.upstreams.tidy()
        with contextlib.suppress(LedgerUnavailable):
            counts, self.refused = self.refused, Counter()
            self.ledger.tally(counts)
            self.ledger.sweep()
            self.ledger.retry()
            self.ledger.checkpoint()
        self.log.flush()
        if self.watcher.idle:
            trim_memory()

    def close(self) -> None:
        self.closed.set()
        self.watcher.close()
        self.upstreams.close()
        self.tidy()
        self.ledger.close()


def made_key(
    config: Config, id: str, account: str, name: str, hint: str, hash: str, admin: int
) -> Key:
    """A key made at run time, out of its row; an admin account's keys are admin's."""
    admins = bool(admin) or config.account(account).admin
    return Key(id, name, account, hash, hint, admins, "proxy.db")


def identify(services: Services, header: str) -> tuple[Key, Account]:
    """The key and account of an Authorization header, or Unauthorized."""
    scheme, _, bearer = header.partition(" ")
    bearer = bearer.strip()
    if scheme.lower() != "bearer" or not BEARER.fullmatch(bearer):
        raise Unauthorized
    hash, config = sha256(bearer), services.config
    key = config.keys.get(key_id(hash))
    if row := services.ledger.find_key(hash):
        account, name, hint, admin, revoked, stored, made = row
        if revoked:
            raise Unauthorized
        if key is None and stored == hash and (made or account in config.accounts):
            key = made_key(config, key_id(hash), account, name, hint, hash, admin)
    if key is None or key.hash != hash:
        raise Unauthorized
    return key, config.account(key.account)


def count_request(services: Services, here: Any, relayed: bool) -> Callable[[], None]:
    """What counts this request in its key's windows, or raises RateLimited.

    Relays count in the key's own rate, everything else in ACCOUNT_ITEMS. The result
    may be called in another thread; it leaves in `windows` of `here`, Flask's `g`,
    what it saw.
    """
    items = here.account.limits.items if relayed else ACCOUNT_ITEMS
    key, scope = here.key.id, "relay" if relayed else "account"
    strategy, windows = services.limiter.limiter, here.windows

    def count() -> None:
        for item in items:
            fits = strategy.hit(item, key, scope)
            stats = strategy.get_window_stats(item, key, scope)
            windows.append((item, stats))
            if not fits:
                wait = stats.reset_time - time.monotonic()
                raise RateLimited(f"Too many requests: {item} a key.", wait)

    return count


def tightest(windows: list[tuple[RateLimitItem, WindowStats]]) -> tuple:
    """Of a key's windows the one that will refuse first."""
    return min(windows, key=lambda window: window[1].remaining)


PUBLIC = {"healthz", "documentation", "dashboard", "asset"}


def add_hooks(app: Flask, services: Services) -> None:
    """Who asks, and what every answer carries."""

    @app.before_request
    def authenticate() -> None:
        # The proxies `g` and `request` cost 0.6 µs at each use.
        here, asked = g._get_current_object(), request._get_current_object()
        here.request_id = new_request_id()
        here.key, here.windows = None, []
        if services.pid != os.getpid():
            # Leases, locks and threads are a process's own: gunicorn --preload
            # would share them.
            raise LedgerUnavailable("the application was made before a fork")
        endpoint = asked.endpoint
        if endpoint in PUBLIC:
            return
        header = asked.environ.get("HTTP_AUTHORIZATION", "")
        try:
            here.key, here.account = identify(services, header)
        except (Unauthorized, LedgerUnavailable):
            if endpoint is None:  # 404 or 405, whoever asks
                return
            raise
        relayed = endpoint == "relay"
        later = relayed and asked.method == "POST" and has_small_body(asked.environ)
        if not later:
            count_request(services, here, relayed)()

    @app.after_request
    def add_headers(response: Response) -> Response:
        add, here = response.headers.add, g._get_current_object()
        add("x-request-id", here.get("request_id") or new_request_id())
        if windows := here.get("windows"):
            item, (reset_time, remaining) = tightest(windows)
            left = max(0.0, reset_time - time.monotonic())
            add("x-ratelimit-limit-requests", str(item.amount))
            add("x-ratelimit-remaining-requests", str(max(0, remaining)))
            add("x-ratelimit-reset-requests", f"{left:.3f}s")
        if not here.get("admitted") and request.endpoint not in PUBLIC:
            services.log.unrelayed(here, request.url_rule, response.status_code)
        return response


def tell(error: ProxyError) -> Response:
    """The one place where an error becomes a response."""
    return Response(
        error.envelope(), error.status, error.headers, None, "application/json"
    )


def add_error_handlers(app: Flask, services: Services) -> None:
    """How failures are told, counted and logged."""

    @app.errorhandler(ProxyError)
    def refused(error: ProxyError) -> Response:
        asked = request.endpoint == "relay" and request.method == "POST"
        if asked and not g.get("admitted"):
            services.refused[error.status] += 1  # the ledger has no row of it
        if isinstance(error, LedgerUnavailable):
            services.log.note("ledger", request=g.request_id, reason=error.reason)
        return tell(error)

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        return tell(from_http(error))

    @app.errorhandler(Exception)
    def broken(error: Exception) -> Response:
        # Its text may hold a prompt: only the kind and the place are logged.
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__} at {place.name}:{place.lineno}"
        services.log.note("exception", request=g.get("request_id"), reason=reason)
        return tell(ProxyError("Something went wrong here."))


def json_response(document: Any, status: int = 200) -> Response:
    return Response(to_json(document), status, None, None, "application/json")


def list_response(rows: list[dict[str, Any]], **more: Any) -> Response:
    """A list as OpenAI has it; `more` are members beside it."""
    return json_response({"object": "list", "data": rows} | more)


def usable(config: Config, account: Account) -> list[Model]:
    """The models that an account may use."""
    return [model for model in config.models.values() if account.may_use(model.id)]


def find_model(services: Services, id: str) -> Model:
    model = services.config.models.get(id)
    if model is None or not g.account.may_use(id):
        raise NotFound(
            f"The model {id!r} does not exist, or this account may not use it.",
            code="model_not_found",
            param="model",
        )
    return model


def model_entry(config: Config, model: Model) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": config.loaded,
        "owned_by": model.routes[0][0].name,
    }


def start_relay(services: Services, path: str) -> Response:
    """Everything between the rate limit and the upstream's answer.

    A small request is counted in the transaction that admits it: a commit of its own
    was 5% of a request's CPU. Refused before, it is counted alone.
    """
    here, environ = g._get_current_object(), request.environ
    count = (lambda: None) if here.windows else count_request(services, here, True)
    try:
        call = parse_call(path, read_body(environ))
        model = find_model(services, call.model)
        worst = quote(call, model)
        client = environ.get("gunicorn.socket")
        watch = Watch(client, environ.get("SERVER_PROTOCOL") == "HTTP/1.1")
        if not services.watcher.add(watch, services.capacity):
            raise Overloaded("The server has no room at the moment.", wait=1)
    except ProxyError:
        count()
        raise
    try:
        lease = services.ledger.admit(
            here.request_id,
            here.key,
            here.account,
            worst,
            model.id,
            path,
            call.stream,
            count,
        )
    except BaseException:
        services.watcher.remove(watch)
        raise
    here.admitted = True
    return Relay(services, call, model, lease, watch).respond()


def add_routes(app: Flask, services: Services) -> None:
    """What clients of the OpenAI API ask for."""

    @app.get("/healthz")
    def healthz() -> Response:
        return json_response({"status": "ok"})

    @app.post("/v1/<path:path>")
    def relay(path: str) -> Response:
        return start_relay(services, path)

    @app.post("/v1/<any(account,accounts,models):base>/<path:path>")
    def nothing(base: str, path: str) -> Response:
        raise NotFound("There is no such path.")  # and not a relay's

    @app.get("/v1/models")
    def models() -> Response:
        config = services.config
        allowed = usable(config, g.account)
        return list_response([model_entry(config, model) for model in allowed])

    @app.get("/v1/models/<path:id>")
    def model(id: str) -> Response:
        return json_response(model_entry(services.config, find_model(services, id)))


def admin_only() -> None:
    """Raises NotFound for keys that are no admin's: they are told of no such path."""
    if not g.key.admin:
        raise NotFound("There is no such path.")


def known_account(services: Services, id: str, live: bool = False) -> str:
    """`id` if an admin asks and there is such an account; `live`: one that keys and
    credits are good for, not one that keys.json has lost."""
    admin_only()
    made = services.ledger.made(id)
    if not (made or id in services.config.accounts or (made is False and not live)):
        raise NotFound("There is no such account.")
    return id


def account_routes(app: Flask, services: Services) -> Callable:
    """What adds a view under /v1/account and, for admin keys, /v1/accounts/ID.

    The view gets the account's id first: the key's own, or the one in the path.
    """

    def route(path: str, method: str = "GET") -> Callable:
        def add(view: Callable) -> None:
            def own(**values: str) -> Response:
                return view(g.key.account, **values)

            def other(account: str, **values: str) -> Response:
                live = method == "POST"
                return view(known_account(services, account, live), **values)

            for base, function in (("/v1/account", own), (ONE_ACCOUNT, other)):
                name = f"{function.__name__}_{view.__name__}"
                app.add_url_rule(base + path, name, function, methods=[method])

        return add

    return route


def integer_argument(name: str, default: int, highest: int) -> int:
    """A whole number of the query string, from 1 to `highest`."""
    text = request.args.get(name, str(default))
    if not re.fullmatch("[0-9]{1,12}", text) or not 1 <= int(text) <= highest:
        raise BadRequest(f"'{name}' must be from 1 to {highest}.", param=name)
    return int(text)


def find_keys(
    config: Config, ledger: Ledger, account: str | None = None
) -> Iterator[tuple[Key, tuple[int | None, ...]]]:
    """All keys of one account, or of all: declared, then made at run time; each with
    when it was created, used and revoked (unix seconds)."""
    rows = {
        id: row
        for id, *row in ledger.read(
            "SELECT k.id, account, name, hint, hash, admin, made, k.created, used,"
            " revoked FROM keys k LEFT JOIN accounts a ON a.id = account"
            " WHERE ?1 IS NULL OR account = ?1 ORDER BY k.created, k.id",
            account,
        )
    }
    for key in config.keys.values():
        if account in (None, key.account):
            yield key, rows.pop(key.id, (None,) * 9)[6:]
    for id, (owner, name, hint, hash, admin, made, *times) in rows.items():
        if hash:
            if made and times[0] < made and owner not in config.accounts:
                times[2] = times[2] or made  # of a former account of that name
            yield made_key(config, id, owner, name, hint, hash, admin), times


def key_entry(
    key: Key, created: int | None, used: int | None, revoked: int | None
) -> dict[str, Any]:
    return {
        "id": key.id,
        "account": key.account,
        "name": key.name,
        "hint": key.hint,
        "source": key.source,
        "admin": key.admin,
        "created": created,
        "last_used": used,
        "revoked": revoked,
    }


def list_keys(
    config: Config, ledger: Ledger, account: str | None = None
) -> list[dict[str, Any]]:
    return [key_entry(key, *times) for key, times in find_keys(config, ledger, account)]


def balance(config: Config, ledger: Ledger, account: str) -> dict[str, Any]:
    """An account's credits: granted, spent, held, available."""
    rows = ledger.read(
        "SELECT granted, spent, held FROM accounts WHERE id = ?", account
    )
    granted, spent, held = rows[0] if rows else (0, 0, 0)
    granted += config.account(account).credits
    parts = {"granted": granted, "spent": spent, "held": held}
    parts["available"] = max(0, granted - spent - held)
    return {name: to_credits(micro) for name, micro in parts.items()}


def account_entry(services: Services, id: str) -> dict[str, Any]:
    """One line of the admin's list."""
    config, ledger = services.config, services.ledger
    keys = [key for key in list_keys(config, ledger, id) if not key["revoked"]]
    credits = balance(config, ledger, id)
    admin = config.account(id).admin
    return {"id": id, "admin": admin, "credits": credits, "keys": len(keys)}


def live_use(services: Services, account: Account) -> dict[str, int]:
    """What this key has left of its limits."""
    stats = services.limiter.limiter.get_window_stats
    items = account.limits.items
    item, window = tightest([(each, stats(each, g.key.id, "relay")) for each in items])
    running = services.ledger.read(
        "SELECT count(*) FROM requests WHERE key = ? AND state = 0", g.key.id
    )
    return {
        "requests_remaining": max(0, window.remaining),
        "requests_limit": item.amount,
        "concurrent": running[0][0],
    }


def price_entry(price: Price) -> dict[str, int | float]:
    """A price as keys.json writes it."""
    each = {"image": price.image, "request": price.request}
    tokens = {"input": price.input, "cached": price.cached, "output": price.output}
    parts = {name: to_credits(pico // PICO) for name, pico in each.items() if pico}
    return {name: to_credits(pico) for name, pico in tokens.items() if pico} | parts


def describe_account(services: Services, id: str) -> dict[str, Any]:
    """Credits, limits and their live use, models and keys of one account."""
    config, ledger = services.config, services.ledger
    account = config.account(id)
    entry = {"object": "account"} | account_entry(services, id)
    entry["limits"] = {
        "rate": account.limits.rate,
        "concurrent": account.limits.concurrent,
    }
    if id == g.key.account:
        entry["admin"] = g.key.admin
        entry["key"] = {"id": g.key.id, "name": g.key.name}
        entry["live"] = live_use(services, account)
    entry["models"] = [
        {"id": model.id, "about": model.about, "price": price_entry(model.price)}
        for model in usable(config, account)
    ]
    entry["keys"] = list_keys(config, ledger, id)
    return entry


RECEIPT = (
    "id created account key model path state status stream input_tokens cached_tokens"
    " output_tokens images estimated credits ttfb_ms duration_ms"
).split()


def receipt_entry(row: dict[str, Any]) -> dict[str, Any]:
    row["created"] /= 1000
    row["state"] = ("open", "settled", "released")[row["state"]]
    row["credits"] = to_credits(row["credits"])
    row["stream"], row["estimated"] = bool(row["stream"]), bool(row["estimated"])
    return row


def receipts(
    ledger: Ledger, account: str, low: str, high: str, limit: int
) -> list[dict[str, Any]]:
    """An account's requests with ids from `low` to below `high`, newest first."""
    rows = ledger.read(
        "SELECT r.id, r.created, r.account, k.name, model, path, state, status, stream,"
        " input, cached, output, images, estimated, cost, ttfb, duration"
        " FROM requests r LEFT JOIN keys k ON k.id = r.key WHERE r.account = ?"
        " AND r.id >= ? AND r.id < ? ORDER BY r.id DESC LIMIT ?",
        account,
        low,
        high,
        limit,
    )
    return [receipt_entry(dict(zip(RECEIPT, row))) for row in rows]


def moment_id(name: str) -> str | None:
    """The smallest id of a request at the moment (unix seconds) in the query string."""
    text = request.args.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,11}(\.[0-9]{1,6})?", text):
        raise BadRequest(f"'{name}' must be unix seconds.", param=name)
    return f"req_{int(float(text) * 1000):011x}"


def usage_rows(ledger: Ledger, account: str | None, days: int) -> list[dict[str, Any]]:
    """Requests, tokens, images and credits by day and model, newest day first."""
    rows = ledger.read(
        "SELECT day, model, sum(requests), sum(input), sum(cached), sum(output),"
        " sum(images), sum(cost) FROM usage WHERE (?1 IS NULL OR account = ?1)"
        " AND day > ?2 GROUP BY day, model ORDER BY day DESC, model",
        account,
        int(time.time()) // DAY - days,
    )
    names = ("requests", "input_tokens", "cached_tokens", "output_tokens", "images")
    return [
        {
            "day": time.strftime("%Y-%m-%d", time.gmtime(day * DAY)),
            "model": model,
            **dict(zip(names, counts)),
            "credits": to_credits(cost),
        }
        for day, model, *counts, cost in rows
    ]


def add_account_routes(app: Flask, services: Services) -> None:
    """What an account may see of its own; for admin keys, of any account."""
    route, ledger = account_routes(app, services), services.ledger

    @route("")
    def account(id: str) -> Response:
        return json_response(describe_account(services, id))

    @route("/usage")
    def usage(id: str) -> Response:
        days = integer_argument("days", 30, 366)
        return list_response(usage_rows(ledger, id, days), days=days)

    @route("/requests")
    def requests(id: str) -> Response:
        limit = integer_argument("limit", 50, 200)
        low = moment_id("since") or ""
        high = moment_id("until") or "s"  # above all ids
        high = min(high, request.args.get("after") or high)
        rows = receipts(ledger, id, low, high, limit + 1)
        return list_response(rows[:limit], has_more=len(rows) > limit)

    @route("/requests/<request_id>")
    def receipt(id: str, request_id: str) -> Response:
        # No id of a request begins with another's.
        rows = receipts(ledger, id, request_id, request_id + " ", 1)
        if not rows:
            raise NotFound("This account has made no such request.")
        return json_response(rows[0])


def small_body(known: str) -> dict[str, Any]:
    """A small JSON object with these members only."""
    body = parse_json(read_body(request.environ, 64 << 10))
    for name in body:
        if name not in known.split():
            raise BadRequest(f"'{name}' is not known here.", param=name)
    return body


def named(parse: Callable[[Any, str], Any], value: Any, name: str) -> Any:
    """A parsed member of a body; what keys.json would refuse is a BadRequest."""
    try:
        return parse(value, name)
    except ConfigError as error:
        raise BadRequest(f"{error}.", param=name) from None


def known_key(
    config: Config, ledger: Ledger, id: str, account: str | None = None
) -> Key:
    """The key with this id, of this account if one is named; or NotFound."""
    for key, _ in find_keys(config, ledger, account):
        if key.id == id:
            return key
    raise NotFound("There is no such key.")


def add_key_routes(app: Flask, services: Services) -> None:
    """An account's keys: lists, makes and revokes them."""
    route, ledger = account_routes(app, services), services.ledger

    @route("/keys")
    def keys(id: str) -> Response:
        return list_response(list_keys(services.config, ledger, id))

    @route("/keys", "POST")
    def make_key(id: str) -> Response:
        body = small_body("name admin")
        name = named(printable_name, body.get("name", "key"), "name")
        admin = body.get("admin", False)
        if type(admin) is not bool or (admin and not g.key.admin):
            raise BadRequest("'admin' must be false.", param="admin")
        now = int(time.time())
        owned = list_keys(services.config, ledger, id)
        ends = [key["revoked"] for key in owned]
        if sum(end is None or end > now - DAY for end in ends) >= MAX_KEYS:
            raise BadRequest(
                f"An account may have {MAX_KEYS} keys, with those revoked since a day."
            )
        text, key = ledger.make_key(id, name, admin)
        entry = key_entry(key, now, None, None) | {"key": text}
        entry["admin"] = admin or services.config.account(id).admin
        return json_response(entry, 201)

    @route("/keys/<key_id>", "DELETE")
    def revoke(id: str, key_id: str) -> Response:
        ledger.revoke(known_key(services.config, ledger, key_id, id))
        return json_response({"id": key_id, "revoked": True})


def all_accounts(config: Config, ledger: Ledger) -> list[str]:
    rows = ledger.read("SELECT id FROM accounts")
    return sorted({*config.accounts, *(id for (id,) in rows)})


HISTOGRAMS = {
    "ttfb": "proxy_time_to_first_byte_seconds",
    "duration": "proxy_request_duration_seconds",
}


def tallies(ledger: Ledger, kind: str) -> list[tuple]:
    """(model, place, requests, total) of a kind: by status or place in BUCKETS."""
    return ledger.read(
        "SELECT model, place, requests, total FROM tallies WHERE kind = ?"
        " ORDER BY model, place",
        kind,
    )


def label(value: str) -> str:
    """A label's value, quoted and escaped as Prometheus has it."""
    escaped = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'"{escaped}"'


def histogram_lines(name: str, rows: list[tuple]) -> Iterator[str]:
    """One histogram a model: cumulative buckets, sum and count (in seconds)."""
    for model, places in itertools.groupby(rows, key=lambda row: row[0]):
        places = list(places)
        counts = {place: count for _, place, count, _ in places}
        total = 0
        for i, bound in enumerate([*BUCKETS, None]):
            total += counts.get(i, 0)
            le = "+Inf" if bound is None else f"{bound / 1000:g}"
            yield f'{name}_bucket{{model={label(model)},le="{le}"}} {total}'
        seconds = sum(row[3] for row in places) / 1000
        yield f"{name}_sum{{model={label(model)}}} {seconds:.3f}"
        yield f"{name}_count{{model={label(model)}}} {total}"


def balances(config: Config, ledger: Ledger) -> dict[str, int]:
    """Micro-credits that each account has left."""
    left = {id: account.credits for id, account in config.accounts.items()}
    for id, own in ledger.read("SELECT id, granted - spent - held FROM accounts"):
        left[id] = left.get(id, 0) + own
    return left


def metric_lines(services: Services) -> Iterator[str]:
    """Prometheus' text format, out of the ledger: the same whichever worker answers."""
    config, ledger = services.config, services.ledger
    yield "# TYPE proxy_requests_total counter"
    for model, status, count, _ in tallies(ledger, "status"):
        yield f'proxy_requests_total{{model={label(model)},status="{status}"}} {count}'
    for kind, name in HISTOGRAMS.items():
        yield f"# TYPE {name} histogram"
        yield from histogram_lines(name, tallies(ledger, kind))
    used = ledger.read(
        "SELECT model, sum(input), sum(cached), sum(output), sum(images), sum(cost)"
        " FROM usage GROUP BY model ORDER BY model"
    )
    yield "# TYPE proxy_tokens_total counter"
    for model, *counts, _, _ in used:
        for kind, count in zip(("input", "cached", "output"), counts):
            yield f'proxy_tokens_total{{model={label(model)},class="{kind}"}} {count}'
    yield "# TYPE proxy_images_total counter"
    for model, _, _, _, images, _ in used:
        yield f"proxy_images_total{{model={label(model)}}} {images}"
    yield "# TYPE proxy_credits_total counter"
    for model, *_, spent in used:
        yield f"proxy_credits_total{{model={label(model)}}} {spent / MICRO:.6f}"
    running, streams = ledger.read(
        "SELECT count(*), coalesce(sum(stream), 0) FROM requests WHERE state = 0"
    )[0]
    yield "# TYPE proxy_requests_in_progress gauge"
    yield f"proxy_requests_in_progress {running}"
    yield "# TYPE proxy_streams_in_progress gauge"
    yield f"proxy_streams_in_progress {streams}"
    yield "# TYPE proxy_balance_credits gauge"
    for id, micro in sorted(balances(config, ledger).items()):
        yield f"proxy_balance_credits{{account={label(id)}}} {micro / MICRO:.6f}"


def add_admin_routes(app: Flask, services: Services) -> None:
    """All accounts, new ones, grants, metrics: for admin keys."""
    ledger = services.ledger

    @app.get("/v1/accounts")
    def accounts() -> Response:
        admin_only()
        limit = integer_argument("limit", 100, 1000)
        after = request.args.get("after", "")
        ids = [id for id in all_accounts(services.config, ledger) if id > after]
        rows = [account_entry(services, id) for id in ids[:limit]]
        return list_response(rows, has_more=len(ids) > limit)

    @app.post("/v1/accounts")
    def make_account() -> Response:
        admin_only()
        body = small_body("id credits")
        id = named(account_name, body.get("id"), "id")
        amount = named(to_micro, body.get("credits", 0), "credits")
        if id in services.config.accounts or not ledger.make_account(id):
            raise BadRequest("There is an account of this name already.", param="id")
        if amount:
            ledger.grant(id, amount, "at the start")
        return json_response(account_entry(services, id), 201)

    @app.post(f"{ONE_ACCOUNT}/grants")
    def grant(account: str) -> Response:
        id = known_account(services, account, live=True)
        body = small_body("credits note")
        amount = named(to_micro, body.get("credits"), "credits")
        note = body.get("note") or "granted"
        ledger.grant(id, amount, named(printable_name, note, "note"))
        return json_response(account_entry(services, id), 201)

    @app.get("/metrics")
    def metrics() -> Response:
        admin_only()
        text = "".join(f"{line}\n" for line in metric_lines(services))
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(text, content_type=kind)


def page(text: str, kind: str) -> Response:
    return Response(text, 200, PAGE_HEADERS, None, f"{kind}; charset=utf-8")


def live_demo(config: Config, ledger: Ledger) -> tuple[str, str] | None:
    """(key, model) that anyone may try; None if there is none, or it was revoked."""
    row = None
    with contextlib.suppress(LedgerUnavailable):
        row = ledger.find_key(sha256(config.demo[0])) if config.demo else None
    return None if row and row[4] else config.demo


def picked(ids: list[str], best: str) -> str:
    """The model `best`, or the first where it is not among them."""
    return best if best in ids or not ids else ids[0]


def price_text(price: Price) -> str:
    """A price for people: credits per million tokens, per image, per request."""
    units = {"image": "an image", "request": "a request"}
    parts = [
        f"{amount} {units.get(name, f'per million {name} tokens')}"
        for name, amount in price_entry(price).items()
    ]
    return ", ".join(parts) or "free"


def model_rows(config: Config) -> str:
    rows = []
    for model in config.models.values():
        about = f"{model.about} (not set up here)" if model.missing else model.about
        cells = (model.id, about, price_text(model.price))
        escaped = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr>{escaped}</tr>")
    return "\n".join(rows)


def fill_documentation(config: Config, demo: tuple[str, str] | None, root: str) -> str:
    """The documentation with this server's address, models, prices and limits.

    The examples name models that are here; the demo's where there is one.
    """
    images = [id for id, model in config.models.items() if model.price.image]
    texts = [id for id in config.models if id not in images]
    picture = picked(images, "jimeng-image")
    chat, thinker = picked(texts, "deepseek-chat"), "deepseek-r1"
    key, model = demo or ("sk-your-api-key", chat)
    values = {
        "BASE_URL": root + "v1",
        "ROOT_URL": root.rstrip("/"),
        "RATE": config.limits.rate,
        "CONCURRENT": str(config.limits.concurrent),
        "EXAMPLE_KEY": key,
        "EXAMPLE_MODEL": model,
        "REASONING_MODEL": model if demo or thinker not in texts else thinker,
        "IMAGE_MODEL": model if demo else picture,
        "REAL_IMAGE_MODEL": picture,
    }
    text = DOCS_HTML.replace("@MODEL_ROWS@", model_rows(config))
    text = text.replace("@KEY_NOTE@", DEMO_NOTE if demo else OWN_KEY_NOTE)
    text = text.replace("@IMAGE_NOTE@", DEMO_IMAGE_NOTE if demo else "")
    if not images:
        text = re.sub(ABOUT_IMAGES, "", text, flags=re.DOTALL)
    for name, value in values.items():
        text = text.replace(f"@{name}@", html.escape(value))
    return text


def add_pages(app: Flask, services: Services) -> None:
    """The documentation and the dashboard; nothing in them comes from elsewhere."""

    @app.get("/")
    def documentation() -> Response:
        demo = live_demo(services.config, services.ledger)
        text = fill_documentation(services.config, demo, request.host_url)
        return page(text, "text/html")

    @app.get("/dashboard")
    def dashboard() -> Response:
        return page(DASHBOARD_HTML, "text/html")

    @app.get("/assets/<name>")
    def asset(name: str) -> Response:
        if name not in ASSETS:
            raise NotFound("There is no such file.")
        return page(*ASSETS[name])


PARTS = (
    add_hooks,
    add_error_handlers,
    add_routes,
    add_account_routes,
    add_key_routes,
    add_admin_routes,
    add_pages,
)


def build_app(config_file: ConfigFile, db: str, capacity: float = math.inf) -> Flask:
    """The application out of an opened keys.json; `capacity` bounds its relays at once.

    Raises LedgerUnavailable. Its Services are the extension "proxy"; they are closed
    by whoever made it, if ever.
    """
    ledger = Ledger(db)
    try:
        ledger.claim()
    except LedgerUnavailable:
        ledger.close()
        raise
    limiter = Limiter(
        key_func=lambda: g.key.id,
        storage_uri="sqlite://",
        storage_options={"ledger": ledger},
        strategy="moving-window",
    )
    parts = (Upstreams(), Watcher(), RequestLog(), limiter, capacity)
    services = Services(config_file, ledger, *parts)
    services.reload()  # the file may have changed since the master read it
    threading.Thread(target=services.upkeep, name="upkeep", daemon=True).start()
    app = Flask("proxy", static_folder=None)
    app.url_map.strict_slashes = app.url_map.merge_slashes = False
    # Known to the app already, Flask-Limiter adds none of its hooks. They would look
    # for the limits of each view, again for every request, at 15% of its CPU; the one
    # hook here knows them and asks Flask-Limiter's strategy and storage itself.
    app.extensions |= {"proxy": services, "limiter": {limiter}}
    limiter.init_app(app)
    for add in PARTS:
        add(app, services)
    return app


def default_files(
    keys: str | os.PathLike | None, db: str | os.PathLike | None
) -> tuple[str, str]:
    """keys.json and, beside it, proxy.db; unless the environment names others."""
    keys = os.fspath(keys or os.environ.get("PROXY_KEYS") or "keys.json")
    beside = os.path.join(os.path.dirname(keys), "proxy.db")
    return keys, os.fspath(db or os.environ.get("PROXY_DB") or beside)


def create_app(
    keys: str | os.PathLike | None = None, db: str | os.PathLike | None = None
) -> Flask:
    """The WSGI application of one worker process.

    keys, db: the two files; by default PROXY_KEYS and PROXY_DB as on the command
    line. Raises ConfigError, LedgerUnavailable.
    """
    keys, db = default_files(keys, db)
    return build_app(ConfigFile(keys), db)


# Command line ------------------------------------------------------------------------

PARSER_STATUS = {
    "LimitRequestLine": 414,
    "LimitRequestHeaders": 431,
    "ExpectationFailed": 417,
}


def linger(sock: socket.socket) -> None:
    """Lets the peer read the answer for up to a second, before an unread body makes
    the kernel reset the connection (RFC 9112 §9.6)."""
    sock.shutdown(socket.SHUT_WR)
    deadline = time.monotonic() + 1
    while (left := deadline - time.monotonic()) > 0:
        sock.settimeout(left)
        if not sock.recv(65536):
            return


class Worker(ThreadWorker):
    """gunicorn's threaded worker, with refusals in the envelope."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.busy: set[Any] = set()  # connections that have a thread

    def load_wsgi(self) -> None:
        """Waits while a file is in trouble: gunicorn ends the whole server, with all
        running streams, when one worker cannot start."""
        # A client's time-out is no error: gunicorn would log a traceback for each.
        self.log.error_log.addFilter(
            lambda record: not isinstance((record.exc_info or (0, 0))[1], OSError)
        )
        told = None
        while self.alive and super().is_parent_alive():
            try:
                return super().load_wsgi()
            except (ConfigError, LedgerUnavailable) as error:
                reason = getattr(error, "reason", str(error))
                if reason != told:
                    self.log.error("A worker waits: %s", reason)
                told = reason
            self.notify()
            time.sleep(0.5)
        sys.exit(0)

    def is_parent_alive(self) -> bool:
        """Whether the master is; an orphan drains as on SIGTERM."""
        alive = super().is_parent_alive()
        if not alive:
            self.drain(GRACE - GRACE_MARGIN)
        return alive

    def drain(self, seconds: float) -> None:
        """Refuses new requests; streams end after `seconds`.

        Left open, the listening sockets would leave clients waiting unanswered and,
        without a master, keep the port from the next start.
        """
        self.wsgi.extensions["proxy"].watcher.drain(seconds)
        for listener in self.sockets:
            listener.close()

    def set_accept_enabled(self, enabled: bool) -> None:
        """A worker that was told to end while it started has closed its listeners."""
        super().set_accept_enabled(enabled and self.alive)

    def accept(self, listener: Any) -> None:
        """Without a descriptor left nobody is accepted; what runs goes on.

        The more connections a worker has, the later it accepts: another comes first.
        """
        if self.cfg.workers > 1:
            time.sleep(ACCEPT_PAUSE * min(self.nr_conns, 20))
            if not self.alive:
                return  # SIGTERM has closed the listener meanwhile
        try:
            super().accept(listener)
        except OSError as error:
            if not self.alive:
                return
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            time.sleep(0.05)

    def handle(self, conn: Any) -> Any:
        """Serves one request, and those that follow it at once.

        gunicorn would hand the connection to its main loop after each, and linger
        there on a closed one: two seconds without an accept.
        """
        self.busy.add(conn)
        try:
            kept = super().handle(conn)
            while kept is True and self.alive:
                full = len(self.busy) >= self.cfg.threads  # somebody may be waiting
                ahead = conn.parser.unreader.buf.getvalue()  # gunicorn's to look at
                if full or ahead or is_quiet(conn.sock, KEEP_THREAD):
                    break
                kept = super().handle(conn)
        finally:
            self.busy.discard(conn)
        if not kept:
            with contextlib.suppress(OSError):
                linger(conn.sock)
            sock = conn.sock  # not `conn`: it would refer to itself
            conn.close = lambda graceful=False: gunicorn.util.close(sock)
        return kept

    def handle_error(
        self, req: Any, client: socket.socket, addr: Any, exc: Any
    ) -> None:
        """Answers what gunicorn cannot parse; the raw line is logged nowhere."""
        status = PARSER_STATUS.get(type(exc).__name__, 400)
        if not isinstance(exc, ParseException | ssl.SSLError):
            self.log.error("worker: %s", type(exc).__name__)
            status = 500
        body = from_status(status, "The request is malformed.").envelope()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
            f"Connection: close\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nx-request-id: {new_request_id()}\r\n\r\n"
        )
        with contextlib.suppress(OSError):
            client.sendall(head.encode() + body)


def share_memory() -> None:
    """What is loaded by now, 10,000 keys too, stays one copy for all workers.

    A request leaves no cycles of ours behind, so they are looked for less often.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    with contextlib.suppress(AttributeError):  # glibc alone has it
        # M_ARENA_MAX: one heap for all threads takes 87 MiB under load, not 93.
        LIBC.mallopt(-8, 1)
    trim_memory()


def when_ready(arbiter: Any) -> None:
    """The port is bound, no worker is made yet."""
    with contextlib.suppress(OSError):  # a full disk behind standard output
        click.echo(arbiter.app.greeting)
    share_memory()


def bound_clients(worker: Any) -> None:
    """No read from and no write to a client takes longer than CLIENT_TIMEOUT: the
    accepted sockets inherit what is set on the listening ones."""
    limit = struct.pack("ll", CLIENT_TIMEOUT, 0)
    for listener in worker.sockets:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            listener.sock.setsockopt(socket.SOL_SOCKET, option, limit)


def after_fork(arbiter: Any, worker: Any) -> None:
    """Until a worker has handlers of its own a signal ends it: those of the master,
    which it was born with, would only note it for the master."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    bound_clients(worker)


def drain_on_signals(worker: Any) -> None:
    """Makes SIGTERM begin the drain; Ctrl-C ends what runs at once, but well."""
    atexit.register(worker.wsgi.extensions["proxy"].tidy)  # the last lines, too
    usual = signal.getsignal(signal.SIGTERM)
    drains = {signal.SIGTERM: GRACE - GRACE_MARGIN, signal.SIGINT: 0, signal.SIGQUIT: 0}

    def stop(number: int, frame: Any) -> None:
        # SIGTERM's own handler for all three: a terminal's Ctrl-C comes twice, and
        # those of the others would wait for a lock that the first of them holds.
        worker.drain(drains[number])
        usual(number, frame)

    for number in drains:
        signal.signal(number, stop)


class Server(BaseApplication):
    """gunicorn in this process, with the settings that a streaming proxy needs."""

    def __init__(
        self,
        keys: ConfigFile,
        db: str,
        bind: str,
        workers: int,
        threads: int,
        greeting: str,
    ):
        self._files, self._bind, self.greeting = (keys, db), bind, greeting
        self._workers, self._threads = workers, threads
        super().__init__()

    def load_config(self) -> None:
        threads = self._threads + SPARE_THREADS
        settings = {
            "bind": [self._bind],
            "workers": self._workers,
            "worker_class": Worker,
            "threads": threads,
            # A worker accepts while all its threads are busy; what is left over is
            # room for idle keep-alive connections.
            "worker_connections": threads + 1000,
            "keepalive": 75,
            "timeout": 60,
            "graceful_timeout": GRACE,
            "control_socket_disable": True,
            "loglevel": "warning",
            "proc_name": "proxy",
            "worker_tmp_dir": "/dev/shm" if os.path.isdir("/dev/shm") else None,
            "post_fork": after_fork,
            "post_worker_init": drain_on_signals,
            "when_ready": when_ready,
        }
        for name, value in settings.items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        return build_app(*self._files, self._threads)


def file_options(command: Callable) -> Callable:
    """--keys and --db, of every command."""
    for option in (
        click.option("--db", envvar="PROXY_DB", help="The ledger (beside --keys)."),
        click.option(
            "--keys",
            envvar="PROXY_KEYS",
            default="keys.json",
            show_default=True,
            help="The operator's file.",
        ),
    ):
        command = option(command)
    return command


@click.group(context_settings={"max_content_width": 88})
def cli() -> None:
    """A small team's API gateway for language and image models."""


def secure_standard_files() -> None:
    """A closed standard file is /dev/null from here on, or the next file that is
    opened would get the log; and a log that nobody reads stops nobody."""
    for fd in (0, 1, 2):
        try:
            kind = os.fstat(fd).st_mode
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            continue
        if fd == 2 and (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)):
            os.set_blocking(fd, False)


def greeting(config: Config, ledger: Ledger, url: str) -> str:
    """Where it listens, and a line that works as it stands."""
    lines = [f"Serving {url}/v1 (documentation {url}/, dashboard {url}/dashboard)"]
    for variable, models in config.missing().items():
        lines.append(f"  {variable} is not set: no {', '.join(models)}")
    if demo := live_demo(config, ledger):
        key, model = demo
        body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}]}
        lines.append(
            f"\n  curl {url}/v1/chat/completions -H 'Authorization: Bearer {key}' \\\n"
            f"    -H 'Content-Type: application/json' -d '{json.dumps(body)}'\n"
        )
    return "\n".join(lines)


@cli.command()
@file_options
@click.option("--host", envvar="PROXY_HOST", default="127.0.0.1", show_default=True)
@click.option(
    "--port",
    envvar="PROXY_PORT",
    type=click.IntRange(1, 65535),
    default=8000,
    show_default=True,
)
@click.option("--workers", envvar="PROXY_WORKERS", type=click.IntRange(1, MAX_WORKERS))
@click.option(
    "--threads",
    envvar="PROXY_THREADS",
    type=click.IntRange(1, 10_000),
    default=1000,
    show_default=True,
    help="Requests that one worker relays at once.",
)
def serve(
    keys: str, db: str | None, host: str, port: int, workers: int | None, threads: int
) -> None:
    """Serves the API (also without naming the command)."""
    os.umask(0o077)
    secure_standard_files()
    keys, db = default_files(keys, db)
    config_file = ConfigFile(keys)
    workers = workers or max(2, os.cpu_count() or 2)
    bind = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with contextlib.closing(Ledger(db)) as ledger:
        text = greeting(config_file.current, ledger, f"http://{bind}")
    Server(config_file, db, bind, workers, threads, text).run()


@contextlib.contextmanager
def opened(
    keys: str, db: str | None, makes: bool = False
) -> Iterator[tuple[Config, Ledger]]:
    """The two files, for one command; unless it `makes` something, a ledger that is
    not there yet is not made either."""
    keys, path = default_files(keys, db)
    config = ConfigFile(keys).current
    with contextlib.ExitStack() as stack:
        if not (makes or os.path.exists(path) or os.path.exists(path + "-lock")):
            os.stat(os.path.dirname(path) or ".")  # OSError: it could not be made
            click.echo(f"{path}: there is no ledger yet.", err=True)
            path = stack.enter_context(tempfile.TemporaryDirectory()) + "/proxy.db"
        yield config, stack.enter_context(contextlib.closing(Ledger(path)))


def existing(config: Config, ledger: Ledger, account: str) -> str:
    """The account's name, if there is one, or ConfigError."""
    account_name(account, "ACCOUNT")
    if account not in all_accounts(config, ledger):
        raise ConfigError(f"no account is named {account!r}")
    return account


@cli.group(name="keys")
def keys_group() -> None:
    """Makes, lists and revokes API keys."""


@keys_group.command("add")
@file_options
@click.argument("account")
@click.option("--name", default="key", show_default=True)
@click.option("--credits", help="Granted to the account at once.")
@click.option("--admin", is_flag=True, help="The key may use the admin routes.")
def keys_add(
    keys: str, db: str | None, account: str, name: str, credits: str | None, admin: bool
) -> None:
    """Prints a new key, once; makes the account if it is new."""
    account_name(account, "ACCOUNT")
    printable_name(name, "--name")
    amount = typed_amount(credits, "--credits") if credits else 0
    with opened(keys, db, makes=True) as (config, ledger):
        if account not in config.accounts:
            ledger.make_account(account)
        if amount:
            ledger.grant(account, amount, "keys add")
        click.echo(ledger.make_key(account, name, admin)[0])


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6f}"
    if isinstance(value, bool):
        return "yes" if value else ""
    return "" if value is None else str(value)


def show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Rows as an aligned table for people, or as JSON for scripts."""
    if as_json:
        return click.echo(json.dumps(rows, ensure_ascii=False, indent=1))
    if not rows:
        return click.echo("Nothing yet.")
    table = [list(rows[0])] + [[cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        cells = (text.ljust(width) for text, width in zip(line, widths))
        click.echo("  ".join(cells).rstrip())


def dated(row: dict[str, Any]) -> dict[str, str]:
    """A key's times as people read them."""
    times = {name: row[name] for name in ("created", "last_used", "revoked")}
    return {name: stamp(time) if time else "" for name, time in times.items()}


@keys_group.command("list")
@file_options
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def keys_list(keys: str, db: str | None, as_json: bool) -> None:
    """Hints and ids of all keys, never the keys."""
    with opened(keys, db) as (config, ledger):
        rows = list_keys(config, ledger)
        show(rows if as_json else [row | dated(row) for row in rows], as_json)


@keys_group.command("revoke")
@file_options
@click.argument("id")
def keys_revoke(keys: str, db: str | None, id: str) -> None:
    """Revokes a key, for ever."""
    with opened(keys, db, makes=True) as (config, ledger):
        ledger.revoke(known_key(config, ledger, id))
        click.echo(f"{id} is revoked.")


@cli.group(name="credits")
def credits_group() -> None:
    """Grants credits and shows balances."""


@credits_group.command("add")
@file_options
@click.argument("account")
@click.argument("amount")
@click.option("--note", default="")
def credits_add(
    keys: str, db: str | None, account: str, amount: str, note: str
) -> None:
    """Grants AMOUNT credits to ACCOUNT."""
    with opened(keys, db, makes=True) as (config, ledger):
        printable_name(note or "granted", "--note")
        existing(config, ledger, account)
        ledger.grant(account, typed_amount(amount, "AMOUNT"), note)
        show([{"account": account} | balance(config, ledger, account)], False)


@credits_group.command("show")
@file_options
@click.argument("account", required=False)
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def credits_show(keys: str, db: str | None, account: str | None, as_json: bool) -> None:
    """Balances of one account, or of all."""
    with opened(keys, db) as (config, ledger):
        every = all_accounts(config, ledger)
        names = [existing(config, ledger, account)] if account else every
        rows = [{"account": name} | balance(config, ledger, name) for name in names]
        show(rows, as_json)


@cli.command()
@file_options
@click.argument("account", required=False)
@click.option("--days", type=click.IntRange(1, 366), default=30, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def usage(
    keys: str, db: str | None, account: str | None, days: int, as_json: bool
) -> None:
    """Requests, tokens and credits by day and model."""
    with opened(keys, db) as (config, ledger):
        account = account and existing(config, ledger, account)
        show(usage_rows(ledger, account, days), as_json)


def probe(dialect: Dialect, watcher: Watcher) -> str:
    """Empty if the provider accepts the operator's key, else why not."""
    watch = Watch()
    watch.deadline = time.monotonic() + PROBE_TIMEOUT
    watcher.add(watch)
    try:
        return dialect.probe(watch)
    except ProxyError as error:
        return error.reason
    except Ended:
        return "no answer in time"
    finally:
        watcher.remove(watch)


def provider_rows(config: Config, online: bool) -> Iterator[dict[str, Any]]:
    """Per model and upstream: whether it is configured, and its keys accepted."""
    upstreams, watcher = Upstreams(), Watcher()
    asked: dict[UpstreamConfig, str] = {}
    for model in config.models.values():
        for upstream, id in model.routes:
            missing = ", ".join(upstream.missing)
            state = f"{missing} is not set" if missing else "configured"
            if online and not missing:
                if upstream not in asked:
                    asked[upstream] = probe(upstreams.dialect(upstream), watcher)
                state = asked[upstream] or "accepted"
            name = f"{upstream.name}/{id}"
            yield {"model": model.id, "upstream": name, "state": state}


def warnings(config: Config, ledger: Ledger, keys: str) -> Iterator[str]:
    """What would fail, or is not as safe as it could be."""
    if os.stat(keys).st_mode & 0o077 and len(config.keys) > bool(config.demo):
        yield f"{keys} holds keys and can be read by others: chmod 600 {keys}"
    if sqlite3.sqlite_version_info < (3, 37):
        yield f"SQLite {sqlite3.sqlite_version} is too old: 3.37 is needed"
    if live_demo(config, ledger):
        yield "the demo key is public: remove it before others can reach this server"


@cli.command()
@file_options
@click.option("--online", is_flag=True, help="Ask the providers; spends nothing.")
def check(keys: str, db: str | None, online: bool) -> None:
    """Proves the ledger, validates keys.json, warns of what would fail."""
    with opened(keys, db) as (config, ledger):
        show(list(provider_rows(config, online)), False)
        for line in warnings(config, ledger, keys):
            click.echo(f"warning: {line}")
        wrong = ledger.check(config.granted)
        for line in wrong:
            click.echo(f"wrong: {line}")
        click.echo("The ledger does not add up." if wrong else "The ledger adds up.")
        click.get_current_context().exit(1 if wrong else 0)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status; failures are one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if not arguments or arguments[0][:1] == "-" and arguments[0] != "--help":
            arguments = ["serve", *arguments]
        return cli.main(arguments, standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    except ConfigError as error:
        click.echo(f"Refused: {error}", err=True)
        return 1
    except LedgerUnavailable as error:
        click.echo(f"Ledger: {error.reason}", err=True)
        return 1
    except ProxyError as error:
        click.echo(error.message, err=True)
        return 1
    except OSError as error:
        click.echo(f"{error.filename or ''}: {error.strerror}", err=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
