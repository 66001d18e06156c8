"""AViT's decoder and prompt generator.

    P = stem(I)                                    PromptGenerator: (B, 3, H, W) -> (B, 64, H / 4, W / 4), the first stage of a ResNet-34
    D = ASPP(F)                                    rates 6, 12, 18, a 1x1 and image pooling, 256 channels each, projected to 256
    logits = up(conv1(conv3(conv3(cat(P, up(D))))))    3x3 to 64 twice with batch norm, 1x1 to K; D is brought to H / 4 first

F is the last map before the backbone's final norm, which AViT builds and never applies. Upsampling is bilinear without aligned
corners. In training the image-pooling branch normalises over the batch, so a batch needs two images.

Source: Du et al. 2023 (AViT) section 2; ASPP: Chen et al. 2017 (arXiv:1706.05587), torchvision's module; sizes from the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock
from torchvision.models.segmentation.deeplabv3 import ASPP

from ..backbones.base import Backbone
from ..backbones.state import Features
from ..errors import BadCall
from .heads import check_width, map_width
from .part import Readout, part
from .task import Task

PROMPT_WIDTH = 64


def fan_out_init(module: nn.Module) -> None:
    """Convolutions N(0, 2 / fan_out), the authors' start."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels // m.groups
            nn.init.normal_(m.weight, std=math.sqrt(2 / fan_out))
            if m.bias is not None:
                nn.init.zeros_(m.bias)


@part("prompt_generator")
class PromptGenerator(Readout):
    """The first stage of a ResNet-34 on the image, for a decoder to read. See the top of the file."""

    makes_logits = False

    def __init__(self, sites: Mapping[str, Sequence[int]], channels: int = 3, dropout: float = 0.1) -> None:
        super().__init__(sites, channels=channels, dropout=dropout)
        self.conv1 = nn.Conv2d(channels, PROMPT_WIDTH, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(PROMPT_WIDTH)
        self.layer1 = nn.Sequential(*(BasicBlock(PROMPT_WIDTH, PROMPT_WIDTH) for _ in range(3)))
        self.dropout = dropout
        fan_out_init(self)

    @classmethod
    def on(cls, backbone: Backbone, task: Task, *, dropout: float = 0.1) -> PromptGenerator:
        """Drawn weights. `load_resnet34` puts ImageNet's there."""
        return cls({}, channels=backbone.spec.channels, dropout=dropout)

    @property
    def why_not_silent(self) -> str:
        """The reason."""
        return "it adds a map, read by the decoder, that the backbone does not have"

    def check(self, backbone: Backbone) -> None:
        """The image must have the generator's channels."""
        if self.conv1.in_channels != backbone.spec.channels:
            raise BadCall(
                f"this {self.kind} was made for images of {self.conv1.in_channels} channels; {backbone.spec.id} takes {backbone.spec.channels}"
            )

    def load_resnet34(self, state: Mapping[str, Tensor]) -> None:
        """Copy conv1, bn1 and layer1 of a torchvision ResNet-34 state dict. Raises BadCall for another layout."""
        own = {name: t for name, t in state.items() if name.startswith(("conv1.", "bn1.", "layer1."))}
        try:
            self.load_state_dict(own)
        except RuntimeError as misfit:
            raise BadCall(f"not the first stage of a ResNet-34: {str(misfit).splitlines()[-1].strip()}") from None

    def read(self, features: Features, image: Tensor) -> Features:
        """The features with a map called `prompt`."""
        x = image.expand(-1, self.conv1.in_channels, -1, -1) if image.shape[1] == 1 else image
        x = x.to(self.conv1.weight.dtype)  # computed in the decoder's precision, whatever the backbone's
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return features.with_extra(prompt=functional.dropout2d(self.layer1(x), self.dropout, self.training))


@part("aspp_head")
class ASPPHead(Readout):
    """AViT's decoder; reads the prompt where a PromptGenerator stands before it. See the top of the file.

    level : which map it reads (-1: the last one, before the final norm). prompt : channels of the prompt, 0 for none.
    """

    def __init__(
        self,
        sites: Mapping[str, Sequence[int]],
        width: int,
        outputs: int,
        level: int = -1,
        prompt: int = 0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(sites, width=width, outputs=outputs, level=level, prompt=prompt, dropout=dropout)
        self.level, self.prompt = level, prompt
        self.aspp = ASPP(width, [6, 12, 18], 256)
        self.aspp.project[3] = nn.Dropout(dropout)
        self.final_conv = nn.Sequential(
            nn.Conv2d(256 + prompt, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, outputs, 1),
        )
        fan_out_init(self)

    @classmethod
    def on(cls, backbone: Backbone, task: Task, *, level: int = -1, prompt: int = 0, dropout: float = 0.1) -> ASPPHead:
        """A decoder for the task on the backbone's map `level`."""
        return cls(
            {}, width=map_width(backbone, level), outputs=task.outputs, level=level, prompt=prompt, dropout=dropout
        )

    def check(self, backbone: Backbone) -> None:
        """The map must be there and have the head's width."""
        check_width(self, backbone, self.config["width"], map_width(backbone, self.level))

    def read(self, features: Features, image: Tensor) -> Tensor:
        """-> logits (B, K, H, W)."""
        f = features.raw if self.level == -1 else features.maps[self.level]
        own: Any = self.final_conv[0]  # its weight is a parameter, or a buffer in `host.fixed(...)`
        f = f.to(own.weight.dtype)
        if self.training and f.shape[0] < 2:
            raise BadCall(
                "ASPPHead trains with batch statistics, which one image does not have; use a batch of two or more"
            )
        quarter = [max(1, side // 4) for side in image.shape[-2:]]
        d = functional.interpolate(self.aspp(f), quarter, mode="bilinear", align_corners=False)
        if self.prompt:
            if "prompt" not in features.extra:
                raise BadCall("this ASPPHead was built to read a prompt; put a PromptGenerator before it")
            d = torch.cat([features.extra["prompt"], d], 1)
        return functional.interpolate(self.final_conv(d), image.shape[-2:], mode="bilinear", align_corners=False)
