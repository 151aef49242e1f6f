"""Bring a report back from the processes that a launcher forks or spawns."""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any, Union

from slug_lightning.patches.patch import UnlearnPatch
from slug_lightning.reports.run_files import PATCH, REPORT, patch_of
from slug_lightning.reports.several import JointReport, report_from_json
from slug_lightning.reports.single import UnlearnReport
from slug_lightning.trainer.run_folder import save_patches
from slug_lightning.utils.files import atomic_write


class ReportTransfer:
    """A temporary folder whose name is chosen before the processes are started.

    With `ddp_spawn`, `ddp_fork` and `ddp_notebook`, Lightning gives the calling process the weights, but no callback's state.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.gettempdir()) / f"slug-lightning-{uuid.uuid4().hex}"

    def leave(self, report: Union[UnlearnReport, JointReport], strategy: Any) -> None:
        """Write a report, if a launcher has started this process."""
        launcher = getattr(strategy, "launcher", None)
        if not any(kind.__name__ == "_MultiProcessingLauncher" for kind in type(launcher).__mro__):
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(mode=0o700)
        save_patches(self.folder, report)
        with atomic_write(self.folder / REPORT) as part:
            part.write_text(json.dumps(report.to_dict()))  # not by `to_json`, which knows no infinity

    def fetch(self) -> Union[UnlearnReport, JointReport, None]:
        """Read and remove the report, if there is one."""
        if not (self.folder / REPORT).exists():
            return None
        report = report_from_json(self.folder / REPORT)
        if (self.folder / PATCH).exists():
            report.patch = UnlearnPatch.load(self.folder / PATCH)
            for name, single in report.unlearned.items() if isinstance(report, JointReport) else ():
                single.patch = UnlearnPatch.load(patch_of(self.folder, name))
        shutil.rmtree(self.folder)
        return report
