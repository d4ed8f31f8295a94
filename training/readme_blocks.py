"""README's blocks: what each result file says, as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adaptive_llava.training import readme_reliability
from adaptive_llava.training.markdown_table import table
from adaptive_llava.training.quickstart_report import run_labels


def routing_real_images(result: dict[str, Any]) -> str:
    """Tokens per kind of real image after calibration, and what follows from them."""
    found = result["fits"]["pad"]
    rows = [
        [
            kind,
            row["num_images"],
            f"{row['mean_tokens']:.0f} ({row['interval'][0]:.0f} to {row['interval'][1]:.0f})",
            *(f"{row['shares'][str(count)]:.0%}" for count in result["counts"]),
        ]
        for kind, row in found["kinds"].items()
    ]
    header = ["kind", "images", "mean tokens (95 %)", *(f"{count} tokens" for count in result["counts"])]
    separation = "; ".join(
        f"{pair}: {scores['router']['auc']:.2f} by DFMR's score, {scores['pixels']['auc']:.2f} by the same statistic "
        "of the pixels"
        for pair, scores in found["auc"].items()
    )
    return (
        f"DFMR calibrated to a mean of {result['target_mean']:.0f} of {result['counts'][-1]} tokens, tower: "
        f"{result['tower']} (`python -m adaptive_llava.training.routing_study`):\n\n{table(header, rows)}\n\n"
        f"In words: {found['conclusion']} Chance that a page scores higher than a photo: {separation}.\n\n"
        f"{_classifier_scores(found['classifier'])}\n\n"
        "![Mean tokens and shares per kind](results/routing_real_images.png)"
    )


def pixel_agreement(result: dict[str, Any]) -> str:
    """How often the two routers that measure spread choose the same count, in one paragraph."""
    found = result["fits"]["pad"]
    kinds = ", ".join(
        f"{kind} {row['mean_tokens']['features']:.0f} and {row['mean_tokens']['pixels']:.0f} (same count: "
        f"{row['agreement']:.0%})"
        for kind, row in found["kinds"].items()
    )
    return (
        f"Calibrated to the same mean of {result['target_mean']:.0f} tokens, `feature_std` and `pixel_std` give "
        f"{found['all']['agreement']:.0%} of the {found['all']['num_images']} images above the same count (Cohen's "
        f"kappa {found['all']['kappa']:.2f}, where 0 is chance and 1 full agreement; rank correlation of the scores "
        f"{found['all']['rank_correlation']:.2f}). Mean tokens by features and by pixels: {kinds} "
        "(`python -m adaptive_llava.training.pixel_agreement`)."
    )


def _classifier_scores(compared: dict[str, Any]) -> str:
    """Classifiers beside the untrained statistics."""

    def area(value: dict[str, Any]) -> str:
        low, high = value["interval"]
        return f"{value['auc']:.3f} ({low:.3f} to {high:.3f})"

    scores = compared["scores"]
    first = next(iter(scores.values()))
    kinds = [kind for kind in first["mean_tokens"] if kind != "all"]
    rows = [
        [name, row["images"], *map(area, row["auc"].values()), *(f"{row['mean_tokens'][kind]:.0f}" for kind in kinds)]
        for name, row in scores.items()
    ]
    own = "; ".join(
        f"{name.removeprefix('classifier, ')}: "
        + ", ".join(f"{kind} {row['mean_tokens_by_its_threshold'][kind]:.0f}" for kind in kinds)
        for name, row in scores.items()
        if "mean_tokens_by_its_threshold" in row
    )
    return (
        f"A trained classifier on the same tower (mean of the patches, one hidden layer) beside them: chance that an "
        f"image to be read scores higher (95 %), and mean tokens by kind when the highest scores get "
        f"{compared['counts'][1]} tokens and the others {compared['counts'][0]}, {compared['target_mean']:.0f} on "
        f"average. One was trained on {compared['rendered_images']} rendered pictures, the other on half of the real "
        "images and tested on the other half.\n\n"
        + table(["score", "images", *(f"AUC {pair}" for pair in first["auc"]), *kinds], rows)
        + f"\n\nMean tokens by the classifiers' own threshold of 0.5, uncalibrated: {own}. To tell "
        "these kinds apart is what they were trained for; whether more tokens on them pay is not shown here."
    )


def benchmark(result: dict[str, Any]) -> str:
    """Ratios of the benchmark, each beside its limit."""
    rows = [
        [
            row["what"],
            f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})",
            "" if row["limit"] is None else f"{row['limit']:.3f}",
            "" if row["bar"] is None else f"{row['bar']:.3f}, {'met' if row['met'] else 'missed'}",
            len(row["pairs"]),
        ]
        for row in result["rows"]
        if "error" not in row
    ]
    machine = result["machine"]
    return (
        f"`{result['command'].strip()}`: {result['shape']}, {result['dtype']}, random weights, {machine['threads']} "
        f"threads, interleaved pairs, ratio of medians with 95 % interval, transformers "
        f"{result['versions']['transformers']}.\n\n{table(['what', 'ratio', 'limit', 'bar', 'pairs'], rows)}"
    )


def quickstart(result: dict[str, Any]) -> str:
    """What the shipped model spends and answers, and what it learns in the quickstart."""
    counts, scores, new = result["token_counts"], result["scores"], result["new_document"]
    shipped = result["shipped"]["auto"]
    kinds = sorted((kind for kind in shipped if kind != "all"), key=lambda kind: shipped[kind]["mean_tokens"])
    spent = " and ".join(f"{shipped[kind]['mean_tokens']:.1f} on a `{kind}`" for kind in (kinds[0], kinds[-1]))
    known = next(kind for kind in scores["auto"] if kind not in (new, "all"))
    rows = [
        [
            label,
            *(
                f"{scores[run][kind]['accuracy']:.0%} ({scores[run][kind]['mean_tokens']:.1f})"
                for kind in (new, known)
            ),
        ]
        for run, label in run_labels(counts).items()
    ]
    questions = {kind: scores["auto"][kind]["questions"] for kind in (new, known)}
    return (
        f"The package comes with a model of {result['parameters'] / 1e6:.1f} million weights that reads {len(kinds)} "
        f"kinds of drawn pictures at {', '.join(map(str, counts))} visual tokens (`{result['compressor']}`, router: "
        f"`{result['router']}`). On unseen pictures it chooses {spent}, {shipped['all']['mean_tokens']:.1f} on "
        f"average, and answers {shipped['all']['accuracy']:.0%} right; always at {counts[-1]} it would be "
        f"{result['shipped']['largest']['all']['accuracy']:.0%}, always at {counts[0]} "
        f"{result['shipped']['smallest']['all']['accuracy']:.0%}. `make quickstart` teaches it {new}s, a kind of "
        f"document it has never seen, in {result['seconds']['total'] / 60:.1f} minutes on a CPU "
        f"({result['peak_memory_mib']['training']} MiB at most). Right answers and mean visual tokens to "
        f"{questions[new]} questions about {new}s and {questions[known]} about the kinds it knew:\n\n"
        + table(["fine-tuning, tokens", f"{new}s", f"{known}s"], rows)
        + f"\n\nThe router gave {new}s {scores['before_auto'][new]['mean_tokens']:.1f} tokens, so it was taught first "
        "that they need the most (`train-router` does this for a folder of images); then LoRA, with stock "
        "`SFTTrainer`, at the counts it chooses, among pictures of the known kinds."
    )


def joint_routing(result: dict[str, Any]) -> str:
    """Accuracy and tokens after joint training of router and model, beside what it has to be compared with."""
    runs, summary = result["runs"], result["summary"]
    counts, kinds = runs[0]["counts"], list(summary["kinds"])

    def row(label: str, arm: str, way: str) -> list[str]:
        cells = [[run["arms"][arm][way][kind] for run in runs if arm in run["arms"]] for kind in kinds]
        mean = [
            [sum(cell[key] for cell in found) / len(found) for key in ("accuracy", "mean_tokens")] for found in cells
        ]
        return [label, *(f"{accuracy:.1%} ({tokens:.1f})" for accuracy, tokens in mean)]

    rows = [
        row("router, trained jointly", "joint", "auto"),
        row("the same counts, shuffled", "joint", "shuffled"),
        *(row(f"the same model, always {count}", "joint", str(count)) for count in counts),
        row(f"trained at {counts[-1]} only", "largest_only", str(counts[-1])),
        row("router, `temperature` 0 (one seed)", "temperature_0", "auto"),
        row(f"router, cold start, {result['steps']['further']} steps (one seed)", "cold_start", "auto"),
    ]
    differences = "; ".join(
        f"{kind} {', '.join(f'{100 * value:+.1f}' for value in summary['kinds'][kind]['difference_by_seed'])}"
        for kind in kinds
    )
    met = all(summary["kinds"][kind]["within_margin"] for kind in kinds)
    questions = runs[0]["arms"]["joint"]["auto"][kinds[0]]["questions"]
    return (
        f"`{result['command']}`: {len(runs)} seeds, {result['steps']['warm']} steps from scratch at {counts[-1]} "
        f"tokens, then {result['steps']['further']} more. Right answers and mean visual tokens; {questions} held-out "
        f"questions per kind and seed:\n\n{table(['tokens', *kinds], rows)}\n\n"
        f"Router against training at {counts[-1]} only, in points, seed by seed: {differences}. "
        f"{'All' if met else 'NOT all'} are within {100 * summary['margin']:.0f} points. Three kinds that were made "
        "to need different counts: this shows that the router finds them without labels, not that routing pays on "
        "real images.\n\n![Accuracy against mean tokens](results/joint_routing.png)"
    )


def systems(result: dict[str, Any]) -> str:
    """What each preset adds to LLaVA-1.5-7B, and its distance from its authors' code."""
    rows = []
    for preset, row in result["systems"].items():
        parts = row["parts"]
        own = [part for name, part in parts.items() if name not in ("projector", "modality_prefusion")]
        share = [sum(costs) / result["tower_gflops"] for costs in zip(*(part["gflops"] for part in own), strict=True)]
        fused = parts.get("modality_prefusion")
        rows.append(
            [
                f"`{preset}`",
                ", ".join(map(str, row["token_counts"])),
                f"{max(row['parity'].values()):.0e}" if row["parity"] else "no code published",
                f"{sum(part['parameters'] for part in parts.values()) / 1e6:.1f}",
                ", ".join(dict.fromkeys(f"{value:.1%}" for value in share)),
                f"{fused['gflops'][0] / result['tower_gflops']:.1f} x the tower" if fused else "",
            ]
        )
    plain = result["systems"]["llava"]["parts"]["projector"]["parameters"] / 1e6
    header = ["preset", "tokens", "error", "parameters (M)", "compressor, router, fusion", "pre-fusion"]
    return (
        f"On LLaVA-1.5-7B's shapes ({result['shape']}; its own projector has {plain:.1f} million parameters): largest "
        "difference in fp32 from the authors' recorded outputs, parameters between tower and language model, and "
        f"matrix multiplications per image as a share of the tower's {result['tower_gflops']:.0f} GFLOPs, by token "
        "count where it differs (`python -m adaptive_llava.training.system_report`):\n\n" + table(header, rows)
    )


def padding(result: dict[str, Any]) -> str:
    """Padding and speed of training batches, by how they are put together."""
    rows = [
        [
            way,
            f"{row['padding_share']:.1%}",
            f"{row['samples_per_second']:.1f}",
            "{ratio:.2f} ({low:.2f} to {high:.2f})".format(**row["speed_up"]),
        ]
        for way, row in result["ways"].items()
    ]
    packed, grouped = (result["ways"][way]["speed_up"]["ratio"] for way in ("packed", "grouped by length"))
    ceiling = 1 / (1 - result["ways"]["padded"]["padding_share"])
    verdict = f"No padding at all would be {ceiling:.2f} times as fast if time were proportional to slots. "
    if packed < grouped:
        verdict += (
            f"Packing stays behind grouping here, since `{result['attention']}` also computes what it masks between "
            "the rows of a pack."
        )
    counts = ", ".join(map(str, result["counts"]))
    machine = result["machine"]
    return (
        f"`{result['command']}`: whole epochs with the trainer of `training.sft`, in turn, batches of "
        f"{result['batch_size']} of {result['rows']} rows with an image each, a third at each of {counts} tokens, and "
        f"{result['text_tokens'][0]} to {result['text_tokens'][1]} words. Random weights, `{result['attention']}`, "
        f"{machine['gpu'] or 'one CPU thread, time of the process'}; speed-up over padded batches with 95 % interval."
        "\n\n" + table(["batches", "padding", "samples/s", "speed-up"], rows) + f"\n\n{verdict}"
    )


def invoice_day(result: dict[str, Any]) -> str:
    """The curve of the document command over budgets, and what it concludes."""

    def cell(score: dict[str, Any]) -> str:
        low, high = score["interval"]
        return f"{score['value']:.3f} ({low:.3f} to {high:.3f})"

    rows = [
        [
            row["budget"],
            f"{row['mean_tokens']:.0f}",
            cell(row["field_f1"]),
            cell(row["anls"]),
            f"{row['json_rate']:.0%}",
        ]
        for row in (*result["curve"], result["other_page"])
    ]
    pages, other = result["pages"], result["other_page"]["budget"]
    return (
        f"{pages['train']} pages to train on, {pages['held_out']} held out with {pages['held_out_fields']} fields "
        f'(`training/recipes/{result["recipe"]}`, {result["cpu_seconds"]:.0f} CPU seconds). "{other}" has all tokens '
        "of another page than the one asked about:\n\n"
        + table(["budget", "tokens", "field F1 (95 %)", "ANLS (95 %)", "valid JSON"], rows)
        + f"\n\n> {result['need']['sentence']}"
    )


def invoice_memory(result: dict[str, Any]) -> str:
    """Peak memory of a training step by budget and batch."""
    budgets = sorted({row["budget"] for row in result["rows"]})
    cells = {(row["budget"], row["batch"]): row["peak_mib"] for row in result["rows"]}
    rows = [
        [batch, *(f"{cells[budget, batch]:.0f}" for budget in budgets)]
        for batch in sorted({row["batch"] for row in result["rows"]})
    ]
    return (
        f"Peak memory of a training step in MiB: {result['parameters'] / 1e6:.1f} million weights in "
        f"{result['dtype']} on {result['device']}, {result['rows'][0]['loaded_mib']} of it before the first step "
        "(`python -m adaptive_llava.training.invoice_memory`):\n\n"
        + table(["batch", *(f"{budget} tokens" for budget in budgets)], rows)
    )


def evaluation(result: dict[str, Any]) -> str:
    """What the shipped model answers at each budget, on its own pictures and on real images."""
    budgets = [row["budget"] for row in next(iter(result.values()))["budgets"]]
    rows = []
    for name, found in result.items():
        by_budget = {row["budget"]: row for row in found["budgets"]}
        auto = by_budget["auto"]
        rows.append(
            [
                name,
                found["metric"],
                *(f"{by_budget[budget]['score']['value']:.2f}" for budget in budgets if budget != "auto"),
                f"{auto['score']['value']:.2f} at {auto['mean_tokens']:.1f}",
                f"{found['words']['of_questions_known']:.0%}",
                f"{found['words']['answers_that_can_be_said']:.0%}",
            ]
        )
    fixed = [budget for budget in budgets if budget != "auto"]
    questions = {found["questions"] for found in result.values()}
    return (
        f"The shipped model, {' to '.join(map(str, sorted(questions)))} questions each "
        "(`python -m adaptive_llava.training.shipped_evaluation`). It knows the words of its own pictures alone: the "
        "rest of the table shows that the command reads these data, and nothing about budgets.\n\n"
        + table(
            ["data", "metric", *(f"{budget} tokens" for budget in fixed), "auto", "question words it knows",
             "answers it can say"],
            rows,
        )
    )  # fmt: skip


def flops_7b(result: dict[str, Any]) -> str:
    """FLOPs counted from configs at the 7B shape, beside those in papers."""
    rows = [
        [
            row["preset"],
            row["visual_tokens"],
            row["counts"].replace("_", " "),
            f"{row['tflops']:.4g}",
            row["published_tflops"],
            row["source"],
        ]
        for row in result["published_flops"]
    ]
    head = ["preset", "visual tokens", "counted", "TFLOPs", "published", "source"]
    return f"`{result['command']}`, {result['text_tokens']} text tokens:\n\n{table(head, rows)}"


def calibration_certificate(result: dict[str, Any]) -> str:
    """What was certified on the shipped model, and what fresh pictures say."""
    from adaptive_llava.training.certificate_study import report

    return f"The shipped model on pictures of its own (`{result['command']}`):\n\n{report(result)}"


def study_cpu(result: dict[str, Any]) -> str:
    """The study's primary comparison, its further answers and its plots."""
    from adaptive_llava.training.study.report import headline

    plots = {
        "frontier": "Accuracy against mean tokens",
        "gain": "Gain over the best fixed budget",
        "hard_share": "Gain against the share of hard images",
        "router_quality": "Gain against the quality of the router",
    }
    shown = "\n".join(f"![{what}](training/study/results/cpu_{name}.png)" for name, what in plots.items())
    return f"{headline(result)} All tables: `training/study/results/cpu.md`.\n\n{shown}"


# Name of a block: what writes it, and the command that makes its result file.
BLOCKS: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "quickstart": (quickstart, "make quickstart"),
    "systems": (systems, "python -m adaptive_llava.training.system_report --golden ../shared/golden"),
    "routing_real_images": (routing_real_images, "python -m adaptive_llava.training.routing_study"),
    "pixel_agreement": (pixel_agreement, "python -m adaptive_llava.training.pixel_agreement"),
    "joint_routing": (joint_routing, "python -m adaptive_llava.training.joint_routing_study"),
    "invoice_day": (
        invoice_day,
        "python -m adaptive_llava documents --config documents_small.yaml ...",
    ),
    "invoice_memory": (invoice_memory, "python -m adaptive_llava.training.invoice_memory"),
    "evaluation": (evaluation, "python -m adaptive_llava.training.shipped_evaluation"),
    "flops_7b": (flops_7b, "python -m adaptive_llava profile --shape llava-1.5-7b ..."),
    "calibration_certificate": (calibration_certificate, "python -m adaptive_llava.training.certificate_study"),
    "study_cpu": (study_cpu, "make study"),
    "suites": (readme_reliability.suites, "make suites"),
    "version_matrix": (readme_reliability.version_matrix, "make matrix"),
    "generation_modes": (readme_reliability.generation_modes, "python -m tests.generation_modes"),
    "hostile_cases": (readme_reliability.hostile_cases, "make hostile"),
    "long_runs": (readme_reliability.long_runs, "python -m tests.long_runs"),
    "padding": (padding, "python -m adaptive_llava.training.padding_study"),
    "benchmark_cpu": (benchmark, "python -m adaptive_llava.training.benchmark"),
    "benchmark_cpu_clip": (benchmark, "python -m adaptive_llava.training.benchmark --shape clip-l-336+qwen2.5-0.5b"),
}
