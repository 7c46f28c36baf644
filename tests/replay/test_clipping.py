"""Clipping in reverse, against plain autograd through the same formula."""

from __future__ import annotations

import pytest
import torch

from assay.replay.clipping import EPSILON, Clipping


@pytest.mark.parametrize("factor", [1.0, 0.5, -2.0])
@pytest.mark.parametrize("largest", [None, 0.3, 1e3])
@pytest.mark.parametrize("size", [0.0, 1e-3, 4.0])
def test_the_adjoint_is_that_of_autograd(largest: float | None, factor: float, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    g = size * torch.randn(7, generator=generator, dtype=torch.float64)
    of_received = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    clipping, norm = Clipping(largest, factor), float(g.norm())

    def received(g: torch.Tensor) -> torch.Tensor:
        scaled = factor * g
        if largest is None or size == 0:  # at zero the norm has no derivative, and nothing is clipped
            return scaled
        return scaled * (largest / (scaled.norm() + EPSILON)).clamp(max=1.0)

    torch.testing.assert_close(clipping.scale(norm) * g, received(g))
    jacobian = torch.autograd.functional.jacobian(received, g)
    torch.testing.assert_close(clipping.pull(g, norm, of_received.clone()), of_received @ jacobian)
