"""A click that moves by itself to where a learned scorer expects a better mask.

    p* = argmax over p_0 .. p_T of O(x, sigmoid(k m(p_t)))      p_0 the person's click, m(p) SAM's mask, logits
    p_{t+1} = Adam(p_t, dO / dp)                                through the decoder, step sizes of about `step` of the input's side

O is a small network that was trained to tell the Dice of a mask from the image and the mask. Only p changes. p_t counts only while its
mask stays in the trust region, IoU(m(p_t) > 0, m(p_0) > 0) >= `trust`, and p_t inside the picture; p_0 always counts, so that the
result's score is never below its start's. The step is 10 pixels of SAM's 1,024.

A question with several points moves them all; one without points (a box) is answered as it is; without any prompt the click is the
image's middle. Several questions are united as in
`mask_head`. The scorer's tensors are constants of the part: `training.sampot` trains them beforehand.

Source: Sathish et al. 2023 (SAMPOT, medagi-prompt-evolution); the trust region is ours, the paper asks for a safeguard.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backbones.base import Backbone
from ..backbones.prompts import Prompts
from ..backbones.state import Features
from ..errors import BadCall
from .mask_head import check_decoder, united
from .part import Readout, part
from .task import Task

WIDTHS = (16, 32, 64, 64)


class Scorer(nn.Module):
    """O: the Dice that a mask is expected to have. Five convolutions with batch norm and leaky ReLU between them, a mean, a sigmoid.

    image (R, C, H, W) as the backbone takes it, mask (R, 1, H, W) in [0, 1] -> (R,) in (0, 1). Both are brought to `side` first.
    """

    def __init__(self, channels: int = 3, side: int = 128) -> None:
        super().__init__()
        self.side = side
        layers: list[nn.Module] = []
        for before, width in zip((channels + 1, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.LeakyReLU(0.01)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(WIDTHS[-1], 1, 3, 1, 1))

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """See the class."""
        x = torch.cat([image.float(), mask.float()], 1)
        if x.shape[-2:] != (self.side, self.side):
            x = functional.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)
        for layer in self.layers:
            x = _in_float32(layer, x)
        return x.mean((1, 2, 3)).sigmoid()


def _in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer in float32 on a backbone of any type: moves of a click change the score by less than bfloat16 tells apart."""
    if isinstance(layer, nn.Conv2d):
        bias = None if layer.bias is None else layer.bias.float()
        return functional.conv2d(x, layer.weight.float(), bias, layer.stride, layer.padding)
    if isinstance(layer, nn.BatchNorm2d) and not layer.training:
        mean, var, gain, shift = (
            t if t is None else t.float() for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
        )
        return functional.batch_norm(x, mean, var, gain, shift, eps=layer.eps)
    found: Tensor = layer(x)
    return found


@dataclass(frozen=True)
class Evolved:
    """What became of the questions: (B, P) each, but for points (B, P, N, 2) and masks (B, P, 4 h, 4 w), the logits at those points."""

    points: Tensor
    masks: Tensor
    score: Tensor
    start: Tensor
    moved: Tensor


@part("evolved_prompt")
class EvolvedPrompt(Readout):
    """See the top of the file. `steps` T, `steep` k; `channels` and `side` are the scorer's."""

    takes_prompts = True

    def __init__(
        self,
        sites: Mapping[str, Sequence[int]],
        outputs: int = 1,
        channels: int = 3,
        side: int = 128,
        steps: int = 20,
        step: float = 10 / 1024,
        trust: float = 0.5,
        steep: float = 5.0,
    ) -> None:
        settings = {"steps": steps, "step": step, "trust": trust, "steep": steep}
        super().__init__(sites, outputs=outputs, channels=channels, side=side, **settings)
        if outputs != 1:
            raise BadCall(f"a prompted mask is one class against the background, got {outputs} outputs")
        if steps < 1 or step <= 0 or not 0 <= trust <= 1 or steep <= 0:
            raise BadCall(
                f"evolved_prompt wants steps >= 1, step > 0 (of the input's side), trust from 0 to 1 and steep > 0; got {settings}"
            )
        self.take(Scorer(channels, side))

    @classmethod
    def on(cls, backbone: Backbone, task: Task, *, scorer: Scorer | None = None, **settings: Any) -> EvolvedPrompt:
        """With a trained `scorer` (default: a drawn one), for a task with one class. Raises BadCall."""
        check_decoder(backbone)
        side = settings.pop("side", 128) if scorer is None else scorer.side
        made = cls({}, outputs=task.outputs, channels=backbone.spec.channels, side=side, **settings)
        if scorer is not None:
            made.take(scorer)
        return made

    def check(self, backbone: Backbone) -> None:
        """The backbone must have a promptable decoder."""
        check_decoder(backbone)

    def take(self, scorer: Scorer) -> None:
        """Hold a copy of `scorer` as constants: nothing of it is trained with the adapter, and batch norm stays as it was measured."""
        self.scorer = _constant(scorer)

    def train(self, mode: bool = True) -> EvolvedPrompt:
        """Set the mode, of all but the scorer."""
        super().train(mode)
        self.scorer.eval()
        return self

    def read(self, features: Features, image: Tensor) -> Tensor:
        """-> logits (B, 1, H, W)."""
        prompts = with_middle(features.prompts, image)
        if prompts.points is None:
            masks = features.decoder(features.maps[-1], prompts)[0][:, :, 0]
        else:
            masks = self.evolve(replace(features, prompts=prompts), image).masks
        return united(masks, prompts, image)

    def evolve(self, features: Features, image: Tensor) -> Evolved:
        """Move the points of `features.prompts`, for inputs `image` (B, C, H, W). Raises BadCall where there are none."""
        prompts = features.prompts
        if prompts is None or prompts.points is None:
            raise BadCall("only points move; give prompts with points")
        embedding, decoder = features.maps[-1].detach(), features.decoder
        b, p = prompts.points.shape[:2]
        image_rows = image.detach().repeat_interleave(p, 0)
        corner = prompts.points.new_tensor([image.shape[-1] - 1, image.shape[-2] - 1])

        def answer(points: Tensor) -> tuple[Tensor, Tensor]:
            masks = decoder(embedding, replace(prompts, points=points))[0][:, :, 0]
            sized = functional.interpolate(masks, image.shape[-2:], mode="bilinear", align_corners=False)
            steep = (self.config["steep"] * sized.float()).sigmoid()
            return masks, self.scorer(image_rows, steep.flatten(0, 1)[:, None]).unflatten(0, (b, p)).float()

        # Adam works entry by entry, so rows do not meet.
        place = prompts.points.detach().float().clone().requires_grad_()
        adam = torch.optim.Adam([place], lr=self.config["step"] * max(image.shape[-2:]))
        best = first = None
        with torch.enable_grad():
            for t in range(self.config["steps"] + 1):
                masks, score = answer(place)
                now = Evolved(
                    place.detach().clone(), masks.detach(), score.detach(), score.detach(), score.detach() < 0
                )
                if first is None or best is None:
                    first = best = now
                else:
                    inside = ((now.points >= 0) & (now.points <= corner)).flatten(2).all(2)
                    trusted = overlap(now.masks, first.masks) >= self.config["trust"]
                    best = _better(best, now, (now.score > best.score) & trusted & inside)
                if t < self.config["steps"]:
                    (place.grad,) = torch.autograd.grad(score.sum(), place)
                    place.grad.neg_()
                    adam.step()
        assert first is not None
        assert best is not None
        return replace(best, start=first.score)


def _constant(scorer: Scorer) -> Scorer:
    """A copy whose parameters are buffers, in eval mode."""
    own = copy.deepcopy(scorer).eval()
    for module in own.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, p.detach().clone())
    return own


def with_middle(prompts: Prompts | None, image: Tensor) -> Prompts:
    """The prompts, or a click in the middle of the image (B, C, H, W) where nothing is asked."""
    if prompts is not None and prompts.questions:
        return prompts
    h, w = image.shape[-2:]
    point = torch.tensor([(w - 1) / 2, (h - 1) / 2], device=image.device).expand(image.shape[0], 1, 1, 2)
    return Prompts(points=point, labels=torch.ones(point.shape[:3], dtype=torch.long, device=image.device))


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """IoU of masks given as logits (B, P, h, w), by question (B, P); 0 where the second is empty."""
    a, b = a > 0, b > 0
    return (a & b).sum((2, 3)) / (a | b).sum((2, 3)).clamp_min(1)


def _better(old: Evolved, new: Evolved, where: Tensor) -> Evolved:
    """`new` where (B, P) is true, else `old`."""
    wide = where[:, :, None, None]
    return Evolved(
        torch.where(wide, new.points, old.points),
        torch.where(wide, new.masks, old.masks),
        torch.where(where, new.score, old.score),
        old.start,
        old.moved | where,
    )
