"""Pretraining a 3D network on data sets that annotate different organs (Eq. 1): partial labels, masked.

    min over the network  mean_n  (1 / sum_k w_nk) sum_k w_nk Dice(Y_nk, sigmoid_k(X_n)),      w_nk: is class k annotated on volume n?

Source: Silva-Rodriguez et al. 2023 (FSEFT), section 3, Eq. 1, and section 4: SwinUNETR (48 features), 3 patches of 96^3 of each of 2
volumes a step, 120 epochs, AdamW from 1e-4, 10 epochs of warm-up, then a cosine; intensity shifts and rotations by 90 degrees.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters import LinearHead
from ..training.assemble import Assembled, assemble
from ..training.batches import Balance
from ..training.data import load_dataset
from ..training.fit import FitOptions
from ..training.partial_losses import PartialLoss
from ..training.volume_data import volumes_of
from .fseft import SWIN_UNETR, need_volumes
from .label_dropout import class_map
from .registry import recipe
from .run import Run

EPOCHS, WARMUP = 120, 10


@recipe("foundation3d", backbone=SWIN_UNETR, steps=None, batch=2, patches=3, augment="fresh")
def foundation3d(
    run: Run,
    *,
    also: str = "",
    mapping: Path | None = None,
    balance: Balance = "none",
    lr: float = 1e-4,
    weight_decay: float = 0.01,
) -> dict[str, Any]:
    """Train a whole 3D network on several data folders, each of which annotates some of the classes. Leaves a network, no adapter.

    also: more data folders, comma separated. mapping: a JSON file with harmonised class names, {"pack": {"left kidney": "kidney"}}.
    balance: see each source equally often.
    """
    need_volumes(run)
    if also or mapping:
        run.work_on(together(run, also, mapping))
    run.seeded()
    steps = run.steps_or(EPOCHS)
    options = FitOptions(
        steps,
        lr=lr,
        weight_decay=weight_decay,
        schedule="cosine",
        warmup=steps * WARMUP // EPOCHS,
        seed=run.seed,
        precision=run.precision,
    )
    return run.train(
        "foundation3d",
        {"head": LinearHead.on(run.frozen, run.goal)},
        options,
        settings={"also": also and len(also.split(",")), "balance": balance},
        network=run.frozen.trainable_copy(),
        loss=PartialLoss("sigmoid_dice"),
        partial={"partial": True, "balance": balance},
    )


def together(run: Run, also: str, mapping: Path | None) -> Assembled:
    """The run's folder and the others as one data set of volumes."""
    folders = [run.data, *(Path(folder.strip()) for folder in also.split(",") if folder.strip())]
    packs = [volumes_of(load_dataset(folder, labels=run.labels, seed=run.seed)) for folder in folders]
    return assemble(packs, None if mapping is None else class_map(mapping), classes=run.classes)
