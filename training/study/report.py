"""The study's results as tables and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


ROUTERS = ("dfmr", "pixel", "classifier", "classifier_cls", "untrained_tower", "joint")
NAMES = {
    "dfmr": "DFMR's rule on features",
    "pixel": "the same rule on pixels",
    "classifier": "classifier, mean of patches",
    "classifier_cls": "classifier, [CLS]",
    "untrained_tower": "classifier, untrained tower",
    "joint": "classifier, trained jointly with another model",
    "random": "random",
    "kind_oracle": "oracle of kinds",
    "oracle": "oracle of images",
}
_COLOURS = {
    "dfmr": "#c0392b",
    "pixel": "#e67e22",
    "classifier": "#2471a3",
    "classifier_cls": "#7fb3d5",
    "untrained_tower": "#95a5a6",
    "joint": "#8e44ad",
    "random": "#b0b0b0",
    "kind_oracle": "#27ae60",
    "oracle": "#145a32",
}


def verdict(gain: Mapping[str, Any], minimum: float) -> str:
    """What `PLAN.md` calls a gain: `"pays"`, `"does not pay"` or `"open"`.

    Args:
        gain: Summary of a gain over the chord.
        minimum: Smallest effect of interest.
    """
    if gain["mean"] >= minimum and gain["low"] > 0:
        return "pays"
    return "does not pay" if gain["high"] < minimum else "open"


def headline(results: Mapping[str, Any]) -> str:
    """The primary comparison of every compressor with its verdicts, and the answers to the four further questions."""
    settings = results["settings"]
    rows = []
    for arm, found in results["compressors"].items():
        for policy in (*ROUTERS, "random", "kind_oracle", "oracle"):
            row = found["policies"][policy]
            said = verdict(row["over_chord"], settings["minimum_effect"]) if policy in ROUTERS else ""
            rows.append(
                [
                    f"{arm} ({_slashed(found['counts'])})",
                    NAMES[policy],
                    f"{row['tokens']['mean']:.1f}",
                    _percent(row["accuracy"]),
                    _gain(row["over_chord"]),
                    _gain(row["over_shuffled"]),
                    _gain(row["over_family_shuffled"]),
                    said,
                ]
            )
    head = ["compressor", "count chosen by", "tokens", "right", "over the best fixed", "over shuffled",
            "over shuffled in its kind", "routing"]  # fmt: skip
    left_out = sorted(set(results["admission"]) - set(results["compressors"]["pool"]["by_family"]))
    excuse = f" (left out: {', '.join(left_out)})"
    most_told = max(results["told_apart"], key=results["told_apart"].__getitem__)
    return (
        f"`{results['command']}`: {len(settings['seeds'])} seeds, {results['cpu_seconds'] / 60:.0f} CPU minutes "
        f"({_machine(results)}), {len(results['admission']) - len(left_out)} kinds of picture"
        f"{excuse if left_out else ''}. A linear probe on an untrained tower names the right one of two kinds that "
        f"look alike in at most {results['told_apart'][most_told]:.0%} of pictures ({most_told}). "
        f"Routers are set to a mean of {settings['target_mean']:g} tokens on other pictures. Gains are points of "
        "macro accuracy on the same weights, with 95 % intervals over seeds and pictures; the best fixed budget mixes "
        "the neighbouring counts at random. Rules and controls were written down before "
        f"the run (`training/study/PLAN.md`).\n\n{_table(head, rows)}\n\n{_answers(results)}"
    )


def _answers(results: Mapping[str, Any]) -> str:
    routed = results["routed_training"]
    joint = ", ".join(
        f"{arm.split()[0]} {_gain(found['policies']['at_target']['over_chord'])}"
        for arm, found in results["joint"].items()
    )
    crossed = []
    for answerer, found in results["exchanged"].items():
        chooser = "resampler" if answerer == "pool" else "pool"
        own, other = (found[f"{who} classifier"]["over_chord"] for who in ("own", f"{chooser}'s"))
        crossed.append(f"{answerer} with its own classifier {_gain(own)}, with that of {chooser} {_gain(other)}")
    on_pool = results["exchanged"]["pool"]
    oracles = ", ".join(
        f"{NAMES[name]} {_gain(on_pool[f'{who} {name}']['over_chord'])} by {whose}"
        for name in ("kind_oracle", "oracle")
        for who, whose in (("own", "its own answers"), ("resampler's", "the resampler's"))
    )
    one, most = (f"resampler fixed {results['settings']['counts'][end]}" for end in (0, -1))
    marks = list(results["steps"][one])
    ahead = [mark for mark in marks if results["steps"][one][mark] > results["steps"][most][mark]]
    early = (
        f"one token is ahead of {most.split()[-1]} after {', '.join(ahead)} steps"
        if ahead
        else f"one token is never ahead of {most.split()[-1]}"
    )
    first, last = (
        f"{100 * results['steps'][one][mark]:.1f} against {100 * results['steps'][most][mark]:.1f} % after {mark}"
        for mark in (marks[0], marks[-1])
    )
    late = results["last_quarter"].values()
    return (
        f"Routers trained jointly with their model, over the best fixed budget of the same weights: {joint}. Trained "
        "on DFMR's choices instead of random ones, both routed by DFMR: "
        f"{_gain(routed['difference in accuracy'])}. Choices made on other weights: {'; '.join(crossed)}. Of oracles, "
        f"on pool: {oracles}. Trained at "
        f"one count from the same base: {early} ({first}, {last}); the last quarter of their steps added "
        f"{100 * min(late):+.1f} to {100 * max(late):+.1f} points (less than 1 counts as converged)."
    )


def tables(results: Mapping[str, Any]) -> str:
    """All tables, as Markdown."""
    settings = results["settings"]
    parts = [
        f"# Does per-image routing pay? ({settings['name']})",
        f"`{results['command']}`, trained at commit {', '.join(results['trained_at'])}, analysed at "
        f"{results['analysed_at']} on {results['date']}; {_machine(results)}, torch {results['versions']['torch']}, "
        f"transformers {results['versions']['transformers']}, "
        f"{results['cpu_seconds'] / 60:.0f} CPU minutes. Means over {len(settings['seeds'])} seeds with 95 % "
        "intervals of a bootstrap over seeds and images; gains in points of macro accuracy.",
    ]
    parts += [headline(results)]
    parts += ["## What an untrained tower tells", _told_apart(results["told_apart"])]
    for arm, found in results["compressors"].items():
        parts += [f"## {arm}: {_slashed(found['counts'])} tokens", _policies(found)]
        parts += [_families(found)]
    parts += ["## Joint training", _joint(results["joint"])]
    parts += ["## Models trained at one count", _separate(results["separately_trained"])]
    parts += ["## Accuracy against steps", _steps(results["steps"], results["last_quarter"])]
    parts += ["## Trained on DFMR's choices, or on random ones", _routed(results["routed_training"])]
    for answerer, found in results["exchanged"].items():
        parts += [f"## Choices of another compressor's routers, carried out by {answerer}", _exchanged(found)]
    parts += ["## An oracle with a growing share of its choices shuffled", _quality(results["router_quality"])]
    parts += ["## Share of hard images", _shares(results["share_of_hard_images"])]
    for arm, found in results["real_images"].items():
        if found:
            parts += [f"## Tokens that routers on {arm} give to real images", _real(found)]
    return "\n\n".join(parts) + "\n"


def draw(results: Mapping[str, Any], output: Path) -> None:
    """`<name>_frontier.png`, `_gain.png`, `_hard_share.png`, `_router_quality.png` and `_steps.png`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    name = results["settings"]["name"]
    for what, paint in (
        ("frontier", _draw_frontier),
        ("gain", _draw_gain),
        ("hard_share", _draw_hard_share),
        ("router_quality", _draw_quality),
        ("steps", _draw_steps),
    ):
        figure = Figure(figsize=(9, 3.6) if what in ("frontier", "gain") else (6, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        paint(results, figure)
        figure.savefig(output / f"{name}_{what}.png", dpi=110)


def _told_apart(found: Mapping[str, float]) -> str:
    rows = [[pair, f"{100 * share:.1f} %"] for pair, share in found.items()]
    return _table(["kinds that look alike", "a linear probe names the right one (chance: 50 %)"], rows)


def _policies(found: Mapping[str, Any]) -> str:
    rows = []
    for policy, measures in found["policies"].items():
        if policy.startswith("always"):
            rows.append([policy, policy.split()[1], _percent(measures["accuracy"]), "", "", "", "", ""])
            continue
        gains = [_gain(measures[m]) for m in ("over_chord", "over_hull", "over_shuffled", "over_family_shuffled")]
        auc = found["auc"].get(policy)
        tokens = f"{measures['tokens']['mean']:.1f}"
        rows.append(
            [NAMES[policy], tokens, _percent(measures["accuracy"]), *gains, "" if auc is None else f"{auc:.2f}"]
        )
    head = ["policy", "tokens", "accuracy", "over chord", "over hull", "over shuffled", "over shuffled in kind", "AUC"]
    return _table(head, rows)


def _families(found: Mapping[str, Any]) -> str:
    shown = ("dfmr", "pixel", "classifier", "kind_oracle", "oracle")
    counts = [str(count) for count in found["counts"]]
    rows = [
        [
            family,
            " / ".join(f"{100 * row['accuracy'][count]:.0f}" for count in counts),
            *(f"{row['tokens'][policy]:.1f}" for policy in shown),
        ]
        for family, row in found["by_family"].items()
    ]
    return _table(["family", f"right at {_slashed(counts)}, %", *(f"tokens: {NAMES[p]}" for p in shown)], rows)


def _joint(found: Mapping[str, Any]) -> str:
    rows = [
        [
            arm,
            policy.replace("_", " "),
            f"{measures['tokens']['mean']:.1f}" if "tokens" in measures else policy.split()[1],
            _percent(measures["accuracy"]),
            _gain(measures["over_chord"]) if "over_chord" in measures else "",
            _gain(measures["over_shuffled"]) if "over_shuffled" in measures else "",
        ]
        for arm, result in found.items()
        for policy, measures in result["policies"].items()
    ]
    return _table(["arm", "policy", "tokens", "accuracy", "over chord", "over shuffled"], rows)


def _separate(found: Mapping[str, Any]) -> str:
    rows = [[arm, f"{100 * row['accuracy']:.1f} %"] for arm, row in found.items()]
    return _table(["trained at", "accuracy there"], rows)


def _steps(found: Mapping[str, Any], last_quarter: Mapping[str, float]) -> str:
    marks = list(next(iter(found.values())))
    rows = [
        [arm, *(f"{100 * row[mark]:.1f}" for mark in marks), f"{100 * last_quarter[arm]:+.1f}"]
        for arm, row in found.items()
    ]
    return _table(["right after steps, %", *marks, "in the last quarter"], rows)


def _routed(found: Mapping[str, Any]) -> str:
    rows = []
    for name, row in found.items():
        if "accuracy" in row:
            rows.append([name, _percent(row["accuracy"]), f"{row['tokens']['mean']:.1f}", _gain(row["over_chord"])])
        else:
            rows.append([name, "", "", _gain(row)])
    return _table(["", "accuracy", "tokens", "points"], rows)


def _exchanged(found: Mapping[str, Any]) -> str:
    rows = [
        [policy, f"{row['tokens']['mean']:.1f}", _percent(row["accuracy"]), _gain(row["over_chord"])]
        for policy, row in found.items()
        if not policy.startswith("always")
    ]
    return _table(["choices", "tokens", "accuracy", "over chord"], rows)


def _quality(rows: Sequence[Mapping[str, Any]]) -> str:
    return _table(
        ["shuffled", "AUC", "tokens", "accuracy", "over chord"],
        [
            [
                f"{100 * row['shuffled_share']:.0f} %",
                "" if row["auc"] is None else f"{row['auc']:.2f}",
                f"{row['tokens']:.1f}",
                f"{100 * row['accuracy']:.1f} %",
                f"{100 * row['over_chord']:+.1f}",
            ]
            for row in rows
        ],
    )


def _real(found: Mapping[str, Any]) -> str:
    kinds = list(next(iter(found.values())))
    rows = [[NAMES[router], *(f"{tokens[kind]:.1f}" for kind in kinds)] for router, tokens in found.items()]
    return _table(["mean tokens", *kinds], rows)


def _shares(found: Mapping[str, Any]) -> str:
    if not found:
        return "No families of both sorts."
    shares = [row["share"] for row in next(iter(found.values()))]
    rows = [[NAMES[policy], *(_gain(row["over_chord"]) for row in cells)] for policy, cells in found.items()]
    return _table(["over chord, at hard images", *(f"{100 * share:.0f} %" for share in shares)], rows)


def _draw_frontier(results: Mapping[str, Any], figure: Any) -> None:
    for axes, (arm, frontier) in zip(figure.subplots(1, 2, sharey=True), results["frontiers"].items(), strict=True):
        found = results["compressors"][arm]
        counts = found["counts"]
        fixed = [100 * found["policies"][f"always {count}"]["accuracy"]["mean"] for count in counts]
        axes.plot(counts, fixed, "k--o", label="fixed, and chords between", markersize=4, linewidth=1)
        for policy, points in frontier.items():
            line = sorted((point["tokens"], 100 * point["accuracy"]) for point in points)
            axes.plot(*zip(*line, strict=True), "-", color=_COLOURS[policy], label=NAMES[policy])
        best = found["policies"]["oracle"]
        axes.plot(best["tokens"]["mean"], 100 * best["accuracy"]["mean"], "*", color=_COLOURS["oracle"],
                  markersize=12, label=NAMES["oracle"])  # fmt: skip
        axes.set(title=arm, xlabel="mean tokens per image")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("macro accuracy, %")
    figure.axes[0].legend(fontsize=7)


def _draw_gain(results: Mapping[str, Any], figure: Any) -> None:
    shown = [policy for policy in NAMES if policy not in ("random", "oracle")]
    for axes, (arm, found) in zip(figure.subplots(1, 3, sharey=True), results["compressors"].items(), strict=True):
        for place, policy in enumerate(shown):
            gain = found["policies"][policy]["over_chord"]
            low, high = 100 * (gain["mean"] - gain["low"]), 100 * (gain["high"] - gain["mean"])
            axes.errorbar(100 * gain["mean"], place, xerr=[[low], [high]], fmt="o", color=_COLOURS[policy])
            axes.plot([100 * value for value in gain["by_seed"]], [place] * len(gain["by_seed"]), "|", color="#999999")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.axvline(100 * results["settings"]["minimum_effect"], color="black", linewidth=0.8, linestyle=":")
        axes.set(title=arm, xlabel="gain over the chord, points")
        axes.set_yticks(range(len(shown)), [NAMES[policy] for policy in shown], fontsize=7)
        axes.grid(alpha=0.3, axis="x")
    figure.axes[0].invert_yaxis()


def _draw_hard_share(results: Mapping[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    for policy, rows in results["share_of_hard_images"].items():
        shares = [100 * row["share"] for row in rows]
        axes.plot(shares, [100 * row["over_chord"]["mean"] for row in rows], color=_COLOURS[policy],
                  label=NAMES[policy])  # fmt: skip
        low, high = ([100 * row["over_chord"][end] for row in rows] for end in ("low", "high"))
        axes.fill_between(shares, low, high, color=_COLOURS[policy], alpha=0.12, linewidth=0)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="hard images, %", ylabel="gain over the chord, points", title="pool")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=7)


def _draw_quality(results: Mapping[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    rows = [row for row in results["router_quality"] if row["auc"] is not None]
    axes.plot([r["auc"] for r in rows], [100 * r["over_chord"] for r in rows], "-", color="#145a32",
              label="oracle, partly shuffled")  # fmt: skip
    pool = results["compressors"]["pool"]
    for policy, auc in ((policy, auc) for policy, auc in pool["auc"].items() if auc is not None):
        gain = 100 * pool["policies"][policy]["over_chord"]["mean"]
        axes.plot(auc, gain, "o", color=_COLOURS[policy], label=NAMES[policy])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axhline(100 * results["settings"]["minimum_effect"], color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="AUC: does the choice tell who needs more?", ylabel="gain over the chord, points", title="pool")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _draw_steps(results: Mapping[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    for arm, row in results["steps"].items():
        line = "-" if arm.startswith("pool") else "--"
        axes.plot([int(mark) for mark in row], [100 * value for value in row.values()], line, marker=".", label=arm)
    axes.set(xlabel="steps", ylabel="macro accuracy, %", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _machine(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    return machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _percent(value: Mapping[str, Any]) -> str:
    return f"{100 * value['mean']:.1f} %"


def _gain(value: Mapping[str, Any]) -> str:
    return f"{100 * value['mean']:+.1f} ({100 * value['low']:+.1f} to {100 * value['high']:+.1f})"


def _slashed(values: Sequence[Any]) -> str:
    return "/".join(str(value) for value in values)
