"""The default run must be sound on held-out data: what the numbers may not fall below."""

import json
import sys
from pathlib import Path
from typing import Any

RUN = Path("results/default")


def read(name: str) -> Any:
    """A JSON file of the run."""
    return json.loads((RUN / name).read_text())


def main() -> None:
    """Print every bar with its value; exit with status 1 if one is missed."""
    metrics, pruning = read("metrics.json"), read("pruning/heads/metrics.json")
    policy, unpruned = pruning["policy"], pruning["unpruned"]["accuracy"]
    worst_fvu = max(metrics[f"sae.topk-s{seed}.fvu"] for seed in (0, 1, 2))
    online_loss = metrics["backbone.vit.accuracy"] - metrics["chain.resae-s0.accuracy_online"]
    clip = metrics["backbone.clip.accuracy"]
    bars = [
        ("ViT accuracy at least 0.95", metrics["backbone.vit.accuracy"], metrics["backbone.vit.accuracy"] >= 0.95),
        ("image-text model between 0.6 and 0.95: steering has something to do", clip, 0.6 <= clip <= 0.95),
        ("worst TopK FVU under 0.3", worst_fvu, worst_fvu < 0.3),
        ("Switch FVU under 0.3", metrics["sae.switch-s0.fvu"], metrics["sae.switch-s0.fvu"] < 0.3),
        ("ReSAE FVU, mean over sites, under 0.3", metrics["chain.resae-s0.fvu"], metrics["chain.resae-s0.fvu"] < 0.3),
        ("ReSAE online within 0.03 of the untouched model", -online_loss, online_loss <= 0.03),
        ("policy within 0.03 of unpruned", policy["accuracy"] - unpruned, unpruned - policy["accuracy"] <= 0.03),
        ("all-block usage at most 0.7", policy["usage_all"], policy["usage_all"] <= 0.7),
        ("policy is not static", pruning["distinct_masks_last"], not pruning["static_policy"]),
        (
            "gathered equals masked to 1e-5",
            pruning["gathered_against_masked"]["max_abs_logit_difference"],
            pruning["gathered_against_masked"]["max_abs_logit_difference"] <= 1e-5,
        ),
    ]
    for name, value, passed in bars:
        print(f"{'ok  ' if passed else 'MISS'} {name}: {value:.6g}")
    sys.exit(0 if all(passed for _, _, passed in bars) else 1)


if __name__ == "__main__":
    main()
