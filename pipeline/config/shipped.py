"""The configs that come with the project, by name: those of the checkout, or those that an installation brought."""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

CHECKOUT = Path(__file__).parents[2] / "configs"


def shipped_configs() -> dict[str, Path]:
    """Return the path of each shipped config by its name, such as lite0_folder; none if they are missing."""
    if (CHECKOUT.parent / "pyproject.toml").is_file():
        paths = sorted(CHECKOUT.glob("*.yaml"))
    else:
        try:
            installed = files("efficientnet-pipeline") or []
        except PackageNotFoundError:
            installed = []
        paths = sorted(
            Path(str(file.locate())).resolve()
            for file in installed
            if file.suffix == ".yaml" and file.parent.parts[-2:] == ("efficientnet-pipeline", "configs")
        )
    return {path.stem: path for path in paths}
