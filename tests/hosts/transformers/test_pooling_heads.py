"""`nn.MultiheadAttention` as a site: SigLIP pools its patches by one, and closes its maps in a function of torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnsteer import HeadGate, Intervention, Where, sites, steer
from attnsteer.call import AttnCall, Reweight
from attnsteer.testing.sweep.watch import watching


@dataclass(frozen=True)
class First(Intervention):
    """Three times the weight of the first key, renormalised."""

    kinds = ("self", "cross")

    def weights(self, call: AttnCall) -> Reweight:
        first = torch.zeros(1, 1, call.k.shape[2], dtype=torch.bool)
        first[..., 0] = True
        return Reweight(((first, 3.0),))


def model():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return SiglipVisionModel(config).eval()


@torch.no_grad()
def test_a_pooling_head_is_a_site_behind_the_layers() -> None:
    siglip, pixels = model(), torch.randn(2, 3, 8, 8)
    site = next(s for s in sites(siglip) if s.name.endswith("head.attention"))
    assert (site.layer, site.kind, site.heads) == (2, "cross", 2)
    where = Where(modules=rf".*{site.name.replace('.', '[.]')}", kinds="cross")

    def run() -> torch.Tensor:
        return siglip(pixel_values=pixels).pooler_output

    plain = run()
    with steer(siglip, HeadGate({(2, 0): 1.0, (2, 1): 1.0}, where=where), control=True):
        assert torch.equal(run(), plain)
    with steer(siglip, HeadGate({(2, 1): 0.0}, where=where)):
        ours = run()
    with watching(siglip, {site.name: (2, 1)}) as watch:
        expected = run()
    assert site.name in {seen.owner for seen in watch.seen}
    assert torch.allclose(ours, expected, atol=1e-5) and not torch.allclose(ours, plain, atol=1e-3)
    assert torch.equal(run(), plain)


@torch.no_grad()
def test_its_map_can_be_reweighted() -> None:
    siglip, pixels = model(), torch.randn(2, 3, 8, 8)
    pool = siglip.get_submodule(next(s.name for s in sites(siglip) if s.name.endswith("head.attention")))
    query, keys = torch.randn(2, 1, 16), torch.randn(2, 4, 16)
    maps = pool(query, keys, keys, average_attn_weights=False)[1]
    changed = maps.clone()
    changed[..., 0] *= 3.0
    changed /= changed.sum(dim=-1, keepdim=True)
    v = torch.nn.functional.linear(keys, pool.in_proj_weight[32:], pool.in_proj_bias[32:])
    heads = changed @ v.unflatten(-1, (2, 8)).transpose(1, 2)
    expected = pool.out_proj(heads.transpose(1, 2).flatten(2))
    seen = {}
    pool.register_forward_pre_hook(lambda module, args: (query, keys, keys))
    pool.register_forward_hook(lambda module, args, out: seen.update(out=out[0]))
    where = Where(modules=".*head[.]attention", kinds="cross", layers=[2])
    with steer(siglip, First(where=where)):
        siglip(pixel_values=pixels)
    assert torch.allclose(seen["out"], expected, atol=1e-5)
