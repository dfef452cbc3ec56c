"""Write a checkpoint with the real names and shapes, and random weights whose activations stay in a trained range.

    python scripts/make_random_checkpoint.py OUT --preset tiny|wan2.1-1.3b|wan2.1-14b --kind pyramidal|ppf|plain

One tensor is held at a time, in pieces of at most 64 MiB, so that the 14B preset fits a small machine.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from pyrexport.runtime.chain.pyramid import Resolution
from pyrexport.runtime.errors import UsageError
from pyrexport.runtime.model.description import PAPER_SCHEDULES, describe_model
from pyrexport.runtime.model.families.wan import WanConfig, transformer_tensors
from rich.progress import Progress, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import UMT5Config, UMT5EncoderModel

TRANSFORMERS: Mapping[str, dict[str, Any]] = {
    "tiny": {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "ffn_dim": 128,
        "num_layers": 2,
        "text_dim": 32,
    },
    "wan2.1-1.3b": {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
    "wan2.1-14b": {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40},
}
UMT5: Mapping[str, dict[str, Any]] = {
    "tiny": {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 384},
    "xxl": {
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "vocab_size": 256384,
    },
}
RESOLUTIONS = {
    "tiny": Resolution(17, 64, 64),
    "wan2.1-1.3b": Resolution(81, 448, 832),
    "wan2.1-14b": Resolution(81, 448, 832),
}
PPF_PATCHES = [[1, 2, 2], [2, 4, 4], [4, 8, 8], [8, 16, 16]]
DTYPES = {
    "float32": ("F32", torch.float32),
    "bfloat16": ("BF16", torch.bfloat16),
    "float16": ("F16", torch.float16),
}
PIECE = 16 * 1024 * 1024  # values: 64 MiB of float32
CORPUS = [
    "a red circle moving left",
    "a blue square moving right",
    "a cat and a dog bake a cake in a kitchen",
]


def scale_of(name: str, shape: tuple[int, ...], blocks: int) -> tuple[float, float]:
    """Mean and standard deviation of a tensor: unit gain through a layer, small steps on the residual stream."""
    leaf = name.rsplit(".", 1)[-1]
    if name.endswith("gamma") or ("norm" in name and leaf == "weight"):
        return 1.0, 0.02
    if leaf == "bias":
        return 0.0, 0.02
    if "scale_shift_table" in name or name == "first_frame_embedding":
        return 0.0, 1 / math.sqrt(shape[-1])
    if name.endswith(("shared.weight", "embed_tokens.weight", "relative_attention_bias.weight")):
        return 0.0, 1.0
    if name.endswith("SelfAttention.q.weight"):  # T5 does not divide the scores by sqrt(d_kv)
        return 0.0, 1 / math.sqrt(shape[1] * 8)
    into = math.prod(shape[1:])
    residual = name.endswith(("to_out.0.weight", "ffn.net.2.weight", ".o.weight", ".wo.weight"))
    return 0.0, (1 / math.sqrt(2 * blocks) if residual else 1.0) / math.sqrt(into)


def pieces(name: str, shape: tuple[int, ...], blocks: int, seed: int, dtype: torch.dtype) -> Iterator[bytes]:
    """Bytes of a tensor; its values depend on its name and the seed alone."""
    mean, std = scale_of(name, shape, blocks)
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
    noise = np.random.Generator(np.random.SFC64(key))
    left = math.prod(shape)
    while left:
        count = min(left, PIECE)
        values = noise.standard_normal(count, dtype=np.float32)
        values *= std
        values += mean
        yield torch.from_numpy(values).to(dtype).view(torch.uint8).numpy().tobytes()
        left -= count


def write_safetensors(
    folder: Path,
    stem: str,
    tensors: Mapping[str, tuple[int, ...]],
    *,
    dtype: str,
    blocks: int,
    seed: int,
    shard: int,
    bar: Progress,
) -> None:
    """Stream tensors into one safetensors file, or into shards with an index where they exceed `shard` bytes."""
    code, torch_dtype = DTYPES[dtype]
    size = torch_dtype.itemsize
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors.items():
        nbytes = math.prod(shape) * size
        if groups[-1] and filled + nbytes > shard:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += nbytes
    folder.mkdir(parents=True)
    task = bar.add_task(folder.name, total=sum(math.prod(shape) for shape in tensors.values()))
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"{stem}.safetensors" if len(groups) == 1 else f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in group.items():
            begin, end = end, end + math.prod(shape) * size
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
            weight_map[name] = file
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name, shape in group.items():
                for piece in pieces(name, shape, blocks, seed, torch_dtype):
                    out.write(piece)
                    bar.advance(task, len(piece) // size)
    if len(groups) > 1:
        total = sum(math.prod(shape) for shape in tensors.values()) * size
        write_json(
            folder / f"{stem}.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """One JSON document, indented."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", "utf-8")


def make_tokenizer(corpus: list[str], vocab_size: int) -> Tokenizer:
    """A unigram tokenizer with T5's special tokens, trained on a corpus; the same corpus gives the same ids."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(" {2,}", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    specials = ["<pad>", "</s>", "<s>", "<unk>"]
    alphabet = [chr(code) for code in range(33, 127)]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        unk_token="<unk>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    _put_in_order(tokenizer, len(specials))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def _put_in_order(tokenizer: Tokenizer, specials: int) -> None:
    """By score, then by name: the trainer goes by a hash table, which is another one in each process.

    Single characters that it only keeps for completeness get scores a ten-thousandth apart, just above the lowest: they
    share these in their own order.
    """
    trained = json.loads(tokenizer.to_str())["model"]
    rest = [(piece, round(score, 6)) for piece, score in trained["vocab"][specials:]]
    bound = min(score for _, score in rest) + 1e-4 * len(rest)
    kept = sorted(piece for piece, score in rest if len(piece) == 1 and score <= bound)
    scores = sorted((score for piece, score in rest if piece in kept), reverse=True)
    rest = sorted((entry for entry in rest if entry[0] not in kept), key=lambda entry: (-entry[1], entry[0]))
    vocabulary = [*map(tuple, trained["vocab"][:specials]), *rest, *zip(kept, scores, strict=True)]
    tokenizer.model = models.Unigram(vocabulary, trained["unk_id"], byte_fallback=False)


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """The tokenizer's files as transformers reads them."""
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 512,
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "bos_token": "<s>",
            "unk_token": "<unk>",
        },
    )


def model_index(parts: list[str]) -> dict[str, Any]:
    """`model_index.json` of a WanPipeline with the given parts."""
    classes = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    listed = {name: value if name in parts else [None, None] for name, value in classes.items()}
    return {"_class_name": "WanPipeline", "_diffusers_version": "0.39.0", **listed}


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's tensors, tied ones once."""
    tied = getattr(module, "_tied_weights_keys", None) or ()
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if name not in tied}


def pyramid_document(kind: str, stages: int, wavelet: str, resolution: Resolution, text_length: int) -> dict[str, Any]:
    """`pyramid.json` of a random model; the paper's schedules where there are three stages."""
    few = [2] * (stages - 1) + [1]
    steps = {"2-2-1": [2, 2, 1], "20-20-10": [20, 20, 10]} if stages == 3 else {"-".join(map(str, few)): few}
    plain = {"stages": 1, "schedules": {"50": {"steps": [50], "guidance_scale": 5.0}}, "default_schedule": "50"}
    return {
        "format": 1,
        "kind": kind,
        "stages": stages,
        **({"wavelet": wavelet, "axes": "THW", "first_frame": "separate"} if kind == "pyramidal" else {}),
        "resolution": vars(resolution),
        "text_length": text_length,
        "schedules": {
            name: {
                "steps": n,
                "shift": 5.0,
                "guidance_scale": PAPER_SCHEDULES.get(name, {}).get("guidance_scale", 1.0),
            }
            for name, n in steps.items()
        },
        "default_schedule": next(iter(steps)),
        "negative_prompt": "",
        "patch_sizes": PPF_PATCHES[:stages] if kind == "ppf" else None,
        **(plain if kind == "plain" else {}),
    }


def transformer_config(preset: str, blocks: int | None, width: int | None) -> WanConfig:
    """A preset's transformer, with another number of blocks or width where they are given."""
    fields = dict(TRANSFORMERS[preset])
    if width is not None:
        if width % fields["attention_head_dim"]:
            raise click.UsageError(
                f"--width is a multiple of the head size {fields['attention_head_dim']}, found {width}"
            )
        fields["ffn_dim"] = fields["ffn_dim"] * width // (fields["num_attention_heads"] * fields["attention_head_dim"])
        fields["num_attention_heads"] = width // fields["attention_head_dim"]
    fields["num_layers"] = blocks or fields["num_layers"]
    return WanConfig(**fields)


def write_transformer(
    folder: Path, config: WanConfig, tensors: Mapping[str, tuple[int, ...]], dtype: str, common: dict[str, Any]
) -> None:
    """The transformer's weights and configuration."""
    stem = "diffusion_pytorch_model"
    write_safetensors(folder, stem, tensors, dtype=dtype, blocks=config.num_layers, **common)
    head = {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.39.0",
        "qk_norm": "rms_norm_across_heads",
    }
    write_json(folder / "config.json", head | vars(config))


def write_vae(folder: Path, tiny: bool, common: dict[str, Any]) -> None:
    """The VAE: Wan's own, or one of base width 8 and half its blocks."""
    with init_empty_weights():
        autoencoder = AutoencoderKLWan(**({"base_dim": 8, "num_res_blocks": 1} if tiny else {}))
    stem = "diffusion_pytorch_model"
    write_safetensors(folder, stem, shapes(autoencoder), dtype="float32", blocks=8, **common)
    autoencoder.save_config(folder)


def write_text(partial: Path, tiny: bool, common: dict[str, Any]) -> None:
    """The text encoder, UMT5-XXL or a tiny one, and a tokenizer."""
    config = UMT5Config(**UMT5["tiny" if tiny else "xxl"], feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    with init_empty_weights():
        encoder = UMT5EncoderModel(config)
    folder = partial / "text_encoder"
    dtype = "float32" if tiny else "bfloat16"
    write_safetensors(folder, "model", shapes(encoder), dtype=dtype, blocks=config.num_layers, **common)
    write_json(folder / "config.json", config.to_dict() | {"architectures": ["UMT5EncoderModel"]})
    write_tokenizer(partial / "tokenizer", make_tokenizer(CORPUS, config.vocab_size if tiny else 2000))


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--preset", type=click.Choice(list(TRANSFORMERS)), default="tiny", show_default=True)
@click.option("--kind", type=click.Choice(["pyramidal", "ppf", "plain"]), default="pyramidal", show_default=True)
@click.option("--blocks", type=click.IntRange(1), help="Transformer blocks, in place of the preset's.")
@click.option("--width", type=click.IntRange(1), help="Model width (a multiple of the head size); ffn in proportion.")
@click.option("--stages", type=click.IntRange(1, 4), default=3, show_default=True)
@click.option("--wavelet", default="haar", show_default=True)
@click.option("--resolution", type=Resolution.parse, help="FRAMESxHEIGHTxWIDTH, in place of the preset's.")
@click.option("--text-encoder/--no-text-encoder", default=True, show_default=True)
@click.option("--vae/--no-vae", default=True, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the transformer; float32, or bfloat16 for 14b.")
@click.option("--shard-bytes", type=click.IntRange(1), default=10_000_000_000, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--force", is_flag=True, help="Replace OUT if it is there.")
@click.option("--quiet", is_flag=True)
def main(
    out: Path, preset: str, kind: str, blocks: int | None, width: int | None, stages: int, wavelet: str,
    resolution: Resolution | None, text_encoder: bool, vae: bool, dtype: str | None, shard_bytes: int, seed: int,
    force: bool, quiet: bool,
) -> None:  # fmt: skip
    """Write a random checkpoint to OUT."""
    if kind == "plain" and stages != 3 and stages != 1:
        raise click.UsageError("a plain model has one stage")
    if out.exists() and not out.is_dir():
        raise click.UsageError(f"{out} is a file: expected the name of a folder")
    if out.exists() and not force:
        raise click.UsageError(f"{out} exists; give --force to replace it")
    config = transformer_config(preset, blocks, width)
    tiny = preset == "tiny"
    document = pyramid_document(kind, stages, wavelet, resolution or RESOLUTIONS[preset], 64 if tiny else 512)
    try:
        describe_model(document | ({"wavelet": wavelet} if wavelet != "haar" else {}), config, "checkpoint")
    except UsageError as error:  # before anything is written
        raise click.UsageError(str(error)) from None

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    parts = ["transformer", "scheduler"] + ["vae"] * vae + ["text_encoder", "tokenizer"] * text_encoder
    write_json(partial / "model_index.json", model_index(parts))
    write_json(
        partial / "scheduler" / "scheduler_config.json",
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 5.0},
    )
    if kind != "plain" or resolution is not None:
        write_json(partial / "pyramid.json", document)
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn())
    with Progress(*columns, disable=quiet) as bar:
        common: dict[str, Any] = {"seed": seed, "shard": shard_bytes, "bar": bar}
        dtype = dtype or ("bfloat16" if preset == "wan2.1-14b" else "float32")
        patches = [(p[0], p[1], p[2]) for p in document["patch_sizes"] or []]
        write_transformer(partial / "transformer", config, transformer_tensors(config, kind, patches), dtype, common)
        if vae:
            write_vae(partial / "vae", tiny, common)
        if text_encoder:
            write_text(partial, tiny, common)
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)


if __name__ == "__main__":
    main()
