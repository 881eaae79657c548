"""Training of the embedded model (design: "mini"): VAE, then text encoder and Linear DiT together on its latents.

Scripts, run as modules (``python -m sana_video_core.train.vae --help``), on one GPU or, through torchrun, on several. They
are bounded in seconds, not in steps, so that a run fits the time that a machine is there. ``README.md`` beside this file
has the recipe and what it gave. Nothing here is imported by the nodes.
"""
