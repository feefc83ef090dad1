"""Which urls are taken, and which addresses may be reached."""

import pickle
import re

import pytest

from engine.config import UserError
from engine.storage.access import (
    Access,
    Unreadable,
    check_url,
    literal_address,
    require_public,
    shown,
)


@pytest.mark.parametrize(
    "url",
    [
        "/data/a.tar",
        "data/a-*.tar",
        "file:///data/a.tar",
        "http://h/a.tar",
        "https://h:8443/a.tar?x=1&y=a::b",
        "s3://bucket/a.tar",
        "gs://bucket/a.tar",
        "hf://datasets/who/what@main/a.tar",
        "http://[2606:4700::1111]:80/a",
    ],
)
def test_urls_that_are_read(url):
    check_url(url, "corpus.shards")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "pipe:cat /etc/passwd",
        "-o/tmp/a://h/a.tar",
        "ftp://h/a.tar",
        "memory://a",
        "local:///a",
        "github://a:b@/c",
        "HTTP://h/a",
        "http:/h/a",
        "http://",
        "http://:80/a",
        "http://h:99999/a",
        "http://[::1/a",
        "http://h/a b",
        "http://h\\@other/a",
        "http://h/a\r\nHost: other",
        "zip://a.jpg::http://h/a.zip",
        "simplecache::s3://b/a.tar",
        "s3://bucket/a::b",
        "/data/a::b",
        "file://data/a.tar",
        "file://host/data/a.tar",
        "file:data/a.tar",
        "s3://",
        "s3:///",
        "/data/a\x00.tar",
    ],
)
def test_urls_that_are_not(url):
    with pytest.raises(UserError, match=r"^corpus\.shards: "):
        check_url(url, "corpus.shards")


@pytest.mark.parametrize(
    "address",
    "0.0.0.0 10.1.2.3 100.64.0.1 127.9.9.9 169.254.169.254 172.16.0.1 192.168.1.1 198.18.0.1 "
    "224.0.0.1 240.0.0.1 255.255.255.255 :: ::1 ::ffff:10.0.0.1 64:ff9b::a9fe:a9fe "
    "2002:a9fe:a9fe::1 2001:db8::1 fc00::1 fe80::1 fec0::1 ff02::1".split(),
)
def test_addresses_that_are_not_public_need_a_listed_host(address):
    with pytest.raises(Unreadable, match=re.escape(address)):
        require_public(address, "shards.example", 80, Access())
    with pytest.raises(Unreadable):
        require_public(address, "shards.example", 81, Access(hosts=("shards.example:80",)))
    require_public(address, "shards.example", 80, Access(hosts=("shards.example:80",)))
    require_public(address, "shards.example", 80, Access(hosts=("shards.example",)))


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "64:ff9b::101:101"])
def test_public_addresses_need_none(address):
    require_public(address, "shards.example", 80, Access())


def test_addresses_are_known_in_every_form():
    for form in ("127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0x7f.1"):
        assert literal_address(form) == "127.0.0.1"
    assert literal_address("::1") == "::1"
    assert literal_address("shards.example") is literal_address("1.example") is None


def test_secrets_of_a_url_are_not_shown():
    assert shown("https://me:word@h:1/a.tar?sig=word") == "https://h:1/a.tar?..."
    assert shown("s3://b/a.tar") == "s3://b/a.tar" and shown("/a?b") == "/a?b"


def test_an_access_goes_to_other_processes():
    access = Access(hosts=("h:1",), cache="/c", cache_bytes=5)
    assert pickle.loads(pickle.dumps(access)) == access
    assert access.lists("h", 1) and not access.lists("h", 2)
    assert Access(hosts=("[::1]:80",)).lists("::1", 80) and Access(hosts=("::1",)).lists("::1", 80)
