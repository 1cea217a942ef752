"""The registry is the only place that names baselines: a new one is an entry and its trainer."""

import re
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest

from unirec.baselines.classic import markov
from unirec.baselines.registry import BASELINES, Baseline, fit_baseline, train_baseline
from unirec.data.schema import SetSpec
from unirec.encoders.catalogue import load
from unirec.experiments.variants import _training_code, code_key
from unirec.model.forms import MODELS
from unirec.pipeline.evaluate import evaluate
from unirec.pipeline.recommend import Recommender
from unirec.report.figures import colours
from unirec.report.tables import results_frame, results_markdown, results_table


def next_in_catalogue(train, reach=3):
    "Items close behind the user's last one in the catalogue's order."

    def scorer(histories, users):
        last = histories.items[histories.offsets[1:][users] - 1]
        distance = (np.arange(train.n_items) - last[:, None]) % train.n_items
        return np.where((distance > 0) & (distance <= reach), 1.0 / (1 + distance), 0.0)

    return scorer


def another_in_catalogue(train):
    "The same order for everybody."
    return lambda histories, users: np.tile(np.arange(train.n_items, dtype=float), (len(users), 1))


@pytest.fixture
def entry(monkeypatch):
    "A baseline of ten lines, in the registry."
    monkeypatch.setitem(
        BASELINES, "next_in_catalogue", Baseline(next_in_catalogue, label="what stands next in the catalogue")
    )
    return BASELINES["next_in_catalogue"]


@pytest.fixture
def project(toy_project, tmp_path):
    "A copy of the toy run that may be changed."
    folder, params = toy_project
    shutil.copytree(folder, tmp_path / "project")
    return tmp_path / "project", params


def data_of(root, params):
    "The toy's data."
    spec = SetSpec.from_params("toy", params["sets"]["toy"])
    return load(root / "prepared/toy", root / "embeddings/toy", spec)


def test_a_new_entry_is_trained_ranked_and_shown(entry, project):
    root, params = project
    params = params | {"baselines": params["baselines"] | {"next_in_catalogue": {"reach": 5}}}
    before = pd.read_csv(root / "results/toy/comparison.csv")
    data = data_of(root, params)
    evaluate(
        data,
        root / "prepared/toy",
        root / "models/toy",
        root / "data/toy",
        params,
        root / "results/toy",
        root / "predictions/toy",
    )
    after = pd.read_csv(root / "results/toy/comparison.csv")
    assert set(after.model) == {*before.model, "next_in_catalogue"}
    known = after[after.model != "next_in_catalogue"].reset_index(drop=True)
    pd.testing.assert_frame_equal(known, before)  # the others are as they were
    table = results_table(root / "results")
    assert "next_in_catalogue" in results_markdown(table).replace("\\_", "_")
    notes = {cell.text: cell.small for cell in results_frame(table).iloc[:, 0]}
    assert notes["next_in_catalogue"] == "what stands next in the catalogue"
    palette = colours([*MODELS, *BASELINES])
    assert len(set(palette.values())) == len(MODELS) + len(BASELINES)
    for file in ("breakdowns", "lists", "ties"):
        assert "next_in_catalogue" in set(pd.read_csv(root / f"results/toy/{file}.csv").model)
    assert "next_in_catalogue" in set(pd.read_parquet(root / "predictions/toy/ranks.parquet").model)
    # it recommends by the same entry
    recommender = Recommender.load("toy", "next_in_catalogue", root, params)
    user = str(pd.read_parquet(root / "prepared/toy/users.parquet").user_id[0])
    assert len(recommender.user(user, top=3)) == 3


def test_a_new_entry_is_trained_for_the_comparison(entry, project):
    root, params = project
    data = data_of(root, params)
    trained = train_baseline("next_in_catalogue", data, {"reach": 5})
    assert 0 < trained.valid_mrr <= 1 and trained.epochs == 0
    assert not entry.drawn and entry.parts == [] and "def next_in_catalogue" in entry.outside


def test_a_trainer_gets_what_its_parameters_name(project, monkeypatch):
    root, params = project
    data = data_of(root, params)
    given = {}

    def trainer(train, targets, seed, titles, weight=1.0):
        given.update(train=train, targets=targets, seed=seed, titles=titles, weight=weight)
        return lambda histories, users: np.zeros((len(users), train.n_items))

    first_titles = Baseline(trainer, reads={"titles": lambda data: data.items.title.tolist()[:2]})
    monkeypatch.setitem(BASELINES, "noted", first_titles)
    fit_baseline("noted", data, {"weight": 2.0}, seed=7)
    assert given["train"] is data.train and (given["targets"] == data.valid_targets).all()
    assert (given["seed"], given["weight"]) == (7, 2.0) and len(given["titles"]) == 2
    assert BASELINES["noted"].drawn


@pytest.mark.parametrize("name", BASELINES)
def test_an_entry_knows_its_code(name):
    baseline = BASELINES[name]
    assert baseline.parts and not baseline.outside
    assert len(code_key(*baseline.parts, stop=["data.sources"])) == 16


def test_an_entry_knows_its_code_behind_a_partial():
    assert Baseline(partial(markov, lags=1)).parts == ["baselines.classic.markov"]


def test_an_entry_outside_the_package_has_a_key_of_its_own(entry, monkeypatch):
    "Two baselines that are defined elsewhere do not share their recorded runs."
    monkeypatch.setitem(BASELINES, "another", Baseline(another_in_catalogue))
    keys = {_training_code(name) for name in ("next_in_catalogue", "another")}
    assert len(keys) == 2


def test_no_other_module_names_a_baseline(root):
    "The stages, the report and the experiments read the registry: no table of models beside it."
    names = {n for n in BASELINES if n not in ("released", "popularity")}
    for wing in ("pipeline", "report", "experiments"):
        for path in (root / "unirec" / wing).glob("*.py"):
            found = set(re.findall(r"[\"'](\w+)[\"']", path.read_text(encoding="utf8"))) & names
            # the settings of toy runs name baselines
            assert not found or path.name in ("study.py", "stages.py"), (path, found)
