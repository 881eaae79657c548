"""SANA-Video's Linear DiT: the forward pass of model spec 1.2, and the block-causal use of the causal spec.

One class for clips and for long video: with ``state=`` the linear attention and the temporal convolution read what earlier
blocks left, and ``commit`` returns the next state. Not covered: SANA-Video 2.0 (hybrid), samplers, loading.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import SanaVideoError
from ..specs import ModelSpec
from ..state import LayerState, RecurrentState, check_fits, layers_on
from .embeddings import rope_table, time_sinusoid, unpatchify
from .layers import Block, CaptionEmbed, Context, FinalLayer, PatchEmbed, RMSNorm, Text, TimeEmbed, untouched
from .look import look

BlockHook = Callable[[int, Callable[..., Tensor], Tensor], Tensor]


class SanaVideoTransformer(nn.Module):
    """The network ``v = f(latent, time, caption)``; ``v`` is noise minus clean latent.

    operations:      namespace of layer classes (``Linear``), default ``torch.nn``.
    parity:          round like the official half-precision run (otherwise sums and denominators stay float32).
    cross_eps, attention_eps, truncate_times: the official values; diffusers' differ (model spec 1.14).
    """

    def __init__(
        self, spec: ModelSpec, *, operations=nn, dtype: torch.dtype | None = None, device=None, parity: bool = False,
        cross_eps: float = 1e-6, attention_eps: float = 1e-8, truncate_times: bool = True,
    ):
        super().__init__()
        if spec.hybrid:
            raise SanaVideoError(f"{spec.name} is of the SANA-Video 2.0 family, which this version cannot run",
                                 action="Use a SANA-Video 2B checkpoint")
        kw = {"dtype": dtype, "device": device}
        options = {"parity": parity, "cross_eps": cross_eps, "attention_eps": attention_eps}
        self.spec, self.parity, self.truncate_times = spec, parity, truncate_times
        self.x_embedder = PatchEmbed(spec, operations, options, **kw)
        self.t_embedder = TimeEmbed(spec.width, operations, **kw)
        self.t_block = nn.Sequential(nn.SiLU(), operations.Linear(spec.width, 6 * spec.width, **kw))
        self.y_embedder = CaptionEmbed(spec, operations, **kw)
        self.attention_y_norm = RMSNorm(spec.width, 1e-5, **kw)
        self.blocks = nn.ModuleList(Block(spec, operations, options, **kw) for _ in range(spec.depth))
        self.final_layer = FinalLayer(spec, operations, **kw)

    def forward(
        self, latent: Tensor, timestep: Tensor, caption: Tensor | Text, caption_mask: Tensor | None = None, *,
        state: RecurrentState | None = None, on_block: BlockHook | None = None,
    ) -> Tensor:
        """Velocity for ``latent [B, C, T, H, W]`` at ``timestep [B]`` (or ``[B, T]``, one per latent frame), 0..1000.

        ``caption [B, L, D]`` and ``caption_mask [B, L]`` (1 = valid), or what :meth:`read_text` made of them. With ``state`` the
        block starts at ``state.position`` and sees the history; nothing is written. ``on_block(i, call, x)`` may replace block i,
        which is ``call(x)``, or ``call(x, True)`` where nobody wants x afterwards: it may be overwritten then.
        """
        return self._run(latent, timestep, caption, caption_mask, state, on_block, None)

    def read_text(self, caption: Tensor, caption_mask: Tensor | None = None) -> Text:
        """What all passes over a text share: every block's keys and values, of the valid tokens where those come first.

        2 * depth * width values a token (2B: 21 MB for 120 tokens in bf16). Good as long as the weights stay the same.
        """
        def read() -> Text:
            text = self._text(caption, caption_mask, self._look(caption, caption_mask)[0])
            pairs = [[t.contiguous() for t in block.cross_attn.read(text.features)] for block in self.blocks]
            return text._replace(features=None, read=tuple(map(tuple, pairs)))

        return self._as_wanted(read)

    def _dtype(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return self.final_layer.scale_shift_table.dtype if self.compute_dtype is None else self.compute_dtype

    def _look(self, caption: Tensor | Text, mask: Tensor | None, *parts: Tensor) -> tuple[tuple[int, ...] | None, bool]:
        """See :func:`look`. In parity mode nothing is known: leaving masked text out sums in another order."""
        if isinstance(caption, Text):
            return None, False
        self._check_text(caption, mask)
        return (None, False) if self.parity else look(None if mask is None else mask.bool(), *parts)

    def _text(self, caption: Tensor, mask: Tensor | None, lengths: tuple[int, ...] | None) -> Text:
        features = self.attention_y_norm(self.y_embedder(caption.to(self._dtype())))
        features = features if lengths is None else features[:, :max(lengths)]  # no block needs keys of the others
        return Text(features, None if mask is None or lengths is not None else mask.bool().to(caption.device), lengths)

    def commit(
        self, latent: Tensor, caption: Tensor | Text, caption_mask: Tensor | None = None, *,
        state: RecurrentState | None = None, window: int = 0, keep_undo: bool = False,
    ) -> tuple[Tensor, RecurrentState]:
        """The pass at time 0 over a finished block: (velocity, next state). The given state is left as it was.

        ``window`` and ``keep_undo`` matter for a new state only; a given state keeps its own.
        """
        times = torch.zeros(latent.shape[0], device=latent.device)
        layers: list[LayerState] = []
        v = self._run(latent, times, caption, caption_mask, state, None, layers)
        return v, self._next_state(latent, layers, state, window, keep_undo)

    def absorb(
        self, latent: Tensor, caption: Tensor | Text, caption_mask: Tensor | None = None, *,
        state: RecurrentState | None = None, window: int = 0, keep_undo: bool = False, on_block: BlockHook | None = None,
    ) -> RecurrentState:
        """The next state as :meth:`commit` gives it, without the velocity.

        The last block then only needs its keys, its values and its last frame, and the output head nothing at all.
        ``on_block`` sees every block but the last.
        """
        times = torch.zeros(latent.shape[0], device=latent.device)
        layers: list[LayerState] = []
        self._run(latent, times, caption, caption_mask, state, on_block, layers, state_only=True)
        return self._next_state(latent, layers, state, window, keep_undo)

    def _next_state(self, latent, layers, state, window: int, keep_undo: bool) -> RecurrentState:
        grid = tuple(n // p for n, p in zip(latent.shape[2:], self.spec.patch))
        if state is None:
            state = RecurrentState.empty(
                self.spec.name, grid[1:], latent.shape[0], "parity" if self.parity else "quality", window, keep_undo)
        return state.advance(tuple(layers), grid[0], latent)

    def _run(self, *args, **kwargs) -> Tensor | None:
        return self._as_wanted(lambda: self._pass(*args, **kwargs))

    def _as_wanted(self, function: Callable):
        """``function()``; in parity mode with the reference operators alone, because a fused one rounds less often."""
        if not self.parity:
            return function()
        with ops.force("reference"):
            return function()

    def _pass(
        self, latent, timestep, caption, caption_mask, state, on_block, layers: list[LayerState] | None,
        state_only: bool = False,
    ) -> Tensor | None:
        """The network; every block's contribution is appended to ``layers`` when a list is given."""
        self._check(latent, timestep)
        lengths, alike = self._look(caption, caption_mask, latent, timestep)
        dtype = self._dtype()
        grid = tuple(n // p for n, p in zip(latent.shape[2:], self.spec.patch))
        history: tuple[LayerState | None, ...] = (None,) * len(self.blocks)
        start = 0
        if state is not None:
            check_fits(state, self.spec, grid[1:], latent.shape[0])
            start = state.position
            if state.layers:
                history = layers_on(state, latent.device)
        cos, sin = rope_table(*grid, self.spec.linear_head_dim, start,
                              torch.float64 if self.parity else torch.float32, latent.device)
        times = timestep if timestep.ndim == 2 else timestep[:, None]
        time = self.t_embedder(time_sinusoid(times, truncate=self.truncate_times).to(dtype))
        rows = self.t_block(time).unflatten(-1, (6, -1))
        text = caption if isinstance(caption, Text) else self._text(caption, caption_mask, lengths)
        ctx = Context(grid, rows, text.features, text.mask, cos, sin, text.lengths)
        x = self.x_embedder(latent.to(dtype))
        own = all(untouched(block) for block in self.blocks)  # nobody keeps what goes into a block or comes out of it
        alike = alike and own and state is None and layers is None
        for i, block in enumerate(self.blocks):
            ctx = ctx._replace(read=text.read[i]) if text.read else ctx
            if state_only and i == len(self.blocks) - 1:
                layers.append(block.contribution(x, ctx, history[i]))
                return None
            x = self._run_block(i, block, x, ctx, history[i], on_block, layers, own, alike and i == 0)
        return unpatchify(self.final_layer(x, time), grid, self.spec.patch)

    @staticmethod
    def _run_block(i, block, x, ctx, history, on_block, layers, own: bool, alike: bool) -> Tensor:
        def call(tokens: Tensor, spend: bool = False) -> Tensor:
            out, layer = block(tokens, ctx, history, spend and own, spend and alike)
            if layers is not None:  # the tail is a view of all frames; a state must hold the last one only
                layers.append(layer._replace(tail=layer.tail.clone()))
            return out

        return call(x, True) if on_block is None else on_block(i, call, x)

    compute_dtype: torch.dtype | None = None  # set by an owner whose layers cast their weights on use

    def _check(self, latent: Tensor, timestep: Tensor) -> None:
        spec = self.spec
        if latent.ndim != 5 or latent.shape[1] != spec.channels:
            raise SanaVideoError(
                f"The latent does not fit {spec.name}", found=f"shape {list(latent.shape)}",
                expected=f"[batch, {spec.channels}, frames, height, width]", action=f"Use {spec.vae.file_hint}")
        if any(n % p for n, p in zip(latent.shape[2:], spec.patch)) or 0 in latent.shape:
            raise SanaVideoError(
                f"The latent size does not fit {spec.name}", found=f"{list(latent.shape[2:])} (frames, height, width)",
                expected=f"multiples of {list(spec.patch)}",
                action=f"Use a width and height in steps of {spec.pixel_step[0]} and {spec.pixel_step[1]} pixels")
        frames = latent.shape[2] // spec.patch[0]
        if timestep.ndim not in (1, 2) or (timestep.ndim == 2 and timestep.shape[1] not in (1, frames)):
            raise SanaVideoError("Times must be one per item or one per latent frame",
                                 found=f"shape {list(timestep.shape)}", expected=f"[batch] or [batch, {frames}]")

    def _check_text(self, caption: Tensor, mask: Tensor | None) -> None:
        spec = self.spec
        if caption.ndim != 3 or caption.shape[-1] != spec.caption_channels:
            raise SanaVideoError(
                f"The text conditioning does not fit {spec.name}", found=f"shape {list(caption.shape)}",
                expected=f"[batch, tokens, {spec.caption_channels}]",
                action="Encode the prompt with the SANA-Video text encoder (Gemma-2-2B, CLIPLoader type pixeldit)")
        if mask is not None and mask.shape != caption.shape[:2]:
            raise SanaVideoError("The text mask does not fit the text", found=f"shape {list(mask.shape)}",
                                 expected=f"{list(caption.shape[:2])}")


def init_weights(model: SanaVideoTransformer, generator: torch.Generator | None = None) -> None:
    """Initial weights for training: N(0, 0.02)-like linears, zero temporal convolution, head and gates (paper §3.1)."""
    for name, p in model.named_parameters():
        if name.endswith(("t_conv.weight", "bias")) or name.startswith("final_layer.linear"):
            nn.init.zeros_(p)
        elif name.endswith("scale_shift_table"):
            p.data.normal_(0, p.shape[-1] ** -0.5, generator=generator)
        elif name == "attention_y_norm.weight":
            nn.init.constant_(p, 0.01 ** 0.5)
        elif name.endswith("norm.weight"):
            nn.init.ones_(p)
        elif p.ndim >= 2:
            p.data.normal_(0, p[0].numel() ** -0.5, generator=generator)
