"""`unirec doctor`, the dry run at tiny widths, and the committed one of the paper's profile."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from unirec import cli
from unirec.core.device import SHARE, gpu_peaks
from unirec.core.params import read_params
from unirec.pipeline.dry_run import count_operations, run_flops
from unirec.pipeline.profiles import read_profile
from unirec.pipeline.stages import WORDS, write_four_items

FIELDS = {
    "profile",
    "random_weights",
    "tokenizer",
    "versions",
    "machine",
    "seconds",
    "peak_memory_mb",
    "parameters",
    "trainable",
    "units",
    "step",
    "two_steps",
    "sizes",
    "run",
    "hours",
}


def lora_size(c: dict, r: int) -> int:
    "Of seven projections a layer, each r x (in + out)."
    d, q, kv, m = (
        c["hidden_size"],
        c["num_attention_heads"] * c["head_dim"],
        c["num_key_value_heads"] * c["head_dim"],
        c["intermediate_size"],
    )
    return c["num_hidden_layers"] * r * ((d + q) + 2 * (d + kv) + (q + d) + 3 * (d + m))


@pytest.fixture(scope="module")
def tiny(root, tmp_path_factory) -> dict:
    "The dry run of paper-tiny by the command, in a process of its own, with sizes given."
    out = tmp_path_factory.mktemp("dry") / "dry.json"
    command = [
        sys.executable,
        "-m",
        "unirec.cli",
        "doctor",
        "--root",
        str(root),
        "--profile",
        "paper-tiny",
        "--dry-run",
        "--items",
        "500",
        "--users",
        "1000",
        "--events",
        "9000",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=root, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text()) | {"printed": done.stdout, "errors": done.stderr}


def test_the_command_counts_the_tiny_profile(tiny):
    assert set(tiny) - {"printed", "errors"} == FIELDS and tiny["random_weights"]
    assert (
        "RANDOM" in tiny["errors"]
        and "random weights" in tiny["printed"]
        and "1,000 users, 500 items, 9,000 events; as given at the command" in tiny["printed"]
    )
    for stage in ("pretrain", "finetune"):
        assert tiny["two_steps"][stage]["steps"] == 2 and tiny["two_steps"][stage]["loss"] > 0
    assert tiny["step"]["from_units"] == pytest.approx(tiny["step"]["counted"], rel=0.05), (
        "the parts do not add up to the step"
    )
    assert (
        tiny["trainable"]["finetune"] - tiny["trainable"]["pretrain"]
        == tiny["parameters"]["LoRA"] + tiny["parameters"]["LLM, projections"]
    )


def test_lora_has_the_size_that_its_rank_gives(tiny, root):
    profile = read_profile("paper-tiny", root)
    assert tiny["parameters"]["LoRA"] == lora_size(
        profile.models["llm"]["config"], profile.params["llm"]["rank"]
    )


def test_nothing_is_left_behind(tiny, root):
    listed = subprocess.run(
        ["git", "status", "--porcelain", "--ignored", "--", "profiles", "weights", "runs"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert "weights" not in listed.stdout and not (root / "weights").exists()


def test_operations_of_a_product_are_two_per_weight():
    x, y = torch.randn(3, 5), torch.randn(5, 7)
    assert count_operations(lambda: x @ y) == 2 * 3 * 5 * 7


def test_a_run_grows_with_its_data(root, tiny):
    params, sizes = read_profile("paper", root).params, read_profile("paper", root).sizes
    one = run_flops(tiny["units"], params, sizes)
    more = {
        k: run_flops(tiny["units"], params, sizes | {k: 2 * sizes[k]}) for k in ("items", "users", "events")
    }
    assert (
        more["items"]["embed"] > one["embed"]
        and more["events"]["finetune"] > one["finetune"]
        and more["users"]["evaluate"] > one["evaluate"]
    )
    single = run_flops(tiny["units"], params, sizes, models=1)
    assert single["embed"] == one["embed"] and 2 * single["pretrain"] == pytest.approx(one["pretrain"])


def test_four_items_have_all_attributes(root, tmp_path):
    schema = read_params(root)["sets"]["beauty"]["schema"]
    spec = write_four_items(tmp_path / "shop", schema, history=20)
    assert (
        spec.synthetic
        and spec.schema.names == list(schema)
        and len(list((tmp_path / "shop" / "images").iterdir())) == 4
        and len(WORDS) > 8
    )


# what is committed


@pytest.fixture(scope="module")
def committed(root) -> dict:
    return json.loads((root / "profiles" / "dry_run.json").read_text())


def test_the_committed_run_is_the_paper_profile_in_true_shapes(root, committed):
    "Parameters counted again, from the shapes alone."
    import open_clip
    from transformers import Qwen3Config, Qwen3Model

    profile = read_profile("paper", root)
    with torch.device("meta"):
        text, llm = (Qwen3Model(Qwen3Config(**profile.models[n]["config"])) for n in ("text", "llm"))
        tower = open_clip.model.CLIP(
            **open_clip.get_model_config(profile.models["image"]["open_clip"])
        ).visual

    def count(m):
        return sum(p.numel() for p in m.parameters())

    assert committed["parameters"]["text tower"] == count(text) and committed["parameters"][
        "picture tower"
    ] == count(tower)
    assert committed["parameters"]["LLM, frozen"] == count(llm) - llm.embed_tokens.weight.numel()
    assert committed["parameters"]["LoRA"] == lora_size(
        profile.models["llm"]["config"], profile.params["llm"]["rank"]
    )


def test_the_committed_run_is_whole(root, committed):
    assert set(committed) == FIELDS and committed["profile"] == "paper" and committed["random_weights"]
    assert committed["peak_memory_mb"] < 24 * 1024 and all(
        t["steps"] == 2 and t["loss"] > 0 for t in committed["two_steps"].values()
    )
    assert committed["step"]["from_units"] == pytest.approx(committed["step"]["counted"], rel=0.05)


def test_the_committed_estimate_follows_from_the_profile(root, committed):
    """Whoever changes profiles/paper.yaml or the estimate makes the file again: `unirec doctor --profile
    paper --dry-run --out profiles/dry_run.json`."""
    profile, peaks = read_profile("paper", root), gpu_peaks(root / "profiles" / "gpus.yaml")
    assert committed["sizes"] == profile.sizes and committed["run"]["stages"] == pytest.approx(
        run_flops(committed["units"], profile.params, profile.sizes)
    )
    for name, hours in committed["hours"].items():
        assert hours == pytest.approx(
            committed["run"]["flops"] / (SHARE * peaks[name]["tflops"] * 1e12) / 3600
        )


@pytest.mark.parametrize(
    "words, message",
    [
        (["--items", "5"], "belong to --dry-run"),
        (["--dry-run", "--events", "0"], "--events 0: at least 1"),
        (["--dry-run", "--profile", "mini"], "has no `models`"),
        (["--profile", "papper"], "expected one of mini, paper, paper-tiny"),
        (["--root", "nowhere"], "no folder profiles/ there"),
        (
            ["--dry-run", "--profile", "paper-tiny", "--tokenizer", "/nope"],
            "--tokenizer /nope: there is no tokenizer.json",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(root, words, message, capsys, monkeypatch):
    monkeypatch.chdir(root)
    assert cli.main(["doctor", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith("unirec: error: ")


@pytest.fixture
def project(root, tmp_path):
    "A copy of what the doctor reads."
    for name in ("profiles", "requirements", "sets"):
        shutil.copytree(root / name, tmp_path / name)
    shutil.copy(root / "params.yaml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "the file is empty"),
        ("- a\n", "the file is a list"),
        ("title: {\n", "not YAML"),
        ("base: paper\nmemory: [{gbb: 9}]\n", "memory, line 1: gbb is not a field"),
    ],
)
def test_a_broken_profile_does_not_hide_the_others(project, text, message, capsys, monkeypatch):
    monkeypatch.setattr(
        "unirec.pipeline.profiles.weights_status", lambda uri, root: (False, "not looked for")
    )
    (project / "profiles" / "wrong.yaml").write_text(text)
    (project / "profiles" / "gpus.yaml").write_text("")
    assert cli.main(["doctor", "--root", str(project)]) == 0
    out = capsys.readouterr().out
    assert message in out.partition("Profile wrong: cannot be used")[2] and all(
        f"Profile {n}: {read_profile(n, project).title}" in out for n in ("mini", "paper", "paper-tiny")
    )
    assert cli.main(["doctor", "--root", str(project), "--profile", "wrong"]) == 2
    err = capsys.readouterr().err
    assert "profiles/wrong.yaml" in err and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "name, words", [("params.yaml", []), ("profiles/gpus.yaml", ["--dry-run", "--profile", "paper-tiny"])]
)
@pytest.mark.parametrize(
    "text, message", [("", "the file is empty"), ("- a\n", "the file is a list"), ("a: {\n", "not YAML")]
)
def test_a_broken_file_is_named(project, name, words, text, message, capsys):
    (project / name).write_text(text)
    assert cli.main(["doctor", "--root", str(project), *words]) == 2
    err = capsys.readouterr().err
    assert name in err and message in err and err.count("\n") == 1
