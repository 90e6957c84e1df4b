"""Settings of parts: each is checked where it is made, and the message names it."""

from __future__ import annotations

import pytest

from lowrank_optim import (
    Compensated,
    ErrorFeedback,
    GeneralErrorFeedback,
    LowRank,
    Muon,
    Orthogonal,
    RowColumnScaled,
    WholeMomentum,
)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ErrorFeedback(keep=1.0), "keep must be a number from 0 and below 1, got 1.0"),
        (lambda: ErrorFeedback(keep=True), "keep must be a number"),
        (lambda: GeneralErrorFeedback(rho=1.5), r"rho must be a number in \[0, 1\], got 1.5"),
        (lambda: Muon(momentum=-0.1), "momentum must be a number from 0 and below 1"),
        (lambda: Muon(iterations=0), "iterations must be an int of at least 1, got 0"),
        (lambda: Orthogonal("long"), "length must be one of original, match_rms_adamw, dion, none"),
        (lambda: RowColumnScaled(beta=float("nan")), "beta must be a number"),
        (lambda: RowColumnScaled(iterations=2.5), "iterations must be an int"),
        (lambda: Compensated(factor=-1), "factor must be a number from 0, got -1"),
        (lambda: Compensated(limiter=0.9), "limiter must be None or a number of at least 1"),
    ],
)
def test_parts_check_their_settings(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rule": "normuon"}, 'rule NorMuon does not go with the projector SVD.*"identity"'),
        ({"rule": "row_column_scaled", "projector": "dct"}, "projector DCT"),
        ({"feed": "error_feedback", "projector": "blocks", "on_refresh": "reset", "rank": 0.5},
         "feed ErrorFeedback does not go with the projector Blocks"),
        ({"feed": WholeMomentum(), "on_refresh": "rotate"},
         "on_refresh='rotate' does not go with the feed WholeMomentum: choose one of 'keep'"),
        ({"feed": ErrorFeedback(dtype="3bit")}, "dtype='3bit' of the feed ErrorFeedback"),
        ({"feed": "general_error_feedback", "capturable": True, "projector": "power"},
         "capturable=True does not go with the feed GeneralErrorFeedback"),
        ({"feed": "errors"}, "feed='errors': feed must be one of 'gradient', 'error_feedback'"),
    ],
)  # fmt: skip
def test_parts_that_do_not_go_together_are_refused(settings, said):
    import torch

    with pytest.raises(ValueError, match=said):
        LowRank([torch.nn.Parameter(torch.zeros(6, 5))], **{"rank": 2, **settings})
