"""What flows through a backbone."""

import torch

from medgraft.backbones import Features, State


def test_a_state_maps_over_all_of_its_tensors() -> None:
    state = State(torch.arange(3.0)[:, None], 2, {"skip": torch.arange(3)}, {"grid": (2, 2)})
    taken = state.rows(torch.tensor([2, 0, 2]))
    assert taken.x[:, 0].tolist() == [2, 0, 2]
    assert taken.kept["skip"].tolist() == [2, 0, 2]
    assert (taken.stage, taken.meta) == (2, {"grid": (2, 2)})
    assert state.x[:, 0].tolist() == [0, 1, 2]
    assert state.nbytes == 3 * 4 + 3 * 8
    on = state.step(state.x + 1, meta={"grid": (4, 4)})
    assert (on.stage, on.meta, on.kept["skip"].tolist()) == (3, {"grid": (4, 4)}, [0, 1, 2])
    assert state.stage == 2


def test_features_take_rows_of_everything() -> None:
    f = Features(
        [torch.arange(6.0).view(3, 2, 1, 1)],
        [4],
        torch.arange(3.0)[:, None],
        torch.arange(3.0).view(3, 1, 1, 1),
        torch.arange(3.0).view(3, 1, 1),
    )
    f = f.with_extra(prompt=torch.arange(3).view(3, 1))
    row = f.row(2)
    assert row.maps[0].flatten().tolist() == [4, 5]
    assert row.pooled.tolist() == [[2]]
    assert row.raw.flatten().tolist() == [2]
    assert row.tokens.flatten().tolist() == [2]
    assert row.extra["prompt"].tolist() == [[2]]
    assert row.strides == [4]
    assert Features(f.maps, [4], f.pooled, f.raw).row(0).tokens is None
    assert f.with_extra(other=f.raw).extra.keys() == {"prompt", "other"}
