"""Scoring, evaluation and losses on another device than the CPU, on a machine without one (see
pretend_device.py): nothing is left behind, and the figures are the same."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pretend_device
import pytest
import torch

from unirec.data.schema import SetSpec
from unirec.encoders import catalogue
from unirec.evaluation.metrics import ranks
from unirec.model.events import Events, training_batches
from unirec.model.hierarchy import EncoderConfig
from unirec.model.llm import LLMConfig
from unirec.model.recommender import UniRec
from unirec.pipeline import evaluate
from unirec.pipeline.profiles import read_profile
from unirec.pipeline.workspace import random_models
from unirec.training.objective import LossConfig, step_loss

AWAY = pretend_device.DEVICE


def test_the_pretended_device_is_strict():
    with pretend_device.Pretend():
        x = torch.ones(2, 3).to(AWAY)
        assert x.device == AWAY and torch.equal((x + 1).cpu(), torch.full((2, 3), 2.0))
        assert torch.tensor([1, 2], device=x.device).sum().item() == 3
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(2, 3)
        with pytest.raises((RuntimeError, TypeError)):
            x.numpy()


@pytest.fixture(scope="module")
def toy(toy_project):
    "Folder, parameters and data of the toy run."
    folder, params = toy_project
    spec = SetSpec.from_params("toy", params["sets"]["toy"])
    return folder, params, catalogue.load(folder / "prepared" / "toy", folder / "embeddings" / "toy", spec)


@pytest.fixture(scope="module")
def plain(root, tmp_path_factory, toy):
    "The paper's form over a stand-in of Qwen3, in float32, and its settings."
    tiny, folder = read_profile("paper-tiny", root), tmp_path_factory.mktemp("plain")
    uri = random_models({"llm": tiny.models["llm"]}, folder, ["which item will the customer choose next?"])[
        "llm.uri"
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIREC_CACHE", str(folder / "cache"))
        torch.manual_seed(0)
        yield (
            lambda: UniRec(
                toy[2].catalogue,
                EncoderConfig(**tiny.params["model"], use_id=True),
                LLMConfig(**tiny.params["llm"] | {"uri": uri, "dtype": "float32"}),
            ),
            tiny.params,
        )


def test_ranks_and_losses_of_the_papers_form(toy, plain):
    folder, params, data = toy
    make, settings = plain
    h, targets, candidates, _ = catalogue.load_test(folder / "prepared" / "toy", data)
    model = make().eval()
    batch = training_batches(data.train, Events.of(data.train), model.config.history, 4, 8, 0, 0)[0]

    def losses(m, b):
        torch.manual_seed(0)
        with torch.no_grad():
            return float(step_loss(m, b, LossConfig(**settings["finetune"]["loss"]))["loss"])

    here, loss, share = (
        ranks(model.scorer(), h, targets, candidates),
        losses(model, batch),
        evaluate.llm_share(model, h, targets),
    )
    with pretend_device.Pretend():
        away = model.to(AWAY)
        assert {v.device for v in away.state_dict().values()} == {AWAY} == {away.catalogue.mask.device}
        there = ranks(away.scorer(), h, targets, candidates)
        assert losses(away, {k: v.to(AWAY) for k, v in batch.items()}) == pytest.approx(loss, rel=1e-4)
        assert (
            evaluate.llm_share(away, h, targets)["mrr"] == pytest.approx(share["mrr"], abs=2e-2)
            and share["norm_share"] == 1.0
        )
    for protocol in here:
        assert np.mean(np.abs(here[protocol] - there[protocol]) > 0.5) < 0.05, (
            "more than ties that fell the other way"
        )


def test_the_whole_evaluation_on_another_device(toy, tmp_path, monkeypatch):
    "The stage's function writes the same files; opponents stay where they are trained."
    folder, params, data = toy
    monkeypatch.setattr(evaluate, "pick_device", lambda: AWAY)
    with pretend_device.Pretend():
        table = evaluate.evaluate(
            data,
            folder / "prepared" / "toy",
            folder / "models" / "toy",
            folder / "data" / "toy",
            params,
            tmp_path / "results",
            tmp_path / "predictions",
        )
    known = pd.read_csv(folder / "results" / "toy" / "comparison.csv")
    both = table.merge(known, on=["dataset", "model", "seed", "protocol", "metric"], suffixes=("", "_cpu"))
    assert len(both) == len(known) and (both.value - both.value_cpu).abs().max() < 0.03
    assert {p.name for p in (tmp_path / "results").iterdir()} == {
        p.name for p in (folder / "results" / "toy").iterdir()
    }
    told = [
        json.loads((f / "llm_share.json").read_text())
        for f in (tmp_path / "results", Path(folder) / "results" / "toy")
    ]
    assert told[0].keys() == told[1].keys()
