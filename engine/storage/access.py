"""How shards may be reached: which urls are taken, which hosts, and what can go wrong."""

import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from engine.config import UserError

__all__ = [
    "Access",
    "Changed",
    "Stat",
    "Unreadable",
    "Unsteady",
    "check_url",
    "literal_address",
    "public",
    "require_public",
    "scheme",
    "shown",
]

SCHEMES = ("file", "http", "https", "s3", "gs", "hf")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
# Addresses that stand for an IPv4 address behind a translator (RFC 6052).
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_KINDS = ("unspecified", "loopback", "link_local", "site_local", "multicast", "reserved", "private")


class Unreadable(OSError):
    """Bytes could not be read, and no further try is made. The message names the url and why."""


class Changed(OSError):
    """A file's size or tag is not what was expected."""


class Unsteady(OSError):
    """A fault that may pass; the server asks to wait `after_s` seconds."""

    def __init__(self, why: str, after_s: float = 0.0) -> None:
        super().__init__(why)
        self.after_s = after_s


class Stat(NamedTuple):
    """A file's size, and a tag that changes with its content: of a web server or store the ETag (or
    Last-Modified, or what else it keeps), of a local file mtime in ns; "" where nothing is told."""

    bytes: int
    tag: str

    def require(self, found: "Stat", url: str) -> None:
        """Raises Changed unless a file is found as it is expected to be."""
        if found.bytes != self.bytes or (self.tag and found.tag != self.tag):
            raise Changed(
                f"{shown(url)}: has changed: expected {self.bytes} bytes of tag {self.tag!r}, "
                f"found {found.bytes} of tag {found.tag!r}"
            )


@dataclass(frozen=True)
class Access:
    """How shards are reached.

    `hosts` ("host" or "host:port") may be redirected to, and may lie on addresses that are not
    public. A fault is retried `retries` times; no byte for `timeout_s` seconds is one. Blocks from
    afar are kept in the folder `cache` ("": nowhere), at most `cache_bytes` of them.
    """

    hosts: tuple[str, ...] = ()
    timeout_s: float = 30.0
    retries: int = 5
    cache: str = ""
    cache_bytes: int = 0

    def lists(self, host: str, port: int) -> bool:
        written = f"[{host}]" if ":" in host else host
        return not {host, written, f"{written}:{port}"}.isdisjoint(self.hosts)


def scheme(url: str) -> str:
    """The scheme of a url, "" for a plain path."""
    found = _SCHEME.match(url)
    return found[1] if found else ""


def shown(url: str) -> str:
    """A url as messages and logs may show it: without a password or a signed query."""
    if scheme(url) not in ("http", "https"):
        return url
    place, mark, _ = url.removeprefix(f"{scheme(url)}://").partition("?")
    authority, slash, path = place.partition("/")
    host = authority.rpartition("@")[2]
    return f"{scheme(url)}://{host}{slash}{path}{'?...' if mark else ''}"


def public(value: Any) -> Any:
    """A setting without passwords and signed queries of urls, which `::` may part."""
    if isinstance(value, list | tuple):
        return [public(one) for one in value]
    if isinstance(value, dict):
        return {name: public(one) for name, one in value.items()}
    if isinstance(value, str) and "://" in value:
        return "::".join(map(shown, value.split("::")))
    return value


def check_url(url: str, field: str) -> None:
    """Raises UserError, naming `field`, unless `url` is a path or a url of a kind that is read."""
    kind = scheme(url)
    if not url or not url.isprintable():
        raise UserError(f"{field}: {url!r} is not a path or url")
    if "::" in url.partition("://")[0] or ("::" in url and kind not in ("http", "https")):
        raise UserError(f"{field}: {shown(url)}: chained urls are not read")
    if not kind and "://" not in url:
        return
    if kind not in SCHEMES or not url.startswith(f"{kind}://"):
        raise UserError(
            f"{field}: {url}: only paths and urls that begin with "
            f"{', '.join(f'{name}://' for name in SCHEMES)} are read"
        )
    rest = url.removeprefix(f"{kind}://")
    if kind == "file" and not rest.startswith("/"):
        raise UserError(f"{field}: {url}: a file:// url must be an absolute path, file:///...")
    if kind in ("http", "https"):
        try:
            named = urlsplit(url).hostname and urlsplit(url).port != 0
        except ValueError:  # a port or an IPv6 address that is none
            named = False
        if not named or " " in url or "\\" in url:
            raise UserError(f"{field}: {shown(url)} is not a url of a web server")
    elif kind != "file" and not rest.strip("/"):
        raise UserError(f"{field}: {url} names no bucket or repository")


def require_public(address: str, host: str, port: int, access: Access) -> None:
    """Raises Unreadable where an address, of `host`, is not public, and the host is not listed."""
    if (kind := _kind(address)) and not access.lists(host, port):
        at = f"{host} is at" if host != address else "refused:"
        raise Unreadable(
            f"{at} {address}, a {kind} address; only hosts that are listed may be at one "
            "(corpus.hosts, --hosts)"
        )


def literal_address(host: str) -> str | None:
    """The address that a host is written as; also in the forms 127.1, 0x7f000001 and 2130706433,
    which the C library takes. None for a name."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return None


def _kind(address: str) -> str:
    """What sets an address apart from public ones, "" for a public one."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
        ip = ip.ipv4_mapped or ip.sixtofour or inner or ip
    kinds = [kind for kind in _KINDS if getattr(ip, f"is_{kind}", False)]
    if not kinds and not ip.is_global:  # 100.64.0.0/10, shared behind a carrier's or cloud's NAT
        return "shared"
    return kinds[0].replace("_", "-") if kinds else ""
