"""Caches that a denoiser writes to while it runs, as arguments of a call: each copy of the call has an empty one of its own.

For PyTorch's trees, such a cache is a node without leaves. It needs nothing but its size to be made in another process.
"""

from __future__ import annotations

from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch.utils._pytree import register_pytree_node

CACHES = {"WanAnimate2KVCache": WanAnimate2KVCache}

register_pytree_node(
    WanAnimate2KVCache,
    lambda cache: ([], len(cache.layer_caches)),
    lambda _, layers: WanAnimate2KVCache(layers),
    serialized_type_name="WanAnimate2KVCache",
    to_dumpable_context=lambda layers: layers,
    from_dumpable_context=lambda layers: layers,
)
