"""What the loggers hold afterwards, read back from their own files."""

from __future__ import annotations

import csv
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from slug_lightning.reports.loggers import FRONT, STEP_SCALE, front_rows, front_table, publish
from slug_lightning.reports.single import UnlearnReport

pytestmark = [pytest.mark.figures, pytest.mark.uncovered]

TRIALS = [("a.weight", 0.4, 0.1, 0.5), ("a.weight", 0.1, 0.8, None), ("a.weight", 0.2, 0.3, 0.75), ("b.weight", 0.1, 0.25, 0.25)]


def a_report() -> UnlearnReport:
    def score(layer, importance, alignment, on_front):
        return {"layer": layer, "tower": "model", "importance": importance, "alignment": alignment, "on_front": on_front}

    return UnlearnReport(
        status="unlearned", concept="cats", layer="a.weight", tensors=["a.weight"], step_size=0.7, relative_step=0.2,
        bounds={
            "forget_metric": "acc", "forget_target": 0.375, "retain_tolerance": 0.25, "retain_metrics": ["acc"],
            "higher_is_better": {"acc": True},
        },
        scores=[score("a.weight", 2.0, 0.1, True), score("b.weight", 3.0, 0.4, True), score("c.weight", 1.0, 0.9, False)],
        trace=[
            {"layer": layer, "step": 1.0, "relative_step": step, "forget": forget, "retain": kept and {"acc": kept}}
            for layer, step, forget, kept in TRIALS
        ],
        before={"forget": {"acc": 0.875}, "retain": {"acc": 0.8125}}, after={"forget": {"acc": 0.3125}, "retain": {"acc": 0.75}},
        search_before={"forget": {"acc": 1.0}, "retain": {"acc": 0.875}},
        search_after={"forget": {"acc": 0.3}, "retain": {"acc": 0.75}},
        holds=True,
    )  # fmt: skip


def an_infeasible_report() -> UnlearnReport:
    report = a_report()
    return replace(
        report, status="infeasible", layer=None, step_size=None, relative_step=None, holds=None, after=report.before,
        search_after=report.search_before,
    )  # fmt: skip


SCALARS = {
    "search/forget/a.weight": [(1000, 0.8), (2000, 0.3), (4000, 0.1)],
    "search/retain_acc/a.weight": [(2000, 0.75), (4000, 0.5)],
    "search/forget/b.weight": [(1000, 0.25)],
    "search/retain_acc/b.weight": [(1000, 0.25)],
    "before/forget_acc": [(0, 0.875)],
    "before/retain_acc": [(0, 0.8125)],
    "after/forget_acc": [(0, 0.3125)],
    "after/retain_acc": [(0, 0.75)],
}


def published(report: UnlearnReport, folder) -> EventAccumulator:
    logger = TensorBoardLogger(folder, name="run", version=0)
    publish(report, [logger])
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return events.Reload()


def test_tensorboard_holds_every_scalar_over_the_relative_step(tmp_path):
    events = published(a_report(), tmp_path)
    found = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"] if not tag.startswith("hp")
    }
    assert found == {tag: [(step, pytest.approx(value)) for step, value in line] for tag, line in SCALARS.items()}
    assert STEP_SCALE == 10_000


@pytest.mark.parametrize("report", [a_report(), an_infeasible_report()], ids=["unlearned", "infeasible"])
def test_tensorboard_holds_both_figures(report, tmp_path):
    events = published(report, tmp_path)
    assert sorted(events.Tags()["images"]) == ["unlearn/pareto", "unlearn/trade_off"]
    for tag in events.Tags()["images"]:
        (image,) = events.Images(tag)
        assert image.width > 300 and image.height > 300
        assert image.encoded_image_string.startswith(b"\x89PNG")


def text(events: EventAccumulator, tag: str) -> str:
    (event,) = events.Tensors(f"{tag}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def test_tensorboard_holds_the_tables_as_text(tmp_path):
    events = published(a_report(), tmp_path)
    assert text(events, "unlearn/front") == front_table(front_rows(a_report()))
    assert text(events, "unlearn/report") == f"<pre>{a_report().to_text()}</pre>"


@pytest.mark.parametrize(("report", "layer", "step"), [(a_report(), "a.weight", 0.2), (an_infeasible_report(), "none", 0.0)])
def test_tensorboard_holds_hyperparameters_with_the_outcome(report, layer, step, tmp_path):
    events = published(report, tmp_path)
    tags = events.PluginTagToContent("hparams")
    assert set(tags) == {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"}
    data = plugin_data_pb2.HParamsPluginData.FromString(tags["_hparams_/session_start_info"]).session_start_info.hparams
    assert {name: getattr(value, value.WhichOneof("kind")) for name, value in data.items()} == {
        "concept": "cats", "status": report.status, "layer": layer, "relative_step": pytest.approx(step),
        "forget_target": 0.375, "retain_tolerance": 0.25,
    }  # fmt: skip
    outcome = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"] if tag.startswith("hp/")}
    assert outcome == {"hp/forget_acc": report.after["forget"]["acc"], "hp/retain_acc": report.after["retain"]["acc"]}


def test_csv_holds_every_scalar(tmp_path):
    logger = CSVLogger(tmp_path, name="run", version=0)
    publish(a_report(), [logger])
    found: dict[str, list] = {}
    with open(f"{logger.log_dir}/metrics.csv") as file:
        for line in csv.DictReader(file):
            for tag, value in line.items():
                if tag != "step" and value:
                    found.setdefault(tag, []).append((int(line["step"]), float(value)))
    assert found == SCALARS


def test_several_loggers_all_hear_of_it(tmp_path):
    loggers = [CSVLogger(tmp_path, name="csv", version=0), TensorBoardLogger(tmp_path, name="board", version=0)]
    publish(a_report(), loggers)
    assert (tmp_path / "csv/version_0/metrics.csv").is_file()
    assert list((tmp_path / "board/version_0").glob("events.out.tfevents.*"))


def test_no_loggers_are_fine():
    publish(a_report(), [])


class Minimal(Logger):
    """All that Lightning asks of a logger."""

    name, version = "minimal", 0

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, float] = {}

    def log_metrics(self, metrics, step=None):
        self.seen |= metrics

    def log_hyperparams(self, params, *args, **kwargs):
        raise NotImplementedError


def test_a_logger_without_an_experiment_gets_the_scalars():
    logger = Minimal()
    publish(a_report(), [logger])
    assert logger.seen.keys() == SCALARS.keys()


def test_the_front_table_lists_the_front_alone_most_important_first():
    assert front_table(front_rows(a_report())).splitlines()[2:] == [
        "| model | b.weight | 3 | 0.400 |  |",
        "| model | a.weight | 2 | 0.100 | yes |",
    ]
    assert "yes" not in front_table(front_rows(an_infeasible_report()))


# ---- loggers whose packages are not among those of the tests: the calls that they get


class Elsewhere(Logger):
    """Keeps what it is given, by the method that was called."""

    name, version, run_id = "p", "1", "run"

    def __init__(self, **experiment):
        self.calls = []
        self.numbers = {}
        self._experiment = SimpleNamespace(**{name: partial(self.called, name) for name in experiment})

    def called(self, name, *args, **kwargs):
        self.calls.append((name, args, kwargs))

    @property
    def experiment(self):
        return self._experiment

    def log_metrics(self, metrics, step=None):
        self.numbers |= metrics

    def log_hyperparams(self, *args, **kwargs):
        pass


class Wandb(Elsewhere):
    def log_image(self, key, images):
        self.called("log_image", key, images)

    def log_table(self, key, columns, data):
        self.called("log_table", key, columns, data)


def test_weights_and_biases_gets_figures_as_images_and_both_tables():
    logger = Wandb()
    publish(a_report(), [logger])
    figures = {args[0]: args[1] for name, args, _ in logger.calls if name == "log_image"}
    assert figures.keys() == {"unlearn/pareto", "unlearn/trade_off"}
    assert all(isinstance(one, Figure) for (one,) in figures.values())
    tables = {args[0]: args[1:] for name, args, _ in logger.calls if name == "log_table"}
    assert tables["unlearn/front"] == (FRONT, front_rows(a_report()))
    assert tables["unlearn/report"] == (["report"], [[a_report().to_text()]])
    assert logger.numbers["after/forget_acc"] == 0.3125


def test_mlflow_gets_files_of_its_run():
    logger = Elsewhere(log_figure=1, log_text=1, log_artifact=1)
    publish(a_report(), [logger])
    files = {args[2]: args[:2] for _, args, _ in logger.calls}
    assert files.keys() == {
        "unlearn/pareto.png", "unlearn/trade_off.png", "unlearn/front.md", "unlearn/report.txt",
    }  # fmt: skip
    assert {run for run, _ in files.values()} == {"run"}
    assert files["unlearn/front.md"][1] == front_table(front_rows(a_report()))


def test_comet_gets_figures_a_table_and_a_text():
    logger = Elsewhere(log_figure=1, log_text=1, log_table=1)
    publish(a_report(), [logger])
    names = [name for name, _, _ in logger.calls]
    assert names == ["log_figure", "log_figure", "log_table", "log_text"]
    assert logger.calls[2][2] == {"tabular_data": front_rows(a_report()), "headers": FRONT}


def test_a_logger_of_numbers_gets_numbers_alone():
    logger = Elsewhere()
    publish(a_report(), [logger])
    assert logger.calls == [] and logger.numbers["before/forget_acc"] == 0.875
