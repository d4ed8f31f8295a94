"""Every published system whose authors published code, against what that code gave."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file, save_file

from adaptive_llava.training.golden_parity import CASES, parity_errors


pytestmark = pytest.mark.compat


@pytest.mark.parametrize("preset", sorted({preset for preset, _, _ in CASES}))
def test_a_system_equals_its_authors_code(shared, preset):
    errors = parity_errors(shared / "golden", preset)
    assert set(errors) == {path for owner, path, _ in CASES if owner == preset}
    assert max(errors.values()) <= 1e-5, errors


def test_a_wrong_weight_shows(shared, tmp_path):
    for owner, path, _ in CASES:
        if owner == "llava-mini":
            golden = load_file(shared / "golden" / f"{path}.safetensors")
            wrong = {name: value + 1e-3 if "in_proj_w" in name else value for name, value in golden.items()}
            (tmp_path / path).parent.mkdir(exist_ok=True)
            save_file(wrong, tmp_path / f"{path}.safetensors")
    assert min(parity_errors(tmp_path, "llava-mini").values()) > 1e-4
