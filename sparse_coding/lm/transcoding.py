"""Transcoders: a site whose activations predict those of a later one of the same layer.

Sources: Dunefsky, Chlenski, Nanda 2024, https://arxiv.org/abs/2406.11944; with a skip connection
Paulo, Shabalin, Belrose 2025, https://arxiv.org/abs/2501.18823. Formulas: sae/stack.py.
"""

from dataclasses import dataclass, replace
from typing import Literal

from sparse_coding.config import require, require_flag
from sparse_coding.lm.model import SITES, LanguageModel, Site, find_site
from sparse_coding.sae.families import FAMILIES

SiteName = Literal["attn_concat", "mlp_in", "mlp_act", "mlp_out", "resid_post"]  # of SITES


@dataclass(frozen=True)
class Transcoding:
    """What is predicted from what; the fields are flags of run.py.

    target_site: ""; none: autoencoders of the site
    skip: whether x W_skipᵀ is added to what codes give
    """

    site: str
    target_site: str
    skip: bool
    arch: tuple[str, ...]
    export: str

    def __post_init__(self) -> None:
        """Raises UserError for flags that make no transcoder."""
        if not self.target_site:
            require(not self.skip, "--skip is for --target-site: drop it, or name that site")
            lacks = self.export == "circuit_tracer"
            require(not lacks, "--export circuit_tracer is for transcoders: give --target-site")
            return
        later = ", ".join(SITES[SITES.index(self.site) + 1 :])
        rule = f"a site that is computed after --site {self.site}" + f": {later}" * bool(later)
        after = SITES.index(self.target_site) > SITES.index(self.site)
        require_flag(self, "target_site", after, rule)
        refined = [name for name in self.arch if FAMILIES[name].refined]
        require(
            not refined,
            f"--arch {', '.join(refined)} refines its codes by what they leave over of x, which a "
            "transcoder doesn't reconstruct: choose another one, or drop --target-site",
        )
        self._require_exportable()

    def _require_exportable(self) -> None:
        """Raises UserError if --export names a library that lacks such transcoders."""
        of_topk = [FAMILIES[name].selection == "topk" for name in self.arch]
        topk = any(of_topk)
        sites = self.site, self.target_site
        reasons = {
            "dictionary_learning": "it has no transcoders",
            "sparsify": "it has topk transcoders alone" * (not all(of_topk)),
            "hub": "sae_lens has no topk transcoders" * topk,
            "circuit_tracer": "it has no topk transcoders" * topk
            or "it knows those from mlp_in to mlp_out alone" * (sites != ("mlp_in", "mlp_out")),
        }
        reason = reasons.get(self.export)
        require(not reason, f"--export {self.export}: {reason}: choose another --export or --arch")


def find_sites(
    lm: LanguageModel, layer: int, site: str, target_site: str, *, centred: bool = False
) -> Site:
    """The site, with its target, unless target_site is "". centred: see find_site.

    Raises:
        UserError: that of find_site; the target is of another width.
    """
    found = find_site(lm, layer, site, centred=centred)
    if not target_site:
        return found
    target = find_site(lm, layer, target_site, centred=centred)
    require(
        target.width == found.width,
        f"--target-site {target_site} of {lm.name} has width {target.width}, --site {site} width "
        f"{found.width}: transcoders are for sites of one width, as mlp_in and mlp_out",
    )
    return replace(found, target=target)
