"""Show how far a run is, in the kind of bar that the trainer shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info


class Progress:
    """Show bars and lines as `bar`, the trainer's progress bar callback, does: by rich, by tqdm, or in the log without a bar."""

    def __init__(self, bar: Any) -> None:
        self.kind = None if bar is None or bar.is_disabled else "rich" if "Rich" in type(bar).__name__ else "tqdm"

    @contextmanager
    def bar(self, description: str, total: int | None) -> Iterator[Callable[[], None]]:
        """Show a bar of `total` units (None: unknown); gives the function that advances it by one."""
        if self.kind == "rich":
            from rich.progress import Progress as Bar

            with Bar(transient=True) as shown:
                task = shown.add_task(description, total=total)
                yield lambda: shown.advance(task)
        elif self.kind == "tqdm":
            from tqdm.auto import tqdm

            with tqdm(desc=description, total=total, leave=False, dynamic_ncols=True) as shown:
                yield lambda: shown.update() and None
        else:
            yield lambda: None

    def track(self, items: Iterable[Any], description: str) -> Iterator[Any]:
        with self.bar(description, len(items) if isinstance(items, Sized) else None) as advance:
            for item in items:
                yield item
                advance()

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.kind == "tqdm":
            from tqdm.auto import tqdm

            tqdm.write(text)
        elif self.kind == "rich":
            print(text)  # rich redirects what is printed to above the bar
        else:
            rank_zero_info(text)
