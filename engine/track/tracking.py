"""The trackers of the runs that a driver has, fed with what the runs record."""

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.util import find_spec
from types import TracebackType
from typing import Any

from engine import run_folder
from engine.config import RunConfig, TrackConfig, UserError, to_dict
from engine.progress import say
from engine.storage.access import public
from engine.track.aside import Aside
from engine.track.child import About, Child
from engine.track.metrics import Reader
from engine.track.ray_metrics import RayMetrics, address

__all__ = ["Tracking", "require_installed"]

_END_S, _HURRY_S = 20.0, 2.0  # for all trackers together
_TOLD = 64  # longest tag
_PACKAGES = {
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow-skinny sqlalchemy alembic",  # the last two for a file of this machine
}


def require_installed(config: TrackConfig) -> None:
    """Raises UserError where a tracker is asked for whose library is not there."""
    for service in config.to:
        if service not in _PACKAGES:
            continue
        found = find_spec(service)
        # A folder of that name, such as wandb makes, is found as a package without an origin.
        if not (found and found.origin):
            raise UserError(
                f"track.to: {service} is asked for and not installed; "
                f"`pip install {_PACKAGES[service]}` installs it"
            )


class Tracking:
    """A sink of a Watch: passes the records of runs, by name, to the trackers that each asks for,
    and to Ray's metrics. Each tracker works in a thread of its own."""

    def __init__(
        self, configs: Mapping[str, RunConfig], hurries: Callable[[], bool] = lambda: False
    ) -> None:
        """`hurries` tells whether somebody waits for the runs to be left."""
        self._configs, self._hurries = configs, hurries
        self._readers = {name: Reader() for name in configs}
        self._asides = {name: [*_asides(config)] for name, config in configs.items()}
        if where := address():
            say(f"metrics for Prometheus: {where}")

    def __enter__(self) -> "Tracking":
        return self

    def __call__(self, name: str, record: Mapping[str, Any]) -> None:
        """Returns at once."""
        for point in self._readers[name].read(record):
            for aside in self._asides[name]:
                aside.put(point)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Tells the numbers of summary.json, where a run has come to its end, and ends all trackers
        within 20 seconds, or 2 where there is hurry."""
        hurry = kind is not None or self._hurries()
        deadline = time.monotonic() + (_HURRY_S if hurry else _END_S)
        for name, asides in self._asides.items():
            summary = run_folder.ended(self._configs[name])
            for point in self._readers[name].end(summary or {}, time.time()):
                for aside in asides:
                    aside.put(point)
            for aside in asides:
                aside.end(finished=summary is not None)
        for asides in self._asides.values():
            for aside in asides:
                aside.join(max(0.0, deadline - time.monotonic()))


def _asides(config: RunConfig) -> Iterable[Aside]:
    about = _about(config)
    yield Aside("Ray's metrics", partial(RayMetrics, about.name))
    for service in config.track.to:
        if service == "tensorboard":
            yield Aside("TensorBoard", partial(_tensorboard, config, about))
        else:
            yield Aside(service, partial(Child, service, about))


def _tensorboard(config: RunConfig, about: About):
    from engine.track.tensorboard import TensorBoard  # takes a second

    return TensorBoard(config.folder / "tensorboard", about.config)


def _about(config: RunConfig) -> About:
    """What a tracker, which may be another's server, is to know of a run."""
    told = {
        f"{section}.{name}" if name else section: public(value)
        for section, fields in to_dict(config).items()
        for name, value in (fields if isinstance(fields, dict) else {"": fields}).items()
    }
    above = config.folder.absolute().parent.name  # that of several seeds or students tells more
    name = config.name if above == "runs" else f"{above}-{config.name}"
    models = (config.teacher.model, config.student.model)
    tags = (config.preset, *(model.rpartition("/")[2][-_TOLD:] for model in models))
    return About(name, config.track.project, str(config.folder), told, tags)
