"""The whole pipeline at tiny size, from a fresh clone to the page of results, and what dvc.yaml and
params.yaml promise."""

import ast
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

from unirec import cli
from unirec.core.params import read_params, write_params
from unirec.model.llm import cache_folder
from unirec.pipeline.runner import STAGES, run_stage, stage_params, strip_volatile

FORMS = {"unirec_paper", "unirec", "unirec_id"}
MODELS = FORMS | {"popularity", "markov", "itemknn", "mean_vectors", "sasrec"}
DATASET = "sample"
LIMIT = 1800  # seconds: only against hanging
EXTERNAL = re.compile(r"<(script|link|img|iframe)[^>]*\b(src|href)\s*=\s*[\"']?\s*(https?:)?//", re.I)


# what the files promise


def dvc_stages(root: Path) -> dict:
    "The stages of dvc.yaml."
    return yaml.safe_load((root / "dvc.yaml").read_text())["stages"]


def keys_of(stage: dict) -> list[str]:
    "The parameters that a stage of dvc.yaml depends on, as `STAGES` names them."
    keys = ["sets"] if "sets" in stage["deps"] else []
    for entry in stage["params"]:
        if isinstance(entry, str):
            keys.append(entry)
            continue
        ((file, names),) = entry.items()
        assert file == "sets/${item.dataset}.yaml"
        keys += [f"sets.{{dataset}}.{name}" for name in names] if names else ["sets.{dataset}"]
    return keys


def picked(params: dict, keys: list[str], dataset: str) -> dict:
    "These keys of the parameters, nested as they are there."
    out = {}
    for key in keys:
        *parents, last = key.format(dataset=dataset).split(".")
        source, target = params, out
        for name in parents:
            source, target = source[name], target.setdefault(name, {})
        target[last] = source[last]
    return out


def test_dvc_and_the_package_agree_on_the_stages(root):
    assert list(dvc_stages(root)) == list(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_and_the_package_agree_on_a_stage(root, stage):
    "DVC reruns a stage when, and only when, something changed that the stage is given."
    block, (notebook, keys) = dvc_stages(root)[stage], STAGES[stage]
    assert sorted(keys_of(block)) == sorted(keys)
    dataset = "all" if "matrix" not in block else "${item.dataset}"
    assert block["cmd"] == f"python -m unirec.cli stage {stage} {dataset}"
    assert f"nbs/stages/{notebook}.ipynb" in block["deps"]
    assert f"reports/{dataset}/{notebook}.ipynb" in block["outs"]
    for dep in block["deps"]:
        if dep.startswith(("nbs/", "unirec/")):
            assert (root / dep).exists(), dep


def test_stage_params_are_what_dvc_tracks(root):
    params = read_params(root)
    for stage, block in dvc_stages(root).items():
        for dataset in params["sets"]:
            assert stage_params(params, stage, dataset) == picked(params, keys_of(block), dataset)


def test_a_parameter_that_is_missing_is_named(root):
    params = read_params(root)
    del params["sets"][DATASET]["schema"]
    with pytest.raises(KeyError, match=r"sets\.sample\.schema is missing; the stage pretrain"):
        stage_params(params, "pretrain", DATASET)


def test_an_unknown_stage_is_named(capsys):
    assert cli.main(["stage", "nonsense", "x"]) == 2
    assert "stage 'nonsense' is unknown" in capsys.readouterr().err


def test_an_unknown_data_set_is_named(root, tmp_path):
    write_params(tmp_path, read_params(root))
    with pytest.raises(KeyError, match=r"sets\.nowhere is missing"):
        run_stage("download", "nowhere", tmp_path)


def test_strip_volatile_drops_times_and_is_idempotent(tmp_path):
    path, clock = tmp_path / "executed.ipynb", "2024-05-01T12:00:00.000000"
    cell = nbformat.v4.new_code_cell(
        "1 + 1",
        execution_count=7,
        metadata={
            "tags": ["parameters"],
            "papermill": {"duration": 0.02, "start_time": clock},
            "execution": {"iopub.execute_input": clock},
        },
        outputs=[
            nbformat.v4.new_output("execute_result", {"text/plain": "2"}, execution_count=7),
            nbformat.v4.new_output("stream", name="stderr", text="a warning"),
        ],
    )
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("words", metadata={"papermill": {"duration": 1}}), cell],
        metadata={
            "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"},
            "papermill": {"start_time": clock},
            "language_info": {"name": "python", "version": "3.11.1"},
        },
    )
    nbformat.write(notebook, path)
    strip_volatile(path)
    once = path.read_bytes()
    strip_volatile(path)
    assert path.read_bytes() == once
    strip_volatiled = nbformat.read(path, as_version=4)
    assert clock.encode() not in once and strip_volatiled.metadata.keys() == {"kernelspec"}
    assert [c.metadata for c in strip_volatiled.cells] == [{}, {"tags": ["parameters"]}]
    assert strip_volatiled.cells[1].execution_count is None and [
        o.output_type for o in strip_volatiled.cells[1].outputs
    ] == ["execute_result"]


# a fresh clone, at tiny size


def tiny(params: dict) -> dict:
    "The project's parameters, with less of everything."
    params["datasets"] = [DATASET]
    params["sets"][DATASET]["options"] = {"n_items": 130, "n_users": 50}
    params["encode"] |= {"max_length": 32}
    params["model"] |= {
        "width": 32,
        "out": 32,
        "layers": 1,
        "heads": 2,
        "item_tokens": 2,
        "user_tokens": 2,
        "history": 10,
    }
    # as the toy of the steps has it: one conversion of the weights serves both
    params["llm"] |= {"layers": 2, "rank": 4}
    params["pretrain"]["fit"]["epochs"] = params["finetune"]["epochs"] = params["baselines"]["sasrec"]["fit"][
        "epochs"
    ] = 1
    params["pretrain"]["batch"] = {"size": 32, "positions": 4, "steps": 1, "most": 0}
    params["finetune"]["batch"] = {"size": 16, "positions": 2, "steps": 1, "most": 0}
    short = {"model.history": 10, "pretrain.fit.epochs": 1, "pretrain.batch.most": 0}
    params["forms"]["unirec_paper"] |= short | {"finetune.batch.steps": 1, "finetune.batch.most": 0}
    params["pretrain"]["loss"]["items"] = params["finetune"]["loss"]["items"] = 32
    params["baselines"]["sasrec"]["model"] |= {"width": 16, "length": 10, "batch": 16, "steps": 4}
    params["evaluate"] |= {"negatives": 99, "examples": 3}
    return params


class Clone:
    "A copy of the project with a git history of its own."

    def __init__(self, folder: Path, home: Path):
        self.folder, self.seconds = folder, {}
        tools = str(Path(sys.executable).parent)
        self.env = {
            k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "DVC_", "JUPYTER_", "XDG_"))
        } | {
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(folder),
            "HOME": str(home),
            "UNIREC_CACHE": str(cache_folder().absolute()),
            "DVC_NO_ANALYTICS": "1",
            "DVC_SITE_CACHE_DIR": str(home / "dvc"),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_SYSTEM": os.devnull,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        }

    def run(self, *command: str, name: str = "") -> str:
        "What a command prints; the test fails with it when the command does."
        start = time.monotonic()
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.env,
            text=True,
            errors="replace",
            timeout=LIMIT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.seconds[name or " ".join(command)] = time.monotonic() - start
        assert done.returncode == 0, (
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-6000:]}"
        )
        return done.stdout

    @property
    def params(self) -> dict:
        "What params.yaml says now."
        return read_params(self.folder)

    def json(self, *parts: str):
        "A JSON file of the copy."
        return json.loads(self.folder.joinpath(*parts).read_text())


def stages_run(output: str) -> set[str]:
    "The stages that `dvc repro` or `dvc exp run` says it ran."
    return set(re.findall(r"^Running stage '([^']+)'", output, re.M))


def test_make_repro_takes_the_data_sets_side_by_side(root, tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text("datasets: [a, b]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(root / "tools")
    repro = importlib.import_module("repro")
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    assert ["download", "prepare", *repro.STAGES, "report"] == list(stages) == list(STAGES)
    calls = []

    def call(command, **how):
        calls.append((command, how.get("env", {}).get("OMP_NUM_THREADS")))
        return int("embed@b" in command and failing)

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(repro.subprocess, "call", call)
    monkeypatch.setattr(repro.shutil, "which", lambda name: None)
    monkeypatch.setattr(repro, "usable_cores", lambda: 4)
    failing = False
    assert repro.repro([]) == 0
    words = ["dvc", "--wait-for-lock", "repro", "--single-item"]
    beside = [[*words, *(f"{stage}@{dataset}" for stage in repro.STAGES)] for dataset in "ab"]
    assert calls[0][0] == ["dvc", "repro", "prepare"] and calls[-1][0] == ["dvc", "repro"]
    assert sorted(calls[1:-1]) == [(command, "2") for command in beside]
    failing = True
    calls.clear()
    assert repro.repro([]) == 1 and len(calls) == 3  # no page
    calls.clear()
    assert repro.repro(["finetune@a"]) == 0 and calls == [(["dvc", "repro", "finetune@a"], None)]


@pytest.fixture(scope="module")
def clone(root, project_files, tmp_path_factory) -> Clone:
    "A clone of the project at tiny size, with its raw data pinned, in which `dvc repro` has run through."
    base = tmp_path_factory.mktemp("pipeline")
    folder, home = base / "project", base / "home"
    home.mkdir()
    for path in project_files:
        place = folder / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, place)
    write_params(folder, tiny(read_params(root)))
    copy = Clone(folder, home)
    for command in (
        ["init", "-q"],
        ["config", "user.name", "a test"],
        ["config", "user.email", "test@example.org"],
        ["add", "-A"],
        ["commit", "-q", "-m", "A clone at tiny size."],
        ["update-index", "--skip-worktree", "dvc.lock"],  # as the Makefile does
    ):
        copy.run("git", *command)
    downloaded = stages_run(copy.run("dvc", "repro", "data.dvc"))
    copy.run("git", "commit", "-q", "-a", "-m", "Pin the raw data at tiny size.")
    copy.ran = downloaded | stages_run(copy.run("dvc", "repro", name="the first repro"))
    return copy


def test_one_repro_runs_every_stage(clone):
    print(f"\n`dvc repro` at tiny size: {clone.seconds['the first repro']:.0f} s")
    assert clone.ran == {f"{stage}@{DATASET}" for stage in STAGES if stage != "report"} | {"report"}


def test_a_clean_checkout_stays_clean(clone):
    """What a run computes is ignored, DVC's lock file is left alone.

    Only `make reference` writes what is committed.
    """
    assert clone.run("git", "status", "--porcelain") == ""
    ignored = clone.run("git", "status", "--porcelain", "--ignored").split()
    assert {f"results/{DATASET}/", "reports/", "models/"} <= set(ignored)
    assert clone.run("git", "ls-files", "-v", "dvc.lock").split() == ["S", "dvc.lock"]
    assert "stages: {}" in clone.run("git", "show", "HEAD:dvc.lock")
    params = clone.params
    assert params["datasets"] == [DATASET]
    clone.run(sys.executable, "-m", "unirec.cli", "verify", "--write")
    changed = clone.run("git", "status", "--porcelain").split("\n")
    assert {line[3:] for line in changed if line} == {
        f"results/reference/{DATASET}.csv",
        f"results/reference/{DATASET}.json",
    }
    assert "largest difference 0.000000" in clone.run(sys.executable, "-m", "unirec.cli", "verify")
    clone.run("git", "checkout", "-q", ".")


def test_a_second_repro_runs_nothing(clone):
    output = clone.run("dvc", "repro", name="the second repro")
    print(f"\n`dvc repro` with nothing to do: {clone.seconds['the second repro']:.1f} s")
    assert not stages_run(output) and "up to date" in output


def test_the_page_names_every_data_set(clone):
    page = (clone.folder / "reports" / "index.html").read_text(encoding="utf8")
    for name in clone.params["datasets"]:
        assert clone.params["sets"][name]["title"] in page
    assert clone.params["budget"] in page and "synthetic" in page.lower()
    assert not EXTERNAL.search(page) and MODELS <= set(re.findall(r"[a-z_]+", page))


def test_results_are_whole_and_finite(clone):
    folder = clone.folder / "results" / DATASET
    table = pd.read_csv(folder / "comparison.csv")
    assert list(table.columns) == ["dataset", "model", "seed", "protocol", "metric", "value"]
    assert (
        set(table.model) == MODELS
        and set(table.dataset) == {DATASET}
        and set(table.seed) == {clone.params["seed"]}
    )
    for metric in ("mrr", "hit@10", "ndcg@10"):
        for protocol in ("full", "sampled100"):
            assert set(table[(table.metric == metric) & (table.protocol == protocol)].model) == MODELS
    assert table.value.notna().all() and table.value[table.metric != "targets"].between(0, 1).all()
    quality = clone.json("results", DATASET, "quality.json")
    of_one = table[(table.model == "unirec") & (table.metric == "targets")].set_index("protocol").value
    assert of_one[["full", "repeated", "cold"]].sum() == quality["users"], "no target is dropped in silence"
    assert of_one["full"] > 0
    ranks = pd.read_parquet(clone.folder / "predictions" / DATASET / "ranks.parquet")
    assert (ranks.groupby("model").size() == quality["users"]).all()
    ours = (1 / ranks[(ranks.model == "unirec") & (ranks.target == "new")].full).mean()
    reported = table[
        (table.model == "unirec") & (table.metric == "mrr") & (table.protocol == "full")
    ].value.item()
    assert ours == pytest.approx(reported, abs=1e-6)
    curves = pd.read_csv(folder / "curves.csv")
    assert set(zip(curves.model, curves.stage)) == {
        (m, s) for m in FORMS for s in ("pretrain", "finetune")
    } | {("sasrec", "baseline")}
    assert all(
        math.isfinite(share[k])
        for share in clone.json("results", DATASET, "llm_share.json").values()
        for k in ("mrr", "mrr_without_llm", "norm_share", "kept_epoch")
    )


@pytest.mark.parametrize("stage", STAGES)
def test_what_ran_is_what_params_says(clone, root, stage):
    dataset = "all" if stage == "report" else DATASET
    path = ["reports", "all"] if stage == "report" else ["reports", "runs", DATASET]
    run = clone.json(*path, f"run_{stage}.json")
    expected = picked(clone.params, keys_of(dvc_stages(root)[stage]), dataset)
    assert run["params"] == expected == picked(clone.params, STAGES[stage][1], dataset)
    assert (run["stage"], run["dataset"]) == (stage, dataset)
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", run["git_revision"]) and re.fullmatch(
        r"[0-9a-f]{64}", run["data_sha256"]
    )
    assert run["seconds"] > 0 and run["peak_memory_mb"] > 0


@pytest.mark.parametrize("stage", STAGES)
def test_an_executed_notebook_has_its_parameters_and_no_times(clone, stage):
    dataset = "all" if stage == "report" else DATASET
    notebook = nbformat.read(clone.folder / "reports" / dataset / f"{STAGES[stage][0]}.ipynb", as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    place = tags.index(["parameters"])
    assert tags[place + 1] == ["injected-parameters"], "injected values stand behind the defaults"
    assert sum(t == ["injected-parameters"] for t in tags) == 1
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(notebook.cells[place + 1].source).body
        if isinstance(node, ast.Assign)
    }
    assert values == {"dataset": dataset, "root": ".", "params": stage_params(clone.params, stage, dataset)}
    assert notebook.metadata.keys() == {"kernelspec"}
    for number, cell in enumerate(notebook.cells):
        assert set(cell.metadata) <= {"tags"} and cell["id"] == f"cell-{number:03d}"
        if cell.cell_type == "code":
            assert cell.execution_count is None
            assert not [
                o
                for o in cell.outputs
                if o.output_type == "error" or o.get("name") == "stderr" or o.get("execution_count")
            ]


def test_a_changed_parameter_concerns_its_stage_alone(clone):
    before, params = clone.params, clone.params
    params["finetune"]["epochs"] += 3
    write_params(clone.folder, params)
    try:
        status = json.loads(clone.run("dvc", "status", "--json"))
    finally:
        write_params(clone.folder, before)
    assert set(status) == {f"finetune@{DATASET}"}, status


def test_metrics_and_plots_are_shown_offline(clone, tmp_path):
    shown = json.loads(clone.run("dvc", "metrics", "show", "--json"))[""]["data"]
    metrics = shown[f"results/{DATASET}/metrics.json"]["data"]
    assert set(metrics) == MODELS and 0 < metrics["unirec"]["full"]["mrr"] <= 1
    clone.run("dvc", "plots", "show", "--out", str(tmp_path / "plots"))
    page = (tmp_path / "plots" / "index.html").read_text(encoding="utf8")
    assert not EXTERNAL.search(page)
    for name in ("comparison.csv", "curves.csv"):
        assert f"{DATASET}" in page and name in page


def test_a_changed_parameter_reruns_what_depends_on_it(clone):
    "Only its stage and what follows are run; with the old value, DVC takes the old results from its cache."
    before, params = clone.json("results", DATASET, "metrics.json"), clone.params
    changed = clone.params
    changed["finetune"]["epochs"] += 1
    write_params(clone.folder, changed)
    output = clone.run("dvc", "repro", name="the rerun")
    print(f"\n`dvc repro` after a change of a fine-tuning parameter: {clone.seconds['the rerun']:.0f} s")
    assert stages_run(output) == {f"finetune@{DATASET}", f"evaluate@{DATASET}", "report"}
    run = clone.json("reports", "runs", DATASET, "run_finetune.json")
    assert run["params"]["finetune"]["epochs"] == changed["finetune"]["epochs"]
    after = clone.json("results", DATASET, "metrics.json")
    assert {m for m in MODELS if after[m] != before[m]} <= FORMS, "the baselines stay"
    write_params(clone.folder, params)
    assert not stages_run(clone.run("dvc", "repro"))
    assert clone.json("results", DATASET, "metrics.json") == before
    assert clone.run("git", "status", "--porcelain") == ""
