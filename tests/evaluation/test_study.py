"""The report's arithmetic, on a tracker that is a dictionary; tests/integration/test_sweep.py has the real one."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from distseg.errors import UserError
from distseg.evaluation.metrics import counts_csv
from distseg.evaluation.study import collect, make_cells, results_csv, verdict, write_report

LEVELS, COUNTS, SEEDS = ["box", "polygon(3)"], [4, 8], [0, 1]
IDS = [f"i{n}" for n in range(40)]


def counts_of(dice: np.ndarray) -> np.ndarray:
    """tp, fp, fn, tn of images of 200 pixels that have these Dice scores, to a hundredth."""
    tp = np.rint(100 * dice).astype(int)
    return np.stack([tp, 100 - tp, 100 - tp, tp * 0], axis=1)


class Dictionary:
    """What MLflow would answer."""

    def __init__(self) -> None:
        self.run_id, self.files, self.children, self.champion = "parent", {}, [], None
        for seed in SEEDS:
            hard = np.random.default_rng(seed).uniform(0.2, 0.6, len(IDS))
            self.add("noisy_only", "box", "any", seed, hard)
            self.add("noisy_only", "polygon(3)", "any", seed, hard - 0.1)
            self.add("clean_only", "any", "4", seed, hard)
            self.add("clean_only", "any", "8", seed, hard + 0.2)
            for noise in LEVELS:
                for k in COUNTS:
                    dice = hard + 0.1 + 0.02 * seed
                    self.add("pixel_reweight", noise, str(k), seed, dice, auroc=[(1, 0.9), (2, 0.7)])

    def add(self, method, noise, k, seed, dice, auroc=(), status="FINISHED", name=None):
        tags = {"method": method, "noise": noise, "clean_count": k, "seed": str(seed)}
        metrics = {"noise_rate": 0.1 if noise == "box" else 0.2, "seconds": 30.0, "steps": 10, "best_val_dice": 0.5}
        self.children.append({
            "run_id": f"r{len(self.children)}", "name": name or f"{method}-{noise}-{k}-{seed}", "status": status,
            "tags": tags, "params": {}, "metrics": metrics, "history": {"meta/auroc": list(auroc)},
            "texts": {"test_counts.csv": counts_csv(IDS, counts_of(dice))},
        })  # fmt: skip

    def read_text(self, artifact):
        names = [{"name": child["name"]} for child in self.children]
        plan = {"name": "study", "methods": ["noisy_only", "clean_only", "pixel_reweight"], "noise": LEVELS}
        return json.dumps(plan | {"champion": self.champion, "clean_counts": COUNTS, "seeds": SEEDS, "children": names})

    def runs(self, histories, texts):
        return self.children

    def images(self, run_id, key):
        return {10: b"\x89PNG early", 90: b"\x89PNG late", 50: b"\x89PNG"}

    def log_file(self, path, folder=None):
        self.files[f"{folder}/{path.name}"] = path.read_bytes()


def rows_of(study: Dictionary) -> dict[tuple[str, str, str], dict[str, str]]:
    finished, _ = collect(study, json.loads(study.read_text("plan.json")))
    cells = make_cells(finished, json.loads(study.read_text("plan.json")))
    rows = csv.DictReader(io.StringIO(results_csv(cells)))
    return {(row["noise"], row["clean_count"], row["method"]): row for row in rows}


def test_every_cell_is_there_and_a_run_stands_for_the_levels_it_does_not_depend_on() -> None:
    rows = rows_of(Dictionary())
    assert len(rows) == 2 * 2 * 3
    assert rows["box", "4", "clean_only"]["dice_mean"] == rows["polygon(3)", "4", "clean_only"]["dice_mean"]
    assert rows["box", "4", "noisy_only"]["dice_mean"] == rows["box", "8", "noisy_only"]["dice_mean"]
    assert rows["box", "4", "clean_only"]["dice_mean"] != rows["box", "8", "clean_only"]["dice_mean"]


def test_mean_deviation_and_difference_are_those_worked_out_here() -> None:
    row = rows_of(Dictionary())["polygon(3)", "8", "pixel_reweight"]
    means, noisy = [], []
    for seed in SEEDS:
        hard = np.random.default_rng(seed).uniform(0.2, 0.6, len(IDS))
        means.append(np.rint(100 * (hard + 0.1 + 0.02 * seed)).mean() / 100)
        noisy.append(np.rint(100 * (hard - 0.1)).mean() / 100)
    assert float(row["dice_mean"]) == pytest.approx(np.mean(means))
    assert float(row["dice_sd"]) == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
    assert float(row["dice_minus_noisy_only"]) == pytest.approx(np.mean(means) - np.mean(noisy))
    assert float(row["dice_minus_noisy_only_low"]) > 0.2 and float(row["dice_minus_noisy_only_p"]) < 0.001
    assert row["seeds"] == "2"


def test_the_champion_is_held_against_every_other_method_and_where_it_falls_short_is_said(tmp_path: Path) -> None:
    """It is 0.1 above clean_only of K = 4 and 0.1 below that of K = 8; the seeds' means are some hundredths apart."""
    study = Dictionary()
    study.champion = "pixel_reweight"
    told = write_report(study, tmp_path)
    assert "pixel_reweight is above every other method but the oracle" in told and "in 2 of 4 settings" in told
    short = [line for line in told.splitlines() if line.startswith("Not at")]
    assert [line.split(":")[0] for line in short] == ["Not at box, K = 8", "Not at polygon(3), K = 8"]
    assert all("against clean_only (" in line and "noisy_only" not in line for line in short)
    page = (tmp_path / "report.html").read_text()
    assert short[0] in page and "Dice − pixel_reweight" in page
    rows = {(r["noise"], r["clean_count"], r["method"]): r for r in csv.DictReader((tmp_path / "results.csv").open())}
    assert float(rows["box", "8", "clean_only"]["dice_minus_pixel_reweight"]) == pytest.approx(0.09, abs=0.005)
    assert rows["box", "8", "pixel_reweight"]["dice_minus_pixel_reweight"] == ""


def test_a_lead_within_the_seeds_spread_is_none() -> None:
    study = Dictionary()
    plan = json.loads(study.read_text("plan.json"))
    for seed in SEEDS:  # on average 0.05 above pixel_reweight of the same level, and 0.2 apart from each other
        study.add("union", "box", "4", seed, np.full(len(IDS), 0.48 + 0.2 * seed))
    finished, _ = collect(study, {"children": [{"name": child["name"]} for child in study.children]})
    cells = make_cells(finished, plan | {"methods": ["pixel_reweight", "union"]})
    by_method = {cell.method: cell for cell in cells if (cell.noise, cell.clean_count) == ("box", 4)}
    assert by_method["union"].mean("dice") > by_method["pixel_reweight"].mean("dice")
    assert not by_method["union"].above(by_method["pixel_reweight"], "dice")
    assert "against pixel_reweight" in verdict(list(by_method.values()), "union")


def test_one_seed_has_no_spread_to_be_above() -> None:
    study = Dictionary()
    study.children = [child for child in study.children if child["tags"]["seed"] == "0"]
    finished, _ = collect(study, json.loads(study.read_text("plan.json")))
    cells = make_cells(finished, json.loads(study.read_text("plan.json")))
    assert "in 0 of 4 settings" in verdict(cells, "pixel_reweight")


def test_what_has_not_finished_is_left_out_and_named(tmp_path: Path) -> None:
    study = Dictionary()
    study.add("pixel_reweight", "box", "4", 2, np.full(len(IDS), 1.0), status="KILLED", name="cut off")
    study.children.insert(0, study.children[0] | {"status": "RUNNING"})  # an older attempt at the same child
    assert rows_of(study)["box", "4", "pixel_reweight"]["seeds"] == "2"
    told = write_report(study, tmp_path)
    assert "1 of 18 runs have not finished: cut off" in told


def test_the_report_holds_its_pictures_and_goes_to_the_tracker(tmp_path: Path) -> None:
    study = Dictionary()
    told = write_report(study, tmp_path / "report")
    assert "polygon(3)  8  pixel_reweight" in told
    names = {"dice_by_noise.png", "dice_by_clean_count.png", "dice_by_wrong_pixels.png", "auroc.png", "cost.png"}
    names |= {f"weights_{level}_{when}.png" for level in (0, 1) for when in ("early", "late")}
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert written == names | {"report.html", "results.csv", "runs.csv"}
    assert study.files.keys() == {f"report/{name}" for name in written}
    assert (tmp_path / "report" / "weights_1_early.png").read_bytes() == b"\x89PNG early"
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == len(names)
    assert "<script" not in page and "http" not in page


def test_a_run_that_is_no_study_is_told(tmp_path: Path) -> None:
    study = Dictionary()
    study.read_text = lambda artifact: None
    with pytest.raises(UserError, match=r"no plan\.json"):
        write_report(study, tmp_path)
    empty = Dictionary()
    plan = empty.read_text("plan.json")
    empty.children, empty.read_text = [], lambda artifact: plan
    with pytest.raises(UserError, match="none of its 16 runs has finished"):
        write_report(empty, tmp_path)
