"""The command line: `python -m adaptive_llava <command> ...`."""

from __future__ import annotations

import importlib
import sys

from adaptive_llava.training.whole_folder import NotWritten


COMMANDS = {
    "calibrate": ("adaptive_llava.training.calibrate", "choose thresholds for a mean token count or a bounded loss"),
    "train-router": ("adaptive_llava.training.train_router", "train a classifier router on labelled images"),
    "convert": ("adaptive_llava.training.convert", "give a LLaVA checkpoint a compressor and a router"),
    "evaluate": ("adaptive_llava.training.evaluate", "answer a dataset at several token budgets, and score it"),
    "documents": ("adaptive_llava.training.documents_day", "fine-tune on pages, and tell how many tokens they need"),
    "freeze-budget": ("adaptive_llava.training.freeze_budget", "write a copy with one token count for all images"),
    "card": ("adaptive_llava.hub_cards.card", "write a model's card from its results, or check the one it has"),
    "push": ("adaptive_llava.hub_cards.push", "upload a model or adapter to the Hub, as one commit"),
    "push-space": ("adaptive_llava.hub_cards.push_space", "upload the demo to a Space"),
    "verify": ("adaptive_llava.hub_cards.verify", "check what a repository of the Hub would run"),
    "profile": ("adaptive_llava.training.profile", "FLOPs by part, cache bytes, and times beside what FLOPs predict"),
    "serve": ("adaptive_llava.serve", "answer chats with images over OpenAI's protocol"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; each has its own `--help`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m adaptive_llava <command> [options]\n")
        for name, (_, what) in COMMANDS.items():
            print(f"  {name:<15}{what}")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"unknown command {arguments[0]!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(COMMANDS[arguments[0]][0]).main(arguments[1:]) or 0
    except (ValueError, FileNotFoundError, NotWritten) as error:
        print(f"python -m adaptive_llava {arguments[0]}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
