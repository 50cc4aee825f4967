"""Configs load as written, and every mistake in one is named with its place, key and nearest valid key."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config.hints import RENAMED, SAME_VALUE
from pipeline.config.loader import load_config
from pipeline.config.schema import Config
from pipeline.config.train import SkipNanConfig, StageConfig
from pipeline.errors import ConfigError

PROJECT = Path(__file__).parents[2]
SHIPPED = sorted((PROJECT / "configs").glob("*.yaml"))
MINIMAL = "data: {source: digits}\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def mistakes(path: Path, overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_opens_with_its_command(path):
    load_config(path)
    first, second, *_ = path.read_text().splitlines()
    assert first == "# yaml-language-server: $schema=config.schema.json"
    assert second.startswith(f"# python train.py --config configs/{path.name}")


def test_a_resolved_config_loads_back_equal(tmp_path):
    for path in SHIPPED:
        for overrides in ([], ["train.global_batch_size=auto"]):
            config = load_config(path, overrides)
            assert load_config(write(tmp_path / "resolved.yaml", config.to_yaml())) == config


def test_all_mistakes_are_named_at_once_with_line_key_and_nearest_key(tmp_path):
    path = write(
        tmp_path / "bad.yaml",
        """seed: 42
model:
  variant: b9
  wieghts: imagenet
data:
  source: digits
  splits: {train: 0.8, val: 0.1, test: 0.2}
augment:
  transforms:
    - RandomResizedCrop: {scal: [0.08, 1.0]}
  randaugment: {num_ops: 2, magntude: 9}
optimizer: {name: rmspropp}
train:
  stages:
    - {epochs: 3, trainable: hed}
    - {epoch: 3}
""",
    )
    found = mistakes(path, ("train.global_batch_size=0", "data.sorce=x"))
    wanted = [
        (f"{path}:3: model.variant: ", "did you mean 'b8'"),
        (f"{path}:4: model.wieghts: ", "did you mean 'weights'?"),
        (f"{path}:7: data.splits: ", "add up to 1.1"),
        (f"{path}:9: augment.transforms: ", "did you mean 'scale'?"),
        (f"{path}:11: augment.randaugment.magntude: ", "did you mean 'magnitude'?"),
        (f"{path}:12: optimizer.name: ", "did you mean 'rmsprop'?"),
        (f"{path}:15: train.stages.0.trainable: ", "did you mean 'head'?"),
        (f"{path}:16: train.stages.1.epochs: ", "is missing"),
        (f"{path}:16: train.stages.1.epoch: ", "did you mean 'epochs'?"),
        ("command line: train.global_batch_size=0: train.global_batch_size: ", "greater than 0"),
        ("command line: data.sorce=x: data.sorce: ", "did you mean 'source'?"),
    ]
    for start, content in wanted:
        assert [line for line in found if line.startswith(start) and content in line], (start, content, found)
    assert len(found) == len(wanted), found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {source: digits}\ndata: {source: csv}\n", ":2: data: is given twice (first at"),
        ("data: [1, 2\n", ": is not valid YAML"),
        ("- a\n", "must hold keys and values"),
        ("? [a]\n: 2\n", ":1: the config: keys must be names"),
        ("a: &a\n  b: *a\n", "nested more than 20 levels deep"),
        ("seed: 2026-13-45\n", ":1: seed: "),
        ("", "data: is missing"),
        ("extends: absent.yaml\n", "absent.yaml: cannot be read"),
        ("extends: [a]\n", "extends: must be the name of another config file"),
        ("data: {source: folder}\n", "source folder needs path"),
        ("data: {source: tfds}\n", "source tfds needs name"),
        ("data: {source: digits, name: x}\n", "name belongs to source tfds"),
        (
            "data: {source: huggingface}\n",
            "needs either name, an id on the Hugging Face Hub such as ethz/food101, or path",
        ),
        ("data: {source: huggingface, name: a/b, path: x}\n", "or path, a folder; received both"),
        (
            "data: {source: huggingface, path: x, revision: v1}\n",
            "revision belongs to data sets on the Hugging Face Hub",
        ),
        ("data: {source: tfds, name: x, config_name: y}\n", "config_name belongs to source huggingface"),
        ("data: {source: csv, path: x, columns: {image: y}}\n", "columns.image does not belong to source csv"),
        ("data: {source: pack, path: x, root: y}\n", "root belongs to source csv; with source pack leave it out"),
        ("data: {source: digits}\nmodel: {variant: b8}\n", "model.weights: imagenet is available for b0"),
        (
            "data: {source: digits}\nmodel: {variant: {phi: 1}}\n",
            "name one of them to start from its layers that fit, as in imagenet:b2",
        ),
        ("data: {source: digits}\nmodel: {variant: {phi: 1}, weights: 'imagenet:b'}\n", "not for 'b'; did you mean 'b"),
        ("data: {source: digits}\nmodel: {weights: 'imagenet:b8'}\n", "not for 'b8'"),
        (
            "data: {source: digits}\nmodel: {weights: 'imagenet:lite0'}\n",
            "imagenet:lite0 does not fit b0: the lite variants",
        ),
        (
            "data: {source: digits}\ntrain: {global_batch_size: 10, gradient_accumulation_steps: 4}\n",
            "must be a multiple of gradient_accumulation_steps",
        ),
        ("data: {source: digits}\naugment: {transforms: [CLAHE]}\n", "set backend: albumentations"),
        ("data: {source: digits}\naugment: {backend: albumentations, transforms: [ClAHE]}\n", "did you mean 'CLAHE'?"),
        (
            "data: {source: digits}\naugment: {backend: albumentations, transforms: [CLAHE: {clip: 2}]}\n",
            "did you mean 'clip_limit'?",
        ),
        ("data: {source: digits}\naugment: {transforms: [HorizontalFlip: {p: 2}]}\n", "p is a probability from 0 to 1"),
        (
            "data: {source: digits}\naugment: {transforms: [RandomResizedCrop: {scale: [1, 0.5]}]}\n",
            "scale is a pair [low, high]",
        ),
        ("data: {source: digits}\ntracking: {experiment: ../x}\n", "tracking.experiment: "),
        ("data: {source: digits}\ntracking: {uri: 'https://me:secret@host'}\n", "MLFLOW_TRACKING_USERNAME"),
        (
            "data: {source: digits}\nmodel: {weights: null}\ntrain: {stages: [{epochs: 1, trainable: head}]}\n",
            "stay random",
        ),
    ],
)
def test_each_mistake_has_its_message(tmp_path, text, message):
    assert message in "\n".join(mistakes(write(tmp_path / "bad.yaml", text)))


def test_extends_merges_sections_and_replaces_lists(tmp_path):
    write(
        tmp_path / "base.yaml",
        MINIMAL
        + "model: {variant: {phi: 1}, drop_path_rate: 0.1, weights: null}\n"
        + "train: {stages: [{epochs: 3}, {epochs: 4}]}\n",
    )
    child = write(
        tmp_path / "child.yaml",
        "extends: base.yaml\n"
        "model:\n  variant: {width: 1, depth: 1, resolution: 64}\n"
        "train:\n  stages: [{epochs: 5}]\n",
    )
    config = load_config(child)
    assert (
        config.model.drop_path_rate,
        config.variant.resolution,
        [stage.epochs for stage in config.train.stages],
    ) == (
        0.1,
        64,
        [5],
    )


def test_a_mistake_in_an_extended_config_is_placed_in_its_own_file(tmp_path):
    base = write(tmp_path / "base.yaml", MINIMAL + "optimizer:\n  base_lrr: 1\n")
    child = write(tmp_path / "child.yaml", "extends: base.yaml\noptimizer:\n  ema_decay: 2\n")
    found = mistakes(child)
    assert [line.split(": ")[0] for line in found] == [f"{child}:3", f"{base}:3"]


def test_extending_itself_is_refused(tmp_path):
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    assert "extends itself by way of a.yaml -> b.yaml -> a.yaml" in mistakes(tmp_path / "a.yaml")[0]


def test_overrides_reach_lists_optional_sections_and_null(tmp_path):
    path = write(tmp_path / "c.yaml", MINIMAL + "train: {stages: [{epochs: 3}]}\n")
    config = load_config(
        path,
        [
            "train.stages.0.epochs=7",
            "augment.randaugment.magnitude=5",
            "model.weights=null",
            "optimizer.base_lr=1e-3",
            "model.variant={phi: 1}",
        ],
    )
    assert config.train.stages[0].epochs == 7
    assert config.augment.randaugment is not None
    assert config.augment.randaugment.magnitude == 5
    assert config.model.weights is None
    assert config.optimizer.base_lr == 1e-3
    assert config.variant.name == "phi=1"


@pytest.mark.parametrize("override", ["seed", "=3", "train..x=1", "train.stages.3.epochs=1", "seed=[1", "a: b=2"])
def test_overrides_that_cannot_be_applied_are_refused(tmp_path, override):
    assert (
        override in mistakes(write(tmp_path / "c.yaml", MINIMAL + "train: {stages: [{epochs: 3}]}\n"), (override,))[0]
    )


def test_a_misspelt_section_in_an_override_is_blamed_on_the_override(tmp_path):
    found = mistakes(write(tmp_path / "c.yaml", MINIMAL), ("modle.drop_path_rate=0.5",))
    assert found == ["command line: modle.drop_path_rate=0.5: modle: unknown key; did you mean 'model'?"]


def test_what_to_do_about_nan_is_a_word_or_a_number_of_steps(tmp_path):
    path = write(tmp_path / "c.yaml", MINIMAL)
    assert load_config(path).train.on_nan == "stop"
    assert load_config(path, ["train.on_nan=rollback"]).train.on_nan == "rollback"
    loaded = load_config(path, ["train.on_nan={skip: 3}"])
    assert loaded.train.on_nan == SkipNanConfig(skip=3)
    assert Config.model_validate(yaml.safe_load(loaded.to_yaml())) == loaded
    for wrong, message in (
        ("halt", "input should be 'stop' or 'rollback'; received 'halt'"),
        ("{skp: 3}", "did you mean 'skip'?"),
    ):
        assert message in "\n".join(mistakes(path, (f"train.on_nan={wrong}",)))
    assert "greater than 0" in mistakes(path, ("train.on_nan={skip: 0}",))[0]


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_config(write(tmp_path / "c.yaml", "data: {source: folder, path: ~/images}\n"))
    assert config.data.path == Path("/home/somebody/images")


def test_a_config_cannot_be_changed_after_loading(tmp_path):
    config = load_config(write(tmp_path / "c.yaml", MINIMAL))
    with pytest.raises(Exception, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_every_field_is_described():
    def walk(section: type) -> None:
        for name, field in section.model_fields.items():
            annotation = field.annotation
            if isinstance(annotation, type) and issubclass(annotation, Config.__mro__[1]):
                walk(annotation)
            elif name not in (
                "seed",
                "train",
                "val",
                "test",
                "name",
                "args",
                "label_smoothing",
                "max_checkpoints",
            ):  # these say it all
                assert field.description, f"{section.__name__}.{name}"

    walk(Config)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["b0", "folder", "head", "rmsprop"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)


def paths_of(node: object, path: tuple = ()) -> list[tuple]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return (
        [path, *(found for key, value in items for found in paths_of(value, (*path, key)))]
        if path
        else [found for key, value in items for found in paths_of(value, (*path, key))]
    )


def loads_or_is_refused_in_words(file: Path) -> None:
    """Whatever is in a file: a config, or exit code 2 with the place and the key of every mistake."""
    try:
        load_config(file)
    except ConfigError as error:  # which ends a program with exit code 2
        for line in str(error).splitlines():
            assert line.startswith(f"{file}:"), line
            place = line.removeprefix(f"{file}:")
            whole_file = re.match(
                r" (must hold keys|is not UTF-8|is not valid YAML|data: is missing|\w+(\.\w+)*: )", place
            )
            assert re.match(r"\d+: .", place) or whole_file, line


def examples(number: int) -> settings:
    return settings(max_examples=number, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@examples(150)
@given(data=st.data())
def test_a_config_with_changed_values_and_keys_loads_or_is_refused_in_words(tmp_path, data):
    change_values_and_keys(tmp_path, data)


@pytest.mark.slow
@examples(700)
@given(data=st.data())
def test_a_config_with_many_changed_values_and_keys_loads_or_is_refused_in_words(tmp_path, data):
    change_values_and_keys(tmp_path, data)


@examples(100)
@given(data=st.data())
def test_a_config_with_changed_characters_loads_or_is_refused_in_words(tmp_path, data):
    change_characters(tmp_path, data)


@pytest.mark.slow
@examples(400)
@given(data=st.data())
def test_a_config_with_many_changed_characters_loads_or_is_refused_in_words(tmp_path, data):
    change_characters(tmp_path, data)


def change_values_and_keys(tmp_path: Path, data: st.DataObject) -> None:
    mutated = yaml.safe_load(data.draw(st.sampled_from(SHIPPED)).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(sorted(paths_of(mutated), key=str)))
        target = mutated
        for part in path[:-1]:
            target = target[part]
        what = data.draw(st.sampled_from(["value", "drop", "misspell"]))
        if what == "value" or isinstance(target, list):
            target[path[-1]] = data.draw(values)
        elif what == "drop":
            del target[path[-1]]
        else:
            target[str(path[-1]) + "x"] = target.pop(path[-1])
        if not paths_of(mutated):
            break
    loads_or_is_refused_in_words(write(tmp_path / "mutated.yaml", yaml.safe_dump(mutated)))


def change_characters(tmp_path: Path, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(SHIPPED)).read_bytes()
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        stop = start + data.draw(st.integers(0, 12))
        noise = st.one_of(
            st.binary(max_size=4),
            st.sampled_from([b"&a ", b"*a", b"!!python/object:os.system ", b"- ", b": ", b"\t", b"{", b"'", b"\n"]),
        )
        text = text[:start] + data.draw(noise) + text[stop:]
    (tmp_path / "mutated.yaml").write_bytes(text)
    loads_or_is_refused_in_words(tmp_path / "mutated.yaml")


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_key_is_answered_with_its_new_name(tmp_path: Path, old: str) -> None:
    *sections, key = old.split(".")
    new = RENAMED[old].partition(" ")[0]
    values = {"data": {"source": "digits"}}
    if sections == ["train", "stages"]:
        values["train"] = {"stages": [{"epochs": 1, key: 1}]}
        written = f"train.stages.0.{key}"
    else:
        values.setdefault(sections[0], {})[key] = 1
        written = old
    [line] = mistakes(write(tmp_path / "old.yaml", yaml.safe_dump(values)))
    assert line.endswith(f": {written}: is now {RENAMED[old]}")
    [line] = mistakes(write(tmp_path / "new.yaml", MINIMAL + "train: {stages: [{epochs: 1}]}\n"), (f"{written}=1",))
    assert line.endswith(f": {written}: is now {RENAMED[old]}")
    assert old.rpartition(".")[0] == new.rpartition(".")[0]
    section = {**Config.model_fields, "train.stages": None}[".".join(sections)]
    fields = StageConfig.model_fields if section is None else section.annotation.model_fields
    assert new.rpartition(".")[2] in fields
    assert key not in fields


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--config", "configs/absent.yaml"], ["--confg", "x"], ["--config", "BAD"]]
)
def test_train_answers_help_and_mistakes_within_two_seconds_of_processor_time(tmp_path, arguments):
    bad = write(tmp_path / "bad.yaml", MINIMAL + "sed: 3\n")
    arguments = [str(bad) if argument == "BAD" else argument for argument in arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert result.returncode == (0 if arguments == ["--help"] else 2)
    assert "Traceback" not in result.stderr
    assert seconds < 2


def test_a_recipe_makes_what_it_chooses_free_of_the_config_that_is_extended(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "data: {source: digits}\noptimizer: {name: sgd}\ntrain: {global_batch_size: 8, stages: [{epochs: 2}]}\n"
    )
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nrecipe: auto\n")
    for config in (load_config(tmp_path / "child.yaml"), load_config(tmp_path / "base.yaml", ["recipe=auto"])):
        assert config.recipe == "auto"
        assert config.train.global_batch_size == 8
        assert not {"optimizer"} & config.model_fields_set
    adjusted = load_config(tmp_path / "base.yaml", ["recipe=auto", "optimizer.name=rmsprop"])
    assert adjusted.optimizer.model_dump(exclude_unset=True) == {"name": "rmsprop"}
    plain = load_config(tmp_path / "base.yaml", ["recipe=null"])
    assert (plain.optimizer.name, plain.train.stages[0].epochs) == ("sgd", 2)


@pytest.mark.parametrize("text", ["images #2", "#2", "2024", "1e3", "yes", "2024-01-31", "C: backup", "@home", "a, b"])
def test_a_text_on_the_command_line_is_taken_as_it_is_written(text):
    config = load_config(PROJECT / "configs/lite0_folder.yaml", [f"data.path={text}"])
    assert config.data.path == Path(text)


def test_texts_in_a_file_may_look_like_numbers_and_class_names_like_booleans(tmp_path):
    path = write(
        tmp_path / "c.yaml", "data: {source: folder, path: 2024}\ntrain: {class_weights: {yes: 2, 10: 3, 1e3: 4}}\n"
    )
    config = load_config(path, ["tracking.experiment=2024"])
    assert (config.data.path, config.tracking.experiment) == (Path("2024"), "2024")
    assert config.train.class_weights == {"yes": 2, "10": 3, "1e3": 4}


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    overrides = ["data.path=~/images", "model.weights=~/w.keras", "model.class_map=~/m.yaml", "tracking.uri=~/mlruns"]
    config = load_config(PROJECT / "configs/lite0_folder.yaml", overrides)
    assert config.data.path == Path("/home/anna/images")
    assert config.model.weights == "/home/anna/w.keras"
    assert config.model.class_map == Path("/home/anna/m.yaml")
    assert config.tracking.uri == "/home/anna/mlruns"


def test_an_address_is_not_folded_into_a_path():
    with pytest.raises(ConfigError, match=r"data.path: must be a path on this machine; received the address gs://b/x"):
        load_config(PROJECT / "configs/lite0_folder.yaml", ["data.path=gs://b/x"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs=3", "write train.epochs=3"),
        ("batch_size=16", "write train.global_batch_size=16"),
        ("train.batch_size=16", "write train.global_batch_size=16"),
        ("lr=0.001", "write optimizer.base_lr=0.008, the learning rate at 256 images per step: that is 0.001 at 32"),
        ("optimizer.learning_rate=0.001", "write optimizer.base_lr=0.008"),
        ("num_classes=5", "the number of classes follows from the data; leave it out"),
        ("model=b0", "is a section with keys of its own; write model.variant=b0"),
        ("train.stages=5", "for a number of epochs write train.epochs=5"),
        ("img_size=260", "write model.resolution=260"),
    ],
)
def test_keys_of_other_programs_are_answered_with_what_to_write(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(PROJECT / "configs/lite0_folder.yaml", ["data.path=x", override])


def test_an_old_value_is_answered_with_the_new_one():
    with pytest.raises(ConfigError, match=r"runtime.strategy: one is now single"):
        load_config(PROJECT / "configs/lite0_digits.yaml", ["runtime.strategy=one"])


def test_every_key_that_a_hint_names_exists():
    config = load_config(PROJECT / "configs/lite0_digits.yaml").model_dump()
    for key in SAME_VALUE.values():
        section, name = key.split(".")
        assert name in config[section], key


@pytest.mark.parametrize("value", ["\r0", "a\nb", "\x1b[31m"])
def test_a_character_that_does_not_print_leaves_a_message_on_one_line(tmp_path, value):
    file = write(tmp_path / "config.yaml", yaml.safe_dump({"data": {"source": "digits"}, "train": {"stages": value}}))
    with pytest.raises(ConfigError, match=r"train\.stages: must be a list of stages") as caught:
        load_config(file)
    assert str(caught.value).isprintable()
