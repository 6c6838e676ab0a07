import re
from pathlib import Path

import pytest

from distseg.config.load import CHANGEABLE, changed_keys, dump_config, flatten_config, has_no_effect, load_config
from distseg.config.schema import Config
from distseg.errors import UserError
from distseg.methods.config import MethodConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
MINIMAL = "name: x\ndata: {root: /data}\ntrain: {steps: 10}\n"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def test_there_are_configs() -> None:
    assert {path.name for path in CONFIGS} >= {"demo.yaml", "isic2017.yaml", "paper.yaml"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["data.root=/data"])
    written = tmp_path / "config.yaml"
    written.write_text(dump_config(config))
    assert load_config(written) == config


def test_overrides_apply_in_order_and_take_scientific_notation(minimal: Path) -> None:
    config = load_config(minimal, ["optim.lr=1e-3", "optim.lr=2e-3", "data.clean_count=4", "data.noise.kind=box"])
    assert (config.optim.lr, config.data.noise.kind, config.data.clean_count) == (2e-3, "box", 4)


def test_noise_that_is_drawn_is_a_study(minimal: Path) -> None:
    with pytest.raises(UserError, match=r"data\.noise\.kind box: draws wrong masks.*set data\.clean_count=K"):
        load_config(minimal, ["data.noise.kind=box"])


def test_a_number_written_as_yaml_string_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL + "optim: {lr: 1e-3}\n")  # plain YAML 1.1 reads 1e-3 as a string
    assert load_config(path).optim.lr == 1e-3


def test_a_config_cannot_be_changed(minimal: Path) -> None:
    with pytest.raises(Exception, match="frozen"):
        load_config(minimal).train.steps = 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.clean_cout=3", "data.clean_cout: unknown key; did you mean clean_count?"),
        ("data.noise.vertice=4", "data.noise.vertice: unknown key; did you mean vertices?"),
        ("bogus.key=1", "bogus: unknown key; known: name, seed, data"),
        ("train.steps=many", "train.steps: input should be a valid integer"),
        ("train.batch_size=2.5", "train.batch_size: input should be a valid integer"),
        ("train.batch_size=0", "train.batch_size: input should be greater than or equal to 1, got 0"),
        ("optim.lr=-1", "optim.lr: input should be greater than 0, got -1"),
        ("method.name=pixels", "method.name: input should be 'noisy_only', 'clean_only'"),
        (
            "method.granularity=patch(0)",
            "method.weighting.granularity: granularity 'patch(0)': pixel, patch(k) or image",
        ),
        ("train.epochs=3", "train: set exactly one of steps and epochs"),
        ("data.image_size=97", "data.image_size 97 must be a multiple of 16 (2**model.depth) for unet"),
        ("data.clean_count=0", "data.clean_count 0: pixel_reweight learns from clean images; set it to 1 or more"),
        ("data.root=null", "data.root: input is not a valid path"),
        ("model.options={a: 1}", "model: options are for imported models"),
        ("data.augment.scale=[2, 1]", "data.augment: scale must be [low, high]"),
        ("steps", "override 'steps': write section.key=value"),
        ("deepspeed.zero_stage=4", "deepspeed.zero_stage: input should be 0, 1, 2 or 3, got 4"),
    ],
)
def test_a_mistake_is_told_in_one_line_that_names_the_key(minimal: Path, override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(minimal, [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "name: [unclosed\n", "name: ${nowhere}\n" + MINIMAL[8:]])
def test_a_file_that_is_no_config_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_value_that_the_file_leaves_to_the_user_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL.replace("/data", "'???'"))
    with pytest.raises(UserError, match=r"data\.root: required; add data\.root=VALUE"):
        load_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.yaml: no such file"):
        load_config(tmp_path / "gone.yaml")


def test_flatten_and_compare(minimal: Path) -> None:
    before = load_config(minimal)
    assert flatten_config(before)["data.noise.kind"] == "none"
    after = load_config(minimal, ["optim.lr=0.5", "tracking.mlflow=false"])
    assert changed_keys(before, after) == ["optim.lr was 0.0001, is 0.5"]
    assert changed_keys(before, before) == []
    assert isinstance(before, Config)


REWEIGHTED = MINIMAL + "method: {name: pixel_reweight, estimator: reverse, phases: {warm_up: 0.2}}\n"


def test_the_last_spelling_of_a_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(REWEIGHTED)
    method = load_config(path, ["method.weighting.estimator=finite", "method.warm_up=0.1"]).method
    assert (method.weighting.estimator, method.phases.warm_up) == ("finite", 0.1)
    method = load_config(path, ["method.estimator=finite", "method.weighting.estimator=forward"]).method
    assert method.weighting.estimator == "forward"


@pytest.mark.parametrize("turned", [False, True])
def test_a_part_by_a_word_and_its_keys_go_together_in_any_order(minimal: Path, turned: bool) -> None:
    overrides = ["method.name=finetune", "method.loss=dice_cross_entropy", "method.dice=0.8"]
    loss = load_config(minimal, overrides[::-1] if turned else overrides).method.loss
    assert (loss.kind, loss.dice) == ("dice_cross_entropy", 0.8)


def test_a_key_over_a_part_that_the_file_names_by_a_word_keeps_the_word(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL + "method: {name: finetune, loss: dice_cross_entropy}\n")
    assert load_config(path, ["method.dice=0.8"]).method.loss.dice == 0.8
    assert load_config(path, ["method.loss=generalised_cross_entropy", "method.q=0.3"]).method.loss.q == 0.3
    assert load_config(path, ["method.loss=t_loss"]).method.loss.kind == "t_loss"


@pytest.mark.parametrize("loss", ["cross_entropy", "dice_cross_entropy"])
def test_every_class_has_its_weight(minimal: Path, loss: str) -> None:
    overrides = ["method.name=finetune", f"method.loss={loss}"]
    assert load_config(minimal, [*overrides, "method.class_weights=[1,20]"]).method.loss.class_weights == (1.0, 20.0)
    with pytest.raises(UserError, match=r"method\.loss\.class_weights has 3 numbers for 2 classes"):
        load_config(minimal, [*overrides, "method.class_weights=[1,2,3]"])


def test_another_method_is_not_named_over_the_parts_of_the_file_s(tmp_path: Path) -> None:
    """It would be that method by name only."""
    path = tmp_path / "c.yaml"
    path.write_text(REWEIGHTED)
    with pytest.raises(UserError) as caught:
        load_config(path, ["method.name=noisy_only"])
    told = str(caught.value)
    assert "the config sets method.phases for pixel_reweight" in told
    mend = re.search(r"take it back \((.*)\)", told)[1].split()
    method = load_config(path, ["method.name=noisy_only", *mend]).method
    assert method == MethodConfig.model_validate({"name": "noisy_only"})
    assert load_config(path, ["method.name=pixel_reweight"]).method.weighting.estimator == "reverse"


@pytest.mark.parametrize(
    ("override", "mend"),
    [
        ("method.q=0.5", "method.loss.q=null"),
        ("method.weighting.initial_weight=1", "method.weighting.initial_weight=null"),
        ("data.noise.vertices=4", "data.noise.vertices=null"),
        ("method.clean_share=0.2", "method.phases.clean_share=null"),
    ],
)
def test_the_mend_of_a_key_that_does_not_apply_can_be_typed(minimal: Path, override: str, mend: str) -> None:
    with pytest.raises(UserError, match=re.escape(mend)):
        load_config(minimal, ["method.name=noisy_only", override])
    load_config(minimal, ["method.name=noisy_only", override, mend])


def test_a_key_without_effect_may_change_on_resume_and_is_a_key(minimal: Path) -> None:
    config = load_config(minimal)
    keys = flatten_config(config)
    assert set(CHANGEABLE) <= keys.keys()
    without_effect = [key for key in keys if has_no_effect(key)]
    assert {"data.device_memory", "data.memory", "deepspeed.zero_stage", "tracking.mlflow"} <= set(without_effect)
    after = load_config(minimal, ["data.device_memory=4", "deepspeed.zero_stage=2", "train.log_every=7"])
    assert changed_keys(config, after) == []


@pytest.mark.parametrize("key", ["data.root", "train.batch_size", "train.clean_batch_size", "train.accumulation"])
def test_what_a_resumed_run_checks_by_itself_still_tells_runs_apart(key: str) -> None:
    assert key in CHANGEABLE and not has_no_effect(key)
