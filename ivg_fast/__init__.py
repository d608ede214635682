# SPDX-License-Identifier: Apache-2.0
"""Integrated Value Guidance, fast: steer a frozen language model while it decodes."""

# torch comes first: its OpenMP runtime is the one that the extension then shares.
import torch  # noqa: F401

from ivg_fast.async_engine import AsyncEngine
from ivg_fast.client import StreamEvent
from ivg_fast.engine import Engine
from ivg_fast.errors import (
    CapacityError,
    EngineStoppedError,
    InvalidParameterError,
    IVGError,
    NonFiniteLogitsError,
    QueueFullError,
    ScorerError,
    UnsupportedModelError,
    VocabularyMismatchError,
)
from ivg_fast.models.text_value import TextValueModel
from ivg_fast.models.value_head import ScalarHeadModel, ValueHeadModel
from ivg_fast.models.values import ValueFunction
from ivg_fast.outputs import CandidateOutput, RequestOutput, SearchStats
from ivg_fast.params import EngineConfig, ScoreInput, SearchParams
from ivg_fast.rendering import Prompt
from ivg_fast.response_scorer import ResponseScorer
from ivg_fast.templates import TEMPLATES, Preset, Template, preset

__version__ = "0.1.0"

__all__ = [
    "TEMPLATES",
    "AsyncEngine",
    "CandidateOutput",
    "CapacityError",
    "Engine",
    "EngineConfig",
    "EngineStoppedError",
    "IVGError",
    "InvalidParameterError",
    "NonFiniteLogitsError",
    "Preset",
    "Prompt",
    "QueueFullError",
    "RequestOutput",
    "ResponseScorer",
    "ScalarHeadModel",
    "ScoreInput",
    "ScorerError",
    "SearchParams",
    "SearchStats",
    "StreamEvent",
    "Template",
    "TextValueModel",
    "UnsupportedModelError",
    "ValueFunction",
    "ValueHeadModel",
    "VocabularyMismatchError",
    "preset",
]
