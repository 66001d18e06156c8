"""UniverSeg in context: the labelled images themselves are the adapter (`universeg`); a few weights tuned to them (`universeg_tune`).

Butoi et al. 2023, "UniverSeg: Universal Medical Image Segmentation"; choosing the support: Kim et al. 2023 (medagi-universeg-prostate).
Their supports hold up to 64 pairs at 128 px, images rescaled to [0, 1]; several classes are one against the rest. Volumes (3D packs)
are read slice by slice. `universeg_tune` is ours: episodes from the support alone, leaving one pair out.
An adapter of either kind holds the images: `publish` asks for consent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from ..adapters import ContextHead, LoRA, Part, ScaleShift, Support, Tuned
from ..adapters.task import Preprocessing
from ..backbones import load_backbone
from ..errors import BadCall, unknown
from ..training.data import Augment, Item
from ..training.episodes import Episodes
from ..training.fit import FitOptions
from ..training.support import choose, pairs
from .registry import recipe
from .run import Run

STARTER = "medgraft:starter-universeg"
ENCODER = "medgraft:starter-vit"
EPOCHS = 15  # of `universeg_tune`, where no number of steps is given

Select = Literal["uniform", "k_centre"]
Region = Literal["any", "shown"]
Storage = Literal["png", "float"]
Method = Literal["lora", "scale_shift", "tuned"]


@recipe("universeg", backbone=STARTER, augment="none", axis="axial")
def universeg(
    run: Run,
    *,
    select: Select = "uniform",
    roi: Region = "any",
    soft: bool = False,
    storage: Storage = "png",
    encoder: str = ENCODER,
) -> dict[str, Any]:
    """UniverSeg (Butoi et al. 2023) in context: the labelled images are the adapter, nothing is trained.

    select : which images (default 64 at most): drawn ("uniform"), or spread over the features of `encoder` ("k_centre").
    roi : "shown" takes only images that show a class; "any" also others, which pays where slices without it are asked for.
    soft : labels as each pixel's share of a class after resizing. storage : 8 bits compressed, or the file's dtype.
    """
    items = chosen(run, select, roi, encoder)
    parts = in_context(run, items, soft=soft, storage=storage)
    return run.keep("universeg", parts, settings={"select": select, "roi": roi, "soft": soft, "storage": storage})


@recipe("universeg_tune", backbone=STARTER, augment="fresh", steps=150, batch=1, axis="axial")
def universeg_tune(
    run: Run,
    *,
    method: Method = "lora",
    targets: str | None = None,
    rank: int = 8,
    alpha: float = 16.0,
    others: int | None = None,
    select: Select = "uniform",
    roi: Region = "any",
    storage: Storage = "png",
    encoder: str = ENCODER,
    lr: float = 2e-3,
    weight_decay: float = 0.01,
) -> dict[str, Any]:
    """UniverSeg tuned on its own support set: each step asks for one pair, shown the others.

    method : LoRA on the decoder's kernels, "scale_shift" on them, or a "tuned" copy of the last block and the output; `targets`
    (comma separated) name other kernels. Views turn and light query and support alike. others : pairs shown in a step (default: all but the query). Needs two pairs or more.
    """
    run.seeded()
    items = chosen(run, select, roi, encoder)
    parts = in_context(run, items, soft=False, storage=storage)
    head = parts.pop("head")
    parts |= {method: tuning(run, method, targets, rank=rank, alpha=alpha), "head": head}
    views = run.views if run.augment == "bank" else None
    augment = None if run.augment == "none" else Augment(run.seed, views, blur=run.blur, colour=run.colour)
    episodes = Episodes(
        run.dataset, items, run.frozen, run.goal, others=others, seed=run.seed, augment=augment, crop=run.crop
    )
    options = FitOptions(
        run.steps_or(EPOCHS),
        lr=lr,
        weight_decay=weight_decay,
        warmup=10,
        accumulate=run.batch,
        seed=run.seed,
        precision=run.precision,
    )
    settings: dict[str, Any] = {"method": method, "others": episodes.others, "select": select, "roi": roi}
    if method == "lora":
        settings |= {"rank": rank, "alpha": alpha}
    return run.train(
        "universeg_tune",
        parts,
        options,
        settings=settings,
        batches=episodes,
        stand_in={"support": episodes.entering},
    )


def chosen(run: Run, select: str, roi: str, encoder: str) -> list[Item]:
    """The labelled items of the support set, which the run takes as its own. Raises BadCall, BadData."""
    if run.task != "segment":
        raise BadCall("UniverSeg segments; for classification from labelled images use gpt4mia")
    if "support" not in run.frozen.sites:
        raise BadCall(
            f"{run.frozen.spec.id} does not segment in context; leave --backbone away, or give a UniverSeg: {STARTER}"
        )
    frozen = load_backbone(encoder).to(run.where) if select == "k_centre" else None
    run.learn_from(choose(run.dataset, run.shots, run.seed, select=select, roi=roi, encoder=frozen))  # type: ignore[arg-type]
    return run.support


def in_context(run: Run, items: Sequence[Item], *, soft: bool, storage: str) -> dict[str, Part]:
    """The support set of some items, and the head that reads the network's answer out."""
    spec = run.frozen.spec
    prepare = Preprocessing(spec.image_size, spec.mean, spec.std, crop=run.crop)
    images, labels = pairs(run.dataset, items, run.frozen, prepare, soft=soft)
    support = Support.on(run.frozen, run.goal, images=images, labels=labels, soft=soft, storage=storage)
    return {"support": support, "head": ContextHead.on(run.frozen, run.goal)}


def tuning(run: Run, method: str, targets: str | None, *, rank: int, alpha: float) -> Part:
    """The part that is trained, on the decoder's kernels or on those named. Raises UnknownName."""
    blocks = sorted({name.rpartition(".")[0] for name in run.frozen.sites if name.startswith("decoder.")})
    usual = f"{blocks[-1]}.*,out" if method == "tuned" else "decoder.*"
    where = (targets or usual).split(",")
    if method == "lora":
        return LoRA.on(run.frozen, run.goal, targets=where, rank=rank, alpha=alpha)
    if method == "scale_shift":
        return ScaleShift.on(run.frozen, run.goal, targets=where)
    if method == "tuned":
        return Tuned.on(run.frozen, run.goal, targets=where)
    raise unknown("way to tune", method, get_args(Method))
