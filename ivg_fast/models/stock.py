# SPDX-License-Identifier: Apache-2.0
"""What runners change in a model's config, and what it was before the first of them."""

from __future__ import annotations

from typing import Any, ClassVar

from ivg_fast.models.attention import ATTENTION_NAME


class StockConfig:
    """A config's attention and pad id as its owner set them; runners of one config share it.

    Attributes:
        attention: "eager" where the config named none.
    """

    _held: ClassVar[dict[int, StockConfig]] = {}  # by id of a config that a runner holds

    def __init__(self, config: Any) -> None:
        self._config, self._num_runners = config, 0
        name = config._attn_implementation
        self.attention: str = "eager" if name in (None, ATTENTION_NAME) else name
        self._pad_token_id = config.pad_token_id

    @classmethod
    def hold(cls, config: Any) -> StockConfig:
        """That of the config, to be let go of once."""
        stock = cls._held.setdefault(id(config), cls(config))
        stock._num_runners += 1
        return stock

    def let_go(self) -> None:
        self._num_runners -= 1
        if not self._num_runners:
            del self._held[id(self._config)]

    def give_back_pad(self) -> None:
        self._config.pad_token_id = self._pad_token_id
