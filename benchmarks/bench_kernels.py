"""How fast and how small are the kernels? `python benchmarks/bench_kernels.py [--quick]`.

Some seven minutes on a GPU, five on two cores; less than two with `--short`, for fewer shapes;
`--only CASE` for one of these cases:

- kl: KL(teacher || student) and its gradient with respect to the student's raw features, from both
  sides' features and class vectors. bf16 on GPUs, fp32 on CPUs, or `--dtype`; a run has fp32.
- cosine: the same of the cosine of logits, not centred. The Gram matrix's root is made before.
- variants: on CPUs, in what other ways the loss could have been computed.

Rounds go through all providers in turns of order; a ratio is of what was measured in the same
round, and the median over rounds counts. A provider that runs out of memory, or fails, is told of.

- time: of loss and gradient, called one by one. On a GPU between CUDA events, with a cold L2: at
  small sizes the GPU waits for Python, as within a CUDA graph it would not.
- kernel_time, launches: of the GPU's kernels alone, of loss and gradient alike.
- peak: memory above that of the inputs, by torch's allocator. On CPUs peak_rss is what the process
  grows by: MKL's own memory, for the larger products of others, is in that alone.
- roofline: the least time that a provider's matrix products or bytes can take here (formulas are in
  `config`), as a share of the time it took.
- grad_error: ||g - g*|| / ||g*||, for 64 images, against float64.

`--quick` is a smoke test: its rows tell nothing.
"""

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from kernel_peers import Problem, Provider, liger, providers, why_no_liger
from meters import Ceilings, Launched, Meter, in_turn
from rows import Bench
from torch import Tensor
from torch.nn import functional as F

from kernels import reference

WIDTH, SCALE, CHECKED = 768, 100.0, 64
SMALL, LARGE, LARGEST = 1000, 21_841, 131_072
SHAPES = {  # images, classes
    "cuda": {
        "kl": [(b, n) for n in (LARGE, LARGEST, SMALL) for b in (256, 1024, 4096, 16384)]
        + [(256, 100), (16384, 100)],
        "cosine": [(b, n) for n in (LARGE, LARGEST, SMALL) for b in (1024, 16384)],
        "variants": [],
    },
    "cpu": {
        "kl": [(b, n) for n in (100, SMALL, LARGE) for b in (256, 1024)],
        "cosine": [(b, n) for n in (SMALL, LARGE) for b in (256,)],
        "variants": [(256, SMALL), (256, LARGE)],
    },
}
SHORT = {
    "cuda": {
        "kl": [(1024, SMALL), (1024, LARGE), (16384, LARGE), (4096, LARGEST)],
        "cosine": [(1024, LARGE)],
    },
    "cpu": {"kl": [(256, SMALL), (256, LARGE)], "cosine": [(256, SMALL)]},
}
QUICK = [(128, 100), (128, SMALL)]
ROUNDS = 7


class Goal(NamedTuple):
    device: str
    loss: str
    classes: tuple[int, ...]
    peers: str  # the best of all whose name begins so
    what: str  # time or peak
    least: float


GOALS = (
    Goal("cuda", "kl", (LARGE, LARGEST), "liger", "time", 3),
    Goal("cuda", "kl", (LARGE, LARGEST), "compile", "time", 1.5),
    Goal("cuda", "kl", (LARGE, LARGEST), "liger", "peak", 20),
    Goal("cuda", "kl", (LARGE, LARGEST), "compile", "peak", 20),
    Goal("cuda", "kl", (SMALL,), "compile", "time", 1),
    Goal("cuda", "kl", (SMALL,), "compile", "kernel_time", 1),
    Goal("cuda", "cosine", (LARGE,), "eager", "time", 10),
    Goal("cuda", "cosine", (LARGEST,), "eager", "time", 50),
    Goal("cpu", "kl", (LARGE,), "eager", "time", 1.5),
    Goal("cpu", "kl", (LARGE,), "eager", "peak", 10),
    Goal("cpu", "kl", (SMALL,), "eager", "time", 1),
)
MOST_LAUNCHES = 4  # of KL, with SMALL classes


class Rig(NamedTuple):
    bench: Bench
    meter: Meter
    ceilings: Ceilings
    dtype: torch.dtype
    rounds: int


class Case(NamedTuple):
    loss: str
    images: int
    classes: int

    def __str__(self) -> str:
        return f"{self.loss}, B={self.images}, N={self.classes}"


class Found(NamedTuple):
    time: list[float]  # seconds, of every round
    peak: int
    rss: list[int]  # none on a GPU
    launched: list[Launched]  # none on a CPU

    def kernel_s(self) -> float:
        return statistics.median(one.seconds for one in self.launched)

    def over(self, other: "Found", what: str) -> list[float]:
        """Ratios to another's, of every round where there are any."""
        if what == "time":
            return [a / b for a, b in zip(self.time, other.time, strict=True)]
        if what == "peak":
            return [self.peak / max(1, other.peak)]
        assert what == "kernel_time"
        return [self.kernel_s() / other.kernel_s()]


def draw(case: Case, device: torch.device, dtype: torch.dtype) -> Problem:
    """Class vectors of some 0.4 mutual cosine; features near one of them, and near each other."""
    torch.manual_seed(case.classes)
    w = torch.randn(case.classes, WIDTH, device=device) + 0.8 * torch.randn(WIDTH, device=device)
    w = F.normalize(w, dim=-1)
    near = w[torch.randint(case.classes, (case.images,), device=device)]
    x = 3 * torch.randn_like(near) + 20 * near
    u = F.normalize(x + torch.randn_like(x), dim=-1)
    return Problem(x.to(dtype).requires_grad_(), u.to(dtype), w.to(dtype), SCALE)


def truth(loss: str, problem: Problem) -> Tensor:
    """The gradient of the first images, in float64, by the definitions."""
    x = problem.x_BD.detach()[:CHECKED].double().requires_grad_()
    u, w = problem.u_BD[:CHECKED].double(), problem.w_ND.double()
    u_s = F.normalize(x, dim=-1)
    z_t, z_s = (reference.logits(unit, w, problem.scale) for unit in (u, u_s))
    if loss == "cosine":
        loss_B = reference.cosine_distance(z_t, z_s, centred=False)
    else:
        loss_B = reference.kl_divergence(z_t, z_s)
    return torch.autograd.grad(loss_B.sum(), x)[0]


def step(forward: Callable[[], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Loss and gradient."""

    def call() -> Tensor:
        forward().backward()
        gradient, x.grad = x.grad, None
        assert gradient is not None
        return gradient

    return call


class Ready(NamedTuple):
    call: Callable[[], Tensor]
    calls: int  # in one measurement
    error: float


def prepared(meter: Meter, provider: Provider, problem: Problem, expected: Tensor) -> Ready | str:
    """Its step, warm; or why it cannot take part."""
    try:
        call = step(provider.make(problem), problem.x_BD)
        calls = meter.warm(call)
        gradient = call()[:CHECKED].double() * (len(problem.x_BD) if provider.mean else 1)
    except torch.OutOfMemoryError:
        why = "out of memory"
    except Exception as error:  # the others are to be measured all the same
        why = f"{type(error).__name__}: {str(error)[:500]}"
    else:
        return Ready(call, calls, ((gradient - expected).norm() / expected.norm()).item())
    problem.x_BD.grad = None
    if meter.cuda:
        torch.cuda.synchronize()  # raises where the device is lost
        torch.cuda.empty_cache()
    return why


def compare(rig: Rig, case: Case) -> dict[str, Found]:
    """What is found of every provider that can take part."""
    began, meter = time.perf_counter(), rig.meter
    torch.compiler.reset()  # or it stops compiling, after so many shapes
    problem = draw(case, meter.device, rig.dtype)
    expected = truth(case.loss, problem)
    ready: dict[str, Ready] = {}
    known = providers(case.loss, meter.cuda)
    for name, provider in known.items():
        told = prepared(meter, provider, problem, expected)
        if isinstance(told, Ready):
            ready[name] = told
        else:
            print(f"{case}: {name} takes no part: {told}")
    times = defaultdict(list)
    for turn in range(rig.rounds):
        for name in in_turn(ready, turn):
            times[name].append(meter.seconds(ready[name].call, ready[name].calls))
    found = {}
    for name, one in ready.items():
        launched = [meter.launched(one.call) for _ in range(3 if meter.cuda else 0)]
        rss = [meter.peak_rss_bytes(one.call) for _ in range(0 if meter.cuda else 3)]
        found[name] = Found(times[name], meter.peak_bytes(one.call), rss, launched)
        add(rig, case, name, known[name], one, found)
    print(f"\n{case}: {time.perf_counter() - began:.0f} s", *table(found), "", sep="\n", flush=True)
    return found


def add(
    rig: Rig, case: Case, name: str, provider: Provider, ready: Ready, found: dict[str, Found]
) -> None:
    """Its rows."""
    one = found[name]
    config: dict[str, object] = {
        "B": case.images,
        "N": case.classes,
        "D": WIDTH,
        "dtype": str(rig.dtype).removeprefix("torch."),
        "flops": provider.flops,
        "least_bytes": provider.least_bytes,
        "calls": ready.calls,
        "memory": rig.meter.memory,
    }
    config |= rig.meter.state()
    if name.startswith("liger"):
        config["liger"] = liger()

    def row(metric: str, unit: str, values: Iterable[float]) -> None:
        rig.bench.add(str(case), name, metric, unit, list(values), config)

    row("time", "ms", (1000 * s for s in one.time))
    row("peak", "MB", [one.peak / 1e6])
    if one.rss:
        row("peak_rss", "MB", (value / 1e6 for value in one.rss))
    row("grad_error", "1", [ready.error])
    if one.launched:
        row("launches", "1", (told.kernels for told in one.launched))
        row("kernel_time", "ms", (1000 * told.seconds for told in one.launched))
    sizes = {"B": case.images, "N": case.classes, "D": WIDTH, "s": rig.dtype.itemsize}
    sizes["J"] = min(case.classes, WIDTH)
    flops, moved = (eval(told, sizes.copy()) for told in (provider.flops, provider.least_bytes))
    least_s = max(flops / rig.ceilings.flops_per_s, moved / rig.ceilings.bytes_per_s)
    row("roofline", "1", (least_s / s for s in one.time))
    if name != "ours" and "ours" in found:
        row("time_over_ours", "1", one.over(found["ours"], "time"))


# ---------------------------------------------------------------- what comes of it


def table(found: dict[str, Found]) -> Iterable[str]:
    """All providers of one case."""
    yield f"  {'':<18}{'ms':>9}{'x ours':>8}{'MB':>10}{'x ours':>8}{'kernels':>9}{'in ms':>10}"
    ours = found.get("ours")
    for name, one in found.items():
        line = f"  {name:<18}{1000 * statistics.median(one.time):>9.3f}"
        line += f"{_best([one], ours, 'time'):>8}{one.peak / 1e6:>10.1f}"
        line += f"{_best([one], ours, 'peak'):>8}"
        if one.launched:
            line += f"{one.launched[0].kernels:>9}{1000 * one.kernel_s():>10.3f}"
        yield line


def summary(found: dict[Case, dict[str, Found]]) -> Iterable[str]:
    """Of every case, ours, and the best peer of a kind over ours: in time, and in memory."""
    peers = ("eager", "compile", "liger")
    yield (
        f"{'':<26}{'ours ms':>9}"
        + "".join(f"{name:>9}" for name in peers)
        + (f"{'ours MB':>10}" + "".join(f"{name:>9}" for name in peers) + f"{'kernels':>9}")
    )
    for case, by in found.items():
        if "ours" in by:
            ours = by["ours"]
            of = [[one for name, one in by.items() if name.startswith(peer)] for peer in peers]
            line = f"{case!s:<26}{1000 * statistics.median(ours.time):>9.3f}"
            line += "".join(f"{_best(ones, ours, 'time'):>9}" for ones in of)
            line += f"{ours.peak / 1e6:>10.1f}"
            line += "".join(f"{_best(ones, ours, 'peak'):>9}" for ones in of)
            yield line + (f"{ours.launched[0].kernels:>9}" if ours.launched else "")


def _best(peers: list[Found], ours: Found | None, what: str) -> str:
    if not peers or not ours:
        return ""
    return f"{min(statistics.median(one.over(ours, what)) for one in peers):.2f}"


def goals(found: dict[Case, dict[str, Found]], device: str) -> Iterable[str]:
    """Whether each is reached, at the worst and at the best shape."""
    for goal in (goal for goal in GOALS if goal.device == device):
        told = {}
        for case, by in found.items():
            peers = [one for name, one in by.items() if name.startswith(goal.peers)]
            if case.loss == goal.loss and case.classes in goal.classes and peers and "ours" in by:
                ours = by["ours"]
                told[case] = min(statistics.median(p.over(ours, goal.what)) for p in peers)
        name = f"{goal.loss}, N={'/'.join(map(str, goal.classes))}, {goal.what} of {goal.peers}"
        yield _verdict(name, goal.least, told) if told else f"{name}: not measured"
    if device == "cuda":
        launches = {
            case: MOST_LAUNCHES / by["ours"].launched[0].kernels
            for case, by in found.items()
            if (case.loss, case.classes) == ("kl", SMALL) and "ours" in by
        }
        name = f"kl, N={SMALL}, {MOST_LAUNCHES} launches over ours"
        yield _verdict(name, 1, launches) if launches else f"{name}: not measured"


def _verdict(name: str, least: float, told: dict[Case, float]) -> str:
    worst, best = min(told, key=told.get), max(told, key=told.get)
    said = "reached" if told[worst] >= least else "MISSED"
    return (
        f"{name:<44}{said:>8}: {told[worst]:.2f}x (B={worst.images}, N={worst.classes}) to "
        f"{told[best]:.2f}x (B={best.images}, N={best.classes}); {least}x is wanted"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", choices=SHAPES["cpu"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    asked = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    meter = Meter()
    kind = meter.device.type
    dtype = getattr(torch, asked.dtype or ("bfloat16" if meter.cuda else "float32"))
    rounds = 1 if asked.quick else ROUNDS
    rig = Rig(Bench("kernels"), meter, meter.ceilings(dtype), dtype, rounds)
    for metric, value in rig.ceilings._asdict().items():
        config = {"dtype": str(dtype).removeprefix("torch."), **meter.state()}
        rig.bench.add("machine", "torch", metric, "1/s", [value], config)
    if why_no_liger():
        print(f"Liger takes no part: {why_no_liger()}")
    found = {}
    for loss, shapes in (SHORT if asked.short else SHAPES)[kind].items():
        if asked.only in (None, loss):
            for images, classes in QUICK if asked.quick and shapes else shapes:
                case = Case(loss, images, classes)
                found[case] = compare(rig, case)
    print(*summary(found), "", *goals(found, kind), sep="\n", flush=True)
    if any("ours" not in by for by in found.values()):
        sys.exit("Ours failed: see above")


if __name__ == "__main__":
    main()
