"""TensorBoard's event files. tensorboardX's own SummaryWriter would hang on a full disk."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from engine.track.metrics import Point

__all__ = ["TensorBoard"]


class TensorBoard:
    """One event file a life of a run, in `folder`, which TensorBoard reads together."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Two lives may begin in one second.
        self._writer = EventsWriter(f"{folder / 'events'}", f".{time.time_ns()}.{os.getpid()}")
        rows = "".join(f"| {name} | {value} |\n" for name, value in config.items())
        self._text("config", f"| setting | value |\n|---|---|\n{rows}", 0, time.time())
        self.tick()

    def log(self, point: Point) -> None:
        about = {"step": point.step, "wall_time": point.time_s}
        if point.again:  # TensorBoard forgets what was told of this step and of later ones
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(session_log=start, **about))
        if point.values:
            values = [summary.Summary.Value(tag=n, simple_value=v) for n, v in point.values.items()]
            self._writer.write_event(Event(summary=summary.Summary(value=values), **about))
        if point.text:
            self._text("notice", point.text, point.step, point.time_s)

    def tick(self) -> None:
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()

    def give_up(self) -> None:
        pass

    def _text(self, tag: str, text: str, step: int, time_s: float) -> None:
        told = summary.text(tag, text)
        self._writer.write_event(Event(summary=told, step=step, wall_time=time_s))
