"""The report in a browser, without a network."""

import dataclasses
import hashlib
import html
import json
import re
from pathlib import Path

import pytest
import yaml
from runs import TINY_RUN
from studies import SECTION, random_policy, random_sae, two_class_images, two_classes

from sparsight.common import tables
from sparsight.common.intervals import mean_of_seeds
from sparsight.common.work import Work
from sparsight.pipeline.run import load_run
from sparsight.pruning import evaluate
from sparsight.report.chapters import pruning


def test_the_page_is_small_and_names_nothing_outside(run_folder: Path) -> None:
    path = run_folder / TINY_RUN / "report" / "index.html"
    assert path.stat().st_size < 12_000_000
    outside = set(re.findall(r"(?:src|href)=\"(?!data:|#)([^\"]*)\"", path.read_text()))
    assert not outside


def test_the_pipeline_is_drawn_with_what_every_part_read(run_folder: Path) -> None:
    page = (run_folder / TINY_RUN / "report" / "index.html").read_text()
    drawn = page.split('<h2 id="pipeline">')[1].split("<h2")[0]
    rows = re.findall(r"<li>(<a href=\"#(\w+)\">|<span>)(.+?)</\w+>\n<ul [^>]*>(.*?)</ul>", drawn)
    parts = {name: re.findall(r"<strong>(.*?)</strong>", boxes) for _, _, name, boxes in rows}
    assert parts == {
        "Images": ["mnist-5000"],
        "Backbones": ["vit", "clip"],
        "Activations": ["vit", "clip"],
        "SAEs": ["topk", "switch", "final", "resae"],
        "Steering": ["class-latents", "vs2", "neighbours"],
        "Attribution": ["topk"],
        "Head policies": ["heads"],
        "Report": ["this page"],
    }
    assert all(f'<h2 id="{section}">' in page for _, section, _, _ in rows if section)
    for text in (
        "<strong>mnist-5000</strong> 5,000 images, 10 classes",
        "<strong>switch</strong> switch, 48 latents, k 4, 2 seeds<small>reads vit: blocks.2.input<",
        "<strong>resae</strong> topk, 48 latents, k 4, 1 seed, chain, maps full<small>reads vit: blocks.1.input, ",
        "<strong>neighbours</strong> vs2++<small>reads final<",
        "<strong>heads</strong> decides in 2 blocks<small>reads vit, topk<",
    ):
        assert text in drawn


def test_the_page_names_its_settings_and_files(run_folder: Path) -> None:
    run = run_folder / TINY_RUN
    page = html.unescape((run / "report" / "index.html").read_text().split('<h2 id="provenance">')[1])
    settings = yaml.safe_load(page.split("<pre>")[1].split("</pre>")[0])
    assert settings == json.loads((run / "configuration.json").read_text())
    assert json.loads(json.dumps(dataclasses.asdict(load_run(settings)))) == settings
    files = dict(re.findall(r"<th scope=\"row\">(.*?)</th><td><code>(\w+)</code>", page))
    assert files.keys() >= {"images/manifest.parquet", "saes/topk-s0/metrics.json", "pruning/heads/metrics.json"}
    assert files == {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in files}


def test_a_mean_over_seeds_has_its_own_interval_not_the_mean_of_the_seeds_ends(tmp_path: Path) -> None:
    folder, saes = tmp_path / "heads", {f"sae-s{seed}": random_sae(seed) for seed in (0, 1)}
    with Work(tmp_path / "work", "key") as work:
        evaluate.evaluate(SECTION, two_classes(), random_policy(), saes, two_class_images(tmp_path), 0, work, 2, {})
        work.finish(folder)
    shown = {(row["strategy"], row["labels"]): row for row in pruning.chapter(folder)["rows"]}
    overall, frontier = (tables.read(folder / f"{name}.parquet") for name in ("overall", "frontier"))
    metrics = json.loads((folder / "metrics.json").read_text())
    of_points = {(row["strategy"], row["labels"]): row for row in metrics["against_none"]}
    chosen = {(row["strategy"], row["labels"]): row for row in frontier if row["split"] == "test" and row["chosen"]}
    assert {len(row["sae"]) > 0 for row in overall} == {True, False}
    for key, row in shown.items():
        own = [r for r in overall if (r["strategy"], r["labels"]) == key]
        if len(own) == 1:
            assert {name: row[name] for name in ("lo", "hi", "delta_lo", "delta_hi")}.items() <= own[0].items()
            continue
        assert (row["lo"], row["hi"]) == (chosen[key]["lo"], chosen[key]["hi"])
        assert (row["delta_lo"], row["delta_hi"]) == (of_points[key]["delta_lo"], of_points[key]["delta_hi"])
        assert row["accuracy"] == pytest.approx(chosen[key]["accuracy"])
        assert row["delta"] == pytest.approx(of_points[key]["delta"])


def test_spliced_accuracy_of_several_seeds_has_the_interval_over_seeds(run_folder: Path) -> None:
    run = run_folder / TINY_RUN
    (table,) = re.findall(r"<b>Use\.</b>.*?</table>", (run / "report" / "index.html").read_text(), re.DOTALL)
    column = re.findall(r"scope=\"col\">(.*?)</th>", table).index("spliced")
    rows = re.findall(r"scope=\"row\">(.*?)</th>(.*?)</tr>", table, re.DOTALL)
    cells = {name: re.findall(r"<td.*?>(.*?)</td>", body)[column - 1] for name, body in rows}
    seeds = [
        json.loads((run / "saes" / f"switch-s{seed}" / "metrics.json").read_text())["accuracy_spliced"]
        for seed in (0, 1)
    ]
    found = mean_of_seeds(seeds)
    expected = f"{100 * found['mean']:.1f}"
    if found["half"] > 1e-9:
        expected += f" &plusmn; {100 * found['half']:.1f}"
    assert cells["switch"] == expected
    single = json.loads((run / "saes" / "topk-s0" / "metrics.json").read_text())
    ends = [f"{100 * single[f'accuracy_spliced_{end}']:.1f}" for end in ("lo", "hi")]
    assert cells["topk"] == f"{100 * single['accuracy_spliced']:.1f} ({ends[0]} to {ends[1]})"
