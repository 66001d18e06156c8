"""Pretrain the starter SAM on procedural phantoms, on a laptop, in under an hour.

    python -m medgraft.recipes.starter_sam medgraft/weights/starter_sam.safetensors

Its image encoder is that of `medgraft:starter-vit`, whose first blocks stay as they are. Neck, prompt encoder and mask decoder begin
at random and look at an endless stream of `phantom`s. A question is one thing of a picture, asked by a box with jitter or by a point;
then follow clicks at random places of what the last answer got wrong, often with that answer's logits as a mask prompt. In each round

    loss = L(mask 0) + min over masks 1-3 of L(mask i) + mean over masks of (estimated IoU - IoU)^2,      L = 20 focal + Dice

Mask 0 is the answer to go on from; the other three may differ where a point is ambiguous.
Source: Kirillov et al. 2023 (arXiv:2304.02643), appendix A, which trains the single mask on more than one prompt only.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.ops import sigmoid_focal_loss
from transformers.models.sam.modeling_sam import SamAttention

from ..backbones import Features, State, load_backbone
from ..backbones.prompts import Prompts
from ..backbones.sam import LEAVES, Sam
from ..backbones.sam_decoder import SamDecoder
from ..backbones.sam_source import random_sam
from ..errors import BadCall, Diverged
from ..training.phantoms import REGIONS, Phantom, phantom
from .script import keep, main, ship

SIZE = 128
SMALLEST = 24
"""Pixels that a thing must have to be asked for."""


def starter_sam(
    out: Path,
    *,
    steps: int = 5600,
    batch: int = 4,
    questions: int = 4,
    rounds: int = 3,
    blocks: int = 2,
    seed: int = 0,
    lr: float = 7e-4,
    encoder_lr: float = 1e-4,
    warmup: int = 100,
    cooldown: float = 0.7,
    save_every: int = 100,
    resume: bool = True,
    threads: int = 0,
) -> Path:
    """Pretrain, write the weights to `out` (fp16 safetensors, transformers' names), and return `out`.

    A step is `batch` pictures with `questions` questions each, asked `rounds` times. The last `blocks` blocks of the encoder train
    too, at `encoder_lr`. Muon moves the decoder's matrices, AdamW the rest; the rate rises for `warmup` steps, stays, and falls to zero
    over the last `cooldown` share of the steps. A checkpoint beside `out` (`.resume.pt`) is written every `save_every` steps; with
    `resume` an interrupted run goes on from it as if it had not stopped, and may be given fewer or more `steps` while the rate is
    level. Logged to `.log.jsonl`.
    """
    if min(steps, batch, questions, rounds) < 1:
        raise BadCall(
            f"steps, batch, questions and rounds must be at least 1, got {steps=}, {batch=}, {questions=}, {rounds=}"
        )
    if threads:
        torch.set_num_threads(threads)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint, log = out.with_suffix(".resume.pt"), out.with_suffix(".log.jsonl")

    model = newborn(seed)
    if not 0 <= blocks <= model.depth:
        raise BadCall(f"blocks is the number of last blocks that train, 0 to {model.depth}; got {blocks}")
    network = model.network
    encoder = [p for layer in network.vision_encoder.layers[model.depth - blocks :] for p in layer.parameters()]
    rest = [network.vision_encoder.neck, network.mask_decoder, network.prompt_encoder]
    fourier = network.shared_image_embedding.positional_embedding
    others = [p for module in rest for p in module.parameters() if p is not fourier]
    for p in encoder + others:
        p.requires_grad_(True)
    hidden = [p for name, p in network.mask_decoder.named_parameters() if p.ndim == 2 and "_token" not in name]
    chosen = {id(p) for p in hidden}
    free = [p for p in others if id(p) not in chosen]
    groups = [{"params": free}, {"params": encoder}]
    optimisers = {
        "muon": torch.optim.Muon(hidden, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    }
    rates = {"muon": (lr,), "adamw": (lr, encoder_lr)}
    begun = 0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        for name, optimiser in optimisers.items():
            optimiser.load_state_dict(state[name])
        begun = state["step"]
    elif log.exists():
        log.unlink()

    clock, shown = time.perf_counter(), []
    for step in range(begun, steps):
        share = min((step + 1) / warmup, 1, (steps - step) / (cooldown * steps))
        for name, optimiser in optimisers.items():
            for group, rate in zip(optimiser.param_groups, rates[name], strict=True):
                group["lr"] = share * rate
        dice = Generator().manual_seed(seed * 1_000_003 + step)
        first = seed * 10_000_000 + step * batch
        drawn = [phantom(first + k, size=SIZE) for k in range(batch)]
        pictures, things = posed(drawn, questions, dice, model)
        with torch.autocast("cpu", torch.bfloat16):
            embedding = _embedding(model, pictures, blocks)
        with sdpa_kernel(SDPBackend.MATH):  # the CPU's fused attention is slow backwards for a handful of tokens
            loss, overlaps = _dialogue(model.decoder, embedding, things, rounds, dice)
        if not torch.isfinite(loss):
            raise Diverged(f"the loss at step {step} is {loss.item()}; lower lr (now {lr}) and run again")
        for optimiser in optimisers.values():
            optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder + others, 1.0)
        for optimiser in optimisers.values():
            optimiser.step()

        shown.append([loss.item(), *overlaps])
        if (step + 1) % 20 == 0 or step == steps - 1:
            means = [round(value, 4) for value in torch.tensor(shown).mean(0).tolist()]
            line = {"step": step + 1, "loss": means[0], "iou": means[1:]}
            line |= {"seconds": round(time.perf_counter() - clock, 1), "threads": torch.get_num_threads()}
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            shown = []
        if (step + 1) % save_every == 0 and step + 1 < steps:
            state = {"network": network.state_dict(), "step": step + 1}
            keep(state | {name: optimiser.state_dict() for name, optimiser in optimisers.items()}, checkpoint)

    facts = {"name": "medgraft:starter-sam", "trained_on": "procedural phantoms only", "license": "Apache-2.0"}
    facts |= {"steps": str(steps), "batch": str(batch), "questions": str(questions), "rounds": str(rounds)}
    facts |= {"blocks": str(blocks), "seed": str(seed), "lr": str(lr), "encoder_lr": str(encoder_lr)}
    ship(network.state_dict(), out, facts)
    checkpoint.unlink(missing_ok=True)
    return out


def newborn(seed: int) -> Sam:
    """The starter's architecture with the encoder of `medgraft:starter-vit`, everything else drawn from `seed`.

    The ViT's class token and final norm have no place in a SAM and are left out; relative positions are zero. The ViT wants mean
    and deviation 0.5, SAM ImageNet's: the difference is folded into the patch embedding.
    """
    model = random_sam("random:sam:starter", "starter", seed, None)
    vit = load_backbone("medgraft:starter-vit")
    theirs, encoder = vit.network.state_dict(), model.network.vision_encoder
    own = {
        f"layers.{i}.{LEAVES[leaf]}.{kind}": theirs[f"blocks.{i}.{leaf}.{kind}"]
        for i in range(model.depth)
        for leaf in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    }
    side = SIZE // vit.spec.divisor
    own["pos_embed"] = theirs["pos_embed"][:, 1:].unflatten(1, (side, side))
    (mean, std), (m, s) = ([torch.tensor(v) for v in (spec.mean, spec.std)] for spec in (vit.spec, model.spec))
    kernel = theirs["patch_embed.proj.weight"]
    own["patch_embed.projection.weight"] = kernel * (s / std)[:, None, None]
    own["patch_embed.projection.bias"] = theirs["patch_embed.proj.bias"] + (kernel.sum((2, 3)) @ ((m - mean) / std))
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            if "rel_pos" in name:
                tensor.zero_()
        _begin_near(model)
    encoder.load_state_dict(own | {n: t for n, t in encoder.state_dict().items() if "rel_pos" in n or "neck" in n})
    return model


def _begin_near(model: Sam) -> None:
    """A decoder whose answer begins near the prompt, and undecided; one drawn at random still answered nothing after 400 steps.

    Where queries and keys have the same weights, a place attends to its like; tokens of unit size, as SAM's, mark what attends to them.
    """
    decoder, encoder = model.network.mask_decoder, model.network.prompt_encoder
    for name, module in decoder.named_modules():
        if isinstance(module, SamAttention) and "self" not in name:
            module.k_proj.weight.copy_(module.q_proj.weight.mul_(1.7))
    for mlp in decoder.output_hypernetworks_mlps:
        mlp.proj_out.weight.mul_(0.1)
    for table in (decoder.iou_token, decoder.mask_tokens, encoder.not_a_point_embed, *encoder.point_embed):
        table.weight.mul_(table.embedding_dim**0.5)


def posed(drawn: list[Phantom], questions: int, dice: Generator, model: Sam) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, S, S), normalised, and what is asked for in each: bool (B, P, S, S). Now and then a picture is cut and padded."""
    mean, std = torch.tensor(model.spec.mean), torch.tensor(model.spec.std)
    pictures, things = [], []
    for one in drawn:
        picture = (torch.from_numpy(one.image).float() / 255 - mean) / std
        instance, region = torch.from_numpy(one.instance).int(), torch.from_numpy(one.region).int()
        if _chance(dice, 0.3):  # as an oblong picture comes, padded with zeros to the right or below
            end = int(SIZE * (0.5 + 0.5 * torch.rand((), generator=dice)))
            cut = (slice(None), slice(end, None)) if _chance(dice, 0.5) else slice(end, None)
            picture[cut], instance[cut], region[cut] = 0, 0, 0
        pictures.append(picture.permute(2, 0, 1))
        things.append(torch.stack([_thing(instance, region, dice) for _ in range(questions)]))
    return torch.stack(pictures), torch.stack(things)


def _thing(instance: Tensor, region: Tensor, dice: Generator) -> Tensor:
    """One thing of the picture, or all there is of one kind; what lies behind, where there is no thing of some size."""
    behind = REGIONS.index("outside")
    for labels, lowest in ((region, behind + 1), (instance, 1))[0 if _chance(dice, 0.2) else 1 :]:
        sizes = torch.bincount(labels.flatten())
        found = [k for k in range(lowest, len(sizes)) if sizes[k] >= SMALLEST]
        if found:
            return labels == found[int(torch.randint(len(found), (), generator=dice))]
    return region <= behind


def _embedding(model: Sam, pictures: Tensor, blocks: int) -> Tensor:
    """(B, C, h, w) float32, with gradients for the last `blocks` blocks and the neck."""
    with torch.no_grad():
        frozen = model.run(pictures, stop=model.depth - blocks)
    assert isinstance(frozen, State)
    features = model.run(frozen)
    assert isinstance(features, Features)
    return features.maps[-1].float()


def _dialogue(
    decoder: SamDecoder, embedding: Tensor, things: Tensor, rounds: int, dice: Generator
) -> tuple[Tensor, list[float]]:
    """The loss of a conversation over `things` (B, P, S, S), and the mean IoU of mask 0 after each round."""
    side = 4 * embedding.shape[-1]
    truth = F.adaptive_avg_pool2d(things.float(), side) >= 0.5
    prompts = Prompts(boxes=_boxes(things, dice)) if _chance(dice, 0.5) else _clicked(Prompts(), truth, truth, dice)
    total, overlaps = embedding.new_zeros(()), []
    for _ in range(rounds):
        with torch.autocast("cpu", torch.bfloat16):
            masks, quality = _four(decoder, embedding, prompts)
        loss, overlap = _loss(masks.float(), quality.float(), truth)
        total = total + loss
        overlaps.append(overlap)
        answer = masks[:, :, 0].detach().float()
        prompts = _clicked(prompts, truth ^ (answer > 0), truth, dice)
        prompts = replace(prompts, masks=answer if _chance(dice, 0.7) else None)
    return total / rounds, overlaps


def _four(decoder: SamDecoder, embedding: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """All four masks (B, P, 4, h, w) and their estimated IoU (B, P, 4), in one pass."""
    decoded, p = decoder.decode(embedding, prompts)
    masks = decoder.masks_of(decoded, range(decoder.masks.num_mask_tokens))
    quality = decoder.masks.iou_prediction_head(decoded.tokens[:, 0])
    return masks.unflatten(0, (-1, p)), quality.unflatten(0, (-1, p))


def _loss(masks: Tensor, quality: Tensor, truth: Tensor) -> tuple[Tensor, float]:
    """See the top of the file, focal without class weights; and the mean IoU of mask 0."""
    wanted = truth[:, :, None].expand_as(masks).float()
    focal = sigmoid_focal_loss(masks, wanted, alpha=0.5).mean((3, 4))
    p = masks.sigmoid()
    soft = 1 - (2 * (p * wanted).sum((3, 4)) + 1) / (p.sum((3, 4)) + wanted.sum((3, 4)) + 1)
    each = 20 * focal + soft
    with torch.no_grad():
        decided, real = masks > 0, truth[:, :, None]
        iou = (decided & real).sum((3, 4)) / (decided | real).sum((3, 4)).clamp_min(1)
    loss = each[:, :, 0] + each[:, :, 1:].amin(2) + (quality - iou).square().mean(2)
    return loss.mean(), float(iou[:, :, 0].mean())


def _boxes(things: Tensor, dice: Generator, jitter: float = 0.1) -> Tensor:
    """(B, P, 4): the box of each thing, every edge moved by normal noise of `jitter` of its side, at most twice that."""
    boxes = []
    for axis in (2, 3):  # columns that are touched, then rows
        touched = things.any(axis).float()
        low, high = touched.argmax(-1), SIZE - 1 - touched.flip(-1).argmax(-1)
        edges = torch.stack([low, high], -1).float()
        noise = torch.randn(edges.shape, generator=dice).clamp(-2, 2) * jitter * (high - low + 1)[..., None]
        boxes.append((edges + noise).clamp(0, SIZE - 1))
    (x, y) = boxes
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)


def _clicked(prompts: Prompts, where: Tensor, truth: Tensor, dice: Generator) -> Prompts:
    """The prompts with one more point at random in `where` (B, P, h, w); in the thing itself, where that is empty."""
    h, w = where.shape[-2:]
    chance = torch.where(where.any((2, 3), keepdim=True), where, truth).flatten(2).float()
    chance = chance + 1e-9  # a thing that a coarser grid lost is asked for anywhere
    place = torch.multinomial(chance.flatten(0, 1), 1, generator=dice).unflatten(0, chance.shape[:2])
    label = truth.flatten(2).gather(2, place).long()
    at = torch.cat([place % w, place // w], -1)[:, :, None]
    at = (at + 0.5) * (SIZE / h) - 0.5
    if prompts.points is None or prompts.labels is None:
        return replace(prompts, points=at, labels=label)
    return replace(prompts, points=torch.cat([prompts.points, at], 2), labels=torch.cat([prompts.labels, label], 2))


def _chance(dice: Generator, p: float) -> bool:
    return float(torch.rand((), generator=dice)) < p


if __name__ == "__main__":
    main(starter_sam)
