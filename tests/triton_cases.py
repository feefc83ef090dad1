"""What Triton's KL is to give, against float64; `test_triton_kl` runs it."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import reference, triton_kl, triton_pass, triton_rows
from kernels.kl import Features, distillation
from kernels.trial import trial

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALGORITHMS = (triton_kl.features_by_pass, triton_kl.features_by_products)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 2, 64), (7, 10, 512), (5, 507, 768))
# What we may err more than eager torch in the same dtype, of the largest value: rounding of the
# softmax as the tensor cores take it (bf16 has 8 bits, fp16 11), and sums in another order.
ROUNDING = 2**-20
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def rows(*shape: int, seed: int, dtype: torch.dtype = torch.float32, length: float = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)
    return (length * x).to(DEVICE, dtype)


def case(B: int, N: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Student's features, the teacher's, and class vectors: these with a mutual cosine of 0.7, and
    the features between two of them, lest the softmax be certain, and KL less than rounding."""
    w_ND = F.normalize(rows(1, D, seed=0) + 0.65 * rows(N, D, seed=1), dim=-1)
    first = torch.arange(B, device=DEVICE) % N
    between = w_ND[first] + w_ND[(first + 1) % N]
    x_BD = 7 * (between + 2 * rows(B, D, seed=2))
    u_BD = between + 2 * rows(B, D, seed=3)
    return x_BD.to(dtype), u_BD.to(dtype), w_ND.to(dtype)


def unit(x_BD: Tensor) -> Tensor:
    return F.normalize(x_BD, dim=-1)


def logits(x_BD: Tensor, w_ND: Tensor, scale: float) -> Tensor:
    """In the dtype of the features, as eager torch has them."""
    return scale * F.normalize(x_BD, dim=-1) @ w_ND.T


def of_features(x_BD, u_BD, w_ND, scale, teacher_scale):
    return reference.kl_divergence(logits(u_BD, w_ND, teacher_scale), logits(x_BD, w_ND, scale))


def of_dense(x_BD, z_BN, w_ND, scale, factor):
    return reference.kl_divergence(factor * z_BN, logits(x_BD, w_ND, scale))


def of_top(x_BD, log_p_BK, classes_BK, log_tail_B, w_ND, scale):
    return reference.kl_divergence_of_top(
        log_p_BK, classes_BK, log_tail_B, logits(x_BD, w_ND, scale)
    )


def _as(dtype, other):
    """Tensors of classes and numbers stay what they are."""
    return other.to(dtype) if isinstance(other, Tensor) and other.is_floating_point() else other


def by_autograd(dtype, definition, x_BD, *others, weight_B=None, extra_BD=None, kl_weight=1.0):
    """KL and the gradient of x in eager torch, everything in that dtype."""
    x_BD = x_BD.to(dtype).requires_grad_()
    floating = [
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in others
    ]
    kl_B = definition(x_BD, *floating)
    if weight_B is not None:
        kl_B = weight_B.to(dtype) * kl_B
    loss = kl_weight * kl_B.sum()
    if extra_BD is not None:
        loss = loss + (extra_BD.to(dtype) * F.normalize(x_BD, dim=-1)).sum()
    (dx_BD,) = torch.autograd.grad(loss, x_BD)
    return kl_B.detach(), dx_BD


def assert_near(ours, definition, dtype, scale, x_BD, *others, **weighing):
    """KL and gradient as near to float64's as eager torch is in the dtype, and TOLERANCE more.

    Both are differences of numbers of a logit's size, which fp32 rounds; none is above the scale.
    """
    truth = by_autograd(torch.float64, definition, x_BD, *others, **weighing)
    eager = by_autograd(dtype, definition, x_BD, *others, **weighing)
    for name, our, true, its in zip(("kl", "dx"), ours, truth, eager, strict=True):
        assert our.dtype == torch.float32
        error, allowed = (our - true).abs().max(), (its - true).abs().max()
        slack = TOLERANCE[dtype] * true.abs().max() + ROUNDING * scale
        assert error <= allowed + slack, f"{name}: {error:.2e} > {allowed:.2e} + {slack:.2e}"


@pytest.mark.parametrize(("shape", "scale"), zip(SHAPES, (100.0, 1000.0, 100.0), strict=True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run", ALGORITHMS, ids=lambda run: run.__module__)
def test_of_the_teachers_features(run, dtype, shape, scale):
    x_BD, u_BD, w_ND = case(*shape, dtype)
    *ours, top_s_B, top_t_B = run(x_BD, u_BD, w_ND, None, None, scale, 0.9 * scale, 1.0, True)
    assert_near(ours, of_features, dtype, scale, x_BD, u_BD, w_ND, scale, 0.9 * scale)
    for top_B, rows_BD in ((top_s_B, x_BD), (top_t_B, u_BD)):
        z_BN = logits(rows_BD.double(), w_ND.double(), 1)
        assert top_B.dtype == torch.int64
        torch.testing.assert_close(z_BN.gather(1, top_B[:, None])[:, 0], z_BN.amax(1))


@pytest.mark.parametrize("run", ALGORITHMS, ids=lambda run: run.__module__)
def test_weights_and_another_gradient(run):
    x_BD, u_BD, w_ND = case(7, 40, 64, torch.float32)
    weight_B, extra_BD = torch.linspace(0.5, 2, 7, device=DEVICE), rows(7, 64, seed=5)
    *ours, _, _ = run(x_BD, u_BD, w_ND, weight_B, extra_BD, 50.0, 40.0, 3.0, True)
    weighing = {"weight_B": weight_B, "extra_BD": extra_BD, "kl_weight": 3.0}
    assert_near(ours, of_features, torch.float32, 50.0, x_BD, u_BD, w_ND, 50.0, 40.0, **weighing)


@pytest.mark.parametrize("run", ALGORITHMS, ids=lambda run: run.__module__)
def test_nan_stays_in_its_row_and_weighs_nothing_at_weight_0(run):
    x_BD, u_BD, w_ND = case(5, 40, 64, torch.float32)
    clean = run(x_BD, u_BD, w_ND, None, None, 50.0, 40.0, 1.0, True)
    x_BD[1, 3], u_BD[3] = torch.nan, torch.nan
    spoilt = run(x_BD, u_BD, w_ND, None, None, 50.0, 40.0, 1.0, True)
    weight_B = torch.tensor([1.0, 0, 1, 0, 1], device=DEVICE)
    weighed = run(x_BD, u_BD, w_ND, weight_B, None, 50.0, 40.0, 1.0, True)
    for was, now, then in zip(clean[:2], spoilt[:2], weighed[:2], strict=True):
        assert torch.equal(was[::2], now[::2]) and torch.equal(was[::2], then[::2])
        assert now[1::2].isnan().all() and not then[1::2].any()
    for top_B in (*spoilt[2:], *weighed[2:]):
        assert ((0 <= top_B) & (top_B < 40)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run", ALGORITHMS, ids=lambda run: run.__module__)
def test_of_the_same_features_it_is_exactly_0(run, dtype):
    x_BD, _, w_ND = case(7, 507, 64, dtype)
    kl_B, dx_BD, top_s_B, top_t_B = run(x_BD, x_BD, w_ND, None, None, 100.0, 100.0, 1.0, True)
    assert not kl_B.any() and not dx_BD.any() and torch.equal(top_s_B, top_t_B)


@pytest.mark.parametrize("run", ALGORITHMS, ids=lambda run: run.__module__)
def test_rows_that_are_not_contiguous_and_widths_of_odd_bytes(run):
    for D, dtype in ((64, torch.float32), (60, torch.float16)):
        x_BD, u_BD, w_ND = case(4, 30, D, dtype)
        strided = [t.T.contiguous().T for t in (x_BD, u_BD, w_ND)]
        weight_B = torch.ones(4, 2, device=DEVICE)[:, 0]
        ours = run(*strided, weight_B, None, 50.0, 40.0, 1.0, True)[:2]
        assert_near(ours, of_features, dtype, 50.0, x_BD, u_BD, w_ND, 50.0, 40.0)


@pytest.mark.parametrize(
    "shape", [(70, 50, 64), (2, 70, 640), (2, 70, 1024), (2, 70, 1280)], ids=str
)
@pytest.mark.parametrize("run", ALGORITHMS, ids=lambda run: run.__module__)
def test_many_blocks_of_rows_and_wide_features(run, shape):
    x_BD, u_BD, w_ND = case(*shape, torch.float16)
    ours = run(x_BD, u_BD, w_ND, None, None, 50.0, 40.0, 1.0, True)[:2]
    assert_near(ours, of_features, torch.float16, 50.0, x_BD, u_BD, w_ND, 50.0, 40.0)


@pytest.mark.parametrize("run", ALGORITHMS, ids=lambda run: run.__module__)
def test_the_first_of_equal_classes_is_the_top(run):
    x_BD, u_BD, w_ND = case(3, 20, 64, torch.float32)
    w_ND = w_ND.repeat(10, 1)
    *_, top_s_B, top_t_B = run(x_BD, u_BD, w_ND, None, None, 50.0, 40.0, 1.0, True)
    assert (top_s_B < 20).all() and (top_t_B < 20).all()


def test_many_splits_agree_with_one(monkeypatch):
    x_BD, u_BD, w_ND = case(3, 300, 64, torch.float32)
    wanted = triton_kl.features_by_products(x_BD, u_BD, w_ND, None, None, 50.0, 40.0, 1.0, True)
    for parts in (1, 3, 10):
        monkeypatch.setattr(triton_pass, "splits", lambda *told, parts=parts: parts)
        told = triton_kl.features_by_pass(x_BD, u_BD, w_ND, None, None, 50.0, 40.0, 1.0, True)
        for our, its in zip(told, wanted, strict=True):
            torch.testing.assert_close(our, its, rtol=1e-4, atol=1e-5)


def test_w_is_split_until_the_gpu_is_full():
    assert triton_pass.splits(512, 1000, 132) == 1  # four rounds of all multiprocessors
    assert 14 <= triton_pass.splits(8, 2000, 132) <= 33
    assert triton_pass.splits(8, 3, 132) <= 3


def test_many_chunks_agree_with_one(monkeypatch):
    x_BD, u_BD, w_ND = case(7, 40, 64, torch.float32)
    weighing = torch.linspace(0, 2, 7, device=DEVICE), rows(7, 64, seed=5)
    ours = u_BD, w_ND, *weighing, 50.0, 40.0, 1.0, True
    wanted = triton_rows.features(x_BD, *ours)
    monkeypatch.setattr(triton_rows, "CHUNK", 3 * 40)
    for our, its in zip(triton_rows.features(x_BD, *ours), wanted, strict=True):
        torch.testing.assert_close(our, its)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expected_class_vectors_and_what_is_given_of_them(dtype):
    for shape in SHAPES:
        x_BD, u_BD, w_ND = case(*shape, dtype)
        o_BD, lse_B, dot_B, top_B = triton_kl.expected(u_BD, w_ND, 90.0)
        z_BN = logits(u_BD.double(), w_ND.double(), 90.0)
        near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
        for our, true in (
            (o_BD, z_BN.softmax(1) @ w_ND.double()),
            (lse_B, z_BN.logsumexp(1)),
            (dot_B, (z_BN.softmax(1) * z_BN).sum(1)),
        ):
            torch.testing.assert_close(our, true.float(), **near)
        torch.testing.assert_close(z_BN.gather(1, top_B[:, None])[:, 0], z_BN.amax(1))
        told = o_BD, lse_B, dot_B
        kl_B, dx_BD, _ = triton_kl.given(x_BD, *told, w_ND, None, None, 100.0, 1.0, True)
        assert_near((kl_B, dx_BD), of_features, dtype, 100.0, x_BD, u_BD, w_ND, 100.0, 90.0)
        kl_B, dx_BD, own_B = triton_kl.given(u_BD, *told, w_ND, None, None, 90.0, 1.0, True)
        assert not kl_B.any() and not dx_BD.any() and torch.equal(own_B, top_B)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_the_teachers_logits(dtype):
    for B, N, D in (*SHAPES, (2, 5000, 64)):
        x_BD, u_BD, w_ND = case(B, N, D, dtype)
        z_BN = (logits(u_BD.float(), w_ND.float(), 20.0) - 3).to(dtype)
        for told in (z_BN, z_BN.T.contiguous().T):
            ours = triton_kl.dense(x_BD, told, w_ND, None, None, 100.0, 4.0, 1.0, True)
            assert_near(ours[:2], of_dense, dtype, 100.0, x_BD, z_BN, w_ND, 100.0, 4.0)
            assert torch.equal(ours[3], z_BN.float().argmax(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_the_teachers_likeliest_classes(dtype, monkeypatch):
    for (B, N, D), K in zip(SHAPES, (2, 3, 20), strict=True):
        x_BD, u_BD, w_ND = case(B, N, D, dtype)
        log_t_BN = torch.log_softmax(logits(u_BD.float(), w_ND.float(), 30.0), dim=-1)
        log_p_BK, classes_BK = log_t_BN.topk(K)
        log_tail_B = log_t_BN.scatter(1, classes_BK, -torch.inf).logsumexp(1)
        target = log_p_BK, classes_BK, log_tail_B
        weight_B, extra_BD = torch.linspace(0.5, 2, B, device=DEVICE), rows(B, D, seed=5)
        weighing = {"weight_B": weight_B, "extra_BD": extra_BD, "kl_weight": 3.0}
        monkeypatch.setattr(triton_rows, "CHUNK", 4 * N)
        *ours, top_B = triton_kl.top(x_BD, *target, w_ND, weight_B, extra_BD, 100.0, 3.0, True)
        assert_near(ours, of_top, dtype, 100.0, x_BD, *target, w_ND, 100.0, **weighing)
        z_BN = logits(x_BD.double(), w_ND.double(), 1)
        torch.testing.assert_close(z_BN.gather(1, top_B[:, None])[:, 0], z_BN.amax(1))


def every_function(B: int, gradient: bool) -> list[tuple[Tensor, ...]]:
    x_BD, u_BD, w_ND = case(B, 40, 64, torch.float32)
    z_BN = logits(u_BD, w_ND, 50.0)
    target = (z_BN[:, :4] - 60, torch.arange(4, device=DEVICE).repeat(B, 1), z_BN[:, 0] - 50)
    o_BD, lse_B, dot_B, _ = triton_kl.expected(u_BD, w_ND, 50.0)
    ours = w_ND, None, None, 50.0
    return [
        *(run(x_BD, u_BD, *ours, 40.0, 1.0, gradient) for run in ALGORITHMS),
        triton_kl.given(x_BD, o_BD, lse_B, dot_B, *ours, 1.0, gradient),
        triton_kl.dense(x_BD, z_BN, *ours, 1.0, 1.0, gradient),
        triton_kl.top(x_BD, *target, *ours, 1.0, gradient),
    ]


def test_without_a_gradient_the_rest_is_the_same():
    for without, whole in zip(every_function(5, False), every_function(5, True), strict=True):
        assert without[1].shape == (0, 64)
        for our, its in zip((without[0], *without[2:]), (whole[0], *whole[2:]), strict=True):
            assert torch.equal(our, its)


def test_no_images_at_all():
    for kl_B, dx_BD, *tops in every_function(0, True):
        assert kl_B.shape == (0,) and dx_BD.shape == (0, 64)
        assert all(top_B.shape == (0,) and top_B.dtype == torch.int64 for top_B in tops)


def test_features_go_by_products_while_classes_are_few():
    for dtype in DTYPES:
        assert not triton_kl.one_pass(1024, 1000, 768, dtype)
        assert triton_kl.one_pass(1024, 21841, 768, dtype)
    x_BD, u_BD, w_ND = case(3, 40, 64, torch.float32)
    told = u_BD, w_ND, None, None, 50.0, 40.0, 1.0, True
    for our, its in zip(
        triton_kl.features(x_BD, *told), triton_kl.features_by_products(x_BD, *told), strict=True
    ):
        assert torch.equal(our, its)


@pytest.mark.parametrize("length", [1e-6, 1e-4, 1e6])
def test_half_precision_has_room_for_any_length(length, monkeypatch):
    x_BD, u_BD, w_ND = case(5, 60, 64, torch.float16)
    x_BD, u_BD = length * x_BD.float(), u_BD.float() / length
    told = []
    for impl, w in (("triton", w_ND), ("reference", w_ND.float())):
        leaf_BD = x_BD.clone().requires_grad_()
        losses = distillation(leaf_BD, Features(u_BD, 30.0), w, 40.0, impl=impl)
        losses.loss_B.sum().backward()
        told.append((losses.kl_B, length * leaf_BD.grad))
    for ours, wanted in zip(*told, strict=True):
        assert (ours - wanted).abs().max() < 2e-2 * wanted.abs().max()


def test_a_run_may_trust_it(monkeypatch):
    """By the operation, with weights, and both algorithms: the second once there are 65 images."""
    _, _, w_ND = case(1, 40, 64, torch.float32)
    monkeypatch.setitem(triton_kl.CLASSES, torch.float32, 40)
    assert triton_kl.one_pass(65, 40, 64, torch.float32)
    assert not triton_kl.one_pass(64, 40, 64, torch.float32)
    assert trial(w_ND, "triton") == ""
