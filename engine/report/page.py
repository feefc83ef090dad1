"""A run folder as one page of HTML, which needs nothing but itself: no script, no other file.

Class names, keys, shard names and messages come from others, and are escaped.
"""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from engine import durable
from engine.data.datasets import DatasetName
from engine.published import Row, published
from engine.report import again, words
from engine.report.charts import curves, entropies, stages, waiting
from engine.report.facts import Facts, read_facts
from engine.report.findings import agreement, disagreements, drift, extremes, late
from engine.report.records import number
from engine.report.spans import WAITS, Span, mean_shares
from engine.report.thumbnails import Pictures, Place, thumbnails

__all__ = ["clock", "environment", "page", "write"]

_DISAGREEMENTS, _OF_A_REASON, _SKIPPED = 24, 12, 36  # pictures at most
_EXTREMES = 8  # classes: the worst, and the best
_CLASSES, _MEMBERS = 2000, 64  # lines of a table at most
_MODELS = {
    "student_before": "student, zero-shot",
    "student_after": "student, distilled",
    "teacher": "teacher",
}


def write(
    folder: Path,
    pictures: Pictures = "local",
    dataset: DatasetName | None = None,
    out: Path | None = None,
    hosts: Sequence[str] = (),
) -> Path:
    """Writes the page of a run, to `report.html` in its folder if not elsewhere; gives its path.
    `pictures`: of samples, from the corpus, by way of `hosts` on private addresses, too. `dataset`:
    the paper's rows beside are its.

    Raises UserError for what is no run folder, and OSError where the page cannot be written.
    """
    facts, file = read_facts(folder), out or folder / "report.html"
    durable.replace(file, page(facts, pictures, dataset, hosts).encode(errors="replace"))
    return file


def page(
    facts: Facts,
    pictures: Pictures = "local",
    dataset: DatasetName | None = None,
    hosts: Sequence[str] = (),
) -> str:
    """The page; see write()."""
    latest = late(facts.probes)
    differing = disagreements(latest, _DISAGREEMENTS)
    skipped = _skipped(facts)
    places: list[Place] = [(one.shard, one.position) for one in differing]
    places += [(one.shard, one.position) for group in skipped.values() for one in group]
    shown = thumbnails(facts.config.get("corpus"), places, pictures, hosts)
    classes, shards = agreement(latest), drift(facts.probes)
    worst, best = extremes(classes, _EXTREMES)
    started = number(facts.lives[0], "started") if facts.lives else None
    return (
        environment()
        .get_template("page.html")
        .render(
            facts=facts,
            verdict=words.verdict(facts),
            bottleneck=words.bottleneck(facts),
            made=clock(time.time()),
            started=clock(started) if started else "",
            tiles=_tiles(facts),
            waiting=waiting(facts.students),
            stages=stages(facts.teachers),
            members=_members(facts)[:_MEMBERS],
            curves=curves({facts.name: facts}),
            models={
                told: words.scores_of(facts.summary, model)
                for model, told in _MODELS.items()
                if any(words.scores_of(facts.summary, model).values())
            },
            published=_published(dataset),
            dataset=dataset,
            ledger=_ledger(facts),
            skipped=skipped,
            pictures=shown.found,
            no_pictures=shown.why if places else "",
            disagreements=differing,
            probed=len(latest),
            classes=classes[:_CLASSES],
            more_classes=max(0, len(classes) - _CLASSES),
            worst=worst,
            best=best,
            entropy=entropies(shards),
            far=_far(shards),
            shards_judged=len(shards.shards),
            spread=shards.spread,
            lives=[_life(life) for life in facts.lives],
            command=again.command(facts.config),
            toml=again.toml(facts.config),
        )
    )


def environment() -> Environment:
    """Of this folder's templates, in which everything is escaped."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "count": words.count,
        "part": words.part,
        "percent": words.percent,
        "score": words.score,
        "duration": words.duration,
    }
    style = Path(__file__).with_name("style.css").read_text()
    made.globals["style"] = Markup(style)
    return made


def _tiles(facts: Facts) -> list[tuple[str, str, str]]:
    """Headline numbers: value, what it is, and a word more."""
    after, before = (words.scores_of(facts.summary, f"student_{w}") for w in ("after", "before"))
    found = [(words.count(facts.images_per_second), "images/s", "while training")]
    if after["hm"] is not None:
        gained = "" if before["hm"] is None else f"{after['hm'] - before['hm']:+.2f} on zero-shot"
        found.append((f"{words.score(after['hm'])} %", "HM of base and novel", gained))
    elif after["all"] is not None:
        found.append((f"{words.score(after['all'])} %", "accuracy, all classes", ""))
    if after["agreement"] is not None:
        found.append((f"{words.score(after['agreement'])} %", "agreement", "on held-out images"))
    else:
        found.append((words.percent(facts.last("agreement")), "agreement", "latest training steps"))
    lives = f"in {len(facts.lives)} lives" if len(facts.lives) > 1 else "from start to end"
    found.append((words.duration(facts.wall_s), "wall time", lives))
    trained = number(facts.ledger, "trained") or number(facts.summary, "samples")
    found.append((words.count(trained), "images trained", f"{words.count(_steps(facts))} steps"))
    return found


def _steps(facts: Facts) -> float | None:
    told = number(facts.summary, "steps")
    return facts.last("step") if told is None else told


def _ledger(facts: Facts) -> list[tuple[str, float, float, bool]]:
    """Lines of the ledger: what, how many, which share, whether they were left out."""
    seen = number(facts.ledger, "seen")
    if not seen:
        return []
    skipped = facts.ledger.get("skipped")
    lines = [("trained", number(facts.ledger, "trained") or 0.0, False)]
    if isinstance(skipped, dict):
        lines += [(f"skipped: {name}", number(skipped, name) or 0.0, True) for name in skipped]
    lines.append(("pending", number(facts.ledger, "pending") or 0.0, False))
    return [(name, value, value / seen, bad) for name, value, bad in lines]


def _skipped(facts: Facts) -> dict[str, list[Any]]:
    """Examples by reason, some of each."""
    groups: dict[str, list[Any]] = {}
    for one in facts.skipped:
        group = groups.setdefault(one.reason, [])
        if len(group) < _OF_A_REASON and sum(map(len, groups.values())) < _SKIPPED:
            group.append(one)
    return groups


def _members(facts: Facts) -> list[dict[str, Any]]:
    """Students, then teachers: their work, waits, and GPUs."""
    found: list[dict[str, Any]] = []
    for kind, spans in (("student", facts.students), ("teacher", facts.teachers)):
        by_who: dict[str, list[Span]] = {}
        for span in spans:
            by_who.setdefault(span.who, []).append(span)
        for who, mine in by_who.items():
            told = mean_shares(mine, [*mine[0].parts_s])
            busy = 1 - sum(told[part] for part in WAITS) if kind == "student" else told["forward"]
            gpu = {
                name: sum(known) / len(known) if (known := _known(mine, name)) else None
                for name in ("gpu_utilisation", "gpu_memory_bytes", "gpu_power_w")
            }
            host = " ".join(dict(Counter(span.host for span in mine)))
            found.append({"who": f"{kind} {who}", "host": host, "busy": busy, **gpu})
    return found


def _known(spans: list[Span], name: str) -> list[float]:
    return [span.gpu[name] for span in spans if name in span.gpu]


def _published(dataset: DatasetName | None) -> dict[str, Row]:
    """The paper's rows, of the first of its tables that has them; by default its averages."""
    for protocol in ("base-to-novel", "cross-dataset", "domain-generalisation"):
        if rows := published(protocol, dataset or "average"):
            return rows
    return {}


def _far(shards: Any) -> list[tuple[int, float, int]]:
    """Shards whose entropy departs: number, mean entropy, samples."""
    return [
        (int(shards.shards[place]), float(shards.entropy[place]), int(shards.samples[place]))
        for place in shards.far.nonzero()[0]
    ]


def _life(life: dict[str, Any]) -> dict[str, Any]:
    """What the page says of a life."""
    started, versions = number(life, "started"), life.get("versions")
    return {
        "started": clock(started) if started else "-",
        "host": life.get("host") or "-",
        "workers": life.get("workers") or "-",
        "gpu": life.get("gpu") or "none",
        "git_sha": str(life.get("git_sha") or "-")[:12],
        "versions": versions if isinstance(versions, dict) else {},
    }


def clock(seconds: float) -> str:
    """A moment, as of time.time()."""
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "-"
