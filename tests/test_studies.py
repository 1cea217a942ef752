"""Study files that can be run, verdicts that say no more than the numbers, and chapters that show both."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from unirec.baselines.registry import BASELINES
from unirec.experiments.judge import LEAST_SEEDS, contrast_word, judge, made_up, pairs
from unirec.experiments.study import Study, jobs, planned, read_study, study_names, toy_study
from unirec.experiments.variants import load_study, settings
from unirec.report.answers import overview, plan_text, read_verdicts, variant_table, verdict_table
from unirec.training.loop import FitConfig

ROOT = Path(__file__).resolve().parent.parent
NAMES = study_names(ROOT)
QUESTIONS = [name for name in NAMES if name not in ("comparison", "tuning", "every_variant")]


@pytest.mark.parametrize("name", NAMES)
def test_a_study_can_be_run(root, name):
    "Every name in its file exists, and every run has settings of its own."
    study, params = load_study(root, name)
    for _, seed, dataset, variant in jobs(study):
        own, _ = settings(study, params, dataset, variant, seed)
        model = study.trained[variant][0]
        if model not in BASELINES:
            assert own["seed"] == seed
        elif BASELINES[model].config:
            BASELINES[model].config(**own.get("model", {}))
            FitConfig(**own.get("fit", {}))
    assert len(set(planned(study))) == len(planned(study)) and study.statement or name == "every_variant"


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_can_be_answered(root, name):
    "It says what would refute it, and has the seeds, protocols and data sets that a verdict needs."
    study = read_study(root / "experiments" / f"{name}.yaml")
    assert study.refuted_by and study.contrasts and len(study.seeds) >= LEAST_SEEDS
    assert "last5" in study.protocols and {"sample_large", "all_beauty"} <= set(study.datasets)
    assert study.reference in study.more_seeds and len(study.every_seed) == 5
    null = [dataset for dataset in study.datasets if study.of_set(dataset).null_world]
    assert null or name == "transferred_settings"


def test_every_model_is_compared_and_tuned_within_the_budget(root):
    comparison, tuning = (read_study(root / "experiments" / f"{n}.yaml") for n in ("comparison", "tuning"))
    assert set(comparison.models) == {*BASELINES, "unirec", "unirec_id"}
    assert set(comparison.transferred.values()) <= set(tuning.datasets)
    assert set(tuning.grids) == set(BASELINES) - {"popularity"} and max(map(len, tuning.grids.values())) <= 8
    tuned = yaml.safe_load((root / "experiments/tuned.yaml").read_text())
    for dataset, models in tuned["settings"].items():
        assert dataset in tuning.datasets
        assert all(own in tuning.grids[model] for model, own in models.items())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": []}, "seeds: empty, expected at least one"),
        ({"seeds": [0, 0]}, "seeds: 0 is in the list twice"),
        ({"seeds": [True]}, "seeds.0: True, expected a valid integer"),
        ({"titel": "x"}, "titel: unknown field; known are title"),
        ({"protocols": ["last"]}, "protocols.0: 'last'"),
        ({"reference": "nobody"}, "reference: 'nobody' is none of markov, sasrec"),
        ({"variants": {"sum": None}}, "variants.sum: None, expected a valid dictionary"),
        (
            {"test_time": {"half": {"variant": "sum", "missing": 2.0}}},
            "test_time.half.missing: 2.0, expected less",
        ),
        ({"test_time": {"half": {"of": "sum"}}}, "test_time.half.variant: is missing"),
        ({"base": {"encode.text": "x"}}, "base: encode.text cannot be changed by a study"),
        ({"grids": {"markow": [{}]}}, "grids: 'markow' is none of unirec"),
        ({"margin": 0}, "margin: 0, expected greater than 0"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_file_and_field(tmp_path, changes, message):
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(toy_study(**changes)))
    with pytest.raises(ValueError) as error:
        read_study(path)
    lines = str(error.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines) and any(message in line for line in lines)


# the rule

TWO = Study(
    name="two",
    **toy_study(
        models=[],
        seeds=[0, 1, 2],
        more_seeds={},
        test_time={},
        sets={"null": {"like": "toy", "null_world": True}},
    ),
)


@pytest.mark.parametrize(
    "strength, word",
    [
        ({"sum": 1.0, "no_price": 0.3}, "holds"),
        ({"sum": 0.3, "no_price": 1.0}, "does not hold"),
        ({"sum": 1.0}, "not run yet"),
    ],
)
def test_verdicts_of_known_worlds(strength, word):
    table = judge(made_up(TWO, strength, ("toy", "null"), range(3)))
    assert table[~table.null].verdict.tolist() == [word]
    assert "holds" not in table[table.null].verdict.tolist()


def test_equal_models_hardly_ever_hold():
    "Forty pairs of equal models: a test at 5% of two sides, of which one is the contrast's."
    held = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        record = made_up(TWO, {"sum": 0.5, "no_price": 0.5}, ("toy",), range(3), users=120)
        drawn = rng.normal(1.5, 1, len(record.ranks))
        ranks = record.ranks.assign(full=np.ceil(np.exp(np.maximum(0, drawn))))
        verdicts = judge(replace(record, ranks=ranks)).query("dataset == 'toy'").verdict
        held += (verdicts == "holds").sum()
    assert held <= 4


def test_too_few_seeds_decide_nothing():
    record = made_up(TWO, {"sum": 3.0, "no_price": 0.0}, ("toy",), [0, 1])
    assert pairs(record).query("dataset == 'toy'").word.tolist() == ["few seeds"]
    assert judge(record).query("dataset == 'toy'").verdict.tolist() == ["undecided"]


def test_one_refuting_rival_is_enough():
    assert contrast_word(["better", "worse", "not run"]) == "does not hold"
    assert contrast_word(["better", "not run"]) == "undecided"


# the chapters


def shown(root: Path, name: str) -> str:
    "All that a study's chapter shows as Markdown."
    chapter = next((root / "nbs/results").glob(f"1?_{name}.ipynb"))
    outputs = [o for c in json.loads(chapter.read_text())["cells"] for o in c.get("outputs", [])]
    texts = [o["data"]["text/markdown"] for o in outputs if "text/markdown" in o.get("data", {})]
    return "\n".join("".join(text) for text in texts)


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_chapter_shows_the_plan_and_the_verdicts(root, name):
    study, params = load_study(root, name)
    text = shown(root, name)
    assert plan_text(study, params) in text, f"{name}: run the notebook again"
    assert verdict_table(read_verdicts(root, name)) in text, f"{name}: run the notebook again"


def test_old_verdicts_are_labelled_and_replaced_by_newer_ones(root, tmp_path):
    old = read_verdicts(root, "triplet")
    assert set(old.version) == {"0.1.0"} and "version 0.1.0, by its rule" in verdict_table(old)
    folder = tmp_path / "results/questions"
    folder.mkdir(parents=True)
    record = made_up(TWO, {"sum": 1.0, "no_price": 0.3}, ("toy",), range(3))
    judge(record).to_csv(folder / "two.verdicts.csv", index=False)
    pd.concat([judge(record), judge(record).assign(study="other")]).to_csv(folder / "0.1.0.csv", index=False)
    versions = read_verdicts(tmp_path).groupby("study").version.unique()
    assert versions["two"].tolist() == [""] and versions["other"].tolist() == ["0.1.0"]
    params = {"sets": {"toy": {"title": "a toy", "synthetic": True}, "null": {}}}
    text = variant_table(record, params)
    assert "a toy (synthetic), last event held out" in text and "minus `sum`" in text


def test_claims_of_the_paper_and_of_this_companion_are_counted_apart(root):
    verdicts = read_verdicts(root)
    ours = verdicts[verdicts.claim == "companion"]
    assert set(ours.study) == {"fusion", "llm", "modalities", "transferred_settings"}
    assert ours[ours.study == "llm"].contrast.unique().tolist() == ["residual"]
    real = verdicts[(verdicts.protocol == "leave_one_out") & ~verdicts.null.astype(bool)]
    text = overview(root)
    for claim, whose in (("paper", "the paper"), ("companion", "this companion")):
        part = real[real.claim == claim]
        number, holding = part.groupby(["title", "contrast"]).ngroups, (part.verdict == "holds").sum()
        assert f"Of the {number} claims of {whose}: {holding} *holds*" in text


def test_a_table_says_where_the_language_model_took_no_part():
    record = made_up(TWO, {"sum": 1.0, "no_price": 0.3}, ("toy",), range(3))
    params = {"sets": {"toy": {"title": "a toy"}, "null": {}}}
    assert "kept: stage 1" not in variant_table(record, params)
    kept = ["stage 1" if row.variant == "sum" else "stage 2" for row in record.rows.itertuples()]
    record.rows["kept"] = kept
    lines = variant_table(record, params).splitlines()
    noted = [line for line in lines if "kept: stage 1; the language model took no part" in line]
    assert len(noted) == 1 and noted[0].startswith("| `sum`")


def test_old_results_are_small_and_whole(root):
    comparison = pd.read_csv(root / "results/comparison/0.1.0.csv")
    needed = {
        "dataset",
        "model",
        "seeds",
        "protocol",
        "mrr",
        "hit@10",
        "ndcg@10",
        "difference",
        "low",
        "high",
    }
    assert needed | {"verdict"} <= set(comparison) and set(comparison.model) == {
        *BASELINES,
        "unirec",
        "unirec_id",
    }
    assert set(pd.read_csv(root / "results/questions/0.1.0.csv").study) == set(QUESTIONS)
    assert sum(path.stat().st_size for path in (root / "results").glob("*/0.1.0.csv")) < 100_000


def test_the_papers_form_in_a_study_has_the_budgets_length_and_its_own_shape(root):
    "A study's `unirec` has version 0.1's form; `unirec_paper` has the paper's, trained for as long."
    study, params = load_study(root, "comparison")
    study = Study(**study.model_dump() | {"models": ["unirec_paper", "unirec"]})
    dataset = study.datasets[0]
    (paper, _), (old, _) = (settings(study, params, dataset, name, 0) for name in study.models)
    assert paper["pretrain"]["fit"] == old["pretrain"]["fit"]
    assert paper["finetune"]["epochs"] == old["finetune"]["epochs"]
    for stage in ("pretrain", "finetune"):
        assert paper[stage]["batch"] == old[stage]["batch"]
    form = params["forms"]["unirec_paper"]
    for name in ("groups", "average"):
        assert (
            paper["finetune"][name] == form[f"finetune.{name}"] != old["finetune"][name] or name == "average"
        )
    assert (paper["llm"]["query"], old["llm"]["query"]) == ("llm", "residual")
    assert (paper["model"]["event"], old["model"]["event"]) == ("tokens", "vector")
    shortcuts = ("skip", "recent", "residual", "condition", "again")
    assert not any(paper["model"][name] for name in shortcuts), "a budget's shortcut went over the form"


def test_a_query_without_a_language_model_is_found_when_the_study_is_read(root, tmp_path):
    (tmp_path / "experiments").mkdir()
    for name in ("sets", "experiments/common.yaml", "params.yaml"):
        (tmp_path / name).symlink_to(root / name)
    study = {"budget": "short", "models": ["markov", "unirec_paper"], "datasets": ["sample"]}
    changes = {"kind": "comparison", "variants": {}, "test_time": {}, "reference": "", "contrasts": {}}
    own = toy_study(**study, **changes, sets={}, per_set={}, more_seeds={})
    (tmp_path / "experiments/toy.yaml").write_text(yaml.safe_dump(own))
    message = "toy.yaml: variant 'unirec_paper' on sample: llm.query is llm, but llm.adapt is none"
    with pytest.raises(ValueError, match=message):
        load_study(tmp_path, "toy")
