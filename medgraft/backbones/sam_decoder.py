"""SAM's prompt encoder and mask decoder, over the modules of transformers' SamModel, with every layer behind its port.

    sparse = points and boxes as tokens,  dense = the mask prompt (or "no mask") as a map
    tokens, image = TwoWay([iou token | mask tokens | sparse], embedding + dense)
    mask_i = MLP_i(tokens_i) . Upscale(image)      quality = MLP(iou token)

B images with P questions each run as R = B P rows, row by row of the batch, each with a copy of its image's embedding. Shapes below
are in R. Positions are those of pixel centres in [0, 1] of the input, so any size of the embedding map works. Differentiable in
everything, the coordinates of points included.
Source: Kirillov et al. 2023 (arXiv:2304.02643), appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadCall
from .prompts import IGNORED, NO_POINT, Prompts


@dataclass(frozen=True)
class Decoded:
    """What the two-way transformer makes: tokens (R, T, C), the image map (R, C, h, w) and the map upscaled 4x (R, C / 8, 4 h, 4 w)."""

    tokens: Tensor
    image: Tensor
    upscaled: Tensor


class SamDecoder:
    """The decoder of one SamModel (or of a copy of it whose layers are adapted). Holds no tensors of its own."""

    def __init__(self, network: Any, patch: int) -> None:
        self.network, self.patch = network, patch

    @property
    def masks(self) -> Any:
        """transformers' SamMaskDecoder."""
        return self.network.mask_decoder

    def __call__(self, embedding: Tensor, prompts: Prompts | None, *, multimask: bool = False) -> tuple[Tensor, Tensor]:
        """Masks (B, P, M, 4 h, 4 w), as logits, and their estimated IoU (B, P, M): M = 1, or 3 with `multimask`. P = 1 without a prompt."""
        decoded, p = self.decode(embedding, prompts)
        chosen = range(1, self.masks.num_mask_tokens) if multimask else range(1)
        quality = self.masks.iou_prediction_head(decoded.tokens[:, 0])[:, list(chosen)]
        rows = (embedding.shape[0], p)
        return self.masks_of(decoded, chosen).unflatten(0, rows), quality.unflatten(0, rows)

    def decode(self, embedding: Tensor, prompts: Prompts | None) -> tuple[Decoded, int]:
        """The two-way transformer on SAM's own tokens and the prompts' (tokens 1 to 4 are the masks'), and the number of questions P."""
        sparse, dense, p = self.encode(prompts, embedding)
        own = torch.cat([self._rows(self.masks.iou_token), self._rows(self.masks.mask_tokens)])
        tokens = own.expand(embedding.shape[0] * p, -1, -1)
        return self.two_way(embedding, tokens if sparse is None else torch.cat([tokens, sparse], 1), dense, p), p

    def masks_of(self, decoded: Decoded, chosen: Sequence[int]) -> Tensor:
        """Masks (R, M, 4 h, 4 w) of the `chosen` mask tokens, as logits."""
        hyper = [self.masks.output_hypernetworks_mlps[i](decoded.tokens[:, 1 + i]) for i in chosen]
        return torch.einsum("rmc,rchw->rmhw", torch.stack(hyper, 1), decoded.upscaled)

    def two_way(self, embedding: Tensor, tokens: Tensor, dense: Tensor | None = None, questions: int = 1) -> Decoded:
        """Tokens (R, T, C) and the embedding (B, C, h, w), R = B `questions`, through the transformer and the upscaling.

        `dense` (R or 1, C, h, w) is added to the embedding; None is the network's "no mask".
        """
        h, w = embedding.shape[-2:]
        dense = self.no_mask() if dense is None else dense
        rows = embedding.repeat_interleave(questions, 0) + dense
        where = self.positions(h, w).expand(rows.shape[0], -1, -1, -1)
        out, image = self.masks.transformer(
            point_embeddings=tokens.to(embedding.dtype)[:, None],
            image_embeddings=rows,
            image_positional_embeddings=where.to(embedding.dtype),
            attention_similarity=None,
        )
        image = image[:, 0].transpose(1, 2).unflatten(2, (h, w))
        up = self.masks.activation(self.masks.upscale_layer_norm(self.masks.upscale_conv1(image)))
        return Decoded(out[:, 0], image, self.masks.activation(self.masks.upscale_conv2(up)))

    def encode(self, prompts: Prompts | None, embedding: Tensor) -> tuple[Tensor | None, Tensor | None, int]:
        """Prompts as sparse tokens (R, S, C) or None, a dense map (R, C, h, w) or None, and the number of questions P.

        Raises BadCall for masks that are not four times the sides of the embedding.
        """
        if prompts is None or not prompts.questions:
            return None, None, 1
        b, _, h, w = embedding.shape
        p = prompts.questions
        fine = torch.promote_types(embedding.dtype, torch.float32)  # bfloat16 tells places 4 pixels of 1,024 apart
        sides = torch.tensor([w * self.patch, h * self.patch], device=embedding.device, dtype=fine)
        sparse = []
        if prompts.points is not None and prompts.labels is not None:
            points, labels = prompts.points, prompts.labels
            if prompts.boxes is None:  # the network was trained with one "not a point" where there is no box
                points = torch.cat([points, points.new_zeros(b, p, 1, 2)], 2)
                labels = torch.cat([labels, labels.new_full((b, p, 1), NO_POINT)], 2)
            sparse.append(self._points(points.to(fine), labels, sides))
        if prompts.boxes is not None:
            corners = self.code((prompts.boxes.to(fine).unflatten(2, (2, 2)) + 0.5) / sides)
            edge = torch.cat([self._rows(e) for e in self.network.prompt_encoder.point_embed[2:4]])
            sparse.append(corners + edge)
        dense = None
        if prompts.masks is not None:
            if prompts.masks.shape[-2:] != (4 * h, 4 * w):
                raise BadCall(
                    f"a mask prompt has {4 * h} x {4 * w} pixels (4 times the embedding's sides), got {' x '.join(map(str, prompts.masks.shape[-2:]))}; "
                    "give the logits of an earlier answer, or resize"
                )
            dense = self.network.prompt_encoder.mask_embed(prompts.masks.to(embedding.dtype).flatten(0, 1)[:, None])
        return (torch.cat(sparse, 2).flatten(0, 1) if sparse else None), dense, p

    def _points(self, points: Tensor, labels: Tensor, sides: Tensor) -> Tensor:
        encoder = self.network.prompt_encoder
        kind = labels[..., None]
        found = self.code((points + 0.5) / sides)
        found = torch.where(kind == NO_POINT, self._rows(encoder.not_a_point_embed).to(found.dtype), found)
        found = torch.where(kind == IGNORED, torch.zeros_like(found), found)
        for value in (0, 1):
            found = torch.where(kind == value, found + self._rows(encoder.point_embed[value]), found)
        return found

    def code(self, unit: Tensor) -> Tensor:
        """Fourier code (..., C) of positions (..., 2) in [0, 1]: [sin | cos](2 pi (2 u - 1) G), G the frozen Gaussian matrix."""
        matrix = self.network.shared_image_embedding.positional_embedding
        angle = 2 * math.pi * ((2 * unit - 1) @ matrix.to(unit.dtype))
        return torch.cat([angle.sin(), angle.cos()], -1)

    def positions(self, h: int, w: int) -> Tensor:
        """The code (1, C, h, w) of every place of the embedding map."""
        matrix = self.network.shared_image_embedding.positional_embedding
        fine = torch.promote_types(matrix.dtype, torch.float32)
        y = (torch.arange(h, device=matrix.device, dtype=fine) + 0.5) / h
        x = (torch.arange(w, device=matrix.device, dtype=fine) + 0.5) / w
        grid = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], -1)
        return self.code(grid).permute(2, 0, 1)[None]

    def iou_token(self) -> Tensor:
        """The token that asks for the estimated IoU: (1, C)."""
        return self._rows(self.masks.iou_token)

    def no_mask(self) -> Tensor:
        """What stands for "no mask prompt": (1, C, 1, 1)."""
        return self._rows(self.network.prompt_encoder.no_mask_embed)[..., None, None]

    @staticmethod
    def _rows(embedding: Any) -> Tensor:
        """Every row of an embedding, by calling it: its port, where it has one, sees the call."""
        return embedding(torch.arange(embedding.num_embeddings, device=embedding.weight.device))
