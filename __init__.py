"""SANA-Video for ComfyUI: the extension's entry point."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called once by ComfyUI; returns the extension with its nodes."""
    from comfy_api.latest import ComfyExtension

    from .nodes import NODES

    class SanaVideoExtension(ComfyExtension):
        async def get_node_list(self):
            return list(NODES)

    return SanaVideoExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
