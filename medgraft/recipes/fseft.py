"""Few-shot efficient fine-tuning of a 3D network for an organ: a spatial adapter on its last map, size priors, transduction.

Source: Silva-Rodriguez et al. 2023 (FSEFT), sections 3 and 4: SwinUNETR (48 features), patches of 96^3, 6 of one volume a step, 100
epochs, AdamW with cosine decay from 0.5 (1e-4 where the network's own layers are tuned), lambda = 1 over the last half. What it leaves
open: the loss (soft Dice plus cross-entropy here), the margin (0.3, see `size_prior`), weight decay (AdamW's 0.01).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from ..adapters import LinearHead, Part, SpatialAdapter, Tuned
from ..adapters.size_prior import Priors
from ..backbones import Backbone
from ..errors import BadCall, unknown
from ..training.fit import FitOptions
from ..training.losses import segmentation_loss
from ..training.patches import Patches
from ..training.transduce import Constraint
from ..volumes import read_volume
from .registry import recipe
from .run import Run

EPOCHS = 100
SWIN_UNETR = "random:monai:swin_unetr?feature_size=48"
"""No weights ship: name your own, as in monai:swin_unetr?feature_size=48@FILE."""
VOLUME_DEFAULTS: dict[str, Any] = {"backbone": SWIN_UNETR, "steps": None, "batch": 1, "augment": "none"}

Method = Literal["adapter", "linear_probe", "ft_last", "ft", "scratch"]
RATES: dict[str, float] = {"adapter": 0.5, "linear_probe": 0.5, "ft_last": 1e-4, "ft": 1e-4, "scratch": 1e-4}


@recipe("fseft", **VOLUME_DEFAULTS)
def fseft(
    run: Run,
    *,
    method: Method = "adapter",
    form: Literal["paper", "code2023", "residual"] = "paper",
    rows: str = "",
    priors: str = "size",
    margin: float = 0.3,
    relative: bool = False,
    query: Path | None = None,
    weight: float = 1.0,
    trust: bool = False,
    lr: float | None = None,
    weight_decay: float = 0.01,
) -> dict[str, Any]:
    """A spatial adapter on a 3D network from a few labelled volumes, with the priors that transduction needs.

    method: adapter, linear_probe, ft_last (the network's last stage), or the baselines ft (everything) and scratch, which leave a
    network. rows: start the head at these rows of the network's own, comma separated. priors: size, centroid, length. query: fit to this
    volume, too, in the last half of the steps (transduction), with the priors' cost times weight. trust: also where nothing was found.
    """
    need_volumes(run)
    if method not in get_args(Method):
        raise unknown("method", method, get_args(Method))
    whole = method in ("ft", "scratch")
    if whole and query is not None:
        raise BadCall(f"a query is fitted by adapters, {method!r} trains a network; take method adapter, or no query")
    if method == "scratch" and not run.frozen.spec.random:
        raise BadCall(
            f"scratch starts from random weights, {run.frozen.spec.id} is trained; name a random: one, or take ft"
        )
    kinds = [kind.strip() for kind in priors.split(",") if kind.strip()]
    run.seeded()
    parts: dict[str, Part] = {}
    if kinds:
        parts["priors"] = support_priors(run, kinds, margin=margin, relative=relative)
    if method == "adapter":
        parts["spatial"] = SpatialAdapter.on(run.frozen, run.goal, form=form)
    if method == "ft_last":
        parts["tuned"] = Tuned.on(run.frozen, run.goal, targets=last_stage(run.frozen))
    parts["head"] = LinearHead.on(run.frozen, run.goal, class_rows=_rows(rows))
    options = FitOptions(
        run.steps_or(EPOCHS),
        lr=RATES[method] if lr is None else lr,
        weight_decay=weight_decay,
        schedule="cosine",
        seed=run.seed,
        precision=run.precision,
    )
    settings = {"method": method, "form": form if method == "adapter" else None, "priors": kinds, "margin": margin}
    more: dict[str, Any] = {"loss": dice_ce}
    if query is not None:
        if "priors" not in parts:
            raise BadCall("a query is fitted under priors; name some, as in --priors size")
        own = parts["priors"]
        assert isinstance(own, Priors)
        constraint = Constraint(own, read_volume(query), weight, options.steps // 2, dice_ce, trust)
        more = {"loss": constraint, "forward": constraint.forward}
        settings["transduction"] = weight
    network = run.frozen.trainable_copy() if whole else None
    return run.train("fseft", parts, options, settings=settings, network=network, **more)


def _rows(said: str) -> list[int] | None:
    try:
        return [int(row) for row in said.split(",")] if said else None
    except ValueError:
        raise BadCall(f"rows are whole numbers, comma separated, as in 0,6,7; got {said!r}") from None


def dice_ce(logits: Any, target: Any) -> Any:
    """Soft Dice of each image plus cross-entropy."""
    return segmentation_loss(logits, target, form="dice_ce")


def need_volumes(run: Run) -> None:
    """Raise BadCall unless the run's backbone takes volumes, and its task is their segmentation."""
    if run.frozen.spec.dims != 3:
        raise BadCall(
            f"{run.frozen.spec.id} takes pictures, this recipe trains on volumes; choose a backbone of 3D, such as {SWIN_UNETR}"
        )
    if run.task != "segment":
        raise BadCall("volumes are segmented; classify takes pictures")


def last_stage(backbone: Backbone) -> list[str]:
    """The convolutions of the last stage before the head."""
    own = [s for s in backbone.sites.values() if s.kind == "conv" and s.stage < backbone.depth]
    last = max(s.stage for s in own)
    return [s.name for s in own if s.stage == last]


def support_priors(run: Run, kinds: list[str], **options: Any) -> Priors:
    """Priors measured on the whole label volumes of the support. Raises UnknownName."""
    batches = run.batches()
    assert isinstance(batches, Patches)
    labels = [batches.labels_of(item) for item in run.support]
    return Priors.on(run.frozen, run.goal, labels=labels, kinds=kinds, **options)
