"""What recipes share: the options of a run, getting everything ready, training, saving, scoring. The programs stand beside this file."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from .. import __version__
from ..adapters import Adapter, ClassifierHead, Host, LinearHead, Part, Preprocessing, Task
from ..adapters.aspp_head import ASPPHead
from ..adapters.store import save_adapter
from ..adapters.volume_task import VolumePreprocessing
from ..backbones import Backbone, load_backbone
from ..errors import BadCall, BadData, MissingExtra, SaveFailed
from ..training.averaging import WeightAverage
from ..training.cache import PrefixCache
from ..training.data import Augment, Batches, Dataset, Item, load_dataset, sample_shots
from ..training.fit import FitOptions, Fitted, Forward, fit
from ..training.fuse_style import FuseStyle
from ..training.keeper import forget_state
from ..training.model import choose_device
from ..training.network import save_network
from ..training.patches import Crops, Patches, volume_of
from ..training.preview import phantom_preview
from ..training.prompting import prompts_of
from ..training.report import curves_png, overlay_png
from ..training.slices import Axis, Slices, pictured, slices_of
from ..training.volume_data import volumes_of
from ..training.volume_report import slices_png
from ..voxels import Intensity

NAME = "task"  # the name under which a recipe's adapter is resident while it trains

AVERAGES: dict[str, WeightAverage | None] = {
    "none": None,
    "swa": WeightAverage("swa"),
    "ema": WeightAverage("ema", start=0, every=1, decay=0.99),
}


@dataclass(frozen=True)
class Run:
    """The options that every recipe takes.

    data, out   : the data folder, and the directory that the adapter replaces.
    backbone    : a backbone id. image_size : pixels a side (default: the backbone's own).
    task        : segment or classify. classes : only these, in this order. labels : which label set.
    axis        : read volumes slice by slice across this axis.
    shots       : training items in all (segment) or for each class (classify); default: all.
    steps       : optimiser steps. batch : images a step.
    augment     : none, bank (a fixed bank of `views` views, which can be cached) or fresh.
    crop        : cut off the dark border around a picture (a fundus), in training and in every later prediction.
    blur, colour: largest blur in pixels and gain of a colour among the augmentations (cameras differ in these); 0 is off.
    cache       : keep the frozen prefix of each view: memory, a directory, or off.
    mix         : blend styles of batch mates after stage `mix_stage` (default: the cached one, or the first): see `FuseStyle`.
    patches     : of each volume in a step, `views` of them in the bank; `image_size` is their side. Volumes for a backbone of 3D only.
    spacing     : millimetres that volumes are resampled to. window : LOW,HIGH of intensities. Default: as the backbone was trained.
    average     : save the average of the weights along training: of the last quarter (swa), or exponentially fading (ema).
    dtype       : storage type of the saved tensors.
    """

    data: Path
    out: Path
    backbone: str = "medgraft:starter-vit"
    image_size: int | None = None
    task: Literal["segment", "classify"] = "segment"
    classes: tuple[str, ...] | None = None
    labels: str = "mask"
    axis: Axis | None = None
    shots: int | None = None
    seed: int = 0
    steps: int | None = 400
    batch: int = 8
    augment: Literal["none", "bank", "fresh"] = "bank"
    views: int = 8
    blur: float = 0.0
    colour: float = 0.0
    crop: bool = False
    cache: str = "memory"
    mix: Literal["none", "random", "dot", "cosine"] = "none"
    mix_stage: int | None = None
    average: Literal["none", "swa", "ema"] = "none"
    patches: int = 6
    spacing: float | None = None
    window: str | None = None
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    license: str | None = None
    modality: str | None = None
    organ: str | None = None
    resume: bool = False
    quiet: bool = False

    # Getting ready

    @cached_property
    def where(self) -> torch.device:
        """The device: `auto` is CUDA where there is one, else the CPU."""
        return choose_device(self.device)

    @cached_property
    def dataset(self) -> Dataset:
        """The data set, with the classes asked for."""
        found = load_dataset(
            self.data, labels="label" if self.task == "classify" else self.labels, classes=self.classes, seed=self.seed
        )
        if self.task == "segment" and not found.classes:
            raise BadData(f"{found.name!r} has no masks; it can be classified: --task classify")
        if found.dims == 3 and not self.axis and self.frozen.spec.dims == 3:
            return volumes_of(found)
        return slices_of(found, self.axis) if found.dims == 3 and self.axis else found

    @cached_property
    def support(self) -> list[Item]:
        """The labelled items to learn from, by shots and seed."""
        return sample_shots(self.dataset, self.shots, self.seed, task=self.task)

    def learn_from(self, items: Sequence[Item]) -> None:
        """Take these items as the support, where a recipe has a choice of its own."""
        self.__dict__["support"] = list(items)

    def work_on(self, dataset: Dataset) -> None:
        """Take this data set, where a recipe puts one together of its own. Before anything asks for it."""
        self.__dict__["dataset"] = dataset

    @cached_property
    def frozen(self) -> Backbone:
        """The backbone."""
        return load_backbone(self.backbone, image_size=self.image_size).to(self.where)  # type: ignore[return-value]

    @cached_property
    def goal(self) -> Task:
        """The task, with the data set's class names."""
        if self.task == "classify":
            return Task("classify", tuple(self.dataset.label_names))
        return Task("segment", tuple(self.dataset.classes[v] for v in sorted(self.dataset.classes)))

    @cached_property
    def preprocessing(self) -> Preprocessing | VolumePreprocessing:
        """How an image or a volume is prepared; it travels in the adapter. Raises BadCall."""
        spec = self.frozen.spec
        if spec.dims == 2:
            return Preprocessing(spec.image_size, spec.mean, spec.std, self.crop, spec.fit)
        spacing = None if self.spacing is None else (self.spacing,) * 3
        return VolumePreprocessing.of(spec, spacing=spacing, intensity=intensity_of(self.window))

    def seeded(self) -> None:
        """Seed the drawing of fresh parts. Call it once, before they are made."""
        torch.manual_seed(self.seed)

    def head(self, kind: str = "linear") -> Part:
        """A head for the task: one linear layer, or AViT's decoder (`aspp`); a classifier gets a linear one."""
        if self.task == "classify":
            return ClassifierHead.on(self.frozen, self.goal)
        if kind not in ("linear", "aspp"):
            raise BadCall(f"head must be 'linear' or 'aspp', got {kind!r}")
        return LinearHead.on(self.frozen, self.goal) if kind == "linear" else ASPPHead.on(self.frozen, self.goal)

    def batches(self, **partial: Any) -> Batches:
        """The training batches; `partial`, `dropout` and `balance` are those of `Batches`."""
        spec = self.frozen.spec
        if isinstance(self.preprocessing, VolumePreprocessing):
            return self.volume_batches(**partial)
        views = self.views if self.augment == "bank" else None
        augment = None if self.augment == "none" else Augment(self.seed, views, blur=self.blur, colour=self.colour)
        return Batches(
            self.dataset,
            self.support,
            size=spec.image_size,
            mean=spec.mean,
            std=spec.std,
            batch_size=self.batch,
            seed=self.seed,
            augment=augment,
            task=self.task,
            crop=self.crop,
            fit=spec.fit,
            **partial,
        )

    def volume_batches(self, **partial: Any) -> Patches:
        """`batches`, for a backbone of 3D: patches of `batch` volumes. Augmentations are those of FSEFT's pretraining."""
        assert isinstance(self.preprocessing, VolumePreprocessing)
        views, plain = None if self.augment == "fresh" else self.views, self.augment == "none"
        return Patches(
            self.dataset,
            self.support,
            self.preprocessing,
            self.frozen.spec,
            volumes=self.batch,
            patches=self.patches,
            crops=Crops(self.seed, views, turn=not plain, shift=0.0 if plain else 0.1),
            seed=self.seed,
            **partial,
        )

    def prefix_cache(self, host: Host) -> PrefixCache | None:
        """A cache of the frozen prefix, where one pays: at least one stage is frozen and views repeat."""
        stage = host.cut(NAME)
        if self.cache == "off" or self.augment == "fresh" or stage == 0:
            return None
        return PrefixCache(host.backbone, stage, directory=None if self.cache == "memory" else self.cache)

    def style_mixing(self, cache: PrefixCache | None) -> FuseStyle | None:
        """FuseStyle, where it is asked for: after `mix_stage`, by default as early as the cache allows, but not before stage 1."""
        if self.mix == "none":
            return None
        first = max(1, 0 if cache is None else cache.stage)
        return FuseStyle((first if self.mix_stage is None else self.mix_stage,), self.mix)

    # Doing it

    def train(
        self,
        recipe: str,
        parts: Mapping[str, Part],
        options: FitOptions,
        *,
        settings: Mapping[str, Any] | None = None,
        network: Backbone | None = None,
        batches: Batches | None = None,
        stand_in: Mapping[str, Part] | None = None,
        partial: Mapping[str, Any] | None = None,
        loss: Callable[..., torch.Tensor] | None = None,
        forward: Forward | None = None,
    ) -> dict[str, Any]:
        """Fit `parts` on the support and save the adapter; returns a summary (the recipe's result).

        With `network`, a trainable copy of the backbone, everything is trained and a network is saved instead. `stand_in` are parts
        that take the place of those of the same name while training, on `batches` of the recipe's own.
        `partial` goes to `Run.batches`, `loss` and `forward` replace the usual ones.
        """
        backbone = network or self.frozen
        provenance = self.provenance(recipe, {**(settings or {}), **asdict(options)})
        adapter = Adapter.of(backbone, self.goal, parts, preprocessing=self.preprocessing, provenance=provenance)
        adapter.to(self.where)
        host = Host(backbone)
        own = self.preprocessing
        trained = Adapter.of(backbone, self.goal, {**parts, **stand_in}, preprocessing=own) if stand_in else adapter
        host.add(trained, NAME)
        extra = list(network.parameters()) if network is not None else []
        cache = self.prefix_cache(host) if network is None else None
        work = self.work_folder()
        done = fit(
            host,
            NAME,
            batches or self.batches(**(partial or {})),
            options,
            out=work,
            resume=self.resume,
            cache=cache,
            mix=self.style_mixing(cache),
            average=AVERAGES[self.average],
            loss=loss,
            forward=forward,
            extra=extra,
            quiet=self.quiet,
        )
        if stand_in:
            host.remove(NAME)
            host.add(adapter, NAME)
        if network is None:
            drawn = self.task == "segment" and backbone.spec.dims == 2
            pictures = {"preview.png": phantom_preview(host, NAME)} if drawn else {}
            save_adapter(adapter, self.out, dtype=self.dtype, backbone=self.frozen, extra_files=pictures)
        else:
            save_network(network, adapter, self.out, image_size=network.spec.image_size)
        self.finish(work)
        self.draw(host, work)
        return self.summary(recipe, adapter, done) | {
            "kind": "adapter" if network is None else "network",
            "trainable": adapter.trainable + sum(p.numel() for p in extra),
        }

    def keep(
        self, recipe: str, parts: Mapping[str, Part], *, settings: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Save parts that nothing trains; returns a summary."""
        began = time.perf_counter()
        facts = self.provenance(recipe, settings or {})
        adapter = Adapter.of(self.frozen, self.goal, parts, preprocessing=self.preprocessing, provenance=facts)
        host = Host(self.frozen)
        host.add(adapter, NAME)
        save_adapter(adapter, self.out, dtype=self.dtype, backbone=self.frozen)
        self.draw(host, self.work_folder())
        said = self.summary(recipe, adapter, Fitted(0, 0.0, time.perf_counter() - began, 0.0))
        return {k: v for k, v in said.items() if k not in ("steps", "loss")} | {"kind": "adapter"}

    def work_folder(self) -> Path:
        """Where the log, the curves and the training state go: beside the adapter, never inside it."""
        folder = self.out.with_name(self.out.name + ".log")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as refused:
            raise SaveFailed(
                f"the log of a run goes to the directory {folder}, which cannot be made ({refused.strerror}); choose another --out"
            ) from None
        return folder

    def finish(self, work: Path) -> None:
        """Draw the curves, drop the training state."""
        forget_state(work)
        with suppress(MissingExtra):  # matplotlib is an extra; the log holds the same numbers
            curves_png(work / "log.jsonl", work / "curves.png")

    def draw(self, host: Host, work: Path) -> None:
        """Overlays of up to four items, held-out ones where there are any, in the work folder (never with the adapter)."""
        if self.task != "segment":
            return
        folder = work / "overlays"
        folder.mkdir(exist_ok=True)
        held_out = self.dataset.split("val") or self.dataset.split("test") or self.support
        for item in pictured(held_out, 4):
            file = folder / f"{item.id.replace('/', '_')}.png"
            if self.frozen.spec.dims == 3:
                volume = volume_of(self.dataset, item)
                slices_png(
                    volume, host.predict(volume, NAME), self.dataset.mask(item), file, dict(self.dataset.classes)
                )
                continue
            image = self.dataset.image(item)
            overlay_png(image, self.shown(host, item), self.dataset.mask(item), file, dict(self.dataset.classes))

    def shown(self, host: Host, item: Item) -> np.ndarray:
        """The prediction of one item for a picture; a promptable adapter is asked by the box of the truth."""
        asked = prompts_of(host.adapters[NAME], self.dataset.mask(item), item)
        return host.on(self.dataset.image(item)).predict(NAME, prompts=asked, by_default=True)

    def provenance(self, recipe: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """How the adapter came to be, without paths or item ids."""
        facts = {
            "recipe": recipe,
            "settings": dict(settings),
            "dataset": self.dataset.name,
            "labels": self.labels if self.task == "segment" else "label",
            "axis": self.dataset.axis if isinstance(self.dataset, Slices) else None,
            "shots": len(self.support),
            "seed": self.seed,
            "batch": self.batch,
            "augment": self.augment,
            "mix": None if self.mix == "none" else self.mix,
            "average": None if self.average == "none" else self.average,
            "license": self.license,
            "modality": self.modality,
            "organ": self.organ,
            "date": date.today().isoformat(),
            "medgraft": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        return {k: v for k, v in facts.items() if v is not None}

    def summary(self, recipe: str, adapter: Adapter, done: Fitted) -> dict[str, Any]:
        """What the command prints."""
        return {
            "recipe": recipe,
            "backbone": self.frozen.spec.title,
            "classes": list(self.goal.classes),
            "shots": len(self.support),
            "trainable": adapter.trainable,
            "bytes": directory_bytes(self.out),
            "steps": done.steps,
            "loss": round(done.loss, 4),
            "seconds": round(done.seconds, 1),
            "out": str(self.out),
        }

    def steps_or(self, epochs: int) -> int:
        """The steps asked for, or as many as show every support image `epochs` times."""
        return self.steps if self.steps is not None else max(1, epochs * -(-len(self.support) // self.batch))


def intensity_of(window: str | None) -> Intensity | None:
    """The intensity rule of "LOW,HIGH". Raises BadCall."""
    if window is None:
        return None
    try:
        low, high = map(float, window.split(","))
    except ValueError:
        raise BadCall(f"a window of intensities is written LOW,HIGH, as in -175,250; got {window!r}") from None
    return ("window", low, high)


def directory_bytes(folder: Path) -> int:
    """Bytes of the files in a directory."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
