"""A base network from sparsely annotated volumes, and transfer from it to a new organ.

    base       all layers, from random weights, on volumes of which each annotates a few classes (hybrid masked loss)
    vanilla    all layers, from the base's
    two_stage  first the last three layers alone, then all of them

The last three are the two convolutions of the last stage and the head; stage 1 is an adapter (`Tuned`), so it cannot touch the others.

Source: transfer learning from a sparsely annotated set of 3D medical images (arXiv:2311.05032): 3D U-Net, patches of 132^3 that give
44^3, 1 mm. Our summary of it gives no optimiser and no schedule: AdamW at 1e-4, halves of the steps for the stages, are ours.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from ..adapters import Adapter, Host, LinearHead, Part, Tuned
from ..backbones import Backbone
from ..errors import unknown
from ..training.fit import FitOptions, fit
from ..training.partial_losses import PartialLoss
from .fseft import EPOCHS, need_volumes
from .registry import recipe
from .run import NAME, Run

Strategy = Literal["base", "vanilla", "two_stage"]


@recipe("sparse_transfer", backbone="random:volume:unet3d", steps=None, batch=1, augment="fresh", spacing=1.0)
def sparse_transfer(
    run: Run,
    *,
    strategy: Strategy = "base",
    last: str = "up.0.0,up.0.1",
    lr: float = 1e-4,
    weight_decay: float = 0.01,
) -> dict[str, Any]:
    """Train a 3D network on volumes that annotate some classes each, or go on from such a network to a new organ.

    strategy: base, vanilla or two_stage. last: the layers that stage 1 trains beside the head. The backbone of a transfer is the base,
    as in volume:unet3d@DIR/backbone.safetensors. Leaves a network, no adapter.
    """
    need_volumes(run)
    if strategy not in get_args(Strategy):
        raise unknown("strategy", strategy, get_args(Strategy))
    steps, loss, partial = run.steps_or(EPOCHS), PartialLoss("hybrid"), {"partial": True}
    run.seeded()
    parts: dict[str, Part] = {"head": LinearHead.on(run.frozen, run.goal)}
    network = run.frozen.trainable_copy()
    if strategy == "two_stage":
        first = FitOptions(max(1, steps // 2), lr=lr, weight_decay=weight_decay, schedule="constant", seed=run.seed)
        last_layers(run, network, parts["head"], last.split(","), first, loss)
        steps = max(1, steps - first.steps)
    options = FitOptions(
        steps, lr=lr, weight_decay=weight_decay, schedule="cosine", seed=run.seed, precision=run.precision
    )
    settings = {"strategy": strategy, "loss": "hybrid"} | ({"last": last} if strategy == "two_stage" else {})
    return run.train("sparse_transfer", parts, options, settings=settings, network=network, loss=loss, partial=partial)


def last_layers(
    run: Run, network: Backbone, head: Part, targets: list[str], options: FitOptions, loss: PartialLoss
) -> None:
    """Stage 1: train `head` and the layers `targets`, and put these into `network`. Every other tensor of it stays as it is."""
    tuned = Tuned.on(run.frozen, run.goal, targets=targets)
    host = Host(run.frozen)
    made = Adapter.of(run.frozen, run.goal, {"last": tuned, "head": head}, preprocessing=run.preprocessing)
    host.add(made, NAME)
    fit(host, NAME, run.batches(partial=True), options, cache=run.prefix_cache(host), loss=loss, quiet=run.quiet)
    with torch.no_grad():
        for name in tuned.sites:
            layer = dict(network.network.get_submodule(network.sites[name].path).named_parameters(recurse=False))
            for key, t in tuned.cell(name).named_parameters():
                layer[key].copy_(t)
