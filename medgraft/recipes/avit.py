"""AViT: bottlenecks after attention and MLP, tuned norms, a shallow CNN's prompt, an ASPP decoder.

Du, Bayasi, Hamarneh, Garbi 2023, "AViT: Adapting Vision Transformers for Small Skin Lesion Segmentation Datasets" (isic-avit).
Defaults are the paper's: AdamW, lr 1e-4, weight decay 0.05, batch 16, 200 epochs, 224 px, the rate halved every 50 epochs,
BCE + Dice 1:1, augmentation with p = 0.5 each. `form="code"` is the authors' adapter (inner skip, zero start); "paper" prints it.
Where we differ: scores are of a held-out split, image by image (the authors choose the epoch on the test fold).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..adapters import ASPPHead, Bottleneck, Part, PromptGenerator, Task, Tuned
from ..adapters.aspp_head import PROMPT_WIDTH
from ..backbones import Backbone
from ..errors import BadCall
from ..training.fit import FitOptions
from .registry import recipe
from .run import Run

EPOCHS = 200
DROP_PATH = 0.2


def avit_parts(
    backbone: Backbone, task: Task, *, form: str = "code", drop_path: float = DROP_PATH, site_parts: bool = True
) -> dict[str, Part]:
    """The parts of AViT on any ViT or Swin; on a Swin the decoder reads the third level, as the paper does."""
    swin = len(backbone.spec.widths) > 1
    level = 2 if swin else -1
    parts: dict[str, Part] = {}
    if site_parts:
        parts["bottleneck"] = Bottleneck.on(backbone, task, form=form, drop_path=drop_path)
        parts["norms"] = Tuned.on(backbone, task, targets=["*.norm1", "*.norm2"])
    parts["prompt"] = PromptGenerator.on(backbone, task)
    parts["decoder"] = ASPPHead.on(backbone, task, level=level, prompt=PROMPT_WIDTH)
    return parts


@recipe("avit", steps=None, batch=16, augment="fresh", image_size=224)
def avit(
    run: Run,
    *,
    lr: float = 1e-4,
    weight_decay: float = 0.05,
    form: Literal["code", "paper"] = "code",
    drop_path: float = DROP_PATH,
    site_parts: bool = True,
    resnet34: str | None = None,
) -> dict[str, Any]:
    """AViT (Du et al. 2023): adapters in every block, tuned norms, a CNN prompt and an ASPP decoder.

    form : the authors' adapter ("code") or the printed equation ("paper"). site_parts : False trains prompt and decoder alone.
    resnet34 : a torchvision ResNet-34 state dict (.pth) whose first stage starts the prompt generator, as in the paper.
    """
    if run.task != "segment":
        raise BadCall("avit segments; for classification use lora, bottleneck, vpt, ssf or linear_probe")
    run.seeded()
    parts = avit_parts(run.frozen, run.goal, form=form, drop_path=drop_path, site_parts=site_parts)
    if resnet34 is not None:
        from pathlib import Path

        from ..backbones.checkpoint import read_tensors

        generator = parts["prompt"]
        assert isinstance(generator, PromptGenerator)
        generator.load_resnet34(read_tensors(Path(resnet34)))
    options = FitOptions(
        run.steps_or(EPOCHS),
        lr=lr,
        weight_decay=weight_decay,
        schedule="halving",
        seed=run.seed,
        precision=run.precision,
    )
    return run.train("avit", parts, options, settings={"form": form, "drop_path": drop_path, "site_parts": site_parts})


def load_authors(parts: Mapping[str, Part], state: Mapping[str, Tensor]) -> None:
    """Copy an AViT checkpoint with the authors' key names (ViT form) into `avit_parts`. Raises BadCall for keys that do not fit.

    encoder.blocks.I.adapter{1,2}.0.D_fc{1,2}, encoder.blocks.I.norm{1,2}, prompt_encoder.*, aspp.*, final_conv.*
    """
    wanted: dict[str, tuple[Part, str]] = {}
    branch = {"attn": "adapter1", "mlp": "adapter2"}
    layer = {"down": "D_fc1", "up": "D_fc2"}
    for name, part in parts.items():
        for key in part.tensors():
            pieces = key.split(".")
            if name == "bottleneck":
                theirs = f"encoder.blocks.{pieces[1]}.{branch[pieces[2]]}.0.{layer[pieces[3]]}.{pieces[4]}"
            elif name == "norms":
                theirs = f"encoder.{key}"
            else:
                theirs = f"prompt_encoder.{key}" if name == "prompt" else key
            wanted[theirs] = (part, key)
    missing = [theirs for theirs in wanted if theirs not in state]
    if missing:
        raise BadCall(
            f"not an AViT checkpoint for this backbone: {len(missing)} of {len(wanted)} tensors are missing, such as {missing[0]}"
        )
    with torch.no_grad():
        for theirs, (part, key) in wanted.items():
            mine = part.tensors()[key]
            if mine.shape != state[theirs].shape:
                raise BadCall(
                    f"{theirs} is {tuple(state[theirs].shape)}, {tuple(mine.shape)} is wanted; another backbone or number of classes?"
                )
            mine.copy_(state[theirs])
