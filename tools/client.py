"""A small client of ComfyUI's HTTP and websocket interface, with the standard library only.

``Client`` asks and posts JSON; ``Events`` is one websocket. Only what ComfyUI sends is understood: unmasked frames without
extensions, text as JSON and binary previews.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .places import RunError

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
PREVIEW, PREVIEW_WITH_METADATA = 1, 4
ENDINGS = ("execution_success", "execution_error", "execution_interrupted")


@dataclass
class Event:
    """One message of the server: a JSON ``type`` and ``data``, or a preview (type 'preview', ``image`` bytes)."""

    type: str
    data: dict = field(default_factory=dict)
    image: bytes = b""
    binary_type: int = 0


class Client:
    """HTTP calls to one server."""

    def __init__(self, host: str, port: int):
        self.host, self.port = host, port
        self.url = f"http://{host}:{port}"

    def fetch(self, path: str, body: bytes | None = None, timeout: float = 60) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of a GET, or of a POST of JSON bytes; an error status is an answer, not an exception."""
        request = urllib.request.Request(self.url + path, data=body, headers={"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=timeout) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, dict(error.headers), error.read()

    def get(self, path: str):
        """The JSON at ``path``; any status but 200 is an error."""
        status, _, body = self.fetch(path)
        if status != 200:
            raise RunError(f"{path} answered {status}: {body[:300].decode(errors='replace')}")
        return json.loads(body)

    def post(self, path: str, value: object) -> tuple[int, object]:
        """(status, JSON answer or None) for a JSON body."""
        status, _, body = self.fetch(path, json.dumps(value).encode())
        try:
            return status, json.loads(body) if body else None
        except ValueError:
            return status, body.decode(errors="replace")

    def events(self, client_id: str | None = None) -> Events:
        """An open websocket that has asked for previews with metadata."""
        return Events(self.host, self.port, client_id or uuid.uuid4().hex)

    def run(self, prompt: dict, on_event: Callable[[Event], None] | None = None, timeout: float = 300, **extra_data) -> Outcome:
        """Queue an API prompt and follow it to its end. A refused prompt gives an Outcome without events."""
        with self.events() as events:
            status, answer = self.post("/prompt", {"prompt": prompt, "client_id": events.client_id, "extra_data": extra_data})
            if status != 200:
                return Outcome("refused", [], answer, {})
            prompt_id, seen = answer["prompt_id"], []
            for event in events.until(timeout):
                seen.append(event)
                if on_event:
                    on_event(event)
                if event.type in ENDINGS and event.data.get("prompt_id") == prompt_id:
                    return Outcome(event.type, seen, event.data, self.history(prompt_id))
        raise RunError(f"The prompt did not end within {timeout:g} s.")

    def free(self) -> None:
        """Unload the models and forget all results; returns when that has happened.

        The server only notes the wish, and looks at its notes after a prompt: one that comes at once can still run before. So a
        prompt is run here, behind which there is nothing left to do.
        """
        self.post("/free", {"unload_models": True, "free_memory": True})
        outcome = self.run({"1": {"class_type": "PreviewAny", "inputs": {"source": "nothing"}}})
        if not outcome.ok:
            raise RunError(f"A prompt without work ended with {outcome.ending}: {outcome.error}")

    def history(self, prompt_id: str, timeout: float = 10) -> dict:
        """The history entry of a prompt; it appears a moment after the last event."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                return entry
            time.sleep(0.05)
        raise RunError(f"No history entry for the prompt {prompt_id}.")


@dataclass
class Outcome:
    """How a prompt ended: one of ENDINGS or 'refused', the events, the last event's data (or the refusal), the history."""

    ending: str
    events: list[Event]
    data: object
    history: dict

    @property
    def ok(self) -> bool:
        return self.ending == "execution_success"

    @property
    def error(self) -> str:
        """The message that a user sees, empty when all went well."""
        if self.ok:
            return ""
        if isinstance(self.data, dict) and "exception_message" in self.data:
            return f"{self.data.get('node_type')}: {self.data['exception_message']}"
        return json.dumps(self.data)

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.type == kind]

    def files(self) -> list[dict]:
        """Every file that the output nodes announced: {filename, subfolder, type}."""
        outputs = self.history.get("outputs", {}).values()
        return [item for output in outputs for value in output.values() if isinstance(value, list)
                for item in value if isinstance(item, dict) and "filename" in item]


class Events:
    """The server's messages to one client id. Iterate with ``until``; close it, or use it as a context."""

    def __init__(self, host: str, port: int, client_id: str):
        self.client_id = client_id
        self.socket = socket.create_connection((host, port), timeout=30)
        self._pending = b""
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall((
            f"GET /ws?clientId={client_id} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n").encode())
        while b"\r\n\r\n" not in self._pending:
            self._receive()
        head, _, self._pending = self._pending.partition(b"\r\n\r\n")
        if b" 101 " not in head.split(b"\r\n")[0]:
            raise RunError(f"The server refused the websocket: {head[:200].decode(errors='replace')}")
        self.send({"type": "feature_flags", "data": {"supports_preview_metadata": True}})

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_) -> None:
        self.socket.close()

    def send(self, message: dict) -> None:
        """One JSON text message."""
        self._send(TEXT, json.dumps(message).encode())

    def until(self, timeout: float) -> Iterator[Event]:
        """Messages as they come; ends when nothing more came before ``timeout`` seconds from now, or the server closed."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            self.socket.settimeout(left)
            try:
                kind, payload = self._message()
            except TimeoutError:
                return
            if kind == CLOSE:
                return
            yield parse(kind, payload)

    def _send(self, kind: int, payload: bytes) -> None:
        mask = os.urandom(4)
        size = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + struct.pack(">H", len(payload))
        self.socket.sendall(bytes([0x80 | kind]) + size + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(payload)))

    def _message(self) -> tuple[int, bytes]:
        """The next text, binary or close message, put together from its frames; pings are answered on the way."""
        kind, whole = 0, b""
        while True:
            first, second = self._take(2)
            size = second & 0x7F
            if size == 126:
                size = struct.unpack(">H", self._take(2))[0]
            elif size == 127:
                size = struct.unpack(">Q", self._take(8))[0]
            payload, code = self._take(size), first & 0x0F
            if code == PING:
                self._send(PONG, payload)
            elif code != PONG:
                kind, whole = code or kind, whole + payload
                if first & 0x80:
                    return kind, whole

    def _take(self, count: int) -> bytes:
        while len(self._pending) < count:
            self._receive()
        taken, self._pending = self._pending[:count], self._pending[count:]
        return taken

    def _receive(self) -> None:
        data = self.socket.recv(1 << 16)
        if not data:
            raise RunError("The server closed the connection.")
        self._pending += data


def parse(kind: int, payload: bytes) -> Event:
    """A message as an Event. Preview with metadata: type, length of the JSON, the JSON, then the image."""
    if kind == TEXT:
        message = json.loads(payload)
        return Event(message.get("type", ""), message.get("data") or {})
    binary = struct.unpack(">I", payload[:4])[0]
    if binary == PREVIEW_WITH_METADATA:
        size = struct.unpack(">I", payload[4:8])[0]
        return Event("preview", json.loads(payload[8:8 + size]), payload[8 + size:], binary)
    return Event("preview", {}, payload[8:], binary)
