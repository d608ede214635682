# SPDX-License-Identifier: Apache-2.0
"""ModelRunner: one Hugging Face model on the paged cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ivg_fast.errors import InvalidParameterError, UnsupportedModelError
from ivg_fast.models import support
from ivg_fast.models.attention import (
    ATTENTION_NAME,
    LayerCache,
    LayerShape,
    PagedContext,
    ProbeContext,
    attention_context,
)
from ivg_fast.models.batch import BLOCK_SIZE, ForwardBatch, StepBatch
from ivg_fast.models.compiled import compiled_forward
from ivg_fast.models.fast_modules import FastModules
from ivg_fast.models.selftest import check_model
from ivg_fast.models.shared_pieces import SharedPieces
from ivg_fast.models.stock import StockConfig
from ivg_fast.models.value_head import ScalarHeadModel, ValueModel


class ModelRunner:
    """One model plus its KV pools, one K and one V tensor a layer, [num_blocks, Hkv, 16, D].

    The model is put in eval mode and switched to the paged attention function, some of its modules
    to faster forms (see `fast_modules`), and stays so until `close`; meanwhile it runs only through
    a runner. Several runners may share one model, each with pools of its own.

    Args:
        model: a causal language model of transformers, or a ValueModel, on one device.
        role: "base", "tuned", "untuned" or "value"; named in error messages.
        num_blocks: blocks to allocate at once; 0 leaves it to `allocate`.
        self_test: compare paged with stock logits first (see `selftest.check_model`).
        can_compile: run it through torch.compile, which takes the place of the faster forms.

    Attributes:
        vocab_size: ids that the model both takes and scores; logits may be wider (padding). A
            scalar head scores all that it takes.
        is_scalar: whether it is a ScalarHeadModel.
        network: the transformers model, of a ValueModel its backbone.
        max_position: one past the last position that the model can take; None without a limit.
        eos_token_ids: the ids that end a text, by the model's own configuration.

    Raises:
        UnsupportedModelError: the model cannot be served; the message says why.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        role: str,
        num_blocks: int = 0,
        self_test: bool = True,
        can_compile: bool = False,
    ) -> None:
        self.model = model.eval()
        self.role = role
        self._head = model.score_head if isinstance(model, ValueModel) else None
        self.is_scalar = isinstance(model, ScalarHeadModel)
        self.network = _network_of(model, role)
        if not hasattr(self.network, "set_attn_implementation"):
            raise UnsupportedModelError(
                f"{role} must be a transformers model, got {type(self.network).__name__}"
            )
        self.config: Any = self.network.config
        self.dtype: torch.dtype = self.network.dtype
        self.device = _only_device(model, role)
        self.max_position = support.max_position(self.config)
        self.eos_token_ids = support.eos_token_ids(self.network)
        support.check_config(self.config)
        self._parameters = inspect.signature(self.network.forward).parameters
        self._can_keep = "logits_to_keep" in self._parameters
        self._layers: list[LayerCache] = []
        self._owner: ModelRunner | None = None  # whose pools it uses
        self._pieces: SharedPieces | None = None
        self.num_blocks = 0

        # Packed rows hold no padding: a token with the pad's id is a token, and no forward should
        # look for it (transformers would, and warn).
        self._stock: StockConfig | None = StockConfig.hold(self.config)
        self.stock_attention = self._stock.attention
        self.config.pad_token_id = None
        # A compiled graph has its own forms of these modules.
        self._fast_modules = FastModules(torch.nn.Module() if can_compile else self.model)
        self._compiled: Callable[..., Any] | None = None
        try:
            self.use_attention(ATTENTION_NAME)
            self._shapes, self.logits_width = self._probe()
            self.vocab_size = self.network.get_input_embeddings().num_embeddings
            if not self.is_scalar:
                self.vocab_size = min(self.vocab_size, self.logits_width)
            if self_test:
                check_model(self)
            if can_compile:
                self._compiled = compiled_forward(self.network, role)
                if self_test:
                    check_model(self, can_shorten_window=False)
        except BaseException:
            self.close()
            raise
        self.allocate(num_blocks)

    @property
    def num_layers(self) -> int:
        return len(self._shapes)

    @property
    def bytes_per_block(self) -> int:
        """Bytes that one block of 16 tokens takes in all pools of this runner."""
        return 0 if self._owner else BLOCK_SIZE * sum(shape.num_bytes for shape in self._shapes)

    @property
    def pools(self) -> list[torch.Tensor]:
        """Every pool, K then V of each layer; the block id is the first dimension of each."""
        return [pool for layer in self._layers for pool in (layer.key_pool, layer.value_pool)]

    @property
    def tile_tokens(self) -> int:
        """The most queries in a tile of attention's Triton kernels that suits every layer."""
        from ivg_fast.triton_kernels.paged_attention import Tiles

        return min(
            Tiles(
                s.num_heads // s.num_kv_heads, s.key_dim, s.value_dim, s.dtype.itemsize
            ).tile_tokens
            for s in self._shapes
        )

    def allocate(self, num_blocks: int) -> None:
        """Makes new pools of `num_blocks` blocks; what the old ones held is gone. Nothing to do for
        one that shares another's."""
        if self._owner is not None:
            return
        if num_blocks < 0:
            raise InvalidParameterError("num_blocks", num_blocks, "must be at least 0")
        windows = support.layer_windows(self.config, self.num_layers)
        self._layers = []  # the old pools go before the new ones come
        self._layers = [
            LayerCache(
                self._new_pool(num_blocks, shape, shape.key_dim),
                self._new_pool(num_blocks, shape, shape.value_dim),
                window,
            )
            for shape, window in zip(self._shapes, windows, strict=True)
        ]
        self.num_blocks = num_blocks

    def _new_pool(self, num_blocks: int, shape: LayerShape, width: int) -> torch.Tensor:
        size = (num_blocks, shape.num_kv_heads, BLOCK_SIZE, width)
        # Not zeros: memory that no token has been written to is not taken from the machine yet.
        return torch.empty(size, dtype=shape.dtype, device=self.device)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch | StepBatch) -> torch.Tensor:
        """Runs the batch and writes its keys and values; the wanted logits [N, logits_width].

        `logits_width` is at least `vocab_size`; the dtype is the model's. For a ValueModel a row is
        what its head makes of the hidden state: s(. | prefix), or the one value.
        """
        if self._head is not None:
            return self._head(self.hidden(batch))
        with attention_context(PagedContext(self._caches, batch)):
            if self._can_keep:
                wanted = batch.logit_positions
                keep = 0 if wanted is None else wanted  # 0: all
                logits = self._call(batch, logits_to_keep=keep).logits[0]
            else:
                logits = _wanted(self._call(batch).logits[0], batch)
        return logits if self._pieces is None else self._pieces.judge(logits)

    @torch.inference_mode()
    def hidden(self, batch: ForwardBatch | StepBatch) -> torch.Tensor:
        """Like `forward`, but the hidden states [N, H] before the head of a ValueModel."""
        _ = self.score_head
        with attention_context(PagedContext(self._caches, batch)):
            states = self._call(batch).last_hidden_state[0]
        return _wanted(states, batch)

    @torch.inference_mode()
    def forward_with_states(
        self, batch: ForwardBatch | StepBatch, trunk: torch.nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, and the hidden states [N, H] that its submodule `trunk` gave on the way."""
        states: list[torch.Tensor] = []
        hook = trunk.register_forward_hook(lambda _module, _inputs, out: states.append(out[0][0]))
        try:
            logits = self.forward(batch)
        finally:
            hook.remove()
        return logits, _wanted(states[0], batch)

    def shares_trunk_with(self, other: ModelRunner) -> bool:
        """Whether the backbone of this ValueModel is a part of the other's model."""
        return any(module is self.network for module in other.model.modules())

    def share_pools(self, other: ModelRunner) -> None:
        """Keeps no keys and values of its own from now on, but those of `other`, layer by layer."""
        self._owner = other
        self._layers = []

    def use_pieces(self, pieces: SharedPieces) -> None:
        """From now on it reads and scores the base model's ids, its own standing behind them."""
        pieces.place(self.device)
        self._pieces = pieces
        self.vocab_size = self.logits_width = pieces.num_base_ids

    @property
    def num_input_ids(self) -> int:
        """Ids that a prompt may have."""
        return self.vocab_size if self._pieces is None else self._pieces.num_input_ids

    @property
    def score_head(self) -> torch.nn.Linear:
        """The head of a ValueModel; UnsupportedModelError for another model."""
        if self._head is None:
            raise UnsupportedModelError(
                f"{self.role} must be a ValueHeadModel or a ScalarHeadModel, got "
                f"{type(self.model).__name__}"
            )
        return self._head

    def use_attention(self, name: str) -> None:
        """Switches the model between the paged and another registered attention function.

        With any other it is the stock model, slow forms of its modules included.
        """
        if name == ATTENTION_NAME:
            self._fast_modules.install()
        else:
            self._fast_modules.remove()
        self.network.set_attn_implementation(name)

    def release(self) -> None:
        """Gives the model back as it was, until the next forward takes it again. Meanwhile it may
        run, and its weights may change; the pools keep what they hold."""
        if self._stock is None:
            return
        self._stock.give_back_pad()
        self.use_attention(self.stock_attention)
        self._fast_modules.forget()

    def close(self) -> None:
        """Frees the pools and gives the model its own attention back; twice is fine."""
        self._layers = []
        self.num_blocks = 0
        self.release()
        if self._stock is not None:
            self._stock.let_go()
            self._stock = None

    @property
    def _caches(self) -> list[LayerCache]:
        return self._layers if self._owner is None else self._owner._layers

    def _call(self, batch: ForwardBatch | StepBatch, **kwargs: Any) -> Any:
        if self.config._attn_implementation != ATTENTION_NAME:  # one that shares it has closed
            self.config.pad_token_id = None
            self.use_attention(ATTENTION_NAME)
        run, pieces = self._compiled or self.network, self._pieces
        return run(
            input_ids=batch.input_ids if pieces is None else pieces.read(batch.input_ids),
            position_ids=batch.position_ids,
            use_cache=False,
            return_dict=True,
            **kwargs,
        )

    @torch.inference_mode()
    def _probe(self) -> tuple[list[LayerShape], int]:
        """One forward of two tokens: the shape of each layer's cache, the width of the logits."""
        kind = self.config.model_type
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        probe = ProbeContext()
        try:
            with attention_context(probe):
                output = self.network(
                    input_ids=ids,
                    position_ids=torch.arange(2, device=self.device)[None],
                    use_cache=False,
                    return_dict=True,
                )
        except (TypeError, ValueError, NotImplementedError) as error:
            raise UnsupportedModelError(
                f"{self.role}: model type {kind!r} cannot run packed tokens: {error}"
            ) from error
        num_layers = self.config.get_text_config().num_hidden_layers
        shapes = probe.layer_shapes
        if set(shapes) != set(range(num_layers)):
            raise UnsupportedModelError(
                f"{self.role}: model type {kind!r} has {num_layers} layers by its config, but "
                f"{len(shapes)} attend through the attention interface; all must"
            )
        width = output.logits.shape[-1] if self._head is None else self._head.out_features
        return [shapes[i] for i in range(num_layers)], width


def _wanted(outputs: torch.Tensor, batch: ForwardBatch | StepBatch) -> torch.Tensor:
    """The rows of `outputs` [T, ...] that the batch asks for."""
    wanted = batch.logit_positions
    return outputs if wanted is None else outputs.index_select(0, wanted)


def _network_of(model: torch.nn.Module, role: str) -> Any:
    trunk = model.backbone if isinstance(model, ValueModel) else model
    return support.plain_network(trunk, role)


def _only_device(model: torch.nn.Module, role: str) -> torch.device:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise UnsupportedModelError(
            f"{role} must be on one device, got {sorted(str(device) for device in devices)}"
        )
    return devices.pop()
