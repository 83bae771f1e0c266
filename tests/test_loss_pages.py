"""The page of each loss: its parts, and its example call."""

from __future__ import annotations

import pytest

from tinkerbell_core.spec import LossSpec
from tools.loss_pages import bundled_losses, example_call, loss_page

LOSSES = [spec for specs in bundled_losses().values() for spec in specs]


def test_a_page_contains_the_formula_the_paper_and_the_source() -> None:
    [dpo] = [spec for spec in LOSSES if spec.name == "dpo"]
    page = loss_page(dpo)
    for part in ("log sigmoid", "arXiv:2305.18290", "`ref_logprobs`", "`beta`", "`reward_accuracy`", "def dpo("):
        assert part in page


def test_the_names_of_the_pages_differ_if_case_is_ignored() -> None:
    assert len({spec.name.lower() for spec in LOSSES}) == len(LOSSES)


@pytest.mark.slow
@pytest.mark.parametrize("spec", LOSSES, ids=lambda spec: spec.name)
def test_the_example_of_a_page_runs(spec: LossSpec, torch_server: str) -> None:
    exec(example_call(spec).replace("http://localhost:8000", torch_server), {})
