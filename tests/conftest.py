"""Images and corpora that tests share. Real data comes from the folder PROMPTKD_DATA, if set."""

import http.server
import io
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from servers import Bucket, serving

if TYPE_CHECKING:
    from browser import Browser

settings.register_profile("house", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("house")
CLASSES = ("daisy", "oak_tree", "tulip")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def forget_what_was_compiled() -> Iterator[None]:
    """torch.compile takes eight kinds of calls of a function in a process, and then fails."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data; skips the test where there is none."""
    if not (folder := os.environ.get("PROMPTKD_DATA")):
        pytest.skip("needs real data: PROMPTKD_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def photo() -> Callable[..., Image.Image]:
    """photo(width, height, seed): a smooth coloured picture, its corners all different."""

    def draw(width: int, height: int, seed: int = 0) -> Image.Image:
        coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    return draw


@pytest.fixture(scope="session")
def encoded(photo: Callable[..., Image.Image]) -> Callable[..., bytes]:
    """encoded(width, height, seed, format, mode, **save): such a picture as the bytes of a file."""

    def encode(
        width: int, height: int, seed: int = 0, kind: str = "jpeg", mode: str = "RGB", **save
    ) -> bytes:
        buffer = io.BytesIO()
        photo(width, height, seed).convert(mode).save(buffer, kind, **save)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def images_folder(tmp_path_factory: pytest.TempPathFactory, encoded) -> Path:
    """24 JPEG, PNG and WebP images of many sizes, in three class sub-folders."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(24):
        kind = ("jpeg", "png", "webp")[number // 3 % 3]
        file = folder / CLASSES[number % 3] / f"{number:02d}.{kind}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(encoded(40 + 7 * number, 180 - 5 * number, number, kind, quality=95))
    return folder


@pytest.fixture(scope="session")
def index() -> Callable[[Path], Path]:
    """index(folder): indexes the shards of a folder, as `promptkd index` does."""
    from engine.index import index

    def run(folder: Path) -> Path:
        index(str(folder), workers=1)
        return folder

    return run


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory, images_folder: Path, index) -> Path:
    """The images as indexed shards of 10, 10 and 4 samples. Not to be written to."""
    from engine.data.shards import write_shards

    folder = tmp_path_factory.mktemp("corpus")
    write_shards(images_folder, folder, None, shard_samples=10, skip_invalid=False)
    return index(folder)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A cluster of this machine, of four CPUs whatever it has."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def browser() -> Iterator["Browser"]:
    """A headless Chromium; skips the test where there is none."""
    from browser import installed, running

    if not (program := installed()):
        pytest.skip("no browser: `make browser` installs one")
    with running(program) as one:
        yield one


@pytest.fixture
def artefacts(tmp_path: Path) -> Path:
    """Where to leave what somebody may want to look at: the folder PROMPTKD_ARTEFACTS, if set."""
    folder = Path(os.environ.get("PROMPTKD_ARTEFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def bucket(monkeypatch):
    """The server of an S3 bucket, `labels`; the real client finds it."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'promptkd-engine[s3]'")
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    running.daemon_threads = True
    running.files, running.down = {}, False
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{running.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # an earlier one has another server
    with serving(running):
        yield running


@pytest.fixture(params=["disk", "file", "memory", "s3"])
def where(request, tmp_path):
    """A place for files, not there yet, of each kind."""
    if request.param == "s3":
        request.getfixturevalue("bucket")
        return "s3://labels/some/store"
    url = f"memory://{uuid.uuid4().hex}/store"
    return {"disk": f"{tmp_path}/x", "file": f"file://{tmp_path}/x", "memory": url}[request.param]
