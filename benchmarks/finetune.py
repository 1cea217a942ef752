"""A step of joint fine-tuning in three ways on the same backbone and the same histories: packed (ours),
one prompt per prefix at real length, and the released way, written out plainly."""

import hashlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import peft
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.side_by_side import ROOT, Table, arguments, folder, in_turn, memory, say, spread
from unirec.core.device import keep_memory
from unirec.core.files import locate
from unirec.core.params import read_params
from unirec.data.schema import SetSpec
from unirec.encoders.catalogue import Catalogue, Data, load
from unirec.model.events import Events, training_batches
from unirec.model.hierarchy import EncoderConfig, ItemEncoder
from unirec.model.llm import LORA_MODULES, LLMConfig, cache_folder, load_llm
from unirec.model.recommender import UniRec
from unirec.training.objective import LossConfig, step_loss

transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

LABELS = {
    "packed": "ours: the drawn positions of a window in one packed sequence",
    "prefix": "the same positions, one prompt per prefix at its real length",
    "packed_16": "ours with 16 positions a window, fewer windows, as many positions a step",
    "prefix_16": "the same positions, one prompt per prefix at its real length",
    "released": "the released way, written out plainly",
}
# tokens of a prompt, events asked for, events that reach the prompt, negatives, prompts a step: the released
# code's
LENGTH, HISTORY, KEPT, NEGATIVES, RELEASED_BATCH = 512, 20, 10, 10, 16
STEPS = 2  # batches of ours that one measurement runs; `prefix` runs the same positions


def settings() -> dict:
    "params.yaml."
    return read_params(ROOT)


def movielens(params: dict) -> Data:
    "The prepared data; raises FileNotFoundError that says how to make them."
    at = [ROOT / f / "movielens" for f in ("prepared", "embeddings")]
    if not all(p.exists() for p in at):
        raise FileNotFoundError(
            "prepared/movielens or embeddings/movielens is missing: run `dvc repro embed@movielens` first"
        )
    return load(*at, SetSpec.from_params("movielens", params["sets"]["movielens"]))


def configs(params: dict, layers: int) -> tuple[EncoderConfig, LLMConfig]:
    "params.yaml's shapes with so many layers of the LLM, and the gate open: gradients reach it."
    return EncoderConfig(**params["model"]), LLMConfig(**params["llm"] | {"layers": layers, "gate": 1.0})


# ours


def packed_batches(data: Data, encoder: EncoderConfig, size: int, positions: int) -> list[dict]:
    "The first batches of an epoch, as `unirec.pipeline.stages.train` makes them."
    return training_batches(data.train, Events.of(data.train), encoder.history, positions, size, 0, 0)[:STEPS]


def supervised(batch: dict) -> int:
    "Positions that have a target."
    return int((batch["positions"] >= 0).sum())


def single_positions(
    batches: list[dict],  # packed batches
    size: int,  # positions a batch
) -> list[dict]:  # every supervised position alone, its history cut behind it, batches of similar length
    "The same positions, one prompt each."
    longest = max(b["items"].shape[1] for b in batches)
    rows = {
        k: torch.cat(
            [F.pad(b[k], [0] * (2 * (b[k].ndim - 2)) + [0, longest - b[k].shape[1]]) for b in batches]
        )
        for k, v in batches[0].items()
        if v.ndim >= 2 and k not in ("positions", "targets")
    }
    position, target = (
        torch.cat(
            [F.pad(b[k], [0, max(x[k].shape[1] for x in batches) - b[k].shape[1]], value=-1) for b in batches]
        )
        for k in ("positions", "targets")
    )
    row, column = (position >= 0).nonzero(as_tuple=True)
    position, target = position[row, column], target[row, column]
    out = []
    for part in position.argsort(stable=True).split(size):
        length = int(position[part].max()) + 1
        cut = {k: v[row[part], :length] for k, v in rows.items()}
        cut["present"] = cut["present"] & (torch.arange(length) <= position[part, None])
        out.append(
            cut
            | {
                "positions": position[part, None],
                "targets": target[part, None],
                "events": torch.tensor(len(part)),
            }
        )
    return out


# the released way


def words(uri: str) -> Tensor:
    "The vocabulary's vectors (V, D) of the backbone, kept beside its converted layers."
    path = cache_folder() / f"words-{hashlib.sha256(uri.encode()).hexdigest()[:16]}.safetensors"
    if not path.exists():
        source = locate(uri)
        gguf = (
            {"gguf_file": source.name, "quantization_config": transformers.GgufConfig(dequantize=True)}
            if source.suffix == ".gguf"
            else {}
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source.parent if gguf else source, **gguf, dtype=torch.float32, local_files_only=True
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {"words": model.get_input_embeddings().weight.detach().to(torch.bfloat16).contiguous()}, path
        )
    return load_file(path)["words"]


def tokenizer(uri: str):
    "The backbone's own."
    source = locate(uri)
    return transformers.AutoTokenizer.from_pretrained(
        source.parent if source.suffix == ".gguf" else source,
        **({"gguf_file": source.name} if source.suffix == ".gguf" else {}),
        local_files_only=True,
    )


def title_vectors(c: Catalogue) -> Tensor:  # (N, D)
    "The frozen text vector of each item's title: all that a candidate is in the released way."
    title = (c.attr == c.attributes.index("title")) & c.mask
    return c.tables["text"][c.value.gather(1, title.float().argmax(1, keepdim=True))[:, 0]] * title.any(
        1, keepdim=True
    )


def text_prompts(
    batches: list[dict],  # of `single_positions`
    titles: list[str],
    tokenize: Callable[[str], list[int]],
    prompt: str,
    special: int,  # id of the token whose place an item token takes
    item_tokens: int,  # K_item
    size: int,
    seed: int = 0,
) -> dict:
    """Prompts of `size` positions drawn at random: titles as text, K places for item tokens behind each,
    padded to 512 tokens. Made before the clock runs."""
    g, drawn = np.random.default_rng(seed), []
    for _ in range(size):
        b = batches[g.integers(len(batches))]
        r = int(g.integers(len(b["items"])))
        # of 20 events, the oldest 10
        drawn.append((b["items"][r][b["present"][r]][-HISTORY:][:KEPT].tolist(), int(b["targets"][r, 0])))
    ids, attention = torch.zeros(size, LENGTH, dtype=torch.long), torch.zeros(size, LENGTH, dtype=torch.long)
    for i, (history, _) in enumerate(drawn):
        text = tokenize(prompt)
        for item in history:
            text += tokenize(f" {titles[item]}") + [special] * item_tokens
        text = text[:LENGTH]
        ids[i, : len(text)], attention[i, : len(text)] = torch.tensor(text), 1
    target = torch.tensor([t for _, t in drawn])
    # the right one is column 0
    candidates = torch.cat(
        [target[:, None], torch.as_tensor(g.integers(len(titles), size=(size, NEGATIVES)))], 1
    )
    return {"ids": ids, "attention": attention, "histories": [h for h, _ in drawn], "candidates": candidates}


class Released(nn.Module):
    "Titles and item tokens in a text prompt of 512 tokens, mean pooling, 11 text-only candidates."

    def __init__(self, catalogue: Catalogue, config: EncoderConfig, llm: LLMConfig):
        super().__init__()
        self.catalogue, self.items = catalogue, ItemEncoder(catalogue, config)
        body, prompt, *_ = load_llm(llm)
        table = words(llm.uri)
        self.special = len(table)  # it adds a token to the vocabulary
        self.words = nn.Embedding.from_pretrained(torch.cat([table, table.mean(0, keepdim=True)]))
        self.body = peft.get_peft_model(
            body,
            peft.LoraConfig(
                r=llm.rank, lora_alpha=llm.alpha, lora_dropout=llm.dropout, target_modules=LORA_MODULES
            ),
        )
        self.register_buffer("titles", title_vectors(catalogue))
        self.item, self.query, self.candidate = (
            nn.Linear(config.width, prompt.shape[1]),
            nn.Linear(prompt.shape[1], config.out),
            nn.Linear(self.titles.shape[1], config.out),
        )

    def inject(self, batch: dict) -> Tensor:  # (B, 512, D)
        "Word vectors, with an item token at every special token: token by token, in Python."
        tokens = self.item(
            self.items(self.catalogue, torch.tensor([i for h in batch["histories"] for i in h])).flatten(0, 1)
        )
        embedded, special, rows, n = self.words(batch["ids"]), self.special, [], 0
        for prompt, vectors in zip(batch["ids"].tolist(), embedded):
            row = []
            for token, vector in zip(prompt, vectors):
                if token == special:
                    vector, n = tokens[n].to(vector.dtype), n + 1
                row.append(vector)
            rows.append(torch.stack(row))
        return torch.stack(rows)

    def forward(self, batch: dict) -> Tensor:
        "Loss of one batch of prompts."
        states = self.body(
            inputs_embeds=self.inject(batch), attention_mask=batch["attention"], use_cache=False
        ).last_hidden_state
        query = F.normalize(self.query(states.float().mean(1)), dim=-1)  # over all 512 places, padding too
        candidates = F.normalize(self.candidate(self.titles[batch["candidates"]]), dim=-1)  # (B, 11, out)
        scores = (candidates @ query[..., None])[..., 0] / 0.07
        return F.cross_entropy(scores.float(), torch.zeros(len(scores), dtype=torch.long))


# measurement


def trainer(
    net: nn.Module,
    loss: Callable[[dict], Tensor],
    batches: list[dict],
    fit: dict,
    bf16: bool,
    # kernels that torch may choose from
    attention: list[SDPBackend] = list(SDPBackend.__members__.values()),
) -> Callable[[], float]:
    "One run: forward, backward, clipping and AdamW for each of the batches; returns the last loss."
    trained = [p for p in net.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=fit["lr"], weight_decay=fit["weight_decay"])
    net.train()

    def run() -> float:
        for batch in batches:
            optimiser.zero_grad(set_to_none=True)
            with sdpa_kernel(attention):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    value = loss(batch)
                value.backward()
            nn.utils.clip_grad_norm_(trained, fit["clip"])
            optimiser.step()
        return float(value.detach())

    return run


def build(
    side: str, bf16: bool, layers: int, params: dict, data: Data | None = None
) -> tuple[Callable[[], float], int]:
    "One side: a run, and the supervised positions of a run."
    keep_memory()
    torch.manual_seed(0)
    data = data or movielens(params)
    encoder, llm = configs(params, layers)
    p = params["finetune"]
    per_window = 16 if side.endswith("_16") else p["batch"]["positions"]
    # windows a step: as many positions on every side
    size = max(1, p["batch"]["size"] * p["batch"]["positions"] // per_window)
    batches = packed_batches(data, encoder, size, per_window)
    if side == "released":
        net, words_of = Released(data.catalogue, encoder, llm), tokenizer(llm.uri)
        batches = [
            text_prompts(
                single_positions(batches, 64),
                data.items.title.fillna("").tolist(),
                lambda t: words_of(t, add_special_tokens=False)["input_ids"],
                llm.prompt,
                net.special,
                encoder.item_tokens,
                RELEASED_BATCH,
            )
        ]
        return trainer(net, net, batches, p["fit"], bf16), RELEASED_BATCH
    net, loss = (
        UniRec(data.catalogue, encoder, llm),
        LossConfig(full_catalogue=p["loss"]["full_catalogue"], negatives=p["loss"]["negatives"]),
    )
    if side.startswith("prefix"):
        batches = single_positions(batches, size * per_window)
    return trainer(
        net, lambda b: step_loss(net, b, loss)["loss"], batches, p["fit"], bf16, [SDPBackend.MATH]
    ), sum(map(supervised, batches))


def build_run(*arguments) -> Callable[[], float]:
    "The run alone, for the measurement of memory."
    return build(*arguments)[0]


@torch.no_grad()
def agreement(data: Data, params: dict, layers: int) -> float:
    """Largest difference between the query embeddings (length 1) of packed and of single prompts, same
    weights, dropout off."""
    torch.manual_seed(0)
    net = UniRec(data.catalogue, *configs(params, layers)).eval()
    batch = packed_batches(data, net.config, 8, params["finetune"]["batch"]["positions"])[0]
    tokens = net.items(net.catalogue)
    packed = net.query(tokens, batch)[batch["positions"] >= 0]
    order = batch["positions"][batch["positions"] >= 0].argsort(stable=True)
    single = torch.cat([net.query(tokens, b)[:, 0] for b in single_positions([batch], 8)])
    worst = (packed[order] - single).abs().max().item()
    if worst > 0.05:
        raise RuntimeError(f"packed and single prompts differ by {worst:.3f}")
    return worst


def measure(
    table: Table,
    params: dict,
    layers: int,
    pairs: int,
    precisions: tuple[str, ...],
    sides: tuple[str, ...] = tuple(LABELS),
) -> pd.DataFrame:
    "Memory of each side in a fresh process, then speed in turn; every pair is a row of the table."
    # converted once, so that no measured process does it
    words(params["llm"]["uri"])
    load_llm(configs(params, layers)[1])
    for precision in precisions:
        for side in sides:
            table.add(
                {
                    "measure": "memory",
                    "precision": precision,
                    "layers": layers,
                    "side": side,
                    "label": LABELS[side],
                    **memory(build_run, side, precision == "bf16", layers, params, runs=1),
                }
            )
            say(
                f"memory, {precision}, {side}: {table.rows[-1]['memory_mb']:.0f} MB,"
                f" {table.rows[-1]['step_mb']:.0f} MB of them for the steps"
            )
    data = movielens(params)
    worst = agreement(data, params, layers)
    say(f"packed and single prompts: queries of length 1 differ by at most {worst:.1e}")
    for precision in precisions:
        built = {side: build(side, precision == "bf16", layers, params, data) for side in sides}
        rows = in_turn({side: run for side, (run, _) in built.items()}, pairs)
        for side, (_, n) in built.items():
            table.add(
                *(
                    {
                        "measure": "time",
                        "precision": precision,
                        "layers": layers,
                        "side": side,
                        "label": LABELS[side],
                        "pair": i,
                        "positions": n,
                        "seconds": r[side],
                        "positions_per_s": n / r[side],
                        "ratio": built["packed"][1] / r["packed"] / (n / r[side]),
                        "ratio_16": built["packed_16"][1] / r["packed_16"] / (n / r[side]),
                        "query_difference": worst,
                    }
                    for i, r in enumerate(rows)
                )
            )
            mine = [
                r
                for r in table.rows
                if r["measure"] == "time" and r["precision"] == precision and r["side"] == side
            ]
            say(
                f"{precision} {side:9s} {spread([r['positions_per_s'] for r in mine])} positions/s; packed is"
                f" x{spread([r['ratio'] for r in mine])}, packed_16 x{spread([r['ratio_16'] for r in mine])}"
            )
    return summary(pd.DataFrame(table.rows))


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    "Medians and ranges per side; `ratio`, `ratio_16` and `memory_share`: packed (and packed_16) against it."
    time = (
        rows[rows.measure == "time"]
        .groupby(["precision", "side"], sort=False)
        .agg(
            pairs=("ratio", "size"),
            positions=("positions", "first"),
            positions_per_s=("positions_per_s", "median"),
            ratio=("ratio", "median"),
            lowest=("ratio", "min"),
            highest=("ratio", "max"),
            ratio_16=("ratio_16", "median"),
            lowest_16=("ratio_16", "min"),
            highest_16=("ratio_16", "max"),
        )
    )
    time = time.join(
        rows[rows.measure == "memory"].set_index(["precision", "side"])[["memory_mb", "step_mb"]]
    )
    ours = time.memory_mb.xs("packed", level="side")
    return time.assign(
        memory_share=ours.reindex(time.index.get_level_values("precision")).to_numpy() / time.memory_mb
    ).reset_index()


def main() -> None:
    "Command line."
    parser = arguments(__doc__)
    parser.add_argument(
        "--layers", type=int, default=None, help="first layers of the LLM, default those of params.yaml"
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=["fp32", "bf16"],
        default=["fp32", "bf16"],
        help="of autocast; the frozen backbone itself is kept in bf16",
    )
    args = parser.parse_args()
    params = settings()
    layers = args.layers or (1 if args.quick else params["llm"]["layers"])
    if args.quick:
        params["finetune"]["batch"] |= {"size": 4, "positions": 2}
    batch = params["finetune"]["batch"]
    table = Table(
        "finetune",
        folder(args),
        quick=args.quick,
        dataset="movielens",
        llm=params["llm"] | {"layers": layers},
        model=params["model"],
        batch=batch,
        labels=LABELS,
        released={
            "tokens": LENGTH,
            "history": HISTORY,
            "kept": KEPT,
            "negatives": NEGATIVES,
            "prompts a step": RELEASED_BATCH,
        },
        what=(
            f"forward + backward + clipping + AdamW; a run of packed is {STEPS} steps, of prefix as many over"
            " the same supervised positions, of the released way one step; tokenisation is not timed; memory"
            " of each side in a fresh process, above the imports; ratio and ratio_16: positions/s of packed"
            " and packed_16 over this side's in the same pair"
        ),
    )
    say(
        measure(
            table, params, layers, args.pairs or (1 if args.quick else 3), tuple(args.precision)
        ).to_string(index=False, float_format="%.4g")
    )


if __name__ == "__main__":
    main()
