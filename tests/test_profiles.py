"""The paper's profile: `paper-tiny`, its classes and switches at tiny widths, goes through all seven stages.

What the stages wrote says what was used.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from unirec.cli import main
from unirec.core.device import Machine
from unirec.core.params import read_params
from unirec.model.llm import LORA_MODULES
from unirec.pipeline.profiles import read_profile
from unirec.pipeline.runner import STAGES
from unirec.pipeline.workspace import random_models

DATASET, LIMIT = "sample", 1800  # seconds: only against hanging
FORMS = ("unirec_paper", "unirec_id")
MODELS = {*FORMS, "popularity", "markov", "itemknn", "mean_vectors", "sasrec"}


def state_of(root: Path) -> dict[str, bytes | None]:
    "What a run of another profile must not touch."
    kept = [
        root / "params.yaml",
        *(root / "sets").glob("*"),
        root / "dvc.yaml",
        root / "dvc.lock",
        root / "data.dvc",
        *(root / "results").rglob("*"),
        *(root / "nbs" / "stages").glob("*"),
    ]
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(kept) if p.is_file()} | {
        name: (root / name).exists() for name in ("runs", "reports", "weights")
    }


def repro(root: Path, folder: Path, *words: str) -> str:
    """What `make repro PROFILE=paper-tiny` prints, in a workspace elsewhere.

    The test fails with it when the command does.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "DVC_", "JUPYTER_", "XDG_"))} | {
        "PYTHONPATH": str(root),
        "HOME": str(folder.parent),
        "DVC_SITE_CACHE_DIR": str(folder.parent / "dvc"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
    command = [
        sys.executable,
        "-m",
        "unirec.cli",
        "profile",
        "paper-tiny",
        "--root",
        str(root),
        "--folder",
        str(folder),
        *words,
    ]
    done = subprocess.run(
        command,
        cwd=folder.parent,
        env=env,
        text=True,
        errors="replace",
        timeout=LIMIT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def tiny(root, tmp_path_factory) -> tuple[Path, str]:
    "The workspace after one run, and what was printed."
    folder = tmp_path_factory.mktemp("profiles") / "tiny"
    before = state_of(root)
    output = repro(root, folder)
    assert state_of(root) == before, "a profile's run changed the checkout"
    return folder, output


def read(folder: Path, *parts: str):
    "A JSON file of the workspace."
    return json.loads(folder.joinpath(*parts).read_text())


@pytest.mark.slow
def test_all_seven_stages_ran(tiny):
    folder, output = tiny
    assert set(re.findall(r"^Running stage '([^']+)'", output, re.M)) == {
        f"{s}@{DATASET}" for s in STAGES if s != "report"
    } | {"report"}
    table = pd.read_csv(folder / "results" / DATASET / "comparison.csv")
    assert set(table.model) == MODELS and table[table.metric != "targets"].value.between(0, 1).all()
    assert "The page of results" in output


@pytest.mark.slow
def test_it_says_that_the_weights_are_random(tiny):
    folder, output = tiny
    assert "the weights are RANDOM" in output and "WARNING: there is no GPU" not in output
    page = (folder / "reports" / "index.html").read_text(encoding="utf8")
    assert "random weights, the figures mean nothing" in page and "read by random weights" in page
    assert all((p / "RANDOM_WEIGHTS.json").exists() for p in (folder / "weights").iterdir())


@pytest.mark.slow
def test_what_ran_is_what_the_profile_says(tiny, root):
    folder, _ = tiny
    expected = read_profile("paper-tiny", root).params
    params = read_params(folder)
    assert params["model"] == expected["model"] and params["finetune"] == expected["finetune"]
    run = read(folder, "reports", "runs", DATASET, "run_finetune.json")["params"]
    assert (
        run["model"] == params["model"]
        and run["llm"] == params["llm"]
        and run["finetune"] == params["finetune"]
    )
    assert (
        run["llm"]["query"],
        run["llm"]["form"],
        run["llm"]["adapt"],
        run["llm"]["rank"],
        run["llm"]["alpha"],
    ) == ("llm", "plain", "lora", 16, 32)
    assert not any(run["model"][k] for k in ("residual", "recent", "condition", "again", "learn_temperature"))
    for _, (notebook, _) in list(STAGES.items())[:-1]:
        cells = nbformat.read(folder / "reports" / DATASET / f"{notebook}.ipynb", as_version=4).cells
        assert not [o for c in cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]


@pytest.mark.slow
def test_the_towers_were_qwen3_and_open_clip(tiny):
    """Last-token pooling, the instruction before reviews alone, and the vision transformer of the
    profile's width."""
    folder, _ = tiny
    params, manifest = (
        read_params(folder),
        read(folder, "embeddings", DATASET, "manifest.json"),
    )
    text, review, image = (manifest["encoders"][n] for n in ("text", "review", "image"))
    assert (
        text["pooling"] == review["pooling"] == "last"
        and text["encoder"] == review["encoder"] == params["encode"]["text"]
    )
    assert review["instruction"] == params["encode"]["query_instruction"] != "" and "instruction" not in text
    assert image["preprocessing"] == "open_clip" and image["encoder"] == params["encode"]["image"]
    assert read(folder, params["encode"]["text"], "config.json")["model_type"] == "qwen3"
    vectors = load_file(folder / "embeddings" / DATASET / "vectors.safetensors")
    widths = {
        read(folder, params["encode"]["text"], "config.json")["hidden_size"],
        read(folder, params["encode"]["image"], "open_clip_config.json")["model_cfg"]["embed_dim"],
    }
    assert widths <= {v.shape[-1] for v in vectors.values()} and all(
        torch.isfinite(v.float()).all() for v in vectors.values() if v.is_floating_point()
    )


@pytest.mark.slow
def test_the_vectors_are_those_of_the_towers(tiny):
    "One review and one title, encoded again by hand: the last token's state, behind the instruction or not."
    from transformers import AutoModel, AutoTokenizer

    folder, _ = tiny
    params = read_params(folder)
    at = folder / params["encode"]["text"]
    tokenizer, model = (
        AutoTokenizer.from_pretrained(at),
        AutoModel.from_pretrained(at, dtype=torch.float32).eval(),
    )
    assert type(model).__name__ == "Qwen3Model"
    from unirec.encoders.towers import TextEncoder

    encoder = TextEncoder(str(at), pooling=params["encode"]["pooling"]).with_instruction(
        params["encode"]["query_instruction"]
    )
    ids = tokenizer(params["encode"]["query_instruction"] + "it broke")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    with torch.no_grad():
        state = model(torch.tensor([ids])).last_hidden_state[0, -1]
    ours = torch.as_tensor(encoder(["it broke"])[0])
    assert torch.cosine_similarity(ours, state, dim=0) > 0.9999
    assert (
        torch.cosine_similarity(ours, torch.as_tensor(TextEncoder(str(at))(["it broke"])[0]), dim=0) < 0.999
    ), "the instruction changes nothing"


@pytest.mark.slow
def test_the_llm_was_a_qwen3_with_lora_and_the_better_epoch_was_kept(tiny):
    folder, _ = tiny
    params = read_params(folder)
    config, cached = (
        read(folder, params["llm"]["uri"], "config.json"),
        [json.loads(p.read_text()) for p in (folder / "cache").glob("llm-*/config.json")],
    )
    assert [c["model_type"] for c in cached] == ["qwen3"] and cached[0]["num_hidden_layers"] == config[
        "num_hidden_layers"
    ]
    frozen = load_file(next((folder / "cache").glob("llm-*/model.safetensors")))
    assert {"layers.0.self_attn.q_norm.weight", "layers.0.self_attn.k_norm.weight"} <= set(frozen), (
        "Qwen2 and Llama have no such norms"
    )
    curves = pd.read_csv(folder / "results" / DATASET / "curves.csv")
    for name in FORMS:
        state = load_file(folder / "models" / DATASET / "finetune" / f"{name}.safetensors")
        lora = {k: v for k, v in state.items() if ".lora_B." in k}
        assert {k.split(".lora_B.")[0].rpartition(".")[2] for k in lora} == set(LORA_MODULES) and len(
            lora
        ) == 7 * config["num_hidden_layers"]
        log = curves[(curves.model == name) & (curves.stage == "finetune")].sort_values("epoch")
        assert len(log) == 2 and log.loss.iloc[1] > 0, "one epoch after the start"
        # what is better on valid is kept: after the epoch, or the start, whose adapters are zero
        learned = bool(log.mrr.iloc[1] > log.mrr.iloc[0])
        assert all(v.shape[1] == 16 and bool(v.abs().max() > 0) == learned for v in lora.values()), (
            f"valid MRR {log.mrr.tolist()}: the weights are not those of the better epoch"
        )
        assert not [
            k
            for k in state
            if k in ("gate", "again", "llm.query") or k.startswith(("users.recent", "users.start"))
        ], "what the paper's form does not have"
        start = load_file(folder / "models" / DATASET / "pretrain" / f"{name}.safetensors")
        assert (
            not [k for k in start if k.startswith("llm.")]
            and torch.equal(start["items.head.weight"], state["items.head.weight"]) != learned
        )
    for share in read(folder, "results", DATASET, "llm_share.json").values():
        assert share["norm_share"] == 1.0 and share["gate"] is None


@pytest.mark.slow
def test_a_second_run_has_nothing_to_do(tiny, root):
    folder, _ = tiny
    output = repro(root, folder)
    assert "Running stage" not in output and "up to date" in output


# the file of the paper's profile


def test_the_shapes_are_those_that_were_published(root):
    """Parameters as the model cards say: 0.6 billion, 0.44 of them without the words.

    CLIP ViT-L/14's picture tower 304 million.
    """
    import open_clip
    from transformers import Qwen3Config, Qwen3ForCausalLM

    models = read_profile("paper", root).models
    for name in ("text", "llm"):
        with torch.device("meta"):
            net = Qwen3ForCausalLM(Qwen3Config(**models[name]["config"]))
        whole, words = sum(p.numel() for p in net.parameters()), net.model.embed_tokens.weight.numel()
        assert round(whole / 1e9, 1) == 0.6 and round((whole - words) / 1e9, 2) == 0.44
    with torch.device("meta"):
        tower = open_clip.model.CLIP(**open_clip.get_model_config(models["image"]["open_clip"])).visual
    assert round(sum(p.numel() for p in tower.parameters()) / 1e6) == 304


def test_the_picture_tower_has_the_activation_that_it_was_trained_with(root):
    "OpenAI's weights are QuickGELU's; under the name ViT-L-14 open_clip would build GELU around them."
    import open_clip

    profile = read_profile("paper", root)
    model, _, tag = profile.params["encode"]["image"].removeprefix("open_clip:").partition("/")
    assert profile.models["image"]["open_clip"] == model
    assert open_clip.get_model_config(model).get("quick_gelu", False) == open_clip.get_pretrained_cfg(
        model, tag
    ).get("quick_gelu", False)


def test_histories_a_step_are_the_same_on_every_device(root):
    profile = read_profile("paper", root)
    assert [line["gb"] for line in profile.memory] == sorted(
        (line["gb"] for line in profile.memory), reverse=True
    ) and profile.memory[-1]["gb"] == 0
    for line in profile.memory:
        params = profile.fitted(Machine("cuda", ("one",), line["gb"] + 1, 64.0, 8, 500.0, True))
        assert [
            params[s]["batch"]["size"] * params[s]["fit"]["accumulate"] for s in ("pretrain", "finetune")
        ] == [64, 16]


def test_every_value_of_the_paper_has_a_source(root):
    "A line under `params` that sets a value ends with where it comes from."
    lines = (
        (root / "profiles" / "paper.yaml").read_text().split("\nparams:\n")[1].split("\n\n")[0].splitlines()
    )
    bare = [
        line
        for line in lines
        if not line.rstrip().endswith(":")
        and not re.search(r"# .*(\[[PSCM, ]+\]|\[ours\]|all 28|printed)", line)
    ]
    assert not bare


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "title: x\nbase: paper\nparams: {model: {widht: 3}}\n",
            "profiles/wrong.yaml: model.widht is not a name of params.yaml",
        ),
        (
            "title: x\nbase: paper\nparams: {llm: {rank: many}}\n",
            "llm.rank is a text ('many'), expected a number as 16",
        ),
        ("title: x\nbase: paper\nparams: {}\nmodel: {}\n", "profiles/wrong.yaml: model is not a field"),
        ("title: x\nbase: wrong\nparams: {}\n", "leads back to itself"),
        ("title: x\nparams: {}\n", "profiles/wrong.yaml: memory is missing"),
        ("", "profiles/wrong.yaml: expected a mapping of names to values, the file is empty"),
        ("- a\n", "wrong.yaml: expected a mapping of names to values, the file is a list"),
        ("title: {\n", "wrong.yaml, row 2: not YAML"),
        ("base: papper\n", "profiles/wrong.yaml: base 'papper', expected one of paper, wrong"),
        (
            "base: paper\nparams: {datasets: [nope]}\n",
            "profiles/wrong.yaml: params.datasets is ['nope'], expected some of the sets",
        ),
        ("base: paper\nmemory: [{gb: 9999, set: {}}]\n", "profiles/wrong.yaml: memory has no line for"),
        ("base: paper\nmemory: [{gbb: 9}]\n", "profiles/wrong.yaml: memory, line 1: gbb is not a field"),
        ("base: paper\nneeds: {}\n", "profiles/wrong.yaml: needs: gpu_gb is missing"),
    ],
)
def test_a_wrong_profile_is_one_line(root, tmp_path, capsys, text, message):
    (tmp_path / "profiles").mkdir()
    for name in ("params.yaml", "profiles/paper.yaml"):
        (tmp_path / name).write_text((root / name).read_text())
    shutil.copytree(root / "sets", tmp_path / "sets")
    (tmp_path / "profiles" / "wrong.yaml").write_text(text)
    assert main(["profile", "wrong", "--root", str(tmp_path), "--only-make"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_make_knows_the_profiles(root):
    made = (root / "Makefile").read_text()
    assert 'exec python -m unirec.cli profile "$(PROFILE)" $(ARGS)' in made and "not there yet" not in made
    assert (
        "/runs" in (root / ".gitignore").read_text().split()
        and "/runs" in (root / ".dvcignore").read_text().split()
    )


def test_stand_ins_draw_by_seed(root, tmp_path):
    models = {"llm": read_profile("paper-tiny", root).models["llm"]}
    one, two, three = (
        load_file(
            Path(random_models(models, tmp_path / f, ["a mug"], seed=s)["llm.uri"]) / "model.safetensors"
        )
        for f, s in (("a", 0), ("b", 0), ("c", 1))
    )
    assert all(torch.equal(one[k], two[k]) for k in one) and any(
        not torch.equal(one[k], three[k]) for k in one
    )
