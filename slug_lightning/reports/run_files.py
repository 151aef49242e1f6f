"""The files of a run: their names, a fresh folder for them, and the edits of an earlier run."""

from __future__ import annotations

from pathlib import Path

from slug_lightning.errors import UnlearnError
from slug_lightning.patches.patch import UnlearnPatch
from slug_lightning.reports.several import report_from_json
from slug_lightning.reports.single import UnlearnReport
from slug_lightning.utils.names import file_name

REPORT, PATCH, CHECKPOINT, WEIGHTS = "report.json", "patch.safetensors", "unlearned.ckpt", "weights.safetensors"
FIGURES, PATCHES, MODEL = "figures", "patches", "model"


def earlier_edits(folder: str | Path) -> dict[str, tuple[UnlearnReport, UnlearnPatch]]:
    """Return report and patch of each concept that the run in `folder` has forgotten."""
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
    """Return where a run over several concepts stores the patch of one."""
    return folder / PATCHES / f"{file_name(concept)}.safetensors"


def fresh_folder(path: str | Path, *more: str) -> Path:
    """Return `path`, or the first of `path-2`, `path-3`, … that holds no run; `more` are further files that mark a run."""
    path = Path(path)
    if path.name in ("", ".."):
        path = path.resolve()  # "." and ".." have no name to number
    number, free = 1, path
    while any((free / name).exists() for name in (REPORT, PATCH, CHECKPOINT, WEIGHTS, MODEL, *more)):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
