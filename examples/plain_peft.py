"""An adapter's features with timm or transformers and plain peft: this program does not use medgraft.

    python examples/plain_peft.py ADAPTER_DIRECTORY image.png features.npy
    python examples/plain_peft.py ADAPTER_DIRECTORY image.png features.npy --network timm:vit_base_patch16_224

The directory (or Hub repository) holds adapter_config.json and adapter_model.safetensors, which medgraft writes wherever peft has
an exact form. The card of the adapter says how big images were and how they were normalised, and whether a head goes along.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel


def build(network: str, weights: str | None = None) -> nn.Module:
    """The frozen network: `timm:NAME`, `timm/NAME` or a transformers checkpoint; `weights` is a file instead of the Hub's."""
    if not network.startswith(("timm:", "timm/")):
        return AutoModel.from_pretrained(network).eval()
    size = {} if "swin" in network else {"dynamic_img_size": True}
    name = network[5:]
    return timm.create_model(
        name, pretrained=weights is None, checkpoint_path=weights or "", num_classes=0, **size
    ).eval()


def as_batch(image: Path, size: int, mean: list[float], std: list[float]) -> Tensor:
    """A picture as (1, 3, size, size): bilinear with antialiasing, in [0, 1], normalised."""
    pixels = torch.from_numpy(np.array(Image.open(image).convert("RGB"))).permute(2, 0, 1)[None].float() / 255
    pixels = nn.functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


@torch.no_grad()
def features(network: nn.Module, adapter: str, x: Tensor) -> Tensor:
    """What the network with the adapter gives for a batch: the whole of the example is its first line."""
    model = PeftModel.from_pretrained(network, adapter).eval()
    # transformers resizes its positions to the image only when asked
    resizes = getattr(getattr(network, "config", None), "model_type", None) == "vit"
    out: Any = model(x, interpolate_pos_encoding=True) if resizes else model(x)
    return out if isinstance(out, Tensor) else out.last_hidden_state


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter")
    parser.add_argument("image", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--network", help="default: what adapter_config.json names")
    parser.add_argument("--weights", help="a file with the network's weights")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--mean", type=float, nargs=3, default=[0.5, 0.5, 0.5])
    parser.add_argument("--std", type=float, nargs=3, default=[0.5, 0.5, 0.5])
    a = parser.parse_args()
    named = (
        a.network
        or json.loads((Path(a.adapter) / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    )
    if named is None:
        parser.error("adapter_config.json names no network: give --network")
    found = features(build(named, a.weights), a.adapter, as_batch(a.image, a.size, a.mean, a.std))
    np.save(a.out, found.numpy())
    print(f"{tuple(found.shape)} -> {a.out}")


if __name__ == "__main__":
    main()
