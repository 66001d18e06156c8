"""timm's architectures and weights: build by name, read source tensors from the hub or a file, load them completely or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from ..errors import BadCall, BadData, unknown
from .checkpoint import read_tensors, refuse

CLASSIFIER = ("head.", "head_dist.", "fc_norm.", "mask_token")
"""Tensors that a classifier or a pretraining task owns; dropped on loading, part of the fingerprint all the same."""

Weights = tuple[Mapping[str, Tensor], str | None]
"""Source tensors as read, and the hub commit they came from."""


def build(name: str, **options: Any) -> nn.Module:
    """timm's network `name` without its classifier. Raises UnknownName with near misses."""
    architecture, dot, _ = name.partition(".")
    if architecture not in timm.list_models():
        raise unknown("timm architecture", architecture, timm.list_models(["vit_*", "deit*", "swin_*"]))
    if dot and name not in (tagged := timm.list_pretrained(f"{architecture}.*")):
        raise unknown("weights of timm", name, tagged)
    return timm.create_model(name, pretrained=False, num_classes=0, **options)


def source(network: nn.Module, name: str, path: str | None) -> Weights:
    """Source tensors for `network`: from `path`, or from the hub repository that timm names for it."""
    if path is not None:
        return read_tensors(Path(path)), None
    repo = network.pretrained_cfg.get("hf_hub_id")  # type: ignore[union-attr,operator]
    if not repo:
        raise BadCall(
            f"timm publishes no weights for {name!r}; give a file (timm:{name}@PATH) or ask for random:timm:{name}"
        )
    file = hub_file(repo, "model.safetensors", f"timm:{name}@PATH", f"random:timm:{name}")
    return read_tensors(file), file.parent.name


def hub_file(repo: str, filename: str, *ways_out: str) -> Path:
    """A file of a hub repository, from the cache or the network. Raises BadData when neither has it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(repo, filename))
    except RepositoryNotFoundError:
        raise BadData(
            f"the hub has no repository {repo!r} that you may read; check the name, or log in if it is private"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as unreachable:
        raise BadData(
            f"{filename} of {repo!r} is neither in the local hub cache nor to be had from the hub ({type(unreachable).__name__}); "
            f"go online once, or use {' or '.join(ways_out)}"
        ) from None


def load(network: nn.Module, tensors: Mapping[str, Tensor], convert: Callable, what: str) -> None:
    """Load `tensors` into `network` after timm's own `convert`. Every tensor of the network must come from the file.

    `convert` would resample weights of another patch or window size, and the network would be another one: they are refused.
    """
    own = network.state_dict()
    for name in sorted(tensors.keys() & own.keys()):
        if (
            name.endswith(("patch_embed.proj.weight", "relative_position_bias_table"))
            and tensors[name].numel() != own[name].numel()
        ):
            raise BadData(
                f"these weights do not fit {what}: {name} is {tuple(tensors[name].shape)}, {tuple(own[name].shape)} is wanted; "
                "they are of another patch size, window size or width"
            )
    try:
        fitted = convert(dict(tensors), network)
        missing, unexpected = network.load_state_dict(fitted, strict=False)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as misfit:
        said = (str(misfit).splitlines() or [type(misfit).__name__])[-1].strip()
        raise BadData(f"these weights do not fit {what}: {said}; is it a checkpoint of another architecture?") from None
    unexpected = [name for name in unexpected if not name.startswith(CLASSIFIER)]
    refuse(what, missing, unexpected, hint="is it a checkpoint of another architecture?")
