"""Forget a random 5 % of what a classifier was trained on, down to its accuracy on pictures never seen, for five draws.

    python benchmarks/random_samples.py

The classifier of scikit-learn's digits is that of `directions.py`, which takes another draw. `gap` is the accuracy on its
training set less that on pictures never seen; `forget` the accuracy on the 5 %, which shall fall to the latter; `test lost` what
the accuracy on the test half of the pictures never seen has lost; the search looks at the other half. All in per cent. `paper` is
the published procedure, `sparing` lets lines along the covariance and K-FAC compete, on all four layers.
"""

import argparse
import logging
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pandas
from families import accuracy, digit_parts, digits, trained
from passages import QUIET

from slug_lightning.callbacks import UnlearnCallback
from slug_lightning.methods import SLUG

RULES = {
    "paper": SLUG.paper(),
    "sparing": SLUG(direction=["covariance", "kfac"], curve="line", score="measured", choice="least_damage", step_margin=0.0),
}
TOLERANCE = 0.03
"""Of accuracy on the validation split."""


def run(draw: int, method: SLUG, folder: Path) -> dict[str, object]:
    """Forget one draw."""
    pl.seed_everything(0, verbose=False)
    request = digits(None, folder, draw)
    callback = UnlearnCallback(near_retain=None, method=method, retain_tolerance=TOLERANCE, **request.bounds)
    pl.Trainer(max_epochs=1, callbacks=[callback], **QUIET).fit(request.module, request.data)
    report = callback.report
    (before,), (after,) = report.before["forget"].values(), report.after["forget"].values()
    found = {"draw": draw, "status": report.status, "layer": report.layer, "forget before": 100 * before, "forget": 100 * after}
    return found | {"test lost": 100 * (report.before["retain"]["accuracy"] - report.after["retain"]["accuracy"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, nargs="+", default=[10, 11, 12, 13, 14], help="their seeds (default: 10 to 14)")
    parser.add_argument("--output", type=Path, default=Path("runs/random_samples"), help="folder (default: %(default)s)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    parts = digit_parts()
    model = trained(*parts["train"], options.output / "digits.safetensors")
    own, *unseen = (100 * accuracy(model, *parts[name]) for name in ("train", "val", "test"))
    print(
        f"training {own:.1f}, never seen {unseen[0]:.1f} (searched) and {unseen[1]:.1f} (test): gap {own - sum(unseen) / 2:.1f}"
    )
    lines = [{"rules": name, **run(draw, method, options.output)} for name, method in RULES.items() for draw in options.draws]
    table = pandas.DataFrame(lines)
    table.to_csv(options.output / "table.csv", index=False)
    print(table.to_markdown(index=False, floatfmt=".2f"))


if __name__ == "__main__":
    main()
