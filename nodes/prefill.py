"""Any clip becomes the beginning of a long video: its latents are read as if the model had made them."""

from __future__ import annotations

from comfy_api.latest import io

from ..sana_video_core.errors import SanaVideoError
from .common import CATEGORY, finite, whole_number
from .long import Network, State, Texts, long_spec, model_print, require_state, summary
from .shared_state import hand_out

MAX_BLOCK_FRAMES = 256


class SanaVideoPrefillState(io.ComfyNode):
    """LATENT of an existing clip to STATE: the commit pass over its blocks (causal spec 3)."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SanaVideoPrefillState",
            display_name="SANA-Video Prefill State",
            category=CATEGORY,
            description="Reads an existing clip into a state, so that a block sampler goes on from its last frame. Encode the "
                        "clip "
                        "with 'VAE Encode' first (16 frames a second, 1 + 4k frames).",
            search_aliases=["extend video", "continue clip", "video to video", "prefill"],
            inputs=[
                io.Model.Input("model", tooltip="LongSANA, from 'Load SANA-Video' in mode 'long'."),
                io.Latent.Input("samples", tooltip="The clip, from 'VAE Encode' with the Wan 2.1 VAE, or from a sampler."),
                io.Conditioning.Input("positive", tooltip="What the clip shows: describe it as you would prompt it."),
                State.Input("state", optional=True, tooltip="A state that the clip follows on. Nothing connected: the clip is "
                                                            "the "
                                                            "beginning."),
                io.Conditioning.Input("negative", optional=True, tooltip="Only when the block sampler runs with cfg above 1: the "
                                                                         "same as there."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=30.0, step=0.1, optional=True,
                               tooltip="The cfg of the block sampler that goes on (1 for LongSANA)."),
                io.Int.Input("block_frames", default=0, min=0, max=MAX_BLOCK_FRAMES, optional=True, advanced=True,
                             tooltip="Latent frames read at once. 0: as the model was trained (10)."),
            ],
            outputs=[State.Output(display_name="state", tooltip="To the state input of a block sampler."),
                     io.String.Output(display_name="summary", tooltip="What the state holds: blocks, seconds, size.")],
        )

    @classmethod
    def execute(cls, model, samples, positive, state=None, negative=None, cfg=1.0, block_frames=0) -> io.NodeOutput:
        import comfy.utils

        from ..sana_video_core.sampling.blocks import prefill, start_state
        from ..sana_video_core.sampling.plan import Span, split
        from .native import check_latent

        spec, latent = long_spec(model), samples["samples"]
        check_latent(spec, latent.shape)
        if latent.shape[0] != 1:
            raise SanaVideoError("A state is read from one clip", found=f"a batch of {latent.shape[0]}",
                                 action="Pick one clip with 'Latent From Batch'")
        if not bool(latent.isfinite().all()):
            raise SanaVideoError("The clip holds values that are not numbers", action="Encode it again")
        cfg = finite("cfg", cfg, 0.0, 30.0)
        texts = Texts(spec, positive, negative if cfg != 1 else None)
        lengths = split(latent.shape[2], whole_number("block_frames", block_frames, 0, MAX_BLOCK_FRAMES) or spec.block_frames)
        state = None if state is None else require_state(state)
        rows = 1 if cfg == 1 else 2
        begin = start_state(spec, tuple(latent.shape[3:]), rows, state, model_print=model_print(model))
        bar, spans, at = comfy.utils.ProgressBar(len(lengths)), {}, begin.position
        for i, frames in enumerate(lengths):
            spans[begin.blocks + i] = Span(begin.blocks + i, at, frames)
            at += frames
        with Network(model, (rows, spec.channels, max(lengths), *latent.shape[3:])) as network:
            after = prefill(
                network, model.model.process_latent_in(latent.float()), lambda i: texts.condition(spans[i]), spec=spec,
                lengths=lengths, cfg=cfg, state=state, device=network.device, recompute=True, model_print=model_print(model),
                on_block=lambda done, total: bar.update_absolute(done, total))
        after = after.to("cpu", copy=True)
        return io.NodeOutput(hand_out(after), summary(after))
