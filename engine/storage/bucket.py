"""Ranged reads from object stores, through the file systems that fsspec has for them."""

import errno
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

from engine.config import UserError
from engine.storage.access import Access, Stat, Unreadable, Unsteady

__all__ = ["Bucket"]

_PACKAGES = {
    "s3": "'promptkd-engine[s3]'",
    "gs": "'promptkd-engine[gcs]'",
    "hf": "huggingface_hub",
}
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError)
_LASTING_ERRNO = (errno.EINVAL, errno.EPERM, errno.ENOSYS)
# What a store says of a file that changes with its content; the first that is there is its tag.
_TAGS = ("ETag", "etag", "xet_hash", "blob_id", "LastModified", "mtime")


class Bucket:
    """Files of one kind of store (s3, gs or hf), read on fsspec's event loop."""

    def __init__(self, scheme: str, access: Access) -> None:
        """Raises UserError where the store's package is not installed."""
        self._scheme = scheme
        try:
            fs = fsspec.filesystem(scheme, skip_instance_cache=True, **_options(scheme, access))
        except ImportError as error:
            raise UserError(
                f"{scheme}:// needs a package that is missing ({error}): "
                f"pip install {_PACKAGES[scheme]}"
            ) from None
        if scheme == "s3":
            fs.retries = 1  # retries are Storage's, which counts them
        self._fs: Any = fs if isinstance(fs, AsyncFileSystem) else AsyncFileSystemWrapper(fs)
        # A plain file of fsspec reads ahead; every read here is a whole range.
        self._read = {} if fs is self._fs else {"cache_type": "none"}

    def close(self) -> None:
        """fsspec closes the connections with the file system."""

    async def stat(self, url: str) -> Stat:
        try:
            said = await self._fs._info(url)
        except Exception as error:  # of every library's own kind
            raise _sorted_out(error, url) from None
        if said["type"] != "file":
            raise Unreadable(f"{url}: is not a file")
        tag = next((said[name] for name in _TAGS if said.get(name)), "")
        return Stat(int(said["size"]), str(tag))

    async def fetch(self, url: str, start: int, end: int, expected: Stat, into: bytearray) -> None:
        """Appends bytes start..end to `into`.

        Raises Unsteady, Unreadable, and Changed where the file is not the expected one. That is
        looked at after the bytes have come, so that it holds of them too.
        """
        try:
            data = await self._fs._cat_file(url, start=start, end=end, **self._read)
        except Exception as error:
            fault = _sorted_out(error, url)
            if isinstance(fault, Unreadable):  # as where a file has become too short for the range
                expected.require(await self.stat(url), url)
            raise fault from None
        expected.require(await self.stat(url), url)
        if len(data) > end - start:
            raise Unreadable(f"{url}: more bytes came than the range holds")
        into += data
        if len(data) < end - start:
            raise Unsteady(f"short answer, {end - start - len(data)} bytes missing")

    async def list(self, where: str) -> list[str]:
        """The files that a glob matches, or that lie in a folder."""
        pattern = where if any(c in where for c in "*?[") else f"{where.rstrip('/')}/*"
        try:
            found = await self._fs._glob(pattern, detail=True)
        except FileNotFoundError:
            return []
        except Exception as error:
            raise _sorted_out(error, where) from None
        return sorted(
            f"{self._scheme}://{n}" for n, said in found.items() if said["type"] == "file"
        )


def _options(scheme: str, access: Access) -> dict[str, Any]:
    if scheme == "s3":
        return {
            "use_listings_cache": False,
            "config_kwargs": {
                "connect_timeout": access.timeout_s,
                "read_timeout": access.timeout_s,
                "retries": {"total_max_attempts": 1},
            },
        }
    if scheme == "gs":  # for a whole answer; gcsfs retries by itself too
        return {"use_listings_cache": False, "requests_timeout": access.timeout_s}
    return {}  # huggingface_hub has its time-outs and retries; a listing is a call that it rations


def _sorted_out(error: Exception, url: str) -> OSError:
    """Unreadable where another try is in vain, else Unsteady."""
    why = f"{type(error).__name__}: {error}"
    lasting = (
        isinstance(error, _LASTING)
        or getattr(error, "errno", None) in _LASTING_ERRNO
        or type(error).__name__ == "NoCredentialsError"  # botocore's, which may be missing
    )
    return Unreadable(f"{url}: {why}") if lasting else Unsteady(why)
