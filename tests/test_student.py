"""The DeepSpeed student against plain torch: same loss, optimizer and weights, at every stage."""

import copy
import dataclasses
import functools
from typing import NamedTuple

import pytest
import torch
from distributed import run_distributed
from tiny import clip_folder
from torch import nn

from engine.clip.prompts import PromptedTower
from engine.clip.towers import Clip, load_clip
from engine.clip.trained import TrainedTower
from engine.config import TrainConfig
from engine.labels.targets import Targets
from engine.train.schedule import learning_rate
from engine.train.student import StudentTrainer

STEPS, BATCH, CLASSES, WIDTH, SCALE = 4, 8, 6, 10, 40.0
STAGES = (0, 1, 2, 3)
OPTIMIZERS = ("sgd", "adamw")


class Case(NamedTuple):
    stage: int
    optimizer: str
    layers: int | None = 0  # of the tower that are trained; None: all of it
    offload: bool = False


CASES = [Case(stage, optimizer) for stage in STAGES for optimizer in OPTIMIZERS]
CASES += [Case(stage, "sgd", layers) for stage in STAGES for layers in (None, 1)]
CASES += [Case(stage, "adamw", 1, offload=True) for stage in STAGES[1:]]
AS_EVER = [Case(1, "sgd", None), Case(3, "sgd", None), Case(2, "adamw", 1, offload=True)]
RESUMED = [Case(stage, "adamw") for stage in STAGES] + [Case(1, "sgd"), Case(3, "sgd"), *AS_EVER]
# Adam divides a gradient by its size. Before a batch norm a bias has none but rounding, so it goes
# anywhere; no output depends on it, only the running mean that takes it out again. Nor has the part
# of attention's bias that is of the keys, since a softmax sees no shift.
RANDOM_UNDER_ADAM = (
    "projector.first.bias",
    "projector.norm.running_mean",
    "tower.ln_post.bias",
    "attn.in_proj_bias",
)


def settings(optimizer: str) -> TrainConfig:
    return TrainConfig(
        batch=BATCH,
        optimizer=optimizer,
        lr=0.05 if optimizer == "sgd" else 0.005,
        weight_decay=0.01,
        warmup_steps=2,
        lr_batch=0,
        temperature=2.0,
        kd_weight=3.0,
        reduction="paper",
    )


def data(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, teacher logits and validity of a step. The second half, which is rank 1's, lacks
    some, and all in step 2; a row that is not valid holds what a broken label might."""
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randint(0, 256, (BATCH, 3, 16, 16), dtype=torch.uint8, generator=generator)
    teacher = 5 * torch.randn(BATCH, CLASSES, generator=generator)
    valid = torch.ones(BATCH, dtype=torch.bool)
    valid[BATCH // 2 + 1 : BATCH // 2 + 1 + step] = False
    if step == 2:
        valid[BATCH // 2 :] = False
    teacher[~valid] = 1e4 * torch.randn(CLASSES, generator=generator)
    return images, teacher, valid


def class_vectors() -> torch.Tensor:
    w = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(7))
    return nn.functional.normalize(w, dim=-1)


@functools.cache
def clip(model: str) -> Clip:
    return load_clip(model, "", "student.")


def new_trainer(student: PromptedTower, case: Case) -> StudentTrainer:
    """Its teacher's logits come as they are, so the teacher's scale is of no account."""
    stage, optimizer, _, offload = case
    config = settings(optimizer)
    return StudentTrainer(
        student, class_vectors(), SCALE, 1.0, config, stage, STEPS, offload=offload
    )


def new_student(model: str, layers: int | None = 0) -> PromptedTower:
    tower = clip(model).image if layers == 0 else TrainedTower(clip(model), layers)
    student = PromptedTower(tower, prompts=2, depth=2, hidden=12, outputs=WIDTH, seed=1)
    student.prompts.data *= 20
    return student


def take_steps(trainer: StudentTrainer, steps: range, rank: int, world: int) -> list[torch.Tensor]:
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    parts = ([column[part] for column in data(step)] for step in steps)
    return [take_step(trainer, step, *columns) for step, columns in zip(steps, parts, strict=True)]


def take_step(
    trainer: StudentTrainer,
    step: int,
    images: torch.Tensor,
    teacher: torch.Tensor,
    valid: torch.Tensor,
) -> torch.Tensor:
    return trainer.step(step, images, Targets("logits", teacher, valid.numpy()))


def train(rank: int, world: int, model: str, starts: dict | None) -> dict:
    """Of every stage and optimizer: what the trainer tells of its steps, and its states.

    Without `starts`, all steps from the beginning, and the state in the middle; else from the
    middle, whose state is in `starts`.
    """
    told = {}
    for key in starts or map(tuple, CASES):  # plain tuples come through torch.load
        case = Case(*key)
        student = new_student(model, case.layers)
        if starts:
            student.load_state_dict(starts[key][0])
        trainer = new_trainer(student, case)
        if starts:
            given = copy.deepcopy(starts[key])
            trainer.load_optimizer(given[1])
            assert_equal(trainer.state(), starts[key])
            take_steps(trainer, range(2, STEPS), rank, world)
            assert_equal(given, starts[key])  # what was given is not worked upon
            told[key] = {"end": trainer.state()}
        else:
            tallies = take_steps(trainer, range(2), rank, world)
            middle = trainer.state()
            tallies += take_steps(trainer, range(2, STEPS), rank, world)
            told[key] = {"middle": middle, "end": trainer.state(), "tallies": tallies}
        trainer.engine.destroy()
    return told


def broken_labels(model: str) -> list[dict]:
    """Weights after a step whose invalid row has a good label, or one that is not finite."""
    told = []
    for broken in (0.0, float("nan"), float("inf"), -float("inf")):
        student = new_student(model)
        trainer = new_trainer(student, Case(1, "sgd"))
        images, teacher, valid = data(1)
        teacher[~valid] = broken
        take_step(trainer, 0, images, teacher, valid)
        told.append(trainer.state()[0])
        trainer.engine.destroy()
    return told


def nan_labels(model: str) -> list[tuple[torch.Tensor, dict, dict]]:
    """Of every stage: what a step with a nan in a valid label tells, and weights around it."""
    told = []
    for stage in STAGES:
        trainer = new_trainer(new_student(model), Case(stage, "sgd"))
        images, teacher, valid = data(1)
        teacher[valid] = torch.nan
        before = trainer.state()[0]
        tally = take_step(trainer, 0, images, teacher, valid)
        told.append((tally, before, trainer.state()[0]))
        trainer.engine.destroy()
    return told


def nan_on_one_rank(rank: int, world: int, model: str) -> list[tuple[torch.Tensor, dict]]:
    """Of every stage: what a step tells, and the weights after it, where rank 0's labels are
    nan."""
    told = []
    for stage in STAGES:
        trainer = new_trainer(new_student(model), Case(stage, "sgd"))
        part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        images, teacher, valid = (column[part] for column in data(0))
        if rank == 0:
            teacher = torch.full_like(teacher, torch.nan)
        told.append((take_step(trainer, 1, images, teacher, valid), trainer.state()[0]))
        trainer.engine.destroy()
    return told


def nan_below(model: str) -> list[tuple[torch.Tensor, dict, dict]]:
    """Of every stage: what a step tells whose gradient overflows in the tower, and weights around
    it."""
    told = []
    for stage in STAGES:
        student = new_student(model)
        student.prompts.register_hook(lambda gradient: gradient * torch.inf)
        trainer = new_trainer(student, Case(stage, "sgd"))
        before = trainer.state()[0]
        told.append((take_step(trainer, 0, *data(1)), before, trainer.state()[0]))
        trainer.engine.destroy()
    return told


def test_a_nan_on_one_rank_leaves_the_others_their_update(pair, model):
    """Batch norm's statistics are of all images; the gradient is of rank 1's alone."""
    ranks = [told[1] for told in pair]
    start = new_student(model)
    for stage in range(len(STAGES)):
        (bad, weights), (good, same) = ranks[0][stage], ranks[1][stage]
        assert good[0] == BATCH // 2 and good[4:].tolist() == [0, 0]
        assert bad.tolist() == [0, 0, 0, 0, BATCH // 2, 1]
        for name, value in start.named_parameters():
            assert torch.isfinite(weights[name]).all()
            torch.testing.assert_close(weights[name], same[name])
            if name not in ("projector.first.bias",):  # which has no gradient but rounding
                assert (weights[name] - value).abs().max() > 1e-6, name
            torch.testing.assert_close(weights[name], ranks[0][0][1][name], rtol=1e-4, atol=1e-6)


MIXED = [
    {"kd_weight": 0.0, "cosine_weight": 2.0},
    {"kd_weight": 0.0, "feature_weight": 0.5, "feature": "mse"},
    {"cosine_weight": 0.7, "feature_weight": 0.3, "feature": "l1"},
    {"cosine_weight": 0.7, "kernels": "reference"},
]


def teacher_features(step: int) -> torch.Tensor:
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step))


def mixed_losses(rank: int, world: int, model: str) -> list[tuple[list[torch.Tensor], dict]]:
    """Of every mixture: what two steps on features tell, and the weights after them."""
    told = []
    for mixture in MIXED:
        config = dataclasses.replace(settings("sgd"), **mixture)
        trainer = StudentTrainer(new_student(model), class_vectors(), SCALE, 30.0, config, 1, STEPS)
        part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        tallies = []
        for step in (1, 2):
            images, _, valid = data(step)
            features = torch.where(valid[:, None], teacher_features(step), torch.nan)
            targets = Targets("features", features[part], valid[part].numpy())
            tallies.append(trainer.step(step, images[part], targets))
        told.append((tallies, trainer.state()[0]))
        if config.feature_weight:  # which logits cannot tell
            with pytest.raises(AssertionError):
                take_step(trainer, 3, *(column[part] for column in data(3)))
        trainer.engine.destroy()
    return told


def test_losses_are_mixed_as_told(pair, model):
    """Against numpy's definitions in plain torch; the mean is over all valid images."""
    ranks = [told[2] for told in pair]
    w = class_vectors()
    for number, mixture in enumerate(MIXED):
        config = dataclasses.replace(settings("sgd"), **mixture)
        student = new_student(model)
        update = torch.optim.SGD(student.parameters(), momentum=0.9, weight_decay=0.01)
        for row, step in enumerate((1, 2)):
            images, _, valid = data(step)
            u_s, u_t = student(images[valid]), teacher_features(step)[valid]
            u_t = u_t / u_t.norm(dim=-1, keepdim=True)
            z_s, z_t = SCALE * u_s @ w.T, 30 * u_t @ w.T
            p, log_p = (torch.log_softmax(z / config.temperature, -1) for z in (z_t, z_s))
            kl = (p.exp() * (p - log_p)).sum(-1)
            correlation = torch.stack(
                [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(z_s, z_t, strict=True)]
            )
            power = 1 if config.feature == "l1" else 2
            distance = ((u_s - u_t).abs() ** power).sum(-1)
            loss_B = (
                config.kd_weight / CLASSES * config.temperature**2 * kl
                + config.cosine_weight * (1 - correlation)
                + config.feature_weight * distance
            )
            update.zero_grad()
            loss_B.mean().backward()
            update.param_groups[0]["lr"] = learning_rate(step, STEPS, config)
            update.step()
            tally = sum(rank[number][0][row] for rank in ranks)
            agreeing = int((z_s.argmax(-1) == z_t.argmax(-1)).sum())
            wanted = [int(valid.sum()), kl.sum().item(), agreeing, loss_B.sum().item(), 0, 0]
            torch.testing.assert_close(tally, torch.tensor(wanted), rtol=1e-4, atol=1e-4)
        for rank in ranks:
            assert_same_weights(rank[number][1], student.state_dict(), "sgd", mixture)


def train_in_pair(rank: int, world: int, model: str) -> tuple[dict, list, list]:
    told = train(rank, world, model, None)
    return told, nan_on_one_rank(rank, world, model), mixed_losses(rank, world, model)


def train_alone(rank: int, world: int, model: str) -> tuple[dict, dict, list[dict], list[tuple]]:
    told = train(rank, world, model, None)
    resumed = train(rank, world, model, {tuple(case): told[case]["middle"] for case in AS_EVER})
    return told, resumed, broken_labels(model), nan_labels(model), nan_below(model)


def assert_equal(got: tuple[dict, dict], wanted: tuple[dict, dict]) -> None:
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=0)


@functools.cache
def by_hand(
    model: str, optimizer: str, layers: int | None
) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    """The same in one process and plain torch, on the valid rows alone: weights, and what each step
    is to tell of all ranks."""
    start = new_student(model, layers)
    config, w = settings(optimizer), class_vectors()
    prompts = nn.Parameter(start.prompts.detach().clone())
    first, norm, second = start.projector.first, nn.BatchNorm1d(12), start.projector.second
    tower = {k: p for k, p in start.tower.named_parameters() if p.requires_grad}
    modules = (first, norm, second)
    params = [prompts, *tower.values(), *(p for m in modules for p in m.parameters())]
    if optimizer == "sgd":
        update = torch.optim.SGD(params, momentum=0.9, weight_decay=config.weight_decay)
    else:
        update = torch.optim.AdamW(params, weight_decay=config.weight_decay)
    told = []
    for step in range(STEPS):
        images, teacher, valid = data(step)
        hidden = norm(first(start.tower(images[valid], prompts)))
        u = second(hidden.clamp(min=0))
        logits = SCALE * (u / u.norm(dim=-1, keepdim=True)) @ w.T
        target = torch.softmax(teacher[valid] / config.temperature, -1)
        given = torch.log_softmax(logits / config.temperature, -1)
        kl = (target * (target.log() - given)).sum(-1)
        loss = config.kd_weight / CLASSES * config.temperature**2 * kl.mean()
        update.zero_grad()
        loss.backward()
        update.param_groups[0]["lr"] = learning_rate(step, STEPS, config)
        update.step()
        agreeing = (logits.argmax(-1) == teacher[valid].argmax(-1)).sum()
        summed = loss.item() * int(valid.sum())
        told.append([int(valid.sum()), kl.sum().item(), int(agreeing), summed, 0, 0])
    named = {"prompts": prompts} | {f"tower.{name}": p for name, p in tower.items()}
    for prefix, module in {"first": first, "norm": norm, "second": second}.items():
        named |= {f"projector.{prefix}.{k}": v for k, v in module.state_dict().items()}
    named.pop("projector.norm.num_batches_tracked")
    return {name: value.detach().clone() for name, value in named.items()}, told


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pair(model):
    """What each of two ranks tells."""
    return run_distributed(train_in_pair, 2, model)


@pytest.fixture(scope="module")
def on_two(pair):
    return [told[0] for told in pair]


@pytest.fixture(scope="module")
def alone(model):
    (told,) = run_distributed(train_alone, 1, model)
    return told


@pytest.fixture(scope="module")
def on_one(alone):
    return alone[0]


def assert_same_weights(got: dict, wanted: dict, optimizer: str, where: object = "") -> None:
    assert got.keys() == wanted.keys()
    for name in got:
        if optimizer == "adamw" and name.endswith(RANDOM_UNDER_ADAM):
            continue
        difference = (got[name] - wanted[name]).abs().max().item()
        assert difference < 1e-5, f"{name} differs by {difference} {where}"


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_plain_torch(on_two, model, case):
    wanted, told = by_hand(model, case.optimizer, case.layers)
    for rank in on_two:
        weights, _ = rank[case]["end"]
        assert_same_weights(weights, wanted, case.optimizer)
    start = new_student(model, case.layers).state_dict()
    for name in {"prompts", "tower.patch.weight", "tower.blocks.2.attn.out_proj.weight"} & {*start}:
        assert (wanted[name] - start[name]).abs().max() > 1e-3, name
    tallies = [torch.stack(rank[case]["tallies"]) for rank in on_two]
    torch.testing.assert_close(sum(tallies), torch.tensor(told), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_one_rank_is_plain_torch(on_one, model, case):
    wanted, told = by_hand(model, case.optimizer, case.layers)
    assert_same_weights(on_one[case]["end"][0], wanted, case.optimizer)
    tallies = torch.stack(on_one[case]["tallies"])
    torch.testing.assert_close(tallies, torch.tensor(told), rtol=1e-4, atol=1e-4)


def test_every_stage_and_rank_gives_the_same_state(on_two, on_one):
    names = {"sgd": {"momentum_buffer"}, "adamw": {"exp_avg", "exp_avg_sq", "step"}}
    for case, told in on_one.items():
        weights, optimizer = told["middle"]
        params = [name for name in weights if "running" not in name]
        wanted = {f"{param}/{key}" for param in params for key in names[Case(*case).optimizer]}
        assert set(optimizer) == wanted
        for rank in on_two:
            assert rank[case]["middle"][1].keys() == wanted
            for name, value in rank[case]["middle"][1].items():
                torch.testing.assert_close(value, optimizer[name], rtol=1e-3, atol=1e-5)


def test_two_and_two_steps_are_four_on_fewer_ranks(on_two, model):
    starts = {tuple(case): on_two[0][case]["middle"] for case in RESUMED}
    (resumed,) = run_distributed(train, 1, model, starts)
    for case, told in resumed.items():
        assert_same_weights(told["end"][0], on_two[0][case]["end"][0], case[1], case)


def test_two_and_two_steps_are_four_on_more_ranks(on_one, model):
    starts = {tuple(case): on_one[case]["middle"] for case in RESUMED}
    for rank in run_distributed(train, 2, model, starts):
        for case, told in rank.items():
            assert_same_weights(told["end"][0], on_one[case]["end"][0], case[1], case)


def test_two_and_two_steps_are_four_to_the_last_bit_on_as_many_ranks(alone):
    on_one, resumed, *_ = alone
    assert len(resumed) == len(AS_EVER)
    for case, told in resumed.items():
        assert_equal(told["end"], on_one[case]["end"])


@pytest.mark.slow
def test_a_state_fits_every_stage(on_one, model):
    others = {case: case._replace(stage=(case.stage + 1) % 4, offload=False) for case in CASES}
    starts = {
        tuple(case): on_one[other]["middle"] for case, other in others.items() if other in on_one
    }
    assert len(starts) == 16
    for rank in run_distributed(train, 2, model, starts):
        for case, told in rank.items():
            assert_same_weights(told["end"][0], on_one[case]["end"][0], case[1], case)


def test_a_label_that_is_not_valid_may_be_anything(alone, model):
    good, *broken = alone[2]
    assert not torch.equal(good["prompts"], new_student(model).prompts)
    for weights in broken:
        assert_same_weights(weights, good, "sgd")


def test_a_nan_is_told_of_and_kept_from_the_optimizer(alone):
    """All that the step does to the weights is to let them decay."""
    config = settings("sgd")
    kept = 1 - learning_rate(0, STEPS, config) * config.weight_decay
    assert len(alone[3]) == len(STAGES)
    for tally, before, after in alone[3]:
        assert tally.tolist() == [0, 0, 0, 0, int(data(1)[2].sum()), 1]
        for name in ("prompts", "projector.first.weight", "projector.second.bias"):
            torch.testing.assert_close(after[name], kept * before[name])


def test_what_overflows_below_the_features_is_kept_from_what_lies_below(alone):
    """Images that the projector has learned from are trained; the step is told of all the same."""
    config = settings("sgd")
    kept = 1 - learning_rate(0, STEPS, config) * config.weight_decay
    assert len(alone[4]) == len(STAGES)
    for tally, before, after in alone[4]:
        count, *sums, lost, not_finite = tally.tolist()
        assert (count, lost, not_finite) == (int(data(1)[2].sum()), 0, 1) and sums[0] > 0
        torch.testing.assert_close(after["prompts"], kept * before["prompts"])
        name = "projector.second.bias"
        assert (after[name] - kept * before[name]).abs().max() > 1e-6


def test_settings_are_those_that_matter():
    plain = TrainConfig()
    for field in ("temperature", "kd_weight", "lr_batch", "weight_decay", "warmup_steps"):
        assert getattr(settings("sgd"), field) != dataclasses.asdict(plain)[field]
