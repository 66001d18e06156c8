"""A second frozen encoder beside SAM's: what both see is put together and reduced to the embedding that the decoder takes.

    h = [F_s(x) | F_p(x)]                                        on channels; F_s before its own neck, (B, C_s, h, w); F_p (B, C_p, h, w)
    embedding = LN conv3x3 LN conv1x1 h                          to SAM's C channels; convolutions without bias, LN over channels

F_p is any ViT of the house, found by its id and known by its fingerprint; it is not stored. It sees the image in its own normalisation,
at the size that gives it as many patches as SAM has, and computes in its own precision. SAM's own neck is not used.

Source: Zhang et al. 2023 (SAM-Path) section 2.1; the neck from the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.convnext import LayerNorm2d

from ..backbones import load_backbone
from ..backbones.base import Backbone
from ..backbones.sites import following
from ..backbones.state import Features, State
from ..errors import BadCall, MedgraftError, WrongBackbone
from .class_prompts import decoder_of
from .heads import check_width
from .part import Readout, part
from .task import Task

SECOND = "second"
"""The name under which a state may carry F_p(x), where it is known already."""


class Shared:
    """A frozen encoder outside the module tree: neither stored nor trained, and one for all copies of a part."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self


@part("fusion")
class Fusion(Readout):
    """See the top of the file.

    encoder, fingerprint : the second encoder.   widths : C_s, C_p, C.   stride, patch : input pixels a place of F_s and of F_p.
    gain, shift : per channel, from SAM's normalisation to the second encoder's.
    """

    makes_logits = False

    def __init__(
        self,
        sites: Mapping[str, Sequence[int]],
        encoder: str,
        fingerprint: str,
        widths: Sequence[int],
        stride: int,
        patch: int,
        gain: Sequence[float],
        shift: Sequence[float],
    ) -> None:
        super().__init__(
            sites,
            encoder=encoder,
            fingerprint=fingerprint,
            widths=list(widths),
            stride=stride,
            patch=patch,
            gain=list(gain),
            shift=list(shift),
        )
        first, second, out = widths
        self.neck = nn.Sequential(
            nn.Conv2d(first + second, out, 1, bias=False),
            LayerNorm2d(out, eps=1e-6),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            LayerNorm2d(out, eps=1e-6),
        )
        self._second: Shared | None = None

    @classmethod
    def on(cls, backbone: Backbone, task: Task, *, encoder: str | Backbone = "medgraft:starter-vit") -> Fusion:
        """A drawn neck for SAM's encoder and `encoder`, a backbone or the id of one. Raises BadCall."""
        second = load_backbone(encoder) if isinstance(encoder, str) else encoder
        decoder = decoder_of(backbone)
        one, two = backbone.spec, second.spec
        if two.dims != 2 or one.channels != two.channels:
            raise BadCall(f"{two.id} does not see what {one.id} sees: another number of channels or axes; take a ViT")
        own = cls(
            {},
            encoder=two.id,
            fingerprint=two.fingerprint,
            widths=[decoder.network.vision_encoder.config.hidden_size, two.width, one.width],
            stride=one.divisor,
            patch=two.strides[-1],
            gain=[a / b for a, b in zip(one.std, two.std, strict=True)],
            shift=[(a - b) / s for a, b, s in zip(one.mean, two.mean, two.std, strict=True)],
        )
        own.use(second)
        return own

    def use(self, encoder: Backbone) -> None:
        """Take this loaded backbone as the second encoder. Raises WrongBackbone for one of other weights."""
        made_for, here = self.config["fingerprint"], encoder.spec
        if here.fingerprint != made_for:
            raise WrongBackbone(
                f"the second encoder of this adapter is {self.config['encoder']} (fingerprint {made_for[:12]}), {here.title} has "
                f"{here.fingerprint[:12]}; load the one that it was made with and give it to Fusion.use"
            )
        self._second = Shared(encoder)

    @property
    def second(self) -> Backbone:
        """The second encoder, loaded by its id where none was given. Raises BadCall where it cannot be had, WrongBackbone."""
        if self._second is None:
            try:
                found = load_backbone(self.config["encoder"])
            except MedgraftError as refused:
                raise BadCall(
                    f"this adapter also sees through {self.config['encoder']}, which cannot be loaded ({refused}); "
                    "load it yourself and give it to Fusion.use"
                ) from None
            self.use(found)
        assert self._second is not None
        return self._second.backbone

    @property
    def why_not_silent(self) -> str:
        """The reason."""
        return "its neck takes the place of SAM's own"

    def check(self, backbone: Backbone) -> None:
        """Widths and strides must be those that it was made for, and the second encoder must be there."""
        first, _, out = self.config["widths"]
        check_width(self, backbone, first, decoder_of(backbone).network.vision_encoder.config.hidden_size)
        check_width(self, backbone, out, backbone.spec.width)
        if self.config["stride"] != backbone.spec.divisor:
            raise BadCall(
                f"this fusion was made for patches of {self.config['stride']} pixels; {backbone.spec.id} has {backbone.spec.divisor}"
            )
        _ = self.second

    def prepared(self, image: Tensor) -> Tensor:
        """Images as SAM takes them (B, 3, H, W) -> as the second encoder does, in its precision, with as many patches."""
        second = self.second
        like = next(second.parameters())
        gain, shift = (image.new_tensor(self.config[name])[:, None, None] for name in ("gain", "shift"))
        x = (image * gain + shift).to(like.dtype)
        sides = [side // self.config["stride"] * self.config["patch"] for side in image.shape[-2:]]
        size = second.spec.fitting(sides)
        return x if size == x.shape[-2:] else functional.interpolate(x, size, mode="bilinear", antialias=True)

    @torch.no_grad()
    def seen(self, image: Tensor | State) -> Tensor:
        """F_p(x) (B, C_p, h', w') of what `prepared` made, or of the second encoder's state after its last stage."""
        second = self.second
        if next(second.parameters()).device != (x := image.x if isinstance(image, State) else image).device:
            second.to(x.device)
        with following(None), torch.autocast(x.device.type, enabled=False):
            features = second.run(image)
        assert isinstance(features, Features)
        return features.maps[-1]

    def read(self, features: Features, image: Tensor) -> Features:
        """The features with the reduced embedding (B, C, h, w) in the place of SAM's."""
        first = features.extra["encoder"]
        second = features.extra[SECOND] if SECOND in features.extra else self.seen(self.prepared(image))
        if second.shape[-2:] != first.shape[-2:]:
            second = functional.interpolate(second, first.shape[-2:], mode="bilinear", align_corners=False)
        like = cast("Tensor", self.neck[0].weight)
        embedding = self.neck(torch.cat([first.to(like.dtype), second.to(like.dtype)], 1)).to(features.maps[-1].dtype)
        return replace(features, maps=[*features.maps[:-1], embedding])

    def load_authors(self, state: Mapping[str, Tensor]) -> None:
        """Copy `fusion_neck.*` of a SAM-Path checkpoint, under any prefix. Raises BadCall for another layout."""
        own = {name.split("fusion_neck.", 1)[1]: t for name, t in state.items() if "fusion_neck." in name}
        try:
            self.neck.load_state_dict(own)
        except RuntimeError as misfit:
            raise BadCall(
                f"not the fusion neck of SAM-Path for these encoders: {str(misfit).splitlines()[-1].strip()}"
            ) from None
