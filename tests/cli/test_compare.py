"""Runs against each other: the statistics, what is refused, the page, and the program."""

import hashlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_console import FakeConsole
from launching import LauncherProcess
from PIL import Image

from pipeline.cli import compare as program
from pipeline.data.manifest import COLUMNS, Manifest
from pipeline.data.sources.base import CorruptImageError
from pipeline.data.sources.files import FileSource
from pipeline.errors import RunError, UserError
from pipeline.evaluation import compare as comparison
from pipeline.evaluation import statistics
from pipeline.evaluation.compare import RunComparison, RunPredictions, compare, read_run_predictions
from pipeline.evaluation.report.comparison_report import MAX_THUMBNAILS, ConfigDiff, render_comparison
from pipeline.evaluation.statistics import adjust_p_values, exact_bounds, mcnemar_test, paired_bootstrap
from pipeline.runs.run_directory import RunDirectory

PROJECT = Path(__file__).parents[2]
CLASSES = ("ant", "<b>bee</b>")


def table_of(
    labels: Sequence[int],
    keys: Sequence[str] | None = None,
    groups: Sequence[int] | np.ndarray | None = None,
    split: str = "test",
) -> pd.DataFrame:
    n = len(labels)
    keys = [f"{i:04}.png" for i in range(n)] if keys is None else keys
    columns = {
        "key": keys,
        "label": labels,
        "split": [split] * n,
        "group": range(n) if groups is None else groups,
        "sha256": [hashlib.sha256(key.encode()).hexdigest() for key in keys],
        "height": [8] * n,
        "width": [8] * n,
        "orientation": [1] * n,
    }
    return pd.DataFrame(columns).astype(COLUMNS)


def predictions_of(table: pd.DataFrame, right: np.ndarray, true_probability: np.ndarray | float = 0.5) -> pd.DataFrame:
    labels = table["label"].to_numpy()
    predicted = np.where(right, labels, 1 - labels)
    rows = {
        "index": np.arange(len(table)),
        "key": table["key"],
        "true_class": [CLASSES[i] for i in labels],
        "predicted_class": [CLASSES[i] for i in predicted],
        "probability": np.linspace(0.5, 0.9, len(table)),
        "true_probability": true_probability,
    }
    return pd.DataFrame(rows)


def measured(
    name: str,
    right: Sequence[bool] | np.ndarray,
    groups: Sequence[int] | None = None,
    true_probability: np.ndarray | float = 0.5,
) -> RunPredictions:
    right = np.array(right, bool)
    table = table_of(np.arange(len(right)) % 2, groups=groups)
    return RunPredictions(name, "test", predictions_of(table, right, true_probability), Manifest(CLASSES, table))


def pair_of(only_a: int, only_b: int, both: int = 0) -> RunComparison:
    a = [True] * only_a + [False] * only_b + [True] * both
    b = [False] * only_a + [True] * only_b + [True] * both
    [pair] = compare([measured("A", a), measured("B", b)])
    return pair


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"), [(0, 0, 1), (0, 1, 1), (0, 6, 2 / 64), (1, 9, 22 / 1024), (9, 1, 22 / 1024), (5, 5, 1)]
)
def test_mcnemar_counts_the_binomial_tails(only_a: int, only_b: int, p: float) -> None:
    assert mcnemar_test(only_a, only_b) == pytest.approx(p)


def test_holm_multiplies_the_smallest_by_their_number_and_never_falls() -> None:
    assert adjust_p_values([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert adjust_p_values([0.9, 0.8]) == [1, 1]
    assert adjust_p_values([0.02]) == [0.02]


def test_the_bootstrap_agrees_with_the_normal_distribution_of_many_images() -> None:
    values = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], 4000, p=[0.03, 0.92, 0.05])
    interval, margin = paired_bootstrap(values, np.arange(4000)), 1.96 * values.std() / np.sqrt(4000)
    assert interval.value == values.mean()
    assert (interval.low, interval.high) == pytest.approx(
        (values.mean() - margin, values.mean() + margin), abs=0.05 * margin
    )


def test_copies_of_an_image_are_no_further_evidence() -> None:
    values = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], 300, p=[0.05, 0.85, 0.1])
    groups = np.arange(300)
    once = paired_bootstrap(values, groups)
    assert paired_bootstrap(np.tile(values, 4), np.tile(groups, 4)) == pytest.approx(once)
    blind = paired_bootstrap(np.tile(values, 4), np.arange(1200))
    assert blind.high - blind.low == pytest.approx((once.high - once.low) / 2, rel=0.1)


def test_the_exact_bounds_hold_0_where_the_test_finds_nothing() -> None:
    for only_a in range(12):
        for only_b in range(12):
            low, high = exact_bounds(only_a, only_b, 100, 100)
            assert (low <= 0 <= high) == (mcnemar_test(only_a, only_b) >= 0.05), (only_a, only_b)
    assert exact_bounds(0, 0, 100, 50) == pytest.approx((0.025 ** (1 / 50) - 1, 1 - 0.025 ** (1 / 50)))


def test_a_direction_that_no_image_took_is_not_excluded() -> None:
    pair = pair_of(0, 1, both=149)
    assert pair.accuracy.low < 0 < pair.accuracy.value < pair.accuracy.high
    assert "from 0.6 points worse to 2.0 points better" in pair.sentence


@pytest.mark.parametrize("copies", [1, 4])
def test_of_equally_good_runs_hardly_one_is_called_better(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where every image has near-duplicates that turn with it, which McNemar's test takes for evidence."""
    monkeypatch.setattr(statistics, "PAIRED_RESAMPLES", 1000)
    for unused in ("_class_metrics", "_changed_images"):  # half of the time, and no part of the verdict
        monkeypatch.setattr(comparison, unused, lambda *arguments: {})
    rng, called, by_image = np.random.default_rng(1), 0, 0
    images = Manifest(CLASSES, table_of([0] * 120 * copies, groups=np.repeat(np.arange(120), copies)))
    all_right = predictions_of(images.table, np.ones(120 * copies, bool))
    for _ in range(200):
        kind = rng.choice(3, 120, p=[0.05, 0.05, 0.9]).repeat(copies)
        predictions = (
            all_right.assign(predicted_class=np.where(kind == wrong, CLASSES[1], CLASSES[0])) for wrong in (1, 0)
        )
        [pair] = compare(
            [RunPredictions(name, "test", each, images) for name, each in zip("AB", predictions, strict=True)]
        )
        called += pair.verdict == "better"
        by_image += pair.p_value < 0.05
    assert called <= 10, "5 % of 200; half of that is to be expected"
    assert copies == 1 or by_image > 40, "the groups are needed here"


def test_a_clear_difference_is_found_and_called_by_its_direction() -> None:
    better, worse = pair_of(2, 20, both=178), pair_of(20, 2, both=178)
    assert (better.verdict, worse.verdict) == ("better", "worse")
    assert better.sentence.startswith(
        "B is better than A: 99.0% of the 200 test images correct against 90.0%, 9.0 points better (95% interval "
    )
    assert "in 1 of 8,257 comparisons (McNemar's test, p = 0.00012)" in better.sentence
    assert worse.sentence.startswith(
        "B is worse than A: 90.0% of the 200 test images correct against 99.0%, 9.0 points worse"
    )
    low, high = re.findall(r"interval ([\d.]+) to ([\d.]+)", worse.sentence)[0]
    assert 0 < float(low) < 9 < float(high)


def test_what_the_images_cannot_decide_is_reported_with_its_bounds() -> None:
    pair = pair_of(3, 5, both=92)
    assert pair.verdict == "open"
    assert pair.sentence.startswith(
        "These 100 test images show no significant difference between B and A: 97.0% correct against 95.0%. "
        "The true difference of B may lie anywhere from "
    )
    assert "points worse to " in pair.sentence
    assert "in 73% of comparisons" in pair.sentence
    assert "every time (McNemar's test, p = 1)" in pair_of(0, 0, both=10).sentence


def test_near_duplicates_that_make_the_difference_leave_it_open_and_are_named() -> None:
    right_a = np.array([True] * 90 + [False] * 10)
    [pair] = compare([measured("A", right_a, [*range(90), *[90] * 10]), measured("B", np.ones(100, bool), range(100))])
    assert (pair.p_value < 0.05, pair.verdict, pair.num_groups) == (True, "open", 91)
    assert "near-duplicates are not independent" in pair.sentence


def test_several_runs_are_compared_with_the_first_and_their_p_values_adjusted() -> None:
    right = np.ones(100, bool)
    first, second, third = (
        measured(name, right & (np.arange(100) >= wrong)) for name, wrong in (("A", 9), ("B", 0), ("C", 3))
    )
    pairs = compare([first, second, third])
    assert [(pair.a, pair.b) for pair in pairs] == [("A", "B"), ("A", "C")]
    assert [pair.p_value for pair in pairs] == pytest.approx([2 * 2 / 2**9, 2 / 2**6])
    assert "adjusted for 2 comparisons by Holm's method" in pairs[0].sentence


def test_the_loss_is_that_of_the_true_class() -> None:
    right, sure = np.ones(50, bool), np.full(50, 0.8)
    known = (
        measured("A", right, true_probability=sure),
        measured("B", right, true_probability=np.append(sure[1:] / 2, 0.0)),
    )
    [pair] = compare(known)
    assert pair.loss is not None
    assert pair.loss.value == pytest.approx((49 * np.log(2) + np.log(0.8) - np.log(np.finfo(float).tiny)) / 50)


def test_the_order_of_the_images_does_not_matter(tmp_path: Path) -> None:
    table = table_of([0, 1, 0, 1])
    for name, order in (("a", [0, 1, 2, 3]), ("b", [3, 1, 0, 2])):
        shuffled = table.iloc[order].reset_index(drop=True)
        Manifest(CLASSES, shuffled).save(tmp_path / f"{name}.manifest")
        predictions_of(shuffled, shuffled["key"].to_numpy() != "0001.png").to_parquet(tmp_path / name)
    a, b = (read_run_predictions(name, "test", tmp_path / name, tmp_path / f"{name}.manifest") for name in "ab")
    [pair] = compare([a, b])
    assert (pair.only_a, pair.only_b, pair.accuracies) == (0, 0, (0.75, 0.75))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("key", "other.png", "other.png: is new"),
        ("label", 0, "0001.png: has another label"),
        ("sha256", "f" * 64, "has other contents"),
    ],
)
def test_other_images_labels_or_contents_are_refused_by_name(column: str, value: object, message: str) -> None:
    a, b = measured("A", [True] * 4), measured("B", [True] * 4)
    b.images.table.loc[1, column] = value
    with pytest.raises(RunError, match="they were not evaluated on the same images") as caught:
        compare([a, b])
    assert message in str(caught.value)
    assert "seed and data.splits" in str(caught.value)


def test_predictions_that_do_not_belong_to_the_manifest_are_refused(tmp_path: Path) -> None:
    table = table_of([0, 1, 0, 1])
    Manifest(CLASSES, table).save(tmp_path / "manifest")
    right = predictions_of(table, np.ones(4, bool))
    for wrong in (
        right.iloc[1:],
        right.assign(key="x.png"),
        right.assign(true_class="ant"),
        right.drop(columns="probability"),
    ):
        wrong.to_parquet(tmp_path / "predictions")
        with pytest.raises(RunError, match=r"predictions: .*evaluate the run again"):
            read_run_predictions("A", "test", tmp_path / "predictions", tmp_path / "manifest")
    (tmp_path / "predictions").write_bytes(b"PAR1")
    with pytest.raises(RunError, match="cannot be read"):
        read_run_predictions("A", "test", tmp_path / "predictions", tmp_path / "manifest")


# The page and the program, on runs that were made up: of 60 images, of which the second run gets 20 right that the
# first gets wrong.

IMAGES = 60


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes of 30 images, all of them lying on their side."""
    root, exif = tmp_path_factory.mktemp("data") / "photos", Image.Exif()
    exif[0x0112] = 6
    for number in range(IMAGES):
        folder = root / ("ant", "bee")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 30), (4 * number, 90, 90)).save(folder / f"{number:02}.jpg", exif=exif)
    return root


def make_run(
    directory: Path, image_folder: Path, right: np.ndarray, *, seed: int, names: tuple[str, ...] = ("ant", "bee")
) -> Path:
    """What a finished run leaves, as far as a comparison reads it."""
    run = RunDirectory(directory)
    run.evaluation("test").mkdir(parents=True)
    run.config.write_text(f"seed: {seed}\nmodel: {{variant: lite0}}\ndata: {{source: folder, path: {image_folder}}}\n")
    keys = [f"{('ant', 'bee')[number % 2]}/{number:02}.jpg" for number in range(IMAGES)]
    table = table_of(np.arange(IMAGES) % 2, keys).assign(
        sha256=[hashlib.sha256((image_folder / key).read_bytes()).hexdigest() for key in keys], orientation=np.uint8(6)
    )
    Manifest(names, table).save(run.manifest)
    rows = predictions_of(table, right)
    for column in ("true_class", "predicted_class"):
        rows[column] = rows[column].map(dict(zip(CLASSES, names, strict=True)))
    rows.to_parquet(run.predictions("test"))
    checkpoint = run.checkpoints / "step-00000010"
    checkpoint.mkdir(parents=True)
    history = [
        {"epoch": e, "step": 5 * e, "train/loss": 1 / e, "val/loss": 1 / e, "val/accuracy": 1 - 0.5 / e} for e in (1, 2)
    ]
    text = json.dumps({"history": history, "versions": {"keras": f"3.{seed}"}, "sha256": {}})
    (checkpoint / "metadata.json").write_text(text)
    (checkpoint / "metadata.sha256").write_text(hashlib.sha256(text.encode()).hexdigest())
    return directory


@pytest.fixture
def two(tmp_path: Path, image_folder: Path) -> tuple[Path, Path]:
    """Two runs."""
    wrong = np.arange(IMAGES) < 20
    return make_run(tmp_path / "plain", image_folder, ~wrong, seed=1), make_run(
        tmp_path / "tuned", image_folder, np.ones(IMAGES, bool), seed=2
    )


def run(*words: str | Path) -> str:
    console = FakeConsole()
    assert program.main(console, [str(word) for word in words]) == 0
    return console.output


def test_the_program_says_it_in_words_and_keeps_the_page_with_the_run_that_is_judged(two: tuple[Path, Path]) -> None:
    output = run(*two)
    assert output.startswith(
        "tuned is better than plain: 100.0% of the 60 test images correct against 66.7%, 33.3 points better"
    )
    assert ["seed", "1", "2"] in [line.split() for line in output.splitlines()]
    assert ["version.keras", "3.1", "3.2"] in [line.split() for line in output.splitlines()]
    assert "from wrong to right, plain to tuned: 20" in output
    assert "and 15 more" in output
    assert "is not tracked in MLflow" in output
    folder = two[1] / "report" / "compare" / "plain"
    assert sorted(path.name for path in folder.iterdir()) == ["test.html", "test.json"]
    found = json.loads((folder / "test.json").read_text())
    [pair] = found["pairs"]
    assert (pair["verdict"], pair["only_a"], pair["only_b"], len(pair["changed"])) == ("better", 0, 20, 20)
    assert found["settings"]["seed"] == ["1", "2"]
    assert set(found["settings"]) == {"seed", "version.keras"}
    assert not (two[0] / "report").exists()


def images_in(page: str) -> list[Image.Image]:
    import base64

    return [
        Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    ]


def test_the_page_holds_everything_and_fetches_nothing(two: tuple[Path, Path]) -> None:
    run(*two)
    page = (two[1] / "report/compare/plain/test.html").read_text()
    assert "tuned is better than plain." in page
    assert not re.search(r"(src|href)\s*=\s*(?![\"']data:)", page)
    assert not re.search(r"url\(|@import|<script|<link", page)
    assert page.count("data:image/svg+xml") == 2, "loss and accuracy"
    assert all(f"{('ant', 'bee')[i % 2]}/{i:02}.jpg" in page for i in range(20)), "every image that changed sides"
    images = images_in(page)
    assert len(images) == 20
    assert {image.size for image in images} == {(30, 60)}, "upright"


def test_images_that_changed_or_are_gone_are_not_shown(
    two: tuple[Path, Path], image_folder: Path, tmp_path: Path
) -> None:
    here = tmp_path / "photos"
    for old in image_folder.rglob("*.jpg"):
        (here / old.parent.name).mkdir(parents=True, exist_ok=True)
        (here / old.parent.name / old.name).write_bytes(old.read_bytes())
    for directory in two:
        (directory / "config.yaml").write_text(
            (directory / "config.yaml").read_text().replace(str(image_folder), str(here))
        )
    (here / "ant/00.jpg").unlink()
    Image.new("RGB", (60, 30)).save(here / "bee/01.jpg")
    run(*two)
    page = two[1] / "report/compare/plain/test.html"
    assert len(images_in(page.read_text())) == 18
    here.rename(tmp_path / "elsewhere")
    assert "the report shows no images: data.path" in run(*two)
    assert not images_in(page.read_text())
    assert "ant/00.jpg" in page.read_text()


def test_images_that_cannot_be_read_are_not_shown(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(self: FileSource, key: str) -> bytes:
        raise CorruptImageError(key, "is damaged")

    monkeypatch.setattr(FileSource, "read", damaged)
    run(*two)
    page = (two[1] / "report/compare/plain/test.html").read_text()
    assert not images_in(page)
    assert "ant/00.jpg" in page


def test_names_are_text_and_never_markup() -> None:
    a, b = measured("<i>A</i>", [False] * 40), measured("B&C", [True] * 40)
    page = render_comparison(
        [a, b], compare([a, b]), settings=[ConfigDiff("x", ("<u>", "1"))], histories={}, source=None
    )
    assert not {"<b>bee", "<i>A", "<u>", "B&C"} & set(re.findall(r"<b>bee|<i>A|<u>|B&C", page))
    assert "&lt;b&gt;bee&lt;/b&gt;" in page
    assert "&lt;i&gt;A&lt;/i&gt;" in page


def test_of_many_images_the_first_are_shown_and_all_are_named(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    a, b = measured("A", [False] * 100), measured("B", [True] * 100)
    for each in (a, b):
        each.images.table["sha256"] = hashlib.sha256(file.getvalue()).hexdigest()
    for key in a.images.table["key"]:
        (tmp_path / key).write_bytes(file.getvalue())
    page = render_comparison(
        [a, b], compare([a, b]), settings=[], histories={}, source=FileSource(tmp_path, CLASSES, ())
    )
    assert len(images_in(page)) == MAX_THUMBNAILS
    assert all(f"<th>{key}</th>" in page for key in a.images.table["key"])
    assert "config, data and libraries are the same" in page


def test_three_runs_make_one_page_in_the_last_one(two: tuple[Path, Path], tmp_path: Path, image_folder: Path) -> None:
    third = make_run(tmp_path / "third", image_folder, np.arange(IMAGES) >= 18, seed=3)
    output = run(*two, third)
    assert "third" in output
    assert "adjusted for 2 comparisons" in output
    page = (third / "report/compare/plain+tuned/test.html").read_text()
    assert "tuned is better than plain." in page
    assert "show no significant difference between third and plain." in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plain", "plain/../plain"], "is named twice"),
        (["plain", "nowhere"], "nowhere: is neither a directory"),
        (
            ["plain", "tuned", "--split", "val"],
            "not evaluated on the split val yet, or compare by --split test. Evaluate by",
        ),
    ],
)
def test_a_wrong_request_is_refused_by_name(
    two: tuple[Path, Path], words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(two[0].parent)
    with pytest.raises(UserError) as caught:
        run(*words)
    assert message in str(caught.value)


def test_a_run_that_was_not_measured_is_named_with_the_command_that_does_it(two: tuple[Path, Path]) -> None:
    RunDirectory(two[0]).predictions("test").unlink()
    with pytest.raises(RunError, match=rf"evaluate --run {two[0]} --split test$"):
        run(*two)


def test_runs_that_are_called_the_same_go_by_their_paths(two: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    two[1].rename(tmp_path / "other" / "plain")
    output = run(two[0], tmp_path / "other" / "plain")
    assert output.startswith(f"{tmp_path}/other/plain is better than {two[0]}: ")
    assert (tmp_path / "other/plain/report/compare/plain/test.html").exists()


def test_the_program_ends_with_its_code_and_without_a_traceback(
    two: tuple[Path, Path], launcher_process: LauncherProcess
) -> None:
    command = ("-m", "pipeline", "compare")
    alone = launcher_process.run(PROJECT, *command, str(two[0]))
    assert (alone.code, "at least two runs" in alone.stderr) == (2, True)
    manifest = Manifest.load(two[1] / "manifest.parquet")
    manifest.table.loc[3, "sha256"] = "0" * 64
    manifest.save(two[1] / "manifest.parquet")
    other = launcher_process.run(PROJECT, *command, *map(str, two))
    assert other.code == 2
    assert "bee/03.jpg: has other contents" in other.stderr
    assert "Traceback" not in other.stderr
