"""What each precision costs the embedded model, measured in ComfyUI's own layers: errors of weights and of whole passes.

    .runtime/venv/bin/python tests/comfy/precision_report.py [fp8 int8 mxfp8 nvfp4] [--every] [--clips N]
        [--calibrated | --own]

On a CPU fp8, mxfp8 and nvfp4 weights are expanded for the product, so the first figure is the error of the weights alone. The
second is that of a card which multiplies in the format: fp8 does so here too, for the others the layers' inputs are rounded.
``--clips`` lets the judge read clips made in that second way. ``--calibrated``: fp8 with input scales, found on another prompt
and other noise. ``--own``: with those that the Loader finds without a prompt where a card multiplies in fp8.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import inprocess as ip

TIMES = (900.0, 500.0, 100.0)
PROMPT = "A red star bounces up and down on a navy background."
OTHER = "A green square moves to the right on a white background."


def weight_errors(patcher, exact: dict) -> list:
    """A LayerError of every quantised layer of a loaded model against the unquantised weights ``exact`` (native names)."""
    report = ip.pack_module("sana_video_core.quant.report")
    rows = []
    for name, module in patcher.model.diffusion_model.named_modules():
        form = getattr(module, "quant_format", None)
        if form is not None:
            weight = exact[f"{name}.weight"]
            after = sum(t.numel() * t.element_size() for t in module.weight.state_dict("w").values())
            error = report.relative_error(module.weight.dequantize(), weight.float())
            rows.append(report.LayerError(name, form, error, 2 * weight.numel(), after))
    return rows


@contextlib.contextmanager
def as_on_a_card(model):
    """Multiply in the format what a card that can would: fp8 really, the others with rounded inputs. int8 does so everywhere.

    ``model``: the inner model of a patcher. Gives the number of layers.
    """
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    def rounded(module, arguments):
        x = arguments[0]
        packed = QuantizedTensor.from_float(x.reshape(-1, x.shape[-1]), module.layout_type, scale=None)
        return (packed.dequantize().reshape(x.shape),)

    layers = [m for m in model.diffusion_model.modules() if getattr(m, "quant_format", None) is not None
              and not m._full_precision_mm_config and QUANT_ALGOS[m.quant_format].get("quantize_input", True)]
    real = [m for m in layers if m.quant_format == "float8_e4m3fn"]
    before = [m._full_precision_mm for m in real]
    hooks = [m.register_forward_pre_hook(rounded) for m in layers if m not in real]
    for m in real:
        m._full_precision_mm = False
    try:
        yield len(layers)
    finally:
        for hook in hooks:
            hook.remove()
        for m, old in zip(real, before):
            m._full_precision_mm = old


def loaded(path: Path, precision: str, look=None):
    """A patcher; fp8 with the input scales that ``look(patcher)`` asks for, where it is given."""
    if look is None or precision != "fp8":
        return ip.pack_module("nodes.loading").load_diffusion(str(path), precision)

    def run(patcher) -> None:
        with as_on_a_card(patcher.model):
            look(patcher)

    return ip.pack_module("nodes.calibrate").calibrated((str(path), "fp8", "auto"), run)[0]


def velocities(patcher, caption, mask, seed: int = 0) -> torch.Tensor:
    """The network's answers to fixed noise at three times, through ComfyUI's loading. ``caption [1, L, D]``."""
    import comfy.model_management as management

    management.load_models_gpu([patcher])
    network = patcher.model.diffusion_model
    network.compute_dtype = patcher.model.get_dtype_inference()
    spec = patcher.model.spec
    latent = torch.randn(1, spec.channels, 6, 12, 20, generator=torch.Generator().manual_seed(seed))
    latent = latent.to(network.compute_dtype)
    with torch.inference_mode():
        return torch.cat([network(latent, torch.tensor([time]), caption, attention_mask=mask).float() for time in TIMES])


def measure(precision: str, path: Path, caption, mask, look=None) -> tuple[list, dict[str, float]]:
    """(LayerErrors, {what: relative error of the whole pass}) of the model at ``path`` in ``precision``."""
    report, checkpoint = ip.pack_module("sana_video_core.quant.report"), ip.pack_module("sana_video_core.checkpoint")
    plain, model = loaded(path, "fp32"), loaded(path, precision, look)
    exact = velocities(plain, caption, mask)
    state, _ = checkpoint.read_state_dict(path)
    rows = weight_errors(model, checkpoint.convert(state, plain.model.spec))
    whole = {"whole model on this CPU": report.relative_error(velocities(model, caption, mask), exact)}
    with as_on_a_card(model.model) as layers:
        if layers:
            what = f"whole model, {layers} layers multiplying in few bits"
            whole[what] = report.relative_error(velocities(model, caption, mask), exact)
    return rows, whole


def judged(precision: str, path: Path, clips: int, look=None) -> float:
    """Adherence of ``clips`` clips of the embedded model in ``precision``."""
    evaluate = ip.pack_module("sana_video_core.mini.evaluate")
    judge = ip.pack_module("sana_video_core.mini.judge")
    forward = ip.pack_module("sana_video_core.dit").SanaVideoTransformer.forward
    inner = loaded(path, precision, look).model
    inner.diffusion_model.compute_dtype = inner.get_dtype_inference()

    class Network(torch.nn.Module):
        """The network of a MODEL under the core's call."""

        spec = inner.spec

        def forward(self, *arguments, **options):
            return forward(inner.diffusion_model, *arguments, **options)

    model = evaluate.MiniModel()
    original, model.network = model.network, Network()
    model.network.register_parameter("dtype_of", torch.nn.Parameter(next(original.parameters())[:0]))
    prompts, _ = evaluate.held_out_prompts(clips)
    with torch.inference_mode(), as_on_a_card(inner):
        verdicts, _ = evaluate.run(clips, lambda part, start: model.clips(part, start), prompts, 4)
    return judge.adherence(verdicts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("precisions", nargs="*", help="default: all that this ComfyUI can")
    parser.add_argument("--every", action="store_true", help="a line for every layer")
    parser.add_argument("--clips", type=int, default=0, help="judge this many clips of each precision")
    scales = parser.add_mutually_exclusive_group()
    scales.add_argument("--calibrated", action="store_true", help="fp8 with input scales by another prompt")
    scales.add_argument("--own", action="store_true", help="fp8 with input scales by the model's own short run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        ip.start(Path(work))
        mini, table = ip.pack_module("sana_video_core.mini"), ip.pack_module("sana_video_core.quant.report").table
        files = mini.files()
        text = ip.pack_module("sana_video_core.text.encode").load_text_encoder(files["text"])
        with torch.no_grad():
            caption, mask = text.positive([PROMPT])
            other = text.positive([OTHER])

        def another(patcher) -> None:
            velocities(patcher, *other, seed=1)

        look = another if options.calibrated else ip.pack_module("nodes.calibrate").own_run if options.own else None
        for precision in options.precisions or ip.pack_module("nodes.lowbit").LOW_BIT:
            rows, whole = measure(precision, files["transformer"], caption, mask, look)
            print(f"\n{precision}\n{table(rows, whole, options.every)}")
            if options.clips:
                print(f"adherence of {options.clips} clips: {judged(precision, files['transformer'], options.clips, look):.3f}")


if __name__ == "__main__":
    main()
