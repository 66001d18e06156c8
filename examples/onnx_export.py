"""An adapter folded into its backbone, as one ONNX file that needs neither medgraft nor torch to run.

    python examples/onnx_export.py medgraft:starter-vit runs/polyp polyp.onnx

In: `image` (B, 3, S, S) float32, normalised as the adapter's card says. Out: `logits`. Needs onnx, onnxscript and onnxruntime.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch

import medgraft


def export(backbone: str, adapter: str, out: Path) -> float:
    """Write the file, run it with onnxruntime, return the largest difference to medgraft relative to the largest logit."""
    trained = medgraft.load_adapter(adapter)
    size = trained.preprocessing.size
    host = medgraft.Host(medgraft.load_backbone(backbone, image_size=size))
    host.add(trained, "it")
    plain = host.folded("it")

    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    names = {"input_names": ["image"], "output_names": ["logits"]}
    torch.onnx.export(
        plain, (x,), str(out), dynamo=True, dynamic_shapes=batch, external_data=False, verbose=False, **names
    )

    with torch.no_grad():
        wanted = host(x[:1], "it").numpy()
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"image": x[:1].numpy()})
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    difference = export(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    print(f"{sys.argv[3]}: onnxruntime differs by {difference:.1e} of the largest logit")
    sys.exit(0 if difference <= 1e-4 else "more than 1e-4: do not use this file")
