"""The first screen: verdicts, and the cards of made-up runs and of a real one."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import numpy as np
import pytest
from recomputed import TITLES, check_page
from runs import TINY_RUN
from scipy import stats

from sparsight import report
from sparsight.common import tables
from sparsight.common.intervals import paired, wilson
from sparsight.common.verdicts import Comparison, Difference, Measure, judge, over_images, over_pairs, pooled
from sparsight.report.cards.first_screen import Card, first_screen

SITE = "blocks.2.input"
N = 1000


def comparison(difference: Difference | None, lower_is_better: bool = False, **about: Any) -> Comparison:
    measure = Measure("m", "points", 1, 100, lower_is_better)
    estimate = difference.estimate if difference else 0.1
    return Comparison("sae", "control", measure, 0.5 + estimate, 0.5, difference, "n", "It is", **about)


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tables.write(path, rows)


METRICS = {
    "n": N, "fvu": 0.04, "fvu_pca_k": 0.09, "fvu_random": 0.5, "fvu_kmeans": 0.3, "fvu_neurons": 0.8, "bits": 59.4,
    "bits_pca": 41.7, "l0": 8.0, "dead_train": 60, "dead_test": 116, "dense_test": 3, "monosemanticity": 0.45,
    "monosemanticity_random": 0.64, "monosemanticity_kmeans": 0.92, "monosemanticity_neurons": 0.4,
    "monosemanticity_of_all_images": 0.33, "spliced_delta": -0.004, "spliced_delta_lo": -0.01,
    "spliced_delta_hi": 0.002, "accuracy_untouched": 0.96, "accuracy_mean_instead": 0.2,
}  # fmt: skip
PROBES = {"sae": 0.946, "neurons": 0.943, "pca": 0.93, "random": 0.9}


class MadeUp:
    """The files of a run that the first screen reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = {"steering": {}, "pruning": None}
        names = ("saes", "chains", "stabilities", "steerings", "policies")
        self.inputs: dict[str, Any] = {name: [] for name in names}

    def sae(
        self, name: str, seeds: int = 3, labels: bool = True, sites: tuple[str, ...] = (), **about: Any
    ) -> "MadeUp":
        """A section of SAEs whose FVU and bits differ a little from seed to seed, or of chains."""
        training = {"backbone": "vit", "sites": list(sites), "tokens": "cls", "d_sae": 384, "k": 8, "affine": "full"}
        for seed in range(seeds):
            noise, folder = (seed - (seeds - 1) / 2) / 1000, self.folder / "saes" / f"{name}-s{seed}"
            metrics = {**METRICS, "fvu": 0.04 + noise, "bits": 59.4 + noise, "monosemanticity": 0.45 + noise}
            probes = PROBES if labels else {}
            metrics |= {f"probing_{method}_5": value for method, value in probes.items()}
            config = {"kind": "topk", "backbone": "vit", "d_in": 96, "d_sae": 384, "k": 8, "tokens": "cls"}
            for site in sites or (SITE,):
                at = folder / site if sites else folder
                if sites:
                    metrics = {**metrics, "fvu_residual": 0.04 + noise}
                write(at / "config.json", {**config, "site": site, "training": {**training, **about}})
                write(at / "metrics.json", metrics)
                rows = [{"method": m, "features": 5, **wilson(np.arange(N) < N * v)} for m, v in probes.items()]
                rows = rows or [{"method": "none", "features": 0, "n": 0, "accuracy": 0.0, "lo": 0.0, "hi": 0.0}]
                write_rows(at / "probing.parquet", rows)
            if sites:
                write(folder / "metrics.json", {"fvu": 0.1 + noise, "n": N, **about.get("chain", {})})
            self.inputs["chains" if sites else "saes"].append(folder / "metrics.json")
        if seeds > 1:
            ends = {"over_0.7": 0.3, "over_0.7_min": 0.295, "over_0.7_max": 0.305, "over_0.7_random": 0.0}
            ends |= {"cosine": 0.5, "cosine_random": 0.3, "saes": seeds, "pairs": seeds * (seeds - 1) // 2}
            path = self.folder / "saes" / f"{name}-stability.json"
            self.inputs["stabilities"].append(write(path, {"sites": dict.fromkeys(sites or (SITE,), ends)}))
        return self

    def steering(self, name: str, sae: str, delta: float, strength: float = 3.0, seeds: int = 3) -> "MadeUp":
        """Class latents ``delta`` better than random latents, which are as good as no steering."""
        self.settings["steering"][name] = {"sae": sae}
        for seed in range(seeds):
            path = self.folder / "steering" / f"{name}-s{seed}.parquet"
            against_none = {"delta": delta, "delta_lo": delta - 0.004, "delta_hi": delta + 0.004}
            keys = ("class-latents", "predicted"), ("random-latents", "predicted"), ("class-latents", "oracle")
            rows = [{"method": "none", "labels": "none", "strength": 0.0, "accuracy": 0.9}]
            rows += [
                {"method": method, "labels": labels, "strength": strength, "accuracy": 0.9 + delta * (method[0] == "c")}
                for method, labels in keys
            ]
            on_test = [{**row, "split": "test", "n": N, **against_none} for row in rows]
            on_val = [{**row, "split": "val", "strength": s} for row in on_test for s in (1.5, 3.0, 10.0)]
            write_rows(path, [*on_val, *on_test])
            line = {"method": "class-latents", "labels": "predicted", "control": "random-latents", **against_none}
            chosen = [{"method": method, "labels": labels, "strength": strength} for method, labels in keys]
            summary = {"sae": sae, "chosen_on_val": chosen, "against_controls": [line], "gate": []}
            write(path.with_suffix(".json"), summary)
            self.inputs["steerings"].append(path)
        return self

    def pruning(self, steering: str, usage_control: float, latents: int = 5) -> "MadeUp":
        """Class latents keep 40 % of the heads, a bias 30 %, the unsteered policy half of them."""
        self.settings["pruning"] = {"steering": steering}
        folder = self.folder / "pruning" / "heads"
        row = {"labels": "probe", "n": N, "accuracy": 0.95, "strength": 3.0, "latents": latents}
        rows = [{**row, "strategy": "none", "labels": "none", "sae": "", "usage_last": 0.5}]
        rows += [
            {**row, "strategy": "class-latents", "sae": f"topk-s{seed}", "usage_last": 0.4 + (seed - 1) / 1000}
            for seed in range(3)
        ]
        rows += [{**row, "strategy": "logit-bias", "sae": "", "usage_last": 0.3}]
        write_rows(folder / "overall.parquet", rows)
        on_val = [{**r, "strength": s, "latents": m} for r in rows for s in (1.5, 3.0, 10.0) for m in (1, 5, 20)]
        write_rows(folder / "validation.parquet", on_val)
        matched = {"labels": "probe", "control": "logit-bias", "usage": 0.4, "usage_control": usage_control}
        matched |= {"accuracy": 0.95, "accuracy_control": 0.97, "delta": -0.02, "delta_lo": -0.024, "delta_hi": -0.016}
        policy = write(folder / "metrics.json", {"matched_usage": [matched, {**matched, "labels": "oracle"}]})
        self.inputs["policies"].append(policy)
        return self

    def screen(self) -> dict[str, Any]:
        configuration = write(self.folder / "configuration.json", self.settings)
        return first_screen({**self.inputs, "configuration": configuration}, N)

    def cards(self) -> dict[str, Card]:
        return {card.question.title: card for card in self.screen()["cards"]}


def rendered(screen: dict[str, Any]) -> str:
    """The text of the first screen."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", markup(screen)))


def markup(screen: dict[str, Any]) -> str:
    """The first screen as the page's template draws it."""
    loader = jinja2.FileSystemLoader(Path(report.__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.get_template("summary.html.j2")
    saes = {"sections": [None] * len(screen["cards"]), "chains": []}
    return template.render(
        summary=screen, saes=saes, backbones=[SimpleNamespace(name="clip", about={"accuracy": {}})], figures={},
        captions={},
    )  # fmt: skip


def test_every_verdict_of_a_made_up_run_follows_from_its_files(tmp_path: Path) -> None:
    run = MadeUp(tmp_path).sae("first").sae("topk").steering("other", "first", 0.0)
    ends = {"online_delta": -0.01, "online_delta_lo": -0.02, "online_delta_hi": 0.0}
    run.sae("plain", seeds=1, sites=(SITE,), affine="zero", chain={**ends, "accuracy_online": 0.94})
    run.sae("resae", seeds=1, sites=(SITE,), chain={**ends, "online_delta": 0.0, "accuracy_online": 0.95})
    screen = run.steering("steered", "topk", 0.02).pruning("steered", usage_control=0.405).screen()
    assert check_page(markup(screen), tmp_path) == {"better", "not distinguishable", "worse"}


def test_every_verdict_of_a_real_run_follows_from_its_files(run_folder: Path) -> None:
    run = run_folder / TINY_RUN
    assert "no verdict" in check_page((run / "report" / "index.html").read_text(), run), "topk has one seed"


def test_p_of_seeds_is_students_and_of_images_the_intervals() -> None:
    seeds = [0.3, 0.1, 0.4]
    found = pooled(seeds)
    assert found is not None
    expected = stats.ttest_1samp(seeds, 0)
    ends = expected.confidence_interval()
    assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, ends.low, ends.high))
    right = np.arange(1000) % 10 < 7
    other = np.roll(right, 1)
    other[:30] = True
    interval = tuple(paired(other, right).values())
    from_images = over_images([interval, interval])  # type: ignore[list-item]
    assert (from_images.estimate, from_images.low, from_images.high) == pytest.approx(interval)
    z = interval[0] / ((interval[2] - interval[1]) / 2 / stats.norm.ppf(0.975))
    assert from_images.p == pytest.approx(2 * stats.norm.sf(abs(z)))
    assert pooled([0.3]) is None, "a single seed has no interval over seeds"


def test_the_wider_of_the_intervals_over_seeds_and_images_counts() -> None:
    alike, unlike = [0.01, 0.01, 0.01], [-0.2, 0.0, 0.23]
    images = [(0.01, -0.02, 0.04)] * 3
    for seeds, over in ((alike, "images"), (unlike, "seeds")):
        found = pooled(seeds, images)
        assert found is not None and found.over == over
    assert judge([comparison(pooled(alike, images))])[0].verdict == "not distinguishable", "not certain by equal seeds"


def test_verdicts_are_corrected_for_their_number() -> None:
    one = comparison(Difference(0.1, 0.01, 0.19, 0.03, "images"))
    nothing = comparison(Difference(0.1, -0.4, 0.6, 0.7, "images"))
    assert [found.verdict for found in judge([one])] == ["better"]
    assert [found.verdict for found in judge([one, nothing])] == ["not distinguishable"] * 2
    clear = comparison(Difference(-0.1, -0.11, -0.09, 1e-9, "images"))
    found = judge([one, clear, comparison(None, open="there is one seed")])
    assert [judged.verdict for judged in found] == ["better", "worse", "no verdict"]
    assert [judged.p for judged in found] == pytest.approx([0.03, 2e-9, None]), "Holm: the smallest times 2, then 1"
    assert judge([]) == []


@pytest.mark.parametrize(("lower_is_better", "verdict"), [(True, "better"), (False, "worse")])
def test_less_is_better_where_the_measure_says_so(lower_is_better: bool, verdict: str) -> None:
    (found,) = judge([comparison(Difference(-0.1, -0.2, -0.05, 1e-4, "seeds"), lower_is_better)])
    assert (found.verdict, found.text) == (verdict, f"{verdict} than control")
    assert found.sentence == f"It is: {verdict} by 10.0 points (5.0 to 20.0)."


@pytest.mark.parametrize("seeds", [3, 4])
def test_the_interval_of_pairs_of_seeds_covers_their_mean(seeds: int) -> None:
    """Each pair's value is the sum of its two seeds' effects: pairs with a common seed correlate by 1/2, the most."""
    generator, within = np.random.default_rng(0), 0
    for _ in range(1000):
        effects = generator.normal(size=seeds)
        pairs = [effects[i] + effects[j] for i in range(seeds) for j in range(i)]
        mean = float(np.mean(pairs))
        found = over_pairs((min(pairs), mean, max(pairs)), seeds, 0.0)
        assert found is not None
        within += found.low <= 0 <= found.high
    assert within >= (0.95 - 0.02) * 1000
    assert over_pairs((0.1, 0.1, 0.1), 2, 0.0) is None, "two seeds are one pair"


def test_a_run_has_a_card_for_each_question_with_its_strongest_control(tmp_path: Path) -> None:
    run = MadeUp(tmp_path).sae("first").sae("topk").steering("other", "first", 0.0)
    cards = run.steering("steered", "topk", 0.02).pruning("steered", usage_control=0.405).cards()
    assert list(cards) == TITLES
    shown = {title: card.headline for title, card in cards.items()}
    assert {title: one and one.text for title, one in shown.items()} == {
        "Faithful?": "better than PCA (8 components)",
        "Sparse and alive?": "worse than PCA (all components)",
        "Interpretable?": "worse than k-means",
        "Stable?": "better than random dictionaries",
        "Does steering help?": "better than the unsteered model",
        "Does steering save heads?": "worse than logit-bias",
    }
    assert all(one and one.comparison.subject in ("topk", "steered (SAE topk)", "heads") for one in shown.values())
    (other,) = cards["Does steering help?"].others
    assert (other.comparison.subject, other.verdict) == ("other (SAE first)", "not distinguishable")
    assert "60 never fire on train, 116 never on test" in " ".join(cards["Sparse and alive?"].question.facts)
    text = rendered(run.screen())
    assert (
        "At equal error the codes of topk take 59.4 bits per activation, those of PCA 41.7: worse by 17.7 bits" in text
    )
    judged = [one for card in cards.values() for one in card.judged if one.p is not None]
    assert f"for all {len(judged)} comparisons" in text


def test_a_run_of_reconstructions_alone_says_what_was_not_measured(tmp_path: Path) -> None:
    run = MadeUp(tmp_path).sae("topk")
    kept = {"n", "fvu", "fvu_pca_k", "l0", "dead_test", "dense_test"}
    for path in run.inputs["saes"]:
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key in kept}))
    cards = run.cards()
    faithful, sparse, interpretable = (cards[title] for title in ("Faithful?", "Sparse and alive?", "Interpretable?"))
    assert faithful.headline is not None and faithful.headline.text == "better than PCA (8 components)"
    assert "116 never fire on test, and 3 fire" in " ".join(sparse.question.facts) and sparse.headline is None
    assert interpretable.question.unanswered == (
        "Of topk only the reconstruction was measured (metrics: reconstruction)."
    )
    assert "no labels" not in rendered(run.screen())


def test_equal_usage_is_said_only_of_equal_usages(tmp_path: Path) -> None:
    for name, usage, judged in (("near", 0.405, True), ("far", 0.447, False)):
        run = MadeUp(tmp_path / name).sae("topk").steering("steered", "topk", 0.0)
        card = run.pruning("steered", usage_control=usage).cards()["Does steering save heads?"]
        (found,) = [one for one in card.judged if one.comparison.measure.name == "accuracy at equal usage"]
        assert ("at that usage" in found.sentence, found.p is not None) == (judged, judged)
        assert found.verdict == ("worse" if judged else "no verdict")
        assert ("keep 40.0 %" in found.sentence, "44.7 %" in found.sentence) == (True, not judged)


@pytest.mark.parametrize(("strength", "latents"), [(3.0, 5), (10.0, 5), (3.0, 20)])
def test_a_choice_at_the_end_of_its_grid_is_flagged(tmp_path: Path, strength: float, latents: int) -> None:
    run = MadeUp(tmp_path).sae("topk").steering("steered", "topk", 0.02, strength)
    screen = run.pruning("steered", 0.405, latents).screen()
    cards, text = {card.question.title: card for card in screen["cards"]}, rendered(screen)
    assert cards["Does steering help?"].ends == ["class-latents (strength 10)"] * (strength == 10)
    assert cards["Does steering save heads?"].ends == ["class-latents (20 latents)"] * (latents == 20)
    shown = any(f"the end of its grid for class-latents ({end})" in text for end in ("strength 10", "20 latents"))
    assert shown == (strength == 10 or latents == 20)


def test_what_a_run_cannot_answer_it_says(tmp_path: Path) -> None:
    screen = MadeUp(tmp_path).sae("topk", seeds=1, labels=False).screen()
    cards = {card.question.title: card for card in screen["cards"]}
    text = rendered(screen)
    assert list(cards) == TITLES and not re.search(r"\bnan\b|None|inf\b", text)
    for title, reason in {
        "Stable?": "topk has one seed in this run",
        "Does steering help?": "This run has no steering.",
        "Does steering save heads?": "This run has no head policy.",
    }.items():
        assert cards[title].headline is None and reason in text
    assert "one seed says nothing about another" in text
    assert "The images have no labels, so nothing says whether its latents stand for what they show." in text
    assert all(found.p is None for card in cards.values() for found in card.judged)
    assert not re.search(r"accuracy|\bprobe|\bclass(es)?\b|prun|precision", text.replace("changes accuracy", ""))
    links = re.findall(r'href="#(\w+)"', markup(screen))
    assert set(links) == {"saes"}, "no link to a section that the page of this run lacks"


def test_steering_without_labels_has_no_verdict(tmp_path: Path) -> None:
    run = MadeUp(tmp_path).sae("topk").steering("steered", "topk", 0.02)
    for path in run.inputs["steerings"]:
        summary = json.loads(path.with_suffix(".json").read_text())
        write(path.with_suffix(".json"), {**summary, "chosen_on_val": [], "against_controls": []})
    card = run.cards()["Does steering help?"]
    assert card.headline is None and "for want of labels" in card.question.unanswered


def test_a_run_of_chains_is_about_their_last_site_and_compares_with_plain_saes(tmp_path: Path) -> None:
    sites = ("blocks.1.input", SITE)
    better, worse = ({f"online_delta{e}": d + w for e, w in zip(("", "_lo", "_hi"), (0, -0.01, 0.01), strict=True)}
                     for d in (-0.01, -0.2))  # fmt: skip
    run = MadeUp(tmp_path)
    run.sae("plain", sites=sites, affine="zero", chain={**worse, "accuracy_online": 0.75}, seeds=1)
    run.sae("resae", sites=sites, chain={**better, "accuracy_online": 0.94}, seeds=1)
    screen = run.screen()
    assert screen["sae"].folders == [tmp_path / "saes" / "plain-s0" / SITE]
    (found,) = screen["cards"][0].others
    assert found.text == "better than plain SAEs (plain)"
    assert found.comparison.value == 0.94
    text = rendered(screen)
    assert "resae: accuracy with all sites replaced 94.0 %, plain SAEs (plain) 75.0 %: better, +19.0 (" in text


def test_controls_of_chains_are_compared_with_nothing(tmp_path: Path) -> None:
    sites = ("blocks.1.input", SITE)
    run = MadeUp(tmp_path)
    for name, affine in (("plain", "zero"), ("resae", "full")):
        of_control: dict[str, Any] = {"control_of": name, "frozen": "decoder"}
        for more in ({}, of_control):
            run.sae(f"{name}-frozen-decoder" if more else name, sites=sites, affine=affine, seeds=1, **more)
    run.inputs["chains"].sort(key=lambda path: "frozen" not in path.parent.name)  # the controls first
    (found,) = run.screen()["cards"][0].others
    assert (found.comparison.subject, found.comparison.control) == ("resae", "plain SAEs (plain)")


def test_unequal_sparsity_is_said(tmp_path: Path) -> None:
    run = MadeUp(tmp_path).sae("relu")
    assert not any("latents at a time, PCA" in fact for fact in run.cards()["Faithful?"].question.facts)
    for path in run.inputs["saes"]:
        write(path, {**json.loads(path.read_text()), "l0": 20.25})
    facts = run.cards()["Faithful?"].question.facts
    assert "It uses 20.2 latents at a time, PCA 8 components." in facts


def test_sixty_sections_make_six_cards(tmp_path: Path) -> None:
    run = MadeUp(tmp_path)
    for number in range(60):
        run.sae(f"sae-{number}", seeds=1)
    screen = run.screen()
    assert len(screen["cards"]) == 6 and screen["sae"].name == "sae-0"
    assert len(rendered(screen)) < 10_000


def test_a_run_without_an_sae_says_so(tmp_path: Path) -> None:
    assert rendered(MadeUp(tmp_path).screen()).count("This run has no SAE.") == 4
