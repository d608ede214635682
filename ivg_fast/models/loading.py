# SPDX-License-Identifier: Apache-2.0
"""Safe loading: safetensors only, no remote code, frozen weights."""

from __future__ import annotations

import logging
import os
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ivg_fast.errors import InvalidParameterError

logger = logging.getLogger("ivg_fast")

_SERVED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_model(
    path_or_model: str | os.PathLike[str] | torch.nn.Module,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
) -> torch.nn.Module:
    """Loads a causal language model, frozen, or takes one in hand; in eval mode either way.

    Args:
        path_or_model: a folder, a hub repository's name, or a module. A module in hand is moved and
            converted in place, and only where `device` or `dtype` asks for it.
        device: default the CPU for a path, the module's own for a module.
        dtype: "auto" is the checkpoint's own, but float16 becomes float32 on the CPU, which is slow
            in float16; a torch dtype or its name is taken as it is.

    Raises:
        InvalidParameterError: a dtype that is not float32, bfloat16 or float16; or weights are
            missing from the checkpoint (which transformers would fill with random numbers).
        OSError: no such checkpoint, or one without safetensors.
    """
    dtype = checked_dtype(dtype)
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
    )
    check_complete("path_or_model", name, loading)
    return place(model, name, device, dtype)


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer of a folder or hub repository, without remote code.

    Raises:
        InvalidParameterError: there is none that transformers can load.
        OSError: nothing there at all.
    """
    name = os.fspath(path)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except ValueError as error:
        raise InvalidParameterError("tokenizer", name, "must be loadable") from error


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
    return model.to(target).eval().requires_grad_(False)


def _convert(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Converts the parameters, not the buffers: rotary frequencies must stay in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
