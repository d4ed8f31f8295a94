"""A push is one commit; whatever fails, nothing half-uploaded shows, and the next push completes it."""

from __future__ import annotations

import pytest

from tests.loopback_hub.traffic import LOAD_FAULTS, PUSH_FAULTS, REFUSED_LOADS, measure


pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def report(hub, tmp_path_factory):
    return measure(hub, tmp_path_factory.mktemp("traffic"))


def test_a_push_is_one_commit_and_a_repeat_sends_next_to_nothing(report):
    first, again = report["first push"], report["the same push again"]
    changed = report["a push with one changed file"]
    assert first["by_kind"]["commit"] == changed["by_kind"]["commit"] == 1 and "commit" not in again["by_kind"]
    assert "large files: send" not in again["by_kind"] | changed["by_kind"]
    assert again["bytes_sent"] < first["bytes_sent"] / 100
    assert changed["bytes_sent"] < first["bytes_sent"] / 100


def test_the_commit_that_a_card_pins_has_one_more_on_top(report):
    first, again = (report[f"{name}, with a card of ours"] for name in ("first push", "the same push again"))
    assert first["by_kind"]["commit"] == 2 and first["by_kind"]["large files: send"] == 2  # weights and a plot
    assert not {"commit", "preupload", "large files: ask"} & set(again["by_kind"]) and again["bytes_sent"] < 1000


@pytest.mark.parametrize("number", range(len(PUSH_FAULTS)), ids=list(PUSH_FAULTS))
def test_a_failed_push_shows_nothing_and_the_next_one_completes_it(report, number):
    case = report["faults of a push"][number]
    lost = case["fault"] == "the answer to the commit is lost"
    survived = case["fault"] == "sending the weights is cut once"
    complete = case["files_visible_at_last"]
    assert complete > 50
    assert case["files_visible_after"] == (complete if lost or survived else 0)
    assert (case["seen"] == "success") == survived
    if not survived:
        assert f"ada/fault-{number} was not pushed: " in case["seen"] and "un the same command again" in case["seen"]
    assert case["next_push"].endswith("has all of it already" if lost or survived else "pushed in one commit")
    # what had arrived before the fault is not sent again
    assert case["sent_by_the_next_push"] == (0 if "commit" in case["fault"] or survived else 1)


@pytest.mark.parametrize("number", range(len(LOAD_FAULTS)), ids=list(LOAD_FAULTS))
def test_a_failed_load_leaves_nothing_that_spoils_the_next(report, number):
    assert report["faults of a load"][number]["next_load"] == "success"


@pytest.mark.parametrize("number", range(len(REFUSED_LOADS)), ids=list(REFUSED_LOADS))
def test_a_load_that_may_not_be_says_which_repository_or_revision(report, number):
    case = report["refused loads"][number]
    assert case["seen"].startswith("OSError: ")
    assert any(name in case["seen"] for name in ("ada/private", "ada/public", "ada/nothing"))
