"""A small team's API gateway for language and image models, in one Flask module.
It hands out keys with credits and limits, and relays OpenAI-style requests.

    pip install -r requirements.txt && python proxy.py     # http://127.0.0.1:8000
    pip install -r requirements.txt && pytest              # the tests
    python proxy.py keys add alice --credits 5             # prints a new key once
    python proxy.py --help                                 # all commands

One request:

    client -- POST -> authenticate - 401      bearer -> SHA-256 -> one row -> key
                      place        - 503      one of --threads
                      rate         - 429      of a large body before it is read,
                                              of a small one within the admission
                      read body    - 400 413  strict; all bodies are bounded, 503
                      model        - 404      keys.json
                      admit        - 402 429  one transaction: window, lease and hold
                      send         - 503 4xx  dialect -> upstream, or the next upstream
                      relay                   each event read once, passed on as it came
    client <- last byte -- settle             the charge is on disk before it leaves

A relay runs in the thread of its request, from the first byte to the last. Two more
threads a worker: the `writer` commits for all that wait, sweeps after dead workers and
retries; the `watcher` ends relays whose client left or whose time is up, and looks at
keys.json, idle connections and the log. What waits, waits for one of six locks: the
one between processes, a job's answer, the reader's, the watcher's list, the room of
bodies, gunicorn's pool.

Sections, each needing only what stands above it (but for the templates at the end):
Errors, Configuration, Ledger, Limits, Wire, Calls and prices, HTTP, Dialects, Meter,
Relay, Application, Command line, Pages. Operators edit keys.json; the program alone
writes proxy.db. See README.md.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "flask==3.1.3", "gunicorn==27.0.1", "requests==2.34.2", "flask-limiter==4.1.1",
#     "certifi==2026.10.19.post1", "click==8.5.1", "jinja2==3.1.6", "limits==5.8.0",
#     "werkzeug==3.1.9",
# ]
# ///

from __future__ import annotations

import atexit
import base64
import calendar
import contextlib
import csv
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import io
import itertools
import json
import math
import operator
import os
import queue
import random
import re
import resource
import secrets
import select
import selectors
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import sys
import tempfile
import termios
import threading
import time
import traceback
import unicodedata
import zlib
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from email.utils import parsedate_to_datetime
from enum import Enum
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self
from urllib.parse import quote as percent_encoded
from urllib.parse import unquote, urlencode, urlsplit

import certifi
import click
import gunicorn.util
from flask import Flask, Response, g, render_template, request
from flask_limiter import Limiter
from gunicorn import systemd
from gunicorn.app.base import BaseApplication
from gunicorn.http.errors import ParseException
from gunicorn.http.unreader import SocketUnreader
from gunicorn.workers import gthread
from jinja2 import DictLoader
from limits import RateLimitItem, parse_many
from limits.storage import MovingWindowSupport, Storage
from limits.strategies import MovingWindowRateLimiter
from werkzeug.exceptions import HTTPException
from werkzeug.formparser import MultiPartParser
from werkzeug.http import parse_options_header
from werkzeug.routing import PathConverter

# Errors ------------------------------------------------------------------------------

# Anthropic's names for types of errors where ours differ, by status.
ANTHROPIC_TYPES = {
    402: "billing_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large",
}  # fmt: skip


def is_messages(path: str) -> bool:
    """Whether a path, with /v1 or without, is of Anthropic's API."""
    return path.removeprefix("/v1/").partition("/")[0] == "messages"


def error_json(document: dict[str, Any]) -> bytes:
    """UTF-8 whatever its texts are."""
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")


class ProxyError(Exception):
    """A refusal or failure that knows its status, type, code and headers.

    `about` is what the documentation says of the code, as HTML.
    """

    status, type, code = 500, "api_error", "internal_error"
    about = (
        "Something went wrong in this server. Tell its operator the"
        " <code>x-request-id</code>."
    )

    def __init__(
        self, message: str, *, code: str | None = None, param: str | None = None,
        headers: dict[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.message, self.param, self.headers = message, param, headers or {}
        self.code = code or self.code
        self.reason = self.code  # for the log; some know more

    def members(self) -> dict[str, str | None]:
        """The error as OpenAI's SDKs read it."""
        error = {"message": self.message, "type": self.type}
        return error | {"param": self.param, "code": self.code}

    def envelope(self, path: str = "") -> bytes:
        """The body that the SDKs of this path's family read."""
        if is_messages(path):
            kind = ANTHROPIC_TYPES.get(self.status, self.type)
            error = {"type": kind, "message": self.message}
            return error_json({"type": "error", "error": error})
        return error_json({"error": self.members()})

    def events(self, path: str, number: int) -> bytes:
        """What ends a stream that fails after `number` events.

        On /v1/responses two, as OpenAI has it: at the first its SDKs raise, Codex
        knows the second alone.
        """
        if path != "responses":
            name = b"event: error\n" if is_messages(path) else b""
            return name + b"data: " + self.envelope(path) + b"\n\n"
        error = self.members()
        first = error | {"type": "error", "sequence_number": number, "error": error}
        last = {"type": "response.failed", "sequence_number": number + 1}
        last["response"] = {"object": "response", "status": "failed", "error": error}
        lines = [(each["type"].encode(), error_json(each)) for each in (first, last)]
        return b"".join([b"event: %s\ndata: %s\n\n" % line for line in lines])


class BadRequest(ProxyError):
    status, type, code = 400, "invalid_request_error", "invalid_request"
    about = (
        "The body is not valid JSON, a field is missing or of the wrong type, or has a"
        " value that would change the model's price (<code>service_tier</code>). What"
        " the provider finds wrong with a request comes with the provider's message,"
        " as 400, 404, 413 or 422."
    )


class Unauthorized(ProxyError):
    status, type, code = 401, "authentication_error", "unauthorized"
    about = "Missing or invalid API key; a revoked or expired one too."

    def __init__(self) -> None:
        super().__init__(
            "Missing or invalid API key. Send it as 'Authorization: Bearer sk-...'.",
            headers={"WWW-Authenticate": "Bearer"},
        )


class InsufficientCredits(ProxyError):
    status, type, code = 402, "insufficient_quota", "insufficient_credits"
    about = (
        "The account, or the budget of the key, has too few credits left for this request."
    )


class NotFound(ProxyError):
    status, type, code = 404, "invalid_request_error", "not_found"
    about = "There is nothing at this address."


class ModelNotFound(NotFound):
    code = "model_not_found"
    about = "There is no such model, or your account may not use it."


class ReceiptExpired(NotFound):
    code = "receipt_expired"
    about = "The receipt was deleted: it was older than this server keeps them."


class MethodNotAllowed(ProxyError):
    status, type, code = 405, "invalid_request_error", "method_not_allowed"
    about = (
        "The address exists, but not for this method: a GET where a POST belongs, say."
    )


class TooLarge(ProxyError):
    status, type, code = 413, "invalid_request_error", "request_too_large"
    about = "The body is larger than this server takes."


class UnsupportedMediaType(ProxyError):
    status, type, code = 415, "invalid_request_error", "unsupported_media_type"
    about = "The body must be sent as <code>Content-Type: application/json</code>."


class RateLimited(ProxyError):
    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"
    about = (
        "Too many requests, a minute or at once: see"
        ' <a href="#rate-limits">rate limits</a>.'
    )

    def __init__(self, message: str, wait: float):
        seconds = max(1, min(60, math.ceil(wait)))
        super().__init__(message, headers={"Retry-After": str(seconds)})


class Unavailable(ProxyError):
    """503; `wait` is when a repeat may help (seconds), None if it cannot."""

    status, code = 503, "provider_unavailable"
    about = (
        "The AI provider behind the model is down, failing or not set up here, or this"
        " server was restarted in the middle of the answer."
        " <code>x-should-retry: false</code> means that a repeat cannot help or could"
        " cost twice; otherwise try again after <code>Retry-After</code>."
    )

    def __init__(self, message: str, wait: int | None = None):
        no, yes = {"x-should-retry": "false"}, {"Retry-After": str(wait)}
        super().__init__(message, headers=no if wait is None else yes)


class Overloaded(Unavailable):
    code = "overloaded"
    about = (
        "This server has no room for another request right now. Nothing was sent on;"
        " try again after <code>Retry-After</code>."
    )


class LedgerUnavailable(Unavailable):
    """`reason` is for the log; clients are not told it."""

    code = "ledger_unavailable"
    about = (
        "This server cannot write its accounts, so it serves nothing until it can."
    )

    def __init__(self, reason: str):
        super().__init__("The ledger cannot be written at the moment.", wait=5)
        self.reason = reason


class Generated(Enum):
    """Whether an upstream that failed may have generated, and billed, anything."""

    NOTHING = "nothing"  # the next upstream may be asked
    PERHAPS = "perhaps"


class UpstreamFailed(Unavailable):
    """An upstream in trouble; `transient` if a question that changes nothing may be
    asked again."""

    def __init__(
        self, reason: str, wait: int | None = None,
        generated: Generated = Generated.PERHAPS, transient: bool = False,
    ):  # fmt: skip
        super().__init__("The upstream AI provider is temporarily unavailable.", wait)
        self.reason, self.generated, self.transient = reason, generated, transient


class Refused(BadRequest):
    """An upstream's refusal for which the client's own mistake is the cause."""

    about = ""

    def __init__(self, status: int, message: str, code: str | None, param: str | None):
        super().__init__(message, code=code, param=param)
        self.status = status


class Moderated(Refused):
    code = "content_policy_violation"
    about = "The provider's moderation refused the prompt or the picture. Free."

    def __init__(self) -> None:
        super().__init__(400, "The provider's moderation refused this content.", None, None)


# What the documentation tells of, in its order.
ERRORS = (
    BadRequest, Moderated, Unauthorized, InsufficientCredits, ModelNotFound, NotFound,
    ReceiptExpired, MethodNotAllowed, TooLarge, UnsupportedMediaType, RateLimited,
    ProxyError, Unavailable, Overloaded, LedgerUnavailable,
)  # fmt: skip
PLAIN_ERRORS = {each.status: each for each in (
    BadRequest, NotFound, MethodNotAllowed, TooLarge, UnsupportedMediaType
)} | {414: TooLarge, 431: TooLarge}  # fmt: skip


class Ending(Enum):
    """How a request ended; `settled_usage` says what each is charged."""

    DONE = "done", 200  # the answer is whole
    FAILED = "failed", 503  # whole, and its last event tells that the provider failed
    CUT = "cut", 503  # by the upstream: an error inside, or no end
    LEFT = "client", 499
    TIMED_OUT = "timeout", 503
    DRAINED = "drain", 503
    REFUSED = "refused", 503  # before anything was relayed; the status is the error's

    def __init__(self, reason: str, status: int):
        self.reason, self.status = reason, status


class Ended(Exception):
    """The relay was ended from outside: LEFT, TIMED_OUT or DRAINED."""

    def __init__(self, ending: Ending):
        super().__init__(ending.reason)
        self.ending = ending

    def failure(self) -> ProxyError:
        """What a client that is still there is told."""
        if self.ending is Ending.LEFT:  # it may have closed its own side only
            return BadRequest(
                "The connection was closed for writing before the answer was whole. This"
                " counts as leaving: keep it open until then."
            )
        failure = UpstreamFailed(self.ending.reason)
        if self.ending is Ending.DRAINED:
            failure.message = "This server is being restarted: the answer is cut off."
        return failure


class ConfigError(Exception):
    """keys.json is refused; the message names the path or the line."""


def from_status(status: int, message: str) -> ProxyError:
    """What Werkzeug or gunicorn refuses by a mere status, as one of ours."""
    other = BadRequest if status < 500 else ProxyError
    ours = PLAIN_ERRORS.get(status, other)(message)
    ours.status = status
    return ours


def from_http(error: HTTPException) -> ProxyError:
    """Werkzeug's own refusals (404, 405, ...) as one of ours."""
    ours = from_status(error.code or 500, f"{error.name}.")
    if allowed := getattr(error, "valid_methods", None):
        ours.headers["Allow"] = ", ".join(sorted(allowed))
    return ours


# Configuration -----------------------------------------------------------------------

MICRO = 10**6  # micro-credits in a credit: all money is an integer of these
PICO = 10**6  # pico-credits in a micro-credit: the unit of a price per token
DAY = 86400  # seconds
WEEK = 7 * 1440  # minutes
DEFAULT_MAX_OUTPUT = 4096  # tokens, for a priced model that names no `max_output`
MAX_TOKENS = 10**7  # no context window is larger: a report above it is not believed
DIALECTS: dict[str, type] = {}  # scheme before the "+" -> class; each enters itself


@functools.lru_cache(1000)  # each request asks: 4 µs
def rate_items(rate: str) -> tuple[RateLimitItem, ...]:
    """The windows of a rate as Flask-Limiter writes it, each once."""
    return tuple(dict.fromkeys(parse_many(rate)))


@dataclass(frozen=True, slots=True)
class Limits:
    """What one key may do: `rate` as Flask-Limiter writes it, and requests at once."""

    rate: str = "60/minute"
    concurrent: int = 10

    @property
    def items(self) -> tuple[RateLimitItem, ...]:
        return rate_items(self.rate) if self.rate else ()

    def within(self, outer: Limits) -> Limits:
        """These and the `outer` ones: of two limits the smaller counts."""
        rate = "; ".join(filter(None, (outer.rate, self.rate)))
        return Limits(rate, min(outer.concurrent, self.concurrent))


@dataclass(frozen=True, slots=True)
class Price:
    """Pico-credits per token of each class, per image, per request and per character
    to be spoken; `reported`: millionths of the cost that the provider itself reports; 0
    if that is not read."""

    input: int = 0
    cached: int = 0
    written: int = 0
    output: int = 0
    image: int = 0
    request: int = 0
    characters: int = 0
    reported: int = 0


@dataclass(frozen=True, slots=True)
class Hours:
    """Hours of the week with a price of their own: `minutes` has a bit for each of its
    minutes since Monday 0:00 UTC."""

    utc: str
    minutes: int
    price: Price


PERIODS = ("day", "week", "month", "total")
FOREVER = 10**6  # the day before which all others are


@dataclass(frozen=True, slots=True)
class Budget:
    """Micro-credits that a key may spend `per` period of the UTC calendar."""

    most: int
    per: str

    def window(self, day: int) -> tuple[int, int]:
        """The first day (since 1970) of the period that this day is in, and that of
        the next. It is computed: there is nothing to reset."""
        date = time.gmtime(day * DAY)
        since, length = {
            "day": (day, 1),
            "week": (day - date.tm_wday, 7),
            "month": (day - date.tm_mday + 1, calendar.monthrange(*date[:2])[1]),
            "total": (0, FOREVER),
        }[self.per]
        return since, since + length

    def told(self, left: int, needed: int, until: int) -> str:
        """Why micro-credits that are `needed` are refused, and when that ends."""
        then = time.strftime("%Y-%m-%d", time.gmtime(until * DAY))
        per, then = f"per {self.per}", f"; its next window begins {then} (UTC)"
        if self.per == "total":
            per, then = "in total", ""
        most, left, needed = self.most / MICRO, max(0, left) / MICRO, needed / MICRO
        return (
            f"The key's budget of {most:.6f} credits {per} has {left:.6f} left, and this"
            f" needs {needed:.6f}{then}."
        )


COMMON_LIMITS, NO_LIMITS = Limits(), Limits("", 100_000)


@dataclass(frozen=True, slots=True)
class Terms:
    """What one key may do of what its account may; it expires at a unix second. With
    `metrics` it reads /metrics, and nothing else. `written`: as keys.json has them."""

    expires: int | None = None
    budget: Budget | None = None
    models: frozenset[str] | None = None
    limits: Limits = NO_LIMITS
    metrics: bool = False
    written: dict[str, Any] = field(default_factory=dict, compare=False)

    def expired(self) -> bool:
        return self.expires is not None and self.expires <= time.time()


NO_TERMS = Terms()


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
    terms: Terms = NO_TERMS


@dataclass(frozen=True, slots=True)
class Account:
    """Who pays; `credits` are the micro-credits granted by keys.json."""

    id: str
    limits: Limits
    credits: int = 0
    models: frozenset[str] | None = None
    admin: bool = False
    demo: bool = False  # its keys are public
    keys: tuple[Key, ...] = ()  # those of keys.json

    def may_use(self, id: str) -> bool:
        return self.models is None or id in self.models

    def under(self, terms: Terms) -> Self:
        """The account as a key with these terms may use it."""
        if terms == NO_TERMS:
            return self
        lists = [each for each in (self.models, terms.models) if each is not None]
        models = frozenset.intersection(*lists) if lists else None
        return replace(self, models=models, limits=terms.limits.within(self.limits))


@dataclass(frozen=True, slots=True)
class HttpProxy:
    """An HTTP proxy on the way to a provider; `login` is user:password, or empty."""

    host: str
    port: int
    login: str = field(default="", repr=False)

    @property
    def url(self) -> str:
        """As `requests` takes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{percent_encoded(self.login, ':')}@{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UpstreamConfig:
    """Where a provider is reached, and what it differs in.

    `missing` names its unset variables; `secrets` are never told to a client.
    `timeout`: seconds to an answer's head, between two events, or to a JSON answer's
    end. `without`: fields that it refuses; `developer`: the role sent instead; `cap`:
    the one name of the output cap of chat completions, empty if not known.
    """

    name: str
    dialect: str
    secure: bool
    host: str
    port: int
    path: str
    key: str = field(default="", repr=False)
    missing: tuple[str, ...] = ()
    secrets: tuple[str, ...] = field(default=(), repr=False)
    auth: str = "bearer"
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    query: str = field(default="", repr=False)
    proxy: HttpProxy | None = None
    timeout: float | None = None
    without: frozenset[str] = frozenset()
    developer: str = ""
    cap: str = ""


@dataclass(frozen=True, slots=True)
class Model:
    """A name that clients ask for, and where it is answered, in order.

    One that ends with "*" is asked for by every name that begins so; what stands there
    for "*" stands for that of its upstreams' ids.
    """

    id: str
    routes: tuple[tuple[UpstreamConfig, str], ...]
    price: Price
    about: str = ""
    defaults: dict[str, Any] = field(default_factory=dict)
    max_output: int = DEFAULT_MAX_OUTPUT
    hours: tuple[Hours, ...] = ()
    allow: frozenset[str] = frozenset()

    @property
    def wild(self) -> bool:
        return self.id.endswith("*")

    def called(self, name: str) -> Model | None:
        """This wild model with the ids that a name asks for, if it begins so."""
        start = self.id[:-1]
        if not name.startswith(start) or name == start or name.endswith("*"):
            return None
        ids = [(each, id[:-1] + name[len(start) :]) for each, id in self.routes]
        return replace(self, routes=tuple(ids))

    @property
    def missing(self) -> list[str]:
        """The unset variables without which none of its upstreams can be asked."""
        unset = [upstream.missing for upstream, _ in self.routes]
        return list(dict.fromkeys(itertools.chain(*unset))) if all(unset) else []

    def at(self, moment: float) -> Model:
        """This model at the price of the moment (unix seconds)."""
        minute = int(moment) // 60 + 3 * 1440  # 1970 began on a Thursday
        for hours in self.hours:
            if hours.minutes >> minute % WEEK & 1:
                return replace(self, price=hours.price)
        return self


@dataclass(frozen=True, slots=True)
class Config:
    """keys.json, checked. `demo`: (key, model) of a public account, to be shown."""

    limits: Limits
    accounts: dict[str, Account]
    keys: dict[str, Key]  # by id
    models: dict[str, Model]
    loaded: int
    demo: tuple[str, str] | None = None
    cors: frozenset[str] = frozenset()  # origins whose pages may call the API; "*": all

    def account(self, id: str) -> Account:
        """The declared account, or one made at run time with the common limits."""
        return self.accounts.get(id) or Account(id, self.limits)

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


Parser = Callable[[Any, str], Any]  # of a value and its path; raises ConfigError


def expect(fits: Any, path: str, told: str) -> None:
    if not fits:
        raise ConfigError(f"{path}: {told}")


def where(fits: Callable[[Any], Any], told: str) -> Parser:
    """A parser of values that fit, for which they must be as `told`."""

    def parse(value: Any, path: str) -> Any:
        expect(fits(value), path, f"must be {told}")
        return value

    return parse


text_of = where(lambda it: isinstance(it, str), "a text")
object_of = where(lambda it: isinstance(it, dict), "an object")
list_of = where(lambda it: isinstance(it, list), "a list")
boolean = where(lambda it: isinstance(it, bool), "true or false")
as_it_is = where(lambda it: True, "")


def whole(low: int, high: int) -> Parser:
    told = f"a whole number from {low} to {high}"
    return where(lambda it: type(it) is int and low <= it <= high, told)


def one_of(known: Iterable[str]) -> Parser:
    return where(lambda it: it in tuple(known), f"one of {', '.join(sorted(known))}")


def texts(fits: Callable[[str], Any], told: str) -> Parser:
    """A parser of lists of texts that all fit; `told` if one does not."""

    def parse(value: Any, path: str) -> frozenset[str]:
        for text in list_of(value, path):
            expect(fits(text_of(text, path)), path, f"{told}; not {text!r}")
        return frozenset(value)

    return parse


def named_members(parse: Callable[[str, Any, str], Any]) -> Parser:
    """A parser of objects: `parse` takes the name, value and path of each member."""

    def parse_all(value: Any, path: str) -> dict[str, Any]:
        given = object_of(value, path).items()
        return {name: parse(name, part, f"{path}.{name}") for name, part in given}

    return parse_all


def members(
    value: Any, path: str, parsers: dict[str, Parser], needed: str = ""
) -> dict[str, Any]:
    """The members of an object, parsed; all are known and the needed ones are there."""
    at = f"{path}." if path else ""
    for name in object_of(value, path or "keys.json"):
        expect(name in parsers, at + name, "unknown field")
    for name in needed.split():
        expect(name in value, at + name, "is required")
    return {name: parsers[name](part, at + name) for name, part in value.items()}


def printable_name(value: Any, path: str, longest: int = 100) -> str:
    """A name that people and terminals can be shown."""
    fits = 1 <= len(text_of(value, path)) <= longest and value == value.strip()
    told = f"must be 1 to {longest} printable characters"
    expect(fits and value.isprintable(), path, told)
    return value


def account_name(value: Any, path: str) -> str:
    """A name that can stand in the path of a URL, too."""
    fits = "/" not in printable_name(value, path) and value not in (".", "..")
    expect(fits, path, "must hold no '/'")
    return value


MOST_CREDITS = 10**9
UNLIMITED = 2**61  # micro-credits of an account that is metered, and not bounded


def amount(value: Any, path: str, low: float, high: int) -> Decimal:
    fits = isinstance(value, (int, float, Decimal)) and type(value) is not bool
    found = Decimal(str(value)) if fits else Decimal("NaN")
    fits = found.is_finite() and low <= found <= high
    expect(fits, path, f"must be a number from {low} to {high}")
    return found


def to_micro(value: Any, path: str, low: int = 0) -> int:
    """Micro-credits of an amount of credits, of six decimals at the most."""
    micro = amount(value, path, low, MOST_CREDITS) * MICRO
    expect(micro == micro.to_integral_value(), path, "has more than six decimals")
    return int(micro)


def number(text: str) -> int | Decimal | str:
    """The number that was typed on the command line; a text that is none is returned
    for the parsers, which refuse it by its name."""
    try:
        return int(text) if re.fullmatch("[0-9]{1,9}", text) else Decimal(text)
    except InvalidOperation:
        return text


def to_credits(micro: int) -> int | float:
    """Micro-credits as the number of credits that JSON and people are shown."""
    return micro // MICRO if micro % MICRO == 0 else micro / MICRO


def amount_text(credits: float) -> str:
    """An amount of credits without an exponent: six decimals at the most."""
    return f"{credits:.6f}".rstrip("0").rstrip(".")


MAX_RATE = 10_000  # requests of one window: it is read and written whole


def parse_rate(value: Any, path: str) -> str:
    try:
        items = rate_items(value)
    except (ValueError, TypeError):
        raise ConfigError(f"{path}: must read like '60/minute'") from None
    for item in items:
        whole(1, MAX_RATE)(item.amount, path)
        whole(1, 366 * DAY)(item.get_expiry(), f"{path} (seconds)")
    return value


def parse_limits(value: Any, path: str, common: Limits = COMMON_LIMITS) -> Limits:
    """Limits of this object; what it leaves out is `common`."""
    parsers = {"rate": parse_rate, "concurrent": whole(1, NO_LIMITS.concurrent)}
    return replace(common, **members(value, path, parsers))


PRICES = Price.__slots__
DAYS = "Mon Tue Wed Thu Fri Sat Sun".split()
DAY_NAME, CLOCK = f"({'|'.join(DAYS)})", "([0-9]{2}):([0-5][0-9])"
HOURS = re.compile(f"(?:{DAY_NAME}(?:-{DAY_NAME})? )?{CLOCK}-{CLOCK}")


def parse_price(value: Any, path: str, usual: dict[str, Any] | None = None) -> Price:
    """A price: micro-credits per million tokens are pico-credits per token. `usual`:
    what it replaces a part of."""
    expect(object_of(value, path), path, "names no price (0 is one)")
    parts = members((usual or {}) | value, path, dict.fromkeys(PRICES, to_micro))
    others = parts.keys() != {"reported"}
    expect(others, f"{path}.reported", "needs other prices, which are held")
    for name in parts.keys() & {"image", "request"}:
        parts[name] *= PICO
    return Price(**dict.fromkeys(("cached", "written"), parts.get("input", 0)) | parts)


def parse_utc(value: Any, path: str) -> int:
    """The minutes of "Mon-Fri 01:00-04:00", on these days or on all, as Hours has them;
    an end that is not after its start is on the next day."""
    match = HOURS.fullmatch(text_of(value, path))
    times = [int(part) for part in match.groups()[2:]] if match else [0] * 4
    start, end = times[0] * 60 + times[1], times[2] * 60 + times[3]
    fits = start != end and start < 1440 and end <= 1440
    expect(fits, path, "must read like 'Mon-Fri 01:00-04:00'")
    first = DAYS.index(match[1] or "Mon")
    last = DAYS.index(match[2] or match[1] or "Sun")
    all_day = (1 << ((end - start) % 1440 or 1440)) - 1
    days = range(first, first + (last - first) % 7 + 1)
    minutes = functools.reduce(operator.or_, [all_day << d * 1440 + start for d in days])
    return (minutes | minutes >> WEEK) & (1 << WEEK) - 1


def parse_hours(value: Any, path: str, usual: dict[str, Any]) -> Hours:
    parsers = dict.fromkeys(PRICES, as_it_is) | {"utc": parse_utc}
    given = members(value, path, parsers, needed="utc")
    minutes = given.pop("utc")
    return Hours(value["utc"], minutes, parse_price(given, path, usual))


def parse_prices(value: Any, path: str) -> tuple[Price, tuple[Hours, ...]]:
    """The usual price, and those of hours which no two may have in common."""
    usual = dict(object_of(value, path))
    listed, parsed = usual.pop("hours", []), []
    price = parse_price(usual, path)
    for number, each in enumerate(list_of(listed, f"{path}.hours")):
        hours = parse_hours(each, f"{path}.hours.{number}", usual)
        for other in parsed:
            told = f"overlaps with '{other.utc}'"
            apart = not hours.minutes & other.minutes
            expect(apart, f"{path}.hours.{number}.utc", told)
        parsed.append(hours)
    return price, tuple(parsed)


VARIABLE = r"\$([A-Za-z_][A-Za-z0-9_]*)"


def from_environment(value: Any, path: str, used: dict[str, str]) -> str:
    """Printable ASCII with every $NAME replaced; `used` notes their values, empty for
    those that are not set."""
    for name in re.findall(VARIABLE, text_of(value, path)):
        used[name] = os.environ.get(name, "")
    text = re.sub(VARIABLE, lambda match: used[match[1]], value)
    expect(text.isascii() and text.isprintable(), path, "must be printable ASCII")
    return text


def parse_proxy(value: Any, path: str, used: dict[str, str]) -> HttpProxy | None:
    """The proxy of http://user:password@host:port; None while a variable is unset.

    The last "@" ends the login: whatever a password holds, only its "%" is written %25.
    """
    scheme, _, rest = from_environment(value, path, used).partition("://")
    login, _, place = rest.removesuffix("/").rpartition("@")
    if "" in used.values():
        return None
    with contextlib.suppress(ValueError):
        url = urlsplit(f"//{place}")
        if scheme == "http" and url.hostname and url.netloc == place:
            return HttpProxy(url.hostname, url.port or 80, unquote(login))
    raise ConfigError(f"{path}: must read like http://user:$PASSWORD@host:3128")


CAPS = {"max_tokens", "max_completion_tokens", "max_output_tokens"}
CAPS |= {"n_predict", "num_predict", "max_new_tokens"}  # local servers' own names
NEEDED_FIELDS = CAPS | {"model", "messages", "stream"}  # no upstream goes without them


def parse_url(text: Any, path: str) -> dict[str, Any]:
    """The parts of an UpstreamConfig that its URL tells.

    What people copy with it is taken off: slashes too many, the path of a call.
    """
    try:
        url = urlsplit(text_of(text, path))
        host, port = url.hostname or "", url.port
    except ValueError:
        raise ConfigError(f"{path}: must be a URL") from None
    dialect, _, scheme = str(url.scheme).rpartition("+")
    if url.scheme == "echo":
        dialect, scheme = "echo", "http"
    starts = ", ".join([f"{name}+https://" for name in DIALECTS if name])
    known = dialect in DIALECTS and scheme in ("http", "https")
    expect(known, path, f"must begin with https:// or a dialect ({starts})")
    expect(host or dialect == "echo", path, "names no host")
    expect(re.fullmatch(r"[\w.:-]*", host, re.ASCII), path, "the host must be ASCII")
    plain = re.fullmatch("[!-~]*", url.path + url.query)
    expect(plain, path, "the path must be printable ASCII")
    expect(not (url.username or url.fragment), path, "takes no user or fragment")
    secure = scheme == "https"
    base = re.sub("/+", "/", url.path).rstrip("/").removesuffix("/chat/completions")
    place = {"dialect": dialect, "secure": secure, "host": host, "path": base}
    return place | {"port": port or (443 if secure else 80), "query": url.query}


HEADER_NAME = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)
OWN_HEADERS = {"host", "connection", "content-length", "content-type", "expect"}
OWN_HEADERS |= {"transfer-encoding", "accept-encoding", "upgrade"}
AUTH = {  # how a key is sent
    "bearer": ("Authorization", "Bearer "),
    "x-api-key": ("x-api-key", ""),
    "api-key": ("api-key", ""),
}
# What known providers differ in, by the end of their host; keys.json may say otherwise.
AZURE = {"auth": "api-key", "cap": "max_completion_tokens"}
AS_SYSTEM = {"developer": "system"}
KNOWN = {
    # Reasoning models refuse `max_tokens`, and OpenAI both names at once.
    "openai.com": {"cap": "max_completion_tokens"},
    # learn.microsoft.com/azure/ai-services/openai/reference
    "openai.azure.com": AZURE,
    "services.ai.azure.com": AZURE,
    "cognitiveservices.azure.com": AZURE,
    # num-scope/pix#34; max_completion_tokens is ignored in silence
    "api.deepseek.com": AS_SYSTEM | {"cap": "max_tokens"},
    # editor-code-assistant/eca#231: what it does not know is a 422
    "api.mistral.ai": AS_SYSTEM | {"cap": "max_tokens"},
    "aliyuncs.com": AS_SYSTEM,  # Qwen: haru/redmine_ai_helper#242
    "volces.com": AS_SYSTEM,  # Volcengine Ark: agno-agi/agno#6697
}


def parse_upstream(name: str, value: Any, path: str) -> UpstreamConfig:
    expect("url" in object_of(value, path), f"{path}.url", "is required")
    place, used = parse_url(value["url"], f"{path}.url"), {}
    kind, host = DIALECTS[place["dialect"]], f".{place['host']}"
    filled = functools.partial(from_environment, used=used)

    def parse_header(name: str, text: Any, path: str) -> str:
        fits = HEADER_NAME.fullmatch(name) and name.lower() not in OWN_HEADERS
        expect(fits, path, "is no header that can be set")
        return filled(text, path)

    cannot = "cannot leave out what all need ('cap' renames a cap)"
    parsers = {
        "url": as_it_is, "key": filled, "auth": one_of(AUTH),
        "headers": named_members(parse_header),
        "query": named_members(lambda name, text, path: filled(text, path)),
        "proxy": functools.partial(parse_proxy, used=used),
        "timeout": lambda it, at: float(amount(it, at, 0.001, 3600)),
        "without": texts(lambda it: it not in NEEDED_FIELDS, cannot),
        "developer": text_of, "cap": one_of(CAPS),
    }  # fmt: skip
    heeded = {each: parsers[each] for each in f"url key {kind.options}".split()}
    known = [each for end, each in KNOWN.items() if host.endswith(f".{end}")]
    known = functools.reduce(operator.or_, [*known, kind.known], {})
    value = {each: part for each, part in known.items() if each in heeded} | value
    parts = members(value, path, heeded)
    del parts["url"]
    takes = "query" in heeded or not place["query"]
    expect(takes, f"{path}.url", "takes no query")
    query = filter(None, (place["query"], urlencode(parts.get("query", {}))))
    parts = place | parts | {"query": "&".join(query)}
    parts["headers"] = tuple(parts.get("headers", {}).items())
    secrets = [*parts.get("key", "").split(":"), *used.values()]
    if proxy := parts.get("proxy"):
        secrets.append(proxy.login.partition(":")[2])
    words = [word for _, text in parts["headers"] for word in text.split()]
    secrets += [word for word in words if len(word) >= 16]
    missing = tuple([name for name, found in used.items() if not found])
    return UpstreamConfig(name, **parts, missing=missing, secrets=tuple(secrets))


def plain(value: Any, path: str) -> Any:
    """JSON with floats for decimals, as it will be forwarded."""
    try:
        return json.loads(json.dumps(value, default=float, allow_nan=False))
    except ValueError:
        raise ConfigError(f"{path}: a number is too large") from None


# Fields that move the price, and their plain values; others need an `allow`. Those of
# images count where an image has a price: tokens tell by themselves.
PRICED = {
    "service_tier": ("auto", "default", "standard", "standard_only", "on_demand"),
    "speed": ("standard",),  # Anthropic
    "inference_geo": ("global",),  # Anthropic
    "anthropic-beta": (),  # of the header: DEAR_BETAS
    "modalities": ("text",),
    # True: answered when nobody listens; pictures have one, too.
    "background": (False, "auto", "opaque", "transparent"),
    "deferred": (False,),  # xAI, the same
    "n_cmpl": (1,),  # llama.cpp's `n`
    "extra_body": (),  # other fields, to some servers
    "web_search_options": (),
    "search_parameters": (),  # xAI
    "enable_search": (False,),  # Qwen
    "fallbacks": (),  # LiteLLM: other models
    "plugins": (),  # OpenRouter, as the next three: who answers, and for what price
    "preset": (),
    "models": (),
    "provider": (),
}
PRICED_IMAGES = {
    "quality": ("auto", "standard", "low"),
    "size": ("auto", "256x256", "512x512", "1024x1024", "1K", "2K"),
    "resolution": ("1k",),  # xAI
    "input_fidelity": ("low",),
    "sequential_image_generation": ("disabled",),  # Seedream: up to 15 images
    "batch_size": (1,),  # SiliconFlow's `n`, as the next two elsewhere
    "num_images": (1,),
    "num_outputs": (1,),
}
ALL_PRICED = PRICED | PRICED_IMAGES


LOOPBACK = re.compile(r"localhost|::1|127\.[0-9.]+|")  # echo has no host


def parse_routes(
    value: Any, path: str, id: str, upstreams: dict[str, UpstreamConfig]
) -> tuple[tuple[UpstreamConfig, str], ...]:
    routes = []
    for text in value if isinstance(value, list) and value else [value]:
        upstream, _, upstream_id = text_of(text, path).partition("/")
        expect(upstream_id, path, "must read like 'name/id'")
        expect(upstream in upstreams, path, f"no upstream is named '{upstream}'")
        alike = id.endswith("*") == upstream_id.endswith("*")
        expect(alike, path, "both names end with '*', or none")
        routes.append((upstreams[upstream], upstream_id))
    return tuple(routes)


def parse_defaults(value: Any, path: str) -> dict[str, Any]:
    fits = isinstance(value, dict) and not {"model", "n", "best_of"} & {*value}
    expect(fits, path, "must be an object without 'model' or 'n'")
    return plain(value, path)


def parse_model(
    id: str, value: Any, path: str, upstreams: dict[str, UpstreamConfig]
) -> Model:
    def is_priced(allowed: str) -> bool:
        return allowed.partition(":")[0] in ALL_PRICED

    given = members(value, path, {
        "upstream": functools.partial(parse_routes, id=id, upstreams=upstreams),
        "about": text_of, "defaults": parse_defaults, "max_output": whole(1, MAX_TOKENS),
        "price": parse_prices,
        "allow": texts(is_priced, f"takes {', '.join(ALL_PRICED)}"),
    }, needed="upstream")  # fmt: skip
    routes = given.pop("upstream")
    free = all([LOOPBACK.fullmatch(upstream.host) for upstream, _ in routes])
    expect("price" in given or free, f"{path}.price", "is required")
    price, hours = given.pop("price", (Price(), ()))
    flat = frozenset.intersection(*[DIALECTS[up.dialect].flat(id) for up, id in routes])
    allow = given.pop("allow", frozenset()) | flat
    name = printable_name(id, path, 200)
    return Model(name, routes, price, hours=hours, allow=allow, **given)


BEARER = re.compile(r"[\x21-\x2b\x2d-\x7e]{4,200}")  # no comma: two headers are joined


def parse_moment(value: Any, path: str) -> int:
    """The unix second of a moment (UTC), or in which a date is over."""
    for form, length in (("%Y-%m-%d", DAY), ("%Y-%m-%dT%H:%M:%SZ", 0)):
        with contextlib.suppress(ValueError):
            return calendar.timegm(time.strptime(text_of(value, path), form)) + length
    raise ConfigError(f"{path}: must be a date that there is, like '2027-01-31'")


def parse_budget(value: Any, path: str) -> Budget:
    parsers = {"credits": to_micro, "per": one_of(PERIODS)}
    given = members(value, path, parsers, needed="credits per")
    return Budget(given["credits"], given["per"])


def models_of(known: Container[str]) -> Parser:
    """A parser of lists of the models that an account or a key may use."""
    return texts(known.__contains__, "must be names of models")


TERMS = "expires budget models limits metrics"


def parse_terms(value: Any, path: str = "", models: Container[str] = ()) -> Terms:
    """The terms of a key, of either file; `models`: those that there are."""
    given = object_of(value, path or "terms").items()
    given = {name: part for name, part in given if part is not None}
    parts = members(given, path, {
        "expires": parse_moment, "budget": parse_budget, "models": models_of(models),
        "limits": functools.partial(parse_limits, common=NO_LIMITS), "metrics": boolean,
    })  # fmt: skip
    told = plain(given, path).items()
    written = {name: part for name, part in told if part is not False and part != {}}
    return Terms(**parts, written=written)


def patched(value: Any, change: Any) -> Any:
    """JSON after a merge patch (RFC 7396)."""
    if not isinstance(change, dict):
        return change
    out = dict(value) if isinstance(value, dict) else {}
    for name, part in change.items():
        out[name] = patched(out.get(name), part)
    return {name: part for name, part in out.items() if part is not None}


def changed_terms(terms: Terms, change: dict[str, Any], models: Iterable[str]) -> Terms:
    """Terms after a merge patch of what is written of them, as a key that is made or
    changed at run time gets them; ConfigError."""
    known = {*models, *(terms.models or ())}
    terms = parse_terms(patched(terms.written, change), models=known)
    passed = "expires" in change and terms.expired()
    expect(not passed, "expires", "has passed already")
    return terms


def parse_key(name: str, value: Any, path: str, models: Container[str]) -> Key:
    """A declared key: the text or sha256:<hex>, alone or as `key` beside its terms;
    only its hash and a hint are kept."""
    printable_name(name, path)
    terms = NO_TERMS
    if isinstance(value, dict):
        given = dict(value)
        value = given.pop("key", None)
        terms, path = parse_terms(given, path, models), f"{path}.key"
    if text_of(value, path).startswith("sha256:"):
        hash, hint = value[7:].lower(), "sha256"
        fits = re.fullmatch("[0-9a-f]{64}", hash)
        expect(fits, path, "sha256: takes 64 hexadecimal digits")
    else:
        hash, hint = sha256(value), key_hint(value)
        fits = BEARER.fullmatch(value)
        expect(fits, path, "must be 4 to 200 characters without blanks")
    return Key(key_id(hash), name, "", hash, hint, terms=terms)


def parse_account(
    id: str, value: Any, path: str, limits: Limits, models: dict[str, Model]
) -> Account:
    given = members(value, path, {
        "credits": lambda it, at: UNLIMITED if it == "unlimited" else to_micro(it, at),
        "keys": named_members(functools.partial(parse_key, models=models)),
        "models": models_of(models),
        "limits": functools.partial(parse_limits, common=limits),
        "admin": boolean, "demo": boolean,
    })  # fmt: skip
    keys = given.pop("keys", {}).values()
    account = Account(account_name(id, path), **{"limits": limits} | given)
    if account.demo:
        routes = itertools.chain(*[models[name].routes for name in account.models or ()])
        fits = not account.admin and {up.dialect for up, _ in routes} == {"echo"}
        told = "is for accounts that list echo models only, and are no admin's"
        expect(fits, f"{path}.demo", told)
        reads = any([key.terms.metrics for key in keys])
        expect(not reads, f"{path}.keys", "a public key reads no metrics")
    keys = [replace(key, account=id, admin=account.admin) for key in keys]
    return replace(account, keys=tuple(keys))


# As browsers write it (RFC 6454 §6.2), or all.
ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\sA-Z]+")


def parse_config(document: Any) -> Config:
    """The whole of keys.json; raises ConfigError with the path of what is wrong."""
    sections = "limits accounts upstreams models cors".split()
    raw = members(document, "", dict.fromkeys(sections, as_it_is))
    limits = parse_limits(raw.get("limits", {}), "limits")

    def section(name: str, parse: Callable, **above: Any) -> dict[str, Any]:
        parse = functools.partial(parse, **above)
        return named_members(parse)(raw.get(name, {}), name)

    upstreams = section("upstreams", parse_upstream)
    models = section("models", parse_model, upstreams=upstreams)
    accounts = section("accounts", parse_account, limits=limits, models=models)
    keys: dict[str, Key] = {}
    for key in itertools.chain(*[account.keys for account in accounts.values()]):
        path = f"accounts.{key.account}.keys.{key.name}"
        expect(keys.setdefault(key.id, key) is key, path, "is declared twice")
    shown = [
        (text, min(account.models)) for account in accounts.values() if account.demo
        for text in raw["accounts"][account.id].get("keys", {}).values()
        if isinstance(text, str) and not text.startswith("sha256:")
    ]  # fmt: skip
    origins = texts(ORIGIN.fullmatch, "must list origins like 'https://example.com'")
    cors = origins(raw.get("cors", []), "cors")
    demo = next(iter(shown), None)
    return Config(limits, accounts, keys, models, int(time.time()), demo, cors)


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
        before, self._seen = self._seen, self._stat()
        if self._seen != before:
            try:
                self.current = self._read()
            except ConfigError as error:
                return str(error)
        return None

    def _stat(self) -> tuple[int, int, int] | None:
        with contextlib.suppress(OSError):
            found = self.path.stat()
            return found.st_ino, found.st_size, found.st_mtime_ns
        return None

    def _read(self) -> Config:
        try:
            text = self.path.read_bytes().decode()
            return parse_config(
                json.loads(text, parse_float=Decimal, object_pairs_hook=unique)
            )
        except OSError as error:
            reason = error.strerror or "cannot be read"
        except UnicodeDecodeError:
            reason = "is not UTF-8"
        except json.JSONDecodeError as error:
            reason = f"line {error.lineno}, column {error.colno}: {error.msg}"
        except (ConfigError, ValueError, RecursionError) as error:
            reason = str(error)
        raise ConfigError(f"{self.path.name}: {reason}")


# Ledger ------------------------------------------------------------------------------

SCHEMA_VERSION = 4  # `PRAGMA user_version`; MIGRATIONS has the steps to it
OPEN, SETTLED, RELEASED = 0, 1, 2  # a request's row: a hold resolves at most once

TEXT, INT = "TEXT NOT NULL", "INTEGER NOT NULL"
SUM = f"{INT} DEFAULT 0"
SUMMED = "requests released answered input cached output images cost ttfb duration"
SUMMED = [*SUMMED.split(), "written", "lost"]
ADDED = ", ".join([f"{name} = {name} + excluded.{name}" for name in SUMMED])
# accounts.made: when it was made at run time, 0: it was not, or was closed;
# accounts.declared: what keys.json granted it at its last hold; grants.amount: negative
# for a correction; keys.former: 1 for a former account's; keys.terms: as keys.json has
# them. A row of budgets is what a key has spent on the days from `since` to before
# `until`, which its budget is for: made out of usage when a hold first asks, then kept.
# `most`: the budget when a hold asked last, or what was spent and held if that was more.
SCHEMA = f"""
CREATE TABLE meta(name TEXT PRIMARY KEY, value {TEXT}) STRICT, WITHOUT ROWID;
CREATE TABLE accounts(
    id TEXT PRIMARY KEY, made {INT}, created {INT}, granted {SUM}, spent {SUM},
    held {SUM}, lost {SUM}, declared {SUM},
    CHECK (spent >= 0 AND held >= 0 AND lost >= 0)
) STRICT, WITHOUT ROWID;
CREATE TABLE grants(
    id INTEGER PRIMARY KEY, account {TEXT}, amount {INT}, note {TEXT}, created {INT}
) STRICT;
CREATE TABLE keys(
    id TEXT PRIMARY KEY, account {TEXT}, name {TEXT}, hint {TEXT}, hash TEXT,
    admin {INT}, created INTEGER, used INTEGER, revoked INTEGER, former {SUM}, terms TEXT
) STRICT, WITHOUT ROWID;
CREATE INDEX keys_account ON keys(account, revoked IS NOT NULL, created);
CREATE TABLE requests(
    account {TEXT}, id {TEXT}, key {TEXT}, model {TEXT}, path {TEXT}, stream {INT},
    slot {INT}, state {INT}, hold {INT}, cost {SUM}, lost {SUM}, input {SUM},
    cached {SUM}, output {SUM}, images {SUM}, estimated {SUM}, status {SUM},
    created {INT}, ttfb INTEGER, duration INTEGER, written {SUM}, asked TEXT,
    code TEXT, upstream TEXT, attempts {SUM}, PRIMARY KEY (account, id)
) STRICT, WITHOUT ROWID;
CREATE INDEX requests_open ON requests(key, created, hold) WHERE state = 0;
CREATE TABLE usage(
    account {TEXT}, day {INT}, key {TEXT}, model {TEXT}, status {INT}, requests {SUM},
    released {SUM}, refused {SUM}, answered {SUM}, input {SUM}, cached {SUM},
    output {SUM}, images {SUM}, cost {SUM}, ttfb {SUM}, duration {SUM}, written {SUM},
    lost {SUM}, PRIMARY KEY (account, day, key, model, status)
) STRICT, WITHOUT ROWID;
CREATE INDEX usage_key ON usage(key, day);
CREATE TABLE budgets(
    key {TEXT}, until {INT}, since {INT}, spent {INT}, most {INT},
    PRIMARY KEY (key, until, since)
) STRICT, WITHOUT ROWID;
CREATE TABLE windows(key TEXT PRIMARY KEY, hits BLOB NOT NULL) STRICT, WITHOUT ROWID;

-- The sums follow the rows, whoever writes them: they cannot diverge. Of usage,
-- `requests` were settled, `released` ended free, `refused` never had a row; of the
-- first two `answered` had a first byte. `ttfb` and `duration`: sums of milliseconds.
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
    INSERT INTO usage VALUES (
        NEW.account, NEW.created / 86400000, NEW.key, NEW.model, NEW.status,
        NEW.state = 1, NEW.state = 2, 0, NEW.ttfb IS NOT NULL, NEW.input, NEW.cached,
        NEW.output, NEW.images, NEW.cost, coalesce(NEW.ttfb, 0),
        coalesce(NEW.duration, 0), NEW.written, NEW.lost
    ) ON CONFLICT DO UPDATE SET {ADDED};
    UPDATE budgets SET spent = spent + NEW.cost WHERE key = NEW.key
        AND until > NEW.created / 86400000 AND since <= NEW.created / 86400000;
END;
"""

# What an older ledger's new columns hold, once it has the tables of SCHEMA, by the version
# that each begins with. Version 0, commit 022b995, had random numbers where the version is.
FROM_VERSION_0 = """
INSERT INTO usage SELECT account, created / 86400000, key, model, status, sum(state = 1),
    sum(state = 2), 0, count(ttfb), sum(input), sum(cached), sum(output), sum(images),
    sum(cost), coalesce(sum(ttfb), 0), coalesce(sum(duration), 0), 0, 0
    FROM requests WHERE state != 0 GROUP BY 1, 2, 3, 4, 5;
INSERT INTO usage(account, day, key, model, status, refused)
    SELECT '', strftime('%s', 'now') / 86400, '', '', place, requests FROM tallies
    WHERE kind = 'status' AND model = '';
DROP TABLE tallies;
INSERT INTO meta VALUES ('id', '{id}');
"""
FROM_VERSION_2 = """
UPDATE accounts SET declared = max(0, spent + held - granted);
UPDATE keys SET former = 1
    WHERE created < (SELECT made FROM accounts WHERE id = account);
INSERT INTO accounts(id, made, created) SELECT account, 0, created FROM keys
    WHERE created IS NOT NULL ON CONFLICT DO NOTHING;
"""
FROM_VERSION_3 = """
UPDATE usage SET lost = r.lost FROM (
    SELECT account AS a, created / 86400000 AS d, key AS k, model AS m, status AS s,
        sum(lost) AS lost FROM requests WHERE state != 0 AND lost GROUP BY 1, 2, 3, 4, 5
) r WHERE account = a AND day = d AND key = k AND model = m AND status = s;
"""
MIGRATIONS = FROM_VERSION_0, "", FROM_VERSION_2, FROM_VERSION_3

MAX_WORKERS = 512  # worker slots: bytes 1 to 512 of the lock file
WRITER, SPEAKER = 0, MAX_WORKERS + 1  # its other bytes
KEYS_FILE = 1024  # where, behind its id, the server's keys file is named
FLOCK = struct.Struct("hhqqi")  # struct flock of fcntl(2)
SHARED_BYTES = 0x40000002, 510  # that each connection in WAL mode has a read lock on
LEDGER_TIMEOUT = 5.0  # seconds that a write waits for other writers
LOCK_POLL = 0.0005  # seconds between two looks at the lock between processes
LOG_SIZE = 4 << 20  # bytes from which on the log is moved into the file; it keeps so
# many, as a log that is overwritten costs less to sync than one that grows
SWEEP_INTERVAL = 0.4  # seconds between two looks at dead workers and retries

Operation = Callable[[sqlite3.Connection], Any]


# -- The file


def reason_of(error: BaseException) -> str:
    """What is in the way, for the log."""
    return getattr(error, "reason", f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def ledger_errors() -> Iterator[None]:
    """The one place where the file's exceptions become ours."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise LedgerUnavailable(reason_of(error)) from None


def schema_of(db: sqlite3.Connection) -> dict[str, str]:
    """Name -> SQL of everything in a database, in one line: an added column has none of
    its own."""
    rows = db.execute("SELECT name, sql FROM sqlite_schema WHERE sql > ''")
    parts = ((name, re.sub("([(),])", r" \1 ", sql)) for name, sql in rows)
    return {name: " ".join(sql.split()) for name, sql in parts}


@functools.cache
def expected_schema() -> dict[str, str]:
    """Name -> SQL of everything in SCHEMA."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(SCHEMA)
        return schema_of(db)


def are_locked(file: int, start: int, length: int) -> bool:
    """Whether others have a lock on any of these bytes of an open file."""
    asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    found = fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked)
    return FLOCK.unpack(found)[0] != fcntl.F_UNLCK


def rebuilding(db: sqlite3.Connection) -> Iterator[str]:
    """Statements that give an older ledger the schema of SCHEMA; its rows keep the
    columns that both have. What is yielded is executed before the next one."""

    def columns(table: str) -> list[str]:
        return [row[1] for row in db.execute(f"PRAGMA table_info({table})")]

    found = schema_of(db)
    for name, sql in found.items():
        if kind := re.match("CREATE (INDEX|TRIGGER)", sql):
            yield f"DROP {kind[1]} {name}"
    for name, sql in expected_schema().items():
        if found.get(name) == sql and sql.startswith("CREATE TABLE"):
            continue
        if old := columns(name):
            yield f"ALTER TABLE {name} RENAME TO former"
        yield sql
        if old:
            kept = ", ".join([each for each in columns(name) if each in old])
            yield f"INSERT INTO {name}({kept}) SELECT {kept} FROM former"
            yield "DROP TABLE former"


def progress(label: str, **steps: Any) -> Any:
    """A bar on the standard error of a terminal, and nothing elsewhere."""
    where = {"file": sys.stderr, "hidden": not sys.stderr.isatty()}
    return click.progressbar(label=label, **where, **steps)


def new_file(path: str) -> str:
    """The name of an empty file beside `path`, for its owner alone; what an earlier
    attempt has left there is gone, journals too."""
    for suffix in ("", "-journal", "-wal", "-shm"):
        Path(f"{path}-new{suffix}").unlink(missing_ok=True)
    os.close(os.open(f"{path}-new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    return f"{path}-new"


class LedgerFile:
    """The SQLite file: its identity, its locks, its connections. It knows no money.

    Beside it stands a lock file. Its text is the ledger's id; its bytes are locks of an
    open file, which the kernel drops with their process: the writer's, one for each
    worker's slot, and the SPEAKER's, who tells what concerns all workers.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.path.realpath(path)  # a symlink is resolved once
        self.id = ""
        self._lock = -1
        self._places: tuple[int, ...] = ()  # of both files, once they are opened
        self._kept: dict[str, sqlite3.Connection] = {}  # by what they are for
        self._reader = threading.Lock()
        self._doubtful = False  # a commit has failed: the log may have lost pages

    def open(self) -> None:
        """Finds, makes or upgrades the ledger, once; not called by two threads."""
        if self._places:
            return
        mode = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        with ledger_errors():
            self._lock = os.open(self.path + "-lock", mode, 0o600)
            try:
                with self.exclusive():
                    self.id = self._find_or_make()
                self._places = self._look()
            finally:
                if not self._places:
                    os.close(self._lock)

    def _find_or_make(self) -> str:
        """The ledger's id. It is never made again where there was one."""
        mark = os.pread(self._lock, 64, 0).rstrip(b"\0").decode("ascii", "replace")
        mark = mark.replace("no ledger", "")  # 022b995 could write that of a good one
        there = os.path.exists(self.path)
        anew = f"restore it, or delete {self.path}-lock as well to start anew"
        self._require(there or not mark, f"is gone; {anew}")
        if there:
            told = "is in use without its lock file: stop the server that uses it"
            self._require(mark or not self._in_use(), told)
            id = self._accept(mark)
        else:
            id = self._make()
        if id != mark:
            os.pwrite(self._lock, id.encode().ljust(64, b"\0"), 0)
            os.fsync(self._lock)
        return id

    def _require(self, fits: Any, reason: str) -> None:
        if not fits:
            raise LedgerUnavailable(f"{self.path} {reason}")

    def _make(self) -> str:
        """A new ledger; under another name first: half of one would stay for ever."""
        new, id = new_file(self.path), secrets.token_hex(8)
        with contextlib.closing(self._connect(new)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            made = f"INSERT INTO meta VALUES ('boot', ''), ('id', '{id}');"
            version = f"PRAGMA user_version = {SCHEMA_VERSION};"
            db.executescript(f"BEGIN; {SCHEMA} {made} {version} COMMIT;")
        os.rename(new, self.path)  # closed, and so in one file
        return id

    def _accept(self, mark: str) -> str:
        """The id of the ledger that is there, upgraded where it is an older one's."""
        with contextlib.closing(self._connect(self.path)) as db:
            version, id = self._identify(db)
        self._require(mark in ("", id), "is another ledger than before")
        told = f"is of a newer proxy.py: its schema is {version}, not {SCHEMA_VERSION}"
        self._require(version <= SCHEMA_VERSION, told)
        if older := version < SCHEMA_VERSION:
            self._require(not self._in_use(), "is in use: stop the older server first")
        with contextlib.closing(self._connect(self.path)) as db:
            if older:
                self._upgrade(db, version, id)
            found = schema_of(db)
        for name, sql in expected_schema().items():
            told = f"is damaged: its {name} is not that of schema {SCHEMA_VERSION}"
            self._require(found.get(name) == sql, told)
        return id

    def _identify(self, db: sqlite3.Connection) -> tuple[int, str]:
        """The schema's version and the ledger's id, asked through SQLite, log included:
        between two writes of a checkpoint the file alone is no database."""
        (number,) = db.execute("PRAGMA user_version").fetchone()
        (other,) = db.execute("PRAGMA application_id").fetchone()
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
        sql = "SELECT value FROM meta WHERE name = 'id'"
        if "meta" in tables and (row := db.execute(sql).fetchone()):
            return number, row[0]
        # 022b995 had its id in the file's header.
        self._require({"meta", "tallies"} <= tables, "is no ledger")
        return 0, f"{number:08x}{other:08x}"

    def _upgrade(self, db: sqlite3.Connection, version: int, id: str) -> None:
        """Migrates in numbered steps, in one transaction, after a backup."""
        backup = f"{self.path}-v{version}"
        with contextlib.closing(sqlite3.connect(new_file(backup))) as copy:
            db.backup(copy)
        os.rename(backup + "-new", backup)
        db.execute("BEGIN")
        if version == 0:
            db.execute("DROP TABLE usage")  # it was of other things
        steps = "".join(MIGRATIONS[version:]).format(id=id).split(";")
        every = itertools.chain(rebuilding(db), steps)
        with progress("Migrating", iterable=every, length=2 * len(schema_of(db))) as bar:
            for sql in bar:
                db.execute(sql)
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        db.execute("COMMIT")

    def _in_use(self) -> bool:
        """Whether any process, this one too, has a connection to the file. None of
        ours may be open: closing a descriptor drops SQLite's locks (fcntl(2))."""
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return are_locked(file, *SHARED_BYTES)
        finally:
            os.close(file)

    def is_served(self) -> bool:
        """Whether a worker of any server lives: it has its slot."""
        return are_locked(self._lock, 1, MAX_WORKERS)

    @property
    def keys_file(self) -> str:
        """The keys file of the server that used it last, as its lock file tells."""
        text = os.pread(self._lock, 4096, KEYS_FILE).rstrip(b"\0")
        return text.decode("utf-8", "replace")

    @keys_file.setter
    def keys_file(self, path: str) -> None:
        text = os.fsencode(path)[:4096].ljust(4096, b"\0")
        with ledger_errors():
            os.pwrite(self._lock, text, KEYS_FILE)

    # Locks

    def take(self, byte: int) -> bool:
        """Whether the lock on this byte is this process's now."""
        return self._set(fcntl.F_WRLCK, byte)

    def drop(self, byte: int) -> None:
        self._set(fcntl.F_UNLCK, byte)

    def _set(self, kind: int, byte: int) -> bool:
        # Linux's locks of an open file: POSIX ones vanish as soon as the process
        # closes any other descriptor of the file (fcntl(2)), as `check` would.
        try:
            lock = FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
            fcntl.fcntl(self._lock, fcntl.F_OFD_SETLK, lock)
        except OSError:
            return False
        return True

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """The lock between processes: waiting is short (p99 34 ms instead of 147 with
        SQLite's own), and its WAL-reset race (before 3.51.3) excluded. Polled for, as
        a stopped process may hold it for ever."""
        deadline = time.monotonic() + LEDGER_TIMEOUT
        while not self.take(WRITER):
            if time.monotonic() > deadline:
                raise LedgerUnavailable("the lock is held by another process")
            time.sleep(LOCK_POLL)
        try:
            yield
        finally:
            self.drop(WRITER)

    # Connections

    def _look(self) -> tuple[int, ...]:
        file, lock = os.stat(self.path), os.stat(self.path + "-lock")
        return file.st_dev, file.st_ino, lock.st_dev, lock.st_ino

    def check_places(self) -> None:
        """Both files must be those that were opened: an unlinked one takes writes, a log
        beside another file is that file's own, and slots without the lock file's are
        nobody's."""
        self._require(self._places, "is not opened yet")
        with ledger_errors():
            found = self._look()
        self._require(found == self._places, "or its lock file was replaced")

    def _connect(self, path: str, id: str | None = None) -> sqlite3.Connection:
        """A connection to the file that is there, it is never made by opening; with an
        `id` to that ledger alone."""
        db = sqlite3.connect(
            f"file:{percent_encoded(path)}?mode=rw", uri=True, timeout=LEDGER_TIMEOUT - 1,
            isolation_level=None, check_same_thread=False, cached_statements=64,
        )  # fmt: skip
        try:
            # Errors of its own checkpoints would be told nobody.
            db.execute("PRAGMA wal_autocheckpoint = 0")
            db.execute("PRAGMA cache_size = -512")  # KiB; others' writes empty it
            db.execute(f"PRAGMA journal_size_limit = {LOG_SIZE}")
            fits = id is None or self._identify(db) == (SCHEMA_VERSION, id)
            self._require(fits, "is another ledger than before")
        except BaseException:
            db.close()  # in a cycle with its cache, it would keep three descriptors
            raise
        return db

    def _verified(self) -> sqlite3.Connection:
        """A connection to the ledger as it was opened."""
        self.check_places()
        return self._connect(self.path, self.id)

    @contextlib.contextmanager
    def _connection(self, use: str) -> Iterator[sqlite3.Connection]:
        """The connection that is kept for this use, until an error closes it."""
        db = self._kept.get(use) or self._kept.setdefault(use, self._verified())
        try:
            yield db
        except BaseException:
            self._kept.pop(use).close()  # which rolls back
            raise

    def transact(self, operations: Iterable[Operation], durable: bool) -> list[Any]:
        """The results of the operations, run in one committed transaction, which if
        `durable` survives a loss of power. Any error undoes them all."""
        with self.exclusive():
            self.check_places()
            with self._connection("writing") as db:
                if self._doubtful:
                    # After a failed fsync the kernel takes the lost pages for clean:
                    # only what is written anew, into the file, is sure to be there.
                    self._checkpoint(db, "RESTART")
                db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                db.execute("BEGIN IMMEDIATE")
                results = [operation(db) for operation in operations]
                self._doubtful = True
                db.execute("COMMIT")
                self._doubtful = False
        return results

    def checkpoint(self) -> None:
        """Moves the log into the file, once it is worth it, while nobody writes. The
        next write cuts it; a look at one that was moved already takes 10 µs."""
        if "writing" in self._kept and os.stat(self.path + "-wal").st_size > LOG_SIZE:
            with self.exclusive(), self._connection("writing") as db:
                self._checkpoint(db, "PASSIVE")

    def _checkpoint(self, db: sqlite3.Connection, mode: str) -> None:
        self._doubtful = True
        ((busy, _, _),) = db.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
        if busy and mode != "PASSIVE":
            raise LedgerUnavailable("a reader is in the way of a checkpoint")
        self._doubtful = False

    def read(self, sql: str, *values: Any) -> list[tuple]:
        """All rows of one short query, of the file as it was opened."""
        with self._reader, ledger_errors(), self._connection("reading") as db:
            return db.execute(sql, values).fetchall()

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own on one state of the ledger, for long queries."""
        with ledger_errors(), contextlib.closing(self._verified()) as db:
            db.execute("BEGIN")
            yield db

    def close(self) -> None:
        """Closes everything; the locks go with it."""
        with self._reader:
            while self._kept:
                self._kept.popitem()[1].close()
            if self._places:
                self._places = ()
                os.close(self._lock)


# -- The writer


class Job(NamedTuple):
    """An operation that waits to be committed; `answer` gets its result, or why none."""

    operation: Operation
    durable: bool
    answer: queue.SimpleQueue[Any]


class Writer:
    """The one thread that writes: it commits together whatever waits.

    `upkeep` is what it does besides, every SWEEP_INTERVAL and at its end.
    """

    def __init__(self, file: LedgerFile, upkeep: Callable[[], None]):
        self._file, self._upkeep = file, upkeep
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._closed = False
        self._thread.start()

    def do(self, operation: Operation, durable: bool = False) -> Any:
        """The result of `operation`, committed by the writer's thread; with `durable` on
        the disk. What fails fails with all that wait beside it."""
        if self._closed:
            raise LedgerUnavailable("the ledger is closed")
        job = Job(operation, durable, queue.SimpleQueue())
        self._jobs.put(job)
        if isinstance(result := job.answer.get(), LedgerUnavailable):
            raise result
        return result

    def close(self) -> None:
        """Commits what waits, and ends the thread."""
        self._closed = True
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        due = time.monotonic() + SWEEP_INTERVAL
        while not self._closed or not self._jobs.empty():
            jobs: list[Job] = []
            with contextlib.suppress(queue.Empty):
                job = self._jobs.get(timeout=max(0.0, due - time.monotonic()))
                while job is not None:  # all that wait
                    jobs.append(job)
                    job = self._jobs.get_nowait()
            if jobs:
                self._commit(jobs)
            if time.monotonic() >= due:
                self._upkeep()
                due = time.monotonic() + SWEEP_INTERVAL
        self._upkeep()

    def _commit(self, jobs: list[Job]) -> None:
        operations, durable, answers = zip(*jobs)
        try:
            results = self._file.transact(operations, any(durable))
        except Exception as error:  # whatever it is, no job may look written
            results = [LedgerUnavailable(reason_of(error)) for _ in jobs]
        for answer, result in zip(answers, results):
            answer.put(result)


# -- The money


MAX_HOLD = 2**62  # micro-credits: SQLite's integers have 63 bits


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
        return -(-(self.fixed + self.token * tokens * self.choices) // PICO)

    def affordable(self, available: int) -> int:
        """Output tokens a choice that `available` micro-credits pay for; -1: none."""
        left = available * PICO - self.fixed
        if left < 0:
            return -1
        if not self.token * self.tokens:
            return self.tokens
        return min(self.tokens, left // (self.token * self.choices)) or -1


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer used: tokens by class, images, characters spoken. Of `input` parts
    were `cached`, or `written` to a cache, some of it for an `hour`. `reported`: the
    provider's own cost, in pico-credits."""

    input: int = 0
    cached: int = 0
    output: int = 0
    images: int = 0
    estimated: bool = False
    written: int = 0
    hour: int = 0
    characters: int = 0
    reported: int | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """A committed hold: the open row of a request, and what it may use."""

    id: str
    account: str
    key: str  # its name
    hold: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Charge:
    """How a request ended, as its row records it: settled for the cost of its usage
    (micro-credits), or released, free, where there is none. What the cost has above
    `most` is a loss. `code`: of a failure; `upstream`: the last one of `attempts` that
    was asked. Times in milliseconds."""

    status: int
    usage: Usage | None = None
    cost: int = 0
    most: int = MAX_HOLD
    ttfb: int | None = None
    duration: int | None = None
    code: str | None = None
    upstream: str | None = None
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class Window:
    """What one hit saw of a key's window: whether it fitted, the hits left, and when
    (monotonic seconds) the oldest one leaves."""

    item: RateLimitItem
    fits: bool
    left: int
    reset: float

    def refusal(self) -> RateLimited:
        wait = self.reset - time.monotonic()
        return RateLimited(f"Too many requests: {self.item} a key.", wait)


@dataclass(frozen=True, slots=True)
class Admission:
    """The outcome of `admit`: a lease, or the refusal; committed either way, so that a
    refused request has counted in its windows."""

    windows: list[Window]
    outcome: Lease | ProxyError


class KeyRow(NamedTuple):
    """A key as the ledger has it; without a hash it is one of keys.json."""

    id: str
    account: str
    name: str
    hint: str
    hash: str | None
    admin: int
    created: int | None
    used: int | None
    revoked: int | None
    former: int  # 1: it is of a former account of that name
    terms: str | None  # as JSON
    made: int | None  # when its account was made at run time; 0: it was not

    @property
    def lives(self) -> bool:
        """Whether it is of the account made at run time, not of a former one."""
        return bool(self.made) and not self.former


KEY_ROWS = (
    "SELECT k.id, account, name, hint, hash, admin, k.created, used, revoked, former,"
    " terms, made FROM keys k LEFT JOIN accounts a ON a.id = account"
)
# What lists of keys go by: those that live first.
KEY_ORDER = "revoked IS NOT NULL, k.created, k.id"


# The first day whose receipts are kept.
KEPT = "SELECT coalesce(max(CAST(value AS INTEGER)), 0) FROM meta WHERE name = 'kept'"
# What an account's sums have too much beside those of its rows.
PROOF = f"""
SELECT account, sum(granted), sum(spent), sum(held), sum(lost) FROM (
    SELECT id AS account, granted, spent, held, lost FROM accounts
    UNION ALL SELECT account, -amount, 0, 0, 0 FROM grants
    UNION ALL SELECT account, 0, -cost * (state = 1), -hold * (state = 0), -lost
        FROM requests WHERE state = 0 OR created >= ({KEPT}) * 86400000
    UNION ALL SELECT account, 0, -cost, 0, -lost FROM usage WHERE day < ({KEPT})
) GROUP BY account HAVING sum(granted) OR sum(spent) OR sum(held) OR sum(lost)
"""
# What usage has too much of a key and a day, from the first day to before the last.
USAGE_PROOF = """
SELECT account, key, day, sum(requests), sum(released), sum(cost), sum(lost) FROM (
    SELECT account, key, day, requests, released, cost, lost FROM usage
    UNION ALL SELECT account, key, created / 86400000, -(state = 1), -(state = 2),
        -cost * (state = 1), -lost FROM requests WHERE state != 0
) WHERE day >= :first AND day < :last
GROUP BY 1, 2, 3 HAVING sum(requests) OR sum(released) OR sum(cost) OR sum(lost)
"""
# What a key has spent, and what it holds, in the days of a row `b` of budgets.
BILLED = """(SELECT coalesce(sum(u.cost), 0) FROM usage u
    WHERE u.key = b.key AND u.day >= b.since AND u.day < b.until)"""
HELD = """(SELECT coalesce(sum(o.hold), 0) FROM requests o WHERE o.key = b.key
    AND o.state = 0 AND o.created >= b.since * 86400000
    AND o.created < b.until * 86400000)"""
# Rows that do not add up, or exceed what was granted when it was held; in words.
PROOFS = {
    "SELECT quick_check FROM pragma_quick_check WHERE quick_check != 'ok'": "{}",
    PROOF: "{}: granted, spent, held and lost have {}, {}, {} and {} more than its rows",
    "SELECT id FROM accounts WHERE spent + held > granted + declared":
        "{}: spent and held exceed what was granted",
    USAGE_PROOF: "{}: usage of {} on day {} is not its requests'",
    f"SELECT key, since, spent, {BILLED} AS billed FROM budgets b WHERE spent != billed":
        "{}: the budget from day {} on has spent {}, its usage sums to {}",
    f"SELECT key, since, spent, {HELD} AS held, most FROM budgets b"
    " WHERE spent + held > most":
        "{}: the budget from day {} on is exceeded: {} and {} of {}",
}  # fmt: skip
EXPIRED = """
DELETE FROM requests WHERE (account, id) IN (SELECT account, id FROM requests
    WHERE account = ? AND id < ? AND state != 0 AND created < ? * 86400000 LIMIT 500)
"""


def new_request_id() -> str:
    """Unique, and sorted by time so that the ledger grows at its end."""
    return f"req_{time.time_ns() // 10**6:011x}{random.getrandbits(52):013x}"


def id_of_day(day: int) -> str:
    """No request of that day (since 1970) or a later one has a smaller id."""
    return f"req_{max(0, day) * DAY * 1000:011x}"


USED_KEY = """
INSERT INTO keys(id, account, name, hint, admin, used) VALUES (?, ?, ?, ?, 0, ?)
    ON CONFLICT DO UPDATE SET used = excluded.used
    WHERE coalesce(used, 0) < excluded.used - 59
"""


def use_key(db: sqlite3.Connection, key: Key) -> None:
    """Notes in this transaction that a key is used, right to a minute; one of keys.json
    gets its row so."""
    row = key.id, key.account, key.name, key.hint, int(time.time())
    db.execute(USED_KEY, row)


HOLD = """
INSERT INTO requests(
    account, id, key, model, path, stream, slot, state, created, hold, asked)
VALUES (?, ?, ?, ?, ?, ?, ?, 0, ?, ?, ?)
"""
RESOLVED = """
UPDATE requests SET (state, cost, lost, input, cached, written, output, images,
    estimated, status, ttfb, duration, code, upstream, attempts)
    = (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    WHERE account = ? AND id = ? AND state = 0
"""
ACCOUNT_ROW = """
INSERT INTO accounts(id, made, created) VALUES (?, 0, ?) ON CONFLICT DO NOTHING
"""
DECLARED = "UPDATE accounts SET declared = ? WHERE id = ?"
# How many requests of a key run, and what its account has left of its grants.
ROOM = """
SELECT (SELECT count(*) FROM requests WHERE key = ? AND state = 0),
    coalesce(sum(granted - spent - held), 0), sum(declared) FROM accounts WHERE id = ?
"""
# What a key has spent and holds on the days from ?2 to before ?3.
USED = f"""
SELECT coalesce((SELECT spent FROM budgets
    WHERE key = ?1 AND until = ?3 AND since = ?2), {BILLED}), {HELD}
FROM (SELECT ?1 AS key, ?2 AS since, ?3 AS until) b
"""
# Of the windows that a day is in only that of the budget in force is kept.
OTHER_BUDGETS = """
DELETE FROM budgets WHERE key = ?1 AND until > ?4 AND since <= ?4
    AND (since, until) != (?2, ?3)
"""
# The budget ?5 as it is now, or what is spent and held where that is more; one that we
# have exceeded ourselves stays as it is, for `check` to find.
BUDGET = """
INSERT INTO budgets VALUES (?1, ?3, ?2, ?4, max(?5, ?6))
    ON CONFLICT DO UPDATE SET most = excluded.most WHERE ?6 <= most
"""
# What the account of a request has left, and each budget that it counts in.
ALL_LEFT = f"""
SELECT granted + declared - spent - held FROM accounts WHERE id = ?1
UNION ALL SELECT most - spent - {HELD}
FROM requests r JOIN budgets b ON b.key = r.key AND until > r.created / 86400000
    AND since <= r.created / 86400000 WHERE r.account = ?1 AND r.id = ?2
"""


class Ledger:
    """Credits, leases, keys and windows in one SQLite file, for all workers.

    A request's row is its lease and its hold, in the slot of its worker. Raises
    LedgerUnavailable for every trouble with the file: a command at once, a `worker` at
    every use until the trouble is gone.
    """

    def __init__(self, path: str | os.PathLike, worker: bool = False):
        self.slot = 0  # of this worker, once it is taken
        self.trouble: str | None = None  # of the last upkeep
        self._refusals: deque[tuple] = deque()  # from any thread
        self._refused: Counter[tuple] = Counter()  # the same, in the writer's
        self._unsettled: deque[tuple[Lease, Charge]] = deque()
        self.keep_days: int | None = None  # None: receipts are kept for ever
        self._expired, self._expiring = 0, iter(())  # the day of the last look; its steps
        self.file = LedgerFile(path)
        self.path, self.read = self.file.path, self.file.read
        self.snapshot = self.file.snapshot
        self._worker = worker
        if not worker:
            self.file.open()
        self._upkeep()  # before its thread runs: no request waits for a slot
        self._writer = Writer(self.file, self._upkeep)
        self.write = self._writer.do

    # Upkeep: in the writer's thread, each in a transaction of its own

    def _upkeep(self) -> None:
        """Opens the ledger, takes a slot, releases what dead workers held, writes what
        could not be written; what is in the way is `trouble`."""
        while self._refusals:
            self._refused[self._refusals.popleft()] += 1
        try:
            self.file.open()
            if self._worker:
                if not self.slot:
                    self._claim()
                self._run(self._tidy)
                self._refused.clear()
                while self._unsettled:
                    self._run(functools.partial(self._resolve, *self._unsettled[0]), True)
                    self._unsettled.popleft()
                self.file.checkpoint()
                self._forget()
            self.trouble = None
        except Exception as error:  # nothing may end this thread
            self.trouble = reason_of(error)

    def _run(self, operation: Operation, durable: bool = False) -> Any:
        return self.file.transact([operation], durable)[0]

    def _forget(self) -> None:
        """One step of deleting receipts that are too old, by one of all workers."""
        today = int(time.time()) // DAY
        if self.keep_days is not None and today != self._expired and self.speaks():
            self._expired, self._expiring = today, self._expire(today - self.keep_days)
        next(self._expiring, None)

    def _expire(self, first: int) -> Iterator[None]:
        """Deletes the receipts of the days before `first`: each day's usage is proved by
        them, and from then on stands for them. A step is one short transaction."""
        [(start,)] = self.read(f"SELECT max(coalesce(min(day), 0), ({KEPT})) FROM usage")
        mark = "INSERT INTO meta VALUES ('kept', ?1) ON CONFLICT DO UPDATE SET value = ?1"
        for day in range(start - 1, first):  # the last time may not have come to its end
            with self.snapshot() as db:
                days = {"first": day, "last": day + 1}
                wrong = day >= start and db.execute(USAGE_PROOF, days).fetchone()
                sql = "SELECT DISTINCT account FROM usage WHERE day = ?"
                accounts = db.execute(sql, (day,)).fetchall()
            if wrong:
                return  # `check` tells
            if day >= start:
                self._run(lambda db: db.execute(mark, (str(day + 1),)))
            yield
            for (account,) in accounts:
                old = (account, id_of_day(day + 1), day + 1)
                while self._run(lambda db: db.execute(EXPIRED, old).rowcount):
                    yield

    def expired(self, id: str) -> bool:
        """Whether a request with this id may have had a receipt that is deleted."""
        [(kept,)] = self.read(KEPT)
        return id < id_of_day(kept)

    def _claim(self) -> None:
        """Takes a free worker slot and clears what its former owner left, and windows of
        before a reboot: their monotonic time means nothing then."""
        slot = next(filter(self.file.take, range(1, MAX_WORKERS + 1)), None)
        if slot is None:
            raise LedgerUnavailable("no free worker slot")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        sql = "UPDATE meta SET value = ? WHERE name = 'boot' AND value != ?"

        def operation(db: sqlite3.Connection) -> None:
            self._clear(db, slot)
            if db.execute(sql, (boot, boot)).rowcount:
                db.execute("DELETE FROM windows")

        self._run(operation)
        self.slot = slot

    @staticmethod
    def _clear(db: sqlite3.Connection, slot: int) -> None:
        db.execute("UPDATE requests SET state = 2 WHERE state = 0 AND slot = ?", (slot,))

    def _tidy(self, db: sqlite3.Connection) -> None:
        """Releases the holds of workers that have died, and writes the refusals."""
        sql = "SELECT DISTINCT slot FROM requests WHERE state = 0"
        for (slot,) in db.execute(sql).fetchall():
            if slot != self.slot and self.file.take(slot):
                self._clear(db, slot)
                self.file.drop(slot)  # a new owner clears it again, after this commit
        db.executemany(
            "INSERT INTO usage(account, day, key, model, status, refused)"
            " VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET refused = refused + excluded.refused",
            [(*row, count) for row, count in self._refused.items()],
        )

    def count_refusal(self, account: str, key: str, model: str, status: int) -> None:
        """Has a request that got no row counted; written within a second."""
        self._refusals.append((account, int(time.time()) // DAY, key, model, status))

    def speaks(self) -> bool:
        """Whether it is this worker that tells what concerns all of them."""
        return self.file.take(SPEAKER)

    # Holds

    def admit(
        self, id: str, key: Key, account: Account, quote: Quote, model: str, path: str,
        stream: bool, count: Callable[[sqlite3.Connection], list[Window]] = lambda db: [],
        asked: str | None = None,
    ) -> Admission:  # fmt: skip
        """Commits a hold, or says why there is none: rate, requests at once, credits.

        `count` hits the key's windows, in the same transaction. An account that cannot
        pay for the whole output gets a hold for as many tokens as it can pay. `asked`:
        the name that was asked for, where the model's is "*".
        """
        if not self.slot:
            raise LedgerUnavailable(self.trouble or "no slot")
        most, now = account.limits.concurrent, int(time.time() * 1000)
        row = (account.id, id, key.id, model, path, stream, self.slot, now)
        budget, day = key.terms.budget, now // 1000 // DAY
        window = (key.id, *(budget.window(day) if budget else (0, 0)))

        def operation(db: sqlite3.Connection) -> Admission:
            windows, room = count(db), MAX_HOLD
            if windows and not windows[-1].fits:
                return Admission(windows, windows[-1].refusal())
            use_key(db, key)
            db.execute(OTHER_BUDGETS, (*window, day))
            if budget:
                spent, held = db.execute(USED, window).fetchone()
                room = budget.most - spent - held
                db.execute(BUDGET, (*window, spent, budget.most, spent + held))
            running, left, declared = db.execute(ROOM, (key.id, account.id)).fetchone()
            if running >= most:
                told = f"Too many requests at once: {most} per key."
                return Admission(windows, RateLimited(told, 1))
            left += account.credits
            tokens = quote.affordable(min(left, room))
            if tokens < 0:
                least = quote.hold(min(1, quote.tokens))
                told = (
                    f"The account has {max(0, left) / MICRO:.6f} credits left, and this"
                    f" needs {least / MICRO:.6f}."
                )
                if room < left:
                    told = budget.told(room, least, window[2])
                return Admission(windows, InsufficientCredits(told))
            hold = quote.hold(tokens)
            db.execute(HOLD, (*row, hold, asked))
            if declared != account.credits:
                db.execute(DECLARED, (account.credits, account.id))
            return Admission(windows, Lease(id, account.id, key.name, hold, tokens))

        return self.write(operation)

    def settle(self, lease: Lease, charge: Charge) -> int:
        """Ends a hold, once: turns it into its charge, which is durable when this
        returns, or gives it back, which needs no fsync: a lost release is made again
        by whoever clears this worker's slot. What of the cost could not be charged
        (micro-credits) is returned."""
        resolve = functools.partial(self._resolve, lease, charge)
        return self.write(resolve, durable=charge.usage is not None)

    def settle_later(self, lease: Lease, charge: Charge) -> None:
        """Keeps a hold's end that could not be written, for the writer to repeat."""
        self._unsettled.append((lease, charge))

    @staticmethod
    def _resolve(lease: Lease, charge: Charge, db: sqlite3.Connection) -> int:
        """The one place where a hold ends; one that has ended is left alone.

        A cost above the hold is charged as far as the account, and the key's budget in
        the window of its admission, can pay.
        """
        usage, cost = charge.usage or Usage(), min(charge.cost, charge.most)
        if cost > lease.hold:
            left = db.execute(ALL_LEFT, (lease.account, lease.id)).fetchall()
            cost = min(cost, lease.hold + max(0, min(left)[0]))
        # In the order of RESOLVED.
        row = (SETTLED if charge.usage else RELEASED, cost, charge.cost - cost)
        row += (usage.input, usage.cached, usage.written, usage.output, usage.images)
        row += (usage.estimated, charge.status, charge.ttfb, charge.duration)
        row += (charge.code, charge.upstream, charge.attempts)
        db.execute(RESOLVED, (*row, lease.account, lease.id))
        return charge.cost - cost

    # Accounts and keys

    def _key_rows(self, which: str, *values: Any) -> list[KeyRow]:
        return [KeyRow._make(row) for row in self.read(f"{KEY_ROWS} {which}", *values)]

    def find_key(self, id: str) -> KeyRow | None:
        """The row of a key; one of keys.json may have none."""
        for row in self._key_rows("WHERE k.id = ?", id):
            return row
        self.file.check_places()  # nobody is unknown because the file was replaced
        return None

    def key_rows(self, ids: list[str]) -> dict[str, KeyRow]:
        """The rows of those of these keys that have one."""
        which = "WHERE k.id IN (SELECT value FROM json_each(?))"
        return {row.id: row for row in self._key_rows(which, json.dumps(ids))}

    def made_keys(
        self, account: str, declared: list[str], after: str, limit: int
    ) -> list[KeyRow]:
        """An account's keys made at run time, without those `declared`, from behind the
        one with the id `after` on: in order of creation, those that live first."""
        place = f"SELECT {KEY_ORDER} FROM keys k WHERE k.id = ?3 AND account = ?1"
        which = (
            "WHERE account = ?1 AND hash IS NOT NULL"
            " AND k.id NOT IN (SELECT value FROM json_each(?2))"
            f" AND (?3 = '' OR ({KEY_ORDER}) > ({place})) ORDER BY {KEY_ORDER} LIMIT ?4"
        )
        return self._key_rows(which, account, json.dumps(declared), after, limit)

    def make_account(self, id: str) -> int | None:
        """Makes the account at run time; the micro-credits that its name has spent
        already, or None if there is one. A former account's keys are not its own."""
        sql = (
            "INSERT INTO accounts(id, made, created) VALUES (?1, ?2, ?2)"
            " ON CONFLICT DO UPDATE SET made = excluded.made WHERE made = 0"
            " RETURNING spent"
        )
        values = id, int(time.time())

        def operation(db: sqlite3.Connection) -> int | None:
            made = db.execute(sql, values).fetchall()
            if made:
                db.execute("UPDATE keys SET former = 1 WHERE account = ?", (id,))
            return made[0][0] if made else None

        return self.write(operation, durable=True)

    def make_key(
        self, account: str, name: str, admin: bool = False, terms: Terms = NO_TERMS,
        room: Callable[[sqlite3.Connection], bool] = lambda db: True,
    ) -> tuple[str, Key] | None:  # fmt: skip
        """(the new key's text, the key), or None where there is no `room` for it, which
        is asked in the same transaction; the text is kept nowhere."""
        text = "sk-" + secrets.token_urlsafe(32)
        hash, hint = sha256(text), key_hint(text)
        key = Key(key_id(hash), name, account, hash, hint, admin, "proxy.db", terms)
        now, given = int(time.time()), json.dumps(terms.written)
        row = (key.id, account, name, hint, hash, admin, now, given)
        sql = (
            "INSERT INTO keys(id, account, name, hint, hash, admin, created, terms)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, nullif(?, '{}'))"
        )

        def operation(db: sqlite3.Connection) -> bool:
            if not room(db):
                return False
            db.execute(ACCOUNT_ROW, (account, now))
            db.execute(sql, row)
            return True

        return (text, key) if self.write(operation, durable=True) else None

    def revoke(self, key: Key) -> None:
        """Revokes a key of either file, for ever."""
        sql = (
            "INSERT INTO keys(id, account, name, hint, admin, revoked)"
            " VALUES (?, ?, ?, ?, 0, ?)"
            " ON CONFLICT DO UPDATE SET revoked = coalesce(revoked, excluded.revoked)"
        )
        row = key.id, key.account, key.name, key.hint, int(time.time())
        self._change(sql, *row)

    def change_key(self, key: Key) -> bool:
        """Gives a key made at run time the name and the terms of this one; whether it
        was there and not revoked."""
        sql = (
            "UPDATE keys SET name = ?, terms = nullif(?, '{}')"
            " WHERE id = ? AND hash IS NOT NULL AND revoked IS NULL"
        )
        return self._change(sql, key.name, json.dumps(key.terms.written), key.id) > 0

    def _change(self, sql: str, *values: Any) -> int:
        """How many rows one statement has changed, on the disk."""
        return self.write(lambda db: db.execute(sql, values).rowcount, durable=True)

    def grant(self, account: Account, amount: int, note: str) -> bool:
        """Adds micro-credits to an account's own; a negative amount corrects, unless
        more is spent and held than it would leave. Whether it was done."""
        now = int(time.time())
        grant = "INSERT INTO grants(account, amount, note, created) VALUES (?, ?, ?, ?)"
        add = (
            "UPDATE accounts SET granted = granted + ?2,"
            " declared = iif(?2 < 0, ?3, declared) WHERE id = ?1"
            " AND (?2 > 0 OR granted + ?2 + ?3 >= spent + held)"
        )

        def operation(db: sqlite3.Connection) -> bool:
            db.execute(ACCOUNT_ROW, (account.id, now))
            done = db.execute(add, (account.id, amount, account.credits)).rowcount > 0
            if done:
                db.execute(grant, (account.id, amount, note, now))
            return done

        return self.write(operation, durable=True)

    def close_account(self, id: str) -> None:
        """Ends an account made at run time, and its keys with it; its history stays."""
        sql = "UPDATE keys SET revoked = ? WHERE account = ? AND hash IS NOT NULL"
        revoke, now = f"{sql} AND revoked IS NULL", int(time.time())

        def operation(db: sqlite3.Connection) -> None:  # both, or a new one had the keys
            db.execute("UPDATE accounts SET made = 0 WHERE id = ?", (id,))
            db.execute(revoke, (now, id))

        self.write(operation, durable=True)

    def made(self, id: str) -> bool | None:
        """Whether the account was made at run time; None if it has no row."""
        rows = self.read("SELECT made FROM accounts WHERE id = ?", id)
        return bool(rows[0][0]) if rows else None

    # Proof

    def check(self, proofs: Iterable[tuple[str, str]] = PROOFS.items()) -> list[str]:
        """What does not add up in one state of the ledger, in words."""
        with self.snapshot() as db:
            days = {"first": db.execute(KEPT).fetchone()[0], "last": FOREVER}
            found = ((told, db.execute(sql, days)) for sql, told in proofs)
            return [told.format(*row) for told, rows in found for row in rows]

    def close(self) -> None:
        """Gives the slot back; what is left open there is the next owner's to clear."""
        self._writer.close()
        self.file.close()


# Limits ------------------------------------------------------------------------------

MOMENT = struct.Struct(">Q")  # monotonic microseconds, in the order of their bytes
WINDOW = "SELECT hits FROM windows WHERE key = ?"
HIT = """
INSERT INTO windows VALUES (?1, ?2) ON CONFLICT DO UPDATE
    SET hits = substr(CAST(hits || excluded.hits AS BLOB), -?3)
    WHERE length(hits) < ?3 OR substr(hits, -?3, length(?2)) <= ?4 RETURNING hits
"""
ACCOUNT_ITEMS = tuple(parse_many("300/minute"))  # of all routes that relay nothing


class LedgerStorage(Storage, MovingWindowSupport):
    """Flask-Limiter's moving windows in the ledger: exact over all workers.

    A window is one row: the moments of its last `limit` hits, oldest first, each as
    eight bytes of monotonic microseconds, most significant first, so that SQL compares
    them. Whether one more fits is decided and written by one statement. `rows` runs
    one, and returns what it finds. `seen` is what the last look or hit saw of its
    window: the hits left, and when (monotonic seconds) the oldest leaves.
    """

    STORAGE_SCHEME = ["sqlite"]
    base_exceptions = (LedgerUnavailable,)

    def __init__(self, uri: str = "", *, rows: Callable[..., list[tuple]]):
        super().__init__(uri)
        self._rows = rows
        self.seen = (0, 0.0)

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Adds a hit unless `limit` of them are younger than `expiry` seconds."""
        now = int(time.monotonic() * 10**6)
        since = MOMENT.pack(max(0, now - expiry * 10**6))
        rows = self._rows(HIT, key, MOMENT.pack(now), MOMENT.size * limit, since)
        self._look(rows or self._rows(WINDOW, key), limit, expiry)
        return bool(rows)

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """(monotonic start, hits) of the window."""
        return self._look(self._rows(WINDOW, key), limit, expiry)

    def _look(self, rows: list[tuple], limit: int, expiry: int) -> tuple[float, int]:
        now, hits = int(time.monotonic() * 10**6), rows[0][0] if rows else b""
        places = range(0, len(hits), MOMENT.size)
        since = MOMENT.pack(max(0, now - expiry * 10**6))
        old = bisect_right(places, since, key=lambda at: hits[at : at + MOMENT.size])
        start = MOMENT.unpack_from(hits, places[old])[0] if old < len(places) else now
        self.seen = max(0, limit - len(places) + old), start / 10**6 + expiry
        return start / 10**6, len(places) - old

    def incr(self, *unused: Any) -> NoReturn:
        raise NotImplementedError("only moving windows are exact")

    get = get_expiry = check = reset = clear = incr


def hit_windows(
    items: Sequence[RateLimitItem], key: str, scope: str, db: sqlite3.Connection
) -> list[Window]:
    """Counts one request in each window of a key, in this transaction; if one is full,
    in none, and that is the last one returned. `scope`: "relay" or "account".

    The first is asked by its hit, before which the others are.
    """
    storage = LedgerStorage(rows=lambda sql, *row: db.execute(sql, row).fetchall())
    strategy, seen = MovingWindowRateLimiter(storage), []
    asked = [(strategy.test, item) for item in items[1:]]
    for ask, item in asked + [(strategy.hit, item) for item in items]:
        fits = ask(item, key, scope)
        seen.append(Window(item, fits, *storage.seen))
        if not fits:
            return seen
    return seen[len(asked) :]


def tightest(windows: list[Window]) -> Window:
    """Of a key's windows the one that will refuse first."""
    return min(windows, key=operator.attrgetter("left"))


# Wire --------------------------------------------------------------------------------

STREAM_TYPE = "text/event-stream"
MAX_BODY = 32 << 20  # bytes of a request, unpacked: a few inlined pictures
MAX_VALUES = 2_000_000  # of a body's JSON
PIECE = 64 << 10  # bytes of one read of a body
UNPACKED = 16 << 10  # bytes of a piece of it that was packed: larger ones stay in the heap
# Seconds of CPU that the reading of a chunked body may take, and for each byte: small
# chunks cost 2 us each, 19 s for 60 MB of the smallest.
CHUNKED_CPU, CHUNKED_CPU_BYTE = 0.1, 50e-9
MAX_EVENT = 16 << 20  # bytes of one event of a stream: pictures come in deltas
LINE_END = re.compile(rb"\r\n|\n|\r")
# Possessive, so that a CRLF is one line's end: 2 µs an event, not 7.
EVENT_END = re.compile(rb"(?:\r\n?+|\n)(?:\r\n?+|\n)")
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
PLAIN_JSON = json.JSONDecoder()
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


# Bytes of memory, measured, that each of these takes of a parsed body at the most.
MEMORY = {b",": 40, b"[": 64, b"{": 96, b":": 230, b'"': 16}
BODY_ROOM = 416 << 20  # bytes of all bodies in a worker, as their parsing takes
SMALL_SHARES = 32 << 20  # of it, kept for bodies that take less than SMALL_SHARE
SMALL_SHARE = 1 << 20
PARSING = 352 << 20  # of it, kept for bodies that have arrived: two large ones arrive
MOST_ARRIVING = (BODY_ROOM - PARSING) // 2  # of one account
ROOM_PATIENCE = 2.0  # seconds that a body waits for room


class Room:
    """The memory of a worker that bodies may take at once, in bytes; `arriving`: what of
    it each account's large bodies take that are still to come."""

    def __init__(self, size: int):
        self.free, self.changed = size, threading.Condition()
        self.arriving: Counter[str] = Counter()


class Share:
    """What one request takes of the room: the bytes that it has received, then what
    their parsing takes."""

    def __init__(self, room: Room, account: str = ""):
        self._room, self._account, self.size, self._arriving = room, account, 0, 0

    def hold(self, size: int, spare: int = 0) -> None:
        """Makes it `size` bytes, nothing of them twice; Overloaded if the room had no
        such share for ROOM_PATIENCE. One that is not small leaves `spare` bytes; what
        leaves PARSING is still arriving: of such one account has MOST_ARRIVING."""
        room, spare = self._room, spare if size > SMALL_SHARE else 0
        arriving = size if spare == PARSING else 0
        more, coming = size - self.size, arriving - self._arriving

        def fits() -> bool:
            theirs = room.arriving[self._account] + coming
            return room.free - more >= spare and (coming <= 0 or theirs <= MOST_ARRIVING)

        with room.changed:
            if more > 0 and not room.changed.wait_for(fits, ROOM_PATIENCE):
                raise Overloaded("The server has no room for this body.", wait=2)
            self._set(size, arriving)

    def keep(self, size: int) -> None:
        """Makes it `size` bytes at once: what is here already only others wait for."""
        with self._room.changed:
            self._set(size, 0)

    def _set(self, size: int, arriving: int) -> None:
        if size < self.size or arriving < self._arriving:
            self._room.changed.notify_all()
        self._room.free, self.size = self._room.free + self.size - size, size
        self._room.arriving[self._account] += arriving - self._arriving
        self._arriving = arriving


def parsing_memory(data: bytearray) -> int:
    """Bytes that a JSON body takes at the most while it is parsed and written; raises
    BadRequest or TooLarge for what takes too much. Signs inside of texts count, too."""
    counts = {sign: data.count(sign) for sign in MEMORY}
    if counts[b","] + counts[b"["] + counts[b"{"] > MAX_VALUES:
        raise BadRequest(f"The body has more than {MAX_VALUES} JSON values.")
    # One character beyond Latin makes four bytes of each.
    size = len(data) * (3 if data.isascii() else 6)
    size += sum([number * MEMORY[sign] for sign, number in counts.items()])
    if size > BODY_ROOM - SMALL_SHARES:
        raise TooLarge("The body has too many JSON values for its size.")
    return size


def received(
    environ: dict[str, Any], limit: int, arrived: Callable[[float], None]
) -> Iterator[bytes]:
    """A body as it arrives, bounded, as long as announced, in no too small chunks.
    `arrived` is told which part of it, as far as that is known, each piece is."""
    announced = environ.get("CONTENT_LENGTH") or None
    if announced and (not announced.isdigit() or int(announced) > limit):
        raise TooLarge(f"The body may have at most {limit} bytes.")
    left, spent, size = int(announced or limit + 1), 0.0, 0
    while left:
        spent -= time.thread_time()
        try:
            piece = environ["wsgi.input"].read(min(PIECE, left))
        except Exception:
            # The server's parser names its errors itself (PEP 3333 names none).
            raise BadRequest("The body could not be read.") from None
        spent += time.thread_time()
        if not piece:
            break
        left, size = left - len(piece), size + len(piece)
        arrived(len(piece) / (int(announced) if announced else size))
        if not announced and spent > CHUNKED_CPU + size * CHUNKED_CPU_BYTE:
            raise BadRequest("The body comes in too many small chunks.")
        yield piece
    if announced and left:
        raise BadRequest("The body is shorter than its Content-Length.")


def unpacked(pieces: Iterable[bytes], coding: str) -> Iterator[bytes]:
    """A body without its Content-Encoding."""
    if coding in ("", "identity"):
        yield from pieces
        return
    if coding not in ("gzip", "deflate"):
        told = f"The content encoding {coding!r} is not taken: gzip and deflate are."
        raise UnsupportedMediaType(told)
    inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, as its head says
    try:
        for piece in pieces:
            while piece:
                yield inflate.decompress(piece, UNPACKED)
                piece = inflate.unconsumed_tail
            if inflate.unused_data:
                break
        yield inflate.flush()
    except zlib.error:
        raise BadRequest(f"The body is no valid {coding}.") from None
    if not inflate.eof or inflate.unused_data:
        raise BadRequest(f"The body is no whole {coding}, or more than one.")


def media_type(environ: dict[str, Any]) -> str:
    return environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()


FORM = "multipart/form-data"


def read_body(
    environ: dict[str, Any], limit: int, share: Share, arrived: Callable[[float], None],
    kinds: tuple[str, ...] = ("application/json",),
) -> bytearray:  # fmt: skip
    """The whole body of a request, unpacked; `share` then holds what parsing takes.
    `arrived` is told of each piece, as `received` has it."""
    kind = media_type(environ)
    if kind not in kinds:
        told = " or ".join([f"'Content-Type: {each}'" for each in kinds])
        raise UnsupportedMediaType(f"Send {told}.")
    coding = environ.get("HTTP_CONTENT_ENCODING", "").strip().lower()
    data = bytearray()
    for piece in unpacked(received(environ, limit, arrived), coding):
        size = len(data) + len(piece)
        if size > limit:
            raise TooLarge(f"The body may have at most {limit} bytes.")
        if size > SMALL_SHARE:  # a few come whole, or many would wait for their rest
            size = max(size, int(environ.get("CONTENT_LENGTH") or 0))
        share.hold(size, PARSING)
        data += piece
    # A form is held as it came, as its parts, and as it is sent on.
    size = parsing_memory(data) if kind != FORM else 3 * len(data)
    share.hold(size, SMALL_SHARES)
    return data


MAX_PARTS, MAX_FIELD = 100, 1 << 20  # of a form; bytes of each that is no file
PART_NAME = re.compile(r"[\w.\[\]-]{1,100}", re.ASCII)  # that all read alike


class FilePart(NamedTuple):
    """A file of a form."""

    name: str
    filename: str
    kind: str
    data: bytes


def parse_form(
    data: bytes, content_type: str
) -> tuple[dict[str, Any], tuple[FilePart, ...]]:
    """The fields and the files of a form (RFC 7578), or BadRequest; a field that stands
    more than once is a list of texts."""
    _, options = parse_options_header(content_type)
    parser = MultiPartParser(
        stream_factory=lambda *_, **__: io.BytesIO(),  # nothing on the disk
        max_form_memory_size=MAX_FIELD, max_form_parts=MAX_PARTS,
    )  # fmt: skip
    try:
        boundary = options.get("boundary", "").encode("ascii")
        if not boundary:
            raise ValueError("no boundary")
        fields, files = parser.parse(io.BytesIO(data), boundary, len(data))
        names = [*fields, *files]
        if len({*names}) < len(names) or not all(map(PART_NAME.fullmatch, names)):
            raise ValueError("a part without a plain name, or two under one")
    except (ValueError, TypeError, HTTPException):
        raise BadRequest("The body is no valid multipart/form-data.") from None
    body = {
        name: texts[0] if len(texts) == 1 else texts
        for name, texts in fields.to_dict(flat=False).items()
    }
    parts = [
        FilePart(name, file.filename or "", file.mimetype, file.stream.getvalue())
        for name, file in files.items(multi=True)
    ]
    return body, tuple(parts)


SIGNS = re.compile(r'[\x00-\x1f\x7f"\\]')  # that no quoted name may hold


def to_form(body: dict[str, Any], files: tuple[FilePart, ...]) -> tuple[str, bytes]:
    """(content type, bytes) of a form with these fields and files (RFC 7578)."""
    boundary, pieces = secrets.token_hex(16), []

    def add(name: str, more: str, data: bytes) -> None:
        # As browsers escape it (WHATWG HTML, multipart form data), and more.
        quoted = SIGNS.sub(lambda sign: f"%{ord(sign[0]):02X}", name)
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{quoted}"{more}'
        pieces.extend([head.encode("utf-8", "replace"), b"\r\n\r\n", data, b"\r\n"])

    for name, value in body.items():
        for each in value if isinstance(value, list) else [value]:
            text = each if isinstance(each, str) else json.dumps(each)
            add(name, "", text.encode("utf-8", "replace"))
    for name, filename, kind, data in files:
        filename = SIGNS.sub("_", filename)
        if not re.fullmatch(r"[\w.+-]+/[\w.+-]+", kind):
            kind = "application/octet-stream"
        add(name, f'; filename="{filename}"\r\nContent-Type: {kind}', data)
    pieces.append(f"--{boundary}--\r\n".encode())
    return f"{FORM}; boundary={boundary}", b"".join(pieces)


# Of the client's headers, those that pass to an upstream, on Anthropic's paths.
ANTHROPIC_HEADERS = {
    "anthropic-version": "HTTP_ANTHROPIC_VERSION",
    "anthropic-beta": "HTTP_ANTHROPIC_BETA",
}


def passed_headers(path: str, environ: dict[str, Any]) -> dict[str, str]:
    """The client's headers that an upstream is sent."""
    passed = {}
    for name, place in ANTHROPIC_HEADERS.items() if is_messages(path) else ():
        if value := environ.get(place):
            if not re.fullmatch("[ -~]{1,1000}", value):
                raise BadRequest(f"The header '{name}' is malformed.", param=name)
            passed[name] = value
    return passed


def objects(value: Any) -> list[dict[str, Any]]:
    """The JSON objects of a list; none of anything else."""
    return [each for each in value if type(each) is dict] if type(value) is list else []


def message_text(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    texts = [part.get("text") for part in objects(content)]
    return "\n".join(text for text in texts if isinstance(text, str))


def last_user_message(body: dict[str, Any]) -> dict[str, Any]:
    """The last message of the user; an empty one if there is none."""
    users = [each for each in body.get("messages", []) if each.get("role") == "user"]
    return users[-1] if users else {}


def sse(document: Any) -> bytes:
    return b"data: " + to_json(document) + b"\n\n"


def event_data(event: bytes) -> bytes:
    """The joined `data` of one event (WHATWG HTML §9.2.6); empty for comments."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2:
        if b"\r" not in event:
            return event[6:-2]  # one line of it, as nearly always: 0.5 µs, not 1.9
    lines = [line for line in LINE_END.split(event) if line.startswith(b"data:")]
    return b"\n".join([line[5:].removeprefix(b" ") for line in lines])


def json_object(data: bytes) -> dict[str, Any]:
    """The JSON object that an upstream sent, or an empty one for anything else."""
    try:
        text = data.decode().strip()
        document, end = PLAIN_JSON.raw_decode(text)
    except (ValueError, RecursionError):
        return {}
    return document if type(document) is dict and end == len(text) else {}


def whole_events(data: bytes) -> tuple[list[bytes], bytes]:
    """The events of a stream, each with its blank line, and what is left."""
    if b"\r" not in data:  # 0.2 µs an event, not 1.3
        *events, rest = data.split(b"\n\n")
        return [event + b"\n\n" for event in events], rest
    events, start = [], 0
    for match in EVENT_END.finditer(data):
        events.append(data[start : match.end()])
        start = match.end()
    return events, data[start:]


class EventReader:
    """Cuts a stream of bytes into events, each with its blank line, whatever its
    pieces; a comment's line waits for nothing and comes alone."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []  # of the event that is not complete yet
        self.size, self._tail = 0, b""

    def feed(self, data: bytes) -> list[bytes]:
        """What is complete now; raises UpstreamFailed for over MAX_EVENT bytes."""
        if self._pieces:
            # Joining is put off until an event may end here: it would cost the square
            # of an event that comes in many pieces.
            end = LINE_END if self._pieces[0].startswith(b":") else EVENT_END
            if not end.search(self._tail + data):
                return self._keep(data)
            data = b"".join([*self._pieces, data])
            self._pieces, self.size, self._tail = [], 0, b""
        events, rest = whole_events(data)
        while rest.startswith(b":") and (line := LINE_END.search(rest)):
            events.append(rest[: line.end()])
            rest = rest[line.end() :]
        if rest:
            self._keep(rest)
        return events

    def _keep(self, data: bytes) -> list[bytes]:
        self._pieces.append(data)
        self._tail = (self._tail + data)[-3:]
        self.size += len(data)
        if self.size > MAX_EVENT:
            raise UpstreamFailed(f"an event over {MAX_EVENT} bytes")
        return []

    def flush(self) -> list[bytes]:
        """The last event where only its blank line is missing, else nothing."""
        rest = b"".join(self._pieces).rstrip(b"\r\n")
        self._pieces = []
        whole = event_data(rest + b"\n\n")
        return [rest + b"\n\n"] if whole == b"[DONE]" or json_object(whole) else []


# Calls and prices --------------------------------------------------------------------

SPEECH, TRANSCRIPTS = "audio/speech", {"audio/transcriptions", "audio/translations"}
PICTURES = {"images/generations", "images/edits", "images/variations"}
FORMS = TRANSCRIPTS | PICTURES - {"images/generations"}  # JSON is taken as well
FREE = {"messages/count_tokens", "responses/input_tokens"}  # they only count
COMPACT = "responses/compact"  # Codex's; it knows neither a cap nor a model's defaults
NO_OUTPUT = {"embeddings", "moderations", "rerank"} | FREE
# The relayed paths that are listed; others below /v1 may be relayed as well.
ENDPOINTS = set(
    "chat/completions completions embeddings responses messages messages/count_tokens"
    " moderations rerank".split()
) | {SPEECH, COMPACT} | TRANSCRIPTS | PICTURES
# Parts of a prompt that are no text: the tokens that one is estimated at, and the most
# that it is held for (OpenAI's and Anthropic's pictures have at most 4,784 tokens, a
# minute of audio 600 to 1,920, a page of a PDF 1,500 to 3,000).
PICTURE, AUDIO, FILE = (1_100, 5_000), (2_000, 60_000), (6_000, 300_000)
MEDIA = {
    "image_url": PICTURE, "input_image": PICTURE, "image": PICTURE,
    "input_audio": AUDIO, "audio_url": AUDIO, "video_url": FILE, "input_video": FILE,
    "file": FILE, "input_file": FILE, "document": FILE, "document_url": FILE,
    "video": FILE,
}  # fmt: skip
BYTES_OF_SOUND = 100  # that a token of it has at the least: at 16 kbit/s
# The members that hold a medium itself, or tell where it is.
CARRIERS = "url image_url audio_url video_url document_url file_url data file_data".split()


@dataclass(frozen=True, slots=True)
class Call:
    """One request as the client made it.

    `size`: the most tokens that the prompt can have; `bounded`: that the body shows all
    of it. `answers`: how many choices come back; `choices`: how many are generated at
    the most, each with at most `cap` tokens (0: not named).
    """

    path: str
    body: dict[str, Any]
    model: str
    stream: bool
    wants_usage: bool
    size: int
    bounded: bool
    answers: int
    choices: int
    cap: int
    weight: int | None = None  # of the prompt, where the body was dropped
    headers: dict[str, str] = field(default_factory=dict)  # that pass to the upstream
    files: tuple[FilePart, ...] | None = None  # of a form, whose fields are the body
    characters: int = 0  # to be spoken


def file_tokens(path: str, file: FilePart) -> tuple[int, int]:
    """The tokens of a form's file: estimated, and at the most; what it is the path
    tells, not its sender."""
    if path in PICTURES:
        return PICTURE
    return AUDIO[0], max(AUDIO[1], len(file.data) // BYTES_OF_SOUND)


def medium(part: dict[str, Any]) -> tuple[int, int] | None:
    """Of a part that is no text: its row of MEDIA, by its type or, as vLLM has it, by
    its member."""
    kind, source = part.get("type"), part.get("source")
    if kind == "document" and isinstance(source, dict) and source.get("type") == "text":
        return None  # as Anthropic's may be
    if kind is None:
        kind = next(iter(MEDIA.keys() & part.keys()), None)
    return MEDIA.get(kind) if type(kind) is str else None


def media_parts(prompt: Any) -> Iterator[dict[str, Any]]:
    """The parts that are no text, of messages and of what tools returned."""
    for each in objects(prompt):
        if medium(each):
            yield each
        else:
            yield from media_parts(each.get("content") or each.get("output"))


def inline_bytes(part: dict[str, Any]) -> int:
    """Bytes of a medium that its part holds itself; 0 for one that is elsewhere."""
    size = 0
    for name, value in part.items():
        if type(value) is dict:
            size += inline_bytes(value)
        elif name in CARRIERS and type(value) is str:
            if value[:4] == "http":
                return 0
            size += len(value)
    return size


# What brings tokens into a prompt that the body does not show; tools that the provider
# runs itself do so, too.
UNSEEN = (
    "previous_response_id conversation container web_search_options search_parameters"
    " plugins mcp_servers"
).split()
OWN_TOOLS = (None, "function", "custom")  # that the client runs
PROMPTS = "messages input documents image images".split()  # lists that may hold media


def prompt_size(body: dict[str, Any], size: int) -> tuple[int, bool]:
    """(the most tokens of the prompt, whether the body shows all of it) of a body of
    `size` UTF-8 bytes: a token has at least one, but for media."""
    kinds = [tool.get("type") for tool in objects(body.get("tools"))]
    theirs = [kind for kind in kinds if kind not in OWN_TOOLS]
    items = [item.get("type") for item in objects(body.get("input"))]
    theirs += [kind for kind in items if kind == "item_reference"]
    bounded = not (theirs or any([body.get(name) for name in UNSEEN]))
    try:
        for part in itertools.chain(*[media_parts(body.get(name)) for name in PROMPTS]):
            inline, kind = inline_bytes(part), medium(part)
            size += min(inline, kind[1]) - inline if inline else kind[1]
            # What a file unpacks to its bytes do not tell.
            bounded = bounded and (kind is PICTURE or (kind is AUDIO and inline > 0))
    except RecursionError:
        raise BadRequest("The body is no valid JSON: nested too deeply.") from None
    return size, bounded and not isinstance(body.get("prompt"), dict)  # a stored one


CAP_OF_PATH = {"responses": "max_output_tokens"}
CAP_OF_PATH |= dict.fromkeys(("completions", "messages"), "max_tokens")


def usual_cap(path: str) -> str | None:
    """The name of the output cap on this path; None where none is known to be heeded."""
    return CAP_OF_PATH.get(path.rpartition("/")[2])


MAX_CHOICES = 128  # OpenAI's own bound on `n`
MAX_PRICED = 20  # values of one field that moves the price
PATH = re.compile(r"[a-z0-9_]+(?:[-/][a-z0-9_]+)*")
EXPONENT = re.compile(rb"\d[eE]")


def natural(body: dict[str, Any], name: str, highest: int) -> int | None:
    """A member that may be missing, null or a whole number from 1 to `highest`."""
    value = body.get(name)
    if value is not None and (type(value) is not int or not 1 <= value <= highest):
        raise BadRequest(
            f"'{name}' must be a whole number from 1 to {highest}.", param=name
        )
    return value


# Paths whose answers cannot be metered, hand out the operator's credentials, reach what
# other accounts have stored at the provider, or name a model of their own; and those with
# nothing below them but what is listed.
UNMETERED = set(
    "realtime client organization organizations projects files uploads batches batch"
    " fine_tuning vector_stores assistants threads containers conversations evals skills"
    " agents audio videos video engines deployments openai workflows".split()
)
SOLE = {"responses", "messages", "chat"}
GUARDED = CAPS | ALL_PRICED.keys() | set(
    "model messages prompt input n best_of stream stream_options tools".split()
)  # fmt: skip


def form_values(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a form, the numbers and truths among them as JSON has them."""
    known = {"true": True, "false": False}
    numbers = {
        name: int(text) for name in CAPS | {"n", "best_of"}
        if re.fullmatch("[0-9]{1,12}", str(text := fields.get(name)))
    }  # fmt: skip
    stream = fields.get("stream")
    truths = {"stream": known[stream]} if stream in ("true", "false") else {}
    return fields | numbers | truths


def check_path(path: str) -> None:
    """Raises NotFound for what is not relayed."""
    first, *rest = path.split("/")
    if not PATH.fullmatch(path) or first in UNMETERED or (rest and first in SOLE):
        if path not in ENDPOINTS | FREE:
            raise NotFound("There is no such path.")


def parse_call(
    path: str, data: bytes, headers: dict[str, str] | None = None, form: str = ""
) -> Call:
    """A request's body, checked as far as money and routing depend on it; `form`: the
    content type of one that is a form."""
    body, files = parse_form(data, form) if form else (parse_json(data), None)
    body = form_values(body) if form else body
    # To some servers names in another case (Go's), or of a form with brackets (PHP's),
    # are the same; and no file is one of these.
    odd = [*(body.keys() - GUARDED), *(file.name for file in files or ())]
    for plain in GUARDED & {name.partition("[")[0].casefold() for name in odd}:
        raise BadRequest(f"The field must be written '{plain}'.", param=plain)
    model, stream = body.get("model"), body.get("stream")
    fits = isinstance(model, str) and 1 <= len(model) <= 200
    if not (fits and model.isprintable()):
        raise BadRequest("'model' must be the name of a model.", param="model")
    if stream is not None and type(stream) is not bool:
        raise BadRequest("'stream' must be true or false.", param="stream")
    cap = 0
    for name in CAPS & body.keys():
        if body[name] == -1:  # no cap, to local servers and the clients made for them
            del body[name]
        cap = max(cap, natural(body, name, 2**31 - 1) or 0)
    number = natural(body, "n", MAX_CHOICES) or 1
    best = natural(body, "best_of", MAX_CHOICES) or 1
    if stream and "images/" in path:
        raise BadRequest("Images are not streamed here.", param="stream")
    if path == "chat/completions":
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadRequest("'messages' must be a list of messages.", param="messages")
        if objects(messages) != messages:
            raise BadRequest("Each of 'messages' must be an object.", param="messages")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise BadRequest("'stream_options' must be an object.", param="stream_options")
    wants_usage = (options or {}).get("include_usage") or False
    if type(wants_usage) is not bool:
        raise BadRequest("'include_usage' must be true or false.", param="stream_options")
    if not form and (b"\\ud" in data or b"\\uD" in data):
        to_json(body)  # BadRequest for half of a surrogate pair
    # A float may be longer as we write it: 1e15 is 1000000000000000.0.
    size = len(to_json(body)) if form or EXPONENT.search(data) else 0
    prompts, prompt = 1, body.get("prompt")
    if prompt and isinstance(prompt, list) and path.endswith("completions"):
        if path != "chat/completions" and not isinstance(prompt[0], int):
            prompts = len(prompt)  # a list of token numbers is one, others are a batch
    size, bounded = prompt_size(body, size if form else max(size, len(data)))
    bounded = bounded and (path in ENDPOINTS | FREE or usual_cap(path) is not None)
    size += sum([file_tokens(path, file)[1] for file in files or ()])
    spoken = body.get("input") if path == SPEECH else ""
    if path == SPEECH and not (isinstance(spoken, str) and spoken):
        raise BadRequest("'input' must be the text to be spoken.", param="input")
    return Call(
        path, body, model, bool(stream), wants_usage, size, bounded,
        prompts * number, prompts * max(number, best), cap, None, headers or {}, files,
        len(spoken),
    )  # fmt: skip


DEAR_BETAS = ("context-1m",)  # what a prompt has above 200,000 tokens costs twice


def dear_betas(headers: dict[str, str]) -> dict[str, list[str]]:
    """Those of the client's Anthropic betas that move the price, as a field."""
    betas = [beta.strip() for beta in headers.get("anthropic-beta", "").split(",")]
    dear = [beta for beta in betas if beta.startswith(DEAR_BETAS)]
    return {"anthropic-beta": dear} if dear else {}


def refuse_unpriced(body: dict[str, Any], model: Model) -> None:
    """Raises BadRequest for what would move the price unless its operator allows it.

    A default of the model's is what its price is for: nothing else is plain then.
    """
    for name, values in (ALL_PRICED if model.price.image else PRICED).items():
        if name not in body or name in model.allow:
            continue
        plain = [model.defaults[name]] if name in model.defaults else [None, *values]
        value = body[name]
        if isinstance(value, list) and len(value) > MAX_PRICED:
            raise BadRequest(f"'{name}' has too many values.", param=name)
        for each in value if isinstance(value, list) and value not in plain else [value]:
            text = each if isinstance(each, str) else json.dumps(each)
            if each not in plain and f"{name}:{text}" not in model.allow:
                shown = text if len(text) <= 40 else "this"
                raise BadRequest(f"'{name}' may not be {shown} here.", param=name)


TOLD_FORMATS = (None, "json", "diarized_json")  # of transcripts that tell their tokens


def refuse_priceless(call: Call, model: Model) -> None:
    """Raises BadRequest where a price has nothing that this call's answer tells of."""
    price = model.price
    if price == Price() or price.request or call.path in FREE:
        return
    tokens, asked = price.input or price.output, call.body.get("response_format")
    if call.path == SPEECH:
        priced = price.characters or (tokens and call.body.get("stream_format") == "sse")
    elif call.path in TRANSCRIPTS:
        priced = tokens and asked in TOLD_FORMATS
    elif call.path in PICTURES and model.wild:  # few of "all models" tell tokens of one
        priced = price.image or price.reported
    elif model.wild and call.path not in ENDPOINTS:  # some of them make films
        priced = False
    else:
        priced = tokens or price.image
    if not priced:
        raise BadRequest(
            "This model has no price for this: its operator can name one by the request"
            + (" or by characters." if call.path == SPEECH else ".")
        )


def quote(call: Call, model: Model) -> Quote:
    """The worst case: all of the prompt is of the dearest class."""
    if call.path in FREE:
        return Quote(0, 0, 0)
    price = model.price
    # Anthropic's hour in a cache costs 1.6 times its five minutes.
    written = price.written * (8 if is_messages(call.path) else 5) // 5
    fixed = call.size * max(price.input, price.cached, written) + price.request
    fixed += price.image * (call.body.get("n") or 1) + price.characters * call.characters
    tokens = call.cap or model.max_output
    if call.path in NO_OUTPUT:
        tokens = 0
    elif usual_cap(call.path) is None:
        tokens = max(tokens, model.max_output)  # a cap of the client's may bound nothing
    return Quote(fixed, price.output, tokens, call.choices)


def cost(usage: Usage, price: Price) -> int:
    """Micro-credits, rounded up once."""
    if price.reported and usage.reported is not None and not usage.estimated:
        return -(-usage.reported * price.reported // (PICO * MICRO))
    plain = usage.input - usage.cached - usage.written
    pico = plain * price.input + usage.cached * price.cached
    pico += usage.written * price.written + usage.output * price.output
    pico += usage.images * price.image + usage.characters * price.characters
    # Anthropic: what is kept for an hour costs 2, for five minutes 1.25 times the input.
    pico += usage.hour * price.written * 3 // 5
    return -(-(pico + price.request) // PICO)


BYTES_PER_TOKEN = 4  # of an estimate: English needs 3-4 bytes, Chinese 4-5
# Of an answer, what names, counts and ends it: no text of the model's.
SILENT = {"role", "type", "id", "object", "index", "finish_reason", "stop_reason"}
SILENT |= {"model", "status", "logprobs", "signature", "call_id", "item_id", "annotations"}


DIGITS = re.compile("[0-9]+")
MAX_WORD = 64  # characters of what only names or ends something


def weigh(part: Any, prompt: bool = False) -> int:
    """What a part of an answer or a `prompt` weighs in an estimate: BYTES_PER_TOKEN each
    digit, number of a token and token of a medium; any other text its UTF-8 bytes. In a
    prompt everything is read that is no mere word, names too."""
    if type(part) is str:
        size = len(part) if part.isascii() else len(part.encode("utf-8", "replace"))
        digits = sum(map(len, DIGITS.findall(part)))
        return size + (BYTES_PER_TOKEN - 1) * digits
    size = 0
    if type(part) is list:
        for each in part:
            size += BYTES_PER_TOKEN if type(each) is int else weigh(each, prompt)
    elif type(part) is dict:
        if kind := medium(part):
            return BYTES_PER_TOKEN * kind[0]
        for name, value in part.items():
            long = prompt and type(value) is str and len(value) > MAX_WORD
            if value and (long or name not in SILENT):
                size += weigh(value, prompt)
            size += len(name) if prompt and len(name) > MAX_WORD else 0
    return size


# Of a body, what the model reads as JSON.
SCHEMAS = set("tools functions response_format text".split())


def prompt_weight(call: Call) -> int:
    """What the prompt weighs in an estimate."""
    if call.weight is not None:
        return call.weight
    try:
        texts = [call.body[name] for name in call.body.keys() - SCHEMAS - {"model"}]
        weight = weigh([text for text in texts if type(text) is not int], True)
        schemas = [call.body[name] for name in SCHEMAS if call.body.get(name)]
        tokens = [file_tokens(call.path, file)[0] for file in call.files or ()]
        weight += BYTES_PER_TOKEN * sum(tokens)
        return weight + sum([len(to_json(schema)) for schema in schemas])
    except (RecursionError, BadRequest):  # nested too deeply
        return BYTES_PER_TOKEN * call.size


def without_body(call: Call) -> Call:
    """What is left to know of a request when its answer has begun."""
    return replace(call, body={}, files=None, weight=prompt_weight(call))


def estimate(call: Call, relayed: int, price: Price, images: int = 0) -> Usage:
    """The usage of an answer that was not reported; `relayed` is what it weighs.

    `images` is what a price by the image asks for.
    """
    input = -(-prompt_weight(call) // BYTES_PER_TOKEN)
    output = -(-relayed // BYTES_PER_TOKEN)
    spoken = call.characters if price.characters else 0
    if spoken:  # which is all that is charged
        input = output = 0
    images = images if price.image else 0
    return Usage(input, 0, output, images, estimated=not spoken)


def settled_usage(
    ending: Ending, finished: bool, sent: bool, reported: Usage | None, relayed: int,
    call: Call, price: Price,
) -> Usage | None:  # fmt: skip
    """What a request is charged for; None: it is free.

        refused, or a free path      nothing
        done                         the report, else an estimate
        once finished                the report, else an estimate of what was relayed,
                                     if anything was
        cut, timed out, drained      if anything was relayed: an estimate of it, or the
        before                       report where that tells more
        left before                  the same, also of nothing relayed, an image too:
                                     if the upstream had the whole request

    `finished`: each choice had its finish. `relayed`: what the answer passed on weighs.
    """
    whole = finished or ending in (Ending.DONE, Ending.FAILED)
    left = ending is Ending.LEFT and sent
    if ending is Ending.REFUSED or call.path in FREE:
        return None
    if relayed and reported == Usage():
        reported = None  # zeros beside a text
    if not (relayed or left or ending is Ending.DONE or (whole and reported)):
        return None
    if reported and (whole or reported.images):
        return reported
    guess = estimate(call, relayed, price, call.choices if left else 0)
    told = replace(reported or guess, images=guess.images)
    if reported and reported.output >= guess.output:
        return told
    return replace(told, output=guess.output, estimated=guess.estimated)


# What holds the report where it is not at the top: OpenAI's /responses, Anthropic's
# /messages, Groq's and Moonshot's streams (in the first choice).
HOLDERS = "response", "message", "x_groq", "choices"


def dotted(names: str) -> list[list[str]]:
    return [name.split(".") for name in names.split()]


# The places of a count in a usage report; the first one that is there counts.
INPUT = dotted("prompt_tokens input_tokens")
OUTPUT = dotted("completion_tokens output_tokens")
BESIDE = "cache_read_input_tokens", "cache_creation_input_tokens"  # Anthropic's
CACHED = dotted(
    "prompt_cache_hit_tokens cache_read_input_tokens prompt_tokens_details.cached_tokens"
    " input_tokens_details.cached_tokens cached_tokens num_cached_tokens"
)
WRITTEN = dotted(
    "cache_creation_input_tokens prompt_tokens_details.cache_write_tokens"
    " input_tokens_details.cache_write_tokens"
)
HOUR = dotted("cache_creation.ephemeral_1h_input_tokens")


def count_of(report: dict[str, Any], places: list[list[str]]) -> int | None:
    """The count in the first of these places that is there; None: in none.
    Raises ValueError for one that is not to be believed."""
    for place in places:
        value: Any = report
        for name in place:
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            if type(value) is not int or not 0 <= value <= MAX_TOKENS:
                raise ValueError(place)
            return value
    return None


def read_usage(document: dict[str, Any], generates: bool = True) -> Usage | None:
    """The usage that an answer or event reports; None if none is to be believed.

    Caches are counted inside the input; under Anthropic's names beside it, unless OpenAI's
    stand with them and have room for them. What `total_tokens` has above the sum is
    output: Gemini and xAI count the thinking only there. Where nothing is generated the
    total alone is the input.
    """
    report = document.get("usage")
    for name in HOLDERS:
        holder = document.get(name) if report is None else None
        holder = holder[0] if holder and type(holder) is list else holder
        report = holder.get("usage") if type(holder) is dict else report
    if not isinstance(report, dict):
        return None
    try:
        input, output = count_of(report, INPUT), count_of(report, OUTPUT)
        cached, written = count_of(report, CACHED), count_of(report, WRITTEN)
        hour = count_of(report, HOUR) or 0
    except ValueError:
        return None
    total = report.get("total_tokens")
    if type(total) is not int or not 0 <= total <= MAX_TOKENS:
        total = None
    if not generates and input is None:
        input = total
    if input is None and output is None:
        return None
    both = input is not None and output is not None
    input, output, cached, written = input or 0, output or 0, cached or 0, written or 0
    if any(map(report.get, BESIDE)):
        most = input + output + cached + written
        if "prompt_tokens" not in report or cached + written > input or total == most:
            input += cached + written
    if both and total is not None and input + output < total:
        output = total - input
    cached, spent = min(cached, input), report.get("cost")  # OpenRouter's, in dollars
    counted = type(spent) in (int, float) and 0 <= spent <= MICRO  # NaN is not
    written = min(written, input - cached)
    return Usage(
        input, cached, output, written=written, hour=min(hour, written),
        reported=math.ceil(spent * MICRO * PICO) if counted else None,
    )  # fmt: skip


def larger(one: Usage, other: Usage) -> Usage:
    """Of each count the larger: reports of a stream grow, or tell their parts."""
    input, output = max(one.input, other.input), max(one.output, other.output)
    cached, written = max(one.cached, other.cached), max(one.written, other.written)
    written = min(written, input - cached)
    spent = [each.reported for each in (one, other) if each.reported is not None]
    return Usage(
        input, cached, output, written=written,
        hour=min(written, max(one.hour, other.hour)),
        reported=max(spent, default=None),
    )  # fmt: skip


def images_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of an /images/generations answer that deliver an image."""
    entries = objects(document.get("data"))
    links = [each.get("url") or each.get("b64_json") for each in entries]
    return [each for each, link in zip(entries, links) if link and type(link) is str]


def written(document: dict[str, Any]) -> int:
    """What weighs the text that the model wrote into an answer or an event.

    The deltas of OpenAI's and Anthropic's streams (the events of /v1/responses tell
    each text again when it is done); choices, `output` and `content` of whole answers.
    """
    size = 0
    try:
        if type(sound := document.get("audio")) is str:
            size += -(-BYTES_PER_TOKEN * len(sound) // BYTES_OF_SOUND)
        for choice in objects(document.get("choices")):
            size += weigh(choice.get("delta") or choice.get("message") or {})
            size += weigh(choice.get("text"))
        for name in ("delta", "output", "content", "content_block"):
            if name in document:
                size += weigh(document[name])
    except RecursionError:
        pass  # nested too deeply for a text
    return size


# HTTP --------------------------------------------------------------------------------

MAX_ANSWER = 16 << 20  # bytes of a JSON answer: it is held whole to read its usage
MAX_HEAD = 64 << 10  # bytes of an upstream's head or trailers
MAX_CHUNK_LINE = 4096  # bytes of a chunk's size and extensions
MAX_INFORMATIONAL = 20  # 1xx answers before the final one
RECEIVE = 16 << 10  # bytes of one read: a TLS record, the rest would not wake a poll
CLIENT_TIMEOUT = 30.0  # seconds for a client to send a piece, or to take one whole
BODY_TIMEOUT = 60.0  # seconds for the whole body of a request
BODY_DELAY = 1 / 6  # of them, by which it may fall behind an even pace
ANSWER_READING = 120.0  # seconds for a client to read a JSON answer
CONNECT_TIMEOUT = 5.0  # seconds for TCP and TLS, each
ANSWER_TIMEOUT = 600.0  # seconds to a whole JSON answer; the OpenAI SDKs wait as long
STREAM_TIMEOUT = 1800.0  # seconds that a stream may live
STALL_TIMEOUT = 120.0  # seconds of a stream without a byte: a comment is one, too
UPSTREAM_IDLE = 4.0  # seconds; uvicorn closes idle connections after 5
REPORT_PATIENCE = 2.0  # seconds for the report of an answer whose client has left
FINISH_PATIENCE = 10.0  # seconds for what follows the finish of a stream
REST = 5.0  # seconds in which an upstream that could not be reached is asked last
LAST_READ = 0.02  # seconds for the end of a body whose last event was read
WATCH_INTERVAL = 0.25  # seconds between two looks at the deadlines
HANG_UP = 1.0  # seconds for a client to take the last event of what was ended


class Watch:
    """What may end one relay from outside: its client's leaving, its time, a drain.

    Without a lock: the watcher writes `ending`, then looks for what to wake; the relay
    shows what it waits for, then looks at `ending`. One of them sees the other.
    """

    def __init__(self, client: socket.socket | None = None, account: str = ""):
        self.client, self.number = client, client.fileno() if client else -1
        self.account = account
        self.ending: Ending | None = None
        self.ended = math.inf  # when
        self.deadline = time.monotonic() + ANSWER_TIMEOUT  # of what is waited for
        self.due = math.inf  # when a stream's upstream must have said something
        self._stall = STALL_TIMEOUT  # seconds from one such time to the next
        self.sent = False  # whether an upstream had the whole request
        self.finished = False  # whether all but the report of a stream was read
        self.left = math.inf  # when the client has
        self.awaited: socket.socket | None = None  # the upstream's, or the client's while
        # its body is read: it is shut down when the relay is ended
        self._sleeper: threading.Event | None = None

    @contextlib.contextmanager
    def receiving(self) -> Iterator[Callable[[float], None]]:
        """While a body is read from the client; what it gives is told of each part that
        has arrived. What ended that is raised: the client may still be told.

        Each part gives its part of the time, and none is saved up: who sends nearly all
        of a body and then stalls would keep the room that was kept for it."""
        if self.client:
            self.client.settimeout(CLIENT_TIMEOUT)
        self.awaited, start = self.client, time.monotonic()
        delay, last = BODY_TIMEOUT * BODY_DELAY, start + BODY_TIMEOUT
        self.deadline = start + delay

        def arrived(part: float) -> None:
            given = self.deadline + (BODY_TIMEOUT - delay) * part
            self.deadline = min(given, time.monotonic() + delay, last)

        try:
            yield arrived
        except BadRequest:
            if self.ending is Ending.TIMED_OUT:
                told = f"within {BODY_TIMEOUT:.0f} seconds, at an even pace"
                raise BadRequest(f"The body did not arrive {told}.") from None
            if self.ending is Ending.DRAINED:
                raise Ended(self.ending).failure() from None
            raise
        finally:
            self.awaited, self.deadline = None, time.monotonic() + ANSWER_TIMEOUT

    def asks(self, patience: float | None) -> None:
        """An upstream is asked that may take so long, if it has a limit of its own."""
        self._stall, self.sent, self.due = patience or STALL_TIMEOUT, False, math.inf
        self.deadline = time.monotonic() + (patience or ANSWER_TIMEOUT)

    def streams(self) -> None:
        """The answer is a stream: it may live longer, but must not fall silent."""
        self.deadline = time.monotonic() + STREAM_TIMEOUT
        self.hears()

    def hears(self, patience: float = math.inf) -> None:
        """The upstream said something, and is waited for again."""
        self.due = time.monotonic() + min(self._stall, patience)

    def answers(self) -> None:
        """The answer is whole: the client alone is waited for, to take it."""
        self.deadline, self.due = time.monotonic() + ANSWER_READING, math.inf

    @property
    def receives(self) -> bool:
        """Whether it waits for the body of its client."""
        return self.awaited is not None and self.awaited is self.client

    def check(self) -> None:
        """Raises Ended once the relay was ended."""
        if self.ending:
            raise Ended(self.ending)

    def sleep(self, seconds: float) -> None:
        """Waits, or raises Ended."""
        self._sleeper = self._sleeper or threading.Event()
        self.check()
        self._sleeper.wait(seconds)
        self.check()

    def look(self, now: float, drain: float) -> None:
        """Ends the relay if it is time to; called by the watcher alone."""
        if now >= drain:
            self.end(Ending.DRAINED)
        elif now >= self.left + REPORT_PATIENCE * self.finished:
            self.end(Ending.LEFT)
        elif now > min(self.deadline, self.due):
            self.end(Ending.TIMED_OUT)
        if now > self.ended + HANG_UP:
            self.hang_up()

    def end(self, ending: Ending) -> None:
        """Ends the relay, once, and wakes it; called by the watcher alone."""
        if self.ending:
            return
        self.ending, self.ended = ending, time.monotonic()
        if (sleeper := self._sleeper) is not None:
            sleeper.set()
        if (awaited := self.awaited) is not None:
            # Not SSLSocket's own: it would drop the TLS state under the reader.
            how = socket.SHUT_RD if self.receives else socket.SHUT_RDWR
            with contextlib.suppress(OSError):
                socket.socket.shutdown(awaited, how)

    def hang_up(self) -> None:
        """Ends the write to a client that does not read."""
        with contextlib.suppress(OSError, AttributeError):
            self.client.shutdown(socket.SHUT_RDWR)


class Watcher:
    """The thread that ends relays: whose client left, whose time is up, on a drain.

    A client's end shows as end of file on its socket; a half-close looks the same,
    and counts as leaving (as nginx has it). `upkeep` is what it does besides.
    """

    def __init__(self, upkeep: Callable[[], None]):
        self._upkeep = upkeep
        self._epoll = select.epoll()
        self._watches: set[Watch] = set()
        self._clients: dict[int, Watch] = {}  # by file descriptor
        self._lock = threading.Lock()
        self._drain = math.inf  # when what still runs is ended
        # Whether what was accepted is served in a drain: where the socket outlives the
        # process, as systemd's does, a restart refuses nobody.
        self.serves_on = False
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="watcher", daemon=True).start()

    def add(self, watch: Watch, capacity: float = math.inf) -> bool:
        """Watches it, unless that makes more than `capacity` at once, or a quarter of
        them waits for bodies of its account."""
        with self._lock:
            last = self._drain if self.serves_on else -math.inf
            if self._drain < math.inf and time.monotonic() >= last:
                return False
            if len(self._watches) >= capacity:
                return False
            if len(self._watches) > capacity / 4:
                alike = [each for each in self._watches if each.account == watch.account]
                if sum([each.receives for each in alike]) > capacity / 4:
                    return False
            self._watches.add(watch)
            if watch.client is not None:
                with contextlib.suppress(OSError, ValueError):
                    self._epoll.register(watch.number, select.EPOLLRDHUP)
                    self._clients[watch.number] = watch
        return True

    def remove(self, watch: Watch) -> None:
        with self._lock:
            self._watches.discard(watch)
            self._forget(watch)

    def _forget(self, watch: Watch) -> None:
        """Late it may be: by now the number may be another connection's."""
        if self._clients.get(watch.number) is watch:
            del self._clients[watch.number]
            with contextlib.suppress(OSError, ValueError):
                self._epoll.unregister(watch.number)

    def drain(self, seconds: float) -> None:
        """Ends what still runs after `seconds`; a later call does not put it off."""
        self._drain = min(self._drain, time.monotonic() + seconds)

    def close(self) -> None:
        """Ends what still runs, and the thread."""
        self.drain(0)
        self._closed.set()

    def _run(self) -> None:
        looked = 0.0
        while not (self._closed.is_set() and not self._watches):
            try:
                for number, _ in self._epoll.poll(WATCH_INTERVAL):
                    self._look(number)
                now = time.monotonic()
                if now - looked >= WATCH_INTERVAL / 2:
                    looked = now
                    for watch in list(self._watches):
                        watch.look(now, self._drain)
                    self._upkeep()
            except Exception:
                # A socket changed under our hands, or a log is full: whatever it was,
                # without this thread nothing would be ended any more.
                continue
        self._epoll.close()

    def _look(self, number: int) -> None:
        """A client has left, unless the event was another's on the same number."""
        with self._lock:
            watch = self._clients.get(number)
            if watch is not None and has_left(watch.client):
                watch.left = time.monotonic()
                watch.look(watch.left, self._drain)
                self._forget(watch)


def has_left(client: socket.socket) -> bool:
    poll = select.poll()
    try:
        poll.register(client, select.POLLRDHUP)
        return bool(poll.poll(0))
    except (OSError, ValueError):
        return True


def is_quiet(sock: socket.socket, seconds: float = 0) -> bool:
    """Whether a connection says nothing, not even its end, for `seconds`."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return not poll.poll(seconds * 1000)


STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [^\r\n]*)?")
CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;.*)?", re.DOTALL)
FRAMING = (b"transfer-encoding", b"content-length")


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
                return self._find_end()
            if self.status == 101:
                break
        raise ValueError("no final answer")

    def _read_head(self) -> None:
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            data = self._sock.recv(RECEIVE)
            if len(self._buffer) > MAX_HEAD or not data:
                raise ValueError("no head")
            self._buffer += data
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
            known = self.headers.setdefault(name, value)
            if known is not value and name in FRAMING:
                if known != value or name == FRAMING[0]:
                    raise ValueError("two ways to frame the body")

    def _find_end(self) -> None:
        """How the body ends (RFC 9112 §6.3)."""
        coding, length = map(self.headers.get, FRAMING)
        if coding is not None:
            if coding.lower() != b"chunked" or length is not None or self._old:
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

    @property
    def reusable(self) -> bool:
        """Whether the connection may carry another request."""
        close = b"close" in self.headers.get(b"connection", b"").lower()
        whole = self.ended and not self._buffer and self._left is not None
        return whole and not close and not self._old

    def read(self) -> bytes:
        """The body's next bytes as they come; empty at its end."""
        while not self.ended:
            if self._left is None:
                data = self._buffer or self._sock.recv(RECEIVE)
                self._buffer, self.ended = b"", not data
                return data
            self._buffer = self._buffer or self._more()
            if self._chunked:
                data = self._take_chunks()
            else:
                left = self._left
                data, self._buffer = self._buffer[:left], self._buffer[left:]
                self._left -= len(data)
                self.ended = not self._left
            if data:
                return data
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
                size = CHUNK_SIZE.fullmatch(buffer, at, end)
                if not size:
                    raise ValueError("no chunk size")
                self._left = int(size[1], 16)
                if not self._left:
                    at = self._skip_trailers(at, end)
                    break
                at, self._left = end + 2, self._left + 2
        self._buffer = buffer[at:]
        if not out and not self.ended:
            self._buffer += self._more()
        return b"".join(out)

    def _more(self) -> bytes:
        """More of a body that is not whole."""
        data = self._sock.recv(RECEIVE)
        if not data:
            raise ValueError("the body was cut")
        return data

    def _skip_trailers(self, at: int, end: int) -> int:
        """Where the body's trailers end, or `at` until all of them are here."""
        last = self._buffer.find(b"\r\n\r\n", end)
        if last < 0:
            if len(self._buffer) - end > MAX_HEAD:
                raise ValueError("trailers without an end")
            return at
        self.ended = True
        return last + 4


class Pool:
    """Idle connections to one upstream, the youngest first.

    Sockets, not requests' sessions: a client that leaves must be able to end the wait
    for the answer's head, for which the socket is needed before there is an answer.
    """

    def __init__(self, upstream: UpstreamConfig):
        self._upstream = upstream
        self._idle: deque[tuple[socket.socket, float]] = deque()
        host = f"[{upstream.host}]" if ":" in upstream.host else upstream.host
        default = 443 if upstream.secure else 80
        self.host = host if upstream.port == default else f"{host}:{upstream.port}"
        self._place = f"{host}:{upstream.port}"
        self._failed = -math.inf  # when it could not be reached, or that was last tried
        login = upstream.proxy.login if upstream.proxy else ""
        coded = base64.b64encode(login.encode()).decode()
        self._login = f"Proxy-Authorization: Basic {coded}\r\n" if login else ""
        # A proxy is told the whole URL of what is not encrypted (RFC 9112 §3.2.2).
        told = bool(upstream.proxy) and not upstream.secure
        self.base = f"http://{self.host}" if told else ""
        self.lines = f"Host: {self.host}\r\n{self._login if told else ''}"

    @property
    def rests(self) -> bool:
        """Whether it could not be reached just now: others are asked before it."""
        return time.monotonic() < self._failed + REST

    def take(self, watch: Watch) -> socket.socket:
        """A connected socket; raises OSError or ValueError."""
        while True:
            try:
                sock, since = self._idle.pop()
            except IndexError:
                break
            if time.monotonic() - since < UPSTREAM_IDLE and is_quiet(sock):
                return sock
            sock.close()
        if self._failed > 0:  # one request tries whether it is back, the others pass by
            self._failed = time.monotonic()
        try:
            sock = self._connect(watch)
        except (OSError, ValueError):
            self._failed = time.monotonic()
            raise
        self._failed = -math.inf
        return sock

    def give(self, sock: socket.socket) -> None:
        self._idle.append((sock, time.monotonic()))

    def tidy(self, closing: bool = False) -> None:
        """Closes what has been idle too long, or all; others may take the last."""
        with contextlib.suppress(IndexError):
            while closing or time.monotonic() - self._idle[0][1] > UPSTREAM_IDLE:
                self._idle.popleft()[0].close()

    def _connect(self, watch: Watch) -> socket.socket:
        upstream = self._upstream
        first = upstream.proxy or upstream
        patience = min(CONNECT_TIMEOUT, upstream.timeout or CONNECT_TIMEOUT)
        sock = socket.create_connection((first.host, first.port), patience)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if upstream.secure:
                if upstream.proxy:
                    watch.awaited = sock
                    self._tunnel(sock)
                sock = tls_context().wrap_socket(sock, server_hostname=upstream.host)
            # From here on the watch bounds every wait: it shuts the socket down.
            sock.settimeout(None)
        except BaseException:
            sock.close()
            raise
        return sock

    def _tunnel(self, sock: socket.socket) -> None:
        """Has the proxy connect to the upstream (RFC 9110 §9.3.6)."""
        place = f"{self._place} HTTP/1.1\r\nHost: {self._place}"
        sock.sendall(f"CONNECT {place}\r\n{self._login}\r\n".encode())
        status = Reply(sock).status
        if not 200 <= status < 300:
            raise ValueError(f"the proxy answered {status}")


@functools.cache
def tls_context() -> ssl.SSLContext:
    """The system's certificates, and certifi's where it has none."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


@dataclass(slots=True)
class Answer:
    """An upstream's answer in pieces as they come: JSON, a `stream` of events, or what
    is of another `kind`, such as audio.

    `images` counts what a dialect has delivered; None if the body tells. Iterating
    raises UpstreamFailed when the body is cut, Ended when the relay is.
    """

    pieces: Iterable[bytes]
    stream: bool
    images: int | None = None
    kind: str = "application/json"

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.pieces)

    def close(self) -> None:
        """Gives up what is not read; called once, by whoever got the answer."""
        if isinstance(self.pieces, Generator):  # it may hold what holds this
            self.pieces.close()


def read_some(
    answer: Iterator[bytes], limit: int,
    held: Callable[[int], None] = lambda size: None,
) -> bytes:  # fmt: skip
    """The body, or its beginning once that has more than `limit` bytes; `held` is told
    how many are."""
    pieces, size = [], 0
    for data in answer:
        pieces.append(data)
        size += len(data)
        held(size)
        if size > limit:
            break
    return b"".join(pieces)


def read_all(answer: Iterable[bytes], limit: int = MAX_ANSWER) -> bytes:
    """The whole body, or UpstreamFailed if it is longer than `limit` bytes."""
    data = read_some(iter(answer), limit)
    if len(data) > limit:
        raise UpstreamFailed(f"an answer over {limit} bytes")
    return data


# Server-sent events, whatever the content type says; JSON starts with a brace.
STREAM_BEGIN = re.compile(rb":|data:|event:|id:|retry:")
BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte order mark, and what keeps a connection alive


def begun(answer: Iterable[bytes]) -> tuple[bool, Iterator[bytes]]:
    """(whether these are server-sent events, the body): judged by its first bytes, of
    which blanks are dropped."""
    pieces, begin = iter(answer), b""
    while len(begin) < len(b"event:") and not begin.startswith((b":", b"{")):
        data = next(pieces, b"")
        if not data:
            break
        begin = (begin + data).lstrip(BLANK)
    if not begin:
        raise UpstreamFailed("an empty answer")
    return bool(STREAM_BEGIN.match(begin)), itertools.chain([begin], pieces)


GZIP = b"\x1f\x8b\x08"  # how it begins (RFC 1952 §2.3.1)


class Exchange:
    """One request on a connection, and its answer: an Answer by its form.

    `close` gives the connection back to its pool if all was read. What fails closes it.
    """

    images: int | None = None

    def __init__(self, pool: Pool, watch: Watch):
        self._pool, self._watch = pool, watch
        self._sock: socket.socket | None = None
        self._reply: Reply | None = None
        self._sent = False
        self._early = b""  # of the answer

    def send(self, path: str, body: bytes, headers: str) -> None:
        """Sends a POST; `headers` are whole lines."""
        head = f"POST {self._pool.base}{path} HTTP/1.1\r\n{self._pool.lines}"
        head += f"Content-Length: {len(body)}\r\n{headers}\r\n"
        try:
            self._sock = self._watch.awaited = self._pool.take(self._watch)
            self._watch.check()
            self._sock.sendall(head.encode("latin-1") + body)
            self._sent = self._watch.sent = True
        except (BrokenPipeError, ConnectionResetError) as error:
            # Who refuses a long body by its head may answer and close at once.
            if self._sock is None or is_quiet(self._sock):
                self._give_up(error)
        except BaseException as error:
            self._give_up(error)

    def is_ready(self, seconds: float) -> bool:
        """Whether something of the answer is here; waits for it up to `seconds`.

        A TLS connection may be readable for its session tickets alone.
        """
        self._watch.check()
        if is_quiet(self._sock, seconds):
            return False
        self._sock.settimeout(0)
        try:
            self._early = self._sock.recv(RECEIVE)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError:
            pass  # it is told when the answer is read
        finally:
            self._sock.settimeout(None)
        return True

    def receive(self) -> Self:
        """Waits for the answer's head: `status`, `kind` (its type), `retry_after`."""
        try:
            self._reply = reply = Reply(self._sock, self._early)
        except BaseException as error:
            self._give_up(error)
        kind = reply.headers.get(b"content-type", b"").decode("latin-1")
        self.kind = kind.partition(";")[0].strip().lower()
        self.stream = self.kind == STREAM_TYPE
        self.status = reply.status
        self.retry_after = reply.headers.get(b"retry-after", b"").decode("latin-1")
        return self

    def __iter__(self) -> Iterator[bytes]:
        try:
            if begin := self._reply.read():
                pieces = itertools.chain([begin], iter(self._reply.read, b""))
                # Some servers send gzip unasked, some say that it is where it is not.
                packed = GZIP.startswith(begin[:3])
                yield from filter(None, unpacked(pieces, "gzip")) if packed else pieces
        except (OSError, ValueError) as error:
            raise self._failure(error) from None
        except BadRequest:
            raise UpstreamFailed("no valid gzip") from None
        self._watch.check()  # the end may be the watcher's

    def close(self) -> None:
        """Gives the connection back, or closes it; once."""
        sock, reply, self._sock = self._sock, self._reply, None
        if sock is None:
            return
        ended = self._watch.ending
        if reply and not reply.ended and not ended:
            # After [DONE] only the last chunk, which is empty, is left to read.
            with contextlib.suppress(OSError, ValueError):
                sock.settimeout(LAST_READ)
                reply.read()
                sock.settimeout(None)
        self._watch.awaited = None
        if reply and reply.reusable and not self._watch.ending:
            self._pool.give(sock)
        else:
            sock.close()

    def _give_up(self, error: BaseException) -> NoReturn:
        """Whatever fails closes the connection."""
        self.close()
        if isinstance(error, OSError | ValueError):
            raise self._failure(error) from None
        raise error

    def _failure(self, error: Exception) -> UpstreamFailed:
        """The one place where the network's exceptions become ours; raises Ended if
        they only tell that the relay was ended."""
        self._watch.check()
        # An OSError's text may hold what the upstream sent: only the kind is kept.
        reason = str(error) if type(error) is ValueError else type(error).__name__
        if self._sent:
            return UpstreamFailed(reason, transient=True)
        return UpstreamFailed(reason, 2, Generated.NOTHING, transient=True)


# Dialects ----------------------------------------------------------------------------

# An upstream that has generated nothing, and may later.
BUSY_STATUS = {408, 429, 503, 529}
# It, or the proxy before it, refuses the operator, who alone can mend it.
REFUSED_STATUS = {401, 402, 403, 407}
CLIENT_STATUS = {400, 404, 413, 422, 424, 501}  # the client's own mistakes: passed on
FLAGGED = re.compile("flagged|moderat|safety|sensitive|(content|usage) polic", re.I)
# How providers say, by codes or in words, that the operator's account cannot pay or
# that its key is wrong, whatever status they give it.
UNPAID_CODES = {
    "insufficient_quota", "billing_hard_limit_reached", "billing_not_active",
    "insufficient_balance", "exceeded_current_quota_error", "account_deactivated",
    "Arrearage", "AccountOverdueError", "1113", "30001",
}  # fmt: skip
UNPAID = re.compile(
    "credit balance is too low|(insufficient|not enough) (account )?(balance|credits?)"
    "|balance is insufficient|exceeded your current quota|billing hard limit"
    "|account is in good standing|have any credits|API key (not valid|expired)", re.I
)  # fmt: skip
# What an error inside an answer means where its `code` is no number.
STATUS_OF = {
    "invalid_request_error": 400, "context_length_exceeded": 400, "INVALID_ARGUMENT": 400,
    "content_filter": 400, "authentication_error": 401, "insufficient_quota": 402,
    "billing_error": 402, "permission_error": 403, "not_found_error": 404,
    "request_too_large": 413, "rate_limit_exceeded": 429, "rate_limit_error": 429,
    "RESOURCE_EXHAUSTED": 429, "api_error": 500, "server_error": 500, "INTERNAL": 500,
    "UNAVAILABLE": 503, "server_is_overloaded": 503, "overloaded_error": 529,
}  # fmt: skip
DONE_PATHS = ("chat/completions", "completions")  # whose streams end in [DONE]
FINISH_PATHS = (*DONE_PATHS, "messages", "responses")  # whose streams tell a finish
PROBE_TIMEOUT = 15.0  # seconds for a provider to say whether it knows the key


class Dialect:
    """How one kind of upstream is asked. A subclass levels what differs.

    `scheme` is what stands before the "+" of the upstream's URL; `options` are the
    members of keys.json that it heeds, `known` those that it sets by itself; `paths`
    are those that it speaks, where the upstream is not the one to say.
    """

    scheme: str
    options = "proxy timeout"
    known: dict[str, Any] = {}
    asks_usage = False  # whether the usage of a stream comes only if it is asked for
    paths: tuple[str, ...] = ()

    def __init_subclass__(cls) -> None:
        if "scheme" in vars(cls):
            DIALECTS[cls.scheme] = cls

    def __init__(self, upstream: UpstreamConfig):
        self.upstream, self.pool = upstream, Pool(upstream)
        # By the upstream's id of a model: fields of ours that it has refused.
        self.refused: dict[str, frozenset[str]] = {}

    @classmethod
    def flat(cls, id: str) -> frozenset[str]:
        """Fields that move the price elsewhere, but not of this model."""
        return frozenset()

    def examine(self, call: Call) -> None:
        """Raises BadRequest or NotFound for what this dialect cannot do, and
        UpstreamFailed where it lacks its key."""
        if missing := ", ".join(self.upstream.missing):
            failure = UpstreamFailed(f"{missing} is not set", None, Generated.NOTHING)
            failure.message = "The provider of this model is not configured."
            raise failure
        if self.paths and call.path not in self.paths:
            spoken = " and ".join([f"/v1/{path}" for path in self.paths])
            raise NotFound(f"This model is reached through {spoken} only.")

    def send(self, call: Call, body: dict[str, Any], watch: Watch) -> Answer:
        """Sends `body` (the upstream's model id, defaults and cap written into it)
        and returns a successful answer; raises Refused, UpstreamFailed or Ended."""
        raise NotImplementedError

    def probe(self) -> str:
        """Empty if the credentials are accepted, else why not; spends nothing."""
        return ""

    def ask(self, method: str, path: str, body: bytes, headers: dict) -> Any:
        """One question of a probe, as `requests` answers it; raises its errors."""
        import requests  # 5 MiB that no worker needs

        scheme = "https" if self.upstream.secure else "http"
        with requests.Session() as session:
            session.trust_env = False  # ~/.netrc would overwrite the key
            if proxy := self.upstream.proxy:
                session.proxies = {scheme: proxy.url}
            trusted = ssl.get_default_verify_paths()  # SSL_CERT_FILE's, as a relay does
            session.verify = trusted.cafile or trusted.capath or certifi.where()
            return session.request(
                method, f"{scheme}://{self.pool.host}{path}", data=body,
                headers=headers, timeout=PROBE_TIMEOUT, allow_redirects=False,
            )  # fmt: skip


def retry_seconds(text: str) -> int:
    """Whole seconds, 1 to 60, out of an upstream's Retry-After (RFC 9110 §10.2.3, or
    decimals); 2 if it names none."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 2
    return math.ceil(max(1, min(60, seconds))) if math.isfinite(seconds) else 2


def scrub(text: Any, secrets: tuple[str, ...]) -> str | None:
    """A bounded text without the operator's keys or their ends; None if it is no text.

    The end of a short key ("ollama") may be a part of common words.
    """
    if not isinstance(text, str):
        return None
    ends = [secret[-4:] for secret in secrets if len(secret) >= 16]
    for part in sorted([*secrets, *ends], key=len, reverse=True):
        text = text.replace(part, "***") if len(part) >= 4 else text
    return text[:2000].encode("utf-8", "replace").decode()


def unwrapped(error: Any, depth: int = 5) -> dict[str, Any]:
    """An upstream's error without what is around it; the innermost word counts.

    A list (Google), a text (vLLM), `detail` and its list (FastAPI), `errors`, another
    provider's error as text in `metadata.raw` (OpenRouter) or in `message`.
    """
    if type(error) is list:
        error = error[0] if error else None
    if type(error) is str:
        error = json_object(error.encode("utf-8", "replace")) or {"message": error}
    if type(error) is not dict or not depth:
        return {}
    metadata, message = error.get("metadata"), error.get("message") or error.get("msg")
    inner = error.get("error") or error.get("detail") or error.get("errors")
    if not inner and isinstance(metadata, dict):
        inner = metadata.get("raw")
    if not inner and isinstance(message, str) and message.startswith("{"):
        inner = message
    known = {"message": message, "param": error.get("param") or error.get("loc")}
    known |= {name: error.get(name) for name in ("type", "code", "status")}
    told = unwrapped(inner, depth - 1) if inner else {}
    return known | {name: value for name, value in told.items() if value}


def told_status(error: dict[str, Any]) -> int | None:
    """The status that an unwrapped error inside an answer names."""
    for value in (error.get("code"), error.get("status"), error.get("type")):
        text = str(value)
        if text in STATUS_OF or re.fullmatch("[45][0-9][0-9]", text):
            return STATUS_OF.get(text) or int(text)
    return None


def failure_of(
    status: int | None, error: dict[str, Any], secrets: tuple[str, ...], wait: str = ""
) -> ProxyError:
    """What an upstream's status and unwrapped error mean; `wait`: its Retry-After.

    The client's own mistake passes in its words, without the operator's keys.
    """
    message, param = error.get("message"), error.get("param")
    if isinstance(param, list):
        param = ".".join(map(str, param))
    operators = UNPAID_CODES & {str(error.get(name)) for name in ("code", "type")}
    if operators or (status in {*CLIENT_STATUS, 403} and UNPAID.search(str(message))):
        status = 402
    reason = f"status {status}" if status else "an error without a status"
    if status in CLIENT_STATUS or (status == 403 and FLAGGED.search(str(message))):
        texts = (message or "The provider refused this.", error.get("code"), param)
        return Refused(status, *(scrub(text, secrets) for text in texts))
    if status in BUSY_STATUS:
        return UpstreamFailed(reason, retry_seconds(wait), Generated.NOTHING)
    if status in REFUSED_STATUS:
        return UpstreamFailed(reason, None, Generated.NOTHING)
    return UpstreamFailed(reason, 2 if status and status >= 500 else None)


def header_lines(headers: dict[str, str]) -> str:
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()])


OTHER_CAP = {
    "max_tokens": "max_completion_tokens",
    "max_completion_tokens": "max_tokens",
}


def cap_output(
    call: Call, model: Model, body: dict[str, Any], cap: str, tokens: int,
    refused: frozenset[str],
) -> dict[str, Any]:  # fmt: skip
    """The member that bounds the output; `body` is bounded in place where others do.

    Under the one name that is known: keys.json's, or the other one where the usual one
    was refused. Else beside what the client named, for who does not know a name of
    these ignores it.
    """
    chat = call.path.endswith("chat/completions")
    usual = usual_cap(call.path)
    sole = min(CAPS & model.defaults.keys(), default=cap if chat else "")
    if chat and (sole or usual) in refused:
        sole = OTHER_CAP[sole or usual]
    named = [name for name in CAPS & body.keys() if body[name] or sole]
    for name in named:
        body[name] = min(body[name] or tokens, tokens)
    if not sole:
        return {usual: min(body.get(usual) or tokens, tokens)} if usual else {}
    return {sole: min([tokens, *(body.pop(name) for name in named)])}


def compose(
    call: Call, model: Model, dialect: Dialect, id: str, tokens: int,
    refused: frozenset[str],
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """(body, ours): the body for one upstream, and what of it the gateway has added:
    the ask for a stream's usage, and the cap of `tokens` that the hold rests on.

    `refused`: additions that this upstream does without.
    """
    upstream, ours = dialect.upstream, {}
    defaults = {} if call.path in FREE | {COMPACT} else model.defaults
    body = {**defaults, **call.body, "model": id}
    for name in upstream.without:
        body.pop(name, None)
    if upstream.developer and call.path == "chat/completions":
        role = {"role": upstream.developer}
        body["messages"] = [
            each | role if each.get("role") == "developer" else each
            for each in body["messages"]
        ]
    name = "stream_options"
    asks = dialect.asks_usage and call.stream and call.path in DONE_PATHS
    if asks and not call.wants_usage and name not in upstream.without | refused:
        ours[name] = (body.get(name) or {}) | {"include_usage": True}
    if model.price.output and call.path not in NO_OUTPUT:
        ours |= cap_output(call, model, body, upstream.cap, tokens, refused)
    return body | ours, ours


MAX_REFUSED = 1000  # models of an upstream to remember: the ids of a "*" are clients'
# How servers say that they do not know a field, beside those that dislike its value.
UNKNOWN_FIELD = re.compile(
    "unsupported|unrecogni[sz]ed|unknown|unexpected|extra|additional|deprecated"
    "|(not|n't|no longer) (\\w+ )?(support|permit|allow|accept|recogni)|instead", re.I
)  # fmt: skip


def refused_additions(
    error: Refused, ours: dict[str, Any], refused: frozenset[str]
) -> set[str]:
    """Which of our additions a refusal is about and can be left out, or renamed.

    One that names no field may be about `stream_options`. A cap is renamed where its
    name is refused; where its value is, it might bound nothing under the other name.
    """
    if error.status not in (400, 422):
        return set()
    told = f"{error.param} {error.message}".replace("include_usage", "stream_options")
    named = {name for name in ours if name in told}
    if not named and not error.param:
        named = {"stream_options"} & ours.keys()
    for name in named & CAPS:
        if OTHER_CAP.get(name) in {None} | refused or not UNKNOWN_FIELD.search(told):
            named.remove(name)
    return named - refused


def names_by_itself(error: Refused, names: Iterable[str], call: Call) -> bool:
    """Whether a refusal names these fields itself: what a client had the provider quote
    teaches nothing."""
    text, param = to_json(call.body).decode(), str(error.param)
    return all(
        name in param or (name in error.message and name not in text) for name in names
    )


def explained(error: Refused, call: Call, ours: dict[str, Any]) -> Refused:
    """A refusal that may be about a cap tells whose that is, if the client set none."""
    about = re.search("token|context|length", f"{error.param} {error.message}", re.I)
    for name in CAPS & ours.keys():
        if about and not call.cap and error.status in (400, 422):
            error.message += (
                f" (This gateway set {name} to {ours[name]}, as the request set none:"
                " set one, or have the operator change the model's max_output.)"
            )
    return error


# Paths whose answers may be of other kinds, and which; elsewhere their form is judged by
# the first bytes.
KINDS = f"application/json|{STREAM_TYPE}|"
SOUND = re.compile(KINDS + r"audio/[\w.+-]+|application/octet-stream")
SUBTITLES = re.compile(KINDS + "text/(plain|vtt|srt)|application/x-subrip")
OTHER_KINDS = {SPEECH: SOUND} | dict.fromkeys(TRANSCRIPTS, SUBTITLES)


class OpenAI(Dialect):
    """`https://`: the OpenAI API as it is."""

    scheme = ""
    options = "auth headers query proxy timeout without developer cap"
    asks_usage = True
    extra: dict[str, str] = {}  # headers

    def __init__(self, upstream: UpstreamConfig):
        super().__init__(upstream)
        name, before = AUTH[upstream.auth]
        ours = {
            "Accept": "application/json, text/event-stream",
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "proxy.py",
        } | self.extra | ({name: before + upstream.key} if upstream.key else {})
        theirs = {name.lower() for name, _ in upstream.headers}
        kept = {name: text for name, text in ours.items() if name.lower() not in theirs}
        self._headers = kept | dict(upstream.headers)
        self._lines = header_lines(self._headers)
        self._query = f"?{upstream.query}" if upstream.query else ""

    def send(self, call: Call, body: dict[str, Any], watch: Watch) -> Answer:
        more = call.headers | ({"Accept": "*/*"} if call.path in OTHER_KINDS else {})
        if call.files is None:
            data = to_json(body)
        else:
            more["Content-Type"], data = to_form(body, call.files)
        return self.finish(self.start(call.path, data, watch, more), call.path)

    def start(
        self, path: str, data: bytes, watch: Watch, more: dict[str, str] | None = None
    ) -> Exchange:
        exchange = Exchange(self.pool, watch)
        lines = header_lines(self._headers | more) if more else self._lines
        exchange.send(self.url_path(path) + self._query, data, lines)
        return exchange

    def url_path(self, path: str) -> str:
        return f"{self.upstream.path}/{path}"

    def finish(self, exchange: Exchange, path: str = "") -> Exchange:
        """The answer; one that is no success is raised as what it means."""
        answer = exchange.receive()
        known = path not in OTHER_KINDS or OTHER_KINDS[path].fullmatch(answer.kind)
        if answer.status == 200 and known:
            return answer
        try:
            raise self.failure(answer)
        finally:
            answer.close()

    def get(self, path: str) -> str:
        """Empty if a GET of `path` is answered with 200, else what came instead."""
        status = self.ask("GET", path + self._query, b"", self._headers).status_code
        return "" if status == 200 else f"status {status}"

    def probe(self) -> str:
        return self.get(self.url_path("models"))

    def failure(self, answer: Exchange) -> ProxyError:
        """What an answer that is no success means, by its status."""
        if 200 <= answer.status < 400:
            kind = answer.kind or "no content type"
            return UpstreamFailed(f"status {answer.status}, {kind}")
        error: dict[str, Any] = {}
        with contextlib.suppress(UpstreamFailed, ValueError, RecursionError):
            text = read_all(answer, 1 << 20).decode()
            error = unwrapped(text if answer.kind == "text/plain" else json.loads(text))
        return failure_of(answer.status, error, self.upstream.secrets, answer.retry_after)


class Anthropic(OpenAI):
    """`anthropic+https://`: Anthropic's own API, of which nothing is translated."""

    scheme = "anthropic"
    known = {"auth": "x-api-key"}
    extra = {"anthropic-version": "2023-06-01"}  # that of a client that names none
    paths = ("messages", "messages/count_tokens")

    def url_path(self, path: str) -> str:
        return f"{self.upstream.path.removesuffix('/v1')}/v1/{path}"


class DeepSeek(OpenAI):
    """`deepseek+https://`: OpenAI's API with DeepSeek's differences levelled."""

    scheme = "deepseek"
    known = KNOWN["api.deepseek.com"]

    def __init__(self, upstream: UpstreamConfig):
        super().__init__(upstream)
        path = upstream.path.removesuffix("/v1") + "/anthropic"
        self._anthropic = Anthropic(replace(upstream, path=path, auth="x-api-key"))
        self._anthropic.pool = self.pool

    def send(self, call: Call, body: dict[str, Any], watch: Watch) -> Answer:
        if call.path in Anthropic.paths:
            return self._anthropic.send(call, body, watch)
        return super().send(call, body, watch)

    def url_path(self, path: str) -> str:
        """Fill-in-the-middle is reached under /beta only."""
        if path == "completions":
            return self.upstream.path.removesuffix("/v1") + "/beta/completions"
        return super().url_path(path)

    def probe(self) -> str:
        return self.get(self.upstream.path.removesuffix("/v1") + "/user/balance")


def chat_head(model: str, kind: str) -> dict[str, Any]:
    id, now = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
    return {"id": id, "object": kind, "created": now, "model": model}


def completion(
    model: str, text: str, usage: dict[str, int], finish: str = "stop", choices: int = 1
) -> dict[str, Any]:
    """An answer of chat completions, with this text in each of its choices."""
    message = {"role": "assistant", "content": text}
    picks = [
        {"index": index, "message": message, "finish_reason": finish}
        for index in range(choices)
    ]
    return chat_head(model, "chat.completion") | {"choices": picks, "usage": usage}


def completion_events(
    model: str, first: str, words: list[str], usage: dict[str, int],
    finish: str = "stop", choices: int = 1,
) -> Iterator[bytes]:  # fmt: skip
    """The same as a stream: a chunk for its first text, and for each of the words."""
    head = chat_head(model, "chat.completion.chunk")

    def chunk(index: int, delta: dict[str, str], end: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": end}
        return sse(head | {"choices": [choice]})

    for index in range(choices):
        yield chunk(index, {"role": "assistant", "content": first})
        for word in words:
            yield chunk(index, {"content": word})
        yield chunk(index, {}, finish)
    yield sse(head | {"choices": [], "usage": usage})
    yield DONE


NO_TOKENS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
Steps = Iterator[list[dict[str, Any]] | None]  # None while there is to wait


def image_url(entry: dict[str, Any]) -> str:
    """The URL of one image; `data:` for one that came as base64."""
    return entry.get("url") or f"data:image/png;base64,{entry['b64_json']}"


PICTURE_URL = re.compile("https?://|data:image/[a-z0-9.+-]+;base64,", re.I)
COMMENT_INTERVAL = 10.0  # seconds between the comments of a stream that waits


class ImageDialect(Dialect):
    """Image models, asked through chat completions or /images/generations."""

    paths = ("chat/completions", "images/generations")

    def examine(self, call: Call) -> None:
        super().examine(call)
        if call.path == "chat/completions" and call.choices > 1:
            raise BadRequest("Only one image a request: 'n' must be 1.", param="n")
        if not self.prompt(call).strip():
            raise BadRequest("There is no text to make an image of.", param="messages")
        self.pictures(call)

    @staticmethod
    def prompt(call: Call) -> str:
        """The prompt; through chat, the text of the last user message."""
        if call.path == "chat/completions":
            return message_text(last_user_message(call.body))
        prompt = call.body.get("prompt")
        return prompt if isinstance(prompt, str) else ""

    @staticmethod
    def pictures(call: Call) -> list[str]:
        """The URLs of the pictures to work on, attached to the last user message or
        named by a field; BadRequest for what an image model cannot be given."""
        content = last_user_message(call.body).get("content")
        found: list[Any] = []
        for part in objects(content):
            held = part.get("image_url")
            if part.get("type", "image_url") == "image_url" and medium(part):
                found.append(held.get("url") if isinstance(held, dict) else held)
            elif medium(part):
                told = "An image model takes text and 'image_url' parts only."
                raise BadRequest(told, param="messages")
        for name in ("image", "image_urls"):
            value = call.body.get(name) or []
            found += value if isinstance(value, list) else [value]
        for url in found:
            if not isinstance(url, str) or not PICTURE_URL.match(url):
                told = "A picture must be a URL (https://…) or a data URL of base64."
                raise BadRequest(told, param="image")
        return found

    def make(self, call: Call, body: dict[str, Any], watch: Watch) -> Steps:
        """Asks for images, once; its last step are OpenAI's entries.

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
            document = completion(call.model, image_url(images[0]), NO_TOKENS)
        else:
            document = {"created": int(time.time()), "data": images}
        return Answer([to_json(document)], False, images=len(images))

    def _events(self, answer: Answer, model: str, steps: Steps) -> Iterator[bytes]:
        """Comments while waiting, then the image's URL as one chunk."""
        spoken = time.monotonic()
        for images in steps:
            if images:
                break
            if time.monotonic() - spoken >= COMMENT_INTERVAL:
                spoken = time.monotonic()
                yield b": the image is being made\n"
        answer.images = 1
        yield from completion_events(model, image_url(images[0]), [], NO_TOKENS)


def policy_refusal(code: Any) -> Refused | None:
    """The 400 of content that the vendor's moderation refuses."""
    if isinstance(code, str) and code.endswith("SensitiveContentDetected"):
        return Moderated()
    return None


def image_failure(document: dict[str, Any]) -> ProxyError:
    """Why a 200 without an image has none: its own error, or its first entry's."""
    for holder in [document, *objects(document.get("data"))]:
        error = holder.get("error")
        if isinstance(error, dict):
            return policy_refusal(error.get("code")) or UpstreamFailed("an image error")
    return UpstreamFailed("no image in the answer")


MAX_PICTURES = 64 << 20  # bytes: four PNGs of 1536x1024 are 18 MB, one of 4K is 36 MB


class Images(ImageDialect):
    """`images+https://`: any server with an OpenAI-style /images/generations."""

    scheme = "images"
    options = "auth headers query proxy timeout without"
    members = (
        "n size seed watermark quality style background user"
        " guidance_scale response_format output_format"
    ).split()

    @classmethod
    def flat(cls, id: str) -> frozenset[str]:
        return frozenset({"size"} if "seedream" in id else ())

    def __init__(self, upstream: UpstreamConfig):
        super().__init__(upstream)
        self._api = OpenAI(upstream)
        self.pool = self._api.pool

    def make(self, call: Call, body: dict[str, Any], watch: Watch) -> Steps:
        asked = {
            name: body[name] for name in self.members if body.get(name) is not None
        }
        if call.path == "chat/completions":
            asked.pop("response_format", None)
        asked |= {"model": body["model"], "prompt": self.prompt(call)}
        if pictures := self.pictures(call):
            asked["image"] = pictures[0] if len(pictures) == 1 else pictures
        if "seedream" in body["model"]:
            self._level(asked)
        exchange = self._api.start("images/generations", to_json(asked), watch)
        del call, body, asked  # they may hold a picture
        late = time.monotonic() + (self.upstream.timeout or ANSWER_TIMEOUT)
        try:
            while not exchange.is_ready(COMMENT_INTERVAL):
                if time.monotonic() > late:  # our own comments are no sign of its life
                    raise UpstreamFailed("no image in time")
                yield None
            images = self._delivered(exchange)
        finally:
            exchange.close()
        yield images

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

    def _delivered(self, exchange: Exchange) -> list[dict[str, Any]]:
        """The entries of the answer, at least one of an image."""
        try:
            document = json_object(read_all(self._api.finish(exchange), MAX_PICTURES))
        except Refused as refused:
            raise policy_refusal(refused.code) or refused from None
        if images := images_of(document):
            return images
        raise image_failure(document)

    def probe(self) -> str:
        return self._api.probe()


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


JIMENG_FIRST_POLL, JIMENG_POLL = 2.0, 2.5  # seconds before the first poll, the others
JIMENG_TIMEOUT = 120.0  # seconds from submit to image


class JiMeng(ImageDialect):
    """`jimeng+https://`: Volcengine's signed submit-and-poll; key "access:secret"."""

    scheme = "jimeng"
    moderation = (50411, 50412, 50413, 50511, 50512, 50518, 50519)
    busy = (50429, 50430)

    @classmethod
    def flat(cls, id: str) -> frozenset[str]:
        return frozenset({"size"})

    def examine(self, call: Call) -> None:
        super().examine(call)
        if (call.body.get("n") or 1) > 1:
            raise BadRequest("This model makes one image a request.", param="n")
        if len(self.prompt(call)) > 800:
            raise BadRequest("The prompt may have at most 800 characters.")
        kinds = {url[:4].lower() for url in self.pictures(call)}
        if len(kinds) > 1:
            told = "This model takes pictures as URLs or as data, not both at once."
            raise BadRequest(told, param="image")

    def make(self, call: Call, body: dict[str, Any], watch: Watch) -> Steps:
        # Without force_single one call can make, and bill, fifteen images.
        task = {"req_key": body["model"], "prompt": self.prompt(call)}
        task |= {"force_single": True} | self._options(body)
        if pictures := self.pictures(call):
            if "t2i_v3" in body["model"]:
                raise BadRequest("This model takes no pictures.", param="image")
            linked = pictures[0][:4].lower() == "http"
            name = "image_urls" if linked else "binary_data_base64"
            task[name] = [url if linked else url.partition(",")[2] for url in pictures]
        data, model = self._call("CVSync2AsyncSubmitTask", task, watch), body["model"]
        inline = call.body.get("response_format") == "b64_json"
        del call, body, task, pictures  # they may be large
        id = data.get("task_id")
        if not isinstance(id, str) or not re.fullmatch(r"[\w-]{1,64}", id):
            raise UpstreamFailed("no task id")
        deadline = time.monotonic() + JIMENG_TIMEOUT
        pause = JIMENG_FIRST_POLL
        while time.monotonic() < deadline:
            yield None
            watch.sleep(pause)
            pause = JIMENG_POLL
            if images := self._poll(model, id, inline, watch):
                yield images
                return
            watch.hears()
        raise UpstreamFailed(f"task {id} was not done in time")

    @staticmethod
    def _options(body: dict[str, Any]) -> dict[str, Any]:
        """What the vendor takes besides the prompt; OpenAI's size as width, height."""
        names = ("width", "height", "scale", "seed")
        options = {name: body[name] for name in names if body.get(name) is not None}
        size = body.get("size")
        if size not in (None, "auto"):
            match = re.fullmatch(r"(\d{2,4})x(\d{2,4})", str(size))
            if not match:
                raise BadRequest("'size' must read like 1024x1024.", param="size")
            options |= {"width": int(match[1]), "height": int(match[2])}
        return options

    def _poll(
        self, model: str, id: str, inline: bool, watch: Watch
    ) -> list[dict] | None:
        """The task's image, as base64 or as its URL; None while it is being made.

        The submitted task may still be billed: whatever fails now must not be
        repeated by the client.
        """
        options = to_json({"return_url": not inline}).decode()
        query = {"req_key": model, "task_id": id, "req_json": options}
        try:
            data = self._call("CVSync2AsyncGetResult", query, watch)
        except UpstreamFailed as error:
            if error.transient:
                return None
            raise UpstreamFailed(f"task {id}: {error.reason}") from None
        if (status := data.get("status")) in ("in_queue", "generating"):
            return None
        urls = data.get("binary_data_base64" if inline else "image_urls")
        if status != "done" or not isinstance(urls, list):
            known = status if status in ("not_found", "expired", "done") else "unknown"
            raise UpstreamFailed(f"task {id}: {known}")
        urls = [url for url in urls if isinstance(url, str) and url]
        if not urls:
            raise UpstreamFailed(f"task {id}: no image")
        return [{"b64_json" if inline else "url": urls[0]}]

    def _call(self, action: str, document: dict[str, Any], watch: Watch) -> dict:
        """`data` of a successful call; raises Refused or UpstreamFailed."""
        exchange = Exchange(self.pool, watch)
        path, body, headers = self._signed(action, document)
        exchange.send(path, body, header_lines(headers))
        try:
            answer = exchange.receive()
            return self._data(answer.status, read_all(answer))
        finally:
            exchange.close()

    def _signed(self, action: str, document: dict[str, Any]) -> tuple[str, bytes, dict]:
        """(path, body, headers) of a call."""
        body, query = to_json(document), f"Action={action}&Version=2022-08-31"
        access, _, secret = self.upstream.key.partition(":")
        headers = volcengine_signature(
            access, secret, self.pool.host, query, body, time.gmtime()
        )
        return f"{self.upstream.path}/?{query}", body, headers

    def _data(self, status: int, answer: bytes) -> dict[str, Any]:
        reply = json_object(answer)
        data = reply.get("data")
        if reply.get("code") == 10000 and isinstance(data, dict):
            return data
        raise self._failure(status, reply)

    def _failure(self, status: int, reply: dict[str, Any]) -> ProxyError:
        """What an error of either layer means: the business code, or the gateway's."""
        code = reply.get("code")
        if code in self.moderation:
            return Moderated()
        if code in self.busy or (status == 429 and code is None):
            return UpstreamFailed(f"code {code}", 2, Generated.NOTHING, True)
        if code is None or code == 50400:
            if 400 <= status < 500:
                return UpstreamFailed(f"status {status}", None, Generated.NOTHING)
            wait = 2 if status >= 500 else None
            return UpstreamFailed(f"status {status}", wait, transient=True)
        known = code if type(code) is int else "unknown"
        return UpstreamFailed(f"code {known}", wait=2)

    def probe(self) -> str:
        """Polls a made-up task: what comes back tells whether the keys are known."""
        query = {"req_key": "jimeng_t2i_v40", "task_id": "0"}
        answer = self.ask("POST", *self._signed("CVSync2AsyncGetResult", query))
        try:
            self._data(answer.status_code, answer.content)
        except Refused:
            pass
        except UpstreamFailed as error:
            # A business error was answered by the service, behind the signature.
            if not error.reason.startswith("code "):
                return error.reason
        return ""


MAX_ECHO = 1 << 20  # bytes of all choices: a public key may ask for them


class Echo(Dialect):
    """`echo:`: answers with the last user message; words count as tokens."""

    scheme = "echo"
    options = ""
    paths = ("chat/completions",)

    def examine(self, call: Call) -> None:
        super().examine(call)
        if call.size * call.choices > MAX_ECHO:
            raise BadRequest("The answers would be too long.", param="n")

    def send(self, call: Call, body: dict[str, Any], watch: Watch) -> Answer:
        limit = min((body[name] for name in CAPS if body.get(name)), default=None)
        # Behind the last word the blanks would be searched from each of them on.
        words = re.findall(r"\s*\S+", message_text(last_user_message(body)).rstrip())
        finish = "length" if limit is not None and len(words) > limit else "stop"
        words, choices = words[:limit], body.get("n") or 1
        asked = sum(len(message_text(each).split()) for each in body["messages"])
        usage = {"prompt_tokens": asked, "completion_tokens": len(words) * choices}
        usage["total_tokens"] = sum(usage.values())
        told, model = (usage, finish, choices), body["model"]
        if call.stream:
            return Answer(completion_events(model, "", words, *told), True)
        return Answer([to_json(completion(model, "".join(words), *told))], False)


# Meter -------------------------------------------------------------------------------

LAST_EVENTS = {  # of streams that have no [DONE]: /v1/responses, /v1/messages, audio
    "response.completed": Ending.DONE,
    "response.incomplete": Ending.DONE,
    "response.failed": Ending.FAILED,
    "message_stop": Ending.DONE,
    "transcript.text.done": Ending.DONE,
    "speech.audio.done": Ending.DONE,
}
NO_FINISH = (None, "", "null")  # as servers write it
# After which they may tell what was used.
ENDS_OF_PARTS = (
    "response.output_text.done", "response.content_part.done", "content_block_stop",
    "response.output_item.done", "message_delta",
)  # fmt: skip
# What ends a stream of messages of which nothing else is missing.
MESSAGE_STOP = b'event: message_stop\ndata: {"type": "message_stop"}\n\n'
# Possessive: a way back for each character would take 130 bytes of memory for it.
MODEL_NAME = re.compile(rb'"model"\s*:\s*"((?:[^"\\]++|\\.)*+)"')


class Renaming:
    """Puts the client's name of the model where the upstream's stands."""

    def __init__(self, name: str):
        self._name = name
        self._theirs: str | None = None
        self._old = self._new = b""  # `"model": "..."` as the upstream writes it, and ours

    def apply(self, data: bytes, document: dict[str, Any]) -> bytes:
        """The answer or event, of which `document` is what it says."""
        holder = document.get("response") or document.get("message")
        holder = holder if isinstance(holder, dict) else document
        theirs = holder.get("model")
        if theirs == self._name or not isinstance(theirs, str):
            return data
        if theirs != self._theirs or self._old not in data:
            for match in MODEL_NAME.finditer(data):
                if json.loads(b'"' + match[1] + b'"') == theirs:
                    break
            else:
                return data
            start = match.start(1) - match.start() - 1
            self._theirs, self._old = theirs, match[0]
            self._new = match[0][:start] + to_json(self._name)
        return data.replace(self._old, self._new)


def read_whole(
    data: bytes, call: Call, price: Price, images: int | None
) -> tuple[dict[str, Any], Usage | None]:
    """(document, reported usage) of a JSON answer; `images`: those that the dialect
    counted. Raises UpstreamFailed for what is none."""
    try:
        document = json.loads(data.decode())
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise UpstreamFailed("no JSON object")
    usage = read_usage(document, call.path not in NO_OUTPUT)
    if images is None and "data" in document:
        images = len(images_of(document))
    if images and usage is None and (price.image or not price.output):
        usage = Usage()
    return document, replace(usage, images=images) if images and usage else usage


MAX_ASSEMBLED = 2 << 20  # bytes: each chunk copies what is joined, a second at 4 MB
# Texts of a delta that come in parts; what else comes again is the same.
DELTA_TEXTS = {"content", "text", "refusal", "arguments"}
DELTA_TEXTS |= {"reasoning", "reasoning_content"}


def joined(one: Any, other: Any, name: str = "") -> Any:
    """Two chunks as one; `name`: the member that they are."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one | {key: joined(one.get(key), other[key], key) for key in other}
    if isinstance(one, list) and isinstance(other, list):
        for item in other:
            index = item.get("index") if isinstance(item, dict) else None
            indices = [each.get("index") for each in objects(one)]
            if index is None or index not in indices:
                one = [*one, item]
            else:
                at = indices.index(index)
                one = [*one[:at], joined(one[at], item), *one[at + 1 :]]
        return one
    if name in DELTA_TEXTS and isinstance(one, str) and isinstance(other, str):
        return one + other
    return one if other is None else other


def assembled(data: bytes, path: str) -> bytes:
    """The JSON answer that a stream tells which nobody asked for, or its error; raises
    UpstreamFailed for one that is not whole, or of a path that has no such form."""
    reader, whole = EventReader(), {}
    for event in [*reader.feed(data), *reader.flush()]:
        document = json_object(event_data(event))
        if document.get("error"):
            return to_json(document)
        if path == "responses" and document.get("type") in LAST_EVENTS:
            whole = document.get("response")
        elif path in DONE_PATHS:
            for choice in objects(document.get("choices")):
                if "delta" in choice:
                    choice["message"] = choice.pop("delta")
            whole = joined(whole, document)
    ends = [one.get("finish_reason") for one in objects((whole or {}).get("choices"))]
    if not whole or (path in DONE_PATHS and not (ends and all(ends))):
        raise UpstreamFailed("a stream that nobody asked for, and not whole")
    if path == "chat/completions":
        whole["object"] = "chat.completion"
    return to_json(whole)


def in_chunks(document: dict[str, Any], path: str) -> bytes:
    """The stream that was asked for where a JSON answer came; raises UpstreamFailed for
    a path that has no such form."""
    if path not in DONE_PATHS:
        raise UpstreamFailed("no stream, which was asked for")
    head = {name: document[name] for name in document.keys() - {"choices", "usage"}}
    if path == "chat/completions":
        head["object"] = "chat.completion.chunk"
    choices = objects(document.get("choices"))
    for choice in choices:
        choice["finish_reason"] = choice.get("finish_reason") or "stop"
        if "message" in choice:
            delta = choice["delta"] = choice.pop("message") or {}
            for index, call in enumerate(objects(delta.get("tool_calls"))):
                call.setdefault("index", index)
    usage = {"choices": [], "usage": document.get("usage")}
    return sse(head | {"choices": choices}) + sse(head | usage) + DONE


class Meter:
    """Reads each event of one stream once: bytes in, bytes out, what was counted.

    `ending` is set by what ends a stream: then `last` is its last event, not among the
    bytes passed on, since it must not leave before the charge is on disk. CUT: the
    upstream told an error instead.
    """

    kind = STREAM_TYPE

    def __init__(self, call: Call):
        self._call = call
        self._reader = EventReader()
        self.usage: Usage | None = None  # as the upstream reported it
        self.relayed = 0  # what the text passed on weighs
        self.events = 0  # with data
        self.ending: Ending | None = None
        self.error: dict[str, Any] = {}  # the event that told of one
        self.last = b""
        self.report_due = False  # what follows at once is the report
        self._finishes: set[Any] = set()  # indices of choices that have their finish
        self._rename = Renaming(call.model)

    @property
    def held(self) -> int:
        """Bytes of an event that is not complete yet."""
        return self._reader.size

    @property
    def finished(self) -> bool:
        """Whether each choice has its finish, or the last event was read."""
        if self.ending in (Ending.DONE, Ending.FAILED):
            return True
        return len(self._finishes) >= self._call.answers

    def feed(self, data: bytes) -> bytes:
        """What the client gets of these bytes; raises UpstreamFailed."""
        return self._pass(self._reader.feed(data))

    def end(self) -> bytes:
        """The same of what is left when the upstream says no more."""
        out = self._pass(self._reader.flush())
        if self.ending is None and self.finished:
            self._finish(DONE)
        return out

    def _finish(self, done: bytes) -> None:
        """The end of a stream whose choices have their finish, which not all have."""
        early = self._call.path in FINISH_PATHS and not self._finishes
        self.ending = Ending.CUT if early else Ending.DONE
        self.last = MESSAGE_STOP if is_messages(self._call.path) else done

    def _pass(self, events: list[bytes]) -> bytes:
        out = []
        for event in events:
            out.append(self._read(event))
            if self.ending:
                break
        return b"".join(out)

    def _read(self, event: bytes) -> bytes:
        """Counts one event; what of it passes on."""
        data = event_data(event)
        if not data:
            return event
        self.events += 1
        if data.strip() == b"[DONE]":
            self._finish(event)
            return b""
        document = json_object(data)
        if not document:
            return event
        kind = document.get("type")
        if document.get("error") or kind == "error":
            self.ending, self.error = Ending.CUT, document
            return b""
        self.relayed += written(document)
        if usage := read_usage(document):
            self.usage = larger(usage, self.usage or usage)
        choices = document.get("choices")
        if type(choices) is list:
            for choice in choices:
                finish = choice.get("finish_reason") if type(choice) is dict else None
                if finish not in NO_FINISH:
                    index = choice.get("index")
                    self._finishes.add(index if type(index) is int else 0)
            if not choices and "usage" in document and not self._call.wants_usage:
                return b""
        elif kind == "message_delta" and type(document.get("delta")) is dict:
            if document["delta"].get("stop_reason"):
                self._finishes.add(0)
        event = self._rename.apply(event, document)
        self.report_due = self.finished or kind in ENDS_OF_PARTS
        if type(kind) is str and kind in LAST_EVENTS:
            self.ending, self.last = LAST_EVENTS[kind], event
            return b""
        return event


REPORT_END = 64 << 10  # bytes at both ends of a long answer, where it tells its usage
USAGE = re.compile(rb'"usage"\s*:\s*(\{(?:[^{}]++|\{[^{}]*+\})*+\})')


class Passage:
    """A Meter of what is no stream of events: audio, a text, a JSON answer too long to
    be held. It passes as it comes, but for what the charge has to be written before:
    the last byte, of JSON as much as its report may need.
    """

    error: dict[str, Any] = {}
    report_due = False
    held = 0

    def __init__(self, call: Call, price: Price, kind: str):
        self.kind = kind
        self._call, self._json = call, kind == "application/json"
        self._pictures = call.path in PICTURES
        pictures = call.answers if price.image and self._pictures else 0
        self.usage = Usage(images=pictures) if pictures else None
        self._kept = REPORT_END if self._json else 1  # bytes
        self._tail = b""
        self.relayed = self.events = 0
        self.ending: Ending | None = None
        self.last = b""

    @property
    def finished(self) -> bool:
        return self.ending is Ending.DONE

    def feed(self, data: bytes) -> bytes:
        """What the client gets by now."""
        if self._json and not self.events:
            data = self._read(data[:REPORT_END]) + data[REPORT_END:]
        self.events += 1
        data = self._tail + data
        out, self._tail = data[: -self._kept], data[-self._kept :]
        # Pictures weigh more than their hold, which an estimate does not exceed.
        self.relayed += len(out) if self._pictures else bool(out)
        return out

    def end(self) -> bytes:
        if not self.events:
            raise UpstreamFailed("an empty answer")
        if self._json and not self._tail.rstrip().endswith(b"}"):
            raise UpstreamFailed("no whole JSON object")
        self.ending = Ending.DONE
        self.last = self._read(self._tail) if self._json else self._tail
        return b""

    def _read(self, part: bytes) -> bytes:
        """One end of a JSON answer, under the client's name of the model."""
        for match in USAGE.finditer(part):
            document = {"usage": json_object(match[1])}
            found = read_usage(document, self._call.path not in NO_OUTPUT)
            if found:
                self.usage = replace(found, images=(self.usage or found).images)
        name = b'"model":' + to_json(self._call.model)
        return MODEL_NAME.sub(lambda match: name, part)


# Relay -------------------------------------------------------------------------------

STREAM_HEADERS = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}
COMMENTS_WAIT = 5.0  # seconds that comments before the first event may be held back
BELIEVED = 4  # times its hold may be charged for a prompt that its body shows whole
SETTLE_PATIENCE = 10.0  # seconds that an answer's end waits for a ledger in trouble
AT_ONCE = 32 << 10  # bytes of answers that the system takes, whether they are read or not
KEPT_BODY = 512 << 10  # bytes of memory; what is smaller is not worth its counting
PLAIN_WORD = re.compile(r"[\w.:/+@%-]+")


def stamp(now: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))


def logfmt(value: Any) -> str:
    """A value of a log line; quoted unless it is one plain word."""
    text = "" if value is None else str(value)
    return text if PLAIN_WORD.fullmatch(text) else json.dumps(text)


class RequestLog:
    """Lines of logfmt for standard error, written by the watcher's thread.

    A log that is full or closed must not stop a request, so lines are dropped
    rather than waited for.
    """

    def __init__(self) -> None:
        self._lines: deque[tuple[float, str, dict[str, Any]]] = deque(maxlen=10_000)

    def note(self, event: str, **fields: Any) -> None:
        self._lines.append((time.time(), event, fields))

    def broken(self, id: str | None, error: Exception) -> None:
        """A fault of ours; its text may hold a prompt: the kind and the place are told."""
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__} at {place.name}:{place.lineno}"
        self.note("exception", request=id, reason=reason)

    def request(self, lease: Lease, model: str, charge: Charge) -> None:
        """The one line of a request that was let in."""
        usage = charge.usage or Usage()
        self.note(
            "request", request=lease.id, account=lease.account, key=lease.key,
            model=model, status=charge.status, input=usage.input, cached=usage.cached,
            written=usage.written, output=usage.output, images=usage.images,
            cost=f"{charge.cost / MICRO:.6f}", estimated=int(usage.estimated),
            ttfb_ms=charge.ttfb, duration_ms=charge.duration,
        )  # fmt: skip

    def flush(self) -> None:
        """Writes what a reader takes: a stopped terminal stops nobody."""
        poll = select.poll()
        poll.register(2, select.POLLOUT)
        while self._lines and poll.poll(0):  # for a line, of many some may be cut
            line = self._line(*self._lines.popleft())
            with contextlib.suppress(OSError):
                os.write(2, line.encode("utf-8", "replace"))

    @staticmethod
    def _line(now: float, event: str, fields: dict[str, Any]) -> str:
        parts = [f"{name}={logfmt(value)}" for name, value in fields.items()]
        return f"time={stamp(now)} event={event} {' '.join(parts)}\n"


class Services:
    """Everything that one application owns. `capacity` bounds its relays at once."""

    def __init__(self, config_file: ConfigFile, db: str, capacity: float):
        self.config_file, self.capacity = config_file, capacity
        self.room = Room(BODY_ROOM)
        self.pid, self.config = os.getpid(), config_file.current
        self.ledger, self.log = Ledger(db, worker=True), RequestLog()
        if self.ledger.trouble:
            self.log.note("ledger", reason=self.ledger.trouble)
        self._dialects: dict[UpstreamConfig, Dialect] = {}  # kept while keys.json changes
        self.limiter = Limiter(
            key_func=lambda: g.key.id, storage_uri="sqlite://",
            storage_options={"rows": self.ledger.read}, strategy="moving-window",
        )  # fmt: skip
        self.reload()  # the file may have changed since the master read it
        self.watcher = Watcher(self.upkeep)

    def dialect(self, upstream: UpstreamConfig) -> Dialect:
        """The upstream's dialect, with its connections."""
        found = self._dialects.get(upstream)
        if found is None:
            found = DIALECTS[upstream.dialect](upstream)
            found = self._dialects.setdefault(upstream, found)
        return found

    def reload(self) -> None:
        wrong = self.config_file.refresh()
        if self.config is not self.config_file.current:
            self.config = self.config_file.current
            routes = [model.routes for model in self.config.models.values()]
            asked = {upstream for upstream, _ in itertools.chain(*routes)}
            for upstream, dialect in list(self._dialects.items()):
                dialect.refused.clear()  # the operator may have mended it
                if upstream not in asked:  # its key may be an old one
                    del self._dialects[upstream]
            wrong = "read again, and good"
        elif wrong:
            wrong += "; the last good one is kept"
        if wrong and self.ledger.speaks():
            self.log.note("config", reason=wrong)

    def upkeep(self) -> None:
        """What no request should wait for; in the watcher's thread."""
        self.reload()
        for dialect in list(self._dialects.values()):
            dialect.pool.tidy()
        self.log.flush()

    def close(self) -> None:
        """Ends what runs and writes what is left; its threads end."""
        self.watcher.close()
        for dialect in self._dialects.values():
            dialect.pool.tidy(closing=True)
        self.ledger.close()
        self.log.flush()


class Relay:
    """One admitted request: forwards, meters and settles. Outlives the view.

    An iterable with an idempotent `close()`: a generator's `finally` never runs on a
    response that is closed before its first item.
    """

    def __init__(
        self, services: Services, call: Call, model: Model, lease: Lease, watch: Watch,
        share: Share,
    ):  # fmt: skip
        self.call, self.model, self.lease, self.watch = call, model, lease, watch
        self._services, self._share = services, share
        self._meter: Meter | Passage | None = None  # of what passes in pieces
        self._usage: Usage | None = None  # as a JSON answer reported it
        self._weight = 0  # of its text
        self._answer: Answer | None = None
        self._pieces: Iterator[bytes] = iter(())  # what of a stream is still to pass on
        self._started = time.monotonic()
        self._ttfb: int | None = None  # milliseconds
        self._charge: Charge | None = None  # how it ended, once the ledger was told
        self._begin = b""  # of the answer
        self._body = share.size  # bytes of it that the body takes, until it is dropped
        self._closed = False
        self._upstream: str | None = None  # that was asked last
        self._attempts = 0

    def respond(self) -> Response:
        """The response; whatever fails before its first byte is raised, and free."""
        try:
            self._begin = self._send()
            self._drop_body()
            if self._meter is not None:
                kind = self._meter.kind
                kind += "; charset=utf-8" if kind.startswith("text/") else ""
                return Response(self, 200, STREAM_HEADERS, None, kind, True)
            self._answer.close()
            self._settle(Ending.DONE)
        except Ended as ended:
            self._usage, self._weight = None, 0  # nothing of it was relayed
            self._give_up(ended.ending)
            raise ended.failure() from None
        except BaseException as error:
            # A name for the error here would keep what its frames have read.
            broken = None if isinstance(error, ProxyError) else ProxyError("")
            self._give_up(Ending.REFUSED, broken or error)
            raise
        self.watch.answers()
        length = {"Content-Length": str(len(self._begin))}
        return Response(self, 200, length, None, "application/json", True)

    def _send(self) -> bytes:
        """Asks the upstreams in turn while nothing can have been generated; what the
        answer of one begins with."""
        failed = refused = lacking = None  # what was asked tells more than what was not
        find = self._services.dialect
        routes = [(find(upstream), id) for upstream, id in self.model.routes]
        for dialect, id in sorted(routes, key=lambda route: route[0].pool.rests):
            try:
                dialect.examine(self.call)
            except UpstreamFailed as error:
                lacking = lacking or error
                self._note_failure(dialect.upstream, error)
                continue
            except ProxyError as error:
                refused = refused or error
                continue
            self._upstream, self._attempts = dialect.upstream.name, self._attempts + 1
            try:
                self._answer = self._ask(dialect, id)
                return self._open(dialect.upstream.secrets)
            except UpstreamFailed as error:
                failed = error
                self._note_failure(dialect.upstream, error)
                if error.generated is Generated.PERHAPS:
                    break
                if self._answer is not None:
                    self._answer.close()
                    self._answer = self._meter = None
        try:
            raise failed or refused or lacking
        finally:  # a frame that names its exception keeps what it read until the next gc
            failed = refused = lacking = None

    def _open(self, secrets: tuple[str, ...]) -> bytes:
        """A JSON answer, or the beginning of a stream; an error that an upstream tells
        inside of a success is raised as if it were told by a status."""
        answer, call, price = self._answer, self.call, self.model.price
        if answer.stream and call.stream:
            self.watch.streams()  # it must not fall silent from here on
        if call.path in OTHER_KINDS and answer.kind not in ("application/json", STREAM_TYPE):
            return self._pass_on(Passage(call, price, answer.kind), answer, secrets)
        streams, pieces = begun(answer)
        if streams and (call.stream or call.path not in FINISH_PATHS):
            return self._pass_on(Meter(call), pieces, secrets)
        data = read_some(pieces, MAX_ANSWER, self._hold)
        if len(data) > MAX_ANSWER:
            if streams or call.path not in NO_OUTPUT | PICTURES:
                raise UpstreamFailed(f"an answer over {MAX_ANSWER} bytes")
            pieces = itertools.chain([data], pieces)
            return self._pass_on(Passage(call, price, "application/json"), pieces, secrets)
        if streams and len(data) > MAX_ASSEMBLED:
            raise UpstreamFailed("a long stream that nobody asked for")
        if streams:
            data = assembled(data, call.path)
        document, usage = read_whole(data, call, price, answer.images)
        if document.get("error"):
            error = unwrapped(document)
            raise failure_of(told_status(error), error, secrets)
        if call.stream and call.path in FINISH_PATHS:
            return self._pass_on(Meter(call), [in_chunks(document, call.path)], secrets)
        self._hear()
        self._usage, self._weight = usage, written(document)
        return Renaming(self.call.model).apply(data, document)

    def _pass_on(
        self, meter: Meter | Passage, pieces: Iterable[bytes], secrets: tuple[str, ...]
    ) -> bytes:
        """What a stream begins with, its first event for one: an error there is still
        told by a status. Comments before it leave after COMMENTS_WAIT."""
        self.watch.streams()
        self._meter, self._pieces = meter, self._passed(pieces, secrets)
        begin, late = b"", time.monotonic() + COMMENTS_WAIT
        for data in self._pieces:
            begin += data
            if self._ttfb is not None or time.monotonic() > late:
                break
        return begin

    def _drop_body(self) -> None:
        """A stream may last for half an hour, an answer is read slowly."""
        if self._share.size > KEPT_BODY:
            self.call = without_body(self.call)
        self._body = 0
        self._share.keep(len(self._begin))

    def _hold(self, size: int) -> None:
        """So many bytes of an answer wait here."""
        if max(size, self._share.size - self._body) > KEPT_BODY:
            self._share.keep(self._body + size)

    def _note_failure(self, upstream: UpstreamConfig, error: UpstreamFailed) -> None:
        note = {"upstream": upstream.name, "reason": error.reason}
        self._services.log.note("upstream", request=self.lease.id, **note)

    def _ask(self, dialect: Dialect, id: str) -> Answer:
        """Asks one upstream; again without what it refuses of our own additions, which
        is remembered once it helped. A refusal has generated nothing."""
        known = refused = dialect.refused.get(id, frozenset())
        certain = True
        while True:
            tokens = self.lease.tokens
            body, ours = compose(self.call, self.model, dialect, id, tokens, refused)
            self.watch.asks(dialect.upstream.timeout)
            try:
                answer = dialect.send(self.call, body, self.watch)
            except Refused as error:
                more = refused_additions(error, ours, refused)
                if not more:
                    raise explained(error, self.call, ours) from None
                refused |= more
                certain &= names_by_itself(error, more, self.call)
                continue
            if certain and refused is not known and len(dialect.refused) < MAX_REFUSED:
                dialect.refused[id] = refused
            return answer

    def __iter__(self) -> Iterator[bytes]:
        try:
            if self._meter is None:  # the place is free again before the last byte
                if len(self._begin) > AT_ONCE:
                    yield self._begin[:-1]
                    self._begin = self._begin[-1:]
                self.close()
            begin, self._begin = self._begin, b""
            yield begin
            if self._meter is None:
                return
            del begin
            yield from self._pieces
            self._settle(self._meter.ending)
            yield self._meter.last
        except Ended as ended:  # who left may have closed its own side only, and reads
            yield self._break(ended.ending, ended.failure())
        except ProxyError as error:
            yield self._break(Ending.CUT, error)
        except Exception as error:
            self._services.log.broken(self.lease.id, error)
            yield self._break(Ending.CUT, ProxyError("Something went wrong here."))

    def _passed(
        self, pieces: Iterable[bytes], secrets: tuple[str, ...]
    ) -> Iterator[bytes]:
        """Events as they come, but for the last one; raises what cuts the stream."""
        meter = self._meter
        try:
            for data in pieces:
                self.watch.due = math.inf  # what takes long from here on is the client
                out = meter.feed(data)
                if meter.held or self._share.size:
                    self._hold(meter.held)
                self.watch.finished = meter.report_due
                if self._ttfb is None and meter.events:
                    if meter.relayed or not meter.error:
                        self._hear()
                if out:
                    yield out
                if meter.ending:
                    break
                self.watch.check()
                self.watch.hears(FINISH_PATIENCE if meter.finished else math.inf)
        except Ended as ended:  # some servers say no more, and keep the connection
            if not (meter.finished and ended.ending is Ending.TIMED_OUT):
                raise
        if meter.ending is None and (out := meter.end()):
            yield out
        if meter.ending is None:
            raise UpstreamFailed("the stream ended without a finish")
        if meter.ending is Ending.CUT:
            error = unwrapped(meter.error)
            raise failure_of(told_status(error), error, secrets)

    def _hear(self) -> None:
        """The first byte that is no comment's."""
        self._ttfb = int((time.monotonic() - self._started) * 1000)

    def _break(self, ending: Ending, error: ProxyError) -> bytes:
        """The error event that ends a stream which could not end well; what is none of
        events raises ConnectionAbortedError instead, and so ends without its last chunk."""
        if ending is not Ending.LEFT:
            note = {"request": self.lease.id, "reason": error.reason}
            self._services.log.note("stream", **note)
        self._settle_anyhow(self._charged(ending, error))
        if self._meter.kind != STREAM_TYPE:
            raise ConnectionAbortedError(error.reason)
        return error.events(self.call.path, self._meter.events)

    # The end

    def _charged(self, ending: Ending, error: ProxyError | None = None) -> Charge:
        """How it ended; where a name of the ending tells less, with the `error`."""
        usage, finished, weight, price = self._usage, False, self._weight, self.model.price
        if meter := self._meter:
            usage, finished, weight = meter.usage, meter.finished, meter.relayed
            if self._answer.images is not None:
                usage = replace(usage or Usage(), images=self._answer.images)
        used = settled_usage(
            ending, finished, self.watch.sent, usage, weight, self.call, price
        )
        if used and self.call.characters:
            used = replace(used, characters=self.call.characters)
        amount = cost(used, price) if used else 0
        if used and used.estimated:
            amount = min(amount, self.lease.hold)
        bounded = self.call.bounded and not price.reported  # nor is its price shown
        most = BELIEVED * self.lease.hold if bounded else MAX_HOLD
        duration = int((time.monotonic() - self._started) * 1000)
        status, code = ending.status, None if ending is Ending.DONE else ending.reason
        if error and ending in (Ending.REFUSED, Ending.CUT):
            code = type(error).code  # ours: a provider's own may quote the prompt
            status = error.status if ending is Ending.REFUSED else status
        return Charge(
            status, used, amount, most, self._ttfb, duration, code, self._upstream,
            self._attempts,
        )  # fmt: skip

    def _settle(self, ending: Ending) -> None:
        """The charge, before the last byte; a ledger in trouble is waited for."""
        deadline = time.monotonic() + SETTLE_PATIENCE
        charge = self._charged(ending)
        while True:
            try:
                self._write(charge)
                self._charge = charge
                return
            except LedgerUnavailable as error:
                if time.monotonic() > deadline:
                    # The answer was made: a repeat would be billed again.
                    error.headers = {"x-should-retry": "false"}
                    raise
            self.watch.sleep(0.25)

    def _settle_anyhow(self, charge: Charge) -> None:
        """Once, and never raises: what cannot be written now is written later."""
        if self._charge is not None:
            return
        self._charge = charge
        try:
            self._write(charge)
        except LedgerUnavailable as error:
            self._services.ledger.settle_later(self.lease, charge)
            note = {"request": self.lease.id, "reason": error.reason}
            self._services.log.note("ledger", **note)

    def _write(self, charge: Charge) -> None:
        if lost := self._services.ledger.settle(self.lease, charge):
            note = {"request": self.lease.id, "credits": f"{lost / MICRO:.6f}"}
            self._services.log.note("loss", **note)

    def _give_up(self, ending: Ending, error: ProxyError | None = None) -> None:
        """Ends a request whose answer never began."""
        self._settle_anyhow(self._charged(ending, error))
        self.close()

    def close(self) -> None:
        """Ends everything that is still open; what was relayed is charged."""
        if self._closed:
            return
        self._closed = True
        if self._charge is None and self.watch.finished:
            self._read_on()
        self._services.watcher.remove(self.watch)
        self._share.keep(0)
        if self._answer is not None:
            self._answer.close()
        if self._charge is None:
            self._settle_anyhow(self._charged(self.watch.ending or Ending.LEFT))
        self._services.log.request(self.lease, self.call.model, self._charge)

    def _read_on(self) -> None:
        """The report of an answer that was finished when its client left; the watcher
        ends the wait."""
        self.watch.left = min(self.watch.left, time.monotonic())
        with contextlib.suppress(Ended, ProxyError):
            for data in self._answer:
                self._meter.feed(data)
                if self._meter.ending or not self._meter.report_due:
                    break


# Application -------------------------------------------------------------------------

PUBLIC = {"healthz", "documentation", "dashboard", "asset"}
BASES = {path.partition("/")[0] for path in ENDPOINTS} | {"models"}


class RelayedPath(PathConverter):
    """Any path but those of this server's own API: mistyped they are no relay's."""

    regex = r"(?!(?:accounts?|usage|models)(?:/|\Z))[^/].*?"


# Azure's clients name the model in the path, too, which is the body's.
BASE_PATH = re.compile("/*(?:v1/+|openai/+|deployments/+[^/]+/+)*")
ONE_MODEL, SLASHES = re.compile("models/+[^/]"), re.compile("/+")


def fold_path(path: str) -> str:
    """The path that is meant by a base URL with too many slashes, a /v1 too much or
    none, or Azure's with a model; what stands for a model's id is left as it is."""
    start = BASE_PATH.match(path).end()
    rest = path[start:]
    if not ONE_MODEL.match(rest):
        rest = SLASHES.sub("/", rest).rstrip("/")
    known = "v1" in path[:start] or rest.partition("/")[0] in BASES
    return f"/v1/{rest}" if known else f"/{rest}"


def made_key(config: Config, row: KeyRow) -> Key:
    """A key made at run time; an admin account's keys are admin's."""
    admin = bool(row.admin) or config.account(row.account).admin
    given = json.loads(row.terms) if row.terms else {}
    terms = parse_terms(given, models=given.get("models", ())) if given else NO_TERMS
    who = row.id, row.name, row.account, row.hash, row.hint
    return Key(*who, admin, "proxy.db", terms)


def sent_key(environ: dict[str, Any]) -> str:
    """The key that a request shows, as OpenAI's, Anthropic's or Azure's clients do."""
    if header := environ.get("HTTP_AUTHORIZATION"):
        scheme, _, bearer = header.partition(" ")
        return bearer.strip() if scheme.lower() == "bearer" else ""
    return environ.get("HTTP_X_API_KEY") or environ.get("HTTP_API_KEY") or ""


def identify(services: Services, bearer: str) -> tuple[Key, Account]:
    """The key, and its account as this key may use it; or Unauthorized."""
    if not BEARER.fullmatch(bearer):
        raise Unauthorized
    hash, config = sha256(bearer), services.config
    id = key_id(hash)
    key, row = config.keys.get(id), services.ledger.find_key(id)
    if row and row.revoked:
        raise Unauthorized
    if key is None and row and (row.lives or row.account in config.accounts):
        key = made_key(config, row)
    if key is None or key.hash != hash:
        raise Unauthorized
    if key.terms.expired():
        raise Unauthorized
    return key, config.account(key.account).under(key.terms)


def windows_of(relayed: bool) -> Callable[[sqlite3.Connection], list[Window]]:
    """What counts this request in the windows of its key."""
    items = g.account.limits.items if relayed else ACCOUNT_ITEMS
    scope = "relay" if relayed else "account"
    return functools.partial(hit_windows, items, g.key.id, scope)


def count_request(services: Services, hit: Callable) -> None:
    """Counts a request in a transaction of its own, in which its key's `last_used` is
    kept right to a minute, or raises RateLimited."""
    key = g.key

    def operation(db: sqlite3.Connection) -> list[Window]:
        use_key(db, key)
        return hit(db)

    g.windows = services.ledger.write(operation)
    if not g.windows[-1].fits:
        raise g.windows[-1].refusal()


EXPOSED = (
    "x-request-id, x-should-retry, retry-after, x-ratelimit-limit-requests,"
    " x-ratelimit-remaining-requests, x-ratelimit-reset-requests"
)


def is_preflight(environ: dict[str, Any]) -> bool:
    asks = "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ
    return asks and environ["REQUEST_METHOD"] == "OPTIONS"


def cors_headers(config: Config, environ: dict[str, Any]) -> dict[str, str]:
    """What lets the page of an allowed origin read an answer and, told by a preflight,
    send its request (WHATWG Fetch §3.3); empty for all others."""
    origin = environ.get("HTTP_ORIGIN")
    if not origin or not config.cors & {origin, "*"}:
        return {}
    told = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
    told["Access-Control-Expose-Headers"] = EXPOSED
    if is_preflight(environ):
        told["Access-Control-Allow-Methods"] = "GET, POST, PATCH, DELETE"
        told["Access-Control-Max-Age"] = "600"
        if asked := environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS"):
            told["Access-Control-Allow-Headers"] = asked
    return told


def log_unrelayed(log: RequestLog, status: int) -> None:
    """The line of a request that was not let in, or that relays nothing; its path may
    hold anything, the rule does not."""
    key, rule = g.get("key"), request.url_rule
    account, name = (key.account, key.name) if key else (None, None)
    note = {"account": account, "key": name, "route": rule, "status": status}
    if code := g.get("code"):  # of a refusal
        # A name that no model has may be anything.
        note |= {"code": code, "model": g.get("model"), "client": request.remote_addr}
    log.note("request", request=g.get("request_id"), **note)


def add_hooks(app: Flask, services: Services) -> None:
    """Who asks, and what every answer carries."""

    @app.before_request
    def authenticate() -> Response | None:
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
            return None
        if is_preflight(asked.environ) and cors_headers(services.config, asked.environ):
            return Response(status=204)
        try:
            bearer = sent_key(asked.environ)
            here.key, here.account = identify(services, bearer)
        except (Unauthorized, LedgerUnavailable):
            if endpoint is None:  # 404 or 405, whoever asks
                return None
            raise
        if here.key.terms.metrics and endpoint != "metrics":
            raise Unauthorized
        if endpoint != "relay":
            count_request(services, windows_of(False))
        if asked.path.startswith(("/v1/account", "/v1/usage")):
            check_query()
        return None

    @app.after_request
    def add_headers(response: Response) -> Response:
        add, here = response.headers.add, g._get_current_object()
        add("x-request-id", id := here.get("request_id") or new_request_id())
        if is_messages(request.path):
            add("request-id", id)  # where Anthropic's SDKs look for it
        if windows := here.get("windows"):
            window = tightest(windows)
            left = max(0.0, window.reset - time.monotonic())
            add("x-ratelimit-limit-requests", str(window.item.amount))
            add("x-ratelimit-remaining-requests", str(window.left))
            add("x-ratelimit-reset-requests", f"{left:.3f}s")
        if services.config.cors:
            response.headers.extend(cors_headers(services.config, request.environ))
        if not here.get("admitted") and request.endpoint not in PUBLIC:
            log_unrelayed(services.log, response.status_code)
        return response


def tell(error: ProxyError) -> Response:
    """The one place where an error becomes a response."""
    g.code, body = type(error).code, error.envelope(request.path)
    return Response(body, error.status, error.headers, None, "application/json")


def add_error_handlers(app: Flask, services: Services) -> None:
    """How failures are told, counted and logged."""

    @app.errorhandler(ProxyError)
    def refused(error: ProxyError) -> Response:
        # Of what was not admitted the ledger has no row.
        if request.endpoint == "relay" and not g.get("admitted"):
            who = (g.key.account, g.key.id) if g.get("key") else ("", "")
            services.ledger.count_refusal(*who, g.get("model", ""), error.status)
        if isinstance(error, LedgerUnavailable):
            services.log.note("ledger", request=g.request_id, reason=error.reason)
        return tell(error)

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        # The relay alone takes POST and no OPTIONS, whatever the path.
        any_path = getattr(error, "valid_methods", None) == ["POST"]
        if any_path and request.path.removeprefix("/v1/") not in ENDPOINTS:
            return tell(NotFound("There is no such path."))
        return tell(from_http(error))

    @app.errorhandler(Exception)
    def broken(error: Exception) -> Response:
        services.log.broken(g.get("request_id"), error)
        return tell(ProxyError("Something went wrong here."))


# A text of JSON, whole, or a number with an exponent.
EXPONENT_OR_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"|(-?[0-9.]+e-[0-9]+)')


def plain_json(document: Any, indent: int | None = None) -> str:
    """JSON of our own: amounts have six decimals at the most, and no exponent."""
    text = json.dumps(document, ensure_ascii=False, indent=indent)
    if "e-0" not in text:
        return text
    return EXPONENT_OR_TEXT.sub(
        lambda found: amount_text(float(found[1])) if found[1] else found[0], text
    )


def json_response(document: Any, status: int = 200) -> Response:
    body = plain_json(document).encode()
    return Response(body, status, None, None, "application/json")


def list_response(rows: list[dict[str, Any]], **more: Any) -> Response:
    """A list as OpenAI has it; `more` are members beside it."""
    return json_response({"object": "list", "data": rows} | more)


AMOUNTS = {"credits", "granted", "spent", "held", "available"}


def cell(name: str, value: Any) -> str:
    """A value of the column `name` of a table that people read."""
    if value is None or value is False:
        return ""
    if value is True:
        return "yes"
    exact = type(value) is float or (type(value) is int and name in AMOUNTS)
    return f"{value:.6f}" if exact else str(value)


FORMULA = re.compile(r"\s*([=+@]|-(?![0-9.]+$))")  # to a spreadsheet


def csv_text(rows: list[dict[str, Any]]) -> str:
    """Rows as CSV (RFC 4180). No text is a formula to a spreadsheet."""
    out = io.StringIO()
    lines = csv.writer(out)
    lines.writerows([list(rows[0])] if rows else [])
    for row in rows:
        cells = list(map(cell, row.keys(), row.values()))
        lines.writerow(["'" * bool(FORMULA.match(text)) + text for text in cells])
    return out.getvalue()


def listed(rows: list[dict[str, Any]], **more: Any) -> Response:
    """A list in the format that the query string asks for."""
    format = request.args.get("format", "json")
    if format not in ("json", "csv"):
        raise BadRequest("'format' must be json or csv.", param="format")
    if format == "json":
        return list_response(rows, **more)
    return Response(csv_text(rows), content_type="text/csv; charset=utf-8")


def usable(config: Config, account: Account) -> list[Model]:
    """The models that an account may use."""
    return [each for each in config.models.values() if account.may_use(each.id)]


def find_model(services: Services, id: str) -> Model:
    models = services.config.models
    model = models.get(id)
    if model is None or model.wild:  # the longest that it begins with
        wild = [each.called(id) for each in models.values() if each.wild]
        model = max(filter(None, wild), key=lambda each: len(each.id), default=None)
    if model is None or not g.account.may_use(model.id):
        raise ModelNotFound(
            f"The model {id!r} does not exist, or this account may not use it.",
            param="model",
        )
    return model


def model_entry(config: Config, model: Model) -> dict[str, Any]:
    about = {"id": model.id, "object": "model", "created": config.loaded}
    return about | {"owned_by": model.routes[0][0].name}


SMALL_BODY = 10_000  # bytes: reading them costs no more than refusing the request


def admit(services: Services, path: str, watch: Watch, share: Share) -> Relay:
    """The relay of a request that may run; raises why it may not.

    A large body is counted before it is read; a small one in the transaction that
    admits it (a commit of its own was 5% of a request's CPU), or when it is refused.
    """
    here, environ, hit = g._get_current_object(), request.environ, windows_of(True)
    announced = environ.get("CONTENT_LENGTH") or ""
    packed = "HTTP_CONTENT_ENCODING" in environ
    if packed or not announced.isdigit() or int(announced) >= SMALL_BODY:
        count_request(services, hit)
    try:
        check_path(path)
        with watch.receiving() as arrived:
            kinds = ("application/json", FORM) if path in FORMS else ("application/json",)
            limit = MAX_ECHO if here.account.demo else MAX_BODY  # whoever has that key
            data = read_body(environ, limit, share, arrived, kinds)
        form = environ["CONTENT_TYPE"] if media_type(environ) == FORM else ""
        call = parse_call(path, data, passed_headers(path, environ), form)
        del data
        model = find_model(services, call.model).at(time.time())
        here.model = model.id
        refuse_unpriced(call.body | dear_betas(call.headers), model)
        refuse_priceless(call, model)
        worst = quote(call, model)
    except ProxyError:
        if not here.windows:
            count_request(services, hit)
        raise
    admission = services.ledger.admit(
        here.request_id, here.key, here.account, worst, model.id, path, call.stream,
        (lambda db: here.windows) if here.windows else hit,
        call.model if model.wild else None,
    )  # fmt: skip
    here.windows = admission.windows
    if isinstance(admission.outcome, ProxyError):
        raise admission.outcome
    here.admitted = True
    return Relay(services, call, model, admission.outcome, watch, share)


def start_relay(services: Services, path: str) -> Response:
    """Everything between the key and the upstream's answer, on one of the places."""
    watch = Watch(request.environ.get("gunicorn.socket"), g.account.id)
    share = Share(services.room, g.account.id)
    if not services.watcher.add(watch, services.capacity):
        count_request(services, windows_of(True))
        raise Overloaded("The server has no room at the moment.", wait=1)
    try:
        return admit(services, path, watch, share).respond()
    except BaseException:
        services.watcher.remove(watch)
        share.keep(0)
        raise


def add_routes(app: Flask, services: Services) -> None:
    """What clients of the OpenAI API ask for."""

    @app.get("/healthz")
    def healthz() -> Response:
        if services.ledger.trouble:
            raise LedgerUnavailable(services.ledger.trouble)
        return json_response({"status": "ok"})

    @app.post("/v1/<relayed:path>", provide_automatic_options=False)
    def relay(path: str) -> Response:
        return start_relay(services, path)

    @app.get("/v1/models")
    def models() -> Response:
        config = services.config
        allowed = usable(config, g.account)
        listed = [model_entry(config, model) for model in allowed if not model.wild]
        return list_response(listed)

    @app.get("/v1/models/<path:id>")
    def model(id: str) -> Response:
        entry = model_entry(services.config, find_model(services, id))
        return json_response(entry | {"id": id})


ONE_ACCOUNT = "/v1/accounts/<account>"


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


# What query strings may hold, by the end of the route; elsewhere they are ignored.
QUERIES = {
    "accounts": "limit after", "keys": "limit after", "grants": "limit after",
    "usage": "days by format",
    "requests": "limit after since until model key status failed format",
}  # fmt: skip


def check_query() -> None:
    """Raises BadRequest for what the account, usage and admin routes do not know."""
    for name in request.args:
        if name not in QUERIES.get(request.path.rpartition("/")[2], "").split():
            raise BadRequest(f"The parameter {name!r} is not known here.", param=name)


def integer_argument(name: str, default: int, highest: int) -> int:
    """A whole number of the query string, from 1 to `highest`."""
    text = request.args.get(name, str(default))
    if not re.fullmatch("[0-9]{1,12}", text) or not 1 <= int(text) <= highest:
        raise BadRequest(f"'{name}' must be from 1 to {highest}.", param=name)
    return int(text)


PAGE = 100  # entries of a list, unless its reader says how many


def budget_entry(ledger: Ledger, key: Key) -> dict[str, Any] | None:
    """What a key's budget has left, and the unix second at which its next window
    begins; None if it has no budget."""
    budget = key.terms.budget
    if budget is None:
        return None
    since, until = budget.window(int(time.time()) // DAY)
    [(spent, held)] = ledger.read(USED, key.id, since, until)
    parts = {"credits": budget.most, "spent": spent, "held": held}
    parts["available"] = max(0, budget.most - spent - held)
    entry = {name: to_credits(micro) for name, micro in parts.items()}
    entry["per"] = budget.per
    return entry | {"next": None if until == FOREVER else until * DAY}


def key_entry(ledger: Ledger, key: Key, row: KeyRow | None) -> dict[str, Any]:
    """A key as lists show it; times in unix seconds."""
    entry = {"id": key.id, "account": key.account, "name": key.name, "hint": key.hint}
    entry |= {"source": key.source, "admin": key.admin}
    entry |= {"created": row and row.created, "last_used": row and row.used}
    entry |= {"revoked": row and row.revoked}
    entry |= dict.fromkeys(TERMS.split()) | key.terms.written
    return entry | {"budget": budget_entry(ledger, key), "metrics": key.terms.metrics}


def key_entries(
    config: Config, ledger: Ledger, account: str, after: str = "", limit: int = 2**31
) -> list[dict[str, Any]]:
    """At most `limit` keys of an account, from behind the one with the id `after` on:
    declared ones, then those made at run time."""
    declared = config.accounts.get(account)
    own = declared.keys if declared else ()
    ids = [key.id for key in own]
    first = ids.index(after) + 1 if after in ids else len(ids) if after else 0
    shown = own[first : first + limit]
    rows = ledger.key_rows([key.id for key in shown])
    found = [key_entry(ledger, key, rows.get(key.id)) for key in shown]
    after = "" if after in ids else after
    for row in ledger.made_keys(account, ids, after, limit - len(found)):
        if row.former and not declared:
            row = row._replace(revoked=row.revoked or row.made)
        found.append(key_entry(ledger, made_key(config, row), row))
    return found


def known_key(
    config: Config, ledger: Ledger, id: str, account: str | None = None
) -> Key:
    """The key with this id, of this account if one is named; or NotFound."""
    key, row = config.keys.get(id), ledger.find_key(id) if id.isascii() else None
    if key is None and row and row.hash:
        key = made_key(config, row)
    if key is None or account not in (None, key.account):
        raise NotFound("There is no such key.")
    return key


def account_names(
    config: Config, ledger: Ledger, after: str = "", limit: int = 2**31
) -> list[str]:
    """The names of at most `limit` accounts of either file above `after`, in order."""
    sql = "SELECT id FROM accounts WHERE id > ? ORDER BY id LIMIT ?"
    names = {id for (id,) in ledger.read(sql, after, limit)}
    names.update([id for id in config.accounts if id > after])
    return sorted(names)[:limit]


BALANCES = """
SELECT value, coalesce(granted, 0), coalesce(spent, 0), coalesce(held, 0)
FROM json_each(?) AS named LEFT JOIN accounts a ON a.id = value ORDER BY named.key
"""
MADE = "SELECT id FROM accounts WHERE made AND id IN (SELECT value FROM json_each(?))"
# Keys made at run time; a former account's live while keys.json declares its name.
LIVE_KEYS = """
SELECT account, count(*) FROM keys WHERE account IN (SELECT value FROM json_each(?1))
    AND (revoked IS NOT NULL) = 0 AND hash IS NOT NULL
    AND (NOT former OR account IN (SELECT value FROM json_each(?2))) GROUP BY account
"""


def balances(
    config: Config, ledger: Ledger, ids: list[str]
) -> dict[str, dict[str, Any]]:
    """The credits of these accounts: granted, spent, held, available; None for what an
    unlimited one has without end."""
    out: dict[str, dict[str, Any]] = {}
    for id, granted, spent, held in ledger.read(BALANCES, json.dumps(ids)):
        granted += config.account(id).credits
        parts = {"granted": granted, "spent": spent, "held": held}
        parts["available"] = max(0, granted - spent - held)
        out[id] = {name: to_credits(micro) for name, micro in parts.items()}
        if config.account(id).credits == UNLIMITED:
            out[id] |= {"granted": None, "available": None}
    return out


def whose_keys(config: Config, ids: list[str]) -> tuple[str, str]:
    """These accounts, and those of them that are declared, for LIVE_KEYS."""
    return json.dumps(ids), json.dumps([id for id in ids if id in config.accounts])


def account_entries(
    config: Config, ledger: Ledger, ids: list[str]
) -> list[dict[str, Any]]:
    """These accounts as the admin's list shows them."""
    made = dict(ledger.read(LIVE_KEYS, *whose_keys(config, ids)))
    declared = [key.id for id in ids for key in config.account(id).keys]
    revoked = {id for id, row in ledger.key_rows(declared).items() if row.revoked}
    opened = {id for (id,) in ledger.read(MADE, json.dumps(ids))} | {*config.accounts}
    entries = []
    for id, credits in balances(config, ledger, ids).items():
        account = config.account(id)
        own = [key for key in account.keys if key.id not in revoked]
        entry = {"id": id, "admin": account.admin, "closed": id not in opened}
        entry["credits"] = credits
        entries.append(entry | {"keys": len(own) + made.get(id, 0)})
    return entries


def live_use(services: Services, account: Account) -> dict[str, int]:
    """What this key has left of its limits."""
    seen = []
    for item in account.limits.items:
        stats = services.limiter.limiter.get_window_stats(item, g.key.id, "relay")
        seen.append(Window(item, True, max(0, stats.remaining), stats.reset_time))
    window = tightest(seen)
    running = services.ledger.read(
        "SELECT count(*) FROM requests WHERE key = ? AND state = 0", g.key.id
    )
    left = {"requests_remaining": window.left, "requests_limit": window.item.amount}
    return left | {"concurrent": running[0][0]}


def price_entry(model: Model) -> dict[str, Any]:
    """A model's prices as keys.json writes them."""
    out, price = {}, model.price
    for name in PRICES:
        pico = getattr(price, name)
        if pico != (price.input if name in ("cached", "written") else 0):
            out[name] = to_credits(pico // (PICO if name in ("image", "request") else 1))
    listed = [
        {"utc": hours.utc} | price_entry(replace(model, price=hours.price, hours=()))
        for hours in model.hours
    ]
    return out | ({"hours": listed} if listed else {})


def describe_account(services: Services, id: str) -> dict[str, Any]:
    """Credits, limits and their live use, models and keys of one account; of the own
    one as the key that asks may use it, and the key's budget."""
    config, ledger = services.config, services.ledger
    own = id == g.key.account
    account = g.account if own else config.account(id)
    limits = account.limits
    entry = {"object": "account"} | account_entries(config, ledger, [id])[0]
    entry["limits"] = {"rate": limits.rate, "concurrent": limits.concurrent}
    if own:
        entry["admin"] = g.key.admin
        entry["key"] = {"id": g.key.id, "name": g.key.name} | g.key.terms.written
        entry["budget"] = budget_entry(ledger, g.key)
        entry["live"], entry["demo"] = live_use(services, account), account.demo
    entry["models"] = [
        {"id": model.id, "about": model.about, "price": price_entry(model)}
        for model in usable(config, account)
    ]
    keys = [] if g.account.demo else key_entries(config, ledger, id, limit=PAGE + 1)
    return entry | {"keys": keys[:PAGE], "more_keys": len(keys) > PAGE}


RECEIPT = (
    "id created account key model path state status stream input_tokens cached_tokens"
    " written_tokens output_tokens images estimated credits ttfb_ms duration_ms code"
    " upstream attempts"
).split()


FILTERS = {
    "model": "coalesce(asked, model) = ?", "key": "? IN (r.key, k.name)",
    "status": "status = ?", "failed": "(status >= 400) = ?",
}  # fmt: skip


def receipt_entry(row: dict[str, Any]) -> dict[str, Any]:
    row["created"] /= 1000
    row["state"] = ("open", "settled", "released")[row["state"]]
    row["credits"] = to_credits(row["credits"])
    row["stream"], row["estimated"] = bool(row["stream"]), bool(row["estimated"])
    return row


def receipts(
    ledger: Ledger, account: str, low: str, high: str, limit: int,
    wanted: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """An account's requests with ids from `low` to below `high`, newest first; those
    of the `wanted` model, key (its id or name), status, or `failed` or not."""
    where, values = "", []
    for name, value in (wanted or {}).items():
        where += f" AND {FILTERS[name]}"
        values += [value] * FILTERS[name].count("?")
    sql = (
        "SELECT r.id, r.created, r.account, k.name, coalesce(asked, model), path, state,"
        " status, stream, input, cached, written, output, images, estimated, cost, ttfb,"
        " duration, code, upstream, attempts FROM requests r"
        " LEFT JOIN keys k ON k.id = r.key WHERE r.account = ?"
        f" AND r.id >= ? AND r.id < ?{where} ORDER BY r.id DESC LIMIT ?"
    )
    with ledger.snapshot() as db:  # a rare one is looked for in the whole history
        rows = db.execute(sql, (account, low, high, *values, limit)).fetchall()
    return [receipt_entry(dict(zip(RECEIPT, row))) for row in rows]


def moment_id(name: str) -> str | None:
    """The smallest id of a request at the moment (unix seconds) in the query string."""
    text = request.args.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,11}(\.[0-9]{1,6})?", text):
        raise BadRequest(f"'{name}' must be unix seconds.", param=name)
    return f"req_{int(float(text) * 1000):011x}"


def wanted_receipts() -> dict[str, Any]:
    """What the query string says of the receipts that are asked for."""
    wanted = {name: text for name, text in request.args.items() if name in FILTERS}
    if "status" in wanted:
        wanted["status"] = integer_argument("status", 0, 599)
    if failed := wanted.get("failed"):
        if failed not in ("true", "false"):
            raise BadRequest("'failed' must be true or false.", param="failed")
        wanted["failed"] = failed == "true"
    return wanted


# The columns of `usage` under the names that people read.
SUMS = {
    "requests": "requests", "failed": "released", "refused": "refused",
    "input_tokens": "input", "cached_tokens": "cached", "written_tokens": "written",
    "output_tokens": "output", "images": "images", "credits": "cost",
}  # fmt: skip
GROUPS = {
    "day": "day", "account": "account", "model": "model",
    "key": "(SELECT name FROM keys WHERE id = key), key",
}  # fmt: skip


def usage_rows(
    ledger: Ledger, account: str | None, days: int, by: Iterable[str] = ("day", "model")
) -> list[dict[str, Any]]:
    """Requests that were charged, `failed` ones, which are free, those `refused` before
    they had a row, tokens, images and credits, by these GROUPS; newest day first."""
    groups = ", ".join([GROUPS[name] for name in by])
    order = groups.replace("day", "day DESC")
    sums = ", ".join([f"sum({column})" for column in SUMS.values()])
    which = "account = ?1" if account else "?1 IS NULL"  # an OR would use no index
    sql = f"SELECT {groups}, {sums} FROM usage WHERE {which} AND day > ?2"
    first = int(time.time()) // DAY - days
    with ledger.snapshot() as db:  # a year of all accounts takes a while
        rows = db.execute(f"{sql} GROUP BY {groups} ORDER BY {order}", (account, first))
        rows = rows.fetchall()
    names = [each for name in by for each in (name, "key_id")[: 1 + (name == "key")]]
    out = []
    for values in rows:
        row = dict(zip([*names, *SUMS], values))
        if "day" in row:
            row["day"] = time.strftime("%Y-%m-%d", time.gmtime(row["day"] * DAY))
        out.append(row | {"credits": to_credits(row["credits"])})
    return out


def asked_usage(ledger: Ledger, account: str | None) -> Response:
    """The usage that the query string asks for."""
    days, by = integer_argument("days", 30, 366), request.args.get("by", "day,model")
    groups = list(dict.fromkeys(by.split(",")))
    for name in groups:
        if name not in GROUPS or (name == "account" and account):
            known = ", ".join(GROUPS.keys() - ({"account"} if account else set()))
            raise BadRequest(f"'by' takes some of {known}.", param="by")
    return listed(usage_rows(ledger, account, days, groups), days=days)


def add_account_routes(app: Flask, services: Services) -> None:
    """What an account may see of its own; for admin keys, of any account."""
    route, ledger = account_routes(app, services), services.ledger

    @route("")
    def account(id: str) -> Response:
        return json_response(describe_account(services, id))

    @route("/usage")
    def usage(id: str) -> Response:
        return asked_usage(ledger, id)

    @route("/requests")
    def requests(id: str) -> Response:
        limit = integer_argument("limit", 50, 200)
        low = moment_id("since") or ""
        high = moment_id("until") or "s"  # above all ids
        high = min(high, request.args.get("after") or high)
        rows = receipts(ledger, id, low, high, limit + 1, wanted_receipts())
        return listed(rows[:limit], has_more=len(rows) > limit)

    @route("/requests/<request_id>")
    def receipt(id: str, request_id: str) -> Response:
        # No id of a request begins with another's.
        rows = receipts(ledger, id, request_id, request_id + " ", 1)
        if not rows and re.fullmatch("req_[0-9a-f]{24}", request_id):
            if ledger.expired(request_id):
                raise ReceiptExpired("Receipts of that time are kept no longer.")
        if not rows:
            raise NotFound("This account has made no such request.")
        return json_response(rows[0])


def small_body(services: Services, known: str) -> dict[str, Any]:
    """A small JSON object with these members only."""
    watch = Watch(request.environ.get("gunicorn.socket"), g.account.id)
    share = Share(services.room, g.account.id)
    if not services.watcher.add(watch, services.capacity):
        raise Overloaded("The server has no room at the moment.", wait=1)
    try:
        with watch.receiving() as arrived:
            data = read_body(request.environ, 64 << 10, share, arrived)
        body = parse_json(data)
    finally:
        services.watcher.remove(watch)
        share.keep(0)
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


MAX_KEYS = 100  # of one account


def room_for_a_key(config: Config, id: str, db: sqlite3.Connection) -> bool:
    """Whether an account has fewer than MAX_KEYS keys that live, and has made fewer in
    a day: each new key has new limits."""
    counts = dict(db.execute(LIVE_KEYS, whose_keys(config, [id])).fetchall())
    owned = len(config.account(id).keys) + counts.get(id, 0)
    a_day = parse_many(f"{MAX_KEYS}/day")
    return owned < MAX_KEYS and hit_windows(a_day, id, "keys", db)[-1].fits


def asked_terms(config: Config, terms: Terms, body: dict[str, Any]) -> Terms:
    """Terms with what a body changes of them."""
    change = {name: value for name, value in body.items() if name in TERMS.split()}
    try:
        terms = changed_terms(terms, change, config.models)
    except ConfigError as error:
        raise BadRequest(f"{error}.", param=str(error).partition(":")[0]) from None
    if change.get("metrics") and not g.key.admin:
        raise BadRequest("'metrics' must be false.", param="metrics")
    return terms


def change_key(ledger: Ledger, key: Key) -> None:
    """Gives a key its name and terms, or says why it cannot have others."""
    if key.source == "keys.json":
        raise BadRequest(f"{key.id} is declared in keys.json: change it there.")
    if not ledger.change_key(key):
        raise NotFound("This key is revoked.")


def add_key_routes(app: Flask, services: Services) -> None:
    """An account's keys: lists, makes, changes and revokes them."""
    route, ledger = account_routes(app, services), services.ledger

    def refuse_demo() -> None:
        if g.account.demo:
            raise NotFound("A demo key is public: it sees, makes and revokes no keys.")

    def refuse_bound() -> None:
        refuse_demo()
        if g.key.terms != NO_TERMS and not g.key.admin:  # it could make one without
            raise NotFound("A key with terms of its own makes and changes no keys.")

    @route("/keys")
    def keys(id: str) -> Response:
        refuse_demo()
        limit, after = integer_argument("limit", PAGE, 1000), request.args.get("after")
        rows = key_entries(services.config, ledger, id, after or "", limit + 1)
        return list_response(rows[:limit], has_more=len(rows) > limit)

    @route("/keys", "POST")
    def make_key(id: str) -> Response:
        refuse_bound()
        body = small_body(services, f"name admin {TERMS}")
        name = named(printable_name, body.get("name", "key"), "name")
        admin = body.get("admin", False)
        if type(admin) is not bool or (admin and not g.key.admin):
            raise BadRequest("'admin' must be false.", param="admin")
        terms = asked_terms(services.config, NO_TERMS, body)
        room = functools.partial(room_for_a_key, services.config, id)
        made = ledger.make_key(id, name, admin, terms, room)
        if made is None:
            told = f"An account may have {MAX_KEYS} keys, and make as many in a day."
            raise BadRequest(told)
        text, key = made
        row = ledger.find_key(key.id)
        entry = key_entry(ledger, made_key(services.config, row), row)
        return json_response(entry | {"key": text}, 201)

    def touched(id: str, key_id: str) -> Key:
        """The key that this request revokes or changes, if it may."""
        refuse_bound()
        key = known_key(services.config, ledger, key_id, id)
        if key.admin and not g.key.admin:
            raise NotFound("There is no such key that this one may touch.")
        return key

    @route("/keys/<key_id>", "PATCH")
    def change(id: str, key_id: str) -> Response:
        key, body = touched(id, key_id), small_body(services, f"name {TERMS}")
        name = named(printable_name, body.get("name", key.name), "name")
        terms = asked_terms(services.config, key.terms, body)
        change_key(ledger, replace(key, name=name, terms=terms))
        row = ledger.find_key(key.id)
        return json_response(key_entry(ledger, made_key(services.config, row), row))

    @route("/keys/<key_id>", "DELETE")
    def revoke(id: str, key_id: str) -> Response:
        ledger.revoke(touched(id, key_id))
        return json_response({"id": key_id, "revoked": True})


def label(value: str) -> str:
    """A label's value, quoted and escaped as Prometheus has it."""
    escaped = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'"{escaped}"'


TOTALS = """
CREATE TEMP TABLE totals AS SELECT model, status, sum(requests) AS requests,
    sum(released) AS released, sum(refused) AS refused, sum(answered) AS answered,
    sum(input) AS input, sum(cached) AS cached, sum(written) AS written,
    sum(output) AS output, sum(images) AS images, sum(cost) AS cost,
    sum(ttfb) AS ttfb, sum(duration) AS duration FROM usage GROUP BY model, status
"""
# name, type, help, labels, SQL: the name's suffix, the labels' values, the sample's.
METRICS = (
    ("proxy_requests_total", "counter", "Requests that have ended.", "model status",
     "SELECT '', model, status, sum(n) FROM (SELECT model, status, requests + released"
     " AS n FROM totals UNION ALL SELECT '', status, refused FROM totals) WHERE n > 0"
     " GROUP BY model, status"),
    ("proxy_time_to_first_byte_seconds", "summary", "From admission on.", "model",
     "SELECT * FROM (SELECT '_sum', model, sum(ttfb) / 1e3 FROM totals GROUP BY model"
     " HAVING sum(answered) UNION ALL SELECT '_count', model, sum(answered) AS n"
     " FROM totals GROUP BY model HAVING n) ORDER BY model"),
    ("proxy_request_duration_seconds", "summary", "From admission on.", "model",
     "SELECT * FROM (SELECT '_sum', model, sum(duration) / 1e3 FROM totals"
     " WHERE status AND requests + released GROUP BY model UNION ALL"
     " SELECT '_count', model, sum(requests + released) FROM totals"
     " WHERE status AND requests + released GROUP BY model) ORDER BY model"),
    ("proxy_tokens_total", "counter", "Tokens charged; cached and written ones are input.",
     "model class",
     " UNION ALL ".join([
         f"SELECT '', model, '{each}', sum({each}) FROM totals WHERE requests GROUP BY model"
         for each in ("input", "cached", "written", "output")])),
    ("proxy_images_total", "counter", "Images charged.", "model",
     "SELECT '', model, sum(images) FROM totals WHERE requests GROUP BY model"),
    ("proxy_credits_total", "counter", "Credits spent.", "model",
     "SELECT '', model, printf('%.6f', sum(cost) / 1e6) FROM totals WHERE requests"
     " GROUP BY model"),
    ("proxy_requests_in_progress", "gauge", "Requests that hold credits.", "",
     "SELECT '', count(*) FROM requests WHERE state = 0"),
    ("proxy_streams_in_progress", "gauge", "Those of them that are streams.", "",
     "SELECT '', coalesce(sum(stream), 0) FROM requests WHERE state = 0"),
)  # fmt: skip


def metric_lines(services: Services, db: sqlite3.Connection) -> Iterator[str]:
    """Prometheus' text format, out of the ledger: the same whichever worker answers."""
    db.execute(TOTALS)  # one walk through the usage, not eight
    for name, kind, about, labels, sql in METRICS:
        yield f"# HELP {name} {about}\n# TYPE {name} {kind}\n"
        for suffix, *values, value in db.execute(sql):
            pairs = zip(labels.split(), values)
            shown = ",".join([f"{key}={label(str(text))}" for key, text in pairs])
            yield f"{name}{suffix}{{{shown}}} {value}\n" if shown else f"{name} {value}\n"
    name = "proxy_upstream_resting"
    yield f"# HELP {name} Could not be reached just now; of the answering worker alone.\n"
    yield f"# TYPE {name} gauge\n"
    routes = [model.routes for model in services.config.models.values()]
    asked = {upstream.name: upstream for upstream, _ in itertools.chain(*routes)}
    for id, upstream in sorted(asked.items()):
        rests = services.dialect(upstream).pool.rests
        yield f"{name}{{upstream={label(id)}}} {int(rests)}\n"
    name = "proxy_balance_credits"
    yield f"# HELP {name} Credits that are left.\n# TYPE {name} gauge\n"
    accounts = services.config.accounts
    left = {id: account.credits for id, account in accounts.items()}
    for id, own in db.execute("SELECT id, granted - spent - held FROM accounts"):
        left[id] = left.get(id, 0) + own
    for id, micro in sorted(left.items()):
        shown = "+Inf" if micro > UNLIMITED // 2 else f"{micro / MICRO:.6f}"
        yield f"{name}{{account={label(id)}}} {shown}\n"


def history(id: str, spent: int) -> str:
    """What is to be said of a new account whose name has spent micro-credits before."""
    amount = f"{spent / MICRO:.6f} credits"
    return f"An account named {id} has spent {amount} before: they count."


def parse_grant(value: Any, path: str, low: int = -MOST_CREDITS) -> int:
    """Micro-credits of a grant, or of a correction where it is negative."""
    amount = to_micro(value, path, low)
    if not amount:
        raise ConfigError(f"{path}: must not be 0")
    return amount


def grant_or_tell(
    config: Config, ledger: Ledger, id: str, amount: int, note: str
) -> None:
    """Grants micro-credits, or takes them, if so many are available."""
    if not ledger.grant(config.account(id), amount, note):
        left = balances(config, ledger, [id])[id]["available"]
        told = f"credits: {id} has {left:.6f} available; no more can be taken."
        raise BadRequest(told, param="credits")


def grant_entries(
    ledger: Ledger, account: str | None, limit: int, before: int = 2**62
) -> list[dict[str, Any]]:
    """At most `limit` grants with ids below `before`, newest first."""
    rows = ledger.read(
        "SELECT id, account, amount, note, created FROM grants WHERE id < ?1"
        " AND ?2 IN (account, '') ORDER BY id DESC LIMIT ?3",
        before, account or "", limit,
    )  # fmt: skip
    names = "id account credits note created".split()
    entries = [dict(zip(names, row)) for row in rows]
    return [each | {"credits": to_credits(each["credits"])} for each in entries]


def close_account(config: Config, ledger: Ledger, id: str) -> None:
    """Closes an account made at run time."""
    if id in config.accounts:
        raise BadRequest(f"{id} is declared in keys.json: remove it there.")
    ledger.close_account(id)


def add_admin_routes(app: Flask, services: Services) -> None:
    """All accounts, new ones, grants, metrics: for admin keys."""
    ledger = services.ledger

    @app.get("/v1/accounts")
    def accounts() -> Response:
        admin_only()
        limit, after = integer_argument("limit", PAGE, 1000), request.args.get("after")
        ids = account_names(services.config, ledger, after or "", limit + 1)
        rows = account_entries(services.config, ledger, ids[:limit])
        return list_response(rows, has_more=len(ids) > limit)

    @app.post("/v1/accounts")
    def make_account() -> Response:
        admin_only()
        body = small_body(services, "id credits")
        id = named(account_name, body.get("id"), "id")
        amount = named(to_micro, body.get("credits", 0), "credits")
        spent = None if id in services.config.accounts else ledger.make_account(id)
        if spent is None:
            raise BadRequest("There is an account of this name already.", param="id")
        if amount:
            ledger.grant(services.config.account(id), amount, "at the start")
        [entry] = account_entries(services.config, ledger, [id])
        if spent:
            entry["note"] = history(id, spent)
            services.log.note("account", request=g.request_id, note=entry["note"])
        return json_response(entry, 201)

    @app.post(f"{ONE_ACCOUNT}/grants")
    def grant(account: str) -> Response:
        id = known_account(services, account, live=True)
        body = small_body(services, "credits note")
        amount = named(parse_grant, body.get("credits"), "credits")
        note = body.get("note") or ("granted" if amount > 0 else "corrected")
        note = named(printable_name, note, "note")
        grant_or_tell(services.config, ledger, id, amount, note)
        return json_response(account_entries(services.config, ledger, [id])[0], 201)

    @app.get(f"{ONE_ACCOUNT}/grants")
    def grants(account: str) -> Response:
        id = known_account(services, account)
        limit = integer_argument("limit", PAGE, 1000)
        before = integer_argument("after", 10**11, 10**11)
        rows = grant_entries(ledger, id, limit + 1, before)
        return list_response(rows[:limit], has_more=len(rows) > limit)

    @app.delete(ONE_ACCOUNT)
    def close(account: str) -> Response:
        id = known_account(services, account)
        close_account(services.config, ledger, id)
        return json_response({"id": id, "closed": True})

    @app.get("/v1/usage")
    def usage() -> Response:
        admin_only()
        return asked_usage(ledger, None)

    @app.get("/metrics")
    def metrics() -> Response:
        if not g.key.terms.metrics:
            admin_only()
        with ledger.snapshot() as db:  # which sums the whole usage, and stops nobody
            text = "".join(metric_lines(services, db))
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(text, content_type=kind)


def live_demo(config: Config, ledger: Ledger) -> tuple[str, str] | None:
    """(key, model) that anyone may try; None if there is none, or it was revoked."""
    row = None
    with contextlib.suppress(LedgerUnavailable):
        row = ledger.find_key(key_id(sha256(config.demo[0]))) if config.demo else None
    return None if row and row.revoked else config.demo


def picked(ids: list[str], best: str) -> str:
    """The model `best`, or the first where it is not among them."""
    return best if best in ids or not ids else ids[0]


COLUMNS = ("input", "cached", "output", "image")
UNITS = {  # of what has no column
    "request": "a request", "characters": "per million characters to be spoken",
    "written": "per million input tokens written to the cache",
    "reported": "times what the provider itself reports",
}  # fmt: skip


def price_rows(entry: dict[str, Any]) -> list[tuple[str, list[str], str]]:
    """A price_entry for people: (when, amounts by COLUMNS, the rest in words), first
    that of the hours that have none of their own."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for each in (entry, *entry.get("hours", ())):
        amounts = [amount_text(each[name]) if name in each else "" for name in COLUMNS]
        rest = [f"{amount_text(each[name])} {UNITS[name]}" for name in UNITS if name in each]
        words = ", ".join(rest) or ("" if any(amounts) else "free")
        rows.setdefault((*amounts, words), []).append(each.get("utc", ""))
    told = [(" and ".join(filter(None, utc)), row) for row, utc in rows.items()]
    return [(f"{utc} UTC" if utc else "", [*row[:-1]], row[-1]) for utc, row in told]


def documentation_values(
    config: Config, demo: tuple[str, str] | None, root: str
) -> dict[str, Any]:
    """What the documentation tells of this server: address, models, prices, limits.

    The examples name models that are here; the demo's where there is one.
    """
    named = [each for each in config.models.values() if not each.wild]
    images = [each.id for each in named if each.price.image]
    texts = [each.id for each in named if not each.price.image]
    picture, thinker = picked(images, "jimeng-image"), "deepseek-r1"
    key, model = demo or ("sk-your-api-key", picked(texts, "deepseek-chat"))
    rows = []
    for each in config.models.values():
        about = f"{each.about} (not set up here)" if each.missing else each.about
        paths = DIALECTS[each.routes[0][0].dialect].paths  # where the dialect knows
        cap = each.max_output if each.price.output else 0
        rows.append((each.id, about, paths, cap, price_rows(price_entry(each))))
    claude = [row[0] for row in rows if "messages" in row[2] and row[0][-1] != "*"]
    return {
        "base_url": root + "v1", "root_url": root.rstrip("/"), "models": rows,
        "rate": re.sub(r"^(\d+)/minute$", r"\1 RPM", config.limits.rate),
        "claude": claude[0] if claude else "", "concurrent": config.limits.concurrent,
        "demo": bool(demo), "key": key, "model": model, "images": bool(images),
        "thinker": model if demo or thinker not in texts else thinker,
        "picture": picture, "image_model": model if demo else picture, "errors": ERRORS,
    }  # fmt: skip


def page(text: str, kind: str, images: str = "data:") -> Response:
    """A page or asset; `images` are where its pictures may come from."""
    headers = PAGE_HEADERS | {"Content-Security-Policy": f"{POLICY}; img-src {images}"}
    return Response(text, 200, headers, None, f"{kind}; charset=utf-8")


def add_pages(app: Flask, services: Services) -> None:
    """The documentation and the dashboard; nothing in them comes from elsewhere."""
    app.jinja_loader = DictLoader(TEMPLATES)

    @app.get("/")
    def documentation() -> Response:
        config = services.config
        demo = live_demo(config, services.ledger)
        values = documentation_values(config, demo, request.host_url)
        return page(render_template("documentation.html", **values), "text/html")

    @app.get("/dashboard")
    def dashboard() -> Response:
        demo = live_demo(services.config, services.ledger)
        html = render_template("dashboard.html", demo=demo[0] if demo else "")
        return page(html, "text/html", "https: data:")  # pictures of image models

    @app.get("/assets/<name>")
    def asset(name: str) -> Response:
        if name not in ASSETS:
            raise NotFound("There is no such file.")
        return page(*ASSETS[name])


PARTS = (
    add_hooks, add_error_handlers, add_routes, add_account_routes, add_key_routes,
    add_admin_routes, add_pages,
)  # fmt: skip


def build_app(
    config_file: ConfigFile, db: str, capacity: float = math.inf,
    keep_days: int | None = None,
) -> Flask:  # fmt: skip
    """The application out of an opened keys.json; `capacity` bounds its relays at once.

    Without a good ledger it answers 503 until there is one. Its Services are the
    extension "proxy"; they are closed by whoever made it, if ever.
    """
    sys.set_int_max_str_digits(640)  # 7,000 of 4,300 took 3 s to read and to write
    services = Services(config_file, db, capacity)
    services.ledger.keep_days = keep_days
    app = Flask("proxy", static_folder=None)
    app.url_map.strict_slashes = app.url_map.merge_slashes = False
    app.url_map.converters["relayed"] = RelayedPath
    # Known to the app already, Flask-Limiter adds none of its hooks. They would look
    # for the limits of each view, again for every request, at 15% of its CPU; the one
    # hook here knows them and asks Flask-Limiter's strategy and storage itself.
    app.extensions |= {"proxy": services, "limiter": {services.limiter}}
    services.limiter.init_app(app)
    for add in PARTS:
        add(app, services)
    serve = app.wsgi_app

    def serve_folded(environ: dict[str, Any], start_response: Callable) -> Iterable:
        environ["PATH_INFO"] = fold_path(environ["PATH_INFO"])
        return serve(environ, start_response)

    app.wsgi_app = serve_folded
    return app


ENV_LINE = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(.*)")


def read_env(keys: str | os.PathLike) -> None:
    """Sets what the .env beside the keys file names and the environment does not, but
    for PROXY_KEYS, which tells where that is; or ConfigError."""
    path = Path(keys).parent / ".env"
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8") from None
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        if not (match := ENV_LINE.fullmatch(line)):
            raise ConfigError(f"{path}: line {number}: must read like NAME=value")
        name, value = match.groups()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        if name != "PROXY_KEYS":
            os.environ.setdefault(name, value)


def ledger_path(keys: str, db: str | os.PathLike | None) -> str:
    """The ledger that is named, by the environment too; or the one beside keys.json."""
    beside = os.path.join(os.path.dirname(keys), "proxy.db")
    return os.fspath(db or os.environ.get("PROXY_DB") or beside)


def create_app(
    keys: str | os.PathLike | None = None, db: str | os.PathLike | None = None
) -> Flask:
    """The WSGI application of one worker process.

    keys, db: the two files; by default PROXY_KEYS and PROXY_DB as on the command
    line. Raises ConfigError.
    """
    keys = os.fspath(keys or os.environ.get("PROXY_KEYS") or "keys.json")
    read_env(keys)
    return build_app(ConfigFile(keys), ledger_path(keys, db))


# Command line ------------------------------------------------------------------------

GRACE = 30  # seconds from SIGTERM to the end of the last stream
GRACE_MARGIN = 3.0  # seconds before that in which streams are ended and settled
PAGE_TIMEOUT = 10  # seconds for a client to take an answer that relays nothing
LINGER = 0.4  # seconds for a client to stop sending what was refused
FIRST_WORD = 5.0  # seconds for the head of a request, from its connection on
IDLE = 10_000  # connections of one worker beyond its threads
SPARE_THREADS = 16  # per worker, kept for answers that relay nothing
PARSER_STATUS = {
    "LimitRequestLine": 414, "LimitRequestHeaders": 431, "ExpectationFailed": 417,
}  # fmt: skip
MAX_REQUEST_HEAD = 32 << 10  # bytes: it waits in memory until it is whole
HEAD_END = re.compile(rb"\n\r?\n")  # or what the parser refuses


def is_head(early: bytes) -> bool:
    return len(early) > MAX_REQUEST_HEAD or bool(HEAD_END.search(early))


def has_head(conn: Any) -> bool:
    """Takes what has arrived of a request; whether its head is whole, or never will be."""
    buffer = conn.parser.unreader.buf
    try:
        if not is_head(buffer.getvalue()):  # of what was sent together with the last
            data = conn.sock.recv(RECEIVE)
            buffer.seek(0, os.SEEK_END)
            buffer.write(data)
            return not data or is_head(buffer.getvalue())
    except BlockingIOError:
        return False
    except OSError:
        pass  # it is told when it is read
    return True


def untaken(client: socket.socket) -> int:
    """Bytes of answers that have not arrived at a client yet (tcp(7), SIOCOUTQ)."""
    return struct.unpack("i", fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4)))[0]


class Worker(gthread.ThreadWorker):
    """gunicorn's threaded worker, where a promise needs another one."""

    def load_wsgi(self) -> None:
        # A client's time-out is no error: gunicorn would log a traceback for each.
        self.log.error_log.addFilter(
            lambda record: not isinstance((record.exc_info or (0, 0))[1], OSError)
        )
        super().load_wsgi()

    # The drain: new requests are refused, what runs goes on for a while

    def drain(self, seconds: float) -> None:
        self.alive = False
        if app := getattr(self, "wsgi", None):  # it may still be starting
            app.extensions["proxy"].watcher.drain(seconds)
        self.method_queue.defer(lambda: None)  # wakes the main loop

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM."""
        self.drain(GRACE - GRACE_MARGIN)

    def handle_quit(self, sig: int, frame: Any) -> None:
        """Ctrl-C, which a terminal sends twice, ends what runs at once, but well."""
        self.drain(0)

    def is_parent_alive(self) -> bool:
        """Whether the master is; an orphan drains as on SIGTERM."""
        alive = super().is_parent_alive()
        if not alive:
            self.drain(GRACE - GRACE_MARGIN)
        return alive

    def set_accept_enabled(self, enabled: bool) -> None:
        """A worker that ends closes its listeners: left open they would leave clients
        waiting unanswered and, without a master, keep the port from the next start."""
        alive = self.alive
        super().set_accept_enabled(enabled and alive)
        if not alive:
            for listener in self.sockets:
                listener.close()

    def accept(self, listener: Any) -> None:
        """Without a descriptor left nobody is accepted; what runs goes on."""
        try:
            super().accept(listener)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            time.sleep(0.05)

    # Connections

    def enqueue_req(self, conn: Any) -> None:
        """A thread is for those whose head is here, and who read what they get: others
        could keep it for as long as they like. gunicorn gives it to all that connect."""
        conn.init()  # the parser, whose buffer the head waits in
        conn.sock.setblocking(False)
        if not has_head(conn):
            conn.timeout = time.monotonic() + FIRST_WORD
            self.pending_conns.append(conn)
            spoken = functools.partial(self.on_pending_socket_readable, conn)
            self.poller.register(conn.sock, selectors.EVENT_READ, spoken)
        elif untaken(conn.sock) > AT_ONCE:
            self.nr_conns -= 1
            conn.close()
        else:
            super().enqueue_req(conn)

    def on_pending_socket_readable(self, conn: Any, client: socket.socket) -> None:
        if has_head(conn):
            super().on_pending_socket_readable(conn, client)

    # One answer to each request

    def handle_request(self, req: Any, conn: Any) -> bool:
        """gunicorn reads every transfer coding, and undoes only `chunked`."""
        conn.sock.settimeout(PAGE_TIMEOUT)
        codings = [text for name, text in req.headers if name == "TRANSFER-ENCODING"]
        if [coding.lower() for coding in codings] not in ([], ["chunked"]):
            message, path = "No transfer coding but 'chunked' is taken.", req.path
            self.refuse(conn.sock, 415, message, fold_path(path))
            return False
        return super().handle_request(req, conn)

    def handle(self, conn: Any) -> Any:
        """Lingers here on a connection that ends: gunicorn would do it in its main
        loop, two seconds without an accept."""
        kept, early = False, conn.parser.unreader.buf.getvalue()
        if len(early) > MAX_REQUEST_HEAD and not HEAD_END.search(early):
            self.refuse(conn.sock, 431, "The head of the request is too large.")
        else:
            kept = super().handle(conn)
        if not kept:
            gunicorn.util.close_graceful(conn.sock, LINGER, MAX_BODY)
            # A second close would fail, and count it as gone twice.
            conn.close = lambda graceful=False: None
        return kept

    def handle_error(
        self, req: Any, client: socket.socket, addr: Any, exc: Any
    ) -> None:
        """Answers what gunicorn cannot parse; the raw line is logged nowhere. A request
        that was parsed has had its answer: what is broken is its unread body."""
        known = isinstance(exc, ParseException | ssl.SSLError)
        if not known:
            self.log.error("worker: %s", type(exc).__name__)
        if req is None:
            status = PARSER_STATUS.get(type(exc).__name__, 400) if known else 500
            self.refuse(client, status, "The request is malformed.")

    @staticmethod
    def refuse(
        client: socket.socket, status: int, message: str, path: str = ""
    ) -> None:
        body = from_status(status, message).envelope(path)
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
            f"Connection: close\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nx-request-id: {new_request_id()}\r\n\r\n"
        )
        with contextlib.suppress(OSError):
            client.sendall(head.encode() + body)


def when_ready(arbiter: Any) -> None:
    """The port is bound, no worker is made yet: what is loaded by now, 10,000 keys
    too, stays one copy for all workers."""
    with contextlib.suppress(OSError):  # a full disk behind standard output
        click.echo(arbiter.app.greet(str(arbiter.LISTENERS[0])))
    gc.collect()
    gc.freeze()


def after_fork(arbiter: Any, worker: Any) -> None:
    """Until a worker has handlers of its own a signal ends it: the master's, which it
    was born with, would only note it for the master."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    SocketUnreader.max_body_chunk = PIECE  # no body is read ahead of its share
    # The rest of a refused body keeps its thread: gunicorn would wait for five seconds.
    gthread.DEFAULT_WORKER_DATA_TIMEOUT = 0.1


def raised_descriptors() -> int:
    """How many this process may have: as many as the system lets it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class Server(BaseApplication):
    """gunicorn in this process, with the settings that a streaming proxy needs."""

    def __init__(
        self, make: Callable[[], Flask], bind: str, workers: int, threads: int,
        greet: Callable[[str], str],
    ):  # fmt: skip
        self.load, self.greet = make, greet
        threads += SPARE_THREADS
        self._settings = {
            "bind": [bind],
            "workers": workers,
            "worker_class": Worker,
            "threads": threads,
            # A worker accepts while all its threads are busy; what is left over is
            # room for idle connections. Each relay needs a second descriptor.
            "worker_connections": min(threads + IDLE, raised_descriptors() // 2),
            "keepalive": 75,
            "timeout": 60,
            "graceful_timeout": GRACE,
            "control_socket_disable": True,
            "loglevel": "warning",
            "proc_name": "proxy",
            "forwarder_headers": "",  # no header is more than a header
            "worker_tmp_dir": "/dev/shm" if os.path.isdir("/dev/shm") else None,
            "post_fork": after_fork,
            "when_ready": when_ready,
        }
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._settings.items():
            self.cfg.set(name, value)


def file_options(command: Callable) -> Callable:
    """--keys and --db, of every command."""

    def find_env(context: click.Context, option: click.Parameter, keys: str) -> str:
        read_env(keys)  # before the other options look into the environment
        return keys

    def find_ledger(context: click.Context, option: click.Parameter, db: Any) -> str:
        return ledger_path(context.params["keys"], db)

    keys = {"default": "keys.json", "is_eager": True, "callback": find_env}
    add = click.option("--keys", envvar="PROXY_KEYS", help="The operator's file.", **keys)
    db = {"callback": find_ledger, "help": "The ledger (beside --keys)."}
    return add(click.option("--db", envvar="PROXY_DB", **db)(command))


VERSION = "1.0"
SETTINGS = {
    "max_content_width": 88, "show_default": True, "help_option_names": ["-h", "--help"],
}  # fmt: skip


@click.group(context_settings=SETTINGS)
@click.version_option(VERSION, "--version", message="proxy.py %(version)s")
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


def greeting(config: Config, demo: tuple[str, str] | None, url: str) -> str:
    """Where it listens, and a line that works as it stands."""
    lines = [f"Serving {url}/v1 (documentation {url}/, dashboard {url}/dashboard)"]
    for variable, models in config.missing().items():
        lines.append(f"  {variable} is not set: no {', '.join(models)}")
    if demo:
        key, model = demo
        body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}]}
        lines.append(
            f"\n  curl {url}/v1/chat/completions -H 'Authorization: Bearer {key}' \\\n"
            f"    -H 'Content-Type: application/json' -d '{json.dumps(body)}'\n"
        )
        if not LOOPBACK.fullmatch(urlsplit(url).hostname or ""):
            told = "anyone who can reach this server may use it"
            lines.append(f"Warning: {key} is a public key: {told}.\n")
    return "\n".join(lines)


def is_free(host: str, port: int) -> bool:
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(kind) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise OSError(error.errno, error.strerror, f"{host}:{port}") from None
    return True


ORPHANS_END = 6.0  # seconds for a server's workers to close its port after it was killed


def refuse_taken(host: str, port: int, patience: float) -> None:
    """Raises ConfigError for a port that another server has: gunicorn would try it for
    five seconds. `patience`: seconds, for a server of the same ledger that is ending."""
    deadline = time.monotonic() + patience
    while not is_free(host, port):
        if time.monotonic() > deadline:
            others = range(port + 1, min(port + 100, 65536))
            free = [f": --port {each}" for each in others if is_free(host, each)]
            raise ConfigError(f"port {port} is taken" + "".join(free[:1]))
        time.sleep(0.05)


@cli.command(context_settings={"auto_envvar_prefix": "PROXY"})
@file_options
@click.option("--host", default="127.0.0.1")
@click.option("--port", type=click.IntRange(1, 65535), default=8000)
@click.option("--workers", type=click.IntRange(1, MAX_WORKERS), help="As cores, 2 at least.")
@click.option(
    "--threads", type=click.IntRange(1, 10_000), default=1000,
    help="Requests that one worker relays at once.",
)  # fmt: skip
@click.option(
    "--keep-days", type=click.IntRange(1, 100_000),
    help="Delete older receipts (default: never).",
)  # fmt: skip
def serve(
    keys: str, db: str, host: str, port: int, workers: int | None, threads: int,
    keep_days: int | None,
) -> None:  # fmt: skip
    """Serves the API (also without naming the command)."""
    os.umask(0o077)
    secure_standard_files()
    config_file = ConfigFile(keys)
    kept = systemd.listen_fds(unset_environment=False) > 0  # then its sockets count
    bind = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with contextlib.closing(Ledger(db)) as ledger:
        if not kept:
            ending = ledger.file.is_served()
            refuse_taken(host, port, patience=ORPHANS_END if ending else 0)
        ledger.file.keys_file = os.path.realpath(keys)
        config = config_file.current
        greet = functools.partial(greeting, config, live_demo(config, ledger))

    def make() -> Flask:
        app = build_app(config_file, db, threads, keep_days)
        app.extensions["proxy"].watcher.serves_on = kept
        atexit.register(app.extensions["proxy"].close)  # the last lines, too
        return app

    Server(make, bind, workers or max(2, os.cpu_count() or 2), threads, greet).run()


class Files(NamedTuple):
    """What a command works on: the operator's file and the program's."""

    config: Config
    ledger: Ledger

    def existing(self, account: str) -> str:
        """The account's name, if there is one, or ConfigError."""
        account_name(account, "ACCOUNT")
        if account not in self.config.accounts and self.ledger.made(account) is None:
            raise ConfigError(f"no account is named {account!r}")
        return account

    def names(self, account: str | None) -> list[str]:
        """Of this account, or of all."""
        return [account] if account else account_names(*self)


@contextlib.contextmanager
def opened(keys: str, db: str, makes: bool = False) -> Iterator[Files]:
    """The two files, for one command; unless it `makes` something, a ledger that is
    not there yet is not made either."""
    config = ConfigFile(keys).current
    with contextlib.ExitStack() as stack:
        if not (makes or os.path.exists(db) or os.path.exists(db + "-lock")):
            os.stat(os.path.dirname(db) or ".")  # OSError: it could not be made
            click.echo(f"{db}: there is no ledger yet.", err=True)
            db = stack.enter_context(tempfile.TemporaryDirectory()) + "/proxy.db"
        ledger = stack.enter_context(contextlib.closing(Ledger(db)))
        if ledger.file.keys_file not in ("", os.path.realpath(keys)):
            told = f"the server of this ledger reads {ledger.file.keys_file}"
            click.echo(f"warning: {told}, this is {os.path.realpath(keys)}", err=True)
        yield Files(config, ledger)


def columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    wide = sum([unicodedata.east_asian_width(sign) in "WF" for sign in text])
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def readable(row: dict[str, Any]) -> dict[str, str]:
    """A row of a table: amounts, times, lists and objects as people read them."""
    out = {}
    for name, value in row.items():
        if name in ("created", "last_used", "revoked"):
            value = stamp(value) if value else ""
        elif name == "budget" and value:
            value = f"{value['available']:.6f} of {value['credits']:.6f} ({value['per']})"
        elif name == "credits" and isinstance(value, dict):
            out |= readable(value)
            continue
        elif isinstance(value, dict):
            value = " ".join([f"{each}={part}" for each, part in value.items()])
        elif isinstance(value, list):
            value = ",".join(value)
        out[name] = cell(name, value)
    return out


Rows = list[dict[str, Any]]


def show(rows: Rows, as_json: bool = False, as_csv: bool = False) -> None:
    """Rows as an aligned table for people, as JSON or as CSV."""
    if as_json:
        return click.echo(plain_json(rows, indent=1))
    lines = list(map(readable, rows))
    if as_csv:
        return click.echo(csv_text(lines), nl=False)
    if not rows:
        return click.echo("Nothing yet.")
    table = [list(lines[0]), *(line.values() for line in lines)]
    widths = [max(map(columns, column)) for column in zip(*table)]
    for line in table:
        cells = (text + " " * (width - columns(text)) for text, width in zip(line, widths))
        click.echo("  ".join(cells).rstrip())


ACCOUNT = click.argument("account")
NOUNS = {
    "keys": "Makes, lists, changes and revokes API keys.",
    "accounts": "Lists and closes accounts.",
    "credits": "Grants and takes credits, shows balances and grants.",
}
for noun, about in NOUNS.items():
    cli.add_command(click.Group(noun, help=about))


def command(words: str, makes: bool = False, lists: bool = False) -> Callable:
    """What makes a function a command on the two files. The rows that it returns are
    shown; one that `lists` has those of one account or of all, for scripts too."""

    def add(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(
            keys: str, db: str, as_json: bool = False, as_csv: bool = False, **given: Any
        ) -> None:
            with opened(keys, db, makes) as files:
                if lists and given["account"]:
                    files.existing(given["account"])
                rows = function(files, **given)
                if rows is not None:
                    show(rows, as_json, as_csv)

        if lists:
            run = click.option("--csv", "as_csv", is_flag=True, help="For spreadsheets.")(run)
            run = click.option("--json", "as_json", is_flag=True, help="For scripts.")(run)
            run = click.argument("account", required=False)(run)
        *noun, name = words.split()
        (cli.commands[noun[0]] if noun else cli).command(name)(file_options(run))
        return function

    return add


def names(text: str) -> list[str]:
    return text.split(",")


def term_options(command: Callable) -> Callable:
    """The terms of a key, of the commands that make or change one."""
    about = "It reads /metrics, and nothing else."
    command = click.option("--metrics", is_flag=True, default=None, help=about)(command)
    for name, kind, about in reversed([
        ("--expires", str, "The last day (UTC) on which it works: 2027-01-31."),
        ("--budget", number, "Credits that it may spend per period."),
        ("--per", str, f"The period of its budget: {', '.join(PERIODS)}."),
        ("--models", names, "Those that it may use: chat,echo."),
        ("--rate", str, "Like 10/minute; of its account's and this the smaller counts."),
        ("--concurrent", number, "Requests at once."),
    ]):  # fmt: skip
        command = click.option(name, type=kind, help=about)(command)
    return command


def typed_terms(
    budget: Any, per: str | None, rate: str | None, concurrent: Any, **others: Any
) -> dict[str, Any]:
    """What was typed of a key's terms, as a merge patch."""
    parts = others | {
        "budget": {"credits": budget, "per": per},
        "limits": {"rate": rate, "concurrent": concurrent},
    }
    return {name: part for name, part in patched({}, parts).items() if part != {}}


def typed_key(config: Config, ledger: Ledger, text: str) -> Key:
    """The key with this id, or the one with this account/name that is not revoked."""
    account, slash, name = text.partition("/")
    if not slash:
        return known_key(config, ledger, text)
    named = [e for e in key_entries(config, ledger, account) if e["name"] == name]
    ids = [each["id"] for each in named if not each["revoked"]]
    if len(ids) > 1:
        raise ConfigError(f"{text}: {len(ids)} keys have this name: {', '.join(ids)}")
    return known_key(config, ledger, *ids or [text])


@command("keys add", makes=True)
@ACCOUNT
@click.option("--name", default="key")
@click.option("--credits", type=number, default="0", help="Granted to the account at once.")
@click.option("--admin", is_flag=True, help="The key may use the admin routes.")
@term_options
def keys_add(
    files: Files, account: str, name: str, credits: Any, admin: bool, **given: Any
) -> None:
    """Prints a new key, once; makes the account if it is new."""
    config, ledger = files
    account_name(account, "ACCOUNT")
    printable_name(name, "--name")
    amount = to_micro(credits, "--credits")
    terms = changed_terms(NO_TERMS, typed_terms(**given), config.models)
    new = account not in config.accounts
    spent = ledger.make_account(account) if new else None
    if amount:
        ledger.grant(config.account(account), amount, "keys add")
    if spent is not None:
        left = balances(config, ledger, [account])[account]["available"]
        none = f"and has no credits yet: credits add {account} AMOUNT"
        told = f"with {left:.6f} credits." if left else none
        click.echo(f"{account} is new, {told}", err=True)
    if spent:
        click.echo(history(account, spent), err=True)
    click.echo(ledger.make_key(account, name, admin, terms)[0])


@command("keys list", lists=True)
def keys_list(files: Files, account: str | None) -> Rows:
    """Hints and ids of keys, never the keys."""
    return [row for name in files.names(account) for row in key_entries(*files, name)]


@command("keys set")
@click.argument("id")
@click.option("--name", help="Another name.")
@term_options
@click.option("--remove", type=click.Choice(TERMS.split()), multiple=True)
def keys_set(
    files: Files, id: str, name: str | None, remove: tuple[str, ...], **given: Any
) -> None:
    """Changes the name, expiry, budget, models or limits of a key made here; ID is its
    id, or account/name."""
    key = typed_key(*files, id)
    change = typed_terms(**given) | dict.fromkeys(remove)
    terms = changed_terms(key.terms, change, files.config.models)
    name = key.name if name is None else printable_name(name, "--name")
    change_key(files.ledger, replace(key, name=name, terms=terms))
    click.echo(f"{key.id} is changed.")


@command("keys revoke", makes=True)
@click.argument("id")
def keys_revoke(files: Files, id: str) -> None:
    """Revokes a key, for ever; ID is its id, or account/name."""
    key = typed_key(*files, id)
    files.ledger.revoke(key)
    click.echo(f"{key.id} is revoked.")


@command("accounts list", lists=True)
def accounts_list(files: Files, account: str | None) -> Rows:
    """Accounts, their keys that live and their credits."""
    return account_entries(*files, files.names(account))


@command("accounts close")
@ACCOUNT
def accounts_close(files: Files, account: str) -> None:
    """Revokes all keys of an account made here; its history stays."""
    close_account(*files, files.existing(account))
    click.echo(f"{account} is closed.")


def granted(files: Files, account: str, amount: int, note: str) -> Rows:
    """Grants micro-credits, or takes them; the balance then."""
    printable_name(note, "--note")
    grant_or_tell(*files, files.existing(account), amount, note)
    return credits_show(files, account)


@command("credits add", makes=True)
@ACCOUNT
@click.argument("amount", type=number)
@click.option("--note", default="granted")
def credits_add(files: Files, account: str, amount: Any, note: str) -> Rows:
    """Grants AMOUNT credits to ACCOUNT."""
    return granted(files, account, parse_grant(amount, "AMOUNT", 0), note)


@command("credits take", makes=True)
@ACCOUNT
@click.argument("amount", type=number)
@click.option("--note", default="corrected")
def credits_take(files: Files, account: str, amount: Any, note: str) -> Rows:
    """Takes AMOUNT credits from ACCOUNT, down to what is available."""
    return granted(files, account, -parse_grant(amount, "AMOUNT", 0), note)


@command("credits log", lists=True)
def credits_log(files: Files, account: str | None) -> Rows:
    """Every grant and correction with its note, newest first."""
    return grant_entries(files.ledger, account, -1)


@command("credits show", lists=True)
def credits_show(files: Files, account: str | None) -> Rows:
    """Balances of one account, or of all."""
    credits = balances(*files, files.names(account))
    return [{"account": name, **parts} for name, parts in credits.items()]


@command("usage", lists=True)
@click.option("--days", type=click.IntRange(1, 366), default=30)
@click.option("--by", type=click.Choice(list(GROUPS)), multiple=True)
def usage(files: Files, account: str | None, days: int, by: tuple[str, ...]) -> Rows:
    """Requests, tokens and credits: by day and model, or by what --by names."""
    return usage_rows(files.ledger, account, days, by or ("day", "model"))


@command("requests", lists=True)
@click.option("--failed", is_flag=True, help="Those that did not end well.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50)
def last_requests(files: Files, account: str | None, failed: bool, limit: int) -> Rows:
    """The last receipts, newest first."""
    wanted = {"failed": True} if failed else None
    rows = []
    for name in files.names(account):
        rows += receipts(files.ledger, name, "", "s", limit, wanted)
    return sorted(rows, key=lambda row: row["id"], reverse=True)[:limit]


def key_state(upstream: UpstreamConfig, online: bool) -> tuple[str, bool]:
    """Whether the provider accepts the operator's key, in words; and whether it has
    answered, where it was asked."""
    if upstream.missing:
        return f"{', '.join(upstream.missing)} is not set", True
    if not online:
        return "configured", True
    try:
        return DIALECTS[upstream.dialect](upstream).probe() or "accepted", True
    except OSError as error:  # all of `requests` are
        return type(error).__name__, False


def warnings(config: Config, ledger: Ledger, keys: str) -> Iterator[str]:
    """What would fail, or is not as safe as it could be."""
    secret = [each for each in config.accounts.values() if each.keys and not each.demo]
    if os.stat(keys).st_mode & 0o077 and secret:
        yield f"{keys} holds keys and can be read by others: chmod 600 {keys}"
    if sqlite3.sqlite_version_info < (3, 37):
        yield f"SQLite {sqlite3.sqlite_version} is too old: 3.37 is needed"
    if live_demo(config, ledger):
        yield "the demo key is public: remove it before others can reach this server"
    sql = "SELECT id, granted, spent + held FROM accounts WHERE spent + held > granted"
    for id, granted, used in ledger.read(sql):
        if used > granted + config.account(id).credits:
            yield f"{id} has spent more than keys.json and its grants give it now"


@cli.command()
@file_options
@click.option("--online", is_flag=True, help="Ask the providers; spends nothing.")
def check(keys: str, db: str, online: bool) -> int:
    """Proves the ledger, validates keys.json, warns of what would fail."""
    there, asked = os.path.exists(db), functools.cache(key_state)
    rows, silent = [], False
    with opened(keys, db) as (config, ledger):
        for model in config.models.values():
            for upstream, id in model.routes:
                state, answered = asked(upstream, online)
                row = {"model": model.id, "upstream": f"{upstream.name}/{id}"}
                rows.append(row | {"state": state})
                silent |= not answered
        show(rows)
        for line in warnings(config, ledger, keys):
            click.echo(f"warning: {line}")
        if not there:
            return int(silent)
        with progress("Adding up", iterable=PROOFS.items()) as proofs:
            wrong = ledger.check(proofs)
        for line in wrong:
            click.echo(f"wrong: {line}")
        click.echo(f"The ledger's schema is version {SCHEMA_VERSION}.")
        click.echo("The ledger does not add up." if wrong else "The ledger adds up.")
        return int(bool(wrong) or silent)


def named_first(arguments: list[str]) -> list[str]:
    """The command's name, `serve` if there is none, then what was typed before it."""
    files, rest = [], list(arguments)
    while rest and rest[0].partition("=")[0] in ("--keys", "--db"):
        files += rest[: 1 if "=" in rest[0] else 2]
        rest = rest[1 if "=" in rest[0] else 2 :]
    if rest and rest[0] in ("-h", "--help", "--version"):
        return rest
    named = rest and not rest[0].startswith("-")
    return [*([] if named else ["serve"]), *rest, *files]


def mistake(error: click.UsageError) -> str:
    """What is wrong with a command's line, in one line."""
    option, message = getattr(error, "option_name", ""), error.format_message()
    if re.fullmatch("-[0-9.]+", option or ""):
        return f"{option}: an amount is never negative; `credits take` takes credits back"
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return message
    where = error.ctx.command_path if error.ctx else "proxy.py"
    return f"{message} (`{where} -h` tells what there is.)"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status; failures are one line."""
    arguments = named_first(sys.argv[1:] if arguments is None else arguments)
    try:
        return cli.main(arguments, standalone_mode=False) or 0
    except click.UsageError as error:
        click.echo(mistake(error), err=True)
        return error.exit_code
    except click.Abort:
        return 130
    except ConfigError as error:
        click.echo(f"Refused: {error}", err=True)
    except LedgerUnavailable as error:
        click.echo(f"Ledger: {error.reason}", err=True)
    except ProxyError as error:
        click.echo(error.message, err=True)
    except OSError as error:
        told = f"{error.filename}: {error.strerror}".removeprefix("None: ")
        click.echo(told, err=True)
    return 1


# Pages -------------------------------------------------------------------------------

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}

# Marked safe is only what this file says: captions, and what errors are about.
TEMPLATES = {
    "page.html": r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/assets/pages.css">
<script src="/assets/docs.js" defer></script>
{% block script %}{% endblock %}
</head>
<body>
<a class="skip" href="#main">Skip to the {{ holds }}</a>
{% set current = ' aria-current="page"' | safe %}
<header class="top"><strong>AI API</strong><nav aria-label="Pages">
<a href="/"{{ current if here == "/" }}>Documentation</a> &nbsp;
<a href="/dashboard"{{ current if here == "/dashboard" }}>Dashboard</a>
</nav></header>
{% block main %}{% endblock %}
</body>
</html>
""",
    "documentation.html": r"""{% extends "page.html" %}
{% set title, here, holds = "API documentation", "/", "text" %}
{% macro example(caption, id, copy, run="") -%}
<figure class="example"><figcaption>{{ caption | safe }}</figcaption><pre id="{{ id }}"
{%- if run %} data-run="{{ run }}"{% endif %} data-copy="{{ copy }}" tabindex="0">{{ caller() }}</pre></figure>
{%- endmacro %}
{% block main %}<main id="main" class="docs" data-key="{{ key }}" data-model="{{ model }}">
<nav class="toc" aria-label="Contents"><ol>
{% for each in ("Start", "Authentication", "Chat completions", "Streaming", "Other clients", "Models",
  "Image generation", "Python", "JavaScript", "cURL", "Receipts", "What is charged", "Error codes",
  "Rate limits") if images or each != "Image generation" -%}
<li><a href="#{{ each.lower().replace(" ", "-") }}">{{ each }}</a></li>{% endfor %}
</ol></nav>
<div>
<section id="start" class="card"><h1>API documentation</h1>
<p>One API for chat, reasoning, code and images. It speaks the OpenAI API: code written for OpenAI
works here once the base URL and the key are changed.</p>
{% call example("Base URL", "base-url", "base URL") %}{{ base_url }}{% endcall %}
<p>The examples on this page run as they stand once their key is yours.
{% if demo %}They show the public key <code>{{ key }}</code>, which reaches only the built-in model
<code>{{ model }}</code>: it answers with your own words. With a key of your own account, use any of
{% else %}<code>{{ key }}</code> stands for it, and <code>{{ model }}</code> for any of
{% endif %}the <a href="#models">models</a>.</p></section>
<section id="authentication" class="card"><h2>Authentication</h2>
<p>Every request carries an API key in the <code>Authorization</code> header. The first key of your
account comes from whoever runs this server; with it you get more from the <a href="/dashboard">API
Keys dashboard</a>, each shown once. Keep them secret: never put one in a web page, an app or a
repository. A key that got out can be revoked there and stops working at once. A key may have a budget of its own
for a day, a month or in all (<code>"budget": {"credits": 5, "per": "month"}</code>), an end, models
and limits: on the dashboard, or as JSON to <code>POST /v1/account/keys</code>.</p>
{% call example("Header", "auth-header", "header") %}
Authorization: Bearer {{ key }}{% endcall %}</section>
<section id="chat-completions" class="card"><h2>Chat completions</h2>
<p class="endpoint"><b>POST</b>/v1/chat/completions</p>
<p>Takes a conversation and answers with its next message. The body is JSON, at least a
<code>model</code> and <code>messages</code>; other fields of OpenAI's format are passed to the
model. Without <code>max_tokens</code> this server's limit for the model holds; where the credits
left cannot pay for so much, the answer is cut to what they can pay.</p>
{% call example("Request body", "chat-request", "request body") %}
{"model": "{{ model }}",
 "messages": [{"role": "system", "content": "You are a helpful assistant."},
              {"role": "user", "content": "Hello! What can you do?"}],
 "max_tokens": 1024, "temperature": 0.7, "stream": false}{% endcall %}
{% call example("Response", "chat-response", "response") %}
{"id": "chatcmpl-abc123", "object": "chat.completion", "created": 1740000000,
 "model": "{{ model }}",
 "choices": [{"index": 0, "finish_reason": "stop",
              "message": {"role": "assistant", "content": "I can help you with..."}}],
 "usage": {"prompt_tokens": 25, "completion_tokens": 142, "total_tokens": 167}}{% endcall %}
<p>A reasoning model puts its chain of thought into <code>reasoning_content</code>, beside
<code>content</code>. Any other <code>POST /v1/…</code> of the OpenAI API whose JSON body names a
<code>model</code> (completions, embeddings, responses) goes to the same path of that model's
provider, if the provider has it; <code>/v1/audio/speech</code> answers with the sound. Files go as
forms (<code>multipart/form-data</code> with a part <code>model</code>) to
<code>/v1/audio/transcriptions</code>, <code>/v1/audio/translations</code> and
<code>/v1/images/edits</code>. Stored files and batches are not relayed. A picture attached to
a chat with an image model is what that model works on.</p></section>
<section id="other-clients" class="card"><h2>Other clients</h2>
<p>Whatever speaks OpenAI's, Azure's or Anthropic's API is pointed here by its base URL and key
alone: the key may come as <code>Authorization: Bearer</code>, <code>api-key</code> or
<code>x-api-key</code>. Anthropic's SDKs and Claude Code use <code>{{ root_url }}</code> without
<code>/v1</code>, and <code>/v1/messages</code> with models that speak it.</p>
{% call example("Environment variables that the SDKs and most tools read", "env", "variables",
                run="sh") %}
export OPENAI_API_KEY="{{ key }}" OPENAI_BASE_URL="{{ base_url }}"
export ANTHROPIC_AUTH_TOKEN="{{ key }}" ANTHROPIC_BASE_URL="{{ root_url }}"
curl "$OPENAI_BASE_URL/models" -H "api-key: $OPENAI_API_KEY"{% endcall %}
{% if claude %}{% call example("Anthropic's SDK (<code>pip install anthropic</code>)",
  "messages-python", "Anthropic's SDK", run="python") %}
from anthropic import Anthropic

client = Anthropic(auth_token="{{ key }}", base_url="{{ root_url }}")
message = client.messages.create(
    model="{{ claude }}",
    max_tokens=1024,
    messages=[{"role": "user", "content": "Hello!"}],
)
print(message.content[0].text){% endcall %}{% endif %}</section>
<section id="streaming" class="card"><h2>Streaming</h2>
<p>With <code>"stream": true</code> the answer comes as server-sent events while it is being
written: lines of <code>data: </code> with a <code>chat.completion.chunk</code> each, and
<code>data: [DONE]</code> after the last. Add <code>"stream_options": {"include_usage": true}</code>
for a chunk with the usage before the end. Lines that start with a colon are comments. If
something fails on the way, the last event is <code>data: {"error": {…}}</code> and no
<code>[DONE]</code> follows: an answer without <code>[DONE]</code> is not complete.</p>
{% call example("cURL", "stream-curl", "streaming with cURL", run="sh") %}
curl -N {{ base_url }}/chat/completions \
  -H "Authorization: Bearer {{ key }}" \
  -H "Content-Type: application/json" \
  -d '{"model": "{{ model }}", "stream": true,
       "messages": [{"role": "user", "content": "Count to five"}]}'{% endcall %}
{% call example("Python, OpenAI SDK", "stream-python", "streaming with Python", run="python") %}
from openai import OpenAI

client = OpenAI(api_key="{{ key }}", base_url="{{ base_url }}")

stream = client.chat.completions.create(
    model="{{ model }}",
    messages=[{"role": "user", "content": "Write a haiku about rain"}],
    stream=True,
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print(){% endcall %}</section>
<section id="models" class="card"><h2>Models</h2>
<p>Prices are in credits: for a million tokens, or for an image. <code>GET /v1/models</code> lists
those that your key may use. Where a model names its paths, it is reached by these alone.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Models">
<table id="model-table" class="prices"><thead><tr><th scope="col">Model</th>
{% for head in ("In", "Cached", "Out", "Image") %}<th scope="col" class="num">{{ head }}</th>
{% endfor %}</tr></thead>
{% for id, about, paths, cap, prices in models -%}<tbody>
{% for when, amounts, rest in prices %}<tr><td>
{%- if loop.first %}<b>{{ id }}</b><br>{{ about }}
{%- for path in paths %}<br><code>/v1/{{ path }}</code>{% endfor %}
{%- if cap %}<br><span class="soft">at most {{ "{:,}".format(cap) }} tokens out</span>{% endif %}
{%- endif %}{% if when %} <span class="soft">{{ when }}</span>{% endif %}
{%- if rest %} <span class="soft">{{ rest }}</span>{% endif %}</td>
{% for amount in amounts %}<td class="num">{{ amount or "–" }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
{% endfor %}</table></div></section>
{% if images -%}
<section id="image-generation" class="card"><h2>Image generation</h2>
<p class="endpoint"><b>POST</b>/v1/chat/completions</p>
<p>JiMeng paints through the same call: name the image model (<code>{{ picture }}</code>) and
describe the picture in the last user message. It takes some seconds. The answer's
<code>content</code> is the address of the image and nothing else; download it soon, such links
last about a day. {% if demo %}(The example names <code>{{ model }}</code>, which only gives its
own words back: put in <code>{{ picture }}</code> with a key of your own.){% endif %}</p>
{% call example("cURL", "image-curl", "image with cURL", run="sh") %}
curl {{ base_url }}/chat/completions \
  -H "Authorization: Bearer {{ key }}" \
  -H "Content-Type: application/json" \
  -d '{"model": "{{ image_model }}", "messages": [
        {"role": "user", "content": "A futuristic city at sunset, cinematic lighting"}]}'{% endcall %}
{% call example("Response, the part that matters", "image-response", "image response") %}
{"choices": [{"message": {"role": "assistant",
                          "content": "https://cdn.example.com/gen/image-xyz.png"}}]}{% endcall %}</section>
{% endif -%}
<section id="python" class="card"><h2>Python</h2>
{% call example("With requests (<code>pip install requests</code>)", "python-requests",
                "Python with requests", run="python") %}
import requests

API_KEY = "{{ key }}"
BASE_URL = "{{ base_url }}"

response = requests.post(
    f"{BASE_URL}/chat/completions",
    headers={"Authorization": f"Bearer {API_KEY}"},
    json={"model": "{{ model }}",
          "messages": [{"role": "user", "content": "Explain quantum computing simply"}]},
    timeout=600,
)
response.raise_for_status()
print(response.json()["choices"][0]["message"]["content"]){% endcall %}
{% call example("OpenAI SDK (<code>pip install openai</code>)", "python-openai", "OpenAI SDK",
                run="python") %}
from openai import OpenAI

client = OpenAI(api_key="{{ key }}", base_url="{{ base_url }}")
completion = client.chat.completions.create(
    model="{{ thinker }}",
    messages=[{"role": "user", "content": "Solve: 2x + 5 = 13"}],
)
print(completion.choices[0].message.content){% endcall %}</section>
<section id="javascript" class="card"><h2>JavaScript</h2>
<p>For a server, where the key stays secret: save it as <code>chat.mjs</code> and run
<code>node chat.mjs</code> (Node 18 or newer, nothing to install).</p>
{% call example("With fetch", "javascript-fetch", "JavaScript", run="node") %}
const API_KEY = "{{ key }}";
const BASE_URL = "{{ base_url }}";

const response = await fetch(`${BASE_URL}/chat/completions`, {
  method: "POST",
  headers: { "Authorization": `Bearer ${API_KEY}`, "Content-Type": "application/json" },
  body: JSON.stringify({ model: "{{ model }}",
    messages: [{ role: "user", content: "What is the capital of France?" }] }),
});
const data = await response.json();
if (!response.ok) throw new Error(data.error.message);
console.log(data.choices[0].message.content);{% endcall %}</section>
<section id="curl" class="card"><h2>cURL</h2>
{% call example("A chat completion", "curl-chat", "cURL", run="sh") %}
curl {{ base_url }}/chat/completions \
  -H "Authorization: Bearer {{ key }}" \
  -H "Content-Type: application/json" \
  -d '{"model": "{{ model }}", "messages": [{"role": "user", "content": "Hello!"}]}'{% endcall %}</section>
<section id="receipts" class="card"><h2>Receipts</h2>
<p>Every answer has an <code>x-request-id</code> header. For a request that was let in,
<code>GET /v1/account/requests/{id}</code> tells what became of it: status, tokens by class, cost
and times; <code>status</code> 499 says that you left, 503 that the answer failed or was cut.
<code>GET /v1/account/requests</code> lists them, newest first (<code>limit</code> up to 200,
<code>after</code> the last id you have, <code>since</code> and <code>until</code> in unix seconds);
<code>GET /v1/account/usage?days=30</code> sums them by day (UTC) and model;
<code>GET /v1/account</code> has your credits, limits and keys. The
<a href="/dashboard">dashboard</a> shows the same. These calls are free.</p>
{% call example("cURL: credits left", "account-curl", "credits with cURL", run="sh") %}
curl {{ base_url }}/account \
  -H "Authorization: Bearer {{ key }}"{% endcall %}</section>
<section id="what-is-charged" class="card"><h2>What is charged</h2><ul>
<li>The tokens that the provider reports for the request, at the prices above. Cached input has its
own, lower price where the model has one, and so may input that is written to a cache. Where hours have
their own prices, those of the moment count at which the request was let in.</li>
<li>Before a request is sent, the most that it can cost is held from your credits. What is not used
comes back when it ends, and an account never goes below zero.</li>
<li>Images cost their price for each image delivered.</li>
<li>Refusals, errors of a provider and refusals by its moderation are free.</li>
<li>If you leave before the end, the provider is stopped at once and you pay for an estimate of
your prompt and of what had been relayed to you, or for the image. For a stream that broke off by
itself the same, but nothing if nothing had been relayed. Such receipts are marked
<code>estimated</code>.</li></ul></section>
<section id="error-codes" class="card"><h2>Error codes</h2>
<p>Every error is JSON with this one shape; tell them apart by <code>code</code>.</p>
{% call example("Error", "error-body", "error") %}
{"error": {"message": "…", "type": "…", "param": null, "code": "rate_limit_exceeded"}}{% endcall %}
<div class="scroll" tabindex="0" role="region" aria-label="Error codes">
<table id="error-table" class="codes"><thead><tr><th scope="col">HTTP status</th>
<th scope="col">Error code</th><th scope="col">Description</th></tr></thead><tbody>
{% for error in errors -%}
<tr><td>{{ error.status }}</td><td><code>{{ error.code }}</code></td><td>
{{- error.about | safe }}</td></tr>
{% endfor %}</tbody></table></div></section>
<section id="rate-limits" class="card"><h2>Rate limits</h2>
<div class="scroll"><table id="limit-table"><tbody>
<tr><th scope="row">Requests (per API key)</th><td>{{ rate }}</td></tr>
<tr><th scope="row">Concurrent requests</th><td>{{ concurrent }}</td></tr>
</tbody></table></div>
<p>Above a limit the answer is 429, and its <code>Retry-After</code> header says how many seconds to
wait (1 to 60). The window slides: a request counts for as long as the window lasts, then its place
is free again. A stream is one concurrent request until it ends. Answers to a key carry
<code>x-ratelimit-limit-requests</code>, <code>x-ratelimit-remaining-requests</code> and
<code>x-ratelimit-reset-requests</code>. The OpenAI SDKs wait and repeat by themselves.
A request that is refused for its body, its model or its credits, for being one too many at once or
for want of room counts as well. One above this limit counts in none of its windows; one with a wrong
key, or refused as <code>ledger_unavailable</code>, does not count either. Account calls and
<code>/v1/models</code> are counted apart (300 a minute) and take nothing from these limits.</p>
<p class="soft">Accounts may have limits of their own; the dashboard shows yours. Is this server up?
<a href="/healthz">{{ root_url }}/healthz</a></p></section>
</div>
</main>{% endblock %}
""",
    "dashboard.html": r"""{% extends "page.html" %}
{% set title, here, holds = "API Keys dashboard", "/dashboard", "content" %}
{% block script %}<script src="/assets/dashboard.js" defer></script>{% endblock %}
{% block main %}<main id="main" data-demo="{{ demo }}">
<noscript><p class="card">The dashboard needs JavaScript.</p></noscript>
<p id="notice" class="card" role="status" hidden></p>
<nav id="sections" class="head" aria-label="Sections" hidden></nav>
<div id="view"></div>
</main>{% endblock %}
""",
}

PAGES_CSS = r""":root { color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --code: #f0f2f5; --line: #d5dae1; --text: #1a2029;
  --soft: #56606e; --accent: #0b62c4; --on: #fff; --good: #14703a; --warn: #8a5200; --bad: #b3261e;
  --mono: ui-monospace, "SFMono-Regular", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (prefers-color-scheme: dark) {
  :root { --page: #11151b; --card: #1a2029; --code: #0c1015; --line: #343d4a; --text: #e6eaf0;
    --soft: #a0abba; --accent: #76b1ff; --on: #07182e; --good: #6fd598; --warn: #f0b95c;
    --bad: #ff9a92; }
}
* { box-sizing: border-box; } [hidden] { display: none !important; }
body { margin: 0; background: var(--page); color: var(--text); font: 1rem/1.55 system-ui,
  -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
a { color: var(--accent); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
h1 { margin: 0 0 .5rem; font-size: 1.75rem; line-height: 1.2; } h1:focus { outline: none; }
h2 { margin: 0 0 .75rem; font-size: 1.25rem; line-height: 1.3; } p { margin: 0 0 .75rem; }
.soft, .example figcaption { color: var(--soft); font-size: .875rem; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.skip { position: absolute; left: -99rem; padding: .5rem 1rem; background: var(--card); }
.skip:focus { left: 0; }
code, pre, .name, .endpoint, h1, h2, .big, .turn, output, dialog p { overflow-wrap: anywhere; }

/* Frame */
.top, .head, .actions, .row, .pair, .legend { display: flex; flex-wrap: wrap; align-items: center;
  }
.top { gap: .25rem 1.25rem; padding: .6rem 1.25rem; background: var(--card); border-bottom: 1px
  solid var(--line); }
.top strong { margin-right: auto; } .top a { text-decoration: none; }
a[aria-current] { color: var(--text); font-weight: 600; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
main > *, .grid > * { min-width: 0; }
.card, dialog { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.card { margin: 0 0 1.25rem; padding: 1.1rem 1.25rem; } .card > :last-child { margin-bottom: 0; }
.grid { display: grid; gap: 1.25rem; margin-bottom: 1.25rem; } .grid > .card { margin: 0; }
.head { gap: .4rem 1rem; margin-bottom: 1rem; border-bottom: 1px solid var(--line); }
.head a { padding: .4rem 0; text-decoration: none; }
.head a[aria-current] { box-shadow: 0 2px var(--accent); }
.head .name { order: 1; margin-left: auto; color: var(--soft); font-size: .875rem;
  max-width: 16rem; }
.head button { order: 1; padding: .1rem .6rem; }
#notice { position: sticky; top: .5rem; z-index: 1; border-left: .3rem solid var(--accent); }

/* Documentation: contents beside the text where there is room */
.toc ol { margin: 0; padding: 0; list-style: none; columns: 2; font-size: .9rem; }
.toc { margin-bottom: 1rem; } .toc a { display: block; padding: .15rem 0; text-decoration: none; }
.endpoint { font-family: var(--mono); font-size: .95rem; }
.endpoint b { margin-right: .5rem; color: var(--good); }
@media (min-width: 60rem) {
  p > code, li > code, td > code { white-space: nowrap; } td .pair { flex-wrap: nowrap; }
  .docs { display: grid; grid-template-columns: 12rem minmax(0, 1fr); gap: 2rem; }
  .toc { position: sticky; top: 1.5rem; align-self: start; } .toc ol { columns: 1; }
  .grid { grid-template-columns: repeat(2, minmax(0, 1fr)); } .grid > .wide { grid-column: 1/-1; }
}

/* Code */
code, pre { font-family: var(--mono); font-size: .875em; }
:not(pre) > code { padding: .1em .3em; background: var(--code); border-radius: .25em; }
.example { position: relative; margin: 0 0 1rem; } .example figcaption { margin-bottom: .25rem; }
pre { margin: 0; padding: .8rem 1rem; overflow-x: auto; background: var(--code); line-height: 1.5;
  border: 1px solid var(--line); border-radius: .4rem; tab-size: 4; }
.copy { padding: .1rem .6rem; font-size: .8rem; background: var(--card); }
.example .copy { position: absolute; right: 0; top: 0; }

/* Tables; on a phone a .stack table shows each row as a small card */
.scroll { overflow-x: auto; }
table { width: 100%; margin-bottom: .75rem; border-collapse: collapse; font-size: .9rem; }
th, td { padding: .4rem .6rem; text-align: start; vertical-align: top; }
th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
tr + tr > * { border-top: 1px solid var(--line); } tbody th { border-bottom: 0; }
.prices tbody { border-top: 1px solid var(--line); } .prices b { overflow-wrap: anywhere; }
.prices tr + tr > * { border: 0; } .prices td.num { white-space: nowrap; }
th.num, td.num { text-align: right; font-variant-numeric: tabular-nums; }
td.none { padding: 1.25rem .6rem; color: var(--soft); text-align: center; }
td > code, .codes td:first-child, td time, .tag { white-space: nowrap; }
.name { display: inline-block; vertical-align: top; max-width: 34ch; max-height: 4.7em;
  overflow: hidden; text-align: start; }
.tag { display: inline-block; padding: 0 .45rem; border: 1px solid currentColor;
  border-radius: 1rem; font-size: .78rem; }
@media (max-width: 45rem) {
  main { padding: 1rem .75rem 4rem; }
  .card { padding: .9rem; } .docs td, .docs th { padding: .4rem .3rem; }
  .stack thead, .codes thead { position: absolute; height: 1px; overflow: hidden;
    clip-path: inset(50%); }
  .stack tr + tr, .codes tr + tr { border-top: 1px solid var(--line); }
  .stack td, .codes tr > * { border: 0 !important; } .stack, .stack tbody { display: block; }
  .stack tr { display: grid; grid-template-columns: repeat(3, 1fr); gap: .4rem .75rem;
    padding: .7rem 0; }
  .stack td { min-width: 0; padding: 0; text-align: start !important; overflow-wrap: anywhere; }
  .stack td[data-label]::before { content: attr(data-label); display: block; color: var(--soft);
    font-size: .75rem; }
  .stack td:only-child, .stack:not(#requests) td:first-child { grid-column: 1 / -1; }
  #requests td::before, .stack .rest { display: none; } #requests .name { max-height: 3.1em; }
  #requests tr { grid-template-columns: 8.5rem minmax(0, 1fr) minmax(0, 1fr); }
  .stack:not(#requests) time { white-space: normal; }
  .codes tbody tr { display: grid; grid-template-columns: max-content 1fr; padding: .4rem 0; }
  .codes tr > :last-child { grid-column: 1 / -1; }
  .prices th, .prices td { padding: .4rem .15rem; font-size: .8rem; }
  .prices .soft, .prices code { font-size: .75rem; white-space: normal; }
}

/* Controls */
button, input, select, textarea { font: inherit; color: inherit; }
button { padding: .35rem .9rem; background: transparent; border: 1px solid var(--line);
  border-radius: .4rem; cursor: pointer; }
button:hover { border-color: var(--accent); }
button.main { background: var(--accent); border-color: var(--accent); color: var(--on); }
button.danger { border-color: var(--bad); color: var(--bad); }
button.link { padding: 0; border: 0; color: var(--accent); text-align: start;
  text-decoration: underline; vertical-align: top; }
button:disabled { opacity: .55; cursor: default; }
input:not([type=checkbox]), select, textarea { display: block; width: 100%; padding: .35rem .6rem;
  background: var(--page); border: 1px solid var(--soft); border-radius: .4rem; }
label { display: block; min-width: 0; font-size: .875rem; color: var(--soft); }
.row { align-items: end; gap: .6rem .75rem; margin: .75rem 0; } .pair { gap: .4rem; }
.row > label { flex: 1 1 9rem; } .row > label.long, .row > p, .row > details, .row > output { flex: 1 1 100%;
  }
.row > label.tick { flex: 0 0 auto; padding-bottom: .5rem; }
output:empty { position: absolute; } [aria-busy] button:not([type]) { opacity: .55; }
dialog { width: min(36rem, calc(100vw - 2rem)); max-height: calc(100vh - 2rem); overflow-y: auto;
  padding: 1.25rem; color: var(--text); }
dialog::backdrop { background: rgb(0 0 0 / .5); }
.actions { justify-content: flex-end; gap: .6rem; margin: 1rem 0 0; }
.secret { display: block; margin: .5rem 0; padding: .7rem !important; user-select: all; }

/* Dashboard */
.big { margin: 0; font-size: 1.75rem; font-weight: 650; line-height: 1.2; }
.pairs { display: grid; grid-template-columns: auto 1fr; gap: .2rem 1rem; margin: .5rem 0 0; }
.pairs dt { color: var(--soft); } .pairs dd { margin: 0; font-variant-numeric: tabular-nums; }
meter { display: block; width: 100%; min-width: 6rem; height: 1.1rem; }
.gauge { margin-bottom: .6rem; } .gauge span { color: var(--soft); font-size: .875rem; }
.picks label { flex: 0 1 10rem; } button { white-space: nowrap; }
.actions:not(:has(> :not([hidden], :empty))) { display: none; }
.chart { margin: 0 0 1rem; } .plot { margin: .5rem 0 0 4rem; touch-action: pan-y; }
.chart svg { display: block; width: 100%; height: 12rem; overflow: visible; }
.chart text { fill: var(--soft); font-size: .75rem; text-anchor: end; }
.rule { stroke: var(--line); } .cursor { stroke: var(--text); stroke-dasharray: 4 3; }
.ends { display: flex; justify-content: space-between; margin: .3rem 0 .3rem 4rem; }
#reading { min-height: 3.1em; margin: 0; }
.legend { gap: .2rem 1rem; margin: 0; padding: 0; list-style: none; font-size: .875rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin: .3rem .35rem 0 0;
  border-radius: .2rem; }
.c0 { color: #3b7ddd; } .c1 { color: #d9730d; } .c2 { color: #16988a; } .c3 { color: #c8509b; }
.c4 { color: #8a6be0; } .c5 { color: #8a8a1e; } .c6 { color: #d9534f; } .c7 { color: #7f8a99; }
.chart rect { fill: currentColor; } .legend i { background: currentColor; }
#log { margin-bottom: 1rem; } .said .copy { display: none; } .turn { margin-bottom: 1.25rem; }
.turn p:not(.told) { white-space: pre-wrap; margin-bottom: .6rem; } .turn img { max-width: 100%; }
.said { width: fit-content; max-width: 85%; margin: 0 0 .6rem auto; padding: .5rem .9rem;
  background: var(--code); border-radius: .6rem; } .said > :last-child { margin: 0 !important; }
.thoughts { margin-bottom: .6rem; color: var(--soft); font-size: .9rem; } figure { margin: 0; }
details > summary { cursor: pointer; color: var(--soft); }
"""

DOCS_JS = r"""'use strict';
// A button that copies what `read` gives. The clipboard API exists only on https and
// localhost; elsewhere the text is selected in a field and copied the old way.
function copyButton(label, read) {
  const button = Object.assign(document.createElement('button'),
    { type: 'button', className: 'copy', ariaLive: 'polite' });
  const say = (textContent) =>
    Object.assign(button, { textContent, ariaLabel: `${textContent}: ${label}` });
  const copy = async () => {
    if (navigator.clipboard) return navigator.clipboard.writeText(read());
    const field = Object.assign(document.createElement('textarea'), { value: read() });
    button.after(field);
    field.select();
    const done = document.execCommand('copy');
    field.remove();
    if (!done) throw new Error('refused');
  };
  button.onclick = () => {
    copy().then(() => say('Copied'), () => say('Not copied'));
    setTimeout(say, 2500, 'Copy');
  };
  say('Copy');
  return button;
}

for (const node of document.querySelectorAll('[data-copy]')) {
  node.after(copyButton(node.dataset.copy, () => node.textContent));
}
"""

DASHBOARD_JS = r"""'use strict';
// The dashboard: signs in with an API key that only this tab's sessionStorage keeps, and shows
// what /v1/account and, to admins, /v1/accounts answer. The address says which section is on
// show (#/requests?model=x). Whatever comes from the API becomes text nodes and nothing else.

const [STORE, DAY_S, PAGE] = ['api-key', 86400, 50]; // PAGE: requests a page
const POLL_MS = 5000; // live figures, only while the tab is to be seen
// The key signed in, its account (me), its playground; null when signed out. The section on show
// with its account, what to draw anew with it (updates), and what ends its questions (stop).
let session = null;
let [view, timer] = [{ stop: new AbortController() }, null];

// ---- Parts of a page -------------------------------------------------------------------
const $ = (id) => document.getElementById(id);
// An element, tag.class.class, with attributes, listeners and switches, and its children.
function h(tag, ...children) {
  const [name, ...classes] = tag.split('.');
  const node = /^(svg|rect|line|text)$/.test(name)
    ? document.createElementNS('http://www.w3.org/2000/svg', name) : document.createElement(name);
  if (classes.length) node.setAttribute('class', classes.join(' '));
  const props = children[0]?.constructor === Object ? children.shift() : {};
  for (const [key, value] of Object.entries(props)) {
    if (/function|boolean/.test(typeof value)) node[key] = value;
    else if (value != null) node.setAttribute(key, value);
  }
  node.append(...children.flat(9).filter((child) => child != null && child !== false));
  return node;
}
const press = (kind, words, onclick, more = {}) =>
  h(`button.${kind}`, { type: 'button', onclick, ...more }, words);
// Shows nodes in a slot, unless they are there already or in use.
function put(slot, ...nodes) {
  const same = nodes.length === slot.childNodes.length
    && nodes.every((node, i) => slot.childNodes[i].isEqualNode(node));
  if (!same && !slot.contains(document.activeElement)) slot.replaceChildren(...nodes);
}
// A part that is drawn anew with each state of the account on show.
function live(draw) {
  const slot = h('div');
  const update = () => put(slot, draw(view.account));
  view.updates.push(update);
  update();
  return slot;
}
// columns: [heading, cell of a row or its number's name, class]. Rows, each with an id, are drawn
// again where they changed, and keep the focus. On a phone each becomes a card with the headings inside.
function table(id, caption, given, none) {
  const columns = given.map(([head, cell, kind]) => (typeof cell === 'string'
    ? [head, (row) => number(row[cell]), `num ${kind || ''}`] : [head, cell, kind]));
  const body = h('tbody', { role: 'rowgroup' });
  const line = (row, cell) => h('tr', { role: 'row', 'data-id': row }, columns.map(cell));
  const node = h('table.stack', { id, role: 'table' }, h('caption', caption),
    h('thead', { role: 'rowgroup' }, line(null, ([head, , kind]) =>
      h('th', { scope: 'col', role: 'columnheader', class: kind }, head))), body);
  const controls = (row) => [...row?.tr.querySelectorAll('a, button') || []];
  let drawn = new Map();
  node.fill = (rows) => {
    const [before, { activeElement: focused }] = [drawn, document];
    const at = body.contains(focused) && focused.closest('tr').dataset.id;
    const place = at && controls(drawn.get(at)).indexOf(focused);
    drawn = new Map(rows.map((row) => {
      const [text, old] = [JSON.stringify(row), before.get(row.id)];
      return [row.id, old?.text === text ? old : { text, tr: line(row.id, ([head, cell, kind]) =>
        h('td', { role: 'cell', class: kind, 'data-label': head }, cell(row))) }];
    }));
    body.replaceChildren(...[...drawn.values()].map(({ tr }) => tr));
    if (!rows.length) body.append(h('tr', h('td.none', { colspan: columns.length }, none)));
    if (at) (controls(drawn.get(at))[place] || document.querySelector('h1')).focus();
    return node;
  };
  return node;
}
// A list that comes page by page, a button for the next under it; the first one, asked for again,
// keeps what was loaded behind it. Gives what loads it, and the paragraph with the button.
function paged(id, path, show, limit = 100, wanted = {}) {
  let rows = [];
  const next = press('', 'More', () => guard(load(rows.at(-1).id)), { id, hidden: true });
  async function load(after) {
    const page = await call(`${path}${query({ limit, after, ...wanted })}`);
    const at = after ? -1 : rows.findIndex((row) => row.id === page.data.at(-1)?.id);
    const rest = at < 0 ? [] : rows.slice(at + 1);
    rows = after ? rows.concat(page.data) : page.data.concat(rest);
    if (!rest.length) next.hidden = !page.has_more;
    await show(rows);
  }
  return [load, h('p.actions', next)];
}
// A field of a form; `options` make it a choice, `rows` a text of several lines.
function field(name, label, value, { type, options, rows, ...more } = {}) {
  const props = { name, type, ...more };
  const control = options ? h('select', props, options.map(([of, words = of]) =>
    h('option', { value: of, selected: [value].flat().includes(of) }, words)))
    : rows ? h('textarea', { rows, ...props }, value)
      : h('input', type === 'checkbox' ? { ...props, checked: value } : { ...props, value });
  return type === 'checkbox' ? h('label.tick', control, ' ', label)
    : h('label', { class: more.class }, label, ' ', control);
}
// A form whose one button does the work with what is typed, by the names of the fields; what the
// work returns or fails with stands beneath.
function form(id, fields, action, work, ...more) {
  const output = h('output', { role: 'status' });
  const say = (textContent, className = '') => Object.assign(output, { textContent, className });
  const main = h(`button.${/^(Revoke|Close)/.test(action) ? 'danger' : 'main'}`, action);
  const node = h('form.row', { id }, fields, main, more, output);
  const typed = (one) => (one.type === 'checkbox' ? one.checked : one.multiple
    ? [...one.selectedOptions].map((option) => option.value) : one.value.trim());
  node.onsubmit = async (event) => {
    event.preventDefault();
    if (node.ariaBusy) return;
    node.ariaBusy = 'true';
    say('');
    try {
      say(await work(Object.fromEntries([...node.elements].filter((one) => one.name)
        .map((one) => [one.name, typed(one)]))) || '');
    } catch (error) {
      if (error.name !== 'AbortError') say(error.message, 'bad');
    }
    node.ariaBusy = null;
  };
  return node;
}
// Gone from the page when it is closed, with all that it showed.
function dialog(title, ...children) {
  const node = h('dialog', { 'aria-labelledby': 'dialog-title' }, h('h2', { id: 'dialog-title' },
    title), children, h('p.actions', press('', 'Close', () => node.close(), { id: 'done' })));
  node.onclose = () => node.remove();
  document.body.append(node);
  node.showModal();
  return node;
}
// A form in a dialog, which is closed when the work is done.
function ask(id, heading, fields, action, work) {
  const box = dialog(heading, form(id, fields, action, async (typed) => {
    await work(typed);
    box.close();
  }));
}

const card = (title, ...children) => h('section.card', title && h('h2', title), children);
const wide = (title, ...children) => h('section.card.wide', title && h('h2', title), children);
const fold = (summary, ...children) => h('details', h('summary', summary), children);
const name = (value) => h('bdi.name', { title: value }, value);
const tag = (kind, words) => h(`span.tag.${kind}`, words);
const anchor = (href, words) => h('a', { href }, words);
const pairs = (rows) => h('dl.pairs', rows.filter(([, value]) => value != null)
  .map(([term, value]) => [h('dt', term), h('dd', value)]));
const gauge = (label, value, max, used, words) => h('div.gauge', h('meter', { min: 0, value, max,
  low: max * (used ? 0.7 : 0.1), high: max * (used ? 0.9 : 0.3), optimum: used ? 0 : max,
  'aria-label': label }), h('span', words));

const decimals = new Intl.NumberFormat('en', { maximumFractionDigits: 6 });
const whole = new Intl.NumberFormat('en', { maximumFractionDigits: 1 });
const compact = new Intl.NumberFormat('en', { notation: 'compact', maximumSignificantDigits: 3 });
const number = (value) => (value > 9999 ? whole : decimals).format(value || 0);
const few = (value) => number(Number((value || 0).toPrecision(3)));
const balance = (value) => (value === null ? 'unlimited' : number(value));
const count = (n, word) => `${number(n)} ${word}${n === 1 ? '' : 's'}`;
const calendar = new Intl.DateTimeFormat('en', { dateStyle: 'medium' });
const clock = new Intl.DateTimeFormat('en', { month: 'short', day: 'numeric', hour: '2-digit',
  minute: '2-digit', second: '2-digit', hourCycle: 'h23' });
const iso = (seconds) => new Date(seconds * 1000).toISOString();
const moment = (seconds, format = clock) => (seconds == null ? '–'
  : h('time', { datetime: iso(seconds), title: iso(seconds) }, format.format(seconds * 1000)));
const duration = (ms) => (ms == null ? '–'
  : ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

const notice = (message, bad = false) => Object.assign($('notice'), { textContent: message,
  hidden: !message, className: bad ? 'card bad' : 'card' });
// A load in the background: its failure is told at the top, that of a section left not at all.
const guard = (promise) => promise.catch((error) => {
  if (error.name !== 'AbortError') notice(error.message, true);
});

// ---- API -------------------------------------------------------------------------------
// What is only read ends with the section that asked for it.
async function send(path, method = 'GET', body, signal = method === 'GET' ? view.stop.signal : null) {
  const mine = session;
  const headers = { Authorization: `Bearer ${mine.key}` };
  if (body) headers['Content-Type'] = 'application/json';
  const options = { method, headers, body: body && JSON.stringify(body), signal, cache: 'no-store' };
  const response = await fetch(`/${path}`, options).catch((error) => {
    throw error.name === 'AbortError' ? error : new Error('The server cannot be reached.');
  });
  const { status: code, ok } = response;
  const answer = ok ? null : await response.json().catch(() => null);
  if (session === mine && ok) return response;
  if (session === mine && code === 401 && mine.me) {
    signOut('You were signed out: this key is not valid any more.');
  }
  if (session !== mine) throw new DOMException('signed out', 'AbortError');
  const message = answer?.error?.message || `The server answered with status ${code}.`;
  throw Object.assign(new Error(message), { code, wait: response.headers.get('Retry-After') });
}
const call = async (path, ...more) => (await send(`v1/${path}`, ...more)).json();

const query = (fields) => {
  const set = Object.entries(fields).filter(([, value]) => value || value === 0);
  return set.length ? `?${new URLSearchParams(set)}` : '';
};
const link = (path, fields = {}) => `#/${path.map(encodeURIComponent).join('/')}${query(fields)}`;
const here = () => [view.section, view.id].filter(Boolean);

// ---- Sign-in ---------------------------------------------------------------------------
function signOut(message = '') {
  session.playing?.abort();
  session = null;
  sessionStorage.removeItem(STORE);
  for (const node of document.querySelectorAll('dialog')) node.remove();
  open();
  notice(message);
}

async function signIn({ key }) {
  if (!/^[!-~]+$/.test(key)) throw new Error('This is not an API key: it has spaces or accents.');
  session = { key };
  session.me = await call('account').catch((error) => {
    session = null;
    if (error.code !== 401) throw error;
    sessionStorage.removeItem(STORE);
    throw new Error('Wrong key: it is unknown or was revoked. Check it and try again.');
  });
  sessionStorage.setItem(STORE, key);
  notice('');
  await open().catch(() => { location.hash = ''; }); // an account that is gone
}

function signInCard() {
  const enter = (key) => { sheet.elements.key.value = key; sheet.requestSubmit(); };
  const sheet = form('sign-in', [field('key', 'API key', '', { id: 'key-input', type: 'password',
    autocomplete: 'off', spellcheck: 'false', required: true, placeholder: 'sk-…' })], 'Sign in', signIn,
  $('main').dataset.demo && press('', 'Try the demo key', () => enter($('main').dataset.demo),
    { id: 'demo' }));
  const stored = sessionStorage.getItem(STORE);
  if (stored) setTimeout(enter, 0, stored);
  return h('section.card', h('h1', 'API Keys dashboard'), h('p', 'Sign in with an API key of your '
    + 'account. It stays in this browser tab until you sign out or close the tab.'), sheet);
}

// ---- Sections and their addresses --------------------------------------------------------
const SECTIONS = new Map([
  ['overview', ['Overview', () => [balanceCard(), limitsCard(), spendingCard()]]],
  ['keys', ['Keys', () => keysCard()]], ['requests', ['Requests', () => requestsCard()]],
  ['playground', ['Playground', () => session.playground ??= playgroundCard()]],
  ['admin', ['Admin', () => (view.id ? accountCards() : adminCards())]],
]);
const hidden = (section) => ({ keys: session.me.demo, admin: !session.me.admin })[section];
// Shows what the address names, Overview for what it cannot.
async function open() {
  clearTimeout(timer);
  view.stop.abort();
  view = { stop: new AbortController() };
  $('sections').hidden = !session;
  if (!session) {
    $('view').replaceChildren(signInCard());
    return $('key-input').focus();
  }
  const [path, search = ''] = location.hash.slice(2).split('?');
  let [section, id] = path.split('/');
  try { id = section === 'admin' && id ? decodeURIComponent(id) : ''; } catch { id = ''; }
  if (!SECTIONS.has(section) || hidden(section)) [section, id] = ['overview', ''];
  const base = id ? `accounts/${encodeURIComponent(id)}` : 'account';
  const mine = Object.assign(view, { section, id, base, query: new URLSearchParams(search),
    updates: [] });
  $('sections').replaceChildren(h('bdi.name', { id: 'account-id' }, session.me.id),
    ...[...SECTIONS].filter(([each]) => !hidden(each)).map(([each, [title]]) => h('a', {
      href: link([each]), 'aria-current': each === section ? 'page' : null }, title)),
    press('', 'Sign out', () => signOut(), { id: 'sign-out' }));
  mine.account = id ? await call(base) : session.me;
  const [title, draw] = SECTIONS.get(section);
  const heading = h('h1', { tabindex: -1 }, id ? ['Account ', name(id)] : title);
  $('view').replaceChildren(heading, h('div.grid', { id: section }, draw()));
  heading.focus();
  schedule(0);
}

function schedule(delay = POLL_MS) {
  clearTimeout(timer);
  if (!document.hidden && session?.me) timer = setTimeout(poll, delay);
}

async function poll() {
  const mine = view;
  let delay = POLL_MS;
  try {
    const figures = () => JSON.stringify([mine.account.credits, mine.account.live]);
    const before = mine.polled && figures();
    mine.account = await call(mine.base);
    if (!mine.id) session.me = mine.account;
    if (mine.polled === false) notice('');
    mine.polled = true;
    await Promise.all(mine.updates.map((update) => update(figures() !== before)));
  } catch (error) {
    if (error.name === 'AbortError' || mine !== view) return;
    mine.polled = false;
    notice(error.message, true);
    delay = Math.max(delay, 1000 * (error.wait || 0));
  }
  schedule(delay);
}

// ---- Overview --------------------------------------------------------------------------
const balanceCard = (...children) => card('Credits left',
  live(({ credits }) => h('p.big', { id: 'available' }, balance(credits.available))),
  h('p.soft', { id: 'pace' }), live(({ credits }) => pairs([['Granted', balance(credits.granted)],
    ['Spent', number(credits.spent)], ['Held by running requests', number(credits.held)]])), children);
const budgetGauge = ({ credits, available, per }) => gauge('Budget left', available, credits, false,
  `${number(available)} of ${number(credits)} left, ${per === 'total' ? 'in' : 'per'} ${per}`);
const limitsCard = () => card('Limits of this key, live', live(({ budget, limits, live: now }) => {
  const { requests_limit: most, requests_remaining: left, concurrent } = now;
  return h('div', { id: 'live' }, h('p', 'Requests, limit ', h('b', limits.rate)),
    gauge('Requests', most - left, most, true, `${number(most - left)} used, ${number(left)} left`),
    h('p', 'Requests in progress, at most ', h('b', number(limits.concurrent))),
    gauge('In progress', concurrent, limits.concurrent, true, `${number(concurrent)} now`),
    budget && [h('p', 'Budget'), budgetGauge(budget)]);
}));
const MEASURES = { credits: (row) => row.credits, requests: (row) => row.requests,
  tokens: (row) => row.input_tokens + row.output_tokens, failures: (row) => row.failed + row.refused };
const COUNTS = ['requests', 'failed', 'refused', 'input_tokens', 'cached_tokens', 'output_tokens',
  'images', 'credits'];
const SHADES = 7; // colours of groups; what is beyond them is one group
const title = (text) => (text[0].toUpperCase() + text.slice(1)).replaceAll('_', ' ');
const group = (row, by) => String(row[`${by}_id`] ?? row[by] ?? '');
// Rows of usage summed by the values of a field, the highest first.
function sums(rows, by, measure) {
  const groups = new Map();
  for (const row of rows) {
    const id = group(row, by);
    const sum = groups.get(id) || { id, name: row[by] };
    for (const each of COUNTS) sum[each] = (sum[each] || 0) + row[each];
    groups.set(id, sum);
  }
  return [...groups.values()].sort((a, b) => measure(b) - measure(a) || b.requests - a.requests);
}
// Spending by day; which days, groups and figures stands in the address.
function spendingCard(usage = `${view.base}/usage`, groups = ['model', 'key']) {
  const asked = { days: '30', by: groups[0], show: 'credits', ...Object.fromEntries(view.query) };
  if (!Object.hasOwn(MEASURES, asked.show)) asked.show = 'credits';
  const [picture, beneath, days] = [h('div'), h('div'), h('div')];
  async function load() {
    const mine = { ...asked };
    const { by, show } = mine;
    const { data, days: length } = await call(`${usage}${query({ days: mine.days, by: `day,${by}` })}`);
    if (JSON.stringify(mine) !== JSON.stringify(asked)) return;
    const today = Math.max(Date.now(), ...data.slice(0, 1).map((row) => Date.parse(row.day))) / 1000;
    const dates = Array.from({ length }, (_, i) => iso(today - (length - 1 - i) * DAY_S).slice(0, 10));
    if ($('pace')) $('pace').textContent = pace(view.account.credits, dates, data);
    const all = sums(data, by, MEASURES[show]);
    const ranked = all.filter(MEASURES[show]);
    const called = (sum) => sum.name || `(no ${by})`;
    const stacks = ranked.slice(0, SHADES + 1).map((sum, i) => ({ values: dates.map(() => 0),
      name: i < SHADES ? called(sum) : count(ranked.length - SHADES, 'other') }));
    const places = new Map(ranked.map(({ id }, i) => [id, Math.min(i, SHADES)]));
    const at = new Map(dates.map((day, i) => [day, i]));
    for (const row of data.filter(MEASURES[show])) {
      stacks[places.get(group(row, by))].values[at.get(row.day)] += MEASURES[show](row);
    }
    const linked = (sum) => (!sum.name || usage === 'usage' && by !== 'account' ? name(called(sum))
      : anchor(by === 'account' ? link(['admin', sum.id])
        : link(view.id ? here() : ['requests'], { [by]: sum.id }), name(sum.name)));
    put(picture, chart(`${title(show)} by day`, dates, stacks, show));
    put(beneath, table('sums', `By ${by}`, [[title(by), linked],
      ...COUNTS.map((each) => [title(each), each, /cached|images/.test(each) ? 'rest' : ''])],
    'Nothing was used.').fill(all));
    put(days, table('by-day', `${title(show)} by day`, [['Day (UTC)', (row) => row.id],
      ...stacks.map((stack, i) => [stack.name, ({ values }) => number(values[i]), 'num']),
      ['All', ({ values }) => number(values.reduce((a, b) => a + b, 0)), 'num']], 'Nothing.')
      .fill(dates.map((id, i) => ({ id, values: stacks.map((stack) => stack.values[i]) }))
        .filter(({ values }) => values.some(Boolean)).reverse()));
  }
  const pick = (of, label, options) => field(of, label, asked[of], { options,
    onchange: ({ target }) => {
      asked[of] = target.value;
      history.replaceState(null, '', link(here(), asked));
      guard(load());
    } });
  view.updates.push((changed) => changed && guard(load()));
  return wide('Spending', h('div.row.picks',
    pick('days', 'Period', [['7', '7 days'], ['30', '30 days'], ['90', '90 days'], ['366', 'A year']]),
    pick('by', 'By', groups.map((each) => [each])),
    pick('show', 'Show', Object.keys(MEASURES).map((each) => [each]))),
  picture, beneath, fold('The chart as a table', days));
}
// The pace is the last seven days', or the days since the first request if they are fewer.
function pace(credits, dates, data) {
  const week = data.filter(({ day }) => dates.slice(-7).includes(day));
  const spent = week.reduce((sum, row) => sum + row.credits, 0);
  if (!spent) return 'Nothing was spent in the last 7 days.';
  const older = credits.spent - spent > 1e-6; // rows come newest first
  const days = older ? 7 : dates.length - dates.indexOf(week.at(-1).day);
  const at = `${days > 1 ? `the last ${days} days` : 'today'}: ${few(spent / days)} credits a day.`;
  return credits.available === null ? `Spent ${at}`
    : `Lasts ${lasts((credits.available / spent) * days)} at the pace of ${at}`;
}
const lasts = (days) => (days < 1 ? 'less than a day' : days > 3650 ? 'more than ten years'
  : `about ${count(Math.floor(days), 'day')}`);

// ---- Chart -----------------------------------------------------------------------------
// Stacked bars over `labels`; a line follows the pointer or the arrow keys and reads them out.
function chart(heading, labels, stacks, unit) {
  const totals = labels.map((_, i) => stacks.reduce((sum, { values }) => sum + values[i], 0));
  const [peak, all] = [Math.max(...totals), totals.reduce((a, b) => a + b, 0)];
  const summary = `${all ? number(all) : 'No'} ${unit} in ${labels.length} days`
    + `${all ? `; most on ${labels[totals.indexOf(peak)]}: ${number(peak)}` : ''}.`;
  const reading = h('p', { id: 'reading' }, summary);
  if (!all) return reading;
  const scale = 10 ** Math.floor(Math.log10(peak));
  const top = scale * [1, 1.2, 1.6, 2, 2.4, 3.2, 4, 5, 6, 8, 10].find((n) => n * scale >= peak * 0.9999);
  const step = 100 / labels.length;
  const line = h('line', { class: 'cursor', y1: 0, y2: '100%', visibility: 'hidden' });
  const bars = labels.map((_, i) => {
    let y = 100;
    return stacks.map(({ values }, shade) => {
      const height = values[i] && Math.max((values[i] / top) * 100, 0.5);
      y -= height;
      return height > 0 && h('rect', { class: `c${shade}`, x: `${(i + 0.1) * step}%`, y: `${y}%`,
        width: `${step * 0.8}%`, height: `${height}%` });
    });
  });
  let place = labels.length - 1;
  const read = (i) => {
    place = Math.max(0, Math.min(labels.length - 1, i));
    for (const end of ['x1', 'x2']) line.setAttribute(end, `${(place + 0.5) * step}%`);
    line.setAttribute('visibility', 'visible');
    const parts = stacks.filter(({ values }) => values[place])
      .map(({ name: of, values }, _, { length }) => (length > 1 ? `${of} ${number(values[place])}` : of));
    reading.textContent = `${labels[place]}: ${[`${number(totals[place])} ${unit}`, ...parts].join(', ')}`;
    plot.setAttribute('aria-valuenow', place);
    plot.setAttribute('aria-valuetext', reading.textContent);
  };
  const leave = () => { reading.textContent = summary; line.setAttribute('visibility', 'hidden'); };
  const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -labels.length, End: labels.length };
  const svg = h('svg', { 'aria-hidden': 'true' }, [0, 25, 50, 75, 100].map((at) => [
    h('line', { class: 'rule', x2: '100%', y1: `${at}%`, y2: `${at}%` }),
    h('text', { x: -6, y: `${at}%`, dy: '.32em' }, compact.format(top * (1 - at / 100)))]), bars, line);
  const plot = h('div.plot', { id: 'chart', role: 'slider', tabindex: 0, 'aria-label': heading,
    'aria-valuemin': 0, 'aria-valuemax': place, 'aria-valuenow': place, 'aria-valuetext': summary,
    onfocus: () => read(place), onblur: leave, onpointerleave: leave, onpointermove: ({ clientX }) => {
      const { left, width } = svg.getBoundingClientRect();
      read(Math.floor(((clientX - left) / width) * labels.length));
    }, onkeydown: (event) => {
      if (!Object.hasOwn(steps, event.key)) return;
      event.preventDefault();
      read(place + steps[event.key]);
    } }, svg);
  return h('figure.chart', h('figcaption.soft', `${heading}, in ${unit}`), plot, h('p.ends.soft',
    { 'aria-hidden': 'true' }, h('span', labels[0]), h('span', labels.at(-1))), reading,
  h('ul.legend', stacks.map((stack, i) => h('li', h(`i.c${i}`), name(stack.name)))));
}

// ---- Requests --------------------------------------------------------------------------
const ENDINGS = new Map(Object.entries({ client: 'you left before the end', timeout: 'took too long',
  failed: 'the provider failed at the end', cut: 'the provider broke off', drain: 'cut by a restart' }));
const reason = ({ code }) => code && (ENDINGS.get(code) || code.replaceAll('_', ' '));
const status = ({ state, status: code }) => (state === 'open' ? tag('soft', 'running')
  : tag(code < 400 ? 'good' : code < 500 ? 'warn' : 'bad', String(code || state)));
const speed = (row) => (row.stream && row.output_tokens && row.duration_ms > row.ttfb_ms
  ? (row.output_tokens / (row.duration_ms - row.ttfb_ms)) * 1000 : 0);

function requestsCard() {
  const { query: asked, base } = view;
  const text = (of) => asked.get(of) || '';
  // Whole days of the browser's time zone, both included.
  const at = (of, days) => text(of) && (Date.parse(`${text(of)}T00:00`) / 1000 || 0) + days * DAY_S;
  const wanted = { since: at('since', 0), until: at('until', 1), model: text('model'),
    key: text('key'), status: text('status'), failed: text('failed') };
  const bounded = Object.values(wanted).some(Boolean);
  const list = table('requests', 'Requests', [
    ['Time', (row) => press('link', moment(row.created), () => receipt(row))],
    ['Status', (row) => [status(row), ' ', h('span.soft', reason(row))]],
    ['Model', (row) => name(row.model || '–')], ['Key', (row) => name(row.key || '–')],
    ['Tokens in', 'input_tokens', 'rest'], ['Tokens out', 'output_tokens', 'rest'],
    ['Credits', (row) => (row.estimated ? '≈ ' : '') + number(row.credits), 'num'],
    ['Duration', (row) => duration(row.duration_ms), 'num rest'],
  ], `No requests ${bounded ? 'like these' : 'yet'}.`);
  const shown = h('span.soft', { id: 'requests-count', role: 'status' });
  const [load, more] = paged('requests-more', `${base}/requests`, (rows) => {
    list.fill(rows);
    shown.textContent = rows.length ? `${number(rows.length)} shown` : '';
  }, PAGE, wanted);
  more.prepend(shown);
  more.append(press('', 'CSV, newest 200', () => guard(csv()), { id: 'csv' }));
  async function csv() {
    const answer = await send(`v1/${base}/requests${query({ limit: 200, format: 'csv', ...wanted })}`);
    const href = URL.createObjectURL(await answer.blob());
    h('a', { download: 'requests.csv', href }).click();
    setTimeout(() => URL.revokeObjectURL(href), 1000);
  }
  const own = (of, label, more) => field(of, label, text(of), more);
  const filters = fold('Filter', form('filters', [own('since', 'From', { type: 'date' }),
    own('until', 'To', { type: 'date' }), own('model', 'Model'), own('key', 'Key'),
    own('status', 'Status', { inputmode: 'numeric', size: 4 }),
    field('failed', 'failed', text('failed') === 'true', { type: 'checkbox' })], 'Show', (fields) => {
    location.hash = link(here(), fields);
  }));
  filters.open = bounded || innerWidth > 720;
  view.updates.push((changed) => changed && load());
  return wide(view.id && 'Requests', filters, list, more);
}

function receipt(row) {
  dialog('Receipt', pairs([
    ['Outcome', [status(row), ' ', reason(row) || (row.state === 'open' ? '' : 'answered')]],
    ['When', `${iso(row.created).slice(0, 19).replace('T', ' ')} UTC`],
    ['Model', name(row.model || '–')], ['Key', name(row.key || '–')],
    ['Asked', `/v1/${row.path || ''}${row.stream ? ', as a stream' : ''}`],
    ['Answered by', row.upstream && `${row.upstream}, at attempt ${row.attempts}`],
    ['Tokens', `${number(row.input_tokens)} in${row.cached_tokens ? ` (${number(row.cached_tokens)
    } of them from a cache)` : ''}, ${number(row.output_tokens)} out`], ['Images', row.images || null],
    ['Time', `${duration(row.ttfb_ms)} to the first byte, ${duration(row.duration_ms)} in all`],
    ['Speed', speed(row) ? `${few(speed(row))} tokens a second` : null],
    ['Cost', `${number(row.credits)} credits${row.estimated ? ', by an estimate' : ''}`],
    ['Id', h('code', row.id)]]));
}

// ---- Keys ------------------------------------------------------------------------------
const bound = () => session.me.demo || (!session.me.admin && Object.keys(session.me.key).length > 2);

function termFields({ budget, expires, models, limits, metrics } = {}) {
  const offered = new Set([...view.account.models.map(({ id }) => id), ...(models || [])]);
  const amount = { type: 'number', step: 'any', min: 0 };
  return [field('credits', 'Budget, credits', budget?.credits, amount),
    field('per', 'Budget per', budget?.per, { options: [['day'], ['month'], ['total']] }),
    field('expires', 'Expires', expires, { type: expires?.includes('T') ? 'text' : 'date' }),
    field('rate', 'Rate', limits?.rate, { placeholder: '60/minute' }),
    field('concurrent', 'At once', limits?.concurrent, { type: 'number', min: 1 }),
    field('models', 'Models (none: all)', models || [], { multiple: true, size: 4,
      options: [...offered].map((id) => [id]) }),
    session.me.admin && field('metrics', 'reads /metrics only', Boolean(metrics),
      { type: 'checkbox' })];
}

const keyBody = ({ name: called, admin, credits, per, expires, rate, concurrent, models, metrics }) => ({
  name: called, admin: admin || undefined, metrics: session.me.admin ? metrics || null : undefined,
  budget: credits ? { credits: Number(credits), per } : null, expires: expires || null,
  models: models.length ? models : null, limits: rate || concurrent
    ? { rate: rate || null, concurrent: Number(concurrent) || null } : null });

function keysCard() {
  const { base } = view;
  const path = (key) => `${base}/keys/${encodeURIComponent(key.id)}`;
  const ours = (key) => key.id === session.me.key?.id;
  const terms = ({ expires, models, limits, metrics }) => [expires && `until ${expires}`,
    models && `only ${models.join(', ')}`, limits?.rate,
    limits?.concurrent && `${limits.concurrent} at once`, metrics && 'metrics'].filter(Boolean);
  const act = (kind, words, key, work) => press(kind, words, () => work(key),
    { 'aria-label': `${words} ${key.name}` });
  const list = table('keys', 'API keys', [
    ['Name', (key) => h('span', name(key.name), ours(key) && [' ', tag('good', 'signed in')],
      key.admin && [' ', tag('warn', 'admin')], terms(key).map((words) => [' ', tag('soft', words)]))],
    ['Key', (key) => h('code', key.hint || '–')],
    ['Budget', (key) => (key.budget ? budgetGauge(key.budget) : '–')],
    ['Created', (key) => moment(key.created, calendar)],
    ['Last used', (key) => moment(key.last_used)], ['Kept in', (key) => key.source],
    ['Change', (key) => (key.revoked ? h('span.soft', 'revoked')
      : bound() || (key.admin && !session.me.admin) ? '' : h('span.pair',
        key.source !== 'keys.json' && act('edit', 'Edit', key, edit),
        act('danger', 'Revoke', key, revoke)))],
  ], 'This account has no keys.');
  const [load, more] = paged('keys-more', `${base}/keys`, list.fill);
  const edit = (key) => ask('edit-form', ['Edit ', name(key.name)], [field('name', 'Name', key.name,
    { required: true }), termFields(key)], 'Save', async (fields) => {
    await call(path(key), 'PATCH', keyBody(fields));
    await open();
  });
  const revoke = (key) => ask('revoke-form', 'Revoke this key?', h('p', { id: 'ask-text' },
    name(key.name), ' ', h('code', key.hint), ' stops working at once, for good.',
    ours(key) && ' You are signed in with it.'), 'Revoke', async () => {
    await call(path(key), 'DELETE');
    if (ours(key)) signOut('You were signed out: you revoked the key you were using.');
    else await open();
  });
  const maker = form('key-form', [field('name', 'Name of the new key', '', { required: true,
    maxlength: 300, autocomplete: 'off' }), session.me.admin && field('admin', 'admin', false,
    { type: 'checkbox' }), fold('Budget, expiry, models, limits', h('div.row', termFields()))],
  'Make key', async (fields) => {
    const made = await call(`${base}/keys`, 'POST', keyBody(fields));
    await open();
    const ready = h('div', h('h3', 'Ready to paste'));
    dialog(['New key ', name(made.name)], h('p', 'Copy it now: it is not shown again.'), h('code.secret',
      { id: 'made-key' }, made.key), copyButton('new key', () => made.key), ready);
    ready.append(...await snippets(made.key, made.models?.[0] || view.account.models[0]?.id));
  });
  view.updates.push(() => guard(load()));
  return wide(view.id && 'API keys', !bound() && maker, list, more);
}
// The documentation's own examples, with this key in them and a model that it may use.
async function snippets(key, model) {
  const page = new DOMParser().parseFromString(await (await fetch('/')).text(), 'text/html');
  const of = page.querySelector('main').dataset;
  return ['curl-chat', 'python-requests', 'javascript-fetch', 'env'].map((id) => {
    const text = page.getElementById(id).textContent.replaceAll(of.key, key)
      .replaceAll(`"${of.model}"`, JSON.stringify(model)).trim();
    return fold(title(id.split('-')[0]), h('figure.example', h('pre', { tabindex: 0 }, text),
      copyButton(id, () => text)));
  });
}

// ---- Admin -----------------------------------------------------------------------------
function adminCards() {
  const [totals, low, asleep] = ['totals', 'low', 'upstreams'].map((id) => h('div', { id }));
  const opened = ({ id }) => anchor(link(['admin', id]), name(id));
  const list = table('accounts', 'All accounts', [['Account', (row) => h('span', opened(row),
    row.admin && [' ', tag('warn', 'admin')], row.closed && [' ', tag('soft', 'closed')])], ['Keys', 'keys'],
    ...['granted', 'spent', 'held', 'available'].map((part) => [part === 'available' ? 'Left'
      : title(part), (row) => balance(row.credits[part]), 'num']),
    ['In 7 days', (row) => few(row.week.credits), 'num'], ['Lasts', (row) => (row.lasts === null ? '–'
      : h('span', { class: row.lasts < 14 ? 'bad' : '' }, lasts(row.lasts))), 'num'],
    ['Refused, 7 days', (row) => number(row.week.refused), 'num'],
  ], 'There are no accounts.');
  const [load, more] = paged('accounts-more', 'accounts', async (entries) => {
    const weeks = new Map((await call('usage?days=7&by=account')).data.map((row) => [row.account, row]));
    const rows = entries.map((row) => {
      const week = weeks.get(row.id) || { credits: 0, refused: 0, failed: 0 };
      const left = row.credits.available;
      return { ...row, week, lasts: left !== null && week.credits ? (left / week.credits) * 7 : null };
    });
    list.fill(rows);
    const sum = (of) => number(rows.reduce((all, row) => all + (of(row) || 0), 0));
    put(totals, pairs([['Accounts', number(rows.length)], ['Keys', sum((row) => row.keys)],
      ...['granted', 'spent', 'held', 'available'].map((part) =>
        [title(part), sum((row) => row.credits[part])]), ...['credits', 'refused', 'failed'].map(
        (part) => [`${title(part)} in 7 days`, sum((row) => row.week[part])])]));
    const soon = rows.filter(({ lasts: left }) => left !== null && left < 14)
      .sort((a, b) => a.lasts - b.lasts).slice(0, 10);
    put(low, soon.length ? h('ul', soon.map((row) => h('li', opened(row),
      ` ${number(row.credits.available)} left, lasts ${lasts(row.lasts)}`)))
      : h('p.soft', 'No account runs out within 14 days at the pace of the last 7.'));
  }, 500);
  // As Prometheus is told it, by the worker that answers.
  async function upstreams() {
    const text = await (await send('metrics')).text();
    const found = text.matchAll(/^proxy_upstream_resting\{upstream=("(?:[^"\\]|\\.)*")\} (\d)$/gm);
    put(asleep, h('ul', [...found].map(([, label, rests]) => h('li', name(JSON.parse(label)), ' ',
      rests === '1' ? tag('bad', 'rests: it could not be reached') : tag('good', 'in use')))));
  }
  view.updates.push((changed) => changed && guard(Promise.all([load(), upstreams()])));
  const maker = form('account-form', [field('id', 'Name of the new account', '', { required: true,
    autocomplete: 'off' }), field('credits', 'Credits', 0, { type: 'number', step: 'any', min: 0 })],
  'Make account', async ({ id, credits }) => {
    await call('accounts', 'POST', { id, credits: Number(credits) });
    location.hash = link(['admin', id]);
  });
  return [card('Totals', totals), h('div', card('Balances running out', low), card('Upstreams', asleep)),
    wide('All accounts', maker, list, more), spendingCard('usage', ['account', 'model'])];
}

function accountCards() {
  const { base } = view;
  const grants = table('grants', 'Grants', [['When', (row) => moment(row.created)],
    ['Credits', 'credits'], ['Note', (row) => name(row.note || '')]], 'Nothing was granted here.');
  const [load, more] = paged('grants-more', `${base}/grants`, grants.fill, 10);
  const giver = form('grant-form', [field('credits', 'Grant credits (below 0: take back)', '',
    { type: 'number', step: 'any', required: true }), field('note', 'Note', '', { maxlength: 200 })],
  'Grant', async ({ credits, note }) => {
    await call(`${base}/grants`, 'POST', { credits: Number(credits), note });
    giver.reset();
    guard(load());
    schedule(0);
    return `Granted ${number(Number(credits))}.`;
  });
  const close = () => ask('close-form', 'Close this account?', h('p',
    'Its keys stop working at once. What it spent stays on record.'), 'Close the account', async () => {
    await call(base, 'DELETE');
    location.hash = link(['admin']);
  });
  guard(load());
  return [balanceCard(view.account.closed && tag('soft', 'closed')), card('Grants and corrections',
    giver, grants, more), spendingCard(), keysCard(), requestsCard(),
  wide('', h('p.actions', anchor(link(['admin']), 'All accounts'),
    press('danger', 'Close the account', close, { id: 'close' })))];
}

// ---- Playground ------------------------------------------------------------------------
const MOST_SHOWN = 100000; // characters of an answer: the page stays quick
// Writes a text into a node as paragraphs and code blocks while it comes, as text alone.
function prose(node) {
  let [block, code, begun, line, shown] = [null, false, false, '', 0];
  const add = (made) => { node.append(made); return made; };
  return (piece) => {
    if (shown > MOST_SHOWN) return;
    shown += piece.length;
    if (shown > MOST_SHOWN) {
      add(h('p.soft', `Only the first ${number(MOST_SHOWN)} characters are shown; Copy has all.`));
      piece = piece.slice(0, MOST_SHOWN - shown);
    }
    for (const part of piece.split(/(?<=\n)/)) {
      line += part;
      const whole = line.endsWith('\n');
      if (!begun && !whole && line.length < 100 && /^ {0,3}`/.test(line)) continue; // a fence?
      if (!begun && whole && /^ {0,3}```/.test(line)) {
        code = !code;
        const pre = code && h('pre', { tabindex: 0 });
        block = pre || null;
        if (pre) add(h('figure.example', pre, copyButton('code', () => pre.textContent)));
      } else if (!begun && whole && !code && !line.trim()) block = null;
      else { // where it may break: Chromium takes 20 s to break 200,000 letters in a row
        (block ??= add(h('p', { dir: 'auto' }))).append(
          ...line.split(/(\S{100})/).flatMap((run, i) => (i ? [h('wbr'), run] : run)));
      }
      begun = !whole && line !== '';
      line = '';
    }
  };
}
// Server-sent events: one JSON object a data line; an error object or a missing [DONE] means
// that the answer is not whole.
async function readStream(body, take) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error('The answer broke off.');
    const lines = (rest + value).split('\n');
    rest = lines.pop();
    for (const line of lines.filter((each) => each.startsWith('data:'))) {
      const data = line.slice(5).trim();
      if (data === '[DONE]') return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      take(event.choices?.[0]?.delta || {});
    }
  }
}
function playgroundCard() {
  const { models } = session.me;
  const log = h('div', { id: 'log', role: 'log', 'aria-label': 'Conversation', tabindex: 0 });
  let past = [];
  async function play({ model, message, system, temperature, most, stop }) {
    if (!message) return;
    const [mine, started, asked] = [session, performance.now(), { role: 'user', content: message }];
    const [said, thoughts, answer] = [h('div.said'), h('div'), h('div.answer')];
    const reasoning = h('details.thoughts', { hidden: true }, h('summary', 'Reasoning'), thoughts);
    const told = h('p.soft.told');
    log.append(h('article.turn', said, reasoning, answer, told));
    prose(said)(message);
    const [think, write] = [prose(thoughts), prose(answer)];
    const draws = models.find(({ id }) => id === model)?.price.image != null;
    const messages = [...(system ? [{ role: 'system', content: system }] : []), ...past, asked];
    const body = { model, stream: true, messages, temperature: temperature ? Number(temperature)
      : undefined, max_tokens: Number(most) || undefined, stop: stop ? [stop] : undefined };
    let [text, id] = ['', null];
    mine.playing = new AbortController();
    sheet.elements.message.value = '';
    halt.disabled = false;
    said.scrollIntoView({ block: 'nearest' });
    try {
      const response = await send('v1/chat/completions', 'POST', body, mine.playing.signal);
      id = response.headers.get('x-request-id');
      await readStream(response.body, ({ content, reasoning_content: deep, reasoning: other }) => {
        if (deep || other) reasoning.hidden = Boolean(think(deep || other));
        text += content || '';
        if (content && !draws) write(content);
      });
    } catch (error) {
      if (session !== mine) throw error;
      told.append(error.name === 'AbortError' ? 'Stopped. ' : h('span.bad', `${error.message} `));
      if (!text) sheet.elements.message.value ||= message;
    } finally {
      mine.playing = null;
      halt.disabled = true;
    }
    if (text) past.push(asked, { role: 'assistant', content: text });
    // An image model answers with an address and nothing else: it is shown as a picture.
    const src = draws && /^(https:[/][/]|data:image[/])\S+$/.exec(text.trim())?.[0];
    if (src) answer.append(h('img', { src, alt: `Picture by ${model}`, referrerpolicy: 'no-referrer' }),
      h('p', h('a', { href: src, download: 'picture', rel: 'noreferrer' }, 'Save the picture')));
    else if (draws) write(text);
    for (const end of [think, write]) end('\n');
    if (text) told.append(copyButton('answer', () => text), ' ');
    sheet.elements.message.focus({ preventScroll: true });
    schedule(0);
    const row = id && await call(`account/requests/${id}`, 'GET', undefined, null);
    if (row) told.append(`${count(row.input_tokens, 'token')} in, ${number(row.output_tokens)} out, `
      + `${number(row.credits)} credits, ${duration(performance.now() - started)}`
      + `${speed(row) ? `, ${few(speed(row))} tokens a second` : ''}.`);
  }
  const halt = press('', 'Stop', () => session.playing?.abort(), { id: 'play-stop', disabled: true });
  const wild = models.some(({ id }) => id.endsWith('*'));
  const sheet = form('play-form', [field('model', 'Model', models[0]?.id, { id: 'play-model', ...(wild
    ? { list: 'play-models', required: true } : { options: models.map(({ id }) => [id]) }) }),
  fold('System prompt, temperature, stop', h('div.row',
    field('system', 'System prompt', '', { rows: 2, class: 'long' }),
    field('temperature', 'Temperature', '', { type: 'number', min: 0, max: 2, step: 0.1 }),
    field('most', 'Output tokens, at most', '', { type: 'number', min: 1 }), field('stop', 'Stop at'))),
  field('message', 'Message (Enter sends, Shift+Enter breaks the line)', '', { id: 'play-message',
    rows: 3, required: true, dir: 'auto', class: 'long', onkeydown: (event) => {
      if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      sheet.requestSubmit();
    } })], 'Send', play, halt, press('', 'New conversation', () => {
    session.playing?.abort();
    past = [];
    log.replaceChildren();
  }, { id: 'play-new' }));
  return wide('', h('p.soft', 'Talks to a model with the key you signed in with: each turn counts and '
    + 'costs like any other request.'), log, sheet, h('datalist', { id: 'play-models' },
    wild && models.map(({ id }) => h('option', { value: id }))));
}

// ---- Wiring ----------------------------------------------------------------------------
onhashchange = () => { if (/^(#[/].*)?$/.test(location.hash)) { notice(''); guard(open()); } };
document.onvisibilitychange = () => schedule(0);
open();
"""

ASSETS = {
    "pages.css": (PAGES_CSS, "text/css"),
    "docs.js": (DOCS_JS, "text/javascript"),
    "dashboard.js": (DASHBOARD_JS, "text/javascript"),
}


if __name__ == "__main__":
    sys.exit(main())
