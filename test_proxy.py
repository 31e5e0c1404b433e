"""The promises of proxy.py, in the order of the module, each as a test.

Upstreams are real servers on loopback that misbehave on demand; what only shows
across processes is tested against the real server. `-m long` runs the long versions.
"""

from __future__ import annotations

import ast
import base64
import email
import errno
import fcntl
import functools
import gc
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from html.parser import HTMLParser
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.client import parse_headers, responses
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Self, TypeVar
from unittest.mock import MagicMock
from urllib.parse import quote

import pytest
import requests
from werkzeug import exceptions as http_errors

import proxy

# Harness -----------------------------------------------------------------------------

PROJECT = Path(__file__).resolve().parent  # where proxy.py stands
README = (PROJECT / "README.md").read_text()
REQUIREMENTS = (PROJECT / "requirements.txt").read_text()
SECRET = "sk-upstream-secret"  # the operator's key: no client may ever see it
DEMO_KEY, TEAM_KEY, OTHER_KEY = "sk-demo", "sk-team", "sk-other"
POOR_KEY, ADMIN_KEY = "sk-poor", "sk-admin"
ACCESS_KEY = "AKLTEXAMPLEACCESSKEYID0000"
SECRET_KEY = "ExampleSecretKey+/0123456789abcdefABCDEF=="
SAY_HELLO = [{"role": "user", "content": "Say hello"}]
POLL = 0.005  # seconds between two looks at a condition
T = TypeVar("T")


def wait_for(predicate: Callable[[], T], timeout: float = 5, what: str = "") -> T:
    """Return the predicate's value as soon as it is true, or fail naming `what`."""
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(POLL)
    return value


def long(*values: Any, **more: Any) -> Any:
    """A case that only `-m long` runs."""
    return pytest.param(*values, marks=pytest.mark.long, **more)


def short(value: Any) -> str:
    """A value as the name of a test."""
    return repr(value)[:20]


# -- Names ---------------------------------------------------------------------------

TAG = "<img src=x onerror=alert(1)>"
SHOWN_NAMES = [
    TAG, "{{7*7}}", "${7*7}", "مرحبا بالعالم", "שלום 123", "\"'`; DROP TABLE keys; --",
    "%3Cscript%3E", "a\\u003cb", "&lt;b&gt;", "x" * 100, "😀 e\u0301", "null", "?a=b#c",
]  # fmt: skip
REFUSED_NAMES = [
    "", "x" * 101, "x" * 300, "a\nb", "a\rb", "\x1b[31mred", "a\0b", "a\x7fb", "a\x9bb",
    "a\u202eb", "a\u2028b", "a\u200bb", "\ufeff", " a", "a ", "\u00a0", "\ud800",
    7, None, ["a"], {"a": 1}, True,
]  # fmt: skip


# -- Server --------------------------------------------------------------------------


class Gone(ConnectionError):
    """The peer left, or the test ended, while an answer was still to be sent."""


class Connection:
    """One accepted connection; `closed` is set once the peer has ended it."""

    def __init__(self, sock: socket.socket, server: Upstream) -> None:
        self.sock, self.server, self.input = sock, server, sock.makefile("rb")
        self.closed = threading.Event()

    def read(self, size: int) -> bytes:
        """Return exactly `size` bytes; raises Gone when the peer sends fewer."""
        if len(data := self.input.read(size)) < size:
            raise Gone
        return data

    def read_body(self, headers: Mapping[str, str]) -> bytes:
        """Return a counted or chunked body (RFC 9112 §6.3, §7.1); raises Gone."""
        if headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.read(int(headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.input.readline().split(b";")[0] or b"0", 16):
            chunks.append(self.read(size))
            assert self.read(2) == b"\r\n", "a chunk without its CRLF"
        parse_headers(self.input)  # the trailers
        return b"".join(chunks)

    def peer_left(self) -> bool:
        """Peek whether the peer has closed, half-closed or reset."""
        try:
            return not self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except (BlockingIOError, ValueError):  # ValueError: TLS cannot peek
            return False
        except OSError:
            return True

    def wait(self, event: threading.Event | None, timeout: float = 1e9) -> None:
        """Wait for the event or the time; raises Gone if the peer leaves first."""
        event, deadline = event or threading.Event(), time.monotonic() + timeout
        while not event.is_set() and (left := deadline - time.monotonic()) > 0:
            if self.server.stopping.is_set() or self.peer_left():
                raise Gone
            event.wait(min(POLL, left))

    def finish(self) -> None:
        """Send FIN, read until the peer's end, free the socket."""
        with suppress(OSError, ValueError):  # ValueError: `reset` has closed it
            self.sock.shutdown(socket.SHUT_WR)
            while self.input.read1(65536):
                pass
        self.closed.set()
        self.input.close()
        self.sock.close()

    def reset(self) -> None:
        """End the connection with a RST."""
        linger = struct.pack("ii", 1, 0)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.input.close()
        self.sock.close()


@dataclass
class Request:
    """One request as the upstream got it, and the way to answer it."""

    method: str
    path: str
    query: str
    headers: list[tuple[str, str]]
    body: bytes
    connection: Connection = field(repr=False)
    keep: bool = True  # an answer that must end the connection sets False

    def __post_init__(self) -> None:
        self.closed = self.connection.closed  # set once the peer has left
        self.wait = self.connection.wait
        self.send = self.connection.sock.sendall

    def header(self, name: str) -> str:
        """Return a header's values joined by commas (RFC 9110 §5.3)."""
        return ", ".join(v for k, v in self.headers if k.lower() == name.lower())

    @cached_property
    def json(self) -> Any:
        """The parsed body, None where it is no JSON."""
        with suppress(ValueError):
            return json.loads(self.body)


Answer = Callable[[Request], None]


def read_request(connection: Connection) -> Request:
    """Read one request with its whole body; raises Gone at the peer's end."""
    if not (line := connection.input.readline()):
        raise Gone
    method, target, _ = line.decode("latin-1").split(" ")
    headers = parse_headers(connection.input)
    path, _, query = target.partition("?")
    body = connection.read_body(headers)
    keep = headers.get("Connection", "").lower() != "close"
    pairs = list(headers.items())
    return Request(method, path, query, pairs, body, connection, keep=keep)


class Upstream:
    """A server on loopback that answers by script and records what it was asked.

    `script` is one answer for every request, or a list of answers consumed in order;
    an entry None, and the end of the list, stand for the class's ordinary `answer`.
    What goes wrong in an answer fails the test when the server is closed.
    """

    scheme, prefix, key = "", "/v1", SECRET

    def __init__(self, script: Answer | Iterable[Answer | None] = ()) -> None:
        self.script: Any = script if callable(script) else list(script)
        self.requests: list[Request] = []
        self.connections: list[Connection] = []
        self.errors: list[Exception] = []
        self.released, self.stopping = threading.Event(), threading.Event()
        self.lock, self.threads = threading.Lock(), []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self.listener.getsockname()[1]
        self._start(self._accept)

    @property
    def url(self) -> str:
        """What `upstreams.NAME.url` in keys.json says, dialect included."""
        return f"{self.scheme}http://127.0.0.1:{self.port}{self.prefix}"

    @property
    def closed(self) -> list[Connection]:
        """The connections that the peer has ended."""
        return [one for one in self.connections if one.closed.is_set()]

    def wait_closed(self, count: int = 1, timeout: float = 5) -> list[Connection]:
        """Wait until the peer has ended that many connections."""
        wait_for(lambda: len(self.closed) >= count, timeout, f"{count} closed")
        return self.closed

    def wait_requests(self, count: int = 1, timeout: float = 5) -> list[Request]:
        """Wait until that many requests have arrived."""
        wait_for(lambda: len(self.requests) >= count, timeout, f"{count} requests")
        return self.requests

    def answer(self, request: Request) -> None:
        """Answer a request that the script has nothing for."""
        raise AssertionError(f"no answer scripted: {request.method} {request.path}")

    def respond(self, request: Request) -> None:
        """Answer one request by the script or the ordinary way."""
        with self.lock:
            one_for_all = callable(self.script) or not self.script
            answer = self.script if one_for_all else self.script.pop(0)
        (answer or self.answer)(request)

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        self.threads.append(threading.Thread(target=target, args=args, daemon=True))
        self.threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.connections.append(Connection(self.wrap(sock), self))
                self._start(self._serve, self.connections[-1])

    def wrap(self, sock: socket.socket) -> socket.socket:
        """Return the accepted socket as it is spoken to."""
        return sock

    def _serve(self, connection: Connection) -> None:
        keep = True
        try:
            while keep:
                request = read_request(connection)
                self.requests.append(request)
                self.respond(request)
                keep = request.keep
        except OSError:  # Gone is one: the peer may leave whenever it likes
            pass
        except Exception as error:
            self.errors.append(error)
        finally:
            connection.finish()

    def close(self) -> None:
        """End every connection and thread."""
        self.stopping.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.threads[0].join()  # so that no connection is accepted any more
        self.listener.close()
        for connection in self.connections:
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self.close()
        if self.errors and kind is None:
            raise self.errors[0]


# -- Answers -------------------------------------------------------------------------

JSON = ("Content-Type", "application/json")
EVENTS = ("Content-Type", "text/event-stream; charset=utf-8")
CHUNKED, CLOSE = ("Transfer-Encoding", "chunked"), ("Connection", "close")
Headers = Iterable[tuple[str, str]]


def head(status: int = 200, *headers: tuple[str, str]) -> bytes:
    """Return a response's status line and headers."""
    lines = [f"HTTP/1.1 {status} {responses.get(status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def chunk(data: bytes) -> bytes:
    """Return data as one chunk of a chunked body; no data is the terminal chunk."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def split(data: bytes, size: int | None) -> list[bytes]:
    """Return data in pieces of `size` bytes."""
    return [data[at : at + size] for at in range(0, len(data), size)]


def json_answer(
    obj: Any,
    status: int = 200,
    headers: Headers = (),
    *,
    gate: threading.Event | None = None,
    cut: int | None = None,
    lead: bytes = b"",
) -> Answer:
    """Answer JSON after the gate; `cut` closes after so many bytes of the body."""
    body = lead + json.dumps(obj, ensure_ascii=False).encode()
    start = head(status, JSON, ("Content-Length", str(len(body))), *headers)

    def answer(request: Request) -> None:
        if gate:
            request.wait(gate)
        request.keep &= cut is None
        request.send(start + body[:cut])

    return answer


def sse_bytes(events: Iterable, done: bool = True) -> bytes:
    """Serialise events: bytes as they are, text as data, anything else as JSON."""
    parts = []
    for event in [*events, "[DONE]"] if done else events:
        text = event if isinstance(event, str | bytes) else json.dumps(event)
        as_it_is = isinstance(text, bytes)
        parts.append(text if as_it_is else b"data: " + text.encode() + b"\n\n")
    return b"".join(parts)


def sse(
    events: Iterable,
    *,
    chunked: bool = True,
    pieces: int | None = None,
    cut: int | None = None,
    delay: float = 0,
    done: bool = True,
    gate: threading.Event | None = None,
    headers: Headers = (),
) -> Answer:
    """Answer a stream, one write an event, or `pieces` bytes a write, `delay` apart.

    `cut` ends the connection after so many bytes of the body, chunked without its
    terminal chunk. The gate is waited for between the first event and the rest.
    """
    blocks = [sse_bytes([one], done=False) for one in events]
    blocks += [sse_bytes([])] if done else []
    if pieces:
        kept = blocks[: bool(gate)]
        blocks = kept + split(b"".join(blocks[len(kept) :]), pieces)
    if cut is not None:
        starts = itertools.accumulate(map(len, blocks), initial=0)
        blocks = [one[: max(0, cut - at)] for at, one in zip(starts, blocks)]
    start = head(200, EVENTS, CHUNKED if chunked else CLOSE, *headers)

    def answer(request: Request) -> None:
        request.keep &= chunked and cut is None
        request.send(start)
        for number, block in enumerate(filter(None, blocks)):
            if gate and number == 1:
                request.wait(gate)
            request.wait(None, delay if number else 0)
            request.send(chunk(block) if chunked else block)
        if chunked and cut is None:
            request.send(chunk(b""))

    return answer


def raw(data: bytes, *, reset: bool = False) -> Answer:
    """Send these bytes and end the connection, with FIN or RST."""

    def answer(request: Request) -> None:
        request.keep = False
        request.send(data)
        if reset:
            request.connection.reset()

    return answer


def stall(
    before_headers: bool = True,
    gate: threading.Event | None = None,
    then: Answer = raw(b""),
) -> Answer:
    """Be silent, with or without an event stream's headers, then answer `then`.

    The gate, or `up.released`, or the peer's leaving ends it.
    """

    def answer(request: Request) -> None:
        request.send(b"" if before_headers else head(200, EVENTS, CHUNKED))
        request.wait(gate or request.connection.server.released)
        then(request)

    return answer


PLAIN = head(200, JSON, CLOSE)  # a JSON answer that the close ends


def trickle(data: bytes, interval: float, start: bytes = PLAIN) -> Answer:
    """Send `start` at once (none: b""), then data byte by byte, then close."""

    def answer(request: Request) -> None:
        request.keep = False
        request.send(start)
        for piece in split(data, 1):
            request.send(piece)
            request.wait(None, interval)

    return answer


STREAM = head(200, EVENTS, CLOSE)
MORE = b'data: {"choices": [{"index": 0, "delta": {"content": "more "}}]}\n\n'
ENDLESS = {  # start, what is repeated, seconds between
    "comments": (STREAM, b": keep-alive\n\n", 0.01),
    "blanks": (PLAIN, b"\n", 0.01),
    "events": (STREAM, MORE, 0.01),
    "line": (STREAM + b'data: {"x": "', b"x" * 65536, 0),
    "body": (PLAIN + b'{"x": "', b"x" * 65536, 0),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X-More: " + b"x" * 999 + b"\r\n", 0),
    "informational": (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.001),
}


def repeated(start: bytes, data: bytes, times: int, interval: float = 0) -> Answer:
    """Send much, fast unless there are seconds between, then close."""

    def answer(request: Request) -> None:
        request.keep = False
        request.send(start)
        for _ in range(times):
            request.send(data)
            request.wait(None, interval)

    return answer


def endless(kind: str) -> Answer:
    """Send one of `ENDLESS` until the peer leaves."""
    start, data, interval = ENDLESS[kind]
    return repeated(start, data, 10**9, interval)


def usage_of(prompt: int, completion: int, **more: Any) -> dict:
    """Return a usage object as OpenAI has it."""
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    return {**counts, "total_tokens": prompt + completion, **more}


def completion(model: str, kind: str, choices: list, **more: Any) -> dict:
    """Return what completions and their chunks have in common."""
    about = {"id": "chatcmpl-1", "object": kind, "created": 1700000000, "model": model}
    return {**about, "choices": choices, **more}


def choice(part: str, value: dict, finish: str | None = None) -> dict:
    """Return a choice whose `part` is `message` or `delta`."""
    return {"index": 0, part: value, "logprobs": None, "finish_reason": finish}


def chat_json(text, model="gpt-test", usage=None, finish="stop", **message) -> dict:
    """Return a completion; its words are its tokens unless `usage` says otherwise."""
    said = choice("message", {"role": "assistant", "content": text, **message}, finish)
    usage = usage or usage_of(5, len(text.split()))
    return completion(model, "chat.completion", [said], usage=usage)


def chat_chunk(model: str, delta: dict, finish: str | None = None, **more: Any) -> dict:
    """Return one chunk with one choice."""
    choices = [choice("delta", delta, finish)]
    return completion(model, "chat.completion.chunk", choices, **more)


def chat_chunks(
    text, model="gpt-test", usage=None, finish="stop", include_usage_chunk=True
) -> list[dict]:
    """Return the events of a streamed answer, a word a chunk, without [DONE].

    `finish=None` leaves the finish chunk out.
    """
    more = {"usage": None} if include_usage_chunk else {}
    deltas = [{"role": "assistant", "content": ""}]
    deltas += [{"content": word} for word in re.findall(r"\s*\S+|\s+", text)]
    events = [chat_chunk(model, delta, **more) for delta in deltas]
    events += [chat_chunk(model, {}, finish, **more)] if finish else []
    if include_usage_chunk:
        usage = usage or usage_of(5, len(text.split()))
        events.append(completion(model, "chat.completion.chunk", [], usage=usage))
    return events


def either(whole: Answer, stream: Answer) -> Answer:
    """Answer in the way that was asked for."""

    def answer(request: Request) -> None:
        (stream if request.json.get("stream") else whole)(request)

    return answer


def reported(usage: dict) -> Answer:
    """Answer three words with that usage."""
    chunks = chat_chunks("one two three", usage=usage)[1:]
    return either(json_answer(chat_json("one two three", usage=usage)), sse(chunks))


def typed(data: bytes, kind: str = "application/json", status: int = 200) -> Answer:
    """Answer these bytes under this content type."""
    size = ("Content-Length", str(len(data)))
    return raw(head(status, ("Content-Type", kind), size, CLOSE) + data)


# -- Providers -----------------------------------------------------------------------


class FakeVolcengine(Upstream):
    """JiMeng's signed submit-and-poll; it checks every signature itself.

    `states` are the answers to a task's polls, the last for ever: `("generating",)`
    never finishes. Faults go into the script: `[None, volc_error(50429)]` is a good
    submit and a refused poll. Without `force_single` a task makes four images.
    """

    scheme, prefix, key = "jimeng+", "", f"{ACCESS_KEY}:{SECRET_KEY}"
    states: tuple[str, ...] = ("in_queue", "generating", "done")

    def __init__(self, script: Answer | Iterable[Answer | None] = ()) -> None:
        self.tasks: dict[str, list] = {}  # task id: links, states to come
        self.refused: list[str] = []  # codes of requests whose signature was wrong
        super().__init__(script)

    @property
    def submits(self) -> int:
        """How many tasks were asked for, refused ones included."""
        return sum("SubmitTask" in one.query for one in self.requests)

    @property
    def polls(self) -> int:
        """How often a result was asked for, refused polls included."""
        return sum("GetResult" in one.query for one in self.requests)

    def respond(self, request: Request) -> None:
        """Check the signature before anything else."""
        code = volc_fault(request, *self.key.split(":"))
        self.refused += [code] if code else []
        (volc_denied(code) if code else super().respond)(request)

    def answer(self, request: Request) -> None:
        """Make a task or report on one."""
        action, version = re.findall(r"Action=(\w+)&Version=([\d-]+)", request.query)[0]
        assert version == "2022-08-31", version
        submit = action == "CVSync2AsyncSubmitTask"
        assert submit or action == "CVSync2AsyncGetResult", action
        data = (self._submit if submit else self._result)(request.json)
        json_answer(volc_body(10000, data, "Success"))(request)

    def _submit(self, body: dict) -> dict:
        assert body["req_key"] and body["prompt"], "a submit needs both"
        assert ("width" in body) == ("height" in body), "both or none"
        with self.lock:
            task = str(7392616336519610409 + len(self.tasks))
            images = 1 if body.get("force_single") else 4
            links = [volc_image(task, number) for number in range(images)]
            self.tasks[task] = [links, *self.states]
        return {"task_id": task}

    def _result(self, body: dict) -> dict:
        links, *states = self.tasks.get(body["task_id"], [[], "not_found"])
        if states[1:]:
            del self.tasks[body["task_id"]][1]
        wanted = json.loads(body.get("req_json", "{}")).get("return_url")
        urls = links if wanted and states[0] == "done" else None
        return {"binary_data_base64": None, "image_urls": urls, "status": states[0]}


def volc_image(task: str, number: int = 0) -> str:
    """Return the link that `FakeVolcengine` delivers for a task."""
    return f"https://img.example/{task}/{number}.jpeg?x-expires=86400&sig=a%2Bb"


def volc_body(code: int, data: dict | None, message: str) -> dict:
    """Return the vendor's business envelope."""
    about = {"status": code, "request_id": "2025061718460554C9", "time_elapsed": "9ms"}
    return {"code": code, "data": data, "message": message, **about}


VOLC_STATUS = {50400: 401, 50429: 429, 50430: 429, 50500: 500, 50501: 500}


def volc_error(code: int, status: int | None = None) -> Answer:
    """Answer a business error with the vendor's HTTP status: 400, even for 5052x."""
    body = volc_body(code, None, f"Vendor Message {code}")
    return json_answer(body, status or VOLC_STATUS.get(code, 400))


def volc_denied(code: str = "SignatureDoesNotMatch", status: int = 401) -> Answer:
    """Answer as the vendor's front does, before any service is reached."""
    error = {"CodeN": 100010, "Code": code, "Message": f"{code}: {ACCESS_KEY}"}
    about = {"RequestId": "20260101120000", "Service": "cv", "Region": "cn-north-1"}
    return json_answer({"ResponseMetadata": {**about, "Error": error}}, status)


def volc_fault(request: Request, access: str, secret: str) -> str | None:
    """Return the vendor's code for what is wrong with a signature, None if nothing."""
    headers = {name.lower(): value for name, value in request.headers}
    if f"Credential={access}/" not in headers.get("authorization", ""):
        return "InvalidAccessKey"
    moments = (time.gmtime(time.time() - ago) for ago in range(-60, 61))
    ways = {time.strftime("%Y%m%dT%H%M%SZ", moment): moment for moment in moments}
    about = access, secret, headers["host"], request.query, request.body
    if not (moment := ways.get(headers.get("x-date", ""))):
        return "SignatureDoesNotMatch"
    wanted = proxy.volcengine_signature(*about, moment)
    found = {name: headers.get(name.lower()) for name in wanted}
    good = found == wanted and (request.method, request.path) == ("POST", "/")
    return None if good else "SignatureDoesNotMatch"


def deepseek_error(status: int, message: str = "Insufficient Balance") -> Answer:
    """Answer an error as DeepSeek does: its code tells nothing, no Retry-After."""
    code = "invalid_request_error"
    error = {"message": message, "type": code, "param": None, "code": code}
    return json_answer({"error": error}, status)


class FakeDeepSeek(Upstream):
    """DeepSeek's chat with the ways in which it differs from OpenAI's.

    Thinks unless told not to; words are tokens; only `max_tokens` limits them.
    """

    scheme = "deepseek+"
    ids = ("deepseek-flash", "deepseek-v4-pro")
    thought, text = "Let me see.", "Hello from the deep."
    prompt, cached, waits = 20, 8, 2  # tokens, cached ones, keep-alives while queued

    def answer(self, request: Request) -> None:
        """Answer one of the three calls."""
        models = [{"id": name, "object": "model"} for name in self.ids]
        cash = [{"currency": "USD", "total_balance": "110.00"}]
        routes = {
            "/chat/completions": self._chat,
            "/models": json_answer({"object": "list", "data": models}),
            "/user/balance": json_answer({"is_available": True, "balance_infos": cash}),
        }
        if request.header("Authorization") != f"Bearer {self.key}":
            message = f"Authentication Fails, Your api key: ****{self.key[-4:]}"
            return deepseek_error(401, message)(request)
        route = request.path.removeprefix(self.prefix)
        routes.get(route, deepseek_error(404, "Not Found"))(request)

    def _chat(self, request: Request) -> None:
        body = request.json
        thinks = body.get("thinking", {}).get("type", "enabled") == "enabled"
        if refusal := self._refusal(body, thinks):
            return deepseek_error(400, refusal)(request)
        thought = self.thought.split() if thinks else []
        whole = [*thought, *self.text.split()]
        words = whole[: body.get("max_tokens", 8192)]
        finish = "stop" if words == whole else "length"
        answer = self._stream if body.get("stream") else self._complete
        said = words[: len(thought)], words[len(thought) :]
        answer(body["model"], *said, finish)(request)

    def _refusal(self, body: dict, thinks: bool) -> str | None:
        form = body.get("response_format", {}).get("type")
        roles = [message["role"] for message in body["messages"]]
        calls = [message for message in body["messages"] if "tool_calls" in message]
        forgot = not all("reasoning_content" in message for message in calls)
        reasons = {
            "Model Not Exist": body.get("model") not in self.ids,
            "unknown variant `developer`": "developer" in roles,
            "This response_format type is unavailable now": form == "json_schema",
            "Missing `reasoning_content` field": thinks and forgot,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _usage(self, thought: list[str], said: list[str]) -> dict:
        return usage_of(
            self.prompt,
            len(thought) + len(said),
            prompt_cache_hit_tokens=self.cached,
            prompt_cache_miss_tokens=self.prompt - self.cached,
            completion_tokens_details={"reasoning_tokens": len(thought)},
        )

    def _complete(self, model: str, thought: list, said: list, finish: str) -> Answer:
        more = {"reasoning_content": " ".join(thought)} if thought else {}
        usage = self._usage(thought, said)
        answer = chat_json(" ".join(said), model, usage, finish, **more)
        return json_answer(answer, lead=b"\n" * self.waits)

    def _stream(self, model: str, thought: list, said: list, finish: str) -> Answer:
        deltas = [{"role": "assistant", "content": None, "reasoning_content": ""}]
        deltas += [{"content": None, "reasoning_content": w + " "} for w in thought]
        deltas += [{"content": w + " ", "reasoning_content": None} for w in said]
        last = {"content": "", "reasoning_content": None}
        events = [b": keep-alive\n\n"] * self.waits
        events += [chat_chunk(model, delta) for delta in deltas]
        usage = self._usage(thought, said)
        return sse([*events, chat_chunk(model, last, finish, usage=usage)])


def image_url(number: int = 0) -> str:
    """Return a link that `FakeImages` delivers."""
    return f"https://ark.example/{number}.jpeg?X-Tos-Expires=86400"


def image_error(code: str, status: int = 400) -> Answer:
    """Answer Ark's error; with status 200 it looks like a success."""
    return json_answer({"error": {"code": code, "message": f"Failed: {code}"}}, status)


def image_answer(*urls: str | None) -> Answer:
    """Answer links; None is a single image that failed."""
    refused = {"error": {"code": "OutputImageSensitiveContentDetected", "message": ""}}
    data = [{"url": url} if url else refused for url in urls]
    usage = {"generated_images": sum(map(bool, urls))}
    return json_answer({"created": 1700000000, "data": data, "usage": usage})


class FakeImages(Upstream):
    """An OpenAI-style images API; odd outcomes are `image_` answers in a script."""

    scheme, prefix = "images+", "/api/v3"
    smallest = 3_686_400  # pixels that Seedream 4.5 and 5.0 want

    def answer(self, request: Request) -> None:
        """Deliver one link for each of `n`; the models are only asked for."""
        if request.header("Authorization") != f"Bearer {self.key}":
            return image_error("AuthenticationError", 401)(request)
        if request.path == f"{self.prefix}/models":
            return json_answer({"object": "list", "data": []})(request)
        body = request.json
        assert request.path == f"{self.prefix}/images/generations" and body["prompt"]
        size = re.fullmatch(r"(\d+)x(\d+)", body.get("size", ""))
        strict = size and re.search("-(4-5|5-0)-", body["model"])
        if strict and int(size[1]) * int(size[2]) < self.smallest:
            return image_error("InvalidParameter")(request)
        image_answer(*map(image_url, range(body.get("n", 1))))(request)


def typed_events(*events: dict) -> list[bytes]:
    """Events that are named by their types."""
    lines = [(one["type"].encode(), json.dumps(one).encode()) for one in events]
    return [b"event: %s\ndata: %s\n\n" % pair for pair in lines]


def message_events(text: str = "Hello", model: str = "claude-id") -> list[bytes]:
    """Return the events of a stream of /v1/messages, as Anthropic writes them."""
    usage = {"input_tokens": 50, "output_tokens": 1}
    about = {"id": "msg_1", "type": "message", "role": "assistant", "model": model}
    about |= {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
    block, delta = {"type": "text", "text": ""}, {"type": "text_delta", "text": text}
    stop = {"stop_reason": "end_turn", "stop_sequence": None}
    events = [
        {"type": "message_start", "message": about},
        {"type": "content_block_start", "index": 0, "content_block": block},
        {"type": "ping"},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": stop, "usage": {"output_tokens": 30}},
        {"type": "message_stop"},
    ]
    return typed_events(*events)


def message_json(**more: Any) -> dict:
    """Return a whole answer of /v1/messages."""
    about = {"id": "msg_1", "type": "message", "role": "assistant"}
    about |= {"model": "claude-id", "content": [{"type": "text", "text": "Hello"}]}
    about |= {"stop_reason": "end_turn", "stop_sequence": None}
    return {**about, "usage": {"input_tokens": 50, "output_tokens": 30}, **more}


def anthropic_error(kind: str, status: int, message: str = "No") -> Answer:
    """Answer an error as Anthropic does."""
    error = {"type": kind, "message": message}
    return json_answer({"type": "error", "error": error}, status)


class FakeAnthropic(Upstream):
    """Anthropic's API: it wants its own header for the key, and a version."""

    scheme = "anthropic+"

    def answer(self, request: Request) -> None:
        """Answer one of its three calls."""
        if request.header("x-api-key") != self.key or request.header("Authorization"):
            return anthropic_error("authentication_error", 401)(request)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", request.header("anthropic-version"))
        body = request.json or {}
        answers = {
            "/v1/models": json_answer({"data": [], "has_more": False}),
            "/v1/messages/count_tokens": json_answer({"input_tokens": 2095}),
            "/v1/messages": sse(message_events(), done=False)
            if body.get("stream")
            else json_answer(message_json()),
        }
        answers.get(request.path, anthropic_error("not_found_error", 404))(request)


# -- Gateway -------------------------------------------------------------------------


def merged(base: dict, over: Mapping[str, Any]) -> dict:
    """Return base with over laid upon it, object by object; None removes."""
    result = {**base, **over}
    for name in base.keys() & over.keys():
        if isinstance(base[name], dict) and isinstance(over[name], dict):
            result[name] = merged(base[name], over[name])
    return {name: value for name, value in result.items() if value is not None}


def keys_file(
    tmp_path: Path, upstream_url: str, key: str = SECRET, **overrides: Any
) -> Path:
    """Write keys.json with one upstream, `main`, and return its path.

    Overrides are merged into the file, object by object; None removes an entry.
    """
    price = {"price": {"input": 1, "cached": 0.1, "output": 2}, "max_output": 1000}
    image = {"price": {"image": 0.04}}
    off, on = ({"thinking": {"type": kind}} for kind in ("disabled", "enabled"))
    flash = {"upstream": "main/deepseek-flash", **price}
    config = {
        "limits": {"rate": "1000/minute", "concurrent": 100},
        "accounts": {
            "demo": {
                "demo": True, "credits": 1, "models": ["echo"],
                "keys": {"readme": DEMO_KEY},
            },
            "team": {"credits": 100, "keys": {"main": TEAM_KEY}},
            "other": {"credits": 1, "keys": {"main": OTHER_KEY}},
            "poor": {"credits": 0, "keys": {"main": POOR_KEY}},
            "boss": {"credits": 1, "keys": {"main": ADMIN_KEY}, "admin": True},
        },
        "upstreams": {
            "main": {"url": upstream_url, "key": key},
            "echo": {"url": "echo:"},
        },
        "models": {
            "chat": {"upstream": "main/gpt-test", "about": "Chat", **price},
            "deepseek-chat": {**flash, "defaults": off},
            "deepseek-r1": {**flash, "defaults": on},
            "embed": {"upstream": "main/embed-test", "price": {"input": 0.02}},
            "flat": {"upstream": "main/flat-test", "price": {"request": 0.01}},
            "jimeng-image": {"upstream": "main/jimeng_t2i_v40", **image},
            "seedream": {"upstream": "main/doubao-seedream-4-5-251128", **image},
            "echo": {"upstream": "echo/echo", "price": {"input": 1, "output": 1}},
        },
    }
    path = tmp_path / "keys.json"
    path.touch(0o600)
    path.write_text(json.dumps(merged(config, overrides), indent=2))
    return path


def free_port() -> int:
    """Return a loopback port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def processes() -> Iterator[tuple[int, int, int]]:
    """Yield pid, parent and group of every process that runs (zombies do not)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, group = stat.read_text().rpartition(")")[2].split()[:3]
            if state not in "ZX":
                yield int(stat.parent.name), int(parent), int(group)


def proof(folder: Path) -> list[str]:
    """Return what `check` finds wrong with the ledger there, beside a server or not."""
    with closing(proxy.Ledger(folder / "proxy.db")) as ledger:
        return ledger.check()


def healthy(port: int) -> bool:
    """Whether a server answers its GET /healthz."""
    ask = b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n"
    with suppress(OSError):
        answer = raw_http(port, ask + b"Connection: close\r\n\r\n", 2)
        return answer.startswith(b"HTTP/1.1 200")
    return False


class Gateway:
    """The real server in a session of its own; `start` works again after an end."""

    def __init__(
        self, keys, db=None, workers=1, threads=8, constants=None, env=None,
        project=PROJECT,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.project, self.log_file = project, keys.parent / f"gateway-{self.port}.log"
        # Servers that are started a hundred times need not be compiled each time.
        cache = f"{tempfile.gettempdir()}/proxy-tests-pycache-{os.getuid()}"
        quick = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": cache}
        self.env = {**os.environ, "PYTHONUNBUFFERED": "1", **quick, **(env or {})}
        changes = [f"proxy.{name} = {v!r}" for name, v in (constants or {}).items()]
        code = ["import proxy, sys", *changes, "sys.exit(proxy.main(sys.argv[1:]))"]
        options = {"keys": keys, "db": db or keys.parent / "proxy.db"}
        options |= {"host": "127.0.0.1", "port": self.port}
        options |= {"workers": workers, "threads": threads}
        words = [word for name, v in options.items() for word in (f"--{name}", str(v))]
        self.command = [sys.executable, "-c", "\n".join(code), "serve", *words]
        self.passed: tuple[int, ...] = ()  # descriptors

    def keep(self, sock: socket.socket) -> None:
        """Let the server have this listening socket as systemd hands it over."""
        self.port, self.passed = sock.getsockname()[1], (sock.fileno(),)
        self.url = f"http://127.0.0.1:{self.port}"
        named = "LISTEN_FDS='1', LISTEN_PID=str(os.getpid())"
        hand_over = f"os.dup2({sock.fileno()}, 3); os.environ.update({named})"
        self.command[2] = f"import os; {hand_over}\n{self.command[2]}"

    def start(self) -> Self:
        """Start the server and wait until /healthz answers."""
        with self.log_file.open("ab") as log:
            files = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            where = {"cwd": self.project, "env": self.env, "start_new_session": True}
            where["pass_fds"] = self.passed
            self.process = subprocess.Popen(self.command, **files, **where)
        try:
            wait_for(self._healthy, 20, f"{self.url}/healthz")
        except BaseException as error:
            self.kill_group()
            error.add_note(self.log())
            raise
        return self

    def _healthy(self) -> bool:
        assert self.process.poll() is None, "the gateway ended at its start"
        return healthy(self.port)

    @property
    def master_pid(self) -> int:
        """The process that was started (gunicorn's arbiter), and its group."""
        return self.process.pid

    def members(self) -> list[int]:
        """Return the pids of the master and all that came of it, while they run."""
        return [pid for pid, _, group in processes() if group == self.master_pid]

    def workers(self) -> list[int]:
        """Return the pids of the master's children that run."""
        return [pid for pid, parent, _ in processes() if parent == self.master_pid]

    def wait_workers(self, count: int, timeout: float = 10) -> list[int]:
        """Wait for exactly that many workers; they run, but may not serve yet."""
        wait_for(lambda: len(self.workers()) == count, timeout, f"{count} workers")
        return self.workers()

    def kill(self, pid: int, sig: int = signal.SIGKILL) -> None:
        """Send a signal to one process of this gateway; after SIGKILL it is gone."""
        assert pid in self.members(), f"{pid} is not of this gateway"
        os.kill(pid, sig)
        if sig == signal.SIGKILL:
            wait_for(lambda: pid not in self.members(), what=f"the end of {pid}")

    def log(self) -> str:
        """Return what the server has written to stdout and stderr, all starts."""
        return self.log_file.read_text(errors="replace")

    def kill_group(self) -> int:
        """Kill the master and every orphan of it; returns the exit status."""
        with suppress(ProcessLookupError):
            os.killpg(self.master_pid, signal.SIGKILL)
        wait_for(lambda: not self.members(), what="the end of the group")
        return self.process.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.kill_group()  # at once; an end in good order has tests of its own


# -- Clients -------------------------------------------------------------------------


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def client() -> requests.Session:
    """Return a session that takes nothing from the environment."""
    session = requests.Session()
    session.trust_env = False
    return session


def chat(
    url: str, key: str | None, stream: bool = False, timeout: float = 20, **body: Any
) -> requests.Response:
    """Ask for a chat completion of model `chat`, unless the body says otherwise."""
    whole = {"model": "chat", "messages": SAY_HELLO, **body}
    whole |= {"stream": True} if stream else {}
    headers = bearer(key) if key else {}
    more = {"headers": headers, "stream": stream, "timeout": timeout}
    return client().post(f"{url}/v1/chat/completions", json=whole, **more)


def raw_http(port: int, data: bytes, timeout: float = 5, finish: bool = False) -> bytes:
    """Send bytes (then FIN, with `finish`); return all that comes until the end.

    The end is the server's close or reset, or `timeout` seconds in all.
    """
    deadline, received = time.monotonic() + timeout, bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout) as sock:
        with suppress(OSError):  # a time-out is one
            sock.sendall(data)
            if finish:
                sock.shutdown(socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0:
                sock.settimeout(left)
                if not (piece := sock.recv(65536)):
                    break
                received += piece
    return bytes(received)


def sse_events(data: bytes) -> list[str]:
    """Return the data of each event, by the rules of the WHATWG's SSE section.

    An event that no empty line ends is none.
    """
    events, lines = [], []
    text = data.decode("utf-8", "replace").removeprefix("\ufeff")
    for line in re.split(r"\r\n|\n|\r", text)[:-1]:
        name, _, value = line.partition(":")
        if name == "data":
            lines.append(value.removeprefix(" "))
        elif not line and lines:
            events.append("\n".join(lines))
            lines = []
    return events


# Fixtures ----------------------------------------------------------------------------


FLUSH = proxy.RequestLog.flush


@pytest.fixture(scope="session", autouse=True)
def quiet():
    """Apps in this process write no log among the lines of pytest, neither of their
    own accord nor when they are closed, `atexit` for the last time; a test may flush."""

    def flush(log):
        if sys._getframe(1).f_code.co_name not in ("upkeep", "close"):
            FLUSH(log)

    proxy.RequestLog.flush = flush


@pytest.fixture
def ledgers():
    """Folders of a test's ledgers: after it, no hold is open and everything re-sums."""
    made: set[Path] = set()
    yield made
    sql = "SELECT 1 FROM requests WHERE state = 0"
    for folder in made:
        with closing(proxy.Ledger(folder / "proxy.db")) as ledger:
            wait_for(lambda: not ledger.read(sql), what="the end of all holds")
        assert proof(folder) == []


@pytest.fixture
def files(tmp_path, ledgers):
    """files(upstream_url, **overrides) -> keys.json, and its checked proxy.db."""

    def make(url='http://127.0.0.1:9', **overrides):
        ledgers.add(tmp_path)
        return keys_file(tmp_path, url, **overrides), tmp_path / "proxy.db"

    return make


@pytest.fixture
def app(files):
    """app(upstream_url, **overrides) -> the Flask app in this process."""
    with ExitStack() as stack:

        def make(*url, **overrides):
            made = proxy.create_app(*files(*url, **overrides))
            stack.callback(made.extensions["proxy"].close)
            return made

        yield make


@pytest.fixture
def gateway(files):
    """gateway(upstream_url, workers=, threads=, constants=, env=, **overrides)."""
    with ExitStack() as stack:

        def make(*url, workers=1, threads=64, constants=None, env=None, **overrides):
            more = {"workers": workers, "threads": threads, "constants": constants}
            made = Gateway(*files(*url, **overrides), **more, env=env)
            return stack.enter_context(made)

        yield make


# Units, in the order of the module ---------------------------------------------------

LIMITS = proxy.parse_limits({"rate": "1000/minute", "concurrent": 100}, "limits")
TEAM = proxy.Account("team", LIMITS, credits=1000)  # micro-credits
KEY = proxy.Key("key_main", "main", "team", "0" * 64, "sk-…")
SECOND_KEY = proxy.Key("key_second", "second", "team", "1" * 64, "sk-…")


def declared(id: str) -> int:
    """Micro-credits that keys.json grants, in these tests."""
    return TEAM.credits if id == TEAM.id else 0


def declared_account(id: str) -> proxy.Account:
    return TEAM if id == TEAM.id else proxy.Account(id, LIMITS)


def admit(
    ledger: proxy.Ledger, micro: int = 100, tokens: int = 0, price: int = 0,
    account: proxy.Account = TEAM, key: proxy.Key = KEY,
) -> proxy.Lease:  # fmt: skip
    """Hold `micro` credits, and `price` of them for each of `tokens`."""
    quote = proxy.Quote(micro * proxy.PICO, price * proxy.PICO, tokens)
    about = key, account, quote, "chat", "chat/completions", False
    outcome = ledger.admit(proxy.new_request_id(), *about).outcome
    if isinstance(outcome, proxy.ProxyError):
        raise outcome
    return outcome


def charge(micro: int, status: int = 200) -> proxy.Charge:
    return proxy.Charge(status, proxy.Usage(input=1), micro)


def release(ledger: proxy.Ledger, *leases: proxy.Lease) -> None:
    for lease in leases:
        ledger.settle(lease, proxy.Charge(503))


def sums(ledger: proxy.Ledger) -> tuple[int, int, int]:
    """Return what team has spent, held and lost."""
    return ledger.read("SELECT spent, held, lost FROM accounts WHERE id = 'team'")[0]


def alter(ledger: proxy.Ledger, sql: str) -> None:
    """Run one statement as another program would."""
    with closing(sqlite3.connect(ledger.path, isolation_level=None)) as db:
        db.execute(sql)


MakeLedger = Callable[..., proxy.Ledger]


@pytest.fixture
def make_ledger(tmp_path: Path) -> Iterator[MakeLedger]:
    """make_ledger(name) -> a ledger that is closed after the test, and not checked."""
    made = []

    def make(name: str = "proxy.db") -> proxy.Ledger:
        made.append(proxy.Ledger(tmp_path / name, worker=True))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def ledger(make_ledger: MakeLedger) -> Iterator[proxy.Ledger]:
    """A ledger that has no hold left and re-sums after the test."""
    ledger = make_ledger()
    yield ledger
    assert ledger.read("SELECT id FROM requests WHERE state = 0") == []
    assert ledger.check() == []


@pytest.fixture
def wall_clock(monkeypatch: pytest.MonkeyPatch) -> Jumping:
    """The wall clock of the program, which a test may set."""
    monkeypatch.setattr(proxy, "time", clock := Jumping())
    return clock


@pytest.fixture
def sleeping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ledgers made from now on do no upkeep but what a test asks for."""
    monkeypatch.setattr(proxy, "SWEEP_INTERVAL", 1e6)


# Errors ------------------------------------------------------------------------------

INVALID = "invalid_request_error"
ENVELOPES = [  # an error: status, OpenAI's type, code; Anthropic's type
    (proxy.BadRequest("m", param="n"), 400, INVALID, "invalid_request", INVALID),
    (proxy.Unauthorized(), 401, "authentication_error", "unauthorized",
     "authentication_error"),
    (proxy.InsufficientCredits("m"), 402, "insufficient_quota", "insufficient_credits",
     "billing_error"),
    (proxy.NotFound("m"), 404, INVALID, "not_found", "not_found_error"),
    (proxy.ModelNotFound("m"), 404, INVALID, "model_not_found", "not_found_error"),
    (proxy.MethodNotAllowed("m"), 405, INVALID, "method_not_allowed", INVALID),
    (proxy.TooLarge("m"), 413, INVALID, "request_too_large", "request_too_large"),
    (proxy.UnsupportedMediaType("m"), 415, INVALID, "unsupported_media_type", INVALID),
    (proxy.RateLimited("m", 3), 429, "rate_limit_error", "rate_limit_exceeded",
     "rate_limit_error"),
    (proxy.ProxyError("m"), 500, "api_error", "internal_error", "api_error"),
    (proxy.UpstreamFailed("m"), 503, "api_error", "provider_unavailable", "api_error"),
    (proxy.Overloaded("m", 1), 503, "api_error", "overloaded", "api_error"),
    (proxy.LedgerUnavailable("m"), 503, "api_error", "ledger_unavailable", "api_error"),
    (proxy.Refused(422, "m", "c", "p"), 422, INVALID, "c", INVALID),
    (proxy.Refused(404, "m", None, None), 404, INVALID, "invalid_request",
     "not_found_error"),
]  # fmt: skip


@pytest.mark.parametrize("error, status, type, code, anthropics", ENVELOPES)
def test_every_error_knows_its_envelopes(error, status, type, code, anthropics):
    told = json.loads(error.envelope())
    assert list(told) == ["error"] and told["error"]["message"]
    assert list(told["error"]) == ["message", "type", "param", "code"]
    wanted = {"type": type, "param": error.param, "code": code}
    assert (error.status, told["error"] | wanted) == (status, told["error"])
    wanted = {"type": "error", "error": {"type": anthropics, "message": error.message}}
    for path in "messages", "/v1/messages/count_tokens":
        assert json.loads(error.envelope(path)) == wanted


@pytest.mark.parametrize("text", ["half \ud83d a pair", "\udcff"])
def test_an_envelope_is_utf8_whatever_its_texts(text):
    error = proxy.Refused(400, text, text, text)
    assert json.loads(error.envelope().decode())["error"]["param"]


WAITS = [(-5, 1), (0, 1), (0.2, 1), (1, 1), (1.01, 2), (59.5, 60), (9e9, 60)]
REPEATS = [(proxy.RateLimited("m", wait), {"Retry-After": str(s)}) for wait, s in WAITS]
REPEATS += [
    (proxy.UpstreamFailed("m"), {"x-should-retry": "false"}),
    (proxy.UpstreamFailed("m", 5), {"Retry-After": "5"}),
    (proxy.LedgerUnavailable("m"), {"Retry-After": "5"}),
]


@pytest.mark.parametrize("error, headers", REPEATS)
def test_an_error_says_whether_a_repeat_helps_and_when(error, headers):
    assert error.headers == headers


@pytest.mark.parametrize("error", [proxy.UpstreamFailed, proxy.LedgerUnavailable])
def test_what_went_wrong_inside_is_not_told(error):
    assert b"10.0.0.1 refused" not in error("10.0.0.1 refused").envelope()


@pytest.mark.parametrize(
    "error, status, code",
    [
        (http_errors.NotFound(), 404, "not_found"),
        (http_errors.MethodNotAllowed(["POST"]), 405, "method_not_allowed"),
        (http_errors.RequestEntityTooLarge(), 413, "request_too_large"),
        (http_errors.RequestURITooLarge(), 414, "request_too_large"),
        (http_errors.UnsupportedMediaType(), 415, "unsupported_media_type"),
        (http_errors.RequestHeaderFieldsTooLarge(), 431, "request_too_large"),
        (http_errors.BadRequest(), 400, "invalid_request"),
        (http_errors.InternalServerError(), 500, "internal_error"),
    ],
)
def test_the_frameworks_refusals_become_ours(error, status, code):
    ours = proxy.from_http(error)
    assert (ours.status, ours.code) == (status, code)


# The file ----------------------------------------------------------------------------

TREE = ast.parse(Path(proxy.__file__).read_text())


def test_signatures_name_only_what_stands_above():
    places = {n.name: n.lineno for n in TREE.body if isinstance(n, ast.ClassDef)}
    functions = [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef)]
    late = [
        f"{function.name}: {name}"
        for function in functions
        for part in filter(None, [function.args, function.returns])
        for name in re.findall(r"(?<![.\w])\w+", ast.unparse(part))
        if places.get(name, 0) > function.lineno
    ]
    assert len(functions) > 200 and late == []


def test_every_package_that_is_imported_is_pinned():
    pinned = re.findall(r"^([a-z0-9-]+)==[\w.]+$", REQUIREMENTS, re.MULTILINE)
    nodes = [*ast.walk(TREE)]
    names = [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
    names += [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    foreign = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert foreign and {name.replace("_", "-") for name in foreign} <= {*pinned}


# Configuration -----------------------------------------------------------------------


def planted(path: str = "", value: Any = None) -> dict:
    """Return a small good keys.json with `value` at a dotted path."""
    whole = {
        "limits": {"rate": "60/minute", "concurrent": 10},
        "accounts": {"team": {"credits": 5, "keys": {"main": "sk-team"}}},
        "upstreams": {"main": {"url": "http://127.0.0.1:9/v1", "key": "secret"}},
        "models": {"chat": {"upstream": "main/gpt", "price": {"input": 1}}},
    }
    node, (*parents, last) = whole, path.split(".")
    for name in parents:
        node = node.setdefault(name, {})
    node |= {last: value} if last else {}
    return whole


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(planted()))
    return path


@pytest.fixture
def load(config_path: Path) -> Callable[[Any], proxy.Config]:
    """load(document) -> what the program makes of this document on disk."""

    def load(document: Any) -> proxy.Config:
        config_path.write_text(json.dumps(document))
        return proxy.ConfigFile(config_path).current

    return load


NAN, INFINITY = float("nan"), float("inf")
NO_AMOUNTS = [-1, -0.1, True, None, "5", [], {}, 1e-7, 10**10, NAN, INFINITY]
NO_LISTS = {  # path: values that are refused there, under that path
    "colour": [1],
    "cors": [
        None, 5, {}, [5], [None], [""], ["https://a.example/"], ["https://a.example/x"],
        ["a.example"], ["https://A.example"], ["https://*.example x"], [["*"]], ["**"],
    ],
    "limits": [[], None, 5, "60/minute"],
    "limits.colour": [1],
    "limits.rate": [
        60, None, True, [], {}, "", "60", "60/fortnight", "0/minute", "-1/minute",
        "1.5/minute", "10001/minute", "60/minute;oops", "5/1000 years",
    ],
    "limits.concurrent": [0, -1, 1.5, True, "10", None, 10**6],
    "accounts": [[], None, "team"],
    "accounts.team": [[], None, 5],
    "accounts.team.colour": [1],
    "accounts.team.credits": NO_AMOUNTS,
    "accounts.team.models": ["chat", {}, ["nope"], [["chat"]], [{}], [None], [5]],
    "accounts.team.admin": [1, 0, "yes", None],
    "accounts.team.demo": [1, 0, "yes", None, True],
    "accounts.team.limits": [[], None],
    "accounts.team.limits.rate": ["often", 5],
    "accounts.team.limits.concurrent": [0, "1"],
    "accounts.team.limits.colour": [1],
    "accounts.team.keys": [["sk-team"], None, "sk-team"],
    "accounts.team.keys.main": [
        5, None, [], "", "abc", "sk team", "sk,team", "sk-tëam", "x" * 201,
        "sha256:", "sha256:abc", "sha256:" + "g" * 64, "sha256:" + "0" * 65,
    ],
    "accounts.team.keys.a\tb": ["sk-other"],
    "accounts.a\nb": [{}],
    "accounts. a": [{}],
    "upstreams": [[], None],
    "upstreams.main": [[], None, "http://127.0.0.1:9"],
    "upstreams.main.colour": [1],
    "upstreams.main.url": [
        5, None, [], {}, "", "127.0.0.1", "ftp://host", "https://", "wat+https://host",
        "https://user:word@host", "https://host#f", "jimeng+https://host?q=1",
        "https://host:99999", "https://[::1",
    ],
    "upstreams.main.key": [5, None, [], "two\nlines", "schlüssel"],
    "upstreams.main.auth": [5, None, "", "basic", ["bearer"]],
    "upstreams.main.headers": [5, None, [], "x: y"],
    "upstreams.main.headers.x": [5, None, "two\nlines", "schlüssel"],
    "upstreams.main.headers.Content-Length": ["5"],
    "upstreams.main.headers.a b": ["5"],
    "upstreams.main.query": [5, None, [], "a=b"],
    "upstreams.main.query.x": [5, None, "two\nlines"],
    "upstreams.main.proxy": [
        5, None, "", "host", "host:3128", "https://host:1", "socks5://host:1", "http://",
        "http://host:99999", "http://host:1/path", "http://a@b@c:d:e",
    ],
    "upstreams.main.timeout": [0, -1, True, None, "5", 3601, NAN, INFINITY],
    "upstreams.main.without": [
        5, None, "user", [5], ["model"], ["messages"], ["stream"], ["max_tokens"],
    ],
    "upstreams.main.developer": [5, None, []],
    "upstreams.main.cap": [5, None, "", "tokens", ["max_tokens"]],
    "models": [[], None],
    "models.chat": [[], None, "main/gpt"],
    "models.chat.colour": [1],
    "models.chat.upstream": [
        5, None, {}, [], "main", "main/", "/gpt", "nope/gpt", ["main/gpt", 5],
        ["main/gpt", "nope/gpt"], [["main/gpt"]], "main/*",
    ],
    "models.chat.price.reported": NO_AMOUNTS,
    "models.chat.about": [5, None, []],
    "models.chat.defaults": [
        [], None, "x", {"model": "other"}, {"n": 4}, {"best_of": 4},
    ],
    "models.chat.max_output": [0, -1, 1.5, True, "8", None, 10**8],
    "models.chat.price": [{}, [], None, 1],
    "models.chat.price.colour": [1],
    "models.chat.price.input": NO_AMOUNTS,
    "models.chat.price.image": [-1, "1"],
    "models.chat.price.written": NO_AMOUNTS,
    "models.chat.price.hours": [None, {}, 5, "Mon"],
    "models.chat.allow": [
        None, {}, "service_tier:flex", [5], ["temperature"], [":flex"], [["modalities"]],
    ],
    "models.a\nb": [{"upstream": "main/gpt", "price": {"input": 1}}],
}  # fmt: skip
REFUSALS = [(path, value) for path, values in NO_LISTS.items() for value in values]


@pytest.mark.parametrize("path, value", REFUSALS)
def test_a_refused_value_is_named_by_its_path(load, path, value):
    with pytest.raises(proxy.ConfigError) as refused:
        load(planted(path, value))
    assert str(refused.value).startswith((f"keys.json: {path}:", f"keys.json: {path} ("))


NO_TERMS = {  # of a key: values that are refused, in keys.json and at run time
    "colour": [1],
    "expires": [
        5, True, [], "", "soon", "31.12.2030", "2030-02-30", "2030-13-01", "2030-01-01 ",
        "2030-01-01T25:00:00Z", "2030-01-01T00:00:00+01:00",
    ],
    "budget": [5, [], "5", True],
    "budget.credits": [each for each in NO_AMOUNTS if each is not None],
    "budget.per": ["year", "Day", "", 5, [], True],
    "budget.colour": [1],
    "models": ["chat", {}, ["nope"], [["chat"]], [None], 5],
    "limits": [[], 5, "60/minute"],
    "limits.rate": [60, "", "60/fortnight", "0/minute", "10001/minute"],
    "limits.concurrent": [0, -1, 1.5, True, "10", 10**6],
    "limits.colour": [1],
    "metrics": [1, 0, "yes"],
}  # fmt: skip
REFUSED_TERMS = [(path, value) for path, values in NO_TERMS.items() for value in values]


def terms_with(path: str, value: Any) -> dict:
    """Good terms with `value` at a dotted path."""
    good = {"budget": {"credits": 5, "per": "month"}} if "budget." in path else {}
    for name in reversed(path.split(".")):
        value = {name: value}
    return merged(good, value)


@pytest.mark.parametrize("path, value", REFUSED_TERMS)
def test_refused_terms_of_a_key_are_named_by_their_path(load, path, value):
    key = {"key": "sk-key", **terms_with(path, value)}
    with pytest.raises(proxy.ConfigError) as refused:
        load(planted("accounts.team.keys.bound", key))
    assert str(refused.value).startswith(f"keys.json: accounts.team.keys.bound.{path}:")


def test_a_key_may_be_an_object_with_its_terms(load):
    written = {
        "expires": "2030-01-31", "budget": {"credits": 2.5, "per": "week"},
        "models": ["chat"], "limits": {"rate": "5/minute"}, "metrics": True,
    }  # fmt: skip
    given = {"key": "sk-team", **written}
    whole = load(planted("accounts.team.keys.main", given))
    (key,) = whole.keys.values()
    (plain,) = load(planted()).keys.values()
    assert replace(key, terms=proxy.NO_TERMS) == plain
    assert key.terms.budget == proxy.Budget(2_500_000, "week")
    assert key.terms.written == written
    assert proxy.parse_terms(written, models=["chat"]) == key.terms


@pytest.mark.parametrize(
    "expires, last, first",
    [
        ("2030-01-31", "2030-01-31T23:59:59Z", "2030-02-01T00:00:00Z"),
        ("2030-01-31T12:00:00Z", "2030-01-31T11:59:59Z", "2030-01-31T12:00:00Z"),
    ],
)
def test_a_key_works_through_its_last_day(wall_clock, expires, last, first):
    terms = proxy.parse_terms({"expires": expires})
    told = []
    for moment in last, first:
        wall_clock.set(moment)
        told.append(terms.expired())
    assert told == [False, True]
    assert terms.written == {"expires": expires}


@pytest.mark.parametrize(
    "per, day, since, until",
    [
        ("day", "2026-11-25", "2026-11-25", "2026-11-26"),
        ("day", "2024-02-28", "2024-02-28", "2024-02-29"),
        ("week", "2026-11-23", "2026-11-23", "2026-11-30"),  # a Monday
        ("week", "2026-11-29", "2026-11-23", "2026-11-30"),
        ("week", "2027-01-01", "2026-12-28", "2027-01-04"),
        ("month", "2026-11-01", "2026-11-01", "2026-12-01"),
        ("month", "2024-02-29", "2024-02-01", "2024-03-01"),
        ("month", "2026-12-31", "2026-12-01", "2027-01-01"),
        ("total", "2026-11-25", "1970-01-01", "4707-11-29"),
    ],
)
def test_the_window_of_a_budget_is_of_the_utc_calendar(per, day, since, until):
    number = [proxy.parse_moment(text, "") // proxy.DAY - 1 for text in (day, since, until)]
    assert proxy.Budget(1, per).window(number[0]) == tuple(number[1:])


ACCOUNT_MODELS = [(None, None), (None, {"a"}), ({"a", "b"}, None), ({"a", "b"}, {"b", "c"})]


@pytest.mark.parametrize("account, key", ACCOUNT_MODELS, ids=str)
def test_a_key_may_use_what_its_account_may_use_and_no_more(account, key):
    whole = replace(TEAM, models=account and frozenset(account))
    terms = proxy.Terms(models=key and frozenset(key))
    for model in "abcd":
        may = all(each is None or model in each for each in (account, key))
        assert whole.under(terms).may_use(model) == may


@pytest.mark.parametrize(
    "account, key, rates, concurrent",
    [
        ({"rate": "9/minute", "concurrent": 5}, {}, {"9 per 1 minute"}, 5),
        ({"concurrent": 5}, {"concurrent": 3}, {"60 per 1 minute"}, 3),
        ({"concurrent": 5}, {"concurrent": 7}, {"60 per 1 minute"}, 5),
        ({"rate": "9/minute"}, {"rate": "5/hour"}, {"9 per 1 minute", "5 per 1 hour"}, 10),
        ({"rate": "9/minute"}, {"rate": "9/minute"}, {"9 per 1 minute"}, 10),
    ],
)  # fmt: skip
def test_of_a_keys_limits_and_its_accounts_the_smaller_counts(
    account, key, rates, concurrent
):
    whole = replace(TEAM, limits=proxy.parse_limits(account, ""))
    limits = whole.under(proxy.parse_terms({"limits": key})).limits
    assert ({*map(str, limits.items)}, limits.concurrent) == (rates, concurrent)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "line 1"),
        (b"{", "line 1"),
        (b'{\n  "limits": {},\n}', "line 3"),
        (b'{"limits": {}', "line 1"),
        (b'{"limits": {}} {}', "line 1"),
        (b"[]", "must be an object"),
        (b'"text"', "must be an object"),
        (b'{"limits": {}, "limits": {}}', "twice"),
        (b'{"accounts": {"a": {}, "a": {}}}', "twice"),
        (b"\xff\xfe{\x00}\x00", "UTF-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[" * 100_000, "keys.json"),
        (b'{"limits": {"concurrent": ' + b"9" * 5000 + b"}}", "keys.json"),
    ],
)
def test_a_file_that_is_no_good_json_is_refused_with_the_reason(
    config_path, data, reason
):
    config_path.write_bytes(data)
    with pytest.raises(proxy.ConfigError, match="keys.json") as refused:
        proxy.ConfigFile(config_path)
    assert reason in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_defaults_are_json_that_can_be_forwarded(config_path, number):
    text = json.dumps(planted("models.chat.defaults", {"temperature": "?"}))
    config_path.write_text(text.replace('"?"', number))
    with pytest.raises(proxy.ConfigError):
        proxy.ConfigFile(config_path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(proxy.ConfigError, match="keys.json: No such file"):
        proxy.ConfigFile(tmp_path / "keys.json")


@pytest.mark.parametrize(
    "same", ["sk-team", "sha256:" + hashlib.sha256(b"sk-team").hexdigest()], ids=short
)
def test_one_key_cannot_be_two_accounts(load, same):
    with pytest.raises(proxy.ConfigError, match="accounts.b.keys.k: .* twice"):
        load(planted("accounts.b.keys.k", same))


def test_the_sample_is_accepted_without_any_provider_key(monkeypatch):
    names = {"DEEPSEEK_API_KEY", "JIMENG_ACCESS_KEY", "JIMENG_SECRET_KEY"}
    for name in names:
        monkeypatch.delenv(name, raising=False)
    config = proxy.ConfigFile(PROJECT / "keys.json").current
    assert {*DOCUMENTED, "echo"} <= {*config.models}
    assert {*config.missing()} == names
    assert config.demo == ("sk-demo", "echo")


def test_limits_that_nobody_set_are_sixty_a_minute_and_ten_at_once():
    sample = proxy.ConfigFile(PROJECT / "keys.json").current.limits
    told = [(it.rate, it.concurrent) for it in (sample, proxy.parse_limits({}, ""))]
    assert told == [("60/minute", 10)] * 2


def test_the_readmes_keys_json_is_accepted():
    (document,) = re.findall(r"```json\n(.*?)```", README, re.S)
    config = proxy.parse_config(json.loads(document))
    assert {*config.models} == {"qwen", "chat"} and config.demo is None


def test_the_readme_names_tests_that_are_here():
    named = {*re.findall(r"`(test_[a-z]\w+)`", README)}
    assert len(named) > 20 and named <= {*globals()}


def test_names_are_taken_from_the_environment(load, monkeypatch):
    monkeypatch.setenv("PROXY_TEST_KEY", "from-outside")
    monkeypatch.delenv("PROXY_TEST_UNSET", raising=False)
    config = load(planted("upstreams.main.key", "$PROXY_TEST_KEY:$PROXY_TEST_UNSET"))
    upstream = config.models["chat"].routes[0][0]
    assert (upstream.key, upstream.missing) == ("from-outside:", ("PROXY_TEST_UNSET",))
    assert config.missing() == {"PROXY_TEST_UNSET": ["chat"]}
    assert "from-outside" not in repr(config)


@pytest.mark.parametrize("form", [str.lower, str.upper])
def test_a_key_and_its_hash_are_the_same_key(load, form):
    digest = form(hashlib.sha256(b"sk-team").hexdigest())
    hashed = load(planted("accounts.team.keys.main", f"sha256:{digest}"))
    assert [*hashed.keys] == [*load(planted()).keys]
    assert [key.hash for key in hashed.keys.values()] == [digest.lower()]


@pytest.mark.parametrize(
    "credits, micro",
    [(0, 0), (1, 10**6), (0.1, 10**5), (1e-6, 1), (1.5, 1_500_000), (10**9, 10**15)],
)
def test_credits_are_exact_integers(load, credits, micro):
    config = load(planted("accounts.team.credits", credits))
    assert config.account("team").credits == micro


def test_prices_are_exact_and_cached_input_costs_as_input_unless_said(load):
    price = {"input": 0.3, "output": 1.2, "request": 0.01, "image": 0.04}
    exact = load(planted("models.chat.price", price)).models["chat"].price
    assert exact == proxy.Price(300_000, 300_000, 300_000, 1_200_000, 4 * 10**10, 10**10)


PEAK = {"utc": "Mon-Fri 01:00-04:00", "input": 2}
KEY_PATH, HOURS_PATH = "accounts.team.keys.k", "models.chat.price.hours"
NO_HOURS = [
    5, None, "", "01:00", "1:00-2:00", "01:00-01:00", "24:00-01:00", "01:60-02:00",
    "01:00-24:01", "25:00-26:00", "Mo 01:00-02:00", "Mon-Fri", "Mon,Tue 01:00-02:00",
    "mon 01:00-02:00", "01:00-02:00 UTC", "Mon 01:00-02:00\n", "٠١:00-02:00",
]  # fmt: skip
OVERLAPS = [
    ("01:00-04:00", "03:59-05:00"), ("Mon-Fri 01:00-04:00", "Fri-Sat 02:00-03:00"),
    ("Mon 22:00-02:00", "Tue 01:00-03:00"), ("Sun 22:00-02:00", "Mon 01:59-03:00"),
    ("Wed-Fri 00:00-24:00", "Thu 12:00-12:01"), ("12:00-13:00", "12:00-13:00"),
]  # fmt: skip
OVERLAPS += [(other, one) for one, other in OVERLAPS]
TOLD_INSIDE = [  # path, value, and what is told of a part of it
    ("upstreams.main", {}, "upstreams.main.url: is required"),
    ("models.chat", {}, "models.chat.upstream: is required"),
    (KEY_PATH, {"expires": "2030-01-01"}, f"{KEY_PATH}.key: "),
    (KEY_PATH, {"key": 5}, f"{KEY_PATH}.key: "),
    (KEY_PATH, {"key": "abc"}, f"{KEY_PATH}.key: "),
    (KEY_PATH, {"key": "sk-kk", "budget": {"credits": 5}}, f"{KEY_PATH}.budget.per: "),
    ("accounts.team", {"demo": True, "keys": {"k": {"key": "sk-kk", "metrics": True}}},
     "accounts.team.keys: "),
    ("models.chat.price", {"reported": 1}, "models.chat.price.reported: needs other"),
    *(("models.chat.price", {"input": 1, "hours": hours}, f"{HOURS_PATH}.{told}")
      for hours, told in [
          ([5], "0:"),
          ([{"input": 1}], "0.utc: is required"),
          ([PEAK, {"utc": "Sat 01:00-04:00"}], "1: names no price"),
          ([PEAK | {"colour": 1}], "0.colour: unknown field"),
          ([PEAK | {"input": -1}], "0.input:"),
          ([PEAK | {"hours": []}], "0.hours: unknown field"),
          *(([PEAK | {"utc": utc}], "0.utc: must") for utc in NO_HOURS),
          *(([PEAK | {"utc": utc} for utc in ("Sat 23:00-23:30", *both)],
             f"2.utc: overlaps with '{both[0]}'") for both in OVERLAPS),
      ]),
]  # fmt: skip


@pytest.mark.parametrize("path, value, told", TOLD_INSIDE)
def test_what_cannot_be_meant_is_told_by_its_path(load, path, value, told):
    document = planted(path, value)
    document["models"]["echo"] = {"upstream": "echo/echo", "price": {"input": 1}}
    document["upstreams"]["echo"] = {"url": "echo:"}
    document["accounts"]["team"] |= {"models": ["echo"]} if "demo" in value else {}
    with pytest.raises(proxy.ConfigError) as refused:
        load(document)
    assert str(refused.value).startswith(f"keys.json: {told}")


def test_hours_replace_the_prices_that_they_name(load):
    price = {"input": 1, "cached": 0.1, "output": 2, "hours": [PEAK]}
    model = load(planted("models.chat.price", price)).models["chat"]
    assert model.price == proxy.Price(10**6, 10**5, 10**6, 2 * 10**6)
    assert model.hours[0].price == proxy.Price(2 * 10**6, 10**5, 2 * 10**6, 2 * 10**6)


def test_an_accounts_limits_complete_the_common_ones(load):
    config = load(planted("accounts.team.limits", {"concurrent": 3}))
    limits = config.account("team").limits
    assert (limits.rate, limits.concurrent) == ("60/minute", 3)
    assert config.account("made at run time").limits == config.limits


def test_several_upstreams_keep_their_order(load):
    whole = planted("models.chat.upstream", ["spare/a", "main/b/c"])
    whole["upstreams"]["spare"] = {"url": "https://spare.example"}
    routes = load(whole).models["chat"].routes
    told = [(one.name, one.port, id) for one, id in routes]
    assert told == [("spare", 443, "a"), ("main", 9, "b/c")]


@pytest.mark.parametrize(
    "change",
    [{"models": None}, {"models": []}, {"models": ["echo", "chat"]}, {"admin": True}],
)
def test_a_demo_may_reach_only_echo_models_and_is_no_admin(tmp_path, change):
    path = keys_file(tmp_path, "http://127.0.0.1:9")
    assert proxy.ConfigFile(path).current.demo == (DEMO_KEY, "echo")
    keys_file(tmp_path, "http://127.0.0.1:9", accounts={"demo": change})
    with pytest.raises(proxy.ConfigError, match="^keys.json: accounts.demo.demo: "):
        proxy.ConfigFile(path)


@pytest.mark.parametrize(
    "change", [{"demo": None}, {"keys": {"readme": "sha256:" + "0" * 64}}]
)
def test_only_demo_true_makes_a_key_public_and_no_hash_is_shown(tmp_path, change):
    path = keys_file(tmp_path, "http://127.0.0.1:9", accounts={"demo": change})
    assert proxy.ConfigFile(path).current.demo is None


def replace_by_a_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


SPOILS: dict[str, Callable[[Path], Any]] = {
    "broken": lambda path: path.write_text("{oops"),
    "empty": lambda path: path.write_text(""),
    "half written": lambda path: path.write_text(json.dumps(planted())[:100]),
    "deleted": Path.unlink,
    "unreadable": replace_by_a_folder,
    "refused": lambda path: path.write_text(json.dumps(planted("limits", "often"))),
    "strange": lambda path: path.write_text(json.dumps(planted("accounts.team", [[]]))),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_spoilt_file_keeps_the_last_good_one_and_says_so_once(config_path, spoil):
    file = proxy.ConfigFile(config_path)
    good = file.current
    spoil(config_path)
    first, *more = [file.refresh() for _ in range(3)]
    assert first and more == [None, None] and file.current is good


def test_a_file_mended_after_it_was_spoilt_is_taken(config_path):
    file = proxy.ConfigFile(config_path)
    config_path.write_text("")
    assert file.refresh()
    config_path.write_text(json.dumps(planted("accounts.new.keys.k", "sk-new")))
    assert file.refresh() is None
    assert "new" in file.current.accounts


def test_a_replaced_file_of_the_same_size_is_read(config_path, tmp_path):
    file = proxy.ConfigFile(config_path)
    stat, other = config_path.stat(), tmp_path / "other"
    other.write_text(config_path.read_text().replace("team", "crew"))
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(config_path)
    assert file.refresh() is None
    assert [*file.current.accounts] == ["crew"]


# Ledger ------------------------------------------------------------------------------


def test_a_hold_settles_once(ledger):
    lease = admit(ledger, 100)
    assert sums(ledger) == (0, 100, 0)
    ledger.settle(lease, charge(30))
    ledger.settle(lease, charge(50))
    ledger.settle(lease, proxy.Charge(499))
    assert sums(ledger) == (30, 0, 0)
    assert ledger.read("SELECT state, cost FROM requests") == [(proxy.SETTLED, 30)]
    assert ledger.read("SELECT requests, cost FROM usage") == [(1, 30)]


def test_a_hold_is_released_once_and_free(ledger):
    lease = admit(ledger, 100)
    ledger.settle(lease, proxy.Charge(503))
    ledger.settle(lease, charge(50))
    assert sums(ledger) == (0, 0, 0)
    assert ledger.read("SELECT state, status FROM requests") == [(proxy.RELEASED, 503)]
    assert ledger.read("SELECT requests, released FROM usage") == [(0, 1)]


def test_what_was_held_and_not_spent_is_available_to_the_micro_credit(ledger):
    for hold, cost in (333, 1), (333, 0), (1, 1), (0, 0), (998, 998):
        ledger.settle(admit(ledger, hold), charge(cost))
    assert sums(ledger) == (1000, 0, 0)
    with pytest.raises(proxy.InsufficientCredits):
        admit(ledger, 1)


def test_a_grant_adds_to_what_keys_json_declares(ledger):
    ledger.grant(declared_account("team"), 500, "thanks")
    ledger.settle(admit(ledger, 1500), charge(1500))
    with pytest.raises(proxy.InsufficientCredits):
        admit(ledger, 1)


@pytest.mark.parametrize(
    "fixed, token, tokens, choices, micro",
    [
        (0, 0, 0, 1, 0),
        (1, 0, 0, 1, 1),
        (10**6, 0, 0, 1, 1),
        (10**6 + 1, 0, 0, 1, 2),
        (0, 300_000, 10, 1, 3),
        (1, 300_000, 10, 1, 4),
        (0, 300_000, 10, 4, 12),
        (400_000, 300_000, 1, 2, 1),
    ],
)
def test_a_hold_is_rounded_up_once(fixed, token, tokens, choices, micro):
    assert proxy.Quote(fixed, token, tokens, choices).hold(tokens) == micro


@pytest.mark.parametrize(
    "fixed, token, tokens, choices, available, affordable",
    [
        (0, 10**6, 100, 1, 1000, 100),
        (0, 10**6, 100, 1, 99, 99),
        (0, 10**6, 100, 1, 1, 1),
        (0, 10**6, 100, 1, 0, -1),
        (0, 10**6, 100, 3, 100, 33),
        (0, 10**6, 100, 3, 2, -1),
        (50 * 10**6, 10**6, 100, 1, 50, -1),
        (50 * 10**6, 10**6, 100, 1, 51, 1),
        (50 * 10**6, 10**6, 100, 1, 49, -1),
        (50 * 10**6 + 1, 10**6, 100, 1, 51, -1),
        (50 * 10**6, 0, 100, 1, 50, 100),
        (50 * 10**6, 10**6, 0, 1, 50, 0),
        (50 * 10**6, 0, 0, 1, 49, -1),
        (0, 0, 100, 1, 0, 100),
        (0, 300_000, 100, 1, 1, 3),
    ],
)
def test_output_is_capped_to_what_the_account_can_pay(
    fixed, token, tokens, choices, available, affordable
):
    quote = proxy.Quote(fixed, token, tokens, choices)
    assert quote.affordable(available) == affordable
    assert affordable < 0 or quote.hold(affordable) <= available


def test_a_lease_says_how_many_tokens_its_hold_pays_for(ledger):
    lease = admit(ledger, 400, tokens=4096, price=1)
    assert (lease.tokens, lease.hold) == (600, 1000)
    release(ledger, lease)


def test_402_when_not_one_token_fits_and_nothing_is_written(ledger):
    other = admit(ledger, 600)
    with pytest.raises(proxy.InsufficientCredits):
        admit(ledger, 400, tokens=4096, price=1)
    assert ledger.read("SELECT count(*) FROM requests") == [(1,)]
    lease = admit(ledger, 399, tokens=4096, price=1)
    assert (lease.tokens, lease.hold) == (1, 400)
    release(ledger, other, lease)


def test_what_is_free_needs_no_credits(ledger):
    poor = proxy.Account("poor", LIMITS)
    lease = admit(ledger, 0, tokens=50, account=poor)
    assert (lease.hold, lease.tokens) == (0, 50)
    ledger.settle(lease, charge(0))


@pytest.mark.parametrize(
    "elsewhere, hold, cost, spent, lost",
    [
        (0, 100, 100, 100, 0),
        (0, 100, 150, 150, 0),
        (900, 100, 150, 100, 50),
        (880, 100, 150, 120, 30),
        (0, 1000, 10**12, 1000, 10**12 - 1000),
    ],
)
def test_a_cost_above_the_hold_is_charged_as_far_as_the_account_can_pay(
    ledger, elsewhere, hold, cost, spent, lost
):
    other, lease = admit(ledger, elsewhere), admit(ledger, hold)
    ledger.settle(lease, charge(cost))
    assert sums(ledger) == (spent, elsewhere, lost)
    release(ledger, other)


def test_a_key_has_so_many_leases_at_once(ledger):
    team = replace(TEAM, limits=proxy.parse_limits({"concurrent": 3}, "limits"))
    leases = [admit(ledger, account=team) for _ in range(3)]
    with pytest.raises(proxy.RateLimited) as refused:
        admit(ledger, account=team)
    assert refused.value.headers == {"Retry-After": "1"}
    leases.append(admit(ledger, account=team, key=SECOND_KEY))
    ledger.settle(leases.pop(0), charge(1))
    release(ledger, *leases, admit(ledger, account=team))


def bound(most: int, per: str = "day", key: proxy.Key = KEY) -> proxy.Key:
    """The key with a budget of so many micro-credits."""
    return replace(key, terms=proxy.Terms(budget=proxy.Budget(most, per)))


@pytest.mark.parametrize("size, key", [(300, KEY), (100, bound(300))], ids=short)
def test_fifty_holds_at_once_are_as_many_as_account_and_budget_can_pay(
    ledger, make_ledger, size, key
):
    both = [ledger, make_ledger()]
    with ThreadPoolExecutor(50) as pool:
        asked = [pool.submit(admit, both[n % 2], size, key=key) for n in range(50)]
    refusals = [one.exception() for one in asked if one.exception()]
    assert {type(one) for one in refusals} == {proxy.InsufficientCredits}
    assert (len(refusals), sums(ledger)) == (47, (0, 3 * size, 0))
    assert ledger.check() == []
    release(ledger, *[one.result() for one in asked if not one.exception()])


def test_what_a_budget_has_left_is_what_was_not_spent(ledger):
    key = bound(300)
    leases = [admit(ledger, 100, key=key) for _ in range(3)]
    for lease in leases[1:]:
        ledger.settle(lease, charge(40))
    release(ledger, leases[0])
    release(ledger, admit(ledger, 220, key=key), admit(ledger, 1, key=SECOND_KEY))
    with pytest.raises(proxy.InsufficientCredits):
        admit(ledger, 221, key=key)
    assert ledger.check() == []


def test_output_is_capped_to_what_the_budget_can_pay(ledger):
    lease = admit(ledger, 100, tokens=500, price=2, key=bound(300))
    assert (lease.hold, lease.tokens) == (300, 100)
    release(ledger, lease)


@pytest.mark.parametrize(
    "per, told",
    [
        ("day", "0.000300 credits per day has 0.000100 left, and this needs 0.000150; its"
         " next window begins 2026-12-01 (UTC)."),
        ("month", "per month has 0.000100 left, and this needs 0.000150; its next window"
         " begins 2026-12-01 (UTC)."),
        ("total", "in total has 0.000100 left, and this needs 0.000150."),
    ],
)  # fmt: skip
def test_a_402_names_the_budget_what_is_left_and_its_next_window(
    sleeping, ledger, wall_clock, per, told
):
    wall_clock.set("2026-11-30T12:00:00Z")
    lease = admit(ledger, 200, key=bound(300, per))
    with pytest.raises(proxy.InsufficientCredits) as refused:
        admit(ledger, 150, key=bound(300, per))
    assert refused.value.message.endswith(told)
    with pytest.raises(proxy.InsufficientCredits) as refused:
        admit(ledger, 900, key=bound(950, per))
    assert refused.value.message.startswith("The key's budget")
    with pytest.raises(proxy.InsufficientCredits) as refused:
        admit(ledger, 900, key=SECOND_KEY)
    told = "The account has 0.000800 credits left, and this needs 0.000900."
    assert refused.value.message == told
    release(ledger, lease)


def test_a_request_counts_in_the_window_of_its_admission(sleeping, ledger, wall_clock):
    wall_clock.set("2026-11-30T23:59:59Z")
    first = [admit(ledger, 100, key=bound(300)) for _ in range(3)]
    with pytest.raises(proxy.InsufficientCredits):
        admit(ledger, 1, key=bound(300))
    wall_clock.set("2026-12-01T00:00:00Z")
    second = [admit(ledger, 100, key=bound(300)) for _ in range(3)]
    for lease in first:  # above its hold: what its own window has left
        ledger.settle(lease, charge(50))
    with pytest.raises(proxy.InsufficientCredits):
        admit(ledger, 1, key=bound(300))
    wall_clock.set("2026-11-30T23:59:59Z")  # a clock that was put back
    release(ledger, admit(ledger, 150, key=bound(300)))
    assert ledger.settle(second.pop(), charge(130)) == 30
    release(ledger, *second)
    assert ledger.check() == []


def test_a_cost_above_the_hold_is_charged_as_far_as_the_budget_can_pay(ledger):
    lease = admit(ledger, 100, key=bound(300))
    assert ledger.settle(lease, charge(700)) == 400
    assert (sums(ledger), ledger.check()) == ((300, 0, 400), [])


def test_an_edited_budget_counts_from_the_next_hold_on_with_all_that_was_spent(ledger):
    ledger.settle(admit(ledger, 100), charge(100))  # without any
    running = admit(ledger, 100)
    for most, fits in (250, 50), (220, 20), (100, 0):
        with pytest.raises(proxy.InsufficientCredits):
            admit(ledger, fits + 1, key=bound(most, "total"))
        assert ledger.check() == []
    weeks = [bound(most, "week") for most in (300, 350, 310)]
    for key in *weeks, bound(260, "total"), bound(230), KEY, bound(210, "month"), KEY:
        hold = key.terms.budget.most - 200 if key.terms.budget else 700
        lease = admit(ledger, hold, key=key)
        assert ledger.check() == []
        release(ledger, lease)
    assert ledger.settle(running, charge(900)) == 0
    assert (sums(ledger), ledger.check()) == ((1000, 0, 0), [])


def test_what_admission_costs_does_not_grow_with_history(ledger):
    def steps(key: proxy.Key) -> int:
        count = itertools.count()
        progress = functools.partial(next, count)
        ledger.write(lambda db: db.set_progress_handler(lambda: progress() and 0, 1))
        release(ledger, admit(ledger, 1, key=key))
        ledger.write(lambda db: db.set_progress_handler(None, 1))
        return next(count)

    for per in "month", "total":
        release(ledger, admit(ledger, 1, key=bound(500, per)))
        before = steps(bound(500, per))
        alter(ledger, HISTORY)
        assert steps(bound(500, per)) <= before + 20
        alter(ledger, "DELETE FROM usage WHERE model LIKE 'm%'")


HISTORY = f"""
WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 3000)
INSERT INTO usage(account, day, key, model, status)
    SELECT 'team', unixepoch() / 86400 - i / 10, '{KEY.id}', 'm' || i, 200 FROM n
"""


@contextmanager
def one_batch(ledger: proxy.Ledger, size: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose writes, `size` of them, wait until the writer takes all at once."""
    entered, gate = threading.Event(), threading.Event()

    def occupy(db: sqlite3.Connection) -> None:
        entered.set()
        gate.wait(5)

    with ThreadPoolExecutor(size + 1) as pool:
        pool.submit(ledger.write, occupy)
        entered.wait(5)
        yield pool
        wait_for(lambda: ledger._writer._jobs.qsize() == size, what="a batch")
        gate.set()


NOTE = "INSERT INTO meta VALUES ('note-{}', '')"
def test_what_is_told_to_be_written_is_written_and_nothing_else(ledger):
    for fault, others in ("SELECT 1", 4), ("INSERT INTO nowhere VALUES (1)", 0):
        with one_batch(ledger, 5) as pool:
            notes = [fault, *map(NOTE.format, range(4))]
            told = [pool.submit(ledger.write, lambda db, n=n: db.execute(n)) for n in notes]
        refused = [type(one.exception()) for one in told if one.exception()]
        assert refused == [proxy.LedgerUnavailable] * (0 if others else 5)
        clear = "DELETE FROM meta WHERE name LIKE 'note-%'"
        assert ledger.write(lambda db: db.execute(clear).rowcount) == others


def test_a_hold_beyond_sqlites_integers_is_what_can_be_paid(ledger):
    most = {"price": 10**9, "tokens": 128 * (2**31 - 1)}
    with pytest.raises(proxy.InsufficientCredits):
        admit(ledger, 0, **most)
    lease = admit(ledger, 0, **most, account=replace(TEAM, credits=10**12))
    assert (lease.hold, lease.tokens) == (10**12, 1000)
    release(ledger, lease)


# Ledger: workers

WORKER = """
import sys, time, proxy
ledger = proxy.Ledger(sys.argv[1], worker=True)
account = proxy.Account("team", proxy.parse_limits({}, "limits"), credits=1000)
key = proxy.Key("key_main", "main", "team", "0" * 64, "sk-")
quote = proxy.Quote(700 * proxy.PICO, 0, 0)
ledger.admit("req_dead", key, account, quote, "chat", "chat/completions", False)
print(ledger.slot, flush=True)
time.sleep(60)
"""


@contextmanager
def other_worker(db: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """A process with a slot and a hold of 700, and its slot; killed at the end."""
    command = [sys.executable, "-c", WORKER, db]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE) as process:
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_a_dead_workers_holds_are_swept_and_a_living_ones_are_not(ledger):
    with other_worker(ledger.path) as (process, slot):
        ledger.write(ledger._tidy)
        assert (slot, sums(ledger)) == (2, (0, 700, 0))
        process.kill()
        process.wait()
        ledger.write(ledger._tidy)
        assert sums(ledger) == (0, 0, 0)
    assert ledger.read("SELECT state, cost FROM requests") == [(proxy.RELEASED, 0)]
    ledger.settle(admit(ledger, 1000), charge(1000))


def test_who_claims_a_dead_workers_slot_clears_it(sleeping, ledger, make_ledger):
    with other_worker(ledger.path) as (process, slot):
        process.kill()
        process.wait()
        assert sums(ledger) == (0, 700, 0)
        assert make_ledger().slot == slot
    assert sums(ledger) == (0, 0, 0)


def test_a_late_settlement_of_a_swept_hold_charges_nothing(ledger):
    dead = proxy.Ledger(ledger.path, worker=True)
    lease = admit(dead, 700)
    dead.close()
    ledger.write(ledger._tidy)
    ledger.settle(lease, charge(700))
    assert sums(ledger) == (0, 0, 0)


def test_another_ledger_of_the_process_keeps_slot_and_locks(ledger, make_ledger):
    lease = admit(ledger)
    proxy.Ledger(ledger.path).close()
    other = make_ledger()
    other.write(other._tidy)
    assert (ledger.slot, other.slot) == (1, 2)
    assert sums(ledger) == (0, 100, 0)
    release(ledger, lease)
    assert ledger.file._in_use()  # which drops these locks: it is the last


# Ledger: the file


def test_all_files_are_their_owners_alone(tmp_path, ledger):
    release(ledger, admit(ledger))
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    names = ["proxy.db", "proxy.db-lock", "proxy.db-shm", "proxy.db-wal"]
    assert modes == dict.fromkeys(names, 0o600)


def lose(path: Path) -> None:
    path.unlink(missing_ok=True)


def lose_all(path: Path) -> None:
    for suffix in "", "-wal", "-shm":
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def replace_by_another(path: Path) -> None:
    proxy.Ledger(path.parent / "other.db").close()
    os.replace(path.parent / "other.db", path)


def replace_by_nothing(path: Path) -> None:
    (path.parent / "empty").touch()
    os.replace(path.parent / "empty", path)


def overwrite(path: Path) -> None:
    for each in path, Path(f"{path}-wal"):
        if each.exists():
            each.write_bytes(b"\xff" * each.stat().st_size)


def replace_by_garbage(path: Path) -> None:
    path.write_bytes(os.urandom(1 << 16))


DAMAGE = [lose, lose_all, replace_by_another, replace_by_nothing, overwrite]
LOSSES = [lose, replace_by_another, replace_by_nothing, replace_by_garbage]


def another_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE meta(name, value)")


def ruin(damage: Callable[[Path], Any], path: Path) -> None:
    proxy.Ledger(path).close()
    damage(path)


FAILING_READS = {  # what is done to the file, what is read
    "no database": (lambda path: path.write_bytes(b"no ledger" * 9999), "SELECT 1"),
    "a query": (lambda path: None, "SELECT * FROM nowhere"),
}


@pytest.mark.parametrize("case", FAILING_READS)
def test_a_ledger_that_cannot_be_read_costs_no_descriptors(case, make_ledger):
    ledger, (damage, sql) = make_ledger(), FAILING_READS[case]
    path, counts = Path(ledger.path), []
    good = path.read_bytes()
    damage(path)
    gc.disable()
    try:
        for _ in range(20):
            with pytest.raises(proxy.LedgerUnavailable):
                ledger.read(sql)
            counts.append(len(open_files(os.getpid())))
    finally:
        gc.enable()
        path.write_bytes(good)
    assert counts[-1] == counts[0]


NO_LEDGERS: dict[str, Callable[[Path], Any]] = {
    "empty": Path.touch,
    "no database": lambda path: path.write_bytes(b"no ledger" * 1000),
    "another database": another_database,
    "a folder": replace_by_a_folder,
    "no folder": lambda path: path.parent.rmdir(),
    **{damage.__name__: functools.partial(ruin, damage) for damage in DAMAGE},
}


def contents(path: Path) -> bytes | bool:
    return path.read_bytes() if path.is_file() else path.exists()


@pytest.mark.parametrize("make", NO_LEDGERS.values(), ids=NO_LEDGERS)
def test_what_is_no_ledger_is_refused_in_one_line_and_left_alone(tmp_path, make):
    path = tmp_path / "data" / "proxy.db"
    path.parent.mkdir()
    make(path)
    before = contents(path)
    with pytest.raises(proxy.LedgerUnavailable) as refused:
        proxy.Ledger(path)
    with closing(proxy.Ledger(path, worker=True)) as worker:
        assert worker.trouble == refused.value.reason != ""
        with pytest.raises(proxy.LedgerUnavailable):
            admit(worker)
    assert "\n" not in refused.value.reason and contents(path) == before


@pytest.mark.parametrize("missing", ["proxy.db", "proxy.db-lock"])
def test_a_ledger_put_back_is_taken_again_without_a_restart(ledger, tmp_path, missing):
    uses = [
        lambda: ledger.settle(admit(ledger), charge(100)),
        lambda: ledger.find_key("0" * 64),  # no key is unknown meanwhile
        lambda: ledger.check(),
    ]
    lease, path = admit(ledger, 300), tmp_path / missing
    assert [use() for use in uses] == [0, None, []]
    path.rename(tmp_path / "away")
    for is_there in False, True:
        for use in uses:
            with pytest.raises(proxy.LedgerUnavailable):
                use()
        assert path.exists() == is_there  # nothing has made it
        path.touch()  # another file, for the second time
    os.replace(tmp_path / "away", path)
    assert [use() for use in uses] == [0, None, []]
    ledger.settle(lease, charge(300))
    assert sums(ledger) == (500, 0, 0)


def test_a_copy_taken_while_it_is_written_adds_up(ledger, tmp_path):
    ledger.settle(admit(ledger), charge(7))
    alter(ledger, f"VACUUM INTO '{tmp_path}/copy.db'")
    with closing(proxy.Ledger(tmp_path / "copy.db")) as copy:
        assert (copy.check(), sums(copy)) == ([], (7, 0, 0))


@contextmanager
def full_disk(ledger: proxy.Ledger) -> Iterator[None]:
    """No file of this process grows beyond the ledger's log (EFBIG instead)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = os.stat(ledger.path + "-wal").st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_settlement_that_could_not_be_written_is_retried_once_it_can(
    sleeping, ledger
):
    lease = admit(ledger)
    with full_disk(ledger):
        with pytest.raises(proxy.LedgerUnavailable):
            ledger.settle(lease, charge(60))
        ledger.settle_later(lease, charge(60))
        ledger._upkeep()
        assert ledger.trouble
    for _ in range(2):
        ledger._upkeep()
        assert (ledger.trouble, sums(ledger)) == (None, (60, 0, 0))


def test_a_ledger_locked_by_another_program_is_unavailable_until_it_is_not(
    monkeypatch, ledger
):
    monkeypatch.setattr(proxy, "LEDGER_TIMEOUT", 1.1)
    with pytest.raises(proxy.LedgerUnavailable):  # it opens with the shorter time then
        ledger.write(lambda db: db.execute("nonsense"))
    with closing(sqlite3.connect(ledger.path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(proxy.LedgerUnavailable):
            admit(ledger)
        db.execute("ROLLBACK")
    release(ledger, admit(ledger))


def test_a_writer_that_hangs_in_another_process_is_not_waited_for_for_ever(
    monkeypatch, ledger
):
    monkeypatch.setattr(proxy, "LEDGER_TIMEOUT", 0.05)
    hanging = proxy.LedgerFile(ledger.path)
    hanging.open()
    assert hanging.take(proxy.WRITER)
    with pytest.raises(proxy.LedgerUnavailable):
        admit(ledger)
    hanging.close()
    release(ledger, admit(ledger))


# Ledger: durability


SYNC = b"COMMIT, synchronous"


class Watched(sqlite3.Connection):
    """A connection that notes in `syncs` each commit that waits for the disk, and
    fails commits while `error` is set."""

    syncs: list[bytes]
    error: Exception | None = None

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        full = sql == "COMMIT" and self.execute("PRAGMA synchronous").fetchone() == (2,)
        if sql == "COMMIT" and self.error:
            raise self.error
        cursor = super().execute(sql, *values)
        self.syncs.extend([SYNC] * full)
        return cursor


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    """The connections to ledgers of this test that are opened from now on."""
    kind, real = type("Failing", (Watched,), {"syncs": []}), sqlite3.connect

    def connect(path: str, **options: Any) -> sqlite3.Connection:
        ours = str(tmp_path) in str(path)  # other apps live as long as all tests
        return real(path, factory=kind if ours else sqlite3.Connection, **options)

    monkeypatch.setattr(sqlite3, "connect", connect)
    return kind


@pytest.fixture
def syncs(failing: type[Watched]) -> list[bytes]:
    """`SYNC` for each commit that waited for the disk, between what a test adds."""
    return failing.syncs


def test_a_settlement_waits_for_the_disk_and_nothing_else_does(syncs, ledger):
    release(ledger, admit(ledger))
    lease = admit(ledger)
    assert syncs == []
    ledger.settle(lease, charge(5))
    assert syncs == [SYNC]


def test_settlements_that_wait_together_share_one_commit(syncs, ledger):
    leases = [admit(ledger, 10) for _ in range(20)]
    with one_batch(ledger, 20) as pool:
        ends = [pool.submit(ledger.settle, lease, charge(1)) for lease in leases]
    assert [end.result() for end in ends] == [0] * 20
    assert (syncs, sums(ledger)) == ([SYNC], (20, 0, 0))


@pytest.mark.parametrize(
    "error",
    [sqlite3.OperationalError("x"), OSError(28, "x"), ValueError("x"), MemoryError()],
    ids=repr,
)
def test_a_commit_that_fails_is_made_good_in_the_file_itself(failing, ledger, error):
    ledger.settle(admit(ledger), charge(60))
    lease = admit(ledger)
    assert sums(ledger) == (60, 100, 0)  # a reader: who closes last moves the log too
    failing.error = error
    with pytest.raises(proxy.LedgerUnavailable) as told:
        ledger.settle(lease, charge(40))
    assert type(error).__name__ in told.value.reason
    failing.error = None
    ledger.settle(lease, charge(40))
    # Without its log the file holds what was before: SQLite has written and flushed it.
    with closing(sqlite3.connect(f"file:{ledger.path}?immutable=1", uri=True)) as db:
        assert db.execute("SELECT spent FROM accounts").fetchall() == [(60,)]
    assert sums(ledger) == (100, 0, 0)


def test_refusals_counted_while_the_ledger_is_in_trouble_are_kept(
    sleeping, failing, ledger
):
    sql = "SELECT account, key, model, status, requests, refused FROM usage"
    for failing.error in sqlite3.OperationalError("disk I/O error"), None, None:
        ledger.count_refusal("team", "key_main", "chat", 429)
        ledger._upkeep()
        assert bool(ledger.trouble) == bool(failing.error)
    assert ledger.read(sql) == [("team", "key_main", "chat", 429, 0, 3)]


def test_a_log_that_was_long_is_not_checkpointed_for_ever(
    sleeping, tmp_path, monkeypatch
):
    moved, real = [], proxy.LedgerFile._checkpoint

    def checkpoint(*values: Any) -> None:
        moved.append(values[-1])
        real(*values)

    monkeypatch.setattr(proxy, "LOG_SIZE", 200_000)
    monkeypatch.setattr(proxy.LedgerFile, "_checkpoint", checkpoint)
    with closing(proxy.Ledger(tmp_path / "proxy.db", worker=True)) as ledger:
        log = tmp_path / "proxy.db-wal"
        for count in range(3):
            while log.stat().st_size <= proxy.LOG_SIZE:
                ledger._upkeep()
                assert len(moved) == count
                ledger.settle(admit(ledger), charge(1))
            ledger._upkeep()
            ledger.settle(admit(ledger), charge(1))  # the log begins anew, and is cut
            assert log.stat().st_size == proxy.LOG_SIZE
    assert moved == ["PASSIVE"] * 3


def test_an_account_is_closed_with_its_keys_or_not_at_all(ledger):
    ledger.make_account("made")
    ledger.make_key("made", "key")
    fails = "BEFORE UPDATE OF revoked ON keys BEGIN SELECT RAISE(ABORT, 'no'); END"
    ledger.write(lambda db: db.execute(f"CREATE TRIGGER fails {fails}"))
    with pytest.raises(proxy.LedgerUnavailable):
        ledger.close_account("made")
    assert ledger.made("made")


# Ledger: identity and schema


def test_a_kill_inside_a_checkpoint_leaves_a_ledger_that_opens(tmp_path):
    path, kept = tmp_path / "proxy.db", tmp_path / "kept.db"
    with closing(proxy.Ledger(path, worker=True)) as ledger:
        for _ in range(50):
            ledger.settle(admit(ledger), charge(7))
        for suffix in "", "-wal":
            shutil.copy(f"{path}{suffix}", f"{kept}{suffix}")
    frames = split(Path(f"{kept}-wal").read_bytes()[32:], 24 + 4096)
    page = [frame[24:] for frame in frames if frame[:4] == b"\0\0\0\1"][-1]
    with kept.open("r+b") as file:
        file.write(page)  # the first page, and no other
    for suffix in "", "-wal":
        os.replace(f"{kept}{suffix}", f"{path}{suffix}")
    with closing(proxy.Ledger(path, worker=True)) as ledger:
        assert (ledger.trouble, ledger.check()) == (None, [])
        assert sums(ledger) == (350, 0, 0)


def test_a_mark_that_the_old_code_could_leave_locks_nobody_out(tmp_path):
    path, lock = tmp_path / "proxy.db", tmp_path / "proxy.db-lock"
    proxy.Ledger(path).close()
    mark = lock.read_bytes()
    lock.write_bytes(b"no ledger".ljust(64, b"\0"))
    proxy.Ledger(path).close()
    assert lock.read_bytes() == mark != b""


def test_a_ledger_without_its_lock_file_is_nobodys_until_it_is_back(tmp_path):
    path, lock = tmp_path / "proxy.db", tmp_path / "proxy.db-lock"
    with other_worker(str(path)):
        os.rename(lock, tmp_path / "away")
        for _ in range(2):
            with pytest.raises(proxy.LedgerUnavailable) as refused:
                proxy.Ledger(path)
            assert "in use" in refused.value.reason
        os.replace(tmp_path / "away", lock)
        with closing(proxy.Ledger(path, worker=True)) as ledger:
            assert (ledger.slot, sums(ledger)) == (2, (0, 700, 0))


def test_a_symlink_is_resolved_once(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "proxy.db").symlink_to(tmp_path / "disk" / "real.db")
    with closing(proxy.Ledger(tmp_path / "proxy.db", worker=True)) as ledger:
        ledger.settle(admit(ledger), charge(1))
    names = {path.name for path in (tmp_path / "disk").iterdir()}
    assert names == {"real.db", "real.db-lock"}


@pytest.mark.parametrize(
    "sql, words",
    [
        ("PRAGMA user_version = 5", "newer"),
        ("DROP TRIGGER resolved", "its resolved is not that of schema 4"),
        ("ALTER TABLE requests ADD COLUMN more TEXT", "its requests is not that"),
        ("DELETE FROM meta WHERE name = 'id'", "is no ledger"),
        ("UPDATE meta SET value = 'x' WHERE name = 'id'", "another ledger"),
    ],
)
def test_a_schema_that_is_not_the_one_its_number_says_is_refused(tmp_path, sql, words):
    ledger = proxy.Ledger(tmp_path / "proxy.db")
    ledger.close()
    alter(ledger, sql)
    with pytest.raises(proxy.LedgerUnavailable) as refused:
        proxy.Ledger(ledger.path)
    assert words in refused.value.reason and "\n" not in refused.value.reason
    with closing(proxy.Ledger(ledger.path, worker=True)) as worker:
        assert words in worker.trouble
        with pytest.raises(proxy.LedgerUnavailable):
            admit(worker)


# The schema of commit 022b995 (its histograms had other bounds), and what it held.
VERSION_0 = """
PRAGMA journal_mode = WAL;
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
        (NEW.model, 'ttfb', NEW.ttfb / 100, 1, NEW.ttfb),
        (NEW.model, 'duration', NEW.duration / 100, 1, NEW.duration))
        WHERE column5 IS NOT NULL ON CONFLICT DO UPDATE
        SET requests = requests + excluded.requests, total = total + excluded.total;
    INSERT INTO usage SELECT NEW.account, NEW.created / 86400000, NEW.model, 1,
        NEW.input, NEW.cached, NEW.output, NEW.images, NEW.cost WHERE NEW.state = 1
        ON CONFLICT DO UPDATE SET requests = requests + 1,
        input = input + excluded.input, cached = cached + excluded.cached,
        output = output + excluded.output, images = images + excluded.images,
        cost = cost + excluded.cost;
END;
PRAGMA user_version = 305419896; PRAGMA application_id = 448585456;
INSERT INTO meta VALUES ('boot', 'x');
INSERT INTO accounts VALUES ('team', 0, 1700000000, 500, 0, 0, 0);
INSERT INTO grants VALUES (1, 'team', 500, 'thanks', 1700000000);
INSERT INTO keys VALUES
    ('key_a', 'team', 'a', 'sk-…', 'aa', 0, 1700000000, 1700000001, NULL),
    ('key_b', 'team', 'b', 'sk-…', NULL, 0, NULL, NULL, 1700000002);
INSERT INTO requests(account, id, key, model, path, stream, slot, state, hold, created)
VALUES
    ('team', 'req_1', 'key_a', 'chat', 'completions', 0, 1, 0, 90, 1700000000000),
    ('team', 'req_2', 'key_a', 'chat', 'completions', 1, 1, 0, 90, 1700000001000),
    ('team', 'req_3', 'key_a', 'chat', 'completions', 1, 3, 0, 30, 1700000002000);
UPDATE requests SET state = 1, cost = 70, lost = 3, input = 20, cached = 5, output = 25,
    status = 200, ttfb = 40, duration = 90 WHERE id = 'req_1';
UPDATE requests SET state = 2, status = 503, duration = 10 WHERE id = 'req_2';
INSERT INTO tallies VALUES ('', 'status', 429, 6, 0), ('', 'status', 401, 2, 0);
INSERT INTO windows VALUES ('LIMITER/key_a/relay/60/1/minute', x'0000000000000001');
"""


@pytest.fixture
def version_0(tmp_path: Path) -> Path:
    """The ledger of an older version, with its lock file."""
    with closing(sqlite3.connect(tmp_path / "proxy.db")) as db:
        db.executescript(VERSION_0)
    mark = b"123456781abcdef0"  # the two numbers
    (tmp_path / "proxy.db-lock").write_bytes(mark.ljust(4096, b"\0"))
    return tmp_path / "proxy.db"


KEPT = "accounts grants keys requests windows".split()
# At the ends of their rows.
ADDED = {"accounts": (0,), "keys": (0, None), "requests": (0, None, None, None, 0)}


def tables(path: Path, names: list[str]) -> dict[str, list[tuple]]:
    with closing(sqlite3.connect(path)) as db:
        return {name: db.execute(f"SELECT * FROM {name}").fetchall() for name in names}


def test_an_older_ledger_opens_with_everything_kept(version_0):
    before = tables(version_0, [*KEPT, "tallies", "usage"])
    assert before["accounts"] == [("team", 0, 1700000000, 500, 70, 30, 3)]
    with closing(proxy.Ledger(version_0)) as ledger:
        assert ledger.check() == []
        assert ledger.read("PRAGMA user_version") == [(4,)]
    kept = {name: before[name] for name in KEPT}
    usage = tables(version_0, ["usage"])["usage"]
    today = usage[0][1]
    assert usage == [
        ("", today, "", "", 401, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        ("", today, "", "", 429, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        ("team", 19675, "key_a", "chat", 200, 1, 0, 0, 1, 20, 5, 25, 0, 70, 40, 90, 0, 3),
        ("team", 19675, "key_a", "chat", 503, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 10, 0, 0),
    ]
    kept |= {name: [(*row, *ADDED[name]) for row in kept[name]] for name in ADDED}
    assert tables(version_0, KEPT) == kept
    backup = version_0.with_name("proxy.db-v0")
    assert tables(backup, [*before]) == before
    assert backup.stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(backup)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (305419896,)
    backup.unlink()
    proxy.Ledger(version_0).close()
    assert not backup.exists()  # it is migrated once


# Back to a version from the one after it.
BACK = {
    3: "DROP TRIGGER opened; DROP TRIGGER resolved; DROP INDEX requests_open;"
       " DROP INDEX usage_key; DROP TABLE budgets; ALTER TABLE keys DROP COLUMN terms;"
       " ALTER TABLE requests DROP COLUMN code; ALTER TABLE requests DROP COLUMN upstream;"
       " ALTER TABLE requests DROP COLUMN attempts; ALTER TABLE usage DROP COLUMN lost;",
    2: "ALTER TABLE accounts DROP COLUMN declared; ALTER TABLE keys DROP COLUMN former;",
    1: "ALTER TABLE requests DROP COLUMN written; ALTER TABLE requests DROP COLUMN asked;"
       " ALTER TABLE usage DROP COLUMN written;",
}  # fmt: skip


@pytest.mark.parametrize("version", BACK)
def test_a_ledger_of_each_version_opens_with_everything_kept(make_ledger, version):
    ledger = make_ledger()
    ledger.make_account("lab")
    ledger.grant(declared_account("team"), 500, "thanks")
    ledger.make_key("lab", "laptop")
    ledger.settle(admit(ledger, 1300), charge(1700))
    release(ledger, admit(ledger, 0))
    ledger.write(lambda db: proxy.hit_windows(LIMITS.items, KEY.id, "relay", db))
    path, names = Path(ledger.path), [*KEPT, "usage", "meta"]
    before = tables(path, names)
    assert {row[-1] for row in before["usage"]} == {0, 200}
    ledger.close()
    with closing(sqlite3.connect(path)) as db:
        for older in range(proxy.SCHEMA_VERSION - 1, version - 1, -1):
            db.executescript(BACK[older])
        db.execute(f"PRAGMA user_version = {version}")
    with closing(proxy.Ledger(path)) as ledger:
        assert ledger.check() == []
    after = tables(path, names)
    if version < 3:  # of what keys.json granted only what was spent is known
        before["accounts"] = [(*row[:-1], declared(row[0])) for row in before["accounts"]]
    assert after == before


def test_a_migration_takes_what_was_spent_for_declared_and_dead_keys_for_dead(
    version_0
):
    with sqlite3.connect(version_0) as db:
        db.execute("UPDATE accounts SET granted = 40, made = 1700000001")
        db.execute("UPDATE grants SET amount = 40")
        db.execute(
            "INSERT INTO keys(id, account, name, hint, hash, admin, created)"
            " VALUES ('key_c', 'team', 'c', '', 'cc', 0, 1700000002),"
            " ('key_d', 'gone', 'd', '', 'dd', 0, 1700000003)"
        )
    db.close()
    with closing(proxy.Ledger(version_0)) as ledger:
        assert ledger.check() == []
        assert ledger.read("SELECT id, declared FROM accounts") == [("gone", 0), ("team", 60)]
        dead = ledger.read("SELECT id FROM keys WHERE former")
    assert dead == [("key_a",)]


def test_an_older_ledger_is_not_migrated_under_a_running_server(version_0):
    before = tables(version_0, KEPT)
    with closing(sqlite3.connect(version_0)) as db:
        db.execute("SELECT * FROM meta").fetchall()
        with pytest.raises(proxy.LedgerUnavailable) as refused:
            proxy.Ledger(version_0)
    assert "in use" in refused.value.reason
    assert tables(version_0, KEPT) == before


def test_a_migration_that_was_interrupted_is_made_again(version_0, monkeypatch):
    before = tables(version_0, [*KEPT, "tallies", "usage"])
    steps = (*proxy.MIGRATIONS[:-1], proxy.MIGRATIONS[-1] + "SELECT * FROM nowhere;")
    monkeypatch.setattr(proxy, "MIGRATIONS", steps)
    with pytest.raises(proxy.LedgerUnavailable):
        proxy.Ledger(version_0)
    assert tables(version_0, list(before)) == before
    monkeypatch.undo()
    with closing(proxy.Ledger(version_0)) as ledger:
        assert ledger.check() == []


DISK_ERRORS = "database or disk is full", "disk I/O error"


def opened(path: Path) -> str:
    """Opens a ledger that must add up; why it could not be opened, empty if it could."""
    try:
        with closing(proxy.Ledger(path)) as ledger:
            assert ledger.check() == []
        return ""
    except proxy.LedgerUnavailable as refused:
        return refused.reason.removeprefix("OperationalError: ")


def test_a_migration_on_a_disk_too_small_for_it_is_made_once_there_is_room(
    small_disk, version_0
):
    with closing(sqlite3.connect(version_0, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        numbers = "WITH n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300)"
        db.execute(f"{numbers} INSERT INTO windows SELECT i, zeroblob(900) FROM n")
    before = tables(version_0, [*KEPT, "tallies", "usage"])
    filler, reasons = small_disk(), Counter()
    gc.disable()  # a connection that is left open keeps the ledger in use
    try:
        while reasons[""] == 0:
            os.truncate(filler, filler.stat().st_size - 8192)
            reasons[opened(version_0)] += 1
    finally:
        gc.enable()
    assert reasons.keys() == {"", *DISK_ERRORS} and reasons[DISK_ERRORS[0]] > 50
    assert tables(version_0, ["windows"])["windows"] == before["windows"]
    assert tables(version_0.with_name("proxy.db-v0"), [*before]) == before


# Ledger: proof


TAMPERING = [
    "UPDATE accounts SET spent = spent + 1",
    "UPDATE accounts SET spent = spent - 1 WHERE id = 'team'",
    "UPDATE accounts SET held = held + 1",
    "UPDATE accounts SET held = 0",
    "UPDATE accounts SET granted = granted + 1",
    "UPDATE accounts SET lost = lost + 1",
    "UPDATE requests SET cost = cost + 1 WHERE state = 1",
    "UPDATE requests SET lost = lost + 1 WHERE state = 1",
    "UPDATE requests SET hold = hold + 1 WHERE state = 0",
    "UPDATE requests SET state = 2 WHERE state = 1",
    "UPDATE requests SET account = 'other' WHERE state = 1",
    "DELETE FROM requests WHERE state = 1",
    "DELETE FROM requests WHERE state = 0",
    "UPDATE grants SET amount = amount + 1",
    "DELETE FROM grants",
    "UPDATE usage SET cost = cost + 1",
    "UPDATE usage SET account = 'other'",
    "UPDATE usage SET key = 'other'",
    "UPDATE usage SET day = day - 1",
    "UPDATE budgets SET spent = spent + 1",
    "UPDATE budgets SET most = 60",
    "DELETE FROM usage",
    "DELETE FROM accounts WHERE id = 'team'",
    "DELETE FROM accounts WHERE id = 'saver'",
]


@pytest.mark.parametrize("sql", TAMPERING)
def test_check_finds_tampering(make_ledger, sql):
    ledger = make_ledger()
    ledger.grant(declared_account("team"), 500, "")
    ledger.grant(declared_account("saver"), 500, "")
    ledger.settle(admit(ledger, key=bound(400)), charge(40))
    admit(ledger, 200, key=bound(400))
    assert ledger.check() == []
    alter(ledger, sql)
    assert ledger.check() != []


OVERSPENT = """
INSERT INTO requests(account, id, key, model, path, stream, slot, state, hold, created)
VALUES ('team', 'req_x', 'k', 'm', 'p', 0, 1, 0, 200, 1)
"""


@pytest.mark.parametrize("credits, hold", [(1000, 701), (0, 701), (50, 701), (350, 1)])
def test_check_finds_what_we_overspent_whatever_keys_json_says_now(
    make_ledger, credits, hold
):
    ledger, later = make_ledger(), replace(TEAM, credits=credits)
    ledger.settle(admit(ledger, 300), charge(300))
    with suppress(proxy.InsufficientCredits):  # below what is spent nothing more is held
        ledger.settle(admit(ledger, 50, account=later), charge(50))
    assert ledger.check() == []
    alter(ledger, OVERSPENT.replace("200", str(hold)))
    assert ledger.check() == ["team: spent and held exceed what was granted"]


def test_a_cost_above_its_hold_is_charged_by_what_is_declared_now(ledger):
    lease = admit(ledger, 100)
    release(ledger, admit(ledger, 100, account=replace(TEAM, credits=250)))
    ledger.settle(lease, charge(400))
    assert sums(ledger) == (250, 0, 150)


def test_check_finds_a_file_that_is_damaged(make_ledger):
    ledger = make_ledger()
    for _ in range(300):
        release(ledger, admit(ledger))
    alter(ledger, "PRAGMA wal_checkpoint(TRUNCATE)")
    with open(ledger.path, "r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(b"\xff" * 4096)
    with pytest.raises(proxy.LedgerUnavailable) as told:
        ledger.check()
    assert "malformed" in told.value.reason


# Limits ------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Monotonic seconds, `now`, that a test sets."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def window(ledger: proxy.Ledger) -> proxy.LedgerStorage:
    """The windows of a ledger, each hit in a transaction of its own."""
    write = lambda sql, *row: ledger.write(lambda db: db.execute(sql, row).fetchall())
    return proxy.LedgerStorage(rows=write)


@pytest.mark.parametrize(
    "hits",
    [
        [(0, 1), (0, 1), (0, 1), (0, 0)],
        [(0, 1), (1, 1), (2, 1), (59.999, 0), (60, 1), (60.5, 0), (61, 1), (61, 0)],
        [(0, 1), (0, 1), (0, 1), (30, 0), (59, 0), (60, 1), (60, 1), (60, 1), (60, 0)],
        [(59, 1), (59, 1), (59, 1), (61, 0), (118.999, 0), (119, 1)],
    ],
)
def test_a_window_is_exact_at_its_edge(ledger, clock, hits):
    storage = window(ledger)
    for at, fits in hits:
        clock.now = 1000 + at
        assert storage.acquire_entry("k", 3, 60) == bool(fits), at


def test_a_window_agrees_with_its_definition_at_any_times(ledger, clock):
    storage, passed, pick = window(ledger), deque(), random.Random(7)
    for _ in range(400):
        clock.now += pick.choice([0, 0.25, 1, 5, 20])
        recent = [at for at in passed if at > clock.now - 60]
        fits = storage.acquire_entry("k", 10, 60)
        assert fits == (len(recent) < 10)
        passed.extend([clock.now] * fits)


def test_each_key_has_its_own_window(ledger):
    storage = window(ledger)
    assert [storage.acquire_entry(key, 1, 60) for key in "aabb"] == [1, 0, 1, 0]


@pytest.mark.parametrize("boot, fits", [("value", False), ("'another'", True)])
def test_a_window_survives_a_restart_but_not_a_reboot(make_ledger, boot, fits):
    with closing(make_ledger()) as first:
        assert window(first).acquire_entry("k", 1, 60)
    alter(first, f"UPDATE meta SET value = {boot} WHERE name = 'boot'")
    assert window(make_ledger()).acquire_entry("k", 1, 60) == fits


def test_a_window_says_when_it_began_and_how_full_it_is(ledger, clock):
    storage = window(ledger)
    assert storage.get_moving_window("k", 3, 60) == (1000, 0)
    for clock.now in 1001, 1002:
        storage.acquire_entry("k", 3, 60)
    for _ in range(2):
        assert storage.get_moving_window("k", 3, 60) == (1001, 2)


def test_a_request_counts_in_every_window_or_in_none(ledger, clock):
    items, seen = proxy.parse_many("3/minute;2/second"), []
    for clock.now in 1000, 1000, 1000, 1000, 1001, 1002, 1060:
        hit = functools.partial(proxy.hit_windows, items, "k", "relay")
        seen.append([(one.fits, one.left) for one in ledger.write(hit)])
    refused = [(False, 0)]
    assert seen == [
        [(True, 2), (True, 1)], [(True, 1), (True, 0)], refused, refused,
        [(True, 0), (True, 1)], [(True, 2), (False, 0)], [(True, 1), (True, 1)],
    ]  # fmt: skip


@pytest.mark.parametrize("rate", ["20/minute;2/second", "2/second;20/minute"])
def test_who_repeats_at_once_gets_what_the_windows_allow(ledger, clock, rate):
    hit = functools.partial(proxy.hit_windows, proxy.parse_many(rate), "k", "relay")
    passed = 0
    for tenth in range(250):
        clock.now = 1000 + tenth / 10
        passed += ledger.write(hit)[-1].fits
    assert passed == 20


def test_a_window_named_twice_is_one():
    assert len(proxy.parse_limits({"rate": "5/minute;5/minute"}, "limits").items) == 1


# Wire --------------------------------------------------------------------------------

BAD_JSON = [
    b"", b"{", b"nope", b"null", b"5", b'"text"', b"[]", b'[{"model": "echo"}]',
    b'{"a": NaN}', b'{"a": Infinity}', b'{"a": -Infinity}', b'{"a": 1e999}',
    b'{"a": -1e999}', b'{"a": 01}', b'{"a": +1}', b'{"a": 1,}', b"{'a': 1}",
    b'{"a": 1} {"a": 1}', b'{"a": 1, "a": 2}', b'{"b": {"a": 1, "a": 1}}',
    b'{"b": [{"a": 1, "a": 1}]}', b'\xef\xbb\xbf{"a": 1}', '{"a": 1}'.encode("utf-16"),
    '{"a": 1}'.encode("utf-16-le"), '{"a": 1}'.encode("utf-32"), b'{"a": "\xff"}',
    b'{"a": "\xed\xa0\x80"}', b'{"a": "\xc0\x80"}', b'{"a": "\x00"}', b'{"a": 1}\x00',
    b'{"a": "\n"}', b'{"a": "\\x41"}', b'{"a": ' + b"9" * 5000 + b"}",
    b'{"a": ' + b"[" * 100_000, b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"a": ' * 5000 + b"1" + b"}" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("data", BAD_JSON)
def test_bad_json_is_a_bad_request(data):
    with pytest.raises(proxy.BadRequest) as refused:
        proxy.parse_json(data)
    assert len(refused.value.envelope()) < 500


NO_COUNTS = [True, False, -2, 0, 1.5, 1.0, "1", [], {}, 10**40]
BAD_FIELDS = {
    "model": [None, "", 5, True, [], {}, "x" * 201],
    "messages": [None, [], {}, "hi", 5, ["hi"], [None], [[]]],
    "stream": [1, 0, "true", [], {}],
    "stream_options": ["usage", 5, [], True],
    "max_tokens": NO_COUNTS,
    "max_completion_tokens": NO_COUNTS,
    "max_output_tokens": NO_COUNTS,
    "n": [*NO_COUNTS, 129],
    "best_of": [*NO_COUNTS, 129],
}


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, vs in BAD_FIELDS.items() for value in vs]
)
def test_a_wrong_type_is_a_bad_request_naming_the_field(name, value):
    whole = {"model": "chat", "messages": SAY_HELLO, name: value}
    with pytest.raises(proxy.BadRequest) as refused:
        proxy.parse_call("chat/completions", json.dumps(whole).encode())
    assert (refused.value.status, refused.value.param) == (400, name)


def test_null_is_as_good_as_missing():
    call = make_call(stream=None, max_tokens=None, n=None, stream_options=None)
    assert (call.stream, call.wants_usage, call.choices) == (False, False, 1)


@pytest.mark.parametrize(
    "path",
    [
        "", "..", "../admin", "chat/..", "chat/../completions", "./chat", "/chat",
        "chat//completions", "Chat/completions", "chat/COMPLETIONS", "chat.completions",
        "chat completions", "chat\\completions", "chat%2fcompletions", "chat?x",
        "chat#x", "chat/", "chät", "chat\n",
        "chat\r\nHost: x", "http://x", "-chat", "chat-", "chat/-x",
    ],
)  # fmt: skip
def test_a_strange_path_is_not_found(path):
    with pytest.raises(proxy.NotFound):
        proxy.check_path(path)


@pytest.mark.parametrize(
    "path",
    ["realtime/sessions", "files", "organization/api_keys", "responses/resp_1/cancel",
     "messages/batches", "conversations", "audio/voices", "audio/speech/x",
     "client/sessions", "chat/completions/batch", "engines/o1/chat/completions",
     "deployments/o1/completions", "video/submit"],
)  # fmt: skip
def test_what_cannot_be_metered_is_not_relayed(path):
    with pytest.raises(proxy.NotFound):
        proxy.check_path(path)


@pytest.mark.parametrize("name", ["MAX_TOKENS", "Model", "N", "Service_Tier", "\u017ftream"])
def test_a_field_in_another_case_is_a_bad_request(name):
    with pytest.raises(proxy.BadRequest) as error:
        make_call(**{name: 1})
    assert error.value.param == name.casefold()


@pytest.mark.parametrize("model", ["a\x1b]0;x\x07", "a\n", "a\u202eb", "", "x" * 201, 5])
def test_a_model_is_named_in_what_a_terminal_can_show(model):
    with pytest.raises(proxy.BadRequest):
        make_call(model=model)


@pytest.mark.parametrize("key, status", [(DEMO_KEY, 413), (TEAM_KEY, 404)])
def test_a_public_key_sends_no_more_than_an_echo_takes(stage, key, status):
    ask = {"model": "unknown", "messages": SAY_HELLO, "pad": "x" * proxy.MAX_ECHO}
    assert stage.post(CHATS, ask, key).status_code == status


@pytest.mark.parametrize("digits, status", [(640, 200), (641, 400)])
def test_a_number_has_no_more_digits_than_are_quickly_read(stage, digits, status):
    stage.main.script = [json_answer(chat_json("hi"))]
    body = json.dumps({"model": "chat", "messages": SAY_HELLO})[:-1] + ', "seed": '
    send = functools.partial(stage.app.test_client().post, headers=bearer(TEAM_KEY))
    data = body + "1" * digits + "}"
    answer = send(f"/v1/{CHATS}", data=data, content_type="application/json")
    assert answer.status_code == status


@pytest.mark.parametrize("value", ["yes", [0], 1])
def test_whether_usage_is_wanted_is_true_or_false(value):
    with pytest.raises(proxy.BadRequest):
        make_call(stream_options={"include_usage": value})


@pytest.mark.parametrize("path", ["rerank", "fim/completions", "v2/chat-1/a_b", "a/b/c/d"])
def test_any_plain_path_is_relayed(path):
    proxy.check_path(path)
    assert proxy.parse_call(path, b'{"model": "chat"}').path == path


@pytest.mark.parametrize(
    "path, sent, passed",
    [
        ("messages", {"VERSION": "2024-01-01"}, {"anthropic-version": "2024-01-01"}),
        ("messages/count_tokens", {"BETA": "a,b"}, {"anthropic-beta": "a,b"}),
        ("messages", {"OTHER": "x"}, {}),
        ("chat/completions", {"VERSION": "2024-01-01", "BETA": "a"}, {}),
    ],
)
def test_only_what_anthropics_api_names_passes_of_a_clients_headers(path, sent, passed):
    environ = {f"HTTP_ANTHROPIC_{name}": value for name, value in sent.items()}
    assert proxy.passed_headers(path, environ) == passed


@pytest.mark.parametrize("value", ["a\r\nx: y", "ü", "x" * 1001, "\t"])
def test_a_header_that_could_not_pass_is_a_bad_request(value):
    with pytest.raises(proxy.BadRequest, match="anthropic-beta"):
        proxy.passed_headers("messages", {"HTTP_ANTHROPIC_BETA": value})


def receive(data: bytes, limit: int = 1000, **environ: Any) -> tuple:
    """Read a request's body; return it and its share of the room."""
    share = proxy.Share(proxy.Room(proxy.BODY_ROOM))
    about = {"CONTENT_TYPE": "application/json", "wsgi.input": BytesIO(data)}
    return proxy.read_body(about | environ, limit, share, lambda part: None), share


@pytest.mark.parametrize(
    "kind",
    [
        "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data",
        "application/jsonp", "text/json", "application", "application/json-seq",
    ],
)  # fmt: skip
def test_415_for_any_other_content_type(kind):
    with pytest.raises(proxy.UnsupportedMediaType):
        receive(b"{}", CONTENT_TYPE=kind)


@pytest.mark.parametrize("parameters", ["", "; charset=utf-8", " ;x"])
@pytest.mark.parametrize("length", ["", "10"])
def test_a_body_of_just_the_limit_passes(length, parameters):
    data = b"x" * 10
    kind = f"Application/JSON{parameters}"
    assert receive(data, 10, CONTENT_LENGTH=length, CONTENT_TYPE=kind)[0] == data


PACKED = {"gzip": gzip.compress, "deflate": zlib.compress, "GZIP ": gzip.compress}


@pytest.mark.parametrize("coding", PACKED)
def test_a_packed_body_is_unpacked(coding):
    data = PACKED[coding](b"x" * 1000)
    assert receive(data, HTTP_CONTENT_ENCODING=coding)[0] == b"x" * 1000


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_bomb_is_too_large_and_never_held(coding):
    share = proxy.Share(proxy.Room(proxy.BODY_ROOM))
    stream = BytesIO(PACKED[coding](b"x" * (8 << 20)))
    about = {"CONTENT_TYPE": "application/json", "wsgi.input": stream}
    about["HTTP_CONTENT_ENCODING"] = coding
    with pytest.raises(proxy.TooLarge):
        proxy.read_body(about, 1 << 20, share, lambda part: None)
    assert share.size <= 1 << 20


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "gzip;q=1"])
def test_415_names_an_encoding_that_is_not_taken(coding):
    with pytest.raises(proxy.UnsupportedMediaType, match=re.escape(coding)):
        receive(b"{}", HTTP_CONTENT_ENCODING=coding)


@pytest.mark.parametrize(
    "data", [b"{}", b"", gzip.compress(b"{}")[:-1], gzip.compress(b"{}") + b"x"]
)
def test_what_is_no_whole_gzip_is_a_bad_request(data):
    with pytest.raises(proxy.BadRequest):
        receive(data, HTTP_CONTENT_ENCODING="gzip")


def test_a_body_of_too_many_values_is_a_bad_request(monkeypatch):
    monkeypatch.setattr(proxy, "MAX_VALUES", 100)
    assert receive(b"[" + b"1," * 99 + b"1]")[0]
    with pytest.raises(proxy.BadRequest, match="100 JSON values"):
        receive(b"[" + b"1," * 100 + b"1]")


FULL_OF = {
    "objects": b'{"a":1},', "lists": b"[],", "empty objects": b"{},", "texts": b'"ab",',
    "numbers": b"12345,", "one text": b"A", "beyond Latin": "😀".encode(),
}  # fmt: skip


@pytest.mark.parametrize("kind", FULL_OF)
def test_parsing_takes_no_more_memory_than_was_weighed(kind):
    each = FULL_OF[kind]
    many = each * (500_000 // len(each))
    data = b'{"a": [' + many.rstrip(b",") + b"]}"
    if kind in ("one text", "beyond Latin"):
        data = b'{"a": "' + many + b'"}'
    weighed = proxy.parsing_memory(bytearray(data))
    tracemalloc.start()
    try:
        proxy.parse_json(data)
        assert tracemalloc.get_traced_memory()[1] <= weighed
    finally:
        tracemalloc.stop()


def test_a_body_that_would_take_more_than_the_room_is_too_large(monkeypatch):
    monkeypatch.setattr(proxy, "BODY_ROOM", proxy.SMALL_SHARES + 1000)
    with pytest.raises(proxy.TooLarge):
        receive(b'{"a":{"b":{"c":1}}}' * 10)


def test_a_share_counts_what_came_and_is_given_back_once(monkeypatch):
    monkeypatch.setattr(proxy, "ROOM_PATIENCE", 0.01)
    room = proxy.Room(4 << 20)
    one, other = proxy.Share(room), proxy.Share(room)
    one.keep(9 << 20)  # an answer is there, whether there is room or not
    assert room.free == -(5 << 20)
    one.keep(0)
    one.hold(3 << 20)
    with pytest.raises(proxy.Overloaded) as refused:
        other.hold(2 << 20)
    assert refused.value.headers["Retry-After"] == "2" and other.size == 0
    one.hold(0), one.hold(0)
    assert room.free == 4 << 20
    other.hold(2 << 20)
    one.hold(1 << 20, spare=4 << 20)  # small ones need leave nothing
    with pytest.raises(proxy.Overloaded):
        one.hold(2 << 20, spare=1 << 20)


def test_one_account_leaves_others_half_of_the_room_for_large_bodies(monkeypatch):
    monkeypatch.setattr(proxy, "ROOM_PATIENCE", 0.01)
    room, most = proxy.Room(proxy.BODY_ROOM), proxy.MOST_ARRIVING
    one, other = (proxy.Share(room, "team") for _ in range(2))
    one.hold(most, proxy.PARSING)
    with pytest.raises(proxy.Overloaded):
        other.hold(2 << 20, proxy.PARSING)
    proxy.Share(room, "other").hold(most, proxy.PARSING)
    one.hold(most, proxy.SMALL_SHARES)  # it has arrived, and is parsed
    room.free += most
    other.hold(most, proxy.PARSING)
    one.keep(0), other.keep(0)
    assert room.arriving == {"team": 0, "other": most}


def test_a_body_in_tiny_chunks_is_refused_early(monkeypatch):
    monkeypatch.setattr(proxy, "PIECE", 10)
    clock = itertools.count()
    monkeypatch.setattr(proxy.time, "thread_time", lambda: next(clock) * 0.06)
    with pytest.raises(proxy.BadRequest, match="chunks"):
        receive(b"x" * 1000)
    clock = itertools.count()
    assert receive(b"x" * 1000, CONTENT_LENGTH="1000")[0]  # a counted one is not asked


def test_a_dropped_body_is_estimated_as_before():
    call = make_call()
    short = proxy.without_body(call)
    assert short.body == {} and proxy.prompt_weight(short) == proxy.prompt_weight(call)


EVENTS_SENT = ["one", "zwei 😀👩‍👩‍👧 é", '{"a": "\\n"}', "th\nree", "[DONE]"]


def lines_of(newline: bytes) -> bytes:
    """Return EVENTS_SENT with comments, ids and a two-line event among them."""
    lines = [": hello", "", "data: one", "", ": ping 😀", "", "event: message", "id: 7"]
    lines += [f"data:{EVENTS_SENT[1]}", "", f"data: {EVENTS_SENT[2]}", "retry: 10", ""]
    lines += ["data: th", ": between", "data: ree", "", ": bye", "", "data: [DONE]"]
    return newline.join(line.encode() for line in [*lines, "", ""])


def data_of(events: Iterable[bytes]) -> list[str]:
    """Return what the events say; comments say nothing."""
    return [text for text in map(bytes.decode, map(proxy.event_data, events)) if text]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 4096])
def test_a_stream_in_any_pieces_is_the_same_events(size, newline):
    stream, reader = lines_of(newline), proxy.EventReader()
    events = [event for piece in split(stream, size) for event in reader.feed(piece)]
    whole = b"".join(events)
    assert whole.rstrip(b"\r\n") == stream.rstrip(b"\r\n")
    assert sse_events(whole) == data_of(events) == EVENTS_SENT
    assert reader.flush() == []


def test_an_event_passes_as_soon_as_it_is_whole():
    reader = proxy.EventReader()
    assert reader.feed(b"data: a\n\nda") == [b"data: a\n\n"]
    assert reader.feed(b"ta: b\n") == []
    assert reader.feed(b"\n") == [b"data: b\n\n"]


def test_a_comment_line_waits_for_nothing():
    reader = proxy.EventReader()
    assert reader.feed(b": keep-alive\n") == [b": keep-alive\n"]
    assert b"".join(reader.feed(b"\ndata: a\n\n")) == b"\ndata: a\n\n"


@pytest.mark.parametrize(
    "rest, flushed",
    [
        (b"data: [DONE]", [b"data: [DONE]\n\n"]),
        (b"data: [DONE]\r\n", [b"data: [DONE]\n\n"]),
        (b'data: {"a": 1}\n', [b'data: {"a": 1}\n\n']),
        (b'data: {"a": ', []),
        (b"data: [DO", []),
        (b"", []),
    ],
)
def test_a_last_event_without_its_blank_line_is_kept_if_it_is_whole(rest, flushed):
    reader = proxy.EventReader()
    assert reader.feed(b"data: x\n\n" + rest) == [b"data: x\n\n"]
    assert reader.flush() == flushed


@pytest.mark.parametrize("piece", [b"x" * 65536, b"x\n" * 32768])
def test_an_event_over_the_limit_fails(piece):
    reader = proxy.EventReader()
    for _ in range(proxy.MAX_EVENT // len(piece)):
        assert reader.feed(piece) == []
    with pytest.raises(proxy.UpstreamFailed):
        reader.feed(piece)


LINE = b"data: " + b"x" * 193 + b"\n"


@pytest.mark.parametrize(
    "start, piece", [(b"data: ", b"x" * 200), (b": ", b"x" * 200), (b"", LINE)]
)
def test_a_large_event_in_small_pieces_is_searched_once(start, piece):
    reader, spent = proxy.EventReader(), time.thread_time()
    fed = [reader.feed(part) for part in [start, *[piece] * 2500, b"\n\n"]]
    passed = b"".join(itertools.chain(*fed))
    assert passed.rstrip(b"\n") == (start + piece * 2500).rstrip(b"\n")
    assert time.thread_time() - spent < 3  # it takes 0.1; searched anew 12


# Calls and prices --------------------------------------------------------------------


def make_call(path: str = "chat/completions", **body: Any) -> proxy.Call:
    """Return a call as a client's body makes it; a chat says "hi"."""
    messages = {"messages": [{"role": "user", "content": "hi"}]}
    ask = {"chat/completions": messages}.get(path, {})
    return proxy.parse_call(path, json.dumps({"model": "chat", **ask, **body}).encode())


PRICE = proxy.Price(input=1, output=2)


def make_model(price: dict, **more: Any) -> proxy.Model:
    upstream = proxy.parse_upstream("u", {"url": "https://u.example"}, "upstreams.u")
    value = {"upstream": "u/id", "price": price, "max_output": 1000, **more}
    return proxy.parse_model("chat", value, "models.chat", {"u": upstream})


@pytest.mark.parametrize(
    "path, body, tokens, choices",
    [
        ("chat/completions", {}, 1000, 1),
        ("chat/completions", {"max_tokens": None, "n": None}, 1000, 1),
        ("chat/completions", {"max_tokens": 5}, 5, 1),
        ("chat/completions", {"max_completion_tokens": 7}, 7, 1),
        ("chat/completions", {"max_tokens": 5, "max_completion_tokens": 7}, 7, 1),
        ("chat/completions", {"max_tokens": 5000}, 5000, 1),
        ("chat/completions", {"n": 3}, 1000, 3),
        ("messages", {"max_tokens": 9}, 9, 1),
        ("completions", {"prompt": "a", "best_of": 4}, 1000, 4),
        ("completions", {"prompt": "a", "best_of": 4, "n": 2}, 1000, 4),
        ("completions", {"prompt": ["a", "b", "c"]}, 1000, 3),
        ("completions", {"prompt": ["a", "b", "c"], "n": 2}, 1000, 6),
        ("completions", {"prompt": [1, 2, 3]}, 1000, 1),
        ("completions", {"prompt": [[1, 2], [3]]}, 1000, 2),
        ("completions", {"prompt": []}, 1000, 1),
        ("responses", {"input": "a", "max_output_tokens": 9}, 9, 1),
        ("responses", {"input": "a"}, 1000, 1),
        ("embeddings", {"input": ["a", "b"], "max_tokens": 9}, 0, 1),
        ("images/generations", {"prompt": "a", "n": 3}, 1000, 3),
        ("what/ever", {"n_predict": 5000}, 5000, 1),
        ("what/ever", {}, 1000, 1),
    ],
)
def test_the_worst_case_counts_every_output_token(path, body, tokens, choices):
    quote = proxy.quote(make_call(path, **body), make_model({"output": 2}))
    assert (quote.tokens, quote.choices, quote.token) == (tokens, choices, 2 * 10**6)


@pytest.mark.parametrize(
    "data",
    ['"😀"', '"\\ud83d\\ude00"', '"\\u0041"', '"\\u00e9"', '"\\/"', "[1e15, 1e15]"],
)
def test_the_worst_case_of_the_input_is_a_token_a_byte(data):
    whole = b'{"model": "chat", "input": %s}' % data.encode()
    call = proxy.parse_call("embeddings", whole)
    quote = proxy.quote(call, make_model({"input": 0.5}))
    assert quote.fixed == 500_000 * max(len(whole), len(proxy.to_json(call.body)))


@pytest.mark.parametrize(
    "price, number, micro",
    [
        ({"request": 0.01}, 1, 10_000),
        ({"request": 0.01}, 3, 10_000),
        ({"image": 0.04}, 1, 40_000),
        ({"image": 0.04}, 4, 160_000),
    ],
)
def test_the_worst_case_has_every_image_and_the_request(price, number, micro):
    call = make_call("images/generations", prompt="a", n=number)
    assert proxy.quote(call, make_model(price)).hold(0) == micro


@pytest.mark.parametrize(
    "path, tokens, bounded",
    [("chat/completions", 1, True), ("messages", 1, True), ("beta/completions", 1, True),
     ("images/generations", 1000, True), ("audio/transcriptions", 1000, True),
     ("generate", 1000, False), ("embeddings", 0, True)],
)  # fmt: skip
def test_a_cap_counts_only_on_paths_that_are_known_to_heed_it(path, tokens, bounded):
    call = make_call(path, max_tokens=1)
    worst = proxy.quote(call, make_model({"input": 1, "output": 2}))
    assert (worst.tokens, call.bounded) == (tokens, bounded)


@pytest.mark.parametrize(
    "path, member", [("rerank", "documents"), ("images/edits", "images")]
)
def test_a_picture_counts_in_whatever_list_it_stands(path, member):
    body = {member: [{"image_url": {"url": "https://i"}}] * 3}
    assert make_call(path, **body).size > 3 * 5_000


@pytest.mark.parametrize("path", ["messages/count_tokens", "responses/input_tokens"])
def test_counting_holds_nothing(path):
    model = make_model({"input": 1, "output": 2, "request": 1})
    assert proxy.quote(make_call(path), model).hold(0) == 0


@pytest.mark.parametrize("name", ["cached", "written"])
def test_input_is_held_at_its_dearest_price(name):
    call = make_call()
    quote = proxy.quote(call, make_model({"input": 1, name: 3}))
    assert quote.fixed == call.size * 3 * 10**6


PLAIN_BODIES = [
    {"service_tier": "auto"}, {"service_tier": "default"}, {"service_tier": None},
    {"service_tier": "standard_only"}, {"speed": "standard"}, {"background": False},
    {"modalities": ["text"]}, {"modalities": []}, {"web_search_options": None},
    {"enable_search": False}, {"quality": "high"}, {"size": "4K"},  # told in tokens
    {"tools": [{"type": "web_search"}]}, {"anything": ["else"]},
]  # fmt: skip
DEAR = [
    {"service_tier": "fast"}, {"service_tier": "ultrafast"}, {"service_tier": "priority"},
    {"service_tier": "flex"}, {"service_tier": "Default"}, {"service_tier": 1},
    {"service_tier": ["default", "flex"]}, {"speed": "fast"}, {"inference_geo": "us"},
    {"background": True}, {"modalities": ["text", "audio"]}, {"modalities": "audio"},
    {"web_search_options": {}}, {"search_parameters": {"mode": "on"}},
    {"enable_search": True}, {"plugins": [{"id": "web"}]}, {"models": ["other/dear"]},
    {"provider": {"only": ["dear"]}}, {"deferred": True}, {"n_cmpl": 8},
    {"extra_body": {"n": 8}}, {"preset": "dear"}, {"fallbacks": [{"model": "dear"}]},
]  # fmt: skip
DEAR_IMAGES = [
    {"quality": "high"}, {"quality": "hd"}, {"quality": "medium"}, {"size": "4K"},
    {"size": "1536x1024"}, {"resolution": "2k"}, {"input_fidelity": "high"},
    {"sequential_image_generation": "auto"}, {"batch_size": 4}, {"num_images": 2},
]  # fmt: skip


@pytest.mark.parametrize("body", PLAIN_BODIES, ids=str)
def test_what_does_not_move_the_price_passes(body):
    proxy.refuse_unpriced(body, make_model({"input": 1}))


@pytest.mark.parametrize(
    "price, body",
    [("input", body) for body in DEAR] + [("image", body) for body in DEAR + DEAR_IMAGES],
)
def test_what_moves_the_price_is_refused_by_name_unless_it_is_allowed(price, body):
    [(name, value)] = body.items()
    with pytest.raises(proxy.BadRequest, match=f"'{name}' may not be ") as refused:
        proxy.refuse_unpriced(body, make_model({price: 1}))
    assert refused.value.param == name
    proxy.refuse_unpriced(body, make_model({price: 1}, allow=[name]))
    proxy.refuse_unpriced(body, make_model({price: 1}, defaults=body))


@pytest.mark.parametrize(
    "header, field",
    [
        ("claude-code-20250219,interleaved-thinking-2025-05-14", {}),
        ("a, context-1m-2025-08-07 ", {"anthropic-beta": ["context-1m-2025-08-07"]}),
    ],
)
def test_an_anthropic_beta_that_moves_the_price_is_a_field(header, field):
    assert proxy.dear_betas({"anthropic-beta": header}) == field
    with pytest.raises(proxy.BadRequest) if field else nullcontext():
        proxy.refuse_unpriced(field, make_model({"input": 1}))


@pytest.mark.parametrize(
    "url, id, passes",
    [
        ("jimeng+https://a", "high_aes", True), ("images+https://a", "seedream-4", True),
        ("images+https://a", "gpt-image-1", False), ("https://a", "seedream", False),
    ],
)  # fmt: skip
def test_a_size_is_free_only_where_the_vendor_has_one_price(url, id, passes):
    upstream = proxy.parse_upstream("u", {"url": url}, "u")
    value = {"upstream": f"u/{id}", "price": {"image": 1}}
    model = proxy.parse_model("m", value, "m", {"u": upstream})
    with nullcontext() if passes else pytest.raises(proxy.BadRequest):
        proxy.refuse_unpriced({"size": "4K"}, model)


@pytest.mark.parametrize(
    "allow, body, passes",
    [
        ("service_tier:flex", {"service_tier": "flex"}, True),
        ("service_tier:flex", {"service_tier": "default"}, True),
        ("service_tier:flex", {"service_tier": "fast"}, False),
        ("modalities:audio", {"modalities": ["text", "audio"]}, True),
        ("modalities:audio", {"modalities": ["audio", "image"]}, False),
        ("background:true", {"background": True}, True),
        ("speed:fast", {"speed": "fast", "service_tier": "fast"}, False),
    ],
)
def test_an_allowed_value_is_one_value(allow, body, passes):
    with nullcontext() if passes else pytest.raises(proxy.BadRequest):
        proxy.refuse_unpriced(body, make_model({"input": 1}, allow=[allow]))


@pytest.mark.parametrize(
    "url, free",
    [("http://127.0.0.1:11434/v1", True), ("http://localhost:1/v1", True),
     ("http://[::1]:1/v1", True), ("echo:", True), ("https://localhost.example/v1", False),
     ("http://192.168.1.2/v1", False)],
)  # fmt: skip
def test_a_model_without_a_price_is_one_on_loopback(url, free):
    upstream = proxy.parse_upstream("u", {"url": url}, "u")
    with nullcontext() if free else pytest.raises(proxy.ConfigError, match="m.price: is"):
        model = proxy.parse_model("m", {"upstream": "u/m"}, "m", {"u": upstream})
        assert model.price == proxy.Price()


@pytest.mark.parametrize("value", [None, "default", "fast"])
def test_where_the_price_is_for_a_default_no_other_value_is_plain(value):
    model = make_model({"input": 1}, defaults={"service_tier": "flex"})
    with pytest.raises(proxy.BadRequest):
        proxy.refuse_unpriced({"service_tier": value}, model)


MONDAY = 1_700_438_400  # 2023-11-20, 0:00 UTC
BORDERS = [  # hours, and the moments that they begin and end: days, hours from Monday
    ("Mon-Fri 01:00-04:00", [(0, 1), (1, 1), (4, 1)], [(0, 4), (4, 4)]),
    ("06:00-10:00", [(0, 6), (5, 6), (6, 6)], [(0, 10), (6, 10)]),
    ("22:00-02:00", [(0, 22), (6, 22)], [(0, 2), (1, 2), (7, 2)]),
    ("Fri 22:00-02:00", [(4, 22)], [(5, 2)]),
    ("Sun 22:00-02:00", [(6, 22), (-1, 22)], [(0, 2), (7, 2)]),
    ("Sat-Sun 00:00-24:00", [(5, 0)], [(7, 0), (0, 0)]),
    ("Sat-Mon 20:00-00:00", [(5, 20), (6, 20), (0, 20)], [(6, 0), (0, 0), (1, 0)]),
    ("Wed 00:00-12:00", [(2, 0)], [(2, 12)]),
]


@pytest.mark.parametrize("utc, begins, ends", BORDERS)
def test_the_price_changes_at_the_border_of_its_hours(utc, begins, ends):
    model = make_model({"input": 1, "hours": [{"utc": utc, "input": 2}]})
    for price, moments in ((2, begins), (1, ends)):
        for day, hour in moments:
            border = MONDAY + day * 86400 + hour * 3600
            assert model.at(border - 0.001).price.input == (3 - price) * 10**6
            assert model.at(border).price.input == price * 10**6
            assert model.at(border + 52 * 7 * 86400).price.input == price * 10**6


@pytest.mark.parametrize("utc", ["Mon-Fri 01:00-04:00", "Sun 22:00-02:00"])
def test_hours_leave_all_others_at_the_usual_price(utc):
    model = make_model({"input": 1, "hours": [{"utc": utc, "input": 2}]})
    week = Counter(model.at(MONDAY + minute * 60).price.input for minute in range(10080))
    assert week[2 * 10**6] == {"M": 5 * 180, "S": 240}[utc[0]]


@pytest.mark.parametrize(
    "price, usage, micro",
    [
        ({"input": 0.3}, (1,), 1),
        ({"input": 0.3}, (10,), 3),
        ({"input": 0.3}, (11,), 4),
        ({"input": 0.3, "output": 0.3}, (1, 0, 1), 1),
        ({"input": 0.3, "output": 1.2}, (1000, 0, 1000), 1500),
        ({"input": 0.3, "cached": 0.006, "output": 1.2}, (1000, 1000, 0), 6),
        ({"input": 0.3, "cached": 0.006, "output": 1.2}, (1001, 1000, 0), 7),
        ({"input": 0.3, "output": 1.2}, (1000, 1000, 0), 300),
        ({"image": 0.04}, (9, 0, 9, 2), 80_000),
        ({"request": 0.01, "output": 1}, (5, 0, 5), 10_005),
        ({"input": 1, "output": 1}, (0, 0, 0), 0),
        ({"input": 0.000001}, (1,), 1),
    ],
)
def test_a_cost_is_rounded_up_once(price, usage, micro):
    price = make_model(price).price
    assert proxy.cost(proxy.Usage(*usage), price) == micro


@pytest.mark.parametrize(
    "price, micro",
    [
        ({"input": 1}, 1000),
        ({"input": 1, "cached": 0.1}, 640),
        ({"input": 1, "written": 1.25}, 1125),
        ({"input": 1, "cached": 0.1, "written": 1.25}, 765),
        ({"input": 1, "cached": 0, "written": 0}, 100),
    ],
)
def test_what_is_read_from_and_written_to_a_cache_has_its_own_price(price, micro):
    usage = proxy.Usage(1000, 400, 0, written=500)
    assert proxy.cost(usage, make_model(price).price) == micro


TOLD = {"prompt_tokens": 20, "completion_tokens": 5}
TOLD_ANEW = {"input_tokens": 20, "output_tokens": 5}


@pytest.mark.parametrize(
    "usage, counts",
    [
        (TOLD, (20, 0, 5)),
        (TOLD_ANEW, (20, 0, 5)),
        ({**TOLD, "prompt_cache_hit_tokens": 8}, (20, 8, 5)),
        ({**TOLD, "prompt_tokens_details": {"cached_tokens": 8}}, (20, 8, 5)),
        ({**TOLD_ANEW, "input_tokens_details": {"cached_tokens": 8}}, (20, 8, 5)),
        ({**TOLD, "prompt_tokens_details": {"cached_tokens": None}}, (20, 0, 5)),
        ({**TOLD, "prompt_tokens_details": None}, (20, 0, 5)),
        ({**TOLD, "prompt_tokens_details": "none"}, (20, 0, 5)),
        ({**TOLD, "prompt_cache_hit_tokens": 0}, (20, 0, 5)),
        ({**TOLD, "prompt_cache_hit_tokens": 99}, (20, 20, 5)),
        ({"prompt_tokens": 0, "completion_tokens": 0}, (0, 0, 0)),
        ({"prompt_tokens": 20}, (20, 0, 0)),
        ({"completion_tokens": 5}, (0, 0, 5)),
        ({"prompt_tokens": 20, "completion_tokens": None}, (20, 0, 0)),
        ({"prompt_tokens": proxy.MAX_TOKENS}, (proxy.MAX_TOKENS, 0, 0)),
        # Gemini and xAI count the thinking only in the total.
        ({**TOLD, "total_tokens": 100}, (20, 0, 80)),
        ({**TOLD, "total_tokens": 1}, (20, 0, 5)),
        ({**TOLD, "total_tokens": "100"}, (20, 0, 5)),
        ({"prompt_tokens": 20, "total_tokens": 100}, (20, 0, 0)),
    ],
)
def test_usage_is_read_under_either_naming(usage, counts):
    assert proxy.read_usage({"usage": usage}) == proxy.Usage(*counts)


@pytest.mark.parametrize(
    "document",
    [
        {"response": {"usage": TOLD}},  # OpenAI's /responses
        {"type": "message_start", "message": {"usage": TOLD}},  # Anthropic
        {"choices": [], "x_groq": {"id": "req_1", "usage": TOLD}},  # Groq
        {"choices": [{"index": 0, "delta": {}, "usage": TOLD}]},  # Moonshot
        {"usage": None, "choices": [{"usage": TOLD}, 5], "message": "told"},
    ],
)
def test_usage_is_read_where_a_provider_puts_it(document):
    assert proxy.read_usage(document) == proxy.read_usage({"usage": TOLD})


ABSURD = [-1, 1.0, 0.5, True, False, "20", 10**12, proxy.MAX_TOKENS + 1, [], {}, NAN]
COUNTS = ["prompt_tokens", "completion_tokens", "input_tokens", "output_tokens"]


@pytest.mark.parametrize(
    "usage",
    [
        *(None, [], "20", 5, True, {}, {"total_tokens": 9}),
        *({name: count} for name in COUNTS for count in ABSURD),
        *(TOLD | {"prompt_cache_hit_tokens": count} for count in ABSURD),
        *(TOLD | {"cache_creation_input_tokens": count} for count in ABSURD),
        *(TOLD | {"prompt_tokens_details": {"cached_tokens": n}} for n in ABSURD),
    ],
    ids=str,
)
def test_absurd_or_missing_usage_is_not_believed(usage):
    assert proxy.read_usage({"usage": usage}) is None
    assert proxy.read_usage({"response": {"usage": usage}}) is None


READ, WROTE = "cache_read_input_tokens", "cache_creation_input_tokens"
ANTHROPIC = {"input_tokens": 7, "output_tokens": 50, READ: 10000, WROTE: 2000}
WRITES = {"cached_tokens": 8, "cache_write_tokens": 6}


@pytest.mark.parametrize(
    "usage, counts",
    [
        # Beside the input, as Anthropic has it.
        (ANTHROPIC, (12007, 10000, 50, 2000)),
        (ANTHROPIC | {READ: 0}, (2007, 0, 50, 2000)),
        (ANTHROPIC | {WROTE: None}, (10007, 10000, 50, 0)),
        (ANTHROPIC | {READ: 0, WROTE: 0}, (7, 0, 50, 0)),
        (ANTHROPIC | {"input_tokens": 20000}, (32000, 10000, 50, 2000)),
        # Inside it, as OpenAI has it.
        (TOLD | {"prompt_tokens_details": WRITES}, (20, 8, 5, 6)),
        (TOLD_ANEW | {"input_tokens_details": WRITES}, (20, 8, 5, 6)),
        (TOLD | {"cached_tokens": 8}, (20, 8, 5, 0)),
        (TOLD | {"num_cached_tokens": 8}, (20, 8, 5, 0)),
        (TOLD | {"prompt_tokens_details": {"cache_write_tokens": 99}}, (20, 0, 5, 20)),
        (TOLD | {"prompt_tokens_details": WRITES | {"cached_tokens": 17}}, (20, 17, 5, 3)),
        # Of servers that mix both: where there is room for them, inside.
        (TOLD | {READ: 8, WROTE: 6}, (20, 8, 5, 6)),
        (TOLD | {READ: 8, WROTE: 6, "total_tokens": 25}, (20, 8, 5, 6)),
        (TOLD | {READ: 8, WROTE: 6, "total_tokens": 39}, (34, 8, 5, 6)),
        (TOLD | {READ: 8000, WROTE: 60}, (8080, 8000, 5, 60)),
        (TOLD | {READ: 8000, WROTE: 60, "total_tokens": 8085}, (8080, 8000, 5, 60)),
    ],
    ids=str,
)
def test_caches_are_counted_inside_or_beside_the_input_as_the_provider_does(
    usage, counts
):
    input, cached, output, written = counts
    expected = proxy.Usage(input, cached, output, written=written)
    assert proxy.read_usage({"usage": usage}) == expected


def test_what_is_cached_for_an_hour_costs_as_much_more_as_anthropic_takes():
    parts = {"ephemeral_5m_input_tokens": 500, "ephemeral_1h_input_tokens": 1500}
    usage = proxy.read_usage({"usage": ANTHROPIC | {"cache_creation": parts}})
    assert usage == proxy.Usage(12007, 10000, 50, written=2000, hour=1500)
    price = make_model({"input": 1, "written": 1.25}).price  # the hour's costs 2
    expected = 7 + 10000 + 500 * 1.25 + 1500 * 2
    assert proxy.cost(usage, price) == math.ceil(expected)


@pytest.mark.parametrize("one", [proxy.Usage(10, 10), proxy.Usage(10, 2, written=8)])
def test_reports_that_add_up_leave_no_class_above_the_input(one):
    both = proxy.larger(one, proxy.Usage(10, 3, written=7))
    assert both.input == both.cached + both.written == 10


def test_where_nothing_is_generated_the_total_is_the_input():
    report = {"usage": {"total_tokens": 9}}
    assert proxy.read_usage(report, generates=False) == proxy.Usage(9)


MANY = proxy.PICTURE[0]  # tokens
DATA = "data:image/png;base64," + "iVBO" * 5_000
RAW = {"type": "base64", "data": DATA}
PARTS = [  # in a message: bytes of a medium, tokens it is held and estimated for; bounded
    ({"type": "text", "text": "2 words"}, 0, 0, (7 + 3) / 4, True),
    ({"type": "image_url", "image_url": {"url": DATA}}, len(DATA), 5_000, MANY, True),
    ({"type": "input_image", "image_url": DATA}, len(DATA), 5_000, MANY, True),
    ({"type": "image", "source": RAW}, len(DATA), 5_000, MANY, True),
    ({"content": [{"type": "image", "source": RAW}]}, len(DATA), 5_000, MANY, True),
    ({"type": "image_url", "image_url": {"url": "https://i"}}, 0, 5_000, MANY, True),
    ({"type": "image_url", "image_url": {"url": "https://i"}, "source": {"type": "text"}},
     0, 5_000, MANY, True),
    ({"type": "input_image", "image_url": DATA[:26]}, 26, 26, MANY, True),
    ({"type": "input_audio", "input_audio": {"data": DATA * 4}}, 4 * len(DATA), 60_000,
     2_000, True),
    ({"type": "file", "file": {"file_data": DATA}}, 0, 0, 6_000, False),
    ({"type": "input_file", "file_url": "https://f", "filename": "data:x"}, 0, 300_000,
     6_000, False),
    ({"type": "document", "title": "data:x", "source": {"url": "https://d"}}, 0, 300_000,
     6_000, False),
    ({"type": "document_url", "document_url": "https://d"}, 0, 300_000, 6_000, False),
    ({"type": "video", "video": ["https://v"]}, 0, 300_000, 6_000, False),
    ({"video_url": {"url": "https://v"}}, 0, 300_000, 6_000, False),
    ({"type": "file", "file": {"file_id": "f1"}}, 0, 300_000, 6_000, False),
    ({"type": "document", "source": {"url": "https://d"}}, 0, 300_000, 6_000, False),
    ({"type": ["image"], "image": DATA}, 0, 0, len(DATA) / 4 + 1.5, True),
]  # fmt: skip

@pytest.mark.parametrize("name", [*sorted(proxy.SILENT), "name", "secret essay " * 99])
def test_no_name_hides_a_text_from_the_estimate_of_a_prompt(name):
    text, tool = "secret essay " * 99, {"type": "tool_use", "id": "call_1"}
    hidden = [tool | {"input": {name: text}}, tool | {"input": {text: 1}}]
    for part in hidden:
        assert proxy.weigh([{"role": "user", "content": [part]}], True) >= len(text)
    assert proxy.weigh({"role": "user", "type": "x", "id": "y"}, True) == 0


@pytest.mark.parametrize(
    "path, member", [("chat/completions", "messages"), ("responses", "input")]
)
@pytest.mark.parametrize("part, inline, held, estimated, bounded", PARTS)
def test_a_medium_in_a_prompt_is_a_bounded_number_of_tokens(
    path, member, part, inline, held, estimated, bounded
):
    body = {"model": "chat", member: [{"role": "user", "content": [part]}]}
    call = proxy.parse_call(path, json.dumps(body).encode())
    assert call.size == len(json.dumps(body)) - inline + held
    assert proxy.estimate(call, 0, PRICE).input == math.ceil(estimated)
    assert call.bounded is bounded


@pytest.mark.parametrize(
    "more, bounded",
    [
        ({}, True),
        ({"tools": [{"type": "function"}, {"type": "custom"}, {"name": "x"}]}, True),
        ({"tools": [{"type": "function"}, {"type": "web_search"}]}, False),
        ({"tools": [{"type": ["function"]}, 5]}, False),
        ({"previous_response_id": "resp_1"}, False),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, False),
        ({"previous_response_id": None, "conversation": ""}, True),
        ({"prompt": {"id": "pmpt_1"}}, False),
        ({"web_search_options": {"search_context_size": "low"}}, False),
    ],
)
def test_what_a_body_does_not_show_is_known(more, bounded):
    assert make_call(**more).bounded is bounded


@pytest.mark.parametrize(
    "path, body, input",
    [
        ("chat/completions", {"messages": [{"content": "ten letters"}]}, 3),
        ("chat/completions", {"messages": [{"content": "2026"}]}, 4),
        ("chat/completions", {"messages": [{"content": "😀"}] * 2}, 2),
        ("chat/completions", {"messages": [{"content": None}]}, 0),
        ("completions", {"prompt": "ab"}, 1),
        ("completions", {"prompt": [1, 2, 3]}, 3),
        ("responses", {"input": "abcdef", "instructions": "ab"}, 2),
        ("messages", {"system": [{"type": "text", "text": "abcd"}]}, 1),
        ("chat/completions", {"messages": [{}], "tools": [{"a": "b"}]}, 3),
        ("rerank", {"query": "ab", "documents": ["ab", "cd"]}, 2),
        ("what/ever", {"messages": ["text", 5, None]}, 2),
        ("completions", {"prompt": "", "suffix": "abcdefgh"}, 2),
        ("embeddings", {"texts": ["abcd", "efgh"]}, 2),
        ("messages", {"messages": [{"content": [
            {"type": "document", "source": {"type": "text", "data": "x" * 40_000}}]}]},
         10_000),
        ("what/ever", {}, 0),
    ],
)
def test_an_estimate_counts_the_texts_and_says_so(path, body, input):
    usage = proxy.estimate(make_call(path, **body), 9, PRICE)
    assert usage == proxy.Usage(input, 0, 3, estimated=True)


@pytest.mark.parametrize("member", ["messages", "tools"])
def test_a_prompt_nested_beyond_reading_is_estimated_by_its_bytes(member):
    deep = json.loads("[" * 900 + "]" * 900)
    call = replace(make_call("x"), body={member: [deep]}, size=5_000)
    frames = sys.getrecursionlimit()
    sys.setrecursionlimit(500)
    try:
        assert proxy.estimate(call, 0, PRICE).input in (0, 5_000)
    finally:
        sys.setrecursionlimit(frames)


WHOLE, LESS = proxy.Usage(20, 8, 5), proxy.Usage(20, 8, 1)
ZEROS = proxy.Usage()
INPUT = proxy.Usage(1, estimated=True)  # of "hi"
GUESS = proxy.Usage(1, 0, 3, estimated=True)  # of "hi", and of nine bytes relayed
GREATER = proxy.Usage(20, 8, 3, estimated=True)  # its output is more than LESS has
PICTURE = proxy.Usage(images=1)
E = proxy.Ending
REFUSED = [(E.REFUSED, False, True), (E.REFUSED, True, True)]
DONE = [(E.DONE, False, True), (E.DONE, True, True)]
CUTS = [E.CUT, E.TIMED_OUT, E.DRAINED]
FINISHED = [(E.FAILED, False, True), *((each, True, True) for each in [*CUTS, E.LEFT])]
BROKEN = [*((each, False, True) for each in CUTS), (E.LEFT, False, False)]
LEFT = [(E.LEFT, False, True)]
SETTLED = [  # endings, the upstream's report, what was relayed weighs: what is charged
    (REFUSED, WHOLE, 9, None),
    (REFUSED, None, 9, None),
    (DONE, WHOLE, 9, WHOLE),
    (DONE, LESS, 9, LESS),
    (DONE, WHOLE, 0, WHOLE),
    (DONE, None, 9, GUESS),
    (DONE, ZEROS, 9, GUESS),
    (DONE, ZEROS, 0, ZEROS),
    (DONE, None, 0, INPUT),
    (FINISHED, LESS, 9, LESS),
    (FINISHED, WHOLE, 0, WHOLE),
    (FINISHED, None, 9, GUESS),
    (BROKEN + LEFT, WHOLE, 9, WHOLE),
    (BROKEN + LEFT, LESS, 9, GREATER),
    (BROKEN + LEFT, None, 9, GUESS),
    (BROKEN + LEFT, PICTURE, 9, PICTURE),
    (BROKEN, None, 0, None),
    (BROKEN, WHOLE, 0, None),
    (BROKEN, PICTURE, 0, None),
    (LEFT, None, 0, INPUT),
    (LEFT, LESS, 0, LESS),
    (LEFT, PICTURE, 0, PICTURE),
]


@pytest.mark.parametrize(
    "ending, reported, relayed, charged",
    [(ending, *rest) for endings, *rest in SETTLED for ending in endings],
)
def test_what_is_charged_follows_from_how_it_ended(ending, reported, relayed, charged):
    facts = (*ending, reported, relayed, make_call(), PRICE)
    assert proxy.settled_usage(*facts) == charged


def test_a_request_for_images_that_is_left_is_charged_them():
    call, price = make_call("images/generations", prompt="", n=3), proxy.Price(image=5)
    used = proxy.settled_usage(E.LEFT, False, True, None, 0, call, price)
    assert used == proxy.Usage(images=3, estimated=True)
    assert proxy.settled_usage(E.LEFT, False, False, None, 0, call, price) is None
    assert proxy.settled_usage(E.TIMED_OUT, False, True, None, 0, call, price) is None


def test_only_delivered_images_count():
    data = [{"url": "https://i"}, {"url": "", "b64_json": "aGk="}, {"error": {}}, 5]
    assert proxy.images_of({"data": [*data, {"url": None}, {"url": 5}]}) == data[:2]
    assert proxy.images_of({"data": "x"}) == []


def delta(**parts: Any) -> dict:
    """Return an event of a chat's stream."""
    return {"choices": [{"index": 0, "delta": parts, "finish_reason": None}]}


TOOL = {"index": 0, "id": "call_1", "type": "function"}
FUNCTION = {"name": "look_up", "arguments": "abc"}
OUTPUT = [{"type": "message", "content": [{"type": "output_text", "text": "abc"}]}]
WRITTEN = [
    (delta(role="assistant", content="abc"), 3),
    (delta(content="é😀"), 6),
    (delta(content="1984, "), 4 * 4 + 2),
    (delta(tool_calls=[TOOL | {"custom": {"name": "run", "input": "abc"}}]), 6),
    (delta(audio={"id": "a", "data": "abcd", "transcript": "ab"}), 6),
    (delta(images=[{"type": "image_url", "image_url": {"url": DATA}}]), 4 * MANY),
    (delta(content="\ud800"), 1),
    (delta(content=None, reasoning_content="abc"), 3),
    (delta(tool_calls=[TOOL | {"function": FUNCTION}] * 2), 20),
    (delta(what_is_new={"deep": ["abc", {"er": "abc"}]}), 6),
    ({"choices": [{"text": "abc", "finish_reason": "stop"}]}, 3),
    (delta(content=json.loads('{"x":' * 400 + '"abc"' + "}" * 400)), 3),
    (chat_json("abc", refusal="abc"), 6),
    ({"type": "response.custom_tool_call_input.delta", "delta": "abc"}, 3),
    ({"type": "response.output_text.delta", "delta": "abc", "item_id": "x"}, 3),
    ({"type": "response.function_call_arguments.delta", "delta": "abc"}, 3),
    ({"type": "response.output_text.done", "text": "abc"}, 0),
    ({"type": "response.completed", "response": {"output": OUTPUT}}, 0),
    ({"object": "response", "output": OUTPUT}, 3),
    ({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "a"}}, 1),
    ({"type": "content_block_delta", "delta": {"partial_json": "abc"}}, 3),
    ({"type": "content_block_delta", "delta": {"thinking": "abc"}}, 3),
    ({"type": "content_block_delta", "delta": {"signature": "abc"}}, 0),
    ({"type": "content_block_start", "content_block": {"type": "text", "text": ""}}, 0),
    ({"type": "message_delta", "delta": {"stop_reason": "end_turn"}}, 0),
    ({"type": "message", "content": [{"type": "text", "text": "abc"}]}, 3),
    ({"choices": [5, None, "abc", []], "delta": 5, "output": None}, 0),
    ({"choices": {"delta": {"content": "abc"}}}, 0),
    ({"choices": [{"delta": 5, "message": "abc", "text": True}]}, 0),
    ({"text": "abc", "model": "abc", "error": {"message": "abc"}}, 0),
    ({}, 0),
]


@pytest.mark.parametrize("document, size", WRITTEN, ids=itertools.count())
def test_the_text_of_an_answer_is_counted_by_its_bytes(document, size):
    assert proxy.written(document) == size


@pytest.mark.parametrize("name", ["content", "what_is_new"])
def test_a_text_that_is_nested_beyond_reading_ends_nothing(name):
    deep: Any = "abc"
    for _ in range(5000):
        deep = [deep]
    assert proxy.written(delta(**{name: deep})) == 0


# HTTP --------------------------------------------------------------------------------

# -- The stage -----------------------------------------------------------------------

TOKENS = {"price": {"input": 1, "cached": 0.1, "output": 2}, "max_output": 1000}
IMAGE = {"price": {"image": 0.04}}
PEAK_HOURS = {"utc": "Mon 01:00-02:00", "input": 5, "output": 4}
PEAK_PRICE = {"input": 1, "output": 2, "hours": [PEAK_HOURS]}
UNSET = "PROXY_TEST_UNSET_KEY"


class NoTls(Upstream):
    """A server that answers a TLS hello in plain text."""

    def _serve(self, connection: Connection) -> None:
        connection.sock.sendall(head(400))
        connection.finish()


class TlsUpstream(Upstream):
    """An upstream behind TLS, whose certificate lies in `folder`/cert.pem."""

    def __init__(self, folder: Path, script: Answer | Iterable[Answer | None]) -> None:
        self.cert, key = folder / "cert.pem", folder / "key.pem"
        make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
        make += " -days 2 -subj /CN=test -addext subjectAltName=IP:127.0.0.1"
        command = [*make.split(), "-out", self.cert, "-keyout", key]
        subprocess.run(command, check=True, capture_output=True)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(self.cert, key)
        super().__init__(script)

    @property
    def url(self) -> str:
        return super().url.replace("http:", "https:")

    def wrap(self, sock: socket.socket) -> socket.socket:
        return self.context.wrap_socket(sock, server_side=True)


class Stage:
    """One upstream of each dialect, with a keys.json that reaches them all."""

    def __init__(self, path: Path) -> None:
        self.main, self.spare = Upstream(), Upstream()
        self.deep, self.volc, self.ark = FakeDeepSeek(), FakeVolcengine(), FakeImages()
        self.claude = FakeAnthropic()
        self.upstreams = [self.main, self.spare, self.deep, self.volc, self.ark]
        self.upstreams.append(self.claude)
        self.no_tls, self.deaf = NoTls(), socket.socket()
        self.deaf.bind(("127.0.0.1", 0))  # it keeps its port, and never listens
        tls = self.no_tls.url.replace("http:", "https:")
        self.keys, self.db = path / "keys.json", path / "proxy.db"
        keys_file(
            path,
            self.main.url,
            limits={"rate": "10000/second"},
            accounts={"thin": {"credits": 0.001, "keys": {"main": "sk-thin"}}},
            upstreams={
                "spare": {"url": self.spare.url, "key": "sk-spare"},
                "deep": {"url": self.deep.url, "key": self.deep.key},
                "volc": {"url": self.volc.url, "key": self.volc.key},
                "ark": {"url": self.ark.url, "key": self.ark.key},
                "claude": {"url": self.claude.url, "key": self.claude.key},
                "dead": {"url": f"http://127.0.0.1:{self.deaf.getsockname()[1]}/v1"},
                "lost": {"url": "http://nowhere.invalid/v1"},
                "tls": {"url": tls},
                "unset": {"url": self.main.url, "key": f"${UNSET}"},
                "wrong": {"url": self.volc.url, "key": f"{ACCESS_KEY}:{'x' * 40}"},
                "stranger": {"url": self.volc.url, "key": f"AKLTSTRANGER:{SECRET_KEY}"},
            },
            models={
                "two": {"upstream": ["main/gpt-test", "spare/gpt-spare"], **TOKENS},
                "dead-first": {"upstream": ["dead/x", "spare/gpt-spare"], **TOKENS},
                "unset-first": {"upstream": ["unset/x", "spare/gpt-spare"], **TOKENS},
                "dead-echo": {"upstream": ["dead/x", "echo/echo"], **TOKENS},
                "echo-spare": {"upstream": ["echo/echo", "spare/x"], **TOKENS},
                **{name: {"upstream": f"{name}/x", **TOKENS} for name in NOWHERE},
                "peak": {"upstream": "main/p", "price": PEAK_PRICE},
                "written": {"upstream": "main/w", "price": TOKENS["price"] | {"written": 2}},
                "claude": {"upstream": "claude/claude-id", **TOKENS, "defaults": COOL},
                "mild": {"upstream": "main/m", **TOKENS, "defaults": MILD},
                "thinker": {"upstream": "main/o", **TOKENS, "defaults": THOUGHTFUL},
                "unset-image": {"upstream": ["unset/x", "volc/x"], **IMAGE},
                "picture": {"upstream": "main/dall-e", **IMAGE},
                "voice": {"upstream": "main/tts-1", "price": {"characters": 15}},
                "whisper": {"upstream": "main/whisper-1", "price": {"request": 0.006}},
                "draw": {"upstream": "ark/doubao-seedream-4-0-20260415", **IMAGE},
                "old-jimeng": {"upstream": "volc/jimeng_t2i_v31", **IMAGE},
                "deepseek-chat": {"upstream": "deep/deepseek-flash"},
                "deepseek-r1": {"upstream": "deep/deepseek-v4-pro"},
                "deepseek-coder": {"upstream": "deep/deepseek-flash", **TOKENS},
                "jimeng-image": {"upstream": "volc/jimeng_t2i_v40"},
                "wrong": {"upstream": "wrong/jimeng_t2i_v40", **IMAGE},
                "stranger": {"upstream": "stranger/jimeng_t2i_v40", **IMAGE},
                "seedream": {"upstream": "ark/doubao-seedream-4-5-251128"},
                "seedream-4": {"upstream": "ark/doubao-seedream-4-0-250828", **IMAGE},
                "any-image": {"upstream": "ark/flux", **IMAGE},
                "two-images": {"upstream": ["volc/jimeng_t2i_v40", "ark/x"], **IMAGE},
            },
        )

    def reset(self) -> None:
        """Forget what the last test scripted and recorded."""
        for up in self.upstreams:
            up.script, up.requests[:], up.errors[:] = [], [], []
            up.released = threading.Event()
        self.volc.tasks.clear()
        self.volc.states = FakeVolcengine.states

    def rows(self, where: str = "1", *values: Any) -> list[sqlite3.Row]:
        """Return the ledger's requests, oldest first."""
        db = sqlite3.connect(f"file:{self.db}?mode=ro", uri=True, timeout=5)
        db.row_factory = sqlite3.Row
        try:
            sql = f"SELECT * FROM requests WHERE {where} ORDER BY id"
            return db.execute(sql, values).fetchall()
        finally:
            db.close()

    def row(self, response: Any) -> sqlite3.Row:
        """Return the receipt of one answer."""
        return self.rows("id = ?", response.headers["x-request-id"])[0]

    def wait_idle(self, timeout: float = 2) -> None:
        """Wait until every slot is free."""
        wait_for(lambda: not self.rows("state = 0"), timeout, "a hold is left open")

    def end_test(self) -> None:
        """Assert that no hold is open and that no fake upstream was misused."""
        for up in self.upstreams:
            up.released.set()
        self.wait_idle()
        assert [error for up in self.upstreams for error in up.errors] == []

    def close(self) -> None:
        """End the upstreams and prove the ledger."""
        for up in [*self.upstreams, self.no_tls, self.deaf]:
            up.close()
        assert proof(self.keys.parent) == []


NOWHERE = ("dead", "lost", "tls", "unset")
COOL = {"temperature": 0.3}
THOUGHTFUL = {"max_completion_tokens": 900}
MILD = {"temperature": 0.2, "stop": ["a"], "thinking": {"type": "disabled", "x": 1}}


class InProcess(Stage):
    """The stage with its app in this process."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.app = proxy.create_app(self.keys, self.db)
        services = self.app.extensions["proxy"]
        # Not its log, which would be seen between two tests.
        services.watcher._upkeep = services.reload

    def post(self, path: str, body: dict, key: str = TEAM_KEY, **headers: str) -> Any:
        """Post JSON to /v1/<path>; the answer is read to its end, and closed."""
        headers = {**bearer(key), **headers}
        client = self.app.test_client(use_cookies=False)
        url = f"/v1/{path}"
        return client.post(url, json=body, headers=headers, buffered=True)

    def chat(self, model: str = "chat", key: str = TEAM_KEY, **body: Any) -> Any:
        """Ask for a chat completion."""
        body = {"model": model, "messages": SAY_HELLO, **body}
        return self.post("chat/completions", body, key)

    def close(self) -> None:
        self.app.extensions["proxy"].close()
        super().close()


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    stage = InProcess(tmp_path_factory.mktemp("stage"))
    yield stage
    stage.close()


@pytest.fixture
def stage(in_process: InProcess, monkeypatch: pytest.MonkeyPatch):
    """The app in this process, with short waits and nothing scripted."""
    for name in ("JIMENG_FIRST_POLL", "JIMENG_POLL", "WATCH_INTERVAL"):
        monkeypatch.setattr(proxy, name, 0.01)
    in_process.reset()
    yield in_process
    in_process.end_test()


SHORT_WAITS = {"JIMENG_FIRST_POLL": 0.02, "JIMENG_POLL": 0.02}
SHORT_WAITS |= {"COMMENT_INTERVAL": 0.05, "COMMENTS_WAIT": 0.02, "REPORT_PATIENCE": 1}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The stage with its app behind a real gunicorn, `.url`."""
    stage = Stage(tmp_path_factory.mktemp("served"))
    with Gateway(stage.keys, stage.db, threads=32, constants=SHORT_WAITS) as gateway:
        stage.url, stage.port, stage.log = gateway.url, gateway.port, gateway.log
        yield stage
    stage.close()


@pytest.fixture
def real(served: Stage) -> Iterator[Stage]:
    """The app behind gunicorn, nothing scripted."""
    served.reset()
    yield served
    served.end_test()


def said(response: Any) -> str:
    """Return the text of a completion."""
    return response.json["choices"][0]["message"]["content"]


def error_of(response: Any) -> dict:
    """Return the envelope's error, whose members are OpenAI's and no other."""
    document = response.json
    assert list(document) == ["error"] and response.mimetype == "application/json"
    assert list(document["error"]) == ["message", "type", "param", "code"]
    return document["error"]


def documents(data: bytes) -> list[Any]:
    """Return the events of a stream, parsed; [DONE] is "DONE"."""
    events = sse_events(data)
    return [json.loads({"[DONE]": '"DONE"'}.get(one, one)) for one in events]


def stream_text(data: bytes, part: str = "content") -> str:
    """Return a stream's text."""
    choices = [one["choices"] for one in documents(data)[:-1]]
    return "".join(c[0].get("delta", {}).get(part) or "" for c in choices if c)


def retry_of(response: Any) -> str | None:
    """Return what a client is told of repeating: "no", the seconds to wait, or None."""
    no, wait = [response.headers.get(n) for n in ("x-should-retry", "Retry-After")]
    assert None in (no, wait) and no in (None, "false"), "at most one of the two"
    return {"false": "no"}.get(no, wait)


# -- Connections ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "stream, answers",
    [
        (False, [json_answer(chat_json("a"))] * 3),
        (True, [sse(chat_chunks("a"))] * 3),
        (True, [sse(chat_chunks("a"), done=False)] * 3),
        (True, [sse(chat_chunks("a"), pieces=1)] * 3),
        (True, [sse(chat_chunks("a")), json_answer({}, 404), json_answer({}, 429)]),
    ],
)
def test_a_connection_is_used_again(stage, stream, answers):
    stage.main.script = [*answers, json_answer(chat_json("b"))]
    assert all(stage.chat(stream=stream).data for _ in answers)
    assert said(stage.chat()) == "b"
    first, *others = stage.main.requests
    assert [one.connection is first.connection for one in others] == [True] * 3


HI = json.dumps(chat_json("hi")).encode()
OK, TYPE = b"HTTP/1.1 200 OK\r\n", b"content-type:application/json\r\n"
SIZE = b"%X" % len(HI)
CODED = OK + TYPE + b"Transfer-Encoding: chunked\r\n\r\n"
LAST_CHUNK = b"\r\n0\r\n\r\n"
ONE_CHUNK = chunk(HI) + chunk(b"")
COUNTED = b"Content-Length: %d\r\n\r\n" % len(HI) + HI
GOOD_WIRES = {
    "a chunk": CODED + SIZE + b"\r\n" + HI + LAST_CHUNK,
    "chunks of a byte": CODED + b"".join(map(chunk, [*split(HI, 1), b""])),
    "an extension": CODED + SIZE + b';a="b"\r\n' + HI + b"\r\n0;x\r\n\r\n",
    "a trailer": CODED + SIZE + b"\r\n" + HI + b"\r\n0\r\nX: 1\r\nY: 2\r\n\r\n",
    "a zero before the size": CODED + b"00" + SIZE + b"\r\n" + HI + LAST_CHUNK,
    "Chunked": CODED.replace(b"chunked", b"Chunked") + ONE_CHUNK,
    "a length": OK + TYPE + COUNTED,
    "no reason": b"HTTP/1.1 200\r\n" + TYPE + COUNTED,
    "100 first": b"HTTP/1.1 100 Continue\r\n\r\n" + OK + TYPE + COUNTED,
    "103 twice": head(103, ("Link", "x")) * 2 + OK + TYPE + COUNTED,
}  # fmt: skip
UNTIL_THE_END = {
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\n" + TYPE + b"\r\n" + HI,
    "no length": OK + TYPE + b"\r\n" + HI,
}
# The size as Python's int() would read it, and what is none.
CHUNK_SIZES = [b"+" + SIZE, b"0x" + SIZE, b"%b_%b" % (SIZE[:1], SIZE[1:]), b" " + SIZE]
CHUNK_SIZES += [b"-5", b"", b" ", b"g", b"F" * 40]
BAD_WIRES = [
    *(CODED + size + b"\r\n" + HI + LAST_CHUNK for size in CHUNK_SIZES),
    CODED.replace(b"HTTP/1.1", b"HTTP/1.0") + ONE_CHUNK,
    OK + b"Transfer-Encoding: chunked\r\n" + CODED.removeprefix(OK) + ONE_CHUNK,
    CODED + SIZE + b"\r\n" + HI + b"XX0\r\n\r\n",
    OK + TYPE + b"Content-Length: 2\r\n" + COUNTED,
    OK + TYPE + b"Content-Length: 2\r\n" + CODED.removeprefix(OK) + ONE_CHUNK,
    OK + TYPE + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + ONE_CHUNK,
    OK + TYPE + b"Content-Length: +5\r\n\r\n" + HI,
    OK + TYPE + b"Content-Length: 1_0\r\n\r\n" + HI,
    OK + TYPE + b"Content-Length : 5\r\n\r\n" + HI,
    b"HTTP/2 200 OK\r\n" + TYPE + COUNTED,
    b"HTTP/1.1 20 OK\r\n" + TYPE + COUNTED,
    b"HTTP/1.1 2000 OK\r\n" + TYPE + COUNTED,
    head(101, ("Upgrade", "websocket")) + OK + TYPE + COUNTED,
    head(103) * 1000 + OK + TYPE + COUNTED,
]  # fmt: skip


def wire(data: bytes, pieces: int, ends: bool = False) -> Answer:
    """Send these bytes in pieces, and end the connection only if told to."""

    def answer(request: Request) -> None:
        for piece in split(data, pieces):
            request.send(piece)
        if ends:
            request.keep = request.connection.sock.shutdown(socket.SHUT_WR)
        request.connection.server.released.set()

    return answer


@pytest.mark.parametrize(
    "first, idle",
    [
        (wire(GOOD_WIRES["a length"], 10_000, ends=True), 9),
        (wire(GOOD_WIRES["a length"] * 2, 10_000), 9),  # one that nobody has asked for
        (wire(OK + b"Connection: close\r\n" + TYPE + COUNTED, 10_000), 9),
        (wire(GOOD_WIRES["a length"], 10_000), 0),
    ],
    ids=["ends", "babbles", "says that it ends", "has been idle"],
)
def test_a_connection_that_is_not_quiet_or_ends_is_not_used_again(
    stage, monkeypatch, first, idle
):
    monkeypatch.setattr(proxy, "UPSTREAM_IDLE", idle)
    stage.main.script = [first, json_answer(chat_json("b"))]
    assert said(stage.chat()) == "hi" and stage.main.released.wait(2)
    assert said(stage.chat()) == "b"
    one, other = stage.main.requests
    assert one.connection is not other.connection


@pytest.mark.parametrize("pieces", [1, 7, 10_000])
@pytest.mark.parametrize("name", GOOD_WIRES)
def test_an_answer_is_read_as_rfc_9112_has_it(stage, name, pieces):
    stage.main.script = [wire(GOOD_WIRES[name], pieces)] * 2
    assert [said(stage.chat()), said(stage.chat())] == ["hi", "hi"]
    assert stage.main.requests[0].connection is stage.main.requests[1].connection


@pytest.mark.parametrize("pieces", [1, 10_000])
@pytest.mark.parametrize("name", UNTIL_THE_END)
def test_an_answer_without_a_length_ends_with_its_connection(stage, name, pieces):
    stage.main.script = [wire(UNTIL_THE_END[name], pieces, ends=True)] * 2
    assert [said(stage.chat()), said(stage.chat())] == ["hi", "hi"]


@pytest.mark.parametrize("data", BAD_WIRES, ids=itertools.count())
def test_an_ambiguous_answer_is_a_503_and_its_connection_is_given_up(stage, data):
    stage.main.script = [wire(data, 10_000), json_answer(chat_json("next"))]
    assert_unavailable(stage, stage.chat(), "no")
    assert said(stage.chat()) == "next"
    first, second = stage.main.requests
    assert first.connection is not second.connection and first.closed.wait(2)


@pytest.mark.parametrize("name", ["a trailer", "a length", "no length"])
def test_an_answer_cut_anywhere_on_the_wire_is_a_503(stage, name):
    data = (GOOD_WIRES | UNTIL_THE_END)[name]
    cuts = range(len(data))
    stage.main.script = [wire(data[:n], 10_000, ends=True) for n in cuts]
    assert {stage.chat().status_code for _ in cuts} == {503}


def one_event(text: str, finish: str | None = None) -> bytes:
    return sse_bytes([chat_chunk("gpt-test", {"content": text}, finish)], done=False)


LAST_PIECES = {
    "a [DONE] without its blank line": ("stop", b"data: [DONE]", "[DONE]"),
    "a comment": ("stop", b": bye\n\n", "[DONE]"),
    "the start of an event": ("stop", b'data: {"choi', "[DONE]"),
    "a word": ("stop", one_event("more"), "[DONE]"),
    "a word, nothing finished": (None, one_event("more"), "provider_unavailable"),
}


@pytest.mark.parametrize("length", [True, False], ids=["counted", "chunked"])
@pytest.mark.parametrize("name", LAST_PIECES)
def test_a_stream_whose_end_comes_with_its_last_bytes_ends_at_once(real, name, length):
    finish, last, end = LAST_PIECES[name]
    first = one_event("hello", finish)

    def answer(request: Request) -> None:
        size = [("Content-Length", str(len(first + last)))] if length else [CHUNKED]
        request.send(head(200, EVENTS, *size))
        request.send(first if length else chunk(first))
        request.wait(None, 0.05)  # so that the rest comes alone
        request.send(last if length else chunk(last) + chunk(b""))

    real.main.script = [answer]
    started = time.monotonic()
    with chat(real.url, TEAM_KEY, stream=True) as response:
        assert end in sse_events(response.content)[-1]
    assert time.monotonic() - started < 2


# -- The watcher ---------------------------------------------------------------------


@pytest.fixture
def watcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[proxy.Watcher]:
    """A watcher whose upkeep has failed, which stops nothing."""
    failed = threading.Event()

    def upkeep() -> None:
        failed.set()
        raise OSError(errno.ENOSPC, "a full disk")

    monkeypatch.setattr(proxy, "WATCH_INTERVAL", 0.01)
    made = proxy.Watcher(upkeep)
    assert failed.wait(5)
    yield made
    made.close()


PACES = {  # how long a body of 60 s is waited for: (at which second, which part of it)
    "nothing": ([], 10),
    "stands still at once": ([(0, 0.01)], 10),
    "nearly all, then nothing": ([(1, 0.97)], 11),
    "nearly all, then trickles": ([(1, 0.97), *((n, 1e-6) for n in range(2, 60))], 11),
    "evenly": ([(n, 1 / 50) for n in range(50)], 59),
    "late, then fast enough": ([(9, 0.4), (18, 0.4), (27, 0.1)], 33),
    "falls behind": ([(n, 0.01) for n in range(60)], 20),
}


@pytest.mark.parametrize("name", PACES)
def test_a_body_keeps_an_even_pace_and_saves_up_no_time(name, monkeypatch):
    parts, ended = PACES[name]
    now = 0.0
    monkeypatch.setattr(proxy, "time", SimpleNamespace(monotonic=lambda: now))
    watch = proxy.Watch()
    with watch.receiving() as arrived:
        for second, part in parts:
            if second < watch.deadline:
                now = second
                arrived(part)
        assert watch.deadline == pytest.approx(ended, abs=1)


@pytest.mark.parametrize("length", ["", "1000"])
def test_what_arrived_is_told_as_a_part_of_what_is_known(length, monkeypatch):
    monkeypatch.setattr(proxy, "PIECE", 250)
    environ, parts = {"wsgi.input": BytesIO(b"x" * 1000), "CONTENT_LENGTH": length}, []
    assert len(b"".join(proxy.received(environ, 1000, parts.append))) == 1000
    assert parts == ([0.25] * 4 if length else [1, 1 / 2, 1 / 3, 1 / 4])


def test_a_late_look_at_a_client_leaves_the_next_one_on_its_descriptor(watcher):
    first, peer = socket.socketpair()
    gone = proxy.Watch(first)
    watcher.add(gone)
    second, other = socket.socketpair()
    number = os.dup2(second.fileno(), first.fileno())  # as accept() gives it again
    first.detach()
    with socket.socket(fileno=number) as again, second, other, peer:
        watch = proxy.Watch(again)
        watcher.add(watch)
        watcher._look(number)
        watcher.remove(gone)
        assert (gone.ending, watch.ending) == (None, None)
        second.close()
        other.close()
        wait_for(lambda: watch.ending is proxy.Ending.LEFT, what="the second one's end")
        watcher.remove(watch)


def test_one_account_waits_for_its_bodies_on_a_quarter_of_the_places(watcher):
    ours, theirs = socket.socketpair()
    with ours, theirs, ExitStack() as receiving:
        made = [proxy.Watch(ours, "one") for _ in range(3)]
        for watch in made:
            assert watcher.add(watch, 8)
            receiving.enter_context(watch.receiving())
        assert not watcher.add(proxy.Watch(ours, "one"), 8)
        made.append(proxy.Watch(ours, "other"))
        assert watcher.add(made[-1], 8)
        for watch in made:
            watcher.remove(watch)


def test_a_drain_wakes_what_waits_and_a_second_one_does_not_put_it_off(watcher):
    ours, theirs = socket.socketpair()
    reads, sleeps = proxy.Watch(), proxy.Watch()
    reads.awaited = ours
    assert watcher.add(reads) and watcher.add(sleeps)
    with ours, theirs, ThreadPoolExecutor(2) as pool:
        read, slept = pool.submit(ours.recv, 1), pool.submit(sleeps.sleep, 60)
        watcher.drain(0.05)
        watcher.drain(60)
        assert read.result(2) == b"" and reads.ending is proxy.Ending.DRAINED
        assert slept.exception(2).ending is proxy.Ending.DRAINED
        assert not watcher.add(proxy.Watch())  # nobody is let in any more
    watcher.remove(reads)
    watcher.remove(sleeps)


def test_an_answer_to_a_body_that_is_not_read_is_told():
    """A server that refuses 6 MB by their head, and closes."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        pool.submit(refuse_by_the_head, server)
        url = {"url": f"http://127.0.0.1:{server.getsockname()[1]}/v1"}
        dialect = proxy.OpenAI(proxy.parse_upstream("u", url, "upstreams.u"))
        body = b"x" * (6 << 20)
        with pytest.raises(proxy.Refused) as refused:
            dialect.finish(dialect.start("x", body, proxy.Watch()))
    assert refused.value.status == 413


def refuse_by_the_head(server: socket.socket) -> None:
    """Answer 413 to the head of one request; what comes after it is not read."""
    sock, _ = server.accept()
    with sock:
        read_until(sock, b"\r\n\r\n")
        body = b'{"error": {"message": "too long"}}'
        size = ("Content-Length", str(len(body)))
        sock.sendall(head(413, ("Content-Type", "application/json"), size) + body)


# Dialects ----------------------------------------------------------------------------


@pytest.mark.parametrize("message", ["model llama3 not found", "max_tokens: 5"])
@pytest.mark.parametrize("key", ["ollama", "token-abc"])
def test_words_that_hold_the_end_of_a_short_key_are_left(key, message):
    assert proxy.scrub(message, (key,)) == message


# -- DeepSeek ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, asked, sent, cost",
    [
        ("deepseek-chat", {}, {"type": "disabled"}, 21),  # 12 + 0.8 + 8, rounded up
        ("deepseek-chat", {"thinking": {"type": "enabled"}}, {"type": "enabled"}, 27),
        ("deepseek-r1", {}, {"type": "enabled"}, 27),
    ],
)
def test_deepseek_thinks_if_its_model_or_the_client_says_so(
    stage, model, asked, sent, cost
):
    response = stage.chat(model, **asked)
    (request,) = stage.deep.requests
    known = {"deepseek-chat": "deepseek-flash", "deepseek-r1": "deepseek-v4-pro"}
    assert request.path == "/v1/chat/completions"
    assert (request.json["model"], request.json.get("thinking")) == (known[model], sent)
    assert (response.json["model"], said(response)) == (model, stage.deep.text)
    told = response.json["choices"][0]["message"].get("reasoning_content")
    assert told == {21: None, 27: stage.deep.thought}[cost]
    row = stage.row(response)
    assert (row["input"], row["cached"], row["cost"]) == (20, 8, cost)


def test_deepseek_streams_its_reasoning_and_pays_by_the_finish_chunk(stage):
    response = stage.chat("deepseek-r1", stream=True)
    *events, finish, last = documents(response.data)
    assert response.data.count(b": keep-alive\n\n") == 2 and last == "DONE"
    assert stream_text(response.data, "reasoning_content").strip() == stage.deep.thought
    assert stream_text(response.data).strip() == stage.deep.text
    assert events[1]["choices"][0]["delta"] == {
        "content": None, "reasoning_content": "Let "
    }  # fmt: skip
    assert finish["usage"]["prompt_cache_hit_tokens"] == 8 and finish["choices"]
    row = stage.row(response)
    assert (row["cost"], row["estimated"]) == (27, 0)


def test_history_keeps_all_but_the_role_developer_which_is_sent_as_system(stage):
    rules = {"role": "developer", "content": "Be brief", "x": 1}
    function = {"name": "f", "arguments": "{}"}
    call = {"id": "c1", "type": "function", "function": function}
    turn = {"role": "assistant", "content": None, "reasoning_content": "R", "x": 1}
    result = {"role": "tool", "tool_call_id": "c1", "content": "4"}
    messages = [rules, *SAY_HELLO, {**turn, "tool_calls": [call]}, result]
    assert stage.chat("deepseek-r1", messages=messages).status_code == 200
    sent = [{**rules, "role": "system"}, *messages[1:]]
    assert stage.deep.requests[0].json["messages"] == sent


@pytest.mark.parametrize(
    "asked, cap",
    [
        ({}, 1000),
        ({"max_completion_tokens": 2}, 2),
        ({"max_tokens": 3}, 3),
        ({"max_tokens": 3, "max_completion_tokens": 2}, 2),
        ({"max_tokens": 2, "max_completion_tokens": 3}, 2),
    ],
)
def test_deepseek_is_bounded_by_max_tokens(stage, asked, cap):
    response = stage.chat("deepseek-chat", **asked)
    assert stage.deep.requests[0].json["max_tokens"] == cap
    assert len(said(response).split()) == min(cap, 4)
    assert stage.row(response)["output"] == min(cap, 4)


def test_fill_in_the_middle_is_asked_for_under_beta(stage):
    stage.deep.script = [json_answer({**TEXT, "usage": usage_of(4, 3)})]
    response = stage.post("completions", {"model": "deepseek-chat", "prompt": "x"})
    assert stage.deep.requests[0].path == "/beta/completions"
    assert response.json["model"] == "deepseek-chat"


def test_json_schema_is_deepseeks_to_refuse(stage):
    response = stage.chat("deepseek-chat", response_format={"type": "json_schema"})
    assert response.status_code == 400 and "response_format" in response.text


# -- Anthropic -----------------------------------------------------------------------

MESSAGES = {"model": "claude", "messages": SAY_HELLO, "max_tokens": 99}
VERSION = "2023-06-01"


@pytest.mark.parametrize(
    "sent, told",
    [
        ({}, (VERSION, "")),
        ({"anthropic-version": "2024-10-22"}, ("2024-10-22", "")),
        ({"anthropic-beta": "a-1,b-2"}, (VERSION, "a-1,b-2")),
    ],
)
def test_anthropic_is_asked_in_its_own_way(stage, sent, told):
    response = stage.post("messages?beta=true", MESSAGES, **sent)
    assert response.json == message_json(model="claude")
    (request,) = stage.claude.requests
    assert (request.path, request.query) == ("/v1/messages", "")
    assert request.json == {**MESSAGES, **COOL, "model": "claude-id"}
    names = "anthropic-version", "anthropic-beta"
    assert tuple(map(request.header, names)) == told
    row = stage.row(response)
    assert (row["input"], row["output"], row["cost"]) == (50, 30, 110)


@pytest.mark.parametrize("base", ["", "/", "/v1", "/v1/", "/x/v1"])
def test_anthropics_base_url_may_end_in_v1_or_not(base):
    value = {"url": f"anthropic+https://a.example{base}", "key": SECRET}
    dialect = proxy.Anthropic(proxy.parse_upstream("u", value, "upstreams.u"))
    prefix = "/x" if base.startswith("/x") else ""
    assert dialect.url_path("messages") == f"{prefix}/v1/messages"


def test_deepseek_speaks_messages_below_its_own_path(stage):
    stage.deep.script = [json_answer(message_json())]
    response = stage.post("messages", {**MESSAGES, "model": "deepseek-chat"})
    assert response.json["model"] == "deepseek-chat"
    (request,) = stage.deep.requests
    assert request.path == "/anthropic/v1/messages"
    assert request.header("x-api-key") == SECRET
    assert not request.header("Authorization")


def test_a_plain_server_is_asked_for_messages_with_its_bearer(stage):
    stage.main.script = [json_answer(message_json()), json_answer({}, 404)]
    sent = {"anthropic-version": "2024-10-22", "anthropic-beta": "a-1"}
    asked = {**MESSAGES, "model": "chat"}
    assert stage.post("messages", asked, **sent).json == message_json(model="chat")
    (request,) = stage.main.requests
    assert request.path == "/v1/messages"
    assert request.header("Authorization") == f"Bearer {SECRET}"
    assert {name: request.header(name) for name in sent} == sent
    response = stage.post("messages", asked)
    assert (response.status_code, kind_of(response)) == (404, "not_found_error")


@pytest.mark.parametrize("key", [TEAM_KEY, POOR_KEY])
def test_counting_is_free_and_sent_without_defaults_or_a_cap(stage, key):
    asked = {"model": "claude", "messages": SAY_HELLO, "system": "x"}
    response = stage.post("messages/count_tokens", asked, key)
    assert response.json == {"input_tokens": 2095}
    (request,) = stage.claude.requests
    assert request.json == {**asked, "model": "claude-id"}
    row = stage.row(response)
    assert (row["state"], row["status"], row["hold"]) == (proxy.RELEASED, 200, 0)
    assert "x-ratelimit-remaining-requests" in response.headers


@pytest.mark.parametrize(
    "path, model, spoken",
    [
        ("chat/completions", "claude", "/v1/messages and /v1/messages/count_tokens"),
        ("responses", "claude", "/v1/messages and /v1/messages/count_tokens"),
        ("messages", "echo", "/v1/chat/completions"),
        ("responses", "echo", "/v1/chat/completions"),
        ("messages", "seedream", "/v1/chat/completions and /v1/images/generations"),
        ("embeddings", "jimeng-image", "/v1/chat/completions and /v1/images/generations"),
    ],
)
def test_a_path_that_a_dialect_does_not_speak_is_a_404_that_says_which_it_does(
    stage, path, model, spoken
):
    response = stage.post(path, {**MESSAGES, "model": model, "input": "x"})
    assert response.status_code == 404
    assert f"through {spoken} only" in response.json["error"]["message"]
    assert not [request for up in stage.upstreams for request in up.requests]


def kind_of(response: Any) -> str:
    """Return the type of an error in Anthropic's envelope."""
    document = response.json
    assert (list(document), document["type"]) == (["type", "error"], "error")
    assert list(document["error"]) == ["type", "message"]
    assert SECRET not in response.text
    return document["error"]["type"]


@pytest.mark.parametrize(
    "more, key, answer, status, kind",
    [
        ({}, "sk-nobody", None, 401, "authentication_error"),
        ({}, POOR_KEY, None, 402, "billing_error"),
        ({"model": "nope"}, TEAM_KEY, None, 404, "not_found_error"),
        ({"max_tokens": 0}, TEAM_KEY, None, 400, "invalid_request_error"),
        ({}, TEAM_KEY, ("invalid_request_error", 400), 400, "invalid_request_error"),
        ({}, TEAM_KEY, ("not_found_error", 404), 404, "not_found_error"),
        ({}, TEAM_KEY, ("request_too_large", 413), 413, "request_too_large"),
        ({}, TEAM_KEY, ("authentication_error", 401), 503, "api_error"),
        ({}, TEAM_KEY, ("overloaded_error", 529), 503, "api_error"),
        ({}, TEAM_KEY, ("api_error", 500), 503, "api_error"),
    ],
)
@pytest.mark.parametrize("path", ["messages", "messages/count_tokens"])
def test_what_is_refused_about_messages_is_told_in_anthropics_shape(
    stage, path, more, key, answer, status, kind
):
    stage.claude.script = [anthropic_error(*answer)] if answer else []
    free = path != "messages" and key == POOR_KEY
    response = stage.post(path, MESSAGES | more, key)
    told = (200, None) if free else (response.status_code, kind_of(response))
    assert told == ((200, None) if free else (status, kind))


# -- JiMeng --------------------------------------------------------------------------

VECTORS = {
    "A": (
        "CVSync2AsyncSubmitTask",
        '{"req_key":"jimeng_t2i_v40","prompt":"一只猫","width":1024,"height":1024}',
        "519b118bb35e7e95b54b89c5b97b857701b880669ec75bce5edfea8604e9b3dd",
        "a271f2d5c75aaf160960864410e4b1dab203adb05dbeef13bc71858959ec7a0e",
    ),
    "B": (
        "CVProcess",
        "{}",
        "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        "f9b0f0d5226d253f51927738eee22d189280a74de700659b353cbae219683fd4",
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_the_signature_is_the_vendors(name):
    action, body, digest, signature = VECTORS[name]
    now = time.strptime("20260101T120000Z", "%Y%m%dT%H%M%SZ")
    headers = proxy.volcengine_signature(
        ACCESS_KEY, SECRET_KEY, "visual.volcengineapi.com",
        f"Action={action}&Version=2022-08-31", body.encode(), now,
    )  # fmt: skip
    assert headers == {
        "Content-Type": "application/json",
        "X-Date": "20260101T120000Z",
        "X-Content-Sha256": digest,
        "Authorization": f"HMAC-SHA256 Credential={ACCESS_KEY}/20260101/cn-north-1/cv/"
        "request, SignedHeaders=content-type;host;x-content-sha256;x-date, "
        f"Signature={signature}",
    }


CHATS, IMAGES = "chat/completions", "images/generations"
POLICY, DOWN = "content_policy_violation", "provider_unavailable"
GOOD, UNFIT = (200, None, None), (400, POLICY, None)
LATER, LOST = (503, DOWN, "2"), (503, DOWN, "no")  # by whether it may be asked again
WALK, NEVER = ("in_queue", "generating", "done"), ("generating",)
DONE_EMPTY = json_answer(volc_body(10000, {"status": "done", "image_urls": []}, "ok"))
DONE_NULL = json_answer(volc_body(10000, {"status": "done", "image_urls": None}, "ok"))
NO_TASK = json_answer(volc_body(10000, {}, "Success"))
BUSY_FRONT = volc_denied("FlowLimitExceeded", 429)
WEB_PAGE = typed(b"<html>", "text/html")

VOLCENGINE = {  # the script, a task's states: how it ends, after how many polls
    "good": ([], WALK, GOOD, 3),
    "50429 on a poll": ([None, volc_error(50429)], WALK, GOOD, 4),
    "50430 on a poll": ([None, None, volc_error(50430)], WALK, GOOD, 4),
    "429 of the front on a poll": ([None, BUSY_FRONT], WALK, GOOD, 4),
    "50429 on submit": ([volc_error(50429)], WALK, LATER, 0),
    "50430 on submit": ([volc_error(50430)], WALK, LATER, 0),
    "429 of the front": ([BUSY_FRONT], WALK, LATER, 0),
    **{
        f"{code} on submit": ([volc_error(code)], WALK, UNFIT, 0)
        for code in (50411, 50412, 50413, 50512, 50518)
    },
    **{
        f"{code} on a poll": ([None, None, volc_error(code)], WALK, UNFIT, 2)
        for code in (50511, 50519, 50412)
    },
    "50400": ([volc_error(50400)], WALK, LOST, 0),
    "50400 on a poll": ([None, volc_error(50400)], WALK, LOST, 1),
    "a wrong secret": ([], WALK, LOST, 0),
    "a wrong access key": ([], WALK, LOST, 0),
    "denied on a poll": ([None, volc_denied()], WALK, LOST, 1),
    "50500 on submit": ([volc_error(50500)], WALK, LATER, 0),
    "50501 on submit": ([volc_error(50501)], WALK, LATER, 0),
    "50521 on submit": ([volc_error(50521)], WALK, LATER, 0),
    "50500 on a poll": ([None, volc_error(50500)], WALK, LOST, 1),
    "no task": ([NO_TASK], WALK, LOST, 0),
    "expired": ([], ("in_queue", "expired"), LOST, 2),
    "not_found": ([], ("not_found",), LOST, 1),
    "done without an image": ([None, DONE_EMPTY], WALK, LOST, 1),
    "done with null": ([None, DONE_NULL], WALK, LOST, 1),
    "cut on submit": ([raw(b"")], WALK, LOST, 0),
    "no JSON on submit": ([WEB_PAGE], WALK, LOST, 0),
    "an array": ([typed(b"[]")], WALK, LOST, 0),
}  # fmt: skip
WRONG_KEYS = {"a wrong secret": "wrong", "a wrong access key": "stranger"}


def assert_image(stage: Stage, response: Any, outcome: tuple, images: int) -> None:
    """Assert status, code, the word on repeating, and that no more is charged."""
    code = response.json.get("error", {}).get("code")
    assert (response.status_code, code, retry_of(response)) == outcome
    row = stage.row(response)
    assert (row["cost"], row["images"]) == (40_000 * images, images)


ASKED_WAYS = [(CHATS, False), (IMAGES, False), (CHATS, True)]


@pytest.mark.parametrize(
    "name, path, stream",
    [
        (name, *way) for name, (*_, end, _) in VOLCENGINE.items() for way in ASKED_WAYS
        if (end, way[1]) != (GOOD, True)  # whose stream has a test of its own
    ],
)  # fmt: skip
def test_whatever_volcengine_answers(stage, name, path, stream):
    script, states, outcome, polls = VOLCENGINE[name]
    stage.volc.script, stage.volc.states = list(script), states
    model = WRONG_KEYS.get(name, "jimeng-image")
    ask = {"model": model, "messages": SAY_HELLO, "prompt": "A cat", "stream": stream}
    response = stage.post(path, ask)
    assert_image(stage, response, outcome, int(outcome is GOOD))
    assert (stage.volc.submits, stage.volc.polls) == (1, polls)
    assert ACCESS_KEY not in response.text and "Vendor" not in response.text


@pytest.mark.parametrize("fault", [raw(b""), WEB_PAGE, json_answer({}, 502)])
def test_a_poll_that_fails_on_its_way_is_made_again(stage, fault):
    stage.volc.script = [None, fault, fault]
    response = stage.chat("jimeng-image")
    assert response.status_code == 200 and stage.row(response)["cost"] == 40_000
    assert (stage.volc.submits, stage.volc.polls) == (1, 2 + len(stage.volc.states))


def test_a_submit_that_may_have_been_heard_is_not_made_elsewhere(stage):
    stage.volc.script = [WEB_PAGE]
    assert_unavailable(stage, stage.chat("two-images"), "no")
    assert not stage.ark.requests


def test_a_task_that_was_not_done_in_time_is_in_the_log(stage, monkeypatch, capfd):
    monkeypatch.setattr(proxy, "JIMENG_TIMEOUT", 0.1)
    stage.volc.states = NEVER
    response = stage.chat("jimeng-image")
    assert_image(stage, response, LOST, 0)
    stage.app.extensions["proxy"].log.flush()
    (task,) = stage.volc.tasks
    assert task in capfd.readouterr().err and task not in response.text


def only_link(stage: Stage) -> str:
    """Return the link of the one image that JiMeng has made."""
    (task,) = stage.volc.tasks
    return volc_image(task)


def test_jimeng_answers_the_url_and_nothing_else(stage):
    document = stage.chat("jimeng-image").json
    message = {"role": "assistant", "content": only_link(stage)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    assert document["object"] == "chat.completion"
    assert document["model"] == "jimeng-image"
    assert (document["choices"], document["usage"]) == ([choice], usage_of(0, 0))


def test_jimeng_answers_openais_image_shape(stage):
    ask = {"model": "jimeng-image", "prompt": "A"}
    document = stage.post("images/generations", ask).json
    assert document["data"] == [{"url": only_link(stage)}]
    assert abs(document["created"] - time.time()) < 5


CATS, LONG = "猫" * 800, "x" * 801
PARTS = [{"type": "text", "text": "A"}, {"text": "cat"}, {"type": "refusal"}]


@pytest.mark.parametrize(
    "body, task",
    [
        ({}, {"prompt": "Say hello"}),
        ({"messages": [*SAY_HELLO, {"role": "assistant", "content": "x"}]}, {}),
        ({"messages": [{"role": "user", "content": PARTS}]}, {"prompt": "A\ncat"}),
        ({"n": 1, "temperature": 1, "max_tokens": 5, "user": "x"}, {}),
        ({"size": "1024x2048"}, {"width": 1024, "height": 2048}),
        ({"size": "auto"}, {}),
        ({"seed": 7, "scale": 0.5}, {"seed": 7, "scale": 0.5}),
        ({"messages": [{"role": "user", "content": CATS}]}, {"prompt": CATS}),
        ({"force_single": False}, {}),
        ({"prompt": "What chat completions do not know"}, {}),
    ],
)
def test_a_task_asks_for_one_image_of_the_last_user_message(stage, body, task):
    assert stage.chat("jimeng-image", **body).status_code == 200
    sent = stage.volc.requests[0].json
    always = {"req_key": "jimeng_t2i_v40", "prompt": "Say hello", "force_single": True}
    assert sent == {**always, **task}


CAT, INLINE_CAT = "https://x.example/cat.png", "data:image/png;base64,iVBO"


def linked(url: str) -> dict:
    """Return the part of a message that attaches a picture."""
    return {"type": "image_url", "image_url": {"url": url}}


def audio_part() -> dict:
    return {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}


def said_with(*parts: dict) -> dict:
    """Return a chat whose last user message is a text and these parts."""
    content = [{"type": "text", "text": "As a dog"}, *parts]
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    "model, path, body, sent",
    [
        ("jimeng-image", "chat", said_with(linked(CAT)), {"image_urls": [CAT]}),
        ("jimeng-image", "chat", said_with(linked(INLINE_CAT), linked(INLINE_CAT)),
         {"binary_data_base64": ["iVBO", "iVBO"]}),
        ("jimeng-image", "images", {"image": CAT}, {"image_urls": [CAT]}),
        ("jimeng-image", "images", {"image_urls": [CAT]}, {"image_urls": [CAT]}),
        ("seedream", "chat", said_with(linked(INLINE_CAT)), {"image": INLINE_CAT}),
        ("draw", "chat", said_with(linked(CAT), linked(INLINE_CAT)),
         {"image": [CAT, INLINE_CAT]}),
        ("draw", "images", {"image_urls": [CAT]}, {"image": CAT}),
        ("any-image", "chat", said_with({"image_url": CAT}), {"image": CAT}),
    ],
)  # fmt: skip
def test_an_attached_picture_goes_to_the_image_model(stage, model, path, body, sent):
    path = {"chat": "chat/completions", "images": "images/generations"}[path]
    response = stage.post(path, {"model": model, "prompt": "As a dog", **body})
    assert_image(stage, response, GOOD, 1)
    got = (stage.volc.requests + stage.ark.requests)[0].json
    names = {"image", "image_urls", "binary_data_base64"}
    assert {name: got[name] for name in names & got.keys()} == sent
    assert got["prompt"] == "As a dog"


def test_jimeng_answers_base64_where_it_is_asked_for(stage):
    data = {"status": "done", "image_urls": None, "binary_data_base64": ["iVBO"]}
    stage.volc.script = [None, json_answer(volc_body(10000, data, "ok"))]
    ask = {"model": "jimeng-image", "prompt": "A", "response_format": "b64_json"}
    response = stage.post("images/generations", ask)
    assert_image(stage, response, GOOD, 1)
    assert response.json["data"] == [{"b64_json": "iVBO"}]
    query = stage.volc.requests[1].json
    assert json.loads(query["req_json"]) == {"return_url": False}


JIMENG, ARK, ANY = "jimeng-image", "seedream", "any-image"


@pytest.mark.parametrize(
    "model, path, body, param",
    [
        (JIMENG, CHATS, {"n": 2}, "n"),
        (JIMENG, IMAGES, {"n": 2}, "n"),
        (ARK, CHATS, {"n": 2}, "n"),
        (ARK, IMAGES, {"n": 2}, "n"),
        (ANY, CHATS, {"n": 2}, "n"),
        (JIMENG, CHATS, {"messages": [{"role": "user", "content": " "}]}, "messages"),
        (JIMENG, CHATS, {"messages": [{"role": "user", "content": LONG}]}, None),
        (JIMENG, CHATS, {"messages": [{"role": "system", "content": "x"}]}, "messages"),
        (JIMENG, CHATS, {"size": "huge"}, "size"),
        (JIMENG, IMAGES, {"prompt": ""}, "messages"),
        (JIMENG, CHATS, said_with(audio_part()), "messages"),
        (ARK, CHATS, said_with({"type": "file", "file": {"file_id": "x"}}), "messages"),
        (ARK, CHATS, said_with({"type": "image_url"}), "image"),
        (ARK, CHATS, said_with(linked("file:///etc/passwd")), "image"),
        (ARK, IMAGES, {"image": ["ftp://a/b"]}, "image"),
        (JIMENG, IMAGES, {"image": 5}, "image"),
        (JIMENG, CHATS, said_with(linked(CAT), linked(INLINE_CAT)), "image"),
        ("old-jimeng", CHATS, said_with(linked(CAT)), "image"),
    ],
)
def test_what_an_image_model_cannot_do_is_refused_before_it_is_asked(
    stage, model, path, body, param
):
    ask = {CHATS: {"messages": SAY_HELLO}, IMAGES: {"prompt": "x"}}[path]
    response = stage.post(path, {"model": model, **ask, **body})
    assert_image(stage, response, (400, "invalid_request", None), 0)
    assert error_of(response)["param"] == param
    assert not stage.volc.requests + stage.ark.requests


@pytest.mark.parametrize("options, extra", [(None, 0), ({"include_usage": True}, 1)])
def test_an_image_streams_comments_then_its_url(stage, monkeypatch, options, extra):
    monkeypatch.setattr(proxy, "COMMENT_INTERVAL", 0.02)
    stage.volc.states = ("in_queue",) * 9 + ("done",)
    response = stage.chat("jimeng-image", stream=True, stream_options=options)
    comments, _, rest = response.data.partition(b"data:")
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert 2 <= comments.count(b"\n") <= len(stage.volc.states)
    assert b"\n\n" not in comments
    assert all(line.startswith(b":") for line in comments.splitlines())
    first, finish, *usage, last = documents(b"data:" + rest)
    url = {"role": "assistant", "content": only_link(stage)}
    assert first["choices"] == [{"index": 0, "delta": url, "finish_reason": None}]
    assert finish["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert [one["usage"] for one in usage] == [usage_of(0, 0)] * extra
    assert {first["object"], finish["object"]} == {"chat.completion.chunk"}
    assert last == "DONE" and stage.row(response)["cost"] == 40_000


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "script, asked",
    [
        ([volc_error(50429)], 1),
        ([volc_error(50400)], 1),
        ([volc_denied()], 1),
        ([volc_error(50412)], 0),
        ([raw(b"")], 0),
        ([None, volc_error(50500)], 0),
        ([None, volc_denied()], 0),
        ([None, None, volc_error(50511)], 0),
    ],
)
def test_another_is_asked_for_an_image_only_if_none_is_being_made(
    stage, script, asked, stream
):
    stage.volc.script = list(script)
    response = stage.chat("two-images", stream=stream)
    assert (stage.volc.submits, len(stage.ark.requests)) == (1, asked)
    assert (image_url() in response.text) == bool(asked)
    assert stage.row(response)["cost"] == 40_000 * asked


def test_an_image_is_held_for_and_refused_to_the_poor(stage):
    response = stage.chat("jimeng-image", key="sk-thin")
    assert (response.status_code, stage.volc.submits) == (402, 0)
    assert stage.row(stage.chat("jimeng-image"))["hold"] == 40_000


# -- Images --------------------------------------------------------------------------


def test_images_answer_the_url_through_chat(stage):
    response = stage.chat("seedream")
    sent = stage.ark.requests[0]
    assert sent.path == "/api/v3/images/generations" and said(response) == image_url()
    assert sent.json == {
        "model": "doubao-seedream-4-5-251128", "prompt": "Say hello", "watermark": False
    }  # fmt: skip
    assert response.json["usage"] == usage_of(0, 0)
    assert stage.row(response)["cost"] == 40_000


@pytest.mark.parametrize(
    "model, asked, size, watermark",
    [
        ("seedream", {}, None, False),
        ("seedream", {"size": "1024x1024"}, None, False),
        ("seedream", {"size": "1920x1919"}, None, False),
        ("seedream", {"size": "1920x1920"}, "1920x1920", False),
        ("seedream", {"size": "2K", "watermark": True}, "2K", True),
        ("seedream-4", {"size": "1024x1024"}, "1024x1024", False),
        ("any-image", {"size": "1024x1024"}, "1024x1024", None),
        ("any-image", {}, None, None),
    ],
)
def test_only_seedream_is_told_of_watermarks_and_spared_sizes_it_refuses(
    stage, model, asked, size, watermark
):
    ask = {"model": model, "prompt": "x", **asked}
    response = stage.post("images/generations", ask)
    assert response.json["data"] == [{"url": image_url()}]
    sent = stage.ark.requests[0].json
    assert (sent.get("size"), sent.get("watermark")) == (size, watermark)


@pytest.mark.parametrize(
    "answer, urls",
    [
        (None, [0, 1, 2]),
        (image_answer(image_url(0), None, image_url(2)), [0, 2]),
        (image_answer(image_url(1)), [1]),
    ],
)
def test_each_delivered_image_is_charged(stage, answer, urls):
    stage.ark.script = [answer]
    body = {"model": "any-image", "prompt": "x", "n": 3}
    response = stage.post("images/generations", body)
    links = [one.get("url") for one in response.json["data"]]
    assert [link for link in links if link] == [*map(image_url, urls)]
    assert_image(stage, response, GOOD, len(urls))
    assert stage.row(response)["hold"] == 120_000
    assert stage.ark.requests[0].json["n"] == 3


SENSITIVE = "OutputImageSensitiveContentDetected"
IMAGE_FAULTS = {
    "refused input": (image_error("InputTextSensitiveContentDetected"), UNFIT),
    "refused output": (image_error(SENSITIVE), UNFIT),
    "refused in a 200": (image_error(SENSITIVE, 200), UNFIT),
    "all entries refused": (image_answer(None, None), UNFIT),
    "an error in a 200": (image_error("InternalServiceError", 200), LOST),
    "no images": (image_answer(), LOST),
    "text": (json_answer(chat_json("sorry")), LOST),
    "no JSON": (WEB_PAGE, LOST),
    "401": (image_error("AuthenticationError", 401), LOST),
    "429": (image_error("RateLimitExceeded", 429), LATER),
    "400": (image_error("InvalidParameter"), (400, "InvalidParameter", None)),
    "cut": (raw(b""), LOST),
}


@pytest.mark.parametrize("path", ["chat/completions", "images/generations"])
@pytest.mark.parametrize("name", IMAGE_FAULTS)
def test_an_image_that_was_not_delivered_is_free(stage, name, path):
    answer, outcome = IMAGE_FAULTS[name]
    stage.ark.script = [answer]
    body = {"model": "seedream", "messages": SAY_HELLO, "prompt": "x"}
    assert_image(stage, stage.post(path, body), outcome, 0)
    assert len(stage.ark.requests) == 1


B64 = {"created": 1, "data": [{"b64_json": "eA==", "revised_prompt": "A grey cat"}]}


def test_an_image_as_base64_keeps_openais_shape(stage):
    stage.ark.script = [json_answer(B64)]
    body = {"model": "any-image", "prompt": "x", "response_format": "b64_json"}
    response = stage.post("images/generations", body)
    assert response.json["data"] == B64["data"]
    assert_image(stage, response, GOOD, 1)


FOUR = {"created": 1, "data": [{"url": image_url(number)} for number in range(4)]}


EMPTY_URL = {"data": [{"url": "", "b64_json": "eA=="}]}  # as Go's servers write it


@pytest.mark.parametrize("answer, link", [
    (B64, "data:image/png;base64,eA=="), (EMPTY_URL, "data:image/png;base64,eA=="),
    (FOUR, image_url(0)),
])  # fmt: skip
def test_images_through_chat_are_one_url_and_charged_as_one(stage, answer, link):
    stage.ark.script = [json_answer(answer)]
    response = stage.chat("any-image")
    assert said(response) == link
    assert_image(stage, response, GOOD, 1)


def test_a_slow_image_streams_comments(stage, monkeypatch):
    monkeypatch.setattr(proxy, "COMMENT_INTERVAL", 0.02)
    monkeypatch.setattr(proxy, "COMMENTS_WAIT", 0.02)
    stage.ark.script = [lambda it: it.wait(None, 0.3) or json_answer(B64)(it)]
    data = stage.chat("any-image", stream=True).data
    assert data.startswith(b": ") and data.partition(b"data:")[0].count(b"\n") >= 2
    assert stream_text(data) == "data:image/png;base64,eA=="


def test_an_image_that_never_comes_is_not_waited_for_for_ever(stage, gate, monkeypatch):
    monkeypatch.setattr(proxy, "COMMENT_INTERVAL", 0.02)
    monkeypatch.setattr(proxy, "ANSWER_TIMEOUT", 0.05)
    stage.ark.script = [lambda it: it.wait(gate)]
    response = stage.chat("any-image", stream=True)
    assert (response.status_code, stage.row(response)["cost"]) == (503, 0)


def test_a_stream_of_an_image_leaves_nothing_behind(stage):
    def answers() -> int:
        return sum(type(each) is proxy.Answer for each in gc.get_objects())

    gc.disable()
    try:
        before = answers()
        assert stage.chat("any-image", stream=True).status_code == 200
        assert answers() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["jimeng-image", "seedream"])
def test_a_client_that_leaves_while_an_image_is_made_pays_for_it(real, model, stream):
    real.volc.states = NEVER
    real.ark.script = [stall()]
    body = {"model": model, "messages": SAY_HELLO, "stream": stream}
    maker = {"jimeng-image": real.volc, "seedream": real.ark}[model]
    with socket.create_connection(("127.0.0.1", real.port), 5) as sock:
        sock.sendall(request_bytes("/v1/chat/completions", json.dumps(body).encode()))
        maker.wait_requests({"jimeng-image": 3, "seedream": 1}[model])
        read_until(sock, b"\n: " if stream else b"")
    left = time.monotonic()
    real.wait_idle(2)
    asked = len(maker.requests)
    row = real.rows()[-1]
    assert time.monotonic() - left < 2 and real.volc.submits <= 1
    assert (row["status"], row["cost"], row["images"]) == (499, 40_000, 1)
    time.sleep(0.1)  # in which nobody may ask
    assert len(maker.requests) == asked, "nobody waits for the image any more"


# -- Echo ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cap, text, end", [(2, "Hello out", "length"), (3, "Hello out there", "stop")]
)
def test_echo_answers_as_often_and_as_much_as_it_is_asked(ask, cap, text, end):
    answer = ask("POST", CHAT, json={**HELLO, "max_tokens": cap, "n": 2})
    told = [(one["message"], one["finish_reason"]) for one in answer.json["choices"]]
    assert told == [({"role": "assistant", "content": text}, end)] * 2
    assert answer.json["usage"] == usage_of(3, 2 * cap)


def test_echo_streams_word_by_word(ask):
    asked = {**HELLO, "stream": True, "max_tokens": 2, "n": 2}
    *chunks, end = documents(ask("POST", CHAT, json=asked).data)
    choices = [choice for one in chunks for choice in one["choices"]]
    told = [(it["index"], it["delta"].get("content")) for it in choices]
    words = [(n, word) for n in (0, 1) for word in ("", "Hello", " out", None)]
    assert (told, end) == (words, "DONE")
    ends = [it["finish_reason"] for it in choices]
    assert ends == [None, None, None, "length"] * 2


def test_blanks_are_no_work(stage):
    started = time.monotonic()
    words = [{"role": "user", "content": "a" + " " * 100_000}]
    assert said(stage.chat("echo", messages=words)) == "a"
    assert time.monotonic() - started < 2


def test_echoes_above_what_an_answer_may_have_are_refused(stage):
    words = [{"role": "user", "content": "x" * (1 << 20)}]
    response = stage.chat("echo", messages=words, n=20)
    assert (response.status_code, error_of(response)["param"]) == (400, "n")


# Meter -------------------------------------------------------------------------------


def test_a_long_name_is_searched_in_little_memory():
    data = b'{"model": "%b"}' % (b"x" * (1 << 20))
    tracemalloc.start()
    assert proxy.MODEL_NAME.search(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("kind", ["audio/mpeg", "application/json"])
@pytest.mark.parametrize("size", [1, 7, 1000, 10**6])
def test_an_answer_in_pieces_of_any_size_is_the_same_and_keeps_its_end(kind, size):
    call, price = make_call("embeddings", input="x"), proxy.Price(input=1)
    data = json.dumps({"data": ["x" * 5_000], "model": "theirs", "usage": {
        "prompt_tokens": 7}}).encode()  # fmt: skip
    meter = proxy.Passage(call, price, kind)
    out = [meter.feed(piece) for piece in split(data, size)]
    assert meter.ending is None and not meter.finished
    assert meter.end() == b"" and meter.last and meter.finished
    whole = b"".join(out) + meter.last
    if kind == "application/json":
        data = data.replace(b'"model": "theirs"', b'"model":"chat"')
        assert meter.usage == proxy.Usage(7)
    assert whole == data


# Relay -------------------------------------------------------------------------------


# -- JSON ----------------------------------------------------------------------------

UNKNOWN = {"x_list": [1, 2.50, None], "x_é": {"model": "\U0001f600"}, "big": 2**60}


def test_an_answer_keeps_all_but_the_models_name(stage):
    answer = {**UNKNOWN, **chat_json("hi", id="x", tool_calls=[{"function": {}}])}
    stage.main.script = [json_answer(answer)]
    response = stage.chat()
    assert response.status_code == 200 and response.mimetype == "application/json"
    assert response.json == {**answer, "model": "chat"}


def test_a_request_keeps_all_but_the_models_name_and_the_cap(stage):
    stage.main.script = [json_answer(chat_json("hi"))]
    body = {**UNKNOWN, "tools": [{"type": "function"}], "user": None, "n": 1}
    stage.chat(**body)
    sent = stage.main.requests[0]
    more = {"model": "gpt-test", "messages": SAY_HELLO, "max_tokens": 1000}
    assert (sent.method, sent.path) == ("POST", "/v1/chat/completions")
    assert sent.json == {**body, **more}


@pytest.mark.parametrize(
    "own", [{}, {"temperature": 0.9}, {"thinking": {"type": "enabled"}}, {"stop": []}]
)
def test_defaults_stand_where_the_client_sent_none(stage, own):
    stage.main.script = [json_answer(chat_json("hi", "m"))]
    assert stage.chat("mild", **own).json["model"] == "mild"
    sent = stage.main.requests[0].json
    assert {name: sent[name] for name in MILD} == {**MILD, **own}


NEW_CAP = {"max_completion_tokens": 7}


@pytest.mark.parametrize(
    "path, asked, cap",
    [
        (CHATS, {}, {"max_tokens": 1000}),
        (CHATS, {"max_tokens": None}, {"max_tokens": 1000}),
        (CHATS, {"max_tokens": -1, "n_predict": -1}, {"max_tokens": 1000}),
        (CHATS, {"max_tokens": 7}, {"max_tokens": 7}),
        (CHATS, NEW_CAP, {**NEW_CAP, "max_tokens": 7}),
        (CHATS, {"max_tokens": 5000}, {"max_tokens": 5000}),
        # Under another name it would bound nothing, or more than was priced.
        (CHATS, {"max_output_tokens": 7}, {"max_output_tokens": 7, "max_tokens": 7}),
        (CHATS, {"n_predict": 7}, {"n_predict": 7, "max_tokens": 7}),
        # The name that its defaults have is the one that its upstream knows.
        (CHATS, {"model": "thinker", **NEW_CAP}, NEW_CAP),
        ("responses", {"max_tokens": 9}, {"max_tokens": 9, "max_output_tokens": 9}),
        ("fim/completions", {}, {"max_tokens": 1000}),
        ("completions", {}, {"max_tokens": 1000}),
        ("responses", {}, {"max_output_tokens": 1000}),
        ("responses", {"max_output_tokens": 9}, {"max_output_tokens": 9}),
        ("embeddings", {}, {}),
    ],
)
def test_the_cap_is_written_under_the_name_of_the_path(stage, path, asked, cap):
    stage.main.script = [json_answer(chat_json("hi"))]
    stage.post(path, {"model": "chat", "messages": SAY_HELLO, "prompt": "x", **asked})
    sent = stage.main.requests[0]
    found = {name: sent.json[name] for name in proxy.CAPS if sent.json.get(name)}
    assert sent.path == f"/v1/{path}" and found == cap


@pytest.mark.parametrize("name", [None, "max_tokens", "max_completion_tokens"])
def test_the_cap_falls_to_what_the_account_can_pay(stage, name):
    stage.main.script = [json_answer(chat_json("", usage=usage_of(0, 0)))]
    asked = {name: 900} if name else {}
    response = stage.chat(key="sk-thin", **asked)
    cap = stage.main.requests[0].json[name or "max_tokens"]
    assert response.status_code == 200 and 350 < cap < 500
    assert 1000 - 2 <= stage.row(response)["hold"] <= 1000


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("more", [{}, {"previous_response_id": "resp_1"}])
def test_an_implausible_report_is_the_operators_loss(stage, stream, more):
    report = usage_of(10**6, 10**6)
    stage.main.script = [reported(report)]
    response = stage.chat(max_tokens=50, stream=stream, **more)
    row = stage.row(response)
    charged = {True: 3 * 10**6, False: 4 * row["hold"]}[bool(more)]
    assert (row["cost"], row["cost"] + row["lost"]) == (charged, 3 * 10**6)
    lines = stage.app.extensions["proxy"].log._lines
    losses = [fields for _, event, fields in lines if event == "loss"]
    told = [one["credits"] for one in losses if one["request"] == row["id"]]
    assert told == [f"{row['lost'] / 10**6:.6f}"] * bool(row["lost"])


CACHED = {"prompt_tokens_details": {"cached_tokens": 400}}


@pytest.mark.parametrize(
    "usage, cost, counts",
    [
        (usage_of(1000, 10, **CACHED), 660, (1000, 400, 10)),
        (usage_of(1000, 10, prompt_cache_hit_tokens=0, **CACHED), 1020, (1000, 0, 10)),
        (usage_of(1, 0, prompt_cache_hit_tokens=1), 1, (1, 1, 0)),  # 0.1, rounded up
        ({"prompt_tokens": 1000}, 1000, (1000, 0, 0)),
    ],
)
def test_reported_usage_is_charged_to_the_micro_credit(stage, usage, cost, counts):
    stage.main.script = [json_answer(chat_json("hi", usage=usage))]
    row = stage.row(stage.chat())
    assert (row["cost"], row["status"], row["estimated"]) == (cost, 200, 0)
    assert (row["input"], row["cached"], row["output"]) == counts


def test_the_price_of_the_admission_is_held_and_charged(stage, monkeypatch):
    clock = [MONDAY + 3600 - 1]
    monkeypatch.setattr(proxy.time, "time", lambda: clock[0])
    holds, costs = [], []

    def answer(request):
        holds.append(stage.rows("state = 0")[-1]["hold"])
        clock[0] += 1
        json_answer(chat_json("hi", usage=usage_of(100, 10)))(request)

    stage.main.script = [answer] * 2
    for _ in range(2):
        costs.append(stage.row(stage.chat("peak", max_tokens=10))["cost"])
    assert costs == [120, 540] and holds[1] > 4 * holds[0]


def test_cache_writes_are_charged_at_their_price_and_told(stage):
    usage = {"prompt_tokens_details": {"cached_tokens": 400, "cache_write_tokens": 500}}
    stage.main.script = [reported(usage_of(1000, 10, **usage))]
    row = stage.row(stage.chat("written"))
    assert (row["cost"], row["written"]) == (100 + 40 + 1000 + 20, 500)


def test_a_stream_of_messages_pays_for_its_cache(stage):
    caches = {READ: 400, WROTE: 500}
    told = {"message": {"usage": {"input_tokens": 100, "output_tokens": 1, **caches}}}
    events = [
        {"type": "message_start", **told},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "Hi"}},
        {"type": "message_delta", "usage": {"output_tokens": 10}},
        {"type": "message_stop"},
    ]
    stage.main.script = [sse(events, done=False)]
    ask = {"model": "written", "messages": SAY_HELLO, "max_tokens": 99, "stream": True}
    row = stage.row(stage.post("messages", ask))
    assert (row["input"], row["cached"], row["written"]) == (1000, 400, 500)
    assert row["cost"] == 100 + 40 + 1000 + 20


@pytest.mark.parametrize("usage", [None, "free", usage_of(5, True)])
def test_usage_that_cannot_be_believed_is_estimated(stage, usage):
    stage.main.script = [json_answer({**chat_json("word " * 10), "usage": usage})]
    response = stage.chat()
    row = stage.row(response)
    assert row["estimated"] == 1 and response.json["usage"] == usage
    assert (row["input"], row["output"], row["cost"]) == (3, 13, 3 + 2 * 13)


CACHED_INPUT = {"input_tokens": 1000, "input_tokens_details": {"cached_tokens": 400}}
RESPONSES_USAGE = {**CACHED_INPUT, "output_tokens": 10}
VECTOR = {"model": "embed-test", "data": [{"embedding": [0.1, -2e-05]}]}
PICTURES = {"created": 1, "data": [{"url": "https://a"}, {"b64_json": "eA=="}, {}]}
TEXT = completion("gpt-test", "text_completion", [{"text": "hi", "index": 0}])
RESPONSE = {"object": "response", "model": "gpt-test", "usage": RESPONSES_USAGE}


@pytest.mark.parametrize(
    "path, model, answer, cost",
    [
        ("embeddings", "embed", {**VECTOR, "usage": {"prompt_tokens": 500}}, 10),
        ("completions", "chat", {**TEXT, "usage": usage_of(4, 3)}, 10),
        ("responses", "chat", RESPONSE, 660),
        ("rerank", "embed", {"results": [], "usage": {"prompt_tokens": 50}}, 1),
        (CHATS, "flat", chat_json("hi", "flat-test"), 10_000),
        (IMAGES, "picture", PICTURES, 80_000),
        (IMAGES, "picture", {"created": 1, "data": []}, 0),
    ],
)
def test_other_paths_are_relayed_and_charged(stage, path, model, answer, cost):
    stage.main.script = [json_answer(answer)]
    body = {"model": model, "input": "x", "prompt": "x", "messages": SAY_HELLO, "n": 3}
    response = stage.post(path, body)
    renamed = {**answer, **({"model": model} if "model" in answer else {})}
    assert (response.status_code, response.json) == (200, renamed)
    assert stage.main.requests[0].path == f"/v1/{path}"
    assert stage.row(response)["cost"] == cost


@pytest.mark.parametrize(
    "text",
    [
        '"model": "gpt-test"', '{"model": "x"}', '\\"model\\": "gpt-test"', "[DONE]",
        "data: [DONE]\n\n", '"error": {"message": 1}', '{"error": 1}',
    ],
)  # fmt: skip
def test_text_that_looks_like_a_name_an_end_or_an_error_is_text(stage, text):
    chunks = [chat_chunk("gpt-test", {"content": one}) for one in (text, "more")]
    chunks.append(chat_chunk("gpt-test", {}, "stop"))
    stage.main.script = [json_answer(chat_json(text)), sse(chunks)]
    assert said(stage.chat()) == text
    assert stream_text(stage.chat(stream=True).data) == f"{text}more"


@pytest.mark.parametrize("failures, status, repeat", [(1, 200, None), (99, 503, "no")])
def test_an_answer_waits_for_its_charge_and_is_not_to_be_made_again(
    stage, monkeypatch, failures, status, repeat
):
    ledger, left = stage.app.extensions["proxy"].ledger, iter(range(failures))
    settle = ledger.settle

    def fails_at_first(*args):
        if next(left, None) is not None:
            raise proxy.LedgerUnavailable("a disk in trouble")
        settle(*args)

    monkeypatch.setattr(ledger, "settle", fails_at_first)
    monkeypatch.setattr(proxy, "SETTLE_PATIENCE", 0.3)
    stage.main.script = [json_answer(chat_json("hi"))]
    response = stage.chat()
    assert (response.status_code, retry_of(response)) == (status, repeat)
    assert (stage.row(response)["cost"] > 0) == (status == 200)


# -- Audio and forms -----------------------------------------------------------------

MP3 = bytes(range(256)) * 300
SPEAK = {"model": "voice", "input": "Grüß Gott", "voice": "alloy"}  # nine characters
SPEAKING = [
    {"type": "speech.audio.delta", "audio": "AAAA"},
    {"type": "speech.audio.done", "usage": {"input_tokens": 14, "output_tokens": 101}},
]
HEARING = [
    {"type": "transcript.text.delta", "delta": "Hello"},
    {"type": "transcript.text.done", "text": "Hello", "usage": {
        "type": "tokens", "input_tokens": 14, "output_tokens": 45, "total_tokens": 59}},
]  # fmt: skip
SECONDS = {"text": "Hello", "usage": {"type": "duration", "seconds": 9}}


def post_form(stage: Stage, path: str, model: str, name: str = "file", **more: Any):
    """Post a form with a file of these bytes that are no text; `more` are fields."""
    files = [(BytesIO(MP3), "grüße.mp3", "audio/mpeg")]
    fields = {"model": model, **more, name: files}
    post = stage.app.test_client(use_cookies=False).post
    where = {"headers": bearer(TEAM_KEY), "content_type": "multipart/form-data"}
    return post(f"/v1/{path}", data=fields, buffered=True, **where)


def form_parts(request: Request) -> list[tuple[str, str | None, bytes]]:
    """Return (name, filename, data) of each part that an upstream got."""
    kind = f"Content-Type: {request.header('Content-Type')}\r\n\r\n".encode()
    parts = email.message_from_bytes(kind + request.body).get_payload()
    return [
        (part.get_param("name", header="content-disposition"), part.get_filename(),
         part.get_payload(decode=True))
        for part in parts
    ]  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["audio/mpeg", "audio/x-wav", "application/octet-stream"]
)
@pytest.mark.parametrize("length", [b"Content-Length: %d\r\n" % len(MP3), b""])
def test_speech_passes_as_it_comes_and_is_charged_by_the_character(stage, kind, length):
    start = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: " + kind.encode()
    stage.main.script = [raw(start + b"\r\n" + length + b"\r\n" + MP3)]
    response = stage.post("audio/speech", SPEAK)
    assert (response.data, response.mimetype) == (MP3, kind)
    assert stage.main.requests[0].json == SPEAK | {"model": "tts-1"}
    row = stage.row(response)
    assert (row["cost"], row["hold"], row["estimated"]) == (9 * 15, 9 * 15, 0)


@pytest.mark.parametrize(
    "model, cost", [("voice", 9 * 15), ("chat", 14 + 2 * 101), ("flat", 10_000)]
)
def test_speech_as_events_is_charged_by_the_character_or_its_report(stage, model, cost):
    stage.main.script = [sse(SPEAKING, done=False)]
    ask = SPEAK | {"model": model, "stream_format": "sse"}
    response = stage.post("audio/speech", ask)
    assert response.data == sse_bytes(SPEAKING, done=False)
    row = stage.row(response)
    assert (row["cost"], row["estimated"]) == (cost, 0)


def test_sound_that_passed_on_without_its_report_is_estimated() -> None:
    event = {"type": "speech.audio.delta", "audio": "A" * 1000}
    assert proxy.written(event) == 10 * proxy.BYTES_PER_TOKEN
    assert proxy.written({"audio": "A"}) and not proxy.written({"audio": None})


@pytest.mark.parametrize(
    "answer", [typed(b"<html>", "text/html"), typed(b"", "audio/mpeg"),
               typed(b'{"x": 1', "application/json"), typed(b"hi", "text/plain")],
)  # fmt: skip
def test_speech_that_is_none_is_a_free_503(stage, answer):
    stage.main.script = [answer]
    assert_unavailable(stage, stage.post("audio/speech", SPEAK), "no")


@pytest.mark.parametrize(
    "path, answer, data, kind, cost",
    [
        ("transcriptions", json_answer(SECONDS), SECONDS, "application/json", 6000),
        ("translations", typed(b"Hello", "text/plain"), b"Hello", "text/plain", 6000),
        ("transcriptions", typed(b"WEBVTT", "text/vtt"), b"WEBVTT", "text/vtt", 6000),
        ("transcriptions", typed(b"1\n", "application/x-subrip"), b"1\n",
         "application/x-subrip", 6000),
    ],
)  # fmt: skip
def test_a_transcription_in_any_form_is_charged_by_the_request(
    stage, path, answer, data, kind, cost
):
    stage.main.script = [answer]
    response = post_form(stage, f"audio/{path}", "whisper", response_format="vtt")
    got = response.json if kind == "application/json" else response.data
    assert (got, response.mimetype, stage.row(response)["cost"]) == (data, kind, cost)


@pytest.mark.parametrize("stream", [False, True])
def test_a_transcription_is_charged_by_its_report(stage, stream):
    whole = {"text": "Hello", "usage": HEARING[1]["usage"]}
    stage.main.script = [sse(HEARING, done=False) if stream else json_answer(whole)]
    more = {"stream": "true"} if stream else {}
    response = post_form(stage, "audio/transcriptions", "chat", **more)
    assert response.mimetype == ("text/event-stream" if stream else "application/json")
    row = stage.row(response)
    assert (row["cost"], row["estimated"], row["stream"]) == (14 + 2 * 45, 0, stream)


def test_a_form_passes_with_the_upstreams_model_and_else_as_it_came(stage):
    stage.main.script = [json_answer(SECONDS)]
    field = "timestamp_granularities[]"
    more = {"language": "de", field: ["word", "segment"], "prompt": "Grüße\r\n--x"}
    post_form(stage, "audio/transcriptions", "whisper", **more)
    (request,) = stage.main.requests
    fields = {"model": "whisper-1", "language": "de", "prompt": more["prompt"]}
    expected = {(name, None, text.encode()) for name, text in fields.items()}
    expected |= {(field, None, b"word"), (field, None, b"segment")}
    parts = form_parts(request)
    assert {part for part in parts if part[0] != "file"} == expected
    assert [data for name, _, data in parts if name == "file"] == [MP3]
    assert 'filename="grüße.mp3"'.encode() in request.body and len(parts) == 6
    assert TEAM_KEY.encode() not in request.body


def test_an_edit_of_pictures_is_charged_by_the_image(stage):
    stage.main.script = [json_answer(PICTURES)]
    more = {"n": "2", "prompt": "x", "background": "transparent", "quality": "low"}
    response = post_form(stage, "images/edits", "picture", "image[]", **more)
    row = stage.row(response)
    assert (row["cost"], row["hold"], row["images"]) == (80_000, 80_000, 2)


@pytest.mark.parametrize("name", ["a", "ü b", "a;b=c", "a'b"])
def test_a_form_that_is_sent_says_what_was_read(name):
    body = {"field[]": "x\r\n--y", "more": ["1", "2"]}
    files = (proxy.FilePart("file", f"{name}.wav", "audio/wav", MP3),)
    kind, data = proxy.to_form(body, files)
    assert proxy.parse_form(data, kind) == (body, files)


@pytest.mark.parametrize("name", ['a"; x="y', "a\\", "a\r\nX-Evil: 1", "a\x00"])
def test_no_name_of_a_form_writes_a_header(name):
    files = (proxy.FilePart(name, name, f"text/plain\r\n{name}", b""),)
    kind, data = proxy.to_form({name: "x"}, files)
    parts = data.split(b"--" + kind.partition("=")[2].encode())
    heads = [part.partition(b"\r\n\r\n")[0] for part in parts]
    lines = [line for head in heads for line in head.split(b"\r\n")]
    assert {line.partition(b":")[0] for line in lines} <= {
        b"", b"--", b"Content-Disposition", b"Content-Type"}  # fmt: skip
    assert data.count(b'"') == 6 and b"\\" not in data


BOUND = "multipart/form-data; boundary=b"


def form_of(*parts: tuple[str, bytes], end: bytes = b"--b--\r\n") -> bytes:
    """Return a form of the boundary `b`."""
    head = '--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n'
    pieces = [(head % name).encode() + data + b"\r\n" for name, data in parts]
    return b"".join(pieces) + end


MODEL = ("model", b"whisper")


@pytest.mark.parametrize(
    "data, kind",
    [
        (b"", BOUND), (b"{}", BOUND), (form_of(MODEL, end=b""), BOUND),
        (form_of(MODEL), "multipart/form-data"), (form_of(MODEL), f"{BOUND}x"),
        (form_of(MODEL, MODEL), BOUND), (form_of(("prompt", b"x")), BOUND),
        (form_of(MODEL, ("n[]", b"9")), BOUND), (form_of(MODEL, ("N", b"9")), BOUND),
        (form_of(MODEL, ("n", b"0")), BOUND), (form_of(MODEL, ("n", b"x")), BOUND),
        (form_of(MODEL, ("stream", b"yes")), BOUND), (form_of(*[MODEL] * 101), BOUND),
        (form_of(MODEL, ("prompt", b"x" * (1 << 20) + b"x")), BOUND),
        (form_of(MODEL)[:-20], BOUND), (b"--b\r\n\r\nx\r\n--b--\r\n", BOUND),
        (form_of(MODEL, ("n ", b"9")), BOUND), (form_of(MODEL, ("ｎ", b"9")), BOUND),
        (form_of(MODEL, ('n"; filename="x', b"9")), BOUND),
        (form_of(MODEL, ('prompt[]"; filename="x', b"9")), BOUND),
    ],
)  # fmt: skip
def test_a_form_that_is_no_good_is_a_bad_request(data, kind):
    with pytest.raises(proxy.BadRequest):
        proxy.parse_call("audio/transcriptions", data, None, kind)


@pytest.mark.parametrize(
    "path, model, more",
    [
        ("responses", "chat", {"background": True}), ("messages", "chat", {"speed": "fast"}),
        (CHATS, "chat", {"service_tier": "priority"}), (IMAGES, "picture", {"stream": True}),
        (CHATS, "voice", {}), ("embeddings", "voice", {}),
        ("audio/speech", "whisper-tokens", {}), ("audio/speech", "picture", {}),
        ("audio/speech", "chat", {}), ("audio/speech", "voice", {"input": ""}),
        ("audio/speech", "voice", {"input": ["a"]}), ("audio/transcriptions", "voice", {}),
        ("audio/transcriptions", "chat", {"response_format": "srt"}),
        ("audio/translations", "picture", {}),
    ],
)  # fmt: skip
def test_what_cannot_be_priced_is_refused_before_the_provider_is_asked(
    stage, path, model, more
):
    ask = SPEAK | {"model": model, "messages": SAY_HELLO, "prompt": "x"} | more
    response = stage.post(path, ask)
    assert response.status_code in (400, 404) and response.json["error"]["message"]
    id = response.headers["x-request-id"]
    assert not stage.main.requests and not stage.rows("id = ?", id)


@pytest.mark.parametrize(
    "price, passes", [({"input": 5}, 0), ({"image": 1}, 1), ({"input": 5, "reported": 1}, 1)]
)  # fmt: skip
def test_a_wildcard_makes_pictures_at_a_price_that_tells_of_them(price, passes):
    call = make_call("images/generations", prompt="x")
    with nullcontext() if passes else pytest.raises(proxy.BadRequest):
        proxy.refuse_priceless(call, replace(make_model(price), id="any/*"))


@pytest.mark.parametrize(
    "price, path, passes",
    [({"input": 5, "reported": 1}, "film/submit", 0), ({"request": 1}, "film/submit", 1),
     ({"input": 5}, "responses", 1)],
)  # fmt: skip
def test_a_wildcard_serves_unlisted_paths_at_a_price_by_the_request(price, path, passes):
    model = replace(make_model(price), id="any/*")
    with nullcontext() if passes else pytest.raises(proxy.BadRequest):
        proxy.refuse_priceless(make_call(path), model)
    proxy.refuse_priceless(make_call(path), make_model(price))


def test_other_paths_take_no_form(stage):
    response = post_form(stage, "chat/completions", "chat")
    assert response.status_code == 415 and not stage.main.requests


def test_a_form_leaves_nothing_on_the_disk_and_frees_its_room(stage, monkeypatch):
    def no_file(*_: Any, **__: Any) -> None:
        raise AssertionError("a temporary file")

    for name in ("TemporaryFile", "SpooledTemporaryFile", "NamedTemporaryFile"):
        monkeypatch.setattr(tempfile, name, no_file)
    monkeypatch.setattr(sys.modules[__name__], "MP3", b"x" * (2 << 20))
    room = stage.app.extensions["proxy"].room
    before, seen = room.free, []

    def answer(request: Request) -> None:
        seen.append(room.free)
        json_answer(SECONDS)(request)

    stage.main.script = [answer]
    assert post_form(stage, "audio/transcriptions", "whisper").status_code == 200
    assert before - seen[0] >= 3 * len(MP3) and room.free == before


CUT_LONG = head(200, JSON, ("Content-Length", "999999"))


@pytest.mark.parametrize(
    "answer, path, body",
    [
        (raw(head(200, ("Content-Type", "audio/mpeg"), CHUNKED) + chunk(MP3)),
         "audio/speech", SPEAK),
        (raw(CUT_LONG + b'{"data": [' + b"0," * 90_000), "embeddings",
         {"model": "embed", "input": "x"}),
    ],
)  # fmt: skip
def test_what_is_cut_in_pieces_ends_without_its_last_chunk(
    gateway, tmp_path, answer, path, body
):
    models = {"voice": {"upstream": "main/tts-1", "price": {"characters": 15}}}
    with Upstream([answer]) as upstream:
        made = gateway(upstream.url, constants={"MAX_ANSWER": 10_000}, models=models)
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            url, auth = f"{made.url}/v1/{path}", bearer(TEAM_KEY)
            requests.post(url, json=body, headers=auth, timeout=10)
        assert "Traceback" not in made.log()
        ((cost, state),) = query(tmp_path, "SELECT cost, state FROM requests")
        assert cost > 0 and state == proxy.SETTLED  # for what was relayed


@contextmanager
def speaking(real: Stage, gate: threading.Event) -> Iterator[requests.Response]:
    """A sound of two chunks, the second one after the gate."""

    def answer(request: Request) -> None:
        start = head(200, ("Content-Type", "audio/mpeg"), CHUNKED)
        request.send(start + chunk(MP3))
        request.wait(gate)
        request.send(chunk(MP3) + chunk(b""))

    real.main.script = [answer]
    url, more = f"{real.url}/v1/audio/speech", {"headers": bearer(TEAM_KEY), "timeout": 9}
    with requests.post(url, json=SPEAK, stream=True, **more) as response:
        yield response


def test_a_sound_waits_for_no_other(real, gate):
    with speaking(real, gate) as response:
        assert response.raw.read(len(MP3) - 1) == MP3[:-1]
        gate.set()
        assert response.raw.read() == MP3[-1:] + MP3


def test_speech_that_its_client_leaves_is_charged_by_the_character(real, gate):
    with speaking(real, gate) as response:
        assert next(response.iter_content(10))
    real.wait_idle(5)
    row = real.row(response)
    assert (row["cost"], row["estimated"], row["status"]) == (135, 0, 499)


LONG_DATA = [{"object": "embedding", "index": n, "embedding": [0.5] * 50}
             for n in range(900)]  # fmt: skip
LONG_VECTOR = {"object": "list", "data": LONG_DATA, "model": "theirs"}
LONG_VECTOR |= {"usage": {"prompt_tokens": 50_000, "total_tokens": 50_000}}


def test_a_long_answer_passes_in_pieces_for_its_report(stage, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_ANSWER", 20_000)
    monkeypatch.setattr(proxy, "KEPT_BODY", 10_000)
    stage.main.script = [json_answer(LONG_VECTOR)]
    ask = {"model": "embed", "input": "x" * 60_000}
    response = stage.post("embeddings", ask)
    assert response.json == LONG_VECTOR | {"model": "embed"}
    row = stage.row(response)
    assert (row["input"], row["cost"], row["estimated"]) == (50_000, 1_000, 0)
    assert "Content-Length" not in response.headers


def test_a_long_answer_of_images_is_charged_by_the_image(stage, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_ANSWER", 20_000)
    images = {"created": 1, "data": [{"b64_json": "eA" * 90_000}] * 2}
    stage.main.script = [json_answer(images)]
    ask = {"model": "picture", "prompt": "x", "n": 2}
    response = stage.post("images/generations", ask)
    assert response.json == images and stage.row(response)["cost"] == 80_000


def test_an_image_server_may_send_four_large_pictures(stage):
    stage.ark.script = [json_answer({"data": [{"b64_json": "x" * 4_300_000}] * 4})]
    response = stage.post("images/generations", {"model": "any-image", "prompt": "x"})
    assert len(response.data) > proxy.MAX_ANSWER and len(response.json["data"]) == 4
    assert stage.row(response)["cost"] == 160_000


def test_long_pictures_that_are_left_before_their_report_cost_their_hold(
    stage, gate, monkeypatch
):
    monkeypatch.setattr(proxy, "MAX_ANSWER", 20_000)
    images = json.dumps({"created": 1, "data": [{"b64_json": "eA" * 90_000}] * 2})
    half, length = images[:-9].encode(), b"Content-Length: %d\r\n" % len(images)

    def pauses(request: Request) -> None:
        request.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + length)
        request.send(b"\r\n" + half)
        request.wait(gate)

    stage.main.script = pauses
    ask = {"model": "chat", "prompt": "x", "n": 2}
    post = stage.app.test_client(use_cookies=False).post
    response = post("/v1/images/generations", json=ask, headers=bearer(TEAM_KEY))
    assert len(next(response.iter_encoded())) > 10_000
    response.close()
    row = stage.row(response)
    assert row["cost"] == row["hold"] > 2 * 2 * 1000


def test_a_long_answer_that_ends_too_early_is_no_answer(stage, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_ANSWER", 20_000)
    data = json.dumps(LONG_VECTOR).encode()[:-9]
    stage.main.script = [raw(head(200, JSON, CLOSE) + data)]
    with pytest.raises(ConnectionError):
        stage.post("embeddings", {"model": "embed", "input": "x"})


def test_what_of_an_answer_waits_counts_in_the_room(stage):
    room = stage.app.extensions["proxy"].room
    free, half = room.free, b'data: {"choices": [], "x": "' + b"x" * (2 << 20)

    def answer(request: Request) -> None:
        whole = request.path.endswith("embeddings")
        body = json.dumps({"x": "x" * (2 << 20), "usage": usage_of(1, 0)}).encode()
        body = body if whole else half + b'"}\n\n' + sse_bytes(chat_chunks("hi"))
        start = head(200, JSON if whole else EVENTS, ("Content-Length", str(len(body))))
        request.send(start + body[:-99] if whole else start + body[: len(half)])
        wait_for(lambda: free - room.free >= 1.5 * 2**20, what="its room")
        request.send(body[-99:] if whole else body[len(half) :])

    stage.main.script = [answer, answer]
    ask = {"model": "embed", "input": "x"}
    assert stage.post("embeddings", ask).status_code == 200
    assert stage.chat(stream=True).data.endswith(b"[DONE]\n\n")
    assert room.free == free


# -- Headers -------------------------------------------------------------------------

TO_UPSTREAM = {"host", "accept", "accept-encoding", "content-type", "content-length"}
TO_UPSTREAM |= {"user-agent", "authorization"}
TO_CLIENT = {"content-type", "content-length", "x-request-id", "x-accel-buffering"}
TO_CLIENT |= {f"x-ratelimit-{n}-requests" for n in ("limit", "remaining", "reset")}
TO_CLIENT |= {"cache-control"}
CLIENTS_OWN = "Cookie X-Api-Key X-Forwarded-For OpenAI-Organization User-Agent Referer"
FROM_CLIENT = dict.fromkeys([*CLIENTS_OWN.split(), "Connection"], "client-secret")
FROM_CLIENT |= {"Accept": "client-secret/json", "Accept-Encoding": "client-secret"}
UPSTREAMS_OWN = "Server x-request-id x-ratelimit-limit-requests openai-organization"
UPSTREAMS_OWN += " Set-Cookie Location Cache-Control X-Accel-Redirect"
UPSTREAMS_OWN += " Access-Control-Allow-Origin"
FROM_UPSTREAM = [(name, "of-upstream") for name in UPSTREAMS_OWN.split()]
TELLING_ANSWERS = {
    False: json_answer(chat_json("hi"), headers=FROM_UPSTREAM),
    True: sse(chat_chunks("hi"), headers=FROM_UPSTREAM),
}


@pytest.mark.parametrize("stream", [False, True])
def test_no_header_of_the_client_reaches_the_upstream(stage, stream):
    stage.main.script = [TELLING_ANSWERS[stream], TELLING_ANSWERS[stream]]
    body = {"model": "chat", "messages": SAY_HELLO, "stream": stream}
    for _ in range(2):  # a cookie of the first answer would come with the second
        assert stage.post(CHATS, body, **FROM_CLIENT).data
    for sent in stage.main.requests:
        assert {name.lower() for name, _ in sent.headers} <= TO_UPSTREAM
        assert "client-secret" not in str(sent.headers) + sent.body.decode()
        assert "of-upstream" not in str(sent.headers)
        assert TEAM_KEY not in str(sent.headers)
        assert sent.header("Authorization") == f"Bearer {SECRET}"
        assert sent.header("Accept-Encoding") == "identity"


@pytest.mark.parametrize("stream", [False, True])
def test_no_header_of_the_upstream_reaches_the_client(stage, stream):
    stage.main.script = [TELLING_ANSWERS[stream]]
    response = stage.chat(stream=stream)
    assert response.status_code == 200 and response.data
    assert {name.lower() for name, _ in response.headers} <= TO_CLIENT
    assert "of-upstream" not in str(response.headers)


def test_the_environments_proxies_and_netrc_are_ignored(stage, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login x password netrc-secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, stage.spare.url)
    stage.main.script = [json_answer(chat_json("hi"))]
    assert stage.chat().status_code == 200 and not stage.spare.requests
    assert stage.main.requests[0].header("Authorization") == f"Bearer {SECRET}"


# -- Upstreams as they are described -------------------------------------------------


class HttpProxy(Upstream):
    """A proxy: CONNECT is tunnelled, a whole URL is forwarded to where it says."""

    def answer(self, request: Request) -> None:
        request.keep = False
        place = request.path.removeprefix("http://").partition("/")[0]
        host, _, port = place.rpartition(":")
        with socket.create_connection((host, int(port)), 5) as onward:
            if request.method == "CONNECT":
                request.send(head(200))
                self._start(self._pump, request.connection.sock, onward)
            else:
                path = request.path.removeprefix(f"http://{place}")
                path += f"?{request.query}" if request.query else ""
                size = ("Content-Length", str(len(request.body)))
                lines = head(200, size, CLOSE).partition(b"\r\n")[2]
                onward.sendall(f"{request.method} {path} HTTP/1.1\r\n".encode() + lines + request.body)
            while data := onward.recv(65536):
                request.send(data)

    @staticmethod
    def _pump(sock: socket.socket, onward: socket.socket) -> None:
        with suppress(OSError):
            while data := sock.recv(65536):
                onward.sendall(data)
            onward.shutdown(socket.SHUT_WR)


class Described:
    """An app in this process with one upstream, `up`, described by `options`."""

    def __init__(self, folder: Path, up: Upstream, models: dict, more: dict, options: dict):
        self.up, self.keys = up, folder / "keys.json"
        upstreams = {"main": {"url": up.url, **options}, **more}
        keys_file(folder, up.url, upstreams=upstreams, models=models)
        self.app = proxy.create_app(self.keys, folder / "proxy.db")
        self.services = self.app.extensions["proxy"]
        self.services.watcher._upkeep = lambda: None

    def ask(self, method: str, path: str, body: dict | None = None, key=TEAM_KEY) -> Any:
        client = self.app.test_client(use_cookies=False)
        return client.open(
            f"/v1/{path}", method=method, json=body, headers=bearer(key), buffered=True
        )

    def chat(self, model: str = "chat", **body: Any) -> Any:
        whole = {"model": model, "messages": SAY_HELLO, **body}
        return self.ask("POST", "chat/completions", whole)

    @property
    def sent(self) -> Any:
        """The body of the last request."""
        return self.up.requests[-1].json


@pytest.fixture
def described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    monkeypatch.setattr(proxy, "WATCH_INTERVAL", 0.01)
    with ExitStack() as stack:

        def make(script=(), up=None, models=None, more=None, **options) -> Described:
            up = stack.enter_context(up or Upstream(script))
            it = Described(tmp_path, up, models or {}, more or {}, options)
            stack.callback(it.services.close)
            return it

        yield make
    assert proof(tmp_path) == []


HELLO_JSON, HELLO_SSE = json_answer(chat_json("hi")), sse(chat_chunks("hi"))


@pytest.mark.parametrize(
    "options, headers, query",
    [
        ({}, {"Authorization": f"Bearer {SECRET}", "api-key": ""}, ""),
        ({"auth": "api-key"}, {"api-key": SECRET, "Authorization": ""}, ""),
        ({"auth": "x-api-key"}, {"x-api-key": SECRET, "Authorization": ""}, ""),
        ({"headers": {"X-Org": "$PROXY_TEST_ORG!"}}, {"x-org": "acme!"}, ""),
        ({"headers": {"user-agent": "mine"}}, {"User-Agent": "mine"}, ""),
        ({"query": {"api-version": "2024-10-21"}}, {}, "api-version=2024-10-21"),
        ({"query": {"a b": "$PROXY_TEST_ORG&c"}}, {}, "a+b=acme%26c"),
    ],
    ids=short,
)
def test_an_upstream_gets_its_headers_its_query_and_its_key_as_described(
    described, monkeypatch, options, headers, query
):
    monkeypatch.setenv("PROXY_TEST_ORG", "acme")
    it = described(HELLO_JSON, **options)
    assert said(it.chat()) == "hi"
    asked = it.up.requests[0]
    assert {name: asked.header(name) for name in headers} == headers
    assert (asked.path, asked.query) == ("/v1/chat/completions", query)


@pytest.mark.parametrize(
    "url, path, query",
    [
        ("https://h/v1/", "/v1", ""),
        ("https://h//v1", "/v1", ""),
        ("https://h/v1/chat/completions", "/v1", ""),
        ("https://h/openai/deployments/x?api-version=1", "/openai/deployments/x",
         "api-version=1"),
    ],
)  # fmt: skip
def test_upstream_urls_are_read_as_people_write_them(url, path, query):
    upstream = proxy.parse_upstream("u", {"url": url}, "u")
    assert (upstream.path, upstream.query) == (path, query)


@pytest.mark.parametrize(
    "url, auth, developer, cap",
    [
        ("https://api.openai.com/v1", "bearer", "", "max_completion_tokens"),
        ("https://eu.api.openai.com/v1", "bearer", "", "max_completion_tokens"),
        ("https://notopenai.com/v1", "bearer", "", ""),
        ("https://x.openai.azure.com/openai/v1", "api-key", "", "max_completion_tokens"),
        ("https://x.services.ai.azure.com/v1", "api-key", "", "max_completion_tokens"),
        ("https://api.mistral.ai/v1", "bearer", "system", "max_tokens"),
        ("https://api.deepseek.com/v1", "bearer", "system", "max_tokens"),
        ("deepseek+http://127.0.0.1:1", "bearer", "system", "max_tokens"),
        ("https://dashscope.aliyuncs.com/v1", "bearer", "system", ""),
    ],
)
def test_known_providers_are_described_by_themselves_unless_keys_json_says_otherwise(
    url, auth, developer, cap
):
    parse = functools.partial(proxy.parse_upstream, "u", path="u")
    found = parse(value={"url": url})
    assert (found.auth, found.developer, found.cap) == (auth, developer, cap)
    own = {"auth": "x-api-key", "developer": "user", "cap": "n_predict"}
    found = parse(value={"url": url, **own})
    assert (found.auth, found.developer, found.cap) == (*own.values(),)


@pytest.mark.parametrize("secure", [True, False])
@pytest.mark.parametrize("login", [True, False])
def test_an_upstream_is_reached_through_its_proxy(
    described, tmp_path, monkeypatch, secure, login
):
    monkeypatch.setenv("PROXY_TEST_PASSWORD", "p@ss/w:rd-of-the-proxy")
    server = TlsUpstream(tmp_path, HELLO_JSON) if secure else Upstream(HELLO_JSON)
    context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem") if secure else None)
    monkeypatch.setattr(proxy, "tls_context", lambda: context)
    with HttpProxy() as middle:
        user = "me:$PROXY_TEST_PASSWORD@" if login else ""
        it = described(up=server, proxy=f"http://{user}127.0.0.1:{middle.port}")
        assert said(it.chat()) == "hi" and len(it.up.requests) == 1
        (asked,) = middle.requests
        place = f"127.0.0.1:{it.up.port}"
        line = ("CONNECT", place) if secure else ("POST", f"http://{place}/v1/chat/completions")
        assert (asked.method, asked.path, asked.header("Host")) == (*line, place)
        sent = asked.header("Proxy-Authorization")
        coded = base64.b64encode(b"me:p@ss/w:rd-of-the-proxy").decode()
        assert sent == (f"Basic {coded}" if login else "")
        assert secure == (SECRET not in str(asked.headers))  # the proxy does not see it
        assert it.up.requests[0].header("Proxy-Authorization") == ""


def test_a_probe_goes_the_way_of_a_request():
    with Upstream(json_answer({})) as up, HttpProxy() as middle:
        value = {"url": up.url, "key": "k", "auth": "api-key", "query": {"a": "b"}}
        value["proxy"] = f"http://me:p%25w@127.0.0.1:{middle.port}"
        assert proxy.OpenAI(proxy.parse_upstream("u", value, "u")).probe() == ""
        (asked,) = up.requests
        assert (asked.method, asked.path, asked.query) == ("GET", "/v1/models", "a=b")
        login = base64.b64encode(b"me:p%w").decode()
        sent = middle.requests[0].header
        assert sent("Proxy-Authorization") == f"Basic {login}" and sent("api-key") == "k"


@pytest.mark.parametrize("status", [407, 502])
@pytest.mark.parametrize("scheme, asks", [("https", "CONNECT"), ("http", "POST")])
def test_a_proxy_that_refuses_is_a_free_503_and_the_next_upstream_is_asked(
    described, status, scheme, asks
):
    with Upstream(json_answer({}, status)) as middle, Upstream(HELLO_JSON) as spare:
        url = f"{scheme}://nowhere.invalid/v1"
        first = {"url": url, "proxy": f"http://127.0.0.1:{middle.port}"}
        models = {"chat": {"upstream": ["first/x", "spare/x"]}}
        models["lone"] = {"upstream": "first/x", **TOKENS}
        more = {"first": first, "spare": {"url": spare.url}}
        it = described(models=models, more=more)
        failed = it.chat("lone")
        assert error_of(failed)["code"] == "provider_unavailable"
        assert {one.method for one in middle.requests} == {asks}
        # A 502 to a whole request may be the upstream's own: it may have generated.
        maybe = (status, scheme) == (502, "http")
        assert it.chat().status_code == (503 if maybe else 200)


def test_an_upstream_whose_proxy_is_not_set_is_not_asked_directly(described):
    it = described(HELLO_JSON, proxy=f"${UNSET}")
    assert it.chat().status_code == 503 and it.up.requests == []


def test_what_the_environment_filled_in_is_told_to_nobody(described, monkeypatch):
    words = {"K": "key-of-the-operator", "H": "header-of-the-operator", "Q": "query-of-it"}
    for name, word in words.items():
        monkeypatch.setenv(f"PROXY_TEST_{name}", word)
    literal = "Basic bGl0ZXJhbC1zZWNyZXQ="
    told = " ".join([*words.values(), literal, "stays"])
    it = described(
        json_answer({"error": {"message": told, "param": "x"}}, 400), key="$PROXY_TEST_K",
        headers={"X-A": "$PROXY_TEST_H", "X-B": literal}, query={"q": "$PROXY_TEST_Q"},
    )  # fmt: skip
    answer = it.chat()
    assert error_of(answer)["message"] == "*** *** *** Basic *** stays"
    assert not [word for word in words.values() if word in repr(it.services.config)]


@pytest.mark.parametrize(
    "script",
    [
        raw_wait := (lambda request: request.wait(None, 30)),
        lambda request: request.send(head(200, JSON, CHUNKED)) or raw_wait(request),
        lambda request: request.send(head(200, EVENTS, CHUNKED)) or raw_wait(request),
    ],
    ids=["no head", "no body", "no event"],
)
def test_an_upstream_that_is_silent_for_its_timeout_is_given_up(described, script):
    it = described(script, timeout=0.2)
    started = time.monotonic()
    answer = it.chat(stream=script is not raw_wait)
    assert time.monotonic() - started < 3
    assert "temporarily unavailable" in answer.text and len(it.up.requests) == 1
    it.up.wait_closed()


def test_a_timeout_is_between_two_signs_of_life_and_not_of_the_whole_stream(described):
    events = [b": OPENROUTER PROCESSING\n\n"] * 4 + chat_chunks("a b")
    it = described(sse(events, delay=0.08), timeout=0.4)
    assert stream_text(it.chat(stream=True).data) == "a b"


def test_a_timeout_may_be_longer_than_the_usual_one(described, monkeypatch):
    monkeypatch.setattr(proxy, "ANSWER_TIMEOUT", 0.2)
    it = described(lambda r: r.wait(None, 0.5) or HELLO_JSON(r), timeout=10)
    assert said(it.chat()) == "hi"


def test_one_cap_is_sent_under_the_name_that_is_described(described):
    it = described(HELLO_JSON, cap="max_completion_tokens")
    for asked in {}, {"max_tokens": 7}, {"max_completion_tokens": 7, "max_tokens": 9}:
        assert it.chat(**asked).status_code == 200
        sent = {name: it.sent[name] for name in proxy.CAPS & it.sent.keys()}
        assert sent == {"max_completion_tokens": 7 if asked else 1000}
    it.ask("POST", "completions", {"model": "chat", "prompt": "x"})
    assert it.sent["max_tokens"] == 1000  # where no other name is known


def test_fields_that_are_described_as_refused_are_not_sent(described):
    it = described(HELLO_SSE, without=["stream_options", "user"], developer="system")
    messages = [{"role": "developer", "content": "x", "name": "n"}, *SAY_HELLO]
    it.chat(stream=True, user="me", messages=messages, stream_options={"a": 1})
    assert not {"stream_options", "user"} & it.sent.keys()
    assert it.sent["messages"] == [messages[0] | {"role": "system"}, *SAY_HELLO]


def refusing(names: Iterable[str], told: str, status: int = 400) -> Answer:
    """Refuse bodies with one of these fields in these words; else answer as asked."""

    def answer(request: Request) -> None:
        found = [name for name in names if name in request.json]
        error = {"error": {"message": told.format(*found or [""]), "param": None}}
        whole = HELLO_SSE if request.json.get("stream") else HELLO_JSON
        (json_answer(error, status) if found else whole)(request)

    return answer


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize(
    "name, told, stream, caps",
    [
        # Mistral's words, OpenAI's, and a server that says nothing.
        ("stream_options", '[{{"loc":["body","{}"],"msg":"Extra inputs are not permitted"}}]',
         True, {"max_tokens"}),
        ("max_tokens", "Unsupported parameter: '{}' is not supported with this model. Use"
         " 'max_completion_tokens' instead.", False, {"max_completion_tokens"}),
        ("max_tokens", "Unsupported parameter: '{}'", True, {"max_completion_tokens"}),
    ],
    ids=short,
)  # fmt: skip
def test_what_only_we_have_added_is_left_out_or_renamed_and_that_is_remembered(
    described, name, told, stream, caps, status
):
    it = described(refusing([name], told, status))
    for count in 2, 1:  # the second time it is known
        del it.up.requests[:]
        answer = it.chat(stream=stream)
        assert answer.status_code == 200 and "hi" in answer.text
        assert len(it.up.requests) == count and proxy.CAPS & it.sent.keys() == caps
        assert it.sent[min(caps)] == 1000
    keys = it.keys.read_text()
    it.keys.write_text(keys.replace("Chat", "Other"))
    it.services.reload()
    del it.up.requests[:]
    assert it.chat(stream=stream).status_code == 200 and len(it.up.requests) == 2


@pytest.mark.parametrize(
    "told, url",
    [
        ("Error while downloading.", "https://evil/a.png"),
        ("Not supported: https://evil/stream_options", "https://evil/stream_options"),
    ],
)
def test_what_a_client_made_the_provider_say_is_not_remembered(described, told, url):
    it = described(refusing(["stream_options"], told))
    picture = {"type": "image_url", "image_url": {"url": url}}
    for _ in range(2):
        del it.up.requests[:]
        it.chat(stream=True, messages=[{"role": "user", "content": [picture]}])
        assert len(it.up.requests) == 2


def test_several_additions_may_be_refused_one_after_the_other(described):
    told = "Unknown field: {}"
    it = described(refusing(["stream_options", "max_tokens"], told))
    assert it.chat(stream=True).status_code == 200
    assert len(it.up.requests) == 3 and "max_completion_tokens" in it.sent


def test_a_cap_beside_the_clients_own_is_left_out_where_two_are_refused(described):
    it = described(refusing(["max_tokens"], "{} is not supported"))
    assert it.chat(max_completion_tokens=7).status_code == 200
    assert it.sent["max_completion_tokens"] == 7 and "max_tokens" not in it.sent


@pytest.mark.parametrize(
    "told, body",
    [
        ("max_tokens is too large: 1000. This model takes at most 500", {}),
        ("This model's maximum context length is 8192 tokens. You requested 9096", {}),
        ("Unknown field: max_tokens, unknown field: max_completion_tokens", {}),
        ("max_tokens is too large", {"max_tokens": 7}),
    ],
)
def test_a_cap_that_is_refused_is_never_left_out_and_told_to_be_ours(
    described, told, body
):
    it = described(json_answer({"error": {"message": told}}, 400))
    answer = it.chat(**body)
    error, known = error_of(answer), bool(body)
    assert answer.status_code == 400 and error["message"].startswith(told)
    assert ("This gateway set max_" in error["message"]) != known
    assert ("to 1000" in error["message"] and "max_output" in error["message"]) != known
    assert all(proxy.CAPS & one.json.keys() for one in it.up.requests)
    assert len(it.up.requests) == (2 if "Unknown" in told else 1)


def test_the_clients_own_mistakes_are_refused_at_once(described):
    error = {"message": "messages: at least one is needed", "param": "messages"}
    it = described(json_answer({"error": error}, 400))
    asked = {"stream": True, "max_tokens": 7, "stream_options": {"include_usage": True}}
    for body in asked, {"stream": True}:
        assert it.chat(**body).status_code == 400
    assert len(it.up.requests) == 2


def test_pictures_are_not_asked_for_again(stage):
    stage.ark.script = json_answer({"error": {"message": "no", "code": "x"}}, 400)
    assert stage.chat("any-image", stream=True).status_code == 400
    assert len(stage.ark.requests) == 1


# -- Upstreams that rest -------------------------------------------------------------


def resting(it: Described, name: str) -> str:
    metrics = it.app.test_client().get("/metrics", headers=bearer(ADMIN_KEY)).text
    (value,) = re.findall(rf'^proxy_upstream_resting{{upstream="{name}"}} (\d)$', metrics, re.M)
    return value


def test_an_upstream_that_could_not_be_reached_rests_while_others_answer(
    described, monkeypatch
):
    tried = []
    connect = proxy.Pool._connect
    monkeypatch.setattr(
        proxy.Pool, "_connect",
        lambda self, watch: tried.append(self._upstream.name) or connect(self, watch),
    )  # fmt: skip
    more = {"dead": {"url": f"http://127.0.0.1:{free_port()}/v1"}}
    models = {"chat": {"upstream": ["dead/x", "main/y"]}}
    models["lone"] = {"upstream": "dead/x", **TOKENS}
    it = described(HELLO_JSON, models=models, more=more)
    assert resting(it, "dead") == "0"
    assert [said(it.chat()) for _ in range(3)] == ["hi"] * 3
    assert tried == ["dead", "main"]  # and main's connection is used again
    assert (resting(it, "dead"), resting(it, "main")) == ("1", "0")
    assert it.chat("lone").status_code == 503 and tried[2:] == ["dead"]
    pool = it.services.dialect(it.services.config.models["lone"].routes[0][0]).pool
    pool._failed -= proxy.REST  # its rest is over: it is tried first again
    assert said(it.chat()) == "hi" and tried[3:] == ["dead"]
    pool._failed -= proxy.REST
    with socket.create_server(("127.0.0.1", pool._upstream.port)):
        pool.take(proxy.Watch()).close()
    assert not pool.rests



def test_an_upstream_that_rests_is_asked_where_no_other_can_answer(described):
    more = {"spare": {"url": "http://127.0.0.1:9/v1"}}
    models = {"chat": {"upstream": ["spare/x", "main/y"]}}
    it = described([json_answer({}, 503)], models=models, more=more)
    with Upstream(HELLO_JSON) as spare:
        config = it.services.config.models["chat"]
        route = replace(config.routes[0][0], port=spare.port), "x"
        it.services.config.models["chat"] = replace(config, routes=(route, config.routes[1]))
        it.services.dialect(route[0]).pool._failed = time.monotonic()
        assert said(it.chat()) == "hi"
        assert len(it.up.requests) == len(spare.requests) == 1


# -- Wildcards -----------------------------------------------------------------------

WILD = {"upstream": "main/*", "price": {"input": 1, "output": 2, "reported": 1.5}}


def test_a_wildcard_passes_every_id_on_and_is_counted_under_its_own_name(described):
    own = {"upstream": "main/own", **TOKENS}
    it = described(models={"or/*": WILD, "or/x/*": {**WILD, "upstream": "main/y/*"},
                           "or/own": own})  # fmt: skip
    ids = {"or/a/b:free": "a/b:free", "or/x/z": "y/z", "or/own": "own"}
    it.up.script = [json_answer(chat_json("hi", id)) for id in ids.values()]
    for name, id in ids.items():
        assert it.chat(name).json["model"] == name and it.sent["model"] == id
    for name in "or/", "or/*", "or", "other", "or/x*":
        assert it.chat(name).status_code == 404
    receipts = it.ask("GET", "account/requests").json["data"]
    assert {one["model"] for one in receipts} == {*ids}
    usage = it.ask("GET", "account/usage").json["data"]
    assert {row["model"] for row in usage} == {"or/*", "or/x/*", "or/own"}
    listed = [one["id"] for one in it.ask("GET", "models").json["data"]]
    assert "or/own" in listed and not [id for id in listed if "*" in id]
    assert it.ask("GET", "models/or/a/b").json["id"] == "or/a/b"


def test_a_wildcard_is_allowed_by_its_own_name_and_a_literal_name_comes_first(tmp_path):
    own = {"upstream": "main/own", **TOKENS}
    path = keys_file(
        tmp_path, "http://127.0.0.1:9/v1", models={"or/*": WILD, "or/own": own},
        accounts={"team": {"models": ["or/*"]}},
    )  # fmt: skip
    app = proxy.create_app(path, tmp_path / "proxy.db")
    for name, status in ("or/a", 200), ("or/own", 404), ("chat", 404):
        answer = app.test_client().get(f"/v1/models/{name}", headers=bearer(TEAM_KEY))
        assert answer.status_code == status
    app.extensions["proxy"].close()


@pytest.mark.parametrize(
    "cost, micro",
    [
        (0.00012, 180),  # times 1.5
        (0.5, 750_000),  # whatever was held: what it would cost was not to be seen
        (1e-7, 1),
        (0, 0),
        (None, 5 + 2),  # none is reported: the given price
        ("0.1", 5 + 2),
        (-1, 5 + 2),
        (True, 5 + 2),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_the_providers_own_cost_is_charged_where_the_price_says_so(
    described, cost, micro, stream
):
    usage = usage_of(5, 1) | {"cost": cost}
    whole = sse(chat_chunks("hi", usage=usage)) if stream else chat_json("hi", usage=usage)
    it = described(whole if stream else json_answer(whole), models={"or/*": WILD})
    assert it.chat("or/a", stream=stream).status_code == 200
    (receipt,) = it.ask("GET", "account/requests").json["data"]
    assert receipt["credits"] * 10**6 == pytest.approx(micro)
    assert (receipt["input_tokens"], receipt["output_tokens"]) == (5, 1)
    assert it.chat("chat", stream=stream).status_code == 200
    receipt = it.ask("GET", "account/requests").json["data"][0]
    assert receipt["credits"] == pytest.approx(7e-6)  # a price of its own


# -- Failures ------------------------------------------------------------------------

AWAY = ("Location", "/v1/chat/completions")  # where it would be asked once more
AFTER_7, AFTER_A_DAY = ("Retry-After", "7"), ("Retry-After", "86400")
AT_A_DATE = ("Retry-After", "Fri, 01 Jan 2027 00:00:00")
HTML = ("Content-Type", "text/html")
TOLD_SECRET = {"error": {"message": f"Bad key {SECRET}"}}
DEEP_JSON, UTF_16 = typed(b"[" * 100_000), json.dumps(chat_json("hi")).encode("utf-16")
UNTYPED = raw(head(200, CLOSE, ("Content-Length", "2")) + b"hi")
NO_QUOTA = {"error": {"type": "insufficient_quota", "message": "You are out of it"}}
def of_openai(message: Any, code: Any = None, **more: Any) -> dict:
    """Return an error as OpenAI has it."""
    return {"error": {"message": message, "type": "x", "code": code, **more}}


OVERLOADED_FIRST = {"type": "error", "error": {"type": "overloaded_error"}}
FAILURES = {  # what comes, and what the client is told of repeating
    "401": (deepseek_error(401, f"Bad key {SECRET}"), "no"),
    "402": (json_answer({}, 402), "no"),
    "403": (json_answer({}, 403), "no"),
    "429": (json_answer({}, 429), "2"),
    "429 with Retry-After": (json_answer({}, 429, [AFTER_7]), "7"),
    "429 with a date": (json_answer({}, 429, [AT_A_DATE]), "60"),
    "429 with an age": (json_answer({}, 429, [AFTER_A_DAY]), "60"),
    "503": (json_answer({}, 503, [AFTER_7]), "7"),
    "429 with decimals": (json_answer({}, 429, [("Retry-After", "3.2")]), "4"),
    "429, nothing paid": (json_answer(NO_QUOTA, 429), "no"),
    "408": (json_answer({}, 408), "2"),
    "403 of the key": (json_answer({"error": {"message": "not for you"}}, 403), "no"),
    "a 429 in a 200": (json_answer({"error": {"code": 429, "message": "x"}}), "2"),
    "a 529 in a 200": (json_answer({"error": {"type": "overloaded_error"}}), "2"),
    "a 401 in a 200": (json_answer({"error": {"code": "401"}}), "no"),
    "529": (json_answer({}, 529), "2"),
    "500": (json_answer(TOLD_SECRET, 500), "2"),
    "502": (typed(b"<html>", "text/html", 502), "2"),
    "204": (raw(head(204, CLOSE)), "no"),
    "201": (json_answer(chat_json("hi"), 201), "no"),
    "301": (json_answer({}, 301, [AWAY]), "no"),
    "302": (json_answer({}, 302, [AWAY]), "no"),
    "303": (json_answer({}, 303, [AWAY]), "no"),
    "307": (json_answer({}, 307, [AWAY]), "no"),
    "308": (json_answer({}, 308, [AWAY]), "no"),
    "418": (json_answer({}, 418), "no"),
    "103 for ever": (endless("informational"), "no"),
    "HTML": (typed(b"<html>hello", "text/html"), "no"),
    "plain text": (typed(b"hello there", "text/plain"), "no"),
    "no content type": (UNTYPED, "no"),
    "an empty stream": (typed(b"", EVENTS[1]), "no"),
    "a stream of comments": (sse([b": hello\n\n"], done=False), "no"),
    "an endless line of a stream": (endless("line"), "no"),
    "an error first": (sse([TOLD_SECRET]), "no"),
    "a 500 first": (sse([of_openai(SECRET, 500)]), "2"),
    "a 503 first": (sse([b": queued\n\n", of_openai(SECRET, 503)], done=False), "2"),
    "Anthropic's 529 first": (sse([b"event: error\n", OVERLOADED_FIRST]), "2"),
    "an error of JSON typed as a stream": (
        typed(json.dumps(of_openai(SECRET, "rate_limit_exceeded")).encode(), EVENTS[1]),
        "2",
    ),
    "HTML as a stream": (typed(b"<html>hello", EVENTS[1]), "no"),
    "broken JSON": (typed(b'{"choices": ['), "no"),
    "an array": (typed(b"[]"), "no"),
    "null": (typed(b"null"), "no"),
    "an empty body": (typed(b""), "no"),
    "deep nesting": (DEEP_JSON, "no"),
    "no UTF-8": (typed(b'{"a": "\xff\xfe\xfa"}'), "no"),
    "UTF-16": (typed(UTF_16), "no"),
    "an error in a 200": (json_answer(TOLD_SECRET), "no"),
    "a text error in a 200": (json_answer({"error": SECRET}), "no"),
    "a cut body": (json_answer(chat_json("hi"), cut=40), "no"),
    "a cut chunked body": (raw(head(200, JSON, CHUNKED) + chunk(b'{"a": 1}')), "no"),
    "a bad chunk": (raw(head(200, JSON, CHUNKED) + b"zz\r\n{}"), "no"),
    "no answer": (raw(b""), "no"),
    "a reset": (raw(b"", reset=True), "no"),
    "a reset in the body": (raw(PLAIN + b'{"a": ', reset=True), "no"),
    "half a head": (raw(b"HTTP/1.1 200 OK\r\nContent-Ty"), "no"),
    "no status": (raw(b"HTTP/1.1 2OO OK\r\n\r\n{}"), "no"),
    "no HTTP": (raw(b"SSH-2.0-OpenSSH_9.2\r\n"), "no"),
    "endless headers": (endless("headers"), "no"),
    "an answer over MAX_ANSWER": (endless("body"), "no"),
}


def assert_unavailable(stage: Stage, response: Any, retry: str) -> None:
    """Assert a 503 that tells nothing of the upstream and costs nothing."""
    error = error_of(response)
    assert (response.status_code, error["code"]) == (503, "provider_unavailable")
    assert error["type"] == "api_error" and retry_of(response) == retry
    assert SECRET not in response.text and SECRET[-4:] not in response.text
    row = stage.row(response)
    assert (row["state"], row["cost"], row["status"]) == (proxy.RELEASED, 0, 503)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", FAILURES)
def test_whatever_fails_before_a_stream_begins_is_a_free_503(stage, name, stream):
    answer, retry = FAILURES[name]
    stage.main.script = [answer]
    assert_unavailable(stage, stage.chat(stream=stream), retry)
    assert len(stage.main.requests) == 1


RAW = json.dumps({"error": {"message": "a bad picture", "param": "messages"}})
TOO_LONG = {"message": "too long", "type": "invalid_request_error"}
REASONS = {  # as an upstream tells it: status, body; the message and param that pass
    "OpenAI": (400, {"error": TOO_LONG | {"param": "messages"}}, "too long", "messages"),
    "a text": (404, {"error": "no such model"}, "no such model", None),
    "vLLM": (400, {"object": "error", "message": "too", "code": 400}, "too", None),
    "Google": (400, [{"error": {"code": 400, "message": "too long"}}], "too long", None),
    "FastAPI": (
        422, {"detail": [{"loc": ["body", "n"], "msg": "no number", "type": "x"}]},
        "no number", "body.n",
    ),
    "OpenRouter": (
        400,
        {"error": {"message": "Provider returned error", "metadata": {"raw": RAW}}},
        "a bad picture", "messages",
    ),
    "a text of JSON": (400, {"error": {"message": RAW}}, "a bad picture", "messages"),
    "nested": (424, {"error": {"errors": [{"message": "broken"}]}}, "broken", None),
    "flagged": (403, {"error": {"message": "It is flagged"}}, "It is flagged", None),
    "in a 200": (200, {"choices": None, **of_openai("no", 400)}, "no", None),
    "of a type": (200, {"type": "error", "error": TOO_LONG}, "too long", None),
    "llama.cpp": (501, {"error": {"code": 501, "message": "no embeddings here"}},
                  "no embeddings here", None),
    "none": (400, {}, "The provider refused this.", None),
    "no JSON": (400, "no object", "no object", None),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_the_providers_reason_reaches_the_client(stage, name):
    status, body, message, param = REASONS[name]
    stage.main.script = [json_answer(body, status)] * 2
    response = stage.chat()
    error = error_of(response)
    assert response.status_code == {200: 400}.get(status, status)
    assert (error["message"], error["param"]) == (message, param)
    assert stage.row(response)["cost"] == 0


def test_a_reason_in_plain_text_reaches_the_client(stage):
    stage.main.script = [typed(b"404 page not found", "text/plain", 404)]
    assert error_of(stage.chat())["message"] == "404 page not found"


def test_the_reason_of_a_cut_stream_reaches_the_client(stage):
    told = {"error": {"code": 400, "message": f"bad {SECRET} image"}}
    stage.main.script = [sse([*WORDS[:2], told]), sse([told])]
    error = ends_in_error(stage, stage.chat(stream=True))
    assert (error["message"], error["code"]) == ("bad *** image", "invalid_request")
    response = stage.chat(stream=True)  # nothing went before it: a status can tell
    assert (response.status_code, error_of(response)) == (400, error)


OPERATORS = {  # of the operator's account: status, body; each as its provider tells it
    "Anthropic": (400, {"type": "error", "error": {
        "type": "invalid_request_error", "message": "Your credit balance is too low to"
        " access the Anthropic API. Please go to Plans & Billing."}}),
    "Anthropic, billing": (403, {"type": "error", "error": {
        "type": "billing_error", "message": "x"}}),
    "OpenAI": (429, of_openai("You exceeded your current quota", "insufficient_quota")),
    "OpenAI, limit": (400, of_openai("limit", "billing_hard_limit_reached")),
    "OpenAI, inactive": (429, of_openai("not active", "billing_not_active")),
    "DeepSeek": (402, of_openai("Insufficient Balance", "invalid_request_error")),
    "OpenRouter": (402, of_openai("This request requires more credits", 402)),
    "Moonshot": (429, {"error": {
        "type": "exceeded_current_quota_error", "message": "check your plan"}}),
    "Zhipu": (429, of_openai("no money", "1113")),
    "DashScope": (400, of_openai("Access denied, please make sure your account is in"
        " good standing.", "Arrearage")),
    "SiliconFlow": (403, {"code": 30001, "message": "your account balance is insufficient"}),
    "Volcengine": (403, of_openai("overdue balance", "AccountOverdueError")),
    "xAI": (403, {"code": "x", "error": "Your team doesn't have any credits yet."}),
    "Gemini, the key": (400, [{"error": {
        "code": 400, "message": "API key not valid. Please pass a valid API key.",
        "status": "INVALID_ARGUMENT"}}]),
    "inside a 200": (200, of_openai("not enough credits", 400)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_what_the_operator_has_not_paid_is_no_mistake_of_the_client(stage, name):
    status, body = OPERATORS[name]
    stage.main.script = [json_answer(body, status)] * 2
    assert_unavailable(stage, stage.chat(), "no")
    stage.spare.script = [json_answer(chat_json("hi"))]
    assert said(stage.chat("two")) == "hi"


@pytest.mark.parametrize(
    "model, retry", [("dead", "2"), ("lost", "2"), ("tls", "2"), ("unset", "no")]
)
def test_an_upstream_that_cannot_be_reached_is_a_free_503(
    stage, monkeypatch, model, retry
):
    known = socket.getaddrinfo

    def resolve(host, *rest, **more):
        if host == "nowhere.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return known(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    response = stage.chat(model)
    assert_unavailable(stage, response, retry)
    assert UNSET not in response.text


def test_whatever_method_asks_for_a_relay_is_counted(stage):
    ask = stage.app.test_client().options
    response = ask("/v1/chat/completions", data=b"x", headers=bearer(TEAM_KEY))
    assert "x-ratelimit-remaining-requests" in response.headers


NEEDS_OPENSSL = pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")


@NEEDS_OPENSSL
def test_streams_and_answers_come_through_tls_as_they_are(gateway, tmp_path):
    """Events of many records and many events in a record; the end of a record that
    nothing follows wakes no poll."""
    words = ["a" * 15_000, "b" * 40_000, *"cdefgh" * 50, "i" * 17_000, "j"]
    seen = threading.Event()
    stream = sse(chat_chunks(" ".join(words))[1:], pieces=30_011, gate=seen)
    with TlsUpstream(tmp_path, [stream, json_answer(chat_json("hello"))] * 3) as up:
        server = gateway(up.url, env={"SSL_CERT_FILE": str(up.cert)})
        for _ in range(3):
            seen.clear()
            visit = Visit(server, TEAM_KEY, stream=True).start()
            seen.set()
            assert stream_text(visit.finish().body) == " ".join(words) and visit.done
            visit = Visit(server, TEAM_KEY).start().finish()
            assert json.loads(visit.body)["usage"] == usage_of(5, 1)
        assert len(up.connections) < 6  # they are kept


@NEEDS_OPENSSL
def test_a_certificate_that_is_not_trusted_is_a_free_503(app, tmp_path):
    with TlsUpstream(tmp_path, json_answer(chat_json("hi"))) as up:
        api = Api(app(up.url))
        refused = api.refusal("POST", CHAT, model="chat", messages=SAY_HELLO)
    assert refused == (503, "provider_unavailable") and up.requests == []
    assert query(tmp_path, "SELECT state, cost FROM requests") == [(proxy.RELEASED, 0)]


@NEEDS_OPENSSL
def test_a_slow_image_over_tls_streams_comments_too(tmp_path, monkeypatch, app):
    monkeypatch.setattr(proxy, "COMMENT_INTERVAL", 0.02)
    monkeypatch.setattr(proxy, "COMMENTS_WAIT", 0.02)
    gate = threading.Event()
    with TlsUpstream(tmp_path, [json_answer(B64, gate=gate)]) as up:
        monkeypatch.setenv("SSL_CERT_FILE", str(up.cert))
        proxy.tls_context.cache_clear()
        model = {"any-image": {"upstream": "ark/flux", "price": {"image": 0.04}}}
        api = Api(app(upstreams={"ark": {"url": f"images+{up.url}"}}, models=model))
        answer = api("POST", CHAT, **HELLO | {"model": "any-image", "stream": True})
        pieces, seen = iter(answer.response), b""
        while seen.count(b": the image") < 2:
            seen += next(pieces)
        gate.set()
        assert b"data:" not in seen and b"[DONE]" in b"".join(pieces)


def reset_in_the_handshake(server: socket.socket) -> None:
    sock, _ = server.accept()
    sock.recv(1)
    reset(sock)


def test_a_reset_in_the_handshake_is_free_and_the_next_is_asked():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        pool.submit(reset_in_the_handshake, server)
        url = {"url": f"https://127.0.0.1:{server.getsockname()[1]}/v1"}
        dialect = proxy.OpenAI(proxy.parse_upstream("u", url, "upstreams.u"))
        with pytest.raises(proxy.UpstreamFailed) as failed:
            dialect.start("x", b"{}", proxy.Watch())
    assert failed.value.generated is proxy.Generated.NOTHING


def test_what_is_read_but_cannot_be_written_is_free_and_leaves_no_hold(stage):
    start = '{"model": "chat", "messages": [{}], "tools": %s%s}'
    bodies = [start % ("[" * depth, "]" * depth) for depth in range(960, 990)]
    stage.main.script = [json_answer(chat_json("hi"))] * len(bodies)
    ask = functools.partial(Api(stage.app).send, "POST", CHAT, content_type=JSON[1])
    assert {ask(data=data).status_code for data in bodies} <= {200, 400}
    assert not stage.rows("state = 0")


@pytest.mark.parametrize(
    "model, told",
    [
        ("dead-echo", (503, "provider_unavailable")),
        ("echo-spare", (200, None)),
        ("unset-image", (404, "not_found")),
    ],
)
def test_a_route_that_cannot_do_the_path_hides_no_other(stage, model, told):
    stage.spare.script = [json_answer(chat_json("hi"))]
    response = stage.post("completions", {"model": model, "prompt": "x"})
    error = response.json.get("error", {})
    assert (response.status_code, error.get("code")) == told


def test_a_model_without_its_key_says_so(stage, capfd):
    assert "not configured" in error_of(stage.chat("unset"))["message"]
    stage.app.extensions["proxy"].log.flush()
    assert f"{UNSET} is not set" in capfd.readouterr().err


SECRET_TOLD = f"Bad key {SECRET}, yours ends in {SECRET[-4:]}"
NOTHING_TOLD = ("The provider refused this.", None, "invalid_request")
PASSED = {  # an upstream's refusal: message, param and code of ours
    "OpenAI": (of_openai("No", "odd", param="top_p"), ("No", "top_p", "odd")),
    "llama.cpp": (of_openai("Too long", 400), ("Too long", None, "invalid_request")),
    "nothing": ({}, NOTHING_TOLD),
    "a list": ([], NOTHING_TOLD),
    "odd types": (of_openai("M", {}, param=5), ("M", None, "invalid_request")),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 404, 413, 422])
@pytest.mark.parametrize("name", PASSED)
def test_the_clients_own_mistakes_pass_free_of_charge(stage, name, status, stream):
    answer, told = PASSED[name]
    stage.main.script = json_answer(answer, status)
    response = stage.chat(stream=stream)
    error = error_of(response)
    assert response.status_code == status and error["type"] == "invalid_request_error"
    assert (error["message"], error["param"], error["code"]) == told
    row = stage.row(response)
    assert (row["state"], row["cost"], row["status"]) == (proxy.RELEASED, 0, status)


@pytest.mark.parametrize(
    "answer",
    [
        of_openai(SECRET_TOLD, SECRET, param=SECRET),
        {"error": SECRET_TOLD},
        {"detail": SECRET_TOLD},
        {"detail": [{"msg": SECRET_TOLD}]},
        {"message": SECRET_TOLD},
    ],
)
def test_the_operators_key_is_cut_out_of_a_message(stage, answer):
    stage.main.script = [json_answer(answer, 400)]
    response = stage.chat()
    assert response.status_code == 400 and "Bad key" in response.text
    assert SECRET not in response.text and SECRET[-4:] not in response.text


REFUSING = ["401", "429", "503", "529", "a 503 first", "Anthropic's 529 first"]
REFUSING += ["an error of JSON typed as a stream", "a 429 in a 200"]
MAYBE = ["500", "a 500 first", "204", "307", "HTML", "no answer", "a cut body", "an error in a 200"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", [*REFUSING, *MAYBE])
def test_the_next_upstream_is_asked_while_nothing_can_be_generated(stage, name, stream):
    asked = int(name in REFUSING)
    stage.main.script = [FAILURES[name][0]]
    stage.spare.script = [json_answer(chat_json("from the spare", "gpt-spare"))]
    response = stage.chat("two", stream=stream)
    assert response.status_code == [503, 200][asked]
    assert ("from the spare" in response.text) == bool(asked)
    assert len(stage.main.requests) == 1
    assert [one.json["model"] for one in stage.spare.requests] == ["gpt-spare"] * asked
    assert SECRET not in str([one.headers for one in stage.spare.requests])


@pytest.mark.parametrize("model", ["dead-first", "unset-first"])
def test_an_upstream_that_cannot_be_asked_is_passed_over(stage, model):
    stage.spare.script = [json_answer(chat_json("hi", "gpt-spare"))]
    assert stage.chat(model).json["model"] == model and not stage.main.requests


WHY = {  # answers of both upstreams, whether a stream: code, upstream and attempts
    "whole": (json_answer(chat_json("a")), None, False, (None, "main", 1)),
    "the next": (json_answer({}, 429), json_answer(chat_json("a")), False,
                 (None, "spare", 2)),
    "both busy": (json_answer({}, 429), json_answer({}, 503), False,
                  ("provider_unavailable", "spare", 2)),
    "a mistake": (json_answer({}, 400), None, False, ("invalid_request", "main", 1)),
    "a cut stream": (sse(chat_chunks("a", finish=None), done=False), None, True,
                     ("provider_unavailable", "main", 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", WHY)
def test_a_receipt_tells_why_it_failed_and_who_was_asked(stage, name):
    main, spare, stream, told = WHY[name]
    stage.main.script, stage.spare.script = [main], [spare] if spare else []
    response = stage.chat("two", stream=stream)
    assert response.data
    row = stage.row(response)
    assert (row["code"], row["upstream"], row["attempts"]) == told


def test_when_all_upstreams_are_busy_the_client_is_told_when_to_come_back(stage):
    stage.main.script = [json_answer({}, 429)]
    stage.spare.script = [json_answer({}, 503, [AFTER_7])]
    assert_unavailable(stage, stage.chat("two"), "7")


# -- Forms ---------------------------------------------------------------------------

CALL_OF_F = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
AS_TOOL = [{"index": 0, **CALL_OF_F, "function": {"name": "f", "arguments": "{"}}]
AS_REST = [{"index": 0, "function": {"arguments": "}"}}]
USED = usage_of(5, 3)
CALLED = chat_json("one two three", usage=USED, tool_calls=[CALL_OF_F], reasoning_content="ab")
CALLS = [  # the same, as a stream
    {"role": "assistant", "content": "", "reasoning_content": "a"},
    {"reasoning_content": "b"}, {"content": "one "}, {"content": "two three"},
    {"tool_calls": AS_TOOL}, {"tool_calls": AS_REST},
]  # fmt: skip
CALLING = [chat_chunk("gpt-test", one) for one in CALLS]
CALLING += [chat_chunk("gpt-test", {}, "stop")]
CALLING += [completion("gpt-test", "chat.completion.chunk", [], usage=USED)]
FORM_JSON, FORM_EVENTS = json.dumps(CALLED).encode(), sse_bytes(CALLING)
SLOPPY = {  # bytes and their type
    "JSON": (FORM_JSON, JSON[1]),
    "JSON without a type": (FORM_JSON, ""),
    "JSON as text": (b"\xef\xbb\xbf\n " + FORM_JSON, "text/plain; charset=utf-8"),
    "JSON as HTML": (FORM_JSON, "text/html"),
    "JSON as a stream": (FORM_JSON, EVENTS[1]),
    "events": (FORM_EVENTS, EVENTS[1]),
    "events as JSON": (FORM_EVENTS, JSON[1]),
    "events as text": (b"\n: hello\n\n" + FORM_EVENTS, "text/plain"),
    "events as lines": (FORM_EVENTS, "application/x-ndjson"),
    "events as bytes": (FORM_EVENTS, "application/octet-stream"),
}


def packed(data: bytes, coding: str, kind: str = JSON[1], status: int = 200) -> Answer:
    """Answer these bytes under this content encoding."""
    about = ("Content-Type", kind), ("Content-Encoding", coding), CLOSE
    return raw(head(status, *about) + data)


@pytest.mark.parametrize("coding", ["gzip", "identity", "br"])
def test_an_answer_that_is_packed_unasked_is_unpacked(stage, coding):
    refused = gzip.compress(json.dumps(of_openai("Too hot", 400)).encode())
    stage.main.script = [
        packed(FORM_JSON, coding), packed(gzip.compress(FORM_JSON), coding),
        packed(gzip.compress(FORM_EVENTS), coding, EVENTS[1]),
        packed(refused, coding, status=400),
    ]  # fmt: skip
    for _ in range(2):
        assert said(stage.chat()) == "one two three"
    response = stage.chat(stream=True)
    assert documents(response.data)[-1] == "DONE"
    assert stage.row(response)["output"] == 3
    assert error_of(stage.chat())["message"] == "Too hot"
    stage.main.script = [packed(b"\x1f\x8b\x09\x00" * 99, coding, "audio/pcm")]
    ask = {"model": "voice", "voice": "a", "input": "Hi", "response_format": "pcm"}
    assert stage.post("audio/speech", ask).data == b"\x1f\x8b\x09\x00" * 99


ZIPPED = gzip.compress(FORM_JSON)
BOMB = gzip.compress(b'{"x": "' + bytes(100 << 20))


@pytest.mark.parametrize("data", [ZIPPED[:-9], b"\x1f\x8b\x08{", BOMB])
def test_an_answer_that_cannot_be_unpacked_is_the_providers_fault(stage, data):
    stage.main.script = [packed(data, "gzip")]
    response = stage.chat()
    assert (response.status_code, error_of(response)["code"]) == (503, DOWN)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", SLOPPY)
def test_an_answer_has_the_form_that_was_asked_for_whatever_came(stage, name, stream):
    stage.main.script = [typed(*SLOPPY[name])]
    response = stage.chat(stream=stream)
    assert stage.row(response)["cost"] == 5 + 2 * 3
    if not stream:
        (choice,) = response.json["choices"]
        message, calls = choice["message"], choice["message"]["tool_calls"]
        assert [call["function"] for call in calls] == [CALL_OF_F["function"]]
        assert (message["content"], message["reasoning_content"]) == ("one two three", "ab")
        assert (choice["finish_reason"], response.json["usage"]) == ("stop", USED)
        assert response.json["object"] == "chat.completion"
        return
    assert response.mimetype == "text/event-stream"
    assert stream_text(response.data) == "one two three"
    assert stream_text(response.data, "reasoning_content") == "ab"
    assert response.data.endswith(b"data: [DONE]\n\n")


def test_a_long_stream_that_nobody_asked_for_is_no_answer(stage, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_ASSEMBLED", 100)
    stage.main.script = [sse(chat_chunks("a b"))]
    assert stage.chat().status_code == 503


def test_a_response_that_came_as_a_stream_is_told_as_json(stage):
    stage.main.script = [sse(responses_events(), done=False)]
    response = stage.post("responses", {"model": "chat", "input": "x"})
    assert (response.json["id"], response.json["model"]) == ("resp_1", "chat")
    assert stage.row(response)["cost"] > 0


@pytest.mark.parametrize(
    "path, body, stream",
    [
        ("responses", {"id": "resp_1", "output": []}, True),
        ("messages", {"id": "msg_1", "content": []}, True),
        ("messages", None, False),
        ("chat/completions", None, False),
    ],
)
def test_a_form_that_cannot_be_made_of_what_came_is_told_as_an_error(
    stage, path, body, stream
):
    half = sse(HALF, done=False)
    stage.main.script = [json_answer(body) if body else half]
    asked = {"model": "chat", "stream": stream, "max_tokens": 9, "messages": SAY_HELLO}
    response = stage.post(path, asked | {"input": "x"})
    assert response.status_code == 503 and "error" in response.json
    assert stage.row(response)["cost"] == 0


def streamed(*choices: dict, **last: Any) -> list[dict]:
    """Return chunks of these choices; `last`: more members of the last one."""
    kind = "chat.completion.chunk"
    events = [completion("theirs", kind, [{"index": 0, **one}]) for one in choices]
    return [*events[:-1], events[-1] | last]


ONE_TEXT, TWO_TEXT = {"delta": {"role": "assistant", "content": "one "}}, {"delta": {"content": "two"}}
THREE = {"delta": {"content": " three"}, "finish_reason": "stop"}
FILTERED = {"hate": {"filtered": False, "severity": "safe"}}
FOUR_CACHED = {"prompt_tokens_details": {"cached_tokens": 4}}
USAGE_CHUNK = completion("theirs", "chat.completion.chunk", [], usage=USED)
GEMINI_TOOL = {"id": "", "type": "function", "extra_content": {"google": {}}, **CALL_OF_F}
STAND_INS = {  # events as the provider's documentation and reports show them; the charge
    "Azure": ([
        {"id": "", "object": "", "created": 0, "model": "", "choices": [],
         "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": FILTERED}]},
        *streamed(ONE_TEXT, TWO_TEXT, THREE),
        {"id": "", "model": "", "choices": [{"index": 0, "finish_reason": None,
         "content_filter_results": FILTERED, "content_filter_offsets": {"start_offset": 0}}]},
        USAGE_CHUNK,
    ], 11),
    "OpenRouter": ([
        b": OPENROUTER PROCESSING\n\n", b": OPENROUTER PROCESSING\n\n",
        *streamed(ONE_TEXT, TWO_TEXT, THREE | {"native_finish_reason": "STOP"}),
        *streamed({"delta": {"content": ""}, "finish_reason": None},
                  usage={**USED, **FOUR_CACHED, "cost": 0.1, "is_byok": False}),
    ], 8),
    "Groq": ([
        *streamed(ONE_TEXT, x_groq={"id": "req_1"}), *streamed(TWO_TEXT),
        *streamed(THREE, x_groq={"id": "req_1", "usage": {**USED, "queue_time": 0.1}}),
    ], 11),
    "Gemini": ([
        *streamed(ONE_TEXT, usage=usage_of(5, 1)), *streamed(TWO_TEXT, usage=usage_of(5, 2)),
        *streamed({"delta": {"tool_calls": [GEMINI_TOOL]}}), *streamed(THREE, usage=USED),
    ], 11),
    "Mistral": ([*streamed(ONE_TEXT, TWO_TEXT, THREE, usage={**USED, "num_cached_tokens": 4}, p="ab")], 8),
    "Moonshot": ([*streamed(ONE_TEXT, TWO_TEXT, THREE | {"usage": {**USED, "cached_tokens": 4}})], 8),
    "vLLM": ([
        *streamed({"delta": {"role": "assistant", "content": ""}}, ONE_TEXT, TWO_TEXT,
                  THREE | {"stop_reason": None, "token_ids": None}),
        {**USAGE_CHUNK, "usage": {**USED, "prompt_tokens_details": None}},
    ], 11),
    "Ollama": ([
        *streamed(ONE_TEXT | {"finish_reason": ""}, TWO_TEXT | {"finish_reason": ""}, THREE), USAGE_CHUNK,
    ], 11),
    "llama.cpp": ([
        *streamed(ONE_TEXT, TWO_TEXT, THREE), {**USAGE_CHUNK, "timings": {"prompt_n": 5}},
    ], 11),
    "TensorX": ([
        *streamed(ONE_TEXT, TWO_TEXT, THREE), *streamed({"delta": {}}, usage={**USED, **FOUR_CACHED}),
    ], 8),
    "SGLang": ([
        *streamed(ONE_TEXT | {"finish_reason": "", "matched_stop": None}, TWO_TEXT, THREE, usage=USED),
    ], 11),
    "KoboldCpp": ([*streamed(ONE_TEXT | {"finish_reason": "null"}, TWO_TEXT, THREE, usage=USED)], 11),
}  # fmt: skip


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("name", STAND_INS)
def test_what_providers_stream_is_whole_and_charged_as_they_report_it(
    stage, name, done
):
    events, micro = STAND_INS[name]
    stage.main.script = [sse(events, done=done)] * 2
    response = stage.chat(stream=True)
    assert stream_text(response.data) == "one two three"
    assert response.data.endswith(b"data: [DONE]\n\n") and b"theirs" not in response.data
    row = stage.row(response)
    assert (row["cost"], row["estimated"]) == (micro, 0)
    response = stage.chat()  # and in the other form, which some of them mistake it for
    assert said(response) == "one two three" and stage.row(response)["cost"] == micro


def test_a_finish_that_is_no_word_is_none(stage):
    nulls = [chat_chunk("gpt-test", {"content": "a"}, end) for end in ("", "null")]
    stage.main.script = [sse(nulls, done=False)]
    assert ends_in_error(stage, stage.chat(stream=True))


# -- Streams -------------------------------------------------------------------------


STORY = """: connected

data: {"model":"gpt-test","choices":[{"delta":{"content":"😀"}}]}

event: x
id: 7
data:{"model":"gpt-test",
data: "choices":[{"delta":{"content":"中"}}]}

: keep-alive
data: {"choices":[{"delta":{},"finish_reason":"stop"}],"usage":null}

data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}

"""


def story(newline: bytes = b"\n", done: bool = True) -> bytes:
    """Return a short stream with comments, emoji, a split data and an odd field."""
    lines = STORY + "data: [DONE]\n\n" * done
    return lines.encode().replace(b"\n", newline)


def visible(data: bytes) -> list[Any]:
    """Return the events that a client is to get of what an upstream sent."""
    ours = sse_events(data.replace(b'"gpt-test"', b'"chat"'))
    return [json.loads(e) for e in ours if e != "[DONE]" and '"choices":[],' not in e]


def told(response: Any) -> bytes:
    """Return a stream's bytes; an error that a status told instead, as its event."""
    whole = response.data
    return whole if response.status_code == 200 else b"data: %s\n\n" % whole.strip()


def assert_no_silent_half(got: bytes, sent: bytes, whole: bytes) -> None:
    """Assert that all events of `sent` came, and then an end or an error event."""
    ideal, complete = visible(whole), visible(sent)
    *events, last = documents(got)
    assert got.decode() and got.endswith((b"\n\n", b"\r\n\r\n", b"\r\n\r"))
    assert events == ideal[: len(events)] and len(events) >= len(complete)
    ended = last == "DONE"
    assert events == ideal if ended else last["error"]["code"] == "provider_unavailable"


@pytest.mark.parametrize(
    "chunked, newline, done, pieces",
    [
        (True, b"\n", True, None), (False, b"\r\n", True, 7),
        (True, b"\r\n", False, None), (False, b"\n", False, None),
        long(True, b"\r", True, 1), long(False, b"\r", False, 1),
    ],
)  # fmt: skip
def test_a_stream_cut_anywhere_is_never_a_silent_half(
    stage, chunked, newline, done, pieces
):
    whole = story(newline, done)
    cuts, how = range(len(whole)), {"chunked": chunked, "pieces": pieces}
    stage.main.script = [sse([whole], done=False, cut=n, **how) for n in cuts]
    for end in cuts:
        got = told(stage.chat(stream=True))
        assert_no_silent_half(got, whole[:end], whole)


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [1, 3, 4096])
@pytest.mark.parametrize("done", [True, False])
def test_a_stream_in_any_pieces_arrives_whole(stage, chunked, newline, size, done):
    whole = story(newline, done)
    stage.main.script = [sse([whole], done=False, pieces=size, chunked=chunked)]
    response = stage.chat(stream=True)
    got, row = response.data, stage.row(response)
    assert documents(got) == [*visible(whole), "DONE"]
    assert got.count(b": connected") == got.count(b": keep-alive") == 1
    assert (row["cost"], row["estimated"], row["status"]) == (3 + 4, 0, 200)


def test_events_comments_and_unknown_fields_are_untouched(stage):
    chunks = [json.dumps(one).encode() for one in chat_chunks("a b")[:-1]]
    odd = b"event: odd\nid: 1\nretry: 5\nx: y\ndata: %s\n\n"
    blocks = [odd % one for one in chunks]
    whole = b": one\n\n" + b": two\n".join(blocks) + b"data: [DONE]\n\n"
    stage.main.script = [sse([whole], done=False)]
    response = stage.chat(stream=True)
    assert response.data == whole.replace(b'"gpt-test"', b'"chat"')
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize(
    "options, asked, comes",
    [
        (None, {"include_usage": True}, 0),
        ({}, {"include_usage": True}, 0),
        ({"include_usage": False, "x": 1}, {"include_usage": True, "x": 1}, 0),
        ({"include_usage": True}, {"include_usage": True}, 1),
    ],
)
def test_the_usage_chunk_comes_only_if_the_client_asked(stage, options, asked, comes):
    chunks = chat_chunks("a b", usage=usage_of(1000, 10))
    stage.main.script = [sse(chunks)]
    response = stage.chat(stream=True, stream_options=options)
    events = documents(response.data)
    assert stage.main.requests[0].json["stream_options"] == asked
    assert len(events) == len(chunks) + comes and events[-1] == "DONE"
    told = [one for one in events[:-1] if not one["choices"]]
    assert told == [{**chunks[-1], "model": "chat"}] * comes
    assert stage.row(response)["cost"] == 1020


CACHED_400 = usage_of(1000, 10, prompt_cache_hit_tokens=400)


@pytest.mark.parametrize(
    "reports, counts, cost",
    [
        ([None, None, CACHED_400], (1000, 400, 10, 0), 660),  # in the finish chunk
        ([usage_of(100, n) for n in range(3)], (100, 0, 2, 0), 104),  # as it goes
        ([None, None, usage_of(0, 0)], (3, 0, 100, 1), 203),
        ([None, None, None], (3, 0, 100, 1), 203),
    ],
)
def test_a_stream_is_charged_its_last_report_once_or_an_estimate(
    stage, reports, counts, cost
):
    chunks = chat_chunks("x" * 400, include_usage_chunk=False)
    chunks = [{**one, "usage": report} for one, report in zip(chunks, reports)]
    stage.main.script = [sse(chunks)]
    response = stage.chat(stream=True)
    *events, last = documents(response.data)
    assert [one["usage"] for one in events] == reports and last == "DONE"
    row = stage.row(response)
    assert (row["input"], row["cached"], row["output"], row["estimated"]) == counts
    assert (row["cost"], row["status"]) == (cost, 200)


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"type": {}, "usage": {"prompt_tokens": 1}, "choices": []}\n\n',
        b'data: {"model": "a\\qb", "choices": []}\n\n',
        b'data: {"model": "a\tb", "choices": []}\n\n',
    ],
)
def test_an_event_that_is_odd_does_not_end_the_stream(stage, event):
    first, *rest = chat_chunks("a b")
    stage.main.script = [sse([first, event, *rest])]
    assert sse_events(stage.chat(stream=True).data)[-1] == "[DONE]"


@pytest.mark.parametrize("reason", ["stop", "length", "insufficient_system_resource"])
@pytest.mark.parametrize("chunked", [True, False])
def test_a_finished_stream_without_done_gets_one(stage, reason, chunked):
    chunks = chat_chunks("a b", finish=reason)
    stage.main.script = [sse(chunks, done=False, chunked=chunked)]
    response = stage.chat(stream=True)
    assert documents(response.data)[-1] == "DONE" and response.data.count(b"DONE") == 1
    assert stage.row(response)["status"] == 200


def test_a_finished_stream_that_stays_open_is_ended_well(stage, gate, monkeypatch):
    monkeypatch.setattr(proxy, "FINISH_PATIENCE", 0.05)

    def stays_open(request: Request) -> None:
        request.send(STREAM + sse_bytes(chat_chunks("a b"), done=False))
        request.wait(gate)

    stage.main.script = [stays_open]
    response = stage.chat(stream=True)
    assert documents(response.data)[-1] == "DONE"
    assert (stage.row(response)["status"], stage.row(response)["estimated"]) == (200, 0)


def ends_in_error(stage: Stage, response: Any) -> dict:
    """Return the error event that a stream ends with; nothing follows it."""
    data = response.data
    *_, last = documents(data)
    assert list(last) == ["error"] and b"[DONE]" not in data
    assert list(last["error"]) == ["message", "type", "param", "code"]
    assert SECRET not in data.decode()
    return last["error"]


def failed_response(stage: Stage, response: Any) -> tuple[list[dict], dict]:
    """Return the events of /v1/responses before the two that end it, and the error."""
    *events, first, last = documents(response.data)
    numbers, error = [first["sequence_number"], last["sequence_number"]], first["error"]
    assert (first["type"], last["type"]) == ("error", "response.failed")
    assert numbers[1] - numbers[0] == 1 and numbers[0] - len(events) in (0, 1)  # left out
    assert first["message"] == error["message"] and first["code"] == error["code"]
    assert last["response"]["status"] == "failed" and last["response"]["error"] == error
    assert b"event: error\n" in response.data and b"[DONE]" not in response.data
    assert SECRET not in response.text
    return events, error


def failed_message(response: Any) -> list[dict]:
    """Return the events of /v1/messages before the error that ends it."""
    *events, last = documents(response.data)
    assert response.data.rpartition(b"\n\n")[0].rpartition(b"\n\n")[2].startswith(
        b"event: error\ndata: "
    )
    told = {"type": "api_error", "message": last["error"]["message"]}
    assert last == {"type": "error", "error": told}
    assert b"[DONE]" not in response.data and SECRET not in response.text
    return events


def responses_events(last: str = "response.completed", **more: Any) -> list[bytes]:
    """Return the events of /v1/responses."""
    about = {"id": "resp_1", "model": "gpt-test", "usage": None, "error": None}
    events = [
        {"type": "response.created", "response": about},
        {"type": "response.output_text.delta", "delta": "Hello"},
        {"type": "response.output_text.done", "text": "Hello"},
        {"type": last, "response": {**about, "usage": RESPONSES_USAGE, **more}},
    ]
    return typed_events(*events)


def test_codex_compacts_and_pays_by_the_report(stage):
    """POST /v1/responses/compact knows no cap, and none of a model's defaults."""
    kept = [{"type": "compaction", "id": "cmp_1", "encrypted_content": "gAAA"}]
    usage = {"input_tokens": 139, "output_tokens": 438, "total_tokens": 577}
    whole = {"id": "resp_1", "object": "response.compaction", "output": kept}
    stage.main.script = [json_answer({**whole, "usage": usage})]
    ask = {"model": "mild", "input": [{"role": "user", "content": "x"}]}
    response = stage.post("responses/compact", ask)
    assert response.json["output"] == kept
    assert stage.main.requests[0].path == "/v1/responses/compact"
    assert stage.main.requests[0].json == {**ask, "model": "m"}
    assert stage.row(response)["cost"] == 139 + 2 * 438


HALF = chat_chunks("one two", finish=None, include_usage_chunk=False)
HALF_BYTES = sse_bytes(HALF, done=False)
REPORTED = [{**HALF[0], "usage": usage_of(5, 1)}, *HALF[1:]]
LONGER = ("Content-Length", "9999")
CUT_SHORT = {"done": False, "chunked": False}
BROKEN = {  # what comes, what is charged
    "without a finish": (sse(HALF, done=False), 7),
    "closed without a finish": (sse(HALF, **CUT_SHORT), 7),
    "[DONE] without a finish": (sse(REPORTED), 9),
    "cut in a chunk": (sse(HALF, cut=450), 5),
    "cut in a line": (sse(HALF, cut=450, chunked=False), 5),
    "reset": (raw(STREAM + HALF_BYTES, reset=True), 7),
    "an error": (sse([*HALF, TOLD_SECRET], done=False), 7),
    "an error, then [DONE]": (sse([*HALF, of_openai(SECRET, 5)]), 7),
    "a text error": (sse([*HALF, {"error": SECRET}]), 7),
    "an error after the finish": (sse([*chat_chunks("a"), TOLD_SECRET]), 7),
    "short of its length": (raw(head(200, EVENTS, LONGER) + HALF_BYTES), 7),
    "a line over 16 MB": (raw(STREAM + HALF_BYTES + b"x" * 17_000_000), 7),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_stream_that_breaks_ends_in_an_error_event(stage, name):
    stage.main.script, cost = [BROKEN[name][0]], BROKEN[name][1]
    response = stage.chat(stream=True)
    assert response.status_code == 200
    assert ends_in_error(stage, response)["code"] == "provider_unavailable"
    state = proxy.SETTLED if cost else proxy.RELEASED
    row = stage.row(response)
    assert (row["state"], row["status"], row["cost"]) == (state, 503, cost)


def test_a_stream_under_another_name_breaks_in_an_error_event_too(stage):
    events = chat_chunks("a b", finish=None, include_usage_chunk=False)
    named = head(200, ("Content-Type", "text/plain"), CLOSE)
    stage.main.script = [raw(named + sse_bytes(events, done=False))]
    assert ends_in_error(stage, stage.chat(stream=True))["code"] == "provider_unavailable"


@pytest.mark.parametrize("error", [None, {}, "", False, []])
def test_an_empty_error_is_none(stage, error):
    chunks = [{**one, "error": error} for one in chat_chunks("a b")]
    stage.main.script = [sse(chunks), json_answer({**chat_json("a b"), "error": error})]
    assert stream_text(stage.chat(stream=True).data) == said(stage.chat()) == "a b"


@pytest.mark.parametrize(
    "path, asked, indices",
    [
        (CHATS, {"n": 2}, [0, 1]),
        ("completions", {"prompt": ["a", "b"], "n": 2}, [3, 0, 1, 2]),
        ("completions", {"prompt": [1, 2], "n": 1, "best_of": 3}, [0]),
        (CHATS, {}, [None]),
    ],
)
def test_choices_that_have_all_finished_end_in_done(stage, path, asked, indices):
    choices = [{"index": one, "delta": {}, "finish_reason": "stop"} for one in indices]
    events = [completion("gpt-test", "chunk", [one]) for one in choices]
    half = {**choices[-1], "delta": {"content": "half"}, "finish_reason": None}
    broken = [*events[:-1], completion("gpt-test", "chunk", [half])]
    stage.main.script = [sse(events, done=False), sse(broken, done=False)]
    body = {"model": "chat", "messages": SAY_HELLO, "stream": True, **asked}
    assert documents(stage.post(path, body).data)[-1] == "DONE"
    assert ends_in_error(stage, stage.post(path, body))


def test_a_name_that_changes_within_a_stream_is_still_the_clients(stage):
    azures_first = {"choices": [], "model": "", "prompt_filter_results": []}
    chunks = [azures_first, *chat_chunks("a b"), *chat_chunks("c", "gpt-test-0613")]
    stage.main.script = [sse(chunks)]
    *events, _ = documents(stage.chat(stream=True).data)
    assert {one["model"] for one in events} == {"chat"}


def test_legacy_completions_stream(stage):
    parts = [{"text": "a"}, {"text": "b", "finish_reason": "stop"}]
    events = [completion("gpt-test", "text_completion", [one]) for one in parts]
    usage = completion("gpt-test", "text_completion", [], usage=usage_of(7, 2))
    stage.main.script = [sse([*events, usage])]
    body = {"model": "chat", "prompt": "x", "stream": True}
    response = stage.post("completions", body)
    *events, last = documents(response.data)
    assert [one["choices"][0]["text"] for one in events] == ["a", "b"]
    assert last == "DONE" and stage.row(response)["cost"] == 11
    assert stage.main.requests[0].json["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    "last, error",
    [
        ("response.completed", None),
        ("response.incomplete", None),
        ("response.failed", {"code": "server_error", "message": "x"}),
    ],
)
def test_responses_end_with_their_own_last_event(stage, last, error):
    events = responses_events(last, error=error)
    stage.main.script = [sse(events, done=False)]
    response = stage.post("responses", {"model": "chat", "input": "x", "stream": True})
    whole = b"".join(events).replace(b'"gpt-test"', b'"chat"')
    assert response.data == whole and stage.row(response)["cost"] == 660
    assert "stream_options" not in stage.main.requests[0].json


def test_a_failed_response_of_which_nothing_came_is_free(stage):
    first, *_, last = responses_events("response.failed", usage=None)
    stage.main.script = [sse([first, last], done=False)]
    response = stage.post("responses", {"model": "chat", "input": "x", "stream": True})
    assert b"response.failed" in response.data
    row = stage.row(response)
    assert (row["state"], row["status"], row["cost"]) == (proxy.RELEASED, 503, 0)


def test_an_error_before_any_text_is_free_whatever_was_reported(stage):
    started = {"message": {"model": "chat", "usage": {"input_tokens": 900}}}
    failed = {"type": "error", "error": {"type": "overloaded_error", "message": "x"}}
    events = [{"type": "message_start", **started}, failed]
    stage.main.script = [sse(events, done=False, delay=0.1)]
    ask = {"model": "chat", "messages": SAY_HELLO, "max_tokens": 99, "stream": True}
    response = stage.post("messages", ask)
    assert failed_message(response) == [{"type": "message_start", **started}]
    assert stage.row(response)["state"] == proxy.RELEASED


OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": SECRET}}
NO_END = message_events()[:-2]
BROKEN_MESSAGES = {
    "an error": sse([*NO_END, OVERLOADED], done=False),
    "an error after the finish": sse([*message_events()[:-1], OVERLOADED], done=False),
    "cut": sse(NO_END, done=False, chunked=False),
    "cut in an event": sse(NO_END, cut=len(b"".join(NO_END)) - 10),
    "reset": raw(STREAM + sse_bytes(NO_END, done=False), reset=True),
    "[DONE] alone": sse(NO_END),
}


@pytest.mark.parametrize("name", BROKEN_MESSAGES)
def test_messages_that_break_end_in_anthropics_error_event(stage, name):
    stage.claude.script = [BROKEN_MESSAGES[name]]
    response = stage.post("messages", {**MESSAGES, "stream": True})
    (started, *_) = failed_message(response)
    assert started["message"]["model"] == "claude"
    row = stage.row(response)
    assert (row["status"], row["input"]) == (503, 50) and row["cost"] > 0


@pytest.mark.parametrize(
    "script",
    [
        sse(message_events(), done=False),
        sse(message_events()),
        sse(message_events()[:-1]),
        sse(message_events()[:-1], done=False),
        sse(message_events()[:-1], done=False, chunked=False),
    ],
)
def test_messages_end_with_their_own_last_event_and_never_with_done(stage, script):
    stage.claude.script = [script]
    response = stage.post("messages", {**MESSAGES, "stream": True})
    sent = b"".join(message_events()).replace(b'"claude-id"', b'"claude"')
    assert response.data == sent
    row = stage.row(response)
    assert (row["status"], row["estimated"], row["cost"]) == (200, 0, 110)


def test_a_message_left_after_its_stop_reason_costs_what_was_reported(
    stage, monkeypatch
):
    monkeypatch.setattr(proxy, "REPORT_PATIENCE", 0.1)
    stop = threading.Event()
    *events, last = message_events()

    def script(request):
        request.send(STREAM + sse_bytes(events, done=False))
        request.wait(stop)

    stage.claude.script = [script]
    body = {**MESSAGES, "stream": True}
    asked = {"json": body, "headers": bearer(TEAM_KEY)}
    response = stage.app.test_client().post("/v1/messages", **asked)
    stream = iter(response.response)
    seen = b""
    while b"message_delta" not in seen:
        seen += next(stream)
    response.close()
    stop.set()
    row = stage.row(response)
    assert (row["status"], row["estimated"], row["output"]) == (499, 0, 30)


BROKEN_ENDS = [
    [], ["[DONE]"], [{"type": "error", "error": {"message": SECRET}}],
    [{"type": "error", "code": "server_error", "message": SECRET, "param": None}],
]  # fmt: skip


@pytest.mark.parametrize(
    "kept, end", [(1, []), *itertools.product([2, 3], BROKEN_ENDS)]
)
def test_responses_that_break_end_in_openais_typed_events(stage, kept, end):
    events = [*responses_events()[:kept], *end]
    stage.main.script = [sse(events, done=False, chunked=False)]
    response = stage.post("responses", {"model": "chat", "input": "x", "stream": True})
    events, error = failed_response(stage, response)
    assert len(events) == kept and error["code"] == "provider_unavailable"
    assert stage.row(response)["output"] == 2 * (kept > 1)  # "Hello", once


# -- Time ----------------------------------------------------------------------------


def test_done_is_not_held_back_by_an_upstream_that_stays(stage):
    def answer(request):
        request.send(head(200, EVENTS, CHUNKED) + chunk(sse_bytes(chat_chunks("a"))))
        request.wait(request.connection.server.released)

    stage.main.script = [answer]
    started = time.monotonic()
    assert documents(stage.chat(stream=True).data)[-1] == "DONE"
    assert time.monotonic() - started < 2 and stage.main.requests[0].closed.wait(2)


def posted(path: str, *lines: str, key: str = TEAM_KEY) -> bytes:
    """Return the head of a JSON request whose body is still to come."""
    about = "Host: x", f"Authorization: Bearer {key}", "Content-Type: application/json"
    return "\r\n".join([f"POST {path} HTTP/1.1", *about, *lines, "", ""]).encode()


def request_bytes(path: str, body: bytes, key: str = TEAM_KEY) -> bytes:
    """Return a POST of JSON as it stands on the wire."""
    return posted(path, f"Content-Length: {len(body)}", key=key) + body


def chat_bytes(**body: Any) -> bytes:
    """Return a chat's request as it stands on the wire."""
    whole = {"model": "chat", "messages": SAY_HELLO, **body}
    return request_bytes("/v1/chat/completions", json.dumps(whole).encode())


def test_a_stream_that_was_ended_while_nobody_read_is_not_told_to_be_left(stage):
    stage.main.script = [sse(chat_chunks("a b c"))]
    with asked(stage.app, stream=True) as response:
        next(response.iter_encoded())
        [watch] = stage.app.extensions["proxy"].watcher._watches
        watch.end(proxy.Ending.DRAINED)
    assert stage.row(response)["status"] == proxy.Ending.DRAINED.status


def test_a_fault_of_ours_within_a_stream_ends_it_with_an_error_event(stage, monkeypatch):
    written = MagicMock(side_effect=[1, 1, RuntimeError("hello")])
    monkeypatch.setattr(proxy, "written", written)
    stage.main.script = [sse(chat_chunks("a b c"), delay=0.01)]
    response = stage.chat(stream=True)
    assert ends_in_error(stage, response)["code"] == "internal_error"
    assert b"hello" not in response.data
    assert stage.row(response)["status"] == proxy.Ending.CUT.status


def test_a_client_that_reads_slowly_is_no_stall_of_the_upstream(stage, monkeypatch):
    monkeypatch.setattr(proxy, "STALL_TIMEOUT", 0.1)
    stage.main.script = [sse(chat_chunks("a b c"))]
    with asked(stage.app, stream=True) as response:
        pieces = response.iter_encoded()
        read = [next(pieces), next(pieces)]
        time.sleep(0.3)  # the watcher looks meanwhile
        assert stream_text(b"".join([*read, *pieces])) == "a b c"


# -- Clients on a socket -------------------------------------------------------------


def test_comments_leave_before_the_first_event_once_they_have_waited(
    stage, monkeypatch
):
    monkeypatch.setattr(proxy, "COMMENTS_WAIT", 0.02)
    stage.main.script = [sse([b": wait\n\n"] * 8 + WORDS, delay=0.01)]
    with stage.chat(stream=True) as response:
        first = next(response.iter_encoded())
    assert first.startswith(b": wait") and b"data" not in first


def read_until(sock: socket.socket, wanted: bytes) -> bytes:
    """Read until `wanted` has come."""
    received = b""
    while wanted not in received:
        received += sock.recv(65536)
    return received


def shut_down_writing(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


def reset(sock: socket.socket) -> None:
    """Send RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


LEAVES = [socket.socket.close, shut_down_writing, reset]
ASKING = (1, 0, 3)  # estimated, output, micro-credits
LONG_TEXT = chat_chunk("gpt-test", {"content": "x" * 400})
ONE_EVENT = sse([LONG_TEXT], gate=threading.Event())
LEAVERS = {  # stream, answer, what the client reads, the receipt
    "JSON, before the headers": (False, stall(), b"", ASKING),
    "JSON, in the body": (False, trickle(b'{"choices": []}', 5), b"", ASKING),
    "stream, before the headers": (True, stall(), b"", ASKING),
    "stream, before the first event": (True, stall(before_headers=False), b"", ASKING),
    "stream, after one event": (True, ONE_EVENT, b"x" * 400, (1, 100, 203)),
    "stream, of comments": (True, endless("comments"), b"", ASKING),
}


@pytest.mark.parametrize("leave", LEAVES)
@pytest.mark.parametrize("name", LEAVERS)
def test_a_client_that_leaves_frees_its_slot_and_the_upstream(real, name, leave):
    stream, answer, wanted, receipt = LEAVERS[name]
    real.main.script = [answer]
    with socket.create_connection(("127.0.0.1", real.port), 5) as sock:
        sock.sendall(chat_bytes(stream=stream))
        real.main.wait_requests()
        read_until(sock, wanted)
        leave(sock)
        left = time.monotonic()
        real.wait_idle(2)
        assert real.main.requests[0].closed.wait(2)
        assert time.monotonic() - left < 2
    row = real.rows()[-1]
    told = row["estimated"], row["output"], row["cost"]
    assert (row["status"], told) == (499, receipt)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_half_closes_is_told_that_it_was_its_own_doing(real, stream):
    real.main.script = [stall()]
    ask = {"model": "chat", "messages": SAY_HELLO, "stream": stream}
    data = request_bytes("/v1/chat/completions", json.dumps(ask).encode())
    answer = raw_http(real.port, data, finish=True)
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert head.startswith(b"HTTP/1.1 400 ") and error["code"] == "invalid_request"
    assert "closed for writing" in error["message"]
    assert "provider" not in error["message"] and b"etry" not in head
    real.wait_idle(2)
    assert real.rows()[-1]["status"] == 499


def test_a_stream_whose_client_half_closes_ends_with_an_event_that_says_so(real):
    real.main.script = [ONE_EVENT]
    with socket.create_connection(("127.0.0.1", real.port), 5) as sock:
        sock.sendall(chat_bytes(stream=True))
        read_until(sock, b"x" * 400)
        shut_down_writing(sock)
        told = read_until(sock, b"0\r\n\r\n")
    assert b"closed for writing" in told and b"[DONE]" not in told
    real.wait_idle(2)
    row = real.rows()[-1]
    assert (row["status"], row["cost"]) == (499, 203)


LAST_WORD = chat_chunk("gpt-test", {"content": "abc"}, "stop")
ITS_REPORT = completion("gpt-test", "chat.completion.chunk", [], usage=usage_of(50, 90))
CLAUDES = [  # what comes after the last word
    {"type": "message_start", "message": {"usage": {"input_tokens": 50}}},
    {"type": "content_block_delta", "delta": {"text": "abc"}},
    {"type": "content_block_stop"},
    {"type": "message_delta", "usage": {"output_tokens": 90}},
    {"type": "message_stop"},
]
CODEX = [
    {"type": "response.output_text.delta", "delta": "abc"},
    {"type": "response.output_text.done", "text": "abc"},
    {"type": "response.completed",
     "response": {"usage": {"input_tokens": 50, "output_tokens": 90}}},
]  # fmt: skip
FINISHED_STREAMS = {
    "chat/completions": (sse([LAST_WORD, ITS_REPORT], delay=0.15), b"abc"),
    "messages": (sse(CLAUDES, delay=0.05, done=False), b"content_block_stop"),
    "responses": (sse(CODEX, delay=0.1, done=False), b"output_text.done"),
}


def leave_stream(real, path: str, wanted: bytes, leave: Callable) -> None:
    body = {"model": "chat", "messages": SAY_HELLO, "input": "hello", "stream": True}
    with socket.create_connection(("127.0.0.1", real.port), 5) as sock:
        sock.sendall(request_bytes(f"/v1/{path}", json.dumps(body).encode()))
        read_until(sock, wanted)
        leave(sock)
        real.wait_idle(5)


@pytest.mark.parametrize("leave", LEAVES)
@pytest.mark.parametrize("path", FINISHED_STREAMS)
def test_a_client_that_leaves_a_finished_answer_pays_by_its_report(real, path, leave):
    answer, last_word = FINISHED_STREAMS[path]
    real.main.script = [answer]
    leave_stream(real, path, last_word, leave)
    row = real.rows()[-1]
    assert (row["estimated"], row["input"], row["output"]) == (0, 50, 90)
    assert row["cost"] == 50 + 2 * 90


def test_a_report_that_does_not_come_is_waited_for_and_no_longer(real):
    real.main.script = [sse([LAST_WORD, ITS_REPORT], gate=threading.Event())]
    started = time.monotonic()
    leave_stream(real, "chat/completions", b"abc", socket.socket.close)
    assert 0.9 < time.monotonic() - started < 2.5
    row = real.rows()[-1]
    assert (row["status"], row["estimated"], row["output"]) == (499, 1, 1)


def test_a_client_that_sends_more_and_leaves_is_seen_to_leave(real):
    real.main.script = [stall()]
    with socket.create_connection(("127.0.0.1", real.port), 5) as sock:
        sock.sendall(chat_bytes() + b"\r\n")
        real.main.wait_requests()
    real.wait_idle(2)
    assert real.main.requests[0].closed.wait(2)


# -- OpenAI's SDK --------------------------------------------------------------------


@pytest.fixture
def sdk(real):
    """sdk(key, **more) -> OpenAI's own client of the gateway."""
    openai = pytest.importorskip("openai")
    with ExitStack() as stack:

        def make(key=TEAM_KEY, **more):
            options = {"max_retries": 0, "timeout": 20, **more}
            made = openai.OpenAI(base_url=f"{real.url}/v1", api_key=key, **options)
            return stack.enter_context(made)

        yield make


def test_the_sdk_gets_what_was_thought_and_the_requests_id(sdk, real):
    answer = sdk().chat.completions.create(model="deepseek-r1", messages=SAY_HELLO)
    assert answer.choices[0].message.reasoning_content == real.deep.thought
    assert answer.model == "deepseek-r1" and answer.usage.prompt_tokens == 20
    assert real.rows("id = ?", answer._request_id)


def test_the_sdk_speaks_transcribes_and_edits(sdk, real):
    client, form = sdk(), ("a.mp3", MP3, "audio/mpeg")
    sound = typed(MP3, "audio/mpeg")
    said = {"model": "voice", "voice": "alloy", "input": "Hi"}
    real.main.script = [
        sound, sound, json_answer(SECONDS), typed(b"Hello", "text/plain"),
        sse(HEARING, done=False), json_answer(PICTURES),
    ]  # fmt: skip
    assert client.audio.speech.create(**said).content == MP3
    with client.audio.speech.with_streaming_response.create(**said) as answer:
        assert b"".join(answer.iter_bytes()) == MP3
    listen = client.audio.transcriptions.create
    assert listen(model="whisper", file=form).text == "Hello"
    assert listen(model="whisper", file=form, response_format="text") == "Hello"
    events = listen(model="chat", file=form, stream=True)
    assert [event.type for event in events] == [event["type"] for event in HEARING]
    picture = ("a.png", MP3, "image/png")
    edited = client.images.edit(model="picture", image=[picture, picture], prompt="x")
    assert edited.data[0].url == "https://a"


def promised(stage: Stage) -> str:
    """Return what a documented model has answered: a URL or DeepSeek's text."""
    links = [*map(volc_image, stage.volc.tasks)]
    return (links or [stage.deep.text])[-1]


DOCUMENTED = ["deepseek-chat", "deepseek-r1", "deepseek-coder", "jimeng-image"]


@pytest.mark.parametrize("model", DOCUMENTED)
def test_the_sdk_chats_and_streams(sdk, real, model):
    real.volc.states = ("generating",) * 8 + ("done",)  # with comments between them
    ask = functools.partial(sdk().chat.completions.create, model=model)
    assert ask(messages=SAY_HELLO).choices[0].message.content == promised(real)
    chunks = ask(messages=SAY_HELLO, stream=True)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts).strip() == promised(real)


def test_the_sdk_gets_usage_where_it_asks(sdk, real):
    real.main.script = [sse(chat_chunks("a b", usage=usage_of(3, 2)))]
    asked = {"messages": SAY_HELLO, "stream_options": {"include_usage": True}}
    *_, last = sdk().chat.completions.create(model="chat", stream=True, **asked)
    assert last.choices == [] and last.usage.total_tokens == 5


CALL = {"name": "add", "arguments": '{"model": "gpt-test", "a": 1}'}
TOOL_CALL = {"index": 0, "id": "call_1", "type": "function", "function": CALL}


def test_the_sdk_calls_tools(sdk, real):
    calls = {"role": "assistant", "tool_calls": [TOOL_CALL]}
    chunks = [chat_chunk("gpt-test", calls), chat_chunk("gpt-test", {}, "tool_calls")]
    whole = chat_json("", finish="tool_calls", **calls)
    real.main.script = [json_answer(whole), sse(chunks)]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    asked = {"model": "chat", "messages": SAY_HELLO, "tools": tools}
    api = sdk().chat.completions
    whole = api.create(**asked).choices[0]
    first, *_ = api.create(**asked, stream=True)
    assert whole.finish_reason == "tool_calls"
    assert real.main.requests[0].json["tools"] == tools
    for call in (whole.message.tool_calls[0], first.choices[0].delta.tool_calls[0]):
        assert call.function.arguments == CALL["arguments"]


def test_the_sdk_makes_images(sdk, real):
    for model in ("jimeng-image", "seedream"):
        images = sdk().images.generate(model=model, prompt="A cat", size="1024x1024")
        assert images.data[0].url.startswith("https://")
    assert real.volc.requests[0].json["width"] == 1024


@pytest.mark.parametrize(
    "model, key, upstreams, error, status, code",
    [
        ("chat", "sk-nobody", 200, "AuthenticationError", 401, "unauthorized"),
        ("nope", TEAM_KEY, 200, "NotFoundError", 404, "model_not_found"),
        ("chat", POOR_KEY, 200, "APIStatusError", 402, "insufficient_credits"),
        ("chat", TEAM_KEY, 400, "BadRequestError", 400, "invalid_request"),
        ("chat", TEAM_KEY, 500, "InternalServerError", 503, DOWN),
        ("chat", TEAM_KEY, 401, "InternalServerError", 503, DOWN),
    ],
)
def test_the_sdk_raises_what_it_should(
    sdk, real, model, key, upstreams, error, status, code
):
    openai = pytest.importorskip("openai")
    real.main.script = [json_answer({}, upstreams)]
    with pytest.raises(getattr(openai, error)) as raised:
        sdk(key).chat.completions.create(model=model, messages=SAY_HELLO)
    assert (raised.value.status_code, raised.value.code) == (status, code)
    assert raised.value.request_id.startswith("req_")


def test_the_sdk_does_not_repeat_what_could_be_billed_twice(sdk, real):
    openai = pytest.importorskip("openai")
    real.volc.script = [None, volc_error(50500)]
    with pytest.raises(openai.InternalServerError):
        sdk(max_retries=2).images.generate(model="jimeng-image", prompt="A cat")
    assert real.volc.submits == 1


RESPONSE_ERROR = {"type": "error", "code": "x", "message": "y", "sequence_number": 3}


def test_azures_client_gets_in_by_its_own_header(sdk, real):
    openai = pytest.importorskip("openai")
    real.main.script = [json_answer(chat_json("hi"))]
    about = {"api_key": TEAM_KEY, "api_version": "2024-10-21", "max_retries": 0}
    with openai.AzureOpenAI(base_url=f"{real.url}/v1/", **about) as azure:
        answer = azure.chat.completions.create(model="chat", messages=SAY_HELLO)
    assert answer.choices[0].message.content == "hi"


# -- Anthropic's SDK -----------------------------------------------------------------


@pytest.fixture
def claude(real: Stage):
    """claude(**how) -> Anthropic's own client of the gateway."""
    anthropic = pytest.importorskip("anthropic")
    made = []

    def make(**how: str) -> Any:
        how = how or {"api_key": TEAM_KEY}
        how = {"base_url": real.url, "max_retries": 0, "timeout": 20, **how}
        made.append(anthropic.Anthropic(**how))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("how", ["api_key", "auth_token"])
@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_anthropics_sdk_gets_in_with_either_key_and_any_base_url(
    claude, real, monkeypatch, how, suffix
):
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    client = claude(**{how: TEAM_KEY, "base_url": real.url + suffix})
    answer = client.messages.create(**MESSAGES)
    assert (answer.content[0].text, answer.model) == ("Hello", "claude")
    assert answer.usage.input_tokens == 50 and answer._request_id.startswith("req_")


def test_anthropics_sdk_streams_counts_and_asks_for_betas(claude, real):
    with claude().messages.stream(**MESSAGES) as stream:
        assert "".join(stream.text_stream) == "Hello"
        final = stream.get_final_message()
    assert (final.model, final.stop_reason) == ("claude", "end_turn")
    assert final.usage.output_tokens == 30
    asked = {"model": "claude", "messages": SAY_HELLO}
    assert claude().messages.count_tokens(**asked).input_tokens == 2095
    beta = claude().beta.messages.create(**MESSAGES, betas=["a-1", "b-2"])
    assert beta.content[0].text == "Hello"
    assert real.claude.requests[-1].header("anthropic-beta") == "a-1,b-2"


@pytest.mark.parametrize(
    "key, model, answer, error, status, kind",
    [
        ("sk-nobody", "claude", None, "AuthenticationError", 401,
         "authentication_error"),
        (POOR_KEY, "claude", None, "APIStatusError", 402, "billing_error"),
        (TEAM_KEY, "echo", None, "NotFoundError", 404, "not_found_error"),
        (TEAM_KEY, "claude", ("invalid_request_error", 400), "BadRequestError", 400,
         "invalid_request_error"),
        (TEAM_KEY, "claude", ("overloaded_error", 529), "InternalServerError", 503,
         "api_error"),
    ],
)  # fmt: skip
def test_anthropics_sdk_raises_what_it_should(
    claude, real, key, model, answer, error, status, kind
):
    anthropic = pytest.importorskip("anthropic")
    real.claude.script = [anthropic_error(*answer)] if answer else []
    with pytest.raises(anthropic.APIStatusError) as raised:
        claude(api_key=key).messages.create(**{**MESSAGES, "model": model})
    assert isinstance(raised.value, getattr(anthropic, error))
    assert (raised.value.status_code, raised.value.type) == (status, kind)
    assert raised.value.request_id.startswith("req_")


# -- All SDKs at once ----------------------------------------------------------------


class Families(Upstream):
    """A server of all three families; the prompt says what becomes of a stream."""

    def answer(self, request: Request) -> None:
        """Answer text, a tool call, or the first events of a stream that breaks."""
        path, tools = request.path.rpartition("/")[2], "tools" in request.json
        prompt = re.search(b"CUT|ERROR|SILENCE|DRAIN", request.body)
        whole, events, half, error = FAMILIES[path]
        ends = {
            "CUT": sse(half, done=False, chunked=False),
            "ERROR": sse([*half, error], done=False),
            "SILENCE": sse(half, gate=threading.Event()),
            "DRAIN": comments(STREAM + sse_bytes(half, done=False)),
        }
        good = either(json_answer(whole[tools]), sse(events, done=path == "completions"))
        ends.get(prompt and prompt[0].decode(), good)(request)


def comments(start: bytes) -> Answer:
    """Send `start`, then comments until the peer leaves."""

    def answer(request: Request) -> None:
        request.send(start)
        while True:
            request.send(b": on\n\n")
            request.wait(None, 0.1)

    return answer


CALLED = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}}
ITS_CALL = {"type": "function_call", "call_id": "call_1", **CALL}
ITS_TEXT = {"type": "message", "content": [{"type": "output_text", "text": "Hello"}]}
ANSWERED = {"id": "resp_1", "object": "response", "status": "completed"}
FAMILIES = {  # an answer and one that calls a tool; a stream; its half; its error
    "completions": (
        [chat_json("Hello"), chat_json("", finish="tool_calls", tool_calls=[TOOL_CALL])],
        chat_chunks("Hello"), HALF, TOLD_SECRET,
    ),
    "responses": (
        [{**ANSWERED, "usage": RESPONSES_USAGE, "output": [item]}
         for item in (ITS_TEXT, ITS_CALL)],
        responses_events(), responses_events()[:2], RESPONSE_ERROR,
    ),
    "messages": (
        [message_json(), message_json(content=[CALLED], stop_reason="tool_use")],
        message_events(), NO_END, OVERLOADED,
    ),
}  # fmt: skip
NODE_PACKAGES = ["openai", "@anthropic-ai/sdk", "ai"]
NODE_PACKAGES += ["@ai-sdk/openai-compatible", "@ai-sdk/anthropic"]
NODE = """
const { OpenAI } = require("openai"), { Anthropic } = require("@anthropic-ai/sdk");
const ai = require("ai"), { createAnthropic } = require("@ai-sdk/anthropic");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
globalThis.AI_SDK_LOG_WARNINGS = false;
const [, url, team, poor, slow] = process.argv, parameters = { type: "object" };
const once = { maxRetries: 0 }, v1 = { ...once, baseURL: url + "/v1" };
const all = async stream => {
  const parts = []; for await (const part of stream) parts.push(part); return parts;
};
const text = async (stream, of) => (await all(await stream)).map(of).join("");
const ids = async list => (await all(list)).map(model => model.id).join();
function aiSdk(model) {
  const tools = { add: ai.tool({ inputSchema: ai.jsonSchema(parameters) }) };
  const ask = (prompt, more) => ai.generateText({ ...once, model, prompt, ...more });
  return {
    chat: async () => (await ask("Hi")).text,
    tool: async () => JSON.stringify((await ask("Hi", { tools })).toolCalls[0].input),
    stream: async prompt => {
      const answer = ai.streamText({ ...once, model, prompt, onError() {} });
      return text(answer.fullStream, part => {
        if (part.type == "error") throw part.error;
        return part.type == "text-delta" ? part.text : "";
      });
    },
  };
}
const clients = {
  "openai, chat"(apiKey) {
    const { chat, models } = new OpenAI({ ...v1, apiKey });
    const ask = (content, more) => chat.completions.create(
      { model: "chat", messages: [{ role: "user", content }], ...more });
    const add = { type: "function", function: { name: "add", parameters } };
    return {
      chat: async () => (await ask("Hi")).choices[0].message.content,
      tool: async () => (await ask("Hi", { tools: [add] }))
        .choices[0].message.tool_calls[0].function.arguments,
      stream: prompt => text(
        ask(prompt, { stream: true }), one => one.choices[0]?.delta.content),
      list: () => ids(models.list()),
    };
  },
  "openai, responses"(apiKey) {
    const { responses } = new OpenAI({ ...v1, apiKey });
    const ask = (input, more) => responses.create({ model: "chat", input, ...more });
    const tools = [{ type: "function", name: "add", parameters }];
    return {
      chat: async () => (await ask("Hi")).output_text,
      tool: async () => (await ask("Hi", { tools })).output[0].arguments,
      stream: prompt => text(ask(prompt, { stream: true }), event => event.delta),
    };
  },
  anthropic(apiKey) {
    const { messages, models } = new Anthropic({ ...once, baseURL: url, apiKey });
    const ask = (content, more) => messages.create({
      model: "claude", max_tokens: 9, messages: [{ role: "user", content }], ...more });
    const tools = [{ name: "add", input_schema: parameters }];
    return {
      chat: async () => (await ask("Hi")).content[0].text,
      tool: async () => JSON.stringify((await ask("Hi", { tools })).content[0].input),
      stream: prompt => text(
        ask(prompt, { stream: true }), event => event.delta?.text),
      list: () => ids(models.list()),
    };
  },
  "ai, openai-compatible": apiKey =>
    aiSdk(createOpenAICompatible({ ...v1, name: "gateway", apiKey })("chat")),
  "ai, anthropic": apiKey => aiSdk(createAnthropic({ ...v1, apiKey })("claude")),
};
const told = {}, tell = async (name, title, call) => {
  try { (told[title] ??= {})[name] = await call(); } catch (error) {
    const { status, statusCode, message } = error;
    told[title][name] = `raised ${status ?? statusCode ?? ""}: ${message}`;
  }
};
const first = [], last = [];
for (const [name, client] of Object.entries(clients)) {
  const { chat, tool, stream, list } = client(team);
  for (const [title, key] of [["401", "sk-nobody"], ["402", poor], ["429", slow]])
    first.push(tell(name, title, client(key).chat));
  for (const prompt of ["CUT", "ERROR", "SILENCE"])
    first.push(tell(name, prompt, () => stream(prompt)));
  first.push(tell(name, "chat", chat), tell(name, "tool", tool));
  first.push(tell(name, "stream", () => stream("Hi")));
  if (list) first.push(tell(name, "list", list));
  last.push(tell(name, "DRAIN", () => stream("DRAIN")));
}
Promise.all(first).then(() => console.log("drain"));
Promise.all([...first, ...last]).then(() => console.log(JSON.stringify(told)));
"""


def python_sdks(url: str) -> dict[str, Callable[[str], Any]]:
    """Return how each Python SDK reads the stream that a prompt leads to."""
    openai, anthropic = map(pytest.importorskip, ("openai", "anthropic"))
    once = {"api_key": TEAM_KEY, "max_retries": 0}
    ours = openai.OpenAI(base_url=f"{url}/v1", **once)
    theirs = anthropic.Anthropic(base_url=url, **once)
    chat = functools.partial(ours.chat.completions.create, model="chat")
    responses = functools.partial(ours.responses.create, model="chat")
    messages = functools.partial(theirs.messages.create, model="claude", max_tokens=9)

    def said(prompt: str) -> dict:
        return {"messages": [{"role": "user", "content": prompt}], "stream": True}

    return {
        "Python, chat": lambda prompt: chat(**said(prompt)),
        "Python, responses": lambda prompt: responses(input=prompt, stream=True),
        "Python, messages": lambda prompt: messages(**said(prompt)),
    }


def outcome(ask: Callable[[str], Any], prompt: str) -> str:
    """Return a stream, or what its SDK raises, as the table of Node.js writes it."""
    try:
        return str([*ask(prompt)])
    except Exception as error:
        return f"raised {getattr(error, 'status_code', '')}: {error}"


def start_node(url: str) -> subprocess.Popen | None:
    """Start the table of Node's SDKs, where they are installed under $NODE_PATH."""
    folder = Path(os.environ.get("NODE_PATH", "/nowhere"))
    if not all((folder / name).is_dir() for name in NODE_PACKAGES):
        return None
    command = ["node", "-e", NODE, url, TEAM_KEY, POOR_KEY, MINUTE_KEY]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


UNAVAILABLE = r"^raised (200|500)?: .*temporarily unavailable"
OF_NODE = {
    "chat": "^Hello$", "stream": "^Hello$", "tool": '"a": ?1}$', "list": "^chat,.*claude",
    "401": "^raised 401: .*invalid API key", "402": "^raised 402: .*credits left",
    "429": "^raised 429: .*Too many requests",
}  # fmt: skip
OF_ALL = {"CUT": UNAVAILABLE, "ERROR": UNAVAILABLE, "SILENCE": UNAVAILABLE}
OF_ALL["DRAIN"] = r"^raised (200|500)?: .*is being restarted"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What every SDK is told, by case and client; a SIGTERM breaks the last streams."""
    folder = tmp_path_factory.mktemp("families")
    seen: dict[str, dict] = {case: {} for case in OF_NODE | OF_ALL}
    slow = {"credits": 1, "keys": {"main": MINUTE_KEY}, "limits": {"rate": "1/hour"}}
    waits = {"STALL_TIMEOUT": 1, "GRACE": 3, "GRACE_MARGIN": 2.7}
    with Families() as up, ThreadPoolExecutor(16) as pool:
        claude = {"url": f"anthropic+{up.url}", "key": SECRET}
        model = {"upstream": "claude/claude-id", **TOKENS}
        more = {"accounts": {"slow": slow}, "upstreams": {"claude": claude}}
        keys = keys_file(folder, up.url, **more, models={"claude": model})
        with Gateway(keys, threads=64, constants=waits) as server:
            assert chat(server.url, MINUTE_KEY).ok
            node, sdks = start_node(server.url), python_sdks(server.url)
            calls = {
                (case, name): pool.submit(outcome, ask, case)
                for case in OF_ALL
                for name, ask in sdks.items()
            }
            assert node is None or node.stdout.readline() == b"drain\n"
            for (case, _), call in calls.items():
                if case != "DRAIN":
                    call.result()
            streams = len(sdks) + (5 if node else 0)
            drained = lambda: sum(b"DRAIN" in one.body for one in up.requests)
            wait_for(lambda: drained() == streams, 20, "the last streams")
            time.sleep(0.3)  # in which their first events reach the clients
            server.kill(server.master_pid, signal.SIGTERM)
            for (case, name), call in calls.items():
                seen[case][name] = call.result()
            for case, names in json.load(node.stdout).items() if node else ():
                seen[case] |= names
            server.process.wait(10)
    assert proof(folder) == []
    return seen


def not_told(outcomes: dict[str, str], words: str) -> dict[str, str]:
    """Return what the clients were told that does not match."""
    return {name: one for name, one in outcomes.items() if not re.search(words, one)}


@pytest.mark.parametrize("case", OF_NODE)
def test_nodes_sdks_get_what_they_ask_for_and_the_reason_where_not(outcomes, case):
    if not outcomes[case]:
        pytest.skip("needs Node's SDKs under $NODE_PATH")
    assert not not_told(outcomes[case], OF_NODE[case])


@pytest.mark.parametrize("case", OF_ALL)
def test_every_sdk_raises_in_a_stream_that_breaks(outcomes, case):
    assert outcomes[case] and not not_told(outcomes[case], OF_ALL[case])


# Application -------------------------------------------------------------------------

CHAT = "/v1/chat/completions"
HELLO = {"model": "echo", "messages": [{"role": "user", "content": "Hello out there"}]}


def code_of(answer: Any) -> tuple[int, str]:
    """Return an answer's status and code, having looked at its envelope."""
    return answer.status_code, error_of(answer)["code"]


class Api:
    """An app in this process, asked as a client would."""

    def __init__(self, app: Any) -> None:
        self.client, self.services = app.test_client(), app.extensions["proxy"]

    def send(
        self, method: str, path: str, key: str | None = TEAM_KEY, **more: Any
    ) -> Any:
        headers = bearer(key) if key else {}
        return self.client.open(path, method=method, headers=headers, **more)

    def __call__(
        self, method: str, path: str, key: str = TEAM_KEY, /, **body: Any
    ) -> Any:
        more = {"json": body} if method in ("POST", "PATCH") else {}
        return self.send(method, path, key, **more)

    def get(self, path: str, key: str = TEAM_KEY) -> Any:
        """The JSON of a GET that succeeds."""
        answer = self("GET", path, key)
        assert answer.status_code == 200, answer.text
        return answer.json

    def post(self, path: str, key: str = TEAM_KEY, /, **body: Any) -> Any:
        """The JSON of a POST that makes something."""
        answer = self("POST", path, key, **body)
        assert answer.status_code == 201, answer.text
        return answer.json

    def say(self, words: str, key: str = TEAM_KEY, **body: Any) -> str:
        """The id of a request to echo, which costs two micro-credits a word."""
        messages = [{"role": "user", "content": words}]
        whole = {"model": "echo", "messages": messages, **body}
        answer = self("POST", CHAT, key, **whole)
        assert answer.status_code == 200 and answer.data
        return answer.headers["x-request-id"]

    def refusal(
        self, method: str, path: str, key: str = TEAM_KEY, /, **body: Any
    ) -> tuple[int, str]:
        """Status and code of a request that is refused."""
        return code_of(self(method, path, key, **body))

    def ids(self, query: str = "", key: str = TEAM_KEY) -> list[str]:
        """The ids of a page of requests."""
        page = self.get(f"/v1/account/requests{query}", key)
        return [row["id"] for row in page["data"]]

    def log(self, capfd: pytest.CaptureFixture) -> list[str]:
        """The lines of the log that were not seen yet."""
        self.services.log.flush()
        return capfd.readouterr().err.splitlines()


@pytest.fixture
def api(app: Callable) -> Api:
    return Api(app())


@pytest.fixture
def shared(in_process: InProcess) -> Api:
    """An app of many tests, for those that change nothing."""
    return Api(in_process.app)


@pytest.fixture
def ask(api: Api) -> Callable:
    """ask(method, path, key, ...) -> the answer of an app with the usual keys."""
    return api.send


@pytest.mark.parametrize("pad", ["", "x" * (1 << 20)], ids=["small", "large"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_body_leaves_the_room_once_its_answer_has_begun(stream, pad, app):
    made = app()
    room, asked = made.extensions["proxy"].room, {"Authorization": f"Bearer {TEAM_KEY}"}
    body = {"model": "echo", "messages": SAY_HELLO, "stream": stream, "pad": pad}
    for body["model"] in ("echo", "nothing"):
        answer = made.test_client().post("/v1/chat/completions", json=body, headers=asked)
        assert proxy.BODY_ROOM - room.free < 1000, answer.status  # a JSON answer stands
        assert answer.data
        answer.close()
        assert room.free == proxy.BODY_ROOM


def test_401_is_one_identical_answer(api):
    text, key = api.services.ledger.make_key("team", "gone")
    api.services.ledger.revoke(key)
    headers = ["", "Bearer", "Bearer ", "Bearer x", f"Basic {TEAM_KEY}", TEAM_KEY]
    headers += ["Bearer sk-unknown", f"Bearer {text}", f"Bearer {TEAM_KEY} more"]
    headers += [f"Bearer {TEAM_KEY}{more}" for more in (f", Bearer {TEAM_KEY}", ",")]
    headers += [f"Bearer {odd}" for odd in ("sk-\xff\xfe", "x" * 5000, "'; DROP TABLE")]
    told = set()
    for more in [{}, *({"HTTP_AUTHORIZATION": header} for header in headers)]:
        answer = api.send("POST", CHAT, None, json=HELLO, environ_overrides=more)
        about = {k: v for k, v in answer.headers.items() if k != "x-request-id"}
        told.add((*code_of(answer), answer.data, *about.items()))
    assert len(told) == 1
    assert told.pop()[:2] == (401, "unauthorized")


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"x-api-key": TEAM_KEY}, 200),
        ({"api-key": TEAM_KEY}, 200),
        ({"x-api-key": TEAM_KEY, "api-key": "sk-nobody"}, 200),
        ({"Authorization": "Bearer sk-nobody", "x-api-key": TEAM_KEY}, 401),
        ({"Authorization": f"Basic {TEAM_KEY}", "x-api-key": TEAM_KEY}, 401),
        ({**bearer(TEAM_KEY), "x-api-key": "sk-nobody"}, 200),
        ({"x-api-key": f"{TEAM_KEY},{TEAM_KEY}"}, 401),
        ({"x-api-key": f"Bearer {TEAM_KEY}"}, 401),
    ],
)
def test_a_key_comes_as_a_bearer_or_where_there_is_none_in_its_own_header(
    api, headers, status
):
    for path in ("/v1/models", "/v1/account"):
        assert api.client.get(path, headers=headers).status_code == status
    assert api.client.post(CHAT, json=HELLO, headers=headers).status_code == status


@pytest.mark.parametrize("form", ["Bearer %s", "bearer %s", "BEARER   %s "])
def test_a_key_is_known_by_its_hash(app, form):
    digest = hashlib.sha256(b"sk-hashed-key").hexdigest()
    accounts = {"team": {"keys": {"hashed": f"sha256:{digest}"}}}
    headers = {"Authorization": form % "sk-hashed-key"}
    answer = app(accounts=accounts).test_client().get("/v1/models", headers=headers)
    assert answer.status_code == 200


def test_a_model_one_may_not_use_looks_like_one_that_is_not_there(shared):
    def told(model: str) -> list[str]:
        ways = [shared("POST", CHAT, DEMO_KEY, **HELLO | {"model": model})]
        ways += [shared("GET", f"/v1/models/{model}", DEMO_KEY)]
        assert {code_of(way) for way in ways} == {(404, "model_not_found")}
        return [way.text.replace(model, "MODEL") for way in ways]

    assert told("chat") == told("nope")


def test_the_models_are_those_the_account_may_use(api):
    mine, all = api.get("/v1/models", DEMO_KEY), api.get("/v1/models")
    assert mine["object"] == "list"
    assert [model["id"] for model in mine["data"]] == ["echo"]
    assert {"chat", "echo", "embed"} <= {model["id"] for model in all["data"]}
    one = api.get("/v1/models/chat")
    assert one in all["data"] and {*one} >= {"created", "owned_by"}
    assert (one["id"], one["object"]) == ("chat", "model")
    about = api.get("/v1/account", DEMO_KEY)
    assert [model["id"] for model in about["models"]] == ["echo"]


ANSWERS = [  # method, path, status, code
    ("GET", "/nothing", 404, "not_found"),
    ("GET", "/v2/models", 404, "not_found"),
    ("POST", "/v1/", 404, "not_found"),
    ("POST", "/v1/chat/../admin", 404, "not_found"),
    ("POST", "/v1/Chat/Completions", 404, "not_found"),
    ("POST", "/nothing/chat/completions", 404, "not_found"),
    ("POST", "/v1/v1/", 404, "not_found"),
    ("GET", "/v1/nothing", 404, "not_found"),
    ("OPTIONS", "/v1/nothing", 404, "not_found"),
    ("DELETE", "/v1/chat", 404, "not_found"),
    ("GET", "/v1/responses/resp_1", 404, "not_found"),
    ("GET", "/v1/account/nothing", 404, "not_found"),
    ("GET", "/v1/models/a//b", 404, "model_not_found"),
    ("GET", "/v1/embeddings", 405, "method_not_allowed"),
    ("GET", "/embeddings/", 405, "method_not_allowed"),
    ("POST", "/v1/account", 405, "method_not_allowed"),
    ("DELETE", "/v1/models/chat", 405, "method_not_allowed"),
    ("GET", CHAT, 405, "method_not_allowed"),
    ("DELETE", CHAT, 405, "method_not_allowed"),
    ("POST", "/healthz", 405, "method_not_allowed"),
    ("TRACE", "/healthz", 405, "method_not_allowed"),
    ("PUT", "/v1/models", 405, "method_not_allowed"),
]


@pytest.mark.parametrize("method, path, status, code", ANSWERS)
def test_what_is_not_served_is_told_in_the_envelope(shared, method, path, status, code):
    answer = shared.send(method, path, json=HELLO)
    assert code_of(answer) == (status, code)
    assert answer.headers["x-request-id"].startswith("req_")
    assert ("Allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize(
    "method, path, status, kind",
    [
        ("GET", "/v1/messages", 405, "invalid_request_error"),
        ("PUT", "/messages/count_tokens", 405, "invalid_request_error"),
        ("GET", "/v1/messages/batches", 404, "not_found_error"),
        ("POST", "/v1//messages/", 415, "invalid_request_error"),
    ],
)
def test_what_is_not_served_of_messages_is_told_in_anthropics_shape(
    shared, method, path, status, kind
):
    answer = shared.send(method, path)
    assert (answer.status_code, kind_of(answer)) == (status, kind)


FOLDED = {
    "/v1/chat/completions": (
        "//v1/chat/completions", "/v1//chat/completions", "/v1/chat//completions",
        "/v1/chat/completions/", "/v1/chat/completions//", "/v1/v1/chat/completions",
        "/v1//v1/v1/chat/completions", "/chat/completions", "//chat//completions/",
    ),
    "/v1/messages": ("/messages", "/v1/v1/messages", "/v1//messages"),
    "/v1/embeddings": ("/openai/deployments/o1/embeddings", "/v1/deployments/o/embeddings"),
    "/v1/responses/compact": ("/responses/compact", "/v1/responses/compact/"),
    "/v1/models": ("/models", "/models/", "/v1/models/", "/v1/v1/models", "//models"),
    "/v1/models/a/b": ("/models/a/b", "/v1/v1/models/a/b", "//v1//models/a/b"),
    "/v1/models/a//b/": ("/models/a//b/", "/v1/models/a//b/"),
    "/v1/models/v1/v1/x": ("/models/v1/v1/x", "/v1/v1/models/v1/v1/x"),
    "/v1/account/keys": ("/v1//account/keys/", "/v1/v1/account/keys"),
    "/v1/": ("/v1/", "/v1/v1/"),
    "/account": ("/account", "/account/", "//account"),
    "/v1x/chat": ("/v1x/chat",),
    "/": ("/", "//", ""),
}  # fmt: skip


@pytest.mark.parametrize(
    "meant, path", [(meant, path) for meant, paths in FOLDED.items() for path in paths]
)
def test_a_base_url_is_folded_as_it_was_meant(meant, path):
    assert proxy.fold_path(path) == proxy.fold_path(meant) == meant


@pytest.mark.parametrize("path", [p for p in FOLDED[CHAT] if p[:2] != "//"])
def test_every_spelling_of_a_base_url_is_served_and_checked_as_chat(shared, path):
    assert shared("POST", path, **HELLO).status_code == 200
    refused = shared.refusal("POST", path, **{**HELLO, "messages": "x"})
    assert refused == (400, "invalid_request")


PAGE = "http://localhost:3000"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}
CORS = "Access-Control-Allow-Origin"


@pytest.mark.parametrize("origins", [[PAGE], ["*"], ["app://other", PAGE]])
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/models", "/v1/account/keys"])
def test_a_preflight_of_an_allowed_origin_needs_no_key(app, origins, path):
    answer = app(cors=origins).test_client().options(path, headers=PREFLIGHT)
    assert (answer.status_code, answer.data) == (204, b"")
    told = answer.headers
    assert (told[CORS], told["Vary"]) == (PAGE, "Origin")
    asked = PREFLIGHT["Access-Control-Request-Headers"]
    assert told["Access-Control-Allow-Headers"] == asked
    methods = told["Access-Control-Allow-Methods"].split(", ")
    assert {*methods} >= {"GET", "POST", "PATCH", "DELETE"}


TOLD_TO_PAGES = [  # method, path, key, body, status
    ("POST", CHAT, TEAM_KEY, HELLO, 200),
    ("POST", CHAT, TEAM_KEY, {**HELLO, "stream": True}, 200),
    ("POST", CHAT, "sk-nobody", HELLO, 401),
    ("POST", CHAT, POOR_KEY, HELLO, 402),
    ("POST", CHAT, TEAM_KEY, {**HELLO, "model": "chat"}, 503),
    ("GET", "/v1/models", TEAM_KEY, None, 200),
    ("GET", CHAT, TEAM_KEY, None, 405),
    ("GET", "/nothing", TEAM_KEY, None, 404),
]


@pytest.mark.parametrize(
    "cors, origin, allowed",
    [
        ([PAGE], PAGE, True),
        (["*"], "null", True),
        ([PAGE], "http://localhost:3001", False),
        ([PAGE], None, False),
        (None, PAGE, False),
    ],
)
def test_an_allowed_origin_may_read_every_answer_and_no_other_one_any(
    app, cors, origin, allowed
):
    client = app(cors=cors).test_client()
    for method, path, key, body, status in TOLD_TO_PAGES:
        headers = bearer(key) | ({"Origin": origin} if origin else {})
        answer = client.open(path, method=method, json=body, headers=headers)
        assert answer.status_code == status and answer.data
        names = [name for name in answer.headers.keys() if name.startswith("Access-")]
        assert bool(names) == allowed
        assert answer.headers.get(CORS) == (origin if allowed else None)
        exposed = answer.headers.get("Access-Control-Expose-Headers", "")
        wanted = {"x-request-id", "retry-after", "x-ratelimit-remaining-requests"}
        assert wanted <= {*exposed.split(", ")} or not allowed


@pytest.mark.parametrize(
    "cors, changed",
    [
        (None, {}),
        ([PAGE], {"Origin": "http://localhost:3001"}),
        ([PAGE], {"Origin": f"{PAGE}.evil.example"}),
        ([PAGE], {"Access-Control-Request-Method": None}),
    ],
)
def test_what_is_no_preflight_of_an_allowed_origin_needs_a_key(app, cors, changed):
    headers = {k: v for k, v in {**PREFLIGHT, **changed}.items() if v}
    answer = app(cors=cors).test_client().options("/v1/models", headers=headers)
    assert code_of(answer) == (401, "unauthorized")


HALF_PAIR = r'"messages": [{"role": "user", "content": "half \ud83d a pair"}]'
AS_JSON = {"content_type": "application/json"}


@pytest.mark.parametrize("model", ["echo", "chat"])
@pytest.mark.parametrize("stream", ["true", "false"])
def test_half_a_surrogate_pair_is_a_bad_request_and_leaves_no_hold(api, model, stream):
    data = f'{{"model": "{model}", "stream": {stream}, {HALF_PAIR}}}'
    answer = api.send("POST", CHAT, data=data, **AS_JSON)
    assert code_of(answer) == (400, "invalid_request")
    assert api.services.ledger.read("SELECT id FROM requests WHERE state != 2") == []


@pytest.mark.parametrize("opening, closing", [(b"[", b"]"), (b'{"a":', b"}")])
def test_no_depth_of_nesting_is_an_error_of_ours(api, opening, closing):
    start = json.dumps(HELLO).encode()[:-1] + b', "x": '
    bodies = (start + opening * n + b"1" + closing * n + b"}" for n in range(880, 1000, 3))
    answers = [api.send("POST", CHAT, data=data, **AS_JSON) for data in bodies]
    assert {answer.status_code for answer in answers} == {200, 400}


def test_an_exception_in_a_view_is_a_500_that_tells_nothing(api, monkeypatch, capfd):
    def fail(*_: Any) -> None:
        raise RuntimeError("the prompt was: sesame")

    monkeypatch.setattr(proxy, "parse_call", fail)
    answer = api("POST", CHAT, **HELLO)
    assert code_of(answer) == (500, "internal_error")
    log = "\n".join(api.log(capfd))
    assert "RuntimeError" in log and answer.headers["x-request-id"] in log
    assert "sesame" not in answer.text + log


def test_every_answer_has_its_own_request_id(shared):
    asked = [
        ("GET", "/healthz", None), ("GET", "/v1/models", TEAM_KEY),
        ("GET", "/v1/models", None), ("GET", "/nothing", None), ("DELETE", CHAT, None),
        ("POST", CHAT, TEAM_KEY), ("POST", CHAT, POOR_KEY),
    ] * 2  # fmt: skip
    ids = {shared.send(*each, json=HELLO).headers["x-request-id"] for each in asked}
    assert len(ids) == len(asked)


def test_healthz_needs_no_key(shared):
    answer = shared.send("GET", "/healthz", None)
    assert (answer.status_code, answer.mimetype) == (200, "application/json")


def rates(answer: Any) -> list[str]:
    """Return the values of the x-ratelimit headers: limit, remaining, reset."""
    kinds = "limit", "remaining", "reset"
    return [answer.headers[f"x-ratelimit-{kind}-requests"] for kind in kinds]


def test_429_after_the_keys_rate_and_the_headers_count_down(app):
    accounts = {"team": {"limits": {"rate": "2/minute"}, "keys": {"second": "sk-2nd"}}}
    api = Api(app(accounts=accounts))
    answers = [api("POST", CHAT, **HELLO) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
    left = [rates(answer)[:2] for answer in answers]
    assert left == [["2", "1"], ["2", "0"], ["2", "0"], ["2", "0"]]
    assert all(0 < float(rates(answer)[2].rstrip("s")) <= 60 for answer in answers)
    assert code_of(answers[3]) == (429, "rate_limit_exceeded")
    assert 55 <= int(answers[3].headers["Retry-After"]) <= 60
    api.say("a", "sk-2nd")


COUNTED = {  # refusals: what is asked of whom, the answer, whether it counts
    "its JSON": (TEAM_KEY, {"data": "{"}, 400, "invalid_request", True),
    "nothing": (TEAM_KEY, {"data": ""}, 400, "invalid_request", True),
    "a field": (TEAM_KEY, HELLO | {"n": 0}, 400, "invalid_request", True),
    "its price": (TEAM_KEY, HELLO | {"speed": "fast"}, 400, "invalid_request", True),
    "its type": (TEAM_KEY, {"data": "{}", "content_type": "text/plain"}, 415,
                 "unsupported_media_type", True),
    "no type": (TEAM_KEY, {"data": "{}", "content_type": None}, 415,
                "unsupported_media_type", True),
    "its size": (TEAM_KEY, {"data": b" " * (proxy.MAX_BODY + 1)}, 413,
                 "request_too_large", True),
    "its model": (TEAM_KEY, HELLO | {"model": "../passwd"}, 404, "model_not_found", True),
    "a NUL": (TEAM_KEY, HELLO | {"model": "echo\0"}, 400, "invalid_request", True),
    "its credits": (POOR_KEY, HELLO, 402, "insufficient_credits", True),
    "no provider": (TEAM_KEY, HELLO | {"model": "chat"}, 503, "provider_unavailable", True),
    "its key": ("sk-wrong", HELLO, 401, "unauthorized", False),
}  # fmt: skip


@pytest.mark.parametrize("why", COUNTED)
def test_a_refused_request_is_free_and_counts_unless_its_key_is_wrong(app, why):
    key, ask, status, code, counts = COUNTED[why]
    accounts = {name: {"limits": {"rate": "9/minute;8/hour"}} for name in ("team", "poor")}
    api = Api(app(accounts=accounts))
    who = TEAM_KEY if key == "sk-wrong" else key
    ask = AS_JSON | ask if "data" in ask else {"json": ask}
    answer = api.send("POST", CHAT, key, **ask)
    assert code_of(answer) == (status, code)
    assert answer.headers.get("x-ratelimit-remaining-requests", "8") == str(8 - counts)
    assert api.get("/v1/account", who)["live"]["requests_remaining"] == 8 - counts
    assert api.services.ledger.read("SELECT 1 FROM requests WHERE state != 2") == []


def test_a_request_for_which_there_is_no_room_counts(app):
    api = Api(app(accounts={"team": {"limits": {"rate": "9/minute"}}}))
    api.services.capacity = 0
    answer = api("POST", CHAT, **HELLO)
    assert code_of(answer) == (503, "overloaded") and rates(answer)[:2] == ["9", "8"]


def test_one_too_many_at_once_counts(app):
    limits = {"rate": "9/minute", "concurrent": 1}
    api = Api(app(accounts={"team": {"limits": limits}}))
    ledger, account = api.services.ledger, api.services.config.account("team")
    [key] = account.keys
    running = ledger.admit("req_x", key, account, proxy.Quote(0, 0, 0), "m", "p", False)
    answer = api("POST", CHAT, **HELLO)
    assert answer.status_code == 429 and rates(answer)[:2] == ["9", "8"]
    release(ledger, running.outcome)


@pytest.mark.parametrize(
    "rate, limit", [("3/minute;50/hour", 3), ("50/second;2/minute", 2)]
)
def test_of_several_windows_the_tightest_is_told(app, rate, limit):
    api = Api(app(accounts={"team": {"limits": {"rate": rate}}}))
    assert rates(api("POST", CHAT, **HELLO))[0] == str(limit)
    live = api.get("/v1/account")["live"]
    assert (live["requests_limit"], live["requests_remaining"]) == (limit, limit - 1)


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", CHAT, 405), ("POST", "/v2/x", 404), ("POST", "/v1/accounts/alice", 405),
        ("POST", "/v1/accounts/alice/grant", 404), ("POST", "/v1/account/key", 404),
        ("POST", "/v1/account", 405), ("POST", "/v1/models/chat", 405),
        ("POST", "/v1/models", 405),
    ],
)  # fmt: skip
def test_an_answer_to_a_key_tells_its_limits_even_where_nothing_is(
    shared, method, path, status
):
    known, unknown = (shared(method, path, key, **HELLO) for key in (TEAM_KEY, "sk-unknown"))
    assert known.status_code == unknown.status_code == status
    assert rates(known)[0] == "300"
    assert "x-ratelimit-limit-requests" not in unknown.headers


@pytest.mark.parametrize(
    "path, key, body, told, who",
    [
        (CHAT, None, HELLO, '401 code=unauthorized model=""', '"" key=""'),
        (CHAT, TEAM_KEY, {}, '400 code=invalid_request model=""', "team key=main"),
        (CHAT, TEAM_KEY, HELLO | {"model": "x y"}, '404 code=model_not_found model=""',
         "team key=main"),
        (CHAT, POOR_KEY, HELLO, "402 code=insufficient_credits model=echo",
         "poor key=main"),
        ("/v2/secret-path", TEAM_KEY, {}, '404 code=not_found model=""', "team key=main"),
    ],
)  # fmt: skip
def test_a_refused_request_is_one_line_of_the_log(
    api, capfd, path, key, body, told, who
):
    id = api.send("POST", path, key, json=body).headers["x-request-id"]
    (line,) = api.log(capfd)
    assert f"event=request request={id} account={who} " in line
    assert line.endswith(f" status={told} client=127.0.0.1") and "secret" not in line


def test_a_request_is_one_line_of_the_log(api, capfd):
    id = api.say("Hello out there")
    [line] = [line for line in api.log(capfd) if id in line]
    told = dict(pair.split("=", 1) for pair in line.split(" "))
    wanted = {"event": "request", "request": id, "account": "team", "key": "main"}
    wanted |= {"model": "echo", "status": "200", "cost": "0.000006", "estimated": "0"}
    wanted |= {"input": "3", "cached": "0", "written": "0", "output": "3", "images": "0"}
    assert told | wanted == told
    assert 0 <= int(told["ttfb_ms"]) <= int(told["duration_ms"])


def test_a_broken_file_is_logged_once_and_the_last_good_one_serves(
    app, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(proxy.Watcher, "_run", lambda self: None)  # no upkeep but ours
    monkeypatch.setattr(proxy.RequestLog, "flush", FLUSH)
    path = tmp_path / "keys.json"
    workers = [Api(app()) for _ in range(2)]
    good = path.read_text()
    path.write_text('{"limits":\n{"rate": oops}}')
    for worker in workers * 3:
        worker.services.upkeep()
    assert workers[0].get("/v1/models") == workers[1].get("/v1/models")
    path.write_text(good)  # for the check after the test
    log = capfd.readouterr().err
    assert log.count("event=config") == 1 and "line 2" in log
    for text in good, good + " ":  # the recovery is told, and a good edit
        path.write_text(text)
        for worker in workers * 3:
            worker.services.upkeep()
        log = capfd.readouterr().err
        assert log.count("event=config") == log.count("read again, and good") == 1


def test_an_app_made_before_a_fork_serves_nothing(api, monkeypatch):
    monkeypatch.setattr(api.services, "pid", 1)
    assert api.refusal("POST", CHAT, **HELLO) == (503, "ledger_unavailable")


# -- The ledger in trouble -----------------------------------------------------------


def test_the_last_byte_leaves_after_the_charge_is_on_disk(syncs, api):
    answer = api("POST", CHAT, **HELLO, stream=True)
    for piece in answer.response:
        syncs.append(piece)
    answer.close()
    before, after = b"".join(syncs).split(SYNC)
    assert b"Hello" in before and b"[DONE]" not in before
    assert after.count(b"[DONE]") == 1


def test_a_json_answer_leaves_after_the_charge_is_on_disk(syncs, api):
    api.say("Hello out there")
    assert syncs == [SYNC]


UNAVAILABLE = "ledger_unavailable"
COMMIT_ERRORS = [
    sqlite3.OperationalError("disk I/O error"), OSError(28, "No space left on device"),
    ValueError("file descriptor cannot be a negative integer"), MemoryError(),
]  # fmt: skip
COMMIT_FAILS = pytest.mark.parametrize(
    "error", COMMIT_ERRORS, ids=[type(error).__name__ for error in COMMIT_ERRORS]
)


@COMMIT_FAILS
def test_a_ledger_that_cannot_be_written_is_never_a_free_call(
    failing, app, capfd, monkeypatch, error
):
    def health() -> int:
        return api("GET", "/healthz").status_code

    monkeypatch.setattr(proxy, "SWEEP_INTERVAL", 0.05)
    with Upstream(json_answer(chat_json("hi"))) as up:
        api = Api(app(up.url))
        failing.error = error
        answer = api("POST", CHAT, model="chat", messages=SAY_HELLO)
        wait_for(lambda: health() == 503, what="trouble")
        failing.error = None
        wait_for(lambda: health() == 200, what="recovery")
        assert code_of(answer) == (503, UNAVAILABLE) and up.requests == []
        assert answer.headers["Retry-After"] == "5"
        assert api("POST", CHAT, model="chat", messages=SAY_HELLO).status_code == 200
    told = f"request={answer.headers['x-request-id']} reason=\"{type(error).__name__}"
    assert sum(f"event=ledger {told}" in line for line in api.log(capfd)) == 1


@COMMIT_FAILS
@pytest.mark.parametrize(
    "stream, patience, status, end, paid",
    [
        (False, 10, 200, b'"stop"', 9), (False, 0, 503, UNAVAILABLE.encode(), 0),
        (True, 10, 200, b"[DONE]", 9), (True, 0, 200, UNAVAILABLE.encode(), 9),
    ],
    ids=["whole", "whole, too late", "stream", "stream, too late"],
)  # fmt: skip
def test_what_fails_between_commit_and_answer_ends_as_stated(
    failing, app, monkeypatch, capfd, error, stream, patience, status, end, paid
):
    """Complete and charged, or told: a whole answer is free then, of a stream what
    came is charged. The ledger's thread lives on and the log is written."""
    ways = {True: sse(chat_chunks("one two")), False: json_answer(chat_json("one two"))}

    def answer(request: Request) -> None:
        failing.error = error
        ways[stream](request)

    def mend(*_: Any) -> None:
        failing.error = None

    for name, seconds in ("SWEEP_INTERVAL", 0.05), ("WATCH_INTERVAL", 0.02):
        monkeypatch.setattr(proxy, name, seconds)
    monkeypatch.setattr(proxy, "SETTLE_PATIENCE", patience)
    monkeypatch.setattr(proxy.Watch, "sleep", mend)  # between two attempts
    monkeypatch.setattr(proxy.RequestLog, "flush", FLUSH)  # by its own thread, too
    with Upstream(answer) as up:
        api = Api(app(up.url))
        told = api("POST", CHAT, model="chat", messages=SAY_HELLO, stream=stream)
        body = told.data
        told.close()
    assert told.status_code == status
    assert re.findall(rb'ledger_unavailable|\[DONE\]|"stop"', body)[-1] == end
    mend()
    rows = "SELECT cost FROM requests WHERE state != 0 AND id = ?"
    id, read = told.headers["x-request-id"], api.services.ledger.read
    assert wait_for(lambda: read(rows, id), what="its end") == [(paid,)]
    wait_for(lambda: api("GET", "/healthz").status_code == 200, what="its health")
    last, log = api.say("a"), []
    wait_for(lambda: log.append(capfd.readouterr().err) or last in "".join(log))
    assert f"request={id} account=team" in "".join(log)


@pytest.mark.parametrize("asked", [[], [TEAM_KEY]], ids=["unread", "read"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_ledger_is_a_503_and_never_a_401(tmp_path, damage, asked):
    db = tmp_path / "proxy.db"
    api = Api(proxy.create_app(keys_file(tmp_path, "http://127.0.0.1:9"), db))
    made, _ = api.services.ledger.make_key("team", "made at run time")
    with closing(api.services):
        for key in asked:
            api.say("a", key)
        damage(db)
        for key in (made, made, TEAM_KEY, "sk-unknown"):
            assert api.refusal("POST", CHAT, key, **HELLO) == (503, UNAVAILABLE)


def altered(sql: str) -> Callable[[Path], None]:
    """What runs this statement on a ledger that nobody has open."""
    return lambda db: alter(SimpleNamespace(path=db), sql)


UNUSABLE = {  # what may be wrong with a ledger, and how it is told
    "no folder": (lambda db: shutil.rmtree(db.parent), "No such file"),
    "a folder": (replace_by_a_folder, "unable to open"),
    "another file": (lambda db: db.write_text("no ledger" * 999), "not a database"),
    "another schema": (altered("DROP TRIGGER resolved"), "is damaged: its resolved"),
    "a newer one": (altered("PRAGMA user_version = 99"), "is of a newer proxy.py"),
}


@pytest.mark.parametrize("wrong", UNUSABLE)
def test_an_app_whose_ledger_is_unusable_says_so_until_it_is_usable(
    tmp_path, capfd, monkeypatch, wrong
):
    monkeypatch.setattr(proxy, "SWEEP_INTERVAL", 0.05)
    db, (spoil, words) = tmp_path / "disk" / "proxy.db", UNUSABLE[wrong]
    db.parent.mkdir()
    with closing(proxy.Ledger(db)) as ledger:
        key, _ = ledger.make_key("team", "made")
    shutil.copytree(db.parent, tmp_path / "kept")
    spoil(db)
    api = Api(proxy.create_app(keys_file(tmp_path, "http://127.0.0.1:9"), db))
    [line] = api.log(capfd)
    assert re.fullmatch(r'time=\S+ event=ledger reason="([^"\\]|\\.)*"', line)
    assert words in line
    rules, start = api.client.application.url_map.iter_rules(), time.monotonic()
    asked = [one for one in rules if one.endpoint not in proxy.PUBLIC - {"healthz"}]
    with closing(api.services):
        for rule in asked:
            path = re.sub("<any.*?>", "models", rule.rule)
            path = re.sub("<.*?>", "x", path)
            for method in rule.methods - {"HEAD", "OPTIONS"}:
                answer = api.send(method, path, key, json=HELLO)
                assert code_of(answer) == (503, UNAVAILABLE), (method, path)
        assert len(asked) > 20 and time.monotonic() - start < 10  # none waits for five
        with suppress(FileNotFoundError):
            db.parent.rename(tmp_path / "spoiled")
        (tmp_path / "kept").rename(db.parent)
        wait_for(lambda: api.send("GET", "/healthz", None).status_code == 200)
        api.say("a", key)
    with closing(proxy.Ledger(db)) as ledger:
        assert ledger.read("SELECT state, cost FROM requests") == [(proxy.SETTLED, 2)]
        assert ledger.check() == []


# -- Account API ---------------------------------------------------------------------

KEY_FIELDS = {
    "id", "account", "name", "hint", "source", "admin", "created", "last_used",
    "revoked", "expires", "budget", "models", "limits", "metrics",
}  # fmt: skip


def test_an_account_sees_its_credits_limits_models_and_keys(api):
    api.say("one two three")
    about = api.get("/v1/account")
    left = {"granted": 100, "spent": 0.000006, "held": 0, "available": 99.999994}
    assert about["credits"] == left
    assert about["limits"] == {"rate": "1000/minute", "concurrent": 100}
    assert (about["id"], about["admin"]) == ("team", False)
    prices = {model["id"]: model["price"] for model in about["models"]}
    assert prices["chat"] == {"input": 1, "cached": 0.1, "output": 2}
    assert prices["jimeng-image"] == {"image": 0.04}
    [key] = about["keys"]
    assert (set(key), key["name"]) == (KEY_FIELDS, "main")
    assert TEAM_KEY not in json.dumps(about)


def test_a_receipt_tells_what_became_of_a_request(api):
    before = time.time()
    id = api.say("one two three")
    receipt = api.get(f"/v1/account/requests/{id}")
    assert before - 1 < receipt.pop("created") < time.time() + 1
    assert 0 <= receipt.pop("ttfb_ms") <= receipt.pop("duration_ms") < 5000
    assert receipt == {
        "id": id, "account": "team", "key": "main", "model": "echo",
        "path": "chat/completions", "state": "settled", "status": 200, "stream": False,
        "input_tokens": 3, "cached_tokens": 0, "written_tokens": 0, "output_tokens": 3,
        "images": 0, "estimated": False, "credits": 0.000006, "code": None,
        "upstream": "echo", "attempts": 1,
    }  # fmt: skip


def test_requests_are_paged_newest_first(api):
    made, after, seen, more = [api.say("a") for _ in range(6)], "", [], []
    for _ in range(3):
        page = api.get(f"/v1/account/requests?limit=2{after}")
        seen += [row["id"] for row in page["data"]]
        more.append(page["has_more"])
        after = f"&after={seen[-1]}"
    assert seen == sorted(made, reverse=True) == sorted(api.ids(), reverse=True)
    assert more == [True, True, False]


def test_requests_are_filtered_by_time(api, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(proxy.time, "time", lambda: clock[0])
    monkeypatch.setattr(proxy.time, "time_ns", lambda: int(clock[0] * 1000) * 10**6)
    made = []
    for clock[0] in (1_700_000_000.0, 1_700_000_100.5, 1_700_000_200.0):
        made.append(api.say("a"))
    start, middle, end = made
    assert api.ids("?since=1700000100.5") == [end, middle]
    assert api.ids("?since=1700000100.6") == [end]
    assert api.ids("?until=1700000200") == [middle, start]
    assert api.ids("?since=1700000050&until=1700000150") == [middle]
    assert api.ids(f"?until=1700000200&after={middle}") == [start]
    assert api.ids("?until=1600000000") == []


BAD_FILTERS = [
    "requests?limit=0", "requests?limit=201", "requests?limit=x", "requests?limit=1.5",
    "requests?limit=-1", "requests?since=yesterday", "requests?until=-1",
    "requests?since=1e9", "requests?since=", "usage?days=0", "usage?days=367",
    "usage?days=%D9%A3", "usage?days=", "requests?status=x", "requests?failed=yes",
    "usage?by=day,hour", "usage?by=account", "usage?by=", "usage?format=xml",
    "requests?format=", "requests?days=3", "usage?model=echo", "keys?account=other",
    "requests/req_0?limit=1", "?x=1", "keys/key_0?id=other",
]  # fmt: skip


@pytest.mark.parametrize("query", BAD_FILTERS)
def test_a_bad_filter_is_refused_by_name(query, shared):
    answer = shared("GET", f"/v1/account/{query}")
    error = answer.json["error"]
    assert (answer.status_code, error["code"]) == (400, "invalid_request")
    assert error["param"] == re.search(r"\?(\w+)=", query)[1]


@pytest.mark.parametrize("path", ["accounts", "usage", "accounts/team", "accounts/team/grants"])
def test_a_parameter_that_an_admins_route_does_not_know_is_refused(path, api):
    answer = api("GET", f"/v1/{path}?beta=true", ADMIN_KEY)
    assert (answer.status_code, answer.json["error"]["param"]) == (400, "beta")


@pytest.mark.parametrize(
    "after, older",
    [
        ("nothing", 0), ("%00", 0), ("%ff", 0), ("' OR 1=1 --", 0),
        ("something", 1), ("req_%F0%9F%98%80", 1),
    ],
)  # fmt: skip
def test_an_odd_after_is_only_a_place_to_start(after, older, api):
    made = api.say("a")
    assert api.ids(f"?after={quote(after, safe='%')}") == [made] * older


def test_usage_is_summed_by_day_and_model(api, monkeypatch):
    day, clock = 20_000, [0.0]
    monkeypatch.setattr(proxy.time, "time", lambda: clock[0])
    for clock[0] in ((day - 40) * 86400.0, (day - 2) * 86400.0, day * 86400.0):
        api.say("one two")
    api.say("three")
    names = [time.strftime("%Y-%m-%d", time.gmtime(d * 86400)) for d in (day, day - 2)]
    counts = {"model": "echo", "cached_tokens": 0, "written_tokens": 0, "images": 0}
    counts |= {"failed": 0, "refused": 0}
    three = {"requests": 2, "input_tokens": 3, "output_tokens": 3, "credits": 0.000006}
    two = {"requests": 1, "input_tokens": 2, "output_tokens": 2, "credits": 0.000004}
    expected = [{"day": names[0]} | counts | three, {"day": names[1]} | counts | two]
    assert api.get("/v1/account/usage")["data"] == expected
    assert api.get("/v1/account/usage?days=2")["data"] == expected[:1]
    assert api.get("/v1/account/usage?days=3")["data"] == expected
    assert len(api.get("/v1/account/usage?days=90")["data"]) == 3


def test_old_receipts_are_deleted_by_days_that_their_usage_stands_for(api, monkeypatch):
    day, clock, ledger = 20_000, [0.0], api.services.ledger
    monkeypatch.setattr(proxy.time, "time", lambda: clock[0])
    monkeypatch.setattr(proxy.time, "time_ns", lambda: int(clock[0] * 10**9))
    monkeypatch.setattr(ledger, "_upkeep", lambda: None)
    made = []
    for since in (9, 8, 3, 2, 0):
        clock[0] = (day - since) * 86400.0 + 5
        made.append(api.say("one two"))
    ledger.keep_days = 3
    wait_for(lambda: not (ledger._forget(), api.ids()[4:])[1], what="the oldest one's end")
    assert ledger.check() == []  # in the middle of it, too
    wait_for(lambda: not (ledger._forget(), api.ids()[3:])[1], what="the second one's")
    for _ in range(20):
        ledger._forget()
    assert api.ids() == made[:1:-1] and ledger.check() == []
    gone = api("GET", f"/v1/account/requests/{made[0]}")
    assert code_of(gone) == (404, "receipt_expired")
    assert api.refusal("GET", "/v1/account/requests/req_0") == (404, "not_found")
    assert api.get("/v1/account")["credits"]["spent"] == 0.00002
    assert sum(row["requests"] for row in api.get("/v1/account/usage")["data"]) == 5


def test_a_day_that_does_not_add_up_keeps_its_receipts(api, monkeypatch):
    ledger = api.services.ledger
    monkeypatch.setattr(ledger, "_upkeep", lambda: None)
    made = api.say("one two")
    ledger.write(lambda db: db.execute("UPDATE usage SET cost = cost + 1"))
    list(ledger._expire(10**5))
    assert api.ids() == [made] and ledger.check()
    ledger.write(lambda db: db.execute("UPDATE usage SET cost = cost - 1"))


def test_an_unlimited_account_is_metered_and_not_bounded(app):
    api = Api(app(accounts={"team": {"credits": "unlimited"}}))
    api.say("one two three")
    spent = {"granted": None, "spent": 0.000006, "held": 0, "available": None}
    assert api.get("/v1/account")["credits"] == spent
    assert api.services.ledger.check() == []
    line = 'proxy_balance_credits{account="team"} +Inf'
    assert line in api("GET", "/metrics", ADMIN_KEY).text


def test_usage_tells_who_spent_it_and_what_failed_or_was_refused(api):
    laptop = api.post("/v1/account/keys", name="laptop")
    api.say("one two", laptop["key"]), api.say("three", OTHER_KEY)
    api.refusal("POST", CHAT, laptop["key"], model="gone", messages=[{}])
    sums = lambda row: (row["requests"], row["refused"], row["credits"])

    def by(names: str, path: str = "account/", key: str = TEAM_KEY) -> dict[tuple, tuple]:
        rows = api.get(f"/v1/{path}usage?by={names}", key)["data"]
        return {tuple(row[each] for each in names.split(",")): sums(row) for row in rows}

    wait_for(lambda: by("key") == {("laptop",): (1, 1, 0.000004)}, what="the refusal")
    assert by("model") == {("echo",): (1, 0, 0.000004), ("",): (0, 1, 0)}
    assert by("account,key", "", ADMIN_KEY) == {
        ("team", "laptop"): (1, 1, 0.000004), ("other", "main"): (1, 0, 0.000002),
    }  # fmt: skip
    text = api("GET", "/v1/account/usage?by=key&format=csv").text
    assert text.splitlines()[:2] == [
        "key,key_id,requests,failed,refused,input_tokens,cached_tokens,written_tokens,"
        "output_tokens,images,credits",
        f"laptop,{laptop['id']},1,0,1,2,0,0,2,0,0.000004",
    ]


def test_receipts_are_filtered(api):
    laptop = api.post("/v1/account/keys", name="laptop")
    own, other = api.say("a"), api.say("b", laptop["key"])
    answer = api("POST", CHAT, model="chat", messages=[{"role": "user", "content": "x"}])
    failed = answer.headers["x-request-id"]
    assert answer.status_code == 503
    for query, ids in {
        "key=laptop": [other], f"key={laptop['id']}": [other], "model=echo": [other, own],
        "status=503": [failed], "failed=true": [failed], "failed=false": [other, own],
        "failed=false&key=main": [own], "model=none": [],
    }.items():  # fmt: skip
        assert api.ids(f"?{query}") == ids, query


def test_no_text_of_a_csv_is_a_formula():
    rows = [{"key": "=1+1", "n": -1}, {"key": "@x", "n": None}, {"key": 'a,"b"', "n": 2}]
    rows += [{"key": "\t=1", "n": "\n @x"}, {"key": "-1+1", "n": -0.5}]
    told = proxy.csv_text(rows).splitlines()
    quoted = ["'=1+1,-1", "'@x,", '"a,""b""",2', "'\t=1,\"'", ' @x"', "'-1+1,-0.500000"]
    assert told == ["key,n", *quoted]


def test_a_made_key_is_shown_once_and_works(api):
    made = api.post("/v1/account/keys", name="laptop")
    assert set(made) == KEY_FIELDS | {"key"}
    assert re.fullmatch(r"sk-[\w-]{40,}", made["key"])
    assert made["hint"].startswith("sk-") and made["hint"].endswith(made["key"][-4:])
    id = api.say("hello", made["key"])
    assert api.get(f"/v1/account/requests/{id}")["key"] == "laptop"
    listed = api("GET", "/v1/account/keys", made["key"])
    assert made["key"] not in listed.text
    rows = {row["name"]: row for row in listed.json["data"]}
    sources = {name: row["source"] for name, row in rows.items()}
    assert sources == {"main": "keys.json", "laptop": "proxy.db"}
    assert rows["laptop"]["last_used"] >= rows["laptop"]["created"]


def test_keys_are_listed_in_the_order_in_which_they_were_made(api, monkeypatch):
    now, names = time.time(), [f"key {n}" for n in range(8)]
    for number, name in enumerate(names):
        monkeypatch.setattr(proxy.time, "time", lambda n=number: now + n)
        api.post("/v1/account/keys", name=name)
    rows = api.get("/v1/account/keys")["data"]
    assert [row["name"] for row in rows] == ["main", *names]


def test_a_key_may_revoke_itself(api):
    made = api.post("/v1/account/keys", name="laptop")
    answer = api("DELETE", f"/v1/account/keys/{made['id']}", made["key"])
    assert answer.status_code == 200
    assert api.refusal("GET", "/v1/account", made["key"]) == (401, "unauthorized")


def test_an_account_has_so_many_keys_and_makes_so_many_a_day(api, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_KEYS", 3)
    ids = [api.post("/v1/account/keys", name=f"k{n}")["id"] for n in range(2)]
    assert api.refusal("POST", "/v1/account/keys") == (400, "invalid_request")
    api("DELETE", f"/v1/account/keys/{ids[0]}")
    api.post("/v1/account/keys", name="again")
    api("DELETE", f"/v1/account/keys/{ids[1]}")
    # Or each new one would bring its own sixty requests, whatever the clock says.
    now = time.time()
    for jump in -86402, 0, 86402:
        monkeypatch.setattr(proxy.time, "time", lambda jump=jump: now + jump)
        assert api.refusal("POST", "/v1/account/keys") == (400, "invalid_request")
    alter(api.services.ledger, "DELETE FROM windows")  # a day later
    api.post("/v1/account/keys", name="again")


def test_a_hundred_keys_are_a_hundred_however_many_are_asked_for_at_once(api):
    def make(number: int) -> int:
        client = api.client.application.test_client()
        json, headers = {"name": f"k{number}"}, bearer(TEAM_KEY)
        return client.post("/v1/account/keys", json=json, headers=headers).status_code

    with ThreadPoolExecutor(8) as pool:
        codes = Counter(pool.map(make, range(110)))
    assert codes == {201: proxy.MAX_KEYS - 1, 400: 11}
    assert api.get("/v1/account")["more_keys"] is False
    assert len(api.get("/v1/account")["keys"]) == proxy.MAX_KEYS


@pytest.mark.parametrize("ahead", [3600, -3600])
def test_a_key_made_by_a_wrong_clock_works_by_a_right_one(ahead, api, monkeypatch):
    now = time.time()
    monkeypatch.setattr(proxy.time, "time", lambda: now + ahead)
    api.post("/v1/accounts", ADMIN_KEY, id="lab")
    early = api.post("/v1/accounts/lab/keys", ADMIN_KEY, name="early")["key"]
    monkeypatch.setattr(proxy.time, "time", lambda: now)
    late = api.post("/v1/accounts/lab/keys", ADMIN_KEY, name="late")["key"]
    assert [api.get("/v1/account", key)["id"] for key in (early, late)] == ["lab"] * 2


def test_a_plain_key_revokes_no_admin_key(api):
    path = "/v1/accounts/team/keys"
    admin = api.post(path, ADMIN_KEY, name="chief", admin=True)
    refused = api.refusal("DELETE", f"/v1/account/keys/{admin['id']}")
    assert refused == (404, "not_found")
    assert api.get("/v1/account", admin["key"])["admin"] is True
    plain = api.post("/v1/account/keys", name="plain")
    for key in plain, admin:
        path = f"/v1/account/keys/{key['id']}"
        assert api("DELETE", path, admin["key"]).status_code == 200


def test_a_demo_key_sees_makes_and_revokes_no_keys(api):
    own = proxy.key_id(proxy.sha256(DEMO_KEY))
    about = api.get("/v1/account", DEMO_KEY)
    assert (about["demo"], about["keys"], about["more_keys"]) == (True, [], False)
    for method, path in ("GET", ""), ("POST", ""), ("DELETE", f"/{own}"):
        refused = api.refusal(method, f"/v1/account/keys{path}", DEMO_KEY)
        assert refused == (404, "not_found")
    api.say("hello", DEMO_KEY)
    assert len(api.get("/v1/accounts/demo/keys", ADMIN_KEY)["data"]) == 1


def test_keys_are_paged_declared_ones_first_and_revoked_ones_last(app):
    keys = {"main": TEAM_KEY, "second": "sk-second", "third": "sk-third"}
    api = Api(app(accounts={"team": {"keys": keys}}))
    made = [api.post("/v1/account/keys", name=f"k{n}") for n in range(6)]
    for key in made[0], made[3]:
        api("DELETE", f"/v1/account/keys/{key['id']}")
    path, seen, after = "/v1/account/keys?limit=2&after=", [], ""
    for _ in range(5):
        page = api.get(path + after)
        seen += [row["name"] for row in page["data"]]
        after = page["data"][-1]["id"]
    assert not page["has_more"]
    live, dead = [1, 2, 4, 5], [0, 3]
    made.sort(key=lambda key: (key["created"], key["id"]))
    assert seen[:3] == [*keys] and len(seen) == 9
    assert {*seen[3:7]} == {f"k{n}" for n in live}
    assert {*seen[7:]} == {f"k{n}" for n in dead}


# -- Routes: terms of keys


BOUND_KEY = "sk-bound-0123456789"


def bound_key(**terms: Any) -> dict:
    """Accounts with a key `bound` of the team's that has terms."""
    return {"team": {"keys": {"bound": {"key": BOUND_KEY, **terms}}}}


def test_terms_that_keys_json_refuses_are_refused_by_the_api(api):
    made = api.post("/v1/account/keys", name="a")
    to = ("POST", "/v1/account/keys"), ("PATCH", f"/v1/account/keys/{made['id']}")
    for path, value in REFUSED_TERMS:
        for method, route in to if value not in (NAN, INFINITY) else ():
            answer = api(method, route, **terms_with(path, value))
            assert code_of(answer) == (400, "invalid_request"), (path, value)
            error = answer.json["error"]
            assert error["param"] == path and path in error["message"]
    assert len(api.get("/v1/account/keys")["data"]) == 2


def test_a_key_made_with_terms_has_them_and_may_be_changed(api):
    terms = {
        "expires": "2999-01-31", "budget": {"credits": 0.5, "per": "day"},
        "models": ["echo"], "limits": {"rate": "3/minute"},
    }  # fmt: skip
    made = api.post("/v1/account/keys", name="laptop", **terms)
    key, path = made["key"], f"/v1/account/keys/{made['id']}"
    left = {"spent": 0, "held": 0, "available": 0.5, "next": made["budget"]["next"]}
    assert made["budget"] == terms["budget"] | left
    assert made["budget"]["next"] % proxy.DAY == 0 < made["budget"]["next"] - time.time()
    assert {name: made[name] for name in terms} == terms | {"budget": made["budget"]}
    api.say("one two", key)
    changed = api("PATCH", path, budget={"credits": 7}, limits=None, name="desk").json
    assert (changed["name"], changed["limits"], changed["models"]) == ("desk", None, ["echo"])
    wanted = {"credits": 7, "per": "day", "spent": 0.000004, "available": 6.999996}
    assert wanted.items() <= changed["budget"].items()
    about = api.get("/v1/account", key)
    assert about["budget"] == changed["budget"]
    assert about["key"] == {
        "id": made["id"], "name": "desk", "expires": terms["expires"],
        "budget": {"credits": 7, "per": "day"}, "models": ["echo"],
    }  # fmt: skip
    freed = api("PATCH", path, budget=None, expires=None, models=None).json
    assert {freed[name] for name in ("budget", "expires")} == {None}
    assert api.get("/v1/account", key)["budget"] is None


def test_a_keys_terms_hold_at_its_next_request(api):
    made = api.post("/v1/account/keys", models=["echo"], limits={"rate": "5/minute"})
    key, path = made["key"], f"/v1/account/keys/{made['id']}"
    assert [each["id"] for each in api.get("/v1/models", key)["data"]] == ["echo"]
    other = HELLO | {"model": "chat"}
    assert api.refusal("POST", CHAT, key, **other) == (404, "model_not_found")
    assert [each["id"] for each in api.get("/v1/account", key)["models"]] == ["echo"]
    for _ in range(4):
        api.say("a", key)
    echo = {"model": "echo", "messages": [{"role": "user", "content": "a"}]}
    assert api.refusal("POST", CHAT, key, **echo) == (429, "rate_limit_exceeded")
    api("PATCH", path, limits=None, budget={"credits": 0.000009, "per": "total"})
    assert api.refusal("POST", CHAT, key, **echo) == (402, "insufficient_credits")
    api("PATCH", path, budget={"credits": 1})
    api.say("a", key)
    api("PATCH", path, models=["chat"])
    assert api.refusal("POST", CHAT, key, **echo) == (404, "model_not_found")


def test_a_key_that_has_expired_is_one_that_never_was(app):
    api = Api(app(accounts=bound_key(expires="2020-01-01")))
    told = api("GET", "/v1/models", BOUND_KEY)
    assert told.data == api("GET", "/v1/models", "sk-nobody-at-all").data
    assert code_of(told) == (401, "unauthorized")
    for path, method in ("", "POST"), ("/" + api.post("/v1/account/keys")["id"], "PATCH"):
        answer = api(method, f"/v1/account/keys{path}", expires="2020-01-01")
        assert answer.json["error"]["param"] == "expires" and answer.status_code == 400


@pytest.mark.parametrize(
    "terms", [{"expires": "2999-01-01"}, {"models": ["chat"]}, {"limits": {"concurrent": 1}},
              {"budget": {"credits": 1, "per": "day"}}], ids=str,
)  # fmt: skip
def test_a_key_with_terms_cannot_free_itself_of_them(terms, app):
    api = Api(app(accounts=bound_key(**terms)))
    other = api.post("/v1/account/keys")["id"]
    for method, path in ("POST", ""), ("PATCH", f"/{other}"), ("DELETE", f"/{other}"):
        refused = api.refusal(method, f"/v1/account/keys{path}", BOUND_KEY)
        assert refused == (404, "not_found")
    made = api.post("/v1/account/keys", **terms)
    refused = api.refusal("PATCH", f"/v1/account/keys/{made['id']}", made["key"])
    assert refused == (404, "not_found")


def test_a_key_that_cannot_be_changed_says_why(api):
    plain = api.post("/v1/account/keys", name="plain")
    admin = api.post("/v1/account/keys", ADMIN_KEY, name="root")
    own = proxy.key_id(proxy.sha256(TEAM_KEY))
    api("DELETE", f"/v1/account/keys/{plain['id']}")
    cases = [(own, 400, "keys.json"), (plain["id"], 404, "revoked"),
             ("key_nothing", 404, "no such key"), (admin["id"], 404, "no such key")]
    for id, status, told in cases:
        answer = api("PATCH", f"/v1/account/keys/{id}", name="new")
        assert answer.status_code == status and told in answer.json["error"]["message"]


def test_a_metrics_key_reads_metrics_and_nothing_else(app):
    api = Api(app(accounts=bound_key(metrics=True)))
    assert api("GET", "/metrics", BOUND_KEY).status_code == 200
    paths = "/v1/models", "/v1/account", "/v1/account/usage", "/v1/accounts", "/v1/usage"
    for path in paths:
        assert api.refusal("GET", path, BOUND_KEY) == (401, "unauthorized")
    assert api.refusal("POST", CHAT, BOUND_KEY, **HELLO) == (401, "unauthorized")
    assert api.refusal("POST", "/v1/account/keys", BOUND_KEY) == (401, "unauthorized")
    refused = api("POST", "/v1/account/keys", metrics=True)
    assert (refused.status_code, refused.json["error"]["param"]) == (400, "metrics")
    made = api.post("/v1/accounts/team/keys", ADMIN_KEY, metrics=True)
    assert api("GET", "/metrics", made["key"]).status_code == 200


@pytest.mark.parametrize("path", ["/metrics", "/v1/models", "/v1/account", "/v1/usage"])
def test_a_keys_last_use_is_told_to_a_minute_on_every_route(path, api):
    sql = "UPDATE keys SET used = 1000"
    for _ in "of keys.json, without a row", "with one":
        assert api("GET", path, ADMIN_KEY).status_code == 200
        ask = "SELECT used FROM keys WHERE account = 'boss'"
        [(used,)] = api.services.ledger.read(ask)
        assert 0 <= time.time() - used < 60
        api.services.ledger.write(lambda db: db.execute(sql))


def test_a_budget_follows_a_key_through_edits_of_keys_json(app, tmp_path):
    api = Api(app(accounts=bound_key(budget={"credits": 0.01, "per": "week"})))
    api.say("one two", BOUND_KEY)
    for terms in {"budget": {"credits": 0.02, "per": "total"}}, {"models": ["echo"]}:
        name = f"name {len(terms)}{[*terms][0]}"
        keys = {"bound": None, name: {"key": BOUND_KEY, **terms}}
        keys_file(tmp_path, "http://127.0.0.1:9", accounts={"team": {"keys": keys}})
        wait_for(lambda: api.get("/v1/account", BOUND_KEY)["key"]["name"] == name)
        budget = api.get("/v1/account", BOUND_KEY)["budget"]
        assert (budget or {"spent": 0.000004})["spent"] == 0.000004
        api.say("", BOUND_KEY)
    assert api.services.ledger.check() == []


# -- Routes: corrections and closing


def test_a_correction_takes_no_more_than_is_available(api):
    grants = "/v1/accounts/team/grants"
    api.say("one two")
    answer = api("POST", grants, ADMIN_KEY, credits=-100)
    assert (answer.status_code, answer.json["error"]["param"]) == (400, "credits")
    assert "team has 99.999996 available" in answer.json["error"]["message"]
    api.post(grants, ADMIN_KEY, credits=5, note="a gift")
    left = api.post(grants, ADMIN_KEY, credits=-104.999996)["credits"]
    assert left == {"granted": 0.000004, "spent": 0.000004, "held": 0, "available": 0}
    assert api.refusal("POST", CHAT, **HELLO) == (402, "insufficient_credits")
    assert api.services.ledger.check() == []
    rows = api.get(grants, ADMIN_KEY)["data"]
    told = [(row["account"], row["credits"], row["note"]) for row in rows]
    assert told == [("team", -104.999996, "corrected"), ("team", 5, "a gift")]
    page = api.get(f"{grants}?limit=1", ADMIN_KEY)
    after = page["data"][0]["id"]
    assert page["has_more"] and api.get(f"{grants}?after={after}", ADMIN_KEY)["data"] == rows[1:]
    assert api.refusal("GET", grants) == (404, "not_found")


def test_a_closed_account_is_refused_and_keeps_its_history(api):
    api.post("/v1/accounts", ADMIN_KEY, id="lab", credits=1)
    key = api.post("/v1/accounts/lab/keys", ADMIN_KEY)["key"]
    api.say("one two", key)
    assert api.refusal("DELETE", "/v1/accounts/lab") == (404, "not_found")
    closed = api("DELETE", "/v1/accounts/lab", ADMIN_KEY)
    assert (closed.status_code, closed.json) == (200, {"id": "lab", "closed": True})
    assert api.refusal("GET", "/v1/models", key) == (401, "unauthorized")
    for path in "keys", "grants":
        to = f"/v1/accounts/lab/{path}"
        assert api.refusal("POST", to, ADMIN_KEY, credits=1) == (404, "not_found")
    about = api.get("/v1/accounts/lab", ADMIN_KEY)
    assert (about["closed"], about["keys"][0]["revoked"] is None) == (True, False)
    assert len(api.get("/v1/accounts/lab/requests", ADMIN_KEY)["data"]) == 1
    again = api.post("/v1/accounts", ADMIN_KEY, id="lab")
    assert (again["closed"], again["keys"]) == (False, 0) and "0.000004" in again["note"]
    assert api.refusal("GET", "/v1/models", key) == (401, "unauthorized")
    declared = api("DELETE", "/v1/accounts/team", ADMIN_KEY)
    assert declared.status_code == 400 and "keys.json" in declared.json["error"]["message"]
    assert api.refusal("DELETE", "/v1/accounts/nobody", ADMIN_KEY) == (404, "not_found")


NO_KEYS = [{"admin": True}, {"admin": 1}, {"name": 7}, {"account": "other"}]


@pytest.mark.parametrize("body", [*NO_KEYS, {"key": "sk-own"}], ids=str)
def test_a_key_is_made_with_a_name_and_nothing_else(body, shared):
    assert shared.refusal("POST", "/v1/account/keys", **body) == (400, "invalid_request")
    assert len(shared.get("/v1/account/keys")["data"]) == 1


def test_account_calls_have_a_window_of_their_own(app, monkeypatch):
    monkeypatch.setattr(proxy, "ACCOUNT_ITEMS", tuple(proxy.parse_many("6/minute")))
    api = Api(app(limits={"rate": "2/minute"}))
    for left in "5", "4", "3":
        assert rates(api("GET", "/v1/models"))[:2] == ["6", left]
    assert api.get("/v1/account")["live"]["requests_remaining"] == 2
    api.say("a")
    api.say("a")
    live = {"requests_remaining": 0, "requests_limit": 2, "concurrent": 0}
    assert api.get("/v1/account")["live"] == live
    assert api.refusal("POST", CHAT, **HELLO) == (429, "rate_limit_exceeded")
    *_, refused = (api("GET", "/v1/account") for _ in range(2))
    assert code_of(refused) == (429, "rate_limit_exceeded")
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    api.get("/v1/account", OTHER_KEY)


def test_account_calls_need_no_slot_and_no_credits(app):
    api = Api(app(accounts={"team": {"limits": {"concurrent": 1}}}))
    with api("POST", CHAT, **HELLO, stream=True):
        about = api.get("/v1/account")
        assert about["live"]["concurrent"] == 1
        assert about["credits"]["held"] > 0 and about["credits"]["available"] < 100
        assert api.get("/v1/account/requests")["data"][0]["state"] == "open"
        assert api.refusal("POST", CHAT, **HELLO)[0] == 429
    assert api.get("/v1/account", POOR_KEY)["credits"]["available"] == 0


# -- Admins --------------------------------------------------------------------------


def test_an_admin_makes_an_account_grants_and_makes_it_a_key(api):
    made = api.post("/v1/accounts", ADMIN_KEY, id="lab", credits=2.5)
    assert made["credits"] == {"granted": 2.5, "spent": 0, "held": 0, "available": 2.5}
    path = "/v1/accounts/lab"
    granted = api.post(f"{path}/grants", ADMIN_KEY, credits=0.000001, note="more")
    assert granted["credits"]["granted"] == 2.500001
    key = api.post(f"{path}/keys", ADMIN_KEY, name="first")
    assert (key["account"], key["admin"]) == ("lab", False)
    id = api.say("one two", key["key"])
    assert api.get(path, ADMIN_KEY)["credits"]["spent"] == 0.000004
    assert api.get(f"{path}/requests/{id}", ADMIN_KEY)["account"] == "lab"
    assert api.get(f"{path}/usage", ADMIN_KEY)["data"][0]["requests"] == 1
    assert api("DELETE", f"{path}/keys/{key['id']}", ADMIN_KEY).status_code == 200
    assert api.refusal("GET", "/v1/account", key["key"]) == (401, "unauthorized")


@pytest.mark.parametrize(
    "path, key, more, admin",
    [
        ("account", ADMIN_KEY, {}, True),
        ("account", TEAM_KEY, {}, False),
        ("accounts/team", ADMIN_KEY, {}, False),
        ("accounts/team", ADMIN_KEY, {"admin": True}, True),
    ],
)
def test_a_key_is_shown_as_admin_exactly_if_it_is(api, path, key, more, admin):
    made = api.post(f"/v1/{path}/keys", key, name="second", **more)
    rows = api.get("/v1/account/keys", made["key"])["data"]
    assert [row["admin"] for row in rows if row["name"] == "second"] == [admin]
    assert made["admin"] == api.get("/v1/account", made["key"])["admin"] == admin
    assert (api("GET", "/v1/accounts", made["key"]).status_code == 200) == admin


def test_an_account_that_is_admin_no_more_has_no_admin_keys(api, tmp_path):
    made = api.post("/v1/account/keys", ADMIN_KEY, name="second")
    keys_file(tmp_path, "http://127.0.0.1:9", accounts={"boss": {"admin": False}})
    wait_for(lambda: api("GET", "/v1/accounts", ADMIN_KEY).status_code == 404)
    assert api.refusal("GET", "/v1/accounts", made["key"]) == (404, "not_found")
    assert api.get("/v1/account", made["key"])["admin"] is False


@pytest.mark.parametrize("ahead", [60, -3600], ids=["in order", "set back"])
def test_a_new_account_has_no_keys_of_a_former_one(ahead, api, tmp_path, monkeypatch):
    now = time.time()
    monkeypatch.setattr(proxy.time, "time", lambda: now - ahead)
    rows_then = sorted([("laptop", True), ("new", False)], reverse=ahead < 0)
    old = api.post("/v1/account/keys", OTHER_KEY, name="laptop")["key"]
    monkeypatch.setattr(proxy.time, "time", lambda: now)
    take_out_other(api, tmp_path)
    api.post("/v1/accounts", ADMIN_KEY, id="other")
    assert api.refusal("GET", "/v1/account", old) == (401, "unauthorized")
    new = api.post("/v1/accounts/other/keys", ADMIN_KEY, name="new")["key"]
    rows = api.get("/v1/account/keys", new)["data"]
    assert [(row["name"], bool(row["revoked"])) for row in rows] == rows_then
    keys_file(tmp_path, "http://127.0.0.1:9")  # which declares it again
    wait_for(lambda: api("GET", "/v1/account", OTHER_KEY).status_code == 200)
    assert api.get("/v1/account", old)["id"] == "other"


def test_a_new_account_is_told_what_its_name_has_spent(api, run, tmp_path):
    take_out_other(api, tmp_path)
    made = api.post("/v1/accounts", ADMIN_KEY, id="other", credits=1)
    told = "An account named other has spent 0.000002 credits before: they count."
    assert (made["note"], made["credits"]["spent"]) == (told, 0.000002)
    assert "note" not in api.post("/v1/accounts", ADMIN_KEY, id="lab", credits=1)
    lines = [fields for _, event, fields in api.services.log._lines if event == "account"]
    assert [fields["note"] for fields in lines] == [told]
    api.say("b", TEAM_KEY)
    keys_file(tmp_path, "http://127.0.0.1:9", accounts={"other": None, "team": None})
    wait_for(lambda: api("GET", "/v1/account").status_code == 401)
    status, out, err = run("keys", "add", "team", "--credits", "2")
    assert status == 0 and re.fullmatch(r"sk-[\w-]{40,}\n", out)
    new, history = err.splitlines()
    assert new == "team is new, with 1.999998 credits."
    assert history == told.replace("other", "team")
    assert run("keys", "add", "team")[2] == ""


@pytest.mark.parametrize("id", ["team", "lab"])
def test_there_is_one_account_of_a_name(id, api):
    api("POST", "/v1/accounts", ADMIN_KEY, id="lab")
    refused = api.refusal("POST", "/v1/accounts", ADMIN_KEY, id=id, credits=5)
    assert refused == (400, "invalid_request")
    credits = api.get(f"/v1/accounts/{id}", ADMIN_KEY)["credits"]["granted"]
    assert credits == {"team": 100, "lab": 0}[id]


NO_GRANTS = [None, "5", True, -2, 0, 1e-7, 0.0000015, 1e10, 1e999, [], {}]


@pytest.mark.parametrize("credits", NO_GRANTS, ids=str)
def test_a_bad_amount_is_not_granted(credits, shared):
    path = "/v1/accounts/other/grants"
    assert shared.refusal("POST", path, ADMIN_KEY, credits=credits)[0] == 400
    assert shared.get("/v1/accounts/other", ADMIN_KEY)["credits"]["granted"] == 1


def test_accounts_are_paged_by_name(api):
    first = api.get("/v1/accounts?limit=3", ADMIN_KEY)
    rest = api.get("/v1/accounts?after=other", ADMIN_KEY)
    assert [row["id"] for row in first["data"]] == ["boss", "demo", "other"]
    assert [row["id"] for row in rest["data"]] == ["poor", "team"]
    assert (first["has_more"], rest["has_more"]) == (True, False)


def take_out_other(api: Api, folder: Path) -> None:
    """Let account `other` spend something, then take it out of keys.json."""
    api.say("a", OTHER_KEY)
    keys_file(folder, "http://127.0.0.1:9", accounts={"other": None})
    wait_for(lambda: api("GET", "/v1/account", OTHER_KEY).status_code == 401)


def test_an_account_taken_out_of_keys_json_can_be_opened_and_adds_up(
    api, run, tmp_path
):
    take_out_other(api, tmp_path)
    status, out, _ = run("check")
    assert "warning: other has spent more than keys.json and its grants give" in out
    ids = [row["id"] for row in api.get("/v1/accounts", ADMIN_KEY)["data"]]
    opened = [api("GET", f"/v1/accounts/{id}", ADMIN_KEY).status_code for id in ids]
    keys_file(tmp_path, "http://127.0.0.1:9")
    assert status == 0 and "wrong" not in out
    assert run("check")[1].count("has spent more") == 0
    keys_file(tmp_path, "http://127.0.0.1:9", accounts={"other": {"credits": 0.000001}})
    status, out, _ = run("check")
    assert status == 0 and out.count("warning: other has spent more") == 1
    assert {"team", "other"} <= {*ids} and opened == [200] * len(ids)


# -- Isolation -----------------------------------------------------------------------

ADMIN_ROUTES = """
GET /metrics
GET /v1/accounts
POST /v1/accounts
GET /v1/accounts/<account>
DELETE /v1/accounts/<account>
GET /v1/accounts/<account>/grants
POST /v1/accounts/<account>/grants
GET /v1/accounts/<account>/usage
GET /v1/accounts/<account>/requests
GET /v1/accounts/<account>/requests/<request_id>
GET /v1/accounts/<account>/keys
POST /v1/accounts/<account>/keys
PATCH /v1/accounts/<account>/keys/<key_id>
DELETE /v1/accounts/<account>/keys/<key_id>
""".strip().split("\n")


def test_the_admin_routes_are_these(shared):
    rules = shared.client.application.url_map.iter_rules()
    routes = {f"{m} {r.rule}" for r in rules for m in r.methods - {"HEAD", "OPTIONS"}}
    of_accounts = {route for route in routes if " /v1/accounts" in route}
    assert of_accounts | {"GET /metrics"} == {*ADMIN_ROUTES}


@pytest.mark.parametrize("route", ADMIN_ROUTES)
def test_an_admin_route_is_not_there_for_others(route, api):
    method, rule = route.split()
    key_id = api.get("/v1/account/keys", OTHER_KEY)["data"][0]["id"]
    rule = rule.replace("<request_id>", api.say("a", OTHER_KEY))
    rule = rule.replace("<key_id>", key_id)

    def ask(key: str, account: str) -> tuple:
        path = rule.replace("<account>", account)
        answer = api(method, path, key, id="new", credits=1)
        return answer.status_code, answer.data

    for key in (TEAM_KEY, OTHER_KEY, DEMO_KEY):
        assert ask(key, "other") == ask(key, "nobody")
        assert ask(key, "other")[0] == 404
    assert api.get("/v1/account", OTHER_KEY)["credits"]["granted"] == 1
    rows = api.get("/v1/accounts", ADMIN_KEY)["data"]
    assert "new" not in [row["id"] for row in rows]


def test_another_accounts_receipt_is_not_found(api):
    id = api.say("secret", OTHER_KEY)
    for path in (id, id.upper(), id + "%20", id[:-1] + "%", "%25", "_" * len(id)):
        refused = api.refusal("GET", f"/v1/account/requests/{path}")
        assert refused == (404, "not_found")
    assert api.get(f"/v1/account/requests/{id}", OTHER_KEY)["id"] == id


@pytest.mark.parametrize(
    "query",
    ["", "?after=s", "?limit=200&since=0", "?key=main", "?failed=false&format=csv"],
)
def test_a_list_has_nothing_of_another_account(query, api):
    own, foreign = api.say("mine"), api.say("secret", OTHER_KEY)
    text = api("GET", f"/v1/account/requests{query}").text
    assert own in text and foreign not in text and "other" not in text


@pytest.mark.parametrize("account", ["other", "team%2F..%2Fother", "OTHER", "other%00"])
def test_no_spelling_of_an_admin_path_reaches_another_account(account, api):
    for path in (f"/v1/accounts/{account}", f"/v1/account/../accounts/{account}"):
        assert api.refusal("GET", path)[0] in {404, 405}


@pytest.mark.parametrize("made", [True, False], ids=["made", "declared"])
@pytest.mark.parametrize(
    "path, key", [("account", TEAM_KEY), ("accounts/team", ADMIN_KEY)]
)
def test_another_accounts_key_cannot_be_revoked(path, key, made, api):
    api.post("/v1/account/keys", OTHER_KEY, name="second")
    ids = [row["id"] for row in api.get("/v1/account/keys", OTHER_KEY)["data"]]
    for id in (ids[made], "key_0000000000000000"):
        refused = api.refusal("DELETE", f"/v1/{path}/keys/{id}", key)
        assert refused == (404, "not_found")
    rows = api.get("/v1/account/keys", OTHER_KEY)["data"]
    assert [row["revoked"] for row in rows] == [None, None]


@pytest.mark.parametrize("made", [True, False], ids=["made", "declared"])
def test_a_revoked_key_stops_at_once_in_every_worker(made, gateway):
    server = gateway(workers=2, accounts={"team": {"keys": {"spare": "sk-spare-key"}}})
    session, account = client(), f"{server.url}/v1/account"
    team = bearer(TEAM_KEY)
    answer = session.post(f"{account}/keys", json={"name": "new"}, headers=team).json()
    key = {True: answer["key"], False: "sk-spare-key"}[made]
    name = {True: "new", False: "spare"}[made]
    assert {one.status_code for one in ask_often(account, key)} == {200}
    rows = session.get(f"{account}/keys", headers=team).json()["data"]
    [id] = [row["id"] for row in rows if row["name"] == name]
    assert session.delete(f"{account}/keys/{id}", headers=team).status_code == 200
    assert {one.status_code for one in ask_often(account, key)} == {401}
    assert chat(server.url, key, model="echo").status_code == 401


def ask_often(url: str, key: str, times: int = 16) -> list[requests.Response]:
    """The answers to so many GETs at once, each on a connection of its own."""
    headers = bearer(key)
    with ThreadPoolExecutor(8) as pool:
        asked = pool.map(lambda _: client().get(url, headers=headers), range(times))
    return [*asked]


def test_an_odd_name_is_kept_as_it_is_and_a_label_that_prometheus_can_read(api):
    for name in SHOWN_NAMES:
        api.post("/v1/accounts", ADMIN_KEY, id=name, credits=1)
        path = f"/v1/accounts/{quote(name, safe='')}"
        key = api.post(f"{path}/keys", ADMIN_KEY, name=name)["key"]
        receipt = api("GET", f"/v1/account/requests/{api.say('a', key)}", key)
        assert (receipt.mimetype, receipt.json["key"]) == ("application/json", name)
        about = api.get("/v1/account", key)
        assert (about["id"], about["keys"][0]["name"]) == (name, name)
        assert api.get(path, ADMIN_KEY)["id"] == name
    text = api("GET", "/metrics", ADMIN_KEY).text
    balances = samples(families(text)["proxy_balance_credits"], "account")
    assert {(name,) for name in SHOWN_NAMES} <= {*balances}


def test_a_name_that_cannot_be_shown_is_refused(api):
    members = {"/v1/account/keys": "name", "/v1/accounts/other/keys": "name"}
    members["/v1/accounts"] = "id"
    for name, (path, member) in itertools.product(REFUSED_NAMES, members.items()):
        answer = api("POST", path, ADMIN_KEY, **{member: name})
        told = answer.status_code, answer.json["error"]["param"]
        assert told == (400, member), name
    rows = api.get("/v1/accounts", ADMIN_KEY)["data"]
    keys = {row["id"]: row["keys"] for row in rows}
    assert keys == dict.fromkeys(["boss", "demo", "other", "poor", "team"], 1)


def test_a_note_or_a_path_that_cannot_be_shown_is_refused(api):
    refused = {
        "/v1/accounts/other/grants": [
            {"credits": 1, "note": note}
            for note in ("a\nb", "\x1b[31mred", "x" * 300, "\ud800", 7)
        ],
        "/v1/accounts": [{"id": id} for id in ("a/b", "/", ".", "..", "</script>")],
    }
    for path, bodies in refused.items():
        codes = {api.refusal("POST", path, ADMIN_KEY, **body) for body in bodies}
        assert codes == {(400, "invalid_request")}


# -- Metrics -------------------------------------------------------------------------


def families(text: str) -> dict[str, Any]:
    """Prometheus' own reading of a text: family by name."""
    parser = pytest.importorskip("prometheus_client.parser")
    return {one.name: one for one in parser.text_string_to_metric_families(text)}


def samples(family: Any, *labels: str, suffix: str = "") -> dict[tuple, float]:
    """A family's values by the values of these labels, zeros left out."""
    wanted = [one for one in family.samples if one.name.endswith(suffix)]
    values = {tuple(s.labels[name] for name in labels): s.value for s in wanted}
    return {key: value for key, value in values.items() if value}


KEYS = [TEAM_KEY, OTHER_KEY, DEMO_KEY]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple]:
    """Texts of /metrics of four workers after some requests, and their receipts."""
    folder, gate = tmp_path_factory.mktemp("measured"), threading.Event()
    details = {"cached_tokens": 4, "cache_write_tokens": 3}
    usage = usage_of(10, 5, prompt_tokens_details=details)
    scripts = {
        "whole": json_answer(chat_json("hi", usage=usage)),
        "broken": json_answer({"error": {}}, 500),
        "bad": json_answer({"error": {"message": "no"}}, 400),
        "stream": sse(chat_chunks("one two three"), gate=gate),
    }

    def answer(request: Request) -> None:
        scripts[request.json["messages"][0]["content"]](request)

    with ExitStack() as stack:
        upstream = stack.enter_context(Upstream(answer))
        keys = keys_file(folder, upstream.url, accounts={'q"\\': {"credits": 3}})
        server = stack.enter_context(Gateway(keys, workers=4, threads=64))

        def say(text: str, key: str = TEAM_KEY, **more: Any) -> requests.Response:
            messages = [{"role": "user", "content": text}]
            return chat(server.url, key, messages=messages, **more)

        def look(path: str) -> requests.Response:
            return client().get(server.url + path, headers=bearer(ADMIN_KEY))

        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(say, "a b", key, model="echo") for key in KEYS * 8]
            jobs += [pool.submit(say, text) for text in ("whole", "broken", "bad") * 4]
            jobs += [pool.submit(say, "x", model="nothing") for _ in range(5)]
            jobs += [pool.submit(say, "x", POOR_KEY) for _ in range(3)]
        codes = {job.result().status_code for job in jobs}
        assert codes == {200, 400, 402, 404, 503}
        streams = [say("stream", stream=True) for _ in range(3)]
        refused = re.compile('{model="",status="402"} 3\n.*{model="",status="404"} 5\n')
        wait_for(lambda: refused.search(look("/metrics").text), what="the refusals")
        texts = [one.text for one in ask_often(f"{server.url}/metrics", ADMIN_KEY)]
        accounts = look("/v1/accounts").json()["data"]
        paths = [f"/v1/accounts/{quote(one['id'], safe='')}" for one in accounts]
        pages = [look(f"{path}/requests?limit=200").json()["data"] for path in paths]
        receipts = [row for page in pages for row in page if row["state"] != "open"]
        gate.set()
        assert [sse_events(stream.content)[-1] for stream in streams] == ["[DONE]"] * 3
        yield texts, receipts, {one["id"]: one["credits"] for one in accounts}
    assert proof(keys.parent) == []


def test_metrics_are_the_same_from_every_worker(measured):
    texts, _, _ = measured
    assert len(texts) == 16 and len({*texts}) == 1


def test_requests_agree_with_the_ledger(measured):
    texts, receipts, _ = measured
    family = families(texts[0])["proxy_requests"]
    counted = samples(family, "model", "status")
    expected = Counter((row["model"], str(row["status"])) for row in receipts)
    assert counted == expected | {("", "404"): 5, ("", "402"): 3}
    assert counted["chat", "503"] == counted["chat", "400"] == 4


def test_a_refusal_is_counted_for_its_key_and_is_no_models(api):
    for _ in range(2):
        api("POST", CHAT, POOR_KEY, **HELLO)
    api("POST", CHAT, **HELLO | {"model": "nope"})
    api("POST", CHAT, "sk-unknown", **HELLO)
    ids = [proxy.key_id(proxy.sha256(key)) for key in (POOR_KEY, TEAM_KEY)]
    sql = "SELECT account, key, status, refused FROM usage WHERE refused ORDER BY 3"
    rows = [("", "", 401, 1), ("poor", ids[0], 402, 2), ("team", ids[1], 404, 1)]
    wait_for(lambda: api.services.ledger.read(sql) == rows, 2, str(rows))
    text = api("GET", "/metrics", ADMIN_KEY).text
    counted = samples(families(text)["proxy_requests"], "model", "status")
    assert counted == {("", "401"): 1, ("", "402"): 2, ("", "404"): 1}


def test_metrics_have_help_and_type_and_no_histograms(measured):
    text = measured[0][0]
    named = {match[1]: match[0] for match in re.finditer("# HELP (\\S+) .+\n", text)}
    kinds = dict(re.findall("# TYPE (\\S+) (\\w+)\n", text))
    assert named.keys() == kinds.keys()
    assert {kinds[name] for name in named} == {"counter", "gauge", "summary"}
    assert {*families(text)} == {name.removesuffix("_total") for name in named}
    assert "_bucket" not in text


def test_tokens_and_credits_agree_with_the_ledger(measured):
    texts, receipts, _ = measured
    read = families(texts[0])
    tokens, credits = Counter(), Counter()
    for row in receipts:
        credits[row["model"],] += round(row["credits"] * 10**6)
        for kind in ("input", "cached", "written", "output"):
            tokens[row["model"], kind] += row[f"{kind}_tokens"]
    assert samples(read["proxy_tokens"], "model", "class") == +tokens
    spent = samples(read["proxy_credits"], "model")
    assert {key: round(value * 10**6) for key, value in spent.items()} == +credits
    assert credits["chat",] > 0 and tokens["chat", "cached"] == 16
    assert tokens["chat", "written"] == 12


def test_balances_agree_with_the_accounts(measured):
    texts, _, credits = measured
    balances = samples(families(texts[0])["proxy_balance_credits"], "account")
    available = {(id,): one["available"] for id, one in credits.items()}
    assert balances == {key: value for key, value in available.items() if value}
    assert balances['q"\\',] == 3


def test_streams_in_progress_are_counted(measured):
    read = families(measured[0][0])
    for name in "proxy_streams_in_progress", "proxy_requests_in_progress":
        assert samples(read[name]) == {(): 3}


@pytest.mark.parametrize(
    "name, member",
    [
        ("proxy_request_duration_seconds", "duration_ms"),
        ("proxy_time_to_first_byte_seconds", "ttfb_ms"),
    ],
)
def test_a_summary_agrees_with_the_ledger(name, member, measured):
    texts, receipts, _ = measured
    family, times = families(texts[0])[name], Counter()
    rows = [row for row in receipts if row[member] is not None]
    for row in rows:
        times[row["model"],] += row[member] / 1000
    counts = Counter((row["model"],) for row in rows)
    assert samples(family, "model", suffix="_count") == counts
    assert samples(family, "model", suffix="_sum") == pytest.approx(+times)


def test_a_fresh_server_has_metrics_that_can_be_read(api):
    answer = api("GET", "/metrics", ADMIN_KEY)
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    balances = samples(families(answer.text)["proxy_balance_credits"], "account")
    assert balances == {("boss",): 1, ("demo",): 1, ("other",): 1, ("team",): 100}


# -- Ten thousand accounts -----------------------------------------------------------

MANY = """
WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 9999)
INSERT INTO accounts(id, made, created) SELECT printf('acc%05d', i), 1, 1 FROM n;
WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 99999)
INSERT INTO keys(id, account, name, hint, hash, admin, created, revoked)
SELECT printf('key_%016x', i), iif(i % 2, 'team', printf('acc%05d', i / 2 % 10000)),
    'key', 'sk-…', 'x', 0, 1600000000 + i, iif(i % 20 = 1, NULL, 1700000000 + i) FROM n;
WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 99999)
INSERT INTO usage(account, day, key, model, status, requests, cost)
SELECT printf('acc%05d', i / 10), strftime('%s', 'now') / 86400 - i % 10, 'k', 'chat',
    200, 1, 0 FROM n;
WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 49999)
INSERT INTO requests(account, id, key, model, path, stream, slot, state, hold, cost,
    status, created)
SELECT 'team', printf('req_%011x%013x', 1700000000000 + i * 7000, i), 'k', 'm' || i % 5,
    'chat/completions', 0, 1, 1, 0, 4, 200, 1700000000000 + i * 7000 FROM n;
"""
MIDDLE, RECEIPTS = 1_700_175_000, "/v1/account/requests"  # seconds; of two days each
PAGES_OF_MANY = [
    ("/v1/account", TEAM_KEY), ("/v1/account/keys?limit=1000", TEAM_KEY),
    ("/v1/account/keys?after=key_000000000001869f", TEAM_KEY),
    ("/v1/account/usage?days=366", TEAM_KEY), (RECEIPTS, TEAM_KEY),
    (f"{RECEIPTS}?limit=200&after=req_{MIDDLE * 1000:011x}", TEAM_KEY),
    (f"{RECEIPTS}?since={MIDDLE}&until={MIDDLE + proxy.DAY}", TEAM_KEY),
    (f"{RECEIPTS}?until=1600000000", TEAM_KEY), (f"{RECEIPTS}?failed=true", TEAM_KEY),
    ("/v1/accounts/team/requests?limit=200", ADMIN_KEY), ("/metrics", ADMIN_KEY),
    ("/v1/accounts", ADMIN_KEY), ("/v1/accounts?limit=1000", ADMIN_KEY),
    ("/v1/accounts?limit=1000&after=acc09000", ADMIN_KEY),
    ("/v1/accounts/team", ADMIN_KEY), ("/v1/accounts/acc05000", ADMIN_KEY),
    ("/v1/accounts/acc05000/keys", ADMIN_KEY),
    ("/v1/accounts/acc05000/usage", ADMIN_KEY),
    ("/", None), ("/dashboard", None),
]  # fmt: skip


@pytest.fixture(scope="module", params=["made", "declared"])
def crowd(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Api]:
    """An API with 10,000 accounts and 100,000 keys in the ledger, half of them one
    account's; or as many accounts, each with its key, in keys.json as well."""
    folder = tmp_path_factory.mktemp("crowd")
    proxy.Ledger(folder / "proxy.db").close()
    with sqlite3.connect(folder / "proxy.db") as db:
        db.executescript(f"PRAGMA synchronous = OFF; BEGIN; {MANY} COMMIT;")
    db.close()
    more = {f"acc{n:05}": {"keys": {"k": f"sk-declared-{n}"}} for n in range(10000)}
    accounts = more if request.param == "declared" else {}
    keys = keys_file(folder, "http://127.0.0.1:9", accounts=accounts)
    made = proxy.create_app(keys, folder / "proxy.db")
    yield Api(made)
    made.extensions["proxy"].close()


@pytest.mark.parametrize("path, key", PAGES_OF_MANY)
def test_ten_thousand_accounts_answer_each_page_in_100_ms(path, key, crowd):
    took = []
    for _ in range(3):
        start = time.thread_time()
        assert crowd("GET", path, key).status_code == 200
        took.append(time.thread_time() - start)
    assert min(took) < 0.1, took


# Command line ------------------------------------------------------------------------


class Shell:
    """Commands in this process, on the files of a test."""

    def __init__(self, files: tuple, capsys: pytest.CaptureFixture) -> None:
        self.keys, self.db = files
        self.capsys = capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """Exit status, standard output and standard error."""
        self.capsys.readouterr()
        files = ["--keys", str(self.keys), "--db", str(self.db)]
        try:
            status = proxy.main([*words, *files])
        except SystemExit as end:
            status = end.code
        return status, *self.capsys.readouterr()

    def rows(self, *words: str) -> list[dict]:
        """What the command says with --json."""
        status, out, err = self(*words, "--json")
        assert (status, err) == (0, "")
        return json.loads(out)


@pytest.fixture
def run(files: Callable, capsys: pytest.CaptureFixture) -> Shell:
    """Commands on the test's usual files, which its `api` has too."""
    return Shell(files(), capsys)


def refused_in_one_line(outcome: tuple[int, str, str]) -> str:
    """Return the one line that a failed command said."""
    status, out, err = outcome
    assert status == 1 and out == "" and err.count("\n") == 1, outcome
    return err


def test_keys_add_prints_the_key_alone_which_pays_from_its_credits(run, api):
    status, out, err = run("keys", "add", "alice", "--credits", "0.5")
    assert (status, err) == (0, "alice is new, with 0.500000 credits.\n") and re.fullmatch(r"sk-[\w-]{40,}\n", out)
    api.say("one two three", out.strip())
    [row] = run.rows("credits", "show", "alice")
    left = {"granted": 0.5, "spent": 0.000006, "held": 0, "available": 0.499994}
    assert row == {"account": "alice"} | left


def test_keys_list_names_each_key_with_its_account_and_never_shows_one(run):
    new = run("keys", "add", "alice", "--name", "laptop", "--admin")[1].strip()
    rows = run.rows("keys", "list")
    about = [(row["account"], row["name"], row["source"], row["admin"]) for row in rows]
    assert ("team", "main", "keys.json", False) in about
    assert ("alice", "laptop", "proxy.db", True) in about
    assert ("boss", "main", "keys.json", True) in about
    assert all(re.fullmatch("key_[0-9a-f]{16}", row["id"]) for row in rows)
    shown = json.dumps(rows) + run("keys", "list")[1]
    assert shown.count("laptop") == 2
    for key in new, TEAM_KEY, DEMO_KEY, OTHER_KEY, proxy.sha256(new):
        assert key not in shown


TYPED = {
    "--expires": "2999-01-31", "--budget": "2.5", "--per": "month", "--models": "chat,echo",
    "--rate": "5/minute", "--concurrent": "2",
}  # fmt: skip


def test_keys_add_and_set_take_a_keys_terms(run):
    words = [word for pair in TYPED.items() for word in pair]
    run("keys", "add", "alice", "--name", "laptop", *words)
    [row] = [row for row in run.rows("keys", "list") if row["account"] == "alice"]
    assert (row["expires"], row["models"]) == ("2999-01-31", ["chat", "echo"])
    assert row["limits"] == {"rate": "5/minute", "concurrent": 2}
    wanted = {"credits": 2.5, "per": "month", "available": 2.5}.items()
    assert wanted <= row["budget"].items()
    change = "--name", "desk", "--budget", "3", "--remove", "models", "--rate", "7/minute"
    assert run("keys", "set", "alice/laptop", *change)[0] == 0
    [row] = [row for row in run.rows("keys", "list") if row["account"] == "alice"]
    assert (row["name"], row["models"]) == ("desk", None)
    assert row["limits"] == {"rate": "7/minute", "concurrent": 2}
    assert (row["budget"]["credits"], row["budget"]["per"]) == (3, "month")
    assert "3.000000 of 3.000000 (month)" in run("keys", "list")[1]
    assert "keys.json" in refused_in_one_line(run("keys", "set", "team/main", *change[:2]))


NO_WORDS = {
    "expires": ["soon", "2030-02-30", "", "2020-01-01"],
    "budget": ["much", "-1", "", "nan", "1e-9", "5"],
    "budget=5 --per": ["year", ""], "models": ["nope", "", "chat,,echo"],
    "rate": ["often", "", "0/minute"], "concurrent": ["0", "ten", "", "1.5"],
}  # fmt: skip


@pytest.mark.parametrize(
    "name, text", [(name, text) for name, texts in NO_WORDS.items() for text in texts]
)
def test_terms_that_cannot_be_meant_are_refused_and_nothing_is_made(run, name, text):
    run("keys", "add", "bob")
    for words in ("add", "alice"), ("set", "bob/key"):
        *before, option = f"--{name}".split()
        told = refused_in_one_line(run("keys", *words, *before, option, text))
        assert re.search(rf"\b{option[2:]}\b", told)
    names = {row["account"]: row["expires"] for row in run.rows("keys", "list")}
    assert "alice" not in names and names["bob"] is None


def test_a_key_is_named_by_its_id_or_by_account_and_name(run):
    for name in "laptop", "laptop", "desk":
        run("keys", "add", "alice", "--name", name)
    assert "2 keys have this name" in refused_in_one_line(run("keys", "revoke", "alice/laptop"))
    assert run("keys", "revoke", "alice/desk")[0] == 0
    assert "no such key" in refused_in_one_line(run("keys", "revoke", "alice/desk"))
    first = next(row for row in run.rows("keys", "list") if row["name"] == "laptop")
    assert run("keys", "revoke", first["id"])[0] == 0
    assert run("keys", "revoke", "alice/laptop")[0] == 0
    assert run("keys", "revoke", "team/main")[0] == 0
    live = {row["account"] for row in run.rows("keys", "list") if not row["revoked"]}
    assert live == {"demo", "other", "poor", "boss"}


@pytest.mark.parametrize("noun, field", [("keys", "account"), ("accounts", "id")])
def test_a_list_is_of_all_accounts_or_of_one(noun, field, run):
    run("keys", "add", "alice")
    assert {row[field] for row in run.rows(noun, "list", "team")} == {"team"}
    assert len({row[field] for row in run.rows(noun, "list")}) > 3
    assert "nobody" in refused_in_one_line(run(noun, "list", "nobody"))


def test_keys_add_says_that_a_new_account_has_no_credits(run):
    told = "alice is new, and has no credits yet: credits add alice AMOUNT\n"
    assert run("keys", "add", "alice")[2] == told
    assert run("keys", "add", "alice")[2] == run("keys", "add", "team")[2] == ""


def test_credits_take_and_log_undo_and_tell(run):
    run("keys", "add", "alice", "--credits", "3")
    run("credits", "add", "alice", "2", "--note", "a gift")
    told = refused_in_one_line(run("credits", "take", "alice", "5.5"))
    assert "alice has 5.000000 available" in told
    assert run("credits", "take", "alice", "4.5", "--note", "a typo")[0] == 0
    assert run.rows("credits", "show", "alice")[0]["available"] == 0.5
    rows = run.rows("credits", "log", "alice")
    told = [(row["credits"], row["note"]) for row in rows]
    assert told == [(-4.5, "a typo"), (2, "a gift"), (3, "keys add")]
    assert run.rows("credits", "log") == rows and run.rows("credits", "log", "team") == []
    assert "a typo" in run("credits", "log")[1]


def test_accounts_close_ends_all_keys_of_an_account(run, api):
    key = run("keys", "add", "alice", "--credits", "3")[1].strip()
    api.say("a", key)
    assert run("accounts", "close", "alice") == (0, "alice is closed.\n", "")
    assert api.refusal("GET", "/v1/models", key) == (401, "unauthorized")
    rows = {row["id"]: row for row in run.rows("accounts", "list")}
    assert [id for id, row in rows.items() if row["closed"]] == ["alice"]
    assert rows["alice"]["credits"]["spent"] == 0.000002
    assert "2.999998" in run("accounts", "list")[1]
    assert "keys.json" in refused_in_one_line(run("accounts", "close", "team"))
    assert "nobody" in refused_in_one_line(run("accounts", "close", "nobody"))


def test_keys_revoke_ends_a_key_of_either_file(run, api):
    key, before = run("keys", "add", "alice")[1].strip(), run.keys.read_bytes()
    for each in key, TEAM_KEY:
        assert run("keys", "revoke", proxy.key_id(proxy.sha256(each)))[0] == 0
        assert api.refusal("GET", "/v1/models", each) == (401, "unauthorized")
    rows = run.rows("keys", "list")
    assert sum(row["revoked"] is not None for row in rows) == 2
    assert run.keys.read_bytes() == before
    assert "no such key" in refused_in_one_line(run("keys", "revoke", "key_nothing"))


def test_credits_add_up_exactly(run):
    run("keys", "add", "alice")
    for amount in "0.1", "0.2", "0.000001":
        assert run("credits", "add", "alice", amount, "--note", "thanks")[0] == 0
    assert run.rows("credits", "show", "alice")[0]["granted"] == 0.300001
    _, out, _ = run("credits", "show")
    assert "0.300001" in out and "team" in out


@pytest.mark.parametrize("verb", ["add", "take"])
@pytest.mark.parametrize("amount", ["0", "lots", "", "nan", "inf", "1e-7", "1e10", "0x5"])
def test_a_bad_amount_is_refused(run, verb, amount):
    assert "AMOUNT" in refused_in_one_line(run("credits", verb, "team", amount))
    assert run.rows("credits", "show", "team")[0]["granted"] == 100


@pytest.mark.parametrize("option, value", [("--credits", "lots"), ("--name", "")])
def test_what_is_wrong_with_a_new_key_makes_no_account(run, option, value):
    assert option in refused_in_one_line(run("keys", "add", "alice", option, value))
    assert "alice" not in run("credits", "show")[1]


@pytest.mark.parametrize(
    "words, told",
    [
        ("credits add team -5", "-5: an amount is never negative; `credits take` takes"),
        ("nonsense", "No such command 'nonsense'."),
        ("keyz list", "No such command 'keyz'. Did you mean 'keys'?"),
        ("serve --port 0", "Invalid value for '--port': 0"),
        ("serve --port 99999", "Invalid value for '--port': 99999"),
        ("usage --dayz 3", "No such option '--dayz'."),
        ("usage --days 0", "Invalid value for '--days': 0"),
        ("usage --days 99999999999999999999", "Invalid value for '--days': 99999999999"),
    ],
)
def test_a_mistyped_command_gets_one_line_and_ends_with_2(words, told, run):
    status, out, err = run(*words.split())
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith(told)


def test_check_passes_a_good_ledger_with_warnings(run, monkeypatch):
    monkeypatch.delenv("PROXY_TEST_UNSET", raising=False)
    monkeypatch.setattr(proxy.sqlite3, "sqlite_version_info", (3, 36, 0))
    whole = json.loads(run.keys.read_text())
    whole["upstreams"]["main"]["key"] = "$PROXY_TEST_UNSET"
    run.keys.write_text(json.dumps(whole))
    run.keys.chmod(0o644)
    proxy.Ledger(run.db).close()
    status, out, _ = run("check")
    assert status == 0
    assert out.endswith("The ledger's schema is version 4.\nThe ledger adds up.\n")
    for warning in "PROXY_TEST_UNSET", "chmod 600", "is too old: 3.37 is needed":
        assert warning in out


def greeted(run: Shell, host: str = "127.0.0.1") -> str:
    """What a server says at its start."""
    config = proxy.ConfigFile(run.keys).current
    with closing(proxy.Ledger(run.db)) as ledger:
        demo = proxy.live_demo(config, ledger)
    return proxy.greeting(config, demo, f"http://{host}:8000")


def test_the_demo_key_is_offered_and_warned_of_while_it_lives(files, run):
    def told() -> tuple[int, int]:
        return greeted(run).count(DEMO_KEY), run("check")[1].count("the demo key is public")

    assert told() == (1, 1)
    files(accounts={"demo": None})
    assert told() == (0, 0)
    files()
    run("keys", "revoke", proxy.key_id(proxy.sha256(DEMO_KEY)))
    assert told() == (0, 0)


@pytest.mark.parametrize(
    "host, warned",
    [
        ("127.0.0.1", False), ("127.1.2.3", False), ("localhost", False),
        ("[::1]", False), ("0.0.0.0", True), ("[::]", True), ("10.0.0.5", True),
        ("gateway.example", True),
    ],
)  # fmt: skip
def test_serve_warns_of_a_demo_key_that_others_can_reach(host, warned, files, run):
    assert ("public key" in greeted(run, host)) == warned
    files(accounts={"demo": None})
    assert "public key" not in greeted(run, host)


def online(run: Shell) -> tuple[int, str]:
    """The status of `check --online`, and what it says of the upstream `main`."""
    status, out, _ = run("check", "--online")
    [row] = [line for line in out.splitlines() if line.startswith("seedream ")]
    return status, row.rpartition("  ")[2]


@pytest.mark.parametrize(
    "kind, key, told",
    [
        (FakeDeepSeek, SECRET, "accepted"),
        (FakeDeepSeek, "sk-wrong", "status 401"),
        (FakeVolcengine, FakeVolcengine.key, "accepted"),
        (FakeVolcengine, f"{ACCESS_KEY}:wrong", "status 401"),
        (FakeAnthropic, SECRET, "accepted"),
        (FakeAnthropic, "sk-wrong", "status 401"),
        (FakeImages, SECRET, "accepted"),
        (FakeImages, "sk-wrong", "status 401"),
    ],
)
def test_check_online_asks_each_provider_once_whether_it_knows_the_key(
    files, run, kind, key, told
):
    with kind() as up:
        files(up.url, key=key)
        assert (online(run), len(up.requests)) == ((0, told), 1)


@pytest.mark.parametrize(
    "script, told, status",
    [
        (stall(), "ReadTimeout", 1),
        (raw(b""), "ConnectionError", 1),
        (raw(head(302, ("Location", "/v1/account"))), "status 302", 0),
    ],
    ids=["silence", "an end", "a redirect"],
)
def test_check_online_says_what_became_of_a_provider(
    files, run, monkeypatch, script, told, status
):
    monkeypatch.setattr(proxy, "PROBE_TIMEOUT", 0.2)
    with Upstream(script) as up:
        files(up.url)
        assert (online(run), len(up.requests)) == ((status, told), 1)
    assert online(run) == (1, "ConnectionError")  # nobody is there any more


@NEEDS_OPENSSL
def test_check_online_trusts_the_certificates_that_a_relay_trusts_and_no_other(
    files, run, tmp_path, monkeypatch
):
    for trusted, asked, told in (False, 0, (1, "SSLError")), (True, 1, (0, "accepted")):
        with TlsUpstream(tmp_path, json_answer({"data": []})) as up:
            monkeypatch.setenv("SSL_CERT_FILE", str(up.cert) if trusted else "")
            files(up.url)
            assert (online(run), len(up.requests)) == (told, asked)


def test_check_works_beside_a_running_server(run, api):
    answer = api("POST", CHAT, **HELLO, stream=True)
    pieces = iter(answer.response)
    next(pieces)
    assert run("check")[0] == 0
    assert b"[DONE]" in b"".join(pieces)
    answer.close()
    assert run("check")[0] == 0


def test_check_fails_a_ledger_that_does_not_add_up(run):
    run("keys", "add", "alice", "--credits", "1")
    altered("UPDATE accounts SET granted = granted + 1")(run.db)
    status, out, _ = run("check")
    altered("UPDATE accounts SET granted = granted - 1")(run.db)
    assert status == 1 and "wrong: alice: granted, spent, held and lost have 1," in out


COMMANDS = pytest.mark.parametrize("command", ["check", "keys list", "serve"])


@COMMANDS
def test_a_refused_keys_json_is_told_in_one_line(run, command):
    good = run.keys.read_text()
    run.keys.write_text(json.dumps(planted("models.chat.price.input", -1)))
    assert "models.chat.price.input" in refused_in_one_line(run(*command.split()))
    assert not run.db.exists()
    run.keys.write_text(good)  # for the check after the test


@COMMANDS
@pytest.mark.parametrize(
    "spoil, words", [*((damage, "") for damage in DAMAGE), *UNUSABLE.values()]
)
def test_an_unusable_ledger_is_told_in_one_line(
    run, monkeypatch, tmp_path, command, spoil, words
):
    monkeypatch.setattr(proxy.Server, "run", lambda self: None)
    run.db = tmp_path / "disk" / "proxy.db"
    run.db.parent.mkdir()
    proxy.Ledger(run.db).close()
    spoil(run.db)
    assert words in refused_in_one_line(run(*command.split()))


def test_the_ledger_stands_beside_the_keys_file(tmp_path, monkeypatch):
    monkeypatch.delenv("PROXY_DB", raising=False)
    monkeypatch.setenv("PROXY_KEYS", str(keys_file(tmp_path, "http://127.0.0.1:9")))
    assert proxy.main(["keys", "add", "alice"]) == 0
    assert (tmp_path / "proxy.db").exists()
    monkeypatch.setenv("PROXY_DB", str(tmp_path / "elsewhere.db"))
    assert proxy.main(["keys", "add", "alice"]) == 0
    assert (tmp_path / "elsewhere.db").exists()


@pytest.mark.parametrize("command", ["check", "keys list", "credits show", "usage"])
def test_a_command_that_only_reads_makes_no_ledger(run, command):
    status, out, err = run(*command.split())
    assert status == 0 and out and "there is no ledger yet" in err
    assert "adds up" not in out
    assert {path.name for path in run.db.parent.iterdir()} == {"keys.json"}


def test_a_variable_is_missed_by_models_that_need_it_only():
    document = planted("upstreams.main.key", "$PROXY_TEST_UNSET_KEY")
    document["upstreams"]["echo"] = {"url": "echo:"}
    routes = {"upstream": ["main/gpt", "echo/echo"], "price": {"input": 1}}
    document["models"]["first"] = routes
    missing = proxy.parse_config(document).missing()
    assert missing == {"PROXY_TEST_UNSET_KEY": ["chat"]}


# -- Serving -------------------------------------------------------------------------


@pytest.mark.parametrize("cpus, workers", [(None, 2), (1, 2), (8, 8)])
def test_there_are_as_many_workers_as_processors_and_at_least_two(
    run, monkeypatch, cpus, workers
):
    servers = []
    monkeypatch.delenv("PROXY_WORKERS", raising=False)
    monkeypatch.setattr(proxy.os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(proxy.Server, "run", lambda self: servers.append(self))
    run("serve")
    assert [server.cfg.workers for server in servers] == [workers]


def test_without_a_command_it_serves_as_the_environment_says(files, gate):
    with Upstream(short_or_long(gate)) as up:
        keys, db = files(up.url)
        server = Gateway(keys, db)
        server.command = [sys.executable, "proxy.py"]
        names = {"KEYS": keys, "DB": db, "HOST": "0.0.0.0", "PORT": server.port}
        names |= {"WORKERS": 1, "THREADS": 1}
        server.env |= {f"PROXY_{name}": str(value) for name, value in names.items()}
        with server:
            server.wait_workers(1)
            socket.create_connection(("127.0.0.2", server.port), 5).close()
            only = Visit(server, TEAM_KEY, True, max_tokens=77).start()
            assert error_code_of(Visit(server, TEAM_KEY).start()) == "overloaded"
            gate.set()
            assert only.finish().done


def test_plain_gunicorn_serves_the_application(files):
    keys, db = files()
    server = Gateway(keys, db, env={"PROXY_KEYS": str(keys), "PROXY_DB": str(db)})
    server.command = [sys.executable, "-m", "gunicorn", "--no-control-socket"]
    server.command += ["-b", f"127.0.0.1:{server.port}", "proxy:create_app()"]
    with server:
        assert status(server, model="echo") == 200


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_greetings_curl_line_has_the_demo_key_only_and_works_as_it_stands(one):
    greeting = re.compile(r"^  curl (?:.+\\\n)*.+$", re.MULTILINE)
    line = wait_for(lambda: greeting.search(one.log()), what="the greeting")[0]
    assert f"curl {one.url}{CHAT}" in line and DEMO_KEY in line
    run = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert json.loads(run.stdout)["choices"][0]["message"]["content"] == "Hello!"
    for secret in TEAM_KEY, ADMIN_KEY, SECRET:
        assert secret not in one.log()


# -- Tables --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, told",
    [
        (["--db"], "Option '--db' requires an argument."), ([""], "No such command ''."),
        (["credits", "add", "team"], "Missing argument 'AMOUNT'."),
        (["usage", "team", "x"], "Got unexpected extra argument (x)"),
    ],
)  # fmt: skip
def test_half_a_command_gets_one_line(words, told, run, capsys):
    status, out, err = proxy.main(words), *capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith(told)


@pytest.mark.parametrize("noun", ["keys", "accounts", "credits"])
def test_a_noun_alone_tells_its_commands(noun, run, capsys):
    status, out, err = proxy.main([noun]), *capsys.readouterr()
    assert status == 2 and not out and err.startswith("Usage:") and "tells" not in err


@pytest.mark.parametrize(
    "words", [["-h"], ["--version"], ["keys", "-h"], ["--keys", "other.json", "--version"]]
)
def test_help_and_version_are_there(words, capsys):
    assert proxy.main(words) == 0 and capsys.readouterr().out


@pytest.mark.parametrize("before", [True, False])
def test_the_files_are_named_before_or_after_the_command(before, files, capsys):
    keys, _ = files()
    named = ["--keys", str(keys), f"--db={keys.parent / 'other.db'}"]
    words = ["credits", "show", "team", "--json"]
    assert proxy.main([*named, *words] if before else [*words, *named]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)[0]["account"] == "team" and "other.db" in err


def test_every_command_reads_the_env_file_beside_the_keys_file(
    files, monkeypatch, capsys
):
    keys, _ = files()
    lines = ["# ours", "export PROXY_DB='" + str(keys.parent / "named.db") + "'", ""]
    lines += ["PROXY_KEYS=/nowhere", "UPSTREAM_KEY = from the file", "HOME=/nowhere"]
    (keys.parent / ".env").write_text("\n".join(lines))
    names = ("PROXY_DB", "PROXY_KEYS", "UPSTREAM_KEY")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert proxy.main(["credits", "show", "--keys", str(keys)]) == 0
    assert "named.db" in capsys.readouterr().err
    assert os.environ["UPSTREAM_KEY"] == "from the file"
    assert "PROXY_KEYS" not in os.environ and os.environ["HOME"] != "/nowhere"
    reads = []
    with monkeypatch.context() as patch:
        patch.setattr(proxy, "read_env", reads.append)
        proxy.main(["credits", "show", "--keys", str(keys)])
    assert reads == [str(keys)]
    (keys.parent / ".env").write_text("A=1\nnonsense\n")
    assert proxy.main(["credits", "show", "--keys", str(keys)]) == 1
    assert ".env: line 2: must read like NAME=value" in capsys.readouterr().err


def test_a_command_with_other_keys_than_the_servers_is_warned(one, capsys, tmp_path):
    other = tmp_path / "keys.json"
    other.write_text("{}")
    folder = one.log_file.parent
    db = ["--db", str(folder / "proxy.db")]
    assert proxy.main(["credits", "show", "--keys", str(other), *db]) == 0
    server = str(folder / "keys.json")
    assert f"the server of this ledger reads {server}" in capsys.readouterr().err
    assert proxy.main(["credits", "show", "--keys", server, *db]) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("host, told", [("::1", "http://[::1]:"), ("kept", "unix:")])
def test_a_socket_that_systemd_keeps_is_served_whatever_it_is(host, told, files, tmp_path):
    server, kind = Gateway(*files(), workers=1), socket.AF_INET6
    address: Any = (host, 0)
    if host == "kept":
        kind, address = socket.AF_UNIX, str(tmp_path / "kept")
    with socket.socket(kind) as kept, socket.socket(kind) as client:
        kept.bind(address)
        kept.listen()
        server.keep(kept)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        pipes |= {"cwd": PROJECT, "env": server.env, "pass_fds": server.passed}
        with subprocess.Popen(server.command, **pipes) as process:
            assert process.stdout.readline().startswith(f"Serving {told}".encode())
            client.connect(kept.getsockname())
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert client.makefile("rb").read().startswith(b"HTTP/1.1 200")
            process.terminate()


def test_a_socket_that_another_process_was_given_is_not_taken_for_ours(run, monkeypatch):
    bound = []
    monkeypatch.setattr(proxy, "refuse_taken", lambda *address, patience: bound.append(address))
    monkeypatch.setattr(proxy.Server, "run", lambda self: None)
    for name, text in (("LISTEN_FDS", "1"), ("LISTEN_PID", "1")):
        monkeypatch.setenv(name, text)
    assert run("serve", "--port", "8123")[0] == 0 and bound == [("127.0.0.1", 8123)]


def test_a_failure_without_a_files_name_is_told_in_one_line(run, monkeypatch):
    def fail(self) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(proxy.Server, "run", fail)
    assert refused_in_one_line(run("serve", "--port", str(free_port()))) == "Bad file descriptor\n"


def test_a_taken_port_is_told_at_once(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, out, err = run("serve", "--port", str(port))
        more = re.fullmatch(f"Refused: port {port} is taken: --port (\\d+)\n", err)
        assert (status, out) == (1, "") and int(more[1]) > port  # it does not greet


def test_tables_align_wide_characters(capsys):
    proxy.show([{"name": "团队", "n": 1}, {"name": "e\u0301", "n": 0.000068}])
    assert capsys.readouterr().out == "name  n\n团队  1\ne\u0301     0.000068\n"


def test_amounts_look_alike_everywhere(api, run):
    api.say("one two")  # costs 0.000004
    run("keys", "add", "team", "--name", "tiny", "--budget", "0.000001", "--per", "day")
    run("keys", "add", "new", "--credits", "0.00002")
    for path in "/v1/account", "/v1/account/usage", "/v1/account/requests", "/v1/account/keys":
        text = api("GET", path).text
        assert "0.000004" in text or "0.000001" in text
        assert not re.search(r"[0-9]e-|[0-9]\.0\b|[0-9]\.[0-9]{7}", text)
    assert "0.00002," in run("credits", "show", "new", "--json")[1]
    assert "100.000000" in run("credits", "show")[1]
    assert ",100.000000," in run("accounts", "list", "--csv")[1]
    run("credits", "take", "new", "0.00001")
    assert ",-0.000010," in run("credits", "log", "--csv")[1]
    assert ",0.000004\r\n" in api("GET", "/v1/account/usage?format=csv").text
    for words in ("credits show", "accounts list", "credits log", "usage", "requests"):
        _, out, _ = run(*words.split())
        assert re.search(r" [0-9]+\.[0-9]{6}\b", out) and "e-" not in out
        assert not re.search(r"[0-9]\.[0-9]{1,5}\b|[0-9]\.[0-9]{7}", out)


@pytest.mark.parametrize(
    "value, text",
    [
        (0.000002, "0.000002"), (-0.000068, "-0.000068"), (0.25, "0.25"), (7, "7"),
        (123456789.000001, "123456789.000001"),
        ("2e-06", '"2e-06"'), ('"2e-06, 5.0', r'"\"2e-06, 5.0"'), ("\\", r'"\\"'),
        ([1e-06, "a\\", 2.50], r'[0.000001, "a\\", 2.5]'), ({"5e-06": 0}, '{"5e-06": 0}'),
    ],
)  # fmt: skip
def test_a_number_of_our_own_json_has_no_exponent_and_a_text_is_as_it_was(value, text):
    assert proxy.plain_json(value) == text


def test_what_takes_long_shows_a_bar_on_a_terminal(run, monkeypatch):
    proxy.Ledger(run.db).close()
    assert "Adding up" not in run("check")[2]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "Adding up" in run("check")[2]


RECIPES = re.findall(r'^\| (\w+).*? \| `("\w+": \{"url".*)` \| `(.*)` \|$', README, re.M)


@pytest.mark.parametrize("upstream, model", [each[1:] for each in RECIPES])
def test_the_recipes_of_the_readme_serve(upstream, model, app, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_KEY", "sk-one")
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-two")
    upstreams, models = json.loads(f"{{{upstream}}}"), json.loads(f"{{{model}}}")
    proxy.ConfigFile(str(keys_file(tmp_path, "echo:", upstreams=upstreams, models=models)))
    with Upstream(json_answer(chat_json("Hello!"))) as up:
        [each] = upstreams.values()
        each["url"] = up.url
        api = Api(app(up.url, upstreams=upstreams, models=models))
        name = [*models][0].replace("*", "some/model")
        body = {"model": name, "messages": SAY_HELLO}
        assert api("POST", CHAT, **body).json["model"] == name


def test_the_readme_has_four_recipes():
    assert [each[0] for each in RECIPES] == ["Ollama", "vLLM", "OpenAI", "OpenRouter"]


def test_the_file_itself_names_what_it_needs():
    block = re.search("# /// script\n(.*?)# ///", Path(proxy.__file__).read_text(), re.S)
    named = {*re.findall('"([^"]+==[^"]+)"', block[1])}
    pinned = {line for line in REQUIREMENTS.splitlines() if "==" in line}
    assert named == {line for line in pinned if not line.startswith("pytest")}


def test_the_commands_say_what_the_api_says(api, run, monkeypatch):
    now = time.time()
    monkeypatch.setattr(proxy.time, "time", lambda: now)  # the day does not end
    today = time.strftime("%Y-%m-%d", time.gmtime(now))
    api.say("one two three")
    api.say("four", OTHER_KEY)
    assert run.rows("usage", "team") == api.get("/v1/account/usage")["data"]
    credits = {"account": "team"} | api.get("/v1/account")["credits"]
    assert run.rows("credits", "show", "team") == [credits]
    keys = [row for row in run.rows("keys", "list") if row["account"] == "team"]
    assert keys == api.get("/v1/account/keys")["data"]
    [summed] = run.rows("usage")
    counts = {"requests": 2, "input_tokens": 4, "output_tokens": 4, "credits": 0.000008}
    assert summed | counts | {"day": today, "model": "echo"} == summed
    assert run.rows("usage", "poor") == []
    assert "0.000008" in run("usage", "--days", "1")[1]


def test_tables_are_aligned(api, run):
    api.say("one two three")
    for words in (("keys", "list"), ("credits", "show"), ("usage",)):
        status, out, _ = run(*words)
        heads, *lines = out.splitlines()
        starts = [match.start() for match in re.finditer(r"(?<=  )\S|^\S", heads)]
        assert status == 0 and lines
        for line, start in itertools.product(lines, starts[1:]):
            assert line.ljust(200)[start - 2 : start] == "  ", (heads, line)


@pytest.mark.parametrize("words", [("keys", "list"), ("credits", "show")], ids=" ".join)
def test_an_odd_name_stays_in_its_line_of_a_table(words, api, run):
    for name in SHOWN_NAMES:
        api.post("/v1/accounts", ADMIN_KEY, id=name, credits=1)
        api.post(f"/v1/accounts/{quote(name, safe='')}/keys", ADMIN_KEY, name=name)
    _, out, _ = run(*words)
    assert out.count("\n") == 1 + 5 + len(SHOWN_NAMES)
    assert [name for name in SHOWN_NAMES if name not in out] == []
    assert all(letter.isprintable() or letter == "\n" for letter in out)
    assert {*SHOWN_NAMES} <= {row["account"] for row in run.rows(*words)}


NAMING = [
    ("keys", "add", "NAME"), ("keys", "add", "team", "--name", "NAME"),
    ("keys", "revoke", "NAME"), ("credits", "add", "NAME", "1"),
    ("credits", "show", "NAME"), ("credits", "add", "team", "1", "--note", "NAME"),
    ("usage", "NAME"),
]  # fmt: skip


@pytest.mark.parametrize("words", NAMING, ids=" ".join)
def test_a_command_refuses_a_name_that_cannot_be_in_one_line(words, api, run):
    for name in ("\x1b[31mred", "\udcff", "a\nb", "a\0b", " a", "x" * 101):
        status, out, err = run(*(name if w == "NAME" else w for w in words))
        assert (status, out, err.count("\n")) == (1, "", 1), name
        assert "\x1b" not in err


@pytest.mark.parametrize(
    "words",
    [("credits", "show", "tema"), ("credits", "add", "tema", "5"), ("usage", "tema")],
    ids=" ".join,
)
def test_a_command_refuses_an_account_that_is_not_there(words, api, run):
    assert "tema" in refused_in_one_line(run(*words))
    assert "tema" not in run("credits", "show")[1]


# Pages -------------------------------------------------------------------------------


# -- Documentation -------------------------------------------------------------------

CHROMIUM, CHROMEDRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
BY_SHELL = ["env", "stream-curl", "image-curl", "curl-chat", "account-curl"]
EXAMPLES = dict.fromkeys(BY_SHELL, "sh")
EXAMPLES |= {"javascript-fetch": "node"}
BY_PYTHON = ["stream-python", "python-requests", "python-openai"]
EXAMPLES |= dict.fromkeys(BY_PYTHON, "python")
TOLD_ON_THE_PAGE = [
    "Authorization: Bearer", "dashboard", "/v1/chat/completions", '"messages"',
    '"role": "system"', '"max_tokens": 1024', '"temperature": 0.7', '"stream"',
    "chat.completion", '"finish_reason"', '"usage"', '"prompt_tokens"',
    '"completion_tokens"', '"total_tokens"', "reasoning_content", "deepseek-chat",
    "deepseek-r1", "deepseek-coder", "jimeng-image", "JiMeng", "requests", "OpenAI SDK",
    "JavaScript", "cURL", "Retry-After", "per API key", "Concurrent requests",
    "data: [DONE]", "include_usage", "x-request-id", "GET /v1/models", "x-should-retry",
    "/v1/account/requests", "/v1/account/usage", "x-ratelimit-remaining-requests",
]  # fmt: skip


class Page(HTMLParser):
    """A page's text, what its elements with an id say, and what it links to."""

    VOID = {"meta", "link", "img", "br", "input", "hr"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.words, self.path = html, "", []
        self.text: dict[str, str] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        id = dict(attributes).get("id", "")
        self.text.setdefault(id, "")
        self.path += [(tag, id)] * (tag not in self.VOID)

    def handle_endtag(self, tag: str) -> None:
        while self.path and self.path.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.words += data
        for _, id in self.path:
            self.text[id] += data

    def example(self, id: str) -> str:
        """The text of a pre, without the line end after its tag (HTML §13.2.6.4.7)."""
        return self.text[id].removeprefix("\n")

    def values(self, *names: str) -> list[str]:
        """What the attributes of these names say."""
        return [value for _, name, value in self.attributes if name in names]


def documentation(api: Api, **headers: str) -> Page:
    """The documentation as this app shows it."""
    return Page(api.client.get("/", headers=headers).text)


@pytest.mark.parametrize(
    "models, named",
    [
        ({}, {"echo"}),
        ({"mine": "input"}, {"mine"}),
        ({"mine": "input", "paint": "image"}, {"mine", "paint"}),
    ],
)
def test_the_examples_name_models_that_are_here(app, models, named):
    gone = "chat deepseek-chat deepseek-r1 embed flat jimeng-image seedream".split()
    mine = {
        name: {"upstream": "main/x", "price": {kind: 1}}
        for name, kind in models.items()
    }
    order = {name: None for name in (*gone, "echo" if mine else "-")} | mine
    page = documentation(Api(app(accounts={"demo": None}, models=order)))
    found = re.findall(r'"?model"?[:=] ?"([\w-]+)"', page.html)
    assert {*found} == named and DEMO_KEY not in page.html
    assert ("#image-generation" in page.html) == ("image-curl" in page.html) == ("paint" in named)


def test_the_documentation_has_all_of_the_contract(app):
    coder = {"upstream": "main/x", "about": "Code", "price": {"input": 1}}
    api = Api(app(models={"deepseek-coder": coder}))
    words = " ".join(documentation(api).words.split())
    assert [text for text in TOLD_ON_THE_PAGE if text not in words] == []


def test_the_documentation_lists_every_error_there_is(api):
    classes, kinds = [proxy.ProxyError], set()
    for each in classes:
        classes += each.__subclasses__()
        kinds.add((str(each.status), each.code))
    text = documentation(api).html
    rows = re.findall(r"<tr><td>(\d+)</td><td><code>(\w+)</code>", text)
    assert kinds - {*rows} == set()


def test_every_code_in_the_documentation_can_come(api):
    source, _ = Path(proxy.__file__).read_text().split("# Pages ---")
    text = documentation(api).html
    codes = re.findall(r"<tr><td>\d+</td><td><code>(\w+)</code>", text)
    assert len(codes) > 10
    assert [code for code in codes if f'"{code}"' not in source] == []


def test_the_documentation_has_this_servers_values(app):
    models = {"chat": {"about": "Fast & <b>cheap</b>", "price": {"input": 0.125}}}
    limits = {"rate": "7/minute", "concurrent": 3}
    page = documentation(Api(app(limits=limits, models=models)), Host="ai.example:81")
    assert page.text["base-url"] == "http://ai.example:81/v1"
    assert "http://ai.example:81/v1/chat/completions" in page.text["curl-chat"]
    assert re.search(r"\D7\D", page.text["limit-table"])
    assert re.search(r"\D3\D", page.text["limit-table"])
    assert "Fast & <b>cheap</b>" in page.text["model-table"]
    assert "0.125" in page.text["model-table"] and "0.04" in page.text["model-table"]
    assert "/v1/chat/completions" in page.text["model-table"]  # of JiMeng and echo
    assert re.findall(r"@[A-Z_]+@", page.html) == []
    assert "yourdomain" not in page.html


def test_the_demo_key_is_in_the_examples(api):
    page = documentation(api)
    texts = [page.example(id) for id in EXAMPLES]
    assert all(DEMO_KEY in text and "sk-your-api-key" not in text for text in texts)


def test_without_a_demo_the_examples_have_a_key_to_replace(app):
    page = documentation(Api(app(accounts={"demo": None})))
    assert all("sk-your-api-key" in page.example(id) for id in EXAMPLES)
    assert "deepseek-chat" in page.example("python-requests")
    assert "deepseek-r1" in page.example("python-openai")
    assert "jimeng-image" in page.example("image-curl")
    assert TEAM_KEY not in page.html


def test_a_demo_key_of_odd_letters_is_text(app):
    accounts = {"demo": {"keys": {"readme": 'sk-"><b>x'}}}
    page = documentation(Api(app(accounts=accounts)))
    assert 'sk-"><b>x' in page.example("curl-chat") and "<b>x" not in page.html


NO_HOSTS = ['"><script>alert(1)</script>', "a'b", "ex ample", "@RATE@", ""]


@pytest.mark.parametrize(
    "host, answered",
    [*((host, (200, "http:///v1")) for host in NO_HOSTS), ("x" * 3000, (400, None))],
    ids=short,
)
def test_a_host_that_is_none_is_never_shown(host, answered, shared):
    answer = shared.client.get("/", headers={"Host": host})
    base_url = Page(answer.text).text.get("base-url")
    assert (answer.status_code, base_url) == answered


def test_behind_tls_the_base_url_is_https(board):
    headers = {"X-Forwarded-Proto": "https", "Host": "api.example.com"}
    page = Page(client().get(f"{board.url}/", headers=headers).text)
    assert page.text["base-url"] == "https://api.example.com/v1"


def test_every_link_on_a_page_leads_somewhere(shared):
    for path in ("/", "/dashboard"):
        page = Page(shared.client.get(path).text)
        for target in page.values("href", "src"):
            outer, _, anchor = target.partition("#")
            assert not re.match("https?:|//", outer)
            assert outer in {"", "data:,"} or shared.client.get(outer).status_code == 200
            assert anchor in {*page.text, ""}


OWN_PATHS = ["/", "/dashboard", *(f"/assets/{name}" for name in proxy.ASSETS)]
STRICT = {"Cache-Control": "no-store", "X-Frame-Options": "DENY"}
STRICT |= {"X-Content-Type-Options": "nosniff"}
NOBODY = ("default-src", "base-uri", "frame-ancestors")
PAGE_POLICY = dict.fromkeys(NOBODY, "'none'")
PAGE_POLICY |= dict.fromkeys(("script-src", "style-src", "connect-src"), "'self'")


@pytest.mark.parametrize("path", OWN_PATHS)
def test_pages_have_strict_headers(path, shared):
    answer = shared.client.get(path)
    parts = answer.headers["Content-Security-Policy"].split(";")
    policy = dict(part.strip().partition(" ")[::2] for part in parts)
    assert answer.status_code == 200
    assert policy.items() >= PAGE_POLICY.items()
    assert "unsafe" not in "".join(policy.values())
    assert {*answer.headers.items()} >= {*STRICT.items()}
    assert "Set-Cookie" not in answer.headers
    assert answer.headers["x-request-id"].startswith("req_")


def test_pages_hold_no_inline_code_and_no_foreign_address(shared):
    for path in ("/", "/dashboard"):
        page = Page(shared.client.get(path).text)
        names = {name for _, name, _ in page.attributes}
        assert [name for name in names if re.match("style$|on", name)] == []
        assert "<style" not in page.html
        assert re.findall(r"<script(?! src=)", page.html) == []


def test_scripts_never_make_html_or_code_of_a_text():
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\("
    ways += r"|srcdoc|localStorage|document\.cookie|https?://(?!www\.w3\.org)"
    for text, kind in proxy.ASSETS.values():
        assert re.findall(ways, text) == []
        assert kind in {"text/css", "text/javascript"}


@pytest.mark.parametrize(
    "path", ["/assets/nothing.js", "/assets/..%2fproxy.py", "/keys.json"]
)
def test_there_are_no_other_pages(path, shared):
    answer = shared.client.get(path)
    assert (answer.status_code, answer.json["error"]["code"]) == (404, "not_found")


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """One gateway of two workers for the pages; afterwards its ledger adds up."""
    folder = tmp_path_factory.mktemp("board")
    limits = {"limits": {"rate": "10000/minute"}}
    accounts = {"demo": limits, "team": limits}
    paint = {"paint": {"upstream": "echo/echo", "price": {"image": 0.01}}}
    keys = keys_file(folder, "http://127.0.0.1:9", accounts=accounts, models=paint)
    with Gateway(keys, workers=2, threads=64) as server:
        yield server
        gc.collect()  # a connection that is still open delays the server's end
    assert proof(keys.parent) == []


@pytest.fixture(scope="module")
def whole_board(tmp_path_factory):
    """A gateway without demo, with the contract's models and its examples' key."""
    folder = tmp_path_factory.mktemp("whole")
    with FakeDeepSeek() as deep, FakeVolcengine() as volc, FakeAnthropic() as claude:
        volc.states, soon = ("done",), {"JIMENG_FIRST_POLL": 0.1}
        upstreams = {"volc": {"url": volc.url, "key": volc.key}}
        upstreams["claude"] = {"url": claude.url, "key": claude.key}
        upstreams["main"] = {"url": deep.url, "key": deep.key}
        models = {"jimeng-image": {"upstream": "volc/jimeng_t2i_v40"}}
        prices = {"price": {"input": 1, "output": 5}}
        models["claude"] = {"upstream": "claude/claude-id", **prices}
        you = {"credits": 1, "keys": {"docs": "sk-your-api-key"}}
        accounts = {"demo": None, "you": you}
        more = {"upstreams": upstreams, "models": models, "accounts": accounts}
        keys = keys_file(folder, deep.url, **more)
        with Gateway(keys, workers=2, constants=soon) as server:
            yield server
            server.kill_group()


def run_example(page: Page, id: str, folder: Path) -> str:
    """Run an example of the page as it stands; return what it prints."""
    kind = EXAMPLES.get(id, "python")
    suffix = {"sh": "sh", "python": "py", "node": "mjs"}[kind]
    file = folder / f"example.{suffix}"
    file.write_text(page.example(id))
    program = {"python": sys.executable}.get(kind, kind)
    told = {"capture_output": True, "text": True, "timeout": 60, "cwd": folder}
    run = subprocess.run([program, file], **told)
    assert run.returncode == 0, run.stderr
    return run.stdout


ECHOED = {
    "env": '"object":"list"',
    "stream-curl": "data: [DONE]",
    "stream-python": "Write a haiku about rain\n",
    "image-curl": '"content":"A futuristic city at sunset, cinematic lighting"',
    "python-requests": "Explain quantum computing simply\n",
    "python-openai": "Solve: 2x + 5 = 13\n",
    "javascript-fetch": "What is the capital of France?\n",
    "curl-chat": '"content":"Hello!"',
    "account-curl": '"available":',
}
RELAYED = {
    "image-curl": "https://",
    "messages-python": "Hello",
    "python-requests": "Hello from the deep.\n",
    "python-openai": "Hello from the deep.\n",
    "javascript-fetch": "Hello from the deep.\n",
}


def skip_without(program: str, module: str = "json") -> None:
    """Skip where an example's program or module is not installed."""
    pytest.importorskip(module)
    if not shutil.which(program):
        pytest.skip(f"needs {program}")


NEEDS = {"javascript-fetch": ("node",), "stream-python": ("sh", "openai")}
NEEDS |= {"python-openai": ("sh", "openai"), "messages-python": ("sh", "anthropic")}


@pytest.mark.parametrize("id", EXAMPLES)
def test_an_example_runs_as_it_stands(id, board, tmp_path):
    skip_without(*NEEDS.get(id, ["curl"]))
    page = Page(client().get(f"{board.url}/").text)
    printed = run_example(page, id, tmp_path)
    assert ECHOED[id] in printed.replace('": ', '":')


@pytest.mark.parametrize("id", RELAYED)
def test_an_example_of_the_contracts_models_runs_as_it_stands(
    id, whole_board, tmp_path
):
    skip_without(*NEEDS.get(id, ["curl"]))
    page = Page(client().get(f"{whole_board.url}/").text)
    assert RELAYED[id] in run_example(page, id, tmp_path)


def test_no_example_is_left_out(shared):
    found = re.findall(r'<pre id="([\w-]+)"\s+data-run="(\w+)"', documentation(shared).html)
    assert dict(found) == EXAMPLES | {"messages-python": "python"}  # here is a Claude


# -- Browser -------------------------------------------------------------------------

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--window-size=1280,900",
)  # fmt: skip
PHONE, DESK = 390, 1280
HURRY = """
    const wait = window.setTimeout;
    window.setTimeout = (f, ms, ...more) => wait(f, ms === 5000 ? 1000 : ms, ...more);
"""  # polls five times as often
READY = {
    "overview": "#sums tbody tr", "keys": "#keys tbody tr", "playground": "#play-form",
    "requests": "#requests tbody tr", "admin": "#accounts tbody tr",
}  # fmt: skip
POSITIONS = "return [document.documentElement.scrollWidth, innerWidth]"


class Tab:
    """A tab of Chromium on one gateway, used as a person would."""

    def __init__(self, driver: Any, server: Gateway) -> None:
        self.driver, self.server = driver, server
        self.js = driver.execute_script

    def one(self, css: str) -> Any:
        """The first element of a selector."""
        return self.driver.find_element("css selector", css)

    def all(self, css: str) -> list:
        """All elements of a selector."""
        return self.driver.find_elements("css selector", css)

    def text(self, css: str) -> str:
        """What the first element of a selector shows."""
        return self.one(css).text

    def shown(self, css: str) -> bool:
        """Whether the first element of a selector is to be seen."""
        return self.one(css).is_displayed()

    def until(self, css: str, words: str = "", timeout: float = 10) -> Any:
        """The first element of a selector, once it is seen and has the words."""

        def there() -> Any:
            found = [one for one in self.all(css) if one.is_displayed()]
            return next((one for one in found if words in one.text), None)

        return wait_for(self.unless_stale(there), timeout, f"{css}: {words}")

    @staticmethod
    def unless_stale(look: Callable[[], T]) -> Callable[[], T | None]:
        """The look, which finds nothing while the page is being redrawn."""
        from selenium.common.exceptions import StaleElementReferenceException

        def careful() -> T | None:
            with suppress(StaleElementReferenceException):
                return look()
            return None

        return careful

    def type(self, css: str, words: str) -> None:
        """Replace what a field holds."""
        self.one(css).clear()
        self.one(css).send_keys(words)

    def click(self, css: str) -> None:
        """Click once it can be seen."""
        self.until(css).click()

    def open(
        self, path: str = "/dashboard", width: int = DESK, dark: bool = False
    ) -> None:
        """Open a page as a new visitor."""
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1}
        screen |= {"mobile": width == PHONE}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        cdp = self.driver.execute_cdp_cmd
        cdp("Emulation.setDeviceMetricsOverride", screen)
        cdp("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(self.server.url + "/healthz")
        self.js("sessionStorage.clear()")
        self.driver.get(self.server.url + path)

    def sign_in(self, key: str, section: str = "overview", **look: Any) -> Self:
        """Sign in as a new visitor and wait for what a section shows."""
        self.open(f"/dashboard#/{section}", **look)
        self.until("#key-input").send_keys(key, "\ue007")
        self.until(READY[section])
        return self

    def go(self, section: str) -> None:
        """Open a section by its link."""
        self.click(f"#sections a[href='#/{section}']")
        self.until(READY[section])

    def make_key(self, name: str) -> str:
        """Make a key with the form; return what the dialog shows once."""
        self.type("#key-form [name=name]", name)
        self.click("#key-form button.main")
        key = self.until("#made-key", "sk-").text
        self.close_dialog()
        return key

    def close_dialog(self) -> None:
        """Close the dialog that is open."""
        self.click("#done")
        wait_for(lambda: not self.all("dialog"))

    def key_row(self, name: str) -> Any:
        """The row of a key."""
        path = f"//*[@id='keys']//tbody/tr[contains(., '{name}')]"
        return next(iter(self.driver.find_elements("xpath", path)), None)

    def revoke(self, name: str) -> None:
        """Revoke a key and say yes."""
        self.key_row(name).find_element("css selector", ".danger").click()
        self.click("#revoke-form .danger")
        shown = lambda: (row := self.key_row(name)) and "revoked" in row.text
        gone = self.unless_stale(shown)
        wait_for(gone, 10, f"{name} is shown as revoked")

    def allow_clipboard(self) -> None:
        """Let the page write to the clipboard, and a test read it."""
        grant = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
        self.driver.execute_cdp_cmd("Browser.grantPermissions", grant)

    def copied(self) -> str:
        """What lies in the clipboard."""
        read = "navigator.clipboard.readText().then(arguments[0])"
        return self.driver.execute_async_script(read)

    def kept(self) -> int:
        """How much the browser keeps of a visitor."""
        return self.js("return sessionStorage.length")

    def problems(self) -> list[str]:
        """What the console says, answers that are no success left out."""
        told = [entry["message"] for entry in self.driver.get_log("browser")]
        return [text for text in told if "Failed to load resource" not in text]


@pytest.fixture(scope="module")
def driver(board, tmp_path_factory):
    """One Chromium for all tests; ended before the server, whose end it would delay."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (CHROMIUM.exists() and CHROMEDRIVER.exists()):
        pytest.skip("needs Chromium and its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    folder = tmp_path_factory.mktemp("chromium")
    for flag in (*FLAGS, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(str(CHROMEDRIVER))
    made = webdriver.Chrome(options=options, service=service)
    hurry = {"source": HURRY}
    made.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", hurry)
    yield made
    made.quit()


@pytest.fixture
def tab(driver, board):
    """A tab; after the test, its console has told of no violation and no mistake."""
    made = Tab(driver, board)
    made.problems()
    yield made
    assert made.problems() == []
    assert made.js("return document.cookie + localStorage.length") == "0"


def admin_post(server: Gateway, path: str, **body: Any) -> Any:
    """What an admin's POST answers."""
    headers = bearer(ADMIN_KEY)
    answer = client().post(server.url + path, json=body, headers=headers)
    assert answer.status_code == 201, answer.text
    return answer.json()


@pytest.fixture
def newcomer(board):
    """The key of a new account with a credit."""
    id = f"new {time.monotonic_ns()}"
    admin_post(board, "/v1/accounts", id=id, credits=1)
    return admin_post(board, f"/v1/accounts/{quote(id)}/keys", name="first")["key"]


def test_a_wrong_key_says_so(tab):
    tab.open()
    for key, words in (("sk-wrong", "Wrong key"), ("sk clé", "not an API key")):
        tab.type("#key-input", key)
        tab.click("#sign-in button")
        tab.until("#sign-in output", words)
        assert not tab.shown("#sections")
    assert tab.kept() == 0


def test_the_key_is_kept_in_session_storage_alone(tab):
    tab.sign_in(TEAM_KEY)
    kept = tab.js("return [sessionStorage.length, sessionStorage['api-key']]")
    assert kept == [1, TEAM_KEY]
    assert TEAM_KEY not in tab.driver.current_url
    assert TEAM_KEY not in tab.js("return document.documentElement.outerHTML")
    tab.driver.refresh()
    tab.until("#account-id", "team")
    tab.click("#sign-out")
    tab.until("#key-input")
    assert tab.kept() == 0
    tab.driver.refresh()
    tab.until("#key-input")
    assert not tab.shown("#sections")


def test_each_section_has_an_address(tab):
    tab.sign_in(ADMIN_KEY)
    for section in ("keys", "requests", "playground", "admin"):
        tab.go(section)
        assert tab.driver.current_url.endswith(f"/dashboard#/{section}")
    tab.click("#accounts a[href='#/admin/team']")
    tab.until("h1", "team")
    tab.driver.refresh()
    tab.until("h1", "team")
    tab.driver.back()
    tab.until(READY["admin"])
    tab.driver.get(f"{tab.server.url}/dashboard#/%E0%A4%A/constructor?days=x")
    tab.until("#overview")


def test_the_chart_is_read_by_pointer_and_by_keyboard_and_is_a_table_too(tab, newcomer):
    assert chat(tab.server.url, newcomer, model="echo").ok
    tab.sign_in(newcomer)
    today = time.strftime("%Y-%m-%d", time.gmtime())
    told = f"{today}: 0.000004 credits, echo"
    tab.until("#chart").send_keys("\ue014")
    tab.until("#reading", told)
    assert told == tab.one("#chart").get_attribute("aria-valuetext")
    tab.one("#chart").send_keys("\ue012")
    tab.until("#reading", ": 0 credits")
    tab.js("document.activeElement.blur()")
    tab.until("#reading", "0.000004 credits in 30 days; most on")
    from selenium.webdriver import ActionChains

    right = tab.one("#chart").size["width"] // 2 - 3
    ActionChains(tab.driver).move_to_element_with_offset(
        tab.one("#chart"), right, 0
    ).perform()
    tab.until("#reading", told)
    tab.click("details summary")
    assert tab.text("#by-day tbody").split() == [today, "0.000004", "0.000004"]
    tab.js("""const show = document.querySelector('[name=show]'); show.value = 'tokens';
        show.dispatchEvent(new Event('change'))""")
    tab.until("#reading", "4 tokens")
    tab.driver.refresh()
    tab.until("#reading", "4 tokens in 30 days")


def test_a_key_is_made_used_watched_and_revoked(tab, newcomer):
    openai = pytest.importorskip("openai")
    tab.sign_in(newcomer, "keys")
    key = tab.make_key("laptop")
    assert key not in tab.js("return document.documentElement.outerHTML")
    tab.go("requests")
    assert "No requests" in tab.text("#requests")
    sdk = openai.OpenAI(api_key=key, base_url=f"{tab.server.url}/v1", max_retries=0)
    messages = [{"role": "user", "content": "one two three"}]
    ask = sdk.chat.completions.with_raw_response.create
    answer = ask(model="echo", messages=messages)
    assert answer.parse().choices[0].message.content == "one two three"
    row = tab.until(f"#requests tr[data-id={answer.headers['x-request-id']}]")
    assert all(word in row.text for word in ("200", "echo", "laptop", "3", "0.000006"))
    row.find_element("css selector", "button").click()
    tab.until("dialog", "3 in, 3 out")
    tab.close_dialog()
    tab.go("overview")
    wait_for(lambda: tab.text("#available") == "0.999994", what="the credits left")
    tab.until("#sums tbody", "0.000006")
    tab.go("keys")
    tab.revoke("laptop")
    with pytest.raises(openai.AuthenticationError):
        ask(model="echo", messages=messages)


def make(tab: Tab, key: str, **body: Any) -> str:
    """A key that the account of another one makes."""
    url, headers = f"{tab.server.url}/v1/account/keys", bearer(key)
    answer = client().post(url, headers=headers, json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()["key"]


@pytest.mark.long
def test_a_budget_runs_out_before_ones_eyes(tab, newcomer):
    poor = make(tab, newcomer, name="poor", budget={"credits": 0.0006, "per": "day"})
    tab.sign_in(poor)
    tab.until("#live", "0.0006 of 0.0006 left, per day")
    says = [{"role": "user", "content": "a " * 50}]
    for left in ("0.0005", "0.0004"):
        assert chat(tab.server.url, poor, model="echo", messages=says, max_tokens=50).ok
        tab.until("#live", f"{left} of 0.0006 left")
    while chat(tab.server.url, poor, model="echo", messages=says, max_tokens=50).ok:
        continue
    headers = bearer(poor)
    budget = client().get(f"{tab.server.url}/v1/account", headers=headers).json()["budget"]
    tab.until("#live", f"{budget['available']:.6f}".rstrip("0") + " of 0.0006 left")
    tab.go("keys")
    assert tab.all("#key-form, #keys .edit, #keys .danger") == []


@pytest.mark.long
def test_a_keys_terms_are_told_and_edited(tab, newcomer):
    key = make(tab, newcomer, name="bound", budget={"credits": 0.5, "per": "month"})
    assert chat(tab.server.url, key, model="echo").ok
    tab.sign_in(newcomer, "keys")
    tab.until("#keys", "0.499996 of 0.5 left, per month")
    tab.click("#keys .edit[aria-label='Edit bound']")
    for name, value in {"name": "renamed", "credits": "", "rate": "5/minute"}.items():
        tab.type(f"#edit-form [name={name}]", value)
    tab.click("#edit-form [name=models] option[value=echo]")
    tab.click("#edit-form .main")
    tab.until("#keys", "renamed")
    row = tab.key_row("renamed").text
    assert "only echo" in row and "5/minute" in row and "left" not in row


@pytest.mark.long
def test_the_snippets_of_a_new_key_hold_it(tab, newcomer):
    tab.sign_in(newcomer, "keys")
    tab.allow_clipboard()
    tab.type("#key-form [name=name]", "copied")
    tab.click("#key-form summary")
    tab.click("#key-form [name=models] option[value=echo]")
    tab.click("#key-form button.main")
    key = tab.until("#made-key", "sk-").text
    tab.click("dialog .copy")
    tab.until("dialog .copy", "Copied")
    assert tab.copied() == key
    texts = tab.js("return [...document.querySelectorAll('dialog pre')]"
                   ".map((pre) => pre.textContent)")  # fmt: skip
    assert len(texts) == 4 and all(key in text for text in texts)
    sourced = subprocess.run(["sh", "-ec", texts[0]], capture_output=True, text=True)
    assert '"object"' in sourced.stdout


@pytest.mark.long
def test_every_example_is_copied_as_it_is_shown(tab):
    tab.open("/")
    tab.allow_clipboard()
    page = Page(client().get(f"{tab.server.url}/").text)
    for id in EXAMPLES:
        button = tab.one(f"#{id} + .copy")
        tab.js("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()
        tab.until(f"#{id} + .copy", "Copied")
        assert tab.copied() == page.example(id)


def listed(server: Gateway, key: str) -> dict:
    """The one key that the account of a key has."""
    url = f"{server.url}/v1/account/keys"
    [row] = client().get(url, headers=bearer(key)).json()["data"]
    return row


def test_revoking_asks_first_and_ones_own_key_signs_out(tab, newcomer):
    tab.sign_in(newcomer, "keys")
    tab.click("#keys .danger")
    tab.until("#ask-text", "You are signed in with it")
    tab.one("dialog").send_keys("\ue00c")
    wait_for(lambda: not tab.all("dialog"))
    tab.click("#keys .danger")
    tab.close_dialog()
    assert listed(tab.server, newcomer)["revoked"] is None
    tab.click("#keys .danger")
    tab.click("#revoke-form .danger")
    tab.until("#notice", "you revoked the key")
    assert tab.kept() == 0


@pytest.mark.long
def test_a_key_revoked_elsewhere_ends_its_open_dashboard(tab, newcomer):
    tab.sign_in(newcomer, "keys")
    url = f"{tab.server.url}/v1/account/keys/{listed(tab.server, newcomer)['id']}"
    client().delete(url, headers=bearer(newcomer))
    tab.until("#notice", "not valid any more")
    assert not tab.shown("#sections")
    assert tab.kept() == 0
    assert tab.all("#keys tbody tr") == []


@pytest.mark.long
def test_many_keys_are_shown_in_pages_and_those_of_an_admin_are_not_ones_own(
    tab, newcomer
):
    account = client().get(f"{tab.server.url}/v1/account", headers=bearer(newcomer))
    id = account.json()["id"]
    admin_post(tab.server, f"/v1/accounts/{quote(id)}/keys", name="chief", admin=True)
    with closing(proxy.Ledger(Path(tab.server.log_file).with_name("proxy.db"))) as ledger:
        made = [ledger.make_key(id, f"k{number}") for number in range(proxy.PAGE - 1)]
        ledger.revoke(made[-1][1])
    tab.sign_in(newcomer, "keys")
    assert len(tab.all("#keys tbody tr")) == proxy.PAGE
    assert len(tab.key_row("chief").find_elements("css selector", ".danger")) == 0
    assert not tab.key_row("revoked")
    tab.click("#keys-more")
    wait_for(lambda: len(tab.all("#keys tbody tr")) == proxy.PAGE + 1)
    assert tab.key_row("revoked") and not tab.shown("#keys-more")


def test_the_demo_key_is_offered_and_is_shown_no_keys(tab):
    tab.open("/dashboard#/keys")
    tab.click("#demo")
    tab.until("#account-id", "demo")
    assert tab.shown("#overview") and not tab.all("a[href='#/keys']")


@pytest.mark.long
def test_an_admins_day(tab):
    tab.sign_in(ADMIN_KEY, "admin")
    assert "main" in tab.until("#upstreams", "in use").text
    name = f"zz {time.monotonic_ns()}"
    tab.type("#account-form [name=id]", name)
    tab.type("#account-form [name=credits]", "0.001")
    tab.click("#account-form button")
    tab.until("h1", name)
    key = tab.make_key("theirs")
    for _ in range(3):
        assert chat(tab.server.url, key, model="echo").ok
    tab.go("admin")
    tab.until("#totals", "Credits in 7 days")
    tab.click(f"#accounts a[href='#/admin/{quote(name)}']")
    tab.until("#available", "0.000988")
    for amount, note, left in (("0.75", "for March", "0.750988"), ("-0.5", "", "0.25")):
        tab.type("#grant-form [name=credits]", amount)
        tab.type("#grant-form [name=note]", note)
        tab.click("#grant-form button")
        tab.until("#grant-form output", f"Granted {amount}")
        tab.until("#available", left)
    assert "for March" in tab.until("#grants", "corrected").text
    tab.until("#requests tbody", "theirs")
    tab.click("#close")
    tab.click("#close-form button")
    tab.until(READY["admin"])
    assert chat(tab.server.url, key, model="echo").status_code == 401
    tab.type("#account-form [name=id]", "team")
    tab.click("#account-form button")
    tab.until("#account-form output", "already")


def test_only_admins_see_the_admins_part(tab, newcomer):
    tab.sign_in(newcomer)
    assert not tab.all("#sections a[href='#/admin']")
    tab.driver.get(f"{tab.server.url}/dashboard#/admin/team")
    tab.until("#overview")
    tab.go("keys")
    assert not tab.all("#key-form [name=admin], #key-form [name=metrics]")


def test_a_name_is_text_on_the_dashboard(tab, newcomer):
    for name in SHOWN_NAMES:
        account = f"{name[:80]} {time.monotonic_ns() % 10**9}"
        admin_post(tab.server, "/v1/accounts", id=account)
        assert chat(tab.server.url, make(tab, newcomer, name=name), model="echo").ok
    found = "return [...document.querySelectorAll(arguments[0])]"
    for section in ("keys", "requests"):
        tab.sign_in(newcomer, section)
        names = tab.js(f"{found}.map(n => n.textContent)", f"#{section} bdi")
        assert {*SHOWN_NAMES} <= {*names}
    tab.sign_in(ADMIN_KEY, "admin")
    assert tab.all("#view img") == []
    tab.until("#accounts a bdi[title^='<img']").click()
    tab.until("h1", TAG)


def play_with(tab: Tab, model: str, message: str) -> None:
    """Ask a model in the playground, by keyboard."""
    tab.js(f"document.querySelector('#play-model').value = '{model}'")
    tab.type("#play-message", message)
    tab.one("#play-message").send_keys("\ue007")


def last_turn(tab: Tab, words: str = "credits") -> Any:
    """The last turn of the conversation, once it has told its cost."""
    return tab.until(".turn:last-child .told", words)


def test_a_conversation_of_three_turns(tab, newcomer):
    tab.sign_in(newcomer, "playground")
    message = f"{TAG} {{{{7*7}}}} مرحبا"
    for number, words in enumerate((message, "two words", "and three more"), 1):
        play_with(tab, "echo", words)
        wait_for(lambda: len(tab.all(".turn")) == number)
        told = last_turn(tab).text
        assert tab.text(".turn:last-child .answer") == words
    assert told.split("Copy ")[-1].startswith("17 tokens in, 3 out, 0.00002 credits")
    tab.until("#play-message").send_keys("a", "\ue008\ue007\ue000", "b")
    typed = tab.one("#play-message").get_attribute("value")
    assert typed == "a\nb" and len(tab.all(".turn")) == 3
    tab.go("requests")
    assert len(tab.all("#requests tr[data-id]")) == 3
    tab.go("playground")
    play_with(tab, "chat", "Hello")
    tab.until(".turn:last-child .bad", "temporarily unavailable")
    tab.click("#play-new")
    assert tab.all(".turn") == []


PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"


def test_a_picture_of_an_image_model_is_shown_and_of_no_other(tab, newcomer):
    tab.sign_in(newcomer, "playground")
    play_with(tab, "echo", PIXEL)
    last_turn(tab)
    assert tab.all(".answer img") == []
    play_with(tab, "paint", PIXEL)
    wait_for(lambda: tab.js("return document.querySelector('.answer img')?.naturalWidth"))


HOSTILE = {
    "html": "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>",
    "link": "[here](javascript:window.ran=1) javascript:alert(1)",
    "bidi": "abc \u202e\u2066 cba \u0000 \ufffd", "fences": "```\n" * 10_000,
    "long": "x" * (1 << 20),
}  # fmt: skip
SEVERAL = [  # of which one is enough for every day
    pytest.param(text, id=id, marks=[pytest.mark.long] * (id != "html"))
    for id, text in HOSTILE.items()
]
ANSWERING = """
    const events = arguments[0].match(/[^]{1,997}/g).map((content) =>
        `data: ${JSON.stringify({choices: [{delta: {content, reasoning: content}}]})}\\n\\n`);
    const answer = new Response([...events, 'data: [DONE]\\n\\n'].join(''));
    const ask = window.fetch;
    window.fetch = async (url, ...more) =>
        url.endsWith('completions') ? answer : ask(url, ...more);"""


@pytest.mark.parametrize("text", SEVERAL)
def test_hostile_output_is_text_and_the_page_stays_usable(text, tab, newcomer):
    tab.sign_in(newcomer, "playground")
    start = time.monotonic()
    tab.js(ANSWERING, text)
    play_with(tab, "echo", "Hello")
    tab.until(".told .copy")
    shown = tab.js("return document.querySelector('.answer').textContent")
    assert tab.text(".thoughts") == "Reasoning"  # and is folded
    tab.go("requests")
    assert time.monotonic() - start < 5
    assert tab.js("return window.ran") is None and tab.all(".answer img, .answer a") == []
    assert shown.strip().startswith(text[:40] if "```" not in text else "Copy")


@pytest.mark.long
def test_older_requests_come_page_by_page_and_are_filtered_and_saved(tab, newcomer):
    other = make(tab, newcomer, name="other")
    with ThreadPoolExecutor(8) as pool:
        ask = lambda key: chat(tab.server.url, key, model="echo").ok
        assert all(pool.map(ask, [newcomer] * 117 + [other] * 3))
    assert chat(tab.server.url, other, model="chat").status_code == 503
    tab.sign_in(newcomer, "requests")
    count = "return document.querySelectorAll('#requests tr[data-id]').length"
    counts = [tab.js(count)]
    for _ in range(2):
        tab.click("#requests-more")
        wait_for(lambda: tab.js(count) > counts[-1])
        counts.append(tab.js(count))
    assert counts == [50, 100, 121] and not tab.shown("#requests-more")
    read = "return [...document.querySelectorAll('#requests tr[data-id]')]"
    ids = tab.js(f"{read}.map(row => row.dataset.id)")
    assert ids == sorted({*ids}, reverse=True)
    assert tab.text("#requests-count") == "121 shown"
    tab.type("#filters [name=key]", "other")
    tab.click("#filters button")
    tab.until("#requests-count", "4 shown")
    assert "key=other" in tab.driver.current_url
    tab.js("""URL.createObjectURL = (blob) => { window.saved = blob.text(); return '#'; };
        document.querySelector('#csv').click();""")
    wait_for(lambda: tab.js("return window.saved !== undefined"))
    saved = tab.driver.execute_async_script("window.saved.then(arguments[0])")
    assert [line.count(",other,") for line in saved.splitlines()] == [0, 1, 1, 1, 1]
    tab.click("#filters [name=failed]")
    tab.click("#filters button")
    tab.until("#requests-count", "1 shown")
    tab.until("#requests", "provider unavailable")
    tab.driver.back()
    tab.until("#requests-count", "4 shown")


@pytest.mark.long
def test_an_empty_dashboard_says_so_and_refuses_a_name_too_long(tab, newcomer):
    tab.sign_in(newcomer)
    assert "Nothing" in tab.text("#sums") and not tab.all("#chart")
    tab.until("#reading", "No credits in 30 days")
    tab.go("keys")
    tab.type("#key-form [name=name]", "x" * 300)
    tab.click("#key-form button.main")
    tab.until("#key-form output", "1 to 100 characters")
    tab.go("requests")
    assert "No requests" in tab.text("#requests")
    assert not tab.shown("#requests-more")


UNNAMED = """
    const all = [...document.querySelectorAll('main button, main input, main a,'
        + ' main select, main textarea')].filter((n) => n.checkVisibility());
    return all.filter((n) => n.tabIndex < 0 || !(n.labels || []).length
        && !n.textContent.trim() && !n.ariaLabel).map((n) => n.outerHTML);"""


def press(tab: Tab, css: str) -> None:
    """Go to a control by the Tab key alone and press Enter."""
    for _ in range(60):
        focused = tab.driver.switch_to.active_element
        if tab.js("return arguments[0].matches(arguments[1])", focused, css):
            return focused.send_keys("\ue007")
        focused.send_keys("\ue004")
    raise AssertionError(f"{css} is not reached by the Tab key")


@pytest.mark.long
def test_every_section_is_used_by_keyboard_alone(tab, newcomer):
    tab.sign_in(newcomer)
    for section in ("requests", "playground", "overview", "keys"):
        press(tab, f"#sections a[href='#/{section}']")
        tab.until(READY[section])
        assert tab.js(UNNAMED) == []
        assert tab.js("return document.activeElement.tagName") == "H1"
    tab.js("document.querySelector('#key-form [name=name]').focus()")
    tab.driver.switch_to.active_element.send_keys("by keyboard", "\ue007")
    tab.until("#made-key", "sk-")
    tab.driver.switch_to.active_element.send_keys("\ue00c")
    wait_for(lambda: not tab.all("dialog"))
    wait_for(lambda: tab.key_row("by keyboard"))


ADDRESSES = {"/": None, "keys": TEAM_KEY, "requests": TEAM_KEY, "overview": TEAM_KEY}
ADDRESSES |= {"playground": TEAM_KEY, "admin": ADMIN_KEY}


def show(tab: Tab, address: str, width: int = DESK, dark: bool = False) -> None:
    """Show the documentation, or a section."""
    if key := ADDRESSES[address]:
        tab.sign_in(key, address, width=width, dark=dark)
    else:
        tab.open(address, width, dark)


@pytest.mark.long
@pytest.mark.parametrize("address", ADDRESSES)
def test_a_page_is_no_wider_than_its_screen(address, tab):
    for size in (PHONE, DESK):
        show(tab, address, size)
        wide, screen = tab.js(POSITIONS)
        assert wide <= screen == size


AXE = os.environ.get("AXE_CORE", "")  # the path of axe.min.js, of npm's axe-core


@pytest.mark.skipif(not AXE, reason="needs axe-core (AXE_CORE)")
@pytest.mark.parametrize("address", ADDRESSES)
def test_axe_finds_no_serious_fault(address, tab):
    show(tab, address, PHONE, dark=address in ("/", "keys", "admin"))
    script = {"expression": Path(AXE).read_text()}  # the policy lets no other way
    tab.driver.execute_cdp_cmd("Runtime.evaluate", script)
    run = "axe.run().then((found) => arguments[0](found.violations))"
    faults = tab.driver.execute_async_script(run)
    serious = [each for each in faults if each["impact"] in ("serious", "critical")]
    assert [(each["id"], each["nodes"][0]["html"]) for each in serious] == []


def test_the_policy_stops_inline_code_and_foreign_addresses(tab):
    tab.open()
    tab.js("""
        const script = document.createElement('script');
        script.textContent = 'window.ran = 1';
        document.body.append(script);
        const image = '<img src="http://127.0.0.2:9/" onerror="window.ran = 1">';
        document.body.insertAdjacentHTML('beforeend', image);
        fetch('http://127.0.0.2:9/').catch(() => { window.refused = 1; });""")
    wait_for(lambda: tab.js("return window.refused"))
    assert tab.js("return window.ran") is None
    assert len([text for text in tab.problems() if "Content Security" in text]) >= 3


# Processes, files and clients --------------------------------------------------------


# -- Worlds --------------------------------------------------------------------------

WORDS = chat_chunks("one two three")[1:]  # the first event is text already
COST = 11  # micro-credits of WORDS: 5 prompt tokens at 1, 3 of completion at 2
POOR_ASK = {"model": "chat", "messages": SAY_HELLO, "stream": False, "max_tokens": 10}
POOR_SIZE = len(json.dumps(POOR_ASK))
POOR_HOLD, POOR_COST = POOR_SIZE + 2 * 10, 20 + 2 * 10  # micro-credits
MINUTE_KEY = "sk-minute"  # whose account has sixty requests a minute
SIXTY = {"limits": {"rate": "60/minute", "concurrent": 1000}, "credits": 1}
ACCOUNTS = {
    "team": {"limits": {"rate": "10000/second", "concurrent": 10}},
    "other": {"limits": {"rate": "10000/second"}, "credits": 100},
    "poor": {"credits": 3 * POOR_HOLD / 1e6},
    "minute": {**SIXTY, "keys": {"main": MINUTE_KEY}},
}
quickly = reported(usage_of(5, 3))
QUICK_TERM = {"GRACE": 5, "GRACE_MARGIN": 3.8}  # streams are ended after 1.2 s


def world(workers: int, threads: int, constants: Mapping[str, Any] = {}) -> Callable:
    """Return a fixture: a server for many tests, with its `.up` and `.folder`."""

    @pytest.fixture(scope="module")
    def served(tmp_path_factory):
        folder = tmp_path_factory.mktemp("world")
        with Upstream() as up:
            keys = keys_file(folder, up.url, accounts=ACCOUNTS)
            more = {"threads": threads, "constants": constants}
            with Gateway(keys, workers=workers, **more) as server:
                server.wait_workers(workers)
                server.up, server.folder = up, folder
                yield server
        assert proof(folder) == []

    return served


QUICKLY = {"CLIENT_TIMEOUT": 1, "FIRST_WORD": 1, "BODY_TIMEOUT": 6, "UPSTREAM_IDLE": 0.5}
one = world(1, 64, QUICKLY)
two = world(2, 64, {"LEDGER_TIMEOUT": 0.8, "SWEEP_INTERVAL": 0.1})
four = world(4, 200)
narrow = world(1, 1, {  # relays one request at a time
    "ANSWER_TIMEOUT": 0.15, "STREAM_TIMEOUT": 0.25, "STALL_TIMEOUT": 0.15,
    "COMMENTS_WAIT": 0.05, "WATCH_INTERVAL": 0.05,
})  # fmt: skip


def play(server: Gateway, script: Any) -> Upstream:
    """Script the upstream of a world, which forgets what it was asked before."""
    server.up.requests[:], server.up.script = [], script
    return server.up


LASTS = {  # in the last event of a stream, by its path
    "": b"data: [DONE]\n\n", "messages": b"message_stop", "responses": b".completed",
}  # fmt: skip


class Visit:
    """A client's request on a connection of its own, and what it saw of the answer."""

    def __init__(
        self, gateway: Gateway, key: str, stream: bool = False,
        path: str = "chat/completions", sizes: Callable | None = None, **body: Any,
    ):  # fmt: skip
        """`sizes`: of the body's size, what is sent and what is announced."""
        chat = {"model": "chat", "messages": SAY_HELLO, "stream": stream}
        others = {"stream": True} if stream else {}
        data = json.dumps((chat if path == "chat/completions" else others) | body)
        sent, announced = sizes(len(data)) if sizes else (None, None)
        headers = bearer(key) | dict([JSON, CLOSE])
        headers |= {"Content-Length": str(announced)} if announced else {}
        self.body, self.stream, self.last = b"", stream, LASTS.get(path, LASTS[""])
        self._http = HTTPConnection("127.0.0.1", gateway.port, timeout=30)
        self._http.request("POST", f"/v1/{path}", data[:sent], headers)
        self.sock = self._http.sock

    def start(self) -> Self:
        """Wait for the head, and a stream's first event or the whole of an error."""
        self.reply = self._http.getresponse()
        self.status, self.id = self.reply.status, self.reply.headers["x-request-id"]
        if self.status != 200:
            return self.finish()
        while self.stream and b"\n\n" not in self.body:
            assert (piece := self.reply.read1()), "no first event"
            self.body += piece
        return self

    def finish(self) -> Self:
        """Read to the end, or to where the answer is cut."""
        with suppress(OSError, HTTPException):
            while piece := self.reply.read1():
                self.body += piece
        self.leave()
        return self

    def leave(self) -> None:
        """Close the connection, whatever is still to come."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self._http.close()

    def answered(self) -> bool:
        """Whether anything of the answer is here."""
        poll = select.poll()  # select() knows no descriptor over 1023
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(0))

    @property
    def done(self) -> bool:
        """Whether the last byte, or event, of a successful answer was seen."""
        size = self.reply.headers["Content-Length"]
        whole = self.stream or len(self.body) == int(size)
        end, last = (b"\n\n", self.last) if self.stream else (b"}", b"")
        whole &= last in self.body and self.body.endswith(end)
        return self.status == 200 and whole


def together(count: int, action: Callable[[], T]) -> list[T]:
    """Call the action in that many threads at once; return what they return."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: action(), range(count)))


def visits(count: int, gateway: Gateway, key: str, stream: bool) -> list[Visit]:
    """Start that many requests at once."""
    return together(count, lambda: Visit(gateway, key, stream).start())


def statuses(seen: list[Visit]) -> dict[int, int]:
    """Count answers by status."""
    return dict(Counter(one.status for one in seen))


def status(gateway: Gateway, key: str = TEAM_KEY, **body: Any) -> int:
    """Ask once; return the status."""
    return Visit(gateway, key, **body).start().finish().status


def query(folder: Path, sql: str, *values: Any) -> list[tuple]:
    """Read the ledger beside the server, without any of its code."""
    link = f"file:{folder}/proxy.db?mode=ro"
    with closing(sqlite3.connect(link, uri=True, timeout=10)) as db:
        return db.execute(sql, values).fetchall()


def held(folder: Path) -> int:
    """How many holds are open."""
    return query(folder, "SELECT count(*) FROM requests WHERE state = 0")[0][0]


def wait_held(folder: Path, count: int, timeout: float = 2) -> None:
    """Wait until exactly that many holds are open."""
    wait_for(lambda: held(folder) == count, timeout, f"{count} holds")


def sockets(port: int, listening: bool = False) -> list[str]:
    """What a server's descriptors say of its connections, or of its listening socket."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    own = [one for one in lines if one[1].endswith(f":{port:04X}") and one[9] != "0"]
    return [f"socket:[{one[9]}]" for one in own if (one[3] == "0A") == listening]


def server_of(gateway: Gateway, sock: socket.socket) -> int:
    """The worker that has the other end of a client's socket."""
    ends = f":{gateway.port:04X}", f":{sock.getsockname()[1]:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    found = {one[9] for one in lines if (one[1][8:], one[2][8:]) == ends}
    [inode] = found - {"0"}  # of what was closed
    link = f"socket:[{inode}]"
    return next(pid for pid in gateway.workers() if link in open_files(pid))


def open_files(pid: int) -> list[str]:
    """Return what the descriptors of a process stand for."""
    found = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found.append(os.readlink(each))
    return found


def edit_keys(folder: Path, change: Mapping[str, Any]) -> None:
    """Replace keys.json at once, as an editor or a deployment does."""
    path, draft = folder / "keys.json", folder / f"keys.json.{threading.get_ident()}"
    draft.write_text(json.dumps(merged(json.loads(path.read_text()), change)))
    draft.replace(path)


@contextmanager
def put_load(gateway: Gateway, key: str) -> Iterator[list[Visit]]:
    """Ask for short answers, in turns whole and streamed, from four clients."""
    seen: list[Visit] = []
    over = threading.Event()

    def ask(number: int) -> None:
        while not over.is_set():
            with suppress(OSError, HTTPException):  # its worker was killed
                visit = Visit(gateway, key, stream=len(seen) % 2 == number % 2)
                seen.append(visit.start().finish())

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, number) for number in range(4)]
        try:
            yield seen
        finally:
            over.set()
    [one.result() for one in asked]


def short_or_long(gate: threading.Event) -> Answer:
    """Answer `max_tokens: 77` with a stream that waits for the gate, others at once."""
    slow = sse(WORDS, gate=gate)

    def answer(request: Request) -> None:
        (slow if request.json.get("max_tokens") == 77 else quickly)(request)

    return answer


@pytest.fixture
def gate():
    gate = threading.Event()
    yield gate
    gate.set()


# -- Processes -----------------------------------------------------------------------


def test_sixty_of_two_hundred_at_once_pass_over_four_workers(four):
    up = play(four, json_answer(chat_json("hi")))
    seen = visits(200, four, MINUTE_KEY, stream=False)
    waits = [int(v.reply.headers["Retry-After"]) for v in seen if v.status == 429]
    assert statuses(seen) == {200: 60, 429: 140}
    assert min(waits) >= 1 and max(waits) <= 60
    assert len(up.requests) == 60


def all_finish(streams: list[Visit], gate: threading.Event) -> None:
    """Let the streams come to their end."""
    gate.set()
    assert sum(one.finish().done for one in streams) == 10


def all_leave(streams: list[Visit], gate: threading.Event) -> None:
    """Close the clients' connections while the upstream is silent."""
    [one.leave() for one in streams]


@pytest.mark.parametrize("end", [all_finish, all_leave], ids=lambda f: f.__name__)
def test_ten_of_thirty_streams_run_and_ten_again_when(end, four):
    gates = [threading.Event(), threading.Event()]
    slow = [sse(WORDS, gate=gate) for gate in gates]
    play(four, [slow[0]] * 10 + [slow[1]] * 10)
    first = visits(30, four, TEAM_KEY, stream=True)
    assert statuses(first) == {200: 10, 429: 20}
    end(first, gates[0])
    wait_held(four.folder, 0)
    again = visits(30, four, TEAM_KEY, stream=True)
    assert statuses(again) == {200: 10, 429: 20}
    gates[1].set()
    assert sum(one.finish().done for one in again) == 10


@contextmanager
def watched(folder: Path, pick: Callable, sql: str, *values: Any) -> Iterator[list[int]]:
    """Look all the time at what a query says; keep the one that is picked (min, max)."""
    kept, over = [0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            kept[0] = pick([kept[0], *(row[-1] for row in query(folder, sql, *values))])

    with ThreadPoolExecutor(1) as pool:
        watcher = pool.submit(watch)
        try:
            yield kept
        finally:
            over.set()
    watcher.result()


def test_an_account_is_never_overspent_over_four_workers(four, gate):
    play(four, json_answer(chat_json("x", usage=usage_of(20, 10)), gate=gate))
    granted = 3 * POOR_HOLD
    left_now = "SELECT granted - spent - held FROM accounts WHERE id = 'poor'"
    with watched(four.folder, min, left_now) as lowest:
        parallel = [Visit(four, POOR_KEY, max_tokens=10) for _ in range(50)]
        wait_for(lambda: sum(one.answered() for one in parallel) == 47, 10)
        gate.set()
        assert statuses([one.start() for one in parallel]) == {200: 3, 402: 47}
        later = [status(four, POOR_KEY, max_tokens=10) for _ in range(12)]
    left = granted - POOR_COST * (3 + later.count(200))
    assert later == sorted(later) and later.count(200) > 1
    assert 0 <= granted + lowest[0] < granted
    assert 0 <= left < POOR_SIZE + 2, "what is left pays for one more token"
    assert proof(four.folder) == []


class Moved:
    """The text of a module `time` whose clock is ahead by the seconds in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.write_text("0")

    def to(self, day: int, before: int) -> None:
        """Set the clock to so many seconds before the end of a day from now."""
        draft, now = self.file.with_suffix(".new"), time.time()
        draft.write_text(str((now // proxy.DAY + day + 1) * proxy.DAY - before - now))
        draft.replace(self.file)

    def __repr__(self) -> str:
        ahead = f"time.time() + float(open({str(self.file)!r}).read())"
        members = f"{{**vars(time), 'time': staticmethod(lambda: {ahead})}}"
        return f"(lambda time: type('time', (), {members}))(__import__('time'))"


BUDGETED = {"team": {"limits": {"concurrent": 1000}, "keys": {"bound": {
    "key": "sk-budget", "budget": {"credits": 3 * POOR_HOLD / 10**6, "per": "day"},
}}}}  # fmt: skip
DAYS = "SELECT created / 86400000, sum(iif(state = 0, hold, cost)) FROM requests GROUP BY 1"


def test_a_budget_is_never_exceeded_over_four_workers(gateway, gate, tmp_path):
    clock, budget = Moved(tmp_path / "ahead"), 3 * POOR_HOLD
    answer = json_answer(chat_json("x", usage=usage_of(20, 10)), gate=gate)
    with Upstream(answer) as up:
        constants = {"time": clock}
        server = gateway(up.url, workers=4, constants=constants, accounts=BUDGETED)
        server.wait_workers(4)
        clock.to(day=1, before=3600)

        def fifty() -> list[Visit]:
            asked = [Visit(server, "sk-budget", max_tokens=10) for _ in range(50)]
            wait_for(lambda: sum(one.answered() for one in asked) == 47, 10)
            return asked

        with watched(tmp_path, max, DAYS) as most:
            for _ in range(2):  # what one day holds is nothing to the next
                asked = fifty()
                clock.to(day=1, before=-3600)
            victim = server_of(server, next(v for v in asked if not v.answered()).sock)
            server.kill(victim)
            wait_for(lambda: query(tmp_path, DAYS)[-1][1] < 3 * POOR_HOLD)
            assert proof(tmp_path) == []
            gate.set()
            server.wait_workers(4)
            clock.to(day=2, before=1)
            adversary = Adversary(server, tmp_path, random.Random(3))
            with ThreadPoolExecutor(8) as pool, adversary.at_work(["kill"], 0.5):
                end = time.monotonic() + 1.3
                asks = [pool.submit(ask_until, server, end) for _ in range(8)]
                paid = sum(one.result() for one in asks)
        wait_held(tmp_path, 0, 5)
    days = query(tmp_path, DAYS)
    assert len(days) == 3 and adversary.done and paid > 4
    assert 2 * POOR_HOLD < max(used for _, used in days) <= most[0] <= budget
    assert proof(tmp_path) == []


def ask_until(server: Gateway, end: float) -> int:
    """Ask again and again; the number of answers."""
    paid = 0
    while time.monotonic() < end:
        with suppress(OSError, HTTPException):  # its worker was killed
            paid += status(server, "sk-budget", max_tokens=10) == 200
    return paid


def kill_a_worker_under_load(server: Gateway, folder: Path) -> list[Visit]:
    """Kill a worker that has streams in flight; return those it took with it."""
    streams = together(10, lambda: Visit(server, TEAM_KEY, True, max_tokens=77).start())
    assert statuses(streams) == {200: 10}
    victim = server_of(server, streams[0].sock)
    lost = [one for one in streams if server_of(server, one.sock) == victim]
    server.kill(victim)
    own = f"state = 0 AND key = '{proxy.key_id(proxy.sha256(TEAM_KEY))}'"
    count = f"SELECT count(*) FROM requests WHERE {own}"
    kept = 10 - len(lost)
    wait_for(lambda: query(folder, count)[0][0] == kept, 2, "the slots back")
    for _ in lost:
        streams.append(Visit(server, TEAM_KEY, True, max_tokens=77).start())
        assert streams[-1].status == 200
    assert Visit(server, TEAM_KEY, True).start().status == 429
    assert proof(folder) == []
    [one.leave() for one in streams]
    wait_for(lambda: query(folder, count)[0][0] == 0, 2, "no stream is left")
    server.wait_workers(4)
    return lost


@pytest.mark.parametrize(
    "rounds", [3, long(20)], ids="{} times".format
)
def test_a_killed_worker_loses_no_charge_and_leaks_no_slot(rounds, four, gate):
    play(four, short_or_long(gate))
    with put_load(four, OTHER_KEY) as seen:
        kills = [kill_a_worker_under_load(four, four.folder) for _ in range(rounds)]
    lost = [one for each in kills for one in each]
    sql = "SELECT id, state, cost, estimated FROM requests"
    rows = {id: rest for id, *rest in query(four.folder, sql)}
    done = [one.id for one in seen if one.done]
    assert len(done) > 10 * rounds and len(lost) >= rounds
    assert {tuple(rows[id]) for id in done} == {(proxy.SETTLED, COST, 0)}
    assert {tuple(rows[one.id][:2]) for one in lost} == {(proxy.RELEASED, 0)}
    assert proof(four.folder) == []


@contextmanager
def without_master(server: Gateway) -> Iterator[list[int]]:
    """Kill the master; its orphans are gone at the end, whatever happens."""
    group, orphans = server.master_pid, server.workers()
    try:
        server.kill(group)
        yield orphans
    finally:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def running(pids: list[int]) -> set[int]:
    """Which of these processes run."""
    return {pid for pid, _, _ in processes()} & set(pids)


def test_orphans_drain_and_a_new_start_serves_beside_them(gateway, gate, tmp_path):
    with Upstream([sse(WORDS, gate=gate), sse(WORDS)]) as up:
        server = gateway(up.url, workers=2)
        stream = Visit(server, TEAM_KEY, stream=True).start()
        with without_master(server) as orphans:
            server.start()  # until somebody answers: it may be an orphan
            server.wait_workers(2)
            assert Visit(server, TEAM_KEY, stream=True).start().finish().done
            assert running(orphans), "one still has its stream"
            gate.set()
            assert stream.finish().done
            wait_for(lambda: not running(orphans), 10, "the end of the orphans")
        assert query(tmp_path, "SELECT state, cost FROM requests") == [(1, COST)] * 2


@pytest.mark.parametrize(
    "sig", [signal.SIGTERM, long(signal.SIGHUP), long(signal.SIGKILL)]
)
def test_draining_finishes_short_streams_and_settles_long_ones(sig, gateway, tmp_path):
    gates = [threading.Event(), threading.Event()]
    with Upstream([sse(WORDS, gate=gate) for gate in gates]) as up:
        server = gateway(up.url, workers=2, constants=QUICK_TERM)
        short, long = (Visit(server, TEAM_KEY, True).start() for _ in gates)
        workers, group = server.workers(), server.master_pid
        try:
            os.kill(group, sig)
            threading.Timer(0.2, gates[0].set).start()
            assert short.finish().done
            assert not long.finish().done
            assert json.loads(sse_events(long.body)[-1])["error"]["type"] == "api_error"
            rows = query(tmp_path, "SELECT id, state, estimated FROM requests")
            assert set(rows) == {(short.id, 1, 0), (long.id, 1, 1)}
            wait_for(lambda: not running(workers), 5, "the end of the old workers")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


def test_a_restart_under_a_kept_socket_refuses_nobody(files, gate):
    """As systemd does with `proxy.socket`: its socket outlives the service."""
    script = [sse(WORDS, gate=gate), *[json_answer(chat_json("hi"))] * 100]
    kept = socket.create_server(("127.0.0.1", 0), backlog=512)
    with Upstream(script) as up, kept:
        server = Gateway(*files(up.url, limits={"concurrent": 200}), workers=2, threads=200)
        server.keep(kept)
        with server, ThreadPoolExecutor(100) as pool:
            stream = Visit(server, TEAM_KEY, stream=True).start()

            def ask(number: int) -> int:
                time.sleep(number / 100)  # a hundred, all over the restart
                return status(server)

            assert f"Serving {server.url}/v1" in server.log()
            asked = [pool.submit(ask, number) for number in range(100)]
            wait_for(lambda: sum(each.done() for each in asked) > 10)
            server.kill(server.master_pid, signal.SIGTERM)
            threading.Timer(0.5, gate.set).start()
            server.process.wait(15)
            server.start()
            assert Counter(each.result(20) for each in asked) == {200: 100}
            assert stream.finish().done


@pytest.mark.parametrize(
    "kill, sig", [(os.killpg, signal.SIGINT), (os.kill, signal.SIGQUIT)]
)
def test_an_interrupted_server_ends_its_streams_well(
    kill, sig, gateway, gate, tmp_path
):
    with Upstream([sse(WORDS, gate=gate)]) as up:
        server = gateway(up.url, workers=1)  # another might be starting yet
        stream = Visit(server, TEAM_KEY, stream=True).start()
        started = time.monotonic()
        kill(server.master_pid, sig)  # a terminal signals the whole group
        error = json.loads(sse_events(stream.finish().body)[-1])["error"]
        assert "restarted" in error["message"]
        server.process.wait(10)
    assert time.monotonic() - started < 5
    row = (stream.id, proxy.SETTLED, 503)
    assert query(tmp_path, "SELECT id, state, status FROM requests") == [row]
    log = server.log()
    assert f"event=request request={stream.id}" in log and "Traceback" not in log


def test_a_client_that_does_not_read_is_settled_before_the_end(gateway, tmp_path):
    big = [chat_chunk("gpt-test", {"content": "x" * 100_000})] * 300
    with Upstream([sse(big, done=False)]) as up:
        server = gateway(up.url, workers=1, constants={"GRACE": 4, "GRACE_MARGIN": 3.8})
        stream = Visit(server, TEAM_KEY, stream=True).start()  # and reads no more
        os.kill(server.master_pid, signal.SIGTERM)
        server.process.wait(10)
        stream.leave()
    ((state, cost),) = query(tmp_path, "SELECT state, cost FROM requests")
    assert state == proxy.SETTLED and cost > 0


def refuses(port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def test_an_ending_server_refuses_requests_and_connections_at_once(gateway, gate):
    ask = {"model": "chat", "messages": SAY_HELLO}
    with Upstream(short_or_long(gate)) as up, client() as session:
        server = gateway(up.url, workers=1, constants=QUICK_TERM)
        url = f"{server.url}/v1/chat/completions"
        session.headers.update(bearer(TEAM_KEY))
        assert session.post(url, json=ask).status_code == 200
        stream = Visit(server, TEAM_KEY, stream=True, max_tokens=77).start()
        os.kill(server.workers()[0], signal.SIGTERM)
        answers = []

        def refused():
            answers.append(session.post(url, json=ask, timeout=1))
            return answers[-1].status_code == 503

        wait_for(refused, 1, "the drain")
        assert int(answers[-1].headers["Retry-After"]) >= 1
        assert answers[-1].json()["error"]["code"] == "overloaded"
        server.kill(server.master_pid, signal.SIGTERM)
        wait_for(lambda: refuses(server.port), 1, "a refusal")
        gate.set()
        assert stream.finish().done


def test_a_reload_cuts_nobody(two, gate):
    play(two, short_or_long(gate))
    stream = Visit(two, TEAM_KEY, stream=True, max_tokens=77).start()
    before, kept = set(two.wait_workers(2)), server_of(two, stream.sock)
    with put_load(two, OTHER_KEY) as seen:
        two.kill(two.master_pid, signal.SIGHUP)
        wait_for(lambda: before & set(two.workers()) == {kept}, 10, "a reload")
        door = lambda: {*sockets(two.port, listening=True)} & {*open_files(kept)}
        wait_for(lambda: not door(), 10, "the old one to let nobody in any more")
        count = len(seen) + 4  # which the old workers may have
        wait_for(lambda: len(seen) > count + 20, 10, "answers of the new workers")
    gate.set()
    assert stream.finish().done
    refused = [one for one in seen if not one.done]
    assert {error_code_of(one) for one in refused} <= {"overloaded"}
    assert all(one.done for one in seen[count:])
    wait_for(lambda: before.isdisjoint(two.workers()), what="the old ones' end")


@pytest.mark.parametrize(
    "seconds", [0.5, long(35)], ids="{} s".format
)
def test_a_stopped_worker_keeps_its_holds(seconds, two, gate):
    play(two, short_or_long(gate))
    stream = Visit(two, TEAM_KEY, stream=True, max_tokens=77).start()
    stopped = server_of(two, stream.sock)
    two.kill(stopped, signal.SIGSTOP)
    with put_load(two, OTHER_KEY) as seen:
        time.sleep(seconds)  # in which the others sweep
        wait_for(lambda: len(seen) > 20, what="answers of the other worker")
    assert held(two.folder) == 1 and all(one.done for one in seen)
    gate.set()
    two.kill(stopped, signal.SIGCONT)
    assert stream.finish().done
    sql = "SELECT state, cost FROM requests WHERE id = ?"
    assert query(two.folder, sql, stream.id) == [(1, COST)]
    assert proof(two.folder) == []


# -- Disk and files ------------------------------------------------------------------


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be another program that has the database locked for writing."""
    with closing(sqlite3.connect(folder / "proxy.db", isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        yield


def error_code_of(visit: Visit) -> str:
    """Return the code of an error."""
    return json.loads(visit.body)["error"]["code"]


def test_a_database_locked_for_a_while_serves_late(four, gate):
    up = play(four, short_or_long(gate))
    stream = Visit(four, TEAM_KEY, stream=True, max_tokens=77).start()
    with locked(four.folder):
        gate.set()
        waiting = [Visit(four, OTHER_KEY) for _ in range(10)]
        while b'"stop"' not in stream.body:
            stream.body += stream.reply.read1()
        time.sleep(1)  # in which neither [DONE] nor an answer may come
        assert not any(one.answered() for one in (stream, *waiting))
        assert len(up.requests) == 1
    assert stream.finish().done
    assert statuses([one.start() for one in waiting]) == {200: 10}
    wait_held(four.folder, 0)


def test_a_database_locked_for_long_is_503_and_recovers(two):
    up = play(two, json_answer(chat_json("hi")))
    pids = two.wait_workers(2)
    with locked(two.folder):
        started = time.monotonic()
        refused = visits(10, two, TEAM_KEY, stream=False)
        assert time.monotonic() - started < 4
    assert statuses(refused) == {503: 10}
    assert {error_code_of(one) for one in refused} == {"ledger_unavailable"}
    assert up.requests == [] and status(two) == 200
    assert set(two.workers()) == set(pids)


def test_a_worker_that_starts_beside_a_lost_ledger_answers_503(two, gate):
    play(two, short_or_long(gate))
    db, kept, told_before = two.folder / "proxy.db", two.folder / "kept", len(two.log())
    stream = Visit(two, TEAM_KEY, stream=True, max_tokens=77).start()
    busy = server_of(two, stream.sock)
    [idle] = set(two.wait_workers(2)) - {busy}
    db.rename(kept)
    two.kill(idle)
    gone = lambda: "is gone; restore it" in two.log()[told_before:]
    wait_for(gone, what="a new worker")
    ask = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    told = lambda: {raw_http(two.port, ask)[:12] for _ in range(10)}
    wait_for(lambda: told() == {b"HTTP/1.1 503"}, what="trouble told by both")
    assert {status(two) for _ in range(5)} == {503}
    kept.replace(db)
    gate.set()
    assert stream.finish().done
    two.kill(busy)
    wait_for(lambda: status(two) == 200, what="service")


def test_a_lock_file_that_is_missed_is_503_and_costs_no_hold(two, gate):
    play(two, short_or_long(gate))
    lock, away = two.folder / "proxy.db-lock", two.folder / "away"
    streams = [Visit(two, TEAM_KEY, True, max_tokens=77).start() for _ in "123"]
    lock.rename(away)
    assert {status(two) for _ in range(5)} == {503}
    with pytest.raises(proxy.LedgerUnavailable):
        proxy.Ledger(two.folder / "proxy.db")
    assert held(two.folder) == 3
    away.replace(lock)
    gate.set()
    assert [one.finish().done for one in streams] == [True] * 3
    assert status(two) == 200


def test_a_worker_that_starts_beside_a_lost_keys_json_has_the_last_good_one(two):
    keys, kept, told_before = two.folder / "keys.json", two.folder / "kept", two.log()
    keys.rename(kept)
    told = lambda: "the last good one is kept" in two.log()[len(told_before) :]
    wait_for(told, what="a look at it")
    two.kill(two.wait_workers(2)[0])
    two.wait_workers(2)
    assert ask_each(two, TEAM_KEY) == [200, 200]
    kept.replace(keys)


@contextmanager
def disk_of(folder: Path, size: str) -> Iterator[Callable[[], Path] | None]:
    """Make the folder a disk of this size; fills it with the file it returns. None
    without the right to mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount).returncode:
        yield None
        return

    def fill() -> Path:
        filler = folder / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(512)):
                pass
        return filler

    yield fill
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """Make the test's folder a disk of 2 MB."""
    with disk_of(tmp_path, "2m") as fill:
        if fill is None:
            pytest.skip("needs the right to mount a tmpfs")
        yield fill


@pytest.mark.parametrize("patience", [long(10.0), 0.5])
def test_a_full_disk_stops_new_requests_and_loses_no_charge(
    patience, small_disk, gateway, gate, tmp_path
):
    constants = {"SETTLE_PATIENCE": patience}
    with Upstream(short_or_long(gate)) as up:
        server = gateway(up.url, workers=2, constants=constants)
        pids = server.wait_workers(2)
        streams = [Visit(server, TEAM_KEY, True, max_tokens=77).start() for _ in "123"]
        full = lambda: small_disk() and {status(server) for _ in range(5)} == {503}
        # The log may be moved away once more, and a charge is waited for.
        wait_for(full, 5 + 12 * patience, "the disk is full")
        filler = tmp_path / "filler"
        asked = len(up.requests)
        refused = visits(10, server, TEAM_KEY, stream=False)
        assert {error_code_of(one) for one in refused} == {"ledger_unavailable"}
        assert len(up.requests) == asked
        gate.set()
        threading.Timer(3 * min(patience, 0.5), filler.unlink).start()
        assert [one.finish().done for one in streams] == [patience > 1] * 3
        wait_for(lambda: status(server) == 200, 5, "recovery")
        wait_held(tmp_path, 0, 5)
        sql = "SELECT state, cost FROM requests WHERE stream"
        assert query(tmp_path, sql) == [(proxy.SETTLED, COST)] * 3
        assert proof(tmp_path) == [] and set(server.workers()) == set(pids)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_database_is_503_until_it_is_put_back(loss, two):
    db, kept, up = two.folder / "proxy.db", two.folder / "kept.db", two.up
    play(two, json_answer(chat_json("one two three")))
    ask = {"json": {"name": loss.__name__}, "headers": bearer(TEAM_KEY)}
    made_key = client().post(f"{two.url}/v1/account/keys", **ask).json()["key"]
    assert [status(two, key) for key in (TEAM_KEY, made_key)] == [200, 200]
    before = query(two.folder, "SELECT * FROM requests")
    db.rename(kept)
    loss(db)
    seen = [Visit(two, key).start() for key in (TEAM_KEY, made_key) * 2]
    assert statuses(seen) == {503: 4}
    assert {error_code_of(one) for one in seen} == {"ledger_unavailable"}
    assert len(up.requests) == 2 and db.exists() == (loss != lose)
    kept.replace(db)
    wait_for(lambda: status(two, made_key) == 200, 2, "recovery")
    assert set(before) < set(query(two.folder, "SELECT * FROM requests"))
    assert proof(two.folder) == []


def test_a_database_overwritten_in_place_gives_nothing_away(gateway, tmp_path):
    db = tmp_path / "proxy.db"
    with Upstream(json_answer(chat_json("one two three"))) as up:
        server = gateway(up.url, workers=2)
        assert status(server) == 200
        good = db.read_bytes()
        db.write_bytes(b"\xff" * len(good))
        served = [status(server) for _ in range(6)].count(200)
        assert len(up.requests) == 1 + served
        db.write_bytes(good)
        wait_for(lambda: status(server) == 200, 2, "recovery")
        count = query(tmp_path, "SELECT count(*) FROM requests WHERE state = 1")[0][0]
        assert count == len(up.requests) and proof(tmp_path) == []


def test_another_program_that_closes_the_ledger_takes_no_log_away(two):
    play(two, json_answer(chat_json("one two three")))
    ask = lambda: Visit(two, TEAM_KEY).start().finish()
    seen, log = [ask(), ask()], two.folder / "proxy.db-wal"
    inode = log.stat().st_ino
    with closing(sqlite3.connect(two.folder / "proxy.db")) as db:
        db.execute("SELECT * FROM requests").fetchall()
    assert proof(two.folder) == [] and log.stat().st_ino == inode
    seen.append(ask())
    sql = "SELECT state, cost FROM requests WHERE id IN (?, ?, ?)"
    rows = query(two.folder, sql, *(one.id for one in seen))
    assert rows == [(proxy.SETTLED, COST)] * 3


def test_four_processes_may_start_at_once_in_an_empty_folder(files, tmp_path):
    files()
    code = """if True:
        import proxy, sys
        sys.stdin.readline()
        ledger = proxy.Ledger("proxy.db", worker=True)
        sql = "SELECT value FROM meta WHERE name = 'id'"
        print(ledger.slot, ledger.read(sql)[0], flush=True)
        sys.stdin.readline()
    """
    env = os.environ | {"PYTHONPATH": str(PROJECT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with ExitStack() as stack:
        command = [sys.executable, "-c", code]
        start = lambda: subprocess.Popen(command, cwd=tmp_path, env=env, **pipes)
        started = [stack.enter_context(start()) for _ in range(4)]
        for one in started:
            one.stdin.write("go\n")
            one.stdin.flush()
        lines = [one.stdout.readline().split() for one in started]
    assert len({line[0] for line in lines}) == 4
    assert len({line[1] for line in lines}) == 1


def ask_each(server: Gateway, key: str) -> list[int]:
    """Ask one worker after the other, the others stopped; return the statuses."""
    pids = server.workers()

    def ask(pid: int) -> int:
        others = [each for each in pids if each != pid]
        try:
            [server.kill(each, signal.SIGSTOP) for each in others]
            return status(server, key, model="echo")
        finally:
            [server.kill(each, signal.SIGCONT) for each in others]

    # Who is stopped with the ledger's lock in its hand keeps the others from writing.
    return [next(filter(503 .__ne__, map(ask, [pid] * 3)), 503) for pid in pids]


def test_an_edit_of_keys_json_reaches_every_worker_within_a_second(four):
    assert ask_each(four, "sk-new") == [401] * 4
    for value, expected in (("sk-new", 200), (None, 401)):
        edit_keys(four.folder, {"accounts": {"team": {"keys": {"new": value}}}})
        wait_for(lambda: ask_each(four, "sk-new") == [expected] * 4, 1, "the new keys")


@contextmanager
def in_shell(prefix: str, redirect: str, server: Gateway) -> Iterator[Gateway]:
    """Run the gateway as a shell starts it."""
    line = f'{prefix} exec "$@" {redirect}'
    server.command = ["sh", "-c", line, "sh", *server.command]
    with server:
        yield server


LOGS = {"closed": ">&- 2>&-", "full": ">/dev/full 2>&1", "not read": ">fifo 2>&1"}


@pytest.mark.parametrize("log", LOGS)
def test_a_log_that_cannot_be_written_stops_nothing(log, files, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    unread = os.open(fifo, os.O_RDWR)
    fcntl.fcntl(unread, fcntl.F_SETPIPE_SZ, 4096)
    redirect = LOGS[log].replace("fifo", str(fifo))
    with Upstream(json_answer(chat_json("hi"))) as up:
        server = Gateway(*files(up.url), workers=2, threads=64)
        with in_shell("", redirect, server):
            assert [status(server) for _ in range(60)] == [200] * 60
            edit_keys(tmp_path, {"accounts": {"team": {"keys": {"new": "sk-new"}}}})
            wait_for(lambda: status(server, "sk-new") == 200, 2, "keys.json is read")
            server.kill(server.wait_workers(2)[0])
            server.wait_workers(2)
            assert [status(server) for _ in range(20)] == [200] * 20
            assert proof(tmp_path) == []
    os.close(unread)


def test_a_flood_that_takes_all_descriptors_ends_no_stream(files, gate):
    with Upstream(short_or_long(gate)) as up, ExitStack() as flood:
        server = Gateway(*files(up.url), workers=1, threads=64)
        with in_shell("ulimit -n 64;", "", server):
            [pid] = server.workers()
            stream = Visit(server, TEAM_KEY, stream=True, max_tokens=77).start()
            for _ in range(150):
                sock = socket.create_connection(("127.0.0.1", server.port), 5)
                flood.enter_context(sock).sendall(b"G")
            wait_for(lambda: len(open_files(pid)) > 40, what="no room for more")
            time.sleep(0.5)  # in which nothing may end the stream
            gate.set()
            assert stream.finish().done
            flood.close()
            wait_for(lambda: status(server) == 200, what="recovery")
            assert server.workers() == [pid]


# -- Clients -------------------------------------------------------------------------

POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
POST += b"Authorization: Bearer sk-team\r\nContent-Type: application/json\r\n"
BODY = b'{"model":"echo","messages":[{"role":"user","content":"Hi"}]}'
CODING = b"Transfer-Encoding: chunked\r\n"
SIZED = POST + b"Content-Length: %d\r\n" % len(BODY)
CHUNKS = POST + CODING + b"\r\n"
HIDDEN = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"  # what smuggling would reach
END = b"\r\n0\r\n\r\n"
MALFORMED = {
    "no request": (b"GARBAGE\r\n\r\n", 400),
    "no version": (b"GET /healthz\r\n\r\n", 400),
    "version": (b"GET /healthz HTTP/9.9\r\nHost: x\r\n\r\n", 400),
    "binary": (bytes(range(128, 256)) + b"\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n", 400),
    "long line": (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
    "long header": (POST + b"X: " + b"a" * 9000 + b"\r\n\r\n", 431),
    "many headers": (POST + b"X: a\r\n" * 200 + b"\r\n", 431),
    "no colon": (POST + b"Nonsense\r\n\r\n", 400),
    "blank before colon": (SIZED + b"X : a\r\n\r\n" + BODY, 400),
    "obs-fold": (SIZED + b"X: a\r\n b\r\n\r\n" + BODY, 400),
    "bare LF": (SIZED + b"X: a\nY: b\r\n\r\n" + BODY, 400),
    "NUL": (SIZED + b"X: a\0b\r\n\r\n" + BODY, 400),
    "CL and TE": (SIZED + CODING + END + HIDDEN, 400),
    "two CL": (SIZED + b"Content-Length: 5\r\n\r\n" + BODY + HIDDEN, 400),
    "CL list": (POST + b"Content-Length: 5, 5\r\n\r\n" + BODY + HIDDEN, 400),
    "CL sign": (POST + b"Content-Length: +60\r\n\r\n" + BODY + HIDDEN, 400),
    "CL negative": (POST + b"Content-Length: -1\r\n\r\n" + BODY + HIDDEN, 400),
    "TE gzip": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + END + HIDDEN, 415),
    "TE deflate": (POST + b"Transfer-Encoding: deflate, chunked\r\n\r\n" + END, 415),
    "TE alone": (POST + b"Transfer-Encoding: gzip\r\n\r\n" + END + HIDDEN, 400),
    "TE twice": (POST + CODING * 2 + END + HIDDEN, 400),
    "TE unknown": (POST + b"Transfer-Encoding: xchunked\r\n\r\n0" + END + HIDDEN, 400),
    "TE identity": (SIZED + b"Transfer-Encoding: identity\r\n\r\n" + BODY, 400),
    "TE tab": (POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n" + HIDDEN, 400),
    "chunk 0x": (CHUNKS + b"0x3c\r\n" + BODY + END + HIDDEN, 400),
    "chunk +": (CHUNKS + b"+3c\r\n" + BODY + END + HIDDEN, 400),
    "chunk -": (CHUNKS + b"-3c\r\n" + BODY + END + HIDDEN, 400),
    "chunk _": (CHUNKS + b"3_c\r\n" + BODY + END + HIDDEN, 400),
    "chunk none": (CHUNKS + b"\r\n" + BODY + END + HIDDEN, 400),
    "chunk longer": (CHUNKS + b"3b\r\n" + BODY + END + HIDDEN, 400),
    "chunk LF": (CHUNKS + b"3c\n" + BODY + END + HIDDEN, 400),
    "Expect": (SIZED + b"Expect: the-unexpected\r\n\r\n" + BODY, 417),
    "short body": (SIZED + b"\r\n" + BODY[:-9], 400),
    "no last chunk": (CHUNKS + chunk(BODY), 400),
    "huge chunk": (CHUNKS + b"F" * 40 + b"\r\n" + BODY, 400),
    "CL over": (POST + b"Content-Length: 99999999\r\n\r\n" + BODY, 413),
    "CL absurd": (POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n" + BODY, 413),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_gets_one_answer_in_the_envelope(name, one):
    data, expected = MALFORMED[name]
    answer = raw_http(one.port, data, finish=True)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % expected)
    assert list(json.loads(body)["error"]) == ["message", "type", "param", "code"]
    assert b"x-request-id: req_" in head and b"application/json" in head


def test_a_coding_refused_about_messages_is_told_in_anthropics_shape(one):
    head = POST.replace(b"/v1/chat/completions", b"//messages?beta=true")
    answer = raw_http(one.port, head + MALFORMED["TE gzip"][0][len(POST) :], 1)
    assert answer.startswith(b"HTTP/1.1 415 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["type"] == "error"


UNREAD = {
    "401": b"POST /v1/chat/completions HTTP/1.1\r\n",
    "404": b"POST /nowhere HTTP/1.1\r\n",
    "405": b"POST /healthz HTTP/1.1\r\n",
    "415": b"POST /v1/chat/completions HTTP/1.1\r\nAuthorization: Bearer sk-demo\r\n",
    "200": b"GET /healthz HTTP/1.1\r\n",
}


@pytest.mark.parametrize("status", UNREAD)
def test_a_request_whose_unread_body_is_broken_has_one_answer(status, one):
    head = UNREAD[status] + b"Host: x\r\nContent-Type: text/plain\r\n"
    broken = b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcXXXX\r\nzz\r\n0\r\n\r\n"
    answer = raw_http(one.port, head + broken)
    assert answer.startswith(b"HTTP/1.1 %s " % status.encode())
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("coding", [b"Chunked", b"chunked"])
def test_a_transfer_coding_is_undone(coding, one):
    body = json.dumps({"model": "echo", "messages": SAY_HELLO}).encode()
    head = POST + b"Transfer-Encoding: " + coding + b"\r\n\r\n"
    last = b"GET /healthz HTTP/1.0\r\n\r\n"
    answer = raw_http(one.port, head + chunk(body) + chunk(b"") + last)
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.count(b"x-request-id: ") == 2


def test_a_chunked_body_over_the_limit_is_413(one):
    data = CHUNKS + chunk(bytes(1 << 20)) * 33
    assert raw_http(one.port, data, 20).startswith(b"HTTP/1.1 413 ")


def test_pipelined_requests_are_answered_in_order(one):
    close = HIDDEN[:-2] + b"Connection: close\r\n\r\n"
    chunked = CHUNKS + chunk(BODY) + chunk(b"")
    said = raw_http(one.port, SIZED + b"\r\n" + BODY + chunked + HIDDEN + close)
    kinds = re.findall(rb"HTTP/1.1 200|chat.completion|\"ok\"", said)
    chat_, ok = [b"HTTP/1.1 200", b"chat.completion"], [b"HTTP/1.1 200", b'"ok"']
    assert kinds == chat_ + chat_ + ok + ok


def test_an_expected_100_continue_is_sent(one):
    head = SIZED + b"Expect: 100-continue\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", one.port), 5) as sock:
        sock.sendall(head)
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(BODY)
        assert sock.recv(100).startswith(b"HTTP/1.1 200 ")


HALF_BODY = SIZED + b"\r\n" + BODY[:9]


def test_two_hundred_idlers_delay_nobody(gateway):
    silent, half_heads, half_bodies = [b""] * 70, [POST] * 70, [HALF_BODY] * 70
    with ExitStack() as crowd:
        server = gateway(workers=2, threads=1000)
        for sent in (*silent, *half_heads, *half_bodies):
            sock = socket.create_connection(("127.0.0.1", server.port), 5)
            crowd.enter_context(sock).sendall(sent)
        for _ in range(5):
            started = time.monotonic()
            assert requests.get(f"{server.url}/healthz", timeout=5).ok
            assert status(server, model="echo") == 200
            assert time.monotonic() - started < 1


def test_half_a_request_is_given_up_after_the_client_timeout(one):
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(raw_http, one.port, sent, 8) for sent in (POST, HALF_BODY)]
        wait_for(lambda: all(end.done() for end in ends))
        assert 0.9 < time.monotonic() - started < 4


MOST = 31 << 20  # bytes, of 32 MB
STALLS = {  # of large bodies
    "at its begin": ("Content-Length: 33554432", b" " * (2 << 20)),
    "at its end": ("Content-Length: 33554432", b" " * MOST),
    "in chunks": ("Transfer-Encoding: chunked", b"%x\r\n" % MOST + b" " * MOST),
}


@pytest.mark.parametrize("name", STALLS)
def test_two_large_bodies_that_stall_leave_their_room_within_seconds(name, gateway):
    limits = {"BODY_TIMEOUT": 3, "ROOM_PATIENCE": 0.2, "WATCH_INTERVAL": 0.05}
    server = gateway(constants=limits)
    line, data = STALLS[name]
    large = {"model": "unknown", "pad": "x" * (20 << 20)}  # 404 once it was read
    with ExitStack() as crowd:
        for key in TEAM_KEY, OTHER_KEY:
            sock = socket.create_connection(("127.0.0.1", server.port), 8)
            said = posted("/v1/chat/completions", line) + data
            crowd.enter_context(sock).sendall(said.replace(TEAM_KEY.encode(), key.encode()))
        started = time.monotonic()
        wait_for(lambda: status(server, **large) == 404, 5, "room")
        assert time.monotonic() - started < 4


@pytest.mark.long
def test_64_of_the_largest_bodies_stay_below_900_mb_and_delay_no_small_one(gateway):
    close, datas = b"Host: x\r\nConnection: close", []
    for more in ("x" * (31 << 20), [{"a": 1}] * 660_000):  # bytes, or values
        data = chat_bytes(pad=more)
        datas.append(data.replace(b"Host: x", close, 1))
    answer = completion("gpt-test", "chat.completion", [], usage=TOLD)
    more = {"accounts": {"team": {"credits": 10**6}}}
    more["limits"] = {"rate": "10000/minute", "concurrent": 100}
    most, slowest = 0.0, 0.0
    with Upstream([json_answer(answer)] * 64) as up, ThreadPoolExecutor(64) as pool:
        server = gateway(up.url, workers=2, threads=1000, **more)
        sent = [pool.submit(raw_http, server.port, datas[n % 2], 60) for n in range(64)]
        while not all(each.done() for each in sent):
            started = time.monotonic()
            assert chat(server.url, OTHER_KEY, model="echo").ok
            slowest = max(slowest, time.monotonic() - started)
            most = max(most, sum(map(pss, server.members())) / 2**20)
    seen = Counter(each.result()[9:12] for each in sent)
    print(f"{most:.0f} MiB, {slowest * 1000:.0f} ms, {seen}")
    assert seen[b"200"] > 4 and set(seen) <= {b"200", b"503", b""}  # refused in the send
    assert most < 900 and slowest < 1


CROWDS = [(60, 1, 30), long(2600, 2, 1000)]


@pytest.mark.parametrize("count, workers, threads", CROWDS)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/account/keys"])
def test_many_bodies_that_trickle_delay_no_other_account(
    path, count, workers, threads, gateway
):
    rate = {"rate": "10000/minute", "concurrent": 1000}
    server = gateway(workers=workers, threads=threads, limits=rate)
    ended, took = threading.Event(), []

    def trickle_all(crowd: list[socket.socket]) -> None:
        while not ended.wait(0.5):
            for sock in crowd:
                with suppress(OSError):
                    sock.send(b" ")

    with ExitStack() as stack:
        crowd = []
        for _ in range(count):
            sock = socket.create_connection(("127.0.0.1", server.port), 8)
            sock.sendall(posted(path, "Content-Length: 100"))
            crowd.append(stack.enter_context(sock))
        stack.callback(ended.set)
        threading.Thread(target=trickle_all, args=(crowd,), daemon=True).start()
        for _ in range(5):
            started = time.monotonic()
            answer = chat(server.url, OTHER_KEY, model="echo")
            assert answer.status_code == 200
            took.append(time.monotonic() - started)
    print([round(each, 2) for each in took])
    assert max(took) < 1.5


LONG_WORDS = [{"role": "user", "content": "word " * 60_000}]  # 12 MB of events
LONG_ECHO = {"model": "echo", "messages": LONG_WORDS, "stream": True, "max_tokens": 60_000}


@pytest.mark.parametrize("ask, open", [({}, 0), (LONG_ECHO, 1)], ids=["answer", "echo"])
def test_an_answer_that_nobody_reads_is_ended_and_was_paid(ask, open, gateway, tmp_path):
    choices = [{"index": 0, "message": {"content": "x" * (9 << 20)}}]
    answer = {"object": "chat.completion", "choices": choices, "usage": TOLD}
    limits = dict.fromkeys(["ANSWER_READING", "STREAM_TIMEOUT"], 0.5)
    limits |= {"WATCH_INTERVAL": 0.05, "HANG_UP": 0.2}
    with Upstream([json_answer(answer)]) as up, socket.socket() as client:
        server = gateway(up.url, constants=limits, accounts={"team": {"credits": 10**6}})
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(chat_bytes(**ask))
        assert client.recv(100).startswith(b"HTTP/1.1 200") and held(tmp_path) == open
        wait_for(lambda: "event=request" in server.log(), 5, "its end")
    sql = "SELECT state, output > 0, estimated FROM requests"
    assert query(tmp_path, sql) == [(proxy.SETTLED, 1, open)]


@pytest.mark.parametrize("path", [CHAT, "/v1/account/keys"])
def test_a_body_that_trickles_in_is_refused_in_time(path, one):
    with socket.create_connection(("127.0.0.1", one.port), 8) as sock:
        sock.sendall(posted(path, "Content-Length: 1000"))
        started = time.monotonic()
        while not select.select([sock], [], [], 0.1)[0]:
            sock.sendall(b" ")
            assert time.monotonic() - started < 4
        answer = read_until(sock, b"}}")
    assert answer.startswith(b"HTTP/1.1 400") and b"did not arrive within 6" in answer


def test_a_connection_without_a_whole_head_gets_seconds_and_no_thread(gateway):
    server = gateway(threads=1, constants={"SPARE_THREADS": 1, "FIRST_WORD": 1})
    health = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    begins = b"", b"GET /", health[:-4], health + b"GET /"
    with ExitStack() as crowd:
        connect = lambda: socket.create_connection(("127.0.0.1", server.port), 8)
        slow = [(crowd.enter_context(connect()), begin) for begin in begins * 10]
        for sock, begin in slow:
            sock.sendall(begin)
        started = time.monotonic()
        for _ in range(10):
            assert requests.get(f"{server.url}/healthz", timeout=5).ok
            for sock, begin in slow:
                sock.send(begin and b"x")
        assert time.monotonic() - started < 0.9
        ends = [b"".join(iter(lambda: sock.recv(65536), b"")) for sock, _ in slow]
        assert [b"200 OK" in end for end in ends] == [False, False, False, True] * 10
        assert time.monotonic() - started < 5


def test_who_asks_again_without_reading_gets_no_thread(gateway):
    constants = {"SPARE_THREADS": 1, "PAGE_TIMEOUT": 60}
    server = gateway(threads=1, constants=constants)
    place = f":{server.port:04X}"

    def is_established() -> bool:
        """Whether the server has a connection that it has not ended."""
        rows = map(str.split, Path("/proc/net/tcp").read_text().splitlines())
        return "01" in [row[3] for row in rows if row[1].endswith(place)]

    with ExitStack() as crowd:
        for _ in range(3):
            sock = crowd.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(b"GET /dashboard HTTP/1.1\r\nHost: x\r\n\r\n" * 600)
        wait_for(lambda: not is_established(), what="the connections' ends")
        assert requests.get(f"{server.url}/healthz", timeout=5).ok


def test_a_head_is_refused_at_32_kb_and_a_request_behind_another_is_answered(one):
    line = b"A: " + b"b" * 7_000 + b"\r\n"
    assert raw_http(one.port, b"GET / HTTP/1.1\r\n" + line * 5).startswith(b"HTTP/1.1 431")
    ask = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
    both = ask + b"\r\n" + ask + b"Connection: close\r\n" + line * 3 + b"\r\n"
    assert raw_http(one.port, both).count(b'{"status": "ok"}') == 2


def test_a_reader_that_stops_reading_is_given_up_and_settled(one):
    def flood(request):
        request.send(STREAM)
        while True:
            request.send(MORE * 1000)

    up = play(one, flood)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", one.port))
        sock.sendall(chat_bytes(stream=True))
        assert up.wait_requests()[0].closed.wait(6)
        wait_held(one.folder, 0)
    sql = "SELECT state, estimated, cost, hold FROM requests ORDER BY id DESC LIMIT 1"
    [(state, estimated, cost, hold)] = query(one.folder, sql)
    assert (state, estimated) == (proxy.SETTLED, 1) and 0 < cost <= hold


def test_a_signal_in_an_accept_drops_nobody():
    worker = proxy.Worker.__new__(proxy.Worker)
    worker.cfg, worker.nr_conns, worker.wsgi = SimpleNamespace(is_ssl=False), 0, None
    worker.alive, worker._accepting = True, True
    worker.method_queue, worker.poller = MagicMock(), MagicMock()
    taken = []
    worker.enqueue_req = taken.append
    listener = socket.create_server(("127.0.0.1", 0))
    worker.sockets = [listener]

    class Struck:
        """A listener in whose accept() SIGTERM comes."""

        getsockname = listener.getsockname

        def accept(self):
            worker.handle_exit(signal.SIGTERM, None)
            return listener.accept()

    with socket.create_connection(listener.getsockname()):
        worker.accept(Struck())
    assert len(taken) == 1 and not worker.alive and listener.fileno() >= 0
    worker.set_accept_enabled(False)
    assert listener.fileno() == -1
    taken[0].sock.close()


def test_a_connection_that_ends_is_counted_once(monkeypatch):
    """Or a drain would not wait for those that were let in."""
    monkeypatch.setattr(proxy.gthread.ThreadWorker, "handle", lambda self, conn: False)
    worker, answered = proxy.Worker.__new__(proxy.Worker), Future()
    worker.alive, worker.nr_conns = True, 1
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.close()
        conn = proxy.gthread.TConn(None, ours, None, None)
        conn.parser = SimpleNamespace(unreader=SimpleNamespace(buf=io.BytesIO()))
        answered.set_result(worker.handle(conn))
        worker.finish_request(conn, answered)
    assert (worker.nr_conns, ours.fileno()) == (0, -1)


def test_a_server_that_is_ended_under_connects_ends_well(gateway):
    server, ended = gateway(workers=2, constants=QUICK_TERM), threading.Event()

    def connect():
        while not ended.is_set():
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", server.port), 1).close()

    with ThreadPoolExecutor(2) as pool:
        pool.submit(connect)
        pool.submit(connect)
        server.process.terminate()
        try:
            assert server.process.wait(10) == 0
        finally:
            ended.set()
    assert "Traceback" not in server.log()


def test_connections_that_ask_at_once_again_leave_threads_to_others(gateway):
    server = gateway(threads=1, constants={"SPARE_THREADS": 1})  # two threads
    answers = Counter()

    def all_served():
        return len(answers) == 5 and min(answers.values()) >= 3

    def ask(who):
        until = time.monotonic() + 5
        with closing(HTTPConnection("127.0.0.1", server.port, timeout=10)) as http:
            while not all_served() and time.monotonic() < until:
                http.request("GET", "/healthz")
                assert http.getresponse().read()
                answers[who] += 1

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(ask, range(5)))
    assert all_served(), answers


# -- Overload ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [12, 60])
def test_more_relays_than_threads_are_overloaded_at_once(count, gateway, gate):
    with Upstream(short_or_long(gate)) as up:
        server = gateway(up.url, workers=1, threads=4)
        started = time.monotonic()
        ask = lambda: Visit(server, TEAM_KEY, True, max_tokens=77).start()
        seen = together(count, ask)
        assert time.monotonic() - started < 2
        assert statuses(seen) == {200: 4, 503: count - 4}
        refused = [one for one in seen if one.status == 503]
        assert {error_code_of(one) for one in refused} == {"overloaded"}
        assert all(1 <= int(one.reply.headers["Retry-After"]) <= 60 for one in refused)
        assert requests.get(f"{server.url}/healthz", timeout=1).ok
        gate.set()
        assert sum(one.finish().done for one in seen if one.status == 200) == 4


# Faults, floods and history ----------------------------------------------------------


# -- Faults: the ledger under any interleaving ---------------------------------------


class Jumping:
    """The module `time` with a wall clock that jumps."""

    def __init__(self) -> None:
        self.offset = 0

    def time(self) -> float:
        return time.time() + self.offset

    def time_ns(self) -> int:
        return time.time_ns() + self.offset * 10**9

    def set(self, moment: str) -> None:
        """Go on from this moment."""
        self.offset = proxy.parse_moment(moment, "") - int(time.time())

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@dataclass
class Entry:
    """What a row of the ledger must say."""

    lease: proxy.Lease
    slot: int
    key: str
    day: int
    state: int = proxy.OPEN
    cost: int = 0
    lost: int = 0


class Books:
    """Workers on one ledger, and the simple account of what it must hold.

    Numbers choose among what is there, modulo its length.
    """

    declared = {"a": 3000, "b": 0}
    concurrent, rate, most = 3, 1, 4  # per key, per minute and key, workers

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.db = Path(self.folder.name) / "proxy.db"
        self.real, proxy.time = proxy.time, Jumping()
        self.sweeps, proxy.SWEEP_INTERVAL = proxy.SWEEP_INTERVAL, 1e6
        self.entries: list[Entry] = []
        self.granted, self.hits = dict.fromkeys(self.declared, 0), Counter()
        self.budgets: dict[str, proxy.Budget] = {}
        self.bound: dict[tuple[str, int, int], int] = {}  # window -> what it may spend
        self.dead: list[proxy.Ledger] = []
        self.workers: list[proxy.Ledger] = []
        self.restart()

    def teardown(self) -> None:
        """Close what a crash left open."""
        proxy.time, proxy.SWEEP_INTERVAL = self.real, self.sweeps
        for each in [*self.workers, *self.dead]:
            each.close()
        self.folder.cleanup()

    def open(self) -> list[Entry]:
        """The rows that hold something."""
        return [one for one in self.entries if one.state == proxy.OPEN]

    def left(self, account: str) -> int:
        """What an account may still spend."""
        own = [one for one in self.entries if one.lease.account == account]
        held = sum(one.lease.hold for one in own if one.state == proxy.OPEN)
        spent = sum(one.cost for one in own)
        return self.declared[account] + self.granted[account] - spent - held

    def used(self, window: tuple[str, int, int]) -> int:
        """What a key has spent and holds in the window of a budget."""
        key, since, until = window
        own = [e for e in self.entries if e.key == key and since <= e.day < until]
        return sum(one.cost + one.lease.hold * (one.state == proxy.OPEN) for one in own)

    def beyond(self, entry: Entry) -> int:
        """What may be charged above a hold."""
        windows = [w for w in self.bound if w[0] == entry.key and w[1] <= entry.day < w[2]]
        bounds = [self.bound[window] - self.used(window) for window in windows]
        return max(0, min([self.left(entry.lease.account), *bounds]))

    def expected(self, key: str, account: str, day: int, size: int, tokens: int) -> Any:
        """The hold, or the kind of the refusal."""
        left, budget, window = self.left(account), self.budgets.get(key), ()
        if budget:
            window = (key, *budget.window(day))
            left = min(left, budget.most - self.used(window))
        for other in [*self.bound]:
            if other[0] == key and other[1] <= day < other[2] and other != window:
                del self.bound[other]
        if budget:
            self.bound[window] = max(budget.most, self.used(window))
        if sum(one.key == key for one in self.open()) >= self.concurrent:
            return proxy.RateLimited
        paid = min(tokens, (left - size) // 2)
        return size + 2 * paid if paid > 0 else proxy.InsufficientCredits

    def hold(self, worker: int, who: int, size: int, tokens: int) -> None:
        ledger = self.workers[worker % len(self.workers)]
        id, key, tokens = "ab"[who % 2], f"k{who}", tokens + 1
        limits = proxy.Limits("1/minute", self.concurrent)
        account = proxy.Account(id, limits, self.declared[id])
        terms = proxy.Terms(budget=self.budgets.get(key))
        about = proxy.Key(key, key, id, "", "", terms=terms)
        day = int(proxy.time.time()) // proxy.DAY
        most = proxy.Quote(size * proxy.PICO, 2 * proxy.PICO, tokens)
        expected = self.expected(key, id, day, size, tokens)
        name = f"r{len(self.entries)}"
        outcome = ledger.admit(name, about, account, most, "m", "p", False).outcome
        if isinstance(outcome, proxy.Lease):
            self.entries.append(Entry(outcome, ledger.slot, key, day))
        assert getattr(outcome, "hold", type(outcome)) == expected

    def of_the_living(self, number: int) -> tuple[proxy.Ledger, Entry] | None:
        """Any row, resolved ones too, of a worker that runs."""
        slots = {each.slot: each for each in self.workers}
        own = [one for one in self.entries if one.slot in slots]
        entry = own[number % len(own)] if own else None
        return (slots[entry.slot], entry) if entry else None

    def settle(self, number: int, cost: int) -> None:
        if found := self.of_the_living(number):
            ledger, entry = found
            ledger.settle(entry.lease, charge(cost))
            if entry.state == proxy.OPEN:
                entry.cost = min(cost, entry.lease.hold + self.beyond(entry))
                entry.lost, entry.state = cost - entry.cost, proxy.SETTLED

    def release(self, number: int) -> None:
        if found := self.of_the_living(number):
            ledger, entry = found
            ledger.settle(entry.lease, proxy.Charge(503))
            if entry.state == proxy.OPEN:
                entry.state = proxy.RELEASED

    def grant(self, worker: int, who: int, amount: int) -> None:
        id = "ab"[who % 2]
        account = proxy.Account(id, LIMITS, self.declared[id])
        done = self.workers[worker % len(self.workers)].grant(account, amount, "")
        assert done == (amount > 0 or self.left(id) + amount >= 0)
        self.granted[id] += amount * done

    def budget(self, who: int, most: int, per: str | None) -> None:
        self.budgets.pop(f"k{who}", None)
        if per:
            self.budgets[f"k{who}"] = proxy.Budget(most, per)

    def cleared(self, gone: Callable[[int], bool]) -> None:
        """The holds of these slots are given back."""
        for one in self.open():
            one.state = proxy.RELEASED if gone(one.slot) else proxy.OPEN

    def crash(self, worker: int) -> None:
        """Drop the slot's lock as the kernel does, and leave everything else."""
        if len(self.workers) > 1:
            ledger = self.workers.pop(worker % len(self.workers))
            ledger.file.drop(ledger.slot)
            self.dead.append(ledger)

    def restart(self) -> None:
        if len(self.workers) < self.most:
            ledger = proxy.Ledger(self.db, worker=True)
            assert ledger.slot not in [each.slot for each in self.workers]
            living = [each.slot for each in self.workers]
            self.cleared(lambda slot: slot not in living)
            for one in self.entries:  # a new owner has no leases of the old one
                one.slot = 0 if one.slot == ledger.slot else one.slot
            self.workers.append(ledger)

    def sweep(self, worker: int) -> None:
        ledger = self.workers[worker % len(self.workers)]
        ledger.write(ledger._tidy)
        living = [each.slot for each in self.workers]
        self.cleared(lambda slot: slot not in living)

    def jump(self, hours: int) -> None:
        proxy.time.offset += hours * 3600
        for who in [*self.hits]:
            self.hit(0, who)

    def hit(self, worker: int, who: int) -> None:
        """Count in a key's window; an example takes less than a minute."""
        ledger = self.workers[worker % len(self.workers)]
        fits = window(ledger).acquire_entry(f"k{who}", self.rate, 60)
        assert fits == (self.hits[who] < self.rate)
        self.hits[who] += fits

    def agree(self) -> None:
        """The ledger says what the books say, and proves it."""
        assert self.workers[0].check() == []
        rows = query(self.db.parent, "SELECT id, state, hold, cost, lost FROM requests")
        assert sorted(rows) == sorted(
            (one.lease.id, one.state, one.lease.hold, one.cost, one.lost)
            for one in self.entries
        )
        sums = query(self.db.parent, "SELECT id, granted - spent - held FROM accounts")
        for account, left in sums:
            left += self.declared[account]
            assert left == self.left(account) >= 0


@pytest.mark.parametrize("examples", [8, long(100)])
def test_any_interleaving_of_workers_keeps_the_ledgers_promises(examples):
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import stateful, strategies

    few, some = strategies.integers(0, 3), strategies.integers(0, 30)
    micro, rule = strategies.integers(0, 1500), stateful.rule
    either_sign = strategies.integers(-1500, 1500)
    periods = strategies.sampled_from([None, *proxy.PERIODS])

    class Machine(Books, stateful.RuleBasedStateMachine):
        hold = rule(worker=few, who=few, size=micro, tokens=micro)(Books.hold)
        more = rule(worker=few, who=few, size=some, tokens=some)(Books.hold)
        settle = rule(number=some, cost=strategies.integers(0, 6000))(Books.settle)
        release = rule(number=some)(Books.release)
        grant = rule(worker=few, who=few, amount=either_sign)(Books.grant)
        budget = rule(who=few, most=micro, per=periods)(Books.budget)
        crash = rule(worker=few)(Books.crash)
        restart = rule()(Books.restart)
        sweep = rule(worker=few)(Books.sweep)
        jump = rule(hours=strategies.sampled_from([-1, 1, 24, 24 * 20]))(Books.jump)
        hit = rule(worker=few, who=few)(Books.hit)
        agree = stateful.invariant()(Books.agree)

    settings = hypothesis.settings(
        max_examples=examples, stateful_step_count=25, deadline=None, database=None,
        derandomize=True, suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    stateful.run_state_machine_as_test(Machine, settings=settings)


# -- Faults: every statement of a request --------------------------------------------


class Faulty(sqlite3.Connection):
    """A connection that fails at a statement counted over all connections."""

    before = 10**9  # statements that still work
    times = 1  # statements in a row that fail then
    strike: Any = None

    def fail(self) -> None:
        Faulty.before -= 1
        if -Faulty.times <= Faulty.before < 0:
            Faulty.strike(self)

    def execute(self, *args: Any) -> sqlite3.Cursor:
        self.fail()
        return super().execute(*args)

    def executemany(self, *args: Any) -> sqlite3.Cursor:
        self.fail()
        return super().executemany(*args)


def rolled_back(error: sqlite3.Error) -> Callable[[sqlite3.Connection], None]:
    """Fail as SQLite does when it has rolled back by itself."""

    def strike(db: sqlite3.Connection) -> None:
        db.rollback()
        raise error

    return strike


def busy(db: sqlite3.Connection) -> None:
    raise sqlite3.OperationalError("database is locked")


def killed(db: sqlite3.Connection) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


STRIKES = {
    "full": rolled_back(sqlite3.OperationalError("database or disk is full")),
    "I/O error": rolled_back(sqlite3.OperationalError("disk I/O error")),
    "busy": busy,
}


@pytest.fixture
def struck(files, monkeypatch):
    """struck(url): a new worker on the same files, at a known statement; no upkeep."""
    monkeypatch.setattr(proxy, "SWEEP_INTERVAL", 1e6)
    monkeypatch.setattr(proxy, "SETTLE_PATIENCE", 0.03)
    monkeypatch.setattr(proxy.Watch, "sleep", lambda self, seconds: time.sleep(0.01))
    connect = functools.partial(sqlite3.connect, factory=Faulty)
    monkeypatch.setattr(sqlite3, "connect", connect)
    monkeypatch.setattr(Faulty, "before", 10**9)

    @contextmanager
    def make(url):
        app = proxy.create_app(*files(url))
        try:
            yield app
        finally:
            app.extensions["proxy"].close()

    return make


def asked(app: Any, stream: bool) -> Any:
    """Ask in this process; the answer is not read yet if it is a stream."""
    body = {"model": "chat", "messages": SAY_HELLO, "stream": stream}
    return app.test_client().post(CHAT, json=body, headers=bearer(TEAM_KEY))


def ending(status: int, data: bytes) -> tuple[int, str]:
    """The status of an answer, and how it ended: its error's code, or done."""
    last = (sse_events(data) or [data])[-1]
    error = {} if last == "[DONE]" else json.loads(last).get("error", {})
    assert not error or [*error] == ["message", "type", "param", "code"]
    return status, error.get("code", "done")


def fate(answer: Any) -> tuple[int, str]:
    """The same of an answer in this process."""
    data = answer.get_data()
    answer.close()
    return ending(answer.status_code, data)


NO_LEDGER = 503, "ledger_unavailable"
ENDS = {(200, "done"), NO_LEDGER}
CUT = (200, "ledger_unavailable")  # a stream whose charge could not be written in time


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "strike, times",
    [
        ("full", 1), ("busy", 10**6), long("full", 10**6), long("busy", 1),
        long("I/O error", 1), long("I/O error", 10**6),
    ],
)  # fmt: skip
def test_any_statement_may_fail(strike, stream, times, struck, tmp_path, monkeypatch):
    monkeypatch.setattr(Faulty, "strike", STRIKES[strike])
    monkeypatch.setattr(Faulty, "times", times)
    seen, left = [], -1
    with Upstream(quickly) as up:
        while left < 0:
            with struck(up.url) as app:
                Faulty.before = len(seen)
                seen.append(fate(asked(app, stream)))
                left, Faulty.before = Faulty.before, 10**9
                app.extensions["proxy"].ledger._upkeep()  # its thread sleeps
                assert held(tmp_path) == 0 and proof(tmp_path) == []
                assert fate(asked(app, stream)) == (200, "done")
    assert 10 < len(seen) < 60 and seen[-1] == (200, "done")
    assert set(seen) <= ENDS | ({CUT} if stream and times > 1 else set())
    charged = 2 * len(seen) - seen.count(NO_LEDGER)
    sql = "SELECT count(*), sum(cost), sum(estimated) FROM requests WHERE state = 1"
    assert query(tmp_path, sql) == [(charged, charged * COST, 0)]


def in_child(action: Callable[[], None]) -> int:
    """Do this in a forked process; return how it ended, negative for a signal."""
    if not (pid := os.fork()):
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("stream", [long(False), True], ids=["whole", "stream"])
def test_a_worker_may_be_killed_at_any_statement(stream, struck, tmp_path, monkeypatch):
    monkeypatch.setattr(Faulty, "strike", killed)
    with Upstream(quickly) as up, (tmp_path / "seen").open("ab", 0) as seen:

        def request():
            with struck(up.url) as app:
                Faulty.before = len(ends)
                answer = asked(app, stream)
                for piece in answer.iter_encoded():
                    seen.write(piece)
                assert answer.status_code == 200
                Faulty.before = 10**9

        ends, dones = [], []
        with struck(up.url):
            pass
        while not ends or ends[-1]:
            ends.append(in_child(request))
            whole = (tmp_path / "seen").read_bytes()
            dones.append(whole.count(b"[DONE]" if stream else b"chat.completion"))
            with struck(up.url) as app:
                ledger = app.extensions["proxy"].ledger
                ledger.write(ledger._tidy)
                assert held(tmp_path) == 0 and proof(tmp_path) == []
                assert dones[-1] <= paid(tmp_path) <= dones[-1] + 3
    assert 10 < len(ends) < 60 and set(ends) == {-signal.SIGKILL, 0}
    assert dones[-1] >= 1
    wrong = "SELECT count(*) FROM requests WHERE state = 1 AND cost != ?"
    assert query(tmp_path, wrong, COST) == [(0,)]


def paid(folder: Path) -> int:
    """How many requests were charged."""
    return query(folder, "SELECT count(*) FROM requests WHERE cost")[0][0]


# -- Faults: what clients saw against the ledger -------------------------------------


@dataclass
class Record:
    """What one client knows of one request of its own."""

    name: str  # the ledger and the upstream know the request by it as well
    path: str
    stream: bool
    kind: str
    words: int  # of the whole answer
    key: str
    sent: float
    id: str | None = None
    status: int | None = None  # None: no head came
    whole: bool = False  # the last byte came
    body: bytes = b""

    @property
    def fate(self) -> str:
        """Completed and refused are certain, everything else is unknown."""
        if not self.whole:
            return "unknown"
        return "completed" if self.status == 200 else "refused"

    @property
    def seen(self) -> int:
        """Words of a stream that certainly were relayed."""
        return self.body.count(b"word") if self.stream else 0

    @property
    def finished(self) -> bool:
        """Whether it saw the end of a text."""
        return self.stream and any(mark in self.body for mark in FINISHES)


KINDS = ["plain"] * 12 + ["slow"] * 6 + ["cut", "error", "leave", "vanish"] * 2
KINDS += ["finish", "half", "broken", "large"] * 2 + ["stuffed"]
DELAY = {"slow": 0.1, "leave": 0.05, "vanish": 0.05, "finish": 0.15}
SIZES = {  # what is sent of a body, and what its head announces
    "broken": lambda size: (size - 1, None),
    "half": lambda size: (size // 2, size),
    "large": lambda size: (size, 40 << 20),
}
FINISHES = b'"finish_reason": "stop"', b"content_block_stop", b"output_text.done"
STUFF = b": " + b"x" * 65536 + b"\n\n"
ASKS = {  # by the path: the model, what else is asked, whether it may be a stream
    "chat/completions": ("talk", {"messages": SAY_HELLO}, True),
    "responses": ("talk", {"input": "Say hello"}, True),
    "messages": ("claude", {"messages": SAY_HELLO, "max_tokens": 100}, True),
    "images/generations": ("draw", {"prompt": "A word"}, False),
}
PATHS = ["chat/completions"] * 3 + ["responses", "messages", "images/generations"]
NUMBERS = itertools.count()
TALK = {"price": {"input": 1, "output": 2}, "max_output": 1000}


def drawing(price: float) -> dict:
    return {"draw/*": {"upstream": "main/*", "price": {"image": price}}}


def played_models(up: Upstream) -> dict:
    """Models whose requests have names of their own: keys.json for `tell`."""
    talk, claude = ({"upstream": f"{name}/*", **TALK} for name in ("main", "anthropic"))
    models = {"talk/*": talk, "claude/*": claude, **drawing(0.04)}
    upstream = {"anthropic": {"url": f"anthropic+{up.url}", "key": SECRET}}
    return {"models": models, "upstreams": upstream}


def played_answer(path: str, words: list[str], stream: bool) -> Any:
    """The document or the events of an answer that reports 5 tokens and its words."""
    text, usage = " ".join(words), {"input_tokens": 5, "output_tokens": len(words)}
    if path == "images/generations":
        return {"created": 1700000000, "data": [{"url": image_url()}]}
    if path == "chat/completions":
        return chat_chunks(text)[1:] if stream else chat_json(text)
    if path == "responses":
        part = "response.output_text"
        said = [{"type": f"{part}.delta", "delta": word} for word in words]
        last = {"type": "response.completed", "response": {"usage": usage}}
        whole = {"output": [{"content": [{"text": text}]}], "usage": usage}
        return typed_events(*said, {"type": f"{part}.done"}, last) if stream else whole
    if not stream:
        return message_json(content=[{"type": "text", "text": text}], usage=usage)
    begin, opened, _, delta, *end = message_events()
    told = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}
    end[1:2] = typed_events({**told, "usage": {"output_tokens": len(words)}})
    begin = begin.replace(b'"input_tokens": 50', b'"input_tokens": 5')
    return [begin, opened, *[delta.replace(b"Hello", b"word")] * len(words), *end]


@dataclass
class Span:
    """When an upstream certainly worked on a request."""

    begin: float
    end: float  # when the gateway had not left, and had not got the whole answer
    times: int = 0  # it was asked


class Player:
    """Answers as a request's name says, `NUMBER.KIND.WORDS`, and keeps the spans."""

    def __init__(self) -> None:
        self.spans: dict[str, Span] = {}

    def __call__(self, request: Request) -> None:
        name, now, send = request.json["model"], time.monotonic(), request.send
        _, kind, words = name.split(".")
        span = self.spans.setdefault(name, Span(now, now))
        span.times += 1

        def noted(data: bytes) -> None:
            now = time.monotonic()
            if data != chunk(b"") and not request.connection.peer_left():
                span.end = now
            send(data)

        request.send = noted
        stream, delay = request.json.get("stream"), DELAY.get(kind, 0.002)
        path = request.path.removeprefix("/v1/")
        said = played_answer(path, ["word"] * int(words), stream)
        if kind == "error":
            json_answer({}, 500)(request)
        elif stream:
            said[1:1] = [STUFF] * 40 * (kind == "stuffed")
            more = {"cut": 300 if kind == "cut" else None, "delay": delay}
            sse(said, done=path == "chat/completions", **more)(request)
        else:
            request.wait(None, delay)
            json_answer(said, cut=100 if kind == "cut" else None)(request)


def tell(server: Gateway, key: str, chance: random.Random) -> Record:
    """Ask for one of KINDS and keep what is seen of it."""
    kind, words, path = chance.choice(KINDS), chance.randint(2, 9), chance.choice(PATHS)
    name, (model, ask, streams) = f"{next(NUMBERS)}.{kind}.{words}", ASKS[path]
    stream = streams and chance.random() < 0.6
    record = Record(name, path, stream, kind, words, key, time.monotonic())
    ask = {"model": f"{model}/{name}", **ask}
    with suppress(OSError, HTTPException):
        while True:
            try:
                visit = Visit(server, key, stream, path, SIZES.get(kind), **ask)
                break
            except ConnectionRefusedError:  # it is being restarted
                time.sleep(0.1)
        if kind in ("vanish", "half"):
            time.sleep(chance.random() / 10)
            visit.leave()
        visit.reply = visit._http.getresponse()
        visit.status = visit.reply.status
        record.id = visit.reply.headers["x-request-id"]
        record.status = visit.status
        time.sleep(0.5 * (kind == "stuffed"))
        while piece := visit.reply.read1():
            record.body = visit.body = visit.body + piece
            if kind == "leave" or kind == "finish" and record.finished:
                visit.leave()
        record.whole = record.status != 200 or visit.done
        visit.leave()
    record.body = record.body.replace(STUFF, b"")
    return record


GUEST_KEY = "sk-guest"
GUEST = {"guest": {"credits": 100, "keys": {"main": GUEST_KEY}}}


class Adversary:
    """What befalls a server, one after the other; `done` counts it."""

    def __init__(
        self, server: Gateway, folder: Path, chance: random.Random,
        disk: Callable[[], Path] | None = None,
    ) -> None:  # fmt: skip
        self.server, self.folder, self.disk = server, folder, disk
        self.chance, self.done, self.pss = chance, Counter(), []

    def kill(self) -> None:
        """Kill a worker; another one starts in its place."""
        self.server.kill(self.chance.choice(self.server.wait_workers(4)))

    def stop(self) -> None:
        """Stop a worker for a while, with whatever it has in its hand."""
        pid = self.chance.choice(self.server.wait_workers(4))
        self.server.kill(pid, signal.SIGSTOP)
        time.sleep(self.chance.random())
        self.server.kill(pid, signal.SIGCONT)

    def restart(self) -> None:
        """End the server in good order and start it again."""
        self.server.process.terminate()
        assert self.server.process.wait(20) == 0
        self.server.start()

    def prove(self) -> None:
        """Re-sum the ledger beside it."""
        assert proof(self.folder) == []

    def edit(self) -> None:
        """Change credits and a price, take an account or a model out, or put it in."""
        more = {"credits": self.done["edit"] / 1000}
        accounts = [{"guest": None}, GUEST, {"poor": more}, {"poor": more}]
        models = [{"draw/*": None}, drawing(0.04), drawing(0.05)]
        changes = [("accounts", one) for one in accounts]
        changes += [("models", one) for one in models]
        edit_keys(self.folder, dict([self.chance.choice(changes)]))

    def fill(self) -> None:
        """Fill the disk, kill a worker beside it, free it."""
        filler = self.disk()
        time.sleep(self.chance.random())
        if self.chance.random() < 0.5:
            self.kill()
        time.sleep(self.chance.random())
        filler.unlink()

    @contextmanager
    def at_work(self, acts: list[str], pause: float) -> Iterator[None]:
        """Do them in turns while the block runs, some `pause` seconds between two."""
        over = threading.Event()

        def run() -> None:
            for act in itertools.cycle(acts):
                if over.wait(2 * pause * self.chance.random()):
                    return
                getattr(self, act)()
                self.done[act] += 1
                self.pss.append(max(map(pss, self.server.workers()), default=0))

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(run)
            try:
                yield
            finally:
                over.set()
        done.result()


def pss(pid: int) -> int:
    """Bytes of memory that are a process's own, and its part of what is shared."""
    with suppress(OSError):  # it has just gone
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return int(re.search(r"Pss:\s+(\d+) kB", text)[1]) << 10
    return 0


class Row(NamedTuple):
    """What the ledger has of a request."""

    id: str
    asked: str
    account: str
    state: int
    status: int
    hold: int
    cost: int
    lost: int
    estimated: int
    input: int
    output: int

    @property
    def name(self) -> str:
        return self.asked.partition("/")[2]

    @property
    def worth(self) -> int:
        """Micro-credits of its tokens, or of its image."""
        if self.asked.startswith("draw/"):
            return self.hold
        return self.input + 2 * self.output


def wrongs(one: Record, row: Row | None, span: Span | None) -> list[str]:
    """What of a request does not fit together: what its client saw, what the ledger
    has of it, what its upstream was asked."""
    if row is None:
        found = {
            "an upstream byte without a hold": span,
            "completed without a row": one.fate == "completed",
            "words without a row": one.seen,
        }
        return [name for name, holds in found.items() if holds]
    settled, whole = row.state == proxy.SETTLED, row.status == 200
    image, paid = one.path == "images/generations", row.cost + row.lost
    price = row.hold if image else 5 + 2 * one.words
    most = -(-5 * one.words // 4)  # tokens of an estimate: a word and its space
    found = {
        "open": row.state == 0,
        "another's id": one.id not in (None, row.id),
        "asked twice": span and span.times > 1,
        "an error of ours": row.status == 500,
        "completed, not charged": one.fate == "completed" and not (settled and whole),
        "refused, charged": one.fate == "refused" and settled,
        "released, charged": not settled and paid,
        "not its price": settled and whole and (paid != price or row.estimated),
        "not as relayed": settled and not whole and paid != min(row.hold, row.worth),
        "less than was seen": settled and not image and row.output < one.seen,
        "more than was made": settled and not image and row.output > most,
        # A status of 0 is that of a worker that was killed: its holds are released.
        "left, free": not settled and row.status == 499 and span,
        "relayed, free": not settled and row.status and one.seen,
        "a loss": row.lost and row.account != "poor",
    }
    return [name for name, holds in found.items() if holds]


def most_at_once(known: list[tuple[Record, Span]]) -> int:
    """The most requests that an upstream certainly had together."""
    steps = [step for _, span in known for step in ((span.begin, 1), (span.end, -1))]
    return max(itertools.accumulate(step for _, step in sorted(steps)), default=0)


def most_in_a_minute(known: list[tuple[Record, Span]]) -> int:
    """The most that reached an upstream and were certainly let through within some 60
    seconds: not before they were sent, not after they were there."""
    times = sorted((one.sent, span.begin) for one, span in known)
    return max(
        sum(there <= sent + 60 for _, there in times[number:])
        for number, (sent, _) in enumerate(times)
    )


def receipts_of(server: Gateway, key: str) -> Iterator[tuple[str, tuple[str, int]]]:
    """What a client is told of each of its requests: id, (state, micro-credits)."""
    url, after, more = f"{server.url}/v1/account/requests?limit=200", "", True
    while more:
        page = client().get(url + after, headers=bearer(key)).json()
        for one in page["data"]:
            yield one["id"], (one["state"], round(one["credits"] * 1e6))
            after = f"&after={one['id']}"
        more = page["has_more"]


def limited(rate: int) -> dict:
    """Accounts: one's rate is the limit, another's requests at once, the third's money;
    the last one comes and goes."""
    return GUEST | {
        "team": {"limits": {"rate": f"{rate}/minute", "concurrent": 10}},
        "other": {"limits": {"rate": "10000/minute", "concurrent": 5}, "credits": 100},
    }


HISTORY_KEYS = [TEAM_KEY] * 4 + [OTHER_KEY] * 8 + [GUEST_KEY, POOR_KEY] * 4
EXPECTED = {None, 200, 400, 401, 402, 404, 413, 429, 503}
STATES = {proxy.SETTLED: "settled", proxy.RELEASED: "released"}
ACTS = "kill edit stop edit prove fill edit".split()
HISTORIES = [  # requests, seconds between a client's two, between two acts, a rate
    (200, 0.1, 0.2, 30, ACTS),
    long(20_000, 0.05, 0.8, 400, [*ACTS * 4, "restart"]),
]


@pytest.fixture
def disk(tmp_path):
    """A disk that can be filled, where one can be mounted."""
    filler = tmp_path / "filler"
    with disk_of(tmp_path, "24m") as fill:
        yield fill or (lambda: filler.touch() or filler)


@pytest.mark.parametrize(
    "count, pause, gap, rate, acts", HISTORIES, ids=["short", "whole"]
)
def test_what_clients_saw_is_what_the_ledger_says(
    count, pause, gap, rate, acts, disk, gateway, tmp_path
):
    waits = {"CLIENT_TIMEOUT": 3, "UPSTREAM_IDLE": 1, **QUICK_TERM}
    player, constants = Player(), {"LOG_SIZE": 500_000, **waits}
    with Upstream(player) as up:
        more = {"accounts": limited(rate), **played_models(up)}
        server = gateway(up.url, workers=4, constants=constants, **more)
        adversary = Adversary(server, tmp_path, random.Random(5), disk)

        def live(number):
            chance, seen = random.Random(number), []
            for _ in range(count // 20):
                seen.append(tell(server, HISTORY_KEYS[number], chance))
                time.sleep(2 * chance.random() * pause)
            return seen

        server.wait_workers(4)
        with adversary.at_work(acts, gap), ThreadPoolExecutor(20) as pool:
            records = [one for seen in pool.map(live, range(20)) for one in seen]
        wait_held(tmp_path, 0, 10)
        edit_keys(tmp_path, {"accounts": GUEST})
        wait_for(lambda: status(server, GUEST_KEY, model="echo") == 200, what="a guest")
        receipts = dict(
            pair for key in set(HISTORY_KEYS) for pair in receipts_of(server, key)
        )
        left = idle(server, up, tmp_path)
        assert max(one.files for one in left) < 40
        assert max(one.threads for one in left) <= 64 + proxy.SPARE_THREADS + 4
    sql = f"SELECT {', '.join(Row._fields)} FROM requests WHERE asked IS NOT NULL"
    rows = [Row._make(row) for row in query(tmp_path, sql)]
    kept, spans = {row.name: row for row in rows}, player.spans
    known = [(one, kept.get(one.name), spans.get(one.name)) for one in records]
    assert [(wrong, *each) for each in known if (wrong := wrongs(*each))] == []
    assert len(kept) == len(rows) and len(records) == count and proof(tmp_path) == []
    assert kept.keys() | spans.keys() <= {one.name for one in records}
    told = {row.id: (STATES[row.state], row.cost) for row in rows}
    assert told.items() <= receipts.items()
    ends = [one for one, row, _ in known if one.finished and row.status == 499]
    unheard = [one for one in ends if kept[one.name].estimated]
    assert len(unheard) <= 3 * adversary.done["restart"]  # a drain ends the wait
    fates = Counter(one.fate for one in records)
    assert min(fates.values()) > count / 20 and len(fates) == 3
    assert {one.status for one in records} <= EXPECTED
    assert adversary.done.keys() == set(acts)
    team, other = (
        [(one, span) for one, _, span in known if span and one.key == key]
        for key in (TEAM_KEY, OTHER_KEY)
    )
    assert 2 < most_at_once(team) <= 10 and 2 < most_at_once(other) <= 5
    assert rate / 2 < most_in_a_minute(team) <= rate
    third = len(adversary.pss) // 3
    assert max(adversary.pss[-third:]) < max(adversary.pss[:third]) + (8 << 20)


# -- Faults: malformed requests ------------------------------------------------------

FUZZ_HEADERS = [
    b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 1e3",
    b"Content-Length: 99999999999999999999", b"Content-Length: 0", b"Content-Length:",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"TE: trailers",
    b"Transfer-Encoding : chunked", b"transfer-encoding:\tchunked",
    b"Expect: 100-continue", b"Connection: keep-alive",
    b"Connection: upgrade, Authorization", b"Upgrade: h2c", b"Authorization: Bearer",
    b"Authorization: Basic c2s6", b"Authorization: Bearer a, b",
    b"Authorization: Bearer \xff\xfe", b"Host: evil.example", b"Host:", b"Host: a b",
    b"Content-Type: text/plain", b"Content-Type: application/json; charset=utf-16",
    b"Content-Type: application/json\x00", b"Content-Encoding: gzip", b"Cookie: a=b",
    b"X-Forwarded-For: 1.2.3.4", b"X-HTTP-Method-Override: DELETE", b" folded",
    b"NoColon", b": empty", b"X: \r", b"X:\x00", b"Range: bytes=0-",
    b"If-None-Match: *", b"Proxy: http://x", b"SCRIPT_NAME: /v1", b"Script-Name: /v1",
    b"PATH_INFO: /", b"X-Long: " + b"x" * 20000,
]  # fmt: skip
FUZZ_LINES = [
    b"POST /v1/chat/completions HTTP/1.0", b"POST /v1/chat/completions HTTP/2.0",
    b"POST /v1/chat/completions", b"post /v1/chat/completions HTTP/1.1", b"", b"\x00",
    b"GET /v1/chat/completions HTTP/1.1", b"DELETE /v1/account/keys/x HTTP/1.1",
    b"POST //v1//chat/completions HTTP/1.1", b"POST /v1/../v1/models HTTP/1.1",
    b"POST /v1/%2e%2e/%00 HTTP/1.1", b"POST /v1/\xff\xfe HTTP/1.1",
    b"OPTIONS * HTTP/1.1", b"POST http://evil.example/v1/chat/completions HTTP/1.1",
    b"CONNECT x:443 HTTP/1.1", b"POST /v1/" + b"a/" * 3000 + b" HTTP/1.1",
    b"POST /v1/audio/speech HTTP/1.1", b"GET /v1/models/%ff HTTP/1.1",
    b"GET /v1/account/usage?days=x HTTP/1.1", b"PRI * HTTP/2.0",
    b"GET /v1/account/requests?limit=-1&after=%00 HTTP/1.1", b"TRACE / HTTP/1.1",
    b"GET /v1/account/requests/%27%3B-- HTTP/1.1", b"GET /metrics HTTP/1.1",
    b"GET / HTTP/1.1", b"POST /v1/account/keys HTTP/1.1", b"POST /v1/accounts HTTP/1.1",
    b"GET \x7f HTTP/1.1", b"PATCH /v1/models HTTP/1.1",
    b"GET /dashboard?q=\x01 HTTP/1.1", b"GET /%s%n HTTP/1.1",
    b"POST /v1/embeddings HTTP/1.1", b"POST /v1/responses HTTP/1.1", b"GET ?a HTTP/1.1",
    b"POST /v1/images/generations HTTP/1.1", b"POST /v1/completions HTTP/1.1",
]  # fmt: skip
FUZZ_VALUES = [
    b"null", b"true", b"-1", b"0", b"1e999", b"1e400", b"NaN", b"Infinity", b"-0.0",
    b'""', b"[]", b"{}", b"[[]]", b'"\\ud800"', b'"\\u0000"', b'"\xff"',
    b'"\xed\xa0\x80"', b"01", b"9" * 400, b"9" * 5000, b"1.5", b"[" * 5000,
    b'{"a":' * 2000, b'[{"role":"user"}]',
    b'[{"role":"user","content":[{"type":"text","text":5}]}]', b'[null]', b'[["a"]]',
    b"//", b'[{"role":{},"content":{}}]', b'{"include_usage":{}}', b'"/etc/passwd"',
    b'"../../x"', b'"' + b"m" * 300 + b'"', b'[{"role":"user","content":null}]', b"'a'",
    b"tru", b"{,}", b'[{"role":"user","content":[[]]}]', b'"chat\\r\\nX: y"',
    b"2147483648", b"1e15", b"[1,]",
]  # fmt: skip
FUZZ_NAMES = """model messages stream max_tokens max_completion_tokens n best_of
stream_options max_output_tokens background prompt input usage error base_url api_key
tools response_format user size""".split()
FUZZ_NAMES += ["\x00", ""]
FUZZ_CHUNKS = [b"0", b"-1", b"0x5", b"+5", b"5 ;a=b", b"5;", b"f" * 18, b" 5", b""]
FUZZ_BYTES = [b"\r\n", b"\n", b"\r", b"\0", b" ", b"\r\n\r\n"]


class Fuzz:
    """A request that is good but for what a seed has spoilt of it."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        pick = self.chance.choice
        self.line = b"POST /v1/chat/completions HTTP/1.1"
        own = f"Host: x|Authorization: Bearer {TEAM_KEY}|Connection: close"
        self.headers = f"{own}|Content-Type: application/json".encode().split(b"|")
        message = b'[{"role":"user","content":"Say hello"}]'
        self.members = [(b'"model"', b'"echo"'), (b'"messages"', message)]
        self.end, self.chunked = b"\r\n", False
        whole = [self.member, self.member, self.twice, self.request_line, self.header]
        ways = [*whole, self.lose, self.chunks]
        for spoil in self.chance.sample(ways, pick([1, 1, 2])):
            spoil()
        data = self.data()
        wreck = [self.flip, self.cut_out, self.insert, self.stop, self.newline]
        self.bytes = pick([*wreck, bytes, bytes, bytes])(data)

    def member(self) -> None:
        name = json.dumps(self.chance.choice(FUZZ_NAMES)).encode()
        kept = [one for one in self.members if one[0] != name]
        self.members = [*kept, (name, self.chance.choice(FUZZ_VALUES))]

    def twice(self) -> None:
        self.members.append(self.chance.choice(self.members))

    def request_line(self) -> None:
        self.line = self.chance.choice(FUZZ_LINES)

    def header(self) -> None:
        place = self.chance.randrange(len(self.headers) + 1)
        self.headers.insert(place, self.chance.choice(FUZZ_HEADERS))

    def lose(self) -> None:
        self.headers.remove(self.chance.choice(self.headers[:2] + self.headers[3:]))

    def chunks(self) -> None:
        self.chunked = True

    def data(self) -> bytes:
        body = b"{%s}" % b",".join(b"%s:%s" % one for one in self.members)
        framing = b"Content-Length: %d" % len(body)
        if self.chunked:
            framing = b"Transfer-Encoding: chunked"
            size = self.chance.choice([*FUZZ_CHUNKS, b"%x" % len(body)])
            body = size + self.end + body + self.end + b"0" + self.end * 2
        return self.end.join([self.line, *self.headers, framing, b"", body])

    def place(self, data: bytes) -> int:
        """Anywhere, heads as often as bodies."""
        return self.chance.randrange(self.chance.choice([len(data), 200]))

    def flip(self, data: bytes) -> bytes:
        at = self.place(data)
        return data[:at] + self.chance.randbytes(1) + data[at + 1 :]

    def cut_out(self, data: bytes) -> bytes:
        at = self.place(data)
        return data[:at] + data[at + self.chance.randint(1, 40) :]

    def insert(self, data: bytes) -> bytes:
        at = self.place(data)
        new = self.chance.choice([self.chance.randbytes(9), *FUZZ_BYTES])
        return data[:at] + new + data[at:]

    def stop(self, data: bytes) -> bytes:
        return data[: 1 + self.place(data)]

    def newline(self, data: bytes) -> bytes:
        return data.replace(b"\r\n", self.chance.choice([b"\n", b"\r", b"\n\r"]))


@dataclass
class Heard:
    """One answer of those that came on a connection."""

    status: int
    kind: str
    body: bytes

    @property
    def in_envelope(self) -> bool:
        with suppress(ValueError, KeyError, TypeError):
            error = json.loads(self.body)["error"]
            return [*error] == ["message", "type", "param", "code"]
        return False

    @property
    def served(self) -> bool:
        """Whether something was generated."""
        return self.status == 200 and b'"object":"chat.completion' in self.body


def heard(data: bytes, method: str) -> list[Heard]:
    """All answers in what came; a `100 Continue` is none."""
    data = data.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    stream, answers = io.BytesIO(data), []
    lasting = SimpleNamespace(makefile=lambda mode: stream)
    stream.close = lambda: None
    while stream.tell() < len(data):
        reply = HTTPResponse(lasting, method=method)
        reply.begin()
        body = reply.read()
        answers.append(Heard(reply.status, reply.headers["Content-Type"], body))
    return answers


def said_text(port: int, data: bytes) -> tuple[bytes, float]:
    """All that comes until the end or a second's pause, and when it began."""
    started, received = time.monotonic(), []
    with socket.create_connection(("127.0.0.1", port), 20) as sock, suppress(OSError):
        sock.sendall(data)
        received.append(sock.recv(65536))
        started -= time.monotonic()
        sock.settimeout(1)
        while received[-1]:
            received.append(sock.recv(65536))
    return b"".join(received), -started if started < 0 else 20


FUZZ_RUNS = [(1, 200), long(10**6, 10_000)]


@pytest.mark.parametrize("seed, count", FUZZ_RUNS)
def test_malformed_requests_are_refused_and_cost_nothing(
    seed, count, gateway, tmp_path
):
    limits = {"rate": "10000/second", "concurrent": 1000}
    server = gateway(
        workers=1, threads=64, limits=limits,
        constants={"CLIENT_TIMEOUT": 1, "FIRST_WORD": 1},
    )
    pids = server.workers()

    def ask(number):
        data = Fuzz(number).bytes
        method = "HEAD" if data.startswith(b"HEAD") else "POST"
        received, seconds = said_text(server.port, data)
        return number, seconds, heard(received, method)

    with ThreadPoolExecutor(64) as pool:
        asked = list(pool.map(ask, range(seed, seed + count)))
    assert [number for number, seconds, _ in asked if seconds > 5] == []
    answers = [(number, one) for number, _, came in asked for one in came]
    wrong = [one for one in answers if one[1].status >= 500 and one[1].status != 503]
    assert wrong == []
    refused = [one for one in answers if one[1].status >= 400]
    assert [one for one in refused if not one[1].in_envelope] == []
    assert len(refused) > count / 2
    served = sum(one.served for _, one in answers)
    settled = query(tmp_path, "SELECT count(*) FROM requests WHERE state = 1")
    assert settled == [(served,)] and held(tmp_path) == 0
    assert 0 < served < count / 5
    assert "event=exception" not in server.log() and "Traceback" not in server.log()
    assert server.workers() == pids and status(server, model="echo") == 200


# -- Faults: upstreams ---------------------------------------------------------------


def text_event(text: str) -> dict:
    """One event with a word of the answer."""
    return chat_chunk("gpt-test", {"content": text})


MB = b"x" * (1 << 20)
LINE = STREAM + b'data: {"choices":[{"delta":{"content":"'
FAST = sse_bytes([text_event("more ")] * 500, done=False)
HUGE_CHUNK = head(200, EVENTS, CHUNKED) + b"12c00000\r\n"
TRAILERS = head(200, JSON, CHUNKED) + b"2\r\n{}\r\n0\r\n"
SILENT = sse([text_event("one two three")] * 2, gate=threading.Event())
GAVE_UP, ENDED = (503, "provider_unavailable"), (200, "provider_unavailable")
NOTHING, ESTIMATE = range(1), range(11, 12)  # 9 bytes asked, 13 bytes answered
UPSTREAMS = {  # what comes, of a stream or not, how that ends, micro-credits
    "hangs": (stall(), False, GAVE_UP, NOTHING),
    "hangs, stream": (stall(), True, GAVE_UP, NOTHING),
    "trickles its head": (trickle(PLAIN * 9, 0.05, b""), False, GAVE_UP, NOTHING),
    "trickles": (trickle(b" " * 999, 0.05), False, GAVE_UP, NOTHING),
    "trickles a stream": (trickle(b"data: " * 99, 0.05, STREAM), True, GAVE_UP, NOTHING),
    "stalls": (stall(False), True, GAVE_UP, NOTHING),
    "stalls after text": (SILENT, True, ENDED, ESTIMATE),
    "300 MB line": (repeated(LINE, MB, 300), True, GAVE_UP, NOTHING),
    "300 MB chunk": (repeated(HUGE_CHUNK, MB, 300), True, GAVE_UP, NOTHING),
    "300 MB answer": (repeated(PLAIN + b'{"x":"', MB, 300), False, GAVE_UP, NOTHING),
    "300 MB chunk size": (
        repeated(head(200, JSON, CHUNKED), b"0" * 4096, 76800), False, GAVE_UP, NOTHING
    ),
    "300 MB trailers": (
        repeated(TRAILERS, b"X: " + MB + b"\r\n", 300), False, GAVE_UP, NOTHING
    ),
    "endless headers": (endless("headers"), False, GAVE_UP, NOTHING),
    "endless comments": (endless("comments"), True, ENDED, NOTHING),
    "endless fast comments": (
        repeated(STREAM, b": keep-alive\n\n" * 5000, 10**6), True, ENDED, NOTHING
    ),
    "endless blanks": (endless("blanks"), False, GAVE_UP, NOTHING),
    "endless events": (endless("events"), True, ENDED, range(20, 3000)),
    "endless fast events": (
        repeated(STREAM, FAST, 10**6), True, ENDED, range(1000, 3000)
    ),
}


def memory(pid: int, field: str = "VmRSS") -> int:
    """Bytes that a process has in memory, or had at the most (VmHWM)."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", text)[1]) << 10


@pytest.fixture(scope="module")
def lone(narrow):
    """A worker that relays one request at a time, and its memory."""
    [pid] = narrow.workers()
    play(narrow, quickly)
    for _ in range(10):
        assert status(narrow, stream=True) == 200
        wait_for(lambda: status(narrow) == 200)
    return pid, memory(pid)


@pytest.mark.parametrize("name", UPSTREAMS)
def test_an_upstream_that_misbehaves_costs_what_is_stated_and_little_memory(
    name, lone, narrow
):
    server, up, folder, (pid, before) = narrow, narrow.up, narrow.folder, lone
    up.script, stream, end, charge = UPSTREAMS[name]
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM begins anew
    started, tail, number = time.monotonic(), b"", len(up.requests)
    answer = chat(server.url, TEAM_KEY, stream)
    for piece in answer.iter_content(1 << 16):
        tail = (tail + piece)[-4000:]
    assert ending(answer.status_code, tail) == end
    assert time.monotonic() - started < 2.5 and up.requests[number].closed.wait(2)
    up.script = quickly
    wait_for(lambda: status(server) == 200, 0.5, "the only place is free again")
    wait_held(folder, 0)
    sql = "SELECT cost FROM requests WHERE id = ?"
    [(cost,)] = query(folder, sql, answer.headers["x-request-id"])
    assert cost in charge and proof(folder) == []
    assert server.workers() == [pid]
    assert memory(pid, "VmHWM") - before < 48 << 20


def test_idle_connections_to_an_upstream_are_closed(one, gate):
    play(one, sse(WORDS, gate=gate))
    streams = visits(20, one, OTHER_KEY, stream=True)
    gate.set()
    assert all(each.finish().done for each in streams)
    kept = {id(each.connection): each.connection for each in one.up.requests}
    assert len(kept) == 20
    assert all(each.closed.wait(4) for each in kept.values())


# -- Faults: a mixed load ------------------------------------------------------------


def flood_of_events(count: int) -> Answer:
    """Answer so many events as fast as they go, then end well."""
    block = sse_bytes([text_event("more ")] * 1000, done=False)
    report = usage_of(50, 60)
    last = sse_bytes([chat_chunk("gpt-test", {}, "stop", usage=report)])

    def answer(request: Request) -> None:
        repeated(STREAM, block, count // 1000)(request)
        request.send(last)

    return answer


@pytest.mark.parametrize("count", [10**5, long(10**6)])
def test_a_flood_of_events_passes_whole_and_delays_nobody(count, gateway, tmp_path):
    with Upstream(lambda it: (flood if it.json.get("n") else quickly)(it)) as up:
        flood, server = flood_of_events(count), gateway(up.url)
        [pid], waits, done = server.workers(), [], threading.Event()
        before = memory(pid)

        def others():
            while not done.is_set():
                started = time.monotonic()
                assert requests.get(f"{server.url}/healthz", timeout=5).ok
                assert status(server, OTHER_KEY) == 200
                waits.append(time.monotonic() - started)

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(others)
            try:
                stream = chat(server.url, TEAM_KEY, True, n=1)
                body = b"".join(stream.raw.stream(1 << 16))
            finally:
                done.set()
            running.result()
        assert body.endswith(b"data: [DONE]\n\n") and body.count(b"more ") == count
        sql = "SELECT cost, estimated FROM requests WHERE id = ?"
        assert query(tmp_path, sql, stream.headers["x-request-id"]) == [(170, 0)]
        assert max(waits) < 1 and memory(pid, "VmHWM") - before < 48 << 20


class Footprint(NamedTuple):
    """What a worker has of the machine."""

    files: int
    threads: int
    memory: int


def idle(server: Gateway, up: Upstream, folder: Path) -> list[Footprint]:
    """The workers' footprints once nothing runs and no connection is kept."""
    wait_held(folder, 0, 5)
    up.wait_closed(len(up.connections))
    wait_for(lambda: not sockets(server.port), what="the clients' connections' end")
    tasks = lambda pid: len(os.listdir(f"/proc/{pid}/task"))
    pids = sorted(server.workers())
    return [Footprint(len(open_files(pid)), tasks(pid), memory(pid)) for pid in pids]


def trouble(server: Gateway, folder: Path, seed: int, until: float) -> Counter:
    """Be a client of every kind until then; count what came of it."""
    chance, seen = random.Random(seed), Counter()
    while time.monotonic() < until:
        if chance.random() < 0.3:
            told, _ = said_text(server.port, Fuzz(chance.randrange(10**9)).bytes)
            heard(told, "POST")
            seen["malformed"] += 1
        elif chance.random() < 0.02:
            credits = {"credits": chance.randint(50, 99)}
            edit_keys(folder, {"accounts": {"team": credits}})
        else:
            key = chance.choice([TEAM_KEY, OTHER_KEY, POOR_KEY, "sk-wrong"])
            seen[tell(server, key, chance).fate] += 1
    return seen


@pytest.mark.long
def test_a_mixed_load_with_faults_leaves_nothing_behind(gateway, tmp_path):
    seconds = float(os.environ.get("PROXY_TEST_LOAD", 600))
    limits = {"rate": "10000/minute", "concurrent": 50}
    waits = {"CLIENT_TIMEOUT": 1, "FIRST_WORD": 1, "UPSTREAM_IDLE": 0.5}
    with Upstream(Player()) as up:
        more = {"limits": limits, "constants": waits, **played_models(up)}
        server = gateway(up.url, workers=2, threads=16, **more)
        most = 16 + proxy.SPARE_THREADS + 4  # main, upkeep, watcher, tidying

        def run(seconds):
            until = time.monotonic() + seconds
            work = functools.partial(trouble, server, tmp_path, until=until)
            with ThreadPoolExecutor(24) as pool:
                return sum(pool.map(work, range(24)), Counter())

        run(max(1, seconds / 10))  # until the heap and SQLite's pages are as they stay
        before = idle(server, up, tmp_path)
        seen = run(seconds)
        after = idle(server, up, tmp_path)
        assert min(seen.values()) > 10 and len(seen) == 4
        for old, new in zip(before, after, strict=True):
            assert new.files <= old.files and new.threads <= most
            assert new.memory - old.memory < 10 << 20
        assert proof(tmp_path) == [] and "Traceback" not in server.log()


# -- Faults: secrets -----------------------------------------------------------------

PROMPT, SYSTEM = "planted-prompt-4c1d", "planted-system-9a7e"
ANSWERED = "planted-answer-51bb"


def ways(secret: str) -> dict[str, Answer]:
    """All that an upstream may answer with its secrets in it."""
    telling = {"error": {"message": secret, "code": secret}}
    about = ("X-Debug", SECRET), ("Set-Cookie", SECRET), CLOSE
    return {
        "500": json_answer(telling, 500),
        "401": json_answer(telling, 401),
        "400": json_answer(telling, 400),
        "html": typed(secret.encode(), "text/html"),
        "line": raw(f"HTTP/1.1 {secret}\r\n\r\n".encode()),
        "header": raw(head(200, JSON, *about)),
        "event": sse([text_event(ANSWERED), telling]),
        "cut": sse([text_event(ANSWERED)] * 9, cut=300),
        "good": json_answer(chat_json(ANSWERED)),
    }


def leaky(request: Request) -> None:
    """Repeat key and prompt in whatever way goes wrong."""
    secret = f"{request.header('Authorization')} {request.body.decode()} {ANSWERED}"
    ways(secret)[request.json["user"]](request)


def spoilt(keys: list[str]) -> Iterator[bytes]:
    """Malformed requests that hold a key and a prompt."""
    for key, seed in itertools.product(map(str.encode, keys), range(20)):
        data = Fuzz(seed).bytes.replace(TEAM_KEY.encode(), key)
        yield data.replace(b"Say hello", PROMPT.encode())
        bearer = b"Authorization: Bearer " + key
        yield b"POST /" + bearer + PROMPT.encode() + b" HTTP/1.1\r\n\r\n"
        yield b"POST / HTTP/1.1\r\n" + bearer + b"\n\rX\r\n\r\n" + bearer
        yield b"GET /v1/models/%s?key=%s HTTP/1.1\r\n\r\n" % (key, key)


READ_BY_ADMINS = """metrics v1/account v1/account/requests v1/account/usage v1/accounts
v1/accounts/team v1/accounts/team/requests dashboard""".split()


def test_no_key_and_no_prompt_is_written_down(gateway, tmp_path):
    said_to_it = [("system", SYSTEM), ("user", PROMPT)]
    messages = [{"role": role, "content": content} for role, content in said_to_it]
    with Upstream(leaky) as up, client() as session:
        server = gateway(up.url, workers=2, constants={"CLIENT_TIMEOUT": 1})
        ask = functools.partial(Visit, server, TEAM_KEY, messages=messages)
        visits = [ask(user=way, stream=way in ("event", "cut")) for way in ways("")]
        answers = [visit.start().finish() for visit in visits]
        session.headers.update(bearer(ADMIN_KEY))
        made = session.post(f"{server.url}/v1/account/keys", json={"name": "made"})
        new = re.search(r"sk-[\w-]{40,}", made.text)[0]
        secrets = [TEAM_KEY, OTHER_KEY, POOR_KEY, ADMIN_KEY, SECRET, new]
        with ThreadPoolExecutor(32) as pool:
            send = functools.partial(said_text, server.port)
            list(pool.map(send, spoilt([TEAM_KEY, new])))
        (tmp_path / "proxy.db").rename(tmp_path / "kept")
        assert status(server, messages=messages, user="good") == 503
        (tmp_path / "kept").rename(tmp_path / "proxy.db")
        wait_for(lambda: status(server, messages=messages, user="good") == 200)
        edit_keys(tmp_path, {"accounts": {"team": {"keys": {"main": [TEAM_KEY]}}}})
        wait_for(lambda: "keys.main" in server.log(), what="the refusal of keys.json")
        edit_keys(tmp_path, {"accounts": {"team": {"keys": {"main": TEAM_KEY}}}})
        server.kill(server.workers()[0], signal.SIGABRT)
        server.wait_workers(2)
        paths = [*READ_BY_ADMINS, ""]
        told = "".join(session.get(f"{server.url}/{path}").text for path in paths)
        files = b"".join(path.read_bytes() for path in tmp_path.glob("proxy.db*"))
        written = server.log().encode() + files
    assert len(written) > 10_000 and "req_" in told and "proxy_" in told
    asked = [*secrets, PROMPT, SYSTEM]
    own = "".join(one.body.decode() for one in answers)
    assert [one for one in [*asked, ANSWERED] if one.encode() in written] == []
    assert [one for one in asked if one in told] == []
    assert [one for one in secrets if one in own] == []


# -- Faults: the clock ---------------------------------------------------------------


@pytest.mark.parametrize("jump", [-3600, 3600])
def test_a_clock_that_jumps_changes_nothing_but_dates(
    jump, app, gate, tmp_path, monkeypatch
):
    clock = Jumping()
    monkeypatch.setattr(proxy, "time", clock)
    limits = {"rate": "3/minute", "concurrent": 2}
    with Upstream([sse(WORDS, gate=gate), sse(WORDS), quickly, sse(WORDS)]) as up:
        made = app(up.url, accounts={"team": {"limits": limits}})
        services = made.extensions["proxy"]
        running = asked(made, stream=True)
        pieces = running.iter_encoded()
        first = b"".join(itertools.takewhile(lambda piece: not piece, pieces))
        assert fate(asked(made, stream=True)) == (200, "done")
        clock.offset = jump
        services.ledger.write(services.ledger._tidy)
        assert held(tmp_path) == 1, "the lease stands"
        assert fate(asked(made, stream=False)) == (200, "done")
        refused = asked(made, stream=False)
        assert refused.status_code == 429
        assert 50 <= int(refused.headers["Retry-After"]) <= 60
        edit_keys(tmp_path, {"accounts": {"team": {"limits": {"rate": "5/minute"}}}})
        wait_for(lambda: services.config.account("team").limits.rate == "5/minute", 1.5)
        assert fate(asked(made, stream=True)) == (200, "done")
        gate.set()
        rest = first + b"".join(pieces)
        running.close()
        assert rest.endswith(b"data: [DONE]\n\n")
        sql = "SELECT state, cost, duration < 60000 FROM requests"
        assert query(tmp_path, sql) == [(proxy.SETTLED, COST, 1)] * 4
