"""W&B, trackio and MLflow, each as its library has it. For a process of their own (child.py)."""

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import durable
from engine.json_text import parse_json
from engine.track.child import About
from engine.track.metrics import Point

__all__ = ["SERVICES"]

Tell = Callable[[str], None]
_FIELD = "step"


class WandB:
    """Its login, host and mode are those of WANDB_* and `wandb login`."""

    def __init__(self, about: About, tell: Tell) -> None:
        import wandb

        known = _known(about, "wandb")
        run_id = known.get("id") or secrets.token_hex(4)
        _keep(about, "wandb", {"id": run_id})
        self._run = wandb.init(
            project=about.project,
            name=about.name,
            id=run_id,
            resume="allow",
            dir=about.folder,
            config=about.config,
            tags=about.tags,
            settings=wandb.Settings(console="off"),
        )
        # Not its own count of calls, which goes on where a run goes back to a checkpoint.
        self._run.define_metric("*", step_metric=_FIELD)
        tell(
            self._run.url or f"offline; `wandb sync {about.folder}/wandb/offline-run-*` uploads it"
        )

    def log(self, point: Point) -> None:
        if point.values:
            self._run.log({_FIELD: point.step, **point.values})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class Trackio:
    """Where it keeps its numbers is told by TRACKIO_*."""

    def __init__(self, about: About, tell: Tell) -> None:
        import trackio

        known = _known(about, "trackio")
        # A name is all by which it knows a run, and another folder may have one of that name.
        name = known.get("name") or f"{about.name}-{secrets.token_hex(2)}"
        _keep(about, "trackio", {"name": name})
        self._run = trackio.init(
            project=about.project, name=name, resume="allow", config=about.config
        )
        tell(f"run {name}; `trackio show --project {about.project}` shows it")

    def log(self, point: Point) -> None:
        if point.values:
            self._run.log(point.values, step=point.step)

    def close(self, finished: bool) -> None:
        self._run.finish()


class MLflow:
    """Its server, or file, is that of MLFLOW_TRACKING_URI."""

    def __init__(self, about: About, tell: Tell) -> None:
        from mlflow import MlflowClient, get_tracking_uri
        from mlflow.entities import Param

        where = get_tracking_uri()
        self._client = MlflowClient(where)
        known = _known(about, "mlflow")
        if known.get("where") == where:
            self._id = known["id"]
            self._client.update_run(self._id, status="RUNNING")
        else:
            experiment = self._client.get_experiment_by_name(about.project)
            into = experiment.experiment_id if experiment else None
            into = into or self._client.create_experiment(about.project)
            tags = dict.fromkeys(about.tags, "")
            self._id = self._client.create_run(into, tags=tags, run_name=about.name).info.run_id
            _keep(about, "mlflow", {"id": self._id, "where": where})
            settings = [Param(name, f"{value}"[:500]) for name, value in about.config.items()]
            for low in range(0, len(settings), 100):  # the most it takes
                self._client.log_batch(self._id, params=settings[low : low + 100])
        tell(f"run {self._id} of {where}")

    def log(self, point: Point) -> None:
        from mlflow.entities import Metric

        at = int(1000 * point.time_s)
        told = [Metric(name, value, at, point.step) for name, value in point.values.items()]
        if told:
            self._client.log_batch(self._id, metrics=told)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "FAILED")


SERVICES: dict[str, type[WandB] | type[Trackio] | type[MLflow]] = {
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}


def _known(about: About, service: str) -> dict[str, Any]:
    """What an earlier life of the run has kept, by which its run there is known."""
    file = _file(about, service)
    return parse_json(file.read_bytes()) if file.exists() else {}


def _keep(about: About, service: str, known: dict[str, Any]) -> None:
    durable.replace(_file(about, service), json.dumps(known).encode())


def _file(about: About, service: str) -> Path:
    return Path(about.folder) / "track" / f"{service}.json"
