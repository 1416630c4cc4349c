"""What is refused before a request is understood: foreign hosts and origins, too large bodies.

A page of any site can send requests to this machine, and a name of its own can lead here (DNS
rebinding). So the Host must be this machine, and an Origin the same as the Host.
"""

from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perceiver_ar_jax.serving.errors import error_response

LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
MAX_BODY = 1 << 20


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if _host_name(host) not in LOCAL_NAMES:
            response = error_response(403, f"this server is local: its Host is not {host!r}")
        elif origin is not None and _netloc(origin) != host:
            response = error_response(403, f"requests from {origin!r} are refused")
        elif scope["method"] == "POST":
            body = await _read(receive)
            if body is not None:
                await self._app(scope, _again(body, receive), send)
                return
            response = error_response(413, f"the body has more than {MAX_BODY} bytes")
            response.headers["Connection"] = "close"
        else:
            await self._app(scope, receive, send)
            return
        await response(scope, receive, send)


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None if it is too large."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        if not message.get("more_body"):  # also where the client has left
            return body


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that first gives a body that was read already."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


def _host_name(host):
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _netloc(origin):
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None
