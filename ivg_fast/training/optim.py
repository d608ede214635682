# SPDX-License-Identifier: Apache-2.0
"""Muon for the matrices of the blocks, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from typing import Any

import torch

_MOMENTUM = 0.95
_QUINTIC = (3.4445, -4.775, 2.0315)  # steepest at zero; Jordan et al., Muon, 2024
_NUM_STEPS = 5


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T of `matrix` = U S V^T, by Newton and Schulz's iteration.

    Args:
        matrix: [rows, columns], float32.

    Returns:
        [rows, columns]; its singular values lie between about 0.5 and 1.3, but for those of
        `matrix` under a thousandth of its norm.
    """
    a, b, c = _QUINTIC
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_NUM_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon in float32. That one multiplies in bfloat16, which takes longer than all the
    rest of a training step where a CPU has no instructions for it.

    Args:
        params: matrices.
        lr: as of AdamW: updates are scaled to its root mean square.
        weight_decay: decoupled.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad.float()
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(gradient)
                mean = state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
                update = orthogonalized(gradient.lerp(mean, _MOMENTUM))
                scale = 0.2 * max(parameter.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * scale)


class MuonAdamW(torch.optim.Optimizer):
    """Muon on 2-D weights of the blocks, torch.optim.AdamW on the other parameters.

    Embeddings and the output head go to AdamW, as Muon's author advises. Muon's updates are scaled
    to AdamW's RMS, so both share one learning rate. Meant for training from scratch.
    """

    def __init__(self, model: torch.nn.Module, lr: float, weight_decay: float = 0.05) -> None:
        tables = {
            id(module.weight)
            for module in model.modules()
            if isinstance(module, torch.nn.Embedding)
        }
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is not None:
            tables.add(id(head.weight))
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for parameter in model.parameters():
            is_matrix = parameter.ndim == 2 and id(parameter) not in tables
            (matrices if is_matrix else others).append(parameter)
        self._muon = Muon(matrices, lr, weight_decay)
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        super().__init__([*matrices, *others], {"lr": lr})
        self._share()

    def _share(self) -> None:
        self.param_groups = self._muon.param_groups + self._adamw.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self._muon.step()
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._muon.load_state_dict(state_dict["muon"])
        self._adamw.load_state_dict(state_dict["adamw"])
        self._share()
