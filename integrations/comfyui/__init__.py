"""attnsteer for ComfyUI: nodes for attention guidance. SPDX-License-Identifier: GPL-3.0-or-later

The nodes are made by `attnsteer.comfyui`; this file hands them over in the form that the program at hand takes, never in both.
"""

import importlib.util

if importlib.util.find_spec("comfy_api") is None:
    from attnsteer.comfyui import NODES, classic

    NODE_CLASS_MAPPINGS = classic()
    NODE_DISPLAY_NAME_MAPPINGS = {node.name: node.title for node in NODES}
else:

    async def comfy_entrypoint():
        """The extension, as ComfyUI asks for it."""
        from comfy_api.latest import ComfyExtension

        from attnsteer.comfyui import current

        class Attnsteer(ComfyExtension):
            async def get_node_list(self):
                return current()

        return Attnsteer()
