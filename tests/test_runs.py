"""Studies on the toy: runs done once and keyed by what they depend on, several processes, the tuning."""

import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from unirec.baselines.registry import BASELINES
from unirec.cli import main
from unirec.core.params import read_params, write_params
from unirec.experiments import record, runs, variants
from unirec.experiments.inputs import load_inputs, lock, toy_project
from unirec.experiments.record import read_ranks, read_runs, record_path, run_key
from unirec.experiments.runs import Selection, judge_study, recorded, run_study
from unirec.experiments.study import Study, toy_study
from unirec.experiments.variants import load_study, sources
from unirec.pipeline.stages import toy_params

ALONE = {"datasets": ["toy"], "sets": {}, "per_set": {}, "more_seeds": {}}
BASELINES_ONLY = toy_study(
    **ALONE, kind="comparison", models=["popularity", "markov", "sasrec"], variants={}, reference="",
    test_time={}, contrasts={}, protocols=["leave_one_out", "last5"], tuned=True,
)  # fmt: skip
TWO = toy_study(**ALONE | {"seeds": [0]}, models=[], base={"llm.adapt": "none"})
FIRST = Selection(protocols=["leave_one_out"])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    "A toy whose studies have not run."
    root = tmp_path_factory.mktemp("prepared")
    params = toy_project(root)
    write_params(root, params | {"baselines": {**params["baselines"]}})
    return root


@pytest.fixture
def project(prepared, tmp_path) -> Path:
    "A copy of it, to write in, with a comparison of baselines and a question."
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    write_study(tmp_path, "models", BASELINES_ONLY)
    write_study(tmp_path, "toy", TWO)
    tuned = {"baselines": {"sasrec": {"fit": {"patience": 3}}}, "settings": {"toy": {"markov": {"lags": 2}}}}
    (tmp_path / "experiments/tuned.yaml").write_text(yaml.safe_dump(tuned))
    return tmp_path


def write_study(root: Path, name: str, study: dict) -> None:
    "A study's file."
    (root / "experiments" / f"{name}.yaml").write_text(yaml.safe_dump(study, sort_keys=False))


def rows_of(root: Path, name: str) -> pd.DataFrame:
    "What is recorded of a study."
    return read_runs(root, load_study(root, name)[0])


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    "Names of the variants that are trained from now on."
    names, real = [], variants.train_variant
    monkeypatch.setattr(runs, "train_variant", lambda *args: names.append(args[4][3]) or real(*args))
    return names


def test_a_run_is_done_once(project, trained):
    assert run_study(project, "models") == (8, 0)
    assert sorted(trained) == sorted(["popularity", "markov", "sasrec", "sasrec"] * 2)
    folder = project / "results/comparison"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert run_study(project, "models") == (0, 0)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_run_goes_on(project, trained):
    run_study(project, "toy")
    assert trained == ["sum", "no_price"] and rows_of(project, "toy").variant.tolist() == [
        "sum",
        "half",
        "no_price",
    ]
    study = load_study(project, "toy")[0]
    ranks, rows = read_ranks(project, study), rows_of(project, "toy")
    path = record_path(project, study, "runs.csv")
    rows[rows.variant != "half"].to_csv(path, index=False)  # killed between its ranks and its row
    run_study(project, "toy")
    assert trained == ["sum", "no_price", "sum"] and set(rows_of(project, "toy").run) == set(rows.run)
    again = read_ranks(project, study)
    order = ["run", "user", "position"]
    pd.testing.assert_frame_equal(
        again.sort_values(order, ignore_index=True), ranks.sort_values(order, ignore_index=True)
    )


@pytest.mark.parametrize(
    "name, value, again",
    [
        ("params.baselines.sasrec.model.width", 8, ["sasrec", "sasrec"]),
        ("tuned.settings.toy.markov.lags", 3, ["markov"]),
        ("params.pretrain.fit.lr", 1.0, []),
        ("params.report", {"audience": "public"}, []),
        ("models.seeds", [0, 1, 2], ["sasrec"]),
        ("models.title", "another", []),
    ],
)
def test_a_change_runs_what_it_changes(project, trained, name, value, again):
    run_study(project, "models", FIRST)
    trained.clear()
    file, *parents, last = name.split(".")
    path = project / ("params.yaml" if file == "params" else f"experiments/{file}.yaml")
    content = place = yaml.safe_load(path.read_text())
    for part in parents:
        place = place[part]
    place[last] = value
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    run_study(project, "models", FIRST)
    assert trained == again


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_change_of_events_runs_all(project, trained, part):
    run_study(project, "models", FIRST)
    trained.clear()
    folder = project / "prepared/toy"
    frame = pd.read_parquet(folder / f"{part}.parquet")
    taken = pd.concat([pd.read_parquet(folder / f"{p}.parquet") for p in ("train", "valid", "test")])
    free = next(i for i in range(int(taken.item.max()) + 1) if i not in set(taken[taken.user == 0].item))
    frame.loc[frame.index[frame.user == 0][0], "item"] = free
    frame.to_parquet(folder / f"{part}.parquet")
    if part == "test":  # the target is the first candidate
        candidates = np.load(folder / "candidates.npy")
        others = [c for c in candidates[0] if c != free]
        candidates[0] = [free, *others[1 if free not in candidates[0] else 0 :]][: candidates.shape[1]]
        np.save(folder / "candidates.npy", candidates)
    run_study(project, "models", FIRST)
    assert trained == ["popularity", "markov", "sasrec", "sasrec"]


def test_vectors_matter_to_those_who_read_them(project, trained):
    write_study(project, "models", BASELINES_ONLY | {"models": ["markov", "mean_vectors"]})
    run_study(project, "models", FIRST)
    trained.clear()
    path = project / "embeddings/toy/manifest.json"
    (path.parent / "checksums.json").unlink()  # the manifest is changed by hand
    manifest = json.loads(path.read_text())
    manifest["encoders"]["text"]["dtype"] = "another processor's"
    path.write_text(json.dumps(manifest))
    run_study(project, "models", FIRST)
    assert not trained
    manifest["encoders"]["text"]["encoder"] = "another model"
    path.write_text(json.dumps(manifest))
    run_study(project, "models", FIRST)
    assert trained == ["mean_vectors"]


def test_code_is_that_of_the_model():
    "Each model has its own code, and no baseline has the training of the paper's model."
    code = {name: set(sources(b.parts, stop=["data.sources"])) for name, b in BASELINES.items()}
    names = [name for name in BASELINES if name not in ("sasrec_vectors", "sasrec_both")]
    assert len({variants._training_code(name) for name in names}) == len(names)
    assert "training.loop.fit" in code["sasrec"] and "training.loop.fit" not in code["markov"]
    assert not any(place.startswith("training.objective") for places in code.values() for place in places)
    ours = set(sources(["pipeline.stages.pretrain", "pipeline.stages.finetune"], stop=["data.sources"]))
    assert {"model.recommender.UniRec", "training.loop.fit", "model.qformer.QFormer"} <= ours
    assert not any(
        place.startswith(("baselines.", "evaluation.significance", "data.sources")) for place in ours
    )


def _record(root: str, number: int) -> None:
    "Record ten made-up runs (in a process of its own)."
    study = Study(name="toy", **toy_study())
    ranks = pd.DataFrame({"user": [0, 1], "position": 1, "full": [1.0 + number, 2.5], "target": "new"})
    for i in range(10):
        row = {
            "run": f"{number}-{i}",
            "dataset": "toy",
            "variant": "sum",
            "seed": i,
            "protocol": "leave_one_out",
        }
        record.record_run(Path(root), study, row | {"code": "c", "data": "d"}, ranks)


def test_several_processes_record_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_record, args=(str(tmp_path), n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    study = Study(name="toy", **toy_study())
    rows, ranks = read_runs(tmp_path, study), read_ranks(tmp_path, study)
    assert set(rows.run) == {f"{n}-{i}" for n in range(3) for i in range(10)} and len(rows) == 30
    for run, part in ranks.groupby("run"):
        assert part.full.tolist() == [1.0 + int(run.partition("-")[0]), 2.5]


def test_what_another_process_is_at_is_passed_over(project, trained):
    study, params = load_study(project, "models")
    inputs = load_inputs(project, params, "toy")
    place = ("leave_one_out", 0, "toy", "markov")
    code = variants.present_codes(study)["leave_one_out", "markov"]
    key = run_key(study, params, place, {}, inputs.keys[False], code)
    part = Selection(protocols=["leave_one_out"], variants=["popularity", "markov"])
    with lock(project, f"run-{key}"):
        assert run_study(project, "models", part) == (1, 1)
    assert trained == ["popularity"] and run_study(project, "models", part) == (1, 0)


def test_studies_share_runs(project, trained):
    run_study(project, "toy")
    other = {"title": "another", "variants": {"whole": {}}, "reference": "whole"}
    write_study(project, "other", TWO | other | {"test_time": {}, "contrasts": {}})
    trained.clear()
    run_study(project, "other")
    assert not trained and rows_of(project, "other").variant.tolist() == ["whole"]


def test_rows_of_other_settings_and_of_earlier_code(project, capsys):
    run_study(project, "models", FIRST)
    tuned = yaml.safe_load((project / "experiments/tuned.yaml").read_text())
    tuned["settings"]["toy"]["markov"]["lags"] = 3
    (project / "experiments/tuned.yaml").write_text(yaml.safe_dump(tuned))
    table = judge_study(project, "models")
    assert "3 of 8 runs recorded, 1 of other settings or data left out" in capsys.readouterr().out
    assert set(table.model) == {"popularity", "sasrec"}
    judge_study(project, "models", prune=True)
    assert len(rows_of(project, "models")) == 3
    study, params = load_study(project, "models")
    old = record.load_record(project, study, params, dict.fromkeys(variants.present_codes(study), "another"))
    assert old.stale == 3 == len(old.rows)


def test_records_are_used_where_the_data_is_missing(project, capsys, monkeypatch):
    monkeypatch.delenv("UNIREC_EXTRA_ROOT", raising=False)
    run_study(project, "models", FIRST)
    whole = judge_study(project, "models")
    params = read_params(project)
    params["sets"]["toy"]["source"] = "extra:toy"
    write_params(project, params | {"data": {"extra_root": None}})
    for folder in ("prepared", "embeddings", "data"):
        shutil.rmtree(project / folder)
    assert run_study(project, "models", FIRST) == (0, 0)
    assert "toy is left out: extra:toy" in capsys.readouterr().out
    pd.testing.assert_frame_equal(judge_study(project, "models"), whole)


def test_pictures_that_are_gone_are_an_error(project):
    params = read_params(project)
    params["sets"]["toy"]["schema"]["picture"] = toy_params()["sets"]["toy"]["schema"]["picture"]
    (project / "prepared/toy/spec.json").unlink(missing_ok=True)
    shutil.rmtree(project / "data")
    with pytest.raises(FileNotFoundError, match="toy: its raw files, and so its pictures, are neither"):
        load_inputs(project, params, "toy", "last5")


def test_last5_gives_every_user_the_same_weight(project):
    run_study(project, "models", Selection(protocols=["last5"], variants=["markov"]))
    row, ranks = rows_of(project, "models").iloc[0], read_ranks(project, load_study(project, "models")[0])
    assert ranks.position.max() == 5 and ranks.user.nunique() == 60
    counted = [row[f"{kind}_targets"] for kind in ("new", "repeated", "cold")]
    assert counted == [(ranks.target == kind).sum() for kind in ("new", "repeated", "cold")]
    ranks = ranks[ranks.target == "new"]
    per_user = (1 / ranks.full).groupby(ranks.user).mean()
    assert row.full_mrr == pytest.approx(per_user.mean(), abs=1e-6)


def test_a_renamed_attribute_reaches_the_model(project):
    "Names change what a triplet model ranks, and nothing of one that reads values alone."
    changes = {"variants": {"sum": {}, "value_only": {"model.triplet": "value_only"}}, "contrasts": {}}
    names = {"price": "a giraffe", "brand": "an unrelated word"}
    changes["test_time"] = {f"{v}_renamed": {"variant": v, "names": names} for v in ("sum", "value_only")}
    write_study(project, "toy", TWO | changes)
    run_study(project, "toy")
    rows = rows_of(project, "toy").set_index("variant").run
    ranks = read_ranks(project, load_study(project, "toy")[0]).set_index("run").full
    assert (ranks[rows["sum_renamed"]].to_numpy() != ranks[rows["sum"]].to_numpy()).any()
    assert ranks[rows["value_only_renamed"]].tolist() == ranks[rows["value_only"]].tolist()


TUNING = toy_study(
    **ALONE | {"seeds": [0]}, kind="tuning", models=[], variants={}, reference="", test_time={}, contrasts={},
    grids={"markov": [{}, {"lags": 2}, {"lags": 3}]}, minutes=1.0, tuned=True,
)  # fmt: skip


def test_tuning_never_reads_the_test_split(project):
    write_study(project, "tuning", TUNING)
    run_study(project, "tuning")
    whole = rows_of(project, "tuning")
    shutil.rmtree(project / "results")
    for name in ("test.parquet", "candidates.npy", "users.parquet"):
        (project / "prepared/toy" / name).unlink()
    run_study(project, "tuning")
    changing = ["seconds", "allowed"]
    pd.testing.assert_frame_equal(
        whole.drop(columns=changing), rows_of(project, "tuning").drop(columns=changing)
    )


def test_the_budget_of_a_grid_is_a_sum(project, monkeypatch, capsys):
    write_study(project, "tuning", TUNING)
    real = variants.train_variant

    def slow(*args):
        trained, data, log = real(*args)
        trained.seconds = 40.0
        return trained, data, log

    monkeypatch.setattr(runs, "train_variant", slow)
    monkeypatch.chdir(project)
    assert main(["run", "tuning", "--write"]) == 0
    rows = rows_of(project, "tuning")
    assert rows.stopped.tolist() == ["counted", "counted", "not run"]
    assert rows.allowed.tolist() == [60.0, 20.0, -20.0]
    tuned = yaml.safe_load((project / "experiments/tuned.yaml").read_text())
    assert list(tuned["settings"]["toy"]) == ["markov"] and tuned["baselines"]
    monkeypatch.setattr(runs, "train_variant", lambda *args: pytest.fail("done twice"))
    assert main(["run", "tuning"]) == 0


def test_a_toy_study_from_the_command_line(project, monkeypatch, capsys):
    "Two variants, two baselines, two seeds: run, judged, and rendered."
    from unirec.report.answers import plan_text, variant_table

    contrasts = {"price": {"statement": "The price pays", "variant": "sum", "rivals": ["no_price", "markov"]}}
    study = toy_study(**ALONE, base={"llm.adapt": "none"}, contrasts=contrasts)
    write_study(project, "toy", study)
    monkeypatch.chdir(project)
    assert main(["run", "toy", "--seeds", "0", "--variants", "markov,unirec"]) == 0
    assert sorted(rows_of(project, "toy").variant) == ["half", "markov", "no_price", "sum"]
    assert main(["run", "experiments/toy.yaml"]) == 0 and "undecided" in capsys.readouterr().out
    files = {path.name for path in (project / "results/questions").iterdir()}
    assert files == {
        f"toy.{part}" for part in ("runs.csv", "ranks.parquet", "curves.csv", "pairs.csv", "verdicts.csv")
    }
    found, params = recorded(project, "toy")
    assert len(found.rows) == found.planned == 9
    assert "| `no_price` | `data.without: ['price']` |" in plan_text(found.study, params)
    assert "`half`" in variant_table(found, params)
    for wrong in (["run", "nothing"], ["run", "toy", "--seeds", "9"], ["run", "toy", "--prune"]):
        assert main(wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_every_model_runs(project):
    "One run of every model, with language models of one layer."
    short = {n: {"model": {"llm": {"layers": 1}}, "fit": {"epochs": 1}} for n in ("text_llm", "released")}
    short |= {
        n: {"model": {"width": 8, "steps": 2}, "fit": {"epochs": 1}}
        for n in ("bpr", "gru4rec", "sasrec", "sasrec_vectors", "sasrec_both")
    }
    tuned = {"baselines": short, "unirec": {"toy": {"pretrain.fit.epochs": 1, "llm.layers": 1}}}
    (project / "experiments/tuned.yaml").write_text(yaml.safe_dump(tuned))
    models = [*BASELINES, "unirec", "unirec_id"]
    write_study(project, "models", BASELINES_ONLY | {"models": models, "seeds": [0]})
    run_study(project, "models", FIRST)
    rows = rows_of(project, "models").set_index("variant")
    assert set(rows.index) == set(models) and rows.full_mrr.between(0, 1).all()
    columns = ["full_stage1_mrr", "full_without_llm_mrr", "llm_norm_share"]
    assert rows.loc[["unirec", "unirec_id"], columns].notna().all(axis=None)
