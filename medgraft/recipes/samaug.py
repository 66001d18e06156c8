"""SAMAug: what a frozen SAM finds in a picture, added to the picture, and a small U-Net that sees both.

Source: Zhang et al. 2023; see `adapters.samaug` for the two forms. Where the code takes one optimiser step on raw pictures and one on
augmented ones, both losses are summed here as in the paper, equation 2. The paper's rate, 5e-4, is for 50,000 steps of 256 pixel crops.
"""

from __future__ import annotations

from typing import Any

from ..adapters.samaug import Choice, Form, SamAug
from ..errors import BadCall
from ..training.fit import FitOptions
from ..training.samaug import TwoPictures
from .parameter_efficient import EPOCHS
from .registry import recipe
from .run import Run


@recipe("samaug", backbone="medgraft:starter-sam", views=4)
def samaug(
    run: Run,
    *,
    form: Form = "paper",
    choose: Choice = "entropy",
    points: int = 32,
    quality: float = 0.5,
    stability: float = 0.95,
    overlap: float = 0.5,
    offset: float = 1.0,
    channels: str = "16-32-64-128",
    raw: float = 1.0,
    augmented: float = 1.0,
    lr: float = 2e-3,
    weight_decay: float = 0.0,
) -> dict[str, Any]:
    """A U-Net on pictures and on pictures with SAM's masks drawn in.

    points: of the grid, a side; each picture costs their square in decoder calls. quality, stability: what a mask must
    reach, its estimated IoU and its IoU with itself when the threshold moves by `offset`; the authors' are for a SAM of full size.
    raw, augmented: the weights of the two losses. choose: between the two answers by entropy, take their mean, or the augmented one.
    """
    if run.task != "segment":
        raise BadCall("samaug segments; use linear_probe to classify")
    if run.augment == "fresh":
        raise BadCall("samaug wants views that come back, since SAM's masks cost much: --augment bank, or none")
    widths = channels.split("-")
    if not all(width.isdecimal() for width in widths):
        raise BadCall(f"channels are those of the U-Net's levels, such as 16-32-64-128; got {channels!r}")
    run.seeded()
    part = SamAug.on(
        run.frozen,
        run.goal,
        channels=[int(width) for width in widths],
        points=points,
        quality=quality,
        stability=stability,
        overlap=overlap,
        offset=offset,
        form=form,
        choose=choose,
    )
    steps = run.steps_or(EPOCHS)
    options = FitOptions(
        steps, lr=lr, weight_decay=weight_decay, warmup=min(20, steps // 10), seed=run.seed, precision=run.precision
    )
    both = TwoPictures(part, raw, augmented)
    done = run.train(
        "samaug",
        {"unet": part},
        options,
        settings={"form": form, "choose": choose, "raw": raw, "augmented": augmented},
        loss=both,
        forward=both.forward,
    )
    return done | {"with_masks": round(both.share_with_masks, 3)}
