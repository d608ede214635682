# SPDX-License-Identifier: Apache-2.0
"""Safe loading: safetensors only, no remote code, frozen weights."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ivg_fast.devices import check_weights_fit
from ivg_fast.errors import InvalidParameterError

logger = logging.getLogger("ivg_fast")

_SERVED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What keeps loading safe and whole, or has an argument of its own here.
_OWN_KWARGS = {
    "use_safetensors",
    "weights_only",
    "trust_remote_code",
    "output_loading_info",
    "state_dict",
    "dtype",
    "torch_dtype",
    "device_map",
}
# Which files of a repository are meant: also the tokenizer's.
PLACE_KWARGS = ("revision", "subfolder", "token", "cache_dir", "local_files_only")


def load_model(
    path_or_model: str | os.PathLike[str] | torch.nn.Module,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    model_kwargs: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """Loads a causal language model, frozen, or takes one in hand; in eval mode either way.

    Args:
        path_or_model: a folder, a hub repository's name, or a module. A folder may hold a PEFT
            adapter, whose base model is then loaded too. A module in hand is moved and
            converted in place, and only where `device` or `dtype` asks for it.
        device: default the CPU for a path, the module's own for a module.
        dtype: "auto" is the checkpoint's own, but float16 becomes float32 on the CPU, which is slow
            in float16; a torch dtype or its name is taken as it is.
        model_kwargs: more arguments of transformers' from_pretrained (`quantization_config`,
            `revision`, ...), but those that keep loading safe. Of no use for a module.

    Raises:
        InvalidParameterError: a dtype that is not float32, bfloat16 or float16; a model_kwargs that
            may not be set; or weights are missing from the checkpoint (which transformers would
            fill with random numbers).
        OSError: no such checkpoint, or one without safetensors.
        CapacityError: no room for the weights on a GPU.
    """
    dtype = checked_dtype(dtype)
    options = checked_kwargs(model_kwargs)
    if isinstance(path_or_model, torch.nn.Module):
        if device is not None:
            path_or_model.to(device)
        if dtype != "auto":
            _convert(path_or_model, dtype)
        return path_or_model.eval()
    name = os.fspath(path_or_model)
    model, loading = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    check_complete("path_or_model", name, loading)
    return place(model, name, device, dtype)


def checked_kwargs(model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy; InvalidParameterError where it sets what may not be set, at either level."""
    if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
        raise InvalidParameterError("model_kwargs", model_kwargs, "must be arguments by name")
    options = dict(model_kwargs or {})
    nested = [value for value in options.values() if isinstance(value, Mapping)]
    for name in sorted(_OWN_KWARGS):
        for each in (options, *nested):
            if name in each:
                raise InvalidParameterError(
                    "model_kwargs", {name: each[name]}, f"must leave {name} alone"
                )
    return options


def kwargs_of(role: str, model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of one role: those for all, and those under its name; {} for the value.

    Raises:
        InvalidParameterError: not arguments by name.
    """
    if model_kwargs is None or role == "value":
        return {}
    if not isinstance(model_kwargs, Mapping):
        raise InvalidParameterError("model_kwargs", model_kwargs, "must be arguments by name")
    own = model_kwargs.get(role, {})
    if not isinstance(own, Mapping) or "value" in model_kwargs:
        raise InvalidParameterError(
            "model_kwargs",
            dict(model_kwargs),
            "must be arguments by name, under base, tuned and untuned too",
        )
    common = {k: v for k, v in model_kwargs.items() if k not in ("base", "tuned", "untuned")}
    return {**common, **own}


def load_tokenizer(
    path: str | os.PathLike[str], model_kwargs: Mapping[str, Any] | None = None
) -> Any:
    """The tokenizer of a folder or hub repository, without remote code.

    Args:
        path: the model's. A folder of a PEFT adapter without a tokenizer has its base model's.
        model_kwargs: the model's; what says where its files are holds for the tokenizer too.

    Raises:
        InvalidParameterError: there is none that transformers can load.
        OSError: nothing there at all.
    """
    name = _tokenizer_home(os.fspath(path))
    places = {k: v for k, v in (model_kwargs or {}).items() if k in PLACE_KWARGS}
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **places)
    except ValueError as error:
        raise InvalidParameterError("tokenizer", name, "must be loadable") from error


def _tokenizer_home(name: str) -> str:
    adapter = os.path.join(name, "adapter_config.json")
    if os.path.isfile(os.path.join(name, "tokenizer_config.json")) or not os.path.isfile(adapter):
        return name
    with open(adapter, encoding="utf-8") as lines:
        return json.load(lines).get("base_model_name_or_path") or name


def checked_dtype(dtype: torch.dtype | str) -> torch.dtype | Literal["auto"]:
    """The torch dtype of that name, or "auto"; InvalidParameterError where it cannot be served."""
    if dtype == "auto":
        return "auto"
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in _SERVED_DTYPES:
        raise InvalidParameterError("dtype", dtype, "must be auto, float32, bfloat16 or float16")
    return chosen


def check_complete(parameter: str, name: str, loading: dict[str, Any]) -> None:
    """InvalidParameterError where the checkpoint `name` lacked weights, from its loading info."""
    missing = sorted(loading["missing_keys"])
    if missing:
        listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise InvalidParameterError(parameter, name, f"must hold every weight (no {listed})")


def place(
    model: torch.nn.Module,
    name: str,
    device: torch.device | str | None,
    dtype: torch.dtype | Literal["auto"],
) -> torch.nn.Module:
    """Moves a model that was just loaded to its device and freezes it; see `load_model`."""
    target = torch.device(device or "cpu")
    if dtype == "auto" and target.type == "cpu" and model.dtype == torch.float16:
        logger.info("%s is stored in float16 and runs in float32 on the CPU", name)
        _convert(model, torch.float32)
    if not getattr(model, "is_quantized", False):  # those stay where they were loaded
        if target.type == "cuda":
            check_weights_fit(model, name, target)
        model.to(target)
    return model.eval().requires_grad_(False)


def _convert(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Converts the parameters, not the buffers: rotary frequencies must stay in float32."""
    for parameter in model.parameters():
        if parameter.is_floating_point():  # quantised weights are not
            parameter.data = parameter.data.to(dtype)
