"""What recipes share: the options of a run, getting everything ready, training, saving, scoring. The programs stand beside this file."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from .. import __version__
from ..adapters import Adapter, ClassifierHead, Host, LinearHead, Part, Task
from ..adapters.aspp_head import ASPPHead
from ..adapters.store import save_adapter
from ..backbones import Backbone, load_backbone
from ..errors import BadCall, BadData, MissingExtra
from ..training.cache import PrefixCache
from ..training.data import Augment, Batches, Dataset, Item, load_dataset, sample_shots
from ..training.fit import FitOptions, Fitted, fit, forget_state
from ..training.model import choose_device
from ..training.network import save_network
from ..training.preview import phantom_preview
from ..training.report import curves_png, overlay_png

NAME = "task"  # the name under which a recipe's adapter is resident while it trains


@dataclass(frozen=True)
class Run:
    """The options that every recipe takes.

    data, out   : the data folder, and the directory that the adapter replaces.
    backbone    : a backbone id. image_size : pixels a side (default: the backbone's own).
    task        : segment or classify. classes : only these, in this order. labels : which label set.
    shots       : training items in all (segment) or for each class (classify); default: all.
    steps       : optimiser steps. batch : images a step.
    augment     : none, bank (a fixed bank of `views` views, which can be cached) or fresh.
    cache       : keep the frozen prefix of each view: memory, a directory, or off.
    dtype       : storage type of the saved tensors.
    """

    data: Path
    out: Path
    backbone: str = "medgraft:starter-vit"
    image_size: int | None = None
    task: Literal["segment", "classify"] = "segment"
    classes: tuple[str, ...] | None = None
    labels: str = "mask"
    shots: int | None = None
    seed: int = 0
    steps: int | None = 400
    batch: int = 8
    augment: Literal["none", "bank", "fresh"] = "bank"
    views: int = 8
    cache: str = "memory"
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
        return found

    @cached_property
    def support(self) -> list[Item]:
        """The labelled items to learn from, by shots and seed."""
        return sample_shots(self.dataset, self.shots, self.seed, task=self.task)

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

    def batches(self) -> Batches:
        """The training batches."""
        spec = self.frozen.spec
        augment = (
            None if self.augment == "none" else Augment(self.seed, views=self.views if self.augment == "bank" else None)
        )
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
        )

    def prefix_cache(self, host: Host) -> PrefixCache | None:
        """A cache of the frozen prefix, where one pays: at least one stage is frozen and views repeat."""
        stage = host.cut(NAME)
        if self.cache == "off" or self.augment == "fresh" or stage == 0:
            return None
        return PrefixCache(host.backbone, stage, directory=None if self.cache == "memory" else self.cache)

    # Doing it

    def train(
        self,
        recipe: str,
        parts: Mapping[str, Part],
        options: FitOptions,
        *,
        settings: Mapping[str, Any] | None = None,
        network: Backbone | None = None,
    ) -> dict[str, Any]:
        """Fit `parts` on the support and save the adapter; returns a summary (the recipe's result).

        With `network`, a trainable copy of the backbone, everything is trained and a network is saved instead.
        """
        backbone = network or self.frozen
        provenance = self.provenance(recipe, {**(settings or {}), **asdict(options)})
        adapter = Adapter.of(backbone, self.goal, parts, provenance=provenance)
        adapter.to(self.where)
        host = Host(backbone)
        host.add(adapter, NAME)
        extra = list(network.parameters()) if network is not None else []
        cache = self.prefix_cache(host) if network is None else None
        work = self.work_folder()
        done = fit(
            host,
            NAME,
            self.batches(),
            options,
            out=work,
            resume=self.resume,
            cache=cache,
            extra=extra,
            quiet=self.quiet,
        )
        if network is None:
            pictures = {"preview.png": phantom_preview(host, NAME)} if self.task == "segment" else {}
            save_adapter(adapter, self.out, dtype=self.dtype, backbone=self.frozen, extra_files=pictures)
        else:
            save_network(network, adapter, self.out, image_size=network.spec.image_size)
        self.finish(work)
        self.draw(host, work)
        return self.summary(recipe, adapter, done) | {
            "kind": "adapter" if network is None else "network",
            "trainable": adapter.trainable + sum(p.numel() for p in extra),
        }

    def work_folder(self) -> Path:
        """Where the log, the curves and the training state go: beside the adapter, never inside it."""
        folder = self.out.with_name(self.out.name + ".log")
        folder.mkdir(parents=True, exist_ok=True)
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
        for item in held_out[:4]:
            image = self.dataset.image(item)
            file = folder / f"{item.id.replace('/', '_')}.png"
            overlay_png(image, host.predict(image, NAME), self.dataset.mask(item), file, dict(self.dataset.classes))

    def provenance(self, recipe: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """How the adapter came to be, without paths or item ids."""
        facts = {
            "recipe": recipe,
            "settings": dict(settings),
            "dataset": self.dataset.name,
            "labels": self.labels if self.task == "segment" else "label",
            "shots": len(self.support),
            "seed": self.seed,
            "batch": self.batch,
            "augment": self.augment,
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


def directory_bytes(folder: Path) -> int:
    """Bytes of the files in a directory."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
