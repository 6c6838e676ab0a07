"""A model card in Markdown (Mitchell et al. 2019): what is known of a run, and what is left for its user to say."""

from collections.abc import Mapping, Sequence
from typing import Any

from distseg.text import counted, for_markdown

_SCORES = ("dice", "jaccard", "sensitivity", "specificity", "accuracy")
_TO_FILL_IN = "*To be filled in by whoever deploys it.*"


def model_card(facts: Mapping[str, Any]) -> str:
    """Of the facts of an export (export.json). Text from configs and data is escaped."""
    model, data, noise = facts["model"], facts["data"], facts["noise"]
    lines = [f"# {for_markdown(model['name'])}", ""]
    lines += [_sentence(facts), ""]
    lines += ["## Scores", "", *_scores(facts["scores"]), ""]
    lines += ["## Classes", "", "| id | name | value in a mask's file |", "|---|---|---|"]
    pairs = zip(facts["classes"]["names"], facts["classes"]["values"], strict=True)
    lines += [f"| {id} | {for_markdown(name)} | {for_markdown(str(value))} |" for id, (name, value) in enumerate(pairs)]
    lines += ["", "## Training", ""]
    lines += _table(
        {
            "method": model["method"],
            "network": f"{model['network']}, {model['parameters']:,} parameters",
            "checkpoint": f"step {model['step']}, SHA-256 of its parameters {model['sha256']}",
            "began with": model["init_sha256"] or "drawn parameters",
            "input": f"{model['image_size']}×{model['image_size']}, data.shape {model['shape']}",
            "channel means": _numbers(model["channel_means"]),
            "channel deviations": _numbers(model["channel_deviations"]),
        }
    )
    lines += ["", "## Data", ""]
    splits = ", ".join(f"{name} {count}" for name, count in data["splits"].items())
    rate = noise["rate"]
    lines += _table(
        {
            "root": data["root"],
            "samples, by content": data["sha256"] or "not recorded",
            "splits": splits or "not recorded",
            "clean training images": "not recorded" if data["clean"] is None else str(data["clean"]),
            "annotations": "as the data brings them" if noise["kind"] == "none" else f"drawn wrong, {noise['kind']}",
            "wrong pixels in the noisy masks": "not known" if rate is None else f"{rate:.2%} on average",
        }
    )
    lines += ["", "## The files", "", *_checks(facts["checks"]), ""]
    lines += ["## Intended use", "", _TO_FILL_IN, "", *_known_limits(facts), ""]
    return "\n".join(lines)


def _sentence(facts: Mapping[str, Any]) -> str:
    names, size = facts["classes"]["names"], facts["input"]["size"]
    of = "any size" if size is None else f"{size[0]}×{size[1]} pixels (height×width)"
    named = ", ".join(map(for_markdown, names[1:]))
    return f"Segments RGB images of {of} into {named} and {for_markdown(names[0])}: a mask of the image's own size."


def _scores(scores: Mapping[str, float]) -> list[str]:
    """Of the test split, with their intervals, at both resolutions where there are both."""
    parts = {"at the network's resolution": "test", "at the files' own": "test/own"}
    there = {title: prefix for title, prefix in parts.items() if f"{prefix}/dice" in scores}
    if not there:
        return ["The run has no result yet."]
    lines = [f"| test split | {' | '.join(there)} |", f"|---|{'---|' * len(there)}"]
    for name in _SCORES:
        cells = [_interval(scores, f"{prefix}/{name}") for prefix in there.values()]
        lines.append(f"| {name.capitalize()} | {' | '.join(cells)} |")
    return [*lines, "", "Means over images; in brackets 95 % bootstrap intervals over images."]


def _interval(scores: Mapping[str, float], name: str) -> str:
    values = [scores.get(name + end) for end in ("", "_low", "_high")]
    if any(value is None for value in values):
        return "–"
    mean, low, high = values
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _checks(checks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        f"`{name}` was held against the run on {counted(check['images'], 'image')}: probabilities differ by "
        f"{check['difference']:.1e} at most, and masks have an IoU of {check['iou']:.5f} at least.\n"
        for name, check in checks.items()
    ] or ["None was asked for."]


def _known_limits(facts: Mapping[str, Any]) -> list[str]:
    """What follows from how it was trained."""
    data = facts["data"]
    trained = (
        f"{counted(data['splits']['train'], 'image')} of one data set" if "train" in data["splits"] else "one data set"
    )
    return [
        "What is known:",
        "",
        f"- It was trained on {trained}. Images from other devices, of other people or other diseases may be unlike "
        "them, and no score above says how it does on these (`distseg evaluate --data ROOT` does).",
        "- It says something of every image, also of one that shows none of its classes.",
        "- Its probabilities are those of the network; `distseg evaluate` measures their calibration.",
        "- It is no medical device, and nobody has examined it as one.",
    ]


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _table(rows: Mapping[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {for_markdown(value)} |" for name, value in rows.items())]
