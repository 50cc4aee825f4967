"""Compound scaling as a search (arXiv 1905.11946, section 3.3).

A grid search finds alpha, beta and gamma; a bisection finds the largest phi within a budget.

Every figure is that of a network that was built, never of a formula; where no weight is looked at, it is built without
any.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import keras
import tensorflow as tf

from pipeline.console import ProgressFn
from pipeline.errors import UserError
from pipeline.models.efficientnet import CLASSIFIER, efficientnet
from pipeline.models.profile import estimated_memory, latency, profile_model
from pipeline.models.variants import (
    IMAGENET_VARIANTS,
    LARGEST_PHI,
    SMALLEST_PHI,
    VARIANTS,
    Variant,
    end_filters,
    from_multipliers,
    from_phi,
    stage_filters,
    stage_repeats,
)

STEPS_PER_PHI = 100  # phi is solved for to 0.01, which changes the multiply-adds by 0.7 %

T = TypeVar("T")


@dataclass(frozen=True)
class VariantProfile:
    """The size of a variant, counted on the network built from it.

    Attributes:
        blocks: MBConv blocks.
        parameters: Trainable ones; the moving statistics of batch normalization do not count, as in the paper.
        flops: Multiply-adds of one image.
        memory: Estimated bytes of a training step in float32, with two optimizer slots and a moving average.
    """

    blocks: int
    parameters: int
    flops: int
    memory: int


@dataclass(frozen=True)
class Candidate:
    """One triple of the grid search, at phi = 1.

    Attributes:
        alpha: Multiplier of the depth.
        beta: Multiplier of the width.
        gamma: Multiplier of the resolution.
        flops_ratio: Multiply-adds of the network so scaled, over B0's.
    """

    alpha: float
    beta: float
    gamma: float
    flops_ratio: float

    @property
    def product(self) -> float:
        """Alpha * beta^2 * gamma^2, which predicts the ratio but for the rounding."""
        return compound(self.alpha, self.beta, self.gamma)


@dataclass(frozen=True)
class Budget:
    """An upper bound on something that grows with phi.

    Attributes:
        name: For messages, such as `parameters`.
        limit: The most it may be.
        measure: Takes a variant to its figure, in the unit of the limit.
        show: Writes a figure with its unit.
    """

    name: str
    limit: float
    measure: Callable[[Variant], float]
    show: Callable[[float], str] = "{:g}".format


@dataclass(frozen=True)
class Solution:
    """The largest member of the compound line within all budgets.

    Attributes:
        phi: Compound coefficient, a multiple of 0.01.
        variant: What it scales to.
        binding: Name of the budget that the next larger phi exceeds; None at the end of the line.
    """

    phi: float
    variant: Variant
    binding: str | None


def without_values(variant: Variant, num_classes: int = 1000) -> keras.Model:
    """Build a network whose weights have shapes and no values, so that L2 takes no 2 GB.

    Clears Keras's global state: names count anew.
    """
    with keras.StatelessScope(initialize_variables=False):
        model = efficientnet(variant, num_classes=num_classes)
    keras.utils.clear_session(free_memory=False)  # or Keras goes on keeping them, to give them values later
    return model


def architecture(variant: Variant) -> tuple[str | int, ...]:
    """Return what identifies a variant after rounding: equal results are the same network, but for dropout."""
    return (
        variant.family_name,
        variant.resolution,
        *stage_repeats(variant),
        *stage_filters(variant),
        *end_filters(variant),
    )


def once_per_architecture(measure: Callable[[Variant], T]) -> Callable[[Variant], T]:
    """Wrap a measurement so that no network is measured twice."""
    known: dict[tuple[str | int, ...], T] = {}

    def measure_once(variant: Variant) -> T:
        key = architecture(variant)
        if key not in known:
            known[key] = measure(variant)
        return known[key]

    return measure_once


def profile_variant(variant: Variant, *, num_classes: int = 1000, batch_size: int = 32) -> VariantProfile:
    """Build a variant without values and count it; `batch_size` images per step matter to the memory alone."""
    model = without_values(variant, num_classes)
    counted = profile_model(model)
    memory = estimated_memory(model, batch_size)
    return VariantProfile(sum(stage_repeats(variant)), counted.trainable_parameters, counted.flops, memory)


def latency_of(variant: Variant, *, num_classes: int) -> float:
    """Measure the seconds that the network takes for one image.

    As a tf.function on TensorFlow's default device, the result's way back included.
    """
    model = efficientnet(variant, num_classes=num_classes)
    infer = tf.function(lambda images: model(images, training=False), reduce_retracing=True)
    images = tf.zeros((1, *model.input_shape[1:]))
    taken = latency(lambda: infer(images).numpy())
    keras.utils.clear_session(free_memory=False)
    return taken


def compound(alpha: float, beta: float, gamma: float) -> float:
    """Return alpha * beta^2 * gamma^2: the factor of the multiply-adds per unit of phi, before rounding."""
    return alpha * beta**2 * gamma**2


def grid(
    alphas: Iterable[float], betas: Iterable[float], gammas: Iterable[float], tolerance: float
) -> list[tuple[float, float, float]]:
    """List the triples whose alpha * beta^2 * gamma^2 is within `tolerance` of 2 (the paper's own gives 1.92)."""
    return [triple for triple in product(alphas, betas, gammas) if abs(compound(*triple) - 2) <= tolerance]


def flops_ratios(
    triples: Sequence[tuple[float, float, float]],
    flops: Callable[[Variant], float],
    progress: ProgressFn | None = None,
) -> list[Candidate]:
    """Measure the triples of a grid at phi = 1.

    Args:
        triples: alpha, beta, gamma each.
        flops: Takes a variant to its multiply-adds.
        progress: Called with the number done and the total.

    Returns:
        The candidates, that whose ratio to B0 is closest to 2 first.
    """
    base = flops(VARIANTS["b0"])
    candidates = []
    for done, (alpha, beta, gamma) in enumerate(triples, 1):
        ratio = flops(from_multipliers(beta, alpha, round(VARIANTS["b0"].resolution * gamma))) / base
        candidates.append(Candidate(alpha, beta, gamma, ratio))
        if progress is not None:
            progress(done, len(triples))
    return sorted(candidates, key=lambda candidate: (abs(candidate.flops_ratio - 2), abs(candidate.product - 2)))


def largest_within(budgets: Sequence[Budget]) -> Solution:
    """Solve for phi by bisection, one budget after the other, each only up to what those before it allow.

    Args:
        budgets: In the order of their cost, cheapest first. Each must not fall as phi grows; a latency does so up to
            its noise.

    Raises:
        UserError: Not even the smallest phi is within a budget.
    """
    first, end = SMALLEST_PHI * STEPS_PER_PHI, LARGEST_PHI * STEPS_PER_PHI
    top, binding = end, None
    for budget in budgets:

        def fits(step: int, budget: Budget = budget) -> bool:
            return budget.measure(from_phi(step / STEPS_PER_PHI)) <= budget.limit

        if not fits(first):
            smallest = from_phi(SMALLEST_PHI)
            raise UserError(
                f"{budget.name}: no network on the compound line is within {budget.show(budget.limit)}; the "
                f"smallest, phi = {SMALLEST_PHI} at {smallest.resolution} px, takes "
                f"{budget.show(budget.measure(smallest))}; allow at least that"
            )
        if top < end and fits(top):
            continue
        low, high = first, top + (top == end)  # low fits; high does not, or lies beyond the end
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        if low < top:
            top, binding = low, budget.name
    return Solution(top / STEPS_PER_PHI, from_phi(top / STEPS_PER_PHI), binding)


def nearest_published(variant: Variant) -> Variant:
    """Return the variant of B0 to B8 and L2 whose width, depth and resolution are nearest by ratio."""

    def distance(other: Variant) -> float:
        ratios = (variant.width / other.width, variant.depth / other.depth, variant.resolution / other.resolution)
        return sum(abs(math.log(ratio)) for ratio in ratios)

    return min((other for other in VARIANTS.values() if other.family_name == "efficientnet"), key=distance)


@dataclass(frozen=True)
class WeightOverlap:
    """How much of a network published weights would fill.

    Attributes:
        source: The published variant.
        fitting: Layers with weights, the classifier aside, that have equal names and shapes in both.
        total: Those of the network.
        identical: Whether neither has a layer that the other lacks: all of it fits, and nothing is left over.
    """

    source: str
    fitting: int
    total: int
    identical: bool


def best_fit(variant: Variant) -> WeightOverlap:
    """Return the published variant with weights available by name that fills most of a network."""

    def shapes(of: Variant) -> dict[str, list[tuple[int, ...]]]:
        layers = without_values(of).layers
        return {
            layer.name: [tuple(w.shape) for w in layer.weights]
            for layer in layers
            if layer.weights and layer.name != CLASSIFIER
        }

    wanted = shapes(variant)
    fits = []
    for name in IMAGENET_VARIANTS:
        if VARIANTS[name].family == variant.family:
            there = shapes(VARIANTS[name])
            fitting = sum(there.get(layer) == shape for layer, shape in wanted.items())
            fits.append(WeightOverlap(name, fitting, len(wanted), wanted == there))
    return max(fits, key=lambda fit: (fit.identical, fit.fitting))
