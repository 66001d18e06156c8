"""SAMPOT: a click that moves to where a learned scorer expects a better mask; SAM itself stays as it is.

Sathish, Venkataramani, Shriram, Sudhakar 2023, "Task-Driven Prompt Evolution for Foundation Models" (medagi-prompt-evolution). The
scorer learns the Dice of masks from the labelled images (`training.sampot`); the adapter holds it and moves a person's click by its
gradient (`evolved_prompt`). Defaults are the paper's: five convolutions, Adam 1e-3, batches of 32, steps of 10 pixels of 1,024. Where
we differ: a trust region keeps what the paper calls catastrophic cases at their start.
"""

from __future__ import annotations

from typing import Any

from ..adapters import EvolvedPrompt
from ..errors import BadCall
from ..training.sampot import candidates, correlation, train_scorer
from .registry import recipe
from .run import Run


@recipe("sampot", backbone="medgraft:starter-sam", steps=800, augment="none")
def sampot(
    run: Run, *, lr: float = 1e-3, side: int = 128, moves: int = 20, trust: float = 0.5, steep: float = 5.0
) -> dict[str, Any]:
    """A click that improves itself (SAMPOT, Sathish et al. 2023): a scorer of masks, learned from few images, moves it by gradient.

    side : pixels that the scorer sees. moves : steps of a click. trust : IoU with the start's mask below which none is accepted.
    steep : how steep SAM's mask is for the scorer. --steps are the scorer's.
    """
    if run.task != "segment" or run.goal.outputs != 1:
        raise BadCall("sampot moves a click on one class; name one with --classes")
    if run.steps is None:
        raise BadCall("sampot wants --steps for its scorer")
    began = candidates(run.frozen, run.batches(), side=side, steep=steep, seed=run.seed)
    scorer, losses = train_scorer(began, side=side, steps=run.steps, lr=lr, seed=run.seed)
    part = EvolvedPrompt.on(run.frozen, run.goal, scorer=scorer, steps=moves, trust=trust, steep=steep)
    settings = {"lr": lr, "side": side, "moves": moves, "trust": trust, "steep": steep, "steps": run.steps}
    said = run.keep("sampot", {"head": part}, settings=settings)
    fit = {
        "scorer loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "scorer correlation": correlation(scorer, began),
    }
    return said | {"masks": len(began), **fit}
