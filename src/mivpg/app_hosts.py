"""Where the page is served: whether that address and port can be had, by which names it may be asked, how much sent."""

import errno
import ipaddress
import re
import socket
from typing import Any

from mivpg.errors import MivpgError

FIRST_PORT, LAST_PORT = 7860, 7959
"""Where Gradio looks for a free port if none is named."""


def check_address(host: str, port: int | None) -> None:
    """Tries to listen, since Gradio says of whatever goes wrong that no port was free.

    Args:
        host: An address of this machine, or a name of it.
        port: By default any from `FIRST_PORT` on will do.

    Raises:
        MivpgError: There is no such name or address here, or no such port is free.
    """
    if port is not None and not 0 < port < 2**16:
        raise MivpgError(f"--port is {port}, expected 1 to {2**16 - 1}.")
    asked = {(socket.AF_INET, "127.0.0.1"), *addresses_of(host)}  # Gradio wants the port to be free there, too
    for number in range(FIRST_PORT, LAST_PORT + 1) if port is None else [port]:
        try:
            for family, address in asked:
                socket.create_server((address, number), family=family).close()
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise MivpgError(f"{host}: {error.strerror}; choose another --host.") from None
        else:
            return
    what = f"no port from {FIRST_PORT} to {LAST_PORT} is" if port is None else f"port {port} is not"
    raise MivpgError(f"{host}: {what} free there; choose another --port, or another --host.")


def addresses_of(host: str) -> set[tuple[socket.AddressFamily, str]]:
    """The IPv4 and IPv6 addresses of a name, or of an address, which may be written in several ways.

    Raises:
        MivpgError: It has none.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise MivpgError(f"{host!r}: {reason}; choose another --host.") from None
    return {(family, str(address[0])) for family, _, _, _, address in found}


def is_loopback(host: str) -> bool:
    """Whether what is served there is seen from this machine alone."""
    return all(_is_loopback_address(address) for _, address in addresses_of(host))


def _is_loopback_address(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_loopback
    except ValueError:
        return False


class OwnNames:
    """An ASGI layer that answers only who asks for a loopback address, for localhost, or for the name that was given.

    Another site's page could have its own name point to this machine and read what is here (DNS rebinding); its
    requests have that name as their Host. And without reading the answers it could send files here or have captions
    written; its requests have its own name as their Origin.

    Args:
        app: What answers the others.
        host: Where it is served.
    """

    def __init__(self, app: Any, host: str):
        self.app = app
        self.names = {"localhost", host.lower()}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = [(name, value.decode("latin-1")) for name, value in scope["headers"]]
            asked = [value for name, value in headers if name == b"host"]
            origins = [value.partition("://")[2] for name, value in headers if name == b"origin"]
            if len(asked) != 1 or not all(map(self.is_own, asked + origins)):
                from starlette.responses import PlainTextResponse

                refusal = PlainTextResponse("This page answers to names of this machine alone.", status_code=400)
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def is_own(self, asked: str) -> bool:
        """Whether a Host header, such as `localhost:7860` or `[::1]:7860`, has a name of this machine."""
        parts = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]+))(?::\d*)?", asked)
        if parts is None:
            return False
        name = (parts[1] or parts[2]).lower()
        return name in self.names or _is_loopback_address(name)


class LimitedUploads:
    """An ASGI layer that refuses a request before any of it is stored, where it brings more bytes than the page reads.

    Gradio limits each file while it arrives, and their number to a thousand; the page counts them when all are there.

    Args:
        app: What answers the others.
        max_files: In one upload.
        max_file_mb: Of the largest.
    """

    def __init__(self, app: Any, max_files: int, max_file_mb: int):
        self.app = app
        self.max_bytes = (max_files * max_file_mb + 1) * 2**20  # one for what stands between the files
        self.sentence = f"Too much at once; the page reads {max_files} files of {max_file_mb} MB."

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            from starlette.responses import PlainTextResponse

            headers = dict(scope["headers"])  # the server has refused a length that is no number, and two of them
            refusal = None
            if b"transfer-encoding" in headers:
                refusal = PlainTextResponse("Say how long it is (Content-Length).", status_code=411)
            elif int(headers.get(b"content-length", 0)) > self.max_bytes:
                refusal = PlainTextResponse(self.sentence, status_code=413)
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)
