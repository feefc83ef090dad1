"""The DeepSpeed student against plain torch: same loss, optimizer and weights, at every stage."""

import copy
import dataclasses
import functools

import pytest
import torch
from distributed import run_distributed
from tiny import clip_folder
from torch import nn

from engine.clip.prompts import PromptedTower
from engine.clip.towers import ImageTower, load_clip
from engine.config import TrainConfig
from engine.train.schedule import learning_rate
from engine.train.student import StudentTrainer

STEPS, BATCH, CLASSES, WIDTH, SCALE = 4, 8, 6, 10, 40.0
STAGES = (0, 1, 2, 3)
OPTIMIZERS = ("sgd", "adamw")
CASES = [(stage, optimizer) for stage in STAGES for optimizer in OPTIMIZERS]
RESUMED = [(0, "adamw"), (1, "adamw"), (2, "adamw"), (3, "adamw"), (1, "sgd"), (3, "sgd")]
# Adam divides a gradient by its size. Before a batch norm a bias has none but rounding, so it goes
# anywhere; no output depends on it, only the running mean that takes it out again.
RANDOM_UNDER_ADAM = ("projector.first.bias", "projector.norm.running_mean")


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
def tower(model: str) -> ImageTower:
    return load_clip(model, "", "student.").image


def new_student(model: str) -> PromptedTower:
    student = PromptedTower(tower(model), prompts=2, depth=2, hidden=12, outputs=WIDTH, seed=1)
    student.prompts.data *= 20
    return student


def take_steps(trainer: StudentTrainer, steps: range, rank: int, world: int) -> list[torch.Tensor]:
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    return [trainer.step(step, *(column[part] for column in data(step))) for step in steps]


def train(rank: int, world: int, model: str, starts: dict | None) -> dict:
    """Of every stage and optimizer: what the trainer tells of its steps, and its states.

    Without `starts`, all steps from the beginning, and the state in the middle; else from the
    middle, whose state is in `starts`.
    """
    told = {}
    for case in starts or CASES:
        stage, optimizer = case
        student = new_student(model)
        if starts:
            student.load_state_dict(starts[case][0])
        trainer = StudentTrainer(student, class_vectors(), SCALE, settings(optimizer), stage, STEPS)
        if starts:
            given = copy.deepcopy(starts[case])
            trainer.load_optimizer(given[1])
            assert_equal(trainer.state(), starts[case])
            take_steps(trainer, range(2, STEPS), rank, world)
            assert_equal(given, starts[case])  # what was given is not worked upon
            told[case] = {"end": trainer.state()}
        else:
            tallies = take_steps(trainer, range(2), rank, world)
            middle = trainer.state()
            tallies += take_steps(trainer, range(2, STEPS), rank, world)
            told[case] = {"middle": middle, "end": trainer.state(), "tallies": tallies}
        trainer.engine.destroy()
    return told


def broken_labels(model: str) -> list[dict]:
    """Weights after a step whose invalid row has a good label, or one that is not finite."""
    told = []
    for broken in (0.0, float("nan"), float("inf"), -float("inf")):
        student = new_student(model)
        trainer = StudentTrainer(student, class_vectors(), SCALE, settings("sgd"), 1, STEPS)
        images, teacher, valid = data(1)
        teacher[~valid] = broken
        trainer.step(0, images, teacher, valid)
        told.append(trainer.state()[0])
        trainer.engine.destroy()
    return told


def nan_labels(model: str) -> list[tuple[torch.Tensor, dict, dict]]:
    """Of every stage: what a step with a nan in a valid label tells, and weights around it."""
    told = []
    for stage in STAGES:
        trainer = StudentTrainer(
            new_student(model), class_vectors(), SCALE, settings("sgd"), stage, STEPS
        )
        images, teacher, valid = data(1)
        teacher[valid] = torch.nan
        before = trainer.state()[0]
        tally = trainer.step(0, images, teacher, valid)
        told.append((tally, before, trainer.state()[0]))
        trainer.engine.destroy()
    return told


def nan_on_one_rank(rank: int, world: int, model: str) -> list[tuple[torch.Tensor, dict]]:
    """Of every stage: what a step tells, and the weights after it, where rank 0's labels are
    nan."""
    told = []
    for stage in STAGES:
        trainer = StudentTrainer(
            new_student(model), class_vectors(), SCALE, settings("sgd"), stage, STEPS
        )
        part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        images, teacher, valid = (column[part] for column in data(0))
        if rank == 0:
            teacher = torch.full_like(teacher, torch.nan)
        told.append((trainer.step(1, images, teacher, valid), trainer.state()[0]))
        trainer.engine.destroy()
    return told


def test_a_nan_on_one_rank_leaves_the_others_their_update(model):
    """Batch norm's statistics are of all images; the gradient is of rank 1's alone."""
    ranks = run_distributed(nan_on_one_rank, 2, model)
    start = new_student(model)
    for stage in range(len(STAGES)):
        (bad, weights), (good, same) = ranks[0][stage], ranks[1][stage]
        assert bad.tolist() == [0, 0, 0, 1] and good[0] == BATCH // 2 and good[3] == 0
        for name, value in start.named_parameters():
            assert torch.isfinite(weights[name]).all()
            torch.testing.assert_close(weights[name], same[name])
            if name not in ("projector.first.bias",):  # which has no gradient but rounding
                assert (weights[name] - value).abs().max() > 1e-6, name
            torch.testing.assert_close(weights[name], ranks[0][0][1][name], rtol=1e-4, atol=1e-6)


def train_alone(rank: int, world: int, model: str) -> tuple[dict, list[dict], list[tuple]]:
    return train(rank, world, model, None), broken_labels(model), nan_labels(model)


def assert_equal(got: tuple[dict, dict], wanted: tuple[dict, dict]) -> None:
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=0)


@functools.cache
def by_hand(model: str, optimizer: str) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    """The same in one process and plain torch, on the valid rows alone: weights, and what each step
    is to tell of all ranks."""
    start = new_student(model)
    config, w = settings(optimizer), class_vectors()
    prompts = nn.Parameter(start.prompts.detach().clone())
    first, norm, second = start.projector.first, nn.BatchNorm1d(12), start.projector.second
    params = [prompts, *first.parameters(), *norm.parameters(), *second.parameters()]
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
        told.append([int(valid.sum()), kl.sum().item(), int(agreeing), 0])
    named = {"prompts": prompts}
    for prefix, module in {"first": first, "norm": norm, "second": second}.items():
        named |= {f"projector.{prefix}.{k}": v for k, v in module.state_dict().items()}
    named.pop("projector.norm.num_batches_tracked")
    return {name: value.detach().clone() for name, value in named.items()}, told


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def on_two(model):
    """What each of two ranks tells."""
    return run_distributed(train, 2, model, None)


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
        if optimizer == "adamw" and name in RANDOM_UNDER_ADAM:
            continue
        difference = (got[name] - wanted[name]).abs().max().item()
        assert difference < 1e-5, f"{name} differs by {difference} {where}"


@pytest.mark.parametrize(("stage", "optimizer"), CASES)
def test_two_ranks_are_plain_torch(on_two, model, stage, optimizer):
    wanted, told = by_hand(model, optimizer)
    for rank in on_two:
        weights, _ = rank[stage, optimizer]["end"]
        assert_same_weights(weights, wanted, optimizer)
    start = new_student(model).state_dict()
    assert (wanted["prompts"] - start["prompts"]).abs().max() > 1e-3
    tallies = [torch.stack(rank[stage, optimizer]["tallies"]) for rank in on_two]
    torch.testing.assert_close(sum(tallies), torch.tensor(told), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("stage", "optimizer"), CASES)
def test_one_rank_is_plain_torch(on_one, model, stage, optimizer):
    wanted, told = by_hand(model, optimizer)
    assert_same_weights(on_one[stage, optimizer]["end"][0], wanted, optimizer)
    tallies = torch.stack(on_one[stage, optimizer]["tallies"])
    torch.testing.assert_close(tallies, torch.tensor(told), rtol=1e-4, atol=1e-4)


def test_every_stage_and_rank_gives_the_same_state(on_two, on_one):
    names = {"sgd": {"momentum_buffer"}, "adamw": {"exp_avg", "exp_avg_sq", "step"}}
    for case, told in on_one.items():
        weights, optimizer = told["middle"]
        params = [name for name in weights if "running" not in name]
        wanted = {f"{param}/{key}" for param in params for key in names[case[1]]}
        assert set(optimizer) == wanted
        for rank in on_two:
            assert rank[case]["middle"][1].keys() == wanted
            for name, value in rank[case]["middle"][1].items():
                torch.testing.assert_close(value, optimizer[name], rtol=1e-3, atol=1e-5)


def test_two_and_two_steps_are_four_on_fewer_ranks(on_two, model):
    starts = {case: on_two[0][case]["middle"] for case in RESUMED}
    (resumed,) = run_distributed(train, 1, model, starts)
    for case, told in resumed.items():
        assert_same_weights(told["end"][0], on_two[0][case]["end"][0], case[1], case)


def test_two_and_two_steps_are_four_on_more_ranks(on_one, model):
    starts = {case: on_one[case]["middle"] for case in RESUMED}
    for rank in run_distributed(train, 2, model, starts):
        for case, told in rank.items():
            assert_same_weights(told["end"][0], on_one[case]["end"][0], case[1], case)


@pytest.mark.slow
def test_a_state_fits_every_stage(on_one, model):
    starts = {(s, o): on_one[(s + 1) % 4, o]["middle"] for s, o in CASES}
    for rank in run_distributed(train, 2, model, starts):
        for case, told in rank.items():
            assert_same_weights(told["end"][0], on_one[case]["end"][0], case[1], case)


def test_a_label_that_is_not_valid_may_be_anything(alone, model):
    good, *broken = alone[1]
    assert not torch.equal(good["prompts"], new_student(model).prompts)
    for weights in broken:
        assert_same_weights(weights, good, "sgd")


def test_a_nan_is_told_of_and_kept_from_the_optimizer(alone):
    """All that the step does to the weights is to let them decay."""
    config = settings("sgd")
    kept = 1 - learning_rate(0, STEPS, config) * config.weight_decay
    assert len(alone[2]) == len(STAGES)
    for tally, before, after in alone[2]:
        assert tally.tolist() == [0, 0, 0, 1]
        for name in ("prompts", "projector.first.weight", "projector.second.bias"):
            torch.testing.assert_close(after[name], kept * before[name])


def test_settings_are_those_that_matter():
    plain = TrainConfig()
    for field in ("temperature", "kd_weight", "lr_batch", "weight_decay", "warmup_steps"):
        assert getattr(settings("sgd"), field) != dataclasses.asdict(plain)[field]
