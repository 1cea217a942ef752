"""The comparison runner on the toy: done once, keyed by what a run depends on, safe for several processes, tuned without the test split."""

import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from unirec.baselines import registry as opponents
from unirec.evaluation.significance import compare_models
from unirec.experiments import comparison, runs, tuning
from unirec.experiments.fingerprint import sources
from unirec.model import recommender
from unirec.pipeline import stages
from unirec.training import loop


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, dict]:
    "A toy whose runs are not done."
    root = tmp_path_factory.mktemp("prepared")
    return root, runs.toy_comparison(root)


@pytest.fixture
def project(prepared, tmp_path) -> tuple[Path, dict]:
    "A copy of it, to write in."
    root, params = prepared
    for folder in ("data", "prepared", "embeddings"):
        shutil.copytree(root / folder, tmp_path / folder)
    params = json.loads(json.dumps(params))
    params["compare"]["models"] = ["popularity", "markov", "sasrec"]
    write(tmp_path, params)
    return tmp_path, params


def write(root: Path, params: dict) -> None:
    "The params.yaml of a project."
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def counted(monkeypatch) -> list[str]:
    "Names of the models that are trained from now on."
    names, real = [], opponents.train_baseline
    monkeypatch.setattr(
        comparison, "train_baseline", lambda name, *args: names.append(name) or real(name, *args)
    )
    return names


def test_a_run_is_done_once(project, monkeypatch):
    root, params = project
    trained = counted(monkeypatch)
    comparison.compare(root)
    assert sorted(trained) == sorted(["popularity", "markov", "sasrec", "sasrec"] * 2)
    before = [(root / "results/toy" / f).read_bytes() for f in ("runs.csv", "ranks.parquet")]
    trained.clear()
    comparison.compare(root)
    assert not trained and before == [
        (root / "results/toy" / f).read_bytes() for f in ("runs.csv", "ranks.parquet")
    ]


def test_a_killed_run_is_done_again(project, monkeypatch):
    root, _ = project
    comparison.compare(root, protocol="leave_one_out", models=["markov"])
    kept = comparison.read_ranks(root, "toy")
    (root / "results/toy/runs.csv").unlink()  # killed between the ranks and the row
    trained = counted(monkeypatch)
    comparison.compare(root, protocol="leave_one_out", models=["markov"])
    assert trained == ["markov"]
    pd.testing.assert_frame_equal(comparison.read_ranks(root, "toy"), kept)


@pytest.mark.parametrize(
    "name, value, again",
    [
        ("baselines.sasrec.model.width", 8, ["sasrec", "sasrec"]),
        ("compare.settings.toy.markov.lags", 3, ["markov"]),
        ("pretrain.fit.lr", 1.0, []),
        ("report", {"audience": "public"}, []),
        ("compare.seeds", [0, 1, 2], ["sasrec"]),
    ],
)
def test_a_change_of_parameters_runs_what_it_changes(project, monkeypatch, name, value, again):
    root, params = project
    comparison.compare(root, protocol="leave_one_out")
    at, (*path, last) = params, name.split(".")
    for part in path:
        at = at[part]
    at[last] = value
    write(root, params)
    trained = counted(monkeypatch)
    comparison.compare(root, protocol="leave_one_out")
    assert trained == again


@pytest.mark.parametrize(
    "part, again",
    [
        ("train", ["popularity", "markov", "sasrec", "sasrec"]),
        ("test", ["popularity", "markov", "sasrec", "sasrec"]),
    ],
)
def test_a_change_of_events_runs_all(project, monkeypatch, part, again):
    root, params = project
    comparison.compare(root, protocol="leave_one_out")
    path = root / "prepared/toy" / f"{part}.parquet"
    frame = pd.read_parquet(path)
    taken = pd.concat(
        [pd.read_parquet(root / "prepared/toy" / f"{p}.parquet") for p in ("train", "valid", "test")]
    )
    free = next(i for i in range(int(taken.item.max()) + 1) if i not in set(taken[taken.user == 0].item))
    frame.loc[frame.index[frame.user == 0][0], "item"] = free
    frame.to_parquet(path)
    if part == "test":
        candidates = np.load(root / "prepared/toy/candidates.npy")
        candidates[0] = (
            [free, *[c for c in candidates[0] if c != free][1:]][: candidates.shape[1]]
            if free not in candidates[0]
            else np.roll(candidates[0], -list(candidates[0]).index(free))
        )
        np.save(root / "prepared/toy/candidates.npy", candidates)
    trained = counted(monkeypatch)
    comparison.compare(root, protocol="leave_one_out")
    assert trained == again


def test_vectors_matter_to_those_who_read_them(project, monkeypatch):
    root, params = project
    params["compare"]["models"] = ["markov", "mean_vectors"]
    write(root, params)
    comparison.compare(root, protocol="leave_one_out")
    path = root / "embeddings/toy/manifest.json"
    (path.parent / "checksums.json").unlink()  # the manifest is changed by hand
    manifest = json.loads(path.read_text())
    manifest["encoders"]["text"]["dtype"] = "another processor's"
    path.write_text(json.dumps(manifest))
    trained = counted(monkeypatch)
    comparison.compare(root, protocol="leave_one_out")
    assert not trained
    manifest["encoders"]["text"]["encoder"] = "another model"
    path.write_text(json.dumps(manifest))
    comparison.compare(root, protocol="leave_one_out")
    assert trained == ["mean_vectors"]


def test_code_is_that_of_the_model():
    "Each model has its own code, and none but UniRec has the recommender's."
    code = {name: set(sources(b.parts, stop=["data.datasets"])) for name, b in opponents.BASELINES.items()}
    assert (
        len(
            {
                runs.model_code(n)
                for n in (
                    "popularity",
                    "markov",
                    "itemknn",
                    "mean_vectors",
                    "bpr",
                    "gru4rec",
                    "sasrec",
                    "text_llm",
                    "released",
                )
            }
        )
        == 9
    )
    assert "training.fit" in code["sasrec"] and "training.fit" not in code["markov"]
    assert not any(
        k.startswith(("recommender.UniRec", "hierarchy.", "task.train")) for n in code for k in code[n]
    )
    ours = set(sources(["pipeline.stages.pretrain", "pipeline.stages.finetune"], stop=["data.datasets"]))
    assert {
        "recommender.UniRec",
        "hierarchy.UserEncoder",
        "objectives.info_nce",
        "training.fit",
        "qformer.QFormer",
        "llm.load_llm",
    } <= ours
    assert not any(k.startswith(("sequential.", "baselines.", "significance.", "datasets.")) for k in ours)


def _record(root: str, number: int) -> None:
    "Keep ten made-up runs (in a process of its own)."
    for i in range(10):
        name = f"{number}-{i}"
        comparison.record(
            Path(root),
            {
                "run": name,
                "dataset": "made_up",
                "model": "m",
                "seed": i,
                "protocol": "leave_one_out",
                "valid_mrr": 0.5,
            },
            pd.DataFrame({"user": [0, 1], "position": 1, "full": [1.0 + number, 2.5]}),
        )


def test_several_processes_record_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_record, args=(str(tmp_path), n)) for n in range(3)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
        assert w.exitcode == 0
    names = {f"{n}-{i}" for n in range(3) for i in range(10)}
    rows, ranks = comparison.read_runs(tmp_path, "made_up"), comparison.read_ranks(tmp_path, "made_up")
    assert len(rows) == 30 and set(rows.run) == names
    assert len(ranks) == 60 and set(ranks.run) == names
    assert all(
        (part.full == [1.0 + int(run.partition("-")[0]), 2.5]).all() for run, part in ranks.groupby("run")
    )


def test_what_another_process_is_at_is_passed_by(project, monkeypatch):
    root, params = project
    found = comparison.load_for(root, params, "toy", "leave_one_out")
    key = comparison.run_key(
        params,
        "markov",
        "toy",
        0,
        "leave_one_out",
        comparison.run_code("markov", "leave_one_out"),
        found.keys[False],
    )
    trained = counted(monkeypatch)
    with runs.lock(root, f"run-{key}"):
        with_other = comparison.compare(root, protocol="leave_one_out", models=["popularity", "markov"])
    assert with_other == 1 and trained == ["popularity"]
    assert comparison.compare(
        root, protocol="leave_one_out", models=["popularity", "markov"]
    ) == 0 and trained == ["popularity", "markov"]


def test_tuning_has_no_way_to_the_test_split(project):
    root, _ = project
    whole = tuning.tune(root)
    (root / "results/tuning.csv").unlink()
    for name in ("test.parquet", "candidates.npy", "users.parquet"):
        (root / "prepared/toy" / name).unlink()
    again = tuning.tune(root)
    pd.testing.assert_frame_equal(
        whole.drop(columns=["seconds", "allowed"]), again.drop(columns=["seconds", "allowed"])
    )
    assert not {"load_test", "read_runs", "evaluate"} & set(vars(tuning))


def test_the_budget_is_a_sum(project, monkeypatch):
    root, params = project
    params["tune"]["grids"] = {"markov": [{}, {"lags": 2}, {"lags": 3}]}
    params["tune"]["minutes"] = 1
    write(root, params)
    real = opponents.train_baseline

    def slow(*args):
        found = real(*args)
        found.seconds = 40.0
        return found

    monkeypatch.setattr(tuning, "train_baseline", slow)
    rows = tuning.tune(root)
    assert rows.stopped.tolist() == ["counted", "counted", "not run"]
    assert rows.allowed.tolist() == [60.0, 20.0, -20.0] and rows.valid_mrr.isna().tolist() == [
        False,
        False,
        True,
    ]
    assert list(tuning.chosen(rows)["toy"]) == ["markov"]
    monkeypatch.setattr(tuning, "train_baseline", lambda *args: pytest.fail("done twice"))
    pd.testing.assert_frame_equal(tuning.tune(root), rows)


def made_up(
    rng, mrr: dict[str, float], seeds: int = 3, users: int = 200
) -> tuple[pd.DataFrame, pd.DataFrame]:
    "Rows and ranks of models that hit the first place with these chances, else the hundredth."
    rows, tables = [], []
    for model, chance in mrr.items():
        for seed in range(1 if model == "markov" else seeds):
            full = np.where(rng.random(users) < chance, 1.0, 100.0)
            run = f"{model}-{seed}"
            rows.append(
                {
                    "run": run,
                    "model": model,
                    "seed": seed,
                    "protocol": "leave_one_out",
                    "valid_mrr": 0.5 if model == "markov" else 0.1,
                    "full_mrr": (1 / full).mean(),
                    "seconds": 1.0,
                    "parameters": 0,
                }
            )
            tables.append(
                pd.DataFrame(
                    {
                        "run": run,
                        "model": model,
                        "seed": seed,
                        "user": range(users),
                        "full": full,
                        "full_shuffled": full,
                        "sampled100": full,
                    }
                )
            )
    return pd.DataFrame(rows), pd.concat(tables, ignore_index=True)


def test_summary_names_both_references():
    rows, ranks = made_up(np.random.default_rng(0), {"unirec": 0.8, "sasrec": 0.5, "markov": 0.2})
    table = comparison.versus(rows, ranks)
    assert set(zip(table.best_by, table.reference)) == {("valid", "markov"), ("test", "sasrec")}
    assert set(table.ranks) == {"full", "full_shuffled", "sampled100"}
    own = table[(table.ranks == "full") & (table.best_by == "test")].set_index("model")
    assert own.verdict.to_dict() == {"unirec": "better", "sasrec": "reference", "markov": "worse"}
    assert own.seeds.to_dict() == {"unirec": 3, "sasrec": 3, "markov": 1}
    expected = compare_models(ranks, "sasrec").set_index("model").difference
    np.testing.assert_allclose(own.difference, expected[own.index])
    np.testing.assert_allclose(own.mrr, rows.groupby("model").full_mrr.mean()[own.index])


def test_only_whole_seeds_are_compared():
    rows, _ = made_up(np.random.default_rng(0), {"unirec": 0.8, "sasrec": 0.5, "markov": 0.2})
    part = comparison.whole_seeds(rows[rows.run != "unirec-1"], ["unirec", "sasrec"])
    assert sorted(part.run) == ["markov-0", "sasrec-0", "sasrec-2", "unirec-0", "unirec-2"]


def test_rows_of_other_settings_are_left_out_and_counted(project, capsys):
    root, params = project
    comparison.compare(root, protocol="leave_one_out")
    params["compare"]["settings"]["toy"]["markov"]["lags"] = 3
    write(root, params)
    table = comparison.summary(root)
    assert "3 of 8 runs, 1 rows of other settings" in capsys.readouterr().out
    assert set(table.model) == {"popularity", "sasrec"}
    comparison.compare(root, protocol="leave_one_out")
    assert set(comparison.summary(root).model) == {"popularity", "sasrec", "markov"}
    assert "4 of 8 runs, 1 rows of other settings" in capsys.readouterr().out


def test_committed_rows_are_used_where_the_data_is_missing(project, capsys):
    root, params = project
    comparison.compare(root, protocol="leave_one_out")
    whole = comparison.summary(root)
    params["sets"]["toy"]["source"] = "extra:toy"
    params["data"] = {"extra_root": None}
    write(root, params)
    for folder in ("prepared", "embeddings", "data"):
        shutil.rmtree(root / folder)
    again = comparison.summary(root)
    assert "toy is left out: extra:toy" in capsys.readouterr().out
    pd.testing.assert_frame_equal(again, whole)


def test_pictures_that_are_gone_are_an_error_and_not_left_out(project):
    root, params = project
    params["sets"]["toy"]["schema"]["picture"] = stages.toy_params()["sets"]["toy"]["schema"]["picture"]
    shutil.rmtree(root / "data")
    with pytest.raises(
        FileNotFoundError,
        match="toy: its raw files, and so its pictures, are neither .*dvc repro download@toy",
    ):
        comparison.load_for(root, params, "toy", "last5")


def test_last5_gives_every_user_the_same_weight(project):
    root, params = project
    comparison.compare(root, protocol="last5", models=["markov"])
    row, ranks = comparison.read_runs(root, "toy").iloc[0], comparison.read_ranks(root, "toy")
    per_user = (1 / ranks.full).groupby(ranks.user).mean()
    assert ranks.position.max() == 5 and len(per_user) == 60
    assert row.full_mrr == pytest.approx(per_user.mean(), abs=1e-6)


@pytest.mark.slow
def test_every_model_runs(project):
    "One run of everybody, with LLMs of one layer."
    root, params = project
    params["compare"] |= {
        "models": [*opponents.BASELINES, "unirec", "unirec_id"],
        "seeds": [0],
        "protocols": ["leave_one_out"],
        "unirec": {"toy": {"pretrain.fit.epochs": 1, "llm.layers": 1}},
        "baselines": (
            {n: {"model": {"llm": {"layers": 1}}, "fit": {"epochs": 1}} for n in ("text_llm", "released")}
            | {
                n: {"model": {"width": 8, "steps": 2}, "fit": {"epochs": 1}}
                for n in ("bpr", "gru4rec", "sasrec", "sasrec_vectors", "sasrec_both")
            }
        ),
    }
    write(root, params)
    comparison.compare(root)
    rows = comparison.read_runs(root, "toy").set_index("model")
    assert (
        set(rows.index) == {*opponents.BASELINES, "unirec", "unirec_id"} and rows.full_mrr.between(0, 1).all()
    )
    assert (
        rows.loc[["unirec", "unirec_id"], ["full_stage1_mrr", "full_without_llm_mrr", "llm_norm_share"]]
        .notna()
        .all(axis=None)
    )


def test_params_have_the_best_trials(root):
    "What params.yaml says is what tuning found."
    params, trials = (
        yaml.safe_load((root / "params.yaml").read_text()),
        tuning.read_trials(root / "results" / "tuning.csv"),
    )
    best = {
        d: {m: s for m, s in models.items() if m in opponents.BASELINES}
        for d, models in tuning.chosen(trials).items()
    }
    assert params["compare"]["settings"] == best
    for (dataset, model), part in trials.groupby(["dataset", "model"]):
        assert len(part) <= params["tune"]["trials"]
        assert part.settings.map(json.loads).tolist() == [
            dict(s or {}) for s in params["tune"]["grids"][model]
        ], (dataset, model)


def test_every_model_can_be_run(root):
    "The blocks of params.yaml name what there is."
    params = yaml.safe_load((root / "params.yaml").read_text())
    c = params["compare"]
    known = {*opponents.BASELINES, *recommender.MODELS}
    assert (
        set(c["models"]) <= known
        and set(params["tune"]["grids"]) <= known
        and set(c["baselines"] or {}) <= known
    )
    assert set(c["datasets"]) <= set(params["sets"]) and set(c["carried"].values()) <= set(
        params["tune"]["datasets"]
    )
    for dataset in c["datasets"]:
        for model in c["models"]:
            own = runs.settings_of(params, model, dataset)
            config = opponents.BASELINES[model].config if model in opponents.BASELINES else None
            if config:
                config(**own.get("model", {}))
                loop.FitConfig(**own.get("fit", {}))
    for model in params["tune"]["grids"]:
        tuning.trials_of(params, model)
