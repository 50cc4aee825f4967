"""Transfer of a classifier to other classes: its rows (kernel column and bias) are matched by the class names.

A new class takes the row of an old one that the class map names for it, that has its name, or, of ImageNet's classes,
its synset. Several old classes are merged into one. Without a class map, rows are taken only if every class has one;
beside a class map, a class that nothing matches starts below the others.

Partly matched, without a class map. The whole classifier is new, as if no class matched. Taken rows answer with logits
some nats apart, tuned for other rivals, and training needs epochs to bring the new ones level. Measured with lite0 at
224 px, the head alone as `recipe: auto` trains it, five seeds, accuracy on the images outside train after the first and
the last epoch, a new classifier against taken rows beside lower new ones: daisy among four flowers 62.9 and 100 against
25.0 and 99.6 %, ant beside bees 92.7 and 94.2 against 45.8 and 92.9 %, daisy among 17 flowers 84.3 and 92.4 against
70.2 and 91.9 %. Where all classes match, taken rows lead to the end: ant and bee 97.4 and 96.3 %.

Starts from the features of the training images were measured, too, and left out for their code. Ridge regression leads
a new classifier by 2 to 37 points after the first epoch and by 3 to 4 after the 3 or 4 epochs that digits and 17
flowers get; class means (arXiv 1712.07136) by 1 to 2 there. After fine-tuning five paired seeds show no lead beyond
chance: ridge -0.1 +- 0.3 points on digits, 1.0 +- 1.2 on the 17 flowers at 64 px (standard deviation over the seeds),
and where the head alone is trained, 0.0 +- 0.5 on ant and bees and none on four flowers. Class means beside taken rows
end 1.4 +- 1.3 points behind on ant and bees.

With z_k(x) the logit of old class k on input x:

Merged, of n old classes. The probability of "one of them" belongs to the logit log(sum_k exp(z_k)), which is no linear
function of the features (`SingleLabel.merge_logits` computes it). The row is the mean of the n rows, its bias raised by
log(n): by Jensen's inequality a bound from below, exact where the n logits are equal. It falls short where one of them
stands out.
Measured with lite0, no training, on a photo of every tenth ImageNet class: of 100 photos, log-sum-exp of the 1000
logits in 11 groups of 11 to 527 gets all right, the merged rows 57; of the 100 classes' logits in 13 groups of 2 to 21,
all and 86 (41 and 77 without the log(n)); beside unmerged classes, the 118 dogs as one class get 10 of 11 dogs and the
59 birds 7 of 7. So merge what looks alike, or train afterwards.

New, beside a class map. The row is the mean of all taken rows, its bias lowered by `MARGIN`. Softmax does not change
when one vector is added to every row: zeros in a row mean nothing by themselves, and the mean is what "no opinion"
looks like. And a mean never exceeds the highest: whatever the activations, on every input another class wins by at
least the margin, and, by Jensen again, a new class has a probability of at most exp(-MARGIN) / K beside K taken ones. A
constant logit (zeros with a low bias) has no such bound: it overtakes the others on inputs that they all answer with
low logits. Equal rows part at the first step, since each new class has samples of its own.

A kept class has the old row bit for bit. Its logit may differ in the last bits all the same: the order in which a
processor sums a matrix product depends on the number of columns. Measured with lite0's 1000 classes and 100 photos in
batches of 1 to 64 (x86 with AVX2), beside 5, 10, 17, 1001 and 1100 classes: by up to 1e-6, one image alone not at all;
with oneDNN on by up to 1e-5, one image alone included. With 999 classes no bit differed. Nor did one with a classifier
in float64 whose logits are rounded, which is not worth twice the memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from pipeline.errors import WeightsError, suggest
from pipeline.tasks import Task

# Nats. With lite0's ImageNet head on 100 photos, the lowest of the 1000 logits lies up to 4.6 below their mean, of
# three drawn up to 5.7.
MARGIN = 6.0


@dataclass(frozen=True)
class ClassMapping:
    """Which old rows make up the row of each new class.

    Attributes:
        rows: For each new class in order, the indices of its old classes: none for a new one, several for a merged one.
        kept: New class -> the old class whose row it takes.
        merged: New class -> the old classes whose rows it merges.
        new: Classes that start fresh.
        ambiguous: Those of the new ones whose name several old classes have -> how to tell these apart.
        dropped: Number of old classes that nothing was taken from.
    """

    rows: tuple[tuple[int, ...], ...]
    kept: Mapping[str, str]
    merged: Mapping[str, tuple[str, ...]]
    new: tuple[str, ...]
    ambiguous: Mapping[str, tuple[str, ...]]
    dropped: int

    def __str__(self) -> str:
        """Return the counts for the screen."""
        counts = {"kept": len(self.kept), "merged": len(self.merged), "new": len(self.new)}
        text = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return text + (f" ({len(self.ambiguous)} by an ambiguous name)" if self.ambiguous else "")

    def details(self) -> list[str]:
        """List a line for each class that was matched or is new, and the number of old ones left behind."""
        lines = [f"kept: {new}" + (f": from {old}" if old != new else "") for new, old in self.kept.items()]
        lines += [f"merged: {new}: from {', '.join(old)}" for new, old in self.merged.items()]
        lines += [f"new: {line}" for line in self.unmatched()]
        return [*lines, f"dropped: {self.dropped} of the source's classes"] if self.dropped else lines

    def unmatched(self) -> list[str]:
        """List the classes that nothing matches, each with the meanings of an ambiguous name."""
        return [
            name + (f": the name is ambiguous; it may mean {' or '.join(meanings)}" if meanings else "")
            for name, meanings in ((name, self.ambiguous.get(name)) for name in self.new)
        ]


def read_class_map(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a class map from YAML.

    Its keys are new class names, each with an old class name or a list of those to be merged.

    Names are taken as they are written: `no`, `7` and `1e3` are names, too.

    Args:
        path: The file.

    Returns:
        New class name -> old class names, one or more.

    Raises:
        WeightsError: The file cannot be read, is not such a YAML, or names a class twice.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise WeightsError(f"class map {path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise WeightsError(f"{path}{line}: is not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not (isinstance(root, yaml.MappingNode) and root.value):
        raise WeightsError(
            f"{path}: must hold lines such as new class: old class, or new class: [old class, old class]"
        )
    class_map: dict[str, tuple[str, ...]] = {}
    for key, value in root.value:
        location = f"{path}:{key.start_mark.line + 1}: {key.value}"
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not (
            isinstance(key, yaml.ScalarNode)
            and items
            and all(isinstance(item, yaml.ScalarNode) and item.value for item in items)
        ):
            raise WeightsError(f"{location}: must have the name of an old class, or a list of such names")
        names = tuple(str(item.value) for item in items)
        if key.value in class_map:
            raise WeightsError(f"{location}: is given twice; list the old classes that it merges in one line")
        if len(set(names)) < len(names):
            raise WeightsError(f"{location}: names an old class twice")
        class_map[str(key.value)] = names
    return class_map


def match_classes(
    class_names: Sequence[str], old: Sequence[Sequence[str]], class_map: Path | None = None
) -> ClassMapping:
    """Find the old classes of each new one: by the class map where it names the class, else by an equal name.

    Args:
        class_names: The new classes in the order of the outputs.
        old: What the old classes are called, in the order of the outputs; a list for each wording, such as synsets and
            readable names. A name of two old classes matches neither.
        class_map: A file that names old classes for new ones, see `read_class_map`.

    Returns:
        The match.

    Raises:
        WeightsError: The class map cannot be read, names a new or an old class that there is not, an old class by an
            ambiguous name, or one twice.
    """
    mapping = {} if class_map is None else read_class_map(class_map)
    indices: dict[str, list[int]] = {}
    for names in old:
        for index, name in enumerate(names):
            if index not in indices.setdefault(name, []):
                indices[name].append(index)

    def titles(index: int) -> str:
        return " ".join(dict.fromkeys(names[index] for names in old))

    for name in mapping:
        if name not in class_names:
            raise WeightsError(f"{class_map}: {name!r} is none of the data's classes{suggest(name, class_names)}")

    def look_up(new: str, name: str) -> int:
        matches = indices.get(name, [])
        if not matches:
            raise WeightsError(f"{class_map}: {new}: {name!r} is none of the source's classes{suggest(name, indices)}")
        if len(matches) > 1:
            raise WeightsError(
                f"{class_map}: {new}: {name!r} is ambiguous; write one of {', '.join(old[0][i] for i in matches)}"
            )
        return matches[0]

    rows: list[tuple[int, ...]] = []
    ambiguous: dict[str, tuple[str, ...]] = {}
    for name in class_names:
        if name in mapping:
            row = tuple(look_up(name, old_name) for old_name in mapping[name])
            if len(set(row)) < len(row):
                raise WeightsError(f"{class_map}: {name}: names an old class twice, in two wordings")
            rows.append(row)
        else:
            matches = indices.get(name, [])
            if len(matches) > 1:
                ambiguous[name] = tuple(titles(i) for i in matches)
            rows.append(tuple(matches) if len(matches) == 1 else ())
    taken = list(zip(class_names, rows, strict=True))
    return ClassMapping(
        rows=tuple(rows),
        kept={name: titles(row[0]) for name, row in taken if len(row) == 1},
        merged={name: tuple(map(titles, row)) for name, row in taken if len(row) > 1},
        new=tuple(name for name, row in taken if not row),
        ambiguous=ambiguous,
        dropped=len(old[0]) - len({index for row in rows for index in row}),
    )


def transfer_head(
    kernel: np.ndarray, bias: np.ndarray, rows: Sequence[Sequence[int]], task: Task
) -> tuple[np.ndarray, np.ndarray]:
    """Make the new classifier from the old one by the rules of this module.

    Args:
        kernel: Of the old classifier, float32 (C, K_old).
        bias: Of the old classifier, float32 (K_old,).
        rows: For each of the K new classes the indices of its old ones, as in `ClassMapping`; at least one class must
            have any.
        task: How several classes are merged into one.

    Returns:
        Kernel, float32 (C, K), and bias, float32 (K,). Kept classes have exactly the old values.
    """
    new_kernel = np.empty((len(kernel), len(rows)), np.float32)
    new_bias = np.empty(len(rows), np.float32)
    for i, row in enumerate(rows):
        if len(row) == 1:
            new_kernel[:, i], new_bias[i] = kernel[:, row[0]], bias[row[0]]
        elif row:
            new_kernel[:, i], new_bias[i] = task.merge_rows(kernel[:, list(row)], bias[list(row)])
    taken = [i for i, row in enumerate(rows) if row]
    fresh = [i for i, row in enumerate(rows) if not row]
    new_kernel[:, fresh] = new_kernel[:, taken].mean(axis=1, dtype=np.float64, keepdims=True)
    new_bias[fresh] = new_bias[taken].mean(dtype=np.float64) - MARGIN
    return new_kernel, new_bias
