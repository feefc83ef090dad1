"""KL without logits against float64 truth: every way to say a teacher, every dtype, odd shapes.

A kernel may be wrong by what eager torch is wrong by on the same inputs, and by a tolerance beside
it, relative to the largest true entry (and to the logits' size, which rounding grows with).
"""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import tiles, torch_kl
from kernels.cosine import cosine_distance, gram
from kernels.kl import (
    Features,
    Logits,
    Losses,
    Teacher,
    Top,
    chosen,
    distillation,
    expected,
    reduced,
    top_of,
)

# fp32 rounds a scale of 100 by 6e-6, and with it all logits of a row. Half precision is of inputs
# alone, since all paths compute in fp32; gradients are rounded to it once more.
TOLERANCE = {torch.float32: 6e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
FORMS = ("features", "expected", "logits", "top")
SHAPES = [(1, 2, 64), (7, 10, 512), (252, 507, 768), (7, 1203, 1024), (3, 21_841, 64)]
SCALE, TEACHER_SCALE = 100.0, 60.0


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(
    images: int, classes: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of a student and a teacher that mostly agree, between two classes each, lest at
    these scales the softmax be certain, and KL be less than rounding; and class vectors with the
    mutual cosines of CLIP's. Rounded to a dtype, of which they are exact numbers."""
    w_ND = F.normalize(drawn(classes, width, seed=1) + drawn(1, width, seed=2), dim=-1)
    first = torch.arange(images) * 7 % classes
    between_BD = w_ND[first] + w_ND[(first + 1) % classes]
    x_BD = 3 * (between_BD + 2 * F.normalize(drawn(images, width, seed=3), dim=-1))
    u_BD = F.normalize(x_BD + 3 * F.normalize(drawn(images, width, seed=4), dim=-1), dim=-1)
    return x_BD.to(dtype), u_BD.to(dtype), w_ND.to(dtype)


def teacher_of(form: str, u_BD: Tensor, w_ND: Tensor, scale: float, tau: float = 1.0) -> Teacher:
    """By a form, exact to what the dtype of its tensors can tell."""
    z_BN = scale * F.normalize(u_BD.double(), dim=-1) @ w_ND.double().T
    match form:
        case "features":
            return Features(u_BD, scale)
        case "expected":
            return expected(u_BD, w_ND, scale / tau)
        case "logits":
            return Logits((z_BN - z_BN.amax(-1, keepdim=True)).to(u_BD.dtype))
    told = top_of(z_BN, min(4, len(w_ND) - 1), tau)
    return Top(told.log_p_BK.to(u_BD.dtype), told.classes_BK, told.log_tail_B.to(u_BD.dtype))


def doubled(teacher: Teacher) -> Teacher:
    def wide(told: object) -> object:
        return told.double() if isinstance(told, Tensor) and told.is_floating_point() else told

    return type(teacher)(*map(wide, teacher))


def told(x_BD: Tensor, *args: object, **options: object) -> tuple[Losses, Tensor]:
    """Losses, and the gradient of their sum, each image by a factor of its own."""
    x_BD = x_BD.detach().requires_grad_()
    losses = distillation(x_BD, *args, **options)
    factor_B = torch.linspace(0.5, 2, len(x_BD), dtype=losses.loss_B.dtype)
    (losses.loss_B * factor_B).sum().backward()
    return losses, x_BD.grad


def assert_true(
    impl: str, x_BD: Tensor, teacher: Teacher, w_ND: Tensor, scale: float, **options: object
) -> None:
    exact = {name: o.double() if name == "weight_B" else o for name, o in options.items()}
    if "gram" in options:
        exact["gram"] = gram(w_ND.double(), options["gram"].centred)
    doubles = x_BD.double(), doubled(teacher), w_ND.double()
    truth, true_dx = told(*doubles, scale, impl="reference", **exact)
    eager, eager_dx = told(x_BD, teacher, w_ND, scale, impl="reference", **options)
    ours, dx = told(x_BD, teacher, w_ND, scale, impl=impl, **options)
    assert ours.loss_B.dtype == ours.kl_B.dtype == torch.float32 and dx.dtype == x_BD.dtype
    for name, true, by_eager, by_ours in (
        ("loss", truth.loss_B, eager.loss_B, ours.loss_B),
        ("kl", truth.kl_B, eager.kl_B, ours.kl_B),
        ("dx", true_dx, eager_dx, dx),
    ):
        dtype = x_BD.dtype if name == "dx" else torch.float32
        # A difference of terms that are as large as logits, or their scale.
        size = max(true.abs().max().item(), (0.01 if name == "dx" else 0.1) * scale)
        allowed = (by_eager - true).abs().max().item() + TOLERANCE[dtype] * size
        assert name == "kl" or true.abs().max() > 10 * allowed, "compares next to nothing"
        assert (by_ours - true).abs().max().item() <= allowed, name
    if truth.cosine_B is None:
        assert eager.cosine_B is None and ours.cosine_B is None
    else:
        wrong = (ours.cosine_B - truth.cosine_B).abs().max()
        assert wrong <= (eager.cosine_B - truth.cosine_B).abs().max() + 5e-7
    counts = options.get("weight_B", torch.ones(len(x_BD))) != 0
    assert torch.equal(ours.top_t_B[counts], truth.top_t_B[counts])
    assert torch.equal(ours.top_s_B[counts], truth.top_s_B[counts])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_are_true(shape, form):
    x, u, w = case(*shape)
    assert_true("torch", x, teacher_of(form, u, w, TEACHER_SCALE), w, SCALE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype, form):
    x, u, w = case(7, 507, 512, dtype)
    assert_true("torch", x, teacher_of(form, u, w, TEACHER_SCALE), w, SCALE)


@pytest.mark.parametrize("form", FORMS)
def test_temperature_weights_and_extreme_scales(form):
    x, u, w = case(9, 203, 96)
    tau, weight = 3.0, torch.linspace(0, 2, 9)
    teacher = teacher_of(form, u, w, 1000.0, tau)
    if form == "features" or form == "logits":
        assert_true("torch", x, teacher, w, 1000.0)
    assert_true("torch", x, teacher, w, 900.0, temperature=tau, kl_weight=0.25, weight_B=weight)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("form", ["features", "logits"])
def test_cosine_comes_with_the_same_pass(form, centred):
    x, u, w = case(9, 203, 96)
    teacher = teacher_of(form, u, w, TEACHER_SCALE)
    options = {"cosine_weight": 3.0, "gram": gram(w, centred)}
    assert_true("torch", x, teacher, w, SCALE, **options)
    weight = torch.linspace(0, 2, 9)
    assert_true("torch", x, teacher, w, SCALE, kl_weight=0.0, weight_B=weight, **options)


@pytest.mark.parametrize("name", ["coco80", "lvis1203", "o365", "oid500"])
def test_real_class_vectors_with_ties(data_folder, name):
    (file,) = (data_folder / "class_vectors").glob(f"{name}_*.npy")
    w = F.normalize(torch.from_numpy(np.load(file)).float(), dim=-1)
    x = (
        w[: len(w) : 11]
        + 0.8 * F.normalize(drawn(len(w[::11]), w.shape[1], seed=5), dim=-1).float()
    )
    u = F.normalize(x + 0.05 * drawn(*x.shape, seed=6).float(), dim=-1)
    for form in FORMS:
        teacher = teacher_of(form, u, w, SCALE)
        truth = distillation(x.double(), doubled(teacher), w.double(), SCALE, impl="reference")
        ours = distillation(x, teacher, w, SCALE, impl="torch")
        torch.testing.assert_close(ours.kl_B.double(), truth.kl_B, rtol=1e-5, atol=1e-4)
        # Of equal class vectors either may be the top.
        tops = ours.top_s_B, truth.top_s_B
        z = SCALE * F.normalize(x.double(), dim=-1) @ w.double().T
        first, second = (z.gather(-1, top[:, None]) for top in tops)
        assert (first - second).abs().max() < 1e-4


def test_who_says_the_same_as_its_teacher_loses_nothing():
    x, _, w = case(9, 203, 96)
    losses, dx = told(x, Features(x.clone(), SCALE), w, SCALE, impl="torch")
    assert (losses.kl_B == 0).all() and (dx == 0).all()
    losses, dx = told(x, expected(x, w, SCALE, "torch"), w, SCALE, impl="torch")
    assert losses.kl_B.abs().max() < 1e-5 and (dx == 0).all()


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_on_their_own(impl, form):
    """A row of weight 0 counts for nothing whatever it holds; what is not a number stays where
    it is."""
    x, u, w = case(9, 203, 96)
    weight = torch.ones(9)
    weight[3] = 0
    teacher = teacher_of(form, u, w, TEACHER_SCALE)
    options = {"impl": impl, "weight_B": weight}
    if form in ("features", "logits"):
        options |= {"cosine_weight": 2.0, "gram": gram(w)}
    calm, calm_dx = told(x, teacher, w, SCALE, **options)
    assert calm.loss_B[3] == calm.kl_B[3] == 0 and (calm_dx[3] == 0).all()
    broken = [t.clone() if isinstance(t, Tensor) else t for t in teacher]
    for each in broken:
        if isinstance(each, Tensor) and each.is_floating_point():
            each[3] = torch.nan
    x_broken = x.clone()
    x_broken[3] = torch.inf
    losses, dx = told(x_broken, type(teacher)(*broken), w, SCALE, **options)
    assert torch.equal(losses.loss_B, calm.loss_B) and torch.equal(dx, calm_dx)
    x_broken[5] = torch.nan
    losses, dx = told(x_broken, teacher, w, SCALE, **options)
    others = [0, 1, 2, 3, 4, 6, 7, 8]
    assert torch.equal(losses.loss_B[others], calm.loss_B[others])
    assert torch.equal(dx[others], calm_dx[others])
    assert losses.loss_B[5].isnan() and dx[5].isnan().all()


def test_no_image_and_strange_strides():
    x, u, w = case(12, 203, 96)
    losses, dx = told(x[:0], Features(u[:0], SCALE), w, SCALE, impl="torch")
    assert len(losses.loss_B) == 0 and dx.shape == (0, 96)
    twice = torch.stack([x, u], dim=-1)
    strided = twice[::2, :, 0], Features(twice[::2, :, 1], SCALE), w.T.contiguous().T
    for one, other in zip(
        told(*strided, SCALE, impl="torch"),
        told(x[::2].contiguous(), Features(u[::2].contiguous(), SCALE), w, SCALE, impl="torch"),
        strict=True,
    ):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_small_steps(form):
    x, u, w = case(3, 11, 8, torch.float64)
    teacher = teacher_of(form, u, w, 20.0)
    options = {"impl": "torch", "temperature": 1.0 if form in ("expected", "top") else 2.0}
    if form in ("features", "logits"):
        options |= {"cosine_weight": 2.0, "gram": gram(w)}
    weight = torch.tensor([1.0, 0.0, 0.3], dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return distillation(x, teacher, w, 30.0, weight_B=weight, **options).loss_B

    assert torch.autograd.gradcheck(loss, x.requires_grad_())


@pytest.mark.parametrize("total", [0.9, 1.1])
def test_probabilities_of_the_likeliest_that_do_not_sum_to_1(total):
    """As those in half precision: the gradient is the loss's all the same."""
    x, u, w = case(4, 31, 16)
    top = teacher_of("top", u, w, TEACHER_SCALE)
    shift = torch.tensor(total).log()
    assert_true("torch", x, Top(top[0] + shift, top[1], top[2] + shift), w, SCALE)


@pytest.mark.parametrize("kept", [1, 5, 6])
def test_all_classes_or_almost_all_may_be_kept(kept):
    x, u, w = case(4, 6, 8)
    teacher = top_of(TEACHER_SCALE * F.normalize(u.double(), dim=-1) @ w.double().T, kept)
    single = Top(*(t.float() if t.is_floating_point() else t for t in teacher))
    assert_true("torch", x, single, w, SCALE)
    if kept >= 5:  # nothing is lost
        full = distillation(x, Features(u, TEACHER_SCALE), w, SCALE, impl="torch")
        ours = distillation(x, single, w, SCALE, impl="torch")
        torch.testing.assert_close(ours.kl_B, full.kl_B, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """All operations, and the largest tensor that any gives."""

    numel = 0

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations.append(str(func))
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("form", ["features", "expected", "top"])
def test_never_holds_more_than_a_tile_or_two_of_logits(form, monkeypatch):
    tile = 2**18
    monkeypatch.setattr(tiles, "CPU_PRODUCT", tile)
    x, u, w = case(1500, 3000, 16)
    teacher = teacher_of(form, u, w, TEACHER_SCALE)
    tensors = [t for t in teacher if isinstance(t, Tensor)]
    with Largest() as largest:
        match form:
            case "features":
                torch_kl.features(x, u, w, None, None, SCALE, TEACHER_SCALE, 1.0, True)
            case "expected":
                torch_kl.given(x, *tensors[:3], w, None, None, SCALE, 1.0, True)
            case "top":
                torch_kl.top(x, *tensors, w, None, None, SCALE, 1.0, True)
    assert tile / 2 < largest.numel <= 2 * tile < 1500 * 3000 / 2


def test_is_one_operation_for_the_compiler():
    x, u, w = case(5, 31, 16)
    root = gram(w)

    def loss(x: Tensor, u: Tensor, weight: Tensor) -> Tensor:
        options = {"cosine_weight": 2.0, "gram": root, "weight_B": weight, "impl": "torch"}
        told = distillation(x * 2, Features(u, SCALE), w, SCALE, **options)
        return told.loss_B.sum() + (told.top_s_B == told.top_t_B).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for call in (loss, compiled):
        leaf = x.clone().requires_grad_()
        value = call(leaf, u, torch.linspace(0, 1, 5))
        value.backward()
        results += [value.detach(), leaf.grad]
    torch.testing.assert_close(results[:2], results[2:])


def test_backward_makes_nothing_but_the_gradient():
    x, u, w = case(5, 31, 16)
    loss = distillation(x.requires_grad_(), Features(u, SCALE), w, SCALE, impl="torch").loss_B.sum()
    with Largest() as made:
        loss.backward()
    assert "aten.zeros.default" not in made.operations


def test_is_compiled_once_for_all_batches():
    _, _, w = case(1, 31, 16)
    root = gram(w)

    def loss(x: Tensor, u: Tensor) -> Tensor:
        told = distillation(x, Features(u, SCALE), w, SCALE, impl="torch")
        return (
            told.loss_B.sum() + cosine_distance(x, expected(u, w, SCALE, "torch").o_BD, root).sum()
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for images in (5, 6, 9):
        x, u, _ = case(images, 31, 16)
        torch._dynamo.mark_dynamic(x, 0)  # raises where it is not
        torch._dynamo.mark_dynamic(u, 0)
        torch.testing.assert_close(compiled(x.requires_grad_(), u), loss(x, u))


@pytest.mark.parametrize("form", FORMS)
def test_operation_keeps_the_rules_of_torch(form):
    x, u, w = case(3, 31, 16)
    teacher = teacher_of(form, u, w, SCALE)
    tensors = [t for t in teacher if isinstance(t, Tensor)]
    args = (tensors, w, None, None, type(teacher).__name__, SCALE, SCALE, 1.0, 0.0, False)
    for wants in (True, False):
        torch.library.opcheck(
            torch.ops.promptkd.distillation.default,
            (x.clone().requires_grad_(wants), *args, wants, "torch"),
        )
    torch.library.opcheck(torch.ops.promptkd.expected.default, (x, w, SCALE, "torch"))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_autocast_does_not_reach_inside(impl):
    x, u, w = case(5, 31, 16)
    plain, plain_dx = told(x, Features(u, SCALE), w, SCALE, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_dx = told(x, Features(u, SCALE), w, SCALE, impl=impl)
    assert torch.equal(plain.loss_B, cast.loss_B)
    if impl != "reference":  # whose backward ran under autocast
        assert torch.equal(plain_dx, cast_dx)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_expected_class_vectors_are_those_of_the_softmax(impl):
    x, _, w = case(7, 507, 64)
    ours = expected(x, w, SCALE, impl)
    u = F.normalize(x.double(), dim=-1)
    z = SCALE * u @ w.double().T
    o = torch.softmax(z, -1) @ w.double()
    wanted = o, z.logsumexp(-1), SCALE * (u * o).sum(-1)
    for one, other in zip(ours[:3], wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.top_B, z.argmax(-1))
    assert all(t.dtype == torch.float32 for t in ours[:3])


def test_reductions():
    loss_B = torch.tensor([1.0, 2.0, 0.0])
    assert reduced(loss_B, "batchmean", 2, 10) == 1.5
    assert reduced(loss_B, "paper", torch.tensor(2), 10) == pytest.approx(0.15)


def test_what_is_chosen_is_kept_or_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert chosen("auto", cpu) == "torch" and chosen("auto", cuda) == "triton"
    for impl, device in itertools.product(("torch", "reference"), (cpu, cuda)):
        assert chosen(impl, device) == impl
    assert chosen("auto", cuda, torch.float64) == "torch"
    with pytest.raises(RuntimeError, match='"triton" in fp64'):
        chosen("triton", cuda, torch.float64)
    with pytest.raises(RuntimeError, match='"triton" on cpu'):
        chosen("triton", cpu)
    x, u, w = case(2, 5, 8)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match='"triton" in fp64'):
        distillation(x.double(), Features(u, SCALE), w, SCALE, impl="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match='"triton" on cpu'):
        distillation(x, Features(u, SCALE), w, SCALE, impl="triton")


def test_cosine_of_a_teacher_who_does_not_say_enough():
    x, u, w = case(2, 5, 8)
    for teacher in (teacher_of("expected", u, w, SCALE), teacher_of("top", u, w, SCALE)):
        with pytest.raises(ValueError, match="by Features or Logits"):
            distillation(x, teacher, w, SCALE, cosine_weight=1.0, gram=gram(w))
    with pytest.raises(ValueError, match="needs a gram"):
        distillation(x, Features(u, SCALE), w, SCALE, cosine_weight=1.0)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_what_does_not_fit_is_named(impl):
    """Else kernels would read past the end of what is shorter, or a column make [B, B] of [B]."""
    x, u, w = case(4, 5, 8)
    teacher, ones = Features(u, SCALE), torch.ones(4)
    given = expected(u, w, SCALE)
    root = gram(w[:, :7])
    for message, x_, teacher_, w_, options in (
        ("u_BD is", x, Features(u[:3], SCALE), w, {}),
        ("u_BD is", x, Features(u[:, 1:], SCALE), w, {}),
        ("z_BN is", x, Logits(torch.ones(4, 6)), w, {}),
        ("lse_B is", x, given._replace(lse_B=given.lse_B[:, None]), w, {}),
        ("log_tail_B is", x, Top(torch.ones(4, 2), torch.ones(4, 2).long(), x[:, :1]), w, {}),
        ("weight is", x, teacher, w, {"weight_B": ones[:2]}),
        ("weight is", x, teacher, w, {"weight_B": ones[:, None]}),
        ("u_BD is", x[:3], teacher, w, {}),
        ("w is", x[:, 1:], teacher, w, {}),
        ("x is", x[0], teacher, w, {}),
        ("at least one class", x, teacher, w[:0], {}),
        ("gram.root is", x, teacher, w, {"gram": root, "cosine_weight": 1.0}),
        ("w is torch.float64", x, teacher, w.double(), {}),
        ("u_BD is torch.float64", x, Features(u.double(), SCALE), w, {}),
        ("floating-point", x, teacher, w.long(), {}),
        ("a scale is a number", x, Features(u, torch.tensor(50.0)), w, {}),
        ("temperature is -1", x, teacher, w, {"temperature": -1}),
    ):
        with pytest.raises(ValueError, match=message):
            distillation(x_, teacher_, w_, SCALE, impl=impl, **options)
    with pytest.raises(ValueError, match="impl is trition"):
        distillation(x, teacher, w, SCALE, impl="trition")
    with pytest.raises(ValueError, match="reduction is papper"):
        reduced(ones, "papper", 4, 5)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_classes_may_be_ruled_out_by_the_teacher(impl):
    x, u, w = case(4, 50, 16)
    z = teacher_of("logits", u, w, TEACHER_SCALE).z_BN.clone()
    z[:, 40:] = -torch.inf
    ours, dx = told(x, Logits(z), w, SCALE, impl=impl)
    few = Logits(z[:, :40].double())
    truth, _ = told(x.double(), few, w[:40].double(), SCALE, impl="reference")
    spared = SCALE * F.normalize(x.double(), dim=-1) @ w.double().T
    lse, lse_40 = spared.logsumexp(-1), spared[:, :40].logsumexp(-1)
    torch.testing.assert_close(ours.kl_B.double(), truth.kl_B + lse - lse_40, rtol=1e-4, atol=1e-4)
    assert dx.isfinite().all()


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_weights_take_no_gradient(impl):
    x, u, w = case(2, 5, 8)
    weight = torch.ones(2, requires_grad=True)
    losses = distillation(x, Features(u, SCALE), w, SCALE, weight_B=weight, impl=impl)
    assert not losses.loss_B.requires_grad


def test_there_is_no_second_derivative():
    x, u, w = case(3, 11, 8)
    loss_B = distillation(x.requires_grad_(), Features(u, SCALE), w, SCALE, impl="torch").loss_B
    for total in (loss_B.square().sum(), loss_B.sum() + x.square().sum()):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(total, x, create_graph=True, retain_graph=True)


def test_there_is_no_forward_mode():
    x, u, w = case(3, 11, 8)

    def loss(x: Tensor) -> Tensor:
        return distillation(x, Features(u, SCALE), w, SCALE, impl="torch").loss_B

    with pytest.raises(RuntimeError, match="no forward-mode"):
        torch.func.jvp(loss, (x,), (torch.ones_like(x),))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("classes", [203, 21_841])
def test_is_recorded_in_a_cuda_graph(impl, classes):
    x, u, w = (t.cuda() for t in case(96, classes, 768))
    weight, root = torch.ones(96, device="cuda"), gram(w)

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        options = {"cosine_weight": 2.0, "gram": root, "weight_B": weight, "impl": impl}
        loss_B = distillation(x, Features(u, SCALE), w, SCALE, **options).loss_B
        return loss_B, torch.autograd.grad(loss_B.sum(), x)[0]

    static = x.clone().requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(static)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step(static)
    static.data.copy_(x.flip(0))
    graph.replay()
    for ours, wanted in zip(recorded, step(x.flip(0).requires_grad_()), strict=True):
        torch.testing.assert_close(ours, wanted)
