# SPDX-License-Identifier: Apache-2.0
"""From a prompt as a user gives it to the text and the tokens that each role reads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ivg_fast.errors import InvalidParameterError
from ivg_fast.params import is_whole_text
from ivg_fast.request import ROLES, RolePrompt
from ivg_fast.templates import Template, as_template

Messages = Sequence[Mapping[str, str]]
# A text, chat messages, or token ids.
Content = str | Messages | Sequence[int]

_WANTED = "must be texts, chat messages or token ids"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that roles may read differently; each field is a text, chat messages or token ids.

    Texts and chat messages go through the tokenizer of each role. A role's template (`templates` of
    the engine) applies to the text of `raw`, never to a text that a role is given for itself, which
    stands as it is. Chat messages go through the role's template too, where it has one and they are
    a single turn of the user; else through the chat template of the role's own tokenizer. Token ids
    are taken as they are.

    Attributes:
        raw: what every role reads that has nothing of its own.
        base, tuned, untuned, value: what this role reads instead.

    Raises:
        InvalidParameterError: neither `raw` nor `base`, or something that is no prompt.
    """

    raw: Content | None = None
    base: Content | None = None
    tuned: Content | None = None
    untuned: Content | None = None
    value: Content | None = None

    def __post_init__(self) -> None:
        for name in ("raw", *ROLES):
            content = getattr(self, name)
            if content is not None:
                object.__setattr__(self, name, _frozen(name, content))
        if self.raw is None and self.base is None:
            raise InvalidParameterError("raw", None, "must be given, or base")

    def of(self, role: str) -> Content | None:
        """What a role reads; None where it is given nothing."""
        own = getattr(self, role)
        return self.raw if own is None else own


PromptInput = Content | Prompt


def as_prompt_list(prompts: Any) -> list[Any]:
    """The prompts of Engine.generate as a list, a single one too.

    Raises:
        InvalidParameterError: something that is neither a prompt nor a list.
    """
    if isinstance(prompts, str | Prompt):
        return [prompts]
    if isinstance(prompts, np.ndarray | torch.Tensor):
        prompts = prompts.tolist()
    if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping | bytes):
        raise InvalidParameterError("prompts", prompts, _WANTED)
    items = list(prompts)
    is_one = bool(items) and (
        all(isinstance(item, Mapping) for item in items)
        or all(isinstance(item, int | np.integer) for item in items)
    )
    return [items] if is_one else items


def tokenizers_by_role(
    base: Any, others: Mapping[str, Any] | None, of_value: Any
) -> dict[str, Any]:
    """The base's tokenizer, those of other roles, and the one that a value model brings along.

    Raises:
        InvalidParameterError: a tokenizer of no such role.
    """
    if others is not None and not isinstance(others, Mapping):
        raise InvalidParameterError("tokenizers", others, "must be tokenizers by role")
    tokenizers = {"base": base} if of_value is None else {"base": base, "value": of_value}
    for role, tokenizer in (others or {}).items():
        if role not in ROLES[1:]:
            raise InvalidParameterError(
                "tokenizers", role, f"must be for a role of {ROLES[1:]}; `tokenizer` is the base's"
            )
        tokenizers[role] = tokenizer
    return tokenizers


class PromptRenderer:
    """Writes prompts for roles.

    Args:
        tokenizers: by role; a role without one reads through the base's. None where prompts are
            token ids.
        templates: by role, a template or its name.

    Raises:
        InvalidParameterError: a template that is none, for no role, or that its role's tokenizer
            cannot follow.
    """

    def __init__(
        self,
        tokenizers: Mapping[str, Any],
        templates: Mapping[str, str | Template] | None = None,
    ) -> None:
        base = tokenizers.get("base")
        self._tokenizers = {role: tokenizers.get(role, base) for role in ROLES}
        if templates is not None and not isinstance(templates, Mapping):
            raise InvalidParameterError("templates", templates, "must be templates by role")
        self._templates: dict[str, Template] = {}
        self._first_ids: dict[str, int] = {}
        for role, given in (templates or {}).items():
            if role not in ROLES:
                raise InvalidParameterError("templates", role, f"must be for a role of {ROLES}")
            self._templates[role] = as_template(role, given)
            self._check_template(role, given)

    def _check_template(self, role: str, given: str | Template) -> None:
        name, tokenizer = f"templates[{role!r}]", self._tokenizers[role]
        template = self._templates[role]
        if tokenizer is None:
            raise InvalidParameterError(name, given, f"needs a tokenizer of {role}")
        if template.format is None and getattr(tokenizer, "chat_template", None) is None:
            raise InvalidParameterError(
                name, given, f"needs a tokenizer of {role} that has a chat template"
            )
        if template.add_bos and getattr(tokenizer, "bos_token_id", None) is None:
            raise InvalidParameterError(
                name, given, f"needs a tokenizer of {role} that has a begin-of-text token"
            )

    def put_behind(self, role: str, first_id: int) -> None:
        """The role's own ids begin at `first_id`; below it are the base's. What its tokenizer
        writes, and the ids that are given for it alone, are its own."""
        self._first_ids[role] = first_id

    def render(self, prompt: PromptInput, roles: Collection[str]) -> dict[str, RolePrompt]:
        """What each of `roles` reads of a prompt.

        Raises:
            InvalidParameterError: nothing is given for one of them, or it cannot be written for it.
        """
        if prompt is None:
            raise InvalidParameterError("prompts", None, _WANTED)
        whole = prompt if isinstance(prompt, Prompt) else Prompt(prompt)
        rendered: dict[str, RolePrompt] = {}
        known: dict[tuple[int, int, Template | None, int], RolePrompt] = {}
        for role in roles:
            content = whole.of(role)
            if content is None:
                raise InvalidParameterError("prompts", prompt, f"must have something for {role}")
            # A text that is the role's own already has its form.
            is_verbatim = isinstance(content, str) and getattr(whole, role) is not None
            template = None if is_verbatim else self._templates.get(role)
            is_own = getattr(whole, role) is not None or not _is_ids(content)
            first_id = self._first_ids.get(role, 0) if is_own else 0
            key = (id(content), id(self._tokenizers[role]), template, first_id)
            if key not in known:
                written = self._encode(role, content, template)
                known[key] = RolePrompt(written.text, written.token_ids + first_id)
            rendered[role] = known[key]
        return rendered

    def _encode(self, role: str, content: Content, template: Template | None) -> RolePrompt:
        if _is_ids(content):
            return RolePrompt(None, np.asarray(content, dtype=np.int64))
        tokenizer = self._tokenizers[role]
        if tokenizer is None:
            shown = content if isinstance(content, str) else "chat messages"
            raise InvalidParameterError("prompts", shown, "need an engine with a tokenizer")
        add_special = True
        if template is not None and template.format is not None:
            text = template.render(_raw_of(role, content))
            if template.add_bos is not None:
                add_special = False
        elif template is not None or not isinstance(content, str):
            text = self._by_chat_template(role, content)
            add_special = False  # the template has written the special tokens already
        else:
            text = content
        if not is_whole_text(text):
            raise InvalidParameterError("prompts", text, "must have no halves of characters")
        # Spelt out only where it matters: not every tokenizer knows the argument.
        ids = tokenizer(text) if add_special else tokenizer(text, add_special_tokens=False)
        token_ids = np.asarray(ids.input_ids, dtype=np.int64)
        if template is not None and template.add_bos:
            bos = tokenizer.bos_token_id
            if not len(token_ids) or token_ids[0] != bos:
                token_ids = np.concatenate([[bos], token_ids])
        return RolePrompt(text, token_ids)

    def _by_chat_template(self, role: str, content: Content) -> str:
        tokenizer = self._tokenizers[role]
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        if getattr(tokenizer, "chat_template", None) is None:
            raise InvalidParameterError(
                "prompts",
                "chat messages",
                f"need a chat template in the tokenizer of {role}, or a template for {role}",
            )
        try:
            return tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # whatever the template raises
            raise InvalidParameterError(
                "prompts", list(messages), f"must suit the chat template of {role} ({error})"
            ) from error


def _is_ids(content: Content) -> bool:
    return not isinstance(content, str) and not (content and isinstance(content[0], Mapping))


def _raw_of(role: str, content: Content) -> str:
    """The text that a format takes: a text, or the one turn of a chat."""
    if isinstance(content, str):
        return content
    (*others, last) = content
    if others or not isinstance(last, Mapping) or last.get("role") != "user":
        raise InvalidParameterError(
            "prompts",
            list(content),
            f"must be a single message of the user for the template of {role}",
        )
    if not isinstance(last.get("content"), str):
        raise InvalidParameterError("prompts", last, "must have a text as its content")
    return last["content"]


def _frozen(name: str, content: Any) -> Content:
    """A copy that later changes of the user's list do not reach."""
    name = "prompts" if name == "raw" else name
    if isinstance(content, str):
        return content
    if isinstance(content, np.ndarray | torch.Tensor):
        content = content.tolist()
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InvalidParameterError(name, content, _WANTED)
    if len(content) and all(isinstance(item, Mapping) for item in content):
        return tuple(dict(message) for message in content)
    return tuple(checked_token_id(name, token) for token in content)


def checked_token_id(name: str, token: Any) -> int:
    is_integer = isinstance(token, int | np.integer) and not isinstance(token, bool)
    if not is_integer or abs(token) >= 2**63:
        raise InvalidParameterError(name, token, _WANTED)
    return int(token)
