# SPDX-License-Identifier: Apache-2.0
"""Muon for the matrices of the blocks, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from typing import Any

import torch


class MuonAdamW(torch.optim.Optimizer):
    """torch.optim.Muon on 2-D weights of the blocks, torch.optim.AdamW on the other parameters.

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
        self._muon = torch.optim.Muon(
            matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
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
