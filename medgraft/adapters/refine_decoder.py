"""RefineDecoder: a deeper mask decoder that lets a click change the mask where it was made, not everywhere.

    f   the image map (C, h, w) that SAM's two-way transformer makes of the embedding, the prompts and the earlier mask
    f1  = f + Attn(LN f);  f2 = f1 + MLP(LN f1)                 global, over all h w places, positions added to queries and keys
    z   = conv1x1(Conv(Up(Up(f2))))                             (1, 4 h, 4 w), in place of SAM's token . map
    Up  = 2x2 up-convolution after Conv
    Conv(x) = gelu(W_s x + IN(conv3x3 gelu(IN(conv3x3 x))))     C -> C / 2; W_s a 1x1 convolution, the shortcut
    residual: z + SAM's own mask, and the last convolution starts at 0, so that a fresh part is the mask head

Several questions are united and the mask is brought to the image's size as in `mask_head`, which also says what stands for no prompt.
Source: Kim et al. 2023 (medagi-sam-histopath-interactive) section 2.3, figure 2c. They leave open the form of the shortcut, where
norms and activations stand inside a block, and the attention's details: those above are ours; so is `residual`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional

from ..backbones.base import Backbone
from ..backbones.prompts import Prompts
from ..backbones.state import Features
from ..errors import BadCall
from .heads import check_width
from .mask_head import check_decoder, united, with_whole_image
from .part import Readout, part
from .task import Task


class ConvBlock(nn.Module):
    """Conv of the equation: (R, C, h, w) -> (R, C / 2, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.InstanceNorm2d(width, affine=True)
        self.conv2 = nn.Conv2d(width, width // 2, 3, padding=1, bias=False)
        self.norm2 = nn.InstanceNorm2d(width // 2, affine=True)
        self.shortcut = nn.Conv2d(width, width // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = functional.gelu(self.norm1(self.conv1(x)))
        return functional.gelu(self.shortcut(x) + self.norm2(self.conv2(y)))


class GlobalAttention(nn.Module):
    """f -> f2 of the equation, (R, C, h, w); `positions` (1, C, h, w)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_k, self.v, self.proj = nn.Linear(width, 2 * width), nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, f: Tensor, positions: Tensor) -> Tensor:
        """See the class."""
        x = f.flatten(2).transpose(1, 2)
        y = self.norm1(x)
        q, k = self.q_k(y + positions.flatten(2).transpose(1, 2)).chunk(2, -1)
        split = [t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, self.v(y))]
        x = x + self.proj(functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norm2(x))
        return x.transpose(1, 2).unflatten(2, f.shape[2:])


@part("refine_decoder")
class RefineDecoder(Readout):
    """See the top of the file."""

    takes_prompts = True

    def __init__(
        self, sites: Mapping[str, Sequence[int]], width: int, heads: int = 8, outputs: int = 1, residual: bool = False
    ) -> None:
        super().__init__(sites, width=width, heads=heads, outputs=outputs, residual=residual)
        if outputs != 1:
            raise BadCall(
                f"a refined mask is one class against the background, got {outputs} outputs; use class_prompts for several classes"
            )
        if width % 8 or width % heads:
            raise BadCall(f"the width of a refine decoder is a multiple of 8 and of its {heads} heads, got {width}")
        self.attention = GlobalAttention(width, heads)
        self.block1 = ConvBlock(width)
        self.up1 = nn.ConvTranspose2d(width // 2, width // 2, 2, stride=2)
        self.block2 = ConvBlock(width // 2)
        self.up2 = nn.ConvTranspose2d(width // 4, width // 4, 2, stride=2)
        self.block3 = ConvBlock(width // 4)
        self.last = nn.Conv2d(width // 8, 1, 1)
        if residual:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    @classmethod
    def on(cls, backbone: Backbone, task: Task, *, heads: int = 8, residual: bool = False) -> RefineDecoder:
        """Drawn weights for a task with one class. Raises BadCall."""
        check_decoder(backbone)
        return cls({}, width=backbone.spec.width, heads=heads, outputs=task.outputs, residual=residual)

    def check(self, backbone: Backbone) -> None:
        """The embedding must have the part's width."""
        check_decoder(backbone)
        check_width(self, backbone, self.config["width"], backbone.spec.width)

    def read(self, features: Features, image: Tensor) -> Tensor:
        """-> logits (B, 1, H, W)."""
        prompts = with_whole_image(features.prompts, image)
        return united(self.asked(features, prompts), prompts, image)

    def asked(self, features: Features, prompts: Prompts) -> Tensor:
        """The mask of each question, logits (B, P, 4 h, 4 w)."""
        embedding, decoder = features.maps[-1], features.decoder
        decoded, p = decoder.decode(embedding, prompts)
        f = decoded.image.to(self.last.weight.dtype)
        f = self.attention(f, decoder.positions(*f.shape[2:]).to(f.dtype))
        f = self.up2(self.block2(self.up1(self.block1(f))))
        z = self.last(self.block3(f)).to(embedding.dtype)
        if self.config["residual"]:
            z = z + decoder.masks_of(decoded, (0,))
        return z[:, 0].unflatten(0, (embedding.shape[0], p))
