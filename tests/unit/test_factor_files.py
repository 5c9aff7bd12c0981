"""Files of nested factors, and one rank's slice of them."""

import pytest
import torch

from eora import factor_files, solver
from eora.errors import Mistake


def test_a_rank_above_a_narrow_layers_width_takes_all_of_it(tmp_path):
    torch.manual_seed(0)
    errors = {"k": torch.randn(32, 64), "up": torch.randn(96, 64)}
    metric = solver.Metric(torch.eye(64), "eora")
    fitted = {name: solver.decompose(error, metric, 48) for name, error in errors.items()}
    factor_files.save(tmp_path / "block-00000.safetensors", fitted, False)
    pairs, curves = factor_files.slice_rank([tmp_path / "block-00000.safetensors"], 48)
    assert {name: len(a) for name, (a, _) in pairs.items()} == {"k": 32, "up": 48}
    torch.testing.assert_close(pairs["k"][1] @ pairs["k"][0], errors["k"], rtol=1e-4, atol=1e-4)
    assert curves["k"][-1] < 1e-4 * curves["k"][0]
    with pytest.raises(Mistake, match="rank 49 is above what up was decomposed to"):
        factor_files.slice_rank([tmp_path / "block-00000.safetensors"], 49)
