# SPDX-License-Identifier: Apache-2.0
"""Prompt templates by name for the public models, and the settings of the paper's experiments.

Formats and settings are those of the public code of arXiv 2409.17819 and of the models' own cards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from ivg_fast.errors import InvalidParameterError
from ivg_fast.params import SearchParams

_SLOT = "{raw}"


@dataclass(frozen=True, slots=True)
class Template:
    """How one role writes a prompt.

    Attributes:
        format: the text with one "{raw}" in it, which the prompt replaces; other braces are text.
            None: the chat template of the role's own tokenizer, with the prompt as the user's turn.
        add_bos: True: the tokens start with one begin-of-text; False: no special tokens are added;
            None: as the tokenizer does by itself. A chat template writes its own: None there. A
            value function that scores texts begins them by itself, whatever is said here.

    Raises:
        InvalidParameterError: no or several "{raw}"; add_bos for a chat template.
    """

    format: str | None = _SLOT
    add_bos: bool | None = None

    def __post_init__(self) -> None:
        if self.format is not None and (
            not isinstance(self.format, str) or self.format.count(_SLOT) != 1
        ):
            raise InvalidParameterError("format", self.format, f"must hold {_SLOT} once")
        if self.add_bos is not None and not isinstance(self.add_bos, bool):
            raise InvalidParameterError("add_bos", self.add_bos, "must be True, False or None")
        if self.format is None and self.add_bos is not None:
            raise InvalidParameterError(
                "add_bos", self.add_bos, "must be None for a chat template, which writes its own"
            )

    def render(self, raw: str) -> str:
        """The prompt's text; only for a template with a format."""
        assert self.format is not None
        return self.format.replace(_SLOT, raw)


TEMPLATES: Mapping[str, Template] = MappingProxyType(
    {
        "raw": Template(),
        "chat": Template(None),
        "imdb": Template("Here is a movie review from imdb: {raw}"),
        # The paper puts two solved posts before the first; they are part of the user's text.
        "tldr-base": Template("{raw}\nTL;DR:"),
        "tldr": Template("{raw}TL;DR: "),
        "tulu": Template("<|user|>\n{raw}\n<|assistant|>\n", add_bos=False),
        "llama-2-chat": Template("[INST] <<SYS>>\n\n<</SYS>>\n\n{raw} [/INST] ", add_bos=True),
        "llama-2-ultra": Template("[INST] {raw} [/INST] ", add_bos=True),
        "mistral-instruct": Template("[INST] {raw} [/INST]", add_bos=True),
        # Spelt as the public code spells it while decoding, and as it was measured with.
        "human-assitant": Template("\n\nHuman: {raw}\n\nAssitant:", add_bos=True),
        "human-assistant": Template("\n\nHuman: {raw} \n\nAssistant: ", add_bos=True),
    }
)


def as_template(role: str, template: str | Template) -> Template:
    """The template of that name, or the one in hand.

    Raises:
        InvalidParameterError: no such name; names the role.
    """
    if isinstance(template, Template):
        return template
    if not isinstance(template, str) or template not in TEMPLATES:
        raise InvalidParameterError(
            f"templates[{role!r}]", template, f"must be a Template or one of {sorted(TEMPLATES)}"
        )
    return TEMPLATES[template]


@dataclass(frozen=True, slots=True)
class Preset:
    """One experiment of arXiv 2409.17819: what Engine.from_pretrained and generate are given.

    Attributes:
        models: hub names by role.
        templates: template names by role.
        params: IVG with the paper's W, K and L, sampling and length.
        max_length: prompt and response together, where the paper limits that; `params.max_tokens`
            is then an upper bound, from which the caller takes the prompt's tokens.
    """

    models: Mapping[str, str]
    templates: Mapping[str, str]
    params: SearchParams
    max_length: int | None = None


_LLAMA, _MISTRAL = "llama-2-chat", "mistral-instruct"
# Base models by preset, with their templates; the first is the default.
_BASES: dict[str, dict[str, str]] = {
    "imdb": dict.fromkeys(("gpt2-large", "gpt2", "gpt2-xl"), "imdb"),
    "tldr": dict.fromkeys(("gpt2-large", "gpt2", "gpt2-xl"), "tldr-base"),
    "tulu": {
        "meta-llama/Llama-2-7b-chat-hf": _LLAMA,
        "meta-llama/Llama-2-70b-chat-hf": _LLAMA,
        "mistralai/Mistral-7B-Instruct-v0.2": _MISTRAL,
        "mistralai/Mixtral-8x7B-Instruct-v0.1": _MISTRAL,
    },
}
_BASES["ultra"] = _BASES["tulu"]


def _guides(
    pair: tuple[str, str], value: str, pair_template: str, value_template: str
) -> tuple[dict[str, str], dict[str, str]]:
    untuned, tuned = pair
    models = {"tuned": tuned, "untuned": untuned, "value": value}
    templates = {"tuned": pair_template, "untuned": pair_template, "value": value_template}
    return models, templates


_ULTRA_VALUE = "chadlzx/llama-ultrafeedback-token-rm"
_INSTRUCT = SearchParams.ivg(
    max_tokens=2048,
    beam_width=2,
    num_candidates=2,
    chunk_length=30,
    temperature=0.7,
    top_k=50,
)
_PRESETS = {
    "imdb": Preset(
        *_guides(
            ("lvwerra/gpt2-imdb", "chadlzx/gpt2-imdb-dpo"),
            "chadlzx/gpt2-imdb-token-rm",
            "raw",
            "raw",
        ),
        SearchParams.ivg(max_tokens=50, temperature=0.7, ignore_eos=True),
    ),
    "tldr": Preset(
        *_guides(
            ("chadlzx/gpt2-summarize", "chadlzx/gpt2-summarize-dpo"),
            "chadlzx/gpt2-summarize-token-rm",
            "tldr",
            "tldr",
        ),
        SearchParams.ivg(max_tokens=128, temperature=0.7, stop="\n"),
    ),
    "tulu": Preset(
        *_guides(
            ("allenai/tulu-2-7b", "allenai/tulu-2-dpo-7b"), _ULTRA_VALUE, "tulu", "human-assitant"
        ),
        _INSTRUCT,
        max_length=2048,
    ),
    "ultra": Preset(
        *_guides(
            ("meta-llama/Llama-2-7b-hf", "chadlzx/llama-ultrafeedback-dpo"),
            _ULTRA_VALUE,
            "llama-2-ultra",
            "human-assitant",
        ),
        _INSTRUCT,
        max_length=2048,
    ),
}

PRESET_NAMES = tuple(_PRESETS)


def preset(name: str, *, base: str | None = None) -> Preset:
    """The settings of one experiment of the paper.

        p = preset("imdb")
        engine = Engine.from_pretrained(**p.models, templates=p.templates)
        engine.generate(reviews, p.params)

    Args:
        name: "imdb" (controlled sentiment), "tldr" (summarisation), "tulu" or "ultra" (instruction
            following under either pair).
        base: one of the paper's base models; None: the first of gpt2-large, Llama-2-7b-chat. Those
            of Mistral have other pieces than the Llama guides: an engine refuses to mix them.

    Raises:
        InvalidParameterError: no such preset, or not a base model of it.
    """
    if name not in _PRESETS:
        raise InvalidParameterError("name", name, f"must be one of {sorted(_PRESETS)}")
    bases = _BASES[name]
    if base is None:
        base = next(iter(bases))
    if base not in bases:
        raise InvalidParameterError("base", base, f"must be one of {sorted(bases)}")
    found = _PRESETS[name]
    return replace(
        found,
        models={"base": base, **found.models},
        templates={"base": bases[base], **found.templates},
    )
