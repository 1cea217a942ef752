"""Questions: files in experiments/ that can be run, runs that are done once, verdicts that say no more than the numbers."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from unirec.data.download import judge as verdicts
from unirec.experiments import plan as claims
from unirec.experiments import questions
from unirec.experiments.judge import claim_word, judge, made_up, pairs
from unirec.experiments.plan import Question, jobs, planned, settings, with_sets
from unirec.experiments.runs import toy_comparison
from unirec.report import answers

NAMES = [
    "carried_over",
    "decoupled",
    "every_variant",
    "fusion",
    "llm",
    "losses",
    "modalities",
    "schema",
    "tokens",
    "triplet",
]
TOLD = {
    "title": "a toy",
    "claim": "x",
    "refuted_by": "y",
    "budget": "short",
    "datasets": ["toy"],
    "seeds": [0],
    "reference": "sum",
    "base": {},
    "variants": {"sum": {}, "value_only": {"model.triplet": "value_only"}},
    "at_test": {"lost": {"of": "sum", "missing": 0.5}},
    "claims": {"c": {"says": "Names help", "ours": "sum", "over": ["value_only"]}},
}


@pytest.fixture(scope="module")
def params(root) -> dict:
    "The project's params.yaml."
    return yaml.safe_load((root / "params.yaml").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict]:
    "Tables and vectors of the toy."
    folder = tmp_path_factory.mktemp("questions")
    params = toy_comparison(folder) | {
        "datasets": ["toy"],
        "questions": {"budgets": {"quick": {}, "short": {"pretrain.fit.epochs": 1, "llm.adapt": "none"}}},
    }
    return folder, params


@pytest.fixture
def project(made, tmp_path) -> Path:
    "A copy of it with a question, to write in."
    for folder in ("data", "prepared", "embeddings"):
        shutil.copytree(made[0] / folder, tmp_path / folder)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(made[1], sort_keys=False))
    ask_for(tmp_path, TOLD)
    return tmp_path


def ask_for(root: Path, told: dict) -> Path:
    "Write a question's file."
    (root / "experiments/toy.yaml").write_text(yaml.safe_dump(told, sort_keys=False))
    return root / "experiments/toy.yaml"


def test_every_question_is_known(root):
    assert sorted(p.stem for p in (root / "experiments").glob("*.yaml") if p.stem != "dvc") == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_question_can_be_run(root, params, name):
    "Every name in its file exists, and its claims say what is compared."
    q = Question.read(root / "experiments" / f"{name}.yaml")
    whole = with_sets(params, q)
    for _, seed, dataset, variant in jobs(q):
        own, data = settings(q, whole, dataset, variant, seed)
        assert own["seed"] == seed and set(data) <= set(claims.TESTED)
    assert len(set(planned(q))) == len(planned(q)) and q.reference in q.variants
    if name == "every_variant":
        return
    assert q.claim and q.refuted_by and q.claims and len(q.seeds) >= verdicts.LEAST_SEEDS
    assert "last5" in q.protocols and {"sample_large", "all_beauty"} <= set(q.datasets)
    assert (
        max(len(q.seeds) + len(more) for more in q.more_seeds.values()) == 5 and q.reference in q.more_seeds
    )
    assert all(set(told.get("where", q.datasets)) <= set(q.datasets) for told in q.claims.values())


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("every_variant", "carried_over")])
def test_a_question_has_a_null_world(root, name):
    q = Question.read(root / "experiments" / f"{name}.yaml")
    null = [d for d in q.datasets if q.sets.get(d, {}).get("null_world")]
    assert null and any(
        rows for rows in [[c for c in q.claims.values() if null[0] in c.get("where", q.datasets)]]
    )


def test_two_variants_of_a_question_are_two_models(root, params):
    "A variant that changes nothing would look like a finding."
    for name in NAMES:
        q = Question.read(root / "experiments" / f"{name}.yaml")
        seen = {}
        for v in q.variants:
            own, data = settings(q, params, q.datasets[0], v, 0)
            text = json.dumps(
                [{k: own[k] for k in ("model", "pretrain", "llm", "finetune")}, data], sort_keys=True
            )
            assert text not in seen, f"{name}: {v} and {seen[text]} are the same"
            seen[text] = v


def test_the_stages_are_the_questions(root):
    told = yaml.safe_load((root / "experiments/dvc.yaml").read_text())["stages"]["ask"]
    assert sorted(told["foreach"]) == NAMES
    assert "ask" not in yaml.safe_load((root / "dvc.yaml").read_text())["stages"]


def test_dvc_keeps_the_two_projects_apart(root, tmp_path):
    "The pipeline's `dvc repro` and `dvc status` do not know of the questions; the folder's own does."
    for name in (
        ".dvc",
        "dvc.yaml",
        "params.yaml",
        "experiments/.dvc",
        "experiments/dvc.yaml",
        *(f"experiments/{n}.yaml" for n in NAMES),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if (root / name).is_dir():
            shutil.copytree(
                root / name, tmp_path / name, ignore=shutil.ignore_patterns("cache", "tmp", "config.local")
            )
        else:
            shutil.copyfile(root / name, tmp_path / name)

    def dvc(*words: str, cwd: Path) -> str:
        done = subprocess.run(
            [str(Path(sys.executable).parent / "dvc"), *words],
            cwd=cwd,
            text=True,
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for folder in (tmp_path, tmp_path / "experiments"):
        dvc("config", "--local", "core.no_scm", "true", cwd=folder)
    outer, inner = (
        dvc("stage", "list", "--name-only", "--all", cwd=tmp_path),
        dvc("stage", "list", "--name-only", cwd=tmp_path / "experiments"),
    )
    assert "evaluate" in outer and "ask" not in outer and "ask@fusion" in inner
    assert "unirec.experiments.questions experiments/fusion.yaml" in dvc(
        "repro", "--dry", "ask@fusion", cwd=tmp_path / "experiments"
    )


def test_a_run_is_done_once_and_goes_on(project, monkeypatch):
    trained, real = [], questions.train_one
    monkeypatch.setattr(questions, "train_one", lambda *a: trained.append(a[5]) or real(*a))
    path = project / "experiments/toy.yaml"
    questions.ask(path, project)
    assert trained == ["sum", "value_only"] and len(verdicts.read_rows(project, "toy")) == 3
    results, before = (
        project / "experiments/results",
        {f.name: f.read_bytes() for f in (project / "experiments/results").iterdir()},
    )
    questions.ask(path, project)
    assert len(trained) == 2 and before == {f.name: f.read_bytes() for f in results.iterdir()}
    rows = verdicts.read_rows(project, "toy")
    rows[rows.variant != "lost"].to_csv(results / "toy.csv", index=False)  # killed before its row was written
    questions.ask(path, project)
    assert trained == ["sum", "value_only", "sum"] and sorted(
        verdicts.read_rows(project, "toy").run
    ) == sorted(rows.run)
    assert pd.read_parquet(results / "toy.ranks.parquet").groupby("run", observed=True).size().nunique() == 1


def test_a_part_of_a_question(project):
    ask_for(project, TOLD | {"seeds": [0, 1]})
    assert questions.ask(project / "experiments/toy.yaml", project, seeds=[1], variants=["value_only"]) == 1
    assert verdicts.read_rows(project, "toy")[["variant", "seed"]].to_numpy().tolist() == [["value_only", 1]]
    found, params = questions.look(project, "toy")
    text = answers.opening(found, params)
    assert "Recorded: 1 of 6 runs" in text and "The rest has not been run" in text
    assert judge(found).verdict.tolist() == ["not run yet"] and "(few)" in answers.table(found, params)


def test_other_settings_are_left_out(project):
    questions.ask(project / "experiments/toy.yaml", project)
    ask_for(project, TOLD | {"base": {"model.dropout": 0.3}})
    found, params = questions.look(project, "toy")
    assert (
        len(found.rows) == 0
        and found.others == 3
        and "Nothing has been run" in answers.opening(found, params)
    )


def test_runs_of_earlier_code_say_so(project):
    questions.ask(project / "experiments/toy.yaml", project)
    rows, q = verdicts.read_rows(project, "toy"), Question.read(project / "experiments/toy.yaml")
    params = with_sets(yaml.safe_load((project / "params.yaml").read_text()), q)
    found = verdicts.recorded(project, q, params, "another code")
    assert (
        np.isfinite(found.rows.new_mrr).all()
        and found.stale == len(rows) == len(found.rows)
        and "earlier state of the code" in answers.opening(found, params)
    )


def test_a_set_that_is_not_here_is_left_out(project, capsys, monkeypatch):
    monkeypatch.delenv("UNIREC_EXTRA_ROOT", raising=False)
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["sets"]["mine"] = {**params["sets"]["toy"], "source": "extra:mine"}
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    path = ask_for(
        project, TOLD | {"datasets": ["mine", "toy"], "at_test": {"there": {"of": "sum", "set": "mine"}}}
    )
    assert questions.ask(path, project) == 2
    assert "mine is left out" in capsys.readouterr().out and set(
        verdicts.read_rows(project, "toy").variant
    ) == {"sum", "value_only"}


def test_a_renamed_attribute_reaches_the_model(project):
    "Names change what a triplet model ranks, and nothing of one that reads values alone."
    same = {"of": "value_only", "names": {"price": "rating"}}
    path = ask_for(
        project,
        TOLD
        | {
            "at_test": {
                "renamed": {"of": "sum", "names": {"price": "a giraffe", "brand": "an unrelated word"}},
                "value_renamed": same,
            }
        },
    )
    questions.ask(path, project)
    rows = verdicts.read_rows(project, "toy").set_index("variant")
    ranks = pd.read_parquet(project / "experiments/results/toy.ranks.parquet").astype({"run": str})

    def of(v):
        return ranks[ranks.run == rows.run[v]].full.to_numpy()

    assert (of("renamed") != of("sum")).any() and (of("value_renamed") == of("value_only")).all()


# the rule

TWO = Question(
    "two",
    **TOLD
    | {
        "seeds": [0, 1, 2],
        "datasets": ["toy", "null"],
        "sets": {"null": {"like": "toy", "null_world": True}},
        "at_test": {},
    },
)


@pytest.mark.parametrize(
    "strength, word",
    [
        ({"sum": 1.0, "value_only": 0.3}, "holds"),
        ({"sum": 0.3, "value_only": 1.0}, "does not hold"),
        ({"sum": 1.0}, "not run yet"),
    ],
)
def test_verdicts_of_known_worlds(strength, word):
    table = judge(made_up(TWO, strength, ("toy", "null"), range(3)))
    assert table[~table.null].verdict.tolist() == [word] and "holds" not in table[table.null].verdict.tolist()


def test_equal_models_hardly_ever_hold():
    "Forty pairs of equal models: a test at 5% of two sides, of which one is the claim's."
    held = 0
    for seed in range(40):
        rng, found = (
            np.random.default_rng(seed),
            made_up(TWO, {"sum": 0.5, "value_only": 0.5}, ("toy",), range(3), users=120),
        )
        ranks = found.ranks.assign(full=np.ceil(np.exp(np.maximum(0, rng.normal(1.5, 1, len(found.ranks))))))
        held += (judge(replace(found, ranks=ranks)).query("dataset == 'toy'").verdict == "holds").sum()
    assert held <= 4


def test_too_few_seeds_decide_nothing():
    found = made_up(TWO, {"sum": 3.0, "value_only": 0.0}, ("toy",), [0, 1])
    assert pairs(found).query("dataset == 'toy'").word.tolist() == ["few seeds"] and judge(found).query(
        "dataset == 'toy'"
    ).verdict.tolist() == ["undecided"]


def test_one_refuting_rival_is_enough():
    assert (
        claim_word(["better", "worse", "not run"]) == "does not hold"
        and claim_word(["better", "not run"]) == "undecided"
    )


def test_a_claim_that_holds_in_a_null_world_is_an_alarm():
    found = made_up(
        replace(TWO, sets={"null": {"like": "toy"}}),
        {"sum": 1.0, "value_only": 0.3},
        ("toy", "null"),
        range(3),
    )
    params = {"sets": {"toy": {"title": "a toy", "synthetic": True}}, "questions": {"budgets": {"short": {}}}}
    assert "which is a false alarm" in answers.answer(replace(found, question=TWO), params)


# the notebooks


def texts(root: Path, name: str) -> str:
    "All that an executed notebook shows as Markdown."
    cells = json.loads(next((root / "nbs/results").glob(f"1?_{name}.ipynb")).read_text())["cells"]
    return "\n".join(
        "".join(o["data"]["text/markdown"])
        for c in cells
        for o in c.get("outputs", [])
        if "text/markdown" in o.get("data", {})
    )


@pytest.mark.parametrize("name", [n for n in NAMES if n != "every_variant"])
def test_a_notebook_shows_what_is_recorded(root, name):
    "Its count, its table, its answer and its cost are those of the committed files."
    found, params = questions.look(root, name)
    shown = texts(root, name)
    for part in (answers.opening, answers.table, answers.answer, answers.cost):
        assert part(found, params) in shown or part(replace(found, stale=0), params) in shown, (
            f"{name}: run the notebook again"
        )
    assert re.search(r"Recorded: [\d,]+ of [\d,]+ runs", shown)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "every_variant"])
def test_the_verdicts_are_those_of_the_runs(root, name):
    path = root / "experiments/results" / f"{name}.verdict.csv"
    if not path.exists():
        return
    kept, new = pd.read_csv(path, keep_default_na=False, na_values=[""]), judge(questions.look(root, name)[0])
    assert (
        kept[["dataset", "protocol", "claim", "verdict", "recorded", "planned"]].to_numpy().tolist()
        == new[["dataset", "protocol", "claim", "verdict", "recorded", "planned"]].to_numpy().tolist()
    )


def test_results_stay_small(root):
    "Git keeps the ranks of all runs under both protocols: under five megabytes now that nearly all of the plan is recorded."
    assert sum(f.stat().st_size for f in (root / "experiments/results").iterdir()) < 6_000_000
