"""The harness of Hugging Face's tests, and what its report says. The suites themselves: `make suites`."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from adaptive_llava import PRESETS
from tests.suites import source_tests
from tests.suites.run import Recorder, report
from tests.suites.source_tests import SHA256, NotFetched, fetch_tests, without_unknown_tests


RESULTS = Path(__file__).resolve().parents[1] / "results" / "suites.json"


def distribution(folder: Path, version: str, *names: str) -> Path:
    """A source distribution with these files."""
    path = folder / f"transformers-{version}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            entry = tarfile.TarInfo(f"transformers-{version}/{name}")
            entry.size = 4
            archive.addfile(entry, io.BytesIO(b"x=1\n"))
    return path


def test_only_the_tests_are_unpacked_once(tmp_path, monkeypatch):
    path = distribution(tmp_path, "9.9", "tests/test_modeling_common.py", "src/transformers/__init__.py", "setup.py")
    monkeypatch.setitem(SHA256, "9.9", hashlib.sha256(path.read_bytes()).hexdigest())
    folder = fetch_tests("9.9", tmp_path)
    assert [file.name for file in folder.rglob("*.py")] == ["test_modeling_common.py"]
    assert fetch_tests("9.9", tmp_path) == folder


def test_a_distribution_with_another_checksum_is_refused(tmp_path):
    distribution(tmp_path, "5.23.0", "tests/test_modeling_common.py")
    with pytest.raises(ValueError, match="has the checksum .* expected 19d647a4"):
        fetch_tests("5.23.0", tmp_path)


def test_a_release_without_a_checksum_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`version='1.0'` has no checksum here; known: 5.23.0, 4.57.6"):
        fetch_tests("1.0", tmp_path)


def test_without_an_index_nothing_is_fetched_and_the_reason_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(NotFetched, match=r"transformers' own tests \(5.23.0\) could not be downloaded: ERROR: "):
        fetch_tests("5.23.0", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(("ci", "raised"), [("", pytest.skip.Exception), ("true", NotFetched)])
def test_a_suite_that_is_not_fetched_is_skipped_but_fails_in_ci(monkeypatch, ci, raised):
    def fetch(*_):
        raise NotFetched("no network")

    monkeypatch.setattr(source_tests, "fetch_tests", fetch)
    monkeypatch.setenv("CI", ci)
    with pytest.raises(raised, match="no network"):
        source_tests.load_tests("test_modeling_common")


def test_overrides_of_tests_that_a_release_lacks_are_taken_out():
    class Theirs:
        def test_known(self):
            return "theirs"

    @without_unknown_tests
    class Ours(Theirs):
        def test_known(self):
            return "ours"

        def test_new(self):
            return "ours"

    assert Ours().test_known() == "ours"
    assert not hasattr(Ours, "test_new")


def outcome(node: str, outcome: str, longrepr: object = None, **more: object) -> SimpleNamespace:
    flags = {name: name == outcome for name in ("passed", "skipped", "failed")}
    return SimpleNamespace(nodeid=node, when="call", longrepr=longrepr, **flags, **more)


def test_the_report_counts_what_a_preset_fails_and_skips_beside_stock_llava():
    recorder = Recorder()
    for line in (
        outcome("model_suite.py::StockLlava::test_a", "passed"),
        outcome("model_suite.py::StockLlava::test_b", "passed"),
        outcome("model_suite.py::StockLlava::test_greedy_generate", "failed", "E: no"),
        outcome("model_suite.py::Dfmr::test_a", "skipped", ("file", 1, "Skipped: <class 'x.Y'> has none")),
        outcome("model_suite.py::Dfmr::test_b", "failed", "E: subtest", context="part"),
        outcome("model_suite.py::Dfmr::test_b", "passed"),
        outcome("model_suite.py::Dfmr::test_greedy_generate", "passed"),
    ):
        recorder.pytest_runtest_logreport(line)
    result = report(recorder, {"StockLlava": "stock LLaVA", "Dfmr": "dfmr"})
    assert result["counts"]["model"]["dfmr"] == {"passed": 0, "skipped": 1, "failed": 1}
    assert result["counts"]["generation"]["dfmr"] == {"passed": 1, "skipped": 0, "failed": 0}
    assert result["passed"] == {"stock LLaVA": 2, "dfmr": 1}
    assert result["more_passed_than_stock"] == {"dfmr": False}
    assert result["failures"] == {"dfmr": {"test_b": "E: subtest"}, "stock LLaVA": {"test_greedy_generate": "E: no"}}
    assert result["failures_of_presets"] == 1
    assert result["skipped_where_stock_passes"] == {"dfmr": ["test_a"]}
    assert result["skips"]["model"] == {"the class has none": {"test_a": ["dfmr"]}}


# The one test that stock LLaVA passes and ours skip; the reason stands in tests/suites/model_suite.py.
SKIPPED_ALONE = {"5.23.0": [], "4.57.6": ["test_can_init_all_missing_weights"]}


@pytest.mark.parametrize("version", SHA256)
def test_every_preset_passes_more_than_stock_llava_and_fails_nothing(version):
    run = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"][version]
    presets = run["more_passed_than_stock"]
    assert {"llava", "dfmr", "llava-mini"} <= presets.keys() <= PRESETS.keys()
    assert run["failures_of_presets"] == 0
    assert all(presets.values())
    expected = {preset: SKIPPED_ALONE[version] for preset in presets if SKIPPED_ALONE[version]}
    assert run["skipped_where_stock_passes"] == expected
