"""One HTTP exchange with a server that is not trusted: pinned address, deadline, size limit."""

from __future__ import annotations

import http.client
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import urlsplit

from tutelage.errors import ConfigError, ModelError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# Where clouds hand credentials to whoever asks from inside; link-local as a whole.
_METADATA = tuple(
    ipaddress.ip_network(network)
    for network in (
        "169.254.0.0/16",
        "fe80::/10",
        "fd00:ec2::/32",
        "fd20:ce::254/128",
        "100.100.100.200/32",
        "168.63.129.16/32",
        "192.0.0.192/32",
    )
)
# Networks whose addresses end in an IPv4 address: compatible, translated (SIIT) and NAT64.
_ENDS_IN_IPV4 = tuple(
    ipaddress.ip_network(network)
    for network in ("::/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48")
)
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)


class BadReply(Exception):
    """The server did not answer, or not with what it was asked for; worth another try."""


class RefusedRequest(ModelError):
    """The server says that the request itself is wrong: the same one will be refused again."""

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        self.reason = reason
        """What the server said, of up to 2,000 characters, printable and without the key."""
        super().__init__(f"the server refuses the request: status {status}: {reason[:200]}.")


@dataclass(frozen=True)
class Address:
    """A server's base URL, taken apart, with the one address that is connected to."""

    scheme: str
    host: str
    port: int
    path: str
    ip: str


def resolve(url: str) -> Address:
    """Check a base URL and look its host up, once.

    Raises:
        ConfigError: it is not plain http(s), carries secrets, or leads to a metadata service.
        ModelError: the host is unknown.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
    except ValueError:  # its reason may show a part of a password
        raise ConfigError(
            "the server's URL is malformed. Write it as http://host:8000/v1."
        ) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"the server's URL must begin with http:// or https://, got {parts.scheme + '://'!r}."
        )
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            "the server's URL holds a user or password. Remove it and set TUTELAGE_API_KEY."
        )
    if parts.query or parts.fragment or not url.isprintable() or " " in url:
        raise ConfigError("the server's URL must end with its path, such as http://host:8000/v1.")
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ModelError(f"the host {parts.hostname!r} is unknown. Correct the URL.") from None
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        refuse_metadata(address, parts.hostname)
    return Address(parts.scheme, parts.hostname, port, parts.path.rstrip("/"), addresses[0])


def refuse_metadata(address: str, host: str) -> None:
    """Raise ConfigError for the address of a metadata service, however it is written."""
    for ip in _meanings(ipaddress.ip_address(address.partition("%")[0])):
        if ip.is_multicast or any(ip in network for network in _METADATA):
            raise ConfigError(
                f"the host {host!r} leads to {ip}, an address of cloud metadata or of no single "
                "host. Name the server itself."
            )


def _meanings(ip: IPAddress) -> Iterator[IPAddress]:
    """The address and the IPv4 addresses embedded in it."""
    yield ip
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if any(ip in network for network in _ENDS_IN_IPV4):
            embedded.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        yield from (inner for inner in embedded if inner is not None)


class _Connection(http.client.HTTPConnection):
    """A connection to the pinned address, with TLS in the host's name where asked."""

    def __init__(self, address: Address, timeout_s: float) -> None:
        super().__init__(address.host, address.port, timeout=timeout_s)
        self._address = address
        self._wire: socket.socket | None = None  # http.client forgets its own before the body
        self.is_cut = False

    def connect(self) -> None:
        plain = socket.create_connection((self._address.ip, self.port), self.timeout)
        self.sock = self._wire = plain
        if self._address.scheme == "https":
            context = ssl.create_default_context()
            secure = context.wrap_socket(
                plain, server_hostname=self._address.host, do_handshake_on_connect=False
            )
            self.sock = self._wire = secure
            secure.do_handshake()
        if self.is_cut:
            raise TimeoutError("the deadline passed while connecting")

    def cut(self) -> None:
        """End it from another thread: whatever waits on the socket wakes up."""
        self.is_cut = True
        if self._wire is not None:
            with suppress(OSError):  # it was closed meanwhile
                self._wire.shutdown(socket.SHUT_RDWR)


class Wire:
    """Sends requests to one server; may be used from several threads."""

    def __init__(self, address: Address, api_key: str | None, max_reply_bytes: int) -> None:
        self._address = address
        self._api_key = api_key
        self._max_reply_bytes = max_reply_bytes
        self._open: set[_Connection] = set()
        self._lock = threading.Lock()
        self.stopped = threading.Event()

    def send(self, path: str, body: dict[str, Any] | None, seconds: float) -> bytes:
        """One request, POST with a body and else GET; the bytes of its JSON reply.

        Raises:
            BadReply: no reply in time, or one that is worth another try.
            ModelError: a reply that will not change.
        """
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        headers |= {"Connection": "close", "User-Agent": "tutelage"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        with self._connection(seconds) as connection:
            try:
                method = "GET" if data is None else "POST"
                connection.request(method, self._address.path + path, data, headers)
                # Closed whatever it holds: a reply left half read keeps its socket open.
                with closing(connection.getresponse()) as response:
                    return self._read(response)
            except ModelError:  # a ValueError too
                raise
            except ssl.SSLCertVerificationError as error:
                reason = error.verify_message
                raise ModelError(f"the server's certificate is not valid: {reason}.") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                late = f"no whole reply within {seconds:.0f} s"
                reason = (
                    late if connection.is_cut else self.clean(str(error)) or type(error).__name__
                )
                raise BadReply(reason) from None

    def stop(self) -> None:
        """End all requests, in every thread."""
        self.stopped.set()
        with self._lock:
            for connection in self._open:
                connection.cut()

    @contextmanager
    def _connection(self, seconds: float) -> Iterator[_Connection]:
        connection = _Connection(self._address, seconds)
        # A socket's own timeout begins anew with every byte; this timer does not.
        timer = threading.Timer(seconds, connection.cut)
        timer.daemon = True
        with self._lock:
            self._open.add(connection)
        timer.start()
        try:
            if self.stopped.is_set():
                raise BadReply("stopped")
            yield connection
        finally:
            timer.cancel()
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        content = response.read(self._max_reply_bytes + 1)
        if len(content) > self._max_reply_bytes:
            raise BadReply(f"a reply of more than {self._max_reply_bytes} bytes")
        if response.status != 200:
            self._refuse(response.status, content)
        if response.length:
            raise BadReply(f"a reply that lacks its last {response.length} bytes")
        kind = response.headers.get_content_type()
        if kind != "application/json" or len(response.headers.get_all("Content-Type", ())) != 1:
            raise BadReply(f"a reply of type {self.clean(kind)}, not application/json")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise BadReply("a compressed reply, which was not asked for")
        if self._api_key is not None and self._api_key.encode() in content:
            raise BadReply("a reply that repeats the API key")
        return content

    def _refuse(self, status: int, content: bytes) -> NoReturn:
        said = self.clean(content[:2000].decode("utf-8", "replace"), 2000)
        if status in _RETRIED:
            raise BadReply(f"status {status}: {said[:200]}")
        if 300 <= status < 400:
            raise ModelError(f"the server redirects (status {status}), which is not followed.")
        if status in (401, 403):
            raise ModelError(
                f"the server refuses the key (status {status}). Set TUTELAGE_API_KEY in the "
                "environment."
            )
        raise RefusedRequest(status, said)

    def clean(self, text: str, length: int = 200) -> str:
        """Foreign text for one line of an error: short, printable, without the key."""
        if self._api_key is not None:
            text = text.replace(self._api_key, "***")
        shown = "".join(char if char.isprintable() else " " for char in text)
        return " ".join(shown.split())[:length]


def seconds_left(end: float) -> float:
    """Seconds until a moment of `time.monotonic`, never below a tenth."""
    return max(0.1, end - time.monotonic())
