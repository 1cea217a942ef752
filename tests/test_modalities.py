"""A new modality goes through reader, store, triplets and training by a registration and a name in the
schema: sounds."""

import io
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy import signal
from scipy.io import wavfile

from unirec.data import prepare
from unirec.data.schema import SetSpec
from unirec.data.sources import download
from unirec.encoders import catalogue
from unirec.encoders.modalities import TABLES, register_encoder, unregister_encoder
from unirec.model.hierarchy import EncoderConfig
from unirec.model.recommender import UniRec
from unirec.pipeline import stages

RATE, BANDS = 8_000, 16  # samples a second, mel bands


def read_sound(data: bytes) -> np.ndarray:
    "Samples in [-1, 1]; raises ValueError for what is no wav file."
    rate, samples = wavfile.read(io.BytesIO(data))
    if rate != RATE:
        raise ValueError(f"{rate} samples a second, expected {RATE}")
    return samples.astype(np.float32) / 32768


class LogMel:
    "Mean and spread over time of a log-mel spectrogram, and a fixed random projection: (n, 24)."

    key, width, asked = {"encoder": "log-mel", "bands": BANDS, "rate": RATE}, 24, 0

    def __init__(self):
        edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), BANDS + 2) / 2595) - 1)
        at = np.linspace(0, RATE / 2, 129)
        # (129, bands)
        self.bank = np.stack([np.interp(at, edges[i : i + 3], [0, 1, 0]) for i in range(BANDS)], 1)
        self.project = np.random.default_rng(0).normal(size=(2 * BANDS, self.width)) / BANDS

    def __call__(self, sounds):
        LogMel.asked += len(sounds)
        # (time, bands) each
        mels = [
            np.log(signal.spectrogram(read_sound(s), RATE, nperseg=256)[2].T @ self.bank + 1e-8)
            for s in sounds
        ]
        return np.stack([np.concatenate([m.mean(0), m.std(0)]) @ self.project for m in mels]).astype(
            np.float32
        )


def wav(pitch: float) -> bytes:
    "A second of a tone."
    buffer = io.BytesIO()
    wavfile.write(
        buffer, RATE, (np.sin(2 * np.pi * pitch * np.arange(RATE) / RATE) * 20_000).astype(np.int16)
    )
    return buffer.getvalue()


def make(encode):
    return LogMel()


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """The toy shop with a sound for every product but two: one has none, one's file is broken.

    20 pitches in all.
    """
    register_encoder("audio", "sound", make, files=True, check=read_sound)
    try:
        root, params = tmp_path_factory.mktemp("sounds"), stages.toy_params()
        params["sets"]["toy"]["schema"]["sound"] = {"type": "audio", "source": "sound"}
        spec, raw = SetSpec.from_params("toy", params["sets"]["toy"]), root / "data"
        download(spec, raw)
        meta = [json.loads(line) for line in (raw / "meta_Sample.jsonl").read_text().splitlines()]
        (raw / "sounds").mkdir()
        for i, record in enumerate(meta):
            if i == 0:
                continue
            record["sound"] = f"sounds/{i}.wav"
            (raw / record["sound"]).write_bytes(b"no sound" if i == 1 else wav(200 + 50 * (i % 20)))
        (raw / "meta_Sample.jsonl").write_text("\n".join(map(json.dumps, meta)))
        prepare.prepare(raw, spec, root / "prepared", 20)
        manifest = stages.embed(root / "prepared", raw, spec, params["encode"], root / "embeddings" / "toy")
        data = catalogue.load(root / "prepared", root / "embeddings" / "toy", spec)
        params["pretrain"]["fit"]["epochs"] = 1
        logs = stages.pretrain(data, params, root / "models", models=("unirec",))
        yield root, raw, spec, params, manifest, data, logs
    finally:
        unregister_encoder("audio")


def test_the_reader_keeps_the_paths(shop):
    root, *_ = shop
    sounds = pd.read_parquet(root / "prepared" / "items.parquet").sound
    assert sounds.isna().sum() == 1 and all(re.fullmatch(r"sounds/\d+\.wav", s) for s in sounds.dropna())


def test_the_store_has_one_vector_per_sound(shop):
    root, raw, spec, params, manifest, data, _ = shop
    assert manifest["values"]["audio"] == 20 and manifest["encoders"]["audio"] == LogMel.key
    ((path, cause),) = manifest["files_left_out"]["audio"].items()
    assert path == "sounds/1.wav" and cause and not manifest["pictures_left_out"]
    before = LogMel.asked
    stages.embed(root / "prepared", raw, spec, params["encode"], root / "embeddings" / "toy")
    assert before == 20 and LogMel.asked == before, "an unchanged rerun asks nothing"
    raw_vectors = load_file(root / "embeddings" / "toy" / "vectors.safetensors")["table.audio"]
    c, slot = data.catalogue, len(TABLES)
    start = sum(len(c.tables[n]) for n in TABLES[: TABLES.index("audio")])
    for n in (2, 5, len(c) - 1):
        row = c.value[n][(c.encoder[c.attr[n]] == TABLES.index("audio")) & c.mask[n]] - start
        expected = LogMel()([(raw / data.items.sound[n]).read_bytes()])
        assert slot and len(row) == 1 and np.allclose(raw_vectors[row].numpy(), expected, atol=1e-5)


def test_triplets_have_a_sound(shop):
    *_, data, _ = shop
    c = data.catalogue
    has = (c.mask & (c.encoder[c.attr] == TABLES.index("audio"))).sum(1)
    without = data.items.sound.isna() | (data.items.sound == "sounds/1.wav")
    assert has.tolist() == (~without).astype(int).tolist() and without.sum() == 2
    assert c.id_attr == len(c.attributes) - 1 and int(c.encoder[-1]) == len(TABLES)


def test_training_learns_its_projection(shop):
    root, _, _, params, _, data, logs = shop
    assert len(logs["unirec"]) == 1 and np.isfinite(logs["unirec"][0]["loss"])
    config = EncoderConfig(**params["model"])
    torch.manual_seed(params["seed"])
    fresh, trained = (
        UniRec(data.catalogue, config),
        UniRec(data.catalogue, config).restore(root / "models" / "unirec.safetensors").eval(),
    )
    assert fresh.items.triplets.value["audio"].weight.shape == (params["model"]["width"], LogMel.width)
    assert (
        trained.items.triplets.value["audio"].weight - fresh.items.triplets.value["audio"].weight
    ).abs().max() > 1e-5
    c = data.catalogue
    start = sum(len(c.tables[n]) for n in TABLES[: TABLES.index("audio")])
    with torch.no_grad():
        before = trained.items(c)
        c.tables["audio"][0] += 3.0
        after = trained.items(c)
        c.tables["audio"][0] -= 3.0
    changed = (before - after).abs().amax((1, 2)) > 1e-4
    assert changed.tolist() == ((c.value == start) & c.mask).any(1).tolist() and changed.any(), (
        "the sound reaches the item's tokens, and only of items that have it"
    )


def test_a_store_from_before_the_registration_is_read(toy_project):
    project, params = toy_project
    spec = SetSpec.from_params("toy", params["sets"]["toy"])

    def load():
        return catalogue.load(project / "prepared" / "toy", project / "embeddings" / "toy", spec).catalogue

    before = load()
    register_encoder("smell", "smell", make)
    try:
        after = load()
    finally:
        unregister_encoder("smell")
    assert (
        after.tables["smell"].shape == (0, 1)
        and torch.equal(before.value, after.value)
        and int(after.encoder[-1]) == int(before.encoder[-1]) + 1
    )
