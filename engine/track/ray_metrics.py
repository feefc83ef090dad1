"""Numbers of a run among Ray's own metrics, which every node serves to Prometheus."""

import time

import ray
from ray.util.metrics import Gauge

from engine.track.metrics import METRICS, Point

__all__ = ["RayMetrics", "address", "exported"]

_STALE_S = 600.0
_TAGS = {"student": "worker", "teacher": "teacher", "skipped": "reason"}  # by group


def exported(metric: str) -> str:
    """The name by which Ray is told a metric; to Prometheus it is ray_ and that."""
    return f"promptkd_{metric.replace('/', '_')}"


def address() -> str:
    """Where this node serves its metrics; empty where it does not, or Ray does not run."""
    if not ray.is_initialized():
        return ""
    here = ray.get_runtime_context().get_node_id()
    ports = [node for node in ray.nodes() if node["NodeID"] == here and node["MetricsExportPort"]]
    return "".join(
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ports[:1]
    )


class RayMetrics:
    """Gauges of the metrics in METRICS, with the tag `run`, and `worker`, `teacher` or `reason`.

    Ray shows a gauge for some seconds after it was set (its metrics_report_interval_ms, twice), so
    each is set again and again, until it has not been told for ten minutes, or the run has ended.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}
        self._last: dict[str, tuple[float, float]] = {}  # by name: value, and when it was told

    def log(self, point: Point) -> None:
        now = time.monotonic()
        for name, value in point.values.items():
            metric, tags = _split(name)
            if metric in METRICS:
                self._last[name] = value, now
                self._set(metric, tags, value)

    def tick(self) -> None:
        now = time.monotonic()
        self._last = {n: told for n, told in self._last.items() if now - told[1] < _STALE_S}
        for name, (value, _) in self._last.items():
            self._set(*_split(name), value)

    def close(self, finished: bool) -> None:
        pass

    def give_up(self) -> None:
        pass

    def _set(self, metric: str, tags: dict[str, str], value: float) -> None:
        tags = {"run": self._run, **tags}
        if metric not in self._gauges:
            self._gauges[metric] = Gauge(exported(metric), METRICS[metric], tuple(tags))
        self._gauges[metric].set(float(value), tags)


def _split(name: str) -> tuple[str, dict[str, str]]:
    """student/waited_labels of worker 3, for student/3/waited_labels."""
    group, one, *rest = name.split("/")
    if group not in _TAGS:
        return name, {}
    return "/".join([group, *rest]), {_TAGS[group]: one}
