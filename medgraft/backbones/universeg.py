"""UniverSeg: segmentation in context. A query image and a few labelled ones go in, logits for the same structure come out.

stem    : the query, one channel, rescaled to [0, 1] by its own range, padded to a side that halves often enough
stage i : a cross block of the encoder, then of the decoder; the support enters before stage 0 through the site `support`
readout : the last query map (B, C, H, W), and the logits of the network's own 1x1 convolution in `extra["logits"]`

A support set is K binary tasks on the same S images: logits (B, K, H, W). Parts act on effective weights (site kind `weights`).

Source: Butoi et al. 2023, UniverSeg (ICCV); the structure is the released code's, the only one that the released weights fit. The
arithmetic is `kernels.support_mix` and `kernels.support_epilogue`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import BadCall
from ..kernels.support_epilogue import pool2, support_epilogue, support_sum
from ..kernels.support_mix import CrossWeights, query_term, support_shift, support_term, target_path
from .base import Backbone, Spec
from .sites import Plan, Port, Site, following
from .state import Features, State
from .weights import Weights

WIDTHS = (64, 64, 64, 64)
CHUNK = 4  # support maps at a time: enough for the convolutions, small enough for the caches
CACHE_BYTES = 1 << 29
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Context:
    """A support set as the network takes it: K binary tasks on the same S images, image and label in [0, 1].

    With `keep`, the first block's terms, which do not depend on the query, are kept up to `CACHE_BYTES`, for as long as the same
    frozen weights ask for them.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, keep: bool = True) -> None:
        """images (S, 1, H, W), labels (K, S, 1, H, W)."""
        self.pairs = torch.cat([images.expand_as(labels), labels.to(images.dtype)], -3)
        self.keep = keep
        self._kept: tuple[tuple[Any, ...], list[Tensor]] | None = None

    @property
    def shots(self) -> int:
        """S."""
        return self.pairs.shape[-4]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pairs.shape[-2], self.pairs.shape[-1]

    def kept_terms(self, w: CrossWeights, pad: Callable[[Tensor], Tensor]) -> list[Tensor] | None:
        """t_i of the first block in chunks; None where they are not kept: weights in training, or terms too large."""
        frozen = all(isinstance(t, nn.Parameter) and not t.requires_grad for t in (w.cross, w.support))
        numbers = self.pairs[..., 0, :, :].numel() * w.support.shape[0]
        if not self.keep or not frozen or numbers * self.pairs.element_size() > CACHE_BYTES:
            return None
        device = self.pairs.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        own = [(id(t), t._version, t.data_ptr(), t.dtype) for t in (w.cross, w.support, self.pairs)]
        key = (own, cast)
        kept = self._kept
        if kept is None or kept[0] != key:
            with torch.no_grad():
                kept = key, [support_term(pad(v), w) for v in self.pairs.split(CHUNK, -4)]
            self._kept = kept
        return kept[1]


class SupportEntrance(nn.Module):
    """Where a support set enters. Without an adapter there is none, and the network sees an empty one."""

    def forward(self, query: Tensor) -> Context | None:
        """The context for queries (B, 1, H, W)."""
        return None


class Branch(nn.Module):
    """A holder that gives a kernel the name that the released checkpoint has for it."""

    def __init__(self, names: str, weights: Weights) -> None:
        super().__init__()
        head, _, rest = names.partition(".")
        self.add_module(head, Branch(rest, weights) if rest else weights)


class CrossBlock(nn.Module):
    """The three kernels of a block, `width` channels out of `fan_in` a pair."""

    def __init__(self, fan_in: int, width: int) -> None:
        super().__init__()
        self.cross = Branch("cross_conv", Weights(fan_in, width))
        self.target = Branch("vmapped.conv", Weights(width, width))
        self.support = Branch("vmapped.conv", Weights(width, width))


PATHS = {"cross": "cross.cross_conv", "target": "target.vmapped.conv", "support": "support.vmapped.conv"}


class UniverSegNet(nn.Module):
    """The tensors of the network, by the names of the released checkpoint."""

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        widths = tuple(widths)
        if len(widths) < 2 or min(widths) < 1:
            raise BadCall(f"UniverSeg wants at least two encoder blocks of at least one channel, got widths {widths}")
        self.widths = widths
        fan_ins = [3, *(2 * w for w in widths[:-1])]
        self.enc_blocks = nn.ModuleList(CrossBlock(i, o) for i, o in zip(fan_ins, widths, strict=True))
        up = widths[:-1][::-1]
        below = (widths[-1], *up[:-1])
        self.dec_blocks = nn.ModuleList(CrossBlock(2 * (b + o), o) for b, o in zip(below, up, strict=True))
        self.out_conv = Branch("conv", Weights(widths[0], 1, 1))

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Kaiming-normal by fan-in: gain sqrt(2) where LeakyReLU follows, 1 where nothing does; biases zero."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            else:
                gain = 1.0 if ".cross." in name or name.startswith("out") else 2.0
                p.normal_(0, (gain / p[0].numel()) ** 0.5, generator=generator)


class UniverSeg(Backbone):
    """The network with its sites. Queries run one at a time: the support's maps belong to one query each."""

    family = "universeg"
    network: UniverSegNet
    rows_at_once = 1

    def __init__(self, network: UniverSegNet, spec: Spec) -> None:
        self.encoders = len(network.widths)
        self.depth = 2 * self.encoders - 1
        super().__init__(network, spec)
        self.entrance = Port(SupportEntrance(), "support", self.owner)

    def _sites(self) -> list[Site]:
        sites = [Site("support", "support", 0, 1, 1, "support", "")]
        blocks = [
            *((f"encoder.{i}", f"enc_blocks.{i}") for i in range(self.encoders)),
            *((f"decoder.{i}", f"dec_blocks.{i}") for i in range(self.encoders - 1)),
        ]
        for stage, (name, path) in enumerate(blocks):
            for leaf, below in PATHS.items():
                if stage == self.depth - 1 and leaf == "support":
                    continue  # nobody reads the last block's support
                sites.append(self._site(f"{name}.{leaf}", stage, f"{path}.{below}"))
        return [*sites, self._site("out", self.depth, "out_conv.conv")]

    def _site(self, name: str, stage: int, path: str) -> Site:
        weight: Any = self.network.get_submodule(path).weight
        return Site(name, "weights", stage, weight[0].numel(), weight.shape[0], name, path)

    # Stages

    def checked(self, x: Tensor) -> Tensor:
        """`x` as one grey channel; three channels become their luma (ITU-R BT.601)."""
        if isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] == 3 and x.is_floating_point():
            x = (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
        return super().checked(x)

    def stem(self, x: Tensor) -> State:
        """(B, 1, H, W) -> (B, 1, 1, H', W'): rescaled by each image's own range (a constant one to 0), padded with 0."""
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        return self._start((x - low) / (high - low).clamp_min(torch.finfo(x.dtype).tiny))

    def _start(self, x: Tensor) -> State:
        step = 2 ** (self.encoders - 1)
        h, w = x.shape[-2:]
        padded = _padded(x, (h + -h % step, w + -w % step))
        return State(padded[:, None], 0, meta={"size": (h, w)})

    def stage(self, state: State) -> State:
        """One cross block: u (B, K, C, h, w) in `x`, the support's mean and its maps in chunks in `kept`, where still read.

        An encoder block hands on its outputs pooled and lays them aside whole for the decoder, the first one only their mean.
        """
        i, e, last = state.stage, self.encoders, self.depth - 1
        w, kept, shots = self._weights(i), dict(state.kept), state.meta.get("shots", 0)
        terms: Iterator[Tensor]
        fresh = True
        if i == 0:
            context = self._entering(state)
            shots = 0 if context is None else context.shots
            u, mean, terms, fresh = self._first(state.x, context, w)
        else:
            u, mean, maps = state.x, kept.pop("mean"), _take(kept, "maps")
            if i >= e:
                skip = f"skip{last - i}"
                u, mean = _joined(u, kept.pop(f"{skip}.u")), _joined(mean, kept.pop(f"{skip}.mean"))
                maps = map(_joined, maps, _take(kept, f"{skip}.maps"))
            terms = (support_term(v, w) for v in maps)
        c = query_term(u, w)
        u = target_path(c, mean.to(c.dtype), w)
        if i < last:
            down = i < e - 1
            handed = pool2(u) if down else u
            whole, pooled = _Gathered(u, shots, keep=0 < i < last - 1), _Gathered(handed, shots, keep=True)
            q = support_shift(c, w)
            for t in terms:
                mixed = support_epilogue(t, q, pool=down, fresh=fresh)
                whole.add(mixed.maps, mixed.total)
                if mixed.pooled is not None:
                    pooled.add(mixed.pooled, support_sum(mixed.pooled))
            if down:
                kept |= {f"skip{i}.u": u, **whole.packed(f"skip{i}.")}
            kept |= (pooled if down else whole).packed("")
            u = handed
        return state.step(u, kept=kept, meta={**state.meta, "shots": shots})

    def _entering(self, state: State) -> Context | None:
        context: Context | None = self.entrance(state.x[:, 0])
        if context is not None and context.size != state.meta["size"]:
            raise BadCall(
                f"the support is {context.size[0]} x {context.size[1]} pixels, the query {state.meta['size'][0]} x {state.meta['size'][1]}; "
                "resize one of them"
            )
        return context

    def _first(
        self, x: Tensor, context: Context | None, w: CrossWeights
    ) -> tuple[Tensor, Tensor, Iterator[Tensor], bool]:
        """u, the mean pair, the terms, and whether these may be written over."""
        if context is None:
            return x, x.new_zeros(*x.shape[:2], 2, *x.shape[-2:]), iter(()), True
        pad = partial(_padded, size=x.shape[-2:])
        mean = pad(support_sum(context.pairs) / context.shots)
        kept = context.kept_terms(w, pad)
        if kept is not None:
            return x, mean, (t[None] for t in kept), False
        return x, mean, (support_term(pad(v), w)[None] for v in context.pairs.split(CHUNK, -4)), True

    def _weights(self, i: int) -> CrossWeights:
        """The effective tensors of block `i`: calling a kernel goes through its port."""
        block: Any = [*self.network.enc_blocks, *self.network.dec_blocks][i]
        cross, target = block.get_submodule(PATHS["cross"])(), block.get_submodule(PATHS["target"])()
        if i == self.depth - 1:
            return CrossWeights(*cross, *target, *cross)  # its support path is never computed
        return CrossWeights(*cross, *target, *block.get_submodule(PATHS["support"])())

    def readout(self, state: State) -> Features:
        """The last query maps (B, K C, H, W); with a support, logits (B, K, H, W) in `extra`."""
        h, w = state.meta["size"]
        u = state.x[..., :h, :w]
        weight, bias = self.network.get_submodule("out_conv.conv")()
        logits = functional.conv2d(u.flatten(0, 1), weight, bias).unflatten(0, u.shape[:2])[:, :, 0]
        flat = u.flatten(1, 2)
        extra = {"logits": logits} if state.meta.get("shots") else {}
        return Features([flat], [1], flat.mean((2, 3)), flat, extra=extra)

    @property
    def probe_side(self) -> int:
        """The smallest side that no padding touches."""
        return 2 ** (self.encoders - 1)

    # The bare model

    def segment(self, target: Tensor, support_images: Tensor, support_labels: Tensor) -> Tensor:
        """Logits (B, 1, H, W) of the structure that the labels show. All inputs in [0, 1], nothing is rescaled.

        target (B, 1, H, W); support_images, support_labels (B, S, 1, H, W), or (1, S, 1, H, W) for one support shared by all
        queries, which is not copied. Queries run one after another. Raises BadCall for other shapes, ranges, NaN or no support.
        """
        check_segment(target, support_images, support_labels)
        images, labels = (_once(t) for t in (support_images, support_labels))
        shared = images.shape[0] == labels.shape[0] == 1
        out, context = [], None
        for b in range(target.shape[0]):
            if context is None or not shared:
                context = Context(images[b % len(images)], labels[b % len(labels)][None], keep=False)
            out.append(self.answer(target[b : b + 1], context))
        return torch.cat(out)

    def answer(self, target: Tensor, context: Context) -> Tensor:
        """Logits (1, K, H, W) for one query (1, 1, H, W) in [0, 1]; a context that is kept is faster from its second query on."""
        with following(Plan(self.owner, {"support": lambda inner, query: context})):
            state = self._start(target)
            while state.stage < self.depth:
                state = self.stage(state)
            return self.readout(state).extra["logits"]


class _Gathered:
    """Chunks of maps, kept where somebody reads them, and the mean of all."""

    def __init__(self, like: Tensor, shots: int, *, keep: bool) -> None:
        self.like, self.shots, self.keep = like, shots, keep
        self.chunks: list[Tensor] = []
        self.total: Tensor | None = None

    def add(self, maps: Tensor, total: Tensor) -> None:
        self.total = total if self.total is None else self.total + total
        if self.keep:
            self.chunks.append(maps)

    def packed(self, prefix: str) -> dict[str, Tensor]:
        mean = torch.zeros_like(self.like) if self.total is None else self.total / self.shots
        return {f"{prefix}mean": mean, **{f"{prefix}maps.{n}": t for n, t in enumerate(self.chunks)}}


def _take(kept: dict[str, Tensor], prefix: str) -> Iterator[Tensor]:
    """The chunks of `prefix`, in order, given away one by one."""
    names = [k for k in kept if k.startswith(f"{prefix}.")]
    chunks = [kept.pop(k) for k in names]
    while chunks:
        yield chunks.pop(0)


def _joined(low: Tensor, skip: Tensor) -> Tensor:
    """(upsampled, skip) by channels."""
    up = functional.interpolate(low.flatten(0, -4), scale_factor=2, mode="bilinear", align_corners=True)
    return torch.cat([up.unflatten(0, low.shape[:-3]), skip], -3)


def _padded(x: Tensor, size: Sequence[int]) -> Tensor:
    """Zeros to the right and below."""
    return functional.pad(x, (0, size[1] - x.shape[-1], 0, size[0] - x.shape[-2]))


def _once(t: Tensor) -> Tensor:
    """A batch that repeats one entry by a stride of 0, as that entry alone."""
    return t[:1] if t.shape[0] > 1 and t.stride(0) == 0 else t


def check_segment(target: Tensor, images: Tensor, labels: Tensor) -> None:
    """Raise BadCall, naming what was found, for anything that `UniverSeg.segment` cannot take."""
    for name, t, n in (("target", target, 4), ("support_images", images, 5), ("support_labels", labels, 5)):
        form = "(B, 1, H, W)" if n == 4 else "(B, S, 1, H, W)"
        if not isinstance(t, Tensor) or t.ndim != n or not t.is_floating_point() or 0 in t.shape[-2:]:
            got = f"{tuple(t.shape)} {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
            raise BadCall(f"{name} must be a floating-point tensor {form}, got {got}")
        if t.shape[-3] != 1:
            raise BadCall(
                f"{name} has {t.shape[-3]} channels, one grey channel is wanted; average or choose one: {form}"
            )
        if t.shape[-2:] != target.shape[-2:]:
            raise BadCall(
                f"{name} is {tuple(t.shape[-2:])} pixels, the target {tuple(target.shape[-2:])}; resize one of them"
            )
        if n == 5 and t.shape[0] not in (1, target.shape[0]):
            raise BadCall(
                f"{name} holds {t.shape[0]} support sets for {target.shape[0]} targets; give one for each, or one for all"
            )
        if n == 5 and (t.shape[1] == 0 or t.shape[1] != images.shape[1]):
            raise BadCall(
                f"{name} holds {t.shape[1]} entries, support_images {images.shape[1]}; give at least one labelled pair"
            )
        low, high = (float(v) for v in torch.aminmax(t.detach()))
        if not (low >= 0 and high <= 1):  # NaN fails both
            raise BadCall(
                f"{name} lies in [{low:g}, {high:g}], values in [0, 1] are wanted; rescale by (x - min) / (max - min)"
            )
