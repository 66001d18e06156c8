"""Several packs as one data set with harmonised class names.

mapping = {"kits": {"kidney": "kidney"}, "amos": {"left kidney": "kidney", "right kidney": "kidney"}}
both = assemble({"kits": kits, "amos": amos}, mapping)

Per pack, a class is renamed (several to one: it is annotated where all of them are), mapped to None (it is background from now
on), or mapped to a tuple of classes: a coarse label, whose pixels are one of these and nobody says which. A class that the mapping
does not name keeps its name. Items are called `pack/id`, groups `pack/group`; splits are the packs' own, so a group stays together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import BadCall, BadData, unknown
from .data import load_dataset
from .items import Dataset, Item
from .shots import need_annotated

ClassMap = Mapping[str, str | Sequence[str] | None]
Names = dict[str, tuple[str, ...]]
"""For each class of a pack: no name (left out), its own, or those that it may be."""


@dataclass(frozen=True)
class Assembled(Dataset):
    """The items of several packs; see `assemble`. `owners` finds the pack's own item by the new id."""

    owners: Mapping[str, tuple[Dataset, Item, Names]] = field(default_factory=dict)

    def image(self, item: Item) -> np.ndarray:
        """As the pack's own."""
        dataset, own, _ = self.owners[item.id]
        return dataset.image(own)

    def mask(self, item: Item, labels: str | None = None) -> np.ndarray:
        """uint8 (H, W) in harmonised values; a coarse label has the value of its first class."""
        if labels not in (None, self.labels):
            raise unknown("label set", str(labels), [self.labels])
        dataset, own, names = self.owners[item.id]
        value = {name: new for new, name in self.classes.items()}
        table = np.zeros(256, np.uint8)
        for old, name in dataset.classes.items():
            table[old] = min((value[new] for new in names[name] if new in value), default=0)
        return table[dataset.mask(own)]


def assemble(
    packs: Mapping[str, Dataset] | Sequence[Dataset],
    mapping: Mapping[str, ClassMap] | None = None,
    *,
    classes: Sequence[str] | None = None,
) -> Assembled:
    """The packs as one; `classes` keeps these, in this order (default: all, in the order in which they are met).

    Raises `UnknownName` for a pack or class that does not exist, `BadCall` for packs of one name, class maps that overlap
    or contradict each other, or pictures beside volumes, `BadData` for a class that no training item annotates by itself.
    """
    named = dict(packs) if isinstance(packs, Mapping) else {pack.name: pack for pack in packs}
    if not named or len(named) < len(packs):
        raise BadCall(
            f"assemble wants packs of different names, got {[p.name for p in packs if isinstance(p, Dataset)]}"
        )
    for pack in mapping or {}:
        if pack not in named:
            raise unknown("pack", pack, named)
    for name, dataset in named.items():
        if not dataset.classes:
            raise BadData(f"pack {name!r} has no masks; only segmentations can be put together")
    if len({dataset.dims for dataset in named.values()}) > 1:
        raise BadCall(f"{', '.join(named)} hold pictures and volumes; put together what has the same dimensions")

    names = {pack: _names(pack, dataset, (mapping or {}).get(pack, {})) for pack, dataset in named.items()}
    _need_one_meaning(names)
    met = list(dict.fromkeys(new for own in names.values() for news in own.values() for new in news))
    for name in classes or ():
        if name not in met:
            raise unknown("class", name, met)
    chosen = list(classes) if classes is not None else met
    owners, items = {}, []
    for pack, dataset in named.items():
        for item in dataset.items:
            new = _renamed(pack, dataset, item, names[pack])
            owners[new.id] = (dataset, item, names[pack])
            items.append(new)
    first = next(iter(named.values()))
    found = Assembled(
        "+".join(named),
        first.root,
        tuple(items),
        first.dims,
        classes=dict(enumerate(chosen, start=1)),
        label_sets={"mask": dict(enumerate(chosen, start=1))},
        owners=owners,
    )
    need_annotated(found, found.split("train"))
    return found


def with_coarse(dataset: Dataset, rules: str) -> Assembled:
    """Take in the items that `dataset` left out because they carry a coarser label set.

    "mask:vessel=artery+vein+crossing" says that `vessel` of the label set `mask` is one of three classes of the task. The packs
    are called after the label sets. Raises `BadCall` for another form, and what `load_dataset` and `assemble` raise.
    """
    labels, colon, said = rules.partition(":")
    parts = [part.partition("=") for part in said.split(",")]
    if not colon or not all(name and members for name, _, members in parts):
        raise BadCall(f"coarse labels are written LABELS:CLASS=A+B, as in mask:vessel=artery+vein; got {rules!r}")
    if labels == dataset.labels:
        raise BadCall(f"{labels!r} is the label set of the task; coarse labels are those of another one")
    plain = load_dataset(dataset.root, labels=labels)
    rest = replace(plain, items=tuple(item for item in plain.items if item.id in dataset.left_out))
    if not rest.items:
        raise BadData(
            f"no item of {dataset.name!r} has {labels!r} without {dataset.labels!r}; leave the coarse labels out"
        )
    coarse: dict[str, Sequence[str] | None] = dict.fromkeys(rest.classes.values())
    for name, _, members in parts:
        if name not in coarse:
            raise unknown("class", name, coarse)
        coarse[name] = tuple(members.split("+"))
    return assemble({dataset.labels: dataset, labels: rest}, {labels: coarse}, classes=list(dataset.classes.values()))


def _names(pack: str, dataset: Dataset, said: ClassMap) -> Names:
    own = list(dataset.classes.values())
    for name in said:
        if name not in own:
            raise unknown(f"class of pack {pack!r}", name, own)
    found: Names = {}
    targets = {new for new in said.values() if isinstance(new, str)}
    taken = [name for name in own if name in targets and name not in said]
    if taken:
        raise BadCall(
            f"the class maps of {pack!r} overlap: other classes are mapped to {', '.join(taken)}, which the pack has itself; "
            f"map {', '.join(taken)} too, to say what it is from now on"
        )
    for name in own:
        new = said.get(name, name)
        found[name] = () if new is None else (new,) if isinstance(new, str) else tuple(dict.fromkeys(new))
    return found


def _need_one_meaning(names: Mapping[str, Names]) -> None:
    """A class of one pack may not stand for two things, nor a name for a class here and for several there."""
    fine = {news[0]: (pack, old) for pack, own in names.items() for old, news in own.items() if len(news) == 1}
    for pack, own in names.items():
        coarse = {old: set(news) for old, news in own.items() if len(news) > 1}
        for old, news in coarse.items():
            for other, members in own.items():
                both = news.intersection(members)
                if other != old and both and news != set(members):
                    raise BadCall(
                        f"the class maps of {pack!r} overlap: {old!r} and {other!r} both hold {', '.join(sorted(both))}; "
                        f"a pixel must belong to one of them"
                    )
            if old in fine:
                where, what = fine[old]
                raise BadCall(
                    f"the class maps contradict each other: {old!r} of {pack!r} is {' or '.join(own[old])}, but a class of "
                    f"its own in {where!r} ({what!r}); map it to the same classes there"
                )


def _renamed(pack: str, dataset: Dataset, item: Item, names: Names) -> Item:
    drawn = dict(zip(dataset.classes.values(), dataset.annotated(item), strict=True))
    parts: dict[
        tuple[str, ...], list[bool]
    ] = {}  # what is several classes in the pack is annotated where all of them are
    for old, news in names.items():
        parts.setdefault(tuple(sorted(news)), []).append(drawn[old])
    whole = [news for news, found in parts.items() if news and all(found)]
    return replace(
        item,
        id=f"{pack}/{item.id}",
        group=None if item.group is None else f"{pack}/{item.group}",
        domain=item.domain or pack,
        source=pack,
        masks={"mask": item.masks[dataset.labels]},
        labelled=tuple(news[0] for news in whole if len(news) == 1),
        coarse=tuple(news for news in whole if len(news) > 1),
    )
