"""One worker's part of a step: pixels and soft targets to loss, gradients and an update, by ZeRO.

Letters: B images of this worker, N classes, D class vector width.
"""

import deepspeed
import deepspeed.ops
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
    set_z3_leaf_modules,
)
from torch import Tensor
from torch.nn import functional as F

from engine.clip.layers import Layer
from engine.clip.prompts import PromptedTower
from engine.config import TrainConfig
from engine.labels.targets import Targets, on_device, unpack
from engine.train.probe import compared
from engine.train.schedule import effective_weight, learning_rate
from kernels.cosine import gram
from kernels.kl import Features, Logits, distillation
from kernels.reference import feature_distance

__all__ = ["StudentTrainer"]


class StudentTrainer:
    """Trains a PromptedTower under DeepSpeed, on the process group that is already there.

    The loss is weight * tau^2 * KL(softmax(z_t / tau) || softmax(z_s / tau)), averaged over the
    valid images of all workers (PromptKD, equation 4; Hinton et al. 2015 for tau^2); and so are
    cosine_weight * cosine_distance(z_t, z_s) and feature_weight * feature_distance(u_t, u_s).
    """

    def __init__(
        self,
        student: PromptedTower,
        w_ND: Tensor,
        scale: float,
        teacher_scale: float,
        config: TrainConfig,
        zero_stage: int,
        total_steps: int,
        rollbacks: int = 0,
        offload: bool = False,
    ) -> None:
        """`rollbacks`: how often this run has gone back; each has halved its learning rate.
        `offload`: the optimizer's state, and its step, are on the CPU; not at stage 0."""
        assert dist.is_initialized()
        self._w_ND, self._scale, self._config = w_ND, scale, config
        self._teacher_scale = teacher_scale
        self._total_steps, self._rate = total_steps, 0.5**rollbacks
        self._kl_weight = effective_weight(config, len(w_ND))
        self._gram = gram(w_ND) if config.cosine_weight else None
        self._finite = torch.ones((), dtype=torch.bool, device=w_ND.device)
        self._learned = self._finite.clone()  # that is, loss and the features' gradient are finite
        self._x_BD: Tensor | None = None  # features of the last step
        params = [p for p in student.parameters() if p.requires_grad]
        for param in params:
            param.register_hook(self._keep_finite)
        _no_cpp_ops()
        # They read weights of parts that they do not call; so all are gathered for them.
        set_z3_leaf_modules(student, [Layer], raise_if_not_found=False)
        self.engine, *_ = deepspeed.initialize(
            model=student,
            optimizer=_optimizer(params, config),
            config={
                "train_micro_batch_size_per_gpu": config.batch // dist.get_world_size(),
                "gradient_accumulation_steps": 1,
                "zero_optimization": {
                    "stage": zero_stage,
                    **({"offload_optimizer": {"device": "cpu"}} if offload else {}),
                },
                "zero_force_ds_cpu_optimizer": False,  # torch's own: its kernels need no compiler
                # Both would make every step wait for the GPU.
                "timers": {"throughput": {"enabled": False}},
                **({"compute_grad_norm": False} if zero_stage in (1, 2) else {}),
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": 0.0,  # the paper has none; DeepSpeed would clip at 1
                "steps_per_print": 2**31,
            },
            dist_init_required=False,
        )

    @property
    def classes(self) -> int:
        return len(self._w_ND)

    @property
    def student(self) -> PromptedTower:
        return self.engine.module

    def learning_rate(self, step: int) -> float:
        return self._rate * learning_rate(step, self._total_steps, self._config)

    def step(self, step: int, images_BCHW: Tensor, targets: Targets) -> Tensor:
        """One update. Gives, summed over this worker's valid images: their number, their KL, how
        many have the teacher's top class, and their loss. If that, or the gradient of the features,
        is not finite, nothing is learned from these images: the four are 0, and the fifth is their
        number. If a gradient further down is not, it and those below it count as 0. In both cases
        the sixth is 1, else 0. fp32 [6], on the device. Waits for no GPU.

        A loss of features needs targets of that form."""
        device = self._w_ND.device
        valid_B = on_device(targets.valid_B, device)
        mask = valid_B.float()
        count = mask.sum()
        everyone = count.clone()
        dist.all_reduce(everyone)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)

        x_BD = self.engine(images_BCHW, valid_B, unit=False)
        self._x_BD = x_BD.detach()
        # Here, before the batch norm's collectives would carry it to the other workers, and below.
        x_BD.register_hook(self._keep_learnable)
        told = targets.values_BX
        losses = distillation(
            x_BD,
            Features(told, self._teacher_scale) if targets.form == "features" else Logits(told),
            self._w_ND,
            self._scale,
            temperature=self._config.temperature,
            kl_weight=self._kl_weight,
            cosine_weight=self._config.cosine_weight,
            gram=self._gram,
            weight_B=mask,
            impl=self._config.kernels,
        )
        loss, kl = losses.loss_B.sum(), losses.kl_B.sum()
        if weight := self._config.feature_weight:
            assert targets.form == "features"
            # Rows that are not valid may hold anything, and 0 * nan is nan, in gradients too.
            told_u_BD = F.normalize(torch.where(valid_B[:, None], told, 0).float(), dim=-1)
            distance_B = feature_distance(
                told_u_BD, F.normalize(x_BD, dim=-1), self._config.feature
            )
            loss = loss + weight * (mask * distance_B).sum()
        self._finite.copy_(torch.isfinite(kl + loss))
        # DeepSpeed averages gradients over workers; the mean is to be over images.
        self.engine.backward(loss * dist.get_world_size() / everyone.clamp(min=1))
        self.engine.step()
        agree = (losses.top_s_B == losses.top_t_B) & valid_B
        sums = torch.stack([count, kl, agree.sum().float(), loss.detach()])
        lost = torch.where(self._learned, 0, count)
        sums = torch.where(self._learned, sums, 0)
        return torch.cat([sums, torch.stack([lost, (~self._finite).float()])])

    def answers(self, targets: Targets, rows_n: np.ndarray) -> Tensor:
        """Both answers, as compared() gives them, about some rows of the last step, whose `targets`
        these were: the student's before its update. Without another forward."""
        assert self._x_BD is not None, "there has been no step"
        rows = on_device(rows_n, self._w_ND.device)
        told = unpack(targets.form, targets.values_BX[rows], self._w_ND, self._teacher_scale)
        return compared(self._x_BD[rows], told, self._w_ND, self._scale)

    def _keep_learnable(self, gradient: Tensor) -> Tensor:
        gradient = self._keep_finite(gradient)
        self._learned.copy_(self._finite)
        return gradient

    def _keep_finite(self, gradient: Tensor) -> Tensor:
        """Keeps nan and infinity from the optimizer, without waiting for the GPU to answer."""
        self._finite &= torch.isfinite(gradient).all()
        return torch.where(self._finite, gradient, 0)

    # ------------------------------------------------------------ state, at any world size

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights with running statistics, and optimizer state named `parameter/state`; whole
        tensors on the CPU, whatever the ZeRO stage and world size. Every worker must call this."""
        weights: dict[str, Tensor] = self.student.state_dict()
        optimizer: dict[str, Tensor] = {}
        flats = self._flats()
        for name, param in self._params():
            if flats is None:
                weights[name] = param
                entries = self.engine.optimizer.state.get(param, {})
            else:
                weights[name] = safe_get_full_fp32_param(param)
                inner = self.engine.optimizer.optimizer.state.get(flats[0], {})
                entries = {
                    key: value if key == "step" else safe_get_full_optimizer_state(param, key)
                    for key, value in inner.items()
                    if torch.is_tensor(value)
                }
            optimizer |= {f"{name}/{key}": value for key, value in entries.items()}
        return _on_cpu(weights), _on_cpu(optimizer)

    def load_optimizer(self, state: dict[str, Tensor]) -> None:
        """Takes up an optimizer state that state() gave, at any world size and ZeRO stage. The
        weights are to be in the student before the trainer is made."""
        flats = self._flats()
        keys = sorted({name.rsplit("/", 1)[1] for name in state} - {"step"})
        if flats is None:
            for name, param in self._params():
                mine = {key: state[f"{name}/{key}"].to(param.device, copy=True) for key in keys}
                if f"{name}/step" in state:
                    mine["step"] = state[f"{name}/step"].clone()
                self.engine.optimizer.state[param] = mine
            return
        if not keys:
            return
        # ZeRO's inner optimizer makes its state at the first step; make it now, to be filled.
        first, _ = self._params()[0]
        for flat in flats:
            inner = self.engine.optimizer.optimizer.state[flat]
            for key in keys:
                inner.setdefault(key, torch.zeros_like(flat))
            if f"{first}/step" in state:
                inner["step"] = state[f"{first}/step"].clone()
        if hasattr(self.engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, param in self._params():
            for key in keys:
                self._set(param, state[f"{name}/{key}"], key)

    def _params(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.student.named_parameters() if p.requires_grad]

    def _flats(self) -> list[Tensor] | None:
        """ZeRO's flat fp32 masters of this worker; None at stage 0, which has none."""
        match self.engine.zero_optimization_stage():
            case 0:
                return None
            case 3:
                return list(self.engine.optimizer.fp32_partitioned_groups_flat)
            case _:
                return list(self.engine.optimizer.single_partition_of_fp32_groups)

    @staticmethod
    def _set(param: torch.nn.Parameter, value: Tensor, key: str) -> None:
        if not hasattr(param, "ds_id"):
            safe_set_full_optimizer_state(param, value.to(param.device), key)
            return
        # Stage 3 keeps an equal part, padded at the end, on every worker; its own full setter does
        # not pad.
        numel = safe_get_local_fp32_param(param).numel()
        part = torch.zeros(numel, device=param.device)
        mine = value.reshape(-1)[dist.get_rank() * numel :][:numel]
        part[: len(mine)] = mine
        safe_set_local_optimizer_state(param, part, key)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


def _optimizer(params: list[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(params, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    return torch.optim.AdamW(params, lr=config.lr, weight_decay=config.weight_decay)


def _no_cpp_ops() -> None:
    """DeepSpeed would compile an operator for shared-memory all-reduce on CPUs, for minutes, at the
    first start. torch's own collectives serve, and 0.19 has no public switch."""
    deepspeed.ops.__compatible_ops__ = {}
