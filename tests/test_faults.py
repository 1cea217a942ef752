"""The thirteen faults of the authors' released code: each test fails if its fault comes back."""

import ast
import builtins
import dataclasses
import dis
import importlib
import io
import json
import re
import shutil
import types
import zlib
from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from unirec.core.params import read_params
from unirec.data.histories import Histories, windows
from unirec.data.schema import Schema, SetSpec
from unirec.data.splits import sample_candidates
from unirec.encoders.catalogue import load, load_catalogue, toy_catalogue
from unirec.encoders.image_towers import read_picture
from unirec.encoders.modalities import TABLES, fourier
from unirec.encoders.store import build_store
from unirec.evaluation.metrics import candidate_ranks, validation_figures
from unirec.model.events import Events, last_batches, training_batches
from unirec.model.forms import model_settings
from unirec.model.hierarchy import EncoderConfig
from unirec.model.llm import LLMConfig
from unirec.model.recommender import UniRec
from unirec.model.triplets import TripletConfig, TripletEncoder
from unirec.pipeline import stages as steps

DAY = 86_400_000  # ms
HISTORY = 5  # events that the small model reads
MODELS = {"unirec", "unirec_id", "popularity", "markov", "itemknn", "mean_vectors", "sasrec"}


@pytest.fixture(scope="module")
def catalogue():
    "Six made-up items: 0 title, 1 brand, 2 picture (not of item 1), 3 price, 4 rating, 5 item_id."
    return toy_catalogue()


@pytest.fixture(scope="module")
def model(catalogue):
    """A small UniRec with the real LLM's first two layers, in float32 and with the LLM's output at full
    weight; not to be changed."""
    torch.manual_seed(0)
    encoder = EncoderConfig(
        width=16, out=16, layers=1, heads=2, item_tokens=2, user_tokens=2, dropout=0.0, history=HISTORY
    )
    return (
        UniRec(catalogue, encoder, LLMConfig(layers=2, rank=4, alpha=8, dropout=0.0, gate=1.0)).float().eval()
    )


def histories(items, times=None, n_items=6):
    "Histories from one list of items per user; an event a day where no times (days) are given."
    times = times or [range(len(events)) for events in items]
    rows = [
        (user, item, int((20_000 + day) * DAY), 4.0)
        for user, events in enumerate(items)
        for item, day in zip(events, times[user], strict=True)
    ]
    return Histories.from_frame(
        pd.DataFrame(rows, columns=["user", "item", "timestamp", "rating"]), len(items), n_items
    )


def batch_of(h, *users):
    "The evaluation's batch of some users."
    return last_batches(h, Events.of(h), HISTORY, np.array(users))[0]


@torch.no_grad()
def queries(model, h, *users):
    "Query embeddings (B, out) of some users, in one batch."
    return model.query(model.items(model.catalogue), batch_of(h, *users))[:, 0]


def changed(a, b):
    "Largest difference of two tensors."
    return float((a - b).abs().max())


def stand_in(width, calls=None):
    "A tower without weights: one vector per value, drawn by a seed that the value gives."

    def tower(values):
        if calls is not None:
            calls.extend(values)
        seeds = [zlib.crc32(v if isinstance(v, bytes) else v.encode()) for v in values]
        return (
            np.stack([np.random.default_rng(s).normal(size=width) for s in seeds]).astype(np.float32)
            if seeds
            else np.zeros((0, width), np.float32)
        )

    return tower


SCHEMA = Schema.from_params(
    {"title": {"type": "text"}, "price": {"type": "number"}, "picture": {"type": "image"}}
)


def png(colour):
    "The bytes of a small picture."
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shop(tmp_path):
    """Five items: one lacks its price, one has the price 0, one's picture is broken, one's is not there,
    one has none."""
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / "b.png").write_bytes(png("teal"))
    (tmp_path / "broken.png").write_bytes(png("blue")[:40])
    items = pd.DataFrame(
        {
            "item_id": list("abcde"),
            "title": ["pot", "pan", "cup", "jug", "tin"],
            "price": [1.0, np.nan, 0.0, 5.0, 9.0],
            "picture": ["a.png", "b.png", "broken.png", "absent.png", None],
        }
    )
    manifest = build_store(
        items,
        np.ones(5, bool),
        SCHEMA,
        [],
        {"text": stand_in(8), "image": stand_in(6)},
        tmp_path,
        tmp_path / "store",
    )
    return items, load_catalogue(tmp_path / "store", items, SCHEMA)[0], manifest, tmp_path / "store"


def has(catalogue, item, name):
    "Does an item have a triplet of this attribute?"
    return bool((catalogue.mask[item] & (catalogue.attr[item] == catalogue.attributes.index(name))).any())


def functions_of(code):
    "A code object and all that are defined in it."
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from functions_of(inner)


def dvc_stage(root, name):
    "One stage of dvc.yaml."
    return yaml.safe_load((root / "dvc.yaml").read_text())["stages"][name]


def train_again(toy_project, folder, seed, tables):
    "Stage 1 on a copy of the toy that has only the given tables; the folder of its checkpoints."
    project, params = toy_project
    (folder / "prepared").mkdir()
    for name in tables:
        shutil.copy(project / "prepared" / "toy" / name, folder / "prepared" / name)
    spec = SetSpec.from_params("toy", params["sets"]["toy"])
    steps.pretrain(
        load(folder / "prepared", project / "embeddings" / "toy", spec),
        params | {"seed": seed},
        folder,
    )
    return folder


@pytest.fixture(scope="module")
def without_test_file(toy_project, tmp_path_factory):
    "Stage 1 of the toy where there is no test file and no list of candidates."
    return train_again(
        toy_project,
        tmp_path_factory.mktemp("no_test"),
        0,
        ("items.parquet", "train.parquet", "valid.parquet"),
    )


# 1


def test_fault_01_everything_imports(root):
    "The released commands fail on import, and the triplet encoder uses undefined names."
    exported = set()
    for path in (root / "nbs").rglob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf8"))["cells"]:
            if found := re.match(r"#\|\s*default_exp\s+(\S+)", "".join(cell["source"])):
                exported.add(found[1])
    modules = [p.relative_to(root / "unirec").with_suffix("").parts for p in (root / "unirec").rglob("*.py")]
    assert exported == {".".join(parts) for parts in modules if parts[-1] not in ("__init__", "_modidx")}
    undefined = []
    for name in sorted(exported):
        module = importlib.import_module(f"unirec.{name}")
        known = {*vars(module), *vars(builtins)}
        whole = compile(
            (root / "unirec" / f"{name.replace('.', '/')}.py").read_text(encoding="utf8"), name, "exec"
        )
        for code in functions_of(whole):
            undefined += [
                f"{name}: {i.argval}"
                for i in dis.get_instructions(code)
                if i.opname == "LOAD_GLOBAL" and i.argval not in known
            ]
    assert not undefined


@pytest.mark.parametrize("part", ["names", "types"])
def test_fault_01_the_triplet_is_on_the_path(model, catalogue, part):
    "Nothing imports the released triplet encoder: the code that trains has no triplet."
    other = dataclasses.replace(catalogue, **{part: getattr(catalogue, part).clone()})
    getattr(other, part)[catalogue.attributes.index("picture")] += 3.0
    h = histories([[0, 2, 3], [1, 4]])
    with torch.no_grad():
        before, after = model.items(catalogue), model.items(other)
    assert all(changed(before[i], after[i]) > 1e-3 for i in (0, 2, 3, 4, 5))
    assert changed(before[1], after[1]) == 0, "item 1 has no picture"
    scores = model.scorer()(h, np.arange(2))
    model_after = deepcopy(model)
    model_after.catalogue = other
    assert changed(scores, model_after.scorer()(h, np.arange(2))) > 1e-3


# 2


def test_fault_02_user_tokens_reach_the_llm(model, catalogue):
    "The released user Q-Former never reaches the LLM."
    batch = batch_of(histories([[0, 2, 3], [1, 4]]), 0, 1)
    tokens = model.items(catalogue).detach()

    def spoken(net):
        return net.parts(tokens, batch)[1]

    other = deepcopy(model)
    for p in model.parameters():
        p.grad = None
    with torch.no_grad():
        for p in other.users.qformer.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        assert changed(spoken(model), spoken(other)) > 1e-4
        history, users = tokens[batch["items"]], torch.randn(2, 1, 2, 16)
        heard = [model.llm(history, u, batch["present"], batch["positions"]) for u in (users, -users)]
    assert changed(*heard) > 1e-4, "the LLM's output does not depend on the user tokens it is given"
    other.zero_grad()
    spoken(other).square().sum().backward()
    silent = [
        n
        for n, p in other.users.qformer.named_parameters()
        if p.ndim > 1 and (p.grad is None or not p.grad.abs().sum() > 0)
    ]
    assert not silent, f"the LLM's output does not train {silent}"
    assert (
        changed(
            queries(model, histories([[0, 2, 3]]), 0),
            model.query(tokens, batch_of(histories([[0, 2, 3]]), 0), with_llm=False)[:, 0].detach(),
        )
        > 1e-4
    )


# 3


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_fault_03_training_stages_cannot_open_the_test_file(root, stage):
    "The released code chooses the best checkpoint on the test file."
    secret = [
        "prepared/${item.dataset}/test.parquet",
        "prepared/${item.dataset}/candidates.npy",
        "data/${item.dataset}",
        "downloads/${item.dataset}",
        "predictions/${item.dataset}",
        "results/${item.dataset}",
    ]
    for dep in dvc_stage(root, stage)["deps"]:
        inside = [s for s in secret if f"{s}/".startswith(f"{dep.rstrip('/')}/") or dep.startswith(f"{s}/")]
        assert not inside, f"{stage} depends on {dep}, which holds {inside}"


def test_fault_03_training_needs_no_test_file(toy_project, without_test_file, monkeypatch):
    "Weights are the same, to the bit, whether the test file is there or not, and `load` opens none."
    for name in ("unirec", "unirec_id"):
        with_file = (toy_project[0] / "models" / "toy" / "pretrain" / f"{name}.safetensors").read_bytes()
        assert (without_test_file / f"{name}.safetensors").read_bytes() == with_file
    opened, read = [], pd.read_parquet
    monkeypatch.setattr(
        pd, "read_parquet", lambda path, *a, **k: opened.append(str(path)) or read(path, *a, **k)
    )
    project, params = toy_project
    data = load(
        project / "prepared" / "toy",
        project / "embeddings" / "toy",
        SetSpec.from_params("toy", params["sets"]["toy"]),
    )
    assert opened and not [path for path in opened if "test" in path.rsplit("/", 1)[1]]
    assert {f.name for f in dataclasses.fields(data)} == {"spec", "items", "catalogue", "train", "valid"}
    valid = read(project / "prepared" / "toy" / "valid.parquet")
    assert np.array_equal(data.valid_targets, valid.item.to_numpy())


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_fault_03_the_best_epoch_is_the_best_on_valid(toy_project, stage):
    "The MRR that chose the saved weights is theirs on the valid items, given train alone."
    project, params = toy_project
    data = load(
        project / "prepared" / "toy",
        project / "embeddings" / "toy",
        SetSpec.from_params("toy", params["sets"]["toy"]),
    )
    for name in params["forms"]:
        folder = project / "models" / "toy" / stage
        log = json.loads((folder / f"{name}.log.json").read_text())
        llm = LLMConfig(**params["llm"]) if stage == "finetune" else None
        net = UniRec(data.catalogue, EncoderConfig(**model_settings(params, name)["model"]), llm).restore(
            folder / f"{name}.safetensors"
        )
        assert max(row["mrr"] for row in log) == pytest.approx(
            validation_figures(net.scorer(), data.train, data.valid_targets)["mrr"], abs=1e-6
        )
        assert [row["mrr"] for row in log if row["best"]] == [max(row["mrr"] for row in log)]


# 4


def test_fault_04_the_most_recent_events_are_kept(model):
    "Of 20 history items the released code keeps the oldest 10."
    items = [0, 1, 2, 3, 4, 5, 0, 1, 2]
    h = histories([items])
    assert h.items[h.last(HISTORY)[0]].tolist() == items[-HISTORY:]
    assert batch_of(h, 0)["items"][0].tolist() == items[-HISTORY:]
    now = queries(model, h, 0)
    assert changed(now, queries(model, histories([[5, 5, 5, 5, *items[4:]]]), 0)) == 0, (
        "older events than the window do not count"
    )
    assert changed(now, queries(model, histories([[*items[:-1], 5]]), 0)) > 1e-4, "the last event counts"
    targets = [h.items[w[w >= 0][1:]].tolist() for w in windows(h, HISTORY)]
    assert sum(targets, []) == items[1:] and len(targets[-1]) == HISTORY, (
        "every event but the first is learned from"
    )


# 5


def test_fault_05_padding_changes_nothing(model):
    "Released mean pooling counts padding."
    h = histories([[3, 1], [0, 2, 4, 5, 1], [2]], [[0, 2], [0, 1, 4, 9, 11], [3]])
    together = queries(model, h, 0, 1, 2)
    alone = torch.cat([queries(model, h, u) for u in range(3)])
    assert batch_of(h, 0)["items"].shape[1] == 2 and batch_of(h, 0, 1)["items"].shape[1] == 5
    assert changed(together, alone) < 1e-5
    batch = batch_of(h, 0, 1, 2)
    filled = batch | {
        "items": torch.where(batch["present"], batch["items"], 5),
        "time": torch.where(batch["present"][..., None], batch["time"], 9.0),
    }
    with torch.no_grad():
        assert changed(model.query(model.items(model.catalogue), filled)[:, 0], together) < 1e-5, (
            "what stands in padded places does not matter"
        )


def test_fault_05_prompts_have_their_own_length(model):
    "The released code pads every prompt to 512."
    h, lengths = histories([[3, 1], [0, 2, 4, 5, 1]]), []
    hook = model.llm.body.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        queries(model, h, 0), queries(model, h, 1)
    finally:
        hook.remove()
    constant, branch = len(model.llm.prompt), model.config.user_tokens + 1
    assert lengths == [constant + 2 + branch, constant + 5 + branch]
    many = histories([[i % 6 for i in range(n)] for n in (3, 3, 3, 9, 9)])
    for batch in training_batches(many, Events.of(many), HISTORY, 2, 2, 0, 0):
        assert batch["items"].shape[1] == int(batch["present"].sum(1).max())


# 6


def test_fault_06_negatives_are_seeded_distinct_and_untouched(toy_project):
    "Released negatives are unseeded and can hold the user's test item."
    touched = [np.arange(u, u + 20) for u in range(30)]
    targets = np.array([t[-1] for t in touched])
    users = np.repeat(np.arange(30), 20)

    def sampled(seed):
        return next(sample_candidates(users, np.concatenate(touched), np.arange(30), targets, 125, seed=seed))

    drawn = sampled(3)
    assert drawn.shape == (30, 100) and np.array_equal(drawn[:, 0], targets)
    assert np.array_equal(drawn, sampled(3))
    assert not np.array_equal(drawn, sampled(4))
    for row, seen in zip(drawn, touched, strict=True):
        assert len(set(row)) == 100 and not set(row[1:]) & set(seen)
    folder = toy_project[0] / "prepared" / "toy"
    events = pd.concat([pd.read_parquet(folder / f"{part}.parquet") for part in ("train", "valid", "test")])
    written, seen = np.load(folder / "candidates.npy"), events.groupby("user").item.agg(set)
    assert all(
        not set(row[1:].tolist()) & seen[user] and len(set(row)) == len(row)
        for user, row in enumerate(written)
    )
    assert np.array_equal(written[:, 0], pd.read_parquet(folder / "test.parquet").item)


def test_fault_06_all_negatives_are_used():
    "Of its negatives the released code uses only the first 10."
    candidates = np.arange(100)[None]
    h = histories([[100, 101]], n_items=102)
    scores = np.full((1, 102), -1.0, np.float32)
    scores[0, 0] = 0.0

    def rank():
        return candidate_ranks(lambda h, users: scores, h, candidates)[0]

    assert rank() == 1
    for place in (99, 50, 10, 1):
        scores[0, place] = 1.0
        before, scores[0, place] = rank(), -1.0
        assert before == 2, f"the candidate at {place} does not compete"
    scores[0, 1:100] = 1.0
    assert rank() == 100


# 7


def test_fault_07_missing_numbers_are_masked_in_training_and_inference(shop):
    "Released missing numbers become 0.0, unmasked in training and masked in inference."
    _, catalogue, _, _ = shop
    assert [has(catalogue, i, "price") for i in range(5)] == [
        True,
        False,
        True,
        True,
        True,
    ], "a missing price is not there; a price of 0 is"
    encoder = TripletEncoder(catalogue, TripletConfig(8, attribute_dropout=0.0, value_dropout=0.0))
    masks = {training: encoder.train(training)(catalogue)[1] for training in (True, False)}
    attr = catalogue.attr[:, : masks[True].shape[1]]
    for mask in masks.values():
        assert not (mask[1] & (attr[1] == catalogue.attributes.index("price"))).any()
    assert torch.equal(*masks.values())
    assert len(catalogue.tables["number"]) == 4, "one vector for each price that is there"


def test_fault_07_a_missing_number_has_no_features(shop):
    "NaN is refused where a number is encoded, and takes no part in the scale."
    for missing in (np.nan, np.inf):
        with pytest.raises(ValueError, match="mask"):
            fourier(np.array([1.0, missing]))
    _, catalogue, _, _ = shop
    assert all(torch.isfinite(table).all() for table in catalogue.tables.values())


# 8


def test_fault_08_a_broken_picture_is_listed_and_masked(shop):
    "In the released code a failed image silently becomes a zero vector."
    _, catalogue, manifest, store = shop
    assert set(manifest["pictures_left_out"]) == {"broken.png", "absent.png"} and all(
        manifest["pictures_left_out"].values()
    )
    assert (
        json.loads((store / "manifest.json").read_text())["pictures_left_out"]
        == manifest["pictures_left_out"]
    )
    assert [has(catalogue, i, "picture") for i in range(5)] == [True, True, False, False, False]
    with safe_open(store / "vectors.safetensors", "pt") as f:
        vectors = f.get_tensor("table.image")
    assert len(vectors) == 2 and (vectors.norm(dim=1) > 0).all()
    with pytest.raises(ValueError, match="picture"):
        read_picture(b"no picture")


# 9


def test_fault_09_reordered_items_are_refused(shop):
    "The released embedding cache is validated by field names only: reordered items load wrong vectors."
    items, _, _, store = shop
    load_catalogue(store, items.copy(), SCHEMA)
    other = {
        "reversed": items.iloc[::-1].reset_index(drop=True),
        "fewer": items.iloc[:4],
        "renamed": items.assign(title=[*"vwxyz"]),
        "priced": items.assign(price=items.price + 1),
    }
    for table in other.values():
        with pytest.raises(ValueError, match="another items table"):
            load_catalogue(store, table, SCHEMA)
    with pytest.raises(ValueError, match="schema"):
        load_catalogue(store, items, Schema(tuple(SCHEMA)[::-1]))


# 10


def test_fault_10_times_are_the_interactions_own(model, toy_project):
    "Released timestamps are the item's first review, not the interaction's."
    h = histories([[0, 2], [0, 2]], [[0, 1], [300, 450]])
    time = Events.of(h).time
    assert changed(time[0], time[2]) > 0.05 and changed(time[1], time[3]) > 0.05
    assert changed(queries(model, h, 0), queries(model, h, 1)) > 1e-4, (
        "two users with the same items at other times"
    )
    folder = toy_project[0]
    raw = pd.read_json(folder / "data" / "toy" / "Sample.jsonl", lines=True, convert_dates=False)
    expected = set(zip(raw.user_id, raw.parent_asin, raw.timestamp.astype("int64")))
    users, items = (pd.read_parquet(folder / "prepared" / "toy" / f"{n}.parquet") for n in ("users", "items"))
    assert raw.groupby("parent_asin").timestamp.nunique().max() > 1
    for part in ("train", "valid", "test"):
        events = pd.read_parquet(folder / "prepared" / "toy" / f"{part}.parquet")
        assert (
            set(zip(users.user_id[events.user], items.item_id[events.item], events.timestamp)) <= expected
        ), part


# 11


@pytest.mark.parametrize("kind", TABLES)
def test_fault_11_every_modality_reaches_the_scored_item(model, catalogue, kind):
    "Released candidates are text-only vectors: images and numbers never reach the scored item."
    item, slot = 3, {"text": 0, "image": 2, "number": 3}[kind]
    other = dataclasses.replace(catalogue, value=catalogue.value.clone())
    other.value[item, slot] = catalogue.value[item - 1, slot]
    assert other.value[item, slot] != catalogue.value[item, slot]
    with torch.no_grad():
        before, after = (model.items.embed(model.items(c)) for c in (catalogue, other))
    assert changed(before[item], after[item]) > 1e-3
    rest = [i for i in range(len(catalogue)) if i != item]
    assert changed(before[rest], after[rest]) < 1e-6
    h, swapped = histories([[0, 1]]), deepcopy(model)
    swapped.catalogue = other
    difference = (model.scorer()(h, np.array([0])) - swapped.scorer()(h, np.array([0]))).abs()[0]
    assert difference[item] > 1e-4 and difference[rest].max() < 1e-5


# 12


def test_fault_12_a_checkpoint_carries_no_vocabulary(model, toy_project, tmp_path):
    "Released special tokens make every adapter checkpoint carry the whole embedding."
    words = 49_152
    model.save(tmp_path / "small.safetensors")
    for path in [tmp_path / "small.safetensors", *(toy_project[0] / "models").rglob("*.safetensors")]:
        with safe_open(path, "pt") as f:
            shapes = {k: f.get_slice(k).get_shape() for k in f.keys()}
        assert not [
            k
            for k, shape in shapes.items()
            if max(shape, default=0) >= words or "embed_tokens" in k or "lm_head" in k
        ], path.name
        # the words alone take 57 MB in bfloat16
        assert path.stat().st_size < 4_000_000, f"{path.name}: {path.stat().st_size} bytes"
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen and not frozen & set(model.trainable_state())


def test_fault_12_no_token_is_added(root, model):
    "The LLM reads vectors; no vocabulary is made larger."
    assert isinstance(model.llm.body.get_base_model().embed_tokens, torch.nn.Identity)
    for path in (root / "unirec").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            assert not (
                isinstance(node, ast.Attribute)
                and node.attr in ("resize_token_embeddings", "add_tokens", "add_special_tokens")
            ), f"{path.name}: line {node.lineno}"


# 13


def test_fault_13_metrics_protocols_and_baselines(toy_project):
    "The released code has only MRR and no baselines."
    project, params = toy_project
    table = pd.read_csv(project / "results" / "toy" / "comparison.csv")
    assert set(table.model) == MODELS
    protocols = {"full", f"sampled{params['evaluate']['negatives'] + 1}"}
    wanted = {(m, p, k) for m in MODELS for p in protocols for k in ("mrr", "hit@10", "ndcg@10")}
    assert wanted <= set(zip(table.model, table.protocol, table.metric))
    assert set(table.protocol) == protocols | {"repeated", "cold"}
    assert table.value[table.metric != "targets"].between(0, 1).all()
    assert not table.duplicated(["dataset", "model", "seed", "protocol", "metric"]).any()


def test_fault_13_a_seed_repeats_and_another_differs(toy_project, without_test_file, tmp_path):
    "The released code has no seed."
    same = (toy_project[0] / "models" / "toy" / "pretrain" / "unirec.safetensors").read_bytes()
    assert (without_test_file / "unirec.safetensors").read_bytes() == same
    other = train_again(toy_project, tmp_path, 1, ("items.parquet", "train.parquet", "valid.parquet"))
    assert (other / "unirec.safetensors").read_bytes() != same


def test_fault_13_licence_and_data_sets(root):
    "The released code has no licence file and only All_Beauty."
    assert "Apache License" in (root / "LICENSE").read_text()
    params = read_params(root)
    assert "seed" in params and len(params["datasets"]) >= 2
