"""From the evidence of all arms to the study's results. Runs no model, and is done in a minute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adaptive_llava.training.study.arms import ANSWERED, CLASSIFIERS, arms_of, pictures_of, pool_counts
from adaptive_llava.training.study.families import PAIRS
from adaptive_llava.training.study.policies import (
    area_under_curve,
    by_spread,
    by_value,
    family_values,
    mixed_with_shuffled,
    oracle,
)
from adaptive_llava.training.study.report import ROUTERS
from adaptive_llava.training.study.settings import Settings
from adaptive_llava.training.study.statistics import Estimate, SeedRecord, bootstrap, chord, image_weights, measures


CONTROLS = ("random", "kind_oracle", "oracle")
HARD_SHARES = tuple(share / 10 for share in range(1, 10))
MIXTURES = tuple(share / 10 for share in range(11))

_HARD_FROM = 0.2  # accuracy that a hard family loses between most and fewest tokens
_MIXED_TIMES = 20

Evidence = Mapping[str, Mapping[str, np.ndarray]]


def load_evidence(settings: Settings, folder: Path) -> dict[int, dict[str, dict[str, np.ndarray]]]:
    """What each seed's arms left behind."""
    return {
        seed: {arm.name: dict(np.load(folder / f"seed_{seed}" / f"{arm.name}.npz")) for arm in arms_of(settings)}
        for seed in settings.seeds
    }


def analyse(settings: Settings, evidence: Mapping[int, Evidence]) -> dict[str, Any]:
    """All results but the circumstances of the run."""
    study = _Study(settings, evidence)
    return {
        "admission": study.admission,
        "told_apart": study.told_apart,
        "hard_families": study.hard,
        "compressors": {arm: study.compressor(arm) for arm in ("pool", "resampler", "mini")},
        "frontiers": {arm: study.frontier(arm) for arm in ("pool", "resampler")},
        "joint": {arm: study.joint(arm) for arm in ("pool joint", "resampler joint")},
        "separately_trained": study.separately_trained(),
        "routed_training": study.routed_training(),
        "exchanged": study.exchanged(),
        "steps": study.steps(),
        "last_quarter": study.last_quarter(),
        "share_of_hard_images": study.share_of_hard_images(),
        "router_quality": study.router_quality(),
        "real_images": {arm: study.real_images(arm) for arm in ("pool", "resampler")},
    }


class _Study:
    def __init__(self, settings: Settings, evidence: Mapping[int, Evidence]):
        self.settings, self.evidence = settings, evidence
        self.counts = {
            "pool": pool_counts(settings),
            "pool joint": pool_counts(settings),
            "pool dfmr": pool_counts(settings),
            "resampler": list(settings.counts),
            "resampler joint": list(settings.counts),
            "mini": list(settings.counts),
        }
        families = {
            split: {seed: np.array([p.family for p in pictures_of(settings, split, seed)]) for seed in settings.seeds}
            for split in ANSWERED
        }
        largest = f"pool fixed {self.counts['pool'][-1]}"
        self.admission = {
            family: self._mean_over_seeds(largest, "right_calibration", families["calibration"], family)[-1]
            for family in sorted(set(families["test"][settings.seeds[0]]))
        }
        self.told_apart = {
            " / ".join(pair): round(
                float(np.mean([evidence[s]["pool"]["told_apart"][place] for s in settings.seeds])), 4
            )
            for place, pair in enumerate(PAIRS)
        }
        separable = {
            family
            for pair, share in zip(PAIRS, self.told_apart.values(), strict=True)
            if share > settings.told_apart_up_to
            for family in pair
        }
        admitted = [
            name
            for name, accuracy in self.admission.items()
            if accuracy >= settings.admitted_from and name not in separable
        ]
        self.kept = {
            split: {seed: np.isin(names, admitted) for seed, names in by_seed.items()}
            for split, by_seed in families.items()
        }
        self.families = {
            split: {seed: names[self.kept[split][seed]] for seed, names in by_seed.items()}
            for split, by_seed in families.items()
        }
        self.hard = [
            family
            for family in admitted
            if np.ptp(self._mean_over_seeds("pool", "right_calibration", families["calibration"], family)[[0, -1]])
            >= _HARD_FROM
        ]
        self.records = {arm: self._records(arm) for arm in ("pool", "resampler", "mini", "pool dfmr")}
        self.estimates = {
            arm: bootstrap(records, self.counts[arm], draws=settings.draws) for arm, records in self.records.items()
        }

    def compressor(self, arm: str) -> dict[str, Any]:
        """Every policy at the target mean on one elastic model: accuracy, tokens, gains."""
        return {
            "counts": self.counts[arm],
            "policies": summaries(self.estimates[arm]),
            "by_family": self._by_family(arm),
            "auc": self._quality_of_routers(arm),
        }

    def frontier(self, arm: str) -> dict[str, list[dict[str, float]]]:
        """Accuracy at many mean counts, by policy; means over the seeds."""
        counts = self.counts[arm]
        found: dict[str, list[dict[str, float]]] = {}
        for target in np.geomspace(counts[0] * 1.2, counts[-1] * 0.9, 9):
            records = self._records(arm, float(target))
            for policy in ("dfmr", "pixel", "classifier", "kind_oracle"):
                points = [_point(record, counts, policy) for record in records]
                accuracy, tokens = np.mean(points, axis=0)
                found.setdefault(policy, []).append({"tokens": round(tokens, 2), "accuracy": round(accuracy, 4)})
        return found

    def joint(self, arm: str) -> dict[str, Any]:
        """Joint training: its router on its own weights, at its own choice and at the target."""
        counts = self.counts[arm]
        records = []
        for seed in self.settings.seeds:
            said = {split: self._of(arm, f"joint_{split}", split, seed) for split in ANSWERED}
            right = self._of(arm, "right_test", "test", seed)
            choices = {
                "as_trained": said["test"].argmax(1),
                "at_target": by_value(said["calibration"], said["test"], counts, self.settings.target_mean),
                "oracle": oracle(right),
            }
            records.append(SeedRecord(self.families["test"][seed], right, choices))
        return {"counts": counts, "policies": summaries(bootstrap(records, counts, draws=self.settings.draws))}

    def separately_trained(self) -> dict[str, Any]:
        """Models trained at one count for as many steps: macro accuracy at that count, and by family."""
        found = {}
        for arm in arms_of(self.settings):
            if not isinstance(arm.rungs, int):
                continue
            records = [
                SeedRecord(
                    self.families["test"][seed],
                    self._of(arm.name, "right_test", "test", seed)[:, [arm.rungs]],
                    {"it": np.zeros(len(self.families["test"][seed]), dtype=int)},
                )
                for seed in self.settings.seeds
            ]
            weights = [image_weights(record.families, 0, np.random.default_rng(0)) for record in records]
            by_seed = [float((w @ record.right)[0, 0]) for w, record in zip(weights, records, strict=True)]
            found[arm.name] = {
                "accuracy": round(float(np.mean(by_seed)), 4),
                "by_seed": [round(value, 4) for value in by_seed],
            }
        return found

    def routed_training(self) -> dict[str, Any]:
        """Trained on DFMR's choices against trained on random ones, both routed by DFMR in the test."""
        routed, random = self.estimates["pool dfmr"], self.estimates["pool"]
        return {
            "trained on DFMR's choices": {name: value.summary() for name, value in routed["dfmr"].items()},
            "trained on random choices": {name: value.summary() for name, value in random["dfmr"].items()},
            "difference in accuracy": (routed["dfmr"]["accuracy"] - random["dfmr"]["accuracy"]).summary(),
            "routed and trained routed, over random training at the same tokens": (
                self._over_chord_of("pool dfmr", "dfmr", "pool")
            ).summary(),
        }

    def exchanged(self) -> dict[str, Any]:
        """The choices that routers make on one compressor's weights, carried out by another compressor."""
        found = {}
        for chooser, answerer in (("pool", "resampler"), ("resampler", "pool")):
            ladder = np.asarray(self.counts[answerer])
            records = []
            for own, other in zip(self.records[answerer], self.records[chooser], strict=True):
                choices = {}
                for policy in (*ROUTERS, "kind_oracle", "oracle"):
                    choices[f"own {policy}"] = own.choices[policy]
                    wanted = np.asarray(self.counts[chooser])[other.choices[policy]]
                    choices[f"{chooser}'s {policy}"] = np.searchsorted(ladder, wanted)
                records.append(SeedRecord(own.families, own.right, choices))
            estimates = bootstrap(records, ladder.tolist(), draws=self.settings.draws)
            found[answerer] = summaries(estimates)
        return found

    def steps(self) -> dict[str, Any]:
        """Macro accuracy of separately trained models against their steps, means over the seeds."""
        found = {}
        for arm in arms_of(self.settings):
            if isinstance(arm.rungs, int):
                found[arm.name] = {
                    str(mark): round(float(np.mean([self._macro(arm.name, mark, s) for s in self.settings.seeds])), 4)
                    for mark in self.settings.marks
                }
        return found

    def last_quarter(self) -> dict[str, float]:
        """Macro accuracy that the last quarter of the steps added to separately trained models."""
        last = self.settings.marks[-1]
        before = max(mark for mark in self.settings.marks if mark <= 0.75 * last or mark == self.settings.marks[0])
        return {arm: round(row[str(last)] - row[str(before)], 4) for arm, row in self.steps().items()}

    def share_of_hard_images(self) -> dict[str, list[dict[str, Any]]]:
        """Gain over the chord where hard families are 10 to 90 % of the images; the policies stay as they were set."""
        easy = [
            family for family in np.unique(self.families["test"][self.settings.seeds[0]]) if family not in self.hard
        ]
        found: dict[str, list[dict[str, Any]]] = {}
        for share in HARD_SHARES if easy and self.hard else ():
            shares = {family: share / len(self.hard) for family in self.hard}
            shares |= {family: (1 - share) / len(easy) for family in easy}
            estimates = bootstrap(
                self.records["pool"], self.counts["pool"], draws=self.settings.draws // 4, shares=shares
            )
            for policy in (*ROUTERS, *CONTROLS):
                row = {name: estimates[policy][name].summary() for name in ("over_chord", "over_shuffled", "tokens")}
                found.setdefault(policy, []).append({"share": share, **row})
        return found

    def router_quality(self) -> list[dict[str, float | None]]:
        """An oracle whose choices are dealt at random for a growing share of the images: AUC and gain."""
        rng = np.random.default_rng(0)
        rows = []
        for mixture in MIXTURES:
            cells = []
            for record in self.records["pool"]:
                best = oracle(record.right)
                for _ in range(_MIXED_TIMES):
                    choice = mixed_with_shuffled(best, mixture, rng)
                    mixed = SeedRecord(record.families, record.right, {"mixed": choice})
                    values = measures(mixed, self.counts["pool"], image_weights(record.families, 0, rng))
                    auc = area_under_curve(choice, best > 0)
                    cells.append([auc, *(values[name][0, 0] for name in ("over_chord", "tokens", "accuracy"))])
            auc, gain, tokens, accuracy = np.mean(cells, axis=0)
            rows.append(
                {
                    "shuffled_share": mixture,
                    "auc": _known(auc),
                    "over_chord": round(gain, 4),
                    "tokens": round(tokens, 2),
                    "accuracy": round(accuracy, 4),
                }
            )
        return rows

    def real_images(self, arm: str) -> dict[str, dict[str, float]]:
        """Mean tokens that each router gives to each kind of real image, set to the target on calibration pictures."""
        first = self.evidence[self.settings.seeds[0]][arm]
        found: dict[str, dict[str, float]] = {}
        for router in ROUTERS if "kinds_real" in first else ():
            spent: dict[str, list[float]] = {}
            for seed in self.settings.seeds:
                reader = self._reader(arm, router)
                calibration = self._of(reader, f"{router}_calibration", "calibration", seed)
                real, kinds = (self.evidence[seed][reader][name] for name in (f"{router}_real", "kinds_real"))
                choose = by_value if router in CLASSIFIERS else by_spread
                choice = choose(calibration, real, self.counts[arm], self.settings.target_mean)
                for kind in np.unique(kinds):
                    spent.setdefault(str(kind), []).append(np.asarray(self.counts[arm])[choice[kinds == kind]].mean())
            found[router] = {kind: round(float(np.mean(values)), 2) for kind, values in spent.items()}
        return found

    def _records(self, arm: str, target: float | None = None) -> list[SeedRecord]:
        return [self._record(arm, seed, target or self.settings.target_mean) for seed in self.settings.seeds]

    def _record(self, arm: str, seed: int, target: float) -> SeedRecord:
        counts = self.counts[arm]
        right = {split: self._of(arm, f"right_{split}", split, seed) for split in ANSWERED}
        families = {split: self.families[split][seed] for split in ANSWERED}
        choices = {}
        for router in ROUTERS:
            reader = self._reader(arm, router)
            if f"{router}_test" not in self.evidence[seed][reader]:
                continue
            calibration, test = (self._of(reader, f"{router}_{split}", split, seed) for split in ANSWERED)
            choose = by_value if router in CLASSIFIERS else by_spread
            choices[router] = choose(calibration, test, counts, target)
        known, unknown = (family_values(right["calibration"], families["calibration"], families[s]) for s in ANSWERED)
        choices["kind_oracle"] = by_value(known, unknown, counts, target)
        choices["random"] = np.random.default_rng(seed).integers(len(counts), size=len(right["test"]))
        choices["oracle"] = oracle(right["test"])
        return SeedRecord(families["test"], right["test"], choices)

    def _reader(self, arm: str, router: str) -> str:
        """The arm in which a router looks at the pictures: a jointly trained one has a model of its own."""
        return f"{'pool' if arm.startswith('pool') else 'resampler'} joint" if router == "joint" else arm

    def _of(self, arm: str, name: str, split: str, seed: int) -> np.ndarray:
        """Evidence on the images of admitted families."""
        return self.evidence[seed][arm][name][self.kept[split][seed]]

    def _mean_over_seeds(self, arm: str, name: str, families: Mapping[int, np.ndarray], family: str) -> np.ndarray:
        return np.mean([self.evidence[s][arm][name][families[s] == family].mean(0) for s in self.settings.seeds], 0)

    def _by_family(self, arm: str) -> dict[str, dict[str, Any]]:
        names = np.unique(self.families["test"][self.settings.seeds[0]])
        rows = {}
        for family in names:
            members = [(record, record.families == family) for record in self.records[arm]]
            accuracy = np.mean([record.right[where].mean(0) for record, where in members], 0)
            counted = np.asarray(self.counts[arm])
            spent = {
                policy: round(float(np.mean([counted[r.choices[policy][where]].mean() for r, where in members])), 2)
                for policy in (*ROUTERS, "kind_oracle", "oracle")
            }
            rows[str(family)] = {
                "accuracy": {str(c): round(float(a), 4) for c, a in zip(counted, accuracy, strict=True)},
                "tokens": spent,
            }
        return rows

    def _quality_of_routers(self, arm: str) -> dict[str, float | None]:
        """How well each router's choices tell images that need more than the fewest tokens (the oracle's word)."""
        found = {}
        for policy in (*ROUTERS, "kind_oracle"):
            values = [area_under_curve(r.choices[policy], oracle(r.right) > 0) for r in self.records[arm]]
            found[policy] = _known(float(np.mean(values)))
        return found

    def _macro(self, arm: str, mark: int, seed: int) -> float:
        right = self._of(arm, f"right_after_{mark}", "test", seed)
        return float((image_weights(self.families["test"][seed], 0, np.random.default_rng(0)) @ right)[0])

    def _over_chord_of(self, arm: str, policy: str, other: str) -> Estimate:
        """Accuracy of one arm's policy less the chord of another arm, at the tokens of the former."""
        own, gain = self.estimates[arm][policy], self.estimates[other]
        tokens = own["tokens"]
        counts = self.counts[other]
        fixed = [gain[f"always {count}"]["accuracy"] for count in counts]

        def line(pick: str) -> np.ndarray:
            accuracy = np.stack([getattr(estimate, pick) for estimate in fixed], -1)
            return chord(counts, accuracy, getattr(tokens, pick)[:, None])[:, 0]

        return own["accuracy"] - Estimate(line("by_seed"), line("draws"))


def summaries(estimates: Mapping[str, Mapping[str, Estimate]]) -> dict[str, dict[str, Any]]:
    """`{policy: {measure: summary}}`."""
    return {
        policy: {name: estimate.summary() for name, estimate in by_measure.items()}
        for policy, by_measure in estimates.items()
    }


def _point(record: SeedRecord, counts: Sequence[int], policy: str) -> tuple[float, float]:
    alone = SeedRecord(record.families, record.right, {policy: record.choices[policy]})
    values = measures(alone, counts, image_weights(record.families, 0, np.random.default_rng(0)))
    return float(values["accuracy"][0, 0]), float(values["tokens"][0, 0])


def _known(value: float) -> float | None:
    """Rounded; `None` where no image, or every one, needs more than the fewest tokens."""
    return None if np.isnan(value) else round(float(value), 4)
