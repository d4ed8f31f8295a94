"""Writes every figure in README.md from the result files, so that none is typed by hand.

    python -m adaptive_llava.training.readme_figures [--check]

A block between `<!-- figures: NAME -->` and `<!-- end figures -->` is replaced by what `results/NAME.json` says (the
study's stands elsewhere), or by the command that makes that file where it is missing. `--check` only tells whether
README.md is up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from adaptive_llava.training.readme_blocks import BLOCKS


ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"<!-- figures: (\w+) -->\n.*?<!-- end figures -->", re.DOTALL)
# Result files that do not stand in `results/` under the name of their block.
_ELSEWHERE = {"study_cpu": Path("../training/study/results/cpu.json")}


def fill(text: str, results: Path) -> str:
    """README text with every block written from its result file.

    Raises:
        ValueError: A block has no entry in `BLOCKS`.
    """

    def write(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in BLOCKS:
            raise ValueError(f"README block {name!r} is unknown. Known blocks: {', '.join(BLOCKS)}.")
        render, command = BLOCKS[name]
        path = results / _ELSEWHERE.get(name, f"{name}.json")
        body = render(json.loads(path.read_text())) if path.exists() else f"(not measured yet: `{command}`)"
        return f"<!-- figures: {name} -->\n{body}\n<!-- end figures -->"

    return _BLOCK.sub(write, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite README.md, or check it."""
    parser = argparse.ArgumentParser(description="Write the figures of README.md from the result files.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if README.md is out of date")
    options = parser.parse_args(arguments)
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = fill(before, ROOT / "results")
    if options.check:
        print("README.md is up to date." if before == after else "README.md is out of date: run this without --check.")
        return int(before != after)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
