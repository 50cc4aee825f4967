"""The compound line as a search: figures of built networks, the grid, and the largest phi within a budget."""

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli.scale import training_config
from pipeline.config.loader import load_config
from pipeline.errors import UserError
from pipeline.models import compound_search as search
from pipeline.models import profile
from pipeline.models.compound_search import Budget, Candidate, Solution, WeightOverlap
from pipeline.models.efficientnet import efficientnet
from pipeline.models.profile import estimated_memory, profile_model
from pipeline.models.variants import VARIANTS, Variant, from_phi, phi_of


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(replace(VARIANTS["b0"], resolution=64), marks=pytest.mark.slow),
        replace(VARIANTS["lite0"], width=0.5, resolution=48),
    ],
    ids=["b0", "lite0"],
)
def test_a_network_without_values_has_the_size_of_one_with_them(variant: Variant) -> None:
    model = efficientnet(variant, num_classes=7)
    size = search.profile_variant(variant, num_classes=7, batch_size=3)
    assert (size.parameters, size.flops) == (profile_model(model).trainable_parameters, profile_model(model).flops)
    assert size.memory == estimated_memory(model, 3)
    assert size.blocks == 16


def test_phi_of_inverts_the_formula() -> None:
    assert phi_of(224) == 0
    for phi in (-3.0, 1.0, 4.5):
        assert phi_of(from_phi(phi).resolution) == pytest.approx(phi, abs=0.02)


@given(st.floats(-6, 9), st.floats(0, 2))
def test_nothing_of_the_architecture_shrinks_as_phi_grows(phi: float, more: float) -> None:
    smaller, larger = search.architecture(from_phi(phi)), search.architecture(from_phi(min(9, phi + more)))
    assert all(a <= b for a, b in zip(smaller, larger, strict=True))


def test_equal_architectures_are_measured_once() -> None:
    calls: Counter[str] = Counter()

    def measure(variant: Variant) -> int:
        calls[variant.name] += 1
        return variant.resolution

    once = search.once_per_architecture(measure)
    assert [once(VARIANTS["b0"]), once(replace(VARIANTS["b0"], name="again", dropout=0.9)), once(VARIANTS["b1"])] == [
        224,
        224,
        240,
    ]
    assert calls == {"b0": 1, "b1": 1}


def pixels(variant: Variant) -> float:
    return variant.resolution**2


@given(st.lists(st.tuples(st.sampled_from([1, 2]), st.floats(-5.9, 12)), min_size=1, max_size=4))
def test_the_solution_is_within_every_budget_and_the_next_step_is_not(wanted: list[tuple[int, float]]) -> None:
    budgets = [
        Budget(
            str(i),
            1.0001 * (1.1**phi if kind == 1 else 224 * 1.15**phi),
            (lambda v: v.width) if kind == 1 else (lambda v: v.resolution),
        )
        for i, (kind, phi) in enumerate(wanted)
    ]
    found = search.largest_within(budgets)
    assert all(budget.measure(found.variant) <= budget.limit for budget in budgets)
    if found.binding is None:
        assert found.phi == 9
    else:
        binding = next(budget for budget in budgets if budget.name == found.binding)
        assert binding.measure(from_phi(found.phi + 0.01)) > binding.limit


@pytest.mark.parametrize(
    ("limit", "line"), [(1.8e6, (-6, -4)), pytest.param(4e6, (-6, 9), marks=pytest.mark.slow)], ids=["small", "whole"]
)
def test_a_built_network_is_the_largest_under_its_parameters(
    limit: float, line: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, phi in zip(("SMALLEST_PHI", "LARGEST_PHI"), line, strict=True):
        monkeypatch.setattr(search, name, phi)
    size = search.once_per_architecture(search.profile_variant)
    found = search.largest_within([Budget("parameters", limit, lambda variant: size(variant).parameters)])
    assert size(found.variant).parameters <= limit < size(from_phi(found.phi + 0.01)).parameters


def test_an_impossible_budget_names_itself_and_the_smallest() -> None:
    with pytest.raises(UserError, match=r"pixels: .*within 50; the smallest, phi = -6 at 97 px, takes 9409"):
        search.largest_within([Budget("width", 9, lambda variant: variant.width), Budget("pixels", 50, pixels)])


def test_the_grid_keeps_the_papers_triple_and_orders_by_the_measured_ratio() -> None:
    triples = search.grid([1.0, 1.2, 1.4], [1.1], [1.15], 0.1)
    assert triples == [(1.2, 1.1, 1.15)]
    found = search.flops_ratios([(1.0, 1.0, 1.0), (1.0, 1.0, 1.41)], lambda variant: variant.resolution**2)
    assert [candidate.gamma for candidate in found] == [1.41, 1.0]
    assert found[0].flops_ratio == pytest.approx(1.41**2, rel=0.01)
    assert Candidate(1.2, 1.1, 1.15, 2).product == pytest.approx(1.920, abs=0.001)


def test_a_latency_is_a_time_above_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "TIMING_SECONDS", 0.1)
    assert 0 < search.latency_of(replace(VARIANTS["lite0"], width=0.25, depth=0.3, resolution=32), num_classes=2) < 5


def test_the_nearest_published_variant_of_each_is_itself() -> None:
    assert all(
        search.nearest_published(variant).name == name
        for name, variant in VARIANTS.items()
        if variant.family_name == "efficientnet"
    )


def test_only_identical_shapes_count_as_a_published_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "IMAGENET_VARIANTS", ("b0", "b1", "lite0"))
    monkeypatch.setattr(search, "without_values", cache(search.without_values))
    assert search.best_fit(replace(from_phi(0.02), resolution=96)) == WeightOverlap(
        "b1", 184, 184, True
    )  # 2 + 2 * 6 + 21 * 8 + 2
    shallow = search.best_fit(replace(VARIANTS["b0"], depth=0.5))
    assert (shallow.source, shallow.fitting == shallow.total, shallow.identical) == ("b0", True, False)
    assert not search.best_fit(from_phi(-4)).identical


@pytest.mark.parametrize(
    ("fitting", "identical", "weights"),
    [(9, True, "imagenet"), (5, False, "imagenet:b1"), (9, False, "imagenet:b1"), (0, False, None)],
)
def test_the_written_config_loads_and_means_the_solution(
    tmp_path: Path, fitting: int, identical: bool, weights: str | None
) -> None:
    solution = Solution(0.02, from_phi(0.02), "latency")
    text = training_config(
        solution, WeightOverlap("b1", fitting, 9, identical), Path("my images: all"), batch_size=8, header="one\ntwo"
    )
    file = tmp_path / "my.yaml"
    file.write_text(text)
    config = load_config(file)
    assert config.model.weights == weights
    assert identical or [(stage.trainable, stage.freeze_batch_norm) for stage in config.train.stages] == [
        ("all", False)
    ]
    assert search.architecture(config.variant) == search.architecture(solution.variant)
    assert config.data.path == Path("my images: all")
    assert config.train.global_batch_size == 8
    assert text.startswith("# one\n# two\n# phi = 0.02:")
    assert yaml.safe_load(text)["model"].get("variant") == ("b1" if identical else {"phi": 0.02})
