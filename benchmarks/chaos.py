"""What does a run survive, and how fast? `python benchmarks/chaos.py [--kinds teacher,driver]`.

A run of two student workers, on a stream of two teachers, is struck again and again at random
moments of a seeded generator: now and then while it still recovers from the blow before, so that
processes die while they load, too. At its end its ledger is to be exact, and its weights those, to
the last bit, of a run that nobody disturbed. Kinds of blows:

- teacher: kill -9 of one teacher
- student: kill -9 of one student worker
- students: kill -9 of all student workers at once
- stopped: SIGSTOP of one student worker, which `student.timeout_s` (here 5 s) finds
- roster: kill -9 of the actor that knows the teachers
- driver: kill -9 of the driver, whose run is resumed as soon as its processes are gone
- drained: SIGTERM to the driver, whose run is resumed once it has ended
- controller, head: kill -9 of Ray Train's controller, or of Ray's GCS, with which the run ends; its
  driver is killed too if it has not ended by itself in 90 s, and the run is resumed

Recovery is the longest time without a step that the run had never done before, from a blow on;
models of 4 layers on two cores: most of it are Python's imports. With `--goodput HOURS` the run is
struck every five minutes, by all kinds but the last in turn, and commits every 100 steps, and not
every 20. `goodput` is the share of the time in which it made steps of the lineage that survives: a
step counts with what it took, but no more than twice the median. `share` has them all at the
median, and so counts as lost what a busy machine makes steps vary by.
"""

import argparse
import hashlib
import itertools
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
from rows import Bench
from safetensors.torch import load_file

from engine.config import RunConfig, to_dict
from engine.data.shards import write_shards
from engine.index import index
from engine.parse import parse
from jobs.quickstart import HERE
from jobs.quickstart.domain import CLASSES, write_images

BATCH, TIMEOUT_S = 32, 5
SETTLED = 15  # new steps, after which a blow has been recovered from
AGAIN = 0.25  # of the blows fall while the run recovers
EVERY_S = 300.0  # between blows, for goodput
CALM_STEPS = 100  # between checkpoints, for goodput: five seconds, and less than a pass
ACTORS = {
    "teacher": "ray::TeacherActor",
    "student": "ray::RayTrainWorker",
    "students": "ray::RayTrainWorker",
    "stopped": "ray::RayTrainWorker",
    "roster": "ray::Roster",
    "controller": "ray::TrainController",
    "head": "gcs_server",
}
KINDS = (*ACTORS, "driver", "drained")
_QUIET_S = 300.0  # the longest without a step


def domain(place: Path, each: int) -> Path:
    """Shards of small pictures, so many of `each` class, indexed."""
    write_images(place / "images", "domain", each, seed=1, labelled=False)
    (place / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    write_shards(place / "images", place / "shards", None, 200, False)
    index(str(place / "shards"))
    return place


def config_of(place: Path, name: str, passes: int, checkpoint_steps: int = 20) -> RunConfig:
    words = {
        "name": name,
        "runs_dir": place / "runs",
        "corpus.shards": place / "shards",
        "corpus.block_samples": 32,
        "corpus.window_blocks": 2,
        "classes.names": place / "classes.txt",
        "teacher.model": f"local-dir:{HERE / 'models' / 'teacher'}",
        "teacher.precision": "fp32",
        "teacher.actors": 2,
        "teacher.cpus": 0.5,
        "student.model": f"local-dir:{HERE / 'models' / 'student'}",
        "student.workers": 2,
        "student.cpus": 0.5,
        "student.depth": 4,
        "student.timeout_s": TIMEOUT_S,
        "targets.source": "stream",
        "train.passes": passes,
        "train.views": 1,
        "train.batch": BATCH,
        "train.lr": 2e-4,
        "train.log_steps": 1,
        "train.checkpoint_steps": checkpoint_steps,
        "train.max_failures": -1,
        "train.rollbacks": 0,
        "train.judge_images": 10**9,  # of random models nothing is to be learned
    }
    args = [str(word) for field, value in words.items() for word in (f"--{field}", value)]
    return parse(RunConfig, args, prog="chaos")


class Step(NamedTuple):
    at: float  # of time.time()
    number: int


class Run:
    """A run, its driver of now, and what it has recorded."""

    def __init__(self, config: RunConfig, place: Path) -> None:
        self.folder, self._place = config.folder, place
        self._file = place / f"{config.name}.json"
        self._file.write_text(json.dumps(to_dict(config)))
        self.start()

    def start(self) -> None:
        words = ["--resume"] if self.folder.exists() else []
        command = [sys.executable, "-m", "jobs.cli", "distill", str(self._file), *words]
        log = open(self._place / f"{self.folder.name}.log", "ab")
        self.driver = psutil.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def steps(self) -> list[Step]:
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        told = [json.loads(line) for line in lines if line.endswith("\n")]  # not one half written
        return [Step(one["time"], one["step"]) for one in told if one["kind"] == "train"]

    def furthest(self) -> int:
        return max((step.number for step in self.steps()), default=0)

    def processes(self, kind: str) -> list[psutil.Process]:
        """Those that a blow of this kind may fall upon."""
        return [one for one in self._all() if ACTORS[kind] in _command(one)]

    def gone_after(self, blow: Callable[[], None]) -> int:
        """Waits, after a blow, until its driver and all that it had started are gone; the driver is
        killed if it stays for more than 90 s. Gives its exit code."""
        everyone = self._all()
        blow()
        try:
            code = self.driver.wait(90)
        except psutil.TimeoutExpired:
            self.driver.kill()
            code = self.driver.wait()
        agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # Ray's own, which hold nothing
        left = [one for one in everyone if not _command(one).startswith(agents)]
        _, left = psutil.wait_procs(left, 60)
        if left:
            raise SystemExit(f"processes outlive their driver: {left}")
        return code

    def ended(self) -> bool:
        code = self.driver.poll()
        if code not in (None, 0):
            raise SystemExit(f"the driver ended with {code}; see {self._place}")
        return code == 0

    def weights(self) -> str:
        """A digest of what was learned."""
        tensors = load_file(self.folder / "bundle.safetensors")
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].numpy().tobytes())
        return digest.hexdigest()

    def ledger(self) -> dict:
        return json.loads((self.folder / "ledger.json").read_text())

    def _all(self) -> list[psutil.Process]:
        return self.driver.children(recursive=True) if self.driver.is_running() else []


def strike(run: Run, kind: str, draw: random.Random) -> bool:
    """A blow; False where there is nobody to receive it just now."""
    match kind:
        case "driver":
            run.gone_after(run.driver.kill)
            run.start()
        case "drained":
            ends = (0, 143, -signal.SIGTERM)  # the last, while Python still starts
            if (code := run.gone_after(run.driver.terminate)) not in ends:
                raise SystemExit(f"drained with {code}")
            run.start()
        case "head" | "controller":
            if not (found := run.processes(kind)):
                return False
            run.gone_after(found[0].kill)
            run.start()
        case _:
            if not (found := run.processes(kind)):
                return False
            for one in found if kind == "students" else [draw.choice(found)]:
                try:
                    one.suspend() if kind == "stopped" else one.kill()
                except psutil.NoSuchProcess:
                    return False
    return True


def await_step(run: Run, step: int) -> None:
    """Until a step is done, or the run has ended."""
    quiet, furthest = time.monotonic(), run.furthest()
    while furthest < step and not run.ended():
        time.sleep(0.05)
        if (now := run.furthest()) > furthest:
            quiet, furthest = time.monotonic(), now
        if time.monotonic() - quiet > _QUIET_S:
            raise SystemExit(f"no step after {furthest} in {_QUIET_S:.0f} s; see {run.folder}")


def stood_still_s(steps: list[Step], blow: float) -> float:
    """The longest time without a step that had never been done before, from a blow on."""
    furthest, then, longest_s = 0, blow, 0.0
    for at, number in steps:
        if number > furthest and at > blow:
            then, longest_s = at, max(longest_s, at - then)
        furthest = max(furthest, number)
    return longest_s


def struck(run: Run, kind: str, blows: int, draw: random.Random) -> tuple[list[float], int]:
    """Seconds of recovery from each blow, and how many fell before the run had ended; one that fell
    while another's was being recovered from counts with it."""
    await_step(run, 1)
    recovered, landed = [], 0
    while landed < blows:
        time.sleep(draw.uniform(0.2, 3))
        if run.ended():
            break
        fell = time.time()
        if not strike(run, kind, draw):
            continue
        landed += 1
        while landed < blows and draw.random() < AGAIN:
            time.sleep(draw.uniform(0, 5))
            landed += strike(run, kind, draw)
        before = run.furthest()
        await_step(run, before + SETTLED)
        recovered.append(stood_still_s(run.steps(), fell))
        print(f"{kind}: {landed} of {blows}, step {before}", file=sys.stderr)
    return recovered, landed


def finish(run: Run, name: str) -> None:
    await_step(run, sys.maxsize)
    told = run.ledger()
    exact = told["seen"] == told["trained"] + sum(told["skipped"].values()) and not told["pending"]
    if not exact:
        raise SystemExit(f"{name}: the ledger is not exact: {told}")


def survive(
    bench: Bench, place: Path, kinds: list[str], blows: int, passes: int, seed: int
) -> bool:
    calm = Run(config_of(place, "calm", passes), place)
    finish(calm, "calm")
    config = {"passes": passes, "steps": calm.furthest(), "seed": seed}
    same = True
    for kind in kinds:
        run = Run(config_of(place, kind, passes), place)
        recovered, landed = struck(run, kind, blows, random.Random(f"{seed} {kind}"))
        finish(run, kind)
        equal = run.weights() == calm.weights() and run.ledger() == calm.ledger()
        same &= equal
        told = config | {"blows": landed}
        longest = {"longest": round(max(recovered), 1)}
        bench.add(kind, "ours", "recovery", "s", recovered, told | longest)
        bench.add(kind, "ours", "same_weights_and_ledger", "1", [float(equal)], told)
    return same


class Surviving(NamedTuple):
    """Seconds of the steps that no restart has made anew."""

    goodput: float  # as long as each took, up to twice the median
    share: float  # each at the median


def surviving_s(steps: list[Step]) -> Surviving:
    last = {step.number: step.at for step in steps}
    pairs = list(itertools.pairwise(steps))
    pace_s = statistics.median(b.at - a.at for a, b in pairs if b.number == a.number + 1)
    took_s = (b.at - a.at for a, b in pairs if last[b.number] == b.at)
    return Surviving(sum(min(one_s, 2 * pace_s) for one_s in took_s), pace_s * len(last))


def goodput(bench: Bench, place: Path, hours: float, seed: int) -> None:
    draw, kinds = random.Random(seed), [kind for kind in KINDS if kind != "head"]
    run = Run(config_of(place, "goodput", 10**4, CALM_STEPS), place)
    await_step(run, 1)
    begun = run.steps()[0].at
    blows = 0
    while (left_s := begun + 3600 * hours - time.time()) > EVERY_S / 2:
        time.sleep(min(draw.uniform(0.5, 1.5) * EVERY_S, left_s))
        if not blows % len(kinds):
            draw.shuffle(kinds)
        before = run.furthest()
        blows += strike(run, kinds[blows % len(kinds)], draw)
        print(f"{kinds[(blows - 1) % len(kinds)]}, step {before}", file=sys.stderr)
        await_step(run, before + SETTLED)
    time.sleep(max(begun + 3600 * hours - time.time(), 0))
    steps = run.steps()
    run.gone_after(run.driver.terminate)
    config = {"hours": hours, "seed": seed, "blows": blows, "steps": run.furthest()}
    config["checkpoint_steps"] = CALM_STEPS
    for metric, made_s in surviving_s(steps)._asdict().items():
        value = made_s / (steps[-1].at - steps[0].at)
        bench.add("goodput", "ours", metric, "1", [value], config)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--blows", type=int, default=20, help="of each kind")
    parser.add_argument("--passes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--goodput", type=float, default=0, help="hours; instead of the kinds")
    asked = parser.parse_args()
    place = domain(Path(tempfile.mkdtemp(prefix="chaos-")), 70 if asked.goodput else 8)
    print(f"everything is in {place}", file=sys.stderr)
    bench = Bench("chaos")
    if asked.goodput:
        goodput(bench, place, asked.goodput, asked.seed)
    elif not survive(bench, place, asked.kinds.split(","), asked.blows, asked.passes, asked.seed):
        raise SystemExit("a run that was struck differs from one that was not")


if __name__ == "__main__":
    main()
