"""The adapter: a bundle of parts, the task they serve, and the backbone that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from ..backbones.base import Backbone
from ..errors import BadCall
from .part import Part, Readout
from .task import Preprocessing, Task
from .volume_task import VolumePreprocessing


@dataclass(frozen=True)
class BackboneRef:
    """Which backbone an adapter belongs to. `fingerprint` decides; the rest is for people and for finding it again."""

    family: str
    id: str
    fingerprint: str
    random: bool
    commit: str | None = None

    @staticmethod
    def of(backbone: Backbone) -> BackboneRef:
        """The reference to a loaded backbone."""
        spec = backbone.spec
        return BackboneRef(spec.family, spec.id, spec.fingerprint, spec.random, spec.commit)

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class Source:
    """Where an adapter was loaded from: a directory, `file:DIR/OWNER/NAME` or a hub id, and the commit there.

    A directory has no commits; the sha256 of its `adapter.json` stands for one.
    """

    id: str
    commit: str

    def __str__(self) -> str:
        return f"{self.id}@{self.commit}"


class Adapter(nn.Module):
    """Parts by name, in the order in which they act: site parts first, then readouts, the last of which makes logits.

    provenance : how it came to be (recipe, options, shots, seed, data set's name, versions). Never paths, never item ids.
    evaluation : measured facts, one entry a data set.
    source     : where it was loaded from, None for a fresh one.
    """

    def __init__(
        self,
        backbone: BackboneRef,
        task: Task,
        preprocessing: Preprocessing | VolumePreprocessing,
        parts: Mapping[str, Part],
        *,
        provenance: Mapping[str, Any] | None = None,
        evaluation: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.task, self.preprocessing = backbone, task, preprocessing
        self.provenance = dict(provenance or {})
        self.evaluation = list(evaluation or [])
        self.source: Source | None = None
        for name in parts:
            if not name.isidentifier() or not name.isascii() or len(name) > 64 or hasattr(nn.ModuleDict, name):
                raise BadCall(
                    f"a part cannot have the name {name!r}; letters, digits and underscores are wanted, such as 'lora'"
                )
        self.parts = nn.ModuleDict(parts)
        readouts = [isinstance(p, Readout) for p in parts.values()]
        if not parts or readouts != sorted(readouts):
            raise BadCall(
                f"an adapter wants its site parts before its readouts; got {', '.join(parts) or 'no part at all'}"
            )
        last = list(parts.values())[-1]
        if not isinstance(last, Readout) or not last.makes_logits:
            raise BadCall(
                f"an adapter's last part must make logits (a head), {list(parts)[-1]!r} is {last.kind!r}; add linear_head, say"
            )
        if any(p.makes_logits for p in list(parts.values())[:-1] if isinstance(p, Readout)):
            raise BadCall("only the last readout may make logits")
        if last.config.get("outputs", task.outputs) != task.outputs:
            raise BadCall(
                f"the last part makes {last.config['outputs']} outputs, the task ({', '.join(task.classes)}) wants {task.outputs}; "
                f"make it with {type(last).__name__}.on(backbone, task)"
            )
        self.eval()  # training behaviour (dropout, batch statistics) is switched on by who trains

    @staticmethod
    def of(
        backbone: Backbone,
        task: Task,
        parts: Mapping[str, Part],
        *,
        size: int | None = None,
        preprocessing: Preprocessing | VolumePreprocessing | None = None,
        **facts: Any,
    ) -> Adapter:
        """A fresh adapter for `backbone`, with the backbone's own preprocessing at an image or patch size (default: the backbone's),
        or with another `preprocessing`.
        """
        spec = backbone.spec
        if preprocessing is None and spec.dims == 3:
            preprocessing = VolumePreprocessing.of(spec, patch=size)
        own = preprocessing or Preprocessing(size or spec.image_size, spec.mean, spec.std, fit=spec.fit)
        return Adapter(BackboneRef.of(backbone), task, own, parts, **facts)

    @property
    def for_pictures(self) -> Preprocessing:
        """`preprocessing` of an adapter of pictures. Raises BadCall for one of volumes."""
        if isinstance(self.preprocessing, VolumePreprocessing):
            raise BadCall(
                f"an adapter of pictures is wanted, this one was trained on volumes ({self.preprocessing.said}); "
                "host.predict takes the path of a volume"
            )
        return self.preprocessing

    @property
    def site_parts(self) -> dict[str, Part]:
        """The parts that act at sites."""
        return {name: p for name, p in self.named_parts() if not isinstance(p, Readout)}

    @property
    def readouts(self) -> list[Readout]:
        """The parts behind the last stage, in order."""
        return [p for _, p in self.named_parts() if isinstance(p, Readout)]

    def named_parts(self) -> list[tuple[str, Part]]:
        """Parts by name, in order."""
        return [(name, p) for name, p in self.parts.items() if isinstance(p, Part)]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by `<part>.<site>.<tensor>`, as in the file."""
        return {f"{name}.{key}": t for name, p in self.named_parts() for key, t in p.tensors().items()}

    @property
    def trainable(self) -> int:
        """Number of parameters that training changes."""
        return sum(p.numel() for p in self.parameters())

    def without_site_parts(self) -> Adapter:
        """The same adapter with its readouts alone (they are shared, not copied): what the site parts are worth."""
        parts = {name: p for name, p in self.named_parts() if isinstance(p, Readout)}
        return Adapter(self.backbone, self.task, self.preprocessing, parts, provenance=self.provenance)

    def publish(
        self,
        target: str,
        *,
        backbone: Backbone | None = None,
        dtype: str = "float16",
        private: bool | None = None,
        revision: str | None = None,
        message: str | None = None,
        share_images: bool = False,
    ) -> str:
        """Save and publish to `user/name` on the Hub or to `file:DIR/OWNER/NAME`, in one commit; returns where it stands.

        With the `backbone` at hand a probe goes along. Raises as `store.save_adapter` and `hub.publish`.
        """
        from .hub import publish
        from .store import save_adapter

        with TemporaryDirectory() as folder:
            saved = save_adapter(self, Path(folder) / "adapter", dtype=dtype, backbone=backbone)
            return publish(
                saved, target, private=private, revision=revision, message=message, share_images=share_images
            )

    def extra_repr(self) -> str:
        """Task, backbone, size."""
        note = ", random weights" if self.backbone.random else ""
        return f"{self.task.kind} {', '.join(self.task.classes)}; for {self.backbone.id}{note}; {self.trainable:,} parameters"
