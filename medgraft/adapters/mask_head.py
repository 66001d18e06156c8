"""The mask of a promptable decoder, as the output of a segmentation task with one class.

    z(p) = max over the questions of an image of  mask_0(p | question),      bilinear to the image's size

The decoder is the backbone's own (SAM's), adapted where the adapter's parts act at `decoder.*` sites; the head itself has no
tensors. Without a prompt the whole image is the box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn import functional

from ..backbones.base import Backbone
from ..backbones.prompts import Prompts
from ..backbones.state import Features
from ..errors import BadCall
from .part import Readout, part
from .task import Task

NOWHERE = -30.0
"""The logit of a question that only fills a row up."""


@part("mask_head")
class MaskHead(Readout):
    """See the top of the file."""

    takes_prompts = True

    def __init__(self, sites: Mapping[str, Sequence[int]], outputs: int = 1) -> None:
        super().__init__(sites, outputs=outputs)
        if outputs != 1:
            raise BadCall(
                f"a prompted mask is one class against the background, got {outputs} outputs; use class_prompts for several classes"
            )

    @classmethod
    def on(cls, backbone: Backbone, task: Task) -> MaskHead:
        """A head for the task, which must have one class. Raises BadCall."""
        check_decoder(backbone)
        return cls({}, outputs=task.outputs)

    def check(self, backbone: Backbone) -> None:
        """The backbone must have a promptable decoder."""
        check_decoder(backbone)

    def read(self, features: Features, image: Tensor) -> Tensor:
        """-> logits (B, 1, H, W)."""
        masks, _ = features.decoder(features.maps[-1], with_whole_image(features.prompts, image))
        return united(masks[:, :, 0], features.prompts, image)


def check_decoder(backbone: Backbone) -> None:
    """Raise BadCall for a backbone without a promptable decoder."""
    if not hasattr(backbone, "decoder"):
        raise BadCall(
            f"{backbone.spec.id} has no promptable decoder; use a SAM, such as medgraft:starter-sam or hf:facebook/sam-vit-base"
        )


def with_whole_image(prompts: Prompts | None, image: Tensor) -> Prompts:
    """The prompts, or a box around the whole image (B, C, H, W) where nothing is asked."""
    if prompts is not None and prompts.questions:
        return prompts
    h, w = image.shape[-2:]
    box = image.new_tensor([0.0, 0.0, w - 1.0, h - 1.0]).expand(image.shape[0], 1, 4)
    return Prompts(boxes=box, group=None if prompts is None else prompts.group)


def united(masks: Tensor, prompts: Prompts | None, image: Tensor) -> Tensor:
    """Logits (B, P, h, w) of P questions -> their maximum at the image's size, (B, 1, H, W); questions that are not real do not count."""
    if prompts is not None and prompts.real is not None:
        masks = masks.masked_fill(~prompts.real[:, :, None, None], NOWHERE)
    return functional.interpolate(masks.amax(1, keepdim=True), image.shape[-2:], mode="bilinear", align_corners=False)
