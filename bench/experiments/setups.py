# SPDX-License-Identifier: Apache-2.0
"""Who answers instructions: models, templates and settings, and the engine made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.experiments.families import fingerprint
from ivg_fast import Engine, EngineConfig, SearchParams
from ivg_fast.errors import InvalidParameterError
from ivg_fast.models.loading import load_model
from ivg_fast.models.value_head import ValueModel, load_value_model
from ivg_fast.request import ROLES
from ivg_fast.templates import preset
from ivg_fast.training.common import load_tokenizer

PAPER = ("tulu", "ultra")
RECIPE = "recipe"
SETUPS = (*PAPER, RECIPE)
METHODS = ("base", "eft", "cbs", "ivg")
# The public code spells the explicit value's template in two ways.
VALUE_TEMPLATES = ("human-assitant", "human-assistant")


@dataclass(frozen=True, slots=True)
class Setup:
    """Attributes:
    name: what results call it.
    models: folders or hub names by role.
    templates: names of templates by role.
    params: of IVG; the other methods take sampling and search from it.
    max_length: tokens of the base's prompt and of the response together; None: no such limit.
    guide_vocabulary: as of Engine.
    """

    name: str
    models: Mapping[str, str]
    templates: Mapping[str, str]
    params: SearchParams
    max_length: int | None = None
    guide_vocabulary: str = "same"

    def describe(self) -> dict[str, Any]:
        """What decides a response beside its parameters."""
        return {
            "models": {role: fingerprint(self.models[role], role) for role in ROLES},
            "templates": dict(sorted(self.templates.items())),
            "max_length": self.max_length,
            "guide_vocabulary": self.guide_vocabulary,
        }


def paper_setup(
    name: str,
    *,
    base: str | None = None,
    models: Mapping[str, str] | None = None,
    value_template: str = VALUE_TEMPLATES[0],
) -> Setup:
    """The paper's instruction following (arXiv 2409.17819) with Tulu's or Ultra's guides.

    Args:
        name: "tulu" or "ultra".
        base: one of the paper's base models; it decides the base's template. None: the first,
            Llama-2-7b-chat. Those of Mistral have other pieces than the guides of Llama-2: they
            are guided by the pieces that both have.
        models: folders or names in the place of the preset's, by role, such as local copies.
        value_template: one of VALUE_TEMPLATES.

    Raises:
        InvalidParameterError: no such name, base or template.
    """
    if name not in PAPER:
        raise InvalidParameterError("preset", name, f"must be one of {PAPER}")
    if value_template not in VALUE_TEMPLATES:
        raise InvalidParameterError(
            "value_template", value_template, f"must be one of {VALUE_TEMPLATES}"
        )
    chosen = preset(name, base=base)
    is_llama = "lama-2" in chosen.models["base"]
    return Setup(
        name,
        {**chosen.models, **(models or {})},
        {**chosen.templates, "value": value_template},
        chosen.params,
        chosen.max_length,
        "same" if is_llama else "shared_pieces",
    )


def recipe_setup(
    work: str | Path, models: Mapping[str, str] | None = None, max_tokens: int = 128
) -> Setup:
    """What `ivg-fast train instruct --work WORK` made, on the model that it began with.

    Raises:
        InvalidParameterError: a stage of the recipe is not done.
    """
    folders = {"base": "untuned", "untuned": "untuned", "tuned": "tuned", "value": "value"}
    found = {role: str(Path(work) / name) for role, name in folders.items()} | dict(models or {})
    for role, folder in found.items():
        if not (Path(folder) / "config.json").is_file():
            raise InvalidParameterError(role, folder, "must be a folder of the finished recipe")
    params = replace(preset("tulu").params, max_tokens=max_tokens)
    return Setup(RECIPE, found, dict.fromkeys(ROLES, "chat"), params)


def method_params(name: str, ivg: SearchParams) -> SearchParams:
    """A method with the sampling, the search and the weight of `ivg`."""
    if name not in METHODS:
        raise InvalidParameterError("method", name, f"must be one of {METHODS}")
    changes: dict[str, Any] = {}
    if name in ("base", "cbs"):
        changes |= {"guidance": "none"}
    if name in ("base", "eft"):
        changes |= {"beam_width": 1, "num_candidates": 1, "chunk_length": None, "scorer": "none"}
    return replace(ivg, **changes)


def load_engine(
    setup: Setup, *, device: str | None = None, dtype: str = "auto", config: EngineConfig
) -> Engine:
    """The engine of a setup.

    A scalar head on weights that are `tuned`'s own takes its trunk from `tuned`: one forward then
    serves both. An `untuned` that is the base itself is a module of its own all the same.
    """
    if setup.name != RECIPE:
        return Engine.from_pretrained(
            *(setup.models[role] for role in ROLES),
            templates=dict(setup.templates),
            guide_vocabulary=setup.guide_vocabulary,
            device=device,
            dtype=dtype,
            config=config,
        )
    load: dict[str, Any] = {"device": device, "dtype": dtype}
    models: dict[str, Any] = {role: load_model(setup.models[role], **load) for role in ROLES[:3]}
    value = on_trunk(load_value_model(setup.models["value"], **load), models["tuned"])
    tokenizers = {role: load_tokenizer(setup.models[role]) for role in ROLES}
    return Engine(
        models.pop("base"),
        tokenizers.pop("base"),
        **models,
        value=value,
        tokenizers=tokenizers,
        templates=dict(setup.templates),
        config=config,
    )


def on_trunk(value: ValueModel, tuned: Any) -> ValueModel:
    """`value` with the trunk of `tuned`, where the weights are equal; else as it is."""
    trunk = getattr(tuned, tuned.base_model_prefix)
    ours, theirs = value.backbone.state_dict(), trunk.state_dict()
    is_same = ours.keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )
    return type(value)(trunk, value.score_head) if is_same else value
