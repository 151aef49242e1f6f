"""The files of a run: their names, a folder that holds none yet, and what an earlier run has left."""

from __future__ import annotations

from pathlib import Path

from slug_lightning.errors import UnlearnError
from slug_lightning.patches.patch import UnlearnPatch
from slug_lightning.reports.several import report_from_json
from slug_lightning.reports.single import UnlearnReport
from slug_lightning.utils.names import file_name

REPORT, PATCH, CHECKPOINT, WEIGHTS, FIGURES, PATCHES, MODEL = (
    "report.json",
    "patch.safetensors",
    "unlearned.ckpt",
    "weights.safetensors",
    "figures",
    "patches",
    "model",
)


def earlier_edits(folder: str | Path) -> dict[str, tuple[UnlearnReport, UnlearnPatch]]:
    """What an earlier run has forgotten: report and patch by concept.

    Args:
        folder: of that run.

    Raises:
        FileNotFoundError: if it holds no report, or not the patch of a concept.
        UnlearnError: if the report is damaged.
    """
    folder = Path(folder)
    if not (folder / REPORT).is_file():
        raise FileNotFoundError(f"earlier: no {REPORT} in {folder}; name the folder of a run")
    try:
        report = report_from_json(folder / REPORT)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnlearnError(f"earlier: {folder / REPORT} is not the report of a run ({error!r})") from error
    if isinstance(report, UnlearnReport):
        return {report.concept: (report, UnlearnPatch.load(folder / PATCH))} if report.status == "unlearned" else {}
    return {name: (found, UnlearnPatch.load(patch_of(folder, name))) for name, found in report.unlearned.items()}


def patch_of(folder: Path, concept: str) -> Path:
    """Where a run over several concepts keeps the patch of one."""
    return folder / PATCHES / f"{file_name(concept)}.safetensors"


def fresh_folder(path: str | Path, *more: str) -> Path:
    """Give `path`, or `path-2`, `path-3`, ... where a run has been kept there already.

    Args:
        path: the folder asked for.
        more: names of further files that mark a folder as used.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> fresh_folder(root / "demo").name
        'demo'
        >>> (root / "demo").mkdir(), (root / "demo" / "report.json").touch()
        (None, None)
        >>> fresh_folder(root / "demo").name
        'demo-2'
    """
    path = Path(path)
    if path.name in ("", ".."):
        path = path.resolve()  # "." and ".." have no name to number
    number, free = 1, path
    while any((free / name).exists() for name in (REPORT, PATCH, CHECKPOINT, WEIGHTS, MODEL, *more)):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
