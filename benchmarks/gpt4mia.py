"""Transductive heads beside trained ones, in both uses of GPT4MIA. `python -m benchmarks.gpt4mia`, under four minutes.

A linear probe on frozen features of `medgraft:starter-vit` learns from a few training images, drawn by the seed. The
validation split is what is known: "errors" asks where the probe is wrong on the test split, "labels" asks for the class
itself. Every row gets the same known samples, and the same two kinds of features: the probe's class probabilities (the
paper's choice), and these beside the pooled features. Settings are chosen on the known samples: ours leaving one out
(class-mean loss), scikit-learn's by cross-validation (balanced accuracy), laplacian smoothing and prototype
rectification, which need a set of queries, at their defaults. The test split is read for the scores alone.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor

from benchmarks.common import data_root, facts, footer, table, write
from medgraft.adapters.neighbours import Nearest, SequenceModel, UnderBagging, class_probabilities, one_hot, unit
from medgraft.adapters.transduction import Propagation, Rectification, Smoothing
from medgraft.backbones import load_backbone
from medgraft.recipes.gpt4mia import NEIGHBOURS, candidates, f_score, features_of, linear_probe
from medgraft.training.data import Dataset, load_dataset, sample_shots
from medgraft.training.leave_one_out import choose
from medgraft.training.metrics import accuracy, auc, balanced_accuracy
from medgraft.training.representatives import representatives

PACKS = {"pneumoniamnist": 20, "skin_ham10000": 8}
"""Training images a class for the probe."""
SEEDS = (0, 1, 2, 3, 4)
T_95 = 2.776  # t quantile, 4 degrees of freedom
USES = ("errors", "labels")
KINDS = ("probabilities", "both")

Answer = tuple[np.ndarray, np.ndarray]
"""Answers (N,) and scores (N,) or (N, K) for the AUC."""


def ours(known: Tensor, labels: Tensor, queries: Tensor, k: int) -> dict[str, tuple[Answer, str]]:
    """Every method of medgraft, and its settings."""
    y = one_hot(labels, k)

    def chosen(tried: Any, rows: Tensor | None = None) -> SequenceModel:
        some = slice(None) if rows is None else rows
        return choose(tried, known[some], labels[some], k)[0]

    def said(model: SequenceModel, rows: Tensor | None = None) -> tuple[Answer, str]:
        some = slice(None) if rows is None else rows
        p = model(known[some], y[some], queries).numpy()
        return (p.argmax(1), p), repr(model)

    attention = chosen(candidates("attention"))
    quarter = representatives(known, labels, share=0.25, by_class=True)
    return {
        "attention transducer": said(attention),
        "attention, most representative quarter": said(chosen(candidates("attention"), quarter), quarter),
        "1-NN": said(Nearest(1)),
        "k-NN": said(chosen([Nearest(n) for n in NEIGHBOURS])),
        "under-bagging k-NN": said(chosen([UnderBagging(n, bags=10) for n in (1, 5, 15)])),
        "label propagation": said(chosen([Propagation(temperature=t, balanced=True) for t in (0.02, 0.1)])),
        "laplacian smoothing of attention": said(Smoothing(attention)),
        "prototype rectification": said(Rectification()),
    }


def theirs(known: Tensor, labels: Tensor, queries: Tensor, seed: int) -> dict[str, tuple[Answer, str]]:
    """scikit-learn's, each over a grid."""
    weights = [None, "balanced"]
    grids: dict[str, tuple[BaseEstimator, dict[str, Any]]] = {
        "logistic regression": (LogisticRegression(max_iter=2000), {"C": [0.01, 0.1, 1], "class_weight": weights}),
        "MLP": (MLPClassifier((32,), solver="lbfgs", max_iter=200, random_state=seed), {"alpha": [1e-4, 1.0]}),
        "SVM": (SVC(), {"C": [0.1, 1, 10], "class_weight": weights}),
        "k-NN of scikit-learn": (KNeighborsClassifier(metric="cosine"), {"n_neighbors": list(NEIGHBOURS)}),
    }
    x, t, z = known.numpy(), labels.numpy(), queries.numpy()
    rarest = int(np.bincount(t)[np.unique(t)].min())
    found = {}
    for name, (model, grid) in grids.items():
        steps = [model] if "k-NN" in name else [StandardScaler(), model]
        pipe, prefix = make_pipeline(*steps), type(model).__name__.lower() + "__"
        params = {prefix + key: values for key, values in grid.items()}
        if rarest >= 2:
            folds = StratifiedKFold(min(5, rarest), shuffle=True, random_state=seed)
            smallest = int(len(t) * (1 - 1 / folds.n_splits)) - 1
            if "k-NN" in name:
                params = {key: [v for v in values if v <= smallest] for key, values in params.items()}
            pipe = GridSearchCV(pipe, params, scoring="balanced_accuracy", cv=folds)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an MLP that has not converged says so for every fold
            pipe.fit(x, t)
        scores = pipe.predict_proba(z) if hasattr(pipe, "predict_proba") else pipe.decision_function(z)
        found[name] = ((pipe.predict(z), scores), str(getattr(pipe, "best_params_", "defaults")))
    return found


def own_confidence(known: Tensor, labels: Tensor, queries: Tensor) -> Answer:
    """No second model: an error where the largest probability is below the threshold that parts the known best."""
    doubt, asked = 1 - known.amax(1).numpy(), 1 - queries.amax(1).numpy()
    cut = max(np.unique(doubt), key=lambda c: balanced_accuracy(labels.numpy(), (doubt >= c).astype(int)))
    return (asked >= cut).astype(int), asked


def cell(data: Dataset, pooled: dict[str, Tensor], truth: dict[str, Tensor], shots: int, seed: int) -> dict[str, Any]:
    """One classifier and everything that is asked about it: {use|features|row: scores}."""
    place = {item.id: n for n, item in enumerate(data.split("train"))}
    support = torch.tensor([place[item.id] for item in sample_shots(data, shots, seed, task="classify")])
    k = len(data.label_names)
    probe = linear_probe(pooled["train"][support], truth["train"][support], k)
    with torch.no_grad():
        p = {split: class_probabilities(probe, pooled[split]) for split in ("val", "test")}
    scores: dict[str, Any] = {}
    for use in USES:
        target = {s: truth[s] if use == "labels" else (p[s].argmax(1) != truth[s]).long() for s in p}
        plain = (
            (p["test"].argmax(1).numpy(), p["test"].numpy())
            if use == "labels"
            else own_confidence(p["val"], target["val"], p["test"])
        )
        for kind in KINDS:
            x = {s: unit(p[s] if kind == "probabilities" else torch.cat([unit(pooled[s]), unit(p[s])], 1)) for s in p}
            n = k if use == "labels" else 2
            rows = {"the classifier itself": (plain, "")}
            rows |= ours(x["val"], target["val"], x["test"], n) | theirs(x["val"], target["val"], x["test"], seed)
            for row, ((said, score), settings) in rows.items():
                scores[f"{use}|{kind}|{row}"] = {
                    "accuracy": accuracy(target["test"].numpy(), said),
                    "f_of_errors": f_score(target["test"].numpy(), said, 1) if use == "errors" else None,
                    "balanced_accuracy": balanced_accuracy(target["test"].numpy(), said),
                    "auc": auc(target["test"].numpy(), score),
                    "settings": settings,
                }
    return scores


def main() -> None:
    """Fill every cell and write `results/gpt4mia.{json,md}`."""
    began = time.perf_counter()
    backbone = load_backbone("medgraft:starter-vit")
    cells: dict[str, Any] = {}
    for pack, shots in PACKS.items():
        data = load_dataset(data_root() / pack, labels="label")
        seen = {split: features_of(backbone, data, data.split(split)) for split in ("train", "val", "test")}
        pooled, truth = ({s: pair[i] for s, pair in seen.items()} for i in (0, 1))
        for seed in SEEDS:
            cells[f"{pack}|{seed}"] = cell(data, pooled, truth, shots, seed)
            print(pack, seed, f"{time.perf_counter() - began:.0f} s", flush=True)
    report(cells, time.perf_counter() - began)


def report(cells: dict[str, Any], seconds: float) -> None:
    """A table for each pack and use: means over seeds with their 95 % intervals."""
    record = {**facts(), "shots": PACKS, "seeds": SEEDS, "seconds": seconds, "cells": cells}
    text = ["# Transductive heads: where a frozen classifier errs, and correcting it", ""]
    text += [
        f"`medgraft:starter-vit`; a linear probe on {' and '.join(f'{n} images a class of {p}' for p, n in PACKS.items())}; "
        f"known samples: the validation split; scores on the test split, mean ± 95 % over seeds {list(SEEDS)}. Each cell: on class "
        "probabilities and pooled features together, and in brackets on class probabilities alone (the paper's choice). An interval "
        "is over draws of the probe's training images: the known and the test images are the same ones in all.",
        "",
    ]
    for pack in PACKS:
        for use in USES:
            of = [cells[f"{pack}|{seed}"] for seed in SEEDS]
            names = [key.split("|")[2] for key in of[0] if key.startswith(f"{use}|both|")]
            metrics = ["f_of_errors", "balanced_accuracy", "auc"] if use == "errors" else ["balanced_accuracy", "auc"]
            rows = []
            for name in names:
                pair = [
                    [_spread([c[f"{use}|{kind}|{name}"][m] for c in of]) for kind in ("both", "probabilities")]
                    for m in metrics
                ]
                same = name == "the classifier itself"
                rows.append([name, *(a if same else f"{a} ({b})" for a, b in pair)])
            title = "detecting its errors" if use == "errors" else "correcting its predictions"
            header = [
                "row",
                *({"f_of_errors": "F of the errors", "auc": "AUC"}.get(m, m.replace("_", " ")) for m in metrics),
            ]
            text += [f"## {pack}: {title}", "", table(header, rows), ""]
    text.append(f"{footer(record)} All cells: {seconds:.0f} seconds.")
    write("gpt4mia", record, "\n".join(text))


def _spread(values: list[float]) -> str:
    found = np.array(values)
    return f"{found.mean():.3f} ± {T_95 * found.std(ddof=1) / np.sqrt(len(found)):.3f}"


if __name__ == "__main__":
    main()
